"""The planner: a pure function, checked without tensors, and its predictions against what calls do."""

import itertools
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import make_hidden, peak_bytes, reference_logps
from head_cases import SHAPES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fused_pref as fp
from fused_pref.head.plans.planner import candidates, choose, usable_budget
from fused_pref.head.plans.problem import Plan, Problem
from fused_pref.ops.devices import CPU, GPU
from fused_pref.validate import describe

GRADIENTS = [frozenset(), frozenset({"hidden"}), frozenset({"hidden", "weight"}), frozenset({"weight", "bias"})]


def problem(**changes: Any) -> Problem:
    sizes = {"tokens": 1536, "positions": 2048, "hidden": 1024, "vocabulary": 32768, "itemsize": 4, "budget": 2**40}
    rest = {"weight_itemsize": 4, "gradients": GRADIENTS[2], "local": True, "units": (384,) * 4, "device": CPU}
    return Problem(**{**sizes, **rest, **changes})


problems = st.builds(
    problem,
    tokens=st.integers(0, 5000),
    positions=st.just(5000),
    hidden=st.integers(1, 4096),
    vocabulary=st.integers(1, 200_000),
    itemsize=st.sampled_from([2, 4, 8]),
    weight_itemsize=st.sampled_from([2, 4, 8]),
    gradients=st.sampled_from(GRADIENTS),
    local=st.booleans(),
    units=st.just(()),
    device=st.sampled_from([CPU, GPU]),
    late_scale=st.booleans(),
)


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=80)
@given(problems, st.lists(st.integers(0, 2**36), min_size=2, max_size=6))
def test_budgets(sizes: Problem, budgets: list[int]) -> None:
    """What is chosen fits; the error's least budget is enough and one byte less is not; more budget costs no time."""
    least, usable = min(plan.workspace for plan in candidates(sizes)), usable_budget(sizes)
    with pytest.raises(ValueError, match=rf"memory_budget must be at least {least} bytes .* \({usable} for less than"):
        choose(problem(**{**vars(sizes), "budget": least - 1}))
    seconds = []
    for budget in sorted({least, *(least + extra for extra in budgets)}):
        plan = choose(problem(**{**vars(sizes), "budget": budget}))
        assert plan.workspace <= budget
        seconds.append(plan.seconds)
    assert all(later <= earlier for earlier, later in itertools.pairwise(seconds))


@settings(deadline=None, derandomize=True, max_examples=80)
@given(st.lists(st.integers(0, 900), min_size=1, max_size=20), st.integers(1, 4000))
def test_groups_are_whole_units(units: list[int], hidden: int) -> None:
    sizes = problem(tokens=sum(units), units=tuple(units), hidden=hidden)
    for plan in (candidate.fit(sizes) for candidate in candidates(sizes)):
        if plan.name == "grouped":
            assert plan.bounds[0] == 0
            assert plan.bounds[-1] == len(units)
            groups = [sum(units[a:b]) for a, b in itertools.pairwise(plan.bounds)]
            assert sum(groups) == sum(units)
            assert max(groups) == plan.rows


@pytest.mark.parametrize(
    ("changes", "name", "products"),
    [
        ({"gradients": GRADIENTS[0]}, "logprob", 1),
        ({"gradients": GRADIENTS[1]}, "frozen_head", 2),
        ({"gradients": GRADIENTS[1], "local": False}, "frozen_head", 2),
        ({}, "grouped", 3),
        ({"itemsize": 2, "weight_itemsize": 2}, "grouped", 3),
        ({"local": False}, "vocab_major", 3),
        ({"local": False, "budget": 2**25}, "vocab_major", 4),
        ({"gradients": GRADIENTS[3]}, "grouped", 2),
        ({"itemsize": 2, "weight_itemsize": 2, "late_scale": True, "budget": 2**28}, "vocab_major", 3),
    ],
    ids=range(9),  # a set has no order to name a test by
)
def test_choices(changes: dict[str, Any], name: str, products: float) -> None:
    plan = choose(problem(**changes))
    assert (plan.name, plan.products) == (name, products)


def test_float32_groups_are_small_and_16_bit_is_one_group() -> None:
    """In float32 dW adds up in place, so that groups cost nothing; in 16 bits they would need a float32 dW."""
    assert len(choose(problem()).bounds) == 3
    assert len(choose(problem(itemsize=2, weight_itemsize=2)).bounds) == 2


class Products(TorchDispatchMode):
    """Counts the operations of matrix products, in units of 2·N·D·V."""

    def __init__(self, unit: int) -> None:
        super().__init__()
        self.unit, self.operations = unit, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[:2] if function.overloadpacket is torch.ops.aten.mm else args[1:3]
            self.operations += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return function(*args, **(kwargs or {}))

    @property
    def count(self) -> float:
        return self.operations / self.unit


@pytest.mark.parametrize(
    ("objective", "keywords", "products"),
    [
        ("linear_cpo_loss", {}, 3),
        ("linear_dpo_loss", {}, 3),
        ("linear_bco_loss", {"delta": 0.2}, 3),
        ("linear_bco_loss", {"delta": torch.tensor(0.2)}, 3),
        ("linear_bco_loss", {"delta": fp.RewardShift(update="step")}, 3),
        ("linear_bco_loss", {"delta": fp.RewardShift("fixed", value=0.1)}, 3),
        ("linear_bco_loss", {"delta": fp.RewardShift()}, 3),
        ("linear_kto_loss", {"kl": torch.tensor(0.2)}, 3),
        ("linear_bco_loss", {"delta": fp.RewardShift(), "memory_budget": "least"}, 4),
        ("linear_cpo_loss", {"memory_budget": "least"}, 4),
    ],
    ids=lambda value: describe(value)[:40],
)
def test_products_are_counted(objective: str, keywords: dict[str, Any], products: float) -> None:
    """6NDV where coefficients are known in the forward, at most 8NDV where they are not."""
    batch = make_hidden(4, 33, 64, 4001, mask="one", seed=3)
    batch.labels[:, 9:] = torch.randint(0, 4001, (4, 24), generator=torch.Generator().manual_seed(0))
    number = int((batch.labels[:, 1:] >= 0).sum())
    assert number == 96
    extra = {"linear_dpo_loss": (reference_logps(4),)}
    unpaired = (torch.tensor([True, False, True, False]), reference_logps(4))
    extra["linear_bco_loss"] = extra["linear_kto_loss"] = unpaired
    leaves = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    if keywords.get("memory_budget") == "least":
        with pytest.raises(ValueError, match="memory_budget must be at least") as refused:
            getattr(fp, objective)(*leaves, batch.labels, *extra.get(objective, ()), **{**keywords, "memory_budget": 1})
        keywords = {**keywords, "memory_budget": int(str(refused.value).split("least ")[1].split()[0])}
    with Products(2 * number * 64 * 4001) as counted:
        getattr(fp, objective)(*leaves, batch.labels, *extra.get(objective, ()), **keywords).loss.backward()
    assert counted.count == pytest.approx(products)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("objective", "wanted", "budget"),
    [
        ("linear_cpo_loss", "hw", None),
        ("linear_cpo_loss", "h", None),
        ("linear_token_logps", "hw", None),
        ("linear_token_logps", "hw", 12 * 2**20),
        ("linear_token_logps", "", None),
        ("linear_token_logps", "", 4 * 2**20),
    ],
)
def test_predicted_peak(objective: str, wanted: str, budget: int | None, dtype: torch.dtype) -> None:
    """Within 15% of the peak that the allocator saw beyond gradients and results."""
    sequences, length, features, vocabulary = 8, 65, 256, 16384
    batch = make_hidden(sequences, length, features, vocabulary, dtype=dtype, mask="none")
    batch.labels[:, :33] = -100
    h, w = batch.hidden.requires_grad_("h" in wanted), batch.weight.requires_grad_("w" in wanted)
    tokens = sequences * (length - 33)

    def step() -> None:
        output = getattr(fp, objective)(h, w, batch.labels, memory_budget=budget)
        loss = output.loss if isinstance(output, fp.PairOutput) else output.sum()
        if wanted:
            loss.backward()

    explained = fp.explain(
        tokens=tokens,
        positions=sequences * length,
        hidden=features,
        vocab=vocabulary,
        objective="cpo" if objective == "linear_cpo_loss" else "logps",
        sequences=sequences,
        dtype=dtype,
        device="cpu",
        gradients=[name for name in ("hidden", "weight") if name[0] in wanted],
        memory_budget=budget,
    )
    step()
    h.grad = w.grad = None
    gradients = sum(tensor.numel() * tensor.element_size() for tensor in (h, w) if tensor.requires_grad)
    measured = peak_bytes(step) - gradients
    assert measured == pytest.approx(explained.peak_bytes, rel=0.15), explained.plan


@pytest.mark.parametrize("mask", ["some", "all"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("name", ["linear_cpo_loss", "linear_token_logps"])
def test_the_least_budget_is_enough(name: str, softcap: float | None, mask: str) -> None:
    batch = make_hidden(4, 6, 8, 33, mask=mask)
    batch.hidden.requires_grad_()
    with pytest.raises(ValueError, match="memory_budget must be at least") as refused:
        getattr(fp, name)(batch.hidden, batch.weight, batch.labels, softcap=softcap, memory_budget=1)
    least = int(str(refused.value).split("least ")[1].split()[0])
    getattr(fp, name)(batch.hidden, batch.weight, batch.labels, softcap=softcap, memory_budget=least)
    with pytest.raises(ValueError, match=f"at least {least} bytes"):
        getattr(fp, name)(batch.hidden, batch.weight, batch.labels, softcap=softcap, memory_budget=least - 1)


@pytest.mark.parametrize(("sizes", "most"), [((1, 17, 31, 97), 2**17), ((2, 32, 64, 1000), 2**19)])
@pytest.mark.parametrize("wanted", ["hw", "h", ""])
@pytest.mark.parametrize("name", ["linear_cpo_loss", "linear_token_logps"])
def test_a_small_budget_is_enough_for_a_small_problem(
    name: str, wanted: str, sizes: tuple[int, int, int, int], most: int
) -> None:
    """A least budget that shrinks with the problem, and that the allocator sees kept."""
    sequences, tokens, features, vocabulary = sizes
    batch = make_hidden(2 * sequences, tokens + 1, features, vocabulary, mask="none")
    batch.labels[sequences:, :-1] = -100
    h, w = batch.hidden.requires_grad_("h" in wanted), batch.weight.requires_grad_("w" in wanted)

    def step(budget: int) -> None:
        result = getattr(fp, name)(h, w, batch.labels, memory_budget=budget)
        loss = result.loss if isinstance(result, fp.PairOutput) else result.sum()
        if wanted:
            loss.backward()

    with pytest.raises(ValueError, match="memory_budget must be at least") as refused:
        step(1)
    least = int(str(refused.value).split("least ")[1].split()[0])
    assert least <= most
    step(least)
    h.grad = w.grad = None
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in (h, w) if leaf.requires_grad)
    assert peak_bytes(lambda: step(least)) - gradients <= least


@pytest.mark.parametrize("length", [256, None])
@pytest.mark.parametrize(
    ("objective", "wanted"), [("cpo", ("hidden", "weight")), ("cpo", ("hidden",)), ("logps", ())], ids=str
)
def test_defaults_are_near_the_products(objective: str, wanted: tuple[str, ...], length: int | None) -> None:
    """Predicted on an H200: little beside the products, in a twelfth of the memory."""
    for (hidden, vocab), tokens in itertools.product(SHAPES, [2**n for n in range(10, 18)]):
        found = fp.explain(
            hidden=hidden, vocab=vocab, tokens=tokens, objective=objective, gradients=wanted, device="sm_90",
            sequences=length and tokens // length,
        )  # fmt: skip
        assert found.peak_bytes <= (139 << 30) / 12
        if tokens >= 4096 and hidden >= 2048:
            most = (1.25 if hidden >= 3584 else 1.45) + (0.1 if tokens > 16384 else 0)
            assert found.seconds <= most * found.floor_seconds, found


def test_sequences_of_an_explanation() -> None:
    """16, or more where they would be longer than 2048 tokens; always pairs."""
    for tokens, sequences in ((0, 16), (8192, 16), (34816, 16), (36864, 18), (38912, 18), (131072, 64)):
        found, given = (fp.explain("llama-3-8b", tokens=tokens, sequences=n, device="sm_90") for n in (None, sequences))
        assert len(found.problem.units) == sequences // 2
        assert found == given


def test_an_objective_of_the_batch_is_explained() -> None:
    """The plan of a call that is coupled over the batch, and products that the call takes."""
    sizes: dict[str, Any] = {"tokens": 4096, "hidden": 1024, "vocab": 32768, "device": "cpu", "sequences": 16}
    assert fp.explain(objective="dpo", **sizes).plan.name == "grouped"
    explained = fp.explain(objective="batch", **sizes)
    assert explained.plan.name == "vocab_major"
    assert 3 < explained.products <= 4


def test_planning_takes_no_time() -> None:
    """It runs while a GPU waits. Batches of about as many tokens share a ranking; each has its own groups."""
    base, times = problem(itemsize=2, weight_itemsize=2, device=GPU, hidden=4096, vocabulary=128256), []
    for extra in range(40):
        units = tuple(200 + (7 * unit + extra) % 100 for unit in range(256))
        call = replace(base, units=units, tokens=sum(units), positions=2**17)
        start = time.perf_counter()
        plan = choose(call)
        times.append(time.perf_counter() - start)
        assert plan.bounds[-1] == 256
    assert sorted(times)[20] < 2e-4


def test_slow_calls_say_so() -> None:
    small = str(fp.explain(hidden=896, vocab=151936, tokens=64, sequences=2, device="sm_90"))
    assert "slow: 3.6 times the products alone; products this small cannot fill the device" in small
    tight = str(fp.explain(hidden=2048, vocab=128256, tokens=8192, device="sm_90", memory_budget=130 * 2**20))
    assert "of workspace would take" in tight
    assert "slow" not in str(fp.explain("llama-3-8b", device="sm_90"))


def test_forms_of_a_plan() -> None:
    """Where kernels run both forms have a time; elsewhere one."""
    here = fp.explain("llama-3-8b", device="sm_90")
    fused, unfused = here.form_seconds["fused"], here.form_seconds["unfused"]
    assert fused is not None
    assert unfused is not None
    assert here.seconds == pytest.approx(min(fused, unfused), rel=0.02)
    assert fp.explain("llama-3-8b", device="cpu").form_seconds["fused"] is None


@pytest.mark.parametrize(("size", "allocated"), [(1000, 1000), (2**20 - 1, 2**20 - 1), (2**21 + 1, 2**21 + 2**19)])
def test_allocations_can_be_used_again(size: int, allocated: int) -> None:
    assert GPU.allocation(size) == allocated
    assert CPU.allocation(size) == size
    sizes = {GPU.allocation(size + 4096 * extra) for extra in range(64)}
    assert size < 2**20 or len(sizes) <= 2


@pytest.mark.parametrize("kind", ["cpu", "cuda", "xpu"])
def test_explanation_is_of_the_accelerator_that_is_there(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind != "cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fp.explain("gemma-2-2b", objective="logps", gradients=()) == fp.explain(
        "gemma-2-2b", objective="logps", gradients=(), device=kind
    )
    assert fp.explain("gemma-2-2b", objective="logps", gradients=()).plan.fused == (kind == "cuda")


def test_float32_is_slower_fused() -> None:
    """And never infinitely slow on a GPU, where a budget may leave nothing else."""
    tight = fp.explain("llama-3-8b", device="sm_90", dtype="float32", gradients=(), memory_budget=2**25)
    roomy = fp.explain("llama-3-8b", device="sm_90", dtype="float32", gradients=())
    assert tight.plan.fused
    assert not roomy.plan.fused
    assert roomy.plan.seconds < tight.plan.seconds < 6 * roomy.plan.seconds


def test_explanation_says_what_is_done() -> None:
    text = str(fp.explain("llama-3-8b", tokens=8192, objective="cpo", device="cuda", memory_budget=2**33))
    for part in ("N=8192", "D=4096", "V=128256", "plan grouped", "3.00NDV", "2.58e+13", "eager", "5.87 GiB"):
        assert part in text
    assert "budget 8.00 GiB, memory_budget" in text
    assert "frozen_head" in str(fp.explain("qwen3-8b", gradients=["hidden"]))
    assert "computed again" in str(fp.explain("gemma-2-2b", objective="bco"))
    assert "3.00NDV" in str(fp.explain("gemma-2-2b", objective="bco", delta="known", memory_budget=2**34))
    assert fp.explain(hidden=8, vocab=9, gradients=[]).eager_bytes == 8192 * 9 * 2 * 2


def test_plans_are_immutable_and_cheap_to_choose() -> None:
    assert choose(problem()) is choose(problem())
    assert isinstance(choose(problem()), Plan)
    assert len(list(candidates(problem(vocabulary=262144, tokens=65536, units=(4096,) * 16)))) < 300


def test_counter_of_products_sees_every_kind() -> None:
    """The oracle of the tests above: names of all operations of a step that multiply matrices."""
    seen: Counter[str] = Counter()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen[function.overloadpacket.__name__] += 1
            return function(*args, **(kwargs or {}))

    batch = make_hidden(4, 6, 12, 29)
    with Names():
        leaves = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
        fp.linear_cpo_loss(*leaves, batch.labels, logits_mean=None).loss.backward()
    assert not {"bmm", "matmul", "linear", "baddbmm", "mv"} & set(seen)
    assert seen["mm"] + seen["addmm"] + seen["addmm_"] == 3
