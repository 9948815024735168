"""Who computes it: this library, and its peers as their users call them."""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_pref as fp
from fused_pref.testing.problems import BETA, GAMMA, WORKS, Loss, Problem, objective

# Log-probs (N,) of rows (N, D) with targets (N,) under a weight (V, D).
TokenLogps = Callable[[Tensor, Tensor, Tensor], Tensor]
# QuACK's own choice of rows at a time.
QUACK_ROWS = 4096


@dataclass(frozen=True)
class Peer:
    """An implementation of some kinds of work.

    Attributes:
        name: of it.
        load: from the name of an objective to what computes it; imports what it needs.
        works: kinds of work; empty for all.
        package: what must be installed.
        gpu: whether it needs one.
        note: what a reader of its row must know.
        needs: an attribute of ``torch.nn.functional`` that must be there.
        device: where it says something that another row does not; None for everywhere.
        own: whether it is this library.
        twin: whether it is the code of another row.
    """

    name: str
    load: Callable[[str], Loss]
    works: tuple[str, ...] = ()
    package: str | None = None
    gpu: bool = False
    note: str = ""
    needs: str | None = None
    device: str | None = None
    own: bool = False
    twin: bool = False

    @property
    def judges(self) -> bool:
        """Whether the exactness of this library is held against it."""
        return not self.own and not self.twin

    def obstacle(self, device: str) -> str | None:
        """Why it cannot run here; None if it can."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.needs is not None and not hasattr(F, self.needs):
            return f"PyTorch {torch.__version__} has no F.{self.needs}"
        if torch.device(device).type != "cuda" and (self.gpu or self.device == "cuda"):
            return "it needs a GPU"
        return None

    def does(self, work: str, device: str) -> bool:
        """Whether it has a row for this kind of work on this device."""
        return (not self.works or work in self.works) and self.device in (None, torch.device(device).type)


def ours(**common: Any) -> Callable[[str], Loss]:
    """This library; ``common``: keywords of every call, as ``memory_budget`` and ``backend``."""
    return _ours("linear_", lambda p: (p.hidden, p.weight), common)


def ours_of_logits(**common: Any) -> Callable[[str], Loss]:
    """This library's losses of logits that PyTorch has made; ``common`` as in :func:`ours`."""
    return _ours("", lambda p: (p.hidden @ p.weight.t(),), common)


def _ours(
    prefix: str, scores: Callable[[Problem], tuple[Tensor, ...]], common: dict[str, Any]
) -> Callable[[str], Loss]:
    """The functions of this prefix, by objective, on what stands before the labels in their arguments."""

    def call(name: str, p: Problem, *tensors: Tensor, **keywords: Any) -> Any:
        return getattr(fp, prefix + name)(*scores(p), p.labels, *tensors, **{"shift": False, **common, **keywords})

    def bco(p: Problem) -> Tensor:
        shift = fp.RewardShift().to(p.hidden.device)
        return call("bco_loss", p, p.desirable, p.ref_logps, delta=shift, beta=BETA).loss

    simpo = {"loss_type": "simpo", "simpo_gamma": GAMMA, "cpo_alpha": 0.0}
    calls: dict[str, Loss] = {
        "cpo": lambda p: call("cpo_loss", p, beta=BETA).loss,
        "simpo": lambda p: call("cpo_loss", p, beta=BETA, **simpo).loss,
        "dpo": lambda p: call("dpo_loss", p, p.ref_logps, beta=BETA).loss,
        "bco": bco,
        "cross_entropy": lambda p: -call("token_logps", p).sum() / p.sizes.tokens,
        "logps": lambda p: call("sequence_logps", p),
    }
    return calls.__getitem__


def by_position(token_logps: TokenLogps) -> Callable[[str], Loss]:
    """An objective around log-probs of all positions, scored or not."""

    def load(name: str) -> Loss:
        def loss(p: Problem) -> Tensor:
            logp = token_logps(p.hidden.flatten(0, 1), p.weight, p.labels.clamp(min=0).flatten())
            return objective(name, logp.view(p.labels.shape) * p.scored, p)

        return loss

    return load


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Logits, made float32, a log-softmax and a gather."""
    return (hidden @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def load_compiled(name: str) -> Loss:
    """The eager code under ``torch.compile``."""
    return torch.compile(by_position(eager)(name), dynamic=False)


def load_trl(name: str) -> Loss:
    """TRL's chunked log-prob head, fed as TRL feeds it: the scored rows on a GPU, all of them elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer.utils import (
            _CHUNKED_LOGPROB_CHUNK_SIZE,
            _ChunkedLogProbFunction,  # pyright: ignore[reportPrivateImportUsage]
        )
    chunked, size = _ChunkedLogProbFunction, _CHUNKED_LOGPROB_CHUNK_SIZE

    def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return chunked.apply(hidden, weight, None, targets, 1.0, size, None, 1.0, ())[0]

    def scored(p: Problem) -> Tensor:
        logp = token_logps(p.hidden[p.scored], p.weight, p.labels[p.scored])
        return objective(name, logp.new_zeros(p.labels.shape).masked_scatter(p.scored, logp), p)

    everywhere = by_position(token_logps)(name)
    return lambda p: (scored if p.hidden.is_cuda else everywhere)(p)


def load_unsloth(name: str) -> Loss:
    """unsloth_zoo's fused log-probs of the scored rows: one file of it, since the package asks for a GPU."""
    found = importlib.util.find_spec("unsloth_zoo")
    if found is None or not found.submodule_search_locations:
        raise ImportError("unsloth_zoo is not installed")
    path = Path(found.submodule_search_locations[0], "fused_losses", "fused_linear.py")
    spec = importlib.util.spec_from_file_location("unsloth_zoo_fused_linear", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"unsloth_zoo has no {path.name}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def loss(p: Problem) -> Tensor:
        logp = module.fused_linear_logprobs(p.hidden, p.weight, p.labels.clamp(min=0), mask=p.scored)
        return objective(name, logp, p)

    return loss


def load_liger_pairs(name: str) -> Loss:
    """Liger's chunked preference losses, compiled as by default."""
    from liger_kernel import chunked_loss  # pyright: ignore[reportMissingImports]

    modules = {
        "cpo": lambda: chunked_loss.LigerFusedLinearCPOLoss(beta=BETA),
        "simpo": lambda: chunked_loss.LigerFusedLinearSimPOLoss(beta=BETA, gamma=GAMMA, compute_nll_loss=False),
        "dpo": lambda: chunked_loss.LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False),
    }
    module = modules[name]()
    return lambda p: module(p.weight, p.hidden, p.labels)[0]


def load_liger(name: str) -> Loss:
    """Liger's fused linear cross-entropy."""
    from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
        liger_fused_linear_cross_entropy,
    )

    return lambda p: liger_fused_linear_cross_entropy(p.hidden.flatten(0, 1), p.weight, p.labels.flatten())


def cut_cross_entropy(**options: object) -> Callable[[str], Loss]:
    """Apple's kernel for token log-probs with PyTorch's objective around it."""

    def load(name: str) -> Loss:
        from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

        def loss(p: Problem) -> Tensor:
            losses = linear_cross_entropy(p.hidden, p.weight, p.labels, reduction="none", **options)
            return objective(name, -losses.float(), p)

        return loss

    return load


def load_torch(name: str) -> Loss:
    """PyTorch's chunked linear cross-entropy."""
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda p: F.linear_cross_entropy(p.hidden.flatten(0, 1), p.weight, p.labels.flatten(), options=options)


def load_quack(name: str) -> Loss:
    """QuACK's chunked linear cross-entropy."""
    from quack.linear_cross_entropy import (  # pyright: ignore[reportMissingImports]
        chunked_linear_cross_entropy,
    )

    return lambda p: chunked_linear_cross_entropy(
        p.hidden.flatten(0, 1), p.weight, p.labels.flatten(), chunk_size=QUACK_ROWS
    )


ONLY_CE = "cross-entropy only, of all positions"
PAIRS = ("cpo", "simpo", "dpo", "frozen")
TRAINED = tuple(name for name, work in WORKS.items() if "weight" in work.gradients)
PEERS = {
    peer.name: peer
    for peer in (
        Peer("fused_pref", ours(), own=True),
        *(
            Peer(
                f"fused_pref_{name}", ours(memory_budget=mib << 20), ("cpo",), note=f"memory_budget of {size}",
                device="cuda", own=True,
            )
            for name, mib, size in (("3g", 3072, "3 GiB"), ("1g", 1024, "1 GiB"), ("512m", 512, "512 MiB"))
        ),
        Peer("eager", by_position(eager)),
        Peer("torch.compile", load_compiled, TRAINED, note="of eager", twin=True),
        Peer("trl_chunked", load_trl, package="trl", note="TRL's log-prob head, PyTorch's objective"),
        Peer("unsloth", load_unsloth, package="unsloth_zoo", note="unsloth_zoo's log-prob head, PyTorch's objective"),
        Peer("liger_pairs", load_liger_pairs, PAIRS, package="liger_kernel", note="a pair at a time"),
        Peer("liger_ce", load_liger, ("cross_entropy",), package="liger_kernel", gpu=True, note=ONLY_CE),
        Peer(
            "cce", cut_cross_entropy(), package="cut_cross_entropy", gpu=True,
            note="drops small gradients; PyTorch's objective",
        ),
        Peer(
            "cce_exact", cut_cross_entropy(filter_eps=None), package="cut_cross_entropy", gpu=True,
            note="drops nothing; PyTorch's objective",
        ),
        Peer("torch_ce", load_torch, ("cross_entropy",), needs="linear_cross_entropy", note=ONLY_CE),
        Peer("quack_ce", load_quack, ("cross_entropy",), package="quack", gpu=True, note=ONLY_CE),
    )
}  # fmt: skip


def bare_products(problem: Problem) -> Callable[[], object]:
    """The floor: the products that the work cannot spare, on the scored rows, with nothing between them."""
    (rows, _), weight = problem.rows, problem.weight.detach()
    wanted = problem.leaves

    def step() -> object:
        z = rows @ weight.t()
        return z, "hidden" in wanted and z @ weight, "weight" in wanted and z.t() @ rows

    return step
