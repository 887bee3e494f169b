"""`rlhf-ray bench`: measurements on the machines that a run would use."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_ray.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_ray.bench.iteration import IterationWorkload
    from rlhf_ray.config import PPOConfig

app = typer.Typer()
bench = typer.Typer(no_args_is_help=True)
ConfigFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="[CONFIG.yaml]", help="A PPO configuration; without one, a small Llama.", show_default=False
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="section.key=value", help="Changes to it.", show_default=False)
]
Out = Annotated[Path | None, typer.Option(help="JSON file to write.")]

app.add_typer(bench, name="bench", help="Measure how fast this system works here.")


@bench.command()
def rollout(
    config: ConfigFile = None,
    overrides: Overrides = None,
    engines: Annotated[str, typer.Option(help="Numbers of engines, such as 1,2,4.")] = "1",
    tensor_parallel: Annotated[str, typer.Option(help="GPUs of each engine, such as 1,2.")] = "1",
    concurrency: Annotated[str, typer.Option(help="Responses that an engine samples at a time.")] = "16,64",
    prompt: Annotated[list[str], typer.Option(help="Prompt lengths, as response lengths; may be repeated.")] = ["32"],  # noqa: B006
    response: Annotated[
        list[str],
        typer.Option(help="Tokens (128), lognormal:MEDIAN:SIGMA:LARGEST or replay:RUN; may be repeated."),
    ] = ["128"],  # noqa: B006
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of one measurement.")] = 64,
    samples: Annotated[int, typer.Option(min=1, help="Responses to each prompt.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each combination.")] = 3,
    recommend: Annotated[
        str | None, typer.Option(help="Name the best: `throughput`, or `p95=SECONDS` for the most at that latency.")
    ] = None,
    out: Out = None,
) -> None:
    """Sample with every combination of engines, concurrency and lengths, beside vLLM alone in the same run.

    Weights are random: the folder that `policy.path` names needs a config.json alone.
    """
    import tempfile

    from rich.console import Console

    from rlhf_ray.bench import report
    from rlhf_ray.bench.cells import as_values, rollout_cells
    from rlhf_ray.bench.rollout import Sweep, bench_rollout
    from rlhf_ray.bench.workload import parse_lengths

    sweep = Sweep(
        engines=_numbers(engines, "--engines"),
        tensor_parallel=_numbers(tensor_parallel, "--tensor-parallel"),
        concurrency=_numbers(concurrency, "--concurrency"),
        prompts=[parse_lengths(text, "--prompt") for text in prompt],
        responses=[parse_lengths(text, "--response") for text in response],
        num_prompts=prompts,
        samples=samples,
        repeats=repeats,
    )
    if recommend is not None:
        report.parse_goal(recommend)
    with tempfile.TemporaryDirectory(prefix="rlhf-ray-bench-") as folder:
        loaded = _config(config, overrides or [], Path(folder), max(sweep.engines))
        console = Console(highlight=False)
        rows: list[dict[str, Any]] = []
        with report.measured_cluster(loaded.run.ray_address) as nodes:
            found = report.circumstances(nodes)
            for row in bench_rollout(loaded, sweep):
                rows.append(row)
                rate, share = row["generated_tokens_per_s"]["median"], row["share_of_bare"]["median"]
                typer.echo(
                    f"{row['engines']} engines, {row['max_concurrency']} at once, prompt {row['prompt_tokens']}, "
                    f"response {row['response_tokens']}: {rate:.0f} tokens/s, {share:.2f} of bare vLLM",
                    err=True,
                )
        (console if console.is_terminal else Console(highlight=False, width=200)).print(
            report.table(rows, "GPU" if loaded.rollout.gpus else "core")
        )
        if out is not None:
            settings = {
                "config": report.without_folder(loaded, folder),
                "prompts": prompts,
                "samples": samples,
                "repeats": repeats,
            }
            cells = as_values(rollout_cells(loaded, rows))
            report.write(out, {"benchmark": "rollout", **found, **settings, "rows": rows, "cells": cells})
    if recommend is not None:
        best = report.recommend(rows, recommend)
        keys = ("engines", "tensor_parallel", "max_concurrency")
        typer.echo("best: " + " ".join(f"rollout.{key}={best[key]}" for key in keys))


@bench.command()
def iteration(
    overrides: Overrides = None,
    workload: Annotated[str, typer.Option(help="w1, w2 or w3; see docs/performance.md.")] = "w1",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    repeats: Annotated[int, typer.Option(min=1, help="Iterations that are measured, after one that warms up.")] = 5,
    out: Out = None,
) -> None:
    """Run iterations of PPO on random weights, beside the bare work of vLLM and torch on the same cores."""
    from rlhf_ray.bench import report
    from rlhf_ray.bench.iteration import bench_iteration

    with _measured(None, overrides or [], workload, dtype, repeats) as (config, found, chosen):
        row = bench_iteration(config, chosen)
        typer.echo(report.iteration_lines(workload, dtype, row))
        if out is not None:
            report.write(out, {"benchmark": "iteration", **found, "max_staleness": config.ppo.max_staleness, **row})


@bench.command()
def transfer(
    config: ConfigFile = None,
    overrides: Overrides = None,
    workload: Annotated[str, typer.Option(help="Whose model to take without a configuration.")] = "w3",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16, without a configuration.")] = "fp32",
    repeats: Annotated[int, typer.Option(min=1, help="Transfers that are measured, after one that warms up.")] = 10,
    out: Out = None,
) -> None:
    """Send the policy's weights to the engines, beside one copy of the same bytes in memory."""
    from rlhf_ray.bench import report
    from rlhf_ray.bench.cells import as_values, transfer_cells
    from rlhf_ray.bench.transfer import bench_transfer

    with _measured(config, overrides or [], workload, dtype, repeats) as (loaded, found, _):
        row = bench_transfer(loaded, repeats)
        typer.echo(report.transfer_lines(row))
        if out is not None:
            report.write(
                out, {"benchmark": "transfer", **found, **row, "cells": as_values(transfer_cells(loaded, row))}
            )


@bench.command()
def packing(
    config: ConfigFile = None,
    overrides: Overrides = None,
    workload: Annotated[str, typer.Option(help="Whose model and prompts to take without a configuration.")] = "w2",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16, without a configuration.")] = "fp32",
    response: Annotated[str, typer.Option(help="Tokens of the responses, as for `bench rollout`.")] = (
        "lognormal:48:0.9:384"
    ),
    repeats: Annotated[int, typer.Option(min=1, help="Steps that are measured, after one that warms up.")] = 10,
    out: Out = None,
) -> None:
    """Train the policy on responses of different lengths, beside as many of their mean length."""
    from rlhf_ray.bench import report
    from rlhf_ray.bench.packing import bench_packing
    from rlhf_ray.bench.workload import parse_lengths

    lengths = parse_lengths(response, "--response")
    with _measured(config, overrides or [], workload, dtype, repeats) as (loaded, found, chosen):
        row = bench_packing(loaded, chosen.prompt_tokens, lengths, repeats)
        typer.echo(report.packing_lines(row))
        if out is not None:
            report.write(out, {"benchmark": "packing", **found, **row})


@bench.command()
def scaling(
    engines: Annotated[str, typer.Option(help="Numbers of simulated engines, such as 10,100,1000.")] = "10,100,1000",
    requests: Annotated[int, typer.Option(min=1, help="Responses under way at each engine.")] = 16,
    speed: Annotated[float, typer.Option(min=1, help="Tokens a second of each response.")] = 50.0,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster; without one, this machine.")] = None,
    out: Out = None,
) -> None:
    """Serve many engines from one driver: its CPU time a response and its memory, with engines that only pretend."""
    import os

    from rlhf_ray.bench import report
    from rlhf_ray.bench.scaling import bench_driver

    counts = _numbers(engines, "--engines")
    with report.measured_cluster(address) as nodes:
        found = report.circumstances(nodes)
        processes = max(1, len(os.sched_getaffinity(0)) - 1)
        rows = []
        for row in bench_driver(counts, requests, processes, speed):
            rows.append(row)
            typer.echo(report.driver_line(row))
    if out is not None:
        settings = {"requests": requests, "tokens_per_s": speed, "processes": processes}
        report.write(out, {"benchmark": "scaling", **found, **settings, "rows": rows})


@contextmanager
def _measured(
    path: Path | None, overrides: list[str], workload: str, dtype: str, repeats: int
) -> "Iterator[tuple[PPOConfig, dict[str, Any], IterationWorkload]]":
    """Be connected to the cluster that a configuration names; without one, to one of this machine's cores.

    Yields:
        The configuration, circumstances and settings of the measurement, and the workload.
    """
    import os
    import tempfile

    from rlhf_ray.bench import report
    from rlhf_ray.bench.iteration import WORKLOADS, built_in_config, this_machine
    from rlhf_ray.config import PPOConfig, load_config

    if workload not in WORKLOADS:
        raise ConfigError(f"--workload: found {workload!r}, expected one of {', '.join(WORKLOADS)}")
    chosen = WORKLOADS[workload]
    path, overrides = _config_or_change(path, overrides)
    if path is not None:
        loaded = load_config(path, overrides, "ppo")
        assert isinstance(loaded, PPOConfig)
        with report.measured_cluster(loaded.run.ray_address) as nodes:
            settings = {"config": loaded.model_dump(mode="json"), "repeats": repeats}
            yield loaded, report.circumstances(nodes) | settings, chosen
        return
    with tempfile.TemporaryDirectory(prefix="rlhf-ray-bench-") as folder:
        config = built_in_config(chosen, dtype, Path(folder), repeats + 1, overrides)
        with this_machine(config):
            found = report.circumstances(report.inventory())
            found["hardware"][0]["cpus"] = len(os.sched_getaffinity(0))
            yield config, found | {"workload": workload, "dtype": dtype, "repeats": repeats}, chosen


def _config_or_change(path: Path | None, overrides: list[str]) -> tuple[Path | None, list[str]]:
    """The first argument may be a change, where there is no configuration."""
    if path is not None and "=" in str(path):
        return None, [str(path), *overrides]
    return path, overrides


def _numbers(text: str, option: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"{option}: found {text!r}, expected numbers above 0 with commas between them, such as 1,2")
    return [int(part) for part in parts]


def _config(path: Path | None, overrides: list[str], folder: Path, engines: int) -> Any:
    """The configuration, or one for the built-in model, its engines sharing this machine's cores."""
    import json
    import os

    from rlhf_ray.bench.random_models import SMALL_LLAMA
    from rlhf_ray.config import load_config
    from rlhf_ray.config.load import from_dict

    path, overrides = _config_or_change(path, overrides)
    if path is not None:
        return load_config(path, overrides, "ppo")
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SMALL_LLAMA})
    )
    values = {
        "run": {"dir": str(folder / "run")},
        "data": {"path": "none"},
        "policy": {"path": str(model)},
        "critic": {"init": "policy"},
        "reward": {"functions": [{"path": "none:none"}]},
        "ppo": {"iterations": 1, "prompts_per_iteration": 1},
        "rollout": {"cpus": len(os.sched_getaffinity(0)) / engines, "kv_cache_gib": 1.0},
    }
    return from_dict(values, "ppo", overrides, "the built-in configuration")
