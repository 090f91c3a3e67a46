"""Every way to fine-tune that the tables compare, as configs; `name` tells them apart."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from epi_kernels.repro.config import Count, Share, Strict


class Full(Strict):
    """Full fine-tuning: every weight moves. "torch" is torch.optim.AdamW (not over bfloat16 weights: see
    `optimizers.adamw`); "epi" the same update by MaskedEMAAdamW at ratio 0, which keeps the importance for a later
    stage to carry over."""

    name: Literal["full"] = "full"
    optimizer: Literal["torch", "epi"] = "torch"
    keep_moments: bool = False  # second moments of the stage before go on, without any mask

    @model_validator(mode="after")
    def _moments_are_ours(self) -> Full:
        if self.keep_moments and self.optimizer != "epi":
            raise ValueError('keep_moments needs optimizer "epi", which makes the same update')
        return self


class Epi(Strict):
    """EPI: the mask evolves. Defaults are the paper's where it states them (p = 1 %, min-max within a layer, global)."""

    name: Literal["epi"] = "epi"
    ratio: Share = 0.01
    interval: Count = 100
    carry: bool = True  # importance of the stage before is carried over, and isolated from the first step
    # None: shared with exp_avg_sq, which goes on with `carry`; beside an importance of its own it starts at zero
    importance_beta: Annotated[float, Field(gt=0, lt=1)] | None = None
    normalization: Literal["minmax", "zscore", "none"] = "minmax"
    scope: Literal["global", "layer"] = "global"
    by_block: bool = False  # a layer is a transformer block, not a tensor
    hysteresis: Annotated[float, Field(ge=0, lt=1)] = 0.0
    core: Annotated[float, Field(ge=0, lt=1)] = (
        0.0  # share isolated for good, by carried importance, beside the mask
    )
    adaptive: bool = False  # AdaptiveRatio and AdaptiveInterval from these values
    state_dtype: Literal["float32", "bfloat16", "int8"] | None = None

    @model_validator(mode="after")
    def _hysteresis_divides_scores(self) -> Epi:
        if self.hysteresis and self.normalization == "zscore":
            raise ValueError("hysteresis must be 0 with normalization zscore, whose scores may be negative")
        return self


class PublishedEpi(Strict):
    """EPI as its paper describes it, with plain torch operations: what it costs without fused kernels. `carry` is of its
    own importance; both moments start at zero."""

    name: Literal["published"] = "published"
    ratio: Share = 0.01
    interval: Count = 100
    importance_beta: Annotated[float, Field(gt=0, lt=1)] = 0.999
    carry: bool = True


class Window(Strict):
    """EPI with the mean squared gradient over the last `window` steps in place of the moving average."""

    name: Literal["window"] = "window"
    ratio: Share = 0.01
    interval: Count = 100
    window: Count = 25
    carry: bool = True  # second moments go on, and the carried importance isolates up to the first refresh


class Static(Strict):
    """A mask fixed before the stage: by the importance carried over ("g2") or by |theta - theta_0| of the stage
    before ("delta", CPI-FT's core)."""

    name: Literal["static"] = "static"
    by: Literal["g2", "delta"] = "g2"
    ratio: Share = 0.01
    normalization: Literal["minmax", "zscore", "none"] = "minmax"
    carry: bool = True  # second moments go on as they do in EPI, so that the mask is all that differs


class RandomMask(Strict):
    """Control: a random mask of the same ratio, from the first step on, drawn anew every interval."""

    name: Literal["random"] = "random"
    ratio: Share = 0.01
    interval: Count = 100
    carry: bool = True  # second moments go on as they do in EPI, so that the mask is all that differs


class Inverted(Strict):
    """Control: EPI's mask turned round; the least important are isolated, as many as EPI would isolate."""

    name: Literal["inverted"] = "inverted"
    ratio: Share = 0.01
    interval: Count = 100
    carry: bool = True


class Ewc(Strict):
    """Elastic weight consolidation (arXiv 1612.00796): a quadratic pull to the weights of the stage before, weighted
    by its diagonal Fisher (here: the carried mean squared batch gradient, scaled to mean 1)."""

    name: Literal["ewc"] = "ewc"
    strength: Annotated[float, Field(gt=0)] = 1.0


class L2Sp(Strict):
    """L2-SP (arXiv 1802.01483): a quadratic pull to the weights of the stage before."""

    name: Literal["l2sp"] = "l2sp"
    strength: Annotated[float, Field(gt=0)] = 0.01


class Replay(Strict):
    """`share` of the rows of every batch are examples of the tasks of the stages before, out of all their training
    examples, each once before any comes again; where that is no whole number, it is met over the steps.

    It is no share of the old tasks' data: share * batch * steps rows are replayed, whatever the data's size. The number of
    steps stays, so that the stage's own tasks have that many rows less."""

    name: Literal["replay"] = "replay"
    share: Share = 0.05  # of every batch's rows


class Lora(Strict):
    """LoRA (arXiv 2106.09685) on all linear layers, by peft; merged when the stage ends."""

    name: Literal["lora"] = "lora"
    rank: Count = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0


class Mofo(Strict):
    """MoFO (arXiv 2407.20999): of each tensor only the entries with the largest momentum are updated."""

    name: Literal["mofo"] = "mofo"
    fraction: Share = 0.1


class PcGrad(Strict):
    """PCGrad (arXiv 2001.06782): one gradient a task, conflicting parts projected away. In a stage of one task the
    other gradient is that of replayed examples, `share` of every batch's rows as in Replay; a stage of several tasks
    replays nothing."""

    name: Literal["pcgrad"] = "pcgrad"
    share: Share = 0.05  # of every batch's rows


Method = Annotated[
    Full
    | Epi
    | PublishedEpi
    | Window
    | Static
    | RandomMask
    | Inverted
    | Ewc
    | L2Sp
    | Replay
    | Lora
    | Mofo
    | PcGrad,
    Field(discriminator="name"),
]
