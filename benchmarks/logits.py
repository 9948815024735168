"""The operations on logits: their batches, this library, and its peers written as their users write them."""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_pref as fp
from fused_pref.testing.problems import BETA, parse_shape

OPERATIONS = ("token_logps", "sequence_logps", "cpo_loss", "dpo_loss", "bco_loss", "kto_loss", "preference_loss")


@dataclass(frozen=True)
class Shape:
    """S sequences of T positions over V entries."""

    sequences: int
    length: int
    columns: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """From ``"SxTxV"``.

        Raises:
            ValueError: anything else, or an odd S.
        """
        return cls(*parse_shape(text, "SxTxV", "8x64x32768"))


@dataclass(frozen=True)
class Batch:
    """Arguments of every operation. Every position scores its own label, so that nobody pays for slicing."""

    logits: Tensor  # (S, T, V), a leaf
    labels: Tensor  # (S, T)
    ref_logps: Tensor  # (S,)
    desirable: Tensor  # (S,) bool

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype, device: str) -> "Batch":
        """Random logits, always the same."""
        generator = torch.Generator(device).manual_seed(0)
        size = (shape.sequences, shape.length, shape.columns)
        logits = torch.empty(size, dtype=dtype, device=device).normal_(0, 3, generator=generator)
        labels = torch.randint(0, shape.columns, size[:2], generator=generator, device=device)
        desirable = torch.arange(shape.sequences, device=device) % 2 == 0
        ref_logps = torch.full((shape.sequences,), -16.0 * shape.length, device=device)
        return cls(logits.requires_grad_(), labels, ref_logps, desirable)

    @property
    def nbytes(self) -> int:
        """Bytes of the logits."""
        return self.logits.numel() * self.logits.element_size()


@dataclass(frozen=True)
class Implementation:
    """One way to compute the operations. ``load`` gives log-probs (S, T) from logits and labels; None: this library."""

    name: str
    package: str | None = None
    gpu: bool = False
    load: Callable[[], Callable[[Tensor, Tensor], Tensor]] | None = None
    # Launches kernels that PyTorch's dispatcher does not see, so that their traffic cannot be counted.
    opaque: bool = False

    def obstacle(self, device: str) -> str | None:
        """Why this one cannot run here; None if it can."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.name} is absent: {self.package} is not installed"
        if self.gpu and device != "cuda":
            return f"{self.name} is absent: it needs a GPU"
        return None

    def call(self, operation: str) -> Callable[[Batch], Tensor]:
        """A function of a batch to a differentiable scalar."""
        return ours(operation) if self.load is None else peer(operation, self.load())


def sigmoid(chosen: fp.Sequences, rejected: fp.Sequences) -> Tensor:
    """An objective of the user's: CPO without NLL."""
    return -F.logsigmoid(BETA * (chosen.logps - rejected.logps))


def ours(operation: str) -> Callable[[Batch], Tensor]:
    """This library, in the backend that ``auto`` chooses."""
    calls: dict[str, Callable[[Batch], Tensor]] = {
        "token_logps": lambda b: fp.token_logps(b.logits, b.labels, shift=False).sum(),
        "sequence_logps": lambda b: fp.sequence_logps(b.logits, b.labels, shift=False).sum(),
        "cpo_loss": lambda b: fp.cpo_loss(b.logits, b.labels, shift=False).loss,
        "dpo_loss": lambda b: fp.dpo_loss(b.logits, b.labels, b.ref_logps, shift=False).loss,
        "bco_loss": lambda b: fp.bco_loss(b.logits, b.labels, b.desirable, b.ref_logps, shift=False).loss,
        "kto_loss": lambda b: fp.kto_loss(b.logits, b.labels, b.desirable, b.ref_logps, shift=False).loss,
        "preference_loss": lambda b: fp.preference_loss(b.logits, b.labels, sigmoid, shift=False).loss,
    }
    return calls[operation]


def peer(operation: str, token_logps: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Batch], Tensor]:
    """The operation around a peer's token log-probs, in TRL's order of steps, with the mean logits that it logs."""

    def logps(batch: Batch) -> Tensor:
        batch.logits.detach().mean()
        return token_logps(batch.logits, batch.labels).sum(-1)

    def cpo(batch: Batch) -> Tensor:
        pairs = batch.labels.shape[0] // 2
        nll = F.cross_entropy(batch.logits[:pairs].flatten(0, 1), batch.labels[:pairs].flatten())
        sums = logps(batch)
        return -F.logsigmoid(BETA * (sums[:pairs] - sums[pairs:])).mean() + nll

    def dpo(batch: Batch) -> Tensor:
        pairs = batch.labels.shape[0] // 2
        ratios = logps(batch) - batch.ref_logps
        return -F.logsigmoid(BETA * (ratios[:pairs] - ratios[pairs:])).mean()

    def bco(batch: Batch) -> Tensor:
        rewards = BETA * (logps(batch) - batch.ref_logps)
        return -F.logsigmoid(torch.where(batch.desirable, rewards, -rewards)).mean()

    def kto(batch: Batch) -> Tensor:
        rewards = BETA * (logps(batch) - batch.ref_logps)
        return (1 - torch.sigmoid(torch.where(batch.desirable, rewards, -rewards))).mean()

    def preference(batch: Batch) -> Tensor:
        chosen, rejected = logps(batch).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    calls: dict[str, Callable[[Batch], Tensor]] = {
        "token_logps": lambda batch: token_logps(batch.logits, batch.labels).sum(),
        "sequence_logps": lambda batch: token_logps(batch.logits, batch.labels).sum(-1).sum(),
        "cpo_loss": cpo,
        "dpo_loss": dpo,
        "bco_loss": bco,
        "kto_loss": kto,
        "preference_loss": preference,
    }
    return calls[operation]


def load_eager() -> Callable[[Tensor, Tensor], Tensor]:
    """PyTorch's log-softmax and gather."""
    return lambda logits, labels: logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def load_trl() -> Callable[[Tensor, Tensor], Tensor]:
    """TRL's function: row by row in PyTorch on a CPU, its Triton kernel on a GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer.utils import selective_log_softmax
    return selective_log_softmax


def load_liger() -> Callable[[Tensor, Tensor], Tensor]:
    """Liger's cross-entropy, which writes its gradient over the logits in the forward."""
    from liger_kernel.transformers.functional import liger_cross_entropy  # pyright: ignore[reportMissingImports]

    def token_logps(logits: Tensor, labels: Tensor) -> Tensor:
        losses = liger_cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return -losses.view(labels.shape)

    return token_logps


def implementations(device: str) -> list[Implementation]:
    """All of them, whether they can run here or not."""
    return [
        Implementation("fused_pref"),
        Implementation("eager", load=load_eager),
        Implementation("trl", package="trl", load=load_trl, opaque=device == "cuda"),
        Implementation("liger", package="liger_kernel", gpu=True, load=load_liger, opaque=True),
    ]
