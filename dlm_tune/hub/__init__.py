"""The way to the Hugging Face Hub: model cards, what of a folder may be published, and the upload."""

from dlm_tune.hub.card import make_card, write_card
from dlm_tune.hub.push import PushReport, push_to_hub

__all__ = ["PushReport", "make_card", "push_to_hub", "write_card"]
