"""Stops ComfyUI's nodes for saving and merging models, which would lose a mixture: gates are not weights.

*ModelSave*, *CheckpointSave*, *LoraSave* and the *ModelMerge* nodes read weights and patches of a MODEL.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from comfy.model_patcher import ModelPatcher

from ...core.errors import MergeError


def guard(patcher: Any) -> None:
    """Make a MODEL with a mixture, and all clones of it, refuse to be saved or merged as weights.

    The class of the patcher is replaced, because ComfyUI makes a clone from it.
    """
    if not isinstance(patcher, _Guarded):
        patcher.__class__ = _guarded(type(patcher))


class _Guarded(ModelPatcher):
    """The methods through which ComfyUI's nodes read a model to save or merge it.

    Sampling, hooks and our own nodes call the same methods without a prefix.
    """

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> Any:
        raise _refusal("save")

    def model_state_dict(self, filter_prefix: str | None = None) -> Any:
        if filter_prefix is not None:
            raise _refusal("save")
        return super().model_state_dict()

    def get_key_patches(self, filter_prefix: str | None = None) -> Any:
        if filter_prefix is not None:
            raise _refusal("merge")
        return super().get_key_patches()

    def add_patches(self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> Any:
        # a list holds another model's weights; at strength_model 1 they are only added, which keeps the mixture right
        if strength_model != 1.0 and any(isinstance(patch, list) for patch in patches.values()):
            raise _refusal("merge")
        return super().add_patches(patches, strength_patch, strength_model)


@cache
def _guarded(base: type) -> type:
    return type(f"Guarded{base.__name__}", (_Guarded, base), {})


def _refusal(action: str) -> MergeError:
    return MergeError(
        f"ComfyUI cannot {action} a model with a mix: the gates depend on the prompt and are not weights.",
        expected="a model without a MoLE Mix",
        found="a MoLE Mix before this node",
        remedy="connect the mix to Freeze to LoRA, apply the frozen LoRA to the base model with Apply LoRA, and "
        f"{action} that model; or put MoLE Mix after this node",
    )
