from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rear_scale import config
from rear_scale.config import ExperimentConfig, HeadsConfig
from rear_scale.model import Generator, build_model
from rear_scale.model.flops import distinct_classes_per_image, parameters_by_part, train_flops_per_image
from rear_scale.shards.order import group_by_class

SMALL = [
    "model.depth=3",
    "model.width=32",
    "model.num_heads=4",
    "model.mlp_width=48",
    "model.dropout=0",
    "model.attn_dropout=0",
    "objective.heads.hidden=24",
]


def small(*overrides: str) -> ExperimentConfig:
    return config.load("demo.yaml", [*SMALL, *overrides])


def filled(cfg: ExperimentConfig, **build: bool) -> Generator:
    """A model with every weight drawn, AdaLN's included, so that each of them matters."""
    model = build_model(cfg, **build)
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
    return model


def batch(size: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(128, (size, 36), generator=generator), torch.tensor([3, 10, 3, 0, 10])[:size]


def test_modulation_once_per_class_changes_nothing() -> None:
    model = filled(small())
    tokens, classes = batch()
    unique, rows = classes.unique(return_inverse=True)
    outputs, gradients = [], []
    for arguments in ((classes, None), (unique, rows)):
        model.zero_grad()
        output = model(tokens, *arguments)
        sum(value.square().mean() for value in output.values()).backward()
        outputs.append(output)
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    for name in ("logits", "encode", "decode"):
        assert torch.allclose(outputs[0][name], outputs[1][name], atol=1e-5)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6 + 1e-4 * gradient.norm().item()), name


def test_a_logit_sees_the_tokens_before_it_and_no_other() -> None:
    model = filled(small())
    tokens, classes = batch()
    before = model(tokens, classes, None)
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 128
    after = model(changed, classes, None)
    differs = (before["logits"] != after["logits"]).any(2).any(0)
    assert not differs[:11].any()
    assert differs[11:].all()
    # Head positions are tokens 0 .. N-2.
    for name in ("encode", "decode"):
        differs = (before[name] != after[name]).any(2).any(0)
        assert not differs[:10].any()
        assert differs[10:].all()


def test_the_last_token_is_never_used() -> None:
    model = filled(small())
    tokens, classes = batch()
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 128
    before, after = (model(context, classes, None) for context in (tokens, changed))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("encode", "decode"), [(None, None), (0, None), (None, 3), (1, 1), (3, 0)])
def test_heads_exist_where_they_are_asked_for_and_read_their_tap(encode: int | None, decode: int | None) -> None:
    cfg = small(f"objective.heads.encode_tap={encode or (0 if encode == 0 else 'null')}".replace("None", "null"))
    cfg.objective.heads.encode_tap, cfg.objective.heads.decode_tap = encode, decode
    model = filled(cfg)
    tokens, classes = batch()
    hidden = []
    handles = [
        block.register_forward_hook(lambda module, inputs, output: hidden.append(output)) for block in model.blocks
    ]
    handles.append(model.blocks[0].register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0])))
    output = model(tokens, classes, None)
    assert set(output) == {
        "logits",
        *(["encode"] if encode is not None else []),
        *(["decode"] if decode is not None else []),
    }
    for name, tap in (("encode", encode), ("decode", decode)):
        if tap is not None:
            head = getattr(model, f"{name}_align_mlp")
            assert torch.equal(output[name], head(hidden[tap][:, 2:]))
            assert output[name].shape == (5, 35, 16)
        assert any(name in weight for weight, _ in model.named_parameters()) == (tap is not None)


def test_sampling_without_heads_gives_the_same_logits() -> None:
    cfg = small()
    with_heads, without = filled(cfg), build_model(cfg, with_heads=False)
    weights_of_it = with_heads.state_dict()
    without.load_state_dict({name: weights_of_it[name] for name in without.state_dict()})
    tokens, classes = batch()
    assert torch.equal(with_heads(tokens, classes, None)["logits"], without(tokens, classes, None)["logits"])


def test_each_weight_starts_as_a_function_of_seed_and_name() -> None:
    deep, shallow, other = build_model(small()), build_model(small("model.depth=2")), build_model(small("objective=ar"))
    for model in (deep, shallow, other):
        model.init_weights(1)
    weights_of_it = dict(deep.named_parameters())
    for model in (shallow, other):
        assert all(torch.equal(weight, weights_of_it[name]) for name, weight in model.named_parameters())
    other.init_weights(2)
    assert not torch.equal(other.lm_head.weight, deep.lm_head.weight)
    assert abs(deep.lm_head.weight.std().item() - 0.02) < 0.001


def test_blocks_start_as_the_identity() -> None:
    model = build_model(small())
    model.init_weights(0)
    x, condition = torch.randn(2, 37, 32), torch.randn(2, 37, 32)
    assert torch.equal(model.blocks[1](x, condition, None), x)
    assert not model.cls_token.any()


def test_dropout_is_active_in_training_only() -> None:
    model = filled(small("model.dropout=0.5", "model.attn_dropout=0.5"))
    tokens, classes = batch()
    assert not torch.equal(model(tokens, classes, None)["logits"], model(tokens, classes, None)["logits"])
    model.eval()
    assert torch.equal(model(tokens, classes, None)["logits"], model(tokens, classes, None)["logits"])


def test_parameters_are_counted_exactly() -> None:
    cfg = config.load("rear_xl.yaml")
    parts = parameters_by_part(cfg)
    assert parts["without_heads"] == 955_425_024  # RAR-XL as released
    assert parts["heads"] == 2 * (1280 * 2048 + 2048 + 2048 * 256 + 256)
    assert sum(count for name, count in parts.items() if name not in ("total", "without_heads")) == parts["total"]
    model = build_model(small())
    assert parameters_by_part(small())["total"] == sum(weight.numel() for weight in model.parameters())


def test_flops_equal_the_counter_on_a_built_model() -> None:
    cfg = small()
    model = filled(cfg)
    tokens, classes = batch(1)
    with FlopCounterMode(display=False) as counter:
        output = model(tokens, classes, None)
    # The counter leaves CPU attention out; its formula is added.
    attention = cfg.model.depth * 2 * 37 * 38 * 32
    assert 3 * (counter.get_total_flops() + attention) == pytest.approx(train_flops_per_image(cfg), rel=1e-3)
    assert output["logits"].shape == (1, 36, 128)


@pytest.mark.parametrize(
    "name", ["rear_b.yaml", "official/rear_b.yaml", "ablation/rar_l_plain.yaml", "rear_alitok_b.yaml", "rear_titok_b64.yaml",
             "ablation/rear_table3_tied.yaml"],
)  # fmt: skip
def test_flops_of_every_family_equal_the_counter(name: str) -> None:
    cfg = config.load(
        name,
        [
            "model.depth=3", "model.width=64", "model.num_heads=4", "objective.heads.hidden=64",
            "objective.heads.encode_tap=1", "objective.heads.decode_tap=2", "model.attn_dropout=0",
        ],
    )  # fmt: skip
    model = build_model(cfg)
    model.set_codebook(torch.zeros(cfg.tokenizer.codebook_size, cfg.tokenizer.codebook_dim))
    N = cfg.tokenizer.num_tokens
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, N, dtype=torch.long), torch.zeros(1, dtype=torch.long), None)
    S = N + (cfg.model.architecture == "rar")
    # The encode head of the released form counts the last token, which is run through the blocks before it.
    longer = (cfg.objective.heads.positions == "all") * cfg.objective.heads.encode_tap
    attention = 2 * 64 * ((3 - longer) * S * (S + 1) + longer * (S + 1) * (S + 2))
    assert 3 * (counter.get_total_flops() + attention) == pytest.approx(train_flops_per_image(cfg), rel=1e-3)


def test_no_heads_cost_nothing() -> None:
    assert train_flops_per_image(small("objective=ar")) < train_flops_per_image(small())
    assert parameters_by_part(small("objective=ar"))["heads"] == 0
    assert HeadsConfig().encode_tap is None


def test_flops_count_modulation_once_per_distinct_class() -> None:
    """The counter runs 5 images of 3 classes; what it counts of each is what AdaLN costs with 3/5 of a row per image."""
    cfg = small()
    tokens, classes = batch()
    distinct, rows = classes.unique(return_inverse=True)
    counted = []
    for arguments in ((classes, None), (distinct, rows)):
        with FlopCounterMode(display=False) as counter:
            filled(cfg)(tokens, *arguments)
        counted.append(counter.get_total_flops())
    saved = 5 * (train_flops_per_image(cfg) - train_flops_per_image(cfg, 3 / 5))
    assert 3 * (counted[0] - counted[1]) == pytest.approx(saved, abs=5)  # each image rounded
    assert train_flops_per_image(small("model.conditioning=in_context"), 0.1) == train_flops_per_image(
        small("model.conditioning=in_context")
    )


@pytest.mark.parametrize(
    ("batch_size", "images", "classes", "dropped", "grouped"),
    [
        (2048, 256, 1000, 0.1, True),
        (2048, 32, 1000, 0.1, True),
        (2048, 256, 1000, 0.1, False),
        (4096, 64, 1000, 0.0, True),
        (512, 16, 100, 0.1, True),
        (512, 128, 100, 0.5, False),
        (64, 64, 10, 1.0, True),
    ],
)
def test_distinct_classes_are_those_of_drawn_batches(
    batch_size: int, images: int, classes: int, dropped: float, grouped: bool
) -> None:
    cfg = config.load(
        "rear_b.yaml",
        [
            f"train.global_batch_size={batch_size}", f"train.micro_batch_size={images}", f"model.num_classes={classes}",
            f"objective.class_dropout={dropped}", f"data.group_by_class={grouped}", "model.modulation=per_class",
        ],
    )  # fmt: skip
    draws, counts = torch.Generator().manual_seed(0), []
    for _ in range(60):
        labels = torch.randint(classes, (batch_size,), generator=draws)
        labels[torch.rand(batch_size, generator=draws) < dropped] = classes
        if grouped:
            labels = labels[group_by_class(labels, classes)]
        counts.append(sum(len(part.unique()) for part in labels.split(images)) / batch_size)
    assert distinct_classes_per_image(cfg) == pytest.approx(sum(counts) / len(counts), rel=0.02)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), 0.47),  # in micro-batches of 32
        (("train.micro_batch_size=256",), 0.415),
        (("data.group_by_class=false",), 1.0),  # too many of 32 to share
        (("data.group_by_class=false", "model.modulation=per_class"), 0.918),
        (("model.modulation=per_sample",), 1.0),
        (("model.conditioning=in_context",), 1.0),
    ],
)
def test_the_planned_share_of_distinct_classes_follows_the_config(overrides: tuple[str, ...], expected: float) -> None:
    cfg = config.load("rear_b.yaml", ["train.micro_batch_size=32", *overrides])
    assert distinct_classes_per_image(cfg) == pytest.approx(expected, abs=0.02)
