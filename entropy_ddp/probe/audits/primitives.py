"""What an audit is made of: a fact, a comparison or a threshold.

Every audit compares with something independent of the computation it checks. A verdict
is `ok`, `warn` (the result stands, with the reservation named) or `fail` (the result
cannot be trusted); whatever is not ok carries the likely cause and the next thing to try.
"""

from typing import Any

from entropy_ddp.results import AuditRow, Verdict


def fact(name: str, value: Any, expected: str = "") -> AuditRow:
    """A number to read, without a way to fail."""
    return AuditRow(name=name, value=value, expected=expected, verdict="ok")


def compare(
    name: str, value: Any, expected: str, holds: bool, hint: str, *, fatal: bool = True
) -> AuditRow:
    """A value against what is expected: ok if that holds, otherwise fail (or warn).

    Args:
        name: what is audited.
        value: what was found.
        expected: in words.
        holds: whether it is as expected.
        hint: the likely cause, and what to do, if it is not.
        fatal: whether the results cannot be trusted then.
    """
    failed: Verdict = "fail" if fatal else "warn"
    return AuditRow(
        name=name,
        value=value,
        expected=expected,
        verdict="ok" if holds else failed,
        hint="" if holds else hint,
    )


def threshold(
    name: str, error: float, tolerance: float, hint: str, *, fatal: bool = True
) -> AuditRow:
    """A relative error against its tolerance; NaN fails."""
    return compare(
        name, error, f"<= {tolerance:.0e}", error <= tolerance, hint, fatal=fatal
    )


def worst_verdict(rows: list[AuditRow]) -> Verdict:
    """fail if any row failed, else warn if any warned, else ok."""
    verdicts = {row.verdict for row in rows}
    return "fail" if "fail" in verdicts else "warn" if "warn" in verdicts else "ok"
