"""The metrics of a PPO run's processes for Prometheus: the one place where name, unit and tags are defined.

The keys of `METRICS` are names for `ray.util.metrics`, which exports them as `exported_name` says. The dashboard
`cluster/grafana.json` shows them.
"""

from dataclasses import dataclass
from typing import Literal

RAY_PREFIX = "ray_"

# Every metric carries all of them: the group (`policy`, `rollout`, ...), the process in it (`policy-0`) and the name of
# the run directory.
TAGS = ("group", "actor", "run")

# What the values of `rlhf_state` stand for.
STATES = {1: "idle", 2: "busy"}


@dataclass(frozen=True)
class PrometheusMetric:
    """One metric.

    Attributes:
        kind: `gauge` for what goes up and down, `counter` for what only grows while its process lives.
        unit: unit of the value; "1" for a pure number.
        description: what it says, in one sentence.
        tags: its tag keys.
    """

    kind: Literal["gauge", "counter"]
    unit: str
    description: str
    tags: tuple[str, ...] = TAGS


METRICS = {
    "rlhf_state": PrometheusMetric("gauge", "1", "What the process does: a key of STATES."),
    "rlhf_weight_version": PrometheusMetric(
        "gauge", "1", "Version of the policy weights that the process holds; only policy and rollout have one."
    ),
    "rlhf_queue": PrometheusMetric(
        "gauge", "requests", "Requests handed to the process and not answered: an engine's responses, others' calls."
    ),
    "rlhf_tokens_per_second": PrometheusMetric(
        "gauge",
        "tokens/s",
        "Tokens that the process sampled, scored or trained on in its last call, or so far in the one under way, / its "
        "duration; 0 once it has had no more for half a minute.",
    ),
    "rlhf_busy_seconds_total": PrometheusMetric("counter", "s", "Time in which the process had something to do."),
    "rlhf_iterations_total": PrometheusMetric("counter", "iterations", "Iterations that the driver has finished."),
    "rlhf_responses_total": PrometheusMetric("counter", "responses", "Responses it sampled, scored or trained on."),
    "rlhf_tokens_total": PrometheusMetric("counter", "tokens", "Tokens it sampled, scored or trained on."),
    "rlhf_weight_transfers_total": PrometheusMetric(
        "counter", "transfers", "Transfers of new weights that it sent or received."
    ),
}


def exported_name(name: str) -> str:
    """The name by which Prometheus knows a metric of `METRICS`.

    Ray appends `_total` to counters without it, so theirs have it from the start.
    """
    return RAY_PREFIX + name
