"""What a model's or adapter's files hold, and everything that speaks against them, told without reading a tensor.

The other readers refuse a file at its first defect; here all are told, and only a file that can't be read as what
it is raises. One module per kind of file; `record` is what they all give. Nothing in here needs torch.
"""

from converters.inspection.opening import inspect_path
from converters.inspection.record import Inspection, Module

__all__ = ["Inspection", "Module", "inspect_path"]
