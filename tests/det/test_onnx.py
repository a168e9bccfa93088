"""The tensor part of distilled detectors as ONNX, from checkpoints, by the command line."""

from __future__ import annotations

import json

import pytest
import torch
from mmengine.config import Config

from kdgraft.cli import main
from support.commands import refused
from support.det import CLASSES, build, detector, distilled
from support.det_zoo import zoo

ort = pytest.importorskip("onnxruntime")
NO_ADAPTERS = dict(terms=["FeatureImitation"])


def checkpoint(path, entry, model):
    """What a Runner saves: weights of the plain student, and the distilled config."""
    config = Config(dict(default_scope="mmdet", model=entry))
    torch.save(
        {"state_dict": model.state_dict(), "meta": {"cfg": config.pretty_text, "dataset_meta": {"classes": CLASSES}}},
        path,
    )
    return str(path)


@pytest.mark.parametrize("kind", ["GFL", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("RTMDet", "YOLOX"))])
def test_images_of_any_number_and_size(kind, tmp_path, capsys):
    student = detector() if kind == "GFL" else zoo(kind)
    model = build(student).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # an initialised detector predicts almost nothing
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    path = checkpoint(tmp_path / "iter_2.pth", distilled(student, student, "absent.pth", **NO_ADAPTERS), model)
    out = tmp_path / "student.onnx"
    assert main(["export", path, str(out), "--onnx", "--size", "96", "128"]) == 0
    said = capsys.readouterr().out
    assert (
        "batch, height and width may vary" in said
        and "left out: resizing, normalisation and padding" in said
        and "NMS" in said
    )
    session = ort.InferenceSession(out)
    images = torch.randn(1, 3, 160, 96, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = model(images, mode="tensor")
    found = session.run(None, {"images": images.numpy()})
    names = [one.name for one in session.get_outputs()]
    assert names == [f"head.{part}.{level}" for part in range(len(wanted)) for level in range(len(wanted[part]))]
    for value, target in zip(found, [one for part in wanted for one in part], strict=True):
        torch.testing.assert_close(torch.from_numpy(value), target, atol=1e-4, rtol=1e-4)
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["classes"]) == list(CLASSES)
    assert set(json.loads(told["preprocessing"])) >= {"mean", "std", "pad_size_divisor"}


def test_refusals(tmp_path, capsys):
    student = detector()
    path = checkpoint(tmp_path / "iter_2.pth", student, build(student))
    out = str(tmp_path / "student.onnx")
    refused(capsys, ["export", path, out, "--onnx"], "give --size HEIGHT WIDTH")
    refused(capsys, ["export", path, out, "--onnx", "--size", "0", "8"], "--size must be a whole number >= 1, got 0")
    refused(capsys, ["export", path, out, "--size", "64", "64"], "--size belongs to --onnx")
    refused(
        capsys,
        ["export", path, str(tmp_path / "student.pth"), "--onnx", "--size", "64", "64"],
        "name a file such as student.onnx",
    )
    other = checkpoint(tmp_path / "other.pth", student, build(detector(channels=16)))
    refused(capsys, ["export", other, out, "--onnx", "--size", "64", "64"], "student")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["iter_2.pth", "other.pth"]
