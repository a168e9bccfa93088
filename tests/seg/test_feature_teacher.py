"""Vision transformers of Transformers as teachers of segmentors."""

from __future__ import annotations

import pytest
import torch

from kdgraft.errors import DistillError, WiringError
from support.mm import history, needs_resume, run, weights
from support.seg import batch, build, config, distilled, losses_of, segmentor, total
from support.tensors import assert_same
from support.vits import CONFIGS, by_file, by_folder, network

pytest.importorskip("transformers")

TERMS = [
    dict(type="FeatureImitation", tap="backbone[-1]", loss="cosine"),
    dict(type="PearsonImitation", tap="backbone[*]", teacher_tap="hidden_states[1]"),
    dict(type="PairwiseAffinity"),
    dict(type="SimilarityPreserving"),
]


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_vit_teaches_segformer(tmp_path, kind):
    model = build(distilled(segmentor("SegFormer"), by_file(tmp_path / "vit.pth", kind), terms=TERMS))
    taps = {row.term: (row.student_tap, row.teacher_tap) for row in model.distiller.rows}
    assert taps["pairwise_affinity"] == ("decode_head.cls_seg():input", "last")
    assert taps["feature_imitation"] == ("backbone[-1]", "last")
    inputs, samples = batch(content=(64, 40))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    course = []
    for _ in range(4):
        found = losses_of(model, inputs, samples)
        optimizer.zero_grad()
        total({key: value for key, value in found.items() if key.startswith("distill.")}).backward()
        optimizer.step()
        course.append(found["distill.feature_imitation.loss"].item())
    assert course[-1] < course[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, scenes):
    """SegFormer under a DINOv3 from its folder: 4 iterations, checkpoints after 2 and 4."""
    work_dir = tmp_path_factory.mktemp("run")
    entry = distilled(segmentor("SegFormer", dropout=0.0), by_folder(tmp_path_factory.mktemp("dinov3")), terms=TERMS)
    return entry, run(config(entry, scenes, work_dir)), work_dir


def test_a_runner_trains_a_plain_student(trained):
    _, runner, work_dir = trained
    assert all(value > 0 for value in history(runner, "distill.feature_imitation.loss"))
    saved = torch.load(work_dir / "iter_4.pth", weights_only=False)["state_dict"]
    assert list(saved) == list(build(segmentor("SegFormer")).state_dict())
    assert_same(dict(runner.model.distiller.teacher.model.network.state_dict()), dict(network("DINOv3").state_dict()))


@needs_resume
def test_kill_and_resume_makes_no_difference(tmp_path, scenes, trained):
    entry, whole, work_dir = trained
    again = run(config(entry, scenes, tmp_path, resume=True, load_from=str(work_dir / "iter_2.pth")))
    assert_same(weights(again), weights(whole))


@pytest.mark.parametrize("settings", [dict(recipe="skd"), dict(terms=[dict(type="DIST")]), dict(recipe="cwd")])
def test_terms_on_class_scores_are_refused(tmp_path, settings):
    said = "reads predictions or weights|cannot compare both class scores and features"
    with pytest.raises(DistillError, match=said) as caught:
        build(distilled(segmentor("SegFormer"), by_file(tmp_path / "vit.pth"), **settings))
    assert "\n" not in str(caught.value)


def test_other_settings_are_refused(tmp_path):
    spec = by_file(tmp_path / "vit.pth")
    with pytest.raises(DistillError, match="takes no teacher scale"):
        build(distilled(segmentor("SegFormer"), {**spec, "scale": 2.0}, terms=TERMS))
    taps = [dict(type="FeatureImitation", tap="backbone[0]", teacher_tap="decode_head")]
    with pytest.raises(WiringError, match="the teacher has no module 'decode_head'"):
        build(distilled(segmentor("SegFormer"), spec, terms=taps))
