"""DistilledDetector on the real Runner: the promises of a distilled run."""

from __future__ import annotations

import torch
from mmengine.runner import Runner

from det_support import build, detector, distilled, run, runner_config

ALL_TERMS = [
    dict(type="FeatureImitation", tap="neck[*]", region="foreground"),
    dict(type="FeatureImitation", tap="backbone.layer3", name="layer3"),
    dict(type="FeatureImitation", tap="bbox_head.cls_convs[0]", name="tower"),
    dict(type="SoftTargets"),
]


def test_every_term_trains_through_the_runner(tmp_path, scenes, teacher_model, teacher_checkpoint):
    model = distilled(detector(), teacher_model, teacher_checkpoint, recipe="localization", terms=ALL_TERMS)
    runner = run(runner_config(model, scenes, tmp_path, iters=2))
    logged = {key.removeprefix("train/") for key in runner.message_hub.log_scalars}
    names = ["ld_main", "ld_vlr", "class_main", "feature_imitation", "layer3", "tower", "soft_targets"]
    assert {f"distill.{name}.loss" for name in names} <= logged
    for name in names:
        assert runner.message_hub.get_scalar(f"train/distill.{name}.loss").current() > 0
    state = runner.optim_wrapper.optimizer.state  # SGD's momentum is there for whatever got a gradient
    for name, parameter in runner.model.named_parameters():
        assert torch.isfinite(state[parameter]["momentum_buffer"]).all(), name


def test_saved_student_is_a_plain_student_and_tests_alike(tmp_path, scenes, teacher_model, teacher_checkpoint):
    student = detector()
    model = distilled(student, teacher_model, teacher_checkpoint, recipe="localization", terms=ALL_TERMS)
    run(runner_config(model, scenes, tmp_path / "distilled", iters=2))
    checkpoint = tmp_path / "distilled" / "iter_2.pth"
    plain = build(student)
    plain.load_state_dict(torch.load(checkpoint, weights_only=False)["state_dict"], strict=True)

    metrics = []
    for name, entry in (("a", student), ("b", model)):
        config = runner_config(entry, scenes, tmp_path / name, load_from=str(checkpoint))
        metrics.append(Runner.from_cfg(config).test())
    assert metrics[0] == metrics[1]
