"""The LoRAs that a growing input receives."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from legomole.core.errors import MergeError
from legomole.nodes.graph_lora import GraphLora, StackEntry, connected_loras


def find_file(name: str) -> Path:
    return Path("loras") / name


def fields(lora: GraphLora) -> tuple[object, ...]:
    return lora.content, lora.label, lora.strength_model, lora.strength_clip, lora.convert_rank


def test_an_entry_of_our_stack_has_its_convert_rank_and_unpacks_as_other_packs_expect() -> None:
    entry = StackEntry.of("sub/loha.safetensors", 0.5, 0.25, 16)
    name, strength_model, strength_clip = entry
    assert (name, strength_model, strength_clip) == entry == ("sub/loha.safetensors", 0.5, 0.25)
    stack = [copy.deepcopy(entry), ("plain.safetensors", 1, 1)]
    assert [fields(lora) for lora in connected_loras({"lora0": stack}, find_file)] == [
        (find_file("sub/loha.safetensors"), "loha", 0.5, 0.25, 16),
        (find_file("plain.safetensors"), "plain", 1.0, 1.0, 0),
    ]


def test_sockets_are_read_in_order_and_blank_rows_of_stacks_skipped() -> None:
    loras = [GraphLora(Path(x), x) for x in "abc"]
    values = {"lora10": loras[2], "lora2": [None, ("None", 1, 1), ("d", 1, 1)], "lora0": loras[0], "lora1": loras[1]}
    assert [lora.label for lora in connected_loras(values, find_file)] == ["a", "b", "d", "c"]


@pytest.mark.parametrize("entry", [("a", 1), ("a", 1, 1, 1), ("a", "loud", 1), 5])
def test_other_entries_of_a_stack_are_an_error(entry: object) -> None:
    with pytest.raises(MergeError, match="not an entry of a LORA_STACK"):
        connected_loras({"lora0": [entry]}, find_file)
