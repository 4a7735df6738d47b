"""Sizes and options of the X-VLM pre-training model and of the retrieval model."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, BertConfig, CLIPVisionConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

VISION_TYPES = ("clip_vision_model", "swin", "vit")


class XvlmPretrainConfig(PreTrainedConfig):
    """Configuration of `XvlmForPretraining`.

    Attributes:
        vision_config: `CLIPVisionConfig`, `SwinConfig`, or for DeiT `ViTConfig` (a dict needs
            `model_type: swin` or `vit` for the latter two).
        text_config: `BertConfig`. `num_hidden_layers` counts text and fusion layers together;
            its extra attribute `fusion_layer` is the index of the first fusion layer (default:
            half of them), also accepted and readable here as `fusion_layer`.
        embed_dim: width of the common space of images and texts.
        temperature: initial temperature of the contrastive loss; it is learned.
        position_init_std: standard deviation of new position embeddings of both towers; None
            keeps the towers' own (0.02). Small models trained from scratch need more.
    """

    model_type = "vlp_xvlm_pretrain"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": BertConfig,
    }

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    embed_dim: int = 256
    temperature: float = 0.07
    position_init_std: float | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Builds the sub-configurations and checks them.

        Raises:
            ValueError: if the vision encoder is of another kind, or `fusion_layer` leaves no
                text layer or no fusion layer.
        """
        fusion_layer = kwargs.pop("fusion_layer", None)
        super().__post_init__(**kwargs)
        vision: Any = self.vision_config
        text: Any = self.text_config
        if vision.model_type not in VISION_TYPES:
            *others, last = VISION_TYPES
            raise ValueError(
                f"vision_config is a {vision.model_type!r}; X-VLM takes {', '.join(others)} or "
                f"{last}"
            )
        if fusion_layer is not None:
            text.fusion_layer = fusion_layer
        elif getattr(text, "fusion_layer", None) is None:
            text.fusion_layer = text.num_hidden_layers // 2
        if not 0 < text.fusion_layer < text.num_hidden_layers:
            raise ValueError(
                f"fusion_layer={text.fusion_layer} leaves no text layer or no fusion layer among "
                f"{text.num_hidden_layers}; choose one from 1 to {text.num_hidden_layers - 1}"
            )
        text.encoder_width = vision.hidden_size

    @property
    def fusion_layer(self) -> int:
        """Index of the first fusion layer of the text encoder."""
        text: Any = self.text_config
        return int(text.fusion_layer)

    @classmethod
    def base(cls, **overrides: Any) -> XvlmPretrainConfig:
        """X-VLM base: CLIP ViT-B/16 at 224 px, 6 text and 6 fusion layers of BERT base."""
        options: dict[str, Any] = {
            "vision_config": CLIPVisionConfig(patch_size=16, image_size=224),
            "text_config": BertConfig(num_hidden_layers=12, fusion_layer=6),
        }
        return cls(**(options | overrides))


class XvlmRetrievalConfig(XvlmPretrainConfig):
    """Configuration of `XvlmForRetrieval`."""

    model_type = "vlp_xvlm_retrieval"


AutoConfig.register(XvlmPretrainConfig.model_type, XvlmPretrainConfig, exist_ok=True)
AutoConfig.register(XvlmRetrievalConfig.model_type, XvlmRetrievalConfig, exist_ok=True)
