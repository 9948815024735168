"""Gradient of the logits, a_n (onehot − softmax), in one read and one write, also in place."""

# A launch takes arguments that the kernel does not declare (num_warps), and device code is not Python.
# pyright: reportCallIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl
from torch import Tensor

from fused_pref.head.spec import Transform
from fused_pref.kernels import configs
from fused_pref.kernels.helpers import chain, target_of, transform
from fused_pref.kernels.logprob import factors, geometry


@triton.jit
def _token_logps_bwd_kernel(
    logits,  # [S, T, V] or [N_total, V]
    labels,  # [S, T] or [N_total]
    cu_seqlens,  # [S+1] or None
    statistics,  # [3, N]
    grad_logp,  # [S, T] or [N_total]
    dlogits,  # shape of logits; may be logits
    rows, length, columns, sequences,
    logits_stride_s, logits_stride_t, logits_stride_v, labels_stride_s, labels_stride_t,
    grad_stride_s, grad_stride_t, dlogits_stride_s, dlogits_stride_t, dlogits_stride_v,
    ignore_index, inner, outer,
    PACKED: tl.constexpr, SHIFT: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    y = target_of(
        row, labels, cu_seqlens, length, sequences, labels_stride_s, labels_stride_t, ignore_index, PACKED, SHIFT
    )
    s = row // length
    t = row - s * length
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = cols if UNIT else cols.to(tl.int64) * logits_stride_v
    sink = cols if UNIT else cols.to(tl.int64) * dlogits_stride_v
    out = dlogits + s * dlogits_stride_s + t * dlogits_stride_t + sink
    if y != ignore_index:
        base = logits + s * logits_stride_s + t * logits_stride_t
        x = tl.load(base + source, mask=cols < columns, other=0.0).to(tl.float32)
        top = tl.load(statistics + row)
        total = tl.load(statistics + rows + row)
        others = tl.load(statistics + 2 * rows + row)
        factor = tl.load(grad_logp + s * grad_stride_s + t * grad_stride_t) / total
        p = tl.exp(transform(x, inner, outer, SOFTCAP) - top)
        dz = factor * tl.where(cols == y, others, -p)
        dx = chain(dz, x, inner, outer, SOFTCAP)
        tl.store(out, dx.to(dlogits.dtype.element_ty), mask=cols < columns)
    else:
        tl.store(out, tl.zeros([BLOCK], dlogits.dtype.element_ty), mask=cols < columns)


def token_logps_bwd(
    dlogits: Tensor,
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    statistics: Tensor,
    grad_logp: Tensor,
    shift: bool,
    ignore_index: int,
    constants: Transform,
) -> None:
    """Write the gradient into ``dlogits``, which may be ``logits``. One launch."""
    rows, columns = labels.numel(), logits.shape[-1]
    if rows == 0:
        return
    batch = geometry(logits, labels, cu_seqlens)
    packed = cu_seqlens is not None
    strides = {
        "grad_stride_s": 0 if packed else grad_logp.stride(0),
        "grad_stride_t": grad_logp.stride(-1),
        "dlogits_stride_s": 0 if packed else dlogits.stride(0),
        "dlogits_stride_t": dlogits.stride(-2),
        "dlogits_stride_v": dlogits.stride(-1),
    }

    def launch(config: configs.Config) -> None:
        _token_logps_bwd_kernel[rows, triton.cdiv(columns, config.block)](
            logits, labels, cu_seqlens, statistics, grad_logp, dlogits,
            rows=rows, ignore_index=ignore_index, **batch, **strides, **factors(constants),
            PACKED=packed, SHIFT=shift, UNIT=logits.stride(-1) == dlogits.stride(-1) == 1,
            BLOCK=config.block, num_warps=config.num_warps,
        )  # fmt: skip

    default = configs.choose(configs.BACKWARD, logits.device, logits.dtype, columns)
    in_place = dlogits.data_ptr() == logits.data_ptr()
    launch(default if in_place else configs.tuned(("token_logps_bwd", logits.dtype, columns), default, launch))
