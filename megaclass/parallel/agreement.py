"""Telling every rank how something ended that one rank, or each rank alone, has done, without a collective.

Separate because saving, owning the run directory and stopping all need it, and because none of them may be a
collective: a rank whose disk is full must be able to say so to ranks that are minutes away from listening.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megaclass.parallel.process import World


class Agreement:
    """One exchange of small messages between ranks, under keys that no other exchange uses.

    All ranks must make the same exchanges of one kind in the same order: the keys carry how many of that kind this
    rank has begun before. In a world of one nothing is sent.

    Args:
        world: the ranks that take part.
        what: the kind of exchange, a word such as `checkpoint`; where a start number is known, with that number.
    """

    def __init__(self, world: World, what: str) -> None:
        self._world = world
        number = 0 if world.store is None else world.store.add(f"{what}/begun/{world.rank}", 1)
        self._prefix = f"{what}/{number}"

    def key(self, name: str) -> str:
        """The key of this exchange's message `name` in the store of the ranks."""
        return f"{self._prefix}/{name}"

    def tell(self, name: str, content: dict[str, Any]) -> None:
        """Publish a message of plain JSON; nothing in a world of one."""
        self._world.publish(self.key(name), json.dumps(content))

    def hear(self, name: str, seconds: float) -> dict[str, Any]:
        """The message `name` that another rank tells.

        Raises:
            PeerError: nothing came within `seconds`.
        """
        content: dict[str, Any] = json.loads(self._world.wait_for(self.key(name), seconds))
        return content

    def collect(self, name: str, seconds: float) -> list[dict[str, Any]]:
        """The messages `name/<rank>` of all ranks but this one, in the order of the ranks; only one rank may collect.

        They are deleted once read, so that a long run does not fill the store.

        Raises:
            PeerError: not all came within `seconds`.
        """
        deadline = time.monotonic() + seconds
        messages = []
        for rank in range(self._world.size):
            if rank == self._world.rank:
                continue
            messages.append(self.hear(f"{name}/{rank}", max(deadline - time.monotonic(), 0.0)))
            assert self._world.store is not None
            self._world.store.delete_key(self.key(f"{name}/{rank}"))
        return messages
