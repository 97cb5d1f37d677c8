"""The names users know, as rows of a table: objective, margin, sampler and their defaults.

Plain data. What an option does not apply to is refused here, so that no option is silently ignored.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, replace

from megaclass.errors import ConfigError


@dataclass(frozen=True)
class Preset:
    """One row: which parts make the loss, and the value of each option; None where it does not apply.

    Attributes:
        objective: name in the registry of objectives.
        margin_kind: `none`, `cosine` or `angle`.
        sampler: `all` rows; `classes`, a random part of the rows; `batch`, a random part of the batch.
        scale: multiplier of the cosines.
        margin: size of the margin, in cosine or in radians.
        end_point: cosine at which a dissected intra term lets go.
        sampling_rate: share of the classes, or of the batch, that is drawn.
        batch_positives: whether the batch's own classes join the drawn rows; `forced` presets cannot turn it off.
    """

    objective: str
    margin_kind: str
    sampler: str
    scale: float
    margin: float | None = None
    end_point: float | None = None
    sampling_rate: float | None = None
    batch_positives: bool | None = None
    forced: bool = False


PRESETS: dict[str, Preset] = {
    "softmax": Preset("softmax", "none", "all", scale=32.0),
    "cosface": Preset("softmax", "cosine", "all", scale=64.0, margin=0.35),
    "arcface": Preset("softmax", "angle", "all", scale=64.0, margin=0.5),
    "partial-fc": Preset(
        "softmax", "cosine", "classes", scale=64.0, margin=0.4, sampling_rate=0.1, batch_positives=True, forced=True
    ),
    "d-softmax": Preset("d-softmax", "none", "all", scale=32.0, end_point=0.9),
    "d-softmax-b": Preset("d-softmax", "none", "batch", scale=32.0, end_point=0.9, sampling_rate=1 / 16),
    "d-softmax-k": Preset(
        "d-softmax", "none", "classes", scale=32.0, end_point=0.9, sampling_rate=1 / 16, batch_positives=False
    ),
}

# float32 exponentials of unshifted logits sum safely while scale + ln(classes) stays below ln(largest float32).
LARGEST_EXPONENT = 88.0


def resolve(name: str, **options: float | bool | None) -> Preset:
    """The preset called `name` with the options that are not None put in.

    Raises:
        ConfigError: no such preset (the message names the nearest), or an option that does not apply to it.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, list(PRESETS), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"classifier.preset {name!r} does not exist{hint}; there are {', '.join(PRESETS)}")
    preset = PRESETS[name]
    given = {key: value for key, value in options.items() if value is not None}
    for key, value in given.items():
        if getattr(preset, key) is None:
            users = [other for other, row in PRESETS.items() if getattr(row, key) is not None]
            raise ConfigError(
                f"classifier.{key} {value} means nothing for preset {name!r}; leave it out, or use one of "
                f"{', '.join(users)}"
            )
    if preset.forced and given.get("batch_positives") is False:
        raise ConfigError(
            f"classifier.batch_positives cannot be turned off for {name!r}: its positives are negatives too"
        )
    return replace(preset, **given)  # type: ignore[arg-type]


def check_exponents(scale: float, num_classes: int) -> None:
    """Refuse a scale whose float32 exponentials could overflow when summed over all classes.

    Raises:
        ConfigError: with the largest scale that is safe for this class count.
    """
    largest = LARGEST_EXPONENT - math.log(num_classes)
    if scale >= largest:
        raise ConfigError(
            f"classifier.scale {scale} is unsafe for {num_classes} classes: sums of float32 exponentials need "
            f"scale < {largest:.1f}; usual are 16 to 64"
        )
