"""One dataclass per component: every setting with its type, default, meaning and unit."""

from __future__ import annotations

from dataclasses import dataclass, field


class InputError(ValueError):
    """Something that a user can get wrong. The launchers print it as one line and exit with code 2."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, at most 300 characters without its full stop; its type's name if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")


class UnknownLength(InputError):
    """A run in epochs of a set that is not there."""


@dataclass
class RunConfig:
    name: str = "run"  # names the run in logs and the default folder
    dir: str = "runs/${run.name}"  # the run folder itself
    seed: int = 0  # every random draw of the run is a function of it


@dataclass
class ModelConfig:
    architecture: str = "rar"  # rar: the transformer of RAR and reAR; alitok: AliTok's generator
    depth: int = 24  # transformer blocks
    width: int = 768  # D
    num_heads: int = 16
    mlp_width: int | None = None  # hidden width of the feed-forward; null = 4 x width, or AliTok's rule (8/3 x width)
    num_classes: int = 1000  # the null class of guidance comes on top
    dropout: float = 0.1  # after the attention projection, after GELU and after the second feed-forward matrix
    attn_dropout: float = 0.1  # on attention probabilities
    embed_dropout: float = 0.0  # on the input sequence; AliTok's generator has 0.1
    conditioning: str = "adaln"  # adaln: class and position modulate every block; in_context: the class token alone
    tie_codebook: str | None = None  # input | output | both: code embeddings are a projection of the frozen codebook
    kernel: str = "auto"  # of attention: flash (the flash-attn package), sdpa (torch), auto = flash where it can run
    # per_class: AdaLN once per (class, position) of a micro-batch; per_sample: once per image; auto: what is less work for the
    # distinct classes of each micro-batch (in a run that began with another value, that one)
    modulation: str = "auto"


@dataclass
class TokenizerTrainingConfig:
    """Training of a tokenizer of our own (launchers/train_tokenizer.py)."""

    images: str = "???"  # folder of class folders, or of WebDataset tar shards (jpg, png or webp, and cls)
    steps: int = 400
    batch_size: int = 64  # images
    lr: float = 1e-3
    channels: int = 64  # width of the convolutions
    continuous_steps: int = 100  # steps without quantisation, before k-means places the codes
    ema_decay: float = 0.99  # of the codes, per step
    restart_below: float = 0.5  # a code with a smaller moving count per batch is dead and moves to a random latent
    commitment: float = 0.25  # weight of the commitment term
    seed: int = 0


@dataclass
class TokenizerConfig:
    name: str = "???"  # compact | maskgit_vqgan
    weights: str | None = None  # weight file; training on token shards does not need it
    image_size: int = 256  # pixels, square
    num_tokens: int = 256  # N, tokens of one image
    codebook_size: int = 1024  # K
    codebook_dim: int = 256  # width of one code
    training: TokenizerTrainingConfig | None = None  # null = the weights come from elsewhere
    precision: str = "fp32"  # fp32 | bf16, of decoding (README: the error of images); encoding has its own


@dataclass
class DataConfig:
    train: str | None = "???"  # folder of token shards; null = a checkpoint's was remote and is not taken from its file
    val: str | None = None  # folder of token shards
    mode: str = "resident"  # resident: unpacked once per node, shuffled globally; stream: read while training
    cache_dir: str | None = None  # node-local folder of the unpacked set; null = the system's temporary folder
    on_error: str = "raise"  # raise | skip: what a damaged shard does
    max_skipped_share: float = 0.01  # samples that on_error=skip may lose before it is an error all the same
    lanes: int = 512  # of stream: shuffled runs through the set that are read side by side, whatever the ranks
    buffer_samples: int = 4096  # of stream: samples of a lane that are shuffled together
    # Each global batch is handed out in the order of classes, so that a micro-batch has few of them and AdaLN little work: the
    # same samples per update. null: as the checkpoint says, and in a new run true where AdaLN runs once per class and
    # data.mode=resident (in mode stream every rank would read all lanes)
    group_by_class: bool | None = None
    assumed_images: int | None = None  # images of one epoch, used where data.train is not there (a dry run)


@dataclass
class PretokenizeConfig:
    images: str | None = None  # folder of class folders, or of WebDataset tar shards (jpg, png or webp, and cls)
    out: str | None = None  # folder of the token shards to write
    batch_size: int = 64  # crops encoded at once; fixed by sample index, so it does not depend on the ranks
    crops: str = "center"  # center; flip: and its mirror image; ten: corners and centre of a larger crop, and mirrored
    precision: str = "fp32"  # fp32 | bf16, of the encoder; codes are always assigned in float32
    compile: bool = False  # torch.compile the encoder
    samples_per_shard: int = 32_768  # sequences of one tar shard: also the unit of work of a rank
    class_map: str | None = None  # file with class ids by name; null = position among the sorted folder names
    exif: str = "ignore"  # ignore: pixels as stored; apply: turned as the camera noted beside them
    max_bad_share: float = 0.1  # images that cannot be read are skipped; a larger share of them is an error


@dataclass
class NoiseConfig:
    """Noisy context regularization, reAR Eq. 4 and 5: each sequence draws its rate from U(0, f(t))."""

    max: float = 0.0  # f at the start; 0 = clean context
    schedule: str = "linear"  # linear: f falls from max to 0 between start and end; constant: f = max throughout
    start: float = 0.0  # where f begins to fall: a share of the run up to 1, steps above 1
    end: float = 0.75  # where f reaches 0: a share of the run up to 1, steps above 1
    rate: str = "uniform"  # uniform: each sequence draws its rate from U(0, f(t)); fixed: every rate is f(t) (Table 4)
    # uniform: by a code drawn from all; mask: by the mask token (in the released code, not in the paper)
    replacement: str = "uniform"


@dataclass
class HeadsConfig:
    """Codebook embedding regularization, reAR Eq. 6. A tap is a number of blocks done: 0 = embeddings."""

    encode_tap: int | None = None  # where the current token's embedding is recovered; null = no such head
    decode_tap: int | None = None  # where the next token's embedding is predicted; null = no such head
    weight: float = 1.0  # lambda of Eq. 7
    hidden: int = 2048  # hidden width
    form: str = "paper"  # paper: two layers with GELU; released: three with SiLU
    shared: bool = False  # one head for both taps, as Eq. 6 writes it; the released code has two
    positions: str = "eq6"  # eq6: i = 1 .. N-1 for both terms; all: N each, as released
    encode_counts: str = (
        "all"  # all: noisy tokens are recovered too (section 3.2); unperturbed: they are left out (released)
    )
    distance: str = (
        "one_minus_cosine"  # one_minus_cosine | negative_cosine (released): another constant, the same gradient
    )
    lone_term: str = "once"  # once; twice: a term without the other counts twice, as released


@dataclass
class PermutationConfig:
    """RAR's randomness annealing (RAR Eq. 5): a row is permuted with probability r, which falls from 1 to 0."""

    start: float = 0.0  # where r begins to fall: a share of the run up to 1, steps above 1
    end: float = 0.0  # where r reaches 0; 0 = never permuted, 1 with start 1 = always
    # Fixed order of the other rows: row_major | spiral_in | spiral_out | z_curve | subsample | alternate
    order: str = "row_major"
    prefix: str = "permuted"  # tokens before the grid (AliTok's 17): permuted with the others, or fixed in front

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
    class_dropout: float = 0.1  # share of labels replaced by the null class
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    permutation: PermutationConfig = field(default_factory=PermutationConfig)


@dataclass
class OptimConfig:
    lr: float = 4e-4  # peak, reached at the end of warm-up
    end_lr: float = 1e-5  # reached at the last step
    warmup_steps: int = 62_500
    schedule: str = (
        "paper"  # paper: lr / warmup_steps at the first update; released: 0 there, and one step behind throughout
    )
    betas: list[float] = field(default_factory=lambda: [0.9, 0.96])
    weight_decay: float = 0.03
    # Which weights decay. released: not biases, norms, embeddings, final AdaLN; matrices: all of 2 or more dimensions
    decay: str = "released"
    grad_clip: float = 1.0  # largest global gradient norm
    # AdamW of torch_fused | torch_foreach | deepspeed | apex; auto = fused on GPUs, foreach on CPUs
    backend: str = "auto"
    ema_decay: float = 0.0  # moving average of the weights, per update; 0 = none


@dataclass
class StrategyConfig:
    name: str = "zero1"  # single | ddp | fsdp2 | hsdp | zero1 | zero2 | zero3
    cpu_offload: bool = False  # zero1, zero2, zero3: optimizer state and update on the CPU
    # fsdp2, hsdp, zero2, zero3, when accumulating: whole gradients stay on each rank and travel once per update (true), or
    # they stay sharded and travel in every micro-step (false)
    defer_reduction: bool = True
    reshard_after_forward: bool = True  # fsdp2, hsdp: gather weights again for the backward pass, or keep them (false)
    replicas: int = 2  # hsdp: groups of ranks that each hold the whole model; one per machine is usual


@dataclass
class TrainConfig:
    epochs: float | None = None  # length of the run; either this or total_steps
    total_steps: int | None = None  # length of the run in optimizer updates
    stop_at_step: int | None = None  # end early with a checkpoint; the schedules stay as they are
    global_batch_size: int = 2048  # images per optimizer update, over all ranks and micro-steps
    micro_batch_size: int = 32  # images per rank and micro-step
    precision: str = "bf16"  # fp32 | bf16
    # Matrix products of the blocks (qkv, projection, feed-forward) in 8 bits, under bf16; needs torchao and Ada, Hopper or
    # newer GPUs
    fp8: bool = False
    # Weights to start from: official RAR, AR, reAR or AliTok, ours, or a released checkpoint-N/ folder
    init_from: str | None = None
    # What blocks compute again in the backward pass, to save memory: none | full (everything) | every_n (everything, in
    # each n-th block) | selective (all but matrix products and attention)
    activation_checkpointing: str = "none"
    recompute_every_n: int = 2  # n of every_n
    # true or false: torch.compile of each block; auto: on GPUs where it works, not on CPUs (in a run that began with another
    # value, that one)
    compile: bool | str = "auto"
    check_memory: bool = True  # refuse to start where a rank needs more memory by formula than there is; false = try it
    log_every: int = 10  # steps
    val_every: int | None = None  # steps between validations on data.val; null = none


@dataclass
class CheckpointConfig:
    every_steps: int = 5000
    keep_last: int = 3  # intact ones; older are deleted, but for the one that the run was resumed from
    keep_every: int | None = None  # steps; checkpoints at multiples of it are never deleted


@dataclass
class GuardConfig:
    on_nonfinite: str = "stop"  # a loss or gradient that is not finite: stop | skip (leave that update out)
    max_skips: int = 10  # updates of a run that may be left out before it stops all the same
    hang_timeout_s: float = 900.0  # seconds without progress on a rank before it writes its stacks and ends; 0 = never
    on_spike: str = "log"  # a loss far above those before it: log | rewind (to the newest checkpoint, past that data)
    spike_sigma: float = 8.0  # standard deviations of the recent losses that make a spike
    spike_window: int = 100  # losses that it is measured against
    max_rewinds: int = 3  # of a run; after that, spikes are only logged


@dataclass
class ProfileConfig:
    steps: list[int] | None = None  # [first, last]: rank 0 writes a torch profiler trace of these steps


@dataclass
class ResumeConfig:
    # Config keys that may differ from the checkpoint's although they change the run
    allow: list[str] = field(default_factory=list)


@dataclass
class GuidanceConfig:
    """Classifier-free guidance: logits = uncond + (cond - uncond) * strength(step). Strength 1 = none."""

    schedule: str = "constant"  # constant | linear | power_cosine
    # constant: the strength, 1 = none; power_cosine: what it rises to from 1, 1 = none; linear: what is added to 1, 0 = none
    scale: float = 1.0
    power: float = 1.0  # of power_cosine


@dataclass
class SampleConfig:
    num_images: int = 50_000
    labels: list[int] | None = None  # class ids that the images have in turn; null = all classes
    batch_size: int = 256  # images decoded together; part of what determines the arithmetic
    seed: int = 0
    temperature: float = 1.0
    top_k: int | None = None  # draw from the k likeliest codes only; null = all
    top_p: float | None = None  # draw from the likeliest codes that hold this share of the probability; null = all
    # Scan order: null = that of objective.permutation.order; random = another one for each image
    order: str | None = None
    copies: str | None = (
        None  # beside the npz: png (a folder of files) | tar (shards of them, with labels); null = none
    )
    # Training images between two sheets of samples in the run, each drawn at the next checkpoint; null = none
    grid_every_images: int | None = None
    cuda_graphs: bool = True  # on a GPU, start the kernels of many steps together
    quantiser: str = "trunc255"  # images to uint8: trunc255 (cut off, as the released samplers do) | round
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)


@dataclass
class ClassifierConfig:
    """A small classifier of the data set's own classes, trained when its file is first needed."""

    weights: str = "???"  # file; written if it is not there
    images: str = "???"  # folder of labelled image shards that it is trained on
    steps: int = 600
    batch_size: int = 64
    lr: float = 2e-3
    seed: int = 0


@dataclass
class TrainingScoresConfig:
    """Scores of a few samples during training, for the trend: they compare only with values of as many samples."""

    every_images: int = 10_000_000  # training images; scored at the first checkpoint after each multiple of it
    num_images: int = 1000  # samples


@dataclass
class EvaluateConfig:
    # name -> what to compare samples with: .npz (statistics, images or both), folder of images, folder of tar shards
    reference: dict[str, str] = field(default_factory=dict)
    inception_weights: str | None = None  # pt_inception-2015-12-05-6726825d.pth: FID, sFID, IS, precision, recall
    dinov2_weights: str | None = None  # dinov2_vitl14_pretrain.pth: the Fréchet distance on DINOv2 features
    vgg_weights: str | None = None  # vgg16-397923af.pth: LPIPS of reconstructions, with lpips_weights
    lpips_weights: str | None = None  # lin weights of LPIPS v0.1 for VGG16
    cache_dir: str | None = None  # folder of features; null = beside the result. References may share one over runs
    neighbour_modes: list[str] = field(default_factory=lambda: ["exact", "adm_fp16"])  # of precision and recall
    neighbour_reference_images: int | None = 10_000  # evenly spaced, for precision and recall; null = all
    bootstrap: int = 0  # resamplings for intervals; each costs about one pass over the features. 0 = none
    extrapolate: bool = False  # Fréchet distances at infinitely many samples, by a line in 1/N
    seed: int = 0  # of resampling and subsets
    training: TrainingScoresConfig | None = None  # scores during training; null = none
    classifier: ClassifierConfig | None = (
        None  # its penultimate layer gives the features, its output the class accuracy
    )
    replace_rate: float = 0.1  # share of context tokens replaced for the noisy correct token ratio
    replace_draws: int = 16  # fixed replacement draws that it averages over
    batch_size: int = 100  # images or sequences per forward pass
    exif: str = "ignore"  # of image files: ignore: pixels as stored; apply: turned as the camera noted beside them


@dataclass
class ClusterConfig:
    """The machines that launchers/plan.py plans for, and --dry-run when it is not started on many ranks itself."""

    gpus: int | None = None  # ranks, one per GPU; null = one full machine
    gpu: str = "h100-80g"  # a row of configs/devices/gpus.yaml


@dataclass
class WandbConfig:
    mode: str = "disabled"  # disabled | offline | online
    project: str = "rear_scale"


@dataclass
class ExperimentConfig:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pretokenize: PretokenizeConfig = field(default_factory=PretokenizeConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
