"""`rlhf-ray scale`: more or fewer rollout engines in a run that is under way."""

import re
from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.errors import ConfigError

app = typer.Typer()


@app.command()
def scale(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a running PPO run.", show_default=False)],
    size: Annotated[str, typer.Argument(metavar="rollout=N", help="Engines to have.", show_default=False)],
) -> None:
    """Change the number of rollout engines of a run, from its next iteration on; nothing is lost or sampled twice.

    Engines that join start beside the others and serve after a complete transfer of the weights. Where the cluster has
    no room for them, they wait for it, or for nodes of an autoscaler, while the run goes on.
    """
    from rlhf_ray.driver.control import ask_for_engines

    match = re.fullmatch(r"rollout=([1-9]\d*)", size)
    if match is None:
        raise ConfigError(f"scale: {size!r} is no size; write rollout=N with N at least 1 (trainers do not scale)")
    ask_for_engines(run, int(match[1]))
    typer.echo(f"{run}: asked for {match[1]} rollout engines; `rollout/engines` in its metrics shows when they serve")
