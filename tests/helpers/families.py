"""A small model of each family, a batch for it, and its loss computed from its own logits."""

import copy
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import BartConfig, GPT2Config, LlamaConfig, T5Config
from trl_models import SPECIAL_IDS, mixtral, sizes, t5

import fused_pref as fp

V = 66
BART_SIZES = {
    "vocab_size": V,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    **SPECIAL_IDS,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
# class, configuration, softcap, logit_scale
FAMILIES = {
    "llama": ("LlamaForCausalLM", LlamaConfig(**sizes()), None, 1.0),
    "tied": ("LlamaForCausalLM", LlamaConfig(**sizes(tie_word_embeddings=True)), None, 1.0),
    "qwen": ("Qwen3ForCausalLM", transformers.Qwen3Config(**sizes(head_dim=8)), None, 1.0),
    "gemma2": (
        "Gemma2ForCausalLM",
        transformers.Gemma2Config(**sizes(head_dim=8, final_logit_softcapping=2.0)),
        2.0,
        1.0,
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        transformers.Gemma3TextConfig(**sizes(head_dim=8, final_logit_softcapping=1.5)),
        1.5,
        1.0,
    ),
    "cohere": ("CohereForCausalLM", transformers.CohereConfig(**sizes(logit_scale=0.25)), None, 0.25),
    "granite": ("GraniteForCausalLM", transformers.GraniteConfig(**sizes(logits_scaling=4.0)), None, 0.25),
    "hyperclovax": ("HyperCLOVAXForCausalLM", transformers.HyperCLOVAXConfig(**sizes(logits_scaling=0.2)), None, 0.2),
    "falcon-h1": (
        "FalconH1ForCausalLM",
        transformers.FalconH1Config(**sizes(lm_head_multiplier=0.3, **MAMBA)),
        None,
        0.3,
    ),
    # The hidden states are scaled before the head, and come so.
    "minicpm3": (
        "MiniCPM3ForCausalLM",
        transformers.MiniCPM3Config(**sizes(num_key_value_heads=4, dim_model_base=8, **LATENT)),
        None,
        1.0,
    ),
    "mixtral": ("MixtralForCausalLM", mixtral().config, None, 1.0),
    "gpt2": ("GPT2LMHeadModel", GPT2Config(vocab_size=V, n_embd=32, n_layer=1, n_head=4, n_positions=64), None, 1.0),
    "phi": ("PhiForCausalLM", transformers.PhiConfig(**sizes()), None, 1.0),  # a bias on the head
    "t5": ("T5ForConditionalGeneration", t5().config, None, 1.0),
    "t5-untied": (
        "T5ForConditionalGeneration",
        T5Config(**{**t5().config.to_dict(), "tie_word_embeddings": False}),
        None,
        1.0,
    ),
    "bart": ("BartForConditionalGeneration", BartConfig(**BART_SIZES), None, 1.0),
    "mbart": ("MBartForConditionalGeneration", transformers.MBartConfig(**BART_SIZES), None, 1.0),
    "marian": ("MarianMTModel", transformers.MarianConfig(**BART_SIZES), None, 1.0),
}


def family(name: str) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, FAMILIES[name][0])(copy.deepcopy(FAMILIES[name][1])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.dim() == 1 else 0)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    return model


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Two pairs of 9 positions, of which 4 are the prompt; one is padded."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, V, (4, 9), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    labels = input_ids.clone()
    labels[:, :4] = -100
    labels[1, 7:] = -100
    attention_mask[1, 7:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def eager(model: Any, given: dict[str, Tensor], **keywords: Any) -> tuple[Tensor, fp.PairOutput]:
    """The loss from logits by the specification, with the model's own router loss."""
    inputs = {name: value for name, value in given.items() if name != "labels"}
    encoder_decoder = model.config.is_encoder_decoder
    if encoder_decoder:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(given["labels"])
    result = model(**inputs)
    output = fp.reference.cpo_loss(result.logits, given["labels"], shift=not encoder_decoder, **keywords)
    aux_loss = getattr(result, "aux_loss", None)
    return output.loss if aux_loss is None else output.loss + model.config.router_aux_loss_coef * aux_loss, output
