"""Which plan a call of the linear head takes: a pure function of a :class:`~fused_pref.head.plans.problem.Problem`.

Five plans turn hidden states (N, D) and a weight (V, D) into log-probs and gradients without the (N, V) logits, one
module each; which of them compute what is wanted is said in :func:`candidates`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

from fused_pref.head.plans.frozen_head import FrozenHead
from fused_pref.head.plans.grouped import Grouped
from fused_pref.head.plans.logprob import Logprob
from fused_pref.head.plans.problem import Plan, Problem
from fused_pref.head.plans.skipping import Skipping
from fused_pref.head.plans.vocab_major import VocabMajor

Choice = Callable[[Problem], Plan]

# Plans within this factor of the cheapest are alike: the smallest of them is taken.
ALIKE = 1.02


@functools.lru_cache(maxsize=1024)
def choose(problem: Problem) -> Plan:
    """The cheapest plan within the budget; of plans about as cheap, the smallest.

    A budget that the caller did not set gives way to the least that is possible and a quarter more: the very smallest
    plans take a few rows or columns at a time, and much longer than those of a little more memory.

    Raises:
        ValueError: no plan fits a budget that the caller set; the message says the least that would do.
    """
    # Ranked by sizes that many batches share; what only just fits is ranked by its own.
    plan = _best(problem.rounded()) or _best(problem)
    if plan is None:
        raise ValueError(
            f"memory_budget must be at least {least_budget(problem)} bytes for N={problem.tokens} tokens, "
            f"D={problem.hidden}, V={problem.vocabulary} ({usable_budget(problem)} for less than twice the time of the "
            f"fastest plan); got {problem.budget}; see docs/budget.md"
        )
    return plan.fit(problem)


@functools.lru_cache(maxsize=1024)
def _best(problem: Problem) -> Plan | None:
    """The plan to take; None where none fits the budget that the caller set."""
    plans = list(candidates(problem))
    least = least_budget(problem, plans)
    if least > problem.budget and problem.promised:
        return None
    allowed = problem.budget if problem.promised else max(problem.budget, least + least // 4)
    fitting = [plan for plan in plans if plan.workspace <= allowed]
    cheapest = min(plan.seconds for plan in fitting)
    alike = [plan for plan in fitting if plan.seconds <= ALIKE * cheapest]
    return min(alike, key=lambda plan: (plan.workspace, plan.seconds))


# Functions that choose plans; a call asks the last one.
choices: list[Choice] = [choose]


@contextlib.contextmanager
def planning(choice: Choice) -> Iterator[None]:
    """Within this context calls take the plans that ``choice`` gives, on all threads: how tests force a plan."""
    choices.append(choice)
    try:
        yield
    finally:
        choices.remove(choice)


def least_budget(problem: Problem, plans: list[Plan] | None = None) -> int:
    """Bytes below which no plan fits, or none of ``plans``; the means of unscored rows take a plan of their own."""
    least = min(plan.workspace for plan in plans or candidates(problem))
    return max(least, least_budget(problem.means_alone())) if problem.unscored else least


def usable_budget(problem: Problem) -> int:
    """Bytes from which on a call takes less than twice the time of the fastest plan: the least is far slower."""
    plans = list(candidates(problem))
    fastest = min(plan.seconds for plan in plans)
    return least_budget(problem, [plan for plan in plans if plan.seconds <= 2 * fastest])


def candidates(problem: Problem) -> Iterator[Plan]:
    """Every plan that computes what is wanted."""
    if not problem.gradients:
        yield from Logprob.candidates(problem)
    elif problem.skip_mass is not None:
        yield from Skipping.candidates(problem)
    elif problem.gradients == {"hidden"}:
        yield from FrozenHead.candidates(problem)
    else:
        if problem.local:
            yield from Grouped.candidates(problem)
        yield from VocabMajor.candidates(problem)
