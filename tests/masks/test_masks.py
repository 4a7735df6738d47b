"""Masks: exact bits, exact counts, and how two sets compare."""

import math
import time
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_masks import ADAPTER, Captioning, Pretraining, random_masks

from vlp_plugins.masks.manifest import Count, Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.masks.packed import count_ones, pack, unpack
from vlp_plugins.models.weights import WeightMap, structure_of
from vlp_plugins.runtime.errors import MaskError

shapes = st.lists(st.integers(0, 9), max_size=4)


@given(shape=shapes, seed=st.integers(0, 1000), density=st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=200, deadline=None)
def test_unpack_is_the_inverse_of_pack_for_every_shape(shape, seed, density):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density

    bits = pack(mask)

    assert bits.dtype == torch.uint8
    assert bits.shape == (math.ceil(mask.numel() / 8),)
    assert count_ones(bits) == int(mask.sum())
    assert torch.equal(unpack(bits, shape), mask)


def test_bits_are_in_row_major_order_the_most_significant_first():
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 0] = mask[1, 3] = True  # elements 0 and 8

    assert pack(mask).tolist() == [0b10000000, 0b10000000]
    assert torch.equal(pack(mask.t().contiguous().t()), pack(mask))  # whatever the strides


def test_packing_200_million_elements_takes_less_than_a_second():
    mask = torch.ones(1000, 200_000, dtype=torch.bool)

    start = time.process_time()
    bits = pack(mask)
    assert time.process_time() - start < 1
    assert count_ones(bits) == 200_000_000


def test_only_bool_is_packed():
    with pytest.raises(TypeError, match="bool"):
        pack(torch.ones(3))


def test_masks_are_a_mapping_of_bool_tensors_in_the_adapters_order():
    masks = random_masks(Pretraining())

    assert list(masks) == ["vision.patch", "vision.ffn", "text.ffn", "text.out"]
    assert masks["vision.patch"].shape == (3, 1, 2, 2)
    assert all(mask.dtype == torch.bool for mask in masks.values())
    assert "text.ffn" in masks
    assert "encoder.ffn.weight" not in masks
    with pytest.raises(KeyError):
        masks["encoder.ffn.weight"]


@given(density=st.floats(0, 1), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_counts_are_exact_by_weight_by_modality_and_in_all(density, seed):
    masks = random_masks(Pretraining(), density=density, seed=seed)
    counts = masks.counts()

    for name, mask in masks.items():
        assert counts.by_weight[name] == Count(int(mask.sum()), mask.numel())
    assert counts.by_modality["vision"].total == 12 + 15
    assert counts.by_modality["text"].total == 21 + 21  # a tied weight counts once
    assert masks.kept == sum(int(mask.sum()) for mask in masks.values())
    assert masks.kept + masks.removed == masks.total == 69
    assert masks.sparsity == masks.removed / 69
    assert masks.manifest.weights["text.ffn"]["kept"] == counts.by_weight["text.ffn"].kept


def test_the_manifest_says_what_the_masks_fit_and_how_they_were_made():
    model = Pretraining()
    weights = WeightMap.of(model, ADAPTER)
    manifest = random_masks(
        model, parameters={"edges": True}, sparsity={"vision": 0.5, "text": 0.6}
    ).manifest

    assert manifest.structure == weights.structure
    assert manifest.structure == structure_of({n: w.shape for n, w in weights.items()})
    assert (manifest.adapter, manifest.method, manifest.schema) == ("toy", "toy", 1)
    assert manifest.sparsity == {"vision": 0.5, "text": 0.6}
    assert "torch" in manifest.versions
    assert manifest.weights_hash == weights.content_hash()
    assert Manifest.from_header(asdict(manifest)) == manifest


def test_masks_and_manifest_must_speak_of_the_same_weights():
    masks = random_masks(Pretraining())
    dense = dict(masks)

    missing = {name: mask for name, mask in dense.items() if name != "text.ffn"}
    with pytest.raises(MaskError, match=r"manifest lists 'text\.ffn'"):
        Masks.from_dense(missing, masks.manifest)
    with pytest.raises(MaskError, match=r"there is a mask for 'extra'"):
        Masks.from_dense({**dense, "extra": dense["text.ffn"]}, masks.manifest)
    with pytest.raises(MaskError, match=r"\[7, 4\], but the weight is \[7, 3\]"):
        Masks.from_dense({**dense, "text.ffn": torch.ones(7, 4) > 0}, masks.manifest)
    with pytest.raises(MaskError, match=r"float32; masks are bool"):
        Masks.from_dense({**dense, "text.ffn": torch.ones(7, 3)}, masks.manifest)
    with pytest.raises(MaskError, match=r"instead of torch\.uint8 \[3\]"):
        Masks({**masks.packed, "text.ffn": torch.zeros(4, dtype=torch.uint8)}, masks.manifest)
    with pytest.raises(MaskError, match="beyond its 21 elements"):
        Masks({**masks.packed, "text.ffn": torch.tensor([0, 0, 1]).byte()}, masks.manifest)


@given(seeds=st.tuples(st.integers(0, 50), st.integers(0, 50)), density=st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_the_overlap_is_that_of_a_naive_count(seeds, density):
    one, two = (random_masks(Pretraining(), seed=s, density=density) for s in seeds)

    overlap = one.compare(two)

    assert list(overlap) == ["vision", "text", "all"]
    for group, found in overlap.items():
        names = [n for n in one if group in ("all", one.manifest.weights[n]["modality"])]
        a = torch.cat([one[n].flatten() for n in names])
        b = torch.cat([two[n].flatten() for n in names])
        assert found.differing == int((a != b).sum())
        assert found.agreement == pytest.approx(float((a == b).float().mean()))
        union = int((a | b).sum())
        assert found.iou == (int((a & b).sum()) / union if union else 1.0)


def test_masks_of_different_structures_are_not_compared():
    with pytest.raises(MaskError, match=r"only the first has 'text\.ffn'"):
        random_masks(Pretraining()).compare(random_masks(Captioning()))
    with pytest.raises(MaskError, match=r"\[3, 5\] in the first and \[3, 6\] in the second"):
        random_masks(Pretraining()).compare(random_masks(Pretraining(width=6)))


def test_invert_keeps_what_was_removed_and_says_so():
    masks = random_masks(Pretraining())

    inverted = masks.invert()

    assert all(torch.equal(inverted[name], ~mask) for name, mask in masks.items())
    assert inverted.kept == masks.removed
    assert inverted.manifest.note == "inverted"
    assert inverted.invert() == masks
    assert inverted.invert().manifest == masks.manifest
    assert random_masks(Pretraining(), note="half").invert().manifest.note == "half; inverted"


def test_equality_is_of_bits_and_shapes_not_of_provenance():
    assert random_masks(Pretraining()) == random_masks(Pretraining(), note="again")
    assert random_masks(Pretraining()) != random_masks(Pretraining(), seed=1)
    assert random_masks(Pretraining()) != random_masks(Captioning())
