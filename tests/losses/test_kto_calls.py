"""Calls of KTO: products, metrics, modules, autocast, a gradient scaler, compilers."""

import copy
import pickle
from typing import Any

import pytest
import torch
from harness import Hidden, assert_gradient, make_batch, make_hidden, reference_logps, run_linear
from torch.utils.flop_counter import FlopCounterMode

import fused_pref as fp

DESIRABLE, REF = torch.tensor([True, False, False, True]), reference_logps(4)


def test_three_products() -> None:
    """The plan is ``grouped``: logits once, and one product for each gradient."""
    batch = make_hidden(4, 33, 64, 1031, mask="none")
    leaves = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    with FlopCounterMode(display=False) as counted:
        fp.linear_kto_loss(*leaves, batch.labels, DESIRABLE, REF, kl=torch.tensor(0.5)).loss.backward()
    assert counted.get_total_flops() / (2 * 4 * 32 * 64 * 1031) == pytest.approx(3.0)
    plan = fp.explain(hidden=64, vocab=1031, tokens=128, sequences=4, objective="kto", device="cpu").plan
    assert (plan.name, plan.products) == ("grouped", 3)


def test_metrics() -> None:
    """Those of BCO, with ``kl`` in place of ``delta``."""
    batch = make_batch(4, 5, 11)
    output = fp.kto_loss(batch.logits, batch.labels, DESIRABLE, REF, kl=torch.tensor(1.25))
    theirs = fp.bco_loss(batch.logits, batch.labels, DESIRABLE, REF, delta=1.25)
    metrics, others = output.metrics(), theirs.metrics()
    assert list(metrics) == ["kl" if name == "delta" else name for name in others]
    assert all(torch.equal(metrics[name], others.get(name, others["delta"])) for name in metrics)
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())
    assert output._fields == tuple("kl" if name == "delta" else name for name in theirs._fields)
    assert output._replace(loss=output.loss * 2).desirable is output.desirable


def test_modules_equal_functions() -> None:
    batch = make_hidden(4, 5, 8, 11)
    logits = make_batch(4, 5, 11)
    keywords: dict[str, Any] = {"beta": 0.3, "kl": 1.5, "undesirable_weight": 1.4, "logits_mean": None}
    for module, function, tensors in (
        (fp.KTOLoss, fp.kto_loss, (logits.logits, logits.labels, DESIRABLE, REF)),
        (fp.LinearKTOLoss, fp.linear_kto_loss, (batch.hidden, batch.weight, batch.labels, DESIRABLE, REF)),
    ):
        kept = module(**keywords)
        for given in ({}, {"kl": 0}, {"kl": torch.tensor(4.0), "sequence_normalizer": 9}):
            ours, theirs = kept(*tensors, **given), function(*tensors, **{**keywords, **given})
            assert type(ours) is fp.KTOOutput
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert "kl=1.5" in repr(kept)
        for copied in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
            assert copied(*tensors).loss == kept(*tensors).loss
        output = pickle.loads(pickle.dumps(kept(*tensors)))
        assert torch.equal(output.desirable, DESIRABLE)


def test_autocast(device: str, backend: str) -> None:
    """The value is that of tensors cast beforehand; gradients come back in each tensor's dtype."""
    batch = make_hidden(4, 5, 16, 37, device=device, bias=True)
    assert batch.bias is not None
    parts = [part.bfloat16() for part in (batch.hidden, batch.weight, batch.bias)]
    tensors, keywords = (DESIRABLE.to(device), REF.to(device)), {"kl": 0.5, "backend": backend}
    with torch.autocast(device, torch.bfloat16):
        ours, grads = run_linear(fp.linear_kto_loss, batch, *tensors, **keywords)
    truth, true_grads = run_linear(fp.linear_kto_loss, Hidden(*parts, batch.labels), *tensors, **keywords)
    torch.testing.assert_close(ours.loss, truth.loss)
    for mine, other in zip(grads, true_grads, strict=True):
        assert mine.dtype == torch.float32
        assert_gradient(mine, other.double(), 2**-6)


def test_float16_with_a_gradient_scaler(device: str, backend: str) -> None:
    """Gradients that float16 would lose arrive scaled by 2¹⁶ and exact to its rounding."""
    batch = make_hidden(4, 9, 32, 101, device=device, dtype=torch.float16, mask="none")
    tensors, scaler = (batch.labels, DESIRABLE.to(device), REF.to(device)), torch.amp.GradScaler(device)

    def gradients(function: Any, dtype: torch.dtype, **keywords: Any) -> Any:
        leaves = [part.detach().to(dtype).requires_grad_() for part in (batch.hidden, batch.weight)]
        loss = function(*leaves, *tensors, beta=1e-6, kl=0.5, **keywords).loss
        return torch.autograd.grad(scaler.scale(loss), leaves)

    ours = gradients(fp.linear_kto_loss, torch.float16, backend=backend)
    for mine, other in zip(ours, gradients(fp.reference.linear_kto_loss, torch.float64), strict=True):
        assert mine.dtype == torch.float16
        assert other.abs().mean() / 2**16 < 2**-24
        assert_gradient(mine, other, 1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("linear", [False, True])
def test_one_graph_for_every_kl(linear: bool) -> None:
    """With kl as a tensor, a compiled loss is one graph, compiled once."""
    torch._dynamo.reset()
    batch, logits = make_hidden(4, 5, 8, 11), make_batch(4, 5, 11)
    first, labels = (batch.hidden, batch.labels) if linear else (logits.logits, logits.labels)
    graphs: list[Any] = []

    def note(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    def loss(x: torch.Tensor, kl: torch.Tensor) -> torch.Tensor:
        if linear:
            return fp.linear_kto_loss(x, batch.weight, labels, DESIRABLE, REF, kl=kl, backend="torch").loss
        return fp.kto_loss(x, labels, DESIRABLE, REF, kl=kl, backend="torch").loss

    compiled = torch.compile(loss, fullgraph=True, backend=note)
    for value in (0.0, 1.5, 40.0):
        grads = []
        for function in (compiled, loss):
            leaf = first.clone().requires_grad_()
            function(leaf, torch.tensor(value)).backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads)
    assert len(graphs) == 1
    torch._dynamo.reset()
