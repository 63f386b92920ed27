"""Conversion of YAMLs of the released trainers to our config: reAR's (QY-H00/reAR), RAR's (bytedance/1d-tokenizer), AliTok's
(ali-vilab/alitok).

Every key is converted, refused by name, or listed below as one without effect on the results.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rear_scale import config
from rear_scale.config import ExperimentConfig, InputError, check_references, check_yaml, in_quotes, shown
from rear_scale.config.bounds import MOST_DIGITS
from rear_scale.config.fields import suggest

# (depth, width) -> size of the published configs.
SIZES = {
    (12, 768): "s",
    (20, 768): "s",
    (24, 768): "b",
    (24, 1024): "l",
    (32, 1280): "xl",
    (40, 1408): "xxl",
}
RELEASED_REAR = ("s", "b", "l")

_GENERATOR, _TOKENIZER, _TRAINING = "model.generator", "model.vq_model", "training"
_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}

# Keys with exactly one counterpart in our config: key -> (type, config key).
_TAKEN: dict[str, tuple[type, str]] = {
    "experiment.project": (str, "wandb.project"),
    "experiment.name": (str, "run.name"),
    "experiment.output_dir": (str, "run.dir"),
    "experiment.max_train_examples": (int, "data.assumed_images"),
    "experiment.save_every": (int, "checkpoint.every_steps"),
    "experiment.log_every": (int, "train.log_every"),
    "experiment.init_weight": (str, "train.init_from"),
    f"{_TOKENIZER}.pretrained_tokenizer_weight": (str, "tokenizer.weights"),
    "experiment.tokenizer_checkpoint": (
        str,
        "tokenizer.weights",
    ),  # overrides the one before: reAR's trainer reads this key
    f"{_TOKENIZER}.codebook_size": (int, "tokenizer.codebook_size"),
    f"{_TOKENIZER}.token_size": (int, "tokenizer.codebook_dim"),
    f"{_GENERATOR}.hidden_size": (int, "model.width"),
    f"{_GENERATOR}.num_hidden_layers": (int, "model.depth"),
    f"{_GENERATOR}.num_attention_heads": (int, "model.num_heads"),
    f"{_GENERATOR}.dropout": (float, "model.dropout"),
    f"{_GENERATOR}.attn_drop": (float, "model.attn_dropout"),
    f"{_GENERATOR}.condition_num_classes": (int, "model.num_classes"),
    f"{_GENERATOR}.class_label_dropout": (float, "objective.class_dropout"),
    f"{_GENERATOR}.image_seq_len": (int, "tokenizer.num_tokens"),
    f"{_GENERATOR}.randomize_temperature": (float, "sample.temperature"),
    "dataset.preprocessing.crop_size": (int, "tokenizer.image_size"),
    "optimizer.params.learning_rate": (float, "optim.lr"),
    "optimizer.params.weight_decay": (float, "optim.weight_decay"),
    "lr_scheduler.params.warmup_steps": (int, "optim.warmup_steps"),
    "lr_scheduler.params.end_lr": (float, "optim.end_lr"),
    f"{_TRAINING}.seed": (int, "run.seed"),
    f"{_TRAINING}.max_train_steps": (int, "train.total_steps"),
    f"{_TRAINING}.stop_steps": (int, "train.stop_at_step"),
    f"{_TRAINING}.max_grad_norm": (float, "optim.grad_clip"),
}
# Keys that are converted together with others, or whose value must be that of the trainers.
_HANDLED = (
    f"{_TOKENIZER}.model_type",
    f"{_TOKENIZER}.num_latent_tokens",
    f"{_GENERATOR}.guidance_scale",
    f"{_GENERATOR}.guidance_scale_pow",
    f"{_GENERATOR}.use_checkpoint",
    "optimizer.name",
    "optimizer.params.beta1",
    "optimizer.params.beta2",
    "lr_scheduler.scheduler",
    "lr_scheduler.params.learning_rate",
    f"{_TRAINING}.gradient_accumulation_steps",
    f"{_TRAINING}.per_gpu_batch_size",
    f"{_TRAINING}.mixed_precision",
    f"{_TRAINING}.use_ema",
)
_REAR_KEYS = tuple(
    f"{_GENERATOR}.{name}"
    for name in (
        "perturb_mode", "transition_alignment", "transition_alignment_weight", "encode_align", "decode_align",
        "encode_align_layer_idx", "decode_align_layer_idx", "projection_dim", "z_dim",
    )
)  # fmt: skip
_ANNEAL = tuple(f"{_GENERATOR}.randomness_anneal_{mark}" for mark in ("start", "end"))
_OWN_KEYS = {
    "rear": (f"{_GENERATOR}.intermediate_size", *_ANNEAL, *_REAR_KEYS),
    "rar": (f"{_GENERATOR}.intermediate_size", *_ANNEAL),
    "alitok": (f"{_GENERATOR}.tok_dropout",),
}
# Keys without effect on the results, with the reason.
NO_EFFECT = {
    "experiment.eval_every": "of the tokenizer's trainer",
    "experiment.generate_every": "sample grids are set by sample.grid_every_images",
    "experiment.log_grad_norm_every": "every logged step has its gradient norm",
    "experiment.resume": "a run always resumes in its folder",
    "experiment.entity": "telemetry is set by wandb.mode",
    "experiment.logging_dir": "logs are in the run folder",
    "experiment.generator_checkpoint": "weights are named by --checkpoint",
    f"{_TOKENIZER}.finetune_decoder": "of the tokenizer's training; it is frozen here",
    f"{_TOKENIZER}.commitment_cost": "of the tokenizer's training",
    f"{_TOKENIZER}.entropy_loss_weight": "of the tokenizer's training",
    f"{_TOKENIZER}.entropy_loss_temperature": "of the tokenizer's training",
    f"{_TOKENIZER}.entropy_gamma": "of the tokenizer's training",
    f"{_GENERATOR}.kv_cache": "the trainers do not use it; sampling always has a cache",
    "dataset.params.pretokenization": "tokens are named by data.train",
    "dataset.params.train_shards_path_or_url": "tokens are named by data.train",
    "dataset.params.eval_shards_path_or_url": "tokens are named by data.val",
    "dataset.params.num_workers_per_gpu": "changes no sample",
    "dataset.preprocessing.resize_shorter_edge": "of images; crops are chosen by pretokenize.crops",
    "dataset.preprocessing.random_crop": "of images; crops are chosen by pretokenize.crops",
    "dataset.preprocessing.random_flip": "of images; crops are chosen by pretokenize.crops",
    f"{_TRAINING}.enable_wandb": "telemetry is set by wandb.mode",
    f"{_TRAINING}.enable_swanlab": "telemetry is set by wandb.mode",
    f"{_TRAINING}.enable_tf32": "float32 products are computed in float32",
    f"{_TRAINING}.num_generated_images": "of the tokenizer's trainer",
}
# Values that must be the published ones, because only these architectures exist here.
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "maskgit_vqgan": {},
    "alitok": {},
    "titok_b64": {
        "use_l2_norm": True, "vit_enc_model_size": "base", "vit_dec_model_size": "base", "vit_enc_patch_size": 16,
        "vit_dec_patch_size": 16,
    },
    "vqplus": {
        "quantizer_type": "lookup", "num_channels": 3, "hidden_channels": 128, "channel_mult": [1, 1, 2, 2, 4],
        "num_resolutions": 5, "num_res_blocks": 2, "sample_with_conv": True,
    },
}  # fmt: skip
_TOKENIZER_TYPES = {"maskgitvq": "maskgit_vqgan", "vqplus": "vqplus", "titok": "titok_b64"}
_TOKENIZER_SIZES = {(4096, 64): "titok_b64", (4096, 256): "vqplus"}  # codes, tokens, where no type is given
_TITOK_TOKENS, _ALITOK_TOKENS = 64, 273
_MASKED = ("model_type", "num_steps", "mask_schedule_strategy", "guidance_decay")  # keys of MaskGIT's generator
# All published runs have 2,048 images per update, whatever the number of processes.
_GLOBAL_BATCH = 2048
_EMA_DECAY = 0.999  # a constant of the trainers


def is_released_yaml(path: Path) -> bool:
    """Whether a file is a config of the released trainers, which nest model.generator and model.vq_model."""
    try:
        values = OmegaConf.to_container(_load(path), resolve=False)
    except (InputError, OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException, ValueError, RecursionError):
        return False
    model = values.get("model") if isinstance(values, dict) else None
    return isinstance(model, dict) and ("generator" in model or "vq_model" in model)


def config_of_yaml(path: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Our config for a YAML of the released trainers, with overrides applied last.

    Keys that it does not set come from the published config of its method and size. The global batch is 2,048 images, as in all
    published runs, so that batch and accumulation of the YAML give the number of processes (cluster.gpus). Raises InputError
    for every key that cannot be converted, and for values that this project does not support.
    """
    try:
        yaml = _Yaml(path, _flat(path, _load(path)))
    except InputError:
        raise
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {shown(str(error).splitlines()[0])}") from None
    method = _method(yaml)
    tokenizer = _tokenizer(yaml, method)
    known = (*_TAKEN, *_HANDLED, *NO_EFFECT, *_OWN_KEYS[method])
    known += tuple(f"{_TOKENIZER}.{name}" for name in _ARCHITECTURES[tokenizer])
    for key, value in yaml.values.items():
        if key not in known:
            raise InputError(
                f"{path}: {shown(key)}={shown(str(value))} is not a key of the released configs of "
                f"{_METHODS[method]}{suggest(key, list(known))}. Remove it: its meaning is unknown here"
            )
    name, own = _GENERATE[method](yaml)
    settings = [
        f"tokenizer={tokenizer}",
        *own,
        *(_setting(yaml, key, value_type, ours) for key, (value_type, ours) in _TAKEN.items() if key in yaml.values),
        *_guidance(yaml),
        *_training(yaml, overrides),
        "optim.schedule=released",
    ]
    try:
        return config.load(name, [*settings, *overrides])
    except InputError as error:
        ours = str(error).split("=")[0]
        keys = [key for key, (_, other) in _TAKEN.items() if other == ours and key in yaml.values]
        raise InputError(f"{path}: {f'{keys[-1]} is ' if keys else ''}{error}") from None


@dataclass(frozen=True)
class _Yaml:
    """The values of a file by dotted key, with references resolved."""

    path: Path
    values: dict[str, Any]

    def get(self, key: str, value_type: type, default: Any = None) -> Any:
        """The value of a key. Raises InputError for another type than value_type, null included."""
        if key not in self.values:
            return default
        value: Any = self.values[key]
        if isinstance(value, int) and abs(value) >= 10**MOST_DIGITS:
            raise InputError(f"{self.path}: {key} is a number of more than {MOST_DIGITS} digits. Write a smaller one")
        if value_type is int and isinstance(value, float) and value.is_integer():
            value = int(value)  # 5e4 is a number of steps
        if value_type is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not value_type or (isinstance(value, str) and ("${" in value or not value.strip())):
            raise self.refusal(key, f"takes {_NAMES[value_type]}. Write one")
        return value

    def refusal(self, key: str, rule: str) -> InputError:
        """The error for the value of a key."""
        value = self.values.get(key, "nothing")
        return InputError(f"{self.path}: {key}={'null' if value is None else shown(str(value))} {rule}")


def _load(path: Path) -> Any:
    """The content of the file, read by the config library, whose YAML reads `1e-4` and `1_000` as numbers."""
    text = path.read_text(encoding="utf-8")
    check_yaml(text, str(path))
    return OmegaConf.create(text)


def _flat(path: Path, values: DictConfig) -> dict[str, Any]:
    """The values of the file by dotted key. References are allowed only to other values of the file."""
    flat: dict[str, Any] = {}

    def add(section: str, inner: dict[Any, Any]) -> None:
        for name, value in inner.items():
            if not isinstance(name, str) or "." in name or not name.isprintable():
                raise InputError(
                    f"{path}: {shown(str(name))} is not a key: sections are nested, one level of indentation each"
                )
            key = f"{section}.{name}" if section else name
            if isinstance(value, dict):
                add(key, value)
            elif value is not None or section:  # empty top-level sections are ignored
                flat[key] = value

    container: Any = OmegaConf.to_container(values, resolve=False)
    add("", container)
    texts = {key: value for key, value in flat.items() if isinstance(value, str) and "${" in value}
    check_references(texts.values(), str(path))
    for key, text in texts.items():
        if re.search(r"\$\{[^}]*:", text):
            raise InputError(
                f"{path}: {key}={shown(text)} uses a resolver, which is not allowed. Write the value itself"
            )
    for key, text in texts.items():
        if ":" in text.partition("${")[2].partition("}")[0]:
            raise InputError(
                f"{path}: {key}={shown(text)} uses a resolver, which is not allowed. Write the value itself"
            )
        try:
            flat[key] = OmegaConf.select(values, key, throw_on_missing=True)
        except (OmegaConfBaseException, RecursionError):
            raise InputError(
                f"{path}: {key}={shown(text)} refers to a key that the file does not have. Write the value itself"
            ) from None
        if OmegaConf.is_config(flat[key]):
            raise InputError(f"{path}: {key}={shown(text)} refers to a section. Refer to one value of it")
    return flat


_METHODS = {"rear": "reAR", "rar": "RAR", "alitok": "AliTok"}


def _method(yaml: _Yaml) -> str:
    """The trainer of a YAML (rear, rar or alitok), from the keys of its generator. Raises InputError for any other trainer."""
    masked = [
        key for key in yaml.values if key.startswith("losses.") or key in [f"{_GENERATOR}.{name}" for name in _MASKED]
    ]
    if masked:
        raise yaml.refusal(
            masked[0],
            "is of a masked, bidirectional generator (MaskGIT). Use a config of the trainers of reAR, RAR or AliTok",
        )
    lacking = [
        name
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")
        if f"{_GENERATOR}.{name}" not in yaml.values
    ]
    if lacking:
        raise InputError(
            f"{yaml.path}: model.generator has no {', '.join(lacking)}. Use a config of the trainers of reAR, RAR or AliTok"
        )
    if f"{_GENERATOR}.tok_dropout" in yaml.values or yaml.values.get(f"{_GENERATOR}.image_seq_len") == _ALITOK_TOKENS:
        return "alitok"
    return "rear" if any(key in yaml.values for key in _REAR_KEYS) else "rar"


def _tokenizer(yaml: _Yaml, method: str) -> str:
    """The name in configs/tokenizer/ of the YAML's tokenizer. Raises InputError for an unknown tokenizer."""
    tokens = yaml.get(f"{_GENERATOR}.image_seq_len", int)
    latent = yaml.get(f"{_TOKENIZER}.num_latent_tokens", int, tokens)
    if tokens is not None and latent != tokens:
        raise yaml.refusal(
            f"{_TOKENIZER}.num_latent_tokens", f"is not {_GENERATOR}.image_seq_len={tokens}. Set both to the same"
        )
    model_type = yaml.get(f"{_TOKENIZER}.model_type", str)
    if model_type is not None and method == "alitok":
        raise yaml.refusal(
            f"{_TOKENIZER}.model_type", "is not a key of AliTok's trainer, which has one tokenizer. Remove it"
        )
    if model_type is not None and model_type not in _TOKENIZER_TYPES:
        raise yaml.refusal(
            f"{_TOKENIZER}.model_type",
            f"is not one of {', '.join(_TOKENIZER_TYPES)}, the supported tokenizers of reAR's trainer",
        )
    sizes = (yaml.get(f"{_TOKENIZER}.codebook_size", int), tokens)
    name = (
        "alitok"
        if method == "alitok"
        else _TOKENIZER_TYPES.get(model_type) or _TOKENIZER_SIZES.get(sizes, "maskgit_vqgan")
    )
    if name == "titok_b64" and tokens not in (None, _TITOK_TOKENS):
        key = f"{_TOKENIZER}.num_latent_tokens"
        key = key if key in yaml.values else f"{_GENERATOR}.image_seq_len"
        raise yaml.refusal(key, f"is not that of TiTok-B64, which has {_TITOK_TOKENS} tokens")
    for field, published in _ARCHITECTURES[name].items():
        key = f"{_TOKENIZER}.{field}"
        if key in yaml.values and yaml.values[key] != published:
            raise yaml.refusal(key, f"is not that of the published {name} ({published}). Remove it, or use its tokens")
    return name


def _setting(yaml: _Yaml, key: str, value_type: type, ours: str) -> str:
    """The override that sets our config key `ours` to the value of a key."""
    value = yaml.get(key, value_type)
    return f"{ours}={in_quotes(value) if value_type is str else value}"


def _size(yaml: _Yaml) -> str:
    depth, width = (yaml.get(f"{_GENERATOR}.{name}", int) for name in ("num_hidden_layers", "hidden_size"))
    return SIZES.get((depth, width), "b")


def _alitok(yaml: _Yaml) -> tuple[str, list[str]]:
    # The trainer has no key for the width of the feed-forward, which follows from the model's width by AliTok's rule.
    dropout = yaml.get(f"{_GENERATOR}.tok_dropout", float)
    return "ar_alitok_b.yaml", [] if dropout is None else [f"model.embed_dropout={dropout}"]


def _rar(yaml: _Yaml) -> tuple[str, list[str]]:
    return f"rar_{_size(yaml)}.yaml", [*_feed_forward(yaml), *_anneal(yaml, "objective.permutation")]


def _rear(yaml: _Yaml) -> tuple[str, list[str]]:
    size = _size(yaml)
    name = f"official/rear_{size}.yaml" if size in RELEASED_REAR else f"rear_{size}.yaml"
    settings = ["objective=rear_released", *_feed_forward(yaml), *_anneal(yaml, "objective.noise"), *_heads(yaml)]
    mode = yaml.get(f"{_GENERATOR}.perturb_mode", str, "none")
    if mode not in ("switch", "mask", "none"):
        raise yaml.refusal(f"{_GENERATOR}.perturb_mode", "is not one of switch, mask, none. Use one of them")
    if mode == "none":
        return name, [*settings, "objective.noise.max=0"]
    return name, [*settings, f"objective.noise.replacement={'uniform' if mode == 'switch' else 'mask'}"]


_GENERATE = {"rear": _rear, "rar": _rar, "alitok": _alitok}


def _feed_forward(yaml: _Yaml) -> list[str]:
    inner = yaml.get(f"{_GENERATOR}.intermediate_size", int)
    return [] if inner is None else [f"model.mlp_width={inner}"]


def _anneal(yaml: _Yaml, section: str) -> list[str]:
    """Overrides for the steps between which randomness decreases from 1 to 0; both negative = no randomness."""
    steps = [yaml.get(key, int) for key in _ANNEAL]
    if steps == [None, None]:
        return []
    for key, step in zip(_ANNEAL, steps, strict=True):
        if step is None:
            raise yaml.refusal(key, "is set, but not the other of the two steps. Set both")
    start, end = steps
    if end < 0 and start < 0:
        return [f"{section}.start=0", f"{section}.end=0", *(["objective.noise.max=0"] if "noise" in section else [])]
    for key, step in zip(_ANNEAL, steps, strict=True):
        if step < 0 or step == 1:
            raise yaml.refusal(key, "is not a possible step. Use 0 or a step from 2 on, or -1 for both")
    if end < start:
        raise yaml.refusal(_ANNEAL[1], f"lies before {_ANNEAL[0]}={start}. Use {start} or later")
    return [f"{section}.start={start}", f"{section}.end={end}"]


def _heads(yaml: _Yaml) -> list[str]:
    """Overrides for the alignment heads. In the released code index i reads the output of block i, which is tap i + 1."""
    if not yaml.get(f"{_GENERATOR}.transition_alignment", bool, False):
        return ["objective.heads.encode_tap=null", "objective.heads.decode_tap=null"]
    depth, taps = yaml.get(f"{_GENERATOR}.num_hidden_layers", int), {}
    for end, default in (("encode", 0), ("decode", 15)):
        key = f"{_GENERATOR}.{end}_align_layer_idx"
        index = yaml.get(key, int, default)
        if not yaml.get(f"{_GENERATOR}.{end}_align", bool, True):
            continue
        if not 0 <= index < depth:
            raise yaml.refusal(
                key,
                f"is not a block in 0 .. {depth - 1}, and the trainer would leave out the head. Set it, or {end}_align: False",
            )
        taps[end] = index + 1
    if len(set(taps.values())) < len(taps):
        raise yaml.refusal(
            f"{_GENERATOR}.decode_align_layer_idx",
            "equals that of the encode head, so that the trainer would leave out the decode head. Set it, or decode_align: False",
        )
    if not taps:
        raise yaml.refusal(f"{_GENERATOR}.transition_alignment", "is on, but both heads are off. Set it to False")
    width = yaml.get(f"{_TOKENIZER}.token_size", int)
    if width is not None and yaml.get(f"{_GENERATOR}.z_dim", int, width) != width:
        raise yaml.refusal(
            f"{_GENERATOR}.z_dim", f"is not {_TOKENIZER}.token_size={width}, which heads must have. Set it to that"
        )
    weight = yaml.get(f"{_GENERATOR}.transition_alignment_weight", float, 1.0)
    return [
        *(f"objective.heads.{end}_tap={taps.get(end, 'null')}" for end in ("encode", "decode")),
        f"objective.heads.weight={weight}",
        f"objective.heads.hidden={yaml.get(f'{_GENERATOR}.projection_dim', int, 2048)}",
    ]


def _guidance(yaml: _Yaml) -> list[str]:
    """Overrides for guidance. With scale 0 the released samplers use no guidance; with power 0 the scale is constant."""
    scale = yaml.get(f"{_GENERATOR}.guidance_scale", float)
    power = yaml.get(f"{_GENERATOR}.guidance_scale_pow", float)
    if scale == 0:
        return ["sample.guidance.schedule=constant", "sample.guidance.scale=1"]
    settings = [] if scale is None else [f"sample.guidance.scale={scale}"]
    if power == 0:
        return ["sample.guidance.schedule=constant", *settings]
    return [
        "sample.guidance.schedule=power_cosine",
        *settings,
        *([] if power is None else [f"sample.guidance.power={power}"]),
    ]


def _training(yaml: _Yaml, overrides: Sequence[str]) -> list[str]:
    if yaml.get("optimizer.name", str, "adamw") != "adamw":
        raise yaml.refusal("optimizer.name", "is not adamw, the only optimizer of the trainers. Use that")
    rate = yaml.get("optimizer.params.learning_rate", float)
    base = yaml.get("lr_scheduler.params.learning_rate", float, rate)
    if base != rate:
        raise yaml.refusal(
            "lr_scheduler.params.learning_rate",
            f"is not optimizer.params.learning_rate={rate}. Write ${{optimizer.params.learning_rate}}",
        )
    settings = [
        f"optim.betas=[{yaml.get('optimizer.params.beta1', float, 0.9)},{yaml.get('optimizer.params.beta2', float, 0.96)}]"
    ]
    scheduler = yaml.get("lr_scheduler.scheduler", str, "cosine")
    if scheduler not in ("cosine", "constant"):
        raise yaml.refusal("lr_scheduler.scheduler", "is not one of cosine, constant. Use one of them")
    if scheduler == "constant":
        # A cosine whose end equals its peak.
        settings.append("optim.end_lr=" + ("${optim.lr}" if rate is None else str(rate)))
    precision = yaml.values.get(f"{_TRAINING}.mixed_precision", "bf16")
    if precision not in ("bf16", "no"):
        raise yaml.refusal(f"{_TRAINING}.mixed_precision", 'is not one of "bf16" and "no" (in quotes). Use one of them')
    settings.append(f"train.precision={'bf16' if precision == 'bf16' else 'fp32'}")
    if yaml.get(f"{_TRAINING}.use_ema", bool, False):
        settings.append(f"optim.ema_decay={_EMA_DECAY}")
    recompute = yaml.get(f"{_GENERATOR}.use_checkpoint", bool, False)
    return [*settings, f"train.activation_checkpointing={'full' if recompute else 'none'}", *_batch(yaml, overrides)]


def _batch(yaml: _Yaml, overrides: Sequence[str]) -> list[str]:
    size = yaml.get(f"{_TRAINING}.per_gpu_batch_size", int)
    steps = yaml.get(f"{_TRAINING}.gradient_accumulation_steps", int, 1)
    if size is None:
        return []
    if size < 1 or steps < 1:
        key = "per_gpu_batch_size" if size < 1 else "gradient_accumulation_steps"
        raise yaml.refusal(f"{_TRAINING}.{key}", "is below 1. Use 1 or more")
    given = [text.partition("=")[2] for text in overrides if text.lstrip("+").startswith("train.global_batch_size=")]
    if given:
        return [f"train.micro_batch_size={size}"]
    if _GLOBAL_BATCH % (size * steps):
        raise yaml.refusal(
            f"{_TRAINING}.per_gpu_batch_size",
            f"x {_TRAINING}.gradient_accumulation_steps={steps} gives {size * steps} images per process and update, but the "
            f"{_GLOBAL_BATCH} of the published runs are not a multiple of that. "
            f"Set train.global_batch_size={size * steps} x the processes",
        )
    settings = [f"train.micro_batch_size={size}", f"train.global_batch_size={_GLOBAL_BATCH}"]
    alone = any(text.lstrip("+").startswith("strategy=single") for text in overrides)
    return settings if alone else [*settings, f"cluster.gpus={_GLOBAL_BATCH // (size * steps)}"]
