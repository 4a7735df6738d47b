"""What every registered token selection has to keep, ours and any outsider's that is installed."""

import json

import pytest
import torch
from chosen_tokens import chosen_tokens

from vlp_plugins.calibration.selections import (
    BlockCall,
    check_selected,
    selection_of,
)
from vlp_plugins.models.adapter import TokenKind
from vlp_plugins.models.discovery import registry
from vlp_plugins.runtime.errors import UnsupportedError

SELECTIONS = registry().names("token_selections")
MIXED = [[0, 1, 2, 2, 2, 1, 1, 3, 3, 1], [1, 1, 2, 2, 2, 2, 1, 0, 0, 0]]
KINDS = {
    "mixed": MIXED,
    "one token": [[1]],
    "images alone": [[2, 2, 2, 0]],
    "text alone": [[1, 1, 1, 1]],
    "one of a kind": [[1, 2, 1, 1], [2, 1, 2, 2]],
    "nothing real": [[0, 0, 0]],
}


@pytest.fixture(params=SELECTIONS)
def selection(request):
    return selection_of(request.param)


def call(selection, kinds, sample=0):
    generator = torch.Generator().manual_seed(sample)
    kinds = torch.tensor(kinds, dtype=torch.uint8)
    size, tokens = kinds.shape

    def states():
        return torch.randn(size, tokens, 16, generator=generator)

    attention = torch.rand(size, 2, tokens, tokens, generator=generator).softmax(-1)
    return BlockCall(
        sample,
        kinds,
        states(),
        states() if selection.reads_outputs else states()[..., :0],
        {"w": states()} if selection.reads_modules else {},
        attention if selection.reads_attention else None,
    )


def test_it_is_registered_under_its_own_name(selection):
    assert type(selection).name in SELECTIONS
    assert type(selection).__doc__


@pytest.mark.parametrize("case", KINDS)
def test_it_chooses_real_tokens_and_of_every_sample_some(selection, case):
    calls = [call(selection, KINDS[case], sample) for sample in range(2)]

    for each, found in zip(calls, chosen_tokens(selection, calls), strict=True):
        assert found.dtype == torch.bool
        assert found.shape == each.kinds.shape
        assert not found[each.kinds == TokenKind.PADDING].any()
        assert torch.equal(found.any(1), each.real.any(1))


def test_the_same_calls_give_the_same_tokens_and_are_left_as_they_are(selection):
    calls = [call(selection, MIXED, sample) for sample in range(3)]
    before = [(each.inputs.clone(), each.outputs.clone(), each.kinds.clone()) for each in calls]
    random = torch.get_rng_state()

    one, other = chosen_tokens(selection, calls), chosen_tokens(selection, calls)

    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(random, torch.get_rng_state())
    for each, (inputs, outputs, kinds) in zip(calls, before, strict=True):
        assert torch.equal(each.inputs, inputs)
        assert torch.equal(each.outputs, outputs)
        assert torch.equal(each.kinds, kinds)


def test_padding_does_not_change_what_is_chosen(selection):
    plain = call(selection, [[1, 1, 2, 2, 2, 1, 1]])
    pads = (0, 0, 2, 3)
    padded = BlockCall(
        0,
        torch.nn.functional.pad(plain.kinds, (2, 3)),
        torch.nn.functional.pad(plain.inputs, pads, value=7.0),
        torch.nn.functional.pad(plain.outputs, pads, value=-7.0),
        {k: torch.nn.functional.pad(v, pads, value=9.0) for k, v in plain.module_outputs.items()},
        None if plain.attention is None else torch.nn.functional.pad(plain.attention, (2, 3, 2, 3)),
    )

    alone, within = chosen_tokens(selection, [plain])[0], chosen_tokens(selection, [padded])[0]

    assert torch.equal(within[:, 2:-3], alone)


def test_blocks_do_not_know_of_each_other(selection):
    first, second = ([call(selection, MIXED, sample)] for sample in (0, 1))
    alone = chosen_tokens(selection, second)
    chosen_tokens(selection, first)

    assert torch.equal(chosen_tokens(selection, second)[0], alone[0])


def test_the_published_variant_chooses_or_says_why_not(selection):
    calls = [call(selection, MIXED, sample) for sample in range(2)]
    found, refused = [], ""
    try:
        found = chosen_tokens(selection, calls, published=True)
    except UnsupportedError as error:
        refused = str(error)
    if refused:
        assert "leave out variant='published'" in refused
        return
    assert all(torch.equal(f.any(1), c.real.any(1)) for f, c in zip(found, calls, strict=True))


def test_what_it_records_makes_it_again(selection):
    record = json.loads(json.dumps(selection.record()))

    again = selection_of(record["tokens"])
    assert type(again) is type(selection)
    assert again.record() == record


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "returned NoneType"),
        (torch.ones(2, 10), r"returned float32 \[2, 10\]"),
        (torch.ones(2, 3, dtype=torch.bool), r"returned bool \[2, 3\].*here \[2, 10\]"),
    ],
)
def test_an_answer_that_is_no_selection_is_refused(answer, message):
    with pytest.raises(UnsupportedError, match=message):
        check_selected(answer, torch.Size([2, 10]), "bad", "w")
