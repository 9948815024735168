"""The constants of a call: the logits transform, and which label each position scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from typing_extensions import Self

from fused_pref import validate
from fused_pref.head.vocab_parallel import Agreement
from fused_pref.keywords import TokenKeywords, choices, defaults
from fused_pref.ops.interface import Transform
from fused_pref.ranks import group_of

BACKENDS = choices(TokenKeywords, "backend")
LOGITS_MEANS = (*choices(TokenKeywords, "logits_mean"), None)
TOKEN_DEFAULTS = defaults(TokenKeywords)


def transform_of(keywords: Mapping[str, Any]) -> Transform:
    """Softcap(logit_scale · x) / temperature with softcap(x) = c·tanh(x/c), from the shared keywords, validated."""
    given = {**TOKEN_DEFAULTS, **keywords}
    scale = validate.finite("logit_scale", given["logit_scale"], "a finite number other than 0")
    if scale == 0:
        raise validate.fail("logit_scale", "a finite number other than 0", given["logit_scale"])
    c = None if given["softcap"] is None else validate.positive("softcap", given["softcap"])
    temperature = validate.positive("temperature", given["temperature"])
    return Transform("linear", scale / temperature) if c is None else Transform("tanh", scale / c, c / temperature)


@dataclass(frozen=True)
class TokenSpec:
    """Validated constants of every call; ``backend`` becomes the one that is chosen."""

    backend: str
    shift: bool
    ignore_index: int
    transform: Transform
    logits_mean: str | None
    cp_group: Any

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> Self:
        """From the shared keywords."""
        validate.tensor_or_none("cu_seqlens", keywords["cu_seqlens"], "(S+1,)")
        cp_group = group_of("cp_group", keywords["cp_group"])
        if cp_group is not None and keywords["shift"] is not False:
            raise ValueError(
                "cp_group needs shift=False: a label may belong to a position of another rank; shift first"
            )
        return cls(
            backend=validate.choice("backend", keywords["backend"], BACKENDS),
            shift=validate.flag("shift", keywords["shift"]),
            ignore_index=validate.integer("ignore_index", keywords["ignore_index"]),
            transform=transform_of(keywords),
            logits_mean=validate.choice("logits_mean", keywords["logits_mean"], LOGITS_MEANS),
            cp_group=cp_group,
            **cls.own(keywords),
        )

    @classmethod
    def own(cls, keywords: Mapping[str, Any]) -> dict[str, Any]:
        """Constants that only some calls have."""
        return {}

    @property
    def constants(self) -> tuple[str, bool, int, str, float, float]:
        """What every op takes: backend, shift, ignore_index and the transform."""
        t = self.transform
        return self.backend, self.shift, self.ignore_index, t.activation, t.inner, t.outer


@dataclass(frozen=True)
class LogitsSpec(TokenSpec):
    """Validated constants of a call on logits."""

    inplace_backward: bool

    @classmethod
    def own(cls, keywords: Mapping[str, Any]) -> dict[str, Any]:
        """See :class:`fused_pref.keywords.LogitsKeywords`."""
        return {"inplace_backward": validate.flag("inplace_backward", keywords["inplace_backward"])}


@dataclass(frozen=True)
class LinearSpec(TokenSpec):
    """Validated constants of a call on hidden states and a weight; None in ``memory_budget`` is the default."""

    memory_budget: int | None
    max_valid_tokens: int | None
    skip_mass: float | None = None
    tp_group: Any = None
    tp_partial: bool = False

    @classmethod
    def own(cls, keywords: Mapping[str, Any]) -> dict[str, Any]:
        """See :class:`fused_pref.keywords.LinearKeywords`."""
        validate.tensor_or_none("bias", keywords["bias"], "(V,)")
        bounds = {"memory_budget": 1, "max_valid_tokens": 0}
        sizes = {name: validate.at_least(name, keywords[name], least, optional=True) for name, least in bounds.items()}
        skip_mass, group = keywords["skip_mass"], keywords["tp_group"]
        return {
            **sizes,
            "skip_mass": None if skip_mass is None else validate.within("skip_mass", skip_mass, 0, 1),
            "tp_group": group if isinstance(group, Agreement) else group_of("tp_group", group),
            "tp_partial": validate.flag("tp_partial", keywords["tp_partial"]),
        }
