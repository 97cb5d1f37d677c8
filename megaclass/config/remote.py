"""The options of data sets behind an address, and the type of an option that is a folder or an address.

Separate because a `Path` cannot hold an address, and because what is wrong with one must be said without its secrets.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, PlainSerializer, PlainValidator
from pydantic_core import PydanticCustomError

from megaclass.config.section import Section
from megaclass.data.address import Address, Location, parse_location

if TYPE_CHECKING:
    from megaclass.config.dataset import Dataset

# Between two tries of a file, whatever the server asks for.
LONGEST_WAIT_SECONDS = 30.0


def _location(value: object) -> Location:
    try:
        return parse_location(value)
    except ValueError as error:
        raise PydanticCustomError("location", "{reason}", {"reason": str(error)}) from None


DataLocation = Annotated[Location, PlainValidator(_location), PlainSerializer(str, return_type=str, when_used="json")]


class Remote(Section):
    """How a data set behind an address is fetched and kept; see docs/data.md, From object storage."""

    cache_dir: Path = Field(Path("~/.cache/megaclass"), description="folder on a disk of this node; ranks share it")
    cache_gib: float = Field(
        32.0, gt=0, le=2**20, description="most that it holds; shards unused for longest are removed, GiB"
    )
    attempts: int = Field(6, ge=1, le=100, description="tries of one file before the run ends")
    timeout_seconds: float = Field(
        20.0, gt=0, le=3600, description="longest wait for a connection, an answer or the next bytes"
    )
    redirect_hosts: tuple[str, ...] = Field(
        (), description="other hosts that a server may redirect to; without them none is followed elsewhere"
    )

    @property
    def patience_seconds(self) -> float:
        """Longest time in which nothing may come of one file before the run ends, all waits included."""
        return self.attempts * self.timeout_seconds + (self.attempts - 1) * LONGEST_WAIT_SECONDS


def remote_faults(dataset: Dataset, evaluate_path: Location | None, hang_seconds: float) -> list[str]:
    """What cannot be done with a data set behind an address."""
    faults = []
    if isinstance(dataset.path, Address) and dataset.reader in ("indexed", "dali", "dali-stream"):
        faults.append(
            f"dataset.reader {dataset.reader} reads single samples of all shards, and {dataset.path} is not a disk of "
            "this machine; use dataset.reader stream, or copy the data set to a folder"
        )
    remote, patience = dataset.remote, dataset.remote.patience_seconds
    if any(isinstance(path, Address) for path in (dataset.path, evaluate_path)) and patience >= hang_seconds:
        faults.append(
            f"dataset.remote.attempts {remote.attempts} of {remote.timeout_seconds:g} s may take {patience:g} s with "
            f"the waits between, and run.hang_seconds {hang_seconds:g} would end the run before; lower them, or set "
            f"run.hang_seconds above {patience:g}"
        )
    return faults
