"""Sizes and options of the BLIP pre-training model."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, BlipTextConfig, BlipVisionConfig, PreTrainedConfig

_INIT_STD = 0.02
_NO_INIT = 1e-6  # transformers' default of 1e-10 would start every vision weight at zero


class BlipPretrainConfig(PreTrainedConfig):
    """Configuration of `BlipForPretraining`.

    Attributes:
        vision_config: `BlipVisionConfig`. Original checkpoints need `layer_norm_eps=1e-6`. An
            `initializer_range` of (nearly) zero, transformers' default, becomes 0.02.
        text_config: `BlipTextConfig` of both text towers; its `sep_token_id` ends a caption.
        embed_dim: width of the common space of images and texts.
        queue_size: momentum features of earlier batches that the contrastive loss compares with.
        momentum: share of its old value that a momentum weight keeps at each step.
        alpha: share of the momentum networks' soft targets in the contrastive loss, 0 to 1.
        temperature: initial temperature of the contrastive loss; it is learned.
        label_smoothing: of the language-modelling loss.
        dec_token_id: `[DEC]`, the first token of what the decoder reads and writes.
        enc_token_id: `[ENC]`, the first token of what the multimodal encoder reads.
        position_init_std: standard deviation of new position embeddings of both towers; None
            keeps the towers' own. Small models trained from scratch need more than 0.02.
    """

    model_type = "vlp_blip_pretrain"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": BlipVisionConfig,
        "text_config": BlipTextConfig,
    }

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    embed_dim: int = 256
    queue_size: int = 57600
    momentum: float = 0.995
    alpha: float = 0.4
    temperature: float = 0.07
    label_smoothing: float = 0.1
    dec_token_id: int = 30522
    enc_token_id: int = 30523
    position_init_std: float | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Builds the sub-configurations and makes them agree.

        Raises:
            ValueError: if a special token is outside the vocabulary, or weights are to be untied.
        """
        if not self.tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings=False would untie the two text towers as well; BLIP's "
                "pre-training model shares them, leave it True"
            )
        if self.vision_config is None:
            self.vision_config = {"image_size": 224, "layer_norm_eps": 1e-6}
        if self.text_config is None:
            self.text_config = {"num_attention_heads": 12}
        super().__post_init__(**kwargs)
        vision: Any = self.vision_config
        text: Any = self.text_config
        if vision.initializer_range < _NO_INIT:
            vision.initializer_range = _INIT_STD
        text.encoder_hidden_size = vision.hidden_size
        text.is_decoder = True  # transformers builds the cross-attention only then
        text.bos_token_id = self.dec_token_id
        for name, token in (
            ("dec_token_id", self.dec_token_id),
            ("enc_token_id", self.enc_token_id),
            ("text_config.sep_token_id", text.sep_token_id),
            ("text_config.pad_token_id", text.pad_token_id),
        ):
            if token is None or not 0 <= token < text.vocab_size:
                raise ValueError(
                    f"{name}={token} is outside the vocabulary of {text.vocab_size} tokens; give "
                    "the id that your tokenizer has for it"
                )

    @classmethod
    def base(cls, **overrides: Any) -> BlipPretrainConfig:
        """BLIP base: ViT-B/16 at 224 px, two text towers of the size of BERT base."""
        return cls(**overrides)


AutoConfig.register(BlipPretrainConfig.model_type, BlipPretrainConfig, exist_ok=True)
