"""Is a forked command what a started one is, and are commands forked at all?"""

import subprocess

import launching
import pytest
from fork_server import Forked

WHAT_IT_IS = """
import os, sys
print(__name__, sys.argv, os.getcwd(), os.environ["RANK"], os.environ.get("LOCAL_RANK"))
print(os.getsid(0) == os.getpid(), len(os.listdir("/proc/self/task")))
print(repr(sys.stdin.read()), sys.stdout.isatty())
print("an error", file=sys.stderr)
"""
COMMANDS = {
    "what it is": WHAT_IT_IS,
    "a code": "raise SystemExit(3)",
    "a message": "raise SystemExit('no')",
    "a defect": "import json; json.loads('[')",
    "an interrupt": "print(1); raise KeyboardInterrupt",
    "a kill": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "a signal": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "at exit": "import atexit; atexit.register(print, 'last'); print('first')",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_fork_is_what_a_start_would_be(name: str) -> None:
    """Arguments, environment, streams, exit code; of a traceback the last line."""
    command = launching.python("-c", COMMANDS[name], "an argument")
    forked, started = (
        launching.run(command, {"RANK": "1"}, fresh=fresh) for fresh in (False, True)
    )
    assert forked.returncode == started.returncode
    assert forked.stdout == started.stdout
    assert forked.stderr.splitlines()[-1:] == started.stderr.splitlines()[-1:]


@pytest.mark.parametrize(
    ("level", "kind"), [("ERROR", Forked), ("INFO", subprocess.Popen)]
)
def test_commands_are_forked_after_one_in_this_process(
    monkeypatch: pytest.MonkeyPatch, level: str, kind: type
) -> None:
    """Which has set this variable for torch; any other value needs a start."""
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", level)
    process = launching.start(launching.python("-c", "pass"))
    assert isinstance(process, kind)
    assert launching.finish(process).returncode == 0
