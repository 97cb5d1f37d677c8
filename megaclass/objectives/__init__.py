"""Losses as pure functions of two numbers per sample: the positive logit and the log-sum-exp of the negatives.

No distribution and no configuration here. An objective says what it does with the two numbers (`intra`, `inter`); a
margin (`margins.py`) changes the positive cosine before the scale; the names users know are rows of a table
(`presets.py`). A new loss is one file with a registered dataclass, listed once below.
"""

from megaclass.objectives import d_softmax, softmax
from megaclass.objectives.objective import Objective, build, names

__all__ = ["Objective", "build", "d_softmax", "names", "softmax"]
