"""A GRPO training that keeps an entropy ledger, from nothing, in under three minutes.

    python examples/train_with_probe.py --out runs/example
    python -m entropy_ddp ledger runs/example

A tiny policy that adds digits (`entropy_ddp.demo`) is trained by TRL with a LoRA adapter
on 32 prompts, and its entropy falls. The two lines that concern the probe are marked.
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from entropy_ddp.demo import PROJECTIONS, running_total_rewards, train_demo
from entropy_ddp.training import EntropyProbeCallback

NUM_PROMPTS = 32


def make_trainer(demo: Path, out: Path, steps: int) -> GRPOTrainer:
    """TRL's trainer as in any other run."""
    prompts = load_dataset(
        "json", data_files=str(demo / "prompts.jsonl"), split=f"train[:{NUM_PROMPTS}]"
    )
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(demo / "base"),
        processing_class=AutoTokenizer.from_pretrained(demo / "base"),
        reward_funcs=running_total_rewards,
        train_dataset=prompts,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=PROJECTIONS
        ),
        args=GRPOConfig(
            output_dir=str(out / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=128,
            num_generations=8,
            max_completion_length=24,
            loss_type="dr_grpo",
            scale_rewards="none",
            learning_rate=3e-3,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            adam_beta2=0.99,
            weight_decay=0.01,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
    )


def main() -> None:
    """Make the demo's base model, unless it is there, and train on."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/example"))
    parser.add_argument("--demo", type=Path, default=Path("build/demo"))
    parser.add_argument("--steps", type=int, default=80)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.demo.exists():
        train_demo(options.demo, grpo_steps=1)
    trainer = make_trainer(options.demo, options.out, options.steps)
    probe = EntropyProbeCallback(out=options.out, every=1, num_prompts=128)  # this
    probe.attach(trainer)  # and this
    trainer.train()


if __name__ == "__main__":
    main()
