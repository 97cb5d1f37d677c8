"""The backbone as a program of torch's compiler, under the names it had before.

Separate because the compiler needs things of the machine that nothing else does, and wants to be run once before the
training is watched.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from megaclass.backbones.norm import SynchronisedBatchNorm
from megaclass.errors import ConfigError
from megaclass.train.strategy import remember_buffers


def check_compiler(device: torch.device) -> None:
    """Refuse `train.compile` where torch's compiler cannot make programs for the device.

    Raises:
        ConfigError: with what is missing.
    """
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise ConfigError(
                "train.compile needs the package triton for CUDA; install megaclass[triton], or leave it out"
            )
        return
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"train.compile needs a C++ compiler on a CPU, and there is no {compiler}; install one (Debian: g++), name "
            "it in CXX, or leave train.compile out"
        )
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        raise ConfigError(
            "train.compile needs Python's header files on a CPU, and Python.h is not there; install them (Debian: "
            "python3-dev), or leave train.compile out"
        )


def compile_backbone(backbone: nn.Module, images: Tensor, context: AbstractContextManager[None]) -> nn.Module:
    """A module that computes what `backbone` does with the same parameters and buffers, compiled for such images.

    The backbone itself stays as it is: evaluation runs it uncompiled, and its tensors keep their names. A forward and a
    backward pass are made at once, and leave nothing behind: compiling takes minutes for a deep network, longer than a
    step may. On all ranks together, as batch norm may be synchronised.

    Args:
        backbone: in training mode.
        images: of the shape, type and layout of a micro-batch on this rank; their values do not matter.
        context: of the forward pass.
    """
    for module in backbone.modules():
        if isinstance(module, SynchronisedBatchNorm):
            module.synchronised = torch.compiler.disable(module.synchronised)  # type: ignore[method-assign]
    compiled: nn.Module = torch.compile(backbone)  # type: ignore[assignment]
    put_buffers_back = remember_buffers(backbone)
    with context:
        embeddings = compiled(images)
    embeddings.float().sum().backward()
    backbone.zero_grad(set_to_none=True)
    put_buffers_back()
    return compiled
