"""Rows without padding: where sequences lie, the collator, and the losses that come out of its batches."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from trl_models import llama

import fused_pref as fp
from fused_pref.models import PackingCollator, Preference, attach, preference_forward
from fused_pref.models.packing import lay_out

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")
LENGTHS = [(2, 5, 3), (4, 1, 9), (3, 3, 0), (1, 7, 7)]
ROW_TOKENS = (None, 1, 14, 30, 1000)


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, 66, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def pairs() -> list[dict[str, Any]]:
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {name: ids(count, 10 * row + column) for column, (name, count) in enumerate(zip(names, counts, strict=True))}
        for row, counts in enumerate(LENGTHS)
    ]


def singles() -> list[dict[str, Any]]:
    rows = [{"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"]} for row in pairs()]
    return [{**row, "label": number % 2 == 0, "ref_logps": -2.0 * number} for number, row in enumerate(rows)]


def padded(sequences: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """A batch of prompts and completions."""
    width = max(len(prompt) + len(completion) for prompt, completion in sequences)
    rows = {"input_ids": [], "labels": [], "attention_mask": []}
    for prompt, completion in sequences:
        rest = width - len(prompt) - len(completion)
        rows["input_ids"].append(prompt + completion + [0] * rest)
        rows["labels"].append([-100] * len(prompt) + completion + [-100] * rest)
        rows["attention_mask"].append([1] * (width - rest) + [0] * rest)
    return {name: torch.tensor(row) for name, row in rows.items()}


def padded_pairs() -> dict[str, Tensor]:
    return padded([(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in pairs()])


def gradients(model: Any, batch: dict[str, Any], loss: Any) -> tuple[Any, list[Tensor]]:
    output = preference_forward(model, batch, loss)
    output.loss.backward()
    return output, [parameter.grad for parameter in model.parameters()]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any), st.none() | st.integers(1, 30))
def test_every_token_has_a_place_of_its_own(lengths: list[int], row_tokens: int | None) -> None:
    layout, total = lay_out(lengths, row_tokens), sum(lengths)
    assert layout.tokens.shape == layout.positions.shape
    assert torch.equal(layout.tokens.flatten()[layout.token_index], torch.arange(total))
    assert torch.equal(layout.positions.flatten()[layout.token_index], torch.cat([torch.arange(n) for n in lengths]))
    rest = torch.ones(layout.tokens.numel(), dtype=torch.bool)
    rest[layout.token_index] = False
    assert (layout.positions.flatten()[rest] == 0).all()
    # The tokens of a sequence lie side by side, in one row.
    for places in layout.token_index.split(lengths):
        assert (places.diff() == 1).all()
        assert len({place // layout.tokens.shape[1] for place in places.tolist()}) <= 1
    assert layout.boundaries[-1] == layout.tokens.numel()
    starts = layout.boundaries[:-1][layout.boundaries.diff() > 0].tolist()
    assert starts == (layout.positions.flatten() == 0).nonzero().flatten().tolist()
    if row_tokens is None:
        assert layout.tokens.shape == (1, total)
        assert torch.equal(layout.token_index, torch.arange(total))
    else:
        assert layout.tokens.shape[1] <= max(row_tokens, *lengths)


def test_rows_are_few() -> None:
    assert lay_out([4, 3, 2, 1, 2, 4], 8).tokens.shape == (2, 8)
    assert lay_out([9, 3, 2, 1, 2, 4], 8).tokens.shape == (3, 9)


@pytest.mark.parametrize("row_tokens", ROW_TOKENS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_pairs(row_tokens: int | None, attention: str) -> None:
    loss, packed = fp.LinearCPOLoss(), PackingCollator(row_tokens)(pairs())
    want, want_gradients = gradients(llama(attn_implementation=attention), padded_pairs(), loss)
    got, got_gradients = gradients(llama(attn_implementation=attention), packed, loss)
    assert packed["input_ids"].shape[0] == {None: 1, 1: 5, 14: 5, 30: 2, 1000: 1}[row_tokens]
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.chosen_logps, want.chosen_logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.rejected_logps, want.rejected_logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_gradients, want_gradients, rtol=1e-4, atol=1e-6)


def test_singles_and_their_numbers() -> None:
    loss, packed = fp.LinearBCOLoss(delta=0.3), PackingCollator(14)(singles())
    batch = padded([(row["prompt_ids"], row["completion_ids"]) for row in singles()])
    batch |= {"desirable": torch.tensor([True, False] * 2), "ref_logps": torch.tensor([0.0, -2.0, -4.0, -6.0])}
    want, want_gradients = gradients(llama(), batch, loss)
    got, got_gradients = gradients(llama(), packed, loss)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.rewards, want.rewards, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_gradients, want_gradients, rtol=1e-4, atol=1e-6)


def test_columns() -> None:
    """Numbers of both sides, those of an objective of one's own, and what is left out."""
    rows = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0, "margin": 0.5, "id": 7} for row in pairs()]
    batch = PackingCollator(columns=["margin"])(rows)
    assert batch["ref_logps"].tolist() == [-1.0] * 4 + [-2.0] * 4
    assert batch["margin"].tolist() == [0.5] * 4
    assert "id" not in batch

    def loss(chosen: fp.Sequences, rejected: fp.Sequences, margin: Tensor) -> Tensor:
        return (chosen.logps - chosen.ref_logps - rejected.logps + rejected.ref_logps - margin).square()

    output = preference_forward(llama(), batch, fp.LinearPreferenceLoss(loss, unit=2))
    assert output.losses.shape == (4,)


def test_labelled_rows_are_the_same() -> None:
    """In the forms of TRL's CPO and of single sequences."""
    rows = []
    for row in pairs():
        prompt = row["prompt_ids"]
        sides = {side: row[f"{side}_ids"] for side in ("chosen", "rejected")}
        labelled = {f"{side}_input_ids": prompt + own for side, own in sides.items()}
        rows.append(labelled | {f"{side}_labels": [-100] * len(prompt) + own for side, own in sides.items()})
    for name, value in PackingCollator(14)(pairs()).items():
        torch.testing.assert_close(PackingCollator(14)(rows)[name], value)
    alone = [{"input_ids": row["chosen_input_ids"], "labels": row["chosen_labels"]} for row in rows]
    for name, value in PackingCollator(14)(alone).items():
        torch.testing.assert_close(value, PackingCollator(14)([{**row, "label": True} for row in singles()])[name])


def test_own_loops() -> None:
    """Without ``preference_forward``: the places of tokens, and the losses as they are."""
    model, batch = llama(), PackingCollator(14)(pairs())
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    # With a cache, transformers does not look at the positions.
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    hidden = hidden.flatten(0, 1)[batch["token_index"]]
    loss = fp.linear_cpo_loss(hidden, model.lm_head.weight, batch["labels"], cu_seqlens=batch["cu_seqlens"]).loss
    torch.testing.assert_close(loss, preference_forward(model, batch, fp.LinearCPOLoss()).loss)


@pytest.fixture
def flash() -> Iterator[list[dict[str, Any]]]:
    """An attention in the place of flash-attention, told of sequences by its own arguments only; what it was given."""
    calls: list[dict[str, Any]] = []

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        calls.append(kwargs)
        sizes = kwargs["cu_seq_lens_q"].diff().tolist()
        assert max(sizes) == kwargs["max_length_q"] == kwargs["max_length_k"]
        assert torch.equal(kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"])
        groups = q.shape[1] // k.shape[1]
        # (heads, R·L, features)
        q, k, v = (
            x.transpose(0, 1).flatten(1, 2) for x in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
        )
        parts = [
            F.scaled_dot_product_attention(*part, is_causal=True)
            for part in zip(*(x.split(sizes, 1) for x in (q, k, v)), strict=True)
        ]
        return torch.cat(parts, 1).transpose(0, 1).view(*kwargs["shape"], q.shape[0], q.shape[2]), None

    def shaped(module: Any, q: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return attention(module, q, *args, **kwargs, shape=(q.shape[0], q.shape[2]))

    AttentionInterface.register("flash_test", shaped)
    AttentionMaskInterface.register("flash_test", lambda *args, **kwargs: None)
    yield calls
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop("flash_test")


def flash_llama() -> Any:
    """Named after it was made: transformers would load a library of the name."""
    model = llama()
    model.config._attn_implementation = "flash_test"
    return model


@pytest.mark.parametrize("row_tokens", [None, 14])
def test_flash_attention_is_told_the_sequences(row_tokens: int | None, flash: list[dict[str, Any]]) -> None:
    want, want_gradients = gradients(llama(), padded_pairs(), fp.LinearCPOLoss())
    model, packed = flash_llama(), PackingCollator(row_tokens)(pairs())
    got, got_gradients = gradients(model, packed, fp.LinearCPOLoss())
    assert flash
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got_gradients, want_gradients, rtol=1e-4, atol=1e-6)
    if row_tokens is not None:
        bare = {name: value for name, value in packed.items() if not name.startswith("max_length")}
        with pytest.raises(ValueError, match=r"batch must have cu_seq_lens_q, .*, which flash-attention needs"):
            preference_forward(model, bare, fp.LinearCPOLoss())


@pytest.mark.parametrize("row_tokens", [None, 14])
def test_padded_batches_for_flash_attention(row_tokens: int | None, flash: list[dict[str, Any]]) -> None:
    """As trainers give them, which pack a batch that a collator of TRL's has padded."""
    want, model, batch = preference_forward(llama(), padded_pairs(), fp.LinearCPOLoss()), flash_llama(), padded_pairs()
    attach(model)
    preference = Preference(fp.LinearCPOLoss(), (batch.pop("labels"),), {}, padding_free=True, row_tokens=row_tokens)
    output, _ = preference.run(model, batch)
    assert len(flash) > 2
    torch.testing.assert_close(output.loss, want.loss, rtol=1e-5, atol=1e-6)


def test_models_that_mix_rows_are_refused(flash: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that keeps the sequences of one row apart, but not those of several."""
    kept = AttentionInterface._global_mapping["flash_test"]

    def of_one_row(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if len(q) > 1:
            whole = torch.arange(0, q.shape[0] * q.shape[2] + 1, q.shape[2], dtype=torch.int32)
            kwargs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), whole)
            kwargs |= dict.fromkeys(("max_length_q", "max_length_k"), q.shape[2])
        return kept(module, q, k, v, mask, **kwargs)

    AttentionInterface.register("flash_test", of_one_row)
    model = flash_llama()
    assert preference_forward(model, PackingCollator()(pairs()), fp.LinearCPOLoss()).loss.isfinite()
    with pytest.raises(ValueError, match=r"keeps packed sequences apart: .* see those before it"):
        preference_forward(model, PackingCollator(14)(pairs()), fp.LinearCPOLoss())


ROWS: list[tuple[Any, str]] = [
    ([], r"rows must all have the columns prompt_ids, chosen_ids, rejected_ids; or .*; got \[\]"),
    ([{"chosen": "a"}], "rows must all have the columns .*; got chosen in the first"),
    ([3], r"rows must all have the columns .*; got \[3\]"),
    ([pairs()[0], {"prompt_ids": [1]}], "rows must all have the columns"),
    ([{"input_ids": [3, 4], "labels": [4]}], r"rows\[0\]\['labels'\] must have 2 labels, as input_ids; got 1"),
    ([{"input_ids": [], "labels": []}], "rows must have a token; got empty sequences"),
    ([{**singles()[0], "ref_logps": None}], r"rows must have a number under ref_logps, .*; got \[None\]"),
]


@pytest.mark.parametrize(("rows", "match"), ROWS)
def test_malformed_rows(rows: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PackingCollator()(rows)


def test_malformed_collators() -> None:
    with pytest.raises(ValueError, match="row_tokens must be an integer >= 1, or None; got 0"):
        PackingCollator(0)
    with pytest.raises(TypeError, match="columns must be a sequence of names; got 'margin'"):
        PackingCollator(columns="margin")
    with pytest.raises(ValueError, match="rows must have a number under margin, or as many numbers in each"):
        PackingCollator(columns=["margin"])(pairs())


BATCHES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"token_index": [0]}, TypeError, r"token_index must be an int64 tensor \(N_total,\); got \[0\]"),
    ({"token_index": torch.arange(5)}, ValueError, r"token_index must be an int64 tensor \(N_total = 55,\); got"),
    ({"token_index": torch.arange(55) + 16}, ValueError, "token_index must be places among the R·L = 70; got"),
    ({"token_index": torch.arange(55)}, ValueError, r"position_ids\[token_index\] must rise from 0 in each sequence"),
    ({"position_ids": None}, ValueError, r"position_ids must be a tensor \(R, L\) with token_index; got None"),
    ({"input_ids": torch.zeros(1, 70, dtype=torch.int64)}, ValueError, r"input_ids must be \(5, 14, ...\) as position"),
    ({"attention_mask": torch.zeros(5, 14)}, ValueError, "attention_mask must be left out with cu_seqlens"),
    ({"cu_seqlens": None}, ValueError, "token_index needs cu_seqlens"),
]


@pytest.mark.parametrize(("changes", "error", "match"), BATCHES)
def test_malformed_batches(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        preference_forward(llama(), {**PackingCollator(14)(pairs()), **changes}, fp.LinearCPOLoss())
