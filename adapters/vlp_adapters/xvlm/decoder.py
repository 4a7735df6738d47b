"""The text decoder of X-VLM's downstream models: its layers with causal self-attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from vlp_adapters.xvlm.text import LayeredText, WithWordHead


class CausalTextModel(LayeredText):
    """Text layers, then fusion layers, of which every token sees only those before it.

    With `config.fusion_layer = 0` all of them have cross-attention.
    """

    def __init__(self, config: BertConfig) -> None:
        """Builds the layers that `config` (with `fusion_layer`, `encoder_width`) describes."""
        super().__init__(config)
        layers: Any = self.encoder.layer
        for index, layer in enumerate(layers):
            layer.attention.self.is_causal = True
            layer.attention.self.layer_idx = index  # the place of its keys in the cache
            if hasattr(layer, "crossattention"):
                layer.crossattention.self.layer_idx = index

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """States of the tokens.

        Args:
            input_ids: `[B, L]` int64.
            attention_mask: `[B, past + L]`, 1 for real tokens; None if all are.
            encoder_hidden_states: `[B, T, encoder_width]` that the cross-attention reads.
            encoder_attention_mask: `[B, T]`, 1 for real tokens; None if all are.
            past_key_values: keys and values of the tokens before these; is added to.

        Returns:
            `[B, L, width]`.
        """
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        hidden = self.embeddings(input_ids, past_key_values_length=past)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        if encoder_attention_mask is not None:
            encoder_attention_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
            )
        for layer in self.encoder.layer:
            hidden = layer(
                hidden,
                mask,
                encoder_hidden_states,
                encoder_attention_mask,
                past_key_values=past_key_values,
            )
        return hidden


class XvlmTextDecoder(WithWordHead, GenerationMixin):
    """Causal layers with the word head: writes captions and answers."""

    body = CausalTextModel

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithCrossAttentions:
        """Logits `[B, L, vocab_size]`; arguments as of `CausalTextModel.forward`."""
        if use_cache and past_key_values is None:
            past_key_values = self._empty_cache()
        hidden = self.bert(
            input_ids,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            past_key_values,
        )
        return CausalLMOutputWithCrossAttentions(
            logits=self.cls(hidden), past_key_values=past_key_values
        )

    @torch.no_grad()
    def write(
        self,
        prompt: Tensor,
        context: Tensor,
        context_mask: Tensor | None = None,
        *,
        end: int,
        max_length: int,
        num_beams: int = 1,
        **options: Any,
    ) -> Tensor:
        """Writes on from a prompt.

        Args:
            prompt: `[B, P]` int64.
            context: `[B, T, encoder_width]`, image tokens or states of a question.
            context_mask: `[B, T]`, 1 for real tokens; None if all are.
            end: token that ends a text.
            max_length: most tokens in all, those of the prompt included; never more than there are
                positions for.
            num_beams: width of the beam search; 1 is greedy.
            options: any other option of transformers' generation.

        Returns:
            `[B, L]` int64, the prompt first; padding after `end`.
        """
        settings: dict[str, Any] = {
            "do_sample": False,
            "eos_token_id": end,
            "pad_token_id": self.config.pad_token_id,
            "use_cache": True,
        } | options
        if settings["use_cache"]:  # generation itself would make one without cross-attention
            settings["past_key_values"] = self._empty_cache()
        ids: Tensor = self.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            encoder_hidden_states=context,
            encoder_attention_mask=context_mask,
            max_length=min(max_length, self.config.max_position_embeddings),
            num_beams=num_beams,
            **settings,
        )
        return ids

    def _empty_cache(self) -> EncoderDecoderCache:
        one, other = DynamicCache(config=self.config), DynamicCache(config=self.config)
        return EncoderDecoderCache(one, other)
