"""Terms with a module per map: what they divide by, what they leave out, what they hide."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdgraft import Batch, Distiller, DistillError, MaskedGeneration, WiringError
from kdgraft.losses import masked_generation


class Fixed(nn.Module):
    """Yields two maps of its own."""

    def __init__(self, channels: int, seed: int, images: int = 2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = ((4, 4), (2, 2))
        self.maps = nn.ParameterList(torch.randn(images, channels, *size, generator=generator) for size in sizes)
        self.neck = nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return self.neck(tuple(each * 1 for each in self.maps))


X = torch.zeros(1)


def distil(student: int = 3, teacher: int = 3, **settings: Any) -> Distiller:
    torch.manual_seed(0)
    return Distiller(Fixed(student, 1), Fixed(teacher, 2), terms=[MaskedGeneration("neck[*]", **settings)], example=X)


def test_levels_add_up_and_images_divide():
    distiller = distil(mask_ratio=0, weight=2.0)
    expected = torch.zeros(())
    for s, t, module in zip(
        distiller.student.maps, distiller.teacher.model.maps, distiller.terms["masked_generation"].parts, strict=True
    ):
        keep = torch.ones_like(s[:, 0]) > 0
        expected = expected + 2 * masked_generation(s, t, module, keep, reduction="sum") / 2
    torch.testing.assert_close(distiller(X).loss, expected)


@pytest.mark.parametrize(("channels", "adapter"), [(3, "NoAdapter"), (5, "ConvAdapter 5→3")])
def test_an_adapter_where_channels_differ_and_every_parameter_learns(channels: int, adapter: str):
    distiller = distil(channels)
    assert [row.adapter for row in distiller.rows] == [adapter] * 2
    distiller(X).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in distiller.terms.parameters())


def test_an_image_that_is_all_padding_is_not_counted():
    batch = Batch(padded_size=(32, 32), image_sizes=[(32, 32), (0, 0)])
    found = distil(mask_ratio=0, weight=1.0)(X, batch=batch).loss
    alone = distil(mask_ratio=0, weight=1.0)
    alone.student.maps = nn.ParameterList(p[:1] for p in alone.student.maps)
    alone.teacher.model.maps = nn.ParameterList(p[:1] for p in alone.teacher.model.maps)
    torch.testing.assert_close(found, alone(X).loss)
    nothing = distil()(X, batch=Batch(padded_size=(32, 32), image_sizes=[(0, 0)] * 2)).loss
    nothing.backward()
    assert nothing == 0


def test_half_of_the_positions_are_left_out_and_all_or_none_at_the_ends():
    term = MaskedGeneration(mask_ratio=0.5)
    shares = [image.float().mean().item() for image in term._keep(torch.zeros(3, 1, 80, 80))]
    assert shares == pytest.approx([0.5] * 3, abs=0.03)
    assert MaskedGeneration(mask_ratio=0)._keep(torch.zeros(1, 1, 9, 9)).all()
    assert not MaskedGeneration(mask_ratio=1)._keep(torch.zeros(1, 1, 9, 9)).any()


def test_a_resumed_term_goes_on_with_what_it_would_have_left_out():
    distiller = distil()
    for _ in range(2):
        distiller(X)
    saved = copy.deepcopy(distiller.state_dict())
    whole = [distiller(X).loss.item() for _ in range(2)]
    again = distil()
    again.load_state_dict(saved)
    torch.manual_seed(99)
    assert [again(X).loss.item() for _ in range(2)] == whole
    assert whole[0] != whole[1]


def test_the_random_stream_is_left_alone():
    distiller = distil()
    state = torch.get_rng_state()
    distiller(X)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_takes_maps_alone():
    with pytest.raises(WiringError, match=r"masked_generation: .* must be maps \(B, C, H, W\)"):
        Distiller(nn.Linear(2, 2), nn.Linear(2, 2), terms=[MaskedGeneration("")], example=torch.zeros(1, 2))


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan"), "0.5", True])
def test_wrong_ratios(ratio: object):
    with pytest.raises(DistillError, match=r"mask_ratio must be in \[0, 1\], got"):
        MaskedGeneration(mask_ratio=ratio)  # type: ignore[arg-type]
