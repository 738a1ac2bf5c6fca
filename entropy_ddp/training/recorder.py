"""`RolloutRecorder`: the batch of every optimizer step of a training, as it was sampled.

    recorder = RolloutRecorder(out="runs/mine/rollouts")
    trainer = GRPOTrainer(...)
    recorder.attach(trainer)
    trainer.train()

writes one rollout file a step, `U-{step:06d}.jsonl.gz`: that of step N + 1 is the batch
of the step that is taken from checkpoint-N. Its rows are what the trainer's loss was
given: token ids, advantages, rewards, log-probabilities; nothing is tokenised again and
nothing is computed. For TRL's GRPOTrainer.

A group is a run of `num_generations` responses in the order of sampling, so a prompt that
was drawn twice makes two groups. `sampling_logprobs` are, in this order,

1. what the loss takes its ratio to (TRL's `old_per_token_logps`),
2. the inference engine's (`sampling_per_token_logps`), where the loss has no ratio,
3. those of the loss's own forward pass, where the trainer samples from the model itself
   and steps at once: the policy's, at the weights that it sampled with. Not where dropout
   makes them another model's.

A response that the loss leaves out (`mask_truncated_completions`) has no response token:
it counts in the loss's mean over responses and in nothing else. Its ids are kept under
`masked_response_ids`.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from entropy_ddp.data.jsonlines import write_jsonl
from entropy_ddp.distributed import World, joined_world
from entropy_ddp.errors import InputError
from entropy_ddp.model.parameters import has_dropout
from entropy_ddp.training.capture import (
    ORDER,
    SAMPLING,
    listen,
    sampling_order,
)

Which = Literal["step", "checkpoint"]
TRAINER = "GRPOTrainer"
# What a batch carries beside the trainer's own tensors, from sampling to the loss.
REWARDS = "entropy_ddp_rewards"
# What is kept beside them: log p of the loss's own forward pass.
OWN_LOGP = "entropy_ddp_logp"
# What a batch has in it whose sequences are more than a prompt and a response.
FOREIGN = {
    "tool_mask": "responses that hold the results of tools",
    "pixel_values": "images",
}
RolloutRow = dict[str, Any]


def batch_file(folder: Path, step: int) -> Path:
    """The file of a step in a folder of recorded batches."""
    return folder / f"U-{step:06d}.jsonl.gz"


class RolloutRecorder(TrainerCallback):
    """Writes the batch of every optimizer step into a rollout file of its own.

    Args:
        out: folder of the files; it is made.
        every: "step", or "checkpoint" for the steps right after a checkpoint alone.

    Raises:
        InputError: `every` is neither.
    """

    def __init__(self, out: str | Path, *, every: Which = "step") -> None:
        if every not in get_args(Which):
            raise InputError(
                f"every: expected 'step' or 'checkpoint', found {every!r}; 'checkpoint' "
                "records the steps right after a checkpoint"
            )
        self.folder = Path(out)
        self.every = every
        self._trainer: Any = None
        self._world = World()
        self._follows_checkpoint = False
        self._is_recording = False
        self._number: Callable[[dict[str, Any]], None] | None = None
        self._rewards: Tensor | None = None
        self._open: dict[str, Any] | None = None
        self._microbatches: list[dict[str, Any]] = []
        self._listening = ExitStack()

    def attach(self, trainer: Any) -> None:
        """Record this trainer's batches.

        Raises:
            InputError: it is another trainer.
        """
        if not is_grpo_trainer(trainer):
            raise InputError(
                f"RolloutRecorder: expected TRL's {TRAINER}, found "
                f"{type(trainer).__name__}; write its rollouts in the format of "
                "docs/files.md, or import its dump with `entropy-ddp import`"
            )
        self._trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)

    def file(self, step: int) -> Path:
        """Where the batch of a step is written: of step N + 1 for checkpoint-N."""
        return batch_file(self.folder, step)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Listen to the trainer.

        Raises:
            InputError: there is no trainer, or there are another training's files.
        """
        trainer = self._trainer
        if trainer is None:
            raise InputError(
                "RolloutRecorder: expected a trainer, found none; call "
                "recorder.attach(trainer) before trainer.train()"
            )
        old = sorted(self.folder.glob("U-*.jsonl.gz"))
        if old and state.global_step == 0:
            raise InputError(
                f"{old[0]}: expected no rollouts for a training that begins, found "
                f"{len(old)} files; give the recorder another `out`, or remove them"
            )
        self._world = joined_world()
        self._follows_checkpoint = state.global_step > 0
        # What an earlier training left when it failed.
        self._listening.close()
        self._microbatches = []
        self._number = sampling_order(trainer)
        for name, heard in (
            ("_calculate_rewards", {"after": self._on_rewards}),
            (SAMPLING, {"after": self._on_sampled}),
            ("_get_per_token_logps_and_entropies", {"after": self._on_logp}),
            ("compute_loss", {"before": self._before_loss, "after": self._after_loss}),
        ):
            self._listening.callback(listen(trainer, name, **heard))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin an empty batch, if this step's is to be recorded."""
        self._microbatches = []
        self._is_recording = self.every == "step" or self._follows_checkpoint
        self._follows_checkpoint = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the batch of the step that was taken.

        Raises:
            InputError: its sequences are more than prompts and responses.
            RunError: the file cannot be written.
        """
        if not self._is_recording:
            return
        self._is_recording = False
        rows = self._gathered(state.global_step)
        self._microbatches = []
        if self._world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_jsonl(self.file(state.global_step), rows)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The next step is taken from a checkpoint."""
        self._follows_checkpoint = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the trainer alone."""
        self._listening.close()
        self._world.close()

    def _on_rewards(self, rewards: Tensor) -> None:
        self._rewards = rewards

    def _on_sampled(self, batch: dict[str, Any]) -> None:
        """Give the rows their place and their rewards, before the trainer mixes them."""
        trainer, rewards = self._trainer, self._rewards
        assert self._number is not None
        if not trainer.model.training or rewards is None:
            return
        self._number(batch)
        size = len(batch["completion_ids"])
        first = trainer.accelerator.process_index * size
        batch[REWARDS] = rewards[first : first + size].cpu()
        self._rewards = None

    def _before_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> None:
        self._open = None
        if self._is_recording and model.training:
            self._open = dict(inputs)
            self._microbatches.append(self._open)

    def _after_loss(self, _: Any) -> None:
        self._open = None

    def _on_logp(self, result: Any) -> None:
        if self._open is not None and torch.is_grad_enabled():
            self._open[OWN_LOGP] = result[0].detach()

    def _gathered(self, step: int) -> list[RolloutRow]:
        """The rows of all ranks in the order of sampling."""
        rows: dict[int, RolloutRow] = {}
        for of_rank in self._world.from_all_ranks(lambda: self._rows(step)):
            rows |= of_rank
        return _with_groups(rows, self._trainer.num_generations)

    def _rows(self, step: int) -> dict[int, RolloutRow]:
        """This rank's rows by their place in the order of sampling."""
        trainer = self._trainer
        exact = not has_dropout(trainer.model)
        rows = {}
        for batch in self._microbatches:
            _require_text(batch)
            if not exact:
                batch.pop(OWN_LOGP, None)
            for number, place in enumerate(batch[ORDER].tolist()):
                row = _row(batch, number, trainer)
                rewards = batch[REWARDS][number].double()
                rows[place] = row | _scored(rewards, trainer) | {"step": step}
        return rows


def is_grpo_trainer(trainer: Any) -> bool:
    """Whether it is TRL's trainer, or derived from it."""
    classes = type(trainer).__mro__
    return any(c.__name__ == TRAINER and c.__module__[:3] == "trl" for c in classes)


def _require_text(inputs: dict[str, Any]) -> None:
    found = [what for name, what in FOREIGN.items() if inputs.get(name) is not None]
    if REWARDS not in inputs:
        found.append("rows that did not come from the trainer's own sampling")
    elif inputs["advantages"].dim() != 1:
        found.append("advantages by token")
    if found:
        raise InputError(
            "RolloutRecorder: expected a batch of prompts, responses and one advantage "
            f"for each, found {found[0]}, which a rollout file cannot hold; train "
            "without the recorder"
        )


def _end_ids(trainer: Any) -> list[int]:
    """The tokens that end a response; releases of TRL differ in how many they know."""
    several = getattr(trainer, "eos_token_ids", None)
    return [trainer.eos_token_id] if several is None else list(several)


def _row(inputs: dict[str, Any], number: int, trainer: Any) -> RolloutRow:
    """One sequence of a microbatch, without what its group and rewards say."""
    prompt_ids, prompt_mask, ids, mask = (
        inputs[name][number].cpu()
        for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    )
    counted = mask.bool()
    response = ids[counted].tolist()
    row: RolloutRow = {
        "prompt_ids": prompt_ids[prompt_mask.bool()].tolist(),
        "response_ids": response,
        "advantage": float(inputs["advantages"][number]),
        "finished": bool(response) and response[-1] in _end_ids(trainer),
    }
    if not response:
        padding = trainer.processing_class.pad_token_id
        # A truncated response does not end in a padding token of its own.
        last = (ids != padding).nonzero()[-1:].sum()
        row["masked_response_ids"] = ids[: int(last) + 1].tolist()
    for name in ("old_per_token_logps", "sampling_per_token_logps", OWN_LOGP):
        values = inputs.get(name)
        if values is not None:
            logprobs = values[number].double().cpu()[counted]
            if bool(logprobs.isfinite().all()):
                row["sampling_logprobs"] = logprobs.tolist()
            break
    return row


def _scored(rewards: Tensor, trainer: Any) -> RolloutRow:
    """The weighted sum of the rewards, as TRL logs it; a response may have none."""
    if bool(rewards.isnan().all()):
        return {}
    weights = trainer.reward_weights.double().cpu()
    row: RolloutRow = {"reward": float((rewards * weights).nansum())}
    names = trainer.reward_func_names
    if len(names) > 1:
        values = [None if math.isnan(v) else v for v in rewards.tolist()]
        row["rewards"] = dict(zip(names, values))
    return row


def _with_groups(rows: dict[int, RolloutRow], num_generations: int) -> list[RolloutRow]:
    """The rows in order, those of one draw of a prompt in one group, from 0."""
    numbers: dict[int, int] = {}
    return [
        {"group": numbers.setdefault(place // num_generations, len(numbers))}
        | rows[place]
        for place in sorted(rows)
    ]
