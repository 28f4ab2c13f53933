"""Training over a mesh of devices: which axis splits what.

``data`` splits the rows of a batch. ``items`` splits the rows of the item table: the id embeddings with their optimiser moments and
average, and the frozen text vectors beside them. All else is on every device. ``jax.jit`` divides the step by these shardings; the
cross-entropy over the catalogue divides itself (``kernels/linear_cross_entropy/sharded.py``).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.linear_cross_entropy.sharded import DATA_AXIS, ITEM_AXIS
from cda4rec_jax.messages import HistoryBatch, SequenceBatch
from cda4rec_jax.retrieval.sharded import place
from cda4rec_jax.training.batches import TrainingBatch
from cda4rec_jax.training.observations import Observation

AXES = (DATA_AXIS, ITEM_AXIS)


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes of both axes from ``data=4,items=2``; an axis that is left out has size 1.

    Raises:
        UserError: another axis, an axis twice, or a size that is no number above 0.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or name in sizes or not (size.isascii() and size.isdecimal() and int(size) > 0):
            raise UserError(f"a mesh of {text!r} cannot be read at {part!r}: expected data=N, items=N, or data=N,items=N")
        sizes[name] = int(size)
    return {axis: sizes.get(axis, 1) for axis in AXES}


def make_mesh(text: str) -> Mesh:
    """The mesh that ``parse_mesh`` describes, over the first devices of this process, or over all devices of a job of several.

    Raises:
        UserError: it cannot be read, or has another number of devices than there are.
    """
    sizes = parse_mesh(text)
    wanted, devices = math.prod(sizes.values()), jax.devices()
    several = jax.process_count() > 1
    if wanted > len(devices) or (several and wanted != len(devices)):
        count = (
            f"exactly {len(devices)}, all that the {jax.process_count()} processes have" if several else f"at most {len(devices)}"
        )
        more = (
            ""
            if several or devices[0].platform != "cpu"
            else (f"; to try it on a CPU, set XLA_FLAGS=--xla_force_host_platform_device_count={wanted}")
        )
        raise UserError(f"a mesh of {text} takes {wanted} devices: choose sizes whose product is {count}{more}")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:wanted])


def rows_multiple(mesh: Mesh | None, rows_per_batch: int, accumulation_steps: int) -> int:
    """What the rows of a batch must be a multiple of.

    Raises:
        UserError: ``rows_per_batch`` is not.
    """
    devices = 1 if mesh is None else mesh.shape[DATA_AXIS]
    multiple = devices * accumulation_steps
    if rows_per_batch % multiple:
        fit = [size for size in range(1, rows_per_batch + 1) if rows_per_batch % (size * accumulation_steps) == 0]
        meshes = f", or a mesh with data={' or '.join(map(str, fit))}" if fit and devices > 1 else ""
        raise UserError(
            f"{rows_per_batch} rows a batch cannot be divided over data={devices} and {accumulation_steps} accumulation steps: "
            f"choose --rows-per-batch as a multiple of {multiple}{meshes}"
        )
    return multiple


class Layout:
    """Where the arrays of one training job are: on one device, or divided over a mesh.

    Rows of the item table must divide among the devices of their axis, so on a mesh they are padded with 0 at the end; these rows are
    no items, and stay 0.
    """

    def __init__(self, mesh: Mesh | None, num_rows: int):
        self.mesh, self.num_rows = mesh, num_rows
        self._data, self._items = (1, 1) if mesh is None else (mesh.shape[DATA_AXIS], mesh.shape[ITEM_AXIS])

    def place(self, tree: Any) -> Any:
        """State or constants, held by this process, to where the step wants them."""
        if self.mesh is None:
            return tree
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: self._place_one(self._padded(path, leaf), self._spec(path)), tree
        )

    def place_batch(self, batch: Any) -> Any:
        """A ``TrainingBatch`` or an ``Observation`` with its rows over ``data``; users that do not divide go to every device."""
        if self.mesh is None or batch is None:
            return batch
        if isinstance(batch, TrainingBatch):
            parts = {name: self.place_batch(value) for name, value in vars(batch).items()}
            return TrainingBatch(**parts)
        if isinstance(batch, SequenceBatch):
            places = {name: PartitionSpec() if name == "prefixes" else PartitionSpec(DATA_AXIS) for name in vars(batch)}
            return SequenceBatch(
                **{name: self._place_one(np.asarray(value), places[name]) for name, value in vars(batch).items()}
            )
        assert isinstance(batch, HistoryBatch | Observation)
        whole = jax.tree.leaves(batch)[0].shape[0] % self._data != 0
        return jax.tree.map(
            lambda leaf: self._place_one(np.asarray(leaf), PartitionSpec() if whole else PartitionSpec(DATA_AXIS)), batch
        )

    def shardings(self, tree: Any) -> Any:
        """Sharding of every leaf of a state that ``place`` has placed."""
        assert self.mesh is not None
        mesh = self.mesh
        return jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, self._spec(path)), tree)

    def everywhere(self) -> NamedSharding:
        """The sharding of what every device holds whole."""
        assert self.mesh is not None
        return NamedSharding(self.mesh, PartitionSpec())

    def in_context(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` that sees the mesh where it is traced: operations then choose what XLA can divide."""
        if self.mesh is None:
            return function
        mesh = self.mesh.abstract_mesh

        def traced(*arguments: Any) -> Any:
            with jax.sharding.use_abstract_mesh(mesh):
                return function(*arguments)

        return traced

    def whole(self, tree: Any) -> Any:
        """All rows of the item table on every device, without padding; for use in a compiled function."""
        if self.mesh is None:
            return tree

        def gather(path: tuple, leaf: Any) -> Any:
            if not _is_item_table(path):
                return leaf
            return jax.lax.with_sharding_constraint(leaf, self.everywhere())[: self.num_rows]

        return jax.tree_util.tree_map_with_path(gather, tree)

    def local(self, tree: Any) -> Any:
        """A placed tree as arrays of one device of this process, without padding: what evaluation and saved weights are made of."""
        if self.mesh is None:
            return tree
        gathered = jax.jit(self.whole, out_shardings=self.everywhere())(tree)
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), gathered)

    def _padded(self, path: tuple, leaf: Any) -> np.ndarray:
        values = np.asarray(leaf, dtype=jnp.result_type(leaf))
        if not _is_item_table(path):
            return values
        return np.pad(values, ((0, -self.num_rows % self._items), (0, 0)))

    def _spec(self, path: tuple) -> PartitionSpec:
        return PartitionSpec(ITEM_AXIS) if _is_item_table(path) else PartitionSpec()

    def _place_one(self, values: np.ndarray, spec: PartitionSpec) -> jax.Array:
        assert self.mesh is not None
        return place(values, self.mesh, spec)


def _is_item_table(path: tuple) -> bool:
    """True for id embeddings and text vectors, and for whatever has their structure, such as optimiser moments."""
    return any(part in f"/{jax.tree_util.keystr(path, simple=True, separator='/')}/" for part in ("/items/ids/", "/items/text/"))
