"""Networks ready for inference, whatever file they come from: one file per format, and `load`, which takes any.

network = load("best.pt", "cpu")
predictions = network(images).predictions  # (B, N, 5 + classes)
"""

from models.backends.base import Backend, Exported, ExportOptions
from models.backends.files import FORMATS, load
from models.backends.multi import DetectMultiBackend
from models.backends.pytorch import PyTorch

__all__ = ["FORMATS", "Backend", "DetectMultiBackend", "ExportOptions", "Exported", "PyTorch", "load"]
