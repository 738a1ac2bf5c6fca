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
from entropy_ddp.policy.scores import TokenScores
from entropy_ddp.policy.scoring import Passes
from entropy_ddp.rollouts.batch import Shard

GROUP = 8
# (prompt, response); of the last two, flat rows are the cheaper layout.
SHARING = ((128, 16), (128, 64), (128, 128))
FLAT = ((8, 128), (16, 512))
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
    for prompt, response in setting.pick(((12, 3), (2, 9)), *[SHARING + FLAT] * 2):
        lengths = Lengths(groups=1, per_group=GROUP, prompt=prompt, response=response)
        shard = make_shard(lengths, shape.vocabulary)
        gains = prompt >= response
        for name in RUNS if gains else ("score",):
            shared, flat = (partial(RUNS[name], passes, shard) for passes in layouts)
            timings = time_in_turns(shared, flat, setting)
            yield timings.comparison(
                f"{name}, {GROUP} responses of {response} to a prompt of {prompt}",
                "prompt shared / flat",
                target=(0.5 if name == "score" else None) if gains else 1.05,
                difference=scores_difference(timings.results),
                details={"model": asdict(shape), "batch": asdict(lengths)},
            )
