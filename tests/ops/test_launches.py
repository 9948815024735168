"""What a step on the Triton backend launches: how much, on what memory, and that it never waits for the device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import make_batch, reference_logps, run
from probes import KERNEL, launches, poisoned, small_blocks, small_reductions
from torch import Tensor

import fused_pref as fp
from fused_pref import validate
from fused_pref.ops.interface import PairSpec, PairTerm, Transform, UnpairedSpec
from fused_pref.ops.triton import dlogits, logprob, objective, pairs, sequences

OBJECTIVES = ["cpo", "dpo", "bco", "bco_step"]
SPLIT = pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])


def step_of(
    name: str, device: str, *, sequences: int = 4, length: int = 6, packed: bool = False, **keywords: Any
) -> tuple[Callable[[], Any], Tensor]:
    """A forward and backward whose normalizers and scalars are tensors, and the leaf it differentiates."""
    batch = make_batch(sequences, length, 67, device=device)
    logits, labels = batch.logits, batch.labels
    if packed:
        logits, labels, keywords["cu_seqlens"] = batch.packed([length - s % 3 for s in range(sequences)])
    leaf, ref = logits.clone().requires_grad_(), reference_logps(sequences, device)
    desirable = torch.arange(sequences, device=device) % 2 == 0
    count = torch.tensor(3.0, device=device)
    update = "step" if name == "bco_step" else "forward"
    shift = fp.RewardShift("ema" if packed else "running_mean", update=update).to(device)
    weight = torch.ones(sequences, device=device)
    keywords["backend"] = "triton"
    counts: dict[str, Any] = {"sequence_normalizer": count}
    if packed:
        counts = {"reduction": "class_mean", "class_normalizer": (count, count)}

    def objective() -> Any:
        if name == "cpo":
            return fp.cpo_loss(leaf, labels, pair_normalizer=count, token_normalizer=count, **keywords)
        if name == "dpo":
            return fp.dpo_loss(leaf, labels, ref, pair_normalizer=count, **keywords)
        return fp.bco_loss(leaf, labels, desirable, ref, delta=shift, sample_weight=weight, **counts, **keywords)

    def step() -> Any:
        leaf.grad = None
        output = objective()
        output.loss.backward()
        return output

    return step, leaf


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("logits_mean", ["all", "completion", None])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@SPLIT
def test_at_most_eight_launches(
    objective: str, logits_mean: str | None, packed: bool, split: bool, kernel_device: str, monkeypatch: Any
) -> None:
    """Forward and backward, and no more of them for a larger batch."""
    small_blocks(monkeypatch, 16, 20 if split else 0)
    monkeypatch.setattr(validate, "readable", lambda tensor: False)
    found = []
    for size in ({"sequences": 2, "length": 3}, {"sequences": 6, "length": 4}):
        step, _ = step_of(objective, kernel_device, packed=packed, logits_mean=logits_mean, **size)
        with launches(execute=False) as recorder:
            step()
        found.append(recorder.names)
    assert found[0] == found[1]
    assert ("_token_logps_combine_kernel" in found[0]) == split
    assert sum(name.endswith("_kernel") for name in found[0]) == 5 + packed + split
    assert len(found[0]) <= 8, found[0]


@pytest.mark.parametrize("name", ["token_logps", "sequence_logps"])
def test_launches_of_building_blocks(name: str, kernel_device: str) -> None:
    batch = make_batch(4, 6, 67, device=kernel_device)
    leaf = batch.logits.requires_grad_()
    with launches() as recorder:
        result = getattr(fp, name)(leaf, batch.labels, backend="triton")
    assert recorder.names[:2] == ["_targets_kernel", "_token_logps_fwd_kernel"]
    assert len(recorder.names) <= 4
    assert result.requires_grad


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_never_waits_for_the_device(objective: str, packed: bool, kernel_device: str, monkeypatch: Any) -> None:
    """No operation that reads a value back, with every scalar a tensor; on a GPU, PyTorch itself refuses to wait."""
    monkeypatch.setattr(validate, "readable", lambda tensor: False)
    step, _ = step_of(objective, kernel_device, packed=packed)
    if kernel_device == "cuda":
        step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        with launches(execute=kernel_device == "cuda") as recorder:
            output = step()
            output.metrics()
    finally:
        if kernel_device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert not recorder.synchronising


def test_probe_sees_reads() -> None:
    """The recorder notices what the tests above say does not happen."""
    with launches() as recorder:
        float(torch.ones(2).sum())
        torch.ones(3).nonzero()
    assert [name.split(".")[1] for name in recorder.synchronising] == ["_local_scalar_dense", "nonzero"]
    assert [name.split(".")[1] for name in recorder.names[:2]] == ["ones", "sum"]


@pytest.mark.usefixtures("poison")
def test_scratch_is_poisoned(kernel_device: str, monkeypatch: Any) -> None:
    """With launches suppressed, every launcher returns, and would have used, memory of NaN alone."""
    small_blocks(monkeypatch, 16, 20)
    batch = make_batch(4, 6, 67, device=kernel_device)
    logits, labels = batch.logits, batch.labels
    ends = torch.tensor([0, 6, 12, 18, 24], device=kernel_device)
    ref, desirable = reference_logps(4, kernel_device), torch.ones(4, dtype=torch.bool, device=kernel_device)
    given = {tensor.data_ptr() for tensor in (logits, labels, ends, ref, desirable)}
    launched: dict[str, list[Tensor]] = {}

    def skip(kernel: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        tensors = [value for value in args if isinstance(value, Tensor) and value.data_ptr() not in given]
        launched[kernel.fn.__name__] = tensors

    monkeypatch.setattr(KERNEL, "run", skip)
    targets = sequences.targets_of(labels, None, -100)
    logp, statistics, means, _ = logprob.token_logps_fwd(logits, targets, "all", -100, Transform())
    sums, counts, totals, positions = sequences.sequence_scores(logp, means, targets, None, "all", -100)
    spec = PairSpec((PairTerm("sigmoid"),), 0.1, 1.0)
    pairs.pair_objective((sums, counts, totals, positions), ref, None, None, None, None, spec)
    bco = (None, 0.0, None, None, UnpairedSpec("bco", 0.1))
    objective.unpaired_objective(sums, totals, positions, desirable, ref, *bco)
    sequences.expand(torch.empty_like(logp), sums, None, ends)
    grad = torch.empty_like(logits)
    dlogits.token_logps_bwd(grad, logits, targets, statistics, logp, -100, Transform())
    sizes = {name: [tensor.numel() for tensor in tensors] for name, tensors in launched.items()}
    assert sizes == {
        "_targets_kernel": [24],
        "_token_logps_fwd_kernel": [24, 24, 72, 24, 2 * 3 * 24],
        "_token_logps_combine_kernel": [24, 24, 72, 24, 2 * 3 * 24],
        "_sequence_scores_kernel": [24, 24, 24, 4, 4, 4, 4],
        "_pair_objective_kernel": [4, 4, 4, 4, 1, 3, 4, 4, 4],
        "_unpaired_objective_kernel": [4, 4, 4, 1, 3, 2, 4, 4, 4],
        "_expand_kernel": [4, 24],
        "_token_logps_bwd_kernel": [24, 72, 24, 24 * 67],
    }
    assert all(poisoned(tensor) for tensors in launched.values() for tensor in tensors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "packed", "split"),
    [("cpo", False, True), ("dpo", True, False), ("bco", True, True), ("bco_step", False, True)],
)
def test_repeats_to_the_bit(
    objective: str, packed: bool, split: bool, kernel_device: str, poison: None, monkeypatch: Any
) -> None:
    small_blocks(monkeypatch, 16, 20 if split else 0)
    small_reductions(monkeypatch, 4)
    results = []
    for _ in range(2):
        step, leaf = step_of(objective, kernel_device, sequences=6, length=4, packed=packed)
        output = step()
        assert leaf.grad is not None
        results.append([*output, leaf.grad])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_loss_may_be_changed_in_place(device: str, backend: str) -> None:
    """As trainers do for accumulation; the gradient follows."""
    batch = make_batch(4, 6, 17, device=device)
    output, truth = run(fp.cpo_loss, batch.logits, batch.labels, backend=backend)
    leaf = batch.logits.clone().requires_grad_()
    loss = fp.cpo_loss(leaf, batch.labels, backend=backend).loss
    loss *= 0.5
    loss += 1
    loss.backward()
    torch.testing.assert_close(leaf.grad, truth / 2)
    torch.testing.assert_close(loss, output.loss / 2 + 1)


class DropFunction(torch.autograd.Function):
    """Passes a value on and says that there is no gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


@pytest.mark.parametrize("name", ["token_logps", "sequence_logps"])
def test_no_gradient_means_no_gradient(name: str, device: str, backend: str) -> None:
    batch = make_batch(4, 6, 17, device=device)
    leaf = batch.logits.requires_grad_()
    DropFunction.apply(getattr(fp, name)(leaf, batch.labels, backend=backend)).sum().backward()
    assert leaf.grad is None or not leaf.grad.any()
