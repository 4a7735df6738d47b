"""`vlp inspect`, `vlp plugins`, and the program around all commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from vlp_command import Command

from vlp_adapters.blip import BlipPretrainConfig
from vlp_adapters.xvlm import XvlmPretrainConfig
from vlp_plugins.jobs.recipes import OPTIONS


def test_what_is_pruned_what_not_and_why(vlp: Command, models: Path) -> None:
    text = vlp("inspect", models / "xvlm").stdout
    assert text.startswith("XvlmForPretraining, adapter 'xvlm'")
    assert re.search(r"fusion +1 +10 +0 +\d", text)
    assert re.search(r"embeddings: words, patches.* +8 +[\d,]+ +vision_encoder.embeddings", text)


def test_shared_weights_are_one_row_with_all_their_names(vlp, models) -> None:
    text = vlp("inspect", models / "blip", "--weights").stdout
    assert re.search(r"text +2 +28 +12 +[\d,]+", text)
    row = next(line for line in text.splitlines() if line.startswith("text.0.cross.query "))
    assert re.search(r"text_encoder\.\S+, text_decoder\.", row)


@pytest.mark.parametrize(
    ("config", "adapter", "prunable"),
    [
        (BlipPretrainConfig.base(), "blip", "226,492,416"),
        (XvlmPretrainConfig.base(), "xvlm", "184,025,088"),
        (transformers.CLIPConfig(architectures=["CLIPModel"]), "clip", "122,683,392"),
        (transformers.SiglipConfig(architectures=["SiglipModel"]), "siglip", "169,869,312"),
        (transformers.ViTConfig(architectures=["ViTModel"]), "vit", "84,934,656"),
        (transformers.Dinov2Config(architectures=["Dinov2Model"]), "vit", "84,934,656"),
    ],
)
def test_a_full_size_model_is_inspected_from_its_configuration(
    vlp, tmp_path, config, adapter, prunable
) -> None:
    config.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "config.json"):
        text = vlp("inspect", source).stdout
        assert f"adapter '{adapter}'" in text
        assert re.search(rf"^all .* {prunable}$", text, re.MULTILINE)


def test_the_heads_of_siglip_are_left_alone_for_a_reason(vlp, models) -> None:
    text = vlp("inspect", models / "siglip").stdout
    assert re.search(r"text +2 +12 +0 +\d", text)
    assert re.search(r"vision +2 +12 +0 +\d", text)
    assert re.search(r"pooling head: reads the image with one probe +11 ", text)


def test_any_model_of_transformers_and_any_model_by_its_layers(vlp, models) -> None:
    text = vlp("inspect", models / "chinese_clip").stdout
    assert text.startswith("ChineseCLIPModel, adapter 'transformers'")
    assert re.search(r"^vision .*\ntext |^text .*\nvision ", text, re.MULTILINE)
    text = vlp("inspect", models / "chinese_clip", "--adapter", "module").stdout
    assert text.startswith("ChineseCLIPModel, adapter 'module'")


def test_plugins_lists_our_own(vlp) -> None:
    text = vlp("plugins").stdout
    assert max(map(len, text.partition("\n\n")[0].splitlines())) <= 80
    ours = r" vlp-plugins \S+ ok "
    joined = " ".join(text.split())
    assert re.search(rf"builtin{ours}.*methods: .*multiflow", joined)
    assert "id*NAME is method NAME with every layer's importance times" in joined
    adapters = "adapters: blip, clip, siglip, transformers, vit, xvlm"
    assert re.search(rf"adapters{ours}{adapters}", joined)


def test_hosts_that_are_not_installed_say_so(vlp, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "nni", None)
    monkeypatch.delitem(sys.modules, "vlp_plugins.hosts.nni", raising=False)
    lines = vlp("plugins").stdout.splitlines()
    assert "host transformers: installed" in lines
    (said,) = [line for line in lines if line.startswith("host nni: ")]
    assert said == (
        'host nni: NNI is not installed, or cannot be imported; pip install "vlp-plugins[nni]"'
    )
    found = json.loads(vlp("plugins", "--json").stdout)["hosts"]
    assert {"name": "nni", "error": said.removeprefix("host nni: ")} in found


def test_every_key_of_a_recipe_is_an_option_of_prune_and_plan(vlp) -> None:
    for command in ("prune", "plan"):
        text = vlp(command, "--help").stdout
        assert [option for option in OPTIONS.values() if f"{option} " not in text] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "--spasity", "0.5"], "No such option '--spasity'"),
        (["prune", "--sparsity"], "Option '--sparsity' requires a value"),
        (["compare", "m", "--methods", "--sparsity", "1"], "Option '--methods' requires a value"),
        (["prune", "--parameter", "--out", "o"], "Option '--parameter' requires a value"),
        (["prune", "--batch-size", "many"], "'many' is not a valid integer"),
        (["prun"], "No such command 'prun'"),
        (["masks", "show"], "Missing argument 'FILE'"),
        (["--nonsense"], "No such option '--nonsense'"),
    ],
)
def test_wrong_use_is_one_line_too(vlp, arguments, message) -> None:
    result = vlp(*arguments, code=2)
    assert re.fullmatch(r"error: .*; see .* --help\n", result.stderr)
    assert message in result.stderr


def test_without_arguments_it_shows_its_commands(vlp) -> None:
    result = vlp(code=2)
    assert result.stderr.startswith("Usage: ")
    assert "prune" in result.stderr


HELPS = """
import sys
from click.testing import CliRunner
from vlp_plugins.cli import main
for command in main.commands:
    assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0
print([name for name in ("torch", "transformers", "numpy", "rich") if name in sys.modules])
"""


def test_help_is_quick() -> None:
    """It imports neither torch nor transformers."""
    assert run("-c", HELPS) == "[]\n"


def test_as_a_module() -> None:
    assert run("-m", "vlp_plugins", "--version").startswith("vlp, version ")


@pytest.mark.parametrize(
    ("shell", "word"), [("bash", "complete -o nosort"), ("zsh", "compdef"), ("fish", "complete")]
)
def test_a_shell_gets_its_script_of_completion(shell, word) -> None:
    assert word in completion(_VLP_COMPLETE=f"{shell}_source")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("vlp pr", "plain,prune"),
        ("vlp masks ve", "plain,verify"),
        ("vlp prune --stat", "plain,--statistics"),
        ("vlp prune --sparsity 0.5 0.75 --variant pu", "plain,published"),
        ("vlp prune --sparsity", "plain,--sparsity"),
    ],
)
def test_words_are_completed(line, found) -> None:
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    assert found in completion(_VLP_COMPLETE="bash_complete", **words).splitlines()


def completion(**variables: str) -> str:
    """What the command prints for a shell that completes words."""
    script = "import sys; sys.argv = ['vlp']; from vlp_plugins.cli import main; main()"
    words = [sys.executable, "-c", script]
    environment = os.environ | variables
    return subprocess.run(words, stdout=-1, text=True, check=True, env=environment).stdout


def run(*words: str) -> str:
    """What Python prints."""
    return subprocess.run([sys.executable, *words], stdout=-1, text=True, check=True).stdout
