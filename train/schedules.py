"""Schedules of the learning rate, and of the momentum and weight decay that some of them change with it.

    cosine      linear warm-up, half a cosine down to min_lr (Loshchilov & Hutter 2017), then min_lr: nanoGPT's
    trapezoid   linear warm-up, level, linear warm-down to min_lr; Muon's momentum and weight decay too: nanochat's
    linear      linear warm-up, level, linear warm-down to 0; Muon's momentum and weight decay too

`set_schedule` is pretraining's; SFT and RL have multipliers of their own, at the end.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch

from gptfast.optim import set_learning_rate, set_scheduled
from train.config import Pretrain

# From nanochat at 92d63d4: scripts/base_train.py
WARMUP, WARMDOWN, FLOOR = 40, 0.65, 0.05
MOMENTUM = (0.85, 0.97, 0.90)  # at the first update, after MOMENTUM_WARMUP iterations, at the end
MOMENTUM_WARMUP = 400


class Schedule(Protocol):
    """The fields that `learning_rate` reads from a configuration."""

    @property
    def decay_lr(self) -> bool: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def warmup_iters(self) -> int: ...
    @property
    def lr_decay_iters(self) -> int: ...
    @property
    def min_lr(self) -> float: ...


def learning_rate(iteration: int, schedule: Schedule) -> float:
    """Returns the rate: linear warm-up, half a cosine down to `min_lr` (Loshchilov & Hutter 2017), then `min_lr`."""
    peak, floor = schedule.learning_rate, schedule.min_lr
    warmup, end = schedule.warmup_iters, schedule.lr_decay_iters
    if not schedule.decay_lr:
        return peak
    if iteration < warmup:
        return peak * (iteration + 1) / (warmup + 1)
    if iteration > end:
        return floor
    progress = (iteration - warmup) / max(1, end - warmup)
    return floor + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - floor)


def set_schedule(optimizer: torch.optim.Optimizer, iteration: int, config: Pretrain) -> float:
    """Sets the scheduled hyperparameters for this iteration; returns the learning rate.

    The cosine changes the rates alone; trapezoid and linear also Muon's momentum and the matrices' weight decay.
    """
    if config.schedule == "linear" and config.decay_lr:
        rate = config.learning_rate * linear(iteration, config)
        for group in optimizer.param_groups:
            if group.get("name") == "matrices":
                remaining = max(0.0, 1 - iteration / config.lr_decay_iters)
                set_scheduled(group, "weight_decay", config.weight_decay * remaining)
            if group.get("kind") == "muon":
                rise = min(1.0, iteration / max(1, config.momentum_iters))
                start = config.momentum_start
                set_scheduled(group, "momentum", start + rise * (config.momentum - start))
    elif config.schedule == "cosine" or not config.decay_lr:
        rate = learning_rate(iteration, config)
    else:
        end = config.lr_decay_iters
        floor = config.min_lr / config.learning_rate if config.learning_rate else 0.0
        rate = config.learning_rate * trapezoid(iteration, end, config.warmup_iters, config.warmdown_ratio, floor)
        for group in optimizer.param_groups:
            if group.get("kind") == "muon":
                set_scheduled(group, "momentum", momentum(iteration, end, config.warmdown_ratio))
                set_scheduled(group, "weight_decay", config.weight_decay * half_cosine(iteration, end))
    set_learning_rate(optimizer, rate)
    return rate


def trapezoid(
    iteration: int, end: int, warmup: int = WARMUP, warmdown: float = WARMDOWN, floor: float = FLOOR
) -> float:
    """Returns the rate's factor: rises to 1 in `warmup` iterations, falls to `floor` in the last part of `end`."""
    down = round(warmdown * end)
    if iteration < warmup:
        return (iteration + 1) / warmup
    if iteration <= end - down:
        return 1.0
    remaining = max(0, end - iteration) / max(1, down)
    return remaining + (1 - remaining) * floor


def linear(iteration: int, config: Pretrain) -> float:
    """Returns the rate's factor: rises to 1 in `warmup_iters`, falls to 0 in the last part of `lr_decay_iters`."""
    end = config.lr_decay_iters
    rise = (iteration + 1) / config.warmup_iters if iteration + 1 < config.warmup_iters else 1.0
    down = config.warmdown_ratio * end
    return min(rise, 1.0, max(0.0, end - iteration) / down if down else 1.0)


def momentum(iteration: int, end: int, warmdown: float = WARMDOWN) -> float:
    """Returns Muon's momentum: rising over the first MOMENTUM_WARMUP iterations, falling as the rates fall."""
    first, highest, last = MOMENTUM
    down = round(warmdown * end)
    if iteration < MOMENTUM_WARMUP:
        return first + (highest - first) * iteration / MOMENTUM_WARMUP
    if iteration < end - down:
        return highest
    fallen = min(1.0, (iteration - (end - down)) / max(1, down))
    return highest * (1 - fallen) + last * fallen


def half_cosine(iteration: int, end: int) -> float:
    """Returns the factor that falls from 1 to 0 at `end` along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, iteration / max(1, end))))


def sft_multiplier(progress: float, *, warmup: float = 0.0, warmdown: float = 0.5, final: float = 0.0) -> float:
    """Returns the rate's factor at `progress` 0 ... 1: linear warm-up, 1, and linear decay to `final`, never below."""
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        return (progress + 1e-8) / warmup
    if progress <= 1.0 - warmdown:
        return 1.0
    down = (progress - (1.0 - warmdown)) / warmdown
    return (1.0 - down) + down * final


def sft_momentum(iteration: int) -> float:
    """Returns Muon's momentum, which rises from 0.85 to 0.95 over 300 updates."""
    return 0.85 + 0.1 * min(iteration / 300, 1.0)


def rl_multiplier(iteration: int, iterations: int) -> float:
    """Returns the rate's factor, which falls linearly from 1 to 0."""
    return max(0.0, 1.0 - iteration / iterations)
