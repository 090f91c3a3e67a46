"""LLaMA-Factory without v1, with MaskedEMAAdamW: python llamafactory_v0.py train.yaml (or torchrun)

Untested: llamafactory 0.9.5 wants older releases of transformers and trl than the rest is tested with.

There is no hook for another optimizer: hiyouga/LLaMA-Factory, src/llamafactory/train/trainer_utils.py,
create_custom_optimizer, is a list of those it knows. CustomSeq2SeqTrainer.create_optimizer (train/sft/trainer.py)
calls it by its module's name for it, which this script points to ours. `llamafactory-cli` would not know of it.
"""

from llamafactory.train import tuner  # pyright: ignore[reportMissingImports]
from llamafactory.train.sft import trainer as sft  # pyright: ignore[reportMissingImports]

from epi_kernels.integrations import masked_ema_adamw, transformer_block


def create_optimizer(model, training_args, finetuning_args):
    """Learning rate, betas, eps and weight decay are train.yaml's; options of isolation stand here."""
    factory, kwargs = masked_ema_adamw(
        training_args, isolation_ratio=0.01, mask_interval=100, layer_key=transformer_block
    )
    return factory()(model, **kwargs)


if __name__ == "__main__":
    sft.create_custom_optimizer = create_optimizer
    tuner.run_exp()
