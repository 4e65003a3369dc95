"""LoRA Report."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ...core.formats.files import write_bytes
from ...core.merge.methods import METHODS
from ...core.merge.rank import Rank
from ...core.survey.page import html_page
from ...core.survey.picture import draw_survey
from ...core.survey.summary import summary_lines
from ...core.survey.survey import survey
from ..comfy import display, folders
from ..graph_lora import connected_loras
from ..merge.read_cache import read
from ..settings import settings_of
from ..sockets import CATEGORY, loras_input, model_inputs, refuse_unknown, setting_input


class LoRAReport(io.ComfyNode):
    """Shows how LoRAs relate to each other before they are merged."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_LoRAReport",
            display_name="LoRA Report",
            category=CATEGORY,
            description="Shows where LoRAs act alike or against each other, in which blocks each is strong, what rank "
            "their sum needs, and which LoRAs the units of a LEGO merge come from.",
            search_aliases=[
                "compare loras",
                "lora overlap",
                "inspect lora",
                "lora analysis",
                "lora heatmap",
                "legomole",
            ],
            is_output_node=True,  # it shows its own image
            has_intermediate_output=True,  # also when its result is cached
            inputs=[
                loras_input(),
                *(setting_input(setting) for setting in settings_of(METHODS["lego"]) if setting.name == "rank"),
                io.String.Input(
                    "filename_prefix",
                    default="legomole/report",
                    tooltip="Name in the output folder for a page (.html) with all numbers. If empty, no page is "
                    "written.",
                ),
                *model_inputs(),
            ],
            outputs=[
                io.Image.Output("IMAGE", tooltip="The report as an image."),
                io.String.Output(
                    "summary",
                    display_name="summary",
                    tooltip="A traffic light per LoRA, the findings, and the comparison in sentences.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, loras: dict[str, Any], rank: str, filename_prefix: str, model: Any = None, clip: Any = None, **unknown: Any
    ) -> io.NodeOutput:
        refuse_unknown(unknown)
        values = connected_loras(loras, folders.lora_path)
        path = folders.new_path(filename_prefix, folders.OUTPUT) if filename_prefix else None
        loaded = read(values, model, clip).hashed()  # NaN and infinity are findings
        result = survey(
            loaded.adapters,
            [value.strength_model for value in values],
            text_encoder_weights=[value.strength_clip for value in values],
            rank=Rank.parse(rank),
            progress=display.progress_bar(),
        )
        findings = [finding.line for finding in result.report.findings]
        lights = display.lights_text(result.report)
        text = "\n".join([lights, *findings, *summary_lines(result), *loaded.dropped, *loaded.notes])
        shown_text = text
        if path is not None:
            write_bytes(path, html_page(result, loaded.adapters).encode(errors="xmlcharrefreplace"))
            shown_text += f"\nPage with all numbers: {path}"
        image = display.to_image(draw_survey(result))
        return io.NodeOutput(
            image, text, ui={**ui.PreviewImage(image, cls=cls).as_dict(), **display.show_text(shown_text).as_dict()}
        )
