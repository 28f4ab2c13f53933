"""The command ``cda4rec bench``, with a sub-command for each benchmark, in the form of ``cli.commands``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cda4rec_jax.cli.console import StagesView, standard_output
from cda4rec_jax.cli.process import set_up_process
from cda4rec_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BenchTrain:
    """Training SASRec: real tokens a second and memory, ours beside JAX with padding, PyTorch and RecTools, at equal loss."""

    data: str | None = None
    """What to train on, as in cda4rec train: synthetic (the default), or a folder (prepared, RecBole or MovieLens)."""
    preset: str = "sasrec"
    """sasrec (of the size that fits the data) or sasrec-PRESET; gpu-256 or gpu-1024 for accelerators, on synthetic tokens."""
    peers: tuple[str, ...] | None = None
    """Whom to measure beside ours: jax, torch, torch-compile, rectools. All that are installed if not given."""
    rounds: int = 15
    """Rounds in which all take turns."""
    same_allocator: bool = False
    """Let the others keep freed memory in the process, too, as cda4rec train does; by default they return it, as the C library does."""
    out: Path = Path("runs/bench")
    """Folder for the JSON file and the chart."""
    lower_only: bool = False
    """Only lower the step of a gpu preset for CUDA, which needs no accelerator, and count its operations."""

    def run(self) -> None:
        """See ``bench_train``, ``bench_accelerator`` and ``lower_step``."""
        set_up_process()
        from cda4rec_jax.bench import ACCELERATOR_PRESETS, bench_accelerator, bench_train, lower_step
        from cda4rec_jax.timing import TimingConfig

        timing, console = TimingConfig(rounds=self.rounds), standard_output()
        if self.preset not in ACCELERATOR_PRESETS:
            if self.lower_only:
                raise UserError(f"--lower-only is for the presets {', '.join(ACCELERATOR_PRESETS)}; got --preset {self.preset}")
            with StagesView(console) as view:
                found = bench_train(
                    self.data or "synthetic",
                    preset_name=self.preset,
                    peers=self.peers,
                    timing=timing,
                    same_allocator=self.same_allocator,
                    out=self.out,
                    progress=view.progress,
                )
            found.print(console)
            return
        if self.data is not None or self.peers is not None or self.same_allocator:
            raise UserError(
                f"--preset {self.preset} makes its own tokens and has no peers: leave --data, --peers and --same-allocator out"
            )
        if self.lower_only:
            lower_step(self.preset, ACCELERATOR_PRESETS[self.preset]()).print(console)
            return
        with StagesView(console) as view:
            measured = bench_accelerator(self.preset, timing=timing, out=self.out, progress=view.progress)
        measured.print(console)


@dataclass(frozen=True, kw_only=True)
class BenchPlan:
    """The planner's decision: microseconds of one and decisions in a second, ours beside onnxruntime, PyTorch and NumPy."""

    run_folder: Annotated[Path | None, tyro.conf.arg(name="run")] = None
    """A finished joint run; the standard policy with random weights if not given."""
    peers: tuple[str, ...] | None = None
    """Whom to measure beside ours: onnxruntime, torch, numpy. All that are installed if not given."""
    batches: tuple[int, ...] = (1, 256, 65_536)
    """Requests of one call."""
    rounds: int = 15
    """Rounds in which all take turns."""
    out: Path = Path("runs/bench")
    """Folder for the JSON file and the charts."""

    def run(self) -> None:
        """See ``bench_plan``."""
        set_up_process()
        from cda4rec_jax.bench import bench_plan
        from cda4rec_jax.timing import TimingConfig

        console = standard_output()
        with StagesView(console) as view:
            found = bench_plan(
                self.run_folder,
                peers=self.peers,
                batches=self.batches,
                timing=TimingConfig(rounds=self.rounds),
                out=self.out,
                progress=view.progress,
            )
        found.print(console)


@dataclass(frozen=True, kw_only=True)
class BenchRank:
    """The device's ranking of one request: microseconds, ours beside onnxruntime, PyTorch, plain JAX and NumPy, at equal scores."""

    run_folder: Annotated[Path | None, tyro.conf.arg(name="run")] = None
    """A finished joint run, whose device agent is measured; standard sizes with random weights if not given."""
    peers: tuple[str, ...] | None = None
    """Whom to measure beside ours: onnxruntime, torch, jax, numpy. All that are installed if not given."""
    candidates: int = 100
    """Candidates of a request, with --run."""
    rounds: int = 15
    """Rounds in which all take turns."""
    out: Path = Path("runs/bench")
    """Folder for the JSON file and the charts."""

    def run(self) -> None:
        """See ``bench_rank``."""
        set_up_process()
        from cda4rec_jax.bench import bench_rank
        from cda4rec_jax.timing import TimingConfig

        console = standard_output()
        with StagesView(console) as view:
            found = bench_rank(
                self.run_folder,
                peers=self.peers,
                candidates=self.candidates,
                timing=TimingConfig(rounds=self.rounds),
                out=self.out,
                progress=view.progress,
            )
        found.print(console)


@dataclass(frozen=True, kw_only=True)
class BenchRetrieval:
    """Candidate search: recall against queries a second, exact search, time and memory by catalogue size, and the fastest index."""

    run_folder: Annotated[Path | None, tyro.conf.arg(name="run")] = None
    """A finished joint run, whose item table is searched; a generated set without clusters if not given."""
    items: tuple[int, ...] = (100_000,)
    """Items of the generated set, one or more sizes; none without numbers."""
    batches: tuple[int, ...] = (1, 256)
    """Queries of one call."""
    k: int = 100
    """Items to find."""
    # tyro would write "--no-exact (default: True)", as if it were off
    exact: Annotated[bool, tyro.conf.arg(help_behavior_hint="(default: it is compared)")] = True
    """Leave out the comparison of exact search: 12,101 items in batches of 256, and a million items one query at a time."""
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Catalogue sizes at which time and memory are measured; none without numbers. 10 million takes 4 GB of disk."""
    crossover: tuple[int, ...] = ()
    """Catalogue sizes at which our indices are timed against each other at equal recall; off if not given. Writes a table of times
    into --out; build_index chooses by it once it is copied by hand into the package's folder retrieval."""
    peers: tuple[str, ...] | None = None
    """Whom to measure beside ours: faiss, hnswlib, usearch, pynndescent, torch, numpy. All that are installed if not given."""
    rounds: int = 15
    """Rounds in which all take turns."""
    out: Path = Path("runs/bench")
    """Folder for the JSON file and the charts."""

    def run(self) -> None:
        """See ``bench_retrieval``."""
        set_up_process()
        from cda4rec_jax.bench import bench_retrieval
        from cda4rec_jax.timing import TimingConfig

        console = standard_output()
        with StagesView(console) as view:
            found = bench_retrieval(
                self.run_folder,
                items=self.items,
                batches=self.batches,
                k=self.k,
                exact=self.exact,
                sizes=self.sizes,
                crossover=self.crossover,
                peers=self.peers,
                timing=TimingConfig(rounds=self.rounds),
                out=self.out,
                progress=view.progress,
            )
        found.print(console)


@dataclass(frozen=True, kw_only=True)
class BenchKernels:
    """Every kernel on the backend at hand: times beside plain JAX, shares of the copy and matmul rates, temporary memory."""

    only: tuple[str, ...] | None = None
    """Kernels to measure: topk_dot, segment_attention, linear_cross_entropy, rank_candidates. All if not given."""
    rounds: int = 7
    """Rounds in which all take turns."""
    turn_ms: float = 100.0
    """How long a turn takes."""
    out: Path = Path("runs/bench")
    """Folder for the JSON file."""

    def run(self) -> None:
        """See ``bench_kernels``."""
        set_up_process()
        from cda4rec_jax.bench import bench_kernels
        from cda4rec_jax.timing import TimingConfig

        console, timing = standard_output(), TimingConfig(rounds=self.rounds, block_seconds=self.turn_ms / 1e3)
        with StagesView(console) as view:
            found = bench_kernels(only=self.only, timing=timing, out=self.out, progress=view.progress)
        found.print(console)


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """One warm request: milliseconds by plan, a waterfall of its parts, what concurrent branches gain, and the device's part."""

    run_folder: Annotated[Path, tyro.conf.arg(name="run")] = Path("checkpoints/synthetic-tiny")
    """A finished joint run; the small one that a checkout holds if not given, whose catalogue is tiny."""
    requests: int = 300
    """Timed requests of each plan."""
    users: int = 64
    """Users who take turns."""
    rounds: int = 15
    """Rounds in which both sides of a comparison take turns."""
    out: Path = Path("runs/bench")
    """Folder for the JSON file and the chart."""

    def run(self) -> None:
        """See ``bench_request``."""
        set_up_process()
        from cda4rec_jax.bench import bench_request
        from cda4rec_jax.timing import TimingConfig

        console, timing = standard_output(), TimingConfig(rounds=self.rounds)
        with StagesView(console) as view:
            found = bench_request(
                self.run_folder,
                requests=self.requests,
                users=self.users,
                timing=timing,
                out=self.out,
                progress=view.progress,
            )
        found.print(console)


@dataclass(frozen=True, kw_only=True)
class BenchDispatch:
    """What a call of compiled code costs from Python: microseconds by how arrays and weights get into it, beside others' calls."""

    peers: tuple[str, ...] | None = None
    """Whom to measure beside JAX: onnxruntime, torch, numpy. All that are installed if not given."""
    rounds: int = 15
    """Rounds in which all take turns."""
    turn_ms: float = 50.0
    """How long a turn takes."""
    out: Path = Path("runs/bench")
    """Folder for the JSON file and the chart."""

    def run(self) -> None:
        """See ``bench_dispatch``."""
        set_up_process()
        from cda4rec_jax.bench import bench_dispatch
        from cda4rec_jax.timing import TimingConfig

        console, timing = standard_output(), TimingConfig(rounds=self.rounds, block_seconds=self.turn_ms / 1e3)
        with StagesView(console) as view:
            found = bench_dispatch(peers=self.peers, timing=timing, out=self.out, progress=view.progress)
        found.print(console)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure this package beside others on this machine, by one method: in turns, with a null and the spread over rounds."""

    benchmark: Annotated[
        Annotated[BenchTrain, tyro.conf.subcommand(name="train")]
        | Annotated[BenchPlan, tyro.conf.subcommand(name="plan")]
        | Annotated[BenchRank, tyro.conf.subcommand(name="rank")]
        | Annotated[BenchRetrieval, tyro.conf.subcommand(name="retrieval")]
        | Annotated[BenchKernels, tyro.conf.subcommand(name="kernels")]
        | Annotated[BenchDispatch, tyro.conf.subcommand(name="dispatch")]
        | Annotated[BenchRequest, tyro.conf.subcommand(name="request")],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> None:
        """Run the benchmark that was chosen."""
        self.benchmark.run()
