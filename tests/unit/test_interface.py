from __future__ import annotations

import socket
import subprocess
import sys
from typing import Any

import pytest

from megaclass.errors import ConfigError
from megaclass.parallel import interface
from megaclass.parallel.interface import Route, check_interfaces, interfaces, route_to


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine node1 with two networks, whose own name stands for loopback as Debian's /etc/hosts has it."""
    there = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1", "fd00::1"], "ib0": ["10.9.0.1"], "ib1": []}
    names = {"node1": "127.0.1.1", "node2": "10.9.0.2", "far": "192.0.2.7"}

    def resolve(host: str, *_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (names.get(host, host), 0))]

    def source(targets: list[str], default: str | None = None) -> str:
        if targets[0].startswith("127."):
            return "127.0.0.1"
        return "10.9.0.1" if targets[0].startswith("10.9.") else "10.0.0.1"

    monkeypatch.setattr(interface, "interfaces", lambda: there)
    monkeypatch.setattr(interface.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(interface, "_source_towards", source)


def test_the_real_interfaces_are_those_of_the_system() -> None:
    found = interfaces()
    assert set(found) == {name for _, name in socket.if_nameindex()}
    assert found["lo"][0] == "127.0.0.1"
    assert route_to("127.0.0.1:29500") == route_to("localhost") == Route("lo", "127.0.0.1", True)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("node2:29500", Route("ib0", "10.9.0.1", False)),
        ("far", Route("eth0", "10.0.0.1", False)),
        ("10.9.0.1:3", Route("ib0", "10.9.0.1", True)),
        ("node1:29500", Route("eth0", "10.0.0.1", True)),  # not loopback, which no other node reaches
        ("127.0.0.1:29500", Route("lo", "127.0.0.1", True)),  # asked for
        ("[fd00::1]:29500", Route("eth0", "10.0.0.1", True)),
    ],
)
@pytest.mark.usefixtures("made_up")
def test_the_way_to_the_first_node(host: str, expected: Route) -> None:
    assert route_to(host) == expected


@pytest.mark.usefixtures("made_up")
def test_the_user_goes_before_the_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0,eth0")
    assert route_to("far") == Route("ib0", "10.9.0.1", False)
    check_interfaces()
    for name, reason in (("ib1", "has no address"), ("eth9", "is not an interface")):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", name)
        with pytest.raises(ConfigError, match=f"GLOO_SOCKET_IFNAME={name}: {name} {reason}.*eth0 \\(10.0.0.1, fd00::1"):
            check_interfaces()
        with pytest.raises(ConfigError, match=reason):
            route_to("far")


def test_names_and_ways_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'nowhere\.invalid' does not resolve on"):
        route_to("nowhere.invalid:1")

    def unreachable(*_: Any) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", unreachable)
    with pytest.raises(ConfigError, match=r"no way leads from .* to the first node, 192\.0\.2\.9 \(Network is unreach"):
        route_to("192.0.2.9")


def test_it_answers_at_once_and_loads_nothing_heavy() -> None:
    program = "import sys, megaclass.parallel.interface; print([n for n in ('torch', 'numpy') if n in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"
