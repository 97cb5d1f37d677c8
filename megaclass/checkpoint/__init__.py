"""Saving and loading the whole state of a run: never half a checkpoint, at any world size, without pickle.

`snapshot` is what is saved, `format` what the manifest says, `files` the tensors in their files, `saving` the protocol
by which the work of all ranks becomes one checkpoint or none, `loading` reads it at any world size, `verifying` proves
it, and `folder` chooses among several. Users of checkpoints import from here.
"""

from megaclass.checkpoint.folder import (
    find_latest,
    latest_attempt,
    listing,
    mark_best,
    newest_name,
    prune,
    remove_leftovers,
    step_of,
)
from megaclass.checkpoint.loading import load, load_replicated
from megaclass.checkpoint.saving import save
from megaclass.checkpoint.snapshot import Snapshot, compare_config
from megaclass.checkpoint.verifying import Verification, verify

__all__ = [
    "Snapshot",
    "Verification",
    "compare_config",
    "find_latest",
    "latest_attempt",
    "listing",
    "load",
    "load_replicated",
    "mark_best",
    "newest_name",
    "prune",
    "remove_leftovers",
    "save",
    "step_of",
    "verify",
]
