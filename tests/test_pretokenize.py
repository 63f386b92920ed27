from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from helpers import ROOT, run_alone, run_ranks
from PIL import Image
from sklearn.datasets import load_sample_images

from rear_scale import config
from rear_scale.config import DataConfig, ExperimentConfig, InputError
from rear_scale.files import file_sha256, unfinished
from rear_scale.shards import pretokenize, record, writer
from rear_scale.shards.crops import CROPS, BadImage, center_crop, cut, decode_image
from rear_scale.shards.images import open_images, png, write_images
from rear_scale.shards.reader import open_stream, open_tokens
from rear_scale.shards.sources import load_crops, open_source
from rear_scale.shards.tar_index import scan
from rear_scale.tokenizer.base import to_unit_range
from rear_scale.tokenizer.compact import CompactTokenizer
from rear_scale.world import World

sys.path.insert(0, str(ROOT / "data"))
from prepare_imagefolder import prepare  # noqa: E402

NUM_IMAGES = 107


def settings(folder: Path, out: str, *overrides: str) -> ExperimentConfig:
    """107 images and an untrained tokenizer in `folder`, to be written to folder/out."""
    if not (folder / "weights").exists():
        torch.manual_seed(0)
        tokenizer = CompactTokenizer(16, 32, 8, 16)
        with torch.no_grad():  # codes among the latents, so that images get different tokens
            tokenizer.codes.copy_(tokenizer.latents(torch.rand(2, 3, 16, 16)))
        tokenizer.save(folder / "weights")
        pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 16, 16, 3), dtype=np.uint8)
        write_images(
            folder / "images", ((Image.fromarray(image), n % 3) for n, image in enumerate(pixels)), 16, ["a", "b", "c"]
        )
    return config.load("demo.yaml", [*tiny_overrides(folder, out), *overrides])


def tiny_overrides(folder: Path, out: str) -> list[str]:
    """What demo.yaml needs for that."""
    return [
        f"tokenizer.weights={folder / 'weights'}",
        "tokenizer.image_size=16",
        "tokenizer.num_tokens=16",
        "tokenizer.codebook_size=32",
        "tokenizer.codebook_dim=8",
        f"pretokenize.images={folder / 'images'}",
        f"pretokenize.out={folder / out}",
        "pretokenize.batch_size=8",
    ]


SMALL_SHARDS = "pretokenize.samples_per_shard=20"  # several, so that there is something to share out


def write(world: World, cfg: ExperimentConfig) -> None:
    pretokenize.pretokenize(cfg, pretokenize.check_pretokenize(cfg), world)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_bytes_do_not_depend_on_ranks_or_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_alone(write, settings(tmp_path, "one", SMALL_SHARDS))
    expected = files(tmp_path / "one")
    assert sorted(expected) == ["codebook.npy", "index.json", *(f"shard-{n:06d}.tar" for n in range(6))]
    run_ranks(2, write, settings(tmp_path, "two", SMALL_SHARDS))
    assert files(tmp_path / "two") == expected

    written = writer.write_shard

    def killed(folder, index, *rest, **named):
        if index == 3:
            unfinished(folder / "shard-000003.tar").write_bytes(b"half")
            raise KeyboardInterrupt
        return written(folder, index, *rest, **named)

    cfg = settings(tmp_path, "killed", SMALL_SHARDS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writer, "write_shard", killed)
        run_alone(write, cfg)
    assert not (tmp_path / "killed/index.json").exists()
    again: list[int] = []
    monkeypatch.setattr(
        writer,
        "write_shard",
        lambda folder, index, *rest, **named: again.append(index) or written(folder, index, *rest, **named),
    )
    run_alone(write, cfg)
    assert again == [3, 4, 5]
    assert files(tmp_path / "killed") == expected
    run_alone(write, cfg)
    assert again == [3, 4, 5]


def test_tokens_labels_and_manifest_are_those_of_the_images(tmp_path: Path) -> None:
    cfg = settings(tmp_path, "out")
    images = open_images(tmp_path / "images")
    run_alone(write, cfg)
    opened = open_tokens(tmp_path / "out", str(tmp_path / "cache"))
    pixels, labels = images.load()
    tokenizer = CompactTokenizer.from_file(str(tmp_path / "weights"))

    def encoded(world: World) -> np.ndarray:
        # In whole batches and with the threads of the job: others round otherwise, and codes of random weights are close.
        whole = np.concatenate([pixels, np.zeros_like(pixels[: -len(pixels) % cfg.pretokenize.batch_size])])
        batches = to_unit_range(torch.from_numpy(whole)).contiguous().split(cfg.pretokenize.batch_size)
        return torch.cat([tokenizer.encode(batch) for batch in batches])[: len(pixels)].numpy()

    assert np.array_equal(opened.tokens, run_alone(encoded))
    assert len(np.unique(opened.tokens)) > 10
    assert np.array_equal(opened.labels, labels)
    manifest = opened.manifest
    assert (manifest.num_samples, manifest.num_images, manifest.num_tokens, manifest.codebook_size) == (
        107,
        107,
        16,
        32,
    )
    assert (manifest.label_counts, manifest.class_names) == ([36, 36, 35], ["a", "b", "c"])
    assert manifest.tokenizer_sha256 == file_sha256(tmp_path / "weights")
    assert np.array_equal(record.read_codebook(tmp_path / "out", manifest), tokenizer.codebook.numpy())


def test_what_is_missing_or_does_not_fit_is_named(tmp_path: Path) -> None:
    cfg = settings(tmp_path, "out")
    for name in ("images", "out"):
        changed = config.from_dict(config.to_dict(cfg), "test", [f"pretokenize.{name}=null"])
        with pytest.raises(InputError, match=f"pretokenize.{name} is not set"):
            pretokenize.check_pretokenize(changed)
    changed = config.from_dict(config.to_dict(cfg), "test", ["tokenizer.image_size=24"])
    with pytest.raises(InputError, match="tokenizer.image_size=24"):
        pretokenize.check_pretokenize(changed)
    run_alone(lambda world: pretokenize.pretokenize(cfg, pretokenize.check_pretokenize(cfg), world))
    tokenizer = CompactTokenizer.from_file(str(tmp_path / "weights"))
    tokenizer.codes.add_(1)
    tokenizer.save(tmp_path / "weights")
    with pytest.raises(InputError, match="is finished, but was made from other inputs: tokenizer.weights sha256"):
        run_alone(lambda world: pretokenize.pretokenize(cfg, pretokenize.check_pretokenize(cfg), world))


def photographs(folder: Path) -> Path:
    """Class folders with real photographs in odd formats, two of them broken."""
    china, flower = (Image.fromarray(image) for image in load_sample_images().images)
    for name in ("buildings", "plants"):
        (folder / name).mkdir(parents=True)
    for number in range(9):
        box = (number * 60, number * 20, number * 60 + 100 + number, number * 20 + 80)
        china.crop(box).save(folder / f"buildings/{number}.jpg")
        flower.crop(box).save(folder / f"plants/{number}.webp")
    whole = (folder / "buildings/3.jpg").read_bytes()
    (folder / "buildings/truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "buildings/text.jpg").write_text("not an image")
    china.crop((0, 0, 90, 70)).convert("CMYK").save(folder / "buildings/cmyk.JPEG")
    flower.crop((0, 0, 70, 90)).quantize(32).save(folder / "plants/palette.png", transparency=3)
    china.crop((5, 5, 6, 6)).save(folder / "plants/one_pixel.png")
    deep = np.asarray(china.crop((0, 0, 64, 48)).convert("L")).astype(np.uint16) * 256
    Image.fromarray(deep).save(folder / "plants/sixteen_bit.png")
    (folder / "plants/notes.txt").write_text("left alone")
    return folder


def test_bad_images_are_skipped_counted_and_listed_for_any_ranks_and_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = photographs(tmp_path / "photographs")
    cfgs = {
        name: settings(
            tmp_path, name, f"pretokenize.images={images}", "pretokenize.crops=ten", "pretokenize.samples_per_shard=30"
        )
        for name in ("one", "two", "killed")
    }
    run_alone(write, cfgs["one"])
    expected = files(tmp_path / "one")
    run_ranks(2, write, cfgs["two"])
    assert files(tmp_path / "two") == expected
    calls = []

    def killed(*arguments, **named):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return make(*arguments, **named)

    make = pretokenize._make_shard
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretokenize, "_make_shard", killed)
        run_alone(write, cfgs["killed"])
    run_alone(write, cfgs["killed"])
    assert files(tmp_path / "killed") == expected

    manifest = record.read_manifest(tmp_path / "one")
    assert (manifest.num_images, manifest.num_samples, manifest.crops_per_image, manifest.num_skipped) == (
        22,
        220,
        10,
        2,
    )
    assert manifest.class_names == ["buildings", "plants"]
    assert manifest.label_counts == [100, 120]
    listed = (tmp_path / "one/skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == ["buildings/text.jpg", "buildings/truncated.jpg"]
    assert "0x" not in listed[0], "an address in memory differs from run to run"
    assert "truncated" in listed[1]


def test_crops_follow_one_another_and_are_those_of_the_images(tmp_path: Path) -> None:
    images = photographs(tmp_path / "photographs")
    tokenizer_cfg = settings(tmp_path, "ten")
    tokenizer = CompactTokenizer.from_file(tokenizer_cfg.tokenizer.weights)
    for crops, number in CROPS.items():
        run_alone(write, settings(tmp_path, crops, f"pretokenize.images={images}", f"pretokenize.crops={crops}"))
        opened = open_tokens(tmp_path / crops, str(tmp_path / "cache"))
        with Image.open(images / "buildings/1.jpg") as image:
            pixels = cut(image.convert("RGB"), 16, crops)
        ids = tokenizer.encode(torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2) / 255)
        assert np.array_equal(opened.tokens[number : 2 * number], ids.numpy())


def test_images_for_training_a_tokenizer_come_from_any_source(tmp_path: Path) -> None:
    images = photographs(tmp_path / "photographs")
    prepare(images, tmp_path / "shards", 16, None, 0.1)
    expected, _ = open_images(tmp_path / "shards").load()
    for source, broken in ((images, 2), (tmp_path / "shards", 0)):
        crops, skipped = load_crops(open_source(source), 16)
        assert np.array_equal(crops, expected)
        assert len(skipped) == broken
    with pytest.raises(InputError, match="tokenizer.image_size=24, but the images .* have 16 pixels"):
        load_crops(open_source(tmp_path / "shards"), 24)
    with pytest.raises(InputError, match="GiB of memory"):
        load_crops(open_source(images), 2**17)


def test_odd_modes_become_rgb(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "photographs")
    deep = np.asarray(decode_image((folder / "plants/sixteen_bit.png").read_bytes()))
    grey = np.asarray(Image.fromarray(load_sample_images().images[0]).crop((0, 0, 64, 48)).convert("L"))
    assert np.array_equal(deep, np.stack([grey] * 3, -1)), "clipped, not scaled"
    for name in ("buildings/cmyk.JPEG", "plants/palette.png", "plants/one_pixel.png"):
        image = decode_image((folder / name).read_bytes())
        assert image.mode == "RGB"
        assert cut(image, 16, "ten").shape == (10, 16, 16, 3)


def test_too_many_bad_images_are_an_error(tmp_path: Path) -> None:
    images = photographs(tmp_path / "photographs")
    cfg = settings(tmp_path, "out", f"pretokenize.images={images}", "pretokenize.max_bad_fraction=0.05")
    expected = (
        r"2 of 24 images .* more than the allowed 5.0%; .*buildings/text.jpg.* or raise pretokenize.max_bad_fraction"
    )
    with pytest.raises(InputError, match=expected):
        run_alone(write, cfg)
    assert (tmp_path / "out/skipped.txt").exists()
    assert not (tmp_path / "out/index.json").exists()


def test_a_class_map_overrides_the_order_of_folders(tmp_path: Path) -> None:
    images = photographs(tmp_path / "photographs")
    shards = tmp_path / "shards"
    prepare(images, shards, None, None, 0.1)
    (images / "empty").mkdir()
    for number, text in enumerate(
        (
            '{"plants": 0, "buildings": 2, "empty": 1}',
            "plants 0\nbuildings 2\nempty 1",
            "plants\nempty rooms\nbuildings a b",
        )
    ):
        (tmp_path / "map").write_text(text)
        for source in (images, shards):
            out = f"out{number}{source.name}"
            wanted = (f"pretokenize.images={source}", f"pretokenize.class_map={tmp_path / 'map'}")
            run_alone(write, settings(tmp_path, out, *wanted))
            manifest = record.read_manifest(tmp_path / out)
            assert manifest.label_counts == [12, 0, 10]
            assert manifest.class_names == ["plants", "empty", "buildings"]
    (tmp_path / "map").write_text("plants 0")
    with pytest.raises(InputError, match="2 of 3 folders .* not in the class map, buildings"):
        pretokenize.check_pretokenize(settings(tmp_path, "out", f"pretokenize.images={images}", wanted[1]))


def test_plain_webdataset_shards_give_the_same_tokens_as_the_folder(tmp_path: Path) -> None:
    images = photographs(tmp_path / "photographs")
    run_alone(write, settings(tmp_path, "folder", f"pretokenize.images={images}"))
    shards = tmp_path / "plain"
    shards.mkdir()
    with webdataset.ShardWriter(f"{shards}/images-%03d.tar", maxcount=7, verbose=0) as writer_:
        for number, image in enumerate(open_source(images).read(0, 100)):
            extension = image.name.rpartition(".")[2].lower()
            writer_.write({"__key__": f"{number:05d}", extension: image.data, "cls": image.label})
    run_alone(write, settings(tmp_path, "tars", f"pretokenize.images={shards}"))
    one, other = (open_tokens(tmp_path / name, str(tmp_path / "cache")) for name in ("folder", "tars"))
    assert np.array_equal(one.tokens, other.tokens)
    assert np.array_equal(one.labels, other.labels)
    assert [line.split("\t")[0] for line in (tmp_path / "tars/skipped.txt").read_text().splitlines()] == [
        "images-001.tar/00010",
        "images-001.tar/00011",
    ]


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither class folders nor tar shards"):
        open_source(tmp_path / "empty")
    (tmp_path / "empty/class").mkdir()
    with pytest.raises(InputError, match="class folders, but none with a png, jpg"):
        open_source(tmp_path / "empty")
    webdataset.TarWriter(str(tmp_path / "empty/a.tar")).close()
    with pytest.raises(InputError, match="1 tar shards without an image"):
        open_source(tmp_path / "empty")
    with webdataset.TarWriter(str(tmp_path / "empty/a.tar")) as tar:
        tar.write({"__key__": "a", "png": b"1"})
    image = next(open_source(tmp_path / "empty").read(0, 1))
    with pytest.raises(BadImage, match=r"it has png, but needs one image .* and cls"):
        image.decode()
    with pytest.raises(InputError, match="not found"):
        open_source(tmp_path / "nowhere")


def test_prepared_shards_hold_the_files_as_they_are_or_cropped(tmp_path: Path) -> None:
    images = photographs(tmp_path / "photographs")
    for name, size in (("original", None), ("cropped", 16)):
        prepare(images, tmp_path / name, size, None, 0.1)
        before = files(tmp_path / name)
        prepare(images, tmp_path / name, size, None, 0.1)
        assert files(tmp_path / name) == before
    originals = open_source(tmp_path / "original").read(0, 22)
    assert next(originals).data == (images / "buildings/0.jpg").read_bytes()
    pixels, labels = open_images(tmp_path / "cropped").load()
    with Image.open(images / "plants/0.webp") as image:
        assert np.array_equal(pixels[10], center_crop(image.convert("RGB"), 16))
    assert labels.tolist() == [0] * 10 + [1] * 12
    with pytest.raises(InputError, match="different sizes"):
        open_images(tmp_path / "original")
    run_alone(write, settings(tmp_path, "a", f"pretokenize.images={tmp_path / 'original'}"))
    run_alone(write, settings(tmp_path, "b", f"pretokenize.images={tmp_path / 'cropped'}"))
    one, other = (open_tokens(tmp_path / name, str(tmp_path / "cache")) for name in "ab")
    assert np.array_equal(one.tokens, other.tokens)


def test_bf16_encoding_is_close_to_fp32(tmp_path: Path) -> None:
    run_alone(write, settings(tmp_path, "fp32"))
    run_alone(write, settings(tmp_path, "bf16", "pretokenize.precision=bf16"))
    one, other = (open_tokens(tmp_path / name, str(tmp_path / "cache")).tokens for name in ("fp32", "bf16"))
    assert 0.8 < (one == other).mean() < 1


def test_shards_whose_images_are_all_bad_stay_empty(tmp_path: Path) -> None:
    images = photographs(tmp_path / "photographs")
    few = (f"pretokenize.images={images}", "pretokenize.crops=ten", "pretokenize.samples_per_shard=10")
    run_alone(write, settings(tmp_path, "small", *few))
    run_alone(write, settings(tmp_path, "large", *few[:2]))
    manifest = record.read_manifest(tmp_path / "small")
    assert [shard.samples for shard in manifest.shards].count(0) == 2
    one, other = (open_tokens(tmp_path / name, str(tmp_path / "cache")) for name in ("small", "large"))
    streamed = open_stream(DataConfig(train=str(tmp_path / "small")), manifest, world_size=1)
    assert np.array_equal(one.tokens, other.tokens)
    assert np.array_equal(streamed.rows(torch.arange(220))[0], other.tokens)


def test_compile_is_asked_for_when_it_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function.__name__) or function)
    run_alone(write, settings(tmp_path, "eager"))
    assert compiled == []
    run_alone(write, settings(tmp_path, "compiled", "pretokenize.compile=true"))
    assert compiled == ["encode"]


def test_a_damaged_tar_is_named_with_its_byte(tmp_path: Path) -> None:
    cfg = settings(tmp_path, "out")
    path = tmp_path / "images/shard-000000.tar"
    data = path.read_bytes()
    second = scan(path)[1].first_byte - 512  # its header
    for changed, message in (
        (data[: second + 600], f"truncated at byte {second + 600}"),
        (data[:second] + b"x" * 512 + data[second + 512 :], f"damaged at byte {second}"),
        (b"no tar", "damaged at byte 0"),
    ):
        path.write_bytes(changed)
        with pytest.raises(InputError, match=rf"shard-000000.tar is {message}"):
            run_alone(write, cfg)


def _tars_of(folder: Path, first: int) -> Path:
    """One ordinary tar whose bytes change with `first` and whose size does not."""
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    with webdataset.TarWriter(f"{folder}/x.tar", mtime=0) as tar:
        for number, image in enumerate(pixels):
            tar.write({"__key__": f"{number}", "png": png(Image.fromarray(image), 16), "cls": str(first + number)})
    return folder


def _folder_of(folder: Path, seed: int) -> Path:
    """Class folders whose files keep names and sizes whatever the seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        (folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "ab"[number % 2] / f"{number}.bmp")
    return folder


def later(folder: Path) -> None:
    """Moves the times of change of all files by a nanosecond."""
    for path in folder.rglob("*"):
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


@pytest.mark.parametrize("make", [_tars_of, _folder_of])
def test_tokens_of_changed_images_are_not_taken_for_finished(
    tmp_path: Path, make: Callable[[Path, int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    images = make(tmp_path / "input", 0)
    cfg = settings(tmp_path, "out", f"pretokenize.images={images}")
    run_alone(write, cfg)
    before = files(tmp_path / "out")
    capsys.readouterr()
    run_alone(write, cfg)
    assert "out is complete" in capsys.readouterr().err
    sizes = [path.stat().st_size for path in sorted(images.rglob("*"))]
    make(images, 1)
    later(images)
    assert sizes == [path.stat().st_size for path in sorted(images.rglob("*"))]
    with pytest.raises(
        InputError, match=r"out is finished, but was made from other inputs: images 4 .* then, 4 .* now. Remove .*out"
    ):
        run_alone(write, cfg)
    assert files(tmp_path / "out") == before


def test_tokens_of_other_settings_are_not_taken_for_finished(tmp_path: Path) -> None:
    images = _folder_of(tmp_path / "input", 0)
    (tmp_path / "map").write_text("a 0\nb 2")
    run_alone(write, settings(tmp_path, "out", f"pretokenize.images={images}"))
    for override, message in (
        ("pretokenize.crops=flip", "pretokenize.crops center then, flip now"),
        ("pretokenize.exif=apply", "pretokenize.exif ignore then, apply now"),
        (f"pretokenize.class_map={tmp_path}/map", "classes 2 .* then, 3 .* now"),
        ("pretokenize.batch_size=4", "pretokenize.batch_size 8 then, 4 now"),
    ):
        with pytest.raises(InputError, match=message):
            run_alone(write, settings(tmp_path, "out", f"pretokenize.images={images}", override))


def test_tokens_of_a_version_that_recorded_no_times_are_compared_by_names_and_sizes(tmp_path: Path) -> None:
    images = _folder_of(tmp_path / "input", 0)
    cfg = settings(tmp_path, "out", f"pretokenize.images={images}")
    run_alone(write, cfg)
    manifest = record.read_manifest(tmp_path / "out")
    old = dataclasses.replace(manifest, inputs=None)
    assert old.fingerprint == manifest.fingerprint, "training knows the set again"
    record.write_manifest(tmp_path / "out", old)
    assert "inputs" not in (tmp_path / "out/index.json").read_text()
    run_alone(write, cfg)
    picture = Image.new("RGB", (16, 17))
    picture.save(images / "a/9.bmp")
    with pytest.raises(InputError, match="was made by a version that did not record its inputs"):
        run_alone(write, cfg)


def test_a_killed_job_does_not_keep_shards_of_changed_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = _folder_of(tmp_path / "input", 0)
    cfg = settings(tmp_path, "out", f"pretokenize.images={images}")

    def killed(*arguments, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretokenize, "_finish", killed)
        run_alone(write, cfg)
    _folder_of(images, 1)
    later(images)
    run_alone(write, cfg)
    run_alone(write, settings(tmp_path, "new", f"pretokenize.images={images}"))
    assert files(tmp_path / "out") == files(tmp_path / "new")


def test_prepared_shards_of_other_inputs_are_not_taken_for_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = _folder_of(tmp_path / "input", 0), tmp_path / "out"
    (tmp_path / "map").write_text("a 1\nb 0")
    prepare(images, out, 16, None, 0.1)
    before = files(out)
    prepare(images, out, 16, None, 0.1)
    assert "out is complete: 4 images" in capsys.readouterr().out
    for arguments, message in (
        ((images, out, 8, None, 0.1), "--size 16 then, 8 now"),
        ((images, out, None, None, 0.1), "--size 16 then, None now"),
        ((images, out, 16, None, 0.1, "apply"), "--exif ignore then, apply now"),
        ((images, out, 16, tmp_path / "map", 0.1), "classes 2 .* then, 2 .* now"),
        ((_folder_of(tmp_path / "another", 0), out, 16, None, 0.1), "images 4 files .* then, 4 files"),
    ):
        with pytest.raises(InputError, match=message):
            prepare(*arguments)
    later(images)
    with pytest.raises(InputError, match=r"--out=.*out is finished, but was made from other inputs: images 4 files"):
        prepare(images, out, 16, None, 0.1)
    assert files(out) == before
    with pytest.raises(InputError, match="--exif apply needs --size"):
        prepare(images, tmp_path / "new", None, None, 0.1, "apply")


def test_one_image_that_takes_all_memory_does_not_end_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = photographs(tmp_path / "photographs")
    convert = Image.Image.convert

    def fail(image: Image.Image, *arguments, **named):
        if image.size == (104, 80):
            raise MemoryError
        return convert(image, *arguments, **named)

    monkeypatch.setattr(Image.Image, "convert", fail)
    run_alone(write, settings(tmp_path, "out", f"pretokenize.images={images}", "pretokenize.max_bad_fraction=0.5"))
    prepare(images, tmp_path / "shards", 16, None, 0.5)
    for out in ("out", "shards"):
        assert "buildings/4.jpg\tMemoryError\n" in (tmp_path / out / "skipped.txt").read_text()
