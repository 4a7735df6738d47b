"""Token selections: formulas beside naive loops, ties, samples of one kind, processes."""

import math

import pytest
import torch
from chosen_tokens import chosen_tokens

from vlp_plugins.calibration import selections
from vlp_plugins.calibration.amia import Amia, cosine_means, representative_tokens
from vlp_plugins.calibration.selections import Atv, BlockCall, TextTokens, selection_of
from vlp_plugins.models.adapter import TokenKind
from vlp_plugins.runtime.errors import UnknownNameError, UnsupportedError

T, M, V, P = TokenKind.TEXT, TokenKind.IMAGE, TokenKind.VIDEO, TokenKind.PADDING


def call(kinds, seed=0, sample=0, **parts):
    kinds = torch.tensor(kinds, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(*kinds.shape, 8, generator=generator)
    outputs = inputs + torch.rand(*kinds.shape, 1, generator=generator) * torch.randn(
        *kinds.shape, 8, generator=generator
    )
    return BlockCall(sample, kinds, inputs, outputs, **parts)


def naive_atv(calls, alpha, visual):
    drifts = [
        [
            1 - float(torch.dot(a, b) / (a.norm() * b.norm()))
            for a, b in zip(row_in, row_out, strict=True)
        ]
        for each in calls
        for row_in, row_out in zip(each.inputs.double(), each.outputs.double(), strict=True)
    ]
    kinds = [row for each in calls for row in each.kinds.tolist()]
    all_drifts = [
        d
        for row, of in zip(drifts, kinds, strict=True)
        for d, k in zip(row, of, strict=True)
        if k in visual
    ]
    mean = sum(all_drifts) / len(all_drifts) if all_drifts else 0.0
    found = []
    for row, of in zip(drifts, kinds, strict=True):
        others = {i for i, k in enumerate(of) if k != P and k not in visual}
        images = [i for i, k in enumerate(of) if k in visual]
        count = min(len(images), round(min(1, alpha * mean) * len(others)))
        chosen = others | set(sorted(images, key=lambda i: -row[i])[:count])
        found.append(sorted(chosen) or [i for i, k in enumerate(of) if k != P])
    return found


@pytest.mark.parametrize("alpha", [0, 0.5, 1, 3])
@pytest.mark.parametrize("published", [False, True])
def test_atv_is_the_formula(alpha, published):
    calls = [
        call([[P, T, M, M, M, T, T, M], [T, T, T, V, V, V, M, P]], seed=1),
        call([[M, M, M, M, M], [T, T, T, T, P]], seed=2, sample=1),
    ]
    visual = {M} if published else {M, V}

    found = chosen_tokens(Atv(alpha), calls, published=published)

    rows = [row.nonzero()[:, 0].tolist() for each in found for row in each]
    assert rows == naive_atv(calls, alpha, visual)


def test_atv_of_several_processes_is_that_of_one(monkeypatch):
    calls = [call([[T, T, M, M, M, M]], seed, sample=seed) for seed in range(4)]
    alone = chosen_tokens(Atv(), calls)
    states = [Atv().begin(), Atv().begin()]
    for index, each in enumerate(calls):
        states[index % 2].observe(each)

    monkeypatch.setattr(selections, "all_gather", lambda _: [state._sums for state in states])
    for state in states:
        state.agree()

    together = [states[i % 2].selected(i, "w") for i in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_batch_of_nan_does_not_choose_for_the_others():
    calls = [call([[T, T, M, M, M, M]], seed, sample=seed) for seed in range(3)]
    expected = chosen_tokens(Atv(), calls)
    spoilt = call([[T, T, M, M, M, M]], 3, sample=3)
    spoilt.outputs[0, 2] = torch.nan

    found = chosen_tokens(Atv(), [*calls, spoilt])

    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=False))


def test_a_sample_without_the_kind_counts_as_a_whole():
    tower = call([[M, M, M], [M, P, P]])
    words = call([[T, T, P]])

    assert chosen_tokens(TextTokens(), [tower])[0].tolist() == [[True] * 3, [True, False, False]]
    assert chosen_tokens(Atv(), [tower])[0].tolist() == [[True] * 3, [True, False, False]]
    assert chosen_tokens(selection_of("image"), [words])[0].tolist() == [[True, True, False]]
    assert chosen_tokens(selection_of("text"), [call([[T, M, P]])])[0].tolist() == [
        [True, False, False]
    ]


def amia_case(tokens=24, seed=0, width=6):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(tokens, width, generator=generator) + 0.3
    attention = torch.rand(tokens, generator=generator).softmax(0)
    visual = torch.arange(tokens) % 5 < 3
    return outputs, attention, visual


def naive_amia(outputs, attention, visual):
    """The formula of the paper's code, token by token in float64."""
    o = torch.nn.functional.normalize(outputs.double(), dim=1)
    count = len(o)
    d = (1 - o @ o.T).tolist()
    near = [
        sorted((j for j in range(count) if j != i), key=lambda j: d[i][j])[:3] for i in range(count)
    ]
    g = [
        float(attention[i]) + sum(math.exp(-d[i][n]) * float(attention[n]) for n in near[i])
        for i in range(count)
    ]

    def mean(pairs):
        pairs = list(pairs)
        return sum(pairs) / len(pairs)

    kinds = visual.tolist()
    within = [
        mean(
            1 - d[i][j]
            for i in range(count)
            for j in range(i + 1, count)
            if kinds[i] == kinds[j] == kind and d[i][j] < 1
        )
        for kind in (True, False)
    ]
    across = mean(
        1 - d[i][j] for i in range(count) for j in range(count) if kinds[i] and not kinds[j]
    )
    rho = (sum(within) + across) / 3
    k = [[math.exp(-(2 - 2 * (1 - d[i][j])) / 2) for j in range(count)] for i in range(count)]
    chosen: list[int] = []
    while len(chosen) < count:
        best = max(range(count), key=lambda i: g[i])
        for n in near[best]:
            g[n] -= math.exp(-0.2 * d[best][n]) * max(g[best], 0)
        chosen.append(best)
        lowest = min(g) - 1
        for i in chosen:
            g[i] = lowest
        whole = mean(k[i][j] for i in range(count) for j in range(count))
        inner = mean(k[i][j] for i in chosen for j in chosen)
        cross = mean(k[i][j] for i in range(count) for j in chosen)
        if whole + inner - 2 * cross < 0.1 * math.sqrt(1 - rho):
            break
    return sorted(chosen)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("published", [False, True])
def test_amia_is_the_formula(seed, published):
    case = amia_case(seed=seed, tokens=17 + seed)

    found = representative_tokens(*case, published=published)

    assert found.nonzero()[:, 0].tolist() == naive_amia(*case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_of_equal_tokens_changes_nothing(dtype):
    """Quirk amia-T5: the published code takes another neighbour for the token itself."""
    outputs, attention, visual = amia_case(40)
    outputs[10:20] = outputs[:10]
    outputs[25:30] = outputs[3]
    outputs = outputs.to(dtype)
    copies = torch.zeros(40, 1)
    copies[10:20] = copies[25:30] = 1
    if dtype is torch.float32:
        copies[:] = 1  # rounding of all tokens
    expected = representative_tokens(outputs, attention, visual)
    published = representative_tokens(outputs, attention, visual, published=True)
    changed = 0

    for seed in range(20):
        noise = torch.rand(outputs.shape, generator=torch.Generator().manual_seed(seed)) - 0.5
        step = 2 * torch.finfo(dtype).eps * noise * copies
        rounded = (outputs.float() * (1 + step)).to(dtype)
        assert not torch.equal(rounded, outputs)
        assert torch.equal(representative_tokens(rounded, attention, visual), expected)
        again = representative_tokens(rounded, attention, visual, published=True)
        changed += not torch.equal(again, published)
    assert changed


def test_equal_tokens_are_taken_in_their_order():
    outputs = torch.ones(6, 4)
    attention = torch.full((6,), 1 / 6)

    found = representative_tokens(outputs, attention, torch.arange(6) < 3)

    # Nothing tells them apart, so none of them is enough to end early but all are alike.
    assert found[0]


@pytest.mark.parametrize("images", [0, 1, 2, 7, 8])
def test_amia_ends_on_samples_with_few_tokens_of_a_kind(images):
    """Quirk amia-T6: there the published code never ends."""
    outputs, attention, _ = amia_case(8)
    visual = torch.arange(8) < images

    assert representative_tokens(outputs, attention, visual).any()
    if images in (0, 1, 7, 8):
        with pytest.raises(UnsupportedError, match="never ends"):
            representative_tokens(outputs, attention, visual, published=True)
    one = representative_tokens(outputs[:1], attention[:1], visual[:1])
    assert one.tolist() == [True]


def test_amia_chooses_for_every_layer_and_sample_by_itself():
    kinds = [[P, T, M, M, T, T, M, M], [T, M, M, T, T, P, P, P]]
    generator = torch.Generator().manual_seed(0)
    outputs = {name: torch.randn(2, 8, 5, generator=generator) for name in ("q", "k")}
    attention = torch.rand(2, 3, 8, 8, generator=generator)
    block = call(kinds, module_outputs=outputs, attention=attention)
    state = Amia().begin()
    state.observe(block)

    for name, last in (("q", (7, 4)), ("k", (7, 4))):
        found = state.selected(0, name)
        for row, real in enumerate(block.real):
            expected = representative_tokens(
                outputs[name][row, real],
                attention[row, :, last[row]].mean(0)[real],
                block.of_kinds(M, V)[row, real],
            )
            assert torch.equal(found[row, real], expected)
            assert not found[row, ~real].any()
    assert torch.equal(state.selected(0, "other"), block.real)


def test_amia_without_attention_says_what_to_do():
    block = call([[T, M, T]], module_outputs={"q": torch.randn(1, 3, 4)})

    with pytest.raises(UnsupportedError, match="attn_implementation='eager'"):
        Amia().begin().observe(block)


def test_cosine_means_are_over_pairs():
    outputs, _, visual = amia_case(9)
    rows = torch.nn.functional.normalize(outputs.double(), dim=1)
    pairs = {
        kind: [
            float(rows[i] @ rows[j])
            for i in range(9)
            for j in range(i + 1, 9)
            if visual[i] == visual[j] == kind
        ]
        for kind in (True, False)
    }
    across = [float(rows[i] @ rows[j]) for i in range(9) for j in range(9) if visual[i] > visual[j]]
    expected = [
        *(sum(p for p in pairs[k] if p > 0) / sum(p > 0 for p in pairs[k]) for k in (True, False)),
        sum(across) / len(across),
    ]

    assert cosine_means(outputs, visual) == pytest.approx(expected, abs=1e-6)
    assert math.isnan(cosine_means(outputs, torch.ones(9, dtype=torch.bool))[1])


def test_parameters_are_checked():
    assert selection_of("atv(alpha=3)") == Atv(3)
    with pytest.raises(UnsupportedError, match="alpha=-1; give a number from 0 on"):
        Atv(-1)
    with pytest.raises(UnsupportedError, match="alpha='much'"):
        selection_of("atv(alpha=much)")
    with pytest.raises(UnknownNameError, match="did you mean 'atv'"):
        selection_of("atvv")
    with pytest.raises(UnknownNameError, match="no parameter 'beta'; it takes alpha"):
        selection_of("atv(beta=3)")
    with pytest.raises(UnsupportedError, match=r"written atv\(name=value\)"):
        selection_of("atv(3)")
    with pytest.raises(UnsupportedError, match="tokens=3 is no token selection"):
        selection_of(3)
