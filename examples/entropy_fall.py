"""A GRPO run whose entropy falls, and the same run with a rule that keeps it up.

    python examples/entropy_fall.py --out build/fall
    python examples/entropy_fall.py --out build/kept --leave-out-improbable-failures

The task is the demo's (adding up digits) on 32 prompts only, so that the policy can
become certain of its answers. Needs the demo checkpoint (`make demo`); takes half a minute
on one CPU core. docs/diagnosis.md goes on from here.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from entropy_ddp.demo import PROJECTIONS, running_total_rewards

NUM_PROMPTS = 32
NUM_STEPS = 100


class WithoutImprobableFailures(GRPOTrainer):
    """Leaves improbable tokens (p < 0.5) out where the advantage is negative.

    The rule is one that `entropy_ddp attribute` asks about.
    """

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        response = batch["completion_mask"]
        with torch.no_grad():
            logp = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                torch.cat([batch["prompt_mask"], response], dim=1),
                response.shape[1],
            )[0]
        improbable = logp.exp() < 0.5
        failed = batch["advantages"][:, None] < 0
        # What TRL multiplies the loss's mask with: 0 for tokens of a tool's answer.
        batch["tool_mask"] = (~(improbable & failed)).to(response.dtype)
        return batch


def train(demo: Path, out: Path, *, leave_out: bool, learning_rate: float) -> None:
    """Train for 100 steps, saving every tenth checkpoint and all completions.

    Args:
        demo: what `entropy_ddp demo` made.
        out: folder to write.
        leave_out: apply the rule.
        learning_rate: of AdamW.
    """
    lines = (demo / "prompts.jsonl").read_text().splitlines()[:NUM_PROMPTS]
    out.mkdir(parents=True)
    (out / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    trainer_class = WithoutImprobableFailures if leave_out else GRPOTrainer
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(demo / "base"),
        processing_class=AutoTokenizer.from_pretrained(demo / "base"),
        reward_funcs=running_total_rewards,
        args=GRPOConfig(
            output_dir=str(out),
            seed=0,
            max_steps=NUM_STEPS,
            per_device_train_batch_size=128,
            num_generations=8,
            max_completion_length=24,
            loss_type="dr_grpo",
            scale_rewards="none",
            learning_rate=learning_rate,
            adam_beta2=0.99,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            save_steps=10,
            logging_steps=1,
            log_completions=True,
            num_completions_to_print=0,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=PROJECTIONS
        ),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    print("step  entropy  reward")
    for row in trainer.state.log_history:
        if "entropy" in row and row["step"] % 10 == 0:
            print(f"{row['step']:4}  {row['entropy']:7.3f}  {row['reward']:6.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("build/demo"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--leave-out-improbable-failures", action="store_true")
    given = parser.parse_args()
    train(
        given.demo,
        given.out,
        leave_out=given.leave_out_improbable_failures,
        learning_rate=given.learning_rate,
    )
