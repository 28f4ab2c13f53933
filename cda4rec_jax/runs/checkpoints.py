"""Checkpoints of arrays on disk, by Orbax. No other module imports Orbax.

A tree is stored flat, one array for each leaf, named by its path (``params/layers/0/kernel``), so that a checkpoint can be read
without the classes that wrote it and a mismatch is reported by name. Typed PRNG keys are stored as their uint32 data.

A step is written under another name and renamed when it is complete, and renamed again before it is deleted. So a folder whose
name is a number is always complete, whenever the process was killed.

In a job of several processes all of them save and restore together, each the shards of its own devices, and all must see the same
folder. An array that is on devices of one process alone is taken to be equal in all, and written once.
"""

import glob
import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding, SingleDeviceSharding

from cda4rec_jax.errors import UserError
from cda4rec_jax.runs.processes import first_does

_UNPADDED = "unpadded"  # item of a checkpoint: shapes of its padded arrays without the padding


class Checkpoint(NamedTuple):
    """One restored checkpoint: the step it was saved at, the tree of arrays, and what was saved beside them."""

    step: int
    state: Any
    extras: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one folder, ``<folder>/<step>``, of which the newest ``keep`` stay."""

    def __init__(self, folder: Path, keep: int):
        self._folder = folder
        self._keep = keep

    def steps(self) -> list[int]:
        """The saved steps, oldest first."""
        if not self._folder.is_dir():
            return []
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdecimal())

    def save(self, step: int, tree: Any, extras: Mapping[str, Any], shapes: Any | None = None) -> None:
        """Write one checkpoint and return when it is on disk; then drop the oldest ones and what killed processes left.

        A step that exists already is replaced. Leaves are arrays (of up to 32 bits a number) or typed PRNG keys. ``shapes`` is the
        tree with the shapes that its leaves have without padding at their ends; None where no leaf is padded.

        Raises:
            UserError: as ``check_path``.
        """
        check_path(self._folder.absolute())
        arrays = {name: _storable(leaf) for name, leaf in _named_leaves(tree).items()}
        unpadded = {name: _storable_shape(leaf).shape for name, leaf in _named_leaves(tree if shapes is None else shapes).items()}
        padded = {name: list(shape) for name, shape in unpadded.items() if shape != arrays[name].shape}
        unfinished = self._folder.absolute() / f"{step}.unfinished"
        first_does(self._clear)
        items: dict[str, Any] = {"arrays": ocp.args.StandardSave(arrays), "extras": ocp.args.JsonSave(dict(extras))}
        if padded:
            items[_UNPADDED] = ocp.args.JsonSave(padded)
        with _checkpointer() as checkpointer:
            checkpointer.save(unfinished, args=ocp.args.Composite(**items))
        first_does(lambda: self._keep_finished(unfinished, step))

    def _clear(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._folder.iterdir():
            if not leftover.name.isdecimal():
                shutil.rmtree(leftover)

    def _keep_finished(self, unfinished: Path, step: int) -> None:
        if step in self.steps():
            self._remove(step)
        for note in unfinished.rglob("commit_success.txt"):
            note.unlink()  # names a path of this machine, and says what the name of the folder says
        unfinished.rename(self._folder / str(step))
        for old in self.steps()[: -self._keep]:
            self._remove(old)

    def restore(self, step: int, abstract: Any | None, shapes: Any | None = None) -> Checkpoint:
        """Read one checkpoint.

        ``abstract`` is a tree of arrays or ``jax.ShapeDtypeStruct`` of the wanted structure; a leaf's sharding, where it has one,
        says where to put it, else it goes to the first device of this process, whatever devices wrote it. Without ``abstract``
        the state is a flat dict, path to array. ``shapes`` as in ``save``, for the wanted structure: padding that was saved is left
        out, and padding that is wanted is 0.

        Raises:
            UserError: the stored arrays are not those of ``abstract`` (all differences are named), or files are damaged.
        """
        path = self._folder.absolute() / str(step)
        try:
            return self._restored(path, step, abstract, shapes)
        except (UserError, MemoryError, jax.errors.JaxRuntimeError):  # the last where a device has no room
            raise
        except Exception as error:  # Orbax raises whatever its parts do where files are cut off, missing or changed
            raise UserError(f"{path} is damaged ({_origin(error)}): restore it, or train again.") from error

    def _restored(self, path: Path, step: int, abstract: Any | None, shapes: Any | None) -> Checkpoint:
        with _checkpointer() as checkpointer:
            unpadded = {}
            if (path / _UNPADDED).is_dir():
                unpadded = checkpointer.restore(path, args=ocp.args.Composite(**{_UNPADDED: ocp.args.JsonRestore()}))[_UNPADDED]
            stored = _stored_shapes(checkpointer.metadata(path), unpadded)
            leaves = stored if abstract is None else _named_leaves(abstract)
            wanted = {name: _storable_shape(leaf) for name, leaf in leaves.items()}
            named = wanted if shapes is None else {name: _storable_shape(leaf) for name, leaf in _named_leaves(shapes).items()}
            _check_match(path, stored, named)
            # What is stored and what is wanted differ in nothing but padding, which Orbax cuts off and adds when it is not strict.
            arrays = ocp.args.StandardRestore(wanted, strict=False)
            items = ocp.args.Composite(arrays=arrays, extras=ocp.args.JsonRestore())
            restored = checkpointer.restore(path, args=items)
        arrays = {name: _as_stated(restored.arrays[name], leaf) for name, leaf in leaves.items()}
        state = arrays if abstract is None else jax.tree.unflatten(jax.tree.structure(abstract), list(arrays.values()))
        return Checkpoint(step, state, restored.extras)

    def _remove(self, step: int) -> None:
        doomed = self._folder / f"{step}.removed"
        (self._folder / str(step)).rename(doomed)
        shutil.rmtree(doomed)


def check_path(path: Path) -> None:
    """Raise UserError for a path below which nothing could be saved: Orbax looks for what it wrote by a pattern made of it."""
    if glob.escape(str(path)) != str(path):
        raise UserError(
            f"{path} holds one of [ * ?, and weights saved below it could not be read again: choose a path without these."
        )


def _origin(error: BaseException) -> str:
    """What the first of a chain of errors says, in one short line: Orbax's own add pages of settings to it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200)


def _checkpointer() -> ocp.Checkpointer:
    handlers = {
        "arrays": ocp.StandardCheckpointHandler(),
        "extras": ocp.JsonCheckpointHandler(),
        _UNPADDED: ocp.JsonCheckpointHandler(),
    }
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))


def _named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, in the tree's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the tree have the same path: a key of a dict contains '/'")
    return named


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _storable(leaf: Any) -> jax.Array | np.ndarray:
    array = jnp.asarray(leaf)
    array = jax.random.key_data(array) if _is_key(array) else array
    return np.asarray(array) if jax.process_count() > 1 and array.is_fully_addressable else array


def _storable_shape(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and place of what ``_storable`` makes of such a leaf."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, Sharding):
        sharding = SingleDeviceSharding(jax.local_devices()[0])
    shape = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _as_stated(array: jax.Array, leaf: Any) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.committed:
        # Orbax commits arrays to their devices; programs compiled for others would be compiled again.
        array = jnp.asarray(np.asarray(array))
    return jax.random.wrap_key_data(array, dtype=cast(Any, leaf.dtype)) if _is_key(leaf) else array


def _stored_shapes(metadata: Any, unpadded: Mapping[str, list[int]]) -> dict[str, jax.ShapeDtypeStruct]:
    tree = metadata.item_metadata["arrays"].tree
    return {
        name: jax.ShapeDtypeStruct(tuple(unpadded.get(name, leaf.shape)), np.dtype(leaf.dtype)) for name, leaf in tree.items()
    }


def _check_match(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    problems = [f"{name} is missing" for name in wanted.keys() - stored.keys()]
    problems += [f"{name} is not expected" for name in stored.keys() - wanted.keys()]
    for name in wanted.keys() & stored.keys():
        have, want = stored[name], wanted[name]
        if (have.shape, have.dtype) != (want.shape, want.dtype):
            problems.append(f"{name} is {have.dtype}{list(have.shape)}, expected {want.dtype}{list(want.shape)}")
    if problems:
        raise UserError(
            f"{path} was saved by a model of another shape or version: {'; '.join(sorted(problems))}. "
            "Use the version and configuration that wrote it, or train again."
        )
