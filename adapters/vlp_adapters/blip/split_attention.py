"""BLIP's image attention with a layer each for query, key and value, so that heads can be cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class SplitAttention(nn.Module):
    """What transformers' `BlipAttention` computes, from three layers instead of `qkv`.

    `qkv` reads its head size off the width of the image tokens, so its heads cannot be cut. Here
    number and size of heads are attributes, and `scale` is that of the uncut heads whatever they
    become. Attention maps are not returned.

    Attributes:
        num_heads: number of heads.
        head_dim: dimensions of each.
        scale: factor of the scores.
    """

    def __init__(self, fused: Any) -> None:
        """Takes over the values of a `BlipAttention`; `projection` is the same layer."""
        super().__init__()
        self.num_heads: int = fused.num_heads
        self.head_dim: int = fused.head_dim
        self.scale: float = fused.scale
        self.dropout: nn.Dropout = fused.dropout
        weights = fused.qkv.weight.chunk(len(_PROJECTIONS))
        biases = fused.qkv.bias.chunk(len(_PROJECTIONS))
        for name, weight, bias in zip(_PROJECTIONS, weights, biases, strict=True):
            self.register_module(name, _linear(weight, bias, fused.qkv))
        self.projection: nn.Linear = fused.projection
        self.train(fused.training)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """Tokens `[B, T, D]` to `[B, T, D]`, and no attention map; other arguments are ignored."""
        query, key, value = (
            getattr(self, name)(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for name in _PROJECTIONS
        )
        context = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=self.dropout.p if self.training else 0.0,
            scale=self.scale,
        )
        return self.projection(context.transpose(1, 2).flatten(2)), None


def split_attentions(model: nn.Module) -> None:
    """Replaces every `BlipAttention` in a model, in place; those that are split already stay."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "BlipAttention" and isinstance(child.qkv, nn.Linear):
                setattr(module, name, SplitAttention(child))


@torch.no_grad()
def _linear(weight: Tensor, bias: Tensor, like: nn.Linear) -> nn.Linear:
    """A layer with a copy of these values, that trains if `like` does."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), like.weight.requires_grad)
    linear.bias = nn.Parameter(bias.detach().clone(), like.bias.requires_grad)
    return linear
