"""Parameters and optimizer state are as they were after every exit, normal or not.

A failure is planted in every phase of every job, in a forward pass and after a backward
pass, and everything that a pass or a step moves is compared bit by bit. The files of a
checkpoint are never opened for writing.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import launching
import pytest
import reference as ref
import torch
import yaml
from checkpoints import run_config
from click.testing import CliRunner
from jobs import run_attribution, run_audit, run_probe, run_sweep
from tiny_runs import TinyRun, make_run
from torch import nn

from entropy_ddp.cli import main
from entropy_ddp.config import Config
from entropy_ddp.distributed import World
from entropy_ddp.model.parameters import fingerprint
from entropy_ddp.probe import opening
from entropy_ddp.results import discard_unfinished
from entropy_ddp.update.step import optimizer_tensors

# Everything on: the KL term's reference, both forms of gradient-dot, masked steps.
SECTIONS: dict[str, Any] = {
    "compute": {"device": "cpu", "tokens_per_microbatch": 60},
    "update": {"max_grad_norm": 0.5, "kl_coefficient": 0.1, "lr_override": 0.01},
    "gradient_dot": {"enabled": True, "variance_method": "backward"},
    "attribution": {"verify": True},
    "sweep": {"etas": [0.005, 0.01, 0.02], "symmetric": True},
}
JOBS: dict[str, Callable[..., Any]] = {
    "probe": run_probe,
    "audit": run_audit,
    "sweep": run_sweep,
    "attribute": run_attribution,
}
# The phases in which a pass runs; each job has at least these.
PHASES = {
    "self-check",
    "reference: U without the adapter",
    "gradient of U",
    "truth: E after the step",
    "slope: E along the step",
}
OWN_PHASES = {
    "probe": {"gradient dot: groups of U", "second order"},
    "audit": {"gradient dot: gradient of E", "second order"},
    "sweep": {"second order", "sweep: eta = -0.02", "sweep: eta = 0.02"},
    "attribute": {"what if: masked step", "shares: U", "errors of parts"},
}


class Planted(Exception):
    """Not one of the package's own."""


@dataclass
class Watch:
    """Counts passes by phase, and fails at one of them.

    Attributes:
        fail_at: the kind and number of the pass that fails; None for none.
        error: what it raises.
        passes: phase of every forward and every backward pass so far, by kind.
    """

    fail_at: tuple[str, int] | None = None
    error: type[BaseException] = Planted
    passes: dict[str, list[str]] = field(
        default_factory=lambda: {"forward": [], "backward": []}
    )
    phase: str = ""
    model: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None
    before: dict[str, Any] = field(default_factory=dict)

    def progress(self, phase: str, done: int, total: int) -> None:
        """What the job reports to."""
        self.phase = phase

    def count(self, kind: str) -> None:
        """One pass; fails if it is the one to."""
        self.passes[kind].append(self.phase)
        if self.fail_at == (kind, len(self.passes[kind]) - 1):
            raise self.error(f"planted in {self.phase}")

    def state(self) -> dict[str, Any]:
        """Everything that a pass or a step moves."""
        model, optimizer = self.model, self.optimizer
        assert model is not None and optimizer is not None
        parameters = dict(model.named_parameters())
        modules = dict(model.named_modules())
        return {
            "parameters": fingerprint(parameters.items()),
            "buffers": fingerprint(model.named_buffers()),
            "optimizer": fingerprint(optimizer_tensors(optimizer)),
            "settings": [
                {key: value for key, value in group.items() if key != "params"}
                for group in optimizer.param_groups
            ],
            "places": {n: (id(p), p.data_ptr()) for n, p in parameters.items()},
            "kinds": {n: type(p) for n, p in parameters.items()},
            "trainable": {n: p.requires_grad for n, p in parameters.items()},
            "gradients": [n for n, p in parameters.items() if p.grad is not None],
            "training": [n for n, m in modules.items() if m.training],
            "attributes": {n: sorted(vars(m)) for n, m in modules.items()},
            "hooks": {n: len(m._forward_hooks) for n, m in modules.items()},
        }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A tiny adapter; every group of E has two responses."""
    run = make_run(tmp_path_factory.mktemp("run"), "qwen2")
    rows = ref.random_rows(
        3, responses=[2, 2, 3, 2, 2], groups=5, vocabulary=17, with_empty=True
    )
    return replace(run, E=rows)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Count and fail passes of the next job, and remember its state when opened."""
    load = opening.load_optimizer
    backward = torch.Tensor.backward

    def load_and_watch(path: Path, model: nn.Module, *parameters: Any) -> Any:
        watch.model, watch.optimizer = model, load(path, model, *parameters)
        embeddings = model.get_input_embeddings()
        embeddings.register_forward_pre_hook(lambda *_: watch.count("forward"))
        watch.before = watch.state()
        return watch.optimizer

    def backward_and_count(tensor: torch.Tensor, *arguments: Any, **named: Any) -> None:
        backward(tensor, *arguments, **named)
        watch.count("backward")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "load_optimizer", load_and_watch)
        patch.setattr(torch.Tensor, "backward", backward_and_count)
        yield


def run_job(name: str, config: Config, watch: Watch, out: Path) -> None:
    """One job in this process."""
    out.mkdir(exist_ok=True)
    # What a failed run has finished, another would not do again.
    discard_unfinished(out)
    with watched(watch):
        JOBS[name](config, World(), out, watch.progress)


@pytest.mark.parametrize(
    "name",
    [
        "probe",
        pytest.param("attribute", marks=pytest.mark.long),
        pytest.param("audit", marks=pytest.mark.long),
        pytest.param("sweep", marks=pytest.mark.long),
    ],
)
def test_every_exit_leaves_everything_as_it_was(
    run: TinyRun, tmp_path: Path, name: str
) -> None:
    """After success, and after a failure in the last pass of every phase."""
    config = run.config(**SECTIONS)
    counting = Watch()
    run_job(name, config, counting, tmp_path)
    assert counting.state() == counting.before
    phases = set(counting.passes["forward"])
    assert phases >= PHASES
    for own in OWN_PHASES[name]:
        assert any(own in phase for phase in phases), (own, phases)
    planted = 0
    for kind, passes in counting.passes.items():
        for number, phase in enumerate(passes):
            if phase in passes[number + 1 :]:
                continue
            error = KeyboardInterrupt if planted % 3 == 2 else Planted
            watch = Watch(fail_at=(kind, number), error=error)
            with pytest.raises(error, match="planted in"):
                run_job(name, config, watch, tmp_path)
            assert watch.phase == phase
            assert watch.state() == watch.before, (kind, phase)
            planted += 1
    assert planted >= len(phases) + 2


# The checkpoint's files

_watched_folder: list[str] = []
_written: list[str] = []
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod")


def _note_writes(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched_folder or event not in ("open", "os.utime", "os.link", *CHANGES):
        return
    path, mode = arguments[0], arguments[2] if event == "open" else os.O_WRONLY
    if not isinstance(path, (str, bytes, os.PathLike)) or not isinstance(mode, int):
        return
    writing = mode & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    if writing and os.path.realpath(os.fsdecode(path)).startswith(_watched_folder[0]):
        _written.append(f"{event} {os.fsdecode(path)}")


# A hook cannot be taken away again: this one looks on only while a folder is named.
sys.addaudithook(_note_writes)


@contextmanager
def writes_in(folder: Path) -> Iterator[list[str]]:
    """What is opened for writing, renamed or removed below a folder."""
    _written.clear()
    _watched_folder.append(os.path.realpath(folder))
    try:
        yield _written
    finally:
        _watched_folder.clear()


def content_of(folder: Path) -> dict[str, tuple[str, int]]:
    """Hash and time of change of every file and folder."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        data = path.read_bytes() if path.is_file() else b""
        found[str(path)] = hashlib.sha256(data).hexdigest(), path.stat().st_mtime_ns
    return found


def test_writes_are_noticed(tmp_path: Path) -> None:
    """Opening a file to append, and removing it; reading is not."""
    path = tmp_path / "x"
    path.write_text("a")
    with writes_in(tmp_path) as written:
        path.read_text()
        assert not written
        with path.open("a"):
            pass
        path.unlink()
    assert [line.split()[0] for line in written] == ["open", "os.remove"]


def test_no_command_opens_the_checkpoint_for_writing(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its files nor the batches; hashes and times are as before."""
    for name in launching.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    run.config()  # writes the batches
    files = (run.folder / "E.jsonl", run.folder / "U.jsonl")
    sections = SECTIONS | {"update": SECTIONS["update"] | {"save_delta": True}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_config(run.saved, *files) | sections))
    before = content_of(run.folder)
    for command in ("check", *JOBS):
        arguments = [command, "--config", str(path), "--quiet"]
        if command != "check":
            arguments += ["--out", str(tmp_path / command)]
        with writes_in(run.folder) as written:
            result = CliRunner().invoke(main, arguments)
        assert result.exit_code in (0, 3), result.stderr
        assert written == []
        assert content_of(run.folder) == before
