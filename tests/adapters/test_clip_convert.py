"""CLIP checkpoints with OpenAI's names: against OpenAI's architecture, both ways, and broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from clip_examples import CLIP, END, clip_config, made
from openai_clip import OpenAiClip, openai_clip, openai_state
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPModel

from vlp_adapters.clip import load_original, state_to_original
from vlp_adapters.clip.names import from_original_name
from vlp_plugins.loading import describe_file, load_model
from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.masks.published_files import export_published, import_published
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import MaskError, UnsupportedError

IDS = torch.tensor([[38, 3, 4, 5, 39, 0], [38, 7, 39, 0, 0, 0]])
REAL = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])


def pixels() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def saved(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, path)
    return path


def assert_same(model: CLIPModel, original: OpenAiClip) -> None:
    """Both features and the logits, for texts padded with zeros as OpenAI's tokenizer does."""
    batch = {"pixel_values": pixels(), "input_ids": IDS, "attention_mask": REAL}
    with torch.no_grad():
        images = functional.normalize(original.visual(pixels()), dim=-1)
        texts = functional.normalize(original.encode_text(IDS), dim=-1)
        torch.testing.assert_close(CLIP.image_features(model, batch), images)
        torch.testing.assert_close(CLIP.text_features(model, batch), texts)
        logits = original.logit_scale.exp() * images @ texts.T
        torch.testing.assert_close(model(**batch).logits_per_image, logits)


@pytest.mark.parametrize("name", ["ViT-B-32.pt", "clip.pth", "clip.bin"])
def test_a_checkpoint_computes_what_the_original_computes(tmp_path: Path, name: str) -> None:
    model, adapter = load_model(str(saved(tmp_path / name, openai_state())), device="cpu")
    assert adapter.name == "clip"
    assert model.config.vision_config.num_attention_heads == 2
    assert model.config.text_config.num_attention_heads == 1
    assert_same(model, openai_clip())


def test_safetensors_and_data_parallel_names_are_read_too(tmp_path: Path) -> None:
    state = {f"module.{name}": value for name, value in openai_state().items()}
    save_file(state, tmp_path / "clip.safetensors")
    assert_same(load_original(tmp_path / "clip.safetensors"), openai_clip())


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    state = {name: value.half() for name, value in openai_clip().state_dict().items()}
    model = load_original(saved(tmp_path / "clip.pt", state))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_same(model, openai_clip().half().float())


def test_the_state_goes_back_as_it_came(tmp_path: Path) -> None:
    original = openai_clip().state_dict()
    back = state_to_original(load_original(saved(tmp_path / "clip.pt", dict(original))))
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], value) for name, value in original.items())
    OpenAiClip().load_state_dict(back)


def test_the_state_of_a_pruned_model_is_as_sparse(tmp_path: Path) -> None:
    model = load_original(saved(tmp_path / "clip.pt", openai_state()))
    weights = WeightMap.of(model, CLIP)
    kept = {name: torch.rand(w.shape) < 0.5 for name, w in weights.items()}
    masks = Masks.from_dense(kept, Manifest.for_weights(weights, method="test"))
    masks.apply(model)
    again = load_original(saved(tmp_path / "sparse.pt", state_to_original(model)))
    assert masks.verify(again) == []
    fused = state_to_original(again)["transformer.resblocks.0.attn.in_proj_weight"]
    rows = [masks[f"text.0.self.{part}"] for part in ("query", "key", "value")]
    assert torch.equal(fused != 0, torch.cat(rows))


def test_names_go_both_ways_except_what_is_fused() -> None:
    model = made(CLIPModel, clip_config())
    names = {path: CLIP.original_name(path) for path in model.state_dict()}
    fused = {path for path, name in names.items() if name is None}
    assert {path.split(".")[-2] for path in fused} == {"q_proj", "k_proj", "v_proj"}
    assert len(fused) == 2 * 2 * 3 * 2  # towers, layers, matrices, weight and bias
    assert all(from_original_name(str(names[path])) == path for path in names.keys() - fused)
    assert CLIP.original_name("encoder.layers.0.mlp.fc1.weight") is None  # of which tower?
    assert CLIP.original_name("classifier.weight") is None


def test_published_masks_have_the_original_names_and_are_joined_where_it_fuses(
    tmp_path: Path,
) -> None:
    model = made(CLIPModel, clip_config())
    weights = WeightMap.of(model, CLIP)
    kept = {name: torch.rand(w.shape) < 0.5 for name, w in weights.items()}
    masks = Masks.from_dense(kept, Manifest.for_weights(weights, method="test"))
    export_published(masks, tmp_path / "masks.pth", weights, CLIP)
    written = torch.load(tmp_path / "masks.pth", weights_only=True)
    original = state_to_original(model)
    assert {f"{name}_pruning_mask" for name in original} > written.keys()
    assert sum(int((mask == 0).sum()) for mask in written.values()) == masks.removed
    fused = "visual.transformer.resblocks.1.attn.in_proj_weight_pruning_mask"
    third = [masks[f"vision.1.attention.{part}"] for part in ("query", "key", "value")]
    assert torch.equal(written[fused], torch.cat(third).float())
    assert import_published(tmp_path / "masks.pth", weights, CLIP) == masks
    short = {fused: torch.ones(48, 16)}
    with pytest.raises(MaskError, match=r"no mask for 'text.0.self.key'.*in_proj_weight.*2 of 3"):
        import_published(saved(tmp_path / "short.pth", short), weights, CLIP)


# --- open_clip ---


def test_open_clip_says_in_its_configuration_what_shapes_do_not_tell(tmp_path: Path) -> None:
    original = openai_clip(nn.GELU())
    path = saved(tmp_path / "open_clip_pytorch_model.bin", dict(original.state_dict()))
    vision, text = {"width": 128, "head_width": 64}, {"width": 64, "heads": 1}
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert_same(load_original(path), original)
    vision["head_width"] = 32
    config["model_cfg"]["quick_gelu"] = True
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model = load_original(path)
    assert model.config.vision_config.num_attention_heads == 4
    assert model.config.vision_config.hidden_act == "quick_gelu"
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="open_clip_config.json is damaged or no config"):
        load_original(path)


@pytest.mark.parametrize(
    ("name", "activation", "warned"),
    [
        ("open_clip_pytorch_model.bin", nn.GELU(), True),
        ("vit_b_32-quickgelu-laion400m.pt", None, False),
        ("ViT-B-32.pt", None, False),
    ],
)
def test_the_activation_is_that_of_whose_file_it_is_and_a_guess_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, activation, warned: bool
) -> None:
    original = openai_clip(activation)
    state = openai_state() if name.startswith("ViT") else dict(original.state_dict())
    path = saved(tmp_path / name, state)
    assert_same(load_original(path), original)
    said = [r.getMessage() for r in caplog.records if "assumed is gelu" in r.getMessage()]
    assert len(said) == warned
    assert all("load_original(path, hidden_act=" in line for line in said)


def test_the_activation_that_is_given_wins_over_a_guess(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original = openai_clip()
    path = saved(tmp_path / "clip.pt", dict(original.state_dict()))
    assert_same(load_original(path, hidden_act="quick_gelu"), original)
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"quick_gelu": true}}')
    assert_same(load_original(path), original)
    assert not caplog.records


# --- what cannot be read ---


class Program(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_torchscript_archive_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    torch.jit.script(Program()).save(str(tmp_path / "ViT-B-32.pt"))
    with pytest.raises(UnsupportedError, match=r"TorchScript .*torch.jit.load\('ViT-B-32.pt'") as e:
        load_model(str(tmp_path / "ViT-B-32.pt"))
    assert describe_file(str(tmp_path / "ViT-B-32.pt")) == (
        "TorchScript archive, as OpenAI publishes CLIP"
    )
    line = str(e.value).split("convert it once: ")[1]
    torch.save(torch.jit.load(tmp_path / "ViT-B-32.pt").state_dict(), tmp_path / "ViT-B-32.pth")
    assert line.endswith("'ViT-B-32.pth')")
    with pytest.raises(UnsupportedError, match="no adapter recognises"):  # converted, but no CLIP
        load_model(str(tmp_path / "ViT-B-32.pth"))


def test_a_resnet_is_refused(tmp_path: Path) -> None:
    state = {name: value for name, value in openai_state().items() if "visual." not in name}
    state["visual.conv1.weight"] = torch.ones(32, 3, 3, 3)
    state["visual.layer1.0.conv1.weight"] = torch.ones(64, 64, 1, 1)
    with pytest.raises(UnsupportedError, match="is a ResNet .* not supported"):
        CLIP.load(str(saved(tmp_path / "RN50.pt", state)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ln_final.weight": None}, r"lacks 1 parameter\(s\) \(ln_final.weight\)"),
        ({"visual.extra": torch.ones(1)}, r"unknown .* 1 parameter\(s\) \(visual.extra\)"),
        ({"ln_final.bias": torch.ones(3)}, r"ln_final.bias is \[3\], .* asks for \[64\]"),
    ],
)
def test_states_that_do_not_fit_are_refused(tmp_path: Path, change, message) -> None:
    state = {n: value for n, value in (openai_state() | change).items() if value is not None}
    with pytest.raises(UnsupportedError, match=message):
        CLIP.load(str(saved(tmp_path / "clip.pt", state)))


def test_heads_that_cannot_be_guessed_may_be_given(tmp_path: Path) -> None:
    path = saved(tmp_path / "clip.pt", state_to_original(made(CLIPModel, clip_config(END))))
    with pytest.raises(UnsupportedError, match="vision encoder is 16 wide"):
        load_original(path)
    model = load_original(path, vision_heads=2, text_heads=2)
    assert model.config.text_config.eos_token_id == END


def test_files_of_others_are_left_to_others(tmp_path: Path) -> None:
    (tmp_path / "noise.pt").write_bytes(b"\x00" * 50)
    saved(tmp_path / "other.pt", {"visual.conv1.weight": torch.ones(1)})
    made(CLIPModel, clip_config()).save_pretrained(tmp_path / "folder")
    for name in ("noise.pt", "other.pt", "folder", "folder/model.safetensors", "nothing.pt"):
        assert CLIP.load(str(tmp_path / name)) is None
