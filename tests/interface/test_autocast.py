"""Weights whose dtype is not that of autocast: what enters a product is cast, as autocast casts it."""

import itertools
from typing import Any

import pytest
import torch
from families import batch
from harness import Hidden, assert_gradient, make_hidden, run_linear
from head_cases import only
from peft import LoraConfig, get_peft_model
from torch import nn
from trl_models import bart, llama

import fused_pref as fp
from fused_pref.models import preference as models

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
HALVES = FLOATS[1:]
# Function, gradients, whether the hidden states have the weight's dtype rather than autocast's, weight, autocast. All
# dtypes with one function that forms gradients in its forward; others see what was cast.
MIXED = [
    *(("linear_cpo_loss", "hwb", False, weight, cast) for weight in FLOATS for cast in HALVES),
    *(("linear_cpo_loss", "hwb", True, weight, cast) for weight in FLOATS for cast in HALVES if weight != cast),
    *(
        (name, wanted, *dtypes)
        for name, wanted in (("linear_cpo_loss", "h"), ("linear_token_logps", "hwb"), ("linear_token_logps", "h"))
        for dtypes in ((True, torch.float32, torch.bfloat16), (False, torch.bfloat16, torch.float16))
    ),
]


def value(output: Any) -> torch.Tensor:
    return output.loss if hasattr(output, "loss") else output


@pytest.mark.parametrize(("name", "wanted", "own", "weight", "cast"), MIXED, ids=str)
def test_what_enters_a_product_is_cast(
    name: str, wanted: str, own: bool, weight: torch.dtype, cast: torch.dtype, device: str, backend: str
) -> None:
    """The value is that of tensors cast beforehand; gradients come back in each tensor's dtype."""
    batch = make_hidden(4, 5, 16, 37, device=device, bias=True)
    hidden = weight if own else cast
    assert batch.bias is not None
    # The bias has a third dtype, where there is one.
    bias = batch.bias.to(FLOATS[(FLOATS.index(weight) + 1) % 3])
    mixed = Hidden(batch.hidden.to(hidden), batch.weight.to(weight), bias, batch.labels, wanted)
    ready = Hidden(mixed.hidden.to(cast), mixed.weight.to(cast), bias.to(cast), batch.labels, wanted)
    with torch.autocast(device, cast):
        ours, grads = run_linear(getattr(fp, name), mixed, backend=backend)
    truth, true_grads = run_linear(getattr(fp, name), ready, backend=backend)
    torch.testing.assert_close(value(ours), value(truth))
    assert value(ours).dtype == torch.float32
    for mine, other, tensor in zip(grads, true_grads, (mixed.hidden, mixed.weight, bias), strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert mine.dtype == tensor.dtype
            assert_gradient(mine, other.double(), 2**-6)


@pytest.mark.parametrize("cast", HALVES)
@pytest.mark.parametrize(("name", "plan"), [("linear_cpo_loss", "grouped"), ("linear_token_logps", "vocab_major")])
def test_the_same_in_groups_and_in_slices(name: str, plan: str, cast: torch.dtype, device: str, backend: str) -> None:
    """Partial products are added up."""
    batch = make_hidden(4, 6, 16, 40, device=device, mask="none")
    dtype = HALVES[cast == torch.bfloat16]
    mixed = Hidden(batch.hidden.to(dtype), batch.weight.to(dtype), None, batch.labels, "hw")
    ready = Hidden(mixed.hidden.to(cast), mixed.weight.to(cast), None, batch.labels, "hw")
    with only(plan, small=True) as taken:
        with torch.autocast(device, cast):
            ours, grads = run_linear(getattr(fp, name), mixed, backend=backend)
        truth, true_grads = run_linear(getattr(fp, name), ready, backend=backend)
    assert all(len(chosen.bounds) > 2 or chosen.columns < 40 for chosen in taken)
    torch.testing.assert_close(value(ours), value(truth))
    for mine, other in zip(grads[:2], true_grads[:2], strict=True):
        assert mine.dtype == dtype
        assert_gradient(mine, other.double(), 2**-5)


def test_autocast_leaves_float64_alone(device: str) -> None:
    batch = make_hidden(4, 5, 8, 11, device=device, dtype=torch.float64)
    want = fp.linear_cpo_loss(batch.hidden, batch.weight, batch.labels, backend="torch").loss
    with torch.autocast(device, torch.bfloat16):
        got = fp.linear_cpo_loss(batch.hidden, batch.weight, batch.labels, backend="torch").loss
        assert got.dtype == torch.float64
        assert torch.equal(got, want)
        with pytest.raises(TypeError, match=r"weight must be a float32 or bfloat16 or .*; got a float64"):
            fp.linear_cpo_loss(batch.hidden.float(), batch.weight, batch.labels)
        with pytest.raises(TypeError, match=r"weight must be a float64 tensor .*; got a float16"):
            fp.linear_cpo_loss(batch.hidden, batch.weight.half(), batch.labels)
        bias = torch.zeros(11, dtype=torch.float64, device=device)
        with pytest.raises(TypeError, match=r"bias must be a float32 or .*; got a float64"):
            fp.linear_cpo_loss(batch.hidden.float(), batch.weight.float(), batch.labels, bias=bias)


@pytest.mark.parametrize("weight", FLOATS)
@pytest.mark.parametrize("hidden", FLOATS)
def test_without_autocast_dtypes_must_agree(hidden: torch.dtype, weight: torch.dtype) -> None:
    """As in ``F.linear``."""
    batch = make_hidden(4, 5, 8, 11)
    tensors = (batch.hidden.to(hidden), batch.weight.to(weight), batch.labels)
    if hidden == weight:
        assert fp.linear_cpo_loss(*tensors).loss.isfinite()
    else:
        kind = str(hidden).removeprefix("torch.")
        with pytest.raises(TypeError, match=rf"weight must be a {kind} tensor \(V, D=8\); got"):
            fp.linear_cpo_loss(*tensors)


@pytest.mark.parametrize("cast", HALVES)
@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS])
def test_logits_under_autocast(dtype: torch.dtype, cast: torch.dtype) -> None:
    """There is no product: their token math is that of any other time, forward and backward."""
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 6, 37).to(dtype), torch.randint(37, (4, 6))
    results = []
    for enabled in (False, True):
        leaf = logits.clone().requires_grad_()
        with torch.autocast("cpu", cast, enabled=enabled):
            loss = fp.cpo_loss(leaf, labels).loss
            loss.backward()
        results.append((loss, leaf.grad))
    for plain, under in zip(*results, strict=True):
        assert plain.dtype == under.dtype
        assert torch.equal(plain, under)


def scored(model: nn.Module) -> torch.Tensor:
    loss = models.preference_forward(model, batch(), fp.LinearCPOLoss()).loss
    loss.backward()
    return loss


@pytest.mark.parametrize(
    ("make", "dtype", "cast"),
    # PyTorch's layer norm takes no bfloat16 weights beside float16 states on a CPU, nor the other way round.
    [*itertools.product([llama], FLOATS, HALVES), *((bart, torch.float32, cast) for cast in HALVES)],
)
def test_a_checkpoint_of_any_dtype_under_autocast(make: Any, dtype: torch.dtype, cast: torch.dtype) -> None:
    want = scored(make().eval()).item()
    model = make().eval().to(dtype)
    with torch.autocast("cpu", cast):
        assert scored(model).item() == pytest.approx(want, rel=3e-2)
    weight = model.get_output_embeddings().weight
    assert weight.grad.dtype == dtype
    assert weight.grad.isfinite().all()
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("cast", HALVES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("whole", [None, ["lm_head"]])
def test_adapters_on_a_checkpoint_of_any_dtype(dtype: torch.dtype, cast: torch.dtype, whole: list[str] | None) -> None:
    """PEFT holds adapters, and a head that is trained whole, in float32."""
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=whole, init_lora_weights=False)
    want = scored(get_peft_model(llama(), config)).item()
    model = get_peft_model(llama().to(dtype), config)
    with torch.autocast("cpu", cast):
        assert scored(model).item() == pytest.approx(want, rel=5e-2)
    trained = {name: part for name, part in model.named_parameters() if part.requires_grad}
    assert all(part.grad is not None and part.grad.dtype == part.dtype for part in trained.values())
    assert any("lm_head" in name for name in trained) == (whole is not None)
