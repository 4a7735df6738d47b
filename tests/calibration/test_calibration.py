"""The data pass: what counts, what is measured once, what the model looks like afterwards."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import FEED, WIDTH, Counting, Toy, ToyAdapter, toy_batches, toy_model

from vlp_plugins.calibration.batches import interleave
from vlp_plugins.calibration.data_pass import calibrate
from vlp_plugins.calibration.moments import (
    INPUT_SECOND_MOMENT,
    InputSecondMoment,
    Site,
    sum_of_squares,
)
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.models.adapter import Adapter, Batch, Owner, Stream, WeightSpec
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import (
    BatchError,
    DataError,
    NonFiniteError,
    StatisticsError,
    UnsupportedError,
)


def run(model: nn.Module, adapter: Adapter, batches: Any, **options: Any) -> Statistics:
    weights = WeightMap.of(model, adapter)
    needs = options.pop("statistics", [InputSecondMoment()])
    return calibrate(model, adapter, weights, batches, needs, **options)


def run_toy(batches: Any, model: Toy | None = None, **options: Any) -> Statistics:
    return run(model or toy_model(), ToyAdapter(), batches, **options)


def moment(statistics: Statistics, weight: str, **options: Any) -> Tensor:
    return statistics.mean(INPUT_SECOND_MOMENT, weight, **options)


def sites(statistics: Statistics, weight: str) -> set[tuple[str, int]]:
    return {(s.stream, s.owner) for _, s in statistics.sums if s.weight == weight}


class Lambda(Adapter):
    """An adapter of one stream, for a single layer or a few."""

    name = "lambda"

    def __init__(self, real: dict[str, Any], **owners: Owner) -> None:
        self.real = real
        self.owners = owners

    def claims(self, model: nn.Module) -> bool:
        return True

    def weights(self, model: nn.Module) -> Iterator[WeightSpec]:
        return iter(WeightSpec(name, "m", 0, (owner,)) for name, owner in self.owners.items())

    def streams(self, model: nn.Module, batch: Batch, **_: Any) -> Iterator[Stream]:
        yield Stream("only", lambda: model(batch["x"]), self.real)


def test_a_moment_is_the_sum_over_real_tokens_divided_by_samples():
    model, batches = toy_model(), toy_batches(3)
    statistics = run_toy(batches, model)

    expected = [0.0] * WIDTH
    for batch in batches:
        words = model.words(batch["input_ids"]).tolist()
        for sample, mask in zip(words, batch["attention_mask"].tolist(), strict=True):
            for token, is_real in zip(sample, mask, strict=True):
                for j in range(WIDTH):
                    expected[j] += token[j] ** 2 if is_real else 0.0
    expected_mean = torch.tensor(expected, dtype=torch.float64) / 9
    torch.testing.assert_close(moment(statistics, "text.q"), expected_mean)
    assert statistics.samples == (6, 3)
    assert statistics.batches == 3


def test_what_stands_at_masked_positions_does_not_count():
    clean = toy_batches(2)
    dirty = [dict(batch) for batch in toy_batches(2)]
    for batch in dirty:
        hidden = batch["attention_mask"] == 0
        batch["input_ids"] = torch.where(hidden, 19, batch["input_ids"])

    # The attention of the toy looks at padding, so only layers before it are comparable.
    for name in ("text.q", "vision.out", "cross.0.k"):
        torch.testing.assert_close(
            moment(run_toy(clean), name), moment(run_toy(dirty), name), rtol=0, atol=0
        )


def test_keys_and_values_of_cross_attention_read_image_tokens():
    batch = toy_batches(1)[0]
    model = toy_model().eval()
    image = model.see(batch["pixel_values"])  # 3 images of 4 tokens; the texts have 5
    expected = image.detach().double().square().sum((0, 1)) / 3
    statistics = run_toy([batch], model)
    torch.testing.assert_close(moment(statistics, "cross.0.k"), expected)
    torch.testing.assert_close(moment(statistics, "cross.1.v"), expected)


def test_a_tensor_that_feeds_several_layers_is_measured_once():
    counting = Counting()
    batch = toy_batches(1)[0]
    statistics = run_toy([batch], statistics=[counting])
    real = int(batch["attention_mask"].sum())
    calls = {
        "patches": 12,
        "vision q, k, v": 12,
        "vision out": 12,
        "text q, k, v": real,
        "text out": real,
        "cross 0 q": real,
        "image: k and v of both cross-attention layers": 12,
        "cross 0 out": real,
        "cross 1 q": real,
        "cross 1 out": real,
        "feed, first call": real,
        "feed, second call": real,
        "encoder_out": real,
        "decoder_out": real,
    }
    assert counting.tokens == list(calls.values())
    assert torch.equal(moment(statistics, "text.q"), moment(statistics, "text.v"))


def test_a_tensor_that_was_changed_in_place_is_measured_again():
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> None:
            x = x.clone()
            self.a(x)
            self.b(x.mul_(2))

    adapter = Lambda({"t": None}, a=Owner("a", "t"), b=Owner("b", "t"))
    statistics = run(Changes(), adapter, [{"x": torch.ones(1, 3, 2)}])
    assert moment(statistics, "a").tolist() == [3, 3]
    assert moment(statistics, "b").tolist() == [12, 12]


def test_a_layer_that_runs_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> None:
            self.a(x)
            self.a(input=3 * x)

    statistics = run(Twice(), Lambda({"t": None}, a=Owner("a", "t")), [{"x": torch.ones(1, 1, 2)}])
    assert moment(statistics, "a").tolist() == [10, 10]


def test_a_tied_pair_has_one_site_per_user():
    model, batches = toy_model(), toy_batches(2)
    statistics = run_toy(batches, model)
    assert sites(statistics, "text.out_proj") == {("text", 0), ("decoder", 1)}

    first = moment(statistics, "text.out_proj", owners="first")
    both = moment(statistics, "text.out_proj", owners="all")
    decoder = statistics.sums[INPUT_SECOND_MOMENT, Site("text.out_proj", "decoder", 1)]
    torch.testing.assert_close(both, first + decoder.sum(0) / 6)
    torch.testing.assert_close(decoder.sum(0) / 6, moment(statistics, "text.q"))


def test_a_module_with_two_paths_counts_each_call_once():
    model = nn.Sequential(nn.Linear(2, 2))
    model.append(model[0])

    class Shared(Lambda):
        def weights(self, model: nn.Module) -> Iterator[WeightSpec]:
            yield WeightSpec("w", "m", 0, (Owner("0", "t"), Owner("1", "t")))

    batch = {"x": torch.ones(1, 1, 2)}
    statistics = run(model, Shared({"t": None}), [batch])
    assert sites(statistics, "w") == {("only", 0)}
    second = model[0](batch["x"]).detach().double().square().flatten()
    torch.testing.assert_close(moment(statistics, "w"), 1 + second)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 2, 3),
        nn.Conv2d(3, 2, 3, stride=2, padding=1),
        nn.Conv2d(3, 2, (3, 2), dilation=2, padding=(2, 1)),
        nn.Conv2d(3, 2, 3, padding="same", padding_mode="reflect"),
    ],
    ids=["plain", "stride", "dilation", "same"],
)
def test_a_convolution_is_measured_by_the_patches_that_its_kernel_sees(layer):
    # With a weight that is one at a single place, the output is exactly that input feature.
    images = torch.rand(2, 3, 7, 8)
    features = layer.weight[0].numel()
    adapter = Lambda({"t": None}, w=Owner("0", "t"))
    statistics = run(nn.Sequential(layer), adapter, [{"x": images}])
    for j in (0, 1, features // 2, features - 1):
        with torch.no_grad():
            layer.weight.zero_()
            layer.bias.zero_()
            layer.weight[0].view(-1)[j] = 1
            seen = layer(images)[:, 0]
        expected = seen.double().square().sum() / 2
        torch.testing.assert_close(moment(statistics, "w")[j], expected, rtol=1e-6, atol=0)


def test_large_convolution_inputs_are_unfolded_in_parts(monkeypatch):
    images = torch.rand(5, 3, 8, 8)
    layer = nn.Sequential(nn.Conv2d(3, 2, 3))
    adapter = Lambda({"t": None}, w=Owner("0", "t"))
    whole = run(layer, adapter, [{"x": images}])
    monkeypatch.setattr("vlp_plugins.calibration.tokens._UNFOLDED", 2 * 9 * images[0].numel())
    counting = Counting()
    parts = run(layer, adapter, [{"x": images}], statistics=[counting])
    assert counting.tokens == [72, 72, 36]
    torch.testing.assert_close(moment(parts, "w"), moment(whole, "w"), rtol=1e-6, atol=0)


def test_a_grouped_convolution_is_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(UnsupportedError, match="0 is a convolution in 2 groups.*exclude"):
        run(model, Lambda({"t": None}, w=Owner("0", "t")), [{"x": torch.rand(1, 4, 8, 8)}])
    assert not model[0]._forward_pre_hooks


def test_the_model_is_left_as_it_was_found():
    model = toy_model().train()
    model.vision.eval()
    model.text.q.requires_grad_(False)
    before = {
        "training": [m.training for m in model.modules()],
        "hooks": [len(m._forward_pre_hooks) for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "values": [p.detach().clone() for p in model.parameters()],
        "rng": torch.get_rng_state(),
    }

    def batches() -> Iterator[Batch]:
        yield toy_batches(1)[0]
        assert not model.drop.training
        yield toy_batches(1)[0] | {"input_ids": torch.full((3, 5), 99)}  # beyond the vocabulary

    with pytest.raises(IndexError):
        run_toy(batches(), model)
    run_toy(toy_batches(2), model)

    assert [m.training for m in model.modules()] == before["training"]
    assert [len(m._forward_pre_hooks) for m in model.modules()] == before["hooks"]
    assert [p.requires_grad for p in model.parameters()] == before["requires_grad"]
    assert [p.grad for p in model.parameters()] == before["grads"]
    assert all(map(torch.equal, model.parameters(), before["values"]))
    assert torch.equal(torch.get_rng_state(), before["rng"])
    assert torch.is_grad_enabled()


def test_a_stream_that_draws_random_numbers_does_not_disturb_the_callers():
    class Draws(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(1)

    model = nn.Sequential(Draws(2, 2))
    before = torch.get_rng_state()
    run(model, Lambda({"t": None}, w=Owner("0", "t")), [{"x": torch.ones(1, 1, 2)}])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_two_halves_are_the_even_and_the_odd_batches():
    batches = toy_batches(5)
    whole = run_toy(batches)
    even, odd = run_toy(batches[0::2]), run_toy(batches[1::2])
    for name in WeightMap.of(toy_model(), ToyAdapter()):
        halves = [moment(whole, name, half=half) for half in (0, 1)]
        torch.testing.assert_close(halves[0], moment(even, name), rtol=0, atol=1e-14)
        torch.testing.assert_close(halves[1], moment(odd, name), rtol=0, atol=1e-14)
        together = (halves[0] * whole.samples[0] + halves[1] * whole.samples[1]) / 15
        torch.testing.assert_close(together, moment(whole, name))
    assert whole.samples == (9, 6)


def test_progress_is_told_after_every_batch():
    seen: list[tuple[int, int | None]] = []
    run_toy(toy_batches(3), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]

    seen.clear()
    generator = iter(toy_batches(3))
    run_toy(generator, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (3, None)

    seen.clear()
    run_toy(toy_batches(3), limit=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_the_limit_reads_not_one_batch_more():
    generator = iter(toy_batches(4))
    assert run_toy(generator, limit=2).batches == 2
    assert len(list(generator)) == 2


def test_too_little_data_is_said(caplog):
    with caplog.at_level(logging.WARNING, "vlp_plugins.calibration"):
        assert run_toy(toy_batches(2), limit=5).batches == 2
    assert "2 batches, fewer than limit=5" in caplog.text
    with pytest.raises(DataError, match="empty: no batch was read"):
        run_toy([])
    with pytest.raises(DataError, match="limit=0"):
        run_toy(toy_batches(1), limit=0)


def test_the_fingerprint_is_that_of_the_batches_in_their_order():
    batches = toy_batches(3)
    assert run_toy(batches).fingerprint == run_toy(toy_batches(3)).fingerprint
    assert run_toy(batches).fingerprint != run_toy(batches[::-1]).fingerprint
    changed = [*batches[:2], batches[2] | {"input_ids": batches[2]["input_ids"].int()}]
    assert run_toy(batches).fingerprint != run_toy(changed).fingerprint


def test_loaders_are_interleaved_until_all_are_exhausted():
    a, b, c = ([{"n": f"{name}{i}"} for i in range(k)] for name, k in zip("abc", (3, 1, 2)))  # noqa: B905
    order = [batch["n"] for batch in interleave(a, b, c)]
    assert order == ["a0", "b0", "c0", "a1", "c1", "a2"]


def test_batches_may_be_tuples_or_tensors():
    model = nn.Sequential(nn.Linear(4, 3))
    x = torch.rand(5, 4)
    expected = x.double().square().sum(0) / 5
    for batch in (x, (x, torch.zeros(5)), [x]):
        statistics = run(model, ModuleAdapter(model), [batch])
        torch.testing.assert_close(moment(statistics, "0"), expected)
        assert statistics.samples == (5, 0)


def test_nan_in_activations_names_the_layer_and_the_batch():
    batches = toy_batches(3)
    batches[1]["pixel_values"][0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"input of patch .*'vision.patch'.*'vision'.*batch 1"):
        run_toy(batches)

    model = toy_model()
    with torch.no_grad():
        model.text.out.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"input of cross.0.q .*stream 'text'.*batch 0.*look"):
        run_toy(toy_batches(1), model)


def test_an_input_that_does_not_fit_its_mask_names_layer_and_shapes():
    adapter = Lambda({"t": torch.ones(2, 5, dtype=torch.bool)}, w=Owner("0", "t"))
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(BatchError, match=r"input of 0 is \[2, 4, 3\], but the mask .* is \[2, 5\]"):
        run(model, adapter, [{"x": torch.rand(2, 4, 3)}])
    with pytest.raises(BatchError, match=r"input of 0 is \[10, 3\], but the mask"):
        run(model, adapter, [{"x": torch.rand(10, 3)}])  # flattened tokens, not pooled samples


@pytest.mark.parametrize("real", [None, torch.zeros(2, 5, dtype=torch.bool)])
def test_one_pooled_vector_per_sample_is_real_whatever_the_mask_of_the_tokens(real):
    x = torch.rand(2, 3)
    statistics = run(
        nn.Sequential(nn.Linear(3, 3)), Lambda({"t": real}, w=Owner("0", "t")), [{"x": x}]
    )
    torch.testing.assert_close(moment(statistics, "w"), x.double().square().sum(0) / 2)


def test_a_stream_that_says_nothing_about_a_token_space_is_an_adapter_error():
    model = nn.Sequential(nn.Linear(3, 3))
    message = r"'lambda': stream 'only' .*'text'.*0 reads.*says: image"
    with pytest.raises(UnsupportedError, match=message):
        run(model, Lambda({"image": None}, w=Owner("0", "text")), [{"x": torch.rand(2, 4, 3)}])
    mask = torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(UnsupportedError, match=r"int64; an adapter must give bool"):
        run(model, Lambda({"t": mask}, w=Owner("0", "t")), [{"x": torch.rand(2, 4, 3)}])


def test_a_weight_that_no_stream_runs_is_an_adapter_error():
    class Half(ToyAdapter):
        def streams(self, *args: Any, **options: Any) -> Iterator[Stream]:
            return (s for s in super().streams(*args, **options) if s.name == "vision")

    with pytest.raises(StatisticsError, match=r"no stream of adapter 'toy' ran weight 'text.q'"):
        run(toy_model(), Half(), toy_batches(1))
    assert run(toy_model(), Half(), toy_batches(1), statistics=[]).sums == {}


def test_statistics_hold_a_few_megabytes_however_much_data_there_was():
    few, many = run_toy(toy_batches(1)), run_toy(toy_batches(6))
    assert few.sums.keys() == many.sums.keys()
    assert all(value.shape[0] == 2 and value.dtype == torch.float64 for value in many.sums.values())
    sizes = {len(value[0]) for value in many.sums.values()}
    assert sizes == {WIDTH, 3 * 4 * 4}
    assert FEED not in sizes


@pytest.mark.parametrize("shape", [(1, 3), (0, 3), (700, 300), (41, 70000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sum_of_squares_is_that_of_the_formula(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = sum_of_squares(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), x.double().square().sum(0), rtol=1e-6, atol=0)


def test_sum_of_squares_reads_transposed_inputs():
    x = torch.randn(50, 40).t()
    expected = x.double().square().sum(0).float()
    torch.testing.assert_close(sum_of_squares(x), expected)


def test_a_caller_in_inference_mode_gets_the_same_statistics():
    ordinary, counting = Counting(), Counting()
    model = toy_model()
    expected = run_toy(toy_batches(3), model, statistics=[ordinary])
    with torch.inference_mode():
        batches = toy_batches(3)  # inference tensors themselves
        found = run_toy(batches, model, statistics=[counting])
    assert batches[0]["pixel_values"].is_inference()
    assert counting.tokens == ordinary.tokens  # measured once, here too
    assert all(torch.equal(found.sums[key], value) for key, value in expected.sums.items())
    assert not any(value.is_inference() for value in found.sums.values())

    later = run_toy(batches)
    assert later.fingerprint == expected.fingerprint
    assert torch.equal(moment(later, "text.q"), moment(expected, "text.q"))


def test_a_model_made_in_inference_mode_is_measured():
    with torch.inference_mode():
        model = toy_model()
    expected, found = run_toy(toy_batches(2)), run_toy(toy_batches(2), model)
    # Not to the bit: torch takes other kernels for such parameters.
    torch.testing.assert_close(found.sums, expected.sums, rtol=1e-6, atol=1e-6)


def test_views_of_parameters_made_in_inference_mode_are_measured():
    class Query(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.full((1, 3, 2), 2.0))
            self.a = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> None:
            self.a(self.query.expand(len(x), -1, -1))

    with torch.inference_mode():
        model = Query()
    statistics = run(model, Lambda({"t": None}, a=Owner("a", "t")), [{"x": torch.ones(4, 1)}])
    assert moment(statistics, "a").tolist() == [12, 12]


def test_a_single_batch_for_a_list_of_batches_is_said():
    with pytest.raises(DataError, match="a single batch; give a list"):
        run_toy(toy_batches(1)[0])
