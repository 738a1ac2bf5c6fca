"""Numbers and names as a reader sees them: a true minus, sensible digits, units."""

import math
import os.path
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from entropy_ddp.estimators.quantiles import two_sided

MINUS = "\N{MINUS SIGN}"
NARROW = "\N{NARROW NO-BREAK SPACE}"
FIXED = "\N{NO-BREAK SPACE}"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Below this a decimal number is mostly zeros.
SMALLEST_DECIMAL, LARGEST_DECIMAL = 1e-3, 1e6
# What has no interval of its own stands out of its error from this many of it on.
RESOLVED = 2.0
# Where there is no number.
DASH = "–"
DECILE = "probability decile"
# Characters below which what texts have in common is not a template.
TEMPLATE = 16

UNITS = {
    "per_token": "nats per token",
    "per_sequence": "nats per sequence",
    "per_sequence_token_mean": "nats per token (mean over sequences)",
    "sum": "nats in all",
}
# The same on axes and above tables.
AXIS_UNITS = {
    "per_token": "nats/token",
    "per_sequence": "nats/sequence",
    "per_sequence_token_mean": "nats/token, mean over sequences",
    "sum": "nats",
}
LOSSES = {"dr_grpo": "Dr. GRPO", "grpo": "GRPO", "dapo": "DAPO", "nll": "NLL"}


def is_resolved(change: float, error: float, quantile: float = RESOLVED) -> bool:
    """Whether a change stands out of its standard error.

    Args:
        quantile: errors that make its interval, see `quantile_of`.
    """
    return change != 0 and abs(change) >= quantile * error


def excludes_zero(interval: Sequence[float]) -> bool:
    """Whether a 95 % interval leaves zero out: the change in it is resolved."""
    low, high = interval
    return low > 0 or high < 0


def quantile_of(document: Mapping[str, Any]) -> float:
    """Standard errors that make half of a 95 % interval: Student's t of E's groups.

    Results of versions that wrote no interval have errors by the delta method alone, and
    are judged by the normal quantile.
    """
    if "interval" not in document["truth"]:
        return RESOLVED
    return two_sided(independent_units(document["E"]) - 1)


def independent_units(facts: Mapping[str, Any]) -> int:
    """Prompt draws of a batch; of a set in balanced passes, a prompt counts once."""
    if facts.get("with_replacement") is False:
        return min(facts["num_groups"], facts["num_prompts_total"])
    return int(facts["num_groups"])


def true_minus(text: str) -> str:
    """A number's hyphens as minus signs."""
    return text.replace("-", MINUS)


def typeset(text: str) -> str:
    """Comparisons and negative numbers in their own signs."""
    text = text.replace(">=", "≥").replace("<=", "≤")
    return re.sub(r"(?<![\w-])-(?=\d)|(?<=\de)-(?=\d)", MINUS, text)


def power_of_ten(exponent: int) -> str:
    """10 to this power, in one line of text."""
    return "10" + str(exponent).translate(SUPERSCRIPTS)


def is_decimal(value: float) -> bool:
    """Whether a number is written out, rather than with a power of ten."""
    return value == 0 or SMALLEST_DECIMAL <= abs(value) < LARGEST_DECIMAL


def number(value: float, digits: int = 4, *, signed: bool = False) -> str:
    """A number with at most this many significant digits; only 0 reads as 0."""
    sign = "+" if signed and value > 0 else ""
    if value == round(value) and abs(value) < LARGEST_DECIMAL:
        return sign + true_minus(f"{value:,.0f}") if value else "0"
    digits = _digits_needed(value, digits)
    if is_decimal(value):
        places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return sign + true_minus(f"{value:,.{places}f}")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return sign + true_minus(mantissa) + f"{FIXED}×{FIXED}{power_of_ten(int(exponent))}"


def _digits_needed(value: float, most: int) -> int:
    """The fewest digits that are the value itself, as in a learning rate of 0.001."""
    candidates = range(1, most)
    return next((n for n in candidates if float(f"{value:.{n - 1}e}") == value), most)


def with_error(value: float, error: float, *, signed: bool = True) -> str:
    """`value ± error`, both to the second digit of the error."""
    if error <= 0 or not math.isfinite(error):
        return f"{number(value, signed=signed)}{FIXED}±{FIXED}{number(error)}"
    # Of the error as it is shown: 0.996 reads as 1.0.
    last = math.floor(math.log10(float(f"{error:.1e}"))) - 1
    sign = "+" if signed and value > 0 else ""
    largest = max(abs(value), error)
    if is_decimal(largest) and last >= -7:
        places = max(0, -last)
        value, error = round(value, -last), round(error, -last)
        pair = f"{value:,.{places}f}{FIXED}±{FIXED}{error:,.{places}f}"
        return sign + true_minus(pair)
    exponent = math.floor(math.log10(largest))
    scale, places = 10.0**exponent, max(0, exponent - last)
    pair = f"{value / scale:.{places}f}{FIXED}±{FIXED}{error / scale:.{places}f}"
    power = power_of_ten(exponent)
    return f"({sign}{true_minus(pair)}){FIXED}×{FIXED}{power}"


def error_of(values: Mapping[str, Any], name: str = "se") -> float:
    """A standard error: by the jackknife where it was written, else by the delta method.

    The jackknife's is the one that intervals are made of.
    """
    jackknife = f"{name}_jackknife"
    return float(values[jackknife if jackknife in values else name])


def shown_error(truth: Mapping[str, Any]) -> float:
    """What stands behind a measured change: sampling error and rounding together."""
    return math.hypot(error_of(truth), truth.get("noise_floor") or 0.0)


def missed(document: Mapping[str, Any], prediction: str) -> tuple[float, float]:
    """What a prediction, `linear` or `curvature`, misses of the change, and its error.

    By the matched pair of truth and slope where the run has it: its noise is smaller
    than that of the difference of the two numbers shown, and its expectation the same.
    """
    noise = document["truth"].get("noise_floor") or 0.0
    found = document[prediction]
    matched = found.get("matched_difference")
    if matched is not None:
        return matched["value"], math.hypot(error_of(matched), noise)
    predicted = found["delta_h1" if prediction == "linear" else "delta_h2"]
    error = math.hypot(error_of(found, "difference_se"), noise)
    return document["truth"]["delta_h_true"] - predicted, error


def missed_interval(
    document: Mapping[str, Any], prediction: str
) -> tuple[float, float] | None:
    """Its 95 % interval; None where none was written."""
    found = document[prediction]
    matched = found.get("matched_difference", {})
    return matched.get("interval", found.get("difference_interval"))


def is_missed(document: Mapping[str, Any], prediction: str) -> bool:
    """Whether what a prediction misses of the measured change stands out of its error."""
    interval = missed_interval(document, prediction)
    if interval is not None:
        return excludes_zero(interval)
    return is_resolved(*missed(document, prediction))


def entropy_error(truth: Mapping[str, Any]) -> float | None:
    """Standard error of the entropy before the step; None where none was written."""
    return error_of(truth, "H_orig_se") if "H_orig_se" in truth else None


# What stands beside parts and shares.
GIVEN_E = (
    "Parts and shares are of this E and have no error of their own: they are shown with "
    "the digits that the error of the first-order change leaves."
)


def linear_error(document: Mapping[str, Any]) -> float:
    """Standard error of the first-order change."""
    eta = document["update"]["learning_rate_used"]
    return abs(eta) * error_of(document["linear"])


def relative_error(document: Mapping[str, Any]) -> float:
    """The same over the size of the change; what is not known at all is 1."""
    change = abs(document["linear"]["delta_h1"])
    return min(1.0, linear_error(document) / change) if change else 1.0


def supported(
    value: float, error: float, most: int = 4, *, signed: bool = False
) -> str:
    """A number by itself, with no digit behind the first of its error.

    At least one digit: how large an estimate is, is known where its sign is not.
    """
    if not value or error <= 0 or not math.isfinite(error):
        return number(value, most, signed=signed)
    value, digits = without_digits_behind(value, error, most)
    return number(float(f"{value:.{digits - 1}e}"), digits, signed=signed)


def without_digits_behind(value: float, error: float, most: int) -> tuple[float, int]:
    """A number rounded to the first digit of its error, and how many digits it has then.

    At least one: 980 with an error of 100 is 1000, of two digits, and 0.0996 with an
    error of 0.01 is 0.10; 3 with an error of 100 is 3, of one.
    """
    last = math.floor(math.log10(error))
    value = round(value, -last) or value
    return value, max(1, min(most, math.floor(math.log10(abs(value))) - last + 1))


def interval(low: float, high: float, *, signed: bool = True) -> str:
    """`low to high`, both to the second digit of half their distance."""
    half = (high - low) / 2
    if not half > 0 or not math.isfinite(half):
        return f"{number(low, signed=signed)} to {number(high, signed=signed)}"
    last = math.floor(math.log10(float(f"{half:.1e}"))) - 1
    largest = max(abs(low), abs(high))
    exponent = 0
    if not (is_decimal(largest) and last >= -7):
        exponent = math.floor(math.log10(largest))
    places = max(0, exponent - last)
    ends = [
        _end((round(end, -last) or end) / 10.0**exponent, places, signed=signed)
        for end in (low, high)
    ]
    if not exponent:
        return " to ".join(ends)
    power = power_of_ten(exponent)
    return f"({' to '.join(ends)}){FIXED}×{FIXED}{power}"


def _end(value: float, places: int, *, signed: bool) -> str:
    """An end of an interval; one that is not 0 never reads as 0."""
    text = f"{value:,.{places}f}"
    while value and float(text.replace(",", "")) == 0 and places < 12:
        places += 1
        text = f"{value:,.{places}f}"
    sign = "+" if signed and value > 0 else ""
    return sign + true_minus(text)


def percent_with_error(share: float, error: float, *, signed: bool = True) -> str:
    """A share and its error, as percentages."""
    pair = with_error(100 * share, 100 * error, signed=signed)
    return f"{pair}{FIXED}%" if pair[0] != "(" else f"({pair}){FIXED}%"


def percent(share: float, digits: int = 2, *, signed: bool = False) -> str:
    """A share as a percentage with this many significant digits."""
    value = 100 * share + 0.0  # a share of nothing has no sign
    if value and abs(value) < 1e-2:
        return number(value, digits, signed=signed) + FIXED + "%"
    places = 0
    if value:
        places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:+.{places}f}" if signed and value else f"{value:.{places}f}"
    return true_minus(text) + FIXED + "%"


def supported_percent(share: float, error: float) -> str:
    """A share as a percentage, with the digits that its error leaves; two at most."""
    return f"{supported(100 * share, 100 * error, 2)}{FIXED}%"


def exact(value: Any) -> str:
    """A number with all its digits, for whoever wants them."""
    return str(value) if isinstance(value, (int, str)) else repr(value)


def count(value: int, noun: str) -> str:
    """`1 check`, `58 checks`."""
    return f"{value:,} {noun}" + ("" if value == 1 else "s")


def listed(items: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *head, last = items
    return f"{', '.join(head)} and {last}" if head else last


def in_line(text: str) -> str:
    """Text on one line: line feeds, tabs and what cannot be printed are shown."""
    shown = text.replace("\t", "→").replace("\r", "␍").replace("\n", "↵")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown)


def one_line(text: str, most: int) -> str:
    """The beginning of a text of sentences, with a space for every white space."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most] + "…"


def around(before: str, after: str, most: int) -> tuple[str, str]:
    """What stands directly before and after a token, this many characters of each."""
    before, after = in_line(before), in_line(after)
    head = before if len(before) <= most else "…" + before[-most:]
    tail = after if len(after) <= most else after[:most] + "…"
    return head, tail


def visible(token: str) -> str:
    """A token's text on one line; one of white space only is shown too."""
    if token == "":
        return "∅"
    return in_line(token if token.strip(" ") else token.replace(" ", "·"))


def tenth(place: int) -> str:
    """A tenth of the tokens by their probability, from 0 for the least probable."""
    ends = {0: "least probable tenth", 9: "most probable tenth"}
    ordinals = {1: "2nd", 2: "3rd"}
    return ends.get(place, f"{ordinals.get(place, f'{place + 1}th')} tenth")


def title_of_kinds(name: str) -> str:
    """By what a table of `attribution.summaries` sums shares."""
    return {DECILE: "probability, in tenths of the tokens"}.get(name, name)


def name_of_kind(name: str, label: str) -> str:
    """A row of it: 0-10 % of the tokens in order of p are not tokens with p < 10 %."""
    return tenth(int(label.split("-")[0]) // 10) if name == DECILE else label


def short_name(parameter: str) -> str:
    """A parameter's name without what PEFT wraps around every one of them."""
    for wrapping in ("base_model.model.", "model.", "transformer."):
        parameter = parameter.removeprefix(wrapping)
    return parameter.removesuffix(".weight").removesuffix(".default")


def differing(texts: Sequence[str]) -> list[str]:
    """Texts without a long beginning and a long end that all have, as of a template.

    Both are cut at a space or at a special token's bracket. A text of which nothing
    would be left is whole.
    """
    if len(set(texts)) < 2:
        return list(texts)
    head = re.sub(r"[^\s>\]]+\Z", "", os.path.commonprefix(list(texts)))
    if len(head) < TEMPLATE:
        head = ""
    rest = [text[len(head) :] for text in texts]
    tail = os.path.commonprefix([text[::-1] for text in rest])[::-1]
    tail = re.sub(r"\A[^\s<\[]+", "", tail)
    if len(tail) < TEMPLATE:
        tail = ""
    cut = [text[: len(text) - len(tail)].strip() for text in rest]
    return [
        f"{'…' if head else ''}{short}{'…' if tail else ''}" if short else text
        for short, text in zip(cut, texts, strict=True)
    ]
