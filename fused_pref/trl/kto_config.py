"""Configuration of the KTO trainer: TRL's, and what the linear head adds."""

from dataclasses import dataclass

from trl.trainer.kto_config import KTOConfig as StockKTOConfig

from fused_pref.trl.options import HeadOptions, ReferenceOptions


@dataclass
class KTOConfig(ReferenceOptions, HeadOptions, StockKTOConfig):
    """TRL's ``KTOConfig`` with a few more fields; the trainer takes TRL's own as well.

    Args:
        exact_accumulation: take all microbatches and ranks of an optimiser step as one big batch: its sequences
            normalise the loss, KL completions are exchanged among its rows, and the KL term is the mean over all of
            them; by default TRL's means of microbatches and ranks.
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
        ValueError, TypeError: a malformed value of these; the trainer checks the others.
    """
