"""Python commands that are forked, not started: loading torch takes a process seconds.

A server loads the heavy libraries once, starts no thread, and forks a process for every
command that it is sent. That process is what `python` makes of the command line: it has
a session, an environment, a folder, standard streams, a `__main__` and an exit code of
its own. The ranks of torchrun's agent are forked as the agent is.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

LIBRARIES = (
    "accelerate",
    "peft",
    "safetensors.torch",
    "torch._decomp.decompositions_for_jvp",
    "torch.distributed.run",
    "torch.nn.parallel",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "entropy_ddp.api",
    "entropy_ddp.cli",
    "entropy_ddp.probe.pipeline",
    "entropy_ddp.probe.sample",
    "entropy_ddp.results",
)
# What libraries look at when they are loaded, which here is before the command is known.
READ_WHEN_LOADED = ("ATEN_", "HF_", "MKL_", "OMP_", "PYTHON", "TORCH_", "TRANSFORMERS_")
# The command line sets it before it loads torch.
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
NUMBER_BYTES = 8
LARGEST_REQUEST = 1 << 20

# Where requests go. Forked processes hold it too; the server ends when nobody does.
_requests: socket.socket | None = None


class Forked:
    """A process of the server, with what tests use of `subprocess.Popen`.

    Args:
        command: the interpreter and its arguments.
        variables: the whole environment.
        streams: file descriptors of standard input, output and error.
    """

    def __init__(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        streams: Sequence[int],
    ) -> None:
        assert _requests is not None
        self.args = list(command)
        self.returncode: int | None = None
        self._printed: list[TextIO] = []
        self._line, theirs = socket.socketpair()
        request = {"arguments": self.args[1:], "variables": dict(variables)}
        message = json.dumps(request | {"folder": os.getcwd()}).encode()
        given = [*streams, theirs.fileno(), _requests.fileno()]
        with theirs:
            socket.send_fds(_requests, [message], given)
        # It comes from the process itself, once it has its own session.
        self.pid = self._receive()

    @classmethod
    def start(cls, command: Sequence[str], variables: Mapping[str, str]) -> "Forked":
        """A command without input; `communicate` gives what it printed."""
        printed = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        with open(os.devnull) as nothing:
            streams = [stream.fileno() for stream in (nothing, *printed)]
            process = cls(command, variables, streams)
        process._printed = printed
        return process

    def _receive(self) -> int:
        data = self._line.recv(NUMBER_BYTES, socket.MSG_WAITALL)
        if not data:
            raise ConnectionError(f"the server of forks has ended: {self.args}")
        return int.from_bytes(data, "little")

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for a signal, when the process has ended."""
        if self.returncode is None:
            self._line.settimeout(timeout)
            try:
                status = self._receive()
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0) from None
            self.returncode = os.waitstatus_to_exitcode(status)
            self._line.close()
        return self.returncode

    def poll(self) -> int | None:
        """The exit code, None as long as there is none."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; standard output and standard error."""
        self.wait(timeout)
        for stream in self._printed:
            stream.seek(0)
        output, errors = (stream.read() for stream in self._printed)
        return output, errors

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask the process to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the process."""
        self.send_signal(signal.SIGKILL)


def _settings(variables: Mapping[str, str]) -> dict[str, str]:
    """What libraries look at when they are loaded; the path is not of these."""
    return {
        name: value
        for name, value in variables.items()
        if name.startswith(READ_WHEN_LOADED) and name != "PYTHONPATH"
    }


def can_fork(
    command: Sequence[str], variables: Mapping[str, str], usual: Mapping[str, str]
) -> bool:
    """Whether a fork is what a start would be: plain Python, and the usual settings."""
    options = [command[1]] if command[1].startswith("-") else []
    is_plain = command[0] == sys.executable and set(options) <= {"-c", "-m"}
    # A command that ran in this process has left `QUIET` in its environment.
    return is_plain and _settings(QUIET | variables) == _settings(QUIET | usual)


def require_server(usual: Mapping[str, str]) -> None:
    """Start the server unless it runs, with these environment variables."""
    global _requests
    if _requests is not None:
        return
    _requests, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    code = f"import fork_server; fork_server.serve({theirs.fileno()})"
    folders = (str(Path(__file__).parent), usual.get("PYTHONPATH"))
    path = os.pathsep.join(filter(None, folders))
    with theirs:
        server = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env=dict(usual) | QUIET | {"PYTHONPATH": path},
        )
    atexit.register(_end_server, server, _requests)


def _end_server(server: "subprocess.Popen[bytes]", requests: socket.socket) -> None:
    requests.close()
    server.wait()


# The server


def serve(number: int) -> None:
    """Fork a process for every request on a socket, until nobody is left who could ask."""
    for name in LIBRARIES:
        importlib.import_module(name)
    _fork_the_ranks_of_torchrun()
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, "a fork has only the thread that forks"
    gc.freeze()
    requests = socket.socket(fileno=number)
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not requests:
                    selector.unregister(key.fileobj)
                    _tell_the_end(key.fd, *key.data)
                    continue
                message, given, *_ = socket.recv_fds(requests, LARGEST_REQUEST, 5)
                if not message:
                    return
                pid = os.fork()
                if pid == 0:
                    selector.close()
                    requests.close()
                    _become(json.loads(message), given)
                *others, line = given[:4]
                for descriptor in (*others, given[4]):
                    os.close(descriptor)
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, line))


def _tell_the_end(descriptor: int, pid: int, line: int) -> None:
    os.close(descriptor)
    _, status = os.waitpid(pid, 0)
    with socket.socket(fileno=line) as told, contextlib.suppress(OSError):
        told.sendall(status.to_bytes(NUMBER_BYTES, "little"))


def _fork_the_ranks_of_torchrun() -> None:
    """Make the agent ask this server for its ranks."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import (
        SubprocessHandler,
    )
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    def fork(handler: Any, command: Sequence[str], variables: dict[str, str]) -> Forked:
        files = (handler._stdout or sys.stdout, handler._stderr or sys.stderr)
        streams = (0, *(file.fileno() for file in files))
        return Forked(command, variables, streams)

    def name_of_caller(depth: int = 2) -> str:
        return sys._getframe(depth).f_code.co_name

    SubprocessHandler._popen = fork
    # For its log the agent asks who calls, and reads the source of every frame for it.
    dynamic_rendezvous.get_method_name = name_of_caller


def _become(request: dict[str, Any], given: Sequence[int]) -> None:
    """Turn this fork into the process that was asked for, and run it."""
    global _requests
    os.setsid()
    *streams, line, requests = given
    for target, descriptor in enumerate(streams):
        os.dup2(descriptor, target)
        os.close(descriptor)
    _requests = socket.socket(fileno=requests)
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(request["variables"])
    os.chdir(request["folder"])
    given_path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    installed = [entry for entry in sys.path[1:] if entry not in inherited]
    sys.path[1:] = [*filter(None, given_path), *installed]
    with socket.socket(fileno=line) as told:
        told.sendall(os.getpid().to_bytes(NUMBER_BYTES, "little"))
    _end(_exit_code(request["arguments"]))


def _exit_code(arguments: Sequence[str]) -> int:
    """Run a command as Python does, and say how it ended."""
    try:
        _run_python(arguments)
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        _shut_down()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:  # noqa: BLE001
        sys.excepthook(*sys.exc_info())
    else:
        return 0
    return 1


def _end(code: int) -> None:
    """End this process; what was loaded is not taken down, which takes half a second."""
    _shut_down()
    os._exit(code)


def _shut_down() -> None:
    """What Python does when a program has ended."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()


def _run_python(arguments: Sequence[str]) -> None:
    """What `python` does with its arguments: -c, -m or a script; -u changes nothing."""
    importlib.invalidate_caches()
    first, *rest = arguments[1:] if arguments[0] == "-u" else arguments
    if first == "-m":
        name, *sys.argv[1:] = rest
        sys.path[0] = os.getcwd()
        # One that the server has loaded runs anew.
        sys.modules.pop(name, None)
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return
    sys.argv = [first, *(rest[1:] if first == "-c" else rest)]
    sys.path[0] = "" if first == "-c" else str(Path(first).resolve().parent)
    source = rest[0] if first == "-c" else Path(first).read_text()
    main = vars(sys.modules["__main__"])
    if first != "-c":
        main["__file__"] = first
    exec(compile(source, first, "exec"), main)  # noqa: S102
