"""The typed experiment config: one dataclass per component, composed from `configs/` by Hydra, checked before anything
is spent.

    cfg = load("rear_xl.yaml", ["strategy=zero3", "optim.lr=2e-4"])
    plan = derive(cfg, world_size=8, num_images=1_281_167)

Every rule that a user can break raises InputError with the field, its value, the rule and a way out, on one line.
"""

from rear_scale.config.load import CONFIG_DIR, from_dict, load
from rear_scale.config.plan import Plan, check_resumable, derive
from rear_scale.config.schema import (
    CheckpointConfig,
    ClassifierConfig,
    ExperimentConfig,
    GuidanceConfig,
    HeadsConfig,
    InputError,
    OptimConfig,
    SampleConfig,
    TokenizerConfig,
    TokenizerTrainingConfig,
)
from rear_scale.config.values import to_dict, to_yaml

__all__ = [
    "CONFIG_DIR",
    "CheckpointConfig",
    "ClassifierConfig",
    "ExperimentConfig",
    "GuidanceConfig",
    "HeadsConfig",
    "InputError",
    "OptimConfig",
    "Plan",
    "SampleConfig",
    "TokenizerConfig",
    "TokenizerTrainingConfig",
    "check_resumable",
    "derive",
    "from_dict",
    "load",
    "to_dict",
    "to_yaml",
]
