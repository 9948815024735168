"""Models, a tokenizer and data for the tests of the trainers; nothing is downloaded."""

from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = [f"w{i}" for i in range(60)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
BART_LAYERS = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}
SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
# What a trainer computes is as its defaults say, bf16 included: on the CPU, every step logged, nothing shown or saved.
DEFAULTS = {
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}
# The same in float32, where numbers can be compared to the last digits.
TRAINING = {**DEFAULTS, "max_length": 32, "bf16": False, "gradient_checkpointing": False}
SETUPS = {"defaults": DEFAULTS, "fp32": TRAINING}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    """Splits at spaces into 64 + 2 words."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS, "user", "assistant"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **changes}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATE, **names)


def sizes(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": 66,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**sizes(**changes)))
    with torch.no_grad():  # logits of a size that matters
        model.lm_head.weight.mul_(8)
    return model


def sharp(make: Any = llama) -> Any:
    """A reference that is surer than the policy, so that completions of other prompts are less likely under it."""
    model = make()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.25)
        for parameter in model.model.layers[0].parameters():
            parameter.add_(0.02 * torch.sin(torch.arange(parameter.numel()).reshape(parameter.shape)))
    return model


def _text(start: int, length: int) -> str:
    return " ".join(WORDS[(start * 7 + 5 * i) % len(WORDS)] for i in range(length))


def pairs(rows: int = 16) -> Dataset:
    """Explicit prompts; completions of several lengths."""
    return Dataset.from_list(
        [
            {
                "prompt": _text(row, 3 + row % 4) + " ",
                "chosen": _text(row + 20, 2 + row % 5),
                "rejected": _text(row + 40, 3 + row % 3),
            }
            for row in range(rows)
        ]
    )


def unpaired(rows: int = 16) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": _text(row, 3 + row % 4) + " ",
                "completion": _text(row + 20, 2 + row % 5),
                "label": row % 3 != 1,
            }
            for row in range(rows)
        ]
    )


def mixtral() -> Any:
    """Mixture of experts with a router loss that matters."""
    torch.manual_seed(0)
    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
    return MixtralForCausalLM(MixtralConfig(**sizes(**options, output_router_logits=True)))


def t5() -> Any:
    """Encoder-decoder whose decoder output is scaled before the tied head."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 66, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0))


def bart() -> Any:
    """Encoder-decoder with a bias on the logits that is a buffer."""
    torch.manual_seed(0)
    layers = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in BART_LAYERS.items()}
    config = BartConfig(vocab_size=66, d_model=32, max_position_embeddings=64, **layers, **SPECIAL_IDS)
    model = BartForConditionalGeneration(config)
    model.final_logits_bias.normal_()
    return model


def llava_processor() -> LlavaProcessor:
    """Pictures of 8 × 8 pixels, which become 4 tokens each; `<image>` is token 66."""
    words = tokenizer()
    words.add_tokens(["<image>"], special_tokens=True)
    square = {"height": 8, "width": 8}
    pictures = CLIPImageProcessorPil(size=square, crop_size=square, do_resize=True)
    template = TEMPLATE.replace(
        "{{ message['content'] }}",
        "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}",
    )
    return LlavaProcessor(
        pictures,
        words,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def llava() -> Any:
    torch.manual_seed(0)
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**layers, image_size=8, patch_size=4, projection_dim=32),
        text_config=LlamaConfig(**sizes(vocab_size=67)),
        image_token_index=66,
    )
    return LlavaForConditionalGeneration(config)
