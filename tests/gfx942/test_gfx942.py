"""The emulator itself: small kernels against float64 and NumPy, special values included; what it has to find."""

import itertools
import os
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(os.environ.get("FUSED_PREF_EMULATE") != "gfx942", reason="needs FUSED_PREF_EMULATE=gfx942"),
]
INF, NAN = torch.inf, torch.nan


def fused(warps: int) -> dict[str, int | bool]:
    """Options of a launch; releases of Triton differ in whether products and sums are fused unless told."""
    return {"num_warps": warps, "enable_fp_fusion": True}


@triton.jit
def softmax_kernel(x, out, columns, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * columns + i, mask=i < columns, other=-float("inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, 0))
    tl.store(out + row * columns + i, e / tl.sum(e, 0), mask=i < columns)


@triton.jit
def dot_kernel(a, b, c, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TRANSPOSED: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, 16)
    total = tl.load(c + m[:, None] * N + n[None, :])
    for start in range(0, K, 16):
        if TRANSPOSED:
            x = tl.load(a + (start + k)[:, None] * M + m[None, :]).T
        else:
            x = tl.load(a + m[:, None] * K + (start + k)[None, :])
        total = tl.dot(x, tl.load(b + (start + k)[:, None] * N + n[None, :]), total, input_precision="ieee")
    tl.store(out + m[:, None] * N + n[None, :], total)


@triton.jit
def float_kernel(x, y, out, number, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i, mask=i < number, other=1.0), tl.load(y + i, mask=i < number, other=1.0)
    root = tl.sqrt(tl.abs(a)) if WIDE else tl.sqrt_rn(tl.abs(a))
    values = (tl.exp(a), tl.log(tl.abs(a)), a / b, root, tl.floor(a), tl.maximum(a, b), tl.where(a > b, a, b))
    for k in tl.static_range(7):
        tl.store(out + k * number + i, values[k], mask=i < number)
    if not WIDE:
        tl.store(out + 7 * number + i, tl.div_rn(a, b), mask=i < number)
        tl.store(out + 8 * number + i, a.to(tl.bfloat16).to(tl.float32), mask=i < number)
        tl.store(out + 9 * number + i, a.to(tl.float16).to(tl.float32), mask=i < number)


@triton.jit
def integer_kernel(x, y, out, number, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i, mask=i < number, other=1), tl.load(y + i, mask=i < number, other=1)
    values = (a // b, a % b, a * b, a >> 3, tl.cumsum(b, 0), tl.sort(a, 0))
    for k in tl.static_range(6):
        tl.store(out + k * number + i, values[k], mask=i < number)


@triton.jit
def exchange_kernel(values, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    """Values in reverse, in place: every thread has to read before another writes."""
    i = tl.arange(0, BLOCK)
    x = tl.load(values + i)
    if BARRIER:
        x = tl.where(tl.sum(x, 0) == 0, 0.0, x)  # read, by every thread
        tl.debug_barrier()
    tl.store(values + (BLOCK - 1 - i), x)


@pytest.mark.parametrize("warps", [1, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_softmax(dtype: torch.dtype, warps: int) -> None:
    for columns in (1, 100, 1000):
        x, out = (torch.randn(7, columns) * 4).to(dtype), torch.empty(7, columns)
        softmax_kernel[7,](x, out, columns, BLOCK=triton.next_power_of_2(columns), **fused(warps))
        torch.testing.assert_close(out.double(), x.double().softmax(1), rtol=1e-6, atol=3e-7)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dot(dtype: torch.dtype, transposed: bool) -> None:
    for (m, n, k), warps in [((16, 16, 16), 1), ((64, 128, 48), 4), ((128, 64, 32), 8)]:
        a, b, c, out = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), torch.randn(m, n), torch.empty(m, n)
        dot_kernel[1,](a.T.contiguous() if transposed else a, b, c, out, m, n, k, transposed, **fused(warps))
        torch.testing.assert_close(out.double(), c.double() + a.double() @ b.double(), rtol=0, atol=3e-5)


SPECIAL = [0.0, -0.0, INF, -INF, NAN, 1.0, -1.0, 3.0, 2.5, 0.1, 1e-30, 1e30, 88.7, -87.5, -103.0, 700.0, -700.0]
SPECIAL_OF = {torch.float32: [1e-45, 2.0**-126, 3.4e38], torch.float64: [5e-324, 2.0**-1022, 1.79e308, 709.8]}


@pytest.mark.parametrize("dtype", SPECIAL_OF)
def test_floats(dtype: torch.dtype) -> None:
    wide = dtype == torch.float64
    pairs = torch.tensor(list(itertools.product(SPECIAL + SPECIAL_OF[dtype], repeat=2)), dtype=dtype)
    drawn = torch.randn(2, 2000, dtype=dtype).exp() ** (40 if wide else 12)
    for x, y in (pairs.T.contiguous(), drawn):
        out = torch.empty(10, len(x), dtype=dtype)
        float_kernel[1,](x, y, out, len(x), wide, BLOCK=triton.next_power_of_2(len(x)), **fused(4))
        d, e = (x, y) if wide else (x.double(), y.double())
        number = torch.where(x.isnan(), y, torch.where(y.isnan(), x, torch.maximum(x, y)))
        truth = [d.exp(), d.abs().log(), d / e, d.abs().sqrt(), d.floor(), number, torch.where(x > y, x, y)]
        truth += [] if wide else [d / e, x.bfloat16(), x.half()]
        for value, true in zip(out, truth, strict=False):
            # In float32 e^x is 2^(x / ln 2), whose product is rounded; results below the normal range may be 0.
            tolerance = {"rtol": 5e-16, "atol": 0} if wide else {"rtol": 8e-6, "atol": 2.0**-126}
            torch.testing.assert_close(value, true.to(dtype), **tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integers(dtype: torch.dtype) -> None:
    limit = 2**31 - 1 if dtype == torch.int32 else 2**62
    x, y = torch.randint(-limit, limit, (512,), dtype=dtype), torch.randint(1, 10000, (512,), dtype=dtype)
    y[::2] *= -1
    out = torch.empty(6, 512, dtype=dtype)
    integer_kernel[1,](x, y, out, 512, BLOCK=512, **fused(4))
    truth = [torch.div(x, y, rounding_mode="trunc"), torch.fmod(x, y), x * y, x >> 3, y.cumsum(0), x.sort()[0]]
    assert torch.equal(out, torch.stack(truth).to(dtype))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_barrier_that_is_missing_is_found(order: int, emulated: Callable[[], dict[str, int]]) -> None:
    from gfx942 import emulator

    x = torch.randn(512)
    expected: Tensor = x.flip(0)
    emulator.OPTIONS["order"] = order
    exchange_kernel[1,](x, BLOCK=512, BARRIER=True, **fused(8))
    assert torch.equal(x, expected)
    assert not emulated()
    exchange_kernel[1,](x, BLOCK=512, BARRIER=False, **fused(8))
    assert "race" in emulated()


def test_an_unknown_instruction_is_refused_by_its_name(emulated: Callable[[], dict[str, int]]) -> None:
    from gfx942 import emulator
    from gfx942.build import library

    x = torch.randn(7, 100)
    softmax_kernel[7,](x, torch.empty_like(x), 100, BLOCK=128, **fused(1))
    assembly = emulator.LAUNCHES[-1].program.assembly
    for line, name in (("v_sin_f32_e32 v0, v1", "v_sin_f32"), ("v_add_f32_e64 v0, v1, v2 mul:2", "mul:2")):
        with pytest.raises(NotImplementedError, match=f"{name} in the instruction {line}"):
            emulator.Program(assembly.replace("s_endpgm", f"{line}\n\ts_endpgm", 1), library().operation_number)
    assert not emulated()
