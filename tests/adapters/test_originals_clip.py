"""CLIP and SigLIP checkpoints of OpenAI's and open_clip's code: loaded, compared, saved, pruned."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import GOLDEN, base_state, base_tensors, compare, recorded, settings
from safetensors.torch import save_file
from tiny_models import save_photos
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertTokenizer, CLIPConfig, CLIPModel, SiglipModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from vlp_command import command

from vlp_adapters.clip import load_original, save_original, state_to_original
from vlp_adapters.clip.convert import infer_config
from vlp_adapters.clip.modeling import SiglipWithClipVision
from vlp_adapters.clip.names import format_of
from vlp_plugins.loading import describe_file, load_model
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import UnsupportedError

OPEN_CLIP = {
    "openclip_native": CLIPModel,
    "openclip_native_quickgelu": CLIPModel,
    "openclip_customtext": CLIPModel,
    "openclip_siglip_customtext": SiglipWithClipVision,
    "openclip_siglip_timm": SiglipModel,
}
INPUTS = recorded("clip_openai_w128", "inputs")


def state_of(name: str) -> dict[str, torch.Tensor]:
    return recorded(name.removesuffix("_quickgelu"), "state")


def write(path: Path, name: str, **around: Any) -> Path:
    """The recorded state as a PyTorch file, bare or in a training file."""
    state = state_of(name)
    torch.save({**around, "state_dict": state} if around else state, path)
    return path


def write_config(folder: Path, name: str, **changes: Any) -> None:
    config = settings(name)["open_clip_config"]
    config["model_cfg"] |= changes
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def outputs(model: Any, adapter: Any) -> dict[str, torch.Tensor]:
    batch = {"pixel_values": INPUTS["image"], "input_ids": INPUTS["input_ids"]}
    if adapter.name == "clip":
        batch["attention_mask"] = torch.ones_like(INPUTS["input_ids"])
    with torch.no_grad():
        whole = model(**batch)
        return {
            "image_feat": adapter.image_features(model, batch),
            "text_feat": adapter.text_features(model, batch),
            "logits_per_image": whole.logits_per_image,
            "logits_per_text": whole.logits_per_text,
        }


# --- the recorded outputs ---


def test_originals_of_openai_need_nothing_but_the_file(tmp_path, record_property, caplog) -> None:
    state = state_of("clip_openai_w128")
    marks = {"input_resolution": 32, "context_length": 16, "vocab_size": 64}
    torch.save(state | {n: torch.tensor(v) for n, v in marks.items()}, tmp_path / "ViT.pt")
    model, adapter = load_model(str(tmp_path / "ViT.pt"))
    assert not caplog.records
    compare("clip_openai_w128", outputs(model, adapter), record_property)


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_originals_of_open_clip_in_a_downloaded_folder(name, tmp_path, record_property) -> None:
    save_file(state_of(name), tmp_path / "open_clip_model.safetensors")
    # The configuration of timm is looked up by name, and does not say the heads.
    (tmp_path / "open_clip_model.json").write_text('{"vision_heads": 2}')
    write_config(tmp_path, name)
    model, adapter = load_model(str(tmp_path))
    assert type(model) is OPEN_CLIP[name]
    compare(name, outputs(model, adapter), record_property)


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_originals_of_open_clip_in_a_training_file(name, tmp_path, record_property) -> None:
    state = {f"module.{key}": value for key, value in state_of(name).items()}
    around = {"epoch": 3, "name": "run", "optimizer": {"state": {}}, "state_dict": state}
    torch.save(around, tmp_path / "epoch_3.pt")
    known = settings(name)
    options = {key: known[key] for key in ("hidden_act", "vision_heads", "text_heads")}
    if "siglip" in name:
        options["text_eps"] = known["layer_norm_eps"]
        options["text_act"] = known.get("text_act")
    (tmp_path / "epoch_3.json").write_text(json.dumps(options))
    model, adapter = load_model(str(tmp_path / "epoch_3.pt"))
    compare(name, outputs(model, adapter), record_property)
    again = load_original(write(tmp_path / "bare.pth", name), **options)
    compare(name, outputs(again, adapter), record_property)


@pytest.mark.parametrize("name", ["clip_openai_w128", *OPEN_CLIP])
@pytest.mark.parametrize("file", ["again.pt", "again.safetensors"])
def test_originals_are_written_back_as_they_came(name, file, tmp_path) -> None:
    heads = {} if name == "clip_openai_w128" else {"vision_heads": 2, "text_heads": 2}
    model = load_original(write(tmp_path / "clip.pt", name), hidden_act="gelu", **heads)
    model.save_pretrained(tmp_path / "folder")
    model, _ = load_model(str(tmp_path / "folder"))  # the format is still known
    save_original(model, tmp_path / file)
    written = torch.load(tmp_path / file) if file.endswith(".pt") else None
    written = written or state_to_original(load_original(tmp_path / file, model.config))
    expected = state_of(name)
    assert written.keys() == expected.keys()
    for key, value in expected.items():
        assert written[key].shape == value.shape
        assert written[key].dtype == value.dtype
        assert torch.equal(written[key], value)


# --- the published sizes ---


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("clip_openai_vitb32", CLIPModel),
        ("openclip_vitb32_customtext", CLIPModel),
        ("openclip_vitb16_siglip_customtext", SiglipModel),
    ],
)
def test_originals_of_the_published_size_have_all_keys(name, kind, tmp_path, monkeypatch) -> None:
    written: dict[str, torch.Tensor] = {}
    convert = "vlp_adapters.clip.convert."
    with FakeTensorMode():
        state = base_state(name)
        monkeypatch.setattr(convert + "read_state", lambda path: state)
        monkeypatch.setattr(convert + "write_state", lambda state, path, key: written.update(state))
        model = load_original("nowhere.pt", hidden_act="gelu")
        assert type(model) is kind
        save_original(model, tmp_path / "back.safetensors", half=name == "clip_openai_vitb32")
    assert {
        key: (list(value.shape), str(value.dtype).removeprefix("torch."))
        for key, value in written.items()
    } == base_tensors(name)
    assert model.config.vision_config.num_attention_heads == 12
    assert model.config.vision_config.image_size == 224


# --- what shapes do not tell ---


def test_originals_whose_heads_cannot_be_guessed_name_keyword_and_file(tmp_path) -> None:
    path = write(tmp_path / "clip.pth", "openclip_native")
    with pytest.raises(UnsupportedError, match=r"32 wide, .* pass vision_heads, or .*\.json next"):
        load_original(path, hidden_act="gelu")
    with pytest.raises(UnsupportedError, match=r"pass text_heads"):
        load_original(path, hidden_act="gelu", vision_heads=2)
    wide = {"visual.conv1.weight": torch.empty(1280, 3, 14, 14, device="meta")}
    state = state_of("openclip_native") | wide
    with pytest.raises(UnsupportedError, match="1280 wide"):  # 16 heads in ViT-H-14, not 20
        infer_config(state)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"heads": 2}', r"clip.json has heads, which the loader of clip.pth does not take; it "),
        ('{"vision_heads": "two"}', r"vision_heads is 'two'"),
        ('{"vision_heads": 5, "text_heads": 2}', r"vision_heads is 5"),
        ('{"vision_heads": 2, "text_heads": 0}', r"text_heads is 0"),
        ('{"hidden_act": "gleu"}', r"hidden_act is 'gleu'"),
    ],
)
def test_originals_with_wrong_options_are_refused(text, message, tmp_path) -> None:
    path = write(tmp_path / "clip.pth", "openclip_native")
    (tmp_path / "clip.json").write_text(text)
    with pytest.raises(UnsupportedError, match=message):
        load_original(path)


def test_an_unknown_keyword_is_an_error_of_originals(tmp_path) -> None:
    path = write(tmp_path / "clip.pth", "openclip_native")
    with pytest.raises(UnsupportedError, match="'heads' is no option .* takes hidden_act"):
        load_original(path, heads=2)


def test_originals_that_transformers_computes_differently_are_refused(tmp_path) -> None:
    path = write(tmp_path / "open_clip_pytorch_model.bin", "openclip_native")
    text = settings("openclip_native")["open_clip_config"]["model_cfg"]["text_cfg"]
    write_config(tmp_path, "openclip_native", text_cfg=text | {"pool_type": "eos", "eos_id": 2})
    with pytest.raises(UnsupportedError, match=r"text_cfg says pool_type 'eos', .* not supported"):
        load_original(path)


def test_siglip_originals_with_wide_towers_have_16_heads() -> None:
    with FakeTensorMode():
        state = {
            key: torch.empty([1152 if n == 768 else n for n in shape])
            for key, (shape, _) in base_tensors("openclip_vitb16_siglip_customtext").items()
        }
        found = infer_config(state)
    assert found.vision_config.num_attention_heads == 16
    assert found.text_config.num_attention_heads == 16


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("openclip_native", "visual.positional_embedding"),
        ("openclip_native", "text_projection"),
        ("openclip_siglip_timm", "visual.trunk.attn_pool.kv.weight"),
        ("openclip_siglip_timm", "text.transformer.resblocks.0.attn.in_proj_bias"),
    ],
)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3, 4)])
def test_originals_with_impossible_shapes_are_refused(name, tensor, shape, tmp_path) -> None:
    torch.save(state_of(name) | {tensor: torch.zeros(shape)}, tmp_path / "clip.pth")
    options = {"hidden_act": "gelu", "vision_heads": 2, "text_heads": 2}
    with pytest.raises(UnsupportedError, match=r"clip\.pth"):
        load_original(tmp_path / "clip.pth", **options)


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("openclip_native", "transformer.resblocks.1.attn.in_proj_weight"),
        ("openclip_customtext", "text.ln_final.bias"),
        ("openclip_siglip_timm", "visual.trunk.blocks.1.attn.qkv.bias"),
        ("openclip_siglip_timm", "text.text_projection.bias"),
    ],
)
def test_originals_that_lack_a_tensor_are_refused_with_its_name(name, lacking, tmp_path) -> None:
    state = state_of(name)
    options = {"hidden_act": "gelu", "vision_heads": 2, "text_heads": 2}
    del state[lacking]
    torch.save(state, tmp_path / "clip.pth")
    with pytest.raises(UnsupportedError, match=rf"lacks 1 parameter\(s\) \({re.escape(lacking)}\)"):
        load_original(tmp_path / "clip.pth", **options)


# --- what is refused says what it is ---


def names_of(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.zeros(1) for key in base_tensors(name)}


def renamed(old: str, new: str) -> dict[str, torch.Tensor]:
    return {key.replace(old, new): value for key, value in state_of("openclip_customtext").items()}


REFUSED: dict[str, tuple[Any, str]] = {
    "RN50": (lambda: names_of("clip_openai_rn50"), "whose image tower is a ResNet"),
    "CoCa": (lambda: renamed("logit_scale", "logit_scale") | {"text_decoder.x": torch.ones(1)},
             "CoCa checkpoint of open_clip with a decoder"),
    "timm tower": (lambda: renamed("visual.", "visual.trunk."), "image tower is one of timm"),
    "hugging face text": (lambda: renamed("text.token", "text.transformer.token"),
                          "whose text tower is one of transformers"),
    "sigmoid loss": (lambda: state_of("openclip_native") | {"logit_bias": torch.ones(())},
                     "with a logit_bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_originals_say_what_they_are_and_what_to_take(name, tmp_path, caplog) -> None:
    state, title = REFUSED[name]
    torch.save(state(), tmp_path / "clip.pt")
    assert title in str(describe_file(str(tmp_path / "clip.pt")))
    with pytest.raises(UnsupportedError, match=f"{title}.*, which is not supported; take a model"):
        load_model(str(tmp_path / "clip.pt"))
    assert not caplog.records  # nothing is assumed of what is not loaded
    shown = command("inspect", tmp_path / "clip.pt", code=2)
    assert title in shown.stdout


@pytest.mark.parametrize("name", ["clip_openai_w128", *OPEN_CLIP])
def test_originals_are_described_before_they_are_loaded(name, tmp_path) -> None:
    write(tmp_path / "open_clip_pytorch_model.bin", name)
    if name != "clip_openai_w128":
        write_config(tmp_path, name)
    source = tmp_path if name != "clip_openai_w128" else tmp_path / "open_clip_pytorch_model.bin"
    source_file = tmp_path / "open_clip_pytorch_model.json"
    source_file.write_text('{"vision_heads": 2}')
    form = format_of(state_of(name).keys())
    assert form is not None
    shown = command("inspect", source).stdout
    assert shown.splitlines()[0] == f"{source}: {form.title}"


# --- used ---


def save_processor(folder: Path) -> Path:
    """Of the recorded models: 64 words, of which the last ends a text; images of 32 pixels."""
    words = ["[PAD]", "[UNK]", "[MASK]", *(f"w{n}" for n in range(3, 52))]
    words += ["a", "red", "blue", "green", "one", "two", "seven", "on", "the", "left", "[CLS]"]
    vocabulary = {word: number for number, word in enumerate([*words, "[SEP]"])}
    assert len(vocabulary) == 64
    BertTokenizer(vocab=vocabulary, model_max_length=16).save_pretrained(folder)
    crop = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_photos(tmp_path_factory.mktemp("photos") / "photos", 8)


@pytest.mark.parametrize("name", ["openclip_customtext", "openclip_siglip_customtext"])
@pytest.mark.parametrize("method", ["omp", "multiflow", "wanda", "snip"])
def test_originals_are_pruned(name, method, tmp_path) -> None:
    write_config(tmp_path, name)
    model, adapter = load_model(str(write(tmp_path / "open_clip_pytorch_model.bin", name)))
    batch = {"pixel_values": INPUTS["image"], "input_ids": INPUTS["input_ids"]}
    batch["attention_mask"] = torch.ones_like(INPUTS["input_ids"])
    masks = prune(model, [batch, batch], method=method, sparsity=0.5, adapter=adapter)
    weights = WeightMap.of(model, adapter)
    assert set(masks) == set(weights)
    kept = sum(int(masks[weight].sum()) for weight in weights)
    assert kept == sum(masks[weight].numel() for weight in weights) // 2
    assert len(weights) == 2 * 2 * 6  # towers, layers, matrices
    downstream = adapter.downstream_model("retrieval", model)
    masks.apply(downstream)
    assert masks.verify(downstream) == []


def test_originals_are_pruned_and_evaluated_from_the_command_line(photos, tmp_path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder / "open_clip_pytorch_model.bin", "openclip_customtext")
    write_config(folder, "openclip_customtext")
    file = folder / "open_clip_pytorch_model.bin"
    run = ("prune", "--model", file, "--data", photos, "--method", "wanda", "--sparsity", 0.5,
           "--batch-size", 4)  # fmt: skip
    failed = command(*run, "--out", tmp_path / "out", code=2)
    assert "no processor next to" in failed.stderr
    assert "--processor" in failed.stderr
    processor = save_processor(tmp_path / "processor")
    command(*run, "--out", tmp_path / "out", "--processor", processor)
    path = next((tmp_path / "out").rglob("masks*.safetensors"))
    masks = Masks.load(path)
    model, adapter = load_model(str(folder))
    masks.apply(model, adapter)
    shown = command("evaluate", file, "--data", photos, "--task", "retrieval",
                    "--processor", processor).stdout  # fmt: skip
    assert "R@1" in shown
    tuned = tmp_path / "tuned"
    command("finetune", file, "--task", "retrieval", "--data", photos, "--processor", processor,
            "--masks", path, "--epochs", 1, "--batch-size", 4, "--out", tuned)  # fmt: skip
    assert masks.verify(load_model(str(tuned))[0], adapter) == []
    shutil.copytree(processor, folder, dirs_exist_ok=True)
    command(*run, "--out", tmp_path / "again")  # the processor in the folder is found


def test_masks_of_a_pretrained_folder_fit_an_original(tmp_path) -> None:
    model = load_original(
        write(tmp_path / "clip.pt", "openclip_native"),
        hidden_act="gelu", vision_heads=2, text_heads=2,
    )  # fmt: skip
    fresh = CLIPModel(CLIPConfig.from_dict(model.config.to_dict()))
    masks = prune(fresh, method="omp", sparsity=0.75)
    masks.apply(model)
    assert masks.verify(model) == []


def test_the_golden_files_are_small() -> None:
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*.*")) < 8 << 20
