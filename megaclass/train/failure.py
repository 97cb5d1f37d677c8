"""What a rank says when another one has failed: the other's reason, not the broken connection it noticed itself.

A rank that stops because of what the user gave tells the others why before it leaves. Those notice a lost connection in
their next collective, look for a reason, and end in the same way. Without one they report a lost peer.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress

from megaclass import errors
from megaclass.errors import PeerError, UserError
from megaclass.parallel.process import World

_KEY = "failure"
_SECONDS_TO_LOOK = 3.0
_KINDS = {kind.__name__: kind for kind in UserError.__subclasses__()}

# What torch says when a connection or a peer is gone, or did not come in time; anything else is our own fault.
_SIGNS = ("gloo", "connection", "nccl", "timed out", "timeout", "socket", "peer", "store")


def tell_peers(world: World, error: UserError) -> bool:
    """Leave the reason of this rank's failure for the others; False if it only repeats what a rank has said before."""
    if world.store is None or isinstance(error, PeerError):
        return True
    if error.is_repeated:
        return False
    told = json.dumps({"kind": type(error).__name__, "reason": str(error), "rank": world.rank})
    with suppress(RuntimeError):
        first = json.loads(world.store.compare_set(_KEY, "", told))
        return bool(first["rank"] == world.rank or first["reason"] != str(error))
    return True


def told_failure(world: World) -> UserError | None:
    """Why another rank has failed, if it has said so; an error that marks itself as a repetition."""
    if world.store is None or not world.store.check([_KEY]):
        return None
    told = json.loads(world.store.get(_KEY))
    repeated: UserError = _KINDS[told["kind"]](f"rank {told['rank']} has failed: {told['reason']}")
    repeated.is_repeated = True
    return repeated


def explain(world: World, error: RuntimeError) -> Exception:
    """The error to raise in place of `error`: another rank's reason, a lost peer, or itself if it is neither."""
    text = str(error)
    if world.store is None or not any(sign in text.lower() for sign in _SIGNS):
        return error
    deadline = time.monotonic() + _SECONDS_TO_LOOK
    with suppress(RuntimeError):
        while time.monotonic() < deadline:
            if (told := told_failure(world)) is not None:
                return told
            time.sleep(0.05)
    first_line = text.strip().splitlines()[0][:300]
    return errors.PeerError(f"rank {world.rank} lost another rank ({first_line}); see the log of the rank that ended")
