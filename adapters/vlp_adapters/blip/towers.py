"""The networks of BLIP and what each part of them computes (Li et al., 2022, arXiv:2201.12086)."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipTextModel, BlipVisionModel
from transformers import initialization as init
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from vlp_adapters.blip.configuration import BlipPretrainConfig
from vlp_adapters.blip.forward import image_tokens, text_tokens
from vlp_adapters.blip.kinds import begin_with
from vlp_adapters.pretraining import DualEncoder

_OWN = re.compile(r"\.attention\.")  # self-attention; `crossattention` is shared


class BlipTowers(DualEncoder):
    """Vision encoder, text encoder and text decoder, projections, matching head.

    Every parameter of the two text towers is shared, the same object, except self-attention; the
    word head of the decoder is the word embedding. A subclass ends its own `__init__` with
    `post_init`.
    """

    config_class = BlipPretrainConfig

    def __init__(self, config: BlipPretrainConfig) -> None:
        """Builds the networks; their weights are drawn by `post_init`."""
        super().__init__(config)
        vision: Any = config.vision_config
        text: Any = config.text_config
        self.vision_model = BlipVisionModel(vision)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        self.text_decoder = BlipTextLMHeadModel(text)
        self.vision_proj = nn.Linear(vision.hidden_size, config.embed_dim)
        self.text_proj = nn.Linear(text.hidden_size, config.embed_dim)
        self.itm_head = nn.Linear(text.hidden_size, 2)
        self._tied_weights_keys = shared_names(self.text_encoder)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.position_init_std
        # The model itself is visited last, after its parts drew their own weights.
        if module is self and std is not None:
            init.normal_(self.vision_model.embeddings.position_embedding, mean=0.0, std=std)
            positions = self.text_encoder.embeddings.position_embeddings
            init.normal_(positions.weight, mean=0.0, std=std)

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        embeddings: nn.Module = self.text_encoder.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the word embeddings of both towers."""
        self.text_encoder.set_input_embeddings(value)
        self.text_decoder.set_input_embeddings(value)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` to tokens `[B, T, Dv]`, the global token first.

        Position embeddings are interpolated where `H` or `W` is not the configured size.
        """
        return image_tokens(self.vision_model, pixel_values)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Text alone, every token sees every other: ids and mask `[B, L]` to `[B, L, D]`."""
        return text_tokens(self.text_encoder, input_ids, attention_mask)

    def fuse(self, input_ids: Tensor, attention_mask: Tensor, image_embeds: Tensor) -> Tensor:
        """Multimodal encoder: ids and mask `[B, L]`, images `[B, T, Dv]` to `[B, L, D]`.

        The first token of every row is replaced by `[ENC]`.
        """
        ids = begin_with(input_ids, self.config.enc_token_id)
        return text_tokens(self.text_encoder, ids, attention_mask, image_embeds)

    def decode(self, input_ids: Tensor, attention_mask: Tensor, image_embeds: Tensor) -> Tensor:
        """Causal decoder: ids and mask `[B, L]`, images `[B, T, Dv]` to logits `[B, L, vocab]`.

        The first token of every row is replaced by `[DEC]`.
        """
        output = self.text_decoder(
            input_ids=begin_with(input_ids, self.config.dec_token_id),
            attention_mask=attention_mask,
            encoder_hidden_states=image_embeds,
            is_decoder=True,
            use_cache=False,
        )
        logits: Tensor = output.logits
        return logits

    def match_logits(
        self, input_ids: Tensor, attention_mask: Tensor, image_embeds: Tensor
    ) -> Tensor:
        """Logits `[B, 2]` of "do not belong together" and "belong together" for each row."""
        logits: Tensor = self.itm_head(self.fuse(input_ids, attention_mask, image_embeds)[:, 0])
        return logits

    @torch.no_grad()
    def generate(
        self, pixel_values: Tensor, max_length: int = 30, num_beams: int = 1, **options: Any
    ) -> Tensor:
        """Writes a caption for every image.

        Args:
            pixel_values: `[B, 3, H, W]`.
            max_length: most tokens of a caption, `[DEC]` and `[SEP]` included.
            num_beams: width of the beam search; 1 is greedy.
            options: any other option of transformers' generation (`use_cache`, `min_length`, ...).

        Returns:
            `[B, L]` int64 ids: `[DEC]`, the caption, `[SEP]`, then padding.
        """
        image_embeds = self.encode_image(pixel_values)
        text: Any = self.config.text_config
        start = torch.full(
            (len(image_embeds), 1), self.config.dec_token_id, device=image_embeds.device
        )
        settings = {
            "do_sample": False,
            "eos_token_id": text.sep_token_id,
            "pad_token_id": text.pad_token_id,
        }
        ids: Tensor = self.text_decoder.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            encoder_hidden_states=image_embeds,
            max_length=max_length,
            num_beams=num_beams,
            **(settings | options),
        )
        return ids


def shared_names(text_encoder: nn.Module) -> dict[str, str]:
    """Name in the decoder -> name in the encoder, for every parameter that the towers share.

    All but self-attention (arXiv:2201.12086, section 3.2). The encoder's name is the first one:
    published masks and scores are keyed by it.
    """
    return {
        f"text_decoder.bert.{name}": f"text_encoder.{name}"
        for name, _ in text_encoder.named_parameters()
        if not _OWN.search(name)
    }
