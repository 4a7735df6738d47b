"""SigLIP with the image tower of CLIP, which open_clip can train and transformers does not have."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipTextModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling


class SiglipWithClipVisionConfig(SiglipConfig):
    """A `SiglipConfig` whose `vision_config` is that of CLIP.

    The `projection_dim` of `vision_config` is the width of the common space.
    """

    model_type = "vlp_siglip_clip_vision"
    sub_configs_defaults = {  # noqa: RUF012 - as transformers has it
        "vision_config": CLIPVisionConfig,
        "text_config": SiglipTextConfig,
    }


class ProjectedClipVision(CLIPVisionModel):
    """CLIP's image tower; what it pools is projected into the common space, as in SigLIP's."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        """Builds the tower with new weights."""
        super().__init__(config)
        self.head = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """As the tower of CLIP; `pooler_output` is `[B, projection_dim]`."""
        output = super().forward(*args, **kwargs)
        output.pooler_output = self.head(output.pooler_output)
        return output


class SiglipWithClipVision(SiglipModel):
    """Text tower, loss and outputs of SigLIP, image tower of CLIP."""

    config_class = SiglipWithClipVisionConfig

    def __init__(self, config: SiglipWithClipVisionConfig) -> None:
        """Builds the model with new weights."""
        # Past SiglipModel, which would make its own image tower.
        super(SiglipModel, self).__init__(config)
        self.text_model = SiglipTextModel._from_config(config.text_config)
        self.vision_model = ProjectedClipVision._from_config(config.vision_config)
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.logit_bias = nn.Parameter(torch.zeros(1))
        self.post_init()


AutoConfig.register(
    SiglipWithClipVisionConfig.model_type, SiglipWithClipVisionConfig, exist_ok=True
)
AutoModel.register(SiglipWithClipVisionConfig, SiglipWithClipVision, exist_ok=True)
