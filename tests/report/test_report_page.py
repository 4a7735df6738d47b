"""report.html: one file that answers first, says everything about a run and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from vlp_plugins.report.drawing import Axis, Chart, HeatMap, line_chart
from vlp_plugins.report.page import FileLink, Page, Section, Step, Table, Tile, render

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")
HOSTILE = "<script>alert(1)</script>\"'&</title></style>{{ 7 * 7 }}"


class Loads(HTMLParser):
    """Collects what a browser would fetch, and the links to the files of the folder."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("link", "img", "iframe", "object", "embed"):
            self.found.append(tag)
        for name, value in attrs:
            if tag == "a" and name == "href":
                self.links.append(str(value))
            elif name in ("href", "xlink:href", "src", "action", "data", "style", "onclick"):
                self.found.append(f"{tag} {name}={value}")


@pytest.fixture(scope="module")
def page(pruned: Path) -> str:
    return (pruned / "report.html").read_text(encoding="utf-8")


def test_it_is_self_contained(page: str) -> None:
    loads = Loads()
    loads.feed(page)
    assert loads.found == []
    assert not any(text in page for text in ("@import", "url(", "http://", "//cdn"))
    assert "https:" not in page


def test_every_file_of_the_folder_has_a_link_and_no_link_leads_elsewhere(page, pruned) -> None:
    loads = Loads()
    loads.feed(page)
    assert all((pruned / unquote(link)).exists() for link in loads.links)
    names = {path.name for path in pruned.iterdir()} - {"report.html"}
    assert set(map(unquote, loads.links)) == names
    assert re.search(r">masks-0.75.safetensors</a></td><td>masks: .*<td[^>]*>\d+ bytes|kB", page)


def test_the_first_screen_says_what_was_done(page: str, pruned: Path) -> None:
    top = page[: page.index("What to do next")]
    assert "<h1>multiflow on xvlm</h1>" in top
    lead = re.search(r'<p class="lead">(.*)</p>', top)[1]
    assert re.fullmatch(
        r"multiflow made 3 sets of masks, which remove 6[23]\.\d% to 9\d\.\d% of the prunable "
        r"weights of xvlm, or \d\d\.\d% to \d\d\.\d% of the whole model\.",
        lead,
    )
    tiles = dict(re.findall(r'<dt>(.*?)</dt><dd class="value">(.*?)</dd>', top))
    assert tiles["Model"] == "xvlm"
    assert tiles["Method"] == "multiflow"
    assert tiles["Quality"] == "not measured"
    assert re.fullmatch(r"[\d.]+ .?B to [\d.]+ .?B", tiles["Size on disk"])
    assert float(tiles["Sparsity of the whole model"].split("%")[0]) < 63


def test_the_size_is_that_of_the_sparse_checkpoint(page, pruned, xvlm, vlp, tmp_path) -> None:
    found = re.search(r'<dt>Size on disk</dt><dd class="value">([\d.]+) kB to', page)
    vlp("masks", "apply", pruned / "masks-0.63.safetensors", xvlm, "--sparse", "--out",
        tmp_path / "small")  # fmt: skip
    (file,) = (tmp_path / "small").glob("*.safetensors")
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    assert float(found[1]) == pytest.approx((file.stat().st_size - header) / 1000, rel=0.01)


def test_the_next_steps_run_as_they_stand(page, xvlm, photos, vlp, tmp_path) -> None:
    lines = [html.unescape(line) for line in re.findall(r"<pre>(.*?)</pre>", page)][:-1]
    assert [" ".join(line.split()[1:3]) for line in lines] == [
        f"evaluate {xvlm}", "masks apply", f"finetune {xvlm}",
    ]  # fmt: skip
    for number, line in enumerate(lines):
        words = shlex.split(re.sub("TEST_DATA|TRAINING_DATA", str(photos), line))
        words[words.index("--out") + 1] = str(tmp_path / str(number))
        few = ("--batch-size", "4") if words[1] == "finetune" else ()
        vlp(*words[1:], *few)
        assert any((tmp_path / str(number)).iterdir())


def test_sparsity_per_modality_and_layer(page: str) -> None:
    cell = r'<td class="number">{}</td>'
    row = "".join(map(cell.format, (r"63\.\d%|62\.\d+%", r"\d\d\.\d%", r"6[23]\.\d%")))
    assert re.search(rf"masks-0.63.safetensors</a></td>{row}", page)
    for name in ("vision.0.attention.query", "text.0.ffn.fc1", "fusion.0.cross.key"):
        assert re.search(rf">{name}</td>.*(<td class=\"number\">[\d.]+%</td>){{3}}</tr>", page)


def test_a_heat_map_per_modality_and_mask_set(page: str) -> None:
    assert page.count('<table class="heat">') == 3 * 3
    assert re.search(r">cross<br>key</th>", page)
    assert re.search(r'<th scope="row">1</th>(<td class="h1?\d">[\d.]+%</td>)+', page)


def test_what_is_excluded_and_why(page: str) -> None:
    assert "projection into the common space: read by ITC only" in page
    assert "vision_proj.weight" in page


def test_time_memory_and_data(page: str) -> None:
    for fact in ("loading", "data pass", "masks", "peak memory of the process", "calibration data"):
        assert re.search(rf"<tr><td class=\"name\">{fact}</td><td>.+</td></tr>", page), fact


def test_split_half_agreement(page: str) -> None:
    assert "Was that enough data?" in page
    line = r">0.9</td><td>all</td><td [^>]*>9\d\.\d+%</td><td [^>]*>0\.\d+</td></tr>"
    assert re.search(line, page)


def test_the_command_that_repeats_it(page: str, xvlm: Path, photos: Path) -> None:
    line = re.findall(r"<pre>(.*?)</pre>", page)[-1]
    assert line.startswith(f"vlp prune --model {xvlm} --method multiflow --sparsity 0.63 0.75 0.9 ")
    assert f"--data {photos} --batch-size 3" in line


@pytest.mark.parametrize(
    ("sparsity", "what", "remedy"),
    [
        ("0.98", r"all but removed \(over 99%\)", r"a floor \(--floor 0.01\) keeps every layer"),
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
    text = (out / "report.html").read_text()
    assert re.search(line, text[: text.index("What to do next")])


def test_one_batch_has_no_halves(vlp, xvlm, photos, tmp_path) -> None:
    vlp("prune", "--model", xvlm, "--sparsity", "0.5", "--data", photos, "--batches", 1,
        "--out", tmp_path / "o")  # fmt: skip
    assert "no two halves to compare" in (tmp_path / "o" / "report.html").read_text()


def test_missing_data_and_a_published_variant_are_said_on_the_first_screen(
    vlp, xvlm, photos, tmp_path
) -> None:
    vlp("prune", "--model", xvlm, "--sparsity", "0.5", "--data", photos, "--batches", 50,
        "--variant", "published", "--out", tmp_path / "o")  # fmt: skip
    text = (tmp_path / "o" / "report.html").read_text()
    top = text[: text.index("What to do next")]
    assert re.search(r"less data than asked for: \d+ batches of the 50 asked for", top)
    assert "as published; leaves what stays as it is" in top


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


def test_a_browser_runs_our_script_and_style_and_nothing_else(page: str) -> None:
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)">', page)
    assert policy
    hashes = {}
    for name in ("style", "script"):
        (text,) = re.findall(rf"<{name}>(.*?)</{name}>", page, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[name] = f"sha256-{digest}"
    assert html.unescape(policy[1]) == (
        f"default-src 'none'; style-src '{hashes['style']}'; script-src '{hashes['script']}'; "
        "base-uri 'none'; form-action 'none'"
    )
    assert page.index(policy[0]) < page.index("<style>"), "it holds for what follows it"
    root = Path(__file__).parents[2]
    homes = (root / "vlp_plugins", root / "adapters", root / "benchmarks")
    files = [p for home in homes for p in home.rglob("*") if p.suffix in (".py", ".j2")]
    heads = [path.name for path in files if "<html" in path.read_text(encoding="utf-8")]
    assert heads == ["page.html.j2"], "every page is made of the one that has the policy"


def hostile_page() -> Page:
    table = Table(HOSTILE, (HOSTILE, "n"), [[HOSTILE, "1"], [FileLink(HOSTILE), "2"], ["c", "3"]])
    chart = line_chart(HOSTILE, {HOSTILE: [(0.0, 1.0), (1.0, 2.0, 0.5)], "b": [(0.5, 1.0)]},
                       y=Axis(HOSTILE), reference=(1.5, HOSTILE), note=HOSTILE)  # fmt: skip
    heat = HeatMap(HOSTILE, HOSTILE, [HOSTILE], [(HOSTILE, [0.5])])
    section = Section(HOSTILE, HOSTILE, [chart], [heat], [table])
    return Page(
        HOSTILE, f"vlp {HOSTILE}", HOSTILE, [Tile(HOSTILE, HOSTILE, HOSTILE)], [HOSTILE],
        [HOSTILE], [Step(HOSTILE, HOSTILE)], [section, section], {HOSTILE: HOSTILE},
    )  # fmt: skip


def test_texts_of_files_and_models_are_shown_as_text(tmp_path: Path) -> None:
    (tmp_path / "<b>&.csv").write_text("x")
    text = render(hostile_page(), tmp_path)
    assert "<script>alert" not in text
    assert "<b>" not in text
    assert "49" not in re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", text, flags=re.DOTALL)
    assert text.count("{{ 7 * 7 }}") > 20
    assert text.count("<script>") == 1
    loads = Loads()
    loads.feed(text)
    assert loads.found == []
    assert all(":" not in link for link in loads.links)


# In a browser


def seen_by_browser(
    page: Path, width: int, script: str, folder: Path, *options: str
) -> tuple[Any, str]:
    """What a script finds in a page (`page` is its document) of that width; and the log.

    The page lies in a frame: a window may not be as narrow as a phone.
    """
    around = folder / "around.html"
    around.write_text(
        f"<iframe src='{page.as_uri()}' style='width:{width}px; height:800px; border:0'></iframe>"
        "<p></p><script>document.querySelector('iframe').onload = async ({target}) => {"
        f"const page = target.contentDocument; const found = await (async () => {{{script}}})();"
        "document.querySelector('p').textContent = JSON.stringify(found); }</script>"
    )
    run = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--allow-file-access-from-files", "--enable-logging=stderr", "--virtual-time-budget=5000",
         f"--user-data-dir={folder / 'browser'}", "--window-size=1280,1000", "--dump-dom",
         *options, around.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search(r"<p>(.+?)</p>", run.stdout, flags=re.DOTALL)
    assert found, run.stderr
    return json.loads(html.unescape(found[1])), run.stderr


@in_a_browser
@pytest.mark.parametrize("width", [400, 1280])
def test_no_page_scrolls_sideways(page: str, pruned: Path, tmp_path: Path, width: int) -> None:
    (tmp_path / "hostile.html").write_text(render(hostile_page()), encoding="utf-8")
    for file in (pruned / "report.html", tmp_path / "hostile.html"):
        script = (
            "page.querySelectorAll('details').forEach(each => each.open = true);"
            "return [page.documentElement.scrollWidth, page.defaultView.innerWidth];"
        )
        (wide, room), log = seen_by_browser(file, width, script, tmp_path)
        assert room == width
        assert wide <= room
        assert "Content Security Policy" not in log, log


@in_a_browser
def test_a_click_on_a_heading_sorts(tmp_path: Path) -> None:
    rows = [["a", "9.5 kB", "10"], ["b", "1.2 MB", "9"], ["c", "800 bytes", ""], ["d", "11", "-2"]]
    table = Table("t", ("name", "size", "n"), rows)
    page = Page("t", "vlp t", "t", sections=[Section("t", tables=[table])])
    (tmp_path / "t.html").write_text(render(page), encoding="utf-8")
    script = (
        "const body = page.querySelector('tbody');"
        "const names = () => [...body.rows].map(row => row.cells[0].textContent).join('');"
        "const buttons = page.querySelectorAll('th button'); const found = [];"
        "for (const place of [1, 1, 2, 0, 0]) { buttons[place].click(); found.push(names()); }"
        "return [found, page.querySelectorAll('th')[0].ariaSort];"
    )
    found, _ = seen_by_browser(tmp_path / "t.html", 800, script, tmp_path)
    assert found == [["bacd", "dcab", "abdc", "abcd", "dcba"], "descending"]


@in_a_browser
def test_a_command_can_be_copied(page: str, pruned: Path, tmp_path: Path) -> None:
    script = (
        "const command = page.querySelectorAll('.command'); const last = command[command.length-1];"
        "let copied; Object.defineProperty(page.defaultView.navigator, 'clipboard',"
        "{value: {writeText: async text => { copied = text; }}});"
        "last.querySelector('button').click(); return copied;"
    )
    found, _ = seen_by_browser(pruned / "report.html", 800, script, tmp_path)
    assert found == html.unescape(re.findall(r"<pre>(.*?)</pre>", page)[-1])


@in_a_browser
@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_texts_stand_out_from_their_ground(tmp_path: Path, scheme: int) -> None:
    heat = HeatMap("t", "t", ["a"] * 21, [("0", [n / 20 for n in range(21)])])
    steps = [Step("t", "vlp t")]
    table = Table("t", ("a", "b", "c"), [["1", "2", "3"]] * 3)
    chart = line_chart("t", {f"{n}": [(0.0, float(n)), (1.0, 2.0 * n)] for n in range(7)})
    section = Section("t", "note", [chart], [heat], [table])
    page = Page("t", "vlp t", "t", [Tile("t", "t", "t")], ["t"], ["t"], steps, [section])
    (tmp_path / "t.html").write_text(render(page), encoding="utf-8")
    # A canvas turns every notation of a colour into red, green and blue.
    script = """
    const canvas = page.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const light = (colour) => {
      canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
      const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((c) => c / 255)
        .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const style = (each) => page.defaultView.getComputedStyle(each);
    const ground = (each) => {
      for (; each; each = each.parentElement)
        if (style(each).backgroundColor !== "rgba(0, 0, 0, 0)") return style(each).backgroundColor;
    };
    const found = [light(ground(page.body))];
    for (const each of page.querySelectorAll("p, dt, dd, th, td, pre, button, svg text, .mark")) {
      const drawn = each.matches("svg *") ? style(each).fill : style(each).color;
      const [low, high] = [light(drawn), light(ground(each))].sort((a, b) => a - b);
      const contrast = (high + 0.05) / (low + 0.05);
      found.push([each.tagName + "." + each.className, contrast]);
    }
    return found;
    """
    option = f"--blink-settings=preferredColorScheme={scheme}"
    (ground, *found), _ = seen_by_browser(tmp_path / "t.html", 1000, script, tmp_path, option)
    assert (ground < 0.1) == (scheme == 0)
    assert len(found) > 60
    assert [each for each in found if each[1] < 4.5] == []


# Charts


def places(chart: Chart, number: int = 0) -> Sequence[tuple[float, float]]:
    return [(mark.x, mark.y) for mark in chart.lines[number].marks]


def test_a_chart_puts_values_in_proportion() -> None:
    chart = line_chart("", {"a": [(1.0, 3.0), (0.0, 1.0), (0.5, 2.0, 0.5)]})
    (x0, y0), (x1, y1), (x2, y2) = places(chart)
    assert chart.left < x0 < x1 < x2 < chart.right
    assert chart.bottom > y0 > y1 > y2 > chart.top
    assert (x1 - x0, y0 - y1) == pytest.approx((x2 - x1, y1 - y2), abs=0.11)
    mark = chart.lines[0].marks[1]
    assert mark.low - y1 == pytest.approx(y1 - mark.high, abs=0.11)
    assert mark.low - y1 == pytest.approx((y0 - y1) / 2, abs=0.11)
    assert mark.text == "a: 2 ± 0.5 at 50%"
    texts = [text for _, text in chart.across]
    assert texts == ["0%", "20%", "40%", "60%", "80%", "100%"]


def test_a_logarithmic_axis_and_what_has_no_place_on_it() -> None:
    points = [(0.1, 1.0, 2.0), (0.2, 10.0), (0.3, 100.0), (0.4, float("inf")), (0.5, float("nan"))]
    chart = line_chart("", {"a": points}, y=Axis(log=True))
    ys = [y for _, y in places(chart)]
    assert len(ys) == 3
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.11)
    assert chart.lines[0].marks[0].low == chart.bottom
    assert [text for _, text in chart.up] == ["1", "10", "100"]


def test_lines_are_told_apart_without_colour() -> None:
    series = {f"method {n}": [(0.5, float(n)), (0.9, float(n))] for n in range(28)}
    chart = line_chart("", series)
    assert len({(line.shape, line.dashes) for line in chart.lines}) == 28
    assert len({(line.shape, line.colour) for line in chart.lines}) == 28


@pytest.mark.parametrize("values", [[], [5.0], [0.0, 0.0], [1e-9, 2e-9], [1e12, 3e12]])
def test_a_chart_of_few_or_extreme_values_is_drawn(values: list[float]) -> None:
    chart = line_chart("t", {"a": [(float(n), v) for n, v in enumerate(values)]}, x=Axis())
    page = Page("t", "vlp t", "t", sections=[Section("t", charts=[chart])])
    assert 'role="img"' in render(page)
    assert "nan" not in str(places(chart))
    assert 2 <= len(chart.up) <= 8


@pytest.mark.parametrize("error", [float("nan"), float("inf")])
def test_an_error_that_is_unknown_is_not_drawn(error: float) -> None:
    """That of a single sample, for instance."""
    chart = line_chart("t", {"a": [(0.5, 1.0, error), (0.75, 2.0, 0.5)]})
    unknown, known = chart.lines[0].marks
    assert (unknown.low, unknown.high) == (None, None)
    assert "±" not in unknown.text
    assert known.low is not None
