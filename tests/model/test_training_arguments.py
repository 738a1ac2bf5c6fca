"""Settings from training_args.bin: what is read, that nothing runs, who wins."""

import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TinyRun, make_run

from entropy_ddp.checkpoint.trainer_files import (
    ARGUMENTS_FILE,
    SHOWN,
    read_training_arguments,
)
from entropy_ddp.checkpoint.trainer_settings import (
    contradictions,
    with_training_arguments,
)
from entropy_ddp.config import Config
from entropy_ddp.distributed import World
from entropy_ddp.errors import InputError
from entropy_ddp.probe.check import inspect_run


class Settings:
    """Stands for a trainer's configuration object."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


TRAINED: dict[str, Any] = {
    "loss_type": "dr_grpo",
    "max_completion_length": 7,
    "epsilon": 0.1,
    "epsilon_high": None,
    "max_grad_norm": 0.25,
    "scale_rewards": "group",
    "temperature": 0.75,
    "beta": 0.0,
}


def save_settings(folder: Path, **values: Any) -> Path:
    """A training_args.bin as torch writes it."""
    path = folder / ARGUMENTS_FILE
    torch.save(Settings(**(TRAINED | values)), path)
    return path


def save_pickle(path: Path, document: Any) -> Path:
    """An archive laid out as torch's, with any pickle in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("training_args/data.pkl", pickle.dumps(document))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A tiny checkpoint with batches, without training_args.bin."""
    return make_run(tmp_path_factory.mktemp("run"), "qwen2")


@pytest.fixture
def checkpoint(run: TinyRun) -> Any:
    """Its folder, from which a training_args.bin is removed afterwards."""
    yield run.saved.folder
    (run.saved.folder / ARGUMENTS_FILE).unlink(missing_ok=True)


# What is read


def test_trl_settings_are_read_as_trl_holds_them(tmp_path: Path) -> None:
    """Enumerations, devices and nested objects included or left out; none imported."""
    trl = pytest.importorskip("trl")
    config = trl.GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, temperature=0.9,
        loss_type="dapo", epsilon=0.1, epsilon_high=0.28, beta=0.04,
        reward_weights=[1.0, 0.5], lr_scheduler_type="cosine", num_generations=4,
        per_device_train_batch_size=8, gradient_accumulation_steps=2,
    )  # fmt: skip
    path = tmp_path / ARGUMENTS_FILE
    torch.save(config, path)
    arguments = read_training_arguments(path)
    assert arguments.kind.endswith("GRPOConfig")
    names = [name for subject in SHOWN.values() for name in subject]
    for name in [*names, "reward_weights"]:
        value = getattr(config, name)
        expected = str(value.value) if hasattr(value, "value") else value
        assert arguments.values[name] == expected, name


@pytest.mark.parametrize("wrapped", [False, True])
def test_nothing_in_the_pickle_runs(tmp_path: Path, wrapped: bool) -> None:
    """The same bytes create the file when they are unpickled for real."""
    created = tmp_path / "created"
    document = (
        Settings(temperature=0.5, trap=Bomb(created)) if wrapped else Bomb(created)
    )
    path = save_pickle(tmp_path / ARGUMENTS_FILE, document)
    if wrapped:
        assert read_training_arguments(path).values == {"temperature": 0.5}
    else:
        with pytest.raises(InputError, match="settings of a trainer"):
            read_training_arguments(path)
    assert not created.exists()
    with zipfile.ZipFile(path) as archive:
        pickle.loads(archive.read("training_args/data.pkl"))
    assert created.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not a zip archive", "file of torch.save"),
        (b"", "file of torch.save"),
    ],
)
def test_what_is_no_archive_is_refused(
    tmp_path: Path, data: bytes, message: str
) -> None:
    """With the path and the advice to copy it again."""
    path = tmp_path / ARGUMENTS_FILE
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_training_arguments(path)


def test_a_cut_pickle_is_refused(tmp_path: Path) -> None:
    """The archive is whole, the pickle inside is not."""
    path = tmp_path / ARGUMENTS_FILE
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("training_args/data.pkl", pickle.dumps([1, 2])[:-3])
    with pytest.raises(InputError, match="damaged pickle"):
        read_training_arguments(path)


def test_a_pickle_that_holds_itself_is_refused(tmp_path: Path) -> None:
    """Not followed for ever."""
    loop: list[Any] = []
    loop.append(loop)
    path = save_pickle(tmp_path / ARGUMENTS_FILE, Settings(trap=loop))
    with pytest.raises(InputError, match="maximum recursion depth"):
        read_training_arguments(path)


# Who wins


def resolved(run: TinyRun, **update: Any) -> Config:
    """The configuration with `from_checkpoint` applied."""
    update = {"from_checkpoint": True} | update
    return with_training_arguments(run.config(update=update))


def test_the_trainers_settings_are_used_where_none_are_given(
    run: TinyRun, checkpoint: Path
) -> None:
    """Each in its own key."""
    save_settings(checkpoint)
    config = resolved(run)
    assert config.update.loss == "dr_grpo"
    assert config.update.length_norm == 7
    assert (config.update.epsilon_low, config.update.epsilon_high) == (0.1, 0.1)
    assert config.update.max_grad_norm == 0.25
    assert config.batches.advantage == "standardized"
    assert config.objective.temperature == 0.75
    assert (
        contradictions(config, read_training_arguments(checkpoint / ARGUMENTS_FILE))
        == {}
    )


@pytest.mark.parametrize(
    ("values", "estimator"),
    [
        ({}, "k3"),  # from before the option
        ({"use_bias_correction_kl": False}, "k3"),
        ({"use_bias_correction_kl": True}, "k3_weighted"),
    ],
)
def test_the_kl_term_is_the_trainers(
    run: TinyRun, checkpoint: Path, values: dict[str, Any], estimator: str
) -> None:
    """Coefficient and estimator."""
    save_settings(checkpoint, beta=0.04, **values)
    update = resolved(run).update
    assert (update.kl_coefficient, update.kl_estimator) == (0.04, estimator)


def test_a_given_value_wins_and_the_audit_names_both(
    run: TinyRun, checkpoint: Path
) -> None:
    """Even where it is the default: giving it is what counts."""
    save_settings(checkpoint)
    update = {"from_checkpoint": True, "max_grad_norm": 1.0}
    probed = run.probe(update=update).results
    rows = {r.name: r for r in probed.audit if r.name.startswith("trainer's setting")}
    assert list(rows) == ["trainer's setting: update.max_grad_norm"]
    row = rows["trainer's setting: update.max_grad_norm"]
    assert (row.value, row.expected, row.verdict) == (1.0, "0.25", "warn")


def test_weights_of_an_inference_engine_are_named(
    run: TinyRun, checkpoint: Path
) -> None:
    """TRL's loss has a factor for every response that vLLM sampled; the step here none."""
    correction = "vllm_importance_sampling_correction"
    for used in (True, False):
        save_settings(checkpoint, use_vllm=used, **{correction: True})
        probed = run.probe(update={"from_checkpoint": True}).results
        found = [row for row in probed.audit if correction in row.name]
        assert [row.verdict for row in found] == ["warn"] * used


def test_without_from_checkpoint_nothing_is_taken_over_but_contradictions_show(
    run: TinyRun, checkpoint: Path
) -> None:
    """The step probed is not the trainer's, and the audit and `check` say so."""
    save_settings(checkpoint, loss_type="cispo", beta=0.04)
    config = run.config(update={"max_grad_norm": 0.25, "length_norm": 7})
    assert with_training_arguments(config) is config
    found = inspect_run(config, World(), lambda phase, done, total: None)
    assert found["configuration against trainer"] == {
        "batches.advantage": {"configured": "centered", "trained with": "standardized"},
        "objective.temperature": {"configured": 1.0, "trained with": 0.75},
        "update.loss": {"configured": "dr_grpo", "trained with": "cispo"},
        "update.kl_coefficient": {"configured": 0.0, "trained with": 0.04},
    }
    assert found["training arguments"]["loss"]["loss_type"] == "cispo"


def test_of_a_given_change_only_the_temperature_is_held_against_the_trainer(
    run: TinyRun, checkpoint: Path
) -> None:
    """There is no step here that could be another one than the trainer's."""
    save_settings(checkpoint, loss_type="cispo", beta=0.04)
    arguments = read_training_arguments(checkpoint / ARGUMENTS_FILE)
    batches = {"E": run.config().batches.model_dump()["E"]}
    found = {
        temperature: contradictions(
            run.config(
                batches=batches,
                update={"delta": "delta.safetensors"},
                objective={"temperature": temperature},
            ),
            arguments,
        )
        for temperature in (0.75, 1.0)
    }
    assert found[0.75] == {}
    assert found[1.0] == {"objective.temperature": (1.0, 0.75)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta": None}, "set update.kl_coefficient in the configuration"),
        ({"sync_ref_model": True}, "sync_ref_model False"),
        ({"loss_type": "cispo"}, "set update.loss in the configuration"),
        ({"scale_rewards": "batch"}, "set batches.advantage in the configuration"),
        ({"temperature": None}, "set objective.temperature in the configuration"),
        (
            {
                "loss_type": "dapo",
                "gradient_accumulation_steps": 2,
                "steps_per_generation": 4,
            },
            "expected steps_per_generation 2, .* found 4",
        ),
        ({"importance_sampling_level": "sequence"}, "found 'sequence'"),
    ],
)
def test_what_has_no_form_here_is_refused(
    run: TinyRun, checkpoint: Path, values: dict[str, Any], message: str
) -> None:
    """Rather than a step that is not the trainer's under the trainer's name."""
    save_settings(checkpoint, **values)
    with pytest.raises(InputError, match=message):
        resolved(run)


def test_a_step_of_all_that_was_sampled_is_divided_as_here(
    run: TinyRun, checkpoint: Path
) -> None:
    """And other losses than dapo do not ask."""
    save_settings(
        checkpoint,
        loss_type="dapo",
        gradient_accumulation_steps=2,
        steps_per_generation=2,
    )
    assert resolved(run).update.loss == "dapo"
    save_settings(checkpoint, gradient_accumulation_steps=2, steps_per_generation=4)
    assert resolved(run).update.average_over == "responses"


def test_what_a_mean_is_over_matters_where_groups_differ_in_size(
    run: TinyRun, checkpoint: Path
) -> None:
    """To TRL's dr_grpo all responses are alike."""
    save_settings(checkpoint)
    config = resolved(run, average_over="groups")
    arguments = read_training_arguments(checkpoint / ARGUMENTS_FILE)
    uneven = run.open().batches["U"]
    assert contradictions(config, arguments, uneven) == {
        "update.average_over": ("groups", "responses")
    }
    even = replace(uneven, sequences=uneven.sequences[:2])
    assert contradictions(config, arguments, even) == {}


def test_truncated_responses_that_the_trainer_masks(
    run: TinyRun, checkpoint: Path
) -> None:
    """They have no tokens in U; one that has is named."""
    save_settings(checkpoint, mask_truncated_completions=True)
    end = run.saved.model.config.eos_token_id
    ended = [
        replace(row, response_ids=[*row.response_ids[:-1], end], sampling_logprobs=None)
        for row in run.U
    ]
    ended[1] = replace(ended[1], response_ids=[])
    masked = replace(run, U=ended)
    update = {"from_checkpoint": True}
    assert masked.open(update=update).batches["U"].lengths[1] == 0
    ended[2] = replace(ended[2], response_ids=[end + 1] * 3)
    with pytest.raises(
        InputError, match="line 3: expected a response that ends or has"
    ):
        masked.open(update=update)
    assert len(masked.open().batches["U"]) == len(ended)
    sample = {"prompts": "prompts.jsonl", "num_prompts": 2, "max_new_tokens": 2}
    reward = {"reward": {"exact": "answer"}, "responses_per_prompt": 2}
    files = masked.config().batches.model_dump(exclude_none=True)
    batches = files | {"U": {"sample": sample | reward}}
    with pytest.raises(InputError, match="U: expected a file, found `sample`"):
        masked.open(update=update, batches=batches)


def test_a_setting_that_the_configuration_gives_need_not_be_in_the_file(
    run: TinyRun, checkpoint: Path
) -> None:
    """`scale_rewards: batch` has no key here; U may bring its advantages."""
    save_settings(checkpoint, loss_type="cispo")
    assert resolved(run, loss="grpo").update.loss == "grpo"


def test_a_folder_that_is_not_there_is_named_itself(tmp_path: Path) -> None:
    """Not the settings that would be in it."""
    update = {"from_checkpoint": True}
    document = {"checkpoint": {"path": str(tmp_path / "none")}, "update": update}
    batches = {split: {"file": f"{split}.jsonl"} for split in "EU"}
    config = Config.model_validate(document | {"batches": batches})
    with pytest.raises(InputError, match="none: expected a checkpoint folder, found"):
        with_training_arguments(config)


def test_from_checkpoint_needs_the_file(run: TinyRun) -> None:
    """No silent defaults."""
    with pytest.raises(InputError, match=r"training_args\.bin .*found none"):
        resolved(run)


def test_the_probe_takes_the_step_of_the_trainers_settings(
    run: TinyRun, checkpoint: Path
) -> None:
    """As if they had been written into the configuration by hand."""
    save_settings(checkpoint, loss_type="grpo", temperature=1.0)
    taken = run.probe(update={"from_checkpoint": True}).results
    configured = run.config(update={"loss": "grpo", "max_grad_norm": 0.25})
    batches = configured.batches.model_dump() | {"advantage": "standardized"}
    update = {"loss": "grpo", "max_grad_norm": 0.25}
    given = run.probe(update=update, batches=batches).results
    assert taken.truth.delta_h_true == given.truth.delta_h_true
    assert taken.update.loss == "grpo"


def test_a_file_that_cannot_be_read_stops_only_who_needs_it(
    run: TinyRun, checkpoint: Path
) -> None:
    """A probe that takes nothing from it says so and goes on."""
    (checkpoint / ARGUMENTS_FILE).write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"file of torch\.save"):
        resolved(run)
    rows = {row.name: row for row in run.probe().results.audit}
    assert rows["training arguments"].value == "not readable"
    found = inspect_run(run.config(), World(), lambda phase, done, total: None)
    assert "not readable" in found["training arguments"]
