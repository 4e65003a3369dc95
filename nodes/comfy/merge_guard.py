"""Stops ComfyUI's nodes for saving and merging models, which would lose a mixture: gates are not weights.

*ModelSave*, *CheckpointSave*, *LoraSave* and the *ModelMerge* nodes read weights and patches of a MODEL.
"""

from __future__ import annotations

import weakref
from typing import Any

from comfy.patcher_extension import CallbacksMP

from ...core.errors import MergeError

_KEY = "legomole_merge_guard"


def guard(patcher: Any) -> None:
    """Make a MODEL with a mixture, and all clones of it, refuse to be saved or merged as weights.

    Methods of the object are replaced: a subclass would be lost where a loader of another pack gives clones its own.
    """
    if not patcher.get_callbacks(CallbacksMP.ON_CLONE, _KEY):
        patcher.add_callback_with_key(CallbacksMP.ON_CLONE, _KEY, lambda _, clone: _replace_methods(clone))
    _replace_methods(patcher)


def _replace_methods(patcher: Any) -> None:
    """Replace the methods through which ComfyUI's nodes read a model to save or merge it.

    Sampling, hooks and our own nodes call the same methods without a prefix.
    """
    reference, kind = weakref.ref(patcher), type(patcher)  # a strong reference would keep the patcher until collected

    def state_dict_for_saving(*_: Any, **__: Any) -> Any:
        raise _refusal("save")

    def model_state_dict(filter_prefix: str | None = None) -> Any:
        if filter_prefix is not None:
            raise _refusal("save")
        return kind.model_state_dict(reference())

    def get_key_patches(filter_prefix: str | None = None) -> Any:
        if filter_prefix is not None:
            raise _refusal("merge")
        return kind.get_key_patches(reference())

    def add_patches(patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> Any:
        # a list holds another model's weights; at strength_model 1 they are only added, which keeps the mixture right
        if strength_model != 1.0 and any(isinstance(patch, list) for patch in patches.values()):
            raise _refusal("merge")
        return kind.add_patches(reference(), patches, strength_patch, strength_model)

    for method in (state_dict_for_saving, model_state_dict, get_key_patches, add_patches):
        setattr(patcher, method.__name__, method)


def _refusal(action: str) -> MergeError:
    return MergeError(
        f"ComfyUI cannot {action} a model with a mix: the gates depend on the prompt and are not weights.",
        expected="a model without a MoLE Mix",
        found="a MoLE Mix before this node",
        remedy="connect the mix to Freeze to LoRA, apply the frozen LoRA to the base model with Apply LoRA, and "
        f"{action} that model; or put MoLE Mix after this node",
    )
