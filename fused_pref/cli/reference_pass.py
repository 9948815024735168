"""The pass of ``ref-logps``: a trainer's own rows, batches and reference, written batch by batch."""

import argparse
import itertools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoProcessor

from fused_pref.cli.usage import UsageError
from fused_pref.trl import BCOConfig, BCOTrainer, DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from fused_pref.trl.reference_file import (
    FORMAT,
    NUMBER,
    ReferenceFile,
    numbered,
    read,
    row_hashes,
    tokenised,
    weights_hash,
)
from fused_pref.trl.rows import plain_rows

KINDS: dict[str, tuple[Any, Any]] = {
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "bco": (BCOTrainer, BCOConfig),
}
# What is written to be read, and not compared: names differ where what they name does not.
NAMES = ("model", "tokenizer")
KL_BATCH = 8


class ReferencePass:
    """A trainer that never trains.

    Args:
        args: of the command.
        trainer: a name of ``KINDS``.
        dataset: rows as a trainer takes them.
        folder: for what a trainer writes.

    Raises:
        ValueError, TypeError, OSError: as the trainer, or what loads the model.
    """

    def __init__(self, args: argparse.Namespace, trainer: str, dataset: Dataset, folder: str) -> None:
        kind, config = KINDS[trainer]
        # TRL's own pass is left out, and so is a second model.
        kind = type(kind.__name__, (kind,), {"_precompute_ref_logps": lambda self, rows, *rest: rows})
        processing_class = AutoProcessor.from_pretrained(args.tokenizer or args.model)
        if args.chat_template is not None:
            processing_class.chat_template = args.chat_template.read_text(encoding="utf-8")
        options = {"truncation_mode": args.truncation_mode, "ld_alpha": args.ld_alpha} if trainer == "dpo" else {}
        cpu = args.device == "cpu" or not torch.accelerator.is_available()
        with warnings.catch_warnings():
            # TRL says that the mode is to go.
            warnings.filterwarnings("ignore", ".*keep_end", FutureWarning)
            given = config(
                folder,
                max_length=args.max_length,
                per_device_train_batch_size=args.kl_batch_size or KL_BATCH,
                bf16=args.precision == "bf16",
                fp16=args.precision == "fp16",
                use_cpu=cpu,
                report_to="none",
                precompute_ref_log_probs=True,
                model_init_kwargs={"dtype": args.dtype},
                **options,
            )
        self.trainer: Any = kind(
            args.model, args=given, train_dataset=numbered(dataset), processing_class=processing_class
        )
        self.rows: Dataset = self.trainer.train_dataset
        self.columns: tuple[str, ...] = self.trainer.ref_columns
        unpaired = trainer != "dpo" and "chosen" in dataset.column_names
        # Of rows whose prompts leave nothing of their completions.
        self.dropped = len(dataset) * (2 if unpaired else 1) - len(self.rows)
        self.batch_size: int = args.batch_size
        self.header = {
            "format": FORMAT,
            "trainer": trainer,
            "model": args.model,
            "weights": weights_hash(self.trainer.model),
            "tokenizer": args.tokenizer or args.model,
            **self.trainer.row_settings(given, next(iter(plain_rows(dataset))), processing_class),
            "dtype": args.dtype,
            "precision": args.precision,
            "device": self.trainer.accelerator.device.type,
            "batch_size": args.batch_size,
            "columns": list(self.columns),
            "rows": len(self.rows),
        }

    def done(self, path: Path) -> int:
        """How many rows a file has already, in whole batches, behind which it is cut.

        Raises:
            ValueError: it is another file, or of other options or rows; nothing of it is changed.
        """
        header = _line(self.header)
        content = path.read_bytes()[: len(header)] if path.exists() else b""
        if len(content) < len(header) and header.startswith(content):
            path.write_bytes(header)
            return 0
        file = read(f"argument --out: {path}", str(path))
        file.check_settings({name: value for name, value in self.header.items() if name not in NAMES})
        hashes = [name for name in ("tokens", "kl_tokens") if name in row_hashes(next(tokenised(self.rows)))]
        there = sum(1 for _ in file.check_rows("DATA", self.rows, hashes))
        if there < len(file.lines):
            raise ValueError(f"{file.name} must have {len(self.rows)} rows, as DATA; got {len(file.lines)}")
        done = there if there == len(self.rows) else there - there % self.batch_size
        _cut(path, file, done)
        return done

    def write(self, path: Path, done: int) -> None:
        """Add the rows that are missing.

        Raises:
            UsageError: a log-prob that is not finite; the rows before stay.
        """
        bar = tqdm(total=len(self.rows), initial=done, desc="reference", unit="row", disable=None)
        with path.open("ab") as file, bar:
            for start in range(done, len(self.rows), self.batch_size):
                batch = self.rows.select(range(start, min(start + self.batch_size, len(self.rows))))
                logps = self._logps(batch)
                lines = []
                for row, number, values in zip(tokenised(batch), batch[NUMBER], logps, strict=True):
                    bad = [value for value in values if not math.isfinite(value)]
                    if bad:
                        raise UsageError(f"the log-prob of DATA[{number}] under the model is {bad[0]}, of no use")
                    lines.append(
                        _line({"row": number, **row_hashes(row), **dict(zip(self.columns, values, strict=True))})
                    )
                file.write(b"".join(lines))
                file.flush()
                bar.update(len(batch))

    def _logps(self, rows: Dataset) -> list[tuple[float, ...]]:
        """Of each row, the log-probs of its columns."""
        batch = self.trainer._prepare_inputs(self.trainer.data_collator(list(rows)))
        found = self.trainer.compute_ref_log_probs(self.trainer.model, batch)
        return list(zip(*(logps.tolist() for logps in itertools.islice(found, len(self.columns))), strict=True))


def _cut(path: Path, file: ReferenceFile, rows: int) -> None:
    """Leave the header and some rows of a file."""
    with path.open("r+b") as stream:
        stream.readline()
        stream.seek(stream.tell() + sum(map(len, file.lines[:rows])))
        stream.truncate()


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"
