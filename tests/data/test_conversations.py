"""Batches of conversations: what the model reads, and on which tokens its loss is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from captioned_files import encoded, write_folder
from chat_models import LLAVA_TEMPLATE, save_llava, save_qwen, without_template
from PIL import Image

from vlp_plugins.data.batches import open_batches
from vlp_plugins.data.chat import CAPTION_PROMPT, IGNORED, ChatProcessor, chat_processor
from vlp_plugins.data.conversations import Asked, Conversation, chosen
from vlp_plugins.data.processors import load_processor
from vlp_plugins.data.questions import open_questions
from vlp_plugins.data.sources import open_source
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.runtime.errors import DataError

SAVE: dict[str, Callable[..., Path]] = {"llava": save_llava, "qwen": save_qwen}
END = {"llava": "</s>", "qwen": "<|im_end|>"}
IMAGES = [Image.new("RGB", (40, 30), (200, 10, 10)), Image.new("RGB", (64, 96), (0, 10, 210))]


@pytest.fixture(scope="module", params=[(f, s) for f in SAVE for s in ("left", "right")], ids=str)
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ChatProcessor]:
    family, side = request.param
    folder = SAVE[family](tmp_path_factory.mktemp(family), side=side)
    found = chat_processor(load_processor(str(folder)))
    assert isinstance(found, ChatProcessor)
    assert found.tokenizer.padding_side == side
    return family, found


def said(chat: ChatProcessor, batch: dict[str, torch.Tensor]) -> list[str]:
    """What the loss of each row is on, read again."""
    labels, ids = batch["labels"], batch["input_ids"]
    on = labels != IGNORED
    assert torch.equal(labels[on], ids[on])
    assert not (on & (batch["attention_mask"] == 0)).any()
    assert not (on & (ids == chat.inner.image_token_id)).any()
    return [chat.tokenizer.decode(row[row != IGNORED]) for row in labels]


def real(batch: dict[str, torch.Tensor], row: int) -> list[int]:
    kept: list[int] = batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist()
    return kept


def test_captions_answer_the_prompt_and_the_loss_is_on_them_alone(
    made: tuple[str, ChatProcessor],
) -> None:
    family, chat = made
    captions = ["a red seven", "two  blue\n nines, and more"]
    batch = chat(images=IMAGES, text=captions)
    assert said(chat, batch) == [text + END[family] for text in captions]
    asked = chat(images=IMAGES, text=[chat.caption(None), chat.caption(None)])
    for row in range(2):
        whole, prompt = real(batch, row), real(asked, row)
        answer = batch["labels"][row][batch["labels"][row] != IGNORED].tolist()
        assert whole[: len(prompt)] == prompt
        assert whole[len(prompt) : len(prompt) + len(answer)] == answer
        assert CAPTION_PROMPT in chat.tokenizer.decode(prompt)
    # On the right, whatever the tokenizer does by itself.
    assert batch["attention_mask"][:, 0].all()
    assert not batch["attention_mask"][0, -1]


def test_what_asks_for_an_answer_is_padded_on_the_left(made: tuple[str, ChatProcessor]) -> None:
    _, chat = made
    side = chat.tokenizer.padding_side
    batch = chat(images=IMAGES[:1] * 2, text=[Asked("what?"), Asked("how many are there?")])
    assert "labels" not in batch
    assert batch["attention_mask"][:, -1].all()
    assert not batch["attention_mask"][0, 0]
    assert chat.tokenizer.padding_side == side
    assert type(chat.inner.tokenizer) is type(chat.tokenizer)


def test_image_tokens_are_those_of_the_images(made: tuple[str, ChatProcessor]) -> None:
    family, chat = made
    batch = chat(images=IMAGES, text=["one", "two"])
    shown = batch["input_ids"] == chat.inner.image_token_id
    if family == "llava":
        assert shown.sum(dim=1).tolist() == [16, 16]
        return
    assert shown.sum(dim=1).tolist() == (batch["image_grid_thw"].prod(dim=1) // 4).tolist()
    assert torch.equal(batch["mm_token_type_ids"] == 1, shown)
    assert len(batch["pixel_values"]) == 4 * int(shown.sum())


def test_several_images_none_and_several_answers(made: tuple[str, ChatProcessor]) -> None:
    family, chat = made
    turns = [
        {"from": "human", "value": "<image>\nIs it two?"},
        {"from": "gpt", "value": "two"},
        {"from": "human", "value": "two<image> and now, two?"},
        {"from": "gpt", "value": "not two"},
    ]
    text = [
        Conversation.read(turns, images=2),
        Conversation.about("Nothing to see?", "nothing", images=0),
        Asked("what is it?", "six"),
    ]
    batch = chat(images=[IMAGES, [], IMAGES[:1]], text=text)
    end = END[family]
    assert said(chat, batch) == [f"two{end}not two{end}", f"nothing{end}", f"six{end}"]
    shown = (batch["input_ids"] == chat.inner.image_token_id).sum(dim=1)
    assert shown[1] == 0
    assert int(shown[0]) > int(shown[2]) > 0
    (alone,) = said(chat, chat(text=[Conversation.about("Hm?", "yes", images=0)]))
    assert alone == f"yes{end}"


def test_text_cannot_bring_images_that_are_not_there(made: tuple[str, ChatProcessor]) -> None:
    family, chat = made
    token = chat.inner.image_token
    batch = chat(images=IMAGES[:1], text=[f"a {token}seven"])
    assert said(chat, batch) == [f"a seven{END[family]}"]
    with pytest.raises(DataError, match="about 1 images comes with 2"):
        chat(images=[IMAGES], text=[Conversation.about("?", "!")])


class TestPrompts:
    def words(self, chat: Any, text: object) -> str:
        batch = chat(images=IMAGES[:1], text=[text])
        return str(chat.tokenizer.decode(batch["input_ids"][0]))

    def test_one_of_the_user_replaces_the_default(self, tmp_path: Path) -> None:
        inner = load_processor(str(save_llava(tmp_path)))
        chat = chat_processor(inner, prompt="What is shown?")
        assert isinstance(chat, ChatProcessor)
        assert "What is shown? ASSISTANT: a six" in self.words(chat, "a six")
        assert "What is shown?\nhow many? ASSISTANT: 3" in self.words(chat, Asked("how many?", "3"))

    def test_a_question_takes_its_place(self, tmp_path: Path) -> None:
        inner = load_processor(str(save_llava(tmp_path)))
        chat = chat_processor(inner, prompt="Q: {question} Short answer:")
        assert "Q: how many? Short answer: ASSISTANT: 3" in self.words(
            chat, Asked("how many?", "3")
        )
        short = chat_processor(inner)
        assert "how many?\nAnswer the question using a single word or phrase. ASSISTANT: 3" in (
            self.words(short, Asked("how many?", "3"))  # type: ignore[arg-type]
        )


class TestChoices:
    ASKED = Asked("How many?", "two", ("one", "two"))

    def test_they_have_letters(self, tmp_path: Path) -> None:
        chat = chat_processor(load_processor(str(save_llava(tmp_path))))
        assert isinstance(chat, ChatProcessor)
        batch = chat(images=IMAGES[:1], text=[self.ASKED])
        words = chat.tokenizer.decode(batch["input_ids"][0])
        assert "How many?\nA. one\nB. two\nAnswer with the option's letter" in words
        assert said(chat, batch) == ["B</s>"]

    @pytest.mark.parametrize(
        ("text", "meant"),
        [
            ("B", "two"), ("b.", "two"), ("(A) one", "one"), ("two", "two"), ("1", "two"),
            ("three", "three"), ("C", "C"), ("a boat", "a boat"), ("", ""),
        ],
    )  # fmt: skip
    def test_what_is_meant(self, text: str, meant: str) -> None:
        assert chosen(text, self.ASKED.choices) == meant

    @pytest.mark.parametrize("answer", ["B", 1, "two"])
    def test_columns(self, tmp_path: Path, answer: object) -> None:
        (tmp_path / "0.png").write_bytes(encoded(0))
        row = {"file_name": "0.png", "question": "How many?", "choices": ["one", "two"]}
        (tmp_path / "metadata.jsonl").write_text(json.dumps({**row, "answer": answer}))
        ((_, found),) = open_source(str(tmp_path), captions="conversations").pairs()
        assert found == self.ASKED
        (question,) = open_questions(str(tmp_path)).items
        assert (question.answers, question.choices) == (("two",), ("one", "two"))


class TestTemplates:
    def chat(self, folder: Path, template: str) -> ChatProcessor:
        save_llava(folder)
        (folder / "chat_template.jinja").write_text(template)
        found = chat_processor(load_processor(str(folder)))
        assert isinstance(found, ChatProcessor)
        return found

    def test_one_whose_contents_are_texts(self, tmp_path: Path) -> None:
        template = (
            "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}</s>{% endfor %}"
            "{% if add_generation_prompt %}[assistant] {% endif %}"
        )
        chat = self.chat(tmp_path, template)
        batch = chat(images=IMAGES, text=["a seven", "two"])
        assert said(chat, batch) == ["a seven</s>", "two</s>"]
        assert (batch["input_ids"] == 3).sum(dim=1).tolist() == [16, 16]

    def test_one_that_drops_the_answer(self, tmp_path: Path) -> None:
        template = LLAVA_TEMPLATE.replace("for message in messages", "for message in messages[:1]")
        chat = self.chat(tmp_path, template)
        with pytest.raises(DataError, match="does not show what the assistant says"):
            chat(images=IMAGES[:1], text=["a seven"])

    def test_one_that_fails(self, tmp_path: Path) -> None:
        chat = self.chat(tmp_path, "{{ raise_exception('no roles here') }}")
        with pytest.raises(DataError, match="cannot be filled in: no roles here"):
            chat(images=IMAGES[:1], text=["a seven"])

    def test_one_that_begins_the_text_itself(self, tmp_path: Path) -> None:
        chat = self.chat(tmp_path, "<s>" + LLAVA_TEMPLATE)
        batch = chat(images=IMAGES[:1], text=["a seven"])
        assert (batch["input_ids"] == 1).sum() == 1


class TestWithoutTemplate:
    """Models that write on after a text: BLIP-2, GIT, PaliGemma."""

    @pytest.mark.parametrize(
        ("family", "prompt", "question"),
        [
            ("blip2", "", "Question: how many? Answer:"),
            ("git", "", "Question: how many? Answer:"),
            ("paligemma", "caption en", "answer en how many?"),
        ],
    )
    def test_the_loss_is_on_what_is_written_on(
        self, family: str, prompt: str, question: str
    ) -> None:
        inner = without_template(family)
        assert chat_processor(inner) is inner  # a model that embeds texts reads captions as such
        chat = chat_processor(inner, continues=True)
        assert isinstance(chat, ChatProcessor)
        images = IMAGES[:1] * 2
        for text, asked in ((["a red seven", "two"], prompt),
                            ([Asked("how many?", "a red seven"), Asked("how many?", "two")],
                             question)):  # fmt: skip
            batch = chat(images=images, text=text)
            labels, ids = batch["labels"], batch["input_ids"]
            on = labels != IGNORED
            assert torch.equal(labels[on], ids[on])
            for row, answer in enumerate(("a red seven", "two")):
                assert chat.tokenizer.decode(labels[row][on[row]]) == f"{answer}</s>"
                # All before it is the prompt, with the tokens of the image.
                read = chat.tokenizer.decode(ids[row][: int(on[row].nonzero()[0])])
                assert read.replace("<image>", "").replace("<s>", "").strip() == asked
        asking = chat(images=images, text=[chat.caption(None)] * 2)
        assert "labels" not in asking
        assert ("input_ids" in asking) == (family != "git")

    def test_a_processor_that_tokenizes_twice(self) -> None:
        chat = chat_processor(without_template("kosmos2"), continues=True)
        assert isinstance(chat, ChatProcessor)
        batch = chat(images=IMAGES, text=["two", "a red seven"])
        rows = [row[row != IGNORED] for row in batch["labels"]]
        assert [chat.tokenizer.decode(row) for row in rows] == ["two</s>", "a red seven</s>"]

    def test_a_conversation_of_several_answers_is_not_for_them(self) -> None:
        turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}] * 2
        chat = chat_processor(without_template("blip2"), continues=True)
        with pytest.raises(DataError, match="takes one question with one answer, not 2"):
            chat(images=IMAGES[:1], text=[Conversation.read(turns, images=1)])


class TestLength:
    def chat(self, folder: Path, most: int) -> Any:
        return chat_processor(load_processor(str(save_llava(folder)), max_length=most))

    def test_a_long_answer_is_cut(self, tmp_path: Path) -> None:
        chat = self.chat(tmp_path, 70)
        batch = chat(images=IMAGES[:1], text=["a red seven " * 20])
        assert {name: value.shape[1] for name, value in batch.items() if value.ndim == 2} == {
            "input_ids": 70, "attention_mask": 70, "labels": 70,
        }  # fmt: skip
        assert said(chat, batch)[0].startswith("a red seven")

    def test_not_the_whole_answer(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="takes 58 tokens with its images, and 52 are the most"):
            self.chat(tmp_path, 52)(images=IMAGES[:1], text=["two"])


def test_large_images_are_made_smaller_where_the_processor_keeps_sizes(tmp_path: Path) -> None:
    inner = load_processor(str(save_qwen(tmp_path)))
    large = [Image.new("RGB", (400, 300))]
    whole = chat_processor(inner)(images=large, text=["a"])
    less = chat_processor(inner, max_pixels=64 * 64)(images=large, text=["a"])
    assert int(whole["image_grid_thw"].prod()) * 64 <= 65536
    assert int(less["image_grid_thw"].prod()) * 64 <= 64 * 64
    again = chat_processor(inner)(images=large, text=["a"])  # the processor itself is as before
    assert torch.equal(again["image_grid_thw"], whole["image_grid_thw"])


class TestSources:
    """What `--data` may be for a chat model, as conversations."""

    def read(self, source: Path, **options: Any) -> list[tuple[int, Any]]:
        pairs = open_source(str(source), captions="conversations", **options).pairs()
        return [(len(shown) if isinstance(shown, list) else 1, text) for shown, text in pairs]

    def images(self, folder: Path) -> Path:
        return write_folder(folder, ["a red seven", "two", "a green one"])

    def test_captions(self, tmp_path: Path) -> None:
        assert self.read(self.images(tmp_path)) == [
            (1, "a red seven"), (1, "two"), (1, "a green one"),
        ]  # fmt: skip

    @pytest.mark.parametrize("kind", ["json", "jsonl"])
    def test_conversations_in_json_as_llava_has_them(self, tmp_path: Path, kind: str) -> None:
        self.images(tmp_path / "images")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Six."}]
        plain = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello."}]
        rows: list[dict[str, Any]] = [
            {"id": 1, "image": "000.png", "conversations": turns},
            {"id": 2, "conversations": [*plain, {"from": "human", "value": "Bye"}]},
            {"id": 3, "image": ["001.png", "002.png"], "conversations": plain},
        ]
        file = tmp_path / f"chat.{kind}"
        text = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
        file.write_text(text)
        for source in (file, tmp_path):
            found = self.read(source)
            assert [count for count, _ in found] == [1, 0, 2]
            assert [talk.images for _, talk in found] == [1, 0, 2]
            assert found[0][1] == Conversation.about("What?", "Six.")
            assert found[1][1] == Conversation.about("Hello", "Hello.", images=0)

    def test_an_image_outside_the_folder_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        self.images(tmp_path)
        turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
        rows = [{"image": "../000.png", "conversations": turns}]
        (tmp_path / "data" / "chat.json").write_text(json.dumps(rows))
        with pytest.raises(DataError, match="outside of"):
            self.read(tmp_path / "data")

    def test_columns_of_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "0.png").write_bytes(encoded(0))
        for extra, expected in (
            ({"question": "how many?", "answers": ["2", "3", "3"]}, Asked("how many?", "3")),
            ({"question": "how many?", "answer": "2", "text": "no"}, Asked("how many?", "2")),
            (
                {"messages": [{"role": "user", "content": "So?"},
                              {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}]},
                Conversation.about("So?", "Yes"),
            ),
        ):  # fmt: skip
            (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", **extra}))
            assert self.read(tmp_path) == [(1, expected)]

    def test_questions_as_blip_lists_them(self, tmp_path: Path) -> None:
        self.images(tmp_path)
        rows = [{"image": "000.png", "question": "which digit?", "answer": ["7", "7", "seven"]}]
        (tmp_path / "vqa_train.json").write_text(json.dumps(rows))
        assert self.read(tmp_path) == [(1, Asked("which digit?", "7"))]

    def test_a_data_set_with_lists_of_images(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "Both."}]
        images = [{"bytes": encoded(n), "path": None} for n in (1, 2)]
        features = datasets.Features(
            images=datasets.List(datasets.Image()),
            messages=datasets.List({"role": datasets.Value("string"),
                                    "content": datasets.Value("string")}),
        )  # fmt: skip
        rows = {"images": [images, images[:1]], "messages": [turns, turns]}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
        found = self.read(tmp_path / "saved")
        assert [(count, talk.images) for count, talk in found] == [(2, 2), (1, 1)]

    def test_what_cannot_be_read_is_skipped_and_counted(self, tmp_path: Path) -> None:
        video = {"from": "human", "value": "<video>\nWhat happens?"}
        answer = {"from": "gpt", "value": "Nothing."}
        for turns, why in (
            ([video, answer], "about a video; texts and images are read"),
            ([{"from": "human", "value": "Hello"}], "no answer of the assistant"),
            ([{"from": "dog", "value": "Woof"}, answer], "of 'dog', none of user, human"),
            ("Hello", "not a list of messages"),
            ([{"from": "human", "value": "<image>"}, answer], "about 1 images, and has 0"),
        ):
            rows = [{"conversations": turns, "messages": [1]}]
            (tmp_path / "chat.json").write_text(json.dumps(rows))
            with pytest.raises(DataError, match=f"1 of 1 records .*{why}"):
                self.read(tmp_path)


def test_batches_of_a_folder_need_no_option(tmp_path: Path) -> None:
    photos = write_folder(tmp_path / "photos", ["a red seven", "two", "a green one"])
    chat = chat_processor(load_processor(str(save_qwen(tmp_path / "model"))))
    adapter = ModuleAdapter(torch.nn.Linear(1, 1))
    found = open_batches(str(photos), chat, adapter, 2)
    batches: list[Any] = list(found)
    assert len(found) == 2  # a conversation alone is a batch
    assert said(chat, batches[0]) == ["a red seven<|im_end|>", "two<|im_end|>"]  # type: ignore[arg-type]
    assert said(chat, batches[1]) == ["a green one<|im_end|>"]  # type: ignore[arg-type]


def test_a_chat_model_whose_processor_cannot_be_made_is_said(tmp_path: Path) -> None:
    save_qwen(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    named = json.loads(file.read_text()) | {"processor_class": "PixtralProcessor"}
    file.write_text(json.dumps(named))
    with pytest.raises(DataError, match="chat model at .* cannot be made: .*[Tt]orchvision"):
        load_processor(str(tmp_path))
