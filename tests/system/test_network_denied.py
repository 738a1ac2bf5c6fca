"""Nothing asks the network unless a hub id is given; code of a checkpoint runs if asked.

The commands run in a process in which every connection and every look-up of a name is
recorded and refused, and in which nothing says that the hub is offline.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import launching
import pytest
import yaml
from checkpoints import (
    Saved,
    run_config,
    save_character_tokenizer,
    save_checkpoint,
    write_rows,
)
from click.testing import CliRunner, Result
from reference import drawn_from, random_rows
from transformers import dynamic_module_utils

from entropy_ddp.cli import main

# Commands in one process: starting is what takes time. Prints of each the exit code, what
# it asked of the network, and its standard error.
RUNNER = """
import contextlib, io, json, sys, time

asked = []

def refuse(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        name = arguments[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        name = arguments[1][0]
    else:
        return
    if name not in (None, "", "localhost", "127.0.0.1", "::1"):
        asked.append(f"{event} {name}")
        raise OSError("no network here")

sys.addaudithook(refuse)
from entropy_ddp.cli import main

time.sleep = lambda seconds: None  # between the hub's own attempts
ended = []
for arguments in json.loads(sys.argv[1]):
    code, errors = 0, io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            main(arguments, standalone_mode=False)
        except SystemExit as end:
            code = end.code
    ended.append((code, asked.copy(), errors.getvalue()))
    asked.clear()
print("RESULT", json.dumps(ended))
"""
SOMEWHERE = """
from transformers import Qwen2Config, Qwen2ForCausalLM

open({path!r}, "w").close()

class OwnConfig(Qwen2Config):
    model_type = "own"

class OwnModel(Qwen2ForCausalLM):
    config_class = OwnConfig
"""


class Ended(NamedTuple):
    """A command that ended: exit code, what it asked of the network, standard error."""

    code: int
    asked: list[str]
    errors: str


# Of a command in which nothing is wrong, and which needs no network.
QUIET_END = Ended(0, [], "")


def run_commands(*commands: list[str], timeout: float = 200.0) -> list[Ended]:
    """How each of the commands ended, in one process."""
    command = launching.python("-c", RUNNER, json.dumps(commands))
    environment = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    finished = launching.run(command, environment, timeout).require_success()
    (line,) = [s for s in finished.stdout.splitlines() if s.startswith("RESULT ")]
    return [Ended(*ended) for ended in json.loads(line.removeprefix("RESULT "))]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A tiny adapter with a tokenizer, and a configuration beside it."""
    folder = tmp_path_factory.mktemp("run")
    saved = save_checkpoint(folder, "qwen2")
    save_character_tokenizer(saved.base)
    evaluation = random_rows(1, groups=8, responses=[1, 2] * 4, vocabulary=17)
    evaluation = drawn_from(saved.model, evaluation, 3)
    update = random_rows(2, groups=3, responses=[2, 3, 2], vocabulary=17)
    files = [
        write_rows(folder / f"{split}.jsonl", rows)
        for split, rows in (("E", evaluation), ("U", update))
    ]
    (folder / "run.yaml").write_text(yaml.safe_dump(run_config(saved, *files)))
    (folder / "prompts.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": "2+1="}\n')
    return saved


@pytest.fixture(scope="module")
def ended(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Commands on folders, on an adapter of another base, and on a hub id."""
    folder, out = saved.base.parent, tmp_path_factory.mktemp("out")
    config = ["--config", str(folder / "run.yaml"), "--quiet"]
    sample = (
        f"{{prompts: {folder / 'prompts.jsonl'}, num_prompts: 2, max_new_tokens: 3}}"
    )
    setting = ["--set", f"batches.E={{sample: {sample}}}"]
    adapter = shutil.copytree(saved.folder, out / "adapter")
    file = adapter / "adapter_config.json"
    settings = json.loads(file.read_text()) | {"base_model_name_or_path": "some/where"}
    file.write_text(json.dumps(settings))
    commands = {
        "check": ["check", *config],
        "probe": ["probe", *config, "--out", str(out / "probe")],
        "attribute": ["attribute", *config, "--out", str(out / "attribute")],
        "sample": ["sample", *config, *setting, "--out", str(out / "sample")],
        "another base": ["check", *config, "--set", f"checkpoint.path={adapter}"],
        "hub id": ["check", *config, "--set", "checkpoint.base=some/where"],
    }
    return dict(zip(commands, run_commands(*commands.values()), strict=True))


@pytest.mark.parametrize("name", ["check", "probe", "attribute", "sample"])
def test_commands_on_folders_ask_nothing(ended: dict[str, Ended], name: str) -> None:
    assert ended[name]._replace(errors="") == QUIET_END


def test_the_base_that_an_adapter_was_trained_on_is_not_asked_for(
    ended: dict[str, Ended],
) -> None:
    """The one that is given serves, here and on every other machine."""
    assert ended["another base"] == QUIET_END


def test_a_hub_id_that_cannot_be_reached_is_one_line(ended: dict[str, Ended]) -> None:
    """It is asked for, which shows that the trap works; then the way out is told."""
    code, asked, errors = ended["hub id"]
    assert code == 2
    assert any("huggingface.co" in name for name in asked)
    assert errors.startswith("error: base model some/where: cannot be loaded")
    assert "hf download some/where" in errors
    assert errors.count("\n") == 1


# Code that comes with a checkpoint


def own_model(saved: Saved, folder: Path) -> Path:
    """A base folder whose config.json names code in it; the code makes a file."""
    import shutil

    base = folder / "base"
    shutil.copytree(saved.base, base)
    path = base / "config.json"
    document = json.loads(path.read_text()) | {
        "model_type": "own",
        "architectures": ["OwnModel"],
        "auto_map": {
            "AutoConfig": "own.OwnConfig",
            "AutoModelForCausalLM": "own.OwnModel",
        },
    }
    path.write_text(json.dumps(document))
    (base / "own.py").write_text(SOMEWHERE.format(path=str(folder / "ran")))
    return base


def check(saved: Saved, *options: str) -> Result:
    """`check` in this process."""
    config = str(saved.base.parent / "run.yaml")
    return CliRunner().invoke(main, ["check", "--config", config, "--quiet", *options])


def test_a_checkpoint_s_code_runs_with_the_flag_only(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it: one line that names the flag. A file cannot give the permission."""
    for name in launching.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    cache = str(tmp_path / "modules")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", cache)
    base, ran = own_model(saved, tmp_path), tmp_path / "ran"
    setting = ("--set", f"checkpoint.base={base}")
    refused = check(saved, *setting)
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"error: base model {base}: needs the Python code")
    assert "--trust-remote-code" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not ran.exists()

    document = yaml.safe_load((saved.base.parent / "run.yaml").read_text())
    document["checkpoint"] |= {"base": str(base), "trust_remote_code": True}
    path = tmp_path / "sent.yaml"
    path.write_text(yaml.safe_dump(document))
    sent = CliRunner().invoke(main, ["check", "--config", str(path)])
    assert sent.exit_code == 2
    assert "checkpoint.trust_remote_code: expected false or nothing" in sent.stderr
    assert "--trust-remote-code on the command line" in sent.stderr
    assert not ran.exists()

    trusted = check(saved, *setting, "--trust-remote-code")
    assert trusted.exit_code == 0, trusted.stderr
    assert ran.exists()
