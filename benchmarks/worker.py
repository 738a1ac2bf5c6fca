"""One probe in a process of its own: `python -m benchmarks.worker IN OUT`."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from entropy_ddp.config import Config
from entropy_ddp.distributed import World, process_group
from entropy_ddp.probe.pipeline import run
from entropy_ddp.probe.session import no_progress

# What every rank does whole, whatever their number; a library's first import is in it.
UNDIVIDED_PHASES = ("open checkpoint", "self-check")


def probe(config: Config, world: World) -> dict[str, Any]:
    """Probe, and say what it cost on this rank.

    Returns:
        seconds of all, of all that ranks share, and of each phase; peak resident memory of the process before
        and after in bytes, collectives by purpose (number, bytes), and two results.
    """
    begin, before = time.perf_counter(), _peak_resident_bytes()
    results = run("probe", config, world, None, no_progress).results
    seconds = time.perf_counter() - begin
    undivided = sum(results.run.seconds.get(name, 0.0) for name in UNDIVIDED_PHASES)
    return {
        "seconds": seconds,
        "divided_seconds": seconds - undivided,
        "phases": results.run.seconds,
        "peak_bytes_before": before,
        "peak_bytes": _peak_resident_bytes(),
        "collectives": world.collectives,
        "num_sequences": results.E.num_sequences,
        "delta_h_true": results.truth.delta_h_true,
        "slope": results.linear.slope,
    }


def _peak_resident_bytes() -> int:
    # Kilobytes on Linux.
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Probe as one of the ranks that a launcher started, or alone."""
    torch.set_num_threads(1)
    given, written = map(Path, sys.argv[1:])
    config = Config.model_validate(json.loads(given.read_text()))
    with process_group() as world:
        cost = probe(config, world)
        if world.is_main:
            written.write_text(json.dumps(cost))


if __name__ == "__main__":
    main()
