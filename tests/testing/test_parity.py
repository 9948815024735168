"""``check_parity`` and ``parity`` of the command line: losses are as exact as their peers, and what is not is seen."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fused_pref as fp
from fused_pref.__main__ import main
from fused_pref.cli.parity import DTYPES, PLANS, by_plan, implementations, judges, table
from fused_pref.cli.peers import PEERS, Peer, by_position, eager, ours
from fused_pref.testing import check_parity
from fused_pref.testing.parity import evaluate
from fused_pref.testing.problems import LOGITS, WORKS, Problem, Sizes

eager_loss = by_position(eager)
SMALL: dict[str, Any] = {"dtypes": (torch.bfloat16,), "logits": ("random", "peaked")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("work", WORKS)
def test_no_peer_is_more_exact(work: str, dtype: str) -> None:
    """All plans; five seeds, medians, 1.05 (DESIGN §4).

    The kinds of logits that errors grow with, and of the others one in turn: each with every work and every dtype.
    """
    others = [kind for kind in LOGITS if kind not in ("large", "adversarial")]
    turn = list(WORKS).index(work) + DTYPES.index(dtype)
    for logits in ("large", "adversarial", others[turn % len(others)]):
        lines = table(work, Sizes(4, 12, 64, 1031, 0.25, logits), getattr(torch, dtype), "cpu", 5, ["torch"])
        assert len(lines) >= 3
        assert [line for line in lines if not line.ok] == []


@pytest.mark.slow
@pytest.mark.parametrize("work", ["cpo", "frozen", "logps"])
def test_kernels_are_as_exact(work: str) -> None:
    for logits in ("random", "peaked", "large"):
        lines = table(work, Sizes(2, 5, 16, 67, 0.25, logits), torch.float32, "cpu", 1, ["triton"])
        assert any("fused" in line.name for line in lines)
        assert all(line.ok for line in lines)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("work", WORKS)
def test_no_peer_is_more_exact_on_a_gpu(work: str, dtype: str) -> None:
    for logits in LOGITS:
        sizes = Sizes(4, 64, 256, 8192, 0.25, logits)
        lines = table(work, sizes, getattr(torch, dtype), "cuda", 5, ["torch", "triton"])
        assert [line for line in lines if not line.ok] == []


def smooth(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """A loss of one's own: the squared mean log-prob of the completions."""
    return fp.linear_sequence_logps(hidden, weight, labels, average=True).square().mean()


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return fp.reference.sequence_logps(hidden @ weight.t(), labels, average=True).square().mean()


def rough(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same by a log-softmax in the dtype of the inputs."""
    logp = (hidden @ weight.t())[:, :-1].log_softmax(-1)
    y = labels[:, 1:]
    own = logp.gather(-1, y.clamp(min=0)[..., None])[..., 0] * (y != -100)
    return (own.sum(-1) / (y != -100).sum(-1)).square().mean()


def test_a_loss_of_ones_own() -> None:
    parity = check_parity(smooth, plain, peers={"rough": rough}, **SMALL)
    assert parity.ok
    assert len(parity.lines) == 2
    assert "| loss | bfloat16 | peaked | loss |" in str(parity)


def test_a_rough_loss_is_seen() -> None:
    with pytest.raises(AssertionError, match=r"(?s)less exact than it must be:\n\|.*\*\*worse\*\*") as caught:
        check_parity(rough, plain, **SMALL)
    assert not check_parity(rough, plain, raise_exception=False, **SMALL).ok
    assert "reference" in str(caught.value)


def test_a_gradient_that_is_missing_or_not_finite_is_seen() -> None:
    for wrong in (
        lambda h, w, y: smooth(h, w.detach(), y),
        lambda h, w, y: smooth(h, w, y) + (h * 0).sqrt().sum() * 0,
    ):
        lines = check_parity(wrong, plain, raise_exception=False, **SMALL).lines
        assert not any(line.ok for line in lines)


def test_a_loss_that_changes_its_inputs_is_refused() -> None:
    """Else it would spoil what its peers get, and pass beside them."""

    def spoils_labels(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        labels[labels == -100] = 0
        return smooth(hidden, weight, labels)

    def spoils_both(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            hidden.zero_()
            weight.zero_()
        return smooth(hidden, weight, labels)

    with pytest.raises(ValueError, match="loss must leave its inputs as they are; it changed labels"):
        check_parity(spoils_labels, plain, **SMALL)
    with pytest.raises(ValueError, match=r"peers\['rough'\] must leave .* it changed hidden and weight"):
        check_parity(smooth, plain, peers={"rough": spoils_both}, **SMALL)


def test_kinds_of_logits() -> None:
    """Large ones reach 10⁴, flat ones hardly differ; adversarial targets are far below others, peaked ones above."""
    for kind in LOGITS:
        p = Problem.make(Sizes(4, 6, 64, 257, 0.25, kind), torch.float32, "cpu")
        z = (p.hidden @ p.weight.t())[p.scored]
        logp = z.log_softmax(-1).gather(1, p.labels[p.scored][:, None])
        if kind == "large":
            assert z.abs().max().item() == pytest.approx(1e4, rel=1e-3)
        elif kind == "flat":
            assert z.abs().max() < 0.01
        elif kind == "adversarial":
            assert logp.max() < -30
        elif kind == "peaked":
            assert logp.median() > -0.1


@pytest.mark.parametrize("gpu", ["cuda", "cuda:1"])
def test_peers_of_a_device_with_an_index(gpu: str) -> None:
    needs_gpu = Peer("kernel", eager_loss, gpu=True)
    assert needs_gpu.obstacle(gpu) is None
    assert needs_gpu.obstacle("cpu:0") == "it needs a GPU"
    elsewhere = Peer("elsewhere", eager_loss, device="cuda")
    assert elsewhere.does("cpo", gpu)
    assert elsewhere.obstacle(gpu) is None
    assert not elsewhere.does("cpo", "cpu:0")


def test_a_slow_peer_is_left_out_on_a_cpu_with_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "torch_ce", Peer("torch_ce", eager_loss))
    for device in ("cpu", "cpu:0"):
        assert judges("torch_ce", "cross_entropy", torch.float32, device)
        assert not judges("torch_ce", "cross_entropy", torch.bfloat16, device)


def test_a_plan_that_cannot_be_taken_is_not_replaced() -> None:
    """An objective of one's own that no plan but one serves must not be measured under the name of another."""
    p = Problem.make(Sizes(2, 4, 8, 33), torch.float32, "cpu").of(WORKS["bco"].gradients)
    for name, fused in (("grouped", False), ("vocab_major", True)):
        loss = by_plan(ours(backend="torch")("bco"), name, fused=fused, small=False)
        with pytest.raises(ValueError, match=f"no plan {name}"):
            loss(p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("work", WORKS)
def test_every_form_has_a_plan(work: str, dtype: str) -> None:
    p = Problem.make(Sizes(2, 2, 8, 20), getattr(torch, dtype), "cpu").of(WORKS[work].gradients)
    forms = dict(implementations(work, "triton", p.hidden.dtype))
    fused = [form for form in forms if "fused" in form]
    # float16 does not reach as far as exponentials do.
    assert len(fused) == 2 * sum(dtype != "float16" or plan in ("vocab_major", "logprob") for plan in PLANS[work])
    for form in fused:
        assert evaluate(forms[form], p)["value"].isfinite().all()


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dtypes", "float32", "--logits", "random", "--shape", "2x4x8x33", "--seeds", "1"]
    options += ["--backends", "torch"]
    assert main(["parity", "--works", "cpo", "logps", *options]) == 0
    out = capsys.readouterr().out
    assert out.startswith("peers: eager, trl_chunked")
    assert "| cpo | float32 | random | torch, grouped |" in out
    assert "| logps | float32 | 3 |" in out
    assert "8 lines, 0 worse than the contract and the best peer" in out
    assert main(["parity", "--shape", "3x3"]) == 2
    assert "--shape must be SxTxDxV" in capsys.readouterr().err
    assert main(["parity", "--seeds", "0"]) == 2
    assert main(["parity", "--device", "nowhere"]) == 2
