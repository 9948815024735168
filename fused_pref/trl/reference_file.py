"""Files of log-probs of a reference: what they record, and whether they are of a trainer's model, tokenizer and rows.

The first line is the header, a JSON object; each other line is a row, in the order of the tokenised rows.
"""

import hashlib
import itertools
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, Features, Value, concatenate_datasets
from torch import nn
from trl.data_utils import is_conversational

from fused_pref.validate import is_dtensor

FORMAT = "fused_pref ref-logps 1"
KL_LOGPS = "ref_KL_logps"
# TRL's columns.
LOGPS = ("ref_chosen_logps", "ref_rejected_logps", "ref_logps", KL_LOGPS)
# Number of a row in the data as the user has it: rows are dropped and unpaired on the way.
NUMBER = "fused_pref_row"
# What is hashed of a tokenised row, by the name of the hash.
HASHED = {"tokens": ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids"), "kl_tokens": ("KL_completion_ids",)}
# Entries of each parameter that tell one model from another.
SAMPLE = 4096
BATCH = 1000


@dataclass
class ReferenceFile:
    """A file of log-probs.

    Args:
        name: of the argument that it came by, for messages.
        header: its first line.
        lines: the others, as far as they are complete, each with its line break.
    """

    name: str
    header: dict[str, Any]
    lines: list[bytes]

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows that are complete.

        Raises:
            ValueError: a line that is no row.
        """
        needed = {"row", "tokens", *self.header["columns"]}
        for number, line in enumerate(self.lines, 2):
            row = _object(line)
            if not needed <= row.keys():
                raise ValueError(
                    f"{self.name} must have {', '.join(sorted(needed))} in line {number}; got {line[:40]!r}"
                )
            yield row

    def check_settings(self, wanted: Mapping[str, Any]) -> None:
        """The file must be made with these settings.

        Raises:
            ValueError: it is made with others.
        """
        for setting, value in wanted.items():
            if self.header.get(setting) != value:
                there = self.header.get(setting)
                raise ValueError(f"{self.name} must be made with {setting}={value!r}, as asked for; got {there!r}")

    def check_columns(self, columns: Sequence[str]) -> None:
        """The file must have these log-probs.

        Raises:
            ValueError: it is made for another trainer.
        """
        missing = [column for column in columns if column not in self.header["columns"]]
        if missing:
            kind, there = self.header.get("trainer"), ", ".join(self.header["columns"])
            raise ValueError(f"{self.name} must have {', '.join(missing)}; got {there}, made with --trainer {kind}")

    def check_complete(self) -> None:
        """All rows must be there.

        Raises:
            ValueError: the command that made it was interrupted.
        """
        if len(self.lines) != self.header["rows"]:
            raise ValueError(
                f"{self.name} must have {self.header['rows']} rows; got {len(self.lines)}: run the command that makes "
                "it again, which goes on from there"
            )

    def check_rows(self, name: str, dataset: Dataset, hashes: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The rows of the file, each of which must be of the same tokens as that of a dataset.

        Args:
            name: of the dataset.
            dataset: tokenised, and numbered.
            hashes: the names of those that are compared.

        Raises:
            ValueError: a row is another one.
        """
        for number, there, row in zip(dataset[NUMBER], self.rows(), tokenised(dataset), strict=False):
            here = row_hashes(row)
            for kind in hashes:
                if here.get(kind) != there.get(kind):
                    what = "the KL completion of " if kind == "kl_tokens" else ""
                    raise ValueError(
                        f"{self.name} must be made of the rows of {name}; got another one for {what}{name}[{number}]"
                    )
            yield there

    def attached(self, name: str, dataset: Dataset, columns: Sequence[str]) -> Dataset:
        """Tokenised rows with their log-probs, as TRL stores them.

        Args:
            name: of the dataset, for messages.
            dataset: tokenised, and numbered.
            columns: of log-probs.

        Raises:
            ValueError: the file is not complete, or is of other rows.
        """
        self.check_complete()
        hashes = HASHED if KL_LOGPS in columns else ["tokens"]
        rows = list(self.check_rows(name, dataset, list(hashes)))
        if len(rows) != len(dataset) or len(rows) != len(self.lines):
            raise ValueError(
                f"{self.name} must have the {len(dataset)} rows of {name} that have been tokenised; got "
                f"{self.header['rows']}"
            )
        features = Features(dict.fromkeys(columns, Value("float32")))
        logps = Dataset.from_dict({column: [row[column] for row in rows] for column in columns}, features=features)
        return concatenate_datasets([dataset.remove_columns(NUMBER), logps], axis=1)


def read(name: str, path: str) -> ReferenceFile:
    """A file of log-probs, which may not be complete.

    Raises:
        ValueError: there is none, or it is another kind of file.
    """
    try:
        with open(path, "rb") as file:
            lines = file.read().splitlines(keepends=True)
    except OSError as error:
        raise ValueError(f"{name} must be a file that can be read; got {path!r}: {error.strerror}") from error
    header = _object(lines[0]) if lines else {}
    if header.get("format") != FORMAT or not {"rows", "columns"} <= header.keys():
        raise ValueError(f"{name} must be a file that `fused-pref ref-logps` made; got {path!r}")
    # The last line may be half written.
    return ReferenceFile(name, header, [line for line in lines[1:] if line.endswith(b"\n")])


def numbered(dataset: Dataset) -> Dataset:
    """Rows with their numbers, which TRL's pipelines take along."""
    return dataset.add_column(NUMBER, list(range(len(dataset))))  # type: ignore[call-arg]


def tokenised(dataset: Dataset) -> Iterator[dict[str, list[int]]]:
    """The ids of each row."""
    names = [name for name in itertools.chain(*HASHED.values()) if name in dataset.column_names]
    for batch in dataset.select_columns(names).iter(BATCH):
        columns: Any = batch
        for ids in zip(*(columns[name] for name in names), strict=True):
            yield dict(zip(names, ids, strict=True))


def row_hashes(row: Mapping[str, list[int]]) -> dict[str, str]:
    """Hashes of the tokens of a row, by name; labels have none, since log-probs do not depend on them."""
    found = {}
    for kind, names in HASHED.items():
        parts = [row[name] for name in names if name in row]
        if parts:
            found[kind] = _hash(*(array("q", [len(ids), *ids]).tobytes() for ids in parts))
    return found


def row_settings(args: Any, first: Mapping[str, Any], processing_class: Any, tokenizer: Any) -> dict[str, Any]:
    """What makes log-probs of rows, beside the model.

    Args:
        args: configuration of a trainer.
        first: row of the data.
        processing_class: of the trainer.
        tokenizer: the same, or that of the processor.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    settings = {
        "vocabulary": _hash(json.dumps([tokenizer.eos_token, vocabulary]).encode()),
        "chat_template": None,
        "max_length": args.max_length,
        "truncation_mode": getattr(args, "truncation_mode", "keep_start"),
        "ld_alpha": getattr(args, "ld_alpha", None),
    }
    # Texts need no template.
    if is_conversational(dict(first)) and processing_class.chat_template is not None:
        settings["chat_template"] = _hash(json.dumps(processing_class.chat_template).encode())
    return settings


def weights_hash(model: nn.Module) -> str | None:
    """Hash of a sample of a model's weights, rounded to bfloat16, without adapters; None where they are sharded."""
    base: Any = model
    adapters: set[str] = set()
    if is_peft_model(model):
        base, adapters = model.get_base_model(), set(model.peft_config)  # type: ignore[operator,arg-type]
    parts = []
    for name, parameter in base.named_parameters():
        if adapters & set(name.split(".")):
            continue
        if parameter.is_meta or parameter.numel() == 0 or is_dtensor(parameter.data):
            return None
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE].to(torch.bfloat16).float().cpu()
        parts += [str(tuple(parameter.shape)).encode(), sample.numpy().tobytes()]
    return _hash(*parts)


def adapter_counts(model: Any) -> bool:
    """Whether the reference that TRL makes of a model that came with an adapter has one that does something."""
    if not is_peft_model(model) or "ref" not in model.peft_config:
        return False
    parameters = {name: value for name, value in model.named_parameters() if "ref" in name.split(".")}
    seconds = [value for name, value in parameters.items() if "lora_B" in name or "lora_embedding_B" in name]
    return not seconds or any(bool(value.any()) for value in seconds)


def _object(line: bytes) -> dict[str, Any]:
    """A JSON object; of anything else nothing."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _hash(*parts: bytes) -> str:
    return hashlib.blake2b(b"".join(parts), digest_size=8).hexdigest()
