from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import NUM_CLASSES, find, run_alone, run_ranks, tiny_config
from PIL import Image
from scipy.stats import chisquare

from rear_scale import files as atomic_files
from rear_scale.checkpoint.convert import convert
from rear_scale.checkpoint.folder import Checkpoint
from rear_scale.checkpoint.open import open_source
from rear_scale.config import ExperimentConfig, GuidanceConfig, InputError, SampleConfig, load
from rear_scale.files import file_sha256
from rear_scale.model import Generator, build_model
from rear_scale.sample import job
from rear_scale.sample.batch import Batch
from rear_scale.sample.decode import NEAR_TIE, CachedDecoding, Decoder, top_k_top_p
from rear_scale.sample.grid import contact_sheet
from rear_scale.sample.guidance import guidance_scale
from rear_scale.shards.record import read_manifest, write_manifest
from rear_scale.tokenizer.compact import CompactTokenizer
from rear_scale.train import setup
from rear_scale.train.loop import Hooks, train
from rear_scale.world import World, discover, locked

POWER_COSINE = GuidanceConfig("power_cosine", scale=10.0, power=1.75)


def test_guidance_schedules_give_the_released_curves() -> None:
    # schedules.npz of the released samplers: rear_l_paper at steps 0, 2, 64, 255 of 256; MaskGIT's linear curve of 20 steps.
    expected = {0: 1.0, 2: 1.0000008344650269, 64: 1.1723772287368774, 255: 9.99896622}
    for step, scale in expected.items():
        assert guidance_scale(step, 256, POWER_COSINE) == pytest.approx(scale, rel=2e-6)
    linear = GuidanceConfig("linear", scale=3.0)
    assert [guidance_scale(step, 20, linear) for step in (0, 1, 19)] == pytest.approx([1.0, 1.15, 3.85])
    assert guidance_scale(7, 20, GuidanceConfig("constant", scale=4.0)) == 4.0


@pytest.mark.parametrize(("schedule", "none"), [("constant", 1), ("power_cosine", 1), ("linear", 0)])
def test_the_scale_that_is_said_to_be_none_is_none(schedule: str, none: int) -> None:
    with pytest.raises(InputError, match=f"must not be negative. {none} = no guidance under .*={schedule}"):
        load("demo.yaml", [f"sample.guidance.schedule={schedule}", "sample.guidance.scale=-1"])
    scales = {guidance_scale(step, 16, GuidanceConfig(schedule, scale=none)) for step in range(16)}
    assert scales == {1.0}


def random_model(cfg: ExperimentConfig) -> Generator:
    model = build_model(cfg, with_heads=False).eval()
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)) * 0.2)
    return model


@pytest.mark.parametrize("guided", [False, True])
def test_cached_decoding_equals_the_full_forward(tmp_path: Path, tokens: Path, guided: bool) -> None:
    model = random_model(tiny_config(tmp_path, tokens))
    labels = torch.tensor([3, 1, 3, 0])
    sequences = torch.randint(32, (4, 16), generator=torch.Generator().manual_seed(0))
    classes = torch.cat([labels, torch.full_like(labels, model.null_class)]) if guided else labels
    with torch.inference_mode():
        full = model(sequences.repeat(len(classes) // 4, 1), classes, None)["logits"]
        state = CachedDecoding(model, Batch(model, labels, labels, None, guided))
        for step in range(16):
            assert (state.next_logits(sequences[:, :step]) - full[:, step]).abs().max() < 1e-5


def test_guidance_and_temperature_mix_the_two_halves(tmp_path: Path, tokens: Path) -> None:
    decoder = Decoder(
        random_model(tiny_config(tmp_path, tokens)),
        SampleConfig(temperature=2.0, guidance=GuidanceConfig("constant", 3.0)),
    )
    logits = torch.randn(8, 32)
    conditional, unconditional = logits[:4], logits[4:]
    assert torch.allclose(decoder.guide(logits, 5), (unconditional + 3 * (conditional - unconditional)) / 2)


def test_an_image_is_the_same_in_any_company_and_order(tmp_path: Path, tokens: Path) -> None:
    decoder = Decoder(random_model(tiny_config(tmp_path, tokens)), SampleConfig(guidance=POWER_COSINE))
    labels, ids = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([10, 11, 12, 13, 14, 15])
    whole = decoder.generate(labels, ids)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    assert torch.equal(decoder.generate(labels[order], ids[order]), whole[order])
    company = decoder.generate(torch.tensor([0, 4, 4, 4, 4, 4]), torch.tensor([10, 90, 91, 92, 93, 94]))
    assert torch.equal(company[0], whole[0])
    assert len(whole.unique(dim=0)) == 6


def test_draws_have_the_softmax_distribution(tmp_path: Path, tokens: Path) -> None:
    decoder = Decoder(random_model(tiny_config(tmp_path, tokens)), SampleConfig())
    logits = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 2
    drawn = torch.cat([decoder.draw(logits.expand(50_000, -1), torch.arange(50_000), step) for step in range(20)])
    expected = logits.double().softmax(0) * len(drawn)
    assert chisquare(drawn.bincount(minlength=32).numpy(), expected.numpy()).pvalue > 1e-3


def prepared(folder: Path, tokens: Path, *overrides: str) -> tuple[ExperimentConfig, Checkpoint]:
    """A checkpoint after one step, and a tokenizer with 16 tokens for it."""
    if not (folder / "weights").exists():
        torch.manual_seed(0)
        tokenizer = CompactTokenizer(16, 32, 8, 16)
        tokenizer.codes.normal_()
        tokenizer.save(folder / "weights")
    fixed = [
        f"tokenizer.weights={folder / 'weights'}",
        "strategy=single",
        "train.total_steps=1",
        "sample.guidance.scale=2",
    ]
    cfg = tiny_config(folder, tokens, *fixed, "sample.num_images=23", "sample.batch_size=4", *overrides)
    data = setup.check_data(cfg, discover({}))
    run_alone(lambda world: train(cfg, data.plan, world, *data.open(world), Hooks()))
    return cfg, find(folder / "run")


def _sample(world: World, cfg: ExperimentConfig, found: Checkpoint, output: Path) -> None:
    job.sample_images(cfg, found, world, output)


def test_the_file_does_not_depend_on_ranks_or_kills(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, found = prepared(tmp_path, tokens)
    files = {name: tmp_path / f"{name}.npz" for name in ("one", "two", "killed")}
    run_alone(_sample, cfg, found, files["one"])
    run_ranks(2, _sample, cfg, found, files["two"])

    make, made = job._sample_batch, []

    def killed(*arguments):
        if arguments[-1] == 3:
            raise KeyboardInterrupt
        made.append(arguments[-1])
        make(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "_sample_batch", killed)
        run_alone(_sample, cfg, found, files["killed"])
    assert made == [0, 1, 2]
    monkeypatch.setattr(job, "_sample_batch", lambda *arguments: made.append(arguments[-1]) or make(*arguments))
    run_alone(_sample, cfg, found, files["killed"])
    assert made == [0, 1, 2, 3, 4, 5]
    run_alone(_sample, cfg, found, files["killed"])
    assert made == [0, 1, 2, 3, 4, 5]

    expected = files["one"].read_bytes()
    assert files["two"].read_bytes() == expected
    assert files["killed"].read_bytes() == expected
    suffixes = [".json", ".npz", ".png", ".tokens.npy"]
    assert sorted(path.name for path in tmp_path.glob("killed*")) == [f"killed{suffix}" for suffix in suffixes]


def test_a_slow_rank_holds_nobody(tmp_path: Path, tokens: Path) -> None:
    cfg, found = prepared(tmp_path, tokens)
    made = run_ranks(2, _sample_slowly, cfg, found, tmp_path / "slow.npz")
    assert sorted(number for numbers in made for number in numbers) == [0, 1, 2, 3, 4, 5]
    assert len(made[0]) <= 2
    run_alone(_sample, cfg, found, tmp_path / "one.npz")
    assert (tmp_path / "slow.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()


def _sample_slowly(world: World, cfg: ExperimentConfig, found: Checkpoint, output: Path) -> list[int]:
    make, made = job._sample_batch, []

    def slow(*arguments):
        made.append(arguments[-1])
        if world.rank == 0:
            # Until the other one has made all that is left.
            for _ in range(10_000):
                if len(list(output.with_suffix(".parts").glob("*/*.images.npy"))) >= 5:
                    break
                time.sleep(0.02)
        make(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_sample_batch", slow)
        job.sample_images(cfg, found, world, output)
    return made


def test_given_labels_are_taken_in_turn_and_copies_hold_the_same_images(tmp_path: Path, tokens: Path) -> None:
    cfg, found = prepared(tmp_path, tokens, "sample.labels=[3,1]", "sample.also_write=png")
    output = tmp_path / "given.npz"
    run_alone(_sample, cfg, found, output)
    loaded = np.load(output)
    assert loaded["label"].tolist() == [3, 1] * 11 + [3]
    pngs = sorted((tmp_path / "given").iterdir())
    assert [path.name for path in pngs] == [f"{number:06d}.png" for number in range(23)]
    assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in pngs]), loaded["arr_0"])
    # An image is a function of its number and class: the images of class 3 or 1 in the usual file are among these.
    usual, _ = prepared(tmp_path, tokens)
    run_alone(_sample, usual, found, tmp_path / "usual.npz")
    same = np.arange(23) % NUM_CLASSES == loaded["label"]
    assert same.any()
    assert np.array_equal(np.load(tmp_path / "usual.npz")["arr_0"][same], loaded["arr_0"][same])
    # Copies of what is there need no new images.
    before = output.stat().st_mtime_ns
    cfg.sample.also_write = "tar"
    run_ranks(2, _sample, cfg, found, output)
    assert output.stat().st_mtime_ns == before
    with tarfile.open(tmp_path / "given.tar" / "shard-000000.tar") as tar:
        assert tar.getnames()[:2] == ["000000.cls", "000000.png"]
        assert [int(tar.extractfile(f"{number:06d}.cls").read()) for number in range(23)] == loaded["label"].tolist()
        assert np.array_equal(np.asarray(Image.open(tar.extractfile("000022.png"))), loaded["arr_0"][22])


@pytest.mark.parametrize("labels", ["[]", "[0,5]", "[-1]"])
def test_labels_that_are_no_classes_are_refused(labels: str) -> None:
    with pytest.raises(InputError, match=r"sample\.labels=.* must be one or more class ids in 0 \.\. 4"):
        load("demo.yaml", ["model.num_classes=5", f"sample.labels={labels}"])


def test_packed_weights_draw_the_same_tokens_on_any_number_of_threads(tmp_path: Path, tokens: Path) -> None:
    """As one full forward per token would, and counts where rounding could have decided."""
    model = random_model(tiny_config(tmp_path, tokens))
    cfg = SampleConfig(batch_size=6, guidance=POWER_COSINE)
    decoder, ids = Decoder(model, cfg), torch.arange(6)
    assert decoder.model is not model
    made = decoder.generate(ids % 5, ids)
    near_ties = decoder.near_ties
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(decoder.generate(ids % 5, ids), made)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(decoder.near_ties, near_ties)
    with torch.inference_mode():
        classes = torch.cat([ids % 5, torch.full_like(ids, model.null_class)])
        logits = model(made.repeat(2, 1), classes, None)["logits"]
        drawn, gaps = [], []
        for step in range(16):
            best = decoder.add_gumbel(decoder.guide(logits[:, step], step), ids, step).topk(2)
            drawn.append(best.indices[:, 0])
            gaps.append(best.values[:, 0] - best.values[:, 1])
    assert torch.equal(torch.stack(drawn, 1), made)
    assert torch.equal((torch.stack(gaps, 1) < NEAR_TIE).sum(1), near_ties)


def test_the_file_is_what_the_adm_evaluation_reads(tmp_path: Path, tokens: Path) -> None:
    cfg, found = prepared(tmp_path, tokens)
    output = job.default_output(cfg, found)
    output.parent.mkdir()
    run_alone(_sample, cfg, found, output)
    loaded = np.load(output)
    assert (loaded["arr_0"].dtype, loaded["arr_0"].shape) == (np.uint8, (23, 16, 16, 3))
    assert np.array_equal(loaded["label"], np.arange(23) % NUM_CLASSES)
    ids = torch.from_numpy(np.load(output.with_suffix(".tokens.npy")).astype(np.int64))
    decoded = CompactTokenizer.from_file(cfg.tokenizer.weights).decode(ids)
    assert np.abs(loaded["arr_0"].astype(int) - (decoded * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()).max() <= 1
    settings = json.loads(output.with_suffix(".json").read_text())
    assert (settings["step"], settings["sample"]["guidance"]["scale"], settings["uint8_rounding"]) == (
        1,
        2.0,
        "truncate",
    )
    with Image.open(output.with_suffix(".png")) as grid:
        assert grid.size == (5 * 66, 5 * 66)


def test_other_settings_are_another_job(tmp_path: Path, tokens: Path) -> None:
    cfg, found = prepared(tmp_path, tokens)
    output = tmp_path / "samples.npz"
    run_alone(_sample, cfg, found, output)
    before = output.read_bytes()
    cfg.sample.seed = 1
    run_alone(_sample, cfg, found, output)
    assert output.read_bytes() != before
    assert job.default_output(cfg, found) != job.default_output(prepared(tmp_path, tokens)[0], found)


def test_copies_are_those_of_the_last_job(tmp_path: Path, tokens: Path) -> None:
    cfg, found = prepared(tmp_path, tokens, "sample.also_write=png")
    output = tmp_path / "samples.npz"
    run_alone(_sample, cfg, found, output)
    cfg.sample.also_write = "tar"
    run_alone(_sample, cfg, found, output)
    (tmp_path / "samples" / "mine.png").write_bytes(b"")
    cfg.sample.seed, cfg.sample.num_images = 1, 7
    run_alone(_sample, cfg, found, output)
    images = np.load(output)["arr_0"]
    with tarfile.open(tmp_path / "samples.tar" / "shard-000000.tar") as tar:
        assert len(tar.getnames()) == 2 * 7
        assert np.array_equal(np.asarray(Image.open(tar.extractfile("000006.png"))), images[6])
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["mine.png"]


def test_a_kill_while_the_file_is_replaced_leaves_nothing_that_passes_for_complete(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, found = prepared(tmp_path, tokens)
    output = tmp_path / "samples.npz"
    run_alone(_sample, cfg, found, output)
    first, identity = output.read_bytes(), job.job_identity(cfg, found)
    cfg.sample.seed = 1
    monkeypatch.setattr(job, "_write_settings", killed)
    with pytest.raises(KeyboardInterrupt):
        run_alone(_sample, cfg, found, output)
    assert output.read_bytes() != first
    assert not job.is_done(output, identity)


def killed(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    monkeypatch.setattr(atomic_files, "unfinished", lambda path: tmp_path / "full")
    monkeypatch.setattr(atomic_files, "_create", lambda path: 0o666)
    with pytest.raises(OSError, match="No space left") as raised:
        atomic_files.write_array_atomically(tmp_path / "unit.npy", np.zeros(100_000))
    assert raised.value.errno == errno.ENOSPC


def test_a_tokenizer_that_did_not_make_the_tokens_is_refused(tmp_path: Path, tokens: Path) -> None:
    folder = Path(shutil.copytree(tokens, tmp_path / "tokens"))
    cfg, _ = prepared(tmp_path, folder)
    manifest = read_manifest(folder)
    made = file_sha256(tmp_path / "weights")
    write_manifest(folder, dataclasses.replace(manifest, tokenizer_sha256=made))
    shutil.rmtree(tmp_path / "run")
    cfg, found = prepared(tmp_path, folder)
    assert found.meta["tokenizer_sha256"] == made
    other = CompactTokenizer(16, 32, 8, 16)
    other.codes.normal_()
    other.save(tmp_path / "other")
    cfg.tokenizer.weights = str(tmp_path / "other")
    given = file_sha256(tmp_path / "other")
    for source in (found, _as_one_file(tmp_path)):
        with pytest.raises(
            InputError, match=f"has sha256 {given[:12]}, but .* trained on tokens of a file with sha256 {made[:12]}"
        ):
            run_alone(_sample, cfg, source, tmp_path / "samples.npz")
    assert not list(tmp_path.glob("*samples*"))
    cfg.tokenizer.weights = str(tmp_path / "weights")
    run_alone(_sample, cfg, found, tmp_path / "samples.npz")


def _as_one_file(folder: Path) -> Checkpoint:
    convert(folder / "run", None, [], "consolidated", folder / "all.safetensors")
    return open_source(folder / "all.safetensors")


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (None, "tokenizer.weights is not set"),
        ("/nowhere", "not found: tokenizer.weights=/nowhere"),
        (".", r"tokenizer.weights=\. is no regular file. Name the file itself"),
    ],
)
def test_weights_that_are_not_there_are_named_before_a_job_has_a_name(
    tmp_path: Path, tokens: Path, weights: str | None, expected: str
) -> None:
    cfg, found = prepared(tmp_path, tokens)
    cfg.tokenizer.weights = weights
    with pytest.raises(InputError, match=expected):
        job.default_output(cfg, found)


@pytest.mark.parametrize("name", ["y.json", "x.png", "y", "folder", "folder.npz"])
def test_an_output_that_would_be_overwritten_or_lost_is_refused(tmp_path: Path, tokens: Path, name: str) -> None:
    cfg, found = prepared(tmp_path, tokens)
    output = tmp_path / name
    if name.startswith("folder"):
        output.mkdir()
    with pytest.raises(InputError, match=r"Use --out .*\.npz"):
        run_alone(_sample, cfg, found, output)
    assert output.is_dir() or not output.exists()


def test_without_a_decoder_the_samples_are_token_ids(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg, found = prepared(tmp_path, tokens)
    run_alone(_sample, cfg, found, tmp_path / "images.npz")
    cfg.tokenizer.name, cfg.tokenizer.weights = "vqplus", None
    output = tmp_path / "ids.npz"
    run_alone(_sample, cfg, found, output)
    assert "as token ids alone: the images of tokenizer.name=vqplus are not decoded here" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.glob("ids*")) == ["ids.json", "ids.tokens.npy"]
    ids = (tmp_path / "ids.tokens.npy").read_bytes()
    assert ids == (tmp_path / "images.tokens.npy").read_bytes()
    run_alone(_sample, cfg, found, output)
    assert "ids.tokens.npy is complete" in capsys.readouterr().err


def test_two_jobs_of_one_output_do_not_meet(tmp_path: Path, tokens: Path) -> None:
    """Every rank of the second one says the same, so that nothing buries it; the first goes on."""
    cfg, found = prepared(tmp_path, tokens)
    output = tmp_path / "samples.npz"
    with locked(tmp_path / ".samples.npz.lock", "never said"):
        messages = run_ranks(2, _refusal, cfg, found, output)
    assert messages == [f"{output} is being written by another process. Wait for it, or write elsewhere with --out"] * 2
    assert not list(tmp_path.glob("*samples*"))
    run_alone(_sample, cfg, found, output)


def _refusal(world: World, cfg: ExperimentConfig, found: Checkpoint, output: Path) -> str:
    with pytest.raises(InputError) as caught:
        job.sample_images(cfg, found, world, output)
    return str(caught.value)


def test_batches_cover_every_image_once_class_by_class() -> None:
    cfg = load("demo.yaml", ["sample.num_images=103", "sample.batch_size=8"])
    batches = job.batches_of(cfg)
    assert sorted(np.concatenate(batches).tolist()) == list(range(103))
    assert all(len(set((batch % 10).tolist())) <= 2 for batch in batches)


def test_a_sheet_shows_every_image() -> None:
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] + np.zeros((5, 24, 24, 3), np.uint8)
    sheet = contact_sheet(images, 3)
    assert sheet.shape == (2 * 50, 3 * 50, 3)
    assert [sheet[10 + 50 * (n // 3), 10 + 50 * (n % 3), 0] for n in range(6)] == [0, 1, 2, 3, 4, 255]
    assert contact_sheet(np.zeros((2, 256, 256, 3), np.uint8), 2).shape == (258, 516, 3)


def test_only_the_likeliest_codes_are_drawn() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]]).log()

    def kept(top_k: int | None = None, top_p: float | None = None) -> list[list[int]]:
        return [row.isfinite().nonzero()[:, 0].tolist() for row in top_k_top_p(logits, top_k, top_p)]

    assert kept() == kept(4, 1.0) == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert kept(2) == [[0, 1], [2, 3]]
    # The codes that are needed to reach the share, the one that crosses it included.
    assert kept(top_p=0.5) == [[0], [2, 3]]
    assert kept(top_p=0.6) == [[0, 1], [2, 3]]
    assert kept(top_k=1, top_p=0.9) == [[0], [3]]
    untouched = top_k_top_p(logits, 2, None)
    assert torch.equal(untouched[0, :2], logits[0, :2])
