"""Bfloat16 heads on CPUs that have products of such entries, and on those that have none: both ways on any CPU."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import make_hidden
from head_cases import only, parity

import fused_pref as fp
from benchmarks.measure import peak_bytes
from fused_pref.ops import devices
from fused_pref.ops.torch import matmul

# A plan for each, with the gradients it gives.
PLANS = {
    "grouped": ("cpo", "hwb"),
    "vocab_major": ("bco-batch", "hwb"),
    "frozen_head": ("cpo", "h"),
    "logprob": ("cpo", ""),
    "skipping": ("tokens", "hwb"),
}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What was found of this CPU, before and after."""
    matmul.arithmetic.cache_clear()
    yield
    matmul.arithmetic.cache_clear()


@pytest.fixture(params=[True, False], ids=["own", "upcast"])
def multiplies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the CPU is taken to multiply bfloat16."""
    monkeypatch.setattr(matmul, "multiplies", lambda dtype: request.param and dtype == torch.bfloat16)
    return request.param


@pytest.mark.parametrize(
    ("name", "amx", "onednn", "faster"),
    [
        ("Intel Xeon", False, True, False),
        ("Intel Xeon", True, True, True),
        ("AMD EPYC 9B14", False, True, True),
        ("AMD EPYC 7B13", False, False, False),
        (None, None, True, True),
    ],
)
def test_which_cpus_multiply(
    name: str | None, amx: bool | None, onednn: bool, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what PyTorch says of the CPU; an ARM one has no AMX, and maybe no name."""
    capabilities = {} if name is None else {"cpu_name": name, "amx_bf16": amx}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn, raising=False)
    assert devices.multiplies(torch.bfloat16) == faster
    assert not devices.multiplies(torch.float16)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("plan", PLANS)
def test_plans(plan: str, small: bool, multiplies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks of 16 rows and columns every product has several, the last of them cut."""
    objective, wanted = PLANS[plan]
    monkeypatch.setattr(matmul, "device_of", lambda kind: devices.Device("cpu", {}, 1.0, "", columns=16))
    batch = make_hidden(6, 9, 12, 83, dtype=torch.bfloat16, bias=True)
    batch.wanted = wanted
    keywords: dict[str, Any] = {"skip_mass": 0.0} if plan == "skipping" else {}
    with only(plan, small=small):
        parity(objective, batch, backend="torch", softcap=5.0, **keywords)
    assert matmul.arithmetic(torch.bfloat16, "cpu").upcast is not multiplies


def test_upcast_gradients_are_rounded_once(multiplies: bool) -> None:
    """Float32 products of float32 chunks: dW is off by its own rounding alone, where Q is not rounded first."""
    batch = make_hidden(4, 33, 64, 301, dtype=torch.bfloat16)
    h, w = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    fp.linear_cpo_loss(h, w, batch.labels, backend="torch").loss.backward()
    h64, w64 = (x.detach().double().requires_grad_() for x in (h, w))
    fp.reference.linear_cpo_loss(h64, w64, batch.labels).loss.backward()
    for leaf, exact in ((h, h64), (w, w64)):
        ours, truth = (x.grad if x.grad is not None else x for x in (leaf, exact))
        wrong = (ours.double() - truth).abs() > truth.abs() * 2**-8 * 1.01 + 1e-7
        assert wrong.any() == multiplies


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products(dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, and a float32 chunk times 16-bit rows, fresh and added, in blocks of which the last is cut."""
    monkeypatch.setattr(matmul, "multiplies", lambda dtype: False)
    monkeypatch.setattr(matmul, "device_of", lambda kind: devices.Device("cpu", {}, 1.0, "", columns=16))
    torch.manual_seed(0)
    h, w, b = (torch.randn(shape).to(dtype) for shape in ((21, 7), (37, 7), (37,)))
    logits = matmul.project(torch.empty(21, 40)[:, :37], h, w, b if bias else None)
    truth = h.double() @ w.double().t() + (b.double() if bias else 0)
    assert (logits - truth).abs().max() < 1e-5
    for fresh, strided in itertools.product((True, False), (True, False)):
        total, before = (torch.full((21, 7), 0.5) for _ in range(2))
        a = logits if strided else logits.contiguous()
        matmul.add_product(total, a, w, fresh=fresh)
        truth = a.double() @ w.double() + (0 if fresh else before.double())
        assert (total - truth).abs().max() < 1e-4


@pytest.mark.parametrize("wanted", ["hw", "h", ""])
@pytest.mark.parametrize("objective", ["cpo", "logps"])
@pytest.mark.parametrize("budget", [None, 7 * 2**20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_are_within_the_plan(
    dtype: torch.dtype, budget: int | None, objective: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks that are made float32, of a hidden size so large that they count: one of each at a time."""
    monkeypatch.setattr(matmul, "multiplies", lambda dtype: False)
    sizes: dict[str, Any] = {"hidden": 256, "vocab": 6000, "positions": 320, "sequences": 4, "tokens": 280}
    batch = make_hidden(4, 80, 256, 6000, dtype=dtype, mask="none")
    batch.labels[:, :10] = -100
    h, w = batch.hidden.requires_grad_("h" in wanted), batch.weight.requires_grad_("w" in wanted)

    def step() -> None:
        if objective == "cpo":
            total = fp.linear_cpo_loss(h, w, batch.labels, memory_budget=budget).loss
        else:
            total = fp.linear_token_logps(h, w, batch.labels, memory_budget=budget).sum()
        if wanted:
            total.backward()

    gradients = [name for name in ("hidden", "weight") if name[0] in wanted]
    sizes |= {"objective": objective, "dtype": dtype, "gradients": gradients, "memory_budget": budget}
    planned = fp.explain(device="cpu", **sizes).peak_bytes
    step()
    h.grad = w.grad = None
    assert peak_bytes(step, "cpu") - 2 * sum(x.numel() for x in (h, w) if x.requires_grad) <= planned
