"""Trainers at work on the demo's task: TRL's GRPOTrainer, a plain loop with accelerate.

Each leaves checkpoints and, of every step, the batch as it went into the loss; TRL's also
as `RolloutRecorder` records it. Run as a script under torchrun, this file trains with TRL
on several ranks:

    torchrun --nproc_per_node=2 tests/trainers.py JOBS.json

where the file holds a list of arguments of `train_with_trl`, each a mapping.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entropy_ddp.demo import PROJECTIONS, running_total_rewards
from entropy_ddp.training import RolloutRecorder

RESPONSES_PER_PROMPT = 4
MAX_LENGTH = 9  # some responses are truncated
LEARNING_RATE = 1e-3
Row = dict[str, Any]


def train_with_trl(
    folder: str,
    *,
    base: str,
    prompts: str,
    steps: int,
    full: bool = False,
    resume: bool = False,
    peft: Mapping[str, Any] | None = None,
    **settings: Any,
) -> None:
    """Train up to a step and save every step's checkpoint, batch and completions.

    Args:
        folder: TRL's output folder; `batches/STEP-RANK.json` are the batches, and
            `rollouts` holds those that were recorded.
        base: the base model.
        prompts: the prompts file.
        steps: the last step.
        full: train all weights and no adapter.
        resume: go on from the last checkpoint in the folder.
        peft: further settings of the adapter.
        settings: further settings of the trainer; the batch size is per rank.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    class Recording(GRPOTrainer):
        """TRL, which also writes down what its loss is given."""

        def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
            name = f"{self.state.global_step + 1}-{self.accelerator.process_index}.json"
            file = Path(folder) / "batches" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in _rows_of(inputs))
            return super()._compute_loss(model, inputs)

    arguments = {
        "output_dir": folder, "max_steps": steps, "save_steps": 1,
        "per_device_train_batch_size": 32, "num_generations": RESPONSES_PER_PROMPT,
        "max_completion_length": MAX_LENGTH, "scale_rewards": "none",
        "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant",
        "weight_decay": 0.1, "temperature": 0.9,
        # TRL's default computes in bfloat16, which a float32 probe could not repeat.
        "bf16": False, "use_cpu": True, "gradient_checkpointing": False,
        "logging_steps": 1, "log_completions": True, "num_completions_to_print": 0,
        "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    lora = {
        "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS,
    } | dict(peft or {})  # fmt: skip
    with Path(prompts).open() as stream:
        rows = [json.loads(line) for line in stream]
    trainer = Recording(
        model=AutoModelForCausalLM.from_pretrained(base),
        processing_class=AutoTokenizer.from_pretrained(base),
        reward_funcs=running_total_rewards,
        args=GRPOConfig(**arguments | settings),
        train_dataset=Dataset.from_list(rows),
        peft_config=None if full else LoraConfig(**lora),
    )
    trainer.remove_callback(PrinterCallback)
    RolloutRecorder(out=Path(folder) / "rollouts").attach(trainer)
    trainer.train(resume_from_checkpoint=resume)


def _rows_of(inputs: Mapping[str, Any]) -> list[Row]:
    """The sequences that TRL's loss is given, as rows of a rollout file."""
    rows = []
    for index, advantage in enumerate(inputs["advantages"].tolist()):
        prompt, response = (
            inputs[f"{part}_ids"][index][inputs[f"{part}_mask"][index].bool()].tolist()
            for part in ("prompt", "completion")
        )
        row: Row = {
            "group": str(prompt),
            "prompt_ids": prompt,
            "response_ids": response,
            "advantage": advantage,
        }
        if "old_per_token_logps" in inputs:
            sampled = inputs["old_per_token_logps"][index].tolist()
            row["sampling_logprobs"] = sampled[: len(response)]
        rows.append(row)
    return rows


def batch_of(folder: Path, step: int) -> list[Row]:
    """All ranks' rows of the batch of a step."""
    files = sorted((folder / "batches").glob(f"{step}-*.json"))
    return [json.loads(line) for file in files for line in file.open()]


def train_with_accelerate(
    folder: Path,
    *,
    base: Path,
    batches: Sequence[Sequence[Row]],
    full: bool,
) -> dict[str, Tensor]:
    """A plain loop over given batches with the dr_grpo loss; `save_state` before the last.

    The model is saved in `folder / "model"` too, as is usual at the end of a training.

    Returns:
        The change of every trainable parameter in the last step, by name.
    """
    from accelerate import Accelerator
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if not full:
        model = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=PROJECTIONS)
        )
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=LEARNING_RATE, weight_decay=0.1, betas=(0.9, 0.99)
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    before: dict[str, Tensor] = {}
    for number, rows in enumerate(batches, start=1):
        if number == len(batches):
            accelerator.save_state(str(folder / "state"))
            model.save_pretrained(folder / "model")
            before = {n: p.detach().clone() for n, p in parameters.items()}
        loss = torch.zeros(())
        for row in rows:
            total = row["advantage"] * _log_probability(model, row)
            loss = loss - total / (len(rows) * MAX_LENGTH)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach() - before[n] for n, p in parameters.items()}


def _log_probability(model: nn.Module, row: Row) -> Tensor:
    """Log-probability of a response given its prompt."""
    response = torch.tensor(row["response_ids"])
    ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
    logits = model(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1]
    return -nn.functional.cross_entropy(logits, response, reduction="sum")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        train_with_trl(**job)
