"""Published `.pth` mask files: read safely, in the original's names, and written back."""

import os
import pickle

import pytest
import torch
from toy_masks import ADAPTER, Captioning, Pretraining, ToyAdapter, random_masks

from vlp_plugins.masks.published_files import export_published, import_published
from vlp_plugins.models.adapter import OriginalPart
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import MaskError, OutputError


@pytest.fixture
def model():
    return Pretraining()


@pytest.fixture
def weights(model):
    return WeightMap.of(model, ADAPTER)


@pytest.fixture
def masks(model):
    return random_masks(model)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "published.pth"


@pytest.fixture
def state(masks):
    """What the published code saves: original names, biases and excluded layers as ones."""
    return {
        "visual_encoder.patch.weight_pruning_mask": masks["vision.patch"].float(),
        "visual_encoder.ffn.weight_pruning_mask": masks["vision.ffn"].float(),
        "visual_encoder.ffn.bias_pruning_mask": torch.ones(3),
        "encoder.ffn.weight_pruning_mask": masks["text.ffn"].float(),
        "decoder.ffn.weight_pruning_mask": masks["text.ffn"].float(),
        "decoder.out.weight_pruning_mask": masks["text.out"].float(),
        "head.weight_pruning_mask": torch.ones(2, 3),
    }


def refusal(path, weights):
    with pytest.raises(MaskError) as caught:
        import_published(path, weights, ADAPTER)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64]
)
def test_masks_of_any_dtype_are_read(path, state, weights, masks, dtype):
    torch.save({name: mask.to(dtype) for name, mask in state.items()}, path)

    imported = import_published(path, weights, ADAPTER)

    assert imported == masks
    assert imported.manifest.structure == weights.structure
    assert imported.manifest.note == "imported from published.pth"


def test_state_dicts_may_lie_under_model_beside_weights_and_numbers(
    path, state, weights, masks, model
):
    parallel = {f"module.{name}": mask for name, mask in state.items()}
    torch.save({"model": {**parallel, **model.state_dict()}, "epoch": 3}, path)

    assert import_published(path, weights, ADAPTER) == masks


def test_this_models_own_names_are_understood_too(path, state, weights, masks):
    own = {name.replace("visual_encoder", "vision"): mask for name, mask in state.items()}
    torch.save(own, path)

    assert import_published(path, weights, ADAPTER) == masks


def test_one_name_of_a_tied_weight_is_enough(path, state, weights, masks):
    del state["encoder.ffn.weight_pruning_mask"]
    torch.save(state, path)

    assert import_published(path, weights, ADAPTER) == masks


def test_tied_names_must_agree(path, state, weights):
    state["decoder.ffn.weight_pruning_mask"] = 1 - state["decoder.ffn.weight_pruning_mask"]
    torch.save(state, path)

    message = refusal(path, weights)
    assert "encoder.ffn.weight and decoder.ffn.weight are one weight here" in message


def test_a_copied_weight_without_mask_is_left_to_inherit(path, masks):
    model = Captioning()
    weights = WeightMap.of(model, ADAPTER)
    names = {"tower.patch": "vision.patch", "tower.ffn": "vision.ffn", "lm.out": "text.out"}
    state = {f"{p}.weight_pruning_mask": masks[name] for p, name in names.items()}
    torch.save(state, path)

    # This model lacks the weight that the copy was made from, so the copy needs its own mask.
    assert "no mask for 'caption.cross'" in refusal(path, weights)

    torch.save({**state, "lm.cross.weight_pruning_mask": masks["text.ffn"]}, path)
    assert torch.equal(import_published(path, weights, ADAPTER)["caption.cross"], masks["text.ffn"])


def test_a_weight_without_mask_is_named(path, state, weights):
    del state["visual_encoder.ffn.weight_pruning_mask"]
    torch.save(state, path)

    message = refusal(path, weights)
    assert "no mask for 'vision.ffn'" in message
    assert "visual_encoder.ffn.weight_pruning_mask" in message


def test_a_mask_of_another_shape(path, state, weights):
    state["decoder.out.weight_pruning_mask"] = torch.ones(3, 8)
    torch.save(state, path)

    message = refusal(path, weights)
    assert "decoder.out.weight_pruning_mask is [3, 8], but 'text.out' is [3, 7]" in message


def test_a_mask_that_matches_no_weight_and_removes_something(path, state, weights):
    state["strange.layer.weight_pruning_mask"] = torch.tensor([[1.0, 0.0]])
    torch.save(state, path)

    assert "strange.layer.weight_pruning_mask removes elements" in refusal(path, weights)


def test_bias_masks_with_zeros(path, state, weights):
    state["visual_encoder.ffn.bias_pruning_mask"][1] = 0
    torch.save(state, path)

    message = refusal(path, weights)
    assert "visual_encoder.ffn.bias_pruning_mask" in message
    assert "biases are never pruned" in message


@pytest.mark.parametrize("value", [torch.full((3, 7), 0.5), torch.full((3, 7), torch.nan), "text"])
def test_what_is_not_zero_or_one_is_no_mask(path, state, weights, value):
    state["decoder.out.weight_pruning_mask"] = value
    torch.save(state, path)

    assert "decoder.out.weight_pruning_mask" in refusal(path, weights)


def test_files_without_masks(path, weights, model):
    torch.save(model.state_dict(), path)
    assert "no key that ends in _pruning_mask" in refusal(path, weights)

    torch.save([torch.ones(2)], path)
    assert "holds a list, not a state dict" in refusal(path, weights)

    path.unlink()
    assert "is not a file" in refusal(path, weights)


class MakesFolder:
    """Unpickling this runs `os.mkdir`, as malicious files run worse."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", ["zip", "legacy", "pickle 2", "pickle 4"])
def test_code_in_a_file_is_refused_and_not_run(path, state, weights, tmp_path, writer):
    harm = tmp_path / "harm"
    if writer.startswith("pickle"):
        path.write_bytes(pickle.dumps(MakesFolder(harm), protocol=int(writer[-1])))
    else:
        content = {**state, "extra": MakesFolder(harm)}
        torch.save(content, path, _use_new_zipfile_serialization=writer == "zip")

    message = refusal(path, weights)

    assert not harm.exists()
    assert "nothing" in message
    assert "executed" in message
    assert writer == "pickle 4" or "mkdir, which could run code when read" in message

    if not writer.startswith("pickle"):
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert harm.exists()  # so the file really was malicious


def test_damaged_files(path, state, weights):
    torch.save(state, path)
    whole = path.read_bytes()
    for size in (0, 1, 10, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:size])
        assert "damaged or truncated" in refusal(path, weights)
    path.write_text("hello " * 100)
    assert "damaged or truncated" in refusal(path, weights)


def test_export_writes_every_name_in_the_originals_words(path, weights, masks):
    export_published(masks, path, weights, ADAPTER)

    state = torch.load(path, weights_only=True)
    assert set(state) == {
        "visual_encoder.patch.weight_pruning_mask",
        "visual_encoder.ffn.weight_pruning_mask",
        "encoder.ffn.weight_pruning_mask",
        "decoder.ffn.weight_pruning_mask",
        "decoder.out.weight_pruning_mask",
    }
    assert torch.equal(state["decoder.ffn.weight_pruning_mask"], masks["text.ffn"].float())
    assert import_published(path, weights, ADAPTER) == masks


def test_export_refuses_an_existing_file_and_masks_that_do_not_fit(path, weights, masks):
    with pytest.raises(MaskError, match=r"vision\.ffn"):
        export_published(random_masks(Pretraining(width=6)), path, weights, ADAPTER)
    assert not path.exists()

    path.write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        export_published(masks, path, weights, ADAPTER)
    assert path.read_text() == "precious"
    assert list(path.parent.iterdir()) == [path]


def test_masks_can_be_imported_for_any_dtype_of_model(path, state, masks):
    torch.save(state, path)
    weights = WeightMap.of(Pretraining().bfloat16(), ADAPTER)

    assert import_published(path, weights, ADAPTER) == masks


# --- several weights in one tensor of the original ---


class Fused(ToyAdapter):
    """An original that keeps `text.ffn`, `text.out` and something else in one tensor."""

    def original_part(self, path):
        parts = {"encoder.ffn.weight": 0, "decoder.ffn.weight": 0, "decoder.out.weight": 1}
        if path in parts:
            return OriginalPart("fused.weight", parts[path], 3)
        return super().original_part(path)


FUSED = "fused.weight_pruning_mask"


@pytest.fixture
def fused(model):
    model.decoder["out"] = torch.nn.Linear(3, 7)  # as wide as the others
    return WeightMap.of(model, Fused()), random_masks(model)


def test_what_the_original_keeps_in_one_tensor_is_joined_and_split(path, fused):
    weights, masks = fused
    export_published(masks, path, weights, Fused())

    state = torch.load(path, weights_only=True)
    assert {key for key in state if not key.startswith("visual_encoder.")} == {FUSED}
    joined = torch.cat([masks["text.ffn"], masks["text.out"], torch.ones(7, 3)])
    assert torch.equal(state[FUSED], joined)
    assert import_published(path, weights, Fused()) == masks


def test_parts_that_this_package_wrote_under_names_of_their_own_are_read(path, fused):
    weights, masks = fused
    export_published(masks, path, weights, ADAPTER)

    assert import_published(path, weights, Fused()) == masks


def test_a_joined_mask_that_does_not_fit(path, fused):
    weights, masks = fused
    export_published(masks, path, weights, Fused())
    state = torch.load(path, weights_only=True)
    whole = state[FUSED].clone()

    def refused():
        torch.save(state, path)
        with pytest.raises(MaskError) as caught:
            import_published(path, weights, Fused())
        return str(caught.value)

    state[FUSED] = whole.clone()
    state[FUSED][14, 0] = 0
    assert f"{FUSED} (part 3 of 3) removes elements" in refused()
    state[FUSED] = whole[:20]
    assert f"{FUSED} is [20, 3], not masks of 3 weights" in refused()
    state[FUSED] = whole[:12]
    assert f"{FUSED} (part 1 of 3) is [4, 3], but 'text.ffn' is [7, 3]" in refused()
    state[FUSED] = torch.tensor(1.0)
    assert f"{FUSED} is [], not masks of 3 weights" in refused()
    state[FUSED] = [1.0]
    assert f"{FUSED} is a list, not a tensor" in refused()
    del state[FUSED]
    assert f"no mask for 'text.ffn' (looked for {FUSED} (part 1 of 3))" in refused()


def test_a_weight_that_the_original_has_not_is_not_written(path, weights, masks):
    class Lacking(ToyAdapter):
        def original_name(self, name):
            return None if name == "decoder.out.weight" else name

    with pytest.raises(MaskError, match=r"no parameter for 1 of 4 weights, first decoder\.out"):
        export_published(masks, path, weights, Lacking())
    assert not path.exists()
