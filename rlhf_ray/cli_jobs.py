"""The commands around jobs of a Ray cluster: `rlhf-ray submit|jobs|logs|stop`."""

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_ray import __version__
from rlhf_ray.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_ray.jobs.client import Job, JobClient
    from rlhf_ray.jobs.package import PackedFile

app = typer.Typer()

Address = Annotated[
    str,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS",
        metavar="URL",
        help="The cluster's dashboard, such as http://HEAD:8265.",
        show_default=False,
    ),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The job's name.", show_default=False)]

# The name becomes a part of URLs and of a log file's name.
JOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The configuration.", show_default=False)],
    address: Address,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="section.key=value", help="Changes to it.", show_default=False)
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The job's name; by default made of command, run directory and time.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait/--detach", help="Follow the job and exit as it does, or return at once.")
    ] = True,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="VARIABLE", help="Name of a variable of this environment to pass on; repeatable."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and print what would be sent, and send nothing.")
    ] = False,
) -> None:
    """Run a configuration as a job of a Ray cluster, with the code of this folder."""
    from rlhf_ray.config import dump_config
    from rlhf_ray.config.load import load_any
    from rlhf_ray.config.pipeline import PipelineConfig, stage_name
    from rlhf_ray.jobs.package import CONFIG_NAME, check_config, collect, write_package

    resolved = load_any(config, overrides or [])
    kind = "pipeline" if isinstance(resolved, PipelineConfig) else stage_name(resolved)
    root = Path.cwd()
    files = collect(root)
    check_config(resolved, files)
    name = _job_name(name, kind, resolved.run.dir)
    secrets = _environment(env or [])
    # The first word makes the run the process that signals reach; `python` is that of the cluster's nodes.
    entrypoint = f"exec python -m rlhf_ray {kind} {CONFIG_NAME}"
    if dry_run:
        typer.echo(dump_config(resolved) + _preview(name, entrypoint, files, secrets), nl=False)
        return
    from rlhf_ray.jobs.client import JobClient

    client = JobClient(address)
    # Ray kills a job three seconds after it was asked to stop; a run needs its step's time to write a checkpoint.
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(round(resolved.run.grace_s)), **secrets}
    metadata = {"kind": kind, "run_dir": resolved.run.dir, "rlhf_ray": __version__}
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package.zip"
        write_package(root, files, dump_config(resolved), package)
        client.submit(name, entrypoint, package, environment, metadata)
    if not wait:
        typer.echo(name)
        return
    _follow(client, name, f"submitted {name}\n")


@app.command()
def jobs(
    address: Address,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each job.")] = False,
) -> None:
    """List the jobs of a Ray cluster, the oldest first."""
    from rlhf_ray.jobs.client import JobClient

    found = JobClient(address).jobs()
    if as_json:
        for job in found:
            typer.echo(json.dumps(_as_json(job), ensure_ascii=False))
    else:
        _print_table(found)


@app.command()
def logs(
    name: Name,
    address: Address,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job ends, and exit as it does.")] = False,
) -> None:
    """Print what a job has printed."""
    from rlhf_ray.jobs.client import JobClient

    client = JobClient(address)
    if follow:
        _follow(client, name)
    else:
        typer.echo(client.logs(name), nl=False)


@app.command()
def stop(name: Name, address: Address) -> None:
    """Ask a job to end; a run that trains writes a checkpoint first."""
    from rlhf_ray.jobs.client import JobClient

    client = JobClient(address)
    if client.stop(name):
        typer.echo(f"{name} is asked to stop; a run that trains ends after the step under way, with a checkpoint")
    else:
        typer.echo(f"{name} has ended already: {client.job(name).status.lower()}")


def _job_name(name: str | None, kind: str, run_dir: str) -> str:
    if name is None:
        readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(run_dir).name)[:50]
        return f"{kind}-{readable}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    if not JOB_NAME.fullmatch(name):
        raise ConfigError(
            f"--name: found {name!r}, expected up to 100 letters, digits, '-', '_' and '.', first a letter or digit"
        )
    return name


def _environment(names: Sequence[str]) -> dict[str, str]:
    """The values of these variables. Messages have no values, as they may be secrets."""
    for name in names:
        variable, equals, _ = name.partition("=")
        if equals:
            raise ConfigError(
                f"--env: found {variable}=..., expected a name alone; set the variable in this environment and give "
                f"--env {variable}, so that its value stays out of command lines"
            )
        if not VARIABLE.fullmatch(name):
            raise ConfigError(f"--env: found {name!r}, expected the name of an environment variable")
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ConfigError(f"--env: {', '.join(missing)} not set in this environment; export it, or leave --env out")
    return {name: os.environ[name] for name in names}


def _preview(name: str, entrypoint: str, files: Sequence["PackedFile"], secrets: Mapping[str, str]) -> str:
    from rlhf_ray.jobs.package import largest, size_text

    lines = [
        "",
        f"job: {name}",
        f"command: {entrypoint}",
        f"environment variables: {', '.join(secrets) or 'none'}",
        f"upload: {len(files)} files, {size_text(sum(file.size for file in files))}; the largest:",
        *(f"  {file}" for file in largest(files)),
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def _follow(client: "JobClient", name: str, first: str = "") -> None:
    """Prints what a job prints until it ends, and exits as it did; `first` goes to standard error before."""
    try:
        typer.echo(first, nl=False, err=True)
        job = client.follow(name, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        typer.echo(
            f"\n{name} goes on. Follow it with `rlhf-ray logs {name} --follow --address {client.address}`, stop it "
            f"with `rlhf-ray stop {name} --address {client.address}`",
            err=True,
        )
        raise typer.Exit(130) from None
    if job.exit_code:
        # A run that failed has printed why; of others, such as one that never started, only the cluster knows.
        why = "" if "last available logs" in job.message else f": {job.message}"
        typer.echo(f"{name} {job.status.lower()}, exit code {job.exit_code}{why}", err=True)
        raise typer.Exit(job.exit_code)


def _as_json(job: "Job") -> dict[str, Any]:
    values = dataclasses.asdict(job)
    return {key: value.isoformat() if isinstance(value, datetime) else value for key, value in values.items()}


def _print_table(jobs: Sequence["Job"]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for column in ("job", "command", "state", "exit code", "started (UTC)", "took", "run directory"):
        table.add_column(column, overflow="fold")
    for job in jobs:
        took = (job.ended or datetime.now(UTC)) - job.started if job.started else None
        table.add_row(
            job.name,
            job.kind or "",
            job.status.lower(),
            "" if job.exit_code is None else str(job.exit_code),
            f"{job.started:%Y-%m-%d %H:%M:%S}" if job.started else "",
            str(took).partition(".")[0] if took else "",
            job.run_dir or "",
        )
    Console().print(table)
