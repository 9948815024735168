"""Q of whole rows in PyTorch: its exponentials against the gradient that is made from statistics."""

import pytest
import torch

from fused_pref.ops.interface import Transform
from fused_pref.ops.torch import chunk

IGNORE, ROWS, COLUMNS = -100, 7, 53
TRANSFORMS = [Transform(), Transform(inner=-1.7), Transform("tanh", 0.4, 2.5)]
BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@pytest.mark.parametrize("metrics", [True, False])
@pytest.mark.parametrize("over", [True, False], ids=["over", "apart"])
@pytest.mark.parametrize("apart", [True, False], ids=["targets apart", "targets in Q"])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_exponentials(
    dtype: torch.dtype, transform: Transform, apart: bool, over: bool, metrics: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Q times its factor is (1 − p_y)(softmax over the others − onehot), with the targets' entries in or apart."""
    torch.manual_seed(0)
    monkeypatch.setattr(chunk, "CPU_BLOCK", 3 * COLUMNS)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    logits, targets = (4 * torch.randn(ROWS, COLUMNS)).to(dtype), torch.randint(0, COLUMNS, (ROWS,))
    targets[-1] = IGNORE
    truth, q = chunk.new_statistics(ROWS, logits, torch.float64, metrics=metrics), torch.empty(ROWS, COLUMNS).double()
    chunk.update_statistics(truth, logits, targets, 0, transform, logit_sum=transform.nonlinear)
    chunk.gradient(q, logits, truth, targets, 0, transform)
    logp, one_minus_p = chunk.finish(truth, targets, COLUMNS, IGNORE)
    expected = q * one_minus_p[:, None]

    statistics, out = chunk.new_statistics(ROWS, logits, kind, metrics=metrics), torch.empty_like(logits)
    given = (statistics, targets, transform, IGNORE)
    made = logits if over else out
    done = chunk.exponentials(made, logits, *given, logit_sum=transform.nonlinear, apart=apart)
    found, entries = made.double(), torch.arange(ROWS)[:-1]
    if done.target_q is not None:
        assert not found[entries, targets[:-1]].any()
        found[entries, targets[:-1]] = done.target_q[:-1].double()
    assert (done.target_q is not None) == apart
    found *= done.factor[:, None]
    torch.testing.assert_close(found, expected, rtol=BOUNDS[dtype], atol=BOUNDS[dtype] / 100)
    own = (entries, targets[:-1])
    rounding = BOUNDS[dtype] if transform.nonlinear and not apart else BOUNDS[kind]
    torch.testing.assert_close(found[own], expected[own], rtol=rounding, atol=1e-12)
    for ours, exact in ((done.logp, logp), (done.one_minus_p, one_minus_p), (statistics, truth)):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
