"""Where a kernel writes what its other threads have read: it does so when all of them have."""

import pytest
import torch

from fused_pref.ops.interface import LOGIT_SUM, Transform
from fused_pref.ops.torch.chunk import new_statistics
from fused_pref.ops.triton import chunk


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [40, 9000])
def test_chunk_and_statistics_in_place(columns: int, dtype: torch.dtype, kernel_device: str) -> None:
    """Q over the float32 logits that it comes from, in one block and in several; statistics over those of a slice."""
    logits = torch.randn(3, columns, device=kernel_device)
    targets = torch.tensor([0, columns - 1, columns // 2], device=kernel_device)
    statistics = new_statistics(3, logits, torch.float32)
    chunk.update_statistics(statistics, logits, targets, columns, Transform(), logit_sum=True)
    chunk.update_statistics(statistics, logits, targets, 0, Transform(), logit_sum=True)
    torch.testing.assert_close(statistics[LOGIT_SUM], 2 * logits.sum(1), rtol=1e-4, atol=1e-3)
    apart = torch.empty(3, columns, dtype=dtype, device=kernel_device)
    chunk.gradient(apart, logits, statistics, targets, 0, Transform())
    over = logits if dtype == torch.float32 else logits.view(dtype)[:, :columns]
    chunk.gradient(over, logits, statistics, targets, 0, Transform())
    assert torch.equal(over, apart)
