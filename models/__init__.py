"""Models in plain Flax: nothing here knows that it may run as a pipeline."""

from models.loss import next_token_loss
from models.registry import MODELS, Model

__all__ = ["MODELS", "Model", "next_token_loss"]
