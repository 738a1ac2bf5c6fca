"""How rollouts are sampled from the policy.

The end-of-sequence token is part of the response (`finished`: true); a response cut at
`max_new_tokens` is not finished.

Each response has a random stream of its own, a function of (seed, split, prompt draw,
response, attempt): what is sampled does not depend on the number of ranks, the
generation batch size or the order (except that padding changes the last bits of the
logits, which moves a token with a probability of about 1e-6 in float32).

Where memory runs out, the call is made again with half as many responses.

With `redraw_zero_advantage`, the responses of a group whose rewards are all equal are
sampled anew, for the same prompt: the batch then comes from the policy *given* that
rewards differ.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from entropy_ddp.data.batch import Sequence
from entropy_ddp.data.files import decode_response, sequence_to_row
from entropy_ddp.errors import RunError
from entropy_ddp.memory import Allowance, unless_out_of_memory
from entropy_ddp.sampling.draws import Draw, Plan, SamplingSettings, plan_sampling
from entropy_ddp.sampling.generation import (
    Response,
    generate_responses,
    sampling_mode,
)
from entropy_ddp.sampling.rewards import Sample, Term, score_rewards

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class SampledShard:
    """What one rank sampled.

    Attributes:
        rows: rows of the rollout file, in order of prompt draw and response; `group` is
            the draw, `prompt_index` the prompt's 0-based row in its source.
        num_redraws: number of groups sampled again, each attempt counted.
        allowance: how many responses of one call fit into memory, as far as is known.
    """

    rows: list[dict[str, Any]]
    num_redraws: int
    allowance: Allowance


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One response to be sampled."""

    draw: Draw
    response: int
    attempt: int


def sample_rollouts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    settings: SamplingSettings,
    rank: int,
    world_size: int,
    on_progress: Callable[[int, int, int], None],
    plan: Plan | None = None,
) -> SampledShard:
    """Sample this rank's share of a batch: prompt draws rank, rank + world_size, ...

    Every rank checks all prompts, so that all of them fail alike. The model's training
    flags and generation_config are as before when this returns or raises.

    Args:
        model: the causal language model (a PEFT model too), not wrapped.
        tokenizer: its tokenizer.
        settings: what to sample.
        rank: this process.
        world_size: number of processes.
        on_progress: called after every token of every call with the number of
            responses that this rank has sampled, the number known to be needed, to
            which redraws add, and the number of their tokens.
        plan: what `plan_sampling` made of the settings, if it was called before.

    Returns:
        This rank's rows; `merge_rows` joins those of all ranks.

    Raises:
        InputError: whatever `plan_sampling` raises it for.
        RunError: if the reward or the model yields no finite number, or a single
            response does not fit into memory.
    """
    allowance = Allowance()
    plan = plan or plan_sampling(model, tokenizer, settings)
    draws = plan.draws[rank::world_size]
    groups: dict[int, list[dict[str, Any]]] = {}
    num_done = num_tokens = num_redraws = total = 0

    def on_token(done: int, tokens: int) -> None:
        on_progress(num_done + done, total, num_tokens + tokens)

    with sampling_mode(model, plan.generation):
        for attempt in range(1 + settings.redraw_zero_advantage):
            jobs = _make_jobs(draws, settings.responses_per_prompt, attempt)
            total = num_done + len(jobs)
            rows: dict[tuple[int, int], dict[str, Any]] = {}
            start = 0
            while start < len(jobs):
                size = allowance.of(settings.batch_size)
                batch = jobs[start : start + size]
                responses = _responses(model, settings, batch, allowance, on_token)
                if responses is None:
                    continue
                start += len(batch)
                for job, response in zip(batch, responses, strict=True):
                    row = _make_row(job, response, tokenizer, plan.terms, settings)
                    rows[job.draw.number, job.response] = row
                num_done += len(batch)
                num_tokens += sum(len(r.token_ids) for r in responses)
            for draw in draws:
                groups[draw.number] = [
                    rows[draw.number, g] for g in range(settings.responses_per_prompt)
                ]
            num_redraws += len(draws) if attempt else 0
            draws = [draw for draw in draws if _has_equal_rewards(groups[draw.number])]
    return SampledShard(
        rows=list(chain.from_iterable(groups[number] for number in sorted(groups))),
        num_redraws=num_redraws,
        allowance=allowance,
    )


def merge_rows(rows_of_ranks: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Join the rows of all ranks in order of prompt draw and response.

    Args:
        rows_of_ranks: `SampledShard.rows` of every rank, in any order.

    Returns:
        All rows; the same at every world size.
    """
    # A group lies on one rank in order of response, which a stable sort keeps.
    return sorted(chain.from_iterable(rows_of_ranks), key=lambda row: row["group"])


def _has_equal_rewards(group: list[dict[str, Any]]) -> bool:
    return len({row.get("reward") for row in group}) == 1


def _make_jobs(draws: list[Draw], num_responses: int, attempt: int) -> list[_Job]:
    # Prompts of similar length share a batch: less padding. Longest first, so that a
    # batch too large for the memory fails at once.
    by_length = sorted(draws, key=lambda draw: len(draw.prompt_ids), reverse=True)
    return [
        _Job(draw=draw, response=response, attempt=attempt)
        for draw in by_length
        for response in range(num_responses)
    ]


def _responses(
    model: "PreTrainedModel",
    settings: SamplingSettings,
    jobs: list[_Job],
    allowance: Allowance,
    on_token: Callable[[int, int], None],
) -> list[Response] | None:
    """What one call of the model generates; None if it must be made with fewer jobs."""
    streams = [
        f"{settings.seed} {settings.split} {job.draw.number} {job.response} "
        f"{job.attempt}"
        for job in jobs
    ]
    prompts = [job.draw.prompt_ids for job in jobs]
    responses, shortage = unless_out_of_memory(
        lambda: generate_responses(
            model, prompts, streams, settings.temperature, on_token
        )
    )
    if shortage is not None:
        if len(jobs) == 1:
            raise RunError(
                f"out of memory while sampling a single response of batch "
                f"{settings.split} ({len(prompts[0])} prompt tokens, max_new_tokens "
                f"{settings.max_new_tokens}): {shortage}; free memory on this device, "
                "run fewer ranks on it, or sample shorter responses"
            )
        allowance.halve(len(jobs))
    return responses


def _make_row(
    job: _Job,
    response: Response,
    tokenizer: "PreTrainedTokenizerBase",
    terms: list[Term],
    settings: SamplingSettings,
) -> dict[str, Any]:
    draw = job.draw
    if not all(map(math.isfinite, response.logprobs)):
        raise RunError(
            f"sampling: expected finite logits, found a log-probability that is not "
            f"finite in prompt draw {draw.number}, response {job.response}; check the "
            "checkpoint's weights and precision"
        )
    text = decode_response(response.token_ids, tokenizer)
    value, extra = None, draw.prompt.carried | {"prompt_index": draw.prompt_index}
    if terms:
        sample = Sample(
            group=draw.number, prompt=draw.text, response=text, row=draw.prompt.row
        )
        value, scores = score_rewards(terms, sample)
        if len(terms) > 1:
            extra["reward_terms"] = scores
    sequence = Sequence(
        index=draw.number * settings.responses_per_prompt + job.response,
        group=draw.number,
        group_key=draw.number,
        prompt_ids=torch.tensor(draw.prompt_ids),
        response_ids=torch.tensor(response.token_ids),
        reward=value,
        sampling_logprobs=torch.tensor(response.logprobs, dtype=torch.float64),
        finished=response.finished,
        extra=extra,
    )
    return sequence_to_row(sequence, tokenizer) | {"prompt": draw.text}
