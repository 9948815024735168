"""Rows of a product and their targets, scaled and brought to their places, against float64."""

import pytest
import torch

from fused_pref.ops.interface import TargetRows
from fused_pref.ops.torch import chunk

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("features", [64, 70])
@pytest.mark.parametrize("placed", [True, False])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_scatter_rows(
    dtype: torch.dtype, labelled: bool, placed: bool, features: int, backend: str, kernel_device: str
) -> None:
    """Also with a source and a weight that are stored by columns; rows of ``out`` that are not written stay."""
    module = chunk
    if backend == "triton":
        from fused_pref.ops.triton import chunk as module
    generator = torch.Generator().manual_seed(features)
    rows, columns, positions = 9, 5, 20
    source = torch.randn(features, rows, generator=generator).to(dtype).to(kernel_device).T
    weight = torch.randn(features, columns, generator=generator).to(dtype).to(kernel_device).T
    factor, q = torch.randn(2, rows, generator=generator).to(kernel_device)
    targets = torch.tensor([0, 4, -1, 5, 2, 2, -100, 3, 1], device=kernel_device)
    here = (targets >= 0) & (targets < columns)
    q = q * here
    indices = torch.randperm(positions, generator=generator)[:rows].to(kernel_device) if placed else None
    for by_columns in (True, False):
        given, own = (source, weight) if by_columns else (source.contiguous(), weight.contiguous())
        out = torch.full((positions, features), 7.0, dtype=dtype, device=kernel_device)
        module.scatter_rows(out, given, factor, indices, TargetRows(targets, q, own) if labelled else None)

        truth = source.double()
        if labelled:
            truth = truth + q.double()[:, None] * weight.double()[targets.where(here, 0)]
        expected = torch.full((positions, features), 7.0, dtype=torch.float64, device=kernel_device)
        expected[torch.arange(rows, device=kernel_device) if indices is None else indices] = truth * factor[:, None]
        torch.testing.assert_close(out.double(), expected, rtol=2 * ROUNDING[dtype], atol=1e-6)


@pytest.mark.usefixtures("poison")
def test_rows_are_scaled_where_they_are(kernel_device: str) -> None:
    from fused_pref.ops.triton import chunk as device_chunk

    for module in (chunk, device_chunk):
        rows = torch.randn(6, 40, device=kernel_device)
        factor = torch.linspace(-1, 1, 6, device=kernel_device)
        expected = rows * factor[:, None]
        module.scatter_rows(rows, rows, factor)
        torch.testing.assert_close(rows, expected)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_add_target_rows(
    dtype: torch.dtype, wide: bool, backend: str, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Targets that occur once, often, and not in this slice; sums are rounded once, though a block ends among them."""
    module = chunk
    if backend == "triton":
        from fused_pref.ops.triton import chunk as module
    monkeypatch.setattr(chunk, "CPU_BLOCK", 4 * 40)
    generator = torch.Generator().manual_seed(0)
    rows, columns, features = 30, 6, 40
    before = torch.randn(columns, features, generator=generator).to(torch.float32 if wide else dtype)
    h = torch.randn(features, rows, generator=generator).to(dtype).T
    targets = torch.randint(-1, columns + 1, (rows,), generator=generator)
    targets[:9] = 2
    here = (targets >= 0) & (targets < columns)
    factor = torch.randn(rows, generator=generator) * here
    truth = before.double()
    truth.index_add_(0, targets.where(here, 0), h.double() * factor.double()[:, None])

    dw, *given = (each.to(kernel_device) for each in (before.clone(), h, factor, targets))
    module.add_target_rows(dw, *given)
    # Triton's interpreter truncates where a GPU rounds to bfloat16.
    rounding = ROUNDING[dw.dtype] * (2 if backend == "triton" else 1)
    torch.testing.assert_close(dw.cpu().double(), truth, rtol=rounding, atol=3e-6)
