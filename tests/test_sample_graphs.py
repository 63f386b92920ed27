"""Steps that are recorded once and replayed draw the tokens of steps that are started one by one."""

from __future__ import annotations

import contextlib
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import tiny_config
from torch import Tensor

from rear_scale.bench.model import random_model
from rear_scale.config import GuidanceConfig, SampleConfig
from rear_scale.sample import graphs
from rear_scale.sample.batch import Batch
from rear_scale.sample.decode import Decoder
from rear_scale.sample.decode_worker import DecodeWorker, wait_for_workers
from rear_scale.sample.graphs import CudaGraph, GraphedSteps

CPU = torch.device("cpu")

# Ids and classes of batches: three shapes of them, with 3, 3, 2, 1, 1, 3 classes that are filled up to 4, 4, 2, 1, 1, 4 and
# the null class.
BATCHES = [
    ([0, 1, 2, 3], [0, 1, 2, 0]),
    ([7, 5, 6, 4], [2, 1, 0, 1]),
    ([8, 9, 10, 11], [0, 2, 2, 0]),
    ([12, 13, 14, 15], [1, 1, 1, 1]),
    ([16, 17, 18, 19], [0, 0, 0, 0]),
    ([20, 21, 22, 23], [0, 1, 2, 1]),
]


class Replayed:
    """As a CUDA graph: recording does nothing, and a replay reads the tensors of the recording."""

    made = 0

    def __init__(self, pool: object) -> None:
        type(self).made += 1

    def record(self, work: Callable[[], None]) -> None:
        self.work = work

    def replay(self) -> None:
        self.work()


def check(decoder: Decoder, plain: Decoder, device: torch.device) -> None:
    for ids, labels in BATCHES:
        ids, labels = torch.tensor(ids, device=device), torch.tensor(labels, device=device)
        tokens = decoder.generate(labels, ids)
        assert torch.equal(tokens, plain.generate(labels, ids))
        assert torch.equal(decoder.near_ties, plain.near_ties)
        assert torch.equal(decoder.within_rounding, plain.within_rounding)


@pytest.mark.parametrize("order", [None, "random"])
def test_recorded_steps_draw_the_same_tokens(
    tmp_path: Path, tokens: Path, order: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_STEPS", 5)  # more graphs than one
    monkeypatch.setattr(Replayed, "made", 0)
    cfg = SampleConfig(batch_size=4, guidance=GuidanceConfig("constant", 2.0), order=order)
    model = random_model(tiny_config(tmp_path, tokens), torch.device("cpu"), with_heads=False).eval()
    decoder, plain = (Decoder(model, cfg) for _ in range(2))
    decoder.graphed = GraphedSteps(decoder._draw_steps, Replayed)
    check(decoder, plain, torch.device("cpu"))
    # Batches 2 and 5 are the second of their shape; the last one comes back to the first shape.
    assert [shape[0] for shape in decoder.graphed.recorded] == [4 + 1, 2 + 1, 1 + 1]
    assert Replayed.made == 2 * -(-model.num_tokens // 5)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize(("classes", "padded"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8)])
def test_few_numbers_of_classes_are_recorded(
    tmp_path: Path, tokens: Path, classes: int, padded: int, guided: bool
) -> None:
    model = random_model(tiny_config(tmp_path, tokens), torch.device("cpu"), with_heads=False)
    batch = Batch(model, torch.arange(6) % classes, torch.arange(6), None, guided)
    graphed = GraphedSteps(lambda batch, steps: None, Replayed)
    assert len(graphed(batch).classes) == padded + guided


def test_what_cannot_be_recorded_is_drawn_step_by_step(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Refusing(Replayed):
        def record(self, work: Callable[[], None]) -> None:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    model = random_model(tiny_config(tmp_path, tokens), torch.device("cpu"), with_heads=False).eval()
    decoder, plain = (Decoder(model, SampleConfig(batch_size=4)) for _ in range(2))
    decoder.graphed = GraphedSteps(decoder._draw_steps, Refusing)
    check(decoder, plain, torch.device("cpu"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "warning: CUDA graphs do not work here, sampling continues without them (operation "
        "not permitted when stream is capturing)"
    )


def test_nothing_else_runs_while_steps_are_recorded(tmp_path: Path, tokens: Path) -> None:
    """As the sampling job does it: the images of a batch are decoded beside the drawing of the next one."""
    running = threading.Event()
    found: list[bool] = []

    class Watching(Replayed):
        def record(self, work: Callable[[], None]) -> None:
            found.append(running.is_set())
            super().record(work)

    def decode(tokens: Tensor) -> None:
        running.set()
        time.sleep(0.3)
        running.clear()

    model = random_model(tiny_config(tmp_path, tokens), CPU, with_heads=False).eval()
    decoder = Decoder(model, SampleConfig(batch_size=4))
    decoder.graphed = GraphedSteps(decoder._draw_steps, Watching)
    ids = torch.arange(4)
    with DecodeWorker(CPU) as beside:
        for _ in range(2):
            beside.run(decode, decoder.generate(ids, ids))
    assert found
    assert not any(found)


def test_a_worker_that_has_ended_is_not_waited_for() -> None:
    def fails() -> None:
        raise ValueError

    with pytest.raises(ValueError), DecodeWorker(CPU) as beside:  # noqa: PT011
        beside.run(fails)
    wait_for_workers()
    with DecodeWorker(CPU) as beside:
        beside.run(fails)
        with pytest.raises(ValueError):  # noqa: PT011
            wait_for_workers()
        beside.last = None


class Cuda:
    """What a recording uses of torch.cuda. `fails` says where a recording ends: in its work, before torch has told the
    allocator ("end"), or after it ("instantiate")."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: str | None) -> None:
        self.fails, self.calls = fails, []
        self.stream, self.recording = "main", False
        self.default_generators = [self]
        device = types.SimpleNamespace(device_index=0)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "default_generators", [self])
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: device)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", "main"))
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *pool: self.calls.append("release"), raising=False)

    @contextlib.contextmanager
    def graph(self, graph: object, pool: object, capture_error_mode: str):
        """In the order of torch.cuda.graph and CUDAGraph::capture_end."""
        assert capture_error_mode == "thread_local"
        self.stream, self.recording = "capture", True
        error = None
        try:
            yield
        except RuntimeError as raised:
            error = raised
        if self.fails == "end":
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.recording = False
        if self.fails == "instantiate":
            raise RuntimeError("CUDA error: out of memory")
        self.stream = "main"
        if error is not None:
            raise error

    def end(self, index: int, pool: object) -> None:
        if not self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording = False
        self.calls.append("end")

    def reset(self) -> None:
        self.calls.append("reset")

    def clone_state(self) -> str:
        return "numbers before"

    def graphsafe_set_state(self, numbers: str) -> None:
        self.calls.append(numbers)


@pytest.mark.parametrize(
    ("fails", "calls"),
    [
        (None, []),
        ("work", ["reset", "numbers before"]),
        ("end", ["end", "release", "reset", "numbers before"]),
        ("instantiate", ["reset", "numbers before"]),
    ],
)
def test_a_recording_that_fails_leaves_stream_allocator_and_generator_as_before(
    monkeypatch: pytest.MonkeyPatch, fails: str | None, calls: list[str]
) -> None:
    cuda = Cuda(monkeypatch, fails)

    def work() -> None:
        if fails in ("work", "end"):
            raise RuntimeError("operation not permitted when stream is capturing")

    graph = CudaGraph((0, 1))
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        graph.record(work)
    assert (cuda.stream, cuda.recording, cuda.calls) == ("main", False, calls)


def test_few_shapes_are_kept(tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_SHAPES", 1)
    monkeypatch.setattr(Replayed, "made", 0)
    model = random_model(tiny_config(tmp_path, tokens), torch.device("cpu"), with_heads=False).eval()
    decoder, plain = (
        Decoder(model, SampleConfig(batch_size=4, guidance=GuidanceConfig("constant", 2.0))) for _ in range(2)
    )
    decoder.graphed = GraphedSteps(decoder._draw_steps, Replayed)
    check(decoder, plain, torch.device("cpu"))
    assert len(decoder.graphed.recorded) == 1


def test_a_batch_takes_over_only_what_has_its_shape(tmp_path: Path, tokens: Path) -> None:
    model = random_model(tiny_config(tmp_path, tokens), torch.device("cpu"), with_heads=False)
    two, three = (Batch(model, torch.tensor(labels), torch.arange(3), None, True) for labels in ([0, 1, 1], [0, 1, 2]))
    assert two.shape != three.shape
    with pytest.raises(AssertionError):
        two.fill(three)


@pytest.mark.gpu
def test_a_gpu_goes_on_after_a_recording_that_failed(tmp_path: Path, tokens: Path) -> None:
    device = torch.device("cuda")
    model = random_model(tiny_config(tmp_path, tokens), device, with_heads=False).eval()
    decoder, plain = (Decoder(model, SampleConfig(batch_size=4)) for _ in range(2))
    plain.graphed.usable = False

    def draw(batch: Batch, steps: range) -> None:
        decoder._draw_steps(batch, steps)
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()  # as a library does when it is first used

    decoder.graphed.draw = draw
    stream = torch.cuda.current_stream()
    check(decoder, plain, device)
    assert not decoder.graphed.usable
    assert torch.cuda.current_stream() == stream
    assert torch.randn(8, device=device).isfinite().all()  # the generator is not in a recording any more
    # Memory that another stream uses comes back only when the allocator knows of no recording.
    before = torch.cuda.memory_allocated()
    borrowed = torch.empty(2**20, device=device)
    borrowed.record_stream(torch.cuda.Stream())
    del borrowed
    torch.cuda.synchronize()
    torch.empty(1, device=device)
    assert torch.cuda.memory_allocated() <= before + 512


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_cuda_graphs_draw_the_same_tokens(tmp_path: Path, tokens: Path, precision: torch.dtype) -> None:
    device = torch.device("cuda")
    model = random_model(tiny_config(tmp_path, tokens), device, with_heads=False).eval().to(precision)
    guidance = GuidanceConfig("constant", 2.0)
    decoder = Decoder(model, SampleConfig(batch_size=4, guidance=guidance))
    # The same arithmetic: numbers of classes are padded there too.
    plain = Decoder(model, SampleConfig(batch_size=4, guidance=guidance))
    plain.graphed.usable = False
    check(decoder, plain, device)
    assert decoder.graphed.usable
