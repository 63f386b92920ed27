"""One dataclass per component: every setting with its type, default, meaning and unit."""

from __future__ import annotations

from dataclasses import dataclass, field


class InputError(ValueError):
    """Something that a user can get wrong. The launchers print it as one line and exit with code 2."""


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
    modulation: str = "per_class"  # per_class: AdaLN once per (class, position) of a batch; per_sample: once per image


@dataclass
class TokenizerTrainingConfig:
    """Training of a tokenizer of our own (launchers/train_tokenizer.py)."""

    images: str = "???"  # folder of image shards
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


@dataclass
class DataConfig:
    train: str = "???"  # folder of token shards
    val: str | None = None  # folder of token shards
    cache_dir: str | None = None  # node-local folder of the unpacked set; null = the system's temporary folder
    assumed_images: int | None = None  # images of one epoch, used where data.train is not there (a dry run)


@dataclass
class PretokenizeConfig:
    images: str | None = None  # folder of image shards
    out: str | None = None  # folder of the token shards to write
    batch_size: int = 64  # images encoded at once; fixed by sample index, so it does not depend on the ranks


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


@dataclass
class StrategyConfig:
    name: str = "zero1"


@dataclass
class TrainConfig:
    epochs: float | None = None  # length of the run; either this or total_steps
    total_steps: int | None = None  # length of the run in optimizer updates
    stop_at_step: int | None = None  # end early with a checkpoint; the schedules stay as they are
    global_batch_size: int = 2048  # images per optimizer update, over all ranks and micro-steps
    micro_batch_size: int = 32  # images per rank and micro-step
    precision: str = "bf16"  # fp32 | bf16
    # Weights to start from: official RAR, AR, reAR or AliTok, ours, or a released checkpoint-N/ folder
    init_from: str | None = None
    log_every: int = 10  # steps


@dataclass
class CheckpointConfig:
    every_steps: int = 5000
    keep_last: int = 3  # older checkpoints are deleted


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
    batch_size: int = 256  # images decoded together; part of what determines the arithmetic
    seed: int = 0
    temperature: float = 1.0
    top_k: int | None = None  # draw from the k likeliest codes only; null = all
    top_p: float | None = None  # draw from the likeliest codes that hold this share of the probability; null = all
    # Scan order: null = that of objective.permutation.order; random = another one for each image
    order: str | None = None
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
class EvaluateConfig:
    reference: dict[str, str] = field(default_factory=dict)  # name -> folder of image shards to compare samples with
    classifier: ClassifierConfig | None = (
        None  # its penultimate layer gives the features, its output the class accuracy
    )
    replace_rate: float = 0.1  # share of context tokens replaced for the noisy correct token ratio
    replace_draws: int = 16  # fixed replacement draws that it averages over
    batch_size: int = 250  # images or sequences per forward pass


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
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
