"""`rlhf-ray plan`: what will run where, and whether it fits."""

import json
from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.errors import ConfigError, ResourceError

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
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show which process goes to which node and GPU, and how much memory each takes; starts nothing.

    Exits with 1 where the run would not fit, and says what to change. With placement.autoscaling nodes that are
    missing may still come, which is no failure.
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
    found = overviews(loaded, nodes)
    if as_json:
        typer.echo(json.dumps(as_values(found, nodes), indent=1))
    else:
        console = Console(highlight=False)
        draw(found, nodes, console if console.is_terminal else Console(highlight=False, width=160))
    count = sum(len(one.problems) for one in found)
    if count:
        raise ResourceError(f"{config} does not fit: {count} problem{'s' if count > 1 else ''}, see above")
