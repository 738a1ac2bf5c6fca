"""What a configuration, its checkpoint and its batches are, without probing them."""

from pathlib import Path
from typing import Any

from entropy_ddp.config import Config
from entropy_ddp.distributed import World
from entropy_ddp.errors import InputError
from entropy_ddp.policy.checkpoint import find_checkpoint
from entropy_ddp.policy.implementations import slower_routes
from entropy_ddp.policy.optimizer_state import load_optimizer
from entropy_ddp.policy.selfcheck import check_model
from entropy_ddp.policy.trained_settings import contradictions
from entropy_ddp.policy.training_arguments import (
    find_training_arguments,
    read_training_arguments,
)
from entropy_ddp.probe.session import (
    Progress,
    Session,
    check_batches,
    open_policy,
    require_optimizer,
    sampling_settings,
    token_limits,
)
from entropy_ddp.rollouts.advantages import compute_advantages
from entropy_ddp.rollouts.batch import Batch
from entropy_ddp.rollouts.draws import describe_sampling
from entropy_ddp.rollouts.files import read_batch


def inspect_run(config: Config, world: World, progress: Progress) -> dict[str, Any]:
    """Open everything that a probe would open, pass over a made-up row only.

    Returns:
        What was found, by subject.

    Raises:
        InputError: anything is wrong.
    """
    files = find_checkpoint(config.checkpoint)
    optimizer_file = require_optimizer(files)
    session = open_policy(config, world, files, progress)
    policy = session.policy
    optimizer = load_optimizer(optimizer_file, policy.model, policy.parameters)
    routes = slower_routes(policy.model, config.compute.attention, policy.dtype)
    checks = check_model(session.passes, policy.vocabulary_size)
    batches = _read_batches(session)
    found = {
        "model": {
            "class": type(session.passes.tokens.transformer).__name__,
            "base": files.base,
            "adapter": None if files.adapter is None else str(files.adapter),
            "tokenizer": None if policy.tokenizer is None else files.tokenizer,
            "vocabulary": policy.vocabulary_size,
            "trainable tensors": len(policy.parameters),
            "trainable elements": session.passes.layout.numel,
            **{f"{r.part} implementation": f"eager: {r.reason}" for r in routes},
        },
        "optimizer": {
            "file": str(optimizer_file),
            "kind": type(optimizer).__name__,
            "parameters with state": len(optimizer.state),
            "groups": [
                {
                    "parameters": len(group["params"]),
                    **{k: group[k] for k in ("lr", "betas", "eps", "weight_decay")},
                }
                for group in optimizer.param_groups
            ],
            "steps taken": int(
                max(float(entry["step"]) for entry in optimizer.state.values())
            ),
        },
        "self-checks": {check.name: check.error for check in checks},
    }
    found |= _trained_with(session.config)
    return found | {
        f"batch {split}": description for split, description in batches.items()
    }


def _trained_with(config: Config) -> dict[str, Any]:
    """The trainer's settings, and where the configuration says another thing."""
    path = find_training_arguments(config.checkpoint)
    if path is None:
        return {"training arguments": {"file": None}}
    try:
        arguments = read_training_arguments(path)
    except InputError as error:
        # Nothing is taken from it, or opening the session would have failed.
        return {"training arguments": {"file": str(path), "not readable": str(error)}}
    found = {
        "training arguments": {
            "file": str(path),
            "kind": arguments.kind,
            **arguments.shown,
            "used in the configuration": config.update.from_checkpoint,
        }
    }
    differences = contradictions(config, arguments)
    if differences:
        found["configuration against trainer"] = {
            item.key: {"configured": item.configured, "trained with": item.trained}
            for item in differences
        }
    return found


def _read_batches(session: Session) -> dict[str, Any]:
    config = session.config
    limits, tokenizer = token_limits(session.policy), session.policy.tokenizer
    batches: dict[str, Batch] = {}
    found: dict[str, Any] = {}
    for split, source in (("E", config.batches.E), ("U", config.batches.U)):
        if source.file is None:
            settings = sampling_settings(config, split, source)
            found[split] = describe_sampling(
                session.policy.model, session.policy.tokenizer, settings
            )
            continue
        batch = read_batch(Path(source.file), split, limits, tokenizer)
        batches[split] = batch
        found[split] = {
            "file": source.file,
            "groups": batch.num_groups,
            "sequences": len(batch),
            "tokens": batch.num_tokens,
        }
    check_batches(batches, config)
    if "U" in batches and config.update.loss != "nll":
        compute_advantages(batches["U"], config.batches.advantage)
    return found
