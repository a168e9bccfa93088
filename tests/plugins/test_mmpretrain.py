"""MMPretrain's models as teachers of features: what they know by themselves, and what is refused, where MMPretrain can be imported."""

from __future__ import annotations

import pytest
import torch

from kdgraft import DistillError
from kdgraft.sources import library_teacher
from support import pretrain
from support.pretrain import CLASSIFIER, VIT


@pytest.fixture(scope="module", autouse=True)
def library():
    pretrain.require()


def test_a_name_of_the_zoo_says_normalisation_and_grid():
    found = library_teacher(dict(type="mmpretrain", model="resnet18_8xb32_in1k", checkpoint="a.pth"), images=None)
    assert found.model.patch == 32 and found.model.prefix == 0
    own = found.normalisation
    assert own.order == "rgb" and own.mean == pytest.approx((123.675, 116.28, 103.53))


def test_the_map_before_the_vector_of_a_classifier_teaches(tmp_path):
    spec, network = pretrain.by_file(tmp_path / "vit.pth")
    found = library_teacher(spec, images=None)
    found.load()
    assert (found.model.patch, found.model.prefix) == (8, 1)
    images = torch.rand(2, 3, 48, 32)
    heard = found.model(images)
    assert heard.shape == (2, 16, 6, 4)
    tokens = network.backbone  # by its own modules: the embedding, the layers, the last norm, without the class token
    tokens.out_type = "raw"
    expected = tokens(images)[-1]
    torch.testing.assert_close(heard, expected[:, 1:].transpose(1, 2).unflatten(2, (6, 4)))
    convnext = dict(type="ConvNeXt", arch=dict(depths=[1, 1, 1, 1], channels=[8, 8, 16, 16]))
    found = library_teacher(
        dict(type="mmpretrain", model=convnext, checkpoint="a.pth", mean=[0.5] * 3, std=[0.5] * 3), images=None
    )
    assert found.model.patch == 32 and found.model(torch.rand(1, 3, 64, 96)).shape == (1, 16, 2, 3)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (dict(model="resnet18_nowhere"), r"mmpretrain's resnet18_nowhere cannot be built"),
        (dict(model=dict(VIT, type="VisionTransformers")), r"mmpretrain's VisionTransformers cannot be built"),
        (dict(model=dict(arch="b")), r"needs its type and no settings; write model=dict\(type='ImageClassifier'"),
        (dict(model=CLASSIFIER, settings=dict(depth=3)), r"needs its type and no settings"),
        (
            dict(model=dict(type="LinearClsHead", num_classes=3, in_channels=16)),
            r"LinearClsHead cannot be built|gives no map",
        ),
        (dict(model=VIT), r"teacher needs its normalisation"),
    ],
)
def test_what_cannot_teach_is_refused_in_one_line(spec, said):
    with pytest.raises(DistillError, match=said) as caught:
        library_teacher(dict(type="mmpretrain", checkpoint="a.pth", **spec), images=None)
    assert "\n" not in str(caught.value)
