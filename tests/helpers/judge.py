"""Whether results agree: promised tolerances, and what roundings explain where cancellation magnifies them."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from cases import OBJECTIVES, Case, Problem, Result, evaluate
from torch import Tensor

import fused_pref as fp
from fused_pref.reference.linear import LINEAR_ONLY

# Unit roundoff of the arithmetic, and (values, gradients) as the README promises them.
ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TOLERANCES = {False: (2e-5, 5e-5), True: (2e-5, 1e-4)}


def at_a_kink(case: Case, truth: Result) -> bool:
    """Whether rounding decides on which side of the hinge a pair is."""
    if case.options.get("loss_type") != "hinge":
        return False
    margins = truth.values["chosen_rewards"] - truth.values["rejected_rewards"]
    return bool(((margins - 1).abs() < 1e-3).any())


def overflows(case: Case, truth: Result) -> bool:
    """Whether a gradient is more than its dtype can hold."""
    most = torch.finfo(case.dtype).max
    return any(bool((gradient.abs() > most).any()) for gradient in truth.gradients.values())


def compare(problem: Problem, ours: Result, truth: Result) -> None:
    """Promised tolerances, for 16-bit products twice PyTorch's error; beyond that, what roundings explain."""
    case, mine = problem.case, ours.all()
    halves = case.linear and case.dtype.itemsize == 2
    usual = evaluate(EAGER, problem).all() if halves else {}
    assert mine.keys() == truth.all().keys()
    explained: dict[str, Tensor] = {}
    for name, true in truth.all().items():
        assert mine[name].shape == true.shape, name
        true, error = true.double(), (mine[name].double() - true).abs()
        if halves:
            error = error.norm()
            scale = true.norm() if name.startswith("gradient") else true.norm().clamp(min=1)
            allowed = 2 * (usual[name].double() - true).norm() + 1e-4 * scale
        elif name.startswith("gradient"):
            rounding = (true.to(case.dtype).double() - true).norm()
            error, allowed = error.norm(), tolerance(case)[1] * true.norm() + 1.05 * rounding
        else:
            allowed = tolerance(case)[0] * true.abs().clamp(min=1)
        if not (error <= allowed).all():
            explained = explained or roundings(problem, truth)
            allowed = allowed + explained[name]
        assert (error <= allowed).all(), f"{name}: {error.max():.3g} of {true.norm():.3g}; {allowed.max():.3g} allowed"


def tolerance(case: Case) -> tuple[float, float]:
    """Of values and gradients."""
    return (1e-9, 1e-9) if case.dtype == torch.float64 else TOLERANCES[case.linear]


def roundings(problem: Problem, truth: Result) -> dict[str, Tensor]:
    """How far the truth moves when what enters it is rounded a few times, magnified by cancellation, and itself once.

    The last may cost half a unit more than what eager does, where the truth lies between two numbers of the dtype. Six
    times the largest draw, because sums of up to 70 terms are rounded on the way, too.
    """
    case = problem.case
    roundoff = ROUNDOFF[case.dtype if case.linear or case.dtype == torch.float64 else torch.float32]
    moved = [evaluate(fp.reference, problem.wide(2 * roundoff, draw)).all() for draw in range(16)]
    explained = {}
    for name, true in truth.all().items():
        own = ROUNDOFF[case.dtype] if name.startswith("gradient") else 0.0
        explained[name] = 6 * max((other[name] - true).double().norm() for other in moved) + own * true.double().norm()
    return explained


def eager(name: str) -> Any:
    """A linear function as logits in the dtype of the head, and then the reference."""

    def function(hidden: Tensor, weight: Tensor, *rest: Tensor, bias: Tensor | None = None, **keywords: Any) -> Any:
        keywords = {name: value for name, value in keywords.items() if name not in LINEAR_ONLY}
        return getattr(fp.reference, name)(F.linear(hidden, weight, bias), *rest, **keywords)

    return function


EAGER = SimpleNamespace(**{f"linear_{name}": eager(name) for name in OBJECTIVES})
