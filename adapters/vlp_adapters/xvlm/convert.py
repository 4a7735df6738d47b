"""Original X-VLM checkpoints to ours and back."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, CLIPVisionConfig, PreTrainedModel, SwinConfig, ViTConfig

from vlp_adapters.checkpoints import (
    check_fit,
    fill_ties,
    joined,
    options_of,
    read_state,
    write_state,
)
from vlp_adapters.kinds import Kind
from vlp_adapters.shapes import (
    CheckpointShapes,
    attention_heads,
    caption_prompt,
    shapes_of,
    token_id,
)
from vlp_adapters.xvlm.answering import XvlmForQuestionAnswering
from vlp_adapters.xvlm.captioning import XvlmForCaptioning
from vlp_adapters.xvlm.configuration import XvlmPretrainConfig
from vlp_adapters.xvlm.modeling import XvlmForPretraining, XvlmForRetrieval
from vlp_adapters.xvlm.names import (
    description,
    from_original_name,
    is_original,
    original_kind,
    original_part,
    split_qkv,
    to_original_name,
)
from vlp_adapters.xvlm.nlvr import XvlmForNlvr
from vlp_plugins.runtime.errors import UnsupportedError, first_line

OPTIONS = ("vision_heads", "text_heads", "start_token_id", "end_token_id", "prompt_ids")
"""Keywords of `load_original` that say what shapes do not tell."""

_CLASSES: dict[Kind, Any] = {
    Kind.PRETRAINING: XvlmForPretraining,
    Kind.RETRIEVAL: XvlmForRetrieval,
    Kind.CAPTIONING: XvlmForCaptioning,
    Kind.VQA: XvlmForQuestionAnswering,
    Kind.NLVR: XvlmForNlvr,
}
_LAYERS = {  # kind -> where the original has the layers that the configuration describes
    Kind.PRETRAINING: "text_encoder.bert.",
    Kind.CAPTIONING: "text_decoder.bert.",
}
_BERT_WORDS = 30522


def state_from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of an original checkpoint; computed buffers are left out.

    Raises:
        UnsupportedError: if both names of the bias of a word head are there, with other values.
    """
    result: dict[str, Tensor] = {}
    for original, tensor in split_qkv(state).items():
        name = from_original_name(original)
        if name is None:
            continue
        if name in result and not torch.equal(result[name], tensor):
            raise UnsupportedError(
                f"{original} differs from {to_original_name(name)}, but X-VLM ties them"
            )
        result[name] = tensor
    return result


def state_to_original(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state of one of X-VLM's models as the original code saves it, on the CPU.

    Tied parameters are there under each of their names, and so are the buffers that the original
    computes: positions, and Swin's positions and masks of windows.
    """
    result = joined(model.state_dict(), original_part)
    for name, value in list(result.items()):
        if name.endswith("predictions.decoder.bias"):
            result[name.removesuffix("decoder.bias") + "bias"] = value
        elif name.endswith(("pos_embed.weight", "position_embeddings.weight")):
            result[name.rsplit(".", 2)[0] + ".position_ids"] = torch.arange(
                len(value), device="cpu"
            ).expand(1, -1)
    encoder: Any = model.vision_encoder
    return result | (
        _window_buffers(encoder) if model.config.vision_config.model_type == "swin" else {}
    )


def load_original(
    path: str | os.PathLike[str],
    config: XvlmPretrainConfig | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Loads an original X-VLM checkpoint into the class of its task, in evaluation mode.

    What shapes do not tell may also be in a JSON file next to the checkpoint; see `options_of`.

    Args:
        path: `.pth` or `.th` with `{"model": state_dict}`, a bare state_dict, or `.safetensors`.
        config: of the class; None to read it from the shapes and the options.
        **options: `vision_heads`, `text_heads`, `start_token_id`, `end_token_id`, `prompt_ids`; see
            `infer_config`.

    Returns:
        `XvlmForPretraining`, `XvlmForRetrieval`, `XvlmForCaptioning`, `XvlmForQuestionAnswering`
        or `XvlmForNlvr`.

    Raises:
        UnsupportedError: if the file cannot be read, is of another task, or its tensors do not fit.
    """
    original = read_state(path)
    kind = _kind(original, path)
    model_class = _CLASSES[kind]
    if config is not None and not isinstance(config, model_class.config_class):
        raise UnsupportedError(
            f"{path} is an {description(original.keys())}; its configuration is a "
            f"{model_class.config_class.__name__}, not a {type(config).__name__}"
        )
    said = options_of(path, OPTIONS, options, config)
    with shapes_of(path, "X-VLM"):
        if config is None:
            config = infer_config(original, **said)
        model: PreTrainedModel = model_class(config)
        state = state_from_original(original)
    family = f"X-VLM {_words(kind)}"
    fill_ties(path, state, model.all_tied_weights_keys, family, to_original_name)
    check_fit(path, state, model.state_dict(), family, to_original_name)
    model.load_state_dict(state)
    return model.eval()


def infer_config(
    state: Mapping[str, Tensor],
    *,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    start_token_id: int | None = None,
    end_token_id: int | None = None,
    prompt_ids: Sequence[int] | None = None,
) -> XvlmPretrainConfig:
    """Reads sizes from the tensors of an original checkpoint (original names).

    Shapes do not tell the number of attention heads of BERT, CLIP and DeiT: it is taken as
    width / 64, which holds for the published sizes. Swin's can be read. Activations are the
    published ones (`quick_gelu` in CLIP, `gelu` elsewhere).

    Args:
        state: tensors by original name.
        vision_heads: heads per layer of a CLIP or DeiT encoder; None for width / 64.
        text_heads: heads per layer of the text encoder and decoder; None for width / 64.
        start_token_id: first token of captions and answers, [CLS]; None for that of
            bert-base-uncased.
        end_token_id: their last one, [SEP]; None for that of bert-base-uncased.
        prompt_ids: what stands between [CLS] and every caption; None for `a picture of` in
            bert-base-uncased.

    Returns:
        The configuration of the class that the checkpoint is of.

    Raises:
        UnsupportedError: if it is no X-VLM checkpoint, of another task, or does not tell what is
            None here.
    """
    kind = _kind(state, "the checkpoint")
    bert = _LAYERS.get(kind, "text_encoder.")
    shapes = CheckpointShapes(state, "X-VLM")
    words, width = shapes[bert + "embeddings.word_embeddings.weight"]
    layers = shapes.indices(re.escape(bert) + r"encoder\.layer\.(\d+)\.attention\.")
    fusion = shapes.indices(re.escape(bert) + r"encoder\.layer\.(\d+)\.crossattention\.")
    if not fusion or len(layers) == len(fusion):
        raise UnsupportedError(
            f"the checkpoint has {len(layers)} text layers, {len(fusion)} of them with "
            f"cross-attention; an X-VLM {_words(kind)} checkpoint has both kinds"
        )
    count = len(layers) - (len(fusion) // 2 if kind is Kind.NLVR else 0)
    text = BertConfig(
        vocab_size=words,
        hidden_size=width,
        num_hidden_layers=count,
        num_attention_heads=attention_heads(width, "text", text_heads),
        intermediate_size=shapes[bert + "encoder.layer.0.intermediate.dense.weight"][0],
        max_position_embeddings=shapes[bert + "embeddings.position_embeddings.weight"][0],
        type_vocab_size=shapes[bert + "embeddings.token_type_embeddings.weight"][0],
        fusion_layer=min(fusion),
    )
    options: dict[str, Any] = {"vision_config": _vision(shapes, vision_heads), "text_config": text}
    if "text_proj.weight" in state:
        options["embed_dim"] = shapes["text_proj.weight"][0]
    if kind in (Kind.CAPTIONING, Kind.VQA):
        options |= _tokens(kind, words, start_token_id, end_token_id, prompt_ids)
    try:
        config: XvlmPretrainConfig = _CLASSES[kind].config_class(**options)
    except ValueError as error:
        raise UnsupportedError(first_line(error)) from error
    return config


def save_original(model: PreTrainedModel, path: str | os.PathLike[str]) -> None:
    """Writes a model in the original format: `{"model": state_dict}`, or `.safetensors`."""
    write_state(state_to_original(model), path)


def _kind(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> Kind:
    """The kind of a checkpoint."""
    if kind := original_kind(state.keys()):
        return kind
    if is_original(state.keys()):
        raise UnsupportedError(
            f"{path} is an {description(state.keys())}; there is no class for it here: prune the "
            "pre-training checkpoint that it was made from, and fine-tune that"
        )
    raise UnsupportedError(
        f"{path} is no X-VLM pre-training checkpoint, nor one of retrieval, captioning, VQA or "
        "NLVR2"
    )


def _words(kind: Kind) -> str:
    return "pre-training" if kind is Kind.PRETRAINING else str(kind)


def _tokens(
    kind: Kind,
    words: int,
    start: int | None,
    end: int | None,
    prompt: Sequence[int] | None,
) -> dict[str, Any]:
    """How the texts of a decoder begin and end."""
    known = words == _BERT_WORDS
    if not known and (start is None or end is None):
        raise UnsupportedError(
            f"the vocabulary has {words} words and is not bert-base-uncased's, so its [CLS] and "
            "[SEP] are unknown; pass start_token_id and end_token_id, or put a file with the "
            'checkpoint\'s name and the ending .json next to it: {"start_token_id": ..., '
            '"end_token_id": ...}'
        )
    ends = {"start_token_id": start, "end_token_id": end}
    tokens: dict[str, Any] = {
        name: token_id(name, token, words) for name, token in ends.items() if token is not None
    }
    if kind is Kind.CAPTIONING:
        tokens["prompt_ids"] = caption_prompt(prompt, words, is_bert=known)
    return tokens


def _vision(shapes: CheckpointShapes, heads: int | None) -> Any:
    if "vision_encoder.patch_embed.weight" in shapes.state:
        return _clip(shapes, heads)
    if "vision_encoder.cls_token" in shapes.state:
        return _deit(shapes, heads)
    return _swin(shapes)


def _clip(shapes: CheckpointShapes, heads: int | None) -> CLIPVisionConfig:
    width, channels, patch_size, _ = shapes["vision_encoder.patch_embed.weight"]
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shapes["vision_encoder.encoder.layers.0.mlp.fc1.bias"][0],
        num_hidden_layers=len(shapes.indices(r"vision_encoder\.encoder\.layers\.(\d+)\.")),
        num_attention_heads=attention_heads(width, "vision", heads),
        num_channels=channels,
        image_size=shapes.grid("vision_encoder.pos_embed.weight") * patch_size,
        patch_size=patch_size,
    )


def _deit(shapes: CheckpointShapes, heads: int | None) -> ViTConfig:
    return ViTConfig(
        **shapes.vision_transformer("vision_encoder.", heads),
        num_channels=shapes["vision_encoder.patch_embed.proj.weight"][1],
        layer_norm_eps=1e-6,
    )


def _swin(shapes: CheckpointShapes) -> SwinConfig:
    width, channels, patch_size, _ = shapes["vision_encoder.patch_embed.proj.weight"]
    stages = shapes.indices(r"vision_encoder\.layers\.(\d+)\.")
    blocks = [shapes.indices(rf"vision_encoder\.layers\.{n}\.blocks\.(\d+)\.") for n in stages]
    tables = [
        shapes[f"vision_encoder.layers.{n}.blocks.0.attn.relative_position_bias_table"]
        for n in stages
    ]
    window = (math.isqrt(tables[0][0]) + 1) // 2  # the table has (2 window - 1)^2 rows
    # Masks of shifted windows say how many there are; published sizes leave one in the last stage.
    mask = shapes.state.get("vision_encoder.layers.0.blocks.1.attn_mask")
    windows = 2 ** (len(stages) - 1) if mask is None else math.isqrt(len(mask))
    hidden, inputs = shapes["vision_encoder.layers.0.blocks.0.mlp.fc1.weight"]
    return SwinConfig(
        image_size=patch_size * windows * window,
        patch_size=patch_size,
        num_channels=channels,
        embed_dim=width,
        depths=[len(indices) for indices in blocks],
        num_heads=[heads for _, heads in tables],
        window_size=window,
        mlp_ratio=hidden / inputs,
    )


def _window_buffers(encoder: Any) -> dict[str, Tensor]:
    """What the original's Swin keeps of its windows: positions, and masks of shifted ones."""
    buffers: dict[str, Tensor] = {}
    window = encoder.config.window_size
    for stage, layer in enumerate(encoder.encoder.layers):
        for index, block in enumerate(layer.blocks):
            name = f"vision_encoder.layers.{stage}.blocks.{index}"
            positions = block.attention.relative_position_bias.relative_position_index
            buffers[f"{name}.attn.relative_position_index"] = positions.cpu().view(window**2, -1)
            if index % 2 and min(block.input_resolution) > window:
                buffers[f"{name}.attn_mask"] = block.get_attn_mask(
                    *block.input_resolution, dtype=torch.float32, device=torch.device("cpu")
                )
    return buffers
