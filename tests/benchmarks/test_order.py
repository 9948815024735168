"""The order of tiles: the simulated cache, and the splits that are chosen by it."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.static import order
from benchmarks.static.gpus import GPUS
from benchmarks.static.order import Cache, Order, chosen, fewest, moved, steps_of
from fused_pref.ops.triton.gemm import tile_order, vocabulary_splits

GIB = 2**30


@triton.jit
def places_kernel(out, blocks, splits, GROUP: tl.constexpr):
    """Row block and split of every program."""
    block, split = tile_order(tl.program_id(0), blocks, splits, GROUP)
    tl.store(out + 2 * tl.program_id(0), block)
    tl.store(out + 2 * tl.program_id(0) + 1, split)


@pytest.mark.parametrize(("blocks", "splits", "group"), [(7, 3, 2), (5, 4, 16), (16, 1, 4)])
def test_the_order_is_that_of_the_kernels(blocks: int, splits: int, group: int, kernel_device: str) -> None:
    out = torch.empty(blocks * splits, 2, dtype=torch.int64, device=kernel_device)
    places_kernel[blocks * splits,](out, blocks, splits, GROUP=group)
    simulated = Order(blocks, 9, splits, group, 1, 1)
    assert [tuple(place) for place in out.tolist()] == simulated.programs(8)
    dealt = replace(simulated, run=1).programs(2)
    assert sorted(dealt) == sorted(simulated.programs(8))


def test_runs_go_to_one_die() -> None:
    """Every second program to each of two dies: with runs of three a die gets three that follow each other."""
    plain, dealt = Order(13, 1, 1, 16, 1, 1), Order(13, 1, 1, 16, 1, 1, run=3)
    blocks = [block for block, _ in dealt.programs(2)]
    assert blocks == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11, 12]
    assert [block for block, _ in plain.programs(2)] == list(range(13))


def test_a_cache_forgets_the_least_recently_used() -> None:
    cache = Cache(2)
    found = [cache.read((0, key, 0), 1) for key in (1, 2, 1, 3, 1, 2)]
    assert found == [False, False, True, False, True, False]
    assert (cache.missed, cache.held) == (4, 2)


def test_bytes_of_small_orders() -> None:
    """A cache that holds all reads all once; where it does not hold the rows, every tile reads them again."""
    small = Order(blocks=4, tiles=6, splits=1, group=16, row_bytes=1 << 20, column_bytes=1 << 20)
    assert moved(small, "sm_90") == (10 << 20, 10 << 20)
    large = replace(small, row_bytes=20 << 20)
    assert moved(large, "sm_90")[0] == (6 * 4 * 20 + 6) << 20
    assert moved(large, "sm_100", depths=4)[0] == (4 * 20 + 6) << 20


def test_the_figures_that_asked_for_it() -> None:
    """N=16384, D=4096, V=128256 on an H200: the fewest splits read the hidden states again for every tile."""
    order = chosen("sm_90", 16384, 4096, 128256)
    before = fewest(order, 132)
    assert before.splits == 1
    assert moved(before, "sm_90")[0] / GIB == pytest.approx(63.6, abs=0.1)
    assert moved(order, "sm_90")[0] / GIB < 10


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize(("rows", "columns"), [(2048, 128256), (8192, 128256), (16384, 128256), (32768, 32064)])
def test_chosen_splits(target: str, rows: int, columns: int) -> None:
    """About as soon done as can be, and never much more read than with the best of all numbers of splits."""
    order, processors = chosen(target, rows, 4096, columns), GPUS[target].processors
    least = steps_of(fewest(order, processors), processors)
    assert steps_of(order, processors) <= 1.02 * least
    others = [replace(order, splits=n) for n in range(1, min(order.tiles, 40))]
    alike = [one for one in others if steps_of(one, processors) <= 1.02 * least]
    assert alike
    read, little = moved(order, target)[0], 5 * GIB * columns / 128256
    assert read <= little or all(read <= 2.1 * moved(one, target)[0] for one in alike)


def test_the_page_has_a_row_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "SHAPES", ((2048, 1024, 32000),))
    lines = order.page(["sm_90", "gfx942"]).splitlines()
    rows = [line for line in lines if " (sm_90) " in line or " (gfx942) " in line]
    assert [row.split("|")[1].strip() for row in rows] == ["H200 (sm_90)", "MI300X (gfx942)"]
    assert rows[0].count("|") == len(order.HEADER) + 1


def splits_of(blocks: int, tiles: int, cache: int = 0) -> int:
    """On 132 processors, of row blocks of 1 MiB and tiles of 2 MiB."""
    return vocabulary_splits(blocks, tiles, 132, 16, 2**20, 2**21, cache)


def test_vocabulary_splits() -> None:
    """No fewer programs than processors where there are tiles for them, and the last is done as soon as can be."""
    assert splits_of(1, 1) == 1
    assert splits_of(1, 501) == 126
    assert splits_of(1000, 501, 2**40) in (1, 2, 3)
    for blocks, tiles in ((64, 501), (12, 501), (64, 1000)):
        parts = splits_of(blocks, tiles, 50 << 20)
        steps = -(-blocks * parts // 132) * -(-tiles // parts)
        assert steps <= 1.1 * blocks * tiles / 132 + 1


def test_vocabulary_splits_suit_the_cache() -> None:
    """As few as the cache allows: each more reads the weight once more."""
    assert [splits_of(128, 501, size << 20) for size in (50, 100, 200)] == [6, 2, 1]
