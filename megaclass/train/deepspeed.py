"""The backbone under DeepSpeed's engine: ZeRO stages 0 to 3, with a torch optimizer of this rank's part.

The engine owns the backbone and nothing else. Four things are done around it because it cannot know of the class rows:

- it averages gradients over ranks, which `grad_divisor` tells the class layer;
- its clipping is off: the joint norm needs the gradients between backward and step, and the factor is applied by a hook
  that torch's optimizer calls before each of its steps (the engine makes one per group of parameters);
- a step that is to be left out goes through the engine all the same, so that it clears what it keeps, and the hook
  takes the gradients away from the optimizer;
- its checkpoints are pickles that fit one number of ranks only; whole tensors are gathered and given to the project's.

State of the optimizer is made at the start and not in the first step: the engine links it to the parameters after the
step of the first group, and that of the second group would never be found by `safe_get_full_optimizer_state`.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from megaclass.errors import ConfigError, NumericError
from megaclass.optim.ema import MovingAverage
from megaclass.parallel.process import World, group_of_one
from megaclass.train.strategy import Gradients, check_tensors, load_module, remember_buffers


class DeepSpeedStrategy:
    """DeepSpeed's engine over the backbone; see `strategy.Strategy`.

    Args:
        backbone: on this rank's device, in float32, the same on every rank; stage 3 cuts it in place.
        optimizer: torch's, of its parameters; stages 1 to 3 replace them by this rank's part, flat and float32.
        make_backbone: makes another one of the same shape, for evaluation at stage 3.
        autocast: makes the context of the backbone's forward pass; the engine switches off one that is around it.
        settings: the engine's, from `deepspeed_settings.settings`.
        world: the ranks.

    Raises:
        ConfigError: DeepSpeed is not installed, or refuses a setting.

    Cost: of the backbone's parameters, gradients and optimizer state every rank holds all at stage 0; at stages 1, 2
    and 3 its part (1 / ranks) of the state, then of the gradients, then of the parameters. An all-reduce of the
    gradients per step (stages 0, 1), a reduce per micro-batch (2, 3), an all-gather of the parameters per step (1, 2)
    or per forward and per backward pass (3).
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: torch.optim.Optimizer,
        make_backbone: Callable[[], nn.Module],
        autocast: Callable[[], AbstractContextManager[None]],
        settings: dict[str, Any],
        world: World,
    ) -> None:
        self._deepspeed = _start(world)
        self.backbone = backbone
        self.optimizer = optimizer
        self.grad_divisor = world.size
        self.stage: int = settings["zero_optimization"]["stage"]
        self._is_offloaded = "offload_optimizer" in settings["zero_optimization"]
        self._world = world
        self._make_backbone = make_backbone
        # What a step does to the gradients; None leaves it out.
        self._coefficient: Tensor | None = None
        self._taken_away: list[tuple[Tensor, Tensor | None]] = []
        optimizer.register_step_pre_hook(lambda *_: self._before_update())
        optimizer.register_step_post_hook(lambda *_: self._after_update())
        for parameter in backbone.parameters():
            # The engine sends bytes, which wants the usual strides also where a dimension of one has others.
            parameter.data = parameter.data.reshape(-1).view(parameter.shape)
        try:
            self.engine, *_ = self._deepspeed.initialize(
                model=_InAutocast(backbone, autocast), optimizer=optimizer, config=settings, dist_init_required=False
            )
        except ValueError as error:  # how it refuses a value of a setting
            raise ConfigError(f"DeepSpeed refuses its settings: {' '.join(str(error).split())[:500]}") from error
        self.model: nn.Module = self.engine
        self._named = {name: one for name, one in backbone.named_parameters() if one.requires_grad}
        self._make_state()

    def begin(self) -> None:
        """Remember the buffers."""
        self._put_buffers_back = remember_buffers(self.backbone)

    def accumulate(self, is_last: bool) -> AbstractContextManager[None]:
        """Tell the engine which micro-batch is the last; stages 2 and 3 reduce gradients in each."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """The engine's backward; the loop has divided the loss by the number of micro-batches already."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def gradients(self) -> Gradients:
        """At stage 0 whole gradients, the same on every rank; else this rank's part, padded with zeros."""
        if self.stage == 0:
            return Gradients([one.grad for one in self._named.values() if one.grad is not None], [])
        if self._is_offloaded:
            if self._world.device.type == "cuda":
                torch.cuda.synchronize()  # they are on their way to the host
            return Gradients([], [part.grad for part in self._parts() if part.grad is not None])
        found = self.engine.optimizer.averaged_gradients.values()
        return Gradients([], [part for parts in found if parts is not None for part in parts if part is not None])

    def step(self, learning_rate: float, coefficient: Tensor) -> None:
        """The engine's step, with the factor applied before each of the optimizer's.

        Raises:
            NumericError: the engine has left the step out by itself.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self._coefficient = coefficient
        self.engine.step()
        if not self.engine.was_step_applied():
            raise NumericError(
                "DeepSpeed has left out a step whose gradients are finite: their squares are not, in float32; lower "
                "optim.lr or the scale of the loss, and go on from the last checkpoint"
            )

    def skip(self) -> None:
        """The engine's step without gradients for the optimizer; the buffers are put back."""
        self._coefficient = None
        self.engine.step()
        self._put_buffers_back()

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The backbone itself; at stage 3 a second one with the present values, which is gone afterwards.

        Cost at stage 3: the memory of a backbone, and a gather of every parameter.
        """
        if self.stage < 3:
            yield self.backbone
            return
        module = self._make_backbone()
        load_module(module, {name: tensor.clone() for name, tensor in self._whole_tensors()})
        yield module

    def average(self, decay: float) -> MovingAverage:
        """Of the whole backbone."""
        return MovingAverage(self.backbone, decay)

    def backbone_state(self) -> dict[str, Tensor]:
        """The live tensors; at stage 3 parameters are gathered one by one, onto rank 0's host memory."""
        if self.stage < 3:
            return dict(self.backbone.state_dict())
        is_main = self._world.is_main
        return {name: tensor.to("cpu", copy=True) for name, tensor in self._whole_tensors() if is_main}

    def optimizer_state(self) -> dict[str, Tensor]:
        """The live tensors at stage 0; else gathered one by one, onto rank 0's host memory. Zeros before any step."""
        found = {}
        for name, parameter in self._named.items():
            for key in self._keys:
                if self.stage == 0:
                    found[f"{name}/{key}"] = self.optimizer.state[parameter][key]
                    continue
                whole = self._deepspeed.utils.safe_get_full_optimizer_state(parameter, key)  # parts -> same everywhere
                if self._world.is_main:
                    found[f"{name}/{key}"] = whole.to("cpu", torch.float32).reshape(self._shape(parameter))
            if self._count is not None:
                found[f"{name}/step"] = self._count.clone()
        return found

    def load_backbone(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite the whole parameters, each for a moment at stage 3, and then the engine's own copy of its part."""
        if self.stage < 3:
            load_module(self.backbone, tensors)
        else:
            own = dict(self.backbone.state_dict(keep_vars=True))
            check_tensors({name: self._shape(tensor) for name, tensor in own.items()}, tensors)
            for name, tensor in own.items():
                with self._gathered(tensor, will_change=True), torch.no_grad():
                    tensor.copy_(tensors[name])
        if self.stage > 0:
            self.engine.optimizer.refresh_fp32_params()

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Put each rank's part of every tensor beside its part of the parameter."""
        for full_name, value in tensors.items():
            name, key = full_name.rsplit("/", 1)
            parameter = self._named[name]
            if key == "step":
                assert self._count is not None
                for part in self._parts():
                    self.optimizer.state[part]["step"].copy_(value)
            elif self.stage == 0:
                self.optimizer.state[parameter][key].copy_(value)
            elif self.stage < 3:
                self._deepspeed.utils.safe_set_full_optimizer_state(parameter, value, key)
            else:
                self._deepspeed.utils.safe_set_local_optimizer_state(parameter, self._part_of(parameter, value), key)

    def _before_update(self) -> None:
        """The torch optimizer's hook before a step of one group: scale its gradients, or take them away."""
        parameters = [one for group in self.optimizer.param_groups for one in group["params"]]
        if self._coefficient is None:
            self._taken_away = [(one, one.grad) for one in parameters]
            for one in parameters:
                one.grad = None
            return
        found = [one.grad for one in parameters if one.grad is not None]
        if found:
            torch._foreach_mul_(found, self._coefficient.to(found[0].device))

    def _after_update(self) -> None:
        """The hook after it: offloaded gradients live in buffers that the engine goes on using."""
        for parameter, gradient in self._taken_away:
            parameter.grad = gradient
        self._taken_away = []

    def _parts(self) -> list[Tensor]:
        """What the torch optimizer updates on this rank: whole parameters at stage 0, else flat parts of many."""
        if self.stage == 0:
            return list(self._named.values())
        optimizer = self.engine.optimizer
        parts: list[Tensor] = (
            optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups
        )
        return parts

    def _make_state(self) -> None:
        """Zeros, as the first step would begin with, and the engine's links from parameters to them."""
        is_adam = isinstance(self.optimizer, torch.optim.AdamW)
        has_momentum = is_adam or bool(self.optimizer.defaults["momentum"])
        moments = ("exp_avg", "exp_avg_sq") if is_adam else ("momentum_buffer",)
        self._keys = moments if has_momentum else ()
        self._count: Tensor | None = None
        for part in self._parts():
            state: dict[str, Tensor] = {key: torch.zeros_like(part, requires_grad=False) for key in self._keys}
            if is_adam:
                # Torch's fused optimizers want it where the parameter is.
                self._count = state["step"] = torch.zeros((), device=part.device)
            self.optimizer.state[part].update(state)
        if self.stage in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _whole_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers at stage 3, each whole on every rank until the next one is asked for."""
        for name, tensor in self.backbone.state_dict(keep_vars=True).items():
            with self._gathered(tensor):
                yield name, tensor.detach()

    def _gathered(self, tensor: Tensor, *, will_change: bool = False) -> AbstractContextManager[None]:
        """Context in which a parameter of stage 3 is whole on every rank; a buffer always is."""
        if not hasattr(tensor, "ds_id"):
            return nullcontext()
        context: AbstractContextManager[None] = self._deepspeed.zero.GatheredParameters(
            [tensor], modifier_rank=0 if will_change else None
        )
        return context

    @staticmethod
    def _shape(tensor: Tensor) -> torch.Size:
        return torch.Size(getattr(tensor, "ds_shape", tensor.shape))

    def _part_of(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """This rank's part of a tensor of the parameter's shape at stage 3: equal parts, the last padded with zeros."""
        size: int = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        part = whole.new_zeros(size)
        values = whole.reshape(-1)[self._world.rank * size :][:size]
        part[: values.numel()] = values
        return part


class _InAutocast(nn.Module):
    """The backbone computing in a context, which is entered inside the engine's forward pass."""

    def __init__(self, backbone: nn.Module, autocast: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__()
        self.backbone = backbone
        self._autocast = autocast

    def forward(self, images: Tensor) -> Tensor:
        """Images [batch, channels, height, width] -> embeddings [batch, dim]."""
        with self._autocast():
            embeddings: Tensor = self.backbone(images)
        return embeddings


def _start(world: World) -> Any:
    """DeepSpeed, quiet, on this rank's kind of device and over the group that is there.

    Raises:
        ConfigError: it is not installed.
    """
    # It looks at what the machine has, and not at what the run uses.
    os.environ["DS_ACCELERATOR"] = world.device.type
    # It asks for this even where it is alone and no launcher has set it.
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    logging.disable(logging.WARNING)
    try:
        import deepspeed
        from deepspeed import ops
    except ImportError as error:
        raise ConfigError(
            f"train.strategy deepspeed needs DeepSpeed, which cannot be imported ({error}); install it with "
            "DS_BUILD_OPS=0 pip install 'megaclass[deepspeed]', or use train.strategy ddp or fsdp"
        ) from None
    finally:
        logging.disable(logging.NOTSET)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Torch's new names for two collectives that it uses by their old ones.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # On a CPU it would compile an all-reduce through shared memory at the start, for minutes; gloo does that.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if world.group is None:
        group_of_one(world.device)
    return deepspeed
