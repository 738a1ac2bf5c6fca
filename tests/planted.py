"""A run in which everything is in order, so that one fault can be planted in it.

Both batches are sampled from the policy itself, by a sampler of a few lines that shares
nothing with the package; prompts, responses and groups are ragged.
"""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import reference as ref
import torch
from checkpoints import Saved, run_config, save_checkpoint
from jobs import run_audit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from entropy_ddp.config import Config
from entropy_ddp.distributed import World
from entropy_ddp.results import Probed

Document = dict[str, Any]

END = 0  # the tiny models' end-of-sequence token
PROMPT_LENGTHS = (2, 3, 5)
NUM_GROUPS = {"E": 60, "U": 6}
NUM_RESPONSES = {"E": 1, "U": 3}
LEARNING_RATE = 1e-3
# Two microbatches of E, and more when the noise floor is measured at a fifth of it.
COMPUTE = {"device": "cpu", "tokens_per_microbatch": 1500}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A checkpoint on disk, the rows of both batches, sections of a configuration."""

    saved: Saved
    E: list[Document]
    U: list[Document]
    sections: dict[str, Any]

    def with_sections(self, **sections: Any) -> "Scene":
        """The same scene with these sections of the configuration replaced or added."""
        return replace(self, sections=self.sections | sections)

    def with_step(self, **update: Any) -> "Scene":
        """The same scene with these keys of the `update` section."""
        return self.with_sections(update=self.sections["update"] | update)

    def with_rows(self, split: str, change: Callable[[Document], Document]) -> "Scene":
        """The same scene with every row of a batch changed."""
        rows: list[Document] = [change(row) for row in getattr(self, split)]
        return replace(self, E=rows) if split == "E" else replace(self, U=rows)

    def with_weights(
        self, folder: Path, change: Callable[[str, Tensor], Tensor]
    ) -> "Scene":
        """Another adapter and batches sampled from it; the same optimizer state.

        Args:
            folder: where the checkpoint is copied to.
            change: the new values of a parameter from its name and its old ones.
        """
        saved = copy_checkpoint(self.saved, folder)
        path = saved.folder / "adapter_model.safetensors"
        weights = {name: change(name, x) for name, x in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
        model = copy.deepcopy(saved.model)
        with torch.no_grad():
            for name, parameter in ref.trainable(model).items():
                parameter.copy_(change(name, parameter.detach()))
        saved = replace(saved, model=model)
        return replace(self, saved=saved, **sample_batches(model))

    def with_moments(self, folder: Path, **moments: float) -> "Scene":
        """The same scene with these moments of the optimizer set to a constant."""
        saved = copy_checkpoint(self.saved, folder)
        path = saved.folder / "optimizer.pt"
        state = torch.load(path, weights_only=True)
        for entry in state["state"].values():
            for name, value in moments.items():
                entry[name].fill_(value)
        torch.save(state, path)
        return replace(self, saved=saved)

    def config(self, folder: Path) -> Config:
        """The configuration; its batches are written to the folder."""
        files = [
            write_documents(folder / f"{split}.jsonl", rows)
            for split, rows in (("E", self.E), ("U", self.U))
        ]
        return Config.model_validate(run_config(self.saved, *files) | self.sections)

    def audit(self, folder: Path, world: World | None = None) -> Probed:
        """A run of the `audit` command in this process."""
        return run_audit(self.config(folder), world or World(), None, _quiet)


def _quiet(phase: str, done: int, total: int) -> None:
    """Shows no progress."""


def write_documents(path: Path, rows: list[Document]) -> Path:
    """Write rows as a rollout file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def copy_checkpoint(saved: Saved, folder: Path) -> Saved:
    """The checkpoint in another folder, to be spoilt there."""
    target = folder / saved.folder.name
    shutil.copytree(saved.folder, target)
    return replace(saved, folder=target)


def make_scene(root: Path, family: str = "qwen2", weight_decay: float = 0.1) -> Scene:
    """A checkpoint, 60 groups of one response in E and six of three in U."""
    saved = save_checkpoint(root, family, weight_decay=weight_decay)
    return Scene(
        saved=saved,
        **sample_batches(saved.model),
        sections={
            "compute": COMPUTE,
            "update": {"max_grad_norm": 1.0, "lr_override": LEARNING_RATE},
        },
    )


def sample_batches(
    model: nn.Module, seed: int = 1, max_tokens: int = 40
) -> dict[str, list[Document]]:
    """E and U sampled from the model at temperature 1, with random rewards in U."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.vocab_size
    batches: dict[str, list[Document]] = {"E": [], "U": []}
    for split, rows in batches.items():
        for group in range(NUM_GROUPS[split]):
            size = (PROMPT_LENGTHS[group % len(PROMPT_LENGTHS)],)
            prompt = torch.randint(END + 1, vocabulary, size, generator=generator)
            row = {"group": group, "prompt_ids": prompt.tolist()}
            rows += [dict(row) for _ in range(NUM_RESPONSES[split])]
    everything = batches["E"] + batches["U"]
    for length in PROMPT_LENGTHS:
        rows = [row for row in everything if len(row["prompt_ids"]) == length]
        prompts = torch.tensor([row["prompt_ids"] for row in rows])
        responses = sample_responses(model, prompts, generator, max_tokens)
        for row, response in zip(rows, responses, strict=True):
            row |= {"response_ids": response, "finished": response[-1] == END}
    for row in batches["U"]:
        row["reward"] = torch.rand((), generator=generator).item()
    return batches


@torch.no_grad()
def sample_responses(
    model: nn.Module, prompts: Tensor, generator: torch.Generator, max_tokens: int
) -> list[list[int]]:
    """One response to each prompt [n, P], up to its end token, which is kept."""
    ids = prompts
    for _ in range(max_tokens):
        with ref.true_float64():
            logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, drawn], dim=1)
    responses = ids[:, prompts.shape[1] :].tolist()
    return [r[: r.index(END) + 1] if END in r else r for r in responses]


def reference_rows(documents: list[Document]) -> list[ref.Row]:
    """Rows as the reference takes them."""
    keys = ("group", "prompt_ids", "response_ids", "reward", "sampling_logprobs")
    return [ref.Row(**{k: row[k] for k in keys if k in row}) for row in documents]
