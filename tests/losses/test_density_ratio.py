"""Density-ratio weights."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch

import fused_pref as fp


def prompts(count: int = 400, size: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    desirable = torch.rand(count, generator=generator) < 0.3
    embeddings = torch.randn(count, size, generator=generator)
    embeddings[:, 0] += desirable * 1.5
    return embeddings, desirable


def test_weights_follow_the_formula() -> None:
    pytest.importorskip("sklearn")
    from sklearn.linear_model import LogisticRegression

    embeddings, desirable = prompts()
    ratio = fp.DensityRatio().fit(embeddings, desirable)
    model = LogisticRegression(class_weight="balanced", max_iter=1000)
    model.fit(embeddings.double().numpy(), desirable.numpy())
    p = torch.as_tensor(model.predict_proba(embeddings.double().numpy())[:, 1])
    expected = (p / (1 - p + 1e-8)).clamp(0.5, 10)
    torch.testing.assert_close(ratio(embeddings).double(), expected, rtol=1e-6, atol=1e-6)
    weights = ratio(embeddings, desirable)
    assert (weights[desirable] == 1).all()
    torch.testing.assert_close(weights[~desirable].double(), expected[~desirable], rtol=1e-6, atol=1e-6)
    assert (weights.min(), weights.dtype) == (0.5, torch.float32)


def test_weights_enter_bco() -> None:
    embeddings, desirable = prompts(4)
    desirable[:] = torch.tensor([True, False, True, False])
    weights = fp.DensityRatio().fit(embeddings, desirable)(embeddings, desirable)
    logits, labels, ref = torch.randn(4, 5, 11), torch.randint(0, 11, (4, 5)), torch.randn(4)
    output = fp.bco_loss(logits, labels, desirable, ref, sample_weight=weights)
    sign = torch.where(desirable, 1, -1)
    by_hand = (-torch.nn.functional.logsigmoid(sign * output.rewards) * weights).mean()
    torch.testing.assert_close(output.loss, by_hand)


def test_state_is_plain_tensors() -> None:
    embeddings, desirable = prompts()
    fitted = fp.DensityRatio(max_ratio=4.0).fit(embeddings, desirable)
    buffer = io.BytesIO()
    torch.save(fitted.state_dict(), buffer)
    buffer.seek(0)
    loaded = fp.DensityRatio(max_ratio=4.0)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(loaded(embeddings), fitted(embeddings))
    assert set(fitted.state_dict()) == {"coefficients", "intercept"}
    assert torch.equal(pickle.loads(pickle.dumps(fitted))(embeddings), fitted(embeddings))


def test_casting_a_model_keeps_the_state_exact() -> None:
    embeddings, desirable = prompts()
    fitted = fp.DensityRatio().fit(embeddings, desirable)
    exact, weights = fitted.coefficients.clone(), fitted(embeddings)
    torch.nn.ModuleDict({"ratio": fitted}).bfloat16()
    assert torch.equal(fitted.coefficients, exact)
    assert torch.equal(fitted(embeddings), weights)


def test_sampling_has_its_own_generator() -> None:
    embeddings, desirable = prompts()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = fp.DensityRatio(sample_size=50, seed=3).fit(embeddings, desirable)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = fp.DensityRatio(sample_size=50, seed=3).fit(embeddings, desirable)
    other = fp.DensityRatio(sample_size=50, seed=4).fit(embeddings, desirable)
    assert torch.equal(first.coefficients, again.coefficients)
    assert not torch.equal(first.coefficients, other.coefficients)


def test_copies_draw_on() -> None:
    """Each from where the original was, and without a part in its draws."""
    embeddings, desirable = prompts()
    ratio = fp.DensityRatio(sample_size=50, seed=3).fit(embeddings, desirable)
    first = ratio.coefficients
    copies = [copy.deepcopy(ratio), pickle.loads(pickle.dumps(ratio))]
    second = ratio.fit(embeddings, desirable).coefficients
    assert not torch.equal(first, second)
    for copied in copies:
        assert torch.equal(copied.coefficients, first)
        assert torch.equal(copied.fit(embeddings, desirable).coefficients, second)


def test_scikit_learn_is_optional() -> None:
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import torch, fused_pref as fp\n"
        "try: fp.DensityRatio().fit(torch.randn(4, 2), torch.tensor([True, False, True, False]))\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "fused-pref[udm]" in result.stdout
