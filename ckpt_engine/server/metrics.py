"""What Prometheus asks for: counters of what has ended, gauges of what is there now.

ckpt_engine_operations_total{operation, outcome}   updates, registrations, gathers: committed or failed
ckpt_engine_update_seconds                         of committed updates
ckpt_engine_stage_seconds{stage}                   of each of their stages
ckpt_engine_update_bytes_total                     that committed updates brought to this rank's worker
ckpt_engine_deadlines_total{stage}                 operations that a deadline ended
ckpt_engine_host_bytes{checkpoint}                 registered on this rank
ckpt_engine_busy{operation}                        1: this rank is at one
ckpt_engine_progress_ratio                         of that operation's bytes
ckpt_engine_weights{state}                         1 for the state that this rank's worker is in
ckpt_engine_version_info{checkpoint, version}      1 for what it serves
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, get_args

from ckpt_engine.server.api_models import Ended, WeightsHeld
from ckpt_engine.server.operations import Operations

try:
    from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
    from prometheus_client.core import GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    from ckpt_engine.server import missing_extra

    raise missing_extra(error) from error

if TYPE_CHECKING:
    from ckpt_engine.parameter_server import ParameterServer

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Upper ends of the histograms' buckets."""
STATES = get_args(WeightsHeld.model_fields["state"].annotation)


class Metrics:
    """One rank's. `watch` is told of every operation that has ended."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._operations = Counter(
            "ckpt_engine_operations",
            "Operations that have ended",
            ["operation", "outcome"],
            registry=self._registry,
        )
        self._bytes = Counter(
            "ckpt_engine_update_bytes", "Bytes of tensors in committed updates", registry=self._registry
        )
        self._deadlines = Counter(
            "ckpt_engine_deadlines", "Operations that a deadline ended", ["stage"], registry=self._registry
        )
        self._seconds = Histogram(
            "ckpt_engine_update_seconds", "Of committed updates", buckets=SECONDS, registry=self._registry
        )
        self._stages = Histogram(
            "ckpt_engine_stage_seconds",
            "Of the stages of committed updates",
            ["stage"],
            buckets=SECONDS,
            registry=self._registry,
        )

    def watch(self, ended: Ended) -> None:
        failed = ended.error is not None and not ended.error.committed
        self._operations.labels(ended.operation, "failed" if failed else "succeeded").inc()
        if ended.error is not None and ended.error.error_type == "UpdateTimeout":
            self._deadlines.labels((ended.error.record or {}).get("stage") or "unknown").inc()
        if ended.operation == "update" and ended.version:
            self._bytes.inc(ended.nbytes)
            self._seconds.observe(ended.seconds)
            for stage, seconds in ended.stages.items():
                self._stages.labels(stage).observe(seconds)

    def show(self, ps: ParameterServer, operations: Operations) -> None:
        """Gauges of these, looked at whenever somebody asks."""
        self._registry.register(_Now(ps, operations))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return bytes(generate_latest(self._registry))


class _Now(Collector):
    def __init__(self, ps: ParameterServer, operations: Operations) -> None:
        self._ps = ps
        self._operations = operations

    def describe(self) -> list[Metric]:
        return []  # they are not looked at before somebody asks

    def collect(self) -> Iterator[Metric]:
        held = GaugeMetricFamily("ckpt_engine_host_bytes", "Registered on this rank", labels=["checkpoint"])
        for share in self._ps.checkpoints:
            held.add_metric([share.name], share.nbytes)
        yield held
        running = self._operations.running
        busy = GaugeMetricFamily("ckpt_engine_busy", "What this rank is at", labels=["operation"])
        progress = GaugeMetricFamily("ckpt_engine_progress_ratio", "Of the bytes of what this rank is at")
        if running is not None:
            busy.add_metric([running.operation], 1)
            if running.bytes_total:
                progress.add_metric([], running.bytes_done / running.bytes_total)
        yield busy
        yield progress
        weights = self._ps.weights
        state = GaugeMetricFamily("ckpt_engine_weights", "Of this rank's worker", labels=["state"])
        for each in STATES:
            state.add_metric([each], float(each == weights.state))
        yield state
        version = GaugeMetricFamily(
            "ckpt_engine_version_info", "What this rank's worker serves", labels=["checkpoint", "version"]
        )
        if weights.version is not None:
            version.add_metric([weights.checkpoint or "", weights.version], 1)
        yield version
