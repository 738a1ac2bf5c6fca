"""A tiny checkpoint with a chat template, and dumps as other trainers write them."""

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from entropy_ddp.cli import main

# "ab" is a token: the sampler's [a, b] is not what its text tokenises to.
SPECIAL = ["<pad>", "<eos>", "<unk>", "<turn>", "</turn>"]
PIECES = ["ab", *"abcdefghijklmnopqrstuvwxyz0123456789+= \n."]
VOCABULARY = {token: number for number, token in enumerate([*SPECIAL, *PIECES])}
EOS = VOCABULARY["<eos>"]
# One line a turn: its tokens can be written down by hand.
TEMPLATE = (
    "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}</turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


def make_checkpoint(
    root: Path, *, template: bool = False, name: str = "checkpoint-4"
) -> Path:
    """A folder that holds a tokenizer and what `find_checkpoint` asks of an adapter."""
    folder = root / name
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"ab|.|\n"), behavior="isolated"
    )
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>",
        unk_token="<unk>", additional_special_tokens=["<turn>", "</turn>"],
    )  # fmt: skip
    if template:
        wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)
    config = {"peft_type": "LORA", "base_model_name_or_path": str(root / "base")}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def ids_of(text: str) -> list[int]:
    """Token ids by the vocabulary alone, one token a character, special ones whole."""
    ids = []
    while text:
        special = next((s for s in SPECIAL if text.startswith(s)), None)
        piece = special or ("ab" if text.startswith("ab") else text[0])
        ids.append(VOCABULARY[piece])
        text = text[len(piece) :]
    return ids


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_import(
    kind: str, *files: Path, checkpoint: Path, output: Path, **options: Any
) -> Result:
    """The command in this process; options by name, True for flags."""
    arguments = ["import", kind, *map(str, files)]
    arguments += ["--checkpoint", str(checkpoint), "--output", str(output), "--json"]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        values = value if isinstance(value, list) else [value]
        for item in values:
            arguments += [flag] if item is True else [flag, str(item)]
    return CliRunner().invoke(main, arguments)


def imported(
    kind: str, *files: Path, checkpoint: Path, output: Path, **options: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the rollout file and the summary of an import that must succeed."""
    result = run_import(kind, *files, checkpoint=checkpoint, output=output, **options)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    return rows, json.loads(result.stdout)
