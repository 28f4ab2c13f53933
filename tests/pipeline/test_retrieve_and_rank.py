"""Retrieval and ranking on a mesh gives the slates of one device, of ``pipeline.outcomes`` under ``pmap``, and of two processes."""

import inspect
import json
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cda4rec_jax.errors import UserError
from cda4rec_jax.pipeline import retrieve_and_rank as module
from cda4rec_jax.pipeline.retrieve_and_rank import DEFAULT_PLAN, BatchRanker, retrieve_and_rank
from cda4rec_jax.pipeline.system import System
from cda4rec_jax.retrieval.sharded import place_users
from cda4rec_jax.runs.artifacts import TrainedSystem, load_trained
from cda4rec_jax.training.mesh import make_mesh
from tests.devices import DEADLINE_S, environment, outputs_of_job
from tests.pipeline.mesh_slates import CHECKPOINT, NUM_USERS, asked

SCRIPT = str(Path(__file__).with_name("mesh_slates.py"))
FEW = "fresh-recent-20-skip"  # fewer candidates than one part of the catalogue has
MESHES = ("data=8", "items=8", "data=4,items=2", "data=2,items=4", "data=2,items=3")  # 112 items do not divide by 3
CASES = (*((mesh, DEFAULT_PLAN) for mesh in MESHES), ("data=4,items=2", FEW), ("items=8", "index"), ("data=2,items=3", "index"))

Answers = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def eight() -> Answers:
    """Answers of eight devices, and of one."""
    alone = ("one/index", *(f"{how}/{plan}" for how in ("one", "pmap") for plan in (DEFAULT_PLAN, FEW)))
    command = [sys.executable, SCRIPT, *alone, *("/".join(case) for case in CASES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, env=environment(8))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def trained() -> TrainedSystem:
    return load_trained(CHECKPOINT)


@pytest.fixture(scope="module")
def divided(trained: TrainedSystem) -> BatchRanker:
    """Over the two devices of the suite, where calls are checked."""
    return BatchRanker(trained.system, trained.catalogue, trained.config, mesh=make_mesh("items=2"))


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    np.testing.assert_array_equal(found["items"], expected["items"])
    np.testing.assert_allclose(found["scores"], expected["scores"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("mesh", "plan"), CASES)
def test_a_mesh_gives_what_one_device_gives(eight: Answers, mesh: str, plan: str) -> None:
    assert_same(eight[f"{mesh}/{plan}"], eight[f"one/{plan}"])


@pytest.mark.parametrize("plan", [DEFAULT_PLAN, FEW])
def test_slates_are_those_of_outcomes_under_pmap(eight: Answers, plan: str) -> None:
    slates = np.asarray(eight[f"one/{plan}"]["items"])
    np.testing.assert_array_equal(slates, eight[f"pmap/{plan}"]["items"])
    assert len(np.unique(slates, axis=0)) > 10 and len(np.unique(slates)) > 30  # users differ


def test_two_processes_give_what_one_device_gives(eight: Answers) -> None:
    cases = [f"items=2/{DEFAULT_PLAN}", "items=2/index"]
    told = outputs_of_job(lambda coordinator, number: [sys.executable, SCRIPT, *cases, "--job", coordinator, str(number)])
    for lines in told:  # every process knows all slates
        found = json.loads(lines[-1])
        assert {*found} == {*cases}
        for case in cases:
            assert_same(found[case], eight[f"one/{case.split('/')[1]}"])


def test_the_example_of_the_documentation_gives_the_slates_of_one_device(trained: TrainedSystem) -> None:
    text = inspect.getdoc(retrieve_and_rank)
    assert text is not None
    example = textwrap.dedent(text.partition("::\n")[2].partition("Args:")[0])
    known: dict[str, Any] = {"np": np, "load_trained": lambda path: trained, "make_mesh": make_mesh}
    exec(example, known | {"retrieve_and_rank": retrieve_and_rank}, known)
    one = retrieve_and_rank(trained.system, trained.catalogue, known["history"], trained.config)
    assert known["slate"].items.shape == (16, 10)
    np.testing.assert_array_equal(known["slate"].items, one.items)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_users_than_devices_are_answered(divided: BatchRanker, trained: TrainedSystem, count: int) -> None:
    two, fewer = (jax.tree.map(lambda leaf, size=size: leaf[:size], asked(trained)) for size in (2, count))
    slates = divided(fewer, k=5)
    assert slates.items.shape == slates.scores.shape == (count, 5)
    np.testing.assert_array_equal(slates.items, divided(two, k=5).items[:count])


def test_each_device_holds_its_part_of_every_table_and_no_item_table_besides(
    divided: BatchRanker, trained: TrainedSystem
) -> None:
    num_items = trained.catalogue.num_items
    for table in jax.tree.leaves(divided._tables):
        assert {shard.data.shape[0] for shard in table.addressable_shards} == {1 + num_items // 2}
    sizes = [leaf.shape[0] for leaf in jax.tree.leaves(divided._weights) if leaf.ndim]
    assert max(sizes) < num_items


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_divided_program_lowers_without_the_hardware_and_gathers_no_table(
    divided: BatchRanker, trained: TrainedSystem, platform: str
) -> None:
    config, mesh = trained.config, make_mesh("items=2")
    plan, num_items = config.space.plans[config.space.index(DEFAULT_PLAN)], trained.catalogue.num_items
    static = {"graph": divided._graph, "config": config, "plan": plan, "k": 10, "num_items": num_items, "mesh": mesh}
    leaves, structure = jax.tree.flatten((divided._weights, divided._tables, place_users(asked(trained), mesh)))

    def slates(*leaves: jax.Array) -> Any:  # a lowered program describes its arguments, and messages are made of arrays only
        return module._slates(*structure.unflatten(leaves), **static)

    program = jax.jit(slates).trace(*leaves).lower(lowering_platforms=(platform,)).as_text()
    assert {*re.findall(r"stablehlo\.(all_\w+|reduce_scatter|collective_\w+)", program)} == {
        "all_gather",
        "all_to_all",
        "reduce_scatter",
    }
    gathered = re.findall(r"all_gather.*-> tensor<(\d+)x", program)
    assert gathered and {*map(int, gathered)} == {NUM_USERS + 1}


def test_what_cannot_be_answered_is_refused_with_what_to_do(divided: BatchRanker, trained: TrainedSystem) -> None:
    history, config = asked(trained), trained.config
    with pytest.raises(UserError, match=r"reuse-20-device makes no fresh embedding .* begins with fresh- or cloud-"):
        divided(history, plan="reuse-20-device")
    with pytest.raises(UserError, match="unknown plan 'fresh'"):
        divided(history, plan="fresh")
    with pytest.raises(UserError, match="asked for 113 items of a catalogue of 112"):
        divided(history, k=113)
    with pytest.raises(UserError, match="the mesh has the axes rows; expected data and items"):
        BatchRanker(trained.system, trained.catalogue, config, mesh=jax.make_mesh((2,), ("rows",)))
    corpus = trained.corpus
    alone = System(replace(config, device=None), jnp.asarray(corpus.text), corpus.prefix_size, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="a baseline without device agent"):
        BatchRanker(alone, trained.catalogue, config)
