"""The evaluation's layout, the choice of protocols, and the table for people."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from rich.console import Console

from megaclass.config import Evaluate
from megaclass.errors import ConfigError, NumericError
from megaclass.evaluate.judge import PROTOCOLS, judge, lookup, source_number, table
from megaclass.evaluate.similarity import unit_length

LABELS = np.arange(42).repeat(7)
SOURCES = np.tile(np.arange(7), 42)
GROUPS = ["left"] * 21 + ["right"] * 21


def _random(n, dim=7, seed=0):
    return unit_length(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)))


def _shown(results):
    console = Console(file=io.StringIO(), width=120)
    console.print(table(results))
    return console.file.getvalue()


def test_the_evaluation_has_the_layout_of_the_interface():
    outcome = judge(_random(294), LABELS, SOURCES, GROUPS, PROTOCOLS, 3)
    assert set(outcome) == {"verification", "identification", "retrieval", "one_shot"}
    assert {"accuracy", "accuracy_std", "tar_at_far", "eer"} <= set(outcome["verification"])
    assert set(outcome["verification"]["tar_at_far"]) == {"1e-2", "1e-3", "1e-4"}
    assert {"rank_1", "rank_5"} <= set(outcome["identification"])
    assert {"recall_at_1", "recall_at_5", "recall_at_10", "map"} <= set(outcome["retrieval"])
    assert isinstance(outcome["one_shot"]["20"], float)
    assert json.loads(json.dumps(outcome, allow_nan=False)) == outcome
    for section in outcome.values():
        for name, value in {**section, **section.get("tar_at_far", {})}.items():
            assert type(value) in (float, int, bool, dict), name
            assert name.startswith("num_") or not isinstance(value, float) or 0 <= value <= 1


def test_only_what_is_asked_for_is_judged():
    assert judge(_random(294), LABELS, SOURCES, None, ("retrieval",)).keys() == {"retrieval"}
    assert judge(_random(294), LABELS, SOURCES, None, ()) == {}
    assert set(PROTOCOLS) >= set(Evaluate().protocols)


def test_tensors_and_arrays_give_the_same():
    x = _random(294)
    protocols = PROTOCOLS
    tensors = judge(x, torch.from_numpy(LABELS), torch.from_numpy(SOURCES), GROUPS, protocols, 0)
    assert tensors == judge(x, LABELS, SOURCES, GROUPS, protocols, 0)


def test_what_classes_are_called_changes_nothing():
    names = np.random.default_rng(0).permutation(42)
    renamed = [GROUPS[label] for label in np.argsort(names)]
    x = _random(294)
    expected = judge(x, LABELS, SOURCES, GROUPS, PROTOCOLS, 1)
    assert judge(x, names[LABELS], SOURCES, renamed, PROTOCOLS, 1) == expected


def test_embeddings_that_are_not_finite_stop_the_evaluation():
    x = _random(294)
    x[5] = float("nan")
    with pytest.raises(NumericError, match="1 of 294 embeddings are not finite"):
        judge(x, LABELS, SOURCES, GROUPS, PROTOCOLS)


def test_source_number():
    assert source_number(["serif", "sans"], "sans") == 1
    assert source_number([], None) is None
    with pytest.raises(ConfigError, match="gallery_source 'mono' is not a source of the split; it has serif, sans"):
        source_number(["serif", "sans"], "mono")
    with pytest.raises(ConfigError, match="it has none"):
        source_number([], "mono")


def test_lookup():
    outcome = {"retrieval": {"recall_at_1": 0.5, "map": 0.25}, "verification": {"tar_at_far": {"1e-4": None}}}
    assert lookup(outcome, "retrieval.recall_at_1") == 0.5
    for metric in ("retrieval.recall", "retrieval", "verification.tar_at_far.1e-4", "one_shot.20", ""):
        with pytest.raises(
            ConfigError, match=r"best_metric .* is not among what was evaluated: retrieval\.recall_at_1"
        ):
            lookup(outcome, metric)


def test_table_shows_percent_in_the_columns_there_are():
    full = judge(_random(294), LABELS, SOURCES, GROUPS, PROTOCOLS)
    trained = {**full, "retrieval": {**full["retrieval"], "recall_at_1": 0.97815}}
    text = _shown({"pixels": {"retrieval": full["retrieval"]}, "trained": trained})
    lines = {line.split("  ")[0].strip("│ "): line for line in text.splitlines()}
    assert "97.81" in lines["retrieval: recall at 1"] or "97.82" in lines["retrieval: recall at 1"]
    assert text.index("trained") < text.index("pixels")
    assert "untrained" not in text
    assert lines["one-shot: 20 classes of one group"].rstrip("│ ").endswith("-")
    assert len(table({"trained": full, "untrained": full, "pixels": full}).columns) == 4
    assert "one-shot" not in _shown({"trained": {"retrieval": full["retrieval"]}})


def test_judging_5000_samples_is_quick():
    labels = np.arange(5000) // 25
    sources = np.arange(5000) % 25
    x = unit_length(_random(200, 128)[labels] + _random(5000, 128, seed=1))
    groups = [f"group-{label // 50}" for label in range(200)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        started = time.process_time()
        judge(x, labels, sources, groups, PROTOCOLS, 0)
        assert time.process_time() - started < 5
    finally:
        torch.set_num_threads(threads)


MEASURE = """
import resource, sys
import numpy as np, torch
from megaclass.evaluate.judge import PROTOCOLS, judge
from megaclass.evaluate.similarity import unit_length
torch.set_num_threads(1)
classes, sources = int(sys.argv[1]) // 5, 5
labels, makers = np.arange(classes).repeat(sources), np.tile(np.arange(sources), classes)
x = unit_length(torch.randn(len(labels), 16, generator=torch.Generator().manual_seed(0)))
groups = [str(label // 40) for label in range(classes)]
judge(x[:1000], labels[:1000], makers[:1000], groups, PROTOCOLS, 0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
judge(x, labels, makers, groups, PROTOCOLS, 0)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_judging_12000_samples_takes_bounded_memory():
    """All cosines at once would be 1.15 GB."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, "12000"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300e6
