"""``python -m fused_pref parity``: how exact every loss is here, by every plan, beside those of other libraries."""

import argparse
import contextlib
import functools
import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fused_pref.cli.peers import PEERS, ours, ours_of_logits
from fused_pref.cli.usage import UsageError
from fused_pref.head.plans import planner
from fused_pref.head.plans.problem import Plan
from fused_pref.ops.backend import triton_obstacle
from fused_pref.testing import problems
from fused_pref.testing.parity import BOUNDS, SEEDS, TITLES, Line, Parity, available, compare
from fused_pref.testing.problems import LOGITS, WORKS, Loss, Problem, Sizes

# Plans by kind of work; each is taken in its largest form, and in groups or slices.
PLANS = {
    "cpo": ("grouped", "vocab_major"),
    "simpo": ("grouped", "vocab_major"),
    "dpo": ("grouped", "vocab_major"),
    "bco": ("vocab_major",),
    "cross_entropy": ("vocab_major",),
    "frozen": ("frozen_head",),
    "logps": ("logprob",),
}
# Plans whose fused forms wait for a sum as exponentials, which float16 does not reach far enough for.
WIDE = ("grouped", "frozen_head")
DTYPES = ("float32", "bfloat16", "float16")
BACKENDS = ("torch", "triton")

EPILOG = """\
One line for each loss, dtype, plan, backend and kind of logits: the median errors over the seeds, and
those of the other libraries that are installed. The exit status is 1 if a line fails.

example (seconds; everything takes minutes):
  %(prog)s --works cpo --dtypes float32 --logits peaked --seeds 1

See docs/numerics.md for the bounds, and benchmarks/parity.md for a full table.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    lists = {
        "--works": ("LOSS", WORKS, list(WORKS)),
        "--dtypes": ("DTYPE", DTYPES, list(DTYPES)),
        "--logits": ("KIND", LOGITS, list(LOGITS)),
        "--backends": ("BACKEND", BACKENDS, None),
    }
    for option, (name, choices, default) in lists.items():
        text = f"of {', '.join(choices)} (default: {'all' if default else 'those that are available'})"
        parser.add_argument(option, nargs="+", metavar=name, choices=choices, default=default, help=text)
    parser.add_argument(
        "--shape",
        default="4x12x64x1031",
        metavar="SxTxDxV",
        help="sizes: sequences, positions, hidden size, vocabulary (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=SEEDS, help="random problems of each kind (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print the table; 0 if no line is worse than its peers, else 1."""
    try:
        sizes = Sizes.parse(args.shape)
        available("--device", args.device)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if args.seeds < 1:
        raise UsageError(f"--seeds must be at least 1; got {args.seeds}")
    obstacle = triton_obstacle(torch.device(args.device))
    backends = args.backends or (BACKENDS if obstacle is None else BACKENDS[:1])
    if "triton" in backends and obstacle is not None:
        raise UsageError(f"--backends triton is not available: {obstacle}")
    absent = {peer.name: peer.obstacle(args.device) for peer in PEERS.values() if peer.judges}
    print("peers: " + ", ".join(f"{name} ({why})" if why else name for name, why in absent.items()), flush=True)
    lines: list[Line] = []
    for name, dtype, logits in itertools.product(args.works, args.dtypes, args.logits):
        own = replace(sizes, masked=0.25, logits=logits)
        found = table(name, own, getattr(torch, dtype), args.device, args.seeds, backends)
        print("\n".join(str(Parity(found)).splitlines()[2 if lines else 0 :]), flush=True)
        lines += found
    print("\n" + summary(lines))
    worse = sum(not line.ok for line in lines)
    print(f"\n{len(lines)} lines, {worse} worse than the contract and the best peer")
    return int(worse > 0)


def table(
    name: str, sizes: Sizes, dtype: torch.dtype, device: str, seeds: int, backends: Sequence[str]
) -> tuple[Line, ...]:
    """Lines of this library's implementations of a kind of work."""
    work = WORKS[name]
    peers = {peer: loaded(peer, work.objective) for peer in PEERS if judges(peer, name, dtype, device)}
    mine = {form: loss for backend in backends for form, loss in implementations(name, backend, dtype)}
    truth = functools.partial(problems.truth, work.objective)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peers' own
        return tuple(compare(name, work.gradients, mine, peers, truth, sizes, dtype, device, seeds))


def judges(peer: str, work: str, dtype: torch.dtype, device: str) -> bool:
    """Whether lines of this work are held against a peer."""
    # On a CPU it multiplies 16-bit numbers in float32, at a tenth of the speed of others.
    slow = peer == "torch_ce" and torch.device(device).type == "cpu" and dtype.itemsize == 2
    found = PEERS[peer]
    return found.judges and not slow and found.does(work, device) and found.obstacle(device) is None


def summary(lines: Sequence[Line]) -> str:
    """A table of the largest errors, and of the largest in units of the best peer's, by work and dtype."""
    header = ["", "dtype", "lines", *(f"largest {TITLES[key]} | of the best peer's" for key in BOUNDS)]
    rows = [header, ["---"] * (3 + 2 * len(BOUNDS))]
    for (work, dtype), group in itertools.groupby(lines, key=lambda line: (line.work, line.dtype)):
        own = list(group)
        cells = [work, dtype, f"{len(own)}"]
        for key in BOUNDS:
            errors = [line.errors[key] for line in own if key in line.errors]
            ratios = [line.errors[key] / max(line.best[key][0], 1e-12) for line in own if key in line.best]
            cells.append(f"{max(errors):.1e} | {max(ratios):.2f}" if errors and ratios else " | ")
        rows.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@functools.cache
def loaded(peer: str, objective: str) -> Loss:
    """A peer's loss."""
    return PEERS[peer].load(objective)


def implementations(name: str, backend: str, dtype: torch.dtype) -> Iterator[tuple[str, Loss]]:
    """From logits, and by every plan in every form that it has in this dtype."""
    objective = WORKS[name].objective
    yield f"{backend}, logits", ours_of_logits(backend=backend)(objective)
    for plan in PLANS[name]:
        fusible = backend == "triton" and (dtype != torch.float16 or plan not in WIDE)
        for fused, small in itertools.product((False, True) if fusible else (False,), (False, True)):
            form = f"{backend}, {plan}{', fused' if fused else ''}{', in parts' if small else ''}"
            yield form, by_plan(ours(backend=backend)(objective), plan, fused=fused, small=small)


def by_plan(loss: Loss, name: str, *, fused: bool, small: bool) -> Loss:
    """A loss by one plan, in its largest form or in parts."""

    def forced(problem: Problem) -> Tensor:
        with only(name, fused=fused, small=small):
            return loss(problem)

    return forced


@contextlib.contextmanager
def only(name: str, *, fused: bool, small: bool) -> Iterator[None]:
    """Within this context, calls take a plan of this name: the largest, or one of about three parts.

    A call without such a plan raises ValueError: another one would be measured under its name.
    """

    def choose(problem: planner.Problem) -> Plan:
        plans = [plan for plan in planner.candidates(problem) if plan.name == name and plan.fused == fused]
        if not plans:
            raise ValueError(f"there is no plan {name}{', fused,' if fused else ''} of this call")
        if not small:
            return max(plans, key=lambda plan: plan.workspace)
        entries = problem.tokens * problem.vocabulary
        return min(plans, key=lambda plan: abs(3 - entries / max(plan.rows * plan.columns, 1)))

    with planner.planning(choose):
        yield
