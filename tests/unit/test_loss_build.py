"""What is refused once the number of classes is known: unsafe scales, missing angles, draws without a negative."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megaclass import loss
from megaclass.classifier import ShardedClassifier
from megaclass.errors import ConfigError
from megaclass.objectives.presets import check_exponents, resolve
from megaclass.parallel.shard import ClassShard


def test_a_scale_unsafe_for_float32_is_refused_with_the_largest_safe_one() -> None:
    assert not check_exponents(resolve("softmax", scale=64.0), 10_000_000)
    assert not check_exponents(resolve("softmax", scale=71.8), 10_000_000)
    with pytest.raises(ConfigError) as caught:
        loss.build(resolve("softmax", scale=80.0), 10_000_000, seed=0)
    assert str(caught.value) == (
        "classifier.scale 80.0 is unsafe for 10000000 classes: sums of float32 exponentials need scale < 71.9; usual "
        "are 16 to 64"
    )


def test_the_largest_scale_a_schedule_reaches_counts() -> None:
    preset = resolve("d-softmax", schedule={"scale": ("linear", [[0.0, 16.0], [0.5, 90.0], [1.0, 16.0]])})
    with pytest.raises(ConfigError, match=r"classifier.scale 90.0 is unsafe for 13 classes.*need scale < 85.4"):
        check_exponents(preset, 13)


@pytest.mark.parametrize("name", ["circle", "curricularface"])
def test_losses_with_larger_exponents_are_summed_relative_to_their_maximum(name: str) -> None:
    assert loss.build(resolve(name), 13, seed=0).use_maximum
    assert not loss.build(resolve(name, scale=16.0), 13, seed=0).use_maximum


def test_a_sum_over_classes_has_no_unsafe_scale() -> None:
    assert resolve("uniface", scale=500.0).scale == 500.0
    loss.build(resolve("uniface", scale=500.0), 13, seed=0)


@pytest.mark.parametrize(
    ("name", "part"),
    [("arcface", "margin 'angle'"), ("sphereface2", "margin 'sphereface2'"), ("sface", "objective 'sface'")],
)
def test_an_angle_without_unit_length_is_refused(name: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loss.build(resolve(name), 13, seed=0, normalisation="batch-norm")
    assert str(caught.value) == (
        f"classifier.normalisation 'batch-norm' makes no sense with {part}: without unit length there is no angle; "
        "use l2, or the margins none or cosine with another objective"
    )
    assert loss.build(resolve("softmax"), 13, seed=0, normalisation="batch-norm").use_maximum


@pytest.mark.parametrize("sampler", ["classes", "partial-fc"])
def test_a_rate_that_leaves_no_negative_is_refused_with_the_range(sampler: str) -> None:
    preset = resolve("d-softmax", sampler=sampler, sampling_rate=0.003)
    loss.build(preset, 167, seed=0)  # 0.501 of a class: one is drawn
    with pytest.raises(ConfigError) as caught:
        loss.build(preset, 166, seed=0)
    assert str(caught.value) == (
        "classifier.sampling_rate 0.003 is outside [0.5 / 166, 1] for 166 classes: that is less than half a class, so "
        "no negative would be drawn; 1 / 166 = 0.00602 draws one, classifier.sampler positives draws none"
    )


def test_the_smallest_rate_a_schedule_reaches_counts() -> None:
    preset = resolve("d-softmax-k", schedule={"sampling_rate": ("linear", [[0.0, 1.0], [0.5, 0.02], [1.0, 1.0]])})
    with pytest.raises(ConfigError, match=r"classifier.sampling_rate 0.02 is outside \[0.5 / 13, 1\] for 13 classes"):
        loss.build(preset, 13, seed=0)


def test_a_rate_of_the_batch_says_nothing_about_classes() -> None:
    loss.build(resolve("d-softmax-b", sampling_rate=0.003), 13, seed=0)


def test_one_drawn_class_is_allowed() -> None:
    """It may be a sample's own; that sample then has no negative in this draw and an inter term of zero."""
    loss.build(resolve("d-softmax-k", sampling_rate=0.3), 3, seed=0)
    loss.build(resolve("d-softmax-k", sampling_rate=0.5 / 13), 13, seed=0)


@pytest.mark.parametrize("name", ["softmax", "d-softmax-k", "uniface", "circle"])
def test_a_single_class_is_refused(name: str) -> None:
    loss.build(resolve(name), 64, seed=0)
    with pytest.raises(ConfigError) as caught:
        loss.build(resolve(name), 1, seed=0)
    assert str(caught.value) == (
        "the training data has 1 class; at least 2 are needed, because the negatives of a sample are the other classes"
    )


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"sampler": "classes", "sampling_rate": 0.25}, 0.25),
        ({"sampler": "classes", "sampling_rate": 0.25, "correction": "inverse-rate"}, 1.0),
        ({"sampler": "batch", "sampling_rate": 0.25}, 1.0),
    ],
)
def test_the_bias_begins_for_the_negatives_that_the_sum_stands_for(options: dict[str, Any], share: float) -> None:
    num_classes = 400
    made = loss.build(resolve("uniface", **options), num_classes, seed=0)
    classifier = ShardedClassifier(7, ClassShard(num_classes, 0, 1), made, seed=0, dtype=torch.float64)
    assert classifier.bias is not None
    assert classifier.bias.item() == pytest.approx(math.log(10 * share * num_classes), rel=1e-12)
