"""Recipes from the literature on language models; ``kdgraft list NAME`` prints one to edit."""

from __future__ import annotations

from typing import Any

from kdgraft.balance import Weight

from .registry import RECIPES


def _kept(*terms: dict[str, Any]) -> list[dict[str, Any]]:
    return [term for term in terms if term["weight"]]


@RECIPES.register
def tinybert(
    attention: float = 1.0,
    hidden: float = 1.0,
    embeddings: float = 1.0,
    logits: float = 1.0,
    temperature: float = 1.0,
    layers: Any = "uniform",
    heads: str = "equal",
) -> list[dict[str, Any]]:
    """TinyBERT (arXiv 1909.10351): attention scores, hidden states, embeddings and soft targets together.

    The paper trains the terms on layers first and the soft targets afterwards, which schedules of the terms can do.

    Args:
        attention, hidden, embeddings, logits: the weights of the four terms; a term of weight 0 is left out.
        temperature: the temperature of the soft targets (1 in the paper).
        layers: the pairs of layers.
        heads: ``"averaged"`` for models with different numbers of heads.
    """
    return _kept(
        dict(type="AttentionMaps", layers=layers, heads=heads, weight=attention),
        dict(type="HiddenStates", layers=layers, weight=hidden),
        dict(type="Embeddings", weight=embeddings),
        dict(type="SoftTargets", temperature=temperature, weight=logits),
    )


@RECIPES.register
def minilm(attention: float = 1.0, values: float = 1.0, layers: Any = "final") -> list[dict[str, Any]]:
    """MiniLM (arXiv 2002.10957): the last layer's attention distributions and value relations, for equal numbers of heads.

    Args:
        attention, values: the weights of the two terms.
        layers: the pair of layers.
    """
    return _kept(
        dict(type="Relations", layers=layers, of=("attention",), name="attention_transfer", weight=attention),
        dict(type="Relations", layers=layers, of=("value",), name="value_relations", weight=values),
    )


@RECIPES.register
def minilmv2(weight: Weight = 1.0, layers: Any = "final", heads: int | None = None) -> list[dict[str, Any]]:
    """MiniLMv2 (arXiv 2012.15828): relations of queries, keys and values, for any numbers of heads.

    Args:
        weight: the weight of the term.
        layers: the pair of layers; for a large teacher the paper uses an upper middle layer: ``[(-1, 20)]``.
        heads: the number of relation heads; the teacher's number of attention heads by default.
    """
    return _kept(dict(type="Relations", layers=layers, heads=heads, weight=weight))


@RECIPES.register
def distilbert(
    soft: float = 5.0, cosine: float = 1.0, temperature: float = 2.0, tokens: str = "auto"
) -> list[dict[str, Any]]:
    """DistilBERT (arXiv 1910.01108): soft targets and the cosine of the last hidden states, beside the host's loss of weight 1.

    The paper's weights are 5, 1 and 2 (the masked language model's own loss).

    Args:
        soft, cosine: the weights of the two terms.
        temperature: the temperature of the soft targets.
        tokens: the tokens whose predictions count.
    """
    return _kept(
        dict(type="SoftTargets", temperature=temperature, tokens=tokens, weight=soft),
        dict(type="HiddenStates", layers="final", loss="cosine", weight=cosine),
    )


@RECIPES.register
def pkd(
    soft: float = 1.0, patient: float = 1.0, temperature: float = 5.0, layers: Any = "skip", variant: str = "paper"
) -> list[dict[str, Any]]:
    """Patient knowledge distillation (arXiv 1908.09355): soft targets and normalised first-token states of layers.

    Args:
        soft, patient: the weights of the two terms (the authors search the temperature in 5, 10, 20 and, with their mean
            over channels, the patient weight in 10, 100, 500).
        temperature: the temperature of the soft targets.
        layers: ``"skip"`` or ``"last"``.
        variant: see :class:`~kdgraft_nlp.PatientStates`.
    """
    return _kept(
        dict(type="SoftTargets", temperature=temperature, weight=soft),
        dict(type="PatientStates", layers=layers, variant=variant, weight=patient),
    )


@RECIPES.register
def mobilebert(
    attention: float = 1.0, hidden: float = 1.0, soft: float = 1.0, layers: Any = "uniform"
) -> list[dict[str, Any]]:
    """MobileBERT (arXiv 2004.02984): attention distributions and normalised hidden states layer by layer, and soft targets.

    Args:
        attention, hidden, soft: the weights of the three terms.
        layers: the pairs of layers; the paper's two models have equal depth.
    """
    return _kept(
        dict(type="AttentionMaps", of="distributions", layers=layers, weight=attention),
        dict(type="HiddenStates", loss="normalized", layers=layers, weight=hidden),
        dict(type="SoftTargets", temperature=1.0, weight=soft),
    )


@RECIPES.register
def gkd(weight: Weight = 1.0, beta: float = 0.5, temperature: float = 1.0) -> list[dict[str, Any]]:
    """Generalised knowledge distillation for language models (arXiv 2306.13649): its loss.

    It is computed on the texts of the training set; beside it, ``on_policy`` of the trainer or of a recipe file gives the share λ
    of the steps that train on texts of the student.

    Args:
        weight, beta, temperature: settings of the only term; β = 0 is the forward KL, β = 1 the reverse KL.
    """
    return _kept(dict(type="GeneralizedJSD", beta=beta, temperature=temperature, weight=weight))
