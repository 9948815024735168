"""What is seen on a few tokens before a model is used: the right head in any precision, and a model left as it was."""

import logging
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils.operations import convert_outputs_to_fp32
from families import BART_SIZES, FAMILIES, V, batch, eager, family
from torch import Tensor, nn
from trl_models import bart, llama, sizes

import fused_pref as fp
from fused_pref.models import preference as models

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")
HALVES = [torch.bfloat16, torch.float16]


def wrapped(model: Any, dtype: torch.dtype) -> Any:
    """As accelerate prepares a model for mixed precision."""
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype)(model.forward))
    return model


def nllb_moe() -> Any:
    """Its routers keep a capacity from the last forward in evaluation mode."""
    torch.manual_seed(0)
    size = {**BART_SIZES, "encoder_layers": 2, "decoder_layers": 2, "num_experts": 4, "expert_capacity": 64}
    config = transformers.NllbMoeConfig(**size, encoder_sparse_step=2, decoder_sparse_step=2)
    return transformers.NllbMoeForConditionalGeneration(config)


def state(model: nn.Module) -> list[Any]:
    """Everything that a module has: attributes (tensors by their bits), hooks, parts, modes."""

    def frozen(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.requires_grad, value.grad, value.dtype, value.detach().clone().tolist()
        if isinstance(value, dict):
            return {name: frozen(part) for name, part in value.items()}
        return value if isinstance(value, str | int | float | bool | tuple) else id(value)

    kept = [{name: frozen(part) for name, part in vars(module).items()} for module in model.modules()]
    kept[0] = {name: part for name, part in kept[0].items() if name not in ("forward", "_plain_forward")}
    return [*kept, torch.get_rng_state().tolist()]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", [*FAMILIES])
def test_a_forward_that_is_wrapped_in_autocast_has_the_same_head(
    name: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "fused_pref"):
        models.attach(wrapped(family(name), dtype))
    assert caplog.messages == []


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("make", [llama, bart])
def test_attaching_inside_autocast(make: Callable[[], Any], dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype):
        models.attach(make())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("wrap", [False, True])
def test_another_transform_is_seen_in_any_precision(dtype: torch.dtype, wrap: bool) -> None:
    for name, value in (("final_logit_softcapping", 30.0), ("logit_scale", 0.9)):
        model = llama().to(dtype)
        setattr(model.config, name, value)
        with pytest.raises(ValueError, match="the logits of LlamaForCausalLM must be softcap"):
            models.attach(wrapped(model, torch.bfloat16) if wrap else model)


def test_a_softcap_that_the_configuration_does_not_name_is_seen_in_half_precision() -> None:
    class Capped(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = 30 * torch.tanh(output.logits / 30)
            return output

    with pytest.raises(ValueError, match="softcap=None"):
        models.attach(Capped(llama().config).bfloat16())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_loop_that_prepares_its_model_first(precision: str) -> None:
    # Its state is the process's.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model, given = llama(), batch()
    want, _ = eager(model, given)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    output = models.preference_forward(model, given, fp.LinearCPOLoss())
    accelerator.backward(output.loss)
    optimizer.step()
    assert output.loss.item() == pytest.approx(want.item(), rel=1e-5 if precision == "no" else 1e-2)
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    again = models.preference_forward(unwrapped, given, fp.LinearCPOLoss()).loss
    assert again.item() == pytest.approx(want.item(), rel=1e-5)


def test_a_loop_that_prepares_its_model_for_float16() -> None:
    """Accelerate needs a GPU for it; the wrapper is the same."""
    model, given = wrapped(llama(), torch.float16), batch()
    loss = models.preference_forward(model, given, fp.LinearCPOLoss()).loss
    assert loss.item() == pytest.approx(eager(llama(), given)[0].item(), rel=2e-3)
    loss.backward()
    assert model.lm_head.weight.grad.dtype == torch.float32


def dynamic_rope() -> Any:
    """Its frequencies depend on the longest sequence so far."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = llama(max_position_embeddings=8, rope_parameters=rope)
    model(torch.arange(3, 33)[None])
    return model


MODELS = {
    **{name: lambda name=name: family(name).train() for name in FAMILIES},
    "nllb-moe": nllb_moe,
    "rope": dynamic_rope,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_left_as_it_was(name: str) -> None:
    model = MODELS[name]()
    model.train()
    list(model.modules())[-1].eval()
    next(iter(model.parameters())).requires_grad_(False)
    before = state(model)
    models.attach(model)
    assert state(model) == before


def test_the_random_state_is_left_as_it_was() -> None:
    """A model may drop out between its layers and its head."""

    class Dropping(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            hidden = nn.functional.dropout(self.model(input_ids)[0])
            return types.SimpleNamespace(logits=self.lm_head(hidden))

    model = Dropping(llama().config)
    before = state(model)
    models.attach(model)
    assert state(model) == before


def test_routers_keep_their_capacity() -> None:
    model = nllb_moe()
    routers = [module for module in model.modules() if hasattr(module, "expert_capacity")]
    before = [router.expert_capacity for router in routers]
    models.attach(model)
    assert routers
    assert [router.expert_capacity for router in routers] == before == [64] * len(routers)


@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
def test_layers_are_not_run(name: str) -> None:
    """Neither their hooks nor their weights are touched: on a model of many GB, attaching reads the head alone."""
    model, calls = family(name), []
    for module in model.modules():
        if module not in (model.get_output_embeddings(), model):
            module.register_forward_pre_hook(lambda module, args: calls.append(type(module).__name__))
    model.register_forward_hook(lambda *_: calls.append("model"))
    models.attach(model)
    assert calls == []


def test_layers_that_are_elsewhere_are_not_needed() -> None:
    model = llama()
    model.model.to("meta")
    model.config.logit_scale = 0.5
    with pytest.raises(ValueError, match=r"logit_scale=0\.5; they differ"):
        models.attach(model)


def test_a_head_that_is_elsewhere_is_not_checked() -> None:
    model = llama().to("meta")
    model.config.logit_scale = 0.5
    models.attach(model)


def test_an_error_in_the_forward_leaves_the_model_whole(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            super().forward(*args, **kwargs)
            self.trace = True
            raise KeyError("pixels")

    model = Broken(llama().config)
    before = state(model)
    models.attach(model)
    assert state(model) == before
    assert "could not check the output head of Broken: 'pixels'" in caplog.text


def test_a_model_without_a_backbone_is_not_checked(caplog: pytest.LogCaptureFixture) -> None:
    class Flat(transformers.LlamaForCausalLM):
        base_model = property(lambda self: self)

        def get_output_embeddings(self) -> Any:
            return self.lm_head

    model = Flat(llama().config)
    model.model = nn.Linear(2, 2)  # type: ignore[assignment]
    models.attach(model)
    assert "no part that could be left out" in caplog.text


def test_embeddings_as_output_embeddings_are_refused() -> None:
    """They are called with ids; FSMT gives them out."""

    class Tied(transformers.LlamaForCausalLM):
        def get_output_embeddings(self) -> Any:
            return self.model.embed_tokens

    with pytest.raises(ValueError, match=r"output embeddings of Tied must be .* hidden states; got an Embedding"):
        models.attach(Tied(llama().config))
    size = {**BART_SIZES, "langs": ["en", "de"], "src_vocab_size": V, "tgt_vocab_size": V}
    del size["vocab_size"]
    model = transformers.FSMTForConditionalGeneration(transformers.FSMTConfig(**size))
    with pytest.raises(ValueError, match=r"FSMT.* must be a layer that is called with hidden states; got an Embedding"):
        models.preference_forward(model, batch(), fp.LinearCPOLoss())


def test_a_head_that_is_called_with_something_else_is_refused() -> None:
    class Sliced(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            self.lm_head(self.model(input_ids)[0][..., :7])

    with pytest.raises(ValueError, match=r"embeddings of Sliced must be called with hidden states \(\.\.\., 32\)"):
        models.attach(Sliced(llama().config))


def test_fewer_logits_than_the_head_s_are_refused() -> None:
    class Cut(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits[..., :60]
            return output

    with pytest.raises(ValueError, match=r"the logits of Cut must be \(1, 2, 66\)"):
        models.attach(Cut(llama().config))


@pytest.mark.parametrize("name", ["logit_scale", "final_logit_softcapping", "logits_scaling", "output_multiplier"])
@pytest.mark.parametrize("value", ["learned", True, None, [1.0]])
def test_a_configuration_may_mean_something_else_by_the_name(name: str, value: Any) -> None:
    model = llama()
    setattr(model.config, name, value)
    head = models.find_head(models.attach(model))
    assert (head.softcap, head.logit_scale) == (None, 1.0)


def test_a_divisor_of_0_is_refused() -> None:
    model = llama()
    model.config.logits_scaling = 0.0
    with pytest.raises(ValueError, match="logit_scale=inf"):
        models.attach(model)


def test_bias_of_head_and_model_together() -> None:
    """The check adds them up as the model does."""
    model = bart().eval()
    model.lm_head.bias = nn.Parameter(torch.randn(V))
    models.attach(model)
    model = bart().eval()
    model.get_output_embeddings = lambda: model.lm_head
    model.final_logits_bias.normal_()
    plain = type(model).forward

    def without(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain(self, *args, **kwargs)
        output.logits = output.logits - self.final_logits_bias
        return output

    model.forward = without.__get__(model)
    with pytest.raises(ValueError, match="they differ by"):
        models.attach(model)


def test_small_and_empty_weights() -> None:
    for factor in (0.0, 1e-30, 1e6):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes()))
        with torch.no_grad():
            model.lm_head.weight.mul_(factor)
        models.attach(model)
