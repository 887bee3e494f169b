"""The reward model: Bradley-Terry on preference pairs, with an evaluation that shows what it learned."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.algorithms.calibration import (
    accuracy_by_length,
    expected_calibration_error,
    pairwise_accuracy,
    reliability_bins,
    score_length_correlation,
)
from rlhf_ray.config.offline import RewardConfig
from rlhf_ray.models.reading import SequenceScores
from rlhf_ray.models.saving import ModelCard
from rlhf_ray.stages.models import check_context, prepare_model, prepare_tokenizer
from rlhf_ray.stages.preferences import pair_examples, pair_texts, read_pairs
from rlhf_ray.stages.restarts import starts_again
from rlhf_ray.stages.run import Run, finished_model, open_run
from rlhf_ray.stages.training import (
    Examples,
    export_model,
    fit,
    num_steps,
    paths,
    prefixed,
    trainer_group,
)
from rlhf_ray.tracking.rundir import write_text
from rlhf_ray.training.group import TrainerGroup
from rlhf_ray.training.objectives import PreferenceReward
from rlhf_ray.training.trainer import TrainerSpec

logger = logging.getLogger(__name__)

# Pairs whose scores give the normalisation constants saved with the model.
NORMALIZATION_PAIRS = 1024


@starts_again
def train_reward_model(config: RewardConfig) -> Path:
    """Train a reward model on preference pairs; returns the folder of the result.

    A run directory that holds an unfinished run is continued, a finished one is left as it is.

    Raises:
        RlhfError: see the classes in `errors`.
    """
    finished = finished_model(config, "reward")
    if finished is not None:
        return finished
    settings = config.reward_model
    rows = read_pairs(config, config.data.path)
    with open_run(config, "reward") as run:
        run_dir = run.directory.path
        model = prepare_model(config.model, run_dir, config.run.seed, lambda: pair_texts(config, rows))
        tokenizer, tokenizer_folder = prepare_tokenizer(model, config.model, run_dir)
        check_context(model, config.data.max_tokens, "data.max_tokens", config.model.trust_remote_code)
        examples, report = pair_examples(config, rows, tokenizer)
        logger.info("preferences: %s", report)
        held_out, files = held_out_pairs(config, tokenizer)
        objective = PreferenceReward(settings.label_smoothing, settings.centering_coef, settings.margin)
        spec = TrainerSpec(
            name="reward",
            model=model,
            head="scalar",
            section=config.training,
            learning_rate=settings.learning_rate,
            total_steps=num_steps(len(examples), settings.epochs, settings.batch_size),
            seed=config.run.seed,
            gpu=config.group.gpus > 0,
            dropout=settings.dropout,
            trust_remote_code=config.model.trust_remote_code,
        )
        with trainer_group(config, run, spec) as trainer:

            def evaluate() -> dict[str, float]:
                if held_out is None:
                    return {}
                sequences, group = held_out.all()
                losses = trainer.evaluate(sequences, objective, group).result()
                return prefixed("eval", losses | headline(evaluation(trainer, held_out, files)))

            fit(
                config,
                run,
                trainer,
                examples,
                objective,
                settings.epochs,
                settings.batch_size,
                settings.eval_every,
                evaluate,
                shown=["loss", "accuracy", "eval/accuracy"],
            )
            final = evaluation(trainer, held_out, files) if held_out else {}
            sample = Examples(examples.sequences[: 2 * NORMALIZATION_PAIRS], size=2)
            scores = torch.cat(trainer.forward(sample.sequences, SequenceScores()).result())
            constants = {
                "score_mean": float(scores.mean()),
                "score_std": max(float(scores.std()), 1e-6) if len(scores) > 1 else 1.0,
            }
            card = ModelCard(
                title=run_dir.name,
                method="Reward modeling",
                base_model=config.model.path,
                datasets=paths(config.data.path),
                summary={"pairs": len(examples), "epochs": settings.epochs, **headline(final), **constants},
            )
            export_model(trainer, run, tokenizer_folder, card, constants)
        write_evaluation(run, final)
        run.finish({"steps": spec.total_steps, "pairs": len(examples), **constants, "evaluation": final})
        return run.model_folder


def held_out_pairs(config: RewardConfig, tokenizer: Any) -> tuple[Examples | None, dict[str, int]]:
    """The held-out pairs of all files, one after the other, and how many are of each; None without any."""
    sequences, files = [], {}
    for path in paths(config.data.eval_path):
        examples, report = pair_examples(config, read_pairs(config, path), tokenizer)
        logger.info("held-out preferences: %s: %s", path, report)
        sequences += examples.sequences
        files[path] = len(examples)
    return (Examples(sequences, size=2) if files else None), files


def evaluation(trainer: TrainerGroup, pairs: Examples, files: dict[str, int]) -> dict[str, Any]:
    """Accuracy, calibration and the part of length in it, on held-out pairs; accuracy on each of their files too."""
    scores = torch.cat(trainer.forward(pairs.sequences, SequenceScores()).result())
    chosen, rejected = scores[0::2], scores[1::2]
    lengths = torch.tensor([sequence.fields["completion_length"] for sequence in pairs.sequences])
    buckets = accuracy_by_length(chosen, rejected, lengths[0::2], lengths[1::2])
    parts = zip(chosen.split(list(files.values())), rejected.split(list(files.values())), strict=True)
    return {
        "pairs": len(pairs),
        "accuracy": pairwise_accuracy(chosen, rejected),
        "accuracy_by_file": {name: pairwise_accuracy(*part) for name, part in zip(files, parts, strict=True)},
        "ece": expected_calibration_error(chosen, rejected),
        "reliability": [asdict(one) for one in reliability_bins(chosen, rejected)],
        "accuracy_by_length": {name: asdict(bucket) for name, bucket in buckets.items()},
        "length_correlation": score_length_correlation(scores, lengths),
        "mean_margin": float((chosen - rejected).mean()),
    }


def headline(result: dict[str, Any]) -> dict[str, float]:
    """The single numbers of an evaluation that are logged as metrics."""
    if not result:
        return {}
    buckets = result["accuracy_by_length"]
    numbers = {
        "accuracy": result["accuracy"],
        "ece": result["ece"],
        "length_correlation": result["length_correlation"],
        "accuracy_longer_chosen": buckets["chosen_longer"]["accuracy"],
        "accuracy_shorter_chosen": buckets["chosen_shorter"]["accuracy"],
    }
    return {name: value for name, value in numbers.items() if value is not None}


def write_evaluation(run: Run, result: dict[str, Any]) -> None:
    """Write `evaluation.json` and the reliability plot into the run directory; nothing without held-out pairs."""
    if not result:
        return
    write_text(run.directory.path / "evaluation.json", json.dumps(result, indent=2) + "\n")
    from matplotlib.figure import Figure

    bins = [one for one in result["reliability"] if one["count"]]
    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0.5, 1], [0.5, 1], color="gray", linestyle="--", label="perfect")
    axes.plot([one["confidence"] for one in bins], [one["accuracy"] for one in bins], marker="o", label="model")
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.set_title(f"expected calibration error {result['ece']:.3f}")
    axes.legend()
    figure.savefig(run.directory.path / "reliability.png", dpi=120)
