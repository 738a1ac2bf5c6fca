"""The command line: what it prints where, what it writes, and its exit codes."""

import importlib.metadata
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
import yaml
from checkpoints import (
    VOCABULARY,
    Saved,
    run_config,
    save_character_tokenizer,
    save_checkpoint,
    write_rows,
)
from click.testing import CliRunner, Result
from reference import drawn_from, random_rows
from run_directories import write_run
from safetensors.torch import save_file

from entropy_ddp.cli import main
from entropy_ddp.config import load_config
from entropy_ddp.probe import opening
from entropy_ddp.probe.resume import Unfinished
from entropy_ddp.sampling import rollouts as sampling

HEAVY = ("torch", "numpy", "transformers", "peft", "accelerate", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A checkpoint with a tokenizer, batches and a configuration on disk."""

    saved: Saved
    folder: Path

    @property
    def config(self) -> Path:
        """The configuration file."""
        return self.folder / "run.yaml"

    def probe(self, out: Path, *options: str | Path) -> Result:
        """`probe` in this process, with its results in `out`."""
        return invoke("probe", "--config", self.config, "--out", out, *options)


def invoke(*arguments: str | Path) -> Result:
    """A command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of this process run alone."""
    for name in launching.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of a Qwen2 adapter, with ragged batches and an empty response."""
    folder = tmp_path_factory.mktemp("run")
    saved = save_checkpoint(folder, "qwen2")
    save_character_tokenizer(saved.base)
    evaluation = random_rows(
        1, groups=12, responses=[1, 2, 3] * 4, vocabulary=17, with_empty=True
    )
    update = random_rows(2, groups=3, responses=[2, 3, 2], vocabulary=17)
    config = run_config(
        saved,
        write_rows(folder / "E.jsonl", drawn_from(saved.model, evaluation, 3)),
        write_rows(folder / "U.jsonl", update),
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return Run(saved=saved, folder=folder)


@pytest.fixture(scope="module")
def printed(
    run: Run, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Result, Result, Path]:
    """A probe with tables, the same with --json, and the run directory."""
    out = tmp_path_factory.mktemp("out") / "made" / "here"
    with pytest.MonkeyPatch.context() as patch:
        for name in launching.LAUNCHER_VARIABLES:
            patch.delenv(name, raising=False)
        tables = run.probe(out)
        document = run.probe(out, "--overwrite", "--json")
    return tables, document, out


def document_of(out: Path) -> dict[str, Any]:
    """results.json, with a complaint about NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in results.json")

    return json.loads((out / "results.json").read_text(), parse_constant=refuse)


def rows_of(out: Path, name: str = "per_sequence.jsonl") -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


# Help and usage


@pytest.mark.parametrize("command", [[], *([name] for name in sorted(main.commands))])
def test_help_loads_no_heavy_library(command: list[str]) -> None:
    """Whatever the machine, help waits for none of them."""
    arguments = ("-X", "importtime", *launching.PACKAGE, *command, "--help")
    finished = launching.run(launching.python(*arguments)).require_success()
    assert finished.stdout.startswith(
        f"Usage: python -m entropy_ddp {' '.join(command)}"
    )
    loaded = set(re.findall(r"\| +(\w+)$", finished.stderr, flags=re.MULTILINE))
    assert "entropy_ddp" in loaded
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize("options", [["--set", "seed=x"], ["--no-such-option"]])
def test_usage_and_configuration_errors_load_no_heavy_library(
    options: list[str],
) -> None:
    """A misspelt option is told at once."""
    arguments = ("-X", "importtime", *launching.PACKAGE, "probe", *options)
    finished = launching.run(launching.python(*arguments))
    assert finished.returncode == 2
    loaded = set(re.findall(r"\| +(\w+)$", finished.stderr, flags=re.MULTILINE))
    assert not loaded & set(HEAVY)


def test_a_report_is_made_without_torch(tmp_path: Path) -> None:
    """It needs no model: its start costs a second, not ten."""
    run = write_run(tmp_path / "run", texts=[["1", "2"], ["3"], ["4", "5", "6"]])
    code = (
        "import sys; from entropy_ddp.cli import main\n"
        f"main(['report', {str(run)!r}], standalone_mode=False)\n"
        "print([m for m in ('torch', 'transformers', 'accelerate') if m in sys.modules])"
    )
    done = launching.run(launching.python("-c", code), fresh=True).require_success()
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_help_names_every_command() -> None:
    """With the first line of what it does."""
    text = invoke("--help").stdout
    for name, command in main.commands.items():
        assert re.search(rf"^  {name} +\S", text, flags=re.MULTILINE), name
        assert command.help


def test_the_version_is_that_of_the_package() -> None:
    """One number, kept in one place for the user."""
    text = invoke("--version").stdout
    setup = (launching.REPOSITORY / "setup.cfg").read_text()
    version = re.search(r"^version = (\S+)$", setup, flags=re.MULTILINE)
    assert version is not None
    assert text.strip().endswith(version[1])


@pytest.mark.parametrize("arguments", [["no-such-command"], ["probe", "--jsn"], []])
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    """click's own code, which is ours too; a bare call shows the help."""
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr + result.stdout


# What a probe prints and writes


def complaints(result: Result) -> list[str]:
    """Lines of standard error, but for the memory that is needed and free."""
    lines = result.stderr.splitlines()
    announced = [line for line in lines if re.match(r"memory: .* GB a rank", line)]
    assert len(announced) == 1
    return [line for line in lines if line not in announced]


def test_a_probe_prints_tables_on_standard_output(
    printed: tuple[Result, Result, Path],
) -> None:
    """The answer with its standard errors, the audits, and where it was written."""
    tables, _, out = printed
    assert tables.exit_code == 0, tables.stderr
    assert complaints(tables) == []
    for part in ("ΔH true", "ΔH first order", "±", "audits", "written to"):
        assert part in tables.stdout
    assert str(out) in tables.stdout.replace("\n", "")


def test_json_is_the_results_file_and_nothing_else(
    printed: tuple[Result, Result, Path],
) -> None:
    """Standard output is one JSON document; the tables go to standard error."""
    _, result, out = printed
    assert result.exit_code == 0
    assert json.loads(result.stdout) == document_of(out)
    assert "ΔH true" in result.stderr


def test_quiet_prints_nothing(run: Run, tmp_path: Path) -> None:
    """Not even a library's warning on standard error, as a user would see it."""
    arguments = ("probe", "--config", run.config, "--out", tmp_path / "out", "--quiet")
    command = launching.python(*launching.PACKAGE, *arguments)
    finished = launching.run(command, fresh=True).require_success()
    assert (finished.stdout, finished.stderr) == ("", "")
    assert document_of(tmp_path / "out")["status"] == "ok"


def test_quiet_json_prints_json_only(run: Run, tmp_path: Path) -> None:
    """The two options together, for scripts."""
    result = run.probe(tmp_path / "out", "--quiet", "--json")
    assert json.loads(result.stdout) == document_of(tmp_path / "out")
    assert result.stderr == ""


BATCH = {"num_groups": int, "num_sequences": int, "num_tokens": int}
SCHEMA: dict[str, Any] = {
    "schema_version": int,
    "status": str,
    "run": {
        "command": str,
        "versions": {"entropy_ddp": str, "torch": str, "transformers": str},
        "world_size": int,
        "seed": int,
        "device": str,
        "dtype": str,
        "started": str,
        "seconds": {"gradient of U": float},
    },
    "E": BATCH,
    "U": BATCH,
    "update": {
        "loss": str,
        "learning_rate_used": float,
        "param_update_l2": float,
        "grad_norm": float,
        "clip_coef": float,
        "num_optimizer_steps": int,
        "top_parameters": [{"name": str, "l2": float}],
    },
    "power": {"resolved": bool, "smallest_change": float, "change": float},
    "truth_all": [
        {"is_mode": str, "delta_h_true": float, "se": float, "ess_fraction": float}
    ],
    "linear_all": [
        {
            "score": str,
            "baseline": str,
            "control_variates": bool,
            "slope": float,
            "se": float,
        }
    ],
    "truth": {
        "normalize": str,
        "is_mode": str,
        "H_orig": float,
        "H_upd": float,
        "H_orig_se": float,
        "H_upd_se": float,
        "noise_floor": float,
        "delta_h_true": float,
        "se": float,
        "ess": float,
        "ess_fraction": float,
        "log_weight": {"min": float, "median": float, "max": float},
        "clip_fraction": float,
    },
    "linear": {
        "normalize": str,
        "score": str,
        "baseline": str,
        "slope": float,
        "delta_h1": float,
        "se": float,
        "se_jackknife": float,
        "terms": {"score": float, "pathwise": float, "denominator": float},
        "duality_gap": float,
    },
    "audit": [{"name": str, "expected": str, "verdict": str, "hint": str}],
}


def require_schema(value: Any, schema: Any, place: str) -> None:
    """Every key of the schema is there, with a value of its type."""
    if isinstance(schema, dict):
        missing = schema.keys() - value.keys()
        assert not missing, f"{place} has no {missing}"
        for name, inner in schema.items():
            require_schema(value[name], inner, f"{place}.{name}")
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, place
        for number, item in enumerate(value):
            require_schema(item, schema[0], f"{place}.{number}")
    else:
        allowed = (int, float) if schema is float else schema
        assert isinstance(value, allowed), f"{place} is {value!r}"
        assert schema is bool or not isinstance(value, bool), place


def test_the_results_file_has_every_key_of_the_contract(
    printed: tuple[Result, Result, Path],
) -> None:
    """Typed, finite, and complete."""
    document = document_of(printed[2])
    require_schema(document, SCHEMA, "results")
    assert document["status"] == "ok"
    assert {row["verdict"] for row in document["audit"]} <= {"ok", "warn", "fail"}
    assert all("value" in row for row in document["audit"])
    assert all(row["hint"] for row in document["audit"] if row["verdict"] != "ok")
    assert document["run"]["versions"]["torch"] == importlib.metadata.version("torch")
    modes = [row["is_mode"] for row in document["truth_all"]]
    assert modes == ["snis", "clip", "per_decision"]


def test_the_headline_numbers_agree_with_each_other(
    printed: tuple[Result, Result, Path],
) -> None:
    """Each is among its alternatives, and the identities between them hold."""
    document = document_of(printed[2])
    truth, linear, update = (document[k] for k in ("truth", "linear", "update"))
    assert truth["delta_h_true"] == pytest.approx(
        truth["H_upd"] - truth["H_orig"], rel=1e-12
    )
    assert truth["ess_fraction"] == truth["ess"] / document["E"]["num_sequences"]
    rate = update["learning_rate_used"]
    assert linear["delta_h1"] == pytest.approx(rate * linear["slope"], rel=1e-14)
    total = sum(linear["terms"].values())
    scale = max(map(abs, linear["terms"].values()))
    assert abs(linear["slope"] - total) < 1e-13 * scale
    alternatives = {row["is_mode"]: row for row in document["truth_all"]}
    assert truth["is_mode"] == "per_decision" and truth["control_variates"]
    chosen = alternatives["per_decision"]
    assert truth["delta_h_true"] == chosen["delta_h_true_adjusted"]
    assert truth["se_jackknife"] == chosen["se_jackknife_adjusted"]
    assert linear["slope"] in [row["slope"] for row in document["linear_all"]]


E_KEYS = [
    *("split", "index", "group", "num_tokens", "logp", "entropy", "logp_upd"),
    *("entropy_upd", "log_weight", "contribution_true", "contribution_linear"),
]
U_KEYS = [
    *("split", "index", "group", "num_tokens", "logp", "entropy", "reward"),
    "advantage",
]


def test_there_is_one_row_per_sequence_in_file_order(
    run: Run, printed: tuple[Result, Result, Path]
) -> None:
    """E, then U; the contract's keys in its order, then the unknown ones of the row."""
    rows = rows_of(printed[2])
    for split, keys in (("E", E_KEYS), ("U", U_KEYS)):
        given = rows_of(run.folder, f"{split}.jsonl")
        found = [row for row in rows if row["split"] == split]
        assert [row["index"] for row in found] == list(range(len(given)))
        for row, source in zip(found, given, strict=True):
            assert list(row) == [*keys, "tag"]
            assert (row["group"], row["tag"]) == (source["group"], source["tag"])
            assert row["num_tokens"] == len(source["response_ids"])
    assert [row["split"] for row in rows] == sorted(row["split"] for row in rows)


def test_contributions_sum_to_the_headline_numbers(
    printed: tuple[Result, Result, Path],
) -> None:
    """Exactly, up to the rounding of terms that cancel."""
    document, rows = document_of(printed[2]), rows_of(printed[2])
    evaluation = [row for row in rows if row["split"] == "E"]
    total = math.fsum(row["contribution_true"] for row in evaluation)
    entropy = document["truth"]["H_orig"]
    assert abs(total - document["truth"]["delta_h_true"]) < 1e-13 * entropy
    linear = document["linear"]
    rate = document["update"]["learning_rate_used"]
    scale = rate * max(map(abs, linear["terms"].values()))
    total = math.fsum(row["contribution_linear"] for row in evaluation)
    assert abs(total - linear["delta_h1"]) < 1e-13 * scale


def test_an_empty_response_counts_with_entropy_zero(
    printed: tuple[Result, Result, Path],
) -> None:
    """It has a row, no log-probability, and importance weight one."""
    empty = [row for row in rows_of(printed[2]) if row["num_tokens"] == 0]
    assert empty
    for row in empty:
        assert (row["logp"], row["entropy"], row["log_weight"]) == (0.0, 0.0, 0.0)


def test_unknown_keys_of_a_row_are_carried(run: Run, tmp_path: Path) -> None:
    """Of any JSON type; one with the name of a computed key gets a prefix."""
    extra = {"note": {"a": [1, None, "ü"]}, "logp": 7, "split": "train", "k": False}
    rows = [row | extra for row in rows_of(run.folder, "E.jsonl")]
    path = tmp_path / "E.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run.probe(tmp_path / "out", "--set", f"batches.E.file={path}")
    assert result.exit_code == 0, result.stderr
    for row in rows_of(tmp_path / "out"):
        if row["split"] == "E":
            tail = ["tag", "note", "input_logp", "input_split", "k"]
            assert list(row) == [*E_KEYS, *tail]
            assert row["note"] == extra["note"]
            assert (row["input_logp"], row["input_split"]) == (7, "train")


def test_the_written_configuration_repeats_the_run(run: Run, tmp_path: Path) -> None:
    """config.yaml is resolved, --set included, and gives the same bits again."""
    first, second = tmp_path / "first", tmp_path / "second"
    run.probe(first, "--set", "objective.normalize=sum", "--set", "seed=5")
    result = invoke("probe", "--config", first / "config.yaml", "--out", second)
    assert result.exit_code == 0, result.stderr
    config = load_config(first / "config.yaml", ())
    assert (config.objective.normalize, config.seed) == ("sum", 5)
    for name in ("E", "U", "update", "truth", "linear", "truth_all", "linear_all"):
        assert document_of(first)[name] == document_of(second)[name]


def test_settings_win_over_the_file(run: Run, tmp_path: Path) -> None:
    """--set over --config, --out over the configuration's `out`."""
    options = ("--set", "update.lr_override=1e-5", "--set", f"out={tmp_path / 'no'}")
    run.probe(tmp_path / "out", *options)
    found = document_of(tmp_path / "out")["update"]["learning_rate_used"]
    assert found == 1e-5
    assert not (tmp_path / "no").exists()


def test_the_output_folder_can_come_from_the_configuration(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`out`, or else a new folder under runs/ named after the command."""
    monkeypatch.chdir(tmp_path)
    config = ("--config", run.config)
    assert invoke("probe", *config, "--set", "out=mine").exit_code == 0
    assert document_of(tmp_path / "mine")["status"] == "ok"
    assert invoke("probe", *config).exit_code == 0
    (made,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"probe-\d{8}-\d{6}", made.name)
    assert document_of(made)["status"] == "ok"


def test_the_checkpoint_is_not_touched(run: Run, tmp_path: Path) -> None:
    """Not a byte of it, and no file beside it."""

    def content(folder: Path) -> dict[str, bytes]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    before = content(run.folder)
    run.probe(tmp_path / "out", "--set", "update.save_delta=true")
    assert content(run.folder) == before


# Exit codes


def test_untrusted_results_are_written_and_end_with_3(run: Run, tmp_path: Path) -> None:
    """A huge step leaves few sequences with weight: everything is there, marked."""
    out = tmp_path / "out"
    settings = ("--set", "update.lr_override=5.0", "--set", "truth.ess_abort=0.3")
    result = run.probe(out, "--json", *settings)
    assert result.exit_code == 3
    document = document_of(out)
    assert document["status"] == "untrusted"
    assert document["truth"]["ess_fraction"] < 0.3
    assert json.loads(result.stdout) == document
    (row,) = [row for row in document["audit"] if row["verdict"] == "fail"]
    assert row["name"] == "ESS / N"
    assert "lr_override" in row["hint"]
    first, second = complaints(result)[:2]
    assert first == "NOT TO BE TRUSTED: failed the check ESS / N; what to do:"
    assert second.startswith("FAILED: ESS / N is ")
    assert len(rows_of(out)) == document["E"]["num_sequences"] + 7


@pytest.mark.parametrize("command", ["probe", "sweep", "attribute", "audit"])
def test_quiet_commands_say_why_they_end_with_3(
    run: Run, tmp_path: Path, command: str
) -> None:
    """On standard error, as an error."""
    settings = ("update.lr_override=5.0", "sweep.etas=[5.0]", "truth.ess_abort=0.3")
    step = [word for setting in settings for word in ("--set", setting)]
    out = ("--out", tmp_path / "out", "--quiet")
    result = invoke(command, "--config", run.config, *out, *step)
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.startswith("NOT TO BE TRUSTED: failed the check ESS / N; ")
    assert document_of(tmp_path / "out")["status"] == "untrusted"


def test_a_low_ess_above_the_limit_is_a_warning(run: Run, tmp_path: Path) -> None:
    """Between ess_abort and ess_warn the results stand."""
    limits = ("--set", "truth.ess_abort=0", "--set", "truth.ess_warn=1")
    result = run.probe(tmp_path / "out", *limits)
    assert result.exit_code == 0
    rows = {r["name"]: r for r in document_of(tmp_path / "out")["audit"]}
    assert rows["ESS / N"]["verdict"] == "warn"


def test_a_run_that_fails_ends_with_1_and_writes_no_results(
    run: Run, tmp_path: Path
) -> None:
    """One line, no traceback: the gradient of absurd advantages overflows."""
    rows = [
        row | {"advantage": 1e200 * (-1) ** number}
        for number, row in enumerate(rows_of(run.folder, "U.jsonl"))
    ]
    path = tmp_path / "U.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run.probe(tmp_path / "out", "--set", f"batches.U.file={path}")
    assert result.exit_code == 1
    message = (
        "error: step: the gradient of the loss has norm inf, expected a finite one"
    )
    (line,) = complaints(result)
    assert line.startswith(message)
    assert result.stdout == ""
    # What was finished before can be resumed.
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["unfinished"]


def bad_row(run: Run, tmp_path: Path) -> list[str]:
    """A token outside the vocabulary in line 2 of U."""
    rows = rows_of(run.folder, "U.jsonl")
    rows[1]["response_ids"] = [3, 99]
    path = tmp_path / "U.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"batches.U.file={path}"]


BAD_INPUTS: dict[str, tuple[Callable[[Run, Path], list[str]], str]] = {
    "unknown key": (
        lambda run, tmp_path: ["truth.ess_warm=0.2"],
        r"unknown key `truth.ess_warm`; did you mean `ess_warn`\?",
    ),
    "missing checkpoint": (
        lambda run, tmp_path: ["checkpoint.path=absent"],
        "absent: expected a checkpoint folder, found none there",
    ),
    "missing optimizer": (
        lambda run, tmp_path: ["checkpoint.path=null", adapter_of(run)],
        "checkpoint: no optimizer.pt or optimizer.bin found; set checkpoint.optimizer",
    ),
    "missing batch": (
        lambda run, tmp_path: ["batches.E.file=absent.jsonl"],
        "absent.jsonl: expected a file that can be read, found No such file",
    ),
    "bad row": (bad_row, r"U\.jsonl:2: expected token ids from 0 to 16, .*found 99"),
    "no sampling log-probs": (
        lambda run, tmp_path: ["update.ratio=clipped"],
        "update.ratio: clipped needs sampling_logprobs in every row of U; line 1",
    ),
    "no cuda": (
        lambda run, tmp_path: ["compute.device=cuda"],
        "compute.device: cuda",
    ),
}


def adapter_of(run: Run) -> str:
    """The setting that names the adapter without its folder's optimizer."""
    return f"checkpoint.adapter={run.saved.folder}"


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_wrong_input_ends_with_2_and_writes_nothing(
    run: Run, tmp_path: Path, case: str
) -> None:
    """One line that begins with `error:`, on standard error."""
    settings, message = BAD_INPUTS[case]
    options = [x for s in settings(run, tmp_path) for x in ("--set", s)]
    result = run.probe(tmp_path / "out", *options)
    assert result.exit_code == 2
    assert re.match(rf"error: .*{message}", result.stderr)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_saved_learning_rate_of_zero_needs_an_override(
    run: Run, tmp_path: Path
) -> None:
    """The first step of a warm-up: refused, and probed with update.lr_override."""
    import torch

    state = torch.load(run.saved.folder / "optimizer.pt", weights_only=True)
    for group in state["param_groups"]:
        group["lr"] = 0.0
    torch.save(state, tmp_path / "optimizer.pt")
    setting = ("--set", f"checkpoint.optimizer={tmp_path / 'optimizer.pt'}")
    result = run.probe(tmp_path / "out", *setting)
    assert result.exit_code == 2
    assert "the saved learning rate is 0" in result.stderr
    assert "update.lr_override" in result.stderr
    override = ("--set", "update.lr_override=1e-3")
    assert run.probe(tmp_path / "out", *setting, *override).exit_code == 0
    assert document_of(tmp_path / "out")["update"]["param_update_l2"] > 0


def test_earlier_results_are_left_alone(run: Run, tmp_path: Path) -> None:
    """Exit code 2 and not a byte changed; replaced with --overwrite."""
    out = tmp_path / "out"
    run.probe(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    result = run.probe(out, "--set", "objective.normalize=sum")
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    again = run.probe(out, "--set", "objective.normalize=sum", "--overwrite")
    assert again.exit_code == 0
    assert document_of(out)["truth"]["normalize"] == "sum"


def test_an_output_folder_that_is_a_file_is_refused(run: Run, tmp_path: Path) -> None:
    """Before anything is opened."""
    path = tmp_path / "out"
    path.write_text("")
    result = run.probe(path)
    assert result.exit_code == 2
    assert "out: cannot be written: File exists" in result.stderr


def test_a_batch_with_tokens_in_one_group_only_is_no_crash(
    run: Run, tmp_path: Path
) -> None:
    """Without that group nothing is left to average: refused, or reported on."""
    rows = rows_of(run.folder, "E.jsonl")
    for row in rows[1:]:
        row["response_ids"] = []
    rows[0]["response_ids"] = [3, 4, 5]
    path = tmp_path / "E.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run.probe(tmp_path / "out", "--set", f"batches.E.file={path}")
    assert result.exit_code in (0, 2), result.stderr


def test_a_defect_shows_its_traceback(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is neither wrong input nor a failed run is not made pretty; exit code 1."""
    from entropy_ddp.model.scoring import Passes

    def broken(*arguments: Any) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(Passes, "score", broken)
    result = run.probe(tmp_path / "out")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("error: a defect\n")


# check


def test_check_describes_everything_and_writes_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model, optimizer, batches; as a table, or as JSON."""
    monkeypatch.chdir(tmp_path)
    table = invoke("check", "--config", run.config)
    assert table.exit_code == 0, table.stderr
    assert "Configuration, checkpoint and batches are valid" in table.stdout
    result = invoke("check", "--config", run.config, "--json", "--quiet")
    found = json.loads(result.stdout)
    used = re.search(r"of the machine, in use by a rank now +│ (\S+) GB", table.stdout)
    assert used is not None and "host_now" not in table.stdout
    assert float(used[1]) == pytest.approx(found["memory"]["host_now"] / 1e9, rel=0.1)
    assert found["model"]["trainable tensors"] == 12
    assert found["model"]["vocabulary"] == 17
    assert found["optimizer"]["kind"] == "AdamW"
    assert found["optimizer"]["steps taken"] == 3
    assert found["optimizer"]["parameters with state"] == 12
    rates = [group["lr"] for group in found["optimizer"]["groups"]]
    assert rates == [1e-3, 1e-3]
    assert found["batch U"]["groups"] == 3
    assert found["batch U"]["sequences"] == 7
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_check_finds_what_probe_would_refuse(
    run: Run, tmp_path: Path, case: str
) -> None:
    """The same message and the same exit code, before anything expensive runs."""
    settings, message = BAD_INPUTS[case]
    options = [x for s in settings(run, tmp_path) for x in ("--set", s)]
    result = invoke("check", "--config", run.config, *options)
    assert result.exit_code == 2
    assert re.match(rf"error: .*{message}", result.stderr)


def test_a_missing_tokenizer_is_named_with_what_follows(
    run: Run, tmp_path: Path
) -> None:
    """In words; and what needs one says so."""
    base = tmp_path / "base"
    shutil.copytree(run.saved.base, base)
    for path in base.glob("tokenizer*"):
        path.unlink()
    setting = ("--set", f"checkpoint.base={base}")
    found = invoke("check", "--config", run.config, "--json", *setting)
    told = f"none in {base}: rollout files must hold token ids, nothing can be sampled"
    assert json.loads(found.stdout)["model"]["tokenizer"].startswith(told)
    source = "batches.E={sample: {prompts: p.jsonl, num_prompts: 2, max_new_tokens: 1}}"
    refused = invoke("check", "--config", run.config, *setting, "--set", source)
    assert refused.exit_code == 2
    assert "batches.E.sample: expected a tokenizer" in refused.stderr


def given_by(kind: str, split: str, run: Run, config: dict[str, Any]) -> list[str]:
    """Settings that give a batch by file, by sampling it, or as a change in its place."""
    if kind == "file":
        return []
    if kind == "delta":
        path = run.folder / "delta.safetensors"
        model = run.saved.model
        names = {n: p for n, p in model.named_parameters() if p.requires_grad}
        save_file({n: torch.full_like(p, 1e-3) for n, p in names.items()}, path)
        return ["batches.U=null", f"update.delta={path}"]
    source = config["batches"][split]["sample"]
    return [f"batches.{split}={json.dumps({'sample': source})}"]


@pytest.mark.usefixtures("rewards")
@pytest.mark.parametrize("update", ["file", "sample", "delta"])
@pytest.mark.parametrize("evaluation", ["file", "sample"])
def test_check_takes_every_kind_of_batch(
    run: Run, sampled_config: Path, evaluation: str, update: str
) -> None:
    """What is read is counted, what would be sampled is described."""
    config = yaml.safe_load(sampled_config.read_text())
    settings = [
        *given_by(evaluation, "E", run, config),
        *given_by(update, "U", run, config),
    ]
    options = [option for text in settings for option in ("--set", text)]
    result = invoke("check", "--config", run.config, "--json", *options)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    told = {"file": "sequences", "sample": "prompt draws", "delta": None}
    assert told[evaluation] in found["batch E"]
    assert told[update] in found.get("batch U", {None: None})


@pytest.mark.usefixtures("rewards")
@pytest.mark.parametrize("responses", [1, 2])
def test_check_knows_whether_sampled_batches_allow_the_gradient_dot_form(
    sampled_config: Path, responses: int
) -> None:
    """Before anything is sampled, by the numbers that are asked for."""
    size = f"batches.E.sample.responses_per_prompt={responses}"
    options = ["--set", "gradient_dot.enabled=true", "--set", size]
    result = invoke("check", "--config", sampled_config, *options)
    assert result.exit_code == (0 if responses == 2 else 2)
    assert ("responses_per_prompt of 1" in result.stderr) == (responses == 1)


# sample

REWARDS = """
import os

def length_parity(prompt, response, row):
    return len(response) % 2 + row.get("bonus", 0)

def of_a_batch(completions, answer, **kwargs):
    return [1.0 for _ in completions]

def fails_always(prompt, response, row):
    if row["id"] >= 0:
        raise ValueError("no reward of this row")
    return 1.0

def fails_on_rank_1(prompt, response, row):
    if os.environ.get("RANK") == "1":
        raise ValueError("no reward on this rank")
    return 1.0
"""


@pytest.fixture(scope="module")
def sampled_config(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration that rolls both batches out; its folder has the rewards."""
    folder = tmp_path_factory.mktemp("sampled")
    (folder / "cli_rewards.py").write_text(REWARDS)
    prompts = [{"prompt": f"{i}+{i % 3}=", "bonus": i / 8, "id": i} for i in range(8)]
    lines = "".join(json.dumps(prompt) + "\n" for prompt in prompts)
    (folder / "prompts.jsonl").write_text(lines)
    source = {"prompts": str(folder / "prompts.jsonl"), "max_new_tokens": 6}
    evaluation = {"num_prompts": 9, "with_replacement": True}
    update = {
        "num_prompts": 3,
        "responses_per_prompt": 4,
        "reward": "cli_rewards:length_parity",
        "redraw_zero_advantage": 3,
    }
    config = run_config(run.saved, Path(), Path()) | {
        "batches": {
            "E": {"sample": source | evaluation},
            "U": {"sample": source | update},
        }
    }
    path = folder / "sampled.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def rewards(sampled_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewards are importable in this process."""
    monkeypatch.syspath_prepend(str(sampled_config.parent))
    monkeypatch.delitem(sys.modules, "cli_rewards", raising=False)


@pytest.mark.usefixtures("rewards")
def test_sample_writes_rollout_files(sampled_config: Path, tmp_path: Path) -> None:
    """E.jsonl and U.jsonl, in groups, with ids, texts, log-probs and rewards."""
    out = tmp_path / "out"
    command = ("sample", "--config", sampled_config, "--out", out)
    result = invoke(*command, "--json")
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in out.iterdir()) == ["E.jsonl", "U.jsonl"]
    evaluation, update = rows_of(out, "E.jsonl"), rows_of(out, "U.jsonl")
    assert [row["group"] for row in evaluation] == list(range(9))
    assert [row["group"] for row in update] == [i // 4 for i in range(12)]
    assert len({row["prompt_index"] for row in update}) == 3
    for row in [*evaluation, *update]:
        ids = row["response_ids"]
        assert 1 <= len(ids) <= 6
        assert len(row["sampling_logprobs"]) == len(ids)
        assert row["finished"] == (ids[-1] == 0)
        text = "".join(VOCABULARY[token] for token in ids if token > 2)
        assert row["response"].replace("<unk>", "").replace("<pad>", "") == text
        assert row["id"] == row["prompt_index"]
        assert row["prompt"] == f"{row['id']}+{row['id'] % 3}="
    for row in update:
        expected = len(row["response"]) % 2 + row["bonus"]
        assert row["reward"] == expected
    assert all("reward" not in row for row in evaluation)
    summaries = {row["split"]: row for row in json.loads(result.stdout)}
    assert summaries["E"]["num_groups"] == 9
    assert summaries["U"]["num_sequences"] == 12
    tokens = sum(len(row["response_ids"]) for row in update)
    assert summaries["U"]["num_tokens"] == tokens
    mean = sum(row["reward"] for row in update) / 12
    assert summaries["U"]["mean_reward"] == pytest.approx(mean)
    before = (out / "E.jsonl").read_bytes()
    refused = invoke(*command, "--set", "seed=1")
    assert refused.exit_code == 2
    assert "E.jsonl: exists; give --overwrite or another --out" in refused.stderr
    assert (out / "E.jsonl").read_bytes() == before
    assert invoke(*command, "--set", "seed=1", "--overwrite").exit_code == 0
    assert (out / "E.jsonl").read_bytes() != before


@pytest.mark.usefixtures("rewards")
def test_sample_draws_as_many_prompts_as_a_pilot_says(
    sampled_config: Path, tmp_path: Path
) -> None:
    """And `check` tells how many these are; prompts that do not suffice are refused."""
    pilot, out = tmp_path / "pilot", tmp_path / "out"
    result = invoke("probe", "--config", sampled_config, "--out", pilot)
    assert result.exit_code == 0, result.stderr
    asked = ("--for", "90%", "--resolve", "0.3", "--pilot", pilot)
    result = invoke("check", "--config", sampled_config, *asked, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    plan = found[f"E for 90%, by {pilot}"]
    result = invoke("sample", "--config", sampled_config, *asked, "--out", out)
    assert result.exit_code == 0, result.stderr
    rows = rows_of(out, "E.jsonl")
    assert len({row["group"] for row in rows}) == plan["prompt draws"] != 9
    assert {(row["num_prompts_total"], row["with_replacement"]) for row in rows} == {
        (8, True)
    }
    other = ("--set", "batches.E.sample.with_replacement=false")
    asked = ("--for", "1%", "--resolve", "0.01", "--pilot", pilot)
    result = invoke("sample", "--config", sampled_config, *asked, *other)
    assert result.exit_code == 2
    assert "--for 1%: expected about" in result.stderr
    assert "found 8; set with_replacement: true, or give more" in result.stderr


@pytest.mark.usefixtures("rewards")
def test_a_probe_of_sampled_batches_keeps_them(
    sampled_config: Path, tmp_path: Path
) -> None:
    """rollouts/ holds what `sample` writes, and probing those files gives the same."""
    out, again, files = (tmp_path / name for name in ("out", "again", "files"))
    result = invoke("probe", "--config", sampled_config, "--out", out)
    assert result.exit_code == 0, result.stderr
    invoke("sample", "--config", sampled_config, "--out", files)
    for name in ("E.jsonl", "U.jsonl"):
        kept = (out / "rollouts" / name).read_bytes()
        assert kept == (files / name).read_bytes()
    settings = [
        x
        for split in "EU"
        for x in ("--set", f"batches.{split}={{file: {files / split}.jsonl}}")
    ]
    invoke("probe", "--config", sampled_config, "--out", again, *settings)
    for name in ("E", "U", "update", "truth", "linear"):
        assert document_of(out)[name] == document_of(again)[name]
    prompts = [row["prompt_index"] for row in rows_of(files, "E.jsonl")]
    carried = [row["id"] for row in rows_of(out) if row["split"] == "E"]
    assert carried == prompts


@pytest.mark.usefixtures("rewards")
@pytest.mark.parametrize("command", ["sample", "probe"])
def test_prompts_that_are_absent_leave_no_folder(
    sampled_config: Path, tmp_path: Path, command: str
) -> None:
    """The folder was made before the prompts were looked for."""
    out = tmp_path / "made" / "out"
    setting = ("--set", "batches.E.sample.prompts=absent.jsonl")
    result = invoke(command, "--config", sampled_config, "--out", out, *setting)
    assert result.exit_code == 2
    assert "absent.jsonl" in result.stderr
    assert not out.parent.exists()


U_SAMPLE = "batches.U.sample"
# Settings that only U is at fault for, or a probe, and what is said.
UNSAMPLED = {
    f"{U_SAMPLE}.reward=no_such_rewards:score": "'no_such_rewards' to be importable",
    f"{U_SAMPLE}.reward=cli_rewards:lenght": "a function 'lenght'",
    f"{U_SAMPLE}.reward=cli_rewards:of_a_batch": "of_a_batch(prompt, response, row)",
    f"{U_SAMPLE}.reward={{exact: answer}}": "a gold answer, text or a number",
    f"{U_SAMPLE}.reward={{math: id}}": "expected math-verify to be installed",
    f"{U_SAMPLE}.prompts=absent.jsonl": "absent.jsonl",
    f"{U_SAMPLE}.max_new_tokens=1000": "to fit the model's",
    "batches.E.sample.num_prompts=1": "batches.E.sample.num_prompts: expected at least 2",
    "batches.U={file: unrewarded.jsonl}": "unrewarded.jsonl:1: expected",
    "gradient_dot.enabled=true": "responses_per_prompt of 1",
}


@pytest.mark.usefixtures("rewards")
@pytest.mark.parametrize("setting", UNSAMPLED)
def test_everything_is_checked_before_the_first_token(
    run: Run,
    sampled_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
) -> None:
    """By every job that samples E first; nothing is left, not even a folder."""
    monkeypatch.chdir(tmp_path)
    rows = rows_of(run.folder, "U.jsonl")
    lines = [json.dumps(row | {"reward": None}) + "\n" for row in rows]
    (tmp_path / "unrewarded.jsonl").write_text("".join(lines))
    monkeypatch.setitem(sys.modules, "math_verify", None)
    sampled: list[Any] = []
    monkeypatch.setattr(sampling, "generate_responses", sampled.append)
    commands = ["sample", "attribute"] if U_SAMPLE in setting else ["probe"]
    for command in commands:
        out = tmp_path / "made" / "out"
        options = ("--config", sampled_config, "--out", out, "--set", setting)
        result = invoke(command, *options)
        assert result.exit_code == 2, result.stderr
        assert UNSAMPLED[setting] in result.stderr
        assert not sampled and not out.parent.exists()


@pytest.mark.usefixtures("rewards")
def test_rollouts_of_e_stay_when_those_of_u_fail(
    sampled_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says where; what is mended goes on with them."""
    out, kept = tmp_path / "out", tmp_path / "out" / "unfinished/rollouts/E.jsonl"
    module = sampled_config.parent / "cli_rewards.py"
    options = ("--set", f"{U_SAMPLE}.reward=cli_rewards:fails_always")
    command = ("sample", "--config", sampled_config, "--out", out, *options)
    failed = invoke(*command)
    assert failed.exit_code == 1
    assert "found ValueError: no reward of this row" in failed.stderr
    assert f"; {kept} is kept: start again with --resume" in failed.stderr
    before = kept.read_bytes()
    monkeypatch.delitem(sys.modules, "cli_rewards")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "cli_rewards.py").write_text(module.read_text().replace(">= 0", "< 0"))
    done = invoke(*command, "--resume")
    assert done.exit_code == 0, done.stderr
    assert (out / "E.jsonl").read_bytes() == before


@pytest.mark.usefixtures("rewards")
@pytest.mark.parametrize("command", ["sample", "probe"])
def test_a_batch_that_was_sampled_is_not_sampled_again(
    sampled_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    """Ended between the two batches: E is read, U is sampled, all as undisturbed."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    arguments = (command, "--config", sampled_config, "--out")
    assert invoke(*arguments, whole).exit_code == 0
    keep = Unfinished.read_or_sample

    def keep_and_end(self: Unfinished, *rest: Any) -> None:
        keep(self, *rest)
        raise MemoryError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "read_or_sample", keep_and_end)
        assert invoke(*arguments, out).exit_code == 1
    assert [path.name for path in out.iterdir()] == ["unfinished"]
    refused = invoke(*arguments, out)
    assert refused.exit_code == 2 and "give --resume" in refused.stderr
    refused = invoke(*arguments, out, "--resume", "--set", "seed=1")
    assert refused.exit_code == 2 and "seed was 0, now 1" in refused.stderr
    kept = out / "unfinished" / "rollouts" / "E.jsonl"
    text = kept.read_text()
    kept.write_text(text + "\n")
    refused = invoke(*arguments, out, "--resume")
    assert refused.exit_code == 2 and "found another content" in refused.stderr
    kept.write_text(text)
    sampled: list[str] = []
    sample = opening.sample_batch
    monkeypatch.setattr(
        opening,
        "sample_batch",
        lambda s, split, *r: sampled.append(split) or sample(s, split, *r),
    )
    done = invoke(*arguments, out, "--resume")
    assert done.exit_code == 0, done.stderr
    assert sampled == ["U"]
    folder = "rollouts" if command == "probe" else "."
    for name in ("E.jsonl", "U.jsonl"):
        assert (out / folder / name).read_bytes() == (
            whole / folder / name
        ).read_bytes()
    assert not (out / "unfinished").exists()
    if command == "probe":
        assert document_of(out)["run"]["resumed"] == ["sample E"]
        for name in ("E", "U", "update", "truth", "linear"):
            assert document_of(out)[name] == document_of(whole)[name]


@pytest.mark.usefixtures("rewards")
def test_log_probs_of_the_sampler_are_those_of_the_probe(
    sampled_config: Path, tmp_path: Path
) -> None:
    """Float64 is float64 in both: the sum over a response agrees to 1e-9."""
    out = tmp_path / "out"
    result = invoke("probe", "--config", sampled_config, "--out", out)
    assert result.exit_code == 0, result.stderr
    for split in "EU":
        scored = [row["logp"] for row in rows_of(out) if row["split"] == split]
        sampled = rows_of(out / "rollouts", f"{split}.jsonl")
        for logp, row in zip(scored, sampled, strict=True):
            assert math.fsum(row["sampling_logprobs"]) == pytest.approx(logp, abs=1e-9)


def test_sample_needs_something_to_sample(run: Run, tmp_path: Path) -> None:
    """A configuration of files is an input error."""
    result = invoke("sample", "--config", run.config, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "neither E nor U has a `sample` section" in result.stderr


@pytest.mark.usefixtures("rewards")
def test_sample_refuses_an_output_folder_that_is_a_file(
    sampled_config: Path, tmp_path: Path
) -> None:
    """With exit code 2, and before the sampling, which is expensive."""
    (tmp_path / "out").write_text("")
    result = invoke("sample", "--config", sampled_config, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


def test_a_reward_that_fails_on_one_rank_stops_all(
    sampled_config: Path, tmp_path: Path
) -> None:
    """Its rank says what failed, once; nobody waits, and no file is written."""
    setting = "batches.U.sample.reward=cli_rewards:fails_on_rank_1"
    arguments = ("sample", "--config", sampled_config, "--out", tmp_path / "out")
    command = launching.torchrun(
        2, *launching.PACKAGE, *arguments, "--set", setting, "--quiet"
    )
    path = {"PYTHONPATH": str(sampled_config.parent)}
    finished = launching.run(command, path, timeout_seconds=60)
    assert finished.returncode != 0
    message = (
        "error: rank 1: sample U: reward fails_on_rank_1: expected a number for group 1"
    )
    assert finished.stderr.count(message) == 1
    assert finished.stderr.count("no reward on this rank") == 1
    assert finished.stderr.count("error: rank") == 1
    assert not (tmp_path / "out" / "U.jsonl").exists()


@pytest.mark.usefixtures("rewards")
def test_sampling_does_not_depend_on_the_number_of_ranks(
    sampled_config: Path, tmp_path: Path
) -> None:
    """Two ranks write the files that one process writes, log-probs to 1e-12."""
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ("sample", "--config", sampled_config, "--quiet", "--out")
    invoke(*arguments, one)
    command = launching.torchrun(2, *launching.PACKAGE, *arguments, two)
    path = {"PYTHONPATH": str(sampled_config.parent)}
    launching.run(command, path).require_success()
    for name in ("E.jsonl", "U.jsonl"):
        pairs = zip(rows_of(one, name), rows_of(two, name), strict=True)
        for mine, theirs in pairs:
            logprobs = theirs.pop("sampling_logprobs")
            assert mine.pop("sampling_logprobs") == pytest.approx(logprobs, abs=1e-12)
            assert mine == theirs


# Launchers


def test_accelerate_that_starts_one_process_of_two_is_told(run: Run) -> None:
    """`--cpu --num_processes 2` runs alone, and the user learns it."""
    options = ("--cpu", "--num_processes", "2", "--num_machines", "1")
    arguments = ("check", "--config", run.config, "--quiet")
    command = launching.accelerate(*options, *launching.PACKAGE, *arguments)
    finished = launching.run(command).require_success()
    assert "warning: several processes were asked for" in finished.stderr
    assert "this process runs alone" in finished.stderr


def test_half_a_launcher_s_environment_ends_with_2(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is missing is named; nothing runs."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = invoke("check", "--config", run.config)
    assert result.exit_code == 2
    assert "but not MASTER_ADDR, MASTER_PORT" in result.stderr
