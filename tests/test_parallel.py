from __future__ import annotations

import errno
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import find, run_alone, run_ranks, tiny_config

from rear_scale import config
from rear_scale.checkpoint import writer as writer_module
from rear_scale.checkpoint.folder import Checkpoint, clear, last_step, open_checkpoint
from rear_scale.checkpoint.open import newest_intact
from rear_scale.checkpoint.restore import load_weights, restore
from rear_scale.checkpoint.writer import Writer, save
from rear_scale.config import CheckpointConfig, ExperimentConfig, InputError, settled
from rear_scale.model import build_model
from rear_scale.model.recompute import prepare_blocks
from rear_scale.objective import Objective
from rear_scale.optim.groups import decays
from rear_scale.parallel import open_strategy
from rear_scale.parallel.strategy import Strategy
from rear_scale.shards.reader import open_tokens
from rear_scale.shards.record import read_codebook
from rear_scale.train.setup import data_order
from rear_scale.world import World

QUIET = ["model.dropout=0", "model.attn_dropout=0"]
# Of two ranks, with the variants that change what travels when.
ALTERNATIVES = {
    "ddp": [[]],
    "fsdp2": [[], ["strategy.defer_reduction=false", "strategy.reshard_after_forward=false"]],
    "zero1": [[], ["strategy.cpu_offload=true"]],
    "zero2": [[], ["strategy.defer_reduction=true"], ["strategy.cpu_offload=true"]],
    "zero3": [[], ["strategy.defer_reduction=true"]],
    "hsdp": [[], ["strategy.defer_reduction=false"]],
}
TWO_RANKS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


def build(world: World, cfg: ExperimentConfig, found: Checkpoint | None = None) -> Strategy:
    strategy = open_strategy(cfg, config.derive(cfg, world.size, 100), world)
    model = build_model(cfg)
    model.init_weights(0)
    model.set_codebook(codebook_of(cfg))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "adaLN" in name:  # zero at first, and a zero gate hides whatever is behind it
                weight.fill_(0.01)
    if found is not None:
        load_weights(found, model)
    prepare_blocks(model, cfg)
    strategy.build(model)
    if found is not None:
        restore(found, strategy)
    return strategy


def codebook_of(cfg: ExperimentConfig) -> torch.Tensor:
    """A codebook for a model that is tied to one."""
    size = (cfg.tokenizer.codebook_size, cfg.tokenizer.codebook_dim)
    return 0.2 * torch.randn(size, generator=torch.Generator().manual_seed(0))


def run_steps(
    world: World,
    cfg: ExperimentConfig,
    strategy: Strategy,
    first: int,
    last: int,
    *,
    skip: bool = False,
    lr: float = 1e-2,
) -> list[tuple[float, float]]:
    """(loss over the global batch, gradient norm) of each step, whose update is applied or skipped."""
    tokens = open_tokens(cfg.data.train, cfg.data.cache_dir)
    codebook = torch.from_numpy(read_codebook(cfg.data.train, tokens.manifest))
    objective = Objective(cfg, strategy.plan, codebook, world.device)
    order = data_order(settled(cfg, None), tokens, objective)
    results = []
    for step in range(first, last + 1):
        loss = 0.0
        for micro_step, (ids, epochs) in enumerate(
            order.rank_batches(step, world.rank, world.size, strategy.plan.accumulation)
        ):
            batch = objective.micro_batch(*tokens.rows(ids), ids, epochs)
            task = objective.task(batch, step)

            def compute(forward, batch=batch, task=task):
                return objective.loss(forward(task.context, batch.classes, batch.class_index), task)

            loss += strategy.forward_backward(compute, micro_step)[0].item() / strategy.plan.accumulation
        norm = strategy.grad_norm().item()
        if skip:
            strategy.skip()
        else:
            strategy.step(lr)
        results.append((world.sum([loss]).item() / world.size, norm))
    return results


def everything(strategy: Strategy) -> dict[str, np.ndarray]:
    return {
        f"{kind}/{name}": value.cpu().numpy().copy()
        for kind in strategy.state_names
        for name, value in strategy.tensors(kind)
    }


def _train_save_continue(world: World, cfg: ExperimentConfig, root: Path) -> tuple[list, dict[str, np.ndarray]]:
    strategy = build(world, cfg)
    losses = run_steps(world, cfg, strategy, 1, 3)
    save(root, 3, strategy, world, {"optimizer_step": 3, "config": {}}, CheckpointConfig(keep_last=2))
    return losses + run_steps(world, cfg, strategy, 4, 6), everything(strategy)


def _strategies(world: World, folder: Path, tokens: Path, saved: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Strategies trained and saved; then each resumed from its own checkpoint and from one of a single process."""
    found: dict[str, Any] = {}
    for name in names:
        for micro_batch_size in (12 // world.size, 12 // world.size // 3):
            quick = [*QUIET, f"strategy={name}", f"train.micro_batch_size={micro_batch_size}"]
            cfg = tiny_config(folder, tokens, *quick)
            losses, state = _train_save_continue(world, cfg, folder / f"{name}-{micro_batch_size}")
            found[name, micro_batch_size] = losses
        found[name, "state"] = state if world.is_main else None
        for number, overrides in enumerate(ALTERNATIVES[name][1:]):
            other = tiny_config(folder, tokens, *quick, *overrides)
            found[name, -number] = run_steps(world, other, build(world, other), 1, 6)
        found[name, "resumed"] = run_steps(world, cfg, build(world, cfg, open_checkpoint(saved)), 4, 6)
        again = build(world, cfg, find(folder / f"{name}-{micro_batch_size}/step_00000003"))
        found[name, "again"] = run_steps(world, cfg, again, 4, 6)
        half = tiny_config(folder, tokens, *quick, "train.precision=bf16")
        found[name, "bf16"] = run_steps(world, half, build(world, half), 1, 3)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> tuple[Path, ExperimentConfig, list, dict]:
    """Folder with a checkpoint, config, six steps and last state of a single process."""
    folder = tmp_path_factory.mktemp("alone")
    cfg = tiny_config(folder, tokens, *QUIET, "strategy=single")
    return folder, cfg, *run_alone(_train_save_continue, cfg, folder / "single")


@pytest.mark.parametrize(("world_size", "names"), [(2, TWO_RANKS), pytest.param(4, ("hsdp",), marks=pytest.mark.long)])
def test_every_strategy_trains_saves_and_resumes_alike(
    tmp_path: Path, tokens: Path, alone: tuple, world_size: int, names: tuple[str, ...]
) -> None:
    folder, cfg, expected, state = alone
    found, *others = run_ranks(world_size, _strategies, tmp_path, tokens, folder / "single/step_00000003", names)
    for (name, what), value in found.items():
        if what == "state":
            assert set(value) == set(state)
            for key, tensor in state.items():
                # The gradient of k_norm.bias is zero but for rounding (it cancels in the softmax), which Adam blows up.
                if "k_norm.bias" not in key:
                    assert np.linalg.norm(value[key] - tensor) <= 1e-3 * np.linalg.norm(tensor) + 1e-7, (name, key)
        elif what == "bf16":
            assert np.array(value) == pytest.approx(np.array(expected[:3]), rel=2e-2), name
        else:
            part = expected if isinstance(what, int) else expected[3:]
            assert np.array(value) == pytest.approx(np.array(part), rel=1e-5), (name, what)
        assert what == "state" or all(other[name, what] == value for other in others)
    for name in names:
        # The same strategy, world and micro-batch: bitwise.
        assert found[name, "again"] == found[name, 12 // world_size // 3][3:], name
        # And back: what several ranks saved under each strategy, in one process.
        saved = find(tmp_path / f"{name}-{12 // world_size}/step_00000003")
        resumed = run_alone(lambda world, saved=saved: run_steps(world, cfg, build(world, cfg, saved), 4, 6))
        assert np.array(resumed) == pytest.approx(np.array(expected[3:]), rel=1e-5), name


def _skip_one(world: World, folder: Path, tokens: Path, names: tuple[str, ...]) -> dict[str, list[Any]]:
    """Per strategy and precision: the largest change that a skipped update makes, and the losses around it."""
    found = {}
    for name in names:
        for precision in ("fp32", "bf16"):
            cfg = tiny_config(
                folder, tokens, *QUIET, f"strategy={name}", f"train.precision={precision}", "train.micro_batch_size=3"
            )
            strategy = build(world, cfg)
            straight = run_steps(world, cfg, strategy, 1, 3)
            strategy = build(world, cfg)
            losses = run_steps(world, cfg, strategy, 1, 2)
            before = everything(strategy)
            run_steps(world, cfg, strategy, 7, 7, skip=True)
            after = everything(strategy)
            changed = max(np.abs(after[key] - before[key]).max() for key in before)
            found[name, precision] = [changed, losses + run_steps(world, cfg, strategy, 3, 3), straight]
    return found


def test_a_skipped_update_leaves_no_trace(tmp_path: Path, tokens: Path) -> None:
    for (name, precision), (changed, losses, straight) in run_ranks(2, _skip_one, tmp_path, tokens, TWO_RANKS)[
        0
    ].items():
        assert changed == 0, (name, precision)
        assert losses == straight, (name, precision)


def test_weight_decay_follows_the_published_rule(tmp_path: Path, tokens: Path) -> None:
    model = build_model(tiny_config(tmp_path, tokens))
    named = dict(model.named_parameters())
    with_decay = {name for name, weight in named.items() if decays(name, weight, "released")}
    assert {
        "cls_token",
        "lm_head.weight",
        "blocks.0.adaLN_modulation.1.weight",
        "encode_align_mlp.0.weight",
    } <= with_decay
    without = set(named) - with_decay
    assert {
        "pos_embed",
        "embeddings.weight",
        "timesteps_embeddings",
        "adaln_before_head.adaLN_modulation.1.weight",
    } <= without
    assert all(name in without for name in named if name.endswith("bias") or "norm" in name)


def test_decayed_weights_shrink_and_the_others_do_not(tmp_path: Path, tokens: Path) -> None:
    cfg = tiny_config(tmp_path, tokens, "strategy=single", "optim.weight_decay=0.5")

    def shrunk(world: World) -> tuple[float, float]:
        strategy = build(world, cfg)
        named = dict(strategy.model.named_parameters())
        rows = {"lm_head.weight": named["lm_head.weight"], "pos_embed": named["pos_embed"]}
        before = {name: weight.detach().clone() for name, weight in rows.items()}
        for weight in named.values():
            weight.grad = torch.zeros_like(weight)
        strategy.grad_norm()
        strategy.step(0.1)
        return tuple((rows[name].norm() / before[name].norm()).item() for name in rows)

    assert run_alone(shrunk) == pytest.approx((0.95, 1.0), rel=1e-6)


def _averages(world: World, folder: Path, tokens: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Per strategy: how far its averages are from those kept beside it, and the averages after saving and loading."""
    found = {}
    states = ("ema", "posthoc_ema_1")
    for name in names:
        cfg = tiny_config(folder, tokens, *QUIET, f"strategy={name}", "optim.ema_decay=0.7", "optim.posthoc_ema=[0.1]")
        strategy = build(world, cfg)
        expected = {
            f"{state}/{key}": value.cpu().clone() for state in states for key, value in strategy.tensors("param")
        }
        for step in (1, 2, 3):
            run_steps(world, cfg, strategy, step, step)
            for key, value in strategy.tensors("param"):
                expected[f"ema/{key}"].lerp_(value.cpu(), 0.3)
                # gamma of sigma_rel=0.1 (EDM2, Eq. 122)
                expected[f"posthoc_ema_1/{key}"].lerp_(value.cpu(), 1 - (1 - 1 / step) ** 7.937204)
        far = max(
            (value.cpu() - expected[f"{state}/{key}"]).abs().max().item()
            for state in states
            for key, value in strategy.tensors(state)
        )
        path = save(folder / name, 3, strategy, world, {"optimizer_step": 3, "config": {}}, CheckpointConfig())
        straight = run_steps(world, cfg, strategy, 4, 5)
        averages = {state: {key: value.cpu().clone() for key, value in strategy.tensors(state)} for state in states}
        resumed = build(world, cfg, open_checkpoint(path))
        same = run_steps(world, cfg, resumed, 4, 5) == straight
        for state in states:
            same &= all(torch.equal(value.cpu(), averages[state][key]) for key, value in resumed.tensors(state))
        found[name] = (far, same)
    return found


def test_averages_are_sharded_like_the_weights_and_resume(tmp_path: Path, tokens: Path) -> None:
    for name, (far, same) in run_ranks(2, _averages, tmp_path, tokens, TWO_RANKS)[0].items():
        assert far <= 1e-6, name
        assert same, name


def small_strategy(world: World, folder: Path, tokens: Path) -> Strategy:
    cfg = tiny_config(folder, tokens, "strategy=single")
    strategy = build(world, cfg)
    run_steps(world, cfg, strategy, 1, 1)
    return strategy


def test_the_newest_intact_checkpoint_is_found(tmp_path: Path, tokens: Path) -> None:
    root = tmp_path / "checkpoints"

    def scenario(world: World) -> None:
        strategy = small_strategy(world, tmp_path, tokens)
        assert newest_intact(root, world, print) is None
        for step in (1, 2, 3, 4):
            save(root, step, strategy, world, {"optimizer_step": step, "config": {}}, CheckpointConfig())
        assert sorted(path.name for path in root.iterdir()) == [
            "latest",
            "step_00000002",
            "step_00000003",
            "step_00000004",
        ]
        assert (root / "latest").read_text() == "step_00000004\n"
        # Half-written ones are no checkpoints, and the next start or save clears them.
        (root / "step_00000009.tmp").mkdir()
        assert newest_intact(root, world, print).step == 4
        reports: list[str] = []
        part = root / "step_00000004/part-00000.safetensors"
        data = bytearray(part.read_bytes())
        data[-5] ^= 1
        part.write_bytes(data)
        (root / "step_00000003/part-00000.safetensors").write_bytes(data[:-100])
        assert newest_intact(root, world, reports.append).step == 2
        assert "step_00000004 is damaged and skipped: part-00000.safetensors does not match" in reports[0]
        assert "step_00000003 is damaged" in reports[1]
        (root / "step_00000002/meta.json").unlink()
        assert newest_intact(root, world, reports.append) is None
        save(root, 4, strategy, world, {"optimizer_step": 4, "config": {}}, CheckpointConfig())
        assert newest_intact(root, world, print).step == 4
        (root / "step_00000003.old.tmp").mkdir()
        clear(root)
        assert sorted(path.name for path in root.iterdir() if "step" in path.name) == [
            "step_00000002.damaged",
            "step_00000003.damaged",
            "step_00000004",
            "step_00000004.damaged",
        ]

    run_alone(scenario)


def damage(folder: Path) -> None:
    file = folder / "part-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize(
    ("saved", "damaged", "keep_last", "written", "kept"),
    [
        ([8, 10], [10], 1, [9], [8, 9]),  # the one that was resumed from stays, and the one just written
        ([8, 10, 12], [10, 12], 2, [9, 10, 11], [8, 10, 11]),
        ([4, 6, 8], [6], 3, [9, 10], [8, 9, 10]),  # damaged, and older than the one that was resumed from
        ([4, 6, 8], [4, 6], 3, [9], [8, 9]),
        ([4, 5, 6, 8], [5, 6], 3, [9], [4, 8, 9]),
        ([2], [2], 1, [1, 2], [2]),
    ],
)
def test_damaged_checkpoints_count_for_nothing(
    tmp_path: Path,
    tokens: Path,
    saved: list[int],
    damaged: list[int],
    keep_last: int,
    written: list[int],
    kept: list[int],
) -> None:
    root = tmp_path / "checkpoints"

    def scenario(world: World) -> None:
        strategy = small_strategy(world, tmp_path, tokens)
        for step in saved:
            save(root, step, strategy, world, {"optimizer_step": step, "config": {}}, CheckpointConfig(keep_last=9))
        for step in damaged:
            damage(root / f"step_{step:08d}")
        resumed = newest_intact(root, world, print)
        writer = Writer(root, world, CheckpointConfig(keep_last=keep_last), resumed)
        for step in written:
            assert writer.begin(step, strategy, {"optimizer_step": step, "config": {}}) is None
            assert writer.finish()[1] is None
            assert newest_intact(root, world, pytest.fail).step == step
        assert last_step(tmp_path) == written[-1]

    run_alone(scenario)
    names = {path.name for path in root.iterdir()}
    assert sorted(int(name[5:]) for name in names if name[5:].isdecimal()) == kept
    assert {name for name in names if name.endswith(".damaged")} == {f"step_{step:08d}.damaged" for step in damaged}


@pytest.mark.parametrize("error", [MemoryError("no room"), ValueError("x"), OSError(errno.EDQUOT, "Quota exceeded")])
@pytest.mark.parametrize("part", ["save_tensors", "write_text_atomically", "publish_folder"])
def test_whatever_stops_a_checkpoint_training_goes_on(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, part: str
) -> None:
    def stop(*arguments: object) -> None:
        raise error

    def scenario(world: World) -> None:
        strategy = small_strategy(world, tmp_path, tokens)
        writer = Writer(tmp_path / "checkpoints", world, CheckpointConfig())
        monkeypatch.setattr(writer_module, part, stop)
        assert writer.begin(1, strategy, {"optimizer_step": 1, "config": {}}) is None
        path, problem = writer.finish()
        assert path is None
        assert problem.startswith("rank 0: ")
        assert str(error) in problem
        assert not list((tmp_path / "checkpoints").iterdir())
        monkeypatch.undo()
        assert writer.begin(2, strategy, {"optimizer_step": 2, "config": {}}) is None
        assert writer.finish()[1] is None

    run_alone(scenario)


@pytest.mark.parametrize(
    ("saved", "damaged", "keep_last", "kept"),
    [
        ([2, 4, 6, 8], [], 2, [6, 8]),  # killed before any was removed
        ([6, 8], [], 2, [6, 8]),
        ([4, 6, 8], [6], 2, [4, 8]),
        ([6, 8], [], 3, [6, 8]),
        ([4, 6, 8], [], 1, [8]),
    ],
)
@pytest.mark.parametrize("latest", [None, "step_00000002\n", "step_00000008\n"])
def test_a_complete_run_is_put_in_order_after_a_kill(
    tmp_path: Path,
    tokens: Path,
    saved: list[int],
    damaged: list[int],
    keep_last: int,
    kept: list[int],
    latest: str | None,
) -> None:
    root = tmp_path / "checkpoints"

    def scenario(world: World) -> None:
        strategy = small_strategy(world, tmp_path, tokens)
        for step in saved:
            meta = {"optimizer_step": step, "config": {}}
            save(root, step, strategy, world, meta, CheckpointConfig(keep_last=9))
        for step in damaged:
            damage(root / f"step_{step:08d}")
        found = newest_intact(root, world, pytest.fail)
        (root / "latest").unlink() if latest is None else (root / "latest").write_text(latest)
        Writer(root, world, CheckpointConfig(keep_last=keep_last), found).settle()

    run_alone(scenario)
    assert sorted(int(path.name[5:]) for path in root.glob("step_????????")) == kept
    assert (root / "latest").read_text() == "step_00000008\n"


def test_what_goes_wrong_once_a_checkpoint_is_visible_does_not_undo_it(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "checkpoints"
    real = writer_module.write_text_atomically

    def full(path: Path, text: str) -> None:
        if path.name == "latest":
            raise OSError(errno.EDQUOT, "Disk quota exceeded", str(path))
        real(path, text)

    def scenario(world: World) -> None:
        monkeypatch.setattr(writer_module, "write_text_atomically", full)
        meta = {"optimizer_step": 3, "config": {}}
        save(root, 3, small_strategy(world, tmp_path, tokens), world, meta, CheckpointConfig())
        assert newest_intact(root, world, pytest.fail).step == 3

    run_alone(scenario)
    said = capsys.readouterr().err
    assert f"{root / 'step_00000003'} is written, but `latest` or older checkpoints could not be updated: " in said
    assert "Disk quota exceeded" in said


def test_every_nth_checkpoint_stays(tmp_path: Path, tokens: Path) -> None:
    def scenario(world: World) -> None:
        strategy = small_strategy(world, tmp_path, tokens)
        for step in range(1, 8):
            config = CheckpointConfig(keep_last=2, keep_every=3)
            save(tmp_path / "checkpoints", step, strategy, world, {"optimizer_step": step, "config": {}}, config)

    run_alone(scenario)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert kept == ["step_00000003", "step_00000006", "step_00000007"]


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is the state at `begin`, and nothing is visible before `finish`."""
    may_write = threading.Event()
    write = writer_module.save_tensors

    def slowly(*arguments: Any) -> None:
        assert may_write.wait(300)
        write(*arguments)

    monkeypatch.setattr(writer_module, "save_tensors", slowly)

    def scenario(world: World) -> None:
        strategy = small_strategy(world, tmp_path, tokens)
        before = everything(strategy)
        writer = Writer(tmp_path / "checkpoints", world, CheckpointConfig())
        assert writer.begin(1, strategy, {"optimizer_step": 1, "config": {}}) is None
        run_steps(world, strategy.cfg, strategy, 2, 3)
        assert writer.state == Writer.WRITING
        assert newest_intact(tmp_path / "checkpoints", world, print) is None
        may_write.set()
        path, problem = writer.finish()
        assert problem is None
        found = open_checkpoint(path)
        for key, value in before.items():
            kind, name = key.split("/", 1)
            assert np.array_equal(found.reader(kind)(name).numpy(), value), key

    run_alone(scenario)


def test_a_part_that_reads_back_wrong_is_no_checkpoint(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = writer_module.save_tensors

    def damaged(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        write(path, tensors)
        data = bytearray(path.read_bytes())
        data[-3] ^= 4
        path.write_bytes(data)

    def scenario(world: World) -> None:
        strategy = small_strategy(world, tmp_path, tokens)
        save(tmp_path / "checkpoints", 1, strategy, world, {"optimizer_step": 1, "config": {}}, CheckpointConfig())
        monkeypatch.setattr(writer_module, "save_tensors", damaged)
        with pytest.raises(
            OSError, match="the checkpoint of step 2 was not written: rank 0: .*reads back with other content"
        ):
            save(tmp_path / "checkpoints", 2, strategy, world, {"optimizer_step": 2, "config": {}}, CheckpointConfig())

    run_alone(scenario)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000001"]


def test_a_full_disk_is_named_and_older_checkpoints_stay(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "checkpoints"

    def scenario(world: World) -> None:
        strategy = small_strategy(world, tmp_path, tokens)
        save(root, 1, strategy, world, {"optimizer_step": 1, "config": {}}, CheckpointConfig())
        writer = Writer(root, world, CheckpointConfig())
        usage = shutil.disk_usage(root)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        assert "has 0.0 MiB free, but a checkpoint takes " in writer.begin(
            2, strategy, {"optimizer_step": 2, "config": {}}
        )
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

        def full(*arguments: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(writer_module, "save_tensors", full)
        assert writer.begin(2, strategy, {"optimizer_step": 2, "config": {}}) is None
        path, problem = writer.finish()
        assert path is None
        assert "part-00000.safetensors: [Errno 28] No space left on device" in problem
        assert sorted(item.name for item in root.iterdir()) == ["latest", "step_00000001"]

    run_alone(scenario)


def test_a_checkpoint_holds_every_weight_and_moment_in_float32(tmp_path: Path, tokens: Path) -> None:
    def scenario(world: World) -> None:
        strategy = small_strategy(world, tmp_path, tokens)
        path = save(
            tmp_path / "checkpoints", 1, strategy, world, {"optimizer_step": 1, "config": {}}, CheckpointConfig()
        )
        found = find(tmp_path)
        assert found.path == path
        assert found.names() == [name for name, _ in strategy.model.named_parameters()]
        for kind in strategy.state_names:
            read = found.reader(kind)
            for name, tensor in strategy.tensors(kind):
                assert read(name).dtype == torch.float32
                assert torch.equal(read(name), tensor)
        with pytest.raises(InputError, match="has no param/blocks.7.norm1.weight"):
            found.reader("param")("blocks.7.norm1.weight")

    run_alone(scenario)


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no checkpoints"):
        find(tmp_path)
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        find(tmp_path)
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(InputError, match="has format None"):
        find(tmp_path)


def _in_bf16(world: World, cfg: ExperimentConfig) -> tuple[bool, float]:
    """Whether fsdp2 gives the bits of the same model in bfloat16, and the largest difference to it with float32 weights."""
    strategy = build(world, cfg)
    plain = [build_model(cfg) for _ in range(2)]
    for model in plain:
        model.init_weights(0)
        model.set_codebook(codebook_of(cfg))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "adaLN" in name:
                    weight.fill_(0.01)
    plain[0].bfloat16()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, cfg.tokenizer.codebook_size, (3, cfg.tokenizer.num_tokens), generator=generator)
    logits = []
    with torch.no_grad():
        for model in (strategy.engine, *plain):
            logits.append(model.eval()(tokens, torch.arange(3), None)["logits"].float())
    sharded, rounded, exact = logits
    return torch.equal(sharded, rounded), (sharded - exact).abs().max().item()


@pytest.mark.parametrize(
    "overrides",
    [
        (
            "model.architecture=alitok",
            "tokenizer.num_tokens=21",
            "tokenizer.grid=[4,4]",
            "tokenizer.prefix_tokens=5",
            "model.width=64",
        ),
        (
            "model.architecture=alitok",
            "tokenizer.num_tokens=21",
            "tokenizer.grid=[4,4]",
            "tokenizer.prefix_tokens=5",
            "strategy.reshard_after_forward=false",
        ),
        ("objective.heads.form=released", "objective.heads.positions=all"),
        ("model.conditioning=in_context", "train.activation_checkpointing=full"),
        ("model.tie_codebook=both",),
    ],
    ids=lambda overrides: overrides[-1],
)
def test_fsdp2_in_bf16_computes_as_the_model_in_bf16(tmp_path: Path, tokens: Path, overrides: tuple[str, ...]) -> None:
    """AliTok's rotary table is no weight and stays in float32, as it does under autocast and DeepSpeed."""
    cfg = tiny_config(tmp_path, tokens, *QUIET, "strategy=fsdp2", "train.precision=bf16", *overrides)
    for same, difference in run_ranks(2, _in_bf16, cfg):
        assert same
        assert difference < 0.01


def _tied(world: World, folder: Path, tokens: Path, names: tuple[str, ...]) -> dict[tuple[str, str], list]:
    """Losses and gradient norms of a tied model by strategy and precision."""
    found = {}
    for name in names:
        for precision in ("fp32", "bf16"):
            overrides = (f"strategy={name}", f"train.precision={precision}", "model.tie_codebook=both")
            cfg = tiny_config(folder, tokens, *QUIET, f"train.micro_batch_size={12 // world.size}", *overrides)
            found[name, precision] = run_steps(world, cfg, build(world, cfg), 1, 2)
    return found


def test_a_tied_codebook_trains_alike_on_one_rank_and_on_two(tmp_path: Path, tokens: Path) -> None:
    """No engine casts the codebook otherwise than the weights, or shards it."""
    alone = run_alone(_tied, tmp_path, tokens, ("single",))
    for (name, precision), results in run_ranks(2, _tied, tmp_path, tokens, TWO_RANKS)[0].items():
        bound = 1e-5 if precision == "fp32" else 1e-2
        assert np.array(results) == pytest.approx(np.array(alone["single", precision]), rel=bound), (name, precision)
