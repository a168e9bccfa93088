"""Vision transformers of Transformers, and modules of the user's, as teachers of detectors."""

from __future__ import annotations

import copy

import pytest
import torch

from kdgraft.errors import DistillError, WiringError
from kdgraft_det import ultralytics
from kdgraft_mm.configs import MissingConfig
from support.det import build, detector, distilled, losses, raw_batch, runner_config
from support.det_zoo import zoo
from support.mm import history, needs_resume, run, weights
from support.tensors import assert_same
from support.vits import CONFIGS, IMAGENET, by_file, by_folder, network

pytest.importorskip("transformers")

STUDENTS = {"GFL": lambda: detector(frozen_bn=True), "RTMDet": lambda: zoo("RTMDet", frozen_bn=True)}
COSINE = dict(type="ultralytics", scored=False)
MEANS = dict(type="module", build="support.vits:patch_means", patch=16)


def taught(student, teacher, **settings):
    return dict(distilled(student, None, "", **settings), teacher=copy.deepcopy(teacher))


def adapters(runner):
    return {key: value.clone() for key, value in runner.model.distiller.terms.state_dict().items()}


# --- what the student hears


@pytest.mark.parametrize("own", [dict(**IMAGENET), dict(mean=[9.0] * 3, std=[51.0] * 3, pixel_range=255, order="bgr")])
def test_each_position_hears_the_mean_of_its_patch_of_the_loaded_image(own):
    found = []

    def loss(student, teacher, dim=1, reduction="none"):
        found.append(teacher)
        return (student - teacher).square().mean(dim)

    term = dict(type="FeatureImitation", tap="neck[1]", loss=loss)  # stride 16
    model = build(taught(detector(), {**MEANS, **own}, terms=[term]))
    batch = raw_batch(sizes=[(96, 96), (96, 48), (64, 96), (48, 80)])  # a padded batch of 96×96, in BGR
    found.clear()
    losses(model, batch)
    (heard,) = found
    assert heard.shape == (4, 3, 6, 6)
    unit = own.get("pixel_range", 1) / 255
    for image, pixels in enumerate(batch["inputs"]):
        height, width = pixels.shape[1:]
        for row in range(6):
            for column in range(6):
                if row * 16 + 8 >= height or column * 16 + 8 >= width:  # padding
                    assert not heard[image, :, row, column].any()
                    continue
                patch = pixels[:, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16].float() * unit
                if own.get("order") != "bgr":
                    patch = patch.flip(0)
                expected = (patch.mean((1, 2)) - torch.tensor(own["mean"])) / torch.tensor(own["std"])
                torch.testing.assert_close(heard[image, :, row, column], expected, rtol=1e-4, atol=1e-4)


def test_the_padding_changes_neither_loss_nor_gradient(tmp_path):
    # The values at positions of the padding are those of a second batch, in which these positions of the ViT hear other things.
    model = build(taught(STUDENTS["GFL"](), by_file(tmp_path / "vit.pth"), recipe=COSINE))
    extractor = model.distiller.teacher.model
    batch, found = raw_batch(sizes=[(96, 48)] * 4), []
    original = extractor.on_grid
    for shift in (0.0, 7.0, float("inf")):

        def shifted(features, shift=shift):
            maps = original(features).clone()
            maps[..., 3:] += shift
            return maps

        extractor.on_grid = shifted
        loss = losses(model, batch)["distill.ultralytics.loss"]
        model.zero_grad()
        loss.backward()
        found.append({"loss": loss.detach(), "gradient": model.backbone.conv1.weight.grad.clone()})
    assert found[0]["loss"] > 0 and found[0]["gradient"].any()
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def test_it_is_what_the_library_gives_for_its_own_images(tmp_path):
    # The processor's own arithmetic on RGB images without padding: (pixel/255 - mean)/std.
    found = []

    def loss(student, teacher, dim=1, reduction="none"):
        found.append(teacher)
        return (student - teacher).square().mean(dim)

    term = dict(type="FeatureImitation", tap="neck[1]", loss=loss)
    states = dict(term, teacher_tap="hidden_states[1]", name="states")
    layer = dict(term, teacher_tap="model.layer[0]", name="layer")  # the network's own name for the same
    model = build(taught(detector(), by_file(tmp_path / "vit.pth"), terms=[term, states, layer]))
    batch, vit = raw_batch(), network("DINOv3")
    found.clear()
    losses(model, batch)
    pixels = torch.stack(batch["inputs"]).flip(1) / 255
    mean, std = (torch.tensor(IMAGENET[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        out = vit(pixel_values=(pixels - mean) / std, output_hidden_states=True)
    for heard, tokens in zip(found, (out.last_hidden_state, out.hidden_states[1], out.hidden_states[1]), strict=True):
        expected = tokens[:, 1 + CONFIGS["DINOv3"]["num_register_tokens"] :].transpose(1, 2).reshape(4, 16, 6, 6)
        torch.testing.assert_close(heard, expected, rtol=1e-3, atol=1e-4)


# --- training


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("student", STUDENTS)
def test_a_vit_teaches_a_pyramid(tmp_path, student, kind):
    model = build(
        taught(STUDENTS[student](), by_file(tmp_path / "vit.pth", kind), recipe="rtdetrv4", terms=ultralytics(False))
    )
    assert [(row.term, row.teacher_tap, row.teacher_shape) for row in model.distiller.rows] == [
        ("rtdetrv4", "last", "1×16×8×8"),
        *[("ultralytics", "last", "1×16×8×8")] * 3,
    ]
    names = ("distill.rtdetrv4.loss", "distill.ultralytics.loss")
    batch = raw_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = dict(copy.deepcopy(model.distiller.teacher.model.state_dict()))
    course = []
    for _ in range(4):
        found = losses(model, batch)
        optimizer.zero_grad()
        loss = sum(found[name] for name in names)
        loss.backward()
        optimizer.step()
        course.append(loss.item())
    assert course[-1] < course[0] and model.backbone.conv1.weight.grad.any()
    assert_same(dict(model.distiller.teacher.model.state_dict()), before)


def test_the_recipes_have_the_published_weights():
    (term,) = ultralytics()
    assert (term["type"], term["weight"]) == ("ScoredImitation", 6.0)
    (term,) = ultralytics(scored=False, schedule="WarmUp")
    assert (term["loss"], term["adapter"], term["weight"], term["schedule"]) == ("cosine", "mlp", 3 * 6.0, "WarmUp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return by_folder(tmp_path_factory.mktemp("dinov3"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, scenes, folder):
    """GFL under a DINOv3 from its folder: 4 iterations, checkpoints after 2 and 4."""
    work_dir = tmp_path_factory.mktemp("run")
    entry = taught(detector(), folder, recipe="rtdetrv4", terms=ultralytics(False))
    return entry, run(runner_config(entry, scenes, work_dir)), work_dir


def test_a_runner_trains_a_plain_student(trained, plain_run, folder):
    _, runner, work_dir = trained
    assert min(history(runner, "distill.ultralytics.loss")) > 0
    saved = torch.load(work_dir / "iter_4.pth", weights_only=False)["state_dict"]
    assert list(saved) == list(plain_run.runner.model.state_dict())
    vit = runner.model.distiller.teacher.model.network
    assert_same(dict(vit.state_dict()), dict(network("DINOv3").state_dict()))  # read from the folder, and never changed
    assert not vit.training and not any(parameter.requires_grad for parameter in vit.parameters())


@needs_resume
def test_kill_and_resume_makes_no_difference(tmp_path, scenes, trained):
    entry, whole, work_dir = trained
    resumed = run(runner_config(entry, scenes, tmp_path, resume=True, load_from=str(work_dir / "iter_2.pth")))
    assert_same(weights(resumed), weights(whole))
    assert_same(adapters(resumed), adapters(whole))


@pytest.mark.parametrize("precision", ["inherit", "fp32"])
def test_mixed_precision(tmp_path, scenes, folder, trained, precision, monkeypatch):
    # mmengine's wrapper refuses to start without a GPU; what it then does works on a CPU too.
    monkeypatch.setattr("mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available", lambda: True)
    entry = {**trained[0], "teacher": {**folder, "precision": precision}}
    wrapper = dict(type="AmpOptimWrapper", dtype="bfloat16", optimizer=dict(type="SGD", lr=0.01, momentum=0.9))
    runner = run(runner_config(entry, scenes, tmp_path, iters=2, optim_wrapper=wrapper))
    for name in ("distill.rtdetrv4.loss", "distill.ultralytics.loss"):
        assert history(runner, name)[0] == pytest.approx(history(trained[1], name)[0], rel=0.02)
    assert not any(runner.model.distiller.dropped.values())


def test_a_teacher_at_twice_the_resolution(tmp_path):
    model = build(taught(detector(), {**by_file(tmp_path / "vit.pth"), "scale": 2.0}, recipe=COSINE))
    assert losses(model, raw_batch())["distill.ultralytics.loss"] > 0
    assert model.distiller.teacher.model.grid == (8, 8)  # 128×128 pixels, for a student of 64×64


def test_it_teaches_beside_a_detector(tmp_path, teacher_model, teacher_checkpoint):
    teachers = dict(
        vit=by_file(tmp_path / "vit.pth"),
        wide=dict(config=teacher_model, checkpoint=teacher_checkpoint),
        both=dict(type="Ensemble", members=["vit", "wide"]),
    )
    terms = [dict(type="SoftTargets", source="wide"), dict(type="FeatureImitation", tap="neck[*]", source="both")]
    entry = distilled(detector(), None, "", terms=terms)
    del entry["teacher"]
    found = losses(build(dict(entry, teachers=teachers)), raw_batch())
    names = [key for key in found if key.startswith("distill.")]
    assert names == [
        "distill.soft_targets.loss",
        "distill.feature_imitation_from_vit.loss",
        "distill.feature_imitation_from_wide.loss",
    ]
    assert all(found[name] > 0 for name in names)


def test_regions_of_the_student_weigh_its_positions(tmp_path):
    terms = [
        dict(type="FeatureImitation", tap="neck[*]", region=region, name=region)
        for region in ("foreground", "fine_grained")
    ]
    found = losses(build(taught(detector(), by_file(tmp_path / "vit.pth"), terms=terms)), raw_batch())
    assert found["distill.foreground.loss"] > 0 and found["distill.fine_grained.loss"] > 0


# --- what is refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            dict(terms=[dict(type="SoftTargets")]),
            "a SoftTargets reads predictions or weights, and 'teacher', a DINOv3ViTModel",
        ),
        (dict(recipe="ld"), "ld_main: a LocalizationDistillation reads predictions"),
        (dict(recipe="crosskd"), "a CrossHead reads predictions"),
        (dict(recipe="bckd"), "a BCKD reads predictions"),
        (dict(terms=[dict(type="BoundedRegression")]), "a BoundedRegression reads predictions"),
        (dict(recipe="ultralytics"), "a ScoredImitation reads predictions"),
        (
            dict(recipe="rtdetrv4", inherit="neck"),
            "inherit takes weights from a model of the host, and 'teacher' is a DINOv3ViTModel",
        ),
        (
            dict(terms=[dict(type="FeatureImitation", tap="neck[*]", teacher_tap="neck[*]")]),
            r"the teacher has no module 'neck'",
        ),
        (
            dict(terms=[dict(type="FeatureImitation", tap="neck[*]", teacher_tap=["last", "last"])]),
            r"yields 3 tensors .* 2 ",
        ),
    ],
)
def test_what_a_teacher_of_features_does_not_have_is_refused(tmp_path, settings, said):
    with pytest.raises(WiringError, match=said) as caught:
        build(taught(detector(), by_file(tmp_path / "vit.pth"), **settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(mean=None), "teacher needs its normalisation, mean=… and std=…"),
        (dict(checkpoint=None), "teacher needs checkpoint=…, the file of its weights"),
        (dict(config="a.py"), "teacher, of type 'transformers', takes no argument 'config'"),
        (dict(type="transformer"), r"no source has the type 'transformer'; did you mean 'transformers'"),
        (dict(model=dict(hidden_size=3)), "needs its model_type"),
        (dict(model=dict(model_type="bert")), "a BertModel reads input_ids, no images"),
        (dict(model=dict(model_type="nothing")), "cannot be built"),
        (dict(scale=0.5), "scale must be a number from 1 to 16"),
    ],
)
def test_a_teacher_that_means_nothing_is_refused(tmp_path, change, said):
    spec = {**by_file(tmp_path / "vit.pth"), **change}
    if change == dict(mean=None):
        del spec["mean"], spec["std"]
    with pytest.raises(DistillError, match=said) as caught:
        build(taught(detector(), spec, recipe="rtdetrv4"))
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_processor_or_with_other_weights_is_refused(tmp_path):
    spec = by_folder(tmp_path)
    with pytest.raises(DistillError, match="has its weights; leave checkpoint out"):
        build(taught(detector(), {**spec, "checkpoint": "a.pth"}, recipe="rtdetrv4"))
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(DistillError, match="needs its normalisation"):
        build(taught(detector(), spec, recipe="rtdetrv4"))
    spec |= IMAGENET
    assert build(taught(detector(), spec, recipe="rtdetrv4")).distiller.teacher.loaded
    weights = {key: value for key, value in network("DINOv3").state_dict().items() if "norm.weight" not in key}
    network("DINOv3").save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(DistillError, match=r"does not fit the teacher DINOv3ViTModel; 1 missing: norm\.weight"):
        build(taught(detector(), spec, recipe="rtdetrv4"))


def test_a_missing_folder_matters_only_in_training(tmp_path):
    entry = taught(detector(), dict(type="transformers", model=str(tmp_path / "none")), recipe="rtdetrv4")
    with pytest.raises(MissingConfig, match="download the model and give its folder"):
        build(entry)  # init_weights, with which training begins
    from mmdet.registry import MODELS

    model = MODELS.build(copy.deepcopy(entry)).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64), mode="tensor")
