"""Our masks, scores, statistics, losses beside those that the published code gave."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks.parity.compare import compare_family
from benchmarks.parity.family import Family, families

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("family", families(GOLDEN), ids=lambda family: family.name)
def test_every_recorded_output_is_reproduced(family):
    lines = compare_family(family)

    assert [str(line) for line in lines if not line.ok] == []
    masks = [line for line in lines if re.match(r"\d+ of \d+ differ", line.detail)]
    # 4 methods x 3 sparsities, length 17, SNIP, CHITA++; of BLIP 3 rounds of IterSNIP and mask
    # training, of the ViT CHITA in small blocks
    extra = {"blip": 1 + 4, "xvlm": 1, "vit": 1}[family.name]
    assert len(masks) == 12 + 2 + extra


def test_a_mask_that_differs_is_found(tmp_path):
    """The comparison itself can fail: one flipped element far from the threshold."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "vit"
    folder.mkdir()
    for path in (GOLDEN / "vit").glob("*.*"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "masks").mkdir()
    masks = load_file(GOLDEN / "vit" / "masks" / "omp_0.75.safetensors")
    name = next(iter(masks))
    weight = load_file(folder / "model.safetensors")[name]
    largest = torch.argmax(weight.abs().flatten())
    masks[name].view(-1)[largest] = False
    save_file(masks, folder / "masks" / "omp_0.75.safetensors")

    lines = {line.what: line for line in compare_family(Family(folder))}

    assert not lines["omp_0.75"].ok
    assert lines["omp_0.75"].detail.startswith("1 of 24576 differ")
