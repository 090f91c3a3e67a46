"""Loading model and tokenizer, fingerprints."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch

from .chat import train_tokenizer
from .errors import UserError
from .ranks import Ranks

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# what --state-dtype and --importance-dtype are called by the optimizer
STATE_DTYPES: dict[str, torch.dtype | str] = {**TORCH_DTYPES, "int8": "int8", "int4": "int4"}
DEFAULT_MAX_LENGTH = 1024


def quiet_libraries() -> None:
    """Turns transformers' own progress bars off: a run has one bar. And the hub's line for every retry: we say what failed."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    getLogger("huggingface_hub").setLevel(ERROR)


@contextlib.contextmanager
def only_shapes_matter() -> Iterator[None]:
    """transformers says nothing of token ids, rotary embeddings and activations, which make no parameter larger or smaller,
    unless TRANSFORMERS_VERBOSITY asks for it. What it raises is raised."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def is_config(model: str) -> bool:
    return model.endswith(".json")


def _looks_local(name: str) -> bool:
    return os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1


def _first_sentence(error: Exception) -> str:
    """Of transformers' paragraphs of advice."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")


def load_config(model: str):
    """The model's config. Raises UserError when there is none, or it is no causal language model's."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if not os.path.exists(model):
        if _looks_local(model) or is_config(model):
            raise UserError(f"--model {model}: no such file or directory")
        print(f"--model {model}: no such directory; trying the hub", file=sys.stderr, flush=True)
    try:
        if is_config(model):
            record = json.loads(Path(model).read_text(encoding="utf-8"))
            if not isinstance(record, dict) or "model_type" not in record:
                raise UserError(
                    f'--model {model}: a config must be a JSON object with "model_type" ("llama", say)'
                )
            config = AutoConfig.for_model(record.pop("model_type"), **record)
        else:
            config = AutoConfig.from_pretrained(model)
    except UserError:
        raise
    except Exception as error:  # a config's own checks raise what they like
        if not os.path.exists(model):
            raise UserError(
                f"--model {model}: no such directory here, and the hub gave none ({_first_sentence(error)})"
            ) from None
        raise UserError(f"--model {model}: cannot be loaded ({error})") from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"--model {model}: {type(config).__name__} has no causal language model in transformers"
        )
    return config


def load_tokenizer(model: str, tokenizer: str | None, vocab_size: int, texts: Iterable[str]):
    """The model's tokenizer, or the one asked for, or (a config has none) a byte-level BPE learned from `texts`."""
    from transformers import AutoTokenizer

    if tokenizer is None and is_config(model):
        return train_tokenizer(texts, vocab_size)
    name = tokenizer or model
    if _looks_local(name) and not os.path.exists(name):
        raise UserError(f"--tokenizer {name}: no such file or directory")
    try:
        loaded = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(
            f"no tokenizer in {name} ({type(error).__name__}: {error}); pass --tokenizer"
        ) from None
    highest = max(loaded.get_vocab().values(), default=-1)
    if highest < 0:
        raise UserError(f"no tokenizer in {name} (its vocabulary is empty); pass --tokenizer")
    if highest >= vocab_size:
        raise UserError(
            f"the tokenizer's tokens go up to {highest}, the model has {vocab_size}: they do not belong together"
        )
    return loaded


def pad_id(tokenizer) -> int:
    """The padding token's id; 0 when there is none (padding has no loss and nothing attends to it)."""
    return int(tokenizer.pad_token_id or 0)


def row_length(config, asked: int | None) -> int:
    """Tokens a row: what is asked for, if the model has as many positions."""
    if asked is not None and asked < 2:
        raise UserError(f"--max-length is {asked}; allowed: 2 or more")
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        return min(DEFAULT_MAX_LENGTH, limit or DEFAULT_MAX_LENGTH)
    if limit and asked > limit:
        raise UserError(f"--max-length {asked} is more than the model's {limit} positions")
    return asked


def model_dtype(config, asked: str | None, model: str) -> torch.dtype:
    """The dtype of weights and gradients: what is asked for, else the checkpoint's own if it is fp32 or bf16."""
    if asked is not None:
        return TORCH_DTYPES[asked]
    if is_config(model):
        return torch.float32
    own = (
        config.dtype
        if isinstance(config.dtype, torch.dtype)
        else getattr(torch, str(config.dtype), torch.float32)
    )
    # float16 weights have no room for updates; bfloat16 takes their place.
    return torch.bfloat16 if own in (torch.float16, torch.bfloat16) else torch.float32


def empty_model(config):
    """The model on the meta device: shapes and names without memory. Raises UserError when the config makes none."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of whatever the model's own code stumbles over
        raise UserError(
            f"--model: its config makes no {type(config).__name__.removesuffix('Config')} "
            f"({type(error).__name__}: {error})"
        ) from None


def sizes_of(config) -> list[int]:
    """Elements of each parameter, tied ones once. Raises UserError as `empty_model`."""
    return [parameter.numel() for parameter in empty_model(config).parameters()]


def load_model(
    model: str, config, dtype: torch.dtype, attention: str, device: str, seed: int, tokenizer=None
):
    """The model in training mode. A config gives random weights from `seed`, and the tokenizer's special tokens."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        if is_config(model):
            config = copy.deepcopy(config)  # from_config writes into it
            if tokenizer is not None:
                # Not pad_token_id: it would freeze that embedding row, which may be the end token's.
                config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
            torch.manual_seed(seed)
            # Not .to(dtype): it would round buffers (of rotary embeddings) that from_pretrained keeps in float32.
            loaded = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
            if tokenizer is not None:
                loaded.generation_config.pad_token_id = tokenizer.pad_token_id
        else:
            loaded, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
                model, dtype=dtype, attn_implementation=attention, output_loading_info=True
            )
            missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
            if missing:
                raise UserError(
                    f"--model {model}: weights missing or of another shape: {', '.join(missing[:5])} ({len(missing)} in all)"
                )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--model {model}: cannot be loaded ({error})") from None
    return loaded.to(device).train()


def enable_checkpointing(net) -> None:
    """Recompute activations in backward. transformers renamed the method in 5.x."""
    enable = getattr(net, "activation_checkpointing_enable", None) or net.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def pick_device(asked: str, ranks: Ranks | None = None) -> str:
    """The device asked for; of several ranks on CUDA, each one's own. Raises UserError."""
    device = _pick_device(asked)
    if ranks is None or ranks.size == 1 or not device.startswith("cuda"):
        return device
    if device != "cuda":
        raise UserError(f"--device {asked}: of {ranks.size} ranks each has a device of its own; pass cuda")
    if ranks.local >= torch.cuda.device_count():
        raise UserError(
            f"no GPU for process {ranks.local} of this machine, which has {torch.cuda.device_count()}: "
            "start at most as many (--nproc-per-node), or pass --device cpu"
        )
    return f"cuda:{ranks.local}"


def _pick_device(asked: str) -> str:
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise UserError(f"--device {asked}: {error}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {asked}: this torch ({torch.__version__}) sees no CUDA device")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {asked}: cpu or cuda")
    return asked


def structure_fingerprint(model) -> str:
    """Of names and shapes of the parameters."""
    shapes = sorted((name, list(parameter.shape)) for name, parameter in model.named_parameters())
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def weights_fingerprint(model, weights: Mapping[str, torch.Tensor] | None = None) -> str:
    """Of the parameters' names, dtypes and bits. `weights`: where they are whole, when the model's are sharded."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        parameter: Any = parameter if weights is None else weights[name]
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
