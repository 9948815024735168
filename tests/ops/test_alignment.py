"""Rows that begin and end on 16 bytes, and rows that do not, give the same numbers."""

import pytest
import torch
from harness import assert_gradient, assert_values

import fused_pref as fp

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# First column and number of columns of the rows within rows of 32 more: aligned in every dtype only if multiples of 8.
ROWS = [(0, 16), (8, 24), (0, 20), (4, 16), (1, 16), (0, 17)]


@pytest.mark.parametrize(("dtype", "softcap"), [(torch.float32, None), (torch.bfloat16, 5.0), (torch.float16, None)])
@pytest.mark.parametrize(("first", "columns"), ROWS)
def test_rows_within_wider_rows(
    first: int, columns: int, dtype: torch.dtype, softcap: float | None, device: str, backend: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = (torch.randn(3, 5, columns + 32, generator=generator) * 3).to(device, dtype)
    labels = torch.randint(0, columns, (3, 5), generator=generator).to(device)
    check(wide, first, columns, labels, softcap, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [3 * 8192, 3 * 8192 + 8, 3 * 8192 - 1])
def test_targets_at_the_edges_of_blocks(columns: int, dtype: torch.dtype, device: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    indices = [0, 1023, 1024, 4095, 4096, 8191, 8192, 16383, 16384, columns - 1]
    wide = torch.randn(1, len(indices), columns, generator=generator) * 3
    labels = torch.tensor([indices])
    # Targets with a good part of the mass: counting one among the others shows.
    wide.scatter_(2, labels[..., None], 15.0)
    check(wide.to(device, dtype), 0, columns, labels.to(device), None, backend)


def check(
    wide: torch.Tensor, first: int, columns: int, labels: torch.Tensor, softcap: float | None, backend: str
) -> None:
    ours, truth = wide.clone().requires_grad_(), wide.double().requires_grad_()
    logps = fp.token_logps(ours[..., first : first + columns], labels, shift=False, softcap=softcap, backend=backend)
    true_logps = fp.reference.token_logps(truth[..., first : first + columns], labels, shift=False, softcap=softcap)
    assert_values(logps, true_logps)
    weights = torch.linspace(-1, 2, labels.numel(), device=wide.device).view(labels.shape)
    (grad,) = torch.autograd.grad(logps, ours, weights)
    (true_grad,) = torch.autograd.grad(true_logps, truth, weights.double())
    # Triton's interpreter truncates where a GPU rounds to bfloat16.
    truncates = backend == "triton" and wide.device.type == "cpu" and wide.dtype == torch.bfloat16
    assert_gradient(grad, true_grad, 2**-7 if truncates else 5e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("first", "columns"), ROWS)
def test_aligned(first: int, columns: int, dtype: torch.dtype) -> None:
    logprob = pytest.importorskip("fused_pref.ops.triton.logprob")
    rows = torch.zeros(3, 5, columns + 32, dtype=dtype)[..., first : first + columns]
    entries = 16 // dtype.itemsize
    assert logprob.aligned(rows) == (first % entries == columns % entries == 0)
    assert logprob.aligned(rows[:, :-1]) == logprob.aligned(rows)
    assert not logprob.aligned(rows.mT)
