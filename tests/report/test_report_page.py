"""report.html: one file that says everything about a run and loads nothing."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest


class Loads(HTMLParser):
    """Collects what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe", "object", "embed"):
            self.found.append(tag)
        for name, value in attrs:
            is_reference = name in ("href", "xlink:href", "src", "action", "data")
            if is_reference and not (value or "").startswith("#"):
                self.found.append(f"{tag} {name}={value}")


@pytest.fixture(scope="module")
def page(pruned: Path) -> str:
    return (pruned / "report.html").read_text(encoding="utf-8")


def test_it_is_self_contained(page: str) -> None:
    loads = Loads()
    loads.feed(page)
    assert loads.found == []
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_sparsity_per_modality_and_layer(page: str) -> None:
    assert re.search(r"<tr><td>vision</td><td>62\.\d+% \([\d,]+ kept\)</td>", page)
    for name in ("vision.0.attention.query", "text.0.ffn.fc1", "fusion.0.cross.key"):
        assert re.search(rf"<tr><td>{name}</td>.*(<td>[\d.]+%</td>){{3}}</tr>", page)
    assert page.count("<svg") == 1


def test_what_is_excluded_and_why(page: str) -> None:
    assert "projection into the common space: read by ITC only" in page
    assert "vision_proj.weight" in page


def test_time_memory_and_data(page: str) -> None:
    for fact in ("loading", "data pass", "masks", "peak memory of the process", "calibration data"):
        assert re.search(rf"<tr><td>{fact}</td><td class=\"text\">.+</td></tr>", page), fact


def test_split_half_agreement(page: str) -> None:
    assert "Was that enough data?" in page
    assert re.search(r"<tr><td>0.9</td><td>all</td><td>9\d\.\d+%</td><td>0\.\d+</td></tr>", page)


def test_the_command_that_repeats_it(page: str, xvlm: Path, photos: Path) -> None:
    line = re.search(r"<pre>(.*)</pre>", page)[1]
    assert line.startswith(f"vlp prune --model {xvlm} --method multiflow --sparsity 0.63 0.75 0.9 ")
    assert f"--data {photos} --batch-size 3" in line


@pytest.mark.parametrize(
    ("sparsity", "what", "remedy"),
    [
        ("0.98", r"all but removed \(over 99 %\)", r"a floor \(--floor 0.01\) keeps every layer"),
        ("0.999", "removed entirely", "no floor leaves room for all layers at this sparsity"),
    ],
)
def test_a_collapsed_layer_is_named_on_the_page_and_the_terminal(
    vlp, xvlm, tmp_path, sparsity, what, remedy
) -> None:
    out = tmp_path / "out"
    words = ("--model", xvlm, "--method", "omp", "--sparsity", f"vision={sparsity},text=0,fusion=0")
    result = vlp("prune", *words, "--out", out)
    line = rf"weights {what}: vision\.[^;]*; {remedy}"
    assert re.search(rf"^warning: .*{line}", result.stderr)
    assert re.search(line, (out / "report.html").read_text())


def test_one_batch_has_no_halves(vlp, xvlm, photos, tmp_path) -> None:
    vlp("prune", "--model", xvlm, "--sparsity", "0.5", "--data", photos, "--batches", 1,
        "--out", tmp_path / "o")  # fmt: skip
    assert "no two halves to compare" in (tmp_path / "o" / "report.html").read_text()


def test_without_its_packages_the_rest_is_written(vlp, xvlm, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)  # importing it fails now
    words = ("--model", xvlm, "--method", "omp", "--sparsity", "0.5")
    result = vlp("prune", *words, "--out", tmp_path / "o")
    assert "pip install 'vlp-plugins[report]'" in result.stderr
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == [
        "layers.csv",
        "masks-0.5.safetensors",
        "recipe.yaml",
    ]


def test_a_browser_fetches_and_runs_nothing_for_any_page(page: str) -> None:
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)">', page)
    assert policy
    assert policy[1].startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    assert page.index(policy[0]) < page.index("<style>"), "it holds for what follows it"
    root = Path(__file__).parents[2]
    homes = (root / "vlp_plugins", root / "adapters", root / "benchmarks")
    files = [p for home in homes for p in home.rglob("*") if p.suffix in (".py", ".j2")]
    heads = [path.name for path in files if "<html" in path.read_text(encoding="utf-8")]
    assert heads == ["frame.html.j2"], "every page is made of the one that has the policy"
