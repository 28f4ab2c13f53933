"""The gate on the set-up: is choosing a plan a task at all, on this data and with these models?"""

from dataclasses import dataclass

import numpy as np

from cda4rec_jax.evaluation.answers import ORACLE, PLUG_IN, Answers
from cda4rec_jax.metrics import Interval, paired_interval

MAX_TOP_SHARE = 0.5
MIN_PLANS, COUNTED_SHARE = 5, 0.05
MIN_ORACLE_GAIN = 0.1  # in units of dQ


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Passed if the plug-in planner spreads over plans, and knowing the context is worth something. Of validation requests."""

    plug_in_top_share: float  # share of requests that get the plug-in planner's most frequent plan; at most .5
    plug_in_plans: int  # plans that it gives to 5% of requests each; at least 5
    oracle_gain: Interval  # utility of the context oracle minus that of the best fixed plan
    quality_gap: float  # dQ
    oracle_gain_in_gaps: float  # mean gain / dQ; at least .1
    passed: bool

    def lines(self) -> list[str]:
        """What was asked and what was found, one line each."""
        gain, top, plans = self.oracle_gain, self.plug_in_top_share, self.plug_in_plans
        checks = (
            (top <= MAX_TOP_SHARE, f"plug-in gives one plan to {top:.1%} of the requests (at most 50%)"),
            (plans >= MIN_PLANS, f"plug-in gives {plans} plans 5% of the requests or more each (at least 5)"),
            (
                self.oracle_gain_in_gaps >= MIN_ORACLE_GAIN,
                f"context oracle - best fixed plan: {gain.mean_difference:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}] = "
                f"{self.oracle_gain_in_gaps:.3f} of what asking the cloud is worth (at least .1)",
            ),
        )
        return [f"{'pass' if holds else 'FAIL'}  {text}" for holds, text in checks]


def best_fixed(answers: Answers) -> str:
    """Name of the fixed plan with the highest mean utility; call it on validation requests."""
    means = [answers.of(name, "utility").mean(dtype=np.float64) for name in answers.fixed_names]
    return answers.fixed_names[int(np.argmax(means))]


def plan_shares(answers: Answers, name: str) -> np.ndarray:
    """Share of requests that get each plan, [p]."""
    choices = answers.choices[answers.names.index(name)]
    return np.bincount(choices.ravel(), minlength=answers.space.num_plans) / choices.size


def check_gate(validation: Answers, quality_gap: float) -> Gate:
    """The gate on answers to validation requests, with the plug-in planner among them; ``quality_gap`` is dQ."""
    shares = plan_shares(validation, PLUG_IN)
    gain = paired_interval(
        np.asarray(validation.of(ORACLE, "utility"), np.float64)[:, None],
        np.asarray(validation.of(best_fixed(validation), "utility"), np.float64)[:, None],
    )
    top_share, num_plans = float(shares.max()), int((shares >= COUNTED_SHARE).sum())
    in_gaps = gain.mean_difference / quality_gap
    return Gate(
        plug_in_top_share=top_share,
        plug_in_plans=num_plans,
        oracle_gain=gain,
        quality_gap=quality_gap,
        oracle_gain_in_gaps=in_gaps,
        passed=top_share <= MAX_TOP_SHARE and num_plans >= MIN_PLANS and in_gaps >= MIN_ORACLE_GAIN,
    )
