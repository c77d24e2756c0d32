"""Progress on a terminal: one bar for what is under way, one line for what is done.

Shown on standard error by Rich, so that results on standard output can be piped. Where that is no terminal only the lines
are left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from pennyweight.model.train import EpochLog, Progress

if TYPE_CHECKING:
    from pennyweight.optimize.search import Step


class Watch(NamedTuple):
    """Three ears for what goes on."""

    tell: Callable[[str], None]
    """A line."""
    train: Callable[[Progress | EpochLog], None]
    """A training."""
    step: Callable[[Step], None]
    """A search."""


@contextmanager
def watching(console: Console) -> Iterator[Watch]:
    """Show what the three are told, as long as the block lasts."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)

        def tell(line: str) -> None:
            bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
            bar.update(task, description="", completed=0.0)

        def train(event: Progress | EpochLog) -> None:
            if isinstance(event, EpochLog):
                done = f"  epoch {event.epoch}: loss {event.loss:.4f}, validation {event.metric:.4f}, {event.seconds:.1f} s"
                bar.console.print(done, markup=False, highlight=False)
                return
            share = (event.epoch - 1 + event.step / event.steps) / event.epochs
            now = f"epoch {event.epoch}: loss {event.loss:.4f}, {event.rows_per_s:,.0f} rows/s"
            if event.workers:
                now += f"; ms a step of each worker: {', '.join(f'{ms:.0f}' for ms in event.workers)}"
            bar.update(task, completed=share, description=now)

        def step(event: Step) -> None:
            bar.update(task, completed=event.share, description=event.message[:100])
            trial = event.trial
            if trial is not None and trial.measured is not None and trial.validation is not None:
                spent, drop = trial.measured, trial.validation.drop
                line = f"  {spent.bytes / 1e3:8.1f} kB  p99 {spent.p99_ms:6.2f} ms  drop {drop:+.4f}  {event.message}"
                bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

        yield Watch(tell, train, step)
