"""Compact sparse checkpoints: every bit comes back, they are small, and damage is told of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, ViTConfig, ViTModel

from vlp_plugins.loading import load_model
from vlp_plugins.masks.sparse import (
    SPARSE_FILE,
    is_sparse,
    kept_bits,
    kept_values,
    load_sparse,
    mismatch,
    packed_bytes,
    save_sparse,
    unpacked,
)
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import MaskError, OutputError, UnsupportedError
from vlp_plugins.structured.cuts import cut
from vlp_plugins.structured.record import Kept

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def vit(dtype=torch.float32, width=32):
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
    config = ViTConfig(**sizes, num_attention_heads=2, image_size=16, patch_size=8)
    return ViTModel(config).to(dtype).eval()


def pruned(sparsity=0.75, dtype=torch.float32):
    model = vit(dtype)
    masks = prune(model, method="omp", sparsity=sparsity)
    masks.apply(model)
    return model, masks


class Tied(nn.Module):
    """No model of transformers: two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.norm = nn.Linear(16, 16), nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.two.weight = self.one.weight


def bits_of(tensor):
    """Integers, because a negative zero equals a zero and NaN equals nothing."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.element_size()])


def same(one, two):
    first, second = one.state_dict(), two.state_dict()
    assert list(first) == list(second)
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        assert torch.equal(bits_of(value), bits_of(second[name])), name
    return True


@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.5, -2.0, float("inf"), float("nan")]), max_size=40),
    st.sampled_from(DTYPES),
)
@settings(max_examples=60, deadline=None)
def test_bits_and_values_are_the_tensor(elements, dtype):
    tensor = torch.tensor(elements, dtype=dtype)
    bits = kept_bits(tensor)
    values = kept_values(tensor, bits)

    again = unpacked(bits, values, tensor.shape)

    assert torch.equal(bits_of(again), bits_of(tensor))
    assert mismatch(bits, values, tensor.shape) is None
    assert len(values) == sum(not (e == 0 and str(e) == "0.0") for e in elements)
    assert packed_bytes(tensor, bits) == bits.numel() + values.numel() * values.element_size()


def test_a_transposed_tensor():
    tensor = torch.arange(12.0).reshape(3, 4).t()
    bits = kept_bits(tensor)
    values = kept_values(tensor, bits)
    assert values.tolist() == tensor.reshape(-1)[1:].tolist()
    assert torch.equal(unpacked(bits, values, (4, 3)), tensor)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_every_bit_comes_back(dtype, tmp_path):
    model, masks = pruned(dtype=dtype)
    with torch.no_grad():
        model.embeddings.cls_token.fill_(-0.0)
    save_sparse(model, tmp_path / "m", masks=masks)

    found, adapter = load_sparse(tmp_path / "m")

    assert type(found) is ViTModel
    assert adapter.name == "vit"
    assert not found.training
    assert same(model, found)
    assert masks.verify(found, adapter) == []
    again, _ = load_sparse(tmp_path / "m", into=vit(dtype))
    assert same(model, again)
    through_all, _ = load_model(str(tmp_path / "m"), dtype=str(dtype)[6:], device="cpu")
    assert same(model, through_all)


@pytest.mark.parametrize(
    ("sparsity", "single", "half"), [(0.5, 0.54, 0.57), (0.75, 0.29, 0.32), (0.9, 0.14, 0.17)]
)
def test_pruned_weights_are_small(sparsity, single, half, tmp_path):
    for dtype, limit in ((torch.float32, single), (torch.bfloat16, half)):
        model, masks = pruned(sparsity, dtype)
        size = save_sparse(model, tmp_path / str(dtype), masks=masks)
        assert size.weights == len(masks)
        assert size.dense == sum(mask.numel() * dtype.itemsize for mask in masks.values())
        assert size.ratio <= limit
        file = tmp_path / str(dtype) / SPARSE_FILE
        assert size.file == file.stat().st_size
        with safe_open(file, framework="pt") as stored:
            parts = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        found = sum(
            t.numel() * t.element_size()
            for key, t in parts.items()
            if key.endswith((".bitmask", ".values"))
        )
        assert found == size.stored


def test_what_would_not_gain_is_stored_as_it_is(tmp_path):
    model = vit()
    size = save_sparse(model, tmp_path / "dense")
    assert (size.weights, size.ratio) == (0, 1.0)
    assert same(model, load_sparse(tmp_path / "dense")[0])


def test_any_module_with_its_ties_and_buffers_goes_into_another(tmp_path):
    model = Tied()
    adapter = ModuleAdapter(model)
    masks = prune(model, adapter=adapter, method="omp", sparsity=0.75)
    masks.apply(model)
    model.norm.running_mean.fill_(3.0)
    save_sparse(model, tmp_path / "m", masks=masks)
    fresh = Tied()
    tied = fresh.one.weight

    found, recalled = load_sparse(tmp_path / "m", into=fresh)

    assert found is fresh
    assert same(model, fresh)
    assert fresh.two.weight is fresh.one.weight is tied
    assert recalled.name == "module"
    with safe_open(tmp_path / "m" / SPARSE_FILE, framework="pt") as file:
        assert [key for key in file.keys() if "two.weight" in key] == []  # noqa: SIM118
    with pytest.raises(UnsupportedError, match=r"no config.json to make a Tied of.*into=model"):
        load_sparse(tmp_path / "m")


def test_it_goes_into_a_model_of_another_dtype(tmp_path):
    model, masks = pruned()
    save_sparse(model, tmp_path / "m", masks=masks)
    found, _ = load_sparse(tmp_path / "m", into=vit(torch.bfloat16))
    assert same(found, model.to(torch.bfloat16))


def test_the_header_says_where_it_comes_from(tmp_path):
    model, masks = pruned()
    save_sparse(model, tmp_path / "m", masks=masks)
    with safe_open(tmp_path / "m" / SPARSE_FILE, framework="pt") as file:
        header = json.loads(file.metadata()["vlp_sparse"])
    assert header["schema"] == 1
    assert header["made_by"].startswith("vlp_plugins")
    assert header["model"] == "ViTModel"
    assert header["masks"]["method"] == "omp"
    assert header["masks"]["structure"] == masks.manifest.structure
    assert "quantization_config" not in (tmp_path / "m" / "config.json").read_text()


@pytest.mark.parametrize("loader", [ViTModel, AutoModel])
def test_transformers_alone_refuses_the_folder(loader, tmp_path):
    model, masks = pruned()
    save_sparse(model, tmp_path / "m", masks=masks)
    assert is_sparse(tmp_path / "m")
    with pytest.raises(OSError, match="no file named model.safetensors"):
        loader.from_pretrained(tmp_path / "m")


def test_masks_that_are_not_applied_are_refused(tmp_path):
    model = vit()
    masks = prune(model, method="omp", sparsity=0.75)
    with pytest.raises(MaskError, match="apply them first"):
        save_sparse(model, tmp_path / "m", masks=masks)
    assert list(tmp_path.iterdir()) == []


def test_only_a_sparse_checkpoint_is_overwritten(tmp_path):
    model, masks = pruned()
    folder = tmp_path / "m"
    save_sparse(model, folder)
    with pytest.raises(OutputError, match="not empty"):
        save_sparse(model, folder)
    with torch.no_grad():
        model.embeddings.cls_token.fill_(7.0)

    save_sparse(model, folder, masks=masks, overwrite=True)

    assert same(model, load_sparse(folder)[0])
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_text("precious")
    with pytest.raises(OutputError, match="not empty"):
        save_sparse(model, tmp_path / "other", overwrite=True)


def test_meta_models_are_refused(tmp_path):
    with torch.device("meta"):
        model = vit()
    with pytest.raises(UnsupportedError, match="meta device"):
        save_sparse(model, tmp_path / "m")


def test_models_that_their_configuration_does_not_make_are_refused(tmp_path):
    model = vit()
    cut(model, registry().adapter_for(model), {"vision.0.mlp": Kept(units=(0, 3))})
    with pytest.raises(UnsupportedError, match="save_structured"):
        save_sparse(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_nothing_goes_into_a_model_without_memory(tmp_path):
    save_sparse(pruned()[0], tmp_path / "m")
    with torch.device("meta"):
        model = vit()
    with pytest.raises(UnsupportedError, match="meta device"):
        load_sparse(tmp_path / "m", into=model)


def broken(folder: Path, change) -> str:
    """The error that loading gives after something happened to the file."""
    path = folder / SPARSE_FILE
    good = path.read_bytes()
    path.write_bytes(change(good))
    try:
        load_sparse(folder)
    except UnsupportedError as error:
        return str(error)
    finally:
        path.write_bytes(good)
    return "no error"


def test_damaged_files_are_told_of(tmp_path):
    model, masks = pruned()
    folder = tmp_path / "m"
    save_sparse(model, folder, masks=masks)
    flipped = broken(folder, lambda b: b[:-3] + bytes([b[-3] ^ 1]) + b[-2:])
    assert "checksum differs" in flipped
    assert "copy the whole folder again" in flipped
    for change in (lambda b: b[:-7], lambda b: b[:50], lambda b: b""):
        assert "damaged, truncated" in broken(folder, change)
    newer = broken(folder, lambda b: b.replace(b'schema\\": 1', b'schema\\": 9'))
    assert "upgrade vlp-plugins" in newer
    lying = broken(folder, lambda b: b.replace(b"[32, 64]", b"[32, 63]", 1))
    assert "is damaged" in lying
    assert "bits" in lying
    model.save_pretrained(tmp_path / "plain")
    foreign = (tmp_path / "plain" / "model.safetensors").read_bytes()
    assert "not a sparse checkpoint file" in broken(folder, lambda _: foreign)
    (folder / SPARSE_FILE).unlink()
    with pytest.raises(UnsupportedError, match="is not a file"):
        load_sparse(folder)


def test_another_model_is_refused_and_stays_as_it_is(tmp_path):
    model, masks = pruned()
    save_sparse(model, tmp_path / "m", masks=masks)
    wider, other = vit(width=48), Tied()
    before = wider.state_dict()["embeddings.cls_token"].clone()
    with pytest.raises(UnsupportedError, match="another model"):
        load_sparse(tmp_path / "m", into=wider)
    assert torch.equal(wider.state_dict()["embeddings.cls_token"], before)
    with pytest.raises(UnsupportedError, match=r"lacks 8 tensors, first norm.bias"):
        load_sparse(tmp_path / "m", into=other)
    config = tmp_path / "m" / "config.json"
    config.write_text(
        config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1')
    )
    with pytest.raises(UnsupportedError, match="which the model lacks"):
        load_sparse(tmp_path / "m")


def test_untied_layers_do_not_take_what_was_tied(tmp_path):
    model = Tied()
    save_sparse(model, tmp_path / "m", adapter=ModuleAdapter(model))
    untied = Tied()
    untied.two.weight = nn.Parameter(untied.two.weight.detach().clone())
    with pytest.raises(UnsupportedError, match="ties are others"):
        load_sparse(tmp_path / "m", into=untied)
