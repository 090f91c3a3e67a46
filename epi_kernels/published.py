"""What others take, in bytes a parameter: what this optimizer's memory is compared with."""

from __future__ import annotations

# EPI (arXiv 2604.14010): float32 moments and importance, and a mask of bools
STATE_BYTES = {"exp_avg": 4, "exp_avg_sq": 4, "importance": 4, "isolation_mask": 1}
STATE_TOTAL_BYTES = sum(STATE_BYTES.values())
# while the mask is refreshed, at least: a float32 copy of the scores, and its sort
REFRESH_BYTES = 8

# State of two moments, as the sources of these versions lay it out; none of them isolates anything.
PEER_STATE_BYTES = {
    "bitsandbytes 0.50, 8-bit": 2 * (1 + 4 / 256),  # a float32 scale a block of 256
    "torchao 0.18, 8-bit": 2 * (1 + 4 / 256),
    "torchao 0.18, 4-bit": 2 * (1 / 2 + 4 / 128),
}
PEER_STATE_BYTES_BFLOAT16 = {  # these need bfloat16 weights
    "flashoptim 0.1, 24-bit weights": 2 * (1 + 2 / 32) + 1,  # float16 scales; a byte that extends the weight
    "optimi 0.3, Kahan summation": 3 * 2,  # two moments and a compensation
}
