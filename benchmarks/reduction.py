"""All-reduce of many tensors: `python -m benchmarks.reduction IN OUT` on every rank."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from entropy_ddp.distributed import World, process_group


def measure(world: World, count: int, numel: int, repeats: int) -> dict[str, object]:
    """Sums over ranks of `count` tensors, as one buffer and one by one, in turns.

    Returns:
        seconds and CPU seconds of both, number of collectives of one flat sum, and the
        largest difference of the sums.
    """
    values = torch.arange(count * numel, dtype=torch.float32) * (world.rank + 1)
    flat = values.clone()
    tensors = list(values.clone().split(numel))

    def one_by_one() -> None:
        for tensor in tensors:
            world.sum(tensor, "one by one")

    runs: list[Callable[[], object]] = [lambda: world.sum(flat, "flat"), one_by_one]
    seconds: tuple[list[float], list[float]] = ([], [])
    for repetition in range(repeats + 1):
        for run, times in zip(runs, seconds):
            world.max(0.0)  # ranks begin together
            begin = time.perf_counter()
            run()
            # The first turn opens connections.
            if repetition:
                times.append(time.perf_counter() - begin)
        # Sums of sums would overflow.
        difference = float((flat - torch.cat(tensors)).abs().max())
        flat.copy_(values)
        for tensor, value in zip(tensors, values.split(numel)):
            tensor.copy_(value)
    return {
        "seconds": seconds,
        "collectives": world.collectives["flat"][0] / (repeats + 1),
        "difference": difference,
    }


def main() -> None:
    """Measure as one of the ranks that a launcher started."""
    torch.set_num_threads(1)
    given, written = map(Path, sys.argv[1:])
    with process_group() as world:
        measured = measure(world, **json.loads(given.read_text()))
        if world.is_main:
            written.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
