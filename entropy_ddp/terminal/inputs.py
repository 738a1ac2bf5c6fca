"""What `sample` and `import` made and what `check` found, as tables in the terminal."""

from typing import Any

from rich.console import Console
from rich.text import Text

from entropy_ddp.terminal.tables import VERDICT_STYLES, as_text, new_table

# What is found of memory, in bytes, by its names in JSON.
MEMORY = {
    "host_now": "of the machine, in use by a rank now",
    "host_more": "of the machine, needed beside that",
    "host_free": "of the machine, free for a rank",
    "device_more": "of the GPU, needed beside what is in use",
    "device_free": "of the GPU, free",
}


def print_samples(console: Console, summaries: list[dict[str, Any]], out: str) -> None:
    """What `sample` rolled out."""
    splits = [summary["split"] for summary in summaries]
    table = new_table(f"Rollouts written to {out}", "", *splits)
    for name in dict.fromkeys(name for summary in summaries for name in summary):
        if name != "split":
            values = (as_text(s[name]) if name in s else "-" for s in summaries)
            table.add_row(name.removeprefix("num_").replace("_", " "), *values)
    console.print(table)


def print_import(console: Console, summary: dict[str, Any], output: str) -> None:
    """What `import` read, then what may be wrong with it."""
    table = new_table(f"Rollouts written to {output}", "", "imported")
    for name, value in summary.items():
        if name != "notes":
            table.add_row(name.replace("_", " "), _one_line(value))
    console.print(table)
    for note in summary["notes"]:
        console.print(Text(f"warning: {note}", style=VERDICT_STYLES["warn"]))


def print_inspection(console: Console, found: dict[str, Any]) -> None:
    """What `check` found, one table."""
    table = new_table("Configuration, checkpoint and batches are valid", "", "found")
    table.columns[1].justify = "left"
    # Paths and the trainer's settings are longer than a line.
    table.columns[1].no_wrap = False
    for subject, facts in found.items():
        table.add_section()
        table.add_row(Text(subject, style="bold"))
        for name, value in facts.items():
            lines = value if isinstance(value, list) else [value]
            text = "\n".join(_one_line(line) for line in lines)
            if name in MEMORY:
                name, text = MEMORY[name], f"{value / 1e9:.2f} GB"
            table.add_row(f"  {name}", Text(text))
    console.print(table)


def _one_line(value: Any) -> str:
    if isinstance(value, dict) and set(value) == {"min", "max"}:
        low, high = as_text(value["min"]), as_text(value["max"])
        return low if low == high else f"{low} to {high}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {as_text(item)}" for name, item in value.items())
    return "none" if value is None else as_text(value)
