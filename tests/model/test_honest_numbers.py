"""No number is made up: what is not finite is named, what is zero is zero.

Rollouts of another policy are not measured as this one's. NaN and infinity come out as an error that names phase, batch, line and token; float64
with left padding is exact; an update whose advantages are all zero still moves by
momentum and decay, by no more and no less.
"""

import copy
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import launching
import planted
import pytest
import reference as ref
import torch
import yaml
from checkpoints import (
    run_config,
    save_character_tokenizer,
    save_checkpoint,
    write_rows,
)
from click.testing import CliRunner
from jobs import run_attribution
from planted import Scene
from reference import LossSettings, Row
from tiny_runs import TinyRun, make_run
from torch import nn

from entropy_ddp.cli import main
from entropy_ddp.config import Config
from entropy_ddp.distributed import World
from entropy_ddp.probe.opening import find_checkpoint, open_policy, sample_batch

LEARNING_RATE = 0.01


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of this process run alone."""
    for name in launching.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A tiny adapter with two ragged batches."""
    return make_run(tmp_path_factory.mktemp("run"), "qwen2")


def complaint_of(run: TinyRun, folder: Path, **sections: Any) -> str:
    """A probe through the command line."""
    files = [
        write_rows(folder / f"{split}.jsonl", rows)
        for split, rows in (("E", run.E), ("U", run.U))
    ]
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run_config(run.saved, *files) | sections))
    out = folder / "out"
    result = CliRunner().invoke(
        main, ["probe", "--config", str(path), "--out", str(out)]
    )
    assert result.exit_code == 1
    (line,) = [
        line for line in result.stderr.splitlines() if not line.startswith("memory: ")
    ]
    assert not (out / "results.json").exists()
    return line


# Another policy's rollouts


def of_weights(model: nn.Module) -> dict[str, list[dict[str, Any]]]:
    """Both batches sampled from these weights, with the sampler's log-probabilities."""
    batches = planted.sample_batches(model)
    for rows in batches.values():
        scores = ref.scores(model, planted.reference_rows(rows), 1.0)
        for row, (logp, _) in zip(rows, scores, strict=True):
            row["sampling_logprobs"] = logp.tolist()
    return batches


def of_another_temperature(root: Path) -> Scene:
    """Both batches are sampled at temperature 1, the policy is scored at 0.7."""
    scene = planted.make_scene(root)
    return scene.with_sections(objective={"temperature": 0.7})


def of_a_later_checkpoint(root: Path) -> Scene:
    """E was sampled after a step that the checkpoint has not taken."""
    scene = planted.make_scene(root)
    batches = of_weights(scene.saved.model)
    later = copy.deepcopy(scene.saved.model)
    noise = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in ref.trainable(later).values():
            change = torch.randn(parameter.shape, generator=noise)
            parameter.add_(0.02 * parameter.std() * change)
    return replace(scene, E=of_weights(later)["E"], U=batches["U"])


def of_an_adapter(root: Path) -> Scene:
    """Full weights, with the rollouts of a LoRA run on them."""
    with_adapter = planted.make_scene(root / "lora")
    saved = save_checkpoint(root / "full", "qwen2", full=True)
    return replace(with_adapter, saved=saved, **of_weights(with_adapter.saved.model))


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (of_another_temperature, "a higher temperature (0.7 is set; about 1"),
        (of_a_later_checkpoint, "the rollouts come from other weights"),
        (of_an_adapter, "the rollouts come from other weights"),
    ],
)
def test_rollouts_of_another_policy_are_not_trusted(
    tmp_path: Path, make: Callable[[Path], Scene], cause: str
) -> None:
    """Exit code 3, the first line says so, and the likely cause follows."""
    config = make(tmp_path).config(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = ["probe", "--config", str(path), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 3, result.stderr
    assert result.stdout.startswith("NOT TO BE TRUSTED: failed the check")
    assert cause in " ".join(result.stdout.split())
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert document["status"] == "untrusted"


# What is not finite


def test_a_gradient_that_overflows_names_its_token(
    run: TinyRun, tmp_path: Path
) -> None:
    """A ratio of a token that the sampler thought impossible, in one line of U."""
    rows = [
        replace(row, sampling_logprobs=[-1.0] * len(row.response_ids)) for row in run.U
    ]
    line = max(range(len(rows)), key=lambda i: len(rows[i].response_ids))
    assert len(rows[line].response_ids) > 1
    logprobs = [-1.0] * len(rows[line].response_ids)
    logprobs[1] = -1e300
    # The clip limits a ratio from above only where the advantage is positive.
    rewards = [1.0 if number != line else -5.0 for number in range(len(rows))]
    rows = [
        replace(row, reward=reward) for row, reward in zip(rows, rewards, strict=True)
    ]
    rows[line] = replace(rows[line], sampling_logprobs=logprobs)
    update = {"ratio": "clipped"}
    line_told = complaint_of(replace(run, U=rows), tmp_path, update=update)
    place = (
        f"batch U, line {line + 1}, response token 2 is NaN or infinite in base_model"
    )
    assert line_told.startswith(f"error: gradient of U: the gradient of {place}")


def test_an_entropy_after_the_step_that_is_none_names_its_token(
    run: TinyRun, tmp_path: Path
) -> None:
    """Weights that are finite and give no probabilities."""
    line_told = complaint_of(
        run, tmp_path, update={"lr_override": 1e160, "max_grad_norm": 0.0}
    )
    assert re.match(
        r"error: truth: E after the step: \w+ of batch E, line \d+, response token \d+ "
        r"is (nan|-?inf)",
        line_told,
    ), line_told


def test_a_step_that_overflows_is_named(run: TinyRun, tmp_path: Path) -> None:
    """The phase, and what is not finite."""
    line_told = complaint_of(
        run, tmp_path, update={"lr_override": 1e308, "max_grad_norm": 0.0}
    )
    assert re.match("error: (step|truth)", line_told), line_told


# Left padding


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "llama"])
def test_float64_with_left_padding_is_exact(
    tmp_path: Path, family: str, attention: str
) -> None:
    """Prompts of 1 to 9 tokens generated together: log-probs as of each one alone.

    The least float64 overflows in the float32 mask of a padded batch: NaN, where the
    mask is made in another type than the model.
    """
    saved = save_checkpoint(tmp_path, family)
    save_character_tokenizer(saved.base)
    prompts = [[3 + (i * j) % 9 for j in range(i)] for i in range(1, 10)]
    lines = "".join(f'{{"prompt_ids": {prompt}}}\n' for prompt in prompts)
    (tmp_path / "prompts.jsonl").write_text(lines)
    sample = {
        "prompts": str(tmp_path / "prompts.jsonl"),
        "num_prompts": 9,
        "responses_per_prompt": 2,
        "max_new_tokens": 6,
    }
    sections = run_config(saved, Path(), Path()) | {
        "batches": {"E": {"sample": sample}, "U": {"file": "unused.jsonl"}},
        "compute": {"device": "cpu", "attention": attention},
    }
    config = Config.model_validate(sections)
    files = find_checkpoint(config.checkpoint)
    session = open_policy(config, World(), files, lambda *_: None)
    sampled = sample_batch(session, "E")
    assert {len(row["prompt_ids"]) for row in sampled} == set(range(1, 10))
    rows = [Row(r["group"], r["prompt_ids"], r["response_ids"]) for r in sampled]
    for row, (logp, _) in zip(sampled, ref.scores(saved.model, rows, 1.0), strict=True):
        assert row["sampling_logprobs"] == pytest.approx(logp.tolist(), abs=1e-12)


# No signal


def test_without_signal_momentum_and_decay_are_all_there_is(run: TinyRun) -> None:
    """A warning, a gradient of exactly zero, and the step that a plain AdamW takes."""
    silent = replace(run, U=[replace(row, reward=0.25) for row in run.U])
    update = {"max_grad_norm": 0.5, "lr_override": LEARNING_RATE}
    config = silent.config(update=update, linear={"score": "full"})
    found = run_attribution(config, World(), None, lambda *_: None).results
    step = silent.naive_step(
        LossSettings(), max_grad_norm=0.5, learning_rate=LEARNING_RATE
    )
    assert step.grad_norm == 0.0
    assert found.update.grad_norm == 0.0
    assert found.update.num_optimizer_steps == 1
    length = math.sqrt(sum(float(d.square().sum()) for d in step.delta.values()))
    assert length > 0
    assert found.update.param_update_l2 == pytest.approx(length, rel=1e-10)
    direction = {name: d / LEARNING_RATE for name, d in step.delta.items()}
    slope = ref.slope(run.saved.model, silent.E, direction, ref.Objective()).slope
    assert found.linear.slope == pytest.approx(slope, rel=1e-9)
    shares = found.attribution
    assert shares is not None
    assert shares.gradient == 0.0
    total = shares.momentum + shares.weight_decay
    assert shares.total == pytest.approx(total, rel=1e-12)
    assert total == pytest.approx(found.linear.delta_h1, rel=1e-9)
    assert total != 0.0
    warned = [row.name for row in found.audit if row.verdict != "ok"]
    assert any("signal" in name or "std(A)" in name for name in warned), warned
