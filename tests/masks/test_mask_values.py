"""New values of the kept elements: held compactly, written into every model that the masks fit."""

import copy
import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mask_fitting import DEVICES
from toy_masks import ADAPTER, Captioning, Pretraining, random_masks
from toy_values import valued_masks

from vlp_plugins.masks.compare import distances
from vlp_plugins.masks.masks import Masks
from vlp_plugins.runtime.errors import MaskError


@given(density=st.floats(0, 1), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_one_value_is_kept_for_every_kept_element_in_row_major_order(density, seed):
    masks, dense = valued_masks(Pretraining(), density=density, seed=seed)

    for name, mask in masks.items():
        pairs = zip(dense[name].flatten().tolist(), mask.flatten().tolist(), strict=True)
        expected = [value for value, kept in pairs if kept]
        assert masks.new_values[name].tolist() == expected
    assert masks.values_bytes == 4 * masks.kept


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_apply_writes_them_in_the_parameters_dtype_and_zeroes_the_rest(dtype, device):
    model = Pretraining().to(dtype).to(device)
    untouched = model.head.weight.detach().clone()
    masks, dense = valued_masks(model)

    masks.apply(model, ADAPTER)

    expected = torch.where(masks["text.ffn"], dense["text.ffn"].to(dtype), 0)
    assert torch.equal(model.encoder["ffn"].weight.cpu(), expected.to(dtype))
    patch = torch.where(masks["vision.patch"], dense["vision.patch"].to(dtype), 0)
    assert torch.equal(model.vision["patch"].weight.cpu(), patch.to(dtype))
    assert torch.equal(model.head.weight, untouched)
    assert masks.verify(model, ADAPTER) == []
    for parameter in model.parameters():
        assert (parameter.dtype, parameter.device.type) == (dtype, device)
        assert parameter.requires_grad
        assert parameter.grad_fn is None


def test_ties_stay_one_object():
    model = Pretraining()
    parameter = model.encoder["ffn"].weight

    valued_masks(model)[0].apply(model, ADAPTER)

    assert model.encoder["ffn"].weight is model.decoder["ffn"].weight is parameter


def test_weights_that_are_not_contiguous_get_their_values_by_position():
    model = Pretraining().to(memory_format=torch.channels_last)
    model.vision["ffn"].weight = torch.nn.Parameter(torch.randn(5, 3).t())
    masks, dense = valued_masks(model)

    masks.apply(model, ADAPTER)

    for name, layer in (("vision.patch", "patch"), ("vision.ffn", "ffn")):
        weight = model.vision[layer].weight
        assert torch.equal(weight, torch.where(masks[name], dense[name], 0))
    assert not model.vision["ffn"].weight.is_contiguous()


def test_without_values_the_kept_weights_stay_bit_for_bit():
    model, other = Pretraining(), Pretraining()
    other.load_state_dict(model.state_dict())
    masks, _ = valued_masks(model)

    masks.apply(model, ADAPTER, values=False)
    random_masks(other).apply(other, ADAPTER)

    found = model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in other.state_dict().items())


def test_a_downstream_model_and_its_copies_get_the_values_of_their_masks():
    masks, dense = valued_masks(Pretraining())
    model = Captioning()

    masks.apply(model, ADAPTER)

    for weight, name in (
        (model.lm["cross"].weight, "text.ffn"),  # a copy of it
        (model.lm["out"].weight, "text.out"),
        (model.tower["ffn"].weight, "vision.ffn"),
    ):
        assert torch.equal(weight, torch.where(masks[name], dense[name], 0))


def test_masks_that_do_not_fit_change_nothing():
    masks, _ = valued_masks(Pretraining())
    model = Pretraining(width=6)
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(MaskError, match=r"'vision\.ffn' is \[3, 5\]"):
        masks.apply(model, ADAPTER)

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_value_too_great_for_float16_is_refused_before_anything_changes():
    model = Pretraining()
    masks = random_masks(model)
    dense = {name: mask.float() for name, mask in masks.items()}
    dense["text.out"] *= 1e5
    masks = Masks.from_dense(dict(masks), masks.manifest, dense)
    half = copy.deepcopy(model).half()
    before = copy.deepcopy(half.state_dict())

    with pytest.raises(MaskError, match=r"'text\.out' is 1e\+05 in size.*float16.*bfloat16"):
        masks.apply(half, ADAPTER)

    assert all(torch.equal(value, before[name]) for name, value in half.state_dict().items())
    masks.apply(model.bfloat16(), ADAPTER)


def test_a_model_that_learned_since_is_overwritten_with_a_warning(caplog):
    model = Pretraining()
    masks, _ = valued_masks(model)
    with caplog.at_level(logging.WARNING, "vlp_plugins"):
        masks.apply(copy.deepcopy(model), ADAPTER)
        masks.apply(Captioning(), ADAPTER)  # of another structure: nobody can say
        assert not caplog.records

        with torch.no_grad():
            model.vision["ffn"].weight.add_(1)
        masks.apply(copy.deepcopy(model), ADAPTER, values=False)
        assert not caplog.records
        masks.apply(model, ADAPTER)

    (record,) = caplog.records
    assert "computed from other weights" in record.getMessage()
    assert "values=False" in record.getMessage()
    assert masks.manifest.weights_hash in record.getMessage()


def test_values_that_are_there_already_overwrite_nothing(caplog):
    model = Pretraining()
    masks, _ = valued_masks(model)
    masks.apply(model, ADAPTER)
    once = copy.deepcopy(model.state_dict())

    masks.apply(model, ADAPTER)

    assert not caplog.records
    assert all(torch.equal(value, once[name]) for name, value in model.state_dict().items())


def test_equality_and_repr_count_the_values():
    masks, _ = valued_masks(Pretraining())
    same, _ = valued_masks(Pretraining(), note="again")
    others, _ = valued_masks(Pretraining(), values_seed=2)
    without = random_masks(Pretraining())

    assert masks == same
    assert masks != others
    assert masks != without
    assert without != masks
    assert f"{4 * masks.kept} bytes of new weights" in repr(masks)
    assert "new weights" not in repr(without)
    assert (masks.manifest.schema, without.manifest.schema) == (2, 1)


def test_invert_drops_them():
    masks, _ = valued_masks(Pretraining())

    assert masks.invert().new_values is None
    assert masks.invert() == random_masks(Pretraining()).invert()
    assert masks.invert().manifest.schema == 1


def test_values_and_masks_must_speak_of_the_same_elements():
    masks, dense = valued_masks(Pretraining())
    bits, kept = masks.packed, masks.new_values
    missing = {name: value for name, value in kept.items() if name != "text.ffn"}
    whole = {name: value for name, value in dense.items() if name != "text.ffn"}

    with pytest.raises(MaskError, match=r"new values of 'text\.ffn' are missing"):
        Masks(bits, masks.manifest, missing)
    with pytest.raises(MaskError, match=r"new values of 'extra', but no mask"):
        Masks(bits, masks.manifest, {**kept, "extra": kept["text.ffn"]})
    with pytest.raises(MaskError, match=r"'text\.ffn' are torch\.float32 \[7, 3\] instead of"):
        Masks(bits, masks.manifest, {**kept, "text.ffn": dense["text.ffn"]})
    with pytest.raises(MaskError, match=r"'text\.ffn' are torch\.float64"):
        Masks(bits, masks.manifest, {**kept, "text.ffn": kept["text.ffn"].double()})
    with pytest.raises(MaskError, match=r"new values of 'text\.ffn' are missing"):
        Masks.from_dense(dict(masks), masks.manifest, whole)
    with pytest.raises(MaskError, match=r"new values of 'extra', but no mask"):
        Masks.from_dense(dict(masks), masks.manifest, {**dense, "extra": dense["text.ffn"]})
    with pytest.raises(MaskError, match=r"'text\.ffn' are \[3, 7\], but its mask is \[7, 3\]"):
        Masks.from_dense(dict(masks), masks.manifest, {**dense, "text.ffn": dense["text.ffn"].t()})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_only_kept_values_must_be_finite(bad):
    masks, dense = valued_masks(Pretraining())
    mask = masks["text.ffn"]
    removed = {**dense, "text.ffn": torch.where(mask, dense["text.ffn"], bad)}
    kept = {**dense, "text.ffn": torch.where(mask, bad, dense["text.ffn"])}

    assert Masks.from_dense(dict(masks), masks.manifest, removed) == masks
    count = int(mask.sum())
    with pytest.raises(MaskError, match=rf"{count} of {count} new values of 'text\.ffn'"):
        Masks.from_dense(dict(masks), masks.manifest, kept)


@given(seeds=st.tuples(st.integers(0, 50), st.integers(0, 50)))
@settings(max_examples=30, deadline=None)
def test_the_distance_is_that_of_a_naive_loop_over_what_both_keep(seeds):
    one, first = valued_masks(Pretraining(), seed=seeds[0])
    two, second = valued_masks(Pretraining(), seed=seeds[1], values_seed=2)

    found = distances(one, two)

    assert list(found) == ["vision", "text", "all"]
    for group, distance in found.items():
        apart = size = 0.0
        for name in one:
            if group not in ("all", one.manifest.weights[name]["modality"]):
                continue
            both = (one[name] & two[name]).flatten().tolist()
            values = zip(first[name].flatten(), second[name].flatten(), both, strict=True)
            for a, b, kept in values:
                if kept:
                    apart += (float(a) - float(b)) ** 2
                    size += float(a) ** 2
        expected = math.sqrt(apart / size) if size else 0.0
        assert distance == pytest.approx(expected)
    assert set(distances(one, one).values()) == {0.0}


def test_masks_without_values_have_no_distance():
    masks, _ = valued_masks(Pretraining())

    with pytest.raises(MaskError, match="both bring new weights"):
        distances(masks, random_masks(Pretraining()))
    with pytest.raises(MaskError, match="different structures"):
        distances(masks, valued_masks(Captioning())[0])
