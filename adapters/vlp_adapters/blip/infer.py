"""The configuration that an original checkpoint was made with, read from its shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor
from transformers import BlipTextConfig, BlipVisionConfig

from vlp_adapters.blip.configuration import BlipPretrainConfig
from vlp_plugins.errors import UnsupportedError

_HEAD_WIDTH = 64  # of ViT and BERT in every published BLIP
_BERT_SEP = 102  # id of [SEP] in the vocabulary of BERT, which BLIP extends


def infer_config(
    state: Mapping[str, Tensor],
    *,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    sep_token_id: int = _BERT_SEP,
) -> BlipPretrainConfig:
    """Reads sizes from the tensors of an original checkpoint (original names).

    Shapes do not tell the number of attention heads: it is taken as width / 64, which holds for
    the published sizes. The last two words of the vocabulary are `[DEC]` and `[ENC]`, as the
    original appends them to BERT's.

    Args:
        state: tensors by original name.
        vision_heads: heads per layer of the vision encoder; None for width / 64.
        text_heads: heads per layer of the text towers; None for width / 64.
        sep_token_id: the word that ends a caption; shapes do not tell it either.

    Raises:
        UnsupportedError: if it is no BLIP pre-training checkpoint, or the number of heads is
            needed.
    """
    words, width = _get(state, "text_encoder.embeddings.word_embeddings.weight").shape
    layer = "text_encoder.encoder.layer.0."
    text = BlipTextConfig(
        vocab_size=words,
        hidden_size=width,
        encoder_hidden_size=_get(state, layer + "crossattention.self.key.weight").shape[1],
        intermediate_size=len(_get(state, layer + "intermediate.dense.weight")),
        num_hidden_layers=_layers(state, r"text_encoder\.encoder\.layer\.(\d+)\."),
        num_attention_heads=text_heads or _heads(width, "text"),
        max_position_embeddings=len(
            _get(state, "text_encoder.embeddings.position_embeddings.weight")
        ),
        bos_token_id=words - 2,
        sep_token_id=sep_token_id,
    )
    queue = state.get("image_queue")
    options = {} if queue is None else {"queue_size": queue.shape[1]}
    return BlipPretrainConfig(
        vision_config=_vision(state, vision_heads),
        text_config=text,
        embed_dim=len(_get(state, "text_proj.weight")),
        dec_token_id=words - 2,
        enc_token_id=words - 1,
        **options,
    )


def _vision(state: Mapping[str, Tensor], heads: int | None) -> BlipVisionConfig:
    patch = _get(state, "visual_encoder.patch_embed.proj.weight")
    width, patch_size = patch.shape[0], patch.shape[-1]
    grid = math.isqrt(_get(state, "visual_encoder.pos_embed").shape[1] - 1)
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(_get(state, "visual_encoder.blocks.0.mlp.fc1.weight")),
        num_hidden_layers=_layers(state, r"visual_encoder\.blocks\.(\d+)\."),
        num_attention_heads=heads or _heads(width, "vision"),
        image_size=grid * patch_size,
        patch_size=patch_size,
        layer_norm_eps=1e-6,
    )


def _layers(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many different indices `pattern` captures at the start of names."""
    found = (re.match(pattern, name) for name in state)
    return len({match[1] for match in found if match})


def _heads(width: int, tower: str) -> int:
    if width % _HEAD_WIDTH:
        raise UnsupportedError(
            f"the {tower} encoder is {width} wide, so its number of attention heads cannot be "
            f"guessed (published models have {_HEAD_WIDTH} dimensions per head); pass a "
            "configuration"
        )
    return width // _HEAD_WIDTH


def _get(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise UnsupportedError(
            f"the checkpoint has no {name}: it is not a BLIP pre-training checkpoint"
        )
    return state[name]
