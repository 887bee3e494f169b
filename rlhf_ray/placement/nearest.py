"""The nearest change with which something fits: what is tried, examined as a whole before it is proposed. Pure."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from rlhf_ray.config.pipeline import StageConfig
from rlhf_ray.config.sections import PlacementSection
from rlhf_ray.errors import ConfigError
from rlhf_ray.placement.candidates import Change, changes
from rlhf_ray.placement.checks import Examiner, Finding, State
from rlhf_ray.placement.inventory import Node
from rlhf_ray.placement.memory import GIB

# Memory in GiB of the GPUs that there are, tried where no change of the configuration fits.
GPU_SIZES_GIB = (15.0, 22.5, 31.5, 39.5, 44.5, 79.6, 94.0, 140.4, 178.4, 268.0)
# How many more nodes are tried.
MORE_NODES = (1, 2, 4, 8, 16, 32, 64, 128)
MOST_KINDS = 4
# How many times as large a cluster is looked at for what only shows once everybody has a seat.
MOST_TIMES = 4

Apply = Callable[[Change], StageConfig]


class Search:
    """Finds changes of one configuration.

    A change is proposed where the configuration is valid with it, what it is proposed against is gone, and nothing
    fails that did not before.
    """

    def __init__(self, config: StageConfig, placement: PlacementSection, apply: Apply, examiner: Examiner) -> None:
        """
        Args:
            config: the stage.
            placement: where processes may go, with what it says of other stages.
            apply: the stage with overrides; raises ConfigError where they are wrong.
            examiner: of the inventory.
        """
        self._config = config
        self._placement = placement
        self._apply = apply
        self._examiner = examiner
        self._seen: dict[Change, State | None] = {}
        examined = examiner.examine(config)
        assert examined is not None  # everything is allowed
        self.state: State = examined
        # What fails now may go on to fail, but by no more; and so may what only shows once everybody has a seat.
        self._known = {finding.about: finding.amount for finding in self._with_seats_for_all()}
        self._known |= {finding.about: finding.amount for finding in self.state.findings}

    def _with_seats_for_all(self) -> list[Finding]:
        """What does not fit on so many nodes of the same kinds that nothing else is in the way."""
        plan, layout = self.state.plan, self.state.layout
        if not layout.without:
            return []
        seated = len(plan.bundles) - sum(layout.without.values())
        times = min(MOST_TIMES, math.ceil(len(plan.bundles) / max(1, seated)) + 1)
        enlarged = Examiner(self._examiner.nodes * times, self._examiner.shapes).examine(self._config)
        assert enlarged is not None  # everything is allowed
        return enlarged.findings

    def nearest(self, finding: Finding) -> Change:
        """The overrides after which a finding is gone; none where nothing was found."""
        tried = changes(
            self._config, self.state.plan, self._placement, finding, self._examiner.nodes, self._examiner.shapes
        )
        failed: dict[tuple[str, ...], Change] = {}
        for change in tried:
            if self._left_of(finding, change) == 0:
                return self._between(finding, failed.get(_keys(change)), change)
            failed[_keys(change)] = change
        # What helps a little is kept while the next ones are tried.
        together: dict[str, str] = {}
        left = finding.amount
        for change in tried:
            more = together | {override.partition("=")[0]: override for override in change}
            now = self._left_of(finding, tuple(more.values()))
            if now == 0:
                return self._least(finding, more)
            if now is not None and now < left:
                together, left = more, now
        return ()

    def _left_of(self, finding: Finding, change: Change) -> float | None:
        """What is still needed of a finding after a change: 0 where it is gone, None where the change cannot be."""
        if change not in self._seen:
            try:
                self._seen[change] = self._examiner.examine(self._apply(change), self._known)
            except ConfigError:
                self._seen[change] = None
        state = self._seen[change]
        if state is None:
            return None
        return max((one.amount or math.inf for one in state.findings if one.about == finding.about), default=0.0)

    def _between(self, finding: Finding, failed: Change | None, fits: Change) -> Change:
        """Of the same keys with other whole numbers between two changes, the one that is nearest and fits."""
        if failed is None or not (_is_count(failed) and _is_count(fits)):
            return fits
        low, high = (int(change[0].partition("=")[2]) for change in (fits, failed))
        while abs(high - low) > 1:
            middle = (low + high) // 2
            change = tuple(f"{key}={middle}" for key in _keys(fits))
            low, high = (middle, high) if self._left_of(finding, change) == 0 else (low, middle)
        return tuple(f"{key}={low}" for key in _keys(fits))

    def _least(self, finding: Finding, together: dict[str, str]) -> Change:
        """Without those overrides that are not needed."""
        for key in list(together):
            fewer = {name: override for name, override in together.items() if name != key}
            if fewer and self._left_of(finding, tuple(fewer.values())) == 0:
                together = fewer
        return tuple(together.values())

    def needed(self, finding: Finding) -> str:
        """What would be needed where no change was found, in words."""
        nodes = self._examiner.nodes
        if finding.kind == "node":
            size = math.ceil(finding.amount / GIB * 10) / 10
            return f"no change that was tried fits; {size:g} GiB of main memory there would do"
        if finding.kind == "cache" and not self.state.estimates["rollout"].on_gpu:
            size = math.ceil(finding.amount / GIB * 100) / 100
            return f"no change that was tried fits; {size:g} GiB of cache on nodes with main memory for it would do"
        if finding.kind in ("GPU", "cache"):
            return self._larger_gpus(finding)
        if finding.kind in ("size", "label"):
            what = finding.remedy or "add a node that has it"
            return f"no change that was tried fits; {what}"
        for count in MORE_NODES:
            for kind in _kinds(nodes):
                if self._gone_with([*nodes, *[kind] * count], finding):
                    plural = "s" if count > 1 else ""
                    return f"no change that was tried fits; {count} more node{plural} like {kind.name} would do"
        return f"no change that was tried fits; {finding.remedy or 'add nodes'}"

    def _larger_gpus(self, finding: Finding) -> str:
        nodes = self._examiner.nodes
        smallest = min(node.gpu_memory_gib for node in nodes if node.gpu_memory_gib is not None)
        known = finding.of if isinstance(finding.of, float) else smallest
        for size in GPU_SIZES_GIB:
            larger = [
                node.model_copy(update={"gpu_memory_gib": size}) if (node.gpu_memory_gib or size) < size else node
                for node in nodes
            ]
            if size > known and self._gone_with(larger, replace(finding, of="")):
                return f"no change that was tried fits; GPUs of {size:g} GiB would do"
        return f"no change that was tried fits, nor would GPUs of {GPU_SIZES_GIB[-1]:g} GiB"

    def _gone_with(self, nodes: Sequence[Node], finding: Finding) -> bool:
        state = Examiner(list(nodes), self._examiner.shapes).examine(self._config)
        assert state is not None  # everything is allowed
        return not any(
            one.kind == finding.kind and one.groups == finding.groups and finding.of in ("", one.of)
            for one in state.findings
        )


def _keys(change: Change) -> tuple[str, ...]:
    return tuple(override.partition("=")[0] for override in change)


def _is_count(change: Change) -> bool:
    """Whether it gives one number of processes, to one group or to all that share."""
    values = {override.partition("=")[2] for override in change}
    return len(values) == 1 and all(key.endswith((".processes", "engines")) for key in _keys(change))


def _kinds(nodes: list[Node]) -> list[Node]:
    """One node of each of the largest kinds."""
    kinds = {(node.cpus, node.gpus, tuple(sorted(node.labels.items()))): node for node in reversed(nodes)}
    return sorted(kinds.values(), key=lambda node: (-node.gpus, -node.cpus))[:MOST_KINDS]
