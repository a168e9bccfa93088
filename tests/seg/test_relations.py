"""PairwiseAffinity, ClassPrototypes and CrossImageRelations: what they compare, what the memory holds, what they cost."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kdgraft import PairwiseAffinity
from kdgraft.errors import DistillError, WiringError
from kdgraft.losses import class_prototypes, memory_relations, pairwise_affinity, pixel_relations
from kdgraft.losses.affinity import pool_nodes
from kdgraft_seg import ClassPrototypes, CrossImageRelations, cirkd
from support.seg import batch, build, distilled, losses_of, played, save_teacher, segmentor
from support.tensors import assert_same, distillation

ALL = dict(nodes=64, anchors=999, contrast=99999, new_pixels=300)
"""Everything is compared, nothing drawn."""


def model_of(teacher, **term):
    return build(distilled(segmentor(dropout=0.0), teacher, terms=[{**term, "name": "term"}]))


def features(size: int = 8, seed: int = 0, images: int = 2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, width, size, size, generator=generator) for width in (16, 32)]


def play(model, student, teacher, samples):
    losses, slope = played(model, student, teacher, samples, tap="features")
    return losses["distill.term.loss"], slope


def coarse(samples) -> torch.Tensor:
    """Labels on the 8×8 grid; they come in blocks of 8 pixels."""
    return torch.cat([sample.gt_sem_seg.data[:, 4::8, 4::8] for sample in samples])


def relations_of(model) -> CrossImageRelations:
    return model.distiller.terms["term"]


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.numbers = max(self.numbers, value.numel())
        return out


# --- affinities and prototypes


@pytest.mark.parametrize(("patch", "pool"), [(2, "average"), (0.5, "max"), (1, "average")])
def test_affinity_is_the_core_loss_on_the_pixels_that_count(teacher, patch, pool):
    model = model_of(teacher, type="PairwiseAffinity", patch=patch, pool=pool)
    samples = batch(ignored=0.3)[1]
    student, target = features()
    loss, slope = play(model, student, target, samples)
    expected = pairwise_affinity(student, target, patch=patch, pool=pool, valid=coarse(samples) != 255)
    torch.testing.assert_close(loss, expected)
    assert loss > 0 and slope.abs().sum() > 0


def test_prototypes_are_the_core_loss_with_the_labels_of_the_grid(teacher):
    model = model_of(teacher, type="ClassPrototypes")
    samples = batch(ignored=0.3)[1]
    student, target = features()
    loss, _ = play(model, student, target, samples)
    torch.testing.assert_close(loss, class_prototypes(student, target, coarse(samples)))


def test_prototypes_of_another_labelling_are_other_prototypes(teacher):
    student, target = features()
    found = [
        play(model_of(teacher, type="ClassPrototypes"), student, target, batch(seed=s, ignored=0.0)[1])[0]
        for s in (0, 1)
    ]
    assert found[0] != found[1]


def test_the_same_features_cost_nothing(tmp_path):
    # A student of the teacher's own width and features: no relation differs, and none pulls.
    own = save_teacher(tmp_path / "own.pth", segmentor(dropout=0.0))
    for kind in ("PairwiseAffinity", "ClassPrototypes", "CrossImageRelations"):
        settings = dict(memory_pixel=0.0, memory_region=0.0) if kind == "CrossImageRelations" else {}
        model = model_of(own, type=kind, **settings)
        maps = features()[0]
        loss, slope = play(model, maps, maps, batch()[1])
        assert loss.abs() < 1e-6 and slope.abs().max() < 1e-4


# --- the batch's relations


def test_the_batchs_part_relates_every_pair_of_images(teacher):
    model = model_of(teacher, type="CrossImageRelations", memory_pixel=0.0, memory_region=0.0, **ALL)
    samples = batch(ignored=0.3)[1]
    student, target = features()
    loss, _ = play(model, student, target, samples)
    valid = (coarse(samples) != 255).flatten(1)
    rows = [x.flatten(2).transpose(1, 2) for x in (student, target)]
    torch.testing.assert_close(loss, pixel_relations(*rows, 0.1, valid=valid.float()), rtol=1e-4, atol=1e-6)
    # Without its parts there is no memory to fill, and no projection whose gradients DDP would miss.
    assert not list(relations_of(model).parameters()) and not list(relations_of(model).buffers())


def test_a_large_map_is_pooled_to_at_most_so_many_nodes(teacher):
    model = model_of(teacher, type="CrossImageRelations", memory_pixel=0.0, memory_region=0.0, nodes=20)
    samples = batch(ignored=0.3)[1]
    student, target = features()
    loss, _ = play(model, student, target, samples)
    (s, present), (t, _) = (pool_nodes(x, 2, "average", coarse(samples) != 255) for x in (student, target))
    assert s.shape[1] == 16
    torch.testing.assert_close(loss, pixel_relations(s, t, 0.1, valid=present), rtol=1e-4, atol=1e-6)


def test_other_images_matter(teacher):
    model = model_of(teacher, type="CrossImageRelations", memory_pixel=0.0, memory_region=0.0)
    samples = batch()[1]
    student, target = features()
    _, slope = play(model, student, target, samples)
    other = [x.clone() for x in (student, target)]
    other[0][1] = features(seed=5)[0][1]
    _, changed = play(model, *other, samples)
    assert (slope[0] - changed[0]).abs().max() > 1e-4


# --- the memory


def unit_of_class(width: int = 32) -> torch.Tensor:
    """A direction for each of the 11 classes."""
    return F.normalize(torch.randn(11, width, generator=torch.Generator().manual_seed(1)), dim=1)


def marked(samples) -> torch.Tensor:
    """The teacher's features: each pixel points where its class does, ignored ones somewhere of their own."""
    labels = coarse(samples)
    directions = torch.cat([unit_of_class(), torch.full((1, 32), -0.2)])
    return 3 * directions[labels.masked_fill(labels == 255, 11)].permute(0, 3, 1, 2)


def test_remembered_pixels_and_regions_are_of_their_own_class(teacher):
    # The authors' code shuffles among a class's number of pixels, and takes those of the whole image: most remembered
    # embeddings are then of other classes.
    model = model_of(teacher, type="CrossImageRelations", new_pixels=4, pixels_per_class=16, regions_per_class=8)
    held = relations_of(model)
    for seed in range(3):
        samples = batch(seed=seed, ignored=0.3)[1]
        play(model, features()[0], marked(samples), samples)
    directions = unit_of_class()
    assert (held.seen > 0).all()
    for kind, memory in enumerate((held.pixels, held.regions)):
        for label in range(11):
            count = min(int(held.seen[kind, label]), memory.shape[1])
            torch.testing.assert_close(memory[label, :count], directions[label].expand(count, -1))
            assert (memory[label, count:] == 0).all()


def test_regions_are_normalised_class_means_of_an_image(teacher):
    model = model_of(teacher, type="CrossImageRelations", **ALL)
    samples = batch(ignored=0.3, classes=3)[1]
    _, target = features()
    play(model, features()[0], target, samples)
    held = relations_of(model)
    pixels = F.normalize(target, dim=1).permute(0, 2, 3, 1)
    for label in range(3):
        assert held.seen[1, label] == 2
        expected = [F.normalize(pixels[image][coarse(samples)[image] == label].mean(0), dim=0) for image in range(2)]
        torch.testing.assert_close(held.regions[label, :2], torch.stack(expected))
        # Every pixel of the class is remembered, as a unit vector.
        mine = pixels[coarse(samples) == label]
        assert held.seen[0, label] == len(mine)
        found = held.pixels[label, : len(mine)]
        assert (
            torch.cdist(mine, found).min(1).values.max() < 1e-3 and torch.cdist(found, mine).min(1).values.max() < 1e-3
        )
    assert (held.seen[:, 3:] == 0).all()


def test_the_memory_is_a_ring(teacher):
    model = model_of(teacher, type="CrossImageRelations", new_pixels=1, pixels_per_class=4, regions_per_class=4)
    held = relations_of(model)
    samples = batch(images=1, ignored=0.0)[1]
    samples[0].gt_sem_seg.data.fill_(2)
    for step in range(6):
        target = torch.zeros(1, 32, 8, 8)
        target[:, step] = 1  # step i remembers unit vector i
        play(model, features(images=1)[0], target, samples)
        order = [(4 * (step // 4) + place if place <= step % 4 else 4 * (step // 4 - 1) + place) for place in range(4)]
        for memory in (held.pixels, held.regions):
            found = [int(row.argmax()) if row.any() else None for row in memory[2]]
            assert found == [number if number >= 0 else None for number in order]
    assert held.seen[:, 2].tolist() == [6, 6]


def test_each_step_remembers_at_most_so_many_new_pixels_of_a_class_and_image(teacher):
    model = model_of(teacher, type="CrossImageRelations", new_pixels=3)
    samples = batch(ignored=0.0, classes=2)[1]
    play(model, *features(), samples)
    assert relations_of(model).seen[0].tolist() == [6, 6] + [0] * 9
    assert relations_of(model).seen[1].tolist() == [2, 2] + [0] * 9


def test_more_newcomers_than_a_memory_holds(teacher):
    model = model_of(teacher, type="CrossImageRelations", new_pixels=60, pixels_per_class=5, regions_per_class=1)
    samples = batch(ignored=0.0, classes=2)[1]
    play(model, *features(), samples)
    held = relations_of(model)
    torch.testing.assert_close(held.pixels[:2].norm(dim=2), torch.ones(2, 5))
    torch.testing.assert_close(held.regions[:2].norm(dim=2), torch.ones(2, 1))


@pytest.mark.parametrize("part", ["memory_pixel", "memory_region"])
def test_the_memorys_parts_are_the_core_loss_on_what_is_filled(teacher, part):
    weights = {"pixel": 0.0, "memory_pixel": 0.0, "memory_region": 0.0, part: 0.7}
    model = model_of(teacher, type="CrossImageRelations", **weights, **ALL)
    samples = batch(ignored=0.3, classes=3)[1]
    student, target = features()
    loss, slope = play(model, student, target, samples)
    held = relations_of(model)
    kind = ("memory_pixel", "memory_region").index(part)
    memory = (held.pixels, held.regions)[kind]
    filled = torch.cat([memory[label, : int(held.seen[kind, label])] for label in range(11)])
    assert 0 < len(filled) < memory.shape[0] * memory.shape[1]
    valid = coarse(samples) != 255
    s, t = (x.permute(0, 2, 3, 1)[valid] for x in (student, target))
    s = held.project(s)
    expected = 0.7 * memory_relations(s, t, filled, contrast_temperature=0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert slope.abs().sum() > 0


def test_anchors_and_contrasts_are_drawn_anew_each_step_and_leave_the_hosts_stream_alone(teacher):
    entry = dict(type="CrossImageRelations", pixel=0.0, anchors=8, contrast=8, new_pixels=4)
    model, twin = model_of(teacher, **entry), model_of(teacher, **entry)
    samples, maps = batch()[1], features()
    torch.manual_seed(0)
    model.train()
    first = [play(model, *maps, samples)[0] for _ in range(3)]
    assert len({float(value) for value in first}) == 3
    # The same seed draws the same.
    assert [float(play(twin, *maps, samples)[0]) for _ in range(3)] == [float(value) for value in first]
    plain = build(segmentor(dropout=0.0))
    states = []
    for each in (plain, model):
        losses_of(each, *batch())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_only_the_students_projection_is_trained_and_its_memory_is_saved(teacher):
    model = model_of(teacher, type="CrossImageRelations")
    distillation(losses_of(model, *batch())).backward()
    assert {name for name, _ in relations_of(model).named_parameters()} == {
        f"project.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")
    }
    assert all(p.grad is not None for p in relations_of(model).parameters())
    state = model.distiller.live_state()
    assert {"term.pixels", "term.regions", "term.seen"} <= set(state["terms"])
    twin = model_of(teacher, type="CrossImageRelations")
    twin.distiller.load_live_state(copy.deepcopy(state))
    assert_same(dict(twin.distiller.terms.state_dict()), dict(model.distiller.terms.state_dict()))


# --- what they cost


@pytest.mark.parametrize(
    "term",
    [
        pytest.param(dict(type="PairwiseAffinity", patch=1), id="affinity"),
        pytest.param(
            dict(
                type="CrossImageRelations", nodes=64, anchors=64, contrast=64, pixels_per_class=16, regions_per_class=16
            ),
            id="relations",
        ),
    ],
)
def test_no_map_over_all_pairs_of_pixels_is_built(teacher, term):
    # Pairs of pixels would be 16 times as many on the finer grid: 4 million on 32×32 positions, of two images.
    largest = []
    for size in (16, 32):
        model = model_of(teacher, **term)
        samples = batch(size=8 * size, ignored=0.0)[1]
        seen_by_term = model._batch(torch.zeros(2, 3, 8 * size, 8 * size), samples)
        student, target = features(size)
        with Largest() as seen:
            ratio = relations_of(model)(_Given(student.requires_grad_()), _Given(target), seen_by_term)
            ratio.value().backward()
        largest.append(seen.numbers)
    assert largest[0] <= 2 * 32 * 16**2 and largest[1] <= 2 * 32 * 32**2  # nothing is larger than the teacher's maps


class _Given:
    """A recording of one tensor."""

    scale, class_order, repeats = 1.0, None, False

    def __init__(self, maps: torch.Tensor) -> None:
        self._maps = maps

    def tensors(self, tap) -> list[torch.Tensor]:
        return [self._maps]

    def calls(self, tap) -> int:
        return 1


# --- wiring


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CrossImageRelations(temperature=0), "temperature must be > 0"),
        (lambda: CrossImageRelations(nodes=0), "nodes must be a whole number >= 1, got 0"),
        (lambda: CrossImageRelations(pixels_per_class=1.5), "pixels_per_class must be a whole number"),
        (lambda: CrossImageRelations(memory_pixel=-1), "memory_pixel must be a number >= 0"),
        (lambda: CrossImageRelations(across_ranks="no"), "across_ranks must be true or false, got 'no'"),
        (lambda: PairwiseAffinity(patch=0), "patch must be a whole number >= 1, or a fraction"),
        (lambda: PairwiseAffinity(patch=1.5), "patch must be"),
        (lambda: PairwiseAffinity(pool="median"), "pool must be 'average' or 'max'"),
        (lambda: ClassPrototypes(weight=-1), "weight must be a number >= 0"),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(DistillError) as caught:
        make()
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PairwiseAffinity", "ClassPrototypes", "CrossImageRelations"])
def test_what_is_no_map_is_refused(kind, tmp_path):
    swin = save_teacher(tmp_path / "t.pth", segmentor("UPerNet"))
    entry = distilled(segmentor("UPerNet"), swin, terms=[dict(type=kind, tap="backbone.stages.0.blocks.0")])
    with pytest.raises(WiringError, match=r"must be maps \(B, C, H, W\)"):
        build(entry)


def test_relations_take_one_map(teacher):
    with pytest.raises(DistillError, match="one tap of one map, got 4"):
        model_of(teacher, type="CrossImageRelations", tap="backbone[*]")


def test_an_infinity_of_the_teacher_never_enters_the_memory(teacher):
    model = model_of(teacher, type="CrossImageRelations", **ALL)
    samples = batch(ignored=0.0)[1]
    student, target = features()
    broken = target.clone()
    broken[0, :, 2, 2] = torch.inf
    held = relations_of(model)
    held.relate(student, broken, coarse(samples))
    assert held.seen[0].sum() == 2 * 64 - 1
    assert held.pixels.isfinite().all() and held.regions.isfinite().all()
    loss, slope = play(model, student, target, samples)
    assert loss.isfinite() and slope.isfinite().all()


def test_the_memory_has_the_students_classes(tmp_path):
    other = save_teacher(tmp_path / "five.pth", segmentor("PSPNet", width=8, classes=5), classes=None)
    model = build(distilled(segmentor(), other, terms=[dict(type="CrossImageRelations", name="term")]))
    assert len(relations_of(model).pixels) == 11


def test_a_recipe_without_any_relations_has_no_term_for_them():
    terms = cirkd(pixel=0.0, memory_pixel=0.0, memory_region=0.0)
    assert [term["type"] for term in terms] == ["SoftTargets"]
