"""Inputs by formula and figures of the authors' public code on them: no file, no random numbers.

Every figure was made by running the cited file at the cited commit, in float64, on these inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def wave(shape: tuple[int, ...], frequency: float, phase: float, scale: float) -> Tensor:
    """``scale * sin(i * frequency + phase)`` for i = 0, 1, … in C order; float64."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (torch.sin(index * frequency + phase) * scale).reshape(shape)


def logits() -> tuple[Tensor, Tensor]:
    """Class logits of student and teacher, ``(5, 10)``."""
    return wave((5, 10), 0.7, 0.3, 3.0), wave((5, 10), 0.9, 1.1, 4.0)


def features() -> tuple[Tensor, Tensor]:
    """Maps of student and teacher, ``(2, 6, 5, 4)``."""
    return wave((2, 6, 5, 4), 0.37, 0.2, 1.5), wave((2, 6, 5, 4), 0.53, 0.9, 2.0)


def regressor() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A student's map of 3 channels, the teacher's of 6, and a 1×1 convolution's weight and bias between them."""
    return (
        wave((2, 3, 5, 4), 0.41, 0.6, 1.2),
        wave((2, 6, 5, 4), 0.53, 0.9, 2.0),
        wave((6, 3, 1, 1), 1.3, 0.4, 0.8),
        wave((6,), 2.1, 0.7, 0.1),
    )


def edges() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of 6 box edges over 17 bins of student and teacher, and a weight in (0, 1) for each edge."""
    return wave((6, 17), 0.7, 0.3, 5.0), wave((6, 17), 0.45, 1.2, 6.0), 0.5 + wave((6,), 1.7, 0.4, 0.45)


# HobbitLong/RepDistiller@b84f547c5db6a35318d4671d7d5c4de74c822403:distiller_zoo/KD.py, DistillKL on logits().
# temperature: value, gradient at student[0, 0], sum of the squared gradients
SOFT_TARGETS = {
    1: (3.10140262843, -0.035351003701, 0.0932635277705),
    4: (6.35998817756, -0.0433442789545, 0.247015605917),
    20: (6.85479442401, -0.0406680669408, 0.273130063604),
}

# chxy95/Deep-Mutual-Learning@650e2767684ec481841581b2ff74bfd88fce1d12:trainer.py, the loop of train_one_epoch over three
# students: cross-entropy plus KL over K − 1, of logits() and a third one, wave((5, 10), 0.3, 0.8, 2.0), with labels 0 3 9 1 4.
MUTUAL = (5.61031048112288, 7.0594587180663515, 3.998371285949019)

# HobbitLong/RepDistiller@b84f547c5db6a35318d4671d7d5c4de74c822403:distiller_zoo/FitNet.py, HintLoss on features(), and
# on regressor() after the convolution.
HINT = 3.09701046687
HINT_REGRESSOR = 3.12817799274

# AberHu/Knowledge-Distillation-Zoo@65470c846c1300d555815da26999cbe2b51fc815:kd_losses/logits.py on logits(): mean over
# items and classes, without the ½.
LOGITS_MSE = 14.2438610353

# HikariTJU/LD@4287990ca27f51f6f15dc66d28bb420a053c307e:mmdet/models/losses/kd_loss.py, KnowledgeDistillationKLDivLoss
# with T = 10 on edges(), published loss weight 0.25 where the name says 025.
LD_NONE = (0.768784192516, 0.500558277976, 1.30035465779, 0.63622212427, 0.64417956551, 1.06065185393)
LD_MEAN = 0.818458445332
LD_SUM = 4.91075067199
LD_MEAN_025 = 0.204614611333
LD_WEIGHTED_MEAN_025 = 0.112237792357  # weighted edges over their number, not over the sum of weights
LD_WEIGHTED_AVG4_025 = 0.168356688535  # avg_factor = 4
LD_WEIGHTED_AVG4_025_GRAD_00 = -0.000540650795082
LD_WEIGHTED_AVG4_025_GRAD_SQ = 4.91002661651e-05
LD_WEIGHTED_AVG16_025 = 0.0420891721338  # avg_factor = 16
# The same class as the authors use it for class logits: logits(), T = 2, weight 10, avg_factor = 5, mean over classes.
CLASS_KD_T2_W10 = 5.07569435035

# jbwang1997/CrossKD@87e156a46259e3a516b65fc6a049b200b9ab0d54, mmdet/models/losses/pkd_loss.py, features(): value, gradient at
# [0, 0, 0, 0], sum of squared gradients. It standardises with the unbiased deviation plus 1e-6: (n - 1) / n of 1 - r for n positions.
PEARSON = (0.9695648270993387, -0.0044095240738358426, 0.002718827447932711)
