"""No number is made up: what is not finite is named, what is zero is zero.

NaN and infinity come out as an error that names phase, batch, line and token; float64
with left padding is exact; an update whose advantages are all zero still moves by
momentum and decay, by no more and no less.
"""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import launching
import pytest
import reference as ref
import yaml
from checkpoints import run_config, save_checkpoint, write_rows
from click.testing import CliRunner
from reference import LossSettings, Row
from test_cli import save_character_tokenizer
from tiny_runs import TinyRun, make_run

from entropy_ddp.cli import main
from entropy_ddp.config import Config
from entropy_ddp.distributed import World
from entropy_ddp.probe.attribution import run_attribution
from entropy_ddp.probe.keeping import sample_batch
from entropy_ddp.probe.session import find_checkpoint, open_policy

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
    sampled = sample_batch(session, "E", config.batches.E)
    assert {len(row["prompt_ids"]) for row in sampled} == set(range(1, 10))
    rows = [Row(r["group"], r["prompt_ids"], r["response_ids"]) for r in sampled]
    for row, (logp, _) in zip(sampled, ref.scores(saved.model, rows, 1.0), strict=True):
        assert row["sampling_logprobs"] == pytest.approx(logp.tolist(), abs=1e-12)


# No signal


def test_without_signal_momentum_and_decay_are_all_there_is(run: TinyRun) -> None:
    """A warning, a gradient of exactly zero, and the step that a plain AdamW takes."""
    silent = replace(run, U=[replace(row, reward=0.25) for row in run.U])
    update = {"max_grad_norm": 0.5, "lr_override": LEARNING_RATE}
    config = silent.config(update=update)
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
