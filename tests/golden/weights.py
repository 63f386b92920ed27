"""Deterministic tensors by NAME for the golden cases (numpy only, same on both sides).

normal(name, shape, seed)  float32 standard normal from default_rng([seed, crc32(name)])
fill(named_shapes, seed, gains)  weights for every floating tensor of a state_dict:
    1-D, name ends in 'weight' : 1 + 0.1 * n          (norm scales)
    any other 0-D / 1-D        : 0.1 * n              (biases)
    (1, L, D)                  : n / sqrt(D)          (cls_token, pos_embed, mask_token ...)
    everything else            : n / sqrt(prod(shape[1:]))   (Linear, Conv, Embedding, 2-D tokens)
  then multiplied by gains[k] if the name ends with key k (see "gains" in the case json).
  All arithmetic is float32. Integer buffers and non-persistent buffers are NOT filled.
image(name, n, size, seed)  n uint8-quantised RGB images in [0,1], float32 NCHW.
tokens(name, shape, high, seed)  int64 uniform in [0, high).
"""

import zlib

import numpy as np


def _rng(name, seed):
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def normal(name, shape, seed):
    return _rng(name, seed).standard_normal(tuple(shape), dtype=np.float32)


def fill(named_shapes, seed, gains=None):
    out = {}
    for name, shape in named_shapes.items():
        shape = tuple(int(s) for s in shape)
        n = normal(name, shape, seed)
        if len(shape) <= 1:
            w = 1 + np.float32(0.1) * n if name.endswith("weight") else np.float32(0.1) * n
        else:
            fan_in = shape[-1] if len(shape) == 3 and shape[0] == 1 else int(np.prod(shape[1:]))
            w = n / np.float32(np.sqrt(fan_in))
        for key, g in (gains or {}).items():
            if name.endswith(key):
                w = w * np.float32(g)
        out[name] = np.ascontiguousarray(w, dtype=np.float32)
    return out


def image(name, n, size, seed):
    rng = _rng(name, seed)
    img = np.zeros((n, 3, size, size), dtype=np.float64)
    for cell in (32, 16, 8, 1):  # coarse to fine random mosaics
        k = -(-size // cell)
        a = rng.random((n, 3, k, k))
        img += np.repeat(np.repeat(a, cell, 2), cell, 3)[:, :, :size, :size]
    return (np.rint(img * (255.0 / 4)) / 255.0).astype(np.float32)


def tokens(name, shape, high, seed):
    return _rng(name, seed).integers(0, high, size=tuple(shape), dtype=np.int64)
