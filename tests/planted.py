"""A run in which everything is in order, as plain rows, so that one fault can be planted.

E is sampled from the policy itself, by a sampler of a few lines that shares nothing with
the package; prompts, responses and groups are ragged.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import reference as ref
import torch
from checkpoints import Saved, run_config, save_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from entropy_ddp.config import Config
from entropy_ddp.distributed import World
from entropy_ddp.probe.run import run_audit, run_probe
from entropy_ddp.results import Probed

Document = dict[str, Any]

END = 0  # the tiny models' end-of-sequence token
MAX_RESPONSE = 40
PROMPT_LENGTHS = (2, 3, 5)
# One microbatch, and several when the noise floor is measured at a fifth of it.
COMPUTE = {"device": "cpu", "tokens_per_microbatch": 1500}
LEARNING_RATE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A checkpoint on disk, the rows of both batches and sections of a configuration."""

    saved: Saved
    E: list[Document]
    U: list[Document]
    sections: dict[str, Any]

    def with_sections(self, **sections: Any) -> "Scene":
        """The same scene with these sections of the configuration replaced or added."""
        return replace(self, sections=self.sections | sections)

    def with_rows(self, split: str, change: Callable[[Document], Document]) -> "Scene":
        """The same scene with every row of a batch changed."""
        rows = [change(dict(row)) for row in getattr(self, split)]
        return replace(self, E=rows) if split == "E" else replace(self, U=rows)

    def with_weights(self, folder: Path, change: Callable[[str, Tensor], Tensor]) -> "Scene":
        """The same scene with every tensor of the adapter file changed."""
        saved = copy_checkpoint(self.saved, folder)
        path = saved.folder / "adapter_model.safetensors"
        weights = {name: change(name, x) for name, x in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
        return replace(self, saved=saved)

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
        """The configuration, its batches written to the folder."""
        files = [
            write_documents(folder / f"{split}.jsonl", rows)
            for split, rows in (("E", self.E), ("U", self.U))
        ]
        return Config.model_validate(run_config(self.saved, *files) | self.sections)

    def audit(self, folder: Path, world: World | None = None) -> Probed:
        """The `audit` command's run, in this process."""
        return run_audit(self.config(folder), world or World(), None, _quiet)

    def probe(self, folder: Path) -> Probed:
        """The `probe` command's run, in this process."""
        return run_probe(self.config(folder), World(), None, _quiet)


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


def make_scene(root: Path, family: str = "qwen2") -> Scene:
    """A checkpoint with 60 single responses in E and six groups of three in U."""
    saved = save_checkpoint(root, family)
    vocabulary = saved.model.config.vocab_size
    evaluation = sample_groups(saved.model, 1, groups=60, responses=1)
    update = sample_groups(saved.model, 2, groups=6, responses=3)
    generator = torch.Generator().manual_seed(3)
    rewards = torch.rand(len(update), generator=generator).tolist()
    update = [row | {"reward": r} for row, r in zip(update, rewards, strict=True)]
    assert vocabulary > END
    return Scene(
        saved=saved,
        E=evaluation,
        U=update,
        sections={
            "compute": COMPUTE,
            "update": {"max_grad_norm": 1.0, "lr_override": LEARNING_RATE},
        },
    )


def sample_groups(
    model: nn.Module, seed: int, *, groups: int, responses: int
) -> list[Document]:
    """Groups of responses to random prompts, sampled from the model at temperature 1."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[Document] = []
    for group in range(groups):
        length = PROMPT_LENGTHS[group % len(PROMPT_LENGTHS)]
        vocabulary = model.config.vocab_size
        prompt = torch.randint(1, vocabulary, (length,), generator=generator).tolist()
        rows += [{"group": group, "prompt_ids": prompt} for _ in range(responses)]
    for length in PROMPT_LENGTHS:
        same = [row for row in rows if len(row["prompt_ids"]) == length]
        sampled = sample_responses(model, [r["prompt_ids"] for r in same], generator)
        for row, response in zip(same, sampled, strict=True):
            row["response_ids"] = response
            row["finished"] = response[-1] == END
    return rows


@torch.no_grad()
def sample_responses(
    model: nn.Module, prompts: list[list[int]], generator: torch.Generator
) -> list[list[int]]:
    """One response to each of these prompts of one length, its end token kept."""
    ids = torch.tensor(prompts)
    start = ids.shape[1]
    for _ in range(MAX_RESPONSE):
        with ref.true_float64():
            logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, drawn], dim=1)
    return [_until_end(row) for row in ids[:, start:].tolist()]


def _until_end(response: list[int]) -> list[int]:
    return response[: response.index(END) + 1] if END in response else response


def reference_rows(documents: list[Document]) -> list[ref.Row]:
    """Rows as the reference takes them."""
    keys = ("group", "prompt_ids", "response_ids", "reward", "sampling_logprobs")
    return [ref.Row(**{k: row[k] for k in keys if k in row}) for row in documents]
