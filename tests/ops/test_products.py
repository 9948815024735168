"""The head's matrix products by the vendor's library, against float64."""

import pytest
import torch

from fused_pref.ops.devices import CPU, multiplies
from fused_pref.ops.torch.matmul import BAND, add_product, arithmetic

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("total_dtype", [None, torch.float32])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_add_product(
    dtype: torch.dtype, transposed: bool, total_dtype: torch.dtype | None, fresh: bool, scale: float | None
) -> None:
    """More rows than a block, more columns than two bands; what was in ``total`` stays or does not matter."""
    rows, inner = CPU.columns + 3, 2 * BAND + 5
    torch.manual_seed(0)
    a = torch.randn(inner, rows).to(dtype).t() if transposed else torch.randn(rows, inner).to(dtype)
    b = torch.randn(inner, 4).to(dtype)
    before = torch.randn(rows, 4).to(total_dtype or dtype)
    total = torch.full_like(before, torch.nan) if fresh else before.clone()
    add_product(total, a, b, fresh=fresh, scale=None if scale is None else torch.tensor(scale))
    truth = a.double() @ b.double() * (1.0 if scale is None else scale) + (0 if fresh else before.double())
    assert ((total.double() - truth).norm() / truth.norm()).item() < ROUNDING[dtype]
    assert arithmetic(dtype, "cpu").rows_first == (dtype == torch.bfloat16 and multiplies(dtype))
