"""How much memory each process of each group takes, by part: a pure function of configuration and model shapes.

The largest of two moments counts: the end of a forward pass, with all that the backward pass will read, and the
optimizer's update with its temporaries. `benchmarks/memory.py` holds the formulas against what runs allocate.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from rlhf_ray.config.offline import RewardConfig
from rlhf_ray.config.pipeline import StageConfig
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.config.sections import ModelSection, TrainingSection
from rlhf_ray.placement.shapes import ModelShape, find_shape, shape_from_scratch

GIB = 2**30
BYTES = {"fp32": 4, "bf16": 2}

# What a process has before it holds a model: on a GPU the CUDA context and NCCL's buffers, on a CPU the imported
# libraries (measured: trainer and scorer 0.55 GiB, vLLM 1.2 GiB).
GPU_PROCESS_GIB = 1.2
CPU_PROCESS_GIB = 0.55
CPU_ENGINE_GIB = 1.2
# DeepSpeed's defaults: elements that a reduction collects, and parameters of ZeRO-3 that stay gathered.
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000
# Logits (`models/logprobs.py`): tokens for which they are made at a time, bytes that may wait for the backward pass,
# and tokens for which they are in fp32 at a time.
LOGIT_TOKENS = 1024
KEPT_LOGIT_BYTES = 64 * 2**20
FP32_LOGIT_TOKENS = 128
# Bytes of a transfer bucket (`rollout/buckets.py`); two are under way at a time between GPUs, and on a CPU as many as
# `rollout/shared_buckets.py` has room for.
BUCKET_BYTES = 31 * 2**20
BUCKET_SLOTS = 4
GPU_BUCKET_BYTES = 64 * 2**20
# Tokens of one step of vLLM's scheduler: ours on a CPU (`rollout/engine.py`), vLLM's default on a GPU.
CPU_STEP_TOKENS = 4096
GPU_STEP_TOKENS = 2048

# All parts, in the order in which they are shown.
PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "update",
    "activations",
    "logits",
    "KV cache",
    "buffers",
    "process",
)


@dataclass(frozen=True)
class Estimate:
    """Peak memory of one process, in bytes by part.

    Attributes:
        parts: what is there at the peak; a part that is freed before it has only what is left of it then.
        on_gpu: whether it is a GPU's memory, else main memory.
        offloaded: what such a process keeps in main memory instead, bytes.
        snapshot: what it adds to main memory while a checkpoint is written, bytes.
        at_rest: what it keeps on a GPU while it is the turn of others (`placement.share`); None where it has no turns.
    """

    parts: dict[str, float]
    on_gpu: bool
    offloaded: float = 0.0
    snapshot: float = 0.0
    at_rest: float | None = None

    @property
    def total(self) -> float:
        """The sum of the parts, bytes."""
        return sum(self.parts.values())

    @property
    def in_main_memory(self) -> float:
        """Bytes of the node's main memory; the libraries of a process on a GPU are not counted."""
        return (self.offloaded if self.on_gpu else self.total) + self.snapshot


Shapes = Callable[[str], ModelShape | None]


def estimate(config: StageConfig, gpu_memory_gib: float | None, shapes: Shapes = find_shape) -> dict[str, Estimate]:
    """The peak of each group's processes (rollout: of each tensor-parallel rank).

    Args:
        config: a stage.
        gpu_memory_gib: memory of the GPUs, a share of which an engine takes; None leaves the engines out.
        shapes: finds a model's shape by name. Groups whose model it does not know are left out.
    """
    if not isinstance(config, PPOConfig):
        model = config.model
        scratch = model.scratch if isinstance(model, ModelSection) else None
        shape = shape_from_scratch(scratch) if scratch else shapes(model.path or "")
        if shape is None:
            return {}
        scalar = isinstance(config, RewardConfig)
        group = config.group
        return {"group": trainer(shape, config.training, group.processes, on_gpu=group.gpus > 0, scalar=scalar)}
    return _ppo(config, gpu_memory_gib, shapes)


def _ppo(config: PPOConfig, gpu_memory_gib: float | None, shapes: Shapes) -> dict[str, Estimate]:
    found: dict[str, Estimate] = {}
    policy = shapes(config.policy.path)
    if policy is not None:
        found["policy"] = trainer(
            policy, config.training, config.policy.processes, on_gpu=config.policy.gpus > 0, sends_weights=True
        )
        engine = _engine(config, policy, gpu_memory_gib)
        if engine is not None:
            found["rollout"] = engine
        reference = config.reference
        found["reference"] = scorer(
            [policy], reference.dtype, reference.micro_batch_tokens, on_gpu=reference.gpus > 0, scalar=False
        )
    rewards = [shapes(item.path) for item in config.reward.models]
    known = [shape for shape in rewards if shape is not None]
    if len(known) == len(rewards):
        dtype, tokens, on_gpu = config.reference.dtype, config.reference.micro_batch_tokens, config.reward.gpus > 0
        found["reward"] = scorer(known, dtype, tokens, on_gpu=on_gpu, scalar=True)
    named = {"policy": policy, "reward": rewards[0] if rewards else None}
    critic = named[config.critic.init] if config.critic.init in named else shapes(config.critic.init)
    if critic is not None:
        found["critic"] = trainer(
            critic, config.training, config.critic.processes, on_gpu=config.critic.gpus > 0, scalar=True
        )
    return _in_turns(config, found, {"policy": policy, "critic": critic})


def _in_turns(
    config: PPOConfig, found: dict[str, Estimate], shapes: dict[str, ModelShape | None]
) -> dict[str, Estimate]:
    """Where engines and trainers share GPUs: an engine that sleeps keeps its context, a trainer all but its optimizer.

    The critic scores meanwhile, and the policy sends. The optimizer's states are then in main memory.
    """
    together = {"rollout", *config.placement.partners("rollout")}
    resting = [(name, shape) for name, shape in shapes.items() if name in together and shape is not None]
    if not config.rollout.gpus or not resting:
        return found
    training, b = config.training, BYTES[config.training.dtype]
    for name, shape in resting:
        each = found[name]
        kept = sum(each.parts[part] for part in ("weights", "buffers", "process"))
        if training.zero_stage == 3:
            kept += each.parts["gradients"]
        if name == "critic":
            kept += _passing(shape, training.micro_batch_tokens) * b
        else:  # one buffer, which the largest parameter fits into
            largest = float(shape.vocab) * shape.hidden * BYTES[config.rollout.dtype]
            kept += max(GPU_BUCKET_BYTES, largest) - _in_transfer(True)
        found[name] = replace(each, offloaded=each.offloaded or each.parts["optimizer"], at_rest=kept)
    if "rollout" in found:
        found["rollout"] = replace(found["rollout"], at_rest=found["rollout"].parts["process"])
    return found


def trainer(
    shape: ModelShape,
    section: TrainingSection,
    ranks: int,
    *,
    on_gpu: bool,
    scalar: bool = False,
    sends_weights: bool = False,
) -> Estimate:
    """One rank of a DeepSpeed trainer, with AdamW.

    ZeRO keeps, of `p` parameters in `b` bytes each over `w` ranks (Rajbhandari et al., arXiv:1910.02054, figure 1; what
    DeepSpeed 0.19 adds was measured): fp32 master weights and two moments, 12p, over w from stage 1; weights and
    gradients over w in stage 3, with gathered ones beside them; temporaries of the update.
    """
    p = float(shape.scalar_parameters if scalar else shape.parameters)
    b = BYTES[section.dtype]
    stage, tokens = section.zero_stage, section.micro_batch_tokens
    share = p / ranks if stage else p
    # In fp32 without ZeRO the weights are their own master copy.
    states = share * (8 if stage == 0 and section.dtype == "fp32" else 12)
    if stage == 3:
        weights = share * b + min(p, LIVE_PARAMETERS) * b
        gradients = share * b
    else:
        weights, gradients = p * b, p * b
    # The update makes an fp32 gradient and two temporaries of a moment's size; stage 3 goes by parts.
    update = min(share, LIVE_PARAMETERS) * 12 if stage == 3 else share * (8 if stage == 0 else 12 + b) - gradients
    offloaded = 0.0
    if section.offload_optimizer and on_gpu:
        # Master weights, two moments and the gradient in fp32, as DeepSpeed's own estimators count.
        offloaded = share * 16
        states = update = 0.0
    kept = _kept(shape, section, on_gpu=on_gpu)
    forward = kept + _logits(shape, tokens, b, backward=True, scalar=scalar)
    at_update = max(update, 0.0) > forward
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": states,
        "update": max(update, 0.0) if at_update else 0.0,
        "activations": 0.0 if at_update else kept,
        "logits": 0.0 if at_update else _logits(shape, tokens, b, backward=True, scalar=scalar),
        "buffers": _buckets(p, stage, on_gpu=on_gpu) * b + (_in_transfer(on_gpu) if sends_weights else 0),
        "process": (GPU_PROCESS_GIB if on_gpu else CPU_PROCESS_GIB) * GIB,
    }
    # A checkpoint copies master weights and moments; without ZeRO rank 0 has them for all.
    return Estimate(parts, on_gpu, offloaded, snapshot=p * 12 / ranks)


def _in_transfer(on_gpu: bool) -> float:
    """Bytes of the buckets of a weight transfer, on either side of it."""
    return 2.0 * GPU_BUCKET_BYTES if on_gpu else float(BUCKET_SLOTS * BUCKET_BYTES)


def _buckets(parameters: float, stage: int, *, on_gpu: bool) -> float:
    """Elements of the buckets in which DeepSpeed reduces gradients.

    They are made whole, two of them where communication overlaps (stage 2 on a GPU). On a CPU only what is written to
    takes memory: all gradients in stage 3, which keeps its bucket; stages 1 and 2 give theirs back at once.
    """
    if on_gpu:
        return (0.0, 1.0, 2.0, 1.0)[stage] * REDUCE_BUCKET
    return min(parameters, REDUCE_BUCKET) if stage == 3 else 0.0


def scorer(shapes: list[ModelShape], dtype: str, tokens: int, *, on_gpu: bool, scalar: bool) -> Estimate:
    """One process that runs forward passes alone; several reward models share it as separate processes.

    What passes through a layer is gone when the logits are made, of the last layer's output alone.
    """
    b = BYTES[dtype]
    passing = [_passing(s, tokens) * b for s in shapes]
    logits = [tokens * s.hidden * b + _logits(s, tokens, b, backward=False, scalar=scalar) for s in shapes]
    parts = {
        "weights": sum(float(s.scalar_parameters if scalar else s.parameters) for s in shapes) * b,
        "activations": sum(passing),
        "logits": sum(max(0.0, later - earlier) for earlier, later in zip(passing, logits, strict=True)),
        "process": max(1, len(shapes)) * (GPU_PROCESS_GIB if on_gpu else CPU_PROCESS_GIB) * GIB,
    }
    return Estimate(parts, on_gpu)


def _engine(config: PPOConfig, shape: ModelShape, gpu_memory_gib: float | None) -> Estimate | None:
    """One tensor-parallel rank of an engine. On a GPU it takes its share whatever the model; the cache has the rest."""
    rollout = config.rollout
    on_gpu = rollout.gpus > 0
    b = BYTES[rollout.dtype]
    # vLLM on a CPU packs every matrix for its kernels; the embedding and the output's keep what was packed beside it.
    copied = 0 if on_gpu else 2 * shape.vocab * shape.hidden
    weights = float(shape.parameters + copied) * b / rollout.tensor_parallel
    longest = config.data.max_tokens + rollout.max_new_tokens
    step = GPU_STEP_TOKENS if on_gpu else max(longest, CPU_STEP_TOKENS)
    activations = float(_passing(shape, step)) * b / rollout.tensor_parallel
    if not on_gpu:
        cache, process = (rollout.kv_cache_gib or 0.0) * GIB, CPU_ENGINE_GIB * GIB
    elif gpu_memory_gib is None:
        return None
    else:
        process = GPU_PROCESS_GIB * GIB
        taken = rollout.gpu_memory_utilization * gpu_memory_gib * GIB
        cache = (
            rollout.kv_cache_gib * GIB
            if rollout.kv_cache_gib
            else max(taken - weights - activations - _in_transfer(on_gpu) - process, 0.0)
        )
    parts = {
        "weights": weights,
        "activations": activations,
        "KV cache": cache,
        "buffers": _in_transfer(on_gpu),  # one is loaded while the next arrives
        "process": process,
    }
    return Estimate(parts, on_gpu)


def cache_bytes_per_token(config: PPOConfig, shape: ModelShape) -> float:
    """Key-value cache of one token on one tensor-parallel rank, bytes."""
    return 2.0 * shape.layers * shape.kv_width * BYTES[config.rollout.dtype] / config.rollout.tensor_parallel


def _kept(shape: ModelShape, section: TrainingSection, *, on_gpu: bool) -> float:
    """Bytes that one forward pass keeps for its backward pass."""
    tokens = float(section.micro_batch_tokens)
    layer = tokens * _kept_in_layer(shape, section.dtype, on_gpu=on_gpu)
    if not section.gradient_checkpointing:
        return shape.layers * layer
    return shape.layers * tokens * shape.hidden * BYTES[section.dtype] + layer


def _kept_in_layer(shape: ModelShape, dtype: str, *, on_gpu: bool) -> float:
    """Bytes a token that one layer keeps: inputs of norms and matrices, of attention and of the activation function.

    In bf16 a norm computes in fp32 and keeps its input so, as attention does on a CPU.
    """
    h, a, kv = shape.hidden, shape.attention_width, shape.kv_width
    feed_forward = (4 if shape.gated else 3) * shape.intermediate
    if dtype == "fp32":
        return 4.0 * (6 * h + 3 * a + 2 * kv + feed_forward)
    attention = (3 * a + 2 * kv) if on_gpu else (5 * a + 4 * kv)
    return 2.0 * (8 * h + attention + feed_forward)


def _passing(shape: ModelShape, tokens: int) -> float:
    """Elements that a forward pass holds at its widest, where nothing is kept."""
    return float(tokens) * (3 * shape.hidden + (3 if shape.gated else 2) * shape.intermediate)


def _logits(shape: ModelShape, tokens: int, b: int, *, backward: bool, scalar: bool) -> float:
    """Bytes of the logits that exist at a time, and of the block of them that is in fp32, with its softmax."""
    if scalar:
        return 0.0
    a_token = float(shape.vocab * b)
    made = min(tokens, LOGIT_TOKENS) * a_token
    kept = max(made, min(tokens * a_token, KEPT_LOGIT_BYTES)) if backward else made
    return kept + min(tokens, FP32_LOGIT_TOKENS) * float(shape.vocab) * 12
