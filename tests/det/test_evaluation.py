"""``kdgraft test`` on detectors: the metrics of the host's own evaluation, for plain and distilled students alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from kdgraft.cli import main
from support.det import EVERY_TERM, detector, distilled, runner_config
from support.mm import needs_resume


@pytest.fixture
def configs(tmp_path, scenes, teacher_model, teacher_checkpoint, distilled_run):
    """The config files of the distilled run, and of its plain student."""
    found = {}
    models = {"plain": detector(), "distilled": distilled(detector(), teacher_model, teacher_checkpoint, **EVERY_TERM)}
    for name, model in models.items():
        found[name] = str(tmp_path / f"{name}.py")
        runner_config(model, scenes, tmp_path / "work").dump(found[name])
    return found


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, float]:
    capsys.readouterr()
    assert main(["test", *arguments]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("coco/")]
    return {name: float(value) for name, value in rows}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["test", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("kdgraft: error: "), lines
    return lines[0]


@needs_resume
def test_the_predictions_are_those_of_the_hosts_own_test(configs, distilled_run, scenes, capsys, tmp_path):
    checkpoint = str(distilled_run.checkpoint(4))
    # As the host's tools/test.py does it: the plain config, its weights loaded by the Runner.
    host = Config.fromfile(configs["plain"])
    host.merge_from_dict(
        {
            "load_from": checkpoint,
            "test_evaluator.outfile_prefix": str(tmp_path / "host"),
            "work_dir": str(tmp_path / "host"),
        }
    )
    expected = {name: round(float(value), 4) for name, value in Runner.from_cfg(host).test().items()}
    boxes = json.loads((tmp_path / "host.bbox.json").read_text())
    assert len(boxes) > 10 and len({box["score"] for box in boxes}) > 10
    # An exported student and its config are a plain pair.
    assert main(["export", checkpoint, str(tmp_path / "student.pth")]) == 0
    pairs = {name: (config, checkpoint) for name, config in configs.items()}
    pairs["exported"] = (str(tmp_path / "student.py"), str(tmp_path / "student.pth"))
    for name, pair in pairs.items():
        found = printed(capsys, *pair, "--cfg-options", f"test_evaluator.outfile_prefix={tmp_path / name}")
        assert found == expected
        assert json.loads((tmp_path / f"{name}.bbox.json").read_text()) == boxes
    assert not (tmp_path / "work").exists()


def test_the_validation_set_serves_where_there_is_no_test_set(configs, distilled_run, capsys):
    entries = ["test_dataloader", "test_evaluator", "test_cfg"]
    found = printed(
        capsys,
        configs["distilled"],
        str(distilled_run.checkpoint(4)),
        "--cfg-options",
        *(f"{entry}=None" for entry in entries),
    )
    distilled_run.runner.val_loop.run()
    scalars = distilled_run.runner.message_hub.log_scalars
    assert found == {name: round(float(scalars[f"val/{name}"].current()), 4) for name in found} and found
    nothing = [f"{entry}=None" for entry in [*entries, "val_dataloader", "val_evaluator", "val_cfg"]]
    said = refused(capsys, configs["plain"], str(distilled_run.checkpoint(4)), "--cfg-options", *nothing)
    assert "has no test set and no validation set" in said


def test_mistakes_are_one_line(configs, distilled_run, capsys, tmp_path):
    config, checkpoint = configs["distilled"], str(distilled_run.checkpoint(4))
    assert "checkpoint not found: nowhere.pth" in refused(capsys, config, "nowhere.pth")
    assert "config not found" in refused(capsys, "nowhere.py", checkpoint)
    weights = torch.load(checkpoint, weights_only=False)
    lost = next(iter(weights["state_dict"]))
    del weights["state_dict"][lost]
    torch.save(weights, tmp_path / "other.pth")
    said = refused(capsys, config, str(tmp_path / "other.pth"))
    assert "does not fit the student GFL" in said and f"1 missing: {lost}" in said
    said = refused(capsys, config, checkpoint, "--cfg-options", "test_dataloader.dataset.ann_file=gone.json")
    assert "the student was not evaluated, as its data is not on this machine: test_dataloader: " in said
    assert "gone.json" in said
    assert Path(checkpoint).is_file()


def test_the_average_of_weights_is_what_is_evaluated(configs, scenes, tmp_path, capsys):
    """As a checkpoint of a run with an EMA holds it, and as the host's own test takes it."""
    config, work = tmp_path / "ema.py", tmp_path / "ema"
    hooks = [dict(type="EMAHook", momentum=0.3)]
    runner_config(detector(), scenes, work, custom_hooks=hooks).dump(config)
    assert main(["train", str(config)]) == 0
    checkpoint = str(work / "iter_4.pth")
    both = {"ema": str(config), "plain": configs["plain"]}
    for name, path in both.items():
        printed(capsys, path, checkpoint, "--cfg-options", f"test_evaluator.outfile_prefix={tmp_path / name}")
    ema, plain = (json.loads((tmp_path / f"{name}.bbox.json").read_text()) for name in both)
    assert ema == plain and len(ema) > 10
