"""The way of a call: how many files and functions of the package it enters, from the public function and back.

The second call is counted: the first one also fills caches, which are not a part of every step.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import fused_pref as fp

PACKAGE = Path(fp.__file__).parent
# Most files and functions of one forward and backward; `__init__` files are not counted.
WAYS = {"linear_cpo_loss": (14, 80), "linear_bco_loss": (14, 80), "cpo_loss": (10, 40)}


def way(call: Callable[[], object]) -> set[tuple[str, str]]:
    """(file, function) of all that a call enters, in this thread, after a first call."""
    entered: set[tuple[str, str]] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE) and path.stem != "__init__":
            entered.add((str(path.relative_to(PACKAGE)), frame.f_code.co_qualname))

    call()
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return entered


@pytest.mark.skipif(sys.version_info < (3, 11), reason="code objects have no qualified name")
@pytest.mark.parametrize("name", WAYS)
def test_the_way_of_a_call_is_short(name: str) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 7, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    logits, labels = torch.randn(4, 7, 50, requires_grad=True), torch.randint(0, 50, (4, 7))
    labels[:, :2] = -100
    desirable, shift = torch.tensor([True, False, True, False]), fp.RewardShift()
    calls: dict[str, Callable[[], Any]] = {
        "linear_cpo_loss": lambda: fp.linear_cpo_loss(hidden, weight, labels),
        "linear_bco_loss": lambda: fp.linear_bco_loss(hidden, weight, labels, desirable, torch.zeros(4), delta=shift),
        "cpo_loss": lambda: fp.cpo_loss(logits, labels),
    }
    entered = way(lambda: calls[name]().loss.backward())
    files = {path for path, _ in entered}
    assert len(files) > 5  # the backward of a CPU runs in this thread
    assert any(function.endswith(".backward") for _, function in entered)
    most_files, most_functions = WAYS[name]
    assert len(files) <= most_files, sorted(files)
    assert len(entered) <= most_functions, sorted(entered)
