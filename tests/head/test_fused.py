"""Fused products of the linear head against float64: every plan forced in turn, and the kernels by themselves."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import IGNORE, assert_gradient, assert_values, make_hidden, peak_bytes, run_linear
from head_cases import only, parity
from probes import Memory, watching

import fused_pref as fp
from fused_pref.head.plans.logprob import Logprob
from fused_pref.ops.interface import Transform
from fused_pref.ops.torch import chunk
from fused_pref.ops.triton import configs, exponentials, gemm, linear
from fused_pref.spec import transform_of

TRANSFORMS = [{}, {"softcap": 3.0, "logit_scale": -1.7, "temperature": 0.6}]
PLANS = [
    ("grouped", "cpo", "hwb"),
    ("grouped", "bco", "wb"),
    ("vocab_major", "cpo", "hwb"),
    ("vocab_major", "bco-batch", "hw"),
    ("vocab_major", "sequences", "b"),
    ("frozen_head", "dpo", "h"),
    ("frozen_head", "bco-batch", "h"),
    ("logprob", "simpo", ""),
    ("logprob", "bco", ""),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# float16 does not reach as far as exponentials do: these plans have no fused form for it.
FORCED = [
    (*case, dtype)
    for case in PLANS
    for dtype in DTYPES
    if dtype != torch.float16 or case[0] in ("logprob", "vocab_major")
]
# Small plans of rows of 16 whole bytes, which are read through descriptors, and others, by pointers. Each plan in each
# dtype has both, with one transform and with the other in turn.
FORMS = [(True, 16), (False, 12)]
VARIED = [
    (*case, *form, TRANSFORMS[(number + other) % 2])
    for number, case in enumerate(FORCED)
    for other, form in enumerate(FORMS)
]
INF, NAN = torch.inf, torch.nan


@pytest.fixture(autouse=True)
def watch(kernel_device: str, poison: None) -> Iterator[Memory | None]:
    """Interpreted kernels may touch nothing but the tensors of their launch."""
    with watching(kernel_device) as watched:
        yield watched


# Plans


@pytest.mark.parametrize(("name", "objective", "wanted", "dtype", "small", "depth", "keywords"), VARIED, ids=str)
def test_plans(
    name: str, objective: str, wanted: str, dtype: torch.dtype, small: bool, depth: int, keywords: dict[str, Any],
    kernel_device: str,
) -> None:  # fmt: skip
    batch = make_hidden(6, 5, depth, 70, dtype=dtype, device=kernel_device, bias=True, mask="empty")
    batch.wanted = wanted
    # Slices narrow enough that some can be kept.
    with only(name, small=small, fused=True, narrow=True) as taken:
        parity(objective, batch, device=kernel_device, backend="triton", **keywords)
    assert taken[0].fused
    if small and name == "grouped":
        assert len(taken[0].bounds) > 2
    if name == "vocab_major":
        assert (taken[0].saved == 0) == small


@pytest.mark.parametrize("bound", [None, 40])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(
    ("name", "wanted", "small"),
    [
        ("grouped", "hwb", False), ("vocab_major", "hwb", False), ("frozen_head", "h", False), ("logprob", "", False),
        ("logprob", "", True),
    ],
)  # fmt: skip
def test_layouts(name: str, wanted: str, small: bool, layout: str, bound: int | None, kernel_device: str) -> None:
    """Padding beyond the valid tokens, packed sequences; what stands in unscored positions does not matter.

    The smallest plan for log-probs reads the rows in place.
    """
    batch = make_hidden(4, 6, 16, 70, device=kernel_device, bias=True)
    batch.wanted, keywords = wanted, {"max_valid_tokens": bound, "backend": "triton", "logits_mean": None}
    if layout == "packed":
        ends = torch.tensor([0, 6, 6, 14, 24], dtype=torch.int32, device=kernel_device)
        batch.hidden, batch.labels = batch.hidden.flatten(0, 1).contiguous(), batch.labels.flatten()
        keywords["cu_seqlens"] = ends
    with only(name, small=small, fused=True) as taken:
        parity("cpo", batch, device=kernel_device, **keywords)
    assert not isinstance(taken[0], Logprob) or taken[0].gather != small
    if layout == "padded":
        scored = torch.zeros_like(batch.labels, dtype=torch.bool)
        scored[:, :-1] = batch.labels[:, 1:] != IGNORE
        clean = run_linear(fp.linear_cpo_loss, batch, **keywords)[1]
        batch.hidden = batch.hidden.detach().masked_fill(~scored[..., None], NAN)
        with only(name, small=small, fused=True):
            dirty = run_linear(fp.linear_cpo_loss, batch, **keywords)[1]
        for one, other in zip(clean, dirty, strict=True):
            assert (one is None) == (other is None)
            assert one is None or assert_gradient(other, one.double(), 1e-5) is None


@pytest.mark.parametrize("kind", ["peaked", "huge", "far", "masked", "risen"])
@pytest.mark.parametrize(
    ("name", "wanted"), [("grouped", "hwb"), ("vocab_major", "hwb"), ("frozen_head", "h"), ("logprob", "")]
)
def test_hard_logits(kind: str, name: str, wanted: str, kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for the other routes; ``risen``: far above the pivots in some rows, so that those are computed again."""
    monkeypatch.setattr(exponentials, "PROBE", 64)
    batch = make_hidden(4, 7, 32, 200, mask="none", device=kernel_device, bias=True)
    batch.wanted = wanted
    if kind in ("peaked", "far"):
        batch.aim(18.0 if kind == "peaked" else -80.0)
    elif kind == "huge":
        batch.hidden *= 300
    elif kind == "risen":
        batch.weight[:, 0] = 0.0
        batch.weight[150:160, 0] = torch.linspace(40, 400, 10)
        batch.hidden[..., 0] = torch.arange(7) % 5 == 2
    else:
        batch.bias[:70] = -INF
        batch.labels.clamp_(min=70)
    with only(name, fused=True):
        parity("cpo", batch, device=kernel_device, backend="triton", beta=0.01, logits_mean=None)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("part", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("name", ["grouped", "vocab_major", "frozen_head", "logprob"])
def test_non_finite_inputs_show(name: str, part: str, bad: float, kernel_device: str) -> None:
    batch = make_hidden(4, 6, 16, 70, device=kernel_device, bias=True, mask="none")
    batch.wanted = {"frozen_head": "h", "logprob": ""}.get(name, "hwb")
    tensor = getattr(batch, part)
    tensor[(3,) * tensor.dim()] = bad
    leaves = [
        t.requires_grad_(n in batch.wanted)
        for n, t in zip("hwb", (batch.hidden, batch.weight, batch.bias), strict=True)
    ]
    with only(name, fused=True):
        output = fp.linear_cpo_loss(*leaves[:2], batch.labels, bias=leaves[2], backend="triton", logits_mean=None)
    assert output.loss.isnan()


@pytest.mark.parametrize("label", [-1, 70, 2**31 + 5])
@pytest.mark.parametrize("name", ["grouped", "vocab_major", "logprob"])
def test_label_outside_the_vocabulary(name: str, label: int, kernel_device: str) -> None:
    batch = make_hidden(6, 7, 16, 70, device=kernel_device, mask="none")
    batch.labels[2, 3] = label
    leaves = [t.requires_grad_(name != "logprob") for t in (batch.hidden, batch.weight)]
    with only(name, fused=True):
        output = fp.linear_cpo_loss(*leaves, batch.labels, backend="triton")
    assert output.chosen_logps[2].isnan()
    assert output.chosen_logps[:2].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["grouped", "vocab_major", "frozen_head"])
def test_repeatable(name: str, dtype: torch.dtype, kernel_device: str) -> None:
    batch = make_hidden(4, 6, 33, 67, device=kernel_device, dtype=dtype, mask="none")
    batch.labels[:, 1:4] = 5
    batch.wanted = "h" if name == "frozen_head" else "hw"
    with only(name, small=True, fused=True):
        first, second = (run_linear(fp.linear_cpo_loss, batch, backend="triton")[1][:2] for _ in range(2))
    assert all(a is b or torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("part", ["hidden", "bias", "labels", "one row", "one bias"])
@pytest.mark.parametrize("name", ["grouped", "vocab_major", "frozen_head", "logprob"])
def test_strides(name: str, part: str, kernel_device: str) -> None:
    """Every position scored, so that no row is copied for another reason."""
    batch = make_hidden(4, 5, 16, 70, device=kernel_device, bias=True, mask="none")
    batch.wanted = {"frozen_head": "h", "logprob": ""}.get(name, "hwb")
    assert batch.bias is not None
    batch.hidden, batch.labels = batch.hidden.flatten(0, 1), batch.labels.flatten()
    if part == "hidden":
        batch.hidden = batch.hidden.t().contiguous().t()
    elif part == "bias":
        batch.bias = torch.stack([batch.bias, -batch.bias], 1)[:, 0]
    elif part == "labels":
        batch.labels = torch.stack([batch.labels, batch.labels + 1], 1)[:, 0]
    elif part == "one row":
        batch.hidden = torch.full((1, 1), 0.5, device=kernel_device).expand(20, 16)
    else:
        batch.bias = torch.full((1,), 0.5, device=kernel_device).expand(70)
    ends = torch.tensor([0, 5, 10, 15, 20], dtype=torch.int32, device=kernel_device)
    with only(name, fused=True):
        parity("cpo", batch, device=kernel_device, backend="triton", cu_seqlens=ends, shift=False)


@pytest.mark.parametrize("name", ["grouped", "vocab_major", "frozen_head", "logprob"])
def test_nothing_scored(name: str, kernel_device: str) -> None:
    batch = make_hidden(4, 9, 16, 70, device=kernel_device, bias=True, mask="all")
    batch.wanted = {"frozen_head": "h", "logprob": ""}.get(name, "hwb")
    with only(name, fused=True):
        parity("cpo", batch, device=kernel_device, backend="triton")


@pytest.mark.parametrize("legacy", [True, False])
def test_precision_of_float32(legacy: bool) -> None:
    """Exact unless PyTorch was told otherwise, in either of its ways."""
    assert gemm.precision(torch.float32) == "ieee"
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        if legacy:
            torch.set_float32_matmul_precision("high")
        else:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert gemm.precision(torch.float32) == "tf32"
        assert gemm.precision(torch.bfloat16) == "ieee"
    finally:
        if legacy:
            torch.set_float32_matmul_precision("highest")
        else:
            torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("autocast", [False, True])
def test_rows_are_copied_only_if_they_must(autocast: bool, kernel_device: str) -> None:
    """Strides that no row number describes, and another dtype under autocast."""
    batch = make_hidden(6, 7, 16, 70, device=kernel_device)
    expected = fp.linear_token_logps(batch.hidden, batch.weight, batch.labels, backend="torch")
    hidden = batch.hidden if autocast else batch.hidden.transpose(0, 1).contiguous().transpose(0, 1)
    tolerance = 0.1 if autocast else 2e-5
    with (
        torch.autocast(kernel_device, torch.bfloat16, enabled=autocast),
        only("logprob", fused=True),
    ):
        logps = fp.linear_token_logps(hidden, batch.weight, batch.labels, backend="triton")
    assert logps.dtype == torch.float32
    assert_values(logps, expected.double(), tolerance)


@pytest.mark.slow
def test_log_probs_leave_no_logits(kernel_device: str) -> None:
    """Beyond the results the forward needs a small part of the logits' bytes."""
    if kernel_device != "cpu":
        pytest.skip("the CPU's allocator is watched")
    batch = make_hidden(4, 33, 16, 2000, mask="none", device=kernel_device)

    def step() -> None:
        fp.linear_token_logps(batch.hidden, batch.weight, batch.labels, backend="triton")

    with only("logprob", fused=True):
        assert peak_bytes(step) < 4 * 128 * 2000 / 4


# Kernels


def operands(
    rows: int, depth: int, columns: int, dtype: torch.dtype, device: str, *, bias: bool = True, by_index: bool = False
) -> tuple[gemm.Operands, torch.Tensor, torch.Tensor]:
    """Operands, targets, and the raw logits in float64."""
    generator = torch.Generator().manual_seed(rows + depth + columns)
    total = 2 * rows + 1 if by_index else rows
    hidden = torch.randn(total, depth, generator=generator).to(device, dtype)
    weight = torch.randn(columns, depth, generator=generator).to(device, dtype)
    shift = torch.randn(columns, generator=generator).to(device, dtype) if bias else None
    indices = torch.randperm(total, generator=generator)[:rows].to(device) if by_index else None
    targets = torch.randint(0, columns, (rows,), generator=generator).to(device)
    if rows > 1:
        targets[0], targets[-1] = 0, columns - 1
    taken = hidden if indices is None else hidden[indices]
    x = taken.double() @ weight.double().t() + (0 if shift is None else shift.double())
    return gemm.Operands(hidden, weight, shift, indices), targets, x


SHAPES = [(1, 1, 1), (1, 31, 2), (2, 257, 33), (17, 16, 67), (40, 8, 129), (33, 48, 32)]


def rounding(depth: int) -> float:
    """What a chain of as many multiply-adds in float32 may be off: their errors add up as a random walk."""
    return 2e-6 * max(1.0, depth / 32) ** 0.5


SOFTCAP, LINEAR = transform_of(TRANSFORMS[1]), Transform("linear", 2.0)


@pytest.mark.parametrize(
    ("processors", "by_index", "constants"),
    [
        (1, False, Transform()), (3, True, Transform()), (1, True, SOFTCAP), (50, False, SOFTCAP), (3, False, LINEAR),
        (50, True, LINEAR),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_and_gradient(
    shape: tuple[int, int, int], constants: Transform, by_index: bool, processors: int, kernel_device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In one slice and in two, in any number of splits: the twins on a chunk of the same logits.

    Rows are read by index or not in any number of splits, and with each transform, which no number of splits concerns.
    """
    monkeypatch.setattr(configs, "processors", lambda device: processors)
    head, targets, x = operands(*shape, torch.float32, kernel_device, by_index=by_index)
    rows, _, columns = shape
    truth = chunk.new_statistics(rows, x, torch.float64)
    chunk.update_statistics(truth, x.clone(), targets, 0, constants, logit_sum=False)
    means = chunk.transform_(x.clone(), constants).mean(1)
    for cut in {columns, columns // 2 + 1}:
        statistics = chunk.new_statistics(rows, head.hidden, torch.float32)
        for part in (slice(0, cut), slice(cut, columns)):
            bias = None if head.bias is None else head.bias[part]
            own = gemm.Operands(head.hidden, head.weight[part], bias, head.indices)
            linear.update_statistics(statistics, own, targets, part.start, constants, logit_sum=True)
        logp, one_minus_p = chunk.finish(statistics, targets, columns, IGNORE)
        true_logp, true_one_minus_p = chunk.finish(truth, targets, columns, IGNORE)
        assert_values(logp, true_logp)
        assert_values(one_minus_p, true_one_minus_p)
        assert_values(statistics[chunk.LOGIT_SUM] / columns, means)
        if by_index:
            continue
        q, true_q = torch.empty(rows, cut, device=kernel_device), torch.empty_like(x[:, :cut])
        own = gemm.Operands(head.hidden, head.weight[:cut], None if head.bias is None else head.bias[:cut], None)
        linear.gradient(q, own, statistics, targets, 0, constants)
        chunk.gradient(true_q, x[:, :cut].clone(), truth, targets, 0, constants)
        assert_gradient(q, true_q, rounding(shape[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("constants", TRANSFORMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exponentials(
    shape: tuple[int, int, int], constants: dict[str, Any], dtype: torch.dtype, kernel_device: str, watch: Memory | None
) -> None:
    """They are Q up to a factor of each row, 0 at the targets, whose entries are given apart."""
    transform = transform_of(constants)
    head, targets, x = operands(*shape, dtype, kernel_device)
    rows, _, columns = shape
    truth, true_q = chunk.new_statistics(rows, x, torch.float64), x.clone()
    chunk.update_statistics(truth, x, targets, 0, transform, logit_sum=False)
    chunk.gradient(true_q, x, truth, targets, 0, transform)
    statistics = torch.full((4, rows), NAN, device=x.device)
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    done = linear.exponentials(q, head, statistics, targets, transform, IGNORE, logit_sum=True)
    logp, one_minus_p = chunk.finish(truth, targets, columns, IGNORE)
    means = chunk.transform_(x.clone(), transform).mean(1)
    for found in (done[:2], chunk.finish(statistics, targets, columns, IGNORE)):
        assert_values(found[0], logp)
        assert_values(found[1], one_minus_p)
    assert_values(statistics[chunk.LOGIT_SUM] / columns, means)
    if watch is not None:
        # Nothing has risen above the pivots: the second pass writes nothing.
        assert len(watch.within(q, watch.written)) == rows * columns
    assert done.target_q is not None
    own = torch.nn.functional.one_hot(targets, columns).bool()
    assert not q[own].any()
    found = torch.where(own, done.target_q.double()[:, None], q.double()) * done.factor.double()[:, None]
    rounded = 2**-7 if dtype == torch.bfloat16 else rounding(shape[1])
    assert_gradient(found, true_q * one_minus_p[:, None], rounded)
    # The targets' part is exact in any dtype.
    assert_gradient(found[own], (true_q * one_minus_p[:, None])[own], rounding(shape[1]))


@pytest.mark.parametrize("label", [-1, 33, IGNORE])
def test_exponentials_of_rows_without_a_target(label: int, kernel_device: str) -> None:
    """No entry is left out; nothing is known of a row whose label is outside the vocabulary."""
    head, targets, x = operands(2, 8, 33, torch.float32, kernel_device)
    targets[0] = label
    q = torch.empty(2, 33, device=kernel_device)
    done = linear.exponentials(
        q, head, torch.empty(4, 2, device=kernel_device), targets, Transform(), IGNORE, logit_sum=False
    )
    expected = torch.tensor(0.0 if label == IGNORE else NAN, device=kernel_device)
    for found in done[:3]:
        torch.testing.assert_close(found[0], expected, equal_nan=True)
        assert found[1].isfinite()
    assert done.target_q is not None
    assert done.target_q[0] == 0
    assert_gradient(q[0] / q[0].sum(), x[0].softmax(0), 1e-5)
