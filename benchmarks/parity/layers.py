"""Recorded layer-wise solvers on single layers, and ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.parity.family import Line
from vlp_plugins.methods.reconstruction.alps import Alps
from vlp_plugins.methods.reconstruction.layer import Largest, Layer
from vlp_plugins.methods.reconstruction.sparsegpt import SparseGpt
from vlp_plugins.scoring.selection import PatternSelection, Selection

WEIGHT_TOLERANCE = 2e-6
"""Absolute, of SparseGPT's weights."""
ERROR_TOLERANCE = 0.01
"""Relative, by which ALPS's error may be above the recorded one: its path depends on rounding."""


def cases(folder: Path) -> Iterator[tuple[str, str, Layer, int]]:
    """Of the recorded runs problem, sparsity (`50`, `2of4`), layer, and the elements to remove.

    Args:
        folder: has `problems.safetensors` and `masks.safetensors`.
    """
    problems, masks = (load_file(folder / f"{n}.safetensors") for n in ("problems", "masks"))
    for key in masks:
        name, method, sparsity = key.split(".")
        if method == "sparsegpt":
            layer = Layer(problems[f"{name}.W"], problems[f"{name}.H"])
            removed = layer.weight.numel() // 2
            if sparsity != "2of4":
                removed = layer.weight.numel() * int(sparsity) // 100
            yield name, sparsity, layer, removed


def rule(sparsity: str, layer: Layer, removed: int) -> Selection:
    """What says how many elements stay: of the tensor, or two of every four inputs."""
    if sparsity == "2of4":
        return PatternSelection(2, 4, layer.weight.numel())
    return Largest(removed)


def compare_layers(folder: Path) -> Iterator[Line]:
    """Two comparisons per recorded run of `<folder>/lvlm/layers`: SparseGPT and ALPS.

    Args:
        folder: what has the recorded folders; may lack `lvlm`.
    """
    home = folder / "lvlm" / "layers"
    if not home.is_dir():
        return
    masks, weights = (load_file(home / f"{n}.safetensors") for n in ("masks", "weights"))
    for name, sparsity, layer, removed in cases(home):
        key = f"{name}.sparsegpt.{sparsity}"
        scores, title = layer.weight.abs(), f"lvlm/layers/{name}"
        selection = rule(sparsity, layer, removed)
        support, found = SparseGpt(published=True).solve(layer, scores, [selection])[0]
        bits = int((support != masks[key]).sum())
        worst = float((found - weights[key]).abs().max())
        detail = f"{bits} bits differ, largest difference of weights {worst:.1e}"
        fine = bits == 0 and worst <= WEIGHT_TOLERANCE
        yield Line(title, f"SparseGPT {sparsity}", detail, worst, fine)
        key = f"{name}.alps.{sparsity}"
        # Counts of ALPS are rounded, ours are int(sparsity N): as many as were recorded stay.
        selection = rule(sparsity, layer, layer.weight.numel() - int(masks[key].sum()))
        support, found = Alps(published=True).solve(layer, scores, [selection])[0]
        ratio = layer.error(found) / layer.error(weights[key])
        same = int(support.sum()) == int(masks[key].sum())
        detail = f"{ratio:.4f} of the recorded error, {int((support != masks[key]).sum())} bits"
        fine = same and ratio <= 1 + ERROR_TOLERANCE
        yield Line(title, f"ALPS {sparsity}", detail, ratio - 1, fine)


def held_out(inputs: torch.Tensor, kept: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs `[tokens, in]` of the first `kept` of `parts` equal sequences, and of the others."""
    cut = len(inputs) // parts * kept
    return inputs[:cut], inputs[cut:]
