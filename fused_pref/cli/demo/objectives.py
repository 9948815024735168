"""The objectives of the demo, the trainer of each, and the model that they train."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fused_pref.trl import BCOConfig, BCOTrainer, CPOConfig, CPOTrainer, DPOConfig, DPOTrainer

PAIRS_PER_STEP = 8
RELATIVE = "beta x (summed log-prob - that of the frozen copy)"


class Objective(NamedTuple):
    """How an objective is trained.

    Attributes:
        name: for the report.
        reward: what its reward is, for the report.
        relative: whether the reward counts from the log-prob before training.
        trainer: class of the trainer.
        config: class of the trainer's arguments.
        options: arguments of its own.
    """

    name: str
    reward: str
    relative: bool
    trainer: Callable[..., Any]
    config: Callable[..., Any]
    options: dict[str, Any]


OBJECTIVES = {
    "cpo": Objective(
        name="CPO",
        reward="beta x summed log-prob",
        relative=False,
        trainer=CPOTrainer,
        config=CPOConfig,
        options={"per_device_train_batch_size": PAIRS_PER_STEP},
    ),
    "dpo": Objective(
        name="DPO",
        reward=RELATIVE,
        relative=True,
        trainer=DPOTrainer,
        config=DPOConfig,
        options={"per_device_train_batch_size": PAIRS_PER_STEP},
    ),
    "bco": Objective(
        name="BCO",
        reward=RELATIVE,
        relative=True,
        trainer=BCOTrainer,
        config=BCOConfig,
        # Of each pair it makes two rows.
        options={"per_device_train_batch_size": 2 * PAIRS_PER_STEP, "delta_kind": "ema"},
    ),
}


def build(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """A small Llama with tied embeddings, the same for the same seed; the global random state is left as it is."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
