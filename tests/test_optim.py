"""The optimizer's groups, the schedule, the average and early stopping, against upstream's rules worked out by hand."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from utils.config import UserError, check_hyp, read_hyp
from utils.optim import (
    OPTIMIZERS,
    EarlyStopping,
    ModelEMA,
    OptimHyp,
    Schedule,
    accumulation,
    build_optimizer,
    describe,
    parameter_groups,
)

HYP = OptimHyp()


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 2, 1))


def test_parameters_are_grouped_as_biases_weights_and_norm_weights() -> None:
    model = small_network()
    biases, weights, scales = parameter_groups(model)
    assert [id(p) for p in biases] == [id(model[1].bias), id(model[3].bias)]
    assert [id(p) for p in weights] == [id(model[0].weight), id(model[3].weight)]
    assert [id(p) for p in scales] == [id(model[1].weight)]


def test_yolov5n_has_60_biases_60_weights_and_57_norm_weights() -> None:
    from models.yolo import DetectionModel

    groups = parameter_groups(DetectionModel("yolov5n.yaml"))
    assert [len(group) for group in groups] == [60, 60, 57]


def test_only_weights_decay_and_the_decay_follows_the_images_per_step() -> None:
    model = small_network()
    sgd = build_optimizer(model, "SGD", HYP, batch_size=16)
    assert [group["weight_decay"] for group in sgd.param_groups] == [0.0, 0.0005, 0.0]
    assert all(group["lr"] == 0.01 and group["nesterov"] for group in sgd.param_groups)
    # 48 images accumulate round(64 / 48) = 1 batch: three quarters of the nominal 64
    assert build_optimizer(model, "SGD", HYP, 48).param_groups[1]["weight_decay"] == pytest.approx(0.0005 * 48 / 64)
    assert build_optimizer(model, "SGD", HYP, 128).param_groups[1]["weight_decay"] == pytest.approx(0.001)
    nominal = replace(HYP, nominal_batch=16)
    assert build_optimizer(model, "SGD", nominal, 16).param_groups[1]["weight_decay"] == pytest.approx(0.0005)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_adam_takes_the_momentum_as_its_first_beta(name: str) -> None:
    optimizer = build_optimizer(small_network(), name, HYP, 64)
    assert type(optimizer).__name__ == name
    assert optimizer.param_groups[0]["betas"] == (0.937, 0.999)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_modules_that_learn_faster_have_groups_of_their_own(name: str) -> None:
    model = small_network()
    usual = build_optimizer(model, name, HYP, 64)
    same = build_optimizer(model, name, HYP, 64, faster=[model[1], model[3]], factor=1.0)
    assert str(same) == str(usual) and "times the rate" not in describe(same)
    ids = [[[id(p) for p in group["params"]] for group in each.param_groups] for each in (usual, same)]
    assert ids[0] == ids[1]
    apart = build_optimizer(model, name, HYP, 64, faster=[model[1], model[3]], factor=10.0)
    groups = [[id(p) for p in group["params"]] for group in apart.param_groups]
    bn, last = model[1], model[3]
    assert groups == [[], [id(model[0].weight)], [], [id(last.weight)], [id(bn.bias), id(last.bias), id(bn.weight)]]
    assert [group["weight_decay"] for group in apart.param_groups] == [0, 0.0005, 0, 0.0005, 0]
    assert describe(apart).endswith("0 bias; at 10 times the rate 3 weight(decay=0.0), 1 weight(decay=0.0005)")


def test_faster_modules_follow_the_schedule_of_the_weights() -> None:
    model = small_network()
    schedule = Schedule(HYP, epochs=300, batches_per_epoch=100, batch_size=16)
    optimizer = build_optimizer(model, "SGD", HYP, 16, faster=[model[3]], factor=10.0)
    for iteration in (0, 10, 150, 299, 300, 12_345, 29_999):
        schedule.apply_(optimizer, iteration)
        setting = schedule.at(iteration)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == [*setting.lr, 10 * setting.lr[1], 10 * setting.lr[1]]
        assert {group["momentum"] for group in optimizer.param_groups} == {setting.momentum}


def test_frozen_parameters_of_faster_modules_are_in_no_group() -> None:
    model = small_network()
    model[3].weight.requires_grad_(False)
    optimizer = build_optimizer(model, "SGD", HYP, 64, faster=[model[3]], factor=2.0)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 1, 0, 1]


def test_frozen_parameters_are_in_no_group() -> None:
    model = small_network()
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model, "SGD", HYP, 64)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1, 1]


def test_momentum_zero_trains_without_nesterov() -> None:
    optimizer = build_optimizer(small_network(), "SGD", replace(HYP, momentum=0.0), 64)
    assert not optimizer.param_groups[0]["nesterov"]


@pytest.mark.parametrize(("batch", "batches"), [(1, 64), (16, 4), (40, 2), (64, 1), (100, 1), (256, 1)])
def test_accumulation_aims_at_64_images(batch: int, batches: int) -> None:
    assert accumulation(HYP, batch) == batches


def test_the_learning_rate_falls_linearly_per_epoch() -> None:
    schedule = Schedule(replace(HYP, warmup_epochs=0), epochs=10, batches_per_epoch=7, batch_size=64)
    assert schedule.warmup_iterations == 0
    for epoch in range(10):
        wanted = 0.01 * ((1 - epoch / 10) * 0.99 + 0.01)
        for iteration in (epoch * 7, epoch * 7 + 6):
            assert schedule.at(iteration).lr == pytest.approx((wanted,) * 3)
    assert schedule.at(0).momentum == 0.937


def test_the_cosine_starts_at_lr0_passes_the_middle_halfway_and_ends_at_lrf() -> None:
    schedule = Schedule(replace(HYP, lrf=0.1), epochs=100, batches_per_epoch=3, batch_size=64, cosine=True)
    assert schedule.factor(0) == pytest.approx(1.0)
    assert schedule.factor(50) == pytest.approx((1 + 0.1) / 2)
    assert schedule.factor(100) == pytest.approx(0.1)
    assert schedule.factor(25) == pytest.approx((1 - math.cos(math.pi / 4)) / 2 * (0.1 - 1) + 1)


def test_the_warm_up_ramps_rates_momentum_and_accumulation() -> None:
    schedule = Schedule(HYP, epochs=300, batches_per_epoch=100, batch_size=16)
    assert schedule.warmup_iterations == 300
    first, half = schedule.at(0), schedule.at(150)
    assert first.lr == pytest.approx((0.1, 0.0, 0.0))
    assert (first.momentum, first.accumulate) == (0.8, 1)
    aim = 0.01 * schedule.factor(1)
    assert half.lr == pytest.approx(((0.1 + aim) / 2, aim / 2, aim / 2))
    assert half.momentum == pytest.approx((0.8 + 0.937) / 2)
    assert half.accumulate == round((1 + 4) / 2)
    after = schedule.at(300)
    assert after.lr == pytest.approx((0.01 * schedule.factor(3),) * 3)
    assert (after.momentum, after.accumulate) == (0.937, 4)


@pytest.mark.parametrize(
    ("epochs", "batches", "wanted"),
    [(100, 8, 100), (3, 8, 8), (1, 2, 0), (400, 8, 100), (100, 1000, 3000)],
    ids=["at least 100", "a third of 24", "a third of 2", "long", "three epochs"],
)
def test_the_warm_up_is_never_longer_than_a_third_of_the_run(epochs: int, batches: int, wanted: int) -> None:
    assert Schedule(HYP, epochs, batches, 16).warmup_iterations == wanted


def test_every_epoch_ends_with_a_step_and_steps_where_enough_batches_came_together() -> None:
    schedule = Schedule(replace(HYP, warmup_epochs=0), epochs=3, batches_per_epoch=10, batch_size=16)
    assert schedule.steps_in(1) == [False, False, False, True] * 2 + [False, True]
    # during the warm-up of at least 100 iterations the number rises from 1 to 4: at 16.7 to 2, at 50 (even) to 2, ...
    warm = Schedule(HYP, epochs=30, batches_per_epoch=8, batch_size=16)
    assert [warm.at(i).accumulate for i in (0, 16, 17, 50, 51, 83, 84, 100)] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert warm.steps_in(1) == [True] * 8
    assert warm.steps_in(12) == [False, False, False, True] * 2


@pytest.mark.parametrize(("batches", "epochs"), [(13, 4), (3, 40), (120, 3)])
def test_upstreams_warm_up_and_steps_can_be_had(batches: int, epochs: int) -> None:
    """Written out: at least 100 batches of warm-up; a step where enough batches passed since the last one, and what an
    epoch's end cuts off is dropped (gradients are zeroed there) though its batches count."""
    usual, upstream = (Schedule(hyp, epochs, batches, 16) for hyp in (HYP, replace(HYP, short_warmup=0, last_step=0)))
    length = max(round(3 * batches), 100)
    assert upstream.warmup_iterations == length
    last, flags = -1, []
    for number in range(epochs * batches):
        accumulate = max(1, round(float(np.interp(number, [0, length], [1, 4]))))
        flags.append(number - last >= accumulate)
        last = number if flags[-1] else last
        ramp = min(number / length, 1)
        assert upstream.at(number).momentum == pytest.approx(0.8 + ramp * (0.937 - 0.8))
        assert upstream.at(number).lr[1] == pytest.approx(ramp * 0.01 * upstream.factor(number // batches))
    assert [step for epoch in range(epochs) for step in upstream.steps_in(epoch)] == flags
    assert all(usual.steps_in(epoch)[-1] for epoch in range(epochs))
    for one in ({"short_warmup": 0}, {"last_step": 0}):
        half = Schedule(replace(HYP, **one), epochs, batches, 16)
        assert (half.warmup_iterations == length) is ("short_warmup" in one)
        steps = [half.steps_in(epoch) for epoch in range(epochs)]
        assert (
            [step for of_epoch in steps for step in of_epoch] == flags
            if "last_step" in one
            else all(of_epoch[-1] for of_epoch in steps)
        )


def test_a_switch_is_on_or_off(tmp_path: Path) -> None:
    file = tmp_path / "hyp.yaml"
    file.write_text("last_step: 0.5\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"hyp\.yaml:1: 'last_step' is 0\.5, expected 0 or 1"):
        check_hyp(read_hyp(file), [OptimHyp])


def test_a_short_run_keeps_taking_a_step_per_batch() -> None:
    """Fine-tuning for 24 batches: rates are warm after a third, accumulation is not worth it yet."""
    short = Schedule(HYP, epochs=3, batches_per_epoch=8, batch_size=16)
    assert short.warmup_iterations == 8 and short.at(8).lr == pytest.approx((0.01 * short.factor(1),) * 3)
    assert sum(sum(short.steps_in(epoch)) for epoch in range(3)) == 21


def test_the_schedule_sets_the_rates_of_every_group_but_not_adams_betas() -> None:
    schedule = Schedule(HYP, epochs=100, batches_per_epoch=100, batch_size=64)
    sgd = build_optimizer(small_network(), "SGD", HYP, 64)
    schedule.apply_(sgd, 0)
    assert [group["lr"] for group in sgd.param_groups] == [0.1, 0.0, 0.0]
    assert [group["momentum"] for group in sgd.param_groups] == [0.8] * 3
    adam = build_optimizer(small_network(), "AdamW", HYP, 64)
    schedule.apply_(adam, 0)
    assert adam.param_groups[0]["betas"] == (0.937, 0.999)


def test_the_average_follows_the_formula() -> None:
    model = small_network()
    ema = ModelEMA(model)
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    for update in range(1, 4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
            model[1].running_mean.add_(2.0)
        ema.update()
        decay = 0.9999 * (1 - math.exp(-update / 2000))
        for name, value in model.state_dict().items():
            if value.dtype.is_floating_point:
                wanted[name] = decay * wanted[name] + (1 - decay) * value
    for name, value in ema.ema.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-6)
    assert ema.updates == 3
    assert not any(p.requires_grad for p in ema.ema.parameters()) and not ema.ema.training


def test_the_average_follows_a_model_whose_weights_are_loaded_later() -> None:
    model = small_network()
    ema = ModelEMA(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.fill_(5.0)
    model.load_state_dict(other.state_dict())
    ema.update()  # the first decay is about 0.0005
    torch.testing.assert_close(ema.ema[0].weight, other[0].weight, rtol=1e-2, atol=1e-2)


def test_training_stops_after_patience_epochs_without_a_strictly_better_one() -> None:
    stopping = EarlyStopping(patience=3)
    seen = [(stopping.update(epoch, fitness), stopping.stop) for epoch, fitness in enumerate([0.0, 0.5, 0.5, 0.4, 0.5])]
    assert seen == [(True, False), (True, False), (False, False), (False, False), (False, True)]
    assert (stopping.best_epoch, stopping.best_fitness) == (1, 0.5)


def test_patience_zero_never_stops() -> None:
    stopping = EarlyStopping(patience=0)
    assert not any((stopping.update(epoch, 0.0) and False) or stopping.stop for epoch in range(1000))


def test_early_stopping_goes_on_from_its_state() -> None:
    first = EarlyStopping(patience=2)
    first.update(0, 0.7)
    first.update(1, 0.6)
    second = EarlyStopping(patience=2)
    second.load_state_dict(first.state_dict())
    assert not second.update(2, 0.7)
    assert second.stop
