"""The responses of U that move the entropy most, token by token.

tokens.jsonl.gz is read twice and never held: once for what figures need of every token,
once for the responses that are shown.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from entropy_ddp.answers.shares import SharesByKind, is_reliable, not_reliable
from entropy_ddp.answers.words import (
    UNITS,
    differing,
    number,
    one_line,
    relative_error,
    supported,
    visible,
)
from entropy_ddp.report.page import TokenText, TokenTexts
from entropy_ddp.results.reading import Columns, StoredRun

NUM_RESPONSES = 12
# Of a long response so many tokens around the strongest one are open, and so many on
# either side of them can be unfolded; the rest is left out.
OPEN_TOKENS, FOLDED_TOKENS = 300, 400
# Responses that are no longer fit side by side.
SHORT_TOKENS = 40
# Longer prompts, and those of several lines, are folded. Of a long one so many
# characters are shown, its last ones; on the line that stands for it, its first.
SHORT_PROMPT, PROMPT_END, PROMPT_LINE = 60, 3000, 200
DIGITS = 4
COLUMNS = ("share", "logp", "covariance")

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TokenColumns:
    """What figures need of every token of U.

    Attributes:
        values: share, log p and covariance score, [T] each.
        moved: sum of |share| of each response by its index in U.
        by_kind: sums of shares by kind of token.
    """

    values: dict[str, np.ndarray]
    moved: dict[int, float]
    by_kind: SharesByKind


def read_tokens(run: StoredRun) -> TokenColumns:
    """One pass over the tokens of an attribution.

    Raises:
        InputError: tokens.jsonl.gz is absent or damaged.
    """
    values: dict[str, list[float]] = {name: [] for name in COLUMNS}
    moved: dict[int, float] = {}
    by_kind = SharesByKind()
    for row in run.tokens():
        for name, column in values.items():
            column.append(row[name])
        moved[row["index"]] = moved.get(row["index"], 0.0) + abs(row["share"])
        by_kind.add(row)
    arrays = {name: np.array(column) for name, column in values.items()}
    return TokenColumns(values=arrays, moved=moved, by_kind=by_kind)


def token_texts(run: StoredRun, tokens: TokenColumns, update: Columns) -> TokenTexts:
    """The responses with the largest sums of |share|; `update`: the columns of U."""
    ranked = sorted(tokens.moved, key=lambda index: (-tokens.moved[index], index))
    chosen = ranked[:NUM_RESPONSES]
    rows: dict[int, list[Row]] = {index: [] for index in chosen}
    for row in run.tokens():
        if row["index"] in rows:
            rows[row["index"]].append(row)
    largest = max(abs(row["share"]) for found in rows.values() for row in found)
    unit = UNITS[run.document["linear"]["normalize"]]
    prompts = _prompts(update)
    relative = relative_error(run.document)
    texts = [_text(i, rows[i], update, prompts, largest, relative) for i in chosen]
    which = f"The {len(texts)} responses of U whose tokens move the entropy most"
    if not is_reliable(run.document):
        which += f", {not_reliable(run.document)}"
    return TokenTexts(
        caption=(
            f"{which}. The "
            "stronger a token's ground, the larger its share: blue lowers the entropy, "
            "orange raises it. Point at a token, tap it, or walk with the arrow keys."
        ),
        texts=texts,
        largest=number(largest, 2),
        unit=unit,
        short=all(len(rows[index]) <= SHORT_TOKENS for index in chosen),
    )


def _prompts(update: Columns) -> dict[str, str]:
    """Every prompt of U, and what tells it from the others, on one line."""
    found = {text for text in update.get("prompt", ()) if isinstance(text, str)}
    texts = sorted(found)
    return {
        text: one_line(short, PROMPT_LINE)
        for text, short in zip(texts, differing(texts), strict=True)
    }


def _text(
    index: int,
    rows: list[Row],
    update: Columns,
    prompts: dict[str, str],
    largest: float,
    relative: float,
) -> TokenText:
    place = update["index"].index(index)
    title = f"Line {index + 1}"
    for name in ("group", "reward"):
        if name in update:
            value = update[name][place]
            shown = number(value) if isinstance(value, float) else value
            title += f" · {name} {shown}"
    share = update["share"][place]
    title += f" · share {supported(share, relative * abs(share), 3, signed=True)}"
    prompt = update["prompt"][place] if "prompt" in update else ""
    prompt = prompt if isinstance(prompt, str) else ""
    is_short = len(prompt) <= SHORT_PROMPT and "\n" not in prompt
    line = "" if is_short else prompts[prompt]
    if len(prompt) > PROMPT_END:
        prompt = "…" + prompt[-PROMPT_END:]
    start, end = _window([abs(row["share"]) for row in rows])
    first, last = max(0, start - FOLDED_TOKENS), min(len(rows), end + FOLDED_TOKENS)
    return TokenText(
        title=title,
        prompt=prompt,
        prompt_line=line,
        advantage=number(rows[0]["advantage"], DIGITS, signed=True),
        before=_tokens(rows[first:start], largest),
        shown=_tokens(rows[start:end], largest),
        after=_tokens(rows[end:last], largest),
        left_out=(first, len(rows) - last),
    )


def _window(sizes: Sequence[float]) -> tuple[int, int]:
    """The open part of a response: all of it, or what surrounds its strongest token."""
    if len(sizes) <= OPEN_TOKENS:
        return 0, len(sizes)
    strongest = max(range(len(sizes)), key=sizes.__getitem__)
    start = min(max(0, strongest - OPEN_TOKENS // 2), len(sizes) - OPEN_TOKENS)
    return start, start + OPEN_TOKENS


def _tokens(rows: Iterable[Row], largest: float) -> list[dict[str, Any]]:
    return [_token(row, largest) for row in rows]


def _token(row: Row, largest: float) -> dict[str, Any]:
    share = row["share"]
    # The square root, as shares are spread over many powers of ten.
    strength = math.sqrt(abs(share) / largest) if largest else 0.0
    values = [number(share, DIGITS, signed=True)]
    values += [number(row[name], DIGITS) for name in ("logp", "entropy", "covariance")]
    text = row.get("text", f"⟨{row['token_id']}⟩")
    sign = "cold" if share < 0 else "warm"
    return {
        "text": visible(text),
        "sign": sign if strength >= 0.05 else "",
        "strength": f"{strength:.2f}".removeprefix("0"),
        "numbers": "|".join([str(row["k"]), *values]),
        "breaks": text.endswith("\n"),
    }
