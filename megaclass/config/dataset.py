"""The options of `dataset`: where the training samples come from, in which order, and what is done to them.

Separate because what one reader can do and another cannot is checked beside the options that it is about.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from megaclass.config.augment import Augment, beyond_dali
from megaclass.config.remote import DataLocation, Remote
from megaclass.config.sampling import STREAMING
from megaclass.config.section import Section

# What a reader cannot do: option -> reader -> why not, and what to do instead.
_BEYOND: dict[str, dict[str, str]] = {
    "num_classes": {
        "stream": "dataset.reader stream reads whole shards; use indexed",
        "dali-stream": "dataset.reader dali-stream reads whole shards; use dali or indexed",
        "synthetic": "dataset.reader synthetic makes as many classes as dataset.synthetic.num_classes; give that",
    },
    "shuffle_window": {
        "stream": "dataset.reader stream mixes shards through dataset.shuffle_buffer; give that, or use indexed",
        "dali-stream": "dataset.reader dali-stream mixes through dataset.shuffle_buffer; give that, or use dali",
        "synthetic": "dataset.reader synthetic has no shards",
    },
    "shuffle_buffer": dict.fromkeys(
        ("indexed", "dali", "synthetic"), "only dataset.reader stream and dali-stream have a buffer; leave it out"
    ),
    "label_noise": {name: f"dataset.reader {name} knows the true labels only; use indexed" for name in STREAMING},
    "on_bad_sample": {"dali-stream": "dataset.reader dali-stream has no substitutes; use stop, or reader dali"},
}


class Synthetic(Section):
    """The made-up data set of `dataset.reader: synthetic`: one random pattern per class plus noise."""

    num_classes: int = Field(1000, ge=1, description="classes")
    samples_per_class: int = Field(8, ge=1, description="samples of each class that has any")
    num_populated: int | None = Field(
        None, ge=1, description="classes that have samples, evenly spread over all; default: all"
    )
    noise: float = Field(0.5, ge=0, description="standard deviation of the noise; the patterns have 1")


class Dataset(Section):
    """Where the training samples come from."""

    path: DataLocation | None = Field(
        None,
        description="folder with a dataset.json, or stream: http(s)://, s3://, gs:// (not for the synthetic reader)",
    )
    split: str = Field("train", description="split of that data set to train on")
    reader: Literal["indexed", "dali", "stream", "dali-stream", "synthetic"] = Field(
        "indexed",
        description="indexed: exact order and position; dali: the same, decoded by NVIDIA DALI on the run's device; "
        "stream: shard by shard, shuffled by webdataset; dali-stream: all of it by DALI",
    )
    shuffle_window: int | None = Field(
        None, ge=1, description="indexed, dali: shuffle within this many shards at a time; default: over all samples"
    )
    class_balance: float = Field(
        0.0, ge=0, le=1, description="classes of n samples are visited in proportion to n^(1 - this); 1: all alike"
    )
    samples_per_class: int | None = Field(
        None, ge=1, description="micro-batches, over all ranks, of distinct classes with this many samples each"
    )
    repeats: int = Field(
        1, ge=1, description="copies of a sample in a micro-batch, over all ranks, changed differently"
    )
    num_classes: int | None = Field(
        None, ge=1, description="indexed, dali: train on this many classes of the split only; subsets are nested"
    )
    label_noise: float = Field(
        0.0, ge=0, lt=1, description="all but stream: share of training samples given another class's label"
    )
    image_size: int = Field(32, ge=8, le=1024, description="images are resized to this many pixels a side")
    channels: Literal[1, 3] = Field(3, description="1: grey, 3: red, green, blue")
    workers: int = Field(
        0, ge=0, le=256, description="decoding processes (dali: threads) per rank; 0 decodes in the trainer's process"
    )
    on_bad_sample: Literal["stop", "skip"] = Field("stop", description="what an unreadable sample does")
    bad_sample_budget: float = Field(0.001, ge=0, le=1, description="largest share of skipped samples before stopping")
    shuffle_buffer: int | None = Field(
        None, ge=1, description="stream: samples in the buffer that mixes shards, of each rank; default 1000"
    )
    remote: Remote = Remote()
    augment: Augment = Augment()
    synthetic: Synthetic = Synthetic()

    @field_validator(*_BEYOND)
    @classmethod
    def _within_the_reader(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        reason = _BEYOND[info.field_name].get(info.data.get("reader", ""))
        if reason is not None and value != cls.model_fields[info.field_name].default:
            raise PydanticCustomError("reader", "{reason}", {"reason": reason})
        return value

    @field_validator("augment")
    @classmethod
    def _within_dali(cls, value: Augment, info: ValidationInfo) -> Augment:
        reader = info.data.get("reader", "")
        if refused := beyond_dali(value, reader):
            does = {
                "dali": "does not make {names} equal to the default reader",
                "dali-stream": "makes flips, not {names}",
            }
            raise PydanticCustomError(
                "reader",
                f"dataset.reader {reader} {does[reader]}; leave that out or use indexed",
                {"names": ", ".join(refused)},
            )
        return value
