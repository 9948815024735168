"""What fails in the middle of a step leaves everything as it was, and says what to do."""

import gc
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from probes import Allocations, recording
from torch import Tensor

import fused_pref as fp

S, T, D, V = 4, 5, 16, 100
# Of several groups where the δ does not move, in float32, and of several slices; in bfloat16 of one group.
BUDGETS = {
    torch.float32: {"step": 24_000, "moving": 30_000},
    torch.bfloat16: {"step": 37_500, "moving": 36_000},
    torch.float16: {"step": 40_000, "moving": 40_000},
}
# Allocations that fail, of each step.
FAILURES = {"torch": 8, "triton": 1}
PLANS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "grouped, small": {"small": True},
    "vocab_major": {"delta": "moving"},
    "vocab_major, small": {"delta": "moving", "small": True},
    "frozen_head": {"wanted": "h"},
    "skipping": {"skip_mass": 2**-9},
}


class Step(NamedTuple):
    """A call of a function and the tensors it is given; ``shift`` is the state that it may change."""

    call: Callable[[], fp.BCOOutput]
    tensors: dict[str, Tensor]
    shift: fp.RewardShift

    def state(self) -> dict[str, Tensor]:
        """Inputs and state, copied."""
        return {
            name: tensor.detach().clone() for name, tensor in (self.tensors | dict(self.shift.named_buffers())).items()
        }

    def gradients(self) -> list[Tensor | None]:
        """Of the inputs."""
        return [tensor.grad for tensor in self.tensors.values()]


def make_step(
    source: str,
    backend: str,
    *,
    dtype: torch.dtype = torch.float32,
    wanted: str = "hwb",
    delta: str = "step",
    small: bool = False,
    memory_budget: int | None = None,
    **keywords: Any,
) -> Step:
    """BCO from ``logits`` or ``linear``, δ being gathered or ``moving`` with the batch."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    labels = torch.randint(0, V, (S, T), generator=generator)
    labels[:, :2] = -100
    desirable, ref_logps = torch.tensor([True, False, True, False]), torch.full((S,), -20.0)
    shift = fp.RewardShift("ema", update="forward" if delta == "moving" else "step")
    others = {"labels": labels, "desirable": desirable, "ref_logps": ref_logps}
    if source == "logits":
        logits = random(S, T, V).requires_grad_()

        def from_logits() -> fp.BCOOutput:
            return fp.bco_loss(logits, labels, desirable, ref_logps, delta=shift, backend=backend, **keywords)

        return Step(from_logits, {"logits": logits, **others}, shift)
    leaves = {"hidden": random(S, T, D), "weight": random(V, D), "bias": random(V)}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name[0] in wanted)
    hidden, weight, bias = leaves.values()

    budget = BUDGETS[dtype][delta] if small and memory_budget is None else memory_budget

    def from_hidden() -> fp.BCOOutput:
        return fp.linear_bco_loss(
            hidden, weight, labels, desirable, ref_logps,
            bias=bias, delta=shift, backend=backend, memory_budget=budget, **keywords,
        )  # fmt: skip

    return Step(from_hidden, {**leaves, **others}, shift)


CASES = [("logits", {"delta": "moving"}), ("logits", {}), *(("linear", keywords) for keywords in PLANS.values())]
NAMES = ["logits, δ moving", "logits", *PLANS]


@pytest.fixture(autouse=True, scope="module")
def deterministic_memory() -> Iterator[None]:
    """No garbage collection in any test, and nothing imported for the first time in a call."""
    step = make_step("linear", "torch")
    step.call().loss.backward()
    make_step("logits", "torch").call().loss.backward()
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize(("source", "keywords"), CASES, ids=NAMES)
def test_out_of_memory(source: str, keywords: dict[str, Any], backend: str) -> None:
    """Whichever allocation fails, inputs are as before, and δ too unless the forward succeeded; a second try gives what
    the first would have given, bitwise.
    """
    fail_in_turn(source, keywords, backend, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "keywords"), CASES, ids=NAMES)
def test_out_of_memory_in_float16(source: str, keywords: dict[str, Any]) -> None:
    """Its gradients wait in float32 for the upstream one, which is more memory to find in a backward."""
    fail_in_turn(source, keywords, "torch", torch.float16)


def fail_in_turn(source: str, keywords: dict[str, Any], backend: str, dtype: torch.dtype) -> None:
    """See :func:`test_out_of_memory`."""
    step = make_step(source, backend, dtype=dtype, **keywords)
    with recording(Allocations()) as allocations:
        loss = step.call().loss
        forward = allocations.number
        loss.backward()
    expected, done, number = step.gradients(), step.state(), allocations.number
    state = [*step.shift.state_dict()]
    for fail in {*range(1, number, number // FAILURES[backend]), forward, forward + 1, number}:
        step = make_step(source, backend, dtype=dtype, **keywords)
        before = step.state()
        with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory\. Tried"), recording(Allocations(fail)):
            step.call().loss.backward()
        assert not any(gradient is not None for gradient in step.gradients())
        for name, value in step.state().items():
            assert torch.equal(value, (done if fail > forward and name in state else before)[name]), name
        step.shift.load_state_dict({name: before[name] for name in state})
        step.call().loss.backward()
        for ours, theirs in zip(step.gradients(), expected, strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or theirs is None or torch.equal(ours, theirs)
        assert all(torch.equal(value, done[name]) for name, value in step.state().items())


@pytest.mark.slow
@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize("name", PLANS)
def test_the_budget_that_an_error_names_fits(name: str) -> None:
    """Errors of the forward and of the backward say the plan, a smaller budget that is accepted, and the least."""
    keywords = {"dtype": torch.bfloat16, **PLANS[name]}
    step = make_step("linear", "torch", **keywords)
    with recording(Allocations()) as allocations:
        step.call().loss.backward()
    said = set()
    for fail in range(1, allocations.number + 1, 7):
        with pytest.raises(torch.OutOfMemoryError) as raised, recording(Allocations(fail)):
            make_step("linear", "torch", **keywords).call().loss.backward()
        (message,) = raised.value.args
        said.add(message.partition("\n")[2])
    said -= {""}
    (advice,) = said
    assert f"by plan {name.partition(',')[0]}: " in advice
    taken, budget, least = (int(number) for number in re.findall(r"\b\d{4,}\b", advice))
    assert least <= budget < taken
    for allowed in (budget, least):
        make_step("linear", "torch", **{**keywords, "memory_budget": allowed}).call()
    with pytest.raises(ValueError, match=f"at least {least} bytes"):
        make_step("linear", "torch", **{**keywords, "memory_budget": least - 1}).call()


@pytest.mark.slow
def test_no_smaller_budget() -> None:
    """At the least budget the advice is another."""
    with pytest.raises(ValueError, match="at least") as refused:
        make_step("linear", "torch", memory_budget=1).call()
    least = int(re.findall(r"at least (\d+)", str(refused.value))[0])
    with pytest.raises(torch.OutOfMemoryError, match="no smaller memory_budget is enough; give it fewer"):
        run_out(make_step("linear", "torch", memory_budget=least))


def run_out(step: Step) -> None:
    """Fail half-way through the forward."""
    with recording(Allocations()) as allocations:
        step.call()
    with recording(Allocations(allocations.number // 2)):
        step.call()


def test_memory_that_a_cpu_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch has no class for it: the error stays what it is, and has the advice."""
    step = make_step("linear", "torch")
    empty = torch.empty

    def refused(*args: Any, **keywords: Any) -> Tensor:
        return empty((2**62,), dtype=torch.uint8)

    monkeypatch.setattr(torch, "empty", refused)
    with pytest.raises(RuntimeError, match="memory_budget=") as raised:
        step.call()
    assert not isinstance(raised.value, torch.OutOfMemoryError)
    assert "DefaultCPUAllocator" in str(raised.value)


def test_a_cast_without_memory_has_the_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast's copy of the weight is part of the workspace."""
    step, to = make_step("linear", "torch"), Tensor.to

    def refused(tensor: Tensor, *args: Any, **keywords: Any) -> Tensor:
        if tensor.shape == (V, D):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return to(tensor, *args, **keywords)

    monkeypatch.setattr(Tensor, "to", refused)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(torch.OutOfMemoryError, match="works by plan"):
        step.call()


@pytest.mark.slow
@pytest.mark.parametrize(("source", "keywords"), CASES, ids=NAMES)
@pytest.mark.parametrize(
    ("backend", "end"),
    [("torch", "raised"), ("torch", "backward fails"), ("torch", "backward"), ("torch", "twice"), ("triton", "twice")],
)
def test_nothing_stays_in_memory(source: str, keywords: dict[str, Any], end: str, backend: str) -> None:
    """Whatever comes after a forward, all that it has allocated goes with its output, without a garbage collection."""
    step = make_step(source, backend, **keywords)
    with recording(Allocations()) as allocations:
        step.call()
    step = make_step(source, backend, **keywords)
    fail = allocations.number + 2 if end == "backward fails" else None
    with recording(Allocations(fail)) as allocations:
        output = step.call()
        assert allocations.alive() > 0
        node = weakref.ref(output.loss.grad_fn)
        if end == "raised":
            with pytest.raises(RuntimeError, match="must match"):
                output.loss + torch.ones(2) + torch.ones(3)
        elif end == "backward fails":
            with pytest.raises(torch.OutOfMemoryError):
                output.loss.backward()
        else:
            output.loss.backward(retain_graph=end == "twice")
            if end == "twice":
                output.loss.backward()
        del output
    for leaf in step.tensors.values():
        leaf.grad = None
    if backend == "triton":
        gc.collect(0)  # the interpreter's own cycles, which are young
    assert node() is None
    assert allocations.alive() == 0


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *((name, "nan") for name in NAMES),
        *((name, "inf") for name in ("logits", "grouped", "vocab_major, small", "skipping")),
    ],
)
def test_the_first_bad_sequence_is_named(name: str, bad: str, backend: str) -> None:
    """NaN and infinities show in the loss, and :func:`fused_pref.checks` says where they begin; δ stays finite."""
    source, keywords = CASES[NAMES.index(name)]
    step = make_step(source, backend, **keywords)
    values = next(iter(step.tensors.values())).detach()
    values[2, 3, 5] = values[3, 2, 1] = float(bad)
    before = step.state()
    with fp.checks(), pytest.raises(ValueError, match=r"log-prob of each sequence must be finite; got \S+ at \[2\]"):
        step.call()
    assert all(
        torch.equal(value, before[name]) for name, value in step.state().items() if name in step.shift.state_dict()
    )
    assert step.call().loss.isnan()
    assert step.shift.current().isfinite()
    step.shift.step()
    assert step.shift.current().isfinite()
