"""The memory estimate: literal sums, shapes against transformers' models, and what is said when it does not fit."""

from dataclasses import replace

import pytest
import torch
from test_models_packed import ARCHITECTURES, tiny_config
from transformers import AutoModelForCausalLM

from rlhf_ray.config import from_dict, load_config
from rlhf_ray.config.sections import TrainingSection
from rlhf_ray.models import logprobs
from rlhf_ray.placement import memory
from rlhf_ray.placement.checks import on_gpu
from rlhf_ray.placement.inventory import Node
from rlhf_ray.placement.memory import GIB, cache_bytes_per_token, estimate, scorer, trainer
from rlhf_ray.placement.overview import overview, overviews
from rlhf_ray.placement.shapes import ModelShape, find_shape, shape_from_config
from rlhf_ray.rollout import buckets, engine, shared_buckets

# 10 million parameters in matrices: a layer of 2.5, an embedding of 5.
SHAPE = ModelShape(
    parameters=10_000_000,
    hidden=100,
    layers=2,
    attention_width=100,
    kv_width=50,
    intermediate=400,
    vocab=50_000,
    gated=True,
    head_parameters=0,
    largest_layer=2_500_000,
)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_parameters_of_every_architecture_are_counted_within_a_hundredth(model_type, tied):
    grouped = model_type not in ("gpt2", "gpt_neox")
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4 if grouped else 8}
    if "head_dim" in ARCHITECTURES[model_type]:
        sizes["head_dim"] = 64
    config = tiny_config(model_type, vocab_size=4096, intermediate_size=1408, tie_word_embeddings=tied, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert shape_from_config(config.to_dict()).parameters == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768), ("meta-llama/Llama-3.3-70B-Instruct", 70_553_706_496)],
)
def test_known_public_models_have_their_published_sizes(name, parameters):
    shape = find_shape(name)
    assert shape is not None
    assert shape.parameters == pytest.approx(parameters, rel=1e-3)
    assert find_shape("someone/nothing-known") is None


def section(**options) -> TrainingSection:
    return TrainingSection(micro_batch_tokens=2, gradient_checkpointing=True, **options)


@pytest.mark.parametrize(
    ("options", "ranks", "expected"),
    [
        # fp32, no ZeRO: the weights are their own master copy, two moments beside them.
        ({"zero_stage": 0}, 2, {"weights": 40e6, "gradients": 40e6, "optimizer": 80e6, "update": 40e6}),
        # bf16, ZeRO 1 on four ranks: 12 bytes a parameter over the ranks.
        (
            {"zero_stage": 1, "dtype": "bf16"},
            4,
            {"weights": 20e6, "gradients": 20e6, "optimizer": 30e6, "update": 15e6},
        ),
        # ZeRO 3: weights and gradients over the ranks too, with gathered weights beside them.
        (
            {"zero_stage": 3, "dtype": "bf16"},
            4,
            {"weights": 5e6 + 20e6, "gradients": 5e6, "optimizer": 30e6, "update": 30e6},
        ),
        ({"zero_stage": 2, "offload_optimizer": True}, 2, {"weights": 40e6, "gradients": 40e6, "optimizer": 0.0}),
    ],
)
def test_training_states_are_sums_over_the_parameters(options, ranks, expected):
    parts = trainer(SHAPE, section(**options), ranks, on_gpu=True).parts
    assert {name: parts[name] for name in expected} == pytest.approx(expected)


def test_activations_are_those_that_the_layers_keep():
    tokens = TrainingSection(micro_batch_tokens=10_000, zero_stage=0)
    parts = trainer(SHAPE, tokens, 1, on_gpu=False).parts
    # fp32: 6 hidden + 3 attention + 2 key-value + 4 intermediate = 2600 numbers of 4 bytes, a token and layer.
    assert parts["activations"] == 2 * 10_000 * 2600 * 4
    # Those of 1024 tokens, and of 128 in fp32 thrice.
    assert parts["logits"] == 1024 * 50_000 * 4 + 128 * 50_000 * 12
    again = trainer(SHAPE, tokens.model_copy(update={"gradient_checkpointing": True}), 1, on_gpu=False).parts
    assert again["activations"] == 10_000 * (2 * 100 * 4 + 2600 * 4)
    # In bf16 norms keep two hidden vectors in fp32, and on a CPU attention keeps what it read and made so, too.
    half = tokens.model_copy(update={"dtype": "bf16"})
    assert trainer(SHAPE, half, 1, on_gpu=True).parts["activations"] == 2 * 10_000 * (2600 + 200) * 2
    assert trainer(SHAPE, half, 1, on_gpu=False).parts["activations"] == 2 * 10_000 * (2600 + 200 + 300) * 2
    # A scalar head has no logits.
    assert trainer(SHAPE, tokens, 1, on_gpu=False, scalar=True).parts["logits"] == 0.0


def test_what_passes_through_a_scorer_is_gone_when_it_makes_its_logits():
    parts = scorer([SHAPE], "fp32", 10_000, on_gpu=True, scalar=False).parts
    # A token's 3 hidden and 3 intermediate vectors; the last layer's output and logits of 1024 tokens, of 128 in fp32
    # thrice.
    passing, logits = 10_000 * 1500 * 4, 10_000 * 100 * 4 + 1024 * 50_000 * 4 + 128 * 50_000 * 12
    assert (parts["activations"], parts["logits"]) == (passing, logits - passing)
    assert parts["weights"] == 40e6
    parts = scorer([SHAPE] * 2, "bf16", 10_000, on_gpu=True, scalar=True).parts
    assert (parts["activations"], parts["logits"]) == (2 * 10_000 * 1500 * 2, 0.0)


def box(memory: float, gpus: int = 1) -> list[Node]:
    return [Node(name="box", cpus=64, gpus=gpus, gpu_memory_gib=memory, memory_gib=256)]


def test_an_engine_takes_its_share_and_the_cache_has_what_is_left():
    config = load_config("configs/one_gpu.yaml", [], "ppo")
    engine = estimate(config, 80.0)["rollout"]
    assert engine.total == pytest.approx(0.3 * 80 * GIB)
    shape = find_shape(config.policy.path)
    assert shape is not None
    assert cache_bytes_per_token(config, shape) == 2 * 24 * 128 * 2  # keys and values, layers, 2 heads of 64, bf16


def test_an_engine_on_a_cpu_packs_its_matrices_and_fills_a_step_with_prompts():
    rollout = [
        "rollout.gpus=0",
        "rollout.kv_cache_gib=2",
        "rollout.dtype=bf16",
        "data.max_tokens=5000",
        "placement.share=[]",
    ]
    config = load_config("configs/one_gpu.yaml", [*rollout, "rollout.max_new_tokens=1000"], "ppo")
    shape = find_shape(config.policy.path)
    assert shape is not None
    parts = estimate(config, None)["rollout"].parts
    # Embedding and output, which are tied, are packed twice beside what they are.
    assert parts["weights"] == 2 * (shape.parameters + 2 * shape.vocab * shape.hidden)
    # A step holds the longest sequence, as prompts are never cut; each token 3 hidden and 3 intermediate vectors.
    assert parts["activations"] == 2 * 6000 * 3 * (shape.hidden + shape.intermediate)
    assert parts["KV cache"] == 2 * GIB


def test_a_configuration_that_fits_has_no_problem_and_one_that_does_not_names_a_change_that_does():
    fits = overview(load_config("configs/one_gpu.yaml", [], "ppo"), box(80))
    assert (fits.problems, fits.notes) == ([], [])
    large = ["training.micro_batch_tokens=65536", "training.gradient_checkpointing=false"]
    (problem,) = overview(load_config("configs/one_gpu.yaml", large, "ppo"), box(80)).problems
    assert problem.startswith("GPU 0 of box: ")
    assert problem.endswith("set training.gradient_checkpointing=true")
    changed = [large[0], "training.gradient_checkpointing=true"]
    assert overview(load_config("configs/one_gpu.yaml", changed, "ppo"), box(80)).problems == []


def test_several_changes_are_named_where_none_is_enough_alone():
    (problem,) = overview(
        load_config("configs/one_gpu.yaml", ["training.micro_batch_tokens=65536"], "ppo"), box(24)
    ).problems
    named = problem.rpartition("; set ")[2].split(", ")
    assert len(named) > 1
    changes = ["training.micro_batch_tokens=65536", *named]
    assert overview(load_config("configs/one_gpu.yaml", changes, "ppo"), box(24)).problems == []


def test_an_engine_without_room_for_one_sequence_is_a_problem():
    problems = overview(
        load_config("configs/one_gpu.yaml", ["rollout.gpu_memory_utilization=0.02"], "ppo"), box(80)
    ).problems
    assert any("left for the KV cache and one sequence of 1024 tokens needs" in problem for problem in problems)


def test_an_unknown_model_is_said_and_does_not_stop_the_plan():
    found = overview(load_config("configs/one_gpu.yaml", ["policy.path=someone/unknown"], "ppo"), box(80))
    assert [note.partition(":")[0] for note in found.notes] == ["policy", "rollout", "reference", "critic"]
    assert len(found.layout.seats) == 5


def test_a_pipeline_knows_the_models_its_stages_will_leave():
    config = load_config("configs/demo.yaml", [], "pipeline")
    found = overviews(config, [Node(name="laptop", cpus=2, memory_gib=12)])
    assert [one.stage for one in found] == ["sft", "reward", "ppo"]
    assert all(one.problems == [] and one.notes == [] for one in found)


def test_main_memory_counts_for_processes_without_a_gpu():
    config = load_config("configs/demo.yaml", [], "pipeline")
    problems = overviews(config, [Node(name="tiny", cpus=2, memory_gib=2)])[2].problems
    assert len(problems) == 1 and problems[0].startswith("main memory of tiny: ")


def test_main_memory_counts_for_every_rank_of_a_tensor_parallel_engine():
    config = load_config("configs/demo.yaml", ["ppo.rollout.tensor_parallel=2"], "pipeline")
    found = overviews(config, [Node(name="tiny", cpus=2, memory_gib=2)])[2]
    two = 2 * found.estimates["rollout"].total / 2**30
    assert f"rollout {two:.1f}" in found.problems[0]


def test_main_memory_counts_for_an_offloaded_optimizer_and_the_copy_of_a_checkpoint():
    two = section(zero_stage=2, offload_optimizer=True)
    assert trainer(SHAPE, two, 2, on_gpu=True).in_main_memory == (16 + 12) * 5e6
    assert trainer(SHAPE, section(zero_stage=2), 2, on_gpu=True).in_main_memory == 12 * 5e6
    on_cpu = trainer(SHAPE, section(zero_stage=0), 1, on_gpu=False)
    assert on_cpu.in_main_memory == on_cpu.total + 12 * 1e7
    overrides = ["training.offload_optimizer=true", "training.zero_stage=2"]
    apart = load_config("configs/one_gpu.yaml", [*overrides, "placement.share=[]", "policy.gpus=1"], "ppo")

    def problems(config, memory: float) -> list[str]:
        return overview(config, [Node(name="box", cpus=64, gpus=2, gpu_memory_gib=80, memory_gib=memory)]).problems

    # Policy and critic of 0.49 billion parameters, 16 bytes each, and 12 of a copy.
    assert problems(apart, 26) == []
    (problem,) = problems(apart, 25)
    assert problem.startswith(
        "main memory of box: 25.8 GiB needed of 25.0 (policy 12.9, critic 12.9); set training.off"
    )
    # Where they rest in main memory at the engines' turn, 12 bytes each are there in any case.
    (problem,) = problems(load_config("configs/one_gpu.yaml", [], "ppo"), 22)
    assert "22.1 GiB needed of 22.0 (policy 11.0, critic 11.0); set placement.share=" in problem


def test_groups_that_take_turns_need_the_larger_of_both_turns():
    for share, turn in ((0.6, "engines"), (0.1, "trainers")):
        config = load_config("configs/one_gpu.yaml", [f"rollout.gpu_memory_utilization={share}"], "ppo")
        found = overview(config, box(80))
        ((_, contents),) = found.contents.items()
        assert dict(contents) == {"policy": 1, "critic": 1, "rollout": 1, "reference": 1, "reward": 1}
        sizes = {name: each.total for name, each in found.estimates.items()}
        rest = {name: found.estimates[name].at_rest or 0.0 for name in ("policy", "critic", "rollout")}
        p = 494_032_768
        # bf16 weights, a reduction bucket, a transfer bucket as large as the embeddings, and the process; no optimizer.
        assert rest["policy"] == pytest.approx(2 * p + 2 * 500e6 + 151_936 * 896 * 2 + 1.2 * GIB, rel=1e-3)
        assert rest["rollout"] == pytest.approx(1.2 * GIB)
        assert found.estimates["policy"].offloaded == pytest.approx(12 * p, rel=1e-3)
        always = sizes["reference"] + sizes["reward"]
        turns = {
            "engines": sizes["rollout"] + rest["policy"] + rest["critic"] + always,
            "trainers": rest["rollout"] + sizes["policy"] + sizes["critic"] + always,
        }
        assert max(turns, key=turns.__getitem__) == turn
        assert on_gpu(contents, found.estimates) == pytest.approx(turns[turn])
        together = {name: replace(each, at_rest=None) for name, each in found.estimates.items()}
        assert on_gpu(contents, together) == pytest.approx(sum(sizes.values()))


def test_a_change_that_main_memory_cannot_take_is_not_the_nearest_one():
    tight = ["training.micro_batch_tokens=1024", "rollout.gpu_memory_utilization=0.1", "training.zero_stage=1"]
    config = load_config("configs/one_gpu.yaml", tight, "ppo")
    enough = Node(name="box", cpus=64, gpus=1, gpu_memory_gib=26, memory_gib=64)
    (problem,) = overview(config, [enough]).problems
    assert "training.offload_optimizer=true" in problem
    (problem,) = overview(config, [enough.model_copy(update={"memory_gib": 23.0})]).problems
    assert "training.offload_optimizer=true" not in problem


def test_an_engine_that_no_node_can_hold_is_to_be_split_over_several():
    """A 70B model in bf16 on nodes of two GPUs of 40 GiB: two of them hold half of it."""
    config = load_config("configs/multi_node.yaml", ["rollout.tensor_parallel=2", "rollout.engines=1"], "ppo")
    shape = replace(SHAPE, parameters=70_000_000_000)
    nodes = [Node(name=f"n{i}", cpus=96, gpus=2, gpu_memory_gib=40, memory_gib=1500) for i in range(100)]
    found = overview(config, nodes, lambda _: shape).found
    (cache,) = [problem for problem in found if problem.finding.kind == "cache"]
    assert cache.change == ("rollout.tensor_parallel=4", "rollout.nodes_per_engine=2")


def test_from_dict_refuses_what_a_change_makes_wrong():
    values = load_config("configs/one_gpu.yaml", [], "ppo").model_dump(mode="json")
    assert from_dict(values, "ppo").policy.path == "Qwen/Qwen2.5-0.5B-Instruct"


def test_what_the_estimate_takes_from_modules_that_import_torch_or_ray_is_what_they_do():
    assert memory.BUCKET_BYTES == buckets.BUCKET_BYTES
    assert memory.BUCKET_SLOTS == shared_buckets.SLOTS
    assert memory.GPU_BUCKET_BYTES == buckets.GPU_BUCKET_BYTES
    assert memory.CPU_STEP_TOKENS == engine.CPU_STEP_TOKENS
    assert memory.LOGIT_TOKENS == logprobs.CHUNK_TOKENS
    assert memory.KEPT_LOGIT_BYTES == logprobs.KEPT_BYTES
    assert memory.FP32_LOGIT_TOKENS == logprobs.BLOCK_TOKENS
