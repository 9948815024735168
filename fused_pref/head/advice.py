"""What to say when memory runs out in a call of the linear head, or its default budget is too small."""

import warnings
from dataclasses import replace

import torch

from fused_pref.head.plans.planner import candidates, choose, least_budget
from fused_pref.head.plans.problem import Plan, Problem

# What has been said; once a process is enough.
_said: set[str] = set()


def ran_out(error: RuntimeError) -> bool:
    """Whether an allocation has failed; on a CPU its error has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def advice(problem: Problem) -> str:
    """The workspace of the plan that was taken, a budget of half (else below it), the least, and their costs."""
    taken, least = choose(problem), least_budget(problem)
    said = f"The linear head works by plan {taken.name}: {taken.workspace} bytes beside inputs and gradients"
    smaller = [plan.workspace for plan in candidates(problem) if least <= plan.workspace < taken.workspace]
    if not smaller:
        return f"{said}, and no smaller memory_budget is enough; give it fewer tokens at a time."
    budget = max([size for size in smaller if size <= taken.workspace // 2] or smaller)
    time, longest = (choose(replace(problem, budget=size)).seconds / taken.seconds for size in (budget, least))
    return (
        f"{said}. memory_budget={budget} takes {time:.3g} times as long by the planner's model; the least is {least}, "
        f"{longest:.3g} times."
    )


def warn_of(plan: Plan, problem: Problem) -> None:
    """Warn, once a process, of a plan that takes more than the default budget."""
    if "budget" in _said:
        return
    _said.add("budget")
    warnings.warn(
        f"the default budget of the linear head, {problem.budget} bytes, is too little for N={problem.tokens} tokens, "
        f"D={problem.hidden}, V={problem.vocabulary}: plan {plan.name} takes {plan.workspace} bytes beside inputs and "
        "gradients. Give it fewer tokens at a time, or set memory_budget. This is said once.",
        stacklevel=2,
    )
