"""Recipe files of detectors: sets in COCO's format, their batches, trainings from the command line, and average precision."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from PIL import Image

from kdgraft import DistillError
from kdgraft.cli import main
from kdgraft_nlp.coco import read_coco
from kdgraft_nlp.detection import average_precision, detections
from kdgraft_nlp.run import build
from support import coco, detectors
from support import nlp as support
from support.coco import ORDER, recipe, written
from support.tensors import assert_same

pytest.importorskip("pycocotools")
TERMS = ["SoftTargets", "MatchedBoxes"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return written(tmp_path_factory.mktemp("set"))


def saved(folder, config, name="recipe.yaml"):
    (folder / name).write_text(yaml.safe_dump(config))
    return str(folder / name)


def annotations(root, split="train"):
    return root / "annotations" / f"instances_{split}.json"


# --- reading


def test_a_set_is_read_image_by_image(root):
    found, told = read_coco(annotations(root)), json.loads(annotations(root).read_text())
    assert len(found) == 16 and found.features["classes"].feature.names == list(ORDER)
    for row, image in zip(found, told["images"], strict=True):
        own = [one for one in told["annotations"] if one["image_id"] == image["id"]]
        assert row["image"] == str(root / "train" / image["file_name"])
        assert row["boxes"] == [one["bbox"] for one in own] and row["area"] == [one["area"] for one in own]
        assert [coco.IDS[ORDER[kind]] for kind in row["classes"]] == [one["category_id"] for one in own]


def test_images_lie_where_data_says(root, tmp_path):
    copy = tmp_path / "boxes.json"
    shutil.copy(annotations(root), copy)
    with pytest.raises(DistillError, match=r"the images of .* are not in .*; name their folder with data\.images"):
        read_coco(copy)
    assert read_coco(copy, root / "train")["image"] == read_coco(annotations(root))["image"]
    folders = dict(train=str(root / "train"), eval=str(root / "val"))
    trainer = build(recipe(root, tmp_path / "out", data=dict(train=str(copy), images=folders)))
    assert trainer.train_dataset["image"][0] == str(root / "train" / "0.png")
    assert trainer.eval_dataset["image"][0] == str(root / "val" / "0.png")


def broken(change):
    def write(root):
        found = json.loads(annotations(root).read_text())
        change(found)
        annotations(root).write_text(json.dumps(found))

    return write


def of(part, number=1, **values):
    return broken(lambda found: found[part][number].update(values))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: annotations(root).write_text('{"images": ['), r"instances_train.json is no json: "),
        (lambda root: annotations(root).write_text("[1]"), r"not in COCO's format: it has no list of images, nor of anno"),
        (broken(lambda found: found.pop("categories")), r"not in COCO's format: it has no list of categories"),
        (broken(lambda found: found["images"].clear()), r"instances_train.json holds no images"),
        (broken(lambda found: found["categories"].clear()), r"instances_train.json has no categories"),
        (broken(lambda found: found["annotations"].clear()), r"the train set has no boxes"),
        (broken(lambda found: found["images"][2].pop("width")), r"image 2 must have id, file_name, width and height; got"),
        (of("images", id=100), r"image 1 has the id 100, which another image has"),
        (of("images", height="48"), r"image 1: height must be a number of pixels, got '48'"),
        (of("images", file_name="7.jpg"), r"1 of the 16 images of .* are not there, the first is .*7\.jpg; name their folder"),
        (of("images", width=79, height=64), r"has 64×64 pixels, and its set says 79×64, to which its boxes belong"),
        (broken(lambda found: found["annotations"][3].pop("bbox")), r"annotation 3 must have image_id, category_id and bb"),
        (of("annotations", image_id=5), r"annotation 1 has image_id 5, which is not an id of images"),
        (of("annotations", category_id=1), r"annotation 1 has category_id 1, which is not an id of categories"),
        (of("annotations", bbox=[1, 2, 3]), r"annotation 1: bbox must be \[x, y, width, height\] in pixels, got \[1, 2, 3\]"),
        (of("annotations", bbox=[1, 2, -3, 4]), r"annotation 1: bbox must be"),
        (of("annotations", bbox=[1, 2, None, 4]), r"annotation 1: bbox must be"),
        (of("categories", id=7), r"two categories have the id 7"),
        (of("categories", name="red"), r"two categories have the name 'red'"),
        (of("categories", id="x"), r"the ids of categories are numbers and texts"),
        (of("categories", name="grene"), r"the eval set has the class 'green'.*mean 'grene'.*which the training set lacks"),
        (lambda root: (root / "train" / "1.png").write_bytes(b"no image"), r"cannot read the image .*1\.png: "),
    ],
)  # fmt: skip
def test_sets_that_are_refused(change, said, root, tmp_path):
    mine = tmp_path / "set"
    shutil.copytree(root, mine)
    change(mine)
    if "two categories" in said or "numbers and texts" in said:
        found = json.loads(annotations(mine).read_text())
        annotations(mine).write_text(json.dumps({**found, "annotations": []}))
    with pytest.raises(DistillError, match=said) as caught:
        list(build(recipe(mine, tmp_path / "out")).get_train_dataloader())
    assert "\n" not in str(caught.value)


# --- batches


@pytest.mark.parametrize("family", coco.FAMILIES)
def test_boxes_of_a_batch_by_hand(root, tmp_path, family):
    trainer = build(recipe(root, tmp_path / "out", family))
    rows = [trainer.train_dataset[i] for i in (0, 1)]  # of 80×48 and 64×64 pixels
    batch = trainer.data_collator(rows)
    padded = family == "detr"
    # 80×48 stays as it is and 64×64 becomes 48×48, or both become 64×64.
    sizes, whole = ([(48, 80), (48, 48)], (48, 80)) if padded else ([(64, 64)] * 2, (64, 64))
    assert batch["pixel_values"].shape == (2, 3, *whole)
    for row, size, label, place in zip(rows, sizes, batch["labels"], (0, 1), strict=True):
        x, y, w, h = torch.tensor(row["boxes"]).T
        shares = torch.stack(
            [(x + w / 2) / row["width"], (y + h / 2) / row["height"], w / row["width"], h / row["height"]], 1
        )
        inside = torch.tensor([size[0] / whole[0], size[1] / whole[1]])
        torch.testing.assert_close(label["boxes"], (shares * inside.flip(0).repeat(2)).float(), atol=1e-6, rtol=0)
        torch.testing.assert_close(label["inside"], inside)
        assert label["class_labels"].tolist() == row["classes"] and label["number"] == place
        if padded:
            mask = batch["pixel_mask"][place]
            assert mask.sum() == size[0] * size[1] and mask[: size[0], : size[1]].all()
    assert ("pixel_mask" in batch) == padded


def test_a_crowd_is_no_object_to_learn(root, tmp_path):
    mine = tmp_path / "set"
    shutil.copytree(root, mine)
    of("annotations", 1, iscrowd=1)(mine)
    trainer = build(recipe(mine, tmp_path / "out"))
    rows = [trainer.train_dataset[i] for i in (1,)]
    assert len(rows[0]["boxes"]) == 2 and len(trainer.data_collator(rows)["labels"][0]["boxes"]) == 1


# --- average precision


def truth_of(trainer):
    return trainer.compute_metrics.__closure__[0].cell_contents.truth


def said_of(truth, keep=lambda number, place: True, score=lambda number, place: 0.9):
    """Detections ``(N, 2, 6)`` of the true boxes; those that are not kept have score 0 and no extent."""
    found = np.zeros((len(truth), 2, 6))
    for number, row in enumerate(truth):
        for place, (box, kind) in enumerate(zip(row["boxes"], row["classes"], strict=True)):
            if keep(number, place):
                x, y, w, h = box
                sides = np.array([row["width"], row["height"]] * 2)
                found[number, place] = [kind, score(number, place), *(np.array([x, y, x + w, y + h]) / sides)]
    return found


def test_average_precision_by_hand(root, tmp_path):
    trainer = build(recipe(root, tmp_path / "out"))
    truth = truth_of(trainer)
    found = average_precision(truth, said_of(truth), ORDER)
    # Objects have at most 24×24 pixels, which COCO calls small.
    assert found == dict.fromkeys(("ap", "ap50", "ap75", "ap_small"), pytest.approx(1.0))
    # Of a class with n objects k are found, by the best scores: precision is 1 up to the recall k / n, at which COCO's 101 points of
    # recall, 0, 0.01 …, end.
    counts = np.bincount([kind for row in truth for kind in row["classes"]], minlength=3)
    missed = truth[1]["classes"][1]
    found = average_precision(truth, said_of(truth, lambda number, place: (number, place) != (1, 1)), ORDER)
    shares = [1.0 if kind != missed else (int(100 * (n - 1) / n) + 1) / 101 for kind, n in enumerate(counts)]
    assert counts[missed] > 1 and found["ap"] == pytest.approx(np.mean(shares))
    wrong = said_of(truth)
    wrong[..., 0] = (wrong[..., 0] + 1) % 3
    assert average_precision(truth, wrong, ORDER)["ap"] < 0.2


def test_boxes_of_half_an_overlap(root, tmp_path):
    # Boxes of 60 % of the true width have an IoU of 0.6: found at 0.5, 0.55 and 0.6 of COCO's ten thresholds.
    truth = truth_of(build(recipe(root, tmp_path / "out")))
    narrow = said_of(truth)
    narrow[..., 4] = narrow[..., 2] + 0.601 * (narrow[..., 4] - narrow[..., 2])
    found = average_precision(truth, narrow, ORDER)
    assert found["ap50"] == pytest.approx(1) and found["ap75"] == 0 and found["ap"] == pytest.approx(0.3)


@pytest.mark.parametrize("family", detectors.FAMILIES)
def test_detections_are_those_of_the_host(family):
    model = detectors.detector(family, 32)
    batch = detectors.collate(detectors.scenes(3))
    logits, boxes = detectors.outputs(model, batch)
    found = detections(logits, boxes, torch.ones(3, 2), detectors.CLASSES)
    softmax = family in detectors.SOFTMAX
    assert found.shape == (3, 6 if softmax else 18, 6)
    kind = "Detr" if softmax else "DeformableDetr"
    processor = (
        getattr(transformers, f"{kind}ImageProcessorPil", None) or getattr(transformers, f"{kind}ImageProcessor")
    )()
    output = transformers.models.detr.modeling_detr.DetrObjectDetectionOutput(logits=logits, pred_boxes=boxes)
    more = {} if softmax else dict(top_k=18)
    theirs = processor.post_process_object_detection(output, threshold=0.0, target_sizes=[(1, 1)] * 3, **more)
    for ours, own in zip(found, theirs, strict=True):
        order = own["scores"].argsort(descending=True, stable=True)
        torch.testing.assert_close(ours[:, 1], own["scores"][order])
        torch.testing.assert_close(ours[:, 0].long(), own["labels"][order])
        torch.testing.assert_close(ours[:, 2:], own["boxes"][order].clamp(0, 1))


def test_detections_are_shares_of_the_image_without_its_padding():
    logits = torch.tensor([[[4.0, -9.0], [-9.0, 2.0]]])
    boxes = torch.tensor(
        [[[0.2, 0.5, 0.4, 1.0], [0.25, 0.25, 0.1, 0.1]]]
    )  # of a batch that is twice as wide as the image
    found = detections(logits, boxes, torch.tensor([[1.0, 0.5]]), 2)[0, :2]
    torch.testing.assert_close(found[:, 0], torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(found[:, 2:], torch.tensor([[0.0, 0.0, 0.8, 1.0], [0.4, 0.2, 0.6, 0.3]]))


# --- training


def shown(capsys):
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {row[0]: float(row[1]) for row in rows if len(row) == 2 and not row[0].startswith("distill")}


@pytest.mark.parametrize(
    "family", [pytest.param(one, marks=[pytest.mark.slow] * (one != "detr")) for one in coco.FAMILIES]
)
def test_a_teacher_then_a_student_from_a_recipe_file(family, root, tmp_path, capsys):
    teacher = saved(tmp_path, recipe(root, tmp_path / "teacher", family, 32), "teacher.yaml")
    assert main(["train", teacher]) == 0
    config = recipe(root, tmp_path / "out", family, teacher=str(tmp_path / "teacher"), terms=TERMS)
    config["processor"] = None  # the teacher's folder has one
    path = saved(tmp_path, config)
    assert main(["check", path]) == 0
    said = capsys.readouterr().out
    assert "distill.soft_targets.loss" in said and "distill.matched_boxes.loss" in said
    assert main(["train", path]) == 0
    capsys.readouterr()
    out = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert main(["test", path, str(tmp_path / "out")]) == 0
    found = shown(capsys)
    assert found.keys() == {"loss", "ap", "ap50", "ap75", "ap_small"}
    assert all(value == pytest.approx(out[f"eval_{name}"], abs=5e-5) for name, value in found.items())
    model = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "out")
    assert [*model.config.id2label.values()] == list(ORDER) and not any(
        "distill" in name for name in model.state_dict()
    )


@pytest.mark.slow
def test_an_easy_set_is_learnt(tmp_path):
    mine = written(tmp_path / "set", train=24)
    told = dict(max_steps=400, learning_rate=5e-3, per_device_train_batch_size=8, lr_scheduler_type="cosine")
    data = dict(eval=str(annotations(mine)))  # what the model saw
    trainer = build(recipe(mine, tmp_path / "out", width=32, data=data, training=dict(told, max_grad_norm=0.5)))
    before = trainer.evaluate()["eval_ap50"]
    trainer.train()
    assert before < 0.05 and trainer.evaluate()["eval_ap50"] > 0.8


def test_the_order_of_the_teachers_classes_means_nothing(root, tmp_path):
    found = []
    for name, order in (("a", list(ORDER)), ("b", ["blue", "green", "red"])):
        model = detectors.detector("rtdetr", 32, seed=3)
        model.config.id2label = dict(enumerate(order))
        with torch.no_grad():  # the same teacher, whose classes are named in another order
            for path, parameter in model.named_parameters():
                if ("class_embed" in path or "enc_score_head" in path) and order != list(ORDER):
                    parameter[:3] = parameter[[ORDER.index(one) for one in order]]
        model.save_pretrained(tmp_path / name)
        terms = [dict(type="SoftTargets")]
        trainer = build(recipe(root, tmp_path / "out", teacher=str(tmp_path / name), terms=terms))
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        torch.manual_seed(0)
        trainer.current_gradient_accumulation_steps = 1
        trainer.compute_loss(trainer.model.train(), batch)
        found.append(trainer.model.distill_link.last.losses["distill.soft_targets.loss"].item())
    assert found[0] == pytest.approx(found[1], rel=1e-4) and found[0] > 0


def test_a_share_of_the_images_trains_with_all_classes(root, tmp_path):
    trainer = build(recipe(root, tmp_path / "out", data=dict(fraction=0.25)))
    assert len(trainer.train_dataset) == 4 and len(trainer.eval_dataset) == 6
    assert trainer.model.config.num_labels == 3


def test_a_run_that_was_killed_goes_on_as_it_would_have(root, tmp_path):
    training = dict(max_steps=4, save_strategy="steps", save_steps=2)
    whole, half = (recipe(root, tmp_path / name, training=training) for name in ("whole", "half"))
    for config in (whole, half):
        assert main(["train", saved(tmp_path, config)]) == 0
    shutil.rmtree(tmp_path / "half" / "checkpoint-4")
    assert main(["train", saved(tmp_path, half), "--resume"]) == 0
    models = [
        transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / name).state_dict()
        for name in ("whole", "half")
    ]
    assert_same(*models)


CONFIG = Path(__file__).parents[2] / "nlp" / "configs" / "detection.yaml"


def test_the_shipped_recipe_file(root, tmp_path):
    small = [
        f"student={json.dumps(coco.rtdetr())}",
        "processor={size: {height: 64, width: 64}}",
        *(f"data.{name}={annotations(root, split)}" for name, split in (("train", "train"), ("eval", "val"))),
        "training.max_steps=2",
        "training.use_cpu=true",
        "training.bf16=false",
        "training.dataloader_num_workers=0",
        "training.per_device_train_batch_size=2",
    ]
    teacher, out = str(tmp_path / "teacher"), str(tmp_path / "out")
    alone = ["teacher=null", "terms=null"]
    assert main(["train", str(CONFIG), "--work-dir", teacher, "--cfg-options", *small, *alone]) == 0
    assert main(["train", str(CONFIG), "--work-dir", out, "--cfg-options", *small, f"teacher={teacher}"]) == 0
    assert "eval_ap" in json.loads((tmp_path / "out" / "eval_results.json").read_text())


# --- what is refused


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (dict(tokenizer=dict(vocab_size=90)), "tokenizer is for texts, and this task has images"),
        (dict(processor=dict(sizes=3)), r"processor: a RTDetrImageProcessor\w* has no setting 'sizes'; did you mean 'size'"),
        (dict(processor=dict(size=dict(shortest_edge=48, longest_edge=80))), r"images of unequal sizes make no batch; set size"),
        (dict(processor="nowhere"), r"no processor at nowhere"),
        (dict(data=dict(length=3)), r"data.length is not read for task detection, which reads images, classes"),
        (dict(data=dict(packed=True)), r"data.packed is not read for task detection"),
        (dict(data=dict(images=dict(test="x"))), r"data.images is a folder, or \{train: folder, eval: folder\}"),
        (dict(data=dict(images="nowhere")), r"data.images: there is no folder nowhere"),
        (dict(data=dict(train="x.jsonl")), r"no data at x.jsonl"),
        (dict(data=dict(classes=["red", "green"])), r"the train set has the class 'blue'.*, which data.classes lacks"),
        (dict(student=dict(model_type="bert")), r"transformers has no model of type 'bert' for this task"),
        (dict(training=dict(metric_for_best_model="accuracy")), r"metric_for_best_model is one of loss, ap, ap50"),
        (dict(on_policy=dict(share=0.5)), r"on_policy is for texts"),
    ],
)  # fmt: skip
def test_recipes_that_are_refused(entries, said, root, tmp_path):
    with pytest.raises(DistillError, match=said) as caught:
        build(recipe(root, tmp_path / "out", **entries))
    assert "\n" not in str(caught.value)


def test_a_task_on_texts_has_no_processor(tmp_path):
    with pytest.raises(DistillError, match="processor is for images, and this task has texts; leave it out"):
        build(dict(task="causal", processor=dict(size=3), data=dict(train="x"), student=dict(model_type="gpt2")))


def test_a_teacher_of_other_pixels_is_refused(root, tmp_path):
    for name in ("teacher", "out"):
        build(recipe(root, tmp_path / name, width=32)).save_model()
    told = json.loads((tmp_path / "teacher" / "preprocessor_config.json").read_text())
    (tmp_path / "teacher" / "preprocessor_config.json").write_text(json.dumps({**told, "do_normalize": True}))
    config = recipe(root, tmp_path / "next", teacher=str(tmp_path / "teacher"), terms=TERMS)
    config["processor"] = str(tmp_path / "out")
    with pytest.raises(DistillError, match=r"teacher was trained on images with do_normalize=True, and .* has False"):
        build(config)
    trainer = build(
        {**config, "processor": dict(size=dict(height=32, width=32))}
    )  # what the teacher's says, beside the size
    assert trainer.processing_class.do_normalize
    assert trainer.data_collator([trainer.train_dataset[0]])["pixel_values"].shape[2:] == (32, 32)


def test_texts_alone_are_stored(root, tmp_path, capsys):
    path = saved(tmp_path, recipe(root, tmp_path / "out", teacher="teacher", terms=TERMS))
    support.refused(
        capsys, ["cache", path, "--out", str(tmp_path / "store")], "let the teacher run in recipes of task detection"
    )


def test_an_image_with_its_own_profile(root, tmp_path):
    mine = tmp_path / "set"
    shutil.copytree(root, mine)
    Image.open(mine / "train" / "0.png").convert("L").save(mine / "train" / "0.png")  # grey
    trainer = build(recipe(mine, tmp_path / "out"))
    assert trainer.data_collator([trainer.train_dataset[0]])["pixel_values"].shape[1] == 3
