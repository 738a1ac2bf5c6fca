"""A disk that is full: a clear error, the earlier results as they were, nothing left over.

Failures of write, fsync and rename are planted; a limit on file sizes is a real one.
"""

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import run_probe
from safetensors.torch import load_file
from tiny_runs import TinyRun, make_run

from entropy_ddp import files
from entropy_ddp.data.jsonlines import write_jsonl
from entropy_ddp.distributed import World
from entropy_ddp.errors import RunError
from entropy_ddp.files import write_tensors, written_whole
from entropy_ddp.results import UNFINISHED, Probed, write_results


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones included."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def full_at(monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> Iterator[None]:
    """The so-manieth call of a function of `os` finds the disk full."""
    original: Callable[..., Any] = getattr(os, call)
    calls = 0

    def maybe_full(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return full() if calls == number else original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, maybe_full)
        yield


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file may grow beyond this many bytes: a real failure of write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_file_that_cannot_be_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    message = (
        r"file: cannot be written \(No space left on device\): "
        r"(more than 5|12,345) bytes are needed, [\d,]+ are free there; make room"
    )
    for size in (None, 12_345):
        with (
            full_at(monkeypatch, call, 1),
            pytest.raises(RunError, match=message),
            written_whole(path, size=size) as stream,
        ):
            stream.write(b"after")
    assert contents(tmp_path) == {"file": b"before"}


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    """Of text written row by row, and of tensors, whose size is known."""
    rows = ({"index": index, "logp": -1.0} for index in range(10_000))
    with small_files(1 << 16):
        with pytest.raises(RunError, match=r"rows.jsonl: .*File too large.*more than"):
            write_jsonl(tmp_path / "rows.jsonl", rows)
        with pytest.raises(RunError, match=r"x: .*: 800,\d\d\d bytes are needed"):
            write_tensors(tmp_path / "x", {"x": torch.zeros(100_000).double()})
    assert contents(tmp_path) == {}


def test_tensors_read_back_as_they_were(tmp_path: Path) -> None:
    """Every dtype that is written, empty and scalar tensors, views; by the library."""
    tensors = {
        "double": torch.linspace(0, 1, 7, dtype=torch.float64),
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(3, 2).bfloat16(),
        "float": torch.randn(4, 6).t(),
        "long": torch.arange(5),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.5),
    }
    write_tensors(tmp_path / "x", tensors, {"note": "a"})
    found = load_file(tmp_path / "x")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("run"), "gpt2")


@pytest.fixture(scope="module")
def probed(run: TinyRun) -> Probed:
    return run.probe(update={"save_delta": True})


@pytest.mark.parametrize("number", range(1, 5))
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_results_are_written_all_or_not(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    probed: Probed,
    call: str,
    number: int,
) -> None:
    """Whichever of the four files does not fit: the earlier run, byte for byte."""
    write_results(tmp_path, probed, "seed: 0\n")
    before = contents(tmp_path)
    assert len(before) == 4
    with full_at(monkeypatch, call, number), pytest.raises(RunError, match="No space"):
        write_results(tmp_path, probed, "seed: 1\n")
    assert contents(tmp_path) == before
    write_results(tmp_path, probed, "seed: 1\n")
    assert contents(tmp_path) == before | {"config.yaml": b"seed: 1\n"}
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_rename_at_the_very_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probed: Probed
) -> None:
    """No results then, rather than new ones beside old files; and no temporary ones."""
    write_results(tmp_path, probed, "seed: 0\n")
    with (
        full_at(monkeypatch, "replace", 6),
        pytest.raises(RunError, match=r"put in their place \(No space.*--resume"),
    ):
        write_results(tmp_path, probed, "seed: 1\n")
    assert not (tmp_path / "results.json").exists()
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_full_disk_on_the_way_leaves_a_run_that_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: TinyRun, probed: Probed
) -> None:
    """In every phase that is kept, and at the end; earlier results stand."""
    write_results(tmp_path, probed, "seed: 0\n")
    before = contents(tmp_path)
    config = run.config()
    for number in range(2, 8):
        try:
            with full_at(monkeypatch, "fsync", number):
                run_probe(config, World(), tmp_path, lambda *_: None)
        except RunError as error:
            assert f"{UNFINISHED}/" in str(error) and "No space" in str(error)
        assert {k: v for k, v in contents(tmp_path).items() if UNFINISHED not in k} == (
            before
        )
        assert not list(tmp_path.rglob("*.tmp"))
    resumed = run_probe(config, World(), tmp_path, lambda *_: None)
    assert resumed.results.run.resumed
    write_results(tmp_path, resumed, "seed: 1\n")
    assert not (tmp_path / UNFINISHED).exists()
    truth = (resumed.results.truth, probed.results.truth)
    assert truth[0] == truth[1]
