"""Which orders of the training samples cannot be had, or not together.

Separate because the order is made of several options of `dataset`, and two of `train` must fit to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megaclass.config.dataset import Dataset


STREAMING = ("stream", "dali-stream")
"""The readers that know no positions of single samples: shards from front to back, mixed in a buffer."""


def sampling_faults(dataset: Dataset, global_batch_size: int, accumulation_steps: int) -> list[str]:
    """What is wrong with `class_balance`, `samples_per_class`, `repeats` and `shuffle_window`, alone and together."""
    faults = []
    balance, per_class, repeats = dataset.class_balance, dataset.samples_per_class, dataset.repeats
    told = {
        "class_balance": f"{balance:g}" if balance else None,
        "samples_per_class": per_class and str(per_class),
        "repeats": str(repeats) if repeats > 1 else None,
        "shuffle_window": dataset.shuffle_window and str(dataset.shuffle_window),
    }
    given = {name: value for name, value in told.items() if value is not None}
    if dataset.reader in STREAMING:
        faults += [
            f"dataset.{name} {value}: dataset.reader {dataset.reader} reads whole shards from front to back; leave it "
            "out or use indexed"
            for name, value in given.items()
            if name != "shuffle_window"
        ]
    if "samples_per_class" in given and "class_balance" in given:
        faults.append(
            f"dataset.samples_per_class {per_class} visits every class equally often, and dataset.class_balance "
            f"{balance:g} asks for another rate; give one of the two"
        )
    if "samples_per_class" in given and "repeats" in given:
        faults.append(
            f"dataset.samples_per_class {per_class} and dataset.repeats {repeats} both say what a micro-batch is made "
            "of; give one of the two"
        )
    for name in ("class_balance", "samples_per_class"):
        if name in given and "shuffle_window" in given:
            faults.append(
                f"dataset.{name} {given[name]} takes the samples of a class from all shards, and "
                f"dataset.shuffle_window {given['shuffle_window']} keeps to few of them; leave one of the two out"
            )
    micro_batch_size = global_batch_size // accumulation_steps
    for name in ("samples_per_class", "repeats"):
        if name in given and micro_batch_size % int(given[name]):
            faults.append(
                f"dataset.{name} {given[name]} does not divide the {micro_batch_size} samples of a micro-batch "
                "(train.global_batch_size / train.accumulation_steps, over all ranks); choose a divisor"
            )
    return faults
