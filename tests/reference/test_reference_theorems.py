"""Theorems that the reference keeps: bounds, limits, equal objectives, accumulation."""

import math

import pytest
import torch
import torch.nn.functional as F
from closed_forms import LARGEST, assert_same, double, objective
from harness import IGNORE, Batch, make_batch, reference_logps, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_pref import reference
from fused_pref.losses.pair import CPO_LOSS_TYPES, DPO_LOSS_TYPES

# Theorems. One pair of one token each: references are chosen so that the rewards are r_w and r_l.


def rewarded(r_w: float, r_l: float, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    logits, labels = double(2, 1, 3, mask="none").logits, torch.tensor([[0], [2]])
    logps = reference.sequence_logps(logits, labels, shift=False)
    return logits, labels, logps - torch.tensor([r_w, r_l], dtype=torch.float64) / beta


rewards_and_shift = st.tuples(*[st.floats(-6, 6)] * 3)


@settings(max_examples=60, deadline=None, database=None)
@given(rewards_and_shift, st.floats(0.05, 5))
def test_bce_bounds_dpo(values: tuple[float, float, float], beta: float) -> None:
    r_w, r_l, delta = values
    logits, labels, ref = rewarded(r_w, r_l, beta)
    dpo = reference.dpo_loss(logits, labels, ref, beta=beta, shift=False)
    desirable, common = torch.tensor([True, False]), {"beta": beta, "shift": False, "delta": delta}
    bce = reference.bco_loss(logits, labels, desirable, ref, reduction="class_mean", **common)
    pooled = reference.bco_loss(logits, labels, desirable, ref, **common)
    assert_same(bce.rewards, [r_w, r_l], 1e-10)
    assert_same(pooled.loss, bce.loss / 2)
    assert bce.loss >= dpo.loss
    gap = bce.loss.exp() - dpo.loss.exp()
    assert abs(gap - math.exp(delta - r_w) - math.exp(r_l - delta)) <= 1e-12 * bce.loss.exp()


@settings(max_examples=30, deadline=None, database=None)
@given(rewards_and_shift, st.floats(0.05, 5))
def test_bco_gradient(values: tuple[float, float, float], beta: float) -> None:
    """∓βσ(∓(r − δ)) per log-prob, with δ held fixed, whatever it was computed from."""
    r_w, r_l, delta = values
    logits, labels, ref = rewarded(r_w, r_l, beta)
    leaf = logits.clone().requires_grad_()
    attached = delta + 0 * leaf.sum()
    output = reference.bco_loss(
        leaf, labels, torch.tensor([True, False]), ref, beta=beta, delta=attached, reduction="class_mean", shift=False
    )
    output.loss.backward()
    slopes = [-beta / (1 + math.exp(r_w - delta)), beta / (1 + math.exp(delta - r_l))]
    rows = F.one_hot(labels, 3) - logits.softmax(-1)
    assert leaf.grad is not None
    assert_same(leaf.grad, rows * torch.tensor(slopes, dtype=torch.float64)[:, None, None], 1e-10)


@pytest.mark.parametrize("loss_type", sorted({*CPO_LOSS_TYPES} & {*DPO_LOSS_TYPES}))
def test_cpo_is_dpo_with_equal_references(loss_type: str) -> None:
    batch = double(6, 5, 7)
    keywords = {"loss_type": loss_type, "beta": 0.3, "label_smoothing": 0.1}
    pairs = torch.zeros(3) if loss_type == "ipo" else reference_logps(3)
    cpo, cpo_grad = objective("cpo_loss", batch, cpo_alpha=0.0, **keywords)
    dpo, dpo_grad = run(reference.dpo_loss, batch.logits, batch.labels, pairs.repeat(2), **keywords)
    assert_same(cpo.loss, dpo.loss)
    assert_same(cpo_grad, dpo_grad)
    assert cpo_grad.any()


def test_simpo_is_sigmoid_of_averages() -> None:
    batch = double(6, 5, 7)

    def averaged(logits: Tensor, labels: Tensor) -> Tensor:
        logps = reference.sequence_logps(logits, labels, average=True)
        return -F.logsigmoid(2.0 * (logps[:3] - logps[3:])).mean()

    simpo, grad = objective("cpo_loss", batch, loss_type="simpo", simpo_gamma=0.0, beta=2.0, cpo_alpha=0.0)
    truth, true_grad = run(averaged, batch.logits, batch.labels)
    assert_same(simpo.loss, truth)
    assert_same(grad, true_grad)


@pytest.mark.parametrize("loss_type", CPO_LOSS_TYPES)
def test_alphapo_limit(loss_type: str) -> None:
    """The transform is x − αx²/2 + O(α²)."""
    batch = double(4, 5, 7, mask="none")
    plain, plain_grad = objective("cpo_loss", batch, loss_type=loss_type)
    for alpha in (1e-6, -1e-6):
        near, near_grad = objective("cpo_loss", batch, loss_type=loss_type, alpha=alpha)
        assert_same(near.chosen_rewards, 0.1 * (plain.chosen_logps - alpha * plain.chosen_logps**2 / 2), 1e-9)
        assert_same(near.loss, plain.loss, 1e-3)
        assert_same(near_grad, plain_grad, 1e-3)
        assert torch.equal(near.chosen_logps, plain.chosen_logps)


def test_alphapo_stays_finite() -> None:
    """Beyond the clamp the gradient is 0; where float32 overflows, values and gradients saturate."""
    batch = make_batch(2, 60, 9, mask="none", scale=30.0)
    output, grad = objective("cpo_loss", batch, alpha=1.0, cpo_alpha=0.0)
    assert (output.chosen_logps < -80).all()
    assert not grad.any()
    batch = make_batch(2, 8, 9, mask="none", scale=12.0)
    wide = Batch(batch.logits.double(), batch.labels)
    keywords = {"loss_type": "ipo", "alpha": 6.0, "cpo_alpha": 0.0}
    truth, true_grad = objective("cpo_loss", wide, **keywords)
    output, grad = objective("cpo_loss", batch, **keywords)
    assert truth.loss > 1e40
    assert true_grad.abs().max() > 1e40
    assert output.loss == LARGEST
    assert grad.isfinite().all()
    assert grad.abs().max() > 1e35
    assert (output.chosen_rewards < -1e20).any()
    batch.logits[0, 0, batch.labels[0, 1]] = -torch.inf
    assert reference.cpo_loss(batch.logits, batch.labels).loss == torch.inf


@pytest.mark.parametrize("name", ["cpo_loss", "dpo_loss", "bco_mean", "bco_class_mean", "kto_loss"])
def test_normalizers_make_accumulation_exact(name: str) -> None:
    """Micro-batches with the normalizers of the whole batch add up to it; with a normalizer of 0 a term is 0."""
    batch, ref, desirable = double(6, 5, 7), reference_logps(6), torch.tensor([True, False, True, True, False, False])
    parts = [torch.tensor([0, 3]), torch.tensor([1, 2, 4, 5])]
    chosen_tokens = int((batch.labels[:3, 1:] != IGNORE).sum())
    function = getattr(reference, name if name.endswith("loss") else "bco_loss")
    arguments = {"cpo_loss": (), "dpo_loss": (ref,)}.get(name, (desirable, ref))
    keywords, whole = {
        "cpo_loss": ({"token_normalizer": chosen_tokens, "pair_normalizer": 3}, {}),
        "dpo_loss": ({"pair_normalizer": torch.tensor(3)}, {}),
        "bco_mean": ({"sequence_normalizer": 6}, {}),
        "kto_loss": ({"sequence_normalizer": torch.tensor(6.0)}, {"kl": 2.0, "undesirable_weight": 1.3}),
        "bco_class_mean": ({"class_normalizer": (3, torch.tensor(3))}, {"reduction": "class_mean"}),
    }[name]
    truth, true_grad = run(function, batch.logits, batch.labels, *arguments, **whole)
    total, grad = torch.zeros((), dtype=torch.float64), torch.zeros_like(true_grad)
    for part in parts:
        rows = [x[part] for x in (batch.logits, batch.labels, *arguments)]
        output, grad[part] = run(function, *rows, **keywords, **whole)
        total += output.loss.detach()
    assert_same(total, truth.loss)
    assert_same(grad, true_grad)
    zeros = {key: (0, torch.tensor(0)) if isinstance(value, tuple) else 0 for key, value in keywords.items()}
    output, grad = run(function, batch.logits, batch.labels, *arguments, **zeros, **whole)
    assert output.loss == 0
    assert not grad.any()
