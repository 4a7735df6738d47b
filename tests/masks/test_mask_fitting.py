"""Masks on models: applied to any model that they fit, changing nothing else, and verified."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from toy_masks import ADAPTER, Captioning, Pretraining, random_masks

from vlp_plugins.masks.compare import distances
from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import MaskError

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_apply_zeroes_exactly_what_is_removed_and_keeps_the_rest_bit_for_bit(dtype, device):
    model = Pretraining().to(dtype).to(device)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = random_masks(model)

    masks.apply(model, ADAPTER)

    expected = before["encoder.ffn.weight"] * masks["text.ffn"].to(device)
    assert torch.equal(model.encoder["ffn"].weight, expected)
    patch = before["vision.patch.weight"] * masks["vision.patch"].to(device)
    assert torch.equal(model.vision["patch"].weight, patch)
    assert torch.equal(model.head.weight, before["head.weight"])
    assert torch.equal(model.encoder["ffn"].bias, before["encoder.ffn.bias"])
    for parameter in model.parameters():
        assert (parameter.dtype, parameter.device.type) == (dtype, device)
        assert parameter.requires_grad
        assert parameter.grad_fn is None


def test_ties_stay_one_object():
    model = Pretraining()
    parameter = model.encoder["ffn"].weight

    random_masks(model).apply(model, ADAPTER)

    assert model.encoder["ffn"].weight is model.decoder["ffn"].weight is parameter


def test_applying_twice_is_applying_once():
    model = Pretraining()
    masks = random_masks(model)
    masks.apply(model, ADAPTER)
    once = copy.deepcopy(model.state_dict())

    masks.apply(model, ADAPTER)

    assert all(torch.equal(value, once[name]) for name, value in model.state_dict().items())


def test_a_removed_infinity_becomes_zero_and_no_zero_is_negative():
    model = Pretraining()
    masks = random_masks(model, density=0.0)
    with torch.no_grad():
        model.vision["ffn"].weight.fill_(-math.inf)

    masks.apply(model, ADAPTER)

    weight = model.vision["ffn"].weight
    assert torch.equal(weight, torch.zeros_like(weight))
    assert not torch.signbit(weight).any()


def test_weights_that_are_not_contiguous_are_masked_by_position():
    model = Pretraining().to(memory_format=torch.channels_last)
    before = model.vision["patch"].weight.detach().clone()
    masks = random_masks(model)

    masks.apply(model, ADAPTER)

    assert torch.equal(model.vision["patch"].weight, before * masks["vision.patch"])


def test_masks_transfer_to_a_downstream_model_and_its_copies():
    masks = random_masks(Pretraining())
    model = Captioning()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    masks.apply(model, ADAPTER)

    copied = model.lm["cross"].weight  # not in the masks: inherits what text.ffn has
    assert torch.equal(copied, before["lm.cross.weight"] * masks["text.ffn"])
    assert torch.equal(model.tower["ffn"].weight, before["tower.ffn.weight"] * masks["vision.ffn"])
    assert masks.match(WeightMap.of(model, ADAPTER))["caption.cross"] == "text.ffn"
    assert masks.verify(model, ADAPTER) == []


def test_a_mask_of_its_own_comes_before_an_inherited_one():
    model = Captioning()
    own = random_masks(model, seed=5)

    assert own.match(WeightMap.of(model, ADAPTER))["caption.cross"] == "caption.cross"


def test_masks_of_another_structure_are_refused_before_anything_changes():
    masks = random_masks(Pretraining())
    model = Pretraining(width=6)
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(MaskError, match=r"'vision\.ffn' is \[3, 5\], but the weight is \[3, 6\]"):
        masks.apply(model, ADAPTER)
    with pytest.raises(MaskError, match=r"'vision\.ffn'"):
        masks.verify(model, ADAPTER)

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_weight_without_mask_is_named_with_its_path():
    masks = random_masks(Captioning())
    model = Pretraining()
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(MaskError, match=r"none for 'text\.ffn' .* at encoder\.ffn\.weight"):
        masks.apply(model, ADAPTER)

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Stack(nn.Module):
    """As many equal layers as asked for, and a head of another kind."""

    def __init__(self, depth, *, head=True):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"ffn": nn.Linear(4, 4)}) for _ in range(depth))
        if head:
            self.head = nn.Linear(4, 2)


def stack_masks(depth):
    model = Stack(depth)
    weights = WeightMap.of(model, ModuleAdapter(model))
    dense = {name: torch.rand(weight.shape) < 0.5 for name, weight in weights.items()}
    return Masks.from_dense(dense, Manifest.for_weights(weights, method="toy"))


def test_masks_of_a_deeper_model_are_refused():
    masks, shallow = stack_masks(4), Stack(2)
    before = copy.deepcopy(shallow.state_dict())

    for use in (masks.apply, masks.verify):
        with pytest.raises(
            MaskError, match=r"have 'layers\.2\.ffn' \[4, 4\], which the model lacks"
        ):
            use(shallow)

    assert all(torch.equal(value, before[name]) for name, value in shallow.state_dict().items())


def test_a_model_may_lack_a_whole_kind_of_weight():
    masks, headless = stack_masks(2), Stack(2, head=False)

    masks.apply(headless)

    assert masks.verify(headless) == []


def test_masks_in_the_names_of_another_adapter_are_refused():
    masks, model = stack_masks(2), Stack(2)
    stranger = ModuleAdapter(model, name="stranger")

    with pytest.raises(MaskError, match="made with adapter 'module', but .* adapter 'stranger'"):
        masks.apply(model, stranger)


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = Pretraining()
    masks = random_masks(Pretraining())

    with pytest.raises(MaskError, match="meta device"):
        masks.apply(model, ADAPTER)


@pytest.mark.parametrize("registered", ["toy", "under another name"])
def test_without_an_adapter_the_registered_ones_are_asked(monkeypatch, registered):
    class OneAdapter:
        def adapter_names(self):
            return [registered]

        def adapter(self, name):
            return ADAPTER

        def adapter_for(self, model):
            return ADAPTER

    monkeypatch.setattr("vlp_plugins.models.discovery.registry", OneAdapter)
    model = Pretraining()
    masks = random_masks(model)

    masks.apply(model)

    assert masks.verify(model) == []


def test_masks_of_any_module_remember_how_it_was_described(tmp_path):
    model = Stack(3)
    adapter = ModuleAdapter(
        model, exclude=r"layers\.0", modalities={"head": "task"}, tokens={"layers": None}
    )
    prune(model, method="magnitude", sparsity=0.5, adapter=adapter).save(tmp_path / "masks")
    masks = Masks.load(tmp_path / "masks")

    masks.apply(model)

    assert masks.verify(model) == []
    assert list(masks) == ["layers.1.ffn", "layers.2.ffn", "head"]
    assert masks.manifest.adapter_settings == adapter.settings()


def test_a_module_that_the_remembered_settings_do_not_fit_is_refused():
    model = Stack(1)
    adapter = ModuleAdapter(model, exclude="head")
    masks = prune(model, method="magnitude", sparsity=0.5, adapter=adapter)

    with pytest.raises(
        MaskError, match=r"do not fit Stack: .*exclude=\['head'\].* no layer's path"
    ):
        masks.apply(Stack(1, head=False))


def test_verify_counts_revived_weights_by_weight():
    model = Pretraining()
    masks = random_masks(model)
    masks.apply(model, ADAPTER)
    assert masks.verify(model, ADAPTER) == []

    removed = torch.nonzero(~masks["text.out"])[:2]
    with torch.no_grad():
        model.decoder["out"].weight[tuple(removed[0])] = 1e-30
        model.decoder["out"].weight[tuple(removed[1])] = math.nan

    (violation,) = masks.verify(model, ADAPTER)
    assert (violation.weight, violation.path) == ("text.out", "decoder.out.weight")
    assert violation.revived == 2
    assert violation.removed == masks.counts().by_weight["text.out"].removed


def test_a_dense_model_violates_everything_that_is_removed():
    model = Pretraining()
    masks = random_masks(model)

    revived = {violation.weight: violation.revived for violation in masks.verify(model, ADAPTER)}

    assert revived == {n: c.removed for n, c in masks.counts().by_weight.items() if c.removed}


def test_apply_changes_no_module_and_leaves_no_hook():
    model = Pretraining()
    modules = [type(module) for module in model.modules()]

    random_masks(model).apply(model, ADAPTER)

    assert [type(module) for module in model.modules()] == modules
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_masks_of_two_families_are_not_compared_though_their_names_and_shapes_are_alike():
    masks = random_masks(Pretraining())
    other = Masks(dict(masks.packed), replace(masks.manifest, adapter="other"))
    with pytest.raises(MaskError, match="of adapter 'toy', the second of one of adapter 'other'"):
        masks.compare(other)
    with pytest.raises(MaskError, match="compare masks of one family"):
        distances(masks, other)
