"""The losses, one method per file: pure functions that document their shapes, units, reduction and source."""

from .activation_boundaries import activation_boundaries, sparsity_mismatch
from .adversarial import adversarial, critic_loss, gradient_penalty
from .affinity import pairwise_affinity
from .attention_maps import attention_distributions, attention_scores
from .attention_transfer import attention_transfer
from .bounded_regression import bounded_regression
from .boxes import box_regression, generalized_iou
from .byot import exit_imitation
from .channel_wise import channel_wise
from .class_prototypes import class_prototypes
from .conditional import conditional_adversarial, conditional_critic_loss
from .confidence_weighted import confidence, confidence_weighted
from .correlation_congruence import correlation_congruence
from .crd import crd
from .cross_head import align_scale, focused_entropy
from .cross_image import memory_relations, pixel_relations
from .decoupled import decoupled
from .dist import dist_between_classes, dist_within_classes
from .divergences import generalized_jsd, reverse_kl, skewed_kl
from .dual_space import cross_model_attention, dual_space
from .factor_transfer import factor_transfer
from .focal_global import focal_attention, focal_features
from .frequency import frequency_imitation
from .fsp import fsp
from .gold import gold
from .gradient_transfer import gradient_transfer
from .hint import hint
from .localization import localization
from .logit_matching import logit_matching
from .margin_mse import margin_mse
from .masked_generation import masked_generation
from .masks import mask_costs, mask_regression
from .minillm import minillm
from .mmd import mmd
from .normalized import normalized
from .nst import nst
from .one import gated_scores, native_ensemble
from .pearson import pearson
from .permuted import permuted
from .pkt import pkt
from .receptive_tokens import masked_imitation
from .reduction import Ratio, reduce_loss, upcast, weighted_ratio
from .relations import relations
from .review import hierarchical_context
from .rkd import rkd_angle, rkd_distance
from .similarity_preserving import similarity_preserving
from .soft_targets import SoftTargetsLoss, binary_soft_targets, mixed_targets, soft_targets
from .standardization import standardized
from .states import cosine, patient
from .token_relations import token_relations
from .universal_logits import universal_logits
from .weight_matching import weight_matching
from .weighted_soft_targets import weighted_binary_soft_targets, weighted_soft_targets

__all__ = [
    "Ratio",
    "SoftTargetsLoss",
    "activation_boundaries",
    "adversarial",
    "align_scale",
    "attention_distributions",
    "attention_scores",
    "attention_transfer",
    "binary_soft_targets",
    "bounded_regression",
    "box_regression",
    "channel_wise",
    "class_prototypes",
    "conditional_adversarial",
    "conditional_critic_loss",
    "confidence",
    "confidence_weighted",
    "correlation_congruence",
    "cosine",
    "crd",
    "critic_loss",
    "cross_model_attention",
    "decoupled",
    "dist_between_classes",
    "dist_within_classes",
    "dual_space",
    "exit_imitation",
    "factor_transfer",
    "focal_attention",
    "focal_features",
    "focused_entropy",
    "frequency_imitation",
    "fsp",
    "gated_scores",
    "generalized_iou",
    "generalized_jsd",
    "gold",
    "gradient_penalty",
    "gradient_transfer",
    "hierarchical_context",
    "hint",
    "localization",
    "logit_matching",
    "margin_mse",
    "mask_costs",
    "mask_regression",
    "masked_generation",
    "masked_imitation",
    "memory_relations",
    "minillm",
    "mixed_targets",
    "mmd",
    "native_ensemble",
    "normalized",
    "nst",
    "pairwise_affinity",
    "patient",
    "pearson",
    "permuted",
    "pixel_relations",
    "pkt",
    "reduce_loss",
    "relations",
    "reverse_kl",
    "rkd_angle",
    "rkd_distance",
    "similarity_preserving",
    "skewed_kl",
    "soft_targets",
    "sparsity_mismatch",
    "standardized",
    "token_relations",
    "universal_logits",
    "upcast",
    "weight_matching",
    "weighted_binary_soft_targets",
    "weighted_ratio",
    "weighted_soft_targets",
]
