"""What a run will look like on an inventory, before anything is taken: seats, memory, and what does not fit. Pure."""

from dataclasses import dataclass

from rlhf_ray.config.load import changed
from rlhf_ray.config.pipeline import PipelineConfig, StageConfig, stage_name
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.config.sections import ModelSection
from rlhf_ray.names import model_folder
from rlhf_ray.placement.candidates import Change
from rlhf_ray.placement.checks import OF_SEATS, Contents, Examiner, Finding, parts_on_gpu
from rlhf_ray.placement.inventory import Node
from rlhf_ray.placement.layout import Layout
from rlhf_ray.placement.memory import Estimate, Shapes
from rlhf_ray.placement.nearest import Apply, Search
from rlhf_ray.placement.plan import Plan
from rlhf_ray.placement.shapes import ModelShape, find_shape, shape_from_scratch


@dataclass(frozen=True)
class Problem:
    """Why a run would not start or would run out of memory.

    Attributes:
        finding: what does not fit.
        change: the nearest change with which it does, as overrides of the configuration; empty where none was found.
        words: both in a sentence.
        waits: whether a run would wait for it, since nodes may still come (`placement.autoscaling`).
    """

    finding: Finding
    change: Change
    words: str
    waits: bool


@dataclass(frozen=True)
class Overview:
    """One stage on an inventory.

    Attributes:
        stage: its name.
        plan: bundles by group.
        layout: node and GPUs of every process.
        estimates: peak memory of each process, by group, engines as on the smallest GPU on which one sits; groups of
            unknown models are absent.
        by_memory: the same for each size of GPU in GiB that is used.
        contents: what is on each GPU that is used, by node and GPU index.
        found: what does not fit, each with what to change.
        notes: what could not be checked.
    """

    stage: str
    plan: Plan
    layout: Layout
    estimates: dict[str, Estimate]
    by_memory: dict[float | None, dict[str, Estimate]]
    contents: dict[tuple[int, int], Contents]
    found: list[Problem]
    notes: list[str]

    @property
    def problems(self) -> list[str]:
        """Why a run would fail, in words."""
        return [problem.words for problem in self.found if not problem.waits]

    @property
    def waits(self) -> list[str]:
        """What a run would wait for, in words."""
        return [problem.words for problem in self.found if problem.waits]

    def on(self, memory_gib: float | None) -> dict[str, Estimate]:
        """Estimates of processes on GPUs of this memory."""
        return self.by_memory.get(memory_gib, self.estimates)

    def on_gpu(self, contents: Contents, memory_gib: float | None) -> dict[str, float]:
        """Estimated bytes by part on a GPU of this memory with these contents, at the turn that takes most."""
        return parts_on_gpu(contents, self.on(memory_gib))


def overviews(config: StageConfig | PipelineConfig, nodes: list[Node]) -> list[Overview]:
    """The overview of a stage, or of every stage of a pipeline."""
    if not isinstance(config, PipelineConfig):
        return [overview(config, nodes)]
    left: dict[str, ModelShape] = {}  # models that stages before leave
    outputs: dict[str, str] = {}
    found = []

    def shapes(name: str) -> ModelShape | None:
        return left.get(name) or find_shape(name)

    for name in config.stages:
        stage = config.stage_config(name, outputs)
        found.append(overview(stage, nodes, shapes, (config, dict(outputs))))
        shape = _trained_shape(stage, shapes)
        folder = str(model_folder(stage.run.dir))
        if shape is not None:
            left[folder] = shape
        outputs[name] = folder
    return found


def _trained_shape(config: StageConfig, shapes: Shapes) -> ModelShape | None:
    if isinstance(config, PPOConfig):
        return shapes(config.policy.path)
    model = config.model
    if isinstance(model, ModelSection) and model.scratch is not None:
        return shape_from_scratch(model.scratch)
    return shapes(model.path or "")


def overview(
    config: StageConfig,
    nodes: list[Node],
    shapes: Shapes = find_shape,
    within: tuple[PipelineConfig, dict[str, str]] | None = None,
) -> Overview:
    """One stage on an inventory.

    Args:
        config: the stage.
        nodes: the inventory.
        shapes: finds a model's shape.
        within: the pipeline that it is a stage of, with the folders that stages before it leave.
    """
    placement = config.placement if within is None else within[0].placement
    search = Search(config, placement, _applied(config, within), Examiner(nodes, shapes))
    state = search.state
    found = []
    for finding in state.findings:
        change = search.nearest(finding)
        named = change if within is None else _in_pipeline(config, change)
        said = f"set {', '.join(named)}" if change else search.needed(finding)
        if change and finding.kind == "lack":
            said += f", or {finding.remedy}"
        waits = state.plan.autoscaling and finding.kind in OF_SEATS
        if waits:
            said = f"{state.plan.waiting}; or {said}"
        found.append(Problem(finding, named, f"{finding.words}; {said}", waits))
    unknown = [name for name in state.plan.groups if name not in state.estimates]
    notes = [f"{name}: its memory is not known, since the model's shape or the GPU's memory is not" for name in unknown]
    return Overview(
        stage_name(config),
        state.plan,
        state.layout,
        state.estimates,
        state.by_memory,
        state.contents,
        found,
        notes,
    )


def _applied(config: StageConfig, within: tuple[PipelineConfig, dict[str, str]] | None) -> Apply:
    """The stage with a change, which in a pipeline is made there, so that it is valid where it will be written."""
    if within is None:
        return lambda change: changed(config, change)
    pipeline, outputs = within
    return lambda change: changed(pipeline, _in_pipeline(config, change)).stage_config(stage_name(config), outputs)


def _in_pipeline(config: StageConfig, change: Change) -> Change:
    """Overrides of a stage as those of the pipeline, which has placement once and all else below the stage's name."""
    name = stage_name(config)
    return tuple(one if one.startswith("placement.") else f"{name}.{one}" for one in change)
