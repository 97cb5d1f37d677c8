"""Losses as pure functions of two numbers per sample: the positive logit and what its negatives add up to.

No distribution and no configuration here. A loss is made of an objective (`objective.py`), a margin on the positive
cosine (`margin.py`) and a map of the negative cosines (`negative_map.py`); the names users know are rows of a table
(`presets.py`), and any of their hyper-parameters may move over the run (`courses.py`). A new loss is one file with
registered dataclasses and its preset, listed once below.
"""

from megaclass.objectives import (
    adaface,
    curricularface,
    d_softmax,
    elasticface,
    magface,
    margins,
    quadratic,
    sface,
    softmax,
    sphereface2,
    sphereface_r,
    uniface,
)
from megaclass.objectives.margin import MARGINS, Margin
from megaclass.objectives.negative_map import NEGATIVE_MAPS, NegativeMap
from megaclass.objectives.objective import OBJECTIVES, Objective, Values
from megaclass.objectives.presets import PRESETS, Preset, resolve
