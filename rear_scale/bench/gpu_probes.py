"""Small measurements on one GPU that decide settings of the project. Each prints one line, and runs in its own process.

python -m rear_scale.bench.gpu_probes NAME [--small]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from rear_scale import cli
from rear_scale.bench.ceilings import product_flops_per_s, read_bytes_per_s
from rear_scale.bench.model import random_model, synchronize, use_device
from rear_scale.config import GuidanceConfig, SampleConfig, load
from rear_scale.model.modulation import sums_by_product, sums_in_order
from rear_scale.sample.decode import Decoder
from rear_scale.sample.decode_worker import DecodeWorker
from rear_scale.tokenizer.compact import CompactTokenizer
from rear_scale.tokenizer.maskgit_vqgan import MaskgitVqgan


def _seconds(device: torch.device, call: Callable[[], object], turns: int = 5) -> float:
    """The best time of several calls, after one untimed call."""
    taken = []
    for _ in range(1 + turns):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def ceilings(device: torch.device, small: bool) -> str:
    """Peak rates of matrix products and memory reads."""
    products, reads = product_flops_per_s(device, torch.bfloat16), read_bytes_per_s(device)
    return f"bf16 products {products / 1e12:.1f} TFLOP/s, reads {reads / 1e9:.0f} GB/s; torch {torch.__version__}"


def attention_dropout(device: torch.device, small: bool) -> str:
    """The fraction of attention probabilities that dropout drops. With equal probabilities and values of 1, an output is the kept
    fraction over 1 - p, so that the variance of the outputs gives the dropped fraction."""
    query = torch.zeros(2 if small else 8, 16, 257, 48, device=device, dtype=torch.bfloat16)
    out = F.scaled_dot_product_attention(query, query, torch.ones_like(query), dropout_p=0.1).float()
    return f"share dropped {1 - 1 / (1 + 257 * out.var().item()):.4f} (0.1 wanted), mean of outputs {out.mean().item():.4f}"


def attention_kernels(device: torch.device, small: bool) -> str:
    """The kernel that torch chooses for training and decoding, and the time of each kernel's training step by head width."""
    query = torch.zeros(2, 4, 257, 48, device=device, dtype=torch.bfloat16)
    names = {int(backend.value): name for name, backend in SDPBackend.__members__.items()}
    chosen = {
        "training": torch._fused_sdp_choice(query, query, query, None, 0.1, True),
        "decoding": torch._fused_sdp_choice(query[:, :, :1], query, query, None, 0.0, False),
    }
    times = []
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
        for width in (48,) if small else (48, 64, 80, 88):
            times.append(f"{name.partition('_')[0].lower()} {width}: {_attention_step(device, name, width, small)}")
    words = [f"{use} {names.get(int(kernel), kernel)}" for use, kernel in chosen.items()]
    return f"{', '.join(words)}; forward and backward in ms: {', '.join(times)}"


def _attention_step(device: torch.device, name: str, width: int, small: bool) -> str:
    """Milliseconds of a training step's attention by one kernel, or why it cannot run."""
    shape = (2, 2, 17, width) if small else (256, 16, 257, width)
    query, key, value = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

    def step() -> None:
        with sdpa_kernel([getattr(SDPBackend, name)]):
            F.scaled_dot_product_attention(query, key, value, dropout_p=0.1, is_causal=True).sum().backward()

    try:
        return f"{1e3 * _seconds(device, step, 3):.2f}"
    except RuntimeError as error:
        return f"does not run ({str(error).splitlines()[0][:40]})"


def head_norms(device: torch.device, small: bool) -> str:
    """The time of a norm over the width of a head in a training step, uncompiled and compiled."""
    norm = torch.nn.LayerNorm(48, eps=1e-6, device=device)
    qkv = torch.randn(2 if small else 256, 257, 3, 16, 48, device=device, dtype=torch.bfloat16, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        return norm(x).to(torch.bfloat16)

    def step(function: Callable[[Tensor], Tensor]) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            function(qkv.permute(2, 0, 3, 1, 4)[0]).sum().backward()

    line = f"forward and backward {1e3 * _seconds(device, lambda: step(call)):.2f} ms"
    if device.type != "cuda":
        return f"{line}; compiled: not measured on a CPU"
    compiled = torch.compile(call)
    return f"{line}, compiled {1e3 * _seconds(device, lambda: step(compiled)):.2f} ms (twice in each block)"


def modulation_rows(device: torch.device, small: bool) -> str:
    """The time of gathering a block's modulation by class and of its backward pass, beside computing it for every image."""
    images, positions, width = (4, 17, 64) if small else (256, 257, 768)
    lines = []
    for distinct in (2,) if small else (226, 109, 7):
        rows = torch.randint(distinct, (images,), device=device)
        table = torch.randn(distinct, positions, 6 * width, device=device, dtype=torch.bfloat16, requires_grad=True)
        arriving = torch.randn(images, positions, 6 * width, device=device, dtype=torch.bfloat16)
        calls = {
            "gather": partial(table.index_select, 0, rows),
            "backward as a product": partial(sums_by_product, arriving, rows, distinct),
            "with atomics": partial(sums_in_order, arriving, rows, distinct),
        }
        times = [f"{name} {1e3 * _seconds(device, call, 3):.2f}" for name, call in calls.items()]
        lines.append(f"{distinct} classes: {', '.join(times)}")
    weight = torch.randn(6 * width, width, device=device, dtype=torch.bfloat16)
    inputs = torch.randn(images * positions, width, device=device, dtype=torch.bfloat16)
    whole = 1e3 * _seconds(device, lambda: F.linear(inputs, weight), 3)
    return f"in ms, {'; '.join(lines)}; the product for {images} images {whole:.2f}"


def decode_lengths(device: torch.device, small: bool) -> str:
    """The time of the first attention call with a new cache length, and of later calls."""
    rows = 4 if small else 512
    keys = torch.randn(rows, 16, 257, 48, device=device, dtype=torch.bfloat16)
    query, lengths = keys[:, :, :1], range(20, 257, 40)
    first = []
    for length in lengths:
        synchronize(device)
        started = time.perf_counter()
        F.scaled_dot_product_attention(query, keys[:, :, :length], keys[:, :, :length])
        synchronize(device)
        first.append(time.perf_counter() - started)
    later = _seconds(device, lambda: F.scaled_dot_product_attention(query, keys[:, :, :240], keys[:, :, :240]))
    return f"first use of a length {1e3 * sum(first) / len(first):.2f} ms, later {1e3 * later:.3f} ms"


def decoding_images(device: torch.device, small: bool) -> str:
    """The time and the largest error of decoding images in several layouts and precisions."""
    torch.manual_seed(0)
    tokenizer = (CompactTokenizer(16, 32, 8, 16) if small else MaskgitVqgan()).to(device).eval().requires_grad_(False)
    images = 4 if small else 256
    ids = torch.randint(tokenizer.codebook_size, (images, tokenizer.num_tokens), device=device)
    lines = []
    with torch.inference_mode():
        exact = tokenizer.decode(ids)
        for name in ("fp32", "channels last", "bf16"):
            if name == "channels last":
                tokenizer.use_channels_last()
            if name == "bf16":
                tokenizer.decode_in_bfloat16()
            ms = 1e3 * _seconds(device, lambda: tokenizer.decode(ids), 2) / images
            off = 255 * (tokenizer.decode(ids) - exact).abs().max().item()
            lines.append(f"{name} {ms:.3f} ms/image (off by {off:.1f} levels)")
    return ", ".join(lines)


def graphs(device: torch.device, small: bool) -> str:
    """Whether CUDA graphs are recorded while another thread works, and give the same tokens as sampling without them."""
    shape = ["model.depth=2", "model.width=64", "model.num_heads=2", "objective=ar"]
    cfg = load("demo.yaml", shape) if small else load("rear_s.yaml")
    model = random_model(cfg, device, with_heads=False).eval()
    sample = SampleConfig(batch_size=4 if small else 64, guidance=GuidanceConfig("constant", 2.0))
    decoder, plain = Decoder(model, sample), Decoder(model, sample)
    plain.graphed = None
    ids = torch.arange(sample.batch_size, device=device)
    with DecodeWorker(device) as worker:
        sampled = []
        for number in range(3):
            sampled.append(decoder.generate(ids % 8, ids + number * len(ids)))
            worker.run(torch.sort, sampled[-1])
    same = all(torch.equal(tokens, plain.generate(ids % 8, ids + n * len(ids))) for n, tokens in enumerate(sampled))
    recorded = decoder.graphed is not None and decoder.graphed.usable
    return f"recorded: {'yes' if recorded else 'no'}; tokens as step by step: {'yes' if same else 'no'}"


PROBES = {
    probe.__name__: probe
    for probe in (
        ceilings,
        attention_dropout,
        attention_kernels,
        decode_lengths,
        head_norms,
        modulation_rows,
        decoding_images,
        graphs,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=PROBES)
    parser.add_argument("--small", action="store_true", help="tiny sizes, for any device")
    arguments = parser.parse_args()
    device = use_device()
    for name in arguments.names:
        print(f"{name}: {PROBES[name](device, arguments.small)}", flush=True)


if __name__ == "__main__":
    cli.run(main)
