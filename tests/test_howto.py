"""The how-to pages: each is a complete plug-in that is installed, found and prunes a toy model."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from vlp_plugins.models import discovery

PAGES = sorted((Path(__file__).parents[1] / "docs" / "howto").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_plug_in_of_a_page_prunes(page: Path, tmp_path, monkeypatch) -> None:
    blocks = re.findall(r"```(\w+)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    (plug_in, use), (announced,) = (
        [code for language, code in blocks if language == wanted] for wanted in ("python", "toml")
    )
    module = re.match(r"# (\w+)\.py\n", plug_in)[1]
    (tmp_path / f"{module}.py").write_text(plug_in)
    _announce(tmp_path, tomllib.loads(announced)["project"]["entry-points"]["vlp_plugins"])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(discovery, "_registry", None)
    importlib.invalidate_caches()

    torch.manual_seed(0)
    names: dict = {}
    try:
        exec(use, names)
        (report,) = [each for each in discovery.registry().plugins() if each.name == module]
        assert not report.notes, report
        assert report.registered
    finally:
        sys.modules.pop(module, None)

    masks = names["masks"]
    assert masks.removed == int(0.5 * (masks.kept + masks.removed))
    assert masks.verify(names["model"], adapter=names.get("adapter")) == []


def test_there_is_a_page_for_everything_that_can_be_added() -> None:
    assert [page.stem for page in PAGES] == [
        "adapter", "allocation", "host", "method", "score", "solver", "statistic", "tokens",
    ]  # fmt: skip


def _announce(folder: Path, entry_points: dict[str, str]) -> None:
    """The metadata that pip leaves of an installed distribution."""
    info = folder / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    lines = [f"{name} = {module}" for name, module in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[vlp_plugins]", *lines, ""]))
