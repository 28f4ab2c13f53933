"""A planner from a package of a user's own, named as ``package.module:Class``."""

import difflib
import importlib
import inspect
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cda4rec_jax.array_typing import PlanMask
from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import Context, Plan
from cda4rec_jax.planner.contexts import context_features
from cda4rec_jax.planner.costs import PlanCosts
from cda4rec_jax.planner.plan_space import PLANS, CostTerm, PlanSpace
from cda4rec_jax.planner.policy import LearnedPlanner, PolicyConfig
from cda4rec_jax.planner.utility import cost_in_utility


@dataclass(frozen=True, kw_only=True)
class OwnPlanner:
    """A planner class from elsewhere, as a run stores it: where it is, and what it adds to the standard plans.

    Attributes:
        target: ``package.module:Class``, a ``LearnedPlanner``.
        plans: of its own.
        cost_terms: names of its own cost terms.
    """

    target: str
    plans: tuple[Plan, ...] = ()
    cost_terms: tuple[str, ...] = ()

    @classmethod
    def find(cls, target: str, config: PolicyConfig) -> "OwnPlanner":
        """The class that ``target`` names, tried out on a batch of two requests without computing anything.

        Raises:
            UserError: there is no such module or class, or it lacks something that a planner has; the message says what.
        """
        planner = _imported(target)
        space = _space(planner.plans, planner.cost_terms)
        _try_out(planner, config, space, target)
        return cls(target=target, plans=space.own_plans, cost_terms=space.term_names)

    def load(self) -> type[LearnedPlanner]:
        """The class, which must add what it added when this was stored.

        Raises:
            UserError: it cannot be imported, or its plans or cost terms are others now.
        """
        planner = _imported(self.target)
        space = _space(planner.plans, planner.cost_terms)
        for what, stored, found in (
            ("plans", [plan.name for plan in self.plans], [plan.name for plan in space.own_plans]),
            ("cost terms", list(self.cost_terms), list(space.term_names)),
        ):
            if stored != found:
                raise UserError(
                    f"{self.target} has the {what} {_listed(found)}, and the run was trained with {_listed(stored)}: "
                    "bring back the module as it was, or train again"
                )
        return planner

    @property
    def space(self) -> PlanSpace:
        """The standard plans and those of the class, with its cost terms. Raises UserError as ``load`` does."""
        planner = self.load()
        return _space(planner.plans, planner.cost_terms)


def blank_requests(size: int, space: PlanSpace) -> tuple[Context, PlanCosts, PlanMask]:
    """What a planner is asked, all zeros and nothing forbidden: to see what it answers in, or how long it takes."""
    kinds = ("cache_level", "tier", "link", "consent")
    names = [entry.name for entry in fields(Context)]
    context = Context(**{name: jnp.zeros((size,), jnp.int32 if name in kinds else jnp.float32) for name in names})
    costs = [entry.name for entry in fields(PlanCosts) if entry.name != "space"]
    zeros, everything = jnp.zeros((size, space.num_plans)), jnp.ones((size, space.num_plans), bool)
    return context, PlanCosts(**dict.fromkeys(costs, zeros), space=space), everything


@lru_cache(maxsize=64)  # one object, whose tables are made once
def _space(plans: tuple[Plan, ...], cost_terms: tuple[CostTerm, ...]) -> PlanSpace:
    return PlanSpace(plans=(*PLANS, *plans), cost_terms=cost_terms)


def _imported(target: str) -> type[LearnedPlanner]:
    module_name, _, class_name = target.partition(":")
    if not class_name or not all(part.isidentifier() for part in (*module_name.split("."), class_name)):
        raise UserError(f"planner {target!r} names no class: expected package.module:Class")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a module of a user's own raises while it is imported
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(
                f"planner {target}: there is no module {error.name!r}; start from the folder that holds it, or install its package"
            ) from error
        raise UserError(f"planner {target}: importing {module_name} failed with {type(error).__name__}: {error}") from error
    planner = getattr(module, class_name, None)
    if planner is None:
        close = difflib.get_close_matches(class_name, vars(module), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"planner {target}: {module_name} has no {class_name}{hint}")
    if problems := _problems(planner):
        raise UserError(f"planner {target}: {'; '.join(problems)}. See docs/planner.md.")
    return planner


def _problems(planner: Any) -> list[str]:
    """What a class lacks to be a planner."""
    if not (inspect.isclass(planner) and issubclass(planner, LearnedPlanner)):
        return ["it is no subclass of cda4rec_jax.planner.LearnedPlanner"]
    problems = []
    if planner.logits is LearnedPlanner.logits:
        problems.append("it lacks logits(self, context, costs, mask)")
    if not (isinstance(planner.plans, tuple) and all(isinstance(plan, Plan) for plan in planner.plans)):
        problems.append("plans must be a tuple of cda4rec_jax.messages.Plan, such as (fresh_plan(...),)")
    if not (isinstance(planner.cost_terms, tuple) and all(callable(term) for term in planner.cost_terms)):
        problems.append("cost_terms must be a tuple of functions (context, costs, table) -> [b, p]")
    try:
        inspect.signature(planner.__init__).bind(None, None, space=None, rngs=None)
    except TypeError as error:
        problems.append(f"it cannot be made as Class(config, space=space, rngs=rngs): {error}")
    return problems


def _try_out(planner: type[LearnedPlanner], config: PolicyConfig, space: PlanSpace, target: str) -> None:
    """Trace what a planner says of two requests, so that a mistake is told before hours of training and not after."""
    size, num_plans = 2, space.num_plans
    context, costs, mask = blank_requests(size, space)

    def ask() -> tuple[Any, Any, Any, Any]:
        made: Any = planner(config, space=space, rngs=nnx.Rngs(0))  # pyright: ignore[reportCallIssue]
        quality, further = made.quality(context_features(context)), dict(made.further_terms(context, costs))
        return made.logits(context, costs, mask), quality, further, cost_in_utility(costs, context)

    try:
        logits, quality, further, _ = jax.eval_shape(ask)
    except UserError as error:
        raise UserError(f"planner {target}: {error}") from error
    except Exception as error:  # whatever code of a user's own raises
        raise UserError(
            f"planner {target}: it fails on a batch of {size} requests and {num_plans} plans with {type(error).__name__}: {error}"
        ) from error
    for name, found in (("logits", logits), ("quality", quality), *further.items()):
        if found is not None and getattr(found, "shape", None) != (size, num_plans):
            raise UserError(
                f"planner {target}: {name} gives {getattr(found, 'shape', type(found).__name__)} for {size} requests, expected "
                f"{(size, num_plans)}: one value for each request and each plan of the space that it is made with"
            )


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "(none)"
