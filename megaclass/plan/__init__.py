"""The planner: what a run needs in memory, flops, bytes on links and time, before anything is allocated."""

from megaclass.plan.devices import DEVICES, Device, calibrated, find
from megaclass.plan.forecast import Plan, forecast, number_of_classes
from megaclass.plan.machine import Machine
from megaclass.plan.machine import load as load_machine
from megaclass.plan.refuse import available_bytes, check_fits
from megaclass.plan.scale import Scaled, Scenario, scale, scenario, table
from megaclass.plan.time_cpu import CpuTime, cpu_step

__all__ = [
    "DEVICES",
    "CpuTime",
    "Device",
    "Machine",
    "Plan",
    "Scaled",
    "Scenario",
    "available_bytes",
    "calibrated",
    "check_fits",
    "cpu_step",
    "find",
    "forecast",
    "load_machine",
    "number_of_classes",
    "scale",
    "scenario",
    "table",
]
