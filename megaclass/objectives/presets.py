"""The names users know, as rows of a table, and what a choice of options comes to.

Each loss adds its own rows in its own file. What an option does not apply to is refused here, so that no option is
silently ignored; so are combinations that make no mathematical sense, with the reason.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from megaclass.errors import ConfigError
from megaclass.objectives.courses import Course, course
from megaclass.objectives.margin import MARGINS, check_size
from megaclass.objectives.negative_map import NEGATIVE_MAPS
from megaclass.objectives.objective import OBJECTIVES, Values
from megaclass.objectives.registry import unknown


@dataclass(frozen=True)
class Preset:
    """One row: which parts make the loss, and the value of each option; None where it does not apply.

    Attributes:
        objective, margin_kind, negative_map: names in their registries.
        sampler: name in `SAMPLERS`.
        scale: multiplier of the cosines.
        margin: size of the margin, in its unit.
        end_point: cosine at which a dissected intra term lets go.
        sampling_rate: share of the classes, or of the batch, that is drawn.
        batch_positives: whether the batch's own classes join the drawn rows.
        correction: `inverse-rate` multiplies what a drawn class contributes by 1 / its probability of being drawn.
        draw: `stratified` or `uniform`: one class from each of equal ranges, or every subset alike.
        num_neighbours: nearest classes of each of the batch's classes that join the drawn rows.
        rebuild_every: steps between two searches for them.
        hyper: the parts' own hyper-parameters.
        schedule: how scale, margin, end point, rate and learning rate move.
    """

    objective: str
    margin_kind: str = "none"
    negative_map: str = "identity"
    sampler: str = "all"
    scale: float = 32.0
    margin: float | None = None
    end_point: float | None = None
    sampling_rate: float | None = None
    batch_positives: bool | None = None
    correction: str | None = None
    draw: str | None = None
    num_neighbours: int | None = None
    rebuild_every: int | None = None
    hyper: Mapping[str, float] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)

    def values(self, share: float) -> Values:
        """The moving hyper-parameters when `share` of the run is over."""
        now = {"scale": self.scale, "margin": self.margin, "end_point": self.end_point}
        now |= {"sampling_rate": self.sampling_rate}
        now |= {name: moving.at(share) for name, moving in self.schedule.items()}
        return Values(**{name: value for name, value in now.items() if value is not None})

    def reached(self, name: str) -> list[float]:
        """All values between which an option stays during the run."""
        if name in self.schedule:
            moving: Course = self.schedule[name]
            return moving.values
        value = getattr(self, name)
        return [] if value is None else [value]


PRESETS: dict[str, Preset] = {}

# What each sampler is, and its options with their defaults.
SAMPLERS: dict[str, dict[str, Any]] = {
    "all": {},
    "classes": {"sampling_rate": 1 / 16, "batch_positives": False, "correction": "none", "draw": "stratified"},
    "partial-fc": {"sampling_rate": 1 / 16, "correction": "none", "draw": "stratified"},
    "batch": {"sampling_rate": 1 / 16},
    "positives": {},
    "hard": {
        "sampling_rate": 1 / 16, "batch_positives": True, "correction": "none", "draw": "stratified",
        "num_neighbours": 10, "rebuild_every": 1000,
    },
}  # fmt: skip
_SAMPLER_OPTIONS = {option for options in SAMPLERS.values() for option in options}
_SCHEDULED = ("scale", "margin", "end_point", "sampling_rate", "learning_rate")
# Option -> its range, for values that a schedule gives (given options are checked with the configuration).
_RANGES = {"scale": (0.0, 1024.0), "end_point": (-1.0, 2.0), "sampling_rate": (0.0, 1.0), "learning_rate": (0.0, 1e3)}

# float32 exponentials of unshifted logits sum safely while scale + ln(classes) stays below ln(largest float32).
LARGEST_EXPONENT = 88.0


def resolve(
    name: str,
    *,
    hyper: Mapping[str, float] | None = None,
    schedule: Mapping[str, tuple[str, Sequence[Sequence[float]]]] | None = None,
    **options: Any,
) -> Preset:
    """The preset called `name` with the options that are not None put in, complete and checked.

    Args:
        name: of the preset.
        hyper: hyper-parameters of the parts' own.
        schedule: option -> (shape, points).
        options: any other field of `Preset`.

    Raises:
        ConfigError: no such preset or part (the message gives the nearest), an option that does not apply, or a
            combination without sense.
    """
    if name not in PRESETS:
        raise ConfigError(unknown("classifier.preset", name, list(PRESETS)))
    given = {key: value for key, value in options.items() if value is not None}
    chosen = _with_defaults(PRESETS[name], given)
    for key, value in given.items():
        if key not in _applicable(chosen) and key not in ("objective", "margin_kind", "negative_map", "sampler"):
            users = [other for other, row in PRESETS.items() if key in _applicable(_with_defaults(row, {}))]
            raise ConfigError(
                f"classifier.{key} {value} means nothing for preset {name!r}"
                f"{' with these parts' if len(given) > 1 else ''}; leave it out, or use one of {', '.join(users)}"
            )
    moving = {key: course(f"classifier.schedule.{key}", *value) for key, value in (schedule or {}).items()}
    for key in moving:
        if key not in _SCHEDULED:
            raise ConfigError(unknown("classifier.schedule", key, list(_SCHEDULED)))
        if key in given:
            raise ConfigError(f"classifier.{key} and classifier.schedule.{key} are both given; leave one of them out")
        if key != "learning_rate" and key not in _applicable(chosen):
            raise ConfigError(f"classifier.schedule.{key} means nothing for preset {name!r}; leave it out")
    own = {key: course(f"classifier.schedule.{key}", **value) for key, value in chosen.schedule.items()}
    for key in own.keys() & given.keys():
        raise ConfigError(f"classifier.{key} moves with preset {name!r}; give classifier.schedule.{key} instead")
    chosen = replace(chosen, **given, hyper={**chosen.hyper, **(hyper or {})}, schedule={**own, **moving})
    _check_hyper(chosen)
    _check_ranges(chosen)
    _check_sense(chosen)
    return chosen


def check_exponents(preset: Preset, num_classes: int, normalisation: str = "l2") -> bool:
    """Whether sums of exponentials need each sample's maximum; False means float32 holds them as they are.

    Raises:
        ConfigError: the scale of plain cosines is unsafe, with the largest one that is not for this class count; or
            embeddings without unit length meet a margin that is an angle.
    """
    if normalisation != "l2":
        for part, name, kind in (
            ("margin", preset.margin_kind, MARGINS.find(preset.margin_kind)),
            ("objective", preset.objective, OBJECTIVES.find(preset.objective)),
        ):
            if kind.needs_angle:
                raise ConfigError(
                    f"classifier.normalisation {normalisation!r} makes no sense with {part} {name!r}: without unit "
                    "length there is no angle; use l2, or the margins none or cosine with another objective"
                )
        return True
    scale = max(preset.reached("scale"))
    negative_map = NEGATIVE_MAPS.build(preset.negative_map, preset.hyper)
    reach = max(negative_map.largest(margin) for margin in preset.reached("margin") or [0.0])
    largest = LARGEST_EXPONENT - math.log(num_classes)
    if scale * reach < largest:
        return False
    if preset.negative_map == "identity" and OBJECTIVES.find(preset.objective).is_exponential:
        raise ConfigError(
            f"classifier.scale {scale} is unsafe for {num_classes} classes: sums of float32 exponentials need "
            f"scale < {largest:.1f}; usual are 16 to 64"
        )
    return True


def check_negatives(preset: Preset, num_classes: int) -> None:
    """Refuse what leaves no negative in the whole matrix.

    That is a single class, and a rate of the classes that comes to less than half of one: a draw always has at least
    one, so a lower rate would silently be another than the one asked for. Partial-FC's rate is a quota that the batch's
    own classes fill first; below half a class it would be the sampler `positives` under another name. A draw of one
    class is legal: a sample whose own class it is has no negative in that draw, and its inter term is zero.

    Raises:
        ConfigError: with the rate and its range for this class count.
    """
    if num_classes < 2:
        raise ConfigError(
            f"the training data has {num_classes} class; at least 2 are needed, because the negatives of a sample are "
            "the other classes"
        )
    lowest = min(preset.reached("sampling_rate"), default=1.0)
    if preset.sampler != "batch" and lowest < 0.5 / num_classes:
        raise ConfigError(
            f"classifier.sampling_rate {lowest:g} is outside [0.5 / {num_classes}, 1] for {num_classes} classes: that "
            f"is less than half a class, so no negative would be drawn; 1 / {num_classes} = {1 / num_classes:.3g} "
            "draws one, classifier.sampler positives draws none"
        )


def _with_defaults(preset: Preset, given: Mapping[str, Any]) -> Preset:
    """The preset with its parts exchanged and the defaults of whatever applies to them filled in."""
    parts = {key: given[key] for key in ("objective", "margin_kind", "negative_map", "sampler") if key in given}
    chosen = replace(preset, **parts)
    if chosen.sampler not in SAMPLERS:
        raise ConfigError(unknown("classifier.sampler", chosen.sampler, list(SAMPLERS)))
    NEGATIVE_MAPS.find(chosen.negative_map)
    defaults = {"margin": MARGINS.find(chosen.margin_kind).default}
    defaults["end_point"] = OBJECTIVES.find(chosen.objective).default_end_point
    wanted: dict[str, Any] = {}
    for key, default in defaults.items():
        # A part that was exchanged brings its own default: 0.4 radians are not 0.4 in cosine.
        kept = getattr(preset, key) if chosen.margin_kind == preset.margin_kind or key != "margin" else None
        wanted[key] = None if default is None else default if kept is None else kept
    for key in _SAMPLER_OPTIONS:
        own = SAMPLERS[chosen.sampler]
        wanted[key] = None if key not in own else own[key] if getattr(preset, key) is None else getattr(preset, key)
    return replace(chosen, **wanted)


def _applicable(preset: Preset) -> set[str]:
    """The options that mean something for these parts."""
    return {row.name for row in fields(preset) if getattr(preset, row.name) is not None}


def _check_hyper(preset: Preset) -> None:
    known = sorted(
        {
            *OBJECTIVES.hyper_parameters(preset.objective),
            *MARGINS.hyper_parameters(preset.margin_kind),
            *NEGATIVE_MAPS.hyper_parameters(preset.negative_map),
        }
    )
    for key in preset.hyper:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            there = ", ".join(known) if known else "none"
            raise ConfigError(f"classifier.hyper.{key} is not a hyper-parameter of this loss{hint}; it has: {there}")
    # Each part checks the ranges of its own.
    OBJECTIVES.build(preset.objective, preset.hyper)
    MARGINS.build(preset.margin_kind, preset.hyper)
    NEGATIVE_MAPS.build(preset.negative_map, preset.hyper)


def _check_ranges(preset: Preset) -> None:
    for key, (low, high) in _RANGES.items():
        if key not in preset.schedule:
            continue
        for value in preset.reached(key):
            if not low < value <= high:
                raise ConfigError(f"classifier.schedule.{key} reaches {value}, which is outside ({low:g}, {high:g}]")
    for margin in preset.reached("margin"):
        check_size(MARGINS.build(preset.margin_kind, preset.hyper), margin)
    for value in preset.reached("sampling_rate"):
        if not 0 < value <= 1:
            raise ConfigError(f"classifier.sampling_rate {value} is outside (0, 1]; usual are 1/4 to 1/256")


def _check_sense(preset: Preset) -> None:
    objective = OBJECTIVES.find(preset.objective)
    if preset.sampler == "batch" and objective.needs_positive:
        raise ConfigError(
            f"classifier.sampler 'batch' makes no sense with objective {preset.objective!r}: its one term is "
            "entangled, so the samples left out would have no loss at all; use a dissected objective (d-softmax, "
            "sphereface2, uniface, sface) or a smaller batch"
        )
    if not objective.is_exponential and preset.negative_map != "identity":
        raise ConfigError(
            f"classifier.negative_map {preset.negative_map!r} makes no sense with objective {preset.objective!r}, "
            "which is a sum over classes with a function of its own; leave it out"
        )
