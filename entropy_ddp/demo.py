"""The embedded demo: a small policy that adds up digits, trained here by TRL.

The task is to add two to four digits by writing down the running totals:

    prompt   := term "+" term [ "+" term [ "+" term ] ] "="
    term     := one digit, "1" to "9"
    response := the first two terms added and the rest copied, again and again until
                one number is left; the steps are joined by "="

So `8+4=` is answered by `12`, `3+4+8=` by `7+8=15` and `1+2+3+4=` by
`3+3+4=6+4=10`. The reward is 1 if the text after the last "=" is the sum of the terms,
else 0: a response may garble the totals on its way, or skip them.

A Qwen2 of 100,000 parameters first learns from worked examples, until it is right
about half of the time. A fifth of the examples skip the totals (`3+4+8=` is answered
by `15`), and the model is seldom right when it skips them too. Then TRL's GRPOTrainer,
as it is installed, trains a LoRA adapter on it and saves the adapter with its optimizer
state, as in any other run. What pays on every prompt alike is not to skip: so the steps
share a direction, and a single one changes the entropy by more than its standard error
over a few hundred responses.
"""

import importlib.util
import json
import math
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_ddp.errors import InputError
from entropy_ddp.files import temporary

if TYPE_CHECKING:
    import torch
    import transformers
    import trl

    from entropy_ddp.distributed import World
    from entropy_ddp.probe.session import Progress

OnStep = Callable[[str, int, int], None]

SKIPPED_TOTALS_FRACTION = 0.2
NUM_PROMPTS = 500
SUPERVISED_BATCH_SIZE = 80
PROMPTS_PER_STEP = 16
RESPONSES_PER_PROMPT = 8
NUM_EVALUATION_PROMPTS = 2048
MAX_COMPLETION_LENGTH = 24
PROJECTIONS = [f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")]
IGNORED_LABEL = -100


class DemoRequirementError(InputError, ImportError):
    """A library that only the demo needs is not installed."""


@dataclass(frozen=True, kw_only=True)
class DemoCheckpoint:
    """Where `train_demo` put its results."""

    base: Path
    """Folder of the base model and its tokenizer."""
    checkpoint: Path
    """Trainer checkpoint: LoRA adapter, optimizer and scheduler state, tokenizer."""
    prompts: Path
    """JSON lines with the keys `prompt` and `answer`, every prompt once."""


def running_total_reward(prompt: str, response: str, row: dict[str, Any]) -> float:
    """Reward of a response to a running-total prompt.

    Args:
        prompt: The prompt's text, as in `3+4+8=`.
        response: The response's text without special tokens, as in `7+8=15`.
        row: The prompt's line of the prompts file; `answer` is the sum as text.

    Returns:
        1.0 if the text after the last "=" is the answer, else 0.0. A response
        without "=" counts as a whole.
    """
    return float((prompt + response).rpartition("=")[2] == row["answer"])


def running_total_rewards(
    prompts: list[str], completions: list[str], answer: list[str], **_: object
) -> list[float]:
    """`running_total_reward` as TRL calls it: on a batch, with the data's columns."""
    return [
        running_total_reward(prompt, response, {"answer": right})
        for prompt, response, right in zip(prompts, completions, answer, strict=True)
    ]


def train_demo(
    folder: Path,
    *,
    seed: int = 0,
    grpo_steps: int = 20,
    supervised_steps: int = 400,
    on_step: OnStep = lambda phase, done, total: None,
) -> DemoCheckpoint:
    """Train the demo policy and write it to a new folder.

    The same seed gives the same weights and optimizer state, bit for bit, on one
    machine. Everything is written to a hidden folder beside `folder` and moved there
    at the end, so that an interrupted training leaves no `folder`.

    Args:
        folder: The folder to create. An empty one is accepted.
        seed: Seed of both phases and of the choice of prompts.
        grpo_steps: Optimizer steps of the GRPO phase; the checkpoint is named by it.
        supervised_steps: Optimizer steps of the supervised phase.
        on_step: Called as `on_step(phase, done, total)` after every optimizer step;
            the phases are "supervised" and "grpo", in this order.

    Returns:
        The paths of what was written, all inside `folder`.

    Raises:
        DemoRequirementError: If TRL or datasets is not installed.
        InputError: If the folder is in use.
    """
    folder = folder.resolve()
    _check_possible(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = f"checkpoint-{grpo_steps}"
    with (
        _quiet_libraries(),
        _process_state_kept(),
        temporary(
            Path(tempfile.mkdtemp(prefix=".demo-", dir=folder.parent))
        ) as scratch,
    ):
        # TRL's model card takes the model's name from the last part of this path.
        unfinished = scratch / folder.name
        base = unfinished / "base"
        rows = _prompt_rows(random.Random(f"prompts {seed}"))
        _train_base(base, seed=seed, steps=supervised_steps, on_step=on_step)
        _train_policy(base, rows, seed=seed, steps=grpo_steps, on_step=on_step)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (unfinished / "prompts.jsonl").write_text(lines, encoding="utf-8")
        _name_final_folder(unfinished, folder, checkpoint)
        unfinished.replace(folder)
    return DemoCheckpoint(
        base=folder / "base",
        checkpoint=folder / checkpoint,
        prompts=folder / "prompts.jsonl",
    )


def _check_possible(folder: Path) -> None:
    missing = [n for n in ("trl", "datasets") if importlib.util.find_spec(n) is None]
    if missing:
        raise DemoRequirementError(
            f"demo: expected {' and '.join(missing)} to be installed, found no such "
            "package; pip install entropy_ddp[demo]"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"{folder}: expected a new or an empty folder for the demo, found one in "
            "use; remove it, or choose another"
        )


def _draw_terms(stream: random.Random) -> list[int]:
    """Every number of terms is as likely as the others."""
    return [stream.randint(1, 9) for _ in range(stream.randint(2, 4))]


def _prompt_text(terms: list[int]) -> str:
    return "+".join(map(str, terms)) + "="


def _running_totals(terms: list[int]) -> str:
    totals = []
    while len(terms) > 1:
        terms = [terms[0] + terms[1], *terms[2:]]
        totals.append("+".join(map(str, terms)))
    return "=".join(totals)


def _prompt_rows(stream: random.Random) -> list[dict[str, str]]:
    """Draw distinct prompts, in random order."""
    answers: dict[str, str] = {}
    while len(answers) < NUM_PROMPTS:
        terms = _draw_terms(stream)
        answers[_prompt_text(terms)] = str(sum(terms))
    return [{"prompt": prompt, "answer": answer} for prompt, answer in answers.items()]


# Phase 1: the supervised base model


def _character_tokenizer() -> "transformers.PreTrainedTokenizerFast":
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    tokens = [*special.values(), *"0123456789+="]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, padding_side="left", **special
    )


def _untrained_base(
    tokenizer: "transformers.PreTrainedTokenizerFast",
) -> "transformers.PreTrainedModel":
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        # From the usual 0.02 a model this narrow is slow to start.
        initializer_range=0.05,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return AutoModelForCausalLM.from_config(config)


def _draw_example(stream: random.Random) -> tuple[str, str]:
    terms = _draw_terms(stream)
    skips = stream.random() < SKIPPED_TOTALS_FRACTION
    return _prompt_text(terms), str(sum(terms)) if skips else _running_totals(terms)


def _supervised_batch(
    tokenizer: "transformers.PreTrainedTokenizerFast", stream: random.Random
) -> dict[str, "torch.Tensor"]:
    """Worked examples, padded on the right; the labels cover the responses only."""
    import torch

    examples = [_draw_example(stream) for _ in range(SUPERVISED_BATCH_SIZE)]
    texts = [prompt + response + tokenizer.eos_token for prompt, response in examples]
    input_ids = tokenizer(
        texts, padding=True, padding_side="right", return_tensors="pt"
    ).input_ids
    # One token a character.
    prompt_lengths = torch.tensor([[len(prompt)] for prompt, _ in examples])
    is_prompt = torch.arange(input_ids.shape[1]) < prompt_lengths
    is_padding = input_ids == tokenizer.pad_token_id
    labels = input_ids.masked_fill(is_prompt | is_padding, IGNORED_LABEL)
    return {"input_ids": input_ids, "labels": labels}


def _train_base(folder: Path, *, seed: int, steps: int, on_step: OnStep) -> None:
    import torch

    torch.manual_seed(seed)
    stream = random.Random(f"supervised {seed}")
    tokenizer = _character_tokenizer()
    model = _untrained_base(tokenizer).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=5e-3, betas=(0.9, 0.98), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / 30, (1 + math.cos(math.pi * step / steps)) / 2),
    )
    for done in range(1, steps + 1):
        loss = model(**_supervised_batch(tokenizer, stream)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step("supervised", done, steps)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


# Phase 2: TRL's GRPO on top of it


def _grpo_config(folder: Path, *, seed: int, steps: int) -> "trl.GRPOConfig":
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=str(folder),
        seed=seed,
        max_steps=steps,
        per_device_train_batch_size=PROMPTS_PER_STEP * RESPONSES_PER_PROMPT,
        num_generations=RESPONSES_PER_PROMPT,
        max_completion_length=MAX_COMPLETION_LENGTH,
        loss_type="dr_grpo",
        scale_rewards="none",
        learning_rate=1e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        # TRL's default computes in bfloat16, which a float32 probe could not repeat.
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_steps=steps,
        logging_steps=1,
        log_completions=True,
        num_completions_to_print=0,
        report_to="none",
        disable_tqdm=True,
    )


def _progress_callback(on_step: OnStep) -> "transformers.TrainerCallback":
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            on_step("grpo", state.global_step, state.max_steps)

    return Progress()


def _train_policy(
    base: Path, rows: list[dict[str, str]], *, seed: int, steps: int, on_step: OnStep
) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import GRPOTrainer

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        processing_class=AutoTokenizer.from_pretrained(base),
        reward_funcs=running_total_rewards,
        args=_grpo_config(base.parent, seed=seed, steps=steps),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=PROJECTIONS
        ),
        callbacks=[_progress_callback(on_step)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """No progress bars, no advice meant for the libraries' developers, no network."""
    from huggingface_hub import constants
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    offline = constants.HF_HUB_OFFLINE
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # There is nothing to fetch, and TRL would report its use to the hub.
    constants.HF_HUB_OFFLINE = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _process_state_kept() -> Iterator[None]:
    """One thread inside; threads and random streams as before on the way out."""
    import numpy
    import torch

    threads = torch.get_num_threads()
    python_stream, numpy_stream = random.getstate(), numpy.random.get_state()
    # The number of threads changes the order of sums, and so the bits.
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(python_stream)
        numpy.random.set_state(numpy_stream)


def _name_final_folder(unfinished: Path, folder: Path, checkpoint: str) -> None:
    """Replace the path the libraries worked in by the one the folder will have."""
    import torch

    for path in unfinished.rglob("*"):
        if path.suffix in {".json", ".md"}:
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(str(unfinished), str(folder)), "utf-8")
    arguments_file = unfinished / checkpoint / "training_args.bin"
    arguments = torch.load(arguments_file, weights_only=False)
    arguments.output_dir = str(folder)
    torch.save(arguments, arguments_file)


def make_demo(
    out: Path, seed: int, world: "World", progress: "Progress"
) -> DemoCheckpoint:
    """Train the demo policy into `out`, then write E.jsonl and U.jsonl beside it.

    Args:
        out: folder to make; must not exist, or be empty.
        seed: seed of training and sampling.
        world: one rank.

    Raises:
        InputError: the folder is in use, TRL is missing, or there are several ranks.
    """
    from entropy_ddp.config import Config
    from entropy_ddp.probe.sample import run_sample

    if world.world_size > 1:
        raise InputError(
            f"demo: runs in one process, found {world.world_size}; start it without a "
            "launcher"
        )

    def on_step(phase: str, done: int, total: int) -> None:
        progress(phase, done, total, "steps")

    made = train_demo(out, seed=seed, on_step=on_step)
    sampled = {
        "prompts": str(made.prompts),
        "max_new_tokens": MAX_COMPLETION_LENGTH,
        "reward": "entropy_ddp.demo:running_total_reward",
        "sequences_per_call": 256,
    }
    evaluation: dict[str, Any] = {
        "num_prompts": NUM_EVALUATION_PROMPTS,
        "with_replacement": True,
    }
    update = {
        "num_prompts": PROMPTS_PER_STEP,
        "responses_per_prompt": RESPONSES_PER_PROMPT,
    }
    config = Config.model_validate(
        {
            "checkpoint": {"path": str(made.checkpoint), "base": str(made.base)},
            "batches": {
                "E": {"sample": sampled | evaluation},
                "U": {"sample": sampled | update},
            },
            "seed": seed,
        }
    )
    run_sample(config, world, out, progress)
    return made
