"""What the batch of a transformers model is completed with: decoder inputs, and positions of packed sequences."""

import copy
import logging
from typing import Any

import pytest
import torch
import transformers
from families import BART_SIZES, V, batch, family
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor
from trl_models import bart, llama, mixtral, sizes, t5

import fused_pref as fp
from fused_pref.models import preference as models
from fused_pref.models.probe import check_packing

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")

EXPERTS = {"num_experts": 4, "expert_capacity": 64, "encoder_sparse_step": 1, "decoder_sparse_step": 1}
ENCODER_DECODERS = {
    "M2M100ForConditionalGeneration": transformers.M2M100Config(**BART_SIZES),
    "NllbMoeForConditionalGeneration": transformers.NllbMoeConfig(**BART_SIZES, **EXPERTS),
    "BlenderbotForConditionalGeneration": transformers.BlenderbotConfig(**BART_SIZES),
    "BlenderbotSmallForConditionalGeneration": transformers.BlenderbotSmallConfig(**BART_SIZES),
    "BartForConditionalGeneration": transformers.BartConfig(**BART_SIZES),
    "MBartForConditionalGeneration": transformers.MBartConfig(**BART_SIZES),
    "PegasusForConditionalGeneration": transformers.PegasusConfig(**BART_SIZES),
    "T5ForConditionalGeneration": t5().config,
    "MT5ForConditionalGeneration": transformers.MT5Config(**t5().config.to_dict()),
}


def encoder_decoder(name: str) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, name)(copy.deepcopy(ENCODER_DECODERS[name])).eval()


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_decoder_inputs_are_the_model_s_own(name: str) -> None:
    """As the model makes them from labels; a start token that is no other token."""
    model, given = encoder_decoder(name), batch()
    model.config.decoder_start_token_id = 5
    inputs = {key: given[key] for key in ("input_ids", "attention_mask")}
    logits = model(**inputs, labels=given["labels"]).logits
    want = fp.reference.cpo_loss(logits, given["labels"], shift=False)
    got = models.preference_forward(model, given, fp.LinearCPOLoss())
    torch.testing.assert_close(got.chosen_logps, want.chosen_logps, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.rejected_logps, want.rejected_logps, rtol=1e-4, atol=1e-4)


def test_decoder_inputs_that_are_given_are_used() -> None:
    model, given = encoder_decoder("BartForConditionalGeneration"), batch()
    labels = given["labels"]
    shifted = torch.cat([torch.full_like(labels[:, :1], 7), labels[:, :-1]], 1).clamp(min=0)
    inputs = {key: given[key] for key in ("input_ids", "attention_mask")}
    want = fp.reference.cpo_loss(model(**inputs, decoder_input_ids=shifted).logits, labels, shift=False).loss
    got = models.preference_forward(model, {**given, "decoder_input_ids": shifted}, fp.LinearCPOLoss()).loss
    torch.testing.assert_close(got, want)
    embeds = model.model.decoder.embed_tokens(shifted)
    got = models.preference_forward(model, {**given, "decoder_inputs_embeds": embeds}, fp.LinearCPOLoss()).loss
    torch.testing.assert_close(got, want)


def test_a_start_token_of_the_generation_configuration() -> None:
    model, given = encoder_decoder("M2M100ForConditionalGeneration"), batch()
    want = models.preference_forward(model, given, fp.LinearCPOLoss()).loss
    model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id
    model.config.decoder_start_token_id = None
    torch.testing.assert_close(models.preference_forward(model, given, fp.LinearCPOLoss()).loss, want)


@pytest.mark.parametrize("name", ["M2M100ForConditionalGeneration", "T5ForConditionalGeneration"])
@pytest.mark.parametrize("token", ["decoder_start_token_id", "pad_token_id"])
def test_missing_decoder_inputs_are_named(name: str, token: str) -> None:
    model = encoder_decoder(name)
    setattr(model.config, token, None)
    setattr(model.generation_config, token, None)
    match = f"batch must have decoder_input_ids: {name} cannot .*, its configuration has no {token}"
    with pytest.raises(ValueError, match=match):
        models.preference_forward(model, batch(), fp.LinearCPOLoss())


# Packed sequences.

LENGTHS = (5, 3, 7, 4)
GPT = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}
PACKING = {
    "llama": ("LlamaForCausalLM", transformers.LlamaConfig(**sizes())),
    "qwen2": ("Qwen2ForCausalLM", transformers.Qwen2Config(**sizes())),
    "gemma2": ("Gemma2ForCausalLM", transformers.Gemma2Config(**sizes(head_dim=8))),
    "gemma3": ("Gemma3ForCausalLM", transformers.Gemma3TextConfig(**sizes(head_dim=8, sliding_window=4))),
    "mistral": ("MistralForCausalLM", transformers.MistralConfig(**sizes(sliding_window=3))),
    "gpt2": ("GPT2LMHeadModel", transformers.GPT2Config(**GPT)),
    "phi": ("PhiForCausalLM", transformers.PhiConfig(**sizes())),
    "mixtral": ("MixtralForCausalLM", mixtral().config),
    "ctrl": ("CTRLLMHeadModel", transformers.CTRLConfig(vocab_size=V, n_embd=32, dff=48, n_layer=2, n_head=4)),
}
MAMBA = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2}
HYBRID = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
MIXING = {
    "bloom": ("BloomForCausalLM", transformers.BloomConfig(**GPT), "which BloomForCausalLM does not take"),
    "mamba": ("MambaForCausalLM", transformers.MambaConfig(**MAMBA), "which MambaForCausalLM does not take"),
    "bart": ("BartForConditionalGeneration", bart().config, "which BartForConditionalGeneration does not take"),
    "opt": ("OPTForCausalLM", transformers.OPTConfig(**sizes(**OPT)), "lets a sequence see those"),
    "falcon-h1": ("FalconH1ForCausalLM", transformers.FalconH1Config(**sizes(**HYBRID)), "lets a sequence see those"),
    "lfm2": ("Lfm2ForCausalLM", transformers.Lfm2Config(**sizes(layer_types=["conv", "full_attention"])), "lets a seq"),
}


def made(name: str, config: Any, implementation: str | None = None) -> Any:
    torch.manual_seed(0)
    options = {} if implementation is None else {"attn_implementation": implementation}
    model = getattr(transformers, name)._from_config(copy.deepcopy(config), **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model


def rows() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same sequences packed, without positions, and padded."""
    sequences = torch.randint(3, V, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0)).split(LENGTHS)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    ids = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=-100)
    together = torch.cat(sequences)
    packed = {"input_ids": together[None], "labels": together, "cu_seqlens": ends.int()}
    return packed, {"input_ids": ids, "attention_mask": (labels != -100).long(), "labels": labels}


def scored(model: Any, given: dict[str, Any]) -> Any:
    return models.preference_forward(model, given, fp.LinearCPOLoss(logits_mean="completion"))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PACKING)
def test_a_packed_batch_is_the_padded_one(name: str, implementation: str, caplog: pytest.LogCaptureFixture) -> None:
    if name in ("ctrl", "gemma2"):  # they have no other
        implementation = "eager"
    with caplog.at_level(logging.WARNING, "fused_pref"):
        model = made(*PACKING[name], implementation)
        if name == "mixtral":  # its router loss counts padding
            model.config.output_router_logits = False
        packed, padded = rows()
        got, want = scored(model, packed), scored(model, padded)
    assert caplog.messages == []
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    assert abs(got.loss.item() - scored(model, padded | {"labels": padded["labels"].roll(1, 0)}).loss.item()) > 1e-3


@pytest.mark.parametrize("name", MIXING)
def test_a_model_that_mixes_packed_sequences_is_refused(name: str) -> None:
    *model, match = MIXING[name]
    with pytest.raises(ValueError, match=f"cu_seqlens needs a model that keeps packed sequences apart.*{match}"):
        scored(made(*model), rows()[0])


def test_positions_that_begin_elsewhere_are_refused() -> None:
    """As RoBERTa's, whose first is padding's number plus one."""

    class Offset(transformers.GPT2LMHeadModel):
        def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
            if position_ids is None:
                position_ids = torch.arange(input_ids.shape[1])[None] + 2
            return super().forward(input_ids, position_ids=position_ids, **kwargs)

    with pytest.raises(ValueError, match="Offset counts positions from another start than 0; pad"):
        scored(Offset(PACKING["gpt2"][1]), rows()[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "mixtral", "falcon-h1"])
def test_packing_is_judged_alike_in_half_precision(name: str, dtype: torch.dtype) -> None:
    model = made(*(PACKING | MIXING)[name][:2]).to(dtype)
    if name in PACKING:
        assert scored(model, rows()[0]).loss.isfinite()
    else:
        with pytest.raises(ValueError, match="lets a sequence see those before it"):
            scored(model, rows()[0])


def test_packing_with_adapters_and_autocast() -> None:
    packed, padded = rows()
    model = get_peft_model(made(*PACKING["llama"]), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    torch.testing.assert_close(scored(model, packed).loss, scored(model, padded).loss)
    with torch.autocast("cpu", torch.bfloat16):
        got = scored(model, packed).loss
    assert got.item() == pytest.approx(scored(model, padded).loss.item(), rel=3e-2)
    got.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_virtual_tokens_and_packing_are_refused() -> None:
    """A prefix is a cache, with which transformers looks for no packed sequences."""
    model = get_peft_model(llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="cu_seqlens cannot be used with prompt learning"):
        scored(model, rows()[0])


def test_packing_leaves_the_model_as_it_was() -> None:
    model = llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    random = torch.get_rng_state()
    check_packing(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in (model, model.model.layers[0], model.model.layers[1])] == [True, False, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.model.embed_tokens._forward_hooks


def test_packing_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, packed = llama(), rows()[0]
    scored(model, packed)
    monkeypatch.setattr("fused_pref.models.inputs.check_packing", lambda model: pytest.fail("again"))
    scored(model, packed)


def test_positions_that_are_given_are_used() -> None:
    model, packed = llama(), rows()[0]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    want = scored(model, packed).loss
    torch.testing.assert_close(scored(model, {**packed, "position_ids": positions}).loss, want)
    seen: list[torch.Tensor] = []
    model.model.register_forward_pre_hook(lambda _, args, given: seen.append(given["position_ids"]), with_kwargs=True)
    torch.testing.assert_close(scored(model, {**packed, "position_ids": positions + 3}).loss, want)
    assert torch.equal(seen[-1], positions + 3)


@pytest.mark.parametrize("which", ["never", "first", "within"])
def test_positions_of_other_sequences_are_refused(which: str) -> None:
    """A model sees by them where a sequence begins: the loss would be that of other sequences."""
    model, packed = llama(), rows()[0]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    ends = torch.tensor(LENGTHS).cumsum(0)
    if which == "never":
        positions = torch.arange(len(positions))
    elif which == "first":
        positions[ends[0] : ends[1]] += LENGTHS[0]
    else:
        positions[1] += 1
    with pytest.raises(ValueError, match="position_ids must rise by one within each sequence"):
        scored(model, {**packed, "position_ids": positions[None]})


def test_empty_sequences_and_labels_as_a_row() -> None:
    model, packed = llama(), rows()[0]
    want = scored(model, packed)
    ends = packed["cu_seqlens"].long()
    ends = torch.cat([ends[:1], ends[:1], ends[1:3], ends[2:], ends[-1:]])
    got = models.preference_forward(
        model, {**packed, "labels": packed["labels"][None], "cu_seqlens": ends}, fp.linear_sequence_logps
    )
    assert (got[ends.diff() == 0] == 0).all()
    assert (ends.diff() == 0).sum() == 3
    kept = got[ends.diff() > 0]
    torch.testing.assert_close(kept, torch.cat([want.chosen_logps, want.rejected_logps]))


def test_masks_beside_packed_sequences() -> None:
    """Of ones it says nothing; with zeros it would be another batch; one of 4 dimensions is the user's own."""
    model, packed = llama(), rows()[0]
    want, ones = scored(model, packed).loss, torch.ones_like(packed["input_ids"])
    for mask in (ones, ones.bool(), None):
        torch.testing.assert_close(scored(model, {**packed, "attention_mask": mask}).loss, want)
    with pytest.raises(ValueError, match="attention_mask must be left out with cu_seqlens, all ones"):
        scored(model, {**packed, "attention_mask": ones.index_fill(1, torch.tensor([3]), 0)})
    blocks = torch.block_diag(*(torch.ones(length, length).tril() for length in LENGTHS)).bool()[None, None]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    for given in ({}, {"position_ids": positions}):
        torch.testing.assert_close(scored(model, {**packed, "attention_mask": blocks, **given}).loss, want)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"cu_seqlens": [0, 19]}, TypeError, r"cu_seqlens must be .*; got \[0, 19\]"),
        ({"cu_seqlens": torch.tensor([0, 18])}, ValueError, "cu_seqlens must start at 0, .* N_total = 19; got"),
        ({"cu_seqlens": torch.tensor([0.0, 19])}, TypeError, "cu_seqlens must be .*; got a float32 tensor"),
        ({"input_ids": torch.zeros(19).long()}, ValueError, r"input_ids must be \(1, N_total = 19, ...\) .*\(19,\)"),
        ({"input_ids": torch.zeros(1, 18).long()}, ValueError, r"input_ids must be \(1, N_total = 19.*\(1, 18\)"),
        ({"input_ids": torch.zeros(19, 1).long()}, ValueError, r"input_ids must be \(1, N_total = 19.*\(19, 1\)"),
    ],
)
def test_malformed_packed_batches(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        scored(llama(), {**rows()[0], **changes})


def test_packed_embeddings() -> None:
    model, packed = llama(), rows()[0]
    want = scored(model, packed).loss
    packed["inputs_embeds"] = model.get_input_embeddings()(packed.pop("input_ids")).detach()
    torch.testing.assert_close(scored(model, packed).loss, want)


def test_a_model_that_fails_on_a_few_tokens_is_used_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    class Shy(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
            if input_ids.shape[1] < 10:
                raise KeyError("too few")
            return super().forward(input_ids, position_ids=position_ids, **kwargs)

    model = Shy(llama().config)
    models.attach(family("llama"))
    assert scored(model, rows()[0]).loss.isfinite()
    assert "could not check that Shy keeps packed sequences apart: 'too few'" in caplog.text
