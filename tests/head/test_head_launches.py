"""What a step of the linear head launches: no more for more rows, and with a bound on them it never waits."""

import pytest
from harness import make_hidden
from head_cases import only
from probes import launches

import fused_pref as fp
from fused_pref.ops.torch import chunk


@pytest.mark.slow
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("name", "wanted"),
    [("grouped", "hwb"), ("vocab_major", "hwb"), ("skipping", "hwb"), ("frozen_head", "h"), ("logprob", "")],
)
def test_a_bound_on_the_rows_spares_every_wait(name: str, wanted: str, kernel_device: str) -> None:
    """Two numbers of rows that elementwise work goes through in one block, with slices of the same width."""
    found = []
    for sequences in (2, 4):
        batch = make_hidden(sequences, 5, 16, 40, device=kernel_device, bias=True)
        parts = zip("hwb", (batch.hidden, batch.weight, batch.bias), strict=True)
        h, w, b = (part.requires_grad_(key in wanted) for key, part in parts)
        options = {"bias": b, "backend": "triton", "max_valid_tokens": 4 * sequences}
        options["skip_mass"] = 0.3 if name == "skipping" else None

        with only(name, fused=True, narrow=True), launches() as recorder:
            loss = fp.linear_cpo_loss(h, w, batch.labels, **options).loss
            if wanted:
                loss.backward()
        # On a CPU, where it costs nothing, the bound itself is checked.
        waits = ["aten._local_scalar_dense.default"] if kernel_device == "cpu" else []
        assert recorder.synchronising == waits
        found.append(recorder.names)
    assert found[0] == found[1]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("name", "wanted"), [("grouped", "hw"), ("vocab_major", "hw"), ("frozen_head", "h")])
def test_elementwise_work_is_not_launched_block_by_block(
    name: str, wanted: str, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states of one and of several blocks of elementwise work: kernels take them in one launch."""
    for block in ("CPU_BLOCK", "DEVICE_BLOCK"):
        monkeypatch.setattr(chunk, block, 20 * 16)
    found = []
    for sequences in (2, 6):
        batch = make_hidden(sequences, 9, 16, 40, device=kernel_device)
        h, w = batch.hidden.requires_grad_(), batch.weight.requires_grad_("w" in wanted)
        with only(name, fused=True, narrow=True), launches() as recorder:
            fp.linear_cpo_loss(h, w, batch.labels, backend="triton", logits_mean=None).loss.backward()
        found.append(len(recorder.names))
    assert found[0] == found[1]
