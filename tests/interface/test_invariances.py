"""What must not change a result: the order of tokens, pairs and sequences, padding, layout, constants, cuts."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cases import OBJECTIVES, PAIRS, UNPAIRED, Case, Problem, Result, build, cases, evaluate, examples
from hypothesis import assume, given
from hypothesis import strategies as st
from judge import at_a_kink, roundings, tolerance
from torch import Tensor

import fused_pref as fp

LOSSES = OBJECTIVES[:4]
EACH = ("chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards", "logps", "rewards", "result")
DTYPES = (torch.float64, torch.float32)
EITHER = st.booleans().flatmap(lambda linear: cases(linear=linear, largest=12, dtypes=DTYPES))
KERNELS = st.booleans().flatmap(
    lambda linear: cases(linear=linear, largest=5, dtypes=(torch.float32,), backend="triton")
)


@dataclass
class Sequences:
    """A batch as a list of sequences: rows (n, V) or (n, D) and labels (n,); ``each`` has entries of (S,)."""

    case: Case
    rows: list[Tensor]
    labels: list[Tensor]
    head: dict[str, Tensor]
    each: dict[str, Tensor]

    @classmethod
    def of(cls, case: Case, **options: Any) -> "Sequences":
        """Those of a case, whose layout does not matter; ``options`` replace its own."""
        assume(case.objective != "token_logps")
        options = {**case.options, "ignore_index": -100, **options}
        if case.linear:
            options["memory_budget"] = None
        else:
            del options["inplace_backward"]
        case = replace(case, packed=True, strides=("contiguous",) * 4, options=options, room=None)
        problem = build(case)
        source, *head = problem.parts
        names = ("desirable", "ref_logps") if case.objective in UNPAIRED else ("ref_logps",)
        each = dict(zip(names, problem.arguments, strict=False))
        each["factors"] = torch.randn(len(case.lengths), generator=torch.Generator().manual_seed(case.seed))
        if case.weighted:
            each["sample_weight"] = problem.keywords["sample_weight"]
        lengths = list(case.lengths)
        rows, labels = problem.parts[source].split(lengths), problem.labels.split(lengths)
        return cls(case, [*rows], [*labels], {name: problem.parts[name] for name in head}, each)

    def take(self, order: Tensor) -> "Sequences":
        """These sequences, in this order."""
        rows, labels = ([part[place] for place in order.tolist()] for part in (self.rows, self.labels))
        return replace(self, rows=rows, labels=labels, each={name: part[order] for name, part in self.each.items()})

    @property
    def source(self) -> str:
        """Name of what has rows."""
        return "hidden" if self.case.linear else "logits"

    def lengths(self, *, padded: bool = False, extra: int = 0) -> list[int]:
        """Positions of each sequence in a batch; those that are ``extra`` come last."""
        own = [len(part) for part in self.labels]
        return [(max(own) if padded else length) + extra for length in own]

    def problem(self, *, padded: bool = False, extra: int = 0, **options: Any) -> Problem:
        """As a padded or packed batch."""
        lengths = self.lengths(padded=padded, extra=extra)
        width = self.case.features if self.case.linear else self.case.vocabulary
        rows, labels = torch.full((sum(lengths), width), torch.nan), torch.full((sum(lengths),), -100)
        rows, labels = rows.to(self.case.dtype), labels.to(self.case.index_dtype)
        parts = zip(rows.split(lengths), labels.split(lengths), self.rows, self.labels, strict=True)
        for outer_row, outer_label, row, label in parts:
            outer_row[: len(row)], outer_label[: len(label)] = row, label
        keywords = {**self.case.options, **options}
        if padded:
            shape = len(lengths), lengths[0] if lengths else 0
            rows, labels = rows.view(*shape, width), labels.view(shape)
        else:
            keywords["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(labels.dtype)
        if "sample_weight" in self.each:
            keywords["sample_weight"] = self.each["sample_weight"]
        names = [name for name in ("desirable", "ref_logps") if name in self.each]
        arguments = tuple(self.each[name] for name in names)
        return Problem({self.source: rows, **self.head}, labels, arguments, keywords, self.case, self.each["factors"])

    def run(self, *, padded: bool = False, extra: int = 0, **options: Any) -> Result:
        """Values, and gradients without what is extra, which are 0."""
        result = evaluate(fp, self.problem(padded=padded, extra=extra, **options))
        if self.source in result.gradients:
            whole = result.gradients[self.source].flatten(0, -2)
            parts = [part.split([n, len(part) - n]) for part, n in self.split(whole, padded=padded, extra=extra)]
            assert not any(rest.any() for _, rest in parts)
            result.gradients[self.source] = torch.cat([whole[:0], *(own for own, _ in parts)])
        return result

    def split(self, rows: Tensor, **layout: Any) -> list[tuple[Tensor, int]]:
        """Rows of each sequence of a batch, and how many of them are not extra."""
        return [*zip(rows.split(self.lengths(**layout)), self.lengths(), strict=True)]


def same(sequences: Sequences, first: Result, second: Result) -> None:
    """Within twice the tolerance of either, and what roundings explain."""
    problem = sequences.problem()
    explained: dict[str, Tensor] = {}
    ones, others = first.all(), second.all()
    assert ones.keys() == others.keys()
    for name, one in ones.items():
        one, other = one.double(), others[name].double()
        value, gradient = tolerance(sequences.case)
        error = (one - other).norm()
        allowed = gradient * one.norm() if name.startswith("gradient") else value * one.norm().clamp(min=1)
        if not error <= allowed:
            explained = explained or roundings(problem, evaluate(fp.reference, problem.wide()))
            allowed = allowed + 2 * explained[name]
        assert error <= allowed, f"{name}: {error:.3g} of {one.norm():.3g}; {allowed:.3g} allowed"


def steady(sequences: Sequences) -> None:
    """No pair where rounding decides between the sides of the hinge."""
    if sequences.case.options.get("loss_type") == "hinge":
        assume(not at_a_kink(sequences.case, evaluate(fp.reference, sequences.problem().wide())))


def order_of(number: int, case: Case) -> Tensor:
    return torch.randperm(number, generator=torch.Generator().manual_seed(case.seed + 3))


@pytest.mark.slow
@examples()
@given(EITHER)
def test_order_of_tokens(case: Case) -> None:
    original = Sequences.of(case)
    steady(original)
    order = order_of(case.vocabulary, case)
    indices = order.argsort().to(case.index_dtype)
    labels = [label.where(label < 0, indices[label.clamp(min=0)]) for label in original.labels]
    head = {name: part[order] for name, part in original.head.items()}
    rows = original.rows if case.linear else [row[:, order] for row in original.rows]
    first, second = original.run(), replace(original, labels=labels, head=head, rows=rows).run()
    for name, gradient in first.gradients.items():
        if name != "hidden":
            first.gradients[name] = gradient[:, order] if name == "logits" else gradient[order]
    same(original, first, second)


@examples()
@given(EITHER)
def test_order_of_sequences(case: Case) -> None:
    batch = Sequences.of(case)
    steady(batch)
    number = len(batch.rows) // (2 if case.objective in PAIRS else 1)
    order = order_of(number, case)
    whole = torch.cat([order, order + number]) if case.objective in PAIRS else order
    first, second = batch.run(), batch.take(whole).run()
    for name in EACH:
        if name in first.values:
            first.values[name] = first.values[name][order]
    if batch.source in first.gradients:
        rows = first.gradients[batch.source]
        parts = rows.split(batch.lengths())
        first.gradients[batch.source] = torch.cat([rows[:0], *(parts[place] for place in whole.tolist())])
    same(batch, first, second)


@pytest.mark.slow
@examples()
@given(EITHER, st.integers(0, 5), st.sampled_from(["completion", None]))
def test_padding_and_packing(case: Case, extra: int, means: str | None) -> None:
    padding_and_packing(case, extra, means)


@pytest.mark.slow
@examples(1 / 6)
@given(KERNELS, st.integers(0, 5), st.sampled_from(["completion", None]))
def test_padding_and_packing_of_kernels(case: Case, extra: int, means: str | None) -> None:
    padding_and_packing(case, extra, means)


def padding_and_packing(case: Case, extra: int, means: str | None) -> None:
    """Packed, packed with positions that score nothing, padded, and padded further."""
    batch = Sequences.of(case, logits_mean=means)
    steady(batch)
    first = batch.run()
    same(batch, first, batch.run(extra=extra))
    same(batch, first, batch.run(padded=True, extra=extra))


@examples()
@given(EITHER)
def test_constants_on_the_logits_of_a_row(case: Case) -> None:
    if case.linear:
        case = replace(case, bias=True)
    batch = Sequences.of(case, logits_mean=None, softcap=None)
    steady(batch)
    generator = torch.Generator().manual_seed(case.seed)
    if case.linear:
        other = replace(batch, head={**batch.head, "bias": batch.head["bias"] - 40})
    else:
        # Multiples of 2⁻¹⁰, to which whole numbers are added exactly.
        batch.rows = [(row * 1024).round() / 1024 for row in batch.rows]
        added = [torch.randint(-50, 50, (len(row), 1), generator=generator).to(row.dtype) for row in batch.rows]
        other = replace(batch, rows=[row + more for row, more in zip(batch.rows, added, strict=True)])
    same(other, batch.run(), other.run())


@examples()
@given(EITHER, st.floats(-1e3, 1e3, width=32))
def test_upstream_gradient(case: Case, factor: float) -> None:
    batch = Sequences.of(replace(case, upstream=1.0))
    first = batch.run()
    second = replace(batch, case=replace(batch.case, upstream=factor)).run()
    for name, gradient in first.gradients.items():
        expected = factor * gradient.double()
        error = (second.gradients[name].double() - expected).norm()
        roundoff = 2.0**-23 if case.dtype == torch.float32 else 2.0**-50
        allowed = 4 * roundoff * expected.norm() + 1e-42
        if not error <= allowed:
            # The coefficients of tokens whose parts cancel are scaled, and rounded, before they are added.
            problem = batch.problem()
            explained = roundings(problem, evaluate(fp.reference, problem.wide()))
            allowed += abs(factor) * explained[f"gradient of {name}"]
        assert error <= allowed, name


@examples()
@given(EITHER, st.integers(2, 4))
def test_microbatches(case: Case, number: int) -> None:
    """With the normalizers of the whole batch their losses and gradients add up to its own."""
    assume(case.objective in LOSSES)
    nothing = dict.fromkeys(("pair_normalizer", "token_normalizer", "sequence_normalizer", "class_normalizer"))
    own = {name: value for name, value in nothing.items() if name in case.options}
    batch = Sequences.of(replace(case, shift=None, tensors=()), logits_mean=None, **own)
    steady(batch)
    pairs = case.objective in PAIRS
    units = len(batch.rows) // (2 if pairs else 1)
    assume(units > 0)
    if pairs:
        shift = batch.case.options["shift"]
        chosen = sum(int((label[1:] if shift else label).ne(-100).sum()) for label in batch.labels[:units])
        whole: dict[str, Any] = {"pair_normalizer": units, "token_normalizer": chosen}
    elif batch.case.options.get("reduction", "mean") == "mean":
        whole = {"sequence_normalizer": units}
    else:
        desirable = batch.each["desirable"]
        whole = {"class_normalizer": (int(desirable.sum()), int((~desirable).sum()))}
    first, total = batch.run(), Result({"loss": torch.zeros((), dtype=case.dtype)}, {})
    rows: dict[int, Tensor] = {}
    for members in torch.arange(units).chunk(number):
        order = torch.cat([members, members + units]) if pairs else members
        part = batch.take(order)
        result = part.run(**whole)
        total.values["loss"] += result.values["loss"]
        for name, gradient in result.gradients.items():
            if name == batch.source:
                rows |= dict(zip(order.tolist(), gradient.split(part.lengths()), strict=True))
            else:
                total.gradients[name] = total.gradients.get(name, 0) + gradient
    if rows:
        total.gradients[batch.source] = torch.cat([rows[place] for place in range(len(batch.rows))])
    same(batch, Result({"loss": first.values["loss"]}, first.gradients), total)
