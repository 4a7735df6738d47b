"""X-VLM that writes captions: its text and fusion layers as a causal decoder.

Zeng et al. 2022 (arXiv:2111.08276, section 4.2) fine-tune the pre-training model so. Masked words
were predicted with a view to both sides, so captions are of use after fine-tuning only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from vlp_adapters.objectives import IGNORED
from vlp_adapters.xvlm.decoder import XvlmTextDecoder
from vlp_adapters.xvlm.modeling import XvlmForPretraining
from vlp_adapters.xvlm.task_models import (
    TaskOutput,
    XvlmTaskConfig,
    XvlmTaskModel,
    fill,
    task_config,
)


class XvlmCaptioningConfig(XvlmTaskConfig):
    """Configuration of `XvlmForCaptioning`.

    Attributes:
        prompt_ids: tokens that stand between the start and every caption ("a picture of").
        label_smoothing: of the loss of the words.
    """

    model_type = "vlp_xvlm_captioning"
    label_smoothing: float = 0.1
    prompt_ids: tuple[int, ...] | list[int] = ()


class XvlmForCaptioning(XvlmTaskModel):
    """Vision encoder and text decoder."""

    config_class = XvlmCaptioningConfig
    words_in = "text_decoder.bert"

    def __init__(self, config: XvlmCaptioningConfig) -> None:
        """Builds the model with new weights."""
        super().__init__(config)
        self.text_decoder = XvlmTextDecoder(config.text_config)
        self.post_init()

    @classmethod
    def from_pretraining(cls, model: XvlmForPretraining, **options: Any) -> XvlmForCaptioning:
        """A new captioning model with copies of the weights of a pre-training model.

        Args:
            model: is not changed.
            options: of `XvlmCaptioningConfig`: `start_token_id`, `end_token_id`, `prompt_ids`, ...
        """
        made = cls(task_config(XvlmCaptioningConfig, model.config, options))
        state = {}
        for name, tensor in model.state_dict().items():
            if name.startswith("vision_encoder."):
                state[name] = tensor
            elif name.startswith("text_encoder."):
                state[f"text_decoder.{name.removeprefix('text_encoder.')}"] = tensor
        fill(made, state)
        return made.to(model.device, model.dtype)

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> TaskOutput:
        """Loss and logits of captions.

        Args:
            pixel_values: `[B, 3, H, W]`.
            input_ids: `[B, L]` int64: a first token, which the start token replaces, the caption,
                its end token, padding.
            attention_mask: `[B, L]`, 1 for real tokens.
        """
        ids, mask, labels = self.decoder_inputs(input_ids, attention_mask)
        logits = self.text_decoder(ids, mask, self.encode_image(pixel_values)).logits
        return TaskOutput(loss=self.words_loss(logits, labels), logits=logits)

    def decoder_inputs(
        self, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and mask that the decoder reads, and labels, all `[B, P + L]`: the prompt is in."""
        start = self._start(len(input_ids))
        ids = torch.cat([start, input_ids[:, 1:]], dim=1)
        mask = torch.cat([torch.ones_like(start), attention_mask[:, 1:]], dim=1)
        labels = ids.masked_fill(mask == 0, IGNORED)
        labels[:, : start.shape[1]] = IGNORED
        return ids, mask, labels

    @torch.no_grad()
    def generate(
        self, pixel_values: Tensor, max_length: int = 30, num_beams: int = 1, **options: Any
    ) -> Tensor:
        """Writes a caption for every image.

        Args:
            pixel_values: `[B, 3, H, W]`.
            max_length: most tokens of a caption, start and end token included, the prompt not.
            num_beams: width of the beam search; 1 is greedy.
            options: any other option of transformers' generation.

        Returns:
            `[B, L]` int64 ids: the start token, the caption, the end token, then padding; without
            the prompt.
        """
        start = self._start(len(pixel_values))
        ids = self.text_decoder.write(
            start,
            self.encode_image(pixel_values),
            end=self.config.end_token_id,
            max_length=max_length + start.shape[1] - 1,
            num_beams=num_beams,
            **options,
        )
        return torch.cat([ids[:, :1], ids[:, start.shape[1] :]], dim=1)

    def _start(self, rows: int) -> Tensor:
        tokens = [self.config.start_token_id, *self.config.prompt_ids]
        return torch.tensor(tokens, device=self.device).expand(rows, -1)


AutoConfig.register(XvlmCaptioningConfig.model_type, XvlmCaptioningConfig, exist_ok=True)
AutoModel.register(XvlmCaptioningConfig, XvlmForCaptioning, exist_ok=True)
