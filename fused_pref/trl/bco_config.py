"""Configuration of the BCO trainer."""

from dataclasses import dataclass, field

from trl.trainer.kto_config import KTOConfig

from fused_pref import validate
from fused_pref.losses.reward_shift import KINDS
from fused_pref.modules import LinearBCOLoss
from fused_pref.trl.options import HeadOptions, ReferenceOptions, ShiftOptions

# The loss of TRL's trainer whose data pipeline BCO shares: it asks for no KL completions.
PIPELINE = "apo_zero_unpaired"
STRATEGIES = ("random", "sequential")


@dataclass
class BCOConfig(ShiftOptions, ReferenceOptions, HeadOptions, KTOConfig):
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
        padding_free: give the model a batch as one row of its tokens, without padding, where its attention keeps
            sequences apart by their positions, which is tried before training.
        padding_free_tokens: with ``padding_free``, the most tokens of a row: sequences are put into rows wherever they
            fit, and a longer one makes all rows as long as it is. Attention other than flash-attention takes memory and
            time by the square of a row. None: one row.
        ref_logps_file: the reference's log-probs of the training data, from ``fused-pref ref-logps``; no reference is
            made or run for them. Those of evaluation data are computed before training, as with TRL's
            ``precompute_ref_log_probs``, which is set.
        ref_logps_any_model: take a file of another model than the one that is trained, or ``ref_model``.

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
    prompt_sample_size: int = field(
        default=1024, metadata={"help": "Prompts of each class that the density ratio is fitted on."}
    )
    min_density_ratio: float = field(default=0.5, metadata={"help": "Lower clamp of the density ratio."})
    max_density_ratio: float = field(default=10.0, metadata={"help": "Upper clamp of the density ratio."})

    def __post_init__(self) -> None:
        if self.loss_type != PIPELINE:
            raise ValueError(f"loss_type must stay {PIPELINE!r}: BCO is the loss; got {self.loss_type!r}")
        validate.choice("train_sampling_strategy", self.train_sampling_strategy, STRATEGIES)
        least = validate.positive("min_density_ratio", self.min_density_ratio)
        if validate.positive("max_density_ratio", self.max_density_ratio) < least:
            raise validate.fail("max_density_ratio", f">= min_density_ratio = {least}", self.max_density_ratio)
        # Constructed for what it refuses.
        LinearBCOLoss(beta=self.beta, memory_budget=self.memory_budget)
        validate.at_least("prompt_sample_size", self.prompt_sample_size, 1)
        for name in ("desirable_weight", "undesirable_weight"):
            if validate.finite(name, getattr(self, name)) < 0:
                raise validate.fail(name, "a finite number >= 0", getattr(self, name))
        super().__post_init__()
