"""BLIP's question answering model where images and texts are not equally wide.

transformers' class builds the decoder, which reads the states of the question, as if it read image
tokens; that fits models such as BLIP base, whose towers are both 768 wide.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from transformers import AutoConfig, AutoModel, BlipConfig, BlipForQuestionAnswering
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel


class BlipAnsweringConfig(BlipConfig):
    """Configuration of `BlipForAnswering`, with the keys of transformers' `BlipConfig`."""

    model_type = "vlp_blip_answering"


class BlipForAnswering(BlipForQuestionAnswering):
    """transformers' class, but the decoder's cross-attention reads states as wide as texts."""

    config_class = BlipAnsweringConfig

    def __init__(self, config: BlipAnsweringConfig) -> None:
        """Builds the model with new weights."""
        super().__init__(config)
        text: Any = deepcopy(config.text_config)
        text.encoder_hidden_size = text.hidden_size
        self.text_decoder = BlipTextLMHeadModel(text)
        self.post_init()


AutoConfig.register(BlipAnsweringConfig.model_type, BlipAnsweringConfig, exist_ok=True)
AutoModel.register(BlipAnsweringConfig, BlipForAnswering, exist_ok=True)
