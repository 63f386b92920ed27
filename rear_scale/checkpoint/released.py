"""Reading and writing of weight files of the released generators (reAR, RAR, AliTok), whose parameter names ours have.

reAR-{S,B,L}.safetensors   huggingface.co/qyoo/reAR
rar_{b,l,xl,xxl}.bin       huggingface.co/yucornetto/RAR
alitok_{b,l,xl}.bin        linked from github.com/ali-vilab/alitok
"""

# N tokens of an image, D width, K codes, Z width of a code

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rear_scale.config import InputError
from rear_scale.files import atomic_open
from rear_scale.model.generator import Shape, is_head
from rear_scale.model.transformer import SPARE_POSITIONS
from rear_scale.weight_file import find_weights, read_state, save_tensors

_SHOWN = 3
# (codes, tokens) -> width of a code, for files without heads: MaskGIT-VQGAN, TiTok-B64, AliTok.
_CODE_WIDTHS = {(1024, 256): 256, (4096, 64): 12, (4096, 273): 32}
_ALITOK_TOKENS = 273


def read_weights(path: Path, field: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .bin, .pth or .pt file, or of a folder that has one, on the CPU.

    `field` is the option or config key that names the file in errors. Raises InputError for a missing or damaged file
    and for a pickle of anything but tensors, which could run any code.
    """
    file = find_weights(path)
    if file.is_dir():
        raise InputError(f"{field}={path} is a folder without a weight file of a model. Name the weight file itself")
    if not file.exists():
        raise InputError(f"not found: {field}={path}. Set the path of a weight file")
    return read_state(file, field)


def infer(weights: Mapping[str, Tensor], source: str = "the file") -> tuple[str, Shape]:
    """The architecture (rar or alitok) and shape of a generator's weights, without dropout rates, which are in no file.

    Raises InputError for weights of any other model.
    """
    if "lm_head.bias" in weights and "pos_embed" in weights:
        architecture, output, inner = "rar", "lm_head", "blocks.0.mlp.fc1.weight"
        num_tokens = _positions(weights["pos_embed"], source) - SPARE_POSITIONS
    elif "output.bias" in weights and "blocks.0.mlp.w1.weight" in weights:
        architecture, output, inner = "alitok", "output", "blocks.0.mlp.w1.weight"
        targets = weights.get("target_aware_pos_embed")
        num_tokens = _ALITOK_TOKENS if targets is None else _positions(targets, source)
    else:
        raise InputError(
            f"{source} does not hold a generator of RAR, reAR or AliTok: it has {_some(weights)}. "
            "Use one of their released files, or one of ours"
        )
    try:
        codes, width = len(weights[f"{output}.bias"]), weights["embeddings.weight"].shape[1]
        heads = [value for name, value in weights.items() if is_head(name) and name.endswith("weight")]
        shape = Shape(
            depth=len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
            width=width,
            num_heads=width // len(weights["blocks.0.attn.q_norm.weight"]),
            mlp_width=weights[inner].shape[0],
            num_classes=weights["embeddings.weight"].shape[0] - codes - 2,
            codebook_size=codes,
            num_tokens=num_tokens,
            codebook_dim=heads[-1].shape[0] if heads else _CODE_WIDTHS.get((codes, num_tokens), 256),
            conditioning="adaln" if "timesteps_embeddings" in weights else "in_context",
            target_aware=architecture == "alitok" and "target_aware_pos_embed" in weights,
        )
    except KeyError as missing:
        raise InputError(f"{source} lacks {missing.args[0]}. Is it complete? Download it again") from None
    except (IndexError, TypeError, ZeroDivisionError) as error:
        raise InputError(
            f"{source}: its tensors do not have the numbers of dimensions of a generator's ({error}). Use the file of a generator"
        ) from None
    return architecture, shape


def _positions(table: Tensor, source: str) -> int:
    if table.dim() != 3:
        raise InputError(
            f"{source}: its table of positions is {list(table.shape)}, not [1, positions, width]. Download it again"
        )
    return table.shape[1]


def check_fits(weights: Mapping[str, Tensor], model: nn.Module, source: str, *, heads_optional: bool) -> None:
    """Raises InputError, naming the keys or shapes that differ, for weights that do not fit a model.

    heads_optional: heads may be missing in the file, be others, or have other shapes.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    present = {name: tuple(value.shape) for name, value in weights.items()}
    if heads_optional:
        wanted, present = (
            {name: shape for name, shape in one.items() if not is_head(name)} for one in (wanted, present)
        )
    lacking, foreign = wanted.keys() - present.keys(), present.keys() - wanted.keys()
    other = {name for name in wanted.keys() & present.keys() if wanted[name] != present[name]}
    if not lacking and not foreign and not other:
        return
    faults = []
    if lacking:
        faults.append(f"lacks {_some(sorted(lacking))}")
    if foreign:
        faults.append(f"has {_some(sorted(foreign))}, which the model does not have")
    if other:
        shown = [f"{name} {list(present[name])} instead of {list(wanted[name])}" for name in sorted(other)]
        faults.append(f"has {_some(shown)}")
    raise InputError(f"{source} {'; '.join(faults)}. Use the file of this model, or the config of this file")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest


def load(weights: Mapping[str, Tensor], model: nn.Module, source: str, *, heads_optional: bool) -> list[str]:
    """Loads weights into a model in place, in its own dtype. Returns the parameters that the file does not have (new heads).

    Raises InputError as `check_fits` does, before anything is changed.
    """
    check_fits(weights, model, source, heads_optional=heads_optional)
    own = model.state_dict()
    usable = {name: value for name, value in weights.items() if name in own and value.shape == own[name].shape}
    model.load_state_dict(usable, strict=False)
    return [name for name in own if name not in usable]


def write(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Writes a weight file for the released loaders: .safetensors, or .bin and .pth by torch."""
    plain = {name: value.detach().contiguous().cpu() for name, value in weights.items()}
    if path.suffix == ".safetensors":
        save_tensors(path, plain)
    else:
        with atomic_open(path) as file:
            torch.save(plain, file)


def merged_positions(weights: Mapping[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """The weights with RAR's two position tables merged into one (RAR section 3.3), for a model with one fixed order (int64 [N]).

    The row of the second table for the position that each position predicts is added to the first; the second becomes zero.
    """
    own, target = weights["pos_embed"].clone(), weights["target_aware_pos_embed"]
    first = torch.cat((torch.tensor([1]), 2 + order[:-1]))  # the row of the position before each token
    own[0, first] += target[0, 2 + order]
    return {**weights, "pos_embed": own, "target_aware_pos_embed": torch.zeros_like(target)}
