"""The private parts of DeepSpeed that rear_scale/ uses, one row each: a version that moves one is named, with what breaks.

The range in pyproject.toml's extra `train` holds the versions in which all of them were there.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, run_alone, tiny_config
from packaging.requirements import Requirement

from rear_scale.config import derive
from rear_scale.model import build_model
from rear_scale.parallel import open_strategy
from rear_scale.world import World

ENGINE = ROOT / "rear_scale/parallel/deepspeed.py"
ADAM = ROOT / "rear_scale/optim/deepspeed_adam.py"

# (module, name, what of the project needs it)
IMPORTED = [
    ("deepspeed", "init_distributed", "taking over the process group"),
    ("deepspeed", "initialize", "every ZeRO strategy"),
    (
        "deepspeed.git_version_info",
        "installed_ops",
        "optim.backend=deepspeed: whether its operator was built at installation",
    ),
    ("deepspeed.ops", "__compatible_ops__", "starting without a C++ compiler"),
    ("deepspeed.ops.adam", "FusedAdam", "optim.backend=deepspeed"),
    ("deepspeed.ops.op_builder", "FusedAdamBuilder", "optim.backend=deepspeed: compiling its operator"),
    ("deepspeed.runtime.bf16_optimizer", "BF16_Optimizer", "telling how zero1 in bf16 keeps weights and gradients"),
    ("deepspeed.runtime.utils", "combine_grad_norm_groups", "the gradient norm of zero3 before the update"),
    ("deepspeed.runtime.utils", "get_global_norm_of_tensors", "the gradient norm of zero1 in bf16 before the update"),
    ("deepspeed.utils", "safe_get_full_fp32_param", "writing weights into a checkpoint"),
    ("deepspeed.utils", "safe_get_full_grad", "the gradient of a step that is inspected"),
    ("deepspeed.utils", "safe_get_full_optimizer_state", "writing optimizer states into a checkpoint"),
    ("deepspeed.utils", "safe_set_full_fp32_param", "resuming weights of zero1 and zero2"),
    ("deepspeed.utils", "safe_set_full_optimizer_state", "resuming optimizer states of zero1 and zero2"),
    ("deepspeed.utils", "safe_set_local_fp32_param", "resuming weights of zero3"),
    ("deepspeed.utils", "safe_set_local_optimizer_state", "resuming optimizer states of zero3"),
]

# One engine for each optimizer wrapper, by name: the overrides that make it. zero1 in float32 has the wrapper of zero2.
ENGINES = {
    "zero1, bf16": ("strategy=zero1", "train.precision=bf16"),
    "zero2": ("strategy=zero2",),
    "zero3": ("strategy=zero3",),
}

# (attribute of the engine, what of the project needs it)
OF_THE_ENGINE = [
    ("optimizer", "everything below"),
    ("backward", "a micro-step"),
    ("step", "an update"),
    ("train", "validation, after it"),
    ("eval", "validation"),
    ("coalesce_grad_reduction", "strategy.defer_reduction"),
]

# (attribute of the optimizer wrapper, engines that have it, what of the project needs it)
OF_THE_WRAPPER = [
    ("optimizer", tuple(ENGINES), "learning rates, states"),
    ("step", ("zero1, bf16",), "skipping an update"),
    ("get_grads_for_norm", ("zero1, bf16",), "the gradient norm before the update"),
    ("mpu", ("zero1, bf16",), "the gradient norm before the update"),
    ("clear_hp_grads", ("zero1, bf16",), "skipping an update"),
    ("clear_lp_grads", ("zero1, bf16",), "skipping an update"),
    ("fp32_groups_flat_partition", ("zero1, bf16",), "states and averages of the weights"),
    ("scaled_global_norm", ("zero2",), "the gradient norm before the update, skipping an update"),
    ("check_grad_overflow", ("zero2",), "skipping an update"),
    ("single_partition_of_fp32_groups", ("zero2",), "states and averages of the weights"),
    ("_hp_optimizer_states_linked", ("zero1, bf16", "zero2"), "checkpoints of several parameter groups"),
    ("_lazy_init_hp_params_optimizer_state", ("zero1, bf16", "zero2"), "checkpoints of several parameter groups"),
    ("_get_norm_groups", ("zero3",), "the gradient norm before the update, skipping an update"),
    ("fp32_partitioned_groups_flat", ("zero3",), "states and averages of the weights"),
    ("sub_group_to_group_id", ("zero3",), "states of the weights"),
]

# (method of the optimizer wrapper, name that it must look up on itself, engines, what fails silently otherwise)
LOOKED_UP = [
    ("step", "scaled_global_norm", ("zero2",), "a replaced norm would be measured again, and a skipped update applied"),
    ("step", "check_grad_overflow", ("zero2",), "a skipped update would be applied"),
    ("step", "_get_norm_groups", ("zero3",), "a replaced norm would be measured again, and a skipped update applied"),
    ("_lazy_init_hp_params_optimizer_state", "_hp_optimizer_states_linked", ("zero1, bf16", "zero2"),
     "states of later parameter groups would be missing in checkpoints"),
]  # fmt: skip


def moved(what: str, use: str) -> str:
    return (
        f"DeepSpeed {version('deepspeed')} has no {what}, which is used for: {use}. Find where it is now, change "
        "rear_scale/parallel/deepspeed.py or rear_scale/optim/deepspeed_adam.py, and the range in pyproject.toml"
    )


@pytest.mark.parametrize(("module", "name", "use"), IMPORTED, ids=lambda value: value if "." not in value else "")
def test_what_is_imported_is_there(module: str, name: str, use: str) -> None:
    assert hasattr(importlib.import_module(module), name), moved(f"{module}.{name}", use)


def test_the_rows_of_imports_are_all_that_is_imported() -> None:
    found = {
        (node.module, item.name)
        for path in (ENGINE, ADAM)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "deepspeed"
        for item in node.names
    }
    found |= {
        (module, name) for module, name, *_ in IMPORTED if f"{module}.{name}" in ENGINE.read_text() + ADAM.read_text()
    }
    assert {row[:2] for row in IMPORTED} == found


def test_the_package_is_set_up_as_its_import_expects() -> None:
    """DeepSpeed reads these; a name that it no longer knows would be ignored in silence."""
    from deepspeed.accelerator import real_accelerator
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.launcher import launch
    from deepspeed.ops.op_builder import FusedAdamBuilder, ShareMemCommBuilder
    from deepspeed.utils import logging

    assert "DS_ACCELERATOR" in inspect.getsource(real_accelerator), moved("DS_ACCELERATOR", "running on a CPU")
    use = "starting without a C++ compiler"
    assert ShareMemCommBuilder.NAME == "deepspeed_shm_comm", moved("the operator deepspeed_shm_comm", use)
    assert "__compatible_ops__" in build_shm_op.__code__.co_names, moved("the look-up of ops.__compatible_ops__", use)
    assert logging.logger.name == "DeepSpeed", moved("the logger DeepSpeed", "keeping its settings out of the log")
    assert FusedAdamBuilder().name == "fused_adam", moved("FusedAdamBuilder().name", "optim.backend=deepspeed")
    assert callable(FusedAdamBuilder().load), moved("FusedAdamBuilder().load", "optim.backend=deepspeed")
    text = inspect.getsource(launch)
    for word, use in (
        ("CROSS_SIZE", "ending with the deepspeed launcher"),
        ("LOCAL_SIZE", "the number of ranks of a node"),
        ("--local_rank=", "`deepspeed --module rear_scale COMMAND`"),
    ):
        assert word in text, moved(f"{word} in its launcher", use)


def _parts(world: World, folder: Path, tokens: Path) -> dict[str, dict[str, Any]]:
    """By engine: the attributes that the engine and its optimizer wrapper have, and the names that a method looks up."""
    found = {}
    for name, overrides in ENGINES.items():
        cfg = tiny_config(folder, tokens, *overrides)
        strategy = open_strategy(cfg, derive(cfg, world.size, 100), world)
        model = build_model(cfg)
        model.init_weights(0)
        strategy.build(model)
        wrapper = strategy.engine.optimizer
        found[name] = {
            "engine": {attribute for attribute, *_ in OF_THE_ENGINE if hasattr(strategy.engine, attribute)},
            "wrapper": {attribute for attribute, *_ in OF_THE_WRAPPER if hasattr(wrapper, attribute)},
            "looked up": _names_on_self(type(wrapper)),
            "type": type(wrapper).__name__,
            "weights": all(hasattr(weight, "ds_tensor") for weight in model.parameters()),
        }
    return found


def _names_on_self(owner: type) -> dict[str, set[str]]:
    """By method of a class: the names that it looks up on `self`."""
    methods = [node for node in ast.walk(ast.parse(inspect.getsource(owner))) if isinstance(node, ast.FunctionDef)]
    return {
        method.name: {
            node.attr
            for node in ast.walk(method)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
        }
        for method in methods
    }


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> dict[str, dict[str, Any]]:
    return run_alone(_parts, tmp_path_factory.mktemp("parts"), tokens)


@pytest.mark.parametrize(("attribute", "use"), OF_THE_ENGINE)
def test_the_engine_has(parts: dict[str, dict[str, Any]], attribute: str, use: str) -> None:
    for name in ENGINES:
        assert attribute in parts[name]["engine"], moved(f"engine.{attribute} ({name})", use)


@pytest.mark.parametrize(("attribute", "engines", "use"), OF_THE_WRAPPER)
def test_the_optimizer_wrapper_has(
    parts: dict[str, dict[str, Any]], attribute: str, engines: tuple[str, ...], use: str
) -> None:
    for name in engines:
        assert attribute in parts[name]["wrapper"], moved(f"{parts[name]['type']}.{attribute} ({name})", use)


@pytest.mark.parametrize(("method", "attribute", "engines", "otherwise"), LOOKED_UP)
def test_a_method_looks_up_what_is_replaced(
    parts: dict[str, dict[str, Any]], method: str, attribute: str, engines: tuple[str, ...], otherwise: str
) -> None:
    for name in engines:
        what = f"look-up of self.{attribute} in {parts[name]['type']}.{method} ({name})"
        assert attribute in parts[name]["looked up"].get(method, ()), moved(what, f"{attribute}; {otherwise}")


def test_the_wrappers_are_those_that_are_told_apart(parts: dict[str, dict[str, Any]]) -> None:
    for name in ENGINES:
        bf16_wrapper = parts[name]["type"] == "BF16_Optimizer"
        assert bf16_wrapper == (name == "zero1, bf16"), moved(
            f"BF16_Optimizer for zero1 in bf16 alone ({name})", "all of zero1"
        )
    assert parts["zero3"]["weights"], moved("weight.ds_tensor (zero3)", "resuming zero3")


def test_the_rows_of_attributes_are_all_that_are_used() -> None:
    """Every attribute of `self.engine`, of `self.zero` (also as `zero` and `type(zero)`) in parallel/deepspeed.py has a row."""
    used = {"engine": set(), "zero": set()}
    for node in ast.walk(ast.parse(ENGINE.read_text())):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value).removeprefix("self.").replace("type(zero)", "zero")
            if owner in used:
                used[owner].add(node.attr)
    assert {row[0] for row in OF_THE_ENGINE} == used["engine"]
    assert {row[0] for row in OF_THE_WRAPPER} == used["zero"]


def test_the_installed_version_is_in_the_range_that_was_tried() -> None:
    (row,) = map(
        Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["train"]
    )
    assert row.specifier.contains(version("deepspeed")), (
        f"DeepSpeed {version('deepspeed')} is not in {row.specifier}, the range of pyproject.toml. When all tests pass with it, "
        "widen the range"
    )
