"""The reference itself: scalar closed forms, theorems, TRL, layouts, and degenerate or non-finite input."""

import functools
import inspect
import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import IGNORE, Batch, make_batch, reference_logps, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fused_pref
from fused_pref import reference

FUNCTIONS = ["token_logps", "sequence_logps", "cpo_loss", "dpo_loss", "bco_loss"]
OBJECTIVES = [
    *(("cpo_loss", {"loss_type": kind}) for kind in ("sigmoid", "hinge", "ipo", "simpo", "alphapo")),
    ("cpo_loss", {"loss_type": "hinge", "cpo_alpha": 0.0}),
    ("cpo_loss", {"alpha": 0.3, "nll_reduction": "sequence"}),
    *(("dpo_loss", {"loss_type": kind}) for kind in ("sigmoid", "hinge", "ipo")),
    ("bco_loss", {}),
    ("bco_loss", {"reduction": "class_mean"}),
]
every_objective = pytest.mark.parametrize(("name", "keywords"), OBJECTIVES, ids=str)
TRANSFORMS = [{}, {"softcap": 2.5, "logit_scale": 1.7, "temperature": 0.6}, {"temperature": 3.0, "logit_scale": -0.5}]
LARGEST = torch.finfo(torch.bfloat16).max


def objective(name: str, batch: Batch, **keywords: Any) -> tuple[Any, Tensor]:
    """Output and gradient of any objective on a batch: every second sequence is desirable, the reference is fixed."""
    sequences = len(keywords["cu_seqlens"]) - 1 if "cu_seqlens" in keywords else len(batch.labels)
    desirable = torch.arange(sequences) % 2 == 0
    arguments = {"cpo_loss": (), "dpo_loss": (reference_logps(sequences),)}
    arguments["bco_loss"] = (desirable, reference_logps(sequences))
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
        losses.append({"hinge": max(0.0, 1 - x), "ipo": (w - l - 0.5 / k.beta) ** 2}.get(k.loss_type, smooth))
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


def assert_fields(output: Any, expected: list[Any]) -> None:
    for field, ours, truth in zip(output._fields, output, expected, strict=True):
        assert (ours is None) == (truth is None), field
        if truth is not None:
            assert_same(ours, truth)
            assert ours.requires_grad == (field == "loss"), field


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
    arguments = {"cpo_loss": (), "dpo_loss": (ref,), "bco_loss": (desirable, ref)}[name]
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


# Theorems. One pair of one token each: references are chosen so that the rewards are r_w and r_l.


def rewarded(r_w: float, r_l: float, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    logits, labels = double(2, 1, 3, mask="none").logits, torch.tensor([[0], [2]])
    logps = reference.sequence_logps(logits, labels, shift=False)
    return logits, labels, logps - torch.tensor([r_w, r_l], dtype=torch.float64) / beta


rewards_and_shift = st.tuples(*[st.floats(-6, 6)] * 3)


@settings(max_examples=60, deadline=None, database=None)
@given(rewards_and_shift, st.floats(0.05, 5))
def test_bce_bounds_dpo(values: tuple[float, float, float], beta: float) -> None:
    r_w, r_l, delta = values
    logits, labels, ref = rewarded(r_w, r_l, beta)
    dpo = reference.dpo_loss(logits, labels, ref, beta=beta, shift=False)
    desirable, common = torch.tensor([True, False]), {"beta": beta, "shift": False, "delta": delta}
    bce = reference.bco_loss(logits, labels, desirable, ref, reduction="class_mean", **common)
    pooled = reference.bco_loss(logits, labels, desirable, ref, **common)
    assert_same(bce.rewards, [r_w, r_l], 1e-10)
    assert_same(pooled.loss, bce.loss / 2)
    assert bce.loss >= dpo.loss
    gap = bce.loss.exp() - dpo.loss.exp()
    assert abs(gap - math.exp(delta - r_w) - math.exp(r_l - delta)) <= 1e-12 * bce.loss.exp()


@settings(max_examples=30, deadline=None, database=None)
@given(rewards_and_shift, st.floats(0.05, 5))
def test_bco_gradient(values: tuple[float, float, float], beta: float) -> None:
    """∓βσ(∓(r − δ)) per log-prob, with δ held fixed, whatever it was computed from."""
    r_w, r_l, delta = values
    logits, labels, ref = rewarded(r_w, r_l, beta)
    leaf = logits.clone().requires_grad_()
    attached = delta + 0 * leaf.sum()
    output = reference.bco_loss(
        leaf, labels, torch.tensor([True, False]), ref, beta=beta, delta=attached, reduction="class_mean", shift=False
    )
    output.loss.backward()
    slopes = [-beta / (1 + math.exp(r_w - delta)), beta / (1 + math.exp(delta - r_l))]
    rows = F.one_hot(labels, 3) - logits.softmax(-1)
    assert leaf.grad is not None
    assert_same(leaf.grad, rows * torch.tensor(slopes, dtype=torch.float64)[:, None, None], 1e-10)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_cpo_is_dpo_with_equal_references(loss_type: str) -> None:
    batch = double(6, 5, 7)
    keywords = {"loss_type": loss_type, "beta": 0.3, "label_smoothing": 0.1}
    pairs = torch.zeros(3) if loss_type == "ipo" else reference_logps(3)
    cpo, cpo_grad = objective("cpo_loss", batch, cpo_alpha=0.0, **keywords)
    dpo, dpo_grad = run(reference.dpo_loss, batch.logits, batch.labels, pairs.repeat(2), **keywords)
    assert_same(cpo.loss, dpo.loss)
    assert_same(cpo_grad, dpo_grad)
    assert cpo_grad.any()


def test_simpo_is_sigmoid_of_averages() -> None:
    batch = double(6, 5, 7)

    def averaged(logits: Tensor, labels: Tensor) -> Tensor:
        logps = reference.sequence_logps(logits, labels, average=True)
        return -F.logsigmoid(2.0 * (logps[:3] - logps[3:])).mean()

    simpo, grad = objective("cpo_loss", batch, loss_type="simpo", simpo_gamma=0.0, beta=2.0, cpo_alpha=0.0)
    truth, true_grad = run(averaged, batch.logits, batch.labels)
    assert_same(simpo.loss, truth)
    assert_same(grad, true_grad)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "simpo", "alphapo"])
def test_alphapo_limit(loss_type: str) -> None:
    """The transform is x − αx²/2 + O(α²)."""
    batch = double(4, 5, 7, mask="none")
    plain, plain_grad = objective("cpo_loss", batch, loss_type=loss_type)
    for alpha in (1e-6, -1e-6):
        near, near_grad = objective("cpo_loss", batch, loss_type=loss_type, alpha=alpha)
        assert_same(near.chosen_rewards, 0.1 * (plain.chosen_logps - alpha * plain.chosen_logps**2 / 2), 1e-9)
        assert_same(near.loss, plain.loss, 1e-3)
        assert_same(near_grad, plain_grad, 1e-3)
        assert torch.equal(near.chosen_logps, plain.chosen_logps)


def test_alphapo_stays_finite() -> None:
    """Beyond the clamp the gradient is 0; where float32 overflows, values and gradients saturate."""
    batch = make_batch(2, 60, 9, mask="none", scale=30.0)
    output, grad = objective("cpo_loss", batch, alpha=1.0, cpo_alpha=0.0)
    assert (output.chosen_logps < -80).all()
    assert not grad.any()
    batch = make_batch(2, 8, 9, mask="none", scale=12.0)
    wide = Batch(batch.logits.double(), batch.labels)
    keywords = {"loss_type": "ipo", "alpha": 6.0, "cpo_alpha": 0.0}
    truth, true_grad = objective("cpo_loss", wide, **keywords)
    output, grad = objective("cpo_loss", batch, **keywords)
    assert truth.loss > 1e40
    assert true_grad.abs().max() > 1e40
    assert output.loss == LARGEST
    assert grad.isfinite().all()
    assert grad.abs().max() > 1e35
    assert (output.chosen_rewards < -1e20).any()
    batch.logits[0, 0, batch.labels[0, 1]] = -torch.inf
    assert reference.cpo_loss(batch.logits, batch.labels).loss == torch.inf


@pytest.mark.parametrize("name", ["cpo_loss", "dpo_loss", "bco_mean", "bco_class_mean"])
def test_normalizers_make_accumulation_exact(name: str) -> None:
    """Micro-batches with the normalizers of the whole batch add up to it; with a normalizer of 0 a term is 0."""
    batch, ref, desirable = double(6, 5, 7), reference_logps(6), torch.tensor([True, False, True, True, False, False])
    parts = [torch.tensor([0, 3]), torch.tensor([1, 2, 4, 5])]
    chosen_tokens = int((batch.labels[:3, 1:] != IGNORE).sum())
    function = getattr(reference, name if name.endswith("loss") else "bco_loss")
    arguments = {"cpo_loss": (), "dpo_loss": (ref,)}.get(name, (desirable, ref))
    keywords, whole = {
        "cpo_loss": ({"token_normalizer": chosen_tokens, "pair_normalizer": 3}, {}),
        "dpo_loss": ({"pair_normalizer": torch.tensor(3)}, {}),
        "bco_mean": ({"sequence_normalizer": 6}, {}),
        "bco_class_mean": ({"class_normalizer": (3, torch.tensor(3))}, {"reduction": "class_mean"}),
    }[name]
    truth, true_grad = run(function, batch.logits, batch.labels, *arguments, **whole)
    total, grad = torch.zeros((), dtype=torch.float64), torch.zeros_like(true_grad)
    for part in parts:
        rows = [x[part] for x in (batch.logits, batch.labels, *arguments)]
        output, grad[part] = run(function, *rows, **keywords, **whole)
        total += output.loss.detach()
    assert_same(total, truth.loss)
    assert_same(grad, true_grad)
    zeros = {key: (0, torch.tensor(0)) if isinstance(value, tuple) else 0 for key, value in keywords.items()}
    output, grad = run(function, batch.logits, batch.labels, *arguments, **zeros, **whole)
    assert output.loss == 0
    assert not grad.any()


# Layouts, dtypes, keywords.


@pytest.mark.parametrize("lengths", [[4, 0, 6, 1], [0, 0, 3, 5], [6, 6, 6, 0], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("shift", [True, False])
@every_objective
def test_packed_equals_padded(lengths: list[int], shift: bool, name: str, keywords: dict[str, Any]) -> None:
    batch = double(4, 6, 7, mask="none")
    logits, labels, ends = batch.packed(lengths)
    for s, n in enumerate(lengths):
        batch.labels[s, n:] = IGNORE
    for cu_seqlens in (ends, ends.long()):
        layout = {"shift": shift, "logits_mean": "completion"}
        padded, padded_grad = objective(name, batch, **keywords, **layout)
        packed, grad = objective(name, Batch(logits, labels), cu_seqlens=cu_seqlens, **keywords, **layout)
        assert_fields(packed, list(padded))
        assert_same(grad, torch.cat([padded_grad[s, :n] for s, n in enumerate(lengths)]))
    tokens = F.pad(reference.token_logps(batch.logits, batch.labels, shift=shift), (0, int(shift)))
    packed_tokens = reference.token_logps(logits, labels, cu_seqlens=ends, shift=shift)
    assert_same(packed_tokens, torch.cat([tokens[s, :n] for s, n in enumerate(lengths)]))
    everywhere = reference.cpo_loss(logits, labels, cu_seqlens=ends)
    assert_same(everywhere.chosen_logits_mean, logits[: ends[2]].mean() if ends[2] else 0.0)


@every_objective
def test_shift_equals_shifted_labels(name: str, keywords: dict[str, Any]) -> None:
    batch = double(4, 6, 7)
    shifted = Batch(batch.logits, F.pad(batch.labels[:, 1:], (0, 1), value=IGNORE))
    ours, grad = objective(name, batch, **keywords)
    truth, true_grad = objective(name, shifted, shift=False, **keywords)
    assert_fields(ours, list(truth))
    assert_same(grad, true_grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@every_objective
def test_dtypes(dtype: torch.dtype, name: str, keywords: dict[str, Any]) -> None:
    """Halves are float32 math on the upcast logits, bit for bit; only the gradient is rounded back."""
    batch = make_batch(4, 6, 7, dtype=dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    ours, grad = objective(name, batch, softcap=4.0, **keywords)
    truth, true_grad = objective(name, Batch(batch.logits.to(compute), batch.labels.int()), softcap=4.0, **keywords)
    for value, other in zip(ours, truth, strict=True):
        assert torch.equal(value, other)
        assert value.dtype in (compute, torch.int64)
    assert grad.dtype == dtype
    assert torch.equal(grad, true_grad.to(dtype))
    assert reference.token_logps(batch.logits, batch.labels).dtype == compute
    assert reference.sequence_logps(batch.logits, batch.labels).dtype == compute


def test_sums_are_float64() -> None:
    batch = make_batch(2, 3000, 5, mask="none")
    tokens = reference.token_logps(batch.logits, batch.labels)
    sums = tokens.double().sum(1)
    assert not torch.equal(functools.reduce(torch.add, tokens.T), sums.float())
    assert torch.equal(reference.sequence_logps(batch.logits, batch.labels), sums.float())
    output = reference.dpo_loss(batch.logits, batch.labels, sums.flip(0), beta=1.0)
    assert_same(output.chosen_rewards, (sums[:1] - sums[1:]).float(), 0.0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures(name: str) -> None:
    assert inspect.signature(getattr(reference, name)) == inspect.signature(getattr(fused_pref, name))
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'betta'"):
        getattr(reference, name)(torch.zeros(2, 3, 4), torch.zeros(2, 3), betta=1.0)


def test_options_about_how_have_no_effect() -> None:
    batch = double(4, 5, 6)
    plain, plain_grad = objective("cpo_loss", batch)
    leaf = batch.logits.clone().requires_grad_()
    output = reference.cpo_loss(leaf, batch.labels, backend="triton", inplace_backward=True)
    output.loss.backward(retain_graph=True)
    output.loss.backward()
    assert leaf.grad is not None
    assert torch.equal(output.loss, plain.loss)
    assert torch.equal(leaf.grad, 2 * plain_grad)


@pytest.mark.parametrize("ignore_index", [0, -1, 6])
def test_ignore_index(ignore_index: int) -> None:
    batch = double(4, 5, 7)
    other = batch.labels.clamp(min=1, max=5).where(batch.labels != IGNORE, ignore_index)
    batch.labels[batch.labels != IGNORE] = other[batch.labels != IGNORE]
    ours, grad = run(reference.cpo_loss, batch.logits, other, ignore_index=ignore_index)
    truth, true_grad = objective("cpo_loss", batch)
    assert torch.equal(ours.loss, truth.loss)
    assert torch.equal(grad, true_grad)
    assert reference.cpo_loss(batch.logits, batch.labels, ignore_index=ignore_index).loss.isnan()


def test_shift_object() -> None:
    """``delta`` may be an object: it sees detached float64 rewards, and commits only when nothing can fail any more."""
    batch, desirable, calls = make_batch(4, 5, 6), torch.tensor([True, False, True, False]), []

    class Shift:
        def peek(self, rewards: Tensor, classes: Tensor) -> tuple[Tensor, str]:
            assert rewards.dtype == torch.float64
            assert not rewards.requires_grad
            assert classes is desirable
            calls.append("peek")
            return rewards.mean().requires_grad_(), "state"

        def commit(self, state: str) -> None:
            calls.append(state)

    leaf = batch.logits.requires_grad_()
    output = reference.bco_loss(leaf, batch.labels, desirable, reference_logps(4), delta=Shift())
    assert calls == ["peek", "state"]
    assert_same(output.delta, output.rewards.mean(), 1e-6)
    assert not output.delta.requires_grad
    calls.clear()
    with pytest.raises(RuntimeError):
        reference.bco_loss(
            leaf, batch.labels, desirable, reference_logps(4), delta=Shift(), sample_weight=torch.ones(3)
        )
    assert calls == ["peek"]


# Degenerate and non-finite input.


@every_objective
@pytest.mark.parametrize("cover", ["all", "completion"])
def test_nothing_to_score(name: str, keywords: dict[str, Any], cover: str) -> None:
    batch = double(4, 5, 6, mask="all")
    output, grad = objective(name, batch, logits_mean=cover, **keywords)
    assert all(value.isfinite().all() for value in output)
    assert output.loss.requires_grad
    assert grad.shape == batch.logits.shape
    assert not grad.any()
    if name != "bco_loss":
        assert output.nll_loss == 0
        assert not output.chosen_logps.any()
    assert (output.chosen_logits_mean == 0) == (cover == "completion")


@every_objective
def test_an_empty_completion_has_no_gradient(name: str, keywords: dict[str, Any]) -> None:
    output, grad = objective(name, double(4, 5, 6, mask="empty"), **{"beta": 0.01, **keywords})
    assert all(value.isfinite().all() for value in output)
    assert [bool(rows.any()) for rows in grad] == [True, True, False, True]
    logps = output.logps[2] if name == "bco_loss" else output.rejected_logps[0]
    assert logps == 0


@pytest.mark.parametrize("shape", [(0, 4, 5), (0, 0, 5), (2, 0, 5), (2, 1, 5)], ids=str)
@every_objective
def test_empty_shapes(shape: tuple[int, int, int], name: str, keywords: dict[str, Any]) -> None:
    batch = double(*shape, mask="none")
    assert reference.token_logps(batch.logits, batch.labels).shape == (shape[0], max(shape[1] - 1, 0))
    assert reference.token_logps(batch.logits, batch.labels, shift=False).shape == shape[:2]
    assert reference.sequence_logps(batch.logits, batch.labels).tolist() == [0.0] * shape[0]
    output, grad = objective(name, batch, **keywords)
    assert all(value.isfinite().all() for value in output)
    assert grad.shape == shape
    assert not grad.any()
    if shape[0] == 0:
        packed, _ = objective(
            name, Batch(batch.logits.view(0, 5), batch.labels.view(0)), cu_seqlens=torch.zeros(1, dtype=torch.int32),
            **keywords,
        )  # fmt: skip
        assert output.loss == packed.loss == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@every_objective
def test_unscored_positions_may_hold_anything(
    bad: float, transform: dict[str, float], name: str, keywords: dict[str, Any]
) -> None:
    batch = double(4, 5, 6)
    batch.labels[1, 2] = IGNORE
    clean, clean_grad = objective(name, batch, logits_mean="completion", **keywords, **transform)
    batch.logits[1, 1] = batch.logits[:, -1] = bad
    output, grad = objective(name, batch, logits_mean="completion", **keywords, **transform)
    assert all(torch.equal(value, other) for value, other in zip(output, clean, strict=True))
    assert torch.equal(grad, clean_grad)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sequence", [0, 3])
@every_objective
def test_non_finite_logits_show(bad: float, sequence: int, name: str, keywords: dict[str, Any]) -> None:
    batch = double(4, 5, 6, mask="none")
    batch.logits[sequence, 2, 4] = bad
    output, _ = objective(name, batch, **keywords)
    assert output.loss.isnan()
    tokens = reference.token_logps(batch.logits, batch.labels)
    assert tokens.isnan().nonzero().tolist() == [[sequence, 2]]
    sums = reference.sequence_logps(batch.logits, batch.labels)
    assert sums.isnan().nonzero().flatten().tolist() == [sequence]


@every_objective
def test_masked_vocabulary_entries(name: str, keywords: dict[str, Any]) -> None:
    """A −inf logit is an entry that is not there."""
    batch = double(4, 5, 9, mask="none")
    batch.labels.clamp_(max=6)
    batch.logits[..., 7:] = -torch.inf
    ours, grad = objective(name, batch, logits_mean=None, **keywords)
    small = Batch(batch.logits[..., :7], batch.labels)
    truth, true_grad = objective(name, small, logits_mean=None, **keywords)
    assert_same(ours.loss, truth.loss)
    assert_same(grad[..., :7], true_grad)
    assert not grad[..., 7:].any()


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_targets_of_probability_zero(side: str) -> None:
    batch = double(2, 3, 5, mask="none")
    sequence = 0 if side == "chosen" else 1
    batch.logits[sequence, 0, batch.labels[sequence, 1]] = -torch.inf
    assert reference.token_logps(batch.logits, batch.labels)[sequence, 0] == -torch.inf
    output, grad = objective("cpo_loss", batch, cpo_alpha=0.0)
    assert output.loss == (torch.inf if side == "chosen" else 0)
    assert grad.isfinite().all()


@pytest.mark.parametrize("label", [7, 2**31 - 1, -1, -101])
@every_objective
def test_labels_outside_the_vocabulary(label: int, name: str, keywords: dict[str, Any]) -> None:
    """NaN there and nowhere else, and counted as scored; a first label is not scored with shift."""
    batch = double(4, 5, 7)
    scored = batch.labels[0, 1:] != IGNORE
    batch.labels[0, 0] = label
    clean, _ = objective(name, batch, logits_mean="completion", **keywords)
    assert clean.loss.isfinite()
    batch.labels[0, 2] = label
    assert scored[1]
    tokens = reference.token_logps(batch.logits, batch.labels)
    assert tokens.isnan().nonzero().tolist() == [[0, 1]]
    output, grad = objective(name, batch, logits_mean="completion", **keywords)
    assert output.loss.isnan()
    assert grad[0, 1].isnan().all()
    assert torch.equal(output.chosen_logits_mean, clean.chosen_logits_mean)


# TRL as an oracle.


@pytest.fixture(scope="module")
def trl_cpo() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("trl")
        from trl.experimental.cpo import CPOTrainer
    return CPOTrainer


@pytest.mark.parametrize("average", [True, False])
def test_trl_sequence_logps(trl_cpo: Any, average: bool) -> None:
    batch = double(4, 6, 9)
    truth = trl_cpo.get_batch_logps(batch.logits, batch.labels, average_log_prob=average)
    assert_same(reference.sequence_logps(batch.logits, batch.labels, average=average), truth)


@pytest.mark.parametrize("alpha", [0.0, 0.3, -0.2])
@pytest.mark.parametrize("cpo_alpha", [0.0, 0.7])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.15])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "simpo", "alphapo"])
def test_trl_loss(trl_cpo: Any, loss_type: str, label_smoothing: float, cpo_alpha: float, alpha: float) -> None:
    """Loss, gradient and every metric of TRL's trainer."""
    batch = double(6, 6, 9)
    keywords = {"beta": 0.4, "label_smoothing": label_smoothing, "simpo_gamma": 0.8, "alpha": alpha}
    ours, grad = objective("cpo_loss", batch, loss_type=loss_type, cpo_alpha=cpo_alpha, **keywords)
    inputs = {f"concatenated_{name}": batch.labels for name in ("input_ids", "attention_mask", "labels")}
    trainer = SimpleNamespace(
        **keywords,
        # What TRL's trainer makes of "alphapo".
        loss_type="simpo" if loss_type == "alphapo" else loss_type,
        cpo_alpha=0.0 if loss_type == "alphapo" else cpo_alpha,
        is_encoder_decoder=False,
        aux_loss_enabled=False,
        pad_token_id=0,
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value),
        concatenated_inputs=lambda *_, **__: inputs,
        concatenated_forward=lambda *args: trl_cpo.concatenated_forward(trainer, *args),
        get_batch_logps=trl_cpo.get_batch_logps,
        cpo_loss=lambda *args: trl_cpo.cpo_loss(trainer, *args),
    )
    leaf = batch.logits.clone().requires_grad_()
    loss, metrics = trl_cpo.get_batch_loss_metrics(
        trainer, lambda *_, **__: SimpleNamespace(logits=leaf), {"chosen_labels": batch.labels[:3]}
    )
    loss.backward()
    assert leaf.grad is not None
    assert_same(ours.loss, loss.detach())
    assert_same(grad, leaf.grad)
    mine = {name: value.item() for name, value in ours.metrics().items()}
    assert mine.pop("rewards/accuracies") == pytest.approx(metrics.pop("rewards/accuracies"))  # float32 in TRL
    assert mine == pytest.approx(metrics, rel=1e-12)
