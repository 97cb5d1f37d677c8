"""The class weights of a checkpoint: unit vectors, any range, whoever wrote them, and never of a damaged file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megaclass.checkpoint import save
from megaclass.checkpoint.class_rows import CLASS_WEIGHT, CheckpointRows
from megaclass.checkpoint.snapshot import Snapshot
from megaclass.errors import CheckpointError, NumericError
from megaclass.parallel.process import World
from megaclass.parallel.shard import ClassShard
from tests.support.checkpoints import make_worlds, on_threads

CPU = torch.device("cpu")
NUM_CLASSES, DIM = 13, 7


def class_weights(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype) * 5


def write(folder: Path, weight: Tensor, world_size: int = 1, name: str = CLASS_WEIGHT) -> Path:
    """A checkpoint whose class weights, [classes, ...], are cut over so many ranks."""

    def run(world: World) -> Path:
        shard = ClassShard(len(weight), world.rank, world.size)
        rows = weight[shard.start : shard.stop].clone()
        snapshot = Snapshot(
            7,
            0,
            1,
            {"backbone/x": torch.ones(2)},
            {name: rows, "class_optimizer/momentum": rows * 0},
            len(weight),
            {},
            {},
        )
        return save(folder, snapshot, shard, world, keep=2, timeout_seconds=20)

    results = on_threads(make_worlds(world_size), run)
    assert all(isinstance(result, Path) for result in results), results
    return results[0]


# 13 classes over 4 ranks are 4, 4, 4, 1; over 8 ranks the last is empty.
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_any_range_of_classes_is_read_as_unit_vectors(tmp_path: Path, world_size: int) -> None:
    weight = class_weights(NUM_CLASSES, DIM)
    expected = nn.functional.normalize(weight, dim=1)
    with CheckpointRows(write(tmp_path, weight, world_size), CPU) as rows:
        assert (rows.num_classes, rows.rows_per_class, rows.step) == (NUM_CLASSES, 1, 7)
        for start in range(NUM_CLASSES):
            for stop in range(start, NUM_CLASSES + 1):
                assert torch.equal(rows.read(start, stop), expected[start:stop])


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_sub_centres_lie_next_to_each_other(tmp_path: Path, world_size: int) -> None:
    weight = class_weights(NUM_CLASSES, 3, DIM)
    expected = nn.functional.normalize(weight, dim=2)
    with CheckpointRows(write(tmp_path, weight, world_size), CPU) as rows:
        assert (rows.num_classes, rows.rows_per_class) == (NUM_CLASSES, 3)
        assert torch.equal(rows.read(2, 11), expected[2:11].flatten(0, 1))
        assert rows.read(4, 4).shape == (0, DIM)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_rows_of_any_type_come_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = class_weights(NUM_CLASSES, DIM, dtype=dtype)
    with CheckpointRows(write(tmp_path, weight), CPU) as rows:
        found = rows.read(0, NUM_CLASSES)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, nn.functional.normalize(weight.float(), dim=1), rtol=0, atol=1e-6)


def test_a_class_weight_of_no_length_is_near_nothing(tmp_path: Path) -> None:
    weight = class_weights(NUM_CLASSES, DIM)
    weight[5] = 0
    with CheckpointRows(write(tmp_path, weight), CPU) as rows:
        assert not rows.read(5, 6).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_end_a_report(tmp_path: Path, value: float) -> None:
    weight = class_weights(NUM_CLASSES, DIM)
    weight[5, 2] = value
    path = write(tmp_path, weight)
    with CheckpointRows(path, CPU) as rows:
        assert rows.read(0, 5).shape == (5, DIM)
        with pytest.raises(NumericError) as caught:
            rows.read(4, 9)
    assert str(caught.value) == f"checkpoint {path}: class weights among 4 to 9 are not finite"


def test_every_damaged_file_is_named_before_a_row_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, class_weights(NUM_CLASSES, DIM), 3)
    first, second, third = (path / f"classes-{rank:05d}-of-00003.safetensors" for rank in range(3))
    for file in (first, third):
        raw = bytearray(file.read_bytes())
        raw[-3] ^= 8
        file.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught, CheckpointRows(path, CPU):
        pass
    damage = "is damaged: its SHA-256 is not the one written"
    assert str(caught.value) == (
        f"checkpoint {path}: {first.name} {damage}; {third.name} {damage}; choose another checkpoint of the run"
    )
    second.unlink()
    with pytest.raises(CheckpointError, match=rf"{second.name} is missing"), CheckpointRows(path, CPU):
        pass


@pytest.mark.parametrize("shape", [(NUM_CLASSES,), (NUM_CLASSES, 2, 3, 4), (NUM_CLASSES, 0, 4)])
def test_class_weights_of_another_form_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = write(tmp_path, class_weights(*shape))
    with pytest.raises(CheckpointError) as caught:
        CheckpointRows(path, CPU)
    assert str(caught.value) == (
        f"checkpoint {path}: class_weight has shape {list(shape)}, expected [classes, dim] or [classes, sub-centres, "
        "dim]; choose another checkpoint of the run"
    )


def test_a_checkpoint_without_class_weights_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, class_weights(NUM_CLASSES, DIM), name="other")
    with pytest.raises(CheckpointError, match="class_weight has shape None, expected"):
        CheckpointRows(path, CPU)
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing; give the folder of one checkpoint"):
        CheckpointRows(tmp_path, CPU)
