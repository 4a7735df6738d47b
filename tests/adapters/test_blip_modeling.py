"""BLIP computes what the published implementation computes; ties, saving, captions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from blip_modeling_examples import tiny_batch, tiny_config
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from vlp_adapters.blip import BlipForPretraining, BlipPretrainConfig, load_original
from vlp_adapters.blip.convert import infer_config
from vlp_adapters.blip.names import from_original_name

GOLDEN = Path(__file__).parents[1] / "golden" / "blip"


OUTPUTS = json.loads((GOLDEN / "outputs.json").read_text())


LOSS_NAMES = {"itc": "ita", "itm": "itm", "lm": "lm"}  # ours -> the golden one


def inputs(index: int, file: str = "batches") -> dict[str, Tensor]:
    """Forward arguments of one golden batch."""
    batch = load_file(GOLDEN / f"{file}.safetensors")
    return {
        "pixel_values": batch["image"][index],
        "input_ids": batch["text_ids"][index],
        "attention_mask": batch["text_atts"][index],
    }


@pytest.fixture
def golden() -> BlipForPretraining:
    """The golden model; its losses were computed without soft targets."""
    state = load_file(GOLDEN / "model.safetensors")
    config = infer_config(state, vision_heads=4, text_heads=4, sep_token_id=2)
    config.alpha = 0.0
    return load_original(GOLDEN / "model.safetensors", config)


@pytest.fixture
def tiny() -> BlipForPretraining:
    torch.manual_seed(0)
    return BlipForPretraining(tiny_config(position_init_std=0.3)).eval()


def assert_tied(model: BlipForPretraining) -> None:
    """Every golden group of names is one Parameter; self-attentions are not shared."""
    layers = model.config.text_config.num_hidden_layers
    for group in json.loads((GOLDEN / "tied.json").read_text()):
        names = [from_original_name(name) for name in group]
        if any(f".layer.{n}." in group[0] for n in range(layers)) or ".layer." not in group[0]:
            assert len({id(model.get_parameter(name)) for name in names if name}) == 1, group
    encoder = dict(model.text_encoder.named_parameters())
    decoder = dict(model.text_decoder.bert.named_parameters())
    apart = {name for name in encoder if encoder[name] is not decoder[name]}
    assert apart == {name for name in encoder if ".attention." in name}


# --- parity with the published implementation ---


def test_losses_of_a_sequence_of_batches_equal_the_published_ones(
    golden: BlipForPretraining,
) -> None:
    torch.manual_seed(0)  # so that the hard negatives are the published ones too
    for index, expected in enumerate(OUTPUTS["sequence"]):
        output = golden(**inputs(index))
        drawn = expected["negatives"][0]
        assert output.negatives == (drawn["image_neg"], drawn["text_neg"])
        for ours, theirs in LOSS_NAMES.items():
            value = output.losses[ours].item()
            assert value == pytest.approx(expected["losses"][theirs], abs=1e-5)
        assert output.loss.item() == pytest.approx(expected["losses"]["total"], abs=1e-5)


@torch.no_grad()
def test_embeddings_and_logits_equal_the_published_ones(golden: BlipForPretraining) -> None:
    batch = inputs(0)
    text = (batch["input_ids"], batch["attention_mask"])
    image = golden.encode_image(batch["pixel_values"])
    drawn = OUTPUTS["batch0"]["negatives"][0]
    images = torch.cat([image, image[drawn["image_neg"]], image])
    ids, mask = (torch.cat([part, part, part[drawn["text_neg"]]]) for part in text)
    ours = {
        "image_embeds": image,
        "text_embeds": golden.encode_text(*text),
        "cross_embeds": golden.fuse(*text, image),
        "cross_embeds_neg": golden.fuse(ids[4:], mask[4:], images[4:]),
        "itm_logits": golden.match_logits(ids, mask, images),
        "decoder_logits": golden.decode(*text, image),
        "image_feat": golden.get_image_features(batch["pixel_values"]),
        "text_feat": golden.get_text_features(*text),
    }
    expected = load_file(GOLDEN / "outputs.safetensors")
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=0, msg=name)


def test_queues_after_one_batch_equal_the_published_ones(golden: BlipForPretraining) -> None:
    golden(**inputs(0))
    expected = load_file(GOLDEN / "outputs.safetensors")
    for name in ("image_queue", "text_queue", "queue_ptr"):
        value = getattr(golden, name)
        torch.testing.assert_close(value, expected[f"{name}_after"], atol=1e-5, rtol=0)


# --- attention ---


@torch.no_grad()
def test_encoders_look_both_ways_and_the_decoder_only_back(tiny: BlipForPretraining) -> None:
    batch = tiny_batch()
    ids, mask = batch["input_ids"], torch.ones_like(batch["attention_mask"])
    ids = ids.masked_fill(ids == 0, 5)
    changed = ids.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 40 + 4
    image = tiny.encode_image(batch["pixel_values"])
    for run in (
        lambda words: tiny.encode_text(words, mask),
        lambda words: tiny.fuse(words, mask, image),
    ):
        assert ((run(ids) - run(changed))[:, :6].abs().amax(dim=(1, 2)) > 1e-6).all()
    difference = (tiny.decode(ids, mask, image) - tiny.decode(changed, mask, image)).abs()
    assert difference[:, :6].max() == 0
    assert difference[:, 6:].max() > 1e-6


@torch.no_grad()
def test_padding_changes_nothing(tiny: BlipForPretraining) -> None:
    batch = tiny_batch()
    image = tiny.encode_image(batch["pixel_values"])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    short = (ids[:1, :6], mask[:1, :6])
    other = ids.masked_fill(mask == 0, 7)
    for padded in (ids, other):
        torch.testing.assert_close(tiny.encode_text(padded, mask)[:1, :6], tiny.encode_text(*short))
        torch.testing.assert_close(
            tiny.fuse(padded, mask, image)[:1, :6], tiny.fuse(*short, image[:1])
        )
        torch.testing.assert_close(
            tiny.decode(padded, mask, image)[:1, :6], tiny.decode(*short, image[:1])
        )


# --- shared weights ---


def test_ties_hold_after_construction_saving_and_a_training_step(
    tiny: BlipForPretraining, tmp_path: Path
) -> None:
    assert_tied(tiny)
    tiny.save_pretrained(tmp_path)
    loaded = BlipForPretraining.from_pretrained(tmp_path)
    assert_tied(loaded)
    optimizer = torch.optim.AdamW([p for p in loaded.parameters() if p.requires_grad], lr=1e-2)
    before = loaded.text_encoder.encoder.layer[0].output.dense.weight.detach().clone()
    loaded(**tiny_batch()).loss.backward()
    optimizer.step()
    assert_tied(loaded)
    assert not torch.equal(before, loaded.text_decoder.bert.encoder.layer[0].output.dense.weight)


def test_a_saved_folder_holds_each_tensor_once_and_loads_to_the_same_model(
    tiny: BlipForPretraining, tmp_path: Path
) -> None:
    tiny(**tiny_batch())  # so that queue and twins are no longer the initial ones
    tiny.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    state = tiny.state_dict()
    assert len(stored) == len({value.data_ptr() for value in state.values()})
    assert "text_encoder.embeddings.word_embeddings.weight" in stored
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, BlipForPretraining)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), BlipPretrainConfig)
    assert loaded.config.vision_config.initializer_range == 0.02
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name]), name
    for _, twin in loaded.momentum_pairs():
        assert not any(parameter.requires_grad for parameter in twin.parameters())


def test_a_saved_model_loads_in_a_process_that_only_names_the_class(
    tiny: BlipForPretraining, tmp_path: Path
) -> None:
    tiny.save_pretrained(tmp_path)
    code = (
        "import sys, vlp_adapters.blip as blip\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "blip.BlipForPretraining\n"
        "from transformers import AutoModel\n"
        f"print(type(AutoModel.from_pretrained({str(tmp_path)!r})).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "BlipForPretraining"


def test_blip_base_has_the_published_number_of_prunable_weights() -> None:
    with torch.device("meta"):
        model = BlipForPretraining(BlipPretrainConfig.base())
    towers = [model.vision_model.encoder, model.text_encoder.encoder]
    towers.append(model.text_decoder.bert.encoder)
    weights = {
        id(module.weight): module.weight.numel()
        for tower in towers
        for module in tower.modules()
        if isinstance(module, nn.Linear)
    }
    assert sum(weights.values()) == 226_492_416


# --- initialisation and configuration ---


def test_new_weights_have_the_configured_spread_and_twins_start_equal() -> None:
    model = BlipForPretraining(tiny_config(position_init_std=0.3))
    assert 0.01 < model.vision_model.encoder.layers[0].mlp.fc1.weight.std() < 0.03
    assert 0.2 < model.vision_model.embeddings.position_embedding.std() < 0.4
    assert 0.2 < model.text_decoder.bert.embeddings.position_embeddings.weight.std() < 0.4
    assert model.temp.item() == pytest.approx(0.07)
    torch.testing.assert_close(model.text_queue.norm(dim=0), torch.ones(12))
    for online, twin in model.momentum_pairs():
        for fast, slow in zip(online.parameters(), twin.parameters(), strict=True):
            assert torch.equal(fast, slow)
            assert fast is not slow


def test_a_special_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="enc_token_id=50 is outside the vocabulary of 50"):
        tiny_config(enc_token_id=50)


def test_untied_towers_are_refused() -> None:
    with pytest.raises(ValueError, match="would untie the two text towers"):
        tiny_config(tie_word_embeddings=False)


# --- generation ---


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_equals_generation_without(
    tiny: BlipForPretraining, beams: int
) -> None:
    with torch.no_grad():  # captions that differ between images, and end
        for parameter in tiny.text_decoder.parameters():
            parameter.mul_(3.0)
    images = tiny_batch()["pixel_values"]
    cached, plain = (
        tiny.generate(images, max_length=9, num_beams=beams, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, plain)
    assert (cached[:, 0] == 48).all()
    assert cached.shape[1] <= 9


@torch.no_grad()
def test_greedy_generation_takes_the_likeliest_word_at_each_step(
    golden: BlipForPretraining,
) -> None:
    images = inputs(0)["pixel_values"]
    written = golden.generate(images, max_length=8)
    embeds = golden.encode_image(images)
    logits = golden.decode(written, torch.ones_like(written), embeds)
    likeliest = logits.argmax(dim=-1)[:, :-1]
    running = (written[:, :-1] != golden.config.text_config.sep_token_id).cumprod(dim=1).bool()
    assert running.sum() > len(images)
    assert torch.equal(written[:, 1:][running], likeliest[running])
    assert (written[:, 1:][~running] == golden.config.text_config.pad_token_id).all()


@torch.no_grad()
def test_larger_images_use_interpolated_positions(tiny: BlipForPretraining) -> None:
    assert tiny.encode_image(torch.randn(2, 3, 32, 32)).shape == (2, 17, 24)
