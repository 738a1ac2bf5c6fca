"""Is the probe's step the trainer's? TRL and accelerate take it, and it is compared.

The change of every parameter between two of the trainer's checkpoints is held against
`delta_theta.safetensors` of a probe of the first of the two, on the batch of the step:
as `RolloutRecorder` wrote it, whose rows are held against those that went into the
trainer's loss, and as `import` restores it from the trainer's log, whose texts lack
special tokens that were sampled inside a response.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor
from trainers import (
    LEARNING_RATE,
    MAX_LENGTH,
    Row,
    batch_of,
    train_with_accelerate,
    train_with_trl,
)

from entropy_ddp import demo
from entropy_ddp.cli import main
from entropy_ddp.data.jsonlines import read_rows

pytest.importorskip("trl")
# Relative to the norm of the step; the trainer computes in float32.
RTOL = 1e-5
STEPS = 2  # before the step that is compared
# In a narrow range, and far from the sampler in a second pass over its batch.
CLIPPING = {"num_iterations": 2, "epsilon": 0.02, "epsilon_high": 0.03}


@dataclass(frozen=True, kw_only=True)
class Task:
    """The demo's supervised model and its prompts."""

    base: Path
    prompts: Path

    def job(self, folder: Path, **settings: Any) -> dict[str, Any]:
        """Arguments of `train_with_trl`."""
        paths = {"base": str(self.base), "prompts": str(self.prompts)}
        return {"folder": str(folder), **paths, **settings}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """Trained for long enough to answer in the form that is asked for."""
    folder = tmp_path_factory.mktemp("task") / "demo"
    made = demo.train_demo(folder, supervised_steps=150, grpo_steps=1)
    return Task(base=made.base, prompts=made.prompts)


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """The trained tensors of a checkpoint, by their names in its file."""
    adapter = checkpoint / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else checkpoint / "model.safetensors")


def step_between(before: Path, after: Path) -> dict[str, Tensor]:
    """Change of every tensor between two checkpoints."""
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    return {name: new[name].double() - old[name].double() for name in old}


def norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of the trainer's step."""
    found, expected = as_in_files(found), as_in_files(expected)
    assert found.keys() == expected.keys()
    assert norm(expected) > 0
    return norm({n: found[n] - e for n, e in expected.items()}) / norm(expected)


def as_in_files(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names that PEFT gives them in its files, without the adapter's."""
    return {
        name.replace(".modules_to_save", "").replace(".default", ""): tensor
        for name, tensor in tensors.items()
    }


def write_rows(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass(kw_only=True)
class Probe:
    """A probe of a checkpoint on a batch; what it found."""

    checkpoint: dict[str, str]
    batch: Path
    update: dict[str, Any] = field(default_factory=lambda: {"from_checkpoint": True})

    def config(self, folder: Path) -> Path:
        """Its configuration, in a file."""
        source = {"file": str(self.batch)}
        sections = {
            "checkpoint": self.checkpoint,
            "batches": {"E": source, "U": source},
            "update": {"save_delta": True} | self.update,
            "curvature": {"enabled": False},
            "gradient_dot": {"enabled": False},
            "compute": {"device": "cpu"},
        }
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(sections))
        return folder / "config.yaml"

    def delta(self, folder: Path) -> dict[str, Tensor]:
        """The step that it takes, by name."""
        arguments = ["--config", str(self.config(folder)), "--out", str(folder / "run")]
        finished = CliRunner().invoke(main, ["probe", *arguments, "--quiet"])
        assert (folder / "run" / "results.json").exists(), finished.output
        return load_file(folder / "run" / "delta_theta.safetensors")


def recorded(folder: Path, step: int) -> Path:
    """The recorder's file of a step, which has the rows that TRL's loss was given."""
    file = folder / "rollouts" / f"U-{step:06d}.jsonl.gz"

    def own(row: Row) -> Any:
        return row["prompt_ids"], row["response_ids"], row["advantage"]

    assert sorted(map(own, read_rows(file))) == sorted(map(own, batch_of(folder, step)))
    return file


def probe(folder: Path, step: int, **update: Any) -> dict[str, Tensor]:
    """The probe's version of a step of TRL's, on the batch as it was recorded."""
    batch = recorded(folder, step)
    checkpoint = {"path": str(folder / f"checkpoint-{step - 1}")}
    update = {"from_checkpoint": True} | update
    name = "-".join(["probe", str(step), *map(str, update.values())])
    return Probe(checkpoint=checkpoint, batch=batch, update=update).delta(folder / name)


def trl_step(folder: Path, step: int) -> dict[str, Tensor]:
    """A step of TRL's."""
    return step_between(
        *(folder / f"checkpoint-{number}" for number in (step - 1, step))
    )


def log_of(folder: Path, step: int) -> dict[str, Any]:
    """What TRL logged of a step."""
    state = json.loads((folder / f"checkpoint-{step}/trainer_state.json").read_text())
    return next(entry for entry in state["log_history"] if entry["step"] == step)


def one_more_step(task: Task, folder: Path, **settings: Any) -> None:
    """Train, save, and take one more step by `resume_from_checkpoint`."""
    train_with_trl(**task.job(folder, steps=STEPS, **settings))
    train_with_trl(**task.job(folder, steps=STEPS + 1, resume=True, **settings))


def error_of_the_step(folder: Path, step: int, **update: Any) -> float:
    """How far the probe's version of a step of TRL's is from it."""
    return distance(probe(folder, step, **update), trl_step(folder, step))


LOSSES = ("dr_grpo", "grpo", "dapo")
WEIGHTS = ("LoRA", "full")


def each_loss(
    argument: str, kinds: Sequence[str], short: Sequence[str]
) -> pytest.MarkDecorator:
    """Every loss with False and True of an argument, which are called by two kinds.

    What is not named in `short` is long.
    """
    cases = []
    for (number, kind), loss in product(enumerate(kinds), LOSSES):
        name = f"{kind}, {loss}"
        marks = () if name in short else (pytest.mark.long,)
        cases.append(pytest.param(loss, bool(number), id=name, marks=marks))
    return pytest.mark.parametrize(("loss", argument), cases)


@each_loss("full", WEIGHTS, ["LoRA, dr_grpo", "LoRA, dapo", "full, grpo"])
def test_the_step_after_a_checkpoint(
    task: Task, tmp_path: Path, loss: str, full: bool
) -> None:
    """Also on what `import` makes of TRL's completions, where no token is missing."""
    # At the adapter's rate a policy of all weights has learned all in two steps.
    rate = LEARNING_RATE / 10 if full else LEARNING_RATE
    one_more_step(task, tmp_path, loss_type=loss, full=full, learning_rate=rate)
    step = STEPS + 1
    assert error_of_the_step(tmp_path, step) < RTOL
    (results,) = tmp_path.glob(f"probe-{step}-*/run/results.json")
    audits = {a["name"]: a for a in json.loads(results.read_text())["audit"]}
    norm = audits[f"gradient norm, the trainer's of step {step}"]
    assert norm["value"] == pytest.approx(log_of(tmp_path, step)["grad_norm"], rel=RTOL)
    assert norm["value"] > 0
    assert norm["verdict"] == audits["U step of the trainer"]["verdict"] == "ok"
    for split in "EU":
        # The policy's own, in float32.
        assert audits[f"{split} sampler mismatch, mean |Δ log p|"]["value"] < 1e-6
    exact, (restored, notes) = batch_of(tmp_path, step), imported(tmp_path, step)
    assert len(restored) == len(exact)
    # The importer says of itself whether texts had lost tokens.
    is_whole = ids_of(restored) == ids_of(exact)
    assert is_whole == (not any("not what was sampled" in note for note in notes))
    if is_whole:
        batch = write_rows(tmp_path / "restored.jsonl", restored)
        checkpoint = {"path": str(tmp_path / f"checkpoint-{STEPS}")}
        delta = Probe(checkpoint=checkpoint, batch=batch).delta(tmp_path / "restored")
        assert distance(delta, trl_step(tmp_path, step)) < RTOL


def imported(folder: Path, step: int) -> tuple[list[Row], list[str]]:
    """Rows of a step's completions file and the importer's notes."""
    file = folder / "completions" / f"completions_{step:05d}.parquet"
    output = folder / f"imported{step}.jsonl"
    checkpoint = ["--checkpoint", str(folder / f"checkpoint-{step - 1}")]
    arguments = [str(file), *checkpoint, "--output", str(output), "--json"]
    finished = CliRunner().invoke(main, ["import", "trl", *arguments])
    assert finished.exit_code == 0, finished.output
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    return rows, json.loads(finished.stdout)["notes"]


def ids_of(rows: list[Row]) -> list[tuple[list[int], list[int]]]:
    """The token ids of all rows, in an order of their own."""
    return sorted((row["prompt_ids"], row["response_ids"]) for row in rows)


def test_a_batch_is_restored_whole_from_its_texts(task: Task, tmp_path: Path) -> None:
    """What the test above does with it is done at least once."""
    train_with_trl(**task.job(tmp_path, steps=STEPS))
    for step in range(2, STEPS + 1):
        restored, _ = imported(tmp_path, step)
        assert ids_of(restored) == ids_of(batch_of(tmp_path, step))


def test_a_resumed_run_is_the_run_that_went_on(task: Task, tmp_path: Path) -> None:
    """Batch and weights, bit for bit: so the resumed step is the trainer's own."""
    resumed, straight = tmp_path / "resumed", tmp_path / "straight"
    one_more_step(task, resumed)
    train_with_trl(**task.job(straight, steps=STEPS + 1))
    last = f"checkpoint-{STEPS + 1}"
    for name, tensor in weights(straight / last).items():
        assert torch.equal(weights(resumed / last)[name], tensor), name
    assert batch_of(resumed, STEPS + 1) == batch_of(straight, STEPS + 1)


@each_loss("full", WEIGHTS, ["LoRA, dapo", "full, dr_grpo", "full, grpo"])
def test_active_clipping(task: Task, tmp_path: Path, loss: str, full: bool) -> None:
    """The second step on a batch, whose sampler is the policy before the first."""
    settings = {"loss_type": loss, "full": full, **CLIPPING}
    train_with_trl(**task.job(tmp_path, steps=4, **settings))
    assert log_of(tmp_path, 4)["clip_ratio/region_mean"] > 0.02
    assert error_of_the_step(tmp_path, 4, ratio="clipped") < RTOL
    wide = {"ratio": "clipped", "epsilon_low": 0.99, "epsilon_high": 99.0}
    assert error_of_the_step(tmp_path, 4, **wide) > 100 * RTOL


@each_loss(
    "weighted", ["k3", "weighted"], ["k3, dapo", "k3, grpo", "weighted, dr_grpo"]
)
def test_a_kl_term(task: Task, tmp_path: Path, loss: str, weighted: bool) -> None:
    """On policy and off, plain and with TRL's bias correction."""
    settings = {"beta": 0.04, "use_bias_correction_kl": weighted, "loss_type": loss}
    train_with_trl(**task.job(tmp_path, steps=4, **settings, **CLIPPING))
    assert error_of_the_step(tmp_path, 3) < RTOL
    assert error_of_the_step(tmp_path, 4, ratio="clipped") < RTOL
    assert error_of_the_step(tmp_path, 3, kl_coefficient=0.0) > 100 * RTOL
    other = "k3" if weighted else "k3_weighted"
    assert error_of_the_step(tmp_path, 3, kl_estimator=other) > 10 * RTOL


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2, "loss_type": "dapo"},
        {"gradient_accumulation_steps": 2, "loss_type": "grpo"},
        {
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 4,
            "loss_type": "dr_grpo",
        },
        {
            "scale_rewards": "group",
            "max_grad_norm": 0.01,
            "mask_truncated_completions": True,
        },
        {"max_grad_norm": 0.0, "temperature": 1.3},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 9},
        {"optim": "adamw_torch", "adam_beta1": 0.8, "adam_epsilon": 1e-6},
        {"peft": {"bias": "all", "task_type": None}},
        {"peft": {"use_rslora": True, "target_modules": ["q_proj", "v_proj"]}},
        {"peft": {"modules_to_save": ["norm"]}, "beta": 0.04},
    ],
    ids=str,
)
def test_other_settings(task: Task, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Accumulation, schedules, gradient norm, other adapters."""
    one_more_step(task, tmp_path, **settings)
    assert error_of_the_step(tmp_path, STEPS + 1) < RTOL


# Several ranks


@pytest.fixture(scope="module")
def two_ranks(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TRL on two ranks, one process each for all runs."""
    root = tmp_path_factory.mktemp("ranks")
    jobs = [
        task.job(root / name, per_device_train_batch_size=16, **settings)
        for name, settings in RUNS_ON_TWO_RANKS.items()
    ]
    (root / "jobs.json").write_text(json.dumps(jobs))
    script = launching.REPOSITORY / "tests" / "trainers.py"
    command = launching.torchrun(2, script, root / "jobs.json")
    launching.run(command, timeout_seconds=240).require_success()
    return root


RUNS_ON_TWO_RANKS: dict[str, dict[str, Any]] = {
    f"{loss}-{'full' if full else 'lora'}": {
        "steps": 4, "loss_type": loss, "full": full, **CLIPPING
    }
    for loss in ("dr_grpo", "grpo", "dapo")
    for full in (False, True)
}  # fmt: skip
RUNS_ON_TWO_RANKS["kl"] = {"steps": 3, "beta": 0.04, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("name", RUNS_ON_TWO_RANKS)
def test_a_trainer_on_two_ranks(two_ranks: Path, name: str) -> None:
    """Both ranks' rows make up the batch; clipped and not."""
    folder = two_ranks / name
    assert error_of_the_step(folder, 3) < RTOL
    if "num_iterations" in RUNS_ON_TWO_RANKS[name]:
        assert log_of(folder, 4)["clip_ratio/region_mean"] > 0.02
        assert error_of_the_step(folder, 4, ratio="clipped") < RTOL


def test_a_probe_on_two_ranks(two_ranks: Path, tmp_path: Path) -> None:
    """Of a trainer on two; with a KL term, for which each rank scores its own share."""
    folder = two_ranks / "kl"
    probe = Probe(
        checkpoint={"path": str(folder / "checkpoint-2")},
        batch=recorded(folder, 3),
    )
    out = tmp_path / "run"
    options = ("--config", probe.config(tmp_path / "probe"), "--out", out, "--quiet")
    command = launching.torchrun(2, *launching.PACKAGE, "probe", *options)
    launching.run(command)
    delta = load_file(out / "delta_theta.safetensors")
    assert distance(delta, trl_step(folder, 3)) < RTOL


# A loop of one's own


@pytest.mark.parametrize("full", [False, True], ids=WEIGHTS)
def test_accelerates_save_state(task: Task, tmp_path: Path, full: bool) -> None:
    """The optimizer's state is in the folder, the model is saved beside it."""
    source, loop = tmp_path / "trl", tmp_path / "loop"
    train_with_trl(**task.job(source, steps=3))
    batches = [batch_of(source, step) for step in (1, 2, 3)]
    expected = train_with_accelerate(loop, base=task.base, batches=batches, full=full)
    checkpoint = {
        "path": str(loop / "model"),
        "optimizer": str(loop / "state" / "optimizer.bin"),
    }
    update = {"length_norm": MAX_LENGTH, "max_grad_norm": 0.05}
    delta = Probe(
        checkpoint=checkpoint,
        batch=write_rows(tmp_path / "U.jsonl", batches[-1]),
        update=update,
    ).delta(tmp_path / "probe")
    assert distance(delta, expected) < RTOL
