"""A probe's session whose model, optimizer and ranks are a trainer's.

`ProbeSettings` is what the probe is asked for; `require_probable` refuses, before the
first step, every training that cannot be probed; `open_live_session` opens the rest, for
`probe_config` with an E to sample, or for `batch_config` with the trainer's batch alone.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from entropy_ddp.checkpoint.find import CheckpointFiles
from entropy_ddp.checkpoint.policy import Policy
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
from entropy_ddp.data.files import make_batch
from entropy_ddp.data.jsonlines import write_jsonl
from entropy_ddp.distributed import World
from entropy_ddp.distributed.sharding import WholeLayers
from entropy_ddp.errors import InputError
from entropy_ddp.model.parameters import trainable_parameters
from entropy_ddp.probe.opening import (
    make_passes,
    make_tokens,
    sample_batch,
    token_limits,
    verify_model,
)
from entropy_ddp.probe.session import Session
from entropy_ddp.sampling.generation import random_bytes
from entropy_ddp.training.untouched import untouched

# Prompts of the training set that E is drawn from, at most.
MOST_PROMPTS = 1000
PROMPTS_FILE = "prompts.jsonl"


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """Settings of `EntropyProbeCallback`.

    Attributes:
        out: folder of `ledger.jsonl`; made if it is not there.
        every: the optimizer steps whose number is a multiple of this are probed.
        num_prompts: prompts drawn for E at each probed step, with replacement.
        responses_per_prompt: responses to each.
        max_new_tokens: responses are cut off at this many tokens; None for the
            trainer's `max_completion_length`.
        prompts: what E is drawn from: a file or the keys of a `prompts` section, a list
            of prompts (texts, or lists of messages); None for the prompts that are
            trained on.
        truth: score E after the step too.
        second_order: predict the change at the middle of the step too.
        top: number of tokens and prompts listed by name.
        seed: seed of all that is drawn for E.
        tokens_per_microbatch: budget of padded tokens for one forward pass.
    """

    out: str | Path
    every: int = 10
    num_prompts: int = 128
    responses_per_prompt: int = 1
    max_new_tokens: int | None = None
    prompts: str | Path | dict[str, Any] | list[Any] | None = None
    truth: bool = True
    second_order: bool = True
    top: int = 20
    seed: int = 0
    tokens_per_microbatch: int = 8192

    def __post_init__(self) -> None:
        for name, least in (
            ("every", 1),
            ("num_prompts", 2),
            ("responses_per_prompt", 1),
            ("top", 1),
            ("seed", 0),
            ("tokens_per_microbatch", 1),
        ):
            found = getattr(self, name)
            if not isinstance(found, int) or found < least:
                raise InputError(
                    f"{name}: expected a whole number of at least {least}, found "
                    f"{found!r}; correct the callback's settings"
                )


# What to do where the ranks have shards only.
_AFTERWARDS = (
    "attach RolloutRecorder, save a checkpoint before the steps of interest, and probe "
    "those, or all of them with entropy-ddp ledger: their sharded files are read as "
    "they are"
)


def require_probable(trainer: Any, callback: str = "entropy probe") -> None:
    """Check that gradients, weights and batch of this training can be read.

    Args:
        callback: who needs them.

    Raises:
        InputError: one sentence that names what is in the way.
    """
    found = _obstacle(trainer)
    if found is not None:
        raise InputError(f"{callback}: {found}; train without the callback")


def _obstacle(trainer: Any) -> str | None:
    args, model = trainer.args, trainer.model
    adapters = getattr(model, "peft_config", {}).values()
    tokenizer = trainer.processing_class
    obstacles = {
        "DeepSpeed takes its step within the backward pass, before callbacks are told, "
        f"and keeps gradients in shards of its own; {_AFTERWARDS}": (
            getattr(trainer, "is_deepspeed_enabled", False)
        ),
        "FSDP shards parameters and gradients, so that no rank can take the derivative "
        f"along the whole step; {_AFTERWARDS}": (
            getattr(trainer, "is_fsdp_enabled", False)
        ),
        "parallelism_config splits the model or its sequences over ranks, so that no "
        "rank has the whole step": getattr(args, "parallelism_config", None)
        is not None,
        "torch.compile hides the model's outputs from the hooks that read the token "
        "weights": (
            args.torch_compile or isinstance(model, torch._dynamo.OptimizedModule)
        ),
        "DataParallel replicates the model at every step; start one process per GPU "
        "with torchrun instead": args.n_gpu > 1,
        "fp16 scales the gradients by a factor that the optimizer removes": args.fp16,
        "Liger's kernels have no forward-mode derivatives, and their fused losses "
        "return no log-probabilities": args.use_liger_kernel,
        "quantized weights have no forward-mode derivatives": (
            getattr(model, "is_quantized", False)
        ),
        "packed rows hold several sequences; turn packing and padding_free off": (
            getattr(args, "packing", False) or getattr(args, "padding_free", False)
        ),
        "prompt learning puts trained vectors in place of tokens": (
            any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters)
        ),
        "processing_class is no tokenizer with an end-of-sequence token, which sampling "
        "fresh responses needs": getattr(tokenizer, "eos_token_id", None) is None,
    }
    for sentence, is_there in obstacles.items():
        if is_there:
            return sentence
    optimizer = type(torch_optimizer(trainer.optimizer))
    if optimizer in (torch.optim.Adam, torch.optim.AdamW):
        return None
    return (
        f"the optimizer is {optimizer.__module__}.{optimizer.__name__}, and only the "
        "steps of torch.optim.Adam and AdamW are known as sums of their parts (8-bit and "
        "paged optimizers keep other moments)"
    )


def torch_optimizer(optimizer: Any) -> Any:
    """The optimizer below accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def open_live_session(trainer: Any, config: Config, world: World) -> Session:
    """A session on the trainer's model, verified as that of any checkpoint.

    Raises:
        InputError: the model cannot be measured.
    """
    model = trainer.model
    parameters = trainable_parameters(model)
    policy = Policy(
        model=model,
        tokenizer=trainer.processing_class,
        parameters=parameters,
        files=_no_files(model),
        dtype=getattr(torch, config.precision.model),
        device=next(iter(parameters.values())).device,
    )
    tokens = make_tokens(policy, config)
    session = Session(
        config=config,
        world=world,
        policy=policy,
        # No hooks: those on the parameters reduce the trainer's gradients.
        passes=replace(
            make_passes(policy, tokens, config, world, WholeLayers()), runs_hooks=False
        ),
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
        rows = sample_batch(session, "E")
    finally:
        session.config = config
    limits, tokenizer = token_limits(session.policy), session.policy.tokenizer
    return make_batch(rows, f"E of step {step}", "E", limits, tokenizer)


def seeded(config: Config, step: int) -> Config:
    """The configuration with a seed of its own for each step."""
    drawn = random_bytes(f"{config.seed} step {step}", 4)
    return config.model_copy(update={"seed": int.from_bytes(drawn, "big")})


def probe_config(trainer: Any, settings: ProbeSettings, world: World) -> Config:
    """The configuration of a probe's session.

    Raises:
        InputError: there are no prompts, or responses have no greatest length.
    """
    args = trainer.args
    longest = settings.max_new_tokens or getattr(args, "max_completion_length", None)
    if longest is None:
        raise InputError(
            "max_new_tokens: expected a number, found none, and the trainer has no "
            "max_completion_length; give it to the callback"
        )
    sample = Sample(
        prompts=_prompts(trainer, settings, world),
        num_prompts=settings.num_prompts,
        responses_per_prompt=settings.responses_per_prompt,
        with_replacement=True,
        max_new_tokens=longest,
    )
    budget = settings.tokens_per_microbatch
    config = _config(trainer, BatchSource(sample=sample), budget)
    return config.model_copy(update={"seed": settings.seed})


def batch_config(trainer: Any, tokens_per_microbatch: int) -> Config:
    """The configuration of a session on the trainer's batch alone."""
    source = BatchSource(file="the trainer's batch")
    return _config(trainer, source, tokens_per_microbatch)


def _config(
    trainer: Any, evaluation: BatchSource, tokens_per_microbatch: int
) -> Config:
    args = trainer.args
    rewarded = hasattr(args, "num_generations")
    return Config(
        checkpoint=Checkpoint(base=str(trainer.model.config.name_or_path or "trainer")),
        batches=Batches(E=evaluation, U=BatchSource(file="the trainer's batch")),
        objective=Objective(temperature=getattr(args, "temperature", None) or 1.0),
        # The gradients are clipped already.
        update=Update(loss="dr_grpo" if rewarded else "nll", max_grad_norm=0.0),
        truth=Truth(is_mode="per_decision"),
        linear=Linear(score="to_go", baseline="hk"),
        # Of the weights that are not trained, or else of all.
        precision=Precision(model=str(trainer.model.dtype).removeprefix("torch.")),
        compute=Compute(
            tokens_per_microbatch=tokens_per_microbatch, snapshot_device="device"
        ),
    )


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
        weights=None,
        optimizer=None,
        tokenizer=name,
    )
