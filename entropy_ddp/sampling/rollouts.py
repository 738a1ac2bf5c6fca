"""How rollouts are sampled from the policy: which prompts, and a response for each.

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

from entropy_ddp.config import Prompts, Reward
from entropy_ddp.data.batch import Sequence
from entropy_ddp.data.files import decode_prompt, decode_response, sequence_to_row
from entropy_ddp.data.jsonlines import make_problem
from entropy_ddp.data.rows import TokenLimits
from entropy_ddp.errors import InputError, RunError
from entropy_ddp.memory import Allowance, unless_out_of_memory
from entropy_ddp.sampling.generation import (
    Response,
    generate_responses,
    make_generation_config,
    random_bytes,
    sampling_mode,
)
from entropy_ddp.sampling.prompts import (
    Prompt,
    describe_source,
    draw_prompts,
    encode_prompt,
    read_prompts,
)
from entropy_ddp.sampling.rewards import (
    Sample,
    Term,
    check_gold,
    load_rewards,
    score_rewards,
)

if TYPE_CHECKING:
    from transformers import (
        GenerationConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """What to sample.

    Attributes:
        prompts: where prompts come from.
        num_prompts: number of prompt draws, each of them one group.
        responses_per_prompt: responses of a group, G.
        with_replacement: whether a prompt may be drawn more than once.
        max_new_tokens: most tokens of a response, the end-of-sequence token included.
        temperature: sampling temperature; logits are divided by it.
        reward: terms of the reward; none for rollouts without rewards.
        batch_size: sequences per call of the model; changes no result.
        redraw_zero_advantage: how often at most a group whose rewards are all equal is
            sampled again; the last attempt is kept whatever its rewards. 0 for E,
            which must be a plain sample of the policy.
        seed: seed of everything drawn.
        split: "E" or "U"; the two draw from independent streams.
    """

    prompts: Prompts
    num_prompts: int
    responses_per_prompt: int
    with_replacement: bool
    max_new_tokens: int
    temperature: float
    reward: tuple[Reward, ...] = ()
    batch_size: int
    redraw_zero_advantage: int = 0
    seed: int
    split: str

    def __post_init__(self) -> None:
        for name in (
            "num_prompts",
            "responses_per_prompt",
            "max_new_tokens",
            "batch_size",
        ):
            _check_setting(name, getattr(self, name) >= 1, "at least 1", self)
        positive = 0 < self.temperature < math.inf
        _check_setting("temperature", positive, "a number above 0", self)
        redraws = self.redraw_zero_advantage
        _check_setting("redraw_zero_advantage", redraws >= 0, "at least 0", self)
        _check_setting("split", self.split in ("E", "U"), "E or U", self)
        if redraws > 0 and self.split == "E":
            raise InputError(
                f"redraw_zero_advantage: expected 0 for E, found {redraws}; E must be a "
                "plain sample of the policy, as its importance weights assume: redraw "
                "in U only"
            )
        if redraws > 0 and (not self.reward or self.responses_per_prompt < 2):
            raise InputError(
                "redraw_zero_advantage: expected a reward and responses_per_prompt of "
                f"at least 2, found {len(self.reward)} rewards and "
                f"{self.responses_per_prompt}; set them, or redraw_zero_advantage: 0"
            )


def _check_setting(
    name: str, is_right: bool, expected: str, settings: SamplingSettings
) -> None:
    if not is_right:
        raise InputError(
            f"{name}: expected {expected}, found {getattr(settings, name)!r}; correct "
            "the sampling settings"
        )


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One draw of a prompt.

    Attributes:
        number: which draw it is, from 0.
        prompt_index: 0-based row of the prompt in its source.
        prompt_ids: token ids.
        text: the prompt as reward functions see it.
        prompt: the prompt of the source.
    """

    number: int
    prompt_index: int
    prompt_ids: list[int]
    text: str
    prompt: Prompt


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is needed to sample a batch, beside the model.

    Attributes:
        terms: of the reward.
        generation: configuration of `generate`.
        draws: all prompt draws, in order.
    """

    terms: list[Term]
    generation: "GenerationConfig"
    draws: list[Draw]


def make_draws(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    settings: SamplingSettings,
) -> list[Draw]:
    """All prompt draws of the batch; every prompt is checked, drawn or not.

    Args:
        model: the causal language model.
        tokenizer: its tokenizer.
        settings: what to sample.

    Returns:
        The draws in order, `num_prompts` of them.

    Raises:
        InputError: if a prompt is wrong or too long, a drawn prompt lacks the gold
            answer of a reward, or there are not enough prompts.
    """
    prompts = read_prompts(settings.prompts)
    ids = _encode_fitting_prompts(prompts, model, tokenizer, settings)
    drawn = draw_prompts(
        len(prompts),
        settings.num_prompts,
        settings.with_replacement,
        int.from_bytes(
            random_bytes(f"{settings.seed} {settings.split} prompts", 4), "big"
        ),
    )
    for index in sorted(set(drawn)):
        for reward in settings.reward:
            check_gold(reward, prompts[index].row, prompts[index].where)
    return [
        Draw(
            number=number,
            prompt_index=index,
            prompt_ids=ids[index],
            text=_make_text(prompts[index], ids[index], tokenizer),
            prompt=prompts[index],
        )
        for number, index in enumerate(drawn)
    ]


def plan_sampling(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    settings: SamplingSettings,
) -> Plan:
    """Everything that sampling needs, found and checked before the first token.

    Args:
        model: the causal language model.
        tokenizer: its tokenizer.
        settings: what to sample.

    Raises:
        InputError: if the prompts, the reward or the tokenizer is wrong, a gold answer
            is missing, or a prompt leaves no room for `max_new_tokens`.
    """
    return Plan(
        terms=load_rewards(settings.reward),
        generation=make_generation_config(model, tokenizer, settings.max_new_tokens),
        draws=make_draws(model, tokenizer, settings),
    )


def describe_sampling(settings: SamplingSettings, plan: Plan) -> dict[str, Any]:
    """What would be sampled.

    Args:
        settings: what to sample.
        plan: from `plan_sampling`.

    Returns:
        Source, numbers of draws and responses, longest drawn prompt in tokens, rewards
        and the text of the first draw.
    """
    draws = plan.draws
    return {
        "sampled from": describe_source(settings.prompts),
        "prompt draws": len(draws),
        "responses of each": settings.responses_per_prompt,
        "longest prompt drawn, tokens": max(len(draw.prompt_ids) for draw in draws),
        "reward": [f"{term.weight:g} x {term.label}" for term in settings.reward],
        "first prompt drawn": draws[0].text,
    }


def _make_text(
    prompt: Prompt, prompt_ids: list[int], tokenizer: "PreTrainedTokenizerBase"
) -> str:
    if isinstance(prompt.content, str):
        return prompt.content
    written = prompt.row.get("prompt")
    if isinstance(prompt.content[0], int) and isinstance(written, str):
        return written
    return decode_prompt(prompt_ids, tokenizer)


def _encode_fitting_prompts(
    prompts: list[Prompt],
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    settings: SamplingSettings,
) -> list[list[int]]:
    """Token ids of all prompts, with room for `max_new_tokens` in the model."""
    config = model.config.get_text_config()
    limits = TokenLimits(
        vocabulary_size=config.vocab_size,
        max_positions=getattr(config, "max_position_embeddings", None),
    )
    encoded = []
    for prompt in prompts:
        ids = encode_prompt(prompt, settings.prompts, limits, tokenizer)
        # The last token of a response is never read.
        positions = len(ids) + settings.max_new_tokens - 1
        if limits.max_positions is not None and positions > limits.max_positions:
            raise make_problem(
                prompt.where,
                f"prompt and max_new_tokens to fit the model's {limits.max_positions} "
                "positions",
                f"{len(ids)} prompt tokens and max_new_tokens "
                f"{settings.max_new_tokens}",
                "shorten the prompt or lower max_new_tokens",
            )
        encoded.append(ids)
    return encoded


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
