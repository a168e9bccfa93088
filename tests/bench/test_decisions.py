"""Calibration, agreement, confusion and the most telling samples, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kdgraft.errors import DistillError
from kdgraft_bench.decisions import (
    Decisions,
    agreement,
    calibration_error,
    confusion,
    recalls,
    telling,
)

NAMES = ("cat", "dog", "cow")


def decided(predicted, label=(0, 0, 1, 1), sample=(0, 1, 2, 3), confidence=None):
    label, predicted = np.array(label), np.array(predicted)
    confidence = np.full(len(label), 0.5) if confidence is None else np.array(confidence)
    return Decisions.of(NAMES, label, predicted, confidence, np.array(sample))


def test_calibration_error_by_hand():
    # One bin holds 0.9, 0.9 (one right): |1.8 − 1| = 0.8; another 0.3 (wrong): 0.3; over three predictions.
    found = calibration_error(np.array([0.9, 0.9, 0.3]), np.array([True, False, False]))
    assert found == pytest.approx((0.8 + 0.3) / 3)


@pytest.mark.parametrize(("confidence", "right", "expected"), [([1.0, 1.0], [True, True], 0.0), ([1.0], [False], 1.0)])
def test_a_sure_model_that_is_right_is_calibrated(confidence, right, expected):
    assert calibration_error(np.array(confidence), np.array(right)) == expected


def test_calibration_without_predictions_is_no_number():
    assert math.isnan(calibration_error(np.array([]), np.array([], dtype=bool)))


def test_agreement_counts_equal_decisions_whether_right_or_not():
    assert agreement(decided([0, 2, 1, 2]), decided([1, 2, 1, 2])) == 0.75


def test_agreement_refuses_other_items():
    with pytest.raises(DistillError, match="different items"):
        agreement(decided([0, 0, 1, 1]), decided([0, 0, 1, 1], label=(0, 1, 1, 1)))


def test_confusion_has_a_column_for_other_classes():
    found = confusion(decided([0, 2, 1, 0]), [0, 1])
    assert found.tolist() == [[0.5, 0.0, 0.5], [0.5, 0.5, 0.0]]


def test_an_object_that_is_missed_counts_as_other():
    missed = decided([0, 3, 1, 1])
    assert confusion(missed, [0, 1]).tolist() == [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]
    assert recalls(missed)[:2].tolist() == [0.5, 1.0]
    assert math.isnan(recalls(missed)[2])


def test_telling_samples_are_those_where_the_student_changed_towards_its_teacher():
    teacher = decided([0, 0, 1, 1])
    plain = decided([1, 0, 0, 1])
    best = decided([0, 0, 2, 1])
    assert telling(teacher, plain, best, 2) == [0, 2]


def test_decisions_survive_the_disk(tmp_path):
    before = decided([0, 2, 1, 3], confidence=[0.1, 0.2, 0.3, 0.4])
    before.write(tmp_path / "decisions.npz")
    after = Decisions.read(tmp_path / "decisions.npz")
    assert after.names == NAMES
    for name in ("label", "predicted", "right", "sample"):
        assert getattr(after, name).tolist() == getattr(before, name).tolist()
    assert after.confidence == pytest.approx(before.confidence)


def test_a_damaged_file_is_said_in_one_line(tmp_path):
    (tmp_path / "decisions.npz").write_bytes(b"no zip")
    with pytest.raises(DistillError, match=r"cannot read .*decisions.npz"):
        Decisions.read(tmp_path / "decisions.npz")
