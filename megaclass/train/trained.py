"""What a trained run is used for: judging it on a data set, and embedding images with it.

Separate from training because here one process reads a finished run; the class weights are not needed and not loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from megaclass import checkpoint
from megaclass.config import Config
from megaclass.data.address import Location
from megaclass.data.folder import open_folder
from megaclass.data.manifest import load_split
from megaclass.errors import CheckpointError, ConfigError
from megaclass.evaluate.folder import embed_folder
from megaclass.evaluate.split import evaluate_backbone, evaluate_baselines, open_evaluation, usual_protocols
from megaclass.parallel.process import World, choose_device
from megaclass.train import build, state
from megaclass.train.precision import set_tf32
from megaclass.train.strategy import load_module


def load_backbone(run_dir: Path, path: Path | None, device: str) -> tuple[Config, nn.Module, World]:
    """The backbone of a run's checkpoint (by default the newest complete one), in evaluation mode, with its options.

    Raises:
        CheckpointError: no usable checkpoint.
    """
    if path is None:
        if not Path(run_dir).is_dir():
            raise ConfigError(f"run directory {run_dir} does not exist; give the run.dir of a training run")
        path = checkpoint.find_latest(Path(run_dir) / "checkpoints")
        if path is None:
            raise CheckpointError(f"run directory {run_dir} has no checkpoint; train it first")
    snapshot = checkpoint.load_replicated(path)
    try:
        config = Config.model_validate(snapshot.config)
    except ValidationError as error:
        raise CheckpointError(
            f"checkpoint {path} holds a configuration this version does not know: {error.errors()[0]['msg']}"
        ) from None
    world = World(0, 1, 0, choose_device(device, 0), None, None)
    if world.device.type == "cuda":
        # As in training; on a CPU there is no TF32 to have.
        set_tf32(config.train, world.device)
    backbone = build.build_backbone(config, world)
    load_module(backbone, state.backbone_tensors(snapshot))
    return config, backbone.eval(), world


def judge_run(
    run_dir: Path,
    *,
    data: Location | None,
    split: str | None,
    protocols: list[str] | None,
    gallery_source: str | None,
    checkpoint: Path | None,
    batch_size: int,
    baselines: bool,
    device: str,
) -> dict[str, Any]:
    """Evaluations of a trained run on a split: `trained`, and with `baselines` also `untrained` and `pixels`.

    Raises:
        CheckpointError, DataError, ConfigError: what is asked for is not there.
    """
    config, backbone, world = load_backbone(run_dir, checkpoint, device)
    folder = data or config.evaluate.path or config.dataset.path
    if folder is None:
        raise ConfigError("the run was trained without a data set on disk; say which to judge it on with --data DIR")
    manifest = open_folder(folder, config.dataset.remote).manifest
    if split is None:
        split = "unseen" if "unseen" in manifest.splits else next(iter(manifest.splits))
    usual = usual_protocols(load_split(folder, manifest, split), config.evaluate.protocols)
    changed = {
        "path": folder,
        "split": split,
        "batch_size": batch_size,
        "protocols": tuple(dict.fromkeys(protocols or usual)),
        # The run's own gallery belongs to its own data set.
        "gallery_source": gallery_source or (config.evaluate.gallery_source if data is None else None),
    }
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update=changed)})
    evaluation = open_evaluation(config)
    assert evaluation is not None
    results = {"trained": evaluate_backbone(evaluation, backbone, world, "trained")}
    if baselines:
        results |= evaluate_baselines(evaluation, lambda: build.build_backbone(config, world), world, "baselines")
    return results


def embed_images_of_run(
    run_dir: Path, images: Path, output: Path, *, checkpoint: Path | None, batch_size: int, device: str
) -> int:
    """Write the embeddings of a folder's images as `.npz`; returns how many."""
    config, backbone, world = load_backbone(run_dir, checkpoint, device)
    dataset = config.dataset
    return embed_folder(backbone, images, output, dataset.image_size, dataset.channels, batch_size, world.device)
