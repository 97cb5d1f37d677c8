"""The types that the backbone computes in: autocast, TF32, and the scale that keeps float16 gradients in range.

Separate because it is one decision, `train.precision`, that the step, the build and the checkpoint each see a side of.
Parameters stay in float32 under autocast, and the class layer computes in float32 whatever the backbone does.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from megaclass.config import Train
from megaclass.errors import ConfigError

INITIAL_SCALE = 65536.0
# After so many steps in a row without an overflow the scale is doubled.
GROWTH_STEPS = 2000
# The least CUDA capability with TF32: Ampere.
_TF32_CAPABILITY = (8, 0)
_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(train: Train, device: torch.device) -> AbstractContextManager[None]:
    """The context of the backbone's forward pass for `train.precision`."""
    if train.precision not in _AUTOCAST:
        return nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[train.precision])


def image_dtype(train: Train) -> torch.dtype:
    """The type the backbone's parameters are kept in and its images are given in."""
    return torch.float64 if train.precision == "float64" else torch.float32


def prepared(images: Tensor, train: Train) -> Tensor:
    """Images as the backbone takes them: in its type, and channels last where its kernels are."""
    images = images.to(image_dtype(train))
    return images.contiguous(memory_format=torch.channels_last) if train.channels_last else images


def set_tf32(train: Train, device: torch.device) -> None:
    """Let CUDA compute float32 products and convolutions in TF32, or in float32 proper; a setting of the process.

    Without `train.tf32` both are float32 proper; torch's own default would have convolutions in TF32.

    Raises:
        ConfigError: the device has no TF32.
    """
    if device.type != "cuda":
        if train.tf32:
            raise ConfigError(f"train.tf32 is for CUDA devices, and this run is on {device.type}; leave it out")
        return
    capability = torch.cuda.get_device_capability(device)
    if train.tf32 and capability < _TF32_CAPABILITY:
        raise ConfigError(
            f"train.tf32 needs a GPU of compute capability 8.0 (Ampere) or newer, and {torch.cuda.get_device_name()} "
            f"has {capability[0]}.{capability[1]}; leave it out"
        )
    # Torch has an old and a new interface for this, and refuses to read one where the other was written. The two old
    # setters write both, so that neither torch's compiler, which still reads the old one in places, nor whoever reads
    # the new one finds them apart.
    torch.set_float32_matmul_precision("high" if train.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = train.tf32


class LossScaler:
    """The factor on the loss of `train.precision: float16`; the same on every rank, as every decision is.

    Gradients below 6e-8 vanish in float16, so the loss is multiplied before the backward pass and all gradients,
    those of the class rows too, are divided by the same factor after it. A step whose gradients are not finite is
    skipped and halves the scale; `GROWTH_STEPS` taken steps in a row double it. Powers of two change no digit.

    Attributes:
        scale: the present factor.
        num_good: steps taken since it last changed.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.num_good = 0

    def record(self, is_taken: bool) -> None:
        """Adapt the scale to what became of a step."""
        self.num_good = self.num_good + 1 if is_taken else 0
        if not is_taken:
            self.scale /= 2
        elif self.num_good == GROWTH_STEPS:
            self.scale, self.num_good = 2 * self.scale, 0

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: `scale` float64 and `num_good` int64, scalars."""
        return {"scale": torch.tensor(self.scale, dtype=torch.float64), "num_good": torch.tensor(self.num_good)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` gave."""
        self.scale, self.num_good = float(state["scale"]), int(state["num_good"])


def scaled(loss: Tensor, scaler: LossScaler | None) -> Tensor:
    """The loss to take the gradients of."""
    return loss if scaler is None else loss * scaler.scale


def build_scaler(train: Train) -> LossScaler | None:
    """The scaler of a run; None for every precision but float16."""
    if train.precision != "float16":
        return None
    return LossScaler(INITIAL_SCALE if train.loss_scale is None else train.loss_scale)
