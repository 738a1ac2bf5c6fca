"""A run is opened: checkpoint, optimizer state, batches; checked before the first pass."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from entropy_ddp.checkpoint.change import read_change
from entropy_ddp.checkpoint.find import (
    CheckpointFiles,
    find_checkpoint,
    why_no_optimizer,
)
from entropy_ddp.checkpoint.optimizer import load_optimizer
from entropy_ddp.checkpoint.policy import (
    Policy,
    load_policy,
    require_reference,
    resolve_device,
)
from entropy_ddp.checkpoint.shards import parts_of, shard_policy
from entropy_ddp.checkpoint.trainer_settings import (
    require_masked,
    with_training_arguments,
)
from entropy_ddp.config import Config, require_job
from entropy_ddp.data.advantages import compute_advantages
from entropy_ddp.data.batch import Batch
from entropy_ddp.data.draws import units
from entropy_ddp.data.files import make_batch, read_batch, require_rewards
from entropy_ddp.data.rows import TokenLimits
from entropy_ddp.distributed import World
from entropy_ddp.distributed.sharding import WholeLayers
from entropy_ddp.errors import InputError, RunError
from entropy_ddp.model.parameters import differentiate_padding_tokens
from entropy_ddp.model.precision import precision_context
from entropy_ddp.model.response_tokens import ResponseTokens, ScoringSettings
from entropy_ddp.model.scoring import Passes
from entropy_ddp.model.selfcheck import check_model, check_sharing
from entropy_ddp.probe.passes import score_reference
from entropy_ddp.probe.resume import (
    identity_of_batch,
    identity_of_checkpoint,
    identity_of_configuration,
    open_unfinished,
)
from entropy_ddp.probe.session import Progress, Session
from entropy_ddp.results import UNFINISHED
from entropy_ddp.sampling.rollouts import (
    SamplingPlan,
    describe_plan,
    merge_rows,
    plan_sampling,
    sample_rollouts,
)
from entropy_ddp.update.loss import require_sampling_logprobs


def open_session(
    config: Config,
    world: World,
    out: Path | None,
    progress: Progress,
    command: str = "probe",
    require: Callable[[Session], object] = lambda session: None,
) -> Session:
    """Open the checkpoint, verify the model, read or sample both batches.

    Whatever can be checked is checked before the first token is sampled.

    Args:
        out: run directory, where finished passes are kept; None keeps none.
        command: which job it is: another one cannot go on with what this one leaves.
        require: what else the job needs of the batches; told before any is sampled.

    Raises:
        InputError: anything in the configuration, checkpoint or batches is wrong, or
            the unfinished run in `out` depends on something else.
    """
    require_job(config, command)
    session = open_checkpoint(config, world, progress)
    config = session.config
    verify_model(session)
    sources, tokenizer = config.batches.sources, session.policy.tokenizer
    limits = token_limits(session.policy)
    for split, source in sources.items():
        if source.file is not None:
            path = Path(source.file)
            session.batches[split] = read_batch(path, split, limits, tokenizer, world)
    check_batches(session.batches, config)
    check_masked(session)
    for split in session.planned:
        plan_sample(session, split)
    require(session)
    # The others follow from the rest.
    keep_unfinished(session, out, command)
    for split, source in sources.items():
        if source.file is None:
            rows = sampled_rows(session, split)
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
        session.reference_logp = score_reference(session)
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
            optimizer_file,
            policy.model,
            policy.parameters,
            parts_of(session.passes.layers, policy),
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
    compute = config.compute
    given = (files, config.precision, compute.attention, device)
    try:
        policy = load_policy(*given, compute.shard != "none")
    except torch.OutOfMemoryError as error:
        setting = "full" if files.adapter is None else "base"
        raise RunError(
            f"the model does not fit on {device} ({str(error).splitlines()[0]}): set "
            f"compute.shard: {setting} with several ranks, or precision.model: bfloat16"
        ) from error
    tell = getattr(progress, "tell", None)
    if policy.read_whole is not None and tell is not None:
        tell(f"every rank reads the whole model, to keep a part: {policy.read_whole}")
    differentiate_padding_tokens(policy.model)
    if config.update.kl_coefficient:
        require_reference(policy)
    tokens = make_tokens(policy, config)
    policy, layers = shard_policy(policy, tokens, config.compute, world)
    return Session(
        config=config,
        world=world,
        policy=policy,
        passes=make_passes(policy, tokens, config, world, layers),
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


def make_tokens(policy: Policy, config: Config) -> ResponseTokens:
    """An opened policy as a function of response tokens."""
    settings = ScoringSettings(
        temperature=config.objective.temperature,
        entropy_dtype=getattr(torch, config.precision.entropy),
        tokens_per_microbatch=config.compute.tokens_per_microbatch,
        share_prompts=config.compute.share_prompts,
    )
    return ResponseTokens(policy.model, settings)


def make_passes(
    policy: Policy,
    tokens: ResponseTokens,
    config: Config,
    world: World,
    layers: WholeLayers,
) -> Passes:
    """Both passes over an opened policy."""
    return Passes(
        tokens=tokens,
        wrapped=tokens if layers.is_sharded else world.wrap(tokens),
        parameters=policy.parameters,
        dtype=policy.dtype,
        device=policy.device,
        count_operations=config.compute.count_operations,
        layers=layers,
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
        groups = len(units(evaluation)[evaluation.lengths > 0].unique())
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
        require_sampling_logprobs(batches["U"], "update.ratio: clipped")
    if "E" in batches and config.batches.E.reweight is not None:
        require_sampling_logprobs(batches["E"], "batches.E.reweight: sampler")


def check_masked(session: Session) -> None:
    """Whether U has what the trainer's loss had of truncated responses.

    Raises:
        InputError: it has more of them, or is to be sampled.
    """
    policy = session.policy
    padding = getattr(policy.tokenizer, "pad_token_id", None)
    require_masked(session.config, session.batches.get("U"), policy.end_ids, padding)


def keep_unfinished(session: Session, out: Path | None, command: str) -> None:
    """Go on with the unfinished run in a folder, or begin to keep this one there.

    Args:
        session: with the batches that are files.
        out: run directory; None keeps nothing.
        command: which job it is.

    Raises:
        InputError: the unfinished run there depends on something else.
    """
    if out is None:
        return

    layers = session.passes.layers

    def identity() -> dict[str, Any]:
        checkpoint = identity_of_checkpoint(
            session.policy, session.optimizer, session.change, layers
        )
        batches = {
            f"batch {split}": identity_of_batch(batch)
            for split, batch in session.batches.items()
        }
        settings = identity_of_configuration(session.config, command)
        return settings | checkpoint | batches

    with session.phase("fingerprints"):
        # Of parts, every rank has to give its own.
        made = identity() if layers.is_sharded else None
        session.unfinished = open_unfinished(
            out / UNFINISHED, session.world, lambda: made or identity(), layers
        )


def sampled_rows(session: Session, split: str) -> list[dict[str, Any]]:
    """Rows of a batch that the run samples, or has sampled before it was interrupted."""

    def sample() -> tuple[list[dict[str, Any]], int]:
        rows = sample_batch(session, split)
        return rows, session.num_redraws[split]

    if session.unfinished is None:
        return sample()[0]
    rows, session.num_redraws[split] = session.unfinished.read_or_sample(
        session.world, split, sample
    )
    return rows


def sample_batch(session: Session, split: str) -> list[dict[str, Any]]:
    """Roll a batch out of the policy, each rank its prompts; all rows on every rank."""
    name = f"sample {split}"
    plan = session.plans.pop(split, None) or _plan(session, split)
    with session.phase(name), precision_context(session.policy.dtype):
        share = sample_rollouts(
            session.policy.model,
            plan,
            session.responses,
            session.world.rank,
            session.world.world_size,
            lambda done, total, tokens: session.progress(
                name, done, total, "responses", tokens
            ),
            session.passes.layers,
        )
        shares = session.world.gather_objects(share)
    session.num_redraws[split] = sum(redraws for _, redraws in shares)
    return merge_rows(rows for rows, _ in shares)


def plan_sample(session: Session, split: str) -> dict[str, Any]:
    """Check everything that sampling a batch needs, before its first token.

    Returns:
        What would be sampled, described.

    Raises:
        InputError: something of it is missing or wrong.
    """
    session.plans[split] = _plan(session, split)
    return describe_plan(session.plans[split])


def _plan(session: Session, split: str) -> SamplingPlan:
    config = session.config
    return plan_sampling(
        session.policy.model,
        _require_tokenizer(session, split),
        config.batches.samples[split],
        split=split,
        seed=config.seed,
        temperature=config.objective.temperature,
    )


def _require_tokenizer(session: Session, split: str) -> Any:
    if session.policy.tokenizer is None:
        raise InputError(
            f"batches.{split}.sample: expected a tokenizer beside the checkpoint, found "
            f"none in {session.policy.files.tokenizer}; copy its files there, or give "
            "the batch as a `file` of token ids"
        )
    return session.policy.tokenizer
