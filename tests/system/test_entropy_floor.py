"""What holds the entropy of a training: against brute force, and where it does nothing."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import launching
import live_training
import pytest
import reference
import torch
from live_training import make_trainer, steps_of, tiny_policy, train
from torch import Tensor, nn

from entropy_ddp.errors import InputError, RunError
from entropy_ddp.training import EntropyFloor, EntropyProbeCallback
from entropy_ddp.training.floor import PREFIX, FloorStep
from entropy_ddp.training.floor_step import entropy_gradient

pytest.importorskip("trl")

Weight = Callable[[float, float, float], float]
LENGTH, TEMPERATURE = 6, 0.8
# Of a float32 training against float64.
TOLERANCE = 2e-4


def repo(logp: float, advantage: float, zeta: float) -> float:
    sign = (advantage > 0) - (advantage < 0)
    return max(0.0, 1 - zeta * sign * logp)


def improbable_failures(logp: float, advantage: float, weight: float) -> float:
    return weight if advantage < 0 and math.exp(logp) < 0.5 else 1.0


WEIGHTS: dict[str, Weight] = {"repo": repo, "improbable_failures": improbable_failures}
NEUTRAL = {"repo": 0.0, "improbable_failures": 1.0}
LIMIT = {"repo": 1.0, "improbable_failures": 0.0}
# High above the entropy: `want` is the cap at every step.
ACTIVE = {"floor": 9.0, "rate": 1.0}


def rows_of(steps: list[dict[str, Any]]) -> list[reference.Row]:
    """The batch of all ranks; the responses to a prompt are a group."""
    return [
        reference.Row(
            group=str(row["prompt_ids"]),
            prompt_ids=row["prompt_ids"],
            response_ids=row["response_ids"],
            advantage=row["advantage"],
        )
        for step in steps
        for row in step["rows"]
    ]


def model_of(step: Mapping[str, Any], lora: Mapping[str, Any] | None) -> nn.Module:
    """The model before a step, in float64."""
    model, _ = tiny_policy()
    if lora is not None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            task_type="CAUSAL_LM", r=2, lora_alpha=4,
            target_modules=["q_proj", "v_proj", "up_proj"], **lora,
        )  # fmt: skip
        model = get_peft_model(model, config)
    model.load_state_dict(step["model"])
    return model.double().eval()


def is_lookup(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


class Held:
    """The floor once more, in float64 and one sequence at a time."""

    def __init__(self, *, family: str, cap: float, memory: float = 0.9) -> None:
        self.family, self.cap, self.memory = family, cap, memory
        self.slope: dict[str, Tensor] | None = None

    def step(
        self, steps: list[dict[str, Any]], model: nn.Module, max_norm: float
    ) -> dict[str, Any]:
        """One step's numbers, and the gradient that it should be taken with."""
        first, rows = steps[0], rows_of(steps)
        padding = {m: m.padding_idx for m in model.modules() if is_lookup(m)}
        entropy, gradient = reference.entropy_gradient(model, rows, TEMPERATURE)
        for module, index in padding.items():
            # Not in the gradient that the trainer steps with.
            module.padding_idx = index
        if self.slope is None:
            self.slope = gradient
        else:
            for name, value in self.slope.items():
                value.mul_(self.memory).add_(gradient[name], alpha=1 - self.memory)
        parameters = reference.trainable(model)

        def pulled(factor: Callable[[float, float], float]) -> dict[str, Tensor]:
            return reference.policy_gradient(model, rows, LENGTH, TEMPERATURE, factor)

        def step_of(raw: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any, float]:
            clipped, _, coefficient = reference.clip_gradients(raw, max_norm)
            moved, state = reference.adamw_step_naive(
                parameters, clipped, first["moments"], first["groups"]
            )
            delta = {n: moved[n] - p.detach() for n, p in parameters.items()}
            return delta, state, coefficient

        plain = pulled(lambda logp, advantage: 1.0)
        delta, state, coefficient = step_of(plain)
        predicted = reference.dot(self.slope, delta)
        weight, neutral = WEIGHTS[self.family], NEUTRAL[self.family]

        def derivative(logp: float, advantage: float) -> float:
            def at(x: float) -> float:
                return weight(logp, advantage, x)

            return (at(neutral + 1e-4) - at(neutral - 1e-4)) / 2e-4

        # Probed from the formula of the step: <G, gain g'> with the denominators fixed.
        (group,) = {tuple(g["betas"]) + (g["eps"], g["lr"]) for g in first["groups"]}
        beta1, beta2, epsilon, rate = group
        along = pulled(derivative)
        share = 0.0
        for name, value in along.items():
            t = int(state[name]["step"])
            second = state[name]["exp_avg_sq"] / (1 - beta2**t)
            gain = rate * (1 - beta1) * coefficient / (1 - beta1**t)
            moved = -gain * value / (second.sqrt() + epsilon)
            share += float((self.slope[name] * moved).sum())
        found = (self.cap - predicted) / share
        reach = LIMIT[self.family] - neutral
        fraction = min(max(found / reach, 0.0), 1.0)
        parameter = neutral + fraction * reach
        new = pulled(lambda logp, advantage: weight(logp, advantage, parameter))
        delta, _, coefficient = step_of(new)
        return {
            "measured": entropy,
            "predicted_plain": predicted,
            "predicted": reference.dot(self.slope, delta),
            "parameter": parameter,
            "saturated": found / reach > 1 or share * reach <= 0,
            "gradient": reference.clip_gradients(new, max_norm)[0],
        }


CASES: dict[str, dict[str, Any]] = {
    "repo, checkpointing": {
        "floor": {"family": "repo", "cap": 0.01},
        "gradient_checkpointing": True,
    },
    "repo, weights at 0": {"floor": {"family": "repo", "cap": 0.06}},
    "repo, LoRA, clipped": {
        "floor": {"family": "repo", "cap": 0.002},
        "lora": {},
        "max_grad_norm": 0.02,
    },
    "failures, accumulation": {
        "floor": {"family": "improbable_failures", "cap": 0.001},
        "gradient_accumulation_steps": 2,
    },
    "failures, clipped": {
        "floor": {"family": "improbable_failures", "cap": 0.001},
        "max_grad_norm": 0.02,
    },
}


def require_as_reference(folder: Path, settings: Mapping[str, Any], ranks: int) -> None:
    """Every step of every rank; all ranks take the same."""
    of_ranks = [
        torch.load(folder / f"dump-{rank}.pt", weights_only=False)
        for rank in range(ranks)
    ]
    floor = settings["floor"]
    held = Held(family=floor["family"], cap=floor["cap"])
    parameters = []
    for steps in zip(*of_ranks, strict=True):
        model = model_of(steps[0], settings.get("lora"))
        expected = held.step(list(steps), model, settings.get("max_grad_norm", 1.0))
        for step in steps:
            found = step["floor"]
            assert found["wanted"] == floor["cap"]
            assert found["saturated"] == expected["saturated"]
            for name in ("measured", "predicted_plain", "predicted", "parameter"):
                assert found[name] == pytest.approx(
                    expected[name], rel=TOLERANCE, abs=1e-3 * floor["cap"]
                ), name
            for name, gradient in expected["gradient"].items():
                gap = (step["gradient"][name] - gradient).norm()
                size = reference.dot(expected["gradient"], expected["gradient"]) ** 0.5
                assert float(gap) < 1e-3 * size
        parameters.append(expected["parameter"])
    assert any(p != NEUTRAL[floor["family"]] for p in parameters)


@pytest.mark.parametrize("case", CASES)
def test_a_held_step_is_what_the_reference_says(case: str, tmp_path: Path) -> None:
    settings = CASES[case]
    floor = settings["floor"] | ACTIVE
    train(
        tmp_path, dump=True, max_steps=3, temperature=TEMPERATURE,
        **settings | {"floor": floor},
    )  # fmt: skip
    require_as_reference(tmp_path, settings, ranks=1)


def on_ranks(tmp_path: Path, jobs: list[dict[str, Any]], ranks: int = 2) -> None:
    """Make trainings under torchrun."""
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    script = launching.REPOSITORY / "tests" / "live_training.py"
    launching.run(
        launching.torchrun(ranks, script, tmp_path / "jobs.json"), timeout_seconds=240
    ).require_success()


def test_held_steps_of_two_ranks_are_what_the_reference_says(tmp_path: Path) -> None:
    """And both ranks have the same weights after each."""
    cases = ("repo, weights at 0", "repo, LoRA, clipped", "failures, accumulation")
    jobs = [
        {"folder": str(tmp_path / str(number)), "dump": True, "max_steps": 3,
         "temperature": TEMPERATURE}
        | CASES[case] | {"floor": CASES[case]["floor"] | ACTIVE}
        for number, case in enumerate(cases)
    ]  # fmt: skip
    on_ranks(tmp_path, jobs)
    for number, case in enumerate(cases):
        folder = tmp_path / str(number)
        require_as_reference(folder, CASES[case], ranks=2)
        hashes = [
            [step["weights"] for step in json.loads(file.read_text())["steps"]]
            for file in sorted(folder.glob("records-*.json"))
        ]
        assert len(hashes) == 2 and hashes[0] == hashes[1]


# Far below the entropy: every step may lower it by more than it does.
INACTIVE: dict[str, dict[str, Any]] = {
    "full weights, accumulation": {"gradient_accumulation_steps": 2},
    "LoRA, clipped": {"lora": {}, "max_grad_norm": 0.02},
}


@pytest.mark.parametrize("case", INACTIVE)
def test_a_training_above_its_floor_is_the_plain_one(case: str, tmp_path: Path) -> None:
    """Bit for bit: weights, optimizer state, random streams and all that is logged."""
    plain = train(tmp_path / "plain", **INACTIVE[case])
    held = train(tmp_path / "held", floor={"floor": 0.0}, **INACTIVE[case])
    assert len(plain.steps) == 2
    assert plain.steps == held.steps
    assert plain.logs == held.logs
    assert all(logs["entropy_floor/zeta"] == 0 for logs in held.seen[:2])


def test_a_training_of_two_ranks_above_its_floor_is_the_plain_one(
    tmp_path: Path,
) -> None:
    jobs = [
        {"folder": str(tmp_path / f"{number}-{floor is not None}"), "floor": floor}
        | settings
        for number, settings in enumerate(INACTIVE.values())
        for floor in (None, {"floor": 0.0})
    ]
    on_ranks(tmp_path, jobs)
    for number in range(len(INACTIVE)):
        for rank in range(2):
            plain, held = (
                json.loads(
                    (tmp_path / f"{number}-{is_held}/records-{rank}.json").read_text()
                )
                for is_held in (False, True)
            )
            assert plain == held


def test_an_active_floor_is_told_apart(tmp_path: Path) -> None:
    """The comparison can fail."""
    settings = {"max_steps": 1, "temperature": TEMPERATURE}
    plain = train(tmp_path / "plain", **settings)
    held = train(tmp_path / "held", floor=ACTIVE, **settings)
    assert held.seen[0]["entropy_floor/zeta"] > 0
    assert plain.steps[0]["weights"] != held.steps[0]["weights"]
    # Nothing else is touched.
    same = {"weights": "", "optimizer": ""}
    assert plain.steps[0] | same == held.steps[0] | same


@pytest.mark.parametrize("family", WEIGHTS)
def test_feedback_weighs_the_trainer_s_own_gradient(
    family: str, tmp_path: Path
) -> None:
    """No pass is added; the parameter is doubled below the floor, and halved above."""

    def floor(step: int) -> float:
        return 9.0 if step < 3 else 0.0

    settings = {"floor": floor, "family": family, "mode": "feedback"}
    train(tmp_path, dump=True, max_steps=4, temperature=TEMPERATURE, floor=settings)
    steps = torch.load(tmp_path / "dump-0.pt", weights_only=False)
    reach = LIMIT[family] - NEUTRAL[family]
    for step, fraction in zip(steps, (0.01, 0.02, 0.04, 0.02), strict=True):
        found = step["floor"]
        parameter = NEUTRAL[family] + fraction * reach
        assert found["parameter"] == pytest.approx(parameter)
        assert found["wanted"] is None and not found["saturated"]
        model, rows = model_of(step, None), rows_of([step])
        assert found["measured"] == pytest.approx(
            reference.entropy_gradient(model, rows, TEMPERATURE)[0], rel=1e-5
        )
        model, taken = model_of(step, None), found["parameter"]
        expected, _, _ = reference.clip_gradients(
            reference.policy_gradient(
                model, rows, LENGTH, TEMPERATURE,
                lambda logp, a, x=taken: WEIGHTS[family](logp, a, x),
            ),
            1.0,
        )  # fmt: skip
        size = reference.dot(expected, expected) ** 0.5
        for name, gradient in expected.items():
            assert float((step["gradient"][name] - gradient).norm()) < 1e-4 * size


def test_feedback_of_two_ranks_is_one_parameter(tmp_path: Path) -> None:
    """Of the entropy of both ranks' tokens."""
    floor = {"floor": 2.4, "mode": "feedback"}
    on_ranks(
        tmp_path,
        [{"folder": str(tmp_path), "floor": floor, "dump": True, "max_steps": 3}],
    )
    first, second = (
        torch.load(tmp_path / f"dump-{rank}.pt", weights_only=False)
        for rank in range(2)
    )
    for one, other in zip(first, second, strict=True):
        for name in ("measured", "parameter"):
            assert one["floor"][name] == other["floor"][name]
        rows = rows_of([one, other])
        measured, _ = reference.entropy_gradient(model_of(one, None), rows, 1.0)
        assert one["floor"]["measured"] == pytest.approx(measured, rel=1e-5)
        for name, gradient in one["gradient"].items():
            assert torch.equal(gradient, other["gradient"][name])


BESIDE = {
    "first order": {**ACTIVE, "cap": 0.01},
    "first order, at a limit": {**ACTIVE, "cap": 0.06},
    "feedback": {"floor": 9.0, "mode": "feedback"},
    "inactive": {"floor": 0.0},
}


@pytest.mark.parametrize("case", BESIDE)
def test_a_probe_beside_a_floor_sees_what_it_changed(case: str, tmp_path: Path) -> None:
    """The step it foresees is the one taken, and tokens' shares are of their weights."""
    train(
        tmp_path,
        probe={"truth": False},
        floor=BESIDE[case],
        lora={},
        max_steps=3,
        max_grad_norm=0.05,
        # Off policy too, where the loss weighs tokens by their ratio.
        num_iterations=2,
    )
    entries = steps_of(tmp_path)
    assert len(entries) == 3
    for entry in entries:
        checks, held = entry["checks"], entry["floor"]
        assert checks["identity_gap"] < 1e-5
        assert checks["step_gap"] < 1e-5
        assert held["floor"] == BESIDE[case]["floor"]
        changed = held["parameter"] != 0 and case != "feedback"
        assert ("change" in held) == changed
        assert ("wanted" in held) == (case != "feedback")
        if changed:
            assert abs(held["change"]) > 1e-7
            assert held["predicted"] != held["predicted_plain"]
        if case == "inactive":
            assert held["wanted"] == pytest.approx(-0.1 * held["measured"])
            assert held["predicted"] == held["predicted_plain"] >= held["wanted"]


@pytest.mark.parametrize("floor_first", [True, False])
def test_a_floor_comes_before_a_probe(floor_first: bool, tmp_path: Path) -> None:
    """In whatever order they are attached."""
    trainer = make_trainer(tmp_path)
    attached: list[Any] = [EntropyFloor(0.5), EntropyProbeCallback(out=tmp_path)]
    for callback in attached if floor_first else attached[::-1]:
        callback.attach(trainer)
    assert trainer.callback_handler.callbacks[:2] == attached


def test_the_logs_say_what_was_done(tmp_path: Path) -> None:
    """Means over the steps since the last log; the trainer's history is its own."""
    floor = {**ACTIVE, "cap": 0.06, "family": "improbable_failures"}
    records = train(tmp_path, floor=floor, dump=True, max_steps=4, logging_steps=2)
    seen = [logs for logs in records.seen if "loss" in logs]
    steps = torch.load(tmp_path / "dump-0.pt", weights_only=False)
    held = [step["floor"] for step in steps]
    assert len(seen) == 2
    names = {"weight": "parameter"} | {
        name: name
        for name in ("floor", "measured", "wanted", "predicted_plain", "predicted",
                     "saturated")
    }  # fmt: skip
    for number, logs in enumerate(seen):
        both = held[2 * number : 2 * number + 2]
        for name, key in names.items():
            mean = sum(float(step[key]) for step in both) / 2
            assert logs[f"entropy_floor/{name}"] == pytest.approx(mean), name
        assert logs["entropy_floor/seconds"] > 0
    assert any(logs["entropy_floor/saturated"] for logs in seen)


def test_a_floor_above_the_start_is_said_to_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, with the highest of a schedule; not where it is below."""
    train(
        tmp_path / "high",
        floor={"floor": lambda step: 1.0 + step, "mode": "feedback"},
        max_steps=3,
    )
    assert caplog.text.count("above the") == 1
    assert "the floor of step 3 is 4 nats per token" in caplog.text
    assert "recorded batch" not in caplog.text
    caplog.clear()
    floor = {"floor": 0.5, "mode": "feedback"}
    train(tmp_path / "low", floor=floor, record=True, max_steps=1)
    assert "above the" not in caplog.text
    # What it records is not what the step was taken with.
    assert caplog.text.count("a recorded batch has no weights of a floor") == 1


def test_a_learning_rate_of_zero_is_no_step_to_hold(tmp_path: Path) -> None:
    """The first step of a warm-up is the plain one."""
    plain = train(tmp_path / "plain", warmup_steps=2, max_steps=1)
    held = train(tmp_path / "held", floor=ACTIVE, warmup_steps=2, max_steps=1)
    assert plain.steps == held.steps
    (logs,) = (logs for logs in held.seen if "loss" in logs)
    assert logs["entropy_floor/saturated"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"floor": -0.1}, "floor: expected an entropy .* at least 0, found -0.1"),
     ({"floor": math.nan}, "floor: expected an entropy"),
     ({"floor": "0.5"}, "floor: expected an entropy"),
     ({"floor": 0.5, "family": "repos"}, "family: expected .*improbable_failures"),
     ({"floor": 0.5, "mode": "second_order"}, "mode: expected .*feedback"),
     ({"floor": 0.5, "rate": 0.0}, "rate: expected a number above 0"),
     ({"floor": 0.5, "cap": -1.0}, "cap: expected"),
     ({"floor": 0.5, "memory": 1.0}, "memory: expected"),
     ({"floor": 0.5, "tokens_per_microbatch": 0}, "tokens_per_microbatch: expected")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    """When the floor is made."""
    with pytest.raises(InputError, match=message):
        EntropyFloor(**settings)


def test_a_schedule_must_give_an_entropy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="floor of step 1: expected an entropy"):
        train(tmp_path, floor={"floor": lambda step: None}, max_steps=1)


REFUSED: dict[str, dict[str, Any]] = {
    "beta is 0.04": {"beta": 0.04, "lora": {}},
    "entropy bonus": {"entropy_coef": 0.01},
    "second control": {"use_adaptive_entropy": True},
    "dropout": {"lora": {"lora_dropout": 0.1}},
    "Adafactor": {"optim": "adafactor"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_held_is_refused(message: str, tmp_path: Path) -> None:
    """Before the first step."""
    trainer = make_trainer(tmp_path, **REFUSED[message])
    EntropyFloor(0.5).attach(trainer)
    with pytest.raises(InputError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_training_has_one_floor_and_a_floor_one_training(tmp_path: Path) -> None:
    trainer, other = make_trainer(tmp_path / "one"), make_trainer(tmp_path / "other")
    floor = EntropyFloor(0.5)
    floor.attach(trainer)
    floor.attach(trainer)
    assert trainer.callback_handler.callbacks.count(floor) == 1
    with pytest.raises(InputError, match="attached to another trainer"):
        floor.attach(other)
    EntropyFloor(0.4).attach(trainer)
    with pytest.raises(InputError, match="another floor is attached"):
        trainer.train()
    trainer.remove_callback(floor)
    floor.attach(other)


@pytest.mark.parametrize("mode", ["first_order", "feedback"])
def test_a_batch_without_tokens_is_left_alone(
    mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where all responses are cut off and masked; said once, and the next is held.

    A probe beside it tells what the step did nevertheless.
    """
    records = live_training.Records()
    trainer = make_trainer(tmp_path, callbacks=[records], max_steps=3)
    sample, sampled = trainer._generate_and_score_completions, []

    def masked_but_for_the_last(inputs: Any) -> Any:
        batch = sample(inputs)
        sampled.append(batch)
        if len(sampled) < 3:
            batch["completion_mask"].zero_()
        return batch

    trainer._generate_and_score_completions = masked_but_for_the_last
    EntropyFloor(9.0, mode=mode).attach(trainer)
    settings = live_training.PROBE | {"truth": False, "second_order": False, "every": 2}
    EntropyProbeCallback(out=tmp_path, **settings).attach(trainer)
    trainer.train()
    (entry,) = steps_of(tmp_path)
    assert "floor" not in entry and entry["by_token"] == []
    assert entry["U"]["num_tokens"] == entry["parts"]["gradient"] == 0
    assert entry["parts"]["decay"] != 0
    assert [f"{PREFIX}measured" in logs for logs in records.seen[:3]] == [
        False, False, True,
    ]  # fmt: skip
    assert caplog.text.count("the batch of step 1 has no response tokens") == 1
    assert "step 2" not in caplog.text


def test_tokens_that_the_policy_did_not_choose_are_refused(tmp_path: Path) -> None:
    """At the first loss: of an environment, TRL tells with the batch."""
    trainer = make_trainer(tmp_path)
    sample = trainer._generate_and_score_completions

    def with_environment(inputs: Any) -> Any:
        batch = sample(inputs)
        return batch | {"tool_mask": torch.ones_like(batch["completion_mask"])}

    trainer._generate_and_score_completions = with_environment
    EntropyFloor(0.5).attach(trainer)
    with pytest.raises(InputError, match="results of tools .`tool_mask`."):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_training_that_failed_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the first weighs the second's tokens."""
    calls: list[int] = []

    def fails_once(completions: list[str], **_: object) -> list[float]:
        calls.append(1)
        if len(calls) == 2:
            raise OSError("no answer")
        return [float(len(text)) for text in completions]

    monkeypatch.setattr(live_training, "arbitrary_reward", fails_once)
    records = live_training.Records()
    trainer = make_trainer(tmp_path, callbacks=[records])
    EntropyFloor(9.0, mode="feedback").attach(trainer)
    with pytest.raises(OSError, match="no answer"):
        trainer.train()
    trainer.train()
    zetas = [logs[f"{PREFIX}zeta"] for logs in records.seen if f"{PREFIX}zeta" in logs]
    assert zetas == [0.01, 0.01, 0.02]
    assert not trainer.model._forward_hooks and not trainer.model._forward_pre_hooks


def test_an_evaluation_s_log_is_of_no_steps() -> None:
    """It comes before the training's own, and would take its steps away."""
    floor = EntropyFloor(0.5)
    floor._unlogged = [FloorStep(step=1, floor=0.5, measured=0.6, parameter=0.0,
                                 saturated=False)]  # fmt: skip
    logs: dict[str, float] = {"eval_loss": 1.0}
    floor.on_log(None, None, None, logs=logs)
    assert logs == {"eval_loss": 1.0}
    logs = {"loss": 1.0}
    floor.on_log(None, None, None, logs=logs)
    assert logs[f"{PREFIX}measured"] == 0.6


def test_an_entropy_that_is_no_number_is_said_to_be_one() -> None:
    capture = SimpleNamespace(entropy_sums=lambda: torch.tensor([math.nan, 3.0]))
    with pytest.raises(RunError, match="entropy of the batch is nan"):
        EntropyFloor(0.5, mode="feedback")._fed_back(1, 0.5, capture)


@pytest.mark.long
def test_gradients_of_the_batches_entropies_have_the_entropy_s_as_their_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a policy that does not move, against all responses of two tokens."""
    found: list[Tensor] = []

    def kept(*arguments: Any) -> Tensor:
        found.append(entropy_gradient(*arguments).double().clone())
        return found[-1]

    monkeypatch.setattr("entropy_ddp.training.floor.entropy_gradient", kept)
    train(
        tmp_path, floor={"floor": 0.0}, max_steps=100, max_completion_length=2,
        per_device_train_batch_size=32, learning_rate=0.0,
    )  # fmt: skip
    model, tokenizer = tiny_policy()
    model = model.double().eval()
    for module in filter(is_lookup, model.modules()):
        module.padding_idx = None
    words = torch.arange(len(tokenizer))
    total = tokens = torch.zeros((), dtype=torch.float64)
    for prompt in live_training.PROMPTS:
        ids = torch.tensor(tokenizer(prompt)["input_ids"])
        longer = torch.cat([ids.expand(len(words), -1), words[:, None]], dim=1)
        logp = model(input_ids=longer).logits[:, -2:].log_softmax(-1)
        chance = logp[0, 0].exp() * (words != tokenizer.eos_token_id)
        first, second = (-logp.exp() * logp).sum(-1).unbind(1)
        total = total + first[0] + (chance * second).sum()
        tokens = tokens + 1 + chance.sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(total / tokens, parameters)
    exact = torch.cat([slope.reshape(-1) for slope in slopes])
    generator = torch.Generator().manual_seed(0)
    others = torch.randn(4, len(exact), generator=generator, dtype=torch.float64)
    for direction in (exact, *others):
        values = torch.stack(found) @ direction
        gap = float(values.mean() - exact @ direction)
        assert abs(gap) < 3.5 * float(values.std()) / len(values) ** 0.5


def test_a_floor_needs_trl_s_trainer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected TRL's GRPOTrainer, found Simple"):
        EntropyFloor(0.5).attach(SimpleNamespace())
    trainer = make_trainer(tmp_path, callbacks=[EntropyFloor(0.5)])
    with pytest.raises(InputError, match=r"floor\.attach\(trainer\)"):
        trainer.train()
