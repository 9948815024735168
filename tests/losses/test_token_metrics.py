"""Entropy, accuracy and log Σ p² of the scored tokens, by every plan and both backends."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import assert_values, make_hidden, reference_logps
from head_cases import DESIRABLE, only
from torch import Tensor

import fused_pref as fp

NAMES = ("entropy", "accuracy", "sum_sq")
BACKENDS = ("torch", "triton")
SOFTCAP = {"softcap": 3.0, "logit_scale": 1.7, "temperature": 0.6}
S, T, D, V = 4, 6, 8, 70


def coupled(sequences: fp.Sequences) -> Tensor:
    return sequences.logps.logsumexp(0)


# name: (arguments after the labels, keywords)
FUNCTIONS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "cpo_loss": ((), {}),
    "dpo_loss": ((reference_logps(S),), {"loss_type": ("sigmoid", "sft"), "token_weight": True}),
    "bco_loss": ((DESIRABLE[:S], reference_logps(S)), {}),
    "kto_loss": ((DESIRABLE[:S], reference_logps(S)), {}),
    "preference_loss": ((coupled,), {"unit": None}),
}


def batch(*, learnt: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a weight and labels, some of which are those of the largest logit."""
    made = make_hidden(S, T, D, V)
    hidden, weight, labels = made.hidden, made.weight * 3, made.labels
    if learnt:
        best = (hidden @ weight.T).argmax(-1)
        labels[:, 3] = best[:, 2].where(labels[:, 3] != -100, -100)
    labels[1] = -100
    return hidden, weight, labels


def evaluated(function: Callable[..., Any], hidden: Tensor, weight: Tensor, *args: Any, **keywords: Any) -> Any:
    """Output, and gradients of what it is a function of."""
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    tensors = leaves if function.__name__.startswith("linear_") else [leaves[0] @ leaves[1].T]
    output = function(*tensors, *args, **keywords)
    output.loss.backward()
    return output, [leaf.grad for leaf in leaves]


def assert_same(output: Any, truth: Any, tolerance: float = 2e-5) -> None:
    for name in NAMES:
        assert_values(getattr(output, name), getattr(truth, name), tolerance, name)
        assert not getattr(output, name).requires_grad
    theirs = truth.metrics()
    assert output.metrics().keys() == theirs.keys()
    for name in {"entropy", "mean_token_accuracy"} & set(theirs):
        assert_values(output.metrics()[name], theirs[name], tolerance, name)


@pytest.mark.parametrize("transform", [{}, SOFTCAP], ids=["plain", "softcap"])
@pytest.mark.parametrize("linear", [True, False], ids=["linear", "logits"])
@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "torch") for name in FUNCTIONS), ("cpo_loss", "triton"), ("kto_loss", "triton")]
)
def test_parity(name: str, backend: str, linear: bool, transform: dict[str, float]) -> None:
    """With the reference in float64; loss and gradients are bitwise those without metrics."""
    args, keywords = FUNCTIONS[name]
    hidden, weight, labels = batch()
    keywords = {**keywords, **transform}
    if keywords.pop("token_weight", False):
        keywords["token_weight"] = torch.rand(labels.shape)
    function = getattr(fp, f"linear_{name}" if linear else name)
    output, gradients = evaluated(
        function, hidden, weight, labels, *args, **keywords, backend=backend, token_metrics=True
    )
    plain, without = evaluated(function, hidden, weight, labels, *args, **keywords, backend=backend)
    assert plain.entropy is plain.accuracy is plain.sum_sq is None
    assert "entropy" not in plain.metrics()
    assert torch.equal(output.loss, plain.loss)
    assert all(map(torch.equal, gradients, without))
    exact = {key: value.double() if isinstance(value, Tensor) else value for key, value in keywords.items()}
    reference = getattr(fp.reference, f"linear_{name}")
    truth = reference(hidden.double(), weight.double(), labels, *args, **exact, token_metrics=True)
    assert_same(output, truth)
    assert output.accuracy.max() > 0
    assert output.entropy[1] == output.accuracy[1] == output.sum_sq[1] == 0
    has_pairs = name in ("cpo_loss", "dpo_loss")
    assert ("mean_token_accuracy" in output.metrics()) == has_pairs


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("small", "transform"), [(False, SOFTCAP), (True, {})], ids=["large, softcap", "small, plain"])
@pytest.mark.parametrize("plan", ["grouped", "vocab_major", "frozen_head", "logprob", "skipping"])
def test_plans(plan: str, small: bool, fused: bool, transform: dict[str, float]) -> None:
    hidden, weight, labels = batch()
    hidden.requires_grad_(plan != "logprob")
    weight.requires_grad_(plan not in ("logprob", "frozen_head"))
    keywords: dict[str, Any] = {**transform, "token_metrics": True}
    if plan == "skipping":
        keywords["skip_mass"] = 1e-3
    backend = "triton" if fused else "torch"
    with only(plan, small=small, fused=fused, least=2):
        output = fp.linear_cpo_loss(hidden, weight, labels, backend=backend, **keywords)
    truth = fp.reference.linear_cpo_loss(hidden.double(), weight.double(), labels, **keywords)
    assert_same(output, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("linear", [True, False], ids=["linear", "logits"])
def test_theorems(linear: bool, backend: str) -> None:
    """Equal logits: entropy log V, every label is right, Σ p² = 1/V. One certain token: 0, right, 0."""
    weight, labels = torch.zeros(V, D), torch.randint(0, V, (2, 3))
    hidden = torch.zeros(2, 3, D)
    tensors = (hidden, weight) if linear else (hidden @ weight.T,)
    loss = fp.linear_cpo_loss if linear else fp.cpo_loss
    output = loss(*tensors, labels, backend=backend, token_metrics=True)
    assert_values(output.entropy, torch.full((2,), math.log(V)), 1e-6)
    assert_values(output.sum_sq, torch.full((2,), -math.log(V)), 1e-6)
    assert output.accuracy.tolist() == [1.0, 1.0]

    hidden[..., 0], weight[5, 0] = 1.0, 50.0
    tensors = (hidden, weight) if linear else (hidden @ weight.T,)
    output = loss(*tensors, torch.tensor([[-100, 5, 5], [-100, 5, 6]]), backend=backend, token_metrics=True)
    # −log p of the certain token is (V − 1) e^(−50), and the others' part of the entropy 50 times that.
    assert_values(output.entropy, torch.zeros(2), 1e-18)
    assert (output.entropy >= 0).all()
    assert output.accuracy.tolist() == [1.0, 0.5]
    assert output.sum_sq.abs().max() < 1e-6
    assert output.metrics()["mean_token_accuracy"] == 1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_impossible_tokens(backend: str) -> None:
    """A masked-out vocabulary entry has no part; a label outside the vocabulary makes its own sequence NaN."""
    hidden, weight, labels = batch()
    logits = hidden @ weight.T
    logits[..., 10:40] = -torch.inf
    labels[labels >= 10] %= 10
    keywords: dict[str, Any] = {"logits_mean": None, "token_metrics": True}
    output = fp.cpo_loss(logits, labels, backend=backend, **keywords)
    assert_same(output, fp.reference.cpo_loss(logits.double(), labels, **keywords))
    kept = torch.cat((logits[..., :10], logits[..., 40:]), -1)
    assert_same(output, fp.reference.cpo_loss(kept.double(), labels, **keywords))
    labels[2, 4] = V
    output = fp.cpo_loss(logits, labels, backend=backend, **keywords)
    truth = fp.reference.cpo_loss(logits.double(), labels, **keywords)
    for name in NAMES:
        assert getattr(output, name).isnan().tolist() == getattr(truth, name).isnan().tolist()
        assert getattr(output, name).isnan().tolist() == [False, False, True, False]


def test_far_above_the_pivot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose later columns rise above what a fused product takes for its maximum, within its reach and beyond."""
    from fused_pref.ops.triton import exponentials

    monkeypatch.setattr(exponentials, "PROBE", 16)
    hidden, weight, labels = batch()
    hidden[..., 0] = 1.0
    for rise in (30.0, 39.0, 60.0):
        weight[20:60, 0] = rise
        hidden.requires_grad_()
        with only("grouped", fused=True):
            output = fp.linear_cpo_loss(hidden, weight.requires_grad_(), labels, backend="triton", token_metrics=True)
        hidden, weight = hidden.detach(), weight.detach()
        truth = fp.reference.linear_cpo_loss(hidden.double(), weight.double(), labels, token_metrics=True)
        assert_same(output, truth, 5e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bound", [None, 40])
def test_packed(backend: str, bound: int | None) -> None:
    hidden, weight, labels = batch()
    lengths = [6, 0, 4, 5]
    rows = [torch.cat([tensor[s, :n] for s, n in enumerate(lengths)]) for tensor in (hidden, labels)]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    keywords: dict[str, Any] = {"cu_seqlens": ends, "token_metrics": True, "max_valid_tokens": bound}
    output = fp.linear_cpo_loss(rows[0], weight, rows[1], backend=backend, **keywords)
    assert_same(output, fp.reference.linear_cpo_loss(rows[0].double(), weight.double(), rows[1], **keywords))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("linear", "loss_type"), [(True, "sigmoid"), (True, "aot"), (False, "sigmoid")], ids=["pairs", "batch", "logits"]
)
def test_compiled(linear: bool, loss_type: str) -> None:
    """Where a head's pairs are on their own, where they wait for the batch, and without a head."""
    hidden, weight, labels = batch()
    function = fp.linear_dpo_loss if linear else fp.dpo_loss

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(hidden: Tensor, weight: Tensor, ref: Tensor) -> tuple[Tensor, ...]:
        tensors = (hidden, weight) if linear else (hidden @ weight.T,)
        output = function(*tensors, labels, ref, loss_type=loss_type, token_metrics=True)
        return output.loss, output.entropy, output.accuracy, output.sum_sq

    ref = reference_logps(S)
    loss, *metrics = compiled(hidden.requires_grad_(), weight.requires_grad_(), ref)
    loss.backward()
    truth = fp.reference.linear_dpo_loss(
        hidden.double(), weight.double(), labels, ref, loss_type=loss_type, token_metrics=True
    )
    for name, value in zip(NAMES, metrics, strict=True):
        assert_values(value, getattr(truth, name), what=name)
