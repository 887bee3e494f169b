"""The command `rlhf-ray doctor`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.errors import ConfigError

app = typer.Typer()


@app.command()
def doctor(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="section.key=value", help="Changes to the configuration.", show_default=False),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="The Ray cluster; else run.ray_address or RAY_ADDRESS, or Ray is started here.", show_default=False
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="CONFIG.yaml", help="What is to run: checks that too.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all that was measured as one JSON object.")] = False,
) -> None:
    """Examine every node of a cluster; exit code 1 where a run would fail."""
    if overrides and config is None:
        raise ConfigError(f"doctor: {overrides[0]} changes a configuration; name it with --config")
    from rlhf_ray.doctor.needs import read_needs
    from rlhf_ray.doctor.run import examine
    from rlhf_ray.doctor.verdicts import summary, table

    needs = read_needs(config, overrides or []) if config else None
    found = examine(address, needs, lambda text: typer.echo(text, err=True))
    fails = any(line.verdict == "problem" for line in found.lines)
    if as_json:
        lines = [vars(line) for line in found.lines]
        typer.echo(json.dumps({"healthy": not fails, "lines": lines, **found.facts}, indent=2))
    else:
        typer.echo(f"{table(found.lines, len(found.facts['nodes']))}\n\n{summary(found.lines)}")
    if fails:
        raise typer.Exit(1)
