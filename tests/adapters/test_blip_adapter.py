"""BLIP's pre-training model as pruning sees it: shared weights, streams, losses, files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BlipConfig, BlipForImageTextRetrieval, BlipTextConfig, BlipVisionConfig

from benchmarks.parity.blip import batches_from_golden, model_from_golden
from vlp_adapters.blip import BlipForPretraining, BlipPretrainConfig, save_original
from vlp_adapters.blip.adapter import BlipAdapter
from vlp_plugins.adapter import CaptioningAdapter, MatchingAdapter, RetrievalAdapter
from vlp_plugins.calibration import calibrate
from vlp_plugins.errors import BatchError, UnsupportedError
from vlp_plugins.inspection import inspect_model
from vlp_plugins.statistics.second_moment import INPUT_SECOND_MOMENT, InputSecondMoment
from vlp_plugins.weights import WeightMap

ADAPTER = BlipAdapter()
GOLDEN = Path(__file__).parents[1] / "golden" / "blip"


def tiny(**options: Any) -> BlipForPretraining:
    """One layer of 64 = one attention head, as in published sizes, so that files can be read."""
    torch.manual_seed(0)
    vision = BlipVisionConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=16,
        patch_size=8,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=110,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=32,
        max_position_embeddings=16,
        bos_token_id=108,
    )
    sizes = {"embed_dim": 8, "queue_size": 4, "dec_token_id": 108, "enc_token_id": 109}
    config = BlipPretrainConfig(vision_config=vision, text_config=text, **(sizes | options))
    return BlipForPretraining(config).eval()


def tiny_batch() -> dict[str, Tensor]:
    """Two texts of 6 and 3 tokens, padded to 6; the number of image tokens is 5."""
    ids = torch.tensor([[1, 7, 8, 9, 10, 2], [1, 7, 2, 0, 0, 0]])
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": ids.sign()}


# --- weights ---


def test_a_weight_that_encoder_and_decoder_share_is_one_with_two_owners() -> None:
    weights = WeightMap.of(tiny(), ADAPTER)
    shared = weights["text.0.cross.query"]
    path = "encoder.layer.0.crossattention.self.query"
    assert [owner.module for owner in shared.owners] == [
        f"text_encoder.{path}",
        f"text_decoder.bert.{path}",
    ]
    assert shared.aliases == tuple(owner.path for owner in shared.owners)
    assert list(weights) == [
        *(f"vision.0.{part}" for part in ("attention.qkv", "attention.output")),
        *(f"vision.0.mlp.{part}" for part in ("fc1", "fc2")),
        *(f"text.0.self.{part}" for part in ("query", "key", "value", "output")),
        *(f"text.0.cross.{part}" for part in ("query", "key", "value", "output")),
        *(f"text.0.ffn.{part}" for part in ("fc1", "fc2")),
        *(f"decoder.0.self.{part}" for part in ("query", "key", "value", "output")),
    ]
    assert {name for name, w in weights.items() if len(w.owners) == 2} == {
        name for name in weights if ".cross." in name or ".ffn." in name
    }


def test_modalities_are_vision_and_text_and_cross_attention_reads_image_tokens() -> None:
    weights = WeightMap.of(tiny(), ADAPTER)
    assert list(weights.by_modality()) == ["vision", "text"]
    assert {name for name, w in weights.items() if w.owners[0].tokens == "vision"} == {
        *(weight.name for weight in weights.by_modality()["vision"]),
        "text.0.cross.key",
        "text.0.cross.value",
    }


def test_prunes_what_the_published_code_prunes_in_its_order() -> None:
    weights = WeightMap.of(model_from_golden(GOLDEN), ADAPTER)
    recorded = json.loads((GOLDEN / "distribution.json").read_text())["modality"]
    originals = {ADAPTER.original_name(w.aliases[0]): w.modality for w in weights.values()}
    assert list(originals.items()) == list(recorded.items())
    assert weights.numel == 45_568


def test_blip_base_has_as_many_prunable_weights_as_the_papers_count() -> None:
    with torch.device("meta"):
        model = BlipForPretraining(BlipPretrainConfig.base())
    weights = WeightMap.of(model, ADAPTER)
    assert weights.numel == 226_492_416
    assert len(weights) == 12 * (4 + 10 + 4)


def test_what_is_not_pruned_has_a_reason() -> None:
    found = inspect_model(tiny(), ADAPTER)
    reasons = {group.reason.split(":")[0]: group.example for group in found.excluded}
    assert reasons["momentum copy"] == "vision_model_m.embeddings.class_embedding"
    assert reasons["LM head"].startswith("text_decoder.cls.predictions.")
    assert reasons["projection into the common space"] == "vision_proj.weight"
    assert "ITM head" in reasons
    assert "not declared by the adapter" not in reasons


def test_a_wrapped_layer_is_refused_by_name() -> None:
    model = tiny()
    layer = model.text_decoder.bert.encoder.layer[0].attention.self
    layer.query = nn.Sequential(layer.query)
    with pytest.raises(UnsupportedError, match=r"text_decoder.*query is a Sequential"):
        list(ADAPTER.weights(model))


def test_asking_about_another_model_imports_no_transformers() -> None:
    code = (
        "import sys, torch\n"
        "from vlp_adapters.blip.adapter import BlipAdapter\n"
        "assert not BlipAdapter().claims(torch.nn.Linear(1, 1))\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})


# --- streams ---


def norms(file: str, *, published: bool, owners: Any = "first") -> dict[str, Tensor]:
    """By original name MULTIFLOW's a^2 over the batches of a golden file."""
    model = model_from_golden(GOLDEN)
    weights = WeightMap.of(model, ADAPTER)
    batches = batches_from_golden(GOLDEN, file)
    found = calibrate(model, ADAPTER, weights, batches, [InputSecondMoment()], published=published)
    return {
        str(ADAPTER.original_name(w.aliases[0])): found.mean(
            INPUT_SECOND_MOMENT, name, owners=owners
        )
        for name, w in weights.items()
    }


@pytest.mark.parametrize("suffix", ["", "_len17"])
def test_the_first_owners_give_the_published_activation_norms(suffix: str) -> None:
    expected = load_file(GOLDEN / f"actn_norms{suffix}.safetensors")
    found = norms(f"batches{suffix}.safetensors", published=True)
    assert found.keys() == {f"{name.removesuffix('.weight')}.weight" for name in expected}
    for name, values in expected.items():
        mine = found[f"{name.removesuffix('.weight')}.weight"]
        torch.testing.assert_close(mine, values.double(), rtol=1e-4, atol=0)


def test_image_tokens_are_not_taken_for_text_unless_that_is_to_be_repeated() -> None:
    published = norms("batches_len17.safetensors", published=True)
    right = norms("batches_len17.safetensors", published=False)
    differ = {name for name in right if not torch.allclose(right[name], published[name])}
    assert differ == {
        name
        for name in right
        if name.endswith(("crossattention.self.key.weight", "crossattention.self.value.weight"))
    }
    assert all((right[name] >= published[name]).all() for name in differ)


def test_all_owners_add_what_the_decoder_reads() -> None:
    first = norms("batches.safetensors", published=False)
    both = norms("batches.safetensors", published=False, owners="all")
    more = {name for name in first if (both[name] > first[name] * 1.01).any()}
    assert more == {n for n in first if n.startswith("text_encoder.") and ".attention." not in n}


@torch.no_grad()
def test_streams_run_towers_only_and_change_no_state() -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    called: list[str] = []
    watched = ("text_decoder.cls", "vision_model_m", "text_encoder_m", "itm_head", "text_proj")
    for name in watched:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    names = []
    for stream in ADAPTER.streams(model, tiny_batch()):
        names.append(stream.name)
        stream.run()
    assert names == ["vision", "encoder", "decoder"]
    assert called == []
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_encoder_and_decoder_read_what_fuse_and_decode_read() -> None:
    model, batch = tiny(), tiny_batch()
    seen: list[Tensor] = []
    words = [model.text_encoder.embeddings, model.text_decoder.bert.embeddings]
    for module in words:
        module.register_forward_hook(lambda _, args, output: seen.append(output))
    for stream in ADAPTER.streams(model, batch):
        stream.run()
    image = model.encode_image(batch["pixel_values"])
    model.fuse(batch["input_ids"], batch["attention_mask"], image)
    model.decode(batch["input_ids"], batch["attention_mask"], image)
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": None}, "no attention_mask"),
        ({"pixel_values": None}, "no pixel_values"),
        ({"pixel_values": torch.zeros(3, 3, 16, 16)}, r"\[3, 3, 16, 16\].* do not fit"),
        ({"attention_mask": torch.ones(2, 5)}, r"\[2, 6\].*\[2, 5\] do not fit"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]] * 2)}, "padding_side to 'right'"),
        (
            {"input_ids": torch.ones(2, 17).long(), "attention_mask": torch.ones(2, 17).long()},
            "17 tokens, the model has positions for 16",
        ),
    ],
)
def test_bad_batches_say_what_to_do(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(BatchError, match=message):
        ADAPTER.streams(tiny(), tiny_batch() | change)
    with pytest.raises(BatchError, match=message):
        ADAPTER.losses(tiny(), tiny_batch() | change)


# --- losses ---


def test_losses_are_the_published_ones_and_advance_the_state_like_training() -> None:
    model = model_from_golden(GOLDEN)
    recorded = json.loads((GOLDEN / "outputs.json").read_text())["sequence"]
    for batch, step in zip(batches_from_golden(GOLDEN), recorded, strict=True):
        drawn = step["negatives"][0]
        negatives = (drawn["image_neg"], drawn["text_neg"])
        losses = ADAPTER.losses(model, batch, negatives=negatives)
        assert list(losses) == ["itc", "itm", "lm"]
        for name, published in zip(losses, ("ita", "itm", "lm"), strict=True):
            expected = step["losses"][published]
            assert losses[name].item() == pytest.approx(expected, abs=1e-5)


def test_the_state_can_be_left_alone() -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = ADAPTER.losses(model, tiny_batch(), update_state=False)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    moved = ADAPTER.losses(model, tiny_batch())
    assert not torch.equal(before["image_queue"], model.image_queue)
    torch.testing.assert_close(kept, moved)  # the twins were copies: no difference on batch one


def test_negatives_are_drawn_from_the_batch_and_can_be_injected() -> None:
    model, batch = tiny(), batch_of_four()
    before = torch.random.get_rng_state()
    one = ADAPTER.losses(model, batch, update_state=False)
    two = ADAPTER.losses(model, batch, update_state=False)
    assert torch.equal(before, torch.random.get_rng_state())
    assert one["itm"] == two["itm"]
    values = {
        ADAPTER.losses(model, batch, negatives=([n, 0, 0, 0], [n, 0, 0, 0]), update_state=False)[
            "itm"
        ].item()
        for n in (1, 2, 3)
    }
    assert len(values) == 3


def batch_of_four() -> dict[str, Tensor]:
    batch = tiny_batch()
    other = batch["pixel_values"].flip(0) * 2
    ids = batch["input_ids"] * 3
    return {
        "pixel_values": torch.cat([batch["pixel_values"], other]),
        "input_ids": torch.cat([batch["input_ids"], ids]),
        "attention_mask": torch.cat([batch["attention_mask"]] * 2),
    }


def test_one_pair_has_no_wrong_partner() -> None:
    one = {name: value[:1] for name, value in tiny_batch().items()}
    with pytest.raises(BatchError, match=r"only 1 pair\(s\); use batches of at least 2"):
        ADAPTER.losses(tiny(), one)


def test_gradients_reach_every_prunable_weight() -> None:
    model = tiny()
    sum(ADAPTER.losses(model, tiny_batch()).values()).backward()
    for name, weight in WeightMap.of(model, ADAPTER).items():
        assert weight.parameter.grad is not None, name
        assert weight.parameter.grad.abs().sum() > 0, name


# --- features ---


@torch.no_grad()
def test_features_matching_and_captions_are_the_models() -> None:
    assert isinstance(ADAPTER, RetrievalAdapter)
    assert isinstance(ADAPTER, MatchingAdapter)
    assert isinstance(ADAPTER, CaptioningAdapter)
    model, batch = tiny(), tiny_batch()
    text = (batch["input_ids"], batch["attention_mask"])
    images = ADAPTER.image_features(model, {"pixel_values": batch["pixel_values"]})
    torch.testing.assert_close(images, model.get_image_features(batch["pixel_values"]))
    torch.testing.assert_close(ADAPTER.text_features(model, batch), model.get_text_features(*text))
    embeds = model.encode_image(batch["pixel_values"])
    logits = model.match_logits(*text, embeds)
    odds = ADAPTER.match(model, batch)
    torch.testing.assert_close(odds.sigmoid(), logits.softmax(dim=1)[:, 1])
    known = {"image_embeds": embeds, "input_ids": text[0], "attention_mask": text[1]}
    assert torch.equal(ADAPTER.match(model, known), odds)
    ids = ADAPTER.caption(model, batch, max_length=7)
    assert torch.equal(ids, model.generate(batch["pixel_values"], max_length=7))
    assert ids.shape[1] <= 7


# --- files ---


def test_loads_what_save_pretrained_wrote(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    loaded = ADAPTER.load(str(tmp_path))
    assert isinstance(loaded, BlipForPretraining)
    assert not loaded.training
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert WeightMap.of(loaded, ADAPTER).structure == WeightMap.of(model, ADAPTER).structure


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_loads_original_checkpoints(tmp_path: Path, name: str) -> None:
    model = tiny()
    save_original(model, tmp_path / name)
    loaded = ADAPTER.load(str(tmp_path / name))
    assert isinstance(loaded, BlipForPretraining)
    assert not loaded.training
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_an_original_checkpoint_of_another_task_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "captioning.pth"
    save_original(tiny(), path)
    state = {
        name: value
        for name, value in torch.load(path)["model"].items()
        if name.startswith(("visual_encoder.", "text_decoder."))
    }
    torch.save({"model": state}, path)
    with pytest.raises(UnsupportedError, match="no BLIP pre-training checkpoint"):
        ADAPTER.load(str(path))


def test_is_quiet_about_formats_of_others(tmp_path: Path) -> None:
    config = BlipConfig(
        vision_config=tiny().config.vision_config.to_dict(),
        text_config=tiny().config.text_config.to_dict(),
    )
    BlipForImageTextRetrieval(config).save_pretrained(tmp_path / "retrieval")
    save_file({"vision_encoder.patch_embed.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    torch.save({"model": {"encoder.weight": torch.ones(1)}}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    for source in ("org/model", *map(str, tmp_path.iterdir())):
        assert ADAPTER.load(source) is None


def test_a_damaged_blip_is_an_error(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    del state["itm_head.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"lacks 1 parameter.*itm_head\.weight"):
        ADAPTER.load(str(tmp_path))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UnsupportedError, match="cannot load the BLIP model"):
        ADAPTER.load(str(tmp_path))


def test_every_parameter_has_the_name_of_the_original() -> None:
    original = load_file(GOLDEN / "model.safetensors")
    model = model_from_golden(GOLDEN)
    for path, parameter in model.named_parameters(remove_duplicate=False):
        assert torch.equal(original[ADAPTER.original_name(path) or ""], parameter)
    assert ADAPTER.original_name("text_model.encoder.layer.0.output.dense.weight") is None
    assert ADAPTER.original_name("encoder.layers.0.mlp.fc1.weight") is None  # of a tower alone
