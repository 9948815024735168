"""The head inside of transformers models: any family, wrappers and adapters."""

import copy
import functools
import pickle
import types
import warnings
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from families import FAMILIES, V, batch, eager, family
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from trl.trainer.utils import add_fused_lm_head
from trl_models import bart, llama, mixtral

import fused_pref as fp
from fused_pref.models import preference as models

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")

PLAIN = {"num_hidden_layers": 1}


def gradients(model: Any, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_same(model: Any, given: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    loss, output = eager(model, given)
    want = gradients(model, loss)
    result = models.preference_forward(model, given, fp.LinearCPOLoss())
    got = gradients(model, result.loss)
    assert result.loss.item() == pytest.approx(loss.item(), rel=tolerance)
    torch.testing.assert_close(result.chosen_logps, output.chosen_logps, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(result.chosen_logits_mean, output.chosen_logits_mean, rtol=tolerance, atol=tolerance)
    assert (got - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    model = family(name)
    head = models.find_head(model)
    assert (head.softcap, head.logit_scale) == FAMILIES[name][2:]
    assert head.weight.shape == (V, 32)
    assert (head.bias is not None) == (name in ("phi", "bart", "mbart", "marian"))
    assert (head.backbone is model) == name.startswith("t5")
    assert_same(model, batch())


def test_a_plain_forward_is_unchanged() -> None:
    model, given = llama().eval(), batch()
    prompt = given["input_ids"][:, :3]
    options = {"max_new_tokens": 4, "do_sample": False}
    logits, generated = model(prompt).logits, model.generate(prompt, **options)
    models.attach(model)
    assert models.attach(model) is model
    assert torch.equal(model(prompt).logits, logits)
    assert torch.equal(model.generate(prompt, **options), generated)
    assert model(**given).loss.isfinite()
    models.preference_forward(model, given, fp.LinearCPOLoss())
    assert torch.equal(model(prompt).logits, logits)
    assert "forward" not in vars(model.lm_head)


def test_attaching_leaves_modes_and_random_state_alone() -> None:
    model = llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    before = torch.get_rng_state()
    models.attach(model)
    assert model.training
    assert not model.model.layers[0].training
    assert torch.equal(torch.get_rng_state(), before)


def test_a_deep_copy_runs_its_own_forward() -> None:
    model, given = llama(), batch()
    models.attach(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    loss = models.preference_forward(twin, given, fp.LinearCPOLoss(cpo_alpha=0.0)).loss
    assert loss.item() == pytest.approx(0.6931472, abs=0.3)  # the same log-probs but for lengths
    assert_same(twin, given)
    assert_same(model, given)


def test_a_pickled_model_and_one_whose_forward_was_put_back_are_attached_again() -> None:
    model, given = llama(), batch()
    models.attach(model)
    twin = pickle.loads(pickle.dumps(model))
    assert_same(twin, given)
    model.forward = types.MethodType(type(model).forward, model)
    assert_same(model, given)
    model.forward = types.MethodType(type(model).forward, model)
    preference = models.Preference(fp.linear_cpo_loss, (given["labels"],), {})
    with pytest.raises(RuntimeError, match=r"is not the one that attach\(\) gave it"):
        preference.run(model, {"input_ids": given["input_ids"], "labels": None})


def test_attaching_twice_through_a_wrapper_keeps_one_forward() -> None:
    """TRL's trainers wrap the forward once more."""
    model, given = llama(), batch()
    models.attach(model)
    add_fused_lm_head(model)
    forward = model.forward
    models.attach(model)
    assert model.forward is forward
    assert_same(model, given)


def test_other_losses_take_what_they_need_from_the_batch() -> None:
    model, given = llama(), batch()
    extra = {
        "desirable": torch.tensor([True, False, True, False]),
        "ref_logps": torch.tensor([-9.0, -8.0, -7.0, -6.0]),
        "sample_weight": torch.tensor([1.0, 2.0, 1.0, 0.5]),
    }
    logits = model(given["input_ids"], attention_mask=given["attention_mask"]).logits
    labels, (desirable, ref_logps, weight) = given["labels"], extra.values()
    got = models.preference_forward(model, {**given, **extra}, fp.LinearBCOLoss(delta=0.2))
    want = fp.reference.bco_loss(logits, labels, desirable, ref_logps, sample_weight=weight, delta=0.2)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.metrics()["rewards/chosen"], want.metrics()["rewards/chosen"])
    got = models.preference_forward(model, {**given, "ref_logps": ref_logps}, fp.LinearDPOLoss(loss_type="ipo"))
    torch.testing.assert_close(got.loss, fp.reference.dpo_loss(logits, labels, ref_logps, loss_type="ipo").loss)
    logps = models.preference_forward(model, given, functools.partial(fp.linear_sequence_logps, average=True))
    torch.testing.assert_close(logps, fp.reference.sequence_logps(logits, labels, average=True))

    def doubled(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, **keywords: Any) -> torch.Tensor:
        return 2 * fp.linear_sequence_logps(hidden, weight, labels, **keywords)

    logps = models.preference_forward(model, given, doubled)
    torch.testing.assert_close(logps, 2 * fp.reference.sequence_logps(logits, labels))


def test_tensors_of_an_own_objective_are_found_by_their_names() -> None:
    class Margin(nn.Module):
        def forward(self, chosen: fp.Sequences, rejected: fp.Sequences, margin: Tensor, floor: float = 0.0) -> Tensor:
            return torch.relu(margin + rejected.logps - chosen.logps - floor)

    model, given = llama(), batch()
    pairs = len(given["labels"]) // 2
    loss, margin = fp.LinearPreferenceLoss(Margin()), torch.linspace(1, 2, pairs)
    output = models.preference_forward(model, {**given, "margin": margin}, loss)
    hinge = fp.LinearPreferenceLoss(lambda sequences, number: sequences.logps * number, unit=1)
    with pytest.raises(ValueError, match="batch must have number, which the loss takes"):
        models.preference_forward(model, given, hinge)
    logits = model(**{name: value for name, value in given.items() if name != "labels"}).logits
    expected = fp.preference_loss(logits, given["labels"], Margin(), margin)
    torch.testing.assert_close(output.losses, expected.losses)
    assert output.loss.requires_grad
    # What has a default may be in the batch, too; names of the head's own arguments are free.
    floors = {"margin": margin, "floor": torch.tensor(3.0)}
    raised = fp.preference_loss(logits, given["labels"], Margin(), *floors.values())
    torch.testing.assert_close(models.preference_forward(model, {**given, **floors}, loss).losses, raised.losses)
    weighted = fp.LinearPreferenceLoss(lambda sequences, weight, bias=0.0: sequences.average * weight + bias, unit=1)
    weights = {"weight": torch.arange(1.0, 5.0), "bias": torch.ones(4)}
    found = models.preference_forward(model, {**given, **weights}, weighted).losses
    simple = fp.LinearPreferenceLoss(lambda sequences: sequences.average, unit=1)
    averages = models.preference_forward(model, given, simple).losses
    torch.testing.assert_close(found, averages * weights["weight"] + 1)
    # An input of the model stays one, and a keyword of the loss too.
    given["attention_mask"][0, :2] = 0
    masked = fp.LinearPreferenceLoss(
        lambda sequences, attention_mask: sequences.average * attention_mask.sum(1), unit=1
    )
    losses = models.preference_forward(model, given, simple).losses * given["attention_mask"].sum(1)
    torch.testing.assert_close(models.preference_forward(model, given, masked).losses, losses)
    referred = fp.LinearPreferenceLoss(lambda sequences, ref_logps: sequences.ref_logps - ref_logps, unit=1)
    given["ref_logps"] = torch.arange(len(given["labels"])).float()
    with torch.no_grad():
        assert not models.preference_forward(model, given, referred).losses.any()


def test_packed_sequences() -> None:
    model = llama()
    input_ids = torch.randint(3, V, (1, 12), generator=torch.Generator().manual_seed(0))
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    packed = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "labels": input_ids,
        "cu_seqlens": torch.tensor([0, 5, 12], dtype=torch.int32),
    }
    logits = model(input_ids, position_ids=position_ids, use_cache=False).logits[0]
    want = fp.reference.cpo_loss(logits, input_ids[0], cu_seqlens=packed["cu_seqlens"])
    got = models.preference_forward(model, packed, fp.LinearCPOLoss())
    torch.testing.assert_close(got.loss, want.loss)


def test_autocast() -> None:
    model, given = llama(), batch()
    loss, _ = eager(model, given)
    with torch.autocast("cpu", torch.bfloat16):
        got = models.preference_forward(model, given, fp.LinearCPOLoss())
    assert got.loss.dtype == torch.float32
    assert got.loss.item() == pytest.approx(loss.item(), rel=1e-2)
    assert got.loss.item() != loss.item()
    got.loss.backward()
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_router_losses_are_part_of_the_loss() -> None:
    model, given = mixtral(), batch()
    with_router = models.preference_forward(model, given, fp.LinearCPOLoss()).loss
    plain = models.preference_forward(model, {**given, "output_router_logits": False}, fp.LinearCPOLoss()).loss
    assert with_router.item() > plain.item() + 0.5
    assert plain.item() == pytest.approx(eager(model, {**given, "output_router_logits": False})[0].item(), rel=1e-5)


# Wrappers and adapters.


def test_lora_and_a_head_that_is_trained_whole() -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model, given = get_peft_model(llama(), config), batch()
    models.attach(model)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(0.5)
    assert_same(model, given)
    assert model.base_model.model.lm_head.modules_to_save["default"].weight.grad is not None
    with model.disable_adapter(), torch.no_grad():
        loss = models.preference_forward(model, given, fp.LinearCPOLoss()).loss
    assert loss.item() == pytest.approx(eager(llama(), given)[0].item(), rel=1e-5)


def test_the_reference_of_a_frozen_head_has_no_gradient_of_it() -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert_same(model, batch())
    assert model.base_model.model.lm_head.weight.grad is None


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_prompt_learning(kind: str) -> None:
    """Virtual tokens before the input are cut off (prompt tuning), or there are none in the output (prefix tuning)."""
    chosen = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig}[kind]
    torch.manual_seed(0)
    model = get_peft_model(llama(), chosen(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    given = batch()
    logits = model(given["input_ids"], attention_mask=given["attention_mask"]).logits
    assert logits.shape[1] == (12 if kind == "prompt" else 9)
    want = fp.reference.cpo_loss(logits[:, -9:], given["labels"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "`past_key_values`")
        got = models.preference_forward(model, given, fp.LinearCPOLoss())
    torch.testing.assert_close(got.loss, want.loss)
    got.loss.backward()
    assert any(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in model.parameters())


def test_labels_of_another_length_are_refused() -> None:
    given = batch()
    given["labels"] = given["labels"][:, :-2]
    with pytest.raises(ValueError, match="labels"):
        models.preference_forward(llama(), given, fp.LinearCPOLoss())


def test_hooks_on_the_head_run() -> None:
    """As accelerate's on models that are split over devices, and forward hooks of any kind."""
    model, given = llama(), batch()
    calls: list[str] = []

    class Hook(AlignDevicesHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append("accelerate")
            return super().pre_forward(module, *args, **kwargs)

    add_hook_to_module(model.lm_head, Hook(execution_device="cpu", io_same_device=True))
    model.lm_head.register_forward_pre_hook(lambda module, args: calls.append("pre"))
    models.attach(model)
    calls.clear()
    assert_same(model, given)
    assert calls == ["pre", "accelerate"] * 2


def test_accelerate_s_autocast_wrapper() -> None:
    """It rebuilds what a forward returns, and converts it."""
    from accelerate.utils.operations import convert_outputs_to_fp32

    model, given = llama(), batch()
    models.attach(model)
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    extra = {"desirable": torch.tensor([True, False, True, False]), "ref_logps": torch.zeros(4)}
    output = models.preference_forward(model, {**given, **extra}, fp.LinearBCOLoss())
    assert output.loss.requires_grad
    assert output.desirable is extra["desirable"] or torch.equal(output.desirable, extra["desirable"])


def test_data_parallel_replicas_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must not be an nn\.DataParallel"):
        models.attach(nn.DataParallel(llama()))


@pytest.mark.parametrize("loss", [fp.LinearBCOLoss(skip_mass=0.1), fp.LinearCPOLoss(skip_mass=0.1)])
def test_outputs_can_be_copied(loss: Any) -> None:
    """As wrappers do, with what they have beside their items."""
    model, given = llama(), batch()
    extra = {"desirable": torch.tensor([True, False, True, False]), "ref_logps": torch.zeros(4)}
    with torch.no_grad():
        output = models.preference_forward(model, {**given, **(extra if "BCO" in repr(loss) else {})}, loss)
    for twin in (copy.copy(output), copy.deepcopy(output), pickle.loads(pickle.dumps(output)), output._replace()):
        assert type(twin) is type(output)
        assert vars(twin).keys() == vars(output).keys()
        assert all(torch.equal(value, vars(output)[name]) for name, value in vars(twin).items())
        assert twin.metrics().keys() == output.metrics().keys()
    assert output._replace(loss=torch.ones(())).loss == 1


def test_bart_is_unchanged_by_its_bias_gradient() -> None:
    """The bias is a buffer: it has a value in the logits and no gradient."""
    model = bart().eval()
    got = models.preference_forward(model, batch(), fp.LinearCPOLoss())
    got.loss.backward()
    assert model.final_logits_bias.grad is None
    assert got.loss.item() == pytest.approx(eager(model, batch())[0].item(), rel=1e-5)
