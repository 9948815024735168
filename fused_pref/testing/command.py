"""``python -m fused_pref parity``: how exact every loss is here, by every plan, beside those of other libraries."""

import argparse
import contextlib
import functools
import warnings
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from fused_pref import backend
from fused_pref.head import call
from fused_pref.head.plan import Plan, Problem, candidates
from fused_pref.testing import problems
from fused_pref.testing.parity import SEEDS, Loss, Parity, compare
from fused_pref.testing.peers import PEERS, ours, ours_of_logits
from fused_pref.testing.problems import LOGITS, WORKS, Sizes
from fused_pref.usage import UsageError

# Plans by kind of work; each is taken in its largest form, and in its smallest: in groups or slices.
PLANS = {
    "cpo": ("grouped", "vocab_major"),
    "simpo": ("grouped", "vocab_major"),
    "dpo": ("grouped", "vocab_major"),
    "bco": ("vocab_major",),
    "cross_entropy": ("vocab_major",),
    "frozen": ("frozen_head",),
    "logps": ("logprob",),
}
# Peers that are this library, or the same code as another one.
LEFT_OUT = ("fused_pref", "fused_pref_3g", "fused_pref_1g", "fused_pref_512m", "torch.compile")
DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS), help="default: all of them")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all of them")
    parser.add_argument("--logits", nargs="+", choices=LOGITS, default=list(LOGITS), help="default: all of them")
    parser.add_argument("--shape", default="4x12x64x1031", metavar="SxTxDxV", help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="problems of each kind (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print the table; 0 if no line is worse than its peers, else 1."""
    try:
        sizes = Sizes.parse(args.shape)
        torch.empty(0, device=args.device)
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error).splitlines()[0]) from None
    if args.seeds < 1:
        raise UsageError(f"--seeds must be at least 1; got {args.seeds}")
    absent = {peer.name: peer.obstacle(args.device) for peer in PEERS.values() if peer.name not in LEFT_OUT}
    print("peers: " + ", ".join(f"{name} ({why})" if why else name for name, why in absent.items()), flush=True)
    lines = []
    for name in args.works:
        for dtype in args.dtypes:
            for logits in args.logits:
                own = Sizes(sizes.sequences, sizes.length, sizes.features, sizes.vocabulary, 0.25, logits)
                found = table(name, own, getattr(torch, dtype), args.device, args.seeds)
                print("\n".join(str(Parity(found)).splitlines()[0 if not lines else 2 :]), flush=True)
                lines += found
    worse = sum(not line.ok for line in lines)
    print(f"{len(lines)} lines, {worse} worse than the contract and the best peer")
    return int(worse > 0)


def table(name: str, sizes: Sizes, dtype: torch.dtype, device: str, seeds: int) -> tuple:
    """Lines of this library's implementations of a kind of work."""
    work = WORKS[name]
    peers = {
        peer.name: loaded(peer.name, work.objective) for peer in PEERS.values() if present(peer.name, name, device)
    }
    mine = dict(implementations(name, dtype, device))
    truth = functools.partial(problems.truth, work.objective)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peers' own
        return tuple(compare(name, work.gradients, mine, peers, truth, sizes, dtype, device, seeds))


def present(peer: str, work: str, device: str) -> bool:
    """Whether a peer does this work here."""
    return peer not in LEFT_OUT and PEERS[peer].does(work, device) and PEERS[peer].obstacle(device) is None


@functools.cache
def loaded(peer: str, objective: str) -> Loss:
    """A peer's loss."""
    return PEERS[peer].load(objective)


def implementations(name: str, dtype: torch.dtype, device: str) -> Iterator[tuple[str, Loss]]:
    """By every backend that is available and every plan; and from logits."""
    objective = WORKS[name].objective
    for kind in ("torch", "triton"):
        if kind == "triton" and backend.triton_obstacle(torch.device(device)) is not None:
            continue
        yield f"{kind}, logits", ours_of_logits(backend=kind)(objective)
        for plan in PLANS[name]:
            for fused in (False, True) if kind == "triton" else (False,):
                for small in (False, True):
                    form = f"{kind}, {plan}{', fused' if fused else ''}{', in parts' if small else ''}"
                    yield form, by_plan(ours(backend=kind)(objective), plan, fused=fused, small=small)


def by_plan(loss: Loss, name: str, *, fused: bool, small: bool) -> Loss:
    """A loss by one plan, in its smallest or its largest form."""

    def forced(problem: problems.Problem) -> Tensor:
        with only(name, fused=fused, small=small):
            return loss(problem)

    return forced


@contextlib.contextmanager
def only(name: str, *, fused: bool, small: bool) -> Iterator[None]:
    """Within this context, calls take plans of this name where they can."""

    def choose(problem: Problem) -> Plan:
        every = list(candidates(problem))
        named = [plan for plan in every if plan.name == name]
        plans = [plan for plan in named if plan.fused == fused] or named or every
        return (min if small else max)(plans, key=lambda plan: plan.workspace)

    with mock.patch.object(call, "choose", choose):
        yield
