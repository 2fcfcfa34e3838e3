"""The one place that holds the version; read by packaging without importing anything heavy."""

__version__ = "0.1.0"
