"""prune_structured: every model of point 9, ties, self-check, the way back, saving."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
import transformers
from torch import nn
from torch_pruning_examples import (
    MAKERS,
    golden,
    golden_batches,
    made,
    named,
    same_values,
    stock_pruner,
    values_of,
)
from transformers import BertConfig, BertModel, BlipConfig, BlipForImageTextRetrieval

import vlp_plugins
from vlp_plugins.hosts.torch_pruning import structured
from vlp_plugins.hosts.torch_pruning.importance import Importance
from vlp_plugins.hosts.torch_pruning.recorder import Recorder
from vlp_plugins.hosts.torch_pruning.structured import parameters_of, prune_structured
from vlp_plugins.loading import load_model
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.parts import Attention
from vlp_plugins.runtime.errors import (
    BatchError,
    OutputError,
    SparsityError,
    StructureError,
    UnsupportedError,
)
from vlp_plugins.structured.check import check_equal, example_batch, outputs
from vlp_plugins.structured.cuts import patch
from vlp_plugins.structured.files import read_record
from vlp_plugins.structured.survey import blocks_of

CUTS: list[dict[str, Any]] = [
    {},
    {"cut": ("dims", "ffn")},
    {"scope": "block kind", "steps": 3},
    {"scope": "block kind", "cut": "dims", "round_to": 2},
]
CUTTABLE = [name for name in MAKERS if name != "dino 3"]
CASES = [(name, CUTS[index % 2]) for index, name in enumerate(CUTTABLE)]
CASES += [(name, cut) for name in ("blip pre-training", "xvlm", "clip") for cut in CUTS]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_model_is_cut_and_equals_the_masked_one(name: str, options: dict[str, Any]) -> None:
    model = made(name).train()

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = prune_structured(model, importance="magnitude", **options)

    assert result.error is not None
    assert result.error <= 1e-5
    assert result.parameters_after < result.parameters_before
    assert all(module.training for module in model.modules())
    if not options.get("round_to"):
        assert all(gone == int(0.5 * total) for gone, total in result.removed.values())


def test_what_torch_pruning_cannot_trace_is_told_and_left_alone() -> None:
    """It trips over positions that turn queries and keys, as of DINOv3."""
    torch.manual_seed(0)
    model = MAKERS["dino 3"]().eval()
    before = values_of(model)

    with pytest.raises(StructureError, match="cannot trace DINOv3ViTModel"):
        prune_structured(model, importance="magnitude")
    with pytest.raises(StructureError, match="nothing can be cut: positions turn their queries"):
        prune_structured(model, importance="magnitude", cut="heads")
    with pytest.raises(UnsupportedError, match="whole heads"):
        prune_structured(model, importance="magnitude", cut="dims")

    assert same_values(model, before)


_TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
_EYE = {**_TOWER, "image_size": 16, "patch_size": 8}
_WORDS = {**_TOWER, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64}
_PLACEHOLDER = 60


def chat_model(kind: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A tiny chat model whose tower has layers that its decoder does not read, and a batch."""
    torch.manual_seed(0)
    tokens, batch, pixels = 4, {}, torch.randn(2, 3, 16, 16)
    text = transformers.LlamaConfig(**_WORDS, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    vision = transformers.SiglipVisionConfig(**_EYE)
    model: nn.Module
    if kind == "llava":
        config = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**_EYE),
            text_config=text,
            image_token_index=_PLACEHOLDER,
        )
        model = transformers.LlavaForConditionalGeneration(config)
    elif kind == "deepseek-vl":
        config = transformers.DeepseekVLConfig(
            vision_config=vision, text_config=text, image_token_id=_PLACEHOLDER
        )
        model = transformers.DeepseekVLForConditionalGeneration(config)
    else:
        tokens = 10  # of the image, of its only patch, and a new line for each row of that
        pixels = torch.randn(2, 2, 3, 16, 16)
        batch["image_sizes"] = torch.tensor([[16, 16]] * 2)
        config = transformers.LlavaOnevisionConfig(
            vision_config=vision,
            text_config=transformers.Qwen2Config(**_WORDS),
            image_token_index=_PLACEHOLDER,
            image_grid_pinpoints=[[16, 16]],
            vision_feature_layer=-2,
        )
        model = transformers.LlavaOnevisionForConditionalGeneration(config)
    ids = torch.randint(3, 50, (2, tokens + 6))
    ids[:, 2 : 2 + tokens] = _PLACEHOLDER
    batch |= {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model.eval(), batch


@pytest.mark.parametrize(
    ("kind", "outside"),
    [
        ("llava", "vision_tower.encoder.layers.1.mlp"),
        ("llava-onevision", "vision_tower.encoder.layers.1.mlp"),
        ("deepseek-vl", "vision_model.head.mlp"),
    ],
)
def test_what_no_output_depends_on_stays_whole(caplog, kind: str, outside: str) -> None:
    model, batch = chat_model(kind)
    before = values_of(model)

    result = prune_structured(model, importance="magnitude", adapter="module", example=batch)

    assert result.error is not None
    assert result.error <= 1e-5
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert f"nothing that the model gives out depends on them (model.{outside}" in said.replace(
        "model.vision_tower.encoder.layers.1.self_attn, ", ""
    )
    assert "positions turn their queries and keys" in said
    after = values_of(model)
    kept = [
        name for name in before if outside in name or "language_model.layers.0.self_attn" in name
    ]
    assert len(kept) >= 8
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert all(gone == int(0.5 * total) > 0 for gone, total in result.removed.values())


def test_a_chat_model_is_traced_by_a_batch_of_the_user() -> None:
    model, batch = chat_model("llava")
    with pytest.raises(BatchError, match="no batch for LlavaFor.*give one of your own: example="):
        prune_structured(model, importance="magnitude")
    fresh, _ = chat_model("llava")
    assert torch.equal(model(**batch).logits, fresh(**batch).logits)
    result = prune_structured(model, [batch], importance="wanda", ratio={"text": 0.5})
    assert result.removed == {("text", "ffn"): (24, 48)}


def test_ratios_by_modality_and_kind_are_exact() -> None:
    model, adapter = golden()
    ratio = {"vision": 0.25, ("text", "ffn"): 0.75}

    result = prune_structured(model, importance="omp", ratio=ratio)

    assert result.removed == {
        ("vision", "heads"): (2, 8),
        ("vision", "ffn"): (48, 192),
        ("text", "ffn"): (96, 128),
    }
    removed = "vision heads 25.0%, vision ffn 25.0%, text ffn 75.0%"
    assert repr(result).startswith(f"StructuredResult(removed: {removed}; parameters ")
    for block in blocks_of(model, adapter):
        if block.modality == "text" and isinstance(block, Attention):
            assert block.heads == 4


@pytest.mark.parametrize("scope", ["layer", "block kind"])
def test_round_to_leaves_multiples_and_rather_more(scope: Any) -> None:
    model, adapter = golden()

    prune_structured(model, importance="omp", ratio=0.3, cut="ffn", scope=scope, round_to=16)

    widths = [block.width for block in blocks_of(model, adapter) if block.kind == "ffn"]
    assert all(width % 16 == 0 for width in widths)
    if scope == "layer":
        assert widths == [80, 80, 48, 48]  # of 96 and 64, 68 and 45 would be 70 %


@pytest.mark.parametrize("scope", ["layer", "block kind"])
def test_round_to_is_not_of_heads(scope: Any) -> None:
    model, _ = golden()

    result = prune_structured(model, importance="omp", scope=scope, round_to=16)

    assert result.removed["vision", "heads"] == (4, 8)
    assert result.removed["text", "heads"] == (12, 24)


@torch.no_grad()
def test_a_caller_without_gradients_can_cut() -> None:
    model, _ = golden()

    assert prune_structured(model, importance="omp").removed["text", "ffn"] == (64, 128)
    assert not torch.is_grad_enabled()


def test_a_kind_has_its_own_ratio_wherever_it_is_named() -> None:
    model, _ = golden()

    result = prune_structured(
        model, importance="omp", ratio={("vision", "ffn"): 0.5, "vision": 0.25}
    )

    assert result.removed == {("vision", "heads"): (2, 8), ("vision", "ffn"): (96, 192)}


def test_equal_importances_go_by_position_and_counts_stay_exact() -> None:
    model, adapter = golden()

    result = prune_structured(
        model, importance=lambda group: torch.ones(len(group[0].idxs)), scope="block kind"
    )

    assert result.removed["vision", "ffn"] == (96, 192)
    assert all(block.width >= 1 for block in blocks_of(model, adapter))


def test_shared_towers_are_cut_with_one_index_set_and_stay_shared() -> None:
    model, _adapter = golden()
    encoder = "text_encoder.encoder.layer.0."
    decoder = "text_decoder.bert.encoder.layer.0."

    result = prune_structured(model, golden_batches(), cut=("dims", "ffn"))

    for layer in ("intermediate.dense", "output.dense", "crossattention.self.query"):
        one, two = (model.get_submodule(tower + layer) for tower in (encoder, decoder))
        assert one is not two
        assert one.weight is two.weight
        assert one.bias is two.bias
        assert (one.in_features, one.out_features) == tuple(reversed(one.weight.shape))
        assert (two.in_features, two.out_features) == tuple(reversed(two.weight.shape))
    assert result.record["text.0.cross"].dims is not None
    own, other = (model.get_submodule(t + "attention.self.query") for t in (encoder, decoder))
    assert own.weight is not other.weight


def test_the_pretraining_model_trains_on_with_its_momentum_twins() -> None:
    model, adapter = golden()
    prune_structured(model, golden_batches(), ratio={"vision": 0.25, "text": 0.5})
    twin = model.vision_model_m.encoder.layers[0].mlp.fc1

    losses = adapter.losses(model.train(), golden_batches()[0])
    sum(losses.values()).backward()

    assert twin.out_features == 72 == twin.weight.shape[0]
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert model.text_encoder.encoder.layer[0].crossattention.self.query.weight.grad is not None


def test_a_pruned_captioner_generates_the_same_with_and_without_cache() -> None:
    model = made("blip captioning")
    prune_structured(model, importance="magnitude", cut=("dims", "ffn"))
    pixels = example_batch(model, registry().adapter_for(model))["pixel_values"]
    found = [
        model.generate(pixel_values=pixels, max_length=10, use_cache=cache, num_beams=beams)
        for beams in (1, 2)
        for cache in (True, False)
    ]

    assert found[0].tolist() == found[1].tolist()
    assert found[2].tolist() == found[3].tolist()


def test_a_saved_model_is_rebuilt_in_a_fresh_process(tmp_path: Path) -> None:
    model = made("blip pre-training")
    prune_structured(model, importance="magnitude", cut=("dims", "ffn")).save(tmp_path / "cut")
    adapter = registry().adapter_for(model)
    torch.save(outputs(model, adapter, example_batch(model, adapter)), tmp_path / "expected.pt")
    script = (
        "import sys, torch\n"
        "from vlp_plugins.structured import check_equal, example_batch, outputs, rebuild\n"
        "model, adapter = rebuild(sys.argv[1])\n"
        "expected = torch.load(sys.argv[2], weights_only=True)\n"
        "check_equal(expected, outputs(model, adapter, example_batch(model, adapter)))\n"
        "assert 'torch_pruning' not in sys.modules\n"
    )

    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "cut"), str(tmp_path / "expected.pt")],
        check=True,
        timeout=120,
    )


def test_a_saved_folder_has_the_processor_and_is_replaced_only_if_asked_to(
    models: Path, photos: Path, tmp_path: Path
) -> None:
    model = vlp_plugins.load(models / "clip", device="cpu")
    result = prune_structured(model, importance="magnitude", ratio=0.5)
    result.save(tmp_path / "smaller")

    smaller = vlp_plugins.load(tmp_path / "smaller", device="cpu")
    assert len(list(vlp_plugins.batches(photos, smaller, batch_size=6))) == 2
    with pytest.raises(OutputError, match="overwrite=True"):
        result.save(tmp_path / "smaller")
    (tmp_path / "smaller" / "vlp_structured.safetensors").write_bytes(b"damaged")
    result.save(tmp_path / "smaller", overwrite=True)
    assert parameters_of(vlp_plugins.load(tmp_path / "smaller")) == result.parameters_after
    with pytest.raises(OutputError, match="has no vlp_structure.json of vlp_plugins"):
        result.save(photos, overwrite=True)
    assert (photos / "metadata.jsonl").is_file()


def test_a_rebuilt_model_can_be_cut_further_and_saved(tmp_path: Path) -> None:
    prune_structured(made("clip"), importance="magnitude", ratio=0.25).save(tmp_path / "first")
    model, adapter = load_model(str(tmp_path / "first"), device="cpu")

    result = prune_structured(model, importance="magnitude", ratio=0.5, adapter=adapter)
    result.save(tmp_path / "second", earlier=read_record(tmp_path / "first"))

    again, _ = load_model(str(tmp_path / "second"), device="cpu")
    batch = example_batch(model, adapter)
    check_equal(outputs(model, adapter, batch), outputs(again, adapter, batch))


def test_the_selfcheck_catches_a_model_that_computes_something_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The size of heads is not set after dimensions went: nothing crashes, outputs are wrong."""
    model = made("vit").train()
    before = values_of(model)
    heads = [(m, m.num_attention_heads, m.head_dim) for m in attentions(model)]
    sizes = [(m, m.in_features, m.out_features) for m in model.modules() if is_linear(m)]
    monkeypatch.setattr(structured, "patch", lambda *_: None)

    with pytest.raises(StructureError, match="computes something else|attributes"):
        prune_structured(model, importance="magnitude", cut="dims")

    assert same_values(model, before)
    assert heads == [(m, m.num_attention_heads, m.head_dim) for m in attentions(model)]
    assert all((m.in_features, m.out_features) == (i, o) for m, i, o in sizes)


def attentions(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "num_attention_heads")]


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def test_a_failure_restores_fused_layers_ties_and_twins() -> None:
    model, adapter = golden(whole=True)
    before = values_of(model)
    expected = outputs(model, adapter, golden_batches()[0])

    with pytest.raises(StructureError):
        prune_structured(model, importance="omp", tolerance=-1.0)

    assert same_values(model, before)
    shared = "encoder.layer.0.output.dense.weight"
    one = model.get_parameter(f"text_encoder.{shared}")
    assert one is model.get_parameter(f"text_decoder.bert.{shared}")
    found = outputs(model, adapter, golden_batches()[0])
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("steps", [1, 3])
def test_a_failure_after_training_between_steps_brings_old_values_back(steps: int) -> None:
    model, _ = golden()
    before = values_of(model)

    def broken(step: int) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        if step == min(2, steps):
            raise RuntimeError("out of disk")

    with pytest.raises(RuntimeError, match="out of disk"):
        prune_structured(model, importance="omp", steps=steps, after_step=broken)

    assert same_values(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["clip", "blip retrieval"])
def test_what_was_frozen_stays_frozen(name: str, dtype: torch.dtype) -> None:
    model = made(name).to(dtype)
    model.vision_model.requires_grad_(False)

    prune_structured(model, importance="omp", cut=("dims", "ffn"))

    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    tower = {f"vision_model.{name}" for name, _ in model.vision_model.named_parameters()}
    assert frozen == tower


def test_training_between_steps_keeps_shapes_and_self_check_right() -> None:
    model, adapter = golden()
    model.train()
    seen = []

    def train(step: int) -> None:
        assert model.training
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        sum(adapter.losses(model, golden_batches()[0]).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append((step, named(model, adapter, "text.0.ffn").width))

    result = prune_structured(
        model, golden_batches(), steps=4, after_step=train, cut=("dims", "ffn")
    )

    assert seen == [(1, 56), (2, 48), (3, 40), (4, 32)]
    assert result.error is not None
    assert result.error <= 1e-5
    assert len(result.record["text.0.ffn"].units) == 32


@pytest.mark.parametrize("kind", ["magnitude", "taylor"])
def test_importances_of_torch_pruning_work_too(kind: str) -> None:
    model, adapter = golden()
    importance: Any = tp.importance.GroupMagnitudeImportance()
    if kind == "taylor":
        importance = tp.importance.GroupTaylorImportance()
        sum(adapter.losses(model, golden_batches()[0]).values()).backward()

    result = prune_structured(model, importance=importance, scope="block kind")

    assert result.removed["text", "ffn"] == (64, 128)


def test_a_model_that_no_adapter_claims_is_described_by_its_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    model = BertModel(BertConfig(vocab_size=50, num_hidden_layers=2, **sizes)).eval()

    result = prune_structured(model, importance="omp", adapter="module", cut=("dims", "ffn"))
    result.save(tmp_path / "cut")

    assert result.removed == {("model", "dims"): (4, 8), ("model", "ffn"): (24, 48)}
    again, adapter = load_model(str(tmp_path / "cut"), device="cpu")
    batch = example_batch(model, adapter)
    check_equal(outputs(model, adapter, batch), outputs(again, adapter, batch))


def test_the_importance_must_know_the_blocks() -> None:
    model, _ = golden()

    with pytest.raises(StructureError, match="leave it out"):
        prune_structured(model, importance=lambda group: None)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ratio": 1.5}, SparsityError, "lies in"),
        ({"ratio": {"audio": 0.5}}, UnsupportedError, "there are: .*text.*vision"),
        ({"cut": ("heads", "dims")}, UnsupportedError, "not both"),
        ({"cut": "units"}, UnsupportedError, "unknown"),
        ({"scope": "global"}, UnsupportedError, "block kind"),
        ({"steps": 0}, SparsityError, "at least 1"),
        ({"importance": 3}, UnsupportedError, "not an importance"),
        ({"importance": lambda group: None, "edges": False}, UnsupportedError, "edges"),
    ],
)
def test_wrong_wishes_are_told(options: Any, error: Any, message: str) -> None:
    model, _ = golden()
    before = values_of(model)

    with pytest.raises(error, match=message):
        prune_structured(model, **{"importance": "omp", **options})

    assert same_values(model, before)


def test_the_documented_loop_with_torch_prunings_own_pruner() -> None:
    model, adapter = golden()
    ours, _ = golden()
    options: Any = {"ratio": {"vision": 0.25, "text": 0.5}, "cut": ("heads", "ffn"), "steps": 3}
    importance = Importance("omp", model, adapter=adapter)
    with stock_pruner(model, adapter, importance, **options) as pruner:
        recorder = Recorder(pruner.DG, model, adapter)
        for _ in range(3):
            pruner.step()
            patch(model, adapter, recorder.heads())

    result = prune_structured(ours, importance="omp", **options)
    assert recorder.record() == result.record
    batch = golden_batches()[0]
    check_equal(outputs(ours, adapter, batch), outputs(model, adapter, batch))
    assert pruner.pruning_history() != []


@pytest.mark.parametrize("name", ["clip", "blip retrieval"])
def test_a_model_in_half_precision_is_checked_in_single_and_stays_half(name: str) -> None:
    """BLIP's queries are rescaled, which half precision alone would round beyond the tolerance."""
    model = made(name).bfloat16()
    whole = {id(p): p.detach().clone() for p in model.parameters()}

    result = prune_structured(model, importance="magnitude", cut=("dims", "ffn"))

    assert result.error is not None
    assert result.error <= 1e-5
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    kept = [p for p in model.parameters() if id(p) in whole]
    assert kept
    assert all(torch.equal(p, whole[id(p)]) for p in kept)


def test_gradients_in_half_precision_are_importance_too() -> None:
    model, adapter = golden()
    model.bfloat16()
    batch = golden_batches()[0]
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    sum(adapter.losses(model, batch).values()).backward()

    result = prune_structured(model, importance=tp.importance.GroupTaylorImportance())

    assert result.removed["text", "ffn"] == (64, 128)
    found = model.get_parameter("text_encoder.encoder.layer.0.output.dense.weight")
    assert found.grad.dtype == torch.bfloat16
    assert found.grad.shape == found.shape


@pytest.mark.long
@pytest.mark.parametrize("cut", [("heads", "ffn"), ("dims", "ffn")])
def test_full_size_blip_is_cut_by_half(cut: Any) -> None:
    """BLIP base for retrieval, random weights: 224 M parameters."""
    torch.manual_seed(0)
    model = BlipForImageTextRetrieval(BlipConfig()).eval()

    result = prune_structured(model, importance="omp", cut=cut)

    vision, text = result.removed["vision", "ffn"], result.removed["text", "ffn"]
    assert vision == (12 * 1536, 12 * 3072) == text
    assert result.error is not None
    assert result.error <= 1e-5
    assert result.parameters_after < 0.62 * result.parameters_before
