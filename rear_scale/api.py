"""The library: a trained model with its tokenizer, and scores of images, in one process without a process group.

    import rear_scale

    m = rear_scale.load("runs/rear_xl", tokenizer="maskgit-vqgan-imagenet-f16-256.bin")
    images = m.sample(classes=[207] * 8, seed=0)                      # uint8 [8, 256, 256, 3]
    tokens = m.encode(images)                                         # int64 [8, 256]
    again = m.decode(tokens)
    terms = m.loss(tokens, classes=[207] * 8)                         # {"loss": ..., "loss_ar": ..., ...}
    scores = rear_scale.evaluate(images, "reference.npz", inception="pt_inception-2015-12-05-6726825d.pth")

Images are numpy arrays, token ids are tensors on the model's device; arguments may be either, or lists. A wrong value or shape
of an argument, and a wrong or missing file, raise InputError, a ValueError of one line; the model is as it was then.

Calls compute with torch's default settings, which the commands have too, whatever the program around has set (autocast, TF32,
default dtype and device, deterministic algorithms, threads), and set back what they change, also after an error or Ctrl-C. They
draw from no global random state. Calls of several threads run one after the other. `Model.model` and `Model.loss` are the
exception: like any module, they compute with the settings of the program.
"""

# n images, S side in pixels, N tokens of an image, K codes, Z width of a code

from __future__ import annotations

import hashlib
import operator
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rear_scale import config as configs
from rear_scale import device as devices
from rear_scale.checkpoint.average import MOVING_AVERAGE, averaged
from rear_scale.checkpoint.folder import Checkpoint
from rear_scale.checkpoint.open import newest_or_refuse, open_with_config
from rear_scale.config import ExperimentConfig, InputError, check_override, first_line, in_quotes, is_remote
from rear_scale.evaluate.images.image_set import ImageSet, check_image_set, from_arrays, open_image_set
from rear_scale.evaluate.job import Evaluation, check_evaluation
from rear_scale.evaluate.networks.base import exact_arithmetic
from rear_scale.evaluate.result import ImageScores
from rear_scale.model import Generator, meta_model
from rear_scale.model.generator import is_head
from rear_scale.objective import Objective, permutation
from rear_scale.objective.prediction import held_out_task
from rear_scale.optim.posthoc_ema import LONGEST
from rear_scale.sample.decode import Decoder
from rear_scale.sample.job import batches_of, check_tokenizer, decode_images, load_generator, make_tokens
from rear_scale.shards.codebook import codebook_of, read_checked
from rear_scale.shards.record import Manifest
from rear_scale.shards.subset import images_of_share
from rear_scale.tokenizer import find_tokenizer, open_tokenizer
from rear_scale.tokenizer.base import Tokenizer, to_unit_range
from rear_scale.world import SingleProcess

__all__ = ["ImageScores", "InputError", "Model", "evaluate", "load"]

Ints = Sequence[int] | np.ndarray | Tensor
TokenIds = Sequence[Sequence[int]] | np.ndarray | Tensor
Pixels = np.ndarray | Tensor
Device = str | torch.device

_ARGUMENTS = ("labels", "num_images", "seed")  # fields of the sample section that `Model.sample` takes as arguments
_OF_FILES = ("also_write", "grid_every_images")  # fields of the sample section about the files of a command


def load(
    path: str | Path,
    tokenizer: str | Path | None = None,
    device: Device | None = None,
    overrides: Sequence[str] = (),
    *,
    config: str | None = None,
    ema: float | bool = False,
) -> Model:
    """The model of a run folder (its newest checkpoint), a checkpoint folder, a safetensors file or a released weight file.

    tokenizer: the tokenizer's weight file; None = the one that the config names. It is read when images are first made or
    taken, or here where it is given. device: "cpu", "cuda" (the current GPU), "cuda:1" and so on; None = a GPU where there is
    one. overrides: values of the config as on a command line ("section.field=value"). config: for a weight file, the config
    to use instead of the one that it holds or that fits it. ema: an average of the weights in their place: of this length
    (sigma_rel, made from the averages of optim.posthoc_ema), or for True the moving average of optim.ema_decay.

    Raises InputError when there is nothing at the path or something else, for damaged files, for weights that do not fit the
    config, for a tokenizer that is missing or is not the one whose tokens the model was trained on, for a wrong override, for
    a device that is not there, and for a model with a tied codebook that is found neither beside the training shards nor in
    a tokenizer.
    """
    place = _device(device)
    source = Path(path).expanduser()
    # Before open_with_config, whose errors would name it as --checkpoint.
    found = newest_or_refuse(source, str(path))
    if config is not None and found.is_dir():
        raise InputError(
            f"config={config}, but {path} brings the config of its training. Leave it out, and give other values as overrides"
        )
    given = _texts(overrides)
    if tokenizer is not None:
        given.append(f"tokenizer.weights={in_quotes(str(Path(tokenizer).expanduser()))}")
    with _as_in_a_command(place):
        checkpoint, cfg = open_with_config(source, config, given)
        if ema is not False:
            checkpoint = _averaged(checkpoint, ema)
        model = Model(checkpoint, configs.with_home(cfg), place)
        if tokenizer is not None:
            _ = model.tokenizer  # so that errors of the file are raised by this call
    return model


def _averaged(checkpoint: Checkpoint, ema: float | bool) -> Checkpoint:
    """The checkpoint with an average in place of its weights. Raises InputError for a length that no average has."""
    length = MOVING_AVERAGE if ema is True else ema
    if ema is not True and not (isinstance(ema, int | float) and 0 < ema < LONGEST):
        raise InputError(
            f"ema={ema} is not a length between 0 and {LONGEST:.4f}. Use ema=0.1, or True for a moving average"
        )
    try:
        return averaged(checkpoint, length)
    except InputError as error:
        raise InputError(re.sub(r"--ema (?=\d)", "ema=", str(error)).replace("--ema", "ema")) from None


class Model:
    """A generator with its config and tokenizer, as `load` opens it.

    model: a torch.nn.Module on `device`, in eval mode, whose weights have the precision of its training (train.precision) and
    no gradients. model(tokens, classes)["logits"] are the logits [n, N, K] of token ids int64 [n, N] for class ids int64 [n]
    on the device: logits[:, t] predicts tokens[:, t] from the class and tokens[:, :t]. model.null_class is the id of "no class".
    A model trained for another order than that of the stored tokens takes them in its order, and the order beside them
    (rear_scale/model/generator.py). It has the heads of the training loss where the source has them.

    To train it further, make it trainable first: model.float().requires_grad_(True).train(). `sample` then uses the new
    weights, without dropout.

    config: the config of the training, with overrides. path, step: the checkpoint, and the updates that it was trained for.
    """

    model: Generator
    config: ExperimentConfig
    device: torch.device
    path: Path
    step: int

    def __init__(self, checkpoint: Checkpoint, config: ExperimentConfig, device: torch.device) -> None:
        self._checkpoint, self.config, self.device = checkpoint, config, device
        self.path, self.step = checkpoint.path, checkpoint.step
        codebook = None if config.model.tie_codebook is None else self._codebook
        with_heads = _has_heads(checkpoint, config)
        self.model = load_generator(config, checkpoint, device, with_heads=with_heads, codebook=codebook)

    def __repr__(self) -> str:
        return f"Model({str(self.path)!r}, step={self.step}, device={str(self.device)!r})"

    def sample(self, classes: Ints, seed: int = 0, overrides: Sequence[str] = ()) -> np.ndarray:
        """Images uint8 [n, S, S, 3] of class ids (int [n]).

        They are those of launchers/sample.py with sample.labels=CLASSES, sample.num_images=n and sample.seed=SEED, byte for
        byte on the same hardware: image i has class classes[i] and the random numbers of (seed, i). overrides: other
        settings of sampling as on a command line, as in ["sample.guidance.scale=4.0", "sample.temperature=0.9"]. As there, a
        batch has sample.batch_size images, and a smaller one is filled up: for few images, ["sample.batch_size=8"] costs
        less, and rounds as that command with the same setting. On a CPU one thread computes, as in a rank of a job.

        Raises InputError for class ids that the model does not have, a wrong setting, and for a tokenizer without weights or
        one whose images are not decoded here (`sample_tokens` works with it).
        """
        cfg = self._sampling(classes, seed, overrides)
        tokenizer = self.tokenizer
        images = np.empty((cfg.sample.num_images, tokenizer.image_size, tokenizer.image_size, 3), np.uint8)
        with _as_in_a_command(self.device), _eval_mode(self.model):
            for ids, tokens in self._batches(cfg):
                # The full batch is decoded: a short one would round otherwise.
                images[ids] = decode_images(tokenizer, tokens, cfg)[: len(ids)]
        return images

    def sample_tokens(self, classes: Ints, seed: int = 0, overrides: Sequence[str] = ()) -> Tensor:
        """Token ids int64 [n, N] of the images that `sample` makes with the same arguments. Needs no tokenizer weights."""
        cfg = self._sampling(classes, seed, overrides)
        with _as_in_a_command(self.device), _eval_mode(self.model):
            found = torch.empty(cfg.sample.num_images, cfg.tokenizer.num_tokens, dtype=torch.int64, device=self.device)
            for ids, tokens in self._batches(cfg):
                found[torch.from_numpy(ids).to(self.device)] = tokens[: len(ids)]
        return found

    def encode(self, images: Pixels) -> Tensor:
        """Token ids int64 [n, N] of images (uint8 [n, S, S, 3], 0..255), in full float32 arithmetic.

        The device holds pretokenize.batch_size images at a time. Raises InputError for images of another type or shape, and
        for a tokenizer without weights.
        """
        tokenizer = self.tokenizer
        pixels, side = _pixels(images), tokenizer.image_size
        if pixels.shape[1:3] != (side, side):
            raise InputError(
                f"images are {list(pixels.shape)}, but {self.config.tokenizer.name} takes [n, {side}, {side}, 3]. Crop or resize "
                f"them to {side} x {side} pixels"
            )
        with _as_in_a_command(self.device), exact_arithmetic():
            batches = _batches(len(pixels), self.config.pretokenize.batch_size)
            return torch.cat([self._encoded(pixels[batch]) for batch in batches])

    @torch.no_grad()
    def _encoded(self, pixels: np.ndarray) -> Tensor:
        return self.tokenizer.encode(to_unit_range(torch.from_numpy(pixels).to(self.device)).contiguous())

    def decode(self, tokens: TokenIds) -> np.ndarray:
        """Images uint8 [n, S, S, 3] of token ids (int [n, N]), rounded to uint8 by the rule of the config.

        The device holds sample.batch_size images at a time. Of the token ids of `sample_tokens` they are the images of
        `sample`, up to the rounding of another batch size. Raises InputError for token ids of another shape or range, and
        for a tokenizer without weights.
        """
        tokenizer = self.tokenizer
        ids = self._tokens(tokens)
        with _as_in_a_command(self.device):
            batches = _batches(len(ids), self.config.sample.batch_size)
            return np.concatenate([decode_images(tokenizer, ids[b].to(self.device), self.config) for b in batches])

    def loss(
        self, tokens: TokenIds, classes: Ints, *, step: int | None = None, ids: Ints | None = None, epoch: int = 0
    ) -> dict[str, Tensor]:
        """The terms of the training loss, each averaged over the batch: token ids (int [n, N]) of class ids (int [n]).

        Values are float32 scalars on the device. "loss" is the weighted sum of the terms and can be differentiated once the
        weights are trainable; the others are detached: "loss_ar"; with heads "loss_encode" and "loss_decode" (reAR Eq. 5 to
        7); own terms by their names; "accuracy", the fraction of tokens that are the model's first choice. Terms whose heads
        the source lacks are left out.

        step: None = the context is clean and every class is known, as in validation. A number, from 1 on = the input of
        training at that step: noisy context, permuted orders and dropped classes with the rates of the step. Each draw is a
        function of (run.seed, ids[i], epoch). ids: the numbers of the samples (int [n], 0 .. 2^32 - 1); None = 0 .. n-1. The
        model computes in the mode that it is in: in eval mode, without dropout of activations. All sequences are one batch.

        Raises InputError for token or class ids that do not fit, for a step below 1 or, where the length of the run is in
        epochs of a set that is not here, without data.assumed_images, and where the heads' codebook is found neither beside
        the training shards nor in the tokenizer.
        """
        cfg, truth = self.config, self._tokens(tokens)
        labels = torch.from_numpy(self._classes(classes))
        numbers = torch.from_numpy(np.arange(len(truth)) if ids is None else _integers(ids, "ids", dimensions=1))
        for name, values in (("classes", labels), ("ids", numbers)):
            if len(values) != len(truth):
                raise InputError(
                    f"{name} has {len(values)} entries, but there are {len(truth)} sequences of tokens. Give one for each"
                )
        epoch = _whole(epoch, "epoch")
        if int(numbers.min()) < 0 or int(numbers.max()) >= 2**32 or not 0 <= epoch < 2**32:
            raise InputError(
                "ids and epoch must lie in 0 .. 2^32 - 1, which random numbers are made of. Use smaller ones"
            )
        if step is not None and _whole(step, "step") < 1:
            raise InputError(f"step={step} is below 1, the first update. Use 1 or more, or None for a clean context")
        plan, codebook = None if step is None else self._plan, self._loss_codebook
        with _cpu_by_default(), _current(self.device):
            objective = Objective(cfg, plan, codebook, self.device)
            if step is None:
                truth, numbers = truth.to(self.device), numbers.to(self.device)
                order = permutation.orders_of_model(cfg.objective.permutation, cfg.tokenizer, numbers)
                task = held_out_task(truth, numbers, order, None)
                output = self.model(task.context, labels.to(self.device), None, task.order)
            else:
                batch = objective.micro_batch(truth, labels, numbers, torch.full_like(numbers, epoch)).to(self.device)
                task = objective.task(batch, step)
                output = self.model(task.context, batch.classes, batch.class_index, task.order)
            total, statistics = objective.loss(output, task)
        computed = [term for term in objective.terms if all(name in output for name in term.reads)]
        names = [name for term in computed for name in (f"loss_{term.name}", *term.reports)]
        return {"loss": total, **{name: objective.statistic(statistics, name) for name in names}}

    def _sampling(self, classes: Ints, seed: int, overrides: Sequence[str]) -> ExperimentConfig:
        """The config with the settings of a call of `sample`."""
        labels = self._classes(classes)
        given = _texts(overrides)
        for text in given:
            section, _, field = check_override(text).key.partition(".")
            if section != "sample" or field in _ARGUMENTS or not field:
                raise InputError(
                    f"override {text}: sample takes settings of sampling alone (sample.FIELD=VALUE); classes and seed are "
                    "arguments. Give other values of the config to rear_scale.load"
                )
            if field in _OF_FILES:
                raise InputError(f"override {text}: sample writes no files. Leave it out, or use launchers/sample.py")
        given.append(f"sample.seed={_whole(seed, 'seed')}")
        cfg = configs.from_dict(configs.to_dict(self.config), str(self.path), given)
        return replace(cfg, sample=replace(cfg.sample, labels=labels.tolist(), num_images=len(labels)))

    def _batches(self, cfg: ExperimentConfig) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Image ids (int64 [b]) and token ids (int64 [B, N], of which the first b rows count) of each batch of a sampling job."""
        decoder = Decoder(self.model, cfg.sample, cfg.objective.permutation)
        for ids in batches_of(cfg):
            yield ids, make_tokens(decoder, ids, cfg, self.device)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The frozen tokenizer, a torch.nn.Module on the device, whose file is read when it is first used.

        Raises InputError when it has no weight file, or one whose tokens the model was not trained on.
        """
        own = self.config.tokenizer
        kind = find_tokenizer(own.name)
        if own.weights is None:
            published = f" ({kind.published})" if kind.published else ""
            raise InputError(
                f"{self.path} was loaded without tokenizer weights, which images need. Give rear_scale.load the file of "
                f"{own.name}{published}: tokenizer=FILE"
            )
        check_tokenizer(self.config, self._checkpoint)
        with _as_in_a_command(self.device):
            return open_tokenizer(own, self.device)

    @cached_property
    def _shards(self) -> Manifest | None:
        """The manifest of the training shards; None where they are not on this machine."""
        folder = self.config.data.train
        if folder is None or not (is_remote(folder) or (Path(folder) / "index.json").is_file()):
            return None
        return read_checked(self.config, folder)

    @cached_property
    def _codebook(self) -> Tensor:
        """float32 [K, Z] of the training shards or, without them, of the tokenizer."""
        own = self.config.tokenizer
        if self._shards is not None and self._shards.codebook_sha256 is not None:
            return codebook_of(self.config, self._shards)
        if own.weights is None:
            tied = self.config.model.tie_codebook
            reason = "a loss that compares heads with the codebook" if tied is None else f"model.tie_codebook={tied}"
            raise InputError(
                f"{self.path} has {reason}, but data.train={self.config.data.train} holds no codebook here, and there are no "
                "tokenizer weights. Give rear_scale.load one of them: tokenizer=FILE, or "
                'overrides=["data.train=FOLDER"]'
            )
        return self.tokenizer.codebook.detach().float()

    @property
    def _loss_codebook(self) -> Tensor:
        """float32 [K, Z]; zeros where no term of the loss reads it."""
        if self.model.features or self.config.objective.terms:
            return self._codebook
        return torch.zeros(self.config.tokenizer.codebook_size, self.config.tokenizer.codebook_dim)

    @cached_property
    def _plan(self) -> configs.Plan:
        """The length of the run and its marks, which no number of ranks changes."""
        values = configs.to_dict(self.config)
        alone = configs.from_dict(values, str(self.path), ["strategy=single"])
        shards, share = self._shards, self.config.data.use_share
        return configs.derive(alone, 1, None if shards is None else images_of_share(shards, share))

    def _classes(self, classes: Ints) -> np.ndarray:
        """int64 [n]. Raises InputError for others than the model's."""
        found, known = _integers(classes, "classes", dimensions=1), self.config.model.num_classes
        wrong = found[(found < 0) | (found >= known)]
        if len(wrong):
            raise InputError(
                f"classes hold {wrong[0]}, but {self.path} has the classes 0 .. {known - 1}. Use these alone"
            )
        return found

    def _tokens(self, tokens: TokenIds) -> Tensor:
        """int64 [n, N] on the CPU. Raises InputError for other shapes and ids."""
        own, found = self.config.tokenizer, _integers(tokens, "tokens", dimensions=2)
        if found.shape[1] != own.num_tokens or found.min() < 0 or found.max() >= own.codebook_size:
            raise InputError(
                f"tokens are {list(found.shape)} of ids {found.min()} .. {found.max()}, but {own.name} has [n, {own.num_tokens}] "
                f"of 0 .. {own.codebook_size - 1}. Use token ids of this tokenizer, in the order in which they are stored"
            )
        return torch.from_numpy(found)


def evaluate(
    images: str | Path | Pixels,
    reference: str | Path | Mapping[str, str | Path],
    inception: str | Path | None = None,
    *,
    classes: Ints | None = None,
    device: Device | None = None,
    overrides: Sequence[str] = (),
) -> ImageScores:
    """Scores of images against references, the same numbers as those of launchers/evaluate.py.

    images: uint8 [n, H, W, 3] (0..255), or the path of an ADM .npz, a folder of images or tar shards. reference: the path of
    an .npz (statistics, images or both), a folder of images or tar shards; or several of them by name. inception: the weight
    file pt_inception-2015-12-05-6726825d.pth, for FID, sFID, Inception Score, precision and recall; None = other networks,
    which overrides name. classes: the class id of each image of an array (int [n]), for scores that count classes; files
    bring their own. device: as for `load`. overrides: settings of evaluation as on a command line, such as
    "evaluate.bootstrap=100". Features are kept in a temporary folder, or in evaluate.cache_dir.

    scores.networks["inception"].references[NAME]["fid"] is a number of one reference; of one path, NAME is the file's name
    without its ending. scores.numbers() lists all of them, each with name, reference and value.

    Raises InputError for images or files that cannot be read or do not fit, and where there are no features to compare by.
    """
    given = _texts(overrides)
    taken = ["evaluate.reference", *([] if inception is None else ["evaluate.inception_weights"])]
    for text in given:
        key = check_override(text).key
        if not key.startswith("evaluate."):
            raise InputError(f"override {text}: here, only settings of evaluation are set. Use evaluate.FIELD=VALUE")
        if any(f"{key}.".startswith(f"{name}.") for name in taken):
            raise InputError(f"override {text}: it is an argument of rear_scale.evaluate. Give it in one place alone")
    values = configs.to_dict(configs.load(str(configs.CONFIG_DIR / "evaluate.yaml"), given))
    values["evaluate"]["reference"] = _references(reference)
    if inception is not None:
        values["evaluate"]["inception_weights"] = str(inception)
    cfg = configs.with_home(configs.from_dict(values, "rear_scale.evaluate"))
    check_evaluation(cfg)
    world = SingleProcess(device=_device(device))
    with _as_in_a_command(world.device), TemporaryDirectory(prefix="rear_scale_") as folder:
        samples = _image_set(images, classes, cfg, world)
        return Evaluation(cfg, Path(folder), world).score(samples)


def _references(reference: str | Path | Mapping[str, str | Path]) -> str | dict[str, str]:
    """The value of evaluate.reference. Raises InputError for anything but paths."""
    several = dict(reference) if isinstance(reference, Mapping) else {"": reference}
    for path in several.values():
        if not isinstance(path, (str, Path)):
            raise InputError(
                f"reference is of type {type(path).__name__}, but a path is wanted, or several of them by name. Save images "
                "with numpy.savez(FILE, arr_0=IMAGES), and give FILE"
            )
    return {name: str(path) for name, path in several.items()} if isinstance(reference, Mapping) else str(reference)


def _image_set(
    images: str | Path | Pixels, classes: Ints | None, cfg: ExperimentConfig, world: SingleProcess
) -> ImageSet:
    if isinstance(images, (str, Path)):
        if classes is not None:
            raise InputError(f"classes are given beside {images}, but files bring their own. Leave classes out")
        path = Path(images).expanduser()
        check_image_set(path)
        return open_image_set(path, world, exif=cfg.evaluate.exif)
    pixels = _pixels(images)
    labels = None if classes is None else _integers(classes, "classes", dimensions=1)
    if labels is not None and len(labels) != len(pixels):
        raise InputError(f"classes has {len(labels)} entries, but there are {len(pixels)} images. Give one for each")
    digest = hashlib.sha256(f"{pixels.shape}".encode() + (b"" if labels is None else labels.tobytes()))
    digest.update(pixels.data)
    return from_arrays("images", digest.hexdigest(), pixels, labels)


def _has_heads(checkpoint: Checkpoint, cfg: ExperimentConfig) -> bool:
    """Whether a source has all heads of its config's model, in their form."""
    stored = checkpoint.shapes()
    heads = {name: tuple(weight.shape) for name, weight in meta_model(cfg).named_parameters() if is_head(name)}
    return all(stored.get(name) == shape for name, shape in heads.items())


def _pixels(images: Pixels) -> np.ndarray:
    """uint8 [n, H, W, 3] without gaps, that may be written to. Raises InputError for anything else."""
    wanted = "uint8 [n, height, width, 3] is wanted. Convert them to 0..255, channels last, of one size"
    try:
        found = _array(images)
    except (TypeError, ValueError) as error:
        raise InputError(f"images cannot be read as an array ({first_line(error)}), but {wanted}") from None
    if found.dtype != np.uint8 or found.ndim != 4 or found.shape[3] != 3 or found.size == 0:
        raise InputError(f"images are {found.dtype} {list(found.shape)}, but {wanted}")
    return np.require(found, requirements=("C", "W"))  # copied only where it has to be


def _integers(values: Any, name: str, *, dimensions: int) -> np.ndarray:
    """A new int64 array of so many dimensions. Raises InputError for anything but whole numbers, and for none."""
    shape = "[n]" if dimensions == 1 else "[n, N]"
    wanted = (
        f"whole numbers of shape {shape} are wanted, with n of at least 1. Use a list, an array or a tensor of them"
    )
    try:
        found = _array(values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} cannot be read as an array ({first_line(error)}), but {wanted}") from None
    if found.dtype.kind not in "iu" or found.ndim != dimensions or found.size == 0:
        raise InputError(f"{name} are {found.dtype} {list(found.shape)}, but {wanted}")
    return found.astype(np.int64)


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _whole(value: Any, name: str) -> int:
    """Raises InputError for anything but a whole number."""
    try:
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name}={value!r} is not a whole number. Use one, such as {name}=1") from None


def _texts(overrides: Sequence[str]) -> list[str]:
    """Raises InputError for a single text, which is a sequence of letters."""
    if isinstance(overrides, str):
        raise InputError(f"overrides={overrides!r} is one text. Give a list of them: overrides=[{overrides!r}]")
    return list(overrides)


def _batches(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _device(device: Device | None) -> torch.device:
    """The device, with its number where it is a GPU. Raises InputError when it is not there."""
    if device is None:
        device = "cuda" if devices.uses_cuda() else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device={device} is not a device: {first_line(error)}. Use cpu, cuda or cuda:1") from None
    if found.type not in ("cpu", "cuda"):
        raise InputError(f"device={device} is not supported. Use cpu, cuda or cuda:1")
    if found.type == "cpu":
        return found
    if not torch.cuda.is_available():
        raise InputError(
            f"device={device}, but torch {torch.__version__} finds no GPU that it can use. Use device='cpu'"
        )
    return devices.check_gpu(torch.cuda.current_device() if found.index is None else found.index)


# Of the whole process, so that calls of several threads wait for each other.
_CALLS = threading.RLock()

# Settings that results depend on: how each is read and written, and its value in a command.
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], object], Any], ...] = (
    # Kernels of the CPU may round differently with another number of threads: ranks of a job have one each.
    (torch.get_num_threads, torch.set_num_threads, 1),
    (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 0),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp, False),  # see rear_scale/device.py
)


@contextmanager
def _as_in_a_command(device: torch.device) -> Iterator[None]:
    """The settings of a rank of a job, in this thread alone; those of the program around, and its random state, come back."""
    with ExitStack() as stack:
        stack.enter_context(_CALLS)
        stack.enter_context(
            torch.random.fork_rng([] if device.index is None or device.type == "cpu" else [device.index])
        )
        for read, write, value in _SETTINGS:
            # torch refuses to say the precision of products after a program has set it by backend; then it stays so.
            with suppress(RuntimeError):
                stack.callback(write, read())
                write(value)
        if device.type == "cuda":
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=True))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(_cpu_by_default())
        stack.enter_context(_current(device))
        yield


@contextmanager
def _cpu_by_default() -> Iterator[None]:
    """New tensors are on the CPU unless they say otherwise, whatever torch.set_default_device was given."""
    if torch.get_default_device().type == "cpu":
        yield
    else:
        with torch.device("cpu"):
            yield


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """A GPU is the current one of this thread."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
    else:
        yield


@contextmanager
def _eval_mode(model: Generator) -> Iterator[None]:
    """Without dropout, in a model that is being trained too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
