"""Every option of a run, as frozen models.

Plain data, and what combinations of it are impossible whatever the data set and the number of ranks; those that depend
on them are checked by `train.build` before anything is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, model_validator

from megaclass.config.dataset import Dataset
from megaclass.config.remote import DataLocation, remote_faults
from megaclass.config.sampling import sampling_faults
from megaclass.config.section import Section


class Backbone(Section):
    """The replicated network that makes embeddings."""

    name: str = Field("tiny", description="tiny, iresnet18/34/50/100/200, vit-tiny/small/base or mobilefacenet")
    dim: int = Field(128, ge=2, le=8192, description="width of the embedding")
    width: float = Field(1.0, gt=0, le=8, description="multiplier of the channel counts (tiny only)")
    batch_norm: Literal["local", "sync"] = Field("sync", description="batch statistics of one rank or of all")


class Course(Section):
    """How a hyper-parameter moves over the run."""

    shape: Literal["step", "linear", "cosine"] = Field("linear", description="what lies between two points")
    points: tuple[tuple[float, float], ...] = Field(description="[share of the run, value] pairs, shares rising")


class Schedule(Section):
    """Hyper-parameters of the loss that move over the run, each as `{shape: ..., points: [[share, value], ...]}`."""

    scale: Course | None = Field(None, description="course of classifier.scale")
    margin: Course | None = Field(None, description="course of classifier.margin")
    end_point: Course | None = Field(None, description="course of classifier.end_point")
    sampling_rate: Course | None = Field(None, description="course of classifier.sampling_rate")
    learning_rate: Course | None = Field(None, description="factor on the learning rates, beside optim.schedule")


class Classifier(Section):
    """The sharded class weights and their loss."""

    preset: str = Field("d-softmax", description="name of the loss: docs/losses.md lists them")
    objective: str | None = Field(None, description="exchange the preset's objective")
    margin_kind: str | None = Field(None, description="exchange the preset's margin")
    negative_map: str | None = Field(None, description="exchange the preset's map of the negative cosines")
    sampler: str | None = Field(
        None, description="exchange the preset's sampler: all, classes, partial-fc, batch, positives or hard"
    )
    scale: float | None = Field(None, gt=0, le=1024, description="multiplier of the cosines; default by preset")
    margin: float | None = Field(None, ge=0, description="size of the margin, in its own unit; default by preset")
    end_point: float | None = Field(
        None, gt=-1, le=2, description="cosine at which the intra term of a dissected loss lets go; default 0.9"
    )
    sampling_rate: float | None = Field(None, gt=0, le=1, description="share of classes (or of the batch) drawn")
    batch_positives: bool | None = Field(
        None, description="samplers classes and hard: also use the batch's own classes as negatives"
    )
    correction: Literal["none", "inverse-rate"] | None = Field(
        None, description="inverse-rate: drawn negatives count 1 / their probability of being drawn; default by preset"
    )
    draw: Literal["stratified", "uniform"] | None = Field(
        None, description="one class from each of equal ranges (default), or every subset of classes alike"
    )
    num_neighbours: int | None = Field(None, ge=1, le=1000, description="sampler hard: nearest classes of each class")
    rebuild_every: int | None = Field(None, ge=1, description="sampler hard: steps between two searches for them")
    neighbour_search: Literal["exact", "hnsw"] = Field("exact", description="sampler hard: how they are searched")
    hyper: dict[str, float] = Field({}, description="further hyper-parameters of the loss, by name: docs/losses.md")
    schedule: Schedule = Schedule()
    negative_filter: float | None = Field(
        None, gt=-1, lt=1, description="drop negatives with a cosine above this (noisy labels)"
    )
    sub_centres: int = Field(1, ge=1, le=64, description="rows of each class; the best one counts (noisy labels)")
    count_weight_power: float = Field(
        0.0, ge=0, le=2, description="samples count (their class's size)^-this; 1: every class alike"
    )
    count_margin_power: float = Field(
        0.0, ge=0, le=1, description="margins shrink as (class size / smallest)^-this; 0.25 is usual"
    )
    normalisation: Literal["l2", "batch-norm"] = Field(
        "l2", description="embeddings of unit length, or a last batch norm divided by sqrt(dim)"
    )
    kernel: Literal["auto", "reference", "chunked", "triton"] = Field(
        "auto", description="implementation of the class layer; triton: fused, CUDA only, never run on a GPU yet"
    )
    row_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="type of the stored class rows; bfloat16: half the memory, rounded stochastically"
    )
    row_memory: Literal["device", "host"] = Field(
        "device", description="where class rows and their optimizer state are kept; host: drawn rows visit the device"
    )


class Optim(Section):
    """Optimizers and the schedule of the learning rate."""

    name: Literal["sgd", "adamw"] = Field("sgd", description="optimizer of the backbone")
    class_name: Literal["sgd", "adamw", "adagrad"] = Field(
        "sgd", description="row-sparse optimizer of the class weights; adagrad keeps one number per row"
    )
    row_momentum_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="class_name sgd: type of the rows' momentum"
    )
    untouched_rows: Literal["lazy", "dense"] = Field(
        "lazy", description="class rows without a gradient stay as they are, or move on by momentum (all rows, slow)"
    )
    row_update: Literal["deferred", "fused"] = Field(
        "deferred", description="fused: the backward pass writes class rows block by block, without a gradient of them"
    )
    lr: float = Field(0.1, gt=0, description="learning rate at the reference batch size")
    class_lr: float | None = Field(None, gt=0, description="learning rate of the class weights; default: lr")
    reference_batch_size: int | None = Field(
        None, ge=1, description="if set, learning rates are multiplied by global batch size / this"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of sgd")
    weight_decay: float = Field(5e-4, ge=0, description="of backbone matrices; never of norms, biases or class rows")
    betas: tuple[float, float] = Field((0.9, 0.999), description="of adamw")
    clip_norm: float | None = Field(5.0, gt=0, description="largest joint gradient norm of backbone and class rows")
    schedule: Literal["constant", "cosine", "polynomial", "step"] = Field("cosine", description="after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps over which the rate rises linearly")
    final_fraction: float = Field(0.0, ge=0, le=1, description="cosine, polynomial: rate at the end, as a share")
    power: float = Field(2.0, gt=0, description="polynomial: exponent")
    milestones: tuple[float, ...] = Field((0.5, 0.75, 0.9), description="step: shares of the run where the rate drops")
    gamma: float = Field(0.1, gt=0, le=1, description="step: factor of each drop")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="moving average of the backbone, used to evaluate")


class Train(Section):
    """Length, batch and precision of the run."""

    steps: int | None = Field(None, ge=1, description="optimizer steps; give this or epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the data; give this or steps")
    global_batch_size: int = Field(256, ge=1, description="samples per step over all ranks and accumulation steps")
    accumulation_steps: int = Field(1, ge=1, description="micro-batches per step")
    seed: int = Field(0, ge=0, lt=2**63, description="of everything random")
    strategy: Literal["auto", "ddp"] = Field("auto", description="how the backbone is replicated")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    precision: Literal["float32", "bfloat16", "float64"] = Field(
        "float32", description="bfloat16: autocast of the backbone; float64: for comparisons"
    )
    checkpoint_every: int = Field(1000, ge=1, description="steps between checkpoints; the last step always has one")
    keep_checkpoints: int = Field(2, ge=2, description="newest checkpoints kept, beside the best one")
    non_finite_limit: int = Field(10, ge=1, description="skipped steps in a row that end the run (exit code 5)")


class Evaluate(Section):
    """Evaluation on classes never trained on, during and after training."""

    path: DataLocation | None = Field(None, description="data set folder or address; default: dataset.path")
    split: str = Field("unseen", description="its split")
    every: int | None = Field(None, ge=1, description="steps between evaluations; default: only at the end")
    protocols: tuple[Literal["verification", "identification", "retrieval", "one-shot"], ...] = Field(
        ("verification", "identification", "retrieval"), description="what is computed"
    )
    batch_size: int = Field(256, ge=1, description="images embedded at a time on each rank")
    gallery_source: str | None = Field(None, description="identification: source (typeface, ...) that is the gallery")
    best_metric: str = Field("retrieval.recall_at_1", description="the checkpoint that is best in this one is kept")
    baselines: bool = Field(False, description="at the end also judge raw pixels and the untrained backbone")


class Observe(Section):
    """What a run shows while it runs."""

    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="first Prometheus port; rank r listens on port + local rank; 0 takes a free one",
    )
    metrics_host: str = Field("127.0.0.1", description="address the metrics are served on")


class Run(Section):
    """The run directory and what is written there."""

    dir: Path = Field(Path("runs/default"), description="run directory; training again with it continues the run")
    log_every: int = Field(20, ge=1, description="steps between lines of metrics.jsonl and the progress line")
    log_sample_ids: bool = Field(False, description="write the ids of every batch to samples/")
    hang_seconds: float = Field(
        300.0, gt=0, description="a step or a collective that takes longer ends the run (exit 6)"
    )


class Config(Section):
    """The whole configuration of a run."""

    dataset: Dataset = Dataset()
    backbone: Backbone = Backbone()
    classifier: Classifier = Classifier()
    optim: Optim = Optim()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    observe: Observe = Observe()
    run: Run = Run()

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        """All impossible combinations that need no data set and no rank count, reported together."""
        faults = []
        train = self.train
        if (train.steps is None) == (train.epochs is None):
            faults.append("train: give exactly one of train.steps and train.epochs")
        if self.dataset.reader != "synthetic" and self.dataset.path is None:
            faults.append(
                "dataset.path is required; make a data set with `megaclass data glyphs --out data/glyphs` and give "
                "dataset.path: data/glyphs"
            )
        faults += remote_faults(self.dataset, self.evaluate.path, self.run.hang_seconds)
        faults += sampling_faults(self.dataset, train.global_batch_size, train.accumulation_steps)
        synthetic = self.dataset.synthetic
        if synthetic.num_populated is not None and synthetic.num_populated > synthetic.num_classes:
            faults.append(
                f"dataset.synthetic.num_populated {synthetic.num_populated} exceeds dataset.synthetic.num_classes "
                f"{synthetic.num_classes}; give at most that many"
            )
        if train.global_batch_size % train.accumulation_steps:
            faults.append(
                f"train.global_batch_size {train.global_batch_size} does not divide by train.accumulation_steps "
                f"{train.accumulation_steps}; choose a multiple"
            )
        if train.steps is not None and self.optim.warmup_steps >= train.steps:
            faults.append(
                f"optim.warmup_steps {self.optim.warmup_steps} leaves nothing of train.steps {train.steps}; lower it"
            )
        if any(not 0 < share < 1 for share in self.optim.milestones):
            faults.append(
                f"optim.milestones {self.optim.milestones}: each must lie between 0 and 1 (shares of the run)"
            )
        if any(not 0 <= beta < 1 for beta in self.optim.betas):
            faults.append(f"optim.betas {self.optim.betas}: each must lie in [0, 1)")
        faults += self.dataset.augment.channel_faults(self.dataset.channels) + self._row_faults()
        wanted = self.evaluate.best_metric.split(".")[0].replace("_", "-")
        if self.evaluate.every is not None and wanted not in self.evaluate.protocols:
            faults.append(
                f"evaluate.best_metric {self.evaluate.best_metric!r} is not made by evaluate.protocols "
                f"({', '.join(self.evaluate.protocols)}); add {wanted!r} or choose another metric"
            )
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _row_faults(self) -> list[str]:
        """What the optimizer of the class rows cannot do."""
        optim, faults = self.optim, []
        if optim.row_momentum_dtype != "float32" and (optim.class_name != "sgd" or not optim.momentum):
            faults.append(
                f"optim.row_momentum_dtype {optim.row_momentum_dtype} is for optim.class_name sgd with momentum; leave "
                "it out"
            )
        if self.train.precision == "float64" and "bfloat16" in (self.classifier.row_dtype, optim.row_momentum_dtype):
            faults.append("train.precision float64 keeps class rows and momentum in float64; take bfloat16 out")
        if self.classifier.row_memory == "host" and optim.untouched_rows == "dense":
            faults.append(
                "classifier.row_memory host brings only rows that have a gradient to the device; use "
                "optim.untouched_rows lazy or row_memory device"
            )
        if optim.row_update == "fused":
            if optim.clip_norm is not None:
                faults.append(
                    f"optim.row_update fused writes class rows before their norm is known, so optim.clip_norm "
                    f"{optim.clip_norm} cannot hold for them; use optim.clip_norm null or optim.row_update deferred"
                )
            if self.train.accumulation_steps > 1:
                faults.append(
                    f"optim.row_update fused writes class rows after every micro-batch, and "
                    f"train.accumulation_steps is {self.train.accumulation_steps}; use 1 or optim.row_update deferred"
                )
            if optim.untouched_rows == "dense":
                faults.append(
                    "optim.row_update fused sees only rows that have a gradient; use optim.untouched_rows lazy or "
                    "optim.row_update deferred"
                )
        return faults

    def to_yaml(self) -> str:
        """The configuration as YAML that `load` reads back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
