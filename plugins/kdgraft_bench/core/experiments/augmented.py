"""NetAug: a tiny net inside wider ones, and the same for a large net."""

from __future__ import annotations

from ..claims import Claim
from ..runs import Runs
from .base import Experiment
from .convolutional import plain

TINY, LARGE = 2, 12


def _augmented(runs: Runs) -> dict[str, str]:
    found = {}
    for label, width in (("tiny", TINY), ("large", LARGE)):
        found[label] = plain(runs, width)
        found[f"{label}, NetAug"] = runs.train(f"netaug{width}", "conv", width, special="netaug")
    return found


NETAUG = Experiment(
    "netaug",
    "NetAug on a tiny net and on a large one",
    "Cai et al. 2022 (NetAug), arXiv 2110.08890, tables 1 and 2",
    "ImageNet: MobileNetV2-Tiny 51.7 → 53.3 %; it harms a ResNet-50",
    _augmented,
    (
        Claim("NetAug helps a tiny net", "51.7 → 53.3", {"tiny, NetAug": 1, "tiny": -1}),
        Claim("it harms a large one", "ResNet-50 loses", {"large": 1, "large, NetAug": -1}),
    ),
)
