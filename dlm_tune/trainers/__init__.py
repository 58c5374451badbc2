"""Trainers of diffusion language models; `DiffusionTrainer` does pretraining and supervised fine-tuning."""

from dlm_tune.trainers.diffusion_config import DiffusionConfig
from dlm_tune.trainers.diffusion_trainer import DiffusionTrainer

__all__ = ["DiffusionConfig", "DiffusionTrainer"]
