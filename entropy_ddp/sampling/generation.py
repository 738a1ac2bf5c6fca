"""How responses are generated from the policy's full distribution, reproducibly.

Token k of a response is the inverse of the cumulative distribution
softmax(logits / temperature) at the k-th uniform number of the response's own random
stream. No top-p, top-k or penalty applies, whatever the checkpoint's generation_config
says; only its end-of-sequence tokens are taken from there, beside the tokenizer's.

Shape legend: B sequences of one call, V vocabulary, K = max_new_tokens.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from entropy_ddp.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Response:
    """One generated response.

    Attributes:
        token_ids: its tokens, the end-of-sequence token included, [T_i].
        logprobs: their log-probabilities at the sampling temperature, in nats, [T_i].
        finished: whether the end-of-sequence token ended it.
    """

    token_ids: list[int]
    logprobs: list[float]
    finished: bool


def make_generation_config(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", max_new_tokens: int
) -> GenerationConfig:
    """A configuration of `generate` that leaves the logits as they are.

    Args:
        model: the causal language model; its end-of-sequence tokens end a response too.

    Raises:
        InputError: if the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            "tokenizer: expected an end-of-sequence token, found none; set eos_token in "
            "the checkpoint's tokenizer files"
        )
    declared = model.generation_config.eos_token_id
    if declared is None:
        declared = []
    end_ids = {tokenizer.eos_token_id}.union(
        [declared] if isinstance(declared, int) else declared
    )
    # Greedy: the choice is made by the processor, whose scores leave only one token.
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=sorted(end_ids),
        # Masked before a prompt, cut after a response: any id would do.
        pad_token_id=tokenizer.eos_token_id,
    )


@contextmanager
def sampling_mode(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Put the model in eval mode with this generation_config; restore both at the end.

    `generate` fills what its own configuration leaves open from the model's
    generation_config (penalties, suppressed tokens, ...), so that the checkpoint's must
    not be there.
    """
    holder = model.get_base_model() if hasattr(model, "get_base_model") else model
    old_config = holder.generation_config
    training = {module: module.training for module in model.modules()}
    model.eval()
    holder.generation_config = config
    try:
        yield
    finally:
        holder.generation_config = old_config
        for module, flag in training.items():
            module.training = flag


def generate_responses(
    model: Any,
    prompts: list[list[int]],
    streams: list[str],
    temperature: float,
    on_token: Callable[[int, int], None] = lambda done, tokens: None,
) -> list[Response]:
    """Generate a response to each prompt in one call of the model in `sampling_mode`.

    Args:
        prompts: token ids of each prompt, B of them.
        streams: name of each response's random stream, B of them.
        on_token: called after every token of all responses with the number of responses
            that have ended and the number of tokens, both of this call.

    Returns:
        The responses in the order of the prompts; log-probabilities are not finite
        where the model's logits are not.
    """
    config = model.generation_config
    rows = [torch.tensor(prompt) for prompt in prompts]
    input_ids = _pad_left(rows, config.pad_token_id).to(model.device)
    mask = _pad_left([torch.ones_like(row) for row in rows], 0).to(model.device)
    length = input_ids.shape[1]
    choice = _InverseTransform(
        make_uniforms(streams, config.max_new_tokens),
        length,
        temperature,
    )
    output = model.generate(
        input_ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=LogitsProcessorList([choice, _Count(config, on_token)]),
    )
    responses = []
    for token_ids, logprobs in zip(
        output[:, length:].tolist(), choice.logprobs.tolist()
    ):
        # The first one: the padding behind it may be the same token.
        ends = [k for k, t in enumerate(token_ids) if t in config.eos_token_id]
        count = ends[0] + 1 if ends else len(token_ids)
        responses.append(
            Response(
                token_ids=token_ids[:count],
                logprobs=logprobs[:count],
                finished=bool(ends),
            )
        )
    return responses


def _pad_left(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        rows, batch_first=True, padding_value=value, padding_side="left"
    )


class _InverseTransform(LogitsProcessor):
    """Leaves only the token at which the cumulative distribution passes the uniform.

    Attributes:
        logprobs: log-probabilities of the chosen tokens in nats, float64, [B, K].
    """

    def __init__(
        self,
        uniforms: Tensor,
        prompt_length: int,
        temperature: float,
    ) -> None:
        self.uniforms = uniforms
        self.prompt_length = prompt_length
        self.temperature = temperature
        self.logprobs = torch.zeros_like(uniforms)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Choose the next tokens.

        Args:
            input_ids: prompts and what was generated so far, [B, length].
            scores: raw logits, [B, V].

        Returns:
            Scores: 0 for the chosen token and minus infinity for the others, [B, V].
        """
        step = input_ids.shape[1] - self.prompt_length
        # [B, V]; a running sum in float32 has no room for probabilities below 6e-8.
        logprobs = (scores.double() / self.temperature).log_softmax(dim=-1)
        cumulative = logprobs.exp().cumsum(dim=-1)
        # Below the total, as the uniform is at most 1 - 2^-53: the last tokens are not
        # chosen when their probability is 0.
        level = self.uniforms[:, step : step + 1].to(scores.device) * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, level, right=True)
        # Out of range only if the logits are not numbers, which the caller reports.
        chosen = chosen.clamp(max=scores.shape[1] - 1)
        self.logprobs[:, step : step + 1] = logprobs.gather(1, chosen).cpu()
        return torch.full_like(scores, -math.inf).scatter_(1, chosen, 0.0)


class _Count(LogitsProcessor):
    """Counts the responses of one call that have ended, and the tokens of all."""

    def __init__(
        self, config: GenerationConfig, tell: Callable[[int, int], None]
    ) -> None:
        self._end_ids = torch.tensor(config.eos_token_id)
        self._left, self._tell = config.max_new_tokens, tell
        self._open: Tensor | None = None
        self._tokens = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Count the chosen tokens, of which `_InverseTransform` has left the scores."""
        if self._open is None:
            self._open = torch.ones(len(scores), dtype=torch.bool)
        self._tokens += int(self._open.sum())
        self._left -= 1
        self._open &= ~torch.isin(scores.argmax(dim=-1).cpu(), self._end_ids)
        open_ones = int(self._open.sum()) if self._left else 0
        self._tell(len(scores) - open_ones, self._tokens)
        return scores


def make_uniforms(streams: list[str], count: int) -> Tensor:
    """The first uniform numbers of each stream.

    Args:
        streams: names of the streams, B of them.
        count: numbers of each, K.

    Returns:
        Numbers in [0, 1), multiples of 2^-53, float64, [B, K].
    """
    rows = [
        torch.frombuffer(bytearray(random_bytes(s, 8 * count)), dtype=torch.int64)
        for s in streams
    ]
    return (torch.stack(rows) & (2**53 - 1)).double() * 2.0**-53


def random_bytes(stream: str, count: int) -> bytes:
    """The first bytes of a random stream; streams of different names are independent.

    A hash and not a seeded generator: torch's takes 32 bits of its seed, so that two of
    100,000 responses would probably share a stream.
    """
    return hashlib.shake_256(stream.encode()).digest(count)
