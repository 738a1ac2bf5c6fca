"""`EntropyFloor`: a training whose entropy does not fall below a floor.

    floor = EntropyFloor(0.5)
    trainer = GRPOTrainer(...)
    floor.attach(trainer)
    trainer.train()

For TRL's GRPOTrainer with Adam or AdamW. A step that would lower the entropy too much has
its tokens weighed otherwise, by one parameter of a family of weights: penalties on
improbable failures are softened, and in one family improbable successes boosted. Nothing
is added to the loss, and a step that needs no correction is the plain training's, bit for
bit. `floor_step` has the formulas.

With `mode="feedback"` no pass is added: the parameter is doubled while the entropy is
below the floor and halved while it is above, and weighs the tokens of every step.
"""

import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import TrainerCallback

from entropy_ddp.distributed import World, joined_world
from entropy_ddp.errors import InputError, RunError
from entropy_ddp.estimators.holding import FAMILIES
from entropy_ddp.model.parameters import global_norm, has_dropout
from entropy_ddp.probe.session import Session
from entropy_ddp.training.capture import BatchCapture, TrainedBatch, follow, listen
from entropy_ddp.training.floor_step import (
    STRONGEST,
    entropy_gradient,
    hold,
    token_entropy,
)
from entropy_ddp.training.live_session import (
    batch_config,
    open_live_session,
    require_probable,
    torch_optimizer,
)
from entropy_ddp.training.recorder import FOREIGN, RolloutRecorder, is_grpo_trainer
from entropy_ddp.training.step_probe import flat_gradient
from entropy_ddp.training.untouched import padding_rows, untouched
from entropy_ddp.update.decomposition import AdamState

logger = logging.getLogger(__name__)

Family = Literal["repo", "improbable_failures"]
Mode = Literal["first_order", "feedback"]
Schedule = Callable[[int], float]
PREFIX = "entropy_floor/"
# How the parameter of each family is logged.
PARAMETER = {"repo": "zeta", "improbable_failures": "weight"}
# Of the way from neutral to the strongest parameter, by feedback: at first, and at least.
FIRST_FRACTION, LEAST_FRACTION = 0.01, 0.001


@dataclass(frozen=True, kw_only=True)
class FloorStep:
    """What the floor did at one optimizer step; nats per token.

    Attributes:
        step: its number, from 1.
        floor: the entropy to be held.
        measured: entropy of the batch, before the step.
        parameter: of the family of weights that the step was taken with.
        saturated: whether the parameter is at its limit and the entropy not held.
        wanted: least change of the entropy; None by feedback, as the next two.
        predicted_plain: first-order change of the plain step.
        predicted: first-order change of the step that is taken.
        seconds: wall-clock seconds that it took.
        weights: w of each token of the batch; None where nothing was changed, or where
            the trainer's own backward pass had them.
        grad_norm: norm of the gradient before clipping; None by feedback.
    """

    step: int
    floor: float
    measured: float
    parameter: float
    saturated: bool
    wanted: float | None = None
    predicted_plain: float | None = None
    predicted: float | None = None
    seconds: float = 0.0
    weights: Tensor | None = None
    grad_norm: float | None = None


class EntropyFloor(TrainerCallback):
    """Holds the entropy of a training above a floor, and logs `entropy_floor/...`.

    Args:
        floor: nats per token, or what gives them for each optimizer step, from 1.
        family: which tokens carry the correction, a name of `estimators.holding`.
        mode: "first_order" solves for the parameter at every step; "feedback" doubles
            and halves it.
        rate: share of the entropy's distance from the floor that one step may make good,
            or use up.
        cap: most that one step is to raise the entropy by, nats.
        memory: of the gradient of the entropy, from step to step.
        tokens_per_microbatch: budget of padded tokens of one forward pass.

    Raises:
        InputError: a setting is out of its range.
    """

    def __init__(
        self,
        floor: float | Schedule,
        *,
        family: Family = "repo",
        mode: Mode = "first_order",
        rate: float = 0.1,
        cap: float = 0.02,
        memory: float = 0.9,
        tokens_per_microbatch: int = 8192,
    ) -> None:
        _require(family in get_args(Family), "family", get_args(Family), family)
        _require(mode in get_args(Mode), "mode", get_args(Mode), mode)
        _require(0 < rate <= 1, "rate", "a number above 0, at most 1", rate)
        _require(cap > 0, "cap", "a number of nats above 0", cap)
        _require(0 <= memory < 1, "memory", "a number from 0, below 1", memory)
        _require(
            isinstance(tokens_per_microbatch, int) and tokens_per_microbatch > 0,
            "tokens_per_microbatch",
            "a whole number of at least 1",
            tokens_per_microbatch,
        )
        self._floor = floor
        if not callable(floor):
            _require_floor(floor, "floor")
        self.family, self.mode = family, mode
        self._rate, self._cap, self._memory = rate, cap, memory
        self._tokens_per_microbatch = tokens_per_microbatch
        self._trainer: Any = None
        self._session: Session | None = None
        self._capture: BatchCapture | None = None
        self._world = World()
        self._listening = ExitStack()
        self._slope: Tensor | None = None
        self._fraction = FIRST_FRACTION
        self._grad_norm: float | None = None
        self._is_judged = self._is_warned = False
        self._unlogged: list[FloorStep] = []
        # What was done at the step that is about to be taken, or was; None of a step
        # without response tokens.
        self.last: FloorStep | None = None

    def attach(self, trainer: Any) -> None:
        """Make this the first of a trainer's callbacks: a probe sees what it changed.

        Raises:
            InputError: it is no GRPOTrainer of TRL's, or the floor is another trainer's.
        """
        if not is_grpo_trainer(trainer):
            raise InputError(
                "entropy floor: expected TRL's GRPOTrainer, found "
                f"{type(trainer).__name__}; train without the callback"
            )
        if self._trainer not in (None, trainer) and self in _callbacks_of(
            self._trainer, EntropyFloor
        ):
            raise InputError(
                "entropy floor: expected a floor of this trainer alone, found one that "
                "is attached to another trainer; make a floor for each"
            )
        self._trainer = trainer
        handler = trainer.callback_handler
        if self in handler.callbacks:
            handler.callbacks.remove(self)
        handler.callbacks.insert(0, self)

    def floor_at(self, step: int) -> float:
        """The floor at an optimizer step, from 1; nats per token.

        Raises:
            InputError: the schedule gives no entropy.
        """
        if not callable(self._floor):
            return self._floor
        found = self._floor(step)
        _require_floor(found, f"floor of step {step}")
        return found

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse what cannot be held; verify the model.

        Raises:
            InputError: it cannot.
        """
        trainer = self._trainer
        if trainer is None:
            raise InputError(
                "entropy floor: expected a trainer, found none; call "
                "floor.attach(trainer) before trainer.train()"
            )
        self._require_holdable(trainer)
        # What an earlier training left when it failed.
        self._listening.close()
        self._slope, self._fraction, self.last = None, FIRST_FRACTION, None
        self._grad_norm, self._is_judged, self._is_warned = None, False, False
        self._unlogged = []
        self._world = joined_world()
        if self.mode == "first_order":
            config = batch_config(trainer, self._tokens_per_microbatch)
            self._session = open_live_session(trainer, config, self._world)
        self._capture = BatchCapture(
            model=trainer.model,
            num_ranks=self._world.world_size,
            draw_size=trainer.num_generations,
            reweigh=self._weights if self.mode == "feedback" else None,
        )
        self._listening = follow(trainer, self._capture, self._clipped)
        self._listening.callback(listen(trainer, "compute_loss", before=_require_text))
        if self._world.is_main and _callbacks_of(trainer, RolloutRecorder):
            logger.warning(
                "entropy floor: a recorded batch has no weights of a floor; a probe of it "
                "takes the step that would have been taken without one"
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Watch the forward passes of the step."""
        assert self._capture is not None
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
        """Measure the entropy, and change the gradient where the step needs it.

        A step without response tokens is left alone.

        Raises:
            InputError: the loss cannot be read.
            RunError: a number is not finite.
        """
        capture = self._capture
        assert capture is not None
        begin = time.perf_counter()
        capture.disarm()
        number = state.global_step + 1
        floor = self.floor_at(number)
        if self.mode == "feedback":
            taken = self._fed_back(number, floor, capture)
        else:
            taken = self._held(number, floor, capture, args.max_grad_norm, optimizer)
        self.last = taken
        if taken is None:
            self._warn_of_no_tokens(number)
            return
        self._judge_schedule(taken, state.max_steps)
        seconds = time.perf_counter() - begin
        self.last = taken = replace(taken, seconds=seconds)
        # Weights of all tokens are not kept for the log.
        self._unlogged.append(replace(taken, weights=None))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any
    ) -> None:
        """Add means over the steps since the last log to what reporters will see.

        Not to the log of an evaluation, which is of no steps.
        """
        if logs is None or any(name.startswith("eval_") for name in logs):
            return
        steps, self._unlogged = self._unlogged, []
        if steps:
            logs.update(_logged_values(steps, self.family))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the trainer alone."""
        self._listening.close()
        self._world.close()
        self._session = self._slope = None

    def _require_holdable(self, trainer: Any) -> None:
        """Refuse a loss whose gradient by log p is not the policy's alone."""
        require_probable(trainer, "entropy floor")
        args = trainer.args
        obstacles = {
            f"beta is {args.beta}, and the weights would scale the KL term's gradient "
            "like the policy's": args.beta,
            "entropy_coef or use_adaptive_entropy adds an entropy bonus, a second "
            "control of the same entropy": (
                getattr(args, "entropy_coef", 0.0)
                or getattr(args, "use_adaptive_entropy", False)
            ),
            "dropout makes the network that is trained another than the policy": (
                has_dropout(trainer.model)
            ),
            "responses that hold the results of tools have tokens that the policy did "
            "not choose": bool(getattr(trainer, "tools", None)),
            "another floor is attached, and each would correct what the other did": (
                len(_callbacks_of(trainer, EntropyFloor)) > 1
            ),
        }
        for sentence, is_there in obstacles.items():
            if is_there:
                raise InputError(
                    f"entropy floor: {sentence}; change the trainer's settings, or "
                    "train without the callback"
                )

    def _clipped(self, norm: float) -> None:
        self._grad_norm = norm

    def _weights(self, logp: Tensor, advantage: Tensor) -> Tensor:
        """w of the tokens of a microbatch, by feedback."""
        return FAMILIES[self.family].weight(logp, advantage, self._parameter)

    @property
    def _parameter(self) -> float:
        neutral = FAMILIES[self.family].neutral
        return neutral + self._fraction * (STRONGEST[self.family] - neutral)

    def _fed_back(
        self, number: int, floor: float, capture: BatchCapture
    ) -> FloorStep | None:
        """Measure, and choose the parameter of the next step; None without tokens."""
        sums = sum(self._world.from_all_ranks(capture.entropy_sums), torch.zeros(2))
        entropy, count = sums.tolist()
        if not count:
            return None
        measured, parameter = entropy / count, self._parameter
        if not math.isfinite(measured):
            raise RunError(
                f"entropy floor: the entropy of the batch is {measured}, expected a "
                "finite one; train without the callback to see where it comes from"
            )
        at_limit = self._fraction == 1.0
        if measured < floor:
            self._fraction = min(2 * self._fraction, 1.0)
        else:
            self._fraction = max(self._fraction / 2, LEAST_FRACTION)
        return FloorStep(
            step=number,
            floor=floor,
            measured=measured,
            parameter=parameter,
            saturated=at_limit and measured < floor,
        )

    def _held(
        self,
        number: int,
        floor: float,
        capture: BatchCapture,
        max_grad_norm: float | None,
        optimizer: Any,
    ) -> FloorStep | None:
        """Measure, foresee the step, and change the gradient where it is not enough.

        None of a batch without response tokens.
        """
        session = self._session
        assert session is not None
        found = self._world.from_all_ranks(capture.rows)
        trained = TrainedBatch.of([row for of_rank in found for row in of_rank])
        entropy = token_entropy(trained)
        if not len(entropy):
            return None
        measured = float(entropy.mean())
        session.batches = {"U": trained.batch}
        gradient = flat_gradient(session)
        norm = global_norm(gradient) if self._grad_norm is None else self._grad_norm
        model = session.policy.model
        # Within `untouched` there are no gradients, and no padding.
        adam, padding = AdamState.of(torch_optimizer(optimizer)), padding_rows(model)
        want = min(self._cap, self._rate * (floor - measured))
        with untouched(model):
            slope = self._remembered(entropy_gradient(session, trained, entropy))
            correction = hold(
                session,
                trained,
                adam,
                slope=slope,
                gradient=gradient,
                grad_norm=norm,
                max_grad_norm=max_grad_norm,
                want=want,
                family=self.family,
                padding=padding,
            )
        _put_gradient(session, correction.gradient)
        return FloorStep(
            step=number,
            floor=floor,
            measured=measured,
            parameter=correction.parameter,
            saturated=correction.saturated,
            wanted=want,
            predicted_plain=correction.predicted_plain,
            predicted=correction.predicted,
            weights=correction.weights,
            grad_norm=correction.grad_norm,
        )

    def _remembered(self, slope: Tensor) -> Tensor:
        """G, with the gradient of this step's entropy in it."""
        if self._slope is None:
            self._slope = slope
        else:
            self._slope.mul_(self._memory).add_(slope, alpha=1 - self._memory)
        return self._slope

    def _warn_of_no_tokens(self, number: int) -> None:
        if not self._is_warned and self._world.is_main:
            logger.warning(
                "entropy floor: the batch of step %d has no response tokens (were all "
                "responses masked?); such steps are left alone (said once)",
                number,
            )
        self._is_warned = True

    def _judge_schedule(self, taken: FloorStep, max_steps: int) -> None:
        """Say, once, where the floor is above the entropy that the training began with."""
        if self._is_judged:
            return
        self._is_judged = True
        floors = {n: self.floor_at(n) for n in range(taken.step, max_steps + 1)}
        highest = max(floors, key=floors.__getitem__)
        if floors[highest] > taken.measured and self._world.is_main:
            logger.warning(
                "entropy floor: the floor of step %d is %.4g nats per token, above the "
                "%.4g of the first batch: the weights are made to hold an entropy, and "
                "may not raise it so far; see `saturated` in the logs",
                highest, floors[highest], taken.measured,
            )  # fmt: skip


def _callbacks_of(trainer: Any, kind: type) -> list[Any]:
    return [c for c in trainer.callback_handler.callbacks if isinstance(c, kind)]


def _require_text(model: Any, inputs: Any, *_: Any, **__: Any) -> None:
    """Refuse a batch whose sequences are more than prompts and sampled responses."""
    for name, what in FOREIGN.items():
        if inputs.get(name) is not None:
            raise InputError(
                "entropy floor: expected a batch of prompts and responses that the "
                f"policy sampled, found {what} (`{name}`); train without the callback"
            )


def _put_gradient(session: Session, gradient: Tensor | None) -> None:
    """Step with this gradient; None leaves the trainer's, bit for bit."""
    if gradient is None:
        return
    parameters = session.passes.parameters
    for name, view in session.passes.layout.views(gradient).items():
        # Not a new tensor: it may be a view of a bucket that ranks reduce.
        held = parameters[name].grad
        if held is not None:
            held.copy_(view)


def _logged_values(steps: list[FloorStep], family: str) -> dict[str, float]:
    """Means over steps, by the names that they are logged under."""
    names = {
        "floor": "floor",
        "measured": "measured",
        "wanted": "wanted",
        "predicted_plain": "predicted_plain",
        "predicted": "predicted",
        PARAMETER[family]: "parameter",
        "saturated": "saturated",
        "seconds": "seconds",
    }
    values = {}
    for name, attribute in names.items():
        found = [getattr(step, attribute) for step in steps]
        if None not in found:
            values[PREFIX + name] = sum(map(float, found)) / len(found)
    return values


def _require(is_right: bool, name: str, expected: Any, found: Any) -> None:
    if not is_right:
        raise InputError(
            f"{name}: expected {expected}, found {found!r}; correct the floor's settings"
        )


def _require_floor(floor: Any, name: str) -> None:
    is_number = isinstance(floor, (int, float)) and not isinstance(floor, bool)
    is_right = is_number and math.isfinite(floor) and floor >= 0
    _require(is_right, name, "an entropy of nats per token, at least 0", floor)
