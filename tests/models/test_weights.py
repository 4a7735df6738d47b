"""A weight exists once, however many names and modules it has."""

import pytest
import torch
from torch import nn

from vlp_plugins.models.adapter import Adapter, Owner, WeightSpec
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import NonFiniteError, TieError, UnsupportedError


class Listed(Adapter):
    """Declares the given specs."""

    name = "listed"

    def __init__(self, *specs):
        self.specs = specs

    def claims(self, model):
        return True

    def weights(self, model):
        return self.specs

    def streams(self, model, batch, *, published=False):
        return iter(())


def spec(name, *modules, modality="model"):
    return WeightSpec(name, modality, 0, tuple(Owner(module, "text") for module in modules))


def towers():
    model = nn.ModuleDict({key: nn.Linear(4, 3) for key in ("encoder", "decoder", "head")})
    model["decoder"].weight = model["encoder"].weight
    return model


def test_owners_that_share_a_parameter_are_one_weight_with_all_its_names():
    weights = WeightMap.of(towers(), Listed(spec("text", "encoder", "decoder"), spec("h", "head")))

    assert list(weights) == ["text", "h"]
    assert weights["text"].aliases == ("encoder.weight", "decoder.weight")
    assert weights.numel == 24


def test_two_declarations_of_one_parameter_merge_under_the_first_name():
    weights = WeightMap.of(towers(), Listed(spec("a", "encoder"), spec("b", "decoder")))

    assert list(weights) == ["a"]
    assert [owner.module for owner in weights["a"].owners] == ["encoder", "decoder"]


def test_parameters_that_view_the_same_memory_are_tied_too():
    model = towers()
    model["head"].weight = nn.Parameter(model["encoder"].weight.data)

    assert list(WeightMap.of(model, Listed(spec("a", "encoder"), spec("b", "head")))) == ["a"]


def test_a_partial_overlap_is_an_error_that_names_both():
    model = towers()
    store = torch.zeros(20)
    model["encoder"].weight = nn.Parameter(store[:12].view(3, 4))
    model["head"].weight = nn.Parameter(store[8:].view(3, 4))

    with pytest.raises(TieError, match="'a' and 'b' share part of their memory"):
        WeightMap.of(model, Listed(spec("a", "encoder"), spec("b", "head")))


def test_a_lost_tie_is_an_error_that_names_both_paths():
    model = towers()
    model["decoder"].weight = nn.Parameter(model["encoder"].weight.detach().clone())

    with pytest.raises(TieError, match=r"encoder.weight and decoder.weight are no longer tied"):
        WeightMap.of(model, Listed(spec("text", "encoder", "decoder")))


def test_a_path_that_does_not_exist_names_the_adapter_s_claim():
    with pytest.raises(UnsupportedError, match=r"declares 'a' at nowhere.weight"):
        WeightMap.of(towers(), Listed(spec("a", "nowhere")))
    with pytest.raises(UnsupportedError, match="no prunable weight"):
        WeightMap.of(towers(), Listed())


def test_structure_depends_on_names_and_shapes_alone():
    declared = Listed(spec("a", "encoder"), spec("h", "head"))
    one, other = WeightMap.of(towers(), declared), WeightMap.of(towers(), declared)
    renamed = WeightMap.of(towers(), Listed(spec("a", "encoder"), spec("head", "head")))

    assert one.structure == other.structure != renamed.structure
    assert one.content_hash() != other.content_hash()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_element_and_the_order_of_the_weights_is_in_their_hash(dtype):
    model = nn.Sequential(nn.Linear(3, 5, dtype=dtype))  # 15 elements: no whole 64-bit words
    weights = WeightMap.of(model, Listed(spec("a", "0")))
    known = weights.content_hash()
    data = model[0].weight.data

    for index in range(15):
        value = data.view(-1)[index].clone()
        data.view(-1)[index] = value + 1
        assert weights.content_hash() != known
        data.view(-1)[index] = value
    data.copy_(data.flip(0))
    assert weights.content_hash() != known
    data.copy_(data.flip(0))
    assert weights.content_hash() == known


def test_equal_weights_have_equal_hashes_however_they_lie_in_memory():
    weight = torch.randn(3, 5000)
    transposed = weight.T.contiguous().T
    unaligned = torch.cat([torch.zeros(1), weight.flatten()])[1:].view(3, 5000)  # to 64-bit words
    model = nn.Sequential(nn.Linear(5000, 3))
    hashes = set()
    for same in (weight, transposed, unaligned):
        model[0].weight = nn.Parameter(same)
        hashes.add(WeightMap.of(model, Listed(spec("a", "0"))).content_hash())

    assert len(hashes) == 1


def test_a_weight_with_nan_is_named():
    model = towers()
    with torch.no_grad():
        model["head"].weight[1, 1] = float("nan")

    with pytest.raises(NonFiniteError, match=r"weight 'h' \(head.weight\) has 1 NaN"):
        WeightMap.of(model, Listed(spec("a", "encoder"), spec("h", "head"))).check_finite()


def test_a_weight_that_float32_cannot_hold_is_named():
    model = towers().double()
    with torch.no_grad():
        model["head"].weight[1, 1] = 1e60

    with pytest.raises(NonFiniteError, match=r"weight 'h' .* has 1 elements above 3.4e\+38"):
        WeightMap.of(model, Listed(spec("h", "head"))).check_finite()


def test_a_convolution_is_a_matrix_of_output_channels():
    model = nn.Sequential(nn.Conv2d(3, 5, 2))
    weight = WeightMap.of(model, Listed(spec("conv", "0")))["conv"]

    assert weight.matrix.shape == (5, 12)
    assert weight.matrix.data_ptr() == model[0].weight.data_ptr()
