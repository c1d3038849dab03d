"""Metrics for Prometheus: what is counted, how it is named, and where it is served."""

from pgofflined.metrics.collector import Metrics
from pgofflined.metrics.http import MetricsServer

__all__ = ["Metrics", "MetricsServer"]
