"""Tables of the experiments: claims beside what was measured, and every figure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from ..results import mean_sd
from .claims import Claim, Figures, together
from .experiments import Experiment

PERCENT = 100.0


def percent(values: Sequence[float]) -> str:
    """Format accuracies as ``"81.2 ± 0.4"``, in per cent."""
    return mean_sd([PERCENT * value for value in values], 1)


def claim_rows(experiments: Mapping[Experiment, Figures]) -> list[dict[str, str]]:
    """Return a row for each claim: what was published, the two sides of the claim as measured, their difference, the verdict."""
    return [
        {
            "experiment": experiment.name if place == 0 else "",
            "claim": claim.text,
            "published": claim.published,
            "here (%)": f"{_side(claim, figures, 1)} against {_side(claim, figures, -1)}",
            "difference": signed(claim.differences(figures)),
            "verdict": claim.verdict(figures),
        }
        for experiment, figures in experiments.items()
        for place, claim in enumerate(experiment.claims)
    ]


def experiment_rows(experiments: Mapping[Experiment, Figures]) -> list[dict[str, str]]:
    """Return a row for each experiment: its source and published figures, its own, the verdict on all its claims."""
    return [
        {
            "experiment": f"{experiment.name}: {experiment.title}",
            "source": experiment.source,
            "published": experiment.published,
            "here (accuracy, %)": ", ".join(
                f"{label} {percent(figures[label])}" for label in experiment.shown or figures
            ),
            "agrees": overall(experiment, figures),
        }
        for experiment, figures in experiments.items()
    ]


def figure_rows(experiments: Mapping[Experiment, Figures]) -> list[dict[str, str]]:
    """Return a row for each figure of each experiment."""
    return [
        {"experiment": experiment.name if place == 0 else "", "model": label, "accuracy (%)": percent(values)}
        for experiment, figures in experiments.items()
        for place, (label, values) in enumerate(figures.items())
    ]


def overall(experiment: Experiment, figures: Figures) -> str:
    """Return the verdict on all claims of an experiment, with the number of claims that agree."""
    verdicts = [claim.verdict(figures) for claim in experiment.claims]
    return f"{together(verdicts)} ({verdicts.count('agrees')} of {len(verdicts)})"


def signed(differences: Sequence[float]) -> str:
    """Format a difference in points with its sign, as ``"+3.1 ± 0.6"``."""
    sign = "+" if statistics.mean(differences) >= 0 else "−"
    flipped = [PERCENT * value * (1 if sign == "+" else -1) for value in differences]
    return sign + mean_sd(flipped, 1)


def _side(claim: Claim, figures: Figures, sign: int) -> str:
    """Return the weighted mean of the figures on one side of a claim."""
    terms = {label: sign * factor for label, factor in claim.positive.items() if sign * factor > 0}
    total = sum(terms.values())
    columns = [[factor / total * value for value in figures[label]] for label, factor in terms.items()]
    return percent([sum(values) for values in zip(*columns, strict=True)])
