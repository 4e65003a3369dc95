"""Save Gates and Load Gates."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...core.mole.trained import TrainedGates
from ..comfy import display, folders
from ..sockets import CATEGORY, LEGOMOLE_GATES, filename_input, path_output


class SaveGates(io.ComfyNode):
    """Writes gates to a file in ``models/legomole_gates``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_SaveGates",
            display_name="Save Gates",
            category=CATEGORY,
            description="Saves trained gates to models/legomole_gates. They only work with the LoRA files they were "
            "trained with.",
            search_aliases=["export gates", "write gates", "legomole"],
            is_output_node=True,
            inputs=[
                LEGOMOLE_GATES.Input("gates", tooltip="From Train Gates."),
                filename_input("models/legomole_gates", "gates"),
            ],
            outputs=[path_output()],
        )

    @classmethod
    def execute(cls, gates: TrainedGates, filename_prefix: str) -> io.NodeOutput:
        path = folders.new_path(filename_prefix, folders.GATES)
        gates.save(path)
        return io.NodeOutput(str(path), ui=display.show_text(str(path)))


class LoadGates(io.ComfyNode):
    """Reads gates that Save Gates wrote."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_LoadGates",
            display_name="Load Gates",
            category=CATEGORY,
            description="Loads trained gates for MoLE Mix. Connect the LoRAs they were trained with, in any order.",
            search_aliases=["open gates", "legomole"],
            has_intermediate_output=True,  # its text is shown again when its result is cached
            inputs=[
                io.Combo.Input(
                    "gates_name",
                    options=folders.file_names(folders.GATES),
                    tooltip="A file in models/legomole_gates.",
                )
            ],
            outputs=[LEGOMOLE_GATES.Output("gates", display_name="gates", tooltip="Connect them to MoLE Mix.")],
        )

    @classmethod
    def validate_inputs(cls, gates_name: str | None = None) -> bool | str:
        """Accept files that were written after the page was opened."""
        return folders.check_name(gates_name, folders.GATES)

    @classmethod
    def fingerprint_inputs(cls, gates_name: str | None = None, **others: Any) -> object:
        """Run the node again when the file has changed."""
        return folders.fingerprint(gates_name, folders.GATES)

    @classmethod
    def execute(cls, gates_name: str) -> io.NodeOutput:
        gates = TrainedGates.load(folders.path_of(gates_name, folders.GATES))
        s = gates.gates.settings
        labels = ", ".join(expert.label for expert in gates.experts)
        text = f"{len(gates.gates.names)} gates per {s.granularity} ({s.activation}, read {s.reads}) for {labels}"
        return io.NodeOutput(gates, ui=display.show_text(text))
