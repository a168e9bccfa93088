"""Configs of mm projects: found, read, and turned back into the plain student's."""

from __future__ import annotations

import inspect

import pytest
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS

from kdgraft.errors import DistillError, UnsafeCheckpoint
from kdgraft_mm.configs import (
    MissingConfig,
    executed_config,
    is_distilled,
    literal_config,
    load_config,
    model_of,
    plain_config,
    plain_model,
    student_config,
)
from kdgraft_mm.graft import Graft
from kdgraft_mm.sources import build_teacher

STUDENT = dict(type="Student", width=4, data_preprocessor=dict(type="Prepare"))
BESIDE = dict(
    type="DistilledDetector",
    student="Student",
    width=4,
    data_preprocessor=dict(type="Prepare"),
    teacher=dict(config="teacher.py", checkpoint="teacher.pth"),
    teachers=dict(a=dict(config="a.py", checkpoint="a.pth"), peer=dict(type="Peer", config="b.py")),
    terms=[dict(type="SoftTargets")],
    recipe="ld",
    inherit=["bbox_head"],
    dry_run_size=64,
)
WHOLE = {key: value for key, value in BESIDE.items() if key not in ("width", "data_preprocessor")} | {
    "student": STUDENT
}


def test_a_config_is_a_path_a_dict_a_model_or_a_config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("model = dict(type='Student', width=4)\n")
    for source in (path, str(path), dict(model=dict(type="Student", width=4)), dict(type="Student", width=4)):
        assert load_config(source).model == dict(type="Student", width=4)
    config = Config(dict(model=STUDENT))
    assert load_config(config) is config


@pytest.mark.parametrize("source", ["absent.py", "nosuchpackage::gfl.py", "mmengine::absent/absent.py"])
def test_a_missing_config_names_itself(source):
    with pytest.raises(MissingConfig, match="config not found") as caught:
        load_config(source)
    assert source in str(caught.value)


def test_the_top_level_preprocessor_goes_into_the_model_where_it_has_none():
    assert model_of(Config(dict(model=dict(type="A"), data_preprocessor=dict(type="P")))) == dict(
        type="A", data_preprocessor=dict(type="P")
    )
    kept = model_of(
        Config(dict(model=dict(type="A", data_preprocessor=dict(type="Own")), data_preprocessor=dict(type="P")))
    )
    assert kept.data_preprocessor.type == "Own"
    with pytest.raises(DistillError, match="no 'model'"):
        model_of(Config(dict(lr=1)))


@pytest.mark.parametrize("model", [BESIDE, WHOLE])
def test_a_distilled_model_is_its_plain_student(model):
    assert set(inspect.signature(Graft.build).parameters) - {"model"} < set(model)
    assert is_distilled(model) and not is_distilled(STUDENT)
    assert plain_model(ConfigDict(model)) == STUDENT
    plain = ConfigDict(STUDENT)
    assert plain_model(plain) is plain


def test_a_model_that_is_no_model_is_refused():
    for model in (5, "GFL", ["GFL"], None):
        with pytest.raises(DistillError, match="has no 'model' with a type and its settings"):
            model_of(load_config({"model": model}))
        teacher = dict(config={"model": model}, checkpoint="teacher.pth")
        with pytest.raises(DistillError, match="has no 'model' with a type and its settings"):
            build_teacher(teacher, MODELS)


def test_whether_a_teacher_is_trusted_is_true_or_false():
    with pytest.raises(DistillError, match="teacher: trusted must be true or false, got 'false'"):
        build_teacher(dict(config=dict(type="A"), checkpoint="teacher.pth", trusted="false"), MODELS)


def test_a_whole_student_takes_a_preprocessor_from_beside_and_nothing_else():
    bare = dict(type="Student", width=4)
    assert student_config(bare, dict(data_preprocessor=dict(type="Prepare"))) == STUDENT
    assert student_config(STUDENT, dict(data_preprocessor=dict(type="Other"))) == STUDENT
    with pytest.raises(DistillError, match="'width' must go into it"):
        student_config(bare, dict(width=8))


@pytest.mark.parametrize(
    ("imports", "left"),
    [
        (dict(imports=["kdgraft_det"]), None),
        (dict(imports="kdgraft_det", allow_failed_imports=False), None),
        (dict(imports=["mine", "kdgraft_det"], allow_failed_imports=False), ["mine"]),
        (None, None),
    ],
)
def test_the_plain_config_imports_nothing_of_ours(imports, left):
    config = Config(dict(model=BESIDE, lr=0.1, **(dict(custom_imports=imports) if imports else {})))
    before = config.to_dict()
    plain = plain_config(config)
    assert plain.model == STUDENT and plain.lr == 0.1
    assert plain.get("custom_imports", {}).get("imports") == left
    assert config.to_dict() == before
    assert "kdgraft" not in plain.pretty_text


# --- one rule for what is distilled


class DistilledDetector:
    """Stands for the class that a pure-Python config names."""


NAMES = ["DistilledDetector", "mmdet.DistilledDetector", "kdgraft_det.detector.DistilledDetector", DistilledDetector]


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("model", [BESIDE, WHOLE])
def test_a_distilled_model_is_known_however_its_type_is_named(kind, model):
    named = {**model, "type": kind}
    assert is_distilled(named) and plain_model(ConfigDict(named)) == STUDENT
    assert model_of(Config(dict(model=named))) == STUDENT  # as the next teacher
    assert plain_config(Config(dict(model=named))).model == STUDENT


@pytest.mark.parametrize("kind", ["mmdet.GFL", "mmdet.models.detectors.gfl.GFL", "Undistilled", Config])
def test_other_models_are_plain(kind):
    assert not is_distilled(dict(type=kind, student="x"))
    assert not is_distilled(dict(type="DistilledDetector"))


def test_a_module_of_a_plugin_is_no_import_of_the_plain_config():
    imports = dict(imports=["kdgraft_det.detector", "kdgraft_detectors_of_mine"])
    plain = plain_config(Config(dict(model=BESIDE, custom_imports=imports)))
    assert plain.custom_imports.imports == ["kdgraft_detectors_of_mine"]


# --- configs that travel as text


def test_a_text_of_mmengines_is_read_as_it_was_written():
    entries = dict(
        model={
            **BESIDE,
            "ratio": -0.5,
            "size": (1, -2),
            "nothing": None,
            "flag": True,
            "many": [(1,), []],
        },
        paramwise_cfg=dict(custom_keys={"backbone.layer": dict(lr_mult=0.1), "plain": dict()}),
        listed=[{"a.b": 1}, dict(x='it\'s "so"\nand so')],
        lr=1e-4,
        numbers={0: "a", 1: "b"},
    )
    config = Config(entries)
    found = literal_config(config.pretty_text, "here")
    assert found.to_dict() == Config(entries).to_dict()


def test_a_class_in_a_text_of_mmengines_is_read_as_its_path():
    try:
        text = Config(dict(model=dict(type=Config))).pretty_text
    except SyntaxError:
        pytest.skip("upstream mmengine cannot write a config that holds a class")
    assert literal_config(text, "here").to_dict() == dict(model=dict(type="mmengine.config.config.Config"))


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').mkdir({trace!r})\nmodel = dict(type='A')",
        "model = dict(type='A', x=__import__('os').mkdir({trace!r}))",
        "model = dict(type=__import__('os').mkdir({trace!r}).A)",
        "x = [__import__('os').mkdir({trace!r}) for _ in range(1)]\nmodel = dict(type='A')",
        "x = dict(**dict(a=__import__('os').mkdir({trace!r})))",
        "import os\nos.mkdir({trace!r})",
        "if True:\n    __import__('os').mkdir({trace!r})",
        "model = dict(type=f'''{{__import__(\"os\").mkdir({trace!r})}}''')",
        "dict = __import__('os').mkdir\nx = dict({trace!r})",
        "a, b = 1, 2",
        "a.b = 1",
    ],
)
def test_a_text_with_more_than_literals_is_refused_and_runs_nothing(tmp_path, text):
    trace = tmp_path / "trace"
    with pytest.raises(UnsafeCheckpoint, match=r"config in a\.pth holds more than literals.*line 1: .*--trusted"):
        literal_config(text.format(trace=str(trace)), "a.pth")
    assert not trace.exists()


def test_a_text_imports_nothing():
    found = literal_config(
        "custom_imports = dict(imports=['a_module_that_is_not_there'])\nmodel = dict(type='A')", "here"
    )
    assert found.custom_imports.imports == ["a_module_that_is_not_there"]


@pytest.mark.parametrize(
    ("text", "said"), [("model = dict(", "never closed"), ("filename = 'a'", "filename"), ("\0", "null")]
)
def test_a_text_that_is_no_config_is_one_line(text, said):
    with pytest.raises(DistillError, match=f"the config in here cannot be read: .*{said}"):
        literal_config(text, "here")
    with pytest.raises(DistillError, match="the config in here cannot be read"):
        executed_config(text, "here")
