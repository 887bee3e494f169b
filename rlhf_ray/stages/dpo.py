"""Direct preference optimisation: the policy learns from pairs without a reward model (arXiv:2305.18290)."""

import logging
from dataclasses import replace
from pathlib import Path

from rlhf_ray.config.offline import DPOConfig
from rlhf_ray.models.reading import TokenLogprobs
from rlhf_ray.models.saving import ModelCard
from rlhf_ray.names import on_disk
from rlhf_ray.packing import Sequence
from rlhf_ray.stages.models import check_context, prepare_tokenizer
from rlhf_ray.stages.preferences import pair_examples, read_pairs
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
from rlhf_ray.training.group import TrainerGroup
from rlhf_ray.training.objectives import DirectPreference
from rlhf_ray.training.trainer import TrainerSpec

logger = logging.getLogger(__name__)

# Sequences of one call for reference log-probabilities, so that none takes longer than a call may.
REFERENCE_CHUNK = 4096


@starts_again
def train_dpo(config: DPOConfig) -> Path:
    """Train a policy on preference pairs; returns the folder of the result.

    The reference is the model itself as it starts; its log-probabilities are computed once, before the first step.
    A run directory that holds an unfinished run is continued, a finished one is left as it is.

    Raises:
        RlhfError: see the classes in `errors`.
    """
    finished = finished_model(config, "dpo")
    if finished is not None:
        return finished
    model, settings = on_disk(config.model.path), config.dpo
    rows = read_pairs(config, config.data.path)
    with open_run(config, "dpo") as run:
        run_dir = run.directory.path
        tokenizer, tokenizer_folder = prepare_tokenizer(model, config.model, run_dir)
        check_context(model, config.data.max_tokens, "data.max_tokens", config.model.trust_remote_code)
        examples, report = pair_examples(config, rows, tokenizer)
        logger.info("preferences: %s", report)
        held_out = None
        if config.data.eval_path:
            held_out, report = pair_examples(config, read_pairs(config, config.data.eval_path), tokenizer)
            logger.info("held-out preferences: %s", report)
        objective = DirectPreference(settings.beta, settings.loss, settings.label_smoothing)
        spec = TrainerSpec(
            name="dpo",
            model=model,
            head="causal",
            section=config.training,
            learning_rate=settings.learning_rate,
            total_steps=num_steps(len(examples), settings.epochs, settings.batch_size),
            seed=config.run.seed,
            gpu=config.group.gpus > 0,
            trust_remote_code=config.model.trust_remote_code,
        )
        with trainer_group(config, run, spec) as trainer:
            examples = with_reference(trainer, examples)
            held_out = with_reference(trainer, held_out) if held_out else None

            def evaluate() -> dict[str, float]:
                if held_out is None:
                    return {}
                sequences, group = held_out.all()
                return prefixed("eval", trainer.evaluate(sequences, objective, group).result())

            final = fit(
                config,
                run,
                trainer,
                examples,
                objective,
                settings.epochs,
                settings.batch_size,
                settings.eval_every,
                evaluate,
                shown=["loss", "rewards/accuracies", "rewards/margins"],
            )
            card = ModelCard(
                title=run_dir.name,
                method="DPO",
                base_model=config.model.path,
                datasets=paths(config.data.path),
                summary={"pairs": len(examples), "epochs": settings.epochs, "beta": settings.beta, **final},
            )
            export_model(trainer, run, tokenizer_folder, card)
        run.finish({"steps": spec.total_steps, "pairs": len(examples), **final})
        return run.model_folder


def with_reference(trainer: TrainerGroup, examples: Examples) -> Examples:
    """The same pairs with the reference's summed log-probability of each reply in the field `ref_logprob`.

    To be called while the trainer still holds the weights that it started from, which are the reference.
    """
    sequences: list[Sequence] = []
    for start in range(0, len(examples.sequences), REFERENCE_CHUNK):
        chunk = examples.sequences[start : start + REFERENCE_CHUNK]
        logprobs = trainer.forward(chunk, TokenLogprobs()).result()
        sequences += [
            replace(sequence, fields={**sequence.fields, "ref_logprob": float(values.double().sum())})
            for sequence, values in zip(chunk, logprobs, strict=True)
        ]
    return Examples(sequences, examples.size)
