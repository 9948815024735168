"""Objectives of the user's: the same numbers as named ones and the specification, by every way, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import (
    IGNORE,
    assert_linear_parity,
    assert_parity,
    make_batch,
    make_hidden,
    reference_logps,
    run_linear,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fused_pref as fp
from fused_pref.head.plans import planner
from fused_pref.head.plans.grouped import Grouped
from fused_pref.head.plans.problem import Plan, Problem

BETA = 0.1


def sigmoid(chosen: fp.Sequences, rejected: fp.Sequences) -> Tensor:
    return -F.logsigmoid(BETA * (chosen.logps - rejected.logps))


def dpo(chosen: fp.Sequences, rejected: fp.Sequences) -> Tensor:
    assert chosen.ref_logps is not None
    assert rejected.ref_logps is not None
    return -F.logsigmoid(BETA * ((chosen.logps - chosen.ref_logps) - (rejected.logps - rejected.ref_logps)))


def margins(chosen: fp.Sequences, rejected: fp.Sequences, margin: Tensor, scale: Tensor) -> Tensor:
    """With a tensor of pairs and a 0-d one, averaged log-probs, and slopes of their own for both sides."""
    return F.softplus(scale * (rejected.average - chosen.average + margin)) + chosen.logps.square() * 1e-3


def single(sequences: fp.Sequences, sign: Tensor) -> Tensor:
    return (F.softplus(-sign * BETA * (sequences.logps + 20)) * sequences.lengths).float()


def coupled(sequences: fp.Sequences, weight: Tensor) -> Tensor:
    """A softmax over the batch, with a tensor that has no entry a unit."""
    return -(torch.log_softmax(BETA * sequences.average, 0) * weight[: len(sequences.logps)]).sum()


PER_PAIR, PER_SEQUENCE = torch.linspace(-1, 1, 4), torch.tensor([1.0, -1.0] * 4)
# Name: unit, function, tensors, whether there are reference log-probs.
OWN: dict[str, tuple[int | None, Callable[..., Tensor], tuple[Tensor, ...], bool]] = {
    "sigmoid": (2, sigmoid, (), False),
    "dpo": (2, dpo, (), True),
    "margins": (2, margins, (PER_PAIR, torch.tensor(0.7)), False),
    "single": (1, single, (PER_SEQUENCE,), False),
    "coupled": (None, coupled, (torch.linspace(0, 1, 9),), False),
}


def keywords_of(name: str, device: str) -> tuple[list[Any], dict[str, Any]]:
    unit, function, tensors, refs = OWN[name]
    keywords: dict[str, Any] = {"unit": unit}
    if refs:
        keywords["ref_logps"] = reference_logps(8, device)
    return [function, *(tensor.to(device) for tensor in tensors)], keywords


@pytest.mark.parametrize(("packed", "weighted"), [(False, False), (True, True)], ids=["padded", "packed, weighted"])
@pytest.mark.parametrize("name", OWN)
def test_from_logits(name: str, packed: bool, weighted: bool, device: str, backend: str) -> None:
    batch = make_batch(8, 5, 19, device=device, mask="empty")
    arguments, keywords = keywords_of(name, device)
    logits, labels = batch.logits, batch.labels
    if packed:
        logits, labels, keywords["cu_seqlens"] = batch.packed([5, 3, 4, 5, 0, 2, 5, 4])
    if weighted:
        keywords["token_weight"] = torch.rand(labels.shape, device=device) + 0.5
    assert_parity("preference_loss", logits, labels, *arguments, backend=backend, **keywords)


@pytest.mark.parametrize(
    ("wanted", "dtype", "budget"),
    [
        ("hwb", torch.float32, None),
        ("hwb", torch.float32, 33_000),
        ("h", torch.float32, 33_000),
        ("", torch.float32, None),
        ("hwb", torch.bfloat16, None),
        ("h", torch.bfloat16, 33_000),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", OWN)
def test_linear(name: str, wanted: str, dtype: torch.dtype, budget: int | None, device: str, backend: str) -> None:
    batch = make_hidden(8, 5, 12, 29, dtype=dtype, device=device, bias=True, mask="empty")
    batch.wanted = wanted
    arguments, keywords = keywords_of(name, device)
    keywords |= {"token_weight": torch.rand(8, 5, device=device) + 0.5, "memory_budget": budget}
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates where a GPU rounds to bfloat16")
    assert_linear_parity("linear_preference_loss", batch, *arguments, backend=backend, **keywords)


@pytest.mark.parametrize("linear", [False, True])
def test_the_named_objective_is_the_same(linear: bool, device: str, backend: str) -> None:
    if linear:
        batch = make_hidden(8, 6, 12, 29, device=device, bias=True)
        ours, own = run_linear(fp.linear_preference_loss, batch, sigmoid, backend=backend)
        named, theirs = run_linear(fp.linear_cpo_loss, batch, cpo_alpha=0.0, beta=BETA, backend=backend)
    else:
        plain = make_batch(8, 6, 29, device=device)
        leaves = [plain.logits.clone().requires_grad_() for _ in range(2)]
        ours = fp.preference_loss(leaves[0], plain.labels, sigmoid, backend=backend)
        named = fp.cpo_loss(leaves[1], plain.labels, cpo_alpha=0.0, beta=BETA, backend=backend)
        ours.loss.backward(), named.loss.backward()
        own, theirs = [leaves[0].grad], [leaves[1].grad]
    torch.testing.assert_close(ours.loss, named.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.logps, torch.cat((named.chosen_logps, named.rejected_logps)), rtol=0, atol=0)
    for mine, other in zip(own, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-8)


def test_groups_see_their_own_units(device: str) -> None:
    """One pair a group: tensors are cut, refs and lengths too; the result is that of one group."""
    batch = make_hidden(8, 5, 12, 290, device=device)
    batch.wanted = "hw"
    calls: list[int] = []

    def noted(chosen: fp.Sequences, rejected: fp.Sequences, margin: Tensor, scale: Tensor) -> Tensor:
        assert len(chosen.logps) == len(rejected.logps) == len(chosen.lengths) == len(margin)
        assert chosen.ref_logps is not None
        assert len(chosen.ref_logps) == len(margin)
        assert scale.dim() == 0
        calls.append(len(margin))
        return margins(chosen, rejected, margin, scale) + 0.01 * chosen.ref_logps

    arguments = (noted, PER_PAIR.to(device), torch.tensor(0.7, device=device))
    keywords = {"ref_logps": reference_logps(8, device), "backend": "torch"}
    whole, expected = run_linear(fp.linear_preference_loss, batch, *arguments, **keywords)
    assert calls == [4]
    calls.clear()

    def smallest_groups(problem: Problem) -> Plan:
        return max((plan.fit(problem) for plan in Grouped.candidates(problem)), key=lambda plan: len(plan.bounds))

    with planner.planning(smallest_groups):
        cut, found = run_linear(fp.linear_preference_loss, batch, *arguments, **keywords)
    assert calls == [1, 1, 1, 1]
    for mine, other in zip((*whole, *expected[:2]), (*cut, *found[:2]), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "most"), [("margins", 3.0), ("single", 3.0), ("coupled", 4.0)])
def test_products(name: str, most: float) -> None:
    batch = make_hidden(8, 12, 32, 512, mask="none")
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    arguments, keywords = keywords_of(name, "cpu")
    with FlopCounterMode(display=False) as counter:
        fp.linear_preference_loss(
            hidden, weight, batch.labels, *arguments, logits_mean=None, backend="torch", **keywords
        ).loss.backward()
    products = counter.get_total_flops() / (2 * 8 * 11 * 32 * 512)
    assert products == pytest.approx(most, rel=0.02) if most == 3.0 else products <= most * 1.02


def test_normalizers_make_microbatches_one_batch(device: str, backend: str) -> None:
    batch = make_hidden(8, 5, 12, 29, device=device)
    batch.wanted = "hw"
    _, whole = run_linear(fp.linear_preference_loss, batch, sigmoid, backend=backend)
    leaves = [tensor.detach().requires_grad_() for tensor in (batch.hidden, batch.weight)]
    for number in (4, torch.tensor(4.0, device=device)):
        for pairs in (slice(0, 1), slice(1, 4)):
            rows = torch.cat([torch.arange(8).view(2, 4)[side, pairs] for side in (0, 1)]).to(device)
            part = fp.linear_preference_loss(
                leaves[0][rows], leaves[1], batch.labels[rows], sigmoid, normalizer=number, backend=backend
            )
            part.loss.backward()
    for leaf, truth in zip(leaves, whole, strict=False):
        torch.testing.assert_close(leaf.grad / 2, truth, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("unit", [2, 1, None])
def test_nothing_to_score(unit: int | None, device: str, backend: str) -> None:
    def unreached(*arguments: Any) -> Tensor:
        raise AssertionError("called without a sequence")

    batch = make_hidden(0, 5, 12, 29, device=device)
    output, gradients = run_linear(fp.linear_preference_loss, batch, unreached, unit=unit, backend=backend)
    assert output.loss == 0
    assert all((gradient == 0).all() for gradient in gradients if gradient is not None)
    logits = make_batch(0, 5, 19, device=device).logits.requires_grad_()
    fp.preference_loss(logits, batch.labels, unreached, unit=unit, backend=backend).loss.backward()


def test_nan_stays_in_its_unit(device: str, backend: str) -> None:
    batch = make_hidden(8, 5, 12, 29, device=device)
    batch.hidden[1] = torch.nan
    batch.wanted = "h"
    output, (dh, *_) = run_linear(fp.linear_preference_loss, batch, sigmoid, backend=backend)
    assert output.loss.isnan()
    assert output.losses.isnan().tolist() == [False, True, False, False]
    clean = torch.tensor([0, 2, 3, 4, 6, 7], device=device)
    assert dh[clean].isfinite().all()
    assert dh[1].isnan().any()


def test_half_precision_and_a_scaler(device: str) -> None:
    batch = make_hidden(8, 5, 16, 29, device=device)
    seen: list[Any] = []

    def noted(chosen: fp.Sequences, rejected: fp.Sequences) -> Tensor:
        seen.append((chosen.logps.dtype, torch.is_autocast_enabled(device)))
        return sigmoid(chosen, rejected)

    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        output = fp.linear_preference_loss(hidden, weight, batch.labels, noted, backend="torch")
    (output.loss * 2.0**16).backward()
    assert seen == [(torch.float64, False)]
    _, truth = run_linear(fp.reference.linear_preference_loss, make_hidden(8, 5, 16, 29, device=device), sigmoid)
    assert weight.grad is not None
    assert ((weight.grad / 2**16 - truth[1]).norm() / truth[1].norm()) < 2e-2


def test_compiled(device: str) -> None:
    batch = make_hidden(8, 5, 12, 29, device=device)
    batch.wanted = "hw"

    def step(hidden: Tensor, weight: Tensor, labels: Tensor, **keywords: Any) -> Any:
        return fp.linear_preference_loss(hidden, weight, labels, sigmoid, backend="torch", **keywords)

    expected, truth = run_linear(step, batch)
    torch._dynamo.reset()
    found, gradients = run_linear(torch.compile(step, backend="eager"), batch)
    assert torch.equal(found.loss, expected.loss)
    assert all(map(torch.equal, gradients[:2], truth[:2]))


def test_modules() -> None:
    batch = make_hidden(8, 5, 12, 29)
    logits = batch.hidden @ batch.weight.T

    class Margin(torch.nn.Module):
        def forward(self, chosen: fp.Sequences, rejected: fp.Sequences, margin: Tensor) -> Tensor:
            return F.softplus(rejected.logps - chosen.logps + margin)

    linear, plain = fp.LinearPreferenceLoss(Margin(), normalizer=3.0), fp.PreferenceLoss(Margin(), normalizer=3.0)
    assert isinstance(linear.objective, torch.nn.Module)
    first = linear(batch.hidden, batch.weight, batch.labels, PER_PAIR)
    second = plain(logits, batch.labels, PER_PAIR)
    torch.testing.assert_close(first.loss, second.loss)
    torch.testing.assert_close(first.loss, first.losses.sum() / 3)
    assert first.metrics().keys() == {"logps", "lengths", "logits"}
    weight = torch.zeros(8, 5)
    assert (linear(batch.hidden, batch.weight, batch.labels, PER_PAIR, token_weight=weight).logps == 0).all()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no function": ({"objective": 3}, "objective must be a function of Sequences; got 3"),
    "shape": (
        {"objective": lambda c, r: c.logps.sum()},
        r"the losses of objective must be \(b,\), one a pair = \(4,\)",
    ),
    "one a sequence": ({"objective": lambda s: s.logps[1:], "unit": 1}, r"must be \(s,\), one a sequence = \(8,\)"),
    "a loss each": (
        {"objective": lambda s: s.logps, "unit": None},
        r"the losses of objective must be \(\) on cpu; got",
    ),
    "no tensor": ({"objective": lambda c, r: 1.0}, r"the losses of objective must be a floating tensor"),
    "integers": ({"objective": lambda c, r: c.lengths}, r"the losses of objective must be a floating tensor"),
    "no gradient": ({"objective": lambda c, r: c.logps.detach()}, "got losses without a gradient"),
    "unit": ({"unit": 3}, r"unit must be 2 \(pairs\), 1 \(sequences\) or None \(the batch\); got 3"),
    "a flag": ({"unit": True}, "unit must be 2"),
    "normalizer": ({"unit": None, "normalizer": 4}, "normalizer must be None with unit=None"),
    "no number": ({"normalizer": 0}, "normalizer must be a finite number or 0-d tensor > 0; got 0"),
    "refs": ({"ref_logps": torch.zeros(4)}, r"ref_logps must be \(S,\) = \(8,\)"),
    "weights": ({"token_weight": torch.ones(8, 4)}, r"token_weight must be \(S, T\) = \(8, 5\)"),
    "whole weights": ({"token_weight": torch.ones(8, 5).long()}, "token_weight must be a float32 or"),
    "units": ({"tensors": (torch.ones(8),)}, r"tensors\[0\] must be \(units, ...\) with units = 4, or \(\)"),
    "a list": ({"tensors": ([1.0],)}, r"tensors\[0\] must be"),
    "trained": ({"tensors": (torch.tensor(1.0), torch.ones(4, requires_grad=True))}, r"tensors\[1\] must not require"),
}


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, linear: bool) -> None:
    given, message = REFUSED[name]
    given = dict(given)
    batch = make_hidden(8, 5, 12, 29)
    objective, tensors = given.pop("objective", lambda *arguments: sigmoid(*arguments[:2])), given.pop("tensors", ())
    function = fp.linear_preference_loss if linear else fp.preference_loss
    leaf = (batch.hidden if linear else batch.hidden @ batch.weight.T).requires_grad_()
    with pytest.raises((ValueError, TypeError), match=message):
        function(leaf, *([batch.weight] if linear else []), batch.labels, objective, *tensors, **given)


def test_odd_sequences_are_no_pairs() -> None:
    batch = make_batch(7, 5, 19)
    with pytest.raises(ValueError, match="labels must hold S = 2B sequences"):
        fp.preference_loss(batch.logits, batch.labels, sigmoid)
    fp.preference_loss(batch.logits, batch.labels, single, torch.ones(7), unit=1)


def test_checks() -> None:
    """What only checks look for: losses that depend on other units, and gradients that would be dropped."""
    batch = make_hidden(8, 5, 12, 29)
    hidden, factor = batch.hidden.requires_grad_(), torch.tensor(2.0, requires_grad=True)

    def looks(chosen: fp.Sequences, rejected: fp.Sequences) -> Tensor:
        losses = sigmoid(chosen, rejected)
        return losses - losses.mean()

    def closes_over(chosen: fp.Sequences, rejected: fp.Sequences) -> Tensor:
        return sigmoid(chosen, rejected) * factor.exp()

    for objective, message in ((looks, "depends on it alone"), (closes_over, "would be dropped")):
        fp.linear_preference_loss(hidden, batch.weight, batch.labels, objective)
        with fp.checks(), pytest.raises(ValueError, match=message):
            fp.linear_preference_loss(hidden, batch.weight, batch.labels, objective)
    with fp.checks():
        fp.linear_preference_loss(hidden, batch.weight, batch.labels, sigmoid)
    assert factor.grad is None


NAMED: dict[str, dict[str, Any]] = {
    "cpo_loss": {"loss_type": "simpo"},
    "dpo_loss": {"loss_type": "ipo"},
    "bco_loss": {"reduction": "class_mean"},
    "kto_loss": {"kl": 0.5},
}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", NAMED)
def test_token_weights_of_named_objectives(name: str, packed: bool, device: str, backend: str) -> None:
    keywords = {**NAMED[name], "backend": backend}
    extra: list[Any] = [] if name == "cpo_loss" else [reference_logps(6, device)]
    if name in ("bco_loss", "kto_loss"):
        extra = [torch.tensor([True, False] * 3, device=device), *extra]
    batch = make_batch(6, 5, 19, device=device)
    weight = torch.rand(6, 5, device=device).where(torch.rand(6, 5, device=device) > 0.3, 0)
    logits, labels = batch.logits, batch.labels
    if packed:
        lengths = [5, 3, 4, 5, 2, 5]
        logits, labels, keywords["cu_seqlens"] = batch.packed(lengths)
        weight = torch.cat([row[:n] for row, n in zip(weight, lengths, strict=True)])
    assert_parity(name, logits, labels, *extra, token_weight=weight, **keywords)
    head = make_hidden(6, 5, 12, 29, device=device, bias=True)
    if not packed:
        keywords["max_valid_tokens"] = 28
        assert_linear_parity(f"linear_{name}", head, *extra, token_weight=weight, **keywords)


def test_a_token_of_weight_0_contributes_nothing(device: str, backend: str) -> None:
    """Also where its log-prob is −∞."""
    batch = make_batch(4, 5, 19, device=device, mask="none")
    weight = torch.ones(4, 5, device=device)
    weight[1, 2] = 0
    batch.logits[1, 1, batch.labels[1, 2]] = -torch.inf
    masked = batch.labels.clone()
    masked[1, 2] = IGNORE
    leaves = [batch.logits.clone().requires_grad_() for _ in range(2)]
    keywords: dict[str, Any] = {"cpo_alpha": 0.0, "backend": backend, "logits_mean": None}
    first = fp.cpo_loss(leaves[0], batch.labels, token_weight=weight, **keywords)
    second = fp.cpo_loss(leaves[1], masked, **keywords)
    first.loss.backward(), second.loss.backward()
    torch.testing.assert_close(first.loss, second.loss)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
