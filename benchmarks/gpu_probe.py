"""Rows on a GPU: every pass of a probe at its real size, and what bfloat16 costs.

A model of the shape of Qwen2.5-1.5B with adapters on all seven linear layers; U has 64
groups of 8 responses, E 2048 single ones, prompts and responses about 100 tokens.
Every pass is timed once after a warm-up on a few sequences: one lasts minutes.
"""

import gc
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.comparison import Comparison, Run, Setting, timed
from benchmarks.memory import peak_bytes
from benchmarks.models import (
    ALL_SEVEN,
    QWEN_15B,
    TINY,
    Lengths,
    Shape,
    make_base,
    make_direction,
    make_passes,
    make_shard,
    with_adapter,
)
from benchmarks.passes import difference_step, pulled_back
from entropy_ddp.data.batch import Batch, Shard
from entropy_ddp.data.microbatch import make_microbatches
from entropy_ddp.model.response_tokens import DirectionalScores
from entropy_ddp.model.scoring import Passes

MEMORY_LIMIT_GIB = 80
GIB = 1 << 30
WARM_UP_SEQUENCES = 16
TOKENS_PER_MICROBATCH = 16_384


@dataclass(frozen=True, kw_only=True)
class Case:
    """The passes of a probe on one model, and the two batches."""

    passes: Passes
    direction: dict[str, Tensor]
    E: Shard
    U: Shard

    def first(self, count: int) -> "Case":
        """The same with the first sequences of both batches only."""
        heads = [_first(shard.batch, count) for shard in (self.E, self.U)]
        return Case(
            passes=self.passes, direction=self.direction, E=heads[0], U=heads[1]
        )

    def runs(self) -> dict[str, tuple[Shard, Run]]:
        """Every pass by name, the model's own first, and the batch it is over."""
        passes, direction = self.passes, self.direction
        step = difference_step(passes, self.first(WARM_UP_SEQUENCES).E)
        return {
            "model": (self.E, self.model_forward),
            "score": (self.E, lambda: passes.score(self.E)),
            "order 1": (self.E, lambda: passes.score(self.E, direction)),
            "order 2": (
                self.E,
                lambda: passes.score_twice(self.E, direction, step),
            ),
            "pull_back": (self.U, lambda: pulled_back(passes, self.U)),
        }

    @torch.no_grad()
    def model_forward(self) -> None:
        """The model's own forward pass, logits of all positions, over E."""
        budget = self.passes.tokens.settings.tokens_per_microbatch
        for microbatch in make_microbatches(self.E, budget):
            ids = microbatch.input_ids.to(self.passes.device)
            self.passes.tokens.causal_lm(input_ids=ids, use_cache=False)


def _first(batch: Batch, count: int) -> Shard:
    return batch.first(count).shard(0, 1)


def gpu_probe_row(setting: Setting) -> Iterator[Comparison]:
    """Every pass at full size in float32 and bfloat16, and the errors of bfloat16."""
    shape, evaluation, update = _sizes(setting)
    scores = {}
    for dtype in (torch.float32, torch.bfloat16):
        case = _make_case(shape, evaluation, update, dtype, setting)
        details = {"model": asdict(shape), "E": asdict(evaluation), "U": asdict(update)}
        name = str(dtype).removeprefix("torch.")
        costs = _costs(case, setting)
        yield from _lines(costs, name, details)
        scores[name] = case.passes.score(case.E, case.direction)
        shard = case.E
        del case, costs
        # The next model needs the room.
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    yield from _precision(scores["bfloat16"], scores["float32"], shard)


def _sizes(setting: Setting) -> tuple[Shape, Lengths, Lengths]:
    if setting.size == "tiny":
        tokens = {"prompt": 4, "response": 5, "shortest": 3}
        return (
            TINY,
            Lengths(groups=5, **tokens),
            Lengths(groups=2, per_group=2, **tokens),
        )
    tokens = {"prompt": 100, "response": 130, "shortest": 70}
    return (
        QWEN_15B,
        Lengths(groups=2048, **tokens),
        Lengths(groups=64, per_group=8, **tokens),
    )


def _make_case(
    shape: Shape,
    evaluation: Lengths,
    update: Lengths,
    dtype: torch.dtype,
    setting: Setting,
) -> Case:
    # The same weights in both dtypes: rounded, not drawn again.
    base = make_base("qwen2", shape, device=setting.device)
    model = with_adapter(base, ALL_SEVEN).to(setting.device, dtype)
    passes = make_passes(model, tokens_per_microbatch=TOKENS_PER_MICROBATCH)
    return Case(
        passes=passes,
        direction=make_direction(passes),
        E=make_shard(evaluation, shape.vocabulary),
        U=make_shard(update, shape.vocabulary, seed=4),
    )


def _costs(case: Case, setting: Setting) -> dict[str, dict[str, float]]:
    """Seconds, sequences per second and peak GiB with the model, by pass."""
    small = case.first(WARM_UP_SEQUENCES)
    warm_ups = small.runs()
    for _, run in warm_ups.values():
        run()
    weights = case.passes.tokens.parameters()
    model_bytes = sum(p.numel() * p.element_size() for p in weights)
    costs = {}
    for name, (shard, run) in case.runs().items():
        seconds, peak = _cost(run, warm_ups[name][1], setting.device)
        costs[name] = {
            "seconds": seconds,
            "sequences_per_second": len(shard.positions) / seconds,
            "peak_gib": (model_bytes + peak) / GIB,
        }
    return costs


def _cost(run: Run, small: Run, device: torch.device) -> tuple[float, int]:
    """Seconds of a run, and its peak memory above the model in bytes.

    On the CPU, where memory is profiled event by event, that of the small run.
    """
    if device.type != "cuda":
        return timed(run, device)[0], peak_bytes(small, device)
    seconds: list[float] = []
    peak = peak_bytes(lambda: seconds.append(timed(run, device)[0]), device)
    return seconds[0], peak


def _lines(
    costs: dict[str, dict[str, float]], dtype: str, details: dict[str, Any]
) -> Iterator[Comparison]:
    """Time of each pass per sequence over the model's own, and the largest memory."""
    rate = costs["model"]["sequences_per_second"]
    targets = {"score": None, "order 1": 2.3, "order 2": 5.0, "pull_back": 2.3}
    scoring = costs["score"]["sequences_per_second"]
    for name, target in targets.items():
        cost = costs[name]
        yield Comparison(
            part=f"{name}, {dtype}, {cost['sequences_per_second']:.1f} sequences/s",
            over=f"{name} / the model's own forward",
            values=[rate / cost["sequences_per_second"]],
            details=cost | details,
        )
        if target is not None:
            yield Comparison(
                part=f"{name}, {dtype}",
                over=f"{name} / score",
                values=[scoring / cost["sequences_per_second"]],
                target=target,
                details=cost | details,
            )
    ours = {name: cost for name, cost in costs.items() if name != "model"}
    highest = max(ours, key=lambda name: ours[name]["peak_gib"])
    yield Comparison(
        part=f"peak memory, {dtype}, {highest}",
        over="GiB",
        values=[ours[highest]["peak_gib"]],
        target=MEMORY_LIMIT_GIB,
        details=costs | details,
    )


def _precision(
    narrow: DirectionalScores, wide: DirectionalScores, shard: Shard
) -> Iterator[Comparison]:
    """Errors of bfloat16 against float32: root mean squares, and of the slope."""
    for name in ("logp", "entropy"):
        error = narrow.array(name) - wide.array(name)
        yield Comparison(
            part=f"bfloat16, error of {name}, root mean square",
            over="nats",
            values=[float(error.square().mean().sqrt())],
        )
    slopes = [slope(scores, shard) for scores in (narrow, wide)]
    yield Comparison(
        part="bfloat16, error of the slope of H",
        over="error / slope in float32",
        values=[abs(slopes[0] / slopes[1] - 1)],
        details={"slopes": slopes},
    )


def slope(scores: DirectionalScores, shard: Shard) -> float:
    """Derivative of the self-normalised entropy per token along the direction.

    sum_i (H_i' + (H_i - H T_i) l_i') / T with sums over each sequence i of T_i tokens.
    """
    ragged = shard.ragged
    mean = scores.entropy.mean()
    weights = ragged.sum(scores.entropy) - mean * ragged.lengths
    terms = ragged.sum(scores.dentropy) + weights * ragged.sum(scores.dlogp)
    return float(terms.sum()) / ragged.num_tokens
