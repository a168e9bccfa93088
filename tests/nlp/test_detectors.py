"""Detectors by object queries: queries of two models are matched in each image, and their classes, boxes and states compared."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.image_transforms import center_to_corners_format
from transformers.loss.loss_for_object_detection import generalized_box_iou

from kdgraft import DistillError, Ensemble, WiringError
from kdgraft_nlp import DistillTrainer, distill
from kdgraft_nlp.queries import QueryMatching, assigned
from kdgraft_nlp.student import graft
from kdgraft_nlp.tasks import task_of
from support import detectors as zoo
from support import nlp as support
from support.detectors import losses, training
from support.tensors import gradients

TERMS = ["SoftTargets", "MatchedBoxes"]


def width(family):
    return 32 if family == "deformable" else 16  # its normalisation has 32 groups


def batch_of(family, count=3, right=0, **settings):
    batch = zoo.collate(zoo.scenes(count, **settings), right)
    if family == "yolos":
        del batch["pixel_mask"]
    return batch


def pair(family, **settings):
    return [zoo.detector(family, width(family), seed, queries=4 + seed, **settings) for seed in (1, 2)]


# What is matched with what, and what it costs.


def divergence(family, student, teacher, temperature=1.0):
    """T²·KL of each query: of the softmax, or summed over the Bernoulli distributions of the classes."""
    s, t = (x.double() / temperature for x in (student, teacher))
    if family in zoo.SOFTMAX:
        p, q = t.log_softmax(-1), s.log_softmax(-1)
        return temperature**2 * (p.exp() * (p - q)).sum(-1)
    p, q = t.sigmoid(), s.sigmoid()
    return temperature**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1)


def naive(family, student, teacher, costs):
    """Every assignment of the teacher's queries to the student's is tried; returns the means of both losses over the images."""
    softmax, found = family in zoo.SOFTMAX, []
    for s, b, t, c in zip(*student, *teacher, strict=True):
        p, q = (x.softmax(-1) if softmax else x.sigmoid() for x in (s, t))
        weight = q[:, : zoo.CLASSES].amax(-1)
        apart = (p[:, None] - q[None]).abs().sum(-1) * (0.5 if softmax else 1)
        distance = (b[:, None] - c[None]).abs().sum(-1)
        overlap = 1 - generalized_box_iou(center_to_corners_format(b), center_to_corners_format(c))
        cost = (costs[0] * apart + costs[1] * distance + costs[2] * overlap) * weight
        few = len(s)
        best = min(permutations(range(len(t)), few), key=lambda to: sum(cost[i, j] for i, j in enumerate(to)))
        rows, columns = torch.arange(few), torch.tensor(best)
        share = weight[columns] / weight[columns].sum()
        boxes = 5 * distance[rows, columns] / 4 + 2 * overlap[rows, columns]
        found.append(((share * divergence(family, s, t[columns])).sum(), (share * boxes).sum()))
    return [torch.stack(values).mean().float() for values in zip(*found, strict=True)]


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_matched_classes_and_boxes_are_those_of_the_best_assignment(family):
    """The student has five queries and the teacher six, of which the least certain one may stay alone."""
    student, teacher = pair(family)
    assert task_of(student) == "detection"
    batch = batch_of(family)
    plain = [zoo.outputs(model, batch) for model in (student, teacher)]
    prefix = "matcher_" if family in ("rtdetr", "rtdetrv2", "d_fine") else ""
    costs = [getattr(student.config, f"{prefix}{name}_cost") for name in ("class", "bbox", "giou")]
    expected = naive(family, *plain, costs)
    built = training(graft(student, teacher, TERMS))
    found, output = losses(built, batch)
    assert output.loss.isfinite() and output.loss > 0  # the host's own
    # In training RT-DETR has denoising queries, and LW-DETR three groups of them.
    assert output.logits.shape[1] == (15 if family == "lw_detr" else 13 if prefix else 5)
    for term, value in zip(("soft_targets", "matched_boxes"), expected, strict=True):
        torch.testing.assert_close(found[term].detach(), value, rtol=1e-3, atol=1e-5, msg=lambda m, n=term: f"{n}: {m}")
    sum(found.values()).backward()
    grads = gradients(built)
    assert sum(float(g.abs().sum()) for g in grads.values()) > 0 and all(g.isfinite().all() for g in grads.values())


def test_two_queries_by_hand():
    """Certain classes and boxes of one size; only the assignment that crosses them costs little."""
    student, teacher = pair("detr")
    matching = QueryMatching(student, teacher, "term")
    assert matching.student.costs == (1.0, 5.0, 2.0)
    scores = torch.tensor([[0.8, 0.0, 0.0, 0.2], [0.0, 0.6, 0.0, 0.4]])
    others = torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    boxes = torch.tensor([[0.2, 0.5, 0.2, 0.2], [0.8, 0.5, 0.2, 0.2]])
    places = torch.tensor([[0.8, 0.5, 0.2, 0.2], [0.3, 0.5, 0.2, 0.2]])
    # Row 0 and column 0: no class in common, 0.6 apart; nothing is shared of 0.08, within 0.8 · 0.2.
    # Row 0 and column 1: 1 − 0.8 of the class, 0.1 apart; 0.02 is shared of 0.06, which is all that is around them.
    # Row 1 and column 0: 1 − 0.6 of the class, one box. Row 1 and column 1: 0.5 apart, of 0.08 within 0.7 · 0.2.
    expected = [
        [1 + 5 * 0.6 + 2 * (1 + 0.08 / 0.16), 0.2 + 5 * 0.1 + 2 * (1 - 0.02 / 0.06)],
        [0.4 + 0 + 0, 1 + 5 * 0.5 + 2 * (1 + 0.06 / 0.14)],
    ]
    found = matching.pair_costs(scores, boxes, others, places)
    torch.testing.assert_close(found, torch.tensor(expected))
    images, rows, columns = assigned([found], torch.device("cpu"))
    assert (images.tolist(), rows.tolist(), columns.tolist()) == ([0, 0], [0, 1], [1, 0])


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_student_that_is_its_teacher_has_no_loss(family):
    student, teacher = (zoo.detector(family, width(family), 1) for _ in range(2))
    terms = [*TERMS, dict(type="SoftTargets", name="objects", queries="objects")]
    if family in ("detr", "rtdetr"):
        terms.append(dict(type="HiddenStates", stack="decoder", adapter="none"))
    found, _ = losses(training(graft(student, teacher, terms)), batch_of(family))
    for name, value in found.items():
        torch.testing.assert_close(
            value.detach(), torch.zeros(()), rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_order_of_the_teachers_queries_means_nothing():
    terms = [*TERMS, dict(type="HiddenStates", stack="decoder"), dict(type="BoundedRegression", margin=9.0)]
    built, batch = training(graft(*pair("detr"), terms)), batch_of("detr")
    first, _ = losses(built, batch)
    teacher = built.distiller.teacher.model
    before = zoo.outputs(teacher, batch)[0]
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        teacher.model.query_position_embeddings.weight.copy_(teacher.model.query_position_embeddings.weight[order])
    torch.testing.assert_close(zoo.outputs(teacher, batch)[0], before[:, order])
    second, _ = losses(built, batch)
    for name in first:
        assert first[name] > 0
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_padding_of_images_changes_nothing():
    terms = [*TERMS, "HiddenStates", dict(type="HiddenStates", name="decoder", stack="decoder")]
    terms.append(dict(type="FeatureImitation", tap="model.input_projection"))
    built = graft(*pair("detr"), terms)
    found = []
    for right in (64, 128):  # near an edge, convolutions of the host itself see whether there is any padding
        values, _ = losses(training(built), batch_of("detr", right=right))
        sum(values.values()).backward()
        found.append((values, gradients(built)))
    for name, value in found[0][0].items():
        torch.testing.assert_close(value, found[1][0][name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=2e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


# The queries of objects.


@pytest.mark.parametrize("family", ["detr", "rtdetr"])
def test_the_queries_of_objects_by_hand(family):
    student, teacher = pair(family)
    batch, softmax = batch_of(family, objects=2), family in zoo.SOFTMAX
    plain = [zoo.outputs(model, batch) for model in (student, teacher)]
    rows = []
    for image, label in enumerate(batch["labels"]):
        chosen = []
        for logits, boxes in plain:
            p = logits[image].softmax(-1) if softmax else logits[image].sigmoid()
            truth = F.one_hot(label["class_labels"], p.shape[-1]).float()
            cost = (2.0 if family == "rtdetr" else 1.0) * (p[:, None] - truth).abs().sum(-1) * (0.5 if softmax else 1)
            cost = cost + 5 * (boxes[image][:, None] - label["boxes"]).abs().sum(-1)
            corners = (center_to_corners_format(x) for x in (boxes[image], label["boxes"]))
            cost = cost + 2 * (1 - generalized_box_iou(*corners))
            count = len(truth)
            chosen.append(
                min(permutations(range(len(p)), count), key=lambda to: sum(cost[i, j] for j, i in enumerate(to)))
            )
        rows += [(image, i, j) for i, j in zip(*chosen, strict=True)]
    images, ours, theirs = torch.tensor(rows).T
    (s, b), (t, c) = ((x[images, k], y[images, k]) for (x, y), k in zip(plain, (ours, theirs), strict=True))
    truth = torch.cat([label["boxes"] for label in batch["labels"]])
    free = (b - truth).square().sum(-1) <= (c - truth).square().sum(-1)
    terms = [dict(type="SoftTargets", queries="objects"), dict(type="BoundedRegression", weight=1.0)]
    built = training(graft(student, teacher, terms))
    found, _ = losses(built, batch)
    torch.testing.assert_close(
        found["soft_targets"].detach(), divergence(family, s, t).mean().float(), rtol=1e-3, atol=1e-5
    )
    expected = (b - truth).square().sum(-1).masked_fill(free, 0).mean()
    torch.testing.assert_close(found["bounded_regression"].detach(), expected, rtol=1e-3, atol=1e-6)
    counts = built.distiller.counts(built.distill_link.read(batch))
    assert counts == {"soft_targets": 5, "bounded_regression": 5}  # 2, 1 and 2 objects


def test_images_without_objects_are_zero_with_a_live_graph():
    built = training(graft(*pair("detr"), [dict(type="SoftTargets", queries="objects"), "BoundedRegression"]))
    found, _ = losses(built, batch_of("detr", objects=0))
    total = sum(found.values())
    total.backward()
    assert total == 0 and all(g.isfinite().all() for g in gradients(built).values())


def test_more_objects_than_queries():
    built = training(graft(*(zoo.detector("detr", 16, seed, queries=2) for seed in (1, 2)), [dict(type="DKD")]))
    batch = batch_of("detr", objects=5)
    found, _ = losses(built, batch)
    assert found["dkd"].isfinite() and found["dkd"] > 0
    assert "dkd" not in built.distiller.counts(built.distill_link.read(batch))


def test_without_labels_the_matching_of_predictions_remains():
    batch = {name: value for name, value in batch_of("rtdetr").items() if name != "labels"}
    found, output = losses(training(graft(*pair("rtdetr"), TERMS)), batch)
    assert output.loss == 0 and found["soft_targets"] > 0
    built = training(graft(*pair("rtdetr"), [dict(type="SoftTargets", queries="objects")]))
    with pytest.raises(DistillError, match=r"soft_targets needs the objects of each image; add labels"):
        built(**batch)


# States, maps, classes by name.


def test_states_of_an_encoder_without_padding_by_hand():
    student, teacher = pair("detr")
    batch = batch_of("detr", right=64)
    states = []
    for model in (student, teacher):
        hook = model.model.encoder.layers[0].register_forward_hook(lambda *seen: states.append(seen[2]))
        zoo.outputs(model, batch)
        hook.remove()
    s, t = ((x if isinstance(x, torch.Tensor) else x[0]).view(3, 2, 4, 16)[:, :, :2] for x in states)
    found, _ = losses(training(graft(student, teacher, [dict(type="HiddenStates", adapter="none")])), batch)
    torch.testing.assert_close(found["hidden_states"].detach(), (s - t).square().mean(), rtol=1e-4, atol=1e-6)


def test_maps_of_a_detector_inside_its_objects():
    term = dict(type="FeatureImitation", tap="model.encoder.pan_blocks.1", region="foreground")
    found, _ = losses(training(graft(*pair("rtdetr"), [term])), batch_of("rtdetr"))
    assert found["feature_imitation"] > 0
    none, _ = losses(training(graft(*pair("rtdetr"), [term])), batch_of("rtdetr", objects=0))
    assert none["feature_imitation"] == 0


@pytest.mark.parametrize("family", ["detr", "rtdetr"])
def test_classes_are_compared_by_name(family):
    names = [dict(enumerate("abc")), dict(enumerate("cab"))]
    models = [zoo.detector(family, 16, 1, id2label=n, label2id={v: k for k, v in n.items()}) for n in names]
    order = torch.tensor([2, 0, 1])  # the teacher's place of a class is where its name says
    with torch.no_grad():
        for path, parameter in models[1].named_parameters():
            if "class_labels" in path or "class_embed" in path:
                parameter[:3] = parameter[order]
    found, _ = losses(training(graft(*models, TERMS)), batch_of(family))
    torch.testing.assert_close(found["soft_targets"].detach(), torch.zeros(()), rtol=0, atol=1e-5)


# Training.


@pytest.mark.parametrize("family", ["detr", "rtdetr"])
def test_gradients_are_finite_under_autocast(family):
    built = training(graft(*pair(family), TERMS))
    with torch.autocast("cpu", torch.bfloat16):
        found, output = losses(built, batch_of(family))
        (output.loss + sum(found.values())).backward()
    assert all(value.dtype == torch.float32 and value > 0 for value in found.values())
    assert all(g.isfinite().all() for g in gradients(built).values())


def trainer_of(model, folder, steps):
    settings = dict(max_steps=steps, logging_steps=4, learning_rate=3e-3, remove_unused_columns=False)
    return transformers.Trainer(
        model=model,
        args=support.arguments(folder, **settings),
        train_dataset=zoo.scenes(4),
        eval_dataset=zoo.scenes(2, seed=1),
        data_collator=zoo.collate,
    )


@pytest.mark.parametrize("family", ["detr", pytest.param("rtdetr", marks=pytest.mark.slow)])
def test_a_trainer_teaches_a_detector_by_a_bigger_one(family, tmp_path):
    terms = [
        dict(type="SoftTargets"),
        dict(type="MatchedBoxes"),
        dict(type="FeatureImitation", tap="model.input_projection" if family == "detr" else "model.encoder[0][*]"),
        dict(type="HiddenStates", stack="decoder"),
    ]
    student, teacher = zoo.detector(family, 16, 1), zoo.detector(family, 32, 2, queries=8)
    trainer_of(teacher, tmp_path / "teacher", 40).train()  # by the host alone
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer = trainer_of(student, tmp_path, 24)
    distill(trainer, teacher=teacher, terms=terms)
    trainer.train()
    first, *_, last = [entry for entry in trainer.state.log_history if "task_loss" in entry]
    names = [name for name in first if name.startswith("distill.") and name.endswith(".loss")]
    # RT-DETR selects other queries at each step, whose boxes are others: in so few steps theirs need not come closer.
    falling = [name for name in names if family == "detr" or "boxes" not in name]
    assert len(names) == 4 and all(last[name] < first[name] for name in falling), [(first[n], last[n]) for n in names]
    assert sum(last[name] for name in names) < 0.8 * sum(first[name] for name in names)
    assert last["task_loss"] < first["task_loss"]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model(tmp_path / "student")
    loaded = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "student")
    assert type(loaded).__name__ == zoo.FAMILIES[family][0]
    assert not any("distill" in name for name in loaded.state_dict())


def test_a_teacher_in_a_folder(tmp_path):
    student, teacher = pair("detr")
    teacher.save_pretrained(tmp_path / "teacher")
    batch = batch_of("detr")
    expected, _ = losses(training(graft(student, teacher, TERMS)), batch)
    trainer = DistillTrainer(
        model=pair("detr")[0], teacher=str(tmp_path / "teacher"), terms=TERMS, args=support.arguments(tmp_path)
    )
    trainer.compute_loss(training(trainer.model), batch)
    found = trainer.model.distill_link.last.losses["distill.soft_targets.loss"]
    torch.testing.assert_close(found, expected["soft_targets"].detach())


# What is refused.


@pytest.mark.parametrize(
    ("family", "term", "message"),
    [
        ("rtdetr", "ForwardKL", r"each class on its own; use SoftTargets"),
        ("rtdetr", "DKD", r"each class on its own; use SoftTargets"),
        ("detr", dict(type="SoftTargets", queries="some"), r"queries must be one of auto, all, objects"),
        ("detr", dict(type="SoftTargets", tokens="valid"), r"a detector has queries; leave it out"),
        ("detr", dict(type="DKD", queries="all"), r"compares with the labels, and queries='all' have none"),
        (
            "detr",
            dict(type="BoundedRegression", queries="all"),
            r"compares with the labels, and queries='all' have none",
        ),
        ("detr", dict(type="MatchedBoxes", boxes=0, overlaps=0), r"leave nothing to compare"),
        ("detr", dict(type="AttentionMaps", stack="cross"), r"are object queries, in an order of each model's own"),
        ("detr", dict(type="PatientStates", stack="decoder"), r"are object queries, in an order of each model's own"),
        ("yolos", "HiddenStates", r"are object queries, in an order of each model's own"),
        ("rtdetr", "RKD", r"more in training; tap a map"),
        (
            "detr",
            dict(type="Hint", tap="model.decoder.layers.1"),
            r"are object queries, in an order of each model's own",
        ),
    ],
)
def test_what_has_no_meaning_for_a_detector_is_refused(family, term, message):
    with pytest.raises(DistillError, match=message) as caught:
        graft(*pair(family), [term])
    assert "\n" not in str(caught.value)


def test_detectors_that_cannot_be_compared_are_refused():
    detr, rtdetr = zoo.detector("detr"), zoo.detector("rtdetr")
    with pytest.raises(WiringError, match=r"are a softmax with 'no object', those of .* a sigmoid for each class"):
        graft(detr, rtdetr, ["SoftTargets"])
    with pytest.raises(WiringError, match="have 3 and 2 classes; they must have the same"):
        graft(zoo.detector("detr"), zoo.detector("detr", num_labels=2), ["MatchedBoxes"])
    with pytest.raises(WiringError, match=r"different tasks: detection .* and image"):
        graft(zoo.detector("yolos"), support.model("vit"), ["SoftTargets"])
    with pytest.raises(WiringError, match=r"compares boxes, and ViTForImageClassification predicts none"):
        graft(support.model("vit"), support.model("vit"), ["MatchedBoxes"])
    with pytest.raises(WiringError, match=r"queries='all' is for detectors, and ViTForImageClassification is none"):
        graft(support.model("vit"), support.model("vit"), [dict(type="SoftTargets", queries="all")])


def test_queries_of_several_teachers_have_no_mean():
    teachers = dict(a=zoo.detector("detr", 16, 2), b=zoo.detector("detr", 16, 3), both=Ensemble(["a", "b"]))
    with pytest.raises(WiringError, match="no mean over several models"):
        graft(zoo.detector("detr"), None, [dict(type="SoftTargets", source="both")], teachers=teachers)


def test_padded_images_have_no_attention_maps():
    built = training(graft(*pair("detr"), ["AttentionMaps"]))
    with pytest.raises(WiringError, match=r"attention_maps: the batch contains padding of images"):
        built(**batch_of("detr", right=64))
