"""Batches are encoded and decoded in parts that fit, and on a CPU as one batch; decoding in bfloat16."""

from __future__ import annotations

import sys
import types
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rear_scale.config import InputError, load
from rear_scale.tokenizer import base
from rear_scale.tokenizer.alitok import AliTok
from rear_scale.tokenizer.base import Tokenizer, images_at_once
from rear_scale.tokenizer.compact import CompactTokenizer
from rear_scale.tokenizer.maskgit_vqgan import MaskgitVqgan
from rear_scale.tokenizer.titok import TiTok

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GIB = 2**30


def gpu_of(monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    """A GPU of so many bytes, whose tensors are those of the meta device."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=memory))
    monkeypatch.setattr(base, "images_at_once", lambda largest, device: images_at_once(largest, GPU))


class Watched(TorchDispatchMode):
    """Notes the largest tensor (elements) and the most bytes that are there at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.elements = self.peak = 0

    def __torch_dispatch__(self, function: Any, kinds: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
                    self.peak = max(self.peak, sum(self.sizes.values()))
        return result


@pytest.mark.parametrize(("kind", "gib"), [(MaskgitVqgan, 80), (TiTok, 141), (AliTok, 80)])
def test_a_batch_of_256_images_stays_small_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, kind: type[Tokenizer], gib: int
) -> None:
    gpu_of(monkeypatch, gib * GIB)
    # It asks for autocast, which the meta device has none of.
    monkeypatch.setattr(sys.modules[kind.__module__], "nearest_code", lambda latents, codes: latents[:, 0].long())
    with torch.device("meta"), torch.inference_mode():
        tokenizer = kind().eval()
        for call, batch in (
            (tokenizer.decode, torch.zeros(256, tokenizer.num_tokens, dtype=torch.int64)),
            (tokenizer.encode, torch.zeros(256, 3, 256, 256)),
        ):
            with Watched() as found:
                assert len(call(batch)) == 256
            print(kind.name, call.__name__, found.elements / 2**29, found.peak / GIB)
            assert found.elements <= 2**29
            assert (
                found.peak <= 0.1 * gib * GIB + 256 * 3 * 256**2 * 4 * 2
            )  # and the images themselves, in parts and whole


@pytest.mark.parametrize(
    ("gib", "largest", "images"),
    [
        (141, 128 * 256**2, 64), (80, 128 * 256**2, 32), (24, 128 * 256**2, 8), (1, 128 * 256**2, 1),
        (141, 128 * 512**2, 16), (80, 16 * 24**2, 32768), (80, 2**40, 1),
    ],
)  # fmt: skip
def test_parts_depend_on_the_devices_whole_memory(
    monkeypatch: pytest.MonkeyPatch, gib: int, largest: int, images: int
) -> None:
    gpu_of(monkeypatch, gib * GIB)
    assert images_at_once(largest, GPU) == images


def test_a_cpu_takes_a_batch_at_once_as_far_as_its_kernels_count() -> None:
    largest = MaskgitVqgan.largest_tensor(_Shape, 256)
    assert images_at_once(largest, CPU) == 255
    assert images_at_once(largest, CPU) * largest < 2**31


_Shape: Any = types.SimpleNamespace(encoder=types.SimpleNamespace(conv_in=types.SimpleNamespace(out_channels=128)))


def small() -> CompactTokenizer:
    torch.manual_seed(0)
    tokenizer = CompactTokenizer(16, 32, 8, 16)
    tokenizer.codes.normal_()
    return tokenizer.eval()


@pytest.mark.parametrize(("at_once", "calls"), [(100, [7]), (7, [7]), (4, [4, 3]), (3, [3, 3, 1]), (1, [1] * 7)])
@torch.inference_mode()
def test_parts_are_put_together_in_order(monkeypatch: pytest.MonkeyPatch, at_once: int, calls: list[int]) -> None:
    tokenizer = small()
    ids = torch.arange(7 * 16).view(7, 16) % 32
    images = tokenizer.decode_part(ids)
    tokens = tokenizer.encode_part(images)
    monkeypatch.setattr(base, "images_at_once", lambda largest, device: at_once)
    found: list[int] = []
    for name in ("decode_part", "encode_part"):
        whole = getattr(tokenizer, name)
        monkeypatch.setattr(tokenizer, name, lambda part, whole=whole: found.append(len(part)) or whole(part))
    assert torch.allclose(tokenizer.decode(ids), images, atol=1e-6)
    assert found == calls
    assert torch.equal(tokenizer.encode(images), tokens)
    assert found == calls * 2


@torch.inference_mode()
def test_bfloat16_is_that_of_the_decoder_alone() -> None:
    exact, rounded = small(), small()
    rounded.decode_in_bfloat16()
    assert {weight.dtype for weight in rounded.decoder.parameters()} == {torch.bfloat16}
    assert rounded.codebook.dtype == torch.float32
    ids = torch.arange(4 * 16).view(4, 16) % 32
    one, other = exact.decode(ids), rounded.decode(ids)
    assert other.dtype == torch.float32
    assert 0 < (one - other).abs().max() < 0.05
    assert torch.equal(exact.encode(one), rounded.encode(one))


def test_another_precision_is_refused() -> None:
    with pytest.raises(InputError, match=r"tokenizer\.precision=fp16"):
        load("rear_s.yaml", ["tokenizer.precision=fp16"])
