"""The command ``cda4rec train``, and what else trains under the eyes of the user."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from cda4rec_jax.cli.arguments import require_positive
from cda4rec_jax.cli.console import Stopped, TrainingView, in_shell, standard_output
from cda4rec_jax.cli.process import join_processes, set_up_process
from cda4rec_jax.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from cda4rec_jax.training import RunConfig


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train cloud agent, device agent and planner together (or SASRec, the baseline) into a run directory."""

    preset: str = "auto"
    """auto (the one named like the data, or one that fits its size), amazon-beauty, ml-1m, synthetic, tiny; sasrec or
    sasrec-PRESET for the baseline of that size."""
    data: str = "synthetic"
    """What to train on: synthetic[:users=500,items=200,seed=1], or a folder (prepared, RecBole or MovieLens)."""
    text: Path | None = None
    """Item vectors that cda4rec encode wrote, instead of TF-IDF; the run keeps a copy."""
    planner: str | None = None
    """A planner of your own to learn, package.module:Class, from an installed package or this folder; the run remembers it."""
    out: Path | None = None
    """Run directory; runs/DATA-PRESET if not given."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint, with its own configuration and data."""
    overwrite: bool = False
    """Replace the run in --out, once the data has been read."""
    epochs: int | None = None
    """Passes over the data; the preset's if not given."""
    learning_rate: float | None = None
    """Peak of the schedule; the preset's if not given."""
    max_minutes: float | None = None
    """Stop the agents' training after so many minutes, each time that they are trained; the planner's last steps come on top."""
    checkpoint_minutes: float | None = None
    """Minutes between checkpoints; 0 saves after every step. The preset's (2) if not given."""
    seed: int | None = None
    """Of the weights, the order of the data and all draws; the preset's (0) if not given."""
    resident_items: int | None = None
    """Most popular items whose records every device holds and searches for itself whenever it ranks; the preset's (100) if not given.
    All of a small catalogue, where a device has room: each takes some hundred bytes."""
    k_core: int | None = None
    """Events that every user and every item must have; the preset's (5) if not given."""
    rows_per_batch: int | None = None
    """Packed rows of one step, over all devices; the preset's if not given."""
    loss: Literal["full", "sampled", "in-batch"] | None = None
    """What the agents' next-item loss sums over: all items, items drawn by popularity, or the targets of the batch; the last two with
    logQ correction. The preset's (full) if not given."""
    sampled_items: int | None = None
    """Items that one step of --loss sampled draws; the preset's (1024) if not given."""
    label_smoothing: float | None = None
    """Share of the label that goes from the next item to all items, 0 to less than 1; the preset's (0) if not given."""
    accumulation_steps: int | None = None
    """Parts into which the rows of a step are cut to save memory: the gradient is that of all. The preset's (1) if not given."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] | None = None
    """What the decoders compute in; weights stay float32. The preset's (auto: bfloat16 on GPU and TPU) if not given."""
    mesh: str | None = None
    """Devices to train on: data=4,items=2 splits batches over 4 and the item table over 2. One device if not given. A run may be
    resumed on another mesh."""
    coordinator: str | None = None
    """HOST:PORT of the first of several processes that train together, each started with this command."""
    num_processes: int | None = None
    """How many processes train together."""
    process_id: int | None = None
    """Which of them this is: 0, 1, ..."""
    distributed: bool = False
    """Ask the cluster for these three (SLURM, Open MPI, Cloud TPU and others that JAX knows)."""

    def run(self) -> None:
        """Train, and say where the run is."""
        changes = self._changes()
        several = self._several_processes()
        set_up_process()
        if several:
            join_processes(self.coordinator, self.num_processes, self.process_id)
        from cda4rec_jax.data.sources import source_name
        from cda4rec_jax.runs.processes import is_first
        from cda4rec_jax.training.mesh import make_mesh

        mesh = None if self.mesh is None else make_mesh(self.mesh)
        out = self.out or Path("runs") / f"{source_name(self.data)}-{self.preset}"
        config = self._resumed(out) if self.resume else self._configured(changes)
        console = standard_output(quiet=not is_first())
        train(self.data, config, out, console, resume=self.resume, overwrite=self.overwrite, mesh=mesh)

    def _several_processes(self) -> bool:
        """Whether the flags make this one process of several."""
        named = [self.coordinator is not None, self.num_processes is not None, self.process_id is not None]
        if any(named) and (not all(named) or self.distributed):
            raise UserError("--coordinator, --num-processes and --process-id go together, and --distributed stands for all three")
        if (any(named) or self.distributed) and self.mesh is None:
            raise UserError("several processes train on one mesh of all their devices: add --mesh, such as --mesh data=2")
        require_positive(self.num_processes, "--num-processes")
        if self.process_id is not None and not 0 <= self.process_id < (self.num_processes or 0):
            raise UserError(
                f"--process-id must be 0 to {(self.num_processes or 1) - 1} for so many processes, got {self.process_id}"
            )
        return any(named) or self.distributed

    def _changes(self) -> dict[str, int | float | str]:
        """What the flags change of the preset's ``TrainConfig``."""
        require_positive(self.epochs, "--epochs")
        require_positive(self.learning_rate, "--learning-rate")
        require_positive(self.max_minutes, "--max-minutes")
        require_positive(self.checkpoint_minutes, "--checkpoint-minutes", or_zero=True)
        require_positive(self.seed, "--seed", or_zero=True)
        require_positive(self.resident_items, "--resident-items")
        require_positive(self.k_core, "--k-core")
        require_positive(self.rows_per_batch, "--rows-per-batch")
        require_positive(self.accumulation_steps, "--accumulation-steps")
        require_positive(self.sampled_items, "--sampled-items")
        require_positive(self.label_smoothing, "--label-smoothing", or_zero=True)
        if self.label_smoothing is not None and self.label_smoothing >= 1:
            raise UserError(
                f"--label-smoothing must be less than 1, of which the next item keeps the rest, got {self.label_smoothing}"
            )
        if self.sampled_items is not None and self.loss != "sampled":
            raise UserError("--sampled-items says how many items --loss sampled draws: add --loss sampled, or leave it out")
        changes = {
            "epochs": self.epochs,
            "learning_rate": self.learning_rate,
            "max_seconds": None if self.max_minutes is None else 60 * self.max_minutes,
            "checkpoint_minutes": self.checkpoint_minutes,
            "seed": self.seed,
            "rows_per_batch": self.rows_per_batch,
            "accumulation_steps": self.accumulation_steps,
            "compute_dtype": self.compute_dtype,
            "loss": self.loss,
            "sampled_items": self.sampled_items,
            "label_smoothing": self.label_smoothing,
        }
        return {name: value for name, value in changes.items() if value is not None}

    def _configured(self, changes: dict[str, int | float | str]) -> "RunConfig":
        from cda4rec_jax.pipeline.system import with_planner
        from cda4rec_jax.presets import preset

        config = preset(self.preset, self.data)
        trained = dataclasses.replace(config.train, **changes)
        text_file = None if self.text is None else str(self.text)
        system = config.system if self.planner is None else with_planner(config.system, self.planner)
        if self.resident_items is not None:
            if system.device is None:
                raise UserError("a baseline has one agent and no device: leave --resident-items out, or take another preset")
            system = dataclasses.replace(system, resident_items=self.resident_items)
        return dataclasses.replace(config, system=system, train=trained, k_core=self.k_core or config.k_core, text_file=text_file)

    def _resumed(self, out: Path) -> "RunConfig":
        from cda4rec_jax.runs import RunDirectory
        from cda4rec_jax.training import RunConfig

        if self.overwrite or self.k_core or self.text or self.planner or self.resident_items or self._changes():
            raise UserError("--resume goes on as the run began: leave --overwrite and the settings of training out")
        if self.out is not None and (self.preset != "auto" or self.data != "synthetic"):  # without --out they name the run
            raise UserError("--resume goes on with the preset and the data of the run in --out: leave --preset and --data out")
        return RunDirectory.open(out).read_config("run", RunConfig)


def train(
    source: str,
    config: "RunConfig",
    out: Path,
    console: Console,
    *,
    resume: bool = False,
    overwrite: bool = False,
    mesh: "Mesh | None" = None,
) -> None:
    """``train_run`` under the eyes of the user. Raises Stopped after Ctrl-C."""
    from cda4rec_jax.training import train_run

    view = TrainingView(console, config.train.max_seconds)
    with resumable(out, resume), view:
        run = train_run(source, config, out, resume=resume, overwrite=overwrite, mesh=mesh, watch=view.watch, tell=view.tell)
    console.print(f"trained: {run.path}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def resumable(out: Path, resume: bool) -> Iterator[None]:
    """Turns Ctrl-C into Stopped, which says what is saved: the run that is resumed, a new one, or one that was to be replaced."""
    from cda4rec_jax.training import Interrupted

    before = _written(out / "config.json")
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as interruption:
        now = _written(out / "config.json")
        if now is not None and (resume or now != before):
            message = f"stopped; the run is saved. Continue it with: {in_shell('cda4rec train --out', out, '--resume')}"
        elif now is not None:
            message = f"stopped before the new run began; the run in {out} stays as it was"
        else:
            message = "stopped before the run began; nothing was written"
        raise Stopped(message) from interruption


def _written(file: Path) -> tuple[int, int] | None:
    """Tells a file from the one that replaces it; None where there is none."""
    if not file.is_file():
        return None
    found = file.stat()
    return found.st_ino, found.st_mtime_ns
