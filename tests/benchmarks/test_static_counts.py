"""The instructions that ``benchmarks/static`` predicts from compiled code, against those that are executed."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.static.gpus import Listing
from benchmarks.static.head import code_of
from benchmarks.static.logits import work_of
from fused_pref.ops.interface import Operands, Transform
from fused_pref.ops.torch.chunk import new_statistics
from fused_pref.ops.triton import configs, dlogits, gemm, linear, logprob

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(os.environ.get("FUSED_PREF_EMULATE") != "gfx942", reason="needs FUSED_PREF_EMULATE=gfx942"),
]


def compiled_of(launched: Any) -> Any:
    return SimpleNamespace(asm={"amdgcn": launched.program.assembly})


def test_streaming_kernels() -> None:
    from gfx942.emulator import LAUNCHES

    rows, columns = 4, 5 * 4096
    logits, labels = torch.randn(1, rows, columns).bfloat16(), torch.arange(rows)[None]
    logp, statistics, _ = logprob.token_logps_fwd(logits, labels, None, -100, Transform())
    dlogits.token_logps_bwd(logits, logits, labels, statistics, logp, -100, Transform())
    forward, backward = LAUNCHES[0], LAUNCHES[-1]
    for launched, passes in ((forward, None), (backward, 1)):
        waves = int(launched.count[launched.program.entry])
        programs = waves // 8
        # The passes of a row are shared out among its splits.
        passes = passes or 5 * rows / programs
        predicted = work_of(Listing.of(compiled_of(launched)), passes).instructions
        assert predicted == pytest.approx(int(launched.count.sum()) / waves, rel=0.35), launched.kernel


@pytest.mark.parametrize("activation", ["linear", "tanh"])
def test_epilogue_of_the_head(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program takes four tiles: what it does as often as there are tiles, or less, is not of the product."""
    from gfx942.emulator import LAUNCHES

    monkeypatch.setattr(configs, "processors", lambda device: 1)
    monkeypatch.setattr(gemm, "vocabulary_splits", lambda *sizes: 1)
    hidden, weight = torch.randn(128, 512).bfloat16(), torch.randn(512, 512).bfloat16()
    seen, targets = new_statistics(128, hidden, torch.float32), torch.arange(128)
    operands = Operands(hidden, weight, None, None)
    linear.update_statistics(seen, operands, targets, 0, Transform(activation, 0.5, 2.0), logit_sum=False)
    (launched,) = (x for x in LAUNCHES if "statistics" in x.kernel)
    launch: Any = SimpleNamespace(kernel=SimpleNamespace(__name__=launched.kernel))
    predicted = code_of(launch, compiled_of(launched)).epilogue
    count, tiles = launched.count / int(launched.count[launched.program.entry]), 4
    assert predicted == pytest.approx(count[count <= tiles].sum() / tiles, rel=0.25)
