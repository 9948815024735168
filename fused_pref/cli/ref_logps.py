"""``python -m fused_pref ref-logps``: log-probs of a reference, once, into a file that trainers take."""

import argparse
import functools
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_pref.cli import files
from fused_pref.cli.usage import UsageError, count

if TYPE_CHECKING:
    from datasets import Dataset

# Of a trainer: the columns that its rows have.
TRAINERS = {"dpo": "chosen and rejected", "kto": "completion and label", "bco": "completion and label"}
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
DTYPES = ("float32", "bfloat16", "float16", "auto")
PRECISIONS = ("bf16", "fp16", "fp32")

EPILOG = """\
Writes a line of JSON a row, with the log-probs under TRL's column names. Run it again to go on where it
was ended. Trainers take the file as ref_logps_file, and refuse one of other rows or options.

examples:
  %(prog)s pairs.jsonl --model my-model --out reference.jsonl
  %(prog)s rows.jsonl --model my-model --kl-batch-size 8 --out reference.jsonl

See docs/api/commands.md#ref-logps for what the file holds.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("data", metavar="DATA", type=Path, help=f"preferences: {', '.join(READERS)}")
    parser.add_argument("--model", required=True, metavar="NAME", help="the reference: a folder, or a name on the hub")
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="FILE",
        help="the file of log-probs; one that is not complete is gone on with, if it is of the same options",
    )
    parser.add_argument(
        "--trainer", choices=TRAINERS, help="default: dpo for rows of chosen and rejected, kto for completion and label"
    )
    parser.add_argument("--tokenizer", metavar="NAME", help="a tokenizer or processor (default: the model's)")
    parser.add_argument("--chat-template", type=Path, metavar="FILE", help="in place of the tokenizer's own")
    parser.add_argument("--max-length", type=_length, default=1024, help="as the trainer's, or none; default: 1024")
    parser.add_argument(
        "--truncation-mode",
        choices=("keep_start", "keep_end"),
        default="keep_start",
        help="as the trainer's, of dpo alone; default: keep_start",
    )
    parser.add_argument("--ld-alpha", type=_alpha, metavar="ALPHA", help="as the trainer's, of dpo alone")
    parser.add_argument(
        "--kl-batch-size",
        type=functools.partial(count, least=2),
        help="of kto alone: the trainer's per_device_train_batch_size, within which KL completions are exchanged; with "
        "exact_accumulation times its accumulation steps and ranks; default: 8",
    )
    parser.add_argument("--batch-size", type=count, default=8, help="rows of a forward; default: 8")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights; default: float32")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="bf16", help="of the forward, as a trainer's; default: bf16"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu"), default="auto", help="default: an accelerator if there is one"
    )


def run(args: argparse.Namespace) -> int:
    """Compute what the file does not have yet."""
    try:
        import fused_pref.trl  # noqa: F401
    except ImportError as error:
        raise UsageError(error) from error
    try:
        files.make_folder(args.out.parent)
    except OSError as error:
        raise UsageError(f"argument --out: cannot write {args.out}: {error.strerror}") from error
    # Of what libraries write, nothing stays: neither tables of the rows nor a trainer's folder.
    with tempfile.TemporaryDirectory() as folder:
        dataset = read_rows(args.data, folder)
        trainer = _trainer(args, dataset.column_names)
        _check_options(args, trainer)
        from fused_pref.cli.reference_pass import ReferencePass

        try:
            reference = ReferencePass(args, trainer, dataset, folder)
            done = reference.done(args.out)
        except (ValueError, TypeError, OSError) as error:
            raise UsageError(error) from error
        rows = len(reference.rows)
        if reference.dropped:
            all_rows = rows + reference.dropped
            print(f"{args.data}: {reference.dropped} of {all_rows} rows, whose prompts fill --max-length, are left out")
        reference.write(args.out, done)
    print(f"{args.out}: {rows} rows with {', '.join(reference.columns)}, for --trainer {trainer}")
    return 0


def read_rows(path: Path, folder: str) -> "Dataset":
    """The rows of a file.

    Args:
        path: of a kind in ``READERS``.
        folder: where they are kept.

    Raises:
        UsageError: another kind of file, or one that cannot be read.
    """
    from datasets import load_dataset

    if path.suffix not in READERS:
        raise UsageError(f"argument DATA: must be a file that ends in {', '.join(READERS)}; got {str(path)!r}")
    if not path.is_file():
        raise UsageError(f"argument DATA: must be a file; got {str(path)!r}")
    try:
        rows: Any = load_dataset(READERS[path.suffix], data_files=str(path), split="train", cache_dir=folder)
    except Exception as error:  # whatever the readers raise, wrapped
        reason = str(error.__cause__ or error) or "it has no rows"
        raise UsageError(f"argument DATA: cannot read {str(path)!r}: {reason}") from error
    return rows


def _trainer(args: argparse.Namespace, columns: list[str]) -> str:
    """The trainer that the log-probs are for."""
    if args.trainer is not None:
        return args.trainer
    for trainer, needed in TRAINERS.items():
        if set(needed.split(" and ")) <= set(columns):
            return trainer
    kinds = " or ".join(dict.fromkeys(TRAINERS.values()))
    raise UsageError(f"argument DATA: must have the columns {kinds}; got {', '.join(columns) or 'none'}")


def _check_options(args: argparse.Namespace, trainer: str) -> None:
    """What has an effect on one trainer alone must not be given for another."""
    own = {"truncation_mode": ("dpo", "keep_start"), "ld_alpha": ("dpo", None), "kl_batch_size": ("kto", None)}
    for name, (owner, default) in own.items():
        if trainer != owner and getattr(args, name) != default:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"argument {option}: is of --trainer {owner} alone; got --trainer {trainer}")


def _length(text: str) -> int | None:
    return None if text == "none" else count(text, others=", or none")


def _alpha(text: str) -> float:
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not 0 <= alpha <= 1:
        raise argparse.ArgumentTypeError(f"must be a number in [0, 1]; got {text!r}")
    return alpha
