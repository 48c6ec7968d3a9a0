"""`stateferry restore`: an empty data directory from the object store alone."""

from __future__ import annotations

import os
import time
from typing import Any

import click
from rich import progress as bars
from rich.text import Text

from pipeline.objects import open_objects
from pipeline.plans import RestorePlan, Step
from topology import reads, restorer
from topology.building import Progress
from topology.commands.common import common_options, console, emit, is_terminal, rows, signature_option
from topology.data_dir import DataDir
from topology.pace import Pace
from topology.restore_plans import Request, plan_restore
from topology.settings import Settings
from topology.signing import required_signer


@click.command()
@click.option("--height", type=int, help="Any archived height. [default: the newest that can be reached]")
@click.option("--claimed", is_flag=True, help="Return before every key is hashed; a worker proves it later.")
@click.option("--dry-run", is_flag=True, help="Say each step, its bytes, and the estimated time; do nothing.")
@signature_option
@common_options
def restore(settings: Settings, height: int | None, claimed: bool, dry_run: bool, as_json: bool) -> None:
    """Fill the data directory: snapshot parts, range diffs, archived frames. `stateferry run` goes on from there.

    Of all ways to the height the cheapest is taken. A restore that was interrupted goes on where it was.
    """
    started_s = time.monotonic()
    objects = open_objects(settings.objects_url)
    request = Request(chain=settings.chain or None, height=height, signer=required_signer(settings))
    if dry_run:
        planned = plan_restore(objects, request)
        document = _planned(planned, cores=0 if claimed else os.cpu_count() or 1)
        emit(document, as_json=as_json, text=lambda: _plan_text(planned, document))
        return
    with DataDir(settings.data_dir) as data_dir, _Shown() as shown:
        restored = restorer.restore(objects, data_dir.path, request, claimed=claimed, progress=shown.report)
        document = reads.standing(restored.metas, restored.proof)
        document |= _taken(restored, time.monotonic() - started_s)
    emit(document, as_json=as_json, text=lambda: rows(document))


def _planned(planned: RestorePlan, *, cores: int) -> dict[str, Any]:
    estimate = planned.estimate(cores=cores)
    return {
        "chain": planned.chain_id,
        "generation": planned.generation.hex(),
        "height": planned.height,
        "shards": len(planned.wanted),
        "manifest": planned.manifest_name or None,
        "steps": [step._asdict() | {"apply_s": round(step.apply_s, 3)} for step in planned.steps],
        "requests": planned.requests,
        "bytes": planned.size_bytes,
        "estimate": {name: round(getattr(estimate, name), 3) for name in estimate.__slots__},
        "estimated_seconds": round(estimate.seconds, 3),
    }


def _plan_text(planned: RestorePlan, document: dict[str, Any]) -> str:
    lines = [_step_text(step, len(planned.wanted) > 1) for step in planned.steps]
    names = ("height", "requests", "bytes", "estimate", "estimated_seconds")
    return "\n".join([*lines, rows({name: document[name] for name in names})])


def _step_text(step: Step, has_shards: bool) -> str:
    shard = f"  shard {step.shard}" if has_shards and step.shard >= 0 else ""
    return (
        f"{step.kind:<8}  to {step.to_height}{shard}  {step.requests} requests  {step.size_bytes:,} bytes  "
        f"{step.apply_s:.3f} s  {step.name}"
    )


def _taken(restored: restorer.Restored, seconds: float) -> dict[str, Any]:
    taken: dict[str, Any] = {
        "seconds": round(seconds, 3),
        "stages": {stage.value: round(took, 3) for stage, took in restored.seconds.items()},
        "range_diffs": restored.range_diffs,
        "frames": restored.frames,
        "fetched_bytes": restored.fetched_bytes,
    }
    if restored.estimate is not None:
        estimated = restored.estimate.seconds
        taken["estimated_seconds"] = round(estimated, 3)
        taken["estimate_error"] = f"{100 * (estimated - seconds) / seconds:+.0f}%"
    if restored.refused:
        taken["refused"] = restored.refused
    return taken


class _Rate(bars.ProgressColumn):
    """What comes in or is applied, a second."""

    def render(self, task: bars.Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s")


class _Shown:
    """Progress on stderr: a bar on a terminal, else a line now and then."""

    def __init__(self) -> None:
        self._bar = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.TextColumn("{task.completed:,.0f}"),
            _Rate(),
            bars.TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("plan", total=None)
        self._pace = Pace()
        self._is_terminal = is_terminal()

    def __enter__(self) -> _Shown:
        if self._is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_terminal:
            self._bar.stop()

    def report(self, at: Progress) -> None:
        what = f"{at.stage.value} ({at.unit})"
        if self._is_terminal:
            if self._bar.tasks[0].description != what:
                self._bar.reset(self._task, description=what, total=at.total or None)
            self._bar.update(self._task, completed=at.done, total=at.total or None)
        elif (line := self._pace.line(at.stage.value, at.unit, at.done, at.total, time.monotonic())) is not None:
            click.echo(line, err=True)
