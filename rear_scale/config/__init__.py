"""The typed experiment config: one dataclass per section, composed from `configs/` by Hydra and checked before a run starts.

    cfg = load("rear_xl.yaml", ["strategy=zero3", "optim.lr=2e-4"])
    plan = derive(cfg, world_size=8, images_per_epoch=1_281_167)

A broken rule raises InputError: one line with the field, its value, the rule and a way out.
"""

from rear_scale.config.arrived import found_from, is_remote
from rear_scale.config.bounds import check_references, check_yaml
from rear_scale.config.derived import (
    OWN_OF_BRANCH,
    Plan,
    branch_point,
    check_resumable,
    decay_steps_of,
    derive,
    groups_by_class,
    length_of_run,
    settled,
    wants_compile,
)
from rear_scale.config.errors import InputError, UnknownLength, all_checks, first_line, required_path
from rear_scale.config.load import figure_overrides, find_config, from_dict, from_file, given_keys, load, override_keys
from rear_scale.config.overrides import CONFIG_DIR, check_override, combinations, in_quotes, shown
from rear_scale.config.schema import (
    AnalyzeConfig,
    CheckpointConfig,
    ClassifierConfig,
    DataConfig,
    EvaluateConfig,
    ExperimentConfig,
    GuidanceConfig,
    HeadsConfig,
    NoiseConfig,
    OptimConfig,
    PermutationConfig,
    PretokenizeConfig,
    SampleConfig,
    TokenizerConfig,
    TokenizerTrainingConfig,
)
from rear_scale.config.values import to_dict, to_yaml, with_home

__all__ = [
    "CONFIG_DIR",
    "OWN_OF_BRANCH",
    "AnalyzeConfig",
    "CheckpointConfig",
    "ClassifierConfig",
    "DataConfig",
    "EvaluateConfig",
    "ExperimentConfig",
    "GuidanceConfig",
    "HeadsConfig",
    "InputError",
    "NoiseConfig",
    "PermutationConfig",
    "OptimConfig",
    "Plan",
    "PretokenizeConfig",
    "SampleConfig",
    "TokenizerConfig",
    "TokenizerTrainingConfig",
    "UnknownLength",
    "all_checks",
    "branch_point",
    "check_override",
    "check_resumable",
    "check_references",
    "check_yaml",
    "combinations",
    "decay_steps_of",
    "derive",
    "figure_overrides",
    "find_config",
    "first_line",
    "found_from",
    "from_dict",
    "groups_by_class",
    "from_file",
    "given_keys",
    "in_quotes",
    "is_remote",
    "length_of_run",
    "load",
    "override_keys",
    "required_path",
    "settled",
    "shown",
    "to_dict",
    "to_yaml",
    "wants_compile",
    "with_home",
]
