"""What the sums of a ledger are called, in the terminal and on its page."""

NAMES = {
    "curve": "entropy on fresh responses, last - first",
    "truth": "sum of ΔH true",
    "first_order": "sum of ΔH first order",
    "second_order": "sum of ΔH second order",
}
PART_NAMES = {
    "momentum": "momentum (earlier batches)",
    "decay": "weight decay",
    "gradient": "gradient of the step's batch",
    "curvature": "curvature (second order - first)",
    "rest": "rest",
}
TOKEN_NAMES = {
    "positive": "tokens with A > 0",
    "negative": "tokens with A < 0",
    "zero": "tokens with A = 0",
    "unattributed": "not of the tokens (dropout, rounding)",
}
