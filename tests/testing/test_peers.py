"""Peers that are not installed where the tests run: called as they ask to be."""

import sys
from pathlib import Path

import pytest
import torch

from fused_pref.cli.peers import PEERS
from fused_pref.testing.problems import WORKS, Problem, Sizes

UNSLOTH = """
def fused_linear_logprobs(hidden, weight, targets, *, mask):
    assert mask.any() and not mask.all()
    return (hidden @ weight.t()).log_softmax(-1).gather(-1, targets[..., None])[..., 0] * mask
"""


@pytest.mark.parametrize("work", ["cpo", "dpo", "frozen", "logps"])
def test_unsloth(work: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file of the package is loaded; the package itself may ask for a GPU."""
    package = tmp_path / "unsloth_zoo"
    (package / "fused_losses").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('no GPU')\n")
    (package / "fused_losses" / "fused_linear.py").write_text(UNSLOTH)
    peer = PEERS["unsloth"]
    monkeypatch.setitem(sys.modules, "unsloth_zoo", None)
    assert peer.obstacle("cpu") == "unsloth_zoo is not installed"
    monkeypatch.delitem(sys.modules, "unsloth_zoo")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert peer.obstacle("cpu") is None
    problem = Problem.make(Sizes(4, 6, 8, 33, masked=0.25), torch.float32, "cpu").of(WORKS[work].gradients)
    objective = WORKS[work].objective
    torch.testing.assert_close(peer.load(objective)(problem), PEERS["eager"].load(objective)(problem))
