"""How rollouts are sampled from the policy.

The end-of-sequence token is part of the response (`finished`: true); a response cut at
`max_new_tokens` is not finished.

Each response has a random stream of its own, a function of (seed, split, prompt draw,
response, attempt): what is sampled does not depend on the number of ranks, the
generation batch size or the order (except that padding changes the last bits of the
logits, which moves a token with a probability of about 1e-6 in float32).

With `redraw_zero_advantage`, the responses of a group whose rewards are all equal are
sampled anew, for the same prompt: the batch then comes from the policy *given* that
rewards differ.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from entropy_ddp.errors import InputError, RunError
from entropy_ddp.rollouts.batch import Sequence
from entropy_ddp.rollouts.files import decode_prompt, decode_response, sequence_to_row
from entropy_ddp.rollouts.generation import (
    Response,
    generate_responses,
    make_generation_config,
    random_bytes,
    sampling_mode,
)
from entropy_ddp.rollouts.jsonlines import make_problem
from entropy_ddp.rollouts.prompts import draw_prompts, read_prompts
from entropy_ddp.rollouts.rewards import Reward, load_reward, score_reward
from entropy_ddp.rollouts.rows import KNOWN_KEYS, TokenLimits, read_prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """What to sample.

    Attributes:
        prompts: prompt file, JSON lines.
        num_prompts: number of prompt draws, each of them one group.
        responses_per_prompt: responses of a group, G.
        with_replacement: whether a prompt may be drawn more than once.
        max_new_tokens: most tokens of a response, the end-of-sequence token included.
        temperature: sampling temperature; logits are divided by it.
        reward: `module:function` of the reward, or None for rollouts without rewards.
        batch_size: sequences per call of the model; changes no result.
        redraw_zero_advantage: how often at most a group whose rewards are all equal is
            sampled again; the last attempt is kept whatever its rewards. 0 for E,
            which must be a plain sample of the policy.
        seed: seed of everything drawn.
        split: "E" or "U"; the two draw from independent streams.
    """

    prompts: Path
    num_prompts: int
    responses_per_prompt: int
    with_replacement: bool
    max_new_tokens: int
    temperature: float
    reward: str | None = None
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
        if redraws > 0 and (self.reward is None or self.responses_per_prompt < 2):
            raise InputError(
                "redraw_zero_advantage: expected a reward and responses_per_prompt of "
                f"at least 2, found reward {self.reward!r} and {self.responses_per_prompt}"
                "; set them, or redraw_zero_advantage: 0"
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
class SampledShard:
    """What one rank sampled.

    Attributes:
        rows: rows of the rollout file, in order of prompt draw and response; `group` is
            the draw, `prompt_index` the prompt's 0-based row in the prompt file.
        num_redraws: number of groups sampled again, each attempt counted.
    """

    rows: list[dict[str, Any]]
    num_redraws: int


@dataclass(frozen=True, kw_only=True)
class _Draw:
    """One draw of a prompt: its number, its row in the prompt file, ids and text."""

    number: int
    prompt_index: int
    prompt_ids: list[int]
    prompt: str
    row: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One response to be sampled."""

    draw: _Draw
    response: int
    attempt: int


def sample_rollouts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    settings: SamplingSettings,
    rank: int,
    world_size: int,
    on_progress: Callable[[int, int], None],
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
        on_progress: called after every batch with the number of responses sampled by
            this rank and the number known to be needed; redraws add to the latter.

    Returns:
        This rank's rows; `merge_rows` joins those of all ranks.

    Raises:
        InputError: if the prompt file, the reward's name or the tokenizer is wrong, or
            a prompt leaves no room for `max_new_tokens`.
        RunError: if the reward function or the model yields no finite number.
    """
    reward = None if settings.reward is None else load_reward(settings.reward)
    config = make_generation_config(model, tokenizer, settings.max_new_tokens)
    draws = _make_draws(model, tokenizer, settings)[rank::world_size]
    groups: dict[int, list[dict[str, Any]]] = {}
    num_done = num_redraws = 0
    with sampling_mode(model, config):
        for attempt in range(1 + settings.redraw_zero_advantage):
            jobs = _make_jobs(draws, settings.responses_per_prompt, attempt)
            total = num_done + len(jobs)
            rows: dict[tuple[int, int], dict[str, Any]] = {}
            for start in range(0, len(jobs), settings.batch_size):
                batch = jobs[start : start + settings.batch_size]
                rows |= _sample_jobs(model, tokenizer, settings, reward, batch)
                num_done += len(batch)
                on_progress(num_done, total)
            for draw in draws:
                groups[draw.number] = [
                    rows[draw.number, g] for g in range(settings.responses_per_prompt)
                ]
            num_redraws += len(draws) if attempt else 0
            draws = [draw for draw in draws if _has_equal_rewards(groups[draw.number])]
    return SampledShard(
        rows=list(chain.from_iterable(groups[number] for number in sorted(groups))),
        num_redraws=num_redraws,
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


# --- what to sample -------------------------------------------------------------------


def _make_draws(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    settings: SamplingSettings,
) -> list[_Draw]:
    """All prompt draws of the batch; every prompt is checked, drawn or not."""
    rows = read_prompts(settings.prompts)
    prompts = _read_fitting_prompts(rows, model, tokenizer, settings)
    drawn = draw_prompts(
        len(rows),
        settings.num_prompts,
        settings.with_replacement,
        int.from_bytes(
            random_bytes(f"{settings.seed} {settings.split} prompts", 4), "big"
        ),
    )
    draws = []
    for number, index in enumerate(drawn):
        text = rows[index].get("prompt")
        if text is None:
            text = decode_prompt(prompts[index], tokenizer)
        draws.append(
            _Draw(
                number=number,
                prompt_index=index,
                prompt_ids=prompts[index],
                prompt=text,
                row=rows[index],
            )
        )
    return draws


def _read_fitting_prompts(
    rows: list[dict[str, Any]],
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
    prompts = []
    for number, row in enumerate(rows, start=1):
        where = f"{settings.prompts}:{number}"
        ids = read_prompt_ids(row, where, limits, tokenizer)
        # The last token of a response is never read.
        positions = len(ids) + settings.max_new_tokens - 1
        if limits.max_positions is not None and positions > limits.max_positions:
            raise make_problem(
                where,
                f"prompt and max_new_tokens to fit the model's {limits.max_positions} "
                "positions",
                f"{len(ids)} prompt tokens and max_new_tokens "
                f"{settings.max_new_tokens}",
                "shorten the prompt or lower max_new_tokens",
            )
        prompts.append(ids)
    return prompts


def _make_jobs(draws: list[_Draw], num_responses: int, attempt: int) -> list[_Job]:
    # Prompts of similar length share a batch: less padding. Longest first, so that a
    # batch too large for the memory fails at once.
    by_length = sorted(draws, key=lambda draw: len(draw.prompt_ids), reverse=True)
    return [
        _Job(draw=draw, response=response, attempt=attempt)
        for draw in by_length
        for response in range(num_responses)
    ]


def _sample_jobs(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    settings: SamplingSettings,
    reward: Reward | None,
    jobs: list[_Job],
) -> dict[tuple[int, int], dict[str, Any]]:
    """The rows of one call of the model, by prompt draw and response."""
    responses = generate_responses(
        model,
        [job.draw.prompt_ids for job in jobs],
        [
            f"{settings.seed} {settings.split} {job.draw.number} {job.response} "
            f"{job.attempt}"
            for job in jobs
        ],
        settings.temperature,
    )
    return {
        (job.draw.number, job.response): _make_row(
            job, response, tokenizer, reward, settings
        )
        for job, response in zip(jobs, responses)
    }


def _make_row(
    job: _Job,
    response: Response,
    tokenizer: "PreTrainedTokenizerBase",
    reward: Reward | None,
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
    value = None
    if reward is not None:
        value = score_reward(reward, draw.prompt, text, draw.row, draw.number)
    sequence = Sequence(
        index=draw.number * settings.responses_per_prompt + job.response,
        group=draw.number,
        group_key=draw.number,
        prompt_ids=torch.tensor(draw.prompt_ids),
        response_ids=torch.tensor(response.token_ids),
        reward=value,
        sampling_logprobs=torch.tensor(response.logprobs, dtype=torch.float64),
        finished=response.finished,
        extra={k: v for k, v in draw.row.items() if k not in KNOWN_KEYS}
        | {"prompt_index": draw.prompt_index},
    )
    return sequence_to_row(sequence, tokenizer) | {"prompt": draw.prompt}
