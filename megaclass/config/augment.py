"""The options of `dataset.augment`; separate from the other sections for their number."""

from __future__ import annotations

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from megaclass.config.section import Section

# A change is listed once a test has compared it with the default reader's; any other is refused.
DALI_AUGMENT = frozenset(
    {"flip", "erase", "crop", "crop_area", "crop_aspect"}
    | {name + kind for name in ("shift", "scale", "rotation", "shear") for kind in ("", "_probability")}
)


class Augment(Section):
    """Random changes of a training image; each is drawn from (seed, visit, sample id) and nothing else."""

    flip: float = Field(0.0, ge=0, le=1, description="probability of a horizontal flip")
    shift: float = Field(0.0, ge=0, le=0.5, description="largest shift, as a share of the image side")
    shift_probability: float = Field(1.0, ge=0, le=1, description="probability that an image is shifted")
    scale: float = Field(0.0, ge=0, lt=1, description="largest relative change of size, up or down")
    scale_probability: float = Field(1.0, ge=0, le=1, description="probability that an image's size is changed")
    rotation: float = Field(0.0, ge=0, le=180, description="largest rotation, degrees, either way")
    rotation_probability: float = Field(1.0, ge=0, le=1, description="probability that an image is rotated")
    shear: float = Field(0.0, ge=0, le=60, description="largest shear, degrees, either way")
    shear_probability: float = Field(1.0, ge=0, le=1, description="probability that an image is sheared")
    crop: float = Field(0.0, ge=0, le=1, description="probability of cutting out a rectangle and enlarging it")
    crop_area: tuple[float, float] = Field((0.2, 1.0), description="smallest and largest share of the image cut out")
    crop_aspect: tuple[float, float] = Field((0.75, 1.3333), description="its smallest and largest width / height")
    brightness: float = Field(0.0, ge=0, le=1, description="largest relative change of brightness, up or down")
    contrast: float = Field(0.0, ge=0, le=1, description="largest relative change of contrast, up or down")
    saturation: float = Field(0.0, ge=0, le=1, description="largest relative change of saturation, up or down")
    hue: float = Field(0.0, ge=0, le=0.5, description="largest turn of the colour circle, as a share, either way")
    colour_probability: float = Field(1.0, ge=0, le=1, description="probability that these four change an image")
    grey: float = Field(0.0, ge=0, le=1, description="probability of taking all colour away")
    blur: float = Field(0.0, ge=0, le=1, description="probability of a Gaussian blur")
    blur_sigma: float = Field(2.0, gt=0, le=64, description="its largest standard deviation, pixels")
    low_resolution: float = Field(0.0, ge=0, le=1, description="probability of shrinking and enlarging again")
    low_resolution_scale: float = Field(0.2, gt=0, le=1, description="smallest side in between, as a share")
    jpeg: float = Field(0.0, ge=0, le=1, description="probability of compressing as JPEG")
    jpeg_quality: int = Field(30, ge=1, le=100, description="its lowest quality; the highest is 100")
    erase: float = Field(0.0, ge=0, le=1, description="probability of erasing one random rectangle")

    @field_validator("crop_area", "crop_aspect")
    @classmethod
    def _is_range(cls, value: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        low, high = value
        if not 0 < low <= high:
            raise PydanticCustomError("range", "two positive numbers are needed, the smaller one first")
        if info.field_name == "crop_area" and high > 1:
            raise PydanticCustomError("range", "no more than the whole image can be cut out; end with at most 1")
        return value

    def channel_faults(self, channels: int) -> list[str]:
        """What cannot be done to images of so many channels, in the words of the user's options."""
        given = [name for name in ("saturation", "hue", "grey") if getattr(self, name)]
        return [
            f"dataset.augment.{name} {getattr(self, name)} changes colours, and with dataset.channels 1 there are "
            "none; leave it out or use dataset.channels 3"
            for name in given
            if channels == 1
        ]


def beyond_dali(augment: Augment, reader: str) -> list[str]:
    """The names of the changes asked for that a reader of DALI's does not make; none for any other reader."""
    made = {"dali": DALI_AUGMENT, "dali-stream": ("flip",)}.get(reader, tuple(Augment.model_fields))
    return [
        name
        for name, field in Augment.model_fields.items()
        if name not in made and getattr(augment, name) != field.get_default(call_default_factory=True)
    ]
