"""Mistakes in a config: one clear line when the model is built; and the command line on segmentation configs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmseg.registry import MODELS

from kdgraft.cli import main
from kdgraft.errors import DistillError
from support.commands import refused
from support.mm import cannot_be_built
from support.seg import CLASSES, EVERY_TERM, TERM_NAMES, build, config, distilled, save_teacher, segmentor

ABSENT = dict(config=segmentor("PSPNet", width=8), checkpoint="absent.pth")
SOFT = [dict(type="SoftTargets")]


@pytest.mark.parametrize(
    ("term", "parts"),
    [
        pytest.param(
            dict(type="FeatureImitation", tap="backbone.layer9"),
            ("student has no module 'backbone.layer9'", "did you mean", "'backbone.layer"),
            id="unknown tap",
        ),
        pytest.param(
            dict(type="FeatureImitation", student_tap="backbone[3]", teacher_tap="bakbone[3]"),
            ("the teacher has no module 'bakbone'", "'backbone'"),
            id="unknown teacher tap",
        ),
        pytest.param(
            dict(type="PairwiseAffinity", tap="backbone[9]"), ("no [9] in 4 entries",), id="index out of range"
        ),
        pytest.param(
            dict(type="ClassPrototypes", tap="decode_head.cls_segs():input"),
            ("has no method 'cls_segs'", "'cls_seg'"),
            id="unknown method",
        ),
        pytest.param(
            dict(type="FeatureImitation", tap="backbone[3]", adapter="none"),
            ("adapter 'none' needs equal channels", "(1, 32, 16, 16)", "(1, 64, 16, 16)"),
            id="channels differ without adapter",
        ),
        pytest.param(
            dict(type="SoftTargets", tap="backbone[3]"),
            ("scores 32 classes, the teacher's backbone[3] 64",),
            id="features are no scores",
        ),
        pytest.param(
            dict(type="FeatureImitation", student_tap="backbone[*]", teacher_tap="backbone[0]"),
            ("yields 4 tensors", "1 ["),
            id="different numbers",
        ),
        pytest.param(dict(type="FeatureImitation"), ("needs a tap",), id="no tap"),
        pytest.param(dict(type="SoftTargets", wieght=2), ("no argument 'wieght'", "'weight'"), id="typo"),
        pytest.param(dict(type="AdversarialMask", kid="hinge"), ("no argument 'kid'", "'kind'"), id="typo in critic"),
        pytest.param(
            dict(type="CrossImageRelations", node=3), ("no argument 'node'", "'nodes'"), id="typo in relations"
        ),
        pytest.param(dict(type="PixelSoftTarget"), ("'SoftTargets'",), id="unknown term"),
        pytest.param(
            dict(type="SoftTargets", grid="student"), ("grid must be 'teacher' or 'labels', got 'student'",), id="grid"
        ),
        pytest.param(
            dict(type="SoftTargets", anchors="main"), ("takes no argument 'anchors'",), id="setting of another task"
        ),
        pytest.param(dict(type="SoftTargets", focus=1.0), ("focus needs sigmoid classes",), id="focus on a softmax"),
        pytest.param(dict(type="SoftTargets", background_weight=1.5), ("no background to weigh",), id="no background"),
        pytest.param(
            dict(type="FeatureImitation", tap="backbone[3]", region="foreground"),
            ("region 'foreground' needs boxes, not given here",),
            id="region of another task",
        ),
        pytest.param(dict(type="SoftTargets", schedule=dict(type="WarmUp", ned=3)), ("'ned'", "'end'"), id="schedule"),
        pytest.param(dict(type="AdversarialMask", tap="backbone[*]"), ("scores 4 classes",), id="a critic of features"),
        pytest.param(dict(tap="decode_head"), ("needs a 'type'",), id="no type"),
        pytest.param(dict(type=5), ("a name or a class, got 5",), id="type is a number"),
    ],
)
def test_a_mistake_in_a_term(term, parts):
    cannot_be_built(MODELS, distilled(segmentor(), ABSENT, terms=[term]), *parts)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (dict(teacher=dict(config=segmentor())), ("teacher needs checkpoint=",)),
        (dict(teacher=dict(checkpoint="teacher.pth")), ("teacher needs config=",)),
        (dict(teacher="teacher.pth"), ("dict(config=…, checkpoint=…)", "'teacher.pth'")),
        (dict(teacher=dict(config=segmentor(), chekpoint="t.pth")), ("'chekpoint'", "'checkpoint'")),
        (
            dict(teacher=dict(config=segmentor(), checkpoint="t.pth", scale=2.0)),
            ("DistilledSegmentor takes no teacher scale", "leave it out"),
        ),
        (dict(terms=dict(type="SoftTargets")), ("terms must be a list",)),
        (dict(recipe="skdd"), ("no recipe is called 'skdd'", "'skd'")),
        (dict(recipe=dict(type="skd", pari=1)), ("takes no argument 'pari'", "'pair'")),
        (dict(recipe="ld"), ("no recipe is called 'ld'",)),
        (dict(recipe=5), ("recipe must be a name",)),
        (dict(student=None), ("DistilledSegmentor needs student=",)),
        (dict(student=segmentor()), ("student is a whole model, so 'backbone'", "student='EncoderDecoder'")),
    ],
)
def test_a_mistake_beside_the_terms(settings, parts):
    cannot_be_built(MODELS, {**distilled(segmentor(), ABSENT, terms=SOFT), **settings}, *parts)


def test_a_missing_teacher_is_an_error_when_training_starts():
    model = MODELS.build(ConfigDict(distilled(segmentor(), ABSENT, terms=SOFT)))
    with pytest.raises(DistillError, match=r"checkpoint not found: absent\.pth"):
        model.init_weights()
    model = MODELS.build(ConfigDict(distilled(segmentor(), dict(ABSENT, config="absent.py"), terms=SOFT)))
    with pytest.raises(DistillError, match=r"config not found: absent\.py"):
        model.init_weights()


def test_a_mistake_leaves_the_registry_usable():
    cannot_be_built(MODELS, distilled(segmentor(), ABSENT, terms=[dict(type="FeatureImitation", tap="nope")]), "nope")
    MODELS.build(ConfigDict(distilled(segmentor(), ABSENT, terms=SOFT)))


# --- the command line


@pytest.fixture
def file_of(tmp_path, scenes, teacher):
    """A config file; its model's entry can be changed before it is written."""

    def write(change=lambda model: None, **settings):
        model = distilled(segmentor(), copy.deepcopy(teacher), **EVERY_TERM)
        change(model)
        cfg = config(
            model, scenes, tmp_path / "work", iterations=2, custom_imports=dict(imports=["kdgraft_seg"]), **settings
        )
        cfg.dump(tmp_path / "distilled.py")
        return str(tmp_path / "distilled.py")

    return write


def test_check_prints_the_wiring_and_leaves_nothing_behind(file_of, capsys, tmp_path):
    assert main(["check", file_of()]) == 0
    said = capsys.readouterr().out
    assert "DistilledEncoderDecoder: wiring" in said
    for name in TERM_NAMES:
        assert name in said and f"distill.{name}.loss" in said
    for cell in (
        "decode_head",
        "critic wgan-gp",
        "1×11×16×16",
        "ConvAdapter 32→64",
        "all",
        "16→32→32, memory 11 classes",
    ):
        assert cell in said, cell
    assert "distill.adversarial_mask.gap" not in said.split("wiring")[0]
    assert not (tmp_path / "work").exists()


def test_train_and_export(file_of, tmp_path):
    work = tmp_path / "elsewhere"
    assert (
        main(["train", file_of(), "--work-dir", str(work), "--seed", "5", "--cfg-options", "train_cfg.max_iters=1"])
        == 0
    )
    assert not (tmp_path / "work").exists()
    assert main(["export", str(work / "iter_1.pth"), str(tmp_path / "out" / "student.pth")]) == 0
    saved = torch.load(tmp_path / "out" / "student.pth", weights_only=True)
    build(segmentor()).load_state_dict(saved["state_dict"], strict=True)
    plain = Config.fromfile(tmp_path / "out" / "student.py")
    assert plain.randomness.seed == 5 and plain.model.type == "EncoderDecoder" and "custom_imports" not in plain


def test_a_config_without_a_default_scope_gets_segmentations(file_of, tmp_path):
    path = file_of()
    Path(path).write_text(Path(path).read_text().replace("default_scope", "unused_scope"))
    assert main(["check", path]) == 0


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize(
    ("change", "parts"),
    [
        pytest.param(
            lambda m: m["terms"].append(dict(type="ClassPrototypes", tap="backbone.layer9")),
            ("no module 'backbone.layer9'", "did you mean"),
            id="tap",
        ),
        pytest.param(
            lambda m: m["teacher"].update(checkpoint="absent.pth"), ("checkpoint not found: absent.pth",), id="file"
        ),
        pytest.param(
            lambda m: m["teacher"].update(config=segmentor(width=8)),
            ("does not fit the teacher EncoderDecoder",),
            id="weights",
        ),
        pytest.param(lambda m: m.update(recipe="skdd"), ("'skd'",), id="recipe"),
        pytest.param(lambda m: m.update(recipe=dict(type="skd", critic=dict(kind="gan"))), ("wgan-gp",), id="critic"),
    ],
)
def test_a_mistake_in_the_config(file_of, capsys, command, change, parts):
    refused(capsys, [command, file_of(change)], *parts)


@pytest.mark.parametrize("command", ["check", "train"])
def test_other_classes(file_of, capsys, command, tmp_path):
    other = save_teacher(tmp_path / "other.pth", classes=(*CLASSES[:10], "zebra"))
    refused(capsys, [command, file_of(lambda m: m.update(teacher=other))], "other classes", "zebra")


def test_list_names_terms_and_recipes(capsys):
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    for name in (
        "AdversarialMask",
        "SoftTargets",
        "PairwiseAffinity",
        "ClassPrototypes",
        "CrossImageRelations",
        "DIST",
    ):
        assert name in said
    for name in ("skd", "cwd", "ifvd", "cirkd", "mgd", "all"):
        assert name in said


def test_checking_a_plain_config_says_what_to_set(capsys, tmp_path, scenes):
    config(segmentor(), scenes, tmp_path / "work").dump(tmp_path / "plain.py")
    refused(capsys, ["check", str(tmp_path / "plain.py")], "trains a plain EncoderDecoder", "'DistilledSegmentor'")
