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
from fused_pref.ops.triton import dlogits, linear, logprob

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
    logp, statistics, _ = logprob.token_logps_fwd(logits, labels, None, None, False, -100, Transform())
    dlogits.token_logps_bwd(logits, logits, labels, None, statistics, logp, False, -100, Transform())
    forward, backward = LAUNCHES[0], LAUNCHES[-1]
    for launched, passes in ((forward, None), (backward, 1)):
        waves = int(launched.count[launched.program.entry])
        programs = waves // 8
        # The passes of a row are shared out among its splits.
        passes = passes or 5 * rows / programs
        predicted = work_of(Listing.of(compiled_of(launched)), passes).instructions
        assert predicted == pytest.approx(int(launched.count.sum()) / waves, rel=0.35), launched.kernel


@pytest.mark.parametrize("activation", ["linear", "tanh"])
def test_epilogue_of_the_head(activation: str) -> None:
    from gfx942.emulator import LAUNCHES

    hidden, weight = torch.randn(128, 64).bfloat16(), torch.randn(256, 64).bfloat16()
    statistics, targets = new_statistics(128, hidden, torch.float32), torch.arange(128)
    linear.update_statistics(
        statistics, Operands(hidden, weight, None, None), targets, 0, Transform(activation, 0.5, 2.0), logit_sum=False
    )
    (launched,) = (x for x in LAUNCHES if "statistics" in x.kernel)
    listing = Listing.of(compiled_of(launched))
    code = code_of(SimpleNamespace(kernel=SimpleNamespace(__name__=launched.kernel)), compiled_of(launched))
    assert code.matrix
    products = [i for i, line in enumerate(launched.program.text) if "mfma" in line]
    waves = int(launched.count[launched.program.entry])
    tiles = int(launched.count[products[0]]) / waves
    print(launched.kernel, code, tiles, int(launched.count.sum()) / waves)
    assert 0.6 < code.epilogue * tiles / (int(launched.count.sum()) / waves) < 1.4, (code, tiles, len(listing.code))
