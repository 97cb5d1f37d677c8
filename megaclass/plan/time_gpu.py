"""A step on GPUs, from the operators it calls and the data sheet of the device.

An operator takes the longer of its operations at the rate its shape allows and its bytes at the memory's rate, and a
kernel's least time. The host issues operators one after another; a part of the step takes the longer of both. What is
sent is hidden where the code hides it today:

- the backbone's gradient behind its backward pass, bucket by bucket, but for the last bucket;
- the embedding gradient behind the gradient of the class rows;
- everything else is waited for.

No number here was measured by us; each assumption stands beside its constant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megaclass.config import Config
from megaclass.plan import links
from megaclass.plan.backbone import BackboneWork
from megaclass.plan.devices import Device
from megaclass.plan.memory import visiting_bytes
from megaclass.plan.operators import Calls, Operator, Shape
from megaclass.plan.program import Program
from megaclass.plan.step import Collective
from megaclass.plan.straggling import slow_by
from megaclass.plan.work import Work

# What a convolution by implicit products reaches of a plain product of the same shape. With 0.3 the backbone of 8 V100
# (100 TFLOP/s in float16, batches of 128) makes 653 samples/s each; insightface has published 625 at 125,000 classes
# (5,004 on 8 GPUs). The only constant that was set by a whole step, and that step is not ours.
_CONVOLUTION_SHARE = 0.3
# Products are cut into tiles of 128 x 128 (64 where a side is short); a tile's beginning and end take as long as 64
# steps along the inner side. Assumed from the usual tile shapes of NVIDIA's libraries.
_TILE, _SHORT_TILE, _RAMP = 128, 64, 64
# The fused kernel's goal is three quarters of the plain product's rate (never run on a GPU yet).
_FUSED_SHARE = 0.75
# DistributedDataParallel's default bucket.
BUCKET_BYTES = 25 * 2**20


@dataclass(frozen=True)
class GpuTime:
    """Seconds of a step.

    Attributes:
        parts: computing, by part, as if nothing was sent.
        exposed: messages that nothing hides, by what is sent.
        hidden: messages that computing hides.
        data_wait: for samples.
        straggling: for the slowest rank.
        issue_bound: parts that the host bounds, as it issues operators more slowly than the device does them.
    """

    parts: dict[str, float]
    exposed: dict[str, float]
    hidden: float
    data_wait: float
    straggling: float
    issue_bound: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of the step."""
        return sum(self.parts.values()) + sum(self.exposed.values()) + self.data_wait + self.straggling

    @property
    def head_share(self) -> float:
        """Of the step: class layer, class rows, row optimizer."""
        return sum(self.parts[name] for name in ("class layer", "class rows", "row optimizer")) / self.seconds

    @property
    def communication_share(self) -> float:
        """Of the step: what is sent and not hidden."""
        return sum(self.exposed.values()) / self.seconds

    @property
    def limit(self) -> str:
        """What takes longest."""
        found = self.parts | {f"sending the {name}": value for name, value in self.exposed.items()}
        found |= {"waiting for data": self.data_wait, "the slowest rank": self.straggling}
        name = max(found, key=lambda one: found[one])
        return f"{name} (issued by the host)" if name in self.issue_bound else name


def gpu_time(
    config: Config,
    work: Work,
    program: Program,
    network: BackboneWork,
    exchanges: list[Collective],
    device: Device,
    *,
    per_node: int | None = None,
    jitter: float = 0.0,
    decode_rate: float | None = None,
) -> GpuTime:
    """The step of a rank.

    Args:
        config: of the run.
        work: of the rank with the largest shard.
        program: what it calls.
        network: its backbone.
        exchanges: what it sends.
        device: the rank's.
        per_node: ranks of a node; default: the device's.
        jitter: relative standard deviation of a rank's computing from step to step.
        decode_rate: samples that one decoding process makes in a second; None: data never makes a step wait.
    """
    layout = links.Layout(work.world_size, per_node or device.ranks_per_node)
    is_low = config.classifier.row_dtype == "bfloat16"
    parts, bound = {}, []
    for name, calls in program.parts.items():
        running = part_seconds(calls, device, is_low and name.startswith("class"))
        issuing = device.issue_seconds * max(0.0, sum(n for one, n in calls.items() if not one.is_free))
        parts[name] = max(running, issuing)
        if issuing > running:
            bound.append(name)
    parts["rows from the host"] = 0.0
    exposed, hidden = _sending(program, work, network, exchanges, device, layout, parts)
    computing = sum(parts.values())
    visiting = visiting_bytes(config, work) / device.host_bandwidth
    parts["rows from the host"] = max(0.0, visiting - computing - sum(exposed.values()))
    straggling = (slow_by(work.world_size, jitter) - 1) * computing
    busy = computing + sum(exposed.values()) + straggling
    needed = 0.0
    if decode_rate is not None:
        needed = work.batch * work.num_micro / (decode_rate * max(1, config.dataset.workers))
    return GpuTime(parts, exposed, hidden, max(0.0, needed - busy), straggling, tuple(bound))


def part_seconds(calls: Calls, device: Device, is_low: bool = False) -> float:
    """All calls one after another on the device."""
    return max(0.0, sum(count * operator_seconds(one, device, is_low) for one, count in calls.items()))


def operator_seconds(operator: Operator, device: Device, is_low: bool = False) -> float:
    """One call.

    `is_low`: float32 products are those of bfloat16 operands, as those of the class layer with bfloat16 rows.
    """
    if operator.is_free:
        return 0.0
    moving = operator.num_bytes / device.bandwidth
    computing = 0.0
    if operator.flops:
        is_low = is_low or any(shape.dtype in ("bfloat16", "float16") for shape in operator.shapes())
        rate = device.bf16_flops if is_low else device.fp32_flops
        computing = sum(flops / (rate * share) for flops, share in _products(operator, device))
    return max(device.kernel_seconds, computing, moving)


def tile_share(rows: int, columns: int, inner: int, device: Device) -> float:
    """How much of a device a product [rows, inner] x [inner, columns] uses: whole tiles, on all multiprocessors."""
    used = 1.0
    tiles = 1
    for side in (rows, columns):
        tile = _TILE if side > _SHORT_TILE else _SHORT_TILE
        count = math.ceil(side / tile)
        used *= side / (count * tile)
        tiles *= count
    # A long inner side is cut too where there are too few tiles for all multiprocessors.
    pieces = tiles * max(1, inner // 1024)
    spread = min(1.0, pieces / device.multiprocessors)
    return used * spread * inner / (inner + _RAMP)


def _products(operator: Operator, device: Device) -> list[tuple[float, float]]:
    """Operations and share of the device's rate of each product in an operator."""
    shapes, kind, flops = operator.shapes(), operator.kind, float(operator.flops)
    if kind == "fused_class_layer":
        return [(flops, _FUSED_SHARE)]
    if kind in ("convolution", "convolution_backward"):
        return _convolutions(shapes, kind, flops, device)
    matrices = [shape for shape in shapes if len(shape.size) >= 2]
    if len(matrices) < 2:
        return [(flops, 1.0)]
    left, right = matrices[0].size, matrices[1].size
    if kind.startswith("_scaled_dot_product"):
        # Queries by keys and their products with values, for every head of every sample.
        heads, queries, width = left[-4] * left[-3] if len(left) > 3 else left[0], left[-2], left[-1]
        return [(flops, tile_share(queries * heads, right[-2], width, device))]
    batch = left[0] if len(left) == 3 else 1
    return [(flops, tile_share(batch * left[-2], right[-1], left[-1], device))]


def _convolutions(shapes: list[Shape], kind: str, flops: float, device: Device) -> list[tuple[float, float]]:
    spatial = [shape.size for shape in shapes if len(shape.size) == 4]
    # Backward has the gradient first, and makes two products of the size of the forward pass.
    products = 1 if kind == "convolution" else 2
    images, weight = spatial[products - 1 : products + 1]
    num_in = images[1]
    num_out, inner = weight[0], weight[1] * weight[2] * weight[3]
    # Operations of one product are 2 x pixels x outputs x inner.
    total = flops / products
    pixels = max(1, round(total / (2 * num_out * inner)))
    if weight[1] < num_in and weight[1] == 1:  # each channel by itself: bound by memory
        return [(flops, 0.1)]
    share = _CONVOLUTION_SHARE * tile_share(pixels, num_out, inner, device)
    if products == 1:
        return [(flops, share)]
    weights = _CONVOLUTION_SHARE * tile_share(num_out, inner, pixels, device)
    return [(total, share), (total, weights)]


def _sending(
    program: Program,
    work: Work,
    network: BackboneWork,
    exchanges: list[Collective],
    device: Device,
    layout: links.Layout,
    parts: dict[str, float],
) -> tuple[dict[str, float], float]:
    """What is sent and waited for, by what it is, and the seconds that are hidden."""
    exposed: dict[str, float] = {}
    hidden = 0.0
    for one in exchanges:
        taken = links.collective(device, layout, one)
        left = taken
        if one.what == "backbone gradient":
            buckets = max(1, math.ceil(network.parameter_bytes / BUCKET_BYTES))
            behind = parts["backbone backward"] / work.num_micro * (1 - 1 / buckets)
            left = max(taken - behind, taken / buckets)
        elif one.what in ("embedding gradient", "their gradient"):
            left = max(0.0, taken - parts["class rows"])
        exposed[one.what] = left
        hidden += taken - left
    if program.num_norms and work.world_size > 1:
        numbers = 4 * program.norm_numbers / program.num_norms
        each = links.seconds(device, layout, "all-reduce", 2 * numbers * (layout.ranks - 1) / layout.ranks)
        exposed["batch norm moments"] = 2 * program.num_norms * work.num_micro * each
    return exposed, hidden
