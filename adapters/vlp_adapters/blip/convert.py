"""Original BLIP checkpoints to ours and back."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import BlipTextConfig, BlipVisionConfig

from vlp_adapters.blip.configuration import BlipPretrainConfig
from vlp_adapters.blip.modeling import BlipForPretraining
from vlp_adapters.blip.names import from_original_name, to_original_name
from vlp_adapters.checkpoints import check_fit, read_state, write_state
from vlp_adapters.shapes import CheckpointShapes, attention_heads
from vlp_plugins.runtime.errors import UnsupportedError

_POSITIONS = ".embeddings.position_embeddings.weight"  # the original numbers each such table
_BERT_SEP = 102  # id of [SEP] in the vocabulary of BERT, which BLIP extends
_QUEUES = ("image_queue", "text_queue", "queue_ptr")


def state_from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of an original checkpoint; computed buffers are left out."""
    named = ((from_original_name(original), tensor) for original, tensor in state.items())
    return {name: tensor for name, tensor in named if name is not None}


def state_to_original(model: BlipForPretraining) -> dict[str, Tensor]:
    """The state of `model` as the original code saves it, on the CPU.

    Shared tensors are there under every name; includes the `position_ids` that the original has.
    """
    result = {to_original_name(name): value.cpu() for name, value in model.state_dict().items()}
    for name in [name for name in result if name.endswith(_POSITIONS)]:
        ids = torch.arange(len(result[name]), device="cpu").expand(1, -1)
        result[name.replace(_POSITIONS, ".embeddings.position_ids")] = ids
    return result


def load_original(
    path: str | os.PathLike[str], config: BlipPretrainConfig | None = None
) -> BlipForPretraining:
    """Loads an original BLIP pre-training checkpoint, in evaluation mode.

    A checkpoint that was stripped of all momentum twins, or of the queues, is accepted: the twins
    start as copies of their networks, the queues at random.

    Args:
        path: `.pth` with `{"model": state_dict}`, a bare state_dict, or `.safetensors`.
        config: sizes; None to read them from the shapes (see `infer_config`).

    Raises:
        UnsupportedError: if the file cannot be read, or its tensors do not fit the model.
    """
    original = read_state(path)
    model = BlipForPretraining(config or infer_config(original))
    expected = model.state_dict()
    state = state_from_original(original)
    _fill_ties(path, state, model.all_tied_weights_keys)
    if not any("_m." in name for name in state):
        twins = ((name, name.replace("_m.", ".", 1)) for name in expected if "_m." in name)
        state |= {twin: state[online] for twin, online in twins if online in state}
    if not any(name in state for name in _QUEUES):
        state |= {name: expected[name] for name in _QUEUES}
    check_fit(path, state, expected, "BLIP pre-training", to_original_name)
    model.load_state_dict(state)
    return model.eval()


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
    shapes = CheckpointShapes(state, "BLIP")
    words, width = shapes["text_encoder.embeddings.word_embeddings.weight"]
    layer = "text_encoder.encoder.layer.0."
    text = BlipTextConfig(
        vocab_size=words,
        hidden_size=width,
        encoder_hidden_size=shapes[layer + "crossattention.self.key.weight"][1],
        intermediate_size=shapes[layer + "intermediate.dense.weight"][0],
        num_hidden_layers=len(shapes.indices(r"text_encoder\.encoder\.layer\.(\d+)\.")),
        num_attention_heads=text_heads or attention_heads(width, "text"),
        max_position_embeddings=shapes["text_encoder.embeddings.position_embeddings.weight"][0],
        bos_token_id=words - 2,
        sep_token_id=sep_token_id,
    )
    queue = state.get("image_queue")
    options = {} if queue is None else {"queue_size": queue.shape[1]}
    return BlipPretrainConfig(
        vision_config=_vision(shapes, vision_heads),
        text_config=text,
        embed_dim=shapes["text_proj.weight"][0],
        dec_token_id=words - 2,
        enc_token_id=words - 1,
        **options,
    )


def save_original(model: BlipForPretraining, path: str | os.PathLike[str]) -> None:
    """Writes `model` in the original format: `{"model": state_dict}`, or `.safetensors`."""
    write_state(state_to_original(model), path)


def _fill_ties(
    path: str | os.PathLike[str], state: dict[str, Tensor], ties: Mapping[str, str]
) -> None:
    """Adds the missing names of shared tensors in place; two values for one are an error."""
    for copy, source in ties.items():
        first, second = state.get(source), state.get(copy)
        if first is not None and second is not None and not torch.equal(first, second):
            raise UnsupportedError(
                f"{path}: {to_original_name(copy)} differs from {to_original_name(source)}, which "
                "are one parameter in BLIP pre-training; this is a checkpoint of another task, "
                "where the text towers were trained apart"
            )
        shared = first if first is not None else second
        if shared is not None:
            state[copy] = state[source] = shared


def _vision(shapes: CheckpointShapes, heads: int | None) -> BlipVisionConfig:
    width, _, patch_size, _ = shapes["visual_encoder.patch_embed.proj.weight"]
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=shapes["visual_encoder.blocks.0.mlp.fc1.weight"][0],
        num_hidden_layers=len(shapes.indices(r"visual_encoder\.blocks\.(\d+)\.")),
        num_attention_heads=heads or attention_heads(width, "vision"),
        image_size=shapes.grid("visual_encoder.pos_embed", dim=1) * patch_size,
        patch_size=patch_size,
        layer_norm_eps=1e-6,
    )
