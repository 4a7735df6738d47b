"""Checkpoints of the original BLIP code: they load into the class of their task, give the recorded
outputs, can be pruned, measured and fine-tuned, and are written back as the original reads them.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import WORDS, save_tokenizer
from torch import Tensor, nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from vlp_command import Command

from vlp_adapters.blip import BlipForPretraining, BlipPretrainConfig
from vlp_adapters.blip.adapter import BlipAdapter
from vlp_adapters.blip.answering_model import BlipForAnswering
from vlp_adapters.blip.convert import (
    infer_config,
    load_original,
    save_original,
    state_to_original,
)
from vlp_adapters.blip.forward import match_logits, text_tokens
from vlp_adapters.blip.kinds import decoder_ids, encoder_ids
from vlp_adapters.blip.nlvr_model import BlipForNlvr, BlipNlvrConfig
from vlp_plugins import prune
from vlp_plugins.data.batches import collated
from vlp_plugins.data.processors import load_processor
from vlp_plugins.jobs.samples import read_samples
from vlp_plugins.loading import load_model
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import BatchError, UnsupportedError
from vlp_plugins.tasks.finetuning.finetune import downstream, finetune
from vlp_plugins.tasks.finetuning.settings import FinetuneSettings

GOLDEN = Path(__file__).parents[1] / "golden" / "originals"
ADAPTER = BlipAdapter()
TASKS = ("retrieval", "caption", "vqa", "nlvr")
CLASSES = {
    "retrieval": BlipForImageTextRetrieval,
    "caption": BlipForConditionalGeneration,
    "vqa": BlipForAnswering,
    "nlvr": BlipForNlvr,
}
HEADS = {"vision_heads": 3, "text_heads": 2, "sep_token_id": 3}
Close = Callable[[str, Tensor, Tensor], None]


def file_of(task: str) -> Path:
    return GOLDEN / f"blip_{task}" / "model.safetensors"


def model_of(task: str) -> nn.Module:
    model = ADAPTER.load(str(file_of(task)))
    assert model is not None
    return model


def recorded(task: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    folder = file_of(task).parent
    return load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")


def batch_of(task: str) -> dict[str, Tensor]:
    """The recorded inputs as this package names them."""
    inputs, _ = recorded(task)
    words = "question" if task == "vqa" else "input"
    mask = "question_mask" if task == "vqa" else "attention_mask"
    batch = {"pixel_values": inputs["image"], "input_ids": inputs[f"{words}_ids"],
             "attention_mask": inputs[mask]}  # fmt: skip
    if task == "nlvr":  # all left images, then all right ones
        batch["pixel_values"] = inputs["image"].unflatten(0, (2, -1)).transpose(0, 1)
        batch["labels"] = inputs["targets"]
    if task == "vqa":
        rows = [0, 1, 2, 3]
        batch = {k: v[[0, 1, 1, 2]] for k, v in batch.items()}
        batch["labels"] = inputs["answer_ids"][rows].masked_fill(inputs["answer_mask"] == 0, -100)
    return batch


@pytest.fixture
def close(record_property: Callable[[str, object], None]) -> Close:
    """Compares with what was recorded: 1e-5, integers exactly; `-s` shows the differences."""

    def compare(name: str, found: Tensor, wanted: Tensor) -> None:
        assert found.shape == wanted.shape
        difference = float((found.double() - wanted.double()).abs().max())
        record_property(name, difference)
        print(f"{name}: {difference:.1e}")
        assert difference <= (1e-5 if wanted.is_floating_point() else 0)

    return compare


@pytest.mark.parametrize("task", TASKS)
def test_a_file_becomes_the_model_of_its_task(task: str) -> None:
    model = model_of(task)
    assert type(model) is CLASSES[task]
    assert not model.training


@pytest.mark.parametrize("task", ["caption", "vqa"])
def test_the_word_head_is_tied_to_the_words(task: str) -> None:
    decoder = model_of(task).text_decoder
    assert decoder.cls.predictions.decoder.weight is decoder.bert.embeddings.word_embeddings.weight
    assert decoder.cls.predictions.decoder.bias is decoder.cls.predictions.bias


@torch.no_grad()
def test_retrieval_gives_the_recorded_outputs(close: Close) -> None:
    model, batch, (_, wanted) = model_of("retrieval"), batch_of("retrieval"), recorded("retrieval")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    image = ADAPTER.image_embeds(model, batch)
    close("image_embeds", image, wanted["image_embeds"])
    close("text_embeds", text_tokens(model.text_encoder, ids, mask), wanted["text_embeds"])
    close("image_feat", ADAPTER.image_features(model, batch), wanted["image_feat"])
    close("text_feat", ADAPTER.text_features(model, batch), wanted["text_feat"])
    fused = text_tokens(model.text_encoder, encoder_ids(model, ids), mask, image)
    close("cross_embeds", fused, wanted["cross_embeds"])
    close("itm_logits", match_logits(model, ids, mask, image), wanted["itm_logits"])
    negatives = tuple(wanted[f"negative_{kind}"].tolist() for kind in ("image", "text"))
    losses = ADAPTER.losses(model, batch, negatives=negatives)
    close("loss_itm", losses["itm"], wanted["loss_itm"])
    assert model.config.contrastive_temperature == 0.0625


@torch.no_grad()
def test_captioning_gives_the_recorded_outputs(close: Close) -> None:
    model, batch, (inputs, wanted) = model_of("caption"), batch_of("caption"), recorded("caption")
    ids, prompt = batch["input_ids"], inputs["prompt_input_ids"]
    assert torch.equal(decoder_ids(model, ids), inputs["decoder_input_ids"])
    image = ADAPTER.image_embeds(model, batch)
    logits = model.text_decoder(
        input_ids=decoder_ids(model, ids), attention_mask=batch["attention_mask"],
        encoder_hidden_states=image,
    ).logits  # fmt: skip
    close("logits", logits, wanted["logits"])
    labels = ids.clone()
    labels[:, : prompt.shape[1]] = -100
    losses = ADAPTER.losses(model, batch | {"labels": labels})
    close("loss", losses["lm"], wanted["loss"])
    said = model.text_decoder(input_ids=prompt, encoder_hidden_states=image).logits
    close("prompt_logits", said, wanted["prompt_logits"])
    for beams in (1, 3):
        written = model.generate(
            pixel_values=batch["pixel_values"],
            input_ids=torch.cat([prompt, prompt[:, :1]], dim=1),  # the class drops the last one
            max_length=16, min_length=6, num_beams=beams, do_sample=False,
        )  # fmt: skip
        close(f"generated_ids_beams{beams}", written, wanted[f"generated_ids_beams{beams}"])


@torch.no_grad()
def test_captions_go_on_from_the_prompt(close: Close, tmp_path: Path) -> None:
    """What is recorded of whole texts, from captions without their prompt."""
    batch, (inputs, wanted) = batch_of("caption"), recorded("caption")
    prompt = inputs["prompt_input_ids"][0, 1:].tolist()
    model = load_original(file_of("caption"), **HEADS, prompt_ids=prompt)
    ids = batch["input_ids"]
    assert ids[:, 1 : 1 + len(prompt)].tolist() == [prompt] * len(ids)
    bare = {
        "pixel_values": batch["pixel_values"],
        "input_ids": torch.cat([ids[:, :1], ids[:, 1 + len(prompt) :]], dim=1),
        "attention_mask": batch["attention_mask"][:, len(prompt) :],
    }
    close("loss", ADAPTER.losses(model, bare)["lm"], wanted["loss"])
    *_, decoder = ADAPTER.streams(model, bare)
    assert torch.equal(decoder.real["text"], batch["attention_mask"].bool())
    whole = model.generate(
        pixel_values=bare["pixel_values"], max_length=16, num_beams=3, do_sample=False,
        input_ids=torch.tensor([[0, *prompt, 0]] * len(ids)),
    )  # fmt: skip
    said = ADAPTER.caption(model, bare, max_length=16 - len(prompt), num_beams=3)
    assert torch.equal(said, torch.cat([whole[:, :1], whole[:, 1 + len(prompt) :]], dim=1))
    model.save_pretrained(tmp_path)
    assert load_model(str(tmp_path), device="cpu")[0].config.text_config.prompt_ids == prompt


def test_tokens_that_shapes_do_not_tell_are_guessed_aloud_and_checked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    state = {name: value.to("meta") for name, value in load_file(file_of("caption")).items()}
    words = "text_decoder.bert.embeddings.word_embeddings.weight"
    heads = {"vision_heads": 3, "text_heads": 2}
    with caplog.at_level(logging.WARNING, logger="vlp_adapters"):
        assert infer_config(state, **heads).text_config.prompt_ids == []
    assert "[SEP] is taken to be 102; sep_token_id says otherwise" in caplog.text
    caplog.clear()
    state[words] = torch.empty(30524, 32, device="meta")
    with caplog.at_level(logging.WARNING, logger="vlp_adapters"):
        text = infer_config(state, **heads).text_config
    assert (text.sep_token_id, text.prompt_ids) == (102, [1037, 3861, 1997])
    assert len(caplog.records) == 1
    assert "begin with 'a picture of'" in caplog.text
    state[words] = torch.empty(90, 32, device="meta")
    with pytest.raises(UnsupportedError, match="sep_token_id has 102, which is no id"):
        infer_config(state, **heads)
    for wrong in ([90], ["a"], [-1], "a picture of", 7):
        with pytest.raises(UnsupportedError, match="prompt_ids"):
            infer_config(state, **heads, sep_token_id=3, prompt_ids=wrong)


@torch.no_grad()
def test_question_answering_gives_the_recorded_outputs(close: Close) -> None:
    model, (inputs, wanted) = model_of("vqa"), recorded("vqa")
    ids, mask = inputs["question_ids"], inputs["question_mask"]
    batch = {"pixel_values": inputs["image"], "input_ids": ids, "attention_mask": mask}
    image = ADAPTER.image_embeds(model, batch)
    states = text_tokens(model.text_encoder, encoder_ids(model, ids), mask, image)
    close("question_states", states, wanted["question_states"])
    assert torch.equal(encoder_ids(model, ids), inputs["encoder_input_ids"])

    def decoded(row: int, answer: slice) -> tuple[Tensor, Tensor]:
        """Logits and summed loss; the original leaves the padding of questions out."""
        real = states[row : row + 1, : int(mask[row].sum())]
        answers, there = inputs["answer_ids"][answer], inputs["answer_mask"][answer]
        output = model.text_decoder(
            input_ids=decoder_ids(model, answers), attention_mask=there,
            encoder_hidden_states=real, labels=answers.masked_fill(there == 0, -100),
            reduction="none",
        )  # fmt: skip
        return output.logits, output.loss

    found = [decoded(row, slice(n, n + 1)) for n, row in enumerate((0, 1, 1, 2))]
    close("answer_logits", torch.cat([logits for logits, _ in found]), wanted["answer_logits"])
    weighted = inputs["answer_weights"] * torch.cat([loss for _, loss in found])
    close("loss", weighted.sum() / len(ids), wanted["loss"])
    ranked = ADAPTER.rank_answers(
        model, batch, inputs["answer_list_ids"], inputs["answer_list_mask"], candidates=8
    )
    close("rank_k8", ranked, wanted["rank_k8"])
    # The original lets written answers read the padding of questions; this package does not.
    start = decoder_ids(model, ids[:, :1])
    written = model.text_decoder.generate(
        input_ids=start, attention_mask=torch.ones_like(start), encoder_hidden_states=states,
        max_length=10, min_length=1, num_beams=3, do_sample=False, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    close("generated_ids_beams3", written, wanted["generated_ids_beams3"])
    whole = (mask == 1).all(dim=1)
    ours = ADAPTER.answer(
        model, {k: v[whole] for k, v in batch.items()}, max_length=10, num_beams=3
    )
    close("answer", ours, wanted["generated_ids_beams3"][whole])


@torch.no_grad()
def test_nlvr_gives_the_recorded_outputs(close: Close) -> None:
    model, batch, (_, wanted) = model_of("nlvr"), batch_of("nlvr"), recorded("nlvr")
    output = model(**batch)
    close("logits", output.logits, wanted["logits"])
    close("loss", output.loss, wanted["loss"])
    close("nlvr", ADAPTER.losses(model, batch)["nlvr"], wanted["loss"])
    logits = wanted["logits"]
    close("judge", ADAPTER.judge(model, batch), logits[:, 1] - logits[:, 0])


def test_a_retrieval_file_leaves_out_what_only_a_training_reads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    online = load_file(file_of("retrieval"))
    whole = online | {
        name.replace(".", "_m.", 1): value + 1
        for name, value in online.items()
        if name.startswith(("visual_encoder.", "text_encoder.", "vision_proj.", "text_proj."))
    }
    torch.save({"model": whole, "epoch": 5}, tmp_path / "retrieval.pth")
    said = ADAPTER.describe(str(tmp_path / "retrieval.pth"))
    assert said.endswith("image-text retrieval (not loaded: momentum copies and queues)")
    (tmp_path / "retrieval.json").write_text(json.dumps(HEADS))
    with caplog.at_level(logging.INFO, logger="vlp_adapters"):
        model = ADAPTER.load(str(tmp_path / "retrieval.pth"))
    assert "only a training reads" in caplog.text
    same = state_to_original(model_of("retrieval"))
    written = state_to_original(model)
    assert written.keys() == same.keys() == whole.keys()
    for name, value in online.items():
        if "queue" not in name:
            assert torch.equal(written[name], value), name
    for name in whole.keys() - online.keys():  # as at the start of a training
        assert torch.equal(written[name], written[name.replace("_m.", ".", 1)])
    assert written["image_queue"].shape == (24, 12)
    assert written["idx_queue"].tolist() == [[-100] * 12]


def test_a_matching_model_is_a_retrieval_file_without_queues(tmp_path: Path) -> None:
    online = load_file(file_of("retrieval"))
    bare = {k: v for k, v in online.items() if "queue" not in k and k != "temp"}
    save_file(bare, tmp_path / "itm.safetensors")
    model = load_original(tmp_path / "itm.safetensors", **HEADS)
    assert type(model) is BlipForImageTextRetrieval
    assert state_to_original(model).keys() == bare.keys()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("file", ["again.pth", "again.safetensors"])
def test_what_is_written_has_every_tensor_of_the_file(task: str, file: str, tmp_path: Path) -> None:
    save_original(model_of(task), tmp_path / file)
    path = tmp_path / file
    written = load_file(path) if path.suffix == ".safetensors" else torch.load(path)["model"]
    original = load_file(file_of(task))
    if task in ("caption", "vqa"):  # tied, and stored once in the copy
        words = "text_decoder.bert.embeddings.word_embeddings.weight"
        original["text_decoder.cls.predictions.decoder.weight"] = original[words]
        assert "text_decoder.cls.predictions.bias" in original
    elif task == "retrieval":
        written = {k: v for k, v in written.items() if "_m." not in k}
        original = {k: v if "queue" not in k else written[k] for k, v in original.items()}
    assert written.keys() == original.keys()
    for name, value in original.items():
        assert torch.equal(written[name], value), name
        assert written[name].dtype == value.dtype, name


def base_models(sizes: dict[str, int]) -> dict[str, nn.Module]:
    """The classes at base size, for images of so many pixels."""

    def config(kind: str, build: type = BlipConfig, **others: int) -> BlipConfig:
        vision = {"layer_norm_eps": 1e-6, "image_size": sizes[kind]}
        return build(vision_config=vision, text_config={"num_attention_heads": 12}, **others)

    return {
        "pretrain": BlipForPretraining(BlipPretrainConfig.base()),
        "retrieval": BlipForImageTextRetrieval(config("retrieval")),
        "itm": BlipForImageTextRetrieval(config("itm", queue_size=0)),
        "caption": BlipForConditionalGeneration(config("caption")),
        "vqa": BlipForQuestionAnswering(config("vqa")),
        "nlvr": BlipForNlvr(config("nlvr", BlipNlvrConfig)),
    }


def names_of_base() -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """Recorded names, types and shapes; `{0-11}` stands for the layers."""
    found: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for line in (GOLDEN / "blip_names.txt").read_text().splitlines():
        if not line.startswith(" "):
            kind, count = line.split(": ")
            names = found[kind] = {}
            names["count"] = count
            continue
        name, dtype, *sizes = line.split()
        shape = tuple(map(int, sizes[0].split("x"))) if sizes else ()
        if layers := re.search(r"\{(\d+)-(\d+)\}", name):
            first, last = map(int, layers.groups())
            numbered = [name.replace(layers[0], str(n)) for n in range(first, last + 1)]
        else:
            numbered = [name]
        names |= dict.fromkeys(numbered, (dtype, shape))
    for names in found.values():
        assert int(names.pop("count")) == len(names)
    return found


def test_names_and_shapes_at_base_size_are_the_originals(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = names_of_base()
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: tensor)  # a meta tensor has no values
    with torch.device("meta"):
        positions = {
            kind: names["visual_encoder.pos_embed"][1][1] for kind, names in wanted.items()
        }
        models = base_models({kind: 16 * math.isqrt(count) for kind, count in positions.items()})
    for kind, model in models.items():
        found = {
            name: (str(value.dtype).removeprefix("torch."), tuple(value.shape))
            for name, value in state_to_original(model).items()
        }
        differing = {
            name: (found.get(name), wanted[kind].get(name))
            for name in found.keys() | wanted[kind].keys()
            if found.get(name) != wanted[kind].get(name)
        }
        assert not differing, (kind, dict(list(differing.items())[:5]))


def test_heads_that_shapes_do_not_tell_are_needed_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of("caption").read_bytes())
    with pytest.raises(UnsupportedError, match="wide, so its number of attention heads"):
        ADAPTER.load(str(path))
    assert ADAPTER.describe(str(path)) == "original BLIP checkpoint of captioning"
    for wrong in (5, 0, "3", 1.0):
        with pytest.raises(
            UnsupportedError, match=r"vision_heads is .*, not a number that divides"
        ):
            load_original(path, vision_heads=wrong, text_heads=2)
    (tmp_path / "model.json").write_text(json.dumps({"vision_heads": 3, "text_heads": 4}))
    assert ADAPTER.load(str(path)).config.text_config.num_attention_heads == 4
    assert load_original(path, text_heads=2).config.text_config.num_attention_heads == 2


def test_towers_without_a_head_are_named_and_refused(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    state = load_file(file_of("retrieval"))
    save_file({k: v for k, v in state.items() if k.startswith(("visual_", "text_encoder."))}, path)
    assert (
        ADAPTER.describe(str(path))
        == "original BLIP checkpoint of towers without the heads of a task"
    )
    with pytest.raises(UnsupportedError, match="it has the towers without a head"):
        ADAPTER.load(str(path))


def test_values_and_configurations_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path, state = tmp_path / "x.safetensors", load_file(file_of("caption"))
    bias = "text_decoder.cls.predictions.bias"
    save_file(state | {bias: state[bias] + 1}, path)
    with pytest.raises(UnsupportedError, match=rf"{bias} differs from .*decoder\.bias"):
        load_original(path, **HEADS)
    head = {"text_decoder.cls.predictions.decoder.weight": torch.zeros(120, 32)}
    save_file(state | head, path)
    with pytest.raises(UnsupportedError, match="are one parameter in BLIP captioning"):
        load_original(path, **HEADS)
    with pytest.raises(UnsupportedError, match="is a BlipConfig, not a BlipPretrainConfig"):
        load_original(file_of("caption"), BlipPretrainConfig.base())
    save_file({k: v for k, v in state.items() if "layer.1.output" not in k}, path)
    with pytest.raises(UnsupportedError, match=r"lacks 4 .*text_decoder\.bert.*BLIP captioning"):
        load_original(path, **HEADS)


def test_a_class_without_an_original_is_not_written(tmp_path: Path) -> None:
    tower = model_of("caption").vision_model
    with pytest.raises(UnsupportedError, match="BlipVisionModel has no original file"):
        save_original(tower, tmp_path / "tower.pth")
    split = model_of("caption")
    ADAPTER.split_fused(split)
    with pytest.raises(UnsupportedError, match="before its projections were split"):
        save_original(split, tmp_path / "split.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", ["omp", "multiflow", "wanda", "snip"])
def test_a_loaded_model_can_be_pruned(task: str, method: str) -> None:
    model = model_of(task)
    data = [] if method == "omp" else [batch_of(task)]
    masks = prune(model, data or None, method=method, sparsity=0.5)
    assert masks.sparsity == pytest.approx(0.5, abs=1e-3)
    masks.apply(model)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_statements_may_be_pruned_on_captions_but_have_no_loss_on_them() -> None:
    """Every image and the next one are a pair."""
    model, batch = model_of("nlvr"), batch_of("nlvr")
    captions = batch | {"pixel_values": batch["pixel_values"][:, 0]}
    del captions["labels"]
    masks = prune(model, [captions], method="multiflow", sparsity=0.5)
    assert masks.sparsity == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(BatchError, match="statements that are true or false"):
        ADAPTER.losses(model, captions)
    with pytest.raises(BatchError, match=r"give \[B, 2, 3, H, W\]"):
        ADAPTER.judge(model, captions | {"pixel_values": batch["pixel_values"][:, :1]})
    with pytest.raises(BatchError, match="do not fit 3 statements"):
        ADAPTER.losses(model, batch | {"labels": torch.tensor([0, 1])})


def pretraining_like(model: nn.Module) -> BlipForPretraining:
    config = model.config
    torch.manual_seed(0)
    return BlipForPretraining(
        BlipPretrainConfig(
            vision_config=config.vision_config.to_dict(), text_config=config.text_config.to_dict(),
            embed_dim=24, queue_size=12, dec_token_id=118, enc_token_id=119,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_masks_of_the_pretraining_model_fit(task: str) -> None:
    model = model_of(task)
    pretrained = pretraining_like(model)
    masks = prune(pretrained, method="omp", sparsity=0.6)
    masks.apply(model)
    name = {"caption": "captioning", "nlvr": "nlvr2"}.get(task, task)
    places = ADAPTER.for_task(name, pretrained)
    state = model.state_dict()
    applied = 0
    for weight, paths in places.items():
        for path in paths:
            assert torch.equal(state[path] == 0, ~masks[weight]), path
            applied += 1
    mine = {path for weight in WeightMap.of(model, ADAPTER).values() for path in weight.aliases}
    assert mine <= {path for paths in places.values() for path in paths}
    assert applied


def test_the_model_of_statements_starts_as_the_pretraining_model(tmp_path: Path) -> None:
    pretrained = pretraining_like(model_of("nlvr"))
    made = downstream(pretrained, ADAPTER, "nlvr2")
    assert type(made) is BlipForNlvr
    state, theirs = made.state_dict(), pretrained.state_dict()
    for weight, paths in ADAPTER.for_task("nlvr2", pretrained).items():
        source = next(o.path for o in WeightMap.of(pretrained, ADAPTER)[weight].owners)
        for path in paths:
            assert torch.equal(state[path], theirs[source])
    attention = made.text_encoder.encoder.layer
    assert [hasattr(layer.crossattention.output, "merge_layer") for layer in attention] == [
        False, False, False, False, False, False, True,
    ]  # fmt: skip
    assert made.config.text_config.enc_token_id == 119
    made.save_pretrained(tmp_path / "saved")
    again = ADAPTER.load(str(tmp_path / "saved"))
    batch = batch_of("nlvr")
    with torch.no_grad():
        assert torch.equal(ADAPTER.judge(again, batch), ADAPTER.judge(made, batch))


@pytest.mark.parametrize("task", TASKS)
def test_a_loaded_model_can_be_fine_tuned_with_its_zeros(task: str) -> None:
    name = {"caption": "captioning", "nlvr": "nlvr2"}.get(task, task)
    model = downstream(model_of(task), ADAPTER, name)
    masks = prune(model, method="omp", sparsity=0.5)
    before = {path: value.clone() for path, value in model.state_dict().items()}
    finetune(
        model, ADAPTER, [batch_of(task)] * 2, task=name, masks=masks,
        settings=FinetuneSettings(learning_rate=1e-3, epochs=1),
    )  # fmt: skip
    weights = WeightMap.of(model, ADAPTER)
    assert all(not bool(weights[n].parameter[~masks[n]].any()) for n in masks)
    changed = [path for path, value in model.state_dict().items() if not value.equal(before[path])]
    assert any(path.startswith("vision_model.") for path in changed)


def save_statements(folder: Path) -> Path:
    folder.mkdir()
    rows = []
    for number in range(4):
        names = [f"{number}-{side}.png" for side in (0, 1)]
        for side, name in enumerate(names):
            Image.effect_noise((32, 32), 40 + 10 * number + side).convert("RGB").save(folder / name)
        text = " ".join(WORDS[: 2 + number])
        rows.append({"images": names, "sentence": text, "label": number < 2})
    (folder / "dev.json").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_a_loaded_model_is_the_same_after_save_pretrained(task: str, tmp_path: Path) -> None:
    model = model_of(task)
    model.save_pretrained(tmp_path)
    again, _ = load_model(str(tmp_path), device="cpu")
    assert type(again) is type(model)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    written, other = state_to_original(again), state_to_original(model)
    assert written.keys() == other.keys()
    assert all(torch.equal(written[name], other[name]) for name in other)
    ids = batch_of(task)["input_ids"]
    assert torch.equal(encoder_ids(again, ids), encoder_ids(model, ids))
    assert torch.equal(decoder_ids(again, ids), decoder_ids(model, ids))


MEASURED = {
    "retrieval": ("retrieval", ("--rerank", "2"), "image_to_text_r1"),
    "caption": ("captioning", ("--beams", "1"), "cider"),
    "vqa": ("vqa", ("--written",), "accuracy"),
}


@pytest.mark.parametrize("task", MEASURED)
def test_the_command_measures_and_prunes_an_original_file(
    task: str, vlp: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlp_plugins.tasks.captioning.find_java", lambda: None)
    save_tokenizer(tmp_path)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    file, data = tmp_path / f"{task}.pth", photos
    torch.save({"model": load_file(file_of(task))}, file)
    file.with_suffix(".json").write_text(json.dumps(HEADS))
    name, options, metric = MEASURED[task]
    if name == "vqa":
        data = tmp_path / "asked"
        data.mkdir()
        Image.effect_noise((32, 32), 50).convert("RGB").save(data / "0.png")
        row = {"file_name": "0.png", "question": "red dog", "answer": "red"}
        (data / "metadata.jsonl").write_text(json.dumps(row))
    else:
        vlp("prune", "--model", file, "--sparsity", "0.5", "--data", photos, "--batch-size", "3",
            "--out", tmp_path / "pruned", "--device", "cpu")  # fmt: skip
        (masks,) = (tmp_path / "pruned").glob("masks*.safetensors")
        options = (*options, "--masks", masks)
    vlp("evaluate", file, "--task", name, "--data", data, *options,
        "--out", tmp_path / "measured", "--device", "cpu")  # fmt: skip
    record = json.loads((tmp_path / "measured" / "evaluation.json").read_text())
    assert 0 <= record["before"]["metrics"][metric] <= 1000
    assert (record["after"] is None) == (name == "vqa")


def test_the_command_inspects_prunes_and_measures_an_original_file(
    vlp: Command, tmp_path: Path
) -> None:
    save_tokenizer(tmp_path)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    file = tmp_path / "nlvr.pth"
    torch.save({"model": load_file(file_of("nlvr")), "epoch": 3}, file)
    (tmp_path / "nlvr.json").write_text(json.dumps(HEADS))
    data = save_statements(tmp_path / "data")
    said = vlp("inspect", file).stdout
    assert said.startswith(f"{file}: original BLIP checkpoint of NLVR2")
    assert "BlipForNlvr" in said
    vlp("prune", "--model", file, "--method", "snip", "--sparsity", "0.5", "--data", data,
        "--batch-size", "2", "--out", tmp_path / "pruned", "--device", "cpu")  # fmt: skip
    (masks,) = (tmp_path / "pruned").glob("masks*.safetensors")
    result = vlp(
        "evaluate", file, "--task", "nlvr2", "--data", data, "--masks", masks, "--batch-size", "3",
        "--out", tmp_path / "measured", "--device", "cpu",
    )  # fmt: skip
    record = json.loads((tmp_path / "measured" / "evaluation.json").read_text())
    assert record["settings"] == {"statements": 4}
    assert f"nlvr2 on {data} (dev)" in result.stdout
    processor = load_processor(str(tmp_path))
    samples = read_samples("nlvr2", str(data)).samples
    batch = collated(
        ADAPTER, processor, [s.image() for s in samples], [s.texts[0] for s in samples],
        [s.second() for s in samples],
    )  # fmt: skip
    model = model_of("nlvr")
    for pruned, place in ((False, "before"), (True, "after")):
        if pruned:
            Masks.load(masks).apply(model)
        with torch.no_grad():
            judged = ADAPTER.judge(model, batch) > 0
        right = [bool(truth) == bool(s.label) for truth, s in zip(judged, samples, strict=True)]
        assert record[place]["metrics"] == {"accuracy": 25 * sum(right)}


def test_the_command_trains_a_model_of_statements(
    vlp: Command, models: Path, tmp_path: Path
) -> None:
    data = save_statements(tmp_path / "data")
    vlp("finetune", models / "blip", "--task", "nlvr2", "--data", data, "--steps", "2",
        "--batch-size", "2", "--out", tmp_path / "tuned", "--device", "cpu")  # fmt: skip
    lines = (tmp_path / "tuned" / "losses.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["losses"].keys() == {"nlvr"}
    vlp("evaluate", tmp_path / "tuned", "--task", "nlvr2", "--data", data, "--out",
        tmp_path / "measured", "--device", "cpu")  # fmt: skip
    record = json.loads((tmp_path / "measured" / "evaluation.json").read_text())
    assert record["before"]["metrics"]["accuracy"] in (0, 25, 50, 75, 100)


@pytest.mark.parametrize("shape", [(), (5,)])
def test_impossible_shapes_are_refused_in_one_sentence(shape, tmp_path: Path) -> None:
    state = load_file(file_of("nlvr")) | {"visual_encoder.pos_embed": torch.zeros(shape)}
    save_file(state, tmp_path / "nlvr.safetensors")
    with pytest.raises(UnsupportedError, match="do not fit together .IndexError: tuple index"):
        load_original(tmp_path / "nlvr.safetensors", vision_heads=3, text_heads=2)
