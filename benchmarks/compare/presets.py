"""Sizes by name, for a CPU and for a GPU."""

from dataclasses import dataclass

from fused_pref.testing.problems import Sizes

DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}


@dataclass(frozen=True)
class Preset:
    """Sizes to measure.

    Attributes:
        device: what they are for.
        summary: in words.
        sizes: of the problems.
        works: kinds of work.
        axis: which size varies, for the plots: ``"N"``, ``"V"`` or ``"D"``.
        dtypes: of the tensors; empty for those of the device.
        peers: names; empty for all.
    """

    device: str
    summary: str
    sizes: tuple[Sizes, ...]
    works: tuple[str, ...] = ("cpo",)
    axis: str | None = None
    dtypes: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()


def _gpu(summary: str, *sizes: Sizes, works: tuple[str, ...] = ("cpo",), axis: str | None = None) -> Preset:
    return Preset("cuda", summary, sizes, works, axis)


def _sweep(axis: str, *sizes: Sizes) -> Preset:
    # Without what compiles anew for every size.
    peers = ("fused_pref", "eager", "trl_chunked")
    return Preset("cpu", f"time and memory against {axis}", sizes, ("cpo",), axis, ("float32",), peers)


ALL = ("cpo", "frozen", "logps", "dpo", "simpo", "bco", "cross_entropy")
CPU, QWEN, LLAMA = Sizes(8, 128, 512, 32768, 0.25), Sizes(16, 512, 4096, 151936), Sizes(16, 512, 4096, 128256)
PRESETS = {
    "tiny": Preset("cpu", "seconds: for the tests", (Sizes(4, 16, 64, 1000, 0.25),), ("cpo", "frozen", "logps")),
    "cpu": Preset("cpu", "about a minute on 2 cores", (CPU,), ("cpo", "logps")),
    "cpu-readme": Preset(
        "cpu", "the README's table", (Sizes(8, 256, 1024, 32768, 0.25),), ("cpo", "frozen", "bco", "logps")
    ),
    "cpu-all": Preset("cpu", "every kind of work", (CPU,), ALL),
    "cpu-masked": Preset(
        "cpu", "0, 50 and 80% of the positions masked", tuple(Sizes(8, 128, 512, 32768, m) for m in (0.0, 0.5, 0.8))
    ),
    "cpu-peaked": Preset("cpu", "peaked logits", (Sizes(8, 128, 512, 32768, 0.25, "peaked"),)),
    "cpu-n": _sweep("N", *(Sizes(8, t, 256, 16384) for t in (64, 128, 256, 512))),
    "cpu-v": _sweep("V", *(Sizes(8, 128, 256, v) for v in (8192, 16384, 32768, 65536))),
    "cpu-d": _sweep("D", *(Sizes(8, 128, d, 16384) for d in (128, 256, 512, 1024))),
    "qwen3-8b": _gpu("D=4096, V=151936", QWEN, works=ALL),
    "llama-3-8b": _gpu("D=4096, V=128256", LLAMA, works=("cpo", "frozen", "logps", "cross_entropy")),
    "liger": _gpu(
        "Liger's sweep for CPO: 2 to 16 sequences of 1024",
        *(Sizes(s, 1024, 4096, 128256) for s in (2, 4, 8, 16)),
        axis="N",
    ),
    "gemma-2-2b": _gpu("D=2304, V=256000", Sizes(16, 512, 2304, 256000), works=("cpo", "logps")),
    "small-head": _gpu("D=1024, V=128256", Sizes(16, 512, 1024, 128256), works=("cpo", "logps")),
    "long": _gpu("65536 positions", Sizes(16, 4096, 4096, 128256)),
    "masked": _gpu(
        "0, 50 and 80% of the positions masked", *(Sizes(16, 512, 4096, 128256, m) for m in (0.0, 0.5, 0.8))
    ),
    "peaked": _gpu("peaked logits", Sizes(16, 512, 4096, 151936, 0.0, "peaked")),
    "n": _gpu("time and memory against N", *(Sizes(16, t, 4096, 128256) for t in (64, 128, 256, 512, 1024)), axis="N"),
    "v": _gpu(
        "time and memory against V", *(Sizes(16, 512, 4096, v) for v in (32768, 65536, 131072, 262144)), axis="V"
    ),
    "d": _gpu("time and memory against D", *(Sizes(16, 512, d, 128256) for d in (1024, 2048, 4096, 8192)), axis="D"),
}
DEFAULT = {"cpu": "cpu", "cuda": "qwen3-8b"}
