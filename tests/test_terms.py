"""Terms of the loss that a file of the user's adds (own_term.py), through training, validation, resuming and sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import own_term  # registers them
import pytest
import torch
from helpers import (
    CODEBOOK_SIZE,
    NUM_TOKENS,
    TIMES,
    metrics,
    run_alone,
    tiny_config,
    tiny_config_file,
    write_token_shards,
)

from rear_scale.checkpoint.convert import convert
from rear_scale.checkpoint.open import open_source
from rear_scale.checkpoint.restore import load_generator_weights
from rear_scale.config import ExperimentConfig, InputError, check_resumable, load, to_dict
from rear_scale.model import build_model
from rear_scale.model.activations import head_activation_bytes
from rear_scale.model.flops import parameters_by_part, train_flops_per_image
from rear_scale.objective import terms
from rear_scale.train import setup
from rear_scale.train.loop import Hooks, train
from rear_scale.train.validation import Validation
from rear_scale.world import World, discover

OWN = ("objective.terms.z.weight=1e-3", "objective.terms={smooth: {weight: 0.5, tap: 2}, ahead: {}}")
NAMES = ["loss", "loss_ar", "loss_encode", "loss_decode", "loss_ahead", "loss_smooth", "loss_z", "accuracy", "log_z"]
HEAD = ["term_heads.ahead.weight", "term_heads.ahead.bias"]


def _train(cfg: ExperimentConfig) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, without times."""

    def run(world: World) -> int:
        data = setup.check_data(cfg, discover({}))
        read, codebook = data.open(world)
        hooks = Hooks()
        if cfg.data.val:
            hooks.validate.append(Validation(cfg, data.open_val(world), codebook, world))
        return train(cfg, data.plan, world, read, codebook, hooks)

    run_alone(run)
    return [{name: value for name, value in line.items() if name not in TIMES} for line in metrics(Path(cfg.run.dir))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> tuple[ExperimentConfig, list[dict[str, Any]]]:
    """A run of four steps that ended after two and went on, and its metrics."""
    folder = tmp_path_factory.mktemp("own")
    val = write_token_shards(folder / "val", 13, seed=5)
    settings = ("strategy=single", "train.total_steps=4", "checkpoint.every_steps=2", "train.val_every=2")
    cfg = tiny_config(folder, tokens, *settings, f"data.val={val}", *OWN)
    _train(tiny_config(folder, tokens, *settings, f"data.val={val}", *OWN, "train.stop_at_step=2"))
    return cfg, _train(cfg)


def test_metrics_and_validation_carry_every_term_by_its_name(trained, tmp_path: Path, tokens: Path) -> None:
    cfg, lines = trained
    first, second = lines[:2]
    assert list(first)[2 : 2 + len(NAMES)] == NAMES
    for line, at in ((first, ""), (second, "val_")):
        parts = sum(line[f"{at}loss_{name}"] for name in ("ar", "encode", "decode", "ahead"))
        expected = parts + 0.5 * line[f"{at}loss_smooth"] + 1e-3 * line[f"{at}loss_z"]
        assert line[f"{at}loss"] == pytest.approx(expected, rel=1e-6)
    assert [name for name in second if name.startswith("val_")] == [
        *(f"val_{name}" for name in NAMES if name not in ("accuracy", "log_z")), "val_log_z", "val_ctr", "val_ctr_noisy"
    ]  # fmt: skip
    # And they are trained on, while the others start as without them.
    assert lines[-1]["loss_ahead"] < first["loss_ahead"]
    plain = _train(tiny_config(tmp_path, tokens, "strategy=single", "train.stop_at_step=1"))[0]
    assert [plain[name] for name in NAMES[1:4]] == [first[name] for name in NAMES[1:4]]
    assert [name for name in plain if "loss" in name] == NAMES[:4]


def test_a_run_with_own_terms_resumes_to_the_bit(trained, tmp_path: Path, tokens: Path) -> None:
    cfg, lines = trained
    (tmp_path / "again").mkdir()
    whole = tiny_config(
        tmp_path / "again", tokens, "strategy=single", "train.total_steps=4", "train.val_every=2",
        f"data.val={cfg.data.val}", *OWN,
    )  # fmt: skip
    assert _train(whole) == lines


def test_terms_are_set_by_a_file_and_by_overrides_and_stay_on_resume(tmp_path: Path, tokens: Path) -> None:
    path = tiny_config_file(tmp_path, tokens)
    plain = load(str(path))
    path.write_text(path.read_text().replace("hidden: 32}", "hidden: 32}, terms: {z: {weight: 0.1}}"))
    with_z = load(str(path), ["objective.terms.smooth.tap=2"])
    assert with_z.objective.terms == {"z": {"weight": 0.1}, "smooth": {"tap": 2}}
    for now, before, message in (
        (
            load(str(path)),
            with_z,
            "objective.terms.smooth.tap=None, but x was trained with objective.terms.smooth.tap=2",
        ),
        (load(str(path)), plain, "objective.terms.z.weight=0.1, but x was trained with objective.terms.z.weight=None"),
        (plain, load(str(path)), "objective.terms.z.weight=None, but x was trained with objective.terms.z.weight=0.1"),
    ):
        with pytest.raises(InputError, match=message):
            check_resumable(now, to_dict(before), "x")
    allowed = load(str(path), ["resume.allow=[objective.terms]"])
    check_resumable(allowed, to_dict(plain), "x")


def test_heads_of_terms_are_saved_and_left_out_of_sampling(
    trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, _ = trained
    found = open_source(Path(cfg.run.dir))
    assert set(HEAD) < set(found.names())
    assert found.reader("exp_avg")(HEAD[0]).any()
    # Without the file that registers them, the model still samples, and becomes a file of the released form.
    for name in ("z", "smooth", "ahead"):
        monkeypatch.delitem(terms._TERMS, name)
    model = build_model(cfg, with_heads=False)
    load_generator_weights(open_source(Path(cfg.run.dir)), model)
    assert not set(HEAD) & set(model.state_dict())
    convert(Path(cfg.run.dir), None, [], "official", tmp_path / "official.safetensors")
    with pytest.raises(InputError, match=r"objective.terms.z is not a registered term \(there are none\)"):
        build_model(cfg)


def test_parameters_flops_and_memory_count_heads_of_terms(tmp_path: Path, tokens: Path) -> None:
    with_it, without = (tiny_config(tmp_path, tokens, *more) for more in (("objective.terms.ahead={}",), ()))
    heads = parameters_by_part(with_it)["heads"] - parameters_by_part(without)["heads"]
    assert heads == 32 * CODEBOOK_SIZE + CODEBOOK_SIZE
    flops = train_flops_per_image(with_it) - train_flops_per_image(without)
    assert flops == 3 * 2 * NUM_TOKENS * 32 * CODEBOOK_SIZE
    kept = head_activation_bytes(with_it) - head_activation_bytes(without)
    assert kept >= 4 * with_it.train.micro_batch_size * NUM_TOKENS * CODEBOOK_SIZE  # its logits in float32


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "objective.terms.zz={}",
            r"terms.zz is not a registered term \(ahead, smooth, z\).* leave it out; did you mean z\?",
        ),
        ("objective.terms.encode.weight=2", "encode is part of every loss and has no settings here"),
        ("objective.terms.z.wieght=2", r"z.wieght is not a setting of that term; did you mean weight\?"),
        ("objective.terms.z.weight=much", "objective.terms.z.weight=much is of the wrong type: it takes a number"),
        ("objective.terms.z.weight=inf", "objective.terms.z.weight=inf is not finite"),
        ("objective.terms.smooth.tap=3", r"smooth reads features after 3 blocks, outside 0..model.depth=2"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(tmp_path: Path, tokens: Path, override: str, message: str) -> None:
    cfg = tiny_config(tmp_path, tokens, "strategy=single", override)
    with pytest.raises(InputError, match=message) as raised:
        setup.check_data(cfg, discover({}))
    assert "\n" not in str(raised.value)


def test_names_are_registered_once() -> None:
    with pytest.raises(ValueError, match="a term 'z' cannot be registered: the name is taken"):
        terms.register(own_term.ZLoss)


def test_a_head_starts_as_a_function_of_seed_and_name(tmp_path: Path, tokens: Path) -> None:
    models = [
        build_model(tiny_config(tmp_path, tokens, *more)) for more in (OWN, OWN[:1], ("objective.terms.ahead={}",))
    ]
    for model in models:
        model.init_weights(3)
    first, _, third = (dict(model.named_parameters()) for model in models)
    assert torch.equal(first[HEAD[0]], third[HEAD[0]])
    assert "term_heads.ahead.weight" not in dict(models[1].named_parameters())
    assert torch.equal(first["lm_head.weight"], third["lm_head.weight"])
