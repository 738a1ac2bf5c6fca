"""Tiny checkpoints with batches, probed in this process, and their naive step."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import reference as ref
import torch
from checkpoints import Saved, run_config, save_checkpoint, write_rows
from jobs import run_probe
from reference import LossSettings, Row
from torch import Tensor, nn

from entropy_ddp.config import Config
from entropy_ddp.data.batch import Batch
from entropy_ddp.data.files import make_batch
from entropy_ddp.data.rows import TokenLimits
from entropy_ddp.distributed import World
from entropy_ddp.model.parameters import trainable_parameters
from entropy_ddp.model.response_tokens import ResponseTokens, ScoringSettings
from entropy_ddp.model.scoring import Passes
from entropy_ddp.probe.opening import open_session
from entropy_ddp.probe.session import Session
from entropy_ddp.results import Probed

E_RESPONSES = [1, 2, 3, 1, 2, 1]
U_RESPONSES = [2, 3, 2]
SAMPLER_NOISE = 0.3  # in nats: ratios leave [0.8, 1.2] on every second token


@dataclass(frozen=True, kw_only=True)
class NaiveStep:
    """One AdamW step on U as the reference takes it.

    `delta` is the change of every parameter by name.
    """

    delta: dict[str, Tensor]
    grad_norm: float
    clip_coef: float


@dataclass(frozen=True, kw_only=True, eq=False)
class TinyRun:
    """A checkpoint on disk with an evaluation and an update batch.

    Runs compare by identity, so that what is expected of one can be remembered.
    """

    saved: Saved
    E: list[Row]
    U: list[Row]
    folder: Path

    def config(self, **sections: Any) -> Config:
        """A float64 configuration, with these sections replaced or added.

        What U's sampler recorded is of other weights: it is given where the ratio of
        the two asks for it.
        """
        update = self.U
        if sections.get("update", {}).get("ratio") != "clipped":
            update = [replace(row, sampling_logprobs=None) for row in update]
        files = [
            write_rows(self.folder / f"{split}.jsonl", rows)
            for split, rows in (("E", self.E), ("U", update))
        ]
        return Config.model_validate(run_config(self.saved, *files) | sections)

    def open(self, **sections: Any) -> Session:
        """A session on one rank."""
        return open_session(self.config(**sections), World(), None, _quiet)

    def probe(self, **sections: Any) -> Probed:
        """A whole probe on one rank."""
        return run_probe(self.config(**sections), World(), None, _quiet)

    def gradient(
        self, settings: LossSettings, advantage: str = "centered"
    ) -> dict[str, Tensor]:
        """Gradient of the reference's loss on U, by name."""
        parameters = ref.trainable(self.saved.model)
        advantages = [0.0] * len(self.U)
        if settings.loss != "nll":
            advantages = ref.advantages(self.U, advantage)
        loss = ref.rl_loss(self.saved.model, self.U, advantages, settings)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        return dict(zip(parameters, gradients, strict=True))

    def naive_step(
        self,
        settings: LossSettings,
        *,
        max_grad_norm: float,
        learning_rate: float | None = None,
        advantage: str = "centered",
    ) -> NaiveStep:
        """The step by the reference's own AdamW, from the saved state by name."""
        parameters = ref.trainable(self.saved.model)
        name_of = {id(parameter): name for name, parameter in parameters.items()}
        optimizer = self.saved.optimizer
        gradients, norm, coefficient = ref.clip_gradients(
            self.gradient(settings, advantage), max_grad_norm
        )
        groups = [
            {
                "names": [name_of[id(p)] for p in group["params"]],
                "lr": learning_rate or group["lr"],
                "betas": group["betas"],
                "eps": group["eps"],
                "weight_decay": group["weight_decay"],
            }
            for group in optimizer.param_groups
        ]
        state = {name_of[id(p)]: entry for p, entry in optimizer.state.items()}
        after, _ = ref.adamw_step_naive(parameters, gradients, state, groups)
        delta = {n: after[n] - p.detach() for n, p in parameters.items()}
        return NaiveStep(delta=delta, grad_norm=norm, clip_coef=coefficient)

    def torch_step(
        self,
        settings: LossSettings,
        *,
        max_grad_norm: float,
        learning_rate: float | None = None,
    ) -> dict[str, Tensor]:
        """Change of every parameter by torch's AdamW, as a training loop calls it."""
        model, optimizer = copy.deepcopy((self.saved.model, self.saved.optimizer))
        parameters = ref.trainable(model)
        for name, gradient in self.gradient(settings).items():
            parameters[name].grad = gradient.clone()
        if max_grad_norm:
            nn.utils.clip_grad_norm_(parameters.values(), max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate or group["lr"]
        optimizer.step()
        before = ref.trainable(self.saved.model)
        return {n: (p - before[n]).detach() for n, p in parameters.items()}


def _quiet(phase: str, done: int, total: int) -> None:
    """Shows no progress."""


def make_run(
    root: Path,
    family: str,
    *,
    targets: Sequence[str] | None = None,
    full: bool = False,
) -> TinyRun:
    """Write a checkpoint and two ragged batches, some responses empty."""
    saved = save_checkpoint(root, family, targets=targets, full=full)
    vocabulary = saved.model.config.vocab_size
    evaluation, update = (
        ref.random_rows(
            seed, responses=responses, groups=len(responses),
            vocabulary=vocabulary, with_empty=True,
        )
        for seed, responses in ((3, E_RESPONSES), (4, U_RESPONSES))
    )  # fmt: skip
    evaluation = ref.drawn_from(saved.model, evaluation, 6)
    update = ref.with_sampling_logprobs(saved.model, update, 5, noise=SAMPLER_NOISE)
    return TinyRun(saved=saved, E=evaluation, U=update, folder=root)


def as_batch(rows: Sequence[Row], vocabulary: int, split: str = "E") -> Batch:
    """The batch that a file of these rows is read as."""
    documents = (
        {key: value for key, value in vars(row).items() if value is not None}
        for row in rows
    )
    limits = TokenLimits(vocabulary_size=vocabulary, max_positions=None)
    return make_batch(documents, "rows", split, limits)


def make_passes(model: nn.Module, **settings: Any) -> Passes:
    """Both passes over a model in this process."""
    tokens = ResponseTokens(model, ScoringSettings(**settings))
    return Passes(
        tokens=tokens,
        wrapped=tokens,
        parameters=trainable_parameters(model),
        dtype=next(model.parameters()).dtype,
        device=torch.device("cpu"),
    )
