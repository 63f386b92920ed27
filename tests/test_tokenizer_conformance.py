"""What every tokenizer must keep to, run on each that a config in configs/tokenizer/ names.

With the weights of the config where its file is there, else with random ones of the same sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from sklearn.datasets import load_digits
from torch import Tensor

from rear_scale.config import CONFIG_DIR, InputError, TokenizerConfig
from rear_scale.tokenizer import TOKENS_ONLY, find_tokenizer, open_tokenizer
from rear_scale.tokenizer.base import Tokenizer, nearest_code

NAMES = sorted(
    path.stem for path in (CONFIG_DIR / "tokenizer").glob("*.yaml") if OmegaConf.load(path).name not in TOKENS_ONLY
)


def config_of(name: str) -> TokenizerConfig:
    values = OmegaConf.merge(
        OmegaConf.structured(TokenizerConfig), OmegaConf.load(CONFIG_DIR / "tokenizer" / f"{name}.yaml")
    )
    return OmegaConf.to_object(values)


@pytest.fixture(scope="module", params=NAMES)
def cfg(request: pytest.FixtureRequest) -> TokenizerConfig:
    return config_of(request.param)


@pytest.fixture(scope="module")
def tokenizer(cfg: TokenizerConfig) -> Iterator[Tokenizer]:
    torch.manual_seed(0)
    with torch.inference_mode():
        if cfg.weights and Path(cfg.weights).is_file():
            yield open_tokenizer(cfg, torch.device("cpu"))
        else:
            yield find_tokenizer(cfg.name).untrained(cfg).eval()


@pytest.fixture(scope="module")
def images(cfg: TokenizerConfig) -> Tensor:
    """Two images, float32 [2, 3, S, S]: digits for a tokenizer that is trained here, on them; else smooth colours."""
    if cfg.training is not None:
        digits = torch.from_numpy(load_digits().images[[3, 8]]).float()[:, None] / 16
        return torch.nn.functional.interpolate(digits, cfg.image_size, mode="bicubic").clamp(0, 1).expand(-1, 3, -1, -1)
    coarse = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (cfg.image_size, cfg.image_size), mode="bilinear")


def test_sizes_are_those_of_the_config(cfg: TokenizerConfig, tokenizer: Tokenizer) -> None:
    found = (tokenizer.name, tokenizer.image_size, tokenizer.num_tokens, tokenizer.codebook_size)
    assert found == (cfg.name, cfg.image_size, cfg.num_tokens, cfg.codebook_size)
    assert tokenizer.grid == (None if cfg.grid is None else tuple(cfg.grid))
    assert tokenizer.prefix_tokens == cfg.prefix_tokens
    assert cfg.num_tokens == cfg.prefix_tokens + (math.prod(cfg.grid) if cfg.grid else cfg.num_tokens)


# Of tokenizers that are trained elsewhere, tests/parity compares tokens and images with stored ones.
@pytest.mark.parametrize(
    "cfg",
    [pytest.param(name, marks=[] if config_of(name).training else pytest.mark.long) for name in NAMES],
    indirect=True,
)
def test_round_trip(cfg: TokenizerConfig, tokenizer: Tokenizer, images: Tensor) -> None:
    ids = tokenizer.encode(images)
    assert (ids.dtype, ids.shape) == (torch.int64, (2, cfg.num_tokens))
    assert ids.min() >= 0
    assert ids.max() < cfg.codebook_size
    assert not torch.equal(ids[0], ids[1]), "two images, one sequence"
    assert torch.equal(tokenizer.encode(images), ids), "the same images, other tokens"
    decoded = tokenizer.decode(ids)
    assert decoded.shape == images.shape
    assert 0 <= decoded.min() <= decoded.max() <= 1
    assert not torch.equal(decoded[0], decoded[1]), "the decoder does not look at the tokens"
    again = tokenizer.encode(decoded[:1])
    assert again.shape == (1, cfg.num_tokens)
    if cfg.weights and Path(cfg.weights).is_file():
        assert (decoded - images).square().mean() < images.var(), "worse than a grey image"


def test_every_id_of_the_range_decodes(cfg: TokenizerConfig, tokenizer: Tokenizer) -> None:
    ids = torch.arange(cfg.num_tokens)[None] % 2 * (cfg.codebook_size - 1)
    assert tokenizer.decode(ids).isfinite().all()


def test_codebook_is_what_the_heads_are_taught(cfg: TokenizerConfig, tokenizer: Tokenizer) -> None:
    codebook = tokenizer.codebook
    assert (codebook.dtype, codebook.shape) == (torch.float32, (cfg.codebook_size, cfg.codebook_dim))
    assert codebook.isfinite().all()
    lengths = codebook.norm(dim=1)
    # A target of length 0 has no direction to be taught.
    assert lengths.min() > 0
    assert bool(((lengths - 1).abs() < 1e-5).all()) == tokenizer.unit_codebook
    assert torch.equal(nearest_code(codebook, codebook), torch.arange(cfg.codebook_size)), "codes that are the same"


def test_codes_are_assigned_in_float32_under_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = 1 + 1e-2 * torch.randn(64, 8, generator=generator)  # closer than bfloat16 can tell apart
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_code(codes, codes), torch.arange(64))


def test_a_tokenizer_of_tokens_alone_says_so(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"whatever it is")
    cfg = config_of("vqplus")
    cfg.weights = str(tmp_path / "weights")
    with pytest.raises(InputError, match="vqplus is supported as token ids alone.*--samples"):
        open_tokenizer(cfg, torch.device("cpu"))
