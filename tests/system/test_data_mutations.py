"""Mutated tars, indexes, labels, images and manifests, read in every way: good samples or a refusal, and nothing else.

No death by a signal, no pass of over ten seconds, no exception that is not classified, nothing executed, and no file
touched outside the data set. 1,000 cases in `make test`, with a new seed each time; 5,000 in `make test-full`.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.mutations import mutate
from tests.support.read_mutated import disagreements

SEED = int(os.environ.get("MEGACLASS_MUTATION_SEED", secrets.randbelow(2**32)))


@pytest.mark.parametrize(
    "num_cases",
    [
        pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
        pytest.param(5000, marks=[pytest.mark.full, pytest.mark.timeout(7200)]),
    ],
)
def test_mutated_data_sets_are_read_or_refused(num_cases: int, tmp_path: Path) -> None:
    print(f"MEGACLASS_MUTATION_SEED={SEED}")
    lines, faults = run_cases(SEED, num_cases, tmp_path)
    done = [line for line in lines if "done" in line]
    for line in done:
        faults += [f"case {line['done']} ({line['what']}): {fault}" for fault in line["faults"]]
    assert not faults, f"seed {SEED}: {len(faults)} faults\n" + "\n".join(faults[:10])
    assert [line["done"] for line in done] == list(range(num_cases))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"], "something was made beside the data set"
    # The mutations reach what they are made for: each way refuses some and reads others, with and without skipping.
    told = {name: Counter(line["outcomes"][name].split(",")[0] for line in done) for name in done[0]["outcomes"]}
    print(told, f"memory grew by {max(line.get('grown_bytes', 0) for line in lines) >> 20} MiB")
    assert told["verify"].keys() == {"ok", "faults"}
    assert all(told[name].keys() == {"read", "refused"} for name in told if name != "verify")
    assert told["indexed/skip"]["read"] > told["indexed/stop"]["read"] > num_cases / 20
    assert all(line["grown_bytes"] < 512 << 20 for line in lines if "end" in line)


def run_cases(seed: int, num_cases: int, sandbox: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Run all cases, in a new process after each that killed one; the lines told, and what killed."""
    lines: list[dict[str, Any]] = []
    faults: list[str] = []
    start = 0
    while start < num_cases:
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.read_mutated", str(seed), str(start), str(num_cases), str(sandbox)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=7000, check=False,
        )  # fmt: skip
        told = [json.loads(line) for line in done.stdout.splitlines()]
        lines += told
        if done.returncode == 0:
            break
        assert told, done.stderr
        assert "case" in told[-1], done.stderr
        last = told[-1]
        how = f"signal {-done.returncode}" if done.returncode < 0 else "over ten seconds in one pass, or no memory"
        faults.append(f"case {last['case']} ({last['what']}): {how}\n{done.stderr[-3000:]}")
        start = last["case"] + 1
    return lines, faults


def test_a_case_is_a_function_of_its_number_and_seed() -> None:
    for number in range(30):
        assert mutate(number, 5) == mutate(number, 5)
    assert mutate(3, 5) != mutate(3, 6)


@pytest.mark.parametrize(
    ("outcomes", "may_pass", "expected"),
    [
        ({"verify": "ok", "indexed/stop": "read"}, True, []),
        ({"verify": "faults", "indexed/stop": "refused"}, False, []),
        ({"verify": "ok", "indexed/stop": "refused"}, True, ["verify finds nothing, but indexed/stop: refused"]),
        ({"verify": "ok"}, False, ["verify finds nothing, but the files are not those of the manifest"]),
    ],
)
def test_what_counts_as_a_disagreement(outcomes: dict[str, str], may_pass: bool, expected: list[str]) -> None:
    assert disagreements(outcomes, may_pass) == expected


@pytest.mark.parametrize(
    ("trick", "expected"),
    [
        ("os.kill(os.getpid(), 11)", "signal 11"),
        ("time.sleep(60)", "over ten seconds"),
        ("open('../canary', 'w')", "open '../canary' mode 'w'"),
        ("open('/etc/hostname')", "open '/etc/hostname' mode 'r'"),
        ("os.system('true')", "os.system"),
        ("1 / 0", "ZeroDivisionError"),
        ("warnings.warn('x')", "warning x"),
    ],
)
@pytest.mark.slow
def test_the_watch_sees_what_it_is_there_for(trick: str, expected: str, tmp_path: Path) -> None:
    """With a reader that does what none may, the same program tells of it."""
    program = (
        "import os, sys, time, warnings\nfrom pathlib import Path\nfrom tests.support import read_mutated as program\n"
        "calls = []\n"
        f"def check(folder):\n    calls.append(1)\n    if len(calls) > 1:\n        {trick}\n    return 'ok'\n"
        "program.check, program.PASS_SECONDS = check, 2\n"
        f"program.main(1, 0, 1, Path({str(tmp_path)!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    told = [json.loads(line) for line in done.stdout.splitlines()]
    if expected.startswith("signal"):
        assert done.returncode == -11
        assert "case" in told[-1]
    elif expected.startswith("over"):
        assert done.returncode == 1
        assert "Timeout" in done.stderr
    else:
        assert any(expected in fault for line in told for fault in line.get("faults", [])), done.stdout + done.stderr
