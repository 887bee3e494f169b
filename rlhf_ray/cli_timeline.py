"""`rlhf-ray timeline`: what every process of a PPO run did in one iteration."""

import json
from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.errors import ConfigError

app = typer.Typer()


@app.command()
def timeline(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a PPO run.", show_default=False)],
    iteration: Annotated[
        int | None, typer.Option(min=0, help="Iteration to show, counted from 0; the last finished one by default.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Write the whole run into the trace, not the iteration alone.")
    ] = False,
) -> None:
    """Print the idle share of each process and of each group in an iteration, and write a picture and a trace of it.

    https://ui.perfetto.dev opens the trace.
    """
    from rlhf_ray.tracking import timeline as spans

    found = spans.read_timeline(run)
    known = spans.iterations(found)
    chosen = max(known, default=None) if iteration is None else iteration
    if chosen is None or chosen not in known:
        have = f"it has {min(known)} to {max(known)}" if known else "it has finished none"
        raise ConfigError(f"timeline: {run} has no iteration {iteration if iteration is not None else ''}; {have}")
    window = known[chosen]
    seconds = window.end - window.start
    typer.echo(f"iteration {chosen}: {seconds:.2f} s")
    shares = spans.idle_shares(found, window.start, window.end)
    for actor, share in shares.items():
        typer.echo(f"{actor:24} idle {share:6.1%}")
    typer.echo("mean of each group:")
    for group, share in spans.group_shares(shares).items():
        typer.echo(f"{group:24} idle {share:6.1%}")
    picture, trace = run / "timeline.png", run / "trace.json"
    spans.draw(found, window.start, window.end, f"iteration {chosen}").savefig(picture, dpi=120)
    shown = found if everything else spans.cut(found, window.start, window.end)
    trace.write_text(json.dumps(spans.perfetto(shown)), encoding="utf-8")
    typer.echo(picture)
    typer.echo(trace)
