"""GEMMs of the head (cuBLAS, oneDNN), in the dtypes and the memory that a device allows.

A device with ``mixed`` products gives float32 results of 16-bit entries. A CPU may multiply float32 faster than 16-bit
entries: there logits and Q are float32, and 16-bit rows are made float32 a block at a time. Elsewhere a 16-bit product
comes out rounded once; where several of them are summed, partial results are added in float32.
"""

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_pref.ops.devices import device_of, multiplies
from fused_pref.ops.torch.chunk import ranges

# Terms of an entry that a CPU's product may add up one after the other.
MAX_TERMS = 2**16
# Columns that are copied into rows at a time: what they touch stays in a cache.
BAND = 32


@dataclass(frozen=True)
class Arithmetic:
    """How products of one dtype come out on one kind of device.

    Attributes:
        mixed: whether products of 16-bit entries come out in float32.
        upcast: whether operands are made float32 first: on a CPU that multiplies 16-bit entries more slowly, and
            of float16, whose sums may overflow.
        logits: dtype of the logits.
        q: dtype of Q, which is written over them.
        product: the most exact dtype of a product.
        rows_first: whether an operand that lies by columns is copied into rows first: 16-bit columns cost a CPU's
            product half its speed.
        block: rows, or terms, that a product works at a time where it needs memory of its own.
        scratch: bytes of that memory.
    """

    mixed: bool
    upcast: bool
    logits: torch.dtype
    q: torch.dtype
    product: torch.dtype
    rows_first: bool
    block: int
    scratch: int


@functools.cache
def arithmetic(dtype: torch.dtype, kind: str) -> Arithmetic:
    """Of this dtype on devices of this kind."""
    device = device_of(kind)
    mixed = dtype.itemsize == 2 and device.mixed
    upcast = dtype.itemsize == 2 and not mixed and not multiplies(dtype)
    return Arithmetic(
        mixed=mixed,
        upcast=upcast,
        logits=torch.float32 if mixed or upcast else dtype,
        q=torch.float32 if upcast else dtype,
        product=torch.float32 if mixed or upcast else dtype,
        rows_first=dtype == torch.bfloat16 and not mixed and not upcast,
        block=device.columns,
        scratch=device.scratch,
    )


def overlay(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The chunk's rows as entries of ``dtype``, at the start of the same memory."""
    return logits if logits.dtype == dtype else logits.view(dtype)[:, : logits.shape[1]]


def project(logits: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Chunk ← h weightᵀ + bias; (n, v) from (n, D), (v, D), (v,)."""
    if arithmetic(h.dtype, h.device.type).upcast:
        return _project_upcast(logits, h, weight, bias)
    if logits.dtype != h.dtype:
        torch.mm(h, weight.t(), out_dtype=logits.dtype, out=logits)
        return logits if bias is None else logits.add_(bias)
    if bias is None:
        return torch.mm(h, weight.t(), out=logits)
    return torch.addmm(bias, h, weight.t(), out=logits)


def _project_upcast(logits: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same in float32, a block of rows and a block of the vocabulary at a time."""
    block = arithmetic(h.dtype, h.device.type).block
    # Memory that is new for each block would cost more than the conversion.
    own, slices = (logits.new_empty((min(x.shape[0], block), x.shape[1])) for x in (h, weight))
    for rows in ranges(h.shape[0], block):
        left = own[: rows.stop - rows.start].copy_(h[rows])
        for columns in ranges(weight.shape[0], block):
            right = slices[: columns.stop - columns.start].copy_(weight[columns])
            torch.mm(left, right.t(), out=logits[rows, columns])
    return logits if bias is None else logits.add_(bias)


def add_product(
    total: Tensor, a: Tensor, b: Tensor, *, fresh: bool, scale: Tensor | None = None, terms: int | None = None
) -> None:
    """Total ← a b, or total + a b if not ``fresh``; ``scale`` (0-d) multiplies the product in the dtype of ``total``.

    ``terms`` is the number of terms of an entry once all products are in; None: those of this one. A 16-bit b is made
    float32 a block at a time where a and the total are.
    Rows of ``total`` are worked in blocks where a partial result or an operand in memory of its own cannot be avoided.
    """
    terms, kind = a.shape[1] if terms is None else terms, arithmetic(a.dtype, a.device.type)
    if b.itemsize < a.itemsize:
        copy = a.new_empty((min(b.shape[0], kind.block), b.shape[1]))
        for part in ranges(a.shape[1], kind.block):
            block = copy[: part.stop - part.start].copy_(b[part])
            if fresh and part.start == 0:
                torch.mm(a[:, part], block, out=total)
            else:
                total.addmm_(a[:, part], block)
        return
    direct = scale is None and total.dtype == a.dtype and not kind.upcast
    # A product comes out in the dtype of its entries or in float32.
    if scale is None and kind.mixed and total.dtype == torch.float32:
        if fresh:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        return
    columns_first = kind.rows_first and a.stride(1) != 1
    rows = max(1, total.shape[0]) if direct and not columns_first else kind.block
    copy = a.new_empty((min(rows, total.shape[0]), a.shape[1])) if columns_first else a
    for part in ranges(total.shape[0], rows):
        operand = contiguous_rows(a[part], copy[: part.stop - part.start]) if columns_first else a[part]
        if not direct:
            product = _product(operand, b)
            product = product if scale is None else product.to(total.dtype).mul_(scale)
            total[part] = product if fresh else product + total[part]
            del product
        elif a.device.type == "cpu" and terms > MAX_TERMS:
            _add_runs(total[part], operand, b, fresh=fresh)
        elif fresh:
            torch.mm(operand, b, out=total[part])
        else:
            total[part].addmm_(operand, b)


def _add_runs(total: Tensor, a: Tensor, b: Tensor, *, fresh: bool) -> None:
    """Total ← a b, or total + a b, by sums of at most ``MAX_TERMS`` terms: errors grow with the terms."""
    rows = max(1, arithmetic(a.dtype, "cpu").scratch // (b.shape[1] * b.itemsize))
    for part, run in itertools.product(ranges(total.shape[0], rows), ranges(a.shape[1], MAX_TERMS)):
        product = torch.mm(a[part, run], b[run])
        if fresh and run.start == 0:
            total[part] = product
        else:
            total[part] += product


def contiguous_rows(a: Tensor, copy: Tensor) -> Tensor:
    """The operand copied into rows."""
    for band in ranges(a.shape[1], BAND):
        copy[:, band] = a[:, band]
    return copy


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The product of a and b, in float32 where the device can; float16 goes through float32 a block at a time."""
    kind = arithmetic(a.dtype, a.device.type)
    if kind.mixed:
        return torch.mm(a, b, out_dtype=torch.float32)
    if not kind.upcast:
        return torch.mm(a, b)
    total = torch.zeros((a.shape[0], b.shape[1]), device=a.device)
    for part in ranges(a.shape[1], kind.block):
        total.addmm_(a[:, part].float(), b[part].float())
    return total
