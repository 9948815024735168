"""Cases of every public function: sizes, layouts and options drawn by hypothesis, contents made from a seed."""

import os
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

import fused_pref as fp
from fused_pref.losses.pair import CPO_LOSS_TYPES, DPO_LOSS_TYPES
from fused_pref.losses.unpaired import KTO_LOSS_TYPES

PROFILE = os.environ.get("FUSED_PREF_PROPERTIES", "")
if PROFILE not in ("", "long") and not PROFILE.isdecimal():
    raise ValueError(f"FUSED_PREF_PROPERTIES must be 'long' or a number of cases; got {PROFILE!r}")
CASES = {"": 60, "long": 10_000}.get(PROFILE) or int(PROFILE)

PAIRS = ("cpo_loss", "dpo_loss")
UNPAIRED = ("bco_loss", "kto_loss")
OBJECTIVES = (*PAIRS, *UNPAIRED, "sequence_logps", "token_logps")
STRIDES = ("contiguous", "swapped", "transposed", "offset", "strided", "expanded", "flat")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def examples(share: float = 1.0) -> settings:
    """Settings of a test that takes a share of the cases, the same every time unless their number was given."""
    number = max(1, round(CASES * share))
    return settings(deadline=None, max_examples=number, derandomize=PROFILE == "", database=None)


@dataclass(frozen=True)
class Case:
    """A call. Two cases that are equal have the same bits.

    Attributes:
        lengths: positions of each sequence; padded layouts have equal ones.
        scored: share of the positions that have a label.
        silent: sequences without labels.
        strides: of logits or hidden states, weight, bias, labels.
        wanted: which gradients: h(idden) or logits, w(eight), b(ias).
        shift: reward shift of BCO by kind and update; None: ``options["delta"]`` holds.
        tensors: options that are passed as 0-d tensors.
        room: ``max_valid_tokens`` beyond the number of scored tokens; None: no bound.
    """

    objective: str = "cpo_loss"
    linear: bool = False
    lengths: tuple[int, ...] = (5, 5)
    packed: bool = False
    features: int = 8
    vocabulary: int = 11
    dtype: torch.dtype = torch.float32
    bias: bool = False
    scored: float = 0.8
    silent: tuple[int, ...] = ()
    same_label: bool = False
    strides: tuple[str, str, str, str] = ("contiguous",) * 4
    index_dtype: torch.dtype = torch.int64
    wanted: str = "hwb"
    upstream: float = 1.0
    shift: tuple[str, str] | None = None
    weighted: bool = False
    tensors: tuple[str, ...] = ()
    room: int | None = None
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def function(self) -> str:
        """Name of the public function."""
        return f"linear_{self.objective}" if self.linear else self.objective


@dataclass
class Problem:
    """Tensors of a case.

    Attributes:
        parts: what is differentiable: logits or hidden, weight, bias.
        arguments: what comes after the labels.
        factors: of a result that is not a loss, to make one of it; None: drawn.
    """

    parts: dict[str, Tensor]
    labels: Tensor
    arguments: tuple[Tensor, ...]
    keywords: dict[str, Any]
    case: Case
    factors: Tensor | None = None

    def wide(self, noise: float = 0.0, draw: int = 0) -> "Problem":
        """The same in float64; ``noise`` times normal numbers is added, relative, to what is differentiable."""
        generator = torch.Generator().manual_seed(draw)
        parts = {name: part.to(torch.float64, copy=True) for name, part in self.parts.items()}
        if noise:
            for name, part in parts.items():
                parts[name] = part * (1 + noise * torch.randn(part.shape, generator=generator, dtype=torch.float64))
        return replace(self, parts=parts)


def build(case: Case) -> Problem:
    """The tensors of a case."""
    generator = torch.Generator().manual_seed(case.seed)
    total, sequences, vocabulary = sum(case.lengths), len(case.lengths), case.vocabulary
    shape = (total,) if case.packed else (sequences, case.lengths[0] if case.lengths else 0)
    ignored = case.options.get("ignore_index", -100)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    spread = {"hidden": normal(total, case.features)} if case.linear else {"logits": 3 * normal(total, vocabulary)}
    if case.linear:
        spread["weight"] = normal(vocabulary, case.features) * 2 / case.features**0.5
        if case.bias:
            spread["bias"] = normal(vocabulary)
    first = next(iter(spread))
    spread[first] = spread[first].view(*shape, spread[first].shape[-1])
    parts = {
        name: laid_out(part.to(case.dtype), how)
        for (name, part), how in zip(spread.items(), case.strides, strict=False)
    }
    labels = torch.randint(0, vocabulary, (total,), generator=generator)
    if case.same_label:
        labels[:] = vocabulary - 1
    labels[torch.rand(total, generator=generator) >= case.scored] = ignored
    for sequence, part in enumerate(labels.split(list(case.lengths))):
        if sequence in case.silent:
            part[:] = ignored
    ends = torch.tensor([0, *case.lengths]).cumsum(0).to(case.index_dtype)
    labels = laid_out(labels.view(shape).to(case.index_dtype), case.strides[3])
    keywords = dict(case.options)
    for name in case.tensors:
        if keywords.get(name) is not None:
            keywords[name] = torch.tensor(float(keywords[name]))
    if case.packed:
        keywords["cu_seqlens"] = ends
    if case.weighted:
        keywords["sample_weight"] = torch.rand(sequences, generator=generator) * 2
    ref, desirable = 4 * normal(sequences) - 15, torch.rand(sequences, generator=generator) < 0.5
    arguments = (desirable, ref) if case.objective in UNPAIRED else (ref,) * (case.objective == "dpo_loss")
    problem = Problem(parts, labels, arguments, keywords, case)
    if case.room is not None:
        keywords["max_valid_tokens"] = scored_tokens(problem) + case.room
    return problem


def scored_tokens(problem: Problem) -> int:
    """N, the number of labels that some position scores."""
    labels, ignored = problem.labels, problem.keywords.get("ignore_index", -100)
    scored = labels != ignored
    if problem.keywords.get("shift", True):
        runs = scored.split(list(problem.case.lengths)) if problem.case.packed else scored.unbind()
        return sum(int(run[1:].sum()) for run in runs)
    return int(scored.sum())


def laid_out(tensor: Tensor, how: str) -> Tensor:
    """These values under other strides; ``expanded`` repeats those of the first row, ``flat`` of the first column."""
    if how == "swapped" and tensor.dim() > 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "offset":
        outer = tensor.new_full([n + 2 for n in tensor.shape], 7)
        return outer[(slice(1, -1),) * tensor.dim()].copy_(tensor)
    if how == "strided":
        return tensor.new_full((*tensor.shape, 2), 7)[..., 1].copy_(tensor)
    if how == "expanded":
        return tensor[:1].expand(tensor.shape)
    if how == "flat":
        return tensor[..., :1].expand(tensor.shape)
    return tensor


@dataclass
class Result:
    """Fields of an output, and gradients by the name of their tensor."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]

    def all(self) -> dict[str, Tensor]:
        """Both."""
        return {**self.values, **{f"gradient of {name}": value for name, value in self.gradients.items()}}


def evaluate(module: Any, problem: Problem) -> Result:
    """``fp`` or ``fp.reference`` on a problem, with the gradients that the case wants."""
    case, keywords = problem.case, dict(problem.keywords)
    leaves = {name: part.detach().requires_grad_(wanted(case, name)) for name, part in problem.parts.items()}
    if "bias" in leaves:
        keywords["bias"] = leaves["bias"]
    if case.shift is not None:
        kind, update = case.shift
        keywords["delta"] = fp.RewardShift(kind, update=update, value=0.4)
        keywords["delta"].mean += 0.3
        keywords["delta"].count += torch.tensor([3, 2])
    tensors = [leaf for name, leaf in leaves.items() if name != "bias"]
    output = getattr(module, case.function)(*tensors, problem.labels, *problem.arguments, **keywords)
    loss, values = output, {"result": output}
    if not isinstance(output, Tensor):
        values = {name: value for name, value in output._asdict().items() if value is not None}
        loss = output.loss
    else:
        generator = torch.Generator().manual_seed(case.seed + 2)
        factors = torch.randn(output.shape, generator=generator) if problem.factors is None else problem.factors
        loss = (output * factors).sum()
    assert loss.requires_grad == any(leaf.requires_grad for leaf in leaves.values())
    if loss.requires_grad:
        (loss * case.upstream).backward()
    if case.shift is not None:
        values |= {f"delta.{name}": value for name, value in keywords["delta"].state_dict().items()}
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert gradients.keys() == {name for name, leaf in leaves.items() if leaf.requires_grad}
    return Result({name: value.detach() for name, value in values.items()}, gradients)


def wanted(case: Case, name: str) -> bool:
    """Whether the case asks for the gradient of a tensor."""
    return ("h" if name == "logits" else name[0]) in case.wanted


# Strategies.


def sizes(largest: int, least: int = 0) -> st.SearchStrategy[int]:
    """Small ones as often as all, 0 seldom."""

    def kind(number: int) -> st.SearchStrategy[int]:
        return st.just(0) if number == 11 and least == 0 else st.integers(1, largest if number % 2 else min(largest, 5))

    return st.integers(0, 11).flatmap(kind)


PAIR_OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "beta": st.sampled_from([0.05, 0.1, 1.0, 2.5]),
    "label_smoothing": st.sampled_from([0.0, 0.1, 0.6]),
    "pair_normalizer": st.sampled_from([None, 3, 7.5]),
    "token_normalizer": st.sampled_from([None, 0, 12]),
}
# Where two pairs tie, rounding decides on the order of a sort, and so on gradients.
DPO_NAMES = tuple(name for name in DPO_LOSS_TYPES if not name.startswith("aot"))
OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "cpo_loss": {
        **PAIR_OPTIONS,
        "loss_type": st.sampled_from(CPO_LOSS_TYPES),
        "cpo_alpha": st.sampled_from([0.0, 1.0, 0.3]),
        "simpo_gamma": st.sampled_from([0.5, -1.0, 0.0]),
        "alpha": st.sampled_from([0.0, 0.25, -0.3, 1e-4]),
        "nll_reduction": st.sampled_from(["token", "sequence"]),
    },
    "dpo_loss": {
        **PAIR_OPTIONS,
        "loss_type": st.sampled_from((*DPO_NAMES, ("sigmoid", "bco_pair", "sft"), ("nca_pair", "ipo", "apo_down"))),
        "f_divergence_type": st.sampled_from(("reverse_kl", "reverse_kl", "js_divergence")),
    },
    "bco_loss": {
        "beta": st.sampled_from([0.05, 0.1, 1.0]),
        "delta": st.sampled_from([0.0, 0.4, -3.0]),
        "reduction": st.sampled_from(["mean", "class_mean"]),
    },
    "kto_loss": {
        "beta": st.sampled_from([0.05, 0.1, 1.0]),
        "kl": st.sampled_from([0.0, 3.0, 40.0]),
        "loss_type": st.sampled_from(KTO_LOSS_TYPES),
        "desirable_weight": st.sampled_from([1.0, 0.0, 1.3]),
        "undesirable_weight": st.sampled_from([1.0, 0.7]),
        "sequence_normalizer": st.sampled_from([None, 5]),
    },
    "sequence_logps": {"average": st.booleans()},
    "token_logps": {},
}
TOKEN_OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "ignore_index": st.sampled_from([-100, -1, 0, 2]),
    "shift": st.booleans(),
    "softcap": st.sampled_from([None, 2.0, 30.0]),
    "logit_scale": st.sampled_from([1.0, -1.7, 0.3]),
    "temperature": st.sampled_from([1.0, 0.6, 2.5]),
    "logits_mean": st.sampled_from(["all", "completion", None]),
}


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    linear: bool,
    largest: int = 70,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    backend: str = "torch",
) -> Case:
    """Anything that the library takes."""
    objective = draw(st.sampled_from(OBJECTIVES))
    packed = draw(st.booleans())
    sequences = draw(sizes(largest))
    sequences -= sequences % 2 if objective in PAIRS else 0
    if packed:
        lengths = tuple(draw(st.lists(sizes(largest), min_size=sequences, max_size=sequences)))
    else:
        lengths = (draw(sizes(largest)),) * sequences
    options = {name: draw(value) for name, value in {**TOKEN_OPTIONS, **OPTIONS[objective]}.items()}
    if objective == "cpo_loss" and options["loss_type"] in ("sigmoid", "hinge"):
        # Powers of a sum, not of an average.
        options["alpha"] /= max([1, *lengths])
    if objective == "dpo_loss":
        if options["loss_type"] in ("exo_pair", "robust"):
            options["label_smoothing"] = 0.1
        if options["loss_type"] == "hinge":
            options["f_divergence_type"] = "reverse_kl"
    if objective == "bco_loss":
        name = {"mean": "sequence_normalizer", "class_mean": "class_normalizer"}[options["reduction"]]
        options[name] = draw(st.sampled_from([None, 5] if name == "sequence_normalizer" else [None, (3, 0), (4, 5)]))
    if linear:
        options["memory_budget"] = draw(st.sampled_from([None, 1, 2**13, 2**17]))
        options["skip_mass"] = draw(st.sampled_from([None, None, None, 0.0]))
    bias = linear and draw(st.booleans())
    strides = tuple(draw(st.sampled_from(STRIDES)) for _ in range(3))
    if not linear:
        options["inplace_backward"] = strides[0] not in ("expanded", "flat") and draw(st.booleans())
    return Case(
        objective=objective,
        linear=linear,
        lengths=lengths,
        packed=packed,
        features=draw(sizes(largest, 1)) if linear else 1,
        vocabulary=draw(sizes(largest, 1)),
        dtype=draw(st.sampled_from(dtypes)),
        bias=bias,
        scored=draw(st.sampled_from([0.8, 1.0, 0.9, 0.5, 0.8, 1.0, 0.2, 0.0])),
        silent=tuple(draw(st.lists(st.integers(0, max(sequences - 1, 0)), max_size=2))),
        same_label=draw(st.booleans()),
        strides=(*strides, draw(st.sampled_from(["contiguous", "strided", "offset", "transposed"]))),  # type: ignore[arg-type]
        index_dtype=draw(st.sampled_from([torch.int64, torch.int32])),
        wanted="".join(name for name in ("hwb" if linear else "h") if draw(st.integers(0, 3))),
        upstream=draw(st.sampled_from([1.0, 1.0, -3.7, 0.0])),
        shift=draw(st.sampled_from(SHIFTS)) if objective == "bco_loss" else None,
        weighted=objective == "bco_loss" and draw(st.booleans()),
        tensors=tuple(name for name in NUMBERS if name in options and draw(st.booleans())),
        room=draw(st.sampled_from([None, None, 0, 3])) if linear else None,
        seed=draw(st.integers(0, 2**16)),
        options={**options, "backend": backend},
    )


NUMBERS = ("pair_normalizer", "token_normalizer", "sequence_normalizer", "delta", "kl")
SHIFTS = [None, ("running_mean", "forward"), ("ema", "forward"), ("ema", "step"), ("fixed", "forward")]
