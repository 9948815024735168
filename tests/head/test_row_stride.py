"""Chunks of bfloat16 logits on a CPU, whose rows are not whole pages apart."""

import itertools

import pytest
import torch
from harness import make_hidden, peak_bytes
from head_cases import only, parity

import fused_pref as fp
from fused_pref.ops.torch.chunk import row_stride


def test_rows_are_not_whole_pages_apart() -> None:
    strides = [row_stride(columns) for columns in range(5000)]
    assert strides[:1024] == list(range(1024))
    assert all(0 <= stride - columns < 64 for columns, stride in enumerate(strides))
    assert all(stride % 64 == 32 for stride in strides[1024:])
    # The memory of many columns holds the rows of fewer.
    assert all(first <= second for first, second in itertools.pairwise(strides))


@pytest.mark.parametrize("vocabulary", [1024, 2051])
@pytest.mark.parametrize(
    ("name", "objective", "wanted"),
    [
        ("grouped", "cpo", "hwb"),
        ("vocab_major", "bco-batch", "hwb"),
        ("frozen_head", "cpo", "h"),
        ("logprob", "cpo", ""),
    ],
)
def test_plans(name: str, objective: str, wanted: str, vocabulary: int, device: str, backend: str) -> None:
    batch = make_hidden(4, 5, 12, vocabulary, dtype=torch.bfloat16, device=device, bias=True, mask="empty")
    batch.wanted = wanted
    with only(name) as taken:
        parity(objective, batch, device=device, backend=backend)
    assert taken[0].columns >= 1024


@pytest.mark.parametrize("budget", [2, 4, 8])
def test_memory_is_what_was_planned(budget: int) -> None:
    """By each plan that a budget of so many MiB leaves."""
    sizes = {"hidden": 64, "vocab": 8192, "tokens": 512, "positions": 516, "dtype": "bfloat16", "device": "cpu"}
    found = fp.explain(objective="cpo", memory_budget=budget << 20, **sizes)
    hidden = torch.randn(4, 129, 64, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(8192, 64, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(8192, (4, 129))

    def step() -> None:
        fp.linear_cpo_loss(hidden, weight, labels, memory_budget=budget << 20).loss.backward()

    step()
    hidden.grad = weight.grad = None
    gradients = 2 * (hidden.numel() + weight.numel())
    assert peak_bytes(step, "cpu") - gradients <= found.peak_bytes
