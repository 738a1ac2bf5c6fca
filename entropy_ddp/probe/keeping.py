"""How a session takes up an unfinished run, and the batches that a run samples."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_ddp.config import BatchSource, Config
from entropy_ddp.errors import InputError
from entropy_ddp.model.precision import precision_context
from entropy_ddp.probe.identity import (
    identity_of_batch,
    identity_of_checkpoint,
    identity_of_configuration,
)
from entropy_ddp.probe.unfinished import open_unfinished
from entropy_ddp.results import UNFINISHED
from entropy_ddp.sampling.rollouts import (
    SamplingSettings,
    describe_sampling,
    merge_rows,
    plan_sampling,
    sample_rollouts,
)

if TYPE_CHECKING:
    from entropy_ddp.probe.session import Session


def keep_unfinished(session: "Session", out: Path | None, command: str) -> None:
    """Go on with the unfinished run in a folder, or begin to keep this one there.

    Args:
        session: the run, with the batches that are files.
        out: run directory; None keeps nothing.
        command: which job it is.

    Raises:
        InputError: the unfinished run there depends on something else.
    """
    if out is None:
        return

    def identity() -> dict[str, Any]:
        checkpoint = identity_of_checkpoint(
            session.policy, session.optimizer, session.change
        )
        batches = {
            f"batch {split}": identity_of_batch(batch)
            for split, batch in session.batches.items()
        }
        settings = identity_of_configuration(session.config, command)
        return settings | checkpoint | batches

    with session.phase("fingerprints"):
        session.unfinished = open_unfinished(out / UNFINISHED, session.world, identity)


def sampled_rows(
    session: "Session", split: str, source: BatchSource
) -> list[dict[str, Any]]:
    """Rows of a batch that the run samples, or has sampled before it was interrupted."""
    unfinished, world = session.unfinished, session.world
    if unfinished is None:
        return sample_batch(session, split, source)
    found, problem = None, None
    if world.is_main:
        try:
            found = unfinished.rollouts(split)
        except InputError as error:
            problem = error
    found, problem = world.gather_objects((found, problem))[0]
    if problem is not None:
        raise problem
    if found is not None:
        rows, session.num_redraws[split] = found
        unfinished.used.append(f"sample {split}")
        return rows
    rows = sample_batch(session, split, source)
    if world.is_main:
        unfinished.keep_rollouts(split, rows, session.num_redraws[split])
    return rows


def sample_batch(
    session: "Session", split: str, source: BatchSource
) -> list[dict[str, Any]]:
    """Roll a batch out of the policy, each rank its prompts; all rows on every rank."""
    name = f"sample {split}"
    settings = sampling_settings(session.config, split, source)
    size = session.responses.of(settings.batch_size)
    with session.phase(name), precision_context(session.policy.dtype):
        sampled = sample_rollouts(
            session.policy.model,
            _require_tokenizer(session, split),
            replace(settings, batch_size=size),
            session.world.rank,
            session.world.world_size,
            lambda done, total, tokens: session.progress(
                name, done, total, "responses", tokens
            ),
            session.plans.pop(split, None),
        )
        session.responses.limit = sampled.allowance.of(size)
        session.responses.num_retries += sampled.allowance.num_retries
        shares = session.world.gather_objects((sampled.rows, sampled.num_redraws))
    session.num_redraws[split] = sum(redraws for _, redraws in shares)
    return merge_rows(rows for rows, _ in shares)


def plan_sample(session: "Session", split: str) -> dict[str, Any]:
    """Check everything that sampling a batch needs, before its first token.

    Returns:
        What would be sampled, described.

    Raises:
        InputError: something of it is missing or wrong.
    """
    source = session.config.batches.sources[split]
    settings = sampling_settings(session.config, split, source)
    tokenizer = _require_tokenizer(session, split)
    plan = plan_sampling(session.policy.model, tokenizer, settings)
    session.plans[split] = plan
    return describe_sampling(settings, plan)


def _require_tokenizer(session: "Session", split: str) -> Any:
    if session.policy.tokenizer is None:
        raise InputError(
            f"batches.{split}.sample: expected a tokenizer beside the checkpoint, found "
            f"none in {session.policy.files.tokenizer}; copy its files there, or give "
            "the batch as a `file` of token ids"
        )
    return session.policy.tokenizer


def sampling_settings(
    config: Config, split: str, source: BatchSource
) -> SamplingSettings:
    """The `sample` section of a batch, with what the run adds to it."""
    assert source.sample is not None
    sample = source.sample
    return SamplingSettings(
        prompts=sample.prompts,
        num_prompts=sample.num_prompts,
        responses_per_prompt=sample.responses_per_prompt,
        with_replacement=sample.with_replacement,
        max_new_tokens=sample.max_new_tokens,
        temperature=config.objective.temperature,
        reward=tuple(sample.reward or ()),
        batch_size=sample.sequences_per_call,
        redraw_zero_advantage=sample.redraw_zero_advantage,
        seed=config.seed,
        split=split,
    )
