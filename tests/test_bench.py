from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import environment, launch, start

from rear_scale import config
from rear_scale.bench import data, reference, sample, scaling
from rear_scale.config import InputError
from rear_scale.sample.decode_worker import DecodeWorker
from rear_scale.shards.reader import open_tokens
from rear_scale.shards.record import read_manifest
from rear_scale.tokenizer.compact import CompactTokenizer
from rear_scale.world import free_port


@pytest.mark.parametrize(
    "arguments", [["--rounds", "0"], ["--classes", "0"], ["--classes", "-2"], ["--classes", "1001"]]
)
def test_sampling_that_measures_nothing_is_refused(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    sample.add_arguments(parser)
    with pytest.raises(InputError, match=arguments[0]):
        sample.run(parser.parse_args(arguments))


def test_data_prints_one_object_and_all_readers_see_the_same_samples(tmp_path: Path) -> None:
    words = ("data", "--samples", "4096", "--shards", "4", "--rounds", "1", "--folder", tmp_path / "sets")
    done = launch("python", "launchers/bench.py", *words, "--out", tmp_path / "result.json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert json.loads((tmp_path / "result.json").read_text()) == values
    assert values["ratio"] == values["images_per_s"] / values["reference_images_per_s"] > 1
    assert set(values["variants"]) == {"mmap", "stream", "webdataset", "jsonl"}
    # One block of 1,024 a shard; with the usual ones of 4,096 it is less.
    assert 514 < values["bytes_per_sample"] < 530
    assert values["anonymous_bytes_per_sample"] > 0
    assert {"device", "versions", "samples"} <= set(values)

    folder = tmp_path / "sets"
    whole = open_tokens(folder / "packed", str(folder / "cache"))
    expected = sorted(map(tuple, np.column_stack([whole.labels, whole.tokens]).tolist()))
    readers = reference.load("token_readers")
    plain = sorted(str(tar) for tar in (folder / "plain").glob("*.tar"))
    for batches in (
        readers.jsonl_batches(folder / "tokens.jsonl", 256),
        readers.webdataset_batches(plain, 256),
        data._stream(folder),
        data._mmap(folder),
    ):
        epoch = [next(batches) for _ in range(16)]
        assert all(tokens.dtype == labels.dtype == torch.int64 for tokens, labels in epoch)
        found = [torch.column_stack([labels, tokens]) for tokens, labels in epoch]
        assert sorted(map(tuple, torch.cat(found).tolist())) == expected
        assert torch.cat(found)[:, 0].tolist() != whole.labels.tolist(), "not shuffled"


def test_a_dry_run_shows_the_settings_and_writes_nothing(tmp_path: Path) -> None:
    done = launch("python", "launchers/bench.py", "data", "--dry-run", "--folder", tmp_path / "sets")
    assert json.loads(done.stdout)["samples"] == 1_048_576
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["sample", "train"])
def test_overrides_may_stand_between_options(tmp_path: Path, mode: str) -> None:
    words = ["--config", "demo.yaml", "sample.batch_size=2", "--rounds", "3", "sample.seed=5"]
    done = launch("python", "launchers/bench.py", mode, *words, "--dry-run")
    assert done.returncode == 0, done.stderr[-3000:]
    settings = json.loads(done.stdout)
    assert (settings["overrides"], settings["rounds"]) == (["sample.batch_size=2", "sample.seed=5"], 3)


def test_an_empty_set_can_be_opened(tmp_path: Path) -> None:
    data._write_sets(tmp_path, 256, 1)
    opened = open_tokens(tmp_path / "empty", str(tmp_path / "cache"))
    assert len(opened) == 0
    assert opened.tokens.shape == (0, 256)
    assert read_manifest(tmp_path / "empty").shards == []


def test_a_bench_without_a_mode_or_with_an_unknown_one_is_refused(tmp_path: Path) -> None:
    assert launch("python", "launchers/bench.py").returncode == 2
    done = launch("python", "launchers/bench.py", "nothing")
    assert done.returncode == 2
    assert "data" in done.stderr
    done = launch("python", "launchers/bench.py", "data", "--samples", "10")
    assert done.returncode == 2
    assert "at least" in done.stderr


def sampling(*arguments: str) -> dict:
    parser = argparse.ArgumentParser()
    sample.add_arguments(parser)
    small = ["model.depth=1", "model.width=32", "model.mlp_width=64", "sample.batch_size=5", "tokenizer.weights=null"]
    return sample.run(parser.parse_args(["--config", "demo.yaml", "--rounds", "1", *small, *arguments]))


def test_sampling_is_timed_beside_the_plain_samplers_which_draw_the_same() -> None:
    found = sampling("--uncached", "--classes", "3")
    rates = {name: variant["images_per_s"] for name, variant in found["variants"].items()}
    assert set(rates) == {"distinct_classes", "one_class", "reference_cached", "few_images", "reference_uncached"}
    assert found["same_token_share"] == 1
    assert found["ratio"] == rates["distinct_classes"] / rates["reference_cached"]
    assert found["ratio_to_uncached"] == rates["few_images"] / rates["reference_uncached"]
    assert (found["batch_size"], found["classes"], found["decoding_included"]) == (5, 3, False)
    assert found["latency_per_step_ms"] == pytest.approx(1e3 * 5 / rates["distinct_classes"] / 36)


def test_sampling_with_a_tokenizer_decodes_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    CompactTokenizer(24, 128, 16, 32).save(tmp_path / "tokenizer")
    weights = f"tokenizer.weights={tmp_path / 'tokenizer'}"
    workers = []
    monkeypatch.setattr(sample, "DecodeWorker", lambda device: workers.append(DecodeWorker(device)) or workers[-1])
    found = sampling(weights)
    assert found["decoding_included"]
    assert len(workers) == 1
    # A step's figures are of tokens alone.
    assert found["latency_per_step_ms"] == pytest.approx(
        1e3 * 5 / found["variants"]["tokens_alone"]["images_per_s"] / 36
    )


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("sample.guidance.scale=1", "both branches of guidance"),
        ("sample.top_k=5", "without sample.top_k"),
        ("sample.order=spiral_in", "in raster order"),
    ],
)
def test_samplers_that_draw_otherwise_are_not_compared(override: str, reason: str) -> None:
    guidance = "sample.guidance.schedule=constant"
    found = sampling(guidance, override)
    assert found["ratio"] is None
    assert reason in found["no_reference_because"]
    with pytest.raises(InputError, match="--uncached with --config demo"):
        sampling(guidance, override, "--uncached")


SMALL = ["--rounds", "1", "--config", "bench_cpu.yaml", "model.depth=1", "model.width=32", "train.micro_batch_size=2"]


def test_a_training_step_is_timed_beside_the_plain_one() -> None:
    done = launch("python", "launchers/bench.py", "train", *SMALL)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["ratio"] == values["images_per_s"] / values["reference_images_per_s"] > 0
    first = values["losses_of_the_first_step"]
    assert first["ours"] == pytest.approx(first["reference"], rel=1e-5)


@pytest.mark.long
def test_srun_gives_weak_and_strong_scaling() -> None:
    port = free_port()
    tasks = [
        start(
            "python", "launchers/bench.py", "train", *SMALL, "strategy=ddp",
            env=environment(
                SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="2",
                SLURM_STEP_TASKS_PER_NODE="2", SLURM_STEP_NODELIST="127.0.0.1", MASTER_PORT=str(port),
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    (out, error), (nothing, _) = [task.communicate(timeout=200) for task in tasks]
    assert nothing == ""
    values = json.loads(out)
    rows = {
        name: [(row["world_size"], row["global_batch_size"]) for row in found]
        for name, found in values["scaling"].items()
    }
    assert rows == {"weak": [(1, 2), (2, 4)], "strong": [(1, 4), (2, 4)]}, error
    for found in values["scaling"].values():
        one, two = (row["images_per_s"] for row in found)
        assert [row["efficiency"] for row in found] == [1.0, pytest.approx(two / one / 2)]
        assert found[0]["planned_efficiency"] == 1.0
        assert 0 < found[1]["planned_efficiency"] <= 1
    assert values["images_per_s"] == values["scaling"]["weak"][1]["images_per_s"]
    assert scaling.table(values["scaling"]) in error


def test_the_plan_knows_only_worlds_that_fill_their_machines() -> None:
    cfg = config.load("rear_xl.yaml", ["strategy=ddp"])
    found = {size: {"micro_batch_size": 8, "global_batch_size": 8 * size} for size in (1, 2, 4, 6, 8)}
    rates = scaling.planned(cfg, found, per_node=4)
    assert list(rates) == [1, 2, 4, 8]
    # What ranks send takes time: most of it between machines.
    efficiency = [rates[size] / size for size in rates]
    assert efficiency == sorted(efficiency, reverse=True)
    cfg.cluster.gpu = "not in the table"
    assert scaling.planned(cfg, found, per_node=4) == {}


def test_scaling_doubles_up_to_the_whole_world() -> None:
    assert [scaling.sizes(world) for world in (2, 8, 12)] == [[1, 2], [1, 2, 4, 8], [1, 2, 4, 8, 12]]
