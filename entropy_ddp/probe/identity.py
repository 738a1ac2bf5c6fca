"""What a run's numbers depend on: what must be the same for it to be resumed.

Keys of the configuration stand with their values, except those that change no number
(how the work is cut) and paths, in whose place the content stands: a hash of the
parameters, the optimizer state, the batches; the device stands there as it was chosen,
and beside the version a hash of the code. Names are what a message calls them by.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch

import entropy_ddp
from entropy_ddp.checkpoint.policy import Policy
from entropy_ddp.config import Config
from entropy_ddp.data.batch import Batch
from entropy_ddp.model.parameters import fingerprint, frozen_fingerprint
from entropy_ddp.update.step import optimizer_tensors

_LEFT_OUT = (
    # What stands there by its content.
    "checkpoint",
    "batches.E.file",
    "batches.U.file",
    "update.delta",
    # Whose values stand there, whoever gave them.
    "update.from_checkpoint",
    # A point depends on its own eta: a grid may be extended.
    "sweep",
    # What is written and shown.
    "out",
    "update.save_delta",
    "attribution.top",
    "compute.count_operations",
    # What a number is held against when all are there.
    "truth.ess_warn",
    "truth.ess_abort",
    # How the work is cut, where it is done, and how long ranks wait for each other.
    "compute.device",
    "compute.tokens_per_microbatch",
    "compute.snapshot_device",
    "compute.rank_timeout_seconds",
    "batches.E.sample.sequences_per_call",
    "batches.U.sample.sequences_per_call",
)
_HASH_DIGITS = 16


def identity_of_configuration(config: Config, command: str) -> dict[str, Any]:
    """What the command line and the configuration say."""
    identity: dict[str, Any] = {"command": command, "entropy_ddp": _own_version()}
    identity["torch"] = torch.__version__
    return identity | _flat(config.model_dump(mode="json"), "")


def _own_version() -> str:
    """The version and a hash of the code, which in a clone changes without it."""
    digest = hashlib.sha256()
    folder = Path(entropy_ddp.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return f"{entropy_ddp.__version__} (code {digest.hexdigest()[:_HASH_DIGITS]})"


def _flat(section: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A nested mapping as one with dotted keys, without what is left out."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        name = f"{prefix}{key}"
        if name in _LEFT_OUT:
            continue
        found |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def identity_of_checkpoint(
    policy: Policy,
    optimizer: torch.optim.Optimizer | None,
    change: torch.Tensor | None,
) -> dict[str, Any]:
    """Content of the trained and frozen weights, and of what the step is made of."""
    identity = {
        "device": policy.device.type,
        "trained weights": fingerprint(policy.parameters.items())[:_HASH_DIGITS],
        "other weights": frozen_fingerprint(policy.model)[:_HASH_DIGITS],
    }
    if optimizer is not None:
        state = fingerprint(optimizer_tensors(optimizer))
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        identity["optimizer state"] = state[:_HASH_DIGITS]
        identity["optimizer settings"] = repr(groups)
    if change is not None:
        identity["update.delta"] = fingerprint([("", change)])[:_HASH_DIGITS]
    return identity


def identity_of_batch(batch: Batch) -> str:
    """Content of a batch: everything but the keys that are carried to the output."""
    digest = hashlib.sha256()
    for s in batch.sequences:
        numbers = (s.group_key, s.reward, s.advantage, s.finished)
        digest.update(repr(numbers).encode())
        for values in (s.prompt_ids, s.response_ids, s.sampling_logprobs):
            size = None if values is None else len(values)
            digest.update(f"{size};".encode())
            if values is not None:
                digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()[:_HASH_DIGITS]


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is not the same: the key, its value before, its value now."""
    absent = "not there"
    return [
        f"{key} was {_shown(before.get(key, absent))}, now "
        f"{_shown(now.get(key, absent))}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key, absent) != now.get(key, absent)
    ]


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
