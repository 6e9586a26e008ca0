"""nanoGPT's configuration files as typed values, of the same names and numbers (github.com/karpathy/nanoGPT)."""

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


def _evaluation(init_from: str) -> Pretrain:
    return Pretrain(batch_size=8, eval_iters=500, eval_only=True, init_from=init_from)


PRESETS: dict[str, Pretrain] = {
    "train_shakespeare_char": SHAKESPEARE_CHAR,
    "train_gpt2": GPT2,
    "finetune_shakespeare": FINETUNE_SHAKESPEARE,
    "eval_gpt2": _evaluation("gpt2"),
    "eval_gpt2_medium": _evaluation("gpt2-medium"),
    "eval_gpt2_large": _evaluation("gpt2-large"),
    "eval_gpt2_xl": _evaluation("gpt2-xl"),
}
