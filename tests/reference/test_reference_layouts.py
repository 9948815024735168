"""The reference over layouts, dtypes and keywords."""

import functools
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closed_forms import FUNCTIONS, assert_fields, assert_same, double, every_objective, objective
from harness import IGNORE, Batch, make_batch, reference_logps, run
from torch import Tensor

import fused_pref
from fused_pref import reference


@pytest.mark.parametrize("lengths", [[4, 0, 6, 1], [0, 0, 3, 5], [6, 6, 6, 0], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("shift", [True, False])
@every_objective
def test_packed_equals_padded(lengths: list[int], shift: bool, name: str, keywords: dict[str, Any]) -> None:
    batch = double(4, 6, 7, mask="none")
    logits, labels, ends = batch.packed(lengths)
    for s, n in enumerate(lengths):
        batch.labels[s, n:] = IGNORE
    for cu_seqlens in (ends, ends.long()):
        layout = {"shift": shift, "logits_mean": "completion"}
        padded, padded_grad = objective(name, batch, **keywords, **layout)
        packed, grad = objective(name, Batch(logits, labels), cu_seqlens=cu_seqlens, **keywords, **layout)
        assert_fields(packed, list(padded))
        assert_same(grad, torch.cat([padded_grad[s, :n] for s, n in enumerate(lengths)]))
    tokens = F.pad(reference.token_logps(batch.logits, batch.labels, shift=shift), (0, int(shift)))
    packed_tokens = reference.token_logps(logits, labels, cu_seqlens=ends, shift=shift)
    assert_same(packed_tokens, torch.cat([tokens[s, :n] for s, n in enumerate(lengths)]))
    everywhere = reference.cpo_loss(logits, labels, cu_seqlens=ends)
    assert_same(everywhere.chosen_logits_mean, logits[: ends[2]].mean() if ends[2] else 0.0)


@every_objective
def test_shift_equals_shifted_labels(name: str, keywords: dict[str, Any]) -> None:
    batch = double(4, 6, 7)
    shifted = Batch(batch.logits, F.pad(batch.labels[:, 1:], (0, 1), value=IGNORE))
    ours, grad = objective(name, batch, **keywords)
    truth, true_grad = objective(name, shifted, shift=False, **keywords)
    assert_fields(ours, list(truth))
    assert_same(grad, true_grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@every_objective
def test_dtypes(dtype: torch.dtype, name: str, keywords: dict[str, Any]) -> None:
    """Halves are float32 math on the upcast logits, bit for bit; only the gradient is rounded back."""
    batch = make_batch(4, 6, 7, dtype=dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    ours, grad = objective(name, batch, softcap=4.0, **keywords)
    truth, true_grad = objective(name, Batch(batch.logits.to(compute), batch.labels.int()), softcap=4.0, **keywords)
    for value, other in zip(ours, truth, strict=True):
        assert torch.equal(value, other)
        assert value.dtype in (compute, torch.int64)
    assert grad.dtype == dtype
    assert torch.equal(grad, true_grad.to(dtype))
    assert reference.token_logps(batch.logits, batch.labels).dtype == compute
    assert reference.sequence_logps(batch.logits, batch.labels).dtype == compute


def test_sums_are_float64() -> None:
    batch = make_batch(2, 3000, 5, mask="none")
    tokens = reference.token_logps(batch.logits, batch.labels)
    sums = tokens.double().sum(1)
    assert not torch.equal(functools.reduce(torch.add, tokens.T), sums.float())
    assert torch.equal(reference.sequence_logps(batch.logits, batch.labels), sums.float())
    output = reference.dpo_loss(batch.logits, batch.labels, sums.flip(0), beta=1.0)
    assert_same(output.chosen_rewards, (sums[:1] - sums[1:]).float(), 0.0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures(name: str) -> None:
    assert inspect.signature(getattr(reference, name)) == inspect.signature(getattr(fused_pref, name))
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'betta'"):
        getattr(reference, name)(torch.zeros(2, 3, 4), torch.zeros(2, 3), betta=1.0)


def test_options_about_how_have_no_effect() -> None:
    batch = double(4, 5, 6)
    plain, plain_grad = objective("cpo_loss", batch)
    leaf = batch.logits.clone().requires_grad_()
    output = reference.cpo_loss(leaf, batch.labels, backend="triton", inplace_backward=True)
    output.loss.backward(retain_graph=True)
    output.loss.backward()
    assert leaf.grad is not None
    assert torch.equal(output.loss, plain.loss)
    assert torch.equal(leaf.grad, 2 * plain_grad)


@pytest.mark.parametrize("ignore_index", [0, -1, 6])
def test_ignore_index(ignore_index: int) -> None:
    batch = double(4, 5, 7)
    other = batch.labels.clamp(min=1, max=5).where(batch.labels != IGNORE, ignore_index)
    batch.labels[batch.labels != IGNORE] = other[batch.labels != IGNORE]
    ours, grad = run(reference.cpo_loss, batch.logits, other, ignore_index=ignore_index)
    truth, true_grad = objective("cpo_loss", batch)
    assert torch.equal(ours.loss, truth.loss)
    assert torch.equal(grad, true_grad)
    assert reference.cpo_loss(batch.logits, batch.labels, ignore_index=ignore_index).loss.isnan()


def test_shift_object() -> None:
    """``delta`` may be an object: it sees detached float64 rewards, and commits only when nothing can fail any more."""
    batch, desirable, calls = make_batch(4, 5, 6), torch.tensor([True, False, True, False]), []

    class Shift:
        def peek(self, rewards: Tensor, classes: Tensor) -> tuple[Tensor, str]:
            assert rewards.dtype == torch.float64
            assert not rewards.requires_grad
            assert classes is desirable
            calls.append("peek")
            return rewards.mean().requires_grad_(), "state"

        def commit(self, state: str) -> None:
            calls.append(state)

    leaf = batch.logits.requires_grad_()
    output = reference.bco_loss(leaf, batch.labels, desirable, reference_logps(4), delta=Shift())
    assert calls == ["peek", "state"]
    assert_same(output.delta, output.rewards.mean(), 1e-6)
    assert not output.delta.requires_grad
    calls.clear()
    with pytest.raises(RuntimeError):
        reference.bco_loss(
            leaf, batch.labels, desirable, reference_logps(4), delta=Shift(), sample_weight=torch.ones(3)
        )
    assert calls == ["peek"]
