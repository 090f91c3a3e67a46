"""Models and tokenizers of runs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from epi_kernels.finetune.chat import FALLBACK_TEMPLATE, ensure_template
from epi_kernels.finetune.model import TORCH_DTYPES, quiet_libraries
from epi_kernels.repro.characters import make_tokenizer
from epi_kernels.repro.config import ModelSpec
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.hub import TOKENIZER_FILES, fetched
from epi_kernels.repro.pictures import PATCH, PICTURE, SIZE

DTYPES = {"float32": TORCH_DTYPES["fp32"], "bfloat16": TORCH_DTYPES["bf16"]}


@lru_cache(maxsize=8)
def _tokenizer(name: str | None, revision: str | None, sees: bool) -> Any:
    if name is None:
        return make_tokenizer(pictures=sees)
    from transformers import AutoTokenizer

    folder = fetched(name, revision, TOKENIZER_FILES)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of the hub, or of a file; many kinds
        raise ReproError(f"no tokenizer in {name} ({error}); set `tokenizer` of the model") from None
    if not tokenizer.is_fast:
        raise ReproError(
            f"{name}: {type(tokenizer).__name__} gives no character offsets; use a fast tokenizer"
        )
    ensure_template(tokenizer)
    return tokenizer


def tokenizer_of(spec: ModelSpec) -> Any:
    """The spec's, its checkpoint's, or characters; with a chat template and a padding token. Raises ReproError."""
    return _tokenizer(*spec.tokenizer_source, spec.sees)


def has_plain_template(tokenizer: Any) -> bool:
    """Whether it came without a chat template and was given the plain one."""
    return tokenizer.chat_template == FALLBACK_TEMPLATE


# Read by transformers 5, which keeps them under other names.
EARLIER_KEYS = ("rope_theta", "rope_local_base_freq", "partial_rotary_factor")


def refuse_unknown_keys(spec: ModelSpec) -> None:
    """Raises ReproError where a config has keys that its kind of model does not: transformers takes any without a word, and
    the model is another one than was described."""
    from transformers import AutoConfig

    def check(record: Mapping[str, Any], default: Any, where: str) -> None:
        unknown = [key for key in record if not hasattr(default, key) and key not in EARLIER_KEYS]
        if unknown:
            raise ReproError(f"the model's {where}: {default.model_type} has no {', '.join(unknown)}")
        for part, inner in record.items():
            if part.endswith("_config") and isinstance(inner, Mapping):
                kind = inner.get("model_type")
                own = AutoConfig.for_model(kind) if kind else getattr(default, part)
                check(inner, own, f"{where}.{part}")

    if spec.config is None:
        return
    kind = spec.config.get("model_type")
    try:
        default = AutoConfig.for_model(str(kind))
    except ValueError:
        raise ReproError(f"the model's config: transformers knows no model_type {kind!r}") from None
    check(spec.config, default, "config")


def new_model(spec: ModelSpec, seed: int) -> Any:
    """Random weights from a config, for the spec's tokenizer. Raises ReproError."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    assert spec.config is not None
    record, tokenizer = dict(spec.config), tokenizer_of(spec)
    text = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    try:
        kind = record.pop("model_type")
        if spec.sees:
            record = _seeing(record, text, tokenizer)
        config = AutoConfig.for_model(kind, **{**text, "use_cache": False, **record})
        torch.manual_seed(seed)
        return _auto(spec).from_config(config, dtype=DTYPES[spec.dtype]).train()
    except (KeyError, ValueError, TypeError, StrictDataclassError) as error:
        raise ReproError(f"the model's config makes no model: {' '.join(str(error).split())[:200]}") from None


def _seeing(record: dict[str, Any], text: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """A config whose tower makes of a picture as many embeddings as a prompt has tokens for. Raises ReproError."""
    vision = {"image_size": SIZE, "patch_size": PATCH, **record["vision_config"]}
    if (vision["image_size"], vision["patch_size"]) != (SIZE, PATCH):
        raise ReproError(
            f"the pictures have {SIZE} pixels a side and patches of {PATCH}; leave image_size and patch_size out"
        )
    return {
        "image_token_id": tokenizer.convert_tokens_to_ids(PICTURE),
        **record,
        "vision_config": vision,
        "text_config": {**text, **record.get("text_config", {})},
    }


def load_model(folder: Path, spec: ModelSpec, device: torch.device) -> Any:
    """The model that a run left, or a checkpoint. Raises ReproError."""
    quiet_libraries()
    try:
        loaded: Any = _auto(spec).from_pretrained(folder, dtype=DTYPES[spec.dtype])
    except (OSError, ValueError, RuntimeError) as error:
        raise ReproError(f"{folder}: cannot be loaded ({error})") from None
    return loaded.to(device).train()


def _auto(spec: ModelSpec) -> Any:
    """transformers' class for models of the spec's kind."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if spec.sees else AutoModelForCausalLM
