"""The term of MiniLLM, on texts that the student writes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdgraft.batch import Batch
from kdgraft.errors import DistillError, WiringError, check_flag, check_number
from kdgraft.losses import Ratio, minillm, reverse_kl
from kdgraft.pairs import Pairs
from kdgraft.taps import Recording
from kdgraft.terms import TemperedTerm
from kdgraft.wiring import Wiring

from .registry import RECIPES, TERMS
from .tokens import tokens_of


@TERMS.register
@RECIPES.register("minillm")
class MiniLLM(TemperedTerm):
    """MiniLLM: the policy gradient of the reverse KL of whole texts, on texts of the student (Gu et al. 2024, arXiv 2306.08543).

    It is the gradient of the paper's section 2.2: the exact expectation of the single step, the long-term part by the rewards
    of the tokens that follow, normalised by their number, and the importance weights of texts that the teacher helped to write
    (see :func:`kdgraft.losses.minillm`). The trainer needs ``on_policy=OnPolicy(share=1.0, mix=0.2)``; in steps that are not
    on-policy the term is :class:`~kdgraft.ReverseKL`, the single step alone.

    Of the authors' training there is no language-model loss on a second corpus (a share below 1 trains on the data set in the
    other steps), and every text is used for one update, where they draw 256 texts and pass over them four times. Their code
    also discounts rewards by 0.95, standardises them over a batch, scales and clips them, counts the reward of the token itself
    among those that follow, and does not weigh the single step. The value of the loss is not a divergence.

    Args:
        temperature: T > 0, that of ``on_policy``.
        long_term: the long-term part; false leaves the single step.
        length_norm: divide the rewards that follow a token by their number.
        clip: ε of PPO for the factors of the long-term part; ``None``: they are not clipped.
        where: see :class:`kdgraft.terms.ScoreTerm`.
    """

    in_chunks = False

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        long_term: bool = True,
        length_norm: bool = True,
        clip: float | None = 0.2,
        **settings: Any,
    ) -> None:
        super().__init__(temperature, **settings)
        check_flag("MiniLLM", "long_term", long_term)
        check_flag("MiniLLM", "length_norm", length_norm)
        if clip is not None:
            check_number("MiniLLM", "clip", clip, above=True)
        if self.standardize:
            raise DistillError("MiniLLM: texts are drawn from the logits as they are; leave standardize out")
        self.long_term, self.length_norm, self.clip = long_term, length_norm, clip

    def wire(self, wiring: Wiring) -> None:
        super().wire(wiring)
        if getattr(self.scores, "where", "labelled") != "labelled":
            raise WiringError(f"{self.name} compares what was written, which has the labels; leave tokens out")
        told = wiring.facts.get("on_policy")
        if told is None:
            raise WiringError(
                f"{self.name} is for texts that the student writes; give the trainer on_policy=OnPolicy(share=1.0, mix=0.2), or use "
                "ReverseKL on the texts of the data set"
            )
        if told.cuts or told.temperature != self.temperature:
            raise WiringError(
                f"{self.name} differentiates the distribution that texts are drawn from; leave top_k and top_p out of on_policy, and "
                f"give both the same temperature (here {self.temperature:g}, there {told.temperature:g})"
            )

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        written = batch.extra.get("written")
        (pairs,) = self.pairs(student, teacher, batch)
        if written is None:
            return self.ratio(pairs)
        tokens, count = tokens_of(batch).student, pairs.count
        assert tokens.labelled is not None and tokens.targets is not None and count is not None
        rows, targets = tokens.labelled.nonzero()[:, 0], tokens.targets[tokens.labelled]
        items = minillm(
            pairs.student,
            pairs.teacher,
            targets,
            rows,
            written.mix,
            self.temperature,
            long_term=self.long_term,
            length_norm=self.length_norm,
            clip=self.clip,
        )
        return Ratio(items.sum(), count)

    def compare(self, pairs: Pairs) -> Tensor:
        """Return the reverse KL, for texts that the student did not write."""
        return reverse_kl(pairs.student, pairs.teacher, self.temperature, dim=pairs.dim, reduction="none")
