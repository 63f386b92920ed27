"""The library: what it computes is what the commands compute."""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import CODEBOOK_DIM, CODEBOOK_SIZE, NUM_CLASSES, NUM_TOKENS, run_alone, tiny_config
from notebook import NOTEBOOK, execute
from PIL import Image
from safetensors.torch import load_file, save_file
from test_evaluate import _Small, some_images
from test_evaluate import evaluation as evaluation_config
from test_sample import _sample, prepared

import rear_scale
from rear_scale import api, config
from rear_scale.checkpoint.convert import convert
from rear_scale.checkpoint.open import open_with_config
from rear_scale.checkpoint.restore import load_weights
from rear_scale.evaluate import job as evaluation
from rear_scale.evaluate.images.image_set import open_image_set
from rear_scale.evaluate.networks.classifier import Classifier
from rear_scale.model import build_model
from rear_scale.objective import Objective
from rear_scale.objective.prediction import held_out_task
from rear_scale.shards.codebook import codebook_of, read_checked
from rear_scale.shards.images import write_images
from rear_scale.tokenizer.base import to_unit_range
from rear_scale.tokenizer.compact import CompactTokenizer
from rear_scale.world import SingleProcess, World

CLASSES = [3, 1, 1, 0, 4, 2, 3]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    """A run of a few steps, with the weights of its tokenizer beside it."""
    folder = tmp_path_factory.mktemp("library")
    torch.manual_seed(0)
    tokenizer = CompactTokenizer(16, CODEBOOK_SIZE, CODEBOOK_DIM, 16)
    tokenizer.codes.normal_()
    with torch.no_grad():
        # Latents as far apart as the codes are, and pixels of all levels.
        tokenizer.encoder[-1].weight.mul_(100)
        tokenizer.decoder[-1].weight.mul_(10)
    tokenizer.save(folder / "weights")
    images = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), np.uint8)
    labelled = ((Image.fromarray(image), number % NUM_CLASSES) for number, image in enumerate(images))
    write_images(folder / "images", labelled, 16, [str(number) for number in range(NUM_CLASSES)])
    Classifier(16, NUM_CLASSES).save(folder / "classifier")
    judge = f"evaluate.classifier={{weights: {folder / 'classifier'}, images: {folder / 'images'}}}"
    reference = f"evaluate.reference={{photographs: {folder / 'images'}}}"
    prepared(folder, tokens, "train.total_steps=4", judge, reference)
    return folder / "run"


@pytest.fixture(scope="module")
def model(run: Path) -> rear_scale.Model:
    return rear_scale.load(run)


def random_tokens(count: int) -> torch.Tensor:
    return torch.randint(CODEBOOK_SIZE, (count, NUM_TOKENS), generator=torch.Generator().manual_seed(0))


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, rear_scale; assert rear_scale.__version__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert {*rear_scale.__all__} - {"__version__"} == {*api.__all__}
    assert all(getattr(rear_scale, name) for name in rear_scale.__all__)
    assert {*rear_scale.__all__} <= {*dir(rear_scale)}
    with pytest.raises(AttributeError, match="no attribute 'sampel'"):
        rear_scale.sampel  # noqa: B018


@pytest.mark.parametrize(
    ("seed", "overrides"),
    [
        (0, []),
        (
            5,
            [
                "sample.guidance.schedule=power_cosine",
                "sample.guidance.scale=6",
                "sample.guidance.power=1.5",
                "sample.batch_size=7",
                "sample.uint8_rounding=nearest",
            ],
        ),
    ],
)
def test_samples_are_those_of_the_command(
    run: Path, model: rear_scale.Model, tmp_path: Path, seed: int, overrides: list[str]
) -> None:
    given = [*overrides, f"sample.labels={CLASSES}", f"sample.num_images={len(CLASSES)}", f"sample.seed={seed}"]
    checkpoint, cfg = open_with_config(run, None, given)
    run_alone(_sample, cfg, checkpoint, tmp_path / "samples.npz")
    expected = np.load(tmp_path / "samples.npz")
    assert expected["label"].tolist() == CLASSES
    assert not dist.is_initialized()
    images = model.sample(CLASSES, seed, overrides)
    assert (images.dtype, images.shape) == (np.uint8, (7, 16, 16, 3))
    assert images.tobytes() == expected["arr_0"].tobytes()
    tokens = model.sample_tokens(torch.tensor(CLASSES), seed, overrides)
    assert tokens.dtype == torch.int64
    assert np.array_equal(tokens, np.load(tmp_path / "samples.tokens.npy"))
    if overrides:
        for other in ((seed, overrides[3:]), (seed + 1, overrides)):
            assert not np.array_equal(model.sample_tokens(CLASSES, *other), tokens)


def test_the_notebook_runs_and_its_samples_are_those_of_the_command(run: Path, tmp_path: Path) -> None:
    printed = execute(run, tmp_path)
    given = ["sample.labels=[0,1,2,3,4,0,1,2]", "sample.num_images=8", "sample.seed=0", "sample.batch_size=8"]
    checkpoint, cfg = open_with_config(run, None, given)
    run_alone(_sample, cfg, checkpoint, tmp_path / "samples.npz")
    images = np.load(tmp_path / "samples.npz")["arr_0"]
    assert hashlib.sha256(images.tobytes()).hexdigest() in printed["Sample"]
    assert "nearest_distance" in printed["Scores"]
    assert "class_accuracy" in printed["Scores"]


def test_the_notebook_is_stored_without_results() -> None:
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert cell.cell_type == "markdown" or (cell.outputs, cell.execution_count) == ([], None)


def test_tokens_become_images_and_back(run: Path, model: rear_scale.Model) -> None:
    tokenizer = CompactTokenizer.from_file(str(run.parent / "weights")).eval()
    tokens = random_tokens(3)
    images = model.decode(tokens)
    with torch.no_grad():
        pixels = tokenizer.decode(tokens)
        assert np.array_equal(images, (pixels * 255).to(torch.uint8).permute(0, 2, 3, 1))
        photographs = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
        expected = tokenizer.encode(to_unit_range(torch.from_numpy(photographs)))
    assert len(np.unique(images)) > 50
    assert len(expected.unique()) > 3
    for given in (photographs, torch.from_numpy(photographs), np.asfortranarray(photographs)):
        assert torch.equal(model.encode(given), expected)
    assert np.array_equal(model.decode(tokens.tolist()), images)
    assert np.array_equal(model.decode(model.encode(photographs)), model.decode(expected))


def test_a_model_can_be_trained_further(run: Path, model: rear_scale.Model) -> None:
    own = rear_scale.load(run)
    own.model.requires_grad_(True)
    before = own.sample_tokens(CLASSES)
    own.model.train()
    assert torch.equal(own.sample_tokens(CLASSES), before)  # without dropout
    assert own.model.training
    assert own.model.blocks[0].training
    optimizer = torch.optim.AdamW(own.model.parameters(), lr=1e-2)
    tokens, losses = random_tokens(7), []
    for step in range(1, 9):
        terms = own.loss(tokens, CLASSES, step=step)
        assert not terms["loss_ar"].requires_grad
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append(terms["loss"].item())
    assert losses[-1] < 0.9 * losses[0]
    assert not torch.equal(own.sample_tokens(CLASSES), before)
    assert torch.equal(model.sample_tokens(CLASSES), before)  # another model of the same process
    assert torch.equal(
        own.model.eval()(tokens, torch.tensor(CLASSES))["logits"],
        own.model(tokens, torch.tensor(CLASSES), None)["logits"],
    )


def test_losses_are_those_of_the_objective_on_the_same_draws(run: Path, model: rear_scale.Model) -> None:
    checkpoint, cfg = open_with_config(run, None, [])
    trained = build_model(cfg).eval()
    load_weights(checkpoint, trained)
    plan = config.derive(cfg, 1, 100)
    objective = Objective(cfg, plan, codebook_of(cfg, read_checked(cfg, cfg.data.train)), torch.device("cpu"))
    tokens, labels = random_tokens(7), torch.tensor(CLASSES)
    ids, epochs = torch.arange(7) + 40, torch.full((7,), 2)
    batch = objective.micro_batch(tokens, labels, ids, epochs)
    tasks = {None: held_out_task(tokens, ids, None, None), 2: objective.task(batch, 2)}
    assert not torch.equal(tasks[2].context, tokens)
    for step, task in tasks.items():
        classes, rows = (labels, None) if step is None else (batch.classes, batch.class_index)
        with torch.no_grad():
            _, statistics = objective.loss(trained(task.context, classes, rows, task.order), task)
        found = model.loss(tokens, CLASSES, step=step, ids=ids, epoch=2)
        assert found == dict(zip(objective.names, statistics.tolist(), strict=True))
        assert {"loss", "loss_ar", "loss_encode", "loss_decode", "accuracy"} == found.keys()
    assert model.loss(tokens, CLASSES, step=2) != model.loss(tokens, CLASSES, step=2, ids=ids, epoch=2)


def test_weight_files_make_the_same_model_without_the_heads_that_they_lack(
    run: Path, model: rear_scale.Model, tmp_path: Path
) -> None:
    convert(run, None, [], "consolidated", tmp_path / "whole.safetensors")
    weights = load_file(tmp_path / "whole.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "align_mlp" not in name}, tmp_path / "bare.safetensors"
    )
    whole = rear_scale.load(str(tmp_path / "whole.safetensors"), device="cpu")
    bare = rear_scale.load(tmp_path / "bare.safetensors", config=str(run.parent / "tiny.yaml"))
    tokens = random_tokens(7)
    expected = model.loss(tokens, CLASSES)
    assert whole.loss(tokens, CLASSES) == expected
    assert (whole.step, bare.step) == (4, 0)
    found = bare.loss(tokens, CLASSES)
    assert found == {"loss": expected["loss_ar"], "loss_ar": expected["loss_ar"], "accuracy": expected["accuracy"]}
    assert isinstance(bare.model, torch.nn.Module)
    assert isinstance(bare.config, config.ExperimentConfig)
    with pytest.raises(rear_scale.InputError, match=r"loaded without tokenizer weights.*tokenizer=FILE"):
        bare.decode(tokens)


def test_heads_need_the_codebook_of_the_shards_or_the_tokenizer(run: Path, tmp_path: Path) -> None:
    moved = [f"data.train={tmp_path}"]
    alone = rear_scale.load(run, overrides=[*moved, "tokenizer.weights=null"])
    with pytest.raises(rear_scale.InputError, match=r"compares heads with the codebook.*tokenizer=FILE, or overrides="):
        alone.loss(random_tokens(7), CLASSES)
    with_tokenizer = rear_scale.load(run, run.parent / "weights", overrides=moved)
    assert with_tokenizer.loss(random_tokens(7), CLASSES).keys() >= {"loss_encode", "loss_decode"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.sample([]), r"classes are float64 \[0\], but whole numbers of shape \[n\] are wanted"),
        (lambda m: m.sample([0, NUM_CLASSES]), r"classes hold 5, but .*run/checkpoints/step_00000004 has the classes 0 \.\. 4"),
        (lambda m: m.sample([0.5]), r"classes are float64 \[1\]"),
        (lambda m: m.sample(3), r"classes are int64 \[\], but whole numbers of shape \[n\]"),
        (lambda m: m.sample([0], seed=1.5), r"seed=1\.5 is not a whole number"),
        (lambda m: m.sample([0], overrides="sample.top_k=1"), r"is one text\. Give a list of them: overrides=\['sample"),
        (lambda m: m.sample([0], overrides=["sample.also_write=png"]), r"sample\.also_write=png: sample writes no files"),
        (lambda m: m.sample([0], overrides=["sample.labels=[1]"]), r"override sample\.labels=\[1\]: sample takes settings"),
        (lambda m: m.sample([0], overrides=["optim.lr=1"]), r"override optim\.lr=1: sample takes settings"),
        (lambda m: m.sample([0], seed=-1), r"sample\.seed=-1 must lie between"),
        (lambda m: m.sample([0], overrides=["sample.temperature=0"]), r"sample\.temperature=0"),
        (lambda m: m.encode(np.zeros((1, 16, 16, 3), np.float32)), r"images are float32 \[1, 16, 16, 3\], but uint8"),
        (lambda m: m.encode(np.zeros((16, 16, 3), np.uint8)), r"images are uint8 \[16, 16, 3\], but uint8 \[n, height"),
        (lambda m: m.encode(np.zeros((1, 8, 16, 3), np.uint8)), r"compact takes \[n, 16, 16, 3\]"),
        (lambda m: m.encode([np.zeros((16, 16, 3)), np.zeros((8, 16, 3))]), r"images cannot be read as an array"),
        (lambda m: m.encode(torch.zeros(1, 16, 16, 3, dtype=torch.bfloat16)), r"images cannot be read as an array \(Got unsupp"),
        (lambda m: m.decode([[0] * 15]), r"tokens are \[1, 15\] of ids 0 \.\. 0, but compact has \[n, 16\] of 0 \.\. 31"),
        (lambda m: m.decode([[32] * 16]), r"of ids 32 \.\. 32"),
        (lambda m: m.decode([[0], [0, 1]]), r"tokens cannot be read as an array \(.*, but whole numbers of shape \[n, N\]"),
        (lambda m: m.loss(random_tokens(2), [0]), r"classes has 1 entries, but there are 2 sequences"),
        (lambda m: m.loss(random_tokens(1), [0], step=0), r"step=0 is below 1"),
        (lambda m: m.loss(random_tokens(1), [0], step=1.5), r"step=1\.5 is not a whole number"),
        (lambda m: m.loss(random_tokens(1), [0], epoch="a"), r"epoch='a' is not a whole number"),
        (lambda m: m.loss(random_tokens(1), [0], ids=[-1]), r"ids and epoch must lie in 0 \.\. 2\^32 - 1"),
        (lambda m: rear_scale.load("nowhere"), r"^not found: nowhere\. Name a run folder"),
        (lambda m: rear_scale.load(m.path, tokenizer="gone.bin"), r"gone\.bin"),
        (lambda m: rear_scale.load(m.path, device="cuda"), r"device=cuda, but torch .* finds no GPU.*device='cpu'"),
        (lambda m: rear_scale.load(m.path, device="tpu:0"), r"device=tpu:0 is not a device"),
        (lambda m: rear_scale.load(m.path, device="meta"), r"device=meta is not supported"),
        (lambda m: rear_scale.load(m.path, device=[]), r"device=\[\] is not a device"),
        (lambda m: rear_scale.load(m.path, overrides="a.b=1"), r"overrides='a\.b=1' is one text"),
        (lambda m: rear_scale.load(m.path, config="rear_b.yaml"), r"config=rear_b\.yaml, but .* brings the config of its"),
        (lambda m: rear_scale.load(m.path, overrides=["model.depth=3"]), r"model\.depth=3, but .* was trained with"),
        (lambda m: rear_scale.evaluate(np.zeros((2, 8, 8), np.uint8), "b.npz"), r"no feature network is set"),
        (lambda m: rear_scale.evaluate("a.npz", "b.npz", overrides=["sample.seed=1"]), r"override sample\.seed=1"),
        (lambda m: rear_scale.evaluate("a.npz", "b.npz", overrides=["evaluate.reference.x=1"]), r"it is an argument of"),
        (lambda m: rear_scale.evaluate("a.npz", some_images(2, 0)), r"reference is of type ndarray, but a path is wanted"),
        (lambda m: rear_scale.evaluate("a.npz", {"x": None}), r"reference is of type NoneType"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(
    model: rear_scale.Model, call: Callable[[rear_scale.Model], Any], message: str
) -> None:
    with pytest.raises(rear_scale.InputError) as caught:
        call(model)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def settings() -> dict[str, Any]:
    """What a call could leave changed in its process."""
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "products": torch.get_float32_matmul_precision(),
        "attention": torch.backends.cuda.cudnn_sdp_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic),
        "random": (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "environment": dict(os.environ),
        "signals": signal.getsignal(signal.SIGINT),
        "group": dist.is_initialized(),
    }


@contextmanager
def unusual_settings() -> Iterator[None]:
    """Settings of a program that are all other than those of a command."""
    with ExitStack() as stack:
        for read, write, value in (
            (torch.get_num_threads, torch.set_num_threads, 3),
            (torch.get_default_dtype, torch.set_default_dtype, torch.float64),
            (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
            (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 1),
        ):
            stack.callback(write, read())
            write(value)
        stack.enter_context(torch.device("meta"))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        yield


def test_settings_of_the_program_change_no_result_and_come_back(
    run: Path, model: rear_scale.Model, tmp_path: Path
) -> None:
    cfg = evaluation_config(tmp_path).evaluate
    photographs = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    tokens = model.encode(photographs)

    def score(name: str) -> dict[str, Any]:
        # A classifier of its own for each name, which the call trains.
        trained = f"{{weights: {tmp_path / name}, images: {cfg.classifier.images}, steps: 2}}"
        overrides = [f"evaluate.classifier={trained}"]
        images, against = some_images(30, 3), cfg.reference["validation"]
        return rear_scale.evaluate(images, against, classes=[0] * 30, overrides=overrides).to_json()["samples"]

    calls: list[Callable[[rear_scale.Model, str], object]] = [
        lambda m, name: m.sample(CLASSES, overrides=["sample.top_p=0.9"]).tobytes(),
        lambda m, name: m.decode(tokens).tobytes(),
        lambda m, name: m.encode(photographs).tolist(),
        lambda m, name: score(name),
    ]
    expected = [call(model, "usual") for call in calls]
    losses = model.loss(tokens, [0, 1, 2], step=2)
    with unusual_settings():
        before = settings()
        with torch.inference_mode():
            loaded = rear_scale.load(run, tokenizer=run.parent / "weights")
        assert settings() == before
        for call, result in zip(calls, expected, strict=True):
            assert call(loaded, "unusual") == result
            assert settings() == before
        # The loss computes as its program does, but with tensors where they belong.
        with torch.autocast("cpu", enabled=False):
            assert loaded.loss(tokens, [0, 1, 2], step=2)["loss"].item() == pytest.approx(
                losses["loss"].item(), rel=1e-5
            )
    assert not loaded.model.blocks[0].attn.proj.weight.is_inference()
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.float32}


def test_an_interrupted_call_leaves_everything_as_it_was(
    model: rear_scale.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, expected = settings(), model.sample(CLASSES)

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(api, "decode_images", interrupted)
        model.sample(CLASSES)
    assert settings() == before
    assert np.array_equal(model.sample(CLASSES), expected)


def test_threads_of_a_program_may_share_models(run: Path, model: rear_scale.Model) -> None:
    other = rear_scale.load(run, overrides=["sample.temperature=0.5"])
    calls = [(own, seed) for seed in range(2) for own in (model, other)]
    expected = [own.sample(CLASSES, seed) for own, seed in calls]
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda call: call[0].sample(CLASSES, call[1]), calls))
    assert np.array_equal(found, expected)
    assert len({images.tobytes() for images in expected}) == 4
    assert torch.get_num_threads() == threads


def test_large_sets_pass_the_tokenizer_in_batches(run: Path, model: rear_scale.Model) -> None:
    small = rear_scale.load(run, overrides=["pretokenize.batch_size=2", "sample.batch_size=3"])
    tokens, sizes = random_tokens(7), []
    for name in ("encode", "decode"):
        plain = getattr(small.tokenizer, name)
        setattr(small.tokenizer, name, lambda batch, plain=plain: (sizes.append(len(batch)), plain(batch))[1])
    images = small.decode(tokens)
    assert np.array_equal(images, model.decode(tokens))
    assert torch.equal(small.encode(images), model.encode(images))
    assert sizes == [3, 3, 1, 2, 2, 2, 1]


def test_a_tied_model_takes_the_codebook_of_its_shards_or_of_its_tokenizer(tmp_path: Path, tokens: Path) -> None:
    tokenizer = CompactTokenizer(16, CODEBOOK_SIZE, CODEBOOK_DIM, 16)
    tokenizer.codes.copy_(torch.from_numpy(np.load(tokens / "codebook.npy")))
    tokenizer.save(tmp_path / "weights")
    cfg = tiny_config(tmp_path, tokens, "model.tie_codebook=both", "train.precision=bf16")
    tied = build_model(cfg, with_heads=False)
    tied.init_weights(0)
    torch.save(tied.state_dict(), tmp_path / "tied.bin")
    (tmp_path / "tied.yaml").write_text(config.to_yaml(cfg))

    def load(tokenizer: str | None, *overrides: str) -> rear_scale.Model:
        return rear_scale.load(
            tmp_path / "tied.bin", tokenizer, overrides=overrides, config=str(tmp_path / "tied.yaml")
        )

    expected = load(None).sample_tokens(CLASSES)
    elsewhere = f"data.train={tmp_path / 'elsewhere'}"
    alone = load(str(tmp_path / "weights"), elsewhere)
    assert torch.equal(alone.sample_tokens(CLASSES), expected)
    assert alone.model(random_tokens(1), torch.tensor([0]))["logits"].dtype == torch.bfloat16
    assert alone.loss(random_tokens(1), [0])["loss"].dtype == torch.float32
    with pytest.raises(
        rear_scale.InputError, match=r"has model\.tie_codebook=both, but .*tokenizer=FILE, or overrides="
    ):
        load(None, elsewhere)


def test_scores_are_those_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "open_networks", lambda cfg, world: [_Small()])
    images, weights = some_images(30, 3), tmp_path / "inception"
    weights.touch()
    np.savez(tmp_path / "samples.npz", arr_0=images)
    np.savez(tmp_path / "plain.npz", arr_0=some_images(40, 2))
    reference, options = tmp_path / "plain.npz", ["evaluate.bootstrap=4"]
    named = [f"evaluate.reference.plain={reference}", f"evaluate.inception_weights={weights}", *options]
    cfg = config.load("evaluate.yaml", named)

    def score(world: World) -> dict[str, Any]:
        images = open_image_set(tmp_path / "samples.npz", world)
        return evaluation.Evaluation(cfg, tmp_path / "features", world).score(images).to_json()

    expected = run_alone(score)
    for given, against in ((images, reference), (str(tmp_path / "samples.npz"), {"plain": reference})):
        found = rear_scale.evaluate(given, against, inception=weights, overrides=options)
        assert isinstance(found, rear_scale.ImageScores)
        assert found.to_json() == expected
    assert found.networks["inception"].references["plain"]["fid"] > 0
    counted = rear_scale.evaluate(images, reference, inception=weights, classes=[0] * 20 + [1] * 10)
    assert counted.labels is not None
    assert counted.labels["counts"] == {"0": 20, "1": 10}
    for given, wrong, message in (
        (images, [0], "classes has 1 entries, but there are 30 images"),
        (tmp_path / "samples.npz", [0], "files bring their own"),
    ):
        with pytest.raises(rear_scale.InputError, match=message):
            rear_scale.evaluate(given, reference, inception=weights, classes=wrong)
    with pytest.raises(rear_scale.InputError, match=r"images are uint8 \[30, 12, 12\], but uint8 \[n, height"):
        rear_scale.evaluate(images[..., 0], reference, inception=weights)
    # Before anything of the package is imported, the name leads to the function itself.
    assert rear_scale.__getattr__("evaluate") is api.evaluate


def test_a_single_process_is_a_world_of_one_rank() -> None:
    def answers(world: World) -> list[Any]:
        world.barrier()
        return [
            (world.rank, world.size, world.is_main, world.device),
            world.sum([1.0, 2.5]).tolist(),
            world.table([1, 2], [torch.tensor(0.5)]).tolist(),
            world.gather({"a": 1}),
            [world.add("images", 3), world.add("images"), world.add("turn")],
            world.from_main("text"),
            world.on_main(lambda: 7),
        ]

    assert answers(SingleProcess()) == run_alone(answers)
