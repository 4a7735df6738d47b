"""Layers with random weights whose inputs are correlated and of different sizes."""

import torch

from vlp_plugins.methods.reconstruction.layer import Layer


def drawn_layer(seed, rows=12, columns=32, tokens=100):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    scales = torch.randn(columns, generator=generator).exp()
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing * scales
    return Layer(torch.randn(rows, columns, generator=generator), inputs.T @ inputs)
