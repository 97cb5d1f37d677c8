"""The backbone in parts: torch's `fully_shard` (FSDP2) over its blocks, with a torch optimizer of this rank's parts.

For backbones whose parameters, gradients and optimizer state are too large to stand on every rank. Every parameter is
cut along its first dimension; each rank holds one part and has the whole only while the block it belongs to computes.
Blocks are cut one by one, and what is in no block (stem and end) together.

The optimizer works on plain tensors that share memory with this rank's parts: both optimizers are elementwise, so a
step of the parts is the part of the step, and torch's fused kernels can do it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from megaclass.backbones.block import blocks
from megaclass.errors import ConfigError
from megaclass.optim.ema import NUM_UPDATES, MovingAverage
from megaclass.parallel.collectives import gather_uneven
from megaclass.parallel.process import World, mesh_of
from megaclass.parallel.shard import ClassShard
from megaclass.train.strategy import Gradients, check_tensors, load_module, remember_buffers

MakeOptimizer = Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer]


class FSDPStrategy:
    """`fully_shard` over the backbone; see `strategy.Strategy`.

    Parameters are gathered in the type they are kept in, unless `gathered` says another, and autocast converts what a
    block computes with, as without this strategy: the numbers are the same. Gradients are reduced in the type of the
    parameters. Buffers (running statistics) stay whole on every rank.

    Args:
        backbone: on this rank's device, the same on every rank; it is cut in place.
        make_optimizer: makes the optimizer of parameters given by name.
        make_backbone: makes another one of the same shape, for evaluation.
        world: the ranks, at least two.
        reshard_after_forward: gathered parameters of a block are dropped after its forward pass and gathered again for
            its backward pass; else they are kept between.
        gathered: type that the parameters of blocks are gathered and used in; None: that they are kept in.

    Raises:
        ConfigError: `gathered` is given, and blocks have batch norms, which want their parameters in float32.

    Cost: an all-gather of every parameter per forward pass, another per backward pass with `reshard_after_forward`, and
    one reduce-scatter of every gradient per step.
    """

    def __init__(
        self,
        backbone: nn.Module,
        make_optimizer: MakeOptimizer,
        make_backbone: Callable[[], nn.Module],
        world: World,
        *,
        reshard_after_forward: bool,
        gathered: torch.dtype | None = None,
    ) -> None:
        mesh = mesh_of(world)
        policy = _policy(backbone, gathered)
        for block in blocks(backbone):
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward, mp_policy=policy)
        # The outermost part is needed first in backward, so dropping it would be for nothing.
        fully_shard(backbone, mesh=mesh, reshard_after_forward=False)
        self.model: nn.Module = backbone
        self.backbone: nn.Module = backbone
        self.grad_divisor = world.size
        self._world = world
        self._make_backbone = make_backbone
        self._sharded = {name: one for name, one in backbone.named_parameters() if isinstance(one, DTensor)}
        self._parts = {
            name: nn.Parameter(one.to_local().detach(), requires_grad=one.requires_grad)
            for name, one in self._sharded.items()
        }
        self.optimizer = make_optimizer(self._parts)

    def begin(self) -> None:
        """Remember the buffers."""
        self._put_buffers_back = remember_buffers(self.backbone)

    def accumulate(self, is_last: bool) -> AbstractContextManager[None]:
        """Gradients are summed whole on this rank before the last micro-batch, and reduced with it."""
        assert isinstance(self.backbone, FSDPModule)
        self.backbone.set_requires_gradient_sync(is_last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Plain autograd; torch's hooks average over ranks and leave each its part."""
        loss.backward()

    def gradients(self) -> Gradients:
        """This rank's part of every gradient; parts without rows are empty."""
        return Gradients([], [one.grad.to_local() for one in self._sharded.values() if isinstance(one.grad, DTensor)])

    def step(self, learning_rate: float, coefficient: Tensor) -> None:
        """Scale, step the parts, clear."""
        gradients = self.gradients().sharded
        torch._foreach_mul_(gradients, coefficient)
        for name, one in self._sharded.items():
            # What torch gathers next is what the optimizer writes now.
            assert self._parts[name].data_ptr() == one.to_local().data_ptr(), name
            self._parts[name].grad = one.grad.to_local() if isinstance(one.grad, DTensor) else None
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self._clear()

    def skip(self) -> None:
        """Clear the gradients and put the buffers back."""
        self._clear()
        self._put_buffers_back()

    def _clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.backbone.zero_grad(set_to_none=True)

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """A second backbone with the present values, which is gone afterwards. Cost: its memory, and a gather."""
        module = self._make_backbone()
        load_module(module, self.gathered(dict(self.backbone.state_dict())))
        yield module

    def average(self, decay: float) -> MovingAverage:
        """Of this rank's parts and the buffers."""
        live = {
            name: self._parts[name].detach() if name in self._parts else tensor
            for name, tensor in self.backbone.state_dict().items()
        }
        return _AverageOfParts(live, decay, self)

    def backbone_state(self) -> dict[str, Tensor]:
        """Whole parameters on rank 0, in host memory, gathered one by one; buffers on every rank."""
        return self.gathered(dict(self.backbone.state_dict()), on_main_only=True)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Whole moments on rank 0, in host memory, gathered one by one; scalars on every rank."""
        return self.gathered(
            {
                f"{name}/{key}": value
                for name, part in self._parts.items()
                for key, value in self.optimizer.state.get(part, {}).items()
                if isinstance(value, Tensor)
            },
            on_main_only=True,
        )

    def load_backbone(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy this rank's rows into its parts."""
        with torch.no_grad():
            own = self.backbone.state_dict()
            for name, tensor in self.cut(tensors).items():
                (self._parts[name] if name in self._parts else own[name]).copy_(tensor)

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Put this rank's rows of the moments beside its parts."""
        for full_name, value in tensors.items():
            name, key = full_name.rsplit("/", 1)
            part = self._parts[name]
            is_moment = value.shape == self._sharded[name].shape
            # A copy: rows of a tensor that is read from a file would keep all of it in memory.
            self.optimizer.state[part][key] = (self._rows(name, value) if is_moment else value).to(
                part.device, copy=True
            )

    def cut(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's rows of whole parameters, and buffers as they are.

        Raises:
            CheckpointError: names or shapes are not this backbone's.
        """
        check_tensors({name: tensor.shape for name, tensor in self.backbone.state_dict().items()}, tensors)
        return {name: self._rows(name, one) if name in self._parts else one for name, one in tensors.items()}

    def _rows(self, name: str, whole: Tensor) -> Tensor:
        """This rank's rows of a whole tensor of the parameter `name`'s shape."""
        # Torch cuts as the class rows are cut, in blocks of ceil(rows / ranks).
        shard = ClassShard(whole.shape[0], self._world.rank, self._world.size)
        rows = whole[shard.start : shard.stop]
        assert rows.shape == self._parts[name].shape, (name, rows.shape, self._parts[name].shape)
        return rows

    def gathered(self, tensors: Mapping[str, Tensor], *, on_main_only: bool = False) -> dict[str, Tensor]:
        """Whole tensors for parts of parameters or of their moments; others, scalars and buffers, as they are."""
        found = {}
        for name, tensor in tensors.items():
            part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            owner = self._parts.get(name, self._parts.get(name.rpartition("/")[0]))
            if owner is None or part.shape != owner.shape or not part.ndim:
                found[name] = part
                continue
            whole = gather_uneven(part.contiguous(), self._world.group)  # parts -> same on every rank
            if not on_main_only:
                found[name] = whole
            elif self._world.is_main:
                found[name] = whole.cpu()
        return found


class _AverageOfParts(MovingAverage):
    """A moving average of this rank's parts, whole in the checkpoint."""

    def __init__(self, live: Mapping[str, Tensor], decay: float, strategy: FSDPStrategy) -> None:
        super().__init__(live, decay)
        self._strategy = strategy

    def state_dict(self) -> dict[str, Tensor]:
        """Whole averages on rank 0, in host memory."""
        return self._strategy.gathered(super().state_dict(), on_main_only=True)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over this rank's rows of whole averages."""
        averages = {name: tensor for name, tensor in state.items() if name != NUM_UPDATES}
        super().load_state_dict(self._strategy.cut(averages) | {NUM_UPDATES: state[NUM_UPDATES]})


def _policy(backbone: nn.Module, gathered: torch.dtype | None) -> MixedPrecisionPolicy:
    """Blocks are gathered in `gathered`, and their gradients reduced in float32."""
    if gathered is None:
        return MixedPrecisionPolicy()
    if any(isinstance(module, _BatchNorm) for block in blocks(backbone) for module in block.modules()):
        raise ConfigError(
            "train.fsdp_gather bfloat16 is for backbones without batch norm in their blocks (vit-tiny, vit-small, "
            "vit-base), as batch norm takes its parameters in float32 alone; leave it out"
        )
    return MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32)
