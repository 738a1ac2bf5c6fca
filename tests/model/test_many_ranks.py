"""Do 32 ranks talk as little as two? A probe of ranks that are threads.

Of every rank: as many collectives, with as many bytes in them, whatever the number of
ranks, but for the tokens of E, of which each has a part.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference as ref
from jobs import run_probe
from thread_ranks import run_thread_ranks
from tiny_runs import make_run

from entropy_ddp.distributed import World

Cost = tuple[dict[str, tuple[int, int]], dict[str, Any]]


@pytest.mark.usefixtures("models_checked_once")
@pytest.mark.long
def test_what_a_rank_exchanges_does_not_grow_with_their_number(tmp_path: Path) -> None:
    run = make_run(tmp_path, "qwen2", targets=["v_proj"])
    rows = ref.random_rows(9, groups=60, responses=2, vocabulary=17)
    config = replace(run, E=rows).config(
        compute={"device": "cpu", "tokens_per_microbatch": 10_000}
    )

    def cost(world: World) -> Cost:
        found = run_probe(config, world, None, lambda *_: None).results.to_dict()
        return dict(world.collectives), found

    exchanged, results = {}, []
    for count in (2, 8, 32):
        ranks = run_thread_ranks(count, cost)
        objects = [own.pop("objects") for own, _ in ranks]
        # Parameter buffers and tables of scalars: the same on every rank.
        collectives = [own for own, _ in ranks]
        assert collectives == collectives[:1] * count
        (number,) = {number for number, _ in objects}
        largest = max(size for _, size in objects)
        exchanged[count] = collectives[0], number, largest
        results.append(ranks[0][1])
    few, some, many = exchanged.values()
    assert few[:2] == some[:2] == many[:2]
    # Tokens: of E its part, of U what it has read to everyone.
    assert max(some[2], many[2]) < few[2]
    for section, key in (("truth", "delta_h_true"), ("linear", "slope")):
        values = [found[section][key] for found in results]
        assert values == pytest.approx(values[:1] * 3, rel=1e-10)
