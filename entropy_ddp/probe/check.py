"""What a configuration, its checkpoint and its batches are, without probing them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from entropy_ddp.checkpoint.find import (
    DEFAULT_ADAPTER,
    described_optimizer,
    described_weights,
)
from entropy_ddp.checkpoint.policy import Policy
from entropy_ddp.checkpoint.trainer_files import (
    find_training_arguments,
    read_training_arguments,
)
from entropy_ddp.checkpoint.trainer_settings import contradictions
from entropy_ddp.config import Config
from entropy_ddp.data.files import read_batch
from entropy_ddp.distributed import World
from entropy_ddp.errors import InputError
from entropy_ddp.model.implementations import slower_routes
from entropy_ddp.probe.gradient_dot import is_wanted
from entropy_ddp.probe.memory import bytes_by_shard, described, estimate_memory
from entropy_ddp.probe.opening import (
    check_batches,
    check_masked,
    open_checkpoint,
    plan_sample,
    token_limits,
    verify_model,
)
from entropy_ddp.probe.planning import Wanted, described_plan, plan_evaluation
from entropy_ddp.probe.session import Progress, Session


def inspect_run(
    config: Config, world: World, progress: Progress, wanted: Wanted | None = None
) -> dict[str, Any]:
    """Open everything that a probe would open, pass over a made-up row only.

    Args:
        wanted: what E is to be planned for too, if anything.

    Returns:
        What was found, by subject.

    Raises:
        InputError: anything is wrong.
    """
    plan = None if wanted is None else plan_evaluation(config, wanted)
    session = open_checkpoint(config, world, progress)
    verify_model(session)
    batches = _read_batches(session)
    attributed = session.config.attribution.enabled
    estimate = estimate_memory(session, "gradient" if attributed else "sample")
    found = {"model": _model(session)}
    found |= {"optimizer": _optimizer(session)} if session.optimizer else {}
    found |= (
        {"change in place of a step": _change(session)} if config.update.delta else {}
    )
    found["self-checks"] = {c.name: c.error for c in session.self_checks} | _shared(
        session
    )
    found |= _trained_with(session)
    found["memory"] = (
        {"at the peak of a run": estimate.line}
        | described(estimate)
        | {"bytes of weights and step, by compute.shard": bytes_by_shard(session)}
    )
    if plan is not None and wanted is not None:
        subject = f"E for {100 * wanted.share:g}%, by {wanted.pilot}"
        found[subject] = described_plan(plan)
    return found | {
        f"batch {split}": description for split, description in batches.items()
    }


def _shared(session: Session) -> dict[str, str]:
    """Whether responses to one prompt share its computation."""
    sharing = session.sharing
    if sharing is None:
        return {}
    told = "yes" if sharing.sharing else f"no: {sharing.reason}"
    return {"responses share their prompt's row": told}


def _model(session: Session) -> dict[str, Any]:
    """The model, where its parts are from, and what of it is trained."""
    policy = session.policy
    files = policy.files
    model = policy.model if files.adapter is None else policy.model.get_base_model()
    found: dict[str, Any] = {
        "class": type(model).__name__,
        "base": files.base,
    }
    if files.weights is not None:
        found |= {
            "weights from": str(files.weights),
            "format of the weights": described_weights(files.weights),
        }
    if files.adapter is not None:
        found |= {
            "adapter": str(files.adapter),
            "adapter kind": _adapter_kind(policy.model.peft_config[files.adapter_name]),
        }
        if files.adapter_name != DEFAULT_ADAPTER:
            found["adapter name"] = files.adapter_name
    else:
        found["adapter"] = "none: full weights are trained"
    routes = slower_routes(policy.model, session.config.compute.attention, policy.dtype)
    found |= {
        f"{part} implementation": f"eager: {reason}" for part, reason in routes.items()
    }
    return found | {
        "tokenizer": _tokenizer(policy),
        "vocabulary": policy.vocabulary_size,
        "embeddings": _embeddings(policy.model),
        "stored as": policy.stored or "not told by the files",
        "used as": _used_dtypes(policy.parameters.values(), policy.dtype),
        "trainable tensors": len(policy.parameters),
        "trainable elements": session.passes.num_parameters,
    }


def _tokenizer(policy: Policy) -> str:
    """Where it is, or what follows from there being none."""
    if policy.tokenizer is not None:
        return policy.files.tokenizer
    return (
        f"none in {policy.files.tokenizer}: rollout files must hold token ids, nothing "
        "can be sampled, and tokens are shown by their ids"
    )


def _adapter_kind(config: Any) -> str:
    """Kind, rank and targets of an adapter, and what is not the usual in it."""
    name = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    parts = [f"{name}, rank {config.r}, alpha {config.lora_alpha}"]
    targets = config.target_modules
    names = [targets] if isinstance(targets, str) else sorted(targets or ())
    parts.append(f"on {', '.join(names)}")
    if config.use_dora and config.use_rslora:
        parts.append("scaled as rsLoRA")
    if config.bias != "none":
        parts.append(f"bias {config.bias}")
    if config.modules_to_save:
        parts.append(f"whole modules: {', '.join(config.modules_to_save)}")
    if config.rank_pattern:
        parts.append("ranks differ by module")
    if config.alpha_pattern:
        parts.append("alphas differ by module")
    return "; ".join(parts)


def _embeddings(model: Any) -> str:
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = inputs.weight is outputs.weight
    return "tied to the output layer" if tied else "apart from the output layer"


def _used_dtypes(parameters: Iterable[Any], dtype: Any) -> str:
    """The model's dtype, and that of the trained parameters where it is another."""
    names = [str(dtype).removeprefix("torch.")]
    trained = {str(p.dtype).removeprefix("torch.") for p in parameters}
    return ", trained parameters ".join([*names, *sorted(trained - set(names))])


def _optimizer(session: Session) -> dict[str, Any]:
    optimizer = session.optimizer
    assert optimizer is not None
    steps = {int(entry["step"]) for entry in optimizer.state.values()}
    place = session.policy.files.optimizer
    assert place is not None
    where = (
        {"folder": str(place), "format": described_optimizer(place)}
        if place.is_dir()
        else {"file": str(place)}
    )
    return {
        **where,
        "kind": type(optimizer).__name__ + _variant(optimizer.param_groups),
        "parameters with state": len(optimizer.state),
        "groups": [
            {
                "parameters": len(group["params"]),
                **{k: group[k] for k in ("lr", "betas", "eps", "weight_decay")},
            }
            for group in optimizer.param_groups
        ],
        "steps taken": max(steps)
        if len(steps) < 2
        else f"{min(steps)} to {max(steps)}",
    }


def _variant(groups: list[dict[str, Any]]) -> str:
    flags = [k for k in ("amsgrad", "maximize") if any(g.get(k) for g in groups)]
    return f" ({', '.join(flags)})" if flags else ""


def _change(session: Session) -> dict[str, Any]:
    change = session.change
    assert change is not None
    path = Path(str(session.config.update.delta))
    return {
        "checkpoint" if path.is_dir() else "file": str(path),
        "parameters": len(session.policy.parameters),
        "Euclidean norm": session.passes.norm(change),
        "learning rate": session.config.update.lr_override or 1.0,
    }


def _trained_with(session: Session) -> dict[str, Any]:
    """The trainer's settings, and where the configuration says another thing."""
    config = session.config
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
            **{subject: given for subject, given in arguments.shown.items() if given},
            "used in the configuration": config.update.from_checkpoint,
        }
    }
    differences = contradictions(config, arguments, session.batches.get("U"))
    if differences:
        found["configuration against trainer"] = {
            key: {"configured": configured, "trained with": trained}
            for key, (configured, trained) in differences.items()
        }
    return found


def _read_batches(session: Session) -> dict[str, Any]:
    config = session.config
    limits, tokenizer = token_limits(session.policy), session.policy.tokenizer
    batches = session.batches
    found: dict[str, Any] = {}
    for split, source in config.batches.sources.items():
        if source.file is None:
            found[split] = plan_sample(session, split)
            continue
        batch = read_batch(Path(source.file), split, limits, tokenizer, session.world)
        batches[split] = batch
        found[split] = {
            "file": source.file,
            "groups": batch.num_groups,
            "sequences": len(batch),
            "tokens": batch.num_tokens,
        }
    check_batches(batches, config)
    check_masked(session)
    is_wanted(config.gradient_dot, batches, session.planned)
    return found
