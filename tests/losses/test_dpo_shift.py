"""The δ of bco_pair as a RewardShift, the cost of mixtures, and both under ``torch.compile``."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import Hidden, assert_linear_parity, assert_parity, make_batch, make_hidden, run, run_linear
from test_dpo_losses import MPO, near_reference
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fused_pref as fp
from fused_pref.head.plans import planner
from fused_pref.head.plans import problem as problems
from fused_pref.head.plans.grouped import Grouped
from fused_pref.keywords import DPOKeywords, defaults
from fused_pref.losses.pair import PairObjective
from fused_pref.losses.pair_spec import dpo_spec
from fused_pref.losses.scores import Scores
from fused_pref.opaque import decode, encode

CLASSES = torch.tensor([True] * 4 + [False] * 4)


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def head(device: str = "cpu") -> tuple[Hidden, Tensor]:
    batch = make_hidden(8, 6, 12, 40, bias=True, device=device)
    return batch, near_reference(batch.hidden @ batch.weight.T, batch.labels)


def test_mpo_with_a_moving_shift(device: str) -> None:
    """The whole mixture waits for the batch; loss, δ and gradients are those of the reference."""
    batch, ref = head(device)
    ours = assert_linear_parity("linear_dpo_loss", batch, ref, **MPO, delta="running_mean")
    rewards = torch.cat((ours.chosen_rewards, ours.rejected_rewards))
    torch.testing.assert_close(ours.delta, rewards.mean())
    torch.testing.assert_close(ours.metrics()["delta"], ours.delta)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(
    ("kind", "update"), [("running_mean", "forward"), ("ema", "forward"), ("ema", "step"), ("fixed", "step")]
)
def test_a_shift_sees_chosen_and_rejected(kind: Any, update: Any, linear: bool, backend: str) -> None:
    """Whatever the weights, as BCO's own shift would; in evaluation nothing moves."""
    if linear and backend == "triton":
        pytest.skip("the head chooses its backend")
    shifts = [fp.RewardShift(kind, update=update, value=0.7) for _ in range(3)]
    batch, ref = head()
    logits = (batch.hidden @ batch.weight.T).detach()
    for weights in ((0.8, 0.2, 1.0), (1.0, 0.0, 0.0)):
        keywords = {**MPO, "loss_weights": weights}
        if linear:
            batch.bias = None
            ours, _ = run_linear(fp.linear_dpo_loss, batch, ref, **keywords, delta=shifts[0])
        else:
            ours, _ = run(fp.dpo_loss, logits, batch.labels, ref, **keywords, delta=shifts[0], backend=backend)
        truth, _ = run(fp.reference.dpo_loss, logits.double(), batch.labels, ref, **keywords, delta=shifts[1])
        bco, _ = run(fp.bco_loss, logits, batch.labels, CLASSES, ref, delta=shifts[2])
        for value, true in zip((ours.loss, ours.delta, ours.delta), (truth.loss, truth.delta, bco.delta), strict=True):
            torch.testing.assert_close(value, true.float())
        for shift in shifts[1:]:
            for name, state in shifts[0].state_dict().items():
                torch.testing.assert_close(state, shift.state_dict()[name], rtol=1e-5, atol=1e-6)
        for shift in shifts:
            shift.step()
    before = copy.deepcopy(shifts[0].state_dict())
    with torch.no_grad():
        fp.dpo_loss(logits, batch.labels, ref, **MPO, delta=shifts[0], backend=backend)
    shifts[0].eval()
    run(fp.dpo_loss, logits, batch.labels, ref, **MPO, delta=shifts[0], backend=backend)
    shifts[0].train()
    with pytest.raises(ValueError, match="ref_logps"):
        fp.dpo_loss(logits, batch.labels, ref[:3], **MPO, delta=shifts[0], backend=backend)
    assert all(torch.equal(state, before[name]) for name, state in shifts[0].state_dict().items())


def test_a_step_of_several_groups(device: str) -> None:
    """The groups hold their chosen sequences and then their rejected ones; the shift sees those of the batch."""
    batch, ref = head(device)

    def choose(problem: problems.Problem) -> problems.Plan:
        groups = [plan.fit(problem) for plan in planner.candidates(problem) if isinstance(plan, Grouped)]
        taken.append(max(groups, key=lambda plan: len(plan.bounds)))
        return taken[-1]

    taken: list[Grouped] = []
    shifts = [fp.RewardShift("ema", update="step").to(device) for _ in range(2)]
    with planner.planning(choose):
        run_linear(fp.linear_dpo_loss, batch, ref, **MPO, delta=shifts[0], memory_budget=2**20)
    assert len(taken[0].bounds) > 2
    run_linear(fp.reference.linear_dpo_loss, batch, ref, **MPO, delta=shifts[1])
    torch.testing.assert_close(shifts[0].pending_sum, shifts[1].pending_sum, rtol=1e-6, atol=1e-6)
    assert shifts[0].pending_count.tolist() == [4, 4]


@pytest.mark.parametrize("module", ["DPOLoss", "LinearDPOLoss"])
def test_modules_register_the_shift(module: str) -> None:
    shift = fp.RewardShift()
    loss = getattr(fp, module)(**MPO, delta=shift)
    assert list(loss.children()) == [shift]
    assert "delta.mean" in loss.state_dict()
    batch, ref = head()
    tensors = (batch.hidden.requires_grad_(), batch.weight)
    given = tensors if module == "LinearDPOLoss" else (batch.hidden @ batch.weight.T,)
    output = loss(*given, batch.labels, ref)
    assert output.delta == shift.current().float() != 0
    again = pickle.loads(pickle.dumps(output._replace(nll_loss=output.nll_loss)))
    assert again.delta == output.delta
    assert "delta=0.25" in repr(getattr(fp, module)(loss_type="bco_pair", delta=0.25))
    assert getattr(fp, module)(loss_type="aot").delta == 0.0


@pytest.mark.parametrize("delta", [0.3, torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64)], ids=str)
def test_numbers_and_tensors(delta: Any, backend: str) -> None:
    batch = make_batch(8, 6, 11)
    ref = near_reference(batch.logits, batch.labels)
    ours = assert_parity("dpo_loss", batch.logits, batch.labels, ref, **MPO, delta=delta, backend=backend)
    torch.testing.assert_close(ours.delta, torch.tensor(0.3))


def test_the_reported_shift_is_a_tensor_of_its_own(device: str) -> None:
    """On the device of the loss, whatever happens to the caller's."""
    batch = make_batch(8, 6, 11, device=device)
    given, ref = torch.tensor(0.3, device=device), near_reference(batch.logits, batch.labels)
    output = fp.dpo_loss(batch.logits, batch.labels, ref, **MPO, delta=given)
    given.zero_()
    assert output.delta == torch.tensor(0.3)
    elsewhere = fp.dpo_loss(batch.logits, batch.labels, ref, **MPO, delta=torch.tensor(0.3))
    assert elsewhere.delta.device == elsewhere.loss.device


@pytest.mark.parametrize("delta", [1e39, -1e39, torch.tensor(1e39, dtype=torch.float64)], ids=str)
def test_a_shift_beyond_float32(delta: Any, backend: str) -> None:
    """It saturates, as in the reference and in BCO."""
    batch = make_batch(8, 6, 11)
    ref = near_reference(batch.logits, batch.labels)
    ours, truth = (
        function(batch.logits, batch.labels, ref, loss_type="bco_pair", delta=delta, **given)
        for function, given in ((fp.dpo_loss, {"backend": backend}), (fp.reference.dpo_loss, {}))
    )
    torch.testing.assert_close((ours.loss, ours.delta), (truth.loss, truth.delta))
    assert torch.equal(ours.delta, fp.bco_loss(batch.logits, batch.labels, CLASSES, ref, delta=delta).delta)


@pytest.mark.parametrize(
    ("keywords", "most"),
    [
        ({"loss_type": "apo_down"}, 3.0),
        ({**MPO, "delta": 0.3}, 3.0),
        ({**MPO, "delta": fp.RewardShift(update="step")}, 3.0),
        ({**MPO, "delta": fp.RewardShift()}, 4.0),
        ({"loss_type": "aot"}, 4.0),
        ({"loss_type": ("aot_unpaired", "ipo")}, 4.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("budget", [None, 2**21])
def test_products(keywords: dict[str, Any], most: float, budget: int | None) -> None:
    """Matrix products in units of 2·N·D·V operations: three where a pair is on its own."""
    batch = make_hidden(8, 17, 256, 3000, mask="none")
    ref = torch.full((8,), -150.0)
    with FlopCounterMode(display=False) as counter:
        run_linear(fp.linear_dpo_loss, batch, ref, memory_budget=budget, **keywords)
    products = counter.get_total_flops() / (2 * 8 * 16 * 256 * 3000)
    assert 2.99 < products <= (most if budget is None else 4.0) + 0.01


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("case", "linear"),
    [*((case, True) for case in ("mixture", "forward", "step", "aot")), ("mixture", False), ("forward", False)],
)
def test_fullgraph(case: str, linear: bool, fresh: None) -> None:
    """A head treats each case in its own way; from logits, with and without a state."""
    batch, ref = head()
    shifts = [fp.RewardShift(update="step" if case == "step" else "forward") for _ in range(2)]
    cases: dict[str, dict[str, Any]] = {
        "mixture": {"loss_type": ("robust", "discopop", "bco_pair"), "label_smoothing": 0.1, "delta": 0.3},
        "aot": {"loss_type": ("aot", "aot_unpaired")},
    }

    def function(shift: fp.RewardShift) -> Any:
        given = cases.get(case, {**MPO, "delta": shift})
        if linear:
            return lambda h, w: fp.linear_dpo_loss(h * 2, w, batch.labels, ref, **given)
        return lambda h, w: fp.dpo_loss(h * 2 @ w.T, batch.labels, ref, **given)

    results = []
    for shift, compiled in zip(shifts, (False, True), strict=True):
        call = torch.compile(function(shift), fullgraph=True, backend="aot_eager") if compiled else function(shift)
        h, w = batch.hidden.detach().requires_grad_(), batch.weight.detach().requires_grad_()
        output = call(h, w)
        output.loss.backward()
        assert torch.equal(output.lengths, (batch.labels[:, 1:] != -100).sum(1))
        results.append((*[field for field in output if field is not None], h.grad, w.grad, output.delta))
        shift.step()
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)
    for name, state in shifts[0].state_dict().items():
        torch.testing.assert_close(state, shifts[1].state_dict()[name])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("delta", [None, 0.3, torch.tensor(0.3), fp.RewardShift()], ids=str)
def test_the_kernel_in_a_graph(delta: Any, kernel_device: str, fresh: None) -> None:
    """Its constants travel as text."""
    names = ("aot", "sigmoid") if delta is None else MPO["loss_type"]
    spec = dpo_spec({**defaults(DPOKeywords), "loss_type": names, "loss_weights": None, "beta": 0.3})
    assert decode(encode(spec, []), []) == spec
    sums = torch.linspace(-9, -2, 8, dtype=torch.float64, device=kernel_device)
    counts, ref = torch.arange(1, 9, device=kernel_device), sums.flip(0)

    def evaluate(sums: Tensor, delta: Any) -> Any:
        return PairObjective(spec, ref, None, None, delta).evaluate(
            Scores(sums, counts, None, None), "triton", torch.float32
        )

    eager, slope = evaluate(sums, copy.deepcopy(delta))
    compiled, same = torch.compile(evaluate, fullgraph=True, backend="aot_eager")(sums, copy.deepcopy(delta))
    torch.testing.assert_close(compiled[:6], eager[:6])
    torch.testing.assert_close(same, slope)
