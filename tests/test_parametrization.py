from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_alone, run_ranks, tiny_config
from test_parallel import QUIET, build, run_steps
from torch.func import functional_call
from torch.nn import functional as F

from rear_scale.checkpoint import released as official
from rear_scale.checkpoint.convert import convert
from rear_scale.checkpoint.folder import open_checkpoint
from rear_scale.checkpoint.writer import save
from rear_scale.config import ExperimentConfig, InputError, check_resumable, load, to_dict
from rear_scale.model import Generator, build_model, meta_model
from rear_scale.optim.groups import Rule, make_optimizer, rules_of, set_rates
from rear_scale.optim.parametrization import kind_of, scale_initial_weights, scale_of
from rear_scale.train import start
from rear_scale.world import Ranks, World

CPU = torch.device("cpu")
MUP = ["optim.parametrization=mup", "optim.base_width=16"]  # the tiny model is twice as wide


def kinds(cfg: ExperimentConfig) -> dict[str, str]:
    return {name: kind_of(name, weight, cfg) for name, weight in meta_model(cfg).named_parameters()}


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        (
            "rear_s.yaml",
            [],
            {
                "output": r"lm_head\.weight|(en|de)code_align_mlp\.0\.weight",
                "queries": r"blocks\.\d+\.attn\.q_norm\.(weight|bias)",
                "hidden": r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12]|adaLN_modulation\.1)\.weight"
                r"|adaln_before_head\.adaLN_modulation\.1\.weight",
            },
        ),
        # A head whose own width is the model's is no matrix that grows.
        (
            "rear_s.yaml",
            ["objective.heads.hidden=768"],
            {"output": r"lm_head\.weight|(en|de)code_align_mlp\.0\.weight"},
        ),
        ("official/rear_s.yaml", [], {"output": r"lm_head\.weight|(en|de)code_align_mlp\.0\.weight"}),
        (
            "rear_alitok_b.yaml",
            [],
            {
                "output": r"output\.weight|(en|de)code_align_mlp\.0\.weight",
                "queries": r"blocks\.\d+\.attn\.q_norm\.weight",
                "hidden": r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.w[123])\.weight",
            },
        ),
        ("ar_s.yaml", ["model.tie_codebook=output"], {"output": r"codebook_proj\.weight"}),
        ("ar_s.yaml", ["model.tie_codebook=input"], {"output": r"lm_head\.weight"}),
    ],
)
def test_each_parameter_has_its_kind(name: str, overrides: list[str], expected: dict[str, str]) -> None:
    found = kinds(load(name, overrides))
    for kind, pattern in expected.items():
        assert {one for one in found if found[one] == kind} == {one for one in found if re.fullmatch(pattern, one)}
        assert kind in found.values()
    assert {"input", "output", "queries", "hidden"} == set(found.values())


def test_the_factors_are_those_of_the_table() -> None:
    cfg = load("rear_2b.yaml", ["optim.parametrization=mup", "optim.base_num_heads=16"])
    weights = dict(meta_model(cfg).named_parameters())

    def factors(name: str, **options: float) -> tuple[float, float]:
        scale = scale_of(name, weights[name], cfg, **options)
        return scale.init, scale.rate

    n = 1792 / 1024
    assert factors("embeddings.weight") == factors("pos_embed") == factors("blocks.0.mlp.fc1.bias") == (1, 1)
    assert factors("blocks.0.attn.k_norm.weight") == factors("decode_align_mlp.2.weight") == (1, 1)
    assert factors("blocks.3.attn.qkv.weight") == pytest.approx((n**-0.5, 1 / n))
    assert factors("blocks.3.attn.qkv.weight", width_exponent=0.0) == pytest.approx((n**-0.5, 1))
    assert factors("lm_head.weight") == pytest.approx((1 / n, 1 / n))
    # Heads of 128 beside 1024 / 16 = 64: 1 / d instead of 1 / sqrt(d), equal at 64.
    assert factors("blocks.3.attn.q_norm.bias") == pytest.approx((0.5**0.5, 0.5**0.5))


def test_the_base_width_is_the_standard_model_and_decay_times_rate_stays(tmp_path: Path, tokens: Path) -> None:
    standard = tiny_config(tmp_path, tokens)
    base = tiny_config(tmp_path, tokens, "optim.parametrization=mup", "optim.base_width=32")
    wider = tiny_config(tmp_path, tokens, *MUP)
    world = World(Ranks(0, 0, 1, 1, None, None, "single"), CPU)
    first, *others = (weights_of_start(cfg, world) for cfg in (standard, base, wider))
    assert all(torch.equal(others[0][name], value) for name, value in first.items())
    factors = {"input": 1, "hidden": 0.5**0.5, "output": 0.5, "queries": 0.5**0.5}
    kind = kinds(wider)
    for name, value in first.items():
        assert torch.allclose(others[1][name], value * factors[kind[name]], rtol=1e-6, atol=0), name
    model = meta_model(standard)
    assert rules_of(model, standard) == rules_of(model, base)
    rules = rules_of(model, wider)
    assert sorted({rule.lr_multiplier for rule in rules.values()}) == pytest.approx([0.5, 0.5**0.5, 1.0])
    for name, rule in rules_of(model, standard).items():
        assert rules[name].lr_multiplier * rules[name].weight_decay == pytest.approx(rule.weight_decay), name


def weights_of_start(cfg: ExperimentConfig, world: World) -> dict[str, torch.Tensor]:
    model = build_model(cfg)
    start.first_weights(cfg, model, world)
    return dict(model.named_parameters())


def test_the_scales_in_the_weights_are_multipliers_of_the_forward_pass(tmp_path: Path, tokens: Path) -> None:
    """Table 8 of the paper multiplies the logits by 1 / n and leaves the output matrix as it is, and the queries likewise. The
    rules here must give the same losses without a factor in the forward pass."""
    cfg = tiny_config(tmp_path, tokens, *QUIET, *MUP)
    model = build_model(cfg).double()
    model.init_weights(0)
    scale_initial_weights(model, cfg)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "adaLN" in name:  # zero at first, and a zero gate hides whatever is behind it
                weight.fill_(0.02)
    scales = {name: scale_of(name, weight, cfg) for name, weight in model.named_parameters()}
    factors = {name: scale.init for name, scale in scales.items() if scale.kind in ("output", "queries")}
    raw = {name: (value / factors.get(name, 1)).detach() for name, value in model.named_parameters()}
    ours = losses_of(model, {}, rules_of(model, cfg), cfg)
    plain = replace(cfg, optim=replace(cfg.optim, parametrization="standard"))
    rules = rules_of(model, plain)
    for name, scale in scales.items():
        if scale.kind == "hidden":
            rules[name] = replace(rules[name], lr_multiplier=0.5, weight_decay=2 * rules[name].weight_decay)
    model.load_state_dict(raw)
    with_multipliers = losses_of(model, factors, rules, plain)
    model.load_state_dict(raw)
    without = losses_of(model, {}, rules, plain)
    assert with_multipliers == pytest.approx(ours, rel=1e-5)
    assert without[-1] != pytest.approx(ours[-1], rel=1e-3)


def losses_of(
    model: Generator, factors: dict[str, float], rules: dict[str, Rule], cfg: ExperimentConfig
) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(cfg.tokenizer.codebook_size, (4, cfg.tokenizer.num_tokens), generator=generator)
    classes = torch.arange(4)
    target = torch.randn(4, cfg.tokenizer.num_tokens - 1, cfg.tokenizer.codebook_dim, generator=generator).double()
    optimizer = make_optimizer(model, rules, cfg.optim, CPU)
    losses = []
    for _ in range(6):
        weights = {name: weight * factors.get(name, 1) for name, weight in model.named_parameters()}
        output = functional_call(model, weights, (tokens, classes))
        loss = F.cross_entropy(output["logits"].flatten(0, 1), tokens.flatten())
        for head in ("encode", "decode"):
            loss = loss + (1 - F.cosine_similarity(output[head], target, dim=-1)).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        set_rates(optimizer, 1e-2)
        optimizer.step()
    return losses


def _train(world: World, cfg: ExperimentConfig, root: Path) -> list[tuple[float, float]]:
    strategy = build(world, cfg)
    results = run_steps(world, cfg, strategy, 1, 4)
    save(root, 4, strategy, world, {"optimizer_step": 4, "config": to_dict(cfg)}, cfg.checkpoint)
    return results


def _train_each(world: World, folder: Path, tokens: Path, names: tuple[str, ...]) -> dict[str, list]:
    return {
        name: _train(world, tiny_config(folder, tokens, *QUIET, *MUP, f"strategy={name}"), folder / name)
        for name in names
    }


def test_every_strategy_trains_the_same_and_the_released_form_predicts_the_same(tmp_path: Path, tokens: Path) -> None:
    cfg = tiny_config(tmp_path, tokens, *QUIET, *MUP, "strategy=single")
    expected = run_alone(_train, cfg, tmp_path / "single")
    standard = run_alone(
        _train, replace(cfg, optim=replace(cfg.optim, parametrization="standard")), tmp_path / "standard"
    )
    assert standard[-1][0] != pytest.approx(expected[-1][0], rel=1e-3)
    for name, found in run_ranks(2, _train_each, tmp_path, tokens, ("fsdp2", "zero1"))[0].items():
        assert np.array(found) == pytest.approx(np.array(expected), rel=1e-5), name

    saved = open_checkpoint(tmp_path / "single/step_00000004")
    with pytest.raises(InputError, match=r"optim.parametrization=standard, but .* was trained with optim.paramet"):
        check_resumable(
            replace(cfg, optim=replace(cfg.optim, parametrization="standard")), saved.meta["config"], "step_4"
        )
    read = saved.reader("param")
    ours, theirs = build_model(cfg, with_heads=False), build_model(load("rar_s.yaml", small(cfg)), with_heads=False)
    official.load({name: read(name) for name in saved.names()}, ours, "ours", heads_optional=True)
    convert(saved.path, None, [], "official", tmp_path / "official.safetensors")
    written = official.read_weights(tmp_path / "official.safetensors", "x")
    official.load(written, theirs, "official", heads_optional=True)
    batch = (torch.randint(32, (3, 16), generator=torch.Generator().manual_seed(0)), torch.arange(3))
    assert torch.equal(ours.eval()(*batch)["logits"], theirs.eval()(*batch)["logits"])


def small(cfg: ExperimentConfig) -> list[str]:
    """A published config with the shape of the tiny one: what a reader of the released form knows."""
    model, tokenizer = cfg.model, cfg.tokenizer
    shape = {f"model.{name}": getattr(model, name) for name in ("depth", "width", "num_heads", "num_classes")}
    shape |= {f"tokenizer.{name}": getattr(tokenizer, name) for name in ("num_tokens", "codebook_size", "codebook_dim")}
    return ["tokenizer.grid=null", *(f"{name}={value}" for name, value in shape.items())]


def test_a_projection_that_is_input_and_output_is_refused() -> None:
    with pytest.raises(InputError, match=r"optim.parametrization=mup does not work with model.tie_codebook=both"):
        load("ar_s.yaml", ["optim.parametrization=mup", "model.tie_codebook=both"])


@pytest.mark.parametrize("size", ["xl", "xxl", "2b", "3b", "7b"])
def test_the_configs_beyond_l_keep_its_heads_and_differ_in_nothing_else(size: str) -> None:
    cfg, plain = load(f"rear_{size}_mup.yaml"), load(f"rear_{size}.yaml")
    head_widths = cfg.optim.base_width / (cfg.optim.base_num_heads or cfg.model.num_heads)
    assert (cfg.optim.parametrization, cfg.optim.base_width, head_widths) == ("mup", 1024, 64)
    assert replace(cfg, optim=plain.optim, run=plain.run) == plain
