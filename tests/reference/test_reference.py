"""The reference against closed forms in scalar arithmetic: fields and gradients."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closed_forms import (
    TOKENS,
    TRANSFORMS,
    assert_fields,
    assert_same,
    bco_form,
    double,
    every_objective,
    objective,
    pair_form,
    score,
)
from harness import IGNORE, reference_logps, run

from fused_pref import reference
from fused_pref.losses.pair import CPO_LOSS_TYPES, DPO_LOSS_TYPES

DIVERGENT = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.6, "beta": 0.3}


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_log_probs(transform: dict[str, float], shift: bool) -> None:
    batch = double(4, 5, 6, mask="empty")
    batch.labels[0, :2] = IGNORE
    sequences = score(batch, SimpleNamespace(**{**TOKENS, "shift": shift, **transform}))
    tokens = reference.token_logps(batch.logits, batch.labels, shift=shift, **transform)
    assert_same(tokens, [[x or 0.0 for x in (s.logp[:-1] if shift else s.logp)] for s in sequences])
    keywords = {"shift": shift, **transform}
    assert_same(reference.sequence_logps(batch.logits, batch.labels, **keywords), [s.sum for s in sequences])
    average = reference.sequence_logps(batch.logits, batch.labels, average=True, **keywords)
    assert_same(average, [s.sum / s.length for s in sequences])


@pytest.mark.parametrize("empty", [[], [1, 3]], ids=str)
@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"label_smoothing": 0.2, "beta": 0.7, "cpo_alpha": 0.3},
        {"nll_reduction": "sequence", "cpo_alpha": 2.0},
        *({"loss_type": kind, "beta": 0.7} for kind in CPO_LOSS_TYPES),
        {"loss_type": "hinge", "beta": 3.0, "label_smoothing": 0.4, "cpo_alpha": 0.0},
        {"loss_type": "ipo", "beta": 0.5, "label_smoothing": 0.4, "logits_mean": "completion"},
        {"loss_type": "simpo", "beta": 2.0, "label_smoothing": 0.1, "simpo_gamma": 1.3},
        {"loss_type": "simpo", "nll_reduction": "sequence", "logits_mean": None},
        {"loss_type": "alphapo", "alpha": 0.25, "beta": 2.5},
        {"loss_type": "hinge", "alpha": -0.4, "beta": 0.8},
        {"loss_type": "ipo", "alpha": 0.5, "pair_normalizer": 7},
        {"alpha": 9.0, "beta": 1e-35},
        {"pair_normalizer": torch.tensor(3.0), "token_normalizer": torch.tensor(5)},
        {"pair_normalizer": 5, "nll_reduction": "sequence", "token_normalizer": 3, "shift": False},
        {"softcap": 2.5, "logit_scale": 1.7, "temperature": 0.6, "logits_mean": "completion"},
        {"softcap": 2.5, "logit_scale": 1.7, "temperature": 0.6},
    ],
    ids=str,
)
def test_cpo(keywords: dict[str, Any], empty: list[int]) -> None:
    batch = double(6, 5, 6)
    batch.labels[empty] = IGNORE
    output, _ = objective("cpo_loss", batch, **keywords)
    assert_fields(output, pair_form(batch, **keywords))


@pytest.mark.parametrize("empty", [[], [1, 3]], ids=str)
@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"label_smoothing": 0.2, "beta": 0.7, "logits_mean": "completion"},
        {"loss_type": "hinge", "beta": 1.5, "label_smoothing": 0.4},
        {"loss_type": "ipo", "beta": 0.5, "label_smoothing": 0.4},
        {"loss_type": "ipo", "pair_normalizer": torch.tensor(7), "token_normalizer": 2, "temperature": 2.0},
        *({"loss_type": kind, "beta": 0.7, "label_smoothing": 0.2} for kind in DPO_LOSS_TYPES),
        *({"loss_type": kind, **DIVERGENT, "label_smoothing": 0.1} for kind in ("robust", "exo_pair", "hinge")),
        *({"loss_type": kind, "f_divergence_type": "js_divergence"} for kind in ("ipo", "discopop", "sigmoid_norm")),
        {"f_divergence_type": "forward_kl", "beta": 0.01, "loss_weights": (2.0,)},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1 + 1e-7},
        {"loss_type": "bco_pair", "delta": 0.4, "pair_normalizer": 7},
        {"loss_type": "discopop", "discopop_tau": 2.0},
        {"loss_type": ("sft", "hinge", "nca_pair"), "loss_weights": (0.5, 0.0, -1.0), "token_normalizer": 5},
        {"loss_type": ("robust", "sigmoid", "aot"), "label_smoothing": (0.1, 0.7, 0.3), "loss_weights": (0.5, 2, 1)},
    ],
    ids=str,
)
def test_dpo(keywords: dict[str, Any], empty: list[int]) -> None:
    batch = double(6, 5, 6)
    batch.labels[empty] = IGNORE
    output, _ = objective("dpo_loss", batch, **keywords)
    assert_fields(output, pair_form(batch, reference_logps(6).tolist(), **keywords))


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"delta": 0.7, "beta": 0.6, "logits_mean": "completion"},
        {"delta": torch.tensor(-1.5), "reduction": "class_mean", "sample_weight": torch.arange(5.0)},
        {"sample_weight": torch.arange(5.0), "sequence_normalizer": torch.tensor(11), "logits_mean": None},
        {"reduction": "class_mean", "class_normalizer": (torch.tensor(9), 4.0), "shift": False},
        {"reduction": "class_mean", "class_normalizer": (2, 0), "softcap": 3.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("desirable", [[True, False, False, True, True], [True] * 5, [False] * 5], ids=str)
def test_bco(keywords: dict[str, Any], desirable: list[bool]) -> None:
    batch, ref = double(5, 5, 6), reference_logps(5)
    output, grad = run(reference.bco_loss, batch.logits, batch.labels, torch.tensor(desirable), ref, **keywords)
    assert_fields(output, bco_form(batch, desirable, ref.tolist(), **keywords))
    assert output.desirable.tolist() == desirable
    assert grad.isfinite().all()


@every_objective
def test_gradients(name: str, keywords: dict[str, Any]) -> None:
    """Finite differences: nothing is detached that should not be."""
    batch = double(4, 4, 5, scale=1.0)
    ref, desirable = reference_logps(4), torch.tensor([True, False, True, True])
    arguments = {"cpo_loss": (), "dpo_loss": (ref,)}.get(name, (desirable, ref))
    assert torch.autograd.gradcheck(
        lambda z: getattr(reference, name)(z, batch.labels, *arguments, softcap=3.0, **keywords).loss,
        (batch.logits.requires_grad_(),),
    )


def test_building_block_gradients() -> None:
    """∂logp/∂z is onehot − softmax where a token is scored, and divided by the length in an average."""
    batch = double(3, 4, 5)
    expected = F.one_hot(batch.labels[:, 1:].clamp(min=0), 5) - batch.logits[:, :-1].softmax(-1)
    expected = F.pad(expected * (batch.labels[:, 1:, None] != IGNORE), (0, 0, 0, 1))
    lengths = (batch.labels[:, 1:] != IGNORE).sum(1)[:, None, None]
    assert_same(run(reference.token_logps, batch.logits, batch.labels)[1], expected)
    assert_same(run(reference.sequence_logps, batch.logits, batch.labels)[1], expected)
    assert_same(run(reference.sequence_logps, batch.logits, batch.labels, average=True)[1], expected / lengths)
