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
rewards differ. Its rows do not say how prompts were drawn, as the responses to one are
no independent draws.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from entropy_ddp.config import Sample
from entropy_ddp.data.batch import Sequence
from entropy_ddp.data.files import decode_prompt, decode_response, sequence_to_row
from entropy_ddp.data.jsonlines import make_problem
from entropy_ddp.data.rows import TokenLimits
from entropy_ddp.distributed.sharding import WholeLayers
from entropy_ddp.errors import RunError
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
from entropy_ddp.sampling.rewards import Term, check_gold, load_rewards, score_rewards

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


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
class SamplingPlan:
    """What is needed to sample a batch, beside the model.

    Attributes:
        sample: the batch's section of the configuration.
        split: "E" or "U"; the two draw from independent streams.
        seed: seed of everything drawn.
        temperature: the logits are divided by it.
        tokenizer: the model's.
        terms: of the reward; none for rollouts without rewards.
        generation: configuration of `generate`.
        num_prompts_total: number of prompts in the source.
        draws: all prompt draws, in order.
    """

    sample: Sample
    split: str
    seed: int
    temperature: float
    tokenizer: "PreTrainedTokenizerBase"
    terms: list[Term]
    generation: "GenerationConfig"
    num_prompts_total: int
    draws: list[Draw]


def plan_sampling(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    sample: Sample,
    *,
    split: str,
    seed: int,
    temperature: float,
) -> SamplingPlan:
    """Everything that sampling needs, found and checked before the first token.

    Every prompt is checked, drawn or not.

    Raises:
        InputError: the prompts, the reward or the tokenizer is wrong, there are not
            enough prompts, a drawn prompt lacks the gold answer of a reward, or a
            prompt leaves no room for `max_new_tokens`.
    """
    prompts = read_prompts(sample.prompts)
    return SamplingPlan(
        sample=sample,
        split=split,
        seed=seed,
        temperature=temperature,
        tokenizer=tokenizer,
        terms=load_rewards(sample.reward or []),
        generation=make_generation_config(model, tokenizer, sample.max_new_tokens),
        num_prompts_total=len(prompts),
        draws=_make_draws(prompts, model, tokenizer, sample, f"{seed} {split} prompts"),
    )


def _make_draws(
    prompts: list[Prompt],
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    sample: Sample,
    stream: str,
) -> list[Draw]:
    ids = _encode_fitting_prompts(prompts, model, tokenizer, sample)
    drawn = draw_prompts(
        len(prompts),
        sample.num_prompts,
        sample.with_replacement,
        int.from_bytes(random_bytes(stream, 4), "big"),
    )
    for index in sorted(set(drawn)):
        for reward in sample.reward or []:
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
    sample: Sample,
) -> list[list[int]]:
    """Token ids of all prompts, with room for `max_new_tokens` in the model."""
    config = model.config.get_text_config()
    limits = TokenLimits(
        vocabulary_size=config.vocab_size,
        max_positions=getattr(config, "max_position_embeddings", None),
    )
    encoded = []
    for prompt in prompts:
        ids = encode_prompt(prompt, sample.prompts, limits, tokenizer)
        # The last token of a response is never read.
        positions = len(ids) + sample.max_new_tokens - 1
        if limits.max_positions is not None and positions > limits.max_positions:
            raise make_problem(
                prompt.where,
                f"prompt and max_new_tokens to fit the model's {limits.max_positions} "
                "positions",
                f"{len(ids)} prompt tokens and max_new_tokens {sample.max_new_tokens}",
                "shorten the prompt or lower max_new_tokens",
            )
        encoded.append(ids)
    return encoded


def describe_plan(plan: SamplingPlan) -> dict[str, Any]:
    """What would be sampled, by what a reader calls it."""
    sample, draws = plan.sample, plan.draws
    return {
        "sampled from": describe_source(sample.prompts),
        "prompt draws": len(draws),
        "responses of each": sample.responses_per_prompt,
        "longest prompt drawn, tokens": max(len(draw.prompt_ids) for draw in draws),
        "reward": [f"{term.weight:g} x {term.label}" for term in plan.terms],
        "first prompt drawn": draws[0].text,
    }


def sample_rollouts(
    model: "PreTrainedModel",
    plan: SamplingPlan,
    allowance: Allowance,
    rank: int,
    world_size: int,
    on_progress: Callable[[int, int, int], None],
    layers: WholeLayers | None = None,
) -> tuple[list[dict[str, Any]], int]:
    """Sample this rank's share of a batch: prompt draws rank, rank + world_size, ...

    The model's training flags and generation_config are as before when this returns or
    raises.

    Args:
        model: the causal language model (a PEFT model too), not wrapped.
        allowance: how many responses of one call fit into memory, as far as is known;
            less is known to fit afterwards where memory ran out.
        on_progress: called after every token of every call with the number of
            responses that this rank has sampled, the number known to be needed, to
            which redraws add, and the number of their tokens.
        layers: the model's, of which this rank may have a part only: all ranks then
            sample together. None: it has them whole.

    Returns:
        This rank's rows of the rollout file, in order of prompt draw and response
        (`group` is the draw, `prompt_index` the prompt's 0-based row in its source;
        `merge_rows` joins those of all ranks); and the number of groups sampled again,
        each attempt counted.

    Raises:
        RunError: if the reward or the model yields no finite number, or a single
            response does not fit into memory.
    """
    sample, draws = plan.sample, plan.draws[rank::world_size]
    layers = layers or WholeLayers()
    groups: dict[int, list[dict[str, Any]]] = {}
    num_done = num_tokens = num_redraws = total = 0

    def on_token(done: int, tokens: int) -> None:
        on_progress(num_done + done, total, num_tokens + tokens)

    transformer = _transformer(model)
    spare = partial(_pass_over_one_token, transformer)
    with sampling_mode(model, plan.generation), layers.serving(transformer, spare):
        for attempt in range(1 + sample.redraw_zero_advantage):
            jobs = _responses_to_sample(draws, sample.responses_per_prompt)
            total = num_done + len(jobs)
            rows: dict[tuple[int, int], dict[str, Any]] = {}
            start = 0
            while start < len(jobs):
                size = allowance.of(sample.sequences_per_call)
                batch = jobs[start : start + size]
                responses = _generate(model, plan, attempt, batch, allowance, on_token)
                if responses is None:
                    layers.recover()
                    continue
                start += len(batch)
                for (draw, number), response in zip(batch, responses, strict=True):
                    rows[draw.number, number] = _make_row(plan, draw, number, response)
                num_done += len(batch)
                num_tokens += sum(len(r.token_ids) for r in responses)
            for draw in draws:
                groups[draw.number] = [
                    rows[draw.number, g] for g in range(sample.responses_per_prompt)
                ]
            num_redraws += len(draws) if attempt else 0
            draws = [draw for draw in draws if _has_equal_rewards(groups[draw.number])]
    ordered = chain.from_iterable(groups[number] for number in sorted(groups))
    return list(ordered), num_redraws


def _transformer(model: Any) -> Any:
    """The model below its output layer, adapters inside."""
    held = model.get_base_model() if hasattr(model, "get_base_model") else model
    return held.base_model


@torch.no_grad()
def _pass_over_one_token(transformer: Any) -> None:
    device = next(transformer.parameters()).device
    transformer(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device))


def merge_rows(rows_of_ranks: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Join the rows of all ranks, given in any order, by prompt draw and response.

    They are the same at every world size.
    """
    # A group lies on one rank in order of response, which a stable sort keeps.
    return sorted(chain.from_iterable(rows_of_ranks), key=lambda row: row["group"])


def _has_equal_rewards(group: list[dict[str, Any]]) -> bool:
    return len({row.get("reward") for row in group}) == 1


def _responses_to_sample(
    draws: list[Draw], num_responses: int
) -> list[tuple[Draw, int]]:
    """Each draw with the number of each of its responses."""
    # Prompts of similar length share a batch: less padding. Longest first, so that a
    # batch too large for the memory fails at once.
    by_length = sorted(draws, key=lambda draw: len(draw.prompt_ids), reverse=True)
    return [(draw, number) for draw in by_length for number in range(num_responses)]


def _generate(
    model: "PreTrainedModel",
    plan: SamplingPlan,
    attempt: int,
    batch: list[tuple[Draw, int]],
    allowance: Allowance,
    on_token: Callable[[int, int], None],
) -> list[Response] | None:
    """What one call of the model generates; None if it must be made with fewer."""
    streams = [
        f"{plan.seed} {plan.split} {draw.number} {number} {attempt}"
        for draw, number in batch
    ]
    prompts = [draw.prompt_ids for draw, _ in batch]
    responses, shortage = unless_out_of_memory(
        lambda: generate_responses(model, prompts, streams, plan.temperature, on_token)
    )
    if shortage is not None:
        if len(batch) == 1:
            raise RunError(
                f"out of memory while sampling a single response of batch {plan.split} "
                f"({len(prompts[0])} prompt tokens, max_new_tokens "
                f"{plan.sample.max_new_tokens}): {shortage}; free memory on this "
                "device, run fewer ranks on it, or sample shorter responses"
            )
        allowance.halve(len(batch))
    return responses


def _make_row(
    plan: SamplingPlan, draw: Draw, number: int, response: Response
) -> dict[str, Any]:
    """The row of the rollout file of a draw's response of this number."""
    if not all(map(math.isfinite, response.logprobs)):
        raise RunError(
            f"sampling: expected finite logits, found a log-probability that is not "
            f"finite in prompt draw {draw.number}, response {number}; check the "
            "checkpoint's weights and precision"
        )
    text = decode_response(response.token_ids, plan.tokenizer)
    reward, extra = None, draw.prompt.carried | {"prompt_index": draw.prompt_index}
    if plan.terms:
        where = f"group {draw.number}"
        reward, scores = score_rewards(
            plan.terms, where, draw.text, text, draw.prompt.row
        )
        if len(plan.terms) > 1:
            extra["reward_terms"] = scores
    is_redrawn = plan.sample.redraw_zero_advantage > 0
    sequence = Sequence(
        index=draw.number * plan.sample.responses_per_prompt + number,
        group=draw.number,
        group_key=draw.number,
        prompt_ids=torch.tensor(draw.prompt_ids),
        response_ids=torch.tensor(response.token_ids),
        reward=reward,
        sampling_logprobs=torch.tensor(response.logprobs, dtype=torch.float64),
        finished=response.finished,
        num_prompts_total=None if is_redrawn else plan.num_prompts_total,
        with_replacement=None if is_redrawn else plan.sample.with_replacement,
        extra=extra,
    )
    return sequence_to_row(sequence, plan.tokenizer) | {"prompt": draw.text}
