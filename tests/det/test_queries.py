"""Heads on object queries: which queries are compared, by mmdet's own matching, and what the terms make of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import DeformableDETRHead, DINOHead
from mmdet.registry import TASK_UTILS
from mmengine.structures import InstanceData

from kdgraft import WiringError
from support.det import CLASSES, build, detector, distilled, losses, part, raw_batch, saved_teachers
from support.det_stages import detr

TWO = part(raw_batch(), slice(1, 3))
"""Two images, of two and of three objects."""
TERMS = [
    dict(type="SoftTargets", temperature=2.0, name="classes"),
    dict(type="BoundedRegression", margin=0.001, weight=0.5, name="boxes"),
]
HUNGARIAN = detr()["train_cfg"]["assigner"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """kind -> (model, checkpoint) of a wider teacher of 8 queries."""
    return saved_teachers(tmp_path_factory.mktemp("teachers"), lambda kind: detr(kind, width=6, queries=8))


def taught(teacher, *terms, kind="DeformableDETR", queries=12):
    return build(distilled(detr(kind, queries=queries, frozen_bn=True), *teacher, terms=list(terms or TERMS)))


def outputs(model, batch):
    """A step's losses, and the class logits and boxes of both models' last layers."""
    kept = []

    def keep(module, inputs, output):
        kept.append(tuple(value[-1].detach() for value in output))

    hook = model.bbox_head.register_forward_hook(keep)
    found = losses(model, batch)
    hook.remove()
    data = model.data_preprocessor(batch, True)
    with torch.no_grad():
        said = model.distiller.teacher.model(data["inputs"], data["data_samples"], mode="tensor")
    return found, kept[0], (said[0][-1], said[1][-1])


def query_of_each_object(classes, boxes, sample):
    """Object -> query, by mmdet's Hungarian matching."""
    x, y, w, h = (boxes * 96).unbind(-1)
    corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
    found = TASK_UTILS.build(HUNGARIAN).assign(
        InstanceData(scores=classes, bboxes=corners), sample.gt_instances, dict(img_shape=(96, 96))
    )
    return {number - 1: query for query, number in enumerate(found.gt_inds.tolist()) if number > 0}


def by_hand(student, teacher, batch):
    """The two losses before their weights, object by object, and how many objects both models have a query for."""
    classes, boxes = [], []
    for image, sample in enumerate(batch["data_samples"]):
        sides = [(c[image], b[image]) for c, b in (student, teacher)]
        ours, theirs = (query_of_each_object(*side, sample) for side in sides)
        for number in sorted(ours.keys() & theirs.keys()):
            (s, s_box), (t, t_box) = (
                (c[found[number]], b[found[number]]) for (c, b), found in zip(sides, (ours, theirs), strict=True)
            )
            p_s, p_t = (s / 2).sigmoid(), (t / 2).sigmoid()
            kl = p_t * (p_t / p_s).log() + (1 - p_t) * ((1 - p_t) / (1 - p_s)).log()
            classes.append(4 * kl.sum())
            x1, y1, x2, y2 = sample.gt_instances.bboxes[number] / 96
            truth = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])
            error, bound = ((box - truth).square().sum() for box in (s_box, t_box))
            boxes.append(error if error + 0.001 > bound else error * 0)
    return torch.stack(classes).mean().item(), torch.stack(boxes).mean().item(), len(classes)


@pytest.fixture(scope="module")
def step(teachers):
    """A model of 12 queries under a teacher of 8, and its losses."""
    model = taught(teachers("DeformableDETR"))
    return model, *outputs(model, TWO)


def test_by_hand_with_other_numbers_of_queries(step):
    _, found, student, teacher = step
    assert student[0].shape[1:] == (12, 10) and teacher[0].shape[1:] == (8, 10)
    classes, boxes, count = by_hand(student, teacher, TWO)
    assert count == 5 and boxes > 0
    assert found["distill.classes.loss"].item() == pytest.approx(classes, rel=1e-4)
    assert found["distill.boxes.loss"].item() == pytest.approx(0.5 * boxes, rel=1e-4)


def test_an_image_that_is_padded(step):
    # Boxes are shares of the image, not of the padded input: the truth in pixels has to be matched in the image's frame.
    model = step[0]
    batch = raw_batch([[[20.0, 4.0, 60.0, 50.0]], [[5.0, 5.0, 90.0, 80.0]]], sizes=[(64, 64), (96, 96)])
    found, student, teacher = outputs(model, batch)
    shares = torch.tensor([[40 / 64, 27 / 64, 40 / 64, 46 / 64], [47.5 / 96, 42.5 / 96, 85 / 96, 75 / 96]])
    taken = []
    for image, (size, sample) in enumerate(zip((64, 96), batch["data_samples"], strict=True)):
        queries = []
        for classes, boxes in (student, teacher):
            x, y, w, h = (boxes[image] * size).unbind(-1)
            corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
            assigned = TASK_UTILS.build(HUNGARIAN).assign(
                InstanceData(scores=classes[image], bboxes=corners), sample.gt_instances, dict(img_shape=(size, size))
            )
            queries.append(boxes[image][assigned.gt_inds > 0][0])
        errors = [(box - shares[image]).square().sum().item() for box in queries]
        taken.append(errors[0] if errors[0] + 0.001 > errors[1] else 0.0)
    assert sum(taken) > 0
    assert found["distill.boxes.loss"].item() == pytest.approx(0.5 * sum(taken) / 2, rel=1e-4)


def test_more_objects_than_queries(teachers):
    corners = [[8.0 * i, 6.0 * i, 8.0 * i + 30, 6.0 * i + 36] for i in range(6)]
    batch = raw_batch([corners])
    model = taught(teachers("DeformableDETR"), queries=4)
    found, student, teacher = outputs(model, batch)
    classes, boxes, count = by_hand(student, teacher, batch)
    assert count == 4  # all six have a query of the teacher's, four one of the student's
    assert found["distill.classes.loss"].item() == pytest.approx(classes, rel=1e-4)
    assert found["distill.boxes.loss"].item() == pytest.approx(0.5 * boxes, rel=1e-4)


def test_no_objects_at_all(step):
    model = step[0]
    model.zero_grad()
    found = losses(model, raw_batch([[], []]))
    for name in ("classes", "boxes"):
        value = found[f"distill.{name}.loss"]
        assert value.item() == 0 and value.requires_grad
    sum(value for key, value in found.items() if "loss" in key).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert set(model.distiller.dropped.values()) == {0}


def test_an_image_without_objects_changes_nothing(step):
    model = step[0]
    boxes = [[20.0, 4.0, 90.0, 88.0], [50.0, 50.0, 80.0, 76.0]]
    alone, both = (losses(model, raw_batch(images)) for images in ([boxes], [boxes, []]))
    for name in ("classes", "boxes"):
        assert both[f"distill.{name}.loss"].item() == pytest.approx(alone[f"distill.{name}.loss"].item(), rel=1e-4)


def test_denoising_queries_are_left_out(teachers, monkeypatch):
    model = taught(teachers("DINO"), kind="DINO")
    split = DINOHead.split_outputs
    parts = []

    def kept(*args):
        parts.append([x.detach() for x in split(*args)])
        return split(*args)

    monkeypatch.setattr(DINOHead, "split_outputs", staticmethod(kept))
    torch.manual_seed(0)
    found, student, teacher = outputs(model, TWO)
    classes, boxes, *denoising = parts[0]
    assert denoising[0].shape[2] > 0 and student[0].shape[1] == 12 + denoising[0].shape[2]
    expected = by_hand((classes[-1], boxes[-1]), teacher, TWO)
    assert expected[2] == 5
    assert found["distill.classes.loss"].item() == pytest.approx(expected[0], rel=1e-4)
    assert found["distill.boxes.loss"].item() == pytest.approx(0.5 * expected[1], rel=1e-4)


@pytest.mark.parametrize("alone", [False, True], ids=["all terms", "boxes alone"])
def test_the_order_of_the_teachers_classes(teachers, tmp_path, alone):
    terms = [
        dict(TERMS[1], margin=0.15),
        *TERMS[: 0 if alone else 1],
    ]  # a bound that some queries of the teacher's keep
    order = [3, 0, 1, 2, 9, 8, 4, 5, 7, 6]
    entry, checkpoint = teachers("DeformableDETR")
    saved = torch.load(checkpoint, weights_only=True)
    for key, value in saved["state_dict"].items():
        if key.startswith("bbox_head.cls_branches"):
            saved["state_dict"][key] = value[order]
    saved["meta"]["dataset_meta"]["classes"] = [CLASSES[i] for i in order]
    torch.save(saved, tmp_path / "permuted.pth")
    results = []
    for path in (checkpoint, tmp_path / "permuted.pth"):
        learning = distilled(detr(frozen_bn=True), entry, str(path), terms=terms)
        learning["train_cfg"]["assigner"]["match_costs"][0]["weight"] = 1e4  # classes decide the matching
        model = build(learning)
        model.start_distilling(CLASSES)
        results.append(losses(model, raw_batch()))
    for term in terms:
        plain, permuted = (found[f"distill.{term['name']}.loss"].item() for found in results)
        assert permuted == pytest.approx(plain, rel=1e-5) and plain > 0


def test_the_gradient_reaches_matched_queries_alone(step):
    model = step[0]
    kept = []

    def keep(module, inputs, output):
        kept.extend(output)

    hook = model.bbox_head.register_forward_hook(keep)
    found = losses(model, TWO)
    hook.remove()
    slopes = torch.autograd.grad(found["distill.classes.loss"], kept[0])[0]
    assert not slopes[0].any()  # the last layer's alone
    for image, sample in enumerate(TWO["data_samples"]):
        matched = query_of_each_object(kept[0][-1, image].detach(), kept[1][-1, image].detach(), sample)
        assert slopes[-1, image].any(1).nonzero()[:, 0].tolist() == sorted(matched.values())


def test_a_teacher_that_is_not_finite_is_dropped(teachers, tmp_path):
    entry, checkpoint = teachers("DeformableDETR")
    saved = torch.load(checkpoint, weights_only=True)
    for key, value in saved["state_dict"].items():
        if key.startswith(("bbox_head.cls_branches", "bbox_head.reg_branches")) and key.endswith("bias"):
            value.fill_(torch.nan)
    torch.save(saved, tmp_path / "broken.pth")
    model = taught((entry, str(tmp_path / "broken.pth")))
    found = losses(model, TWO)
    assert found["distill.classes.loss"].item() == found["distill.classes.dropped"].item() - 1 == 0
    assert all(torch.isfinite(value).all() for value in found.values())


def test_a_teacher_that_was_trained_by_other_losses_teaches_as_its_kind_does(teachers):
    class Weighted(DeformableDETRHead):
        def loss_by_feat_single(self, *args, **settings):
            return tuple(2 * value for value in super().loss_by_feat_single(*args, **settings))

    entry, checkpoint = teachers("DeformableDETR")
    found = []
    for kind in (DeformableDETRHead, Weighted):
        other = dict(entry, bbox_head=dict(entry["bbox_head"], type=kind))
        model = taught((other, checkpoint))
        assert type(model.distiller.teacher.model.bbox_head) is kind
        found.append({key: value.item() for key, value in losses(model, TWO).items() if key.startswith("distill.")})
    assert found[0] == found[1] and min(found[0].values()) > 0
    with pytest.raises(WiringError, match="the student's Weighted is not one that this term can read"):
        build(distilled(other, entry, checkpoint, terms=TERMS))


def changed(**head):
    model = detr()
    model["bbox_head"] |= head
    return model


SOFTMAX = changed(loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0))
SOFT, BOUNDED = dict(type="SoftTargets"), dict(type="BoundedRegression")


@pytest.mark.parametrize(
    ("student", "teacher", "term", "message"),
    [
        (detr(), detr(), dict(SOFT, anchors="all"), "this head has no anchors='all'; use main"),
        (detr(), detr(), dict(SOFT, anchors="vlr"), "this head has no anchors='vlr'"),
        (SOFTMAX, detr(), SOFT, "the student's DeformableDETRHead is not one that this term can read"),
        (detr(), SOFTMAX, BOUNDED, "the teacher's DeformableDETRHead is not one that this term can read"),
        (detr(), changed(num_classes=12), SOFT, "the student predicts 10 classes, the teacher 12"),
        (detr(), changed(num_classes=12), BOUNDED, "the student predicts 10 classes, the teacher 12"),
        (detr(), detector("ATSS"), SOFT, "the teacher's ATSSHead is not one that this term can read"),
        (detr(), detr(), dict(SOFT, head="rpn_head"), "the student, a DeformableDETR, has no rpn_head"),
    ],
)
def test_what_does_not_compare_is_refused_in_one_line(student, teacher, term, message):
    with pytest.raises(WiringError) as caught:
        build(distilled(student, teacher, "nowhere.pth", terms=[term]))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_classes_in_sigmoid_cross_entropy_by_hand(teachers):
    # background_weight on the matched queries: torch's own cross-entropy of each class and of its complement.
    model = taught(teachers("DeformableDETR"), dict(type="SoftTargets", background_weight=1.5, name="weighted"))
    batch = raw_batch([[[20.0, 4.0, 90.0, 88.0]]])
    found, student, teacher = outputs(model, batch)
    (sample,) = batch["data_samples"]
    s, t = (c[0][query_of_each_object(c[0], b[0], sample)[0]] for c, b in (student, teacher))
    expected = -(t.sigmoid() * F.logsigmoid(s) + 1.5 * (-t).sigmoid() * F.logsigmoid(-s)).sum()
    assert found["distill.weighted.loss"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_teacher_that_is_not_finite_drops_the_terms_and_the_run_goes_on(teachers):
    model = taught(teachers("DeformableDETR"))
    model.start_distilling()
    with torch.no_grad():
        for parameter in model.distiller.teacher.model.bbox_head.reg_branches.parameters():
            parameter.fill_(torch.nan)
    found = losses(model, TWO)
    assert found["distill.boxes.loss"] == 0 and model.distiller.dropped["boxes"] == 1
    assert torch.isfinite(sum(value for name, value in found.items() if "loss" in name))
