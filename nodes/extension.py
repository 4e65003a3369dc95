"""The list of nodes that ComfyUI loads."""

from __future__ import annotations

import importlib
import logging
import threading

from comfy_api.latest import ComfyExtension, io

_LOG = logging.getLogger(__name__)


class LegoMoleExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        try:
            from . import file_hashes, lora_list
            from .comfy import folders, routes
            from .compare import report, xy
            from .merge import apply, load, merge, save
            from .mole import calibrate, gates, mole, region, train_gates
        except Exception:
            _LOG.exception("LegoMoLE could not be loaded")  # ComfyUI logs one line without the traceback
            raise
        routes.add()
        file_hashes.keep_in(folders.hashes_file())
        # imported by the first merge, which would wait for it
        threading.Thread(target=importlib.import_module, args=["scipy.cluster.hierarchy"], daemon=True).start()
        return [
            load.LoadLoRA,
            lora_list.LoRAList,
            merge.LegoMerge,
            merge.MergeLoRAs,
            report.LoRAReport,
            calibrate.Calibrate,
            apply.ApplyLoRA,
            save.SaveLoRA,
            mole.MoLEMix,
            region.Region,
            train_gates.TrainGates,
            gates.SaveGates,
            gates.LoadGates,
            mole.FreezeToLoRA,
            mole.GateMap,
            xy.XYCompare,
        ]
