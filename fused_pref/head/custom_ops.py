"""Custom ops, opaque to ``torch.compile``: token log-probs of logits by either backend, and the linear head.

Ops of logits take ``logits`` ((S, T, V) or (N_total, V), any strides), ``targets`` ((S, T) or (N_total,), see
:func:`fused_pref.layout.targets_of`), and the constants of :class:`fused_pref.spec.Spec`. Ops of the linear head take
``cu_seqlens`` ((S+1,) or None), too, and keep the number of scored tokens inside. A schema has no dataclasses:
constants travel as text. Gradients that are not wanted are empty tensors.
"""

import ast
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fused_pref.head.engine import begin, evaluate_groups, score, working
from fused_pref.head.plans.grouped import Grouped
from fused_pref.head.plans.head import GRADIENTS, Gradients, HeadCall, late_dtype
from fused_pref.losses.pair import PairObjective
from fused_pref.losses.reward_shift import RewardShift
from fused_pref.losses.scores import Scores
from fused_pref.losses.unpaired import UnpairedObjective
from fused_pref.ops.interface import ACCUMULATOR, ENTROPY, PairSpec, PairTerm, Transform, UnpairedSpec
from fused_pref.ops.torch import chunk as torch_chunk
from fused_pref.spec import Spec

_transform = lru_cache(Transform)
# Of ops that read how many tokens are scored: `torch.compile(mode="reduce-overhead")` must not capture them in a CUDA
# graph, where nothing can be read.
READS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("fused_pref::token_logps_fwd", mutates_args=())
def token_logps_fwd(
    logits: Tensor,
    targets: Tensor,
    logits_mean: str | None,
    metrics: bool,
    backend: str,
    ignore_index: int,
    activation: str,
    inner: float,
    outer: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-prob of the label that each position scores.

    Returns:
        logp, shape of ``targets``: 0 where nothing is scored, NaN for a label outside the vocabulary;
        statistics (3, *targets.shape): what the gradient needs of each row, by the same backend;
        mean of z over the vocabulary, shape of ``targets``: 0 where ``logits_mean`` does not ask for it;
        with ``metrics`` those of :func:`fused_pref.ops.metrics.token_metrics`, (3, *targets.shape), else (3, 0).
        Float32, float64 for float64 logits.
    """
    transform = _transform(activation, inner, outer)
    if backend == "triton":
        from fused_pref.ops.triton import logprob

        return logprob.token_logps_fwd(logits, targets, logits_mean, ignore_index, transform, metrics=metrics)
    dtype = ACCUMULATOR[logits.dtype]
    return torch_chunk.token_logps_fwd(logits, targets, ignore_index, transform, logits_mean, metrics, dtype)


@token_logps_fwd.register_fake
def _(logits, targets, logits_mean, metrics, *constants):  # type: ignore[no-untyped-def]
    logp = logits.new_empty(targets.shape, dtype=ACCUMULATOR[logits.dtype])
    return logp, logp.new_empty((3, *targets.shape)), torch.empty_like(logp), _fake_metrics(metrics, logp)


@torch.library.custom_op("fused_pref::token_logps_bwd", mutates_args=("dlogits",))
def token_logps_bwd(
    dlogits: Tensor,
    logits: Tensor,
    targets: Tensor,
    statistics: Tensor,
    grad_logp: Tensor,
    backend: str,
    ignore_index: int,
    activation: str,
    inner: float,
    outer: float,
) -> None:
    """Write the gradient of the logits, a_n (onehot − softmax) with a_n = ``grad_logp``, shaped like ``targets``.

    ``dlogits`` may be the logits; rows that score nothing are 0.
    """
    transform = _transform(activation, inner, outer)
    if backend == "triton":
        from fused_pref.ops.triton import dlogits as kernel

        kernel.token_logps_bwd(dlogits, logits, targets, statistics, grad_logp, ignore_index, transform)
    else:
        torch_chunk.token_logps_bwd(dlogits, logits, targets, statistics, grad_logp, ignore_index, transform)


def encode(value: Any, tensors: list[Tensor]) -> str:
    """Constants as text, by means that a compiler can see through: numbers, names, None, and dataclasses and tuples.

    In place of a tensor the text has its number in the list, to which it is added; δ is that of now.
    """
    if isinstance(value, RewardShift):
        value = value.current()
    if isinstance(value, Tensor):
        kind, parts = "Tensor", [len(tensors)]
        tensors.append(value)
    elif isinstance(value, torch.dtype):
        kind, parts = "dtype", [str(value).removeprefix("torch.")]
    elif isinstance(value, frozenset):
        kind, parts = "frozenset", [name for name in GRADIENTS if name in value]
    elif isinstance(value, tuple):
        kind, parts = "tuple", list(value)
    elif is_dataclass(value):
        kind, parts = type(value).__name__, [getattr(value, field.name) for field in fields(value)]
    else:
        return f"{value!r}"
    return f"({kind!r}, " + "".join([encode(part, tensors) + ", " for part in parts]) + ")"


# What the first entry of a tuple in the text says that the others make.
_MAKERS: dict[str, Callable[..., Any]] = {
    "dtype": lambda name: getattr(torch, name),
    "frozenset": lambda *parts: frozenset(parts),
    "tuple": lambda *parts: parts,
    **{kind.__name__: kind for kind in (HeadCall, Spec, Transform, PairObjective, PairSpec, PairTerm)},
    **{kind.__name__: kind for kind in (UnpairedObjective, UnpairedSpec)},
}


def decode(text: str, tensors: Sequence[Tensor] = ()) -> Any:
    """The constants of :func:`encode`."""

    def made(value: Any) -> Any:
        if not isinstance(value, tuple):
            return value
        kind, *parts = value
        return tensors[parts[0]] if kind == "Tensor" else _MAKERS[kind](*map(made, parts))

    return made(ast.literal_eval(text))


@torch.library.custom_op("fused_pref::linear_token_logps_fwd", mutates_args=(), tags=READS)
def linear_token_logps_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cu_seqlens: Tensor | None, call: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp, mean of z, metrics, what the backward needs): statistics (4, P), U (P, D), or nothing."""
    request = decode(call)
    head, rows, plan = begin(request, hidden, weight, bias, targets, cu_seqlens)
    with working(head, rows):
        logp, means, metrics, forward = score(head, rows, replace(plan, saved=0), targets)
    if not request.wanted:
        saved = hidden.new_empty(0, dtype=head.accumulator)
    elif request.wanted == {"hidden"}:
        (u,) = forward.saved
        saved = u if rows.indices is None else u.new_zeros(targets.numel(), u.shape[1]).index_copy_(0, rows.indices, u)
    else:
        (statistics,) = forward.saved
        saved = torch.stack([rows.scatter(row, targets).flatten() for row in statistics[:ENTROPY]])
    return rows.scatter(logp, targets), means, metrics, saved


@linear_token_logps_fwd.register_fake
def _(hidden, weight, bias, targets, cu_seqlens, call):  # type: ignore[no-untyped-def]
    request = decode(call)
    dtype = ACCUMULATOR[request.dtype]
    logp = hidden.new_empty(targets.shape, dtype=dtype)
    shape = (4, targets.numel()) if request.wanted != {"hidden"} else (targets.numel(), hidden.shape[-1])
    saved = hidden.new_empty(shape if request.wanted else 0, dtype=dtype)
    return logp, torch.empty_like(logp), _fake_metrics(request.spec.token_metrics, logp), saved


@torch.library.custom_op("fused_pref::linear_token_logps_bwd", mutates_args=(), tags=READS)
def linear_token_logps_bwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    grad_logp: Tensor,
    call: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias."""
    request = decode(call)
    head, rows, plan = begin(request, hidden, weight, bias, targets, cu_seqlens)
    upstream = rows.gather(grad_logp)
    with working(head, rows):
        if request.wanted == {"hidden"}:
            own = saved if rows.indices is None else saved.index_select(0, rows.indices)
        else:
            own = torch.stack([rows.gather(row) for row in saved])
        return _filled(replace(plan, saved=0).backward(head, rows, (own,), (), upstream), hidden)


@linear_token_logps_bwd.register_fake
def _(hidden, weight, bias, targets, cu_seqlens, saved, grad_logp, call):  # type: ignore[no-untyped-def]
    return _fake_gradients(hidden, weight, bias, decode(call), late=False)


@torch.library.custom_op("fused_pref::linear_known_gradients", mutates_args=(), tags=READS)
def linear_known_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    tensors: list[Tensor],
    constants: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, mean of z, metrics, gradients of the loss) of an objective whose slopes are known unit by unit."""
    request, objective = decode(constants, tensors)
    head, rows, plan = begin(request, hidden, weight, bias, targets, cu_seqlens, token_weights)
    if isinstance(plan, Grouped):
        tokens, gradients, _ = evaluate_groups(head, rows, plan, targets, cu_seqlens, objective)
        return tokens.logp, tokens.means, tokens.metrics, *_filled(gradients, hidden)
    with working(head, rows):
        values, means, metrics, forward = score(head, rows, plan, targets)
        scores = Scores(rows.sums(values), rows.counts, None, None)
        _, slope = objective.for_parts(rows.counts).evaluate(scores, request.spec.backend, head.accumulator)
        upstream = rows.expand(slope).to(values.dtype)
        gradients = plan.backward(head, rows, forward.saved, forward.chunks, upstream)
    late = Gradients(*(None if part is None else part.to(late_dtype(part)) for part in gradients))
    return rows.scatter(values, targets), means, metrics, *_filled(late, hidden)


@linear_known_gradients.register_fake
def _(hidden, weight, bias, targets, cu_seqlens, token_weights, tensors, constants):  # type: ignore[no-untyped-def]
    request, _ = decode(constants, tensors)
    logp = hidden.new_empty(targets.shape, dtype=ACCUMULATOR[request.dtype])
    metrics = _fake_metrics(request.spec.token_metrics, logp)
    return logp, torch.empty_like(logp), metrics, *_fake_gradients(hidden, weight, bias, request, late=True)


class CompiledTokenLogpsFunction(torch.autograd.Function):
    """:class:`fused_pref.head.autograd.LinearTokenLogpsFunction` for a compiler."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        cu_seqlens: Tensor | None,
        call: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`linear_token_logps_fwd`."""
        logp, means, metrics, saved = linear_token_logps_fwd(hidden, weight, bias, targets, cu_seqlens, call)
        ctx.save_for_backward(hidden, weight, bias, targets, cu_seqlens, saved)
        ctx.call = call
        ctx.mark_non_differentiable(means, metrics)
        return logp, means, metrics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """See :func:`linear_token_logps_bwd`."""
        gradients = linear_token_logps_bwd(*ctx.saved_tensors, grads[0], ctx.call)
        return (*wanted_only(gradients), None, None, None)


def wanted_only(gradients: tuple[Tensor, ...]) -> Gradients:
    """None for the empty ones."""
    return Gradients(*(None if part.dim() == 1 and part.shape[0] == 0 else part for part in gradients))


def _fake_metrics(wanted: bool, logp: Tensor) -> Tensor:
    return logp.new_empty((3, *logp.shape) if wanted else (3, 0))


def _filled(gradients: Gradients, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = (like.new_empty(0) if part is None else part for part in gradients)
    return hidden, weight, bias


def _fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, request: HeadCall, *, late: bool
) -> tuple[Tensor, Tensor, Tensor]:
    parts = []
    for name, part in zip(GRADIENTS, (hidden, weight, bias), strict=True):
        if part is None or name not in request.wanted:
            parts.append(hidden.new_empty(0))
        else:
            parts.append(part.new_empty(part.shape, dtype=late_dtype(part) if late else part.dtype))
    return parts[0], parts[1], parts[2]
