"""DPO losses of degenerate input: nothing to score, probability 0, NaN."""

import math
from typing import Any

import pytest
import torch
from harness import assert_gradient, make_batch, run
from test_dpo_losses import REACHED, near_reference
from torch import Tensor

import fused_pref as fp
from fused_pref.keywords import DPOKeywords, defaults
from fused_pref.losses.pair import DPO_LOSS_TYPES, PairObjective
from fused_pref.losses.pair_spec import DIVERGENCES, dpo_spec
from fused_pref.losses.scores import Scores

EVERY = [*DPO_LOSS_TYPES, ("sigmoid", "bco_pair", "sft"), ("aot", "discopop", "sppo_hard")]


@pytest.mark.parametrize("mask", ["all", "empty"])
@pytest.mark.parametrize("loss_type", EVERY, ids=str)
def test_empty_completions(loss_type: Any, mask: str, device: str, backend: str) -> None:
    batch = make_batch(4, 3, 7, mask=mask, device=device)
    keywords = {"loss_type": loss_type, "label_smoothing": 0.1, "backend": backend}
    ref = near_reference(batch.logits, batch.labels)
    output, grad = run(fp.dpo_loss, batch.logits, batch.labels, ref, **keywords)
    assert output.loss.isfinite()
    assert grad.isfinite().all()
    assert not grad[batch.labels.eq(-100).all(1)].any()
    assert mask == "empty" or not output.chosen_logps.any()


@pytest.mark.parametrize("loss_type", EVERY, ids=str)
def test_no_sequences(loss_type: Any, device: str, backend: str) -> None:
    keywords = {"loss_type": loss_type, "label_smoothing": 0.1, "backend": backend}
    for shape in ((0, 4, 7), (0, 0, 7)):
        logits, labels = torch.zeros(shape, device=device), torch.zeros(shape[:2], dtype=torch.int64, device=device)
        output, grad = run(fp.dpo_loss, logits, labels, torch.zeros(0, device=device), **keywords)
        assert output.loss == 0
        assert grad.shape == shape
        h, w = (
            torch.zeros(*shape[:2], 3, device=device).requires_grad_(),
            torch.ones(7, 3, device=device).requires_grad_(),
        )
        linear = fp.linear_dpo_loss(h, w, labels, torch.zeros(0, device=device), **keywords)
        linear.loss.backward()
        assert linear.loss == 0
        assert w.grad is not None
        assert not w.grad.any()


def evaluated(backend: str, sums: list[float], **keywords: Any) -> tuple[Tensor, Tensor]:
    """Loss and slopes of log-ratios, in float64 where the backend has it."""
    given = {**defaults(DPOKeywords), "label_smoothing": 0.1, "beta": 0.5, **keywords}
    zeros, count = torch.zeros(len(sums), dtype=torch.float64), torch.ones(len(sums), dtype=torch.int64)
    delta = 0.0 if "bco_pair" in given["loss_type"] else None
    objective = PairObjective(dpo_spec(given), zeros, None, None, delta)
    scores = Scores(torch.tensor(sums, dtype=torch.float64), count, None, None)
    output, slope = objective.evaluate(scores, backend, torch.float64 if backend == "torch" else torch.float32)
    return output.loss.double(), slope


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    ("loss_type", "divergence"),
    [(name, kind) for name in DPO_LOSS_TYPES for kind in DIVERGENCES if kind == "reverse_kl" or name in REACHED],
)
def test_a_completion_of_probability_zero(loss_type: str, divergence: str, side: int, backend: str) -> None:
    """Loss and slopes are their limits; that of a loss without bound is an infinity, and nothing is NaN."""
    keywords = {"loss_type": loss_type, "f_divergence_type": divergence, "f_alpha_divergence_coef": 0.5}
    values = []
    for far in (-1e9, -2e9, -math.inf):
        sums = [-1.0, -2.0]
        sums[side] = far
        values.append(evaluated(backend, sums, **keywords))
    (near, near_slope), (further, further_slope), (loss, slope) = values
    assert not loss.isnan()
    assert not slope.isnan().any()
    for a, b, limit in ((near, further, loss), *zip(near_slope, further_slope, slope, strict=True)):
        if torch.isclose(a, b):
            torch.testing.assert_close(limit, b, rtol=1e-6, atol=1e-12)
        else:
            assert limit == b * math.inf


@pytest.mark.parametrize("loss_type", DPO_LOSS_TYPES)
def test_far_log_ratios(loss_type: str, backend: str) -> None:
    ratios = [-1e6, -745.0, -40.0, -1e-9, 0.0, 1e-9, 40.0, 745.0, 1e6]
    loss, slope = evaluated(backend, [*ratios, *[0.0] * len(ratios)], loss_type=loss_type, beta=1.0)
    assert loss.isfinite()
    assert slope.isfinite().all()


@pytest.mark.parametrize("tau", [1e-6, 0.05, 1.0, 3.0])
def test_discopop_is_finite_wherever_its_value_is(tau: float, backend: str) -> None:
    """Against its two factors in logarithms; for τ > 1 the value itself grows beyond any bound."""
    for x in (-600.0, -1.0, -1e-3, 0.0, 0.3, 50.0, 1e5):
        loss, slope = evaluated(backend, [x, 0.0], loss_type="discopop", discopop_tau=tau, beta=1.0)
        y = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        log_m = torch.nn.functional.logsigmoid(y / tau)
        truth = -torch.nn.functional.logsigmoid(y) * torch.sigmoid(-y / tau) + torch.exp(log_m - y)
        (true_slope,) = torch.autograd.grad(truth, y)
        largest = torch.finfo(torch.bfloat16).max if backend == "triton" else math.inf
        torch.testing.assert_close(loss, truth.detach().clamp(max=largest), rtol=1e-6, atol=1e-9)
        if backend == "torch" or true_slope.abs() < largest:
            torch.testing.assert_close(slope[0], true_slope, rtol=1e-6, atol=1e-12)
    for side in ([-math.inf, 0.0], [0.0, -math.inf]):
        loss, slope = evaluated(backend, side, loss_type="discopop", discopop_tau=tau)
        assert not loss.isnan()
        assert not slope.isnan().any()


def test_limits_of_exo(backend: str) -> None:
    for sums, limit in (([-math.inf, 0.0], -math.log(0.1)), ([0.0, -math.inf], -math.log(0.9))):
        loss, slope = evaluated(backend, sums, loss_type="exo_pair")
        torch.testing.assert_close(loss, torch.tensor(limit, dtype=torch.float64), rtol=1e-6, atol=0)
        assert not slope.any()


@pytest.mark.parametrize("loss_type", EVERY, ids=str)
def test_nan_of_one_pair(loss_type: Any, backend: str) -> None:
    """It shows in the loss, and in the slopes of no other pair, but as a sort makes them."""
    loss, slope = evaluated(backend, [-3.0, math.nan, -5.0, -4.0, -1.0, -2.0], loss_type=loss_type)
    assert loss.isnan()
    bad = slope.isnan().tolist()
    assert bad[1] == (loss_type not in ("hinge", "sft")), "a slope that is constant is no NaN, before the logits"
    assert_one_pair(loss_type, bad)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "sft", "aot", "aot_unpaired", EVERY[-1]], ids=str)
def test_nan_of_logits(loss_type: Any, device: str, backend: str) -> None:
    """The same from the logits to their gradients."""
    batch = make_batch(6, 4, 7, mask="none", device=device)
    batch.logits[1, 2, 3] = torch.nan
    keywords = {"loss_type": loss_type, "label_smoothing": 0.1, "logits_mean": None, "backend": backend}
    ref = near_reference(batch.logits.nan_to_num(0), batch.labels)
    output, grad = run(fp.dpo_loss, batch.logits, batch.labels, ref, **keywords)
    assert output.loss.isnan()
    assert grad[1, 2].isnan().all()
    assert_one_pair(loss_type, [bool(rows.isnan().any()) for rows in grad])


def assert_one_pair(loss_type: Any, bad: list[bool]) -> None:
    """Of three pairs NaN is in the second one, and otherwise only where the loss may bring it."""
    others = [bad[sequence] for sequence in (0, 2, 3, 4, 5)]
    assert others[:2] == [False, False]
    assert sum(others) <= 1
    assert not others[2] or loss_type == "aot_unpaired"
    assert not others[4] or loss_type == "aot_unpaired"


def test_a_rejected_completion_that_cannot_be_said(device: str, backend: str) -> None:
    """Through the logits: the value and the gradient of the reference."""
    batch = make_batch(4, 5, 9, mask="none", device=device)
    batch.labels[3, 2] = 4
    batch.logits[3, 1, 4] = -torch.inf
    for loss_type in ("sigmoid", "hinge", "exo_pair", "nca_pair", "bco_pair", "apo_zero", "apo_down", "sigmoid_norm"):
        keywords = {"loss_type": loss_type, "logits_mean": None}
        keywords |= {"label_smoothing": 0.1} if loss_type == "exo_pair" else {}
        ref = torch.full((4,), -9.0, device=device)
        output, grad = run(fp.dpo_loss, batch.logits, batch.labels, ref, **keywords, backend=backend)
        truth, true_grad = run(fp.reference.dpo_loss, batch.logits, batch.labels, ref, **keywords)
        assert output.loss.isfinite()
        torch.testing.assert_close(output.loss, truth.loss)
        assert_gradient(grad, true_grad.double())
