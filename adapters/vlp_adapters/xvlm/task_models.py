"""What X-VLM's downstream models have in common: the vision encoder, and where weights come from.

Names of parameters are those of the original code base's models, so that `for_task` of the
pre-training model tells them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from vlp_adapters.objectives import IGNORED
from vlp_adapters.xvlm.configuration import XvlmPretrainConfig
from vlp_adapters.xvlm.vision import build_vision_encoder, init_positions
from vlp_plugins.runtime.errors import UnsupportedError


class XvlmTaskConfig(XvlmPretrainConfig):
    """Configuration of a downstream model: the pre-training model's, and how texts begin and end.

    Attributes:
        start_token_id: the first token of what the decoder reads and writes ([CLS]).
        end_token_id: the token that ends it ([SEP]).
        label_smoothing: of the loss of the words.
    """

    start_token_id: int = 101
    end_token_id: int = 102
    label_smoothing: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        """Builds the sub-configurations and checks the tokens.

        Raises:
            ValueError: if a token is outside the vocabulary.
        """
        super().__post_init__(**kwargs)
        text: Any = self.text_config
        for name in ("start_token_id", "end_token_id"):
            token = getattr(self, name)
            if not 0 <= token < text.vocab_size:
                raise ValueError(
                    f"{name}={token} is outside the vocabulary of {text.vocab_size} tokens; give "
                    "the id that your tokenizer has for it"
                )


@dataclass
class TaskOutput(ModelOutput):
    """What a training step needs.

    Attributes:
        loss: a scalar; None without labels.
        logits: of words `[B, L, vocab_size]`; of judgements `[B, 2]`: false, true.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class XvlmTaskModel(PreTrainedModel):
    """The vision encoder; a subclass adds its text towers and ends `__init__` with `post_init`."""

    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    words_in = "text_encoder"
    """Path of the text tower that has the word embeddings; a decoder of answers has its own."""

    def __init__(self, config: XvlmPretrainConfig) -> None:
        """Builds the vision encoder."""
        super().__init__(config)
        self.vision_encoder = build_vision_encoder(config.vision_config)

    def get_input_embeddings(self) -> Any:
        """The word embeddings."""
        tower: Any = self.get_submodule(self.words_in)
        return tower.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        """Replaces the word embeddings."""
        tower: Any = self.get_submodule(self.words_in)
        tower.set_input_embeddings(value)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` to tokens `[B, T, Dv]`, the global token first."""
        tokens: Tensor = self.vision_encoder(pixel_values)
        return tokens

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.position_init_std
        if module is self and std is not None:  # visited last, after its parts
            init_positions(self.vision_encoder, std)
            for name, parameter in self.named_parameters():
                if name.endswith("embeddings.position_embeddings.weight"):
                    init.normal_(parameter, mean=0.0, std=std)

    def words_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of every next word.

        With label smoothing the right word has `1 - smoothing` and each other one
        `smoothing / vocab_size`, as in the original; PyTorch gives the right one both.

        Args:
            logits: `[B, L, vocab_size]`.
            labels: `[B, L]`, the words at those positions, -100 where none is to be predicted.
        """
        target = labels[:, 1:].flatten()
        words = logits[:, :-1].flatten(0, 1)
        smoothing = self.config.label_smoothing
        total = functional.cross_entropy(words, target, label_smoothing=smoothing, reduction="sum")
        if smoothing:
            right = functional.cross_entropy(words, target, reduction="sum")
            total = total - smoothing / words.shape[-1] * right
        return total / (target != IGNORED).sum().clamp(min=1)  # 0, not NaN, without words


def task_config(config_class: Any, pretraining: XvlmPretrainConfig, options: Any) -> Any:
    """The configuration of a downstream model with the sizes of a pre-training model."""
    sizes = pretraining.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        sizes.pop(name, None)
    return config_class(**(sizes | options))


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies tensors into the parameters of the same names; the others stay as drawn.

    Raises:
        UnsupportedError: if one has no place, or another shape.
    """
    places = model.state_dict()
    for name, tensor in state.items():
        if name not in places or places[name].shape != tensor.shape:
            has = "no place for it" if name not in places else f"{list(places[name].shape)}"
            raise UnsupportedError(
                f"{name} {list(tensor.shape)} does not fit {type(model).__name__}: it has {has}; "
                "use the configuration of this pre-training model"
            )
        with torch.no_grad():
            places[name].copy_(tensor)
