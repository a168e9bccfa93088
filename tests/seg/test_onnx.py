"""The tensor part of segmentors as ONNX: sizes vary where the model allows it, and are fixed where it computes with them."""

from __future__ import annotations

import pytest
import torch
from mmengine.config import Config

from kdgraft.cli import main
from support.seg import build, segmentor

ort = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize(
    ("family", "varies"),
    [
        ("FCN", "batch, height and width may vary"),
        pytest.param("PSPNet", "batch may vary", marks=pytest.mark.slow),
    ],
)
def test_scores_are_those_of_the_model(family, varies, tmp_path, capsys):
    student = segmentor(family)
    model = build(student).eval()
    path = tmp_path / "iter_2.pth"
    config = Config(dict(default_scope="mmseg", model=student))
    torch.save({"state_dict": model.state_dict(), "meta": {"cfg": config.pretty_text}}, path)
    out = tmp_path / "student.onnx"
    assert main(["export", str(path), str(out), "--onnx", "--size", "64", "96"]) == 0
    said = capsys.readouterr().out
    assert varies in said and "left out: resizing, normalisation and padding" in said and "argmax" in said
    session = ort.InferenceSession(out)
    assert [one.name for one in session.get_outputs()] == ["scores"]
    size = (96, 64) if "height" in varies else (64, 96)
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = model(images, mode="tensor")
    torch.testing.assert_close(
        torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), wanted, atol=1e-4, rtol=1e-4
    )
