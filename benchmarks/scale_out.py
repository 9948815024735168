"""What the linear head costs on 8, 64 and 512 GPUs, from the planner's model and counted bytes: nothing is measured.

``python -m benchmarks.scale_out`` prints the numbers of ``docs/distributed.md``.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from fused_pref.head.plans.planner import choose
from fused_pref.head.plans.problem import Problem
from fused_pref.ops.devices import GPUS

VOCABULARY, HIDDEN, TOKENS = 262_144, 8192, 8192
DEVICE = GPUS["sm_90"]
# Bytes per second that a GPU sends, and receives, inside of a node of 8 and between nodes: an H100's data sheet, and
# 400 Gb/s.
NODE, INSIDE, BETWEEN = 8, 4.5e11, 5.0e10
MIB = 2**20
# Bytes of what ranks exchange, and how many a rank gets of every other one in the forward: of a token what
# `head.parallel` merges, and what `head.engine.linear_means` adds up, the mean row of the weight and the mean bias.
FLOAT, STATISTICS, MEANS = 4, 3, HIDDEN + 1


@dataclass(frozen=True)
class Layout:
    """A way to put the head on ranks.

    Attributes:
        name: shown.
        shards: ranks that split the vocabulary.
        replicas: groups of them with other tokens.
        gathered: whether the weight is sharded at rest and gathered whole for a step (FSDP2).
    """

    name: str
    shards: int
    replicas: int
    gathered: bool = False

    @property
    def ranks(self) -> int:
        """GPUs."""
        return self.shards * self.replicas


def layouts(ranks: int) -> Iterator[Layout]:
    """The ways that are compared."""
    yield Layout(f"vocabulary over {ranks}", ranks, 1)
    if ranks > NODE:
        yield Layout(f"vocabulary over {NODE}, data over {ranks // NODE}", NODE, ranks // NODE)
    yield Layout(f"FSDP2 over {ranks}", 1, ranks, gathered=True)


def problem(shards: int) -> Problem:
    """CPO in bfloat16 on a shard of the vocabulary, every token scored, in 1 GiB or the bytes of dW."""
    columns = VOCABULARY // shards
    return Problem(
        tokens=TOKENS,
        positions=TOKENS,
        hidden=HIDDEN,
        vocabulary=columns,
        itemsize=2,
        weight_itemsize=2,
        gradients=frozenset(("hidden", "weight")),
        local=True,
        units=(TOKENS // 8,) * 8,
        budget=max(2**30, columns * HIDDEN * 2),
        device=DEVICE,
        gathered=False,
    )


def link(ranks: int) -> float:
    """Bytes per second of a ring over this many GPUs."""
    return INSIDE if ranks <= NODE else BETWEEN


def row(layout: Layout) -> str:
    """A line of the table, per rank and step."""
    plan = choose(problem(layout.shards))
    weight = VOCABULARY // layout.shards * HIDDEN * 2
    others = (layout.shards - 1) / layout.shards
    forward = (layout.shards - 1) * FLOAT * (STATISTICS * TOKENS + MEANS)
    # A ring sends every entry of the sum, dh in float32, twice.
    backward = 2 * others * FLOAT * TOKENS * HIDDEN
    seconds = (forward + backward) / link(layout.shards)
    data = (layout.replicas - 1) / layout.replicas
    if layout.gathered:
        # The weight comes for the forward, its gradient goes after the backward.
        forward, backward = data * weight, data * weight
        seconds = (forward + backward) / link(layout.replicas)
        held = 2 * weight // layout.replicas + 2 * weight
    else:
        held = 2 * weight
        # The gradients of the shard are averaged over the replicas, which are in other nodes.
        backward += 2 * data * weight
        seconds += 2 * data * weight / BETWEEN
    cells = (
        layout.name,
        f"{held / MIB:,.0f}",
        f"{plan.workspace / MIB:,.0f}",
        f"{plan.name}, {max(len(plan.bounds) - 1, 1)}",
        f"{forward / MIB:,.1f}",
        f"{backward / MIB:,.1f}",
        f"{plan.seconds * 1e3:.2f}",
        f"{seconds * 1e3:.2f}",
        f"{TOKENS * layout.replicas / (plan.seconds + seconds) / layout.ranks / 1e3:,.0f}",
    )
    return f"| {' | '.join(cells)} |"


HEADER = (
    "layout",
    "weight and gradient, MiB",
    "workspace, MiB",
    "plan, groups",
    "sent forward, MiB",
    "sent backward, MiB",
    "products, ms",
    "sending, ms",
    "thousand tokens/s/GPU",
)


def main() -> None:
    """Print the tables."""
    for ranks in (8, 64, 512):
        print(f"\n{ranks} GPUs\n")
        print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
        for layout in layouts(ranks):
            print(row(layout))
    print(f"\n{limit()}")


def limit() -> str:
    """Where sending dh takes as long as multiplying."""
    per_column = 6 * HIDDEN / DEVICE.rates[2]
    columns = 8 * HIDDEN / per_column
    inside, between = (columns / speed for speed in (INSIDE, BETWEEN))
    return (
        f"Summing dh takes as long as the three products where a rank holds {inside:,.0f} tokens inside of a node, "
        f"{between:,.0f} between nodes, whatever N and D."
    )


if __name__ == "__main__":
    main()
