"""What a probe of a training is asked to do."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entropy_ddp.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """Settings of `EntropyProbeCallback`.

    Attributes:
        out: folder of `ledger.jsonl`; made if it is not there.
        every: the optimizer steps whose number is a multiple of this are probed.
        num_prompts: prompts drawn for E at each probed step, with replacement.
        responses_per_prompt: responses to each.
        max_new_tokens: responses are cut off at this many tokens; None for the
            trainer's `max_completion_length`.
        prompts: what E is drawn from: a file or the keys of a `prompts` section, a list
            of prompts (texts, or lists of messages); None for the prompts that are
            trained on.
        truth: score E after the step too.
        second_order: predict the change at the middle of the step too.
        top: number of tokens and prompts listed by name.
        seed: seed of all that is drawn for E.
        tokens_per_microbatch: budget of padded tokens for one forward pass.
    """

    out: str | Path
    every: int = 10
    num_prompts: int = 128
    responses_per_prompt: int = 1
    max_new_tokens: int | None = None
    prompts: str | Path | dict[str, Any] | list[Any] | None = None
    truth: bool = True
    second_order: bool = True
    top: int = 20
    seed: int = 0
    tokens_per_microbatch: int = 8192

    def __post_init__(self) -> None:
        for name, least in (
            ("every", 1),
            ("num_prompts", 2),
            ("responses_per_prompt", 1),
            ("top", 1),
            ("seed", 0),
            ("tokens_per_microbatch", 1),
        ):
            found = getattr(self, name)
            if not isinstance(found, int) or found < least:
                raise InputError(
                    f"{name}: expected a whole number of at least {least}, found "
                    f"{found!r}; correct the callback's settings"
                )
