"""Runs as typed values: nanoGPT's configuration files, of the same names and numbers (github.com/karpathy/nanoGPT);
a 30M model of OpenWebText; and runs of the dial, of nanochat's sizes (github.com/karpathy/nanochat)."""

from __future__ import annotations

from train.config import Pretrain

SHAKESPEARE_CHAR = Pretrain(
    out_dir="out-shakespeare-char",
    eval_interval=250,
    log_interval=10,
    always_save_checkpoint=False,  # a small set overfits: keep the best, not the last
    wandb_project="shakespeare-char",
    wandb_run_name="mini-gpt",
    dataset="shakespeare_char",
    gradient_accumulation_steps=1,
    batch_size=64,
    block_size=256,
    n_layer=6,
    n_head=6,
    n_embd=384,
    dropout=0.2,
    learning_rate=1e-3,
    max_iters=5000,
    lr_decay_iters=5000,
    min_lr=1e-4,
    beta2=0.99,
    warmup_iters=100,
)

GPT2 = Pretrain(
    wandb_log=True,
    wandb_project="owt",
    wandb_run_name="gpt2-124M",
    eval_interval=1000,
    log_interval=10,
    gradient_accumulation_steps=5 * 8,
)

FINETUNE_SHAKESPEARE = Pretrain(
    out_dir="out-shakespeare",
    eval_interval=5,
    eval_iters=40,
    wandb_project="shakespeare",
    wandb_run_name="ft",
    dataset="shakespeare",
    init_from="gpt2-xl",
    always_save_checkpoint=False,
    batch_size=1,
    gradient_accumulation_steps=32,
    max_iters=20,
    learning_rate=3e-5,
    decay_lr=False,
)

OWT_30M = Pretrain(  # 29.9M without positions; 20,000 updates of 32,768 tokens
    out_dir="out-owt-30m",
    eval_interval=1000,
    log_interval=10,
    wandb_run_name="owt-30m",
    gradient_accumulation_steps=1,
    batch_size=64,
    block_size=512,
    n_layer=6,
    n_head=6,
    n_embd=384,
    learning_rate=1e-3,
    min_lr=1e-4,
    max_iters=20_000,
    lr_decay_iters=20_000,
    warmup_iters=1000,
)

SPEEDRUN = Pretrain(  # GPT-2's grade
    out_dir="out-d24", dataset="climbmix", depth=24, target_param_data_ratio=8.0, batch_size=16, eval_interval=250
)

SPEEDRUN_CPU = Pretrain(
    out_dir="out-d6",
    dataset="climbmix",
    device="cpu",
    depth=6,
    head_dim=64,
    block_size=512,
    batch_size=32,
    total_batch_size=32 * 512,
    max_iters=5000,
    eval_interval=100,
)


def _evaluation(init_from: str) -> Pretrain:
    return Pretrain(batch_size=8, eval_iters=500, eval_only=True, init_from=init_from)


PRESETS: dict[str, Pretrain] = {
    "train_shakespeare_char": SHAKESPEARE_CHAR,
    "train_gpt2": GPT2,
    "finetune_shakespeare": FINETUNE_SHAKESPEARE,
    "train_owt_30m": OWT_30M,
    "speedrun_d12": Pretrain(out_dir="out-d12", dataset="climbmix", depth=12, eval_interval=250),
    "speedrun_d24": SPEEDRUN,
    "speedrun_d6_cpu": SPEEDRUN_CPU,
    "eval_gpt2": _evaluation("gpt2"),
    "eval_gpt2_medium": _evaluation("gpt2-medium"),
    "eval_gpt2_large": _evaluation("gpt2-large"),
    "eval_gpt2_xl": _evaluation("gpt2-xl"),
}
