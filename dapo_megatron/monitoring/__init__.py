"""What a run tells: metrics on disk, trackers, the console, alerts and the report. Rank 0 alone uses this room.

Importing it loads neither torch nor matplotlib nor rich; the parts that need them load them when they start.
"""

from dapo_megatron.monitoring.alerts import AlertBook, alerts_for
from dapo_megatron.monitoring.console import Console
from dapo_megatron.monitoring.metrics import MetricsFile, read_metrics, truncate_after
from dapo_megatron.monitoring.report import write_report
from dapo_megatron.monitoring.trackers import Tracker, check_trackers, open_trackers

__all__ = [
    "AlertBook",
    "Console",
    "MetricsFile",
    "Tracker",
    "alerts_for",
    "check_trackers",
    "open_trackers",
    "read_metrics",
    "truncate_after",
    "write_report",
]
