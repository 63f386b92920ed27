"""YAMLs of the released trainers: every key is taken over, refused by name, or known to change nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rear_scale import config
from rear_scale.checkpoint import released_yaml as trainer_yaml
from rear_scale.checkpoint.open import load_config
from rear_scale.config import InputError
from rear_scale.config.values import leaves

RATE = "${optimizer.params.learning_rate}"


def form(
    generator: dict[str, Any], vq_model: dict[str, Any], batch: tuple[int, int], **experiment: Any
) -> dict[str, Any]:
    """The keys and values of a released YAML; numbers as texts, as PyYAML alone would read them (4e-4)."""
    return {
        "experiment": {
            "project": "p", "name": "mine", "max_train_examples": "1_281_167", "save_every": "50_000", "eval_every": 50000,
            "generate_every": 5000, "log_every": 50, "log_grad_norm_every": 1000, "resume": True, **experiment,
        },
        "model": {
            "vq_model": vq_model,
            "generator": {
                "hidden_size": 768, "num_hidden_layers": 24, "num_attention_heads": 16, "dropout": 0.1, "attn_drop": 0.1,
                "class_label_dropout": 0.1, "condition_num_classes": 1000, "randomize_temperature": 1.0,
                "use_checkpoint": False, **generator,
            },
        },
        "dataset": {
            "params": {
                "pretokenization": "tokens.jsonl", "train_shards_path_or_url": "train/{0000..0252}.tar",
                "eval_shards_path_or_url": "val/{0000..0009}.tar", "num_workers_per_gpu": 12,
            },
            "preprocessing": {"resize_shorter_edge": 256, "crop_size": 256, "random_crop": False, "random_flip": True},
        },
        "optimizer": {
            "name": "adamw", "params": {"learning_rate": "4e-4", "beta1": 0.9, "beta2": 0.96, "weight_decay": "3e-2"},
        },
        "lr_scheduler": {"scheduler": "cosine", "params": {"learning_rate": RATE, "warmup_steps": "62_500", "end_lr": "1e-5"}},
        "training": {
            "gradient_accumulation_steps": batch[1], "per_gpu_batch_size": batch[0], "mixed_precision": "bf16",
            "enable_tf32": True, "enable_wandb": True, "use_ema": False, "seed": 42, "max_train_steps": "250_000",
            "max_grad_norm": 1.0,
        },
    }  # fmt: skip


_REAR = {
    "intermediate_size": 3072, "image_seq_len": 256, "guidance_scale": 15.0, "guidance_scale_pow": 2.5, "kv_cache": True,
    "perturb_mode": "switch", "randomness_anneal_start": 0, "randomness_anneal_end": 187500, "transition_alignment": True,
    "transition_alignment_weight": 1.0, "encode_align_layer_idx": 0, "decode_align_layer_idx": 18,
}  # fmt: skip
_VQGAN = {"codebook_size": 1024, "token_size": 256, "num_latent_tokens": 256, "finetune_decoder": False}
_VQPLUS = {
    "model_type": "vqplus", "quantizer_type": "lookup", "codebook_size": 4096, "token_size": 64, "commitment_cost": 0.25,
    "entropy_loss_weight": 0.0, "entropy_loss_temperature": 0.01, "entropy_gamma": 1.0, "num_channels": 3,
    "hidden_channels": 128, "channel_mult": [1, 1, 2, 2, 4], "num_resolutions": 5, "num_res_blocks": 2,
    "sample_with_conv": True,
}  # fmt: skip
_TITOK = {
    "model_type": "titok", "codebook_size": 4096, "token_size": 12, "use_l2_norm": True, "commitment_cost": 0.25,
    "vit_enc_model_size": "base", "vit_dec_model_size": "base", "vit_enc_patch_size": 16, "vit_dec_patch_size": 16,
    "num_latent_tokens": 64, "finetune_decoder": True,
}  # fmt: skip
FORMS = {
    "rear": form(_REAR, {"model_type": "maskgitvq", **_VQGAN}, (128, 2), tokenizer_checkpoint="ckpt/maskgitvq.bin"),
    "rear_vqplus": form(_REAR, _VQPLUS, (128, 2), tokenizer_checkpoint="ckpt/vqplus.bin"),
    "rear_titok": form({**_REAR, "image_seq_len": "${model.vq_model.num_latent_tokens}"}, _TITOK, (256, 1)),
    "rar": form(
        {
            "intermediate_size": 3072, "image_seq_len": 256, "guidance_scale": 16.0, "guidance_scale_pow": 2.75,
            "randomness_anneal_start": 125000, "randomness_anneal_end": 187500,
        },
        {**_VQGAN, "pretrained_tokenizer_weight": "maskgit.bin"}, (64, 1),
    ),
    "alitok": form(
        {"tok_dropout": 0.1, "image_seq_len": 273, "guidance_scale": 13.0, "guidance_scale_pow": 1.4},
        {"codebook_size": 4096, "token_size": 32, "num_latent_tokens": 273}, (32, 1),
    ),
}  # fmt: skip
# Keys that the trainers read and no released YAML has.
OPTIONAL = {
    "rear": {
        "experiment.output_dir": "runs/there", "experiment.init_weight": "start.bin", "training.stop_steps": 5000,
        "model.generator.encode_align": False, "model.generator.decode_align": False, "model.generator.projection_dim": 64,
        "model.generator.z_dim": 12,
    },
    "rar": {"experiment.output_dir": "runs/there", "training.stop_steps": 5000},
}  # fmt: skip
_WORDS = {"mixed_precision": "no", "scheduler": "constant", "perturb_mode": "mask", "optimizer.name": "sgd"}


def another(key: str, value: Any) -> Any:
    """Another value of the same type."""
    for name, word in _WORDS.items():
        if key.endswith(name):
            return word
    if isinstance(value, bool):
        return not value
    if isinstance(value, str) and value.startswith("${"):
        return "9e-5" if "rate" in value else 65
    if isinstance(value, str) and value[0].isdigit():
        return f"1{value}"
    if isinstance(value, str):
        return f"other_{value}"
    if isinstance(value, list):
        return [*value, 8]
    return value * 2 if value else 3


def changed(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    found = copy.deepcopy(values)
    section = found
    *sections, name = key.split(".")
    for one in sections:
        section = section.setdefault(one, {})
    section[name] = value
    return found


def written(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values).replace("'", ""))  # no quotes: 4e-4 as the authors write it
    return path


def settings_of(monkeypatch: pytest.MonkeyPatch, path: Path) -> tuple[str, tuple[str, ...]]:
    """The base config and the settings that a YAML gives, in the order that counts, without composing them."""
    kept: dict[str, str] = {}

    def load(name: str, overrides: list[str]) -> Any:
        for text in overrides:
            kept.update({text.split("=")[0]: text})
        return name, tuple(sorted(kept.values()))

    with monkeypatch.context() as patch:
        patch.setattr(config, "load", load)
        return trainer_yaml.config_of_yaml(path)  # type: ignore[return-value]


def keys_of(name: str) -> list[tuple[str, Any]]:
    """Every key of a form and another value of it."""
    found = [(key, another(key, value)) for key, value in leaves(FORMS[name]).items()]
    return [*found, *OPTIONAL.get(name, {}).items()]


def check_keys(name: str, path: Path, read: Callable[[Path], Any]) -> None:
    released = read(written(path, FORMS[name]))
    for key, value in keys_of(name):
        try:
            found: Any = read(written(path, changed(FORMS[name], key, value)))
        except InputError as error:
            found = str(error)
        if isinstance(found, str):
            assert key in found
            assert str(path) in found
            assert found.isprintable()
            assert key not in trainer_yaml.NO_EFFECT
        else:
            assert (found == released) == (key in trainer_yaml.NO_EFFECT), key


@pytest.mark.parametrize("name", FORMS)
def test_every_key_changes_a_setting_or_is_refused_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_keys(name, tmp_path / "mine.yaml", lambda path: settings_of(monkeypatch, path))


@pytest.mark.long
@pytest.mark.parametrize("name", FORMS)
def test_every_key_changes_the_typed_config_or_is_refused_by_name(name: str, tmp_path: Path) -> None:
    check_keys(name, tmp_path / "mine.yaml", trainer_yaml.config_of_yaml)


@pytest.mark.parametrize("name", FORMS)
def test_a_key_that_is_not_known_is_refused_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for section in ("experiment", "model", "model.generator", "model.vq_model", "optimizer.params", "training", "else"):
        path = written(tmp_path / "mine.yaml", changed(FORMS[name], f"{section}.beta3", 1))
        with pytest.raises(
            InputError, match=rf"{section}\.beta3=1 is not a key of the released configs of .* Remove it"
        ):
            settings_of(monkeypatch, path)


def test_the_released_yamls_give_the_configs_of_their_trainers(tmp_path: Path) -> None:
    def read(name: str) -> config.ExperimentConfig:
        return load_config(str(written(tmp_path / f"{name}.yaml", FORMS[name])))

    rear = read("rear")
    same = ["objective.noise.end=187500", "model.mlp_width=3072"]
    official = config.load("official/rear_b.yaml", same)
    assert (rear.objective, rear.model, rear.sample, rear.optim) == (
        official.objective, official.model, official.sample, official.optim,
    )  # fmt: skip
    assert (rear.run.seed, rear.run.name, rear.cluster.gpus, rear.train.micro_batch_size) == (42, "mine", 8, 128)
    vqplus = read("rear_vqplus")
    assert (vqplus.tokenizer.name, vqplus.tokenizer.codebook_dim, vqplus.tokenizer.weights) == (
        "vqplus",
        64,
        "ckpt/vqplus.bin",
    )
    titok = read("rear_titok")
    assert (titok.tokenizer.name, titok.tokenizer.num_tokens, titok.objective.heads.form) == (
        "titok_b64",
        64,
        "released",
    )
    rar, alitok = read("rar"), read("alitok")
    for cfg, gpus in ((rar, 32), (alitok, 64)):
        assert (cfg.optim.schedule, cfg.optim.lr, cfg.optim.weight_decay, cfg.cluster.gpus) == (
            "released",
            4e-4,
            0.03,
            gpus,
        )
        assert (cfg.objective.heads.encode_tap, cfg.objective.noise.max) == (None, 0)
    assert rar.objective.permutation.start == 125_000
    assert (alitok.model.architecture, alitok.model.mlp_width) == ("alitok", None)


@pytest.mark.parametrize(
    ("name", "key", "value", "expected"),
    [
        ("rear", "optimizer.params.learning_rate", "1e-4", {"optim.lr": 1e-4}),
        ("rear", "model.generator.transition_alignment", False, {
            "objective.heads.encode_tap": None, "objective.heads.decode_tap": None, "objective.noise.max": 1.0,
            "objective.permutation.end": 0.0,
        }),
        ("rear", "model.generator.encode_align", False, {
            "objective.heads.encode_tap": None, "objective.heads.decode_tap": 19, "objective.heads.lone_term": "twice",
        }),
        ("rear", "model.generator.perturb_mode", "none", {"objective.noise.max": 0.0}),
        ("rear", "model.generator.perturb_mode", "mask", {"objective.noise.replacement": "mask"}),
        ("rar", "model.generator.guidance_scale", 0.0, {
            "sample.guidance.schedule": "constant", "sample.guidance.scale": 1.0,
        }),
        ("rar", "model.generator.guidance_scale_pow", 0.0, {
            "sample.guidance.schedule": "constant", "sample.guidance.scale": 16.0,
        }),
        ("rar", "lr_scheduler.scheduler", "constant", {"optim.end_lr": 4e-4}),
        ("rar", "training.use_ema", True, {"optim.ema_decay": 0.999}),
        ("rar", "training.mixed_precision", '"no"', {"train.precision": "fp32"}),
        ("rar", "model.generator.use_checkpoint", True, {"train.activation_checkpointing": "full"}),
        ("rar", "training.gradient_accumulation_steps", 4, {"cluster.gpus": 8, "train.global_batch_size": 2048}),
    ],
)  # fmt: skip
def test_values_mean_what_they_mean_to_the_trainers(
    name: str, key: str, value: Any, expected: dict[str, Any], tmp_path: Path
) -> None:
    cfg = trainer_yaml.config_of_yaml(written(tmp_path / "mine.yaml", changed(FORMS[name], key, value)))
    found = leaves(config.to_dict(cfg))
    assert {one: found[one] for one in expected} == expected


@pytest.mark.parametrize(
    ("name", "key", "value", "expected"),
    [
        ("rar", "model.generator.model_type", "ViT", "is of a masked, bidirectional generator"),
        ("rar", "model.generator.num_steps", 8, "is of a masked, bidirectional generator"),
        ("rar", "losses.label_smoothing", 0.1, "is of a masked, bidirectional generator"),
        ("rar", "training.mixed_precision", "no", r"mixed_precision=False is not one of \"bf16\" and \"no\" \(in quotes\)"),
        ("rar", "training.mixed_precision", "fp16", "mixed_precision=fp16 is not one of"),
        ("rar", "training.max_grad_norm", None, "max_grad_norm=null takes a number"),
        ("rar", "training.seed", None, "seed=null takes a whole number"),
        ("rar", "optimizer.params.learning_rate", 10**400, "learning_rate is a number of more than 30 digits"),
        ("rear", "model.generator.guidance_scale", -(10**31), "guidance_scale is a number of more than 30 digits"),
        ("rar", "training.max_train_steps", 10**30, "max_train_steps is a number of more than 30 digits"),
        ("rar", "training.seed", -1, "training.seed is run.seed=-1 must lie"),
        ("rar", "optimizer.params.learning_rate", "fast", "learning_rate=fast takes a number"),
        ("rar", "optimizer.params.learning_rate", "${oc.env:RATE}", "uses a resolver"),
        ("rar", "optimizer.params.learning_rate", "${training.rate}", "refers to a key that the file does not have"),
        ("rar", "optimizer.params.learning_rate", "${optimizer.params}", "refers to"),
        ("rar", "optimizer.params.learning_rate", "${lr_scheduler.params.learning_rate}", "refers to a key"),
        ("rar", "training.per_gpu_batch_size", 48, "Set train.global_batch_size=48 x the processes"),
        ("rar", "model.generator.randomness_anneal_end", 100, "lies before"),
        ("rear", "model.generator.decode_align_layer_idx", 24, "is not a block in 0 .. 23"),
        ("rear", "model.generator.decode_align_layer_idx", 0, "equals that of the encode head"),
        ("rear", "model.generator.z_dim", 64, "is not model.vq_model.token_size=256"),
        ("rear_titok", "model.vq_model.num_latent_tokens", 32, "is not that of TiTok-B64"),
        ("rear", "model.vq_model.model_type", "gigatok", "is not one of maskgitvq, vqplus, titok"),
        ("rar", "experiment.name", "${training}", "refers to a section"),
        ("rar", "experiment.name", "a${run}", "refers to a key"),
    ],
)  # fmt: skip
def test_what_is_not_known_here_is_refused_by_name(
    name: str, key: str, value: Any, expected: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "mine.yaml", changed(FORMS[name], key, value))
    assert trainer_yaml.is_released_yaml(path)
    with pytest.raises(InputError, match=expected):
        trainer_yaml.config_of_yaml(path)


def test_the_global_batch_may_be_named_on_the_command_line(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.yaml", changed(FORMS["rar"], "training.per_gpu_batch_size", 48))
    cfg = trainer_yaml.config_of_yaml(path, ["train.global_batch_size=96", "optim.lr=1e-3"])
    assert (cfg.train.global_batch_size, cfg.train.micro_batch_size, cfg.optim.lr) == (96, 48, 1e-3)


@pytest.mark.parametrize("key", ["\0", "a\nb", "\x1b[31m", "a.b"])
def test_a_key_that_cannot_be_shown_is_refused_in_one_line(key: str, tmp_path: Path) -> None:
    for value in (1, "${oc.env:HOME}"):
        path = tmp_path / "mine.yaml"
        path.write_text(json.dumps({"model": {"generator": {key: value}}}))
        with pytest.raises(InputError, match="is not a key: sections are nested") as error:
            trainer_yaml.config_of_yaml(path)
        assert str(error.value).isprintable()
