"""Which plan a linear head takes: a pure function of sizes, what is wanted, the budget and the device.

Five plans turn hidden states (N, D) and a weight (V, D) into log-probs and gradients without the (N, V) logits:

- ``logprob``: no gradient; a slice of the vocabulary at a time. One product.
- ``frozen_head``: only the hidden states are trained. Groups of rows leave U = (onehot − softmax) W in the forward,
  the backward scales it. Two products, whatever the objective.
- ``grouped``: the coefficient of a token depends on its own pair (or sequence) alone, so that groups of whole pairs
  get their gradients in the forward. Three products.
- ``vocab_major``: everything else. The forward keeps the row statistics and some slices of the logits; the backward
  recomputes the other slices and finishes the rows of dW that belong to each. Three to four products.
- ``skipping``: asked for by ``skip_mass``, whatever the objective. ``vocab_major`` with nothing kept, whose backward
  leaves out what weighs next to nothing (:mod:`fused_pref.head.skipping`). One to four products.

A product is 2·N·D·V operations. The workspace is what is alive beyond inputs, gradients and (S, T) results. Each plan
has a *fused* form where Triton runs: the kernel that multiplies also updates the row statistics, tile by tile, so
that no raw logits are written. It pays where passes over memory cost more than the kernel's epilogue.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fused_pref.ops.devices import Device

# What can be differentiated, in the order of the arguments.
GRADIENTS = ("hidden", "weight", "bias")
# Plans within this factor of the cheapest are alike: the smallest of them is taken.
ALIKE = 1.02
# Slices and groups are multiples of this, so that only the last tile of a product is cut.
TILE = 256


@dataclass(frozen=True)
class Problem:
    """A call of the head.

    Attributes:
        tokens: N, rows to project.
        positions: of the hidden states, scored or not.
        hidden: D.
        vocabulary: V.
        itemsize: bytes of an entry of hidden states and weight as they enter the products.
        weight_itemsize: bytes of an entry of dW.
        gradients: which of ``"hidden"``, ``"weight"``, ``"bias"`` are wanted.
        local: whether the coefficients of a unit depend on that unit alone and are known in the forward.
        units: rows of each pair (or sequence) that a group must not cut; empty if not known.
        late_scale: whether dW stays float32 until the upstream gradient is known (float16, which would underflow).
        gathered: whether the rows are copied out of the hidden states.
        unscored: rows that are projected for the means of the logits alone, before anything else.
        cast_weight: bytes of the weight's copy in the dtype of the products (autocast), 0 if none.
        fused: whether the fused kernels can be taken.
        wide_range: whether the entries' dtype reaches as far as float32, as exponentials do.
        indexed: whether a fused product can read the rows in place.
        skip: whether the backward may leave out tiles of the vocabulary.
        budget: bytes of workspace allowed.
        promised: whether the caller set the budget, which then holds or raises; if not, it gives way.
        device: constants.
    """

    tokens: int
    positions: int
    hidden: int
    vocabulary: int
    itemsize: int
    weight_itemsize: int
    gradients: frozenset[str]
    local: bool
    units: tuple[int, ...]
    budget: int
    device: Device
    late_scale: bool = False
    gathered: bool = True
    unscored: int = 0
    cast_weight: int = 0
    fused: bool = False
    wide_range: bool = True
    indexed: bool = False
    skip: bool = False
    promised: bool = True

    @property
    def logits_itemsize(self) -> int:
        """Bytes of an entry of the logits at work."""
        return max(self.itemsize, 4) if self.device.mixed else self.itemsize

    @property
    def narrow(self) -> bool:
        """Whether products of 16-bit entries come out in 16 bits, too."""
        return self.itemsize == 2 and not self.device.mixed

    @property
    def partial(self) -> int:
        """Bytes of an entry of a product that is then added in float32 (0: it is added in place)."""
        return (4 if self.late_scale else self.itemsize) if self.narrow else 0

    @property
    def scaled_itemsize(self) -> int:
        """Bytes of an entry of the rows that dW is a product with."""
        return 4 if self.late_scale and not self.device.mixed else self.itemsize

    def upcast(self, rows: int, features: int) -> int:
        """Bytes of a block of operands that is made float32 for a product (float16 where there is no mixed one)."""
        block = min(self.device.columns, rows) + features
        return 4 * block * min(self.device.columns, self.vocabulary) if self.late_scale and not self.device.mixed else 0

    def transposed(self, rows: int, columns: int) -> int:
        """Bytes of a block of logits that is copied into rows of the vocabulary for dW (bfloat16 on a CPU)."""
        turns = self.narrow and not self.late_scale and "weight" in self.gradients
        return rows * min(columns, self.device.columns) * self.itemsize if turns else 0

    def labels(self, rows: int, itemsize: int) -> int:
        """Bytes of the sums of the targets' parts of a dW of this itemsize, which is rounded after they are added."""
        apart = self.narrow and itemsize == 2 and "weight" in self.gradients
        return 4 * min(rows, self.vocabulary) * self.hidden if apart else 0

    def copied(self, rows: int) -> int:
        """Bytes of gathered rows."""
        return rows * self.hidden * self.itemsize if self.gathered else 0

    def q_itemsize(self, fused: bool) -> int:
        """Bytes of an entry of the chunk that the gradients' products read; not fused, raw logits came first."""
        return self.itemsize if fused else self.logits_itemsize

    def product_seconds(self, rows: int, columns: int, products: tuple[str, ...]) -> float:
        """Time of these products on ``rows`` × ``columns`` logits, weight and rows read once for each."""
        entries = {"logits": rows * columns, "hidden": rows * self.hidden, "weight": columns * self.hidden}
        operations = 2 * rows * columns * self.hidden
        narrow = min(self.device.columns, self.vocabulary) / columns
        slow = sum(max(1.0, narrow, self.device.outputs / max(entries[product], 1)) for product in products)
        moved = len(products) * (rows + columns) * self.hidden * self.itemsize
        return operations * slow / self.device.rates[self.itemsize] + moved / self.device.bandwidth

    def chunk_seconds(self, rows: int, columns: int) -> float:
        """Time of a chunk's passes over memory: raw logits written, read, and written over."""
        return 3 * rows * columns * self.logits_itemsize / self.device.bandwidth

    def fused_seconds(self, rows: int, columns: int, *, written: bool) -> float:
        """Time that a fused product adds to multiplying: its epilogue, and the result if it is written."""
        moved = rows * columns * self.itemsize if written else 0
        seconds = rows * columns * self.device.epilogue + moved / self.device.bandwidth
        if self.itemsize > 2:
            # Exact products of float32 need small tiles: a quarter of the vendor's speed.
            seconds += 3 * self.product_seconds(rows, columns, ("logits",))
        return seconds

    def pass_seconds(self, rows: int, columns: int, *, fused: bool) -> float:
        """Time that statistics and Q of these logits add to multiplying, at once."""
        if fused:
            return self.fused_seconds(rows, columns, written=True)
        return self.chunk_seconds(rows, columns)


@dataclass(frozen=True)
class Plan:
    """How a head call is computed.

    Attributes:
        name: see the module.
        rows: rows of the largest group.
        columns: vocabulary columns of a slice.
        bounds: unit numbers at which the groups begin, and their end; empty where rows are cut anywhere.
        kept: slices of logits kept from the forward for the backward.
        fused: whether the product that makes the logits is fused; kept slices never are.
        products: matrix products in units of 2·N·D·V operations.
        workspace: predicted peak bytes beyond inputs, gradients and results.
        seconds: predicted time.
    """

    name: str
    rows: int
    columns: int
    products: float
    workspace: int
    seconds: float
    bounds: tuple[int, ...] = ()
    saved: int = 0
    fused: bool = False


@functools.lru_cache(maxsize=1024)
def choose(problem: Problem) -> Plan:
    """The cheapest plan within the budget; of plans about as cheap, the smallest.

    A budget that the caller did not set gives way to the least that is possible and a quarter more: the very smallest
    plans work a row or a column at a time, and take thousands of times as long as those of a little more.

    Raises:
        ValueError: no plan fits a budget that the caller set; the message says the least that would do.
    """
    least = least_budget(problem)
    if least > problem.budget and problem.promised:
        raise ValueError(
            f"memory_budget must be at least {least} bytes for N={problem.tokens} tokens, "
            f"D={problem.hidden}, V={problem.vocabulary}; got {problem.budget}"
        )
    allowed = problem.budget if problem.promised else max(problem.budget, least + least // 4)
    fitting = [plan for plan in candidates(problem) if plan.workspace <= allowed]
    cheapest = min(plan.seconds for plan in fitting)
    alike = [plan for plan in fitting if plan.seconds <= ALIKE * cheapest]
    return min(alike, key=lambda plan: (plan.workspace, plan.seconds))


def least_budget(problem: Problem) -> int:
    """Bytes below which no plan fits."""
    return max(_unscored_least(problem), min(plan.workspace for plan in candidates(problem)))


def _unscored_least(problem: Problem) -> int:
    if not problem.unscored:
        return 0
    alone = replace(problem, tokens=problem.unscored, gradients=frozenset(), unscored=0)
    return min(plan.workspace for plan in candidates(alone))


def candidates(problem: Problem) -> Iterator[Plan]:
    """Every plan that computes what is wanted."""
    if not problem.gradients:
        yield from _logprob(problem)
    elif problem.skip:
        yield from _skipping(problem)
    elif problem.gradients == {"hidden"}:
        yield from _frozen_head(problem)
    else:
        if problem.local:
            yield from _grouped(problem)
        yield from _vocab_major(problem)


def cuts(length: int, multiple: int) -> list[int]:
    """Sizes of about equal parts of ``length``, the number of parts growing by a half or a third; ``multiple``s."""
    sizes, parts = [], 1
    while parts <= length:
        even = -(-length // parts)
        sizes.append(min(length, -(-even // multiple) * multiple) if even > multiple else even)
        parts = max(parts + 1, parts * 3 // 2 if parts & (parts - 1) == 0 else 1 << parts.bit_length())
    return sorted({*sizes, min(length, 1)}, reverse=True)


def _logprob(p: Problem) -> Iterator[Plan]:
    least = p.device.scratch + p.cast_weight
    for rows in cuts(p.tokens, TILE):
        for columns in cuts(p.vocabulary, TILE):
            rounds = _rounds(p.tokens, rows) * _rounds(p.vocabulary, columns)
            workspace = p.copied(rows) + rows * columns * p.logits_itemsize + least
            seconds = rounds * (p.product_seconds(rows, columns, ("logits",)) + p.chunk_seconds(rows, columns))
            yield Plan("logprob", rows, columns, 1.0, workspace, seconds)
    if p.fused:
        rows, columns = p.tokens, p.vocabulary
        workspace = least + (0 if p.indexed else p.copied(rows))
        seconds = p.product_seconds(rows, columns, ("logits",)) + p.fused_seconds(rows, columns, written=False)
        yield Plan("logprob", rows, columns, 1.0, workspace, seconds, fused=True)


def _frozen_head(p: Problem) -> Iterator[Plan]:
    saved = p.tokens * p.hidden * max(p.itemsize, 4)
    for fused in _at_once(p):
        for rows in cuts(p.tokens, TILE):
            group = rows * p.vocabulary * p.q_itemsize(fused) + p.copied(rows) + p.upcast(rows, p.hidden)
            group += rows * p.hidden * max(p.itemsize, p.partial)
            seconds = p.product_seconds(rows, p.vocabulary, ("logits", "hidden"))
            seconds = _rounds(p.tokens, rows) * (seconds + p.pass_seconds(rows, p.vocabulary, fused=fused))
            workspace = saved + group + p.device.scratch + p.cast_weight
            yield Plan("frozen_head", rows, p.vocabulary, 2.0, workspace, seconds, fused=fused)


def _at_once(p: Problem) -> tuple[bool, ...]:
    """Forms in which statistics and Q can come from one product: fused, Q waits for its sum as an exponential."""
    return (False, True) if p.fused and p.wide_range else (False,)


def _gradient_products(p: Problem) -> tuple[str, ...]:
    return tuple(name for name in ("hidden", "weight") if name in p.gradients)


def _grouped(p: Problem) -> Iterator[Plan]:
    products = ("logits", *_gradient_products(p))
    for fused, bounds in itertools.product(_at_once(p), list(_groupings(p))):
        groups = [sum(p.units[a:b]) for a, b in itertools.pairwise(bounds)] or [p.tokens]
        rows = max(groups)
        single = len(groups) == 1
        # dW is its own accumulator where its dtype is that of the sums.
        direct = not p.late_scale and (p.weight_itemsize >= 4 or single)
        workspace = rows * p.vocabulary * p.q_itemsize(fused) + p.copied(rows) + p.upcast(rows, p.hidden)
        weight = hidden = 0
        if "weight" in p.gradients:
            workspace += 0 if direct else 4 * p.vocabulary * p.hidden
            partial = 0 if single and direct else p.partial * min(p.vocabulary, p.device.columns) * p.hidden
            weight = rows * p.hidden * p.scaled_itemsize + partial + p.transposed(rows, p.vocabulary)
            weight = max(weight, p.labels(rows, p.weight_itemsize if direct else 4))
        if "hidden" in p.gradients:
            # float32 hidden gradients wait for the upstream one beside those in the dtype of the hidden states.
            workspace += 4 * p.positions * p.hidden if p.late_scale else 0
            hidden = rows * p.hidden * max(p.itemsize, 4 if p.device.mixed or p.late_scale else 0)
        workspace += max(weight, hidden) + p.device.scratch + p.cast_weight
        seconds = 0.0 if single else (len(groups) - 1) * 8 * p.vocabulary * p.hidden / p.device.bandwidth
        for n in groups:
            seconds += p.product_seconds(n, p.vocabulary, products) + p.pass_seconds(n, p.vocabulary, fused=fused)
        yield Plan("grouped", rows, p.vocabulary, float(len(products)), workspace, seconds, bounds, fused=fused)


def _groupings(p: Problem) -> Iterator[tuple[int, ...]]:
    """Unit numbers where groups begin, for several target sizes; one group alone if the units are not known."""
    if not p.units:
        yield ()
        return
    seen = set()
    for rows in cuts(p.tokens, TILE):
        bounds, filled = [0], 0
        for unit, size in enumerate(p.units):
            if filled and filled + size > rows:
                bounds.append(unit)
                filled = 0
            filled += size
        bounds.append(len(p.units))
        if tuple(bounds) not in seen:
            seen.add(tuple(bounds))
            yield tuple(bounds)


def _vocab_major(p: Problem) -> Iterator[Plan]:
    gradients = _gradient_products(p)
    hidden, weight = "hidden" in gradients, "weight" in gradients
    row = p.tokens * p.hidden
    sums = row * max(p.itemsize, 4) if hidden else 0
    fixed = p.copied(p.tokens) + p.device.scratch + p.cast_weight + p.upcast(p.tokens, p.hidden)
    for columns, fused in itertools.product(cuts(p.vocabulary, TILE), (False, True) if p.fused else (False,)):
        count = _rounds(p.vocabulary, columns)
        chunk = p.tokens * columns * p.logits_itemsize
        partial = p.partial * columns * p.hidden if weight and p.weight_itemsize > 2 else 0
        late = max(p.partial * row if hidden else 0, partial + p.transposed(p.tokens, columns))
        backward = (row * p.scaled_itemsize if weight else 0) + sums + late
        # A slice that is kept, and one that is computed again.
        seconds = p.product_seconds(p.tokens, columns, ("logits", *gradients)) + p.chunk_seconds(p.tokens, columns)
        twice = p.product_seconds(p.tokens, columns, ("logits", "logits", *gradients))
        if fused:
            twice += p.fused_seconds(p.tokens, columns, written=False)
            twice += p.fused_seconds(p.tokens, columns, written=True)
        else:
            twice += 2 * p.chunk_seconds(p.tokens, columns)
        steps = range(9) if columns >= min(p.device.columns, p.vocabulary) else range(1)
        for saved in sorted({count * part // 8 for part in steps}):
            again = count - saved
            if fused and not again:
                continue
            workspace = fixed + saved * chunk + backward + (p.tokens * columns * p.q_itemsize(fused) if again else 0)
            workspace = max(workspace, fixed + sums + p.labels(p.tokens, p.weight_itemsize))
            time = saved * seconds + again * twice
            products = 1 + len(gradients) + again / count
            yield Plan("vocab_major", p.tokens, columns, products, workspace, time, saved=saved, fused=fused)


def _skipping(p: Problem) -> Iterator[Plan]:
    """``vocab_major`` in tiles no wider than they must be; its products and time are what skipping nothing would take.

    Beside its workspace: the rows that need a tile, and for each row and tile statistics, mass, and order by mass.
    """
    row = p.tokens * p.hidden
    selected = row * (p.itemsize + (max(p.itemsize, 4) if "hidden" in p.gradients else 0))
    for plan in _vocab_major(p):
        if plan.saved == 0 and plan.fused == p.fused and plan.columns <= p.device.columns:
            tiles = 48 * _rounds(p.vocabulary, plan.columns) * p.tokens
            seconds = plan.seconds if p.tokens else 0.0
            yield replace(plan, name="skipping", workspace=plan.workspace + selected + tiles, seconds=seconds)


def _rounds(length: int, size: int) -> int:
    return -(-length // max(size, 1))
