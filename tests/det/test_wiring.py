"""Mistakes in a config: one clear line when the model is built, before a dataset is opened or a step is taken."""

from __future__ import annotations

import copy

import pytest
import torch
from mmdet.models.roi_heads import CascadeRoIHead
from mmdet.registry import MODELS
from mmengine.config import ConfigDict

from kdgraft.errors import DistillError
from support.det import detector, distilled
from support.det_stages import detr, staged
from support.mm import cannot_be_built

LD = [dict(type="LocalizationDistillation")]
SOFT = [dict(type="SoftTargets")]
IMITATION = [dict(type="FeatureImitation", tap="neck[*]")]


def changed(model, path, **settings):
    """A copy of a model's entry with settings of a part replaced."""
    model = copy.deepcopy(model)
    part = model
    for key in path.split("."):
        part = part[key]
    part.update(settings)
    return model


@pytest.fixture
def teacher():
    return detector(width=6, channels=12)


@pytest.mark.parametrize(
    ("term", "parts"),
    [
        pytest.param(
            dict(type="FeatureImitation", tap="backbone.layer9"),
            ("feature_imitation", "student has no module 'backbone.layer9'", "did you mean", "'backbone.layer"),
            id="unknown tap",
        ),
        pytest.param(
            dict(type="FeatureImitation", student_tap="neck[*]", teacher_tap="nek[*]"),
            ("the teacher has no module 'nek'", "'neck'"),
            id="unknown teacher tap",
        ),
        pytest.param(dict(type="FeatureImitation", tap="neck[9]"), ("no [9] in 3 entries",), id="index out of range"),
        pytest.param(
            dict(type="FeatureImitation", tap="bbox_head"), ("yields a list, not a tensor",), id="nested lists"
        ),
        pytest.param(
            dict(type="FeatureImitation", student_tap="neck[*]", teacher_tap="backbone[*]"),
            ("yields 3 tensors", "4 ["),
            id="different numbers",
        ),
        pytest.param(
            dict(type="FeatureImitation", tap="bbox_head.predict()"),
            ("tap 'bbox_head.predict()' of the student never fired",),
            id="a method that training does not call",
        ),
        pytest.param(dict(type="FeatureImitation"), ("needs a tap",), id="no tap"),
        pytest.param(
            dict(type="FeatureImitation", tap="neck[*]", wieght=2), ("no argument 'wieght'", "'weight'"), id="typo"
        ),
        pytest.param(
            dict(type="FeatureImitation", tap="neck[*]", region="forground"),
            ("no region is called 'forground'", "'foreground'"),
            id="unknown region",
        ),
        pytest.param(
            dict(type="FeatureImitation", tap="neck[*]", adapter="none"),
            ("adapter 'none' needs equal channels", "(1, 8, 16, 16)", "(1, 12, 16, 16)"),
            id="channels differ without adapter",
        ),
        pytest.param(dict(type="FeatureImitation", tap="neck[*]", loss="hnit"), ("'hint'",), id="unknown loss"),
        pytest.param(
            dict(type="FeatureImitation", tap="neck[*]", schedule=dict(type="WarmUp", ned=3)),
            ("'ned'", "'end'"),
            id="schedule",
        ),
        pytest.param(dict(type="LocalizationDistilation"), ("'LocalizationDistillation'",), id="unknown term"),
        pytest.param(
            dict(type="SoftTargets", temperatur=2), ("'temperatur'", "'temperature'"), id="typo in soft targets"
        ),
        pytest.param(
            dict(type="SoftTargets", weight=-1), ("weight must be a number >= 0, got -1",), id="negative weight"
        ),
        pytest.param(dict(type="SoftTargets", weight=float("nan")), ("weight must be a number",), id="nan weight"),
        pytest.param(dict(type="SoftTargets", anchors="vrl"), ("anchors must be one of all, main, vlr",), id="anchors"),
        pytest.param(
            dict(type="LocalizationDistillation", temperature=0), ("temperature must be > 0",), id="temperature"
        ),
        pytest.param(dict(type="LocalizationDistillation", anchors="all"), ("'main' or 'vlr'",), id="region of LD"),
        pytest.param(dict(anchors="main"), ("needs a 'type'",), id="no type"),
    ],
)
def test_a_mistake_in_a_term(teacher, term, parts):
    cannot_be_built(MODELS, distilled(detector(), teacher, "absent.pth", terms=[term]), *parts)


@pytest.mark.parametrize(
    ("student", "other", "terms", "parts"),
    [
        pytest.param(
            detector("ATSS"), detector("ATSS"), LD, ("student's ATSSHead", "not as distributions", "GFLHead"), id="ATSS"
        ),
        pytest.param(
            detector(), detector("ATSS"), LD, ("teacher's ATSSHead", "not as distributions"), id="ATSS teacher"
        ),
        pytest.param(
            detector(),
            detector(strides=(8, 16, 32, 64)),
            SOFT,
            ("different strides", "[8, 16, 32]", "[8, 16, 32, 64]", "anchor_generator.strides"),
            id="strides",
        ),
        pytest.param(
            detector(),
            changed(detector(), "bbox_head.anchor_generator", octave_base_scale=8),
            LD,
            ("different anchors on level 0",),
            id="anchors",
        ),
        pytest.param(detector(), detector(reg_max=16), LD, ("9 bins", "17", "same reg_max"), id="reg_max"),
        pytest.param(detector(), detector(classes=7), SOFT, ("10 classes, the teacher 7",), id="classes"),
        pytest.param(
            detector(),
            changed(detector(), "bbox_head", bbox_coder=dict(type="DistancePointBBoxCoder", clip_border=False)),
            LD,
            ("code boxes differently", "'clip_border': True", "'clip_border': False"),
            id="box coder",
        ),
        pytest.param(
            detector(),
            changed(detector(), "data_preprocessor", mean=[0.5], std=[0.25], bgr_to_rgb=False),
            IMITATION,
            ("normalises 3 channels, the teacher's 1",),
            id="channels of the image",
        ),
    ],
)
def test_a_pair_that_does_not_compare(student, other, terms, parts):
    cannot_be_built(MODELS, distilled(student, other, "absent.pth", terms=terms), *parts)


def test_a_head_that_is_not_known_is_refused_with_what_works():
    student = detector()
    student["type"] = "PAA"  # it assigns after its loss: get_targets says nothing
    student["bbox_head"] = dict(detector("ATSS")["bbox_head"], type="PAAHead")
    for terms in (LD, SOFT):
        cannot_be_built(
            MODELS,
            distilled(student, detector(), "absent.pth", terms=terms),
            "student's PAAHead",
            "GFLHead, RTMDetHead",
            "FeatureImitation works with any detector",
        )
    MODELS.build(ConfigDict(distilled(student, detector(), "absent.pth", terms=IMITATION)))


def test_class_counts_may_differ_where_classes_are_not_compared(teacher):
    for terms in (LD, IMITATION):
        model = MODELS.build(ConfigDict(distilled(detector(), detector(classes=7), "absent.pth", terms=terms)))
        assert {row.term for row in model.distiller.rows} == set(model.distiller.terms)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (dict(teacher=dict(config=detector())), ("teacher needs checkpoint=",)),
        (dict(teacher=dict(checkpoint="teacher.pth")), ("teacher needs config=",)),
        (dict(teacher="teacher.pth"), ("dict(config=…, checkpoint=…)", "'teacher.pth'")),
        (dict(teacher=None), ("dict(config=…, checkpoint=…)", "None")),
        (dict(teacher=dict(config=detector(), chekpoint="t.pth")), ("'chekpoint'", "'checkpoint'")),
        (dict(teacher=dict(config=detector(), checkpoint="t.pth", precision="half")), ("precision", "'half'")),
        (dict(terms=dict(type="SoftTargets")), ("terms must be a list",)),
        (dict(terms=None), ("teacher is given, and nothing says what to learn; name terms or a recipe",)),
        (dict(recipe="imitations"), ("no recipe is called 'imitations'", "'imitation'")),
        (dict(student=None), ("DistilledDetector needs student=",)),
        (dict(student=detector()), ("student is a whole model, so 'backbone'", "student='GFL'")),
    ],
)
def test_a_mistake_beside_the_terms(settings, parts):
    cannot_be_built(MODELS, {**distilled(detector(), detector(), "absent.pth", terms=SOFT), **settings}, *parts)


@pytest.mark.parametrize("config", ["absent.py", "mmdet::gfl/absent.py", "nosuchpackage::gfl/gfl.py"])
def test_a_missing_teacher_config_is_an_error_when_training_starts(config):
    # Not before: a model built for inference needs neither the teacher's config nor its checkpoint.
    model = MODELS.build(ConfigDict(distilled(detector(), config, "absent.pth", terms=SOFT)))
    with pytest.raises(DistillError, match="config not found") as caught:
        model.init_weights()
    assert config in str(caught.value)
    with pytest.raises(DistillError, match="config not found"):
        model.train().loss(torch.zeros(1, 3, 32, 32), [])


def test_a_missing_checkpoint_is_an_error_when_training_starts(teacher):
    model = MODELS.build(ConfigDict(distilled(detector(), teacher, "absent.pth", terms=SOFT)))
    with pytest.raises(DistillError, match=r"checkpoint not found: absent\.pth"):
        model.init_weights()


def test_a_mistake_leaves_the_registry_usable(teacher):
    cannot_be_built(
        MODELS, distilled(detector(), teacher, "absent.pth", terms=[dict(type="FeatureImitation", tap="nope")]), "nope"
    )
    MODELS.build(ConfigDict(distilled(detector(), teacher, "absent.pth", terms=SOFT)))


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        pytest.param(
            dict(terms=[dict(type="LogitMatching", tap="bbox_head[0][*]")]),
            ("LogitMatching takes no argument 'tap'", "'anchors'"),
            id="a tap where a head is meant",
        ),
        pytest.param(dict(recipe=5), ("recipe must be a name",), id="recipe is a number"),
        pytest.param(dict(terms=[dict(type=5)]), ("a name or a class, got 5",), id="type is a number"),
        pytest.param(
            dict(terms=[dict(type="SoftTargets", temperature="10")]),
            ("temperature must be",),
            id="temperature is a text",
        ),
        pytest.param(
            dict(terms=[dict(type="SoftTargets", schedule=dict(type="WarmUp", end="500"))]),
            ("end must be a whole number", "'500'"),
            id="end is a text",
        ),
        pytest.param(
            dict(terms=[dict(type="SoftTargets", name="keys")]),
            ("not that of a method, got 'keys'",),
            id="name of a method",
        ),
        pytest.param(
            dict(terms=[dict(type="FeatureImitation", tap="neck[*]", region=5)]), ("a region is a name",), id="region"
        ),
    ],
)
def test_values_of_the_wrong_kind_are_said_in_one_line(teacher, settings, parts):
    cannot_be_built(MODELS, distilled(detector(), teacher, "nowhere.pth", **settings), *parts)


def test_tokens_are_refused_because_padding_cannot_be_told_from_image(teacher):
    swin = detector(backbone="SwinTransformer", width=8)
    for region in ("all", "foreground"):
        terms = [dict(type="FeatureImitation", tap="backbone.stages.0.blocks.0", region=region)]
        cannot_be_built(
            MODELS, distilled(swin, swin, "nowhere.pth", terms=terms), "cannot place the positions", "output of a stage"
        )


def test_a_dry_run_goes_no_further_than_the_taps(monkeypatch):
    # Over a thousand untrained proposals the heads of a full cascade take a minute, also where only inference follows.
    model = staged("Cascade R-CNN")
    rows = MODELS.build(ConfigDict(distilled(model, model, "absent.pth", terms=IMITATION))).distiller.rows

    def unreachable(*_):
        raise AssertionError("the heads ran")

    monkeypatch.setattr(CascadeRoIHead, "forward", unreachable)
    again = MODELS.build(ConfigDict(distilled(model, model, "absent.pth", terms=IMITATION))).distiller.rows
    assert again == rows and len(rows) == 3


def test_a_dry_run_is_as_large_as_the_models_need():
    # 128×128 pixels give 336 positions, of which the detector picks 400 queries.
    model = detr("DINO", queries=400)
    entry = distilled(model, model, "absent.pth", terms=SOFT)
    (row,) = MODELS.build(ConfigDict(entry)).distiller.rows
    assert row.student_shape.endswith("400×10")
    cannot_be_built(
        MODELS,
        dict(entry, dry_run_size=128),
        "dry run of the student, a DINO, on 128×128 pixels failed",
        "dry_run_size",
    )


def test_features_that_no_training_reaches_are_told_of(teacher, caplog):
    student = changed(detector(), "backbone", frozen_stages=1)
    with caplog.at_level("WARNING", logger="kdgraft"):
        terms = [dict(type="FeatureImitation", tap=f"backbone[{index}]", name=f"stage{index}") for index in (0, 1)]
        MODELS.build(ConfigDict(distilled(student, teacher, "absent.pth", terms=terms)))
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["stage0"]
    assert "backbone[0]" in caplog.text and "frozen_stages" in caplog.text


def test_a_semi_supervised_student_is_refused(teacher):
    student = dict(
        type="SoftTeacher",
        detector=staged("Faster R-CNN"),
        semi_train_cfg=dict(freeze_teacher=True),
        data_preprocessor=dict(
            type="MultiBranchDataPreprocessor",
            data_preprocessor=dict(type="DetDataPreprocessor", mean=[0.0] * 3, std=[1.0] * 3),
        ),
    )
    cannot_be_built(
        MODELS, distilled(student, teacher, "absent.pth", terms=IMITATION), "a SoftTeacher trains on several views"
    )


def test_two_stage_detectors_wire_features(teacher):
    from mmengine.config import Config

    from kdgraft_mm.configs import load_config

    base = load_config("mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py").model
    base.backbone.init_cfg = None
    base.backbone.base_channels = base.backbone.stem_channels = 8
    base.neck.in_channels = [32, 64, 128, 256]
    entry = distilled(
        Config(dict(model=base)).model.to_dict(),
        Config(dict(model=base)).model.to_dict(),
        "nowhere.pth",
        terms=[dict(type="FeatureImitation", tap="neck[*]", region="foreground")],
    )
    model = MODELS.build(ConfigDict(entry))
    assert len(model.distiller.rows) == 5
