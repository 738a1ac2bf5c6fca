"""Methods of a trainer that are listened to: what they are given, what they return.

A method is replaced on the instance, once for all its listeners, and comes back with the
last of them; so two callbacks may listen to one method and end in any order.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False, kw_only=True)
class _Listener:
    before: Callable[..., None] | None
    after: Callable[[Any], None] | None


class _Announced:
    """A method that tells its listeners of every call."""

    def __init__(self, owner: Any, name: str) -> None:
        method = getattr(owner, name)
        functools.update_wrapper(self, method)
        self._method = method
        self._replaced = vars(owner).get(name)
        self.listeners: list[_Listener] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        present = list(self.listeners)
        for listener in present:
            if listener.before is not None:
                listener.before(*args, **kwargs)
        result = self._method(*args, **kwargs)
        for listener in present:
            if listener.after is not None:
                listener.after(result)
        return result

    def withdraw(self, owner: Any, name: str) -> None:
        """Bring back what the instance had under this name, or its class's method."""
        if self._replaced is None:
            delattr(owner, name)
        else:
            setattr(owner, name, self._replaced)


def listen(
    owner: Any,
    name: str,
    *,
    before: Callable[..., None] | None = None,
    after: Callable[[Any], None] | None = None,
) -> Callable[[], None]:
    """Be told of every call of a method from now on.

    Args:
        owner: the object whose method it is.
        name: the method's name.
        before: called with the arguments, before the method is.
        after: called with what the method returned, if it did.

    Returns:
        What ends it; a second call does nothing.
    """
    found = vars(owner).get(name)
    announced = found if isinstance(found, _Announced) else _Announced(owner, name)
    if announced is not found:
        setattr(owner, name, announced)
    listener = _Listener(before=before, after=after)
    announced.listeners.append(listener)

    def end() -> None:
        if listener not in announced.listeners:
            return
        announced.listeners.remove(listener)
        # Not where somebody else has replaced it meanwhile: theirs calls this one.
        if not announced.listeners and vars(owner).get(name) is announced:
            announced.withdraw(owner, name)

    return end
