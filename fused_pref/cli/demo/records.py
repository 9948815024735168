"""Preference records: reading them from JSON lines and splitting them."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_pref.cli.usage import UsageError

SHIPPED = Path(__file__).with_name("translations.jsonl")
TEXTS = ("prompt", "chosen", "rejected")
SPLITS = ("train", "heldout")
MINIMUM = 4
HELDOUT_SHARE = 0.25


@dataclass(frozen=True)
class Record:
    """A prompt, the completion preferred and the other one; ``split`` is train, heldout or, where not given, None."""

    prompt: str
    chosen: str
    rejected: str
    split: str | None


def read_records(path: Path) -> list[Record]:
    """Records of a file with one JSON object a line; blank lines and other keys are ignored.

    Raises:
        UsageError: the file cannot be read, a line is malformed, or there are fewer than 4 records.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = _record(line)
            if records and (record.split is None) != (records[0].split is None):
                raise ValueError("either every record or none must have 'split'")
        except ValueError as error:
            raise UsageError(f"{path}, line {number}: {error}") from error
        records.append(record)
    if len(records) < MINIMUM:
        raise UsageError(f"{path}: at least {MINIMUM} records are needed; got {len(records)}")
    return records


def split_records(records: list[Record], seed: int) -> tuple[list[Record], list[Record]]:
    """(records to train on, held-out records): by their ``split``, or a quarter drawn by the seed.

    Raises:
        UsageError: their ``split`` leaves one of the two empty.
    """
    if records[0].split is not None:
        train, heldout = ([record for record in records if record.split == split] for split in SPLITS)
        if not train or not heldout:
            raise UsageError(f"both splits need records; got {len(train)} for train and {len(heldout)} for heldout")
        return train, heldout
    shuffled = random.Random(seed).sample(records, len(records))
    number = round(HELDOUT_SHARE * len(records))
    return shuffled[number:], shuffled[:number]


def _record(line: bytes) -> Record:
    """One line; ValueError says what is wrong with it."""
    try:
        value: Any = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from error
    except ValueError as error:
        raise ValueError("not valid JSON: a number has too many digits") from error
    except RecursionError as error:
        raise ValueError("not valid JSON: nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object with {', '.join(TEXTS)}; got {json.dumps(value)[:40]}")
    for key in TEXTS:
        _check_text(key, value)
    if value["chosen"] == value["rejected"]:
        raise ValueError("'chosen' and 'rejected' must differ; they are the same")
    split = value.get("split")
    if "split" in value and split not in SPLITS:
        raise ValueError(f"'split' must be one of {SPLITS}; got {json.dumps(split)[:40]}")
    return Record(value["prompt"], value["chosen"], value["rejected"], split)


def _check_text(key: str, value: dict[str, Any]) -> None:
    if key not in value:
        raise ValueError(f"the key '{key}' is missing; got {', '.join(map(repr, value)) or 'none'}")
    text = value[key]
    if not isinstance(text, str):
        raise ValueError(f"'{key}' must be a string; got {json.dumps(text)[:40]}")
    if not text.strip():
        raise ValueError(f"'{key}' must not be empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape one half of a surrogate pair
        raise ValueError(f"'{key}' is not valid text at character {error.start + 1}") from error
