"""The three published tokenizers, with the weights read from a file under their published names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rear_scale.tokenizer.alitok import AliTok
from rear_scale.tokenizer.base import Tokenizer
from rear_scale.tokenizer.maskgit_vqgan import MaskgitVqgan
from rear_scale.tokenizer.titok import TiTok

KINDS: dict[str, type[Tokenizer]] = {"maskgit_vqgan": MaskgitVqgan, "titok_b64": TiTok, "alitok_tokenizer": AliTok}

# golden/index.json; a token may differ only where its margin is no larger.
LATENTS = 1e-4
TOLERANCES = {
    "maskgit_vqgan": {"pixels": 1e-3, "margin": 1e-2},
    "titok_b64": {"pixels": 2e-3, "margin": 1e-4, "codes": 1e-6, "decoder": 5e-4},
    "alitok_tokenizer": {"pixels": 2e-5, "margin": 1e-3, "codes": 1e-6},
}


def kind_of(case) -> str:
    return next(kind for kind in KINDS if case.stem.startswith(kind))


@pytest.fixture(scope="module")
def tokenizer(case, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    shapes = {name: entry["shape"] for name, entry in case.json["state_dict"].items()}
    state = case.weights.fill(shapes, case.json["seed"], case.json.get("gains"))
    state = {name: torch.from_numpy(value) for name, value in state.items()}
    folder: Path = tmp_path_factory.mktemp("weights")
    file = folder / ("weights.bin" if kind_of(case) == "maskgit_vqgan" else "weights.safetensors")
    (torch.save if file.suffix == ".bin" else save_file)(state, file)
    with torch.inference_mode():
        yield KINDS[kind_of(case)].from_file(str(file))
    file.unlink()


def test_latents_tokens_and_images(case, compare, tokenizer: Tokenizer) -> None:
    tolerance = TOLERANCES[kind_of(case)]
    # MaskGIT-VQGAN has cases for images of 64 and of 256 pixels, with the size at the end of the names.
    for size in ("64", "256") if "latents64" in case or "latents256" in case else ("",):
        if f"latents{size}" in case and f"tokens{size}" in case:
            check_encoder(case, compare, tokenizer, size, tolerance)
        if f"dec_tokens{size}" in case:
            check_decoder(case, compare, tokenizer, size, tolerance)


def check_encoder(case, compare, tokenizer: Tokenizer, size: str, tolerance: dict[str, float]) -> None:
    expected = case.arrays[f"latents{size}"]
    side = int(size or 256)
    images = torch.from_numpy(case.weights.image(f"img{side}", len(expected), side, case.json["seed"]))
    compare(f"latents{size}", tokenizer.latents(images), expected, LATENTS)
    ids = tokenizer.encode(images).numpy()
    tokens = case.arrays[f"tokens{size}"]
    margin = case.arrays.get(f"margin{size}", np.full(tokens.shape, np.inf))
    assert ids.shape == tokens.shape
    differing = ids != tokens
    assert (margin[differing] <= tolerance["margin"]).all(), f"{differing.sum()} of {ids.size} tokens differ"
    if f"second{size}" in case:
        # Even there, the only other choice is the runner-up.
        assert np.array_equal(ids[differing], case.arrays[f"second{size}"][differing])
    # One by one or together: a batch is only a matter of speed.
    alone = torch.cat([tokenizer.encode(image[None]) for image in images]).numpy()
    assert (margin[alone != ids] <= tolerance["margin"]).all()
    if f"quantized{size}" in case:
        rows = tokenizer.codebook[torch.from_numpy(tokens)].transpose(1, 2)
        quantized = case.arrays[f"quantized{size}"]
        compare(f"quantized{size}", rows.reshape(quantized.shape), quantized, tolerance.get("codes", 1e-6))


def check_decoder(case, compare, tokenizer: Tokenizer, size: str, tolerance: dict[str, float]) -> None:
    ids = torch.from_numpy(case.arrays[f"dec_tokens{size}"])
    if "codebook_entry" in case:
        compare("codebook_entry", tokenizer.codebook[ids], case.arrays["codebook_entry"], tolerance["codes"])
    if "dec_logits_sub" in case:
        logits = tokenizer.logits(ids)
        compare("dec_logits_sub", logits[:, ::16], case.arrays["dec_logits_sub"], tolerance["decoder"])
        soft = tokenizer.soft_embeddings(logits)[:, ::8]
        compare("dec_soft_embedding_sub", soft, case.arrays["dec_soft_embedding_sub"], tolerance["decoder"])
    decoded = tokenizer.decode(ids)
    assert 0 <= decoded.min() <= decoded.max() <= 1
    for name in (f"decoded_raw{size}", f"decoded{size}"):
        if name in case:
            unclamped = decoded if isinstance(tokenizer, AliTok) else tokenizer.pixels(ids)
            compare(name, unclamped, case.arrays[name], tolerance["pixels"])
            assert torch.equal(decoded, unclamped.clamp(0, 1))
