"""What the callback says of a step: against identities, formulas and the trainer itself."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import live_training
import pytest
import torch
from live_training import (
    PROBE,
    PROMPTS,
    Records,
    ledger_of,
    make_trainer,
    steps_of,
    tiny_policy,
    train,
)
from torch import Tensor

from entropy_ddp.data.jsonlines import read_rows
from entropy_ddp.errors import InputError, RunError
from entropy_ddp.ledger.lines import append_line, read_ledger
from entropy_ddp.training import EntropyProbeCallback, RolloutRecorder, callback
from entropy_ddp.training.capture import TrainedBatch

pytest.importorskip("trl")

LORA: dict[str, Any] = {"lora": {}}
# Losses, clipping, terms beside the policy gradient, accumulation.
LOSSES: dict[str, dict[str, Any]] = {
    "clipped norm, accumulation": {
        **LORA,
        "max_grad_norm": 0.02,
        "gradient_accumulation_steps": 2,
    },
    "KL, clipped ratio": {
        **LORA,
        "beta": 0.04,
        "loss_type": "grpo",
        "num_iterations": 2,
        "epsilon": 0.001,
    },
    "entropy bonus": {**LORA, "loss_type": "dapo", "entropy_coef": 0.01},
    "cispo, sequences": {
        **LORA,
        "loss_type": "cispo",
        "epsilon_high": 5.0,
        "importance_sampling_level": "sequence",
    },
    "all weights, checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("case", LOSSES)
def test_shares_of_tokens_make_the_gradient_s_part(case: str, tmp_path: Path) -> None:
    """The exact weights of the loss, the batch and the clip coefficient are right."""
    train(tmp_path, probe={"truth": False}, max_steps=3, **LOSSES[case])
    entries = steps_of(tmp_path)
    assert len(entries) == 3
    for entry in entries:
        checks = entry["checks"]
        assert checks["identity_gap"] < 1e-5
        assert checks["step_gap"] < 1e-5
        assert checks["duality_gap"] < 1e-4
        assert checks["logp_gap"] < 1e-3
        assert sum(entry["parts"].values()) == pytest.approx(
            entry["first_order"]["value"], abs=2e-5 * max_part(entry)
        )
        assert sum(entry["tokens"].values()) == pytest.approx(
            entry["parts"]["gradient"], rel=1e-9
        )
    # In the first step every element of Adam's is of the same size: rounding is not.
    assert entries[-1]["checks"]["identity"] == pytest.approx(1, abs=1e-4)
    if "clipped norm" in case:
        assert all(entry["clip_coefficient"] < 0.9 for entry in entries)


def max_part(entry: Mapping[str, Any]) -> float:
    return max(map(abs, (*entry["parts"].values(), *entry["tokens"].values())))


ADAPTERS: dict[str, Any] = {
    "all weights": None,
    "LoRA with a task type": {},
    "LoRA without a task type": {"task_type": None},
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_model_is_seen_where_it_is_called(
    adapter: str, checkpointing: bool, tmp_path: Path, batches: list[TrainedBatch]
) -> None:
    """Whichever of its layers PEFT calls; and the recorder has seen the same."""
    trainer = make_trainer(
        tmp_path / "trainer",
        lora=ADAPTERS[adapter],
        gradient_checkpointing=checkpointing,
    )
    EntropyProbeCallback(out=tmp_path, **PROBE, truth=False).attach(trainer)
    recorder = RolloutRecorder(out=tmp_path / "rollouts")
    recorder.attach(trainer)
    trainer.train()
    assert trainer.model.is_gradient_checkpointing == checkpointing
    for entry, trained in zip(steps_of(tmp_path), batches, strict=True):
        checks = entry["checks"]
        assert checks["identity_gap"] < 1e-5
        assert checks["step_gap"] < 1e-5
        assert checks["logp_gap"] < 1e-3
        rows = [*read_rows(recorder.file(entry["step"]))]
        names = ("prompt_ids", "response_ids", "advantage", "sampling_logprobs")
        recorded = sorted([row[name] for name in names] for row in rows)
        seen = sorted(
            [r.prompt_ids, r.response_ids, r.advantage, r.logp] for r in trained.rows
        )
        assert recorded == seen


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[TrainedBatch]:
    """The batches that the callback was given, to be filled by a training."""
    seen: list[TrainedBatch] = []
    original = callback.probe_before

    def spy(session: Any, *, trained: TrainedBatch, **given: Any) -> Any:
        seen.append(trained)
        return original(session, trained=trained, **given)

    monkeypatch.setattr(callback, "probe_before", spy)
    return seen


def test_weights_are_those_of_the_loss_s_formula(
    tmp_path: Path, batches: list[TrainedBatch]
) -> None:
    """dr_grpo on policy: dL / d log p = -A / (N L)."""
    train(tmp_path, probe={}, lora={}, max_steps=1, gradient_accumulation_steps=2)
    (trained,) = batches
    assert len(trained.rows) == 16
    for row in trained.rows:
        assert 0 < len(row.response_ids) <= 6
        expected = [-row.advantage / (16 * 6)] * len(row.response_ids)
        assert row.on_logp == pytest.approx(expected, rel=1e-5)
        assert row.on_entropy == [0.0] * len(row.response_ids)
    assert {math.copysign(1, row.advantage) for row in trained.rows} == {-1, 1}


def test_two_draws_of_one_prompt_are_two_groups(
    tmp_path: Path, batches: list[TrainedBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a step of two batches mixes them; and in the ledger they are one prompt."""
    monkeypatch.setattr(live_training, "PROMPTS", PROMPTS[:1] * len(PROMPTS))
    settings = {"gradient_accumulation_steps": 2, "steps_per_generation": 2}
    train(tmp_path, probe={"truth": False}, lora={}, **settings)
    for entry, trained in zip(steps_of(tmp_path), batches, strict=True):
        assert trained.batch.group_sizes.tolist() == [4, 4, 4, 4]
        for group in range(4):
            members = trained.batch.groups == group
            # Of a group, and of no other set of rows, the advantages sum to 0.
            total = sum(r.advantage for r, m in zip(trained.rows, members) if m)
            assert abs(total) < 1e-6
        assert entry["U"]["num_groups"] == 4
        (prompt,) = entry["by_prompt"]
        assert prompt["num_tokens"] == entry["U"]["num_tokens"]


def test_dropout_is_warned_about_and_unattributed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The step is the trainer's all the same: its parts are exact."""
    train(tmp_path, probe={}, lora={"lora_dropout": 0.5}, max_steps=2)
    entries = steps_of(tmp_path)
    assert all(entry["checks"]["identity_gap"] > 1e-3 for entry in entries)
    assert all(entry["checks"]["step_gap"] < 1e-5 for entry in entries)
    for entry in entries:
        assert sum(entry["parts"].values()) == pytest.approx(
            entry["first_order"]["value"], rel=1e-3
        )
    assert caplog.text.count("the gradient's part is") == 1
    assert "dropout" in caplog.text


def test_a_token_whose_weight_is_wrong_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Planted: the weights of one sequence are shifted by a token."""
    original = TrainedBatch.token_values

    def shifted(self: TrainedBatch, shard: Any, name: str) -> Tensor:
        values = original(self, shard, name)
        if name == "on_logp":
            values[:4] = values[1:5].clone()
            values[:4] *= -1
        return values

    monkeypatch.setattr(TrainedBatch, "token_values", shifted)
    train(tmp_path, probe={}, lora={}, max_steps=1)
    assert steps_of(tmp_path)[0]["checks"]["identity_gap"] > 1e-4
    assert "the gradient's part is" in caplog.text


def test_a_sampled_padding_token_is_attributed_as_the_trainer_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row has no gradient by the lookup; counting one is a planted fault."""
    train(tmp_path / "right", probe={"truth": False}, max_steps=2)
    monkeypatch.setattr(callback, "padding_rows", lambda model: {})
    train(tmp_path / "wrong", probe={"truth": False}, max_steps=2)
    gaps = [
        max(entry["checks"]["identity_gap"] for entry in steps_of(tmp_path / name))
        for name in ("right", "wrong")
    ]
    assert gaps[0] < 1e-6
    assert gaps[1] > 1e-5


def test_second_order_is_nearer_to_the_truth_than_the_first(tmp_path: Path) -> None:
    """At a large step, on the same responses."""
    train(tmp_path, probe={}, lora={}, learning_rate=0.03, max_steps=2)
    for entry in steps_of(tmp_path):
        first = abs(entry["truth_minus_first"]["value"])
        second = abs(entry["truth_minus_second"]["value"])
        assert second < first / 3
        bend, error = (entry["second_minus_first"][name] for name in ("value", "se"))
        one, other = entry["second_order"], entry["first_order"]
        assert bend == pytest.approx(one["value"] - other["value"])
        # Two numbers of the same responses.
        assert 0 < error < math.hypot(one["se"], other["se"])


def test_every_nth_step_has_a_line_and_the_reporters_see_it(tmp_path: Path) -> None:
    """In the log of that step; the trainer's own history does not change."""
    records = Records()
    trainer = make_trainer(
        tmp_path / "trainer", lora={}, max_steps=5, callbacks=[records]
    )
    EntropyProbeCallback(out=tmp_path, **PROBE | {"every": 2}).attach(trainer)
    trainer.train()
    lines = ledger_of(tmp_path)
    assert [(x["kind"], x.get("step")) for x in lines] == [
        ("run", None), ("step", 2), ("step", 4), ("end", 5),
    ]  # fmt: skip
    seen = [logs for logs in records.seen if "loss" in logs]
    assert ["entropy_ddp/truth" in logs for logs in seen] == [
        False, True, False, True, False,
    ]  # fmt: skip
    for logs, line in zip(seen[1::2], lines[1:3]):
        assert logs["entropy_ddp/first_order"] == line["first_order"]["value"]
        assert logs["entropy_ddp/truth_se"] == line["truth"]["se"]
        assert logs["entropy_ddp/tokens_negative"] == line["tokens"]["negative"]
        assert all(isinstance(value, (int, float)) for value in logs.values())
    assert "entropy_ddp" not in json.dumps(trainer.state.log_history)


def test_weights_and_biases_gets_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the most influential tokens, in their context."""
    logged: list[Any] = []

    class Table:
        def __init__(self, columns: list[str]) -> None:
            self.columns, self.rows = columns, []  # type: ignore[var-annotated]

        def add_data(self, *values: Any) -> None:
            self.rows.append(values)

    fake = SimpleNamespace(
        run=object(), Table=Table, log=lambda values, commit: logged.append(values)
    )
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    train(tmp_path, probe={"top": 3, "truth": False}, lora={}, max_steps=1)
    (values,) = logged
    table = values["entropy_ddp/top_tokens"]
    top = steps_of(tmp_path)[0]["top_tokens"]
    assert [row[0] for row in table.rows] == [token["share"] for token in top]
    assert all(len(row) == len(table.columns) == 6 for row in table.rows)


def test_a_learning_rate_of_zero_changes_nothing(tmp_path: Path) -> None:
    """The first step of a warm-up has a line too."""
    train(tmp_path, probe={}, lora={}, warmup_steps=2, max_steps=1)
    (entry,) = steps_of(tmp_path)
    assert entry["learning_rate"] == 0
    assert entry["first_order"]["value"] == 0
    assert abs(entry["truth"]["value"]) < 1e-7
    assert entry["parts"] == {"momentum": 0, "decay": 0, "gradient": 0}


def test_a_ledger_is_not_written_over(tmp_path: Path) -> None:
    """By a training from its first step."""
    (tmp_path / "ledger.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="expected no ledger"):
        train(tmp_path, probe={}, lora={}, max_steps=1)


def test_a_callback_needs_its_trainer(tmp_path: Path) -> None:
    """Given in `callbacks`, it cannot come before the reporters."""
    probe = EntropyProbeCallback(out=tmp_path)
    trainer = make_trainer(tmp_path / "trainer", callbacks=[probe])
    with pytest.raises(InputError, match=r"callback\.attach\(trainer\)"):
        trainer.train()


def test_a_line_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """A number that is not finite is an error and leaves the file as it was."""
    whole = {"kind": "end", "step": 1, "entropy": {"value": 1.0}}
    append_line(tmp_path, whole)
    with pytest.raises(RunError, match=r"ledger\.jsonl: step 2"):
        append_line(tmp_path, whole | {"step": 2, "entropy": {"value": math.nan}})
    assert (tmp_path / "ledger.jsonl").read_text() == json.dumps(whole) + "\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"every": 0}, "every: expected a whole number of at least 1, found 0"),
     ({"num_prompts": 1}, "num_prompts: expected .* at least 2")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    """When the callback is made."""
    with pytest.raises(InputError, match=message):
        EntropyProbeCallback(out="x", **settings)


def supervised(folder: Path, **settings: Any) -> Any:
    """Transformers' own trainer with cross-entropy, on worked examples."""
    from transformers import Trainer, TrainingArguments

    model, tokenizer = tiny_policy()
    prompts = ["1+2=", "3+4=", "2+2=", "4+1="]
    texts = [f"{prompt}{number}3" for number, prompt in enumerate(prompts)]
    ids = tokenizer(texts, return_tensors="pt").input_ids
    labels = ids.clone()
    labels[:, :4] = -100
    rows = [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": l}
        for i, l in zip(ids, labels)
    ]
    arguments = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "use_cpu": True, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
        "learning_rate": 1e-3, "max_grad_norm": 0.5,
    }  # fmt: skip
    return Trainer(
        model=model,
        processing_class=tokenizer,
        args=TrainingArguments(**arguments | settings),
        train_dataset=rows,
    )


SUPERVISED = PROBE | {"max_new_tokens": 4, "prompts": ["1+2=", "3+4="]}


def test_a_plain_trainer_is_read_by_its_logits(tmp_path: Path) -> None:
    """Cross-entropy: every label weighs -1 / the number of labels."""
    trainer = supervised(tmp_path / "trainer")
    EntropyProbeCallback(out=tmp_path, **SUPERVISED).attach(trainer)
    trainer.train()
    entries = steps_of(tmp_path)
    assert len(entries) == 3
    for entry in entries:
        assert entry["clip_coefficient"] < 0.9
        assert entry["checks"]["identity_gap"] < 1e-5
        assert entry["U"] == {"num_groups": 4, "num_sequences": 4, "num_tokens": 8}
        assert entry["tokens"]["positive"] == pytest.approx(
            entry["parts"]["gradient"], rel=1e-2
        )


def test_trl_s_supervised_trainer_is_read_by_its_log_probabilities(
    tmp_path: Path,
) -> None:
    """Its fused head returns no logits."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = tiny_policy()
    rows = [{"prompt": f"{a}+2=", "completion": "12"} for a in range(1, 9)]
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        args=SFTConfig(
            output_dir=str(tmp_path / "trainer"),
            max_steps=2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_grad_norm=0.5,
            learning_rate=1e-3,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
    )
    EntropyProbeCallback(out=tmp_path, **SUPERVISED).attach(trainer)
    trainer.train()
    for entry in steps_of(tmp_path):
        assert entry["clip_coefficient"] < 0.9
        assert entry["checks"]["identity_gap"] < 1e-5
        # Two digits and the end of the sequence.
        assert entry["U"] == {"num_groups": 8, "num_sequences": 8, "num_tokens": 24}


def test_prompts_are_asked_for_where_there_are_none(tmp_path: Path) -> None:
    """A training set without a column of that name."""
    trainer = supervised(tmp_path / "trainer")
    without = {k: v for k, v in SUPERVISED.items() if k != "prompts"}
    EntropyProbeCallback(out=tmp_path, **without).attach(trainer)
    with pytest.raises(InputError, match="give the callback `prompts`"):
        trainer.train()


def test_a_resumed_training_goes_on_with_its_ledger(tmp_path: Path) -> None:
    """From the checkpoint of step 2: step 3 is trained twice and counted once."""
    saving = {"lora": {}, "save_strategy": "steps", "save_steps": 2}
    whole = train(tmp_path, probe={}, max_steps=3, **saving)
    resumed = Records()
    trainer = make_trainer(
        tmp_path / "trainer", callbacks=[resumed], max_steps=3, **saving
    )
    EntropyProbeCallback(out=tmp_path, **PROBE).attach(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-2"))
    assert resumed.steps[-1]["weights"] == whole.steps[-1]["weights"]
    lines = ledger_of(tmp_path)
    assert [x.get("step", x["kind"]) for x in lines] == ["run", 1, 2, 3, 3, "run", 3, 3]
    log = read_ledger(tmp_path)
    assert [entry["step"] for entry in log.entries] == [1, 2, 3]
    assert log.notes == [
        "restarted at step 3: 1 lines of steps that were taken back are left out"
    ]
    # The same weights and streams: the same responses.
    assert lines[3]["truth"]["value"] == pytest.approx(lines[6]["truth"]["value"])


def test_mixed_precision_is_measured_in_the_weights_precision(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The trainer's gradient is of bfloat16 activations: said, and unattributed."""
    plain = train(tmp_path / "plain", lora={}, bf16=True)
    probed = train(tmp_path / "probed", probe={}, lora={}, bf16=True)
    assert plain.steps == probed.steps and plain.logs == probed.logs
    for entry in steps_of(tmp_path / "probed"):
        assert entry["checks"]["duality_gap"] < 1e-4
        assert entry["checks"]["step_gap"] < 1e-5
        assert 1e-5 < entry["checks"]["identity_gap"] < 0.1
    assert "mixed precision" in caplog.text


def test_a_loss_that_is_not_of_the_labels_is_refused(tmp_path: Path) -> None:
    """Label smoothing moves every logit."""
    trainer = supervised(tmp_path / "trainer", label_smoothing_factor=0.2)
    EntropyProbeCallback(out=tmp_path, **SUPERVISED).attach(trainer)
    with pytest.raises(InputError, match="label smoothing"):
        trainer.train()
