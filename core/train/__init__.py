"""Train the gates of a mixture: `train` for diffusion models, `train_on_texts` for language models."""

from __future__ import annotations

from .denoiser import Denoiser
from .detector import EncodedPrompt, FittedDetector, PromptEncoder, fit_detector
from .diffusion import check_training, train
from .examples import Images
from .fit import Devices
from .objectives import Clip
from .prompts import Prompt, prompts_for
from .settings import FitSettings, TrainSettings
from .texts import Text, train_on_texts
from .training import TrainingResult

__all__ = [
    "Clip", "Denoiser", "Devices", "EncodedPrompt", "FitSettings", "FittedDetector", "Images", "Prompt",
    "PromptEncoder", "Text", "TrainSettings", "TrainingResult", "check_training", "fit_detector", "prompts_for",
    "train", "train_on_texts",
]  # fmt: skip
