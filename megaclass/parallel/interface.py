"""Which network interface leads to the other machines of a run, and by which address they see this one.

Separate because `launch/torchrun.sh` runs this file before anything else is started, so it imports nothing heavy. gloo
and torchrun look up the host's name instead, which on many machines is an address of loopback that no other can reach.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import sys
from dataclasses import dataclass

from megaclass.errors import ConfigError

GLOO = "GLOO_SOCKET_IFNAME"

# Nothing is sent there: it asks the kernel which way leads out. The network is set aside for documents (RFC 5737).
_OUTSIDE = "198.51.100.1"


@dataclass(frozen=True)
class Route:
    """The way to another machine: `interface` here, its `address`, and whether the other machine is this one."""

    interface: str
    address: str
    is_here: bool


class _SocketAddress(ctypes.Structure):
    _fields_ = (("family", ctypes.c_ushort), ("content", ctypes.c_ubyte * 26))


class _Entry(ctypes.Structure):
    """The beginning of `struct ifaddrs` of getifaddrs(3)."""


_Entry._fields_ = (
    ("next", ctypes.POINTER(_Entry)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.POINTER(_SocketAddress)),
)

# Where the address lies behind the family, and its length.
_PLACES = {int(socket.AF_INET): (2, 4), int(socket.AF_INET6): (6, 16)}


def interfaces() -> dict[str, list[str]]:
    """All interfaces of this machine (of this network namespace) with their addresses, IPv4 first."""
    library = ctypes.CDLL(None, use_errno=True)
    first = ctypes.POINTER(_Entry)()
    if library.getifaddrs(ctypes.byref(first)) != 0:
        raise OSError(ctypes.get_errno(), "getifaddrs failed")
    found: dict[str, list[str]] = {name: [] for _, name in socket.if_nameindex()}
    entry = first
    while entry:
        content = entry.contents
        if content.address and (place := _PLACES.get(content.address.contents.family)):
            start, length = place
            raw = bytes(content.address.contents.content[start : start + length])
            found.setdefault(content.name.decode(), []).append(str(ipaddress.ip_address(raw)))
        entry = content.next
    library.freeifaddrs(first)
    return {name: sorted(addresses, key=lambda text: ":" in text) for name, addresses in found.items()}


def check_interfaces(variable: str = GLOO) -> None:
    """Refuse an environment variable that names an interface which is not there or has no address.

    Raises:
        ConfigError: with the interfaces there are.
    """
    for name in filter(None, os.environ.get(variable, "").split(",")):
        _addresses_of(name, variable)


def route_to(host: str) -> Route:
    """How this machine and `host` reach each other; GLOO_SOCKET_IFNAME goes before the kernel's table of routes.

    Args:
        host: a name or an address, with or without `:port`. A name that here stands for loopback, as a machine's own
            name often does, is this machine; the address is then that of the way out.

    Raises:
        ConfigError: the name does not resolve, no way leads there, or the wanted interface does not exist.
    """
    host = _without_port(host)
    targets = _resolve(host)
    own = {address: name for name, addresses in interfaces().items() for address in addresses}
    is_here = any(target in own or ipaddress.ip_address(target).is_loopback for target in targets)
    if wanted := os.environ.get(GLOO):
        name = wanted.split(",")[0]
        return Route(name, _addresses_of(name, GLOO)[0], is_here)
    address = _source_towards(targets)
    if ipaddress.ip_address(address).is_loopback and not _is_address(host) and host != "localhost":
        address = _source_towards([_OUTSIDE], default=address)
    return Route(own[address], address, is_here)


def _addresses_of(name: str, variable: str) -> list[str]:
    there = interfaces()
    if not there.get(name):
        listed = ", ".join(f"{each} ({', '.join(there[each]) or 'no address'})" for each in there)
        what = "has no address" if name in there else "is not an interface of this machine"
        raise ConfigError(
            f"{variable}={name}: {name} {what} ({socket.gethostname()}); there are {listed}; name one of those, "
            "or leave it out and the interface is chosen by the way to the first node"
        )
    return there[name]


def _without_port(text: str) -> str:
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text if text.count(":") > 1 else text.partition(":")[0]


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _resolve(host: str) -> list[str]:
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)]
    except OSError as error:
        raise ConfigError(
            f"the first node's name {host!r} does not resolve on {socket.gethostname()} ({error.strerror}); "
            "give its address in --rdzv-endpoint or MASTER_ADDR"
        ) from None


def _source_towards(targets: list[str], default: str | None = None) -> str:
    """The address the kernel would send from to the first target it knows a way to."""
    reason = "no address"
    for target in targets:
        family = socket.AF_INET6 if ":" in target else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((target, 9))  # of UDP: only looks up the way
                return str(probe.getsockname()[0])
            except OSError as error:
                reason = error.strerror or str(error)
    if default is not None:
        return default
    raise ConfigError(
        f"no way leads from {socket.gethostname()} to the first node, {targets[0]} ({reason}); see its address and "
        f"this machine's routes, or name an interface in {GLOO}"
    )


def main() -> int:
    """For `launch/torchrun.sh`: prints interface, address and `here` or `away` for the first node given; 2 if none."""
    try:
        check_interfaces()
        route = route_to(sys.argv[1])
    except ConfigError as error:
        print(f"launch/torchrun.sh: {error}", file=sys.stderr)
        return error.exit_code
    print(route.interface, route.address, "here" if route.is_here else "away")
    return 0


if __name__ == "__main__":
    sys.exit(main())
