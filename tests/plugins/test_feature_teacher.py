"""Any module as a teacher of features: its normalisation, input size and patch grid, by hand, and what it is not asked for."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kdgraft import (
    FSP,
    Distiller,
    DistillError,
    Ensemble,
    FeatureImitation,
    FeatureTeacher,
    Hint,
    SoftTargets,
    Views,
    WeightMatching,
    WiringError,
)
from kdgraft.pixels import Conversion, Normalisation
from kdgraft.sources import library_teacher
from support.vits import Tokens, patch_means

GIVEN = dict(mean=[0.5, 0.25, 0.0], std=[0.5, 0.5, 0.25])
OWN = dict(mean=[127.5, 51.0, 0.0], std=[51.0, 51.0, 102.0], pixel_range=255, order="bgr")
PIXELS = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))  # RGB, from 0 to 1


def normalised(pixels: Tensor) -> Tensor:
    return (pixels - torch.tensor(GIVEN["mean"])[:, None, None]) / torch.tensor(GIVEN["std"])[:, None, None]


def student() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.Conv2d(4, 5, 2, stride=2), nn.Flatten(), nn.LazyLinear(3))


def heard(network: nn.Module, tap: str = "0", images: Tensor | None = None, teacher_tap: str | None = None, **settings):
    """What a term is given of the teacher, map by map."""
    found: list[Tensor] = []

    def loss(student: Tensor, teacher: Tensor, dim: int = 1, reduction: str = "none") -> Tensor:
        found.append(teacher)
        return (student - teacher).square().mean(dim)

    given = normalised(PIXELS) if images is None else images
    teacher = FeatureTeacher(network, **{"normalisation": OWN, "images": GIVEN, **settings})
    term = FeatureImitation(tap, teacher_tap=teacher_tap, loss=loss)
    distiller = Distiller(student(), teacher, [term], example=given)
    found.clear()
    out = distiller(given)
    assert out.losses["distill.feature_imitation.loss"].requires_grad
    return found


# --- normalisation


def test_a_conversion_by_hand():
    # RGB pixels (0.6, 0.4, 0.2) are (153, 102, 51) of 255; the other model reads BGR: (51 - 127.5)/51, (102 - 51)/51, 153/102.
    convert = Conversion(Normalisation.read("a", GIVEN), Normalisation.read("b", OWN), ("a", "b"))
    found = convert(normalised(torch.tensor([0.6, 0.4, 0.2])[None, :, None, None]))
    torch.testing.assert_close(found.flatten(), torch.tensor([-1.5, 1.0, 1.5]))


def test_pixels_in_both_ranges_are_one_normalisation():
    small = Normalisation.of("a", [0.2, 0.4, 0.6], [0.2, 0.4, 0.8])
    large = Normalisation.of("a", [51.0, 102.0, 153.0], [51.0, 102.0, 204.0], 255)
    assert small.mean == pytest.approx(large.mean) and small.std == pytest.approx(large.std)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "needs its normalisation, mean=… and std=…"),
        (dict(mean=[0.5], std=[0.5, 0.5]), "mean has 1 channels and std 2"),
        (dict(mean=[123.0], std=[58.0]), "beyond pixels from 0 to 1; say pixel_range=255"),
        (dict(mean=[0.5], std=[0.2], pixel_range=255), "for pixels from 0 to 1; say pixel_range=1"),
        (dict(mean=[0.5], std=[0.0]), "std must be a number > 0"),
        (dict(mean=[0.5], std=[0.2], pixel_range=2), "pixel_range must be 1 or 255"),
        (dict(mean=[0.5], std=[0.2], order="gbr"), "order must be 'rgb' or 'bgr'"),
        (dict(mean=[0.5], sdt=[0.2]), "takes no argument 'sdt'; did you mean 'std'"),
    ],
)
def test_no_normalisation_is_refused(given, said):
    with pytest.raises(DistillError, match=said):
        FeatureTeacher(patch_means(4), normalisation=given, images=None)


# --- the patch grid


def test_each_position_hears_the_mean_of_its_patch_of_the_original_image():
    (found,) = heard(patch_means(4), patch=4)
    assert found.shape == (2, 3, 2, 3)
    for image in range(2):
        for row in range(2):
            for column in range(3):
                patch = PIXELS[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] * 255
                red, green, blue = (channel.mean() for channel in patch)
                expected = torch.stack([(blue - 127.5) / 51, (green - 51) / 51, red / 102])
                torch.testing.assert_close(found[image, :, row, column], expected, rtol=1e-4, atol=1e-5)


def test_class_and_register_tokens_are_no_places():
    (expected,) = heard(patch_means(4), patch=4)
    assert torch.equal(heard(Tokens(4, prefix=5), patch=4, prefix=5)[0], expected)
    # A layer of the network by its own name, before those tokens are there.
    assert torch.equal(heard(Tokens(4, prefix=5), patch=4, prefix=5, teacher_tap="embed")[0], expected)
    assert torch.equal(heard(Tokens(4, prefix=0), patch=4)[0], expected)


@pytest.mark.parametrize("settings", [dict(patch=4), dict(patch=4, prefix=4), dict(patch=2, prefix=5)])
def test_tokens_of_another_count_are_refused(settings):
    with pytest.raises(WiringError, match=r"gives 11 tokens for an input of 8×12: not .*; set prefix=.* and patch="):
        heard(Tokens(4, prefix=5), **settings)


def test_maps_with_channels_last():
    class Last(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.avg_pool2d(images, 4).permute(0, 2, 3, 1)

    assert torch.equal(heard(Last(), patch=4, channels_last=True)[0], heard(patch_means(4), patch=4)[0])


@pytest.mark.parametrize(
    ("size", "patch", "grid"), [(None, 5, (2, 2)), ((4, 6), 2, (2, 3)), (8, 4, (2, 2)), (16, 4, (4, 4))]
)
def test_the_input_is_resized_to_whole_patches(size, patch, grid):
    # Sides of 8 and 12 are nearest to 10 and 10 in fives. A constant image stays one, and a place stays where it is in the image.
    y, x = (torch.arange(n) + 0.5 for n in (8, 12))
    images = torch.stack([torch.ones(8, 12), y[:, None].expand(8, 12), x.expand(8, 12)])[None]
    (found,) = heard(patch_means(patch), images=images, patch=patch, size=size, normalisation=GIVEN)
    assert found.shape == (1, 3, *grid)
    torch.testing.assert_close(found[:, 0], torch.ones(1, *grid))
    # By symmetry the mean over all patches is the image's centre, whatever the filter does at the border.
    torch.testing.assert_close(found[0, 1:].mean((1, 2)), torch.tensor([4.0, 6.0]), rtol=1e-3, atol=1e-3)
    assert (found[0, 1].diff(dim=0) > 0).all() and (found[0, 2].diff(dim=1) > 0).all()


@pytest.mark.parametrize("size", [10, (8, 6), (8,), 0, "8", (8, 8, 8)])
def test_sizes_that_are_no_whole_patches_are_refused(size):
    with pytest.raises(DistillError, match="size must be"):
        FeatureTeacher(patch_means(4), normalisation=OWN, images=None, patch=4, size=size)


# --- in a distillation


def test_one_map_teaches_each_of_several():
    found = heard(patch_means(4), tap=["0", "1"], patch=4)
    assert len(found) == 2 and torch.equal(*found)
    teacher = FeatureTeacher(patch_means(4), normalisation=OWN, images=GIVEN, patch=4)
    with pytest.raises(WiringError, match=r"fsp relates two layers of the teacher, and one map stands for both"):
        Distiller(student(), teacher, [FSP(["0", "1"])], example=normalised(PIXELS))


def test_views_bring_their_own_normalisation():
    teacher = FeatureTeacher(patch_means(4), normalisation=OWN, images=None, patch=4)
    views = Views(normalised(PIXELS), teacher=PIXELS)
    assert Distiller(student(), teacher, [Hint("0")], example=views)(views).loss > 0


def test_members_of_an_ensemble_teach_features_each_by_itself():
    teachers = dict(
        a=FeatureTeacher(patch_means(4), normalisation=OWN, images=GIVEN, patch=4),
        b=FeatureTeacher(patch_means(2), normalisation=OWN, images=GIVEN, patch=2),
        both=Ensemble(["a", "b"]),
    )
    distiller = Distiller(student(), teachers=teachers, terms=[Hint("0", source="both")], example=normalised(PIXELS))
    assert list(distiller(normalised(PIXELS)).losses) == ["distill.hint_from_a.loss", "distill.hint_from_b.loss"]
    with pytest.raises(WiringError, match="'a', a AvgPool2d, gives features alone"):
        Distiller(student(), teachers=teachers, terms=[SoftTargets(source="both")], example=normalised(PIXELS))


@pytest.mark.parametrize("term", [SoftTargets(), WeightMatching("0")])
def test_terms_on_more_than_features_are_refused(term):
    teacher = FeatureTeacher(nn.Conv2d(3, 4, 4, stride=4), normalisation=OWN, images=GIVEN, patch=4)
    with pytest.raises(
        WiringError, match=rf"{term.name}: a {type(term).__name__} reads predictions or weights, and 'teacher'"
    ):
        Distiller(student(), teacher, [term], example=normalised(PIXELS))


def test_weights_are_read_strictly_when_training_starts(tmp_path):
    network, other = nn.Conv2d(3, 4, 4, stride=4), nn.Conv2d(3, 4, 4, stride=4)
    torch.save(other.state_dict(), tmp_path / "teacher.pth")
    teacher = FeatureTeacher(network, tmp_path / "teacher.pth", normalisation=OWN, images=GIVEN, patch=4)
    assert not torch.equal(network.weight, other.weight)
    distiller = Distiller(student(), teacher, [Hint("0")], example=normalised(PIXELS))
    assert torch.equal(network.weight, other.weight) and not network.weight.requires_grad
    assert not any(key.startswith("network") for key in distiller.state_dict())
    torch.save({"bias": torch.zeros(4)}, tmp_path / "wrong.pth")
    with pytest.raises(DistillError, match=r"wrong\.pth does not fit the teacher Conv2d; 1 missing: weight"):
        FeatureTeacher(network, tmp_path / "wrong.pth", normalisation=OWN, images=GIVEN, patch=4).load()


def test_weights_of_safetensors(tmp_path):
    network, other = nn.Conv2d(3, 4, 4, stride=4), nn.Conv2d(3, 4, 4, stride=4)
    save_file(other.state_dict(), tmp_path / "model.safetensors")
    FeatureTeacher(network, tmp_path / "model.safetensors", normalisation=OWN, images=GIVEN, patch=4).load()
    assert torch.equal(network.weight, other.weight)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(DistillError, match=r"cannot read checkpoint .*model\.safetensors"):
        FeatureTeacher(network, tmp_path / "model.safetensors", normalisation=OWN, images=GIVEN, patch=4).load()


def test_a_network_that_cannot_run_on_these_pixels_says_so():
    with pytest.raises(
        WiringError, match=r"the teacher Linear cannot run on 8×12 pixels \(RuntimeError: .*set size="
    ) as caught:
        heard(nn.Linear(5, 5))
    assert "\n" not in str(caught.value)


# --- by a dict


def test_a_function_of_the_users_builds_the_network():
    spec = dict(type="module", build="support.vits:patch_means", settings=dict(side=4), patch=4, **OWN)
    teacher = library_teacher(spec, images=GIVEN)
    assert isinstance(teacher.model.network, nn.AvgPool2d) and teacher.normalisation.order == "bgr"
    assert Distiller(student(), teacher, [Hint("0")], example=normalised(PIXELS))(normalised(PIXELS)).loss > 0


BUILD = dict(type="module", build="support.vits:patch_means", patch=4, **OWN)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({**BUILD, "sizes": 1}, r"teacher, of type 'module', takes no argument 'sizes'; did you mean 'size'"),
        (dict(type="module", **OWN), "needs build=…"),
        (dict(BUILD, type="modules"), "no source has the type 'modules'; did you mean 'module'"),
        ({**BUILD, "build": "support"}, "build must be 'package.module:function', got 'support'"),
        ({**BUILD, "build": "support.vits:nothing"}, r"support\.vits:nothing cannot be built \(AttributeError"),
        ({**BUILD, "build": "support.vits:by_file", "settings": dict(path=3)}, "cannot be built"),
        ({**BUILD, "build": "builtins:dict"}, "builtins:dict must return a torch module, got dict"),
        ({**BUILD, "settings": 3}, "settings must be a dict of arguments"),
        ({key: value for key, value in BUILD.items() if key != "patch"}, "needs patch=…"),
        ({key: value for key, value in BUILD.items() if key not in OWN}, "needs its normalisation"),
        ({**BUILD, "precision": "int8"}, "precision must be"),
        ({**BUILD, "trusted": "no"}, "trusted must be true or false"),
    ],
)
def test_a_dict_that_means_nothing_is_refused_in_one_line(spec, said):
    with pytest.raises(DistillError, match=said) as caught:
        library_teacher(spec, images=GIVEN)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_library_that_is_missing_is_named(library):
    if find_spec(library) is not None:
        pytest.skip("it is installed")
    with pytest.raises(DistillError, match=f"^teacher: type='{library}' needs the library: pip install {library}$"):
        library_teacher(dict(type=library, model="resnet18", checkpoint="a.pth"), images=GIVEN)


def test_mmpretrain_that_is_missing_is_named():
    if find_spec("mmpretrain") is not None:
        pytest.skip("it is installed")
    said = "^teacher: mmpretrain is not installed: pip install onedl-mmpretrain torchvision$"
    with pytest.raises(DistillError, match=said):
        library_teacher(dict(type="mmpretrain", model="resnet18_8xb32_in1k", checkpoint="a.pth"), images=GIVEN)


def test_timm_says_normalisation_patch_and_tokens(tmp_path):
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("test_vit3", pretrained=False).state_dict(), tmp_path / "vit.pth")
    spec = dict(type="timm", model="test_vit3", checkpoint=str(tmp_path / "vit.pth"))
    teacher = library_teacher(spec, images=GIVEN)
    distiller = Distiller(student(), teacher, [Hint("0")], example=normalised(PIXELS))
    (row,) = distiller.rows
    assert row.teacher_shape == "2×96×10×10" and teacher.model.size == (160, 160) and teacher.model.prefix == 1
    free = library_teacher({**spec, "settings": dict(dynamic_img_size=True)}, images=GIVEN)
    assert free.model.size is None and free.model.input_size((100, 300)) == (96, 304)


def test_torchvision_by_the_names_of_its_layers(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    torch.save(torchvision.models.get_model("resnet18").state_dict(), tmp_path / "net.pth")
    spec = dict(
        type="torchvision", model="resnet18", checkpoint=str(tmp_path / "net.pth"), mean=[0.5] * 3, std=[0.5] * 3
    )
    (row,) = Distiller(
        student(), library_teacher(spec, images=GIVEN), [Hint("0", teacher_tap="layer3")], example=normalised(PIXELS)
    ).rows
    assert row.teacher_shape == "2×256×2×2"
