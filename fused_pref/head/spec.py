"""The constants of a call: the logits transform, and which label each position scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from typing_extensions import Self

from fused_pref import validate
from fused_pref.head.agreement import Agreement
from fused_pref.keywords import TokenKeywords, choices
from fused_pref.ranks import group_of

BACKENDS = choices(TokenKeywords, "backend")
LOGITS_MEANS = (*choices(TokenKeywords, "logits_mean"), None)


@dataclass(frozen=True)
class Transform:
    """Validated constants of z = softcap(logit_scale · x) / temperature, softcap(x) = c·tanh(x/c)."""

    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> "Transform":
        """From the shared keywords."""
        softcap, logit_scale = keywords["softcap"], keywords["logit_scale"]
        if validate.finite("logit_scale", logit_scale, "a finite number other than 0") == 0:
            raise validate.fail("logit_scale", "a finite number other than 0", logit_scale)
        return cls(
            softcap=None if softcap is None else validate.positive("softcap", softcap),
            logit_scale=float(logit_scale),
            temperature=validate.positive("temperature", keywords["temperature"]),
        )

    @property
    def identity(self) -> bool:
        """Whether z = x."""
        return self.softcap is None and self.logit_scale == self.temperature

    @property
    def slope(self) -> float:
        """∂z/∂x where it is a constant; 1 with a softcap, whose slope :meth:`chain_` applies entry by entry."""
        return 1.0 if self.softcap is not None else self.logit_scale / self.temperature

    def apply_(self, x: Tensor) -> Tensor:
        """Transform a block in place."""
        if self.softcap is not None:
            return x.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return x if self.identity else x.mul_(self.logit_scale / self.temperature)

    def chain_(self, dz: Tensor, x: Tensor) -> Tensor:
        """Turn a block of ∂/∂z into ∂/∂x in place; ``x`` holds the raw block, of any dtype, and is left alone.

        1 − tanh² is formed as 4u/(1+u)² with u = exp(−2|x|·scale/c), which does not cancel where the softcap saturates.
        """
        if self.softcap is not None:
            u = x.to(dz.dtype, copy=True).abs_().mul_(-2 * abs(self.logit_scale) / self.softcap).exp_()
            dz.mul_(u)
            dz.div_(u.add_(1).square_())
            return dz.mul_(4 * self.logit_scale / self.temperature)
        return dz if self.identity else dz.mul_(self.logit_scale / self.temperature)


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
            transform=Transform.of(keywords),
            logits_mean=validate.choice("logits_mean", keywords["logits_mean"], LOGITS_MEANS),
            cp_group=cp_group,
            **cls.own(keywords),
        )

    @classmethod
    def own(cls, keywords: Mapping[str, Any]) -> dict[str, Any]:
        """Constants that only some calls have."""
        return {}

    @property
    def constants(self) -> tuple[str, bool, int, float | None, float, float]:
        """What every op takes: backend, shift, ignore_index and the transform."""
        t = self.transform
        return self.backend, self.shift, self.ignore_index, t.softcap, t.logit_scale, t.temperature


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
    """Validated constants of a call on hidden states and a weight; None in ``memory_budget`` is its default."""

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
