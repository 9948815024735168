"""What to say when memory runs out in a call of the linear head."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from fused_pref.head.plan import Problem, candidates, choose, least_budget


@contextmanager
def advising(problem: Callable[[], Problem]) -> Iterator[None]:
    """Add to an error of too little memory which smaller ``memory_budget`` there is.

    Args:
        problem: what the planner sees; asked for only then.

    Raises:
        torch.OutOfMemoryError, RuntimeError: what came, its message first.
    """
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        kind = torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else RuntimeError
        raise kind(f"{error}\n{advice(problem())}") from error


def ran_out(error: RuntimeError) -> bool:
    """Whether an allocation has failed; on a CPU its error has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def advice(problem: Problem) -> str:
    """The workspace of the plan that was taken, a budget of at most half of it, and the least one."""
    taken, least = choose(problem), least_budget(problem)
    said = f"The linear head works by plan {taken.name}: {taken.workspace} bytes beside inputs and gradients"
    if least >= taken.workspace:
        return f"{said}, and no smaller memory_budget is enough; give it fewer tokens at a time."
    halves = (plan.workspace for plan in candidates(problem) if plan.workspace <= taken.workspace // 2)
    budget = max(least, *halves, 0)
    smaller = choose(replace(problem, budget=budget))
    return (
        f"{said}. memory_budget={budget} takes no more than that (plan {smaller.name}, {smaller.products:.2f} products "
        f"of N·D·V for {taken.products:.2f}); the least is {least}."
    )
