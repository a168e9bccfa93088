"""Models as ONNX: what onnxruntime gives for other sizes equals PyTorch's, and nothing is written that does not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdgraft import onnx as exporting
from kdgraft.errors import DistillError
from kdgraft.onnx import Freedom, export_onnx

pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")
FREE = Freedom(
    "batch, height and width",
    {"images": (0, 2, 3)},
    [{"images": torch.rand(3, 3, 12, 20, generator=torch.Generator().manual_seed(1))}],
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.drop = nn.Dropout(0.5)

    def forward(self, images):
        found = self.drop(self.conv(images))
        return {"map": found, "levels": [F.max_pool2d(found, 2), found.mean((2, 3))]}


class Fixed(nn.Module):
    """Weighs columns by a table that it made for the width of its first image."""

    def __init__(self):
        super().__init__()
        self.table = None

    def forward(self, images):
        if self.table is None or len(self.table) != images.shape[-1]:
            self.table = [1.0 / (1 + place) for place in range(images.shape[-1])]
        return images * torch.tensor(self.table)


class Branching(nn.Module):
    def forward(self, images):
        return images + 1 if images.sum() > 0 else images - 1


@pytest.fixture
def images():
    return {"images": torch.rand(2, 3, 16, 8, generator=torch.Generator().manual_seed(0))}


def test_outputs_at_other_sizes_are_those_of_the_model(images, tmp_path):
    torch.manual_seed(0)
    net = Net()
    told = export_onnx(net, images, tmp_path / "net.onnx", freedoms=[FREE], about={"model": "Net"}, left_out="nothing")
    assert told.varies == "batch, height and width" and told.difference < 1e-5
    assert told.outputs == ("map", "levels.0", "levels.1")
    session = ort.InferenceSession(tmp_path / "net.onnx")
    assert [one.name for one in session.get_outputs()] == ["map", "levels.0", "levels.1"]
    properties = session.get_modelmeta().custom_metadata_map
    assert properties["model"] == "Net" and properties["left out"] == "nothing"
    other = torch.randn(5, 3, 6, 10)
    wanted = net.eval()(other)
    for found, value in zip(
        session.run(None, {"images": other.numpy()}), [wanted["map"], *wanted["levels"]], strict=True
    ):
        torch.testing.assert_close(torch.from_numpy(found), value)


def test_a_model_that_computes_with_the_sizes_it_was_traced_at_has_them_fixed(images, tmp_path):
    torch.manual_seed(0)
    net = Fixed()
    width = Freedom("width", {"images": (3,)}, [{"images": torch.rand(2, 3, 16, 24)}])
    batch = Freedom("batch", {"images": (0,)}, [{"images": torch.rand(4, 3, 16, 8)}])
    told = export_onnx(net, images, tmp_path / "net.onnx", freedoms=[width, batch])
    assert told.varies == "batch" and "batch may vary" in str(told)
    session = ort.InferenceSession(tmp_path / "net.onnx")
    given = torch.rand(5, 3, 16, 8)
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"images": given.numpy()})[0]), net(given))


def test_a_file_that_is_wrong_is_not_written(images, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    with pytest.raises(
        DistillError,
        match=r"Net cannot be exported: DistillError: its outputs differ from PyTorch's by .* for images \(2, 3, 16, 8\)",
    ):
        export_onnx(Net(), images, tmp_path / "net.onnx", freedoms=[FREE])
    assert not [*tmp_path.iterdir()]


def test_what_cannot_be_exported_is_said_in_one_line(images, tmp_path):
    with pytest.raises(DistillError, match="Branching cannot be exported: ") as caught:
        export_onnx(Branching(), images, tmp_path / "net.onnx")
    assert "\n" not in str(caught.value) and not [*tmp_path.iterdir()]


def test_refusals(images, tmp_path, monkeypatch):
    there = tmp_path / "there.onnx"
    there.write_text("mine")
    with pytest.raises(DistillError, match=r"name a file such as student\.onnx"):
        export_onnx(Net(), images, tmp_path / "net.pth")
    with pytest.raises(DistillError, match=r"there\.onnx would be overwritten; name another file, or say --force"):
        export_onnx(Net(), images, there)
    assert there.read_text() == "mine"
    assert export_onnx(Net(), images, there, force=True).path.stat().st_size > 100
    monkeypatch.setattr(exporting, "LARGEST", 100)
    with pytest.raises(DistillError, match=r"the weights have 0\.0 GiB, and one file of ONNX holds 2"):
        export_onnx(Net(), images, tmp_path / "large.onnx")
    monkeypatch.setattr(exporting, "installed", lambda name: name == "onnx")
    with pytest.raises(DistillError, match=r'onnxscript, onnxruntime is not installed; pip install "kdgraft\[onnx\]"'):
        export_onnx(Net(), images, tmp_path / "net.onnx")
