"""A run that was interrupted goes on: with what is finished, and only if it is the same.

Runs are stopped after each of their phases and started again, on as many ranks or on
others, and compared with runs that were never stopped.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import launching
import pytest
import reference as ref
import torch
import yaml
from click.testing import CliRunner
from jobs import run_attribution, run_audit, run_probe, run_sweep
from safetensors.torch import load_file, save_file
from tiny_runs import TinyRun, make_run
from torch import nn

import entropy_ddp
from entropy_ddp.cli import main
from entropy_ddp.config import Config
from entropy_ddp.distributed import World
from entropy_ddp.errors import InputError
from entropy_ddp.estimators.baselines import NUM_PREDICTORS, RIDGE_PENALTY
from entropy_ddp.model.response_tokens import NUM_PROJECTIONS
from entropy_ddp.probe.resume import (
    Unfinished,
    differences,
    identity_of_checkpoint,
    identity_of_configuration,
)
from entropy_ddp.results import UNFINISHED, prepare_folder, write_results

pytestmark = pytest.mark.usefixtures("models_checked_once")

Document = dict[str, Any]
COMPUTE = {"device": "cpu", "tokens_per_microbatch": 60}


class Killed(BaseException):
    """The process ends here; nothing that it could do after is done."""


def quiet(*_: Any) -> None:
    """Shows no progress."""


JOBS: dict[str, tuple[Callable[..., Any], Document]] = {
    "probe": (
        run_probe,
        {
            "attribution": {"enabled": True, "verify": True},
            "linear": {"score": "to_go", "baseline": "ridge"},
            "gradient_dot": {"enabled": True, "direction": "preconditioned"},
        },
    ),
    "probe, loo": (
        run_probe,
        {
            "linear": {"score": "to_go", "baseline": "loo"},
            "gradient_dot": {"variance_method": "backward"},
            "update": {"kl_coefficient": 0.1},
        },
    ),
    "sweep": (run_sweep, {"sweep": {"etas": [0.001, 0.01, 0.03]}}),
    "attribute": (run_attribution, {}),
    "audit": (run_audit, {"gradient_dot": {"enabled": True}}),
}
# Two have every kind of phase between them; the others are made of the same phases.
MARKS = {
    "probe": pytest.mark.bits,
    "sweep": pytest.mark.bits,
    "probe, loo": pytest.mark.long,
    "attribute": pytest.mark.long,
    "audit": pytest.mark.long,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """E in groups of two, so that the gradient-dot form is computed."""
    made = make_run(tmp_path_factory.mktemp("run"), "qwen2")
    pairs = ref.random_rows(
        7, groups=4, responses=2, vocabulary=made.saved.model.config.vocab_size
    )
    return replace(made, E=ref.drawn_from(made.saved.model, pairs, 6))


def perform(
    run: TinyRun, name: str, out: Path, world: World | None = None, **changes: Any
) -> Document:
    """The results of a job, written to `out`."""
    job, sections = JOBS[name]
    out.mkdir(exist_ok=True)
    config = run.config(**{"compute": COMPUTE} | sections | changes)
    probed = job(config, world or World(), out, quiet)
    write_results(out, probed, "seed: 0\n")
    return json.loads((out / "results.json").read_text())


def kill_after(monkeypatch: pytest.MonkeyPatch, count: int) -> list[str]:
    """End the process after so many phases were kept; their names."""
    kept: list[str] = []
    write = Unfinished.write

    def write_and_end(self: Unfinished, phase: str, *rest: Any) -> None:
        write(self, phase, *rest)
        kept.append(phase)
        if len(kept) == count:
            raise Killed

    monkeypatch.setattr(Unfinished, "write", write_and_end)
    return kept


def comparable(document: Document) -> Document:
    """Without what this start of the run has cost, and which passes it read."""
    document = json.loads(json.dumps(document))
    for key in ("started", "seconds", "memory", "passes", "resumed"):
        document["run"].pop(key, None)
    rows = {row["name"]: row for row in document["audit"]}
    of_numbers = {k: v for k, v in rows.items() if not k.startswith("collectives")}
    return document | {"audit": of_numbers}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=MARKS.get(name, ())) for name in JOBS]
)
def test_a_run_that_is_killed_after_any_phase_goes_on(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Bit for bit what an undisturbed run gives, audits included.

    Killed again and again on its way, as well as once.
    """
    with monkeypatch.context() as patch:
        phases = kill_after(patch, -1)
        expected = perform(run, name, tmp_path / "whole")
    assert "resumed" not in expected["run"]
    assert len(phases) == len(set(phases)) > 4
    rows = (tmp_path / "whole" / "per_sequence.jsonl").read_bytes()
    for count in [1, len(phases) // 2, len(phases)]:
        out = tmp_path / f"{count}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_after(patch, count)
            perform(run, name, out)
        assert not (out / "results.json").exists()
        found = perform(run, name, out)
        assert found["run"]["resumed"] == phases[:count]
        assert comparable(found) == comparable(expected)
        assert (out / "per_sequence.jsonl").read_bytes() == rows
        assert not (out / UNFINISHED).exists()
    out = tmp_path / "again and again"
    # The longest run is killed after some of its phases only, others after every one.
    stride = 5 if name == "probe" else 1
    for count in range(0, len(phases), stride):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_after(patch, min(stride, len(phases) - count))
            perform(run, name, out)
    found = perform(run, name, out)
    assert found["run"]["resumed"] == phases
    assert comparable(found) == comparable(expected)


def test_a_phase_that_is_kept_is_not_run_again(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The phases shown are those that are left."""
    job, sections = JOBS["audit"]
    config = run.config(**{"compute": COMPUTE} | sections)
    shown: list[str] = []

    def show(phase: str, done: int, total: int) -> None:
        if total and not done:
            shown.append(phase)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        kept = kill_after(patch, 3)
        job(config, World(), tmp_path, show)
    assert kept == [
        "gradient of U",
        "truth: E after the step",
        "slope: E along the step",
    ]
    before = list(shown)
    shown.clear()
    job(config, World(), tmp_path, show)
    assert len(before) == 3 and not set(before) & set(shown)


def test_a_budget_may_differ(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What changes no number may: the audit knows how the slope's pass was cut."""
    expected = perform(run, "audit", tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 3)
        perform(run, "audit", tmp_path / "out")
    compute = COMPUTE | {"tokens_per_microbatch": 12}
    found = perform(run, "audit", tmp_path / "out", compute=compute)
    assert_close(found, expected)


# Of the largest term: v is the difference of two parameters, over eta; their last bit is
# 7e-14 of it here, and every number is a sum of some dozen products with it.
TOLERANCE = 1e-12
# The ridge's coefficients solve equations that are conditioned no better than this.
RIDGE_CONDITION = (NUM_PREDICTORS + NUM_PROJECTIONS) / RIDGE_PENALTY
RIDGE_TOLERANCE = 4 * torch.finfo(torch.float64).eps * RIDGE_CONDITION


def assert_close(found: Document, expected: Document) -> None:
    """Numbers up to rounding of the terms they are sums of; verdicts alike."""
    scale = max(map(abs, expected["linear"]["terms"].values()))
    for section in ("truth", "linear", "curvature", "gradient_dot", "sweep"):
        is_fitted = section == "linear" and expected[section]["baseline"] == "ridge"
        tolerance = RIDGE_TOLERANCE if is_fitted else TOLERANCE
        for key, value in flat(expected.get(section, {})).items():
            other = flat(found[section])[key]
            if isinstance(value, float):
                limit = tolerance * max(abs(value), scale, 1.0)
                # Differences of two slopes, divided by their distance.
                limit *= 1e6 if section == "curvature" or "delta_h2" in key else 1
                assert abs(other - value) <= limit, (section, key)
            else:
                assert other == value, (section, key)
    verdicts = [
        {
            row["name"]: row["verdict"]
            for row in document["audit"]
            # A start that reads every gradient sums none.
            if not row["name"].startswith("collectives")
        }
        for document in (found, expected)
    ]
    assert verdicts[0] == verdicts[1]


def flat(value: Any, name: str = "") -> Document:
    """Nested mappings and lists as one mapping, without what is rounding alone."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        found: Document = {}
        for key, item in items:
            found |= flat(item, f"{name}.{key}")
        return found
    return {} if name == ".duality_gap" else {name: value}


# What changes no number may differ too, of which the same run is told.
UNLIKE: Document = {
    "compute": {
        "device": "auto",
        "tokens_per_microbatch": 31,
        "snapshot_device": "device",
        "rank_timeout_seconds": 7.0,
        "count_operations": True,
    },
    "attribution": {"top": 3},
    "truth": {"ess_warn": 0.999, "ess_abort": 0.0},
    "update": {"save_delta": True, "from_checkpoint": True},
    "sweep": {"etas": [0.25]},
    "out": "elsewhere",
}


@pytest.mark.parametrize("section", UNLIKE)
def test_settings_that_change_no_number_are_not_the_run_s(
    run: TinyRun, section: str
) -> None:
    """Each by itself: what the run depends on stays the same."""
    plain = run.config(compute=COMPUTE)
    before = identity_of_configuration(plain, "attribute")
    given = UNLIKE[section]
    pairs = given.items() if isinstance(given, dict) else [(None, given)]
    for key, value in pairs:
        document = plain.model_dump(mode="json")
        if key is None:
            document[section] = value
        else:
            assert document[section][key] != value
            document[section][key] = value
        now = identity_of_configuration(Config.model_validate(document), "attribute")
        assert differences(before, now) == [], key


def test_another_code_of_the_same_version_is_another_run(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clone that was pulled between the two starts has records of another layout."""
    config = run.config(compute=COMPUTE)
    before = identity_of_configuration(config, "probe")
    monkeypatch.setattr(entropy_ddp, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "__init__.py").write_text("")
    (found,) = differences(before, identity_of_configuration(config, "probe"))
    version = re.escape(entropy_ddp.__version__)
    assert re.fullmatch(
        rf"entropy_ddp was {version} \(code \w+\), now {version} \(code \w+\)", found
    )


def test_settings_that_change_no_number_may_differ(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on with all of them changed, to the same numbers."""
    changes = {name: UNLIKE[name] for name in ("attribution", "truth")}
    changes["update"] = {"max_grad_norm": 0.5, "save_delta": True}
    changes["compute"] = UNLIKE["compute"] | COMPUTE
    whole = perform(run, "attribute", tmp_path / "whole", **changes)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 3)
        perform(run, "attribute", tmp_path / "out")
    found = perform(run, "attribute", tmp_path / "out", **changes)
    assert len(found["run"]["resumed"]) == 3
    assert_close(found, whole)
    assert len(found["attribution"]["top_tokens"]) == 3
    # What this start has run; E is scored again for the noise floor, and with derivatives
    # for the parts of the step.
    ran = {(row["pass"], row["batch"]) for row in found["run"]["passes"]}
    all_passes = {(row["pass"], row["batch"]) for row in whole["run"]["passes"]}
    assert all_passes - ran == {("pull_back", "U")}


@pytest.mark.bits
def test_the_number_of_threads_is_not_the_run_s() -> None:
    """A launcher gives each rank one thread, a process alone has as many as cores."""
    base = nn.Linear(2048, 1024, bias=False).requires_grad_(False)
    adapter = nn.Linear(3, 2)
    policy: Any = SimpleNamespace(
        model=nn.Sequential(base, adapter),
        parameters=dict(adapter.named_parameters()),
        device=torch.device("cpu"),
    )
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    try:
        for _ in range(6):
            base.weight.data.normal_(generator=generator)
            found = []
            for count in (1, 2):
                torch.set_num_threads(count)
                found.append(identity_of_checkpoint(policy, None, None))
            assert differences(*found) == []
    finally:
        torch.set_num_threads(threads)
    policy.device = torch.device("cuda")
    other = identity_of_checkpoint(policy, None, None)
    assert differences(found[1], other) == ["device was cpu, now cuda"]


# What differs is said


def nudge(path: Path) -> None:
    """Every weight of a safetensors file is a little larger."""
    save_file({n: 1.01 * x for n, x in load_file(path).items()}, path, {"format": "pt"})


def nudge_moments(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    for entry in state["state"].values():
        entry["exp_avg"] *= 1.01
    torch.save(state, path)


def other_file(name: str, change: Callable[[Path], None]) -> Callable[[TinyRun], Any]:
    def spoil(run: TinyRun) -> tuple[TinyRun, Document]:
        change(next(run.folder.rglob(name)))
        return run, {}

    return spoil


def with_sections(**sections: Any) -> Callable[[TinyRun], Any]:
    return lambda run: (run, sections)


def other_reward(run: TinyRun) -> tuple[TinyRun, Document]:
    row = replace(run.U[0], reward=(run.U[0].reward or 0.0) + 1.0)
    return replace(run, U=[row, *run.U[1:]]), {}


def other_response(run: TinyRun) -> tuple[TinyRun, Document]:
    ids = [(run.E[0].response_ids[0] + 1) % 17, *run.E[0].response_ids[1:]]
    return replace(run, E=[replace(run.E[0], response_ids=ids), *run.E[1:]]), {}


HASH = "[0-9a-f]{16}"
CHANGES: dict[str, tuple[Callable[[TinyRun], Any], str]] = {
    "temperature": (
        with_sections(objective={"temperature": 1.1}),
        r"objective\.temperature was 1\.0, now 1\.1",
    ),
    "loss": (
        with_sections(update={"loss": "grpo", "max_grad_norm": 0.25}),
        r"update\.loss was dr_grpo, now grpo; update\.max_grad_norm was 0\.5, now 0\.25",
    ),
    "curvature": (
        with_sections(curvature={"enabled": False}),
        r"curvature\.enabled was True, now False",
    ),
    "precision": (
        with_sections(precision={"model": "float32"}),
        rf"precision\.model was float64, now float32; trained weights was {HASH}, now",
    ),
    "a reward": (other_reward, f"batch U was {HASH}, now {HASH}"),
    "a token": (other_response, f"batch E was {HASH}, now {HASH}"),
    "the adapter": (
        other_file("adapter_model.safetensors", nudge),
        f"trained weights was {HASH}, now {HASH}",
    ),
    "the base": (
        other_file("model.safetensors", nudge),
        f"other weights was {HASH}, now {HASH}",
    ),
    "moments": (
        other_file("optimizer.pt", nudge_moments),
        f"optimizer state was {HASH}, now {HASH}",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_differs_is_named_before_and_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Nothing is run, nothing is touched; as it was, the run goes on."""
    run = make_run(tmp_path / "run", "qwen2")
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 2)
        perform(run, "attribute", out)
    before = {p.name: p.read_bytes() for p in (out / UNFINISHED).iterdir()}
    change, message = CHANGES[name]
    changed, sections = change(run)
    with pytest.raises(InputError, match=rf"batch: {message}") as caught:
        perform(changed, "attribute", out, **sections)
    assert "; start it as it was, or give --overwrite" in str(caught.value)
    assert {p.name: p.read_bytes() for p in (out / UNFINISHED).iterdir()} == before


def test_another_command_or_version_is_named_too(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 1)
        perform(run, "audit", tmp_path)
    with pytest.raises(InputError, match="batch: command was audit, now attribute;"):
        perform(run, "attribute", tmp_path, gradient_dot={"enabled": True})
    path = tmp_path / UNFINISHED / "run.json"
    document = json.loads(path.read_text())
    document["depends on"]["entropy_ddp"] = "0.0.9"
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"batch: entropy_ddp was 0\.0\.9, now \d"):
        perform(run, "audit", tmp_path)


def test_damaged_files_are_named(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a file of another run in the same folder is not taken for this run's."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 2)
        perform(run, "audit", tmp_path)
    (path,) = (tmp_path / UNFINISHED).glob("truth-E-after-the-step.*")
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    with pytest.raises(
        InputError, match=r"truth-E-after-the-step\.0-of-1\.\w+: .*damaged.*delete"
    ):
        perform(run, "audit", tmp_path)
    path.unlink()
    path.with_name("truth-E-after-the-step.0-of-1.0123abcd").write_bytes(whole)
    found = perform(run, "audit", tmp_path)
    assert found["run"]["resumed"] == ["gradient of U"]
    (tmp_path / UNFINISHED).mkdir()
    (tmp_path / UNFINISHED / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json: .*damaged file.*--overwrite"):
        perform(run, "audit", tmp_path)


def test_the_options_of_a_folder(tmp_path: Path) -> None:
    """Unfinished, finished, neither; with --resume, with --overwrite, with neither."""
    out = tmp_path / "out"
    with pytest.raises(InputError, match="out: there is nothing unfinished to resume"):
        prepare_folder(out, False, resume=True)
    assert not out.exists()
    (out / UNFINISHED).mkdir(parents=True)
    with pytest.raises(
        InputError, match="out: holds an unfinished run; give --resume .*--overwrite"
    ):
        prepare_folder(out, False)
    with pytest.raises(InputError, match="give one of them"):
        prepare_folder(out, True, resume=True)
    prepare_folder(out, False, resume=True)
    assert (out / UNFINISHED).exists()
    # Begun with --overwrite: the earlier results stand until the new ones are there.
    (out / "results.json").write_text("{}")
    prepare_folder(out, False, resume=True)
    with pytest.raises(InputError, match="holds an unfinished run"):
        prepare_folder(out, False)
    prepare_folder(out, True)
    assert sorted(path.name for path in out.iterdir()) == ["results.json"]
    with pytest.raises(InputError, match="holds the results of an earlier run"):
        prepare_folder(out, False)
    with pytest.raises(InputError, match="nothing unfinished to resume"):
        prepare_folder(out, False, resume=True)


def test_the_command_line(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit codes, messages, and the line at the top of the tables."""
    config, out = tmp_path / "config.yaml", tmp_path / "out"
    document = run.config(compute=COMPUTE).model_dump(mode="json")
    config.write_text(yaml.safe_dump(document))

    def invoke(*options: str) -> Any:
        arguments = ["probe", "--config", str(config), "--out", str(out), *options]
        return CliRunner().invoke(main, arguments)

    refused = invoke("--resume")
    assert refused.exit_code == 2
    assert "nothing unfinished to resume" in refused.stderr
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 2)
        invoke()
    refused = invoke()
    assert refused.exit_code == 2 and "give --resume" in refused.stderr
    refused = invoke("--resume", "--set", "seed=7")
    assert refused.exit_code == 2 and "seed was 0, now 7" in refused.stderr
    assert refused.stderr.count("error:") == 1 and "Traceback" not in refused.stderr
    done = invoke("--resume")
    assert done.exit_code == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "resumed, from before: gradient of U, truth: E after the step" in text
    again = invoke("--overwrite", "--quiet")
    assert again.exit_code == 0
    assert "resumed" not in (out / "results.json").read_text()
    assert sorted(p.name for p in out.iterdir()) == [
        "config.yaml",
        "per_sequence.jsonl",
        "results.json",
    ]


# Ranks

STOPPED = """
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from entropy_ddp.cli.ranks import run_ranks
from entropy_ddp.config import load_config
from jobs import run_audit, run_probe
from entropy_ddp.probe.resume import Unfinished
from entropy_ddp.results import write_results

# A run in FOLDER.3 stops after three phases; one in killed.3 ends both processes.
config, *folders = map(Path, sys.argv[1:])

class Stop(Exception):
    pass

def body(world):
    write = Unfinished.write
    settings = load_config(config, ())
    for out in folders:
        count = int(out.suffix[1:] or 10**6)
        kept = []
        def write_and_stop(self, phase, *rest):
            write(self, phase, *rest)
            kept.append(phase)
            if len(kept) == count:
                if "killed" in out.name:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise Stop
        Unfinished.write = write_and_stop
        out.mkdir(exist_ok=True)
        try:
            probed = run_probe(settings, replace(world, collectives={}), out, lambda *_: None)
        except Stop:
            continue
        if world.is_main:
            write_results(out, probed, "seed: 0\\n")
    return 0

sys.exit(run_ranks(body))
"""


@pytest.mark.long
def test_the_number_of_ranks_may_change(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks stopped and killed, one rank goes on; one rank stopped, three go on."""
    sections = {"compute": COMPUTE} | JOBS["probe"][1]
    script, config = tmp_path / "stopped.py", tmp_path / "config.yaml"
    script.write_text(STOPPED)
    config.write_text(yaml.safe_dump(run.config(**sections).model_dump(mode="json")))
    with monkeypatch.context() as patch:
        phases = kill_after(patch, -1)
        expected = perform(run, "probe", tmp_path / "whole")
    counts = [3, len(phases)]
    folders = [tmp_path / f"two.{count}" for count in counts]
    killed = tmp_path / "killed.3"
    two = launching.torchrun(2, script, config, *folders, killed)
    assert launching.run(two, launching.HELPERS).returncode != 0
    shutil.copytree(killed, tmp_path / "by three")
    for count, out in zip([*counts, 3], [*folders, killed]):
        found = perform(run, "probe", out)
        # A rank may have been killed before the other had kept the phase.
        resumed = found["run"]["resumed"]
        fewer = [phases[:count], phases[: count - 1]]
        assert resumed in (fewer if out == killed else fewer[:1])
        assert_close(found, expected)
    outs = {tmp_path / f"one to three {count}": count for count in (1, 6)}
    for out, count in outs.items():
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_after(patch, count)
            perform(run, "probe", out)
    three = launching.torchrun(3, script, config, *outs, tmp_path / "by three")
    launching.run(three, launching.HELPERS).require_success()
    for out, count in outs.items():
        found = json.loads((out / "results.json").read_text())
        assert found["run"]["world_size"] == 3
        assert found["run"]["resumed"] == phases[:count]
        assert_close(found, expected)
        assert not (out / UNFINISHED).exists()
    assert_close(json.loads((tmp_path / "by three/results.json").read_text()), expected)
