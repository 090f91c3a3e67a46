"""EPI as published (arXiv 2604.14010), in bytes a parameter: what this optimizer's memory is compared with."""

from __future__ import annotations

# float32 moments and importance, and a mask of bools
STATE_BYTES = {"exp_avg": 4, "exp_avg_sq": 4, "importance": 4, "isolation_mask": 1}
STATE_TOTAL_BYTES = sum(STATE_BYTES.values())
# while the mask is refreshed, at least: a float32 copy of the scores, and its sort
REFRESH_BYTES = 8
