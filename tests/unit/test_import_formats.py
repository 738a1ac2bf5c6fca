"""Importers: what each trainer's dump becomes, and what is refused by name."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from dumps import (
    EOS,
    VOCABULARY,
    ids_of,
    imported,
    make_checkpoint,
    run_import,
    write_lines,
)

LENGTH = 6


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """checkpoint-4 without a chat template."""
    return make_checkpoint(tmp_path)


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """checkpoint-4 with a chat template."""
    return make_checkpoint(tmp_path / "chat", template=True)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where the rollout file goes."""
    return tmp_path / "U.jsonl"


# Text


def test_the_end_token_is_restored_unless_truncated(
    tmp_path: Path, checkpoint: Path, output: Path
) -> None:
    """At the maximum length the response was cut; one token less and it ended."""
    texts = ["", "cde", "cdefg", "cdefgh", "cdefghi"]
    rows = [{"prompt": "x", "response": t, "reward": 1} for t in texts]
    dump = write_lines(tmp_path / "t.jsonl", rows)
    got, summary = imported(
        "table",
        dump,
        checkpoint=checkpoint,
        output=output,
        max_completion_length=LENGTH,
    )
    ended = [True, True, True, False, False]
    assert [row["finished"] for row in got] == ended
    assert [row["response_ids"] for row in got] == [
        ids_of(text) + [EOS] * end for text, end in zip(texts, ended)
    ]
    assert summary["end_tokens_restored"] == 3
    assert summary["truncated_responses"] == 2
    assert any("more tokens than the maximum" in note for note in summary["notes"])


def test_any_of_several_adapters_tells_the_tokenizer(
    tmp_path: Path, checkpoint: Path, output: Path
) -> None:
    """A rollout file is of a tokenizer, not of an adapter."""
    (checkpoint / "ref").mkdir()
    config = (checkpoint / "adapter_config.json").read_text()
    (checkpoint / "ref" / "adapter_config.json").write_text(config)
    dump = write_lines(
        tmp_path / "t.jsonl", [{"prompt": "x", "response": "a", "reward": 1}]
    )
    (row,), _ = imported(
        "table", dump, checkpoint=checkpoint, output=output, max_completion_length=4
    )
    assert row["response_ids"] == [*ids_of("a"), EOS]


def test_text_without_a_maximum_length_is_refused(
    tmp_path: Path, checkpoint: Path, output: Path
) -> None:
    """Whether the end token is missing cannot be known."""
    dump = write_lines(
        tmp_path / "t.jsonl", [{"prompt": "x", "response": "a", "reward": 1}]
    )
    result = run_import("table", dump, checkpoint=checkpoint, output=output)
    assert result.exit_code == 2
    assert f"{dump}:1" in result.stderr
    assert "--max-completion-length" in result.stderr
    assert not output.exists()


def test_text_that_the_tokenizer_alters_is_counted(
    tmp_path: Path, checkpoint: Path, output: Path
) -> None:
    """`?` is not in the vocabulary: its token decodes to something else."""
    rows = [{"prompt": "x", "response": r, "reward": 0.5} for r in ("a?", "ab")]
    dump = write_lines(tmp_path / "t.jsonl", rows)
    _, summary = imported(
        "table",
        dump,
        checkpoint=checkpoint,
        output=output,
        max_completion_length=LENGTH,
    )
    assert summary["round_trip_altered_text"] == 1
    assert summary["round_trip_unknown_ids"] == 2
    assert summary["responses_in_doubt"] == 1


def test_rows_from_text_say_what_is_doubtful(
    tmp_path: Path, checkpoint: Path, output: Path
) -> None:
    """Ids that the dump has are in no doubt; nor is an end that the dump tells of."""
    cases: list[tuple[str, dict[str, Any], list[str]]] = [
        ("ab", {}, ["end restored"]),
        ("cdefg", {}, ["near the limit", "end restored"]),
        ("cdefg", {"finished": True}, ["end restored"]),
        ("cdefgh", {}, []),
        ("cdefghi", {}, ["too long"]),
        ("a?", {}, ["other text", "end restored"]),
    ]
    rows = [{"prompt": "x", "response": t, "reward": 1} | m for t, m, _ in cases]
    dump = write_lines(tmp_path / "t.jsonl", rows)
    options: dict[str, Any] = {"checkpoint": checkpoint, "output": output}
    got, summary = imported("table", dump, max_completion_length=LENGTH, **options)
    assert [row["ids_from_text"] for row in got] == [marks for *_, marks in cases]
    assert summary["responses_in_doubt"] == 3
    for line in ("1 responses got .* back .*\\(line 2\\)", ".*others \\(line 6\\)"):
        assert any(re.match(line, note) for note in summary["notes"])
    output.unlink()
    exact = write_lines(tmp_path / "rank_0.jsonl", [prime_row([9], [10, EOS])])
    (row,), _ = imported("prime-rl", exact, **options)
    assert "ids_from_text" not in row


# table


def test_csv_and_json_lines_give_the_same(
    tmp_path: Path, checkpoint: Path, output: Path
) -> None:
    """Other column names, quoted cells, scattered groups, carried columns."""
    csv = tmp_path / "t.csv"
    csv.write_text(
        "q,response,score,finished,tag\n"
        'x,"c\nd",1,true,one\n'
        "y,e,0,false,two\n"
        "x,,0.5,true,three\n"
    )
    lines = [
        {"q": "x", "response": "c\nd", "score": 1, "finished": True, "tag": "one"},
        {"q": "y", "response": "e", "score": 0, "finished": False, "tag": "two"},
        {"q": "x", "response": "", "score": 0.5, "finished": True, "tag": "three"},
    ]
    options = {"column": ["prompt=q", "reward=score"], "checkpoint": checkpoint}
    from_csv, _ = imported("table", csv, output=output, **options)
    from_lines, _ = imported(
        "table",
        write_lines(tmp_path / "t.jsonl", lines),
        output=tmp_path / "V.jsonl",
        **options,
    )
    assert from_csv == from_lines
    assert [row["group"] for row in from_csv] == [0, 1, 0]
    assert [row["reward"] for row in from_csv] == [1.0, 0.0, 0.5]
    assert [row["response_ids"] for row in from_csv] == [
        [*ids_of("c\nd"), EOS],
        ids_of("e"),
        [EOS],
    ]
    assert [row["tag"] for row in from_csv] == ["one", "two", "three"]


def write_messages(folder: Path) -> Path:
    """A table of one response whose prompt is a list of messages."""
    prompt = [{"role": "user", "content": "1+1="}]
    return write_lines(
        folder / "t.jsonl",
        [{"prompt": prompt, "response": "2", "reward": 1, "finished": True}],
    )


def test_messages_go_through_the_chat_template(
    tmp_path: Path, chat: Path, output: Path
) -> None:
    """With the generation prompt at the end."""
    dump = write_messages(tmp_path)
    rows, summary = imported("table", dump, checkpoint=chat, output=output)
    text = "<turn>user\n1+1=</turn>\n<turn>assistant\n"
    assert rows[0]["prompt_ids"] == ids_of(text)
    assert summary["prompts_through_chat_template"] == 1


def test_messages_without_a_template_are_refused(
    tmp_path: Path, checkpoint: Path, output: Path
) -> None:
    """They are not joined to some text."""
    dump = write_messages(tmp_path)
    result = run_import("table", dump, checkpoint=checkpoint, output=output)
    assert result.exit_code == 2
    assert "chat template" in result.stderr


# verl


def verl_row(prompt: str, response: str, **more: Any) -> dict[str, Any]:
    """A row of verl's rollout dump."""
    row = {"input": prompt, "output": response, "gts": "2", "score": 1.0, "step": 5}
    return row | more


def test_verl_rows_are_grouped_by_uid_not_by_position(
    tmp_path: Path, checkpoint: Path, output: Path
) -> None:
    """Two draws of one prompt are two groups; extras are carried."""
    rows = [
        verl_row("x", "a", uid="u1", acc=1),
        verl_row("y", "b", uid="u2", acc=0),
        verl_row("x", "c", uid="u3", acc=1),
        verl_row("x", "d", uid="u1", acc=0, score=0.25),
    ]
    dump = write_lines(tmp_path / "5.jsonl", rows)
    got, summary = imported(
        "verl", dump, checkpoint=checkpoint, output=output, max_completion_length=LENGTH
    )
    assert [row["group"] for row in got] == [0, 1, 2, 0]
    assert [row["reward"] for row in got] == [1.0, 1.0, 1.0, 0.25]
    assert [row["acc"] for row in got] == [1, 0, 1, 0]
    assert not any("advantage" in row for row in got)
    assert summary["notes"] == []


def test_verl_rows_without_uid_are_grouped_by_prompt(
    tmp_path: Path, checkpoint: Path, output: Path
) -> None:
    """Of one step: the same prompt of another step is another group."""
    first = write_lines(
        tmp_path / "5.jsonl",
        [verl_row("x", "a"), verl_row("y", "b"), verl_row("x", "c")],
    )
    second = write_lines(tmp_path / "6.jsonl", [verl_row("x", "d", step=6)])
    got, summary = imported(
        "verl", first, second, checkpoint=checkpoint, output=output,
        max_completion_length=LENGTH,
    )  # fmt: skip
    assert [row["group"] for row in got] == [0, 1, 0, 2]
    assert any("step 5, 6" in note for note in summary["notes"])
    assert any("groups have 1 to 2 responses" in note for note in summary["notes"])


def test_groups_of_another_size_than_the_command_says_are_refused(
    tmp_path: Path, checkpoint: Path, output: Path
) -> None:
    """The dump has no uid: a prompt that was drawn twice cannot be told."""
    rows = [verl_row(prompt, "a") for prompt in "xxyyxx"]
    dump = write_lines(tmp_path / "5.jsonl", rows)
    options: dict[str, Any] = {"max_completion_length": LENGTH, "num_generations": 2}
    result = run_import("verl", dump, checkpoint=checkpoint, output=output, **options)
    assert result.exit_code == 2
    assert "expected so many responses in every group, found 2 to 4" in result.stderr
    assert not output.exists()


def test_the_set_of_the_prompts_may_be_told(
    tmp_path: Path, checkpoint: Path, output: Path
) -> None:
    """To rows whose prompts were drawn without replacement from it, and no other."""
    table = write_lines(tmp_path / "E.jsonl", [verl_row(p, "a") for p in "xxyy"])
    options: dict[str, Any] = {
        "checkpoint": checkpoint,
        "max_completion_length": LENGTH,
    }
    got, _ = imported("verl", table, output=output, num_prompts_total=7, **options)
    draws = {(row["num_prompts_total"], row["with_replacement"]) for row in got}
    assert draws == {(7, False)}
    output.unlink()
    result = run_import("verl", table, output=output, num_prompts_total=1, **options)
    assert result.exit_code == 2
    assert (
        "--num-prompts-total 1: row: expected `num_prompts_total` of at least 2"
        in result.stderr
    )
    assert not output.exists()
    got, _ = imported("verl", table, output=output, **options)
    assert not any("with_replacement" in row for row in got)


def test_special_tokens_of_a_verl_prompt_are_restored(
    tmp_path: Path, chat: Path, output: Path
) -> None:
    """The dump has none; rendering the turns again gives the same text."""
    stripped = "system\nadd\nuser\n1+1=\nassistant\n"
    dump = write_lines(tmp_path / "5.jsonl", [verl_row(stripped, "2")])
    rows, _ = imported(
        "verl", dump, checkpoint=chat, output=output, max_completion_length=LENGTH
    )
    text = "<turn>system\nadd</turn>\n<turn>user\n1+1=</turn>\n<turn>assistant\n"
    assert rows[0]["prompt_ids"] == ids_of(text)


@pytest.mark.parametrize("prompt", ["1+1=", "user\n1+1=", "human\n1+1=\nassistant\n"])
def test_a_verl_prompt_that_cannot_be_restored_is_refused(
    tmp_path: Path, chat: Path, output: Path, prompt: str
) -> None:
    """The policy saw other tokens than this text has."""
    dump = write_lines(tmp_path / "5.jsonl", [verl_row(prompt, "2")])
    result = run_import(
        "verl", dump, checkpoint=chat, output=output, max_completion_length=LENGTH
    )
    assert result.exit_code == 2
    assert f"{dump}:1" in result.stderr
    assert "special tokens" in result.stderr


# Token ids


def prime_row(prompt: list[int], response: list[int], **more: Any) -> dict[str, Any]:
    """A row of prime-rl's token export."""
    ids = prompt + response
    row = {
        "schema_version": 1, "step": 5, "export_step": 5, "rank": 0, "run_id": None,
        "env_name": "sums", "token_ids": ids,
        "loss_mask": [False] * len(prompt) + [True] * len(response),
        "advantages": [0.5] * len(ids), "rewards": [1.0] * len(ids),
        "inference_logprobs": [0.0] * len(prompt) + [-0.5] * len(response),
    }  # fmt: skip
    return row | more


def test_prime_rl_ids_are_taken_over(
    tmp_path: Path, checkpoint: Path, output: Path
) -> None:
    """Groups over rank files by prompt tokens; the round trip is counted, not applied."""
    a, b = VOCABULARY["a"], VOCABULARY["b"]
    files = [
        write_lines(
            tmp_path / "step_5" / "rank_0.jsonl",
            [prime_row(ids_of("x"), [a, b, EOS]), prime_row(ids_of("y"), [a])],
        ),
        write_lines(
            tmp_path / "step_5" / "rank_1.jsonl", [prime_row(ids_of("x"), [b, EOS])]
        ),
    ]
    rows, summary = imported("prime-rl", *files, checkpoint=checkpoint, output=output)
    assert [row["group"] for row in rows] == [0, 1, 0]
    assert [row["response_ids"] for row in rows] == [[a, b, EOS], [a], [b, EOS]]
    assert [row["finished"] for row in rows] == [True, False, True]
    assert [row["sampling_logprobs"] for row in rows] == [[-0.5] * n for n in (3, 1, 2)]
    assert {(row["reward"], row["advantage"]) for row in rows} == {(1.0, 0.5)}
    assert summary["round_trip_known_ids"] == 3
    assert summary["round_trip_other_ids"] == 1
    assert any("1 of 3 responses" in note for note in summary["notes"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_mask": [False, True, False, True]}, "several turns"),
        ({"loss_mask": [False] * 4}, "no token in the loss"),
        ({"loss_mask": [True] * 4}, "no prompt"),
        ({"advantages": [0, 1, 1, 2]}, "differ by token"),
        ({"advantages": [0.5] * 3}, "4 entries in `advantages`"),
        ({"inference_logprobs": [0, -1, None, -1]}, "None at place 2"),
        ({"token_ids": [5, 6, 7, 4000]}, "4000"),
        ({"token_ids": None}, "token_ids"),
    ],
)
def test_a_wrong_prime_rl_row_is_named(
    tmp_path: Path, checkpoint: Path, output: Path, change: dict[str, Any], message: str
) -> None:
    """File, line and key; nothing is written."""
    row = prime_row(ids_of("x"), ids_of("cde")) | change
    dump = write_lines(tmp_path / "rank_0.jsonl", [row])
    result = run_import("prime-rl", dump, checkpoint=checkpoint, output=output)
    assert result.exit_code == 2
    assert f"{dump}:1" in result.stderr
    assert message in result.stderr
    assert not output.exists()


def nemo_row(
    prompt: list[int], response: list[int], after: int = 0, **more: Any
) -> Any:
    """A row of NeMo-RL's train data: batches of one, an answer after the response."""
    tail = ids_of(".") * after
    ids = prompt + response + tail + [0, 0]
    zeros = [0] * (len(tail) + 2)
    row = {
        "rewards": [1.0], "input_lengths": [len(ids) - 2], "token_ids": [ids],
        "token_loss_mask": [[0] * len(prompt) + [1] * len(response) + zeros],
        "sample_loss_mask": [1.0], "advantages": [[0.25] * len(ids)],
        "generation_logprobs": [[0] * len(prompt) + [-0.5] * len(response) + zeros],
        "idx": 0,
    }  # fmt: skip
    return row | more


def test_nemo_rl_rows_lose_what_is_not_in_the_loss(
    tmp_path: Path, checkpoint: Path, output: Path
) -> None:
    """Padding and the environment's answer go; so do masked samples."""
    rows = [
        nemo_row(ids_of("x"), [*ids_of("cd"), EOS], after=2),
        nemo_row(ids_of("x"), ids_of("e"), rewards=[0.0]),
        nemo_row(ids_of("x"), ids_of("f"), sample_loss_mask=[0.0]),
        nemo_row(ids_of("y"), ids_of("g"), filtered_rewards=[0.75]),
    ]
    dump = write_lines(tmp_path / "train_data_step5.jsonl", rows)
    got, summary = imported("nemo-rl", dump, checkpoint=checkpoint, output=output)
    assert [row["response_ids"] for row in got] == [
        [*ids_of("cd"), EOS],
        ids_of("e"),
        ids_of("g"),
    ]
    assert [row["group"] for row in got] == [0, 0, 1]
    assert [row["reward"] for row in got] == [1.0, 0.0, 0.75]
    assert [len(row["sampling_logprobs"]) for row in got] == [3, 1, 1]
    assert {row["advantage"] for row in got} == {0.25}
    assert summary["tokens_dropped_after_responses"] == 2
    assert summary["notes"] == []


def test_nemo_rl_without_token_ids_is_refused(
    tmp_path: Path, checkpoint: Path, output: Path
) -> None:
    """Older versions logged text only, prompt and response in one."""
    row = nemo_row(ids_of("x"), ids_of("c"))
    del row["token_ids"]
    dump = write_lines(tmp_path / "train_data_step5.jsonl", [row])
    result = run_import("nemo-rl", dump, checkpoint=checkpoint, output=output)
    assert result.exit_code == 2
    assert "token_ids" in result.stderr
    assert "older versions" in result.stderr


# What is refused, and where it is written


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("slime", "rollout.pt", "pickle"),
        ("openrlhf", "x.jsonl", "writes no training rollouts"),
        ("prime-rl", "rollout.pt", "pickle"),
        ("torchforge", "x.jsonl", "expected one of trl"),
    ],
)
def test_other_formats_are_refused_with_the_export_that_would_help(
    tmp_path: Path, checkpoint: Path, output: Path, kind: str, name: str, message: str
) -> None:
    """Nothing is opened."""
    result = run_import(kind, tmp_path / name, checkpoint=checkpoint, output=output)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "JSON lines" in result.stderr or "table" in result.stderr


def test_an_existing_file_is_kept_without_overwrite(
    tmp_path: Path, checkpoint: Path, output: Path
) -> None:
    """And replaced with it, whole."""
    rows = [{"prompt": "x", "response": "a", "reward": 1, "finished": True}]
    dump = write_lines(tmp_path / "t.jsonl", rows)
    output.write_text("mine")
    result = run_import("table", dump, checkpoint=checkpoint, output=output)
    assert result.exit_code == 2
    assert output.read_text() == "mine"
    imported("table", dump, checkpoint=checkpoint, output=output, overwrite=True)
    assert json.loads(output.read_text())["response"] == "a"


def test_a_group_of_two_prompts_is_refused(
    tmp_path: Path, checkpoint: Path, output: Path
) -> None:
    """The key does not say what it should."""
    rows = [
        {"prompt": p, "response": "a", "reward": 1, "finished": True, "group": "g"}
        for p in "xy"
    ]
    dump = write_lines(tmp_path / "t.jsonl", rows)
    result = run_import("table", dump, checkpoint=checkpoint, output=output)
    assert result.exit_code == 2
    assert f"{dump}:2" in result.stderr


@pytest.mark.parametrize("field", ["prompt", "response"])
def test_half_a_character_is_refused(
    tmp_path: Path, checkpoint: Path, output: Path, field: str
) -> None:
    """JSON can hold it, and no tokenizer can read it."""
    row = {"prompt": "x", "response": "a", "reward": 1, "finished": True}
    dump = write_lines(tmp_path / "t.jsonl", [row, row | {field: "\ud800"}])
    result = run_import("table", dump, checkpoint=checkpoint, output=output)
    assert result.exit_code == 2
    assert f"{dump}:2: expected `{field}` to be a string of valid" in result.stderr
