"""Configuration of the DPO trainer: TRL's, what the linear head adds, and the reward shift of ``bco_pair``."""

from dataclasses import dataclass

from trl.trainer.dpo_config import DPOConfig as StockDPOConfig

from fused_pref.trl.options import HeadOptions, ReferenceOptions, ShiftOptions


@dataclass
class DPOConfig(ShiftOptions, ReferenceOptions, HeadOptions, StockDPOConfig):
    """TRL's ``DPOConfig`` with a few more fields; the trainer takes TRL's own as well.

    Args:
        delta_kind: how the reward shift δ of ``bco_pair`` is estimated, see :class:`fused_pref.RewardShift`:
            "fixed", by default at TRL's 0, "running_mean" or "ema".
        delta_decay: of "ema".
        delta_value: of "fixed".
        delta_update: "step": δ moves once per optimiser step, over all microbatches and ranks; "forward": with every
            microbatch, which then uses it.
        exact_accumulation: normalise by the pairs and chosen tokens of all microbatches and ranks of an optimiser step,
            so that accumulation gives the gradient of one big batch; by default TRL's mean of microbatch means.
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
        ValueError, TypeError: a malformed value of these, or a δ without ``bco_pair``; TRL and the trainer check the
            others.
    """

    @property
    def delta_moves(self) -> bool:
        """Whether training moves δ."""
        return self.delta_kind != "fixed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if "bco_pair" not in self.loss_type and (self.delta_moves or self.delta_value != 0):
            given = f"delta_kind={self.delta_kind!r}, delta_value={self.delta_value!r}"
            raise ValueError(f"a reward shift needs loss_type='bco_pair'; got {given} with {self.loss_type}")
