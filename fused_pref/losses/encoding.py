"""Objectives and other constants as text, as a custom op takes them, by means that a compiler can see through."""

import ast
from collections.abc import Iterable
from dataclasses import astuple
from typing import Any

from torch import Tensor

from fused_pref.losses.pair import PairObjective
from fused_pref.losses.unpaired import BCOObjective
from fused_pref.ops.interface import BCOSpec, PairSpec

Objective = PairObjective | BCOObjective


def to_text(values: Iterable[Any]) -> str:
    """Numbers, names and None as text, as a custom op takes them, by means that a compiler can see through."""
    return ";".join([f"{value!r}" for value in values])


def from_text(text: str) -> list[Any]:
    """The values of :func:`to_text`."""
    return [ast.literal_eval(part) for part in text.split(";")]


def encode(objective: Objective) -> tuple[str, list[Tensor]]:
    """An objective as text and tensors, as a custom op takes it.

    δ is that of now. In place of a tensor the text has its number in the list, as ``"#0"``.
    """
    tensors: list[Tensor] = []
    if isinstance(objective, PairObjective):
        kind, numbers = "pair", astuple(objective.spec)
        own = (objective.ref_logps, objective.pair_normalizer, objective.token_normalizer)
    else:
        kind, numbers = "bco", astuple(objective.spec)
        classes = objective.normalizers["class_normalizer"] or (None, None)
        own = (objective.desirable, objective.ref_logps, objective.current_delta, objective.sample_weight)
        own = (*own, objective.normalizers["sequence_normalizer"], *classes)
    values: list[Any] = []
    for value in (*own, *numbers):
        if isinstance(value, Tensor):
            values.append(f"#{len(tensors)}")
            tensors.append(value)
        else:
            values.append(value)
    return to_text((kind, *values)), tensors


def decode(text: str, tensors: list[Tensor]) -> Objective:
    """The objective of :func:`encode`."""
    values: list[Any]
    kind, *values = from_text(text)
    values = [tensors[int(v[1:])] if isinstance(v, str) and v.startswith("#") else v for v in values]
    if kind == "pair":
        own, numbers = values[:3], values[3:]
        return PairObjective(PairSpec(*numbers), *own)
    desirable, ref_logps, delta, sample_weight, sequence_normalizer, positive, negative, *numbers = values
    classes = None if positive is None else (positive, negative)
    normalizers = {"sequence_normalizer": sequence_normalizer, "class_normalizer": classes}
    return BCOObjective(BCOSpec(*numbers), desirable, ref_logps, delta, sample_weight, normalizers)
