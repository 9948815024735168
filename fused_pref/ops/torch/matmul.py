"""GEMMs of the head (cuBLAS, oneDNN), in the dtypes and the memory that a device allows.

A device with ``mixed`` products gives float32 results of 16-bit entries. Elsewhere a 16-bit product comes out rounded
once; where several of them are summed, partial results are added in float32.
"""

import itertools

import torch
from torch import Tensor

from fused_pref.ops.blocks import ranges
from fused_pref.ops.devices import device_of

# Terms of an entry that a CPU's product may add up one after the other.
MAX_TERMS = 2**16
# Columns that are copied into rows at a time: what they touch stays in a cache.
BAND = 32


def mixed(x: Tensor) -> bool:
    """Whether products of this tensor can come out in float32 though its entries are 16-bit."""
    return x.dtype.itemsize == 2 and device_of(x.device.type).mixed


def upcast(x: Tensor) -> bool:
    """Whether products of this tensor are taken in float32: float16 results of large sums may overflow."""
    return x.dtype == torch.float16 and not mixed(x)


def product_dtype(x: Tensor) -> torch.dtype:
    """Dtype in which a product of this tensor comes out at its most exact."""
    return torch.float32 if mixed(x) or upcast(x) else x.dtype


def logits_dtype(x: Tensor) -> torch.dtype:
    """Dtype of the logits of these hidden states."""
    return torch.float32 if mixed(x) else x.dtype


def overlay(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The chunk's rows as entries of ``dtype``, at the start of the same memory."""
    return logits if logits.dtype == dtype else logits.view(dtype)[:, : logits.shape[1]]


def project(logits: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Chunk ← h weightᵀ + bias; (n, v) from (n, D), (v, D), (v,)."""
    if mixed(h):
        torch.mm(h, weight.t(), out_dtype=logits.dtype, out=logits)
        return logits if bias is None else logits.add_(bias)
    if bias is None:
        return torch.mm(h, weight.t(), out=logits)
    return torch.addmm(bias, h, weight.t(), out=logits)


def add_product(
    total: Tensor, a: Tensor, b: Tensor, *, fresh: bool, scale: Tensor | None = None, terms: int | None = None
) -> None:
    """Total ← a b, or total + a b if not ``fresh``; ``scale`` (0-d) multiplies the product in the dtype of ``total``.

    ``terms`` is the number of terms of an entry once all products are in; None: those of this one.
    Rows of ``total`` are worked in blocks where a partial result or an operand in memory of its own cannot be avoided.
    """
    terms = a.shape[1] if terms is None else terms
    direct = scale is None and total.dtype == a.dtype and not upcast(a)
    # A product comes out in the dtype of its entries or in float32.
    if scale is None and mixed(a) and total.dtype == torch.float32:
        if fresh:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        return
    columns_first = column_major(a)
    rows = max(1, total.shape[0]) if direct and not columns_first else device_of(a.device.type).columns
    copy = a.new_empty((min(rows, total.shape[0]), a.shape[1])) if columns_first else a
    for part in ranges(total.shape[0], rows):
        operand = contiguous_rows(a[part], copy[: part.stop - part.start]) if columns_first else a[part]
        if not direct:
            product = _product(operand, b)
            product = product if scale is None else product.to(total.dtype).mul_(scale)
            total[part] = product if fresh else product + total[part]
        elif a.device.type == "cpu" and terms > MAX_TERMS:
            _add_runs(total[part], operand, b, fresh=fresh)
        elif fresh:
            torch.mm(operand, b, out=total[part])
        else:
            total[part].addmm_(operand, b)


def _add_runs(total: Tensor, a: Tensor, b: Tensor, *, fresh: bool) -> None:
    """Total ← a b, or total + a b, by sums of at most ``MAX_TERMS`` terms: errors grow with the terms."""
    rows = max(1, device_of("cpu").scratch // (b.shape[1] * b.itemsize))
    for part, run in itertools.product(ranges(total.shape[0], rows), ranges(a.shape[1], MAX_TERMS)):
        product = torch.mm(a[part, run], b[run])
        if fresh and run.start == 0:
            total[part] = product
        else:
            total[part] += product


def column_major(a: Tensor) -> bool:
    """Whether a product first copies this operand into rows: 16-bit columns cost a CPU's product half its speed."""
    return a.dtype == torch.bfloat16 and not mixed(a) and a.stride(1) != 1


def contiguous_rows(a: Tensor, copy: Tensor) -> Tensor:
    """The operand copied into rows."""
    for band in ranges(a.shape[1], BAND):
        copy[:, band] = a[:, band]
    return copy


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The product of a and b, in float32 where the device can; float16 goes through float32 a block at a time."""
    if mixed(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    if not upcast(a):
        return torch.mm(a, b)
    total = torch.zeros((a.shape[0], b.shape[1]), device=a.device)
    step = device_of(a.device.type).columns
    for start in range(0, a.shape[1], step):
        total.addmm_(a[:, start : start + step].float(), b[start : start + step].float())
    return total
