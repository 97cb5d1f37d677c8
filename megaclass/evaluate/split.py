"""A split to evaluate on, opened once, and the judgement of a backbone on it over all ranks.

Separate from the protocols (pure) and from `embed` (any batches): this file knows data sets. It is opened before
training starts, so that a missing split is found at once and not after hours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from megaclass.config import Config
from megaclass.data.folder import DataFolder, files_of, open_folder
from megaclass.data.manifest import SplitInfo, load_class_names, load_index, load_pairs, load_split
from megaclass.data.samples import iterate_split
from megaclass.errors import ConfigError, DataError
from megaclass.evaluate.baselines import embed_baselines
from megaclass.evaluate.embed import EmbeddedSplit, LabelledImages, embed_split, score_on_main
from megaclass.evaluate.judge import judge, source_number
from megaclass.parallel.process import World

# Of a split with given pairs.
PROTOCOLS_OF_PAIRS = ("verification",)


def usual_protocols(split: SplitInfo, protocols: tuple[str, ...]) -> tuple[str, ...]:
    """What a split is judged by where nothing is asked for: `protocols`, or verification alone where it gives pairs."""
    return protocols if split.pairs is None else PROTOCOLS_OF_PAIRS


@dataclass(frozen=True)
class EvaluationSet:
    """One split with what the protocols need to know of it beside the images.

    Attributes:
        files, split: where it is.
        sources: [num_samples] int64, number of each sample's source, in the split's order.
        groups: name of each class's group, or None.
        gallery_source: number of the source that is the gallery, or None.
        pairs: the pairs that verification compares, or None where they are drawn by label.
    """

    files: DataFolder
    split: str
    sources: np.ndarray
    groups: list[str] | None
    gallery_source: int | None
    pairs: np.ndarray | None
    config: Config

    def batches(self, world: World) -> Iterator[LabelledImages]:
        """This rank's part of the split, from the start; behind an address all of its files are held meanwhile."""
        dataset, evaluate = self.config.dataset, self.config.evaluate
        with self.files.hold(*files_of(self.files.manifest.splits[self.split])):
            yield from iterate_split(
                self.files.folder, self.split, rank=world.rank, world_size=world.size, batch_size=evaluate.batch_size,
                image_size=dataset.image_size, channels=dataset.channels,
            )  # fmt: skip

    def score(self, embedded: EmbeddedSplit) -> dict[str, Any]:
        """All protocols of the configuration on these embeddings; on one rank."""
        sources = self.sources[embedded.ids.numpy()]
        protocols = self.config.evaluate.protocols
        return judge(
            embedded.embeddings, embedded.labels, sources, self.groups, protocols, self.gallery_source, self.pairs
        )


def open_evaluation(config: Config) -> EvaluationSet | None:
    """The split named by the `evaluate` section; None if nothing is to be evaluated.

    A synthetic run without `evaluate.path` has nothing to evaluate on. A data set without the split is an error only
    where evaluating was asked for (`evaluate.path` or `evaluate.every`).

    Raises:
        DataError: no such data set or split, or it is empty.
        ConfigError: the gallery's source does not exist, or of a split with given pairs more than these is asked.
    """
    evaluate = config.evaluate
    folder = evaluate.path or (None if config.dataset.reader == "synthetic" else config.dataset.path)
    if folder is None or not evaluate.protocols:
        return None
    files = open_folder(folder, config.dataset.remote)
    if evaluate.split not in files.manifest.splits and evaluate.path is None and evaluate.every is None:
        return None
    split = load_split(folder, files.manifest, evaluate.split)
    if split.num_samples == 0:
        raise DataError(f"split {evaluate.split!r} of {folder} has no samples; make the data set with unseen classes")
    if split.pairs is not None and evaluate.protocols != PROTOCOLS_OF_PAIRS:
        raise ConfigError(
            f"split {evaluate.split!r} of {folder} has given pairs, and of its images nothing else is known: "
            f"evaluate.protocols is {', '.join(evaluate.protocols)}; give verification alone, and an "
            "evaluate.best_metric of it"
        )
    with files.hold(
        split.classes, *([] if split.pairs is None else [split.pairs]), *(shard.index for shard in split.shards)
    ):
        records, _ = load_index(files.folder, evaluate.split, split)
        groups = load_class_names(files.folder, split).groups
        pairs = load_pairs(files.folder, split)
    return EvaluationSet(
        files=files,
        split=evaluate.split,
        sources=records["source"].astype(np.int64),
        groups=groups,
        gallery_source=source_number(split.sources, evaluate.gallery_source),
        pairs=pairs,
        config=config,
    )


def evaluate_backbone(evaluation: EvaluationSet, backbone: nn.Module, world: World, key: str) -> dict[str, Any]:
    """The outcome of every protocol for this backbone, the same on every rank; `key` is used once in a world."""
    config = evaluation.config
    embedded = embed_split(backbone, evaluation.batches(world), world, world.device, config.backbone.dim)
    made: dict[str, Any] = score_on_main(world, key, lambda: evaluation.score(embedded))
    return made


def evaluate_baselines(
    evaluation: EvaluationSet, build: Callable[[], nn.Module], world: World, key: str
) -> dict[str, dict[str, Any]]:
    """The same for the untrained backbone that `build` makes and for raw pixels: `untrained` and `pixels`."""
    config = evaluation.config
    embedded = embed_baselines(
        build, lambda: evaluation.batches(world), world, world.device, dim=config.backbone.dim,
        image_size=config.dataset.image_size, channels=config.dataset.channels,
    )  # fmt: skip
    made: dict[str, dict[str, Any]] = score_on_main(
        world, key, lambda: {name: evaluation.score(split) for name, split in embedded.items()}
    )
    return made
