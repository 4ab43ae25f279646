"""Measure what a recipe costs on this machine, advise on its settings, diagnose runs, suggest recipes."""

from maskwise.doctor.advice import advice
from maskwise.doctor.machine import describe_machine
from maskwise.doctor.measure import Measurement, measure

__all__ = ["Measurement", "advice", "describe_machine", "measure"]
