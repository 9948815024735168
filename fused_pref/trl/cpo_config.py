"""Configuration of the CPO trainer: TRL's, and what the linear head adds."""

from dataclasses import dataclass, field

from fused_pref import validate
from fused_pref.trl.checkpointing import use_new_names
from fused_pref.trl.stock import StockCPOConfig


@dataclass
class CPOConfig(StockCPOConfig):
    """TRL's ``CPOConfig`` with two more fields; the trainer takes TRL's own as well.

    Args:
        exact_accumulation: normalise by the pairs and chosen tokens of all microbatches and ranks of an optimiser step,
            so that accumulation gives the gradient of one big batch; by default TRL's mean of microbatch means.
        memory_budget: bytes of workspace of the linear head; None: 1/16 of the GPU's memory, on a CPU 256 MiB or
            the bytes of the head's gradient, whichever is more; where that is too little, the least that is enough.

    Raises:
        ValueError, TypeError: a malformed value of these two; the trainer checks the others.
    """

    exact_accumulation: bool = field(
        default=False,
        metadata={"help": "Normalise over all microbatches and ranks of a step, as one big batch."},
    )
    memory_budget: int | None = field(
        default=None,
        metadata={"help": "Bytes of workspace of the linear head."},
    )

    def __post_init__(self) -> None:
        validate.flag("exact_accumulation", self.exact_accumulation)
        validate.at_least("memory_budget", self.memory_budget, 1, optional=True)
        use_new_names(self)
        super().__post_init__()
