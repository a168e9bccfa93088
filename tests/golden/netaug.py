"""A small net whose weights follow a formula, and the losses and gradients of NetAug's authors on it.

mit-han-lab/tinyml@0e58f314dfe12967d6165f45238b1ea77b0f7a14:netaug/models/netaug/layers.py, DynamicConvLayer(3, [4, 8], stride=2,
act_func="relu6"), DynamicDsConvLayer(8, [6, 12]) and DynamicLinearLayer(12, 5), in training mode. The narrowest widths, then
those that are named, each with a backward pass, as in netaug/train.py, train_one_epoch.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

X = torch.sin(torch.arange(4 * 3 * 8 * 8.0) * 0.3).reshape(4, 3, 8, 8)
Y = torch.tensor([1, 0, 4, 2])


def _built(first: int, second: int) -> nn.Module:
    a, b = 4 * first, 6 * second
    layers = dict(
        first=nn.Conv2d(3, a, 3, stride=2, padding=1, bias=False),
        first_norm=nn.BatchNorm2d(a),
        act=nn.ReLU6(),
        depth=nn.Conv2d(a, a, 3, padding=1, groups=a, bias=False),
        depth_norm=nn.BatchNorm2d(a),
        act2=nn.ReLU6(),
        point=nn.Conv2d(a, b, 1, bias=False),
        point_norm=nn.BatchNorm2d(b),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        last=nn.Linear(b, 5),
    )
    return nn.Sequential(OrderedDict(layers))


def _by_formula(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for number, p in enumerate(net.parameters()):
            values = 0.5 * torch.sin(torch.arange(p.numel()) * 0.7 + number)
            p.copy_(values.reshape(p.shape) + (p.ndim == 1))
    return net


WIDEST = dict(_by_formula(_built(2, 2)).named_parameters())


def make(first: int, second: int) -> nn.Module:
    """The net of these widths, whose weights are the first ones of the widest."""
    net = _built(first, second)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(WIDEST[name][tuple(slice(size) for size in parameter.shape)])
    return net


FIGURES = {
    (2, 2): (
        1.95946204662323,
        2.776113986968994,
        {
            "first.weight": (-0.34341588616371155, 0.5875920653343201),
            "first_norm.weight": (0.032359927892684937, 0.16633793711662292),
            "first_norm.bias": (0.0340547077357769, 0.15249088406562805),
            "depth.weight": (0.09749224781990051, 0.8146073222160339),
            "depth_norm.weight": (0.4224787652492523, 0.43013671040534973),
            "depth_norm.bias": (-0.22345829010009766, 0.21893109381198883),
            "point.weight": (0.28373822569847107, 0.3252314329147339),
            "point_norm.weight": (-0.03914746269583702, 0.07254370301961899),
            "point_norm.bias": (-0.051821574568748474, 1.352967619895935),
            "last.weight": (0.6899937391281128, 2.9757304191589355),
            "last.bias": (-0.810327410697937, 0.973739743232727),
        },
    ),
    (1, 2): (
        1.95946204662323,
        3.167161703109741,
        {
            "first.weight": (0.0050256624817848206, 0.5709931254386902),
            "depth.weight": (1.545724630355835, 1.329371452331543),
            "depth_norm.bias": (-0.556087851524353, 0.5560877919197083),
            "point.weight": (0.4766484498977661, 0.6873972415924072),
            "last.weight": (0.4994181990623474, 3.1001596450805664),
        },
    ),
    (2, 1): (
        1.95946204662323,
        1.7887649536132812,
        {
            "first.weight": (-0.157013401389122, 0.32301172614097595),
            "depth.weight": (0.23499098420143127, 0.5280792713165283),
            "depth_norm.bias": (-0.16408218443393707, 0.17598414421081543),
            "point.weight": (0.238626629114151, 0.30634763836860657),
            "last.weight": (0.5701887607574463, 2.0805578231811523),
        },
    ),
}
"""By the widths: the two losses, and for each weight the sum of (its gradient · cos 0, 1, 2 …) and the norm of its gradient."""
