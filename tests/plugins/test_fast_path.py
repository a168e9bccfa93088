"""``nn.TransformerEncoder`` in eval mode: its modules run while something listens, and its fast path comes back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kdgraft import Distiller, Hint, Recorder, Tap
from kdgraft.taps import Recording

MASK = torch.tensor([[False, False, False, True, True], [False] * 5])
INSIDE = ("encoder.layers.0", "encoder.layers.1.linear1", "encoder.layers.1.norm2", "encoder.layers.0:input")


class Reader(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask))


def by_hand(model: Reader, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Each layer written out: attention, feed-forward, each added and normalised."""
    found = {"encoder.layers.0:input": x}
    for number, layer in enumerate(model.encoder.layers):
        weights, bias = layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias
        q, k, v = (
            (x @ w.T + b).unflatten(-1, (2, 4)).transpose(1, 2)
            for w, b in zip(weights.chunk(3), bias.chunk(3), strict=True)
        )
        scores = q @ k.transpose(-1, -2) / 2
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None, :], -torch.inf)
        x = layer.norm1(x + layer.self_attn.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        found[f"encoder.layers.{number}.linear1"] = hidden = layer.linear1(x)
        found[f"encoder.layers.{number}.norm2"] = x = layer.norm2(x + layer.linear2(hidden.relu()))
        found[f"encoder.layers.{number}"] = x
    return found


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("tap", INSIDE)
@torch.no_grad()
def test_taps_inside_a_teachers_layers_by_hand(tap, mask):
    model, x = Reader().eval(), torch.randn(2, 5, 8)
    expected = by_hand(model, x, mask)[tap]
    recorder = Recorder(model, [Tap.parse(tap)], "teacher")
    seen: list[Recording] = [
        recorder.rehearse(model, lambda: model(x, mask)),
        recorder.record_prefix(model, lambda: model(x, mask)),
    ]
    for recording in seen:
        torch.testing.assert_close(recording.tensors(recorder.taps[0])[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("before", [True, False])
def test_the_fast_path_is_as_it_was(before):
    backend = torch.backends.mha
    model, x, tap = Reader().eval(), torch.randn(2, 5, 8), Tap.parse("encoder.layers.0")
    backend.set_fastpath_enabled(before)
    try:
        recorder = Recorder(model, [tap], "teacher")
        with torch.no_grad():
            recorder.rehearse(model, lambda: model(x))
            assert backend.get_fastpath_enabled() is before
            recorder.record_prefix(model, lambda: model(x))  # leaves the pass early
            assert backend.get_fastpath_enabled() is before
        with recorder.record(model):
            assert backend.get_fastpath_enabled() is False
        with pytest.raises(RuntimeError), recorder.record(model), recorder.record(model):
            raise RuntimeError
        assert backend.get_fastpath_enabled() is before
    finally:
        backend.set_fastpath_enabled(True)


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_distilling_between_two_such_models_by_hand(mask):
    """A student whose encoder is frozen has no gradient in the dry run either; its layers run all the same."""
    student, teacher, x = Reader(1), Reader(2), torch.randn(2, 5, 8)
    tap = "encoder.layers.1.norm2"
    expected = (by_hand(student, x, mask)[tap] - by_hand(teacher, x, mask)[tap]).square().mean()
    distiller = Distiller(student, teacher, [Hint(tap, adapter="none")], example=(x, mask) if mask is not None else x)
    output = distiller(x, mask) if mask is not None else distiller(x)
    torch.testing.assert_close(output.loss, expected, rtol=1e-4, atol=1e-5)
    output.loss.backward()
    assert student.encoder.layers[0].linear1.weight.grad.abs().sum() > 0


def test_a_frozen_student_in_the_dry_run():
    student, teacher, x = Reader(1).requires_grad_(False), Reader(2), torch.randn(2, 5, 8)
    distiller = Distiller(student, teacher, [Hint("encoder.layers.1.linear1")], example=(x, MASK))
    assert distiller.rows[0].student_shape == "2×5×16"
