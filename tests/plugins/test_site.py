"""The documentation's site: it builds, every link leads somewhere, every public name is in it, and it needs no network."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from support.pages import PAGES, ROOT

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site; a page that is in no menu and a link or heading that is not there are errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return folder


def test_every_page_is_in_it_with_its_pictures(site: Path):
    for page in PAGES:
        made = page.relative_to(ROOT).with_suffix(".html")
        path = site / (made.with_name("index.html") if made.stem == "README" else made)
        assert path.is_file(), path
        for picture in re.findall(r'<img[^>]* src="([^"]+)"', path.read_text(encoding="utf-8")):
            assert (path.parent / picture).is_file(), picture


def test_the_reference_has_every_public_name(site: Path):
    aliases = {"TERMS", "RECIPES", "READER"}  # of a host's package, for what has another name or place in the reference
    for package, path in runpy.run_path(str(ROOT / "docs" / "hooks.py"))["PACKAGES"].items():
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        (names,) = (
            ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and "__all__" in ast.unparse(n)
        )
        page = (site / "reference" / f"{package}.html").read_text(encoding="utf-8")
        anchors = {found.rpartition(".")[2] for found in re.findall(r' id="([\w.]+)"', page)}
        assert len(names) > 5
        assert set(names) - (set() if package == "kdgraft" else aliases) <= anchors


def test_it_needs_no_network(site: Path):
    loaded = r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=["']?((?:https?:)?//[^"'> ]+)"""
    for path in site.rglob("*.html"):
        assert re.findall(loaded, path.read_text(encoding="utf-8")) == [], path
    for path in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//", path.read_text(encoding="utf-8")) == [], path
