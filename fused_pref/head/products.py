"""The matrix products of the head by the vendor's library, in the dtypes and the memory that a device allows.

A device with ``mixed`` products gives float32 results of 16-bit entries. Elsewhere a 16-bit product comes out rounded
once; where several of them are summed, partial results are added in float32.
"""

import torch
from torch import Tensor

from fused_pref.head.plan import device_of


def mixed(x: Tensor) -> bool:
    """Whether products of this tensor can come out in float32 though its entries are 16-bit."""
    return x.dtype.itemsize == 2 and device_of(x.device.type).mixed


def upcast(x: Tensor) -> bool:
    """Whether products of this tensor are taken in float32: float16 results of large sums may overflow."""
    return x.dtype == torch.float16 and not mixed(x)


def product_dtype(x: Tensor) -> torch.dtype:
    """Dtype in which a product of this tensor comes out at its most exact."""
    return torch.float32 if mixed(x) or upcast(x) else x.dtype


def slab_dtype(x: Tensor) -> torch.dtype:
    """Dtype of the logits of these hidden states."""
    return torch.float32 if mixed(x) else x.dtype


def overlay(slab: Tensor, dtype: torch.dtype) -> Tensor:
    """The slab's rows as entries of ``dtype``, at the start of the same memory."""
    return slab if slab.dtype == dtype else slab.view(dtype)[:, : slab.shape[1]]


def project(slab: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Slab ← h weightᵀ + bias; (n, v) from (n, D), (v, D), (v,)."""
    if mixed(h):
        torch.mm(h, weight.t(), out_dtype=slab.dtype, out=slab)
        return slab if bias is None else slab.add_(bias)
    if bias is None:
        return torch.mm(h, weight.t(), out=slab)
    return torch.addmm(bias, h, weight.t(), out=slab)


def add_product(total: Tensor, a: Tensor, b: Tensor, *, fresh: bool, scale: Tensor | None = None) -> None:
    """Total ← a b, or total + a b if not ``fresh``; ``scale`` (0-d) multiplies the product in the dtype of ``total``.

    Rows of ``total`` are worked in blocks where a partial result in memory of its own cannot be avoided.
    """
    if scale is None and total.dtype == a.dtype and not upcast(a):
        if fresh:
            torch.mm(a, b, out=total)
        else:
            total.addmm_(a, b)
        return
    if scale is None and mixed(a):
        if fresh:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        return
    rows = device_of(a.device.type).columns
    for start in range(0, total.shape[0], rows):
        part = _product(a[start : start + rows], b)
        part = part if scale is None else part.to(total.dtype).mul_(scale)
        if fresh:
            total[start : start + rows] = part
        else:
            total[start : start + rows] += part


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
