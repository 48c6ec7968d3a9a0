"""What the demo shows: a bar on a terminal, plain lines elsewhere; at the end a table and what to try next."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

_WIDTH = 110
"""Of a table that goes to a file."""
_LINE_EVERY_S = 1.0
_RATE_OVER_S = 2.0
_ETA_AFTER_S = 0.4


class Screen:
    """Says what happens, on stderr; `result` is stdout."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        terminal = Console(highlight=False, markup=False)
        self.result = terminal if terminal.is_terminal else Console(width=_WIDTH, highlight=False, markup=False)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    @contextmanager
    def bar(self, title: str, total_blocks: int) -> Iterator[Bar]:
        """Progress of the slowest node, until the block ends."""
        if not self.console.is_terminal:
            yield Bar(self, title, total_blocks, None)
            return
        with Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[words]}"),
            console=self.console,
            transient=True,
        ) as progress:
            yield Bar(self, title, total_blocks, progress)


class Bar:
    """Height, changes/s over the last two seconds, lag and time to go."""

    def __init__(self, screen: Screen, title: str, total_blocks: int, progress: Progress | None) -> None:
        self._screen = screen
        self._title = title
        self._total = total_blocks
        self._progress = progress
        self._task = TaskID(0) if progress is None else progress.add_task(title, total=total_blocks, words="")
        self._seen: deque[tuple[float, int, int]] = deque()  # when, changes, blocks
        self._last_line_s = 0.0

    def update(self, *, height: int, changes: int, done_blocks: int, lag_blocks: int) -> None:
        now_s = time.monotonic()
        self._seen.append((now_s, changes, done_blocks))
        while now_s - self._seen[0][0] > _RATE_OVER_S:
            self._seen.popleft()
        then_s, changes_then, blocks_then = self._seen[0]
        elapsed_s = now_s - then_s
        rate = (changes - changes_then) / elapsed_s if elapsed_s else 0.0
        pace = (done_blocks - blocks_then) / elapsed_s if elapsed_s else 0.0
        eta = f"{max(self._total - done_blocks, 0) / pace:.0f} s" if pace and elapsed_s > _ETA_AFTER_S else "-"
        shown = "-" if height < 0 else height
        words = f"height {shown:>4}  {rate:>7,.0f} changes/s  lag {lag_blocks:>3} blocks  ETA {eta}"
        if self._progress is not None:
            self._progress.update(self._task, completed=done_blocks, words=words)
        elif now_s - self._last_line_s >= _LINE_EVERY_S:
            self._last_line_s = now_s
            self._screen.say(f"  {self._title}  {words}")


def table(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Table:
    """Facts by node. A row of one cell holds for all of them."""
    shown = Table(show_edge=False, pad_edge=False)
    shown.add_column("")
    for column in columns:
        shown.add_column(column, overflow="fold")
    for name, cells in rows.items():
        shown.add_row(name, *cells)
    return shown
