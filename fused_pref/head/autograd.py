"""The autograd Functions: token log-probs of logits and of a linear head, and losses whose gradients are known."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_pref.head.engine import score, working
from fused_pref.head.plans.head import Gradients, Head
from fused_pref.head.plans.problem import Plan
from fused_pref.head.plans.shard import Shard
from fused_pref.layout import ValidRows
from fused_pref.losses.scores import expand_packed
from fused_pref.opaque import opaque
from fused_pref.ops.interface import ACCUMULATOR
from fused_pref.ops.torch import chunk as torch_chunk
from fused_pref.ops.torch.chunk import block_rows, ranges
from fused_pref.spec import Spec


def fake_tokens(like: Tensor, targets: Tensor, dtype: torch.dtype, spec: Spec) -> tuple[Tensor, Tensor, Tensor]:
    """Empty (logp, mean of z, metrics) of the positions, on the device of ``like``."""
    logp = like.new_empty(targets.shape, dtype=dtype)
    return logp, torch.empty_like(logp), logp.new_empty((3, *logp.shape) if spec.token_metrics else (3, 0))


def _fake_token_logps(logits: Tensor, targets: Tensor, spec: Spec) -> tuple[Tensor, ...]:
    logp, means, metrics = fake_tokens(logits, targets, ACCUMULATOR[logits.dtype], spec)
    return logp, logp.new_empty((3, *targets.shape)), means, metrics


@opaque(fake=_fake_token_logps)
def token_logps_fwd(logits: Tensor, targets: Tensor, spec: Spec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-prob of the label that each position scores.

    Returns:
        logp, shape of ``targets``: 0 where nothing is scored, NaN for a label outside the vocabulary;
        statistics (3, *targets.shape): what the gradient needs of each row, by the same backend;
        mean of z over the vocabulary, shape of ``targets``: 0 where ``logits_mean`` leaves it out, undefined without;
        with ``token_metrics`` those of :func:`fused_pref.ops.metrics.token_metrics`, (3, *targets.shape), else (3, 0).
        Float32, float64 for float64 logits.
    """
    arguments = (logits, targets, spec.logits_mean, spec.ignore_index, spec.transform, spec.token_metrics)
    if spec.backend == "triton":
        from fused_pref.ops.triton import logprob

        return logprob.token_logps_fwd(*arguments)
    return torch_chunk.token_logps_fwd(*arguments)


@opaque(fake=lambda *arguments: None, changes=1)
def token_logps_bwd(
    dlogits: Tensor, logits: Tensor, targets: Tensor, statistics: Tensor, grad_logp: Tensor, spec: Spec
) -> None:
    """Write the gradient of the logits, a_n (onehot − softmax) with a_n = ``grad_logp``, shaped like ``targets``.

    ``dlogits`` may be the logits; rows that score nothing are 0.
    """
    arguments = (dlogits, logits, targets, statistics, grad_logp, spec.ignore_index, spec.transform)
    if spec.backend == "triton":
        from fused_pref.ops.triton import dlogits as kernel

        kernel.token_logps_bwd(*arguments)
    else:
        torch_chunk.token_logps_bwd(*arguments)


class TokenLogpsFunction(torch.autograd.Function):
    """(logits, targets) → (logp, mean of z, metrics), per position; the gradient is a_n (onehot − softmax)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, spec: Spec) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`token_logps_fwd`."""
        logp, statistics, means, metrics = token_logps_fwd(logits, targets, spec)
        ctx.save_for_backward(logits, targets, statistics)
        ctx.spec, ctx.overwritten = spec, False
        ctx.mark_non_differentiable(means, metrics)
        if not torch.compiler.is_compiling():
            # Without this, autograd would make zeros as gradients of the means. Dynamo does not support the call, and
            # drops those gradients itself.
            ctx.set_materialize_grads(False)
        return logp, means, metrics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        """See :func:`token_logps_bwd`."""
        if grads[0] is None:
            return None, None, None
        if ctx.overwritten:
            raise RuntimeError(
                "inplace_backward=True: the logits were overwritten by their gradient; backward once, or leave "
                "inplace_backward out (see docs/faq.md#errors)"
            )
        logits, targets, statistics = ctx.saved_tensors
        inplace = ctx.spec.inplace_backward and not torch.compiler.is_compiling()
        with torch.no_grad():
            dlogits = logits.detach()
            if inplace:
                ctx.overwritten = True
            else:
                dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
            token_logps_bwd(dlogits, logits, targets, statistics, grads[0], ctx.spec)
        if torch.is_grad_enabled():
            dlogits = OnceDifferentiableFunction.apply(dlogits, logits)
        return dlogits, None, None


class OnceDifferentiableFunction(torch.autograd.Function):
    """Identity on a gradient made under ``create_graph=True``, tied to what it depends on so that using it raises.

    ``once_differentiable`` would leave it detached, and a gradient penalty would silently have no effect.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, source: Tensor) -> Tensor:
        """``gradient``, as a function of ``source``."""
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Refuse."""
        raise RuntimeError("fused_pref losses can be differentiated once: there is no second derivative")


class LinearTokenLogpsFunction(torch.autograd.Function):
    """(hidden, weight, bias, targets) → (logp, mean of z, metrics, dropped mass), per position; any upstream gradient.

    Metrics are (3, 0) where they are not asked for. The dropped mass is None without ``skip_mass``, 0 by any plan but
    ``skipping``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: Head,
        rows: ValidRows,
        plan: Plan,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """By any plan but ``grouped``; ``head`` has the same tensors."""
        ctx.call, ctx.rows, ctx.plan = head.call, rows, plan
        with working(head, rows):
            logp, means, metrics, forward = score(head, rows, plan, targets)
        dropped = None if head.call.spec.skip_mass is None else torch.zeros_like(means)
        dropped = dropped if forward.dropped is None else rows.scatter(forward.dropped, targets)
        ctx.chunks = forward.chunks
        ctx.save_for_backward(hidden, weight, bias, *forward.saved)
        ctx.mark_non_differentiable(*(means, metrics) if dropped is None else (means, metrics, dropped))
        ctx.set_materialize_grads(False)
        return rows.scatter(logp, targets), means, metrics, dropped

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """See :meth:`fused_pref.head.plans.problem.Plan.backward`."""
        if grads[0] is None:
            return (None,) * 7
        rows, (hidden, weight, bias, *saved) = ctx.rows, ctx.saved_tensors
        # Used up: a second backward computes them again.
        chunks, ctx.chunks = ctx.chunks, ()
        head, grad_logp = Head(ctx.call, hidden, weight, bias), rows.gather(grads[0])
        with torch.no_grad(), working(head, rows):
            gradients = ctx.plan.backward(head, rows, tuple(saved), chunks, grad_logp)
        gradients = _once(gradients, hidden, weight, bias) if torch.is_grad_enabled() else gradients
        return (*gradients, None, None, None, None)


class KnownSlopeFunction(torch.autograd.Function):
    """Attach what was computed from per-sequence sums to the log-probs of their tokens, by a slope that is known.

    That is a loss (0-d) with its slope ∂loss/∂sums (S,), or the sums (S,) themselves with None.
    """

    @staticmethod
    def forward(
        ctx: Any, logp: Tensor, cu_seqlens: Tensor | None, value: Tensor, slope: Tensor | None, backend: str
    ) -> Tensor:
        """``value`` itself; for a compiler a copy, because it would miss that ``value`` is changed in place."""
        ctx.save_for_backward(slope, cu_seqlens)
        ctx.tokens_shape, ctx.tokens_dtype, ctx.backend = logp.shape, logp.dtype, backend
        if torch.compiler.is_compiling():
            return value.clone()
        ctx.mark_dirty(value)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        """The gradient of a token is that of its sequence."""
        slope, cu_seqlens = ctx.saved_tensors
        shape, dtype = ctx.tokens_shape, ctx.tokens_dtype
        values, upstream = (grads[0], None) if slope is None else (slope, grads[0])
        if cu_seqlens is not None:
            tokens = expand_packed(values, upstream, cu_seqlens, shape[0], dtype, ctx.backend)
        elif upstream is None:
            tokens = values.to(dtype)[:, None].expand(shape)
        else:
            # Multiplied in float64, and rounded as it is written.
            tokens = torch.mul(values, upstream, out=values.new_empty(values.shape, dtype=dtype))[:, None].expand(shape)
        return tokens, None, None, None, None


class KnownGradientsFunction(torch.autograd.Function):
    """Attach a loss to the tensors it was computed from, by the gradients that were computed with it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss: Tensor,
        backend: str,
        shard: Shard | None,
        *gradients: Tensor | None,
    ) -> Tensor:
        """The loss, 0-d: ``loss`` itself; for a compiler a copy, as of :class:`KnownSlopeFunction`."""
        ctx.backend, ctx.shard = backend, shard
        ctx.save_for_backward(hidden, weight, bias, *gradients)
        if torch.compiler.is_compiling():
            return loss.clone()
        ctx.mark_dirty(loss)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Scale the gradients, in place where they are not needed again."""
        hidden, weight, bias, *known = ctx.saved_tensors
        with torch.no_grad():
            dh, dw, db = known
            # Rounded once: with a shard after the sum over the ranks.
            dtype = hidden.dtype if ctx.shard is None or dh is None else dh.dtype
            dtypes = (dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
            scaled = scale(Gradients(dh, dw, db), grads[0], dtypes, ctx.backend)
            if ctx.shard is not None and scaled.hidden is not None:
                scaled = scaled._replace(hidden=ctx.shard.reduce(scaled.hidden).to(hidden.dtype))
        result = _once(scaled, hidden, weight, bias) if torch.is_grad_enabled() else scaled
        return (*result, None, None, None, None, None, None)


# Whether a backward runs with ``retain_graph=True``; True where torch does not tell.
keeps_graph = getattr(getattr(torch._C, "_autograd", None), "_get_current_graph_task_keep_graph", lambda: True)


def scale(gradients: Gradients, upstream: Tensor, dtypes: tuple[torch.dtype, ...], backend: str) -> Gradients:
    """Gradients · upstream (0-d), multiplied in at least float32 and rounded once; in place where that can be."""
    fixed = torch.compiler.is_compiling() or keeps_graph()
    own = [g is not None and g.dtype == dtype and not fixed for g, dtype in zip(gradients, dtypes, strict=True)]
    if backend == "triton" and True in own:
        from fused_pref.ops.triton.scale import scale_

        scale_([g for g, same in zip(gradients, own, strict=True) if g is not None and same], upstream)
    results: list[Tensor | None] = []
    for gradient, dtype, same in zip(gradients, dtypes, own, strict=True):
        results.append(gradient)
        if gradient is None or (same and (backend == "triton" or (gradient.device.type == "cpu" and upstream == 1))):
            continue
        wide = torch.promote_types(gradient.dtype, torch.float32)
        if torch.compiler.is_compiling():
            results[-1] = (gradient.to(wide) * upstream.to(wide)).to(dtype)
            continue
        results[-1] = result = gradient if same else torch.empty_like(gradient, dtype=dtype)
        source, out = gradient.view(-1), result.view(-1)
        for part in ranges(source.numel(), block_rows(gradient.device)):
            out[part] = source[part].to(wide) * upstream.to(wide)
    return Gradients(*results)


def _once(gradients: Gradients, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of a backward under ``create_graph=True``, tied to their tensors so that using them raises."""
    return tuple(
        gradient if gradient is None or tensor is None else OnceDifferentiableFunction.apply(gradient, tensor)
        for gradient, tensor in zip(gradients, tensors, strict=True)
    )
