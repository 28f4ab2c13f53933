"""One run on disk.

::

    config.json         format_version, kind, versions of the packages that wrote it, and the configurations
    data/               the prepared dataset: recommending needs no other copy
    checkpoints/<step>/ state and position of training; the last two stay
    weights/<name>/     weights worth keeping, such as "best"
    index/              the retrieval index
    <name>.json         results, exposure, cost profile, planner, ...
    <name>.npz          tables of arrays, such as the item statistics
    metrics.jsonl       one line for each logged step

Every file appears by a rename: a process that dies leaves the old content or the new, never half of it. Of a job of several processes
the first one alone writes files; checkpoints and weights are saved by all together.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec
import numpy as np

from cda4rec_jax.errors import UserError
from cda4rec_jax.runs.checkpoints import Checkpoint, CheckpointStore, check_path
from cda4rec_jax.runs.processes import is_first
from cda4rec_jax.runs.provenance import package_versions

FORMAT_VERSION = 2
_CONFIG = "config.json"
FINISHED = "training.json"  # is written last
_METRICS = "metrics.jsonl"
KEPT_FILES = frozenset(  # that nothing else may replace
    {_CONFIG, FINISHED, _METRICS, "statistics.npz", "text.npz", "provenance.json"}
    | {f"{name}.json" for name in ("exposure", "planner", "planner_training", "call_schedule", "cost_profile", "calibration")}
)
_T = TypeVar("_T")


class RunDirectory:
    """A run on disk; made by ``create`` or ``open``.

    ``path`` is the directory, ``kind`` the kind of run ("joint", "sasrec", ...), ``created_by`` the versions of the packages.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]):
        self.path = path
        self.kind: str = header["kind"]
        self.created_by: dict[str, str | None] = header["versions"]
        self._configs: dict[str, Any] = header["config"]
        self._checkpoints = CheckpointStore(path / "checkpoints", keep=2)

    @classmethod
    def create(cls, path: Path | str, config: Mapping[str, Any], kind: str, overwrite: bool = False) -> "RunDirectory":
        """Start a run in a new or empty directory.

        ``config`` maps names to dataclass configurations or plain values; ``read_config`` gives them back. With ``overwrite`` a
        run that is there already is replaced, once the new one has its configuration.

        Raises:
            UserError: a run is there and ``overwrite`` is not set; the directory holds something else; it cannot be written.
        """
        path = Path(path).resolve()
        header = {"format_version": FORMAT_VERSION, "kind": kind, "versions": package_versions(), "config": _plain(config)}
        cls.check_destination(path, overwrite)
        with _explained(path, "create the run directory"):
            if (path / _CONFIG).is_file():
                _replace_run(path, header)
            else:
                path.mkdir(parents=True, exist_ok=True)
                _write_json(path / _CONFIG, header)
        return cls.open(path)

    @classmethod
    def check_destination(cls, path: Path | str, overwrite: bool = False) -> None:
        """Raise the UserError that ``create`` would raise about ``path``, before there is work to lose; nothing is written."""
        path = Path(path).resolve()
        check_path(path)
        with _explained(path, "create the run directory"):
            occupied = path.exists() and any(not _is_temporary(entry) for entry in path.iterdir())
            is_run = (path / _CONFIG).is_file()
        if occupied and not is_run:
            raise UserError(f"{path} is not empty and holds no run: pass another --out.")
        if is_run and not overwrite:
            raise UserError(f"{path} already holds a run: pass --resume to continue it, --overwrite, or another --out.")
        place = path.parent if is_run else next(folder for folder in (path, *path.parents) if folder.exists())
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise UserError(
                f"Cannot create the run directory at {path}: {place} is no folder that can be written. "
                "Choose a directory that can be written."
            )

    @classmethod
    def open(cls, path: Path | str) -> "RunDirectory":
        """Open an existing run.

        Raises:
            UserError: there is no such directory, it is not a run, or another format version wrote it.
        """
        path = Path(path).resolve()
        if not path.exists():
            kept = _replaced_runs(path)
            if kept:
                raise UserError(f"There is no run at {path}; an earlier one is kept in {kept[-1]}: rename it back.")
            raise UserError(f"There is no run at {path}: pass the directory that training wrote.")
        file = path / _CONFIG
        if not file.is_file():
            raise UserError(f"{path} is not a run directory, it has no {_CONFIG}: pass the directory that training wrote.")
        header = _read_json(file)
        version = header.get("format_version") if isinstance(header, dict) else None
        if version is None:
            raise UserError(f"{file} is not the configuration of a run: it has no format_version.")
        if version != FORMAT_VERSION:
            writer = (header.get("versions") or {}).get("cda4rec_jax", "unknown")
            raise UserError(
                f"{path} has run format {version}, this version of cda4rec_jax reads format {FORMAT_VERSION}: "
                f"use the version that wrote it ({writer}), or train again."
            )
        if missing := {"kind", "versions", "config"} - header.keys():
            raise UserError(f"{file} is damaged: it lacks {', '.join(sorted(missing))}. Restore it, or train again.")
        return cls(path, header)

    def read_config(self, name: str, as_type: type[_T]) -> _T:
        """The configuration that was stored under ``name``, as the type (dataclass, dict, ...) it had.

        Raises:
            UserError: the run has no such configuration, or it does not fit the type.
        """
        if name not in self._configs:
            raise UserError(f"{self.path / _CONFIG} has no configuration {name!r}, only {', '.join(sorted(self._configs))}.")
        try:
            return msgspec.convert(self._configs[name], as_type)
        except msgspec.ValidationError as error:
            raise UserError(
                f"{self.path / _CONFIG}, configuration {name!r}: {error}. Was it edited, or written elsewhere?"
            ) from error

    def has_config(self, name: str) -> bool:
        """Whether a configuration was stored under ``name``."""
        return name in self._configs

    @property
    def data_folder(self) -> Path:
        """Where the prepared dataset is, or belongs."""
        return self.path / "data"

    @property
    def index_folder(self) -> Path:
        """Where the retrieval index is, or belongs."""
        return self.path / "index"

    def save_checkpoint(self, step: int, state: Any, extras: Mapping[str, Any], shapes: Any | None = None) -> None:
        """Save the state of training; returns when it is on disk.

        ``state`` is a tree of arrays and PRNG keys; ``extras`` is what JSON can hold, such as the position in the data; ``shapes`` are
        the shapes of ``state`` without padding, where it has any.
        """
        with _explained(self.path, f"save the checkpoint of step {step}"):
            self._checkpoints.save(step, state, extras, shapes)

    def restore_latest(self, abstract_state: Any, shapes: Any | None = None) -> Checkpoint | None:
        """The newest checkpoint as (step, state, extras), or None where no checkpoint was saved yet.

        ``abstract_state`` is a tree of arrays or ``jax.ShapeDtypeStruct`` of the same structure; shardings say where to put it, and
        ``shapes`` which of its shapes are padded, whatever padding was saved.

        Raises:
            UserError: the checkpoint is of another structure.
        """
        steps = self._checkpoints.steps()
        return self._checkpoints.restore(steps[-1], abstract_state, shapes) if steps else None

    def save_weights(self, name: str, tree: Any) -> None:
        """Save a tree of arrays as ``weights/<name>``; the older one of that name stays until the new one is complete."""
        store = self._weights(name)
        with _explained(self.path, f"save the weights {name!r}"):
            store.save(max(store.steps(), default=0) + 1, tree, {})

    def load_weights(self, name: str, abstract: Any | None = None) -> Any:
        """Load the weights of that name into the structure of ``abstract``, or as a flat dict (path to array) without it.

        Raises:
            UserError: the run has no such weights, or they are of another structure.
        """
        store = self._weights(name)
        steps = store.steps()
        if not steps:
            raise self._missing(f"weights {name!r}")
        return store.restore(steps[-1], abstract).state

    def apart(self, out: Path | str) -> Path:
        """Where a run that is made of this one goes, resolved. Raises UserError where replacing what is there would lose this one."""
        out = Path(out).expanduser().resolve()
        if self.path.is_relative_to(out):
            raise UserError(f"--out, {out}, is the run itself or holds it, and it would be lost: name another directory")
        return out

    def write_json(self, name: str, value: Any) -> None:
        """Store a value as ``<name>.json``: plain data, dataclasses, enums, NumPy. NaN and infinities become null."""
        if not is_first():
            return
        with _explained(self.path, f"write {name}.json"):
            _write_json(self._file(name, ".json"), value)

    def read_json(self, name: str) -> Any:
        """The value of ``<name>.json``. Raises UserError where it is missing or damaged."""
        return _read_json(self._existing(name, ".json"))

    def has(self, filename: str) -> bool:
        """Whether the run holds this file, such as "results.json"."""
        return (self.path / filename).is_file()

    def save_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Store named arrays as ``<name>.npz``."""
        if not is_first():
            return
        with _explained(self.path, f"write {name}.npz"), _replacing(self._file(name, ".npz")) as stream:
            np.savez_compressed(stream, allow_pickle=False, **arrays)

    def load_arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of ``<name>.npz``. Raises UserError where it is missing or damaged."""
        file = self._existing(name, ".npz")
        try:
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                return dict(arrays)
        except Exception as error:  # NumPy raises zip, zlib, value and end-of-file errors on damaged files
            raise UserError(f"{file} is damaged ({type(error).__name__}): restore it, or train again.") from error

    def append_metric(self, row: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``; a row has a ``step``."""
        if "step" not in row:
            raise ValueError(f"a row of {_METRICS} needs a step, got {sorted(row)}")
        if not is_first():
            return
        with _explained(self.path, f"write {_METRICS}"), (self.path / _METRICS).open("ab") as stream:
            stream.write(msgspec.json.encode(_plain(row)) + b"\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``, oldest first; a last line that was cut off by a crash is left out.

        Raises:
            UserError: a line is not JSON (its number is named).
        """
        file = self.path / _METRICS
        if not file.is_file():
            return []
        *lines, _ = file.read_bytes().split(b"\n")
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(msgspec.json.decode(line, type=dict[str, Any]))
            except msgspec.DecodeError as error:
                raise UserError(f"{file}, line {number} is damaged ({error}): delete that line.") from error
        return rows

    def truncate_metrics(self, step: int) -> None:
        """Forget the rows after ``step``, as resuming from there writes them again."""
        if not is_first():
            return
        kept = [row for row in self.metrics() if row["step"] <= step]
        with _explained(self.path, f"write {_METRICS}"), _replacing(self.path / _METRICS) as stream:
            stream.writelines(msgspec.json.encode(row) + b"\n" for row in kept)

    def _weights(self, name: str) -> CheckpointStore:
        return CheckpointStore(self._file(f"weights/{name}", ""), keep=1)

    def _file(self, name: str, suffix: str) -> Path:
        return self.path / f"{name}{suffix}"

    def _existing(self, name: str, suffix: str) -> Path:
        file = self._file(name, suffix)
        if not file.is_file():
            raise self._missing(file.name)
        return file

    def _missing(self, what: str) -> UserError:
        if self.has(FINISHED):
            return UserError(f"{self.path} has no {what}, though its training ended: restore it, or train again.")
        return UserError(f"{self.path} has no {what}: training did not get so far. Continue it with --resume.")


def _plain(value: Any) -> Any:
    return msgspec.to_builtins(value, enc_hook=_encode_other, str_keys=True)


def _encode_other(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # arrays and scalars of NumPy and JAX
        return value.tolist()
    raise TypeError(f"cannot store {type(value).__name__} as JSON")


def _write_json(file: Path, value: Any) -> None:
    with _replacing(file) as stream:
        stream.write(msgspec.json.format(msgspec.json.encode(_plain(value)), indent=2) + b"\n")


def _read_json(file: Path) -> Any:
    try:
        return msgspec.json.decode(file.read_bytes())
    except (msgspec.DecodeError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}): restore it, or train again.") from error


def _replace_run(path: Path, header: Mapping[str, Any]) -> None:
    """A new run in the place of one, which is put aside for the moment between two renames, and comes back if the second fails."""
    begun, replaced = (path.with_name(f".{path.name}.{state}-{os.getpid()}") for state in ("begun", "replaced"))
    try:
        begun.mkdir()
        _write_json(begun / _CONFIG, header)
        path.rename(replaced)
        try:
            begun.rename(path)
        except BaseException:
            replaced.rename(path)
            raise
    finally:
        shutil.rmtree(begun, ignore_errors=True)
    shutil.rmtree(replaced)


def _replaced_runs(path: Path) -> list[Path]:
    """Runs that were put aside at ``path`` by processes that were killed then, oldest first."""
    if not path.parent.is_dir():
        return []
    beside = [folder for folder in path.parent.iterdir() if folder.name.startswith(f".{path.name}.replaced-")]
    return sorted((folder for folder in beside if (folder / _CONFIG).is_file()), key=lambda folder: folder.stat().st_mtime_ns)


def _is_temporary(file: Path) -> bool:
    return file.name.startswith(".") and file.suffix == ".tmp"


@contextlib.contextmanager
def _replacing(file: Path) -> Iterator[BinaryIO]:
    """Write a file beside the old one, which is replaced when the block ends without an error."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _explained(path: Path, action: str) -> Iterator[None]:
    """An operating system's refusal is the user's to mend, and is told in one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Cannot {action} at {path}: {error.strerror or error}. Choose a directory that can be written."
        ) from error
