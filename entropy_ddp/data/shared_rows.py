"""What every rank knows of every row of a rollout file: all but other ranks' tokens.

Of each row a rank holds its facts, some 200 bytes and the row's unknown keys as text;
token ids and the sampler's log-probabilities it holds of its own rows only.

Shape legend: n rows.
"""

import json
import math
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, fields, replace
from typing import Any, overload

import torch
from torch import Tensor

from entropy_ddp.data.batch import DIGEST_BYTES, Sequence

# Digests of a sequence, in the order in which a row has them.
_DIGESTS = (
    "prompt_digest",
    "named_prompt_digest",
    "response_digest",
    "logprobs_digest",
)
# What a flag says; -1 where nothing is recorded.
_FLAGS = {-1: None, 0: False, 1: True}


@dataclass(frozen=True, kw_only=True, eq=False)
class Facts:
    """What is known of rows without their tokens, column by column, one entry a row.

    Attributes:
        index: 0-based line, int64, [n].
        group_key: the value of the key `group`.
        num_prompt_tokens, num_tokens: lengths of prompt and response, int64, [n].
        last_id: the response's last token id; -1 without tokens, int64, [n].
        reward, advantage: float64, [n]; NaN where there is none.
        finished, with_replacement: -1 where there is none, int8, [n].
        num_prompts_total: 0 where there is none, int64, [n].
        has_logprobs: whether the sampler's log-probabilities are there, bool, [n].
        ids_from_text: marks, or None.
        digests: of the row's `_DIGESTS`, uint8, [n, 4, DIGEST_BYTES].
        extra: the row's unknown keys as JSON; empty where there is none.
    """

    index: Tensor
    group_key: list[int | str]
    num_prompt_tokens: Tensor
    num_tokens: Tensor
    last_id: Tensor
    reward: Tensor
    advantage: Tensor
    finished: Tensor
    with_replacement: Tensor
    num_prompts_total: Tensor
    has_logprobs: Tensor
    ids_from_text: list[tuple[str, ...] | None]
    digests: Tensor
    extra: list[bytes]

    @classmethod
    def of(cls, sequences: list[Sequence]) -> "Facts":
        """The facts of sequences that are held whole."""

        def numbers(values: Iterable[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(list(values), dtype=dtype)

        def flags(name: str) -> Tensor:
            values = (getattr(s, name) for s in sequences)
            return numbers((-1 if v is None else v for v in values), torch.int8)

        def amounts(name: str) -> Tensor:
            values = (getattr(s, name) for s in sequences)
            none = float("nan")
            return numbers((none if v is None else v for v in values), torch.float64)

        digests = b"".join(getattr(s, name) for s in sequences for name in _DIGESTS)
        # Equal texts and marks are kept once.
        texts: dict[bytes, bytes] = {}
        marks: dict[Any, Any] = {}
        keys: dict[Any, Any] = {}
        encoded = (json.dumps(s.extra).encode() if s.extra else b"" for s in sequences)
        return cls(
            index=numbers((s.index for s in sequences), torch.int64),
            group_key=[keys.setdefault(s.group_key, s.group_key) for s in sequences],
            num_prompt_tokens=numbers(
                (s.num_prompt_tokens for s in sequences), torch.int64
            ),
            num_tokens=numbers((s.num_tokens for s in sequences), torch.int64),
            last_id=numbers((s.last_id for s in sequences), torch.int64),
            reward=amounts("reward"),
            advantage=amounts("advantage"),
            finished=flags("finished"),
            with_replacement=flags("with_replacement"),
            num_prompts_total=numbers(
                (s.num_prompts_total or 0 for s in sequences), torch.int64
            ),
            has_logprobs=numbers(
                (s.sampling_logprobs is not None for s in sequences), torch.bool
            ),
            ids_from_text=[
                marks.setdefault(s.ids_from_text, s.ids_from_text) for s in sequences
            ],
            digests=torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(
                -1, len(_DIGESTS), DIGEST_BYTES
            )
            if digests
            else torch.empty(0, len(_DIGESTS), DIGEST_BYTES, dtype=torch.uint8),
            extra=[texts.setdefault(text, text) for text in encoded],
        )

    @classmethod
    def joined(cls, parts: list["Facts"]) -> "Facts":
        """The facts of all parts, in the order of their lines."""
        columns: dict[str, Any] = {}
        for field in fields(cls):
            pieces = [getattr(part, field.name) for part in parts]
            is_tensor = isinstance(pieces[0], Tensor)
            columns[field.name] = (
                torch.cat(pieces)
                if is_tensor
                else [v for piece in pieces for v in piece]
            )
        whole = cls(**columns)
        order = whole.index.argsort()
        return whole if bool((order.diff() > 0).all()) else whole.chosen(order)

    def chosen(self, places: Tensor) -> "Facts":
        """The facts of some rows."""
        numbers = places.tolist()
        columns: dict[str, Any] = {}
        for field in fields(self):
            values = getattr(self, field.name)
            is_tensor = isinstance(values, Tensor)
            columns[field.name] = (
                values[places] if is_tensor else [values[i] for i in numbers]
            )
        return Facts(**columns)

    def column(self, name: str) -> list[Any]:
        """One attribute of the rows' sequences, [n]."""
        if name in _DIGESTS:
            found = self.digests[:, _DIGESTS.index(name)].contiguous().numpy().tobytes()
            size = DIGEST_BYTES
            return [found[i : i + size] for i in range(0, len(found), size)]
        values = getattr(self, name)
        if name == "extra":
            return [json.loads(text) if text else {} for text in values]
        if name in ("group_key", "ids_from_text"):
            return list(values)
        if name in ("finished", "with_replacement"):
            return [_FLAGS[value] for value in values.tolist()]
        if name in ("reward", "advantage"):
            return [None if math.isnan(value) else value for value in values.tolist()]
        if name == "num_prompts_total":
            return [value or None for value in values.tolist()]
        return list(values.tolist())


Tokens = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedRows(AbstractSequence[Sequence]):
    """The sequences of a batch, each made when it is asked for.

    The tokens of one that another rank holds are tensors of the device `meta`: they
    have a length, and whoever reads their values fails.

    Attributes:
        facts: of every row, in file order.
        groups: number of each row's group, int64, [n].
        held: prompt, response and sampler's log-probabilities of the rows that this
            rank holds, by line.
    """

    facts: Facts
    groups: Tensor
    held: dict[int, Tokens]

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, place: int) -> Sequence: ...
    @overload
    def __getitem__(self, place: slice) -> "SharedRows": ...
    def __getitem__(self, place: int | slice) -> "Sequence | SharedRows":
        if isinstance(place, slice):
            return self.chosen(torch.arange(len(self))[place])
        row = range(len(self))[place]
        one = torch.tensor([row])
        return next(iter(self.chosen(one)))

    def __iter__(self) -> Iterator[Sequence]:
        names = (
            "index",
            "group_key",
            "reward",
            "advantage",
            "finished",
            "ids_from_text",
            "num_prompts_total",
            "with_replacement",
        )
        columns = [self.facts.column(name) for name in names]
        tokens = (
            self.facts.num_prompt_tokens.tolist(),
            self.facts.num_tokens.tolist(),
            self.facts.has_logprobs.tolist(),
        )
        for place, (group, *values) in enumerate(zip(self.groups.tolist(), *columns)):
            known = dict(zip(names, values))
            found = self.held.get(known["index"])
            if found is None:
                found = _elsewhere(*(column[place] for column in tokens))
            text = self.facts.extra[place]
            yield Sequence(
                **known,
                group=group,
                prompt_ids=found[0],
                response_ids=found[1],
                sampling_logprobs=found[2],
                extra=json.loads(text) if text else {},
            )

    def column(self, name: str) -> list[Any]:
        """One attribute of every sequence, without making the sequences."""
        return self.groups.tolist() if name == "group" else self.facts.column(name)

    def chosen(self, places: Tensor) -> "SharedRows":
        """Some of the sequences, in the order of the places."""
        return replace(
            self, facts=self.facts.chosen(places), groups=self.groups[places]
        )

    def with_groups(self, groups: Tensor) -> "SharedRows":
        """The same sequences in groups of other numbers, [n]."""
        return replace(self, groups=groups)

    def with_advantages(self, advantages: Tensor) -> "SharedRows":
        """The same sequences with these advantages [n]."""
        return replace(self, facts=replace(self.facts, advantage=advantages))


def _elsewhere(prompt: int, response: int, has_logprobs: bool) -> Tokens:
    """Tokens of such lengths that another rank holds."""
    lengths = (prompt, response)
    ids = [torch.empty(n, dtype=torch.int64, device="meta") for n in lengths]
    logprobs = None
    if has_logprobs:
        logprobs = torch.empty(response, dtype=torch.float64, device="meta")
    return ids[0], ids[1], logprobs
