"""Images to score and what they are compared with, in every form they come in; and files that are none."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_alone
from PIL import Image

from rear_scale.config import InputError
from rear_scale.evaluate.images import image_set as sources
from rear_scale.evaluate.images import npz
from rear_scale.evaluate.images.image_set import open_image_set
from rear_scale.evaluate.images.npz import read_samples, read_sha256
from rear_scale.evaluate.metrics.moments import moments_of
from rear_scale.evaluate.metrics.statistics_file import MadeOf, images_of, read_statistics, write_statistics
from rear_scale.evaluate.networks.base import as_batch, checked
from rear_scale.evaluate.networks.inception import INCEPTION, Inception, resize_tf1
from rear_scale.evaluate.networks.weights import PublishedFile, fill, read_weight_file
from rear_scale.evaluate.reference import check_reference
from rear_scale.files import file_sha256
from rear_scale.sample.npz_writer import write_samples
from rear_scale.sample.uint8_rounding import to_uint8
from rear_scale.shards.crops import center_crop
from rear_scale.shards.images import write_images
from rear_scale.world import World


def some_images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 12, 12, 3), dtype=np.uint8)


def test_samples_are_written_and_read_in_the_adm_form(tmp_path: Path) -> None:
    images, labels = some_images(25), np.arange(25) % 3
    for name in ("a", "b"):
        write_samples(tmp_path / f"{name}.npz", (images[start : start + 10] for start in (0, 10, 20)), 25, 12, labels)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert np.array_equal(np.load(tmp_path / "a.npz")["arr_0"], images)
    assert zipfile.ZipFile(tmp_path / "a.npz").testzip() is None
    found, found_labels = read_samples(tmp_path / "a.npz")
    assert np.array_equal(found[:], images)
    assert np.array_equal(found_labels, labels)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_any_npz_is_read_in_parts(tmp_path: Path, save) -> None:
    images = some_images(20)
    save(tmp_path / "numpy.npz", arr_0=images, arr_1=np.arange(20))
    found, labels = read_samples(tmp_path / "numpy.npz")
    assert labels.tolist() == list(range(20))  # as ADM's sampler stores classes
    # Forwards, with a gap, and back.
    for part in (slice(0, 5), slice(9, 12), slice(12, 20), slice(2, 4)):
        assert np.array_equal(found[part], images[part])


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, "arr_0 is float32"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, "channels last"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "holds no images"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "has no arr_0"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "label": np.zeros(3)}, "3 labels for 2 images"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "label": np.array(["a", "b"])}, "integers of shape"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "label": np.array([0.5, 1.5])}, "integers of shape"),
        ({"arr_0": np.zeros((2, 0, 0, 3), np.uint8)}, "no pixels"),
        ({"arr_0": np.array([{}], dtype=object)}, "cannot be read"),
    ],
)
def test_unsuitable_samples_are_named(tmp_path: Path, arrays: dict[str, np.ndarray], expected: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError, match=expected):
        read_samples(tmp_path / "bad.npz")


def test_missing_and_truncated_samples_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        read_samples(tmp_path / "none.npz")
    np.savez(tmp_path / "whole.npz", arr_0=some_images(5))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-50])
    with pytest.raises(InputError, match="Is it complete"):
        read_samples(tmp_path / "cut.npz")


def test_a_compressed_file_damaged_within_is_named(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "damaged.npz", arr_0=some_images(50))
    data = bytearray((tmp_path / "damaged.npz").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 100] = b"\xff" * 100
    (tmp_path / "damaged.npz").write_bytes(data)
    images, _ = read_samples(tmp_path / "damaged.npz")
    with pytest.raises(InputError, match="arr_0.npy is damaged"):
        images[:]


def test_a_header_that_says_more_rows_than_there_are_is_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, some_images(3))
    with zipfile.ZipFile(tmp_path / "longer.npz", "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue().replace(b"(3, 12, 12, 3)", b"(9, 12, 12, 3)"))
        archive.writestr("behind.npy", bytes(10_000))
    with pytest.raises(InputError, match="cannot be read .*header says 9 rows"):
        read_samples(tmp_path / "longer.npz")


@pytest.mark.parametrize("chunk", [100, 1 << 20])
def test_a_flipped_byte_is_found_while_the_file_is_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(npz, "_CHUNK", chunk)
    path = tmp_path / "samples.npz"
    write_samples(path, iter([some_images(20)]), 20, 12, np.arange(20))
    assert read_sha256(path) == file_sha256(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"samples\.npz: arr_0\.npy is damaged"):
        run_alone(_contents, path, None)


def write_tar(path: Path, images: np.ndarray, first: int, with_classes: bool) -> None:
    with tarfile.open(path, "w") as tar:
        for number, image in enumerate(images, start=first):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, format="PNG")
            parts = {"png": buffer.getvalue()} | ({"cls": str(number % 3).encode()} if with_classes else {})
            for extension, data in parts.items():
                info = tarfile.TarInfo(f"{number:05d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def _contents(world: World, path: Path, size: int | None) -> tuple:
    found = open_image_set(path, world, size)
    parts = [found.read(block) for block in found.blocks]
    labels = None if parts[0][1] is None else np.concatenate([part[1] for part in parts]).tolist()
    return np.concatenate([part[0] for part in parts]), labels, found.identity, found.preprocessing


@pytest.mark.parametrize("form", ["npz", "folder", "class folders", "tars", "tars with classes", "shards"])
def test_every_form_gives_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(sources, "BLOCK_IMAGES", 4)
    images, labels, folder = some_images(10), np.arange(10) % 3, tmp_path / "images"
    folder.mkdir()
    if form == "npz":
        folder = folder / "samples.npz"
        write_samples(folder, iter([images]), 10, 12, labels)
    elif form == "folder":
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / f"{number:05d}.png")
    elif form == "class folders":
        labels = np.arange(10) // 4
        for number, image in enumerate(images):
            (folder / "abc"[number // 4]).mkdir(exist_ok=True)
            Image.fromarray(image).save(folder / "abc"[number // 4] / f"{number:05d}.png")
    elif form.startswith("tars"):
        write_tar(folder / "a.tar", images[:6], 0, form == "tars with classes")
        write_tar(folder / "b.tar", images[6:], 6, form == "tars with classes")
    else:
        pairs = ((Image.fromarray(image), int(label)) for image, label in zip(images, labels, strict=True))
        write_images(folder, pairs, 12, ["a", "b", "c"])
    found, found_labels, identity, _ = run_alone(_contents, folder, None)
    assert np.array_equal(found, images)
    assert found_labels == (None if form in ("folder", "tars") else labels.tolist())
    assert run_alone(_contents, folder, None)[2] == identity


def test_a_single_tar_shard_is_a_set_of_images_and_a_compressed_one_is_named(tmp_path: Path) -> None:
    images = some_images(5)
    write_tar(tmp_path / "samples.tar", images, 0, with_classes=True)
    found, labels, _, _ = run_alone(_contents, tmp_path / "samples.tar", None)
    assert np.array_equal(found, images)
    assert labels == [0, 1, 2, 0, 1]
    (tmp_path / "samples.tar").write_bytes(gzip.compress((tmp_path / "samples.tar").read_bytes()))
    for path in (tmp_path, tmp_path / "samples.tar"):
        with pytest.raises(InputError, match=r"samples\.tar is compressed"):
            run_alone(_contents, path, None)


def test_images_of_more_than_8_bits_are_named(tmp_path: Path) -> None:
    for kind, form, mode in ((np.uint16, "PNG", "I;16"), (np.int32, "TIFF", "I"), (np.float32, "TIFF", "F")):
        Image.fromarray(np.full((12, 12), 40_000, kind)).save(tmp_path / "image.png", form)
        with pytest.raises(InputError, match=rf"image\.png .*more than 8 bits per value \(Pillow mode {mode}\)"):
            run_alone(_contents, tmp_path, 12)


def test_damage_within_an_image_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)).save(path)
    data = path.read_bytes()
    assert data.count(b"IDAT") == 2
    path.write_bytes(data[: data.rindex(b"IDAT")] + b"ID\xffT" + data[data.rindex(b"IDAT") + 4 :])
    with pytest.raises(InputError, match=r"a\.png \(byte 0\)"):
        run_alone(_contents, tmp_path, 12)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.png \(byte 0\).*exceeds limit"):
        run_alone(_contents, tmp_path, 12)


def test_image_files_are_cropped_to_the_size_of_the_samples(tmp_path: Path) -> None:
    for number, size in enumerate([(40, 30), (12, 12), (13, 50)]):
        Image.fromarray(np.full((*size, 3), 10 * number, np.uint8)).save(tmp_path / f"{number}.png")
    found, _, identity, preprocessing = run_alone(_contents, tmp_path, 12)
    assert found.shape == (3, 12, 12, 3)
    assert found[:, 0, 0, 0].tolist() == [0, 10, 20]
    assert "centre crop to 12" in preprocessing
    assert run_alone(_contents, tmp_path, 10)[2] != identity
    with pytest.raises(InputError, match=r"1\.png: image 1 is 12x12, but the first one is 30x40"):
        run_alone(_contents, tmp_path, None)


def test_copies_bring_the_rule_that_made_them_uint8_and_classes_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "samples.tar").mkdir()
    shard = tmp_path / "samples.tar" / "shard-000000.tar"
    write_tar(shard, some_images(4), 0, True)
    for settings in ('{"uint8_rounding": "nearest"}', '{"quantiser": "round"}'):  # today's, and of an earlier version
        (tmp_path / "samples.json").write_text(settings)
        assert run_alone(_rounding, tmp_path / "samples.tar") == "nearest"
    with tarfile.open(shard, "a") as tar:
        info = tarfile.TarInfo("00004.cls")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"cat"))
    with pytest.raises(InputError, match="00004.cls holds b'cat'"):
        run_alone(_rounding, tmp_path / "samples.tar")


def _rounding(world: World, path: Path) -> str | None:
    return open_image_set(path, world).uint8_rounding


def test_the_crop_is_the_middle() -> None:
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 20:40] = 200
    assert (center_crop(Image.fromarray(picture), 20) == 200).all()


def test_unreadable_images_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no images"):
        run_alone(_contents, tmp_path, None)
    with pytest.raises(InputError, match="not found"):
        run_alone(_contents, tmp_path / "nowhere", None)
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"a\.png"):
        run_alone(_contents, tmp_path, 8)
    with pytest.raises(InputError, match="not found: evaluate.reference.adm=nowhere.*openai/guided-diffusion"):
        check_reference("adm", "nowhere")


def moments(count: int = 50):
    return moments_of([np.random.default_rng(0).standard_normal((count, 6)).astype(np.float32)])


def test_statistics_are_kept_and_refused_for_other_weights(tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    for _ in range(2):
        before = path.read_bytes() if path.exists() else None
        write_statistics(path, {"pool": moments()}, {"pool": "weights A"}, {"count": 50, "size": [8, 12]})
    assert path.read_bytes() == before
    found = read_statistics(path, {"pool": "weights A"}, {"pool": 6})["pool"]
    assert torch.equal(found.covariance, moments().covariance)
    assert found.count == 50
    assert images_of(path) == MadeOf(50, [8, 12], None)
    with pytest.raises(InputError, match="other weights or preprocessing"):
        read_statistics(path, {"pool": "weights B"}, {"pool": 6})
    assert read_statistics(path, {"spatial": "weights A"}, {"spatial": 6}) == {}
    images = {"count": 50, "size": [8, 8], "preprocessing": "stretched to 8 pixels"}
    write_statistics(path, {"pool": moments()}, {"pool": "weights A"}, images)
    with pytest.raises(InputError, match=r"stretched to 8 pixels.* than the one in use \(centre crop to 8"):
        images_of(path)
    for manifest in ("no JSON", "[1]", '{"format": "another"}'):
        np.savez(path, manifest=np.array(manifest), mu=np.zeros(6), sigma=np.eye(6))
        with pytest.raises(InputError, match="its manifest is not one of 'rear_scale statistics 1'"):
            read_statistics(path, {"pool": "weights A"}, {"pool": 6})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"mu": np.zeros(5)}, r"mu \(5,\) and sigma \(6, 6\) are not of 6 features"),
        ({"mu": np.full(6, np.nan)}, "mu is not made of finite floats"),
        ({"sigma": np.triu(np.ones((6, 6)))}, "sigma is not symmetric"),
        ({"sigma": np.ones((6, 6), int)}, "sigma is not made of finite floats"),
    ],
)
def test_published_statistics_are_checked(tmp_path: Path, change: dict[str, np.ndarray], expected: str) -> None:
    whole = {"mu": np.zeros(6, np.float32), "sigma": np.eye(6)}
    np.savez(tmp_path / "good.npz", **whole)
    good = read_statistics(tmp_path / "good.npz", {}, {"pool": 6})["pool"]
    assert good.mean.dtype == torch.float64
    assert good.count is None
    np.savez(tmp_path / "bad.npz", **{**whole, **change})
    with pytest.raises(InputError, match=expected):
        read_statistics(tmp_path / "bad.npz", {}, {"pool": 6})


class Hostile:
    def __reduce__(self):
        return (Path("hostile").write_text, ("was here",))


def test_hostile_damaged_and_missing_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hostile.pth").write_bytes(pickle.dumps({"fc.weight": Hostile()}))
    torch.save({"fc.weight": Hostile()}, "hostile.zip.pth")
    Path("noise.pth").write_bytes(b"no weights")
    torch.save([torch.zeros(2)], "list.pth")
    torch.save({"fc.weight": torch.zeros(2)}, INCEPTION.name)
    for name, expected in {
        "hostile.pth": "holds more than tensors",
        "hostile.zip.pth": "holds more than tensors",
        "noise.pth": "noise.pth (is a pickle that holds more than tensors|cannot be read)",
        "list.pth": "does not hold tensors by name",
        "none.pth": f"not found: evaluate.inception_weights=none.pth. Download {INCEPTION.name} from https",
        INCEPTION.name: "but that of the published file of this name begins with 6726825d",
    }.items():
        with pytest.raises(InputError, match=expected) as caught:
            read_weight_file(name, "evaluate.inception_weights", INCEPTION)
        assert "\n" not in str(caught.value)
    assert not Path("hostile").exists()
    with pytest.raises(InputError, match="evaluate.inception_weights is not set"):
        read_weight_file(None, "evaluate.inception_weights", INCEPTION)


class WrongCall:
    """An allowed function, called with what it does not take."""

    def __reduce__(self):
        return (torch._utils._rebuild_tensor_v2, (1,))


def test_weight_files_of_any_damage_are_one_error(tmp_path: Path) -> None:
    files = {
        "page.pth": b"error 404",  # IndexError
        "cut.pth": pickle.dumps(1 << 20, protocol=2)[:4],  # struct.error
        "call.pth": pickle.dumps(WrongCall(), protocol=2),  # TypeError
        "empty.bin": b"",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=rf"weights=.*{name} (cannot be read|is empty)"):
            read_weight_file(tmp_path / name, "weights", INCEPTION)


def test_other_weights_are_read_and_known_as_such(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "seeded.pth")
    found = read_weight_file(tmp_path / "seeded.pth", "evaluate.inception_weights", INCEPTION)
    assert found.is_published is False
    right = PublishedFile("seeded.pth", "https://example.org", found.sha256[:8])
    assert read_weight_file(tmp_path / "seeded.pth", "f", right).is_published


def test_a_network_names_what_its_file_lacks() -> None:
    model = torch.nn.Linear(3, 2)
    for state, expected in (
        ({"weight": torch.zeros(2, 3)}, "has no bias"),
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, r"weight is \[2, 4\], not \[2, 3\]"),
        ({"weight": torch.zeros(2, 3), "bias": torch.tensor([0.0, torch.nan])}, "not finite"),
    ):
        with pytest.raises(InputError, match=expected):
            fill(model, state, "file")


def test_networks_take_uint8_images_alone_and_refuse_what_is_not_finite() -> None:
    with pytest.raises(InputError, match="images are float32"):
        as_batch(np.zeros((1, 8, 8, 3), np.float32), torch.device("cpu"))
    with pytest.raises(InputError, match="channels last"):
        as_batch(np.zeros((1, 3, 8, 8), np.uint8), torch.device("cpu"))
    with pytest.raises(InputError, match="pool features of 1 of 2 images are not finite"):
        checked("pool", torch.tensor([[1.0, 2.0], [torch.nan, 0]]))


def test_the_resize_has_neither_half_pixels_nor_antialiasing() -> None:
    ramp = torch.arange(8.0).expand(1, 1, 4, 8)
    assert resize_tf1(ramp, 16)[0, 0, 0].tolist() == [min(i / 2, 7) for i in range(16)]
    assert resize_tf1(ramp, 4)[0, 0, 0].tolist() == [0, 2, 4, 6]
    assert torch.equal(resize_tf1(ramp[..., :4], 4), ramp[..., :4])


def test_inception_averages_do_not_count_the_padding() -> None:
    torch.manual_seed(0)
    network = Inception().eval()
    constant = torch.full((1, 1280, 8, 8), 2.0)
    block = network.Mixed_7b
    with torch.inference_mode():
        pooled = block.branch_pool(constant)
        assert torch.equal(block(constant)[:, -192:], pooled)


def test_both_uint8_rules() -> None:
    images = torch.tensor([0.0, 0.5, 0.9999, 1.2, -0.1])[None, :, None, None].expand(1, 5, 1, 1)
    images = images[:, :3], torch.cat([images[:, 3:], images[:, :1]], 1)
    assert to_uint8(images[0], "truncate").ravel().tolist() == [0, 127, 254]
    assert to_uint8(images[0], "nearest").ravel().tolist() == [0, 128, 255]
    assert to_uint8(images[1], "truncate").ravel().tolist() == [255, 0, 0]
