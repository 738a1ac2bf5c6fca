"""A change of the parameters in place of a step: what did somebody else's step do?"""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import launching
import pytest
import reference as ref
import torch
import yaml
from checkpoints import save_checkpoint
from jobs import run_attribution, run_audit, run_probe, run_sweep
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_runs import TinyRun, make_run
from torch import Tensor, nn
from trained import KINDS, Made, adapted, train

from entropy_ddp.checkpoint.change import read_change
from entropy_ddp.checkpoint.find import find_checkpoint
from entropy_ddp.checkpoint.policy import Policy, load_policy
from entropy_ddp.config import Checkpoint, Config, Precision, load_config
from entropy_ddp.distributed import World
from entropy_ddp.errors import InputError
from entropy_ddp.model.parameters import ParameterLayout, fingerprint
from entropy_ddp.probe.check import inspect_run
from entropy_ddp.results import Probed, write_results
from entropy_ddp.terminal import commands
from entropy_ddp.terminal.commands import print_inspection

pytestmark = pytest.mark.usefixtures("models_checked_once")

Tensors = dict[str, Tensor]
TOLERANCE = {"float64": 1e-12, "float32": 1e-6}
CPU = torch.device("cpu")


def quiet(phase: str, done: int, total: int) -> None:
    """Shows no progress."""


@pytest.fixture(scope="module", params=["qwen2", "gpt2, full"])
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> TinyRun:
    family, *full = request.param.split(", ")
    root = tmp_path_factory.mktemp(family)
    return make_run(root, family, full=bool(full))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("lora"), "qwen2")


def evaluation_only(run: TinyRun) -> dict[str, Any]:
    """The `batches` section without U."""
    return {"E": run.config().batches.model_dump()["E"]}


def with_delta(run: TinyRun, delta: Path, **sections: Any) -> Config:
    """A configuration that probes a change; the `update` section may add keys."""
    update = {"delta": str(delta)} | sections.pop("update", {})
    return run.config(batches=evaluation_only(run), update=update, **sections)


def saved_step(run: TinyRun, out: Path, **sections: Any) -> Probed:
    """A probe of the step that leaves its change in a file."""
    out.mkdir()
    probed = run.probe(update={"max_grad_norm": 0.5, "save_delta": True}, **sections)
    write_results(out, probed, "")
    return probed


def assert_same_change(found: Any, expected: Any, tolerance: float) -> None:
    """Truth and both predictions, relative to the largest term of the slope."""
    scale = expected.update.learning_rate_used * max(
        map(abs, expected.linear.terms.values())
    )
    pairs = {
        "truth": (found.truth.delta_h_true, expected.truth.delta_h_true),
        "first order": (found.linear.delta_h1, expected.linear.delta_h1),
        "second order": (found.curvature.delta_h2, expected.curvature.delta_h2),
        "SE of the truth": (found.truth.se, expected.truth.se),
    }
    for name, (mine, theirs) in pairs.items():
        assert mine == pytest.approx(theirs, rel=0, abs=tolerance * scale), name


# The same as the step


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_saved_change_gives_what_the_step_gave(
    run: TinyRun, tmp_path: Path, dtype: str
) -> None:
    """Truth, first order and curvature; without U, optimizer or learning rate."""
    precision = {"model": dtype}
    step = saved_step(run, tmp_path / "step", precision=precision).results
    path = tmp_path / "step" / "delta_theta.safetensors"
    config = with_delta(run, path, precision=precision)
    given = run_probe(config, World(), None, quiet).results
    # The step of the curvature's central difference differs in eta.
    assert_same_change(given, step, TOLERANCE[dtype])
    assert given.update.learning_rate_used == 1.0
    assert given.update.param_update_l2 == pytest.approx(step.update.param_update_l2)
    assert given.linear.slope == pytest.approx(given.linear.delta_h1)
    assert given.truth_all[0]["ess_fraction"] == pytest.approx(
        step.truth_all[0]["ess_fraction"]
    )


# A probe of the step, then one of the change that it left, in one group of processes.
STEP_THEN_CHANGE = """
import sys
from dataclasses import replace
from pathlib import Path

from entropy_ddp.cli.ranks import run_ranks
from entropy_ddp.config import load_config, to_yaml
from jobs import run_probe
from entropy_ddp.results import prepare_folder, write_results

def body(world):
    for path in map(Path, sys.argv[1:]):
        config, out = load_config(path, ()), path.with_suffix("")
        if world.is_main:
            prepare_folder(out, False)
        alone = replace(world, collectives={})
        probed = run_probe(config, alone, out, lambda *progress: None)
        if world.is_main:
            write_results(out, probed, to_yaml(config))
        # The next one reads what this one has written.
        world.gather_objects(None)
    return 0

sys.exit(run_ranks(body))
"""


@pytest.mark.long
def test_two_ranks_probe_a_change_as_they_probe_the_step(
    lora: TinyRun, tmp_path: Path
) -> None:
    """The same numbers as on one rank, and no U in anything that is written."""
    files: list[Path] = []
    for dtype in TOLERANCE:
        precision = {"model": dtype}
        update = {"max_grad_norm": 0.5, "save_delta": True}
        path = tmp_path / f"{dtype}-step" / "delta_theta.safetensors"
        configs = {
            "step": lora.config(update=update, precision=precision),
            "change": with_delta(lora, path, precision=precision),
        }
        for name, config in configs.items():
            files.append(tmp_path / f"{dtype}-{name}.yaml")
            files[-1].write_text(yaml.safe_dump(config.model_dump()))
    launching.run(
        launching.torchrun(2, *python_code(tmp_path, STEP_THEN_CHANGE), *files),
        launching.HELPERS,
    ).require_success()
    for dtype, tolerance in TOLERANCE.items():
        step, found = (
            json.loads((tmp_path / f"{dtype}-{name}" / "results.json").read_text())
            for name in ("step", "change")
        )
        terms = map(abs, step["linear"]["terms"].values())
        scale = step["update"]["learning_rate_used"] * max(terms)
        for section, key in (("truth", "delta_h_true"), ("linear", "delta_h1")):
            expected = pytest.approx(step[section][key], rel=0, abs=tolerance * scale)
            assert found[section][key] == expected, (dtype, key)
        assert found["run"]["world_size"] == 2
        assert not {"loss", "grad_norm", "clip_coef"} & found["update"].keys()
        assert "U" not in found and "U" in step
        lines = (tmp_path / f"{dtype}-change" / "per_sequence.jsonl").open()
        assert {json.loads(line)["split"] for line in lines} == {"E"}
        # No gradient of U: one parameter buffer less travels between the ranks.
        collectives = "collectives: parameter buffers"
        counts = [
            next(row["value"] for row in results["audit"] if row["name"] == collectives)
            for results in (step, found)
        ]
        assert [int(count.split(",")[0]) for count in counts] == [2, 1]


def python_code(folder: Path, code: str) -> list[Path]:
    """A script with this code."""
    path = folder / "script.py"
    path.write_text(code)
    return [path]


def test_a_learning_rate_scales_the_slope_only(lora: TinyRun, tmp_path: Path) -> None:
    """v = Delta theta / eta: the same change, a slope per unit of learning rate."""
    saved_step(lora, tmp_path / "step")
    path = tmp_path / "step" / "delta_theta.safetensors"
    plain, rated = (
        run_probe(with_delta(lora, path, update=update), World(), None, quiet).results
        for update in ({}, {"lr_override": 1e-3})
    )
    assert rated.truth.delta_h_true == plain.truth.delta_h_true
    assert rated.linear.delta_h1 == pytest.approx(plain.linear.delta_h1, rel=1e-12)
    assert rated.linear.slope == pytest.approx(1e3 * plain.linear.slope, rel=1e-12)
    assert rated.update.learning_rate_used == 1e-3


def test_no_optimizer_state_is_needed(tmp_path: Path) -> None:
    """Its file is not looked for; audits of moments and of U are absent."""
    run = make_run(tmp_path, "llama")
    saved_step(run, tmp_path / "step")
    (run.saved.folder / "optimizer.pt").unlink()
    path = tmp_path / "step" / "delta_theta.safetensors"
    config = with_delta(run, path)
    for job in (run_probe, run_audit):
        results = job(config, World(), None, quiet).results
        rows = {row.name: row for row in results.audit}
        assert rows["optimizer steps"].value == 0
        assert "update.delta there is none" in rows["gradient-dot form"].expected
        absent = ("loss (Y)", "moment", "without optimizer", "std(A)", "U ", "ratio")
        for word in absent:
            assert not {name for name in rows if word in name}, word
        restored = rows["restored bits: parameters and optimizer state"]
        assert restored.verdict == "ok"
        assert results.gradient_dot is None


def test_a_sweep_runs_along_a_change(lora: TinyRun, tmp_path: Path) -> None:
    """Multiples of the change; it is kept with the change it is of."""
    saved_step(lora, tmp_path / "step")
    path = tmp_path / "step" / "delta_theta.safetensors"
    config = with_delta(lora, path, sweep={"etas": [0.5, 1.0]})
    out = tmp_path / "sweep"
    out.mkdir()
    results = run_sweep(config, World(), out, quiet).results
    assert results.sweep is not None
    half, whole = results.sweep
    assert whole.delta_h_true == results.truth.delta_h_true
    assert half.delta_h1 == pytest.approx(whole.delta_h1 / 2, rel=1e-12)
    doubled = {name: 2 * tensor for name, tensor in load_file(path).items()}
    save_file(doubled, path)
    with pytest.raises(
        InputError, match=r"another configuration.*update\.delta was \w+, now"
    ):
        run_sweep(config, World(), out, quiet)


def test_tables_and_results_say_that_it_is_a_change(
    lora: TinyRun, tmp_path: Path
) -> None:
    """In place of a loss there is the file."""
    saved_step(lora, tmp_path / "step")
    path = tmp_path / "step" / "delta_theta.safetensors"
    config = with_delta(lora, path)
    results = run_probe(config, World(), None, quiet).results
    console = Console(file=io.StringIO(), width=200)
    commands.print_results(console, results, "runs/x")
    print_inspection(console, inspect_run(config, World(), quiet))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "Entropy change of the given change of the parameters, nats/token" in text
    assert f"in place of a step: {path}" in text
    assert "gradient norm before clipping" not in text
    assert "Euclidean norm" in text
    document = results.to_dict()
    assert document["update"]["delta"] == str(path)
    assert document["update"]["num_optimizer_steps"] == 0


# A second checkpoint


def opened(section: dict[str, Any], model: str = "float64") -> Policy:
    files = find_checkpoint(Checkpoint(**section))
    return load_policy(files, Precision(model=model), "sdpa", CPU)


def change_of(policy: Policy, name: Path, model: str = "float64") -> Tensors:
    """Delta theta by name; the policy is as it was afterwards."""
    before = fingerprint(policy.model.named_parameters())
    flat = read_change(str(name), policy, Precision(model=model), "sdpa")
    assert fingerprint(policy.model.named_parameters()) == before
    return ParameterLayout.of(policy.parameters).views(flat)


def moved(model: nn.Module, seed: int = 5) -> Tensors:
    """Move every trainable parameter in place; by how much, by name."""
    generator = torch.Generator().manual_seed(seed)
    change = {}
    with torch.no_grad():
        for name, parameter in ref.trainable(model).items():
            before = parameter.clone()
            noise = torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
            parameter += 1e-3 * noise.to(parameter)
            change[name] = parameter - before
    return change


@pytest.mark.parametrize("full", [False, True], ids=["LoRA", "full"])
def test_a_second_checkpoint_is_a_change(tmp_path: Path, full: bool) -> None:
    """Theirs minus ours, by name; the probe of the folder is that of the file."""
    run = make_run(tmp_path, "qwen2", full=full)
    policy = opened(run.saved.section)
    expected = moved(run.saved.model)
    run.saved.model.save_pretrained(tmp_path / "next")
    found = change_of(policy, tmp_path / "next")
    assert list(found) == list(expected)
    for name, change in expected.items():
        assert torch.equal(found[name], change), name
    save_file(expected, tmp_path / "delta.safetensors")
    folder, file = (
        run_probe(with_delta(run, tmp_path / name), World(), None, quiet).results
        for name in ("next", "delta.safetensors")
    )
    assert_same_change(folder, file, 1e-12)


def test_the_next_checkpoint_of_the_trainer_is_its_step(tmp_path: Path) -> None:
    """Two checkpoints of one run, a step apart."""
    base = save_checkpoint(tmp_path, "gpt2").base
    model = type(ref.tiny_gpt2(1)).from_pretrained(base)
    model = adapted(model, "gpt2", bias="all", modules_to_save=["lm_head"])
    train(tmp_path / "run", model, save_steps=1)
    first, second = (str(tmp_path / "run" / f"checkpoint-{n}") for n in (1, 2))
    ours, theirs = (opened({"path": path}, "float32") for path in (first, second))
    found = change_of(ours, Path(second), "float32")
    assert found.keys() == theirs.parameters.keys()
    for name, parameter in theirs.parameters.items():
        assert torch.equal(found[name], parameter - ours.parameters[name]), name
    assert all(change.any() for name, change in found.items() if "lora_B" in name)


STATES = ["accelerate, LoRA", "accelerate, full", "accelerate, full, pickled"]


@pytest.mark.parametrize("kind", [*STATES, "several adapters", "full, sharded"])
def test_the_change_between_folders_of_every_kind(tmp_path: Path, kind: str) -> None:
    """The second folder is read as the first is."""
    made = KINDS[kind].make(tmp_path / "one")
    policy = opened(made.section, "float32")
    expected = moved(made.model)
    folder = tmp_path / "two"
    save_again(made, folder)
    found = change_of(policy, folder, "float32")
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert torch.equal(found[name], change), name


def save_again(made: Made, folder: Path) -> None:
    """Save the model the way it was saved, without optimizer."""
    first = Path(made.section["path"])
    if (
        (first / "config.json").exists()
        or "adapter" in made.section
        and (first / "adapter_config.json").exists()
    ):
        made.model.save_pretrained(folder)
        return
    folder.mkdir()
    state = made.model.state_dict()
    if (first / "pytorch_model.bin").exists():
        torch.save(state, folder / "pytorch_model.bin")
    else:
        names = load_file(first / "model.safetensors").keys()
        save_file({n: state[n] for n in names}, folder / "model.safetensors")


# What is refused


def refused(lora: TinyRun, path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_probe(with_delta(lora, path), World(), None, quiet)


def first_of(lora: TinyRun) -> str:
    return next(iter(ref.trainable(lora.saved.model)))


CONTENTS: list[tuple[Callable[[str, Tensors], Tensors], str]] = [
    (
        lambda first, t: {n: v for n, v in t.items() if n != first},
        r"is missing from it; 1 names differ \(11 found, 12 expected\)",
    ),
    (
        lambda first, t: t | {"z.other": torch.zeros(1)},
        r"z.other is missing from the trainable parameters; 1 names differ \(13 found",
    ),
    (
        lambda first, t: t | {first: t[first].T.contiguous()},
        r"lora_A.default.weight should be \(2, 16\), found \(16, 2\); 1 of 12 have",
    ),
    (
        lambda first, t: t | {first: torch.full_like(t[first], torch.nan)},
        "lora_A.default.weight has NaN or infinite values",
    ),
]


@pytest.mark.parametrize(("change", "message"), CONTENTS)
def test_a_file_of_other_parameters_is_refused(
    lora: TinyRun,
    tmp_path: Path,
    change: Callable[[str, Tensors], Tensors],
    message: str,
) -> None:
    """The first name that does not fit, and how many."""
    tensors = {
        n: torch.ones_like(p) for n, p in ref.trainable(lora.saved.model).items()
    }
    path = tmp_path / "delta.safetensors"
    save_file(change(first_of(lora), tensors), path)
    refused(lora, path, message)


def test_a_file_that_is_none_is_refused(lora: TinyRun, tmp_path: Path) -> None:
    """Missing, or of another format."""
    refused(
        lora, tmp_path / "absent", "expected a safetensors file or a checkpoint folder"
    )
    torch.save({}, tmp_path / "delta.pt")
    refused(lora, tmp_path / "delta.pt", "expected a safetensors file, as update.save")


def test_a_checkpoint_of_another_kind_is_refused(lora: TinyRun, tmp_path: Path) -> None:
    """Full weights against an adapter."""
    full = save_checkpoint(tmp_path, "qwen2", full=True)
    refused(lora, full.folder, "expected an adapter, as the checkpoint has, found full")
    run = make_run(tmp_path / "run", "qwen2", full=True)
    refused(run, lora.saved.folder, "expected full weights, .* found an adapter")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpha": 16}, "lora_alpha is 16, and 4 in"),
        ({"r": 4}, "r is 4, and 2 in"),
        (
            {"target_modules": ["q_proj"], "lora_alpha": 4},
            "is missing from the adapter",
        ),
        ({"use_rslora": True, "lora_alpha": 4}, "use_rslora is True, and False in"),
    ],
)
def test_an_adapter_of_other_settings_is_refused(
    lora: TinyRun, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    """The difference of two such adapters' weights means nothing."""
    model = adapted(ref.tiny_qwen2(11), "qwen2", **settings)
    model.save_pretrained(tmp_path / "next")
    refused(lora, tmp_path / "next", message)


def test_a_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    """Full weights of another vocabulary."""
    run = make_run(tmp_path, "qwen2", full=True)
    ref.tiny_qwen2(1, vocabulary=23).save_pretrained(tmp_path / "next")
    refused(run, tmp_path / "next", r"embed_tokens.weight should be \(17, 16\), found")


CONTRADICTIONS = {
    "batches.U.file=u.jsonl": "batches.U: update.delta gives the change",
    "update.from_checkpoint=true": "update.from_checkpoint: update.delta gives",
    "attribution.enabled=true": "attribution.enabled: update.delta gives the change",
    "gradient_dot.enabled=true": "gradient_dot.enabled: update.delta gives the change",
}


@pytest.mark.parametrize("assignment", CONTRADICTIONS)
def test_what_would_need_a_step_is_refused(assignment: str) -> None:
    """Nothing that is asked for is passed over."""
    given = ("checkpoint.path=c", "batches.E.file=e", "update.delta=d", assignment)
    with pytest.raises(InputError, match=CONTRADICTIONS[assignment]):
        load_config(None, given)


def test_without_a_change_there_is_a_batch_to_step_on() -> None:
    """One of both."""
    with pytest.raises(InputError, match="batches.U: missing; give U, or update.delta"):
        load_config(None, ("checkpoint.path=c", "batches.E.file=e"))
    given = ("checkpoint.path=c", "batches.E.file=e", "update.delta=d")
    assert load_config(None, given).batches.U is None


def test_attribution_is_refused(lora: TinyRun, tmp_path: Path) -> None:
    """A change does not say what it is made of."""
    config = with_delta(lora, tmp_path / "delta.safetensors")
    with pytest.raises(InputError, match="attribution is of the optimizer's step on U"):
        run_attribution(config, World(), None, quiet)
