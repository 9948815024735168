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

needs_emulator = pytest.mark.skipif(
    os.environ.get("FUSED_PREF_EMULATE") != "gfx942", reason="needs FUSED_PREF_EMULATE=gfx942"
)
# Of a kernel that goes through tiles, as some releases of Triton place it: the only return comes first.
EARLY_RETURN = """
    s_cbranch_scc0 .LBB0_2
.LBB0_1:
    s_endpgm
.LBB0_2:
    v_mov_b32_e32 v0, 0
.LBB0_3:
    v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
    s_cbranch_scc1 .LBB0_3
    v_exp_f32_e32 v0, v0
    v_add_f32_e32 v1, v1, v0
    s_cbranch_vccnz .LBB0_2
    global_store_dword v2, v1, s[0:1]
    s_branch .LBB0_1
"""


def compiled_of(assembly: str) -> Any:
    return SimpleNamespace(asm={"amdgcn": assembly})


def launch_of(kernel: str) -> Any:
    return SimpleNamespace(kernel=SimpleNamespace(__name__=kernel))


def test_tiles_behind_an_early_return() -> None:
    code = code_of(launch_of("_linear_statistics_kernel"), compiled_of(EARLY_RETURN))
    # Of a tile, with labels: beyond its three lines of product.
    assert (code.epilogue, code.special, code.matrix) == (5, 1, 1)


@pytest.mark.emulated
@needs_emulator
def test_streaming_kernels() -> None:
    from gfx942.emulator import LAUNCHES

    rows, columns = 4, 5 * 4096
    logits, labels = torch.randn(1, rows, columns).bfloat16(), torch.arange(rows)[None]
    logp, statistics, *_ = logprob.token_logps_fwd(logits, labels, None, -100, Transform())
    dlogits.token_logps_bwd(logits, logits, labels, statistics, logp, -100, Transform())
    forward, backward = LAUNCHES[0], LAUNCHES[-1]
    for launched, passes in ((forward, None), (backward, 1)):
        waves = int(launched.count[launched.program.entry])
        programs = waves // 8
        # The passes of a row are shared out among its splits.
        passes = passes or 5 * rows / programs
        predicted = work_of(Listing.of(compiled_of(launched.program.assembly)), passes).instructions
        assert predicted == pytest.approx(int(launched.count.sum()) / waves, rel=0.35), launched.kernel


@pytest.mark.emulated
@needs_emulator
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
    predicted = code_of(launch_of(launched.kernel), compiled_of(launched.program.assembly)).epilogue
    count, tiles = launched.count / int(launched.count[launched.program.entry]), 4
    assert predicted == pytest.approx(count[count <= tiles].sum() / tiles, rel=0.25)
