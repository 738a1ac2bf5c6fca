"""Does configs/gsm8k_qwen2.5_1.5b.yaml run, but for the weights and the data set?

A tiny random Qwen2 with a tokenizer trained on the spot stands for the checkpoint, and
word problems of our own for GSM8K. ENTROPY_DDP_GSM8K names a JSON lines file of real
rows (`question`, `answer`) for the test that needs some.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import checkpoints
import launching
import pytest
import torch
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from entropy_ddp.cli import main
from entropy_ddp.config import load_config
from entropy_ddp.sampling.prompts import read_prompts
from entropy_ddp.sampling.rewards import check_gold, load_rewards, score_rewards

CONFIG = launching.REPOSITORY / "configs" / "gsm8k_qwen2.5_1.5b.yaml"
PROBLEMS = launching.REPOSITORY / "tests" / "data" / "word_problems.jsonl"
CARD = """---
configs:
- config_name: main
  data_files: [{split: train, path: train.jsonl}]
---
"""
END = "<|endoftext|>"
NUM_TOKENS = 320
# No tiny model gives answers; this reward differs between its responses.
SIGNAL = "batches.U.sample.reward=[{regex: '[a-m]', weight: 0.5}, {regex: e, name: e}]"

pytest.importorskip("datasets")
pytest.importorskip("math_verify")


def make_model(seed: int) -> nn.Module:
    """A tiny random Qwen2 with room for the problems, in float64."""
    shape = {
        "vocab_size": NUM_TOKENS,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
        "eos_token_id": 0,
        "bos_token_id": None,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**shape)).double().eval()


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding, as Qwen's, of these texts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=END)


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The configuration, with this checkpoint and data set in place of the real ones."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setitem(checkpoints.FAMILIES, "tiny", make_model)
    monkeypatch.setitem(checkpoints.TARGETS, "tiny", checkpoints.TARGETS["qwen2"])
    saved = checkpoints.save_checkpoint(tmp_path, "tiny")
    texts = [text for row in read_problems() for text in row.values()]
    make_tokenizer(texts).save_pretrained(saved.base)
    write_dataset(tmp_path / "data", read_problems())
    assignments = [f"checkpoint.{key}={value}" for key, value in saved.section.items()]
    assignments += ["compute.device=cpu", "out=null"]
    for split in "EU":
        sample = f"batches.{split}.sample"
        assignments += [
            f"{sample}.prompts.dataset={tmp_path / 'data'}",
            f"{sample}.max_new_tokens=8",
        ]
    options = [option for text in assignments for option in ("--set", text)]
    return ["--config", str(CONFIG), *options]


def read_problems() -> list[dict[str, str]]:
    return [json.loads(line) for line in PROBLEMS.read_text().splitlines()]


def write_dataset(folder: Path, rows: list[dict[str, str]]) -> None:
    """A data set with the configuration `main` and the split `train`."""
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(lines)


def invoke(command: str, *arguments: str) -> Result:
    result = CliRunner().invoke(main, [command, *arguments])
    assert result.exit_code in (0, 3), result.output
    return result


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def small(num_evaluation: int, num_update: int) -> list[str]:
    sizes = (("E", num_evaluation), ("U", num_update))
    texts = [f"batches.{split}.sample.num_prompts={n}" for split, n in sizes]
    return [option for text in texts for option in ("--set", text)]


def test_the_sizes_are_as_announced() -> None:
    batches = load_config(CONFIG, ()).batches
    evaluation, update = batches.E.sample, batches.U.sample
    assert evaluation is not None
    assert update is not None
    assert (evaluation.num_prompts, evaluation.responses_per_prompt) == (2048, 1)
    assert (update.num_prompts, update.responses_per_prompt) == (64, 8)
    assert evaluation.redraw_zero_advantage == update.redraw_zero_advantage == 0
    assert evaluation.prompts == update.prompts


def test_sampling_says_what_it_made(arguments: list[str], tmp_path: Path) -> None:
    """The summary agrees with the rows; a model that knows nothing earns nothing."""
    out = tmp_path / "out"
    result = invoke("sample", *arguments, *small(9, 3), "--out", str(out), "--json")
    evaluation, update = json.loads(result.stdout)
    rows = read_rows(out / "U.jsonl")
    assert len(rows) == 24
    answers = [row["answer"] for row in read_problems()]
    for row in rows:
        problem = read_problems()[row["prompt_index"]]
        assert row["answer"] == answers[row["prompt_index"]]
        assert row["prompt"].startswith(f"Question: {problem['question']}\nThink step")
        assert row["prompt"].endswith("<answer>5</answer>\nAnswer:")
        assert row["reward"] == 0.0
        assert row["reward_terms"] == {"math": 0.0, "format": 0.0}
        assert "question" not in row
    truncated = [row for row in rows if not row["finished"]]
    assert update["truncated_share"] == len(truncated) / 24
    assert update["num_tokens"] == sum(len(row["response_ids"]) for row in rows)
    assert update["mean_reward"] == update["mean_reward_math"] == 0.0
    assert update["groups_without_signal"] == 3
    assert "mean_reward" not in evaluation
    shown = invoke(
        "sample", *arguments, *small(9, 3), "--out", str(out), "--overwrite",
        "--set", SIGNAL,
    )  # fmt: skip
    rows = read_rows(out / "U.jsonl")
    groups = [[r["reward"] for r in rows if r["group"] == g] for g in range(3)]
    silent = sum(len(set(group)) == 1 for group in groups)
    for line in (
        rf"groups without signal .* {silent} ",
        r"truncated share ",
        r"mean reward regex ",
        r"tokens ",
    ):
        assert re.search(line, shown.output), shown.output


def test_check_shows_the_first_prompt(arguments: list[str]) -> None:
    result = invoke("check", *arguments, *small(9, 3))
    assert "Think step by step" in result.output
    assert "1 x math" in result.output
    assert "0.1 x format" in result.output


def test_a_probe_runs(arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    invoke("probe", *arguments, *small(9, 3), "--set", SIGNAL, "--out", str(out))
    check_results(out, 9, 3)


@pytest.mark.long
def test_a_probe_of_the_announced_size_runs(
    arguments: list[str], tmp_path: Path
) -> None:
    """64 prompts need as many problems: ours, numbered."""
    rows = [
        row | {"question": f"No. {number}: {row['question']}"}
        for number in range(22)
        for row in read_problems()
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "data" / "train.jsonl").write_text(lines)
    out = tmp_path / "out"
    invoke("probe", *arguments, "--set", SIGNAL, "--out", str(out))
    check_results(out, 2048, 64)


def check_results(out: Path, num_evaluation: int, num_update: int) -> None:
    """Both batches have their sizes, and the prediction is near the truth."""
    results = json.loads((out / "results.json").read_text())
    assert len(read_rows(out / "rollouts" / "E.jsonl")) == num_evaluation
    assert len(read_rows(out / "rollouts" / "U.jsonl")) == 8 * num_update
    truth, linear = results["truth"]["delta_h_true"], results["linear"]["delta_h1"]
    assert truth != 0
    assert abs(linear - truth) < 0.2 * abs(truth)


@pytest.mark.skipif(
    "ENTROPY_DDP_GSM8K" not in os.environ, reason="ENTROPY_DDP_GSM8K names no file"
)
def test_real_rows_have_prompts_and_gold_answers() -> None:
    """The gold answer in tags earns 1.1, another number 0.1, without tags nothing."""
    sample = load_config(CONFIG, ()).batches.U.sample
    assert sample is not None
    assert sample.reward is not None
    place = {"file": os.environ["ENTROPY_DDP_GSM8K"], "dataset": None}
    nothing = dict.fromkeys(("name", "split"))
    source = sample.prompts.model_copy(update=place | nothing)
    terms = load_rewards(sample.reward)
    prompts = read_prompts(source)
    assert prompts

    def score(response: str, row: dict[str, Any]) -> float:
        return score_rewards(terms, "group 0", "", response, row)[0]

    for prompt in prompts:
        for reward in sample.reward:
            check_gold(reward, prompt.row, prompt.where)
        worked, _, gold = prompt.row["answer"].rpartition("#### ")
        number = float(gold.replace(",", ""))
        assert prompt.row["question"] in str(prompt.content)
        assert prompt.carried == {"answer": prompt.row["answer"]}
        right = f"{worked}<answer>{number:.2f}</answer>"
        assert score(right, prompt.row) == pytest.approx(1.1)
        assert score(f"<answer>{number + 1}</answer>", prompt.row) == 0.1
        assert score(f"{worked} {gold}", prompt.row) == 0.0
