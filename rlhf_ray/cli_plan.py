"""`rlhf-ray plan`: what will run where, whether it fits, and how fast it would be."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_ray.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from rlhf_ray.placement.inventory import Node
    from rlhf_ray.placement.overview import Overview

app = typer.Typer()


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The configuration.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="section.key=value", help="Changes to it.", show_default=False),
    ] = None,
    inventory: Annotated[
        Path | None, typer.Option(help="YAML file that lists the nodes; without one, this machine.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster to ask, such as `auto`.")] = None,
    throughput: Annotated[
        list[Path] | None,
        typer.Option(help="Result of `rlhf-ray bench`: estimate an iteration from its speeds; may be repeated."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt lengths for the estimate; without them, all of data.max_tokens.")
    ] = None,
    response: Annotated[
        str | None,
        typer.Option(
            help="Response lengths for it: tokens (128), lognormal:MEDIAN:SIGMA:LARGEST or replay:RUN; without them, "
            "all of rollout.max_new_tokens."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show which process goes to which node and GPU, and how much memory each takes; starts nothing.

    Exits with 1 where the run would not fit, and says what to change. With placement.autoscaling nodes that are
    missing may still come, which is no failure. With --throughput it also estimates how long an iteration of PPO takes,
    which group it waits for, and what the next GPU or core should be given to.
    """
    from rich.console import Console

    from rlhf_ray.config.load import load_any
    from rlhf_ray.placement.inventory import load_inventory, this_machine
    from rlhf_ray.placement.overview import overviews
    from rlhf_ray.placement.picture import as_values, draw

    if inventory is not None and address is not None:
        raise ConfigError("plan: --inventory and --address are both given; give one of them")
    loaded = load_any(config, overrides or [])
    if inventory is not None:
        nodes = load_inventory(inventory)
    elif address is not None:
        from rlhf_ray.placement.groups import inventory as ask
        from rlhf_ray.runtime.cluster import connection

        with connection(address, "--address"):
            nodes = ask()
    else:
        nodes = this_machine()
    if not throughput and (prompt or response):
        raise ConfigError("plan: --prompt and --response are lengths for an estimate; name a result with --throughput")
    found = overviews(loaded, nodes)
    values = as_values(found, nodes)
    lines: list[str] = []
    if throughput:
        values["throughput"], lines = _forecast(loaded, found[0], nodes, throughput, prompt, response)
    if as_json:
        typer.echo(json.dumps(values, indent=1))
    else:
        console = Console(highlight=False)
        draw(found, nodes, console if console.is_terminal else Console(highlight=False, width=160))
        for line in lines:
            typer.echo(line)
    count = sum(len(one.problems) for one in found)
    if count:
        raise ResourceError(f"{config} does not fit: {count} problem{'s' if count > 1 else ''}, see above")


def _forecast(
    config: Any, overview: "Overview", nodes: "list[Node]", files: list[Path], prompt: str | None, response: str | None
) -> tuple[dict[str, Any], list[str]]:
    """The estimate of an iteration for JSON and for people.

    Raises:
        ConfigError: the configuration is not one of PPO, or the files lack what it needs.
    """
    import numpy as np

    from rlhf_ray.bench.workload import Fixed, parse_lengths
    from rlhf_ray.config.ppo import PPOConfig
    from rlhf_ray.placement.cells import load_cells
    from rlhf_ray.placement.forecast import forecast_lines, forecast_values
    from rlhf_ray.placement.shapes import find_shape
    from rlhf_ray.placement.speeds import Samples
    from rlhf_ray.placement.throughput import throughput

    if not isinstance(config, PPOConfig):
        raise ConfigError("plan: --throughput estimates an iteration of PPO; name a configuration of `rlhf-ray ppo`")
    prompts = parse_lengths(prompt, "--prompt") if prompt else Fixed(config.data.max_tokens)
    responses = parse_lengths(response, "--response") if response else Fixed(config.rollout.max_new_tokens)
    generator, count = np.random.default_rng(0), config.ppo.prompts_per_iteration
    samples = Samples(
        prompts.draw(count, generator), responses.draw(count * config.rollout.samples_per_prompt, generator)
    )
    cells, sources = load_cells(files)
    estimated = throughput(config, overview.layout, nodes, samples, cells, find_shape)
    values = {**forecast_values(estimated, samples), "sources": sources}
    lines = [f"throughput, estimated from {source}" for source in sources]
    return values, [*lines, *forecast_lines(estimated, samples)]
