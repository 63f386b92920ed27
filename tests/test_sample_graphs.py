"""Steps that are recorded once and replayed draw the tokens of steps that are started one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import tiny_config

from rear_scale.bench.model import drawn_model
from rear_scale.config import GuidanceConfig, SampleConfig
from rear_scale.sample import graphs
from rear_scale.sample.batch import Batch
from rear_scale.sample.decode import Decoder
from rear_scale.sample.graphs import GraphedSteps

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
    model = drawn_model(tiny_config(tmp_path, tokens), torch.device("cpu"), with_heads=False).eval()
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
    model = drawn_model(tiny_config(tmp_path, tokens), torch.device("cpu"), with_heads=False)
    batch = Batch(model, torch.arange(6) % classes, torch.arange(6), None, guided)
    graphed = GraphedSteps(lambda batch, steps: None, Replayed)
    assert len(graphed(batch).classes) == padded + guided


def test_what_cannot_be_recorded_is_drawn_step_by_step(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Refusing(Replayed):
        def record(self, work: Callable[[], None]) -> None:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    model = drawn_model(tiny_config(tmp_path, tokens), torch.device("cpu"), with_heads=False).eval()
    decoder, plain = (Decoder(model, SampleConfig(batch_size=4)) for _ in range(2))
    decoder.graphed = GraphedSteps(decoder._draw_steps, Refusing)
    check(decoder, plain, torch.device("cpu"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "warning: no CUDA graphs, kernels are started one by one (operation not permitted when stream is capturing)"
    )


def test_few_shapes_are_kept(tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_SHAPES", 1)
    monkeypatch.setattr(Replayed, "made", 0)
    model = drawn_model(tiny_config(tmp_path, tokens), torch.device("cpu"), with_heads=False).eval()
    decoder, plain = (
        Decoder(model, SampleConfig(batch_size=4, guidance=GuidanceConfig("constant", 2.0))) for _ in range(2)
    )
    decoder.graphed = GraphedSteps(decoder._draw_steps, Replayed)
    check(decoder, plain, torch.device("cpu"))
    assert len(decoder.graphed.recorded) == 1


def test_a_batch_takes_over_only_what_has_its_shape(tmp_path: Path, tokens: Path) -> None:
    model = drawn_model(tiny_config(tmp_path, tokens), torch.device("cpu"), with_heads=False)
    two, three = (Batch(model, torch.tensor(labels), torch.arange(3), None, True) for labels in ([0, 1, 1], [0, 1, 2]))
    assert two.shape != three.shape
    with pytest.raises(AssertionError):
        two.fill(three)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_cuda_graphs_draw_the_same_tokens(tmp_path: Path, tokens: Path, precision: torch.dtype) -> None:
    device = torch.device("cuda")
    model = drawn_model(tiny_config(tmp_path, tokens), device, with_heads=False).eval().to(precision)
    guidance = GuidanceConfig("constant", 2.0)
    decoder = Decoder(model, SampleConfig(batch_size=4, guidance=guidance))
    # The same arithmetic: numbers of classes are padded there too.
    plain = Decoder(model, SampleConfig(batch_size=4, guidance=guidance))
    plain.graphed.usable = False
    check(decoder, plain, device)
    assert decoder.graphed.usable
