"""Compiled decoding steps: the logits of uncompiled ones, one graph for all blocks, steps and lengths, and where they run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import run_ranks, tiny_config
from test_reference import drawn, generator
from test_sample import prepared
from test_sample_graphs import BATCHES, Replayed
from torch import Tensor
from torch._dynamo.utils import ReinplaceCounters

from rear_scale import config
from rear_scale.bench.model import random_model
from rear_scale.config import ExperimentConfig, GuidanceConfig, InputError, SampleConfig
from rear_scale.model import Generator
from rear_scale.model.transformer import AdaLNTransformer
from rear_scale.sample import compiled, job
from rear_scale.sample.batch import Batch
from rear_scale.sample.cached import Cache, CachedDecoding, TransposedCache
from rear_scale.sample.compiled import CompiledBlocks, compiles_steps, step_problem
from rear_scale.sample.decode import Decoder
from rear_scale.sample.graphs import GraphedSteps
from rear_scale.world import SingleProcess, World

CPU = torch.device("cpu")
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
REAL = torch.compile


class Counted:
    """A backend of torch.compile that counts its graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs, self.run = 0, torch._dynamo.lookup_backend("aot_eager")

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        self.graphs += 1
        return self.run(graph, inputs)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function that is compiled, as it is: enough where its memory and its place are tried, and not its graph."""
    step_problem.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Everything but the kernels: the same settings, traced, made functional and run operator by operator."""
    torch._dynamo.reset()
    step_problem.cache_clear()
    counted = Counted()

    def compile_(function: object, *, dynamic: bool, fullgraph: bool, options: dict[str, bool]) -> object:
        assert options == {"deterministic": True}
        return REAL(function, dynamic=dynamic, fullgraph=fullgraph, backend=counted)

    monkeypatch.setattr(torch, "compile", compile_)
    return counted


def check_logits(model: Generator, order: Tensor | None = None) -> None:
    """The logits of all steps, compiled and not, within TOLERANCE."""
    tokens, labels = drawn(model.num_tokens)
    tokens, labels = (one.to(next(model.parameters()).device) for one in (tokens, labels))
    with torch.inference_mode():
        eager, ours = (
            CachedDecoding(model, Batch(model, labels, labels, order, guided=True), compiled=form)
            for form in (None, CompiledBlocks(model))
        )
        for step in range(model.num_tokens):
            expected, found = (state.next_logits(tokens[:, :step]).float() for state in (eager, ours))
            allowed = compiled.TOLERANCE[next(model.parameters()).dtype] * expected.abs().max()
            assert (found - expected).abs().max() <= allowed, step
        assert ours.length == eager.length
        assert [cache.length for cache in ours.caches] == [cache.length for cache in eager.caches]


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("rar", {}),
        ("alitok", {}),
        pytest.param("rar", {"conditioning": "in_context"}, marks=pytest.mark.long),
    ],
)
def test_one_graph_has_the_logits_of_all_blocks_steps_and_lengths(
    architecture: str, options: dict[str, str], graphs: Counted
) -> None:
    check_logits(generator(architecture, 16 if architecture == "rar" else 20, depth=3, **options).eval())
    assert graphs.graphs == 1


def test_any_number_of_classes_has_one_graph_and_each_batch_size_its_own(
    graphs: Counted,
) -> None:
    """torch would else compile the second size for all sizes, and images would depend on the batches before theirs."""
    model = generator("rar", 16, depth=1).eval()
    decoder = Decoder(model, SampleConfig(batch_size=4, guidance=GuidanceConfig("constant", 2.0), compile=True))
    plain = Decoder(model, decoder.cfg, compiled=False)
    for labels in ([0, 1, 2, 3], [0, 0, 0, 1], [2, 2, 2, 2], [5, 1]):
        classes, ids = torch.tensor(labels), torch.arange(len(labels))
        with torch._dynamo.config.patch(recompile_limit=1):  # monkeypatch would delete it in the end
            assert torch.equal(decoder.generate(classes, ids), plain.generate(classes, ids))
    assert graphs.graphs == 2


def test_compiled_steps_are_recorded_and_replayed(tmp_path: Path, tokens: Path, uncompiled: None) -> None:
    model = random_model(tiny_config(tmp_path, tokens), CPU, with_heads=False).eval()
    cfg = SampleConfig(batch_size=4, guidance=GuidanceConfig("constant", 2.0))
    decoder, plain = Decoder(model, cfg, compiled=True), Decoder(model, cfg)
    decoder.graphed = GraphedSteps(decoder._draw_steps, Replayed)
    for ids, labels in BATCHES:
        found = decoder.generate(torch.tensor(labels), torch.tensor(ids))
        assert torch.equal(found, plain.generate(torch.tensor(labels), torch.tensor(ids)))
    assert any(recorded is not None for recorded in decoder.graphed.recorded.values())


def test_memory_is_written_in_place_and_in_two_allocations(uncompiled: None) -> None:
    """Parts of one allocation are aliases for torch.compile, which copies them."""
    model = generator("rar", 16).eval()
    decoder = Decoder(model, SampleConfig(batch_size=4), compiled=True)
    decoder.generate(torch.arange(4), torch.arange(4))
    for cache in decoder.caches:
        assert type(cache) is Cache
        assert cache.keys.untyped_storage().data_ptr() != cache.values.untyped_storage().data_ptr()
    before = [cache.keys.data_ptr() for cache in decoder.caches]
    decoder.generate(torch.arange(4), torch.arange(4))
    assert [cache.keys.data_ptr() for cache in decoder.caches] == before
    assert type(Decoder(model, SampleConfig(batch_size=4))._caches_for(4)[0]) is TransposedCache


def test_auto_compiles_on_gpus_where_it_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], uncompiled: None
) -> None:
    where = (AdaLNTransformer, CPU, torch.float32)
    assert [compiles_steps(choice, *where) for choice in ("auto", True, False)] == [False, True, False]
    monkeypatch.setattr(compiled, "_FASTER_ON", ("cpu",))
    state = torch.random.get_rng_state()
    assert compiles_steps("auto", *where)
    assert torch.equal(torch.random.get_rng_state(), state)

    def broken(*given: object, **options: object) -> None:
        raise RuntimeError("no C compiler\nis here")

    monkeypatch.setattr(torch, "compile", broken)
    step_problem.cache_clear()
    assert not compiles_steps("auto", *where)
    assert not compiles_steps("auto", *where)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sample.compile=auto: steps cannot be compiled here (RuntimeError: no C compiler is here)")
    step_problem.cache_clear()


@pytest.mark.parametrize("wrong", [0.01, float("nan")])
def test_kernels_that_give_other_logits_are_not_used(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    step_problem.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *given: function(*given) * (1 + wrong))
    problem = step_problem(AdaLNTransformer, CPU, torch.float32)
    step_problem.cache_clear()
    assert problem is not None
    assert "its logits differ by" in problem


@pytest.mark.parametrize("value", ["yes", "1"])
def test_other_values_are_refused(value: str) -> None:
    with pytest.raises(InputError, match=r"sample\.compile=.*auto"):
        config.load("rear_b.yaml", [f"sample.compile={value}"])


def test_a_job_is_made_in_one_form(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, uncompiled: None
) -> None:
    """Batches that were made uncompiled before a kill are made again; the file says how its images were made."""
    cfg, found = prepared(tmp_path, tokens, "sample.num_images=12", "sample.batch_size=4")
    output = tmp_path / "samples.npz"
    make = job._sample_batch

    def killed(*arguments: object) -> None:
        if arguments[-1] == 2:
            raise KeyboardInterrupt
        make(*arguments)

    alone = SingleProcess()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "_sample_batch", killed)
        job.sample_images(cfg, found, alone, output)
    (part,) = output.with_suffix(".parts").iterdir()
    cfg.sample.compile = True
    made: list[int] = []
    monkeypatch.setattr(job, "_sample_batch", lambda *arguments: (made.append(arguments[-1]), make(*arguments)))
    job.sample_images(cfg, found, alone, output)
    assert made == [0, 1, 2]
    assert not output.with_suffix(".parts").exists()
    assert job._settings_of(output)["compiled_steps"] is True
    cfg.sample.compile = False  # complete all the same
    job.sample_images(cfg, found, alone, output)
    assert made == [0, 1, 2]
    assert part.name == job.job_identity(cfg, found)[:16]


def _agreed(world: World, cfg: ExperimentConfig) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "compiles_steps", lambda *_: world.rank == 0)  # the compiler works on one rank alone
        return job.same_compile(cfg, world)


def test_all_ranks_compile_or_none(tmp_path: Path, tokens: Path) -> None:
    assert run_ranks(2, _agreed, tiny_config(tmp_path, tokens)) == [False, False]


@pytest.mark.long  # a minute of the compiler on a CPU
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_kernels_of_a_cpu_give_the_logits_and_copy_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    check_kernels("cpu")


@pytest.mark.gpu
def test_kernels_of_a_gpu_give_the_logits_and_copy_no_cache() -> None:
    check_kernels("cuda")


def check_kernels(device: str) -> None:
    torch._dynamo.reset()
    ReinplaceCounters.clear()
    for architecture, size in (("rar", 16), ("alitok", 20)):
        for dtype in (torch.float32, torch.bfloat16):
            check_logits(generator(architecture, size).eval().to(device, dtype))
    # A cache that is not written in place would be copied at every step.
    assert ReinplaceCounters.get_total_missed() == 0
