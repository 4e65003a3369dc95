"""Replace a method of one object, so that several replacements can be removed in any order."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


class ReplacedMethod:
    """A method of one object that calls `function` instead; other objects of the class keep theirs.

    Args:
        owner: The object. name: Name of the method.
        function: Called with the replaced method, then with the arguments of the call.
    """

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self.owner, self.name, self.function, self.active = owner, name, function, True
        self.previous: Any = vars(owner).get(name)
        self.inner: Callable[..., Any] = getattr(owner, name)
        vars(owner)[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.inner, *args, **kwargs) if self.active else self.inner(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.inner)

    def remove(self) -> None:
        """Restore the replaced method. A later replacement stays; it then calls the replaced method."""
        self.active = False
        top: Any = vars(self.owner).get(self.name)
        while isinstance(top, ReplacedMethod) and not top.active:
            top = top.previous
        if top is None:
            vars(self.owner).pop(self.name, None)
        else:
            vars(self.owner)[self.name] = top
