"""Sizes beyond those of the other tests: offsets past 2³¹ entries, many sequences, long ones, and large vocabularies.

Far rows lie in address space that is not backed by memory until it is touched: a result there has to be the one of the
same rows side by side. Whole rows of logits that lie far apart are also in ``test_kernels.py``.
"""

import mmap
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from harness import IGNORE, assert_linear_parity, assert_parity, make_batch, make_hidden, reference_logps
from probes import KERNEL, launches, memory, small_blocks
from torch import Tensor
from wrong_kernels import narrow_kernel

from fused_pref.cli.kernels import cases
from fused_pref.ops.devices import GPUS
from fused_pref.ops.interface import Operands, PairSpec, PairTerm, TargetRows, Transform
from fused_pref.ops.torch.chunk import new_statistics
from fused_pref.ops.triton import (
    chunk,
    configs,
    dlogits,
    exponentials,
    gemm,
    linear,
    logprob,
    pairs,
    scale,
    selected,
    sequences,
)
from fused_pref.spec import transform_of

# Between rows: the third, or the 33rd, lies beyond 2³¹ entries, and so does the 17th of a tile of the weight.
FAR, FAR_TILE, FAR_WEIGHT = 2**30 + 16, 2**26 + 16, 2**27 + 16
SOFTCAP = transform_of({"softcap": 5.0})


@pytest.fixture
def host(kernel_device: str) -> Iterator[None]:
    """The interpreter, whose 32-bit integers wrap as a GPU's do; it may touch nothing but the tensors of a launch."""
    if kernel_device != "cpu":
        pytest.skip("only the host has address space without memory")
    with memory():
        yield


def room(entries: int, dtype: torch.dtype) -> Tensor:
    """Address space of zeros that takes memory where it is touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        return torch.frombuffer(mmap.mmap(-1, entries * dtype.itemsize, flags=flags), dtype=dtype)
    except (OSError, OverflowError) as error:
        pytest.skip(f"no address space for {entries} entries: {error}")


def far(x: Tensor, *strides: int) -> Tensor:
    """A copy with these strides."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    assert last >= 2**31
    return room(last + 16, x.dtype).as_strided(x.shape, strides).copy_(x)


def tall(x: Tensor, rows: Tensor) -> Tensor:
    """A contiguous tensor of more than 2³¹ entries with x in these rows."""
    number, columns = int(rows.max()) + 1, x.shape[1]
    assert (number - 1) * columns >= 2**31
    result = room(number * columns, x.dtype).view(number, columns)
    result[rows] = x
    return result


def last_rows(number: int, columns: int) -> Tensor:
    """Numbers of rows on both sides of 2³¹ entries, and the first."""
    return torch.cat([torch.tensor([0]), 2**31 // columns - number // 2 + torch.arange(number - 1)])


# Offsets


@pytest.mark.usefixtures("host")
def test_a_32_bit_offset_is_noticed() -> None:
    x = torch.randn(3, 8)
    out = torch.zeros(3, 8)
    narrow_kernel[3,](x, out, 8, 8, BLOCK=8)
    assert torch.equal(out, x)
    with pytest.raises(Exception, match="out of bounds"):
        narrow_kernel[3,](far(x, FAR, 1), out, FAR, 8, BLOCK=8)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("processors", [0, 20], ids=["whole", "split"])
def test_logits(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Aligned rows, packed, into an ``out`` of its own."""
    small_blocks(monkeypatch, 16, processors)
    batch = make_batch(1, 4, 64, mask="none")
    logits, labels = batch.logits[0], batch.labels[0].int()
    grad = torch.randn(4)

    def step(z: Tensor, y: Tensor, out: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        logp, statistics, means, _ = logprob.token_logps_fwd(z, y, "all", IGNORE, SOFTCAP)
        dlogits.token_logps_bwd(out, z, y, statistics, upstream, IGNORE, SOFTCAP)
        return logp, statistics, means, out

    near = step(logits, labels, torch.zeros(4, 64), grad)
    there = step(far(logits, FAR, 1), labels, far(torch.zeros(4, 64), FAR, 1), far(grad, FAR))
    assert all(map(torch.equal, near, there))


@pytest.mark.usefixtures("host")
def test_chunk() -> None:
    logits, targets = torch.randn(3, 64), torch.tensor([3, 70, 63], dtype=torch.int32)

    def step(z: Tensor, y: Tensor, statistics: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        chunk.exponentials(out, z, statistics, y, SOFTCAP, IGNORE, logit_sum=True, apart=True)
        return statistics, out

    fresh = new_statistics(3, logits, torch.float32)
    near = step(logits, targets, fresh.clone(), torch.zeros(3, 64))
    there = far(logits, FAR, 1), far(targets, FAR), far(fresh, FAR, 1), far(torch.zeros(3, 64), FAR, 1)
    assert all(map(torch.equal, near, step(*there)))


@pytest.mark.usefixtures("host")
def test_finished_rows() -> None:
    """Log-probs from statistics, and targets taken out of Q, both with rows far apart."""
    statistics, q, targets = torch.rand(4, 3) + 1, torch.randn(3, 64), torch.tensor([3, IGNORE, 63], dtype=torch.int32)

    def step(s: Tensor, q: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return *chunk.finish(s, y, 64, IGNORE), chunk.take_targets(q, y, 0), q

    there = step(far(statistics, FAR, 1), far(q, FAR, 1), far(targets, FAR))
    assert all(map(torch.equal, step(statistics, q.clone(), targets), there))


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("by_columns", [False, True])
def test_scatter_rows(by_columns: bool) -> None:
    """From rows far apart, or rows of columns far apart, to rows of an ``out`` with more than 2³¹ entries."""
    source, weight, factor, q = torch.randn(3, 16), torch.randn(3, 16), torch.randn(3), torch.randn(3)
    targets, rows = torch.tensor([2, 0, 5]), last_rows(3, 16)
    strides = (1, 2**28) if by_columns else (FAR, 1)
    near, there = torch.zeros(3, 16), tall(torch.zeros(3, 16), rows)
    chunk.scatter_rows(near, source, factor, torch.arange(3), TargetRows(targets, q, weight))
    label = TargetRows(far(targets.int(), FAR), q, far(weight, *strides))
    chunk.scatter_rows(there, far(source, *strides), factor, rows, label)
    assert torch.equal(near, there[rows])


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("by_columns", [False, True])
def test_add_target_rows(by_columns: bool) -> None:
    """To rows of dW with more than 2³¹ entries."""
    dw, h, factor, rows = torch.randn(3, 16), torch.randn(5, 16), torch.randn(5), last_rows(3, 16)
    targets = torch.tensor([2, 0, 2, 1, 1])
    strides = (1, 2**28) if by_columns else (FAR, 1)
    near, there = dw.clone(), tall(dw, rows)
    chunk.add_target_rows(near, h, factor, targets)
    chunk.add_target_rows(there, far(h, *strides), factor, rows[targets])
    assert torch.equal(near, there[rows])


@pytest.mark.slow
@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("pointers", [False, True], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("by_index", [False, True])
def test_linear(by_index: bool, pointers: bool) -> None:
    """Hidden states, weight, Q and statistics; rows that are not whole 16 bytes are read by pointers.

    These have offsets in 32 bits within a tile of the weight, and the head takes no rows farther apart than here.
    """
    columns, between = (576, 2**22 - 1) if pointers else (40, FAR_WEIGHT)
    hidden, weight, targets = torch.randn(40, 16), torch.randn(columns, 16), torch.randint(0, columns, (40,))
    rows = last_rows(40, 16)

    def step(operands: Operands, statistics: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        linear.update_statistics(statistics, operands, targets, 0, SOFTCAP, logit_sum=True)
        linear.gradient(out, operands, statistics, targets, 0, SOFTCAP)
        return statistics, out

    fresh, out = new_statistics(40, hidden, torch.float32), torch.zeros(40, columns)
    near = step(Operands(hidden, weight, None, None), fresh.clone(), out.clone())
    away = (tall(hidden, rows), rows) if by_index else (far(hidden, FAR_TILE + pointers, 1), None)
    operands = Operands(away[0], far(weight, between, 1), None, away[1])
    found = step(operands, far(fresh, FAR, 1), far(out, FAR_TILE, 1))
    given = gemm.arguments(operands, configs.INTERPRETER_TILE)
    assert given["WEIGHT_DESCRIPTOR"] != pointers
    assert given["HIDDEN_DESCRIPTOR"] == (not pointers and not by_index)
    assert all(map(torch.equal, near, found))


@pytest.mark.slow
@pytest.mark.usefixtures("host")
def test_exponentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of rows that are computed again."""
    monkeypatch.setattr(exponentials, "PROBE", 16)
    hidden, weight, targets = torch.rand(40, 16), torch.randn(40, 16), torch.randint(0, 40, (40,))
    weight[39] = 20.0
    near, there = torch.zeros(40, 48), far(torch.zeros(40, 48), FAR_TILE, 1)
    for out in (near, there):
        fresh, operands = new_statistics(40, hidden, torch.float32), Operands(hidden, weight, None, None)
        linear.exponentials(out, operands, fresh, targets, Transform(), IGNORE, logit_sum=True)
    assert torch.equal(near, there)


@pytest.mark.usefixtures("host")
def test_selected() -> None:
    """Rows of Q, of the hidden states, of the weight, and of what is written."""
    q, hidden, weight, factor = torch.randn(40, 40), torch.randn(40, 16), torch.randn(40, 16), torch.randn(40)
    rows, count = last_rows(40, 16), torch.tensor(39, dtype=torch.int32)

    def step(q: Tensor, h: Tensor, w: Tensor, f: Tensor, own: Tensor, dw: Tensor, dh: Tensor) -> tuple[Tensor, ...]:
        db = torch.zeros(40)
        selected.weight_product(dw, q, h, own, count, None)
        selected.hidden_product(dh, q, w, own, count)
        selected.bias_product(db, q, f, own, count)
        return dw, dh[own], db

    empty = torch.zeros(40, 16)
    near = step(q, hidden, weight, factor, torch.arange(40), empty.clone(), empty.clone())
    factors = room(int(rows.max()) + 1, torch.float32)
    factors[rows] = factor
    away = far(q, FAR_TILE, 1), tall(hidden, rows), far(weight, FAR_TILE, 1)
    there = step(*away, factors, rows, far(empty, FAR_TILE, 1), tall(empty, rows))
    assert all(map(torch.equal, near, there))


@pytest.mark.usefixtures("host")
def test_scale() -> None:
    """The last block alone: all of them would take memory."""
    from triton.runtime.interpreter import interpreter_builder as builder

    number, run = 2**31 + 100, KERNEL.run
    x, last = room(number, torch.float16), configs.INTERPRETER.block
    x[-last:] = 1.0

    def launch(kernel: Any, *args: Any, grid: Any, **keywords: Any) -> Any:
        program = builder.create_get_program_id

        def shifted(axis: int) -> Any:
            handle = program(axis)
            handle.data = handle.data + (grid[0] - 1)
            return handle

        with mock.patch.object(builder, "create_get_program_id", shifted):
            return run(kernel, *args, grid=(1,), **keywords)

    with mock.patch.object(KERNEL, "run", launch):
        scale.scale_([x], torch.tensor(2.0))
    start = number // last * last
    assert (x[start:] == 2).all()
    assert (x[number - last : start] == 1).all()


@pytest.mark.parametrize("sizes", [(5,), (9000, 1), (1, 0, 20_000), (0,)], ids=str)
def test_scale_of_several(sizes: tuple[int, ...], kernel_device: str) -> None:
    """All in one launch, each in its own dtype."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    given = [torch.ones(size, dtype=dtype, device=kernel_device) for size, dtype in zip(sizes, dtypes, strict=False)]
    for factor in (1.0, 0.5):
        with launches() as recorder:
            scale.scale_(given, torch.tensor(factor, device=kernel_device))
        assert recorder.names == ["_scale_kernel"] * (sum(sizes) > 0)
        assert all((x == factor).all() for x in given)


@pytest.mark.usefixtures("host")
def test_sequences() -> None:
    """Tokens on both sides of 2³¹."""
    first = 2**31 - 1
    near, ends = torch.tensor([0, 2, 2, 8]), torch.tensor([0, 2, 2, 8]) + first
    logp, labels = torch.randn(8), torch.tensor([1, IGNORE, 2, 3, IGNORE, 4, 5, IGNORE], dtype=torch.int32)
    tokens, own = room(first + 8, torch.float32), room(first + 8, torch.int32)
    tokens[first:], own[first:] = logp, labels
    scored = sequences.targets_of(labels, near, IGNORE)
    assert scored.tolist() == [IGNORE, IGNORE, 3, IGNORE, 4, 5, IGNORE, IGNORE]
    expected = sequences.sequence_scores(logp, logp, scored, near, "all", IGNORE)
    assert expected[1].tolist() == [0, 0, 3]
    own[first:] = scored
    found = sequences.sequence_scores(tokens, tokens, own, ends, "all", IGNORE)
    assert all(map(torch.equal, expected, found))
    values = torch.randn(3, dtype=torch.float64)
    here, there = torch.empty(8), room(first + 8, torch.float32)
    sequences.expand(there, values, torch.tensor(0.5), ends)
    sequences.expand(here, values / 2, None, near)
    assert torch.equal(there[first:], here)


# Counts


def test_grids_hold_any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU takes 2³¹ − 1 programs along the first dimension of a grid and 65,535 along the others.

    These go through columns, in blocks of 1,024 and more, and never through rows or sequences.
    """
    larger = {cases.SEQUENCES: 2**20, cases.SEQUENCES + 1: 2**20, 4096: 2**20, 8192: 2**21, 16384: 2**22}
    grids: dict[str, tuple[int, ...]] = {}

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty([larger.get(size, size) for size in shape], dtype=dtype, device="meta")

    def launch(kernel: Any, *args: Any, grid: Any, **keywords: Any) -> None:
        grid = (*grid, 1, 1)[:3]
        grids[kernel.fn.__name__] = tuple(map(max, grid, grids.get(kernel.fn.__name__, grid)))

    monkeypatch.setattr(cases, "meta", meta)
    monkeypatch.setattr(KERNEL, "run", launch)
    monkeypatch.setattr(configs, "processors", lambda device: 108)
    for target in GPUS:
        monkeypatch.setattr(configs, "architecture", lambda device, target=target: target)
        for case in cases.CASES:
            for dtype in case.dtypes:
                case.launch(dtype)
    # Objectives are one program; rows are split where they are few; targets go in blocks.
    few = {"_targets_kernel", "_pair_objective_kernel", "_unpaired_objective_kernel", "_token_logps_combine_kernel"}
    assert {kernel for kernel, grid in grids.items() if grid[0] < 2**13} == few
    for kernel, grid in grids.items():
        assert grid[0] < 2**31, kernel
        assert max(grid[1:]) <= 2**21 // 1024, kernel


@pytest.mark.parametrize("name", ["cpo_loss", "dpo_loss", "bco_loss", "kto_loss"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_many_short_sequences(packed: bool, name: str, device: str) -> None:
    """100,000 sequences of one to three tokens, the third part of which score nothing."""
    count = 100_000
    batch = make_batch(count, 3, 8, mask="none", device=device)
    logits, labels, keywords = batch.logits, batch.labels, {"backend": "torch"}
    lengths = torch.arange(count, device=device) % 3 + 1
    inside = torch.arange(3, device=device) < lengths[:, None]
    if packed:
        logits, labels = logits[inside], labels[inside]
        keywords["cu_seqlens"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    else:
        labels[~inside] = IGNORE
    ref, flags = reference_logps(count, device), torch.arange(count, device=device) % 5 < 2
    arguments = {"dpo_loss": (ref,), "bco_loss": (flags, ref), "kto_loss": (flags, ref)}.get(name, ())
    assert_parity(name, logits, labels, *arguments, **keywords)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_one_long_sequence(packed: bool, device: str) -> None:
    """100,000 tokens."""
    batch = make_batch(1, 100_000, 8, mask="none", device=device)
    logits, labels, keywords = batch.logits, batch.labels, {"backend": "torch"}
    if packed:
        logits, labels, keywords["cu_seqlens"] = batch.packed([100_000])
    assert_parity("sequence_logps", logits, labels, average=True, **keywords)
    flag, ref = torch.tensor([True], device=device), torch.tensor([-2e5], device=device)
    assert_parity("bco_loss", logits, labels, flag, ref, beta=1e-5, **keywords)


@pytest.mark.slow
def test_reductions_in_kernels(kernel_device: str) -> None:
    """One sequence of 100,000 tokens, and 100,000 sequences in one program."""
    count = 100_000
    generator = torch.Generator().manual_seed(0)
    logp = torch.randn(count, generator=generator).to(kernel_device)
    labels = torch.randint(-1, 1, (count,), generator=generator).to(kernel_device)
    ends = torch.tensor([0, count], device=kernel_device)
    sums, counts, *_ = sequences.sequence_scores(logp, logp, labels, ends, "all", -1)
    torch.testing.assert_close(sums[0], logp.double().sum(), rtol=1e-12, atol=0)
    assert counts[0] == (labels == 0).sum()
    tokens = torch.empty_like(logp)
    sequences.expand(tokens, sums, None, ends)
    assert torch.equal(tokens, sums.float().expand(count))

    sums = logp.double()
    positions = torch.ones(count, dtype=torch.int64, device=kernel_device)
    spec = PairSpec((PairTerm("sigmoid"),), 0.1)
    scores = (sums, positions, sums, positions)
    loss, _, logps, rewards, _ = pairs.pair_objective(scores, None, None, None, None, None, spec)
    truth = -torch.nn.functional.logsigmoid(0.1 * (sums[: count // 2] - sums[count // 2 :])).mean()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    assert torch.equal(logps, logp)
    torch.testing.assert_close(rewards.double(), 0.1 * sums, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("columns", [262_144, 1_000_003])
def test_large_vocabulary(columns: int, backend: str, kernel_device: str) -> None:
    batch = make_batch(2, 1, columns, mask="none", device=kernel_device)
    assert_parity("cpo_loss", batch.logits, batch.labels, shift=False, backend=backend)


@pytest.mark.parametrize("columns", [262_144, 1_000_003])
def test_linear_head_with_a_large_vocabulary(columns: int, device: str) -> None:
    batch = make_hidden(2, 4, 8, columns, mask="none", bias=True, device=device)
    assert_linear_parity("linear_cpo_loss", batch, backend="torch")
