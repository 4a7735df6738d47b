"""Families of models in transformers: a tiny model of each, batches for it, and tokens by hand.

In texts `t` is a word, `#` one of the placeholders that an image takes, and `%` of a video.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

PAD, IMAGE, VIDEO, WORDS = 0, 90, 91, range(10, 60)
Tokens = Mapping[str, int]
"""By kind how many tokens of a batch."""


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        model: makes a tiny model.
        batch: makes a batch, padded on that side.
        tokens: by path of a layer the tokens that enter it in the batch, by kind, counted by hand.
        kind: of family: the short run of the tests takes the first of each.
        gradients: whether the model has a loss.
        left: whether its texts may be padded on the left.
        constant: the layers whose outputs are the same for every sample, which most of them are
            because they read learned queries alone.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[str], dict[str, Tensor]]
    tokens: Mapping[str, Tokens]
    kind: str
    gradients: bool = True
    left: bool = True
    constant: tuple[str, ...] = ()


def written(rows: Sequence[str], side: str, image: int = IMAGE) -> dict[str, Tensor]:
    """Ids and mask of texts, padded on a side; words differ, so that padding shows."""
    marks = {"#": image, "%": VIDEO}
    longest = max(map(len, rows))
    ids, mask = [], []
    for index, row in enumerate(rows):
        words = [
            marks.get(mark, WORDS[(7 * index + 3 * place) % len(WORDS)])
            for place, mark in enumerate(row)
        ]
        padding = [PAD] * (longest - len(row))
        real = [1] * len(row)
        ids.append(padding + words if side == "left" else words + padding)
        mask.append(padding + real if side == "left" else real + padding)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def counted(rows: Sequence[str]) -> Tokens:
    """The tokens of texts."""
    found = {"TEXT": "t", "IMAGE": "#", "VIDEO": "%"}
    return {kind: n for kind, mark in found.items() if (n := "".join(rows).count(mark))}


def pixels(count: int, size: int = 16) -> Tensor:
    """Images `[count, 3, size, size]`."""
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, size, size, generator=generator)


SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA: dict[str, Any] = {
    **SIZES,
    "model_type": "llama",
    "intermediate_size": 32,
    "num_key_value_heads": 1,
    "vocab_size": 100,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN2 = LLAMA | {"model_type": "qwen2"}
VIT: dict[str, Any] = {**SIZES, "intermediate_size": 32, "image_size": 16, "patch_size": 8}
CLIP_VISION = VIT | {"model_type": "clip_vision_model", "num_hidden_layers": 3}
SIGLIP_VISION = VIT | {"model_type": "siglip_vision_model"}
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}


def made(model: str, **configuration: Any) -> Callable[[], nn.Module]:
    """What makes a model of a class from its configuration."""

    def make() -> nn.Module:
        kind = getattr(transformers, model)
        built: nn.Module = kind(kind.config_class(**configuration))
        return built

    return make


def chat(
    rows: Sequence[str], images: Callable[[], dict[str, Tensor]], image: int = IMAGE
) -> Callable[[str], dict[str, Tensor]]:
    """What makes conversations with images."""
    return lambda side: written(rows, side, image) | images()


TWO_ONE_NONE = ("tt####t####tt", "t####tt", "ttt")
"""A sample of two images of 4 tokens, one of one, one without."""


def patches(*grids: tuple[int, int], width: int, merge: int = 2) -> dict[str, Tensor]:
    """Packed patches `[patches, width]` of images of these heights and widths in patches."""
    count = sum(height * width_ for height, width_ in grids)
    generator = torch.Generator().manual_seed(count)
    return {
        "pixel_values": torch.randn(count, width, generator=generator),
        "image_grid_thw": torch.tensor([[1, *grid] for grid in grids]),
    }


QWEN_ROWS = ("tt####t##tt", "t####tt", "ttt")
"""Images of 4x4, 2x4 and 4x4 patches, four of which make a token."""


def qwen(rows: Sequence[str], images: Callable[[], dict[str, Tensor]]) -> Any:
    def make(side: str) -> dict[str, Tensor]:
        texts = written(rows, side)
        ids = texts["input_ids"]
        types = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        return texts | images() | {"mm_token_type_ids": types}

    return make


def qwen_images() -> dict[str, Tensor]:
    return patches((4, 4), (2, 4), (4, 4), width=3 * 2 * 8 * 8)


QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2}
QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92}
MROPE = {"rope_parameters": ROPE}


def batched(count: int = 3, size: int = 16) -> Callable[[], dict[str, Tensor]]:
    """What makes images `[count, 3, size, size]`."""
    return lambda: {"pixel_values": pixels(count, size)}


def per_sample() -> dict[str, Tensor]:
    """Images `[3, 2, 3, 16, 16]`, where a sample has fewer than two: zeros; one is half empty."""
    images, mask = torch.zeros(3, 2, 3, 16, 16), torch.zeros(3, 2, 16, 16, dtype=torch.long)
    images[0], images[1, 0] = pixels(2), pixels(1)[0]
    mask[0, 0], mask[0, 1, :8], mask[1, 0] = 1, 1, 1
    return {"pixel_values": images, "pixel_attention_mask": mask}


def tiled() -> dict[str, Tensor]:
    """Two images, `[2, 3, 3, 16, 16]`: each whole, and in tiles, one of the first, two."""
    images = pixels(6).reshape(2, 3, 3, 16, 16)
    images[0, 2] = 0
    return {"pixel_values": images, "image_sizes": torch.tensor([[16, 16], [32, 16]])}


TILED = ("tt" + 10 * "#" + "t", "t" + 16 * "#" + "ttt", "tt")
"""A tile is 2 x 2 tokens, and each row of an image ends in one: 4 + 2 x 3 and 4 + 4 x 3."""


CROPPED = ("tt" + 13 * "#" + "t", "t" + 17 * "#" + "ttt", "ttt")
"""A crop is 2 x 2 tokens, and each row ends in one more: 6 + 1 + 6 and 10 + 1 + 6."""


def cropped() -> dict[str, Tensor]:
    """Two images, `[2, 3, 3, 16, 16]`: each whole, and in crops, one of the first, two."""
    images, mask = pixels(6).reshape(2, 3, 3, 16, 16), torch.ones(2, 3, 4, 4)
    images[0, 2], mask[0, 2] = 0, 0
    return {
        "image_pixel_values": images,
        "image_sizes": torch.tensor([[16, 16], [16, 32]]),
        "image_attention_mask": mask,
    }


def labelled(count: int = 2, size: int = 16, labels: Any = (0, 1)) -> Any:
    """Images with a class."""
    return lambda _: {"pixel_values": pixels(count, size), "labels": torch.tensor(labels)}


def pairs(rows: Sequence[str], size: int = 16, **more: Any) -> Callable[[str], dict[str, Tensor]]:
    """As many images as texts."""
    return lambda side: written(rows, side) | batched(len(rows), size)() | more


PAIR = ("tttttt", "ttt")
TOWERS: dict[str, Any] = {
    "text_config": SIZES
    | {
        "intermediate_size": 32,
        "vocab_size": 100,
        "max_position_embeddings": 32,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 59,
    },
    "vision_config": VIT,
    "projection_dim": 8,
}
REGIONS = {"IMAGE": 85 + 43}
"""Of 8 x 8, 4 x 4, 2 x 2 and 1 x 1 in the first image, and of its left half in the second."""


DETECTOR_QUERIES = (
    *(f"decoder.layers.0.self_attn.{name}" for name in ("query", "key", "value", "out_proj")),
    "decoder.layers.0.encoder_attn_text.query",
    # These start as zeros.
    *(
        f"{layer}.{name}"
        for index in range(2)
        for layer in (
            f"encoder.layers.{index}.deformable_layer.self_attn",
            f"decoder.layers.{index}.encoder_attn",
        )
        for name in ("sampling_offsets", "attention_weights")
    ),
    "encoder_output_bbox_embed.layers.2",
)


def half_empty(size: int) -> Tensor:
    """Where two images `[2, size, size]` are real: the second in its left half."""
    mask = torch.ones(2, size, size, dtype=torch.long)
    mask[1, :, size // 2 :] = 0
    return mask


IDEFICS_VISION = VIT | {"patch_size": 4}
DECODED = torch.tensor([[11, 12, 13, 2], [14, 15, 2, -100]])
"""What an encoder-decoder shall write: 4 and 3 tokens."""


def two_towers(model: str, text: str, image: str, **more: Any) -> Family:
    """A model whose towers meet in a contrastive loss."""
    return Family(
        made(model, **(TOWERS | more)),
        pairs(PAIR),
        {text: {"TEXT": 9}, image: {"IMAGE": 10}},
        "two towers",
        left=False,
    )


FAMILIES = {
    "llava": Family(
        made(
            "LlavaForConditionalGeneration",
            vision_config=CLIP_VISION,
            text_config=LLAMA,
            image_token_index=IMAGE,
        ),
        chat(TWO_ONE_NONE, lambda: {"pixel_values": pixels(3)}),
        {
            "model.language_model.layers.0.self_attn.q_proj": counted(TWO_ONE_NONE),
            "model.language_model.layers.1.mlp.down_proj": counted(TWO_ONE_NONE),
            "model.vision_tower.encoder.layers.0.self_attn.q_proj": {"IMAGE": 15},
            "model.multi_modal_projector.linear_1": {"IMAGE": 12},
        },
        "chat",
    ),
    "qwen2_5_vl": Family(
        made(
            "Qwen2_5_VLForConditionalGeneration",
            vision_config=QWEN_VISION
            | {
                "hidden_size": 16,
                "intermediate_size": 32,
                "out_hidden_size": 16,
                "fullatt_block_indexes": [1],
                "window_size": 32,
            },
            text_config=QWEN2 | {"model_type": "qwen2_5_vl_text"} | MROPE,
            **QWEN_IDS,
        ),
        qwen(QWEN_ROWS, qwen_images),
        {
            "model.language_model.layers.0.self_attn.q_proj": counted(QWEN_ROWS),
            "model.visual.blocks.0.attn.qkv": {"IMAGE": 40},
            "model.visual.merger.mlp.0": {"IMAGE": 10},
        },
        "packed patches",
    ),
    "qwen2_vl": Family(
        made(
            "Qwen2VLForConditionalGeneration",
            vision_config=QWEN_VISION | {"embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2},
            text_config=QWEN2 | {"model_type": "qwen2_vl_text"} | MROPE,
            **QWEN_IDS,
        ),
        qwen(QWEN_ROWS, qwen_images),
        {
            "model.language_model.layers.0.self_attn.q_proj": counted(QWEN_ROWS),
            "model.visual.blocks.0.attn.qkv": {"IMAGE": 40},
        },
        "packed patches",
    ),
    "qwen3_vl": Family(
        made(
            "Qwen3VLForConditionalGeneration",
            vision_config=QWEN_VISION
            | {
                "hidden_size": 16,
                "intermediate_size": 32,
                "out_hidden_size": 16,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
            text_config=QWEN2 | {"model_type": "qwen3_vl_text", "head_dim": 8} | MROPE,
            **QWEN_IDS,
        ),
        qwen(QWEN_ROWS, qwen_images),
        {
            "model.language_model.layers.0.self_attn.q_proj": counted(QWEN_ROWS),
            "model.visual.blocks.0.attn.qkv": {"IMAGE": 40},
        },
        "packed patches",
    ),
    "smolvlm": Family(
        made(
            "SmolVLMForConditionalGeneration",
            vision_config=IDEFICS_VISION,
            text_config=LLAMA,
            image_token_id=IMAGE,
            scale_factor=2,
        ),
        chat(TWO_ONE_NONE, per_sample),
        {
            "model.text_model.layers.0.self_attn.q_proj": counted(TWO_ONE_NONE),
            "model.vision_model.encoder.layers.0.self_attn.q_proj": {"IMAGE": 40},
            "model.connector.modality_projection.proj": {"IMAGE": 12},
        },
        "masked images",
    ),
    "idefics3": Family(
        made(
            "Idefics3ForConditionalGeneration",
            vision_config=IDEFICS_VISION,
            text_config=LLAMA,
            image_token_id=IMAGE,
            scale_factor=2,
        ),
        chat(TWO_ONE_NONE, per_sample),
        {
            "model.text_model.layers.0.self_attn.q_proj": counted(TWO_ONE_NONE),
            "model.vision_model.encoder.layers.0.self_attn.q_proj": {"IMAGE": 40},
        },
        "masked images",
    ),
    "idefics2": Family(
        made(
            "Idefics2ForConditionalGeneration",
            vision_config=IDEFICS_VISION,
            perceiver_config={
                "hidden_size": 16,
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 8,
                "num_key_value_heads": 1,
            },
            text_config=LLAMA | {"model_type": "mistral"},
            image_token_id=IMAGE,
        ),
        chat(TWO_ONE_NONE, per_sample),
        {
            "model.text_model.layers.0.self_attn.q_proj": counted(TWO_ONE_NONE),
            "model.vision_model.encoder.layers.0.self_attn.q_proj": {"IMAGE": 40},
            "model.connector.modality_projection.gate_proj": {"IMAGE": 40},
            "model.connector.perceiver_resampler.layers.0.self_attn.k_proj": {"IMAGE": 52},
        },
        "masked images",
        constant=("connector.perceiver_resampler.layers.0.self_attn.q_proj",),
    ),
    "internvl": Family(
        made(
            "InternVLForConditionalGeneration",
            vision_config=VIT | {"image_size": [16, 16], "patch_size": [4, 4]},
            text_config=QWEN2,
            image_token_id=IMAGE,
        ),
        chat(TWO_ONE_NONE, batched()),
        {
            "model.language_model.layers.0.self_attn.q_proj": counted(TWO_ONE_NONE),
            "model.vision_tower.encoder.layer.0.attention.q_proj": {"IMAGE": 51},
            "model.multi_modal_projector.linear_1": {"IMAGE": 12},
        },
        "chat",
    ),
    "gemma3": Family(
        made(
            "Gemma3ForConditionalGeneration",
            vision_config=SIGLIP_VISION | {"patch_size": 4},
            text_config=LLAMA | {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 8},
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
            boi_token_index=92,
            eoi_token_index=93,
        ),
        chat(TWO_ONE_NONE, batched()),
        {
            "model.language_model.layers.0.self_attn.q_proj": counted(TWO_ONE_NONE),
            "model.vision_tower.encoder.layers.0.self_attn.q_proj": {"IMAGE": 48},
        },
        "chat",
    ),
    "paligemma": Family(
        made(
            "PaliGemmaForConditionalGeneration",
            vision_config=SIGLIP_VISION,
            text_config=LLAMA | {"model_type": "gemma", "head_dim": 8},
            image_token_index=IMAGE,
            projection_dim=16,
            hidden_size=16,
        ),
        chat(TWO_ONE_NONE, batched()),
        {
            "model.language_model.layers.0.self_attn.q_proj": counted(TWO_ONE_NONE),
            "model.multi_modal_projector.linear": {"IMAGE": 12},
        },
        "chat",
    ),
    "llava_onevision": Family(
        made(
            "LlavaOnevisionForConditionalGeneration",
            vision_config=SIGLIP_VISION,
            text_config=QWEN2,
            image_token_index=IMAGE,
            video_token_index=91,
            image_grid_pinpoints=[[16, 16], [32, 16]],
        ),
        chat(TILED, tiled),
        {
            "model.language_model.layers.0.self_attn.q_proj": counted(TILED),
            "model.vision_tower.encoder.layers.0.self_attn.q_proj": {"IMAGE": 20},
        },
        "chat",
    ),
    "perception_lm": Family(
        made(
            "PerceptionLMForConditionalGeneration",
            # Its own tower is one of timm.
            vision_config=SIGLIP_VISION | {"model_args": {"embed_dim": 16}},
            text_config=LLAMA,
            vision_use_cls_token=False,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        ),
        chat(TWO_ONE_NONE, lambda: {"pixel_values": pixels(3).unsqueeze(1)}),
        {
            "model.language_model.layers.0.self_attn.q_proj": counted(TWO_ONE_NONE),
            "model.vision_tower.encoder.layers.0.self_attn.q_proj": {"IMAGE": 12},
            "model.multi_modal_projector.linear_1": {"IMAGE": 12},
        },
        "chat",
    ),
    "llava_next": Family(
        made(
            "LlavaNextForConditionalGeneration",
            vision_config=CLIP_VISION,
            text_config=LLAMA,
            image_token_index=IMAGE,
            image_grid_pinpoints=[[16, 16], [32, 16]],
        ),
        chat(TILED, tiled),
        {
            "model.language_model.layers.0.self_attn.q_proj": counted(TILED),
            "model.vision_tower.encoder.layers.0.self_attn.q_proj": {"IMAGE": 25},
        },
        "chat",
    ),
    "aya_vision": Family(
        made(
            "AyaVisionForConditionalGeneration",
            vision_config=SIGLIP_VISION | {"patch_size": 4},
            text_config=LLAMA | {"model_type": "cohere2"},
            image_token_index=IMAGE,
        ),
        chat(TWO_ONE_NONE, batched()),
        {
            "model.language_model.layers.0.self_attn.q_proj": counted(TWO_ONE_NONE),
            "model.vision_tower.encoder.layers.0.self_attn.q_proj": {"IMAGE": 48},
        },
        "chat",
    ),
    "mistral3": Family(
        made(
            "Mistral3ForConditionalGeneration",
            vision_config=VIT | {"model_type": "pixtral", "patch_size": 4, "head_dim": 8},
            text_config=LLAMA | {"model_type": "mistral"},
            image_token_index=IMAGE,
        ),
        chat(
            ("tt####t##t", "t####tt", "ttt"),
            lambda: {
                "pixel_values": pixels(3),
                "image_sizes": torch.tensor([[16, 16], [16, 8], [16, 16]]),
            },
        ),
        {
            "model.language_model.layers.0.self_attn.q_proj": {"TEXT": 10, "IMAGE": 10},
            "model.vision_tower.transformer.layers.0.attention.q_proj": {"IMAGE": 40},
            "model.multi_modal_projector.linear_1": {"IMAGE": 10},
        },
        "packed patches",
    ),
    "blip2": Family(
        made(
            "Blip2ForConditionalGeneration",
            vision_config=VIT,
            qformer_config=SIZES
            | {"intermediate_size": 32, "vocab_size": 100, "encoder_hidden_size": 16},
            text_config=LLAMA | {"model_type": "opt", "ffn_dim": 32, "word_embed_proj_dim": 16},
            num_query_tokens=4,
            image_token_index=IMAGE,
        ),
        chat(("####ttt", "####tt"), batched(2)),
        {
            "language_model.model.decoder.layers.0.fc1": {"TEXT": 5, "IMAGE": 8},
            "language_model.model.decoder.layers.0.self_attn.q_proj": {"TEXT": 5, "IMAGE": 8},
            "qformer.encoder.layer.0.attention.attention.query": {"QUERY": 8},
            "qformer.encoder.layer.0.attention.output.dense": {"QUERY": 8},
            "qformer.encoder.layer.0.crossattention.attention.query": {"QUERY": 8},
            "qformer.encoder.layer.0.crossattention.attention.key": {"IMAGE": 10},
            "qformer.encoder.layer.0.crossattention.attention.value": {"IMAGE": 10},
            "qformer.encoder.layer.0.intermediate_query.dense": {"QUERY": 8},
            "qformer.encoder.layer.1.output_query.dense": {"QUERY": 8},
            "language_projection": {"IMAGE": 8},
            "vision_model.encoder.layers.0.self_attn.qkv": {"IMAGE": 10},
        },
        "queries",
        constant=(
            "qformer.encoder.layer.0.attention.attention.query",
            "qformer.encoder.layer.0.attention.attention.key",
            "qformer.encoder.layer.0.attention.attention.value",
            "qformer.encoder.layer.0.attention.output.dense",
            "qformer.encoder.layer.0.crossattention.attention.query",
        ),
    ),
    "blip2_itr": Family(
        made(
            "Blip2ForImageTextRetrieval",
            vision_config=VIT,
            qformer_config=SIZES
            | {
                "intermediate_size": 32,
                "vocab_size": 100,
                "encoder_hidden_size": 16,
                "use_qformer_text_input": True,
            },
            text_config=LLAMA | {"model_type": "opt", "ffn_dim": 32, "word_embed_proj_dim": 16},
            num_query_tokens=4,
            image_text_hidden_size=8,
        ),
        pairs(("ttt", "tt", "tttt")),  # as long as there are queries
        {
            "qformer.encoder.layer.0.attention.attention.query": {"QUERY": 12, "TEXT": 9},
            "qformer.encoder.layer.0.intermediate_query.dense": {"QUERY": 12},
            "qformer.encoder.layer.0.intermediate.dense": {"TEXT": 9},
            "qformer.encoder.layer.0.crossattention.attention.key": {"IMAGE": 15},
        },
        "queries",
        gradients=False,
        constant=("qformer.encoder.layer.0.crossattention.attention.query",),
    ),
    "instructblip": Family(
        made(
            "InstructBlipForConditionalGeneration",
            vision_config=VIT,
            qformer_config=SIZES
            | {"intermediate_size": 32, "vocab_size": 100, "encoder_hidden_size": 16},
            text_config=LLAMA | {"model_type": "opt", "ffn_dim": 32, "word_embed_proj_dim": 16},
            num_query_tokens=4,
            image_token_index=IMAGE,
        ),
        lambda side: (
            written(("####ttt", "####tt"), side)
            | batched(2)()
            | {f"qformer_{k}": v for k, v in written(("tttt", "ttt"), "right").items()}
        ),
        {
            "language_model.model.decoder.layers.0.fc1": {"TEXT": 5, "IMAGE": 8},
            "qformer.encoder.layer.0.attention.attention.query": {"QUERY": 8, "TEXT": 7},
            "qformer.encoder.layer.0.attention.attention.key": {"QUERY": 8, "TEXT": 7},
            "qformer.encoder.layer.0.attention.output.dense": {"QUERY": 8, "TEXT": 7},
            "qformer.encoder.layer.0.crossattention.attention.query": {"QUERY": 8},
            "qformer.encoder.layer.0.crossattention.attention.key": {"IMAGE": 10},
            "qformer.encoder.layer.0.crossattention.attention.value": {"IMAGE": 10},
            "language_projection": {"IMAGE": 8},
            "qformer.encoder.layer.0.intermediate_query.dense": {"QUERY": 8},
            "qformer.encoder.layer.0.intermediate.dense": {"TEXT": 7},
            "qformer.encoder.layer.0.output.dense": {"TEXT": 7},
            "qformer.encoder.layer.0.output_query.dense": {"QUERY": 8},
        },
        "queries",
    ),
    "mllama": Family(
        made(
            "MllamaForConditionalGeneration",
            vision_config={
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "intermediate_size": 32,
                "vision_output_dim": 32,
                "image_size": 16,
                "patch_size": 8,
                "max_num_tiles": 2,
                "intermediate_layers_indices": [0],
                "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            },
            text_config=LLAMA
            | {
                "model_type": "mllama_text_model",
                "num_hidden_layers": 3,
                "cross_attention_layers": [1],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            image_token_index=IMAGE,
        ),
        lambda side: (
            (texts := written(("t#tttt", "#tt"), side))
            | {
                "pixel_values": pixels(4).reshape(2, 1, 2, 3, 16, 16),
                "aspect_ratio_ids": torch.tensor([[2], [1]]),
                "aspect_ratio_mask": torch.tensor([[[1, 1]], [[1, 0]]]),
                "cross_attention_mask": texts["attention_mask"][:, :, None, None]
                * torch.tensor([[[[1, 1]]], [[[1, 0]]]])
                * (texts["input_ids"] == IMAGE).cumsum(1)[:, :, None, None],
            }
        ),
        {
            "model.language_model.layers.0.self_attn.q_proj": {"TEXT": 9},
            "model.language_model.layers.1.cross_attn.q_proj": {"TEXT": 9},
            "model.language_model.layers.1.cross_attn.k_proj": {"IMAGE": 15},
        },
        "cross-attention",
    ),
    "florence2": Family(
        made(
            "Florence2ForConditionalGeneration",
            vision_config={
                "depths": [1, 1, 1, 1],
                "embed_dim": [8, 8, 8, 16],
                "num_heads": [1, 1, 1, 2],
                "num_groups": [1, 1, 1, 2],
                "window_size": 2,
                "projection_dim": 16,
                "mlp_ratio": 2.0,
            },
            text_config={
                "model_type": "bart",
                "d_model": 16,
                "encoder_layers": 1,
                "decoder_layers": 1,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "decoder_ffn_dim": 32,
                "vocab_size": 100,
                "pad_token_id": PAD,
                "max_position_embeddings": 64,
            },
            image_token_id=IMAGE,
        ),
        lambda side: (
            written(("#####ttt", "#####t"), side)
            | {"pixel_values": pixels(2, 64), "labels": DECODED}
        ),
        {
            "model.language_model.encoder.layers.0.self_attn.q_proj": {"TEXT": 4, "IMAGE": 10},
            "model.language_model.decoder.layers.0.self_attn.q_proj": {"TEXT": 7},
            "model.language_model.decoder.layers.0.encoder_attn.k_proj": {"TEXT": 4, "IMAGE": 10},
        },
        "encoder-decoder",
    ),
    "git": Family(
        made(
            "GitForCausalLM",
            vision_config=VIT,
            **SIZES,
            intermediate_size=32,
            vocab_size=100,
            max_position_embeddings=32,
        ),
        pairs(PAIR),
        {
            "git.encoder.layer.0.attention.self.query": {"TEXT": 9, "IMAGE": 10},
            "git.image_encoder.vision_model.encoder.layers.0.self_attn.q_proj": {"IMAGE": 10},
            "git.visual_projection.visual_projection.0": {"IMAGE": 10},
        },
        "joint sequence",
    ),
    "vilt": Family(
        made("ViltForQuestionAnswering", **VIT, vocab_size=100, num_labels=3),
        pairs(PAIR, labels=torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])),
        {"vilt.encoder.layer.0.attention.attention.query": {"TEXT": 9, "IMAGE": 10}},
        "joint sequence",
    ),
    "bridgetower": Family(
        made(
            "BridgeTowerForContrastiveLearning",
            hidden_size=64,
            num_attention_heads=2,
            num_hidden_layers=2,
            contrastive_hidden_size=8,
            logit_scale_init_value=2.6,
            vision_config={
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "image_size": 16,
                "patch_size": 8,
            },
            text_config=TOWERS["text_config"] | {"hidden_size": 64},
        ),
        pairs(("ttttt", "ttt")),
        {
            "bridgetower.text_model.encoder.layer.0.attention.self.query": {"TEXT": 8},
            "bridgetower.vision_model.visual.transformer.resblocks.0.mlp.c_fc": {"IMAGE": 10},
            # Once per layer of the two, and once more by the head.
            "bridgetower.cross_modal_image_transform": {"IMAGE": 30},
            "bridgetower.cross_modal_image_layers.0.crossattention.self.key": {"TEXT": 8},
            "bridgetower.cross_modal_image_layers.0.crossattention.self.value": {"TEXT": 8},
            "bridgetower.cross_modal_image_layers.0.crossattention.self.query": {"IMAGE": 10},
            "bridgetower.cross_modal_image_layers.0.attention.self.query": {"IMAGE": 10},
            "bridgetower.cross_modal_image_layers.0.output.dense": {"IMAGE": 10},
            "bridgetower.cross_modal_image_layers.1.crossattention.self.key": {"TEXT": 8},
            "bridgetower.cross_modal_image_layers.1.crossattention.self.value": {"TEXT": 8},
            "bridgetower.cross_modal_text_layers.0.crossattention.self.key": {"IMAGE": 10},
            "bridgetower.cross_modal_text_layers.0.crossattention.self.value": {"IMAGE": 10},
            "bridgetower.cross_modal_text_layers.0.attention.self.query": {"TEXT": 8},
            "bridgetower.cross_modal_text_layers.1.output.dense": {"TEXT": 8},
        },
        "cross-attention",
        left=False,
    ),
    "altclip": two_towers(
        "AltCLIPModel",
        "text_model.roberta.encoder.layers.0.attention.self.query",
        "vision_model.encoder.layers.0.self_attn.q_proj",
        text_config=TOWERS["text_config"] | {"project_dim": 8},
    ),
    "chinese_clip": two_towers(
        "ChineseCLIPModel",
        "text_model.encoder.layer.0.attention.self.query",
        "vision_model.encoder.layers.0.self_attn.q_proj",
    ),
    "metaclip_2": two_towers(
        "MetaClip2Model",
        "text_model.encoder.layers.0.self_attn.q_proj",
        "vision_model.encoder.layers.0.self_attn.q_proj",
    ),
    "owlvit": two_towers(
        "OwlViTModel",
        "text_model.encoder.layers.0.self_attn.q_proj",
        "vision_model.encoder.layers.0.self_attn.q_proj",
    ),
    "flava": Family(
        made(
            "FlavaModel",
            image_config=VIT,
            text_config=TOWERS["text_config"],
            multimodal_config=SIZES | {"intermediate_size": 32},
            hidden_size=16,
            projection_dim=8,
        ),
        pairs(PAIR),
        {
            "text_model.encoder.layer.0.attention.attention.query": {"TEXT": 9},
            "image_model.encoder.layer.0.attention.attention.query": {"IMAGE": 10},
            "multimodal_model.encoder.layer.0.attention.attention.query": {"TEXT": 9, "IMAGE": 12},
        },
        "joint sequence",
        gradients=False,
        left=False,
    ),
    "clipseg": Family(
        made(
            "CLIPSegForImageSegmentation",
            **TOWERS,
            extract_layers=[0, 1],
            reduce_dim=8,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=16,
        ),
        pairs(PAIR),
        {
            "clip.text_model.encoder.layers.0.self_attn.q_proj": {"TEXT": 9},
            "clip.vision_model.encoder.layers.0.self_attn.q_proj": {"IMAGE": 10},
        },
        "two towers",
        left=False,
        gradients=False,
    ),
    "janus": Family(
        made(
            "JanusForConditionalGeneration",
            vision_config=VIT
            | {"projection_dim": 16, "depth": 2, "mlp_ratio": 2.0, "num_image_tokens": 4},
            text_config=LLAMA,
            vq_config={
                "base_channels": 32,
                "channel_multiplier": [1],
                "num_res_blocks": 1,
                "latent_channels": 8,
                "num_embeddings": 8,
                "num_patches": 4,
                "projection_dim": 16,
                "image_token_embed_dim": 16,
            },
            image_token_id=IMAGE,
        ),
        chat(TWO_ONE_NONE, batched()),
        {
            "model.language_model.layers.0.self_attn.q_proj": counted(TWO_ONE_NONE),
            "model.vision_model.encoder.layers.0.self_attn.q_proj": {"IMAGE": 12},
        },
        "chat",
    ),
    "swin": Family(
        made(
            "SwinForImageClassification",
            image_size=16,
            patch_size=4,
            embed_dim=8,
            depths=[2, 1],
            num_heads=[2, 2],
            window_size=2,
            mlp_ratio=2.0,
            num_labels=2,
        ),
        labelled(),
        {
            "swin.encoder.layers.0.blocks.1.mlp.fc1": {"IMAGE": 32},
            "swin.encoder.layers.1.blocks.0.attention.q_proj": {"IMAGE": 8},
        },
        "images only",
        left=False,
    ),
    "deit": Family(
        made("DeiTForImageClassification", **VIT, num_labels=2),
        labelled(),
        {},
        "images only",
        left=False,
    ),
    "beit": Family(
        made("BeitForImageClassification", **VIT, num_labels=2),
        labelled(),
        {},
        "images only",
        left=False,
    ),
    "vit_mae": Family(
        made("ViTMAEModel", **VIT, mask_ratio=0.0),
        lambda _: {"pixel_values": pixels(2)},
        {},
        "images only",
        left=False,
        gradients=False,
    ),
    "dinov2": Family(
        made("Dinov2Backbone", **VIT, mlp_ratio=2),
        lambda _: {"pixel_values": pixels(2)},
        {},
        "images only",
        left=False,
        gradients=False,
    ),
    "siglip2": Family(
        made(
            "Siglip2Model",
            text_config=TOWERS["text_config"],
            vision_config=SIZES | {"intermediate_size": 32, "patch_size": 8, "num_patches": 4},
        ),
        lambda side: (
            written(("t" * 16,) * 2, side)
            | {
                "pixel_values": torch.rand(2, 4, 3 * 8 * 8),
                "pixel_attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
                "spatial_shapes": torch.tensor([[2, 2], [1, 2]]),
            }
        ),
        {},
        "two towers",
        left=False,
    ),
    "kosmos2": Family(
        made(
            "Kosmos2ForConditionalGeneration",
            vision_config=VIT,
            text_config={
                "embed_dim": 16,
                "layers": 2,
                "ffn_dim": 32,
                "attention_heads": 2,
                "vocab_size": 100,
                "max_position_embeddings": 64,
                "pad_token_id": PAD,
            },
            latent_query_num=4,
        ),
        lambda side: (
            (texts := written(("t####ttt", "####t"), side))
            | batched(2)()
            | {"image_embeds_position_mask": (texts["input_ids"] == IMAGE).long()}
        ),
        {
            "text_model.model.layers.0.self_attn.q_proj": {"TEXT": 5, "IMAGE": 8},
            "vision_model.model.encoder.layers.0.self_attn.q_proj": {"IMAGE": 10},
            "image_to_text_projection.dense": {"IMAGE": 10},
        },
        "chat",
        left=False,  # it counts positions by ids, not by the mask
        constant=("image_to_text_projection.x_attn.q_proj",),
    ),
    "glm4v": Family(
        made(
            "Glm4vForConditionalGeneration",
            vision_config=QWEN_VISION
            | {
                "hidden_size": 16,
                "intermediate_size": 32,
                "out_hidden_size": 16,
                "image_size": 32,
            },
            text_config=QWEN2 | {"model_type": "glm4v_text"} | MROPE,
            image_token_id=IMAGE,
            video_token_id=91,
            image_start_token_id=92,
            image_end_token_id=93,
            video_start_token_id=94,
            video_end_token_id=95,
        ),
        qwen(QWEN_ROWS, qwen_images),
        {
            "model.language_model.layers.0.self_attn.q_proj": counted(QWEN_ROWS),
            "model.visual.blocks.0.attn.qkv": {"IMAGE": 40},
        },
        "packed patches",
    ),
    "deepseek_vl": Family(
        made(
            "DeepseekVLForConditionalGeneration",
            vision_config=SIGLIP_VISION,
            text_config=LLAMA,
            image_token_id=IMAGE,
        ),
        chat(TWO_ONE_NONE, batched()),
        {
            "model.language_model.layers.0.self_attn.q_proj": counted(TWO_ONE_NONE),
            "model.aligner.linear1": {"IMAGE": 12},
        },
        "chat",
    ),
    "lfm2_vl": Family(
        made(
            "Lfm2VlForConditionalGeneration",
            vision_config=SIZES
            | {
                "model_type": "siglip2_vision_model",
                "intermediate_size": 32,
                "patch_size": 4,
                "num_patches": 16,
            },
            text_config=LLAMA | {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
            image_token_id=IMAGE,
            downsample_factor=2,
            projector_hidden_size=16,
        ),
        chat(
            ("tt####t##t", "t####tt", "ttt"),
            lambda: {
                "pixel_values": pixels(3).reshape(3, 16, 48),
                "spatial_shapes": torch.tensor([[4, 4], [2, 4], [4, 4]]),
                "pixel_attention_mask": torch.tensor([[1] * 16, [1] * 8 + [0] * 8, [1] * 16]),
            },
        ),
        {
            "model.language_model.layers.1.self_attn.q_proj": {"TEXT": 10, "IMAGE": 10},
            "model.vision_tower.encoder.layers.0.self_attn.q_proj": {"IMAGE": 40},
            "model.multi_modal_projector.linear_1": {"IMAGE": 10},
        },
        "masked images",
    ),
    "qwen3_5": Family(
        made(
            "Qwen3_5ForConditionalGeneration",
            vision_config=QWEN_VISION
            | {
                "hidden_size": 16,
                "intermediate_size": 32,
                "out_hidden_size": 16,
                "num_position_embeddings": 16,
            },
            text_config=QWEN2
            | {
                "model_type": "qwen3_5_text",
                "head_dim": 8,
                "layer_types": ["linear_attention", "full_attention"],
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 2,
                "rope_parameters": ROPE | {"partial_rotary_factor": 1.0},
            },
            **QWEN_IDS,
        ),
        qwen(QWEN_ROWS, qwen_images),
        {
            "model.language_model.layers.1.self_attn.q_proj": counted(QWEN_ROWS),
            "model.visual.blocks.0.attn.qkv": {"IMAGE": 40},
        },
        "packed patches",
    ),
    "qwen3_vl_moe": Family(
        made(
            "Qwen3VLMoeForConditionalGeneration",
            vision_config=QWEN_VISION
            | {
                "hidden_size": 16,
                "intermediate_size": 32,
                "out_hidden_size": 16,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
            text_config=QWEN2
            | {
                "model_type": "qwen3_vl_moe_text",
                "head_dim": 8,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 8,
            }
            | MROPE,
            **QWEN_IDS,
        ),
        qwen(QWEN_ROWS, qwen_images),
        {
            "model.language_model.layers.0.self_attn.q_proj": counted(QWEN_ROWS),
            "model.visual.blocks.0.attn.qkv": {"IMAGE": 40},
        },
        "experts",
    ),
    "aria": Family(
        made(
            "AriaForConditionalGeneration",
            vision_config=IDEFICS_VISION | {"model_type": "idefics3_vision"},
            text_config=LLAMA
            | {
                "model_type": "aria_text",
                "moe_num_experts": 4,
                "moe_topk": 2,
                "moe_num_shared_experts": 1,
            },
            projector_patch_to_query_dict={16: 4},
            image_token_index=IMAGE,
        ),
        chat(TWO_ONE_NONE, batched()),
        {
            "model.language_model.layers.0.self_attn.q_proj": counted(TWO_ONE_NONE),
            "model.vision_tower.encoder.layers.0.self_attn.q_proj": {"IMAGE": 48},
        },
        "experts",
        constant=("multi_modal_projector.cross_attn.q_proj",),
    ),
    "llama4": Family(
        made(
            "Llama4ForConditionalGeneration",
            vision_config=VIT
            | {
                "patch_size": 4,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
                "intermediate_size": 64,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            text_config=LLAMA
            | {
                "model_type": "llama4_text",
                "head_dim": 8,
                "intermediate_size_mlp": 32,
                "num_local_experts": 4,
                "moe_layers": [1],
                "attention_chunk_size": 64,
            },
            image_token_index=IMAGE,
        ),
        chat(TWO_ONE_NONE, batched()),
        {
            "language_model.model.layers.0.self_attn.q_proj": counted(TWO_ONE_NONE),
            "vision_model.model.layers.0.self_attn.q_proj": {"IMAGE": 51},
        },
        "experts",
    ),
    "ovis2": Family(
        made(
            "Ovis2ForConditionalGeneration",
            vision_config=VIT
            | {
                "patch_size": 4,
                "hidden_stride": 2,
                "vocab_size": 20,
                "num_visual_indicator_tokens": 5,
            },
            text_config=QWEN2,
            image_token_id=IMAGE,
            visual_indicator_token_ids=[91, 92, 93, 94, 95],
            vocab_size=100,
            hidden_size=16,
        ),
        chat(TWO_ONE_NONE, batched()),
        {
            "model.language_model.layers.0.self_attn.q_proj": counted(TWO_ONE_NONE),
            "model.vision_tower.transformer.encoder.layers.0.attention.q_proj": {"IMAGE": 48},
        },
        "chat",
    ),
    "align": Family(
        made(
            "AlignModel",
            text_config=TOWERS["text_config"],
            vision_config={
                "image_size": 16,
                "kernel_sizes": [3, 3],
                "in_channels": [32, 16],
                "out_channels": [16, 16],
                "strides": [1, 2],
                "num_block_repeats": [1, 1],
                "expand_ratios": [1, 2],
                "width_coefficient": 1.0,
                "depth_coefficient": 1.0,
                "hidden_dim": 32,
            },
            projection_dim=16,
        ),
        pairs(PAIR),
        {"text_model.encoder.layer.0.attention.self.query": {"TEXT": 9}},
        "two towers",
        left=False,
    ),
    "vit_gpt2": Family(
        lambda: transformers.VisionEncoderDecoderModel(
            transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
                transformers.ViTConfig(**VIT),
                transformers.GPT2Config(
                    n_embd=16,
                    n_layer=2,
                    n_head=2,
                    vocab_size=100,
                    n_positions=32,
                    pad_token_id=PAD,
                    bos_token_id=1,
                    decoder_start_token_id=1,
                ),
                pad_token_id=PAD,
                decoder_start_token_id=1,
            )
        ),
        lambda _: {"pixel_values": pixels(2), "labels": DECODED},
        {"encoder.layers.0.attention.q_proj": {"IMAGE": 10}},
        "encoder-decoder",
        left=False,
    ),
    "phi4_multimodal": Family(
        made(
            "Phi4MultimodalForCausalLM",
            **(LLAMA | {"model_type": "phi4_multimodal"}),
            vision_config=VIT | {"patch_size": 4, "crop_size": 16, "image_token_id": IMAGE},
            audio_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_blocks": 2,
                "num_attention_heads": 2,
                "input_size": 16,
                "ext_pw_out_channel": 16,
                "depthwise_separable_out_channel": 16,
                "nemo_conv_channels": 16,
                "audio_token_id": 91,
            },
        ),
        chat(CROPPED, cropped),
        {
            "model.layers.0.self_attn.qkv_proj": counted(CROPPED),
            "model.layers.1.mlp.down_proj": counted(CROPPED),
            # Two crops of the first image, three of the second, of 4 x 4 patches.
            "model.embed_tokens_extend.image_embed.img_processor.encoder.layers.0.mlp.fc1": {
                "IMAGE": 80
            },
            "model.embed_tokens_extend.image_embed.img_projection_up": {"IMAGE": 30},
        },
        "chat",
    ),
    "grounding_dino": Family(
        made(
            "GroundingDinoModel",
            backbone_config={
                "model_type": "swin",
                "image_size": 32,
                "patch_size": 4,
                "embed_dim": 8,
                "depths": [1, 1, 1, 1],
                "num_heads": [1, 1, 1, 1],
                "window_size": 2,
                "out_indices": [2, 3, 4],
            },
            text_config=TOWERS["text_config"] | {"model_type": "bert"},
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            num_queries=4,
            max_text_len=32,
        ),
        pairs(PAIR, 64, pixel_mask=half_empty(64)),
        {
            "text_backbone.encoder.layer.0.attention.self.query": {"TEXT": 9},
            "encoder.layers.0.fusion_layer.attn.vision_proj": REGIONS,
            "encoder.layers.0.fusion_layer.attn.text_proj": {"TEXT": 9},
            "encoder.layers.1.text_enhancer_layer.fc1": {"TEXT": 9},
            "encoder.layers.1.deformable_layer.self_attn.value_proj": REGIONS,
            "encoder.layers.1.deformable_layer.fc2": REGIONS,
            "enc_output": REGIONS,
            "decoder.layers.0.self_attn.query": {"QUERY": 8},
            "decoder.layers.0.encoder_attn_text.query": {"QUERY": 8},
            "decoder.layers.0.encoder_attn_text.key": {"TEXT": 9},
            "decoder.layers.1.encoder_attn.value_proj": REGIONS,
            "decoder.layers.1.fc1": {"QUERY": 8},
        },
        "cross-attention",
        left=False,
        gradients=False,
        constant=DETECTOR_QUERIES,
    ),
    "dinov3_convnext": Family(
        made("DINOv3ConvNextModel", hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], image_size=32),
        lambda _: {"pixel_values": pixels(2, 32)},
        {},
        "images only",
        left=False,
        gradients=False,
    ),
}


@dataclass(frozen=True)
class Videos:
    """A batch of videos for a family.

    Attributes:
        batch: makes it, padded on that side.
        tokens: by path of a layer, the tokens that enter it, counted by hand.
    """

    batch: Callable[[str], dict[str, Tensor]]
    tokens: Mapping[str, Tokens]


def videos(*grids: tuple[int, int, int]) -> dict[str, Tensor]:
    """Packed patches of videos of these lengths, heights and widths in patches."""
    made_of = [(1, frames * height * width) for frames, height, width in grids]
    packed = patches(*made_of, width=3 * 2 * 8 * 8)
    return {
        "pixel_values_videos": packed["pixel_values"],
        "video_grid_thw": torch.tensor(grids),
    }


RUN = ("t%%%%%%%%t", "tt%%tt%%%%", "tt")
"""Videos of 2 x 4 x 4, 1 x 2 x 4 and 1 x 4 x 4 patches, four of which make a token."""
TIMED = ("tt%%%%t%%%%t", "tt%%tt%%%%", "tt")
"""The same, with a time in front of each pair of frames."""
BOTH = ("t####tt%%%%%%%%", "t%%t", "t##tt")
"""An image of 4 x 4 patches and a video of 2 x 4 x 4, a video of 1 x 2 x 4, an image of 2 x 4."""
BOTH_TIMED = ("t####t%%%%t%%%%", "t%%t", "t##tt")


def run() -> dict[str, Tensor]:
    return videos((2, 4, 4), (1, 2, 4), (1, 4, 4))


def both() -> dict[str, Tensor]:
    return patches((4, 4), (2, 4), width=3 * 2 * 8 * 8) | videos((2, 4, 4), (1, 2, 4))


def qwen_videos(rows: Sequence[str], more: Callable[[], dict[str, Tensor]]) -> Videos:
    """Of these rows; the vision tower reads four patches for each of their tokens."""
    words = counted(rows)
    patched = {kind: 4 * n for kind, n in words.items() if kind != "TEXT"}
    return Videos(
        qwen(rows, more),
        {
            "model.language_model.layers.0.self_attn.q_proj": words,
            "model.language_model.layers.1.mlp.down_proj": words,
            "model.visual.blocks.0.attn.qkv": patched,
            "model.visual.blocks.1.attn.proj": patched,
        },
    )


FRAMES = ("tt%%%t", "ttt%%%")
"""Two frames of 2 x 2 patches, each of which is pooled to one, and the end of the video."""

VIDEOS: dict[str, tuple[Videos, ...]] = {
    "qwen2_vl": (qwen_videos(RUN, run), qwen_videos(BOTH, both)),
    "qwen2_5_vl": (qwen_videos(RUN, run), qwen_videos(BOTH, both)),
    "qwen3_vl": (qwen_videos(TIMED, run), qwen_videos(BOTH_TIMED, both)),
    "llava_onevision": (
        Videos(
            chat(FRAMES, lambda: {"pixel_values_videos": pixels(4).reshape(2, 2, 3, 16, 16)}),
            {
                "model.language_model.layers.0.self_attn.q_proj": counted(FRAMES),
                "model.vision_tower.encoder.layers.0.self_attn.q_proj": {"VIDEO": 16},
                "model.multi_modal_projector.linear_1": {"VIDEO": 16},
            },
        ),
        Videos(
            chat(
                ("tt%%%t", f"t{10 * '#'}t%%%"),
                lambda: (
                    {"pixel_values_videos": pixels(4).reshape(2, 2, 3, 16, 16)}
                    | {name: value[:1] for name, value in tiled().items()}
                ),
            ),
            {
                "model.language_model.layers.0.self_attn.q_proj": {
                    "TEXT": 5,
                    "IMAGE": 10,
                    "VIDEO": 6,
                },
                "model.vision_tower.encoder.layers.0.self_attn.q_proj": {"IMAGE": 8, "VIDEO": 16},
            },
        ),
    ),
    "perception_lm": (
        Videos(
            chat(
                (f"tt{8 * '%'}t", f"ttt{8 * '%'}"),
                lambda: {"pixel_values_videos": pixels(4).reshape(2, 2, 3, 16, 16)},
            ),
            {
                "model.vision_tower.encoder.layers.0.self_attn.q_proj": {"VIDEO": 16},
                "model.multi_modal_projector.linear_1": {"VIDEO": 16},
            },
        ),
        Videos(
            chat(
                (f"tt{8 * '%'}t####", f"ttt{8 * '%'}"),
                lambda: (
                    {"pixel_values_videos": pixels(4).reshape(2, 2, 3, 16, 16)}
                    | {"pixel_values": pixels(1).unsqueeze(1)}
                ),
            ),
            {
                "model.vision_tower.encoder.layers.0.self_attn.q_proj": {"IMAGE": 4, "VIDEO": 16},
                "model.multi_modal_projector.linear_1": {"IMAGE": 4, "VIDEO": 16},
            },
        ),
    ),
}
"""Families that take videos as such; InternVL and SmolVLM take the frames of a video as images."""
