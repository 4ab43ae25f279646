"""The doctor: what a recipe costs on this machine, measured before it runs, and what its batch and its data advise."""

from maskwise.doctor.advice import advice
from maskwise.doctor.examination import Finding, examine
from maskwise.doctor.machine import machine

__all__ = ["Finding", "advice", "examine", "machine"]
