"""Functions that a compiler does not look into: no ops in eager mode, and what autograd must know of changes."""

from typing import Any, NamedTuple

import pytest
import torch
from harness import make_batch, make_hidden, reference_logps
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fused_pref as fp
from fused_pref.losses.scores import Scores
from fused_pref.opaque import decode, encode, opaque
from fused_pref.ops.interface import PairSpec, PairTerm

DESIRABLE = torch.tensor([True, False, True, False])


class Halves(NamedTuple):
    first: Tensor | None
    second: Tensor | None


def _fake_halves(x: Tensor, first: bool, factor: float) -> Halves:
    return Halves(torch.empty_like(x) if first else None, None if first else torch.empty_like(x))


@opaque(fake=_fake_halves)
def halves_of_a_test(x: Tensor, first: bool, factor: float) -> Halves:
    return Halves(x * factor if first else None, None if first else x * factor)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", [True, False])
def test_none_among_results(first: bool) -> None:
    def step(x: Tensor) -> tuple[Any, Tensor]:
        found = halves_of_a_test(x, first, 3.0)
        return type(found).__name__, found.first if found.second is None else found.second

    x = torch.ones(2)
    for name, value in (step(x), torch.compile(step, fullgraph=True, backend="aot_eager")(x)):
        assert name == "Halves"
        assert value.tolist() == [3.0, 3.0]


def test_constants_travel_as_text() -> None:
    spec = PairSpec((PairTerm("simpo", 0.5), PairTerm("aot", matched=True)), beta=1 / 3)
    x, y, tensors = torch.ones(2), torch.zeros(1), []
    value = (spec, Scores(x, y, None, None), torch.bfloat16, frozenset({"hidden"}), (-1, None, "all", True))
    text = encode(value, tensors)
    assert tensors == [x, y]
    assert decode(text, tensors) == value


class Ops(TorchDispatchMode):
    """The library's own ops that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names += [str(func)] if func.namespace == "fused_pref" else []
        return func(*args, **(kwargs or {}))


def test_eager_calls_dispatch_no_op(kernel_device: str) -> None:
    batch, ref = make_hidden(4, 6, 8, 17, device=kernel_device), reference_logps(4).to(kernel_device)
    leaves, shift = (batch.hidden.requires_grad_(), batch.weight.requires_grad_()), fp.RewardShift().to(kernel_device)
    desirable = DESIRABLE.to(kernel_device)
    with Ops() as ops:
        fp.linear_bco_loss(*leaves, batch.labels, desirable, ref, delta=shift, backend="triton").loss.backward()
        fp.cpo_loss(leaves[0], batch.labels.clamp(max=7), backend="triton").loss.backward()
    assert ops.names == []


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autograd_knows_what_was_changed(backend: str, kernel_device: str) -> None:
    batch, ref = make_batch(4, 6, 17, device=kernel_device), reference_logps(4).to(kernel_device)
    shift, x = fp.RewardShift().to(kernel_device), batch.logits.requires_grad_()
    logits = x * 1.0
    squares, scaled = (logits**2).sum(), (x.double() * shift.mean[0]).sum()
    options: Any = {"backend": backend, "inplace_backward": True, "delta": shift}
    fp.bco_loss(logits, batch.labels, DESIRABLE.to(kernel_device), ref, **options).loss.backward(retain_graph=True)
    for other in (squares, scaled):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            other.backward()


def test_tensors_without_values() -> None:
    """Functions of fake tensors are ops as in a graph, within their mode and outside of it."""
    with FakeTensorMode() as mode:
        logits, labels = torch.randn(4, 5, 9, requires_grad=True), torch.randint(0, 9, (4, 5))
        fp.cpo_loss(logits, labels).loss.backward()
    assert logits.grad is not None
    assert logits.grad.shape == (4, 5, 9)
    assert fp.token_logps(logits, labels).shape == (4, 4)
    with mode:
        total = fp.token_logps(logits, labels).sum()
    total.backward()


def test_a_trace_holds_for_other_labels() -> None:
    """With more scored tokens than those of the traced batch."""
    batch, more = make_batch(4, 5, 9, mask="some"), make_batch(4, 5, 9, mask="none", seed=1)
    graph = make_fx(lambda logits, labels: fp.cpo_loss(logits, labels, backend="torch").loss)
    traced = graph(batch.logits, batch.labels)
    assert torch.equal(traced(more.logits, more.labels), fp.cpo_loss(more.logits, more.labels, backend="torch").loss)
