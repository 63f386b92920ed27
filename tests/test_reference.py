"""The fast generators, their training and their cached decoding against the plain reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from reference.generators import alitok_forward, rar_forward, rear_head
from reference.training import AdamW, next_token_loss, released_alignment_loss, released_rate
from torch import Tensor

from rear_scale import config
from rear_scale.config import GuidanceConfig, HeadsConfig, SampleConfig
from rear_scale.model import Generator, build_generator
from rear_scale.model.generator import Shape
from rear_scale.objective import Objective, Task
from rear_scale.objective.permutation import in_order, random_orders
from rear_scale.optim import schedule
from rear_scale.parallel import open_strategy
from rear_scale.sample.batch import Batch
from rear_scale.sample.decode import CachedDecoding, Decoder
from rear_scale.world import World, discover

CLASSES, CODES, WIDTH = 6, 24, 32
RELEASED = HeadsConfig(
    encode_tap=1,
    decode_tap=3,
    hidden=20,
    form="released",
    positions="all",
    encode_counts="clean",
    distance="negative_cosine",
)


def generator(architecture: str, num_tokens: int, heads: HeadsConfig | None = None, **changes: object) -> Generator:
    values = {"depth": 3, "width": WIDTH, "num_heads": 4, "mlp_width": 40, "codebook_dim": 8, **changes}
    layout = {"num_tokens": num_tokens, "grid": (4, 4), "prefix_tokens": num_tokens - 16}
    shape = Shape(num_classes=CLASSES, codebook_size=CODES, **layout, **values)
    model = build_generator(architecture, shape, heads)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.3 if weight.ndim > 1 else 0.1
            weight.copy_(scale * torch.randn(weight.shape, generator=draws) + (name.endswith("norm.weight")))
    if model.codebook_proj is not None:
        model.set_codebook(torch.randn(CODES, 8, generator=draws))
    return model


def drawn(num_tokens: int, batch: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(CODES, (batch, num_tokens), generator=draws), torch.randint(
        CLASSES + 1, (batch,), generator=draws
    )


def condition(classes: Tensor) -> Tensor:
    return classes + CODES + 1


def orders(num_tokens: int, batch: int = 4) -> Tensor:
    bits = torch.randint(2**32, (batch, num_tokens), generator=torch.Generator().manual_seed(5))
    return random_orders(bits, 0)


@pytest.mark.parametrize("permuted", [False, True])
def test_rar_equals_the_reference(permuted: bool) -> None:
    model = generator("rar", 16, RELEASED).eval()
    weights = dict(model.named_parameters())
    tokens, classes = drawn(16)
    order = orders(16) if permuted else None
    shown = in_order(tokens, order)
    output = model(shown, classes, None, order)
    logits, stream = rar_forward(weights, shown, condition(classes), 4, order)
    assert torch.allclose(output["logits"], logits[:, :16], atol=1e-5)
    assert torch.allclose(output["encode"], rear_head(weights, "encode_align_mlp", stream[1])[:, 2:], atol=1e-5)
    assert torch.allclose(output["decode"], rear_head(weights, "decode_align_mlp", stream[3])[:, 1:-1], atol=1e-5)


def test_alitok_equals_the_reference() -> None:
    model = generator("alitok", 20).eval()  # 4 prefix tokens and a grid of 4 x 4
    tokens, classes = drawn(20)
    logits, _ = alitok_forward(dict(model.named_parameters()), tokens, condition(classes), 4)
    assert torch.allclose(model(tokens, classes, None)["logits"], logits[:, :20], atol=1e-5)


@pytest.mark.parametrize("architecture", ["rar", "alitok"])
def test_twenty_updates_equal_the_reference(architecture: str) -> None:
    """Through the project's own training step: groups, schedule, clipping, accumulation from the eleventh update on."""
    num_tokens = 16 if architecture == "rar" else 20
    heads = RELEASED if architecture == "rar" else None
    cfg = config.load("rear_xl.yaml", ["strategy=single", "train.total_steps=20", "train.precision=fp32"])
    cfg.optim = dataclasses.replace(cfg.optim, warmup_steps=5, schedule="released")
    cfg.tokenizer = dataclasses.replace(cfg.tokenizer, num_tokens=num_tokens, codebook_size=CODES)
    cfg.objective.heads = heads or HeadsConfig()
    codebook = torch.randn(CODES, 8, generator=torch.Generator().manual_seed(9))
    model = generator(architecture, num_tokens, heads)
    weights = {name: w.detach().clone().requires_grad_() for name, w in model.named_parameters()}
    plain = AdamW(weights)
    world = World(discover(), torch.device("cpu"))
    strategy = open_strategy(cfg, config.derive(cfg, 1, 100), world)
    strategy.build(model.train())
    objective = Objective(cfg, strategy.plan, codebook, world.device)
    for update in range(1, 21):
        micro_batches = [drawn(num_tokens, seed=10 * update + number) for number in range(1 + (update > 10))]
        strategy.plan = dataclasses.replace(strategy.plan, accumulation=len(micro_batches))
        ours = expected = 0.0
        for micro_step, (tokens, classes) in enumerate(micro_batches):
            replaced = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(update)) < 0.3
            context = tokens.where(~replaced, (tokens + 1) % CODES)
            task = Task(context, tokens, None, replaced)
            statistics = strategy.forward_backward(
                lambda forward, task=task, classes=classes: objective.loss(forward(task.context, classes, None), task),
                micro_step,
            )
            if heads:
                logits, stream = rar_forward(weights, context, condition(classes), 4)
                encode = rear_head(weights, "encode_align_mlp", stream[1])[:, 2:]
                decode = rear_head(weights, "decode_align_mlp", stream[3])[:, 1:-1]
                aligned = released_alignment_loss(encode, decode, codebook[tokens], replaced)
            else:
                logits, _ = alitok_forward(weights, context, condition(classes), 4)
                aligned = 0.0
            loss = next_token_loss(logits, tokens) + aligned
            (loss / len(micro_batches)).backward()
            ours, expected = ours + objective.statistic(statistics, "loss").item(), expected + loss.item()
        assert ours == pytest.approx(expected, rel=1e-5)
        norm = strategy.grad_norm().item()
        rate = {"peak": cfg.optim.lr, "end": cfg.optim.end_lr, "warmup_steps": 5, "total_steps": 20}
        lr = schedule.learning_rate(update, **rate, form="released")
        assert lr == pytest.approx(released_rate(update, cfg.optim.lr, cfg.optim.end_lr, 5, 20), rel=1e-9)
        strategy.step(lr)
        assert norm == pytest.approx(plain.step(lr), rel=1e-5)
    for name, weight in model.named_parameters():
        # Keys may be shifted by a constant: that gradient is rounding, which AdamW blows up.
        if not name.endswith("k_norm.bias"):
            assert torch.allclose(weight, weights[name], atol=1e-5), name


FORMS = {
    "adaln": ("rar", 16, {}),
    "in_context": ("rar", 16, {"conditioning": "in_context"}),
    "tied": ("rar", 16, {"tie_codebook": "both"}),
    "alitok": ("alitok", 20, {}),
    "alitok permuted": ("alitok", 20, {"target_aware": True}),
    "alitok tied": ("alitok", 20, {"tie_codebook": "output"}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order_name", ["stored", "fixed", "random"])
def test_cached_decoding_equals_the_full_forward(form: str, order_name: str) -> None:
    architecture, num_tokens, changes = FORMS[form]
    model = generator(architecture, num_tokens, RELEASED, **changes).eval()
    tokens, labels = drawn(num_tokens)
    order = {"stored": None, "fixed": orders(num_tokens, 1), "random": orders(num_tokens)}[order_name]
    shown = in_order(tokens, order)
    with torch.no_grad():
        classes = torch.cat([labels, torch.full_like(labels, CLASSES)])
        doubled = order if order is None or len(order) == 1 else order.repeat(2, 1)
        full = model(shown.repeat(2, 1), classes, None, doubled)["logits"]
        state = CachedDecoding(model, Batch(model, labels, labels, order, guided=True))
        cached = torch.stack([state.next_logits(shown[:, :step]) for step in range(num_tokens)], dim=1)
    assert torch.allclose(cached, full, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_sampling_needs_no_heads_and_puts_tokens_in_place(form: str) -> None:
    architecture, num_tokens, changes = FORMS[form]
    with_heads = generator(architecture, num_tokens, RELEASED, **changes).eval()
    without = generator(architecture, num_tokens, None, **changes).eval()
    own = with_heads.state_dict()
    without.load_state_dict({name: own[name] for name in without.state_dict()})
    if without.codebook_proj is not None:
        without.set_codebook(with_heads.codebook)
    cfg = SampleConfig(guidance=GuidanceConfig("constant", 2.0), order="random")
    ids, labels = torch.arange(6), torch.arange(6) % CLASSES
    tokens = Decoder(without, cfg).generate(labels, ids)
    assert torch.equal(tokens, Decoder(with_heads, cfg).generate(labels, ids))
    # The first token of each image's order is drawn before all others: it decides alone what stands at its place.
    order = Decoder(without, cfg).orders(ids)
    first = CachedDecoding(without, Batch(without, labels, labels, order, guided=True))
    decoder = Decoder(without, cfg)
    with torch.no_grad():
        drawn_first = decoder.draw(decoder.guide(first.next_logits(tokens[:, :0]), 0), ids, 0)
    assert torch.equal(tokens.gather(1, order[:, :1])[:, 0], drawn_first)
