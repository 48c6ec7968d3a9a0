"""Rows of a benchmark, as a table for people and as JSON for everything else.

A JSON row has `name`, its measures (`changes_per_s`, `keys_per_s`, `bytes_per_change`, `seconds`, ...), `baseline` (the
row of the same run that `ratio` compares with; above 1 is better than it), `peak_rss_mb` and `stages`. What does not
apply is null.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

_WIDTH = 120
"""Of a table that goes to a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A part of a row's time. Stages do not overlap; together they are the whole."""

    name: str
    seconds: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    name: str
    measures: Mapping[str, float]
    baseline: str = ""  # empty: this row has none
    ratio: float | None = None
    peak_rss_mb: float | None = None
    stages: Sequence[Stage] = field(default_factory=tuple)
    changes: int = 0  # what stages are divided by; 0: they are shown in seconds

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **self.measures,
            "baseline": self.baseline or None,
            "ratio": self.ratio,
            "peak_rss_mb": self.peak_rss_mb,
            "stages": [
                {"name": stage.name, "seconds": stage.seconds, "share": stage.share, **self._per_change(stage)}
                for stage in self.stages
            ],
        }

    def _per_change(self, stage: Stage) -> dict[str, float]:
        return {"us_per_change": 1e6 * stage.seconds / self.changes} if self.changes else {}


def stages_of(seconds_by_stage: Mapping[str, float], total_s: float) -> list[Stage]:
    """Measured stages, and as `rest` what none of them covers."""
    rest = total_s - sum(seconds_by_stage.values())
    return [
        Stage(name=name, seconds=seconds, share=seconds / total_s)
        for name, seconds in [*seconds_by_stage.items(), ("rest", rest)]
    ]


def show(title: str, rows: Sequence[Row], *, as_json: bool, notes: Sequence[str] = ()) -> None:
    """Print rows: JSON alone on standard output, or a table with the notes below it. Notes of a JSON run go to
    standard error."""
    if as_json:
        print(json.dumps([row.as_json() for row in rows], indent=1))
        for note in notes:
            Console(stderr=True).print(note, highlight=False)
        return
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=_WIDTH)
    console.print(table(title, rows))
    for note in notes:
        console.print(note, highlight=False)


def table(title: str, rows: Sequence[Row]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row.measures))
    shown = Table(title=title, title_justify="left")
    shown.add_column("row", no_wrap=True)
    for name in [*names, "ratio", "to", "peak RSS MB"]:
        shown.add_column(name.replace("_per_s", "/s").replace("_", " "), justify="left" if name == "to" else "right")
    for row in rows:
        shown.add_row(
            row.name,
            *(_number(row.measures.get(name)) for name in names),
            "" if row.ratio is None else f"{row.ratio:.2f}",
            row.baseline,
            _number(row.peak_rss_mb),
        )
        for stage in row.stages:
            each = f"{1e6 * stage.seconds / row.changes:.2f} us" if row.changes else f"{stage.seconds:.3f} s"
            filler = [""] * (len(names) + 1)
            filler[0] = f"{each}  {stage.share:4.0%}"
            shown.add_row(f"  {stage.name}", *filler, "", style="dim")
    return shown


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.1f}" if value >= 10 else f"{value:.3f}"
