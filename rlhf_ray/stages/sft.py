"""Supervised fine-tuning on demonstrations (InstructGPT, arXiv:2203.02155, section 3.5)."""

import logging
from collections.abc import Iterable
from pathlib import Path

from rlhf_ray.config.offline import SFTConfig
from rlhf_ray.data import demonstration_sequences, parse_demonstrations, read_rows
from rlhf_ray.data.formats import Content
from rlhf_ray.data.readers import Rows
from rlhf_ray.models.saving import ModelCard
from rlhf_ray.stages.models import check_context, prepare_model, prepare_tokenizer
from rlhf_ray.stages.restarts import starts_again
from rlhf_ray.stages.run import finished_model, open_run
from rlhf_ray.stages.training import (
    Examples,
    export_model,
    fit,
    num_steps,
    paths,
    prefixed,
    trainer_group,
)
from rlhf_ray.training.objectives import LanguageModeling
from rlhf_ray.training.trainer import TrainerSpec

logger = logging.getLogger(__name__)


@starts_again
def train_sft(config: SFTConfig) -> Path:
    """Fine-tune a language model on demonstrations; returns the folder of the result.

    A run directory that holds an unfinished run is continued, a finished one is left as it is.

    Raises:
        RlhfError: see the classes in `errors`.
    """
    finished = finished_model(config, "sft")
    if finished is not None:
        return finished
    data = config.data
    rows = _read(config, data.path)
    with open_run(config, "sft") as run:
        run_dir = run.directory.path
        model = prepare_model(config.model, run_dir, config.run.seed, lambda: _texts(rows, config))
        tokenizer, tokenizer_folder = prepare_tokenizer(model, config.model, run_dir)
        check_context(model, data.max_tokens, "data.max_tokens", config.model.trust_remote_code)
        options = (data.max_tokens, data.overlong, data.as_chat, data.malformed)
        sequences, report = demonstration_sequences(rows, tokenizer, *options)
        logger.info("demonstrations: %s", report)
        held_out = None
        if data.eval_path:
            held_out, held_out_report = demonstration_sequences(_read(config, data.eval_path), tokenizer, *options)
            logger.info("held-out demonstrations: %s", held_out_report)
        examples = Examples(sequences, size=1)
        spec = TrainerSpec(
            name="sft",
            model=model,
            head="causal",
            section=config.training,
            learning_rate=config.sft.learning_rate,
            total_steps=num_steps(len(examples), config.sft.epochs, config.sft.batch_size),
            seed=config.run.seed,
            gpu=config.group.gpus > 0,
            trust_remote_code=config.model.trust_remote_code,
        )
        with trainer_group(config, run, spec) as trainer:

            def evaluate() -> dict[str, float]:
                if held_out is None:
                    return {}
                return prefixed("eval", trainer.evaluate(held_out, LanguageModeling()).result())

            final = fit(
                config,
                run,
                trainer,
                examples,
                LanguageModeling(),
                config.sft.epochs,
                config.sft.batch_size,
                config.sft.eval_every,
                evaluate,
                shown=["loss", "eval/loss", "tokens_per_second"],
            )
            card = ModelCard(
                title=run_dir.name,
                method="SFT",
                base_model=config.model.path,
                datasets=paths(data.path),
                summary={"demonstrations": len(examples), "epochs": config.sft.epochs, **final},
            )
            export_model(trainer, run, tokenizer_folder, card)
        run.finish(
            {
                "steps": spec.total_steps,
                "demonstrations": len(examples),
                "data": vars(report) | {"reasons": []},
                **final,
            }
        )
        return run.model_folder


def _read(config: SFTConfig, path: str | list[str]) -> Rows:
    data = config.data
    return read_rows(path, split=data.split, columns=data.columns, limit=data.limit, on_malformed=data.malformed)


def _texts(rows: Rows, config: SFTConfig) -> Iterable[str]:
    items, _ = parse_demonstrations(rows, as_chat=config.data.as_chat, on_malformed=config.data.malformed)
    for item in items:
        yield from plain_texts(item.prompt)
        yield from plain_texts(item.completion)


def plain_texts(content: Content) -> Iterable[str]:
    """The text of a string, or of every message of a conversation."""
    if isinstance(content, str):
        yield content
    else:
        for message in content:
            yield message["content"]
