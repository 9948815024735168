"""Models that the head inside of a model refuses."""

import types
from typing import Any

import pytest
import torch
import transformers
from families import V
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from trl_models import llama

from fused_pref.models import preference as models

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")


def test_an_adapter_on_the_head_is_refused() -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="an adapter on the output head"):
        models.attach(model)


def test_a_model_without_output_embeddings_is_refused() -> None:
    with pytest.raises(ValueError, match="LlamaModel has none"):
        models.attach(llama().model)


def test_a_quantised_head_is_refused() -> None:
    model = llama()
    model.lm_head.weight = nn.Parameter(torch.zeros(V, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"must not be quantised; its weight is torch\.int8"):
        models.attach(model)


def test_logits_that_are_made_in_another_way_are_refused() -> None:
    class Shifted(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 0.5
            return output

    with pytest.raises(ValueError, match=r"the logits of Shifted must be softcap\(logit_scale"):
        models.attach(Shifted(llama().config))


def test_a_head_that_is_not_called_is_refused() -> None:
    class Around(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            hidden = self.model(input_ids).last_hidden_state
            return types.SimpleNamespace(logits=hidden @ self.lm_head.weight.T)

    with pytest.raises(ValueError, match="Around does not call its output embeddings"):
        models.attach(Around(llama().config))


def test_liger_s_forward_is_refused() -> None:
    model = llama()

    def lce_forward(self: Any, *args: Any, **kwargs: Any) -> None: ...

    lce_forward.__module__ = "liger_kernel.transformers.model.llama"
    model.forward = types.MethodType(lce_forward, model)
    with pytest.raises(ValueError, match="Liger's fused cross-entropy"):
        models.attach(model)


def test_a_softcap_that_is_not_the_model_s_is_seen() -> None:
    """Small logits are hardly changed by it."""
    model = llama()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="softcap=30"):
        models.attach(model)
