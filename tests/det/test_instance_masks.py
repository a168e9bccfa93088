"""Masks of instances: whose masks are compared, and what the term makes of them, from the host's own modules."""

from __future__ import annotations

import copy
import json
import shutil
from functools import wraps
from itertools import permutations

import pytest
import torch
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.registry import MODELS
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from kdgraft import DistillError, WiringError
from support.det import CLASSES, build, detector, distilled, losses, runner_config, save_teacher, saved_teachers
from support.det_masks import BY_QUERIES, WITH_MASKS, batch, by_queries, model
from support.det_stages import CASCADE_OF_MASKS, in_single_precision, staged
from support.det_zoo import INSTANCES, zoo
from support.methods import assert_falls, trained
from support.mm import history, run
from support.tensors import gradients

TERM = dict(type="InstanceMasks", masks=2.0, dice=3.0, name="masks")
TWO = ([[20.0, 4.0, 90.0, 88.0], [50.0, 50.0, 80.0, 76.0]], [[8.0, 10.0, 44.0, 50.0]])
"""The boxes of two images."""


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """kind -> (model, checkpoint) of a wider teacher."""
    return saved_teachers(tmp_path_factory.mktemp("teachers"), lambda kind: model(kind, width=6))


def taught(teacher, kind, **term):
    return build(distilled(model(kind, frozen_bn=True), *teacher, terms=[{**TERM, **term}]))


def value(student, teacher):
    """The loss of one mask, from its logits in any shape."""
    t = teacher.sigmoid()
    own = cross_entropy(teacher, t)
    s = student.sigmoid()
    dice = (2 * (s * t).sum() + 1) / (s.square().sum() + t.square().sum() + 1)
    return (2 * (cross_entropy(student, t) - own) + 3 * (1 - dice)).item()


def mean(values):
    values = list(values)
    return sum(values) / len(values)


class Watched:
    """What a method of a class is called with, and what it returns, call by call."""

    def __init__(self, patch, kind, method):
        original = getattr(kind, method)
        self.calls = []

        @wraps(original)
        def watched(head, *args, **kwargs):
            result = original(head, *args, **kwargs)
            self.calls.append((head, args, kwargs, result))
            return result

        patch.setattr(kind, method, watched)

    def of(self, head):
        return [call[1:] for call in self.calls if call[0] is head]


@torch.no_grad()
def teacher_features(built, raw):
    return built.distiller.teacher.model.extract_feat(built.data_preprocessor(copy.deepcopy(raw), True)["inputs"])


@pytest.mark.parametrize("change", [{}, {"class_agnostic": True}, {"output_size": 6}], ids=str)
def test_masks_of_positive_proposals_by_hand(teachers, tmp_path, monkeypatch, change):
    entry, checkpoint = teachers("Mask R-CNN")
    if change:  # another teacher: one mask for all classes, or masks of 12×12 where the student's have 8×8
        entry = copy.deepcopy(entry)
        entry["roi_head"]["mask_head"] |= {key: on for key, on in change.items() if key != "output_size"}
        extractor = copy.deepcopy(entry["roi_head"]["mask_roi_extractor"])
        extractor["roi_layer"]["output_size"] = change.get("output_size", 4)
        entry["roi_head"]["mask_roi_extractor"] = extractor
        checkpoint = save_teacher(tmp_path / "teacher.pth", entry)
    built = taught((entry, checkpoint), "Mask R-CNN")
    drawn = Watched(monkeypatch, StandardRoIHead, "_mask_forward")
    trained_on = Watched(monkeypatch, FCNMaskHead, "loss_and_target")
    raw = batch(TWO)
    found = losses(built, raw)["distill.masks.loss"]
    (((_, rois), _, said),) = drawn.of(built.roi_head)
    ((_, given, _),) = trained_on.of(built.roi_head.mask_head)
    labels = torch.cat([result.pos_gt_labels for result in given["sampling_results"]])
    with torch.no_grad():
        theirs = built.distiller.teacher.model.roi_head._mask_forward(teacher_features(built, raw), rois)["mask_preds"]
    ours = said["mask_preds"].detach()
    assert len(ours) == len(labels) > 3 and ours.shape[-1] == 8 and set(labels.tolist()) == {0, 1}
    if "output_size" in change:
        assert theirs.shape[-1] == 12
        ours = torch.nn.functional.interpolate(ours, (12, 12), mode="bilinear")
    rows = [(ours[i, c], theirs[i, 0 if "class_agnostic" in change else c]) for i, c in enumerate(labels.tolist())]
    assert found.item() == pytest.approx(mean(value(*row) for row in rows), rel=1e-4)


def test_each_stage_of_a_cascade_counts_alike(teachers):
    built = taught(teachers(CASCADE_OF_MASKS), CASCADE_OF_MASKS)
    pairs = built.distiller.terms["masks"].predictions.pairs
    seen = []
    built.distiller.terms["masks"].predictions.pairs = lambda *given: seen.append(pairs(*given)) or seen[-1]
    found = losses(built, batch(TWO))["distill.masks.loss"].item()
    first, second = seen[0]
    assert len(first.student) > 3 and len(second.student) > 3 and first.student.shape[1] == 64
    stages = [mean(map(value, stage.student.detach(), stage.teacher)) for stage in (first, second)]
    assert found == pytest.approx(sum(stages) / 2, rel=1e-4)


@pytest.mark.parametrize("narrow", [False, True], ids=["", "padded"])
def test_masks_of_positive_positions_by_hand(teachers, monkeypatch, narrow):
    built = taught(teachers(INSTANCES), INSTANCES)
    teacher = built.distiller.teacher.model
    head = type(built.bbox_head)
    drawn = Watched(monkeypatch, head, "_mask_predict_by_feat_single")
    sampled = Watched(monkeypatch, head, "loss_mask_by_feat")
    raw = batch(TWO, sizes=[(96, 96), (96, 64 if narrow else 96)])
    found = losses(built, raw)["distill.masks.loss"]
    ours = [call[-1].detach() for call in drawn.of(built.bbox_head)]
    (((_, _, results, _), _, _),) = sampled.of(built.bbox_head)
    with torch.no_grad():
        _, _, kernels, prototypes = teacher.bbox_head(teacher_features(built, raw))
        rows = torch.cat([level.permute(0, 2, 3, 1).reshape(2, -1, level.shape[1]) for level in kernels], 1)
        theirs = [
            teacher.bbox_head._mask_predict_by_feat_single(prototypes[i], rows[i, r.pos_inds], r.pos_priors)
            for i, r in enumerate(results)
        ]
    assert [len(masks) for masks in ours] == [len(masks) for masks in theirs] and min(map(len, ours)) > 1
    widths = (12, 8 if narrow else 12)  # at a stride of 8
    values = [
        value(s[:, :width], t[:, :width])
        for width, *image in zip(widths, ours, theirs, strict=True)
        for s, t in zip(*image, strict=True)
    ]
    assert found.item() == pytest.approx(mean(values), rel=1e-3)


def whole_costs(kind, classes, masks, truth, labels):
    """The costs ``[query][object]`` of each host's own configs, on all pixels; areas of 4×4 pixels are one."""
    probabilities = classes.softmax(-1)
    found = []
    for p, mask in zip(probabilities, masks, strict=True):
        row = []
        for label, object_ in zip(labels.tolist(), truth, strict=True):
            s = mask.sigmoid()
            if kind == "Mask2Former":
                pixels = cross_entropy(mask, object_)
            else:
                lost = 0.25 * (1 - s) ** 2 * -(s + 1e-12).log(), 0.75 * s**2 * -(1 - s + 1e-12).log()
                pixels = (lost[0] * object_ + lost[1] * (1 - object_)).mean()
            dice = 1 - (2 * (s * object_).sum() + 1) / (s.sum() + object_.sum() + 1)
            weights = (2, 5, 5) if kind == "Mask2Former" else (1, 20, 1)
            row.append(sum(w * x for w, x in zip(weights, (-p[label], pixels, dice), strict=True)).item())
        found.append(row)
    return found


@pytest.mark.parametrize("narrow", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("kind", BY_QUERIES)
def test_masks_of_the_queries_of_each_object_by_hand(teachers, kind, narrow):
    built = taught(teachers(kind), kind)
    raw = batch(TWO, sizes=[(96, 96), (96, 64 if narrow else 96)])
    kept = []
    hook = built.panoptic_head.register_forward_hook(lambda module, given, output: kept.append(output))
    found = losses(built, raw)["distill.masks.loss"]
    hook.remove()
    data = built.data_preprocessor(copy.deepcopy(raw), True)
    with torch.no_grad():
        theirs = built.distiller.teacher.model(data["inputs"], data["data_samples"], mode="tensor")
    sides = [(output[0][-1].detach(), output[1][-1].detach()) for output in (kept[0], theirs)]
    assert [places.shape[1:] for _, places in sides] == [(6, 24, 24)] * 2
    values = []
    for image, sample in enumerate(data["data_samples"]):
        truth = sample.gt_instances.masks.to_tensor(torch.float32, "cpu").unflatten(1, (24, 4)).unflatten(3, (24, 4))
        truth = truth.mean((2, 4))
        count, chosen = len(truth), []
        for classes, masks in sides:
            costs = whole_costs(kind, classes[image], masks[image], truth, sample.gt_instances.labels)
            best = min(permutations(range(6), count), key=lambda order: sum(costs[q][k] for k, q in enumerate(order)))
            chosen.append([masks[image, query] for query in best])
        width = 16 if narrow and image else 24
        values += [value(s[:, :width], t[:, :width]) for s, t in zip(*chosen, strict=True)]
    assert len(values) == 3
    assert found.item() == pytest.approx(mean(values), rel=1e-3)


def test_classes_of_queries_with_masks_share_a_softmax(teachers):
    terms = [dict(type="SoftTargets", temperature=2.0, name="classes"), TERM]
    built = build(distilled(model("Mask2Former", frozen_bn=True), *teachers("Mask2Former"), terms=terms))
    terms = built.distiller.terms
    seen = {}
    for name in ("classes", "masks"):
        pairs = terms[name].predictions.pairs
        terms[name].predictions.pairs = lambda *given, n=name, p=pairs: seen.setdefault(n, p(*given))
    found = losses(built, batch(TWO))["distill.classes.loss"]
    (classes,), (masks,) = seen["classes"], seen["masks"]
    assert classes.student.shape == (3, 11) and masks.student.shape == (3, 24 * 24)
    assert classes.labels.tolist() == [0, 1, 0]
    p_t, p_s = ((scores.detach() / 2).softmax(1) for scores in (classes.teacher, classes.student))
    assert found.item() == pytest.approx((4 * (p_t * (p_t / p_s).log()).sum(1)).mean().item(), rel=1e-4)


def test_stuff_is_matched_as_things_are(tmp_path):
    from mmengine.structures import PixelData

    entry = by_queries("Mask2Former", stuff=2, frozen_bn=True)
    built = build(distilled(entry, entry, save_teacher(tmp_path / "teacher.pth", entry), terms=[TERM]))
    raw = batch(TWO)
    for sample in raw["data_samples"]:
        regions = torch.full((1, 96, 96), 11)  # of the second kind of stuff
        regions[:, :, :60] = 255
        sample.gt_sem_seg = PixelData(sem_seg=regions)
    pairs = built.distiller.terms["masks"].predictions.pairs
    seen = []
    built.distiller.terms["masks"].predictions.pairs = lambda *given: seen.append(pairs(*given)) or seen[-1]
    assert losses(built, raw)["distill.masks.loss"] > 0
    assert len(seen[0][0].student) == 3 + 2


@pytest.mark.parametrize("kind", ["Mask R-CNN", *BY_QUERIES])
def test_the_order_of_the_teachers_classes(teachers, tmp_path, kind):
    order = [3, 0, 1, 2, 9, 8, 4, 5, 7, 6]
    entry, checkpoint = teachers(kind)
    saved = torch.load(checkpoint, weights_only=True)
    for key, kernel in saved["state_dict"].items():
        if "conv_logits" in key:
            saved["state_dict"][key] = kernel[order]
        if key.startswith("panoptic_head.cls_embed"):
            saved["state_dict"][key] = kernel[[*order, 10]]
    saved["meta"]["dataset_meta"]["classes"] = [CLASSES[i] for i in order]
    torch.save(saved, tmp_path / "permuted.pth")
    results = []
    for path in (checkpoint, tmp_path / "permuted.pth"):
        learning = distilled(model(kind, frozen_bn=True), entry, str(path), terms=[TERM])
        if kind in BY_QUERIES:
            learning["train_cfg"]["assigner"]["match_costs"][0]["weight"] = 1e4  # classes decide the matching
        built = build(learning)
        built.start_distilling(CLASSES)
        results.append(losses(built, batch())["distill.masks.loss"].item())
    assert results[0] == pytest.approx(results[1], rel=1e-5) and results[0] > 0


@pytest.mark.parametrize("kind", WITH_MASKS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path, kind):
    entry = model(kind, frozen_bn=True)
    path = save_teacher(tmp_path / "teacher.pth", entry)
    built = build(distilled(entry, entry, path, terms=[TERM]))
    built.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    assert losses(built, batch(TWO))["distill.masks.loss"].item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", WITH_MASKS)
def test_no_objects_at_all_and_an_image_without_any(teachers, kind):
    built = taught(teachers(kind), kind)
    found = losses(built, batch(([], [])))
    empty = found["distill.masks.loss"]
    assert empty.item() == 0 and empty.requires_grad
    sum(loss for key, loss in found.items() if "loss" in key).backward()
    assert all(torch.isfinite(p.grad).all() for p in built.parameters() if p.grad is not None)
    assert set(built.distiller.dropped.values()) == {0}
    alone, both = (losses(built, batch(boxes))["distill.masks.loss"] for boxes in (TWO[:1], (TWO[0], [])))
    assert both.item() == pytest.approx(alone.item(), rel=1e-3) and alone > 0


@pytest.mark.parametrize("kind", WITH_MASKS)
def test_gradients_are_finite_under_autocast(teachers, monkeypatch, kind):
    in_single_precision(monkeypatch)
    built = taught(teachers(kind), kind)
    with torch.autocast("cpu", torch.bfloat16):
        found = losses(built, batch(TWO))
    assert found["distill.masks.loss"].dtype == torch.float32 and found["distill.masks.loss"] > 0
    found["distill.masks.loss"].backward()
    grads = gradients(built)
    assert all(g.isfinite().all() for g in grads.values()) and sum(float(g.abs().sum()) for g in grads.values()) > 0


@pytest.mark.parametrize("kind", WITH_MASKS)
def test_training_on_one_batch_makes_the_loss_fall(teachers, kind):
    built = taught(teachers(kind), kind, name="term")
    assert_falls(trained(lambda: losses(built, batch()), built.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Mask R-CNN", INSTANCES, "Mask2Former"])
def test_a_runner_trains_and_evaluates_on_files_with_masks(teachers, scenes, tmp_path, kind):
    folder = tmp_path / "scenes"
    shutil.copytree(scenes, folder)
    for file in (folder / "annotations").iterdir():
        found = json.loads(file.read_text())
        for one in found["annotations"]:
            x, y, w, h = one["bbox"]
            one["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        file.write_text(json.dumps(found))
    entry = distilled(model(kind, frozen_bn=True), *teachers(kind), terms=[TERM])
    config = runner_config(entry, str(folder), tmp_path / "work", iters=2)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset.pipeline[1].with_mask = True
    config.val_evaluator.metric = config.test_evaluator.metric = "segm"
    runner = run(config)
    values = history(runner, "distill.masks.loss")
    assert len(values) == 2 and all(0 < value < float("inf") for value in values)
    assert "coco/segm_mAP" in runner.val()


def test_several_teachers_draw_one_mask(teachers, tmp_path):
    entry, checkpoint = teachers("Mask R-CNN")
    learning = distilled(model("Mask R-CNN", frozen_bn=True), entry, checkpoint, terms=[{**TERM, "source": "both"}])
    del learning["teacher"]
    learning["teachers"] = dict(
        first=dict(config=entry, checkpoint=checkpoint),
        second=dict(config=entry, checkpoint=save_teacher(tmp_path / "second.pth", entry, seed=8)),
        both=dict(type="Ensemble", members=["first", "second"]),
    )
    learning["terms"] = [{**TERM, "source": one, "name": one} for one in learning["teachers"]]
    found = losses(build(learning), batch(TWO))
    first, second, both = (found[f"distill.{one}.loss"].item() for one in learning["teachers"])
    assert 0 < both < max(first, second) and first != second


@MODELS.register_module()
class DoubledMaskHead(FCNMaskHead):
    """A mask head with a forward pass of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def changed(**head):
    entry = staged("Mask R-CNN")
    entry["roi_head"]["mask_head"] |= head
    return entry


def shared():
    entry = staged("Mask R-CNN")
    entry["roi_head"]["mask_roi_extractor"] = None
    return entry


@pytest.mark.parametrize(
    ("student", "teacher", "term", "message"),
    [
        (detector(), detector(), {}, "compares masks of objects, and the student's GFLHead predicts none"),
        (staged("Faster R-CNN"), staged("Faster R-CNN"), {}, "the student's StandardRoIHead predicts none"),
        (changed(), staged("Faster R-CNN"), {}, "the teacher's StandardRoIHead predicts none"),
        (staged("Cascade R-CNN"), staged("Cascade R-CNN"), {}, "the student's CascadeRoIHead predicts none"),
        (changed(), staged(CASCADE_OF_MASKS), {}, "has 1 stages, the teacher's 2"),
        (zoo(INSTANCES), zoo("RTMDet"), {}, "the teacher's RTMDetSepBNHead predicts none"),
        (zoo(INSTANCES), changed(), {}, "has no bbox_head"),
        (by_queries("Mask2Former"), zoo(INSTANCES), {}, "has no panoptic_head"),
        (changed(), changed(num_classes=12), {}, "10 classes"),
        (
            changed(),
            changed(type="DoubledMaskHead"),
            {},
            "the teacher's DoubledMaskHead is not one that this term can read",
        ),
        (by_queries("Mask2Former"), by_queries("Mask2Former", stuff=2), {}, "predicts 10 classes, the teacher 12"),
        (
            by_queries("MaskFormer"),
            by_queries("MaskFormer"),
            dict(type="BoundedRegression", name="b"),
            "use InstanceMasks",
        ),
        (shared(), changed(), {}, "give the student a mask_roi_extractor"),
    ],
)
def test_what_does_not_compare_is_refused_in_one_line(student, teacher, term, message):
    with pytest.raises(WiringError) as caught:
        build(distilled(student, teacher, "nowhere.pth", terms=[term or TERM]))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(masks=0, dice=0), "leave nothing to compare"),
        (dict(masks=-1), "masks"),
        (dict(head="roi_head"), "takes no argument 'head'"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(DistillError, match=message) as caught:
        build(distilled(changed(), changed(), "nowhere.pth", terms=[{**TERM, **settings}]))
    assert "\n" not in str(caught.value)
