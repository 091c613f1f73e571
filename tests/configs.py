"""Configurations from flat settings, as flags and TOML files give them."""

from typing import Any

from manifold_lora.comparison.config import CompareConfig
from manifold_lora.configuration.flat import Source, compose
from manifold_lora.planning.config import PlanConfig
from manifold_lora.settings import flag
from manifold_lora.training.config import TrainConfig


def train_config(**settings: Any) -> TrainConfig:
    return compose(TrainConfig, Source(settings, flag))


def compare_config(**settings: Any) -> CompareConfig:
    return compose(CompareConfig, Source(settings, flag))


def plan_config(**settings: Any) -> PlanConfig:
    return compose(PlanConfig, Source(settings, flag))
