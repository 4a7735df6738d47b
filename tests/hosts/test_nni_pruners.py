"""Every method as a pruner of NNI: the same masks as without NNI, and a plain model at the end."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("nni", reason="the host is an extra")

import nni_examples as examples
from nni.compression.base.compressor import Pruner
from nni.compression.pruning import LevelPruner
from torch import nn
from transformers import BlipConfig, BlipForImageTextRetrieval

from benchmarks.parity.blip import batches_from_golden
from vlp_plugins.hosts import nni as host
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import (
    MaskError,
    StatisticsError,
    TieError,
    UnknownNameError,
    UnsupportedError,
)

LINEARS = [{"op_types": ["Linear"], "sparse_ratio": 0.75}]
METHODS = registry().method_names()
ENCODER = "text_encoder.encoder.layer.0.output.dense"
DECODER = "text_decoder.bert.encoder.layer.0.output.dense"


@pytest.fixture(scope="module")
def batches():
    return examples.blip_batches()


def retrieval_model():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "intermediate_size": 32, "image_size": 16, "patch_size": 8}
    text = {**sizes, "intermediate_size": 24, "vocab_size": 50, "max_position_embeddings": 16}
    config = BlipConfig(
        vision_config=vision, text_config=text, projection_dim=8, image_text_hidden_size=8
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return BlipForImageTextRetrieval(config).eval()


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
@pytest.mark.parametrize(
    "config", [LINEARS, [{"op_names": ["0"], "sparse_ratio": 0.5}]], ids=["types", "names"]
)
def test_a_wrapped_model_is_taken_for_what_is_in_it(wrap, config):
    found = []
    for wrapper in (lambda model: model, wrap):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
        pruner = host.OmpPruner(wrapper(model), config)
        _, masks = pruner.compress()
        plain = host.finalize(pruner)
        assert plain is model
        found.append((masks, plain.state_dict()))

    (masks, state), (others, other) = found
    assert masks.keys() == others.keys()
    assert all(torch.equal(masks[n]["weight"], others[n]["weight"]) for n in masks)
    assert all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("method", METHODS)
def test_masks_and_weights_are_those_without_nni(batches, method):
    alone = examples.blip()
    options = examples.QUICK.get(method, {})
    masks = prune(alone, batches, method=method, sparsity=0.75, **options)
    masks.apply(alone)
    model = examples.blip()
    names = list(model.state_dict())

    pruner = host.pruner_class(method)(model, LINEARS, batches=batches, **options)
    _, theirs = pruner.compress()
    ours = host.masks_of(pruner)
    final = host.finalize(pruner)

    assert ours == masks
    assert ours.manifest.method == method
    assert torch.equal(theirs[ENCODER]["weight"] != 0, masks["text.0.ffn.fc2"])
    assert final is model
    assert list(final.state_dict()) == names
    for name, value in final.state_dict().items():
        assert torch.equal(value, alone.state_dict()[name]), name
    assert final.get_submodule(ENCODER).weight is final.get_submodule(DECODER).weight


@pytest.mark.parametrize("method", [pytest.param("sparsegpt", marks=pytest.mark.long), "chita"])
def test_a_pruner_walks_block_by_block(batches, method):
    masks = prune(examples.blip(), batches, method=method, sparsity=0.75, walk="blocks")
    named = getattr(host, f"{method.title()}Pruner")
    pruner = named(examples.blip(), LINEARS, batches=batches, walk="blocks")
    pruner.compress()
    assert pruner.masks == masks
    assert masks.manifest.parameters["walk"] == "blocks"


def test_a_method_guided_by_dimensions_is_a_pruner_too():
    batches = batches_from_golden(examples.GOLDEN)
    alone = prune(examples.blip(), batches, method="id*magnitude", sparsity=0.5)
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]

    pruner = host.IdMagnitudePruner(examples.blip(), config, batches=batches)
    pruner.compress()

    assert host.masks_of(pruner) == alone


def test_pruners_are_named_after_the_registered_methods():
    assert host.ChitaPlusPlusPruner is host.pruner_class("chita++")
    assert issubclass(host.MultiflowPruner, Pruner)
    assert host.MultiflowPruner.method == "multiflow"
    assert {"OmpPruner", "InformationFlowPruner", "IdMultiflowPruner"} <= set(dir(host))
    with pytest.raises(AttributeError, match="did you mean 'MultiflowPruner'"):
        host.MultflowPruner  # noqa: B018
    with pytest.raises(UnknownNameError, match="did you mean 'multiflow'"):
        host.pruner_class("mutliflow")
    with pytest.raises(UnknownNameError, match="no parameter 'edge'"):
        host.MultiflowPruner(examples.net(), LINEARS, edge=False)


def test_hosts_are_found_by_name():
    assert registry().host("nni") is host
    assert {"nni", "torch-pruning", "transformers"} <= set(registry().names("hosts"))


def test_without_nni_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nni", None)
    monkeypatch.delitem(sys.modules, "vlp_plugins.hosts.nni")
    with pytest.raises(UnsupportedError, match=r'pip install "vlp-plugins\[nni\]"'):
        registry().host("nni")


def test_layers_that_stay_dense_are_named_once(caplog):
    model = examples.blip()
    with caplog.at_level(logging.WARNING, "vlp_plugins"):
        host.OmpPruner(model, LINEARS)

    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "itm_head (ITM head" in lines[0]
    assert "stay dense" in lines[0]


def test_any_module_can_be_pruned_and_the_evaluator_brings_the_loss():
    model, batches = examples.net(), examples.net_batches()
    loss = lambda model, batch: examples.training_step(batch, model)  # noqa: E731
    alone = prune(
        examples.net(),
        batches,
        method="snip",
        sparsity=0.5,
        adapter=ModuleAdapter(model, loss=loss),
    )
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5, "global_group_id": "all"}]

    pruner = host.SnipPruner(model, config, examples.torch_evaluator(model), batches=batches)
    pruner.compress()
    final = host.finalize(pruner)

    assert host.masks_of(pruner) == alone
    assert final.again.weight is final.second.weight
    assert alone.verify(final, ModuleAdapter(final)) == []


def test_new_values_of_chita_are_in_the_wrapped_and_in_the_final_model(batches):
    model = examples.blip()
    dense = model.get_submodule(ENCODER).weight.detach().clone()

    pruner = host.ChitaPruner(model, LINEARS, batches=batches, **{"lambda": 0.1})
    pruner.compress()
    masks = host.masks_of(pruner)
    wrapped = model.state_dict()[f"{ENCODER}.weight"]
    final = host.finalize(pruner).get_submodule(ENCODER).weight

    keep = masks["text.0.ffn.fc2"]
    assert masks.new_values is not None
    assert torch.equal(final[keep], masks.new_values["text.0.ffn.fc2"])
    assert not torch.equal(final[keep], dense[keep])
    assert torch.equal(wrapped, final)
    assert not final[~keep].any()
    with torch.no_grad():
        final[keep] += 1  # as if trained on
    assert host.masks_of(pruner).new_values is None


def test_the_wrapped_model_computes_as_the_final_one_and_can_be_copied():
    model, (x, _) = examples.net(), examples.net_batches()[0]
    pruner = host.MagnitudePruner(model, LINEARS)
    pruner.compress()

    wrapped = model(x)
    wrapped.sum().backward()
    copied = copy.deepcopy(model)

    assert torch.equal(copied(x), wrapped)
    assert torch.equal(host.finalize(pruner)(x), wrapped)
    assert model.second.weight.grad is not None
    assert model.state_dict().keys() == examples.net().state_dict().keys()


def test_state_dict_of_a_wrapped_model_has_the_pruned_weights_and_loads_again():
    model = examples.net()
    pruner = host.MagnitudePruner(model, LINEARS)
    pruner.compress()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    removed = ~host.masks_of(pruner)["first"]

    assert not state["first.weight"][removed].any()
    assert state["first._nni_wrapper.weight"][removed].any()
    plain = examples.net()
    plain.load_state_dict(state, strict=False)
    assert not plain.first.weight[removed].any()

    again = examples.net()
    other = host.MagnitudePruner(again, [{"op_types": ["Linear"], "sparse_ratio": 0.1}])
    other.compress()
    again.load_state_dict(state)
    assert host.masks_of(other) == host.masks_of(pruner)
    assert torch.equal(host.finalize(other).first.weight, state["first.weight"])


@pytest.mark.parametrize("when", ["wrapped", "final"])
def test_save_pretrained_keeps_the_zeros(tmp_path, when):
    model = retrieval_model()
    pruner = host.OmpPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.75}])
    pruner.compress()
    masks = host.masks_of(pruner)
    if when == "final":
        host.finalize(pruner)

    model.save_pretrained(tmp_path)
    loaded = BlipForImageTextRetrieval.from_pretrained(tmp_path)

    assert masks.verify(loaded) == []
    assert masks.sparsity == pytest.approx(0.75, abs=1e-4)
    host.finalize(pruner)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_a_tied_pretraining_model_can_be_saved_and_read(tmp_path):
    model = examples.blip()
    pruner = host.OmpPruner(model, LINEARS)
    pruner.compress()

    host.finalize(pruner).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)

    assert host.masks_of(pruner).verify(loaded) == []
    assert loaded.get_submodule(ENCODER).weight is loaded.get_submodule(DECODER).weight


def test_finalize_says_what_is_missing():
    pruner = host.OmpPruner(examples.net(), LINEARS)
    with pytest.raises(MaskError, match="call compress"):
        host.finalize(pruner)
    with pytest.raises(UnsupportedError, match="LevelPruner is not a pruner of vlp_plugins"):
        host.finalize(LevelPruner(examples.net(), LINEARS))
    with pytest.raises(StatisticsError, match="needs data"):
        host.MultiflowPruner(examples.net(), LINEARS).compress()


def test_finalize_twice_is_once():
    pruner = host.OmpPruner(examples.net(), LINEARS)
    pruner.compress()
    first = copy.deepcopy(host.finalize(pruner).state_dict())

    again = host.finalize(pruner)

    assert all(torch.equal(first[name], value) for name, value in again.state_dict().items())


def test_a_model_is_wrapped_once():
    model = examples.net()
    host.OmpPruner(model, LINEARS)
    with pytest.raises(UnsupportedError, match="from_compressor"):
        host.OmpPruner(model, LINEARS)


def test_masks_of_nnis_own_pruners_go_by_canonical_names():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    pruner = LevelPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    _, theirs = pruner.compress()
    pruner.unwrap_model()

    masks = host.masks_from_nni(theirs, model, ModuleAdapter(model))

    assert isinstance(masks, Masks)
    assert list(masks) == ["0", "2"]
    assert torch.equal(masks["0"], theirs["0"]["weight"] != 0)


def test_two_masks_of_one_weight_are_an_error():
    model = examples.net()
    one, two = torch.ones(10, 10), torch.zeros(10, 10)
    with pytest.raises(TieError, match="one weight with two different masks"):
        host.masks_from_nni(
            {"second": {"weight": one}, "again": {"weight": two}}, model, ModuleAdapter(model)
        )


def test_one_name_of_a_tied_weight_means_all_of_it():
    model = examples.net()
    config = [{"op_names": ["again"], "sparse_ratio": 0.5}]

    pruner = host.MagnitudePruner(model, config)
    _, masks = pruner.compress()

    assert torch.equal(masks["again"]["weight"], masks["second"]["weight"])
    assert examples.sparsity(masks["second"]["weight"]) == 0.5
    final = host.finalize(pruner)
    assert examples.sparsity(final.second.weight) == 0.5
    assert final.again.weight is final.second.weight
    assert examples.sparsity(final.first.weight) == 0


def test_a_module_under_two_names_is_wrapped_once():
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": layer, "two": layer, "three": nn.Conv2d(1, 2, 3)})
    config = [{"op_types": ["Linear", "Conv2d"], "sparse_ratio": 0.5}]

    pruner = host.MagnitudePruner(model, config, allocation="layer")
    pruner.compress()
    final = host.finalize(pruner)

    assert final["one"] is final["two"]
    assert examples.sparsity(final["two"].weight) == 0.5
    assert int((final["three"].weight == 0).sum()) == 9


def test_a_class_of_layer_that_nni_does_not_know_can_be_pruned():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Scaled(4, 4), nn.Linear(4, 4)).to(torch.bfloat16)
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    pruner = host.MagnitudePruner(
        model, [{"op_names": ["0", "1"], "sparse_ratio": 0.5}], allocation="layer"
    )
    _, masks = pruner.compress()

    wrapped = model(x)
    assert masks["0"]["weight"].dtype == torch.bfloat16
    assert torch.equal(host.finalize(pruner)(x), wrapped)
    assert examples.sparsity(model[0].weight) == 0.5


def test_masks_fit_any_model_of_the_family(tmp_path, batches):
    pruner = host.MultiflowPruner(examples.blip(), LINEARS, batches=batches)
    pruner.compress()
    host.masks_of(pruner).save(tmp_path / "masks.safetensors")

    other = examples.blip()
    Masks.load(tmp_path / "masks.safetensors").apply(other)

    weights = WeightMap.of(other, registry().adapter_for(other))
    assert sum(int((w.parameter == 0).sum()) for w in weights.values()) >= pruner.masks.removed


OUTSIDER = """
from vlp_plugins import hookimpl
from vlp_plugins.scoring.score import Scorer

class Largest(Scorer):
    name = "largest_first"
    def score(self, weight, evidence):
        return -weight.abs().float()

@hookimpl
def vlp_scorers():
    return {"largest_first": Largest}
"""
SCRIPT = """
import torch
from torch import nn
from vlp_plugins import ModuleAdapter, prune
from vlp_plugins.hosts.nni import LargestFirstPruner, finalize, masks_of
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
alone = prune(model, method="largest_first", sparsity=0.5, adapter=ModuleAdapter(model))
pruner = LargestFirstPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
pruner.compress()
assert masks_of(pruner) == alone
largest = max(float(layer.weight.abs().max()) for layer in model)
finalize(pruner)
assert max(float(layer.weight.abs().max()) for layer in model) < largest
print("same", alone.removed)
"""


def test_an_outsiders_scorer_is_a_pruner_without_a_line_here(tmp_path: Path):
    (tmp_path / "acme_plugin.py").write_text(OUTSIDER)
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vlp_plugins]\nacme = acme_plugin\n")
    paths = os.pathsep.join([str(tmp_path), *sys.path])

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        timeout=120,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "same 24"
