"""X-VLM of pre-training and of retrieval (Zeng et al., 2022, arXiv:2111.08276)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel
from transformers import initialization as init

from vlp_adapters.negatives import check_negatives, draw_negatives
from vlp_adapters.objectives import (
    IGNORED,
    batch_contrastive_loss,
    matching_loss,
    similarity,
)
from vlp_adapters.pretraining import DualEncoder, PretrainOutput, check_losses
from vlp_adapters.xvlm.configuration import XvlmPretrainConfig, XvlmRetrievalConfig
from vlp_adapters.xvlm.text import XvlmTextEncoder, XvlmTextModel
from vlp_adapters.xvlm.vision import build_vision_encoder, init_positions
from vlp_plugins.models.adapter import Negatives

LOSSES = ("itc", "itm", "mlm")
NEGATIVES_FLOOR = 1e-5  # least probability of a wrong partner, as in the original


def build_head(width: int, outputs: int) -> nn.Sequential:
    """Linear, LayerNorm, GELU, Linear: the matching and the box head of the original."""
    return nn.Sequential(
        nn.Linear(width, 2 * width),
        nn.LayerNorm(2 * width),
        nn.GELU(),
        nn.Linear(2 * width, outputs),
    )


class XvlmForRetrieval(DualEncoder):
    """Vision encoder, text encoder whose last layers fuse the image in, projections, matching head.

    In a distributed run the contrastive loss compares the pairs of its own process only.

    Attributes:
        text_class: class of the text encoder.
        has_box_head: whether the model has the box head of pre-training.
    """

    config_class = XvlmRetrievalConfig
    text_class: ClassVar[type[Any]] = XvlmTextModel
    has_box_head: ClassVar[bool] = False
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: XvlmPretrainConfig) -> None:
        """Builds the model with new weights."""
        super().__init__(config)
        vision: Any = config.vision_config
        text: Any = config.text_config
        self.vision_encoder = build_vision_encoder(vision)
        self.text_encoder = self.text_class(text)
        self.vision_proj = nn.Linear(vision.hidden_size, config.embed_dim)
        self.text_proj = nn.Linear(text.hidden_size, config.embed_dim)
        self.itm_head = build_head(text.hidden_size, 2)
        if self.has_box_head:
            self.bbox_head = build_head(text.hidden_size, 4)
        self.temp = nn.Parameter(torch.tensor(config.temperature))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:  # visited last, after both towers drew their own weights
            init.constant_(self.temp, self.config.temperature)
            if (std := self.config.position_init_std) is not None:
                init_positions(self.vision_encoder, std)
                embeddings = self.layers.embeddings
                init.normal_(embeddings.position_embeddings.weight, mean=0.0, std=std)

    @property
    def layers(self) -> Any:
        """The text and fusion layers with their embeddings, an `XvlmTextModel`."""
        return self.text_encoder

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        words: nn.Module = self.layers.get_input_embeddings()
        return words

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the word embeddings."""
        self.layers.set_input_embeddings(value)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` to tokens `[B, T, Dv]`, the global token first."""
        tokens: Tensor = self.vision_encoder(pixel_values)
        return tokens

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Text layers only: ids and mask `[B, L]` to `[B, L, D]`."""
        states: Tensor = self.layers.encode(input_ids, attention_mask)
        return states

    def fuse(self, text_embeds: Tensor, attention_mask: Tensor, image_embeds: Tensor) -> Tensor:
        """Fusion layers: `[B, L, D]`, `[B, L]` and `[B, T, Dv]` to `[B, L, D]`."""
        states: Tensor = self.layers.fuse(text_embeds, attention_mask, image_embeds)
        return states

    def match_logits(
        self, text_embeds: Tensor, attention_mask: Tensor, image_embeds: Tensor
    ) -> Tensor:
        """Logits `[B, 2]` of "do not belong together" and "belong together" for each row."""
        fused = self.fuse(text_embeds, attention_mask, image_embeds)
        logits: Tensor = self.itm_head(fused[:, 0])
        return logits

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        negatives: Negatives | None = None,
        losses: Collection[str] = LOSSES[:2],
        generator: torch.Generator | None = None,
    ) -> PretrainOutput:
        """The losses of a batch of matching pairs; arguments as of `XvlmForPretraining`."""
        check_losses(losses, LOSSES[:2])
        image_embeds = self.encode_image(pixel_values)
        terms, negatives = self.pair_losses(
            image_embeds, input_ids, attention_mask, negatives, losses, generator
        )
        return PretrainOutput.of(terms, negatives)

    def pair_losses(
        self,
        image_embeds: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        negatives: Negatives | None,
        losses: Collection[str],
        generator: torch.Generator | None,
    ) -> tuple[dict[str, Tensor], Negatives | None]:
        """`itc` and `itm` as far as asked for, and the negatives of the latter."""
        terms: dict[str, Tensor] = {}
        if "itm" in losses and negatives is not None:
            check_negatives(negatives, len(input_ids))
        if "itc" not in losses and "itm" not in losses:
            return terms, None
        text_embeds = self.encode_text(input_ids, attention_mask)
        logits = similarity(
            self.project_image(image_embeds), self.project_text(text_embeds).T, self.temp
        )
        if "itc" in losses:
            terms["itc"] = batch_contrastive_loss(logits)
        if "itm" not in losses:
            return terms, None
        if negatives is None:
            negatives = draw_negatives(logits, logits.T, floor=NEGATIVES_FLOOR, generator=generator)
        terms["itm"] = matching_loss(
            self.match_logits, text_embeds, attention_mask, image_embeds, negatives
        )
        return terms, negatives


class XvlmForPretraining(XvlmForRetrieval):
    """The retrieval model with a head of words and one of boxes.

    The box head takes part in no loss here; it is kept so that checkpoints round trip.
    """

    config_class = XvlmPretrainConfig
    text_class = XvlmTextEncoder
    has_box_head = True

    @property
    def layers(self) -> Any:
        """The text and fusion layers with their embeddings, an `XvlmTextModel`."""
        return self.text_encoder.bert

    def mlm_logits(self, hidden: Tensor) -> Tensor:
        """Word logits `[..., vocab_size]` of fused hidden states `[..., D]`."""
        logits: Tensor = self.text_encoder.cls(hidden)
        return logits

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        mlm_input_ids: Tensor | None = None,
        mlm_labels: Tensor | None = None,
        negatives: Negatives | None = None,
        losses: Collection[str] = LOSSES,
        generator: torch.Generator | None = None,
    ) -> PretrainOutput:
        """The pre-training losses of a batch of matching pairs.

        Args:
            pixel_values: `[B, 3, H, W]`.
            input_ids: `[B, L]` int64, the first token is [CLS].
            attention_mask: `[B, L]`, 1 for real tokens.
            mlm_input_ids: `[B, L]`, the captions with masked words (see `mask_tokens`).
            mlm_labels: `[B, L]`, the words to predict, -100 elsewhere.
            negatives: hard negatives of the first `N` pairs to use; drawn by similarity if None.
            losses: which of `itc`, `itm`, `mlm` to compute.
            generator: CPU generator of the draws; None for the global one.

        Raises:
            ValueError: if a loss is unknown, lacks its inputs, or `negatives` do not fit.
        """
        check_losses(losses, LOSSES)
        if "mlm" in losses and (mlm_input_ids is None or mlm_labels is None):
            raise ValueError(
                "the mlm loss needs mlm_input_ids and mlm_labels: make them with mask_tokens(), or"
                " leave 'mlm' out of losses"
            )
        image_embeds = self.encode_image(pixel_values)
        terms, negatives = self.pair_losses(
            image_embeds, input_ids, attention_mask, negatives, losses, generator
        )
        if "mlm" in losses and mlm_input_ids is not None and mlm_labels is not None:
            hidden = self.layers(mlm_input_ids, attention_mask, image_embeds)
            terms["mlm"] = self._word_loss(hidden, mlm_labels)
        return PretrainOutput.of(terms, negatives)

    def _word_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        predicted = labels != IGNORED
        logits = self.mlm_logits(hidden[predicted])  # the head is wide: only where needed
        if not len(logits):
            return logits.sum()  # nothing to predict: 0, where a mean would be NaN
        return functional.cross_entropy(logits, labels[predicted])


AutoModel.register(XvlmRetrievalConfig, XvlmForRetrieval, exist_ok=True)
AutoModel.register(XvlmPretrainConfig, XvlmForPretraining, exist_ok=True)
