"""One dataclass per component: every setting with its type, default, meaning and unit."""

from __future__ import annotations

from dataclasses import dataclass, field


class InputError(ValueError):
    """Something that a user can get wrong. The launchers print it as one line and exit with code 2."""


@dataclass
class RunConfig:
    name: str = "run"  # names the run in logs and the default folder
    dir: str = "runs/${run.name}"  # the run folder itself
    seed: int = 0  # every random draw of the run is a function of it


@dataclass
class ModelConfig:
    depth: int = 24  # transformer blocks
    width: int = 768  # D
    num_heads: int = 16
    mlp_width: int | None = None  # hidden width of the feed-forward; null = 4 x width
    num_classes: int = 1000  # the null class of guidance comes on top
    dropout: float = 0.1  # after the attention projection, after GELU and after the second feed-forward matrix
    attn_dropout: float = 0.1  # on attention probabilities
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
    start: float = 0.0  # where f begins to fall: a share of the run up to 1, steps above 1
    end: float = 0.75  # where f reaches 0: a share of the run up to 1, steps above 1


@dataclass
class HeadsConfig:
    """Codebook embedding regularization, reAR Eq. 6. A tap is a number of blocks done: 0 = embeddings."""

    encode_tap: int | None = None  # where the current token's embedding is recovered; null = no such head
    decode_tap: int | None = None  # where the next token's embedding is predicted; null = no such head
    weight: float = 1.0  # lambda of Eq. 7
    hidden: int = 2048  # hidden width of the two-layer GELU heads


@dataclass
class ObjectiveConfig:
    class_dropout: float = 0.1  # share of labels replaced by the null class
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)


@dataclass
class OptimConfig:
    lr: float = 4e-4  # peak, reached at the end of warm-up
    end_lr: float = 1e-5  # reached at the last step
    warmup_steps: int = 62_500
    betas: list[float] = field(default_factory=lambda: [0.9, 0.96])
    weight_decay: float = 0.03
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
    """Classifier-free guidance: logits = uncond + (cond - uncond) * scale(step). Scale 1 = none."""

    schedule: str = "constant"  # constant | linear | power_cosine
    scale: float = 1.0  # at the last token
    power: float = 1.0  # of power_cosine


@dataclass
class SampleConfig:
    num_images: int = 50_000
    batch_size: int = 256  # images decoded together; part of what determines the arithmetic
    seed: int = 0
    temperature: float = 1.0
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
