from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from rear_scale import cli, config
from rear_scale.config import InputError, other_names, to_dict, to_yaml
from rear_scale.config.load import NO_EXPERIMENTS
from rear_scale.config.overrides import field_type
from rear_scale.config.values import leaves
from rear_scale.model.flops import parameters_by_part
from rear_scale.train import dry_run
from rear_scale.world import Ranks

ALONE = Ranks(0, 0, 1, 1, None, None, "single")


def error_of(name: str, *overrides: str, world_size: int = 1) -> str:
    with pytest.raises(InputError) as caught:
        config.derive(config.load(name, overrides), world_size, 1437)
    message = str(caught.value)
    assert "\n" not in message
    return message


FOLDERS = ("*.yaml", "official/*.yaml", "ablation/*.yaml", "figure/*.yaml")
CONFIGS = [
    path for pattern in FOLDERS for path in sorted(config.CONFIG_DIR.glob(pattern)) if path.name not in NO_EXPERIMENTS
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_dry_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["data.train=x", "data.assumed_images=1000"] if path.stem == "base" else []
    if path.stem == "base":
        overrides += ["tokenizer.name=maskgit_vqgan"]
    name = path.relative_to(config.CONFIG_DIR).as_posix()
    dry_run.show(config.load(name, overrides), ALONE)
    assert "without_heads" in capsys.readouterr().out


def test_dry_run_prints_lengths_in_steps_and_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    dry_run.show(config.load("rear_xl.yaml"), ALONE)
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 40
    dry_run.show(config.load("rear_xl.yaml"), ALONE, full=True)
    full = capsys.readouterr().out
    assert full.startswith(text.rpartition("every field with its value")[0])
    assert "\n  warmup_steps: 62500\n" in full
    assert "run length: 250,000 steps = 399.6 epochs" in text
    assert "warm-up end: 62,500 steps = 99.9 epochs" in text
    assert "noise end: 187,500 steps = 299.7 epochs" in text
    assert "not found: data.train=data/imagenet256/maskgit_vqgan/train" in text
    assert "955,425,024" in text
    assert "images seen: 512,000,000; tokens seen: 131,072,000,000" in text


def test_a_misspelt_key_is_named_in_full_with_a_suggestion() -> None:
    assert error_of("rear_xl.yaml", "model.depht=3").startswith(
        "model.depht is not a config key; did you mean model.depth?"
    )
    assert "modl" in error_of("rear_xl.yaml", "modl.depth=3")
    assert "model.depth is a single value" in error_of("rear_xl.yaml", "model.depth.x=3")


def test_a_misspelt_key_in_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("defaults: [demo, _self_]\nmodel: {widht: 3}\n")
    assert "model.widht" in error_of(str(path))
    assert "model.width" in error_of(str(path))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.depth=abc", "model.depth=abc is of the wrong type: it takes a whole number"),
        ("optim.lr=fast", "optim.lr=fast is of the wrong type: it takes a number"),
        ("optim.betas=[a,b]", "optim.betas"),
        ("model.mlp_width=abc", "it takes a whole number or null"),
        ("optim.lr=nan", "optim.lr=nan must be above 0"),
        ("optim.lr=-1", "optim.lr=-1.0 must be above 0"),
        ("model.dropout=1", "model.dropout=1.0 must lie in [0, 1)"),
        ("optim.betas=[0.9]", "optim.betas=[0.9] must be two numbers"),
        ("objective.class_dropout=1.5", "objective.class_dropout=1.5 must lie between 0 and 1"),
        ("objective.heads.decode_tap=33", "objective.heads.decode_tap=33 is outside 0..model.depth=32"),
        ("objective.heads.encode_tap=-1", "objective.heads.encode_tap=-1 is outside"),
        ("objective.noise.end=1.5", "objective.noise.end=1.5 is neither a fraction"),
        ("model.num_heads=7", "model.width=1280 is not a multiple of model.num_heads=7"),
        ("train.precision=fp16", "train.precision=fp16 is not one of fp32, bf16"),
        ("strategy=zero9", "strategy=zero9 is not one of"),
        ("strategy.name=zero9", "strategy.name=zero9 is not one of"),
        ("strategy.reshard_after_forward=false", "strategy.reshard_after_forward=False is offered by fsdp2 and hsdp"),
        ("objective=reAR", "did you mean rear?"),
        ("sample.guidance.schedule=cosine", "did you mean power_cosine?"),
        ("train.epochs=null", "exactly one of the two"),
        ("model.depth", "the form is section.field=value"),
        ("~model.depth", "model.depth takes a whole number and is not removed"),
    ],
)
def test_errors_name_field_value_and_rule(override: str, expected: str) -> None:
    assert expected in error_of("rear_xl.yaml", override)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("objective.noise.start=inf", "objective.noise.start=inf is neither a fraction of the run"),
        ("objective.noise.end=nan", "objective.noise.end=nan is neither a fraction of the run"),
        ("run=foo", "run=foo in .* is a single value, but run is a section. Set its fields: run.FIELD=VALUE"),
        ("evaluate.classifier=3", "evaluate.classifier=3 .* is a section"),
        ("optim.betas=0.9", r"optim.betas=\[0.9\] must be two numbers"),
        ("optim.betas=[a,b]", r"optim.betas\[0\]=a is of the wrong type: it takes a number"),
        ("run.name=${oops}", "run.name=.*oops.* refers to a key that does not exist"),
        ("model.num_heads=7", "is not a multiple of model.num_heads=7. Use model.num_heads=8, or model.width=1274"),
        ("model.num_heads=19", "Use model.num_heads=20, or model.width=1273"),
    ],
)
def test_odd_values_are_one_line_too(override: str, expected: str) -> None:
    assert re.search(expected, error_of("rear_xl.yaml", override))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"model: {depth: 3\n", "is not valid YAML (line 2"),
        (b'run: {name: "\xff"}\n', "is not UTF-8 text"),
        (b"defaults: [demo, _self_]\noptim: {lr: '${oops}'}\n", "optim.lr=${oops} refers to a key that does not exist"),
        (b"defaults: [demo, _self_]\nmodel: 3\n", "model=3 in"),
        (b"defaults: [demo, _self_]\nmodel:\n", "model=null in"),
        (b"defaults: [mine, _self_]\n", "its defaults list includes itself"),
        (b"- a\n", "its YAML is a list"),
        (b"", "tokenizer.name is not set in"),
    ],
)
def test_a_file_that_is_no_config_is_one_line(tmp_path: Path, text: bytes, expected: str) -> None:
    (tmp_path / "mine.yaml").write_bytes(text)
    message = error_of(str(tmp_path / "mine.yaml"))
    assert expected in message
    assert "mine.yaml" in message


def test_a_file_that_hides_the_one_it_builds_on_is_named(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text("defaults: [demo, _self_]\n")
    assert "because demo.yaml in" in error_of(str(tmp_path / "demo.yaml"))


def test_of_two_files_of_a_name_the_one_in_use_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["launcher", "--config", "demo.yaml"])
    assert cli.parse(cli.make_parser("")).cfg.run.name == "demo_rear"
    assert capsys.readouterr().err == ""
    (tmp_path / "demo.yaml").write_text(to_yaml(config.load("demo.yaml", ["run.name=mine"])))
    assert cli.parse(cli.make_parser("")).cfg.run.name == "mine"
    assert f"--config demo.yaml: {tmp_path / 'demo.yaml'}, not the file" in capsys.readouterr().err


def test_the_project_may_lie_in_a_folder_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "a=(b), 'c'"
    shutil.copytree(config.CONFIG_DIR, odd)
    monkeypatch.setattr(sys.modules["rear_scale.config.load"], "CONFIG_DIR", odd)
    (tmp_path / "mine.yaml").write_text("defaults: [demo, _self_]\n")
    for name in (str(tmp_path / "mine.yaml"), "demo.yaml"):
        assert config.load(name, ["strategy=ddp"]).strategy.name == "ddp"


def test_a_section_is_overridden_alike_in_files_and_checkpoints(tmp_path: Path) -> None:
    """As a user sees it: what the override names changes, the rest of the section stays."""
    cfg = config.load("rear_l.yaml")
    (tmp_path / "saved.yaml").write_text(to_yaml(cfg))
    for text in ("sample.guidance={scale: 3}", "train={epochs: 2}", "strategy=ddp"):
        changed = config.load("rear_l.yaml", [text])
        assert changed != cfg
        assert config.from_dict(to_dict(cfg), "saved", [text]) == changed
        assert config.load(str(tmp_path / "saved.yaml"), [text]) == changed
    guidance = config.load("rear_l.yaml", ["sample.guidance={scale: 3}"]).sample.guidance
    assert (guidance.schedule, guidance.scale, guidance.power) == ("power_cosine", 3.0, cfg.sample.guidance.power)


def test_a_config_is_read_anew_when_a_file_that_it_is_composed_of_has_changed(tmp_path: Path) -> None:
    mine, under = tmp_path / "mine.yaml", tmp_path / "under.yaml"
    mine.write_text("defaults: [under, _self_]\n")
    under.write_text("defaults: [demo, _self_]\noptim: {lr: 0.1}\n")
    assert [config.load(str(mine)).optim.lr for _ in range(2)] == [0.1, 0.1]
    under.write_text("defaults: [demo, _self_]\noptim: {lr: 0.2}\n")
    assert config.load(str(mine)).optim.lr == 0.2
    # A file that comes to stand before one of ours.
    (tmp_path / "strategy").mkdir()
    (tmp_path / "strategy/zero1.yaml").write_text("name: ddp\n")
    assert config.load(str(mine)).strategy.name == "ddp"
    # What one caller does to a config is not in the next one.
    config.load(str(mine), ["optim.betas=[0.1,0.2]"]).resume.allow.append("optim")
    cfg = config.load(str(mine))
    assert (cfg.optim.betas, cfg.resume.allow) == ([0.9, 0.96], [])


def test_a_choice_on_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "defaults: [demo, _self_]\nstrategy: {name: single}\nobjective: {noise: {max: 0.5}, heads: {hidden: 7}}\n"
    )
    assert config.load(str(path)).strategy.name == "single"
    cfg = config.load(str(path), ["strategy=ddp", "objective=ar"])
    assert (cfg.strategy.name, cfg.objective.noise.max) == ("ddp", 0.0)
    # What the choice says nothing of stays, and what comes after it wins over it.
    assert cfg.objective.heads.hidden == 7
    assert config.load(str(path), ["strategy=ddp", "strategy.name=zero2"]).strategy.name == "zero2"
    assert config.load(str(path), ["strategy.name=zero2", "strategy=ddp", "strategy=zero3"]).strategy.name == "zero3"


def test_a_dry_run_without_data_says_what_it_cannot_know(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["train.epochs=400", "data.assumed_images=null", "data.train=nowhere"]
    dry_run.show(config.load("rear_xl.yaml", overrides), ALONE)
    text = capsys.readouterr().out
    assert "not found: data.train=nowhere" in text
    assert "run length: train.epochs=400.0 needs the number of images" in text
    assert "955,425,024" in text
    with pytest.raises(InputError, match="is not a multiple of"):
        dry_run.show(config.load("rear_xl.yaml", [*overrides, "train.micro_batch_size=7"]), ALONE)


@pytest.mark.parametrize("key", ["optim.betas", "sample.labels", "profile.steps", "resume.allow"])
@pytest.mark.parametrize("item", [{"a": 1}, {}, [1], [[]], None])
def test_an_entry_of_a_list_is_one_value(key: str, item: object) -> None:
    values = config.to_dict(config.load("demo.yaml"))
    section, name = key.split(".")
    values[section][name] = [item, 1]
    with pytest.raises(
        InputError, match=rf"^{key}\[0\]=.* in FILE is of the wrong type: it takes .*\. Write one value"
    ):
        config.from_file(values, "FILE")


def test_an_unknown_config_lists_the_known_ones() -> None:
    message = error_of("rear_titok.yaml")
    assert "did you mean rear_titok_b64.yaml?" in message
    assert "demo.yaml" in message


def test_an_indivisible_batch_names_the_micro_batches_that_fit() -> None:
    message = error_of("demo.yaml", "train.micro_batch_size=24", world_size=2)
    assert "train.global_batch_size=64 is not a multiple of train.micro_batch_size=24 x 2 ranks (48)" in message
    assert message.endswith("Use train.micro_batch_size=16 or 32")
    assert "train.global_batch_size=96" in error_of("demo.yaml", world_size=3)


def test_the_way_out_of_an_indivisible_batch_works() -> None:
    for size in (16, 32):
        plan = config.derive(config.load("demo.yaml", [f"train.micro_batch_size={size}"]), 2, 1437)
        assert plan.accumulation * size * 2 == 64
    plan = config.derive(config.load("demo.yaml", ["train.global_batch_size=96"]), 3, 1437)
    assert plan.accumulation == 1


def test_strategy_single_refuses_a_larger_world() -> None:
    assert "strategy=single runs in one process, but 2 were started" in error_of(
        "demo.yaml", "strategy=single", world_size=2
    )


def test_what_a_strategy_does_not_offer_is_refused() -> None:
    assert "strategy.cpu_offload=True is offered by zero1, zero2 and zero3, not by strategy=ddp" in error_of(
        "demo.yaml", "strategy=ddp", "strategy.cpu_offload=true"
    )
    assert "strategy.replicas=1 must be at least 2 under hsdp" in error_of(
        "demo.yaml", "strategy=hsdp", "strategy.replicas=1"
    )


@pytest.mark.parametrize("world_size", [1, 2, 6, 7])
def test_strategy_hsdp_needs_two_axes(world_size: int) -> None:
    assert f"strategy.replicas=4 needs a multiple of 4 ranks, at least 8, but {world_size} were started" in error_of(
        "demo.yaml", "strategy=hsdp", "strategy.replicas=4", world_size=world_size
    )


@pytest.mark.parametrize("text", ["4e-4", "4.0e-4", "0.0004"])
def test_floats_in_any_notation_are_numbers(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"defaults: [demo, _self_]\noptim: {{lr: {text}}}\n")
    assert config.load(str(path)).optim.lr == 0.0004
    assert config.load("demo.yaml", [f"optim.lr={text}"]).optim.lr == 0.0004


def test_an_override_of_one_length_replaces_the_other() -> None:
    cfg = config.load("demo.yaml", ["train.epochs=10"])
    assert cfg.train.total_steps is None
    assert config.derive(cfg, 1, 1437).total_steps == round(10 * 1437 / 64)
    assert config.load("demo.yaml", ["train.total_steps=7"]).train.total_steps == 7
    assert "both set" in error_of("demo.yaml", "train.epochs=10", "train.total_steps=7")


def test_an_epoch_length_must_come_from_somewhere() -> None:
    cfg = config.load("demo.yaml", ["train.epochs=10", "data.assumed_images=null"])
    with pytest.raises(InputError, match="train.epochs=10.0 needs the number of images"):
        config.derive(cfg, 1, None)


def test_noise_marks_are_shares_or_steps_and_never_refuse_a_short_run() -> None:
    plan = config.derive(config.load("rear_xl.yaml", ["train.total_steps=30"]), 1, None)
    assert (plan.noise_start_step, plan.noise_end_step) == (0, 22)
    plan = config.derive(config.load("rear_xl.yaml", ["train.total_steps=30", "objective.noise.end=187500"]), 1, None)
    assert plan.noise_end_step == 187_500


def test_the_decode_tap_follows_the_depth() -> None:
    assert config.load("rear_xl.yaml").objective.heads.decode_tap == 24
    assert config.load("rear_xl.yaml", ["model.depth=4"]).objective.heads.decode_tap == 3
    assert config.load("rear_xl.yaml", ["objective.heads.decode_tap=7"]).objective.heads.decode_tap == 7


def test_demo_ar_differs_from_demo_in_name_and_objective_only() -> None:
    rear, ar = (config.to_dict(config.load(name)) for name in ("demo.yaml", "demo_ar.yaml"))
    different = {key for key in rear if rear[key] != ar[key]}
    assert different == {"run", "objective"}
    assert ar["objective"]["noise"]["max"] == 0
    assert ar["objective"]["heads"]["encode_tap"] is None
    assert ar["objective"]["heads"]["decode_tap"] is None


def test_a_config_survives_its_own_yaml(tmp_path: Path) -> None:
    cfg = config.load("demo.yaml", ["run.seed=3"])
    path = tmp_path / "saved.yaml"
    path.write_text(config.to_yaml(cfg))
    assert config.load(str(path)) == cfg
    assert config.from_dict(config.to_dict(cfg), "saved") == cfg
    changed = config.from_dict(config.to_dict(cfg), "saved", ["strategy=ddp", "sample.seed=4", "train.epochs=2"])
    assert (changed.strategy.name, changed.sample.seed, changed.train.total_steps) == ("ddp", 4, None)


def test_resume_names_a_changed_field_unless_it_is_allowed() -> None:
    saved = config.to_dict(config.load("demo.yaml"))
    free = [
        "strategy=ddp",
        "train.micro_batch_size=16",
        "train.stop_at_step=5",
        "wandb.mode=offline",
        "data.train=elsewhere",
    ]
    config.check_resumable(config.load("demo.yaml", free), saved, "step_5")
    with pytest.raises(InputError, match="optim.lr=0.5, but step_5 was trained with optim.lr=0.001"):
        config.check_resumable(config.load("demo.yaml", ["optim.lr=0.5"]), saved, "step_5")
    config.check_resumable(config.load("demo.yaml", ["optim.lr=0.5", "resume.allow=[optim.lr]"]), saved, "step_5")
    config.check_resumable(config.load("demo.yaml", ["optim.lr=0.5", "resume.allow=[optim]"]), saved, "step_5")


# Without heads, the released tables included: depth (18 d^2 + 19 d + 4 head width) + tables + output. XXL's feed-forward of
# 6144 replaces 8 d^2 by 2 x 6144 d and 4 d of the 19 d by 6144.
SIZES = {"s": (20, 768, 16), "b": (24, 768, 16), "l": (24, 1024, 16), "xl": (32, 1280, 16), "xxl": (40, 1408, 16),
         "2b": (36, 1792, 14), "3b": (40, 2048, 16), "7b": (40, 3072, 24)}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_each_size_has_its_parameters(size: str) -> None:
    depth, d, heads = SIZES[size]
    block = 18 * d * d + 19 * d + 4 * d // heads
    if size == "xxl":
        block += 2 * 6144 * d - 8 * d * d + 6144 - 4 * d
    tables = (1 + 2026 + 2 * 1280 + 356) * d
    expected = depth * block + tables + 2 * d * d + 2 * d + 1024 * d + 1024
    for name in (f"rear_{size}.yaml", f"ar_{size}.yaml"):
        parts = parameters_by_part(config.load(name))
        assert parts["without_heads"] == expected
        head = 2 * (d * 2048 + 2048 + 2048 * 256 + 256)
        assert parts["heads"] == (head if name.startswith("rear") else 0)
    published = {"s": 218.4, "b": 260.9, "l": 461.7, "xl": 955.4, "xxl": 1498.5}
    if size in published:
        assert round(expected / 1e6, 1) == published[size]


@pytest.mark.parametrize(
    ("name", "millions", "head_millions"),
    [
        ("rar_s.yaml", 133.34, 0),
        ("rear_titok_b64.yaml", 265.20, 3.20),
        ("rear_alitok_b.yaml", 177.05, 3.28),
        ("ar_alitok_b.yaml", 177.05, 0),
        ("official/rear_s.yaml", 218.40, 12.59),
        ("official/rear_l.yaml", 461.67, 13.64),
    ],
)
def test_the_other_systems_have_their_parameters(name: str, millions: float, head_millions: float) -> None:
    parts = parameters_by_part(config.load(name))
    assert round(parts["without_heads"] / 1e6, 2) == millions
    assert round(parts["heads"] / 1e6, 2) == head_millions


def test_published_settings_are_in_their_files() -> None:
    guidance = {
        "rear_s": (22, 2.75, 1), "rear_b": (14.5, 2.25, 1), "rear_l": (10, 1.75, 1), "rear_l_is": (11, 1.75, 1),
        "rar_b": (16, 2.75, 1), "rar_l": (15.5, 2.5, 1.02), "rar_xl": (6.9, 1.5, 1.02), "rar_xxl": (8.0, 1.2, 1.02),
        "rear_alitok_b": (16, 1.8, 1), "official/rear_b": (15, 2.5, 1), "official/rear_l": (15, 2.5, 1),
    }  # fmt: skip
    for name, (scale, power, temperature) in guidance.items():
        sample = config.load(f"{name}.yaml").sample
        found = (sample.guidance.scale, sample.guidance.power, sample.temperature)
        assert found == (scale, power, temperature), name
        assert sample.guidance.schedule == "power_cosine"
    taps = {"s": 15, "b": 18, "l": 18, "xl": 24, "xxl": 30, "2b": 27, "3b": 30, "7b": 30}
    for size, decode in taps.items():
        heads = config.load(f"rear_{size}.yaml").objective.heads
        assert (heads.encode_tap, heads.decode_tap) == (1, decode)
    for size, decode in {"s": 16, "b": 19, "l": 19, "l_vqplus": 19}.items():
        heads = config.load(f"official/rear_{size}.yaml").objective.heads
        assert (heads.encode_tap, heads.decode_tap) == (1, decode)
    alitok = config.derive(config.load("rear_alitok_b.yaml", ["train.micro_batch_size=256"]), 8, None)
    assert (alitok.total_steps, alitok.noise_end_step) == (500_000, 375_000)
    rar = config.derive(config.load("rar_l.yaml"), 8, None)
    assert (rar.permutation_start_step, rar.permutation_end_step) == (125_000, 187_500)


@pytest.mark.parametrize("field", ["run.seed", "sample.seed", "evaluate.seed", "tokenizer.training.seed"])
def test_seeds_that_would_pass_for_others_are_refused(field: str) -> None:
    for seed in (-1, 2**63, 2**64):
        with pytest.raises(InputError, match=rf"{field}={seed} must lie between 0 and 2\^63 - 1\. Set {field}=0"):
            config.load("demo.yaml", [f"{field}={seed}"])
    assert leaves(to_dict(config.load("demo.yaml", [f"{field}={2**63 - 1}"])))[field] == 2**63 - 1
    # The name of a reference is free.
    assert config.load("demo.yaml", ["evaluate.reference.seed=x.npz"]).evaluate.reference["seed"] == "x.npz"


def test_twins_differ_in_what_they_compare() -> None:
    """AR and RAR files differ from their reAR twin in objective, guidance and name; ablations in what their name says."""

    def difference(one: str, other: str) -> set[str]:
        first, second = (leaves(to_dict(config.load(name))) for name in (one, other))
        changed = {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}
        return {key for key in changed if not key.startswith(("run.", "sample."))}

    heads = {"objective.heads.encode_tap", "objective.heads.decode_tap"}
    falls = {"objective.permutation.start", "objective.permutation.end"}
    assert difference("ar_l.yaml", "rear_l.yaml") == heads | {"objective.noise.max"}
    assert difference("rar_alitok_b.yaml", "rear_alitok_b.yaml") == heads | falls | {"objective.noise.max"}
    assert difference("ablation/rear_table4_linear.yaml", "rear_s.yaml") == {"objective.noise.end"}
    assert difference("ablation/rear_table4_truncated_linear.yaml", "rear_s.yaml") == set()
    assert difference("ablation/rear_table4_noise_only.yaml", "rear_s.yaml") == heads
    assert difference("ablation/rear_table3_lambda_0_5.yaml", "ablation/rear_table3_en0_de15.yaml") == {
        "objective.heads.weight"
    }
    assert difference("ablation/rear_table3_tied.yaml", "ablation/rear_table3_vanilla_ar.yaml") == {
        "model.tie_codebook"
    }
    assert difference("ablation/rar_table3_z_curve.yaml", "ablation/rar_table3_row_major.yaml") == {
        "objective.permutation.order"
    }
    assert difference("ablation/rar_table2_200_300.yaml", "rar_l.yaml") == {"model.conditioning"}


def test_names_of_other_projects_are_answered_with_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for ours, others in other_names._NAMES.items():
        field_type(ours)
        for other in others.split():
            assert other_names.our_name(other) == ours, other  # none stands for two fields
    for wrong, ours in (
        ("optim.learning_rate", "optim.lr"), ("learning_rate", "optim.lr"), ("optimizer.lr", "optim.lr"),
        ("train.max-steps", "train.total_steps"), ("train.batch_size", "train.global_batch_size"),
        ("training.gradient_accumulation_steps", "train.micro_batch_size"), ("model.hidden_size", "model.width"),
        ("model.n_layer", "model.depth"), ("trainer.max_epochs", "train.epochs"), ("model.vq_model.codebook_size",
        "tokenizer.codebook_size"),
    ):  # fmt: skip
        assert f"did you mean {ours}?" in error_of("rear_xl.yaml", f"{wrong}=1"), wrong
    for word in ("--learning_rate", "--max-steps"):
        monkeypatch.setattr(sys, "argv", ["train.py", "--config", "demo.yaml", f"{word}=1"])
        with pytest.raises(InputError, match=r"set without dashes: (optim\.lr|train\.total_steps)=VALUE"):
            cli.parse(cli.make_parser(""))


def test_a_file_that_is_there_and_no_config_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name, content, expected in (
        (
            "a.yml",
            "x: 1",
            "is there, but it is no YAML file by its name (.yml): a config is named NAME.yaml. Rename it to a.yaml",
        ),
        ("a", "x: 1", "by its name (without an ending)"),
        ("run", None, "is there, but it is a folder"),
        (
            "words.yaml",
            "for i in 1 2",
            "words.yaml is not a config: its YAML is a single value, not sections with fields",
        ),
        ("list.yaml", "- a", "list.yaml is not a config: its YAML is a list"),
        ("open.yaml", "{a: 1,", "open.yaml is not valid YAML"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        assert expected in error_of(str(tmp_path / name)), name
