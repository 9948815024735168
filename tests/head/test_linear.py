"""The linear head against the float64 reference: values and every gradient, by every plan and backend."""

import itertools
from typing import Any

import pytest
import torch
from harness import IGNORE, Hidden, assert_gradient, assert_values, make_hidden
from head_cases import OBJECTIVES, SOFTCAP, arguments, only, parity

import fused_pref as fp

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# The math of an objective is done in float32 or float64, whatever the head's dtype is.
HALVES = [
    ("ipo", BF16), ("bco-batch", BF16), ("tokens", BF16), ("dpo-hinge", F16), ("kto", F16), ("sequences", F16)
]  # fmt: skip


@pytest.mark.parametrize(("objective", "dtype"), [*itertools.product(OBJECTIVES, (F32, F64)), *HALVES], ids=str)
def test_objectives(objective: str, dtype: torch.dtype, device: str, backend: str) -> None:
    batch = make_hidden(6, 5, 12, 29, dtype=dtype, device=device, bias=True)
    parity(objective, batch, device=device, backend=backend)


# Every plan in every dtype, with all gradients that it gives.
WHOLE = [("grouped", "cpo", "hwb"), ("vocab_major", "cpo", "hwb"), ("frozen_head", "cpo", "h"), ("logprob", "cpo", "")]
KINDS: list[tuple[torch.dtype, dict[str, Any]]] = [(F32, SOFTCAP), (BF16, {}), (BF16, SOFTCAP), (F16, {})]
# Some of its gradients, and other objectives.
PARTS: list[tuple[tuple[str, str, str], tuple[torch.dtype, dict[str, Any]]]] = [
    (("grouped", "dpo", "hw"), KINDS[0]),
    (("grouped", "bco", "wb"), KINDS[2]),
    (("grouped", "simpo", "w"), KINDS[3]),
    (("vocab_major", "bco-batch", "hw"), KINDS[3]),
    (("vocab_major", "tokens", "wb"), KINDS[0]),
    (("vocab_major", "sequences", "b"), KINDS[1]),
    (("frozen_head", "bco-batch", "h"), KINDS[1]),
    (("frozen_head", "tokens", "h"), KINDS[2]),
    (("logprob", "bco", ""), KINDS[2]),
]


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize(("plan", "kind"), [*itertools.product(WHOLE, KINDS), *PARTS], ids=str)
def test_plans(
    plan: tuple[str, str, str], kind: tuple[torch.dtype, dict[str, Any]], small: bool, device: str, backend: str
) -> None:
    (name, objective, wanted), (dtype, keywords) = plan, kind
    batch = make_hidden(6, 4, 12, 29, dtype=dtype, device=device, bias=True, mask="empty")
    batch.wanted = wanted
    with only(name, small=small) as taken:
        parity(objective, batch, device=device, backend=backend, **keywords)
    if small and name == "grouped":
        assert len(taken[0].bounds) > 2
    if small and name == "vocab_major":
        assert taken[0].columns < 29


@pytest.mark.parametrize(
    ("name", "wanted"), [("grouped", "hwb"), ("vocab_major", "hwb"), ("frozen_head", "h"), ("logprob", "")]
)
def test_the_smallest_chunks(name: str, wanted: str, device: str, backend: str) -> None:
    batch = make_hidden(4, 4, 6, 7, device=device, bias=True)
    batch.wanted = wanted
    with only(name, small=True, least=1) as taken:
        parity("cpo", batch, device=device, backend=backend, softcap=3.0, logit_scale=-1.7)
    assert min(taken[0].rows, taken[0].columns) == 1 or name == "grouped"


@pytest.mark.parametrize("logits_mean", ["all", "completion", None])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("objective", ["cpo", "bco-batch"])
def test_logits_means(objective: str, softcap: float | None, logits_mean: str, device: str, backend: str) -> None:
    """Of pairs and of classes, by a plan that sees whole rows and one that sees slices of them."""
    batch = make_hidden(6, 4, 12, 29, device=device, bias=True)
    options = {"logits_mean": logits_mean, "softcap": softcap, "logit_scale": 1.3, "backend": backend}
    parity(objective, batch, device=device, **options)
    parity(objective, batch, device=device, max_valid_tokens=100, **options)


@pytest.mark.parametrize(
    "shape",
    [(2, 1, 5, 7), (2, 2, 1, 1), (2, 3, 31, 2), (0, 4, 5, 7), (2, 0, 5, 7), (2, 2, 257, 3), (4, 3, 3, 4099)],
    ids=str,
)
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("objective", ["cpo", "bco-batch", "tokens"])
def test_awkward_shapes(shape: tuple[int, ...], shift: bool, objective: str, device: str, backend: str) -> None:
    batch = make_hidden(*shape, mask="none", device=device)
    parity(objective, batch, device=device, shift=shift, backend=backend)


@pytest.mark.parametrize("mask", ["none", "some", "one", "empty", "all"])
@pytest.mark.parametrize(
    ("objective", "bound"),
    [("cpo", None), ("bco", 100), ("dpo", "exact"), ("bco-batch", None), ("bco-batch", 100), ("bco-batch", "exact")],
)
def test_masks(mask: str, objective: str, bound: Any, device: str, backend: str) -> None:
    """By groups of pairs or of sequences, and by slices, each with every bound."""
    batch = make_hidden(6, 4, 12, 29, mask=mask, device=device)
    number = int((batch.labels[:, 1:] != IGNORE).sum())
    parity(objective, batch, device=device, backend=backend, max_valid_tokens=number if bound == "exact" else bound)


@pytest.mark.parametrize("lengths", [[4, 0, 6, 1], [0, 0, 3, 5], [6, 6, 6, 0], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize(
    ("objective", "bound"), [("cpo", None), ("bco", 30), ("bco-batch", None), ("bco-batch", 30), ("tokens", 30)]
)
def test_packed(lengths: list[int], objective: str, bound: int | None, device: str, backend: str) -> None:
    batch = make_hidden(4, 6, 12, 29, device=device, bias=True)
    packed, ends = batch.packed(lengths)
    ours = parity(objective, packed, device=device, cu_seqlens=ends, backend=backend, max_valid_tokens=bound)
    if objective != "tokens":
        for s, n in enumerate(lengths):
            batch.labels[s, n:] = IGNORE
        assert_values(ours.loss, parity(objective, batch, device=device, backend=backend).loss, 1e-6)


@pytest.mark.parametrize("make", ["sliced", "transposed", "expanded"])
@pytest.mark.parametrize("objective", ["cpo", "tokens"])
def test_strides(make: str, objective: str, device: str, backend: str) -> None:
    batch = make_hidden(6, 7, 12, 29, device=device)
    h, w = batch.hidden, batch.weight
    batch.hidden = {
        "sliced": lambda: torch.randn(6, 9, 20, device=device)[:, 1:8, 3:15].copy_(h),
        "transposed": lambda: h.transpose(0, 1).contiguous().transpose(0, 1),
        "expanded": lambda: h[:1].expand(6, 7, 12),
    }[make]()
    batch.weight = w.t().contiguous().t()
    assert not batch.hidden.is_contiguous()
    parity(objective, batch, device=device, backend=backend)


@pytest.mark.parametrize("kind", ["peaked", "huge", "far", "masked"])
@pytest.mark.parametrize("name", ["grouped", "vocab_major"])
def test_hard_logits(kind: str, name: str, device: str, backend: str) -> None:
    """Targets of probability 0.999 and more, |z| in the thousands, targets far below, entries of probability 0."""
    batch = make_hidden(4, 4, 32, 200, mask="none", device=device, bias=True)
    if kind in ("peaked", "far"):
        batch.aim(18.0 if kind == "peaked" else -80.0)
    elif kind == "huge":
        batch.hidden *= 300
    else:
        batch.bias[150:] = -torch.inf
        batch.labels.clamp_(max=149)
    with only(name):
        parity("cpo", batch, device=device, backend=backend, beta=0.01, logits_mean=None)
    logps = fp.linear_token_logps(batch.hidden, batch.weight, batch.labels, bias=batch.bias, backend=backend)
    assert (logps <= 0).all()
    assert kind != "peaked" or logps.mean() > -0.01


@pytest.mark.slow
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("objective", ["cpo", "bco", "bco-batch"])
def test_non_finite_inputs_show(bad: float, objective: str, device: str, backend: str) -> None:
    name, own = OBJECTIVES[objective]
    own = {key: fp.RewardShift().to(device) if value == "running_mean" else value for key, value in own.items()}
    for part in ("hidden", "weight", "bias"):
        batch = make_hidden(6, 7, 12, 29, device=device, bias=True, mask="none")
        getattr(batch, part)[(3,) * getattr(batch, part).dim()] = bad
        tensors = (batch.hidden, batch.weight, batch.labels, *arguments(name, device))
        assert getattr(fp, name)(*tensors, bias=batch.bias, backend=backend, **own).loss.isnan(), part


@pytest.mark.slow
def test_unscored_positions_may_hold_anything(device: str, backend: str) -> None:
    for bound in (None, 100):
        batch = make_hidden(6, 7, 12, 29, device=device)
        batch.labels[1, :3] = IGNORE
        options = {"backend": backend, "logits_mean": "completion", "max_valid_tokens": bound}
        clean = gradients(batch, **options)
        batch.hidden[1, :2] = batch.hidden[:, -1] = torch.nan
        assert all(torch.equal(a, b) for a, b in zip(gradients(batch, **options), clean, strict=True))


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_means_of_completions_leave_other_positions_out(softcap: float | None, device: str, backend: str) -> None:
    batch = make_hidden(6, 7, 12, 29, device=device)
    options = {"backend": backend, "logits_mean": "completion", "softcap": softcap}
    clean = fp.linear_cpo_loss(batch.hidden, batch.weight, batch.labels, **options)
    batch.hidden[:, -1] = torch.nan
    dirty = fp.linear_cpo_loss(batch.hidden, batch.weight, batch.labels, **options)
    assert torch.equal(dirty.chosen_logits_mean, clean.chosen_logits_mean)
    assert torch.equal(dirty.rejected_logits_mean, clean.rejected_logits_mean)


def gradients(batch: Hidden, upstream: float = 1.0, **keywords: Any) -> list[torch.Tensor]:
    leaves = [batch.hidden.detach().requires_grad_(), batch.weight.detach().requires_grad_()]
    loss = fp.linear_cpo_loss(*leaves, batch.labels, **keywords).loss
    return list(torch.autograd.grad(loss * upstream, leaves))


@pytest.mark.parametrize("label", [29, -1, 2**31 - 1])
def test_label_outside_the_vocabulary(label: int, device: str, backend: str) -> None:
    batch = make_hidden(6, 7, 12, 29, device=device, mask="none")
    batch.labels[2, 3] = label
    logps = fp.linear_token_logps(batch.hidden, batch.weight, batch.labels, backend=backend)
    assert logps[2, 2].isnan()
    assert logps.isnan().sum() == 1
    assert fp.linear_cpo_loss(batch.hidden, batch.weight, batch.labels, backend=backend).loss.isnan()
    with fp.checks(), pytest.raises(ValueError, match=rf"labels .*V=29.*{label} at \[2, 3\]"):
        fp.linear_cpo_loss(batch.hidden, batch.weight, batch.labels, backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grouped", "vocab_major"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeatable(name: str, dtype: torch.dtype, device: str, backend: str) -> None:
    batch = make_hidden(4, 4, 17, 37, device=device, dtype=dtype, mask="none")
    batch.labels[:, 1:3] = 5
    with only(name, small=True):
        first, second = gradients(batch, backend=backend), gradients(batch, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["grouped", "vocab_major", "frozen_head"])
def test_upstream_gradient_and_retain_graph(name: str) -> None:
    batch = make_hidden(6, 7, 12, 29)
    h, w = batch.hidden.requires_grad_(), batch.weight.requires_grad_(name != "frozen_head")
    leaves = [h, w] if w.requires_grad else [h]
    with only(name):
        loss = fp.linear_cpo_loss(h, w, batch.labels).loss
        one = torch.autograd.grad(loss, leaves, retain_graph=True)
        scaled = torch.autograd.grad(loss * -3.7, leaves, retain_graph=True)
        again = torch.autograd.grad(loss, leaves, retain_graph=True)
        zero = torch.autograd.grad(loss * 0, leaves)
    for first, second, third, fourth in zip(one, scaled, again, zero, strict=True):
        assert_gradient(second, first.double() * -3.7, 1e-6)
        assert torch.equal(first, third)
        assert not fourth.any()


@pytest.mark.parametrize("name", ["grouped", "vocab_major"])
def test_second_derivative_is_refused(name: str) -> None:
    batch = make_hidden(6, 7, 12, 29)
    h, w = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    with only(name):
        loss = fp.linear_cpo_loss(h, w, batch.labels).loss
        grad, _ = torch.autograd.grad(loss, (h, w), create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_no_gradient_takes_the_cheapest_plan() -> None:
    batch = make_hidden(6, 7, 12, 29)
    h, w = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    with torch.no_grad(), only("logprob") as taken:
        quiet = fp.linear_cpo_loss(h, w, batch.labels)
    assert taken[0].products == 1
    assert not quiet.loss.requires_grad
    torch.testing.assert_close(quiet.loss, fp.linear_cpo_loss(h, w, batch.labels).loss.detach())


def test_max_valid_tokens_too_small() -> None:
    batch = make_hidden(6, 7, 12, 29, mask="none")
    with pytest.raises(ValueError, match="max_valid_tokens must be at least N = 36; got 35"):
        fp.linear_cpo_loss(batch.hidden, batch.weight, batch.labels, max_valid_tokens=35)


@pytest.mark.parametrize("objective", ["cpo", "dpo", "bco", "sequences"])
def test_gradcheck(objective: str) -> None:
    batch = make_hidden(4, 4, 3, 5, dtype=torch.float64, bias=True)
    name, own = OBJECTIVES[objective]

    def loss(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        output = getattr(fp, name)(h, w, batch.labels, *arguments(name, "cpu", 4), bias=b, softcap=3.0, **own)
        return output.loss if hasattr(output, "loss") else output

    leaves = [part.requires_grad_() for part in (batch.hidden, batch.weight, batch.bias)]
    assert torch.autograd.gradcheck(loss, leaves)
