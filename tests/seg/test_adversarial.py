"""AdversarialMask: the critic learns to tell masks apart, the student learns to pass; nothing else sees the critic."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from mmengine.optim import OptimWrapper

from kdgraft.errors import DistillError
from kdgraft.losses import adversarial
from kdgraft.losses.adversarial import ADVERSARIES
from kdgraft.opponents import Opponent
from kdgraft_seg import AdversarialMask
from kdgraft_seg.critic import Critic, SelfAttention
from support.mm import run
from support.seg import SMALL_CRITIC, batch, build, config, distilled, losses_of, played, segmentor, total
from support.tensors import assert_same, distillation, gradients

TERM = dict(type="AdversarialMask", critic=SMALL_CRITIC)
KEY = "distill.adversarial_mask"


def masks(sharp: float, number: int = 8, seed: int = 0, size: int = 32) -> torch.Tensor:
    """Class probabilities of 3 classes in blocks: sure of themselves with a high ``sharp``, noisy with a low one."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(number, 3, size // 8, size // 8, generator=generator)
    fine = torch.randn(number, 3, size, size, generator=generator)
    return (sharp * F.interpolate(blocks, scale_factor=8.0) + fine).softmax(1)


def opponent(kind: str = "wgan-gp", seed: int = 0, channels: int = 3, **settings) -> Opponent:
    torch.manual_seed(seed)
    settings = {"penalty": 10.0 if kind == "wgan-gp" else 0.0, "lr": 2e-3, **settings}
    return Opponent(Critic(channels, **SMALL_CRITIC), kind, **settings)


def parameters(of: Opponent) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in of.critic.named_parameters()}


def model_with(teacher, **settings):
    return build(distilled(segmentor(), teacher, terms=[{**TERM, **settings}]))


def critic_of(model) -> Opponent:
    return model.distiller.terms["adversarial_mask"].opponent


# --- it trains


@pytest.mark.parametrize("kind", ADVERSARIES)
def test_the_critic_separates_two_kinds_of_masks(kind):
    critic = opponent(kind)
    gaps = [float(critic.learn(masks(6, seed=step), masks(0, seed=1000 + step))["gap"]) for step in range(60)]
    assert gaps[-1] > 0.1 and gaps[-1] > 5 * abs(gaps[0])
    # Masks that it has not seen: every one of the teacher's scores higher than every one of the student's.
    with torch.no_grad():
        real, fake = critic.judge(masks(6, 32, seed=5000)), critic.judge(masks(0, 32, seed=6000))
    middle = (real.mean() + fake.mean()) / 2
    assert (real > middle).float().mean() > 0.95 and (fake < middle).float().mean() > 0.95
    if kind == "wgan-gp":  # what the penalty is for: the score rises by no more than the masks differ
        assert gaps[-1] < 1.2 * float((masks(6) - masks(0)).flatten(1).norm(dim=1).mean())


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("kind", ADVERSARIES)
def test_a_student_trained_against_it_moves_towards_the_teachers_masks(kind, seed):
    # The student has nothing else to go by: one mask to shape, and a critic that sees the teacher's masks of one kind, sure of
    # the first class. Without the critic's training, or with the loss turned round, it stays or moves away.
    real = (torch.tensor([3.0, 0.0, 0.0]).view(1, 3, 1, 1) + masks(1, seed=seed)).softmax(1)
    logits = torch.zeros(8, 3, 32, 32, requires_grad=True)
    with torch.no_grad():
        logits[:, 2] += 1  # starts sure of another
    critic = opponent(kind, seed)
    optimizer = torch.optim.Adam([logits], 0.05)

    def distance() -> float:
        return float((logits.detach().softmax(1).mean((0, 2, 3)) - real.mean((0, 2, 3))).abs().sum())

    before = distance()
    for _ in range(60):
        fake = logits.softmax(1)
        critic.learn(real, fake)
        optimizer.zero_grad()
        adversarial(critic.judge(fake), kind).backward()
        optimizer.step()
    assert distance() < 0.6 * before


def test_the_term_teaches_a_real_student_the_direction_of_the_teachers_masks(teacher):
    model = model_with(teacher, lr=2e-3)
    samples = batch(ignored=0.0)[1]
    target = torch.zeros(2, 11, 8, 8)
    target[:, 3] = 4
    logits = torch.zeros(2, 11, 8, 8)
    for _ in range(40):
        losses, slope = played(model, logits, target, samples)
        logits = logits - 0.1 * slope / slope.abs().max()
    assert losses[f"{KEY}.gap"] > 0
    assert logits[:, 3].mean() > 0.3 > logits[:, [0, 1, 2, 4]].mean() + 0.2


# --- settings


def test_optimization_is_as_the_config_says(teacher):
    critic = critic_of(model_with(teacher, lr=0.01, betas=(0.3, 0.6), weight_decay=0.02))
    (group,) = critic.optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.01, (0.3, 0.6), 0.02)
    assert {id(p) for p in group["params"]} == {id(p) for p in critic.critic.parameters()}
    default = AdversarialMask().optimization
    assert (default["lr"], default["betas"], default["penalty"], default["steps"]) == (4e-4, (0.0, 0.9), 10.0, 1)
    assert AdversarialMask("lsgan").optimization["penalty"] == AdversarialMask("hinge").optimization["penalty"] == 0


@pytest.mark.parametrize("steps", [1, 3])
def test_steps_are_updates_of_the_critic(teacher, steps):
    model = model_with(teacher, steps=steps)
    losses_of(model, *batch())
    states = critic_of(model).optimizer.state.values()
    assert {int(state["step"]) for state in states} == {steps}


def test_the_learning_rate_moves_the_critic_in_proportion(teacher):
    moved = []
    for lr in (1e-4, 1e-3):
        model = model_with(teacher, lr=lr)
        before = parameters(critic_of(model))
        losses_of(model, *batch())
        after = parameters(critic_of(model))
        moved.append(torch.cat([(after[name] - before[name]).flatten() for name in before]))
    torch.testing.assert_close(moved[1], 10 * moved[0], rtol=1e-2, atol=1e-6)
    assert moved[0].abs().max() > 5e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(kind="gan"), "kind must be one of wgan-gp, lsgan, hinge, got 'gan'"),
        (dict(condition_on_image=1), "condition_on_image must be true or false, got 1"),
        (dict(lr=0), "lr must be a number > 0"),
        (dict(penalty=-1), "penalty must be a number >= 0"),
        (dict(betas=(0.5, 1.0)), "betas must be two numbers"),
        (dict(betas=(0.5,)), "betas must be two numbers"),
        (dict(steps=0), "steps must be a whole number >= 1"),
        (dict(steps=1.5), "steps must be a whole number >= 1"),
        (dict(critic=dict(chanels=(8,))), "critic takes no argument 'chanels'; did you mean 'channels'"),
        (dict(critic=dict(channels=())), "channels must be whole numbers > 0"),
        (dict(critic=dict(channels=(4, 4), attention=3)), "attention must be between 0 and 2"),
    ],
)
def test_wrong_settings(teacher, settings, message):
    with pytest.raises(DistillError) as caught:
        model_with(teacher, **settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_conditioned_on_the_image_it_sees_three_channels_more(teacher):
    plain, conditioned = model_with(teacher), model_with(teacher, condition_on_image=True)
    first = [
        next(m for m in critic_of(model).critic.modules() if isinstance(m, torch.nn.Conv2d))
        for model in (plain, conditioned)
    ]
    assert [layer.in_channels for layer in first] == [11, 14]
    inputs, samples = batch()
    found = []
    for images in (inputs, -inputs):  # other images, the same masks
        model = model_with(teacher, condition_on_image=True)
        heads = model.decode_head, model.distiller.teacher.model.decode_head
        for place, head in enumerate(heads):
            head.forward = lambda _, place=place: torch.linspace(-1, 1 + place, 2 * 11 * 64).view(2, 11, 8, 8).sin()
        found.append(losses_of(model, images, samples)[f"{KEY}.loss"])
    assert found[0] != found[1]


def test_masks_and_image_are_0_where_nothing_counts(teacher):
    inputs, samples = batch(ignored=0.3)
    outside = torch.cat([sample.gt_sem_seg.data for sample in samples]) == 255
    found = []
    for value in (0.0, 100.0):  # in the picture, at ignored pixels
        model = model_with(teacher, condition_on_image=True)
        seen = []
        layer = critic_of(model).critic.trunk[0]
        layer.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        images = torch.where(outside[:, None], value, inputs)
        for head in (model.decode_head, model.distiller.teacher.model.decode_head):
            head.forward = lambda _: torch.linspace(-1, 1, 2 * 11 * 64 * 64).view(2, 11, 64, 64).sin()
        found.append(losses_of(model, images, samples)[f"{KEY}.loss"])
        assert seen and all(maps.shape[1] == 14 for maps in seen)
        for maps in seen:
            for half in maps.split(2):
                assert (half.masked_select(outside[:, None].expand_as(half)) == 0).all()
                assert (half[:, :11].sum(1)[~outside] - 1).abs().max() < 1e-5
    assert found[0] == found[1]


def test_a_binary_head_is_judged_by_its_sigmoid(tmp_path):
    from support.seg import save_teacher

    binary = segmentor(classes=2)
    binary["decode_head"].update(
        out_channels=1, threshold=0.5, loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=True)
    )
    del binary["auxiliary_head"]
    model = build(distilled(binary, save_teacher(tmp_path / "t.pth", binary, classes=("no", "yes")), terms=[TERM]))
    maps = torch.linspace(-3, 3, 2 * 64).view(2, 1, 8, 8)
    samples = batch(classes=2)[1]
    losses, slope = played(model, maps, -maps, samples)
    # A softmax over one channel is constant: nothing to tell apart, and no gradient.
    assert slope.abs().max() > 0
    assert losses[f"{KEY}.gap"].abs() > 0


# --- the critic alone


def test_small_and_odd_masks():
    critic = Critic(3, channels=(4, 8, 8, 8)).eval()
    for size in ((12, 12), (1, 1), (5, 33), (17, 16)):
        assert critic(torch.rand(2, 3, *size)).shape == (2,)
    assert torch.equal(critic(torch.ones(1, 3, 12, 12)), critic(F.pad(torch.ones(1, 3, 12, 12), (0, 4, 0, 4))))


def test_each_sample_is_scored_alone():
    critic = Critic(3, **SMALL_CRITIC).eval()
    for module in critic.modules():
        if isinstance(module, SelfAttention):
            torch.nn.init.ones_(module.gamma)
    found = critic(masks(2))
    torch.testing.assert_close(torch.cat([critic(mask[None]) for mask in masks(2)]), found)
    changed = masks(2)
    changed[0] = 0
    torch.testing.assert_close(critic(changed)[1:], found[1:])


def test_self_attention_by_hand():
    torch.manual_seed(0)
    layer = SelfAttention(16)
    maps = torch.randn(2, 16, 3, 4)
    assert torch.equal(layer(maps), maps)  # it starts as nothing
    torch.nn.init.constant_(layer.gamma, 0.5)
    q, k, v = (conv(maps).flatten(2) for conv in (layer.query, layer.key, layer.value))
    expected = maps.flatten(2).clone()
    for image in range(2):
        for i in range(12):
            share = torch.softmax(torch.stack([q[image, :, i] @ k[image, :, j] for j in range(12)]), 0)
            expected[image, :, i] += 0.5 * (v[image] * share).sum(1)
    torch.testing.assert_close(layer(maps).flatten(2), expected)


def test_spectral_norm_bounds_every_strided_layer():
    critic = Critic(3, **SMALL_CRITIC)
    with torch.no_grad():
        for name, parameter in critic.named_parameters():
            if "trunk" in name and parameter.ndim == 4:
                parameter.mul_(50)
    for _ in range(30):  # power iterations, one a forward pass in training mode
        critic.train()(masks(1, 2))
    strided = [m for m in critic.modules() if isinstance(m, torch.nn.Conv2d) and m.stride == (2, 2)]
    assert len(strided) == 2
    for layer in strided:
        assert torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2).item() == pytest.approx(1, rel=0.02)
    free = Critic(3, **SMALL_CRITIC, spectral_norm=False)
    assert {name for name, _ in free.named_buffers()} == set()


def test_judging_gives_the_critic_no_gradient_and_changes_nothing_of_it():
    critic = opponent()
    before = copy.deepcopy(critic.state())
    fake = masks(0).requires_grad_()
    critic.judge(fake).sum().backward()
    assert fake.grad.abs().sum() > 0
    assert all(p.grad is None for p in critic.critic.parameters())
    assert_same(dict(before["network"]), dict(critic.state()["network"]))


def test_learning_gives_the_masks_no_gradient():
    critic = opponent()
    real, fake = masks(6).requires_grad_(), masks(0).requires_grad_()
    critic.learn(real, fake)
    assert real.grad is None and fake.grad is None


def test_half_precision_masks_are_scored_in_float32():
    critic = opponent()
    shown = critic.learn(masks(6).bfloat16(), masks(0).bfloat16())
    assert all(value.dtype == torch.float32 for value in shown.values())
    with torch.autocast("cpu", torch.bfloat16):
        exact = critic.judge(masks(0).bfloat16())
    assert exact.dtype == torch.float32
    assert torch.equal(exact, critic.judge(masks(0).bfloat16()))


# --- what is not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["real", "fake"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(value, side):
    critic = opponent()
    critic.learn(masks(6), masks(0))
    before, moments = parameters(critic), copy.deepcopy(critic.optimizer.state_dict())
    given = {"real": masks(6), "fake": masks(0)}
    given[side][0, 0, 0, 0] = value
    shown = critic.learn(**given)
    assert shown == {"skipped": torch.tensor(1.0)}
    assert_same(before, parameters(critic))
    for key, state in critic.optimizer.state_dict()["state"].items():
        assert_same(dict(state), dict(moments["state"][key]))
    assert all(p.grad is None for p in critic.critic.parameters())
    shown = critic.learn(masks(6), masks(0))
    assert shown["skipped"] == 1 and "gap" in shown
    assert any(not torch.equal(before[name], value) for name, value in parameters(critic).items())


def test_the_student_goes_on_when_a_critic_step_is_skipped(teacher):
    # The teacher's masks are not finite, the student's are: its own score, and with it its step, still is.
    model = model_with(teacher)
    before = parameters(critic_of(model))
    maps = torch.randn(2, 11, 8, 8, generator=torch.Generator().manual_seed(0))
    broken = maps.clone()
    broken[0, 2, 4, 4] = float("nan")
    losses, slope = played(model, maps, broken, batch(ignored=0.0)[1])
    assert losses[f"{KEY}.skipped"] == 1
    assert torch.isfinite(losses[f"{KEY}.loss"]) and torch.isfinite(slope).all() and slope.abs().sum() > 0
    assert f"{KEY}.dropped" not in losses
    assert_same(before, parameters(critic_of(model)))


def test_no_image_that_counts_is_no_step(teacher):
    model = model_with(teacher)
    before = parameters(critic_of(model))
    inputs, samples = batch()
    for sample in samples:
        sample.gt_sem_seg.data.fill_(255)
    losses = losses_of(model, inputs, samples)
    assert losses[f"{KEY}.loss"] == 0
    assert not any(name.startswith(KEY) and not name.endswith(".loss") for name in losses)
    assert_same(before, parameters(critic_of(model)))


# --- nothing else sees it


def test_the_critic_is_out_of_everyones_sight(tmp_path, scenes, teacher):
    cfg = config(distilled(segmentor(), teacher, terms=[TERM]), scenes, tmp_path, iterations=1)
    runner = run(cfg)
    critic = critic_of(runner.model)
    own = {id(p) for p in critic.critic.parameters()} | {id(b) for b in critic.critic.buffers()}
    assert own.isdisjoint({id(p) for p in runner.model.parameters()} | {id(b) for b in runner.model.buffers()})
    groups = runner.optim_wrapper.optimizer.param_groups
    assert own.isdisjoint(id(p) for group in groups for p in group["params"])
    assert not any("critic" in name or "opponent" in name for name in runner.model.state_dict())
    assert not any("opponent" in name for name in runner.model.distiller.state_dict())
    assert {id(m) for m in critic.critic.modules()}.isdisjoint(id(m) for m in runner.model.modules())


def test_a_deep_copy_shares_it_and_a_move_takes_it_along(teacher):
    model = model_with(teacher)
    losses_of(model, *batch())
    assert critic_of(copy.deepcopy(model)) is critic_of(model)
    model.double()
    critic = critic_of(model)
    assert {p.dtype for p in critic.critic.parameters()} == {torch.float64}
    assert {state["exp_avg"].dtype for state in critic.optimizer.state.values()} == {torch.float64}


@pytest.mark.parametrize("condition", [False, True])
def test_the_hosts_random_stream_is_left_alone(teacher, condition):
    model = model_with(teacher, steps=2, condition_on_image=condition).train()
    inputs, samples = batch()
    plain = build(segmentor()).train()
    states = []
    for each in (plain, model, model):
        torch.manual_seed(3)
        each.loss(inputs, samples)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_under_autocast_and_a_gradient_scale(teacher):
    # What a mixed-precision wrapper does: forward under autocast, backward of a scaled loss. The critic never sees the scale.
    found = []
    for scale in (1.0, 1024.0):
        model = model_with(teacher)
        inputs, samples = batch()
        with torch.autocast("cpu", torch.bfloat16):
            losses = losses_of(model, inputs, samples)
        assert losses[f"{KEY}.loss"].dtype == torch.float32 and torch.isfinite(losses[f"{KEY}.loss"])
        (total(losses) * scale).backward()
        assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())
        found.append(parameters(critic_of(model)))
    assert_same(*found)


def test_accumulation_steps_the_critic_on_every_micro_batch(teacher):
    model = model_with(teacher).train()
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1), accumulative_counts=2)
    wrapper.initialize_count_status(model, 0, 4)
    weights, steps = [model.decode_head.conv_seg.weight.detach().clone()], []
    for seed in range(2):
        inputs, samples = batch(seed=seed)
        with wrapper.optim_context(model):
            losses, _ = model.parse_losses(model(inputs, samples, mode="loss"))
        wrapper.update_params(losses)
        weights.append(model.decode_head.conv_seg.weight.detach().clone())
        steps.append({int(state["step"]) for state in critic_of(model).optimizer.state.values()})
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert steps == [{1}, {2}]


def test_a_state_of_another_critic_is_refused():
    small, large = opponent(), Opponent(Critic(3, channels=(8, 8), attention=1))
    with pytest.raises(DistillError, match="holds another critic"):
        large.load(small.state())
    twin = opponent(seed=9)
    small.learn(masks(6), masks(0))
    twin.load(copy.deepcopy(small.state()))
    shown = [critic.learn(masks(6, seed=1), masks(0, seed=1)) for critic in (small, twin)]
    assert_same(*shown)
    assert_same(parameters(small), parameters(twin))


def test_the_student_gets_the_gradient_of_its_own_score(teacher):
    # By hand: learn on both masks, then minus the mean score of the student's, through its softmax.
    model = model_with(teacher)
    twin = copy.deepcopy(critic_of(model).state())
    maps = [torch.randn(2, 11, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    losses, slope = played(model, *maps, batch(ignored=0.0)[1])
    critic = Opponent(Critic(11, **SMALL_CRITIC), "wgan-gp")
    critic.load(twin)
    student = maps[0].clone().requires_grad_()
    critic.learn(maps[1].softmax(1), student.softmax(1))
    loss = -critic.judge(student.softmax(1)).mean()
    loss.backward()
    torch.testing.assert_close(losses[f"{KEY}.loss"], loss)
    torch.testing.assert_close(slope, student.grad, rtol=1e-4, atol=1e-7)
    assert distillation(losses) == losses[f"{KEY}.loss"]
