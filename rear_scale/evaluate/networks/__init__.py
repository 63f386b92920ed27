"""Feature networks, and their features in blocks on disk. `NETWORKS` has a row for each network."""

from __future__ import annotations

from rear_scale.config import EvaluateConfig, InputError
from rear_scale.evaluate.networks import lpips
from rear_scale.evaluate.networks.base import InceptionFeatures
from rear_scale.evaluate.networks.dinov2 import DINOV2_VITL14, DinoV2Features
from rear_scale.evaluate.networks.efficientnet import EFFICIENTNET_LITE0, EfficientNetFeatures, packaged_weights
from rear_scale.evaluate.networks.inception import INCEPTION
from rear_scale.evaluate.networks.lpips import LPIPS_VGG, VGG16, LpipsDistance
from rear_scale.evaluate.networks.row import NetworkRow, StatisticsArrays

NETWORKS: list[NetworkRow] = [
    NetworkRow(
        "inception",
        {"inception_weights": INCEPTION},
        InceptionFeatures,
        {
            "pool": StatisticsArrays("mu", "sigma", is_published=True),
            "spatial": StatisticsArrays("mu_s", "sigma_s", is_published=True),
        },
    ),
    NetworkRow(
        "dinov2",
        {"dinov2_weights": DINOV2_VITL14},
        DinoV2Features,
        {"cls": StatisticsArrays("mu_dinov2", "sigma_dinov2")},
    ),
    NetworkRow(
        "efficientnet",
        {"efficientnet_weights": EFFICIENTNET_LITE0},
        EfficientNetFeatures,
        {"average": StatisticsArrays("mu_efficientnet", "sigma_efficientnet")},
        packaged={"efficientnet_weights": packaged_weights},
    ),
    NetworkRow(
        "lpips",
        {"vgg_weights": VGG16, "lpips_weights": LPIPS_VGG},
        LpipsDistance,
        of_pairs=True,
        packaged={"lpips_weights": lpips.packaged_weights},
    ),
]


def register(row: NetworkRow) -> NetworkRow:
    """The row, after adding it to NETWORKS; for networks defined in other files. Its name and feature names must be new."""
    assert row.name not in [other.name for other in NETWORKS], row.name
    assert not row.statistics.keys() & statistics_arrays().keys(), row.statistics
    NETWORKS.append(row)
    return row


def rows_in_use(cfg: EvaluateConfig, *, of_pairs: bool = False) -> list[NetworkRow]:
    """The networks whose weights are set; either those of single images, or those of image pairs."""
    return [row for row in NETWORKS if row.of_pairs == of_pairs and row.is_set(cfg)]


def weight_fields() -> list[str]:
    """The full names of the config fields of weight files; entries of evaluate.network_weights are not among them."""
    return [f"evaluate.{name}" for row in NETWORKS for name in row.weights if "." not in name]


def check_network_names(cfg: EvaluateConfig) -> None:
    """Raises InputError for an entry of evaluate.network_weights that no network reads."""
    known = [row.name for row in NETWORKS if f"network_weights.{row.name}" in row.weights]
    for name in cfg.network_weights:
        if name not in known:
            raise InputError(
                f"evaluate.network_weights.{name} is not the name of a network here ({', '.join(known) or 'no names'}). "
                "Add a row to NETWORKS in rear_scale/evaluate/networks, or leave it out"
            )


def statistics_arrays() -> dict[str, StatisticsArrays]:
    """The arrays of a statistics file, by feature of any network."""
    return {feature: arrays for row in NETWORKS for feature, arrays in row.statistics.items()}
