"""Options that the configurations here have beside TRL's: of the linear head, the reference and the reward shift."""

import os
from dataclasses import dataclass, field
from typing import Any

from fused_pref import validate
from fused_pref.losses.reward_shift import KINDS, UPDATES, RewardShift
from fused_pref.trl.checkpointing import use_new_names


@dataclass
class HeadOptions:
    """Comes before a configuration of TRL's in the order of classes.

    Args:
        exact_accumulation: normalise over all microbatches and ranks of an optimiser step.
        memory_budget: bytes of workspace of the linear head.
        padding_free: give the model a batch as one row without padding.
        padding_free_tokens: put it into rows of at most so many tokens instead.

    Raises:
        ValueError, TypeError: a malformed value.
    """

    exact_accumulation: bool = field(
        default=False,
        metadata={"help": "Normalise over all microbatches and ranks of a step, as one big batch."},
    )
    memory_budget: int | None = field(
        default=None,
        metadata={"help": "Bytes of workspace of the linear head."},
    )
    padding_free: bool = field(
        default=False,
        metadata={"help": "Give the model a batch as one row without padding, sequences kept apart by position."},
    )
    padding_free_tokens: int | None = field(
        default=None,
        metadata={"help": "With padding_free, the most tokens of a row; longer sequences make longer rows."},
    )

    def __post_init__(self) -> None:
        validate.flag("exact_accumulation", self.exact_accumulation)
        validate.at_least("memory_budget", self.memory_budget, 1, optional=True)
        validate.flag("padding_free", self.padding_free)
        validate.at_least("padding_free_tokens", self.padding_free_tokens, 1, optional=True)
        if self.padding_free_tokens is not None and not self.padding_free:
            raise ValueError(f"padding_free_tokens needs padding_free=True; got {self.padding_free_tokens}")
        use_new_names(self)
        configuration: Any = super()
        configuration.__post_init__()


@dataclass
class ReferenceOptions:
    """Log-probs of the reference on the training data from a file of ``fused-pref ref-logps``.

    Comes before a configuration of TRL's in the order of classes.

    Args:
        ref_logps_file: the file; with it ``precompute_ref_log_probs`` is set, too.
        ref_logps_any_model: whether a file of another model than the trainer's own reference is taken.

    Raises:
        ValueError, TypeError: a malformed value, or ``sync_ref_model`` beside the file.
    """

    ref_logps_file: str | None = field(
        default=None,
        metadata={"help": "File of `fused-pref ref-logps` with the reference's log-probs of the training data."},
    )
    ref_logps_any_model: bool = field(
        default=False,
        metadata={"help": "Whether ref_logps_file may be of another model than the trainer's own reference."},
    )

    def __post_init__(self) -> None:
        validate.flag("ref_logps_any_model", self.ref_logps_any_model)
        if self.ref_logps_file is not None:
            if not isinstance(self.ref_logps_file, str | os.PathLike):
                raise validate.fail("ref_logps_file", "the name of a file, or None", self.ref_logps_file, TypeError)
            self.ref_logps_file = os.fspath(self.ref_logps_file)
            if getattr(self, "sync_ref_model", False):
                raise ValueError("ref_logps_file needs a reference that stays as it is; got sync_ref_model=True")
            self.precompute_ref_log_probs = True
        elif self.ref_logps_any_model:
            raise ValueError("ref_logps_any_model needs ref_logps_file; got None")
        configuration: Any = super()
        configuration.__post_init__()


@dataclass
class ShiftOptions:
    """How the reward shift δ is estimated; see :class:`fused_pref.RewardShift`.

    Raises:
        ValueError, TypeError: a malformed value.
    """

    delta_kind: str = field(
        default="fixed",
        metadata={"help": "How the reward shift is estimated.", "choices": list(KINDS)},
    )
    delta_decay: float = field(default=0.9, metadata={"help": "Decay of the moving averages of delta_kind='ema'."})
    delta_value: float = field(default=0.0, metadata={"help": "The reward shift of delta_kind='fixed'."})
    delta_update: str = field(
        default="step",
        metadata={
            "help": "When the reward shift moves: once per optimiser step, or with every microbatch (TRL 1.13).",
            "choices": list(UPDATES),
        },
    )

    def __post_init__(self) -> None:
        validate.choice("delta_kind", self.delta_kind, KINDS)
        validate.within("delta_decay", self.delta_decay, 0.0, 1.0)
        validate.finite("delta_value", self.delta_value)
        validate.choice("delta_update", self.delta_update, UPDATES)
        configuration: Any = super()
        configuration.__post_init__()

    def shift(self) -> RewardShift:
        """The reward shift that these arguments describe."""
        return RewardShift(
            self.delta_kind,  # type: ignore[arg-type]
            decay=self.delta_decay,
            value=self.delta_value,
            update=self.delta_update,  # type: ignore[arg-type]
        )
