"""mmengine's checkpoints, read without running anything in them. Exporting is tested on real runs, in tests/det."""

from __future__ import annotations

import resource

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer, MessageHub

from kdgraft.cli import main
from kdgraft.errors import DistillError, UnsafeCheckpoint
from kdgraft.sources.teacher import read_checkpoint
from kdgraft_mm.checkpoints import SAFE_TYPES, export_student
from support.commands import refused


def saved(tmp_path, **content):
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": {"weight": torch.ones(2)}, **content}, path)
    return path


def test_a_message_hub_with_histories_loads(tmp_path):
    hub = MessageHub("test_mm_checkpoints")
    for value in (1, 2.5):
        hub.update_scalar("train/loss", value)
    hub.update_info("array", np.arange(3.0, dtype=np.float32))
    hub.update_info("number", np.float64(0.5))
    hub.update_info("text", np.array(["a", "b"]))
    hub.update_info("flag", np.bool_(True))
    path = saved(tmp_path, message_hub=hub.state_dict())
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(path, weights_only=True)
    found = read_checkpoint(path, safe_types=SAFE_TYPES)
    assert torch.equal(found["state_dict"]["weight"], torch.ones(2))
    info = found["message_hub"]["runtime_info"]
    assert info["array"].tolist() == [0, 1, 2] and info["number"] == 0.5
    # Reading leaves mmengine's class as it was: a file cannot put methods of its own into it.
    assert HistoryBuffer._statistics_methods["mean"] is HistoryBuffer.mean


class Evil:
    """Unpickles by getattr on something harmless to something that is not."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, "__init_subclass__")


class Worse:
    def __reduce__(self):
        import os

        return os.getenv, ("HOME",)


def test_getattr_in_a_file_yields_nothing(tmp_path):
    # mmengine's own files need the name; what it does in them is nothing.
    found = read_checkpoint(saved(tmp_path, meta={"x": Evil()}), safe_types=SAFE_TYPES)
    assert found["meta"]["x"] is None


def test_anything_else_is_refused_without_the_flag(tmp_path):
    path = saved(tmp_path, meta={"x": Worse()})
    with pytest.raises(UnsafeCheckpoint, match="getenv"):
        read_checkpoint(path, safe_types=SAFE_TYPES)
    assert "x" in read_checkpoint(path, trusted=True)["meta"]


# --- exporting


DISTILLED = "model = dict(student='A', teacher=dict(), type='{kind}', width=4)\ncustom_imports = dict(imports=['kdgraft_det'])\n"
PLAIN_NAME = DISTILLED.format(kind="DistilledDetector")


def trained(tmp_path, text=PLAIN_NAME):
    return saved(tmp_path, meta=dict(cfg=text, epoch=1))


@pytest.mark.parametrize(
    "kind", ["DistilledDetector", "mmdet.DistilledDetector", "kdgraft_det.detector.DistilledDetector"]
)
def test_an_exported_config_is_plain_however_the_distilled_one_was_named(tmp_path, kind):
    weights, config = export_student(trained(tmp_path, DISTILLED.format(kind=kind)), tmp_path / "student.pth")
    assert Config.fromfile(config).to_dict() == dict(model=dict(type="A", width=4))
    found = torch.load(weights, weights_only=True)
    assert set(found) == {"meta", "state_dict"} and torch.equal(found["state_dict"]["weight"], torch.ones(2))
    assert Config.fromstring(found["meta"]["cfg"], ".py").to_dict() == dict(model=dict(type="A", width=4))


def test_a_config_that_is_code_is_run_for_those_who_say_so_alone(tmp_path, capsys):
    trace = tmp_path / "trace"
    code = f"__import__('os').mkdir({str(trace)!r})\nmodel = dict(type='A')\n"
    arguments = ["export", str(trained(tmp_path, code)), str(tmp_path / "student.pth")]
    said = refused(capsys, arguments)
    assert "holds more than literals" in said and "--trusted" in said
    assert not trace.exists() and not (tmp_path / "student.pth").exists()
    assert main([*arguments, "--trusted"]) == 0
    assert trace.exists() and Config.fromfile(tmp_path / "student.py").to_dict() == dict(model=dict(type="A"))


@pytest.mark.parametrize("there", [["student.pth"], ["student.py"], ["student.pth", "student.py"]])
def test_nothing_is_overwritten_without_force(tmp_path, there, capsys):
    for name in there:
        (tmp_path / name).write_text("mine")
    arguments = ["export", str(trained(tmp_path)), str(tmp_path / "student.pth")]
    said = refused(capsys, arguments)
    assert "--force" in said and all(str(tmp_path / name) in said for name in there)
    assert all((tmp_path / name).read_text() == "mine" for name in there)
    assert len(list(tmp_path.iterdir())) == 1 + len(there)
    assert main([*arguments, "--force"]) == 0
    assert torch.load(tmp_path / "student.pth", weights_only=True)["state_dict"]["weight"].sum() == 2
    assert Config.fromfile(tmp_path / "student.py").model.type == "A"


def test_the_help_says_that_a_config_is_written(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "the config goes beside it, as student.py" in said


@pytest.mark.parametrize("room", [0, 100])
def test_a_disk_that_is_full_leaves_nothing_half_written(tmp_path, room):
    checkpoint = trained(tmp_path)
    (tmp_path / "student.py").write_text("mine")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(DistillError, match=r"cannot write .*student.*nothing was changed"):
            export_student(checkpoint, tmp_path / "student.pth", force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pth", "student.py"]
    assert (tmp_path / "student.py").read_text() == "mine"
