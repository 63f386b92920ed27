"""Weight files of the released generators in and out, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from helpers import run_alone, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from rear_scale import config
from rear_scale.checkpoint import released as official
from rear_scale.checkpoint import released_config as published
from rear_scale.checkpoint import released_trainer as accelerate
from rear_scale.checkpoint.convert import convert
from rear_scale.checkpoint.open import open_source
from rear_scale.config import InputError
from rear_scale.model import build_model
from rear_scale.optim.groups import decays
from rear_scale.train import dry_run, start
from rear_scale.train.loop import Hooks, train
from rear_scale.train.setup import check_data
from rear_scale.world import Ranks

SMALL = ["model.depth=2", "model.width=32", "model.num_heads=2", "model.mlp_width=48", "model.num_classes=7"]


def weights_of(name: str, *overrides: str) -> dict[str, Tensor]:
    """Drawn weights of a small model of a config, by official names."""
    model = build_model(config.load(name, [*SMALL, "objective.heads.decode_tap=2", *overrides]))
    model.init_weights(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def released_rar() -> dict[str, Tensor]:
    return weights_of("rar_b.yaml", "objective.heads.decode_tap=null")


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pth"])
def test_official_keys_survive_export_and_load_bitwise(tmp_path: Path, suffix: str) -> None:
    for number, weights in enumerate(
        (
            released_rar(),
            weights_of("official/rear_b.yaml"),
            weights_of("ar_alitok_b.yaml", "objective.heads.decode_tap=null"),
        )
    ):
        given, written = tmp_path / f"given{number}.{suffix}", tmp_path / f"written{number}.{suffix}"
        official.write(given, weights)
        convert(given, None, [], "official", written)
        found = official.read_weights(written, "x")
        assert list(found) == list(weights) if suffix != "safetensors" else found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_parameters_come_in_the_released_order() -> None:
    """The released optimizer states number parameters by it."""
    for name in ("rar_b", "rear_s"):
        listed = json.loads((Path(__file__).parent / f"golden/state_dict_keys_{name}.json").read_text())["state_dict"]
        with torch.device("meta"):
            model = build_model(config.load("rar_b.yaml" if name == "rar_b" else "official/rear_s.yaml"))
        assert list(model.state_dict()) == list(listed)


@pytest.mark.parametrize(
    ("name", "heads", "expected"),
    [
        ("rar_b.yaml", ["objective.heads.decode_tap=null"], ("rar", None, 1024, 256)),
        ("official/rear_b.yaml", [], ("rar", "released", 1024, 256)),
        ("rear_titok_b64.yaml", [], ("rar", "paper", 4096, 64)),
        ("rar_alitok_b.yaml", ["objective.heads.decode_tap=null"], ("alitok", None, 4096, 273)),
        ("rear_alitok_b.yaml", ["objective.heads.shared=true"], ("alitok", "paper", 4096, 273)),
        ("ablation/rar_table3_z_curve.yaml", ["objective.heads.decode_tap=null"], ("rar", None, 1024, 256)),
    ],
)
def test_a_file_tells_its_config(name: str, heads: list[str], expected: tuple) -> None:
    weights = weights_of(name, *heads)
    cfg = published.config_of_weights(weights, "file")
    architecture, form, codes, tokens = expected
    assert (cfg.model.architecture, cfg.tokenizer.codebook_size, cfg.tokenizer.num_tokens) == (
        architecture,
        codes,
        tokens,
    )
    assert (cfg.model.depth, cfg.model.width, cfg.model.num_heads, cfg.model.num_classes) == (2, 32, 2, 7)
    if form:
        assert cfg.objective.heads.form == form
    model = build_model(cfg)
    left = official.load(weights, model, "file", heads_optional=True)
    assert all(official.is_head(parameter) for parameter in left)
    # What an AliTok or RAR file had besides the heads is all there.
    assert {n for n in weights if not official.is_head(n)} == {n for n in model.state_dict() if not official.is_head(n)}


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    weights = released_rar()
    model = build_model(config.load("rar_b.yaml", SMALL))

    def message(changed: dict[str, Tensor], **options: bool) -> str:
        with pytest.raises(InputError) as caught:
            official.load(changed, model, "FILE", **{"heads_optional": True, **options})
        return str(caught.value)

    lacking = {name: value for name, value in weights.items() if name != "lm_head.weight"}
    assert "FILE lacks lm_head.weight" in message(lacking)
    assert "has extra" in message({**weights, "extra": torch.zeros(1)})
    wrong = {**weights, "cls_token": torch.zeros(1, 1, 16)}
    assert "cls_token [1, 1, 16] instead of [1, 1, 32]" in message(wrong)
    assert "align_mlp" in message(weights_of("official/rear_b.yaml"), heads_optional=False)
    with pytest.raises(InputError, match="does not hold a generator of RAR, reAR or AliTok"):
        published.config_of_weights({"encoder.weight": torch.zeros(1)}, "FILE")
    with pytest.raises(InputError, match=r"lacks blocks\.0\.attn\.q_norm\.weight"):
        official.infer({n: v for n, v in weights.items() if "q_norm" not in n}, "FILE")


def test_damaged_and_hostile_files_are_one_clear_error(tmp_path: Path) -> None:
    whole = tmp_path / "rar.bin"
    official.write(whole, released_rar())
    for name in ("cut.bin", "cut.safetensors"):
        (tmp_path / name).write_bytes(whole.read_bytes()[:1000])
        with pytest.raises(InputError, match="it may be damaged"):
            official.read_weights(tmp_path / name, "--checkpoint")
    with pytest.raises(InputError, match="not found: --checkpoint"):
        official.read_weights(tmp_path / "absent.bin", "--checkpoint")

    class Hostile:
        def __reduce__(self):
            return (Path.write_text, (tmp_path / "harm", "done"))

    (tmp_path / "hostile.pth").write_bytes(pickle.dumps(Hostile()))
    torch.save({"a": Hostile()}, tmp_path / "hostile.bin")
    for name in ("hostile.pth", "hostile.bin"):
        with pytest.raises(InputError, match="holds more than tensors"):
            official.read_weights(tmp_path / name, "--checkpoint")
    assert not (tmp_path / "harm").exists()
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "nested.bin")
    with pytest.raises(InputError, match="does not hold tensors by name"):
        official.read_weights(tmp_path / "nested.bin", "--checkpoint")


@pytest.mark.parametrize("order", ["row_major", "z_curve"])
def test_merged_tables_predict_the_same_in_their_order(tmp_path: Path, order: str) -> None:
    overrides = [f"objective.permutation.order={order}", "tokenizer.grid=[4,4]", "objective.heads.decode_tap=null"]
    overrides += ["tokenizer.num_tokens=16"]
    weights = weights_of("rar_b.yaml", *overrides)
    official.write(tmp_path / "rar.bin", weights)
    convert(tmp_path / "rar.bin", None, overrides[:2], "merged", tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    assert not merged["target_aware_pos_embed"].any()
    cfg = config.load("rar_b.yaml", [*SMALL, *overrides])
    tokens, classes = torch.randint(1024, (3, 16)), torch.tensor([0, 6, 7])
    from rear_scale.objective.permutation import fixed_order

    outputs = []
    for values in (weights, merged):
        model = build_model(cfg).eval()
        model.load_state_dict(values)
        outputs.append(model(tokens, classes, None, fixed_order(order, cfg.tokenizer, tokens.device))["logits"])
    assert torch.allclose(*outputs, atol=1e-5)


def test_a_model_of_random_orders_is_not_merged(tmp_path: Path) -> None:
    official.write(tmp_path / "rar.bin", released_rar())
    always = ["objective.permutation.start=1", "objective.permutation.end=1"]
    with pytest.raises(InputError, match="means random orders of prediction"):
        convert(tmp_path / "rar.bin", None, always, "merged", tmp_path / "merged.bin")
    assert not (tmp_path / "merged.bin").exists()


def trained(tmp_path: Path, tokens: Path, *overrides: str) -> config.ExperimentConfig:
    cfg = tiny_config(tmp_path, tokens, "strategy=single", *overrides)

    def run(world):
        data = check_data(cfg, world.ranks)
        return train(cfg, data.plan, world, *data.open(world), Hooks())

    run_alone(run)
    return cfg


def test_a_run_becomes_one_file_and_a_file_a_checkpoint(tmp_path: Path, tokens: Path) -> None:
    cfg = trained(tmp_path, tokens)
    run = Path(cfg.run.dir)
    convert(run, None, [], "consolidated", tmp_path / "all.safetensors")
    convert(tmp_path / "all.safetensors", None, [], "portable", tmp_path / "step_00000012")
    convert(run, None, [], "portable", tmp_path / "copy")
    first, one, folder, copy = (
        open_source(path) for path in (run, tmp_path / "all.safetensors", tmp_path / "step_00000012", tmp_path / "copy")
    )
    for source in (one, folder, copy):
        assert source.step == 12
        assert sorted(source.names()) == sorted(first.names())
        for name in first.names():
            assert torch.equal(source.reader("param")(name), first.reader("param")(name))
    assert torch.equal(copy.reader("exp_avg")("lm_head.weight"), first.reader("exp_avg")("lm_head.weight"))
    # Heads of the paper's form are unknown to the released loaders: they stay behind.
    convert(run, None, [], "official", tmp_path / "official.bin")
    written = official.read_weights(tmp_path / "official.bin", "x")
    assert written.keys() == {name for name in first.names() if not official.is_head(name)}
    with pytest.raises(InputError, match="exists"):
        convert(run, None, [], "official", tmp_path / "official.bin")


def test_a_run_starts_from_official_weights_with_fresh_heads(tmp_path: Path, tokens: Path) -> None:
    plain = build_model(tiny_config(tmp_path, tokens, "objective=ar"))
    plain.init_weights(11)
    official.write(tmp_path / "ar.bin", plain.state_dict())
    cfg = tiny_config(tmp_path, tokens, f"train.init_from={tmp_path / 'ar.bin'}")
    start.check(cfg)
    model = build_model(cfg)
    run_alone(lambda world: start.first_weights(cfg, model, world))
    drawn = build_model(cfg)
    drawn.init_weights(cfg.run.seed)
    for name, weight in model.named_parameters():
        expected = dict(drawn.named_parameters() if official.is_head(name) else plain.named_parameters())[name]
        assert torch.equal(weight, expected), name
    with pytest.raises(InputError, match="not found: train.init_from"):
        start.check(tiny_config(tmp_path, tokens, "train.init_from=nowhere.bin"))


def released_folder(folder: Path, cfg: config.ExperimentConfig, updates: int) -> dict[str, Tensor]:
    """A checkpoint-N folder as the released trainers leave it, after `updates` updates on fixed gradients."""
    model = build_model(cfg)
    model.init_weights(5)
    named = dict(model.named_parameters())
    no_decay = [w for name, w in named.items() if not decays(name, w, "released")]
    decay = [w for name, w in named.items() if decays(name, w, "released")]
    optimizer = torch.optim.AdamW(
        [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": 0.03}], lr=1e-3, betas=(0.9, 0.96)
    )
    for update in range(updates):
        for name, weight in named.items():
            weight.grad = torch.full_like(weight, 0.01 * (update + 1) * (1 + len(name)))
        optimizer.step()
    (folder / "unwrapped_model").mkdir(parents=True)
    torch.save(model.state_dict(), folder / "unwrapped_model/pytorch_model.bin")
    torch.save(optimizer.state_dict(), folder / "optimizer.bin")
    (folder / "metadata.json").write_text(json.dumps({"global_step": updates}))
    return {name: optimizer.state[weight]["exp_avg"] for name, weight in named.items()}


def test_a_released_checkpoint_goes_on_with_its_optimizer(tmp_path: Path, tokens: Path) -> None:
    released = tmp_path / "checkpoint-4"
    moments = released_folder(released, tiny_config(tmp_path, tokens), 4)
    read = accelerate.read_checkpoint(released, lambda name, weight: decays(name, weight, "released"))
    assert read.step == 4
    assert all(torch.equal(read.tensors["exp_avg"][name], moments[name]) for name in moments)
    cfg = trained(tmp_path, tokens, f"train.init_from={released}")
    steps = [json.loads(line)["step"] for line in (Path(cfg.run.dir) / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(5, 13))
    convert(released, str(tmp_path / "tiny.yaml"), [], "portable", tmp_path / "portable")
    assert open_source(tmp_path / "portable").meta["optimizer_step"] == 4


def test_a_released_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, tokens: Path) -> None:
    released = tmp_path / "checkpoint-4"
    released_folder(released, tiny_config(tmp_path, tokens), 4)
    with pytest.raises(InputError, match="instead of"):
        trained(tmp_path, tokens, f"train.init_from={released}", "model.width=64")
    (released / "optimizer.bin").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"optimizer\.bin cannot be read"):
        accelerate.read_checkpoint(released, lambda name, weight: True)


RELEASED_YAML = """
experiment: {name: rear-b}
model:
  vq_model: {model_type: maskgitvq, codebook_size: 1024, token_size: 256}
  generator: {hidden_size: 768, num_hidden_layers: 24, num_attention_heads: 16, intermediate_size: 3072, dropout: 0.1,
    attn_drop: 0.1, class_label_dropout: 0.1, image_seq_len: 256, condition_num_classes: 1000, guidance_scale: 15.0,
    guidance_scale_pow: 2.5, randomize_temperature: 1.0, randomness_anneal_start: 0, randomness_anneal_end: 187500,
    transition_alignment: true, transition_alignment_weight: 0.5, encode_align_layer_idx: 0, decode_align_layer_idx: 17}
optimizer: {params: {learning_rate: 2.0e-4, weight_decay: 0.05}}
training: {per_gpu_batch_size: 128, max_train_steps: 250000}
"""


def test_a_released_yaml_gives_the_shapes(tmp_path: Path) -> None:
    path = tmp_path / "rear_b.yaml"
    path.write_text(RELEASED_YAML)
    assert published.is_released_yaml(path)
    assert not published.is_released_yaml(config.CONFIG_DIR / "rear_b.yaml")
    cfg = published.config_of_yaml(path, ["optim.lr=1e-4"])
    assert (cfg.model.depth, cfg.model.width, cfg.model.num_heads, cfg.model.mlp_width) == (24, 768, 16, 3072)
    heads = cfg.objective.heads
    assert (heads.encode_tap, heads.decode_tap, heads.weight, heads.form) == (1, 18, 0.5, "released")
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.train.micro_batch_size) == (1e-4, 0.05, 128)
    assert (cfg.sample.guidance.scale, cfg.sample.guidance.power) == (15.0, 2.5)
    assert config.derive(cfg, 8, None).noise_end_step == 187_500
    path.write_text("model: {generator: {hidden_size: 8}}")
    with pytest.raises(InputError, match="has no num_hidden_layers"):
        published.config_of_yaml(path)


def test_a_weight_file_is_a_source(tmp_path: Path) -> None:
    weights = released_rar()
    save_file(weights, tmp_path / "rar_b.safetensors")
    source = open_source(tmp_path / "rar_b.safetensors")
    assert source.step == 0
    assert torch.equal(source.reader("param")("lm_head.bias"), weights["lm_head.bias"])
    assert source.meta["config"]["sample"]["guidance"]["scale"] == 16
    with pytest.raises(InputError, match="holds weights alone"):
        source.reader("exp_avg")
    with pytest.raises(InputError, match=r"not found: --checkpoint .*nowhere"):
        open_source(tmp_path / "nowhere")


def test_missing_first_weights_are_named_before_anything_starts(tmp_path: Path, tokens: Path, capsys) -> None:
    cfg = tiny_config(tmp_path, tokens, "train.init_from=nowhere.bin", "strategy=single")
    ranks = Ranks(0, 0, 1, 1, None, None, "single")
    with pytest.raises(InputError, match=r"not found: train\.init_from=nowhere\.bin"):
        check_data(cfg, ranks)
    dry_run.show(cfg, ranks)
    assert "not found: train.init_from=nowhere.bin" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"model\.kernel=flash cannot run"):
        check_data(tiny_config(tmp_path, tokens, "model.kernel=flash", "strategy=single"), ranks)
