"""Supervised fine-tuning of a causal language model with protected weights: `epi-kernels finetune` and `importance`.

Why not `transformers.Trainer`: it writes checkpoints in place, unsynced, through private `_save_checkpoint` (a kill or
a full disk leaves half a checkpoint that `get_last_checkpoint` picks), and its resume checks neither data nor arguments.

    options -> data, chat, packing -> model, protect, fsdp -> train (checkpoint, log) -> export, compare

All of it runs on every rank where torchrun started several (ranks); only rank 0 writes.
"""
