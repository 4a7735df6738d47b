"""A cut model computes what the whole one does with the same rows and columns at zero."""

from __future__ import annotations

import pytest
import torch
from structured_examples import MAKERS, made, prepared, random_record

from vlp_plugins.models.discovery import registry
from vlp_plugins.models.parts import Attention
from vlp_plugins.runtime.errors import StructureError
from vlp_plugins.structured.check import check_equal, example_batch, outputs, relative_error
from vlp_plugins.structured.cuts import cut, masked, prepare
from vlp_plugins.structured.record import Kept, Record
from vlp_plugins.structured.survey import blocks_of


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", MAKERS)
def test_a_cut_model_equals_the_masked_one(name: str, seed: int) -> None:
    model, adapter = prepared(name)
    batch = example_batch(model, adapter)
    record = random_record(model, adapter, seed)
    whole = outputs(model, adapter, batch)
    with masked(model, adapter, record):
        expected = outputs(model, adapter, batch)
    size = sum(parameter.numel() for parameter in model.parameters())

    cut(model, adapter, record)

    found = outputs(model, adapter, batch)
    check_equal(expected, found)
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.85 * size
    with pytest.raises(StructureError, match="computes something else"):
        check_equal(whole, found)


@pytest.mark.parametrize("name", MAKERS)
def test_every_block_has_the_sizes_of_the_record(name: str) -> None:
    model, adapter = prepared(name)
    record = random_record(model, adapter)
    before = {block.name: block for block in blocks_of(model, adapter)}
    cut(model, adapter, record)
    for block in blocks_of(model, adapter):
        kept, old = record[block.name], before[block.name]
        if isinstance(block, Attention) and isinstance(old, Attention):
            assert block.heads == (old.heads if kept.heads is None else len(kept.heads))
            assert block.head_dim == (old.head_dim if kept.dims is None else len(kept.dims[0]))
        else:
            assert kept.units is not None
            assert block.width == len(kept.units)
        for part in block.inner:
            assert model.get_submodule(part.path).weight.shape[0] == block.width
        assert model.get_submodule(block.output.path).weight.shape[1] == block.width


@pytest.mark.parametrize("name", [name for name in MAKERS if name.startswith("blip")])
def test_splitting_changes_nothing_and_happens_once(name: str) -> None:
    model = made(name)
    adapter = registry().adapter_for(model)
    batch = example_batch(model, adapter)
    expected = outputs(model, adapter, batch)
    prepare(model, adapter)
    check_equal(expected, outputs(model, adapter, batch))
    modules = list(model.modules())
    prepare(model, adapter)
    assert all(old is new for old, new in zip(modules, model.modules(), strict=True))


def test_masking_gives_back_every_value() -> None:
    model, adapter = prepared("blip pre-training")
    before = {name: p.clone() for name, p in model.named_parameters()}

    def fail() -> None:
        with masked(model, adapter, random_record(model, adapter)):
            assert any(not torch.equal(before[n], p) for n, p in model.named_parameters())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_two_cuts_are_one_cut_by_the_composed_record() -> None:
    model, adapter = prepared("blip retrieval")
    batch = example_batch(model, adapter)
    first = random_record(model, adapter, seed=1)
    cut(model, adapter, first)
    second = random_record(model, adapter, seed=2)
    cut(model, adapter, second)

    other, _ = prepared("blip retrieval")
    cut(other, adapter, first.compose(second))
    check_equal(outputs(other, adapter, batch), outputs(model, adapter, batch), 1e-6)


@pytest.mark.parametrize("name", ["vit", "clip", "siglip", "xvlm", "blip retrieval"])
def test_a_forgotten_head_size_is_caught(name: str) -> None:
    """The trap: the layers fit, the model runs, and what it computes is wrong."""
    model, adapter = prepared(name)
    batch = example_batch(model, adapter)
    block = next(block for block in blocks_of(model, adapter) if isinstance(block, Attention))
    half = tuple(range(block.head_dim // 2))
    record = Record({block.name: Kept(dims=(half,) * block.heads)})
    with masked(model, adapter, record):
        expected = outputs(model, adapter, batch)
    cut(model, adapter, record)
    check_equal(expected, outputs(model, adapter, batch))
    for path in block.modules:
        model.get_submodule(path).head_dim = block.head_dim
    with pytest.raises(StructureError, match=r"stream '\w+.*' differs"):
        check_equal(expected, outputs(model, adapter, batch))


def test_gradients_and_ties_of_a_cut_model() -> None:
    """Optimizers made later see the parameters that the model runs on."""
    model, adapter = prepared("vit classifier")
    parameters = list(model.parameters())
    cut(model, adapter, random_record(model, adapter))
    assert all(old is new for old, new in zip(parameters, model.parameters(), strict=True))
    model(**example_batch(model, adapter)).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "kept", "message"),
    [
        ("vision.0.attention", Kept(heads=(0, 4)), "no head 4, only 4"),
        ("vision.0.attention", Kept(dims=((0,), (1,))), "keeps 4 heads, but has dims of 2"),
        ("vision.0.attention", Kept(heads=(1,), dims=((9,),)), "no dimension 9, only 4"),
        ("vision.0.attention", Kept(units=(0,)), "is an attention block"),
        ("vision.0.mlp", Kept(units=(0, 24)), "no unit 24, only 24"),
        ("vision.0.mlp", Kept(heads=(0,)), "has no heads"),
        ("vision.0.mpl", Kept(units=(0,)), "did you mean 'vision.0.mlp'"),
    ],
)
def test_a_record_that_does_not_fit_changes_nothing(name: str, kept: Kept, message: str) -> None:
    model, adapter = prepared("vit")
    before = [parameter.shape for parameter in model.parameters()]
    fitting = Record({"vision.1.mlp": Kept(units=(0, 1))})
    with pytest.raises(StructureError, match=message):
        cut(model, adapter, Record({**fitting, name: kept}))
    assert before == [parameter.shape for parameter in model.parameters()]


def test_dimensions_that_positions_turn_stay_together() -> None:
    model, adapter = prepared("dino 3")
    with pytest.raises(StructureError, match="only whole heads can go"):
        cut(model, adapter, Record({"vision.0.attention": Kept(dims=((0, 1),) * 4)}))


def test_cutting_works_in_half_precision() -> None:
    model, adapter = prepared("blip retrieval")
    model = model.bfloat16()
    batch = example_batch(model, adapter)
    record = random_record(model, adapter)
    with masked(model, adapter, record):
        expected = outputs(model, adapter, batch)
    cut(model, adapter, record)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    found = outputs(model, adapter, batch)
    assert max(relative_error(expected[name], found[name]) for name in expected) < 0.1


def test_training_flags_are_as_before_after_a_comparison() -> None:
    model, adapter = prepared("clip")
    model.train()
    model.text_model.eval()
    flags = [module.training for module in model.modules()]
    outputs(model, adapter, example_batch(model, adapter))
    assert flags == [module.training for module in model.modules()]
