"""GAN compression: a small generator that learns from a large one."""

from __future__ import annotations

from typing import Any

from .. import generators
from ..claims import Claim
from ..runs import Runs
from .base import Experiment

STUDENT, TEACHER = 2, 12
LENGTH = 0.5
CRITIC = dict(width=16, layers=1)


def _generators(runs: Runs) -> dict[str, str]:
    config = f"{generators.__file__}:task"

    def train(name: str, width: int, **told: Any) -> str:
        return runs.train(f"generator-{name}", "generator", width, length=LENGTH, config=config, **told)

    def student(name: str, **weights: float) -> str:
        recipe = dict(type="gan_compression", tap=list(generators.BLOCKS), **CRITIC, **weights)
        return train(name, STUDENT, teacher=teacher, recipe=recipe)

    teacher = train("teacher", TEACHER)
    return {
        "teacher": teacher,
        "L1 alone": train("alone", STUDENT),
        "L1 and discriminator": student("adversarial", distillation=0.0),
        "GAN compression": student("compressed"),
    }


GENERATORS = Experiment(
    "generators",
    "GAN compression: a generator that takes digits out of their clutter, judged by a net that reads them",
    "Li et al. 2020 (GAN compression), arXiv 2003.08936",
    "pix2pix on Cityscapes and others: features of the large generator help the small one, at 9 to 21 times fewer operations",
    _generators,
    (
        Claim(
            "features of the teacher help the small generator",
            "they do",
            {"GAN compression": 1, "L1 and discriminator": -1},
        ),
    ),
    real=False,  # which has no clean pictures
)
