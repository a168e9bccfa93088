"""Inputs by formula and figures of the authors' public code on them, for the losses on dense maps.

Every figure was made by running the cited file at the cited commit, in float64 where that file lets it, on these inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from golden import wave


def chirp(shape: tuple[int, ...], rate: float, phase: float, scale: float) -> Tensor:
    """``scale * sin(i² * rate + phase)`` for i = 0, 1, … in C order; float64. Unlike a wave's, its rows are independent."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (torch.sin(index * index * rate + phase) * scale).reshape(shape)


def class_maps() -> tuple[Tensor, Tensor]:
    """Class logits of student and teacher, ``(2, 6, 5, 4)``."""
    return chirp((2, 6, 5, 4), 0.37, 0.2, 2.0), chirp((2, 6, 5, 4), 0.53, 0.9, 3.0)


def features() -> tuple[Tensor, Tensor]:
    """Features of student and teacher, ``(2, 3, 5, 4)`` and ``(2, 6, 5, 4)``; off centre, so that prototypes are not 0."""
    return 0.4 + chirp((2, 3, 5, 4), 0.41, 0.6, 1.2), 0.3 + chirp((2, 6, 5, 4), 0.53, 0.9, 2.0)


def labels() -> Tensor:
    """Classes 0, 1, 2 and 4 (no 3) of the 2×5×4 pixels; 255 at every seventh."""
    index = torch.arange(40)
    classes = torch.tensor([0, 1, 2, 4])[(index * index // 3) % 4]
    return classes.masked_fill(index % 7 == 3, 255).reshape(2, 5, 4)


def embeddings() -> tuple[Tensor, Tensor, Tensor]:
    """Seven pixels of student and teacher, and a memory of nine; six channels."""
    return chirp((7, 6), 0.41, 0.6, 1.2), chirp((7, 6), 0.53, 0.9, 2.0), chirp((9, 6), 0.29, 0.1, 0.7)


def scores() -> tuple[Tensor, Tensor]:
    """A critic's scores of four samples of the teacher and of the student."""
    return wave((4,), 1.9, 0.3, 1.6), wave((4,), 2.3, 1.0, 2.0)


def critic() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples of teacher and student ``(3, 2, 2, 2)``, shares of the teacher's, and W of D(x) = Σ tanh(W x), ``(4, 8)``."""
    return (
        chirp((3, 2, 2, 2), 0.41, 0.6, 1.2),
        chirp((3, 2, 2, 2), 0.53, 0.9, 1.1),
        0.5 + wave((3,), 1.7, 0.4, 0.45),
        chirp((4, 8), 0.31, 0.2, 0.6),
    )


# Each figure below: value, gradient at the student's first number, sum of the squared gradients.

# irfanICMLL/structure_knowledge_distillation@ce208e1e5ba9177ecfc42519a2c64148d396fb71:utils/criterion.py,
# CriterionPixelWise on class_maps(): cross entropy, not KL, and over width times height alone.
PIXEL_WISE = (5.22700437426, -0.022306604861, 0.0497380088009)

# irfanICMLL/TorchDistiller@78bac7cbe50634e0b880ef37eb8cd7e2560806e4:SemSeg-distill/utils/criterion.py,
# CriterionCWD("channel", "kl", T) on class_maps(). temperature: figure
CHANNEL_WISE = {
    1: (1.72080999072, -0.00402479756211, 0.0139318487595),
    4: (2.95804323423, -0.00661853571261, 0.0246862322097),
}

# irfanICMLL/structure_knowledge_distillation@ce208e1e5ba9177ecfc42519a2c64148d396fb71:utils/criterion.py,
# CriterionPairWiseforWholeFeatAfterPool on features(), which computes in float32: good to 6 digits. Its gradient takes the
# norms for constants. scale: value, gradient of image 0's first node, gradient of image 1's last node
PAIRWISE = {
    0.5: (0.116884462535, (0.009095367, 0.011956125, 0.012496231), (0.044261683, 0.033420783, 0.054295983)),
    0.25: (0.468630254269, (0.008483788, 0.010410818, 0.0037176136), (0.012777769, -0.0017573057, 0.013151779)),
}

# YukangWang/IFVD@950a7a5fd8686ceed87a6976c49143462fcb823a:utils/criterion.py, CriterionIFV(5) on features() and labels():
# mean over all 40 pixels, the ignored ones with 0.
CLASS_PROTOTYPES = (0.302218786981, -0.00414616312061, 0.0129042207273)

# winycg/CIRKD@dab64dbb5e4172141166cf8434a80ce55d9d3aa7:losses/cirkd_mini_batch.py on features(). temperature: figure
PIXEL_RELATIONS = {
    0.1: (4.54528695108, -0.0159328096321, 0.567591993044),
    1.0: (0.190155798179, 0.000234557166864, 0.000389139030128),
}

# winycg/CIRKD@dab64dbb5e4172141166cf8434a80ce55d9d3aa7:losses/cirkd_memory.py, contrast_sim_kd on the cosines of
# embeddings() to the memory, divided by 0.1. contrast_kd_temperature: figure
MEMORY_RELATIONS = {
    1.0: (4.47434427585, -0.307173984498, 1.49869938317),
    2.0: (7.55049256034, -0.429256225596, 3.96113493828),
}

# hunto/DIST_KD@2418f18b1fedd7c2646a7b1b9a27d5c674c2170b:segmentation/losses/dist_kd.py on class_maps(), and on
# golden.logits(); it adds 1e-8 to the product of norms.
DIST_BETWEEN = (1.03479081905, -0.00475768851737, 0.00487621607546)
DIST_WITHIN = (1.02239384877, -0.00165929140422, 0.0024952664924)
DIST_BETWEEN_ROWS = (1.16422512898, -0.00863367796039, 0.0138856845936)
DIST_WITHIN_ROWS = (1.2700380315, -0.0127610032408, 0.00511209072795)

# irfanICMLL/structure_knowledge_distillation@ce208e1e5ba9177ecfc42519a2c64148d396fb71:utils/criterion.py, CriterionAdv and
# CriterionAdvForG on scores(). kind: value, gradients of the student's scores
CRITIC = {
    "wgan-gp": (0.523170396829, (0.25, 0.25, 0.25, 0.25)),
    "hinge": (2.66220227729, (0.25, 0.25, 0.0, 0.25)),
}
ADVERSARIAL = {
    "wgan-gp": (-0.525699997316, (-0.25, -0.25, -0.25, -0.25)),
    "hinge": (-0.525699997316, (-0.25, -0.25, -0.25, -0.25)),
}
# The same file's CriterionAdditionalGP with lambda_gp = 10 on critic(), its random shares replaced; gradient of W.
GRADIENT_PENALTY_10 = (7.63862770142, 5.32696271362, 754.300687772)
