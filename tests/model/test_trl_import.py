"""TRL's completions: against what TRL itself trained on, and what can be wrong."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dumps import EOS, ids_of, imported, make_checkpoint, run_import

from entropy_ddp import demo
from entropy_ddp.data.files import read_batch
from entropy_ddp.data.rows import TokenLimits

pyarrow = pytest.importorskip("pyarrow")
# Short, so that some responses of the policy are truncated.
MAX_LENGTH = 9


def write_completions(path: Path, columns: dict[str, list[Any]]) -> Path:
    """A completions file."""
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return path


def columns(**more: list[Any]) -> dict[str, list[Any]]:
    """Groups of two, the last with reward 0 throughout."""
    return {
        "step": [5] * 6,
        "prompt": ["x", "x", "y", "y", "z", "z"],
        "completion": ["c", "d", "e", "f", "g", "h"],
        "right": [1.0, 0.0, 0.0, 1.0, 0.0, 0.0],
        "advantage": [0.5, -0.5, -0.5, 0.5, 0.0, 0.0],
    } | more


def drawn_twice() -> dict[str, list[Any]]:
    """Groups of two: x, x again with rewards of its own, y, and x a third time."""
    return {
        "step": [5] * 8,
        "prompt": ["x"] * 4 + ["y"] * 2 + ["x"] * 2,
        "completion": list("cdefghij"),
        "right": [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.5],
        "advantage": [0.5, -0.5, 0.0, 0.0, -0.5, 0.5, -0.25, 0.25],
    }


def save_settings(checkpoint: Path, **settings: Any) -> None:
    """A training_args.bin with these settings."""
    torch.save(SimpleNamespace(**settings), checkpoint / "training_args.bin")


def test_the_ids_are_those_that_trl_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL trains the demo; each step's file against the batch of that step.

    The untrained policy samples special tokens inside of a response, which the text
    does not have; such responses cannot be restored, and TRL's own log gives them away.
    """
    trl = pytest.importorskip("trl")
    generate = trl.GRPOTrainer._generate_and_score_completions
    batches: list[dict[str, Any]] = []

    def record(trainer: Any, inputs: Any) -> Any:
        made = generate(trainer, inputs)
        batches.append({k: v for k, v in made.items() if torch.is_tensor(v)})
        return made

    monkeypatch.setattr(trl.GRPOTrainer, "_generate_and_score_completions", record)
    monkeypatch.setattr(demo, "MAX_COMPLETION_LENGTH", MAX_LENGTH)
    made = demo.train_demo(tmp_path / "demo", supervised_steps=100, grpo_steps=2)
    assert len(batches) == 2
    compared = truncated = 0
    for step, batch in enumerate(batches, start=1):
        file = tmp_path / "demo" / "completions" / f"completions_{step:05d}.parquet"
        output = tmp_path / f"U{step}.jsonl"
        rows, summary = imported("trl", file, checkpoint=made.checkpoint, output=output)
        assert len(rows) == len(batch["completion_ids"])
        assert any("step 3" in note for note in summary["notes"])
        different = 0
        for index, row in enumerate(rows):
            prompt, response = (
                batch[f"{part}_ids"][index][
                    batch[f"{part}_mask"][index].bool()
                ].tolist()
                for part in ("prompt", "completion")
            )
            assert row["prompt_ids"] == prompt
            assert row["group"] == index // demo.RESPONSES_PER_PROMPT
            assert row["advantage"] == float(batch["advantages"][index])
            different += row["response_ids"] != response
            if min(response[:-1], default=4) >= 4:
                assert row["response_ids"] == response
                compared += 1
                truncated += not row["finished"]
        is_told = any("TRL logged" in note for note in summary["notes"])
        assert is_told == bool(different)
        read_batch(output, "U", TokenLimits(vocabulary_size=16, max_positions=None))
    assert compared > 200
    assert 0 < truncated < compared


def test_without_settings_a_run_of_one_prompt_is_a_group(tmp_path: Path) -> None:
    """Where there is one reading only; advantages are taken over."""
    checkpoint, output = make_checkpoint(tmp_path), tmp_path / "U.jsonl"
    file = write_completions(tmp_path / "completions_00005.parquet", columns())
    rows, summary = imported(
        "trl", file, checkpoint=checkpoint, output=output, max_completion_length=3
    )
    assert [row["group"] for row in rows] == [0, 0, 1, 1, 2, 2]
    assert [row["advantage"] for row in rows] == columns()["advantage"]
    assert [row["reward"] for row in rows] == columns()["right"]
    assert rows[0]["response_ids"] == [*ids_of("c"), EOS]
    assert summary["notes"] == []


@pytest.mark.parametrize("told_by", ["settings", "option"])
def test_a_prompt_that_was_drawn_twice_is_two_groups(
    tmp_path: Path, told_by: str
) -> None:
    """A group is a run of `num_generations` rows, whatever its prompt."""
    checkpoint = make_checkpoint(tmp_path)
    settings = {"num_generations": 2, "max_completion_length": 3}
    if told_by == "settings":
        save_settings(checkpoint, **settings)
    file = write_completions(tmp_path / "completions_00005.parquet", drawn_twice())
    rows, summary = imported(
        "trl", file, checkpoint=checkpoint, output=tmp_path / "U.jsonl",
        **(settings if told_by == "option" else {}),
    )  # fmt: skip
    assert [row["group"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert summary["groups"] == 4
    assert summary["responses_per_group"] == {"min": 2, "max": 2}
    assert summary["notes"] == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("xxxxyy", {}, "found 2 prompts in 2 runs of 2 to 4 rows; give --num-gen"),
        ("xxyyxx", {}, "found 2 prompts in 3 runs of 2 to 2 rows; give --num-gen"),
        ("xyxyzz", {"num_generations": 2}, "found 2 prompts in rows 1 to 2"),
        ("xxyyzz", {"num_generations": 3}, "found 2 prompts in rows 1 to 3"),
        ("xxxxyy", {"num_generations": 4}, "found 1 prompts in rows 5 to 6"),
        # Two draws of each prompt: the advantages do not follow from one mean.
        ("xxxxxx", {}, "or give --num-generations N"),
    ],
)
def test_rows_that_cannot_be_told_into_groups_are_refused(
    tmp_path: Path, prompts: str, options: dict[str, Any], message: str
) -> None:
    """Never a guess: what is needed is named."""
    data = columns(prompt=list(prompts), right=[1.0, 0.0, 0.0, 1.0, 0.0, 3.0])
    data["advantage"] = [0.5, -0.5, -0.5, 0.5, -1.5, 1.5]
    file = write_completions(tmp_path / "completions_00005.parquet", data)
    output = tmp_path / "U.jsonl"
    result = run_import(
        "trl", file, checkpoint=make_checkpoint(tmp_path), output=output,
        max_completion_length=3, **options,
    )  # fmt: skip
    assert result.exit_code == 2
    assert str(file) in result.stderr and message in result.stderr
    assert not output.exists()


@pytest.mark.parametrize(("ranks", "per_device"), [(1, 8), (2, 6), (4, 3)])
def test_trl_s_rows_of_several_ranks_are_runs_of_one_prompt(
    ranks: int, per_device: int
) -> None:
    """Gathered in the order of the ranks, also where a group is on two of them."""
    utilities = pytest.importorskip("trl.trainer.utils")
    data_loader = pytest.importorskip("accelerate.data_loader")
    size, shards = 4, []
    for rank in range(ranks):
        sampler = utilities.RepeatSampler(
            range(30), size, batch_size=per_device * ranks // size, seed=1
        )
        batches = torch.utils.data.BatchSampler(sampler, per_device, drop_last=False)
        shards.append(data_loader.BatchSamplerShard(batches, ranks, rank))
    for parts in zip(*shards):
        rows = [index for part in parts for index in part]
        runs = [rows[i : i + size] for i in range(0, len(rows), size)]
        assert all(run == [run[0]] * size for run in runs)


def test_messages_are_rendered(tmp_path: Path) -> None:
    """Prompts and completions of a conversational data set."""
    checkpoint = make_checkpoint(tmp_path, template=True)
    data = columns(
        prompt=[[{"role": "user", "content": p}] for p in columns()["prompt"]],
        completion=[
            [{"role": "assistant", "content": c}] for c in columns()["completion"]
        ],
    )
    file = write_completions(tmp_path / "completions_00005.parquet", data)
    rows, _ = imported(
        "trl", file, checkpoint=checkpoint, output=tmp_path / "U.jsonl",
        max_completion_length=3,
    )  # fmt: skip
    assert rows[2]["prompt_ids"] == ids_of("<turn>user\ny</turn>\n<turn>assistant\n")
    assert rows[2]["response_ids"] == [*ids_of("e"), EOS]


def test_rewards_are_the_sum_of_the_columns(tmp_path: Path) -> None:
    """NaN counts as no reward; each column is carried too."""
    nan = float("nan")
    data = columns(
        right=[1.0, 0.0, 0.0, 0.5, 0.0, 0.0],
        form=[0.0, nan, nan, 0.5, nan, nan],
        note=["a", "b", "c", "d", "e", "f"],
    )
    file = write_completions(tmp_path / "completions_00005.parquet", data)
    rows, _ = imported(
        "trl", file, checkpoint=make_checkpoint(tmp_path), output=tmp_path / "U.jsonl",
        max_completion_length=3,
    )  # fmt: skip
    assert [row["reward"] for row in rows] == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert [row["note"] for row in rows] == data["note"]
    assert rows[3]["form"] == 0.5
    assert "form" not in rows[1]


def test_a_column_that_is_no_reward_is_found_out_by_the_advantages(
    tmp_path: Path,
) -> None:
    """The trainer's user may log numbers of any kind beside the rewards."""
    data = columns(difficulty=[1.0, 3.0, 2.0, 4.0, 5.0, 6.0])
    file = write_completions(tmp_path / "completions_00005.parquet", data)
    options: dict[str, Any] = {
        "checkpoint": make_checkpoint(tmp_path),
        "output": tmp_path / "U.jsonl",
        "max_completion_length": 3,
    }
    result = run_import("trl", file, **options)
    assert result.exit_code == 2
    assert "--reward" in result.stderr
    rows, _ = imported("trl", file, reward="right", **options)
    assert [row["reward"] for row in rows] == columns()["right"]
    assert [row["difficulty"] for row in rows] == data["difficulty"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantage": None}, "the column `advantage`"),
        ({"right": None}, "a reward column"),
        ({"completion": [None, *"defgh"]}, "row 1: expected the key `completion`"),
        ({"advantage": [0.5, -0.5, -0.5, 0.5, 0.0, float("nan")]}, "row 6"),
        (
            {
                "completion": [
                    [{"role": "assistant", "content": "a", "tool_calls": "t"}]
                ]
                * 6
            },
            "tool calls",
        ),
        (
            {"completion": [[{"role": "assistant", "content": "a"}] * 2] * 6},
            "2, the first",
        ),
    ],
)
def test_a_wrong_file_is_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """File, row and column; nothing is written."""
    data = {k: v for k, v in (columns() | change).items() if v is not None}
    file = write_completions(tmp_path / "completions_00005.parquet", data)
    output = tmp_path / "U.jsonl"
    result = run_import(
        "trl", file, checkpoint=make_checkpoint(tmp_path), output=output,
        max_completion_length=3,
    )  # fmt: skip
    assert result.exit_code == 2
    assert str(file) in result.stderr
    assert message in result.stderr
    assert not output.exists()


def test_what_is_no_parquet_is_refused(tmp_path: Path) -> None:
    """A file of another kind, and one that is not there."""
    path = tmp_path / "completions_00005.parquet"
    for _ in range(2):
        result = run_import(
            "trl",
            path,
            checkpoint=make_checkpoint(tmp_path),
            output=tmp_path / "U.jsonl",
        )
        assert result.exit_code == 2
        assert "a parquet file" in result.stderr
        path.write_text("not parquet")


@pytest.mark.parametrize(
    ("length", "share", "is_told"), [(2, 0, False), (2.5, 0, True), (2, 0.5, True)]
)
def test_the_trainers_log_is_held_against_the_rows(
    tmp_path: Path, length: float, share: float, is_told: bool
) -> None:
    """Every response has a token and the end token, and none was truncated."""
    checkpoint, folder = make_checkpoint(tmp_path), tmp_path / "completions"
    folder.mkdir()
    state = {
        "log_history": [
            {"step": 4, "loss": 0.0},
            {
                "step": 5,
                "completions/mean_length": length,
                "completions/clipped_ratio": share,
            },
        ]
    }
    later = tmp_path / "checkpoint-10"
    later.mkdir()
    (later / "trainer_state.json").write_text(json.dumps(state))
    file = write_completions(folder / "completions_00005.parquet", columns())
    rows, summary = imported(
        "trl", file, checkpoint=checkpoint, output=tmp_path / "U.jsonl",
        max_completion_length=30,
    )  # fmt: skip
    assert any("TRL logged" in note for note in summary["notes"]) == is_told
    marks = ["end restored", *(["log differs"] if is_told else [])]
    assert [row["ids_from_text"] for row in rows] == [marks] * len(rows)
    assert summary["responses_in_doubt"] == len(rows) * is_told
