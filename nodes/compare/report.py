"""LoRA Report."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ...core.formats.files import write_bytes
from ...core.merge.methods import METHODS
from ...core.merge.rank import Rank
from ...core.survey.findings import findings
from ...core.survey.page import html_page
from ...core.survey.picture import draw_survey
from ...core.survey.survey import survey
from ..comfy import program
from ..lora import flatten
from ..merge.read_cache import read
from ..settings import settings
from ..sockets import CATEGORY, loras_input, model_inputs, widget


class LoRAReport(io.ComfyNode):
    """Look at LoRAs together before they are merged."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_LoRAReport",
            display_name="LoRA Report",
            category=CATEGORY,
            description="Shows where LoRAs work together or against each other, in which blocks each is strong, what "
            "rank their sum needs, and where the units of their LEGO merge come from.",
            search_aliases=[
                "compare loras",
                "lora overlap",
                "inspect lora",
                "lora analysis",
                "lora heatmap",
                "legomole",
            ],
            is_output_node=True,  # it shows its picture itself
            inputs=[
                loras_input(),
                *(widget(setting) for setting in settings(METHODS["lego"]) if setting.name == "rank"),
                io.String.Input(
                    "filename_prefix",
                    default="legomole/report",
                    tooltip="Name of the page (.html) inside the output folder, a number is added. Left empty, none is "
                    "written.",
                ),
                *model_inputs(),
            ],
            outputs=[
                io.Image.Output("IMAGE", tooltip="The report as a picture."),
                io.String.Output("summary", display_name="summary", tooltip="What it says, in sentences."),
            ],
        )

    @classmethod
    def execute(
        cls, loras: dict[str, Any], rank: str, filename_prefix: str, model: Any = None, clip: Any = None
    ) -> io.NodeOutput:
        values = flatten(loras, program.lora_path)
        path = program.save_path(filename_prefix, program.OUTPUT) if filename_prefix else None
        reading = read(values, model, clip)
        found = survey(
            reading.adapters,
            [value.strength_model for value in values],
            text_encoder_weights=[value.strength_clip for value in values],
            rank=Rank.parse(rank),
            progress=program.progress(),
        )
        text = "\n".join([*findings(found), *reading.dropped, *reading.notes])
        shown = text
        if path is not None:
            write_bytes(path, html_page(found, reading.adapters).encode(errors="xmlcharrefreplace"))
            shown += f"\nAs a page, with all numbers: {path}"
        image = program.picture(draw_survey(found))
        return io.NodeOutput(
            image, text, ui={**ui.PreviewImage(image, cls=cls).as_dict(), **program.show(shown).as_dict()}
        )
