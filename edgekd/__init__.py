"""edgekd: from a trained vision model to what a device runs, with the evidence.

The verbs take keywords only, never change what they are given, and read like the pipeline:

    distill → prune → quantize → export → verify → profile, or all of them: run

`check` takes anybody's ONNX file.
"""

__version__ = "0.1.0"

from edgekd.data.base import Data
from edgekd.errors import EdgekdError
from edgekd.knowledge.teachers import OnnxTeacher
from edgekd.latency.measuring import Measurement
from edgekd.network import IO, Network, Preprocessing
from edgekd.pipeline import run
from edgekd.recipe import Recipe
from edgekd.reporting.report import Report
from edgekd.runtimes.base import Artifact
from edgekd.stages.check import Check, check
from edgekd.stages.distill import distill
from edgekd.stages.export import export
from edgekd.stages.profile import profile
from edgekd.stages.prune import prune
from edgekd.stages.quantize import quantize
from edgekd.stages.verify import Parity, verify
from edgekd.target import QuantScheme, Target
from edgekd.tasks.base import Task, get_task

__all__ = [
    "IO",
    "Artifact",
    "Check",
    "Data",
    "EdgekdError",
    "Measurement",
    "Network",
    "OnnxTeacher",
    "Parity",
    "Preprocessing",
    "QuantScheme",
    "Recipe",
    "Report",
    "Target",
    "Task",
    "check",
    "distill",
    "export",
    "get_task",
    "profile",
    "prune",
    "quantize",
    "run",
    "verify",
]
