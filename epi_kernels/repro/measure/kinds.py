"""Which kind of parameter a name stands for."""

from __future__ import annotations

# parts of names as transformers has them -> kind; a part that is none of these says nothing
KINDS = {
    "embed_tokens": "embedding",
    "embeddings": "embedding",
    "word_embeddings": "embedding",
    "position_embedding": "embedding",
    "patch_embedding": "embedding",
    "wte": "embedding",
    "wpe": "embedding",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "qkv_proj": "qkv",
    "c_attn": "qkv",
    "o_proj": "o",
    "out_proj": "o",
    "gate_proj": "gate",
    "gate_up_proj": "gate and up",
    "up_proj": "up",
    "fc1": "up",
    "c_fc": "up",
    "down_proj": "down",
    "fc2": "down",
    "lm_head": "lm_head",
}
OTHER = "other"
# how tables and figures order them
ORDER = tuple(dict.fromkeys([*KINDS.values(), "norm", "vision", "projector", OTHER]))


def kind_of(name: str) -> str:
    """Of a parameter, by its name: one of `ORDER`. A bias and an adapter are of the kind of their layer.

    Of a model that sees, the tower is "vision" and what leads from it to the language model "projector".
    """
    parts = name.split(".")
    if any("vision" in part for part in parts):
        return "vision"
    if any("multi_modal_projector" in part or part == "connector" for part in parts):
        return "projector"
    for part in reversed(parts):
        if part in KINDS:
            return KINDS[part]
        if "norm" in part or part in ("ln_1", "ln_2", "ln_f"):
            return "norm"
    return OTHER
