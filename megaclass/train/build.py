"""Makes every object of a run from its configuration: the only file that knows all the parts."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn

from megaclass import backbones, loss
from megaclass.backbones.block import recompute_blocks
from megaclass.classifier import ShardedClassifier
from megaclass.config import Config
from megaclass.data.batch import Reader
from megaclass.data.open import open_reader
from megaclass.errors import ConfigError
from megaclass.host_rows import HostRows
from megaclass.neighbours import NeighbourGraph
from megaclass.objectives import presets
from megaclass.optim import backbone as backbone_optimizer
from megaclass.optim import rowwise
from megaclass.optim.hosted import HostedRowOptimizer
from megaclass.optim.rowwise import RowOptimizer
from megaclass.optim.schedule import base_rates
from megaclass.parallel.process import World
from megaclass.parallel.shard import ClassShard
from megaclass.row_stream import RowStream
from megaclass.sampling.samplers import FEW_ROWS, Graph
from megaclass.train import precision
from megaclass.train.compiled import check_compiler, compile_backbone
from megaclass.train.ddp import DDPStrategy
from megaclass.train.deepspeed_settings import settings
from megaclass.train.loop import Training
from megaclass.train.strategy import Strategy


def check_batch(config: Config, world_size: int) -> None:
    """Refuse a global batch that does not divide by ranks x accumulation steps, before anything is loaded.

    Raises:
        ConfigError: with the nearest sizes that do.
    """
    train = config.train
    unit = world_size * train.accumulation_steps * train.gather_slices
    if train.global_batch_size % unit:
        below, above = train.global_batch_size // unit * unit, -(-train.global_batch_size // unit) * unit
        near = f"{above}" if not below else f"{below} or {above}"
        slices = f" x {train.gather_slices} slices" if train.gather_slices > 1 else ""
        raise ConfigError(
            f"train.global_batch_size {train.global_batch_size} does not divide by {world_size} ranks x "
            f"{train.accumulation_steps} accumulation steps{slices} = {unit}; use {near}"
        )
    # Every backbone ends in a batch norm, which cannot be trained on one value.
    is_local = config.backbone.batch_norm == "local"
    seen = train.global_batch_size // (unit if is_local else train.accumulation_steps)
    if seen < 2:
        raise ConfigError(
            f"train.global_batch_size {train.global_batch_size} leaves batch norm ({config.backbone.batch_norm}) one "
            f"sample at a time on {world_size} ranks with {train.accumulation_steps} accumulation steps and "
            f"{train.gather_slices} slices; at least 2 are needed"
        )


def build(config: Config, world: World) -> Training:
    """All parts of a run, at step 0.

    Raises:
        ConfigError, DataError: an option or the data set cannot be used.
    """
    check_batch(config, world.size)
    precision.set_tf32(config.train, world.device)
    if config.train.compile:
        check_compiler(world.device)
    reader = build_reader(config, world)
    strategy = build_strategy(config, world, build_backbone(config, world).to(dtype=backbone_dtype(config)))
    classifier, graph = build_classifier(config, world, reader, strategy.grad_divisor)
    decay = config.optim.ema_decay
    num_steps = number_of_steps(config, reader)
    if config.optim.warmup_steps >= num_steps:
        raise ConfigError(
            f"optim.warmup_steps {config.optim.warmup_steps} leaves nothing of the {num_steps} steps that "
            f"train.epochs {config.train.epochs} makes; lower it"
        )
    return Training(
        config=config,
        world=world,
        reader=reader,
        strategy=strategy,
        classifier=classifier,
        row_optimizer=build_row_optimizer(config, classifier),
        bias_optimizer=None
        if classifier.bias is None
        else rowwise.build(config.optim.class_name, classifier.bias.detach().view(1, 1), config.optim),
        graph=graph,
        average=None if decay is None else strategy.average(decay),
        scaler=precision.build_scaler(config.train),
        num_steps=num_steps,
    )


def build_strategy(config: Config, world: World, backbone: nn.Module) -> Strategy:
    """What `train.strategy` names around the backbone, with its optimizer; `auto` is DDP.

    On one rank there is nothing to cut, and `fsdp` is the plain backbone too.
    """
    train = config.train
    rate, _ = base_rates(config.optim, train.global_batch_size)
    make_optimizer = partial(backbone_optimizer.build, optim=config.optim, lr=rate)
    if train.channels_last:
        backbone = backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if train.activation_checkpointing:
        recompute_blocks(backbone)

    def another() -> nn.Module:
        return build_backbone(config, world).to(dtype=backbone_dtype(config))

    if train.strategy == "deepspeed":
        from megaclass.train.deepspeed import DeepSpeedStrategy

        autocast = partial(precision.autocast, train, world.device)
        return DeepSpeedStrategy(
            backbone, make_optimizer(backbone), another, autocast, settings(config, world.size), world
        )
    if train.strategy == "fsdp" and world.size > 1:
        from megaclass.train.fsdp import FSDPStrategy  # its imports take seconds

        return FSDPStrategy(
            backbone,
            make_optimizer,
            another,
            world,
            reshard_after_forward=train.fsdp_reshard,
            gathered=torch.bfloat16 if train.fsdp_gather == "bfloat16" else None,
        )
    forward = backbone
    if train.compile:
        batch = train.global_batch_size // (world.size * train.accumulation_steps)
        shape = (batch, config.dataset.channels, config.dataset.image_size, config.dataset.image_size)
        images = precision.prepared(torch.zeros(shape, device=world.device), train)
        forward = compile_backbone(backbone, images, precision.autocast(train, world.device))
    return DDPStrategy(backbone, make_optimizer(backbone), world, forward)


def build_reader(config: Config, world: World) -> Reader:
    """The reader of this rank's part of the data."""
    train = config.train
    return open_reader(
        config.dataset,
        batch_size=train.global_batch_size // (world.size * train.accumulation_steps),
        rank=world.rank,
        world_size=world.size,
        accumulation_steps=train.accumulation_steps,
        seed=train.seed,
        device=world.device,
    )


def build_backbone(config: Config, world: World) -> nn.Module:
    """The untrained backbone on this rank's device: the same on every rank, as its weights come from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        backbone = backbones.build(
            config.backbone.name,
            dim=config.backbone.dim,
            image_size=config.dataset.image_size,
            channels=config.dataset.channels,
            batch_norm=config.backbone.batch_norm,
            group=world.group,
            width=config.backbone.width,
        )
    return backbone.to(world.device)


def build_classifier(
    config: Config, world: World, reader: Reader, grad_divisor: int
) -> tuple[ShardedClassifier, NeighbourGraph | None]:
    """This rank's shard of the class weights with the loss of the preset, and the graph of the sampler `hard`."""
    preset = resolve_preset(config)
    check_row_memory(config, preset)
    check_slices(config, preset)
    shard = ClassShard(reader.num_classes, world.rank, world.size)
    graph = build_graph(config, preset, shard, world)
    own_loss = build_loss(config, preset, reader.num_classes, graph)
    if config.classifier.kernel == "triton":
        check_fused(config, own_loss, world.device)
    if config.train.row_stream and world.device.type != "cuda":
        raise ConfigError(
            f"train.row_stream is for CUDA, and this run is on {world.device}, whose cores the backbone has already; "
            "leave it out"
        )
    classifier = ShardedClassifier(
        config.backbone.dim,
        shard,
        own_loss,
        seed=config.train.seed,
        group=world.group,
        grad_divisor=grad_divisor,
        kernel=config.classifier.kernel,
        balance=loss.balance(
            reader.class_counts,
            shard,
            weight_power=config.classifier.count_weight_power,
            margin_power=config.classifier.count_margin_power,
        ),
        dtype=row_dtype(config),
        device=world.device,
        on_host=config.classifier.row_memory == "host",
    )
    if config.train.row_stream:
        classifier.row_stream = RowStream(world.device)
    return classifier, graph


def build_row_optimizer(config: Config, classifier: ShardedClassifier) -> RowOptimizer | HostedRowOptimizer:
    """The optimizer of this rank's class rows; for rows in the host's memory with what brings them to the device."""
    per_class = classifier.loss.rows_per_class
    weight = classifier.weight.detach()
    optimizer = rowwise.build(
        config.optim.class_name,
        weight,
        config.optim,
        seed=config.train.seed,
        first_row=classifier.shard.start * per_class,
    )
    if config.classifier.row_memory == "device":
        return optimizer
    classifier.host_rows = HostRows({"weight": weight, **optimizer.state}, per_class, classifier.device)
    return HostedRowOptimizer(optimizer, classifier.host_rows)


def check_row_memory(config: Config, preset: presets.Preset) -> None:
    """Refuse rows in the host's memory for a loss that needs all of them on the device in every step.

    Raises:
        ConfigError: with the samplers that go with it.
    """
    if config.classifier.row_memory == "host" and preset.sampler not in FEW_ROWS:
        needs = "searches all rows for neighbours" if preset.sampler == "hard" else "needs all rows in every step"
        raise ConfigError(
            f"classifier.row_memory host: the sampler {preset.sampler!r} {needs}; use one of "
            f"{', '.join(FEW_ROWS)} (presets d-softmax-k, partial-fc, ...), or row_memory device"
        )


def check_slices(config: Config, preset: presets.Preset) -> None:
    """Refuse to gather in slices what is sent to some shards only, once the draw is known.

    Raises:
        ConfigError: with what to do.
    """
    if config.train.gather_slices > 1 and preset.sampler == "batch":
        raise ConfigError(
            f"train.gather_slices {config.train.gather_slices}: the sampler 'batch' (d-softmax-b) sends most "
            "embeddings to the owners of their classes alone, after the draw; use gather_slices 1"
        )


def check_fused(config: Config, own_loss: loss.Loss, device: torch.device) -> None:
    """Refuse a run that the fused kernels do not cover; they would refuse its first step.

    Raises:
        ConfigError: with what it is.
    """
    faults = [
        text
        for is_fault, text in (
            (device.type != "cuda", f"needs a CUDA device, and this run is on {device.type}"),
            (config.train.precision == "float64", "computes in float32, and train.precision is float64"),
            (
                own_loss.rows_per_class > 1,
                f"has no sub-centres, and classifier.sub_centres is {own_loss.rows_per_class}",
            ),
            (
                config.backbone.dim > 1024,
                f"takes embeddings of up to 1024 numbers, and backbone.dim is {config.backbone.dim}",
            ),
            (
                not own_loss.objective.is_exponential,
                f"has no sums of per-class terms, as {own_loss.preset.objective!r} is",
            ),
            (own_loss.use_maximum, "has no maxima, which exponents beyond float32 need; lower classifier.scale"),
            (
                own_loss.preset.negative_map not in ("identity", "quadratic"),
                f"knows no negative map {own_loss.preset.negative_map!r}",
            ),
        )
        if is_fault
    ]
    if faults:
        raise ConfigError("\n".join(f"classifier.kernel triton {fault}; use auto or chunked" for fault in faults))


def build_graph(config: Config, preset: presets.Preset, shard: ClassShard, world: World) -> NeighbourGraph | None:
    """The nearest-class graph of the sampler `hard`; None for any other sampler."""
    if preset.sampler != "hard":
        return None
    assert preset.num_neighbours is not None
    assert preset.rebuild_every is not None
    return NeighbourGraph(
        shard,
        preset.num_neighbours,
        rebuild_every=preset.rebuild_every,
        # Half the interval is time enough for the search; after it the neighbours are from half an interval ago.
        lag=preset.rebuild_every // 2,
        search=config.classifier.neighbour_search,
        group=world.group,
        rows_per_class=config.classifier.sub_centres,
        device=world.device,
    )


def resolve_preset(config: Config) -> presets.Preset:
    """The preset of a configuration with its options put in.

    Raises:
        ConfigError: an unknown name, an option that does not apply, or a combination without sense.
    """
    options = config.classifier
    moving = {
        name: (course.shape, course.points)
        for name in type(options.schedule).model_fields
        if (course := getattr(options.schedule, name)) is not None
    }
    names = (
        "objective", "margin_kind", "negative_map", "sampler", "scale", "margin", "end_point", "sampling_rate",
        "batch_positives", "correction", "draw", "num_neighbours", "rebuild_every",
    )  # fmt: skip
    given = {name: getattr(options, name) for name in names}
    preset = presets.resolve(options.preset, hyper=options.hyper, schedule=moving, **given)
    if options.count_margin_power and preset.margin is None:
        raise ConfigError(
            f"classifier.count_margin_power {options.count_margin_power} means nothing without a margin; choose a "
            "margin_kind or leave it out"
        )
    return preset


def build_loss(config: Config, preset: presets.Preset, num_classes: int, graph: Graph | None) -> loss.Loss:
    """The loss of a resolved preset with the options that every loss has."""
    options = config.classifier
    return loss.build(
        preset,
        num_classes,
        seed=config.train.seed,
        negative_filter=options.negative_filter,
        rows_per_class=options.sub_centres,
        normalisation=options.normalisation,
        graph=graph,
    )


def backbone_dtype(config: Config) -> torch.dtype:
    """The type the backbone's parameters are kept in."""
    return precision.image_dtype(config.train)


def row_dtype(config: Config) -> torch.dtype:
    """The type the class rows are kept in."""
    return torch.bfloat16 if config.classifier.row_dtype == "bfloat16" else backbone_dtype(config)


def number_of_steps(config: Config, reader: Reader) -> int:
    """Steps of the whole run: as given, or the epochs' samples over the global batch, rounded up."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    return max(1, math.ceil(config.train.epochs * reader.num_samples / config.train.global_batch_size))
