"""Save Gates and Load Gates."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...core.mole.trained import TrainedGates
from ..comfy import program
from ..sockets import CATEGORY, LEGOMOLE_GATES


class SaveGates(io.ComfyNode):
    """Write gates into a file beside the LoRAs' folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_SaveGates",
            display_name="Save Gates",
            category=CATEGORY,
            description="Saves trained gates to models/legomole_gates. They belong to the very LoRA files they were "
            "trained with, told by their hashes.",
            search_aliases=["export gates", "write gates", "legomole"],
            is_output_node=True,
            inputs=[
                LEGOMOLE_GATES.Input("gates", tooltip="From Train Gates."),
                io.String.Input(
                    "filename_prefix",
                    default="gates",
                    tooltip="Name inside models/legomole_gates, a number is added. May hold a subfolder and the date "
                    "as %year%, %month%, %day%. Existing files are never overwritten.",
                ),
            ],
            outputs=[io.String.Output("path", display_name="path", tooltip="Where the file was written.")],
        )

    @classmethod
    def execute(cls, gates: TrainedGates, filename_prefix: str) -> io.NodeOutput:
        path = program.save_path(filename_prefix, program.GATES)
        gates.save(path)
        return io.NodeOutput(str(path), ui=program.show(str(path)))


class LoadGates(io.ComfyNode):
    """Read gates that Save Gates wrote."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_LoadGates",
            display_name="Load Gates",
            category=CATEGORY,
            description="Loads trained gates for MoLE Mix. Connect the LoRAs they were trained with, in any order.",
            search_aliases=["open gates", "legomole"],
            inputs=[
                io.Combo.Input(
                    "gates_name", options=program.names(program.GATES), tooltip="A file in models/legomole_gates."
                )
            ],
            outputs=[LEGOMOLE_GATES.Output("gates", display_name="gates", tooltip="For MoLE Mix.")],
        )

    @classmethod
    def fingerprint_inputs(cls, gates_name: str | None = None, **others: Any) -> object:
        """Changes when the file changes."""
        return program.fingerprint(gates_name, program.GATES)

    @classmethod
    def execute(cls, gates_name: str) -> io.NodeOutput:
        gates = TrainedGates.load(program.path_of(gates_name, program.GATES))
        s = gates.gates.settings
        labels = ", ".join(expert.label for expert in gates.experts)
        text = f"{len(gates.gates.names)} gates per {s.granularity} ({s.activation}, read {s.reads}) for {labels}"
        return io.NodeOutput(gates, ui=program.show(text))
