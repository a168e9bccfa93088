"""The support table: on every ✓ real training makes the distillation loss fall, and every – is refused with a reason."""

from __future__ import annotations

import pytest
import torch
from mmengine.logging import MessageHub

from kdgraft import WiringError
from support import det_table
from support.det import build, distilled, losses, raw_batch, save_teacher
from support.det_stages import STAGED, detr, staged, with_masks
from support.det_zoo import zoo
from support.marked import between_marks
from support.tensors import distillation


def model(detector: str, **settings):
    """A small real detector by its name in the table."""
    if detector in det_table.DENSE:
        return zoo(detector, **settings)
    return (
        staged(detector, **settings)
        if detector in STAGED
        else detr(detector.replace(" ", "").replace("-", ""), **settings)
    )


def batch(detector: str):
    return with_masks(raw_batch()) if detector in det_table.MASKED else raw_batch()


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """detector -> (model, checkpoint) of a wider teacher."""
    folder = tmp_path_factory.mktemp("teachers")
    found = {}

    def teacher(detector):
        if detector not in found:
            entry = model(detector, width=6)
            found[detector] = entry, save_teacher(folder / f"{detector}.pth", entry)
        return found[detector]

    return teacher


@pytest.fixture(autouse=True)
def _epoch():
    # TOOD asks the Runner's hub which epoch it is, to choose its assigner.
    MessageHub.get_current_instance().update_info("epoch", 9)


def cells(wanted):
    return [
        pytest.param(t, d, id=f"{t}-{d}")
        for t in det_table.TECHNIQUES
        for d in det_table.DETECTORS
        if det_table.works(t, d) is wanted
    ]


def trained_cells():
    """Every ✓; by default each technique trains on one dense head, one of stages and one of queries, and every head once."""
    default = set()
    for number, technique in enumerate(det_table.TECHNIQUES):
        for kinds in (det_table.DENSE, det_table.STAGED, det_table.QUERIES):
            there = [detector for detector in kinds if det_table.works(technique, detector)]
            default |= {(technique, there[number % len(there)])} if there else set()
    default |= {("`SoftTargets`", detector) for detector in set(det_table.DETECTORS) - {one for _, one in default}}
    return [
        cell if cell.values in default else pytest.param(*cell.values, id=cell.id, marks=pytest.mark.slow)
        for cell in cells(True)
    ]


def test_the_default_tier_trains_every_technique_and_every_detector():
    default = [cell.values for cell in trained_cells() if not cell.marks]
    assert {technique for technique, _ in default} == set(det_table.TECHNIQUES)
    assert {detector for _, detector in default} == set(det_table.DETECTORS)


@pytest.mark.parametrize(("technique", "detector"), trained_cells())
def test_training_on_one_batch_makes_the_loss_fall(teachers, technique, detector):
    term = dict(det_table.term(technique, detector), weight=1.0, name="term")
    student = build(distilled(model(detector, frozen_bn=True), *teachers(detector), terms=[term]))
    trained = [p for p in student.parameters() if p.requires_grad]
    # SimOTA and Hungarian matching answer to what is predicted: steps small enough to leave them where they are.
    optimizer = torch.optim.Adam(trained, lr=2e-4 if detector in ("YOLOX", "DINO") else 2e-3)
    values = []
    for step in range(4):
        torch.manual_seed(0)  # DINO draws noise, samplers draw proposals
        found = losses(student, batch(detector))
        values.append(distillation(found).item())
        if step == 0:  # the host's loss is computed as ever; only the term's steps are taken
            sum(value for name, value in found.items() if "loss" in name and not name.startswith("distill.")).backward(
                retain_graph=True
            )
        optimizer.zero_grad()
        found["distill.term.loss"].backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in trained)
        optimizer.step()
    assert all(value == value and value > 0 for value in values), values
    assert values[-1] < values[0], values
    assert student.distiller.dropped == {"term": 0}


@pytest.mark.parametrize(("technique", "detector"), cells(False))
def test_what_has_no_meaning_is_refused_with_a_reason(teachers, technique, detector):
    with pytest.raises(WiringError) as caught:
        build(distilled(model(detector), *teachers(detector), terms=[det_table.term(technique, detector)]))
    message = str(caught.value)
    assert "\n" not in message and len(message) > 40


def itself(detector, terms, path):
    """A student with its teacher's weights, one step: the distillation losses."""
    entry = model(detector, frozen_bn=True)
    student = build(distilled(entry, entry, save_teacher(path, entry), terms=terms))
    student.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    torch.manual_seed(0)
    return {name: value for name, value in losses(student, batch(detector)).items() if name.startswith("distill.")}


@pytest.mark.parametrize("detector", det_table.DETECTORS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path, detector):
    heads = ("auto", "rpn_head") if detector in STAGED else ("auto",)
    # Attention in training is not bit for bit that of evaluation, and rounding decides which of two equal boxes is the better.
    kinds = ("SoftTargets",) if detector in det_table.QUERIES else ("SoftTargets", "BoundedRegression")
    terms = [dict(type=kind, head=head, name=f"{kind}_{head}") for kind in kinds for head in heads]
    found = itself(detector, terms, tmp_path / "teacher.pth")
    assert len(found) == len(terms)
    for name, value in found.items():
        assert value.item() == pytest.approx(0, abs=1e-5), name


def test_the_readme_shows_this_table():
    shown = between_marks(det_table.README.read_text(), det_table.MARKS)[1]
    assert shown == det_table.table(), "run python tests/support/det_table.py"
