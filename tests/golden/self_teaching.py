"""Inputs by formula and figures of the authors' public code on them, for students that teach themselves: BYOT and ONE.

Every figure was made by running the cited files at the cited commit, in float64, on these inputs; parameters are filled by
:func:`fill`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from golden import wave


def fill(module: nn.Module, rate: float) -> None:
    """Set every parameter by a formula, in their order."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(wave(tuple(parameter.shape), rate + 0.1 * number, 0.3 + number, 0.5))


def shallow() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maps of a shallow layer ``(3, 3, 8, 8)``, labels, and logits ``(3, 5)`` and pooled features ``(3, 8)`` of the deepest."""
    labels = torch.tensor([1, 0, 4])
    return wave((3, 3, 8, 8), 0.41, 0.6, 1.2), labels, wave((3, 5), 0.9, 1.1, 2.0), wave((3, 8), 0.53, 0.9, 0.7)


def trunk() -> tuple[Tensor, Tensor]:
    """Maps before the branches ``(4, 4, 16, 16)``, and labels."""
    return wave((4, 4, 16, 16), 0.37, 0.2, 1.5), torch.tensor([1, 0, 4, 2])


# ArchipLab-LinfengZhang/pytorch-scalable-neural-networks@aac136e1a009b95e75ba4cc7560902b54220efde, by the authors of BYOT:
# sresnet.py, ScalaNet(3, 8, 2), fill(…, 0.31), and a Linear(8, 5), fill(…, 0.9), on the maps of shallow(); train.py, lines 129
# to 140, the loss of one exit with lambda_KD = 0.5.
EXIT_SCORES = [0.8083531253264591, 0.81498579582323, 0.13249773465760728, -0.6430410156127476, -0.8525432451823174]
EXIT_FEATURES = 5.643816543064837  # their sum
# The loss, with a cross-entropy in place of the KL; its gradient at the first number of the maps, and the sum of the squared ones.
EXIT = (8.206968118384914, 0.006819637003066046, 0.008700935991978971)
# ArchipLab-LinfengZhang/pytorch-self-distillation-final@47ca93b6a60baaaf127a762e9f19bc70f4f0ffed:train.py on the same scores:
# the soft and the hard loss of one exit, with loss_coefficient = 0.3 and without T².
EXIT_OF_JOURNAL = 1.633727569941989

# Lan1991Xu/ONE_NeurIPS2018@54afde30fe039c8bd66668f0d17944b451b8b189: models/cifar/resnet.py, ONE_ResNet.forward from layer3 on,
# with Conv2d(4, 6, 1, stride=2) in place of each layer3_k, fill(…, 0.5 + 0.2 k), and Linear(6, 5) as classfier3_k, fill(…, 0.6 + 0.2 k);
# control_v1 = Linear(4, 3), fill(…, 1.1), bn_v1, fill(…, 1.7); on trunk(). cifar_one.py and loss/kl_loss.py, with a weight of 1.
ENSEMBLE = [0.950498227350844, 0.32625654996780185, -0.25482420025783953, -0.2525726357603353, -0.23460550792673612]
OWN_CROSS_ENTROPY = 1.7941019055542902
# The total, its gradient at the first number of the trunk's maps, and the sum of the squared ones; 10⁻⁷ is added to probabilities.
ONE = (6.956293988050735, 0.003311552424128959, 0.019080117270374466)
