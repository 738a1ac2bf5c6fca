"""How a run's YAML file and the command line become a checked configuration.

Unknown keys are errors, with the nearest known key named. Values on the command line
(`--set key.sub=value`) win over the file.
"""

import difflib
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from entropy_ddp.config.schema import Config
from entropy_ddp.errors import InputError
from entropy_ddp.files import reason_of, require_regular_file

# With its aliases written out. A line of them can stand for more than any memory.
MAX_VALUES = 100_000
# Problems that one message tells; of more, how many.
MAX_PROBLEMS = 6
# What YAML's own constructors raise for text that their tag does not fit.
_UNREADABLE = (
    yaml.YAMLError,
    ValueError,
    KeyError,
    AttributeError,
    TypeError,
    RecursionError,
)


class _Loader(yaml.SafeLoader):
    """YAML with two traps closed: `1e-3` is a number, and no key may stand twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        names = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = [name for number, name in enumerate(names) if name in names[:number]]
        if twice:
            raise yaml.YAMLError(f"key {twice[0]!r} stands twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def _parse(text: str) -> Any:
    """The document of a YAML text.

    Raises:
        One of `_UNREADABLE`: it is no YAML, or more than a configuration can be.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        _require_size(node)
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _require_size(root: yaml.Node | None) -> None:
    sizes: dict[int, int] = {}
    inside: set[int] = set()

    def size_of(node: yaml.Node) -> int:
        if id(node) in inside:
            raise yaml.YAMLError(f"an anchor contains itself{node.start_mark}")
        if id(node) not in sizes:
            inside.add(id(node))
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            if isinstance(node, yaml.MappingNode):
                parts = [part for pair in parts for part in pair]
            sizes[id(node)] = 1 + sum(map(size_of, parts))
            inside.remove(id(node))
        return sizes[id(node)]

    if root is not None and size_of(root) > MAX_VALUES:
        raise yaml.YAMLError(f"more than {MAX_VALUES} values, its aliases written out")


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
    if path is not None:
        _require_no_trust(document, path, assignments)
    for assignment in assignments:
        _assign(document, assignment)
    _require_text(document, "" if path is None else f"{path}: ")
    # A section with nothing in it is all defaults.
    document = {key: value for key, value in document.items() if value is not None}
    return validated(document, "configuration" if path is None else str(path))


def with_sections(config: Config, sections: Mapping[str, Mapping[str, Any]]) -> Config:
    """A configuration with some keys set anew, as `{section: {key: value}}`.

    Raises:
        InputError: a key is unknown, or a value has the wrong type or range.
    """
    document = config.model_dump()
    for name, keys in sections.items():
        document[name] = document[name] | dict(keys)
    return validated(document, "configuration")


def validated(document: dict[str, Any], source: str) -> Config:
    """The configuration of a document.

    Args:
        source: where it is from, for the message.

    Raises:
        InputError: a key is unknown, or a value has the wrong type or range.
    """
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        lines = list(dict.fromkeys(_explain(problem) for problem in error.errors()))
        if len(lines) > MAX_PROBLEMS:
            lines[MAX_PROBLEMS:] = [f"and {len(lines) - MAX_PROBLEMS} more"]
        raise InputError(f"{source}: " + "; ".join(lines)) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    require_regular_file(path)
    try:
        document = _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except _UNREADABLE as error:
        raise InputError(f"{path}: not valid YAML: {_one_line(error)}") from error
    if not isinstance(document, dict):
        found = "nothing" if document is None else type(document).__name__
        raise InputError(
            f"{path}: expected a mapping of sections, found {found}; see configs/"
        )
    return document


def _require_no_trust(
    document: dict[str, Any], path: Path, assignments: tuple[str, ...]
) -> None:
    """A file that somebody sent must not say that code which came with it may run."""
    keys = {assignment.partition("=")[0] for assignment in assignments}
    checkpoint = document.get("checkpoint")
    trusted = isinstance(checkpoint, dict) and checkpoint.get("trust_remote_code")
    if trusted and not keys & {"checkpoint", "checkpoint.trust_remote_code"}:
        raise InputError(
            f"{path}: checkpoint.trust_remote_code: expected false or nothing in a "
            "file, found true; give --trust-remote-code on the command line"
        )


def _one_line(error: BaseException) -> str:
    if not isinstance(error, yaml.YAMLError):
        return reason_of(error)
    text = " ".join(str(error).split()).replace(
        ' in "<unicode string>", line', " in line"
    )
    return text if len(text) <= 400 else text[:397] + "..."


def _require_text(value: Any, where: str) -> None:
    """Refuse text that no path and no file can hold, wherever it stands."""
    if isinstance(value, str):
        if "\0" in value or any(
            "\ud800" <= character <= "\udfff" for character in value
        ):
            raise InputError(
                f"{where}expected text without NUL characters and half surrogates, "
                f"found {reprlib.repr(value)}; correct it"
            )
    elif isinstance(value, dict | list | tuple | set):
        for part in value:
            _require_text(part, where)
            if isinstance(value, dict):
                _require_text(value[part], where)


def _assign(document: dict[str, Any], assignment: str) -> None:
    key, separator, text = assignment.partition("=")
    *sections, last = key.split(".")
    if not separator or not all((*sections, last)):
        raise InputError(f"--set {assignment}: expected key.sub=value")
    try:
        value = _parse(text)
    except _UNREADABLE as error:
        shown = assignment if len(assignment) <= 100 else assignment[:97] + "..."
        raise InputError(f"--set {shown}: the value is not valid YAML") from error
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
    key, kind = ".".join(location), problem["type"]
    found = f"found {_SHORT.repr(problem['input'])}"
    if kind == "extra_forbidden":
        if not str(problem["loc"][-1]).isidentifier():
            location.append(str(problem["loc"][-1]))
            key = ".".join(location)
        known = sorted(_section_at(location[:-1]).model_fields)
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"
        return f"unknown key `{key}`; {hint}"
    if kind == "invalid_key":
        return f"expected names as keys, {found}"
    if kind in ("missing", "value_error"):
        message = problem["msg"].removeprefix("Value error, ")
        message = "required, found none" if kind == "missing" else message
        return f"{key}: {message}" if key else message
    return f"{key}: expected {_expected(problem)}, {found}"


def _expected(problem: Any) -> str:
    if problem["type"] in ("model_type", "dict_type"):
        return "a section of keys"
    if problem["type"] in ("too_short", "string_too_short"):
        return f"a length of at least {problem['ctx']['min_length']}"
    text = problem["msg"].removeprefix("Input should be ")
    return f"a value {text}" if text.startswith(("greater", "less")) else text


# Short, and as fast for a list of lists of lists as for any.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


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
