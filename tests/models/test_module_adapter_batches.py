"""`ModuleAdapter`: how it runs an unknown model, which tokens are real, and its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel

import vlp_plugins as vlp
from vlp_plugins.calibration.tokens import real_of
from vlp_plugins.models.adapter import RetrievalAdapter, Stream
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.runtime.errors import BatchError, UnsupportedError

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
BERT = BertConfig(**SIZES, vocab_size=50, max_position_embeddings=16)


def clip() -> CLIPModel:
    text = {**SIZES, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**SIZES, "image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()


def text_batch() -> dict[str, Tensor]:
    """Two texts of 5 and 3 tokens, padded to 5."""
    ids = torch.tensor([[1, 7, 8, 9, 2], [1, 7, 2, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def pair_batch() -> dict[str, Tensor]:
    return text_batch() | {"pixel_values": torch.rand(2, 3, 16, 16)}


def only_stream(adapter: ModuleAdapter, model: nn.Module, batch: Any) -> Stream:
    (stream,) = adapter.streams(model, batch)
    return stream


def test_inputs_by_name_may_be_followed_by_labels() -> None:
    model, batch = clip(), pair_batch()
    alone = only_stream(ModuleAdapter(model), model, batch)
    pair = only_stream(ModuleAdapter(model), model, (batch, torch.arange(2)))
    assert alone.real.keys() == pair.real.keys() == {"text", "vision"}
    assert torch.equal(alone.real["text"], pair.real["text"])
    assert torch.equal(alone.run().logits_per_image, pair.run().logits_per_image)


class Classifier(nn.Module):
    """Takes images only, as most classifiers do, and remembers what it got."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.seen: list[Any] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        result: Tensor = self.layer(images)
        return result


@pytest.mark.parametrize("form", ["mapping", "tuple", "list", "tensor"])
def test_every_form_of_batch_reaches_the_forward_without_its_labels(form: str) -> None:
    model, images, labels = Classifier(), torch.rand(2, 4), torch.tensor([0, 1])
    batch = {
        "mapping": {"images": images, "labels": labels},
        "tuple": (images, labels),
        "list": [images, labels],
        "tensor": images,
    }[form]
    only_stream(ModuleAdapter(model), model, batch).run()
    assert model.seen[0] is images


@pytest.mark.parametrize(
    ("parameters", "given"),
    [
        ("images", 1),
        ("images, scale=None", 1),  # labels are no scale
        ("images, *more", 1),
        ("images, texts, scale=None", 2),
        ("images=None, scale=None", 1),  # as of transformers
        ("images, /, *, scale=None", 1),
        ("*inputs", 3),
    ],
)
def test_items_of_a_batch_fill_what_is_required_and_a_mapping_the_rest(
    parameters: str, given: int, caplog: pytest.LogCaptureFixture
) -> None:
    seen: dict[str, Any] = {}
    space: dict[str, Any] = {"seen": seen}
    exec(f"def forward(self, {parameters}): seen.update(locals())", space)
    model = type("Model", (Classifier,), {"forward": space["forward"]})()
    adapter, batch = ModuleAdapter(model), (torch.rand(2, 4), torch.rand(2, 4), torch.rand(2))

    for _ in range(2):
        only_stream(adapter, model, batch).run()

    found = [v for k, v in seen.items() if k != "self" and v is not None and v != ()]
    found = [item for v in found for item in (v if isinstance(v, tuple) else (v,))]
    assert [id(item) for item in found] == [id(item) for item in batch[:given]]
    optional = "scale=None" in parameters and "/" not in parameters
    assert len(caplog.records) == (optional or "more" in parameters)
    if optional:
        assert "not for its optional scale" in caplog.text
        scale = torch.rand(2)
        named = {"images": batch[0], "texts": batch[1], "scale": scale}
        only_stream(adapter, model, named).run()
        assert seen["scale"] is scale


def test_wrappers_that_take_anything_get_everything() -> None:
    class Wrapper(Classifier):
        def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
            self.seen += [len(inputs), sorted(named)]
            return self.layer(torch.zeros(1, 4))

    model = Wrapper()
    only_stream(ModuleAdapter(model), model, {"a": torch.ones(1), "b": torch.ones(1)}).run()
    only_stream(ModuleAdapter(model), model, (torch.ones(1), torch.ones(1))).run()
    assert model.seen == [0, ["a", "b"], 2, []]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"pixels": torch.zeros(1)}, "batch has pixels; the forward takes images"),
        ((), r"batch \(0 items\) does not fit the forward: missing.*images"),
        ("text", "batch is a str"),
    ],
)
def test_batches_that_do_not_fit_are_refused(batch: Any, message: str) -> None:
    model = Classifier()
    with pytest.raises(BatchError, match=message):
        ModuleAdapter(model).streams(model, batch)


def test_what_the_forward_itself_refuses_is_said_with_its_inputs() -> None:
    model = clip()
    batch = pair_batch() | {"pixel_values": torch.rand(2, 3, 24, 24)}
    stream = only_stream(ModuleAdapter(model), model, batch)
    with pytest.raises(BatchError, match=r"of CLIPModel does not take such a batch \(input_ids, "):
        stream.run()


def test_padding_is_left_out_in_a_text_model() -> None:
    model, batch = BertModel(BERT), text_batch()
    adapter = ModuleAdapter(model)
    real = only_stream(adapter, model, batch).real
    spaces = {owner.tokens for spec in adapter.weights(model) for owner in spec.owners}
    assert spaces == {"text"}
    assert real["text"] is not None
    assert real["text"].dtype == torch.bool
    assert real["text"].tolist() == [[True] * 5, [True] * 3 + [False] * 2]


def test_text_without_a_mask_is_refused() -> None:
    model = BertModel(BERT)
    ids = text_batch()["input_ids"]
    with pytest.raises(BatchError, match=r"no attention_mask.*padding=True"):
        ModuleAdapter(model).streams(model, {"input_ids": ids})
    everything = ModuleAdapter(model, tokens={"": None})
    stream = only_stream(everything, model, {"input_ids": ids})
    (owner,) = next(iter(everything.weights(model))).owners
    assert real_of(everything, stream, owner, torch.rand(2, 5, 16)) is None


def test_a_mask_of_another_rank_is_refused() -> None:
    model, batch = BertModel(BERT), text_batch()
    batch["attention_mask"] = batch["attention_mask"][:, None, None, :]
    with pytest.raises(BatchError, match=r"\[batch, tokens\] but has shape \[2, 1, 1, 5\]"):
        ModuleAdapter(model).streams(model, batch)


def test_an_unknown_vlm_masks_text_and_keeps_all_image_tokens() -> None:
    model, batch = clip(), pair_batch()
    adapter = ModuleAdapter(model)
    stream = only_stream(adapter, model, batch)
    mask = stream.real["text"]
    assert stream.real["vision"] is None
    assert mask is not None
    assert mask.sum() == 8
    spaces = {spec.name: spec.owners[0].tokens for spec in adapter.weights(model)}
    assert spaces["vision_model.encoder.layers.0.mlp.fc1"] == "vision"
    assert spaces["vision_model.embeddings.patch_embedding"] == "vision"
    assert spaces["text_model.encoder.layers.0.mlp.fc1"] == "text"
    stream.run()


def test_tokens_can_be_told() -> None:
    model = clip()
    told: Mapping[str, str | None] = {"text_projection": None, "vision_model": "pixel_mask"}
    adapter = ModuleAdapter(model, tokens=told)
    batch = pair_batch() | {"pixel_mask": torch.tensor([[1.0, 0.0], [1.0, 1.0]])}
    stream = only_stream(adapter, model, batch)
    owners = {spec.name: spec.owners[0] for spec in adapter.weights(model)}

    def real(name: str, tokens: int) -> Any:
        found = real_of(adapter, stream, owners[name], torch.rand(2, tokens, 16))
        return None if found is None else found.tolist()

    assert real("text_projection", 5) is None
    assert real("vision_model.encoder.layers.1.mlp.fc2", 2) == [[True, False], [True, True]]
    # not told: by default the attention mask
    assert real("text_model.encoder.layers.1.mlp.fc2", 5) == [[True] * 5, [True] * 3 + [False] * 2]
    with pytest.raises(BatchError, match="no pixel_mask"):
        adapter.streams(model, pair_batch())


class Joint(nn.Module):
    """Reads words and images in one sequence, in either order, of a shape."""

    def __init__(self, words_first: bool, shape: tuple[int, ...] = (2, 11, 8)) -> None:
        super().__init__()
        self.words, self.patches = nn.Embedding(50, 8), nn.Linear(3, 8)
        self.encoder = nn.Linear(8, 4)
        self._words_first, self._shape = words_first, shape

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        words, images = self.words(input_ids), self.patches(pixel_values.flatten(2).mT)
        parts = (words, images) if self._words_first else (images, words)
        joint: Tensor = self.encoder(torch.cat(parts, 1).reshape(self._shape))
        return joint


def joint_batch(under_padding: int) -> dict[str, Tensor]:
    texts = text_batch()
    ids = texts["input_ids"].masked_fill(texts["attention_mask"] == 0, under_padding)
    images = torch.rand(2, 3, 2, 3, generator=torch.Generator().manual_seed(0))
    return texts | {"input_ids": ids, "pixel_values": images}


def moment(model: Joint, keys: Any, under_padding: int) -> Tensor:
    adapter = ModuleAdapter(model, tokens={"patches": None, "encoder": keys})
    batches = [joint_batch(under_padding)]
    found = vlp.gather(model, batches, adapter=adapter, method="wanda")
    return found.mean("input_second_moment", "encoder")


@pytest.mark.parametrize("words_first", [True, False])
@pytest.mark.parametrize("shape", [(2, 11, 8), (22, 8), (1, 22, 8)])
def test_padding_in_a_joint_sequence_is_left_out(
    words_first: bool, shape: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = Joint(words_first, shape).eval()
    keys = ["attention_mask", None] if words_first else [None, "attention_mask"]
    first, second = (moment(model, keys, under) for under in (0, 33))
    assert torch.equal(first, second)
    batch = joint_batch(0)
    words = model.words(batch["input_ids"])[batch["attention_mask"] == 1]
    images = model.patches(batch["pixel_values"].flatten(2).mT).flatten(0, 1)
    assert len(words) + len(images) == 8 + 12
    expected = torch.cat([words, images]).double().square().sum(0) / 2
    torch.testing.assert_close(first, expected, rtol=1e-6, atol=0)
    assert not caplog.records
    assert not torch.equal(moment(model, None, 0), moment(model, None, 33))
    assert "all 11 tokens that encoder reads are real, but the batch has texts padded to 5" in (
        caplog.text
    )


@pytest.mark.parametrize("tokens", ["text", "image", "atv"])
def test_tokens_of_a_joint_sequence_in_a_row_are_selected(tokens: str) -> None:
    masks = []
    for shape in ((2, 11, 8), (22, 8)):
        torch.manual_seed(0)
        model = Joint(True, shape).eval()
        model.encoder = nn.Linear(8, 8)
        keys = {"patches": None, "encoder": ["attention_mask", None]}
        adapter = ModuleAdapter(model, tokens=keys)
        for each in ("all", tokens):
            found = vlp.prune(
                model, [joint_batch(0)], adapter=adapter, method="wanda", sparsity=0.5,
                walk="blocks", tokens=each,
            )  # fmt: skip
            masks.append(found["encoder"])
    plain, chosen, plain_in_a_row, chosen_in_a_row = masks
    assert torch.equal(plain, plain_in_a_row)
    assert torch.equal(chosen, chosen_in_a_row)
    assert not torch.equal(plain, chosen)


def test_a_list_of_one_mask_fits_tokens_in_one_row() -> None:
    model = Joint(True, (22, 8)).eval()
    adapter = ModuleAdapter(model, tokens={"patches": None, "encoder": ["mask"]})
    mask = torch.arange(22).reshape(2, 11) % 3
    stream = only_stream(adapter, model, joint_batch(0) | {"mask": mask})
    owner = next(spec.owners[0] for spec in adapter.weights(model) if spec.name == "encoder")
    found = real_of(adapter, stream, owner, torch.rand(22, 8))
    assert found is not None
    assert torch.equal(found, mask.flatten() != 0)


def test_parts_of_a_joint_sequence_that_do_not_fit_are_told() -> None:
    for shape in ((11, 2, 8), (2, 11, 2, 4)):
        with pytest.raises(
            BatchError, match=r"of encoder is \[.*\], which are not the tokens of 2"
        ):
            moment(Joint(True, shape), ["attention_mask", None], 0)
    model = Joint(words_first=True)
    with pytest.raises(UnsupportedError, match="has 2 parts without a mask"):
        ModuleAdapter(model, tokens={"encoder": [None, None]})
    with pytest.raises(BatchError, match="of encoder has 11 tokens, but its parts .* have 10"):
        moment(model, ["attention_mask", "attention_mask"], 0)


def test_told_tokens_need_named_inputs() -> None:
    model = Classifier()
    adapter = ModuleAdapter(model, tokens={"layer": "mask"})
    with pytest.raises(BatchError, match="make the loader return mappings"):
        adapter.streams(model, (torch.rand(2, 4), torch.zeros(2)))


def cross_entropy(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)


def test_the_loss_is_given() -> None:
    model, batch = Classifier(), (torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    losses = ModuleAdapter(model, loss=cross_entropy).losses(model, batch)
    assert list(losses) == ["loss"]
    losses["loss"].backward()
    assert model.layer.weight.grad is not None
    several = ModuleAdapter(model, loss=lambda m, b: {"ce": cross_entropy(m, b)})
    assert torch.equal(several.losses(model, batch)["ce"], losses["loss"])


def test_without_a_loss_it_says_how_to_give_one() -> None:
    with pytest.raises(UnsupportedError, match=r"loss=lambda model, batch"):
        ModuleAdapter(Classifier()).losses(Classifier(), torch.rand(1, 4))


@pytest.mark.parametrize("returned", [1.0, {}, torch.zeros(2), {"ce": 1.0}, {"ce": torch.zeros(3)}])
def test_a_loss_that_returns_something_else_is_refused(returned: Any) -> None:
    adapter = ModuleAdapter(Classifier(), loss=lambda model, batch: returned)
    with pytest.raises(UnsupportedError, match="return a scalar tensor"):
        adapter.losses(Classifier(), torch.rand(1, 4))


@torch.no_grad()
def test_features_of_models_that_embed_images_and_texts() -> None:
    model, batch = clip(), pair_batch()
    adapter = ModuleAdapter(model)
    assert isinstance(adapter, RetrievalAdapter)
    images, texts = adapter.image_features(model, batch), adapter.text_features(model, batch)
    output = model(**batch)
    torch.testing.assert_close(images, output.image_embeds)
    torch.testing.assert_close(texts, output.text_embeds)
    with pytest.raises(UnsupportedError, match="BertModel has no get_text_features"):
        adapter.text_features(BertModel(BERT), batch)


def test_labels_are_no_optional_input_of_a_peft_model_either() -> None:
    peft = pytest.importorskip("peft")
    given: list[object] = []

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, images: Tensor, scale: Tensor | None = None) -> Tensor:
            given.append(scale)
            return self.layer(images)

    model = peft.get_peft_model(Scaled(), peft.LoraConfig(target_modules=["layer"]))
    only_stream(ModuleAdapter(model), model, (torch.rand(2, 4), torch.rand(2))).run()
    assert given == [None]
