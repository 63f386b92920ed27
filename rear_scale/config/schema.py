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
    # What blocks compute again in the backward pass, to save memory: none | full (everything) | every_n (everything, in
    # each n-th block) | selective (all but matrix products and attention)
    activation_checkpointing: str = "none"
    recompute_every_n: int = 2  # n of every_n
    compile: bool = False  # torch.compile of each block
    log_every: int = 10  # steps
    val_every: int | None = None  # steps between validations on data.val; null = none


@dataclass
class CheckpointConfig:
    every_steps: int = 5000
    keep_last: int = 3  # older checkpoints are deleted
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
    guard: GuardConfig = field(default_factory=GuardConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
