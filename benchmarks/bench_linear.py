"""The operations of the linear head: time, and time over the matrix products that they cannot spare."""

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_pref as fp
from benchmarks.logits import sigmoid
from benchmarks.measure import finish, seconds_of
from fused_pref.cli.peers import bare_products
from fused_pref.testing.problems import BETA, BOTH, Problem

ROUNDS = 5
# Gradients that are wanted: none (log-probs only), of the hidden states (a frozen head), of both.
MODES = {"evaluation": (), "frozen": ("hidden",), "both": BOTH}
Delta = Callable[[], Any]
DELTAS: dict[str, Delta] = {
    "fixed": lambda: fp.RewardShift("fixed"),
    "running_mean, forward": lambda: fp.RewardShift("running_mean"),
    "running_mean, step": lambda: fp.RewardShift("running_mean", update="step"),
    "ema, forward": lambda: fp.RewardShift("ema"),
    "ema, step": lambda: fp.RewardShift("ema", update="step"),
}


def _bco(delta: Delta) -> Callable[[Problem], Tensor]:
    def loss(p: Problem) -> Tensor:
        shift = delta().to(p.hidden.device)
        tensors = (p.hidden, p.weight, p.labels, p.desirable, p.ref_logps)
        return fp.linear_bco_loss(*tensors, shift=False, delta=shift, beta=BETA).loss

    return loss


OPERATIONS: dict[str, Callable[[Problem], Tensor]] = {
    "linear_token_logps": lambda p: fp.linear_token_logps(p.hidden, p.weight, p.labels, shift=False).sum(),
    "linear_sequence_logps": lambda p: fp.linear_sequence_logps(p.hidden, p.weight, p.labels, shift=False).sum(),
    "linear_cpo_loss": lambda p: fp.linear_cpo_loss(p.hidden, p.weight, p.labels, shift=False).loss,
    "linear_dpo_loss": lambda p: fp.linear_dpo_loss(p.hidden, p.weight, p.labels, p.ref_logps, shift=False).loss,
    **{f"linear_bco_loss, {name}": _bco(delta) for name, delta in DELTAS.items()},
    "linear_kto_loss": lambda p: (
        fp.linear_kto_loss(p.hidden, p.weight, p.labels, p.desirable, p.ref_logps, shift=False).loss
    ),
    "linear_preference_loss": lambda p: (
        fp.linear_preference_loss(p.hidden, p.weight, p.labels, sigmoid, shift=False).loss
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation(
    operation: str, mode: str, dtype: str, problem: Problem, linear_rows: list[dict[str, Any]], benchmark: Any
) -> None:
    """One operation with one set of gradients."""
    device, own = problem.hidden.device.type, problem.of(MODES[mode])

    def step() -> None:
        with torch.set_grad_enabled(bool(own.leaves)):
            value = OPERATIONS[operation](own)
        if own.leaves:
            torch.autograd.grad(value, tuple(own.leaves.values()))
        finish(device)

    products = bare_products(own)
    floor = statistics.median(seconds_of(products, device) for _ in range(ROUNDS))
    benchmark.group = f"{operation} {dtype}"
    benchmark.extra_info.update(operation=operation, mode=mode, dtype=dtype, sizes=str(problem.sizes))
    benchmark.extra_info["floor_seconds"] = floor
    benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["time_over_floor"] = seconds / floor
        linear_rows.append({"name": f"{operation} {dtype} {mode}", "seconds": seconds, "floor": floor})
