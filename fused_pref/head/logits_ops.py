"""The token operations as custom ops: opaque to ``torch.compile``, one schema for every backend.

All take the batch as ``logits`` ((S, T, V) or (N_total, V), any strides), ``labels`` ((S, T) or (N_total,)) and
``cu_seqlens`` ((S+1,) or None), and the constants of :class:`fused_pref.head.spec.LogitsSpec`.
"""

import torch
from torch import Tensor

from fused_pref.layout import targets_of
from fused_pref.ops.interface import Transform, accumulator_dtype
from fused_pref.ops.torch import logits as torch_logits


@torch.library.custom_op("fused_pref::token_logps_fwd", mutates_args=())
def token_logps_fwd(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    logits_mean: str | None,
    backend: str,
    shift: bool,
    ignore_index: int,
    activation: str,
    inner: float,
    outer: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of the label that each position scores.

    Returns:
        logp, shape of ``labels``: 0 where nothing is scored, NaN for a label outside the vocabulary;
        statistics (3, *labels.shape): row maximum of z, Σ exp(z − maximum), and the same sum without the target;
        mean of z over the vocabulary, shape of ``labels``: 0 where ``logits_mean`` does not ask for it.
        Float32, float64 for float64 logits.
    """
    transform = Transform(activation, inner, outer)
    if backend == "triton":
        from fused_pref.ops.triton import logprob

        return logprob.token_logps_fwd(logits, labels, cu_seqlens, logits_mean, shift, ignore_index, transform)
    targets = targets_of(labels, cu_seqlens, shift=shift, ignore_index=ignore_index)
    dtype = accumulator_dtype(logits.dtype)
    return torch_logits.token_logps_fwd(logits, targets, ignore_index, transform, logits_mean, dtype)


@token_logps_fwd.register_fake
def _(logits, labels, cu_seqlens, logits_mean, *constants):  # type: ignore[no-untyped-def]
    dtype = accumulator_dtype(logits.dtype)
    statistics = logits.new_empty((3, *labels.shape), dtype=dtype)
    return logits.new_empty(labels.shape, dtype=dtype), statistics, logits.new_empty(labels.shape, dtype=dtype)


@torch.library.custom_op("fused_pref::token_logps_bwd", mutates_args=())
def token_logps_bwd(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    statistics: Tensor,
    grad_logp: Tensor,
    backend: str,
    shift: bool,
    ignore_index: int,
    activation: str,
    inner: float,
    outer: float,
) -> Tensor:
    """Gradient of the logits, a_n (onehot − softmax) with a_n = ``grad_logp``, shaped like ``labels``.

    Returns:
        Contiguous, shape and dtype of ``logits``; rows that score nothing are 0.
    """
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    transform = Transform(activation, inner, outer)
    _gradient_into(dlogits, logits, labels, cu_seqlens, statistics, grad_logp, backend, shift, ignore_index, transform)
    return dlogits


@token_logps_bwd.register_fake
def _(logits, *arguments):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("fused_pref::token_logps_bwd_", mutates_args=("logits",))
def token_logps_bwd_(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    statistics: Tensor,
    grad_logp: Tensor,
    backend: str,
    shift: bool,
    ignore_index: int,
    activation: str,
    inner: float,
    outer: float,
) -> None:
    """As :func:`token_logps_bwd`, over the logits."""
    transform = Transform(activation, inner, outer)
    _gradient_into(logits, logits, labels, cu_seqlens, statistics, grad_logp, backend, shift, ignore_index, transform)


def _gradient_into(
    dlogits: Tensor,
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    statistics: Tensor,
    grad_logp: Tensor,
    backend: str,
    shift: bool,
    ignore_index: int,
    transform: Transform,
) -> None:
    if backend == "triton":
        from fused_pref.ops.triton import dlogits as kernel

        kernel.token_logps_bwd(
            dlogits, logits, labels, cu_seqlens, statistics, grad_logp, shift, ignore_index, transform
        )
    else:
        targets = targets_of(labels, cu_seqlens, shift=shift, ignore_index=ignore_index)
        torch_logits.token_logps_bwd(dlogits, logits, targets, statistics, grad_logp, ignore_index, transform)
