"""Class ids: maps in every form, and sets that must agree on them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_config
from PIL import Image

from rear_scale.config import DataConfig, ExperimentConfig, InputError
from rear_scale.evaluate.images.image_set import ImageSet, from_arrays
from rear_scale.evaluate.job import check_class_names
from rear_scale.shards.classes import check_same_classes, class_id, names_by_id, read_class_map
from rear_scale.shards.codebook import read_both
from rear_scale.shards.images import write_images
from rear_scale.shards.reader import check_agree
from rear_scale.shards.record import Manifest, read_manifest
from rear_scale.shards.sources import open_source


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n02 1 second\nn01 0 first one\n", {"n02": 1, "n01": 0}),
        ("n02 1\r\n\r\nn01 0\r\n", {"n02": 1, "n01": 0}),
        ("\ufeffn01 3", {"n01": 3}),
        ("1 n01\n0 n02", {"n01": 1, "n02": 0}),
        ("1 n01 tench, Tinca tinca\n0 n02 goldfish", {"n01": 1, "n02": 0}),
        ("n01\nn02", {"n01": 0, "n02": 1}),
        ("n01 tench, Tinca tinca\nn02 goldfish\nn03", {"n01": 0, "n02": 1, "n03": 2}),
        ("0\n90\n180", {"0": 0, "90": 1, "180": 2}),
        ("0 0\n1 1", {"0": 0, "1": 1}),
        ("a 1\nb 1", {"a": 1, "b": 1}),
        ('{"a b": 1, "c": 0}', {"a b": 1, "c": 0}),
    ],
)
def test_class_maps_of_every_form(tmp_path: Path, text: str, expected: dict[str, int]) -> None:
    (tmp_path / "map").write_bytes(text.encode())
    assert read_class_map(tmp_path / "map") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01 1\nn02", "line 1 has '1' after its name, but not all lines have an id there"),
        ("n01 1\nn02 second", "not all lines have an id there"),
        ("n01 -1\nn02 2", "line 1 has '-1' after its name"),
        ("n01 1.5\nn02 2.5", "line 1 has '1.5' after its name"),
        ("n01 4x4\nn02 jeep", "line 1 has '4x4' after its name"),
        ("0 0\n90 1\n180 2", "both columns are numbers"),
        ("n01 tench\n2 goldfish", "line 2 begins with a number and others do not"),
        ("0 airplane\n1", "line 2 is a number alone"),
        ("n01 0\nn01 1", "the name n01 occurs twice"),
        ("n01\nn01", "the name n01 occurs twice"),
        ("n01 65536", "line 1 has the id 65536, not a whole number in 0..65535"),
        (f"n01 {'9' * 5000}", "line 1 has the id 999"),
        ("", "it has no class"),
        ("{}", "it has no class"),
        ('{"a": 1.0}', "the id of a is '1.0'"),
        ('{"a": true}', "the id of a is 'True'"),
        ('{"a": -1}', "the id of a is '-1'"),
        ('{"a": {"b": 1}}', "the id of a is"),
        ('{"a": 1, "a": 2}', "a .*twice"),
        ('{"\\ud800": 1}', r"\\ud800 is not text"),
        ('{"a": ' + "9" * 5000 + "}", "cannot be read"),
        ('{"a": ' + "[" * 100_000, "cannot be read"),
    ],
)
def test_class_maps_that_may_mean_something_else_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "map").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_class_map(tmp_path / "map")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_class_map_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "map").write_bytes(b"caf\xe9 0")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_class_map(tmp_path / "map")
    with pytest.raises(InputError, match="not found: the class map"):
        read_class_map(tmp_path)


def test_ids_as_text() -> None:
    assert [class_id(text) for text in ("0", " 12\n", "65535")] == [0, 12, 65535]
    assert [class_id(text) for text in ("", "-1", "1.0", "²", "١", "65536", "1 2", "9" * 5000)] == [None] * 8


def folders(root: Path, *names: str, empty: tuple[str, ...] = ()) -> Path:
    for name in (*names, *empty):
        (root / name).mkdir(parents=True)
        if name in names:
            Image.new("RGB", (4, 4)).save(root / name / "0.png")
    return root


def test_an_empty_class_folder_is_refused_unless_a_map_fixes_the_ids(tmp_path: Path) -> None:
    images = folders(tmp_path / "images", "a", "c", "d", empty=("b",))
    with pytest.raises(InputError, match="1 of 4 class folders hold no readable files, b among them, but .* class map"):
        open_source(images)
    (images / "b/0.gif").write_bytes(b"x")
    with pytest.raises(
        InputError, match=r"b among them .left out: 1 files of other formats .\.gif 1; first: b/0.gif.., but"
    ):
        open_source(images)
    (tmp_path / "map").write_text("a 0\nb 1\nc 2\nd 3\ne 4")
    source = open_source(images, tmp_path / "map")
    assert source.labels == [0, 2, 3]
    assert source.class_names == ["a", "b", "c", "d", "e"]
    assert source.notes == ["2 of 5 classes of the class map have no images, b among them"]


def test_numbers_as_names_of_folders_are_said_with_their_ids(tmp_path: Path) -> None:
    images = folders(tmp_path / "images", *map(str, range(12)))
    assert open_source(images).notes == [
        "class folders are numbered in the order of their names as text: folder 10 = id 2, folder 11 = id 3, folder 2 = id 4, "
        "folder 3 = id 5, folder 4 = id 6, folder 5 = id 7, folder 6 = id 8, folder 7 = id 9, folder 8 = id 10, "
        "folder 9 = id 11. Use a class map for other ids"
    ]
    assert open_source(folders(tmp_path / "ten", *map(str, range(10)))).notes == []
    assert open_source(folders(tmp_path / "names", "n01", "n02")).notes == []
    assert "folder 90 = id 3" in open_source(folders(tmp_path / "angles", "0", "90", "180", "270")).notes[0]


ABC = ["a", "b", "c"]
NUMBERS = [str(number) for number in range(12)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "c"], "class 1 is b in train and is c in val"),
        (["a", "b"], "class 2 is c in train and does not exist in val .3 and 2 classes."),
        (["a", "b", "c", "d"], "class 3 does not exist in train and is d in val"),
        (["b", "a", "c"], "class 0 is a in train and is b in val"),
    ],
)
def test_other_classes_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_same_classes("train", ABC, "val", names)


def test_classes_without_names_agree_with_each_other_and_cannot_be_told_from_named_ones() -> None:
    assert check_same_classes("train", ABC, "val", list(ABC)) is None
    assert check_same_classes("train", NUMBERS, "val", NUMBERS[:9]) is None
    assert check_same_classes("train", ABC, "val", NUMBERS) == (
        "note: train names its classes, but val has class ids alone: they are assumed to be the same classes"
    )
    with pytest.raises(InputError, match="class 2 is 10 in train and is 2 in val"):
        check_same_classes("train", sorted(NUMBERS), "val", NUMBERS)


def manifest(**changes) -> Manifest:
    values = {"tokenizer": "compact", "tokenizer_sha256": "a" * 64, "codebook_sha256": "b" * 64, "class_names": ABC}
    sizes = {"codebook_size": 32, "codebook_dim": 8, "num_tokens": 16, "num_samples": 0, "crops_per_image": 1}
    return Manifest(**{**values, **sizes, "label_counts": [0, 0, 0], "shards": [], **changes})


def test_a_validation_set_of_another_tokenizer_codebook_or_classes_is_refused() -> None:
    data = DataConfig(train="T", val="V")
    for changes, message in (
        ({"tokenizer": "titok_b64"}, "data.train=T was made by tokenizer compact, but data.val=V by titok_b64"),
        (
            {"tokenizer_sha256": "c" * 64},
            "data.train=T has tokenizer weights with sha256 aaaaaaaaaaaa, but data.val=V with cccc",
        ),
        (
            {"codebook_sha256": "c" * 64},
            "data.train=T has a codebook with sha256 bbbbbbbbbbbb, but data.val=V with cccc",
        ),
        ({"class_names": ["a", "c", "b"]}, "class 1 is b in data.train=T and is c in data.val=V"),
    ):
        with pytest.raises(InputError, match=message):
            check_agree(manifest(), manifest(**changes), data)
    # Of imported tokens, and of sets without a codebook, the maker is not known.
    for unknown in ({"tokenizer_sha256": ""}, {"tokenizer_sha256": "0" * 64}, {"codebook_sha256": None}):
        assert check_agree(manifest(), manifest(**unknown), data) is None


def test_training_and_token_scores_compare_both_sets(tmp_path: Path, tokens: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in tokens.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    cfg = tiny_config(tmp_path, tokens, f"data.val={other}")
    assert read_both(cfg, True)[1] == read_manifest(other)
    index = json.loads((other / "index.json").read_text())
    (other / "index.json").write_text(json.dumps({**index, "class_names": ["0", "2", "1", "3", "4"]}))
    with pytest.raises(InputError, match="class 1 is 1 in data.train=.* and is 2 in data.val"):
        read_both(cfg, True)


def test_sets_that_a_classifier_judges_have_its_classes(tmp_path: Path) -> None:
    write_images(tmp_path / "images", [(Image.new("RGB", (4, 4)), 0)], 4, ["a", "b"])
    cfg = tiny_config(tmp_path, tmp_path, f"evaluate.classifier={{weights: {tmp_path}/w, images: {tmp_path}/images}}")

    def judged(names: list[str] | None) -> ImageSet:
        images = from_arrays("set", "x", np.zeros((2, 4, 4, 3), np.uint8), None)
        return replace(images, class_names=names)

    for names in (["a", "b"], None):
        check_class_names(cfg, "samples", judged(names))
    with pytest.raises(InputError, match="class 0 is a in evaluate.classifier.images=.* and is b in samples"):
        check_class_names(cfg, "samples", judged(["b", "a"]))
    without: ExperimentConfig = tiny_config(tmp_path, tmp_path)
    check_class_names(without, "samples", judged(["b", "a"]))


def test_names_by_id_fill_gaps_with_numbers() -> None:
    assert names_by_id({"c": 2, "a": 0, "also a": 0}) == ["a", "1", "c"]
