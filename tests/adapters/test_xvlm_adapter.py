"""X-VLM's adapter: names, tokens, losses, downstream paths and files, as the original has them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertTokenizerFast, CLIPVisionConfig, SwinConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.processing_clip import CLIPProcessor

from benchmarks.parity.xvlm import batches_from_golden, model_from_golden, outputs
from vlp_adapters.objectives import IGNORED
from vlp_adapters.xvlm import XvlmForPretraining, XvlmPretrainConfig, save_original
from vlp_adapters.xvlm.adapter import XvlmAdapter
from vlp_plugins.adapter import CaptioningAdapter, MatchingAdapter, RetrievalAdapter
from vlp_plugins.errors import BatchError, UnsupportedError
from vlp_plugins.weights import WeightMap

GOLDEN = Path(__file__).parents[1] / "golden" / "xvlm"
RECORD = json.loads((GOLDEN / "outputs.json").read_text())
ADAPTER = XvlmAdapter()
FILES = {"": "batches.safetensors", "_len17": "batches_len17.safetensors"}


def recorded_negatives(index: int) -> tuple[list[int], list[int]]:
    drawn = RECORD["sequence"][index]["negatives"][0]
    return drawn["image_neg"], drawn["text_neg"]


@pytest.fixture(scope="module")
def golden() -> XvlmForPretraining:
    return model_from_golden(GOLDEN)


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    return batches_from_golden(GOLDEN)[0]


def tiny_config(**options: Any) -> XvlmPretrainConfig:
    """Heads are 64 wide, as those of every model whose sizes are read from a checkpoint."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=16,
        patch_size=8,
    )
    text = BertConfig(
        vocab_size=30,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=1,
        intermediate_size=32,
        max_position_embeddings=16,
        fusion_layer=1,
    )
    return XvlmPretrainConfig(
        **({"vision_config": vision, "text_config": text, "embed_dim": 8} | options)
    )


def tiny(**options: Any) -> XvlmForPretraining:
    torch.manual_seed(0)
    return XvlmForPretraining(tiny_config(**options)).eval()


def tiny_swin() -> XvlmForPretraining:
    sizes: dict[str, Any] = {"depths": [2, 1], "num_heads": [2, 4], "window_size": 2}
    return tiny(vision_config=SwinConfig(image_size=16, patch_size=4, embed_dim=8, **sizes))


def tiny_batch(**options: Any) -> dict[str, Tensor]:
    ids = torch.tensor([[1, 7, 8, 9, 10, 2], [1, 7, 2, 0, 0, 0]])
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": images, "input_ids": ids, "attention_mask": ids.sign()} | options


# --- names ---


def test_prunes_what_the_published_code_prunes_in_its_order(golden: XvlmForPretraining) -> None:
    summary = json.loads((GOLDEN / "summary.json").read_text())
    weights = WeightMap.of(golden, ADAPTER)
    originals = [ADAPTER.original_name(weight.aliases[0]) for weight in weights.values()]
    assert originals == summary["prunable_parameters"]
    assert len(originals) == 50
    assert weights.numel == 53_760


def test_every_modality_counts_its_layers_from_0(golden: XvlmForPretraining) -> None:
    weights = WeightMap.of(golden, ADAPTER)
    layers = {
        modality: sorted({weight.depth for weight in members})
        for modality, members in weights.by_modality().items()
    }
    assert layers == {"vision": [0, 1, 2], "text": [0, 1], "fusion": [0, 1]}
    assert all(w.name.startswith(f"{w.modality}.{w.depth}.") for w in weights.values())
    assert weights["fusion.1.cross.key"].aliases == (
        "text_encoder.bert.encoder.layer.3.crossattention.self.key.weight",
    )
    names = list(weights)
    assert names[:6] == [
        f"vision.0.{part}"
        for part in ("attention.key", "attention.value", "attention.query", "attention.output",
                     "mlp.fc1", "mlp.fc2")
    ]  # fmt: skip
    parts = ["query", "key", "value", "output"]
    text = [f"self.{part}" for part in parts] + ["ffn.fc1", "ffn.fc2"]
    assert [name for name in names if name.startswith("text.1.")] == [f"text.1.{p}" for p in text]
    cross = [f"cross.{part}" for part in parts]
    assert [name for name in names if name.startswith("fusion.0.")] == [
        f"fusion.0.{p}" for p in text[:4] + cross + text[4:]
    ]


def test_keys_and_values_of_cross_attention_read_image_tokens(golden: XvlmForPretraining) -> None:
    weights = WeightMap.of(golden, ADAPTER)
    assert all(len(weight.owners) == 1 for weight in weights.values())
    reads_image = {name for name, w in weights.items() if w.owners[0].tokens == "vision"}
    assert reads_image == {
        name
        for name in weights
        if name.startswith("vision.") or re.search(r"cross\.(key|value)$", name)
    }


def test_base_size_has_the_published_number_of_weights() -> None:
    with torch.device("meta"):
        model = XvlmForPretraining(XvlmPretrainConfig.base())
    groups = WeightMap.of(model, ADAPTER).by_modality()
    counts = {name: sum(weight.numel for weight in group) for name, group in groups.items()}
    assert counts == {"vision": 84_934_656, "text": 42_467_328, "fusion": 56_623_104}
    assert sum(counts.values()) == 184_025_088


@pytest.mark.parametrize("make", [tiny, tiny_swin])
def test_what_is_left_alone_has_a_reason(make: Any) -> None:
    model = make()
    prunable = {weight.aliases[0] for weight in WeightMap.of(model, ADAPTER).values()}
    reasons = {}
    for path, _ in model.named_parameters():
        if path not in prunable:
            rules = [e for e in ADAPTER.exclusions(model) if re.search(e.pattern, path)]
            assert rules, path
            reasons[path] = rules[0].reason
    assert reasons["temp"].startswith("temperature")
    assert reasons["vision_proj.weight"].startswith("projection")
    assert reasons["itm_head.0.weight"].startswith("ITM head")
    assert reasons["text_encoder.bert.embeddings.word_embeddings.weight"].startswith("embeddings")
    assert reasons["text_encoder.bert.encoder.layer.0.output.dense.bias"] == "bias"
    assert not any(re.search(e.pattern, p) for e in ADAPTER.exclusions(model) for p in prunable)


def test_a_layer_that_something_wraps_is_refused() -> None:
    model = tiny()
    model.text_encoder.bert.encoder.layer[0].intermediate.dense = nn.Identity()
    with pytest.raises(UnsupportedError, match=r"intermediate\.dense is a Identity, not a Linear"):
        WeightMap.of(model, ADAPTER)


def test_claims_its_class_and_no_other() -> None:
    class Derived(XvlmForPretraining):
        pass

    assert ADAPTER.claims(tiny())
    assert ADAPTER.claims(Derived(tiny_config()))
    assert not ADAPTER.claims(tiny().vision_encoder)
    assert isinstance(ADAPTER, RetrievalAdapter)
    assert isinstance(ADAPTER, MatchingAdapter)
    assert not isinstance(ADAPTER, CaptioningAdapter)


def test_asking_about_another_model_imports_no_modelling_library() -> None:
    code = (
        "import sys; from torch import nn; from vlp_adapters.xvlm.adapter import XvlmAdapter;"
        "assert not XvlmAdapter().claims(nn.Linear(1, 1)); assert XvlmAdapter().load('x') is None;"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


# --- streams ---


def second_moments(
    model: XvlmForPretraining, batches: list[dict[str, Tensor]], *, published: bool
) -> dict[str, Tensor]:
    """By canonical name the sum of squared inputs over real tokens, per sample."""
    sums: dict[str, Tensor] = {}
    real: dict[str, Tensor | None] = {}
    handles = []
    for name, weight in WeightMap.of(model, ADAPTER).items():

        def add(
            _: nn.Module, args: Any, name: str = name, tokens: str = weight.owners[0].tokens
        ) -> None:
            mask = real[tokens]
            inputs = args[0].flatten(0, -2) if mask is None else args[0][mask]
            sums[name] = sums.get(name, 0) + inputs.double().square().sum(dim=0)

        owner = model.get_submodule(weight.owners[0].module)
        handles.append(owner.register_forward_pre_hook(add))
    with torch.no_grad():
        for one in batches:
            for stream in ADAPTER.streams(model, one, published=published):
                real = dict(stream.real)
                stream.run()
    for handle in handles:
        handle.remove()
    samples = sum(len(one["input_ids"]) for one in batches)
    return {name: total / samples for name, total in sums.items()}


@pytest.mark.parametrize("run", FILES)
def test_activation_norms_are_the_published_ones(golden: XvlmForPretraining, run: str) -> None:
    expected = load_file(GOLDEN / f"actn_norms{run}.safetensors")
    found = second_moments(golden, batches_from_golden(GOLDEN, FILES[run]), published=True)
    weights = WeightMap.of(golden, ADAPTER)
    assert set(found) == set(weights)
    for name, weight in weights.items():
        original = ADAPTER.original_name(weight.aliases[0])
        assert original is not None
        torch.testing.assert_close(
            found[name], expected[original].double(), rtol=1e-4, atol=0, msg=name
        )


def test_image_tokens_are_all_real_unless_published(golden: XvlmForPretraining) -> None:
    """The published code drops image tokens when captions are as long as the image."""
    for run, is_mistaken in (("", False), ("_len17", True)):
        batches = batches_from_golden(GOLDEN, FILES[run])
        ours = second_moments(golden, batches, published=False)
        published = second_moments(golden, batches, published=True)
        differ = {name for name, value in ours.items() if not torch.equal(value, published[name])}
        expected = {f"fusion.{j}.cross.{part}" for j in (0, 1) for part in ("key", "value")}
        assert differ == (expected if is_mistaken else set())


def test_padding_does_not_count(golden: XvlmForPretraining, batch: dict[str, Tensor]) -> None:
    mask = batch["attention_mask"]
    assert not mask.all()
    noise = batch | {"input_ids": batch["input_ids"].masked_fill(mask == 0, 77)}
    one, two = (second_moments(golden, [b], published=False) for b in (batch, noise))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], msg=name)


def test_streams_run_each_tower_once_and_pad_nothing_else(golden: XvlmForPretraining) -> None:
    batch = batches_from_golden(GOLDEN)[1]
    streams = list(ADAPTER.streams(golden, batch))
    assert [stream.name for stream in streams] == ["vision", "text", "fusion"]
    assert [sorted(stream.real) for stream in streams] == [["vision"], ["text"], ["text", "vision"]]
    assert streams[2].real["vision"] is None
    assert torch.equal(streams[1].real["text"], batch["attention_mask"] == 1)


# --- losses ---


@torch.no_grad()
@pytest.mark.parametrize("index", range(6))
def test_losses_with_recorded_negatives(golden: XvlmForPretraining, index: int) -> None:
    batch = batches_from_golden(GOLDEN)[index]
    losses = ADAPTER.losses(golden, batch, negatives=recorded_negatives(index))
    expected = RECORD["sequence"][index]["losses"]
    assert list(losses) == ["itc", "itm", "mlm"]
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name], abs=1e-5)


def test_recorded_tensors_and_draws(golden: XvlmForPretraining, batch: dict[str, Tensor]) -> None:
    expected = load_file(GOLDEN / "outputs.safetensors")
    torch.manual_seed(0)
    found = outputs(golden, batch)
    injected = outputs(golden, batch, recorded_negatives(0))
    assert set(found) - set(expected) == {"itc", "itm", "mlm"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4)
        assert torch.equal(found[name], injected[name])


def test_the_sum_of_losses_reaches_every_weight() -> None:
    model = tiny()
    model.config.text_config.mask_token_id = 3
    torch.stack([*ADAPTER.losses(model, tiny_batch()).values()]).sum().backward()
    for name, weight in WeightMap.of(model, ADAPTER).items():
        assert weight.parameter.grad is not None, name
        assert weight.parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_random_choices_depend_on_the_batch_only() -> None:
    model = tiny()
    model.config.text_config.mask_token_id = 3
    state = torch.get_rng_state()
    first = ADAPTER.losses(model, tiny_batch())
    torch.manual_seed(99)
    again = ADAPTER.losses(model, tiny_batch())
    assert first == again
    torch.set_rng_state(state)
    ADAPTER.losses(model, tiny_batch())
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_masked_words_of_the_batch_come_before_made_ones() -> None:
    model = tiny()
    model.config.text_config.mask_token_id = 3
    nothing = torch.full((2, 6), IGNORED)
    batch = tiny_batch(mlm_input_ids=tiny_batch()["input_ids"], mlm_labels=nothing)
    assert ADAPTER.losses(model, batch)["mlm"] == 0.0
    assert ADAPTER.losses(model, tiny_batch())["mlm"] > 0.0


def test_bad_batches_say_what_to_do() -> None:
    model = tiny()
    no_mask = {key: value for key, value in tiny_batch().items() if key != "attention_mask"}
    with pytest.raises(BatchError, match=r"no attention_mask .* padding=True"):
        ADAPTER.streams(model, no_mask)
    with pytest.raises(BatchError, match=r"\[3, 3, 16, 16\], input_ids \[2, 6\] .* do not fit"):
        ADAPTER.streams(model, tiny_batch(pixel_values=torch.rand(3, 3, 16, 16)))
    long = torch.ones(2, 17, dtype=torch.long)
    with pytest.raises(BatchError, match="17 tokens, the model has positions for 16"):
        ADAPTER.streams(model, tiny_batch(input_ids=long, attention_mask=long))
    left = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    with pytest.raises(BatchError, match="padding_side to 'right'"):
        ADAPTER.streams(model, tiny_batch(attention_mask=left))
    with pytest.raises(BatchError, match="at least 2"):
        ADAPTER.losses(model, {key: value[:1] for key, value in tiny_batch().items()})
    with pytest.raises(BatchError, match="mlm_input_ids and mlm_labels in the batch"):
        ADAPTER.losses(model, tiny_batch())
    wrong = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(BatchError, match=r"mlm_labels \[2, 5\] do not fit input_ids \[2, 6\]"):
        ADAPTER.losses(model, tiny_batch(mlm_input_ids=wrong, mlm_labels=wrong))


# --- batches ---


def processor(**special: Any) -> CLIPProcessor:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "seven", "below"]
    vocabulary = {word: index for index, word in enumerate(words)}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    tokenizer = BertTokenizerFast(vocab=vocabulary, model_max_length=16, **special)
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def collated(**special: Any) -> dict[str, Tensor]:
    pictures = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    return ADAPTER.collate(processor(**special), pictures, ["a red seven below a blue", "blue"])


def test_collate_pads_on_the_right_and_masks_words() -> None:
    batch = collated()
    assert list(batch) == [
        "pixel_values", "input_ids", "attention_mask", "mlm_input_ids", "mlm_labels"
    ]  # fmt: skip
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["input_ids"].tolist() == [[2, 5, 6, 8, 9, 5, 7, 3], [2, 7, 3, 0, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 3 + [0] * 5]
    chosen = batch["mlm_labels"] != IGNORED
    assert torch.equal(batch["mlm_labels"][chosen], batch["input_ids"][chosen])
    assert (batch["input_ids"][chosen] > 4).all()  # never a special token
    assert chosen.sum(dim=1).tolist() == [2, 1]
    again = collated()
    assert all(torch.equal(value, again[name]) for name, value in batch.items())
    losses = ADAPTER.losses(tiny(), batch)
    assert all(torch.isfinite(value) for value in losses.values())


def test_without_a_mask_token_there_are_no_masked_words() -> None:
    assert list(collated(mask_token=None)) == ["pixel_values", "input_ids", "attention_mask"]


# --- retrieval ---


@torch.no_grad()
def test_features_and_match_use_precomputed_embeddings() -> None:
    model, batch = tiny(), tiny_batch()
    features = ADAPTER.image_features(model, batch), ADAPTER.text_features(model, batch)
    for feature in features:
        assert feature.shape == (2, 8)
        torch.testing.assert_close(feature.norm(dim=-1), torch.ones(2))
    odds = ADAPTER.match(model, batch)
    assert odds.shape == (2,)
    mask = batch["attention_mask"]
    text = model.encode_text(batch["input_ids"], mask)
    image = model.encode_image(batch["pixel_values"])
    probability = model.match_logits(text, mask, image).softmax(dim=-1)[:, 1]
    torch.testing.assert_close(odds.sigmoid(), probability)
    made = {"text_embeds": text, "image_embeds": image, "attention_mask": mask}
    assert torch.equal(ADAPTER.match(model, made), odds)
    assert torch.equal(ADAPTER.image_features(model, made), features[0])
    assert torch.equal(ADAPTER.text_features(model, made), features[1])
    with pytest.raises(BatchError, match="no attention_mask"):
        ADAPTER.match(model, {"text_embeds": text, "image_embeds": image})


# --- downstream models ---


def test_retrieval_keeps_every_weight_once() -> None:
    where = ADAPTER.for_task("retrieval", tiny())
    assert where["vision.0.mlp.fc1"] == ("vision_encoder.encoder.layers.0.mlp.fc1.weight",)
    assert where["text.0.self.query"] == (
        "text_encoder.encoder.layer.0.attention.self.query.weight",
    )
    assert where["fusion.1.cross.key"] == (
        "text_encoder.encoder.layer.2.crossattention.self.key.weight",
    )


def test_captioning_turns_the_text_encoder_into_the_decoder() -> None:
    where = ADAPTER.for_task("captioning", tiny())
    assert where["vision.1.attention.key"] == (
        "vision_encoder.encoder.layers.1.self_attn.k_proj.weight",
    )
    assert where["text.0.ffn.fc2"] == ("text_decoder.bert.encoder.layer.0.output.dense.weight",)
    assert where["fusion.0.ffn.fc1"] == (
        "text_decoder.bert.encoder.layer.1.intermediate.dense.weight",
    )


def test_vqa_decoder_inherits_from_the_fusion_layers() -> None:
    where = ADAPTER.for_task("vqa", tiny())
    assert where["text.0.self.value"] == (
        "text_encoder.encoder.layer.0.attention.self.value.weight",
    )
    assert where["fusion.1.self.output"] == (
        "text_encoder.encoder.layer.2.attention.output.dense.weight",
        "text_decoder.bert.encoder.layer.1.attention.output.dense.weight",
    )
    assert where["fusion.0.cross.key"] == (
        "text_encoder.encoder.layer.1.crossattention.self.key.weight",
        "text_decoder.bert.encoder.layer.0.crossattention.self.key.weight",
    )


def test_vqa_keys_and_values_are_new_where_the_widths_differ(golden: XvlmForPretraining) -> None:
    """The golden model's vision encoder is 24 wide, its text encoder 32."""
    where = ADAPTER.for_task("vqa", golden)
    single = {name for name, paths in where.items() if len(paths) == 1}
    assert {name for name in single if name.startswith("fusion.")} == {
        f"fusion.{j}.cross.{part}" for j in (0, 1) for part in ("key", "value")
    }


@pytest.mark.parametrize("task", ["pretraining", "retrieval", "captioning", "vqa"])
def test_every_weight_has_its_own_path(golden: XvlmForPretraining, task: str) -> None:
    where = ADAPTER.for_task(task, golden)
    assert list(where) == list(WeightMap.of(golden, ADAPTER))
    paths = [path for paths in where.values() for path in paths]
    assert len(set(paths)) == len(paths)


def test_an_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match="pretraining, retrieval, captioning, vqa"):
        ADAPTER.for_task("grounding", tiny())


# --- files ---


def test_loads_what_save_pretrained_wrote(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    loaded = ADAPTER.load(str(tmp_path))
    assert isinstance(loaded, XvlmForPretraining)
    assert not loaded.training
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_loads_original_checkpoints(tmp_path: Path, name: str) -> None:
    model = tiny()
    save_original(model, tmp_path / name)
    loaded = ADAPTER.load(str(tmp_path / name))
    assert isinstance(loaded, XvlmForPretraining)
    assert not loaded.training
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())


def test_loads_checkpoints_of_distributed_training_and_old_torch(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "model.pth"
    save_original(model, path)
    state = {f"module.{name}": value for name, value in torch.load(path)["model"].items()}
    torch.save({"model": state, "epoch": 3}, path, _use_new_zipfile_serialization=False)
    assert isinstance(ADAPTER.load(str(path)), XvlmForPretraining)


def test_is_quiet_about_formats_of_others(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "model.ckpt").write_bytes(b"")
    torch.save({"model": {"visual_encoder.cls_token": torch.ones(1)}}, tmp_path / "blip.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    save_file({"weight": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    names = [path.name for path in tmp_path.iterdir() if path.name != "config.json"]
    assert len(names) == 6
    for source in [str(tmp_path), "org/model", *(str(tmp_path / name) for name in names)]:
        assert ADAPTER.load(source) is None


def test_a_damaged_x_vlm_is_an_error(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    del state["itm_head.0.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"lacks 1 parameter.*itm_head\.0\.weight"):
        ADAPTER.load(str(tmp_path))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UnsupportedError, match="cannot load the X-VLM model"):
        ADAPTER.load(str(tmp_path))
    weights.unlink()
    with pytest.raises(UnsupportedError, match="cannot load the X-VLM model"):
        ADAPTER.load(str(tmp_path))


# --- Swin: shapes only, numbers are not compared with the original ---


@torch.no_grad()
def test_swin_counts_blocks_over_its_stages() -> None:
    model = tiny_swin()
    weights = WeightMap.of(model, ADAPTER)
    vision = [name for name in weights if name.startswith("vision.")]
    assert len(vision) == 3 * 6 + 1
    assert vision[12] == "vision.1.downsample.reduction"
    assert vision[13] == "vision.2.attention.query"
    batch = tiny_batch()
    reached = second_moments(model, [batch], published=True)
    assert set(reached) == set(weights)
    five = torch.tensor([[1, 7, 8, 9, 2], [1, 7, 2, 0, 0]])  # the image has 1 + 2 x 2 tokens
    batch |= {"input_ids": five, "attention_mask": five.sign()}
    fusion = list(ADAPTER.streams(model, batch, published=True))[2]
    assert fusion.real["vision"] is fusion.real["text"]
    assert model.encode_image(batch["pixel_values"]).shape[1] == 5


def test_swin_has_no_paths_in_downstream_models() -> None:
    assert "vision.2.mlp.fc1" in ADAPTER.for_task("pretraining", tiny_swin())
    with pytest.raises(UnsupportedError, match="query, key and value in one matrix"):
        ADAPTER.for_task("retrieval", tiny_swin())
