"""Files of means and covariances: published ones, and our own with a manifest of the images and networks behind them."""

# F features

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rear_scale.config import InputError
from rear_scale.evaluate.images.image_set import crop_rule, preprocessing_rule
from rear_scale.evaluate.images.npz import array_names, open_array
from rear_scale.evaluate.metrics.moments import Moments
from rear_scale.evaluate.networks import statistics_arrays
from rear_scale.evaluate.networks.row import StatisticsArrays
from rear_scale.files import atomic_file
from rear_scale.shards.crops import EXIF
from rear_scale.untrusted import is_count, parse_json

_FORMAT = "rear_scale statistics 1"
_MOST_MANIFEST = 1 << 20  # bytes
_TIME = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class MadeOf:
    """The images behind a statistics file of ours, from its manifest; published files have no manifest."""

    count: int
    size: list[int] | None = None  # height and width in pixels; None = not known
    preprocessing: str | None = None


def images_of(path: str | Path) -> MadeOf | None:
    """The images behind a statistics file; None when it has no manifest.

    Raises InputError when the images were preprocessed by another rule than the one in use.
    """
    manifest = _manifest(path, array_names(path))
    if manifest is None:
        return None
    images = manifest["images"]
    made_of = MadeOf(images["count"], images.get("size"), images.get("preprocessing"))
    if made_of.size is None or made_of.preprocessing is None:
        return made_of
    known = [preprocessing_rule(size, exif) for size in (None, made_of.size[0]) for exif in EXIF]
    if made_of.preprocessing not in known:
        raise InputError(
            f"{path} was made with other preprocessing of the images ({made_of.preprocessing}) than the one in use "
            f"({crop_rule(made_of.size[0])}). Make it again with --write-statistics"
        )
    return made_of


def is_ours(path: Path) -> bool:
    """Whether `write_statistics` has written a file."""
    try:
        return _manifest(path, array_names(path)) is not None
    except InputError:  # of another form, or no .npz at all
        return False


def _are_images(images: Any) -> bool:
    """Whether the images entry of a manifest is valid: a count, and optionally size and preprocessing."""
    size, preprocessing = images.get("size"), images.get("preprocessing")
    return (
        is_count(images["count"])
        and (size is None or (isinstance(size, list) and len(size) == 2 and all(map(is_count, size))))
        and (preprocessing is None or isinstance(preprocessing, str))
    )


def _manifest(path: str | Path, names: Sequence[str]) -> dict[str, Any] | None:
    if "manifest" not in names:
        return None
    try:
        stored = open_array(path, "manifest")
        if stored.shape == () and stored.dtype.kind == "U" and stored.row_bytes <= _MOST_MANIFEST:
            manifest = parse_json(str(stored[:].item()), _MOST_MANIFEST)
            networks, images = manifest["networks"], manifest["images"]
            if manifest["format"] == _FORMAT and networks.items() and _are_images(images):
                return manifest
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise InputError(f"{path}: its manifest is not one of {_FORMAT!r}. Make the file again with --write-statistics")


def read_statistics(path: Path, networks: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, Moments]:
    """The moments in a file, by feature, for the features in `sizes` (feature -> F).

    networks: the identity of the network in use, by feature. Files of ours record the network that made them; published files
    do not. Raises InputError for another network, and for arrays of the wrong shape, not finite or not symmetric.
    """
    names = array_names(path)
    manifest = _manifest(path, names)
    moments, known = {}, statistics_arrays()
    for feature, size in sizes.items():
        arrays = known.get(feature)
        if arrays is None or arrays.mean not in names or arrays.covariance not in names:
            continue
        if manifest is not None and manifest["networks"].get(feature) != networks[feature]:
            raise InputError(
                f"{path}: {arrays.mean} was made with other weights or preprocessing ({manifest['networks'].get(feature)}) "
                f"than those in use ({networks[feature]}). Make it again with --write-statistics, or use the weights that it was "
                "made with"
            )
        shapes = [open_array(path, name).shape for name in (arrays.mean, arrays.covariance)]
        if shapes != [(size,), (size, size)]:
            raise InputError(
                f"{path}: {arrays.mean} {shapes[0]} and {arrays.covariance} {shapes[1]} are not of {size} features. "
                "Use statistics of the same network"
            )
        mean, covariance = (open_array(path, name)[:] for name in (arrays.mean, arrays.covariance))
        _check(path, arrays, mean, covariance)
        count = None if manifest is None else manifest["images"]["count"]
        moments[feature] = Moments(torch.from_numpy(mean).double(), torch.from_numpy(covariance).double(), count)
    return moments


def _check(path: Path, arrays: StatisticsArrays, mean: np.ndarray, covariance: np.ndarray) -> None:
    for name, array in ((arrays.mean, mean), (arrays.covariance, covariance)):
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise InputError(f"{path}: {name} is not made of finite floats. Get or make the file again")
    if np.abs(covariance - covariance.T).max() > 1e-6 * np.abs(covariance).max():
        raise InputError(
            f"{path}: {arrays.covariance} is not symmetric, so it is not a covariance. Get or make the file again"
        )


def write_statistics(
    path: Path, moments: Mapping[str, Moments], networks: Mapping[str, str], images: dict[str, Any]
) -> None:
    """Writes moments by feature with a manifest of their networks and images (with `count`). Equal content gives equal bytes."""
    manifest = {"format": _FORMAT, "networks": {feature: networks[feature] for feature in moments}, "images": images}
    arrays: dict[str, np.ndarray] = {"manifest": np.array(json.dumps(manifest, sort_keys=True))}
    known = statistics_arrays()
    for feature, own in moments.items():
        arrays[known[feature].mean] = own.mean.numpy()
        arrays[known[feature].covariance] = own.covariance.numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _TIME), buffer.getvalue())
