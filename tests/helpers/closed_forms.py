"""Every field of every objective in scalar arithmetic, and what the tests of the reference share."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import IGNORE, Batch, make_batch, reference_logps, run
from torch import Tensor

from fused_pref import reference
from fused_pref.losses.pair import CPO_LOSS_TYPES, DPO_LOSS_TYPES

FUNCTIONS = ["token_logps", "sequence_logps", "cpo_loss", "dpo_loss", "bco_loss", "kto_loss"]
OBJECTIVES = [
    *(("cpo_loss", {"loss_type": kind}) for kind in CPO_LOSS_TYPES),
    ("cpo_loss", {"loss_type": "hinge", "cpo_alpha": 0.0}),
    ("cpo_loss", {"alpha": 0.3, "nll_reduction": "sequence"}),
    *(("dpo_loss", {"loss_type": kind}) for kind in DPO_LOSS_TYPES),
    ("bco_loss", {}),
    ("bco_loss", {"reduction": "class_mean"}),
    ("kto_loss", {"kl": 1.5, "undesirable_weight": 1.3}),
    ("kto_loss", {"loss_type": "apo_zero_unpaired"}),
]
every_objective = pytest.mark.parametrize(("name", "keywords"), OBJECTIVES, ids=str)
TRANSFORMS = [{}, {"softcap": 2.5, "logit_scale": 1.7, "temperature": 0.6}, {"temperature": 3.0, "logit_scale": -0.5}]
LARGEST = torch.finfo(torch.bfloat16).max


def objective(name: str, batch: Batch, **keywords: Any) -> tuple[Any, Tensor]:
    """Output and gradient of any objective on a batch: every second sequence is desirable, the reference is fixed."""
    sequences = len(keywords["cu_seqlens"]) - 1 if "cu_seqlens" in keywords else len(batch.labels)
    desirable = torch.arange(sequences) % 2 == 0
    arguments = {"cpo_loss": (), "dpo_loss": (reference_logps(sequences),)}
    arguments["bco_loss"] = arguments["kto_loss"] = (desirable, reference_logps(sequences))
    return run(getattr(reference, name), batch.logits, batch.labels, *arguments[name], **keywords)


def double(*shape: int, **keywords: Any) -> Batch:
    return make_batch(*shape, dtype=torch.float64, **keywords)


def assert_same(ours: Any, truth: Any, tolerance: float = 1e-12) -> None:
    truth = torch.as_tensor(truth, dtype=ours.dtype)
    torch.testing.assert_close(ours.detach(), truth, rtol=tolerance, atol=tolerance, equal_nan=True)


# Closed forms in scalar arithmetic; the defaults are written out once more.


TOKENS: dict[str, Any] = {"shift": True, "softcap": None, "logit_scale": 1.0, "temperature": 1.0, "logits_mean": "all"}
PAIRS = {"beta": 0.1, "loss_type": "sigmoid", "label_smoothing": 0.0, "pair_normalizer": None, "token_normalizer": None}
CPO = {"cpo_alpha": 1.0, "simpo_gamma": 0.5, "alpha": 0.0, "nll_reduction": "token"}
BCO = {"beta": 0.1, "delta": 0.0, "sample_weight": None, "reduction": "mean"}
BCO |= {"sequence_normalizer": None, "class_normalizer": (None, None)}
KTO = {"beta": 0.1, "kl": 0.0, "loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0}
KTO |= {"sequence_normalizer": None}


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def mean(values: list[float], count: Any = None) -> float:
    count = len(values) if count is None else float(count)
    return sum(values) / count if count else 0.0


class Scored:
    """One sequence of lists: log-probs of its positions (None: not scored), their sum, z by position."""

    def __init__(self, rows: list[list[float]], labels: list[int], k: SimpleNamespace) -> None:
        def transform(x: float) -> float:
            x = x * k.logit_scale
            return (x if k.softcap is None else k.softcap * math.tanh(x / k.softcap)) / k.temperature

        rows = [[transform(x) for x in row] for row in rows]
        targets = [*labels[1:], IGNORE] if k.shift else labels
        self.logp: list[float | None] = [
            None if y == IGNORE else row[y] - math.log(sum(math.exp(x) for x in row))
            for row, y in zip(rows, targets, strict=True)
        ]
        self.scored = [logp for logp in self.logp if logp is not None]
        self.sum, self.length = sum(self.scored), max(len(self.scored), 1)
        covered = [k.logits_mean == "all" or logp is not None for logp in self.logp]
        self.z = [x for row, cover in zip(rows, covered, strict=True) if cover for x in row]


def score(batch: Batch, k: SimpleNamespace) -> list[Scored]:
    return [Scored(*both, k) for both in zip(batch.logits.tolist(), batch.labels.tolist(), strict=True)]


def z_means(sides: list[list[Scored]], k: SimpleNamespace) -> list[float | None]:
    return [None if k.logits_mean is None else mean([x for s in side for x in s.z]) for side in sides]


def pair_form(batch: Batch, ref: list[float] | None = None, **keywords: Any) -> list[Any]:
    """All fields of a PairOutput; ``ref`` makes it DPO."""
    k = SimpleNamespace(**{**TOKENS, **PAIRS, **CPO, **keywords})
    if k.loss_type == "alphapo":
        k.loss_type, k.cpo_alpha = "simpo", 0.0
    sequences, averaged = score(batch, k), k.loss_type in ("ipo", "simpo")
    logps = [s.sum / s.length if averaged else s.sum for s in sequences]
    entering = [(1 - math.exp(min(-k.alpha * x, 80))) / k.alpha if k.alpha else x for x in logps]
    rewards = [k.beta * x for x in entering]
    if ref is not None:
        entering = [(s.sum - r) / (s.length if averaged else 1) for s, r in zip(sequences, ref, strict=True)]
        rewards = [k.beta * (s.sum - r) for s, r in zip(sequences, ref, strict=True)]
    B, losses = len(logps) // 2, []
    for w, l in zip(entering[:B], entering[B:], strict=True):
        x = k.beta * (w - l) - (k.simpo_gamma if k.loss_type == "simpo" else 0)
        smooth = -(1 - k.label_smoothing) * log_sigmoid(x) - k.label_smoothing * log_sigmoid(-x)
        gap = max(0.0, 1 - x)
        others = {
            "hinge": gap,
            "ipo": (w - l - 0.5 / k.beta) ** 2,
        }
        losses.append(others.get(k.loss_type, smooth))
    nll = 0.0
    if k.cpo_alpha and ref is None:
        by_token = -mean([logp for s in sequences[:B] for logp in s.scored], k.token_normalizer)
        by_pair = -mean([s.sum for s in sequences[:B]], k.pair_normalizer)
        nll = by_token if k.nll_reduction == "token" else by_pair
    loss = mean(losses, k.pair_normalizer) + k.cpo_alpha * nll
    means = z_means([sequences[:B], sequences[B:]], k)
    return [loss, nll, logps[:B], logps[B:], rewards[:B], rewards[B:], *means]


def bco_form(batch: Batch, desirable: list[bool], ref: list[float], **keywords: Any) -> list[Any]:
    """All fields of a BCOOutput."""
    k = SimpleNamespace(**{**TOKENS, **BCO, **keywords})
    sequences, delta = score(batch, k), float(k.delta)
    rewards = [k.beta * (s.sum - r) for s, r in zip(sequences, ref, strict=True)]
    losses = [-log_sigmoid(r - delta if d else delta - r) for r, d in zip(rewards, desirable, strict=True)]
    if k.sample_weight is not None:
        losses = [w * x for w, x in zip(k.sample_weight.tolist(), losses, strict=True)]
    members = [[s for s, d in enumerate(desirable) if d == side] for side in (True, False)]
    loss = mean(losses, k.sequence_normalizer)
    if k.reduction == "class_mean":
        classes = zip(members, k.class_normalizer, strict=True)
        loss = sum(mean([losses[s] for s in side], count) for side, count in classes)
    means = z_means([[sequences[s] for s in side] for side in members], k)
    return [loss, delta, [s.sum for s in sequences], rewards, *means, *map(len, members)]


def kto_form(batch: Batch, desirable: list[bool], ref: list[float], **keywords: Any) -> list[Any]:
    """All fields of a KTOOutput."""
    k = SimpleNamespace(**{**TOKENS, **KTO, **keywords})
    sequences, kl = score(batch, k), float(k.kl)
    rewards = [k.beta * (s.sum - r) for s, r in zip(sequences, ref, strict=True)]
    shift = k.beta * kl if k.loss_type == "kto" else 0.0
    losses = [
        k.desirable_weight / (1 + math.exp(r - shift)) if d else k.undesirable_weight / (1 + math.exp(shift - r))
        for r, d in zip(rewards, desirable, strict=True)
    ]
    members = [[s for s, d in enumerate(desirable) if d == side] for side in (True, False)]
    means = z_means([[sequences[s] for s in side] for side in members], k)
    loss = mean(losses, k.sequence_normalizer)
    return [loss, kl, [s.sum for s in sequences], rewards, *means, *map(len, members)]


def assert_fields(output: Any, expected: list[Any]) -> None:
    for field, ours, truth in zip(output._fields, output, expected, strict=True):
        assert (ours is None) == (truth is None), field
        if truth is not None:
            assert_same(ours, truth)
            assert ours.requires_grad == (field == "loss"), field
