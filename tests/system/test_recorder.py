"""Does a recorded batch hold what the trainer's loss was given, and nothing else?

What the loss is given is kept beside the recorder, at the class and not on the instance.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import live_training
import pytest
import torch
from live_training import PROBE, PROMPTS, Records, arbitrary_reward, make_trainer

from entropy_ddp.errors import InputError
from entropy_ddp.training import EntropyProbeCallback, RolloutRecorder

pytest.importorskip("trl")

STEPS = 3
CASES: dict[str, dict[str, Any]] = {
    "one batch a step": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "two passes over a batch": {"num_iterations": 2},
    "a batch for two steps": {
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 2,
    },
    "truncated ones masked": {"mask_truncated_completions": True},
    "one prompt drawn twice": {},
    "standardized, two rewards": {"scale_rewards": "group"},
}


def rows_of(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file) as stream:
        return [json.loads(line) for line in stream]


def short_reward(completions: list[str], **_: object) -> list[float | None]:
    """A reward that says nothing of some responses."""
    return [None if len(text) > 4 else len(text) / 4 for text in completions]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, list[Any]]]:
    """By step: (prompt, response, advantage, log p of the ratio) of the loss's rows."""
    from trl import GRPOTrainer

    found: dict[int, list[Any]] = {}
    compute_loss = GRPOTrainer._compute_loss

    def watched(self: Any, model: Any, inputs: dict[str, Any]) -> Any:
        rows = found.setdefault(self.state.global_step + 1, [])
        for row in range(len(inputs["advantages"])):
            prompt, response = (
                inputs[f"{part}_ids"][row][inputs[f"{part}_mask"][row] == 1].tolist()
                for part in ("prompt", "completion")
            )
            old = inputs.get("old_per_token_logps")
            values = None if old is None else old[row].tolist()[: len(response)]
            rows.append((prompt, response, float(inputs["advantages"][row]), values))
        return compute_loss(self, model, inputs)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", watched)
    yield found


@pytest.mark.parametrize("case", CASES)
def test_a_file_holds_the_rows_of_the_loss(
    case: str,
    tmp_path: Path,
    given: dict[int, list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ids, advantages, rewards, log-probabilities, ends, groups."""
    if case == "one prompt drawn twice":
        monkeypatch.setattr(live_training, "PROMPTS", PROMPTS[:1] * len(PROMPTS))
    trainer = make_trainer(tmp_path / "trainer", max_steps=STEPS, **CASES[case])
    if "two rewards" in case:
        trainer.reward_funcs.append(short_reward)
        trainer.reward_func_names.append("short_reward")
        trainer.reward_processing_classes.append(None)
        trainer.reward_weights = torch.tensor([1.0, 0.5])
    recorder = RolloutRecorder(out=tmp_path / "rollouts")
    recorder.attach(trainer)
    trainer.train()
    for step in range(1, STEPS + 1):
        rows = rows_of(recorder.file(step))
        own = [
            (r["prompt_ids"], r["response_ids"], r["advantage"], r["sampling_logprobs"])
            for r in rows
        ]
        expected = given[step]
        if expected[0][3] is None:
            own, expected = ([r[:3] for r in found] for found in (own, expected))
        assert sorted(own) == sorted(expected)
        require_described(rows, step, trainer, case)


def require_described(
    rows: list[dict[str, Any]], step: int, trainer: Any, case: str
) -> None:
    """What a row says beside what the loss was given."""
    end = trainer.processing_class.eos_token_id
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
        ids = row.get("masked_response_ids", row["response_ids"])
        text = trainer.processing_class.decode(ids, skip_special_tokens=True)
        rewards = [arbitrary_reward([text])[0], 0.5 * (short_reward([text])[0] or 0.0)]
        expected = sum(rewards) if "two rewards" in case else rewards[0]
        assert row["reward"] == pytest.approx(expected, abs=1e-6)
        assert row["finished"] == (ids[-1] == end)
        # To TRL, a padding token that was sampled ends a response too.
        truncated = ids[-1] not in (end, trainer.processing_class.pad_token_id)
        masked = case == "truncated ones masked" and truncated
        assert ("masked_response_ids" in row) == masked
        assert row["step"] == step
    assert list(groups) == list(range(len(groups)))
    assert [row["group"] for row in rows] == sorted(row["group"] for row in rows)
    whole = case != "a batch for two steps"
    for members in groups.values():
        assert len({tuple(row["prompt_ids"]) for row in members}) == 1
        assert len(members) == 4 if whole else len(members) <= 4
        rewards = torch.tensor([row["reward"] for row in members])
        advantages = rewards - rewards.mean()
        if "standardized" in case:
            advantages = advantages / (rewards.std() + 1e-4)
        if whole:
            recorded = torch.tensor([row["advantage"] for row in members])
            assert torch.allclose(recorded, advantages, atol=1e-6)


@pytest.mark.parametrize("kind", ["full weights", "LoRA", "LoRA with dropout"])
def test_log_probabilities_are_the_policy_s(kind: str, tmp_path: Path) -> None:
    """Of a plain forward pass; those of a pass with dropout are left out."""
    lora = {
        "full weights": None,
        "LoRA": {},
        "LoRA with dropout": {"lora_dropout": 0.1},
    }
    trainer = make_trainer(
        tmp_path / "trainer", max_steps=1, temperature=0.7, lora=lora[kind]
    )
    recorder = RolloutRecorder(out=tmp_path / "rollouts")
    recorder.attach(trainer)
    trainer.train()
    rows = rows_of(recorder.file(1))
    if "dropout" in kind:
        assert not any("sampling_logprobs" in row for row in rows)
        return
    model, _ = live_training.tiny_policy()  # LoRA's B is zero before the first step
    for row in rows:
        prompt, response = row["prompt_ids"], torch.tensor(row["response_ids"])
        logits = model(torch.tensor([prompt + row["response_ids"]])).logits[0]
        logp = (logits[len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
        expected = logp.gather(1, response[:, None])[:, 0]
        found = torch.tensor(row["sampling_logprobs"])
        assert torch.allclose(found, expected, atol=1e-5)


def test_a_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    """Bit for bit, also with the probe beside it, attached before or after."""

    def train(attached: str) -> Records:
        records, folder = Records(), tmp_path / attached
        settings = {"lora": {"lora_dropout": 0.2}, "gradient_accumulation_steps": 2}
        trainer = make_trainer(folder / "trainer", callbacks=[records], **settings)
        for kind in attached.split():
            if kind == "recorder":
                RolloutRecorder(out=folder / kind).attach(trainer)
            if kind == "probe":
                EntropyProbeCallback(out=folder / kind, **PROBE).attach(trainer)
        trainer.train()
        methods = {"compute_loss", "_calculate_rewards", "clip_grad_norm_"}
        assert not methods & (vars(trainer).keys() | vars(trainer.accelerator).keys())
        return records

    plain = train("nothing")
    assert len(plain.steps) == 2
    for attached in ("recorder probe", "probe recorder"):
        recorded = train(attached)
        assert plain.steps == recorded.steps
        assert plain.logs == recorded.logs


def test_the_steps_after_a_checkpoint_alone(tmp_path: Path) -> None:
    """Those of the run and the one after the checkpoint it was resumed from."""

    def train(folder: str, **settings: Any) -> list[str]:
        saving = {"save_strategy": "steps", "save_steps": 2, **settings}
        trainer = make_trainer(tmp_path / "trainer", **saving)
        recorder = RolloutRecorder(out=tmp_path / folder, every="checkpoint")
        recorder.attach(trainer)
        trainer.train(resume_from_checkpoint=folder == "resumed")
        return sorted(file.name for file in (tmp_path / folder).iterdir())

    assert train("run", max_steps=4) == ["U-000003.jsonl.gz"]
    assert train("resumed", max_steps=7) == ["U-000005.jsonl.gz", "U-000007.jsonl.gz"]


def test_refusals(tmp_path: Path) -> None:
    """Each says what was expected, what was found, and what to do."""
    recorder = RolloutRecorder(out=tmp_path)
    with pytest.raises(InputError, match="every: expected 'step' or 'checkpoint'"):
        RolloutRecorder(out=tmp_path, every="epoch")  # type: ignore[arg-type]
    with pytest.raises(
        InputError, match="GRPOTrainer, found SimpleNamespace; .*import"
    ):
        recorder.attach(SimpleNamespace())
    state = SimpleNamespace(global_step=0)
    with pytest.raises(InputError, match="call recorder.attach"):
        recorder.on_train_begin(None, state, None)
    recorder.attach(make_trainer(tmp_path / "trainer"))
    recorder.file(7).write_bytes(b"")
    with pytest.raises(InputError, match=r"U-000007.jsonl.gz: expected no rollouts"):
        recorder.on_train_begin(None, state, None)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tool_mask", torch.ones(8, 6), "the results of tools"),
        ("pixel_values", torch.ones(8, 1), "images"),
        ("advantages", torch.ones(8, 6), "advantages by token"),
    ],
)
def test_a_batch_that_no_file_can_hold(
    name: str, value: torch.Tensor, message: str, tmp_path: Path
) -> None:
    """It is refused at the end of the first step."""
    trainer = make_trainer(tmp_path / "trainer")
    sample = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda rows: sample(rows) | {name: value}
    trainer._compute_loss = lambda model, inputs: next(model.parameters()).sum()
    RolloutRecorder(out=tmp_path / "rollouts").attach(trainer)
    with pytest.raises(InputError, match=message):
        trainer.train()
