"""``python -m fused_pref demo``: options, and the run from records to report. Imports its extras only to run."""

import argparse
import contextlib
import importlib.util
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fused_pref.cli import files
from fused_pref.cli.demo.records import SHIPPED, read_records, split_records
from fused_pref.cli.usage import UsageError, count

if TYPE_CHECKING:
    from rich.console import Console

    from fused_pref.cli.demo.history import History
    from fused_pref.cli.demo.texts import Row

EXTRAS = ("matplotlib", "mistral_common", "rich", "transformers", "trl")
STEPS, CAP_S = 40, 240.0
# More would make the evaluations of a large file longer than its training.
MAX_HELDOUT = 96

EPILOG = """\
Trains the same random weights with CPO, with DPO and with BCO on real translations, and prints
held-out accuracy before and after. Takes minutes on two cores. Needs the extra demo: pip install ".[demo]" in
a clone.

examples:
  %(prog)s --objective cpo --steps 10
  %(prog)s --data my_pairs.jsonl --out curves

See docs/api/commands.md#demo for what it trains and what to expect.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--objective", choices=("cpo", "dpo", "bco", "all"), default="all", help="what to train with (default: all)"
    )
    parser.add_argument(
        "--steps", type=count, default=STEPS, help=f"optimiser steps of each objective (default: {STEPS})"
    )
    parser.add_argument(
        "--seed", type=_seed, default=0, help="seed of the weights, the order of the data and its split (default: 0)"
    )
    parser.add_argument(
        "--cap", type=_cap, default=CAP_S, metavar="SECONDS", help=f"longest time of training (default: {CAP_S:g})"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("fused_pref_demo"),
        metavar="FOLDER",
        help="where to write the curves (default: %(default)s)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=SHIPPED,
        metavar="FILE.jsonl",
        help="your own records, one JSON object a line: prompt, chosen, rejected, and if you like a split, train or "
        "heldout (default: a quarter is held out)",
    )


def run(args: argparse.Namespace) -> int:
    """Train, report and plot; 0 if the first steps agree with the reference, else 1."""
    started = time.monotonic()
    records = read_records(args.data)
    train, heldout = split_records(records, args.seed)
    require_extras()
    try:
        files.make_folder(args.out)
    except OSError as error:
        raise UsageError(f"argument --out: cannot write to the folder {args.out}: {error.strerror}") from error

    from fused_pref.cli.demo import report, texts
    from fused_pref.cli.demo.quiet import quiet

    console = report.make_console()
    name = "the shipped translations" if args.data == SHIPPED else args.data
    console.print(f"data: {len(records)} pairs from {name}, {len(train)} to train on, {len(heldout)} held out")
    if len(heldout) > MAX_HELDOUT:
        console.print(f"measured on the first {MAX_HELDOUT} held-out pairs")
        heldout = heldout[:MAX_HELDOUT]
    with quiet(), spare_core():
        tokenizer = texts.load_tokenizer()
        (train_rows, train_cut), (heldout_rows, heldout_cut) = (
            texts.make_rows(part, tokenizer) for part in (train, heldout)
        )
        if train_cut + heldout_cut:
            limits = f"{texts.MAX_PROMPT} tokens of prompt and {texts.MAX_COMPLETION} of completion"
            console.print(f"{train_cut + heldout_cut} records were cut to {limits}")
        histories = train_objectives(args, train_rows, heldout_rows, tokenizer, console)
    report.print_results(console, histories)
    picture = args.out / "curves.png"
    report.plot(histories, picture)
    device = _device()
    console.print(f"time {time.monotonic() - started:.0f} s, peak memory {report.peak_memory(device)}")
    console.print(f"curves: {picture}")
    return int(not all(history.check is not None and history.check.holds for history in histories))


def require_extras() -> None:
    """Refuse to go on without the packages of the extra.

    Raises:
        UsageError: names those missing and how to install them.
    """
    missing = [name.replace("_", "-") for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f'the demo needs {", ".join(missing)}: pip install "fused-pref[demo]"')


def train_objectives(
    args: argparse.Namespace, rows: "list[Row]", heldout: "list[Row]", tokenizer: Any, console: "Console"
) -> "list[History]":
    """Train each objective from the same random weights, sharing the time that is left equally."""
    from fused_pref.cli.demo.objectives import OBJECTIVES, PAIRS_PER_STEP, build
    from fused_pref.cli.demo.report import make_progress
    from fused_pref.cli.demo.texts import make_batch
    from fused_pref.cli.demo.train import Watcher, train

    names = tuple(OBJECTIVES) if args.objective == "all" else (args.objective,)
    batch = make_batch(heldout, tokenizer)
    deadline = time.monotonic() + args.cap
    histories: list[History] = []
    for number, name in enumerate(names):
        model = build(len(tokenizer), args.seed)
        if number == 0:
            size = f"vocabulary {len(tokenizer):,}"
            console.print(f"model: Llama of {model.num_parameters() / 1e6:.1f} M parameters, {size}, on {_device()}")
            console.print(f"plan: {args.steps} steps of up to {PAIRS_PER_STEP} pairs, at most {args.cap:g} s in all")
        objective = OBJECTIVES[name]
        console.print(f"{objective.name} from random weights (seed {args.seed})")
        now = time.monotonic()
        end = now + (deadline - now) / (len(names) - number)
        with make_progress(console, objective.name, args.steps) as progress:
            watcher = Watcher(objective, args.steps, batch, end, progress)
            histories.append(train(model, tokenizer, rows, args.seed, watcher))
    return histories


@contextlib.contextmanager
def spare_core() -> Iterator[None]:
    """Compute with one thread less: where another process has a core, threads that wait for theirs spin for nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be an integer in [0, 2**32); got {text!r}")
    return int(text)


def _cap(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number > 0; got {text!r}")
    return seconds
