"""Everything a run needs, opened and checked before the first expensive pass."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from entropy_ddp.checkpoint.change import read_change
from entropy_ddp.checkpoint.find import (
    CheckpointFiles,
    find_checkpoint,
    why_no_optimizer,
)
from entropy_ddp.checkpoint.optimizer import load_optimizer
from entropy_ddp.checkpoint.policy import (
    Policy,
    adapter_disabled,
    load_policy,
    require_reference,
    resolve_device,
)
from entropy_ddp.checkpoint.trainer_settings import (
    require_masked,
    with_training_arguments,
)
from entropy_ddp.config import Config, Sample
from entropy_ddp.data.advantages import compute_advantages
from entropy_ddp.data.batch import Batch, Shard
from entropy_ddp.data.files import (
    make_batch,
    read_batch,
    require_rewards,
)
from entropy_ddp.data.rows import TokenLimits
from entropy_ddp.distributed import World
from entropy_ddp.errors import InputError, RunError
from entropy_ddp.memory import Allowance, MemoryEstimate
from entropy_ddp.model.parameters import differentiate_padding_tokens
from entropy_ddp.model.response_tokens import ResponseTokens, ScoringSettings
from entropy_ddp.model.scoring import Passes
from entropy_ddp.model.selfcheck import (
    SelfCheck,
    SharingCheck,
    check_model,
    check_sharing,
)
from entropy_ddp.model.walk import PassCount
from entropy_ddp.probe.keeping import (
    keep_unfinished,
    plan_sample,
    sampled_rows,
)
from entropy_ddp.probe.unfinished import Costs, Record, Unfinished
from entropy_ddp.sampling.rollouts import Plan
from entropy_ddp.update.loss import require_sampling_logprobs


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
        unfinished: what finished phases leave; None where nothing is kept.
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
    plans: dict[str, Plan] = field(default_factory=dict)
    num_redraws: dict[str, int] = field(default_factory=dict)
    responses: Allowance = field(default_factory=Allowance)
    memory: MemoryEstimate | None = None
    unfinished: Unfinished | None = None

    def shard(self, batch: Batch) -> Shard:
        """This rank's share of a batch."""
        return batch.shard(self.world.rank, self.world.world_size)

    @property
    def planned(self) -> dict[str, Sample]:
        """Of the batches that are not there yet, how they are to be sampled, by split."""
        return {
            split: source.sample
            for split, source in self.config.batches.sources.items()
            if source.sample is not None and split not in self.batches
        }

    @contextmanager
    def phase(self, name: str, tokens: int = 0) -> Iterator[None]:
        """Time a phase, report its progress, and name it in what fails in it.

        Args:
            name: what the phase does.
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

    def kept(self, phase: str, shard: Shard, make: Callable[[], Record]) -> Record:
        """What a phase gives, or has given before the run was interrupted.

        Args:
            phase: its name.
            shard: the sequences of its arrays.
            make: runs the phase.
        """
        unfinished = self.unfinished
        if unfinished is None:
            return make()
        if phase in unfinished.finished:
            unfinished.used.append(phase)
            record, costs = unfinished.read(phase, shard)
            self._add(costs)
            return record
        before = self._costs()
        record = make()
        unfinished.write(phase, shard, record, self._costs().less(before))
        return record

    def _costs(self) -> Costs:
        """What the run has cost so far."""
        return copy.deepcopy(
            Costs(
                performed=self.passes.performed,
                collectives=self.world.collectives,
                seconds=self.seconds,
                retries=self.passes.allowance.num_retries,
            )
        )

    def _add(self, costs: Costs) -> None:
        for key, count in costs.performed.items():
            self.passes.performed.setdefault(key, PassCount()).add(count)
        known = self.world.collectives
        for purpose, (number, size) in costs.collectives.items():
            before = known.get(purpose, (0, 0))
            known[purpose] = (before[0] + number, before[1] + size)
        for name, seconds in costs.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.passes.allowance.num_retries += costs.retries

    @property
    def buffer_dtype(self) -> torch.dtype:
        """Dtype of parameter buffers on the CPU."""
        return getattr(torch, self.config.precision.buffer_dtype_name)


def open_session(
    config: Config,
    world: World,
    out: Path | None,
    progress: Progress,
    command: str = "probe",
    require: Callable[["Session"], object] = lambda session: None,
) -> Session:
    """Open the checkpoint, verify the model, read or sample both batches.

    Whatever can be checked is checked before the first token is sampled.

    Args:
        config: the run's configuration.
        world: the ranks.
        out: run directory, where finished phases are kept; None keeps none.
        progress: told how far the current phase is.
        command: which job it is: another one cannot go on with what this one leaves.
        require: what else the job needs of the batches; told before any is sampled.

    Raises:
        InputError: anything in the configuration, checkpoint or batches is wrong, or
            the unfinished run in `out` depends on something else.
    """
    session = open_checkpoint(config, world, progress)
    config = session.config
    verify_model(session)
    sources, tokenizer = config.batches.sources, session.policy.tokenizer
    limits = token_limits(session.policy)
    for split, source in sources.items():
        if source.file is not None:
            path = Path(source.file)
            session.batches[split] = read_batch(path, split, limits, tokenizer)
    check_batches(session.batches, config)
    check_masked(session)
    check_samples(session)
    require(session)
    # The others follow from the rest.
    keep_unfinished(session, out, command)
    for split, source in sources.items():
        if source.file is None:
            rows = sampled_rows(session, split, source)
            session.batches[split] = make_batch(
                rows, f"sampled {split}", split, limits, tokenizer
            )
    session.batches = {split: session.batches[split] for split in sources}
    check_batches(session.batches, config)
    if "U" in session.batches and config.update.loss != "nll":
        update = session.batches["U"]
        advantages = compute_advantages(update, config.batches.advantage)
        session.batches["U"] = update.with_advantages(advantages)
    if config.update.kl_coefficient and "U" in session.batches:
        session.reference_logp = _score_reference(session)
    return session


def open_checkpoint(config: Config, world: World, progress: Progress) -> Session:
    """A session with the model, and the optimizer's state or the change in its place.

    Raises:
        InputError: a part of it is missing or cannot be loaded.
    """
    files = find_checkpoint(config.checkpoint)
    if config.update.delta is None:
        optimizer_file = require_optimizer(files)
    session = open_policy(config, world, files, progress)
    policy = session.policy
    if config.update.delta is None:
        session.optimizer = load_optimizer(
            optimizer_file, policy.model, policy.parameters
        )
    else:
        attention = config.compute.attention
        with session.phase("open change"):
            session.change = read_change(
                config.update.delta, policy, config.precision, attention
            )
    return session


def verify_model(session: Session) -> None:
    """Check that the passes are right on this model, and how it may be read.

    Raises:
        InputError: the model cannot be measured correctly.
    """
    passes, vocabulary = session.passes, session.policy.vocabulary_size
    with session.phase("self-check"):
        session.self_checks = check_model(passes, vocabulary)
        if session.config.compute.share_prompts:
            session.sharing = check_sharing(passes, vocabulary)
            passes.tokens.sharing = session.sharing.sharing
        # The run's own passes are counted, not these.
        passes.performed.clear()


def open_policy(
    config: Config, world: World, files: CheckpointFiles, progress: Progress
) -> Session:
    """A session with the model opened, without optimizer state and batches.

    Its configuration has the settings of the checkpoint in it, if it asks for them.

    Raises:
        InputError: the checkpoint cannot be loaded, or has no reference policy for the
            loss's KL term.
    """
    config = with_training_arguments(config)
    begin = time.perf_counter()
    device = resolve_device(config.compute, world.local_rank)
    policy = load_policy(files, config.precision, config.compute.attention, device)
    differentiate_padding_tokens(policy.model)
    if config.update.kl_coefficient:
        require_reference(policy)
    return Session(
        config=config,
        world=world,
        policy=policy,
        passes=make_passes(policy, config, world),
        progress=progress,
        seconds={"open checkpoint": time.perf_counter() - begin},
    )


def require_optimizer(files: CheckpointFiles) -> Path:
    """The file of the optimizer state.

    Raises:
        InputError: there is none.
    """
    if files.optimizer is None:
        raise InputError(why_no_optimizer(files.folder))
    return files.optimizer


def make_passes(policy: Policy, config: Config, world: World) -> Passes:
    """Both passes over an opened policy."""
    settings = ScoringSettings(
        temperature=config.objective.temperature,
        entropy_dtype=getattr(torch, config.precision.entropy),
        tokens_per_microbatch=config.compute.tokens_per_microbatch,
        share_prompts=config.compute.share_prompts,
    )
    tokens = ResponseTokens(policy.model, settings)
    return Passes(
        tokens=tokens,
        wrapped=world.wrap(tokens),
        parameters=policy.parameters,
        dtype=policy.dtype,
        device=policy.device,
        count_operations=config.compute.count_operations,
    )


def token_limits(policy: Policy) -> TokenLimits:
    """What rollouts may contain for this policy."""
    return TokenLimits(
        vocabulary_size=policy.vocabulary_size, max_positions=policy.max_positions
    )


def check_batches(batches: dict[str, Batch], config: Config) -> None:
    """What the estimators need of those of both batches that are there.

    Raises:
        InputError: fewer than two groups in E, no tokens, or missing rewards in U.
    """
    for split, batch in batches.items():
        if batch.num_tokens == 0:
            source = config.batches.sources[split].file or f"sampled {split}"
            raise InputError(
                f"batch {split}: {source}: expected response tokens, found none in "
                f"{len(batch)} sequences; were the responses written?"
            )
    if "E" in batches:
        evaluation = batches["E"]
        groups = len(evaluation.groups[evaluation.lengths > 0].unique())
        if groups < 2:
            raise InputError(
                "batch E: expected at least 2 groups with response tokens (a standard "
                f"error needs independent groups), found {groups}; give each prompt "
                "draw a group of its own"
            )
    if "U" in batches and config.update.loss != "nll":
        source = config.batches.sources["U"].file or "sampled U"
        require_rewards(batches["U"], Path(source))
        compute_advantages(batches["U"], config.batches.advantage)
    if "U" in batches and config.update.ratio == "clipped":
        require_sampling_logprobs(batches["U"])


def check_masked(session: Session) -> None:
    """Whether U has what the trainer's loss had of truncated responses.

    Raises:
        InputError: it has more of them, or is to be sampled.
    """
    policy = session.policy
    padding = getattr(policy.tokenizer, "pad_token_id", None)
    require_masked(session.config, session.batches.get("U"), policy.end_ids, padding)


def check_samples(session: Session) -> None:
    """What the estimators, and sampling itself, need of the batches to be sampled.

    Raises:
        InputError: fewer than two prompt draws for E, or a batch cannot be sampled as
            it is asked for.
    """
    planned = session.planned
    if "E" in planned and planned["E"].num_prompts < 2:
        raise InputError(
            "batches.E.sample.num_prompts: expected at least 2 (a standard error needs "
            f"independent groups), found {planned['E'].num_prompts}; sample more"
        )
    for split in planned:
        plan_sample(session, split)


def _score_reference(session: Session) -> Tensor:
    """Log p of this rank's tokens of U under the reference policy, [t]."""
    shard, model = session.shard(session.batches["U"]), session.policy.model

    def score() -> Record:
        with (
            session.phase("reference: U without the adapter", shard.ragged.num_tokens),
            adapter_disabled(model),
        ):
            return Record(tokens={"logp": session.passes.score(shard).logp})

    return session.kept("reference", shard, score).tokens["logp"]
