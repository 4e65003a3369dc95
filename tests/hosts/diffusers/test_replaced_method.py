"""Methods of one object that are replaced, and restored in any order."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("diffusers")

from legomole.hosts.diffusers.replaced_method import ReplacedMethod


class Thing:
    def speak(self, word: str, *, times: int = 1) -> str:
        return word * times


def adding(letter: str) -> Callable[..., str]:
    def function(original: Callable[..., str], *args: Any, **kwargs: Any) -> str:
        return original(*args, **kwargs) + letter

    return function


def test_only_this_object_is_changed() -> None:
    thing, other = Thing(), Thing()
    replaced = ReplacedMethod(thing, "speak", adding("!"))
    assert thing.speak("a", times=2) == "aa!"
    assert other.speak("a") == "a"
    replaced.remove()
    replaced.remove()
    assert thing.speak("a") == "a"
    assert vars(thing) == {}


def test_the_signature_stays() -> None:
    thing = Thing()
    before = inspect.signature(thing.speak)
    ReplacedMethod(thing, "speak", adding("!"))
    assert inspect.signature(thing.speak) == before


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_several_are_removed_in_any_order(order: tuple[int, ...]) -> None:
    thing = Thing()
    replaced = [ReplacedMethod(thing, "speak", adding(letter)) for letter in "bcd"]
    assert thing.speak("a") == "abcd"
    left = set("bcd")
    for number in order:
        replaced[number].remove()
        left.remove("bcd"[number])
        assert thing.speak("a") == "a" + "".join(sorted(left))
    assert vars(thing) == {}


def test_a_replacement_of_another_program_stays() -> None:
    thing = Thing()
    own: Any = lambda word: f"<{word}>"  # noqa: E731
    thing.speak = own  # type: ignore[method-assign]
    replaced = ReplacedMethod(thing, "speak", adding("!"))
    inner = thing.speak
    assert thing.speak("a") == "<a>!"
    thing.speak = lambda word: f"({inner(word)})"  # type: ignore[method-assign]
    assert thing.speak("a") == "(<a>!)"
    replaced.remove()
    assert thing.speak("a") == "(<a>)"
    thing.speak = own  # type: ignore[method-assign]
    assert thing.speak("a") == "<a>"
