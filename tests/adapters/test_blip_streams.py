"""BLIP's activation probe: which towers run and which tokens are real."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blip_adapter_examples import ADAPTER, GOLDEN, tiny, tiny_batch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.parity.blip import batches_from_golden, model_from_golden
from vlp_plugins.calibration.data_pass import calibrate
from vlp_plugins.calibration.moments import INPUT_SECOND_MOMENT, InputSecondMoment
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import BatchError


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
