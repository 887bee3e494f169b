"""`rlhf-ray verify`: whether a run's directory accounts for all that was sampled and saved."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.errors import CheckpointError

app = typer.Typer()


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.", show_default=False)],
) -> None:
    """Check that every prompt was trained on once an epoch, every token's weights, every step and every checkpoint.

    Reads the directory alone and changes nothing. Exits with 1 where something is wrong.
    """
    from rlhf_ray.driver.verify import verify as check

    findings = check(run)
    for one in findings:
        typer.echo(f"{'wrong' if one.problem else 'right':5}  {one.subject}: {one.found}")
        if one.problem:
            typer.echo(f"       {one.problem}")
    wrong = sum(one.problem is not None for one in findings)
    if wrong:
        raise CheckpointError(f"{run}: {wrong} of {len(findings)} checks failed, see above")
