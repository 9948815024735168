"""Calls at the sizes of a training: every plan and every loss, on a machine with GPUs that are not there."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fused_pref as fp
from benchmarks.replay.machine import Machine
from fused_pref.head.plans import planner
from fused_pref.head.plans.problem import Plan, Problem

# Streaming multiprocessors or compute units of the GPU that each target stands for.
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
SEQUENCES, LENGTH, FEATURES, VOCABULARY = 16, 512, 4096, 128256
# Half of a sequence is its prompt.
SCORED = LENGTH // 2
REFERENCE = torch.float32


@dataclass(frozen=True)
class Call:
    """A call, and what of it is forced.

    Attributes:
        name: of the function, and in words what its arguments are.
        function: of the library.
        gradients: which of ``"hidden"``, ``"weight"``, ``"bias"``, ``"logits"`` a backward makes.
        plan: its name, fused or not; None: what the planner chooses, or from logits.
        keywords: constants of the call.
        gpu: where its tensors are; the current one is 0.
    """

    name: str
    function: Callable[..., Any]
    gradients: tuple[str, ...] = ("hidden", "weight")
    plan: tuple[str, bool] | None = None
    keywords: dict[str, Any] = field(default_factory=dict)
    gpu: int = 0


@dataclass(frozen=True)
class Replayed:
    """What a call did on a machine, forward and backward; ``plan`` is None from logits."""

    call: Call
    machine: Machine
    plan: Plan | None
    returned: int


def replay(call: Call, target: str) -> Replayed:
    """Run a call on a machine with this target's GPUs."""
    machine = Machine(target, PROCESSORS[target], counts=[SCORED] * SEQUENCES)
    taken: list[Plan] = []

    def choose(problem: Problem) -> Plan:
        taken.append(forced(problem, *call.plan) if call.plan else planner.choose(problem))
        return taken[-1]

    leaves, arguments, keywords = _arguments(call, machine)
    with ExitStack() as stack:
        stack.enter_context(planner.planning(choose))
        stack.enter_context(machine.running())
        output = call.function(*arguments, **keywords)
        loss = output if isinstance(output, Tensor) else output.loss
        if call.gradients:
            machine.backward(loss)
    for leaf in leaves:
        if leaf.requires_grad:
            assert leaf.grad is not None
            assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype)
    returned = sum(machine.counted(leaf.grad) for leaf in leaves if leaf.grad is not None)
    return Replayed(call, machine, taken[0] if taken else None, returned)


def forced(problem: Problem, name: str, fused: bool) -> Plan:
    """The fastest plan of this name within the budget."""
    allowed = replace(problem, promised=True)
    fitting = [p for p in planner.candidates(allowed) if (p.name, p.fused) == (name, fused)]
    return min((p for p in fitting if p.workspace <= problem.budget), key=lambda p: p.seconds)


def _arguments(call: Call, machine: Machine) -> tuple[list[Tensor], list[Any], dict[str, Any]]:
    """Leaves, arguments and keywords of a call."""
    make = partial(machine.tensor, gpu=call.gpu)
    labels = make(SEQUENCES, LENGTH, dtype=torch.int64)
    if call.function.__name__.startswith("linear_"):
        leaves = {"hidden": make(SEQUENCES, LENGTH, FEATURES), "weight": make(VOCABULARY, FEATURES)}
        if "bias" in call.gradients:
            leaves["bias"] = make(VOCABULARY)
    else:
        leaves = {"logits": make(SEQUENCES, LENGTH, VOCABULARY)}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in call.gradients)
    keywords = {name: _keyword(value, machine, call.gpu) for name, value in call.keywords.items()}
    arguments: list[Any] = [leaf for name, leaf in leaves.items() if name != "bias"] + [labels]
    if "bias" in leaves:
        keywords["bias"] = leaves["bias"]
    if "bco" in call.function.__name__:
        arguments.append(make(SEQUENCES, dtype=torch.bool))
    if "bco" in call.function.__name__ or "dpo" in call.function.__name__:
        arguments.append(make(SEQUENCES, dtype=REFERENCE))
    return list(leaves.values()), arguments, keywords


def _keyword(value: Any, machine: Machine, gpu: int) -> Any:
    """A RewardShift is of its own in every call, and where the tensors are."""
    return machine.adopt(value(), gpu) if value in (SHIFT, STEP) else value


SHIFT, STEP = partial(fp.RewardShift), partial(fp.RewardShift, update="step")
CPO, DPO, BCO = fp.linear_cpo_loss, fp.linear_dpo_loss, fp.linear_bco_loss
LOGPS, LOGITS = fp.linear_token_logps, ("logits",)
BOUND = {"max_valid_tokens": SEQUENCES * SCORED}
CALLS = [
    *(Call("CPO", CPO, plan=("grouped", fused)) for fused in (False, True)),
    *(Call("CPO", CPO, plan=("vocab_major", fused)) for fused in (False, True)),
    *(Call("CPO, head frozen", CPO, ("hidden",), ("frozen_head", fused)) for fused in (False, True)),
    *(Call("log-probs, evaluation", LOGPS, (), ("logprob", fused)) for fused in (False, True)),
    *(Call("CPO, `skip_mass`", CPO, plan=("skipping", True), keywords={"skip_mass": 2**-9}) for _ in range(1)),
    Call("CPO, all gradients", CPO, ("hidden", "weight", "bias")),
    Call("CPO, 512 MiB", CPO, keywords={"memory_budget": 512 << 20}),
    Call("CPO, softcap", CPO, keywords={"softcap": 30.0}),
    Call("CPO, bound on N", CPO, keywords=BOUND),
    Call("SimPO", CPO, keywords={"loss_type": "simpo"}),
    Call("DPO", DPO),
    Call("DPO, `backend=torch`", DPO, keywords={"backend": "torch"}),
    Call("BCO, δ a number", BCO, keywords={"delta": 0.1}),
    Call("BCO, δ a number, bound on N", BCO, keywords={"delta": 0.1, **BOUND}),
    Call("BCO, δ a number, `backend=torch`", BCO, keywords={"delta": 0.1, "backend": "torch"}),
    Call("BCO, δ of the batch", BCO, keywords={"delta": SHIFT}),
    Call("BCO, δ of the last step", BCO, keywords={"delta": STEP}),
    Call("log-probs", LOGPS),
    Call("sequence log-probs", fp.linear_sequence_logps),
    Call("CPO of logits", fp.cpo_loss, LOGITS),
    Call("CPO of logits, in place", fp.cpo_loss, LOGITS, keywords={"inplace_backward": True}),
    Call("DPO of logits", fp.dpo_loss, LOGITS),
    Call("BCO of logits, δ of the batch", fp.bco_loss, LOGITS, keywords={"delta": SHIFT}),
    Call("log-probs of logits", fp.token_logps, LOGITS),
]
