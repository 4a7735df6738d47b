"""`ModuleAdapter`: what is pruned in an unknown model, under which names, and why not the rest."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers import BertConfig, BertForMaskedLM, CLIPConfig, CLIPModel

from vlp_plugins.methods.gradual.pruning import GradualPruning
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import UnclaimedModelError, UnsupportedError

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
BERT = BertConfig(**SIZES, vocab_size=50, max_position_embeddings=16)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3)).eval()


def clip() -> CLIPModel:
    text = {**SIZES, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**SIZES, "image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()


def names(model: nn.Module, adapter: ModuleAdapter | None = None) -> list[str]:
    return list(WeightMap.of(model, adapter or ModuleAdapter(model)))


def reason(model: nn.Module, path: str, adapter: ModuleAdapter | None = None) -> str:
    exclusions = (adapter or ModuleAdapter(model)).exclusions(model)
    return next(e.reason for e in exclusions if re.search(e.pattern, path))


def test_linear_layers_are_named_by_their_path_and_indexed() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([mlp(), mlp()]), "head": nn.Linear(3, 2)})
    weights = WeightMap.of(model, ModuleAdapter(model))
    expected = ["blocks.0.0", "blocks.0.3", "blocks.1.0", "blocks.1.3", "head"]
    assert list(weights) == expected
    assert [weight.depth for weight in weights.values()] == [0, 0, 1, 1, 0]
    assert {weight.modality for weight in weights.values()} == {"model"}


def test_settings_make_the_adapter_anew_after_a_way_through_json() -> None:
    model = nn.ModuleDict({"encoder": mlp(), "head": nn.Linear(3, 2)})
    adapter = ModuleAdapter(
        model, exclude="head", modalities={"encoder": "text"}, tokens={"encoder": None}
    )
    again = ModuleAdapter(model, **json.loads(json.dumps(adapter.settings())))
    assert list(again.weights(model)) == list(adapter.weights(model))
    assert again.settings() == adapter.settings()


def test_convolutions_are_flattened_and_grouped_ones_are_not_pruned() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6))
    weights = WeightMap.of(model, ModuleAdapter(model))
    assert list(weights) == ["0"]
    assert weights["0"].matrix.shape == (6, 4 * 3 * 3)
    assert reason(model, "1.weight") == "grouped convolution"
    assert reason(model, "1.bias") == "bias"
    assert "normalisation" in reason(model, "2.weight")


def test_other_layers_are_named_in_the_reason() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 3), nn.Bilinear(2, 2, 2))
    assert names(model) == ["0"]
    assert reason(model, "1.weight").startswith("Conv1d.weight is not the weight of a Linear")
    assert reason(model, "2.weight").startswith("Bilinear.weight")


def test_tied_linears_are_one_weight_under_the_first_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    adapter = ModuleAdapter(model)
    weights = WeightMap.of(model, adapter)
    assert list(weights) == ["0"]
    assert [owner.module for owner in weights["0"].owners] == ["0", "1"]
    assert adapter.for_task("pretraining", model) == {"0": ("0.weight", "1.weight")}


def test_one_module_under_two_names_is_declared_once() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    weights = WeightMap.of(model, ModuleAdapter(model))
    assert [owner.module for owner in weights["0"].owners] == ["0"]
    assert weights["0"].aliases == ("0.weight", "2.weight")


def test_language_model_head_tied_to_the_embedding_is_not_pruned() -> None:
    model = BertForMaskedLM(BERT)
    model.tie_weights()
    assert "cls.predictions.decoder" not in names(model)
    assert "cls.predictions.transform.dense" in names(model)
    assert reason(model, "cls.predictions.decoder.weight").startswith("tied to an embedding")
    untied = nn.ModuleDict({"words": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    assert names(untied) == ["head"]
    assert reason(untied, "words.weight") == "embedding"


def test_excluded_layers_take_what_is_tied_to_them_along() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "twin": nn.Linear(4, 4), "x": nn.Linear(4, 4)})
    model["twin"].weight = model["body"].weight
    adapter = ModuleAdapter(model, exclude=["twin"])
    assert names(model, adapter) == ["x"]
    assert reason(model, "twin.weight", adapter) == "excluded on request (twin)"
    assert "tied" in reason(model, "body.weight", adapter)
    assert names(model, ModuleAdapter(model, exclude="body|twin")) == ["x"]


def test_multihead_attention_is_left_out_because_its_layers_are_never_called() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert names(model) == ["linear1", "linear2"]
    assert "without calling" in reason(model, "self_attn.out_proj.weight")


def test_parametrised_weights_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4), parametrizations.weight_norm(nn.Linear(4, 4)))
    assert names(model) == ["0"]


class Experts(nn.Module):
    """Experts whose matrices are one parameter, as in transformers' mixtures."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 4, 8))
        self.out = nn.Linear(8, 4)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        # 3 x 8 x 8 + 8 x 8 of 2 x 8 x 16 more
        (nn.TransformerEncoderLayer(8, 2, 16), r"50\.0% of .*37\.5% Multihead.*in_proj.*12\.5%"),
        (
            nn.Sequential(nn.Linear(4, 4), parametrizations.spectral_norm(nn.Linear(4, 12))),
            r"75\.0% of .*75\.0% Parametrization.* \(first: 1\.parametrizations\.weight\.orig",
        ),
        (Experts(), r"75\.0% of the elements of this Experts's .*\(first: up\)"),
        (nn.Sequential(nn.Embedding(50, 4), nn.LayerNorm(4), nn.Linear(4, 4)), None),
    ],
    ids=["attention", "parametrized", "experts", "embedding"],
)
def test_what_cannot_be_pruned_is_said_with_its_share(
    model: nn.Module, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        caplog.clear()
        prune(model, adapter=ModuleAdapter(model), method="omp", sparsity=0.5)
        assert len(caplog.records) == (said is not None)
        assert said is None or re.search(said, caplog.text)


def test_gradual_pruning_says_it_too(caplog: pytest.LogCaptureFixture) -> None:
    model = Experts()
    GradualPruning(model, sparsity=0.5, steps=10, adapter=ModuleAdapter(model))
    assert "75.0% of the elements" in caplog.text


def test_of_a_peft_model_the_layers_of_the_model_are_pruned() -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2))
    adapter = ModuleAdapter(tuned)
    assert [spec.name for spec in adapter.weights(tuned)] == [
        "base_model.model.0.base_layer",
        "base_model.model.2",
    ]
    assert prune(tuned, adapter=adapter, method="omp", sparsity=0.5).total == 8 * 8 + 4 * 8
    with pytest.raises(UnclaimedModelError, match=r"model.merge_and_unload\(\), or describe"):
        prune(tuned, method="omp", sparsity=0.5)


def test_what_is_excluded_on_request_is_no_surprise(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    adapter = ModuleAdapter(model, exclude="self_attn")

    prune(model, adapter=adapter, method="omp", sparsity=0.5)

    assert not caplog.records


def test_lazy_layers_have_to_be_run_first() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(UnsupportedError, match="run the model on one batch first"):
        names(model)
    model(torch.zeros(1, 3))
    assert names(model) == ["0"]


def test_a_bare_layer_has_to_be_wrapped() -> None:
    with pytest.raises(UnsupportedError, match=r"nn.Sequential\(model\)"):
        names(nn.Linear(2, 2))


def test_layers_on_the_meta_device_are_told_apart() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    assert names(model) == ["1", "2"]


def test_a_pattern_of_an_exclusion_covers_numbered_layers_only_where_all_agree() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(3))})
    (bias,) = ModuleAdapter(model).exclusions(model)
    assert bias.pattern == r"^(?:layers\.\d+\.bias)$"
    adapter = ModuleAdapter(model, exclude=[r"layers\.1$"])
    asked = next(e for e in adapter.exclusions(model) if "request" in e.reason)
    assert not re.search(asked.pattern, "layers.0.weight")
    assert re.search(asked.pattern, "layers.1.weight")


def test_modalities_are_found_in_paths() -> None:
    model = clip()
    adapter = ModuleAdapter(model, modalities={"vision|visual": "vision", "text_model": "text"})
    groups = WeightMap.of(model, adapter).by_modality()
    assert {name: len(weights) for name, weights in groups.items()} == {
        "text": 2 * 6,
        "vision": 1 + 2 * 6 + 1,  # patches, layers, projection
        "model": 1,  # text_projection
    }


@pytest.mark.parametrize("argument", ["modalities", "tokens"])
def test_patterns_that_cannot_be_meant_are_refused(argument: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"{argument}: 'visoin' is found in no layer"):
        ModuleAdapter(clip(), **{argument: {"visoin": "vision"}})  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="not a regular expression"):
        ModuleAdapter(clip(), **{argument: {"(": "vision"}})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("argument", "given", "message"),
    [
        ("tokens", {"text": 3}, "tokens: 'text' has 3; give the key of a mask"),
        ("tokens", {"text": [3]}, r"tokens: 'text' has \[3\]; give the key of a mask"),
        ("tokens", {"text": []}, r"tokens: 'text' has \[\]; give the key of a mask"),
        ("tokens", {3: "mask"}, "should be a mapping from regular expressions"),
        ("tokens", "text", "tokens='text' should be a mapping"),
        ("modalities", {"text": None}, "modalities: 'text' has None; give the name"),
        ("modalities", ["text"], r"modalities=\['text'\] should be a mapping"),
        ("exclude", 3, "exclude=3 should be a regular expression"),
        ("exclude", [3], r"exclude=\[3\] should be a regular expression"),
    ],
)
def test_arguments_of_another_type_are_refused(argument: str, given: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        ModuleAdapter(clip(), **{argument: given})


def test_claims_models_of_its_class() -> None:
    adapter = ModuleAdapter(mlp(), name="mine")
    assert adapter.name == "mine"
    assert adapter.claims(mlp())
    assert not adapter.claims(nn.Linear(1, 1))
    assert adapter.load("anything") is None
    with pytest.raises(UnsupportedError, match="vqa"):
        adapter.for_task("vqa", mlp())
