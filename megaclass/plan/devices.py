"""What the devices can do, as plain data, and what this machine measures itself to do.

Sources: memory, peak rates and link rates are the makers' data sheets (NVIDIA H200, H100 SXM, A100 80GB SXM, L40S, V100
SXM2 32GB), reduced to what is commonly reached: matrix products to 80 %, memory to 90 %, links to 80 % of one
direction, one network card per GPU across nodes, PCIe 5, 4 or 3 with sixteen lanes to the host. H200: 790 TFLOP/s and
4.3 TB/s are assumed in the cost model. None of these numbers is a measurement of ours; the CPU is one core of a present
server, and `calibrated` measures it.

Not in a data sheet, and assumptions of ours: a kernel takes 2.5 us at least; eager torch issues one operator in 6 us; a
hop of a ring takes 1 us inside a node and 5 us across nodes.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

import torch

from megaclass.errors import ConfigError
from megaclass.parallel.process import World

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One device of a rank.

    Attributes:
        name: what the command line calls it.
        memory_bytes: usable memory; None: not known, for a host.
        bf16_flops, fp32_flops: matrix products, per second.
        bandwidth: bytes of its memory per second, reads and writes together.
        link_bandwidth: bytes per second that a rank sends to others of its node.
        network_bandwidth: bytes per second that a rank sends to other nodes.
        host_bandwidth: bytes per second between its memory and the host's, each way.
        latency_seconds: of one collective inside a node; three times that across nodes.
        ranks_per_node: devices that share the fast links.
        kernel_seconds: the least that a kernel takes.
        issue_seconds: of the host, to have one operator begin.
        hop_seconds, network_hop_seconds: until a message is at the next rank of a ring, inside a node and across.
        multiprocessors: that the tiles of a product are spread over.
    """

    name: str
    memory_bytes: int | None
    bf16_flops: float
    fp32_flops: float
    bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    host_bandwidth: float
    latency_seconds: float = 20e-6
    ranks_per_node: int = 8
    kernel_seconds: float = 2.5e-6
    issue_seconds: float = 6e-6
    hop_seconds: float = 1e-6
    network_hop_seconds: float = 5e-6
    multiprocessors: int = 132


DEVICES = {
    device.name: device
    for device in (
        Device("h200", 139 * GIB, 790e12, 54e12, 4.3e12, 360e9, 45e9, 50e9),
        Device("h100", 79 * GIB, 790e12, 54e12, 3.0e12, 360e9, 45e9, 50e9),
        Device("a100", 79 * GIB, 250e12, 15.6e12, 1.8e12, 240e9, 22e9, 25e9, multiprocessors=108),
        Device("l40s", 44 * GIB, 290e12, 73e12, 0.78e12, 25e9, 22e9, 25e9, multiprocessors=142),
        Device("v100", 31 * GIB, 12.5e12, 12.5e12, 0.81e12, 120e9, 11e9, 12e9, multiprocessors=80),
        Device("cpu", None, 200e9, 100e9, 12e9, 2e9, 1e9, 12e9, 100e-6, 64),
    )
}


def find(name: str) -> Device:
    """The device called `name`.

    Raises:
        ConfigError: not known, with the nearest names.
    """
    if name not in DEVICES:
        near = difflib.get_close_matches(name.lower(), DEVICES, 3, 0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(f"gpu {name!r} is not known; {hint}Known are {', '.join(DEVICES)}")
    return DEVICES[name]


def calibrated() -> Device:
    """`cpu` with the rates this process measures in a second or two: products of both types and a copy."""
    from megaclass.bench.measure import calibrated as measured

    here = World(0, 1, 0, torch.device("cpu"), None, None)
    fp32, bandwidth = measured(here, 512, 512, False)
    bf16, _ = measured(here, 512, 512, True)
    return replace(DEVICES["cpu"], fp32_flops=fp32, bf16_flops=bf16, bandwidth=bandwidth)
