"""The Prometheus endpoint of one rank, and the table of metric names.

Separate because it alone knows `prometheus-client` and the names dashboards rely on. Every rank serves its own port:
adding up over ranks is Prometheus' work, costs no collective here, and shows a dead rank as `up == 0`. Labels have few
values by construction: never a class, a file or a step.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from megaclass.observe.metrics import Snapshot

logger = logging.getLogger(__name__)

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_LONG_SECONDS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

# name -> (kind, help, labels beside rank and run, histogram buckets)
_TABLE: dict[str, tuple[type[Any], str, tuple[str, ...], tuple[float, ...]]] = {
    "megaclass_step_seconds": (Histogram, "Duration of training steps, data wait included.", (), _SECONDS),
    "megaclass_data_wait_seconds": (Histogram, "Time training steps waited for data.", (), _SECONDS),
    "megaclass_checkpoint_seconds": (Histogram, "Time training stood still to save.", (), _LONG_SECONDS),
    "megaclass_samples_total": (Counter, "Samples this rank trained on.", (), ()),
    "megaclass_steps_total": (Counter, "Optimizer steps taken since this process started.", (), ()),
    "megaclass_skipped_steps_total": (Counter, "Steps left out for numbers that were not finite.", (), ()),
    "megaclass_samples_skipped_total": (Counter, "Unusable samples, replaced by others.", ("reason",), ()),
    "megaclass_loss": (Gauge, "Loss of the newest logged step.", ("term",), ()),
    "megaclass_positive_cosine_mean": (Gauge, "Mean cosine of samples to their own class.", (), ()),
    "megaclass_negative_cosine_mean": (Gauge, "Mean cosine of samples to the negatives they met.", (), ()),
    "megaclass_negative_cosine_max": (Gauge, "Largest cosine of a sample to a negative.", (), ()),
    "megaclass_end_point_cosine": (Gauge, "Cosine after the margin at which the own pull is half.", (), ()),
    "megaclass_past_end_point_ratio": (Gauge, "Share of samples past the end point, 0 to 1.", (), ()),
    "megaclass_rows_touched": (Gauge, "Classes with a gradient in the newest logged step.", (), ()),
    "megaclass_head_cpu_seconds": (
        Gauge,
        "Mean processor time per step of this rank's class layer; 0 on a GPU.",
        (),
        (),
    ),
    "megaclass_learning_rate": (Gauge, "Learning rate of a parameter group.", ("group",), ()),
    "megaclass_gradient_norm": (Gauge, "Joint gradient norm before clipping.", (), ()),
    "megaclass_step": (Gauge, "Number of the newest logged step, over all attempts.", (), ()),
    "megaclass_world_size": (Gauge, "Ranks of the run.", (), ()),
    "megaclass_gpu_memory_peak_bytes": (Gauge, "Largest GPU memory this rank has held.", (), ()),
}

# name of a monitor -> its metric
_MONITORS = {
    "negative_cosine_mean": "megaclass_negative_cosine_mean",
    "negative_cosine_max": "megaclass_negative_cosine_max",
    "end_point": "megaclass_end_point_cosine",
    "past_end_point": "megaclass_past_end_point_ratio",
    "rows_touched": "megaclass_rows_touched",
}


class Exporter:
    """Holds one rank's metrics and serves them over HTTP until closed.

    A port that cannot be had costs the metrics, never the run: a warning names it and what to change.

    Args:
        host: address to listen on.
        port: first port of the node; this rank takes `port + local_rank`, and 0 means any free one.
        rank: this rank; a label of every metric.
        world_size: number of ranks.
        run: name of the run; a label of every metric.
        local_rank: rank within the node.

    Attributes:
        port: the port listened on; None if there is none.
    """

    def __init__(self, host: str, port: int, rank: int, world_size: int, run: str, local_rank: int = 0) -> None:
        self._registry = CollectorRegistry()
        self._constant = {"rank": str(rank), "run": run}
        self._metrics: dict[str, Any] = {}
        for name, (kind, description, labels, buckets) in _TABLE.items():
            more: dict[str, Any] = {"buckets": buckets} if kind is Histogram else {}
            names = (*self._constant, *labels)
            self._metrics[name] = kind(name, description, names, registry=self._registry, **more)
            if not labels and name != "megaclass_gpu_memory_peak_bytes":
                self._at(name)  # shown from the start, so that a rate over the first scrapes is right
        self._at("megaclass_world_size").set(world_size)
        self._serve(host, port + local_rank if port else 0)

    def _serve(self, host: str, port: int) -> None:
        self.port: int | None = None
        self._server = None
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=self._registry)
            self.port = self._server.server_port
        except (OSError, OverflowError) as error:
            logger.warning(
                "metrics port %d on %s cannot be used (%s); training goes on without metrics of rank %s; choose other "
                "ports with --observe.metrics-port, or 0 for any free one",
                port,
                host,
                error,
                self._constant["rank"],
            )

    def observe_step(self, *, samples: int, step_seconds: float, data_wait_seconds: float) -> None:
        """Count one step of this rank; `samples` are this rank's own. Reads nothing from the device."""
        self._at("megaclass_steps_total").inc()
        self._at("megaclass_samples_total").inc(samples)
        self._at("megaclass_step_seconds").observe(step_seconds)
        self._at("megaclass_data_wait_seconds").observe(data_wait_seconds)

    def observe_snapshot(self, step: int, snapshot: Snapshot, learning_rates: Mapping[str, float]) -> None:
        """Show the numbers of a logged step; `learning_rates` by group, `backbone` and `classes`."""
        self._at("megaclass_step").set(step)
        for term, value in (("total", snapshot.loss), ("intra", snapshot.intra), ("inter", snapshot.inter)):
            self._at("megaclass_loss", term=term).set(value)
        self._at("megaclass_positive_cosine_mean").set(snapshot.positive_cosine)
        self._at("megaclass_head_cpu_seconds").set(snapshot.head_cpu_seconds)
        for monitor in snapshot.monitors.keys() & _MONITORS.keys():
            self._at(_MONITORS[monitor]).set(snapshot.monitors[monitor])
        if snapshot.grad_norm is not None:
            self._at("megaclass_gradient_norm").set(snapshot.grad_norm)
        for group, rate in learning_rates.items():
            self._at("megaclass_learning_rate", group=group).set(rate)

    def observe_checkpoint(self, seconds: float) -> None:
        """Note how long training stood still for one checkpoint."""
        self._at("megaclass_checkpoint_seconds").observe(seconds)

    def observe_gpu_memory(self, peak_bytes: int) -> None:
        """Show the largest GPU memory this rank has held so far."""
        self._at("megaclass_gpu_memory_peak_bytes").set(peak_bytes)

    def count_skipped_step(self) -> None:
        """Count a step that was left out because its numbers were not finite."""
        self._at("megaclass_skipped_steps_total").inc()

    def count_skipped_sample(self, reason: str) -> None:
        """Count a sample that was replaced; `reason` from the readers' small fixed set."""
        self._at("megaclass_samples_skipped_total", reason=reason).inc()

    def close(self) -> None:
        """Stop serving and free the port; a second call does nothing."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None
            self.port = None

    def _at(self, name: str, **labels: str) -> Any:
        return self._metrics[name].labels(**self._constant, **labels)
