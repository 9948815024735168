"""What certified tile skipping costs, and what the planner says of it, with tiles of the size that it takes."""

import pytest
import torch
from harness import IGNORE, make_hidden, peak_bytes

import fused_pref as fp
from benchmarks.skipping import peaked, products


@pytest.mark.slow
def test_products_on_peaked_logits() -> None:
    """At most 0.6 of the three bare products, on the distribution that benchmarks/skipping.py describes."""
    hidden, weight, labels = peaked(256, 128, 32768)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    found = {}
    for skip_mass in (0.0, 2**-9):

        def step(skip_mass: float = skip_mass) -> None:
            loss = fp.linear_cpo_loss(h, w, labels, shift=False, skip_mass=skip_mass, logits_mean=None).loss
            loss.backward()

        found[skip_mass] = products(step, 2 * 256 * 128 * 32768)
    assert found[0.0] == pytest.approx(4)
    assert found[2**-9] <= 0.6 * 3


def test_least_budget_is_enough() -> None:
    batch = make_hidden(6, 5, 16, 70)
    batch.hidden.requires_grad_()
    keywords = {"skip_mass": 0.1, "logits_mean": None}
    with pytest.raises(ValueError, match="memory_budget must be at least") as refused:
        fp.linear_cpo_loss(batch.hidden, batch.weight, batch.labels, memory_budget=1, **keywords)
    least = int(str(refused.value).split("least ")[1].split()[0])
    fp.linear_cpo_loss(batch.hidden, batch.weight, batch.labels, memory_budget=least, **keywords)


def test_explanation() -> None:
    text = str(fp.explain("llama-3-8b", device="sm_90", skip_mass=2**-9))
    assert "plan skipping, fused," in text
    assert "mass of each of 8192 x 32 tiles of 4096 tokens" in text
    assert "1.00NDV if none needs any" in text
    assert "plan skipping on cpu" in str(fp.explain("llama-3-8b", device="cpu", skip_mass=0.0, gradients=["hidden"]))
    for other in ({"device": "xpu"}, {"gradients": []}, {"skip_mass": None}, {"device": "sm_90", "dtype": "float64"}):
        assert "plan skipping" not in str(fp.explain("llama-3-8b", **{"device": "cpu", "skip_mass": 0.1, **other}))
    with pytest.raises(ValueError, match="skip_mass"):
        fp.explain("llama-3-8b", skip_mass=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_predicted_peak(dtype: torch.dtype) -> None:
    """What the planner allows for is enough where nothing can be skipped, and not a third more than that."""
    batch = make_hidden(8, 65, 256, 16384, dtype=dtype, mask="none")
    batch.labels[:, :33] = IGNORE
    h, w = batch.hidden.requires_grad_(), batch.weight.requires_grad_()

    def step() -> None:
        fp.linear_cpo_loss(h, w, batch.labels, skip_mass=0.0).loss.backward()

    # The vendor's 16-bit products take their memory by the number of threads, which differs between test runs.
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        step()
        h.grad = w.grad = None
        measured = peak_bytes(step) - sum(tensor.numel() * tensor.element_size() for tensor in (h, w))
    finally:
        torch.set_num_threads(threads)
    sizes = {"tokens": 256, "positions": 520, "hidden": 256, "vocab": 16384, "sequences": 8}
    predicted = fp.explain(dtype=dtype, device="cpu", skip_mass=0.0, **sizes).peak_bytes
    assert measured <= predicted
    # Without AMX the vendor's library takes less memory for a product in bfloat16.
    if dtype != torch.bfloat16 or torch.cpu._is_amx_tile_supported():
        assert predicted <= 1.34 * measured
