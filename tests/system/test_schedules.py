"""Schedules in a run: each step uses its own share of the run, nothing else, whatever the step before was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megaclass import config
from megaclass.train import build, loop
from tests.support.checkpoints import ALONE
from tests.support.training import small_config, small_dataset

STEPS = 12


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "tiny")


def results_of(dataset: Path, classifier: dict[str, Any], **optim: Any) -> list[loop.StepResult]:
    content = small_config(
        dataset, Path("never-written"), train={"steps": STEPS, "precision": "float64"},
        run={"log_every": 1},
        optim={"ema_decay": None, "warmup_steps": 0, "schedule": "constant", "lr": 0.05, **optim},
    )  # fmt: skip
    content["classifier"] = classifier
    training = build.build(config.validate(content), ALONE)
    results: list[loop.StepResult] = []
    try:
        loop.fit(training, loop.Hooks(lambda step: False, lambda batches: None, results.append))
    finally:
        training.reader.close()
    return results


def losses(results: list[loop.StepResult]) -> list[float]:
    return [float(result.output.loss.detach()) for result in results]


def moving(shape: str, *points: tuple[float, float]) -> dict[str, Any]:
    return {"shape": shape, "points": [list(point) for point in points]}


def test_a_constant_schedule_is_the_number(dataset: Path) -> None:
    plain = {"preset": "cosface", "scale": 16, "margin": 0.3}
    scheduled = {
        "preset": "cosface",
        "schedule": {name: moving("linear", (0.0, value)) for name, value in (("scale", 16.0), ("margin", 0.3))},
    }
    assert losses(results_of(dataset, scheduled)) == losses(results_of(dataset, plain))


def test_the_sampling_rate_sets_the_rows_of_each_step(dataset: Path) -> None:
    """The drawn classes, the batch's own for the intra term beside them: seen in the rows that are touched."""
    schedule = {"sampling_rate": moving("linear", (0.0, 0.1), (0.5, 1.0))}
    touched = [
        float(result.output.monitors.rows_touched)
        for result in results_of(dataset, {"preset": "d-softmax-k", "scale": 16, "schedule": schedule})
    ]
    num_own = [len({*batch.labels.tolist()}) for batch in first_labels(dataset)]
    for step, (rows, own) in enumerate(zip(touched, num_own, strict=True)):
        drawn = max(1, round(min(1.0, 0.1 + 0.9 * step / STEPS / 0.5) * 37))
        assert max(drawn, own) <= rows <= min(37, drawn + own), step
    assert touched[0] < 37.0
    assert touched[STEPS // 2 :] == [37.0] * (STEPS // 2)


def first_labels(dataset: Path) -> list[Any]:
    return [batch for result in results_of(dataset, {"preset": "softmax"}) for batch in result.batches]


def test_the_learning_rate_schedule_is_a_factor_beside_the_optimizer_s(dataset: Path) -> None:
    schedule = {"learning_rate": moving("step", (0.0, 1.0), (0.5, 0.1))}
    found = results_of(dataset, {"preset": "softmax", "schedule": schedule}, schedule="cosine", class_lr=0.2)
    plain = results_of(dataset, {"preset": "softmax"}, schedule="cosine", class_lr=0.2)
    for step, (one, other) in enumerate(zip(found, plain, strict=True)):
        factor = 1.0 if step < STEPS / 2 else 0.1
        for group in ("backbone", "classes"):
            assert math.isclose(one.learning_rates[group], factor * other.learning_rates[group], rel_tol=1e-12)
    half = STEPS // 2 + 1
    assert losses(found)[:half] == losses(plain)[:half]
    assert losses(found)[half:] != losses(plain)[half:]


def test_the_end_point_moves_when_it_should(dataset: Path) -> None:
    """The same run until then; from that step on the monitored end point and the loss are those of the new value."""
    schedule = {"end_point": moving("step", (0.0, 0.9), (0.75, 0.5))}
    found = results_of(dataset, {"preset": "d-softmax", "scale": 16, "schedule": schedule})
    plain = results_of(dataset, {"preset": "d-softmax", "scale": 16, "end_point": 0.9})
    ends = [float(result.output.monitors.end_point) for result in found]
    assert ends == pytest.approx([0.9] * 9 + [0.5] * 3)
    assert losses(found)[:9] == losses(plain)[:9]
    assert losses(found)[9] < losses(plain)[9]


def test_heated_up_is_softmax_that_is_cooled(dataset: Path) -> None:
    """Scale 16, then 4 with a tenth of the learning rate, for the last quarter."""
    heated = results_of(dataset, {"preset": "heated-up"})
    plain = results_of(dataset, {"preset": "softmax", "scale": 16})
    assert losses(heated)[:9] == losses(plain)[:9]
    assert [round(result.learning_rates["classes"], 12) for result in heated] == [0.05] * 9 + [0.005] * 3
    scheduled = {
        "scale": moving("step", (0.0, 16.0), (0.75, 4.0)),
        "learning_rate": moving("step", (0, 1), (0.75, 0.1)),
    }
    assert losses(results_of(dataset, {"preset": "softmax", "schedule": scheduled})) == losses(heated)
