"""The gate on the set-up, on hand-made answers."""

import numpy as np
import pytest

from cda4rec_jax.evaluation.answers import ORACLE, Answers, fixed_names
from cda4rec_jax.evaluation.gate import PLUG_IN, best_fixed, check_gate, plan_shares

NAMES = (*fixed_names(), PLUG_IN, ORACLE)
GAP = 0.1


def answers_of(plug_in_choices: list[int], oracle_gain: float) -> Answers:
    users = len(plug_in_choices)
    utility = np.zeros((len(NAMES), users), np.float32)
    utility[3] = 0.5  # the best fixed plan
    utility[NAMES.index(ORACLE)] = 0.5 + oracle_gain
    choices = np.zeros((len(NAMES), 1, users), np.uint8)
    choices[NAMES.index(PLUG_IN), 0] = plug_in_choices
    return Answers(names=NAMES, choices=choices, latency_ms=np.zeros(choices.shape), per_user={"utility": utility})


SPREAD = [0] * 8 + [1] * 4 + [2] * 4 + [3] * 2 + [4] * 2  # of 20 requests: 40%, 20%, 20%, 10%, 10%


def test_a_spread_planner_and_a_gain_of_a_tenth_gap_pass():
    gate = check_gate(answers_of(SPREAD, 0.0101), GAP)
    assert gate.passed
    assert gate.plug_in_top_share == 0.4
    assert gate.plug_in_plans == 5
    assert gate.oracle_gain_in_gaps == pytest.approx(0.101, rel=1e-3)
    assert all(line.startswith("pass") for line in gate.lines())


@pytest.mark.parametrize(
    ("choices", "gain", "failing"),
    [
        ([0] * 11 + [1, 1, 2, 2, 3, 3, 4, 4, 5], 0.02, 0),
        ([0] * 8 + [1] * 6 + [2] * 5 + [3], 0.02, 1),
        (SPREAD, 0.0099, 2),
    ],
)
def test_each_condition_fails_the_gate_alone(choices: list[int], gain: float, failing: int):
    gate = check_gate(answers_of(choices, gain), GAP)
    assert not gate.passed
    assert [line.startswith("FAIL") for line in gate.lines()] == [place == failing for place in range(3)]


def test_the_best_fixed_plan_is_never_another_planner():
    assert best_fixed(answers_of(SPREAD, 1.0)) == fixed_names()[3]


def test_plan_shares_sum_to_one():
    shares = plan_shares(answers_of(SPREAD, 0.0), PLUG_IN)
    assert shares.sum() == pytest.approx(1)
    assert shares[0] == 0.4
