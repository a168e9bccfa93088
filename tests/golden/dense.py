"""Inputs by formula and figures of the authors' public code on them, for the losses on dense maps.

Every figure was made by running the cited file at the cited commit, in float64 where that file lets it, on these inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

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


def fill(module: nn.Module) -> None:
    """Every parameter by a formula of its place in the module and its shape; float64."""
    for place, parameter in enumerate(module.parameters()):
        parameter.data = wave(tuple(parameter.shape), 0.9 + 0.1 * place, 0.3 * place, 0.7)


FOCAL_BOXES = {
    # Two that overlap, and an image without any; an image without background, and one with a box at the border.
    "some": ([[3.0, 5.0, 18.0, 21.0], [10.0, 12.0, 15.0, 31.0]], []),
    "whole": ([[0.0, 0.0, 32.0, 40.0]], [[20.0, 30.0, 31.0, 39.0]]),
}
"""Boxes of two images of 40×32 pixels, of which golden.features() are maps of stride 8."""

# yzd-v/FGD@c03a6cf3b3cb3cbfd5554dbf4766e7135747d22d:mmdet/distillation/losses/fgd.py, FeatureLoss with temp 0.5 on
# golden.features() and FOCAL_BOXES, one of its four weights at 1; the modules filled by fill() in the order conv_mask_s,
# channel_add_conv_s, conv_mask_t, channel_add_conv_t. (part, boxes): figure
FOCAL_GLOBAL = {
    ("foreground", "some"): (14.894974376549552, -0.08671677469350142, 3.005927305243441),
    ("background", "some"): (17.74292080103628, 0.0, 8.820951229802068),
    ("attention", "some"): (3.9571301795564153, -0.20039341404608774, 7.271169180866273),
    ("relation", "some"): (547.3341243068129, 0.3940479127251273, 1134.9563407438031),
    ("foreground", "whole"): (10.547943512171583, -0.04624894650320076, 1.4387111339663625),
    ("background", "whole"): (9.526384715108746, 0.0, 1.2889263838517813),
}
# The same with the published weights, on "some".
FOCAL_GLOBAL_ONE_STAGE = (0.028481670488379962, -0.00018494324215291965, 7.2044589674497035e-06)

# yzd-v/MGD@2c9da0b28625eb948db57afc02c824452c3910fe:det/mmdet/distillation/losses/mgd.py, FeatureLoss with alpha_mgd 1 on
# golden.features(); generation filled by fill(), every third position left out, from the first on. The gradient is that at
# the student's *second* number.
MASKED_GENERATION = (4044.73795371654, 54.88810504411768, 7390287.889398659)

# twangnh/Distilling-Object-Detectors@c6583f3a2844bfbb7664c0552be17eccac03bffb:lib/model/rpn/anchor_target_layer.py, mask_batch
# above 0, for maps of 19×25 of stride 16, scales 8, 16, 32 and ratios 0.5, 1, 2. It counts a box from pixel to pixel, both
# included: here they end one further, and so do its anchors.
FINE_GRAINED_ANCHORS = (
    *((-84.0, -40.0, 100.0, 56.0), (-176.0, -88.0, 192.0, 104.0), (-360.0, -184.0, 376.0, 200.0)),
    *((-56.0, -56.0, 72.0, 72.0), (-120.0, -120.0, 136.0, 136.0), (-248.0, -248.0, 264.0, 264.0)),
    *((-36.0, -80.0, 52.0, 96.0), (-80.0, -168.0, 96.0, 184.0), (-168.0, -344.0, 184.0, 360.0)),
)
FINE_GRAINED_BOXES = (
    [[40.0, 60.0, 200.0, 181.0], [220.0, 20.0, 261.0, 280.0]],
    [[300.0, 200.0, 400.0, 304.0], [10.0, 10.0, 31.0, 26.0], [5.0, 5.0, 391.0, 291.0]],
)
# Per image the number of positions in each row and in each column, and the sum of their flat indices.
FINE_GRAINED = (
    (
        [0, 0, 4, 4, 6, 11, 13, 15, 13, 11, 6, 6, 6, 6, 6, 4, 3, 0, 0],
        [0, 0, 0, 1, 3, 5, 5, 5, 5, 5, 3, 1, 11, 14, 15, 15, 15, 11, 0, 0, 0, 0, 0, 0, 0],
        25232,
    ),
    (
        [19, 20, 21, 21, 24, 25, 25, 25, 25, 25, 25, 25, 25, 25, 24, 21, 21, 20, 15],
        [14, 15, 15, 15, 17, 18, 18, 19, 19, 19, 19, 19, 19, 19, 19, 19, 19, 19, 18, 17, 17, 15, 15, 15, 13],
        101228,
    ),
)
