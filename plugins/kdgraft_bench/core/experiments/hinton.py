"""The experiments of Hinton et al. (2015), arXiv 1503.02531, with perceptrons."""

from __future__ import annotations

from ..claims import Claim
from ..runs import Runs, soft, together
from .base import Experiment

TEMPERATURES = (1.0, 2.5, 4.0, 8.0, 20.0)
NARROW, WIDE = 10, 100
"""The widths of the students; the wide one is also the student of the other experiments."""
MEMBERS = 10
LENGTH = 2
"""The length of all trainings here; perceptrons need more steps than convolutional nets."""


def teacher(runs: Runs) -> str:
    """Plan the large perceptron that teaches the others, with dropout and, as in the paper, pictures that are moved at random."""
    return runs.train("perceptron-teacher", "mlp", 400, length=3, rate=2e-3, dropout=0.25, mode="alone")


def student(runs: Runs, width: int = WIDE, temperature: float | None = None) -> str:
    """Plan a perceptron without regularisation, on hard targets or on soft ones of a temperature."""
    if temperature is None:
        return runs.train(f"perceptron{width}", "mlp", width, length=LENGTH)
    name = f"perceptron{width}-T{temperature:g}".replace(".", "_")
    return runs.train(name, "mlp", width, length=LENGTH, teacher=teacher(runs), terms=[soft(temperature)])


def _hard_soft(runs: Runs) -> dict[str, str]:
    return {"teacher": teacher(runs), "hard": student(runs), "soft": student(runs, WIDE, 4.0)}


def _temperature(runs: Runs) -> dict[str, str]:
    found = {}
    for width in (NARROW, WIDE):
        found[f"{width} units, hard"] = student(runs, width)
        found |= {f"{width} units, T = {t:g}": student(runs, width, t) for t in TEMPERATURES}
    return found


def _share(runs: Runs) -> dict[str, str]:
    hard = runs.train("perceptron-3-percent", "mlp", WIDE, length=LENGTH, share=0.03)
    taught = runs.train(
        "perceptron-3-percent-soft", "mlp", WIDE, length=LENGTH, share=0.03, teacher=teacher(runs), terms=[soft(4.0)]
    )
    return {"all data, hard": student(runs), "3 %, hard": hard, "3 %, soft": taught}


def _ensemble(runs: Runs) -> dict[str, str]:
    members = [
        runs.train(f"perceptron-member{turn}", "mlp", WIDE, length=LENGTH, member=turn) for turn in range(1, MEMBERS)
    ]
    members.insert(0, student(runs))
    distilled = runs.train(
        "perceptron-of-ensemble", "mlp", WIDE, length=LENGTH, teacher=together(members), terms=[soft(4.0)]
    )
    return {
        "one": members[0],
        "ensemble of 10": runs.ensemble("perceptron-ensemble", members, "mlp", WIDE),
        "distilled": distilled,
    }


def _units(width: int, weights: dict[float, float]) -> dict[str, float]:
    return {f"{width} units, T = {t:g}": weight for t, weight in weights.items()}


_SOURCE = "Hinton et al. 2015, arXiv 1503.02531"
HARD_SOFT = Experiment(
    "hard_soft",
    "hard against soft targets, a student without regularisation",
    f"{_SOURCE}, section 3",
    "MNIST, errors of 10 000: teacher 67, hard 146, soft 74",
    _hard_soft,
    (
        Claim("soft targets beat hard ones", "146 → 74 errors", {"soft": 1, "hard": -1}),
        Claim(
            "they close more than half of the gap to the teacher",
            "91 % of it",
            {"soft": 1, "hard": -0.5, "teacher": -0.5},
        ),
    ),
)
TEMPERATURE = Experiment(
    "temperature",
    "the best temperature against the student's width",
    f"{_SOURCE}, section 3",
    "300 units a layer: 8 and more; 30 units: 2.5 to 4",
    _temperature,
    (
        Claim(
            "a wide student learns best at T of 8 and more",
            "300 units: T > 8",
            _units(WIDE, {8.0: 0.5, 20.0: 0.5, 2.5: -0.5, 4.0: -0.5}),
        ),
        Claim(
            "a narrow one better at 2.5 to 4 than at higher T",
            "30 units: 2.5 to 4",
            _units(NARROW, {2.5: 0.5, 4.0: 0.5, 8.0: -0.5, 20.0: -0.5}),
        ),
        Claim(
            "a narrow one better at 2.5 to 4 than at T = 1",
            "30 units: 2.5 to 4",
            _units(NARROW, {2.5: 0.5, 4.0: 0.5, 1.0: -1}),
        ),
    ),
    tuple(f"{width} units, T = {t:g}" for width in (NARROW, WIDE) for t in (1.0, 4.0, 20.0)),
)
SHARE = Experiment(
    "share",
    "3 % of the data, hard and soft targets",
    f"{_SOURCE}, section 5, table 5",
    "speech, frame accuracy: all data 58.9 %; 3 %: hard 44.5 %, soft 57.0 %",
    _share,
    (
        Claim("soft targets beat hard ones on 3 %", "44.5 → 57.0", {"3 %, soft": 1, "3 %, hard": -1}),
        Claim(
            "they recover more than half of what 97 % of the data bring",
            "87 % of it",
            {"3 %, soft": 1, "3 %, hard": -0.5, "all data, hard": -0.5},
        ),
    ),
)
ENSEMBLE = Experiment(
    "ensemble",
    "an ensemble of 10, and the net distilled from it",
    f"{_SOURCE}, section 4, table 1",
    "speech, frame accuracy: one 58.9 %, ensemble 61.1 %, distilled 60.8 %",
    _ensemble,
    (
        Claim("the ensemble beats one net", "58.9 → 61.1", {"ensemble of 10": 1, "one": -1}),
        Claim("the distilled net beats one trained alone", "58.9 → 60.8", {"distilled": 1, "one": -1}),
        Claim(
            "it keeps more than half of the ensemble's gain",
            "more than 80 %",
            {"distilled": 1, "ensemble of 10": -0.5, "one": -0.5},
        ),
    ),
)
