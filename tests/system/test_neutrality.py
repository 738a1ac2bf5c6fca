"""Is a training with the callback the training without it, bit for bit?

Weights, optimizer state, random streams, training flags and all that the trainer logs
of its own are compared after every step.
"""

import json
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import launching
import numpy
import pytest
import torch
from live_training import PROBE, Records, ledger_of, make_trainer, steps_of, train
from torch import nn
from transformers import TrainerCallback

from entropy_ddp.training import EntropyProbeCallback
from entropy_ddp.training import untouched as untouched_module
from entropy_ddp.training.untouched import untouched

pytest.importorskip("trl")

DROPOUT = {"lora_dropout": 0.2}
CASES: dict[str, dict[str, Any]] = {
    "LoRA with dropout": {"lora": DROPOUT},
    "LoRA with dropout, accumulation": {
        "lora": DROPOUT,
        "gradient_accumulation_steps": 2,
    },
    "full weights": {},
    "full weights, accumulation": {"gradient_accumulation_steps": 2},
}
MARKS = {"LoRA with dropout, accumulation": pytest.mark.bits}


def require_same(plain: Records, probed: Records) -> None:
    assert len(plain.steps) == 2
    assert plain.steps == probed.steps
    assert plain.logs == probed.logs


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=MARKS.get(name, ())) for name in CASES]
)
def test_a_training_is_the_same_with_and_without(case: str, tmp_path: Path) -> None:
    """On one rank."""
    plain = train(tmp_path / "plain", **CASES[case])
    probed = train(tmp_path / "probed", probe={}, **CASES[case])
    assert [entry["step"] for entry in steps_of(tmp_path / "probed")] == [1, 2]
    require_same(plain, probed)


def test_a_training_on_two_ranks_is_the_same_with_and_without(tmp_path: Path) -> None:
    """Under torchrun; and both ranks' responses are in the ledger."""
    jobs = [
        {"folder": str(tmp_path / f"{number}-{probe is not None}"), "probe": probe}
        | settings
        for number, settings in enumerate(CASES.values())
        for probe in (None, {})
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    script = launching.REPOSITORY / "tests" / "live_training.py"
    launching.run(
        launching.torchrun(2, script, tmp_path / "jobs.json"), timeout_seconds=240
    ).require_success()
    for number, settings in enumerate(CASES.values()):
        plain, probed = tmp_path / f"{number}-False", tmp_path / f"{number}-True"
        for rank in range(2):
            records = [
                json.loads((folder / f"records-{rank}.json").read_text())
                for folder in (plain, probed)
            ]
            assert records[0] == records[1]
        accumulated = settings.get("gradient_accumulation_steps", 1)
        for entry in steps_of(probed):
            assert entry["U"]["num_sequences"] == 2 * 8 * accumulated
            if "lora" not in settings:
                assert entry["checks"]["identity_gap"] < 1e-5
    # The first step's weights and responses are those of one rank alone.
    train(tmp_path / "alone", probe={}, max_steps=1)
    alone, together = (steps_of(tmp_path / name)[0] for name in ("alone", "2-True"))
    assert alone["E"] == together["E"]
    for name, value in alone["entropy"].items():
        assert together["entropy"][name] == pytest.approx(value, rel=1e-6), name


def test_a_single_random_number_is_told_apart(tmp_path: Path) -> None:
    """The comparison can fail."""

    class Draws(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            torch.rand(1)

    plain = train(tmp_path / "plain", max_steps=1)
    records = Records()
    trainer = make_trainer(
        tmp_path / "other", max_steps=1, callbacks=[records, Draws()]
    )
    trainer.train()
    assert plain.steps[0]["torch"] != records.steps[0]["torch"]


def test_a_backward_pass_of_a_probe_runs_no_hook_of_the_trainer(tmp_path: Path) -> None:
    """DistributedDataParallel's hooks are of this kind: one more call is an error."""
    trainer = make_trainer(tmp_path / "trainer", max_steps=1)
    calls: list[str] = []
    for name, parameter in trainer.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, n=name: calls.append(n))
    EntropyProbeCallback(out=tmp_path, **PROBE).attach(trainer)
    trainer.train()
    assert len(ledger_of(tmp_path)) == 3
    assert sorted(calls) == sorted(n for n, _ in trainer.model.named_parameters())


class _Wrapped(nn.Module):
    """An embedding with a padding row, dropout, and accelerate's wrapped forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3, padding_idx=2)
        self.dropout = nn.Dropout(0.5)
        self.dropout.eval()
        self._original_forward = self.forward
        self.forward = lambda ids: self._original_forward(ids).bfloat16()  # type: ignore[method-assign]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.embedding(ids))


def _state(model: _Wrapped) -> list[Any]:
    return [
        random.getstate(),
        str(numpy.random.get_state()),
        torch.get_rng_state().tolist(),
        [module.training for module in model.modules()],
        id(model.embedding.weight.grad),
        model.embedding.padding_idx,
        model.forward,
    ]


def _disturb(model: _Wrapped) -> None:
    assert not model.dropout.training and model.embedding.weight.grad is None
    assert model(torch.tensor([2])).dtype == torch.float32
    model(torch.tensor([2])).sum().backward()
    gradient = model.embedding.weight.grad
    assert gradient is not None and bool(gradient[2].any())
    model.train()
    random.random()
    numpy.random.rand()
    torch.rand(1)


@pytest.mark.parametrize("failing", [False, True])
def test_everything_borrowed_is_given_back(failing: bool) -> None:
    """Also when the probe fails; inside, it is what a probe needs."""
    model = _Wrapped()
    model.embedding.weight.grad = torch.ones(5, 3)
    before = _state(model)
    try:
        with untouched(model):
            _disturb(model)
            if failing:
                raise RuntimeError
    except RuntimeError:
        assert failing
    assert _state(model) == before


@pytest.mark.parametrize(
    "guard",
    ["_random_streams", "_evaluation_mode", "_gradients_aside",
     "_padding_differentiated", "_without_autocast"],
)  # fmt: skip
def test_every_guard_is_needed(guard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each left out is noticed."""
    model = _Wrapped()
    model.embedding.weight.grad = torch.ones(5, 3)
    before = _state(model)
    monkeypatch.setattr(untouched_module, guard, lambda *_: nullcontext())
    noticed = False
    try:
        with untouched(model):
            _disturb(model)
    except AssertionError:
        noticed = True
    assert noticed or _state(model) != before
