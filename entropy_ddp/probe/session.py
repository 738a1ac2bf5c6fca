"""One run on one rank: what was opened, and how a pass is done, timed and kept."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

import torch
from torch import Tensor

from entropy_ddp.checkpoint.policy import Policy
from entropy_ddp.config import Config, Sample
from entropy_ddp.data.batch import Batch, Shard
from entropy_ddp.distributed import World
from entropy_ddp.errors import RunError
from entropy_ddp.estimators.baselines import NUM_FOLDS, folds_of
from entropy_ddp.estimators.standard_errors import Draws
from entropy_ddp.memory import Allowance, MemoryEstimate
from entropy_ddp.model.scoring import Passes
from entropy_ddp.model.selfcheck import SelfCheck, SharingCheck
from entropy_ddp.probe.resume import PassResult, Unfinished
from entropy_ddp.sampling.rollouts import SamplingPlan


class Progress(Protocol):
    """What is told how far a phase is."""

    def __call__(
        self, name: str, done: int, total: int, unit: str = ..., tokens: int = ..., /
    ) -> None:
        """Take notice.

        Args:
            name: the phase.
            done: units done by this rank.
            total: units that this rank has to do; 0 if not known.
            unit: what is counted; response tokens, if it is not said.
            tokens: response tokens done, where something else is counted.
        """


def no_progress(
    name: str, done: int, total: int, unit: str = "tokens", tokens: int = 0, /
) -> None:
    """Tells nobody how far a phase is."""


@dataclass(kw_only=True)
class Session:
    """One run on one rank.

    Attributes:
        config: the resolved configuration.
        world: the ranks.
        policy: the opened checkpoint.
        passes: both passes over the model.
        optimizer: AdamW in its saved state; None until it is read, or with a change.
        change: Delta theta of `update.delta`, flat, [P]; None for a step.
        batches: E and U, whole, by split.
        reference_logp: log p of this rank's tokens of U under the reference policy, [t];
            None if the loss has no KL term.
        progress: told how far the current phase is.
        started: when the run began.
        seconds: wall-clock seconds of each finished phase.
        self_checks: what was verified of the model.
        sharing: whether responses to one prompt may share a row; None if not asked.
        plans: what is ready for the batches that are to be sampled, by split.
        num_redraws: groups of U or E that were sampled again, by split.
        responses: how many responses of one call fit into memory, as far as is known.
        memory: what the run was estimated to need; None until then.
        unfinished: what finished passes leave; None where nothing is kept.
    """

    config: Config
    world: World
    policy: Policy
    passes: Passes
    progress: Progress
    optimizer: torch.optim.Adam | None = None
    change: torch.Tensor | None = None
    batches: dict[str, Batch] = field(default_factory=dict)
    reference_logp: Tensor | None = None
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    seconds: dict[str, float] = field(default_factory=dict)
    self_checks: list[SelfCheck] = field(default_factory=list)
    sharing: SharingCheck | None = None
    plans: dict[str, SamplingPlan] = field(default_factory=dict)
    num_redraws: dict[str, int] = field(default_factory=dict)
    responses: Allowance = field(default_factory=Allowance)
    memory: MemoryEstimate | None = None
    unfinished: Unfinished | None = None

    def shard(self, split: str) -> Shard:
        """This rank's share of E or U."""
        batch = self.batches[split]
        return batch.shard(self.world.rank, self.world.world_size)

    def first_sequences(self, count: int) -> Shard:
        """This rank's share of the first sequences of E, the same at every world size.

        They are the first of its sequences, and their tokens the first in its token
        arrays.
        """
        whole = self.shard("E")
        sample = whole.batch.first(count)
        if sample is whole.batch:
            return whole
        positions = whole.positions[whole.positions < len(sample)]
        return Shard(batch=sample, positions=positions)

    @property
    def draws(self) -> Draws:
        """How E was drawn."""
        return Draws.of(self.batches["E"])

    @property
    def folds(self) -> Tensor:
        """Fold of each independent unit of E, [n]: the first of its groups' folds."""
        draws, batch = self.draws, self.batches["E"]
        of_sequence = folds_of(batch.group_order)[batch.groups]
        folds = of_sequence.new_full((draws.num_units,), NUM_FOLDS)
        return folds.scatter_reduce_(0, draws.groups, of_sequence, "amin")

    @property
    def reweights(self) -> bool:
        """Whether E was sampled by another policy, whose log-probabilities it has."""
        return self.config.batches.E.reweight == "sampler"

    @property
    def planned(self) -> dict[str, Sample]:
        """Of the batches that are not there yet, how they are to be sampled, by split."""
        samples = self.config.batches.samples
        return {s: sample for s, sample in samples.items() if s not in self.batches}

    @property
    def buffer_dtype(self) -> torch.dtype:
        """Dtype of parameter buffers on the CPU."""
        return getattr(torch, self.config.precision.buffer_dtype_name)

    @property
    def snapshot_device(self) -> torch.device | None:
        """Where copies of moved tensors are kept; None for each tensor's own device."""
        on_cpu = self.config.compute.snapshot_device == "cpu"
        return torch.device("cpu") if on_cpu else None

    def pass_over(
        self,
        shard: Shard,
        name: str,
        run: Callable[[], PassResult],
        *,
        tokens: int | None = None,
        kept_as: str | None = None,
    ) -> PassResult:
        """What a pass gives: run as a phase, or read where the run did it before.

        Args:
            shard: the sequences of its arrays.
            name: of the phase, as it is shown.
            tokens: response tokens that this rank passes over; those of the shard, if it
                is not said.
            kept_as: name of its result, if several passes are shown as one.

        Raises:
            InputError: what an interrupted run left of it is damaged.
            RunError: the pass failed, or there is no room for what is kept.
        """

        def run_as_phase() -> PassResult:
            count = shard.ragged.num_tokens if tokens is None else tokens
            with self.phase(name, count):
                return run()

        if self.unfinished is None:
            return run_as_phase()
        return self.unfinished.read_or_run(kept_as or name, shard, run_as_phase)

    @contextmanager
    def phase(self, name: str, tokens: int = 0) -> Iterator[None]:
        """Time a phase, report its progress, and name it in what fails in it.

        Args:
            tokens: response tokens that this rank will pass over; 0 if not known.

        Raises:
            RunError: one was raised within; with the phase's name before it.
        """
        begin = time.perf_counter()
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.progress(name, done, tokens)

        self.progress(name, 0, tokens)
        self.passes.advance = advance
        try:
            yield
        except RunError as error:
            raise RunError(f"{name}: {error}") from error
        finally:
            self.passes.advance = lambda count: None
            spent = self.seconds.get(name, 0.0)
            self.seconds[name] = spent + time.perf_counter() - begin
