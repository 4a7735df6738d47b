"""Folders of pruned models: shard by shard as `save_pretrained` has them, or not at all."""

import errno
import json
import shutil
import sys

import pytest
import torch
from chat_models import qwen, save_qwen
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from vlp_command import command

import vlp_plugins
from vlp_plugins.loading import load_model
from vlp_plugins.masks import apply as application
from vlp_plugins.models import saving
from vlp_plugins.runtime.errors import OutputError, UnsupportedError
from vlp_plugins.runtime.mapped import untouched

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere models are held")
INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path):
    """A chat model's folder with several shards."""
    folder = save_qwen(tmp_path / "dense")
    (folder / "model.safetensors").unlink()
    qwen().to(torch.bfloat16).save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def loaded(folder):
    return vlp_plugins.load(folder, device="cpu")


def same_values(one, two):
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def saved_as_transformers_does(model, masks, folder):
    masks.apply(model)
    model.save_pretrained(folder)
    return loaded(folder)


@pytest.mark.parametrize("method", ["omp", "sparsegpt"])
def test_shards_have_the_bits_that_save_pretrained_has(method, sharded, tmp_path):
    model = loaded(sharded)
    batches = [
        {"input_ids": torch.randint(10, 200, (2, 12)), "attention_mask": torch.ones(2, 12).long()}
        for _ in range(3)
    ]
    only_text = vlp_plugins.prune(
        model, batches, method=method, sparsity=0.5, adapter=_text_only(model)
    )
    only_text.save_model(model, tmp_path / "pruned", _text_only(model))
    assert all(untouched(p for p in model.parameters() if p.ndim))
    written = loaded(tmp_path / "pruned")
    assert only_text.verify(written, _text_only(written)) == []
    only_text.apply(model, _text_only(model))
    model.save_pretrained(tmp_path / "theirs")
    assert same_values(written, loaded(tmp_path / "theirs"))
    assert same_values(written, model)


def _text_only(model):
    from vlp_adapters.transformers.adapter import TransformersAdapter

    return TransformersAdapter(exclude=["visual"])


def test_names_index_generation_and_processor_files_are_those_of_the_source(sharded, tmp_path):
    model = loaded(sharded)
    vlp_plugins.prune(model, method="omp", sparsity=0.5).save_model(model, tmp_path / "pruned")
    names = {path.name for path in sharded.iterdir()}
    assert {path.name for path in (tmp_path / "pruned").iterdir()} == names | {"vlp_pruned.json"}
    for name in names:
        one, other = (folder / name for folder in (sharded, tmp_path / "pruned"))
        assert one.stat().st_size == other.stat().st_size
        assert one.stat().st_mode == other.stat().st_mode
        if not name.endswith(".safetensors"):
            assert one.read_bytes() == other.read_bytes()


def test_a_shard_whose_tensors_the_class_leaves_out_comes_along(sharded, tmp_path):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["extra.weight"] = "extra.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    save_file({"extra.weight": torch.ones(3)}, sharded / "extra.safetensors", {"format": "pt"})
    save_file({"other.weight": torch.ones(3)}, sharded / "other.safetensors")
    model = loaded(sharded)
    masks = vlp_plugins.prune(model, method="omp", sparsity=0.5)
    masks.save_model(model, tmp_path / "pruned")
    assert masks.verify(loaded(tmp_path / "pruned")) == []
    extra = [
        (folder / "extra.safetensors").read_bytes() for folder in (sharded, tmp_path / "pruned")
    ]
    assert extra[0] == extra[1]
    assert not (tmp_path / "pruned" / "other.safetensors").exists()


def test_tied_and_transposed_weights_are_written_once_and_right(tmp_path):
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "dense", max_shard_size="30KB")
    model = loaded(tmp_path / "dense")
    assert model.lm_head.weight is model.transformer.wte.weight
    masks = vlp_plugins.prune(model, method="omp", sparsity=0.5)
    masks.save_model(model, tmp_path / "pruned")
    expected = saved_as_transformers_does(model, masks, tmp_path / "theirs")
    assert same_values(loaded(tmp_path / "pruned"), expected)


def test_what_was_trained_since_it_was_loaded_is_written_too(sharded, tmp_path):
    model = loaded(sharded)
    with torch.no_grad():
        model.lm_head.weight[3] = 5.0
        model.model.language_model.norm.weight.fill_(2.0)
    masks = vlp_plugins.prune(model, method="omp", sparsity=0.5)
    masks.save_model(model, tmp_path / "pruned")
    written = loaded(tmp_path / "pruned")
    masks.apply(model)
    assert same_values(written, model)


def test_a_model_with_values_of_its_own_is_saved_and_stays_dense(sharded, tmp_path):
    model = loaded(sharded).float()
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    masks = vlp_plugins.prune(model, method="omp", sparsity=0.5)
    masks.save_model(model, tmp_path / "pruned")
    assert all(torch.equal(dense[name], value) for name, value in model.state_dict().items())
    written = loaded(tmp_path / "pruned")
    assert masks.verify(written) == []
    assert next(written.parameters()).dtype == torch.float32


def test_the_commands_write_the_same_shards(sharded, tmp_path):
    command("prune", "--model", sharded, "--method", "omp", "--sparsity", "0.5", "--save-model",
        "--out", tmp_path / "run")  # fmt: skip
    command("masks", "apply", tmp_path / "run" / "masks-0.5.safetensors", sharded,
        "--out", tmp_path / "applied")  # fmt: skip
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    for name in shards:
        one = (tmp_path / "run" / "model-0.5" / name).read_bytes()
        assert one == (tmp_path / "applied" / name).read_bytes()
        assert len(one) == (sharded / name).stat().st_size
    command("masks", "verify", tmp_path / "run" / "masks-0.5.safetensors", tmp_path / "applied")


def test_a_disk_that_is_too_small_is_told_before_any_work(sharded, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    model = loaded(sharded)
    masks = vlp_plugins.prune(model, method="omp", sparsity=0.5)
    monkeypatch.setattr(application, "write_pruned", None)  # it is not reached
    with pytest.raises(OutputError, match=r"pruned will take .* kB, and its disk has 1.00 kB"):
        masks.save_model(model, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


def test_a_disk_that_becomes_full_leaves_nothing(sharded, tmp_path, monkeypatch):
    model = loaded(sharded)
    masks = vlp_plugins.prune(model, method="omp", sparsity=0.5)
    calls = []

    def full(*_):
        calls.append(1)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "_copy", full)
    with pytest.raises(OutputError, match="no space left on the disk"):
        masks.save_model(model, tmp_path / "pruned")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    assert same_values(model, loaded(sharded))


def _without_a_shard(folder, shard):
    shard.unlink()


def _with_half_a_shard(folder, shard):
    content = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(content[: len(content) // 2])


def _with_a_wrong_index(folder, shard):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = "nowhere.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (_without_a_shard, r"lacks 1 of the \d+ shards that .* \(first: model-00002-of-.*copy it"),
        (_with_half_a_shard, r"model-00002-of-.* is truncated: it has [\d,]+ of [\d,]+ bytes; cop"),
        (_with_a_wrong_index, r"lacks 1 of the .* \(first: nowhere.safetensors\); copy it again"),
    ],
)
def test_shards_that_are_not_there_are_named(damage, text, sharded):
    damage(sharded, sorted(sharded.glob("*.safetensors"))[1])
    with pytest.raises(UnsupportedError, match=text):
        loaded(sharded)


def test_a_number_format_that_does_not_fit_is_refused(sharded, monkeypatch):
    monkeypatch.setattr("vlp_plugins.loading.free_ram", lambda: 1000)
    assert isinstance(loaded(sharded), nn.Module)  # views of files take nothing
    with pytest.raises(UnsupportedError, match=r"in float32 takes .* KiB, and 1000 bytes of mem"):
        load_model(str(sharded), dtype="float32", device="cpu")
