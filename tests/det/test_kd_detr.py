"""KD-DETR: the authors' figures, that both decoders see the same queries, every kind of DETR, and what it refuses."""

from __future__ import annotations

import copy
from functools import wraps

import pytest
import torch

from golden import wave
from kdgraft.errors import DistillError, WiringError
from kdgraft_det import KDDETR
from kdgraft_det.kd_detr import Predictions, compared
from support.det import CLASSES, build, detector, distilled, losses, part, raw_batch, save_teacher, saved_teachers
from support.det_stages import ONE_MAP, detr
from support.tensors import gradients

KINDS = (*ONE_MAP, "DeformableDETR", "two stages", "DINO")
LOSS = "distill.kddetr.loss"
TWO = part(raw_batch(), slice(1, 3))


def model_of(kind, **settings):
    """A small DETR by its name."""
    return detr(two_stages=True, **settings) if kind == "two stages" else detr(kind, **settings)


def taught(kind, teacher, checkpoint="unread.pth", **settings):
    """A built student of this kind whose one term is KDDETR."""
    student = model_of(kind, frozen_bn=True) if isinstance(kind, str) else kind
    terms = [dict(type="KDDETR", **{"points": 5, **settings})]
    return build(distilled(student, teacher, checkpoint, terms=terms))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """kind -> (model, checkpoint) of a teacher with a wider backbone and 8 queries."""
    return saved_teachers(
        tmp_path_factory.mktemp("teachers"), lambda kind: model_of(kind, width=6, queries=8, frozen_bn=True)
    )


# Myleswork/KD-DETR@e7dfccb880808f621b73060dd4b6758a75c70496 (the authors' code, in a fork of wennyuhey/KD-DETR),
# models/DAB_DETR/kd_loss.py: KDCriterion with aux_refpoints (4 queries) and random_refpoints (5), three layers, 7 classes.
# Of each sampling: the class divergence, the L1 and the GIoU; the gradients of the weighted sum (1, 5, 2), summed without signs.
AUTHORS = {
    (4, 0.2, 1.7): (
        (4.820397682405902, 0.6228242436157534, 2.6832083664279214),
        (4.0998795942523865, 29.279112210572123),
    ),
    (5, 0.9, 2.6): (
        (7.087231362792252, 0.5929753941187352, 2.4938729214452096),
        (5.614706154698036, 33.23561286269085),
    ),
}


@pytest.mark.parametrize("case", AUTHORS)
def test_the_authors_figures(case):
    queries, ours, theirs = case
    classes, distance, overlap = AUTHORS[case][0]

    def predictions(phase):
        return Predictions(
            wave((3, 2, queries, 7), 0.37, phase, 2.5), wave((3, 2, queries, 4), 0.53, phase + 1, 1.2).sigmoid()
        )

    found = Predictions(*(part.requires_grad_() for part in predictions(ours)))
    wanted = Predictions(*(layers[-1] for layers in predictions(theirs)))
    weight = wanted.classes.sigmoid().amax(-1)
    parts = compared(found, wanted, weight, 10.0)
    # They average over classes, and divide the boxes alone by the sum of the weights.
    values = [parts[0] / 7, parts[1] / weight.sum(), parts[2] / weight.sum()]
    assert [value.item() for value in values[:2]] == pytest.approx([classes, distance], rel=1e-9)
    # Their GIoU adds 1e-6 to both denominators.
    assert values[2].item() == pytest.approx(overlap, rel=1e-5)
    slopes = torch.autograd.grad(values[0] + 5 * values[1] + 2 * values[2], found)
    expected = AUTHORS[case][1]
    assert slopes[0].abs().sum().item() == pytest.approx(expected[0], rel=1e-9)
    assert slopes[1].abs().sum().item() == pytest.approx(expected[1], rel=1e-4)


def test_parts_by_hand():
    # One layer, image and query; two classes at T = 1: p_t = (1/2, 1/2), p_s = (1/4, 3/4). Boxes of 0.2 and 0.4 a side, centred.
    found = Predictions(torch.tensor([1.0, 3.0]).log().view(1, 1, 1, 2), torch.tensor([[[[0.5, 0.5, 0.2, 0.2]]]]))
    wanted = Predictions(torch.zeros(1, 1, 2), torch.tensor([[[0.5, 0.5, 0.4, 0.4]]]))
    kl = 0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()
    values = [value.item() for value in compared(found, wanted, torch.tensor([[3.0]]), 1.0)]
    assert values == pytest.approx([3 * kl.item(), 3 * 0.1, 3 * 0.75], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind, teachers):
    entry, checkpoint = teachers(kind)
    model = taught(entry, entry, checkpoint)
    before = losses(model, TWO)[LOSS].item()
    model.load_state_dict(torch.load(checkpoint)["state_dict"])
    # Every layer imitates the last one, and the others do not agree with it.
    model.distiller.terms["kddetr"].register_forward_pre_hook(last_layer_alone)
    # Rounding of boxes of next to no area is what is left.
    assert losses(model, TWO)[LOSS].item() == pytest.approx(0, abs=1e-3 * before) and before > 1


def last_layer_alone(module, args):
    """Let the student's second pass return its last layer alone."""
    head = args[0].root.bbox_head
    if hasattr(head, "_whole"):
        return
    forward = head._whole = head.forward
    head.forward = lambda *given, **named: tuple(part[-1:] for part in forward(*given, **named))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampling", [dict(points=5, specific=False), dict(points=0)], ids=["general", "specific"])
def test_both_decoders_are_given_the_same_queries(kind, sampling, teachers):
    model = taught(kind, *teachers(kind), **sampling)
    teacher = model.distiller.teacher.model
    seen = {"student": [], "teacher": []}
    for name, one in (("student", model), ("teacher", teacher)):
        forward = one.forward_decoder

        @wraps(forward)
        def kept(*, name=name, forward=forward, **given):
            seen[name].append({key: value for key, value in given.items() if isinstance(value, torch.Tensor)})
            return forward(**given)

        one.forward_decoder = kept
    losses(model, TWO)
    first, *again = seen["student"]
    assert len(again) == 1
    own = seen["teacher"][0]
    there = again[0]
    other = own if sampling["points"] == 0 else seen["teacher"][1]
    # The teacher's second pass is for general sampling alone, and neither encoder runs again.
    assert len(seen["teacher"]) == (1 if sampling["points"] == 0 else 2)
    assert there["memory"] is first["memory"] and other["memory"] is own["memory"]
    shared = "reference_points" if kind in ("DINO", "two stages") else "query_pos"
    torch.testing.assert_close(there[shared], other[shared], rtol=1e-4, atol=1e-5)
    assert there[shared].shape[1] == (5 if sampling["points"] else 8)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns(kind, teachers):
    model = taught(kind, *teachers(kind))
    teacher = model.distiller.teacher.model
    before = copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    term, values = model.distiller.terms["kddetr"], []
    drawn = term.hidden_state()
    for _ in range(5):
        torch.manual_seed(0)
        term.load_hidden_state(drawn)  # the same random queries in each step
        optimizer.zero_grad()
        loss = losses(model, TWO)[LOSS]
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0]
    found = gradients(model)
    assert found["backbone.conv1.weight"].abs().sum() > 0
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert set(model.state_dict()) == set(build(model_of(kind)).state_dict())


def test_boxes_are_shared_by_detectors_of_two_kinds(teachers):
    for student, teacher in (("DABDETR", "DINO"), ("two stages", "DABDETR"), ("DINO", "two stages")):
        assert losses(taught(student, *teachers(teacher)), TWO)[LOSS] > 0


def wider(value):
    """A model's entry with 32 numbers in place of the 16 of its embeddings."""
    if isinstance(value, dict):
        return {key: 16 if key == "num_feats" else wider(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [wider(entry) for entry in value]
    return 32 if value == 16 and not isinstance(value, bool) else value


def wide(kind):
    entry = detr(kind, queries=8)
    return (
        entry
        | {key: wider(entry[key]) for key in ("encoder", "decoder", "positional_encoding", "bbox_head")}
        | dict(neck=entry["neck"] | dict(out_channels=32))
    )


def test_boxes_are_shared_by_detectors_of_two_widths(tmp_path):
    teacher = wide("DABDETR")
    model = taught("DABDETR", teacher, save_teacher(tmp_path / "wide.pth", teacher))
    assert model.distiller.teacher.model.embed_dims == 32
    assert losses(model, TWO)[LOSS] > 0
    with pytest.raises(WiringError, match="queries of 16 numbers, the teacher's of 32"):
        taught("DETR", wide("DETR"))


@pytest.mark.parametrize("kind", ["DABDETR", "DETR"])
def test_the_order_of_the_teachers_classes(kind, teachers, tmp_path):
    order = [3, 0, 1, 2, 9, 8, 4, 5, 7, 6]
    entry, checkpoint = teachers(kind)
    saved = torch.load(checkpoint, weights_only=True)
    for key in ("bbox_head.fc_cls.weight", "bbox_head.fc_cls.bias"):
        value = saved["state_dict"][key]
        saved["state_dict"][key] = torch.cat([value[order], value[10:]])
    saved["meta"]["dataset_meta"]["classes"] = [CLASSES[i] for i in order]
    torch.save(saved, tmp_path / "permuted.pth")
    results = []
    for path in (checkpoint, tmp_path / "permuted.pth"):
        model = taught(kind, entry, str(path))
        model.start_distilling(CLASSES)
        results.append(losses(model, TWO)[LOSS].item())
    assert results[1] == pytest.approx(results[0], rel=1e-5) and results[0] > 0


def test_the_foreground_of_a_softmax_is_without_the_background(teachers):
    model = taught("DETR", *teachers("DETR"), points=0)
    kept = []
    model.distiller.terms["kddetr"].register_forward_hook(lambda module, args, ratio: kept.append((args, ratio)))
    losses(model, TWO)
    (_, teacher, _), ratio = kept[0]
    logits = teacher[model.distiller.terms["kddetr"].teacher_taps[1]][-1]
    assert logits.shape[-1] == 11
    scores = logits.exp() / logits.exp().sum(-1, keepdim=True)
    assert ratio.denominator[0].item() == pytest.approx(scores[..., :10].amax(-1).sum().item(), rel=1e-5)


def test_random_queries_differ_from_step_to_step_and_resume(teachers):
    model = taught("DABDETR", *teachers("DABDETR"), specific=False)
    term = model.distiller.terms["kddetr"]
    first = losses(model, TWO)[LOSS].item()
    state = term.hidden_state()
    second = losses(model, TWO)[LOSS].item()
    assert first != second
    term.load_hidden_state(state)
    assert losses(model, TWO)[LOSS].item() == second


def test_the_batch_and_the_queries_do_not_make_it_grow(teachers):
    model = taught("DABDETR", *teachers("DABDETR"), points=0)
    twice = {key: [*values, *copy.deepcopy(values)] for key, values in TWO.items()}
    once, double = (losses(model, batch)[LOSS].item() for batch in (TWO, twice))
    assert double == pytest.approx(once, rel=1e-5)


@pytest.mark.parametrize("kind", ["DETR", "DABDETR"])
def test_under_autocast_it_is_computed_in_float32(kind, teachers):
    model = taught(kind, *teachers(kind))
    drawn = model.distiller.terms["kddetr"].hidden_state()
    exact = losses(model, TWO)[LOSS]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.distiller.terms["kddetr"].load_hidden_state(drawn)
        found = losses(model, TWO)[LOSS]
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=0.1)
    found.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_a_peer_teaches_and_learns(tmp_path):
    entry = distilled(
        detr("DINO", frozen_bn=True), None, "", terms=[dict(type="KDDETR", points=4, name="term", source="peer")]
    )
    del entry["teacher"]
    entry["teachers"] = dict(peer=dict(type="Peer", config=detr("DINO", width=6, queries=9, frozen_bn=True)))
    found = losses(build(entry), TWO)
    assert found["distill.term.loss"] > 0 and found["distill.term_of_peer.loss"] > 0


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (
            detector(),
            detector(),
            "the student, a GFL, has no decoder that this term can give queries to (DETR, ConditionalDETR",
        ),
        (
            detr("DETR"),
            detr("ConditionalDETR"),
            "the student's DETR takes embeddings as queries, the teacher's ConditionalDETR",
        ),
        (
            detr("DeformableDETR"),
            detr("DINO"),
            "the student's DeformableDETR takes embeddings as queries, the teacher's DINO boxes",
        ),
        (detr("DABDETR") | dict(num_patterns=2), detr("DABDETR"), "has num_patterns=2"),
    ],
)
def test_what_cannot_share_queries_is_refused_in_one_line(student, teacher, message):
    with pytest.raises(WiringError) as caught:
        taught(student, teacher)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(points=-1), "points must be a whole number >= 0, got -1"),
        (dict(points=0, specific=False), "leave no queries"),
        (dict(temperature=0), "temperature"),
        (dict(overlaps=-1.0), "overlaps must be a number >= 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(DistillError, match=message):
        KDDETR(**settings)
