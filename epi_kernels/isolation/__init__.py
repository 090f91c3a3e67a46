"""CPI-FT (arXiv 2508.21741, "Not All Parameters Are Created Equal") on packed masks; `epi-kernels isolate`.

    probe runs -> core -> overlap -> grouping -> staging -> fusion -> consolidated

Every stage works alone, from Python on checkpoint directories or on tensors in memory, and from the command line.
Checkpoints are read slice by slice and results written as they are made: no model is ever whole in memory.

What the paper leaves open, and what is done here:

- D counts all floating-point tensors of a checkpoint ("all model parameters, including weights, biases, and
  normalization layer parameters"); a weight that did not move is in no core, whatever p says; ties at the threshold
  are all in it.
- Two empty cores have a similarity of 1.
- The angle of SLERP is that of two whole tensors: one between two scalars means nothing. Near-collinear (angle <
  eps) is blended linearly, as are tensors that point opposite ways or are zero. omega and eps are not printed; see
  `fusion`.
- Several tasks are blended into the base one after the other, in the order given; where cores overlap the last
  one's values stay.
- Section 2.5 freezes "all core parameter regions identified in the earlier probe stage" and, a sentence later, "the
  union of core regions from all previously trained task groups": `consolidated` has both readings.
"""

from .consolidated import Stage, consolidate, freeze, plan_stages, sample_stage
from .core import CoreSummary, find_core, save_core
from .core_file import CoreFile, MemoryCore
from .errors import IsolationError
from .fusion import FusionReport, fuse, fuse_checkpoints
from .grouping import group_tasks
from .overlap import jaccard_matrix
from .rows import isolate_rows
from .staging import order_groups

__all__ = [
    "CoreFile",
    "CoreSummary",
    "FusionReport",
    "IsolationError",
    "MemoryCore",
    "Stage",
    "consolidate",
    "find_core",
    "freeze",
    "fuse",
    "fuse_checkpoints",
    "group_tasks",
    "isolate_rows",
    "jaccard_matrix",
    "order_groups",
    "plan_stages",
    "sample_stage",
    "save_core",
]
