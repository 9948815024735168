"""What is computed: sizes by name, tensors, the kinds of work, and the truth of each in float64."""

import functools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_pref as fp

BETA, GAMMA = 0.1, 0.5
LOGITS = ("random", "peaked", "flat", "large", "adversarial")
# Peaked: the log-odds of a target against all the others together are normal with this mean and deviation, so that
# half of the targets have at least 0.98 of the probability.
PEAK, SPREAD = 4.0, 3.0
# Flat: of standard normal logits. Large: of the largest |z|. Adversarial: mean log-odds of the targets.
FLATNESS, LARGEST, DEPTH = 1e-3, 1e4, -60.0
# Entries of a block of float64 logits.
BLOCK = 2**27


def parse_shape(text: str, form: str, example: str) -> tuple[int, ...]:
    """The sizes that a text of this form, as ``"SxTxDxV"``, says; the first of them is of pairs.

    Raises:
        ValueError: another number of sizes, one below 1 or of more than 31 bits, or an odd first one.
    """
    numbers = tuple(int(number) for number in text.split("x") if number.isdecimal())
    whole = len(numbers) == len(text.split("x")) == len(form.split("x"))
    if not whole or not 0 < min(numbers) <= max(numbers) < 2**31 or numbers[0] % 2:
        raise ValueError(f"--shape must be {form} with an even {form[0]}, as {example}; got {text!r}")
    return numbers


@dataclass(frozen=True)
class Sizes:
    """S sequences of T positions, of which a first share is not scored; D and V.

    Attributes:
        sequences: S, chosen sequences first, then rejected.
        length: T.
        features: D.
        vocabulary: V.
        masked: share of each sequence that is not scored.
        logits: ``"random"``, standard normal; ``"peaked"``, targets that have most of the probability; ``"flat"``,
            nearly the same for all tokens; ``"large"``, of up to 10⁴; ``"adversarial"``, targets far below the others.
    """

    sequences: int
    length: int
    features: int
    vocabulary: int
    masked: float = 0.0
    logits: str = "random"

    @classmethod
    def parse(cls, text: str) -> "Sizes":
        """From ``"SxTxDxV"``.

        Raises:
            ValueError: anything else, or an odd S.
        """
        sequences, length, features, vocabulary = parse_shape(text, "SxTxDxV", "8x128x512x32768")
        return cls(sequences, length, features, vocabulary)

    @property
    def scored(self) -> int:
        """Positions of a sequence that are scored."""
        return self.length - int(self.length * self.masked)

    @property
    def tokens(self) -> int:
        """N."""
        return self.sequences * self.scored

    def __str__(self) -> str:
        masked = f", {self.masked:.0%} masked" if self.masked else ""
        positions = f"N={self.tokens} of {self.sequences}x{self.length}{masked}"
        return f"{positions}, D={self.features}, V={self.vocabulary}, {self.logits} logits"


@dataclass(frozen=True)
class Work:
    """Something to compute.

    Attributes:
        objective: of the log-probs; see :func:`objective`.
        gradients: of what they are asked for.
        summary: in words.
    """

    objective: str
    gradients: tuple[str, ...]
    summary: str

    @property
    def products(self) -> int:
        """Products of 2·N·D·V operations that cannot be spared."""
        return 1 + len(self.gradients)


BOTH = ("hidden", "weight")
WORKS = {
    "cpo": Work("cpo", BOTH, "CPO with NLL, gradients of hidden states and weight"),
    "simpo": Work("simpo", BOTH, "SimPO, gradients of hidden states and weight"),
    "dpo": Work("dpo", BOTH, "DPO, gradients of hidden states and weight"),
    "bco": Work("bco", BOTH, "BCO with δ the mean reward of the batch, gradients of hidden states and weight"),
    "cross_entropy": Work("cross_entropy", BOTH, "mean cross-entropy, gradients of hidden states and weight"),
    "frozen": Work("cpo", ("hidden",), "CPO with NLL, gradients of hidden states"),
    "logps": Work("logps", (), "log-probs of the sequences, no gradients"),
}


@dataclass(frozen=True)
class Problem:
    """Tensors of a size. Position t scores label t, so that nobody pays for shifting."""

    sizes: Sizes
    hidden: Tensor  # (S, T, D)
    weight: Tensor  # (V, D)
    labels: Tensor  # (S, T)
    desirable: Tensor  # (S,) bool
    # The same for all sequences, so that it moves BCO's rewards to where they are near δ, and leaves Δ alone.
    ref_logps: Tensor  # (S,)

    @classmethod
    def make(cls, sizes: Sizes, dtype: torch.dtype, device: str, seed: int = 0) -> "Problem":
        """Random, the same for the same seed."""
        S, T, D, V = sizes.sequences, sizes.length, sizes.features, sizes.vocabulary
        generator = torch.Generator(device).manual_seed(seed)
        weight = torch.randn(V, D, generator=generator, device=device, dtype=torch.float32).mul_(D**-0.5)
        labels = torch.randint(0, V, (S, T), generator=generator, device=device)
        hidden = torch.randn(S, T, D, generator=generator, device=device)
        if sizes.logits in ("peaked", "adversarial"):
            target = weight[labels]
            odds = (PEAK if sizes.logits == "peaked" else DEPTH) + SPREAD * torch.randn(
                S, T, 1, generator=generator, device=device
            )
            hidden = target * (math.log(V) + odds) / target.square().sum(-1, keepdim=True)
        elif sizes.logits == "flat":
            hidden *= FLATNESS
        elif sizes.logits == "large":
            hidden *= LARGEST / (hidden @ weight.t()).abs().amax(-1, keepdim=True)
        labels[:, : T - sizes.scored] = -100
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        with torch.no_grad():
            mean = fp.linear_sequence_logps(hidden, weight, labels, shift=False).mean()
        desirable = torch.arange(S, device=device) % 2 == 0
        return cls(sizes, hidden, weight, labels, desirable, mean.expand(S).contiguous())

    def of(self, gradients: Collection[str]) -> "Problem":
        """The same on tensors of their own, which share the memory; leaves where these gradients are wanted."""
        # An implementation may mark the tensors that it gets (Liger: as dynamic), and must not mark those of others.
        return replace(
            self,
            hidden=self.hidden.detach().requires_grad_("hidden" in gradients),
            weight=self.weight.detach().requires_grad_("weight" in gradients),
            labels=self.labels.detach(),
        )

    @property
    def leaves(self) -> dict[str, Tensor]:
        """By name, those of which the gradients are wanted."""
        named = {"hidden": self.hidden, "weight": self.weight}
        return {name: tensor for name, tensor in named.items() if tensor.requires_grad}

    @functools.cached_property
    def scored(self) -> Tensor:
        """(S, T) bool."""
        return self.labels != -100

    @functools.cached_property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Hidden states (N, D) and labels (N,) of what is scored."""
        return self.hidden.detach()[self.scored], self.labels[self.scored]


# A value, by the work's objective, of a problem.
Loss = Callable[[Problem], Tensor]


def objective(name: str, logp: Tensor, problem: Problem) -> Tensor:
    """An objective of token log-probs (S, T), 0 where nothing is scored, in PyTorch as TRL writes it."""
    sums, counts = logp.sum(-1), problem.scored.sum(-1)
    pairs = len(sums) // 2
    if name == "logps":
        return sums
    if name == "cross_entropy":
        return -logp.sum() / counts.sum()
    if name == "bco":
        rewards = BETA * (sums - problem.ref_logps)
        shifted = rewards - rewards.detach().mean()
        return -F.logsigmoid(torch.where(problem.desirable, shifted, -shifted)).mean()
    if name == "simpo":
        sums = sums / counts
    if name == "dpo":
        sums = sums - problem.ref_logps
    margin = BETA * (sums[:pairs] - sums[pairs:]) - (GAMMA if name == "simpo" else 0)
    loss = -F.logsigmoid(margin).mean()
    return loss - logp[:pairs].sum() / counts[:pairs].sum() if name == "cpo" else loss


def truth(name: str, problem: Problem) -> dict[str, Tensor]:
    """An objective in float64, a block of rows at a time, without the help of this library.

    Returns:
        ``value``, and for an objective with gradients ``hidden`` (S, T, D) and ``weight`` (V, D).
    """
    p, (rows, targets) = problem, problem.rows
    w, step = p.weight.detach().double(), max(1, BLOCK // p.sizes.vocabulary)
    blocks = list(zip(rows.split(step), targets[:, None].split(step), strict=True))
    logp = torch.zeros(p.labels.shape, dtype=torch.float64, device=w.device)
    logp[p.scored] = torch.cat([_log_softmax(h, w).gather(1, y)[:, 0] for h, y in blocks])
    value = objective(name, logp.requires_grad_(), p)
    if name == "logps":
        return {"value": value.detach()}
    slopes = torch.autograd.grad(value, logp)[0][p.scored][:, None].split(step)
    weight, hidden = torch.zeros_like(w), []
    for (h, y), slope in zip(blocks, slopes, strict=True):
        dz = _log_softmax(h, w).exp_().mul_(-slope).scatter_add_(1, y, slope)
        hidden.append(dz @ w)
        weight.addmm_(dz.t(), h.double())
    spread = torch.zeros(p.hidden.shape, dtype=torch.float64, device=w.device)
    spread[p.scored] = torch.cat(hidden)
    return {"value": value.detach(), "hidden": spread, "weight": weight}


def _log_softmax(h: Tensor, w: Tensor) -> Tensor:
    return (h.double() @ w.t()).log_softmax(1)


def error(found: Tensor, true: Tensor) -> float:
    """Norm of the difference over that of the truth; a value below 1, and a gradient that is 0, count as 1."""
    scale = true.norm()
    scale = scale.clamp(min=1.0) if true.dim() < 2 else torch.where(scale == 0, 1, scale)
    return ((found.double() - true).norm() / scale).item()
