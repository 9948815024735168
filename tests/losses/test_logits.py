"""The functions of logits against the float64 reference: values, every field, every gradient."""

import itertools
from typing import Any

import pytest
import torch
from harness import (
    IGNORE,
    assert_gradient,
    assert_parity,
    assert_values,
    make_batch,
    peak_bytes,
    reference_logps,
    run,
)

import fused_pref as fp

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CPO = [
    {},
    {"loss_type": "hinge", "beta": 0.01},
    {"loss_type": "ipo", "cpo_alpha": 0.0},
    {"loss_type": "simpo", "simpo_gamma": 1.2, "beta": 2.0},
    {"loss_type": "alphapo", "alpha": 0.25},
    {"label_smoothing": 0.3, "cpo_alpha": 0.5, "nll_reduction": "sequence"},
    {"alpha": -0.1, "beta": 0.4},
    {"pair_normalizer": 7, "token_normalizer": torch.tensor(31)},
    {"token_normalizer": torch.tensor(0)},
]
DPO = [
    {},
    {"loss_type": "hinge", "beta": 0.5},
    {"loss_type": "ipo"},
    {"label_smoothing": 0.2, "pair_normalizer": 5.0},
]
BCO = [
    {},
    {"delta": 0.7, "beta": 0.3},
    {"delta": torch.tensor(-1.5), "reduction": "class_mean"},
    {"reduction": "class_mean", "class_normalizer": (torch.tensor(9.0), 4)},
    {"reduction": "class_mean", "class_normalizer": (torch.tensor(0), 3)},
    {"sample_weight": torch.tensor([1.0, 0.5, 3.0, 10.0]), "sequence_normalizer": 11},
]
TRANSFORMS = [{"softcap": 5.0, "logit_scale": 1.7, "temperature": 0.6}, {"temperature": 3.0}, {"logit_scale": -0.5}]


def with_dtypes(cases: list[dict[str, Any]]) -> list[tuple[dict[str, Any], torch.dtype]]:
    """All in float32, two in every dtype: an objective sees sums of log-probs, whatever logits they are of."""
    return [*((keywords, torch.float32) for keywords in cases), *itertools.product(cases[:2], DTYPES[1:])]


def move(keywords: dict[str, Any], device: str) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}


@pytest.mark.parametrize(("keywords", "dtype"), with_dtypes(CPO), ids=str)
def test_cpo(keywords: dict[str, Any], dtype: torch.dtype, device: str, backend: str) -> None:
    batch = make_batch(4, 6, 17, dtype=dtype, device=device)
    assert_parity("cpo_loss", batch.logits, batch.labels, **move(keywords, device), backend=backend)


@pytest.mark.parametrize(("keywords", "dtype"), with_dtypes(DPO), ids=str)
def test_dpo(keywords: dict[str, Any], dtype: torch.dtype, device: str, backend: str) -> None:
    batch = make_batch(4, 6, 17, dtype=dtype, device=device)
    assert_parity(
        "dpo_loss", batch.logits, batch.labels, reference_logps(4, device), **move(keywords, device), backend=backend
    )


def test_hinge_at_its_kink(device: str, backend: str) -> None:
    """Where 1 − βΔ is 0 bitwise, the gradient is 0, as that of relu."""
    batch = make_batch(2, 6, 17, mask="none", device=device)
    batch.logits[1], batch.labels[1] = batch.logits[0], batch.labels[0]
    ref = torch.tensor([0.0, 2.0], device=device)
    output, grad = run(fp.dpo_loss, batch.logits, batch.labels, ref, loss_type="hinge", beta=0.5, backend=backend)
    assert output.loss == 0
    assert not grad.any()


@pytest.mark.parametrize(("keywords", "dtype"), with_dtypes(BCO), ids=str)
def test_bco(keywords: dict[str, Any], dtype: torch.dtype, device: str, backend: str) -> None:
    batch = make_batch(4, 6, 17, dtype=dtype, device=device)
    desirable = torch.tensor([True, False, False, True], device=device)
    assert_parity(
        "bco_loss",
        batch.logits,
        batch.labels,
        desirable,
        reference_logps(4, device),
        **move(keywords, device),
        backend=backend,
    )


@pytest.mark.parametrize(
    ("name", "dtype"), [*(("token_logps", dtype) for dtype in DTYPES), ("sequence_logps", torch.float32)], ids=str
)
@pytest.mark.parametrize("keywords", [{}, {"shift": False}, *TRANSFORMS], ids=str)
def test_building_blocks(keywords: dict[str, Any], dtype: torch.dtype, name: str, device: str, backend: str) -> None:
    batch = make_batch(3, 5, 19, dtype=dtype, device=device)
    result = assert_parity(name, batch.logits, batch.labels, **keywords, backend=backend)
    assert (result <= 0).all()
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_sequence_average(device: str, backend: str) -> None:
    batch = make_batch(4, 6, 17, mask="empty", device=device)
    assert_parity("sequence_logps", batch.logits, batch.labels, average=True, backend=backend)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_transform_in_objective(transform: dict[str, float], device: str, backend: str) -> None:
    batch = make_batch(4, 6, 17, device=device)
    for logits_mean in ("all", "completion", None):
        assert_parity("cpo_loss", batch.logits, batch.labels, logits_mean=logits_mean, **transform, backend=backend)


@pytest.mark.parametrize("softcap", [0.4, 1e5], ids=["saturated", "wide"])
def test_extreme_softcaps(softcap: float, device: str, backend: str) -> None:
    """Nothing cancels: not 1 − tanh² where every entry is saturated, not tanh where it is nearly the identity."""
    batch = make_batch(3, 5, 19, mask="none", device=device)
    logits = batch.logits.sign() * batch.logits.abs().clamp(min=2.0)
    assert_parity("token_logps", logits, batch.labels, softcap=softcap, backend=backend)


@pytest.mark.parametrize("mask", ["none", "some", "one", "empty", "all"])
@pytest.mark.parametrize(("loss_type", "logits_mean"), [("sigmoid", "all"), ("ipo", "completion")])
def test_masks(mask: str, loss_type: str, logits_mean: Any, device: str, backend: str) -> None:
    """Of a loss of sums and of one of averages."""
    batch = make_batch(4, 5, 13, mask=mask, device=device)
    assert_parity("cpo_loss", batch.logits, batch.labels, loss_type=loss_type, logits_mean=logits_mean, backend=backend)


@pytest.mark.parametrize(
    "shape",
    [(2, 1, 5), (2, 2, 1), (2, 3, 2), (0, 4, 7), (2, 0, 7), (4, 5, 257), (2, 2, 4099), (2, 40, 3)],
    ids=str,
)
@pytest.mark.parametrize(("name", "shift"), [("cpo_loss", True), ("token_logps", False)])
def test_awkward_shapes(shape: tuple[int, int, int], name: str, shift: bool, device: str, backend: str) -> None:
    batch = make_batch(*shape, mask="none", device=device)
    assert_parity(name, batch.logits, batch.labels, shift=shift, backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "softcap"), [(torch.float32, 30.0), (torch.bfloat16, None)])
def test_large_vocabulary(dtype: torch.dtype, softcap: float | None, device: str, backend: str) -> None:
    batch = make_batch(2, 3, 151_937, dtype=dtype, mask="none", device=device)
    assert_parity("cpo_loss", batch.logits, batch.labels, softcap=softcap, backend=backend)


@pytest.mark.parametrize("lengths", [[4, 0, 6, 1], [0, 0, 3, 5], [6, 6, 6, 0], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize(("shift", "index"), [(True, torch.int32), (False, torch.int64)])
def test_packed(lengths: list[int], shift: bool, index: torch.dtype, device: str, backend: str) -> None:
    batch = make_batch(4, 6, 11, device=device)
    logits, labels, ends = batch.packed(lengths)
    keywords = {"cu_seqlens": ends.to(index), "shift": shift}
    ours = assert_parity("cpo_loss", logits, labels, loss_type="simpo", **keywords, backend=backend)
    assert_parity("dpo_loss", logits, labels, reference_logps(4, device), **keywords, backend=backend)
    desirable = torch.tensor([True, False, True, False], device=device)
    assert_parity("bco_loss", logits, labels, desirable, reference_logps(4, device), **keywords, backend=backend)
    assert_parity("token_logps", logits, labels, **keywords, backend=backend)
    assert_parity("sequence_logps", logits, labels, **keywords, backend=backend)
    for s, n in enumerate(lengths):
        batch.labels[s, n:] = IGNORE
    padded = fp.cpo_loss(batch.logits, batch.labels, loss_type="simpo", shift=shift, backend=backend)
    assert_values(ours.loss, padded.loss, 1e-6)
    assert_values(ours.chosen_logps, padded.chosen_logps, 1e-6)


@pytest.mark.parametrize("kind", ["peaked", "flat", "huge", "far"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hard_logits(kind: str, dtype: torch.dtype, device: str, backend: str) -> None:
    """p ≈ 0.999 targets, equal logits, |z| up to 1e4, targets far below the maximum."""
    batch = make_batch(4, 6, 1000, mask="none", dtype=torch.float32, device=device)
    z, y = batch.logits, batch.labels[:, 1:, None]
    if kind == "peaked":
        z[:, :-1].scatter_(-1, y, 20.0)
    elif kind == "flat":
        z.zero_()
    elif kind == "huge":
        z.mul_(3000)
    else:
        z[:, :-1].scatter_(-1, y, -200.0)
    z = z.to(dtype)
    assert_parity("cpo_loss", z, batch.labels, beta=0.01, backend=backend)
    logps = fp.token_logps(z, batch.labels, backend=backend)
    assert (logps <= 0).all()
    if kind == "peaked":
        truth = fp.reference.token_logps(z.double(), batch.labels)
        assert_values(logps / truth, torch.ones_like(truth), 1e-5, "relative error near 0")


@pytest.mark.parametrize("make", ["sliced", "transposed", "expanded", "offset"])
def test_strides(make: str, device: str, backend: str) -> None:
    batch = make_batch(4, 6, 17, device=device)
    z = batch.logits
    strided = {
        "sliced": lambda: torch.randn(4, 9, 17, device=device)[:, :6].copy_(z),
        "transposed": lambda: z.transpose(0, 1).contiguous().transpose(0, 1),
        "expanded": lambda: z[:1].expand(4, 6, 17),
        "offset": lambda: torch.randn(4, 6, 40, device=device)[..., 5:22].copy_(z),
    }[make]()
    assert not strided.is_contiguous()
    ours = fp.cpo_loss(strided.requires_grad_(), batch.labels, backend=backend)
    (grad,) = torch.autograd.grad(ours.loss, strided)
    other, plain = run(fp.cpo_loss, strided.detach().contiguous(), batch.labels, backend=backend)
    assert torch.equal(ours.loss, other.loss)
    assert torch.equal(grad, plain)


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("keywords", [{}, *TRANSFORMS], ids=str)
def test_inplace_backward(sliced: bool, keywords: dict[str, float], device: str, backend: str) -> None:
    batch = make_batch(4, 6, 17, device=device)
    _, truth = run(fp.reference.cpo_loss, batch.logits.double(), batch.labels, **keywords)
    leaf = batch.logits.clone().requires_grad_()
    logits = (leaf * 1.0 if not sliced else torch.cat((leaf, leaf), 1)[:, :6]) + 0
    logits = logits if not sliced else torch.cat((logits, logits), 1)[:, :6]
    grads: list[torch.Tensor] = []
    logits.register_hook(grads.append)
    loss = fp.cpo_loss(logits, batch.labels, inplace_backward=True, **keywords, backend=backend).loss
    loss.backward(retain_graph=True)
    assert leaf.grad is not None
    assert_gradient(leaf.grad, truth)
    assert grads[0].data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="inplace_backward"):
        loss.backward()


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.bfloat16, (4, 32, 131_072)), (torch.float32, (2, 4, 1_000_003)), (torch.float64, (2, 4, 500_000))],
    ids=str,
)
def test_workspace(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """At most max(32 MiB, an eighth of the logits) beside the gradient, forward and backward."""
    batch = make_batch(*shape, dtype=dtype, mask="none")
    logits = batch.logits.requires_grad_()
    size = logits.numel() * logits.element_size()
    allowed = max(32 * 2**20, size // 8)

    def step() -> None:
        fp.cpo_loss(logits, batch.labels, softcap=30.0).loss.backward()

    assert peak_bytes(step) - size <= allowed
    with torch.no_grad():
        assert peak_bytes(lambda: fp.cpo_loss(logits, batch.labels)) <= allowed


def test_repeatable(device: str, backend: str) -> None:
    batch = make_batch(4, 7, 1003, device=device)
    first, second = (run(fp.cpo_loss, batch.logits, batch.labels, backend=backend) for _ in range(2))
    assert torch.equal(first[0].loss, second[0].loss)
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("objective", ["cpo", "dpo", "bco", "tokens"])
def test_gradcheck(objective: str) -> None:
    batch = make_batch(4, 4, 5, dtype=torch.float64, mask="some", scale=1.0)
    ref = reference_logps(4)
    desirable = torch.tensor([True, False, False, True])
    functions = {
        "cpo": lambda z: fp.cpo_loss(z, batch.labels, alpha=0.1, softcap=3.0).loss,
        "dpo": lambda z: fp.dpo_loss(z, batch.labels, ref, loss_type="ipo").loss,
        "bco": lambda z: fp.bco_loss(z, batch.labels, desirable, ref, delta=0.2).loss,
        "tokens": lambda z: fp.token_logps(z, batch.labels, temperature=0.5),
    }
    assert torch.autograd.gradcheck(functions[objective], (batch.logits.requires_grad_(),))


def test_upstream_gradient_and_retain_graph() -> None:
    batch = make_batch(4, 6, 17)
    logits = batch.logits.requires_grad_()
    loss = fp.cpo_loss(logits, batch.labels).loss
    (one,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * -3.7, logits, retain_graph=True)
    (zero,) = torch.autograd.grad(loss * 0, logits)
    assert_gradient(scaled, one.double() * -3.7, 1e-6)
    assert not zero.any()


def test_second_derivative_is_refused() -> None:
    batch = make_batch(4, 6, 17)
    logits = batch.logits.requires_grad_()
    for function in (fp.cpo_loss, fp.sequence_logps):
        output = function(logits, batch.labels)
        loss = output.loss if isinstance(output, fp.PairOutput) else output.sum()
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.sum().backward()


def test_bf16_loss_is_closer_than_scoring_in_bf16() -> None:
    """Loss error at most 1e-4 relative, and below that of log-softmax in bf16."""
    batch = make_batch(4, 32, 50_000, dtype=torch.bfloat16, mask="none")
    truth = fp.reference.cpo_loss(batch.logits.double(), batch.labels).loss
    ours = fp.cpo_loss(batch.logits, batch.labels).loss
    logps = batch.logits[:, :-1].log_softmax(-1).gather(-1, batch.labels[:, 1:, None])[..., 0].sum(1)
    delta = logps[:2] - logps[2:]
    eager = -torch.nn.functional.logsigmoid(0.1 * delta).mean() - logps[:2].sum() / (2 * 31)
    error, theirs = (abs(loss.double() - truth) / truth for loss in (ours, eager))
    assert error <= 1e-4
    assert error < theirs
