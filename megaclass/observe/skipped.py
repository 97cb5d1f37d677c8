"""The list of samples that could not be used: which, where, and why; bounded, each sample once per rank.

Separate from the journal because it looks at what it has written before. A damaged data set read for many epochs meets
the same bad samples again and again, and one that is wrong altogether has as many as samples; neither may fill a disk.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megaclass.data.batch import SkippedSample
from megaclass.observe.journal import append_line, read_lines
from megaclass.observe.logging import redact

MAX_LISTED = 1000
_MAX_CHARACTERS = 500


class SkippedList:
    """Appends to `skipped/rank-R.jsonl` of a run directory, over all its attempts at most `MAX_LISTED` lines.

    A line is `{attempt, step, sample, shard, key, reason, detail}`, of the step in which this rank met the
    sample first. Texts are cut after 500 characters. The file is made with the first bad sample.

    Args:
        run_dir: run directory.
        attempt: of this start.
        rank: of this process.
    """

    def __init__(self, run_dir: Path, attempt: int, rank: int) -> None:
        self._path = Path(run_dir) / "skipped" / f"rank-{rank}.jsonl"
        self._attempt = attempt
        self._listed: set[int] | None = None

    def add(self, step: int, samples: Sequence[SkippedSample]) -> int:
        """List the samples of a step that are not listed yet; returns how many found the list full."""
        if not samples:
            return 0
        if self._listed is None:
            found = (line.get("sample") for line in read_lines(self._path))
            self._listed = {sample for sample in found if isinstance(sample, int)}
        num_unlisted = 0
        for sample in samples:
            if sample.sample_id in self._listed:
                continue
            if len(self._listed) >= MAX_LISTED:
                num_unlisted += 1
                continue
            self._listed.add(sample.sample_id)
            append_line(self._path, json.dumps(self._line(step, sample)))
        return num_unlisted

    def _line(self, step: int, sample: SkippedSample) -> dict[str, int | str | None]:
        texts = {"shard": sample.shard, "key": sample.key, "reason": sample.reason, "detail": sample.detail}
        return {"attempt": self._attempt, "step": step, "sample": sample.sample_id} | {
            name: None if text is None else redact(text)[:_MAX_CHARACTERS] for name, text in texts.items()
        }
