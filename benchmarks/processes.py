"""Work in processes of their own: ranks, and memory that nobody else has used."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from entropy_ddp.distributed import LAUNCHER_VARIABLES
from entropy_ddp.errors import RunError

REPOSITORY = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 1800


def run_module(module: str, argument: Any, num_ranks: int | None = None) -> Any:
    """Run `python -m module IN OUT` and read what it wrote to OUT.

    Args:
        module: reads its argument from IN and writes its result to OUT, both JSON.
        argument: what IN holds.
        num_ranks: number of ranks under torchrun; None for a plain process.

    Raises:
        RunError: it failed; with what it printed.
    """
    launcher = []
    if num_ranks is not None:
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc_per_node={num_ranks}"]
    inherited = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    places = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory() as folder:
        given, written = Path(folder, "in.json"), Path(folder, "out.json")
        given.write_text(json.dumps(argument))
        finished = subprocess.run(
            [sys.executable, *launcher, "-m", module, str(given), str(written)],
            env=inherited
            | {
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, places)),
            },
            check=False,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
        if finished.returncode or not written.exists():
            raise RunError(f"{module} failed:\n{finished.stdout}{finished.stderr}")
        return json.loads(written.read_text())
