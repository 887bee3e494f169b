"""The command line: `rlhf-ray COMMAND`. Everything heavy is imported by the command that needs it."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_ray import (
    __version__,
    cli_bench,
    cli_doctor,
    cli_jobs,
    cli_plan,
    cli_scale,
    cli_status,
    cli_timeline,
    cli_verify,
)
from rlhf_ray.errors import ConfigError, RlhfError

if TYPE_CHECKING:
    from rlhf_ray.config.load import Kind
    from rlhf_ray.data.formats import Content

app = typer.Typer(
    name="rlhf-ray",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_plan.app)
app.add_typer(cli_doctor.app)
app.add_typer(cli_scale.app)
app.add_typer(cli_status.app)
app.add_typer(cli_timeline.app)
app.add_typer(cli_verify.app)
app.add_typer(cli_bench.app)

Config = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The configuration.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="section.key=value", help="Changes to it.", show_default=False),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print and check what would run and be loaded, and start nothing.")
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit.

    An error that a user can act on is printed alone and sets its exit code; any other keeps its traceback.

    Args:
        arguments: of the command line, `sys.argv` by default.
    """
    # The C++ side of torch, which reads this when it is imported, writes notes to stderr past Python's logging.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        app(args=arguments, prog_name="rlhf-ray")
    except RlhfError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rlhf-ray {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train a language model from human feedback on a Ray cluster, with vLLM and DeepSpeed."""


@app.command()
def sft(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Fine-tune a language model on demonstrations."""
    _train("sft", config, overrides, dry_run)


@app.command()
def reward(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train a reward model on preference pairs."""
    _train("reward", config, overrides, dry_run)


@app.command()
def ppo(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train a policy against reward models and functions with PPO."""
    _train("ppo", config, overrides, dry_run)


@app.command()
def dpo(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train a policy directly on preference pairs with DPO."""
    _train("dpo", config, overrides, dry_run)


@app.command()
def pipeline(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Run several stages, each from the last one's output; continues where it stopped."""
    _train("pipeline", config, overrides, dry_run)


def _train(kind: "Kind", path: Path, overrides: list[str] | None, dry_run: bool) -> None:
    """Runs a stage or the pipeline and prints the folder of each model it left."""
    from rlhf_ray.config import PipelineConfig, load_config

    config = load_config(path, overrides or [], kind)
    if dry_run:
        from rlhf_ray.stages import dry_run as preview

        typer.echo(preview.dry_run(config), nl=False)
        return
    from rlhf_ray.stages.pipeline import STAGES, run_pipeline

    if isinstance(config, PipelineConfig):
        for folder in run_pipeline(config).values():
            typer.echo(folder)
    else:
        typer.echo(STAGES[kind](config))


@app.command()
def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Run directory, model folder or hub name.", show_default=False)
    ],
    prompt: Annotated[list[str] | None, typer.Option(help="What to ask; may be given several times.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="Prompts: a data file as for training, or text with one prompt a line.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of a reply.")] = 128,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 takes the likeliest token.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each reply.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Ask a trained policy; prints its replies."""
    from rlhf_ray.stages import generate as stage

    prompts: list[Content] = [*(prompt or ()), *(stage.read_prompts(str(prompts_file)) if prompts_file else ())]
    if not prompts:
        raise ConfigError("generate: no prompt; give --prompt TEXT or --prompts-file FILE")
    sampling = stage.Sampling(max_new_tokens, temperature, seed)
    if dry_run:
        from rlhf_ray.stages.dry_run import dry_run_generate

        typer.echo(dry_run_generate(model, prompts, sampling), nl=False)
        return
    for reply in stage.generate(model, prompts, sampling):
        typer.echo(json.dumps(vars(reply), ensure_ascii=False) if as_json else reply.text)


@app.command()
def demo(
    config: Annotated[Path, typer.Option(help="The pipeline; data, folders and seed are set by the command.")] = Path(
        "configs/demo.yaml"
    ),
    out: Annotated[Path, typer.Option(help="Folder that receives everything.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of the task, its data and the training.")] = 0,
    few_labels: Annotated[
        bool, typer.Option("--few-labels", help="Train the reward model on so few pairs that it can be hacked.")
    ] = False,
) -> None:
    """Run the demonstration: data, SFT, reward model, PPO and a report, in minutes on a laptop."""
    from rlhf_ray.demo.run import run_demo

    run_demo(config, out, seed, few_labels=few_labels)
    typer.echo(out / "summary.json")
    typer.echo(out / "report.html")


app.add_typer(cli_jobs.app)
