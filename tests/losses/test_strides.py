"""Tensors of one entry a sequence, in any layout: kernels go through them entry by entry."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import make_batch, make_hidden, reference_logps
from torch import Tensor

import fused_pref as fp


def column(tensor: Tensor) -> Tensor:
    """The same entries, apart in memory, with others between them."""
    return torch.stack([tensor, torch.ones_like(tensor) if tensor.dtype == torch.bool else tensor * 0 + 3], 1)[:, 0]


DESIRABLE = torch.tensor([True, False, False, True, True, False])
# Name, and what is laid out otherwise.
CALLS: list[tuple[str, str]] = [
    ("dpo_loss", "ref_logps"),
    ("bco_loss", "ref_logps"),
    ("bco_loss", "desirable"),
    ("bco_loss", "sample_weight"),
    ("kto_loss", "ref_logps"),
    ("kto_loss", "desirable"),
    ("cpo_loss", "cu_seqlens"),
    ("cpo_loss", "token_weight"),
    ("sequence_logps", "cu_seqlens"),
]


def arguments(name: str, device: str, linear: bool) -> dict[str, Any]:
    packed, lengths = name in ("cpo_loss", "sequence_logps"), [5, 3, 4, 5, 2, 5]
    if linear:
        head, ends = make_hidden(6, 5, 12, 29, device=device), None
        if packed:
            head, ends = head.packed(lengths)
        given: dict[str, Any] = {"hidden": head.hidden, "weight": head.weight, "labels": head.labels}
    else:
        batch, ends = make_batch(6, 5, 19, device=device), None
        logits, labels = batch.logits, batch.labels
        if packed:
            logits, labels, ends = batch.packed(lengths)
        given = {"logits": logits, "labels": labels}
    if packed:
        given["cu_seqlens"] = ends
    if name == "cpo_loss":
        given["token_weight"] = torch.linspace(0.5, 2, len(given["labels"]), device=device)
    if name in ("bco_loss", "kto_loss"):
        given["desirable"] = DESIRABLE.to(device)
    if name in ("dpo_loss", "bco_loss", "kto_loss"):
        given["ref_logps"] = reference_logps(6, device)
    if name == "bco_loss":
        given["sample_weight"] = torch.linspace(0.5, 2, 6, device=device)
    return given


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(("name", "strided"), CALLS)
def test_any_layout(name: str, strided: str, linear: bool, device: str, backend: str) -> None:
    function: Callable[..., Any] = getattr(fp, f"linear_{name}" if linear else name)
    given = arguments(name, device, linear)
    same = {**given, strided: column(given[strided])}
    assert not same[strided].is_contiguous()
    first, second = (function(**call, backend=backend) for call in (given, same))
    if name == "sequence_logps":
        assert torch.equal(first, second)
    else:
        assert torch.equal(first.loss, second.loss)


@pytest.mark.parametrize("name", ["dpo_loss", "bco_loss", "kto_loss"])
def test_expanded(name: str, device: str, backend: str) -> None:
    given = arguments(name, device, False)
    constant = torch.full((), -12.0, device=device)
    first, second = (
        getattr(fp, name)(**{**given, "ref_logps": refs}, backend=backend)
        for refs in (constant.expand(6), constant.expand(6).contiguous())
    )
    assert torch.equal(first.loss, second.loss)
