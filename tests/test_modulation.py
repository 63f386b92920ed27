"""Modulation once per distinct class: its gradients, when it is chosen, and one compiled graph for any number of classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import tiny_config
from test_model import SMALL, batch, filled
from torch import Tensor

from rear_scale import config
from rear_scale.config import InputError, settled, wants_compile
from rear_scale.model import compiled, modulation
from rear_scale.model.modulation import rows_of, sums_by_product, sums_in_order
from rear_scale.model.recompute import prepare_blocks
from rear_scale.model.transformer import Block
from rear_scale.objective import shared_classes, worth_sharing

IMAGES = 24
SUMS = pytest.mark.parametrize("sums", [sums_by_product, sums_in_order])


@SUMS
@pytest.mark.parametrize("distinct", [1, 2, 9, 10, 24])
def test_gradients_are_those_of_a_gather_and_the_same_every_time(
    monkeypatch: pytest.MonkeyPatch, sums: Callable[..., Tensor], distinct: int
) -> None:
    monkeypatch.setattr(modulation, "sums_in_order", sums)  # what a CPU takes
    draws = torch.Generator().manual_seed(distinct)
    table = torch.randn(distinct, 5, 12, dtype=torch.float64, generator=draws, requires_grad=True)
    rows = torch.cat((torch.arange(distinct), torch.randint(distinct, (IMAGES - distinct,), generator=draws)))
    rows = rows[torch.randperm(IMAGES, generator=draws)]
    arriving = torch.randn(IMAGES, 5, 12, dtype=torch.float64, generator=draws)
    gathered, ours = table.index_select(0, rows), rows_of(table, rows)
    assert torch.equal(ours, gathered)
    (expected,) = torch.autograd.grad(gathered, table, arriving)
    found = [torch.autograd.grad(rows_of(table, rows), table, arriving)[0] for _ in range(3)]
    assert torch.allclose(found[0], expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


@SUMS
def test_a_class_that_no_image_has_gets_no_gradient(sums: Callable[..., Tensor]) -> None:
    found = sums(torch.ones(3, 2, 4), torch.tensor([2, 0, 2]), 4)
    assert found[:, 0, 0].tolist() == [1.0, 0.0, 2.0, 0.0]


@SUMS
def test_a_model_has_the_gradients_of_a_gather(monkeypatch: pytest.MonkeyPatch, sums: Callable[..., Tensor]) -> None:
    model = filled(config.load("demo.yaml", SMALL)).double()
    tokens, classes = batch()
    unique, rows = classes.unique(return_inverse=True)
    monkeypatch.setattr(modulation, "sums_in_order", sums)
    gradients = []
    for gather in (rows_of, rows_of, lambda table, rows: table.index_select(0, rows)):
        monkeypatch.setattr("rear_scale.model.transformer.rows_of", gather)
        model.zero_grad()
        sum(value.square().mean() for value in model(tokens, unique, rows).values()).backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    for name, expected in gradients[2].items():
        assert torch.allclose(gradients[0][name], expected, rtol=1e-12, atol=1e-15 + 1e-14 * expected.norm()), name
        assert torch.equal(gradients[0][name], gradients[1][name]), name


def test_sums_in_bf16_are_rounded_once() -> None:
    """A product adds up in float32: many small values are not lost beside a large one, as they are one by one."""
    values = torch.full((257, 2), 1.0, dtype=torch.bfloat16)
    values[0] = 256
    found = sums_by_product(values, torch.zeros(257, dtype=torch.long), 1)
    assert found.tolist() == [[512.0, 512.0]]


@pytest.mark.parametrize(
    ("form", "distinct", "shared"),
    [
        ("auto", 1, True),
        ("auto", 14, True),
        ("auto", 15, False),
        ("auto", 16, False),
        ("per_class", 16, True),
        ("per_sample", 1, False),
    ],
)
def test_the_form_follows_the_share_of_distinct_classes(form: str, distinct: int, shared: bool) -> None:
    classes = torch.arange(16) % distinct + 3
    found, rows = shared_classes(classes, form)
    if shared:
        assert found.tolist() == list(range(3, 3 + distinct))
        assert torch.equal(found[rows], classes)
    else:
        assert rows is None
        assert torch.equal(found, classes)
    assert form != "auto" or worth_sharing(distinct, 16) == shared


# How many compiled graphs a block makes over micro-batches of other numbers of classes, and of one class per image.


class _Graphs:
    """A backend of torch.compile that counts what it is given and compiles as another one does."""

    def __init__(self, backend: str) -> None:
        self.count, self.backend = 0, torch._dynamo.lookup_backend(backend)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        self.count += 1
        return self.backend(graph, inputs)


def test_the_number_of_classes_does_not_recompile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokens: Path
) -> None:
    torch._dynamo.reset()
    graphs = _Graphs("aot_eager")
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward: compile_(forward, backend=graphs))
    cfg = tiny_config(tmp_path, tokens, "train.compile=true")
    shape = filled(config.load("demo.yaml", SMALL)).shape
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList(Block(shape) for _ in range(2))
    eager = [block.forward for block in model.blocks]
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(weight.numel()))
    prepare_blocks(model, cfg)

    def passed(forwards: list[Callable[..., Tensor]], rows: Tensor | None, distinct: int) -> list[Tensor]:
        draws = torch.Generator().manual_seed(distinct)
        x, condition = (torch.randn(size, 7, shape.width, generator=draws) for size in (16, distinct))
        x, condition = x.requires_grad_(), condition.requires_grad_()  # as what comes out of a block before
        stream = x
        for forward in forwards:
            stream = forward(stream, condition, rows)
        return [stream, *torch.autograd.grad(stream.square().sum(), [x, condition, *model.parameters()])]

    for distinct in (7, 2, 14, 3):
        rows = torch.arange(16) % distinct
        found, expected = (passed(forwards, rows, distinct) for forwards in ([b.forward for b in model.blocks], eager))
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item()), distinct
    assert graphs.count == 1
    for _ in range(2):
        passed([block.forward for block in model.blocks], None, 16)
    assert graphs.count == 2
    torch._dynamo.reset()


# train.compile


@pytest.mark.parametrize(
    ("overrides", "on_gpu", "on_cpu"),
    [
        ((), True, False),
        (("strategy=zero3",), False, False),
        (("train.activation_checkpointing=selective",), False, False),
        (("train.activation_checkpointing=full", "strategy=fsdp2"), True, False),
        (("train.compile=false",), False, False),
        (("train.compile=true",), True, True),
    ],
)
def test_auto_compiles_on_gpus_where_it_works(overrides: tuple[str, ...], on_gpu: bool, on_cpu: bool) -> None:
    cfg = config.load("rear_b.yaml", overrides)
    assert wants_compile(cfg, "cuda") is on_gpu
    assert wants_compile(cfg, "cpu") is on_cpu


def test_a_compiler_that_fails_leaves_one_line_and_blocks_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(forward: object) -> object:
        raise RuntimeError("no C compiler\nis here")

    cfg = config.load("rear_b.yaml")
    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(compiled, "wants_compile", lambda cfg, device: True)
    compiled.compiler_problem.cache_clear()
    assert not compiled.compiles_blocks(cfg, torch.device("cpu"))
    assert not compiled.compiles_blocks(config.load("rear_b.yaml", ["train.compile=false"]), torch.device("cpu"))
    (line,) = capsys.readouterr().err.splitlines()
    assert "train.compile=auto: torch.compile does not work here (RuntimeError: no C compiler is here)" in line
    compiled.compiler_problem.cache_clear()


@pytest.mark.parametrize("value", ["yes", "'true'", "1"])
def test_other_values_of_compile_are_refused(value: str) -> None:
    with pytest.raises(InputError, match=r"train\.compile=.*auto"):
        config.load("rear_b.yaml", [f"train.compile={value}"])


@pytest.mark.parametrize(
    ("field", "old"), [("train.compile", False), ("train.compile", True), ("model.modulation", "per_class")]
)
def test_what_is_left_open_stays_as_a_run_began(field: str, old: object) -> None:
    section, name = field.split(".")
    saved = config.to_dict(config.load("rear_b.yaml", [f"{field}={old}"]))
    cfg = settled(config.load("rear_b.yaml"), saved)
    assert getattr(getattr(cfg, section), name) == old
    config.check_resumable(cfg, {**saved, "data": config.to_dict(cfg)["data"]}, "step_5")
    assert getattr(getattr(settled(config.load("rear_b.yaml"), None), section), name) == "auto"
