"""Flops, bytes on the links and the expected time of a step on one rank."""

from __future__ import annotations

from dataclasses import dataclass

from megaclass.config import Config
from megaclass.kernels.chunked import keeps_slopes
from megaclass.objectives.margin import MARGINS
from megaclass.objectives.negative_map import NEGATIVE_MAPS
from megaclass.objectives.objective import OBJECTIVES
from megaclass.objectives.presets import Preset, check_exponents
from megaclass.plan.backbone import BackboneWork
from megaclass.plan.devices import Device
from megaclass.plan.memory import state_bytes, visiting_bytes
from megaclass.plan.work import Work
from megaclass.train import build

# A convolutional backbone in mixed precision reaches about 300 of 790 TFLOP/s.
_BACKBONE_SHARE = 0.38


@dataclass(frozen=True)
class Collective:
    """One exchange.

    Attributes:
        name: which.
        what: is sent.
        sent_bytes: by each rank in a step, with ring algorithms.
        count: how often in a step.
    """

    name: str
    what: str
    sent_bytes: int
    count: int


def backbone_flops(backbone: BackboneWork, work: Work) -> int:
    """Of the backbone in a step: forward once, backward twice, and what backward computes again."""
    return (3 * backbone.forward_flops + backbone.repeated_flops) * work.num_micro


def head_flops(config: Config, work: Work) -> int:
    """Of the head in a step: two products forward, one backward, and one again where slopes are not kept."""
    is_kept = config.classifier.kernel == "reference" or keeps_slopes(work.inter_batch, work.num_candidates)
    return (6 if is_kept else 8) * work.num_logits * work.dim * work.num_micro


def head_bytes(config: Config, work: Work) -> int:
    """Of memory that the head moves in a step: rows read twice and written, state and gradient read and written."""
    wide, width = build.backbone_dtype(config).itemsize, build.row_dtype(config).itemsize
    updated = work.num_rows if config.optim.untouched_rows == "dense" else work.num_touched
    reads = 2 * work.num_candidates * work.dim * width * work.num_micro
    gradient = 0 if config.optim.row_update == "fused" else 3 * work.num_touched * work.dim * wide * work.num_micro
    write = 2 * updated * work.dim * width
    return reads + gradient + write + 2 * state_bytes(config, updated, work.dim)


def collectives(config: Config, preset: Preset, work: Work, backbone: BackboneWork) -> list[Collective]:
    """Every exchange of a step, none for a single rank. Synchronised batch norm's are not counted."""
    ranks = work.world_size
    if ranks == 1:
        return []
    return [
        *_head_collectives(config, preset, work),
        *_backbone_collectives(config, work, backbone),
        Collective("all-reduce", "gradient norm", 2 * (ranks - 1) * 8 // ranks, 1),
    ]


def _backbone_collectives(config: Config, work: Work, backbone: BackboneWork) -> list[Collective]:
    """Its gradient; of a backbone in parts also its parameters, for every forward pass and, dropped, every backward."""
    once = (work.world_size - 1) * backbone.parameter_bytes // work.world_size
    if config.train.strategy != "fsdp":
        return [Collective("all-reduce", "backbone gradient", 2 * once, 1)]
    is_whole = config.train.fsdp_gather == "float32"
    passes = work.num_micro * (2 if config.train.fsdp_reshard else 1)
    return [
        Collective("all-gather", "backbone parameters", passes * once // (1 if is_whole else 2), passes),
        Collective("reduce-scatter", "backbone gradient", once, 1),
    ]


def _head_collectives(config: Config, preset: Preset, work: Work) -> list[Collective]:
    """Those of the class layer, in their order; what a loss needs beyond the common ones it declares."""
    others, micro, size = work.world_size - 1, work.num_micro, build.backbone_dtype(config).itemsize
    sent = 2 if config.classifier.row_dtype == "bfloat16" else size
    objective, margin = OBJECTIVES.find(preset.objective), MARGINS.find(preset.margin_kind)
    negative_map = NEGATIVE_MAPS.find(preset.negative_map)
    numbers = (
        work.inter_batch
        + 2
        + work.global_batch * (objective.needs_positive + bool(config.classifier.count_weight_power))
    )

    def gathered(what: str, count: int, item: int, name: str = "all-gather", slices: int = 1) -> Collective:
        return Collective(name, what, micro * others * count * item, micro * slices)

    def reduced(what: str, count: int) -> Collective:
        return Collective("all-reduce", what, micro * 2 * others * count * size // work.world_size, micro)

    each, routed = work.batch * work.dim, work.batch * work.dim // work.world_size
    if work.is_routed:
        each = -(-work.inter_batch // work.world_size) * work.dim
    slices = config.train.gather_slices
    found = [gathered("labels", work.batch, 8), gathered("embeddings", each, sent, slices=slices)]
    if work.is_routed:
        found.append(gathered("embeddings to owners", routed, sent, "all-to-all"))
    if margin.needs_norm:
        found.append(gathered("lengths of embeddings", work.batch, size))
    if negative_map.needs_positive and objective.is_exponential:
        found.append(reduced("positive cosines", 2 * work.global_batch))
    if check_exponents(preset, work.num_classes, config.classifier.normalisation):
        found.append(reduced("maxima", work.inter_batch))
    found += [reduced("sums over negatives", numbers), gathered("embedding gradient", each, size, "reduce-scatter")]
    if work.is_routed:
        found.append(gathered("their gradient", routed, size, "all-to-all"))
    if margin.needs_norm:
        found.append(gathered("gradient of lengths", work.batch, size, "reduce-scatter"))
    if OBJECTIVES.build(preset.objective, preset.hyper).initial_bias(preset.values(0.0), work.num_classes) is not None:
        found.append(reduced("gradient of the bias", 1))
    return found


def seconds(
    config: Config, work: Work, backbone: BackboneWork, device: Device, exchanges: list[Collective]
) -> dict[str, float]:
    """Expected seconds of a step by part; head compute and head memory overlap, the rest is added.

    Rows that visit the device from the host travel both ways at once and beside everything else.
    """
    is_low = config.train.precision in ("bfloat16", "float16")
    backbone_rate = (device.bf16_flops if is_low else device.fp32_flops) * (_BACKBONE_SHARE if is_low else 0.8)
    rate = device.bf16_flops if config.classifier.row_dtype == "bfloat16" else device.fp32_flops
    is_near = work.world_size <= device.ranks_per_node
    link, latency = (device.link_bandwidth, 1) if is_near else (device.network_bandwidth, 3)
    return {
        "backbone": backbone_flops(backbone, work) / backbone_rate,
        "head compute": head_flops(config, work) / rate,
        "head memory": head_bytes(config, work) / device.bandwidth,
        "collectives": sum(
            one.sent_bytes / link + one.count * latency * device.latency_seconds for one in exchanges
        ),
        "rows from the host": visiting_bytes(config, work) / device.host_bandwidth,
    }  # fmt: skip
