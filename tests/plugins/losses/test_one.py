"""On-the-fly native ensemble: the gate, the ensemble and their loss; the authors' figures are in ``test_self_teaching.py``."""

from __future__ import annotations

import math

import pytest
import torch

from golden import self_teaching as golden
from kdgraft import DistillError
from kdgraft.losses import gated_scores, native_ensemble
from kdgraft.losses.one import Gate


def test_the_gate_by_hand():
    gate = Gate(1, 2)
    with torch.no_grad():
        gate.project.weight.copy_(torch.tensor([[1.0], [-2.0]]))
        gate.project.bias.copy_(torch.tensor([5.0, 0.0]))
        gate.norm.eps = 0.0
    # Of the features 1 and 3 the first branch has 6 and 8, the second −2 and −6: normalised −1 and 1, 1 and −1.
    e = math.e
    expected = torch.tensor([[1 / (1 + e), e / (1 + e)], [e / (1 + e), 1 / (1 + e)]])
    torch.testing.assert_close(gate(torch.tensor([[1.0], [3.0]])), expected)


def test_the_ensemble_by_hand():
    scores = torch.tensor([[[1.0, 2.0]], [[3.0, -2.0]]])
    found = gated_scores(scores, torch.tensor([[0.25, 0.75]]))
    assert found.tolist() == [[0.25 + 2.25, 0.5 - 1.5]]
    with pytest.raises(DistillError, match=r"shares \(2, 1\) must be one of each sample and branch"):
        gated_scores(scores, torch.ones(2, 1))


def test_the_loss_of_two_branches_by_hand():
    # Probabilities at T = 1: (1/2, 1/2) of the student's branch, (1/4, 3/4) of the other, (1/5, 4/5) of the ensemble.
    scores = torch.tensor([[[0.0, 0.0]], [[0.0, math.log(3)]]], requires_grad=True)
    ensemble = torch.tensor([[0.0, math.log(4)]], requires_grad=True)

    def kl(q: tuple[float, float]) -> float:
        return sum(p * math.log(p / own) for p, own in zip((0.2, 0.8), q, strict=True))

    loss = native_ensemble(scores, ensemble, torch.tensor([0]), temperature=1.0)
    # No cross-entropy of the student's own branch, which is the host's loss.
    assert loss.item() == pytest.approx(-math.log(0.25) - math.log(0.2) + kl((0.5, 0.5)) + kl((0.25, 0.75)), rel=1e-6)
    loss.backward()
    # Gradients q − p of each KL, q − y of a cross-entropy; the ensemble has that of its labels alone.
    torch.testing.assert_close(ensemble.grad, torch.tensor([[0.2 - 1, 0.8]]))
    torch.testing.assert_close(scores.grad[0], torch.tensor([[0.5 - 0.2, 0.5 - 0.8]]))
    torch.testing.assert_close(scores.grad[1], torch.tensor([[0.25 - 0.2 + 0.25 - 1, 0.75 - 0.8 + 0.75]]))


def test_the_ensemble_of_the_authors():
    (x, _), branches = golden.trunk(), []
    for k in (1, 2, 3):
        conv, classifier = torch.nn.Conv2d(4, 6, 1, stride=2).double(), torch.nn.Linear(6, 5).double()
        golden.fill(conv, 0.5 + 0.2 * k), golden.fill(classifier, 0.6 + 0.2 * k)
        branches.append(classifier(conv(x).mean((2, 3))))
    gate = Gate(4, 3).double()
    golden.fill(gate.project, 1.1), golden.fill(gate.norm, 1.7)
    found = gated_scores(torch.stack(branches), gate(x.mean((2, 3))))
    torch.testing.assert_close(found[0].tolist(), golden.ENSEMBLE)
