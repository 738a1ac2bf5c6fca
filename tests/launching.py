"""Commands in processes of their own, started the way users start them.

A command of Python is forked from a process that has loaded torch, which takes seconds,
unless a test asks for a fresh start; the process is the same. Every command has a time limit. When it passes, the processes are stopped and the test
fails with what they had printed.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fork_server import Forked, can_fork, require_server

REPOSITORY = Path(__file__).resolve().parent.parent
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_NTASKS",
    "OMPI_COMM_WORLD_SIZE",
    "ACCELERATE_USE_CPU",
)
PACKAGE = ("-m", "entropy_ddp")
# With it a script finds these helpers.
HELPERS = {"PYTHONPATH": str(REPOSITORY / "tests")}
# One thread and no network; before any test changes the environment.
USUAL = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES} | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(REPOSITORY),
}
Process = subprocess.Popen[str] | Forked


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A command that ended by itself."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float

    def require_success(self) -> "Finished":
        """This command, which ended with exit code 0."""
        assert self.returncode == 0, self.stderr
        return self


def python(*arguments: str | Path) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, *map(str, arguments)]


def torchrun(num_processes: int, *arguments: str | Path) -> list[str]:
    """A command of torchrun, on a free port of this machine."""
    options = ("--standalone", f"--nproc_per_node={num_processes}")
    return python("-m", "torch.distributed.run", *options, *arguments)


def accelerate(*arguments: str | Path) -> list[str]:
    """A command of `accelerate launch`."""
    return python("-m", "accelerate.commands.launch", *arguments)


def start(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    *,
    fresh: bool = False,
) -> Process:
    """Start a command with one thread, no network and no launcher's variables.

    Args:
        command: an executable and its arguments.
        environment: further variables; the repository is added to a PYTHONPATH.
        fresh: load all libraries anew, as a user's command does.
    """
    inherited = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    given = dict(environment or {})
    folders = (given.pop("PYTHONPATH", None), USUAL["PYTHONPATH"])
    variables = (
        inherited
        | {k: USUAL[k] for k in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE")}
        | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
        | given
    )
    if not fresh and can_fork(command, variables, USUAL):
        require_server(USUAL)
        return Forked.start(command, variables)
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=variables,
    )


def finish(process: Process, timeout_seconds: float = 120.0) -> Finished:
    """Wait for a command to end by itself."""
    begin = time.monotonic()
    try:
        stdout, stderr = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired as error:
        stdout, stderr = _stop(process)
        raise AssertionError(
            f"not finished after {timeout_seconds:g} s: {process.args}\n{stdout}{stderr}"
        ) from error
    return Finished(
        returncode=process.returncode,
        stdout=stdout,
        stderr=stderr,
        seconds=time.monotonic() - begin,
    )


def run(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float = 120.0,
    *,
    fresh: bool = False,
) -> Finished:
    """Run a command to its end."""
    return finish(start(command, environment, fresh=fresh), timeout_seconds)


def run_ranks(
    num_ranks: int,
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float = 120.0,
) -> list[Finished]:
    """Run a command once per rank, without a launcher that stops or restarts any."""
    processes = start_ranks(num_ranks, command, environment)
    try:
        return [finish(process, timeout_seconds) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                _stop(process)


def start_ranks(
    num_ranks: int,
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
) -> list[Process]:
    """Start a command once per rank."""
    shared = {
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    given = shared | dict(environment or {})
    return [start(command, given | {"RANK": str(r)}) for r in range(num_ranks)]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _stop(process: Process) -> tuple[str, str]:
    """Stop a command; a launcher is given the time to stop its workers first."""
    process.terminate()
    try:
        return process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()
