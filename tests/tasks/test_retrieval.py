"""Recall at k, and what surrounds it."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pair_model import PairAdapter, PairModel, batch_of

from vlp_plugins.runtime.errors import BatchError, DataError, UnsupportedError
from vlp_plugins.tasks.retrieval import PairInputs, Recall, recall_at_k, reranked, retrieval


def naive(similarity: torch.Tensor, targets: list[int], k: int) -> tuple[float, float]:
    """Recall at k by its definition, without ties."""
    images, texts = similarity.shape
    found_texts = 0
    for image in range(images):
        order = sorted(range(texts), key=lambda t: -float(similarity[image, t]))
        found_texts += any(targets[text] == image for text in order[:k])
    found_images = 0
    for text in range(texts):
        order = sorted(range(images), key=lambda i: -float(similarity[i, text]))
        found_images += targets[text] in order[:k]
    return 100 * found_texts / images, 100 * found_images / texts


@given(
    seed=st.integers(0, 1000),
    images=st.integers(1, 12),
    extra=st.integers(0, 12),
    k=st.integers(1, 6),
)
def test_recall_is_what_its_definition_says(seed: int, images: int, extra: int, k: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    targets = torch.cat([torch.arange(images), torch.randint(images, (extra,), generator=rng)])
    similarity = torch.randn(images, images + extra, generator=rng)
    found = recall_at_k(similarity, targets, [k])
    by_image, by_text = naive(similarity, targets.tolist(), k)
    assert math.isclose(found.image_to_text[k], by_image)
    assert math.isclose(found.text_to_image[k], by_text)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    similarity = torch.randn(40, 40, generator=torch.manual_seed(1))
    whole = recall_at_k(similarity)
    monkeypatch.setattr(sys.modules[recall_at_k.__module__], "_BLOCK", 7)
    assert recall_at_k(similarity) == whole


def test_directions_are_not_confused() -> None:
    similarity = torch.tensor([[0.5, 0.9], [0.1, 0.8]])
    # image 0 prefers text 1; image 1 its own; text 0 its own; text 1 prefers image 0
    found = recall_at_k(similarity, ks=[1, 2])
    assert found == Recall({1: 50.0, 2: 100.0}, {1: 50.0, 2: 100.0})
    found = recall_at_k(torch.tensor([[0.5, 0.9], [0.1, 0.95]]), ks=[1])
    assert found == Recall({1: 50.0}, {1: 100.0})
    assert found.mean == 75.0


@pytest.mark.parametrize("value", [0.0, math.nan, -math.inf])
def test_a_collapsed_model_finds_nothing(value: float) -> None:
    assert recall_at_k(torch.full((8, 8), value), ks=[1, 5]).mean == 0


def test_one_nan_hurts_nobody_but_its_neighbours() -> None:
    similarity = torch.eye(4)
    similarity[0, 1] = math.nan
    assert recall_at_k(similarity, ks=[1]) == Recall({1: 75.0}, {1: 75.0})


@pytest.mark.parametrize(
    ("targets", "ks", "message"),
    [
        ([0, 1, 1], [1], "1 texts|targets are"),
        ([0, 0], [1], "name 1 different images; each of the 2 needs a text"),
        ([0, 2], [1], "each of the 2 needs a text"),
        ([0, 1], [0], "cut-offs from 1 on"),
    ],
)
def test_targets_that_do_not_fit(targets: list[int], ks: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        recall_at_k(torch.eye(2), torch.tensor(targets), ks)


NUMBERS = list(range(20))
BATCHES = [batch_of(NUMBERS[:12], NUMBERS[:12]), batch_of(NUMBERS[12:], NUMBERS[12:], length=7)]


def test_a_model_that_knows_everything() -> None:
    model = PairModel()
    assert retrieval(model, PairAdapter(), BATCHES).final.mean == 100


def test_the_model_is_left_as_it_was() -> None:
    model = PairModel().train()
    model.frozen.eval()
    assert retrieval(model, PairAdapter(), iter(BATCHES)).final.mean == 100  # dropout was off
    assert model.training
    assert model.spoiler.training
    assert not model.frozen.training
    with pytest.raises(BatchError, match="no attention_mask"):
        retrieval(model, SilentAdapter(), [{"pixel_values": torch.ones(2, 3)}], rerank=2)
    assert model.spoiler.training
    assert model.table.weight.grad is None


def test_images_with_several_texts() -> None:
    model = PairModel()
    batch = batch_of([1, 1, 2, 3], [1, 1, 2, 3])
    found = retrieval(model, PairAdapter(), [batch], image_ids=[10, 10, 20, 30], ks=[1]).final
    assert found == Recall({1: 100.0}, {1: 100.0})
    # Without the identities the two equal images stand in each other's way.
    assert retrieval(model, PairAdapter(), [batch], ks=[1]).final == Recall({1: 50.0}, {1: 50.0})
    with pytest.raises(DataError, match="3 image_ids were given for 4 pairs"):
        retrieval(model, PairAdapter(), [batch], image_ids=[1, 2, 3])


class SilentAdapter(PairAdapter):
    """Does not look at texts."""

    def text_features(self, model, batch):  # type: ignore[no-untyped-def]
        return self.image_features(model, batch)


class ConfusedAdapter(PairAdapter):
    """Embeds the image of number n like the text of n + 1: right partners come second at best."""

    def image_features(self, model, batch):  # type: ignore[no-untyped-def]
        own = model(batch["pixel_values"][:, 0].long())
        return own + 2 * model((batch["pixel_values"][:, 0].long() + 1) % 20)


def test_the_matching_head_puts_the_best_candidates_in_order() -> None:
    model = PairModel()
    plain = retrieval(model, ConfusedAdapter(), BATCHES, ks=[1]).final
    assert plain.mean < 10
    assert retrieval(model, ConfusedAdapter(), BATCHES, rerank=1, ks=[1]).final == plain
    better = retrieval(model, ConfusedAdapter(), BATCHES, rerank=4, ks=[1]).final
    assert better.mean > 70
    assert retrieval(model, ConfusedAdapter(), BATCHES, rerank=100, ks=[1]).final.mean == 100


def test_a_pair_is_asked_about_once() -> None:
    model = PairModel()
    retrieval(model, PairAdapter(), BATCHES, rerank=3)
    assert len(model.asked) == len(set(model.asked))
    assert 3 * 20 <= len(model.asked) <= 6 * 20
    assert {(n, n) for n in NUMBERS} <= set(model.asked)


def test_candidates_stay_ahead_of_all_others() -> None:
    similarity = torch.tensor([[0.9, 0.8, 0.7], [0.1, 0.2, 0.3]])
    scores = torch.tensor([[-9.0, -8.0, 0.0], [0.0, -7.0, -6.0]])
    candidate = torch.tensor([[True, True, False], [False, True, True]])
    by_image, _ = reranked(similarity, scores, candidate, candidate)
    assert by_image.argsort(dim=1, descending=True).tolist() == [[1, 0, 2], [2, 1, 0]]


def test_inputs_are_padded_as_the_tokenizer_pads() -> None:
    inputs = PairInputs()
    inputs.add(batch_of([1, 2, 3], [11, 12, 13]))  # real lengths 1, 2, 3
    mixed = inputs.image_batch([2, 0]) | inputs.text_batch([0, 2])
    assert mixed["input_ids"].tolist() == [[11, 9, 9], [13, 13, 13]]
    assert mixed["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert mixed["pixel_values"][:, 0].tolist() == [3, 1]


def test_what_cannot_be_measured_says_so() -> None:
    class NoFeatures(PairAdapter):
        image_features = None  # type: ignore[assignment]

    model = PairModel()
    with pytest.raises(UnsupportedError, match="does not say how images and texts are embedded"):
        retrieval(model, NoFeatures(), BATCHES)
    with pytest.raises(DataError, match="no batches"):
        retrieval(model, PairAdapter(), [])
    with pytest.raises(DataError, match="at least 1 candidate"):
        retrieval(model, PairAdapter(), BATCHES, rerank=0)


def test_re_ranking_needs_a_matching_head() -> None:
    class NoHead(PairAdapter):
        match = None  # type: ignore[assignment]

    with pytest.raises(UnsupportedError, match="no matching head"):
        retrieval(PairModel(), NoHead(), BATCHES, rerank=2)


def test_an_image_with_several_texts_is_encoded_once_and_found() -> None:
    """Two texts per image, as COCO has five: text i belongs to image i // 2."""

    class Counting(PairAdapter):
        seen: list[int]

        def image_features(self, model, batch):
            self.seen += batch["pixel_values"][:, 0].int().tolist()
            return super().image_features(model, batch)

    adapter = Counting()
    for rerank in (None, 2):
        adapter.seen = []
        batches = [batch_of([1, 1, 2], [1, 1, 2]), batch_of([2, 3, 3], [2, 3, 3])]
        found = retrieval(
            PairModel(), adapter, batches, image_ids=[7, 7, 8, 8, 9, 9], rerank=rerank, ks=(1,)
        ).final
        assert adapter.seen == [1, 2, 3]
        # Equal texts of one image do not stand in each other's way.
        assert found.as_dict() == {"image_to_text_r1": 100, "text_to_image_r1": 100, "mean": 100}


def test_an_adapter_that_encodes_images_apart_is_hardly_asked_twice_for_one() -> None:
    class Apart(PairAdapter):
        encoded: list[int]

        def image_embeds(self, model, batch):
            self.encoded += batch["pixel_values"][:, 0].int().tolist()
            return batch["pixel_values"] + 0

        def match(self, model, batch):
            assert "pixel_values" not in batch
            return super().match(model, batch | {"pixel_values": batch["image_embeds"]})

    adapter = Apart()
    adapter.encoded = []
    model, plain = PairModel(), PairModel()
    assert (
        retrieval(model, adapter, BATCHES, rerank=3).final
        == retrieval(plain, PairAdapter(), BATCHES, rerank=3).final
    )
    pairs = len(model.asked)
    assert pairs > 3 * len(adapter.encoded)
    assert len(adapter.encoded) - len(set(adapter.encoded)) <= pairs // 64, "once more per call"
    assert model.asked == plain.asked
