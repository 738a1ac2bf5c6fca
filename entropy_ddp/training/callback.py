"""`EntropyProbeCallback`: what each optimizer step of a training does to the entropy.

    probe = EntropyProbeCallback(out="runs/mine", every=10)
    trainer = GRPOTrainer(...)
    probe.attach(trainer)
    trainer.train()

For trainers of transformers and TRL that step with Adam or AdamW. The training is the
same with and without it, bit for bit: see `untouched`.
"""

import logging
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import entropy_ddp
from entropy_ddp.distributed import World, joined_world
from entropy_ddp.errors import InputError
from entropy_ddp.ledger.lines import append_line, require_new
from entropy_ddp.model.parameters import global_norm
from entropy_ddp.probe.session import Session
from entropy_ddp.training.capture import BatchCapture, TrainedBatch, follow
from entropy_ddp.training.floor import EntropyFloor, FloorStep
from entropy_ddp.training.live_session import (
    ProbeSettings,
    open_live_session,
    probe_config,
    require_probable,
    torch_optimizer,
)
from entropy_ddp.training.step_line import (
    PREFIX,
    entropy_entry,
    floor_entry,
    logged_values,
    step_entry,
)
from entropy_ddp.training.step_probe import (
    StepProbe,
    flat_gradient,
    measured_entropy,
    probe_after,
    probe_before,
)
from entropy_ddp.training.untouched import padding_rows, untouched
from entropy_ddp.update.decomposition import AdamState
from entropy_ddp.update.step import clip_coefficient

logger = logging.getLogger(__name__)

# Of |unattributed| relative to the sum of |share|, and of the foreseen step.
IDENTITY_TOLERANCE = 1e-5
STEP_TOLERANCE = 1e-3


class EntropyProbeCallback(TrainerCallback):
    """Probes every n-th optimizer step, logs `entropy_ddp/...`, keeps a ledger.

    Args:
        settings: the fields of `ProbeSettings`.

    Raises:
        InputError: a setting is out of its range.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = ProbeSettings(**settings)
        self.folder = Path(self.settings.out)
        self._trainer: Any = None
        self._session: Session | None = None
        self._capture: BatchCapture | None = None
        self._probe: StepProbe | None = None
        self._world = World()
        self._held: FloorStep | None = None
        self._seconds = 0.0
        self._grad_norm: float | None = None
        self._unlogged: dict[str, Any] | None = None
        self._warned: set[str] = set()
        self._listening = ExitStack()

    def attach(self, trainer: Any) -> None:
        """Put this before a trainer's reporters, and after a floor."""
        self._trainer = trainer
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        floor = _floor_of(trainer)
        callbacks.insert(0 if floor is None else callbacks.index(floor) + 1, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse what cannot be probed; verify the model.

        Raises:
            InputError: it cannot, or the ledger exists.
        """
        trainer = self._trainer
        if trainer is None:
            raise InputError(
                "entropy probe: expected a trainer, found none; call "
                "callback.attach(trainer) before trainer.train()"
            )
        require_probable(trainer)
        if state.global_step == 0:
            require_new(self.folder)
        self._world = joined_world()
        config = probe_config(trainer, self.settings, self._world)
        self._session = open_live_session(trainer, config, self._world)
        self._capture = BatchCapture(
            model=trainer.model,
            num_ranks=self._world.world_size,
            draw_size=getattr(trainer, "num_generations", 1),
        )
        # What an earlier training left when it failed.
        self._listening.close()
        self._listening = follow(trainer, self._capture, self._clipped)
        self._write(self._run_entry(args, state))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Watch the forward passes of a step that is to be probed."""
        assert self._capture is not None
        if (state.global_step + 1) % self.settings.every == 0:
            self._capture.arm()

    def on_pre_optimizer_step(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        model: Any,
        optimizer: Any,
        **_: Any,
    ) -> None:
        """The first half of the probe, at the weights before the step.

        Raises:
            InputError: the loss cannot be read.
            RunError: a number is not finite.
        """
        session, capture = self._session, self._capture
        assert session is not None and capture is not None
        number = state.global_step + 1
        if number % self.settings.every:
            return
        begin = time.perf_counter()
        capture.disarm()
        gradient = flat_gradient(session)
        norm = global_norm(gradient) if self._grad_norm is None else self._grad_norm
        floor = _floor_of(self._trainer)
        held = None if floor is None else floor.last
        if held is not None and held.grad_norm is not None:
            norm = held.grad_norm
        trained = self._gathered(capture)
        # Within `untouched` there are no gradients, and no padding.
        adam, padding = AdamState.of(torch_optimizer(optimizer)), padding_rows(model)
        with untouched(model):
            self._probe = probe_before(
                session,
                number=number,
                trained=trained,
                optimizer=adam,
                gradient=gradient,
                grad_norm=norm,
                clip_coefficient=clip_coefficient(args.max_grad_norm, norm),
                padding=padding,
                floor_weights=None if held is None else held.weights,
            )
        self._held = held
        self._seconds = time.perf_counter() - begin

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, *, model: Any, **_: Any
    ) -> None:
        """The second half, at the weights after the step.

        Raises:
            RunError: a number is not finite, or the ledger cannot be written.
        """
        session, probe = self._session, self._probe
        if probe is None:
            return
        assert session is not None
        begin = time.perf_counter()
        truth = self.settings.truth
        with untouched(model):
            probe_after(
                session, probe, truth=truth, second_order=self.settings.second_order
            )
        entry = step_entry(session, probe, truth=truth, top=self.settings.top)
        if self._held is not None:
            entry["floor"] = floor_entry(self._held, probe)
        entry["seconds"] = self._seconds + time.perf_counter() - begin
        self._probe = None
        self._check(entry)
        self._write(entry)
        self._unlogged = entry

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any
    ) -> None:
        """Add the values of the last probed step to what reporters are about to see."""
        entry, self._unlogged = self._unlogged, None
        if entry is not None and logs is not None:
            logs.update(logged_values(entry))
            _log_table(entry)

    def on_train_end(
        self, args: Any, state: Any, control: Any, *, model: Any, **_: Any
    ) -> None:
        """Measure the entropy that the training ended with; leave the trainer alone."""
        session = self._session
        if session is None:
            return
        with untouched(model):
            entropy = measured_entropy(session, state.global_step + 1)
        entry = entropy_entry(entropy, session.draws)
        self._write({"kind": "end", "step": state.global_step, "entropy": entry})
        self._listening.close()
        self._world.close()
        self._session = None

    def _clipped(self, norm: float) -> None:
        self._grad_norm = norm

    def _gathered(self, capture: BatchCapture) -> TrainedBatch:
        """The batch of all ranks, on every rank."""
        found = self._world.from_all_ranks(capture.rows)
        return TrainedBatch.of([row for of_rank in found for row in of_rank])

    def _run_entry(self, args: Any, state: Any) -> dict[str, Any]:
        session = self._session
        assert session is not None
        settings = {
            name: value if isinstance(value, (int, str, type(None))) else str(value)
            for name, value in vars(self.settings).items()
        }
        return {
            "kind": "run",
            "version": entropy_ddp.__version__,
            "first_step": state.global_step + 1,
            "steps": state.max_steps,
            "settings": settings,
            "trainer": {
                "class": type(self._trainer).__name__,
                "loss_type": getattr(args, "loss_type", None),
                "learning_rate": args.learning_rate,
                "max_grad_norm": args.max_grad_norm,
                "temperature": session.config.objective.temperature,
                "world_size": self._world.world_size,
                "dtype": session.config.precision.model,
                "parameters": session.passes.layout.numel,
            },
        }

    def _write(self, entry: dict[str, Any]) -> None:
        if self._world.is_main:
            append_line(self.folder, entry)

    def _check(self, entry: dict[str, Any]) -> None:
        """Warn, once for each reason, where a number is not what it should be."""
        checks = entry["checks"]
        if checks.get("identity_gap", 0.0) > IDENTITY_TOLERANCE:
            self._warn(
                "identity",
                f"step {entry['step']}: the gradient's part is {checks['identity']:.5g} "
                "times the sum of the tokens' shares, expected 1: dropout, mixed "
                "precision or a part of the loss that is not of the tokens; the "
                "difference is listed as `unattributed`",
            )
        if checks["step_gap"] > STEP_TOLERANCE:
            self._warn(
                "step",
                f"step {entry['step']}: the optimizer's step is "
                f"{checks['step_gap']:.1e} away from AdamW's formula: a hook, a clipping "
                "by value or another optimizer changed it",
            )

    def _warn(self, reason: str, message: str) -> None:
        if reason not in self._warned and self._world.is_main:
            self._warned.add(reason)
            logger.warning("entropy probe: %s (said once)", message)


def _floor_of(trainer: Any) -> EntropyFloor | None:
    """What holds the entropy of this training, if anything does."""
    callbacks = trainer.callback_handler.callbacks
    return next((found for found in callbacks if isinstance(found, EntropyFloor)), None)


def _log_table(entry: dict[str, Any]) -> None:
    """The most influential tokens as a table, where Weights & Biases has a run."""
    wandb = sys.modules.get("wandb")
    if wandb is None or getattr(wandb, "run", None) is None:
        return
    columns = ["share", "logp", "entropy", "advantage", "token", "context"]
    table = wandb.Table(columns=columns)
    for row in entry["top_tokens"]:
        before, token, after = row["context"]
        values = [row[name] for name in columns[:4]]
        table.add_data(*values, token, f"{before}[{token}]{after}")
    wandb.log({f"{PREFIX}top_tokens": table}, commit=False)
