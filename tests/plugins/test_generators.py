"""Terms on generators: reconstruction, a discriminator that learns beside the student, and the recipe of GAN compression."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import golden
from kdgraft import RECIPES, AdversarialImages, Distiller, DistillError, Reconstruction, WiringError
from kdgraft.fit import fit
from kdgraft.losses import critic_loss
from kdgraft.opponents import PatchCritic, PatchOpponent
from kdgraft.registry import expand_recipe
from kdgraft.terms import build_terms

KEY = "distill.adversarial_images"


def waves(channels: int, frequency: float, phase: float, scale: float) -> Tensor:
    return golden.wave((2, channels, 16, 16), frequency, phase, scale)


GIVEN, MADE = waves(2, 0.13, 0.4, 1.0), waves(3, 0.29, 0.1, 0.9)
TEACHERS, TRUE = waves(3, 0.31, 0.5, 0.9), waves(3, 0.37, 0.8, 0.9)

# mit-han-lab/gan-compression@111093fc62d459226f052cad5b950c80a3683197: NLayerDiscriminator (4, 2 layers, instance normalisation) of
# models/modules/discriminators.py, filled by filled(); GANLoss of models/modules/loss.py; backward_D and backward_G of
# distillers/base_resnet_distiller.py, with golden.regressor() as features of two layers, the second in reverse order of images, and
# the published weights of paired (aligned) and unpaired training.
# (paired, kind): loss of the discriminator, then of the student: GAN, reconstruction, features, all; gradient at [0, 0, 0, 0] of the
# student's image, sum of the squared gradients.
AUTHORS = {
    (True, "hinge"): (1.62091641240715, -1.17350149561105, 73.56965221921556, 6.32270939296441, 78.71886011656892,
                      -0.10782685511595921, 62.61778034846644),
    (True, "lsgan"): (2.45878698113487, 0.39395262878743, 73.56965221921556, 6.32270939296441, 80.2863142409674,
                      0.06728843999318039, 172.1534893588821),
    (False, "hinge"): (0.88364442197089, -0.15599130320466, 7.43533041895677, 0.06322709392964, 7.34256620968176,
                       0.007544933763916398, 5.569720613575218),
    (False, "lsgan"): (1.29335579059245, 2.8063523825332, 7.43533041895677, 0.06322709392964, 10.30490989541962,
                       -0.0069870477171949975, 35.18117580564682),
}  # fmt: skip


def filled(critic: PatchCritic) -> PatchCritic:
    with torch.no_grad():
        for k, p in enumerate(critic.parameters()):
            p.copy_(golden.wave(tuple(p.shape), 0.7 + 0.11 * k, 0.3, 0.5))
    return critic


class Fixed(nn.Module):
    """Hands on an image and two maps, whatever its input."""

    def __init__(self, image: Tensor, maps: Tensor) -> None:
        super().__init__()
        self.image, self.maps = nn.Parameter(image.clone()), nn.Parameter(maps.clone())
        self.first, self.second = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        self.first(self.maps), self.second(self.maps.flip(0))
        return self.image * 1


class FixedTeacher(Fixed):
    def forward(self, x: Tensor) -> Tensor:
        self.first(self.maps), self.second(self.maps)
        return self.image * 1


@pytest.mark.parametrize(("paired", "kind"), list(AUTHORS))
def test_the_recipe_has_the_authors_losses(paired: bool, kind: str):
    features, theirs, weight, bias = golden.regressor()
    recipe = dict(
        type="gan_compression", paired=paired, kind=kind, tap=["first", "second"], width=4, layers=2, lr=1e-12
    )
    model = Distiller(Fixed(MADE, features), FixedTeacher(TEACHERS, theirs), recipe=recipe, example=GIVEN).double()
    opponent = model.terms["adversarial_images"].opponent
    filled(opponent.network.float())
    for adapter in model.terms["hint"].adapters:
        adapter.project.weight.data.copy_(weight), adapter.project.bias.data.copy_(bias)
    out = model(GIVEN, targets=TRUE)
    told = (f"{KEY}.critic", f"{KEY}.loss", "distill.reconstruction.loss", "distill.hint.loss")
    critic, gan, rebuilt, hint = (out.losses[name].item() for name in told)
    found = (critic / 2, gan, rebuilt, hint, out.total(torch.tensor(99.0)).item())
    assert found == pytest.approx(AUTHORS[paired, kind][:5], rel=2e-5)
    (slope,) = torch.autograd.grad(out.loss, model.student.image)
    found = slope[0, 0, 0, 0].item(), slope.square().sum().item()
    assert found == pytest.approx(AUTHORS[paired, kind][5:], rel=2e-4)


@pytest.mark.parametrize(("paired", "kind"), list(AUTHORS))
def test_the_discriminator_s_loss_in_float64(paired: bool, kind: str):
    judged = [torch.cat([GIVEN, x], 1) if paired else x for x in (TRUE, MADE)]
    critic = filled(PatchCritic(judged[0].shape[1], 4, 2).double())
    opponent = PatchOpponent(critic, kind)
    loss, gap = opponent.told_apart(*(critic(x) for x in judged), None)
    assert loss.item() / 4 == pytest.approx(AUTHORS[paired, kind][0], rel=1e-12)
    outputs = [critic(x) for x in judged]
    torch.testing.assert_close(loss / 2, critic_loss(*(x.flatten() for x in outputs), kind))
    torch.testing.assert_close(gap / 2, outputs[0].mean() - outputs[1].mean())


# --- the discriminator


def test_its_modules_are_those_of_pix2pix():
    critic = PatchCritic(6, 64, 3)
    shapes = {name: tuple(x.shape) for name, x in critic.state_dict().items() if name.endswith("weight")}
    assert shapes == {
        "model.0.weight": (64, 6, 4, 4),
        "model.2.weight": (128, 64, 4, 4),
        "model.5.weight": (256, 128, 4, 4),
        "model.8.weight": (512, 256, 4, 4),
        "model.11.weight": (1, 512, 4, 4),
    }
    assert critic(torch.zeros(2, 6, 256, 256)).shape == (2, 30, 30)  # as in the paper, for 70×70 pixels each
    assert PatchCritic(3, 4, 5).model[-1].in_channels == 32
    weights = torch.cat([m.weight.flatten() for m in critic.model if isinstance(m, nn.Conv2d)])
    assert weights.std().item() == pytest.approx(0.02, rel=0.01)


def test_an_image_is_judged_by_itself():
    critic, images = filled(PatchCritic(3, 4, 2)), MADE.float()
    torch.testing.assert_close(critic(images)[1:], critic(images[1:]))


def generator(width: int) -> nn.Module:
    layers = dict(inner=nn.Conv2d(2, width, 3, padding=1), act=nn.Tanh(), last=nn.Conv2d(width, 3, 3, padding=1))
    return nn.Sequential(OrderedDict(layers))


def distil(*terms: Any, seed: int = 0, **settings: Any) -> Distiller:
    torch.manual_seed(seed)
    return Distiller(generator(4), generator(6), list(terms), GIVEN.float()[:1], **settings)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("kind", ["hinge", "lsgan"])
def test_the_loss_by_hand(paired: bool, kind: str):
    model = distil(AdversarialImages(paired=paired, kind=kind, width=4, layers=2, lr=0.01, steps=2, weight=3))
    own = model.terms["adversarial_images"].opponent
    twin = PatchOpponent(PatchCritic(5 if paired else 3, 4, 2), kind, penalty=0.0, lr=0.01, betas=(0.5, 0.999), steps=2)
    twin.load(copy.deepcopy(own.state()))
    given, true = GIVEN.float(), TRUE.float()
    out = model(given, targets=true)
    made = out.student.detach().requires_grad_()
    real, fake = (torch.cat([given, x], 1) if paired else x for x in (true, made))
    shown = twin.learn(real, fake)
    scores = twin.judge(fake)
    expected = 3 * (-scores.mean() if kind == "hinge" else (scores - 1).square().mean())
    torch.testing.assert_close(out.loss, expected)
    assert {f"{KEY}.{name}" for name in shown} < set(out.losses)
    (slope,) = torch.autograd.grad(expected, made)
    found = torch.autograd.grad(out.loss, list(model.student.parameters()), retain_graph=True)
    for one, other in zip(
        found, torch.autograd.grad(out.student, list(model.student.parameters()), slope), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_the_student_learns_to_pass():
    # The true images are all dark; the student's are bright at the start.
    model = distil(AdversarialImages(paired=False, kind="lsgan", width=4, layers=1, lr=5e-3))
    optimizer = torch.optim.Adam(model.student.parameters(), 5e-3)
    model.student.last.bias.data.fill_(1.0)
    given = GIVEN.float()
    first = model.student(given).mean().item()
    for _ in range(60):
        loss = model(given, targets=-torch.ones(2, 3, 16, 16) + 0.1 * TRUE.float()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.student(given).mean().item() < first - 0.3


def test_it_starts_from_a_file(tmp_path: Path):
    critic = filled(PatchCritic(5, 4, 2))
    torch.save(critic.state_dict(), tmp_path / "latest_net_D.pth")
    model = distil(AdversarialImages(width=4, layers=2, start=tmp_path / "latest_net_D.pth"))
    own = model.terms["adversarial_images"].opponent.network.state_dict()
    assert all(torch.equal(own[name], x) for name, x in critic.state_dict().items())
    with pytest.raises(
        DistillError, match=r"does not fit the discriminator of adversarial_images PatchCritic; .* of another shape"
    ):
        distil(AdversarialImages(width=8, layers=2, start=tmp_path / "latest_net_D.pth"))
    with pytest.raises(DistillError, match="checkpoint not found"):
        distil(AdversarialImages(start="nowhere.pth", layers=1))


def test_it_is_out_of_sight_and_resumes_where_it_was(tmp_path: Path):
    given, true = GIVEN.float(), TRUE.float()
    recipe = dict(type="gan_compression", tap="inner", width=4, layers=1)
    model = distil(recipe=recipe)
    hidden = {id(p) for p in model.terms["adversarial_images"].opponent.network.parameters()}
    assert hidden and not hidden & {id(p) for p in model.parameters()}
    model(given, targets=true)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert not any("critic" in key for key in state)
    following = {name: value.item() for name, value in model(given, targets=true).losses.items()}
    other = distil(recipe=recipe, seed=9)
    other.load_state_dict(state)
    other.teacher.model.load_state_dict(model.teacher.model.state_dict())
    assert {name: value.item() for name, value in other(given, targets=true).losses.items()} == following


def test_a_run_that_is_interrupted_ends_as_one_that_is_not(tmp_path: Path):
    given, true = GIVEN.float(), TRUE.float()
    loader = torch.utils.data.DataLoader(list(zip(given, true, strict=True)), batch_size=1, shuffle=True)

    def run(folder: str, epochs: int) -> dict[str, Tensor]:
        model = distil(recipe=dict(type="gan_compression", tap="inner", width=4, layers=1))
        kept = copy.deepcopy(model.teacher.model.state_dict())
        found = fit(model, loader, F.l1_loss, epochs=epochs, folder=tmp_path / folder, resume=True)
        assert all(torch.equal(kept[name], x) for name, x in model.teacher.model.state_dict().items())
        return found.model.state_dict()

    run("parts", 1)
    parts, whole = run("parts", 2), run("whole", 2)
    assert parts.keys() == generator(4).state_dict().keys()  # plain
    assert all(torch.equal(parts[name], x) for name, x in whole.items())
    assert not torch.equal(whole["last.bias"], distil().student.last.bias)


def test_a_step_that_is_not_finite_is_skipped_and_dropped():
    model = distil(AdversarialImages(width=4, layers=1))
    opponent = model.terms["adversarial_images"].opponent
    before = copy.deepcopy(opponent.network.state_dict())
    out = model(GIVEN.float() * torch.inf, targets=TRUE.float())
    assert out.loss == 0 and model.dropped == {"adversarial_images": 1} and opponent.skipped == 1
    assert all(torch.equal(before[name], x) for name, x in opponent.network.state_dict().items())


def test_under_autocast():
    model = distil(recipe=dict(type="gan_compression", tap="inner", width=4, layers=1))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(GIVEN.float(), targets=TRUE.float())
    out.loss.backward()
    assert out.loss.dtype is torch.float32 and out.student.dtype is torch.bfloat16
    assert all(p.grad.isfinite().all() for p in model.student.parameters())


# --- reconstruction


def test_reconstruction_by_hand():
    given, true = GIVEN.float(), TRUE.float()
    for to, weight in (("truth", 100), ("teacher", 10)):
        model = distil(Reconstruction(to=to))
        out = model(given, targets=true)
        target = true if to == "truth" else model.teacher.model(given)
        torch.testing.assert_close(out.loss, weight * F.l1_loss(out.student, target))
    assert distil(Reconstruction(to="teacher", weight=2))(given).loss.isfinite()  # without targets


# --- what they need


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = generator(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))


class Enlarging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = generator(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.body(x), scale_factor=2)


@pytest.mark.parametrize(
    ("student", "term", "message"),
    [
        (Classifier, Reconstruction(), "reconstruction needs a generator, which makes images (B, C, H, W) of images, and '(output)' of the student gives (1, 3)"),
        (Classifier, AdversarialImages(), "adversarial_images needs a generator, which makes images (B, C, H, W) of images"),
        (Enlarging, AdversarialImages(), "inputs (1, 2, 16, 16) and images (1, 3, 32, 32) must have one size to be judged together; use paired=False"),
        (Enlarging, Reconstruction(to="teacher"), "(1, 3, 32, 32) and the teacher's (output) (1, 3, 16, 16) must be images of one shape"),
        (lambda: generator(4), AdversarialImages(layers=4), "images of (16, 16) pixels are too small for a discriminator with layers=4; use fewer"),
        (lambda: generator(4), AdversarialImages(["inner", "last"]), "adversarial_images judges one image of the student, and has 2 taps; give one"),
        (lambda: generator(4), Reconstruction(["inner", "last"]), "reconstruction compares one image of each model, and its taps yield 2; give one tap"),
    ],
)  # fmt: skip
def test_what_they_cannot_use_is_refused_when_wired(student: Any, term: Any, message: str):
    with pytest.raises(WiringError) as error:
        Distiller(student(), generator(6), [copy.deepcopy(term)], GIVEN.float()[:1])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert Distiller(Enlarging(), Enlarging(), [AdversarialImages(paired=False, layers=2)], GIVEN.float()[:1])


@pytest.mark.parametrize("targets", [None, TRUE.float()[:1], torch.tensor([1, 0]), TRUE.long(), "images"])
@pytest.mark.parametrize("term", [Reconstruction, AdversarialImages])
def test_a_batch_without_true_images_is_an_error(term: Any, targets: Any):
    model = distil(term(**(dict(layers=1) if term is AdversarialImages else {})))
    with pytest.raises(
        DistillError, match=r"needs true images \(2, 3, 16, 16\) as the batch's targets, and these are .*; pass"
    ):
        model(GIVEN.float(), targets=targets)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dict(type="Reconstruction", to="peer"), "Reconstruction: to must be one of truth, teacher, got 'peer'"),
        (dict(type="AdversarialImages", kind="wgan-gp"), "AdversarialImages: kind must be one of hinge, lsgan, got 'wgan-gp'"),
        (dict(type="AdversarialImages", paired=1), "AdversarialImages: paired must be true or false, got 1"),
        (dict(type="AdversarialImages", layers=0), "AdversarialImages: layers must be a whole number >= 1"),
        (dict(type="AdversarialImages", width=0.5), "AdversarialImages: width must be a whole number >= 1"),
        (dict(type="AdversarialImages", steps=0), "AdversarialImages: steps must be a whole number >= 1"),
        (dict(type="AdversarialImages", lr=0), "AdversarialImages: lr must be a number > 0"),
        (dict(type="AdversarialImages", penalty=1), "term AdversarialImages takes no argument 'penalty'"),
    ],
)  # fmt: skip
def test_wrong_settings(spec: dict, message: str):
    with pytest.raises(DistillError) as error:
        build_terms([spec])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_recipe_s_weights():
    for paired, expected in ((True, (100, 1, 4, "hinge")), (False, (10, 1, 0.04, "lsgan"))):
        share, rebuilt, judged, hint = build_terms(expand_recipe(dict(type="gan_compression", paired=paired), RECIPES))
        assert share.host_share == 0 and rebuilt.to == ("truth" if paired else "teacher")
        assert (rebuilt.weight, judged.weight, hint.weight, judged.kind) == expected  # of the mean over four layers
        assert judged.paired is paired and [str(tap) for tap in hint.student_taps][1] == "model.12"
    spec = dict(type="gan_compression", student_tap="a", teacher_tap="b", reconstruction=2, distillation=3, adversarial=4, kind="lsgan")  # fmt: skip
    _, rebuilt, judged, hint = build_terms(expand_recipe(spec, RECIPES))
    assert (rebuilt.weight, judged.weight, hint.weight, judged.kind) == (2, 4, 3, "lsgan")
