"""Calls that say no ``memory_budget``: none raises, and what they may take follows from their device."""

import functools
import itertools
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import make_hidden, peak_bytes, reference_logps
from head_cases import SHAPES
from parallel_work import on_ranks
from ranks import run_ranks

import fused_pref as fp
from fused_pref.__main__ import main
from fused_pref.head import advice, budget
from fused_pref.head.budget import default_budget, memory_of
from fused_pref.head.plans.planner import candidates, choose, least_budget
from fused_pref.head.plans.problem import Problem
from fused_pref.ops.devices import CPU, GPUS

DEVICES = (*GPUS, "cuda", "xpu", "cpu")
WORKS: dict[str, dict[str, Any]] = {
    "cpo": {"objective": "cpo"},
    "dpo": {"objective": "dpo"},
    "bco": {"objective": "bco"},
    "bco, known": {"objective": "bco", "delta": "known"},
    "logps": {"objective": "logps"},
    "frozen": {"objective": "cpo", "gradients": ("hidden",)},
    "evaluation": {"objective": "logps", "gradients": ()},
    "skipping": {"objective": "cpo", "skip_mass": 2**-9},
    "float16": {"objective": "bco", "dtype": "float16"},
    "float32": {"objective": "dpo", "dtype": "float32"},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("work", WORKS)
def test_no_default_raises(work: str, device: str) -> None:
    """Nor takes a plan of a row or a column at a time: that would never end."""
    for (hidden, vocab), tokens in itertools.product(SHAPES, (1024, 16384, 131072)):
        found = fp.explain(hidden=hidden, vocab=vocab, tokens=tokens, device=device, **WORKS[work])
        plans, allowed = list(candidates(found.problem)), found.problem.budget
        least = min(plan.workspace for plan in plans)
        assert found.peak_bytes <= max(allowed, least * 5 // 4)
        fair = min(plan.seconds for plan in plans if plan.workspace <= max(allowed, least * 5 // 4))
        assert found.plan.seconds <= 1.02 * fair
        assert min(found.plan.rows, found.plan.columns) >= 128, found.plan
        assert ("passed, as plans begin at" in found.budget) == (found.peak_bytes > allowed)


def test_the_call_of_the_report() -> None:
    found = fp.explain(hidden=4096, vocab=32000, tokens=16384, device="sm_90")
    assert found.budget == "8.69 GiB, 1/16 of the device's 139.00 GiB"
    assert (found.plan.name, found.products) == ("grouped", 3)


def test_which_budget_holds_and_why() -> None:
    sizes: dict[str, Any] = {"hidden": 4096, "vocab": 32000, "tokens": 8192}
    rule = "256 MiB or the bytes of dW, whichever is more"
    for options, text in (
        ({"device": "sm_80"}, "4.94 GiB, 1/16 of the device's 79.00 GiB"),
        ({"device": "sm_80", "device_memory": 24 << 30}, "1.50 GiB, 1/16 of the device's 24.00 GiB"),
        ({"device": "xpu", "device_memory": 48 << 30}, "3.00 GiB, 1/16 of the device's 48.00 GiB"),
        ({"device": "sm_80", "device_memory": 1, "memory_budget": 1 << 30}, "1.00 GiB, memory_budget"),
        ({"device": "sm_80", "device_memory": 1, "gradients": ()}, "0.0 MiB, 1/16 of the device's 0.0 MiB; passed, as"),
        ({"device": "cpu", "gradients": (), "dtype": "float32"}, f"500.0 MiB, {rule}"),
        ({"device": "cpu", "gradients": ()}, f"256.0 MiB, {rule}"),
        ({"device": "xpu", "gradients": ()}, f"256.0 MiB, {rule}"),
    ):
        found = fp.explain(**sizes, **options)
        assert found.budget.startswith(text)
        assert f"\nbudget {found.budget}\n" in str(found)


def test_the_command_takes_device_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--model", "phi-4", "--device", "sm_80", "--device-memory", "25769803776", "--all"]) == 0
    assert "budget 1.50 GiB, 1/16 of the device's 24.00 GiB" in capsys.readouterr().out
    assert main(["explain", "--model", "phi-4", "--device", "cpu", "--device-memory", "5"]) == 2
    assert "device_memory must be None on a CPU" in capsys.readouterr().err


def test_budget_of_a_weight() -> None:
    """Of a device whose memory is not known it follows from the weight; meta and MPS have none that PyTorch tells."""
    assert default_budget(None, 10, 10, 4) == 2**28
    assert default_budget(None, 2**17, 2**12, 2) == 2**30
    assert default_budget(2**37, 2**17, 2**12, 2) == 2**33
    for kind in ("cpu", "mps", "meta"):
        assert memory_of(torch.device(kind)) is None


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_memory_of_a_real_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, asked = getattr(torch, kind), []

    def properties(device: torch.device) -> Any:
        asked.append(device)
        return SimpleNamespace(total_memory=3 << 34)

    monkeypatch.setattr(module, "is_available", lambda: False)
    assert memory_of.__wrapped__(torch.device(kind, 1)) is None
    assert asked == []
    monkeypatch.setattr(module, "is_available", lambda: True)
    monkeypatch.setattr(module, "get_device_properties", properties)
    assert memory_of.__wrapped__(torch.device(kind, 1)) == 3 << 34
    assert asked == [torch.device(kind, 1)]


def test_explain_asks_the_device_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "current_device", lambda: 2)
    monkeypatch.setattr("fused_pref.cli.explanation.memory_of", lambda device: (24 << 30) + device.index)
    assert fp.explain("phi-4", device="xpu").problem.budget == (24 << 30) // 16
    assert fp.explain("phi-4", device="xpu", device_memory=1 << 34).problem.budget == 1 << 30
    assert fp.explain("phi-4", device="sm_80").problem.budget == GPUS["sm_80"].memory // 16  # type: ignore[operator]


def problem(**changes: Any) -> Problem:
    sizes: dict[str, Any] = {"tokens": 16384, "positions": 16384, "hidden": 4096, "vocabulary": 32000, "itemsize": 2}
    rest = {"weight_itemsize": 2, "gradients": frozenset({"hidden", "weight"}), "local": False, "units": ()}
    return Problem(**{**sizes, **rest, "budget": 2**28, "device": CPU, **changes})


def test_only_a_promise_raises() -> None:
    with pytest.raises(ValueError, match=r"memory_budget must be at least \d+ bytes .*got 268435456"):
        choose(problem())
    least = least_budget(problem())
    found = choose(problem(promised=False))
    assert least < found.workspace <= least * 5 // 4
    assert found.seconds < 0.6 * choose(problem(budget=least)).seconds
    # A default that hardly reaches is no better.
    assert choose(problem(budget=least, promised=False)) == found
    roomy = {"budget": 2**32}
    assert choose(problem(**roomy, promised=False)) == choose(problem(**roomy))


def test_unscored_rows_have_a_budget_too() -> None:
    """A softcap projects the rows that are not scored, for the means of the logits, before anything else."""
    few = {"tokens": 4, "unscored": 2**20, "cast_weight": 2**29, "gradients": frozenset()}
    with pytest.raises(ValueError, match="memory_budget must be at least"):
        choose(problem(**few))
    assert choose(problem(**few, promised=False)).workspace <= least_budget(problem(**few)) * 5 // 4


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of 256 KiB, on which nothing has been said yet."""
    monkeypatch.setattr(budget, "memory_of", lambda device: 2**18)
    monkeypatch.setattr(advice, "_said", set())


CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped": ("linear_cpo_loss", {}),
    "vocab_major": ("linear_bco_loss", {"delta": "moving"}),
    "skipping": ("linear_cpo_loss", {"skip_mass": 2**-9}),
    "logps": ("linear_token_logps", {}),
    "softcap": ("linear_cpo_loss", {"softcap": 5.0}),
}


def run(name: str, budgeted: dict[str, Any]) -> list[torch.Tensor]:
    function, keywords = CALLS[name]
    if "delta" in keywords:
        keywords = {**keywords, "delta": fp.RewardShift()}
    batch = make_hidden(4, 33, 64, 1001, mask="some", seed=3)
    leaves = [batch.hidden.requires_grad_(), batch.weight.requires_grad_()]
    others = (torch.tensor([True, False, True, False]), reference_logps(4)) if function == "linear_bco_loss" else ()
    output = getattr(fp, function)(*leaves, batch.labels, *others, **keywords, **budgeted)
    loss = output.sum() if isinstance(output, torch.Tensor) else output.loss
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", CALLS)
def test_a_call_beyond_the_default_works_and_warns_once(name: str) -> None:
    wanted = run(name, {"memory_budget": 2**30})
    text = (
        r"default budget of the linear head, 16384 bytes, is too little for N=\d+ tokens, D=64, V=1001: plan \w+ takes"
    )
    with pytest.warns(UserWarning, match=text) as seen:
        found = run(name, {})
    assert len(seen) == 1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    run(name, {})  # warnings are errors here
    run("grouped", {})


@pytest.mark.usefixtures("small")
def test_the_warning_can_be_filtered_and_a_promise_needs_none() -> None:
    with pytest.raises(ValueError, match=r"memory_budget must be at least \d+ bytes .*got 16384"):
        run("grouped", {"memory_budget": 16384})
    run("grouped", {"memory_budget": 2**22})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the default budget of the linear head")
        run("grouped", {})


@pytest.mark.usefixtures("small")
def test_under_compile() -> None:
    """The plan is chosen inside of a custom op, which has the default budget of its own device."""
    batch = make_hidden(4, 33, 64, 1001, mask="some", seed=3)
    step = torch.compile(lambda h, w, y: fp.linear_cpo_loss(h, w, y).loss, fullgraph=True, backend="aot_eager")
    with pytest.warns(UserWarning, match="default budget of the linear head, 16384 bytes"):
        found = step(batch.hidden, batch.weight, batch.labels)
    torch.testing.assert_close(found, fp.linear_cpo_loss(batch.hidden, batch.weight, batch.labels).loss)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_plan_for_the_smallest_default(world: int) -> None:
    """Their devices differ, that of rank 1 is the smallest. No rank raises, and their plans are the same."""
    found = [rank["smallest_default"] for rank in on_ranks(world)]
    assert [budget for budget, _, _ in found] == [2**14] * world
    assert all(plan == found[0][1] and plan.workspace > 2**14 for _, plan, _ in found)
    assert all(torch.equal(loss, on_ranks(world)[0]["torch.float32"]["cpo"]["loss"]) for _, _, loss in found)


def peaks_of_a_shard(rank: int) -> dict[str, tuple[int, int]]:
    """The least budget of calls on a rank's half of the vocabulary, and what they take beyond their gradients."""
    found: dict[str, tuple[int, int]] = {}
    for name, wanted in itertools.product(("linear_cpo_loss", "linear_token_logps"), ("hw", "h")):
        batch = make_hidden(4, 2049, 512, 256, dtype=torch.bfloat16, mask="none")
        batch.labels[:, 16:] = -100
        h = batch.hidden.requires_grad_()
        w = batch.weight.chunk(2)[rank].clone().requires_grad_("w" in wanted)

        def step(budget: int, name: str = name, h: torch.Tensor = h, w: torch.Tensor = w, batch: Any = batch) -> None:
            output = getattr(fp, name)(h, w, batch.labels, memory_budget=budget, tp_group=dist.group.WORLD)
            (output.sum() if isinstance(output, torch.Tensor) else output.loss).backward()

        with pytest.raises(ValueError, match="memory_budget must be at least") as refused:
            step(1)
        least = int(str(refused.value).split("least ")[1].split()[0])
        step(least)
        h.grad = w.grad = None
        gradients = sum(leaf.numel() * leaf.element_size() for leaf in (h, w) if leaf.requires_grad)
        found[f"{name} {wanted}"] = (least, peak_bytes(functools.partial(step, least)) - gradients)
    return found


@pytest.mark.slow
def test_a_budget_holds_on_a_shard() -> None:
    """The gradient of 16-bit hidden states is summed over the ranks in float32, beside the one that is returned."""
    for found in run_ranks(2, peaks_of_a_shard):
        for call, (least, peak) in found.items():
            assert peak <= least, call
