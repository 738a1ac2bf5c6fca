"""The schema of the `sample` section: prompts, rewards, sizes."""

import re
from string import Formatter
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from entropy_ddp.config.section import MAX_INTEGER, Section


class Prompts(Section):
    """Where prompts come from and how a row becomes one. A string alone is a `file`.

    Attributes:
        file: .jsonl, .jsonl.gz or .parquet.
        dataset: hub id, or folder, of a data set that the `datasets` library loads.
        name: configuration of the data set.
        split: split of the data set; a slice such as `train[:1000]` too.
        revision: commit or tag of the data set.
        field: key of the prompt: text, or a list of messages.
        template: the prompt's text, with {key} for the row's values, instead of `field`.
        chat: the text is a user's turn, which the chat template renders.
        system: system turn before it.
        chat_template_kwargs: further arguments of the chat template.
        keep: keys that are carried to the rollout file; all if not given.
    """

    file: str | None = None
    dataset: str | None = None
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    field: str | None = None
    template: str | None = None
    chat: bool = False
    system: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    keep: list[str] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "Prompts":
        if (self.file is None) == (self.dataset is None):
            raise ValueError("give exactly one of `file` and `dataset`")
        if self.dataset is not None and self.split is None:
            raise ValueError("`dataset` needs a `split`")
        for key in ("name", "split", "revision"):
            if self.file is not None and getattr(self, key) is not None:
                raise ValueError(f"`{key}` belongs to a `dataset`, not to a `file`")
        return self

    @model_validator(mode="after")
    def _one_text(self) -> "Prompts":
        if self.field is not None and self.template is not None:
            raise ValueError("give `field` or `template`, not both")
        if self.system is not None and not self.chat:
            raise ValueError("`system` needs `chat: true`")
        if self.template is not None:
            check_template(self.template)
        return self


def check_template(template: str) -> None:
    """Refuse a template that is not text with {key} placeholders.

    Raises:
        ValueError: a brace stands alone, or a placeholder is more than a key.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"`template`: {error}; write {{{{ and }}}} for braces of the text"
        ) from error
    for _, name, form, conversion in parts:
        if name is not None and (not name or form or conversion):
            raise ValueError(
                f"`template`: expected placeholders like {{question}}, found "
                f"{{{name}{'!' + conversion if conversion else ''}"
                f"{':' + form if form else ''}}}; write {{{{ and }}}} for braces of "
                "the text"
            )


class Reward(Section):
    """A reward, or one term of a sum. A string alone is a `function`.

    Exactly one of the first four keys says what is scored; `math`, `exact` and `regex`
    give 1 or 0.

    Attributes:
        function: `module:function` that scores (prompt, response, row).
        math: key of the gold answer; equal as mathematics (math-verify).
        exact: key of the gold answer; equal as text, surrounding space left out.
        regex: pattern that is searched in the response; `.` is a newline too.
        gold_after: the gold answer is what follows the last of these marks (`####`).
        answer_pattern: the answer is the group of this pattern's last match in the
            response; without a match it is wrong. If not given, the whole response.
        weight: factor of this term in the sum.
        name: what the term is called in the rollout file.
    """

    function: str | None = None
    math: str | None = None
    exact: str | None = None
    regex: str | None = None
    gold_after: str | None = Field(default=None, min_length=1)
    answer_pattern: str | None = None
    weight: float = Field(default=1.0, allow_inf_nan=False)
    name: str | None = None

    @property
    def gold(self) -> str | None:
        """Key of the gold answer, if this reward has one."""
        return self.math if self.math is not None else self.exact

    @property
    def label(self) -> str:
        """What the term is called."""
        if self.name is not None:
            return self.name
        if self.function is not None:
            return self.function.rpartition(":")[2]
        return "math" if self.math else "exact" if self.exact else "regex"

    @model_validator(mode="after")
    def _one_kind(self) -> "Reward":
        kinds = (self.function, self.math, self.exact, self.regex)
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError("give exactly one of `function`, `math`, `exact`, `regex`")
        for key in ("gold_after", "answer_pattern"):
            if self.gold is None and getattr(self, key) is not None:
                raise ValueError(f"`{key}` belongs to `math` or `exact`")
        return self

    @model_validator(mode="after")
    def _patterns_compile(self) -> "Reward":
        for key in ("regex", "answer_pattern"):
            pattern = getattr(self, key)
            if pattern is None:
                continue
            try:
                groups = re.compile(pattern, re.DOTALL).groups
            except re.error as error:
                raise ValueError(f"`{key}`: {error} in {pattern!r}") from error
            if key == "answer_pattern" and groups != 1:
                raise ValueError(f"`{key}`: expected one group (...), found {groups}")
        return self


def _as_prompts(value: Any) -> Any:
    return {"file": value} if isinstance(value, str) else value


def _as_rewards(value: Any) -> Any:
    terms = value if isinstance(value, list) else [value]
    terms = [{"function": term} if isinstance(term, str) else term for term in terms]
    return None if value is None else terms


class Sample(Section):
    """How to roll a batch out of the checkpoint.

    Attributes:
        prompts: a file's name, or the keys of `Prompts`.
        num_prompts: number of prompt draws (groups).
        responses_per_prompt: responses G of each group.
        with_replacement: whether a prompt can be drawn more than once.
        max_new_tokens: responses are cut off at this many tokens.
        reward: `module:function`, the keys of `Reward`, or a list of such terms, of
            which the weighted sum is taken.
        redraw_zero_advantage: how often a group whose rewards are all equal is sampled
            again, for the same prompt.
        sequences_per_call: responses generated together.
    """

    prompts: Annotated[Prompts, BeforeValidator(_as_prompts)]
    num_prompts: int = Field(gt=0, le=MAX_INTEGER)
    responses_per_prompt: int = Field(default=1, gt=0, le=MAX_INTEGER)
    with_replacement: bool = False
    max_new_tokens: int = Field(gt=0, le=MAX_INTEGER)
    reward: Annotated[
        list[Reward] | None, Field(min_length=1), BeforeValidator(_as_rewards)
    ] = None
    redraw_zero_advantage: int = Field(default=0, ge=0, le=MAX_INTEGER)
    sequences_per_call: int = Field(default=64, gt=0, le=MAX_INTEGER)

    @model_validator(mode="after")
    def _distinct_terms(self) -> "Sample":
        labels = [term.label for term in self.reward or []]
        twice = [label for label in labels if labels.count(label) > 1]
        if twice:
            raise ValueError(
                f"`reward`: two terms are called {twice[0]!r}; give them a `name` each"
            )
        return self
