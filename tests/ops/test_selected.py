"""Products of selected rows, whose number the device alone knows: values, and that nothing beyond it is touched."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from harness import make_hidden, reference_logps
from head_cases import narrowed
from probes import Memory, launches, watching
from torch import Tensor

from fused_pref.head import engine
from fused_pref.head.plans import planner as plan
from fused_pref.head.plans.head import Head, HeadCall
from fused_pref.keywords import LinearKeywords, table
from fused_pref.layout import targets_of, valid_rows
from fused_pref.ops.interface import Transform
from fused_pref.ops.triton import gemm, linear, selected
from fused_pref.spec import linear_spec

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# N, D and v, and how many of the N rows are selected.
SHAPES = [(1, 1, 1, 1), (5, 31, 2, 0), (17, 16, 67, 17), (40, 8, 33, 18), (33, 48, 32, 1)]


@pytest.fixture(autouse=True)
def watch(kernel_device: str, poison: None) -> Iterator[Memory | None]:
    """Interpreted kernels may touch nothing but the tensors of their launch."""
    with watching(kernel_device) as watched:
        yield watched


def lists(rows: int, number: int, device: str) -> tuple[Tensor, Tensor]:
    indices = torch.randperm(rows, generator=torch.Generator().manual_seed(rows))
    return indices.to(device), torch.tensor(number, dtype=torch.int32, device=device)


def close(ours: Tensor, truth: Tensor, tolerance: float) -> None:
    assert ours.isfinite().all()
    assert (ours.double() - truth).norm() <= tolerance * truth.norm() + 1e-12


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(shape: tuple[int, int, int, int], dtype: torch.dtype, kernel_device: str) -> None:
    """What Q holds beyond the selected rows is NaN, and so is what is to be written."""
    rows, features, columns, number = shape
    indices, count = lists(rows, number, kernel_device)
    torch.manual_seed(0)
    q = torch.randn(rows, columns + 3).to(kernel_device, dtype)[:, :columns]
    q[number:] = torch.nan
    hidden, weight = torch.randn(rows, features).to(q), torch.randn(columns, features).to(q)
    factor, scale = torch.randn(rows, device=kernel_device), torch.tensor(0.25, device=kernel_device)
    wide, own = q[:number].double(), indices[:number]

    for out_dtype, given in ((dtype, None), (torch.float32, scale)):
        out = torch.full((columns, features), torch.nan, dtype=out_dtype, device=kernel_device)
        selected.weight_product(out, q, hidden, indices, count, given)
        close(out, wide.t() @ hidden[own].double() * (1.0 if given is None else 0.25), ROUNDING[out_dtype])

    before = torch.randn(rows, features, device=kernel_device)
    sums, truth = before.clone(), before.double()
    truth[own] += wide @ weight.double()
    selected.hidden_product(sums, q, weight, indices, count)
    close(sums, truth, 2e-6)
    untouched = torch.ones(rows, dtype=torch.bool, device=kernel_device).index_fill_(0, own, False)
    assert torch.equal(sums[untouched], before[untouched])

    out = torch.full((columns,), torch.nan, device=kernel_device)
    selected.bias_product(out, q, factor, indices, count)
    close(out, wide.t() @ factor[own].double(), 2e-6)


@pytest.mark.parametrize("constants", [Transform(), Transform("tanh", -1.7 / 3, 3 / 0.6)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient(
    shape: tuple[int, int, int, int], constants: Transform, kernel_device: str, watch: Memory | None
) -> None:
    """The first rows of Q are those of a launch without a count, and nothing else is written."""
    rows, features, columns, number = shape
    indices, count = lists(rows, number, kernel_device)
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, features).to(kernel_device), torch.randn(columns, features).to(kernel_device)
    targets = torch.randint(0, columns, (rows,)).to(kernel_device)
    statistics = torch.stack([torch.full((rows,), 1.5), torch.full((rows,), 4.0)]).to(kernel_device)
    every, some = torch.empty(2, rows, columns, device=kernel_device)
    linear.gradient(every, gemm.Operands(hidden[indices], weight, None, None), statistics, targets, 0, constants)
    before = 0 if watch is None else len(watch.within(some, watch.written))
    operands = gemm.Operands(hidden, weight, None, indices)
    linear.gradient(some, operands, statistics, targets, 0, constants, count)
    torch.testing.assert_close(some[:number], every[:number], rtol=1e-5, atol=1e-6)
    assert some[number:].isnan().all()
    if watch is not None:
        assert len(watch.within(some, watch.written)) - before == number * columns


@pytest.mark.slow
def test_launches_do_not_depend_on_the_rows_and_nothing_waits(kernel_device: str) -> None:
    """Four for each tile, three without a bias; what elementwise work goes through is one block here."""
    keywords = {name: keyword.default for name, (_, keyword) in table(LinearKeywords).items()}
    asked = {**keywords, "skip_mass": 0.3, "max_valid_tokens": 50, "logits_mean": None}
    spec = replace(linear_spec(asked), backend="triton")
    request = HeadCall(spec, torch.float32, frozenset({"hidden", "weight", "bias"}))
    found = []
    for sequences in (2, 6):
        batch = make_hidden(sequences, 9, 16, 70, device=kernel_device, bias=True)
        head, rows = (
            Head(request, batch.hidden, batch.weight, batch.bias),
            valid_rows(targets_of(batch.labels, None, spec), None, spec),
        )
        chosen = plan.choose(narrowed(engine.problem_of(head, rows)))
        assert chosen.name == "skipping"
        assert chosen.fused
        upstream = reference_logps(len(rows.targets), kernel_device)
        with launches() as recorder:
            forward = chosen.forward(head, rows)
            chosen.backward(head, rows, forward.saved, (), upstream)
        tiles = -(-70 // chosen.columns)
        kernels = Counter(name for name in recorder.names if name.endswith("_kernel"))
        each = (
            "_linear_gradient_kernel",
            "_selected_weight_kernel",
            "_selected_bias_kernel",
            "_selected_hidden_kernel",
        )
        # Rows are finished in the forward and again in the backward, and brought to their places in dh.
        once = {"_linear_statistics_kernel": 1, "_linear_target_logit_kernel": 1}
        once |= {"_finish_kernel": 2, "_scatter_rows_kernel": 1}
        assert kernels == {**once, **dict.fromkeys(each, tiles)}
        assert not recorder.synchronising
        found.append(recorder.names)
    assert found[0] == found[1]
