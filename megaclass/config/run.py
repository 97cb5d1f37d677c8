"""The options of the run directory: what is written there, and the steps whose timeline is."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from megaclass.config.section import Section


class Run(Section):
    """The run directory and what is written there."""

    dir: Path = Field(Path("runs/default"), description="run directory; training again with it continues the run")
    log_every: int = Field(20, ge=1, description="steps between lines of metrics.jsonl and the progress line")
    log_sample_ids: bool = Field(False, description="write the ids of every batch to samples/")
    hang_seconds: float = Field(
        300.0, gt=0, description="a step or a collective that takes longer ends the run (exit 6)"
    )
    profile: int | None = Field(
        None, ge=1, le=100, description="record so many steps: a trace of every rank and a summary in profile/"
    )
    profile_after: int = Field(10, ge=1, description="profile: steps of this start before them")


def profile_faults(run: Run, steps: int | None) -> list[str]:
    """What keeps a run of so many steps (None: as many as its epochs have) from being profiled."""
    if run.profile is None or steps is None or run.profile_after + run.profile <= steps:
        return []
    return [
        f"run.profile {run.profile} after run.profile_after {run.profile_after} steps is more than train.steps "
        f"{steps}; lower them"
    ]
