"""A teacher at its own input resolution: the student's half of the view, the teacher's whole one, and the host's own loop."""

from __future__ import annotations

import copy
from typing import Any

import mmcv
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner
from mmengine.structures import PixelData

from kdgraft.cli import main
from kdgraft.errors import DistillError, WiringError
from kdgraft.regions import foreground_weights
from kdgraft_mm.configs import load_config
from support.det import BOXES, build, detector, distilled, losses, predictions, raw_batch, runner_config, save_teacher
from support.det_stages import detr, staged
from support.mm import history, run
from support.tensors import assert_same, gradients

FEATURES = dict(terms=[dict(type="FeatureImitation", tap="neck[*]", region="foreground")])
KEY = "distill.feature_imitation.loss"
SIZES = [(192, 192), (128, 192), (192, 130), (141, 149)]
LARGE = [[[2 * value for value in box] for box in image] for image in BOXES]


def scaled(student: dict[str, Any], teacher: dict[str, Any], checkpoint: str, scale: Any = 2.0, **settings: Any) -> Any:
    """The ``model`` entry of a distilled detector whose teacher has a resolution of its own."""
    entry = distilled(student, teacher, checkpoint, **(settings or FEATURES))
    entry["teacher"]["scale"] = scale
    return entry


@pytest.fixture(scope="module")
def teacher_of_its_own() -> dict[str, Any]:
    """Another normalisation, channel order and padding than the student's."""
    teacher = detector(width=6, channels=12)
    teacher["data_preprocessor"].update(mean=[100.0, 110.0, 120.0], std=[50.0, 60.0, 70.0], bgr_to_rgb=False)
    teacher["data_preprocessor"].update(pad_value=3, pad_size_divisor=64)
    return teacher


@pytest.fixture(scope="module")
def entry(tmp_path_factory, teacher_of_its_own):
    checkpoint = save_teacher(tmp_path_factory.mktemp("own") / "teacher.pth", teacher_of_its_own)
    return scaled(detector(frozen_bn=True), teacher_of_its_own, checkpoint)


def delivered(model, batch):
    """What the host's ``data_preprocessor`` hands to the model."""
    return model.data_preprocessor(copy.deepcopy(batch), True)


def reduced(model, data):
    return model._reduced(data["inputs"], data["data_samples"], model.distill_context.resolution)


def smooth(height: int, width: int) -> np.ndarray:
    """An image of slow waves, uint8."""
    y, x = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
    waves = [np.sin(2 * np.pi * (a * x + b * y)) for a, b in ((1, 0.5), (0.5, 1), (1, 1))]
    return (127 + 100 * np.stack(waves, -1)).round().astype(np.uint8)


# --- the student's batch


def test_it_is_what_the_hosts_own_pipeline_makes_at_half_the_size(tmp_path, scenes, entry):
    found = []
    for size in ((192, 160), (96, 80)):
        config = runner_config(entry, scenes, tmp_path)
        config.train_dataloader.dataset.pipeline[2].scale = size
        found.append(next(iter(Runner.build_dataloader(config.train_dataloader))))
    model = build(entry)
    large, small = (delivered(model, batch) for batch in found)
    inputs, samples = reduced(model, large)
    assert inputs.shape == small["inputs"].shape == (4, 3, 96, 96)  # 80 × 80 in 96 × 96
    for ours, theirs in zip(samples, small["data_samples"], strict=True):
        torch.testing.assert_close(ours.gt_instances.bboxes, theirs.gt_instances.bboxes, rtol=1e-6, atol=0)
        assert torch.equal(ours.gt_instances.labels, theirs.gt_instances.labels)
        assert ours.metainfo.keys() == theirs.metainfo.keys()
        assert ours.scale_factor == pytest.approx(theirs.scale_factor)
        for key in ("img_shape", "pad_shape", "batch_input_shape", "ori_shape", "img_id"):
            assert getattr(ours, key) == getattr(theirs, key), key
    # Scenes have pixels of noise, so that they agree up to the interpolation alone; what is padding agrees exactly.
    assert (inputs - small["inputs"]).abs().mean() < 0.15 * small["inputs"].abs().mean()
    assert torch.equal(inputs[..., 80:, :], small["inputs"][..., 80:, :])


def test_pixels_of_a_smooth_image_are_those_of_the_hosts_resize(entry):
    model = build(entry)
    images = [smooth(height, width) for height, width in ((192, 192), (128, 192), (192, 130), (140, 150))]
    halves = [mmcv.imresize(image, (image.shape[1] // 2, image.shape[0] // 2)) for image in images]
    batches = []
    for given in (images, halves):
        batch = raw_batch([[]] * 4, [image.shape[:2] for image in given])
        batch["inputs"] = [torch.from_numpy(image).permute(2, 0, 1) for image in given]
        batches.append(delivered(model, batch))
    inputs, _ = reduced(model, batches[0])
    assert inputs.shape == batches[1]["inputs"].shape
    # In units of the standard deviation, 57 grey levels: within one inside, where uint8 alone rounds by half of one, and
    # within three at an image's border, where the filters differ.
    torch.testing.assert_close(inputs, batches[1]["inputs"], rtol=0, atol=3 / 57)
    for ours, theirs, image in zip(inputs, batches[1]["inputs"], halves, strict=True):
        inner = (slice(None), slice(1, image.shape[0] - 1), slice(1, image.shape[1] - 1))
        torch.testing.assert_close(ours[inner], theirs[inner], rtol=0, atol=1 / 57)


def test_the_hosts_samples_stay_as_they_are_and_the_students_are_new(entry):
    model = build(entry).train()
    data = delivered(model, raw_batch(LARGE, SIZES))
    before, inputs = copy.deepcopy(data["data_samples"]), data["inputs"].clone()
    model(**data, mode="loss")
    assert torch.equal(data["inputs"], inputs)
    for now, then in zip(data["data_samples"], before, strict=True):
        assert now.metainfo == then.metainfo
        assert torch.equal(now.gt_instances.bboxes, then.gt_instances.bboxes)
        assert torch.equal(now.gt_instances.labels, then.gt_instances.labels)
    _, samples = reduced(model, data)
    for ours, theirs, boxes in zip(samples, data["data_samples"], BOXES, strict=True):
        assert ours is not theirs and ours.gt_instances is not theirs.gt_instances
        assert ours.gt_instances.bboxes.tolist() == boxes


def test_boxes_of_a_class_of_their_own(entry):
    # Hosts with boxtype2tensor=False.
    model = build(entry)
    data = delivered(model, raw_batch(LARGE, SIZES))
    given = data["data_samples"][0].gt_instances
    given.bboxes = HorizontalBoxes(given.bboxes)
    boxes = reduced(model, data)[1][0].gt_instances.bboxes
    assert isinstance(boxes, HorizontalBoxes) and boxes.tensor.tolist() == BOXES[0]
    assert given.bboxes.tensor.tolist() == LARGE[0]


def test_what_is_not_an_annotation_of_places_is_kept(entry):
    model = build(entry)
    data = delivered(model, raw_batch(LARGE, SIZES))
    sample = data["data_samples"][2]
    sample.ignored_instances = sample.gt_instances.new()
    sample.gt_sem_seg = PixelData(sem_seg=torch.arange(192 * 130).reshape(1, 192, 130))
    sample.set_metainfo(dict(flip=True, scale_factor=np.array([0.5, 0.25, 0.5, 0.25])))
    small = reduced(model, data)[1][2]
    assert small.flip and small.img_id == 2 and small.scale_factor == (0.25, 0.125, 0.25, 0.125)
    assert torch.equal(small.ignored_instances.bboxes, sample.ignored_instances.bboxes / 2)
    assert torch.equal(small.gt_sem_seg.sem_seg, sample.gt_sem_seg.sem_seg[:, 1::2, 1::2])


# --- masks

TRIANGLE = np.array([20.0, 10.0, 60.0, 10.0, 20.0, 50.0])


@pytest.fixture(scope="module")
def mask_detector():
    """A small Mask R-CNN, whose preprocessor pads masks."""
    base = load_config("mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py").model
    base.backbone.update(init_cfg=None, depth=18, base_channels=8, stem_channels=8, norm_eval=True, frozen_stages=-1)
    base.neck.update(in_channels=[8, 16, 32, 64], out_channels=8)
    base.rpn_head.update(in_channels=8, feat_channels=8)
    base.roi_head.bbox_roi_extractor.out_channels = base.roi_head.mask_roi_extractor.out_channels = 8
    base.roi_head.bbox_head.update(in_channels=8, fc_out_channels=16)
    base.roi_head.mask_head.update(in_channels=8, conv_out_channels=8)
    return Config(dict(model=base)).model.to_dict()


def masks_of(kind, size):
    if kind == "polygon":
        return PolygonMasks([[TRIANGLE], [TRIANGLE + 20, TRIANGLE + 40]], *size)
    return BitmapMasks(np.stack([np.pad(np.ones((8, 10)), ((4, size[0] - 12), (6, size[1] - 16)))] * 2), *size)


@pytest.mark.parametrize("kind", ["polygon", "bitmap"])
def test_a_mask_detector_trains_on_masks_of_its_own_size(tmp_path, mask_detector, kind):
    checkpoint = save_teacher(tmp_path / "teacher.pth", mask_detector)
    model = build(scaled(mask_detector, mask_detector, checkpoint)).train()
    batch = raw_batch([LARGE[1], LARGE[1]], [(192, 192), (141, 149)])
    for sample in batch["data_samples"]:
        sample.gt_instances.masks = masks_of(kind, sample.img_shape)
    data = delivered(model, batch)
    given = copy.deepcopy(data["data_samples"][1].gt_instances.masks)
    found = model(**data, mode="loss")
    assert found["loss_mask"] > 0 and found[KEY] > 0
    inputs, samples = reduced(model, data)
    small, kept = samples[1].gt_instances.masks, data["data_samples"][1].gt_instances.masks
    assert inputs.shape[-2:] == (96, 96) and (small.height, small.width) == (96, 96)
    assert type(small) is type(kept) and (kept.height, kept.width) == (192, 192)
    if kind == "polygon":
        assert np.array_equal(small.masks[1][1], (TRIANGLE + 40) / 2)
        assert np.array_equal(kept.masks[1][1], given.masks[1][1])
    else:
        expected = np.pad(np.ones((4, 5)), ((2, 96 - 6), (3, 96 - 8)))
        assert np.array_equal(small.masks, np.stack([expected] * 2)) and small.masks.dtype == kept.masks.dtype
        assert np.array_equal(kept.masks, given.masks)


# --- what the models see


def test_the_teacher_sees_the_whole_view_in_its_own_normalisation(entry, teacher_of_its_own):
    model = build(entry)
    seen: dict[str, Any] = {}
    for name, owner in (("student", model), ("teacher", model.distiller.teacher.model)):
        owner.backbone.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].clone()}))
    batch = raw_batch(LARGE, SIZES)
    losses(model, batch)
    theirs = MODELS.build(teacher_of_its_own["data_preprocessor"])(copy.deepcopy(batch), True)["inputs"]
    assert theirs.shape == (4, 3, 192, 192)
    torch.testing.assert_close(seen["teacher"], theirs, rtol=1e-5, atol=1e-4)
    assert torch.equal(seen["student"], reduced(model, delivered(model, batch))[0])


def test_the_padded_inputs_correspond(entry):
    # The teacher's 130 × 130 would be padded to 192 × 192; the student's 65 × 65 is to 96 × 96, half of which it is.
    model = build(entry)
    shapes: list[Any] = []
    model.distiller.teacher.model.backbone.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[2:]))
    model.backbone.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[2:]))
    for size, small in (((130, 130), (96, 96)), ((100, 66), (64, 64)), ((60, 132), (32, 96))):
        shapes.clear()
        losses(model, raw_batch([[]], [size]))
        assert shapes == [(2 * small[0], 2 * small[1]), small]


def test_the_hosts_losses_are_those_of_the_reduced_batch(entry):
    model, plain = build(entry), build(detector(frozen_bn=True))
    plain.load_state_dict(model.state_dict())
    inputs, samples = reduced(model, delivered(model, raw_batch(LARGE, SIZES)))
    expected = plain.train()(inputs, samples, mode="loss")
    found = losses(model, raw_batch(LARGE, SIZES))
    assert {key: found[key].item() for key in expected} == {
        key: sum(v.mean() for v in value).item() for key, value in expected.items()
    }
    sum(value for name, value in found.items() if "loss" in name).backward()
    assert any("feature_imitation" in name and g.abs().sum() > 0 for name, g in gradients(model).items())


def test_terms_get_the_batch_in_the_students_pixels(entry):
    model = build(entry)
    seen: list[Any] = []
    term = model.distiller.terms["feature_imitation"]
    term.register_forward_pre_hook(lambda _, args: seen.append(args))
    losses(model, raw_batch(LARGE, SIZES))
    (_, teacher, batch), *_ = seen
    assert batch.padded_size == (96, 96) and batch.image_sizes == [(96, 96), (64, 96), (96, 65), (71, 75)]
    assert [boxes.tolist() for boxes in batch.boxes] == [list(map(list, image)) for image in BOXES]
    assert teacher.scale == 2.0
    # On the teacher's own map the first image's box, 16, 20, 88, 100 of its pixels, touches columns 2 to 10, rows 2 to 12.
    first = teacher.tensors(term.teacher_taps[0])[0]
    assert first.shape[2:] == (24, 24)
    weights = foreground_weights(batch.boxes, batch.padded_size, first)[0]
    expected = torch.zeros(24, 24)
    expected[2:13, 2:11] = 1 / 99
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("scale", [1, 1.0, None])
def test_a_scale_of_one_is_no_scale(teacher_model, teacher_checkpoint, scale):
    plain = distilled(detector(), teacher_model, teacher_checkpoint, **FEATURES)
    other = copy.deepcopy(plain)
    other["teacher"].update({} if scale is None else dict(scale=scale))
    found = []
    for one in (plain, other):
        model, seen = build(one), []
        for owner in (model, model.distiller.teacher.model):
            owner.backbone.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        data = delivered(model.train(), raw_batch())
        result = model(**data, mode="loss")
        assert all(inputs is data["inputs"] for inputs in seen) and len(seen) == 2  # the very same tensor
        found.append(result[KEY].detach())
    assert torch.equal(*found)


# --- the host's loop


def test_it_trains_in_the_hosts_loop_and_saves_a_plain_student(tmp_path, scenes, entry):
    config = runner_config(entry, scenes, tmp_path, iters=3)
    config.train_dataloader.dataset.pipeline[2].scale = (192, 192)
    config.train_cfg.val_interval = 3
    runner = run(config)
    assert all(np.isfinite(history(runner, name)).all() for name in ("loss", KEY))
    assert history(runner, KEY)[0] > 0
    saved = torch.load(tmp_path / "iter_2.pth", weights_only=False)["state_dict"]
    build(detector(frozen_bn=True)).load_state_dict(saved, strict=True)

    # Inference, with and without ground truth beside, takes images as they come.
    plain = build(detector(frozen_bn=True))
    plain.load_state_dict(runner.model.state_dict(), strict=True)
    ours, theirs = predictions(runner.model, raw_batch()), predictions(plain, raw_batch())
    assert all(torch.equal(a, b) and len(a) for a, b in zip(ours, theirs, strict=True))
    data = delivered(plain, raw_batch())
    with torch.no_grad():
        found = [model.eval()(**copy.deepcopy(data), mode="loss") for model in (runner.model, plain)]
    assert_same(*({key: torch.stack(value) for key, value in one.items()} for one in found))


def test_statistics_without_gradients_are_of_the_students_size(entry):
    # As hooks do that average batch norm over training batches.
    model = build(entry).train()
    shapes: list[Any] = []
    model.backbone.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[2:])))
    with torch.no_grad():
        losses(model, raw_batch(LARGE, SIZES))
    assert shapes == [(96, 96)]


def test_check_shows_the_true_shapes(tmp_path, scenes, entry, capsys):
    path = tmp_path / "config.py"
    runner_config(entry, scenes, tmp_path / "work").dump(path)
    assert main(["check", str(path)]) == 0
    said = capsys.readouterr().out
    for cell in ("1×8×16×16", "1×12×32×32", "ConvAdapter 8→12, resize"):
        assert cell in said
    build(detector())  # the log that check leaves behind is none that a model built later writes to


# --- mistakes


@pytest.mark.parametrize("scale", [0, -2.0, 0.5, "2", True, [2]])
def test_no_scale(teacher_model, scale):
    with pytest.raises(DistillError, match=r"^teacher: scale must be a number from 1 to 16 .*, got .*$"):
        MODELS.build(ConfigDict(scaled(detector(), teacher_model, "absent.pth", scale)))


@pytest.mark.parametrize("term", ["SoftTargets", "LocalizationDistillation", "BoundedRegression", "CrossHead"])
def test_predictions_of_two_grids_cannot_be_compared(teacher_model, term):
    with pytest.raises(WiringError, match=r"with the teacher's scale=1\.5 the two grids differ; leave scale out"):
        MODELS.build(ConfigDict(scaled(detector(), teacher_model, "absent.pth", 1.5, terms=[dict(type=term)])))


def test_without_terms_nothing_would_reduce_the_student(teacher_model):
    with pytest.raises(DistillError, match="leave scale out and resize in the pipeline"):
        MODELS.build(ConfigDict(scaled(detector(), teacher_model, "absent.pth", terms=[])))


@pytest.mark.parametrize("kind", ["DeformableDETR", "Faster R-CNN"])
def test_predictions_that_stand_for_no_grid_work_with_it(tmp_path, kind):
    def entry(**settings):
        return detr(**settings) if kind == "DeformableDETR" else staged(kind, **settings)

    other = entry(width=6)
    teacher = save_teacher(tmp_path / "teacher.pth", other)
    terms = [dict(type="SoftTargets"), dict(type="BoundedRegression", margin=1e6)]
    model = build(scaled(entry(frozen_bn=True), other, teacher, terms=terms))
    found = losses(model, raw_batch(LARGE, sizes=[(192, 192)] * 4))
    for name in ("soft_targets", "bounded_regression"):
        assert torch.isfinite(found[f"distill.{name}.loss"]) and found[f"distill.{name}.loss"] > 0
