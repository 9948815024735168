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
    *(
        ("dpo_loss", {"loss_type": kind} | ({"label_smoothing": 0.1} if kind == "exo_pair" else {}))
        for kind in DPO_LOSS_TYPES
    ),
    ("dpo_loss", {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0), "delta": 0.3}),
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
DPO: dict[str, Any] = {"loss_weights": None, "delta": 0.0, "discopop_tau": 0.05, "f_divergence_type": "reverse_kl"}
DPO |= {"f_alpha_divergence_coef": 1.0}
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
    if ref is not None:
        return dpo_form(batch, ref, **keywords)
    k = SimpleNamespace(**{**TOKENS, **PAIRS, **CPO, **keywords})
    if k.loss_type == "alphapo":
        k.loss_type, k.cpo_alpha = "simpo", 0.0
    sequences, averaged = score(batch, k), k.loss_type in ("ipo", "simpo")
    logps = [s.sum / s.length if averaged else s.sum for s in sequences]
    entering = [(1 - math.exp(min(-k.alpha * x, 80))) / k.alpha if k.alpha else x for x in logps]
    rewards = [k.beta * x for x in entering]
    B, losses = len(logps) // 2, []
    for w, l in zip(entering[:B], entering[B:], strict=True):
        x = k.beta * (w - l) - (k.simpo_gamma if k.loss_type == "simpo" else 0)
        gap = max(0.0, 1 - x)
        others = {
            "hinge": gap,
            "ipo": (w - l - 0.5 / k.beta) ** 2,
        }
        losses.append(others.get(k.loss_type, smoothed(x, k.label_smoothing)))
    nll = 0.0
    if k.cpo_alpha:
        by_token = -mean([logp for s in sequences[:B] for logp in s.scored], k.token_normalizer)
        by_pair = -mean([s.sum for s in sequences[:B]], k.pair_normalizer)
        nll = by_token if k.nll_reduction == "token" else by_pair
    loss = mean(losses, k.pair_normalizer) + k.cpo_alpha * nll
    means = z_means([sequences[:B], sequences[B:]], k)
    return [loss, nll, logps[:B], logps[B:], rewards[:B], rewards[B:], *means]


def smoothed(x: float, epsilon: float) -> float:
    return -(1 - epsilon) * log_sigmoid(x) - epsilon * log_sigmoid(-x)


def dpo_form(batch: Batch, ref: list[float], **keywords: Any) -> list[Any]:
    """All fields of DPO's PairOutput."""
    k = SimpleNamespace(**{**TOKENS, **PAIRS, **DPO, **keywords})
    sequences, B = score(batch, k), len(ref) // 2
    sums, lengths = [s.sum for s in sequences], [s.length for s in sequences]
    names = (k.loss_type,) if isinstance(k.loss_type, str) else k.loss_type
    loss = nll = 0.0
    for n, name in enumerate(names):
        weight = 1.0 if k.loss_weights is None else k.loss_weights[n]
        epsilon = k.label_smoothing[n] if isinstance(k.label_smoothing, tuple) else k.label_smoothing
        if name == "sft":
            nll = -mean([logp for s in sequences[:B] for logp in s.scored], k.token_normalizer)
            loss += weight * nll
        elif weight:
            losses = dpo_losses(name, sums, lengths, ref, epsilon, k)
            loss += weight * mean(losses, k.pair_normalizer)
    logps = [x / n if names == ("ipo",) else x for x, n in zip(sums, lengths, strict=True)]
    rewards = [k.beta * (x - r) for x, r in zip(sums, ref, strict=True)]
    means = z_means([sequences[:B], sequences[B:]], k)
    return [loss, nll, logps[:B], logps[B:], rewards[:B], rewards[B:], *means]


def dpo_losses(
    name: str, sums: list[float], lengths: list[int], ref: list[float], epsilon: float, k: SimpleNamespace
) -> list[float]:
    """DPO's loss of every pair (aot: of every pair that sorting makes)."""
    B, ratios = len(ref) // 2, [x - r for x, r in zip(sums, ref, strict=True)]
    if name == "aot":
        ours, theirs = (sorted(x - y for x, y in zip(v[:B], v[B:], strict=True)) for v in (sums, ref))
        return [smoothed(k.beta * (x - y), epsilon) for x, y in zip(ours, theirs, strict=True)]
    if name == "aot_unpaired":
        both = zip(sorted(ratios[:B]), sorted(ratios[B:]), strict=True)
        return [smoothed(k.beta * (x - y), epsilon) for x, y in both]
    scores = [divergence(x, k) for x in ratios]
    if name in ("ipo", "sigmoid_norm"):
        scores = [x / n for x, n in zip(scores, lengths, strict=True)]
    losses = []
    for w, l, s_w, s_l in zip(ratios[:B], ratios[B:], scores[:B], scores[B:], strict=True):
        x, chosen, rejected, half = k.beta * (s_w - s_l), k.beta * w, k.beta * l, 1 / (2 * k.beta)
        q, m, tau = logistic(x), logistic(x / k.discopop_tau), k.discopop_tau
        forms = {
            "sigmoid": lambda x=x: smoothed(x, epsilon),
            "hinge": lambda x=x: max(0.0, 1 - x),
            "ipo": lambda x=x, half=half: (x / k.beta - half) ** 2,
            "robust": lambda x=x: (epsilon * log_sigmoid(-x) - (1 - epsilon) * log_sigmoid(x)) / (1 - 2 * epsilon),
            "sigmoid_norm": lambda x=x: -log_sigmoid(x),
            "exo_pair": lambda q=q: q * math.log(q / (1 - epsilon)) + (1 - q) * math.log((1 - q) / epsilon),
            "nca_pair": lambda c=chosen, r=rejected: -log_sigmoid(c) - log_sigmoid(-c) / 2 - log_sigmoid(-r) / 2,
            "bco_pair": lambda c=chosen, r=rejected: -log_sigmoid(c - k.delta) - log_sigmoid(k.delta - r),
            "sppo_hard": lambda w=w, l=l, half=half: (w - half) ** 2 + (l + half) ** 2,
            "apo_zero": lambda c=chosen, r=rejected: 1 - logistic(c) + logistic(r),
            "apo_down": lambda c=chosen, r=rejected: logistic(c) + 1 - logistic(c - r),
            "discopop": lambda x=x, m=m, tau=tau: -log_sigmoid(x) * (1 - m) + math.exp(log_sigmoid(x / tau) - x),
        }
        losses.append(forms[name]())
    return losses


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def divergence(x: float, k: SimpleNamespace) -> float:
    """f′ of a log-ratio."""
    order = k.f_alpha_divergence_coef
    if k.f_divergence_type == "forward_kl":
        return 1 - math.exp(min(-x, 80))
    if k.f_divergence_type == "js_divergence":
        return math.log(2) + log_sigmoid(x)
    if k.f_divergence_type == "alpha_divergence" and abs(order - 1) >= 1e-6:
        return (math.exp(min((order - 1) * x, 80)) - 1) / (order - 1)
    return x


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
