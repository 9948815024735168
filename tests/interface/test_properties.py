"""Every public function against the float64 reference, on anything that it takes.

``FUSED_PREF_PROPERTIES=long`` draws 10,000 cases a test, others each time; it may also be their number.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from cases import Case, Problem, Result, build, cases, evaluate, examples
from hypothesis import assume, given
from judge import at_a_kink, compare, overflows
from torch import Tensor

import fused_pref as fp


@pytest.fixture(autouse=True, scope="module")
def poison() -> Iterator[None]:
    """What is allocated without being initialised is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@examples()
@given(cases(linear=False))
def test_logits(case: Case) -> None:
    check(case)


@examples()
@given(cases(linear=True))
def test_linear(case: Case) -> None:
    check(case)


@pytest.mark.slow
@examples(1 / 3)
@given(cases(linear=False, largest=9, dtypes=(torch.float32,), backend="triton"))
def test_kernels_of_logits(case: Case) -> None:
    check(case)


@pytest.mark.slow
@examples(1 / 3)
@given(cases(linear=True, largest=9, dtypes=(torch.float32,), backend="triton"))
def test_kernels_of_the_head(case: Case) -> None:
    check(case)


def check(case: Case) -> None:
    """Values and gradients within tolerance of the reference, and inputs as they were."""
    problem = build(case)
    truth = evaluate(fp.reference, problem.wide())
    assume(not at_a_kink(case, truth) and not overflows(case, truth))
    before = [tensor.clone() for tensor in inputs(problem)]
    ours = within_budget(problem)
    for tensor, copy in zip(inputs(problem), before, strict=True):
        assert torch.equal(tensor, copy)
    assert all(gradient.dtype == case.dtype for gradient in ours.gradients.values())
    compare(problem, ours, truth)


def inputs(problem: Problem) -> list[Tensor]:
    """What a call must leave alone."""
    parts = () if problem.keywords.get("inplace_backward") else problem.parts.values()
    keywords = (value for value in problem.keywords.values() if isinstance(value, Tensor))
    return [*parts, problem.labels, *problem.arguments, *keywords]


def within_budget(problem: Problem) -> Result:
    """The library's result; where the budget is too small, with the one that the message names."""
    try:
        return evaluate(fp, problem)
    except ValueError as error:
        named = re.fullmatch(
            r"memory_budget must be at least (\d+) bytes for N=.*; got \d+; see docs/budget.md", str(error)
        )
        if named is None:
            raise
    least = int(named[1])
    assert least > problem.keywords["memory_budget"]
    # The least budget is for one logit at a time.
    slow = problem.labels.numel() * problem.case.vocabulary > 1000
    return evaluate(fp, replace(problem, keywords={**problem.keywords, "memory_budget": least + slow * 2**14}))
