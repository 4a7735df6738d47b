"""Which adapter describes a model when plug-ins bring their own."""

import logging
import re

import pytest
from outsiders import ADAPTER
from torch import nn

from vlp_plugins.models.discovery import registry
from vlp_plugins.runtime.errors import UnclaimedModelError, UnsupportedError


def test_a_model_that_nobody_claims_needs_a_module_adapter():
    with pytest.raises(UnclaimedModelError, match=r"no adapter claims Linear.*ModuleAdapter\("):
        registry().adapter_for(nn.Linear(2, 2))


def test_outsiders_are_asked_before_built_ins(site):
    from transformers import ViTConfig, ViTModel

    size = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    vit = ViTModel(ViTConfig(**size, intermediate_size=4, image_size=4, patch_size=2))
    assert site.discover().adapter_for(vit).name == "vit"
    site.install("acme", ADAPTER % ("everything", "Everything"))
    assert site.discover().adapter_for(vit).name == "everything"


def test_an_adapter_whose_claims_raises_is_logged_and_skipped(site, caplog):
    site.install("acme", ADAPTER % ("everything", "Everything"))
    site.install("bad", ADAPTER % ("raising", "Raising"))
    with caplog.at_level(logging.WARNING, "vlp_plugins"):
        assert site.discover().adapter_for(nn.Linear(2, 2)).name == "everything"
    assert "adapter 'raising' of bad was skipped" in caplog.text


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ("while True: pass", "adapter 'bad' of bad, asked for a model, has not ended after 0.3 s"),
        ("raise GeneratorExit", "'bad' of bad was skipped for Linear: GeneratorExit"),
        ("raise type('Own', (BaseException,), {})('odd')", "'bad' of bad was skipped.*Own: odd"),
    ],
)
def test_an_adapter_that_does_not_answer_is_named(site, caplog, monkeypatch, claims, reason):
    monkeypatch.setenv("VLP_PLUGINS_TIMEOUT", "0.3")
    site.install("acme", ADAPTER % ("everything", "Everything"))
    odd = f"class Odd(Everything):\n    def claims(self, model):\n        {claims}\n"
    site.install("bad", odd + ADAPTER % ("bad", "Odd"))
    with caplog.at_level(logging.WARNING, "vlp_plugins"):
        assert site.discover().adapter_for(nn.Linear(2, 2)).name == "everything"
    assert re.search(reason, caplog.text)


@pytest.mark.parametrize(
    "write",
    [
        "torch.nn.init.zeros_(model.weight)",
        "model.weight.data.mul_(2)",
        "model.running_mean.add_(1)",
        "model.weight = torch.nn.Parameter(model.weight + 1); raise ValueError",
    ],
)
def test_an_adapter_that_writes_into_the_model_is_found_out(site, write):
    writing = "import torch\nclass Writing(Everything):\n    def claims(self, model):\n"
    site.install("bad", f"{writing}        {write}\n" + ADAPTER % ("writing", "Writing"))
    with pytest.raises(UnsupportedError, match="adapter 'writing' of bad changed the weights of "
                                               "BatchNorm1d .*VLP_PLUGINS_BLOCK=bad"):  # fmt: skip
        site.discover().adapter_for(nn.BatchNorm1d(3))


def test_the_error_names_an_adapter_that_could_not_be_asked(site):
    site.install("bad", ADAPTER % ("raising", "Raising"))
    with pytest.raises(UnclaimedModelError, match="'raising' failed: RuntimeError: claims is"):
        site.discover().adapter_for(nn.Linear(2, 2))


def test_two_outsiders_that_claim_one_model_leave_the_choice_to_the_user(site):
    site.install("acme", ADAPTER % ("one", "Everything"))
    site.install("umbrella", ADAPTER % ("two", "Everything"))
    with pytest.raises(UnsupportedError, match="'one' and 'two' all claim Linear.*adapter='one'"):
        site.discover().adapter_for(nn.Linear(2, 2))
