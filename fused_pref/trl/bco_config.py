"""Configuration of the BCO trainer."""

from dataclasses import dataclass, field

from trl.trainer.kto_config import KTOConfig

from fused_pref import validate
from fused_pref.losses.reward_shift import KINDS, UPDATES, RewardShift
from fused_pref.modules import LinearBCOLoss
from fused_pref.trl.checkpointing import use_new_names

# The loss of TRL's trainer whose data pipeline BCO shares: it asks for no KL completions.
PIPELINE = "apo_zero_unpaired"
STRATEGIES = ("random", "sequential")


@dataclass
class BCOConfig(KTOConfig):
    """Arguments of :class:`fused_pref.trl.BCOTrainer`: TRL's ``KTOConfig``, with BCO's own.

    Different defaults: ``learning_rate`` 5e-7 and ``train_sampling_strategy`` "random". ``desirable_weight`` and
    ``undesirable_weight`` multiply the losses of a class.

    Args:
        delta_kind: how the reward shift δ is estimated, see :class:`fused_pref.RewardShift`: "running_mean", "ema" or
            "fixed".
        delta_decay: of "ema".
        delta_value: of "fixed".
        delta_update: "step": δ moves once per optimiser step, over all microbatches and ranks; "forward": with every
            microbatch, which then uses it, as TRL 1.13.
        prompt_sample_size: prompts of each class that the density ratio is fitted on.
        min_density_ratio, max_density_ratio: its clamps.
        exact_accumulation: normalise by the sequences of all microbatches and ranks of an optimiser step, as one big
            batch; by default the mean of microbatch means.
        memory_budget: bytes of workspace of the linear head; None: 1/16 of the GPU's memory, on a CPU 256 MiB or
            the bytes of the head's gradient, whichever is more; where that is too little, the least that is enough.

    Raises:
        ValueError, TypeError: a malformed value, or another ``loss_type`` than the pipeline's own.
    """

    learning_rate: float = field(default=5e-7, metadata={"help": "The initial learning rate for AdamW."})
    train_sampling_strategy: str = field(
        default="random",
        metadata={"help": "Sampler of the training rows.", "choices": list(STRATEGIES)},
    )
    loss_type: str = field(default=PIPELINE, metadata={"help": "The data pipeline; leave it.", "choices": [PIPELINE]})
    delta_kind: str = field(
        default="running_mean",
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
    prompt_sample_size: int = field(
        default=1024, metadata={"help": "Prompts of each class that the density ratio is fitted on."}
    )
    min_density_ratio: float = field(default=0.5, metadata={"help": "Lower clamp of the density ratio."})
    max_density_ratio: float = field(default=10.0, metadata={"help": "Upper clamp of the density ratio."})
    exact_accumulation: bool = field(
        default=False, metadata={"help": "Normalise over all microbatches and ranks of a step, as one big batch."}
    )
    memory_budget: int | None = field(default=None, metadata={"help": "Bytes of workspace of the linear head."})

    def __post_init__(self) -> None:
        if self.loss_type != PIPELINE:
            raise ValueError(f"loss_type must stay {PIPELINE!r}: BCO is the loss; got {self.loss_type!r}")
        validate.choice("train_sampling_strategy", self.train_sampling_strategy, STRATEGIES)
        validate.choice("delta_kind", self.delta_kind, KINDS)
        validate.within("delta_decay", self.delta_decay, 0.0, 1.0)
        validate.finite("delta_value", self.delta_value)
        validate.choice("delta_update", self.delta_update, UPDATES)
        least = validate.positive("min_density_ratio", self.min_density_ratio)
        if validate.positive("max_density_ratio", self.max_density_ratio) < least:
            raise validate.fail("max_density_ratio", f">= min_density_ratio = {least}", self.max_density_ratio)
        # Constructed for what it refuses.
        LinearBCOLoss(beta=self.beta, memory_budget=self.memory_budget)
        validate.at_least("prompt_sample_size", self.prompt_sample_size, 1)
        validate.flag("exact_accumulation", self.exact_accumulation)
        for name in ("desirable_weight", "undesirable_weight"):
            if validate.finite(name, getattr(self, name)) < 0:
                raise validate.fail(name, "a finite number >= 0", getattr(self, name))
        use_new_names(self)
        super().__post_init__()

    def shift(self) -> RewardShift:
        """The reward shift that these arguments describe."""
        return RewardShift(
            self.delta_kind,  # type: ignore[arg-type]
            decay=self.delta_decay,
            value=self.delta_value,
            update=self.delta_update,  # type: ignore[arg-type]
        )
