"""``fused_pref.explain``: the plan that a call of the linear head would take."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fused_pref import validate
from fused_pref.head.budget import PART, default_budget, memory_of
from fused_pref.head.plans.head import GRADIENTS
from fused_pref.head.plans.planner import candidates, choose, least_budget
from fused_pref.head.plans.problem import Plan, Problem
from fused_pref.ops import backend, devices
from fused_pref.ops.devices import GPUS, Device, device_of
from fused_pref.ops.torch.matmul import arithmetic

# Public shapes of language models: (D, V).
MODELS = {
    "deepseek-v3": (7168, 129280),
    "gemma-2-2b": (2304, 256000),
    "gemma-2-9b": (3584, 256000),
    "gemma-3-1b": (1152, 262144),
    "gpt-oss-20b": (2880, 201088),
    "llama-3-8b": (4096, 128256),
    "llama-3-70b": (8192, 128256),
    "llama-3.2-1b": (2048, 128256),
    "llama-3.2-3b": (3072, 128256),
    "mistral-7b-v0.3": (4096, 32768),
    "mistral-nemo-12b": (5120, 131072),
    "olmo-2-7b": (4096, 100352),
    "phi-4": (5120, 100352),
    "qwen2.5-0.5b": (896, 151936),
    "qwen2.5-7b": (3584, 152064),
    "qwen3-8b": (4096, 151936),
    "smollm2-135m": (576, 49152),
}
OBJECTIVES = ("cpo", "dpo", "bco", "kto", "batch", "logps")
DELTAS = ("batch", "known")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
DEVICES = ("cpu", "cuda", "xpu", *GPUS)


@dataclass(frozen=True)
class Explanation:
    """A plan beside the eager path. Bytes are a prediction beyond inputs, gradients and results.

    Attributes:
        plan: what would be done.
        problem: the sizes it was chosen for.
        objective: the objective.
        rule: what the budget follows from.
    """

    plan: Plan
    problem: Problem
    objective: str
    rule: str

    @property
    def products(self) -> float:
        """Matrix products in units of 2·N·D·V operations."""
        return self.plan.products

    @property
    def flops(self) -> int:
        """Operations of the products."""
        return round(self.plan.products * self._product(self.problem.tokens))

    @property
    def peak_bytes(self) -> int:
        """Predicted workspace."""
        return self.plan.workspace

    @property
    def seconds(self) -> float:
        """Predicted time of the plan, by a model of the device."""
        return self.plan.seconds

    @property
    def floor_seconds(self) -> float:
        """Time of the least products alone at the rate of large ones: one forward, one for each gradient."""
        products = 1 + len(self.problem.gradient_products)
        return products * self._product(self.problem.tokens) / self.problem.device.rates[self.problem.operand_itemsize]

    @property
    def form_seconds(self) -> dict[str, float | None]:
        """Predicted time of the fastest plan in each form; None where none fits, or kernels do not serve the call."""
        times: dict[str, float | None] = {}
        for form, fused in (("fused", True), ("unfused", False)):
            fitting = [plan for plan in candidates(self.problem) if plan.fused == fused]
            allowed = max(self.problem.budget, self.peak_bytes)
            times[form] = min((plan.seconds for plan in fitting if plan.workspace <= allowed), default=None)
        return times

    @property
    def budget(self) -> str:
        """Which budget holds, and why."""
        text = f"{bytes_text(self.problem.budget)}, {self.rule}"
        if self.peak_bytes <= self.problem.budget:
            return text
        return f"{text}; passed, as plans begin at {bytes_text(least_budget(self.problem))}"

    @property
    def eager_flops(self) -> int:
        """Operations of the eager path: every position, one product forward and one for each gradient."""
        gradients = len(self.problem.gradients & {"hidden", "weight"})
        return (1 + gradients) * self._product(self.problem.positions)

    @property
    def eager_parts(self) -> dict[str, int]:
        """Least bytes of the eager path, by what holds them."""
        p = self.problem
        names = ("logits", "log-softmax", "gradient of the logits")[: 3 if p.gradients else 2]
        return dict.fromkeys(names, p.positions * p.vocabulary * p.itemsize)

    @property
    def eager_bytes(self) -> int:
        """Least bytes of the eager path: logits and log-softmax, and with gradients the logits' gradient."""
        return sum(self.eager_parts.values())

    @property
    def held(self) -> dict[str, int]:
        """Bytes of what goes in and what comes out: hidden states, weight, and the gradients of all."""
        p = self.problem
        hidden, weight = p.positions * p.hidden * p.itemsize, p.vocabulary * p.hidden * p.weight_itemsize
        gradients = hidden * ("hidden" in p.gradients) + weight * ("weight" in p.gradients)
        gradients += p.vocabulary * p.weight_itemsize * ("bias" in p.gradients)
        return {"hidden states": hidden, "weight": weight, "gradients": gradients}

    @property
    def steps(self) -> tuple[str, ...]:
        """What is done, in order."""
        return self.plan.steps(self.problem, "sequences" if self.objective in ("bco", "kto") else "pairs")

    def _product(self, rows: int) -> int:
        return 2 * rows * self.problem.hidden * self.problem.vocabulary

    def __str__(self) -> str:
        p, plan = self.problem, self.plan
        sizes = f"N={p.tokens} of {p.positions} positions, D={p.hidden}, V={p.vocabulary}, {p.itemsize * 8}-bit"
        lines = [
            f"{self.objective}, {sizes}, gradients of {', '.join(sorted(p.gradients)) or 'nothing'}",
            f"plan {plan.name}{', fused,' if plan.fused else ''} on {p.device.name} (figures of {p.device.measured})",
            f"budget {self.budget}",
            *(f"  {number}. {step}" for number, step in enumerate(self.steps, 1)),
            f"{'':10}{'products':>12}{'FLOP':>12}{'peak beyond gradients':>24}",
            f"{'ours':10}{plan.products:>9.2f}NDV{self.flops:>12.3g}{bytes_text(self.peak_bytes):>24}",
            f"{'eager':10}{self.eager_flops / max(self._product(p.tokens), 1):>9.2f}NDV{self.eager_flops:>12.3g}"
            f"{'>= ' + bytes_text(self.eager_bytes):>24}",
            "products are counted in 2·N·D·V operations",
            f"predicted time {milliseconds(self.seconds)} ({self._forms}), products alone "
            f"{milliseconds(self.floor_seconds)}: a model, not measured here",
        ]
        if self.seconds > 2 * self.floor_seconds > 0:
            lines.append(f"slow: {self.seconds / self.floor_seconds:.3g} times the products alone; {self._remedy}")
        return "\n".join(lines)

    @property
    def _forms(self) -> str:
        return ", ".join(f"{form} {milliseconds(time)}" for form, time in self.form_seconds.items() if time is not None)

    @property
    def _remedy(self) -> str:
        free = choose(replace(self.problem, budget=1 << 62))
        if free.seconds < 0.9 * self.seconds:
            return f"{bytes_text(free.workspace)} of workspace would take {milliseconds(free.seconds)}"
        return "products this small cannot fill the device: give it more tokens at a time"


def explain(
    model: str | None = None,
    *,
    tokens: int = 8192,
    objective: str = "cpo",
    hidden: int | None = None,
    vocab: int | None = None,
    dtype: str | torch.dtype = torch.bfloat16,
    device: str | None = None,
    sequences: int | None = None,
    positions: int | None = None,
    gradients: Sequence[str] = ("hidden", "weight"),
    delta: str = "batch",
    memory_budget: int | None = None,
    device_memory: int | None = None,
    skip_mass: float | None = None,
) -> Explanation:
    """The plan that a call of the linear head would take, and what it costs; nothing is computed.

    Args:
        model: a name in ``MODELS`` of this module; or give ``hidden`` and ``vocab``, which go before a model's.
        tokens: N, scored tokens.
        objective: ``"cpo"``, ``"dpo"``, ``"bco"``, ``"kto"``; ``"batch"`` for one that needs all sequences first (aot,
            bco_pair with a δ that this batch moves, ``preference_loss`` with ``unit=None``); or ``"logps"`` for the
            building blocks. Your own objective of pairs is planned as ``"dpo"``, one of sequences as ``"kto"``.
        hidden: D.
        vocab: V.
        dtype: of hidden states and weight, ``torch.bfloat16`` or its name.
        device: ``"cpu"``, ``"cuda"``, ``"xpu"``, or an architecture of ``fused_pref.ops.devices.GPUS``
            (``"sm_90"``, …), which need not be there; None: an accelerator if there is one.
        sequences: S, over which the tokens are spread evenly; None: 16, or as many as have about 2048 tokens each,
            whichever is more. Groups cut no pair, so that few long sequences leave the planner little choice.
        positions: S·T, scored or not; None: ``tokens``, so that no row has to be gathered (a batch whose labels were
            shifted beforehand; with ``shift`` at least the last position of a sequence scores nothing).
        gradients: which of ``"hidden"``, ``"weight"``, ``"bias"`` are wanted; none for evaluation.
        delta: of BCO alone: ``"batch"`` if this batch moves δ, ``"known"`` if it is known before.
        memory_budget: bytes, as for the call.
        device_memory: bytes of a GPU, of which the default budget is 1/16, for cards that share an architecture; None:
            those of the GPU that is there, else of ``GPUS``. Without effect beside a ``memory_budget``.
        skip_mass: as for the call; what can be skipped depends on the logits, so that the products are the most.

    Returns:
        :class:`Explanation`; print it, or draw it by :func:`fused_pref.cli.picture.draw`.

    Raises:
        ValueError, TypeError: a malformed argument, a ``memory_budget`` that no plan fits (the message says the least),
            or a ``device_memory`` on a CPU.
    """
    hidden, vocab = _shape(model, hidden, vocab)
    for name, value, least in (("tokens", tokens, 0), ("hidden", hidden, 1), ("vocab", vocab, 1)):
        validate.at_least(name, value, least)
    if positions is None:
        positions = tokens
    validate.at_least("positions", positions, tokens)
    validate.choice("objective", objective, OBJECTIVES)
    units = _units(objective, validate.choice("delta", delta, DELTAS), sequences, tokens)
    kind = _kind(device)
    constants, fusible = _device(kind)
    dtype = _dtype(dtype)
    validate.choices("gradients", gradients, GRADIENTS)
    if skip_mass is not None:
        validate.within("skip_mass", skip_mass, 0, 1)
    validate.at_least("memory_budget", memory_budget, 1, optional=True)
    memory = _memory(kind, constants, device_memory)
    fused = fusible and dtype != torch.float64
    problem = Problem(
        tokens=tokens,
        positions=positions,
        hidden=hidden,
        vocabulary=vocab,
        itemsize=dtype.itemsize,
        weight_itemsize=dtype.itemsize,
        gradients=frozenset(gradients),
        local=units > 0,
        units=tuple(tokens // units + (n < tokens % units) for n in range(units)),
        budget=default_budget(memory, vocab, hidden, dtype.itemsize) if memory_budget is None else memory_budget,
        promised=memory_budget is not None,
        device=constants,
        late_scale=dtype == torch.float16,
        upcasts=arithmetic(dtype, constants.name).upcast,
        gathered=positions > tokens,
        fused=fused,
        wide_range=dtype != torch.float16,
        indexed=True,
        skip_mass=skip_mass if fused or constants.name == "cpu" else None,
    )
    return Explanation(choose(problem), problem, objective, "memory_budget" if memory_budget else _rule(memory))


def _shape(model: str | None, hidden: int | None, vocab: int | None) -> tuple[int, int]:
    if model is not None:
        validate.choice("model", model, tuple(MODELS))
        hidden = MODELS[model][0] if hidden is None else hidden
        vocab = MODELS[model][1] if vocab is None else vocab
    if hidden is None or vocab is None:
        raise ValueError(f"model must be one of {tuple(MODELS)}, or hidden and vocab given; got None")
    return hidden, vocab


def _units(objective: str, delta: str, sequences: int | None, tokens: int) -> int:
    """Pairs or sequences that a group must not cut; 0 where the loss needs all of them first."""
    if delta != "batch" and objective != "bco":
        raise validate.fail("delta", f"'batch', the default, with objective={objective!r}, which has no δ", delta)
    validate.at_least("sequences", sequences, 1, optional=True)
    if sequences is None:
        sequences = max(16, tokens // 4096 * 2)
    unit = {"cpo": 2, "dpo": 2, "bco": int(delta == "known"), "kto": 1, "batch": 0, "logps": 0}[objective]
    if unit == 2 and sequences % 2:
        raise validate.fail("sequences", "even: pairs of chosen and rejected", sequences)
    return sequences // unit if unit else 0


def _kind(device: str | None) -> str:
    if device is not None:
        return validate.choice("device", device, DEVICES)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else accelerator.type


def device_here(kind: str | None) -> torch.device | None:
    """The device of this machine that ``explain(device=kind)`` plans for; None where it plans for another."""
    kind = _kind(kind)
    here = kind == "cpu" or (kind not in GPUS and torch.get_device_module(kind).is_available())
    return torch.device(kind) if here else None


def _device(kind: str) -> tuple[Device, bool]:
    """Constants of a device, and whether it has fused products."""
    if kind in GPUS:
        return GPUS[kind], True
    here = device_here(kind)
    constants = device_of(kind, "sm_90" if here is None else backend.architecture(here))
    if here is not None and devices.measured is not None:
        constants = devices.measured(here, constants)
    return constants, kind == "cuda"


def _memory(kind: str, constants: Device, given: int | None) -> int | None:
    """Bytes of the device that the default budget is a part of; None where it is not."""
    if given is not None:
        given = validate.at_least("device_memory", given, 1)
        if kind == "cpu":
            raise ValueError(f"device_memory must be None on a CPU, whose default budget has another rule; got {given}")
        return given
    if kind in backend.DEVICES and torch.get_device_module(kind).is_available():
        return memory_of(torch.device(kind, torch.get_device_module(kind).current_device()))
    return constants.memory if kind == "cuda" or kind in GPUS else None


def _rule(memory: int | None) -> str:
    if memory is None:
        return "256 MiB or the bytes of dW, whichever is more"
    return f"1/{PART} of the device's {bytes_text(memory)}"


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, str):
        return DTYPES[validate.choice("dtype", dtype.removeprefix("torch."), tuple(DTYPES))]
    if dtype not in DTYPES.values():
        raise validate.fail("dtype", f"one of {tuple(DTYPES)}", dtype)
    return dtype


def milliseconds(seconds: float) -> str:
    """A time in milliseconds."""
    return f"{seconds * 1e3:.3g} ms"


def bytes_text(number: float) -> str:
    """A size in binary units."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
