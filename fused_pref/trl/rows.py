"""What is checked of the rows of a dataset before a trainer writes anything.

The first row is read, and a few between it and the last; of the others only what a column of Arrow knows at once: where
it is null, where a list is empty, which labels it holds.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute
from datasets import Dataset, IterableDataset

# Its functions are made when it is imported.
pc: Any = pyarrow.compute

SAMPLE = 32
BATCH = 10_000
EITHER = ("text", "messages")
# Columns that TRL's chat template of pairs refuses beside theirs.
STRANGERS = ("completion", "messages", "label")


def check_rows(
    name: str,
    dataset: Any,
    forms: Sequence[tuple[str, ...]],
    kinds: tuple[type, ...] = (Dataset, IterableDataset),
    parts: type[dict] | None = None,
    *,
    each: bool = False,
) -> None:
    """A dataset must have rows of one of the forms, each column a text or a list of messages, or a label.

    A ``prompt`` that is no list of messages, beside conversations, is not used: TRL takes the prompt out of them.

    Args:
        name: of the argument.
        dataset: one of the kinds (of an IterableDataset the first row alone is looked at), or None.
        forms: the columns that a row must have, one tuple for each form.
        kinds: of datasets that the trainer takes.
        parts: of dictionaries whose datasets it takes, too.
        each: whether TRL decides row by row where the prompt comes from, as its CPO does.

    Raises:
        TypeError: not a dataset.
        ValueError: no rows, missing columns, or a malformed row.
    """
    if dataset is None:
        return
    if parts is not None and isinstance(dataset, parts):
        for key, part in dataset.items():
            check_rows(f"{name}[{key!r}]", part, forms, kinds, each=each)
        return
    if not isinstance(dataset, kinds):
        allowed = " or ".join(f"datasets.{kind.__name__}" for kind in kinds)
        allowed += "" if parts is None else f", or a {parts.__name__} of them"
        raise TypeError(f"{name} must be a {allowed}; got {type(dataset).__name__}")
    first = next(iter(dataset), None)
    columns = list(first or dataset.column_names or ())
    form = next((form for form in forms if set(form) <= set(columns)), None)
    if form is None and columns:
        choice = " or ".join(", ".join(form) for form in forms)
        raise ValueError(f"{name} must have the columns {choice}; got {', '.join(columns)}")
    if form is None or first is None:
        raise ValueError(f"{name} must have at least one row; got none")
    wanted = _wanted(first, form, each)
    if each and _kind(first["chosen"]) == "messages":
        strangers = [column for column in STRANGERS if column in columns]
        if strangers:
            raise ValueError(
                f"{name} must not have the column {strangers[0]} beside conversations in chosen and rejected, which "
                f"TRL's chat template refuses; call {name}.remove_columns({strangers})"
            )
    _check_row(f"{name}[0]", first, wanted)
    # A transform of the user's makes other rows of the stored ones.
    if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":
        _check_stored(name, dataset.select_columns(list(wanted)), wanted)


def plain_rows(dataset: Any) -> Any:
    """Rows as TRL's pipelines take them: stored as they are shown, and without a prompt that is inside, too."""
    if isinstance(dataset, Dataset):
        # A transform makes other rows out of the tokenised ones, too; and arrays of ids are added where lists join.
        if dataset.format["type"] == "custom":
            dataset = dataset.map(lambda row: row)
        dataset = dataset.with_format(None)
    first: Any = next(iter(dataset))
    return dataset.remove_columns("prompt") if prompt_is_inside(first) else dataset


def prompt_is_inside(row: dict[str, Any]) -> bool:
    """Whether the prompt is to be taken out of conversations, beside which it is no list of messages itself."""
    return "prompt" in row and _kind(row.get("chosen")) == "messages" != _kind(row["prompt"])


def spread(dataset: Dataset) -> Iterator[Any]:
    """The first row of a dataset, and a few more up to the last."""
    return iter(dataset.select(range(0, len(dataset), _step(dataset))))


def check_label(name: str, value: Any) -> None:
    """A label must be true or false, or 1 or 0, as any kind of number.

    Raises:
        ValueError: it is not. That includes -1, which a conversion to bool would take for desirable.
    """
    if isinstance(value, str) or value is None or value not in (0, 1):
        raise ValueError(f"{name} must be true or false, or 1 or 0; got {value!r}")


def _step(dataset: Dataset) -> int:
    return max(1, len(dataset) // SAMPLE)


def _kind(value: Any) -> str:
    """As TRL tells them apart: by the first message of a list."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return "other"
    if not value:
        return "empty"
    return "messages" if isinstance(value[0], dict) and "role" in value[0] else "other"


def _wanted(first: dict[str, Any], form: tuple[str, ...], each: bool) -> dict[str, tuple[str, ...]]:
    """Column → the kinds of value that it may have, in all rows."""
    scored = [column for column in form if column not in ("prompt", "label")]
    kind = _kind(first[scored[0]])
    wanted: dict[str, tuple[str, ...]] = dict.fromkeys(scored, (kind,) if kind in EITHER else EITHER)
    if "label" in form:
        wanted["label"] = ()
    if "prompt" in first and each:
        wanted["prompt"] = (*EITHER, "other") if kind == "messages" else EITHER
    elif "prompt" in first and not prompt_is_inside(first):
        wanted["prompt"] = wanted[scored[0]]
    return wanted


def _check_row(place: str, row: dict[str, Any], wanted: dict[str, tuple[str, ...]]) -> None:
    for column, kinds in wanted.items():
        value = row[column]
        if not kinds:
            check_label(f"{place}[{column!r}]", value)
        elif _kind(value) in kinds:
            continue
        elif _kind(value) in EITHER:
            raise ValueError(f"{place} must have texts throughout or messages throughout; got both")
        else:
            lack = ", whose first entry has no role" if isinstance(value, list) and value else ""
            raise ValueError(f"{place}[{column!r}] must be a text or a list of messages; got {str(value)[:40]!r}{lack}")
    implicit = wanted.get("chosen") == ("messages",) and _kind(row.get("prompt")) != "messages"
    if implicit and row["chosen"][0] != row["rejected"][0]:
        raise ValueError(
            f"{place} must have chosen and rejected that begin with the same message, which is the prompt, or a prompt "
            f"that is a list of messages; got {str(row['chosen'][0])[:40]!r} and {str(row['rejected'][0])[:40]!r}"
        )


def _check_stored(name: str, dataset: Dataset, wanted: dict[str, tuple[str, ...]]) -> None:
    """A sample of the rows, and of all others what Arrow knows of their columns."""
    dataset = dataset.with_format(None)
    for number, row in enumerate(spread(dataset)):
        _check_row(f"{name}[{number * _step(dataset)}]", row, wanted)
    # The stored columns may have more rows than the dataset, which are left out by an index.
    if not any(pc.any(_bad(dataset.data.column(column), kinds)).as_py() for column, kinds in wanted.items()):
        return
    tables: Any = dataset.with_format("arrow").iter(BATCH)
    for start, table in enumerate(tables):
        for column, kinds in wanted.items():
            number = pc.index(_bad(table[column], kinds), True).as_py()
            if number >= 0:
                number += start * BATCH
                _check_row(f"{name}[{number}]", dataset[number], wanted)


def _bad(column: pa.ChunkedArray, kinds: tuple[str, ...]) -> pa.ChunkedArray:
    """Where a column is null or empty, or a label is none."""
    if not kinds:
        labels = [value for value in pc.unique(column).to_pylist() if value in (0, 1)]
        return pc.invert(pc.is_in(column, value_set=pa.array(labels, type=column.type)))
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return pc.fill_null(pc.equal(pc.list_value_length(column), 0), "other" not in kinds)
    return pc.is_null(column) if "other" not in kinds else pa.chunked_array([[False]])
