"""Two torchrun agents as two nodes with addresses of their own: trained, disturbed in every way, the same losses.

Namespaces need root. The second half, marked `nodes`, runs in `make test-nodes` and not in `make test`.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megaclass.observe.journal import read_lines, read_metrics
from tests.support.nodes import Node, Nodes, two_nodes, why_not
from tests.support.training import sample_ids, small_config, small_dataset, train

STEPS = 40
_reason = why_not()
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(_reason is not None, reason=_reason or ""),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    yield from two_nodes(tmp_path)


@pytest.fixture(scope="module")
def expected(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of two ranks on one node that nobody disturbs."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    train(config_for(dataset, run_dir), 2)
    return run_dir


def config_for(dataset: Path, run_dir: Path, **train_options: Any) -> dict[str, Any]:
    content = small_config(dataset, run_dir, train={"steps": STEPS, "checkpoint_every": 8, **train_options})
    return {**content, "evaluate": {"protocols": []}}


def newest(run_dir: Path) -> tuple[int, int]:
    """The newest logged step, and the attempt it is of."""
    lines = read_metrics(run_dir)
    return (lines[-1]["step"], lines[-1]["attempt"]) if lines else (0, 0)


def assert_same_run(run_dir: Path, expected: Path, attempts: int) -> None:
    lines = read_metrics(run_dir)
    assert [line["loss_hex"] for line in lines] == [line["loss_hex"] for line in read_metrics(expected)]
    assert {line["attempt"] for line in lines} == set(range(1, attempts + 1))
    assert sample_ids(run_dir) == sample_ids(expected)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["step"], summary["attempts"]) == ("completed", STEPS, attempts)


def stop(node: Node, name: str = "SIGTERM") -> None:
    assert node.launcher is not None
    os.kill(node.launcher.pid, getattr(signal, name))


def assert_nothing_is_left(nodes: Nodes) -> None:
    assert [node.processes() for node in nodes.both] == [[], []]


def test_a_killed_worker_and_a_signal_on_both_nodes(dataset: Path, expected: Path, nodes: Nodes) -> None:
    """One run: a rank dies on the second node, later both are told to stop, and the same command goes on."""
    run_dir = nodes.folder / "run"
    content = config_for(dataset, run_dir)
    nodes.launch_both(content)
    nodes.wait_for(lambda: newest(run_dir) >= (11, 1), "step 11")
    for node in nodes.both:
        # The way to node1 and not the default route, which is that of office0.
        assert f"launch/torchrun.sh: interface fabric0, address 10.91.0.{node.number}; the first node" in node.log()
    ids = nodes.both[1].workers()
    assert len(ids) == 1
    nodes.both[1].kill(ids)
    seconds = nodes.wait_for(lambda: newest(run_dir)[1] == 2, "the second start")
    nodes.wait_for(lambda: newest(run_dir) >= (18, 2), "step 18 again")
    for node in nodes.both:
        stop(node, "SIGUSR1")
    assert nodes.codes() == [75, 75], nodes.log()
    assert_nothing_is_left(nodes)
    assert json.loads((run_dir / "outcome.json").read_text())["code"] == 75
    nodes.launch_both(content)
    assert nodes.codes() == [0, 0], nodes.log()
    assert_nothing_is_left(nodes)
    assert_same_run(run_dir, expected, attempts=3)
    print(f"a rank killed: {seconds:.1f} s to the next step")


def test_an_interface_that_is_not_there(dataset: Path, nodes: Nodes) -> None:
    """From the launcher, and from a rank under plain torchrun, on all ranks alike: code 2, and what there is."""
    content = config_for(dataset, nodes.folder / "run")
    nodes.launch_both(content, GLOO_SOCKET_IFNAME="fabric7")
    assert nodes.codes() == [2, 2]
    for node in nodes.both:
        message = "GLOO_SOCKET_IFNAME=fabric7: fabric7 is not an interface of this machine"
        assert message in node.log()
        assert f"fabric0 (10.91.0.{node.number}" in node.log()
    assert_nothing_is_left(nodes)


@pytest.mark.nodes
def test_plain_torchrun_with_an_interface_that_is_not_there(dataset: Path, nodes: Nodes) -> None:
    """On one node only; the other learns of it, and neither starts again."""
    content = config_for(dataset, nodes.folder / "run")
    for node, name in zip(nodes.both, ("fabric0", "fabric7"), strict=True):
        nodes.launch(node, content, "--nnodes", "2", plain=True, GLOO_SOCKET_IFNAME=name)
    assert nodes.codes() == [0, 0], nodes.log()
    assert "GLOO_SOCKET_IFNAME=fabric7: fabric7 is not an interface of this machine" in nodes.both[1].log()
    assert "Traceback" not in nodes.both[1].log()
    assert not read_metrics(nodes.folder / "run")


@pytest.mark.nodes
def test_an_interface_that_leads_elsewhere(dataset: Path, nodes: Nodes) -> None:
    """It exists and has an address, so only time tells; what the ranks then say names the variable."""
    content = config_for(dataset, nodes.folder / "run")
    content["run"]["hang_seconds"] = 5
    nodes.launch_both(content, GLOO_SOCKET_IFNAME="office0")
    said = "could not meet the other 1 ranks within 65 s"
    nodes.wait_for(lambda: any(said in node.log() for node in nodes.both), said, 200)
    assert "whether the interface in GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME leads to the others" in nodes.log()
    for node in nodes.both:
        stop(node)
    assert 0 not in nodes.codes()
    assert_nothing_is_left(nodes)


@pytest.mark.nodes
@pytest.mark.parametrize("number", [1, 2])
def test_ranks_killed_on_one_node_with_two_ranks_each(dataset: Path, tmp_path: Path, nodes: Nodes, number: int) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(config_for(dataset, straight), 4)
    nodes.launch_both(config_for(dataset, broken), ranks=2)
    nodes.wait_for(lambda: newest(broken) >= (11, 1), "step 11")
    node = nodes.both[number - 1]
    assert len(node.workers()) == 2
    node.kill(node.workers())
    seconds = nodes.wait_for(lambda: newest(broken)[1] == 2, "the second start")
    assert nodes.codes() == [0, 0], nodes.log()
    assert_nothing_is_left(nodes)
    assert_same_run(broken, straight, attempts=2)
    print(f"both ranks of node {number} killed: {seconds:.1f} s to the next step")


@pytest.mark.nodes
def test_the_second_node_is_lost_and_comes_back(dataset: Path, expected: Path, nodes: Nodes) -> None:
    """Its agent and its ranks die together; the first node's agent waits for the one that a scheduler starts again."""
    run_dir = nodes.folder / "run"
    content = config_for(dataset, run_dir)
    nodes.launch_both(content)
    nodes.wait_for(lambda: newest(run_dir) >= (11, 1), "step 11")
    nodes.both[1].fail()
    start = time.monotonic()
    nodes.launch(nodes.both[1], content, "--nnodes", "2")
    nodes.wait_for(lambda: newest(run_dir)[1] == 2, "the second start")
    seconds = time.monotonic() - start
    assert nodes.codes() == [0, 0], nodes.log()
    assert_same_run(run_dir, expected, attempts=2)
    assert_nothing_is_left(nodes)
    print(f"the second node lost: {seconds:.1f} s to the next step")


@pytest.mark.nodes
def test_the_first_node_is_lost_and_both_are_started_again(dataset: Path, expected: Path, nodes: Nodes) -> None:
    """With it goes the meeting point, which no other node can take over: the second ends with 6 and leaves nothing."""
    run_dir = nodes.folder / "run"
    content = config_for(dataset, run_dir)
    nodes.launch_both(content)
    nodes.wait_for(lambda: newest(run_dir) >= (11, 1), "step 11")
    start = time.monotonic()
    nodes.both[0].fail()
    launcher = nodes.both[1].launcher
    assert launcher is not None
    assert launcher.wait(150) == 6, nodes.log()
    ended = time.monotonic() - start
    assert_nothing_is_left(nodes)
    nodes.launch_both(content)
    nodes.wait_for(lambda: newest(run_dir)[1] == 2, "the second start")
    seconds = time.monotonic() - start
    assert nodes.codes() == [0, 0], nodes.log()
    assert_same_run(run_dir, expected, attempts=2)
    print(f"the first node lost: the second ends after {ended:.1f} s, {seconds:.1f} s to the next step")


@pytest.mark.nodes
@pytest.mark.parametrize("number", [1, 2])
def test_a_signal_on_one_node_stops_both(dataset: Path, expected: Path, nodes: Nodes, number: int) -> None:
    run_dir = nodes.folder / "run"
    content = config_for(dataset, run_dir)
    nodes.launch_both(content)
    nodes.wait_for(lambda: newest(run_dir) >= (11, 1), "step 11")
    start = time.monotonic()
    stop(nodes.both[number - 1])
    assert nodes.codes() == [75, 75], nodes.log()
    seconds = time.monotonic() - start
    assert_nothing_is_left(nodes)
    nodes.launch_both(content)
    assert nodes.codes() == [0, 0], nodes.log()
    assert_same_run(run_dir, expected, attempts=2)
    assert seconds < 60, "the node that was not signalled waits for the other"
    print(f"SIGTERM on node {number}: both have ended after {seconds:.1f} s")


@pytest.mark.nodes
def test_elastic_goes_on_with_the_nodes_there_are(dataset: Path, nodes: Nodes) -> None:
    """`--nnodes 1:2`: two nodes, one, and two again; within rounding, as world sizes are."""
    straight, run_dir = nodes.folder / "straight", nodes.folder / "run"
    train(config_for(dataset, straight, steps=200), 2)
    content = config_for(dataset, run_dir, steps=200)
    options = ("--nnodes", "1:2", "--rdzv-conf", "last_call_timeout=5")
    nodes.launch_both(content, *options)
    nodes.wait_for(lambda: newest(run_dir) >= (11, 1), "step 11")
    nodes.both[1].fail()
    seconds = nodes.wait_for(lambda: newest(run_dir)[1] == 2, "the first node alone")
    nodes.launch(nodes.both[1], content, *options)
    again = nodes.wait_for(lambda: newest(run_dir)[1] == 3, "both nodes again")
    assert nodes.codes() == [0, 0], nodes.log()
    assert_nothing_is_left(nodes)
    lines = read_metrics(run_dir)
    sizes = [line["world_size"] for line in lines]
    alone = sizes.index(1), len(sizes) - sizes[::-1].index(1)
    assert sizes == [2] * alone[0] + [1] * (alone[1] - alone[0]) + [2] * (len(sizes) - alone[1])
    assert sizes[-1] == 2
    # Letting the other node in costs no step: the ranks have saved where they stopped.
    taken = [line["step"] for line in read_lines(run_dir / "metrics.jsonl") if line["attempt"] > 1]
    assert taken == list(range(taken[0], 201))
    for one, two in zip(lines, read_metrics(straight), strict=True):
        assert abs(one["loss"] - two["loss"]) <= 1e-5 * abs(two["loss"]), one["step"]
    assert sample_ids(run_dir) == sample_ids(straight)
    print(
        f"the second node lost: the first goes on alone after {seconds:.1f} s; both again {again:.1f} s after its start"
    )
