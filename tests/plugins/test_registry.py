"""Registries: clashes, typing mistakes, parents, and third parties through an entry point."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from kdgraft import LOSSES, REGIONS, SCHEDULES, TERMS, DistillError, Registry
from kdgraft.cli import main
from kdgraft.errors import nearest
from kdgraft.listing import arguments_of, explained
from support.forking import python


class Widget:
    """A widget.

    More about it.
    """

    def __init__(self, size: int, *, colour: str = "red") -> None:
        self.size, self.colour = size, colour


class Gadget(Widget):
    def __init__(self, **settings: object) -> None:
        self.settings = settings


def registry(parent: Registry | None = None) -> Registry:
    made = Registry("widget", "kdgraft.no_such_group", parent)
    made.register(Widget)
    return made


def test_decorator_gives_the_target_back():
    made = Registry("widget", "kdgraft.no_such_group")
    assert made.register(Widget) is Widget
    assert made.register("small")(Gadget) is Gadget
    assert list(made) == ["Widget", "small"]
    assert made.get("small") is Gadget
    assert "Gadget" not in made


def test_a_clash_is_an_error_and_changes_nothing():
    made = registry()
    with pytest.raises(
        DistillError, match=r"widget 'Widget' is registered by .* already; register .*Gadget under another"
    ):
        made.register("Widget")(Gadget)
    assert made.get("Widget") is Widget
    made.register(Widget)  # the same one again, as on a reload of nothing, is no clash


def test_unknown_names_and_suggestions():
    with pytest.raises(DistillError, match="no widget is called 'Widgit'; did you mean 'Widget'"):
        registry().get("Widgit")
    with pytest.raises(DistillError, match="no widget is called 'xyz'; known: 'Widget'"):
        registry().build("xyz")
    with pytest.raises(DistillError, match="no term is called 'FeatureImitatoin'; did you mean 'FeatureImitation'"):
        TERMS.get("FeatureImitatoin")


def test_build():
    made = registry()
    assert made.build(dict(type="Widget", size=3)).size == 3
    assert made.build(dict(type=Widget, size=3)).colour == "red"
    assert made.build("Widget", size=4).size == 4
    assert made.build(dict(type="Widget", size=3), size=4, colour="blue").size == 3
    ready = Widget(1)
    assert made.build(ready) is ready


def test_build_leaves_the_config_alone():
    spec = dict(type="Widget", size=3)
    registry().build(spec)
    assert spec == dict(type="Widget", size=3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dict(type="Widget", size=1, color="red"), "widget Widget takes no argument 'color'; did you mean 'colour'"),
        (dict(type="Widget"), "widget Widget: missing a required argument: 'size'"),
        (dict(size=1), "a widget needs a 'type', one of Widget; got {'size': 1}"),
    ],
)
def test_wrong_arguments(spec: dict, message: str):
    with pytest.raises(DistillError) as error:
        registry().build(spec)
    assert message in str(error.value)


def test_a_target_that_takes_anything():
    made = registry()
    made.register(Gadget)
    assert made.build(dict(type="Gadget", anything=1)).settings == {"anything": 1}


def test_an_error_inside_the_constructor_is_not_hidden():
    made = registry()

    @made.register
    class Broken:
        def __init__(self) -> None:
            raise TypeError("inside")

    with pytest.raises(TypeError, match="inside"):
        made.build("Broken")


def test_parent():
    parent = registry()
    child = Registry("widget", "kdgraft.no_such_group", parent)
    assert child.get("Widget") is Widget
    assert "Widget" in child
    child.register("Widget")(Gadget)  # a task may give its own meaning to a name
    assert child.get("Widget") is Gadget
    assert parent.get("Widget") is Widget
    assert list(child) == ["Widget"]
    with pytest.raises(DistillError, match="did you mean 'Widget'"):
        child.get("Widge")


def test_describe():
    assert registry().describe() == {"Widget": "A widget."}
    for each in (TERMS, LOSSES, REGIONS, SCHEDULES):
        assert all(each.describe().values())


def test_what_the_core_registers():
    assert {"FeatureImitation", "Hint", "SoftTargets", "LogitMatching"} <= set(TERMS)
    assert {"soft_targets", "logit_matching", "hint", "cosine"} <= set(LOSSES)
    assert {"all", "foreground"} <= set(REGIONS)


def test_nearest():
    assert nearest("bakbone", ["backbone", "neck"]) == "; did you mean 'backbone'?"
    assert nearest("layer3", ["backbone.layer3", "neck"]) == "; did you mean 'backbone.layer3'?"
    assert nearest("xyz", ["a", "b"]) == "; known: 'a', 'b'"
    assert nearest("xyz", [f"n{i}" for i in range(20)]).endswith("'n11', …")
    assert nearest("xyz", []) == ""


# --- entry points

MODULE = """
from kdgraft import TERMS, FeatureImitation

@TERMS.register
class TheirTerm(FeatureImitation):
    "Their term."

class Other(FeatureImitation):
    "Another."
"""


@pytest.fixture
def distribution(tmp_path: Path) -> Path:
    (tmp_path / "their_distillation.py").write_text(MODULE)
    info = tmp_path / "their_distillation-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-distillation\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[kdgraft.terms]\nTheirTerm = their_distillation:TheirTerm\n"
        "[widgets.good]\nlarge = decimal:Decimal\n"
        "[widgets.clash]\nWidget = decimal:Decimal\nlate = decimal:Context\n"
        "[widgets.broken]\nlost = their_distillation:Lost\ngone = no_such_module_anywhere:Gone\nlarge = decimal:Decimal\n"
    )
    return tmp_path


def test_an_entry_point_is_found_without_an_import(distribution: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(distribution)
    made = Registry("widget", "widgets.good")
    made.register(Widget)
    assert list(made) == ["Widget", "large"]
    assert str(made.build("large")) == "0"


def test_an_entry_point_that_clashes_is_an_error_each_time(distribution: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(distribution)
    made = Registry("widget", "widgets.clash")
    made.register(Widget)
    for _ in range(2):
        with pytest.raises(DistillError, match=r"widget 'Widget' is registered by .* already"):
            made.get("Widget")


def test_a_broken_entry_point_takes_nothing_else_down(distribution: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(distribution)
    made = Registry("widget", "widgets.broken")
    made.register(Widget)
    child = Registry("widget", "kdgraft.no_such_group", made)
    for each in (made, child):
        assert each.get("Widget") is Widget
        assert str(each.build("large")) == "0"
        for _ in range(2):
            with pytest.raises(DistillError) as error:
                each.build("gone")
            assert str(error.value) == (
                "widget 'gone' of an installed package cannot be loaded: ModuleNotFoundError: "
                "No module named 'no_such_module_anywhere'"
            )
        described = each.describe()
        assert described["Widget"] == "A widget."
        assert described["lost"].startswith("widget 'lost' of an installed package cannot be loaded: AttributeError: ")
        assert "\n" not in described["lost"]


def test_list_shows_the_rest_beside_a_broken_entry_point(tmp_path: Path):
    info = tmp_path / "broken_distillation-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-distillation\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kdgraft.losses]\ntheirs = no_such_module_anywhere:theirs\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import kdgraft.hosts\nfrom kdgraft.cli import main\n"
        "kdgraft.hosts.find_spec = lambda name: None  # without the hosts: their import takes long\n"
        "sys.exit(main(['list']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ")}
    assert "cannot be loaded: ModuleNotFoundError" in lines["theirs"]
    assert "squared or absolute feature error" in lines["hint"]
    assert "Traceback" not in done.stdout + done.stderr


HOME = '''
from kdgraft.registry import Registry

GADGETS = Registry("gadget", "gadgets.theirs", home="their_home:GADGETS")

@GADGETS.register
class Lamp:
    "A lamp."

@GADGETS.register("lamp_of")
def make(size: int = 3):
    """A lamp of a size.

    More.
    """
'''


def test_names_are_read_and_imported_alike(tmp_path: Path):
    """What a package registers is read from its source; entry points beside it, one of which clashes."""
    (tmp_path / "their_home").mkdir()
    (tmp_path / "their_home" / "__init__.py").write_text("from .all import *\n__all__ = ['GADGETS']\n")
    (tmp_path / "their_home" / "all.py").write_text(HOME)
    info = tmp_path / "their_home-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-home\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gadgets.theirs]\nmore = decimal:Decimal\nLamp = decimal:Context\n")
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from kdgraft.registry import Registry
read = Registry("gadget", "gadgets.theirs", home="their_home:GADGETS").describe()
assert "their_home" not in sys.modules
from their_home import GADGETS
assert list(GADGETS) == ["Lamp", "lamp_of", "more"]
told = {{name: line.replace("their_home.all", "their_home") for name, line in GADGETS.describe().items()}}
print(told == read, *read.items(), sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    same, lamp, lamp_of, more = done.stdout.splitlines() or [done.stderr] * 4
    assert lamp.startswith(
        "('Lamp', \"gadget 'Lamp' of an installed package cannot be loaded: DistillError: gadget 'Lamp' is"
    )
    assert lamp_of == "('lamp_of', 'A lamp of a size.')"
    assert more.startswith("('more', ")
    assert same == "True"


NAMES = """
import sys
from kdgraft.cli import _groups
read = {title: registry.describe() for title, registry in _groups()[0]}
heavy = {"torch", "mmengine", "mmdet", "mmseg", "transformers"} & set(sys.modules)
assert not heavy, heavy
for title, names in read.items():
    print(title, len(names))
"""
REGISTERED = """
for title, registry in _groups()[0]:
    registered = {name: registry.get(name).__doc__.strip().splitlines()[0] for name in registry}
    assert registered == read[title], (title, registered, read[title])
"""


@pytest.mark.skipif(
    any(find_spec(host) is None for host in ("mmdet", "mmseg", "transformers")), reason="needs all hosts"
)
@pytest.mark.parametrize(
    "more", ["", pytest.param(REGISTERED, id="and says what importing registers", marks=pytest.mark.slow)]
)
def test_list_imports_nothing(more: str):
    done = subprocess.run(
        [sys.executable, "-c", NAMES + more], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    counts = {title: int(count) for title, _, count in (line.rpartition(" ") for line in done.stdout.splitlines()[:13])}
    assert set(counts) == {"losses", "regions", "schedules", "sources", "nlp sources"} | {
        f"{host} {kind}" for host in ("det", "seg", "nlp", "torch") for kind in ("terms", "recipes")
    }
    assert counts["losses"] > 5 and counts["torch terms"] > 10 and counts["det terms"] > 2 and counts["nlp recipes"] > 5


def test_list_explains_one_name(capsys: pytest.CaptureFixture[str]):
    """A term with its paper, its arguments and defaults, those of its bases among them."""
    assert main(["list", "LogitMatching"]) == 0
    said = capsys.readouterr().out
    assert re.match(r"LogitMatching \(.*torch terms\)\n\nSquared error on the logits", said)
    assert "arXiv 1312.6184" in said
    assert any(
        line.startswith('    weight = 1.0    factor on the loss, >= 0; ``"auto"``, or ') for line in said.splitlines()
    )
    assert "    source = 'teacher'    the name of the source that the student imitates." in said.splitlines()
    for name, part in (
        ("hint", "norm = "),
        ("foreground", "a total weight of 1"),
        ("WarmUp", "    end"),
        ("Itself", "momentum = "),
    ):
        assert main(["list", name]) == 0
        assert part in capsys.readouterr().out
    assert main(["list", "Hitn"]) == 2
    assert "no term, recipe or other part is called 'Hitn'; did you mean 'Hint'" in capsys.readouterr().err


def test_arguments_that_a_class_settles_are_none_of_its_own():
    class Base:
        """A base.

        Args:
            size, depth: of it.
            colour: of its paint,
                in two lines.
        """

        def __init__(self, *, size: int = 2, depth: int = 1, colour: str = "red") -> None: ...

    class Settled(Base):
        """Something.

        Args:
            colour: see :class:`Base`.
            length: how long.

        Returns:
            nothing.
        """

        def __init__(self, length: float, **settings: object) -> None:
            super().__init__(size=3, **settings)

    assert arguments_of(Settled) == {"length": "", "depth": " = 1", "colour": " = 'red'"}
    assert explained(Settled) == (
        "Something.\n\nArguments:\n    length    how long.\n    depth = 1    of it.\n"
        "    colour = 'red'    of its paint, in two lines."
    )


def test_what_is_listed_of_a_term_on_class_scores():
    class Compared:
        """Something like :class:`~kdgraft.SoftTargets`.

        Args:
            where: what the host takes,
                in two lines.
        """

        def __init__(self, **where: object) -> None: ...

    assert explained(Compared) == (
        "Something like ``kdgraft.SoftTargets``.\n\nArguments:\n    …    what the host takes, in two lines."
    )


def test_a_third_party_s_term_in_a_distiller(distribution: Path):
    program = f"""
import sys
sys.path.insert(0, {str(distribution)!r})
import torch
from kdgraft import Distiller
assert "their_distillation" not in sys.modules
model = lambda: torch.nn.Sequential(torch.nn.Linear(3, 2))
distiller = Distiller(model(), model(), terms=[dict(type="TheirTerm", tap="0")], example=torch.ones(1, 3))
print(list(distiller.terms), type(distiller.terms["their_term"]).__module__)
"""
    done = python("-c", program)
    assert done.stdout.split("\n")[0] == "['their_term'] their_distillation", done.stderr


def test_an_argument_that_neither_a_class_nor_its_bases_take():
    registry = Registry("dish", "kdgraft.tests.nothing")

    class Base:
        def __init__(self, *, weight: float = 1.0, name: str = "base") -> None:
            self.weight, self.name = weight, name

    @registry.register
    class Handing(Base):
        def __init__(self, size: int = 3, **settings: object) -> None:
            super().__init__(**settings)

    @registry.register
    class Wrong(Base):
        def __init__(self, **settings: object) -> None:
            super().__init__(wieght=settings["weight"])

    assert registry.build(dict(type="Handing", size=1, weight=2.0)).weight == 2.0
    with pytest.raises(DistillError, match=r"^dish Handing takes no argument 'wieght'; did you mean 'weight'\?$"):
        registry.build(dict(type="Handing", wieght=2.0))
    with pytest.raises(DistillError, match="did you mean 'size'"):
        registry.build(dict(type="Handing", siz=2))

    @registry.register
    class Settling(Base):
        def __init__(self, **settings: object) -> None:
            super().__init__(weight=2.0, **settings)

    with pytest.raises(DistillError, match=r"^dish Settling takes no argument 'weight'; known: 'name'$"):
        registry.build(dict(type="Settling", weight=1.0))
    # A mistake inside the class is not the user's: its own error stays.
    with pytest.raises(TypeError, match="wieght"):
        registry.build(dict(type="Wrong", weight=2.0))
