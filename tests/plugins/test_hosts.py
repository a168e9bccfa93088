"""Hosts: found by entry point, picked by config, none known by name; of those that are not here, what to install."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import kdgraft.cli
import kdgraft.hosts
from kdgraft import DistillError
from kdgraft.hosts import COMMANDS, Host, MissingHost, host_named, host_of, host_of_checkpoint, hosts, require

PROJECT = (Path(__file__).parents[2] / "pyproject.toml").read_text()


@pytest.mark.parametrize("host", COMMANDS)
def test_what_to_install_for_a_missing_host(host: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kdgraft.hosts, "find_spec", lambda name: None)
    with pytest.raises(MissingHost) as error:
        require(host, "the plugin")
    message = str(error.value)
    assert message.startswith(f"the plugin needs {host}, which is not installed")
    assert "\n" not in message
    # An extra is one of this project's; all else is the host's own stack.
    for package, extra in re.findall(r"([\w.-]+)\[(\w+)\]", message):
        assert package == "kdgraft"
        assert 'name = "kdgraft"' in PROJECT.splitlines()
        assert re.search(rf"^{extra} = \[", PROJECT, re.MULTILINE)
    if host == "transformers":
        assert 'pip install "kdgraft[nlp]"' in message
    else:
        assert f"onedl-{dict(mmseg='mmsegmentation').get(host, 'mmdetection')}==" in message
    assert "taskdistill" not in message


def test_the_hosts_of_this_distribution_are_found_by_entry_point():
    declared = re.findall(r'^(\w+) = "kdgraft_hosts:(\w+)"$', PROJECT, re.MULTILINE)
    assert len(declared) == 4
    for name, attribute in declared:
        assert name == attribute.lower()
        assert isinstance(hosts()[name], Host) and hosts()[name].name == name and host_named(name) is hosts()[name]
    with pytest.raises(DistillError, match=r"no host is called 'dte'.*det"):
        host_named("dte")


THEIRS = """
from types import SimpleNamespace

from kdgraft.hosts import Host
from kdgraft.registry import Registry

TERMS, RECIPES = Registry("term", "their.terms"), Registry("recipe", "their.recipes")


class Trainer:
    def reads(self, config):
        return config.startswith("our")

    def train(self, config, options, work_dir, resume, amp, seed, *, timeout, trusted, partial):
        print("trains", config, options, seed)

    def export(self, checkpoint, out, **told):
        print("exports", checkpoint)
        return out, out


def main(pairs, device, out):
    print("measures", pairs, device, out)


TRAINER = Trainer()
HOST = Host(
    "theirs", package="their_host", framework="json", trainer="their_host:TRAINER", suffixes=(".theirs",),
    checkpoints=(".ckpt",), costs="their_host",
)
"""


@pytest.fixture
def command(tmp_path: Path):
    """Runs ``kdgraft`` where another distribution has one host and two that cannot be used."""
    (tmp_path / "their_host.py").write_text(THEIRS)
    info = tmp_path / "their_host-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-host\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[kdgraft.hosts]\ntheirs = their_host:HOST\ngone = no_such_module_anywhere:HOST\nodd = decimal:Decimal\n"
    )
    program = (
        "import sys, kdgraft.hosts\nfrom kdgraft.cli import main\nfind = kdgraft.hosts.find_spec\n"
        "known = ('mmdet', 'mmseg', 'transformers')  # their import takes long\n"
        "kdgraft.hosts.find_spec = lambda name: None if name in known else find(name)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    paths = os.pathsep.join((str(tmp_path), *(p for p in sys.path if p)))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    return run


def test_broken_hosts_of_third_parties_take_nothing_down(command):
    done = command("list")
    assert done.returncode == 0, done.stderr
    title = next(line for line in done.stdout.splitlines() if line.startswith("terms"))
    assert "theirs" in title and "torch" in title and "hint" in done.stdout
    assert "det: kdgraft_det needs mmdet, which is not installed" in done.stdout
    said = done.stderr.splitlines()
    assert len(said) == 2
    assert any("host gone cannot be used: ModuleNotFoundError" in line for line in said)
    assert any("host odd cannot be used: decimal:Decimal is no kdgraft.hosts.Host" in line for line in said)


def test_the_command_line_serves_a_third_party_s_host(command):
    trained = command("train", "our.theirs", "--seed", "3", "--cfg-options", "a=1")
    assert (trained.returncode, trained.stdout) == (0, "trains our.theirs ['a=1'] 3\n"), trained.stderr
    exported = command("export", "x.ckpt", "y")
    assert exported.returncode == 0 and exported.stdout.startswith("exports x.ckpt\n"), exported.stderr
    measured = command("bench", "theirs", "--costs", "--pairs", "2")
    assert (measured.returncode, measured.stdout) == (0, "measures 2 cpu runs/costs/theirs\n"), measured.stderr
    refused = command("train", "not_our.theirs")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("kdgraft: error: no host trains not_our.theirs; there are ")
    assert ".theirs (theirs)" in refused.stderr


@pytest.mark.skipif(find_spec("mmdet") is None or find_spec("mmseg") is None, reason="needs both hosts")
@pytest.mark.parametrize(
    ("config", "text", "name"),
    [
        ("a.py", "default_scope = 'mmdet'\nmodel = dict(type='GFL')", "det"),
        ("a.py", "default_scope = 'mmseg'\nmodel = dict(type='EncoderDecoder')", "seg"),
        ("a.py", "model = dict(type='DistilledSegmentor')", "seg"),
        ("a.py", "model = dict(type='DistilledDetector')", "det"),
        # A project on top of either has a scope of its own.
        ("a.py", "default_scope = 'mmrotate'\nmodel = dict(type='DistilledDetector')", "det"),
        ("a.py", "default_scope = 'theirs'\nmodel = dict(type='DistilledSegmentor')", "seg"),
        ("mmdet::gfl/gfl_r50_fpn_1x_coco.py", None, "det"),
        ("mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py", None, "seg"),
        ("a.py:task", "", "torch"),
    ],
)
def test_a_config_picks_its_host(config: str, text: str | None, name: str, tmp_path: Path):
    if text is not None:
        (tmp_path / "a.py").write_text(text)
        config = str(tmp_path / config)
    assert host_of(config).name == name


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs the host")
@pytest.mark.parametrize("suffix", ["yaml", "yml", "toml"])
def test_a_recipe_file_picks_transformers(suffix: str):
    assert host_of(f"recipe.{suffix}").name == "nlp"


def test_no_host_takes_what_none_knows():
    with pytest.raises(DistillError, match=r"no host trains a\.txt; there are .*\.py \(det\)"):
        host_of("a.txt")
    with pytest.raises(DistillError, match=r"no host exports a\.txt; there are .*\.pth \(det\)"):
        host_of_checkpoint("a.txt")


def test_a_host_that_is_not_here_says_what_to_install_where_none_that_is_takes_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kdgraft.hosts, "find_spec", lambda name: None if name != "torch" else True)
    with pytest.raises(MissingHost, match=r'kdgraft_nlp needs transformers, .*pip install "kdgraft\[nlp\]"'):
        host_of("recipe.yaml")
    with pytest.raises(MissingHost, match=r"kdgraft_det needs mmdet, .*onedl-mmdetection=="):
        host_of(str(tmp_path / "a.py"))
    with pytest.raises(MissingHost, match="onedl-mmdetection=="):
        host_of_checkpoint("a.pth")
    assert host_of(f"{tmp_path / 'a.py'}:task").name == "torch"


def test_the_command_line_knows_no_host_by_name():
    known = {*hosts(), *(host.framework for host in hosts().values()), *(host.package for host in hosts().values())}
    known -= {"kdgraft"}
    assert {"det", "seg", "nlp", "torch", "mmdet", "transformers", "kdgraft_nlp"} <= known
    tree = ast.parse(Path(kdgraft.cli.__file__).read_text(encoding="utf-8"))
    words = {
        word
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        for word in re.findall(r"\w+", str(node.value))
    }
    words |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert "recipes" in words and not words & known
