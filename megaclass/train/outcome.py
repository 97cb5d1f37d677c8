"""How a process of a run ended: the record that outlives it, and the exit code it shows to whom.

Separate from the guard because it must work when everything else has failed. An agent (torchrun) restarts every rank
when one ends with a code other than 0 and then hides that code; so a fault that a restart cannot mend is written down
here and shown to the agent as success, and `launch/torchrun.sh` reads the record to return the true code.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from megaclass.durable import replace_bytes
from megaclass.errors import UserError

OUTCOME = "outcome.json"
PREEMPTED = 75
"""Exit code of a run that was told to stop and has saved its state."""

_PERMANENT = (2, 3, 4, 5)
_PEER = 6

_log = logging.getLogger(__name__)


def record_outcome(run_dir: Path | None, rank: int, code: int, reason: str, step: int | None) -> None:
    """Write down how this rank ended as `{code, reason, rank, step}`; never raises, since the code counts for more.

    `outcome.json` in the run directory tells of the run: of rank 0 when it ended well, otherwise of the cause. A fault
    of a rank's own stays when others report that they lost a peer (6), and replaces that. If the environment names a
    folder in MEGACLASS_OUTCOME_DIR, `rank-<local rank>.json` there tells of this rank.

    Args:
        run_dir: None where this process does not own the run directory: the record there belongs to another run.
        rank: of this process.
        code: exit code, see `megaclass.errors`; 0 done, 75 preempted and saved.
        reason: one line.
        step: steps taken, None where the run did not come that far.
    """
    content = {"code": code, "reason": " ".join(reason.split()), "rank": rank, "step": step}
    raw = (json.dumps(content) + "\n").encode()
    wanted = []
    if run_dir is not None and _tells_more(content, Path(run_dir) / OUTCOME):
        wanted.append(Path(run_dir) / OUTCOME)
    if (own := _own_record()) is not None:
        wanted.append(own)
    for path in wanted:
        try:
            replace_bytes(path, raw)
        except OSError as error:
            _log.warning("outcome of rank %d could not be written to %s: %s", rank, path, error.strerror)


def forget_outcome() -> None:
    """Remove what an earlier start in this rank's place has recorded for its launcher; called before anything else.

    A start that dies without a record would otherwise end like the one before.
    """
    if (own := _own_record()) is not None:
        with suppress(OSError):
            own.unlink(missing_ok=True)


def _own_record() -> Path | None:
    # Named by the place within the node: a restarted node may get other ranks, and old records must not stay.
    folder = os.environ.get("MEGACLASS_OUTCOME_DIR")
    return Path(folder) / f"rank-{os.environ.get('LOCAL_RANK', '0')}.json" if folder else None


def launcher_was_told() -> bool:
    """Whether this node's launcher has been told to stop, by a person or a scheduler; False without one."""
    folder = os.environ.get("MEGACLASS_OUTCOME_DIR")
    return folder is not None and (Path(folder) / "told").exists()


def end_agent() -> None:
    """Tell this node's agent to end, once: by the first of its ranks, and only an agent our launcher has started.

    For a node that stops because another one's launcher was told. An agent whose ranks have ended well waits for those
    of the other nodes, but one that was told has left without a word; torchrun gives up on it after five minutes.
    """
    folder, agent = os.environ.get("MEGACLASS_OUTCOME_DIR"), os.getppid()
    if folder is None or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    with suppress(OSError):
        # It may be gone, and its children be handed to a process that has nothing to do with this run.
        if f"MEGACLASS_OUTCOME_DIR={folder}".encode() in Path(f"/proc/{agent}/environ").read_bytes().split(b"\0"):
            os.kill(agent, signal.SIGTERM)


def refuse(error: UserError) -> int:
    """Say why there is no run, and record it for an agent, which would start it again; the process's exit code.

    For faults that every rank finds alike before it joins the others; only rank 0 speaks.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(f"megaclass: {error}", file=sys.stderr, flush=True)
    record_outcome(None, rank, error.exit_code, str(error), None)
    return exit_code_for_process(error.exit_code, is_under_agent())


def exit_code_for_process(code: int, under_agent: bool, is_permanent: bool = False) -> int:
    """The code a process ends with: under an agent 0 for everything that a restart cannot mend, alone `code`.

    `is_permanent` says so of a fault whose code alone does not.
    """
    return 0 if under_agent and (is_permanent or code in (*_PERMANENT, PREEMPTED)) else code


def is_under_agent() -> bool:
    """Whether a torchrun agent has started this process and would start it again."""
    return agent_run() is not None


def agent_run() -> str | None:
    """Which run of an agent this process belongs to, the same after a restart by it; None without an agent."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    # A run id may be a fixed word; the folder of outcomes is new for every launch.
    return None if run_id is None else f"{run_id} {os.environ.get('MEGACLASS_OUTCOME_DIR', '')}".strip()


def _tells_more(content: dict[str, Any], path: Path) -> bool:
    """Whether an outcome says more about the end of the run than the one recorded already."""
    if content["code"] in (0, PREEMPTED) and content["rank"] != 0:
        return False
    try:
        recorded = json.loads(path.read_bytes()[:100_000])["code"]
    except (OSError, ValueError, KeyError, TypeError):
        return True
    return _weight(content["code"]) > _weight(recorded)


def _weight(code: Any) -> int:
    return {0: 0, PREEMPTED: 0, _PEER: 1}.get(code, 2) if isinstance(code, int) else 0
