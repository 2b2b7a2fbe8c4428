"""The demo's result: as JSON to keep, as Markdown to read, as a picture to see."""

from carpool_sim.report.model import Comparison, CurvePoint, Report, Training

__all__ = ["Comparison", "CurvePoint", "Report", "Training"]
