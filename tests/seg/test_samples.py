"""Relations between images of segmentors: pixels that count are averaged, and images are remembered by their file."""

from __future__ import annotations

import torch

from kdgraft.losses import rkd_distance
from support.seg import batch, build, distilled, losses_of, segmentor


def distances(teacher, **settings):
    recipe = {"type": "rkd", "angle": 0, "name": "term", **settings}
    return build(distilled(segmentor(dropout=0.0, frozen_bn=True), teacher, recipe=recipe))


def test_pixels_that_count_by_hand(teacher):
    model = distances(teacher)
    images, samples = batch(4, ignored=0.4, content=(64, 48))
    loss = losses_of(model, images, samples)["distill.term.loss"]
    labels = torch.cat([sample.gt_sem_seg.data for sample in samples])
    vectors = []
    for net in (model, model.distiller.teacher.model):
        maps = net.backbone(images)[-1]
        size = maps.shape[-1]
        centre = ((torch.arange(size) + 0.5) * 64 / size).long()
        counts = labels[:, centre][:, :, centre] != 255
        vectors.append(torch.stack([x[:, valid].mean(1) for x, valid in zip(maps, counts, strict=True)]))
    torch.testing.assert_close(loss, rkd_distance(*vectors))
    assert 0 < counts.float().mean() < 0.8


def test_images_are_remembered_by_their_file(teacher):
    model = build(distilled(segmentor(), teacher, recipe=dict(type="crd", name="term", width=4)))
    images, samples = batch(2)
    losses_of(model, images, samples)
    assert model.distiller.terms["term"]._stored == 2
    assert model.distiller.terms["term"]._places == {}
    for sample, path in zip(samples, ("a.png", "b.png"), strict=True):
        sample.set_metainfo(dict(img_path=path))
    for _ in range(2):
        losses_of(model, images, samples)
    assert model.distiller.terms["term"]._places == {"a.png": 2, "b.png": 3}
