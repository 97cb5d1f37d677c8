"""The options of a run: `models.py` has them, by section, `file.py` reads them.

Imports nothing heavy, so that a wrong option is reported in well under two seconds.
"""

from megaclass.config.augment import Augment
from megaclass.config.dataset import Dataset, Synthetic
from megaclass.config.file import load, option_table, validate, with_defaults
from megaclass.config.models import (
    Backbone,
    Classifier,
    Config,
    Course,
    Evaluate,
    Observe,
    Optim,
    Run,
    Schedule,
    Train,
)
from megaclass.config.remote import Remote
from megaclass.config.section import Section

__all__ = [
    "Augment",
    "Backbone",
    "Classifier",
    "Config",
    "Course",
    "Dataset",
    "Evaluate",
    "Observe",
    "Optim",
    "Remote",
    "Run",
    "Schedule",
    "Section",
    "Synthetic",
    "Train",
    "load",
    "option_table",
    "validate",
    "with_defaults",
]
