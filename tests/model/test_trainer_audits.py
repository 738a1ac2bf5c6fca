"""Is a U that is not the batch of the trainer's next step told from the one that is?"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import planted
import pytest
import reference as ref
import torch
from planted import Scene
from reference import LossSettings
from torch import nn

from entropy_ddp.distributed import World
from entropy_ddp.probe.audits.step import trainer_rows
from entropy_ddp.probe.opening import open_session
from entropy_ddp.probe.session import Session, no_progress
from entropy_ddp.results import AuditRow
from entropy_ddp.update.step import Step

NORM = "gradient norm, the trainer's of step 4"
STEP = "U step of the trainer"
LENGTH = 40
HISTORY = [{"step": step, "grad_norm": 0.1 * step, "reward": None} for step in (1, 3)]
TRAINED = {
    "loss_type": "dr_grpo", "max_completion_length": LENGTH, "epsilon": 0.2,
    "beta": 0.0, "max_grad_norm": 1.0, "scale_rewards": "none", "temperature": 1.0,
}  # fmt: skip


def logged_by(folder: Path, step: int, *entries: dict[str, Any]) -> None:
    """A checkpoint's trainer_state.json, with the log up to it."""
    folder.mkdir(exist_ok=True)
    state = {"global_step": step, "log_history": [*HISTORY, *entries]}
    (folder / "trainer_state.json").write_text(json.dumps(state))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Step 4 was taken from checkpoint-3 on U, and logged by checkpoint-6."""
    scene = planted.make_scene(tmp_path_factory.mktemp("scene"))
    folder = scene.saved.folder
    torch.save(SimpleNamespace(**TRAINED), folder / "training_args.bin")
    logged_by(folder, 3)
    fifth = {"step": 5, "grad_norm": 9.0}
    logged_by(
        folder.parent / "checkpoint-6",
        6,
        {"step": 4, "grad_norm": norm_of_the_loss(scene)},
        fifth,
    )
    update = {"from_checkpoint": True, "lr_override": planted.LEARNING_RATE}
    return scene.with_rows("U", lambda row: row | {"step": 4}).with_sections(
        update=update
    )


def norm_of_the_loss(scene: Scene) -> float:
    """Norm of the gradient of the loss written out."""
    rows, model = planted.reference_rows(scene.U), scene.saved.model
    settings = LossSettings(length_norm=LENGTH)
    loss = ref.rl_loss(model, rows, ref.advantages(rows, "centered"), settings)
    gradients = torch.autograd.grad(loss, list(ref.trainable(model).values()))
    return float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())


def test_the_batch_of_the_next_step_is_known_as_such(
    scene: Scene, tmp_path: Path
) -> None:
    """By its rows, and by the norm that the trainer logged."""
    rows = {row.name: row for row in scene.audit(tmp_path).results.audit}
    assert rows[STEP].value == 4
    assert rows[NORM].value == pytest.approx(norm_of_the_loss(scene), rel=1e-9)
    assert rows[STEP].verdict == rows[NORM].verdict == "ok"


@pytest.fixture(scope="module")
def opened(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Session:
    config = scene.config(tmp_path_factory.mktemp("opened"))
    return open_session(config, World(), None, no_progress)


def rows_of(session: Session, norm: float) -> dict[str, AuditRow]:
    step = Step(
        delta=torch.zeros(1),
        learning_rate=1e-3,
        grad_norm=norm,
        clip_coef=1.0,
        num_optimizer_steps=1,
    )
    return {row.name: row for row in trainer_rows(session, step)}


def with_steps(session: Session, step: Callable[[int], Any]) -> Session:
    """The same session; the key `step` of each row of U by its place."""
    update = session.batches["U"]
    sequences = tuple(
        replace(s, extra={} if step(i) is None else {"step": step(i)})
        for i, s in enumerate(update.sequences)
    )
    batches = session.batches | {"U": replace(update, sequences=sequences)}
    return replace(session, batches=batches)


@pytest.mark.parametrize(
    ("step", "value", "verdict"),
    [
        (lambda place: 4, 4, "ok"),
        (lambda place: 3, 3, "fail"),
        (lambda place: 4 + place % 2, "4 to 5", "warn"),
        (lambda place: None if place else 4, 4, "warn"),
    ],
    ids=["its own", "another", "two", "one row alone"],
)
def test_the_step_of_the_rows(
    opened: Session, step: Callable[[int], Any], value: Any, verdict: str
) -> None:
    row = rows_of(with_steps(opened, step), 1.0)[STEP]
    assert (row.value, row.verdict) == (value, verdict)
    assert ("U-000004.jsonl.gz" in row.hint) == (verdict != "ok")


@pytest.mark.parametrize("step", [None, "4", True], ids=repr)
def test_rows_that_name_no_step_say_nothing(opened: Session, step: Any) -> None:
    """A norm that is another one is no fault then: U may be any batch."""
    rows = rows_of(with_steps(opened, lambda place: step), 1e3)
    assert list(rows) == [NORM]
    assert (rows[NORM].verdict, rows[NORM].hint) == ("ok", "")


@pytest.fixture
def settings(scene: Scene) -> Any:
    """Sets the trainer's settings for a test."""
    file = scene.saved.folder / "training_args.bin"
    yield lambda **values: torch.save(SimpleNamespace(**TRAINED | values), file)
    torch.save(SimpleNamespace(**TRAINED), file)


@pytest.mark.parametrize(
    ("factor", "trained", "verdict"),
    [
        (1.00005, {}, "ok"),
        (1.0003, {}, "fail"),
        (0.96, {}, "fail"),
        (0.99, {"bf16": True}, "ok"),
        (0.96, {"bf16": True}, "warn"),
        (0.96, {"use_vllm": True}, "warn"),
    ],
)
def test_another_norm_than_the_trainer_s(
    opened: Session,
    scene: Scene,
    settings: Any,
    factor: float,
    trained: dict[str, Any],
    verdict: str,
) -> None:
    """What only U can explain is a failure; what precision can is nothing."""
    settings(**trained)
    norm = factor * norm_of_the_loss(scene)
    row = rows_of(opened, norm)[NORM]
    assert row.verdict == verdict
    assert row.value == norm
    assert (f"logged {norm / factor:.6g}" in row.hint) == (verdict != "ok")


def test_a_step_without_a_gradient(scene: Scene, tmp_path: Path) -> None:
    """Every group's rewards were equal: the norm is 0 and nothing is divided by it."""
    saved = planted.copy_checkpoint(scene.saved, tmp_path)
    logged_by(tmp_path / "checkpoint-6", 6, {"step": 4, "grad_norm": 0.0})
    config = replace(scene, saved=saved).config(tmp_path)
    session = open_session(config, World(), None, no_progress)
    assert rows_of(session, 0.0)[NORM].verdict == "ok"
    assert rows_of(session, 1e-9)[NORM].verdict == "fail"


def test_what_else_can_explain_another_norm(opened: Session, scene: Scene) -> None:
    """Settings of one's own, and dropout."""
    norm = 0.96 * norm_of_the_loss(scene)
    update = opened.config.update.model_copy(update={"from_checkpoint": False})
    config = opened.config.model_copy(update={"update": update})
    assert rows_of(replace(opened, config=config), norm)[NORM].verdict == "warn"
    dropped = nn.ModuleList([opened.policy.model, nn.Dropout(0.1)])
    policy = replace(opened.policy, model=dropped)
    assert rows_of(replace(opened, policy=policy), norm)[NORM].verdict == "warn"


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "trainer_state.json").unlink(),
        lambda folder: (folder / "trainer_state.json").write_text("[1"),
        lambda folder: (folder / "trainer_state.json").write_text("[" * 10**5),
        lambda folder: logged_by(folder, 6, {"step": 5, "grad_norm": 1.0}),
        lambda folder: logged_by(folder, 6, {"step": 4, "grad_norm": float("nan")}),
        lambda folder: (folder / "trainer_state.json").write_text(
            '{"global_step": 6, "log_history": [{"step": 4, "grad_norm": 1.0}]}'
        ),
    ],
    ids=["none", "damaged", "deep", "step not logged", "nan", "another training"],
)
def test_where_nothing_was_logged_there_is_no_row(
    scene: Scene, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    """Of this training: the log of another one is not asked."""
    saved = planted.copy_checkpoint(scene.saved, tmp_path)
    later = tmp_path / "checkpoint-6"
    logged_by(later, 6, {"step": 4, "grad_norm": 1.0})
    config = replace(scene, saved=saved).config(tmp_path)
    session = open_session(config, World(), None, no_progress)
    assert list(rows_of(session, 1.0)) == [STEP, NORM]
    damage(later)
    assert list(rows_of(session, 1.0)) == [STEP]
