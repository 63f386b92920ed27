from __future__ import annotations

import json
import re
import shlex
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import launch, tiny_config

from rear_scale import config
from rear_scale.config import CONFIG_DIR, InputError
from rear_scale.config.devices import bf16_tflops, devices
from rear_scale.config.load import NO_EXPERIMENTS
from rear_scale.config.schema import RECOMPUTE_POLICIES
from rear_scale.model import build_model, meta_model
from rear_scale.parallel.memory import memory_per_rank
from rear_scale.scaling import cost, output
from rear_scale.scaling.cluster import cluster_of, open_cluster
from rear_scale.scaling.command import make_plan
from rear_scale.scaling.planner import GIB, PARTS, USABLE
from rear_scale.train import dry_run, fit
from rear_scale.train.setup import check_data
from rear_scale.world import discover

EVERY = [
    path.relative_to(CONFIG_DIR).as_posix()
    for pattern in ("*.yaml", "official/*.yaml", "ablation/*.yaml")
    for path in sorted(CONFIG_DIR.glob(pattern))
    if path.name not in ("base.yaml", *NO_EXPERIMENTS)
]
# One of each architecture, conditioning, tokenizer, form of heads, and the sizes at the ends.
SOME = ("demo.yaml", "rear_s.yaml", "rear_7b.yaml", "rar_titok_b64.yaml", "rar_alitok_b.yaml", "official/rear_l.yaml",
        "official/rear_l_vqplus.yaml", "ablation/rar_l_plain.yaml", "ablation/rear_table3_tied.yaml",
        "bench_cpu.yaml")  # fmt: skip
CONFIGS = [pytest.param(name, marks=[] if name in SOME else pytest.mark.long) for name in EVERY]


def planned(name: str, *overrides: str) -> dict[str, Any]:
    found = make_plan(name, config.load(name, overrides), list(overrides))
    assert output.as_text(found)
    return json.loads(json.dumps(output.as_dict(found)))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_has_a_plan_whose_numbers_agree(name: str) -> None:
    found = planned(name, "cluster.gpus=8")
    cfg = config.load(name)
    parameters = found["parameters"]
    heads = [w.numel() for key, w in meta_model(cfg).named_parameters() if "align_mlp" in key]
    assert parameters["total"] == sum(weight.numel() for weight in meta_model(cfg).parameters())
    assert parameters["heads"] == sum(heads) == parameters["total"] - parameters["without_heads"]
    names = {(row["name"], row["checkpointing"]) for row in found["strategies"]}
    assert names == {(s, p) for s in ("ddp", "fsdp2", "zero1", "zero2", "zero3") for p in RECOMPUTE_POLICIES}
    for row in found["strategies"]:
        memory = row["memory_gib"]
        assert memory.keys() == {*PARTS, "total", "peak"}
        assert sum(memory[part] for part in PARTS) == pytest.approx(memory["total"])
        assert memory["peak"] <= memory["total"]
        assert (memory["heads"] > 0) == bool(heads)
        assert row["fits"] == (memory["peak"] <= found["usable_memory_gib"])
        if row["fits"]:
            assert cfg.train.global_batch_size == 8 * row["micro_batch_size"] * row["accumulation"]
            assert row["gpu_hours"] == pytest.approx(row["step_time_s"] * found["steps"] * 8 / 3600)
    best = found["recommended"]
    assert best["step_time_s"] <= 1.01 * min(row["step_time_s"] for row in found["strategies"] if row["fits"])
    assert found["gpu_hours"] == pytest.approx(best["gpu_hours"])


@pytest.mark.parametrize(
    "name",
    [
        *("rear_b.yaml", "rear_xl.yaml", "ar_7b.yaml", "official/rear_l.yaml"),
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in EVERY
            if not name.startswith(("demo", "bench_cpu", "evaluate"))
        ),
    ],
)
def test_the_default_strategy_is_the_first_of_deepspeeds_whose_blocks_compile(name: str) -> None:
    """On one node of 8 x 80 GB. ZeRO-3, whose blocks do not compile, is at most 1.5% ahead in a model without compiling."""
    rows = planned(name, "cluster.gpus=8", "cluster.gpu=h100-80g")["strategies"]
    fastest = {
        stage: min(row["step_time_s"] for row in rows if row["fits"] and row["name"] == stage)
        for stage in ("zero1", "zero2", "zero3")
    }
    default = config.load(name).strategy.name
    assert default == "zero2"
    assert fastest[default] <= fastest["zero1"]
    assert fastest[default] <= 1.015 * fastest["zero3"]


def test_parameters_are_those_of_a_model_with_weights() -> None:
    cfg = config.load("demo.yaml")
    built = sum(weight.numel() for weight in build_model(cfg).parameters())
    assert planned("demo.yaml")["parameters"]["total"] == built


def test_a_larger_micro_batch_than_the_one_named_does_not_fit() -> None:
    cfg = config.load("rear_7b.yaml", ["cluster.gpus=16", "cluster.gpu=a100-80g"])
    found = make_plan("rear_7b.yaml", cfg, [])
    model, limit = meta_model(cfg), USABLE * devices()["a100-80g"].memory_gib * GIB
    checked = 0
    for one in found.choices:
        size = one.cfg.train.micro_batch_size
        if one.fits and size < 2048 // 16:
            larger = replace(one.cfg, train=replace(one.cfg.train, micro_batch_size=2 * size))
            assert memory_per_rank(larger, 16, one.plan.accumulation // 2, model, "cuda").peak > limit, one.settings
            checked += 1
    assert checked > 5


def test_sharding_and_recomputation_do_what_they_are_for() -> None:
    # Without compilation, which selective recomputation cannot have, and in the order as drawn, where blocks cost most.
    found = planned("rear_xl.yaml", "cluster.gpus=64", "train.compile=false", "data.group_by_class=false")
    rows = {(row["name"], row["checkpointing"]): row for row in found["strategies"]}
    assert {name for name, _ in rows} == {"ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"}
    for policy in RECOMPUTE_POLICIES:
        ddp, zero1, zero2, zero3, hsdp, fsdp2 = (
            rows[name, policy]["memory_gib"] for name in ("ddp", "zero1", "zero2", "zero3", "hsdp", "fsdp2")
        )
        assert ddp["optimizer"] > 20 * zero1["optimizer"]
        assert zero1["gradients"] > 20 * zero2["gradients"]
        assert zero2["weights"] > 20 * zero3["weights"]
        assert hsdp["weights"] == pytest.approx(8 * fsdp2["weights"], rel=0.01)
    for name in ("ddp", "fsdp2"):
        none, every_n, selective, full = (
            rows[name, policy]["memory_gib"]["activations"] for policy in ("none", "every_n", "selective", "full")
        )
        times = [rows[name, policy]["compute_s"] for policy in ("none", "selective", "every_n", "full")]
        # Every second block, or of each block its products, which are half of what it keeps on a GPU.
        assert none > 1.5 * max(every_n, selective)
        assert every_n > 0.98 * selective > 2 * full
        assert times == sorted(times)


def test_an_update_on_the_host_saves_memory_and_costs_time() -> None:
    asked = ["cluster.gpus=8", "strategy=zero2", "train.micro_batch_size=32"]
    here, host = planned("rear_xl.yaml", *asked), planned("rear_xl.yaml", *asked, "strategy.cpu_offload=true")
    assert host["recommended"]["memory_gib"]["total"] < here["recommended"]["memory_gib"]["total"] - 1
    assert host["step_time_s"] > here["step_time_s"] + 0.1


def test_one_gpu_may_run_alone_and_many_may_not() -> None:
    alone = planned("rear_b.yaml", "cluster.gpus=1")
    assert "single" in {row["name"] for row in alone["strategies"]}
    assert "hsdp" not in {row["name"] for row in alone["strategies"]}
    assert all(row["communication_s"] == 0 for row in alone["strategies"] if row["fits"])


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("rear_xl.yaml", ["cluster.gpu=h100"], ["cluster.gpu=h100 ", "did you mean h100-80g"]),
        ("rear_xl.yaml", ["cluster.gpus=48"], ["cluster.gpus=48", "2048", "cluster.gpus=32 or cluster.gpus=64"]),
        ("rear_xl.yaml", ["cluster.gpus=12"], ["cluster.gpus=12", "cluster.gpus=8 or cluster.gpus=16"]),
        ("rear_xl.yaml", ["cluster.gpus=100"], ["cluster.gpus=100", "cluster.gpus=64 or cluster.gpus=128"]),
        (
            "rear_7b.yaml",
            ["cluster.gpus=3", "cluster.gpu=a100-40g", "train.global_batch_size=2040", "strategy=ddp"],
            ["strategy=ddp", "GiB per GPU"],
        ),
        ("rear_xl.yaml", ["cluster.gpus=4096"], ["cluster.gpus=4096", "cluster.gpus=2048"]),
        ("rear_xl.yaml", ["cluster.gpus=8", "strategy=single"], ["strategy=single", "cluster.gpus=8"]),
        ("rear_xl.yaml", ["cluster.gpus=8", "train.micro_batch_size=48"], ["train.micro_batch_size=48", "32 or 64"]),
        ("rear_7b.yaml", ["cluster.gpus=8", "strategy=ddp"], ["strategy=ddp", "GiB per GPU", "Use strategy=fsdp2"]),
        (
            "rear_7b.yaml",
            ["cluster.gpus=1", "cluster.gpu=a100-40g"],
            ["cluster.gpu=a100-40g", "no strategy fits", "cluster.gpus=4"],
        ),
    ],
)
def test_an_impossible_plan_is_refused_by_name(name: str, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(InputError) as refused:
        planned(name, *overrides)
    for word in words:
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_the_user_says_of_strategy_and_batch_is_kept() -> None:
    overrides = [
        "cluster.gpus=8",
        "strategy=zero2",
        "train.micro_batch_size=16",
        "model.depth=20",
        "optim.betas=[0.9,0.95]",
    ]
    best = planned("rear_l.yaml", *overrides)["recommended"]
    assert (best["strategy"], best["micro_batch_size"], best["accumulation"]) == ("zero2", 16, 16)
    words = shlex.split(best["command"])
    for word in ("strategy=zero2", "train.micro_batch_size=16", "model.depth=20", "optim.betas=[0.9,0.95]"):
        assert words.count(word) == 1


@pytest.mark.parametrize(
    ("own", "overrides"),
    [
        (None, ["cluster.gpus=64", "strategy.cpu_offload=true"]),
        (None, ["cluster.gpus=8", "train={micro_batch_size: 16}"]),
        (None, ["cluster.gpus=8", "strategy.defer_reduction=true", "train.micro_batch_size=64"]),
        (None, ["cluster.gpus=8", "run.dir='a run, with [x]'"]),
        ({"name": "fsdp2", "reshard_after_forward": False}, ["cluster.gpus=8"]),
        ({"name": "zero2", "cpu_offload": True}, ["cluster.gpus=64"]),
        ({"name": "zero2", "defer_reduction": False}, ["cluster.gpus=64"]),
        ({"name": "hsdp", "replicas": 4}, ["cluster.gpus=512"]),
    ],
)
def test_the_line_to_paste_is_the_run_that_was_planned(
    tmp_path: Path, own: dict[str, Any] | None, overrides: list[str]
) -> None:
    name = "rear_xl.yaml"
    if own is not None:
        name = str(tmp_path / "my own.yaml")
        groups = [
            "base",
            {"data": "imagenet256"},
            {"model": "xl"},
            {"tokenizer": "maskgit_vqgan"},
            {"override objective": "rear"},
        ]
        groups += [{"override strategy": own["name"]}, "_self_"]
        Path(name).write_text(json.dumps({"defaults": groups, "strategy": own, "run": {"name": "own"}}))
    found = make_plan(name, config.load(name, overrides), overrides)
    words = shlex.split(found.command)
    start = words.index("--config")
    assert words[start + 1] == name
    pasted, planned = config.load(name, words[start + 2 :]), found.best.cfg
    assert (pasted.train, pasted.strategy) == (planned.train, planned.strategy)
    for text in overrides:
        section, field = text.split("=")[0].split(".") if "." in text.split("=")[0] else ("train", "micro_batch_size")
        asked = config.load(name, overrides)
        assert getattr(getattr(pasted, section), field) == getattr(getattr(asked, section), field), text


@pytest.mark.parametrize("gpus", [1, 8, 64])
def test_the_line_to_paste_starts_a_run(gpus: int, capsys: pytest.CaptureFixture[str]) -> None:
    command = planned("rear_b.yaml", f"cluster.gpus={gpus}")["recommended"]["command"]
    words = shlex.split(command)
    script = words.index("--config") - 1
    assert (
        words[: script + 1]
        == {
            1: ["python", "launchers/train.py"],
            8: ["torchrun", "--nproc-per-node", "8", "launchers/train.py"],
            64: ["sbatch", "--nodes", "8", "launchers/slurm/train.sbatch"],
        }[gpus]
    )
    assert words[script + 1 : script + 3] == ["--config", "rear_b.yaml"]
    dry_run.show(config.load("rear_b.yaml", words[script + 3 :]), discover({}))
    shown = capsys.readouterr().out
    assert f"ranks: {gpus}, strategy " in shown
    assert re.search(rf"by formula, on {gpus} x h100-80g: \d+\.\d+ s a step, [\d.]+ days, [\d,]+ GPU-hours", shown)


def test_the_launcher_prints_one_json_object_or_one_line_of_error() -> None:
    good = launch("python", "launchers/plan.py", "--config", "rear_xl.yaml", "cluster.gpus=64", "--json")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["gpu"] == "h100-80g"
    bad = launch("python", "launchers/plan.py", "--config", "rear_7b.yaml", "cluster.gpus=8", "strategy=ddp")
    assert (bad.returncode, len(bad.stderr.splitlines())) == (2, 1)


def test_a_measured_rate_takes_the_place_of_the_assumed_one() -> None:
    overrides = ["cluster.gpus=8", "cluster.gpu=a100-40g"]
    cfg = config.load("demo.yaml", overrides)
    found = output.as_dict(make_plan("demo.yaml", cfg, overrides, measured=True))
    measured, paper = found["measured"], planned("demo.yaml", *overrides)
    assert measured["slowness"] == pytest.approx(measured["assumed_tflops"] / measured["measured_tflops"])
    for slow, fast in zip(found["strategies"], paper["strategies"], strict=True):
        assert slow["memory_gib"] == fast["memory_gib"]
        assert slow["compute_s"] == pytest.approx(measured["slowness"] * fast["compute_s"])


@pytest.mark.parametrize(
    ("overrides", "way_out"),
    [
        (["model.width=16384", "model.depth=48"], "strategy=fsdp2"),
        (["train.micro_batch_size=1000000", "train.global_batch_size=1000000"], "a smaller train.micro_batch_size"),
    ],
)
def test_the_trainer_refuses_a_run_that_cannot_fit(
    tmp_path: Path, tokens: Path, overrides: list[str], way_out: str
) -> None:
    with pytest.raises(InputError, match=way_out) as refused:
        check_data(tiny_config(tmp_path, tokens, "strategy=single", *overrides), discover({}))
    for word in ("train.micro_batch_size=", "strategy=single", "GiB per rank", "train.check_memory=false"):
        assert word in str(refused.value)
    forced = tiny_config(tmp_path, tokens, "strategy=single", "train.check_memory=false", *overrides)
    assert check_data(forced, discover({})).plan.accumulation >= 1


@pytest.mark.parametrize(
    ("overrides", "gib", "refused"),
    [
        # Gradients come while activations go: 37.6 GiB at once, of 41.1 in all.
        (["strategy=single", "train.global_batch_size=32"], 40.0, None),
        (
            ["strategy=single", "train.global_batch_size=32"],
            37.0,
            r"needs 37\.6 GiB .*freed activations\), and .* has 37\.0",
        ),
        # They are there already where micro-steps add up, and where the engine keeps them from step to step.
        (["strategy=single", "train.global_batch_size=64"], 40.0, r"needs 41\.1 GiB .* buffers 1\.8\), and"),
        (["strategy=zero1", "train.global_batch_size=32"], 39.0, r"needs 39\.7 GiB .*\), and .* has 39\.0"),
    ],
)
def test_a_run_is_refused_by_the_most_that_it_holds_at_one_time(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], gib: float, refused: str | None
) -> None:
    """reAR-XL, 32 images on one rank."""
    monkeypatch.setattr(fit, "_available_bytes", lambda ranks: gib * GIB)
    cfg = config.load("rear_xl.yaml", ["train.micro_batch_size=32", *overrides])
    with pytest.raises(InputError, match=refused) if refused else nullcontext():
        fit.check(cfg, config.derive(cfg, 1, None), discover({}))


def test_rings_pass_what_the_formula_says() -> None:
    """4 bytes of each of 1e9 parameters, 8 GPUs in a machine: once over NVLink and, an eighth of it, over each card."""
    device = replace(devices()["h200-141g"], nvlink_gb_per_s=350 / cost.NVLINK, network_gb_per_s=42.5 / cost.NETWORK)
    one, eight = cluster_of(8, "x", device), cluster_of(64, "x", device)
    assert cost._ring(one, 8, 4 * 10**9, 1) == pytest.approx(4e9 * 7 / 8 / 350e9, rel=0.01)
    assert cost._ring(eight, 64, 4 * 10**9, 1) == pytest.approx(4e9 * 7 / 8 / 350e9 + 4e9 * 7 / 8 / 340e9, rel=0.01)


def test_the_batch_stops_paying_on_many_gpus_and_a_larger_one_pays() -> None:
    found = planned("rear_xl.yaml")
    rows = {row["gpus"]: row for row in found["scaling"]}
    assert list(rows) == [8, 16, 32, 64, 128, 256, 512, 1024]
    last = found["last_gpus_that_pay"]
    assert 64 <= last <= 256
    assert not rows[2 * last]["pays"]
    assert rows[last]["efficiency"] > rows[1024]["efficiency"]
    batches = [row["paying_global_batch_size"] for row in found["scaling"]]
    assert batches == sorted(batches)
    assert batches[0] == 2048
    assert batches[-1] >= 16_384


def test_a_cluster_without_a_number_is_one_full_machine() -> None:
    assert open_cluster(config.load("rear_b.yaml")).gpus == 8
    assert {"a100-40g", "a100-80g", "a800-80g", "h100-80g", "h200-141g", "b200-192g"} <= devices().keys()


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H800", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA RTX 6000 Ada Generation", None),
    ],
)
def test_the_planner_and_mfu_have_one_table_of_gpus(name: str, tflops: float | None) -> None:
    assert bf16_tflops(name) == tflops


def test_grouped_batches_take_less_time_by_the_work_of_adaln_that_they_save() -> None:
    asked = ["cluster.gpus=8", "strategy=zero2", "train.micro_batch_size=64", "train.compile=false"]
    drawn, grouped = (
        planned("rear_xl.yaml", *asked, f"data.group_by_class={value}")["strategies"] for value in (False, True)
    )
    for before, after in zip(drawn, grouped, strict=True):
        if before["micro_batch_size"] == after["micro_batch_size"] == 64:
            assert 0.8 < after["compute_s"] / before["compute_s"] < 0.95, (before["name"], before["checkpointing"])
            assert after["communication_s"] == before["communication_s"]
