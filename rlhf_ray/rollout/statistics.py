"""What vLLM's scheduler tells of an engine's work: waiting, latency, cache."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase


@dataclass
class EngineStatistics:
    """Sums since the last reset.

    Attributes:
        busy_s: seconds in which at least one request was running.
        first_token_s: from the arrival of each request to its first token, seconds, waiting included.
        latency_s: from the arrival of each request to its last token, seconds.
        kv_cache_peak: largest share of the key-value cache in use.
        preemptions: requests that lost their place in the cache and were computed again.
        prefix_queries: prompt tokens looked up in the prefix cache; `prefix_hits` were found.
    """

    busy_s: float = 0.0
    first_token_s: list[float] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    kv_cache_peak: float = 0.0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


class StatisticsLogger(StatLoggerBase):
    """Takes what vLLM reports after each scheduler step."""

    def __init__(self, vllm_config: Any = None, engine_index: int = 0) -> None:
        self._sums = EngineStatistics()
        self._running_since: float | None = None

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Add one step."""
        if scheduler_stats is not None:
            now = time.monotonic()
            if self._running_since is not None:
                self._sums.busy_s += now - self._running_since
            self._running_since = now if scheduler_stats.num_running_reqs else None
            self._sums.kv_cache_peak = max(self._sums.kv_cache_peak, scheduler_stats.kv_cache_usage)
            self._sums.prefix_queries += scheduler_stats.prefix_cache_stats.queries
            self._sums.prefix_hits += scheduler_stats.prefix_cache_stats.hits
        if iteration_stats is not None:
            self._sums.first_token_s += iteration_stats.time_to_first_tokens_iter
            self._sums.latency_s += [request.e2e_latency for request in iteration_stats.finished_requests]
            self._sums.preemptions += iteration_stats.num_preempted_reqs

    def take(self) -> dict[str, Any]:
        """The sums so far, which start again at zero."""
        sums, self._sums = self._sums, EngineStatistics()
        return asdict(sums)

    def log_engine_initialized(self) -> None:
        """Nothing to tell."""
