"""How a run's YAML file and the command line become a checked configuration.

Unknown keys are errors, with the nearest known key named. Values on the command line
(`--set key.sub=value`) win over the file.
"""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from entropy_ddp.config.schema import Config
from entropy_ddp.errors import InputError


class _Loader(yaml.SafeLoader):
    """YAML with two traps closed: `1e-3` is a number, and no key may stand twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        names = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = [name for number, name in enumerate(names) if name in names[:number]]
        if twice:
            raise yaml.YAMLError(f"key {twice[0]!r} stands twice{node.start_mark}")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_config(path: Path | None, assignments: tuple[str, ...]) -> Config:
    """Read a YAML file, apply `key.sub=value` assignments, check everything.

    Raises:
        InputError: the file cannot be read or parsed, an assignment is malformed, a
            key is unknown, or a value has the wrong type or range.
    """
    document = {} if path is None else _read_yaml(path)
    for assignment in assignments:
        _assign(document, assignment)
    # A section with nothing in it is all defaults.
    document = {key: value for key, value in document.items() if value is not None}
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        source = "configuration" if path is None else str(path)
        lines = [_explain(problem) for problem in error.errors()]
        raise InputError(f"{source}: " + "; ".join(lines)) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not valid YAML: {reason}") from error
    if not isinstance(document, dict):
        found = type(document).__name__
        raise InputError(f"{path}: expected a mapping of sections, found {found}")
    return document


def _assign(document: dict[str, Any], assignment: str) -> None:
    key, separator, text = assignment.partition("=")
    if not separator or not key:
        raise InputError(f"--set {assignment}: expected key.sub=value")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"--set {assignment}: the value is not valid YAML") from error
    *sections, last = key.split(".")
    for section in sections:
        if document.get(section) is None:
            document[section] = {}
        document = document[section]
        if not isinstance(document, dict):
            raise InputError(f"--set {assignment}: `{section}` is not a section")
    document[last] = value


def _explain(problem: Any) -> str:
    """One sentence for one of pydantic's findings."""
    # Without the alternatives of a union, which pydantic adds to the place.
    location = [
        str(part)
        for part in problem["loc"]
        if str(part).isidentifier() and part not in ("int", "float", "str", "bool")
    ]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = sorted(_section_at(location[:-1]).model_fields)
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"
        return f"unknown key `{key}`; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("missing", "value_error"):
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, found {problem['input']!r}"


def _section_at(location: list[str]) -> type[BaseModel]:
    section: type[BaseModel] = Config
    for part in location:
        section = next(_sections_in(section.model_fields[part].annotation))
    return section


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a key's type is made of: `X`, `X | None`, `list[X] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections_in(part)


def to_yaml(config: Config) -> str:
    """The resolved configuration, every default spelled out."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)
