"""Features weighed by the teacher's scores: the authors' figure, what does not count, and what it refuses; the two recipes on it."""

from __future__ import annotations

import pytest
import torch

from golden import wave
from kdgraft import DistillError, FeatureImitation, WiringError
from kdgraft.adapters import ConvAdapter, PerceptronAdapter
from kdgraft.batch import Batch
from kdgraft.taps import Tap
from kdgraft_det import ScoredImitation, rtdetrv4
from kdgraft_det.dense_heads import dense_head
from support.det import Given, build, detector, distilled, losses, raw_batch, save_teacher
from support.det_stages import staged
from support.det_zoo import KINDS, zoo

LOSS = "distill.scored_imitation.loss"
GRIDS = [(3, 4), (2, 2)]

# ultralytics 8.4.190 (PyPI), nn/distill_model.py: DistillationModel.loss_sl2 and the lines of loss() that make scores, through a
# projector, on two levels; its two heads alike. The loss, the sum of the absolute gradients by the student's maps, and the gradient
# at [0, 0, 0, 0] of the first and at [1, 2, 1, 1] of the second.
AUTHORS = (5.614262599731436, 3.3617738137889486, 0.06730742309409012, -0.01697978508725741)

# RT-DETRs/RT-DETRv4@df4412261c6162f62aa4fb84e90b2df3c1b5f223:engine/rtv4/rtv4_criterion.py, RTv4Criterion.loss_distillation through
# hybrid_encoder.py's linear projector: the loss, the sum of the absolute gradients and the gradient at [0, 0, 0, 0].
RTDETRV4 = (1.009601781553632, 0.23222792382158838, -0.0045100677265449)


def maps() -> tuple[list[torch.Tensor], ...]:
    student = [wave((2, 3, *grid), 0.41, 0.6 + i, 1.2).requires_grad_() for i, grid in enumerate(GRIDS)]
    teacher = [wave((2, 4, *grid), 0.53, 0.9 + i, 2.0) for i, grid in enumerate(GRIDS)]
    return student, teacher, [wave((2, 3, *grid), 0.7, 0.3 + i, 3.0) for i, grid in enumerate(GRIDS)]


def projector(level: int) -> PerceptronAdapter:
    adapter = PerceptronAdapter(3, 4).double()
    first = {
        "project.weight": wave((4, 3, 1, 1), 1.3, 0.4 + level, 0.8),
        "project.bias": wave((4,), 2.1, 0.7 + level, 0.1),
    }
    last = {
        "output.weight": wave((4, 4, 1, 1), 1.7, 0.2 + level, 0.6),
        "output.bias": wave((4,), 2.3, 0.1 + level, 0.1),
    }
    adapter.load_state_dict(first | last)
    return adapter


def by_hand() -> tuple[ScoredImitation, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """A term on two levels, and of each level the student's map, the teacher's, and the teacher's class logits."""
    head = build(detector(classes=3, strides=(8, 16))["bbox_head"])
    term = ScoredImitation("neck[*]")
    term.head = dense_head(head, "bbox_head", "teacher", "scored")
    student, teacher, scores = maps()
    tap = Tap.parse("neck[*]")
    term.pairs = lambda *_: [(s, t, tap, tap) for s, t in zip(student, teacher, strict=True)]
    term.adapters.extend([projector(0), projector(1)])
    term.placed = [False, False]
    return term, list(zip(student, teacher, scores, strict=True))


def test_the_authors_figures():
    term, levels = by_hand()
    student = [one for one, _, _ in levels]
    found = term(Given({}), Given({term.head.classes: [scores for _, _, scores in levels]}), Batch())
    loss = (found.numerator / found.denominator).sum()
    assert loss.item() == pytest.approx(AUTHORS[0], rel=1e-6)
    loss.backward()
    gradients = sum(one.grad.abs().sum() for one in student), student[0].grad[0, 0, 0, 0], student[1].grad[1, 2, 1, 1]
    assert [value.item() for value in gradients] == pytest.approx(AUTHORS[1:], rel=1e-5)


def test_the_deep_map_follows_the_authors():
    (term,) = (spec for spec in rtdetrv4())
    assert (term["loss"], term["tap"], term["weight"]) == ("cosine", "backbone[-1]", 5.0)
    adapter = ConvAdapter(3, 4).double()
    adapter.load_state_dict(
        {"project.weight": wave((4, 3), 1.3, 0.4, 0.8)[..., None, None], "project.bias": wave((4,), 2.1, 0.7, 0.1)}
    )
    student, teacher, _ = maps()
    own = FeatureImitation("x", loss="cosine")
    loss = own.loss(adapter(student[0], teacher[0]), teacher[0], dim=1, reduction="mean")
    loss.backward()
    gradient = student[0].grad
    assert [loss.item(), gradient.abs().sum().item(), gradient[0, 0, 0, 0].item()] == pytest.approx(RTDETRV4, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_the_highest_at_each_position(kind):
    model = build(zoo(kind))
    model.eval()
    head = dense_head(model.bbox_head, "bbox_head", "teacher", "scored")
    term = ScoredImitation("neck[*]")
    term.head = head
    with torch.no_grad():
        outputs = model(torch.randn(2, 3, 64, 96), mode="tensor")
    given = {head.classes: list(outputs[0])}
    if len(outputs) > 2 and hasattr(head, "objectness"):
        given[head.objectness] = list(outputs[2])
    for level, found in enumerate(term.scores(Given(given))):
        scores = outputs[0][level].unflatten(1, (head.num_priors, -1))
        scores = scores if kind == "TOOD" else scores.sigmoid()
        if hasattr(head, "objectness"):
            scores = scores * outputs[2][level].sigmoid()[:, None]
        torch.testing.assert_close(found, scores.amax((1, 2)), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    model = detector(width=6, channels=12, classes=5, frozen_bn=True)  # other classes than the student's
    return model, save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth", model, classes=None)


@pytest.mark.parametrize("recipe", ["ultralytics", "rtdetrv4"])
def test_the_recipes_teach_a_detector_and_take_a_weight_that_sets_itself(teacher, recipe):
    auto = dict(type="auto", share=0.2, batches=1)
    model = build(distilled(detector(frozen_bn=True), *teacher, recipe=dict(type=recipe, weight=auto)))
    found = losses(model, raw_batch())
    ((name, term),) = model.distiller.terms.items()
    assert found[f"distill.{name}.loss"] > 0 and term.weight != 1
    figures = model.distill_context.figures
    assert figures[f"distill.{name}.share"].item() == pytest.approx(0.2)
    trained = build(distilled(detector(frozen_bn=True), *teacher, recipe=recipe))
    losses(trained, raw_batch())[f"distill.{name}.loss"].backward()
    assert trained.backbone.conv1.weight.grad.abs().sum() > 0


def test_neither_features_nor_scores_of_the_padding_count():
    term, levels = by_hand()
    batch = Batch(padded_size=(24, 32), image_sizes=[(24, 16), (24, 32)])  # half of the first image is padding
    term.placed = [True, True]
    found = []
    for shift in (0.0, 9.0, float("inf")):
        for _, t, _ in levels:
            t[0, :, :, t.shape[-1] // 2 :] += shift
        scores = [score.clone() for _, _, score in levels]
        for score in scores:
            score[0, :, :, score.shape[-1] // 2 :] += min(shift, 9.0)
        ratio = term(Given({}), Given({term.head.classes: scores}), batch)
        loss = (ratio.numerator / ratio.denominator).sum()
        found.append((loss, *torch.autograd.grad(loss, [s for s, _, _ in levels])))
    for other in found[1:]:
        assert all(torch.equal(one, same) for one, same in zip(found[0], other, strict=True))
    whole = term(Given({}), Given({term.head.classes: [score for _, _, score in levels]}), Batch())
    assert not torch.isfinite(whole.numerator).all()


def test_what_it_cannot_score_is_refused(teacher, tmp_path):
    with pytest.raises(WiringError, match=r"must be those that its head scores.*tap neck\[\*\]"):
        build(distilled(detector(), *teacher, recipe=dict(type="ultralytics", tap="backbone[*]")))
    stages = staged("Faster R-CNN")
    path = save_teacher(tmp_path / "stages.pth", stages)
    with pytest.raises(WiringError, match="FasterRCNN, has no dense head that scores every position"):
        build(distilled(detector(), stages, path, recipe="ultralytics"))
    with pytest.raises(DistillError, match="takes no argument 'los'"):
        build(distilled(detector(), *teacher, recipe=dict(type="ultralytics", los="hint")))
