"""What a person sees: standard output, and while training runs a bar with loss and time left on a terminal, plain lines elsewhere."""

import os
import shlex
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

if TYPE_CHECKING:
    from cda4rec_jax.training import Progress as Report

PLAIN_LINE_SECONDS = 10.0
_PIPED_COLUMNS = 120  # of a file or a pipe, which rich takes for a terminal of 80
_PHASES = {
    "joint": "training",
    "observing": "preparing fusion and planner",
    "practice": "training fusion and planner",
    "planner": "training fusion and planner",
    "refit": "training again on all events",
    "outcomes": "preparing the planner",
    "policy": "training the planner",
}
_AGENTS, _HEAD = ("loss", ("cloud_loss", "device_loss")), ("fusion loss", ("fusion_loss",))
# What is learned in a phase, and the terms of the loss that tell how far it is; the planner's say nothing to people.
_LOSSES = {"joint": _AGENTS, "refit": _AGENTS, "practice": _HEAD, "planner": _HEAD}


def standard_output(*, quiet: bool = False) -> Console:
    """Standard output: as wide as the terminal, or wide enough for every table where it is none."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=_PIPED_COLUMNS if piped else None, quiet=quiet)


def in_shell(command: str, *words: object) -> str:
    """A command to copy, with words that a shell reads as they are: paths may have spaces, and ids anything."""
    return f"{command} {' '.join(shlex.quote(str(word)) for word in words)}"


class Stopped(Exception):
    """The user stopped the command; the message says what is saved and how to go on."""


class TrainingView:
    """Shows the progress of one training job; ``watch`` and ``tell`` are for ``train_run``.

    A context manager: the bar is on the screen inside of it.
    """

    def __init__(self, console: Console, max_seconds: float = 0.0):
        self._console, self._max_seconds = console, max_seconds
        self._bar = _bar(console, TextColumn("{task.fields[figures]}"))
        self._task = self._bar.add_task("preparing and compiling", total=None, figures="")
        self._phase = ""
        self._first: tuple[int, float] = (0, 0.0)
        self._last_line = time.monotonic()

    def __enter__(self) -> "TrainingView":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def tell(self, line: str) -> None:
        """Print one line above the bar."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def watch(self, progress: "Report") -> None:
        """Show one report of the training loop."""
        now = time.monotonic()
        name = _PHASES[progress.phase]
        if progress.phase != self._phase:
            self._phase, self._first = progress.phase, (progress.step, now)
            self._bar.remove_task(self._task)
            self._task = self._bar.add_task(name, total=progress.num_steps, figures="")
        figures = _losses(progress)
        left = self._seconds_left(progress.step, progress.num_steps, now)
        if left is not None:
            figures.append(f"{_clock(left)} left")
        if figures:
            self._bar.update(self._task, completed=progress.step, figures=", ".join(figures))
        if progress.validation:
            values = ", ".join(f"{key} {value:.4f}" for key, value in progress.validation.items())
            self.tell(f"step {progress.step:,} of {progress.num_steps:,}: validation {values}")
        elif not self._console.is_terminal and now - self._last_line > PLAIN_LINE_SECONDS:
            self._last_line = now
            self.tell(", ".join([f"{name}: step {progress.step:,} of {progress.num_steps:,}", *figures]))

    def _seconds_left(self, step: int, num_steps: int, now: float) -> float | None:
        """From the pace since the first report of this phase, which leaves compiling out; at most what the time limit leaves."""
        first_step, first_time = self._first
        if step <= first_step:
            return None
        left = (now - first_time) / (step - first_step) * (num_steps - step)
        if self._max_seconds and self._phase in ("joint", "refit"):
            left = min(left, max(0.0, first_time + self._max_seconds - now))
        return left


class StagesView:
    """Shows a job of several stages that each know how far they are; a context manager.

    Where there is no terminal, a line on standard error tells of them now and then: the other may be a file of results.
    """

    def __init__(self, console: Console):
        self._bar = _bar(console)
        self._tasks: dict[str, TaskID] = {}
        self._lines = None if console.is_terminal else Console(stderr=True, highlight=False)
        self._last_line = time.monotonic()

    def __enter__(self) -> "StagesView":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def progress(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` are done in a stage."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage)
        self._bar.update(self._tasks[stage], completed=done, total=total)
        if self._lines and time.monotonic() - self._last_line > PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            self._lines.print(f"{stage}: {done:,} of {total:,}", markup=False, soft_wrap=True)


def _losses(progress: "Report") -> list[str]:
    label, terms = _LOSSES.get(progress.phase, ("", ()))
    found = [progress.values[term] for term in terms if term in progress.values]
    return [f"{label} {sum(found):.3f}"] if found else []


def _bar(console: Console, *figures: ProgressColumn) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        *figures,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
