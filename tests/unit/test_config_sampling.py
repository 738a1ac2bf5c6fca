"""Is the `sample` section read as written, and are its mistakes named?"""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from entropy_ddp.config import (
    Prompts,
    Reward,
    Sample,
    load_config,
    require_job,
    to_yaml,
    validated,
)
from entropy_ddp.errors import InputError

SIZES = {"num_prompts": 4, "max_new_tokens": 8}
DATASET = {"dataset": "a/b", "split": "train"}


def read(tmp_path: Path, **sample: Any) -> Sample:
    """The section of E."""
    document = {
        "checkpoint": {"path": "ck"},
        "batches": {"E": {"sample": SIZES | sample}, "U": {"file": "U.jsonl"}},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(document))
    config = load_config(path, ())
    path.write_text(to_yaml(config))
    assert load_config(path, ()) == config
    read_sample = config.batches.E.sample
    assert read_sample is not None
    return read_sample


def test_strings_stand_for_a_file_and_a_function(tmp_path: Path) -> None:
    """Both forms of a section come to the same, and can be written and read again."""
    short = read(tmp_path, prompts="p.jsonl", reward="m:f")
    assert short.prompts == Prompts(file="p.jsonl")
    assert short.reward == [Reward(function="m:f")]
    long = {"prompts": {"file": "p.jsonl"}, "reward": [{"function": "m:f"}]}
    assert read(tmp_path, **long) == short
    assert (
        read(tmp_path, prompts={"file": "p.jsonl"}, reward={"function": "m:f"}) == short
    )
    assert read(tmp_path, prompts="p.jsonl").reward is None


def test_terms_have_labels(tmp_path: Path) -> None:
    terms = [
        "m:f",
        {"math": "a"},
        {"exact": "a"},
        {"regex": "b"},
        {"regex": "c", "name": "n"},
    ]
    reward = read(tmp_path, prompts="p.jsonl", reward=terms).reward
    assert reward is not None
    assert [term.label for term in reward] == ["f", "math", "exact", "regex", "n"]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "batches.E.sample.prompts: expected a section of keys"),
        ({}, "batches.E.sample.prompts: give exactly one of `file` and `dataset`"),
        (DATASET | {"file": "a"}, "prompts: give exactly one of `file` and `dataset`"),
        ({"dataset": "a/b"}, "prompts: `dataset` needs a `split`"),
        (
            {"file": "a", "split": "b"},
            "`split` belongs to a `dataset`, not to a `file`",
        ),
        ({"file": "a", "name": "b"}, "`name` belongs to a `dataset`, not to a `file`"),
        (
            {"file": "a", "field": "b", "template": "c"},
            "`field` or `template`, not both",
        ),
        ({"file": "a", "system": "b"}, "prompts: `system` needs `chat: true`"),
        (
            {"file": "a", "templat": "b"},
            "`batches.E.sample.prompts.templat`; did you mean `template`?",
        ),
        (
            {"file": "a", "template": "{b"},
            "`template`: expected '}' before end of string; write {{",
        ),
        ({"file": "a", "template": "}"}, "`template`: Single '}' encountered"),
        ({"file": "a", "template": "{}"}, "placeholders like {question}, found {}"),
        (
            {"file": "a", "template": "{b:>3}"},
            "placeholders like {question}, found {b:>3}",
        ),
        (
            {"file": "a", "template": "{b!r}"},
            "placeholders like {question}, found {b!r}",
        ),
    ],
)
def test_mistakes_in_prompts_are_named(
    tmp_path: Path, prompts: Any, message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read(tmp_path, prompts=prompts)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ([], "batches.E.sample.reward: expected a length of at least 1"),
        (3, "batches.E.sample.reward: expected a section of keys"),
        ({}, "exactly one of `function`, `math`, `exact`, `regex`"),
        ({"math": "a", "regex": "b"}, "exactly one of `function`, `math`, `exact`"),
        ({"maths": "a"}, "`batches.E.sample.reward.maths`; did you mean `math`?"),
        (
            {"regex": "a", "gold_after": "#"},
            "`gold_after` belongs to `math` or `exact`",
        ),
        (
            {"function": "a:b", "answer_pattern": "(a)"},
            "`answer_pattern` belongs to `math`",
        ),
        ({"regex": "(a"}, "reward: `regex`: missing ), unterminated subpattern"),
        (
            {"math": "a", "answer_pattern": "b"},
            "`answer_pattern`: expected one group (...), found 0",
        ),
        (
            {"math": "a", "answer_pattern": "(b)(c)"},
            "expected one group (...), found 2",
        ),
        (
            {"math": "a", "weight": float("inf")},
            "reward.weight: expected a finite",
        ),
        (
            [{"regex": "a"}, {"regex": "b"}],
            "two terms are called 'regex'; give them a `name`",
        ),
    ],
)
def test_mistakes_in_rewards_are_named(
    tmp_path: Path, reward: Any, message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read(tmp_path, prompts="p.jsonl", reward=reward)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_prompts": 0}, "num_prompts: expected a value greater than 0, found 0"),
        ({"responses_per_prompt": 0}, "responses_per_prompt: expected a value greater"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a value greater than 0"),
        ({"sequences_per_call": -1}, "sequences_per_call: expected a value greater"),
        ({"redraw_zero_advantage": -1}, "redraw_zero_advantage: expected a value grea"),
        (
            {"redraw_zero_advantage": 1, "reward": "m:f", "responses_per_prompt": 2},
            "batches.E.sample.redraw_zero_advantage: E must be a plain sample",
        ),
        ({"redraw_zero_advantage": 1}, "expected a reward and .* found 0 rewards"),
        (
            {"redraw_zero_advantage": 1, "reward": "m:f"},
            "responses_per_prompt of at least 2, found 1 rewards and 1",
        ),
    ],
)
def test_mistakes_in_sizes_are_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, prompts="p.jsonl", **changes)


@pytest.mark.parametrize(
    ("command", "sections", "message"),
    [
        ("sample", {"batches": None}, "there is nothing to sample"),
        ("ledger", {"batches": None}, "a ledger needs fresh responses from every"),
        (
            "open",
            {"E": {"num_prompts": 1}},
            "E.sample.num_prompts: expected at least 2",
        ),
        (
            "attribute",
            {"linear": {"control_variates": True}},
            "linear.control_variates",
        ),
        (
            "attribute",
            {"update": {"delta": "d"}},
            "update.delta: attribution is of the",
        ),
        (
            "probe",
            {"linear": {"control_variates": True}, "attribution": {"enabled": True}},
            "linear.control_variates: attribution is of a slope without them",
        ),
        (
            "audit",
            {"gradient_dot": {"enabled": True}},
            "gradient_dot: needs at least 2 responses in every group of E, found batches",
        ),
        (
            "probe",
            {"gradient_dot": {"enabled": True}, "U": {"num_prompts": 1}},
            "gradient_dot: needs at least 2 groups in U, found 1; or set gradient_dot.e",
        ),
    ],
)
def test_what_a_job_needs_is_said_before_a_file_is_opened(
    command: str, sections: dict[str, Any], message: str
) -> None:
    """And the same configuration is one that other jobs can run."""
    sample = SIZES | {"prompts": "p.jsonl", "reward": "m:f"}
    batches = {s: {"sample": sample | sections.pop(s, {})} for s in ("E", "U")}
    if "update" in sections:
        del batches["U"]
    if "batches" in sections:
        batches = {"E": {"file": "E"}, "U": {"file": "U"}}
        del sections["batches"]
    document = {"checkpoint": {"path": "ck"}, "batches": batches} | sections
    config = validated(document, "run.yaml")
    with pytest.raises(InputError, match=message):
        require_job(config, command)
    require_job(config, {"sample": "sweep", "open": "sample"}.get(command, "sweep"))
