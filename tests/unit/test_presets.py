"""Presets: what a name and its options come to, and what is refused, with the value and the range."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from megaclass import loss
from megaclass.errors import ConfigError
from megaclass.objectives import MARGINS, NEGATIVE_MAPS, OBJECTIVES, PRESETS, presets
from megaclass.objectives.presets import SAMPLERS, resolve


def refusal(name: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what a preset comes to -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_complete_and_makes_a_loss(name: str) -> None:
    preset = resolve(name)
    built = loss.build(preset, 1_003, seed=0)
    assert isinstance(built.objective, OBJECTIVES.find(preset.objective))
    assert isinstance(built.margin, MARGINS.find(preset.margin_kind))
    assert isinstance(built.negative_map, NEGATIVE_MAPS.find(preset.negative_map))
    assert (preset.margin is None) == (built.margin.default is None)
    assert (preset.end_point is None) == (built.objective.default_end_point is None)
    for option in {option for options in SAMPLERS.values() for option in options}:
        assert (getattr(preset, option) is None) == (option not in SAMPLERS[preset.sampler]), option


@pytest.mark.parametrize(
    ("name", "scale", "margin"),
    [
        ("normface", 20, None), ("cosface", 64, 0.35), ("arcface", 64, 0.5), ("partial-fc", 64, 0.4),
        ("adaface", 64, 0.4), ("magface", 64, 0.45), ("elasticface-arc", 64, 0.5), ("elasticface-cos", 64, 0.35),
        ("curricularface", 64, 0.5), ("circle", 256, 0.25), ("sphereface2", 40, 0.4), ("sphereface-r", 30, 0.5),
        ("uniface", 64, 0.4), ("sface", 64, None), ("combined-margin", 64, 0.3),
    ],
)  # fmt: skip
def test_defaults_are_those_of_the_papers(name: str, scale: float, margin: float | None) -> None:
    assert (resolve(name).scale, resolve(name).margin) == (scale, margin)


def test_given_options_replace_those_of_the_preset() -> None:
    preset = resolve("d-softmax-k", sampling_rate=0.25, end_point=None, batch_positives=False, scale=20.0)
    assert (preset.sampling_rate, preset.end_point, preset.batch_positives, preset.scale) == (0.25, 0.9, False, 20.0)
    assert PRESETS["d-softmax-k"].sampling_rate == 1 / 16


def test_an_exchanged_part_brings_its_own_defaults() -> None:
    """0.4 in cosine are not 0.4 radians."""
    preset = resolve("cosface", margin_kind="angle", objective="d-softmax", sampler="hard")
    assert (preset.margin, preset.end_point, preset.sampling_rate) == (0.5, 0.9, 1 / 16)
    assert (preset.batch_positives, preset.num_neighbours, preset.rebuild_every) == (True, 10, 1000)
    assert resolve("arcface", margin_kind="none").margin is None
    assert resolve("d-softmax-k", sampler="all").sampling_rate is None
    assert resolve("partial-fc", margin_kind="cosine").margin == 0.4


def test_hyper_parameters_reach_the_part_they_belong_to() -> None:
    built = loss.build(resolve("so-softmax", hyper={"negative_goal": 0.1, "positive_goal": 0.9}), 13, seed=0)
    assert built.margin == MARGINS.build("quadratic", {"positive_goal": 0.9}) != MARGINS.build("quadratic")
    assert built.negative_map == NEGATIVE_MAPS.build("quadratic", {"negative_goal": 0.1})
    sphereface2 = loss.build(resolve("sphereface2", hyper={"exponent": 2.0}), 13, seed=0)
    assert (sphereface2.objective, sphereface2.margin) == (
        OBJECTIVES.build("sphereface2", {"exponent": 2.0}),
        MARGINS.build("sphereface2", {"exponent": 2.0}),
    )


def test_schedules_move_what_they_name() -> None:
    preset = resolve(
        "d-softmax-k",
        schedule={"sampling_rate": ("linear", [[0.0, 1.0], [1.0, 0.5]]), "end_point": ("step", [[0.5, 0.7]])},
    )
    assert preset.values(0.5).sampling_rate == 0.75
    assert preset.values(0.5).end_point == 0.7
    assert preset.reached("sampling_rate") == [1.0, 0.5]
    assert preset.reached("scale") == [32.0]
    assert preset.reached("margin") == []


def test_a_schedule_of_a_preset_can_be_replaced() -> None:
    preset = resolve("heated-up", schedule={"scale": ("linear", [[0.0, 16.0], [1.0, 1.0]])})
    assert preset.values(1.0).scale == 1.0
    assert preset.values(1.0).learning_rate == 0.1


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("partialfc", {}, "classifier.preset 'partialfc' does not exist; did you mean 'partial-fc'?; there are "),
        ("softmax", {"objective": "d-sofmax"}, "classifier.objective 'd-sofmax' does not exist; did you mean 'd-soft"),
        ("softmax", {"margin_kind": "angels"}, "classifier.margin_kind 'angels' does not exist; did you mean 'angle'?"),
        ("softmax", {"negative_map": "quad"}, "classifier.negative_map 'quad' does not exist; did you mean 'quadratic"),
        ("softmax", {"sampler": "class"}, "classifier.sampler 'class' does not exist; did you mean 'classes'?; there"),
        ("softmax", {"sampler": "xyz"}, "classifier.sampler 'xyz' does not exist; there are all, classes, partial-fc"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, options: dict[str, str], message: str) -> None:
    assert refusal(name, **options).startswith(message)


def test_an_unknown_hyper_parameter_is_refused_with_the_nearest_and_all_there_are() -> None:
    assert refusal("so-softmax", hyper={"positiv_goal": 1.0}) == (
        "classifier.hyper.positiv_goal is not a hyper-parameter of this loss; did you mean 'positive_goal'?; it has: "
        "negative_goal, negative_weight, positive_goal, positive_weight"
    )
    assert refusal("softmax", hyper={"exponent": 3.0}).endswith("of this loss; it has: none")


def test_an_unknown_schedule_is_refused_with_the_nearest() -> None:
    """Also for an option that exists but cannot move."""
    message = refusal("softmax", schedule={"scales": ("step", [[0, 1.0]])})
    assert message.startswith("classifier.schedule 'scales' does not exist; did you mean 'scale'?; there are scale, ")
    message = refusal("d-softmax-k", schedule={"batch_positives": ("step", [[0, 1.0]])})
    assert message.startswith("classifier.schedule 'batch_positives' does not exist; there are scale, margin, ")


# --- options without a meaning ----------------------------------------------------------------------------------------


def test_options_that_mean_nothing_for_a_preset_are_refused_with_those_that_have_them() -> None:
    assert refusal("arcface", end_point=0.8) == (
        "classifier.end_point 0.8 means nothing for preset 'arcface'; leave it out, or use one of d-softmax, "
        "d-softmax-b, d-softmax-k, so-d-softmax"
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("softmax", {"margin": 0.3}, "classifier.margin 0.3 means nothing for preset 'softmax'; leave it out, or use "),
        ("d-softmax", {"sampling_rate": 0.5}, "classifier.sampling_rate 0.5 means nothing for preset 'd-softmax'; "),
        ("partial-fc", {"batch_positives": False}, "classifier.batch_positives False means nothing for preset 'part"),
        ("d-softmax-b", {"correction": "none"}, "classifier.correction none means nothing for preset 'd-softmax-b'; "),
        (
            "d-softmax-k", {"sampler": "all", "draw": "uniform"},
            "classifier.draw uniform means nothing for preset 'd-softmax-k' with these parts; leave it out, or use",
        ),
        (
            "d-softmax-k", {"objective": "softmax", "end_point": 0.5},
            "classifier.end_point 0.5 means nothing for preset 'd-softmax-k' with these parts; leave it out",
        ),
    ],
)  # fmt: skip
def test_no_option_is_silently_ignored(name: str, options: dict[str, Any], message: str) -> None:
    assert refusal(name, **options).startswith(message)


@pytest.mark.parametrize(
    "option", [row.name for row in fields(presets.Preset) if row.name not in ("hyper", "schedule")]
)
def test_every_option_is_taken_or_refused_by_every_preset(option: str) -> None:
    given = {
        "objective": "d-softmax", "margin_kind": "cosine", "negative_map": "identity", "sampler": "all", "scale": 3.5,
        "margin": 0.11, "end_point": 0.77, "sampling_rate": 0.33, "batch_positives": True, "correction": "none",
        "draw": "uniform", "num_neighbours": 3, "rebuild_every": 7,
    }[option]  # fmt: skip
    taken = 0
    for name in PRESETS:
        try:
            assert getattr(resolve(name, **{option: given}), option) == given
            taken += 1
        except ConfigError as error:
            assert option in str(error)  # noqa: PT017
    assert taken > 0 or option in ("num_neighbours", "rebuild_every")


# --- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "schedule", "options", "message"),
    [
        (
            "softmax", {"scale": ("quadratic", [[0, 1.0]])}, {},
            "classifier.schedule.scale.shape 'quadratic' does not exist; there are step, linear, cosine",
        ),
        (
            "softmax", {"scale": ("linear", [[0.5, 16.0], [0.25, 4.0]])}, {},
            "classifier.schedule.scale.points [[0.5, 16.0], [0.25, 4.0]]: the point at 0.25 ends before it starts, at "
            "0.5; shares of the run must rise",
        ),
        (
            "softmax", {"margin": ("step", [[0, 0.1]])}, {},
            "classifier.schedule.margin means nothing for preset 'softmax'; leave it out",
        ),
        (
            "softmax", {"scale": ("step", [[0, 4.0]])}, {"scale": 16.0},
            "classifier.scale and classifier.schedule.scale are both given; leave one of them out",
        ),
        (
            "heated-up", {}, {"scale": 20.0},
            "classifier.scale moves with preset 'heated-up'; give classifier.schedule.scale instead",
        ),
        (
            "softmax", {"scale": ("linear", [[0, 16.0], [1, 0.0]])}, {},
            "classifier.schedule.scale reaches 0.0, which is outside (0, 1024]",
        ),
        (
            "d-softmax", {"end_point": ("linear", [[0, 0.9], [1, 2.5]])}, {},
            "classifier.schedule.end_point reaches 2.5, which is outside (-1, 2]",
        ),
        (
            "d-softmax-k", {"sampling_rate": ("linear", [[0, 1.5], [1, 0.5]])}, {},
            "classifier.schedule.sampling_rate reaches 1.5, which is outside (0, 1]",
        ),
        (
            "softmax", {"learning_rate": ("step", [[0, -1.0]])}, {},
            "classifier.schedule.learning_rate reaches -1.0, which is outside (0, 1000]",
        ),
        (
            "cosface", {"margin": ("linear", [[0, 0.1], [1, 1.2]])}, {},
            "classifier.margin 1.2 is outside [0, 1] (in cosine); usual are 0.3 to 0.5",
        ),
    ],
)  # fmt: skip
def test_a_schedule_without_sense_is_refused(
    name: str, schedule: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    assert refusal(name, schedule=schedule, **options) == message


# --- ranges and combinations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosface", {"margin": 1.5}, "classifier.margin 1.5 is outside [0, 1] (in cosine); usual are 0.3 to 0.5"),
        ("arcface", {"margin": 2.0}, "classifier.margin 2.0 is outside [0, 1.571] (radians); usual are 0.3 to 0.5"),
        ("d-softmax-k", {"sampling_rate": 0.0}, "classifier.sampling_rate 0.0 is outside (0, 1]; usual are 1/4 to 1/2"),
        ("d-softmax-b", {"sampling_rate": 1.1}, "classifier.sampling_rate 1.1 is outside (0, 1]; usual are 1/4 to 1/2"),
        ("so-softmax", {"hyper": {"negative_weight": 0.0}}, "classifier.hyper.negative_weight 0 is outside (0, inf)"),
        ("sphereface2", {"hyper": {"positive_share": 1.0}}, "classifier.hyper.positive_share 1 is outside (0, 1)"),
        ("sphereface2", {"hyper": {"exponent": -1.0}}, "classifier.hyper.exponent -1 is outside (0, inf)"),
        ("magface", {"hyper": {"smallest_norm": 0.0}}, "classifier.hyper.smallest_norm 0 is outside (0, 110)"),
        ("magface", {"margin": 0.9}, "classifier.margin 0.9 is outside [0, 0.8] (radians); usual are 0.3 to 0.5"),
        ("magface", {"hyper": {"largest_norm": 10.0}}, "classifier.hyper.smallest_norm 10 is outside (0, 10)"),
        ("combined-margin", {"hyper": {"angle_factor": 0.0}}, "classifier.hyper.angle_factor 0 is outside (0, inf)"),
    ],
)
def test_a_value_outside_its_range_is_refused_with_the_range(name: str, options: dict[str, Any], message: str) -> None:
    assert refusal(name, **options).startswith(message)


@pytest.mark.parametrize("name", ["softmax", "arcface", "circle"])
def test_a_part_of_the_batch_with_an_entangled_loss_is_refused(name: str) -> None:
    assert refusal(name, sampler="batch").startswith(
        "classifier.sampler 'batch' makes no sense with objective 'softmax': its one term is entangled, so the samples "
        "left out would have no loss at all; use a dissected objective"
    )


@pytest.mark.parametrize("name", ["d-softmax", "sphereface2", "uniface", "sface", "so-d-softmax"])
def test_a_part_of_the_batch_goes_with_every_dissected_loss(name: str) -> None:
    assert resolve(name, sampler="batch").sampling_rate == 1 / 16


@pytest.mark.parametrize("name", ["sphereface2", "uniface", "sface"])
def test_a_negative_map_with_a_sum_over_classes_is_refused(name: str) -> None:
    assert refusal(name, negative_map="quadratic") == (
        f"classifier.negative_map 'quadratic' makes no sense with objective '{name}', which is a sum over classes with "
        "a function of its own; leave it out"
    )
