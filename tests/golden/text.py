"""Inputs by formula and figures of public code on them, for the losses on text.

Every figure was made by running the cited file at the cited commit, in float64 where that file lets it, on these
inputs. GKD's is TRL's code, MiniLM's a public reimplementation: the authors' microsoft/unilm has no training code for
it. MobileBERT's code (google-research) needs TensorFlow 1 and was not run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from golden.dense import chirp


def logits() -> tuple[Tensor, Tensor]:
    """Next-token logits of student and teacher, ``(2, 4, 9)``."""
    return chirp((2, 4, 9), 0.37, 0.2, 2.0), chirp((2, 4, 9), 0.53, 0.9, 3.0)


def drawn() -> Tensor:
    """A token for each of the 2×4 items of :func:`logits`."""
    return (torch.arange(8) * 5 % 9).view(2, 4)


def answered() -> Tensor:
    """Which of the 2×4 tokens belong to the answer."""
    return torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)


def vocabularies() -> tuple[Tensor, Tensor]:
    """Logits of student and teacher over 7 and 10 words, ``(2, 3, 7)`` and ``(2, 3, 10)``."""
    return chirp((2, 3, 7), 0.41, 0.6, 2.0), chirp((2, 3, 10), 0.29, 0.1, 3.0)


def scores() -> tuple[Tensor, Tensor]:
    """Attention scores of student and teacher, ``(2, 3, 5, 5)``."""
    return chirp((2, 3, 5, 5), 0.37, 0.2, 2.0), chirp((2, 3, 5, 5), 0.53, 0.9, 3.0)


def vectors() -> tuple[Tensor, Tensor]:
    """Queries of student and teacher, ``(2, 5, 8)`` and ``(2, 5, 12)``."""
    return chirp((2, 5, 8), 0.41, 0.6, 1.2), chirp((2, 5, 12), 0.53, 0.9, 1.5)


def states() -> tuple[Tensor, Tensor]:
    """Hidden states of student and teacher, ``(2, 5, 8)``."""
    return chirp((2, 5, 8), 0.41, 0.6, 1.2), chirp((2, 5, 8), 0.53, 0.9, 1.5)


def tokens() -> Tensor:
    """Which of the 2×5 tokens are no padding."""
    return torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)


def candidates() -> tuple[Tensor, Tensor]:
    """Scores of student and teacher for the two candidates of six queries, ``(6, 2)``."""
    return chirp((6, 2), 0.41, 0.6, 2.0), chirp((6, 2), 0.29, 0.1, 3.0)


def shared() -> Tensor:
    """The entries of four tokens in both of :func:`vocabularies`, and in those of :func:`groups`."""
    return torch.tensor([[0, 6], [1, 1], [5, 4], [6, 8]])


def groups() -> dict[str, Tensor]:
    """One text to two causal models: 2 and 3 tokens of a prompt, then tokens that end at the bytes below.

    Its logits are ``(1, 8, 7)`` and ``(1, 8, 10)``.
    """
    return dict(
        student=chirp((1, 8, 7), 0.41, 0.6, 2.0),
        teacher=chirp((1, 8, 10), 0.29, 0.1, 3.0),
        student_ids=torch.tensor([[0, 5, 3, 1, 6, 2, 4, 0]]),
        teacher_ids=torch.tensor([[9, 0, 2, 7, 3, 8, 1, 4]]),
        student_ends=torch.tensor([2, 3, 5, 6, 8, 9]),
        teacher_ends=torch.tensor([1, 3, 6, 7, 9]),
    )


# Each figure below: value, gradient at the last number of the student's first sequence, sum of the squared gradients.

# huggingface/trl@f2cd57710ae345ea6428ae95363267fcf38a3dc8:trl/experimental/gkd/gkd_trainer.py, generalized_jsd_loss on
# logits(), labels -100 but at answered(): mean over the answer. (beta, temperature): figure
JSD = {
    (0.0, 1.0): (1.51767958973, 0.0318097410787, 0.061408034098),
    (0.1, 1.0): (0.117192209677, 0.00204468199215, 0.000266981414188),
    (0.5, 1.0): (0.294617969938, 0.00467052614329, 0.00170663489699),
    (0.5, 2.0): (0.138907991174, 0.00138426700177, 0.00027971608062),
    (0.9, 2.0): (0.0554404051471, 0.000357862171516, 5.21806750115e-05),
    (1.0, 1.0): (1.9875251308, 0.00796862378724, 0.143681632042),
    (1.0, 2.0): (0.658674134043, 0.00323704866625, 0.00845279905971),
}

# jongwooko/distillm@d47e77ff9d27721783b32213be38c1204230cc0a:distillm/losses.py on the same, in float32: good to 6
# digits. Its forward direction leaves out the teacher's entropy. lam: figure
SKEWED_FORWARD_CROSS_ENTROPY = {
    0.1: (2.24796581268, 0.0158328264952, 0.017251375163),
    0.5: (1.59744477272, 0.00426944578066, 0.00225162445699),
}
SKEWED_REVERSE = {
    0.1: (1.02073919773, 0.0151344273093, 0.0219098619783),
    0.5: (0.277091503143, 0.00507159725227, 0.00141184438759),
}
REVERSE = (1.98752522469, 0.00796862000995, 0.14368164915)

# Nicolas-BZRD/llm-recipes@ab6e79800d28a1820348d72fc43ad964bb51ac29:models/distillation_model.py, DistillationLoss on
# vocabularies(), every token in the answer; its mean is float32.
UNIVERSAL = (0.638865590096, 0.0111112771491, 0.0209529035661)

# huawei-noah/Pretrained-Language-Model@0598f02d7fc4eaa7b4cbc1e9d7ab18bc875c24f9:TinyBERT/task_distill.py, the loop that
# adds up att_loss, on one layer of scores(); then with -10000 added at the keys that tokens() leaves out.
ATTENTION_SCORES = (5.77661093586, -0.0134616868303, 0.15404295829)
ATTENTION_SCORES_PADDED = (4.11734404203, -0.0134616868303, 0.109795841121)

# bloomberg/minilmv2.bb@0d78e201a8cd02dbf10de414ec418dd12afc37cd:minilmv2/minilmv2.py, not the authors': _get_kl_loss on
# scores() and tokens(), and MiniLM with the relation (1, 1) on vectors() and tokens(): each sequence weighs the same,
# however many tokens it has. relation heads: figure
ATTENTION_DISTRIBUTIONS = (0.88471209321, -0.00103740618815, 0.0200579935271)
RELATIONS = {
    2: (0.511232341008, 0.0202068936907, 0.0545306926663),
    4: (0.457897103425, 0.0368723504483, 0.0303742288975),
}

# huggingface/transformers-research-projects@fccd0cdab03c1407bb7def05e1b48528fc817078:distillation/distiller.py,
# loss_cos on states() and tokens().
COSINE = (0.829223312035, -0.0189521250184, 0.0176868432494)

# intersun/PKD-for-BERT-Model-Compression@9e9e860997ad4815f6ac655d1beb26a85ddd70bb:src/KD_loss.py, patience_loss with
# normalized_patience on states(): the value in float16, good to 3 digits; the gradient in float32.
PATIENT = (0.215576171875, -0.00379042478599, 0.000929679475741)


def figure(value: Tensor, student: Tensor) -> tuple[float, float, float]:
    """The three numbers above, of a loss's value and its student input."""
    (gradient,) = torch.autograd.grad(value, student)
    return value.item(), gradient[0].flatten()[-1].item(), gradient.square().sum().item()


# microsoft/LMOps@4f2a9deb5f08e459fd44c2e4792344d78ca89fc3:minillm/minillm on logits() in float32, tokens drawn(), texts of 4 and 3
# tokens, α = 0.2. Weights: sampler.py. Rewards: losses.py, _get_advantages_and_returns with γ = 1, without whitening, moved by one
# token. Then figures, with the gradient's first number in place of the last: _pg_loss with ε = 0.2 of these, and _reg_loss.
MINILLM_WEIGHTS = (
    *(0.8979385495185852, 1.2269608974456787, 1.2441508769989014, 1.2136629819869995),
    *(1.2055888175964355, 0.6819514632225037, 0.8410818576812744),
)
MINILLM_REWARDS = (
    *(-2.8949058055877686, -3.047952175140381, -2.122270345687866, 0.0),
    *(0.9343314170837402, 0.6651201248168945, 0.0),
)
MINILLM_POLICY = (1.0578304529190063, 0.3430205285549164, 0.7568718194961548**2)
MINILLM_SINGLE = (1.4461501836776733, -0.017619125545024872, 0.2590186297893524**2)

# sebastian-hofstaetter/neural-ranking-kd@aafcc73d6b78ee9849c3d8f5ccf084051fcae2e9:margin_mse_loss.py on candidates().
MARGIN = (18.37242262339078, -0.09222875099434676, 24.496563497854368)

# huggingface/trl 1.16.0 (the wheel):trl/experimental/gold/gold_trainer.py, ULDLoss._compute_hybrid_uld_loss on the six
# items of vocabularies() and shared(), adaptive weights. beta: figure
GOLD = {
    0.0: (0.6217611680348758, 0.0044102601529664625, 0.008332960634968255),
    0.5: (0.39479666866755386, 0.005588823899467621, 0.0024641994005798686),
    1.0: (0.9504601576707707, 0.013540423853377696, 0.02571108504176267),
}
# ULDLoss on groups(), whose tokens are all in the answer after the prompt, with use_extended_uld, beta 0.5 and no end of
# text; the gradient is that of entry 2 at token 3. (uld_token_merge_strategy, uld_use_hybrid_loss): figure
GROUPS = {
    ("observed", False): (0.37872488958945466, 0.00022283950906848576, 0.002414594188640874),
    ("observed", True): (0.12886600766012926, 6.156083706037277e-05, 2.6308514482851778e-05),
    ("bayesian", False): (0.40117353527339256, 0.0002405360796560843, 0.0070413464717572075),
    ("bayesian", True): (0.1347329971632656, 5.517327758803656e-05, 0.000671318554174019),
}
