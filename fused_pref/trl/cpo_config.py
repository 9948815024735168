"""Configuration of the CPO trainer: TRL's, and what the linear head adds."""

from dataclasses import dataclass

from fused_pref.trl.options import HeadOptions
from fused_pref.trl.stock import StockCPOConfig


@dataclass
class CPOConfig(HeadOptions, StockCPOConfig):
    """TRL's ``CPOConfig`` with three more fields; the trainer takes TRL's own as well.

    Args:
        exact_accumulation: normalise by the pairs and chosen tokens of all microbatches and ranks of an optimiser step,
            so that accumulation gives the gradient of one big batch; by default TRL's mean of microbatch means.
        memory_budget: bytes of workspace of the linear head; None: 1/16 of the GPU's memory, on a CPU 256 MiB or
            the bytes of the head's gradient, whichever is more; where that is too little, the least that is enough.
        padding_free: give the model a batch as one row of its tokens, without padding, where its attention keeps
            sequences apart by their positions, which is tried before training.
        padding_free_tokens: with ``padding_free``, the most tokens of a row: sequences are put into rows wherever they
            fit, and a longer one makes all rows as long as it is. Attention other than flash-attention takes memory and
            time by the square of a row. None: one row.

    Raises:
        ValueError, TypeError: a malformed value of these three; the trainer checks the others.
    """
