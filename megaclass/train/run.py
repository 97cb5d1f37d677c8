"""One run from its configuration to its exit code: joins the ranks, owns the run directory, and says how it ended.

What happens in between is `attempt.py`; `build.py` makes the parts, `loop.py` takes the steps.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from megaclass.config import Config
from megaclass.errors import ConfigError, NoProgressError, UserError
from megaclass.parallel.process import World, environment_rank, record_collectives_in, world
from megaclass.train.attempt import Attempt
from megaclass.train.failure import explain, tell_peers
from megaclass.train.guard import own_run_directory
from megaclass.train.outcome import (
    PREEMPTED,
    end_agent,
    exit_code_for_process,
    forget_outcome,
    is_under_agent,
    record_outcome,
)

_log = logging.getLogger(__name__)

# A hanging collective is first seen by our own watchdog, which says where; the group's own limit comes after it.
_COLLECTIVE_MARGIN_SECONDS = 60.0


def train(config: Config) -> int:
    """Train as configured, continuing the run directory's newest checkpoint; returns the process's exit code."""
    forget_outcome()
    owned: Path | None = None
    rank, step, is_permanent, is_agent_left = environment_rank(), None, False, False
    try:
        record_collectives_in(config.run.dir)
        with world(config.train.device, config.run.hang_seconds + _COLLECTIVE_MARGIN_SECONDS) as w:
            try:
                with own_run_directory(config.run.dir, w):
                    owned = config.run.dir
                    attempt = Attempt(config, w)
                    try:
                        code = attempt.go()
                    except (UserError, RuntimeError, OSError) as error:
                        failure = _as_user_error(w, error)
                        attempt.write_failure(failure)
                        raise failure from error
                    finally:
                        step, is_agent_left = attempt.step, attempt.stop.is_by_another_launcher
                        attempt.close()
            except UserError as error:
                if tell_peers(w, error):
                    print(f"megaclass: {_one_rank(rank)}{error}", file=sys.stderr, flush=True)
                error.is_repeated = True  # it has been told
                raise
        reason = "done" if code == 0 else "preempted and saved"
    except UserError as error:
        code, reason, is_permanent = error.exit_code, str(error), isinstance(error, NoProgressError)
        if not error.is_repeated:
            print(f"megaclass: {_one_rank(rank)}{reason}", file=sys.stderr, flush=True)
    except BaseException as error:
        record_outcome(owned, rank, 1, repr(error), step)
        raise
    record_outcome(owned, rank, code, reason, step)
    if code == PREEMPTED and is_agent_left:
        end_agent()
    return exit_code_for_process(code, is_under_agent(), is_permanent)


def _as_user_error(w: World, error: Exception) -> UserError:
    """What a run ends with because of `error`: a reason for the user, or `error` again where it is our own fault."""
    if isinstance(error, OSError):
        # The disk under the run directory; checkpoints and data sets have errors of their own.
        return ConfigError(f"a file of the run cannot be written or read: {error}; make room, or give another run.dir")
    explained = explain(w, error) if isinstance(error, RuntimeError) else error
    if not isinstance(explained, UserError):
        raise error
    return explained


def _one_rank(rank: int) -> str:
    return "" if rank == 0 else f"rank {rank}: "
