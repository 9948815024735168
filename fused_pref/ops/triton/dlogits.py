"""Gradient of the logits, a_n (onehot − softmax), in one read and one write, also in place."""

import triton
import triton.language as tl
from torch import Tensor

from fused_pref.ops.interface import Transform
from fused_pref.ops.triton import configs
from fused_pref.ops.triton.helpers import column_of, exp, row_offset, transform, transform_backward
from fused_pref.ops.triton.launch import cdiv, launch, mark_changed
from fused_pref.ops.triton.logprob import aligned, factors, geometry


@triton.jit
def _token_logps_bwd_kernel(
    logits,  # [S, T, V] or [N_total, V]
    targets,  # [N_total]
    statistics,  # [3, N_total]
    grad_logp,  # [S, T] or [N_total]
    dlogits,  # shape of logits; may be logits
    rows, length, columns, logits_stride_s, logits_stride_t, logits_stride_v,
    grad_stride_s, grad_stride_t, dlogits_stride_s, dlogits_stride_t, dlogits_stride_v,
    ignore_index, inner, outer,
    TRANSFORM: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + row).to(tl.int64)
    column = column_of(y, columns)
    WIDTH: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth if ALIGNED else 1
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # The quotient tells the compiler that the end falls between two accesses.
    inside = cols < columns // WIDTH * WIDTH
    out = dlogits + row_offset(row, length, dlogits_stride_s, dlogits_stride_t, WIDTH)
    out += cols if ALIGNED else cols.to(tl.int64) * dlogits_stride_v
    dx = tl.zeros([BLOCK], tl.float32)
    if y != ignore_index:
        source = logits + row_offset(row, length, logits_stride_s, logits_stride_t, WIDTH)
        source += cols if ALIGNED else cols.to(tl.int64) * logits_stride_v
        x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        row_max = tl.load(statistics + row)
        total = tl.load(statistics + (row + rows))
        sum_exp = tl.load(statistics + (row + rows + rows))
        factor = tl.load(grad_logp + row_offset(row, length, grad_stride_s, grad_stride_t, 1)) / total
        p = exp(transform(x, inner, outer, TRANSFORM) - row_max)
        dz = tl.where(cols == column, factor * sum_exp, -factor * p)
        dx = transform_backward(dz, x, inner, outer, TRANSFORM)
    tl.store(out, dx.to(dlogits.dtype.element_ty), mask=inside)


def token_logps_bwd(
    dlogits: Tensor,
    logits: Tensor,
    targets: Tensor,
    statistics: Tensor,
    grad_logp: Tensor,
    ignore_index: int,
    transform: Transform,
) -> None:
    """Write the gradient into ``dlogits``, which may be ``logits``. One launch.

    ``grad_logp`` and the three rows of ``statistics`` are float32 of the shape of ``targets``; ``dlogits`` has the
    shape and dtype of ``logits``.
    """
    rows, columns = targets.numel(), logits.shape[-1]
    if rows == 0:
        return
    packed = logits.dim() == 2
    strides = {
        "grad_stride_s": 0 if packed else grad_logp.stride(0),
        "grad_stride_t": grad_logp.stride(-1),
        "dlogits_stride_s": 0 if packed else dlogits.stride(0),
        "dlogits_stride_t": dlogits.stride(-2),
        "dlogits_stride_v": dlogits.stride(-1),
    }

    def with_config(config: configs.Config) -> None:
        launch(
            _token_logps_bwd_kernel, (rows, cdiv(columns, config.block)), logits.device,
            logits, targets, statistics, grad_logp, dlogits,
            rows=rows, ignore_index=ignore_index, **geometry(logits), **strides, **factors(transform),
            ALIGNED=aligned(logits) and aligned(dlogits), BLOCK=config.block, **config.options,
        )  # fmt: skip

    default = configs.choose(configs.defaults(logits.device).backward, logits.device, logits.dtype, columns)
    if dlogits.data_ptr() != logits.data_ptr():  # in place it can be launched only once
        key = ("token_logps_bwd", logits.device, logits.dtype, columns)
        default = configs.chosen(*key, default, configs.CANDIDATES, with_config)
    with_config(default)
    mark_changed(dlogits)
