"""RewardShift: both kinds of state, both kinds of update, and what must never update it."""

import math

import pytest
import torch
from harness import make_batch, reference_logps
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import fused_pref as fp

LABELS = make_batch(4, 5, 11).labels
REF = reference_logps(4)
DESIRABLE = torch.tensor([True, False, True, False])


def rewards_of(seed: int) -> torch.Tensor:
    return torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits_of(seed: int) -> torch.Tensor:
    return make_batch(4, 5, 11, seed=seed).logits.requires_grad_()


def test_running_mean_pools_everything_seen() -> None:
    shift, seen = fp.RewardShift(), []
    for seed in range(4):
        seen += rewards_of(seed).tolist()
        assert math.isclose(shift(rewards_of(seed), DESIRABLE), sum(seen) / len(seen), rel_tol=1e-12)
    assert shift.count.tolist() == [16, 0]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=7), min_size=1, max_size=8), st.data())
def test_running_mean_does_not_depend_on_the_cut(stream: list[list[float]], data: st.DataObject) -> None:
    cut, whole = fp.RewardShift(), fp.RewardShift()
    values = [value for part in stream for value in part]
    for part in stream:
        flags = [data.draw(st.booleans()) for _ in part]
        cut(torch.tensor(part, dtype=torch.float64), torch.tensor(flags, dtype=torch.bool))
    whole(torch.tensor(values, dtype=torch.float64), torch.ones(len(values), dtype=torch.bool))
    scale = max([abs(value) for value in values], default=1.0)
    assert torch.allclose(cut.mean, whole.mean, rtol=1e-12, atol=1e-12 * scale)
    assert torch.equal(cut.count, whole.count)


def test_ema_by_hand() -> None:
    shift = fp.RewardShift("ema", decay=0.75)
    assert shift(torch.zeros(0), torch.zeros(0, dtype=torch.bool)) == 0
    assert shift(torch.tensor([4.0, 2.0]), torch.tensor([True, True])) == 3.0
    assert shift(torch.tensor([1.0]), torch.tensor([False])) == (3.0 + 1.0) / 2
    positive, negative = 0.75 * 3.0 + 0.25 * 7.0, 0.75 * 1.0 + 0.25 * -5.0
    assert shift(torch.tensor([7.0, -5.0]), torch.tensor([True, False])) == (positive + negative) / 2
    assert shift.mean.tolist() == [positive, negative]


def test_fixed_never_moves() -> None:
    shift = fp.RewardShift("fixed", value=0.3)
    before = shift.state_dict()
    assert shift(rewards_of(0), DESIRABLE) == 0.3
    shift.step()
    assert all(torch.equal(value, before[name]) for name, value in shift.state_dict().items())


@pytest.mark.parametrize("kind", ["running_mean", "ema"])
def test_step_update(kind: str) -> None:
    """δ stays as of the last step; a step folds in all that forwards gathered as one batch."""
    stepped, forward = fp.RewardShift(kind, update="step"), fp.RewardShift(kind)
    for block in ((0, 1, 2), (3,), (), (4, 5)):
        before = stepped(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
        for seed in block:
            assert stepped(rewards_of(seed), DESIRABLE) == before
        stepped.step()
        if block:
            expected = forward(torch.cat([rewards_of(s) for s in block]), DESIRABLE.repeat(len(block)))
            after = stepped(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
            torch.testing.assert_close(after, expected)
    assert stepped(rewards_of(0), DESIRABLE) != 0
    assert fp.RewardShift(kind, update="step")(rewards_of(0), DESIRABLE) == 0


@pytest.mark.parametrize("update", ["forward", "step"])
def test_evaluation_and_no_grad_never_update(update: str) -> None:
    shift = fp.RewardShift(update=update)
    loss = fp.BCOLoss(delta=shift)
    loss(logits_of(0), LABELS, DESIRABLE, REF)
    before = {name: value.clone() for name, value in shift.state_dict().items()}
    with torch.no_grad():
        loss(logits_of(1), LABELS, DESIRABLE, REF)
    loss.eval()
    output = loss(logits_of(2), LABELS, DESIRABLE, REF)
    assert all(torch.equal(value, before[name]) for name, value in shift.state_dict().items())
    assert output.delta == before["mean"][0].float()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("update", ["forward", "step"])
def test_recomputation_never_updates(update: str, reentrant: bool) -> None:
    plain, recomputed = (fp.BCOLoss(delta=fp.RewardShift(update=update)) for _ in range(2))
    for seed in range(3):
        grads = []
        for loss, wrap in ((plain, False), (recomputed, True)):
            logits = logits_of(seed)

            def head(z: torch.Tensor, loss: fp.BCOLoss = loss) -> torch.Tensor:
                return loss(z, LABELS, DESIRABLE, REF).loss

            value = checkpoint(head, logits, use_reentrant=reentrant) if wrap else head(logits)
            value.backward()
            assert logits.grad is not None
            grads.append(logits.grad)
        if not reentrant or update == "step":
            assert torch.equal(*grads)
        if reentrant:
            # Its first forward runs without gradients and its second inside the backward: neither may update.
            assert not any(value.any() for value in recomputed.delta.state_dict().values())
            continue
        state = recomputed.delta.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in plain.delta.state_dict().items())


@pytest.mark.parametrize("kind", ["running_mean", "ema"])
@pytest.mark.parametrize("update", ["forward", "step"])
def test_state_resumes_exactly(kind: str, update: str) -> None:
    first = fp.RewardShift(kind, update=update)
    for seed in range(3):
        first(rewards_of(seed), DESIRABLE)
        if seed == 1:
            first.step()
    second = fp.RewardShift(kind, update=update)
    second.load_state_dict(first.state_dict())
    for shift in (first, second):
        shift(rewards_of(9), DESIRABLE)
        shift.step()
    assert torch.equal(first.mean, second.mean)
    assert torch.equal(first.count, second.count)


def test_casting_a_model_keeps_the_state_exact() -> None:
    shift = fp.RewardShift()
    shift(rewards_of(0), DESIRABLE)
    exact = shift.mean.clone()
    model = torch.nn.ModuleDict({"loss": fp.BCOLoss(delta=shift), "head": torch.nn.Linear(2, 2)})
    for cast in (model.bfloat16, model.half, model.float):
        cast()
        assert torch.equal(shift.mean, exact)
    assert shift.mean.dtype == torch.float64
    assert shift.count.dtype == torch.int64


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_cast_state_keeps_the_dtypes(assign: bool) -> None:
    first, second = fp.RewardShift(), fp.RewardShift()
    first(rewards_of(0), DESIRABLE)
    cast = {
        name: value.bfloat16() if value.is_floating_point() else value.int()
        for name, value in first.state_dict().items()
    }
    second.load_state_dict(cast, assign=assign)
    assert second.mean.dtype == second.pending_sum.dtype == torch.float64
    assert second.count.dtype == second.pending_count.dtype == torch.int64
    assert torch.equal(second.mean, first.mean.bfloat16().double())


def test_only_an_updating_forward_talks_to_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert fp.RewardShift().collective
    assert not fp.RewardShift("fixed").collective
    assert not fp.RewardShift(update="step").collective
    assert not fp.RewardShift().eval().collective
    with torch.no_grad():
        assert not fp.RewardShift().collective


def test_gradient_does_not_flow_through_delta() -> None:
    logits = logits_of(0)
    output = fp.bco_loss(logits, LABELS, DESIRABLE, REF, delta=fp.RewardShift())
    fixed = fp.bco_loss(logits, LABELS, DESIRABLE, REF, delta=output.delta)
    grads = [torch.autograd.grad(o.loss, logits)[0] for o in (output, fixed)]
    torch.testing.assert_close(*grads)
    assert not output.delta.requires_grad


def test_reference_updates_alike() -> None:
    ours, theirs = fp.RewardShift("ema"), fp.RewardShift("ema")
    for seed in range(3):
        mine = fp.bco_loss(logits_of(seed), LABELS, DESIRABLE, REF, delta=ours)
        other = fp.reference.bco_loss(logits_of(seed), LABELS, DESIRABLE, REF, delta=theirs)
        torch.testing.assert_close(mine.delta, other.delta)
    torch.testing.assert_close(ours.mean, theirs.mean)
    assert torch.equal(ours.count, theirs.count)
