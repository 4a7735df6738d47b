"""X-VLM that says whether a statement is true of two images (NLVR2).

Zeng et al. 2022 (arXiv:2111.08276, section 4.2), after ALBEF: every fusion layer becomes a pair of
layers, of which the first attends to the first image and the second to the second one.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModel, BertConfig
from transformers.masking_utils import create_bidirectional_mask

from vlp_adapters.xvlm.configuration import XvlmPretrainConfig
from vlp_adapters.xvlm.modeling import XvlmForPretraining, build_head
from vlp_adapters.xvlm.task_models import TaskOutput, XvlmTaskModel, fill, task_config
from vlp_adapters.xvlm.text import XvlmTextModel
from vlp_adapters.xvlm.weights import nlvr_paths

_SHARED = tuple(
    f"crossattention.self.{part}.{tensor}"
    for part in ("key", "value")
    for tensor in ("weight", "bias")
)


class XvlmNlvrConfig(XvlmPretrainConfig):
    """Configuration of `XvlmForNlvr`: that of the pre-training model.

    `text_config.num_hidden_layers` counts a pair of layers as one.
    """

    model_type = "vlp_xvlm_nlvr"


class PairTextModel(XvlmTextModel):
    """Text layers, then pairs of fusion layers; a pair shares keys and values of its images."""

    def __init__(self, config: BertConfig) -> None:
        """Builds two layers for every fusion layer of `config`, the pre-training model's."""
        pairs = config.num_hidden_layers - config.fusion_layer
        doubled = deepcopy(config)
        doubled.num_hidden_layers = config.fusion_layer + 2 * pairs
        first = range(config.fusion_layer, doubled.num_hidden_layers, 2)
        self._tied_weights_keys = {
            f"encoder.layer.{index + 1}.{name}": f"encoder.layer.{index}.{name}"
            for index in first
            for name in _SHARED
        }
        super().__init__(doubled)

    def fuse(self, text_embeds: Tensor, attention_mask: Tensor, image_embeds: Tensor) -> Tensor:
        """Fusion layers; every token of the layer's image is visible.

        Args:
            text_embeds: `[B, L, width]`, what `encode` returned.
            attention_mask: `[B, L]`, 1 for real tokens.
            image_embeds: `[B, 2, T, encoder_width]`.

        Returns:
            `[B, L, width]`.
        """
        hidden = text_embeds
        mask = create_bidirectional_mask(self.config, hidden, attention_mask)
        for index, layer in enumerate(self.encoder.layer[self.config.fusion_layer :]):
            hidden = layer(hidden, mask, image_embeds[:, index % 2])
        return hidden


class XvlmForNlvr(XvlmTaskModel):
    """Vision encoder, text encoder with pairs of fusion layers, and a head that judges."""

    config_class = XvlmNlvrConfig

    def __init__(self, config: XvlmNlvrConfig) -> None:
        """Builds the model with new weights."""
        super().__init__(config)
        text: Any = config.text_config
        self.text_encoder = PairTextModel(text)
        self.cls_head = build_head(text.hidden_size, 2)
        self.post_init()

    @classmethod
    def from_pretraining(cls, model: XvlmForPretraining, **options: Any) -> XvlmForNlvr:
        """A new model with copies of the weights of a pre-training model; the head is new.

        Args:
            model: is not changed.
            options: of `XvlmNlvrConfig`.
        """
        made = cls(task_config(XvlmNlvrConfig, model.config, options))
        state = {
            path: tensor
            for name, tensor in model.state_dict().items()
            if name.startswith(("vision_encoder.", "text_encoder.bert."))
            for path in nlvr_paths(name, model.config.fusion_layer)
        }
        fill(made, state)
        return made.to(model.device, model.dtype)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Two images per row, `[B, 2, 3, H, W]`, to tokens `[B, 2, T, Dv]`."""
        return self.encode_image(pixel_values.flatten(0, 1)).unflatten(0, (-1, 2))

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
    ) -> TaskOutput:
        """Loss and logits of statements.

        Args:
            pixel_values: `[B, 2, 3, H, W]`, the left image of a row first.
            input_ids: statements, `[B, L]` int64, the first token is [CLS].
            attention_mask: `[B, L]`, 1 for real tokens.
            labels: `[B]` int64, 1 for true statements and 0 for false ones.
        """
        states = self.text_encoder(input_ids, attention_mask, self.encode_images(pixel_values))
        logits: Tensor = self.cls_head(states[:, 0])
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return TaskOutput(loss=loss, logits=logits)


AutoConfig.register(XvlmNlvrConfig.model_type, XvlmNlvrConfig, exist_ok=True)
AutoModel.register(XvlmNlvrConfig, XvlmForNlvr, exist_ok=True)
