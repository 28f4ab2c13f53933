"""What the experiments share: options, trained runs and ranks that are kept, intervals over users, and files of results."""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from jaxtyping import Float, Int
from rich.console import Console

from cda4rec_jax.baselines import FitConfig
from cda4rec_jax.data import Interactions, Split, load_prepared, prepare
from cda4rec_jax.data.sources import source_name
from cda4rec_jax.errors import UserError
from cda4rec_jax.evaluation.accuracy import METRICS
from cda4rec_jax.evaluation.conditions import can_be_stale, plan_ranks
from cda4rec_jax.messages import EgressLevel
from cda4rec_jax.metrics import paired_intervals
from cda4rec_jax.pipeline.system import SystemConfig
from cda4rec_jax.planner import plan_index
from cda4rec_jax.presets import preset, sasrec
from cda4rec_jax.runs import RunDirectory, provenance
from cda4rec_jax.runs.artifacts import JOINT, TrainedSystem, load_trained
from cda4rec_jax.training import Progress, RunConfig, train_run

RESULTS = Path(__file__).resolve().parent / "results"
WORK = Path("runs/experiments")
COMMAND_LINE = (tyro.conf.OmitArgPrefixes,)
OURS, WITHOUT_TEXT, SASREC_CE = "cda4rec", "cda4rec-without-text", "sasrec-ce"
SELECTION_USERS = 4096  # whose validation events choose a plan, a learning rate, a weight
AGES = (0, 1, 3, 5, 10)  # events by which the cloud's view lags
PROTOCOL = (
    "leave-one-out in time (n-2 train, n-1 validation, n test); seen items removed; ties count against the target; retrieval exact; "
    "means over seeds, then paired bootstrap by user, 95%, 2000 resamples"
)

Arrays = dict[str, np.ndarray]
Values = Float[np.ndarray, "users seeds"]  # one metric, by user and seed


@tyro.conf.configure(tyro.conf.arg(name="shared"))  # as help calls them
@dataclass(frozen=True, kw_only=True)
class Options:
    """What every experiment is told.

    Attributes:
        data: any source that ``cda4rec train --data`` takes; the system is trained where --work does not have it yet.
        run: a finished joint run to take as the system instead (one seed).
        preset_name: of the system, and of the sizes of what it is compared with.
        text: vectors that `cda4rec encode` wrote, instead of TF-IDF; results are named after data and file.
        seeds: seeds 0 to seeds - 1, each for the weights and the order of the data.
        users: evaluate a sample of so many users; all without it.
        work: where trained runs and ranks are kept; experiments and the main table share what they train there.
        out: folder of the results.
    """

    data: str | None = None
    run: Path | None = None
    preset_name: Annotated[str, tyro.conf.arg(name="preset")] = "auto"
    text: Path | None = None
    seeds: int = 1
    users: int | None = None
    work: Path = WORK
    out: Path = RESULTS


class Study:
    """One dataset, one configuration of the system, and everything that was made of them in one folder."""

    def __init__(self, options: Options):
        _check(options)
        self.options, self.console, self.seeds = options, Console(stderr=True), range(options.seeds)
        if options.run is not None:
            self._given = RunDirectory.open(options.run)
            if self._given.kind != JOINT:
                raise UserError(f"{options.run} is a run of kind {self._given.kind!r}: --run takes a joint run")
            self.config = self._given.read_config("run", RunConfig)
            self.prepared = self._given.data_folder
            self.name = run_name(self._given)
            written = self._given.read_json("provenance")["time"]
            mark = hashlib.sha256(f"{self._given.path} {written}".encode()).hexdigest()[:12]
            self.folder = options.work / self.name / f"run-{mark}"
            self.folder.mkdir(parents=True, exist_ok=True)
        else:
            assert options.data is not None
            self._given = None
            self.config = configured(options.preset_name, options.data, options.text)
            self.folder, self.prepared = prepared_folder(options.work, options.data, self.config, self.console)
            self.name = named(self.interactions.name, self.config)
        self._loaded: dict[Path, TrainedSystem] = {}

    @cached_property
    def interactions(self) -> Interactions:
        """The prepared data."""
        return load_prepared(self.prepared)

    @cached_property
    def users(self) -> Int[np.ndarray, "users"]:
        """The users that are evaluated."""
        return sampled(self.interactions.num_users, self.options.users)

    @cached_property
    def selection_users(self) -> Int[np.ndarray, "users"]:
        """The users on whose validation events choices are made."""
        return sampled(self.interactions.num_users, min(SELECTION_USERS, self.options.users or SELECTION_USERS))

    def of_split(self, split: Split) -> tuple[np.ndarray, np.ndarray]:
        """Users and the positions of their targets: all that are evaluated on test, those who select on validation."""
        users = self.users if split is Split.TEST else self.selection_users
        lengths = np.diff(self.interactions.offsets)[users]
        return users, lengths - (1 if split is Split.TEST else 2)

    def run_path(self, variant: str, seed: int) -> Path:
        """Where the run of a variant is, or belongs."""
        if self._given is not None:
            if variant == OURS:
                return self._given.path
            if variant == SASREC_CE and (self._given.path / "sasrec" / "training.json").is_file():
                return self._given.path / "sasrec"
        return self.folder / f"{variant}-{seed}"

    def trained(
        self, variant: str, seed: int, config: RunConfig | None = None, make: Callable[[Path], Any] | None = None
    ) -> TrainedSystem:
        """The trained system of a variant, which is trained first where it is not there: from ``config``, or by ``make(path)``."""
        path = self.run_path(variant, seed)
        if not (path / "training.json").is_file():
            make_run = make or (lambda path: train_resumed(str(self.prepared), self.seeded(config, seed), path, self.console))
            with self.console.status(f"training {path.name}"):
                make_run(path)
            seconds = RunDirectory.open(path).read_json("training")["seconds"]
            self.console.print(f"{path.name}: trained in {seconds:.0f} s")
        if path not in self._loaded:
            kept = list(self._loaded.items())[-1:]  # two at a time, since a variant is held against the system; they take memory
            self._loaded = {**dict(kept), path: load_trained(path)}
        return self._loaded[path]

    def training_seconds(self, variant: str) -> float:
        """Mean over seeds of what the training of a variant, which is there, took."""
        paths = [self.run_path(variant, seed) for seed in self.seeds]
        return float(np.mean([RunDirectory.open(path).read_json("training")["seconds"] for path in paths]))

    def seeded(self, config: RunConfig | None, seed: int) -> RunConfig:
        """The configuration (of the system itself without one) under a seed."""
        config = config or self.config
        return replace(config, train=replace(config.train, seed=seed))

    def ours(self, seed: int) -> TrainedSystem:
        """The joint system."""
        return self.trained(OURS, seed)

    def without_text(self, seed: int) -> TrainedSystem:
        """The joint system without text vectors; categories stay, which the profile level is made of."""
        return self.trained(WITHOUT_TEXT, seed, replace(self.config, text_dimensions=0, text_file=None))

    def sasrec(self, seed: int) -> TrainedSystem:
        """SASRec with full cross-entropy on ids, in the sizes of the cloud agent."""
        return self.trained(SASREC_CE, seed, sasrec(self.config))

    def cell(self, name: str, make: Callable[[], Arrays]) -> Arrays:
        """Arrays that were stored under a name, or new ones that are stored; of a sample of users apart from those of all."""
        suffix = "" if self.options.users is None else f"-users{self.options.users}"
        return stored(self.folder / "cells" / f"{name}{suffix}.npz", make, self.console)

    def plan_ranks(
        self,
        variant: str,
        seed: int,
        load: Callable[[int], TrainedSystem],
        split: Split,
        age: int = 0,
        level: EgressLevel = EgressLevel.FULL,
    ) -> np.ndarray:
        """Rank [users, plans] under every plan with a view of that age and level; 0 for users too short for it."""
        users, positions = self.of_split(split)

        def make() -> Arrays:
            long_enough = can_be_stale(positions, age)
            found = np.zeros((len(users), 0), np.int32)
            if long_enough.any():
                ranks = plan_ranks(load(seed), users[long_enough], positions[long_enough], age_events=age, level=level)
                found = np.zeros((len(users), ranks.shape[1]), ranks.dtype)
                found[long_enough] = ranks
            return {"ranks": found}

        return self.cell(f"{variant}-{seed}-{split}-plans-{level.name.lower()}-age{age}", make)["ranks"]

    def cloud_ranks(self, variant: str, seed: int, load: Callable[[int], TrainedSystem], age: int = 0) -> np.ndarray:
        """Test rank [users] over the whole catalogue by the cloud agent alone with a view of that age; 0 where too short."""
        users, positions = self.of_split(Split.TEST)

        def make() -> Arrays:
            trained, long_enough = load(seed), can_be_stale(positions, age)
            found = np.zeros(len(users), np.int32)
            weights = jax.device_put(trained.weights)
            if long_enough.any():
                found[long_enough] = trained.population.full_ranks(weights, users[long_enough], positions[long_enough], age)
            return {"ranks": found}

        return self.cell(f"{variant}-{seed}-test-cloud-age{age}", make)["ranks"]

    def best_plan(self, names: Sequence[str], age: int = 0) -> str:
        """The plan of the system that is best on validation among ``names``, with a view of that age."""
        long_enough = can_be_stale(self.of_split(Split.VALIDATION)[1], age)
        found = [self.plan_ranks(OURS, seed, self.ours, Split.VALIDATION, age)[long_enough] for seed in self.seeds]
        return max(names, key=lambda name: values([ranks[:, plan_index(name)] for ranks in found]).mean())

    def test_ranks(self, plan: str, age: int = 0, level: EgressLevel = EgressLevel.FULL) -> list[np.ndarray]:
        """Test ranks [users] of one plan of the system, for each seed."""
        return [self.plan_ranks(OURS, seed, self.ours, Split.TEST, age, level)[:, plan_index(plan)] for seed in self.seeds]

    def result(self, question: str, **content: Any) -> dict[str, Any]:
        """What every result file says of itself, and the content."""
        return {
            "question": question,
            "dataset": self.name,
            "num_users": self.interactions.num_users,
            "num_items": self.interactions.num_items,
            "users_evaluated": len(self.users),
            "seeds": len(self.seeds),
            "protocol": PROTOCOL,
            **content,
            "provenance": provenance(dataset_fingerprint=self.interactions.fingerprint),
        }


def _check(options: Options) -> None:
    if (options.data is None) == (options.run is None):
        raise UserError("name either --data SOURCE, to train what is missing, or --run DIR, a finished run")
    if options.seeds < 1 or (options.users is not None and options.users < 2):
        raise UserError(f"got {options.seeds} seeds and {options.users} users: expected at least 1 seed, and at least 2 users")
    if options.run is not None and options.text is not None:
        raise UserError(f"--run names a run, which has its text, and got --text {options.text}: leave --text out, or name --data")
    if options.run is not None and options.seeds != 1:
        raise UserError(f"--run names one run, with one seed, and got --seeds {options.seeds}: leave --seeds out, or name --data")


def configured(preset_name: str, data: str, text: Path | None) -> RunConfig:
    """The configuration of the system on these data, with this text."""
    config = preset(preset_name, data)
    return config if text is None else replace(config, text_file=str(text.expanduser().resolve()))


def named(dataset: str, config: RunConfig) -> str:
    """What results on a dataset are called: its name, the text file's if there is one, and how many items devices hold if not as usual."""
    text = "" if config.text_file is None else f"-{Path(config.text_file).stem}"
    held = config.system.resident_items
    return f"{dataset}{text}" + ("" if held == SystemConfig.resident_items else f"-resident-{held}")


def run_name(run: RunDirectory) -> str:
    """What results of a finished run are called."""
    return named(load_prepared(run.data_folder).name, run.read_config("run", RunConfig))


def prepared_folder(work: Path, data: str, config: RunConfig, console: Console) -> tuple[Path, Path]:
    """The folder of a dataset under ``work``, and the prepared data in it; a folder that was made with other settings is refused."""
    folder = work / named(source_name(data), config)
    prepared = folder / "data"
    folder.mkdir(parents=True, exist_ok=True)
    console.print(prepare(data, prepared, k_core=config.k_core).lines()[-1])
    settings = {"config": asdict(config), "data": load_prepared(prepared).fingerprint}
    text, file = json.dumps(settings, indent=1), folder / "settings.json"
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise UserError(f"{folder} holds systems trained with other settings or data (see {file.name}): name another --work")
    file.write_text(text, encoding="utf-8")
    return folder, prepared


def train_resumed(source: str, config: RunConfig, path: Path, console: Console | None = None) -> RunDirectory:
    """Train, going on where an earlier attempt was stopped."""
    resumable = (path / "checkpoints").is_dir()

    def watch(progress: Progress) -> None:
        if progress.validation is not None and console is not None:
            quality = progress.validation["ndcg@10"]
            console.print(f"{path.name}: step {progress.step:,} of {progress.num_steps:,}, validation ndcg@10 {quality:.4f}")

    return train_run(source, config, path, resume=resumable, overwrite=not resumable, watch=watch)


def stored(path: Path, make: Callable[[], Arrays], console: Console) -> Arrays:
    """The arrays of a file, or new ones, which are stored whole or not at all."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with console.status(path.stem):
            made = make()
        staged = path.with_suffix(".part.npz")
        np.savez_compressed(staged, allow_pickle=False, **made)
        staged.rename(path)
        console.print(f"{path.stem}: done")
    with np.load(path) as arrays:
        return dict(arrays)


def sampled(num_users: int, at_most: int | None) -> Int[np.ndarray, "users"]:
    """All users, or a sample of ``at_most`` (the same in every experiment)."""
    if at_most is None or at_most >= num_users:
        return np.arange(num_users)
    return np.sort(np.random.default_rng(0).permutation(num_users)[:at_most])


def values(ranks: list[np.ndarray], metric: str = "ndcg@10") -> Values:
    """One metric of every user [users, seeds] from the ranks of each seed."""
    return np.stack([np.asarray(METRICS[metric](found), np.float64) for found in ranks], axis=1)


def estimates(columns: Mapping[str, Values]) -> dict[str, dict[str, Any]]:
    """Mean and 95% interval of each column over the same users; of differences, where columns are differences per user."""
    names, stacked = list(columns), np.stack(list(columns.values()))
    if not stacked.shape[1]:
        return {name: {"mean": None, "low": None, "high": None, "users": 0} for name in names}
    found = paired_intervals(stacked, np.zeros((1, *stacked.shape[1:])))
    return {
        name: {"mean": one.mean_difference, "low": one.low, "high": one.high, "users": one.num_users}
        for name, one in zip(names, found, strict=True)
    }


def sequence_sizes(config: RunConfig, seed: int, rate: float) -> dict[str, Any]:
    """Sizes and optimisation of a sequence baseline that stands beside the system of ``config``."""
    cloud, train = config.system.cloud, config.train
    fit = FitConfig(
        seed=seed,
        epochs=round(1.5 * train.epochs),  # as many as preset sasrec has
        rows_per_batch=train.rows_per_batch,
        learning_rate=rate,
        ema_decay=train.ema_decay,
        patience=train.patience,
        weight_decay=train.weight_decay,
    )
    return {
        "width": cloud.decoder.width,
        "history_length": cloud.history_length,
        "row_tokens": config.packing.row_tokens,
        "dropout_rate": cloud.decoder.dropout_rate,
        "id_scale": cloud.item_table.id_scale,
        "fit": fit,
    }


def with_interval(found: Mapping[str, Any], signed: bool = False) -> str:
    """``mean [low, high]``, or a dash where there are no users."""
    if found["mean"] is None:
        return "-"
    sign = "+" if signed else ""
    return f"{found['mean']:{sign}.4f} [{found['low']:{sign}.4f}, {found['high']:{sign}.4f}]"


def markdown_table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table and an empty one."""
    rule = ["---"] * len(columns)
    return ["| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows)] + [""]


def markdown_page(result: Mapping[str, Any], title: str, lines: list[str]) -> str:
    """A page: the title, what was evaluated, the lines, and where the numbers come from."""
    seeds = "one seed" if result["seeds"] == 1 else f"{result['seeds']} seeds"
    users = f"{result['users_evaluated']:,} of {result['num_users']:,} users"
    source = result["provenance"]
    origin = f"Data {source['dataset_fingerprint'][:12]}, commit {str(source['commit'])[:12]}"
    origin += " (with changes)" if source["dirty"] else ""
    return "\n".join(
        [
            f"# {title}: {result['dataset']}",
            "",
            f"{result['question']} {users}, {result['num_items']:,} items, {seeds}.",
            "",
            *lines,
            f"Protocol: {result['protocol']}.",
            "",
            f"{origin}, {source['cores']} cores of {source['cpu_model']}.",
            "",
        ]
    )


def write_results(
    out: Path, stem: str, result: Mapping[str, Any], page: str, draw: Callable[[Any], Any], console: Console
) -> None:
    """``<stem>.json``, ``.md`` and ``.png``; ``draw(pyplot)`` makes the figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    out.mkdir(parents=True, exist_ok=True)
    path = out / stem
    (out / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / f"{stem}.md").write_text(page, encoding="utf-8")
    figure = draw(pyplot)
    figure.tight_layout()
    figure.savefig(out / f"{stem}.png", dpi=120)
    pyplot.close(figure)
    console.print(f"wrote {path}.json, .md and .png")


def error_bars(found: list[Mapping[str, Any]]) -> tuple[list[float], np.ndarray]:
    """Means, and the lengths of their intervals below and above, as matplotlib wants them; NaN where there are no users."""
    means = [np.nan if one["mean"] is None else one["mean"] for one in found]
    below = [0.0 if one["mean"] is None else max(one["mean"] - one["low"], 0.0) for one in found]
    above = [0.0 if one["mean"] is None else max(one["high"] - one["mean"], 0.0) for one in found]
    return means, np.array([below, above])


def run_script(main: Callable[..., dict[str, Any]], page: Callable[[dict[str, Any]], str]) -> None:
    """Print the page of what ``main`` finds with the command line's options; a user's mistake is told in one line, with status 2."""
    from cda4rec_jax.cli.arguments import ARGUMENT_TYPES
    from cda4rec_jax.cli.process import set_up_process

    set_up_process()
    try:
        print(page(tyro.cli(main, config=COMMAND_LINE, registry=ARGUMENT_TYPES)))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
