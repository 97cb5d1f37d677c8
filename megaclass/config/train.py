"""The options of `train`, and which of them, about precision, memory and speed of the backbone, cannot be had together.

Separate because these options are many and their combinations a matter of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from megaclass.config.section import Section

if TYPE_CHECKING:
    from megaclass.config.models import Optim


class Train(Section):
    """Length, batch and precision of the run."""

    steps: int | None = Field(None, ge=1, description="optimizer steps; give this or epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the data; give this or steps")
    global_batch_size: int = Field(256, ge=1, description="samples per step over all ranks and accumulation steps")
    accumulation_steps: int = Field(1, ge=1, description="micro-batches per step")
    gather_slices: int = Field(
        1, ge=1, le=64, description="slices of a micro-batch: each travels while the backbone works on the next one"
    )
    row_stream: bool = Field(
        False,
        description="CUDA: class-row pass beside the backbone's backward, on its own stream; never run on a GPU yet",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of everything random")
    strategy: Literal["auto", "ddp", "fsdp", "deepspeed"] = Field(
        "auto",
        description="ddp: the whole backbone on every rank; fsdp: its parameters and their state in parts; deepspeed: "
        "ZeRO; auto: ddp",
    )
    zero_stage: Literal[0, 1, 2, 3] | None = Field(
        None,
        description="strategy deepspeed: in parts are 0: nothing, 1: optimizer state, 2: gradients too, 3: parameters "
        "too; default 1",
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="strategy deepspeed: keep in host memory optimizer state, or parameters (stage 3) as well"
    )
    deepspeed_config: Path | None = Field(
        None, description="strategy deepspeed: JSON file of its own settings (buckets, overlap, thresholds, reports)"
    )
    fsdp_reshard: bool = Field(
        True, description="strategy fsdp: drop a block's gathered parameters after its forward pass, gather them again"
    )
    fsdp_gather: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="strategy fsdp, precision bfloat16: type that the parameters of blocks are gathered in (vit alone)",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    precision: Literal["float32", "bfloat16", "float16", "float64"] = Field(
        "float32",
        description="bfloat16, float16: autocast of the backbone, float16 with loss scaling; float64: for comparisons",
    )
    loss_scale: float | None = Field(
        None, gt=0, le=2.0**40, description="precision float16: factor on the loss at the beginning; default 65536"
    )
    tf32: bool = Field(
        False, description="CUDA: float32 products and convolutions in TF32 (ten bits), those of the class layer too"
    )
    channels_last: bool = Field(False, description="images and kernels of convolutions laid out channels last")
    compile: bool = Field(False, description="compile the backbone with torch.compile; on a CPU needs a C++ compiler")
    activation_checkpointing: bool = Field(
        False, description="keep only the inputs of the backbone's blocks and compute the rest again in backward"
    )
    checkpoint_every: int = Field(1000, ge=1, description="steps between checkpoints; the last step always has one")
    keep_checkpoints: int = Field(2, ge=2, description="newest checkpoints kept, beside the best one")
    non_finite_limit: int = Field(10, ge=1, description="skipped steps in a row that end the run (exit code 5)")


def backbone_faults(train: Train, optim: Optim) -> list[str]:
    """What is wrong with the options of the backbone's precision, memory and speed, together."""
    faults = []
    if train.precision == "float16" and optim.row_update == "fused":
        faults.append(
            "train.precision float16 multiplies the loss by a scale, and optim.row_update fused writes class rows "
            "before their gradient can be divided by it; use precision bfloat16 or optim.row_update deferred"
        )
    if train.loss_scale is not None and train.precision != "float16":
        faults.append(
            f"train.loss_scale {train.loss_scale:g} is for train.precision float16, and that is {train.precision}; "
            "leave it out"
        )
    if train.tf32 and train.precision == "float64":
        faults.append("train.tf32 is for products of float32, and train.precision float64 has none; leave it out")
    if train.compile and train.activation_checkpointing:
        faults.append(
            "train.compile sees the whole backbone as one program and decides itself what backward computes again; "
            "leave out train.activation_checkpointing, or train.compile"
        )
    faults += _deepspeed_faults(train, optim)
    if train.strategy == "fsdp":
        faults += _fsdp_faults(train)
    else:
        faults += [
            f"train.{name} is for train.strategy fsdp, and that is {train.strategy}; leave it out"
            for name, is_given in (
                ("fsdp_reshard", not train.fsdp_reshard), ("fsdp_gather", train.fsdp_gather != "float32")
            )
            if is_given
        ]  # fmt: skip
    return faults


def overlap_faults(train: Train, batch_norm: str, row_memory: str) -> list[str]:
    """What keeps the backbone from taking a micro-batch slice by slice, and the class-row pass from its own stream."""
    faults = []
    if train.row_stream and row_memory == "host":
        faults.append(
            "train.row_stream: rows that visit the device (classifier.row_memory host) are copied by a stream of their "
            "own already, which knows no third one; leave one of the two out"
        )
    if train.row_stream and train.strategy not in ("auto", "ddp"):
        faults.append(
            f"train.row_stream is for train.strategy ddp, and that is {train.strategy}, which has streams of its own; "
            "leave it out"
        )
    if train.gather_slices == 1:
        return faults
    if batch_norm == "sync":
        faults.append(
            f"train.gather_slices {train.gather_slices} passes the backbone one slice at a time, and "
            "backbone.batch_norm sync needs the whole batch at once; use batch_norm local, which then has the "
            "statistics of a slice, or gather_slices 1"
        )
    if train.strategy not in ("auto", "ddp"):
        faults.append(
            f"train.gather_slices {train.gather_slices} calls the backbone once for every slice, and train.strategy "
            f"{train.strategy} is made for one call a micro-batch; use strategy ddp or gather_slices 1"
        )
    return faults


def _fsdp_faults(train: Train) -> list[str]:
    """What a backbone in parts cannot do."""
    faults = []
    if train.channels_last:
        faults.append(
            "train.strategy fsdp cuts parameters along their first dimension, row-major; leave out "
            "train.channels_last, or use strategy ddp"
        )
    if train.compile:
        faults.append(
            "train.strategy fsdp gathers parameters between the blocks, and train.compile makes one program of them; "
            "leave one of the two out"
        )
    if train.fsdp_gather != "float32" and train.precision != "bfloat16":
        faults.append(
            f"train.fsdp_gather {train.fsdp_gather} is what blocks then compute with, and train.precision is "
            f"{train.precision}; use precision bfloat16, or leave it out"
        )
    return faults


def _deepspeed_faults(train: Train, optim: Optim) -> list[str]:
    """What DeepSpeed cannot do, and its options without it."""
    stage = train.zero_stage
    if train.strategy != "deepspeed":
        given = [
            name
            for name, is_given in (
                ("zero_stage", stage is not None),
                ("offload", train.offload != "none"),
                ("deepspeed_config", train.deepspeed_config is not None),
            )
            if is_given
        ]
        return [f"train.{name} is for train.strategy deepspeed, and that is {train.strategy}" for name in given]
    faults = []
    if train.precision == "float64":
        faults.append("train.strategy deepspeed keeps its parts in float32; use train.precision float32, or ddp")
    if train.channels_last:
        faults.append(
            "train.strategy deepspeed keeps parameters in flat, row-major parts; leave out train.channels_last, or use "
            "strategy ddp"
        )
    if train.compile:
        faults.append(
            "train.strategy deepspeed and train.compile are not made for each other; leave one of the two out"
        )
    if train.offload != "none" and stage == 0:
        faults.append(f"train.offload {train.offload} needs parts, and train.zero_stage is 0; use stage 1, 2 or 3")
    if train.offload == "all" and stage != 3:
        faults.append(
            "train.offload all keeps parameters in host memory, which only train.zero_stage 3 takes apart, and that is "
            f"{1 if stage is None else stage}; use stage 3, or train.offload optimizer"
        )
    if optim.ema_decay is not None and stage == 3:
        faults.append(
            f"optim.ema_decay {optim.ema_decay:g} keeps a second whole backbone, which train.zero_stage 3 is there to "
            "avoid; leave it out, or use stage 2"
        )
    return faults
