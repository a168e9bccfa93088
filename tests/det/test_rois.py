"""Heads on regions of interest: what the terms compute, from the teacher's own modules on the student's sampled proposals."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps

import pytest
import torch
import torch.nn.functional as F
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads.bbox_head import BBoxHead
from mmdet.registry import MODELS

from kdgraft import WiringError
from support.det import CLASSES, build, detector, distilled, losses, part, raw_batch, saved_teachers
from support.det_stages import in_single_precision, staged, with_masks

TWO = slice(1, 3)
"""Two images, of two and of three objects."""
KINDS = ("Faster R-CNN", "Cascade R-CNN")
TERMS = [
    dict(type="SoftTargets", temperature=2.0, name="all"),
    dict(type="SoftTargets", anchors="main", name="main"),
    dict(type="SoftTargets", background_weight=1.5, classes="mean", name="weighted"),
    dict(type="BoundedRegression", margin=0.01, weight=0.5, name="bounded"),
]


def batch(kind: str = "Faster R-CNN", boxes=None):
    found = part(raw_batch(), TWO) if boxes is None else raw_batch(boxes)
    return with_masks(found) if kind == "Mask R-CNN" else found


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """kind -> (model, checkpoint) of a teacher with another backbone and as many channels after the neck."""
    return saved_teachers(tmp_path_factory.mktemp("teachers"), lambda kind: staged(kind, width=6))


def taught(teacher, *terms, kind="Faster R-CNN", **teaching):
    """A distilled student on frozen batch norms; ``teaching`` goes to ``teacher=dict(…)``."""
    entry = distilled(staged(kind, frozen_bn=True), *teacher, terms=list(terms))
    entry["teacher"] |= teaching
    return build(entry)


def teacher_of(model):
    return model.distiller.teacher.model


@contextmanager
def watched() -> Iterator[tuple[list, list]]:
    """What RoI heads are called with: ``[[roi_head, rois, result]]``, and the targets that box heads make."""
    calls, targets = [], []

    def boxes(original, place):
        @wraps(original)
        def forward(self, *args, **kwargs):
            rois = kwargs["rois"] if "rois" in kwargs else args[place]
            calls.append([self, rois, None])  # before the call: the teacher's is left as soon as its last tap fired
            calls[-1][2] = original(self, *args, **kwargs)
            return calls[-1][2]

        return forward

    get_targets = BBoxHead.get_targets

    @wraps(get_targets)
    def made(self, *args, **kwargs):
        targets.append(get_targets(self, *args, **kwargs))
        return targets[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StandardRoIHead, "_bbox_forward", boxes(StandardRoIHead._bbox_forward, 1))
        patch.setattr(CascadeRoIHead, "_bbox_forward", boxes(CascadeRoIHead._bbox_forward, 2))
        patch.setattr(BBoxHead, "get_targets", made)
        yield calls, targets


def rois_of(calls, roi_head):
    return [rois for head, rois, _ in calls if head is roi_head]


@pytest.fixture(scope="module")
def step(teachers):
    """kind -> a model after a step: (model, its losses, what its RoI heads saw, the targets)."""
    done = {}

    def run(kind):
        if kind not in done:
            model = taught(teachers(kind), *TERMS, kind=kind)
            with watched() as (calls, targets):
                done[kind] = model, losses(model, batch()), calls, targets
        return done[kind]

    return run


@torch.no_grad()
def asked(model, rois):
    """What the teacher says of regions, stage by stage, asked directly: class logits and boxes."""
    teacher = teacher_of(model)
    pyramid = teacher.extract_feat(model.data_preprocessor(batch(), True)["inputs"])
    if isinstance(teacher.roi_head, CascadeRoIHead):
        found = [teacher.roi_head._bbox_forward(stage, pyramid, r) for stage, r in enumerate(rois)]
    else:
        found = [teacher.roi_head._bbox_forward(pyramid, r) for r in rois]
    return [(f["cls_score"], f["bbox_pred"]) for f in found]


def by_hand(model, calls, targets):
    """Each stage's class terms and squared box errors of positives, as (values, positives' mask)."""
    ours = [call for call in calls if call[0] is model.roi_head]
    for (_, _, said), (t_classes, t_boxes), (labels, _, truth, _) in zip(
        ours, asked(model, rois_of(calls, model.roi_head)), targets, strict=True
    ):
        s_classes, s_boxes = said["cls_score"].detach(), said["bbox_pred"].detach()
        positive = (labels < 10).nonzero()[:, 0].tolist()
        pairs = []
        for row in positive:
            place = slice(4 * labels[row], 4 * labels[row] + 4) if s_boxes.shape[1] == 40 else slice(0, 4)
            pairs.append([(boxes[row, place] - truth[row]).square().sum().item() for boxes in (s_boxes, t_boxes)])
        yield s_classes, t_classes, positive, pairs


def kl(student, teacher, temperature):
    p_s, p_t = ((x / temperature).softmax(1) for x in (student, teacher))
    return temperature**2 * (p_t * (p_t / p_s).log()).sum(1)


@pytest.mark.parametrize("kind", KINDS)
def test_classes_by_hand(step, kind):
    model, found, calls, targets = step(kind)
    weights = torch.ones(11)
    weights[10] = 1.5
    expected = dict(all=[], main=[], weighted=[])
    for student, teacher, positive, _ in by_hand(model, calls, targets):
        assert 0 < len(positive) < len(student)
        expected["all"].append(kl(student, teacher, 2.0).mean())
        expected["main"].append(kl(student, teacher, 1.0)[positive].mean())
        crossed = F.cross_entropy(student, teacher.softmax(1), weight=weights, reduction="none")
        expected["weighted"].append(crossed.mean() / 11)
    assert len(expected["all"]) == (2 if kind == "Cascade R-CNN" else 1)
    for name, stages in expected.items():
        assert found[f"distill.{name}.loss"].item() == pytest.approx(torch.stack(stages).mean().item(), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_by_hand(step, kind):
    model, found, calls, targets = step(kind)
    stages, left_alone = [], 0
    for *_, pairs in by_hand(model, calls, targets):
        kept = [ours if ours + 0.01 > theirs else 0.0 for ours, theirs in pairs]
        left_alone += kept.count(0.0)
        stages.append(sum(kept) / len(pairs))
    assert left_alone  # the bound is at work
    assert found["distill.bounded.loss"].item() == pytest.approx(0.5 * sum(stages) / len(stages), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_sees_the_students_regions(step, kind):
    model, _, calls, _ = step(kind)
    drawn, seen = rois_of(calls, model.roi_head), rois_of(calls, teacher_of(model).roi_head)
    assert len(drawn) == len(seen) == (2 if kind == "Cascade R-CNN" else 1)
    assert all(torch.equal(a, b) for a, b in zip(drawn, seen, strict=True))


def test_a_teacher_of_twice_the_resolution_sees_twice_the_coordinates(teachers):
    model = taught(teachers("Faster R-CNN"), TERMS[0], scale=2.0)
    with watched() as (calls, _):
        found = losses(model, batch())
    (drawn,), (seen,) = rois_of(calls, model.roi_head), rois_of(calls, teacher_of(model).roi_head)
    assert drawn[:, 1:].max() <= 48 < seen[:, 1:].max()
    assert torch.equal(seen[:, 0], drawn[:, 0])
    torch.testing.assert_close(seen[:, 1:], drawn[:, 1:] * 2)
    assert found["distill.all.loss"].item() > 0


def permuted(checkpoint, path, order):
    """The same teacher with its classes in another order; the background stays last."""
    saved = torch.load(checkpoint, weights_only=True)
    for side in ("weight", "bias"):
        key = f"roi_head.bbox_head.fc_cls.{side}"
        saved["state_dict"][key] = saved["state_dict"][key][[*order, 10]]
        key = f"roi_head.bbox_head.fc_reg.{side}"
        saved["state_dict"][key] = saved["state_dict"][key].unflatten(0, (10, 4))[order].flatten(0, 1)
    saved["meta"]["dataset_meta"]["classes"] = [CLASSES[i] for i in order]
    torch.save(saved, path)
    return str(path)


@pytest.mark.parametrize("terms", [TERMS, TERMS[3:]], ids=["all terms", "boxes alone"])
def test_the_order_of_the_teachers_classes(step, teachers, tmp_path, terms):
    entry, checkpoint = teachers("Faster R-CNN")
    other = permuted(checkpoint, tmp_path / "permuted.pth", [3, 0, 1, 2, 9, 8, 4, 5, 7, 6])
    model = taught((entry, other), *terms)
    model.start_distilling(CLASSES)
    found, expected = losses(model, batch()), step("Faster R-CNN")[1]
    for term in terms:
        key = f"distill.{term['name']}.loss"
        assert found[key].item() == pytest.approx(expected[key].item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["DynamicRoIHead", "PISARoIHead"])
def test_a_teacher_that_was_trained_by_other_losses_teaches_as_its_kind_does(step, teachers, kind):
    entry, checkpoint = teachers("Faster R-CNN")
    other = copy.deepcopy(entry)
    other["roi_head"]["type"] = kind
    model = taught((other, checkpoint), *TERMS)
    assert type(teacher_of(model).roi_head).__name__ == kind
    found, expected = losses(model, batch()), step("Faster R-CNN")[1]
    for term in TERMS:
        assert found[f"distill.{term['name']}.loss"].item() == expected[f"distill.{term['name']}.loss"].item() > 0
    with pytest.raises(WiringError, match=f"the student's {kind} is not one that this term can read"):
        build(distilled(other, entry, checkpoint, terms=TERMS))


def test_the_plain_model_is_left_as_it_was(step, teachers):
    model, found, _, _ = step("Faster R-CNN")
    assert list(model.state_dict()) == list(build(staged("Faster R-CNN")).state_dict())
    saved = torch.load(teachers("Faster R-CNN")[1], weights_only=True)["state_dict"]
    theirs = teacher_of(model).state_dict()
    assert all(torch.equal(saved[key], theirs[key]) for key in saved) and len(saved) == len(theirs)
    assert not any("_bbox_forward" in vars(part.roi_head) for part in (model, teacher_of(model)))
    twin = copy.deepcopy(model)
    assert teacher_of(twin) is teacher_of(model)
    again = losses(twin, batch())
    assert {key: value.item() for key, value in again.items()} == {key: value.item() for key, value in found.items()}


def test_nothing_of_the_teacher_runs_that_no_term_needs(teachers):
    model = taught(teachers("Faster R-CNN"), TERMS[0])
    ran = []
    for path in ("backbone", "rpn_head"):
        teacher_of(model).get_submodule(path).register_forward_hook(lambda *_, path=path: ran.append(path))
    losses(model, batch())
    assert ran == ["backbone"]


# --- features of regions

FEATURES = [
    dict(type="FeatureImitation", tap="roi_head.bbox_head:input", adapter="none", name="boxes"),
    dict(type="FeatureImitation", tap="roi_head.bbox_head.shared_fcs[-1]", adapter="none", name="vectors"),
    dict(type="FeatureImitation", tap="roi_head.mask_head:input", adapter="none", name="masks"),
    dict(type="SoftTargets", name="classes"),
]


@pytest.fixture(scope="module")
def masked(teachers):
    return taught(teachers("Mask R-CNN"), *FEATURES, kind="Mask R-CNN")


def test_features_of_regions_by_hand(masked):
    given = {}

    def keep(path):
        def hook(module, inputs, output):
            given[path] = [*(x.detach() for x in inputs if isinstance(x, torch.Tensor)), output]
            if isinstance(output, torch.Tensor):
                given[path][-1] = output.detach().clone()

        return masked.roi_head.get_submodule(path).register_forward_hook(hook)

    extractors = "bbox_roi_extractor", "mask_roi_extractor"
    hooks = [keep(path) for path in ("bbox_head", "mask_head", "bbox_head.shared_fcs.1", *extractors)]
    found = losses(masked, batch("Mask R-CNN"))
    for hook in hooks:
        hook.remove()
    teacher = teacher_of(masked)
    with torch.no_grad():
        pyramid = teacher.extract_feat(masked.data_preprocessor(batch("Mask R-CNN"), True)["inputs"])
        boxes, masks = (teacher.roi_head.get_submodule(path)(pyramid, given[path][0]) for path in extractors)
        first, second = teacher.roi_head.bbox_head.shared_fcs
        vectors = second(first(boxes.flatten(1)).relu())
    assert len(boxes) > len(masks) > 0
    assert (vectors < 0).any()  # before the ReLU that overwrites them
    pairs = dict(
        boxes=(given["bbox_head"][0], boxes),
        masks=(given["mask_head"][0], masks),
        vectors=(given["bbox_head.shared_fcs.1"][1], vectors),
    )
    for name, (student, theirs) in pairs.items():
        assert found[f"distill.{name}.loss"].item() == pytest.approx(F.mse_loss(student, theirs).item(), rel=1e-4)


@pytest.mark.parametrize("name", ["boxes", "vectors", "masks", "classes"])
def test_the_gradient_reaches_the_backbone(masked, name):
    masked.zero_grad()
    losses(masked, batch("Mask R-CNN"))[f"distill.{name}.loss"].backward()
    slope = masked.backbone.conv1.weight.grad
    assert torch.isfinite(slope).all() and slope.abs().sum() > 0


def test_images_without_objects(masked):
    masked.zero_grad()
    found = losses(masked, batch("Mask R-CNN", [[], []]))
    assert all(torch.isfinite(value).all() for value in found.values())
    assert found["distill.masks.loss"].item() == 0 < found["distill.boxes.loss"].item()
    sum(value for key, value in found.items() if "loss" in key).backward()
    assert all(torch.isfinite(p.grad).all() for p in masked.parameters() if p.grad is not None)
    assert set(masked.distiller.dropped.values()) == {0}


def test_one_image_without_objects_changes_no_positives(step, teachers):
    # The second image adds proposals, and no positives: what positives say stays the same.
    model = step("Faster R-CNN")[0]
    boxes = [[20.0, 4.0, 90.0, 88.0], [50.0, 50.0, 80.0, 76.0]]
    alone, both = (losses(model, raw_batch(images)) for images in ([boxes], [boxes, []]))
    for name in ("main", "bounded"):
        assert both[f"distill.{name}.loss"].item() == pytest.approx(alone[f"distill.{name}.loss"].item(), rel=1e-4)


def test_in_bf16(step, monkeypatch):
    in_single_precision(monkeypatch)
    model = step("Faster R-CNN")[0]
    with torch.autocast("cpu", torch.bfloat16), watched() as (calls, _):
        found = losses(model, batch())
    assert all(result is None or result["cls_score"].dtype == torch.bfloat16 for _, _, result in calls)
    for term in TERMS:
        value = found[f"distill.{term['name']}.loss"]
        assert value.dtype == torch.float32
        assert torch.isfinite(value) and value > 0
    assert set(model.distiller.dropped.values()) == {0}


# --- what is refused


@MODELS.register_module()
class ContextRoIHead(StandardRoIHead):
    """A head whose boxes see a picture of the whole image, as HTC's and SCNet's do."""

    def _bbox_forward(self, x, rois, context=None):
        if context is None:
            return self._bbox_forward(x, rois, x[0].mean((2, 3)))
        return super()._bbox_forward(x, rois)


@pytest.mark.parametrize("combined", [False, True])
def test_a_sampler_that_runs_the_head_itself(teachers, combined):
    model = staged("Faster R-CNN")
    mining = dict(type="OHEMSampler", num=8, pos_fraction=0.5)
    if combined:
        mining = dict(
            mining, type="CombinedSampler", pos_sampler=dict(type="RandomSampler"), neg_sampler=dict(type="OHEMSampler")
        )
    model["train_cfg"]["rcnn"]["sampler"] = mining
    for term in (SOFT, dict(type="FeatureImitation", tap=ROI_TAP)):
        with pytest.raises(WiringError, match="the student's OHEMSampler runs the RoI head to choose proposals"):
            build(distilled(model, FASTER, "nowhere.pth", terms=[term]))
    trained = build(distilled(model, *teachers("Faster R-CNN"), terms=[dict(SOFT, head="rpn_head")]))
    assert losses(trained, batch())["distill.soft_targets.loss"].item() > 0


def test_a_head_that_looks_at_more_of_the_student_than_proposals():
    model = staged("Faster R-CNN")
    model["roi_head"]["type"] = "ContextRoIHead"
    with pytest.raises(
        WiringError, match="ContextRoIHead cannot follow the student's call with context; tap what comes before"
    ) as caught:
        build(distilled(model, model, "nowhere.pth", terms=[dict(type="FeatureImitation", tap=ROI_TAP)]))
    assert "\n" not in str(caught.value)


def coded(width=4):
    model = staged("Faster R-CNN", width=width)
    model["roi_head"]["bbox_head"]["bbox_coder"]["target_stds"] = [0.2, 0.2, 0.2, 0.2]
    return model


def of_classes(number):
    model = staged("Faster R-CNN")
    model["roi_head"]["bbox_head"]["num_classes"] = number
    return model


def masks_from_shared_regions():
    model = staged("Mask R-CNN")
    model["roi_head"]["mask_roi_extractor"] = None
    return model


FASTER, CASCADE, DENSE = staged("Faster R-CNN"), staged("Cascade R-CNN"), detector("ATSS")
BOUNDED, SOFT = dict(type="BoundedRegression"), dict(type="SoftTargets")
ROI_TAP = "roi_head.bbox_head:input"


@pytest.mark.parametrize(
    ("student", "teacher", "term", "message"),
    [
        (FASTER, coded(), BOUNDED, "code boxes differently"),
        (FASTER, of_classes(12), SOFT, "the student predicts 10 classes, the teacher 12"),
        (FASTER, of_classes(12), BOUNDED, "the student predicts 10 classes, the teacher 12"),
        (CASCADE, FASTER, SOFT, "the student's RoI head has 2 stages, the teacher's 1"),
        (FASTER, CASCADE, BOUNDED, "the student's RoI head has 1 stages, the teacher's 2"),
        (DENSE, FASTER, dict(SOFT, head="roi_head"), "the student, a ATSS, has no roi_head"),
        (FASTER, DENSE, SOFT, "the teacher, a ATSS, has no roi_head"),
        (DENSE, FASTER, dict(SOFT, head="rpn_head"), "the student, a ATSS, has no rpn_head"),
        (
            DENSE,
            FASTER,
            dict(type="FeatureImitation", student_tap="neck[0]", teacher_tap=ROI_TAP),
            "the student has no module 'roi_head'",
        ),
        (FASTER, FASTER, dict(SOFT, anchors="vlr"), "this head has no anchors='vlr'"),
        (FASTER, FASTER, dict(SOFT, activation="sigmoid"), "classes share one softmax"),
        (FASTER, FASTER, dict(SOFT, focus=1.0), "focus needs sigmoid classes"),
        (
            FASTER,
            FASTER,
            dict(type="FeatureImitation", tap=ROI_TAP, region="foreground"),
            "region 'foreground' cannot place the positions of roi_head.bbox_head:input",
        ),
        (
            masks_from_shared_regions(),
            staged("Mask R-CNN"),
            dict(type="FeatureImitation", tap="roi_head.mask_head:input"),
            "the student's mask head has no RoI extractor of its own",
        ),
        (FASTER, FASTER, dict(type="FocalGlobal", tap=ROI_TAP), "this loss compares images"),
        (FASTER, FASTER, dict(type="MaskedGeneration", tap=ROI_TAP), "this loss compares images"),
    ],
)
def test_what_does_not_compare_is_refused_in_one_line(student, teacher, term, message):
    with pytest.raises(WiringError) as caught:
        build(distilled(student, teacher, "nowhere.pth", terms=[term]))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_roi_taps_of_heads_that_are_not_called_alike_are_refused():
    tap = dict(type="FeatureImitation", student_tap=ROI_TAP, teacher_tap="roi_head.bbox_head.0:input")
    with pytest.raises(
        WiringError, match=r"CascadeRoIHead is called with \(stage, x, rois\), the student's with \(x, rois\)"
    ):
        build(distilled(FASTER, CASCADE, "nowhere.pth", terms=[tap]))
    deeper = staged("Cascade R-CNN")
    shallow = copy.deepcopy(deeper)
    for key, value in dict(num_stages=1, stage_loss_weights=[1]).items():
        shallow["roi_head"][key] = value
    shallow["roi_head"]["bbox_head"] = shallow["roi_head"]["bbox_head"][:1]
    shallow["train_cfg"]["rcnn"] = shallow["train_cfg"]["rcnn"][:1]
    tap = dict(type="FeatureImitation", tap="roi_head.bbox_head.0:input")
    with pytest.raises(WiringError, match="cannot follow the student's call with that many stages"):
        build(distilled(deeper, shallow, "nowhere.pth", terms=[tap]))


def test_a_cascade_that_ends_early_trains_on_as_the_plain_one_does(teachers):
    # Without objects and without proposals mmdet leaves out the later stages.
    student = staged("Cascade R-CNN", frozen_bn=True)
    student["train_cfg"]["rpn_proposal"] = dict(student["train_cfg"]["rpn_proposal"], min_bbox_size=10000)
    plain = losses(build(student), raw_batch([[], []]))
    assert "s1.loss_cls" not in plain
    terms = [dict(type="SoftTargets", hard_weight=0.5), dict(type="BoundedRegression")]
    model = build(distilled(student, *teachers("Cascade R-CNN"), terms=terms))
    found = losses(model, raw_batch([[], []]))
    assert {name for name in found if not name.startswith("distill.")} == set(plain)
    for name in ("soft_targets", "bounded_regression"):
        assert found[f"distill.{name}.loss"].item() == 0
    sum(value for name, value in found.items() if "loss" in name).backward()
