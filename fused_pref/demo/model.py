"""The model of the demo: a small Llama with a large vocabulary, randomly initialised."""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fused_pref.demo.batches import MAX_COMPLETION, MAX_PROMPT, Batch


def build(vocabulary: int, seed: int, device: torch.device) -> LlamaForCausalLM:
    """A Llama with tied embeddings, the same for the same seed; the global random state is left as it is."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_PROMPT + MAX_COMPLETION,
        tie_word_embeddings=True,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model.to(device)  # type: ignore[arg-type]


def hidden_states(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Last hidden states of the scored positions, (N, D)."""
    return model.model(batch.input_ids, use_cache=False).last_hidden_state[batch.scored]
