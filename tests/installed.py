"""An interpreter that finds only what an installation of the package would have.

For processes of their own: `only` comes before anything else is imported.
"""

import configparser
import importlib
import importlib.metadata
import pkgutil
import sys
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SETTINGS = Path(__file__).parent.parent / "setup.cfg"


class Hiding:
    """A finder of modules, but for some packages."""

    def __init__(self, finder: Any, hidden: set[str]) -> None:
        self.finder, self.hidden = finder, hidden

    def find_spec(self, name: str, *arguments: Any) -> ModuleSpec | None:
        """Nothing of what is hidden, as if it were not there."""
        if name.partition(".")[0] in self.hidden:
            return None
        return self.finder.find_spec(name, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def only(*extras: str) -> None:
    """Hide every package that the base and these extras do not require."""
    present = required(extras)
    hidden = {
        name
        for name, owners in importlib.metadata.packages_distributions().items()
        if not present & {canonicalize_name(owner) for owner in owners}
    }
    sys.meta_path[:] = [Hiding(finder, hidden) for finder in sys.meta_path]
    loaded = {name.partition(".")[0] for name in sys.modules}
    for name in hidden & loaded - {"packaging"}:
        raise AssertionError(f"{name} was imported before it was hidden")


def required(extras: Iterable[str]) -> set[str]:
    """Distributions that are installed with the package and these extras."""
    settings = configparser.ConfigParser()
    settings.read(SETTINGS)
    texts = settings["options"]["install_requires"].split("\n")
    for extra in extras:
        texts += settings["options.extras_require"][extra].split("\n")
    found = {"entropy-ddp"}
    waiting = [Requirement(text) for text in texts if text.strip()]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        name, wanted = canonicalize_name(requirement.name), requirement.extras
        if (name, frozenset(wanted)) in seen:
            continue
        seen.add((name, frozenset(wanted)))
        found.add(name)
        waiting += _needs(name, wanted)
    return found


def _needs(name: str, extras: set[str]) -> Iterator[Requirement]:
    """What a distribution requires here; nothing of one that is not installed."""
    try:
        texts = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        # Another platform's, which a marker could not tell.
        return
    for text in texts:
        requirement = Requirement(text)
        marker = requirement.marker
        chosen = [{"extra": extra} for extra in extras or {""}]
        if marker is None or any(map(marker.evaluate, chosen)):
            yield requirement


def missing_imports() -> dict[str, str]:
    """Modules of the package that cannot be imported, and what they lack."""
    import entropy_ddp

    missing = {}
    for module in pkgutil.walk_packages(entropy_ddp.__path__, "entropy_ddp."):
        # Importing this one runs the command line.
        if module.name == "entropy_ddp.__main__":
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            missing[module.name] = str(error.name).partition(".")[0]
    return missing
