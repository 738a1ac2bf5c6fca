"""`python -m benchmarks.scaling`: the tables of docs/scale.md.

Memory, communication and time per rank at sizes that nobody has run here, computed from
formulas and from ratios that were measured at sizes that run anywhere; docs/scale.md
says of each where it is from. With `--measure` the ratios of full weights are measured.

Symbols: M elements of the model, M_e those of embedding and output layer, l those of one
layer, P those that are trained, R ranks.
"""

import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.models import (
    ALL_SEVEN,
    MIDDLE,
    QWEN_15B,
    RANK,
    Lengths,
    Shape,
    make_base,
    make_direction,
    make_passes,
    make_shard,
    with_adapter,
)
from benchmarks.passes import pulled_back
from entropy_ddp.config.schema import Compute
from entropy_ddp.model.scoring import Passes
from entropy_ddp.probe.memory import _WIDTHS

COSTS = Path(__file__).parent.parent / "docs" / "cost.md"
BYTES = 4  # of an element: everything is float32
GPU_BYTES = 80e9
RANKS = (8, 64, 1024)
# Assumed, not measured: float32 operations that an H100 sustains in a second, and bytes
# that a GPU receives in a second from other machines.
OPERATIONS_PER_SECOND, BYTES_PER_SECOND = 30e12, 50e9
TOKENS_PER_MICROBATCH = Compute().tokens_per_microbatch
# At most: blocks of attention, and logits of some tokens.
WORKSPACE_BYTES = 1e9
# Measured here with full weights (`--measure`): passes over score.
FULL_ORDER_1, FULL_PULL_BACK = 2.96, 3.13
# Seconds of a token id read from JSON lines, and of one with its log-probability; bytes
# of its id and of its numbers in memory, and of a sequence on every rank. Measured.
READ_SECONDS, READ_LOGPROB_SECONDS = 0.27e-6, 0.74e-6
ID_BYTES, TOKEN_BYTES, SEQUENCE_BYTES = 8, 48, 2500
# E: sequences and tokens of each; U has as long ones.
SIZES = ((10_000, 1_000), (100_000, 1_000), (1_000_000, 10_000))
UPDATE_SEQUENCES = 1024


@dataclass(frozen=True, kw_only=True)
class Model:
    """A transformer whose layers have three matrices of `intermediate` and four others."""

    name: str
    shape: Shape
    tied: bool

    @property
    def key_width(self) -> int:
        """Width of keys, and of values."""
        return self.shape.hidden // self.shape.heads * self.shape.kv_heads

    @property
    def layer(self) -> int:
        """l: elements of a layer's matrices."""
        hidden, wide = self.shape.hidden, self.shape.intermediate
        return hidden * (2 * hidden + 2 * self.key_width + 3 * wide)

    @property
    def outer(self) -> int:
        """M_e."""
        return self.shape.vocabulary * self.shape.hidden * (1 if self.tied else 2)

    @property
    def elements(self) -> int:
        """M, without norms and biases."""
        return self.shape.layers * self.layer + self.outer

    @property
    def adapter(self) -> int:
        """P of LoRA on all seven matrices."""
        hidden, wide = self.shape.hidden, self.shape.intermediate
        widths = 2 * 2 * hidden + 2 * (hidden + self.key_width) + 3 * (hidden + wide)
        return self.shape.layers * RANK * widths

    @property
    def widest(self) -> int:
        """Width of the widest layer of the body."""
        return max(self.shape.intermediate, self.shape.hidden)


MODELS = (
    Model(name="1.5B", shape=QWEN_15B, tied=True),
    Model(
        name="7B",
        shape=Shape(
            hidden=3584, intermediate=18_944, layers=28, heads=28, kv_heads=4,
            vocabulary=152_064,
        ),
        tied=False,
    ),
    Model(
        name="70B",
        shape=Shape(
            hidden=8192, intermediate=28_672, layers=80, heads=64, kv_heads=8,
            vocabulary=128_256,
        ),
        tied=False,
    ),
    Model(
        name="405B",
        shape=Shape(
            hidden=16_384, intermediate=53_248, layers=126, heads=128, kv_heads=8,
            vocabulary=128_256,
        ),
        tied=False,
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run:
    """A model, what of it is trained, and what the ranks divide among them."""

    model: Model
    trained: str
    shard: str

    @property
    def parameters(self) -> int:
        """P."""
        is_adapter = self.trained == "LoRA"
        return self.model.adapter if is_adapter else self.model.elements

    def device_bytes(self, ranks: int) -> float:
        """On the GPU of a rank, without a pass: weights, moments, a direction."""
        m, outer, layer = self.model.elements, self.model.outer, self.model.layer
        if self.shard == "none":
            moments_and_direction = 3 * BYTES * self.parameters
            return BYTES * m + moments_and_direction
        if self.shard == "base":
            whole = BYTES * outer + 12 * self.parameters
            # The layer that runs, and the one that is gathered meanwhile.
            return BYTES * (m - outer) / ranks + whole + 2 * BYTES * layer
        # A layer is there twice while it is gathered, and the outer ones three times.
        return 16 * m / ranks + 2 * BYTES * layer + 3 * BYTES * outer

    def host_bytes(self, ranks: int) -> float:
        """On the host, of a rank: gradient, change, and the way back from the step."""
        parts = ranks if self.shard == "full" else 1
        return 20 * self.parameters / parts

    def saved_bytes(self) -> float:
        """What a backward pass keeps of a position; fitted, exact to a part in 1e5."""
        shape = self.model.shape
        # Of a layer: widths of `hidden`, and a few values; of the last norm.
        is_adapter = self.trained == "LoRA"
        widths, values, last = (6.03, 114, 0) if is_adapter else (8.03, 2.6, 2)
        layer = widths * shape.hidden + values + 2 * self.model.key_width
        layer += 4 * shape.intermediate
        return BYTES * (shape.layers * layer + last * shape.hidden)

    def longest(self, ranks: int, backward: bool) -> int:
        """Tokens of the longest row that the memory left on a GPU is enough for."""
        left = GPU_BYTES - self.device_bytes(ranks)
        left -= WORKSPACE_BYTES
        each = self.saved_bytes() if backward else _WIDTHS * BYTES * self.model.widest
        return max(0, int(left / each))

    def operations(self, length: int) -> float:
        """Of the matrix products of a plain forward pass, for each position."""
        shape = self.model.shape
        products = self.model.elements - (
            0 if self.model.tied else self.model.outer / 2
        )
        return 2 * products + 2 * shape.layers * shape.hidden * length

    def pass_ratios(self) -> tuple[float, float]:
        """What an order-1 pass and a backward pass cost over a forward one."""
        if self.trained == "LoRA":
            return measured("order 1, qwen2"), measured("pull_back, qwen2")
        return FULL_ORDER_1, FULL_PULL_BACK

    def seconds(self, ranks: int, sequences: int, length: int) -> float:
        """Of the passes of a probe with second order, on each rank."""
        order_1, pull_back = self.pass_ratios()
        on_evaluation = (1 + 2 * order_1) * sequences * length
        on_update = pull_back * UPDATE_SEQUENCES * length
        operations = self.operations(length) * (on_evaluation + on_update)
        return operations / ranks / OPERATIONS_PER_SECOND

    def gathered_bytes(self, kind: str) -> float:
        """What a rank receives for a microbatch of a pass: forward, order 1, backward.

        The part that it has itself is counted too: less than an eighth of the whole.
        """
        m = self.model.elements
        if self.shard == "none":
            return 0.0
        if self.shard == "base":
            times = {"forward": 1, "order 1": 1, "backward": 2}
            return times[kind] * BYTES * (m - self.model.outer)
        # Tangents too; gathered twice and reduced once.
        return {"forward": 1, "order 1": 2, "backward": 3}[kind] * BYTES * m

    def gather_share(self, kind: str, length: int) -> float:
        """Seconds of a microbatch's gathers over those of its products."""
        positions = max(TOKENS_PER_MICROBATCH, length)
        order_1, pull_back = self.pass_ratios()
        ratio = {"forward": 1.0, "order 1": order_1, "backward": pull_back}[kind]
        products = ratio * positions * self.operations(length) / OPERATIONS_PER_SECOND
        return self.gathered_bytes(kind) / BYTES_PER_SECOND / products


def measured(part: str) -> float:
    """The median of a row of the table in docs/cost.md."""
    found = re.search(
        rf"^\| {re.escape(part)} \|.*?\*\*([\d.]+)\*\*", COSTS.read_text(), re.MULTILINE
    )
    assert found is not None, part
    return float(found[1])


def runs(sharded: bool) -> list[Run]:
    """Every model with LoRA and with full weights, in parts or whole."""
    shards = {"LoRA": "base", "full": "full"}
    return [
        Run(model=model, trained=trained, shard=shard if sharded else "none")
        for trained, shard in shards.items()
        for model in MODELS
    ]


def amount(size: float) -> str:
    """Two digits, or all before the point."""
    if 0 < size < 0.01:
        return "< 0.01"
    if size >= 100:
        return f"{size:,.0f}"
    return f"{size:.2g}" if size < 10 else f"{size:.0f}"


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days."""
    for limit, divisor, unit in ((90, 1, "s"), (5400, 60, "min"), (129_600, 3600, "h")):
        if seconds < limit:
            return f"{amount(seconds / divisor)} {unit}"
    return f"{amount(seconds / 86_400)} d"


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown; the first two columns are names."""
    heads = list(headings)
    lines = [heads, ["---"] * 2 + ["---:"] * (len(heads) - 2), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def models_table() -> str:
    """What the models are, in billions of elements."""

    def row(model: Model) -> Iterator[str]:
        shape = model.shape
        yield model.name
        yield f"{shape.layers} × {shape.hidden:,}"
        yield f"{shape.intermediate:,}"
        yield f"{shape.vocabulary:,}"
        for count in (model.elements, model.outer, model.layer, model.adapter):
            yield f"{count / 1e9:.3g}"

    headings = ("model", "layers × width", "intermediate", "vocabulary")
    return table([*headings, "M", "M_e", "l", "P of LoRA"], map(row, MODELS))


def memory_table() -> str:
    """GB of a rank: on its GPU without a pass, and on the host."""

    def cell(size: float, limit: float = math.inf) -> str:
        return f"{amount(size / 1e9)}" + ("*" if size > limit else "")

    def row(whole: Run, parts: Run) -> Iterator[str]:
        yield whole.model.name
        yield whole.trained
        yield cell(whole.device_bytes(1), GPU_BYTES)
        yield from (cell(parts.device_bytes(r), GPU_BYTES) for r in RANKS)
        yield cell(whole.host_bytes(1))
        yield from (cell(parts.host_bytes(r)) for r in RANKS)

    headings = ["model", "trained", "GPU, whole", *(f"in {r:,} parts" for r in RANKS)]
    headings += ["host, whole", *(f"in {r:,} parts" for r in RANKS)]
    return table(headings, map(row, runs(sharded=False), runs(sharded=True)))


def longest_table() -> str:
    """Tokens of the longest row of U and of E."""

    def row(run: Run) -> Iterator[str]:
        yield run.model.name
        yield run.trained
        yield amount(run.saved_bytes() / 1e6)
        yield from (f"{run.longest(r, backward=True):,}" for r in RANKS)
        yield from (f"{run.longest(r, backward=False):,}" for r in RANKS)

    headings = ["model", "trained", "MB of a position, backward"]
    headings += [f"U, {r:,} GPUs" for r in RANKS] + [f"E, {r:,} GPUs" for r in RANKS]
    return table(headings, map(row, runs(sharded=True)))


def time_table() -> str:
    """Time of the passes of a probe."""

    def row(run: Run) -> Iterator[str]:
        yield run.model.name
        yield run.trained
        for sequences, length in SIZES:
            for ranks in RANKS:
                fits = run.longest(ranks, backward=True) >= length
                spent = duration(run.seconds(ranks, sequences, length))
                yield spent + ("" if fits else "†")

    headings = ["model", "trained"]
    headings += [
        f"10^{math.log10(n):.0f} × {t:,}, {r:,} GPUs" for n, t in SIZES for r in RANKS
    ]
    return table(headings, map(row, runs(sharded=True)))


def communication_table() -> str:
    """What a rank receives, and how long beside the products that wait for it."""
    kinds = ("forward", "order 1", "backward")

    def row(run: Run) -> Iterator[str]:
        yield run.model.name
        yield f"{run.trained}, {run.shard}"
        yield (
            amount(2 * 2 * BYTES * run.parameters / 1e9) if run.shard != "full" else "0"
        )
        yield from (amount(run.gathered_bytes(kind) / 1e9) for kind in kinds)
        shares = [run.gather_share(kind, 1000) for kind in kinds]
        yield from (f"{share:.0%}" for share in shares)

    headings = ["model", "trained, in parts", "buffers, once"]
    headings += [f"{kind}, a microbatch" for kind in kinds]
    headings += [f"of {kind}'s time" for kind in kinds]
    return table(headings, map(row, runs(sharded=True)))


def reading_table() -> str:
    """What E costs a rank, whatever the model."""

    def row(sequences: int, length: int, ranks: int) -> Iterator[str]:
        tokens = sequences * length
        yield f"10^{math.log10(sequences):.0f} × {length:,}"
        yield f"{ranks:,}"
        yield duration(READ_SECONDS * tokens)
        yield duration(READ_SECONDS * tokens / ranks)
        yield amount(ID_BYTES * tokens / 1e9)
        yield amount(ID_BYTES * tokens / ranks / 1e9)
        yield amount(TOKEN_BYTES * tokens / ranks / 1e9)
        yield amount(SEQUENCE_BYTES * sequences / 1e9)

    headings = ("E", "GPUs", "reading, all of E", "its share", "GB of ids, all of E",
                "its own", "of numbers of its tokens", "of tables of sequences")  # fmt: skip
    return table(headings, (row(n, t, r) for n, t in SIZES for r in RANKS))


TABLES: dict[str, Callable[[], str]] = {
    "models": models_table,
    "memory": memory_table,
    "longest rows": longest_table,
    "time": time_table,
    "communication": communication_table,
    "E": reading_table,
}


def measured_ratios(passes: Passes, repeats: int = 5) -> dict[str, float]:
    """Medians of CPU seconds over those of score: an order-1 and a backward pass."""
    shard = make_shard(Lengths(groups=12, prompt=8, response=120), MIDDLE.vocabulary)
    direction = make_direction(passes)
    ratios: dict[str, list[float]] = {"order 1": [], "pull_back": []}
    for _ in range(repeats + 1):
        score = cpu_seconds(lambda: passes.score(shard))
        order_1 = cpu_seconds(lambda: passes.score(shard, direction))
        pull_back = cpu_seconds(lambda: pulled_back(passes, shard))
        ratios["order 1"].append(order_1 / score)
        ratios["pull_back"].append(pull_back / score)
    # The first of each warms up.
    return {kind: statistics.median(values[1:]) for kind, values in ratios.items()}


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


if __name__ == "__main__":
    if "--measure" in sys.argv:
        base = make_base("llama", MIDDLE)
        print("full", measured_ratios(make_passes(base)))
        print("LoRA", measured_ratios(make_passes(with_adapter(base, ALL_SEVEN))))
    else:
        for name, make in TABLES.items():
            print(f"{name}\n\n{make()}\n")
