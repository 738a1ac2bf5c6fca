"""A probe's session whose model, optimizer and ranks are a trainer's."""

import json
from pathlib import Path
from typing import Any

import torch

from entropy_ddp.checkpoint.find import CheckpointFiles, Policy
from entropy_ddp.config import (
    BatchSource,
    Checkpoint,
    Compute,
    Config,
    Precision,
    Sample,
    Update,
)
from entropy_ddp.config.schema import Batches, Linear, Objective, Truth
from entropy_ddp.data.batch import Batch
from entropy_ddp.data.files import make_batch, write_jsonl
from entropy_ddp.distributed import World
from entropy_ddp.errors import InputError
from entropy_ddp.model.parameters import trainable_parameters
from entropy_ddp.model.response_tokens import ResponseTokens, ScoringSettings
from entropy_ddp.model.scoring import Passes
from entropy_ddp.probe.keeping import sample_batch
from entropy_ddp.probe.session import Session, token_limits, verify_model
from entropy_ddp.sampling.generation import random_bytes
from entropy_ddp.training.neutral import untouched
from entropy_ddp.training.settings import ProbeSettings

# Prompts of the training set that E is drawn from, at most.
MOST_PROMPTS = 1000
PROMPTS_FILE = "prompts.jsonl"


def open_live_session(trainer: Any, settings: ProbeSettings, world: World) -> Session:
    """A session on the trainer's model, verified as that of any checkpoint.

    Args:
        trainer: a transformers Trainer, about to train.
        settings: what is to be probed.
        world: the trainer's ranks.

    Raises:
        InputError: the model cannot be measured, or there are no prompts.
    """
    model = trainer.model
    parameters = trainable_parameters(model)
    config = _config(trainer, settings, world)
    policy = Policy(
        model=model,
        tokenizer=trainer.processing_class,
        parameters=parameters,
        files=_no_files(model),
        dtype=getattr(torch, config.precision.model),
        device=next(iter(parameters.values())).device,
    )
    tokens = ResponseTokens(
        model,
        ScoringSettings(
            temperature=config.objective.temperature,
            tokens_per_microbatch=config.compute.tokens_per_microbatch,
        ),
    )
    # Not wrapped, and no hooks: those on the parameters reduce the trainer's gradients.
    passes = Passes(
        tokens=tokens,
        wrapped=tokens,
        parameters=parameters,
        dtype=policy.dtype,
        device=policy.device,
        runs_hooks=False,
    )
    session = Session(
        config=config,
        world=world,
        policy=policy,
        passes=passes,
        progress=lambda *_: None,
    )
    with untouched(model):
        verify_model(session)
    return session


def sample_evaluation(session: Session, step: int) -> Batch:
    """Fresh responses of the policy as it is now, from streams of this step alone."""
    config = session.config
    session.config = seeded(config, step)
    try:
        rows = sample_batch(session, "E", config.batches.E)
    finally:
        session.config = config
    limits, tokenizer = token_limits(session.policy), session.policy.tokenizer
    return make_batch(rows, f"E of step {step}", "E", limits, tokenizer)


def seeded(config: Config, step: int) -> Config:
    """The configuration with a seed of its own for each step."""
    drawn = random_bytes(f"{config.seed} step {step}", 4)
    return config.model_copy(update={"seed": int.from_bytes(drawn, "big")})


def _config(trainer: Any, settings: ProbeSettings, world: World) -> Config:
    args = trainer.args
    longest = settings.max_new_tokens or getattr(args, "max_completion_length", None)
    if longest is None:
        raise InputError(
            "max_new_tokens: expected a number, found none, and the trainer has no "
            "max_completion_length; give it to the callback"
        )
    rewarded = hasattr(args, "num_generations")
    sample = Sample(
        prompts=_prompts(trainer, settings, world),
        num_prompts=settings.num_prompts,
        responses_per_prompt=settings.responses_per_prompt,
        with_replacement=True,
        max_new_tokens=longest,
    )
    return Config(
        checkpoint=Checkpoint(base=str(trainer.model.config.name_or_path or "trainer")),
        batches=Batches(
            E=BatchSource(sample=sample), U=BatchSource(file="the trainer's batch")
        ),
        objective=Objective(temperature=getattr(args, "temperature", None) or 1.0),
        # The gradients are clipped already.
        update=Update(loss="dr_grpo" if rewarded else "nll", max_grad_norm=0.0),
        truth=Truth(is_mode="per_decision"),
        linear=Linear(score="to_go", baseline="hk"),
        precision=Precision(model=_dtype_name(trainer.model)),
        compute=Compute(
            tokens_per_microbatch=settings.tokens_per_microbatch,
            snapshot_device="device",
        ),
        seed=settings.seed,
    )


def _dtype_name(model: Any) -> Any:
    """Dtype of the weights that are not trained, or else of all."""
    return str(model.dtype).removeprefix("torch.")


def _prompts(trainer: Any, settings: ProbeSettings, world: World) -> Any:
    """The `prompts` section that E is drawn from; a list is written to a file first."""
    given = settings.prompts
    if isinstance(given, (str, Path)):
        return str(given)
    if isinstance(given, dict):
        return given
    rows = (
        _training_prompts(trainer.train_dataset, settings.seed)
        if given is None
        else [{"prompt": prompt} for prompt in given]
    )
    # A reader of the path needs no escapes; every rank has the same rows.
    file = Path(settings.out) / PROMPTS_FILE
    if world.is_main:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(file, rows)
    # Not read before it is there.
    world.gather_objects(None)
    return str(file)


def _training_prompts(dataset: Any, seed: int) -> list[dict[str, Any]]:
    columns = getattr(dataset, "column_names", None) or []
    if "prompt" not in columns or not hasattr(dataset, "__len__"):
        raise InputError(
            "prompts: expected a training set of known length with a column `prompt`, found "
            f"{', '.join(columns) or 'no columns'}; give the callback `prompts`"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset), generator=generator)[:MOST_PROMPTS]
    prompts = dataset.select_columns(["prompt"])
    rows = {json.dumps(prompts[i]): prompts[i] for i in sorted(order.tolist())}
    return [json.loads(row) for row in rows]


def _no_files(model: Any) -> CheckpointFiles:
    name = str(model.config.name_or_path)
    return CheckpointFiles(
        folder=None,
        base=name,
        adapter=None,
        adapter_name="default",
        state=None,
        optimizer=None,
        tokenizer=name,
    )
