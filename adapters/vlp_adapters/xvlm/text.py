"""The text encoder of X-VLM: BERT layers, of which the last ones also attend to an image."""

from __future__ import annotations

from copy import deepcopy
from typing import ClassVar

from torch import Tensor, nn
from transformers import BertConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertEmbeddings,
    BertLayer,
    BertPredictionHeadTransform,
    BertPreTrainedModel,
)


def build_fusion_layer(config: BertConfig) -> BertLayer:
    """A BERT layer with cross-attention to image tokens and bidirectional self-attention.

    transformers offers cross-attention to decoders only, and a decoder's self-attention turns
    causal under sdpa whenever the mask holds no padding, whatever `config.is_decoder` says later.
    So the layer is built from a decoder's configuration, then given the shared one and
    `is_causal=False`. Its keys and values read tokens of width `config.encoder_width`.
    """
    decoder_config = deepcopy(config)
    decoder_config.is_decoder = True
    decoder_config.add_cross_attention = True
    layer = BertLayer(decoder_config)
    for module in layer.modules():
        if isinstance(module, BertAttention):
            # One configuration for all layers: switching eager/sdpa reaches every attention.
            module.self.config = config
            module.self.is_causal = False
    cross = layer.crossattention.self
    cross.key = nn.Linear(config.encoder_width, cross.all_head_size)
    cross.value = nn.Linear(config.encoder_width, cross.all_head_size)
    return layer


class LayerStack(nn.Module):
    """Text layers, then fusion layers, in one list as the original names them."""

    def __init__(self, config: BertConfig) -> None:
        """Builds `config.num_hidden_layers` layers; those from `config.fusion_layer` on fuse."""
        super().__init__()
        self.layer = nn.ModuleList(
            BertLayer(config) if index < config.fusion_layer else build_fusion_layer(config)
            for index in range(config.num_hidden_layers)
        )


class LayeredText(BertPreTrainedModel):
    """Text layers (`0 .. fusion_layer-1`) and fusion layers (the others) over one embedding.

    Parameter names equal the original's: `embeddings.*`, `encoder.layer.N.*`.
    """

    def __init__(self, config: BertConfig) -> None:
        """Builds the layers that `config` (with `fusion_layer`, `encoder_width`) describes."""
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = LayerStack(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the word embeddings."""
        self.embeddings.word_embeddings = value


class XvlmTextModel(LayeredText):
    """Layers that see the whole text: text layers by themselves, fusion layers with an image."""

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings and text layers (mode `text` of the original).

        Args:
            input_ids: `[B, L]` int64.
            attention_mask: `[B, L]`, 1 for real tokens.

        Returns:
            `[B, L, width]`.
        """
        hidden = self.embeddings(input_ids)
        mask = create_bidirectional_mask(self.config, hidden, attention_mask)
        for layer in self.encoder.layer[: self.config.fusion_layer]:
            hidden = layer(hidden, mask)
        return hidden

    def fuse(self, text_embeds: Tensor, attention_mask: Tensor, image_embeds: Tensor) -> Tensor:
        """Fusion layers (mode `fusion` of the original); every image token is visible.

        Args:
            text_embeds: `[B, L, width]`, what `encode` returned.
            attention_mask: `[B, L]`, 1 for real tokens.
            image_embeds: `[B, T, encoder_width]`.

        Returns:
            `[B, L, width]`.
        """
        hidden = text_embeds
        mask = create_bidirectional_mask(self.config, hidden, attention_mask)
        for layer in self.encoder.layer[self.config.fusion_layer :]:
            hidden = layer(hidden, mask, image_embeds)
        return hidden

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, image_embeds: Tensor | None = None
    ) -> Tensor:
        """Text layers, then (mode `multi_modal`) fusion layers if there is an image."""
        hidden = self.encode(input_ids, attention_mask)
        return hidden if image_embeds is None else self.fuse(hidden, attention_mask, image_embeds)


class MlmPredictions(nn.Module):
    """Transform and decoder of the MLM head; the decoder's weight is the word embedding."""

    def __init__(self, config: BertConfig) -> None:
        """Builds the head for `config.vocab_size` words."""
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., width]` to logits `[..., vocab_size]`."""
        logits: Tensor = self.decoder(self.transform(hidden))
        return logits


class MlmHead(nn.Module):
    """`cls` of the original: holds `predictions`, so that parameter names are equal."""

    def __init__(self, config: BertConfig) -> None:
        """Builds the head for `config.vocab_size` words."""
        super().__init__()
        self.predictions = MlmPredictions(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., width]` to logits `[..., vocab_size]`."""
        logits: Tensor = self.predictions(hidden)
        return logits


class WithWordHead(BertPreTrainedModel):
    """Layers (`bert`) with a head of words (`cls`), whose matrix is the word embeddings.

    Attributes:
        body: class of the layers.
    """

    body: ClassVar[type[LayeredText]]

    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"
    }

    def __init__(self, config: BertConfig) -> None:
        """Builds both parts from one configuration."""
        super().__init__(config)
        self.bert = self.body(config)
        self.cls = MlmHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The decoder of the head."""
        return self.cls.predictions.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replaces the decoder of the head."""
        self.cls.predictions.decoder = value


class XvlmTextEncoder(WithWordHead):
    """Text and fusion layers with the MLM head."""

    body = XvlmTextModel

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, image_embeds: Tensor | None = None
    ) -> Tensor:
        """Logits `[B, L, vocab_size]` of the words at every position."""
        logits: Tensor = self.cls(self.bert(input_ids, attention_mask, image_embeds))
        return logits
