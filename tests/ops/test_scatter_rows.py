"""What is done by rows, against float64: their results, their targets, and rows brought to their places."""

import pytest
import torch

from fused_pref.ops.interface import TargetRows
from fused_pref.ops.torch import chunk

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
INF, NAN = torch.inf, torch.nan


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("labels", [torch.int64, torch.int32])
def test_finish(labels: torch.dtype, kernel_device: str) -> None:
    """More rows than a program has; likely and unlikely targets, one entry alone, none, and what is not finite."""
    from fused_pref.ops.triton import chunk as device_chunk

    generator, rows, columns = torch.Generator().manual_seed(0), 300, 50
    statistics = torch.randn(8, rows, generator=generator) * 10
    statistics[1] = statistics[1].abs() + 1
    least = torch.finfo(torch.float32).min
    hard = [
        (5, 3, 90),
        (5, 3, -90),
        (least, 0, 7),
        (5, 3, -INF),
        (least, 0, -INF),
        (NAN, NAN, 3),
        (5, 3, NAN),
        (5, 3, INF),
    ]
    statistics[:3, : len(hard)] = torch.tensor(hard).T
    targets = torch.randint(0, columns, (rows,), generator=generator, dtype=labels)
    targets[100:103] = torch.tensor([-100, -1, columns])
    truth = chunk.finish(statistics.double(), targets, columns, -100)
    given = statistics.to(kernel_device)[:4], targets.to(kernel_device)
    for found, expected in zip(device_chunk.finish(*given, columns, -100), truth, strict=True):
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-30, equal_nan=True)
    assert [part[100].item() for part in truth] == [0, 0]
    assert all(part[101:103].isnan().all() for part in truth)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_take_targets(dtype: torch.dtype, backend: str, kernel_device: str) -> None:
    """Of a slice of the vocabulary in the first columns of wider rows; other entries stay."""
    module = chunk
    if backend == "triton":
        from fused_pref.ops.triton import chunk as module
    wide = torch.randn(300, 40).to(kernel_device, dtype)
    before, targets = wide.clone(), torch.randint(90, 150, (300,)).to(kernel_device)
    taken = module.take_targets(wide[:, :33], targets, 100)
    own = torch.zeros(300, 200, dtype=torch.bool, device=kernel_device).scatter_(1, targets[:, None], True)[:, 100:140]
    own[:, 33:] = False
    assert taken.dtype == torch.float32
    assert torch.equal(taken, before.where(own, 0).float().sum(1))
    assert torch.equal(wide, before.masked_fill(own, 0))


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
