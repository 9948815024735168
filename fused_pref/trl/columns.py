"""Columns of numbers in batches, beside what TRL's collators make of the rows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset

from fused_pref.trl.rows import check_label


class ColumnCollator:
    """A collator that takes columns along, as tensors whose first dimension is rows.

    Args:
        collator: TRL's, or another one; what its batches have already is left.
        columns: names of columns of numbers, or of lists of numbers of one length.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Any], columns: Sequence[str]) -> None:
        self.collator, self.columns = collator, tuple(columns)

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        """The batch of some rows.

        Raises:
            ValueError: a column that makes no tensor.
        """
        # Read first: TRL's collator for pictures changes the rows.
        values = {name: [example[name] for example in examples] for name in self.columns if name in examples[0]}
        batch = self.collator(examples)
        for name, entries in values.items():
            if name in batch:
                continue
            try:
                batch[name] = torch.tensor(entries)
            except (ValueError, TypeError, RuntimeError) as error:
                raise ValueError(
                    f"the column {name}, which objective takes, must have a number in every row, or as many numbers; "
                    f"got {str(entries)[:80]}"
                ) from error
        return batch


class RowCollator(ColumnCollator):
    """A collator of single sequences, which checks their labels, too."""

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        """The batch of some rows.

        Raises:
            ValueError: a label is none, or a column makes no tensor.
        """
        for example in examples:
            check_label("the label of a row", example["label"])
        return super().__call__(examples)


def check_columns(name: str, dataset: Any, columns: Sequence[str]) -> None:
    """A dataset, or each of a dictionary of them, must have these columns, without nulls; of a stream, the first row.

    Raises:
        ValueError: it has not.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_columns(f"{name}[{key!r}]", part, columns)
    elif dataset is not None:
        there = dataset.column_names if isinstance(dataset, Dataset) else list(next(iter(dataset)))
        missing = [column for column in columns if column not in there]
        if missing:
            raise ValueError(f"{name} must have {', '.join(missing)}, which objective takes; got {', '.join(there)}")
        for column in columns:
            # The stored column may have more rows than the dataset.
            if isinstance(dataset, Dataset) and dataset.data.column(column).null_count:
                nulls = [row for row, value in enumerate(dataset[column]) if value is None]
                if nulls:
                    raise ValueError(
                        f"{name}[{nulls[0]}][{column!r}] must be a number, which objective takes; got None"
                    )
