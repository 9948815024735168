"""Bytes from memory that the order of a launch's tiles costs, by simulation.

Programs start in the order of their numbers, as many at once as the GPU holds, and go through their tiles, and through
the depth of each, in step. What they read goes through a cache of the GPU's size that forgets what was used the longest
ago. On an MI300X programs go in turn to eight dies, each of which has a cache of its own before the shared one.
"""

from collections import OrderedDict
from dataclasses import dataclass, replace

from benchmarks.static.gpus import GPUS, table
from fused_pref.ops.triton.configs import DEFAULTS
from fused_pref.ops.triton.gemm import vocabulary_splits

SHAPES = ((4096, 4096, 128256), (8192, 4096, 128256), (16384, 4096, 128256), (32768, 4096, 128256),
          (8192, 2304, 256000))  # fmt: skip


class Cache:
    """A cache that forgets the least recently used; ``missed`` is in bytes."""

    def __init__(self, size: int) -> None:
        self.size, self.held, self.missed = size, 0, 0
        self.entries: OrderedDict[tuple[int, int, int], int] = OrderedDict()

    def read(self, key: tuple[int, int, int], size: int) -> bool:
        """Whether it was there."""
        if key in self.entries:
            self.entries.move_to_end(key)
            return True
        self.missed += size
        self.entries[key] = size
        self.held += size
        while self.held > self.size:
            self.held -= self.entries.popitem(last=False)[1]
        return False


@dataclass(frozen=True)
class Order:
    """A launch of tiles.

    Attributes:
        blocks: of rows.
        tiles: of columns.
        splits: parts of the columns, each of which one program goes through.
        group: row blocks that share a split before the next ones begin.
        row_bytes, column_bytes: of a row block of the hidden states, and of a tile of the weight.
        run: consecutive programs that would go to the same die if their numbers were dealt out again; 0: they are not.
    """

    blocks: int
    tiles: int
    splits: int
    group: int
    row_bytes: int
    column_bytes: int
    run: int = 0

    def programs(self, dies: int) -> list[tuple[int, int]]:
        """Row block and split of each program: :func:`fused_pref.ops.triton.gemm.tile_order`, on the host."""
        return [self._place(number, dies) for number in range(self.blocks * self.splits)]

    def _place(self, number: int, dies: int) -> tuple[int, int]:
        window = dies * self.run
        if window and number < self.blocks * self.splits // window * window:
            first, place = number // window * window, number % window
            number = first + place % dies * self.run + place // dies
        band, place = divmod(number, self.group * self.splits)
        height = min(self.blocks - band * self.group, self.group)
        return band * self.group + place % height, place // height


def moved(order: Order, target: str, resident: int = 1, depths: int = 1) -> tuple[int, int]:
    """Bytes from memory, and bytes that the dies' own caches do not hold (of one die, the same).

    Args:
        order: of the tiles.
        target: architecture.
        resident: programs on a processor at once.
        depths: slices of the depth that programs go through in step; caches much smaller than a tile's operands need
            several.
    """
    gpu = GPUS[target]
    shared = Cache(DEFAULTS[target].cache)
    own = [Cache(gpu.die_cache) for _ in range(gpu.dies)] if gpu.dies > 1 else []
    programs, width = order.programs(gpu.dies), gpu.processors * resident
    steps, sizes = -(-order.tiles // order.splits), (order.row_bytes // depths, order.column_bytes // depths)
    for start in range(0, len(programs), width):
        wave = list(enumerate(programs[start : start + width], start))
        for step, depth in ((step, depth) for step in range(steps) for depth in range(depths)):
            for number, (block, split) in wave:
                tile = split * steps + step
                if tile < order.tiles:
                    for side, place in enumerate((block, tile)):
                        key = (side, place, depth)
                        if not own or not own[number % gpu.dies].read(key, sizes[side]):
                            shared.read(key, sizes[side])
    return shared.missed, sum(cache.missed for cache in own) if own else shared.missed


def chosen(target: str, rows: int, features: int, columns: int) -> Order:
    """The order of the statistics of bf16 rows on this GPU, as a launch has it."""
    tile, width = DEFAULTS[target].statistics, 2 * features
    blocks, tiles = -(-rows // tile.rows), -(-columns // tile.columns)
    sizes = (tile.group, tile.rows * width, tile.columns * width)
    splits = vocabulary_splits(blocks, tiles, GPUS[target].processors, *sizes, DEFAULTS[target].cache)
    return Order(blocks, tiles, splits, *sizes)


def steps_of(order: Order, processors: int) -> int:
    """Tiles that the last processor has done when it ends."""
    return -(-order.blocks * order.splits // processors) * -(-order.tiles // order.splits)


def fewest(order: Order, processors: int) -> Order:
    """The same with the fewest splits of those that end the soonest."""
    most = max(1, min(order.tiles, -(-8 * processors // order.blocks)))
    return min((replace(order, splits=n) for n in range(1, most + 1)), key=lambda one: steps_of(one, processors))


HEADER = ["GPU", "N", "D", "V", "fewest splits", "GiB", "splits", "GiB", "tile steps, of the fewest", "GiB to the dies",
          "with runs of 38"]  # fmt: skip
INTRODUCTION = """
Statistics of the linear head in bf16: what is read from memory with the fewest splits of the vocabulary that end the
soonest, and with those that a launch takes (`vocabulary_splits`: within 2% in tile steps, the least by an estimate).
With few splits all row blocks are at work at once, and where they do not fit into the cache each tile reads them again.
By simulation of the last cache alone. On an MI300X programs go to eight dies in turn; what their own caches do not hold
is less with that order than if each die got runs of consecutive programs, which is why the numbers of programs are left
as they are.
"""


def page(targets: list[str]) -> str:
    """What is assumed, and the table."""
    return INTRODUCTION + "\n" + table(HEADER, [_row(target, *shape) for target in targets for shape in SHAPES])


def _row(target: str, rows: int, features: int, columns: int) -> list[str]:
    gpu, order = GPUS[target], chosen(target, rows, features, columns)
    before = fewest(order, gpu.processors)
    steps = steps_of(order, gpu.processors) / steps_of(before, gpu.processors)
    dies = ["", ""]
    if gpu.dies > 1:
        # Of one slice of the vocabulary: every step is like the others.
        part = replace(order, tiles=min(order.tiles, 16 * order.splits))
        runs = (part, replace(part, run=gpu.processors // gpu.dies))
        dies = [_gibibytes(moved(one, target, depths=8)[1] * order.tiles // part.tiles) for one in runs]
    found = [_gibibytes(moved(one, target)[0]) for one in (before, order)]
    return [f"{gpu.name} ({target})", f"{rows}", f"{features}", f"{columns}", f"{before.splits}", found[0],
            f"{order.splits}", f"**{found[1]}**", f"{steps:.3f}", *dies]  # fmt: skip


def _gibibytes(number: int) -> str:
    return f"{number / 2**30:.1f}"
