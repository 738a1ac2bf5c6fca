"""Are prompts checked, made of rows as configured, and drawn as asked?"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_sampling import make_tokenizer

from entropy_ddp.config import Prompts
from entropy_ddp.data.rows import TokenLimits
from entropy_ddp.errors import InputError
from entropy_ddp.sampling.prompts import draw_prompts, encode_prompt, read_prompts

LIMITS = TokenLimits(vocabulary_size=11, max_positions=None)
TURNS = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}a{% endif %}{{ tail or '' }}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "prompts.jsonl"


def write_rows(path: Path, *rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_are_kept_as_they_are(path: Path) -> None:
    rows = [
        {"prompt": "a", "answer": "b"},
        {"prompt_ids": [1, 2], "level": 3},
        {"prompt": "c", "prompt_ids": [4]},
    ]
    write_rows(path, *rows)
    prompts = read_prompts(Prompts(file=str(path)))
    assert [prompt.row for prompt in prompts] == rows
    assert [prompt.content for prompt in prompts] == ["a", [1, 2], [4]]
    assert [prompt.carried for prompt in prompts] == [{"answer": "b"}, {"level": 3}, {}]
    assert prompts[2].where == f"{path}:3"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, "`prompt_ids` or `prompt`, found neither"),
        ({"prompt": None}, "`prompt_ids` or `prompt`, found neither"),
        ({"prompt": 1}, "`prompt` to be a string"),
        ({"prompt_ids": [True]}, "`prompt_ids` to be a list of integers"),
        ({"prompt": "a", "reward": 1}, "that sampling itself writes, found `reward`"),
        ({"prompt": "a", "prompt_index": 1}, "writes, found `prompt_index`; rename"),
        ({"prompt": "a", "reward_terms": 1}, "writes, found `reward_terms`; rename"),
        ({"prompt": [{"role": "user"}]}, "messages with `role` and `content` in `pr"),
        (
            {"prompt": ["a"]},
            "messages with `role` and `content` in `prompt`, found 'a'",
        ),
        ({"prompt": []}, "end before the assistant's turn in `prompt`, found none"),
        (
            {"prompt": [{"role": "assistant", "content": "a"}]},
            "found an assistant's message at the end",
        ),
        ([], r"a JSON object, found \[\]"),
    ],
)
def test_a_bad_row_is_named(path: Path, row: Any, message: str) -> None:
    write_rows(path, {"prompt": "good"}, row)
    where = "^" + re.escape(f"{path}:2: ")
    with pytest.raises(InputError, match=where + ".*" + message):
        read_prompts(Prompts(file=str(path)))


def read_one(path: Path, row: dict[str, Any], **settings: Any) -> Any:
    """What the prompt of one row consists of."""
    write_rows(path, row)
    return read_prompts(Prompts(file=str(path), **settings))[0]


def test_a_template_takes_the_row_s_values(path: Path) -> None:
    row = {"question": "2 {x}?", "level": 3, "share": 0.5}
    template = "{{Q}} {question} ({level}, {share})\n"
    prompt = read_one(path, row, template=template, keep=["level"])
    assert prompt.content == "{Q} 2 {x}? (3, 0.5)\n"
    assert prompt.carried == {"level": 3}
    assert prompt.row == row
    assert read_one(path, row, field="question").content == "2 {x}?"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"field": "text"}, "`text`, found none; the row has 'question', 'n', 'group'"),
        ({"field": "n"}, "a value of `n`, found none"),
        ({"template": "{text}"}, "a value of `text`, found none; .*prompts.template"),
        ({"template": "{n}"}, "a value of `n`, found none"),
        ({"template": "{tags}"}, "text or a number in `tags` for the template, found "),
        ({"field": "question"}, "`group`; rename or delete the key, or leave it out"),
        ({"field": "question", "keep": ["id"]}, "a value of `id`.*`prompts.keep`"),
    ],
)
def test_a_row_without_what_is_configured_is_named(
    path: Path, settings: dict[str, Any], message: str
) -> None:
    row = {"question": "a", "n": None, "group": 1, "tags": ["b"]}
    with pytest.raises(InputError, match=re.escape(f"{path}:1: ") + ".*" + message):
        read_one(path, row, **settings)


def test_messages_go_through_the_chat_template(path: Path) -> None:
    """As text, u and a are the user's and the assistant's turns, s the system's."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace(
        "m.role[0]", "{'user': 'g', 'system': 'f'}[m.role]"
    )

    def encode(row: dict[str, Any], **settings: Any) -> str:
        prompt = read_one(path, row, **settings)
        source = Prompts(file=str(path), **settings)
        ids = encode_prompt(prompt, source, LIMITS, tokenizer)
        return tokenizer.decode(ids)

    turns = [{"role": "user", "content": "bc"}]
    assert encode({"prompt": turns}) == "gbca"
    assert encode({"prompt": "bc"}) == "bc"
    assert encode({"prompt": "bc"}, chat=True) == "gbca"
    assert encode({"prompt": "bc"}, chat=True, system="d") == "fdgbca"
    assert encode({"prompt": turns}, chat=True, system="d") == "fdgbca"
    assert encode({"q": "b"}, template="{q}e", chat=True) == "gbea"
    tail = {"chat_template_kwargs": {"tail": "cc"}}
    assert encode({"prompt": turns}, **tail) == "gbcacc"


def test_messages_that_cannot_be_rendered_are_named(path: Path) -> None:
    tokenizer = make_tokenizer()
    prompt = read_one(path, {"prompt": "a"}, chat=True)
    source = Prompts(file=str(path), chat=True)
    with pytest.raises(
        InputError, match="a tokenizer with a chat template, .*found no"
    ):
        encode_prompt(prompt, source, LIMITS, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no user here') }}"
    with pytest.raises(InputError, match="jsonl:1: .*TemplateError: no user here"):
        encode_prompt(prompt, source, LIMITS, tokenizer)
    with pytest.raises(
        InputError, match="as `prompts.chat` is true, found `prompt_ids"
    ):
        read_one(path, {"prompt_ids": [4]}, chat=True)
    turns = [{"role": "system", "content": "b"}, {"role": "user", "content": "a"}]
    with pytest.raises(InputError, match="no system turn, as `prompts.system` gives"):
        read_one(path, {"prompt": turns}, chat=True, system="c")


def test_draws_without_replacement_are_distinct() -> None:
    drawn = draw_prompts(10, 10, False, seed=1)
    assert sorted(drawn) == list(range(10))
    assert drawn != list(range(10))
    assert len(set(draw_prompts(100, 30, False, seed=1))) == 30


def test_draws_with_replacement_are_uniform() -> None:
    drawn = draw_prompts(5, 10_000, True, seed=1)
    counts = [drawn.count(prompt) for prompt in range(5)]
    assert sum(counts) == 10_000
    # Chi-square with 4 degrees of freedom: above 18.5 once in 1,000 seeds.
    assert sum((count - 2000) ** 2 / 2000 for count in counts) < 18.5


@pytest.mark.parametrize("with_replacement", [False, True])
def test_draws_depend_on_the_seed_alone(with_replacement: bool) -> None:
    def draw(seed: int) -> list[int]:
        return draw_prompts(100, 20, with_replacement, seed)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_more_than_there_are_is_an_error_without_replacement() -> None:
    message = "num_prompts: expected at most 3.*found 4; draw fewer or set with_repl"
    with pytest.raises(InputError, match=message):
        draw_prompts(3, 4, False, seed=1)
    assert len(draw_prompts(3, 4, True, seed=1)) == 4
