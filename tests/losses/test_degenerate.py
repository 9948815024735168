"""Degenerate and non-finite input: finite where it must be, never hidden where it must show."""

import itertools
from typing import Any

import pytest
import torch
from harness import IGNORE, assert_gradient, assert_values, make_batch, reference_logps, run

import fused_pref as fp
from fused_pref.losses.pair import CPO_LOSS_TYPES


@pytest.mark.parametrize("loss_type", CPO_LOSS_TYPES)
@pytest.mark.parametrize("mask", ["empty", "all"])
def test_nothing_to_score(loss_type: str, mask: str, device: str, backend: str) -> None:
    batch = make_batch(4, 5, 11, mask=mask, device=device)
    output, grad = run(fp.cpo_loss, batch.logits, batch.labels, loss_type=loss_type, alpha=0.3, backend=backend)
    assert all(value.isfinite().all() for value in output)
    assert all(value.isfinite() for value in output.metrics().values())
    assert output.rejected_logps[0] == 0
    assert not grad[2].any()
    if mask == "all":
        assert not grad.any()


@pytest.mark.parametrize("reduction", ["mean", "class_mean"])
@pytest.mark.parametrize("present", [True, False])
def test_missing_class(reduction: str, present: bool, device: str, backend: str) -> None:
    batch = make_batch(3, 5, 11, device=device)
    desirable = torch.full((3,), present, device=device)
    for delta in (0.0, fp.RewardShift("ema").to(device), fp.RewardShift("running_mean").to(device)):
        output, grad = run(
            fp.bco_loss, batch.logits, batch.labels, desirable, reference_logps(3, device),
            reduction=reduction, delta=delta, backend=backend,
        )  # fmt: skip
        assert all(value.isfinite().all() for value in output)
        assert all(value.isfinite() for value in output.metrics().values())
        assert grad.any()


@pytest.mark.parametrize("loss_type", CPO_LOSS_TYPES)
@pytest.mark.parametrize("alpha", [-2.0, -1e-3, 1e-3, 0.25, 5.0])
def test_alphapo_is_finite(loss_type: str, alpha: float, device: str, backend: str) -> None:
    batch = make_batch(2, 4, 50, mask="none", scale=2000.0, device=device)
    output, grad = run(
        fp.cpo_loss, batch.logits, batch.labels, loss_type=loss_type, alpha=alpha, beta=2.0, backend=backend
    )
    assert all(value.isfinite().all() for value in output)
    assert grad.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [1e-14, -1e-14])
def test_alphapo_tends_to_the_identity(alpha: float, device: str, backend: str) -> None:
    batch = make_batch(4, 6, 17, device=device)
    output, grad = run(fp.cpo_loss, batch.logits, batch.labels, alpha=alpha, backend=backend)
    limit, limit_grad = run(fp.cpo_loss, batch.logits, batch.labels, backend=backend)
    assert_values(output.chosen_rewards, limit.chosen_rewards, 1e-6)
    assert_values(output.loss, limit.loss, 1e-6)
    assert_gradient(grad, limit_grad.double(), 1e-6)


@pytest.mark.slow
def test_alphapo_gradient_vanishes_beyond_the_clamp(device: str, backend: str) -> None:
    batch = make_batch(2, 60, 50, mask="none", scale=30.0, device=device)
    output, grad = run(fp.cpo_loss, batch.logits, batch.labels, alpha=1.0, cpo_alpha=0.0, backend=backend)
    assert (output.chosen_logps < -80).all()
    assert not grad.any()


@pytest.mark.parametrize("far", ["chosen", "rejected"])
@pytest.mark.parametrize(
    ("name", "loss_type"),
    [*itertools.product(["cpo_loss", "dpo_loss"], ["sigmoid", "ipo"]), ("bco_loss", "bco"), ("kto_loss", "kto")],
)
def test_sums_beyond_float32_saturate(name: str, far: str, loss_type: str, device: str, backend: str) -> None:
    """What is finite in float64 stays finite: log-probs of −2e38 a token, their sums, squares and slopes."""
    batch = make_batch(4, 4, 11, mask="none", device=device)
    members = slice(0, 2) if far == "chosen" else slice(2, 4)
    batch.logits[members] = 1e38
    batch.logits[members, :-1] = batch.logits[members, :-1].scatter(-1, batch.labels[members, 1:, None], -1e38)
    desirable, ref = torch.tensor([True, True, False, False], device=device), reference_logps(4, device)
    keywords: dict[str, Any] = {"sequence_normalizer": 1e-40}
    if name not in ("bco_loss", "kto_loss"):
        keywords = {"loss_type": loss_type, "pair_normalizer": 1e-3}
    if name == "cpo_loss":
        keywords["nll_reduction"] = "sequence"
    keywords |= {"beta": 1.0, "logits_mean": None}
    arguments = {"dpo_loss": (ref,), "bco_loss": (desirable, ref), "kto_loss": (desirable, ref)}.get(name, ())
    arguments = (batch.logits, batch.labels, *arguments)
    output, grad = run(getattr(fp, name), *arguments, **keywords, backend=backend)
    truth, true_grad = run(getattr(fp.reference, name), *arguments, **keywords)
    for field in (field for field in output._fields if not field.endswith("_logits_mean")):
        ours = getattr(output, field)
        assert ours.isfinite().all(), field
        assert_values(ours, getattr(truth, field), what=field)
    assert grad.isfinite().all()
    assert_gradient(grad, true_grad.double())


@pytest.mark.slow
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["target", "other"])
def test_non_finite_logits_show(bad: float, place: str, device: str, backend: str) -> None:
    batch = make_batch(4, 5, 11, mask="none", device=device)
    column = int(batch.labels[1, 3]) if place == "target" else (int(batch.labels[1, 3]) + 1) % 11
    batch.logits[1, 2, column] = bad
    desirable = torch.tensor([True, True, False, False], device=device)
    assert fp.token_logps(batch.logits, batch.labels, backend=backend)[1, 2].isnan()
    assert fp.cpo_loss(batch.logits, batch.labels, backend=backend).loss.isnan()
    assert fp.cpo_loss(batch.logits, batch.labels, loss_type="hinge", cpo_alpha=0.0, backend=backend).loss.isnan()
    shift = fp.RewardShift().to(device)
    output = fp.bco_loss(
        batch.logits, batch.labels, desirable, reference_logps(4, device), delta=shift, backend=backend
    )
    assert output.loss.isnan()
    assert shift.mean.isfinite().all()
    with fp.checks(), pytest.raises(ValueError, match=r"log-prob.*\[1\]"):
        fp.cpo_loss(batch.logits, batch.labels, backend=backend)


def test_unscored_rows_may_hold_anything(device: str, backend: str) -> None:
    batch = make_batch(4, 5, 11, device=device)
    batch.labels[0, :3] = IGNORE
    _, clean = run(fp.cpo_loss, batch.logits, batch.labels, backend=backend)
    batch.logits[0, 0] = torch.nan
    output, grad = run(fp.cpo_loss, batch.logits, batch.labels, logits_mean="completion", backend=backend)
    assert output.loss.isfinite()
    assert torch.equal(grad, clean)


def test_masked_vocabulary_entries(device: str, backend: str) -> None:
    """A −inf logit has probability 0, value and gradient; a −inf target has log-prob −inf."""
    batch = make_batch(4, 5, 11, mask="none", device=device)
    batch.labels.clamp_(max=8)
    batch.logits[..., 9:] = -torch.inf
    ours, grad = run(fp.cpo_loss, batch.logits, batch.labels, logits_mean=None, backend=backend)
    small, small_grad = run(fp.cpo_loss, batch.logits[..., :9], batch.labels, logits_mean=None, backend=backend)
    torch.testing.assert_close(ours.loss, small.loss)
    torch.testing.assert_close(grad[..., :9], small_grad)
    assert not grad[..., 9:].any()
    batch.labels[0, 1] = 10
    assert fp.token_logps(batch.logits, batch.labels, backend=backend)[0, 0] == -torch.inf


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(
    ("loss_type", "smoothing"), [*((name, 0.0) for name in CPO_LOSS_TYPES), ("sigmoid", 0.1), ("simpo", 0.1)]
)
@pytest.mark.parametrize("side", [0, 1])
def test_pair_with_a_target_of_probability_zero(
    side: int, loss_type: str, smoothing: float, linear: bool, device: str, backend: str
) -> None:
    """What the reference says, without NaN: nothing is lost by a rejected completion that cannot be said."""
    arguments, keywords = impossible(side, linear, device)
    keywords |= {"loss_type": loss_type, "label_smoothing": smoothing, "cpo_alpha": 0.0, "logits_mean": None}
    name = "linear_cpo_loss" if linear else "cpo_loss"
    ours = getattr(fp, name)(*arguments, **keywords, backend=backend)
    expected = getattr(fp.reference, name)(*arguments, **keywords)
    assert not expected.loss.isnan()
    for value, truth in zip(ours[:6], expected[:6], strict=True):
        torch.testing.assert_close(value, truth)
    grads = torch.autograd.grad(ours.loss, arguments[:1])
    truths = torch.autograd.grad(expected.loss, arguments[:1])
    if expected.loss.isfinite():
        assert_gradient(grads[0], truths[0].double(), 5e-5)


def test_the_gradient_of_a_hinge_of_nan_shows(device: str, backend: str) -> None:
    """Both completions are ruled out: Δ is −∞ + ∞, and the slope is that of the reference, not 0."""
    batch = make_batch(2, 4, 11, mask="none", device=device)
    batch.labels[:, 1:] = 3
    batch.logits[..., 3] = -torch.inf
    keywords = {"loss_type": "hinge", "cpo_alpha": 0.0, "logits_mean": None}
    output, grad = run(fp.cpo_loss, batch.logits, batch.labels, backend=backend, **keywords)
    expected, truth = run(fp.reference.cpo_loss, batch.logits, batch.labels, **keywords)
    assert output.loss.isnan()
    assert expected.loss.isnan()
    assert truth.any()
    assert_gradient(grad, truth.double())


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("desirable", [True, False])
def test_sequence_with_a_target_of_probability_zero(desirable: bool, linear: bool, device: str, backend: str) -> None:
    arguments, keywords = impossible(0, linear, device)
    classes = torch.tensor([desirable, not desirable], device=device)
    tensors = (*arguments, classes, torch.zeros(2, device=device))
    name = "linear_bco_loss" if linear else "bco_loss"
    shift = fp.RewardShift().to(device)
    ours = getattr(fp, name)(*tensors, delta=shift, logits_mean=None, backend=backend, **keywords)
    assert ours.delta == shift.current().float() == ours.rewards[1]
    expected = getattr(fp.reference, name)(*tensors, delta=shift.current(), logits_mean=None, **keywords)
    assert expected.loss.isinf() if desirable else expected.loss.isfinite()
    torch.testing.assert_close(ours.loss, expected.loss)


def impossible(sequence: int, linear: bool, device: str) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """A pair of which one sequence has a target that the logits, or the bias of the head, rule out."""
    batch = make_batch(2, 4, 11, mask="none", device=device)
    batch.labels[:, 1:] = torch.tensor([[1, 2, 3], [4, 5, 6]], device=device)
    word = int(batch.labels[sequence, 2])
    if not linear:
        batch.logits[..., word] = -torch.inf
        return [batch.logits.requires_grad_(), batch.labels], {}
    weight = torch.randn(11, 11, device=device)
    bias = torch.zeros(11, device=device).index_fill(0, torch.tensor([word], device=device), -torch.inf)
    return [batch.logits.requires_grad_(), weight, batch.labels], {"bias": bias}


@pytest.mark.parametrize("label", [11, 2**31 - 1, -1, -101])
def test_label_outside_the_vocabulary(label: int, device: str, backend: str) -> None:
    batch = make_batch(4, 5, 11, mask="none", device=device)
    batch.labels[2, 3] = label
    logps, grad = run(fp.token_logps, batch.logits, batch.labels, backend=backend)
    assert logps[2, 2].isnan()
    assert logps.isnan().sum() == 1
    assert grad[2, 2].isnan().all()
    assert grad.isnan().sum() == 11
    assert fp.cpo_loss(batch.logits, batch.labels, backend=backend).loss.isnan()
    with fp.checks(), pytest.raises(ValueError, match=rf"labels .*V=11.*{label} at \[2, 3\]"):
        fp.cpo_loss(batch.logits, batch.labels, backend=backend)
