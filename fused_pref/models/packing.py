"""Sequences in rows without padding between them: where each lies, and a collator that lays them out."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_pref import validate

# The columns of token ids that a row may have: those of a pair in TRL's two forms, and of a single sequence.
PAIR, SINGLE = ("prompt_ids", "chosen_ids", "rejected_ids"), ("prompt_ids", "completion_ids")
LABELLED_PAIR = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
LABELLED = ("input_ids", "labels")
FORMS = (PAIR, SINGLE, LABELLED_PAIR, LABELLED)
# Columns of numbers that the losses take, under the names that TRL gives them: one entry a row, or one a side.
NUMBERS = {"label": "desirable", "ref_logps": "ref_logps", "sample_weight": "sample_weight"}
SIDES = {"ref_logps": ("ref_chosen_logps", "ref_rejected_logps")}
FLASH_ATTN_KWARGS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class Layout(NamedTuple):
    """Where the tokens of sequences, one after the other, lie in R rows of one length L.

    Attributes:
        tokens: (R, L) int64, the token at each place; what is left at the end of a row repeats the last token of all.
        positions: (R, L) int64, from 0 in each sequence. Each token of the rest of a row is a sequence of its own.
        token_index: (N_total,) int64, the place of each token.
        boundaries: (Q+1,) int32, of the sequences in the order of their places, the rest of rows among them.
    """

    tokens: Tensor
    positions: Tensor
    token_index: Tensor
    boundaries: Tensor


def lay_out(lengths: Sequence[int], row_tokens: int | None = None) -> Layout:
    """Lay sequences out in one row, or in as few rows as first fit, longest first, needs.

    Args:
        lengths: tokens of each sequence.
        row_tokens: the most tokens of a row; a longer sequence makes all rows as long as it is. None: one row, the
            sequences in their order.
    """
    rows = [list(range(len(lengths)))] if row_tokens is None else _rows(lengths, row_tokens)
    used = [sum(lengths[sequence] for sequence in row) for row in rows]
    width, starts = max(used), list(itertools.accumulate(lengths, initial=0))
    tokens, positions, index, sizes = [], [], torch.empty(starts[-1], dtype=torch.int64), []
    for number, (row, length) in enumerate(zip(rows, used, strict=True)):
        place = number * width
        for sequence in row:
            size = lengths[sequence]
            span = torch.arange(size)
            index[starts[sequence] : starts[sequence + 1]] = place + span
            tokens.append(starts[sequence] + span)
            positions.append(span)
            sizes.append(size)
            place += size
        tokens.append(torch.full((width - length,), starts[-1] - 1))
        positions.append(torch.zeros(width - length, dtype=torch.int64))
        sizes += [1] * (width - length)
    shape, boundaries = (len(rows), width), boundaries_of(torch.tensor(sizes))
    return Layout(torch.cat(tokens).view(shape), torch.cat(positions).view(shape), index, boundaries)


def boundaries_of(lengths: Tensor) -> Tensor:
    """(S+1,) int32, as flash-attention has them, of sequences of these lengths (S,)."""
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _rows(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """The sequences of each row, in their order."""
    room, rows, used = max(row_tokens, *lengths), list[list[int]](), list[int]()
    for sequence in sorted(range(len(lengths)), key=lambda sequence: -lengths[sequence]):
        fits = (row for row, tokens in enumerate(used) if tokens + lengths[sequence] <= room)
        row = next(fits, len(rows))
        if row == len(rows):
            rows.append([])
            used.append(0)
        rows[row].append(sequence)
        used[row] += lengths[sequence]
    return [sorted(row) for row in rows]


def flash_attn_kwargs(boundaries: Tensor, longest: int) -> dict[str, Any]:
    """What flash-attention takes in transformers, so that it need not find the sequences by their positions.

    Args:
        boundaries: (Q+1,) int32, of the sequences in the order of their places.
        longest: tokens of the longest one.
    """
    return dict(zip(FLASH_ATTN_KWARGS, (boundaries, boundaries, longest, longest), strict=True))


def is_flash_attention(model: Any) -> bool:
    """Whether a transformers model's attention is a flash-attention, which takes the boundaries of sequences."""
    return "flash" in (model.config._attn_implementation or "")


class PackingCollator:
    """Makes batches without padding, for :func:`fused_pref.models.preference_forward` and for loops of one's own.

    A row of the data is a pair or a single sequence, already tokenised. It has ``prompt_ids``, ``chosen_ids`` and
    ``rejected_ids``, or ``prompt_ids`` and ``completion_ids``, as TRL names them; or ``input_ids`` and ``labels``, with
    ``chosen_`` and ``rejected_`` before them for pairs. Labels are -100 where not scored, and not shifted. The columns
    ``label``, ``ref_logps``, ``ref_chosen_logps``, ``ref_rejected_logps`` and ``sample_weight`` are taken along where
    they are, and so are those of ``columns``. Other columns are left out.

    Where a transformers model is called without :func:`preference_forward`, give it ``use_cache=False``: with a cache
    it does not keep the sequences of a row apart.

    Args:
        row_tokens: the most tokens of a row; sequences are put into rows wherever they fit. A longer sequence makes all
            rows as long as it is. None: all sequences lie in one row.
        columns: names of more columns of numbers, such as those that an objective of one's own takes.

    Raises:
        ValueError, TypeError: a malformed argument.
    """

    def __init__(self, row_tokens: int | None = None, *, columns: Sequence[str] = ()) -> None:
        self.row_tokens = validate.at_least("row_tokens", row_tokens, 1, optional=True)
        if isinstance(columns, str) or not all(isinstance(name, str) for name in columns):
            raise validate.fail("columns", "a sequence of names", columns, TypeError)
        self.columns = tuple(columns)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of some rows.

        Returns:
            For the model: ``input_ids`` and ``position_ids``, (R, L) int64, and ``cu_seq_lens_q``, ``cu_seq_lens_k``,
            ``max_length_q`` and ``max_length_k`` for flash-attention. :func:`preference_forward` drops these where the
            model has another attention. For the loss, in its order (of pairs: chosen sequences first, then rejected):
            ``labels`` (N_total,), ``cu_seqlens`` (S+1,) int32, ``token_index`` (N_total,), which is the place of each
            token among the R·L, and the columns of numbers: ``label`` as ``desirable``, the log-probs of both sides
            as ``ref_logps`` (S,).

        Raises:
            ValueError: no rows, no tokens, or a malformed row.
        """
        rows = list(rows)
        form = _form(rows)
        sequences = _sequences(rows, form)
        lengths = [len(ids) for ids, _ in sequences]
        if not any(lengths):
            raise ValueError("rows must have a token; got empty sequences")
        layout = lay_out(lengths, self.row_tokens)
        ids = torch.tensor([token for ids, _ in sequences for token in ids])
        batch: dict[str, Any] = {
            "input_ids": ids[layout.tokens],
            "position_ids": layout.positions,
            "labels": torch.tensor([label for _, labels in sequences for label in labels]),
            "cu_seqlens": boundaries_of(torch.tensor(lengths)),
            "token_index": layout.token_index,
        }
        return batch | flash_attn_kwargs(layout.boundaries, max(lengths)) | self._numbers(rows)

    def _numbers(self, rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The columns of numbers."""
        columns = {name: [own] for own, name in NUMBERS.items() if own in rows[0]}
        columns |= {name: list(sides) for name, sides in SIDES.items() if all(side in rows[0] for side in sides)}
        columns |= {name: [name] for name in self.columns}
        found = {}
        for name, parts in columns.items():
            try:
                found[name] = torch.tensor([row[part] for part in parts for row in rows])
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"rows must have a number under {' and '.join(parts)}, or as many numbers in each; got "
                    f"{[row.get(part) for part in parts for row in rows][:8]}"
                ) from error
        return found


def _form(rows: list[Mapping[str, Any]]) -> tuple[str, ...]:
    """The columns of token ids that all rows have.

    Raises:
        ValueError: there are none.
    """
    for form in FORMS:
        if rows and all(isinstance(row, Mapping) and all(name in row for name in form) for row in rows):
            return form
    forms = "; or ".join(", ".join(form) for form in FORMS)
    got = f"{', '.join(rows[0])} in the first" if rows and isinstance(rows[0], Mapping) else str(rows[:1])
    raise ValueError(f"rows must all have the columns {forms}; got {got}")


def _sequences(rows: list[Mapping[str, Any]], form: tuple[str, ...]) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of each sequence, chosen ones first, then rejected.

    Raises:
        ValueError: a row has not as many labels as ids.
    """
    sequences = []
    if form in (PAIR, SINGLE):
        for name in form[1:]:
            for row in rows:
                prompt, completion = list(row["prompt_ids"]), list(row[name])
                sequences.append((prompt + completion, [-100] * len(prompt) + completion))
        return sequences
    for ids_name, labels_name in zip(form[::2], form[1::2], strict=True):
        for number, row in enumerate(rows):
            ids, labels = list(row[ids_name]), list(row[labels_name])
            if len(ids) != len(labels):
                raise ValueError(
                    f"rows[{number}][{labels_name!r}] must have {len(ids)} labels, as {ids_name}; got {len(labels)}"
                )
            sequences.append((ids, labels))
    return sequences
