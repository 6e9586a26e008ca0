"""The flags of train.pretrain and train.speedrun: nanoGPT's 33 keys by name, default and meaning, then ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gptfast.errors import UserError
from kernels.newton_schulz import POLAR_EXPRESS

POSITIVE = (
    "log_interval", "eval_iters", "gradient_accumulation_steps", "batch_size", "block_size",
    "n_layer", "n_head", "n_embd", "lr_decay_iters", "keep", "head_dim",
    "tensor_parallel", "vocab_multiple", "sample_tokens",
)  # fmt: skip
NOT_NEGATIVE = (
    "eval_interval", "max_iters", "warmup_iters", "learning_rate", "min_lr", "weight_decay", "grad_clip", "spike",
    "max_skips",
    "depth",
    "target_flops", "total_batch_size", "shard_size", "vocab_size", "momentum_iters", "num_samples", "matrix_lr",
    "head_lr", "scalar_lr",
)  # fmt: skip


OptimizerName = Literal["adamw", "muon", "adamw_by_role"]
ScheduleName = Literal["cosine", "trapezoid", "linear"]
ArchitectureName = Literal["nanochat", "gptfast"]


@dataclass(frozen=True)
class Pretrain:
    out_dir: str = "out"  # where checkpoints and metrics.jsonl go
    eval_interval: int = 2000  # iterations between evaluations; 0: only at the end
    log_interval: int = 1  # iterations between log lines
    eval_iters: int = 200  # batches of each split per evaluation
    eval_only: bool = False  # exit after the first evaluation
    always_save_checkpoint: bool = True  # save at every evaluation, not only when the validation loss is the best yet
    init_from: str = "scratch"  # scratch, resume, gpt2 ... gpt2-xl, OWNER/NAME on the hub, or a folder with a model
    wandb_log: bool = False  # log to Weights & Biases too
    wandb_project: str = "owt"  # its project
    wandb_run_name: str = "gpt2"  # its run
    dataset: str = "openwebtext"  # name of the data set, as given to train.prepare
    gradient_accumulation_steps: int = 5 * 8  # micro-batches per update, over all processes
    batch_size: int = 12  # sequences per micro-batch
    block_size: int = 1024  # tokens per sequence
    n_layer: int = 12  # blocks
    n_head: int = 12  # query heads
    n_embd: int = 768  # width
    dropout: float = 0.0  # 0 for pretraining; 0.1 and more for fine-tuning or small data
    bias: bool = False  # biases in linear layers and layer norms
    learning_rate: float = 6e-4  # highest learning rate
    max_iters: int = 600000  # the last iteration, counted from 0
    weight_decay: float = 1e-1  # on matrices and embeddings only
    beta1: float = 0.9  # AdamW, decay of the mean
    beta2: float = 0.95  # AdamW, decay of the square
    grad_clip: float = 1.0  # bound on the norm of the gradient; 0 for none
    decay_lr: bool = True  # warm up and decay; False keeps learning_rate
    warmup_iters: int = 2000  # iterations of linear warm-up
    lr_decay_iters: int = 600000  # iteration at which the cosine reaches min_lr; about max_iters
    min_lr: float = 6e-5  # lowest learning rate; about learning_rate / 10
    backend: str = "nccl"  # torch.distributed backend, used when started by torchrun
    device: str = "cuda"  # cuda, cuda:N, mps or cpu; the default becomes cpu, and says so, where there is no GPU
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of activations; auto: the best this device has
    compile: bool = True  # compile with torch.compile: faster steps after a slow start

    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"  # under torchrun: whole weights on each rank, or split over ranks
    fp8: bool = False  # train the blocks' large linear maps in 8-bit floats: on sm_89 and newer; a CPU emulates it
    cuda_graph: bool | None = None  # run an update as one CUDA graph; default: on one GPU where shapes are static
    shard_size: int = 0  # hsdp: ranks that hold one copy of the weights together; 0: those of a node
    tensor_parallel: int = 1  # fsdp: ranks that share each matrix product
    resume: str = ""  # continue from out_dir: latest (starts anew where there is none), best, or a step's number
    keep: int = 2  # number of last checkpoints to keep, besides the best
    async_save: bool = False  # keep training while a checkpoint is written, from a copy of the state on the CPU
    nonfinite: Literal["stop", "skip"] = "stop"  # on a loss or gradient that is not finite: stop, or skip the update
    spike: float = 0.0  # skip updates whose loss is this many standard deviations above the last 128; 0: never
    max_skips: int = 10  # updates skipped in a row before the run stops
    tracker: Literal["none", "wandb", "trackio", "tensorboard"] = "none"  # service that evaluations are sent to
    documents: bool = False  # rows of whole documents, each attending to itself alone; else random windows
    vocab_multiple: int = 64  # from scratch, round the vocabulary of a BPE tokenizer up to a multiple; 1: as it is
    data_dir: str = "data"  # folder of the prepared data sets; the tokens are in <data_dir>/<dataset>
    seed: int = 1337  # of weights, batches and dropout
    kernels: Literal["auto", "cpu", "reference", "triton", "interpret"] = "auto"  # which implementation of each op runs
    vocab_size: int = 0  # from scratch, rows of embedding and head; 0: as vocab_multiple says
    optimizer: OptimizerName = "adamw"  # muon: Muon for the blocks' matrices; adamw_by_role: AdamW in Muon's groups
    matrix_lr: float = 0.02  # the matrices' highest rate unless optimizer=adamw; follows learning_rate's schedule
    head_lr: float | None = None  # AdamW's highest rate for an untied head; default learning_rate
    scalar_lr: float | None = None  # AdamW's highest rate for gains, biases and token shifts; default learning_rate
    momentum: float = 0.95  # Muon's
    momentum_start: float = 0.95  # Muon's at the first update, with schedule=linear
    momentum_iters: int = 0  # updates that it takes from momentum_start to momentum
    newton_schulz_steps: int = 5  # Muon's; small models can do with fewer
    cautious: bool = False  # Muon decays a weight only where the update shrinks it too
    decay_by_shape: bool = False  # Muon decays tall matrices by sqrt(rows / columns) more, as nanochat; --depth sets it
    equalize: bool = False  # Muon scales rows to one norm before it orthogonalizes, as nanochat; --depth sets it
    normalize: bool = False  # Muon scales the rows of its updates to one size (NorMuon)
    normalize_beta2: float = 0.95  # NorMuon's decay of the running mean of squares
    rules: Literal["plain", "nanochat"] = "plain"  # AdamW's betas, decay and rate factors beside Muon
    schedule: ScheduleName = "cosine"  # trapezoid, linear: up, level, down to min_lr or 0, with momentum and decay
    warmdown_ratio: float = 0.65  # the last part of lr_decay_iters, in which trapezoid and linear go down
    architecture: ArchitectureName = "nanochat"  # model of a depth; gptfast: without value embeddings, windows, scalars
    depth: int = 0  # size of the model; shape, batch, horizon and rates follow from it (train/dial.py)
    head_dim: int = 128  # size of a head, with depth
    target_param_data_ratio: float = 12.0  # horizon with depth, unless max_iters is given: tokens per scaling weight
    target_flops: float = 0.0  # horizon with depth, in FLOPs of the whole training
    total_batch_size: int = 0  # tokens of an update with depth; 0: derived from the depth
    dry_run: bool = False  # print the plan (sizes, FLOPs, memory, time, cost) and train nothing
    assumed_mfu: float = 0.4  # MFU that the plan assumes
    prices: str = "H100 SXM=3"  # for the plan: dollars for an hour of a GPU, NAME=DOLLARS with commas between
    num_samples: int = 2  # texts that train.speedrun draws at the end
    sample_tokens: int = 300  # tokens in each of these texts
    report: bool = True  # train.speedrun draws loss.png and throughput.png and writes report.md at the end
    whole_val: bool = True  # end with the loss over the whole validation split, each token once
    peak_tflops: float | None = None  # dense peak to compute MFU with, where the device's own is not known
    n_kv_head: int | None = None  # key/value heads; default n_head
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # normalization
    norm_weight: bool = False  # rmsnorm has a weight; layernorm always has
    position: Literal["learned", "rope"] = "learned"  # positions
    rope_base: float = 10000.0  # of rotary positions
    activation: Literal["gelu", "gelu_tanh", "relu2", "swiglu"] = "gelu"  # of the MLP
    mlp_width: int | None = None  # between the MLP's layers; default 4 n_embd
    qk_norm: bool = False  # normalize queries and keys
    tied: bool = True  # one matrix for embedding and output
    token_shift: bool = False  # positions also see the one before (in the embedding, two), channel by channel
    block_shift: bool = True  # with token_shift, in the blocks as well as in the embedding
    zero_start: bool = False  # from scratch, blocks start as the identity and an untied head at zero
    softcap: float | None = None  # logits become softcap * tanh(logits / softcap)
    norm_eps: float | None = None  # added to the mean squares of norms; default 1e-5 in layernorm, 1e-6 in rmsnorm
    embedding_norm: bool = False  # RMS-normalize the embedding
    window_pattern: str = ""  # S and L, repeated over the layers, the last always L; S layers see only `window` back
    window: int | None = None  # earlier positions that a query of an S layer sees
    value_embeddings: bool = False  # every other layer adds token embeddings to its values
    residual_scalars: bool = False  # every layer scales the stream and adds the embedding, by scalars of its own
    smear: bool = False  # add a gated part of the previous token's embedding to each embedding
    backout: bool = False  # subtract the middle layer's output, times a scalar, from the last one's
    rope_sign: int = 1  # -1: rotary positions rotate by minus the angle
    qk_gain: float = 1.0  # factor of normalized queries and keys
    initialization: Literal["gpt2", "nanochat"] = "gpt2"  # of the weights

    def __post_init__(self) -> None:
        for name in POSITIVE:
            if getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least 1")
        for name in NOT_NEGATIVE:
            if not (getattr(self, name) or 0) >= 0:
                raise UserError(f"--{name}={getattr(self, name)}: must not be negative")
        if self.optimizer != "adamw":
            for name in ("learning_rate", "matrix_lr"):
                if not getattr(self, name) > 0:
                    raise UserError(
                        f"--{name}={getattr(self, name)}: must be above 0 with --optimizer={self.optimizer}"
                    )
        if not 1 <= self.newton_schulz_steps <= len(POLAR_EXPRESS):
            raise UserError(f"--newton_schulz_steps={self.newton_schulz_steps}: must be 1 to {len(POLAR_EXPRESS)}")
        if self.resume not in ("", "latest", "best") and not self.resume.isdecimal():
            raise UserError(f"--resume={self.resume}: use latest, best, or the number of a step")
        if not self.target_param_data_ratio > 0:
            raise UserError(f"--target_param_data_ratio={self.target_param_data_ratio}: must be above 0")
        if not 0 < self.assumed_mfu <= 1:
            raise UserError(f"--assumed_mfu={self.assumed_mfu}: must be above 0 and at most 1")
        if self.fp8 and self.tensor_parallel > 1:
            raise UserError("--fp8 goes with whole matrices, of which there is one scale; leave --tensor_parallel out")
        if not 0 <= self.warmdown_ratio <= 1:
            raise UserError(f"--warmdown_ratio={self.warmdown_ratio}: must be at least 0 and at most 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout={self.dropout}: must be at least 0 and below 1")
        for name in ("beta1", "beta2", "momentum", "momentum_start", "normalize_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least 0 and below 1")


def check_rates(config: Pretrain) -> Pretrain:
    """Returns the config of a new run unchanged. Raises UserError if min_lr lies above learning_rate."""
    if config.decay_lr and config.min_lr > config.learning_rate:
        raise UserError(
            f"--min_lr={config.min_lr:g} is above --learning_rate={config.learning_rate:g}, so the rate would rise; "
            "lower it too, or give --decay_lr=False"
        )
    return config
