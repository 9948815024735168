"""Errors of losses and their gradients against float64, beside those of their peers, and who passes.

An error passes if it is what float32 arithmetic gives, or at most 1.05 of the best peer's; each is the median over
seeds of the norm of the difference over that of the truth (for a value below 1, the difference itself). Where the
peer's is the larger one for some seed, a difference is luck: on few tokens, the rounding of the logits decides.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_pref import validate
from fused_pref.testing.problems import LOGITS, Loss, Problem, Sizes, error

# What passes whatever the peers do.
BOUNDS = {"value": 2e-5, "hidden": 1e-4, "weight": 1e-4}
MARGIN = 1.05
SEEDS = 5
TITLES = {"value": "value", "hidden": "dh", "weight": "dW"}
# Of the tensors that losses get: (hidden (S, T, D), weight (V, D), labels (S, T)) → 0-d.
Function = Callable[[Tensor, Tensor, Tensor], Tensor]
Truth = Callable[[Problem], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Line:
    """An implementation on one kind of logits.

    Attributes:
        work: what is computed.
        dtype: of the tensors.
        logits: their kind, see :data:`fused_pref.testing.problems.LOGITS`.
        name: of the implementation.
        errors: medians over seeds, of ``"value"``, ``"hidden"`` and ``"weight"``.
        best: by the same keys the least error of a peer, and whose it is; empty without peers.
        worse: the keys that do not pass.
    """

    work: str
    dtype: str
    logits: str
    name: str
    errors: dict[str, float]
    best: dict[str, tuple[float, str]]
    worse: frozenset[str]

    @property
    def ok(self) -> bool:
        """Whether all errors pass."""
        return not self.worse

    def cells(self) -> list[str]:
        """Of a table."""
        cells = [self.work, self.dtype, self.logits, self.name]
        for key in BOUNDS:
            if key not in self.errors:
                cells += ["", ""]
                continue
            found = f"{self.errors[key]:.1e}"
            cells.append(f"**{found}**" if key in self.worse else found)
            cells.append("{:.1e} {}".format(*self.best[key]) if key in self.best else "")
        return [*cells, "ok" if self.ok else "**worse**"]


@dataclass(frozen=True)
class Parity:
    """Lines of a comparison; its text is a Markdown table."""

    lines: tuple[Line, ...]

    @property
    def ok(self) -> bool:
        """Whether every line passes."""
        return all(line.ok for line in self.lines)

    def __str__(self) -> str:
        titles = [title for key in BOUNDS for title in (TITLES[key], "best peer")]
        header = ["", "dtype", "logits", "implementation", *titles, ""]
        rows = [header, ["---"] * len(header), *(line.cells() for line in self.lines)]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def available(name: str, value: Any) -> None:
    """A device, or its name, on which tensors can be made here."""
    expected = "a device that is available here"
    if not isinstance(value, str | torch.device):
        raise validate.fail(name, expected, value, TypeError)
    try:
        meta = torch.empty(0, device=value).is_meta
    except (RuntimeError, AssertionError, ImportError) as error:  # a build without a device says so by an assertion
        raise validate.fail(name, expected, value) from error
    if meta:
        raise validate.fail(name, "a device that holds values", value)


def compare(
    name: str,
    gradients: tuple[str, ...],
    candidates: Mapping[str, Loss],
    peers: Mapping[str, Loss],
    truth: Truth,
    sizes: Sizes,
    dtype: torch.dtype,
    device: str,
    seeds: int,
) -> list[Line]:
    """A line for each candidate on problems of one size and kind of logits.

    Args:
        name: of the work.
        gradients: which are compared, of ``"hidden"`` and ``"weight"``.
        candidates: implementations to judge.
        peers: those they are held against.
        truth: float64 values by the keys of the errors.
        sizes: of the problems.
        dtype: of the tensors.
        device: where.
        seeds: number of problems.
    """
    found: dict[str, list[dict[str, float]]] = {key: [] for key in (*candidates, *peers)}
    for seed in range(seeds):
        problem = Problem.make(sizes, dtype, device, seed).of(gradients)
        true = truth(problem)
        for key, loss in {**candidates, **peers}.items():
            found[key].append({part: error(value, true[part]) for part, value in evaluate(loss, problem).items()})
    medians = {
        key: {part: statistics.median(each[part] for each in errors) for part in errors[0]}
        for key, errors in found.items()
    }
    parts = ("value", *gradients)
    best = {part: min((medians[peer][part], peer) for peer in peers) for part in parts} if peers else {}
    kind = str(dtype).removeprefix("torch.")
    lines = []
    for key in candidates:
        worse = [part for part in parts if not _passes(part, found[key], found[best[part][1]] if best else [])]
        lines.append(Line(name, kind, sizes.logits, key, medians[key], best, frozenset(worse)))
    return lines


def _passes(part: str, own: list[dict[str, float]], best: list[dict[str, float]]) -> bool:
    """Whether errors over seeds are small enough beside those of the best peer, none if there is none; NaN is not."""
    mine, others = [errors[part] for errors in own], [errors[part] for errors in best]
    least = statistics.median(others) if others else 0.0
    if any(math.isnan(error) for error in mine):
        return False
    lucky = any(one <= other for one, other in zip(mine, others, strict=False))
    return lucky or statistics.median(mine) <= max(BOUNDS[part], MARGIN * least)


def evaluate(loss: Loss, problem: Problem) -> dict[str, Tensor]:
    """The value of a loss, and its gradients by name; of a tensor that it does not use they are 0."""
    leaves = problem.leaves
    with torch.set_grad_enabled(bool(leaves)):
        value = loss(problem)
    gradients = torch.autograd.grad(value, tuple(leaves.values()), allow_unused=True) if leaves else ()
    named = zip(leaves.items(), gradients, strict=True)
    return {"value": value.detach()} | {
        key: torch.zeros_like(leaf) if gradient is None else gradient for (key, leaf), gradient in named
    }


def check_parity(
    loss: Function,
    reference: Function,
    *,
    peers: Mapping[str, Function] | None = None,
    shape: tuple[int, int, int, int] = (4, 12, 64, 1031),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    logits: Sequence[str] = LOGITS,
    device: str = "cpu",
    seeds: int = SEEDS,
    raise_exception: bool = True,
) -> Parity:
    """Hold a loss, and its gradients of the hidden states and the weight, against a reference in float64.

    The loss passes where its errors are those of float32 arithmetic (2e-5 of the value, 1e-4 of a gradient), or at
    most 1.05 of those of the best peer. One of the peers is the reference itself in the dtype of the inputs.

    Args:
        loss: (hidden (S, T, D), weight (V, D), labels (S, T)) → 0-d loss, differentiable. The first quarter of the
            labels of each sequence is -100.
        reference: the same in plain PyTorch, called in float64 and in the dtype of the inputs, in which it should
            multiply as training code does: ``fp.reference.linear_cpo_loss`` multiplies in float32, more exactly than
            any head of 16-bit products.
        peers: other implementations, by name.
        shape: (S, T, D, V), S even.
        dtypes: of hidden states and weight.
        logits: kinds of logits, of ``"random"``, ``"peaked"``, ``"flat"``, ``"large"`` and ``"adversarial"``.
        device: where.
        seeds: problems over which the median is taken.
        raise_exception: whether to raise if a line does not pass, as in :func:`torch.autograd.gradcheck`.

    Returns:
        The comparison; ``print`` shows its table.

    Raises:
        AssertionError: a line does not pass; the message is the table.
        ValueError, TypeError: a malformed argument, or a function that changes its inputs.
    """
    own, others = _of("loss", loss), {"reference": _of("reference", reference), **_peers(peers)}
    validate.choices("logits", logits, LOGITS, empty=False)
    validate.choices("dtypes", dtypes, validate.FLOATS, empty=False)
    four = isinstance(shape, Sequence) and len(shape) == 4
    if not four or any(validate.integer("shape", size) < 1 for size in shape) or shape[0] % 2:
        raise validate.fail("shape", "(S, T, D, V), each >= 1 and S even", shape)
    available("device", device)
    validate.at_least("seeds", seeds, 1)
    validate.flag("raise_exception", raise_exception)
    lines = []
    for dtype in dtypes:
        for kind in logits:
            lines += compare(
                "loss",
                ("hidden", "weight"),
                {"loss": own},
                others,
                lambda problem: evaluate(others["reference"], _wide(problem)),
                Sizes(*shape, masked=0.25, logits=kind),
                dtype,
                device,
                seeds,
            )
    parity = Parity(tuple(lines))
    if raise_exception and not parity.ok:
        raise AssertionError(f"the loss is less exact than it must be:\n{parity}")
    return parity


def _peers(peers: Any) -> dict[str, Loss]:
    if peers is None:
        return {}
    if not isinstance(peers, Mapping):
        raise validate.fail("peers", "a mapping of names to functions", peers, TypeError)
    for name in ("loss", "reference"):
        if name in peers:
            raise ValueError(f"peers must have other names than {name!r}, which is that of an argument")
    return {name: _of(f"peers[{name!r}]", function) for name, function in peers.items()}


def _of(name: str, function: Any) -> Loss:
    if not callable(function):
        raise validate.fail(name, "a function of (hidden, weight, labels)", function, TypeError)

    def loss(problem: Problem) -> Tensor:
        inputs = {"hidden": problem.hidden, "weight": problem.weight, "labels": problem.labels}
        before = {key: tensor._version for key, tensor in inputs.items()}
        value = function(*inputs.values())
        changed = [key for key, tensor in inputs.items() if tensor._version != before[key]]
        if changed:
            raise ValueError(f"{name} must leave its inputs as they are; it changed {' and '.join(changed)}")
        if not isinstance(value, Tensor) or value.dim():
            raise validate.fail(name, "a function whose result is a 0-d tensor", value, TypeError)
        if not value.requires_grad:
            raise TypeError(f"{name} must be a differentiable function; got a result that requires no gradient")
        return value

    return loss


def _wide(problem: Problem) -> Problem:
    leaves = {name: getattr(problem, name).detach().double().requires_grad_() for name in ("hidden", "weight")}
    return replace(problem, **leaves)
