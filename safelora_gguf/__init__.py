"""Keep fine-tuned local models refusing what they should: Safe LoRA for the llama.cpp/GGUF ecosystem.

The functions here do what the commands of the same names do, and return report objects:

    from safelora_gguf import project_adapter
    report = project_adapter(base, aligned, adapter, "safe.gguf")
    print(report.projected, "of", report.total, "modules projected")

Nothing heavy is imported until one of them is looked up.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from safelora_gguf._version import __version__

if TYPE_CHECKING:
    from converters.errors import Error
    from converters.inspection import Inspection, inspect_path
    from safelora_gguf.convert import ConvertReport, convert_adapter
    from safelora_gguf.demo import DemoReport, run_demo
    from safelora_gguf.extrapolate import extrapolate_models
    from safelora_gguf.extrapolate_report import ExtrapolateReport
    from safelora_gguf.merge import merge_adapters
    from safelora_gguf.merging.report import MergeReport
    from safelora_gguf.model_conversion import convert_model
    from safelora_gguf.model_conversion_report import ConvertModelReport
    from safelora_gguf.project import project_adapter
    from safelora_gguf.recipe import RunReport, read_recipe, run_recipe
    from safelora_gguf.repair import RepairReport, repair_adapter
    from safelora_gguf.report import ProjectReport
    from safelora_gguf.selection import Selection
    from safelora_gguf.smoke import SmokeReport, smoke_test
    from safelora_gguf.tune import TuneReport, tune_adapter

_HOMES = {
    "ConvertModelReport": "safelora_gguf.model_conversion_report",
    "ConvertReport": "safelora_gguf.convert",
    "DemoReport": "safelora_gguf.demo",
    "ExtrapolateReport": "safelora_gguf.extrapolate_report",
    "Error": "converters.errors",
    "Inspection": "converters.inspection",
    "MergeReport": "safelora_gguf.merging.report",
    "ProjectReport": "safelora_gguf.report",
    "RepairReport": "safelora_gguf.repair",
    "RunReport": "safelora_gguf.recipe",
    "Selection": "safelora_gguf.selection",
    "SmokeReport": "safelora_gguf.smoke",
    "TuneReport": "safelora_gguf.tune",
    "convert_adapter": "safelora_gguf.convert",
    "convert_model": "safelora_gguf.model_conversion",
    "extrapolate_models": "safelora_gguf.extrapolate",
    "inspect_path": "converters.inspection",
    "merge_adapters": "safelora_gguf.merge",
    "read_recipe": "safelora_gguf.recipe",
    "run_recipe": "safelora_gguf.recipe",
    "run_demo": "safelora_gguf.demo",
    "project_adapter": "safelora_gguf.project",
    "repair_adapter": "safelora_gguf.repair",
    "smoke_test": "safelora_gguf.smoke",
    "tune_adapter": "safelora_gguf.tune",
}

__all__ = [
    "ConvertModelReport",
    "ConvertReport",
    "DemoReport",
    "Error",
    "ExtrapolateReport",
    "Inspection",
    "MergeReport",
    "ProjectReport",
    "RepairReport",
    "RunReport",
    "Selection",
    "SmokeReport",
    "TuneReport",
    "__version__",
    "convert_adapter",
    "convert_model",
    "extrapolate_models",
    "inspect_path",
    "merge_adapters",
    "project_adapter",
    "read_recipe",
    "repair_adapter",
    "run_demo",
    "run_recipe",
    "smoke_test",
    "tune_adapter",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
