"""The panel of a generalist and its specialists: what it trains, and how it answers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kdgraft import DistillError
from kdgraft.specialists import combine_specialists, correct_dustbin
from kdgraft_bench.core.data import pictures_of
from kdgraft_bench.core.nets import conv
from kdgraft_bench.core.specialists import Panel, panel_loss, task


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("generalist") / "weights.pth"
    generalist = conv(2)
    torch.save(generalist.state_dict(), file)
    return generalist.eval(), task("conv", 2, steps=4, start=str(file))


def test_specialists_start_from_the_generalist_with_groups_that_it_confuses(begun):
    generalist, made = begun
    panel = made.model.eval()
    assert panel.groups.shape == (3, 3) and len({tuple(group) for group in panel.groups.tolist()}) == 3
    pictures = pictures_of("val").small[:8]
    with torch.no_grad():
        whole = generalist(pictures).softmax(1)
        for net, own in zip(panel.specialists, panel.groups, strict=True):
            said = net(pictures).softmax(1)
            # The dustbin scores as the others would if they all did alike: the ratios within a group are the generalist's.
            ratio = (said[:, :-1] / said[:, :1], whole[:, own] / whole[:, own[:1]])
            torch.testing.assert_close(*ratio, rtol=1e-4, atol=1e-6)


def test_only_the_specialists_train_each_on_its_own_part(begun):
    _, made = begun
    panel = made.model.train()
    assert not panel.generalist.training and all(net.training for net in panel.specialists)
    trained = {name for name, p in panel.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in panel.named_parameters() if name.startswith("specialists.")}
    pictures, targets = next(iter(made.loader))
    parts = targets.tensor_split(3)
    assert len({len(part) for part in parts}) == 1
    for part in parts:  # half of them are special
        assert 0.2 < (part == 3).float().mean() < 0.8 and part.max() == 3
    loss = panel_loss(panel(pictures), targets)
    alone = panel_loss([panel.specialists[0](pictures.tensor_split(3)[0])], parts[0])
    first = F.cross_entropy(panel.specialists[0](pictures.tensor_split(3)[0]), parts[0])
    assert torch.isfinite(loss) and alone.item() == pytest.approx(first.item(), rel=1e-5)


def test_the_panel_answers_as_specialists_whose_dustbins_were_corrected(begun):
    _, made = begun
    panel: Panel = made.model.eval()
    pictures = pictures_of("val").small[:8]
    with torch.no_grad():
        found = panel(pictures)
        for net, ratio in zip(panel.specialists, panel.oversampling, strict=True):
            correct_dustbin(net, ratio.item())
        said = [net(pictures) for net in panel.specialists]
        expected = combine_specialists(panel.generalist(pictures), said, panel.groups.tolist(), dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(found.exp().sum(1), torch.ones(8))


def test_a_panel_is_rebuilt_from_its_weights_alone(begun):
    _, made = begun
    again = task("conv", 2, steps=4).model
    again.load_state_dict(made.model.state_dict())
    pictures = pictures_of("val").small[:8]
    with torch.no_grad():
        assert torch.equal(again.eval()(pictures), made.model.eval()(pictures))


def test_other_nets_are_refused():
    with pytest.raises(DistillError, match="net = 'conv', got 'mlp'"):
        task("mlp", 2, steps=4)
