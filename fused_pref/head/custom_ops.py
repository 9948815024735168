"""The linear head in a graph of ``torch.compile``: one op a pass, which keeps the number of scored tokens inside.

Arguments are those of :func:`fused_pref.head.engine.begin`. Eager calls do not come here.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_pref.head.autograd import fake_tokens
from fused_pref.head.engine import Objective, begin, evaluate_groups, score, working
from fused_pref.head.plans.grouped import Grouped
from fused_pref.head.plans.head import GRADIENTS, Batch, Gradients, HeadCall, late_dtype
from fused_pref.losses.scores import Scores
from fused_pref.opaque import opaque
from fused_pref.ops.interface import ACCUMULATOR, ENTROPY


def _fake_linear_token_logps(batch: Batch, call: HeadCall) -> tuple[Tensor | None, ...]:
    dtype, positions = ACCUMULATOR[call.dtype], batch.targets.numel()
    shape = (4, positions) if call.wanted != {"hidden"} else (positions, batch.hidden.shape[-1])
    saved = batch.hidden.new_empty(shape, dtype=dtype) if call.wanted else None
    return *fake_tokens(batch.hidden, batch.targets, dtype, call.spec), saved


@opaque(fake=_fake_linear_token_logps, reads=True)
def linear_token_logps_fwd(batch: Batch, call: HeadCall) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(logp, mean of z, metrics, what the backward needs): statistics (4, P), U (P, D), or None."""
    head, rows, plan = begin(call, batch)
    targets = batch.targets
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


@opaque(fake=lambda batch, saved, grad_logp, call: _fake_gradients(batch, call, late=False), reads=True)
def linear_token_logps_bwd(batch: Batch, saved: Tensor, grad_logp: Tensor, call: HeadCall) -> Gradients:
    """Gradients of hidden states, weight and bias."""
    head, rows, plan = begin(call, batch)
    upstream = rows.gather(grad_logp)
    with working(head, rows):
        if call.wanted == {"hidden"}:
            own = saved if rows.indices is None else saved.index_select(0, rows.indices)
        else:
            own = torch.stack([rows.gather(row) for row in saved])
        return replace(plan, saved=0).backward(head, rows, (own,), (), upstream)


def _fake_known_gradients(
    batch: Batch, token_weights: Tensor | None, call: HeadCall, objective: Objective
) -> tuple[Tensor | None, ...]:
    tokens = fake_tokens(batch.hidden, batch.targets, ACCUMULATOR[call.dtype], call.spec)
    return *tokens, *_fake_gradients(batch, call, late=True)


@opaque(fake=_fake_known_gradients, reads=True)
def linear_known_gradients(
    batch: Batch, token_weights: Tensor | None, call: HeadCall, objective: Objective
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(logp, mean of z, metrics, gradients of the loss) of an objective whose slopes are known unit by unit."""
    head, rows, plan = begin(call, batch, token_weights)
    if isinstance(plan, Grouped):
        tokens, gradients, _ = evaluate_groups(head, rows, plan, batch.targets, batch.cu_seqlens, objective)
        return tokens.logp, tokens.means, tokens.metrics, gradients.hidden, gradients.weight, gradients.bias
    with working(head, rows):
        values, means, metrics, forward = score(head, rows, plan, batch.targets)
        scores = Scores(rows.sums(values), rows.counts, None, None)
        _, slope = objective.for_parts(rows.counts).evaluate(scores, call.spec.backend, head.accumulator)
        upstream = rows.expand(slope).to(values.dtype)
        gradients = plan.backward(head, rows, forward.saved, forward.chunks, upstream)
    dh, dw, db = [None if part is None else part.to(late_dtype(part)) for part in gradients]
    return rows.scatter(values, batch.targets), means, metrics, dh, dw, db


class CompiledTokenLogpsFunction(torch.autograd.Function):
    """:class:`fused_pref.head.autograd.LinearTokenLogpsFunction` for a compiler."""

    @staticmethod
    def forward(ctx: Any, call: HeadCall, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`linear_token_logps_fwd`; ``tensors`` are those of a :class:`Batch`."""
        logp, means, metrics, saved = linear_token_logps_fwd(Batch(*tensors), call)
        ctx.save_for_backward(*tensors, saved)
        ctx.call = call
        ctx.mark_non_differentiable(means, metrics)
        return logp, means, metrics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """See :func:`linear_token_logps_bwd`."""
        *tensors, saved = ctx.saved_tensors
        return None, *linear_token_logps_bwd(Batch(*tensors), saved, grads[0], ctx.call), None, None


def _fake_gradients(batch: Batch, call: HeadCall, *, late: bool) -> Gradients:
    parts: list[Tensor | None] = []
    for name, part in zip(GRADIENTS, batch[:3], strict=True):
        if part is None or name not in call.wanted:
            parts.append(None)
        else:
            parts.append(part.new_empty(part.shape, dtype=late_dtype(part) if late else part.dtype))
    return Gradients(*parts)
