"""The run directory: whole or absent, finite, and nothing of an earlier run in it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import run_config, save_checkpoint, write_rows
from jobs import run_probe
from reference import random_rows
from safetensors.torch import load_file

from entropy_ddp.config import load_config
from entropy_ddp.distributed import World
from entropy_ddp.errors import InputError, RunError
from entropy_ddp.files import written_whole
from entropy_ddp.results import Probed, Results, prepare_folder, write_results

ROWS = [{"split": "E", "index": 0, "logp": -1.0}]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What a probe of a tiny model found."""
    folder = tmp_path_factory.mktemp("run")
    saved = save_checkpoint(folder, "gpt2")
    batches = [
        write_rows(folder / f"{split}.jsonl", random_rows(seed))
        for seed, split in enumerate("EU")
    ]
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run_config(saved, *batches)))
    config = load_config(path, ())
    return run_probe(config, World(), None, lambda *progress: None).results


@pytest.fixture
def probed(results: Results) -> Probed:
    """A finished probe with one row."""
    return Probed(results=results, sequences=ROWS, delta=None)


def listing(folder: Path) -> list[str]:
    """Names of all files of a folder, hidden ones included."""
    return sorted(path.name for path in folder.iterdir())


def test_a_run_directory_holds_what_was_found(tmp_path: Path, probed: Probed) -> None:
    """results.json, per_sequence.jsonl and config.yaml, and no temporary file."""
    write_results(tmp_path, probed, "seed: 0\n")
    assert listing(tmp_path) == ["config.yaml", "per_sequence.jsonl", "results.json"]
    document = json.loads((tmp_path / "results.json").read_text())
    assert document == probed.results.to_dict()
    assert next(iter(document)) == "schema_version"
    assert (tmp_path / "config.yaml").read_text() == "seed: 0\n"
    lines = (tmp_path / "per_sequence.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == ROWS


def test_numbers_keep_all_their_digits(tmp_path: Path, probed: Probed) -> None:
    """A float64 reads back as the same bits."""
    value = -0.1 - 2.0**-55
    truth = replace(probed.results.truth, delta_h_true=value, se=math.pi * 1e-300)
    changed = replace(probed.results, truth=truth)
    write_results(tmp_path, replace(probed, results=changed), "")
    found = json.loads((tmp_path / "results.json").read_text())["truth"]
    assert found["delta_h_true"] == value
    assert found["se"] == math.pi * 1e-300


def test_the_parameter_change_is_saved_on_request(
    tmp_path: Path, probed: Probed
) -> None:
    """Named tensors of their own shape and dtype, though they share one buffer."""
    flat = torch.arange(6, dtype=torch.float64)
    delta = {"a": flat[:2], "b": flat[2:].view(2, 2)}
    write_results(tmp_path, replace(probed, delta=delta), "")
    found = load_file(tmp_path / "delta_theta.safetensors")
    assert found.keys() == delta.keys()
    for name, tensor in delta.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_never_written(
    tmp_path: Path, probed: Probed, value: float
) -> None:
    """The error names the number; no file appears."""
    bad = replace(probed.results, truth=replace(probed.results.truth, se=value))
    with pytest.raises(RunError, match=f"results.truth.se is {value}"):
        write_results(tmp_path, replace(probed, results=bad), "")
    listed = replace(probed.results, linear_all=[{"score": "full", "slope": value}])
    with pytest.raises(RunError, match="results.linear_all.0.slope is"):
        write_results(tmp_path, replace(probed, results=listed), "")
    assert listing(tmp_path) == []


def test_a_failure_half_way_leaves_no_results(tmp_path: Path, probed: Probed) -> None:
    """results.json comes last: where it stands, everything else is complete."""
    bad_rows = [*ROWS, {"split": "E", "index": 1, "logp": math.nan}]
    with pytest.raises(RunError, match=r"per_sequence.jsonl:2: .*logp"):
        write_results(tmp_path, replace(probed, sequences=bad_rows), "")
    assert "results.json" not in listing(tmp_path)
    assert "per_sequence.jsonl" not in listing(tmp_path)
    assert not [name for name in listing(tmp_path) if name.endswith(".tmp")]


def test_while_results_are_replaced_no_old_ones_stand_beside_new_files(
    tmp_path: Path,
    probed: Probed,
) -> None:
    """A run that cannot be written leaves the one before it as it was."""
    write_results(tmp_path, probed, "seed: 0\n")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    bad_rows = [{"logp": math.nan}]
    with pytest.raises(RunError):
        write_results(tmp_path, replace(probed, sequences=bad_rows), "seed: 1\n")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_replacing_results_removes_the_files_of_the_run_before(
    tmp_path: Path, probed: Probed
) -> None:
    """A parameter change, a page or plots that this run did not make."""
    write_results(tmp_path, replace(probed, delta={"w": torch.ones(2)}), "seed: 0\n")
    plots = tmp_path / "plots"
    plots.mkdir()
    for path in (
        tmp_path / "report.html",
        plots / "weights.png",
        plots / "weights.svg",
    ):
        path.write_text("of the run before")
    write_results(tmp_path, probed, "seed: 1\n")
    assert not listing(plots)
    plots.rmdir()
    assert listing(tmp_path) == ["config.yaml", "per_sequence.jsonl", "results.json"]


def test_a_folder_with_results_is_refused_unless_told_otherwise(
    tmp_path: Path, probed: Probed
) -> None:
    """The message names the folder and what to do."""
    write_results(tmp_path, probed, "")
    message = "holds the results of an earlier run; give --overwrite or another --out"
    with pytest.raises(InputError, match=message):
        prepare_folder(tmp_path, overwrite=False)
    prepare_folder(tmp_path, overwrite=True)
    assert "results.json" in listing(tmp_path)


def test_a_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    """And nothing is left in it by the check that it can be written."""
    out = tmp_path / "runs" / "mine"
    prepare_folder(out, overwrite=False)
    assert listing(out) == []


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    """Before anything ran."""
    path = tmp_path / "mine"
    path.write_text("")
    with pytest.raises(InputError, match="mine: cannot be written: File exists"):
        prepare_folder(path, overwrite=False)
    with pytest.raises(InputError, match="cannot be written: Not a directory"):
        prepare_folder(path / "below", overwrite=False)


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    """Until then its old content stands under the name."""
    path = tmp_path / "file"
    path.write_text("old")
    with written_whole(path) as stream:
        stream.write(b"new")
        stream.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert listing(tmp_path) == ["file"]


def test_an_interrupted_file_leaves_the_old_one(tmp_path: Path) -> None:
    """Whatever the interruption, nothing temporary stays behind."""
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), written_whole(path) as stream:
        stream.write(b"half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert listing(tmp_path) == ["file"]


def test_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    """The message names the file and the reason."""
    message = "absent/file: cannot be written .*No such file or directory"
    with (
        pytest.raises(RunError, match=message),
        written_whole(tmp_path / "absent" / "file"),
    ):
        pass


def test_a_part_that_was_not_asked_for_is_absent(probed: Probed) -> None:
    """Not null: to_dict leaves out fields that are None."""

    def has_null(value: Any) -> bool:
        if isinstance(value, dict):
            return any(map(has_null, value.values()))
        if isinstance(value, list):
            return any(map(has_null, value))
        return value is None

    document = probed.results.to_dict()
    # Of an interval, null is an end that is open.
    document["curvature"].pop("eta_star_interval")
    assert not has_null(document)
