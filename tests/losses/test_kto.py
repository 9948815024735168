"""KTO and unpaired APO: against closed forms, TRL and the float64 reference; theorems; degenerate input."""

import inspect
import math
import textwrap
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closed_forms import assert_fields, assert_same, double, kto_form
from harness import IGNORE, assert_linear_parity, assert_parity, make_batch, make_hidden, reference_logps, run
from test_logits import with_dtypes
from torch import Tensor

import fused_pref as fp
from fused_pref import reference

DESIRABLE = [True, False, False, True]
LOSS_TYPES = ["kto", "apo_zero_unpaired"]
KEYWORDS: list[dict[str, Any]] = [
    {},
    {"kl": 7.0, "beta": 0.3},
    {"kl": torch.tensor(-2.5), "desirable_weight": 1.33, "undesirable_weight": 0.4},
    {"loss_type": "apo_zero_unpaired", "beta": 0.5, "undesirable_weight": 1.7},
    {"loss_type": "apo_zero_unpaired", "kl": torch.tensor(40.0), "sequence_normalizer": torch.tensor(11)},
    {"desirable_weight": 0.0, "sequence_normalizer": 3.5},
]


def given(device: str = "cpu", desirable: list[bool] = DESIRABLE, **keywords: Any) -> tuple[Any, dict[str, Any]]:
    """Classes and reference of a batch, and the keywords with their tensors, on the device."""
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in keywords.items()}
    return (torch.tensor(desirable, dtype=torch.bool, device=device), reference_logps(len(desirable), device)), moved


# Against the reference, whose values and gradients are those of closed forms.


@pytest.mark.parametrize("keywords", KEYWORDS, ids=str)
@pytest.mark.parametrize("desirable", [[True, False, False, True, True], [True] * 5, [False] * 5], ids=str)
def test_closed_form(keywords: dict[str, Any], desirable: list[bool]) -> None:
    batch, ref = double(5, 5, 6), reference_logps(5)
    for module in (fp, reference):
        output, grad = run(module.kto_loss, batch.logits, batch.labels, torch.tensor(desirable), ref, **keywords)
        assert_fields(output, kto_form(batch, desirable, ref.tolist(), **keywords))
        assert output.desirable.tolist() == desirable
        assert grad.isfinite().all()


@pytest.mark.parametrize(("keywords", "dtype"), with_dtypes(KEYWORDS), ids=str)
def test_logits(keywords: dict[str, Any], dtype: torch.dtype, device: str, backend: str) -> None:
    batch = make_batch(4, 6, 17, dtype=dtype, device=device)
    tensors, keywords = given(device, **keywords)
    assert_parity("kto_loss", batch.logits, batch.labels, *tensors, **keywords, backend=backend)


@pytest.mark.parametrize(("keywords", "dtype"), with_dtypes(KEYWORDS), ids=str)
def test_linear(keywords: dict[str, Any], dtype: torch.dtype, device: str, backend: str) -> None:
    batch = make_hidden(4, 6, 24, 37, dtype=dtype, device=device, bias=True)
    tensors, keywords = given(device, **keywords)
    assert_linear_parity("linear_kto_loss", batch, *tensors, **keywords, backend=backend)


@pytest.mark.parametrize("lengths", [[4, 0, 6, 1], [0, 0, 3, 5], [0, 0, 0, 0]], ids=str)
def test_packed(lengths: list[int], device: str, backend: str) -> None:
    (flags, ref), keywords = given(device, kl=1.5)
    logits, labels, ends = make_batch(4, 6, 11, device=device).packed(lengths)
    keywords |= {"cu_seqlens": ends, "backend": backend}
    assert_parity("kto_loss", logits, labels, flags, ref, **keywords)
    rows, ends = make_hidden(4, 6, 12, 29, device=device).packed(lengths)
    assert_linear_parity("linear_kto_loss", rows, flags, ref, **{**keywords, "cu_seqlens": ends})


def test_gradients_by_finite_differences() -> None:
    batch, (tensors, _) = double(4, 4, 5, scale=1.0), given()
    for loss_type in LOSS_TYPES:
        keywords: dict[str, Any] = {"loss_type": loss_type, "kl": 2.0, "undesirable_weight": 1.3, "beta": 0.4}
        for module in (fp, reference):
            assert torch.autograd.gradcheck(
                lambda z, module=module, keywords=keywords: module.kto_loss(z, batch.labels, *tensors, **keywords).loss,
                (batch.logits.requires_grad_(),),
            )


def test_slopes_in_closed_form(device: str, backend: str) -> None:
    """∂loss/∂logps is ∓w β σ'(r − β·kl) / S, whatever kl was computed from."""
    batch, ((flags, ref), _) = make_batch(4, 5, 9, mask="none", device=device), given(device)
    leaf = batch.logits.clone().requires_grad_()
    keywords = {"beta": 0.4, "desirable_weight": 0.7, "undesirable_weight": 1.9}
    kl = (3.0 + 0 * leaf.sum()).requires_grad_()
    output = fp.kto_loss(leaf, batch.labels, flags, ref, kl=kl, backend=backend, **keywords)
    output.loss.backward()
    rows = F.one_hot(batch.labels[:, 1:], 9) - batch.logits[:, :-1].double().softmax(-1)
    for sequence, rewards in enumerate(output.rewards.double().tolist()):
        sigma = 1 / (1 + math.exp(0.4 * 3.0 - rewards))
        slope = (-0.7 if flags[sequence] else 1.9) * 0.4 * sigma * (1 - sigma) / 4
        torch.testing.assert_close(leaf.grad[sequence, :-1].double(), rows[sequence] * slope, rtol=1e-4, atol=1e-7)
    assert not output.kl.requires_grad


# Against TRL.


def trl_losses(trainer: Any, logps: Tensor, ref_logps: Tensor, desirable: Tensor, kl: Tensor) -> tuple[Any, ...]:
    """What TRL's trainer makes of log-probs: its own lines, from the classes to the mean over all sequences."""
    source = textwrap.dedent(inspect.getsource(trainer._compute_loss))
    lines = source[source.index("    # Chosen losses\n") : source.index('    self._metrics[mode]["kl"]')]
    known = {"F": F, "torch": torch, "self": None, "kl": kl}
    for side, members in (("chosen", desirable), ("rejected", ~desirable)):
        known |= {f"{side}_logps": logps[members], f"ref_{side}_logps": ref_logps[members]}
    known["self"] = SimpleNamespace(**trainer.options, accelerator=SimpleNamespace(device="cpu"))
    exec(textwrap.dedent(lines), known)  # TRL has no function of its own for them
    return known["losses"].nanmean(), known["chosen_rewards"], known["rejected_rewards"]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("desirable", [DESIRABLE, [True] * 4, [False] * 4], ids=str)
def test_trl(loss_type: str, desirable: list[bool]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("trl")
        from trl.trainer.kto_trainer import KTOTrainer
    options = {"beta": 0.3, "loss_type": loss_type, "desirable_weight": 1.3, "undesirable_weight": 0.8}
    trainer = SimpleNamespace(_compute_loss=KTOTrainer._compute_loss, options=options)
    batch, ((flags, ref), _) = double(4, 6, 9), given(desirable=desirable)
    kl = torch.tensor([2.5], dtype=torch.float64)
    leaf = batch.logits.clone().requires_grad_()
    logps = reference.sequence_logps(leaf, batch.labels)
    loss, chosen, rejected = trl_losses(trainer, logps, ref.double(), flags, kl)
    loss.backward()
    output, grad = run(fp.kto_loss, batch.logits, batch.labels, flags, ref, kl=kl[0], **options)
    assert_same(output.loss, loss.detach())
    assert_same(output.rewards, torch.cat((chosen, rejected))[torch.argsort(~flags, stable=True).argsort()])
    assert leaf.grad is not None
    assert_same(grad, leaf.grad)


# Theorems.


def test_unpaired_apo_is_half_of_apo_zero(device: str, backend: str) -> None:
    """apo_zero, the mean over pairs of 1 − σ(r_w) + σ(r_l), is twice the mean over their 2B sequences."""
    batch, ref = make_batch(6, 5, 11, device=device), reference_logps(6, device)
    flags = torch.arange(6, device=device) < 3
    keywords: dict[str, Any] = {"beta": 0.3, "loss_type": "apo_zero_unpaired", "backend": backend}
    output, grad = run(fp.kto_loss, batch.logits, batch.labels, flags, ref, **keywords)
    leaf = batch.logits.double().requires_grad_()
    rewards = 0.3 * (reference.sequence_logps(leaf, batch.labels) - ref.double())
    pairs = (1 - rewards[:3].sigmoid() + rewards[3:].sigmoid()).mean()
    pairs.backward()
    assert leaf.grad is not None
    torch.testing.assert_close(2 * output.loss.double(), pairs.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(2 * grad.double(), leaf.grad, rtol=1e-4, atol=1e-6)


def test_kl_shifts_the_reference() -> None:
    """KTO with kl is APO against references that are kl higher."""
    batch, ((flags, ref), _) = double(4, 6, 9), given()
    ours, grad = run(fp.kto_loss, batch.logits, batch.labels, flags, ref, kl=1.75, beta=0.4)
    apo = {"loss_type": "apo_zero_unpaired", "beta": 0.4}
    shifted, shifted_grad = run(fp.kto_loss, batch.logits, batch.labels, flags, ref.double() + 1.75, **apo)
    assert_same(ours.loss, shifted.loss.detach())
    assert_same(grad, shifted_grad)


def test_kl_has_no_effect_on_apo(device: str, backend: str) -> None:
    """Not even NaN, which is reported as it came; KTO shows it in the loss."""
    batch, ((flags, ref), _) = make_batch(4, 6, 9, device=device), given(device)
    nan = torch.tensor(torch.nan, device=device)
    tensors, keywords = (batch.logits, batch.labels, flags, ref), {"loss_type": "apo_zero_unpaired", "backend": backend}
    plain, grad = run(fp.kto_loss, *tensors, **keywords)
    output, other = run(fp.kto_loss, *tensors, kl=nan, **keywords)
    assert torch.equal(output.loss, plain.loss)
    assert torch.equal(other, grad)
    assert output.kl.isnan()
    assert fp.kto_loss(*tensors, kl=nan, backend=backend).loss.isnan()


@pytest.mark.parametrize("linear", [False, True])
def test_accumulation_is_exact(linear: bool, device: str, backend: str) -> None:
    """Microbatches with the number of all sequences add up to one batch."""
    (flags, ref), keywords = given(device, kl=torch.tensor(1.2), undesirable_weight=1.4, backend=backend)
    if linear:
        batch = make_hidden(4, 5, 12, 31, device=device)
        source, labels, rest = batch.hidden.requires_grad_(), batch.labels, (batch.weight,)
        loss: Any = fp.linear_kto_loss
    else:
        logits = make_batch(4, 5, 31, device=device)
        source, labels, rest, loss = logits.logits.requires_grad_(), logits.labels, (), fp.kto_loss
    whole = loss(source, *rest, labels, flags, ref, **keywords).loss
    keywords["sequence_normalizer"] = 4
    parts = [loss(source[p], *rest, labels[p], flags[p], ref[p], **keywords).loss for p in ([0], [1, 2, 3])]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), source), torch.autograd.grad(whole, source))


# Degenerate input.


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_weight_of_zero_is_no_gradient(loss_type: str, device: str, backend: str) -> None:
    batch, ((flags, ref), _) = make_batch(4, 5, 11, device=device), given(device)
    keywords: dict[str, Any] = {"loss_type": loss_type, "backend": backend, "undesirable_weight": 0}
    output, grad = run(fp.kto_loss, batch.logits, batch.labels, flags, ref, **keywords)
    assert output.loss.isfinite()
    assert [bool(rows.any()) for rows in grad] == DESIRABLE


@pytest.mark.parametrize("present", [True, False])
def test_absent_class(present: bool, device: str, backend: str) -> None:
    batch, ((flags, ref), _) = make_batch(3, 5, 11, device=device), given(device, [present] * 3)
    output, grad = run(fp.kto_loss, batch.logits, batch.labels, flags, ref, backend=backend)
    assert all(value.isfinite().all() for value in [*output, *output.metrics().values()])
    assert output.metrics()["rewards/margins"] == 0
    assert grad.any()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_empty_completion(loss_type: str, device: str, backend: str) -> None:
    """Its log-prob is 0, its reward that of the reference alone, its gradient 0."""
    (flags, ref), keywords = given(device, loss_type=loss_type, backend=backend)
    for linear in (False, True):
        if linear:
            batch = make_hidden(4, 5, 12, 31, mask="empty", device=device)
            leaf, rest, loss = batch.hidden.requires_grad_(), (batch.weight, batch.labels), fp.linear_kto_loss
        else:
            logits = make_batch(4, 5, 11, mask="empty", device=device)
            leaf, rest, loss = logits.logits.requires_grad_(), (logits.labels,), fp.kto_loss
        output: Any = loss(leaf, *rest, flags, ref, **keywords)  # type: ignore[arg-type]
        output.loss.backward()
        assert output.logps[2] == 0
        assert output.rewards[2] == pytest.approx(-0.1 * ref[2].item())
        assert leaf.grad is not None
        assert [bool(rows.any()) for rows in leaf.grad] == [True, True, False, True]


@pytest.mark.parametrize("shape", [(0, 4, 7), (2, 0, 7), (3, 1, 7)], ids=str)
def test_nothing_to_score(shape: tuple[int, int, int], device: str, backend: str) -> None:
    batch, ((flags, ref), _) = make_batch(*shape, mask="none", device=device), given(device, [True] * shape[0])
    output = assert_parity("kto_loss", batch.logits, batch.labels, flags, ref, kl=0.5, backend=backend)
    assert output.loss.requires_grad
    hidden = make_hidden(shape[0], shape[1], 8, 7, mask="none", device=device)
    assert_linear_parity("linear_kto_loss", hidden, flags, ref, kl=0.5, backend=backend)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nan_shows_where_it_is(loss_type: str, linear: bool, device: str, backend: str) -> None:
    """In the loss, and in the gradient of its sequence alone."""
    (flags, ref), keywords = given(device, loss_type=loss_type, backend=backend, logits_mean=None)
    if linear:
        batch = make_hidden(4, 5, 12, 31, mask="none", device=device)
        source, rest, loss = batch.hidden, (batch.weight, batch.labels), fp.linear_kto_loss
    else:
        logits = make_batch(4, 5, 11, mask="none", device=device)
        source, rest, loss = logits.logits, (logits.labels,), fp.kto_loss
    source[1, 2, 3] = torch.nan
    output: Any = loss(source.requires_grad_(), *rest, flags, ref, **keywords)  # type: ignore[arg-type]
    output.loss.backward()
    assert output.loss.isnan()
    assert output.rewards.isnan().tolist() == [False, True, False, False]
    assert source.grad is not None
    assert [bool(rows.isnan().any()) for rows in source.grad] == [False, True, False, False]
    with fp.checks(), pytest.raises(ValueError, match=r"log-prob of each sequence must be finite; got nan at \[1\]"):
        loss(source, *rest, flags, ref, **keywords)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("desirable", [True, False])
def test_target_of_probability_zero(loss_type: str, desirable: bool, device: str, backend: str) -> None:
    """A log-prob of −∞ costs its class weight or nothing, and has slope 0: KTO's loss is bounded."""
    batch = make_batch(2, 4, 11, mask="none", device=device)
    batch.labels[0, 1:], batch.labels[1, 1:] = 3, 4
    batch.logits[0, :, 3] = -torch.inf
    (flags, ref), keywords = given(device, [desirable, True], loss_type=loss_type, backend=backend, logits_mean=None)
    keywords |= {"desirable_weight": 1.5, "undesirable_weight": 1.5, "beta": 0.5}
    output, grad = run(fp.kto_loss, batch.logits, batch.labels, flags, ref, **keywords)
    alone = fp.kto_loss(batch.logits[1:], batch.labels[1:], flags[1:], ref[1:], **keywords).loss
    torch.testing.assert_close(output.loss, (alone + (1.5 if desirable else 0.0)) / 2)
    assert output.rewards[0] == -torch.inf
    assert not grad[0].any()
    assert grad[1].any()


def test_unscored_positions_may_hold_anything(device: str, backend: str) -> None:
    batch, ((flags, ref), _) = make_batch(4, 5, 11, device=device), given(device)
    batch.labels[0, :3] = IGNORE
    keywords: dict[str, Any] = {"kl": 0.5, "logits_mean": "completion", "backend": backend}
    clean, truth = run(fp.kto_loss, batch.logits, batch.labels, flags, ref, **keywords)
    batch.logits[0, 0] = torch.nan
    output, grad = run(fp.kto_loss, batch.logits, batch.labels, flags, ref, **keywords)
    assert torch.equal(output.loss, clean.loss)
    assert torch.equal(grad, truth)


def test_sums_far_from_the_reference_saturate(device: str, backend: str) -> None:
    """σ(±1e4) overflows nowhere; the loss is the class weight or 0, and gradients are 0."""
    batch, ((flags, _), _) = make_batch(4, 5, 11, device=device), given(device)
    for far, expected in ((-1e6, 0.5), (1e6, 0.5)):
        ref = torch.full((4,), far, device=device)
        output, grad = run(fp.kto_loss, batch.logits, batch.labels, flags, ref, beta=1.0, backend=backend)
        assert output.loss == expected
        assert not grad.any()
