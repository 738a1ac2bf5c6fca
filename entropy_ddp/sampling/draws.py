"""What is to be sampled: the settings, and the prompts that they draw."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from entropy_ddp.config import Prompts, Reward
from entropy_ddp.data.files import decode_prompt
from entropy_ddp.data.jsonlines import make_problem
from entropy_ddp.data.rows import TokenLimits
from entropy_ddp.errors import InputError
from entropy_ddp.sampling.answers import check_gold
from entropy_ddp.sampling.datasets import describe_source
from entropy_ddp.sampling.generation import make_generation_config, random_bytes
from entropy_ddp.sampling.prompts import (
    Prompt,
    draw_prompts,
    encode_prompt,
    read_prompts,
)
from entropy_ddp.sampling.rewards import Term, load_rewards

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
