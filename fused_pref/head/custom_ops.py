"""The linear head in a graph of ``torch.compile``: one op a pass, which keeps the number of scored tokens inside.

Arguments are those of :func:`fused_pref.head.engine.begin`. Eager calls do not come here.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_pref.head.autograd import fake_metrics
from fused_pref.head.engine import Objective, begin, evaluate_groups, score, working
from fused_pref.head.plans.grouped import Grouped
from fused_pref.head.plans.head import GRADIENTS, Gradients, HeadCall, late_dtype
from fused_pref.losses.scores import Scores
from fused_pref.opaque import opaque
from fused_pref.ops.interface import ACCUMULATOR, ENTROPY


def _fake_linear_token_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cu_seqlens: Tensor | None, call: HeadCall
) -> tuple[Tensor | None, ...]:
    dtype = ACCUMULATOR[call.dtype]
    logp = hidden.new_empty(targets.shape, dtype=dtype)
    shape = (4, targets.numel()) if call.wanted != {"hidden"} else (targets.numel(), hidden.shape[-1])
    saved = hidden.new_empty(shape, dtype=dtype) if call.wanted else None
    return logp, torch.empty_like(logp), fake_metrics(call.spec, logp), saved


@opaque(fake=_fake_linear_token_logps, reads=True)
def linear_token_logps_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cu_seqlens: Tensor | None, call: HeadCall
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(logp, mean of z, metrics, what the backward needs): statistics (4, P), U (P, D), or None."""
    head, rows, plan = begin(call, hidden, weight, bias, targets, cu_seqlens)
    with working(head, rows):
        logp, means, metrics, forward = score(head, rows, replace(plan, saved=0), targets)
    saved = None
    if call.wanted == {"hidden"}:
        (u,) = forward.saved
        saved = u if rows.indices is None else u.new_zeros(targets.numel(), u.shape[1]).index_copy_(0, rows.indices, u)
    elif call.wanted:
        (statistics,) = forward.saved
        saved = torch.stack([rows.scatter(row, targets).flatten() for row in statistics[:ENTROPY]])
    return rows.scatter(logp, targets), means, metrics, saved


def _fake_linear_bwd(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *others: Any) -> Gradients:
    return _fake_gradients((hidden, weight, bias), others[-1], late=False)


@opaque(fake=_fake_linear_bwd, reads=True)
def linear_token_logps_bwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    grad_logp: Tensor,
    call: HeadCall,
) -> Gradients:
    """Gradients of hidden states, weight and bias."""
    head, rows, plan = begin(call, hidden, weight, bias, targets, cu_seqlens)
    upstream = rows.gather(grad_logp)
    with working(head, rows):
        if call.wanted == {"hidden"}:
            own = saved if rows.indices is None else saved.index_select(0, rows.indices)
        else:
            own = torch.stack([rows.gather(row) for row in saved])
        return replace(plan, saved=0).backward(head, rows, (own,), (), upstream)


def _fake_known_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *others: Any
) -> tuple[Tensor | None, ...]:
    call: HeadCall = others[-2]
    logp = hidden.new_empty(targets.shape, dtype=ACCUMULATOR[call.dtype])
    gradients = _fake_gradients((hidden, weight, bias), call, late=True)
    return logp, torch.empty_like(logp), fake_metrics(call.spec, logp), *gradients


@opaque(fake=_fake_known_gradients, reads=True)
def linear_known_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    call: HeadCall,
    objective: Objective,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(logp, mean of z, metrics, gradients of the loss) of an objective whose slopes are known unit by unit."""
    head, rows, plan = begin(call, hidden, weight, bias, targets, cu_seqlens, token_weights)
    if isinstance(plan, Grouped):
        tokens, gradients, _ = evaluate_groups(head, rows, plan, targets, cu_seqlens, objective)
        return tokens.logp, tokens.means, tokens.metrics, gradients.hidden, gradients.weight, gradients.bias
    with working(head, rows):
        values, means, metrics, forward = score(head, rows, plan, targets)
        scores = Scores(rows.sums(values), rows.counts, None, None)
        _, slope = objective.for_parts(rows.counts).evaluate(scores, call.spec.backend, head.accumulator)
        upstream = rows.expand(slope).to(values.dtype)
        gradients = plan.backward(head, rows, forward.saved, forward.chunks, upstream)
    dh, dw, db = [None if part is None else part.to(late_dtype(part)) for part in gradients]
    return rows.scatter(values, targets), means, metrics, dh, dw, db


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
        call: HeadCall,
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
        arguments: Any = (*ctx.saved_tensors, grads[0], ctx.call)
        return (*linear_token_logps_bwd(*arguments), None, None, None)


def _fake_gradients(tensors: tuple[Tensor | None, ...], call: HeadCall, *, late: bool) -> Gradients:
    parts: list[Tensor | None] = []
    for name, part in zip(GRADIENTS, tensors, strict=True):
        if part is None or name not in call.wanted:
            parts.append(None)
        else:
            parts.append(part.new_empty(part.shape, dtype=late_dtype(part) if late else part.dtype))
    return Gradients(*parts)
