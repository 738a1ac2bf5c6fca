"""Row about shared prompts: the responses of a group as branches behind one prompt."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial

from benchmarks.comparison import Comparison, Setting, time_in_turns
from benchmarks.models import (
    MIDDLE,
    TINY,
    Lengths,
    make_direction,
    make_model,
    make_passes,
    make_shard,
)
from benchmarks.passes import pulled_back, scores_difference
from entropy_ddp.data.batch import Shard
from entropy_ddp.errors import RunError
from entropy_ddp.model.response_tokens import TokenScores
from entropy_ddp.model.scoring import Passes
from entropy_ddp.model.selfcheck import check_sharing

GROUP = 8
SHARED = Lengths(groups=1, per_group=GROUP, prompt=128, response=128, shortest=16)
# Prompts so short that computing them again costs less than a longer row.
FLAT = (
    Lengths(groups=1, per_group=GROUP, prompt=8, response=128),
    Lengths(groups=1, per_group=GROUP, prompt=16, response=512),
)
SMALL = Lengths(groups=1, per_group=GROUP, prompt=12, response=4, shortest=2)
RUNS: dict[str, Callable[[Passes, Shard], TokenScores]] = {
    "score": lambda passes, shard: passes.score(shard),
    "order 1": lambda passes, shard: passes.score(shard, make_direction(passes)),
    "pull_back": pulled_back,
}


def shared_prompts_row(setting: Setting) -> Iterator[Comparison]:
    """Prompts shared by their group / every response with a prompt of its own."""
    shape = setting.pick(TINY, replace(MIDDLE, layers=4), MIDDLE)
    model = make_model("qwen2", shape, device=setting.device)
    layouts = [make_passes(model, share_prompts=share) for share in (True, False)]
    for passes in layouts:
        check = check_sharing(passes, shape.vocabulary)
        if check.sharing is None:
            raise RunError(f"the model does not share prompts: {check.reason}")
        passes.tokens.sharing = check.sharing
    for lengths in setting.pick((SMALL,), *[(SHARED, *FLAT)] * 2):
        shard = make_shard(lengths, shape.vocabulary)
        gains = lengths not in FLAT
        for name in RUNS if gains else ("score",):
            shared, flat = (partial(RUNS[name], passes, shard) for passes in layouts)
            timings = time_in_turns(shared, flat, setting)
            target: float | None = 1.05
            if gains:
                target = 0.5 if name == "score" else None
            yield timings.comparison(
                f"{name}, prompt {lengths.prompt}, {GROUP} responses of "
                + _span(lengths),
                "prompt shared / flat",
                target=target,
                difference=scores_difference(timings.results),
                details={"model": asdict(shape), "batch": asdict(lengths)},
            )


def _span(lengths: Lengths) -> str:
    shortest = lengths.shortest
    return (
        f"{lengths.response}" if shortest is None else f"{shortest}-{lengths.response}"
    )
