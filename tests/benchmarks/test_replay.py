"""The replay: every plan and loss at the sizes of a training, on GPUs that are not there."""

import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from replay import all_faults, faults

import fused_pref as fp
from benchmarks.__main__ import main
from benchmarks.replay import calls
from benchmarks.replay.calls import CALLS, PROCESSORS, Call, replay
from benchmarks.replay.machine import Machine, Operand
from fused_pref.head.plans import planner
from fused_pref.ops.triton import launch

ROOT = Path(__file__).parents[2]
NAMES = [f"{call.name}{'' if call.plan is None else f', {call.plan[0]}'}" for call in CALLS]
DEFAULT = next(call for call in CALLS if call.name == "CPO, softcap")
# Beside the workspace: results and per-token vectors.
SLACK = 2**20


@pytest.mark.parametrize("target", PROCESSORS)
@pytest.mark.parametrize("call", CALLS, ids=NAMES)
def test_a_call(call: Call, target: str) -> None:
    """On a GPU that is not the current one: nothing a launch would refuse, no wait but one, no more than is planned."""
    replayed = replay(replace(call, gpu=1), target)
    machine, plan = replayed.machine, replayed.plan
    assert all_faults(replayed) == []
    assert machine.launches or call.keywords.get("backend") == "torch"
    assert machine.current == 0
    linear = call.function.__name__.startswith("linear_")
    assert machine.waits == (["tolist"] if linear and "max_valid_tokens" not in call.keywords else [])
    assert machine.copies == []
    if plan is None:
        assert machine.peak - replayed.returned <= SLACK
    else:
        assert (plan.name, plan.fused) == (call.plan or (plan.name, plan.fused))
        assert machine.peak - replayed.returned <= plan.workspace + SLACK


@pytest.mark.parametrize("name", ["grouped", "vocab_major", "frozen_head"])
def test_rows_of_q_are_aligned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an odd vocabulary, too; the workspace counts what that takes."""
    monkeypatch.setattr(calls, "VOCABULARY", 50257)
    replayed = replay(next(call for call in CALLS if call.plan == (name, True)), "sm_90")
    assert replayed.plan is not None
    assert replayed.machine.peak - replayed.returned <= replayed.plan.workspace + SLACK
    found = [launched.bound.get("out_stride") for launched in replayed.machine.launches]
    strides = [stride for stride in found if stride is not None]
    assert strides
    assert all(stride % 16 == 0 for stride in strides), strides


def test_every_plan_is_replayed() -> None:
    forced = {call.plan for call in CALLS if call.plan}
    plans = {plan.name for plan in planner.Plan.__subclasses__()}
    assert {name for name, _ in forced} == plans | {"skipping"}


# Operations of PyTorch and kernels of a step, at most, by plan, fused or not.
LAUNCHES = {
    ("grouped", True): (57, 9),
    ("grouped", False): (52, 9),
    ("vocab_major", True): (64, 14),
    ("vocab_major", False): (48, 10),
    ("frozen_head", True): (44, 10),
    ("frozen_head", False): (39, 10),
    ("logprob", True): (24, 4),
    ("logprob", False): (12, 3),
}


@pytest.mark.parametrize("plan", LAUNCHES)
def test_launches_of_a_step_are_few(plan: tuple[str, bool]) -> None:
    machine = replay(next(call for call in CALLS if call.plan == plan), "sm_90").machine
    most_operations, most_kernels = LAUNCHES[plan]
    assert len(machine.operations) <= most_operations, machine.operations
    assert len(machine.launches) <= most_kernels, [launched.name for launched in machine.launches]


@pytest.mark.parametrize("sequences", [8, 32])
def test_launches_do_not_grow_with_the_batch(sequences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From logits; of the head the plan may differ."""
    call = next(call for call in CALLS if call.name == "CPO of logits")
    usual = len(replay(call, "sm_90").machine.launches)
    monkeypatch.setattr(calls, "SEQUENCES", sequences)
    assert len(replay(call, "sm_90").machine.launches) == usual


def test_two_gpus_in_turn() -> None:
    """As in a naive pipeline, and under ``device_map``: a batch on each GPU, the backwards after both forwards."""
    machine = Machine("sm_90", 132, counts=[4, 4])
    batches = []
    for gpu in (0, 1):
        hidden, weight = machine.tensor(2, 8, 64, gpu=gpu), machine.tensor(512, 64, gpu=gpu)
        labels = machine.tensor(2, 8, gpu=gpu, dtype=torch.int64)
        batches.append((hidden.requires_grad_(), weight.requires_grad_(), labels))
    with machine.running():
        losses = [fp.linear_cpo_loss(*batch).loss for batch in batches]
        forward = len(machine.launches)
        for loss in losses:
            machine.backward(loss)
        assert [loss.device.index for loss in losses] == [0, 1]
    gpus = [one.gpu for one in machine.launches]
    assert set(gpus[:forward]) == set(gpus[forward:]) == {0, 1}
    assert [fault for one in machine.launches for fault in faults(one, one.gpu)] == []


def test_hidden_states_move_to_the_head() -> None:
    """Under ``device_map`` the last layer may be on another GPU than the head."""
    machine = Machine("sm_90", 132, counts=[4, 4])
    hidden, weight = machine.tensor(2, 8, 64), machine.tensor(512, 64, gpu=1)
    labels = machine.tensor(2, 8, gpu=1, dtype=torch.int64)
    with machine.running():
        with pytest.raises(ValueError, match="on cuda:0"):
            fp.linear_token_logps(hidden, weight, labels)
        fp.linear_token_logps(hidden.to(weight.device), weight, labels)
    assert {one.gpu for one in machine.launches} == {1}


def test_a_launch_on_the_current_gpu_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def nowhere(device: torch.device) -> Any:
        yield

    monkeypatch.setattr(launch, "on", nowhere)
    found = all_faults(replay(replace(DEFAULT, gpu=1), "sm_90"))
    assert found
    assert all(fault.endswith("launched on 0") for fault in found)


def test_waits_and_copies_are_noticed() -> None:
    machine = Machine("sm_90", 132)
    x = machine.tensor(4, dtype=torch.float32)
    host = torch.tensor(2.0)
    with machine.running():
        assert (x + host).device == x.device  # its value goes with the launch
        torch.full((), 3.0, device=x.device)
        assert machine.copies == []
        torch.as_tensor(3.0, device=x.device)
        torch.tensor([1, 2], device="cuda:1")
        x[0] = host
        assert len(machine.copies) == 3
        values = (torch.arange(4), torch.from_numpy(np.ones(4)), torch.tensor([1, 2]))
        moved = [value.to(x.device) for value in values] + [host.to(x), host.to(device="cuda:0"), host.to("cuda:0")]
        assert [value.device for value in moved] == [x.device] * 6
        assert machine.copies[3:] == ["to"] * 6
        assert host.to(x.double()).dtype == torch.float64
        host.to(torch.float64), x.to(torch.float64), x.to(x.device)
        assert len(machine.copies) == 10
        with pytest.raises(AssertionError, match="item reads a value"):
            x.sum().item()
        with pytest.raises(AssertionError, match="__bool__ reads a value"):
            bool(x.sum() > 0)
        with pytest.raises(RuntimeError, match="several GPUs"):
            x + torch.zeros(4, device="cuda:1")
        assert machine.waits == ["item", "__bool__"]
        counts = machine.tensor(4, dtype=torch.int64)
        torch.repeat_interleave(x, counts, output_size=7)
        with pytest.raises(AssertionError, match="repeat_interleave reads a value"):
            torch.repeat_interleave(x, counts)
        with pytest.raises(AssertionError, match="repeat_interleave reads a value"):
            x.repeat_interleave(counts)
        x.repeat_interleave(2)
        assert machine.waits[2:] == ["repeat_interleave"] * 2


def test_memory_is_counted() -> None:
    machine = Machine("sm_90", 132)
    x = machine.tensor(1024, dtype=torch.float32)
    with machine.running():
        y = x + 1
        z = y[:512].view(2, 256).clone()
        del y
        z.mul_(2)
        x + z.sum()
    assert (machine.allocated, machine.peak) == (4096 + 2048 + 4 + 4096, 2048 + 4 + 4096)
    assert machine.operations == ["add", "clone", "mul_", "sum", "add"]


def test_descriptors_and_grids_are_checked() -> None:
    launched = next(one for one in replay(CALLS[1], "sm_90").machine.launches if one.name == "linear_statistics")
    weight = launched.bound["weight"]
    assert isinstance(weight, Operand)
    assert weight.block == (256, 64)

    def found(**changed: Any) -> list[str]:
        keywords = {**launched.keywords, "weight": replace(weight, **changed)}
        return faults(replace(launched, keywords=keywords), 0)

    assert found() == []
    for wrong in ({"offset": 8}, {"strides": (4097, 1)}, {"strides": (4096, 2)}, {"block": (512, 64)}, {"gpu": None}):
        assert len(found(**wrong)) == 1
    assert faults(replace(launched, grid=(1, 70000)), 0) == ["linear_statistics: grid (1, 70000, 1)"]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--calls", "logits, in place"]) == 0
    assert "| CPO of logits, in place |  | 2 | 5 | 0 | 0 | 0 |  |" in capsys.readouterr().out
    assert main(["replay", "--calls", "none such"]) == 2


@pytest.mark.slow
def test_shared_memory_of_compiled_launches() -> None:
    """Of every launch of one call; the exit status says whether there is enough, as there is not of 1000 bytes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = (
        "from benchmarks.__main__ import main; from benchmarks.static import gpus\n"
        "print('status', main())\n"
        "gpus.GPUS['sm_90'].__dict__['shared'] = 1000\n"
        "print('status', main())"
    )
    command = [sys.executable, "-c", code, "replay", "--compile", "--calls", "CPO, 512 MiB"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    enough, short = (place for place, line in enumerate(lines) if line.startswith("status "))
    assert lines[enough - 1].endswith("| 144 |")
    assert (lines[enough], lines[short]) == ("status 0", "status 1")
