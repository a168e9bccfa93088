"""Benchmarks as they are written down: what is read, and what is refused in one line."""

from __future__ import annotations

import pytest

from kdgraft.errors import DistillError
from kdgraft_bench.spec import SHIPPED, read_benchmark, shipped_demos

WHOLE = """
host = "torch"
seeds = [3, 4]

[teacher]
model = "conv"
width = 8

[students.small]
model = "conv"
width = 2

[methods.kd]
terms = ["SoftTargets"]
"""


def written(tmp_path, text=WHOLE):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return str(path)


def test_a_benchmark_is_read(tmp_path):
    found = read_benchmark(written(tmp_path))
    assert found.name == "mine" and found.seeds == (3, 4) and str(found.out) == "runs/bench/mine"
    assert found.teacher.title == "conv, width 8"
    assert [name for name, _, _ in found.trained()] == ["teacher", "small-plain", "small-kd"]


def test_the_command_line_changes_it(tmp_path):
    found = read_benchmark(written(tmp_path), seeds=[7], data="somewhere/digits", iterations=5, processes=None)
    assert found.seeds == (7,) and found.iterations == 5 and found.processes == 1
    assert str(found.out) == "runs/bench/mine_digits"


def test_a_real_set_is_tested_on_its_validation_split(tmp_path):
    """It has no third one, and the table says so."""
    embedded, real = (read_benchmark(written(tmp_path), data=data) for data in (None, "somewhere/digits"))
    assert (embedded.split, embedded.measured) == ("test", "test") and (real.split, real.measured) == ("test", "val")


def test_some_methods_alone(tmp_path):
    text = WHOLE + '[methods.other]\nrecipe = "dkd"\n'
    assert list(read_benchmark(written(tmp_path, text), methods=["other"]).methods) == ["other"]
    with pytest.raises(DistillError, match=r"no method 'othr'; did you mean 'other'"):
        read_benchmark(written(tmp_path, text), methods=["othr"])


def test_a_config_is_found_beside_the_file(tmp_path):
    (tmp_path / "net.py").write_text("")
    text = WHOLE.replace('model = "conv"\nwidth = 2', 'config = "net.py:small"\noptions = { width = 2 }')
    found = read_benchmark(written(tmp_path, text)).students["small"]
    assert found.config == str(tmp_path / "net.py:small") and found.title == "small"


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.toml")))
def test_those_that_ship_are_read(name):
    found = read_benchmark(name)
    assert len(found.seeds) in (3, 5) and found.data is None


@pytest.mark.parametrize("name", ["core", "nlp", "seg", "det"])
def test_a_demo_is_a_part_of_its_benchmark(name):
    whole, demo = read_benchmark(name, methods=["all"]), read_benchmark(name, demo=True)
    assert demo.seeds == whole.seeds[:1] and name in shipped_demos()
    assert set(demo.methods) < set(whole.methods) and set(demo.students) <= set(whole.students)
    assert demo.teacher == whole.teacher and not demo.peers


def test_usual_methods_are_those_that_are_named_as_default(tmp_path):
    text = WHOLE + '[methods.other]\nrecipe = "dkd"\n'
    text = text.replace("seeds = [3, 4]", 'seeds = [3, 4]\ndefault_methods = ["other"]')
    assert list(read_benchmark(written(tmp_path, text)).methods) == ["other"]
    assert list(read_benchmark(written(tmp_path, text), methods=["all"]).methods) == ["kd", "other"]
    assert list(read_benchmark(written(tmp_path, text), methods=["kd"]).methods) == ["kd"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('host = "torch"', 'host = "tensorflow"', r"needs host = '…', one of .*torch"),
        ("seeds = [3, 4]", "seeds = [3, 3]", r"seeds must be a list of different whole numbers"),
        ("seeds = [3, 4]", "seeds = [-1]", r"seeds"),
        ("seeds = [3, 4]", "sead = 1", r"has no entry 'sead'; did you mean 'seeds'"),
        ("seeds = [3, 4]", 'device = "tpu"', r"device must be 'cpu' or 'cuda', got 'tpu'"),
        ("seeds = [3, 4]", "processes = 0", r"processes"),
        ("seeds = [3, 4]", "data = 3", r"data must be a text"),
        ("[methods.kd]", "[methods.plain]", r"teacher and plain are taken"),
        ("[methods.kd]", '[methods."a-b"]', r"must be letters, digits and '_'"),
        ('terms = ["SoftTargets"]', "width = 3", r"needs recipe = '…', terms"),
        ('terms = ["SoftTargets"]', 'terms = ["SoftTargets"]\nlr = 3', r"has no entry 'lr'"),
        ('model = "conv"\nwidth = 8', "width = 8", r"teacher needs either config = '…' or model"),
        ('[students.small]\nmodel = "conv"\nwidth = 2\n', "", r"needs a table \[students.NAME\]"),
    ],
)
def test_a_mistake_is_said_in_one_line(tmp_path, old, new, said):
    assert old in WHOLE
    with pytest.raises(DistillError, match=said) as caught:
        read_benchmark(written(tmp_path, WHOLE.replace(old, new)))
    assert "\n" not in str(caught.value)


def test_an_unknown_name_is_said_with_those_that_ship():
    with pytest.raises(DistillError, match=r"no benchmark is called 'dett'; did you mean 'det'"):
        read_benchmark("dett")
