"""A run's configuration: what is accepted, what is refused, and in which words."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from entropy_ddp.config import Config, load_config, to_yaml
from entropy_ddp.errors import InputError

MINIMAL: dict[str, Any] = {
    "checkpoint": {"path": "checkpoint-3"},
    "batches": {"E": {"file": "E.jsonl"}, "U": {"file": "U.jsonl"}},
}
SAMPLE = {"prompts": "prompts.jsonl", "num_prompts": 4, "max_new_tokens": 8}


def loaded(tmp_path: Path, text: str = "", *assignments: str) -> Config:
    """The minimal configuration, with lines of YAML added and keys set."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + text)
    return load_config(path, assignments)


def test_a_minimal_file_has_the_documented_defaults(tmp_path: Path) -> None:
    """The defaults are those that the contract names."""
    config = loaded(tmp_path)
    assert config.batches.advantage == "centered"
    assert config.objective.integrand == "rb"
    assert config.objective.normalize == "per_token"
    assert config.objective.temperature == 1.0
    assert config.update.loss == "dr_grpo"
    assert config.update.length_norm == "group_max"
    assert config.update.ratio == "on_policy"
    assert config.update.lr_override is None
    assert (config.truth.is_mode, config.truth.control_variates) == ("auto", "auto")
    assert config.truth_estimator == ("per_decision", True)
    assert (config.truth.ess_warn, config.truth.ess_abort) == (0.5, 0.1)
    assert (config.linear.score, config.linear.baseline) == ("auto", "auto")
    assert config.slope_estimator == ("to_go", "action_value")
    assert config.curvature.method == "midpoint"
    assert config.precision.model == "float32"
    assert config.precision.buffer_dtype_name == "float32"


@pytest.mark.parametrize(
    ("model", "buffers", "expected"),
    [
        ("float32", None, "float32"),
        ("float64", None, "float64"),
        ("bfloat16", None, "float32"),
        ("float64", "float32", "float32"),
        ("float32", "float64", "float64"),
    ],
)
def test_buffers_follow_the_model_unless_told(
    tmp_path: Path, model: str, buffers: str | None, expected: str
) -> None:
    """Float32, float64 for a float64 model, or what is asked for."""
    assignments = [f"precision.model={model}"]
    if buffers is not None:
        assignments.append(f"precision.buffers={buffers}")
    config = loaded(tmp_path, "", *assignments)
    assert config.precision.buffer_dtype_name == expected


@pytest.mark.parametrize(
    "text", ["1e-3", "1.0e-3", "0.001", "1E-3", "+1e-3", ".1e-2", "1.e-3"]
)
def test_numbers_may_be_written_in_scientific_notation(
    tmp_path: Path, text: str
) -> None:
    """`1e-3` is a number, in the file as on the command line."""
    in_file = loaded(tmp_path, f"update: {{lr_override: {text}}}\n")
    on_line = loaded(tmp_path, "", f"update.lr_override={text}")
    assert in_file.update.lr_override == on_line.update.lr_override == 1e-3


def test_a_quoted_number_is_text_and_refused(tmp_path: Path) -> None:
    """What the author wrote as text is not turned into a number."""
    with pytest.raises(InputError, match=r"update\.lr_override: .*found '1e-3'"):
        loaded(tmp_path, "update: {lr_override: '1e-3'}\n")


def test_an_integer_is_accepted_for_a_float(tmp_path: Path) -> None:
    """`temperature: 1` means 1.0."""
    assert loaded(tmp_path, "objective: {temperature: 2}\n").objective.temperature == 2


def test_the_written_configuration_reads_back_the_same(tmp_path: Path) -> None:
    """config.yaml of a run directory is a configuration that repeats the run."""
    config = loaded(
        tmp_path,
        "update: {lr_override: 1e-7, length_norm: 512}\nseed: 3\n",
        "precision.model=float64",
        "batches.E={sample: {prompts: p.jsonl, num_prompts: 3, max_new_tokens: 5}}",
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path, ()) == config


def test_assignments_win_over_the_file_and_later_ones_over_earlier(
    tmp_path: Path,
) -> None:
    """Precedence: default, file, command line from left to right."""
    text = "update: {loss: grpo, max_grad_norm: 2.0}\n"
    config = loaded(tmp_path, text, "update.loss=dapo", "update.loss=nll", "seed=7")
    assert (config.update.loss, config.update.max_grad_norm) == ("nll", 2.0)
    assert config.seed == 7


def test_an_assignment_can_take_a_value_back_to_none(tmp_path: Path) -> None:
    """An explicit empty value overrides the file."""
    text = "update: {lr_override: 0.1}\n"
    assert loaded(tmp_path, text, "update.lr_override=null").update.lr_override is None
    assert loaded(tmp_path, text, "update.lr_override=").update.lr_override is None


def test_an_assignment_makes_the_sections_it_needs() -> None:
    """Everything can be given on the command line, without a file."""
    config = load_config(
        None,
        ("checkpoint.path=ck", "batches.E.file=E.jsonl", "batches.U.file=a=b.jsonl"),
    )
    assert config.checkpoint.path == "ck"
    assert config.batches.U.file == "a=b.jsonl"


def test_an_assignment_fills_a_section_that_is_empty_in_the_file(
    tmp_path: Path,
) -> None:
    """`update:` with nothing below it is a section, all of it commented out."""
    config = loaded(tmp_path, "update:\n", "update.loss=grpo")
    assert config.update.loss == "grpo"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", "--set seed: expected key.sub=value"),
        ("=3", "--set =3: expected key.sub=value"),
        ("seed.x.y=3", "`seed` is not a section"),
        ("update.loss=[grpo", "--set update.loss=[grpo: the value is not valid YAML"),
        ("seed=-1", "seed: expected a value greater than or equal to 0, found -1"),
    ],
)
def test_a_malformed_assignment_is_named(
    tmp_path: Path, assignment: str, message: str
) -> None:
    """The message repeats the assignment or the key."""
    with pytest.raises(InputError, match=re.escape(message)):
        loaded(tmp_path, "seed: 1\n", assignment)


UNKNOWN = [
    ("update.los=grpo", "unknown key `update.los`; did you mean `loss`?"),
    ("update.lr_overide=1.0", "did you mean `lr_override`?"),
    ("objectiv.temperature=1", "unknown key `objectiv`; did you mean `objective`?"),
    ("batches.E.flie=x.jsonl", "unknown key `batches.E.flie`; did you mean `file`?"),
    ("batches.X.file=x.jsonl", "unknown key `batches.X`; known: E, U, advantage"),
    ("checkpoint.model=x", "unknown key `checkpoint.model`; known: adapter, base,"),
]


@pytest.mark.parametrize(("assignment", "message"), UNKNOWN)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(
    tmp_path: Path, assignment: str, message: str
) -> None:
    """Unknown keys are errors; the nearest known key, or all of them, are named."""
    with pytest.raises(InputError, match=re.escape(message)):
        loaded(tmp_path, "", assignment)


def test_an_unknown_key_of_a_sample_section_is_named(tmp_path: Path) -> None:
    """The search for the nearest key follows optional sections."""
    sample = yaml.safe_dump(SAMPLE | {"num_prompt": 3}, default_flow_style=True)
    message = "unknown key `batches.E.sample.num_prompt`; did you mean `num_prompts`?"
    with pytest.raises(InputError, match=re.escape(message)):
        loaded(tmp_path, "", f"batches.E={{sample: {sample.strip()}}}")


BAD_VALUES = [
    ("seed=1.0", "seed: expected a valid integer, found 1.0"),
    ("seed=true", "seed: expected a valid integer, found True"),
    ("seed=three", "seed: expected a valid integer, found 'three'"),
    ("checkpoint.path=7", "checkpoint.path: expected a valid string, found 7"),
    ("checkpoint=ck", "checkpoint: expected a section of keys"),
    ("objective.integrand=h", "objective.integrand: expected 'rb' or"),
    ("objective.normalize=mean", "objective.normalize: expected 'per_token',"),
    ("objective.temperature=0", "objective.temperature: expected a value greater than"),
    ("objective.temperature=.inf", "objective.temperature: expected a finite"),
    ("objective.temperature=.nan", "objective.temperature: expected a finite"),
    ("objective.temperature=true", "objective.temperature: expected a valid"),
    ("update.loss=ppo", "update.loss: expected 'dr_grpo', 'grpo'"),
    ("update.length_norm=0", "`length_norm` must be `group_max` or a positive integer"),
    ("update.length_norm=longest", "update.length_norm"),
    ("update.length_norm=8.5", "update.length_norm"),
    ("update.ratio=off", "update.ratio: expected 'on_policy' or 'clipped'"),
    ("update.epsilon_low=1", "update.epsilon_low: expected a value less than 1"),
    ("update.epsilon_high=-0.1", "update.epsilon_high: expected a value greater than"),
    ("update.max_grad_norm=-1", "update.max_grad_norm: expected a value greater than"),
    ("update.max_grad_norm=.inf", "update.max_grad_norm: expected a finite"),
    ("update.lr_override=0", "update.lr_override: expected a value greater than 0"),
    ("update.lr_override=-1e-3", "update.lr_override: expected a value greater than 0"),
    ("update.lr_override=.nan", "update.lr_override: expected a finite number"),
    ("update.save_delta=yess", "update.save_delta: expected a valid boolean"),
    ("truth.is_mode=is", "truth.is_mode: expected 'snis', 'per_decision' or"),
    ("truth.clip_c=0", "truth.clip_c: expected a value greater than 0, found 0"),
    ("truth.ess_warn=1.5", "truth.ess_warn: expected a value less than or equal to 1"),
    ("truth.ess_abort=-0.1", "truth.ess_abort: expected a value greater than or equal"),
    ("truth.ess_abort=.nan", "truth.ess_abort"),
    ("linear.score=to-go", "linear.score: expected 'full' or 'to_go'"),
    ("precision.model=float16", "precision.model: expected 'float32',"),
    ("compute.device=gpu", "compute.device: expected 'auto', 'cpu' or 'cuda'"),
    ("compute.tokens_per_microbatch=0", "tokens_per_microbatch: expected"),
]


@pytest.mark.parametrize(("assignment", "message"), BAD_VALUES)
def test_a_value_of_the_wrong_type_or_range_is_refused(
    tmp_path: Path, assignment: str, message: str
) -> None:
    """The message has the key, what is allowed, and what was found."""
    with pytest.raises(InputError, match=re.escape(message)):
        loaded(tmp_path, "", assignment)


BAD_COMBINATIONS = [
    (["batches.E={}"], "batches.E: give exactly one of `file` and `sample`"),
    (
        ["batches.U.sample={prompts: p, num_prompts: 1, max_new_tokens: 1}"],
        "batches.U: give exactly one of `file` and `sample`",
    ),
    (["checkpoint={}"], "checkpoint: give `path`, or `base` and `adapter`"),
    (
        ["linear.baseline=hk", "linear.score=full"],
        "linear: a baseline needs `score: to_go`",
    ),
    (
        ["truth.is_mode=clip", "truth.control_variates=true"],
        "truth: `control_variates`: `clip` is the derivative of no slope",
    ),
    (
        ["batches.U.reweight=sampler"],
        "batches.U.reweight: the loss weighs U (update.ratio); it is for E only",
    ),
    (
        ["linear.score=to_go", "objective.normalize=per_sequence_token_mean"],
        "linear.score: `per_sequence_token_mean` has no to-go form; use `full`",
    ),
    (
        ["truth.is_mode=per_decision", "objective.integrand=surprisal"],
        "truth.is_mode: `per_decision` needs integrand `rb`",
    ),
    (
        ["truth.is_mode=per_decision", "objective.normalize=per_sequence_token_mean"],
        "truth.is_mode: `per_decision` has no `per_sequence_token_mean` form",
    ),
]


@pytest.mark.parametrize(("assignments", "message"), BAD_COMBINATIONS)
def test_values_that_contradict_each_other_are_refused(
    tmp_path: Path, assignments: list[str], message: str
) -> None:
    """The message says what goes with what."""
    with pytest.raises(InputError, match=re.escape(message)):
        loaded(tmp_path, "", *assignments)


def test_missing_sections_are_all_named(tmp_path: Path) -> None:
    """One message for everything that is wrong."""
    path = tmp_path / "run.yaml"
    path.write_text("update: {loss: ppo}\n")
    with pytest.raises(InputError) as caught:
        load_config(path, ())
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    for part in (
        "checkpoint: required, found none",
        "batches: required",
        "update.loss: ",
    ):
        assert part in text


@pytest.mark.parametrize("baseline", ["mean", "running", "None", "off"])
def test_an_unknown_baseline_is_not_treated_as_none(
    tmp_path: Path, baseline: str
) -> None:
    """A misspelt baseline is an error."""
    with pytest.raises(InputError, match=r"linear\.baseline: expected 'none'"):
        loaded(tmp_path, "", "linear.score=to_go", f"linear.baseline={baseline}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "expected a mapping of sections, found list"),
        (b"", "expected a mapping of sections, found nothing"),
        (b"update: {loss: [\n", "not valid YAML"),
        (b"update:\n\tloss: grpo\n", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"seed: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        (b"7: 8\n", "7"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    """Whatever the bytes, the message begins with the path; nothing is executed."""
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: .*{message}"):
        load_config(path, ())


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """The author cannot have meant both; YAML itself would keep the last."""
    text = "update: {loss: grpo}\nupdate: {max_grad_norm: 0}\n"
    with pytest.raises(InputError, match="update"):
        loaded(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """The path and the reason."""
    path = tmp_path / "absent.yaml"
    message = f"^{re.escape(str(path))}: cannot be read: No such file"
    with pytest.raises(InputError, match=message):
        load_config(path, ())


@pytest.mark.parametrize(
    ("assignments", "truth", "slope"),
    [
        (["truth.is_mode=snis"], ("snis", False), ("to_go", "action_value")),
        (["truth.is_mode=per_decision"], ("per_decision", False), None),
        (["truth.control_variates=false"], ("per_decision", False), None),
        (["linear.score=full"], ("per_decision", True), ("full", "none")),
        (["linear.baseline=hk"], None, ("to_go", "hk")),
        (["linear.baseline=none"], None, ("full", "none")),
        (["linear.score=to_go"], None, ("to_go", "none")),
        (
            ["objective.normalize=per_sequence_token_mean"],
            ("snis", False),
            ("full", "none"),
        ),
        (
            ["objective.integrand=surprisal"],
            ("snis", True),
            ("to_go", "action_value"),
        ),
    ],
)
def test_the_estimators_that_are_not_named_are_the_best_defined(
    tmp_path: Path,
    assignments: list[str],
    truth: tuple[str, bool] | None,
    slope: tuple[str, str] | None,
) -> None:
    """What is named means what it says, with nothing removed."""
    config = loaded(tmp_path, "", *assignments)
    assert truth in (None, config.truth_estimator)
    assert slope in (None, config.slope_estimator)
