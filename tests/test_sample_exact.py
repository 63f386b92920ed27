"""Sampling draws what the plain sampler draws, whoever draws it and in whatever company."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_alone, run_ranks
from reference.generators import alitok_forward, rar_forward
from test_reference import CLASSES, condition, drawn, generator
from test_sample import _sample, prepared
from torch import Tensor

from rear_scale.bench.model import random_model
from rear_scale.checkpoint.folder import Checkpoint
from rear_scale.config import ExperimentConfig, GuidanceConfig, SampleConfig, load
from rear_scale.model import Generator
from rear_scale.model.flops import decode_step_cost
from rear_scale.sample import job
from rear_scale.sample.batch import Batch
from rear_scale.sample.decode import NEAR_TIE, CachedDecoding, Decoder
from rear_scale.world import World


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("only", [{}, {"top_k": 5}, {"top_p": 0.8}])
@pytest.mark.parametrize("architecture", ["rar", "alitok"])
def test_every_step_has_the_logits_of_the_plain_sampler(architecture: str, only: dict, scale: float) -> None:
    num_tokens, plain = (16, rar_forward) if architecture == "rar" else (20, alitok_forward)
    model = generator(architecture, num_tokens).eval()
    tokens, labels = drawn(num_tokens)
    decoder = Decoder(model, SampleConfig(batch_size=4, guidance=GuidanceConfig("constant", scale), **only))
    weights = dict(model.named_parameters())
    with torch.no_grad():
        conditional = plain(weights, tokens, condition(labels), 4)[0][:, :num_tokens]
        unconditional = plain(weights, tokens, condition(torch.full_like(labels, CLASSES)), 4)[0][:, :num_tokens]
        state = CachedDecoding(decoder.model, Batch(model, labels, labels, None, decoder.guided))
        ours = torch.stack([decoder.guide(state.next_logits(tokens[:, :step]), step) for step in range(num_tokens)], 1)
    expected = unconditional + (conditional - unconditional) * scale
    kept = torch.isfinite(ours)
    assert (ours[kept] - expected[kept]).abs().max() < 1e-5
    assert torch.equal(kept, _kept(expected, **only))


@pytest.mark.parametrize("tied", ["input", "output", "both"])
@pytest.mark.parametrize("architecture", ["rar", "alitok"])
def test_a_tied_codebook_is_embedded_once_for_all_steps(architecture: str, tied: str) -> None:
    num_tokens = 16 if architecture == "rar" else 20
    model = generator(architecture, num_tokens, tie_codebook=tied).eval()
    tokens, labels = drawn(num_tokens)
    embedded: list[int] = []
    model.codebook_proj.register_forward_hook(lambda *_: embedded.append(1))
    fixed = model.with_fixed_codes()
    with torch.no_grad():
        afresh, once = (CachedDecoding(one, Batch(one, labels, labels, None, guided=True)) for one in (model, fixed))
        for step in range(num_tokens):
            expected = afresh.next_logits(tokens[:, :step])
            before = len(embedded)
            assert torch.equal(once.next_logits(tokens[:, :step]), expected)
            assert len(embedded) == before
    decoder = Decoder(model, SampleConfig(batch_size=4, guidance=GuidanceConfig("constant", 2.0)))
    before = len(embedded)
    decoder.generate(labels, labels)
    assert len(embedded) == before
    # What is trained on still follows its weights.
    assert model.fixed_codes is None


def _kept(logits: Tensor, top_k: int = 10**9, top_p: float = 2.0) -> Tensor:
    """Code by code: those that fewer than top_k codes beat, and that less than top_p of the probability beats."""
    beaten = logits[..., None, :] > logits[..., :, None]
    share = (beaten * logits.softmax(-1)[..., None, :]).sum(-1)
    return (beaten.sum(-1) < top_k) & (share < top_p)


@pytest.mark.parametrize("config", ["bench_cpu.yaml", "ar_alitok_b.yaml"])
def test_the_cost_of_a_step_counts_the_positions_that_are_read(config: str) -> None:
    num_tokens = {"bench_cpu.yaml": 16, "ar_alitok_b.yaml": 20}[config]
    layout = [
        f"tokenizer.num_tokens={num_tokens}",
        "tokenizer.grid=[4,4]",
        f"tokenizer.prefix_tokens={num_tokens - 16}",
    ]
    cfg = load(config, [*layout, "sample.batch_size=4"])
    model = generator(cfg.model.architecture, num_tokens).eval()
    tokens, labels = drawn(num_tokens)
    state, read = CachedDecoding(model, Batch(model, labels, labels, None, guided=True)), []
    with torch.no_grad():
        for step in range(num_tokens):
            state.next_logits(tokens[:, :step])
            read.append(state.caches[0].length)
    width = 4 if cfg.train.precision == "fp32" else 2
    two, one = (decode_step_cost(cfg, guided=guided) for guided in (True, False))
    # Twice the rows read twice the keys and values, and the same weights.
    positions = (two.bytes - one.bytes) / width / (cfg.sample.batch_size * 2 * cfg.model.depth * cfg.model.width)
    assert positions == sum(read) / num_tokens


def sequences(model: Generator, cfg: ExperimentConfig, images: int, batch_size: int) -> Tensor:
    """int64 [images, N], as a job of that batch size makes them: its weights are packed for that size, too."""
    cfg.sample.batch_size = batch_size
    decoder = Decoder(model, cfg.sample)
    made = [job.make_tokens(decoder, ids, cfg, torch.device("cpu"))[: len(ids)] for ids in job.batches_of(cfg)]
    tokens = torch.empty(images, made[0].shape[1], dtype=torch.int64)
    tokens[np.concatenate(job.batches_of(cfg))] = torch.cat(made)
    return tokens


@pytest.mark.parametrize("images", [70, pytest.param(1000, marks=pytest.mark.long)])
def test_batches_of_another_size_part_at_near_ties_alone(images: int) -> None:
    cfg = load("demo.yaml", [f"sample.num_images={images}"])
    model = random_model(cfg, torch.device("cpu"), with_heads=False).eval()
    expected = sequences(model, cfg, images, 64)
    assert torch.equal(expected, sequences(model, cfg, images, 64))
    assert len(expected.unique(dim=0)) == images
    for batch_size in (1, 7):
        other = sequences(model, cfg, images, batch_size)
        parted = (other != expected).any(1).nonzero()[:, 0]
        assert len(parted) <= 2
        for image in parted.tolist():
            assert _gap(Decoder(model, cfg.sample), cfg, image, expected[image], other[image]) < NEAR_TIE


def test_bfloat16_parts_from_float32_within_rounding_alone() -> None:
    cfg = load("demo.yaml", ["sample.guidance.schedule=constant", "sample.guidance.scale=4"])
    model = random_model(cfg, torch.device("cpu"), with_heads=False).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # logits as large as those of a trained model
    cfg.sample.batch_size = 48
    precise, half = (Decoder(one, cfg.sample) for one in (model, copy.deepcopy(model).to(torch.bfloat16)))
    ids = torch.arange(48)
    labels = ids % cfg.model.num_classes
    expected, made = precise.generate(labels, ids), half.generate(labels, ids)
    assert precise.within_rounding.sum() < half.within_rounding.sum()
    with torch.inference_mode():
        state = CachedDecoding(half.model, Batch(half.model, labels, ids, None, guided=True))
        gaps, within = [], []
        for step in range(made.shape[1]):
            logits = state.next_logits(made[:, :step])
            best = half.add_gumbel(half.guide(logits, step), ids, step).topk(2).values
            gaps.append(best[:, 0] - best[:, 1])
            within.append(gaps[-1] < half.rounding(logits, step))
    gaps, within = torch.stack(gaps, 1), torch.stack(within, 1)
    assert torch.equal(within.sum(1), half.within_rounding)
    assert torch.equal((gaps < NEAR_TIE).sum(1), half.near_ties)
    assert not within.all()
    parted = (made != expected).any(1).nonzero()[:, 0]
    first = (made != expected).int().argmax(1)
    assert within[parted, first[parted]].all()
    # What float32 is held to would have missed some.
    assert (gaps[parted, first[parted]] > NEAR_TIE).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (4.0, 1.0), (4.0, 0.5)])
def test_logits_are_off_by_less_than_is_said(dtype: torch.dtype, scale: float, temperature: float) -> None:
    model = generator("rar", 16, depth=12).eval()
    cfg = SampleConfig(batch_size=4, temperature=temperature, guidance=GuidanceConfig("constant", scale))
    finer = {torch.float32: torch.float64, torch.bfloat16: torch.float32}[dtype]
    precise, coarse = (Decoder(copy.deepcopy(model).to(one), cfg) for one in (finer, dtype))
    tokens, labels = drawn(16)
    with torch.inference_mode():
        states = [
            CachedDecoding(one.model, Batch(one.model, labels, labels, None, one.guided)) for one in (precise, coarse)
        ]
        for step in range(16):
            exact, rounded = (state.next_logits(tokens[:, :step]) for state in states)
            conditional, unconditional = exact.chunk(2) if coarse.guided else (exact, exact)
            guided = (unconditional + (conditional - unconditional) * scale) / temperature
            error = coarse.guide(rounded, step) - guided
            spread = error.amax(1) - error.amin(1)  # over all pairs of codes
            allowed = coarse.rounding(rounded, step)
            assert (spread < 1.5 * allowed).all()
            assert (spread > 0.02 * allowed).all()


def _gap(decoder: Decoder, cfg: ExperimentConfig, image: int, one: Tensor, other: Tensor) -> float:
    """Between the two best perturbed logits where two sequences of an image first differ."""
    step = int((one != other).nonzero()[0])
    ids = torch.tensor([image])
    with torch.no_grad():
        classes = torch.tensor([image % cfg.model.num_classes, decoder.model.null_class])
        logits = decoder.model(one.repeat(2, 1), classes, None)["logits"][:, step]
        best = decoder.add_gumbel(decoder.guide(logits, step), ids, step).topk(2).values[0]
    return float(best[0] - best[1])


@pytest.mark.long
def test_a_thousand_images_are_the_same_for_any_world_and_after_a_kill(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = load("demo.yaml").model
    sizes = [f"model.{name}={getattr(demo, name)}" for name in ("depth", "width", "num_heads")]
    cfg, found = prepared(tmp_path, tokens, *sizes, "sample.num_images=1000", "sample.batch_size=64")
    for world_size in (1, 2, 3):
        run_ranks(world_size, _sample, cfg, found, tmp_path / f"world{world_size}.npz")
    make = job._sample_batch

    def killed(*arguments):
        if arguments[-1] == 9:
            raise KeyboardInterrupt
        make(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "_sample_batch", killed)
        run_alone(_sample, cfg, found, tmp_path / "killed.npz")
    run_ranks(2, _sample, cfg, found, tmp_path / "killed.npz")
    ids = [np.load(path) for path in sorted(tmp_path.glob("*.tokens.npy"))]
    assert len(ids) == 4
    assert all(np.array_equal(other, ids[0]) for other in ids)
    assert len(np.unique(ids[0], axis=0)) > 900


@pytest.mark.long
def test_fifty_thousand_images_take_two_processes_less_than_a_gibibyte_each(tmp_path: Path, tokens: Path) -> None:
    cfg, found = prepared(tmp_path, tokens, "sample.num_images=50000", "sample.batch_size=250")
    peaks = run_ranks(2, _peak_memory, cfg, found, tmp_path / "samples.npz", fresh=True)
    assert max(peaks) < 1.0, peaks
    loaded = np.load(tmp_path / "samples.npz")
    assert loaded["arr_0"].shape == (50_000, 16, 16, 3)
    assert (np.bincount(loaded["label"]) == 50_000 // cfg.model.num_classes).all()


def _peak_memory(world: World, cfg: ExperimentConfig, found: Checkpoint, output: Path) -> float:
    """The largest resident size of this process, in GiB."""
    job.sample_images(cfg, found, world, output)
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert peak is not None
    return int(peak[1]) / 2**20
