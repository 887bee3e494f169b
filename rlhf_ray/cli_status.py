"""`rlhf-ray status`: what every process of a run does now."""

import time
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.", show_default=False)],
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every second, until Ctrl-C.")] = False,
) -> None:
    """Show what each process does and since when, its weights, queue and throughput; reads the run's directory alone.

    A process that has said nothing for ten seconds is marked: it ended, or it hangs.
    """
    from rich.console import Console, Group
    from rich.live import Live

    from rlhf_ray.tracking import status as processes

    def shown() -> Group:
        step = processes.last_metrics(run).get("step")
        heading = f"{run}: " + ("no step done yet" if step is None else f"step {step} is done (counted from 0)")
        if (run / "summary.json").is_file():
            heading += "; the run has finished, and its processes are gone"
        return Group(heading, processes.table(processes.read_status(run)))

    console = Console(highlight=False)
    if not watch:
        (console if console.is_terminal else Console(highlight=False, width=160)).print(shown())
        return
    with Live(shown(), console=console, refresh_per_second=1) as live:
        try:
            while True:
                time.sleep(1)
                live.update(shown())
        except KeyboardInterrupt:
            pass
