"""The planner: what a run needs in memory, flops, bytes on links and time, before anything is allocated."""

from megaclass.plan.devices import DEVICES, Device, calibrated, find
from megaclass.plan.forecast import Plan, forecast, number_of_classes
from megaclass.plan.refuse import available_bytes, check_fits

__all__ = [
    "DEVICES",
    "Device",
    "Plan",
    "available_bytes",
    "calibrated",
    "check_fits",
    "find",
    "forecast",
    "number_of_classes",
]
