"""CLIP with a vision transformer as OpenAI's code base builds it, for comparison.

Written from the paper's description and the names and shapes of the published checkpoints: layers
are `nn.MultiheadAttention` with one tensor for query, key and value, activations are
x * sigmoid(1.702 x), the text feature is the state at the highest token id.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


class QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Resblock(nn.Module):
    def __init__(self, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64)
        self.ln_1 = nn.LayerNorm(width)
        layers = {
            "c_fc": nn.Linear(width, 4 * width),
            "gelu": activation,
            "c_proj": nn.Linear(4 * width, width),
        }
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, activation: nn.Module) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Resblock(width, activation) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x.permute(1, 0, 2)  # nn.MultiheadAttention reads [tokens, batch, width]
        for block in self.resblocks:
            x = block(x, mask)
        return x.permute(1, 0, 2)


class VisionTransformer(nn.Module):
    def __init__(self, side: int, patch: int, width: int, out: int, activation: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * 0.2)
        self.positional_embedding = nn.Parameter(torch.randn((side // patch) ** 2 + 1, width) * 0.2)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, 2, activation)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, out) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.conv1(x).flatten(2).permute(0, 2, 1)
        first = self.class_embedding.expand(len(x), 1, -1)
        x = torch.cat([first, patches], dim=1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class OpenAiClip(nn.Module):
    """Two layers in both towers: vision 128 wide with 2 heads, text 64 wide with 1 head."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        activation = activation or QuickGelu()
        words, context, width, out = 40, 12, 64, 24
        self.visual = VisionTransformer(16, 8, 128, out, activation)
        self.transformer = Transformer(width, 2, activation)
        self.token_embedding = nn.Embedding(words, width)
        self.positional_embedding = nn.Parameter(torch.randn(context, width) * 0.2)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, out) * width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        for name, parameter in self.named_parameters():  # else biases and norms would be 0 and 1
            if name.endswith("bias") or "ln_" in name:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)

    def encode_text(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        x = self.token_embedding(ids) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(ids)), ids.argmax(dim=-1)] @ self.text_projection


def openai_clip(activation: nn.Module | None = None) -> OpenAiClip:
    torch.manual_seed(0)
    return OpenAiClip(activation).eval()


def openai_state(activation: nn.Module | None = None) -> dict[str, Tensor]:
    """The state dict that OpenAI's archives have: with three numbers that are no weights."""
    numbers = {"input_resolution": 16, "context_length": 12, "vocab_size": 40}
    extra = {name: torch.tensor(value) for name, value in numbers.items()}
    return dict(openai_clip(activation).state_dict()) | extra
