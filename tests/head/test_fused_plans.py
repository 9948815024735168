"""When a plan is fused, and what that costs, by the planner's model: nothing is computed."""

from typing import Any

import pytest

from fused_pref.head.plans import planner as plan
from fused_pref.head.plans.logprob import Logprob
from fused_pref.head.plans.problem import Problem
from fused_pref.ops import devices


def problem_of(**changes: Any) -> Problem:
    sizes = {"tokens": 8192, "positions": 8192, "hidden": 4096, "vocabulary": 128256, "itemsize": 2, "budget": 2**40}
    rest = {"weight_itemsize": 2, "gradients": frozenset({"hidden", "weight"}), "local": False, "units": ()}
    return Problem(**{**sizes, **rest, "device": devices.GPU, "fused": True, "indexed": True, **changes})


@pytest.mark.parametrize("hidden", [1024, 4096])
def test_fused_where_the_model_says_so(hidden: int) -> None:
    """bfloat16 on a GPU; not float32, whose exact products are the vendor's, nor where kernels run for tests alone."""
    for wanted in (frozenset(), frozenset({"hidden"}), frozenset({"hidden", "weight"})):
        sizes = {"hidden": hidden, "gradients": wanted, "budget": 2**30}
        assert plan.choose(problem_of(**sizes)).fused
        for other in ({"fused": False}, {"itemsize": 4, "weight_itemsize": 4}, {"device": devices.CPU}):
            assert not plan.choose(problem_of(**sizes, **other)).fused


def test_log_probs_write_no_logits() -> None:
    """The rows are copied once, for descriptors; where the copy does not fit, or nothing is gained, not."""
    scratch, copy = devices.GPU.scratch, 8192 * 4096 * 2
    wanted = {"gradients": frozenset()}
    for found, gather, workspace in (
        (plan.choose(problem_of(**wanted)), True, scratch + copy),
        (plan.choose(problem_of(**wanted, budget=scratch + copy - 1)), False, scratch),
        (plan.choose(problem_of(**wanted, indexed=False)), True, scratch + copy),
        (plan.choose(problem_of(**wanted, gathered=False)), True, scratch),
        (plan.choose(problem_of(**wanted, device=devices.GPUS["sm_80"])), False, scratch),
    ):
        assert isinstance(found, Logprob)
        assert (found.fused, found.rows, found.columns) == (True, 8192, 128256)
        assert (found.gather, found.workspace) == (gather, workspace)


def test_a_chunk_of_q_is_half_a_chunk_of_logits() -> None:
    one = {p.fused: p for p in plan.candidates(problem_of(local=True)) if p.name == "grouped" and p.rows == 8192}
    whole, half = (devices.GPU.allocation(8192 * 128256 * size) for size in (4, 2))
    assert one[False].workspace - one[True].workspace == whole - half
    assert one[True].seconds < one[False].seconds


def test_no_exponentials_in_float16() -> None:
    """They would not fit: Q comes from known statistics alone."""
    assert {p.name for p in plan.candidates(problem_of(local=True)) if p.fused} == {"grouped", "vocab_major"}
    assert {p.name for p in plan.candidates(problem_of(local=True, wide_range=False)) if p.fused} == {"vocab_major"}
