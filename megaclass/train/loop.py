"""The training step and the loop around it.

One step: micro-batches forward and backward, one joint gradient norm, one decision for both optimizers, both steps or
neither. The loop adds what happens between steps: stopping, logging, evaluating, saving. Everything it works with is
made by `run.py` and handed over as one `Training`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial

import torch
from torch import Tensor

from megaclass.classifier import ClassifierOutput, Monitors, ShardedClassifier
from megaclass.config import Config
from megaclass.data.batch import Batch, Reader
from megaclass.errors import NumericError
from megaclass.kernels.interface import RowBlock
from megaclass.kernels.row_gradient import RowGradient
from megaclass.marks import STEP, part
from megaclass.neighbours import NeighbourGraph
from megaclass.optim.clip import clip_coefficient, joint_norm
from megaclass.optim.ema import MovingAverage
from megaclass.optim.hosted import HostedRowOptimizer
from megaclass.optim.rowwise import RowOptimizer
from megaclass.optim.schedule import base_rates, learning_rate_factor
from megaclass.parallel.process import World
from megaclass.train.precision import LossScaler, autocast, prepared, scaled
from megaclass.train.strategy import Strategy


@dataclass
class Training:
    """The parts of one run that a step works with, and how far it has come.

    Attributes:
        bias_optimizer: of a loss's learned bias, the same on every rank; None for a loss without one.
        graph: the nearest-class graph of the sampler `hard`; None for any other.
        scaler: of the loss, for `train.precision: float16`; None for any other.
        num_steps: steps of the whole run.
        step: steps taken, over all attempts.
        position: samples consumed, over all ranks.
    """

    config: Config
    world: World
    reader: Reader
    strategy: Strategy
    classifier: ShardedClassifier
    row_optimizer: RowOptimizer | HostedRowOptimizer
    bias_optimizer: RowOptimizer | None
    graph: NeighbourGraph | None
    average: MovingAverage | None
    scaler: LossScaler | None
    num_steps: int
    step: int = 0
    position: int = 0

    @property
    def epoch(self) -> int:
        """The pass over the data that the last consumed sample belongs to, from 0."""
        return max(self.position - 1, 0) // self.reader.num_samples


@dataclass(frozen=True)
class StepResult:
    """What one step yields; tensors stay on the device.

    Attributes:
        output: loss and its parts, mean over the micro-batches.
        grad_norm: joint norm before clipping.
        is_taken: False if the norm was not finite and nothing moved, on any rank.
        learning_rates: of `backbone` and `classes` in this step.
        batches: this rank's micro-batches, without their images.
        data_wait_seconds, step_seconds: the wait for data and the whole step.
        head_cpu_seconds: processor time of this rank's class layer and row update; 0 on a GPU, where it means nothing.
    """

    output: ClassifierOutput
    grad_norm: Tensor
    is_taken: bool
    learning_rates: dict[str, float]
    batches: list[Batch]
    data_wait_seconds: float
    step_seconds: float
    head_cpu_seconds: float

    @property
    def ids(self) -> list[int]:
        """Ids of this rank's samples, in the order they were used."""
        return [int(sample) for batch in self.batches for sample in batch.ids]


@dataclass
class Hooks:
    """What `fit` calls between steps; `run.py` binds each to the file that does it.

    Attributes:
        should_stop: steps taken -> whether all ranks stop now.
        before_update: called with the ids of the micro-batches before anything moves.
        after_step: called with every step's result.
    """

    should_stop: Callable[[int], bool]
    before_update: Callable[[list[Batch]], None]
    after_step: Callable[[StepResult], None]
    between: list[Callable[[], None]] = field(default_factory=list)


def fit(training: Training, hooks: Hooks) -> bool:
    """Train until the last step; True if it was reached, False if all ranks agreed to stop before."""
    batches = iter(training.reader)
    while training.step < training.num_steps:
        if hooks.should_stop(training.step):
            return False
        with part(STEP):
            result = train_step(training, batches, hooks.before_update)
        training.step += 1
        training.position = result.batches[-1].position
        hooks.after_step(result)
        for call in hooks.between:
            call()
    return True


def train_step(
    training: Training, batches: Iterator[Batch], before_update: Callable[[list[Batch]], None]
) -> StepResult:
    """One optimizer step over `accumulation_steps` micro-batches.

    Each micro-batch is its own forward pass and its own draw; losses are divided by their number, so that the step is
    that of the mean over the global batch.
    """
    start = time.monotonic()
    num_micro = training.config.train.accumulation_steps
    strategy, classifier = training.strategy, training.classifier
    values = classifier.loss.preset.values(training.step / training.num_steps)
    # The numbers for people are computed in the steps that are logged, and only there.
    monitor = (training.step + 1) % training.config.run.log_every == 0 or training.step + 1 == training.num_steps
    before_head = classifier.cpu_seconds
    if training.config.optim.row_update == "fused":
        classifier.row_update = partial(
            _update_in_backward, training, _rates(training, values.learning_rate)["classes"]
        )
    if training.graph is not None:
        training.graph.advance(classifier.weight.detach(), training.step)
    data_wait_seconds = 0.0
    used: list[Batch] = []
    outputs: list[ClassifierOutput] = []
    strategy.begin()
    for micro in range(num_micro):
        before = time.monotonic()
        with part("data wait"):
            batch = next(batches)
        data_wait_seconds += time.monotonic() - before
        on_device = batch.to(training.world.device)
        with strategy.accumulate(is_last=micro == num_micro - 1):
            local = classifier.begin(on_device.labels)
            for images in on_device.images.chunk(training.config.train.gather_slices):
                with part("backbone forward"), autocast(training.config.train, training.world.device):
                    embeddings = strategy.model(prepared(images, training.config.train))
                local.add(embeddings)
            draw_id = training.step * num_micro + micro
            output = classifier.finish(local, draw_id=draw_id, values=values, monitor=monitor)
            with part("backbone backward"):
                strategy.backward(scaled(output.loss / num_micro, training.scaler))
        outputs.append(output)
        used.append(replace(batch, images=batch.images.new_empty(0)))
    before_update(used)
    is_loss_finite = training.config.optim.row_update == "deferred" or bool(torch.isfinite(outputs[0].loss))
    with part("update"):
        norm, is_taken, rates = _update(training, values.learning_rate, is_loss_finite)
    return StepResult(
        output=_mean(outputs),
        grad_norm=norm,
        is_taken=is_taken,
        learning_rates=rates,
        batches=used,
        data_wait_seconds=data_wait_seconds,
        step_seconds=time.monotonic() - start,
        head_cpu_seconds=classifier.cpu_seconds - before_head,
    )


def _rates(training: Training, rate_factor: float) -> dict[str, float]:
    """The learning rates of `backbone` and `classes` in this step; `rate_factor` is the loss's own course."""
    config = training.config
    factor = rate_factor * learning_rate_factor(config.optim, training.step, training.num_steps)
    backbone, classes = base_rates(config.optim, config.train.global_batch_size)
    return {"backbone": backbone * factor, "classes": classes * factor}


def _update_in_backward(
    training: Training, lr: float, blocks: Iterator[RowBlock], rows: Tensor | None, own: RowGradient
) -> None:
    """Row updates of the fused kind, called by the backward pass once the loss is known to be finite."""
    training.row_optimizer.step_in_backward(blocks, rows, own, lr, training.step)


def _update(training: Training, rate_factor: float, is_loss_finite: bool) -> tuple[Tensor, bool, dict[str, float]]:
    """Clip jointly and step both optimizers, or neither where the norm is not finite.

    The norm is the same number on every rank: what is replicated counts once, and the parts of the class rows and of a
    sharded backbone are summed over ranks. So every rank takes the same decision without asking. Reading it waits for
    the device; that also keeps the hosts of all ranks within one step of each other, which agreeing on a stop relies
    on.
    """
    config, strategy, classifier = training.config, training.strategy, training.classifier
    gradient = classifier.take_row_gradient()
    is_fused = config.optim.row_update == "fused"
    assert (gradient is None) == is_fused
    bias_gradient = classifier.take_bias_gradient()
    backbone = strategy.gradients()
    with part("norm"):
        norm = joint_norm(
            [*backbone.replicated, *([] if bias_gradient is None else [bias_gradient])],
            [*backbone.sharded, *([] if gradient is None else [gradient.values])],
            training.world.group,
        )
    rates = _rates(training, rate_factor)
    is_finite = bool(torch.isfinite(norm))
    if is_fused and is_loss_finite and not is_finite:
        raise NumericError(
            f"step {training.step + 1}: the backbone's gradient is not finite although the loss is, and with "
            "optim.row_update fused the class rows have moved already; go on from the last checkpoint with "
            "optim.row_update deferred, or lower optim.lr"
        )
    classifier.keep_state(is_finite)
    scale = 1.0 if training.scaler is None else training.scaler.scale
    if training.scaler is not None:
        training.scaler.record(is_finite)
    norm = norm / scale
    if not is_finite:
        strategy.skip()
        return norm, False, rates
    limit = config.optim.clip_norm
    # One factor for all gradients, those of the class rows and the bias too: it clips, and takes the loss's scale out.
    coefficient = clip_coefficient(norm, limit) / scale
    strategy.step(rates["backbone"], coefficient)
    if gradient is not None:
        with classifier.timed(), part("row update"):
            values = gradient.values
            if limit is not None or scale != 1.0:
                values.mul_(coefficient.to(values.dtype))
            training.row_optimizer.step(RowGradient(gradient.rows, values), rates["classes"], training.step)
    if training.bias_optimizer is not None and bias_gradient is not None:
        step = (bias_gradient * coefficient.to(bias_gradient.dtype)).view(1, 1)
        training.bias_optimizer.step(RowGradient(None, step), rates["classes"])
    if training.average is not None:
        training.average.update()
    return norm, True, rates


def _mean(outputs: list[ClassifierOutput]) -> ClassifierOutput:
    if len(outputs) == 1:
        return outputs[0]

    def mean(name: str) -> Tensor:
        return torch.stack([getattr(output, name).detach() for output in outputs]).mean()

    seen = [output.monitors for output in outputs if output.monitors is not None]
    monitors = None
    if seen:
        monitors = Monitors(
            **{row.name: torch.stack([getattr(one, row.name) for one in seen]).mean() for row in fields(Monitors)}
        )
    return ClassifierOutput(mean("loss"), mean("intra"), mean("inter"), mean("positive_cosine"), monitors)
