"""Every DPO loss and mixtures of them: parity with the reference in float64, on both backends and through the head."""

import itertools
from typing import Any

import pytest
import torch
from harness import assert_linear_parity, assert_parity, make_batch, make_hidden, reference_logps, run
from torch import Tensor

import fused_pref as fp
from fused_pref.losses.pair import DPO_LOSS_TYPES, PAIR_LOSSES
from fused_pref.losses.pair_spec import DIVERGENCES

MPO: dict[str, Any] = {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)}
MIXTURES: list[dict[str, Any]] = [
    {**MPO, "delta": 0.3},
    {"loss_type": DPO_LOSS_TYPES, "label_smoothing": 0.2},
    {"loss_type": ("aot", "ipo", "aot_unpaired"), "loss_weights": (1.0, -0.5, 3.0), "label_smoothing": (0.3, 0.9, 0.0)},
    {"loss_type": ["exo_pair", "robust"], "label_smoothing": [0.8, 0.4], "loss_weights": [0.0, 2]},
    {"loss_type": ("sft", "sft"), "loss_weights": (1.0, 0.5), "token_normalizer": 7},
    {"loss_type": ("sigmoid_norm", "hinge"), "pair_normalizer": torch.tensor(5.0)},
    {"loss_type": ("ipo", "sft"), "loss_weights": (0.0, 0.0)},
]
REACHED = {name for name in DPO_LOSS_TYPES if name in PAIR_LOSSES and PAIR_LOSSES[name].divergence}
# Of TRL.
DIVERGING = ("sigmoid", "hinge", "ipo", "robust", "exo_pair", "discopop", "sigmoid_norm")
# Divergences and their orders: those that change a log-ratio, and the identity.
CHANGING = [("forward_kl", 0.5), ("js_divergence", 0.5), ("alpha_divergence", 0.5), ("alpha_divergence", 2)]
IDENTITY = [("reverse_kl", 0.5), ("alpha_divergence", 1 - 1e-7)]
# A change for every name, and every divergence for a name with sums and for one with averages.
DIVERGENT = [
    *((name, *change) for name, change in zip(DPO_LOSS_TYPES, itertools.cycle(CHANGING), strict=False)),
    *((name, *kind) for name in ("robust", "sigmoid_norm") for kind in CHANGING + IDENTITY),
]


def near_reference(logits: Tensor, labels: Tensor, **keywords: Any) -> Tensor:
    """Log-probs of a model that is not far: log-ratios of either sign, of a few nats."""
    logps = fp.reference.sequence_logps(logits.detach(), labels, **keywords).float()
    return logps + reference_logps(len(logps), str(labels.device)) + 15


@pytest.mark.parametrize("name", DPO_LOSS_TYPES)
def test_from_logits(name: str, device: str, backend: str) -> None:
    batch = make_batch(6, 5, 13, device=device)
    batch.labels[4] = -100
    ref = near_reference(batch.logits, batch.labels)
    keywords = {"loss_type": name, "label_smoothing": 0.2, "beta": 0.4, "backend": backend}
    assert_parity("dpo_loss", batch.logits, batch.labels, ref, **keywords)


@pytest.mark.parametrize("keywords", MIXTURES, ids=str)
def test_mixtures_from_packed_logits(keywords: dict[str, Any], device: str, backend: str) -> None:
    """Of all names: what enters a term is a sum of log-probs and a number, wherever they come from."""
    logits, labels, ends = make_batch(8, 6, 13, device=device).packed([5, 4, 0, 3, 6, 2, 3, 1])
    keywords = {"label_smoothing": 0.2, "beta": 0.4, "backend": backend, "logits_mean": None, **keywords}
    keywords["cu_seqlens"] = ends
    assert_parity("dpo_loss", logits, labels, near_reference(logits, labels, cu_seqlens=ends), **keywords)


@pytest.mark.parametrize("keywords", [*({"loss_type": name} for name in DPO_LOSS_TYPES), *MIXTURES], ids=str)
def test_through_the_head(keywords: dict[str, Any], device: str) -> None:
    """With one group, with a group for each pair, and without gradients of the weight."""
    batch = make_hidden(8, 6, 12, 40, bias=True, device=device)
    logits = batch.hidden @ batch.weight.T
    keywords = {"label_smoothing": 0.2, "beta": 0.4, **keywords}
    ref = near_reference(logits, batch.labels)
    for wanted in ("hwb", "h"):
        batch.wanted = wanted
        assert_linear_parity("linear_dpo_loss", batch, ref, **keywords)


@pytest.mark.parametrize("name", ["sigmoid_norm", "exo_pair", "aot"])
def test_in_16_bit(name: str, device: str, backend: str) -> None:
    """Sums of log-probs are wide, whatever the logits are: what a loss makes of them does not depend on that."""
    batch = make_batch(6, 5, 17, dtype=torch.bfloat16, device=device)
    ref = near_reference(batch.logits.float(), batch.labels)
    assert_parity("dpo_loss", batch.logits, batch.labels, ref, loss_type=name, label_smoothing=0.1, backend=backend)


@pytest.mark.parametrize(("name", "divergence", "order"), DIVERGENT)
def test_divergences(name: str, divergence: str, order: float, backend: str) -> None:
    """They reach the names that say so, and no others."""
    batch = make_batch(6, 3, 9)
    ref = near_reference(batch.logits, batch.labels)
    ref[:2] += torch.tensor([30.0, -30.0])
    keywords = {"loss_type": name, "label_smoothing": 0.1, "beta": 0.05, "backend": backend}
    divergent = {"f_divergence_type": divergence, "f_alpha_divergence_coef": order}
    ours = assert_parity("dpo_loss", batch.logits, batch.labels, ref, **keywords, **divergent)
    plain = fp.dpo_loss(batch.logits, batch.labels, ref, **keywords)
    assert torch.equal(ours.loss, plain.loss) == ((divergence, order) in IDENTITY or name not in REACHED)
    assert torch.equal(ours.chosen_rewards, plain.chosen_rewards)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_exponents_are_clamped(divergence: str, backend: str) -> None:
    batch = make_batch(4, 4, 9)
    ref = near_reference(batch.logits, batch.labels)
    ref[:2] += torch.tensor([200.0, -200.0])
    keywords = {"beta": 0.05, "backend": backend, "f_divergence_type": divergence, "f_alpha_divergence_coef": 0.5}
    assert_parity("dpo_loss", batch.logits, batch.labels, ref, **keywords)


def test_divergences_reach_the_names_of_trl() -> None:
    assert set(DIVERGING) <= REACHED
    assert {kind for kind, _ in CHANGING + IDENTITY} == {*DIVERGENCES}


@pytest.mark.parametrize("name", DPO_LOSS_TYPES)
def test_where_smoothing_acts(name: str, backend: str) -> None:
    batch = make_batch(2, 4, 9)
    ref = near_reference(batch.logits, batch.labels)

    def loss(epsilon: Any, **keywords: Any) -> Tensor:
        keywords = {"loss_type": name, "beta": 0.5, "backend": backend, **keywords}
        return fp.dpo_loss(batch.logits, batch.labels, ref, label_smoothing=epsilon, **keywords).loss

    acts = name in ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")
    low, high = loss(0.1), loss(0.3)
    assert torch.equal(low, high) != acts
    torch.testing.assert_close(loss((0.1, 0.3), loss_type=(name, name)), low + high)


def test_what_is_reported(device: str, backend: str) -> None:
    """Averages for ipo alone, an NLL that is not weighted, and δ beside the items."""
    batch = make_batch(6, 6, 11, device=device)
    ref = near_reference(batch.logits, batch.labels)

    def output(**keywords: Any) -> Any:
        return fp.dpo_loss(batch.logits, batch.labels, ref, backend=backend, **keywords)

    sums = fp.sequence_logps(batch.logits, batch.labels, backend=backend)
    averages = fp.sequence_logps(batch.logits, batch.labels, average=True, backend=backend)
    for loss_type, logps in (("ipo", averages), (("ipo",), averages), (("ipo", "sft"), sums), ("sigmoid_norm", sums)):
        reported = output(loss_type=loss_type)
        torch.testing.assert_close(torch.cat((reported.chosen_logps, reported.rejected_logps)), logps)
        torch.testing.assert_close(reported.chosen_rewards, 0.1 * (sums - ref)[:3])
        assert torch.equal(reported.lengths, (batch.labels[:, 1:] != -100).sum(1))
    nll = fp.cpo_loss(batch.logits, batch.labels, backend=backend).nll_loss
    mixed = output(loss_type=("sft", "hinge"), loss_weights=(0.3, 0.0))
    assert torch.equal(mixed.nll_loss, nll)
    torch.testing.assert_close(mixed.loss, 0.3 * nll)
    assert output(loss_type=("sft", "hinge"), loss_weights=(0.0, 1.0)).nll_loss == 0
    assert output().delta is None
    assert "delta" not in output().metrics()
    shifted = output(**MPO, delta=torch.tensor(0.25, device=device))
    assert shifted.delta == shifted.metrics()["delta"] == 0.25
    assert len(shifted) == len(output())


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"loss_type": "exo_pair"}, ValueError, r"label_smoothing must be a number in \(0, 1\) for exo_pair; got 0.0"),
    ({"loss_type": "robust", "label_smoothing": 0.5}, ValueError, r"in \[0, 0.5\) for robust; got 0.5"),
    ({"loss_type": ("sigmoid", "robust"), "label_smoothing": 0.6}, ValueError, "for robust; got 0.6"),
    ({"loss_type": ("sigmoid", "robust"), "label_smoothing": (0.6,)}, ValueError, "a sequence of 2 numbers"),
    ({"loss_type": "nca_pair", "label_smoothing": 1.0}, ValueError, r"in \[0, 1\); got 1"),
    ({"loss_type": ()}, ValueError, r"a sequence of names.*got \(\)"),
    ({"loss_type": ("sigmoid", "simpo")}, ValueError, "one of .*got 'simpo'"),
    ({"loss_weights": 1.0}, TypeError, "a sequence of 1 numbers.*got 1.0"),
    ({"loss_weights": (1.0, 2.0)}, ValueError, "a sequence of 1 numbers, one for each name"),
    ({"loss_weights": (float("inf"),)}, ValueError, "loss_weights must be a finite number; got inf"),
    ({"delta": 0.1}, ValueError, "delta needs loss_type='bco_pair'; got 0.1 with sigmoid"),
    ({"delta": fp.RewardShift()}, ValueError, "delta needs loss_type='bco_pair'; got RewardShift.*with sigmoid"),
    ({"delta": torch.tensor(0.0)}, ValueError, "delta needs loss_type='bco_pair'"),
    ({"loss_type": "bco_pair", "delta": float("nan")}, ValueError, "a RewardShift, .*got nan"),
    ({"loss_type": ("sft", "aot"), "pair_normalizer": 4}, ValueError, "pair_normalizer must be None with aot, .*got 4"),
    ({"discopop_tau": 0.0}, ValueError, "discopop_tau must be a finite number > 0; got 0.0"),
    ({"f_divergence_type": "kl"}, ValueError, "f_divergence_type must be one of .*got 'kl'"),
    ({"f_alpha_divergence_coef": float("nan")}, ValueError, "f_alpha_divergence_coef must be a finite number; got nan"),
]


@pytest.mark.parametrize(("keywords", "error", "text"), REFUSED, ids=str)
def test_refused(keywords: dict[str, Any], error: type[Exception], text: str) -> None:
    batch, hidden = make_batch(4, 4, 7), make_hidden(4, 4, 5, 7)
    with pytest.raises(error, match=text):
        fp.dpo_loss(batch.logits, batch.labels, torch.zeros(4), **keywords)
    with pytest.raises(error, match=text):
        fp.linear_dpo_loss(hidden.hidden, hidden.weight, hidden.labels, torch.zeros(4), **keywords)
    for module in (fp.DPOLoss, fp.LinearDPOLoss):
        with pytest.raises(error, match=text):
            module(**keywords)


def test_any_strides(backend: str) -> None:
    batch = make_batch(6, 5, 9)
    ref = near_reference(batch.logits, batch.labels).repeat_interleave(3)[::3]
    keywords = {"loss_type": DPO_LOSS_TYPES, "label_smoothing": 0.1, "backend": backend}
    assert_parity("dpo_loss", batch.logits, batch.labels, ref, **keywords)
    desirable = torch.tensor([True, False, False, True, True, False]).repeat_interleave(2)[::2]
    weight = torch.tensor([0.5, 9.0] * 6)[::2]
    assert_parity("bco_loss", batch.logits, batch.labels, desirable, ref, sample_weight=weight, backend=backend)


def test_zero_weights_are_not_computed(backend: str) -> None:
    """Not even where the term would be infinite."""
    batch = make_batch(4, 4, 7, mask="none")
    batch.labels[0, 2] = 3
    batch.logits[0, 1, 3] = -torch.inf
    keywords = {"loss_type": ("apo_zero", "sigmoid", "sft"), "logits_mean": None, "backend": backend}
    ref = torch.zeros(4)
    assert fp.dpo_loss(batch.logits, batch.labels, ref, **keywords).loss.isinf()
    output, grad = run(fp.dpo_loss, batch.logits, batch.labels, ref, **keywords, loss_weights=(1.0, 0.0, 0.0))
    assert output.loss.isfinite()
    assert grad[1:].isfinite().all()
