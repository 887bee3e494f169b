"""The demonstration from nothing to a report: data, SFT, reward model, PPO, and what the hidden gold score says.

The gold score never trains anything. It labelled the preference pairs through noisy raters, and it measures here.
"""

import json
import logging
import time
from pathlib import Path
from typing import Any

import ray

from rlhf_ray.config import PipelineConfig, load_config
from rlhf_ray.data import prompt_items, read_rows
from rlhf_ray.data.formats import Prompt
from rlhf_ray.demo.data import DemoFiles, evaluate_win_rate, write_demo_data
from rlhf_ray.demo.gold import gold_score
from rlhf_ray.demo.report import write_report
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.rollout.offline import Sampling, sample_offline
from rlhf_ray.runtime.cluster import actor_environment, connection
from rlhf_ray.runtime.remote import get
from rlhf_ray.scoring.actors import Completion, ModelSpec, RewardModelActor
from rlhf_ray.stages.pipeline import run_pipeline
from rlhf_ray.tracking.rundir import write_text

logger = logging.getLogger(__name__)

EVALUATION_TIMEOUT_S = 300.0
# 200 pairs need more passes than thousands, and fewer steps to warm up.
FEW_LABELS_EPOCHS = 8


def run_demo(config_path: Path, out_dir: Path, seed: int, *, few_labels: bool = False) -> dict[str, Any]:
    """Run the whole demonstration; a second call continues where the first one stopped.

    Args:
        config_path: the pipeline, `configs/demo.yaml`; its data paths and run directory are set here.
        out_dir: receives data, runs, `summary.json`, `replies.json` and `report.html`.
        seed: of the data, the models and the sampling.
        few_labels: train the reward model on 200 pairs, so that it can be hacked.

    Returns:
        The summary.

    Raises:
        RlhfError: see the classes in `errors`.
    """
    started = time.monotonic()
    files = write_demo_data(out_dir / "data", seed)
    config = demo_config(config_path, out_dir, seed, files, few_labels)
    with connection(config.run.ray_address):
        models = run_pipeline(config)
        prompts = [row.data["prompt"][0]["content"] for row in read_rows(str(files.prompts_test))]
        scorer, loaded = start_scorer(models["reward"])
        replies = sample_replies(config, files, {"before": models["sft"], "after": models["ppo"]})
        get(loaded, "reward model: start-up", EVALUATION_TIMEOUT_S)
        scores = learned_scores(scorer, models["reward"], prompts, replies)
    summary = summarize(out_dir, files, seed, few_labels, prompts, replies, scores)
    summary["seconds"] = round(time.monotonic() - started, 1)
    write_text(out_dir / "replies.json", json.dumps(_reply_rows(prompts, replies, scores), indent=1) + "\n")
    write_text(out_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_report(out_dir, out_dir / "report.html")
    return summary


def demo_config(config_path: Path, out_dir: Path, seed: int, files: DemoFiles, few_labels: bool) -> PipelineConfig:
    """The shipped pipeline with this demonstration's folders, data and seed."""
    pairs = files.preferences_few if few_labels else files.preferences_train
    overrides = {
        "run.dir": str(out_dir),
        "run.seed": seed,
        "sft.data.path": str(files.demonstrations),
        "reward.data.path": str(pairs),
        "reward.data.eval_path": str(files.preferences_test),
        "ppo.data.path": str(files.prompts_train),
    }
    if few_labels:
        overrides |= {"reward.reward_model.epochs": FEW_LABELS_EPOCHS, "reward.training.warmup_steps": 5}
    # JSON strings are YAML strings, whatever characters a path has.
    return load_config(config_path, [f"{key}={json.dumps(value)}" for key, value in overrides.items()], "pipeline")


def sample_replies(config: PipelineConfig, files: DemoFiles, models: dict[str, Path]) -> dict[str, list[str]]:
    """Each model's reply to every held-out prompt, sampled as in training: temperature 1."""
    stage = config.ppo
    assert stage is not None
    tokenizer = load_tokenizer(str(models["before"]))
    prompts, _ = prompt_items(read_rows(str(files.prompts_test)), tokenizer, stage.data.max_tokens, "error")
    # A process of its own for each model: vLLM keeps an engine's memory as long as the process lives.
    sample = ray.remote(num_cpus=0.75, max_calls=1, runtime_env={"env_vars": actor_environment(1)})(_sample)
    limit = stage.data.max_tokens + stage.rollout.max_new_tokens
    sampling = Sampling(stage.rollout.max_new_tokens, stage.rollout.temperature, config.run.seed)
    refs = {name: sample.remote(str(path), prompts, sampling, limit) for name, path in models.items()}
    texts = get(list(refs.values()), "sampling replies to the held-out prompts", EVALUATION_TIMEOUT_S)
    return dict(zip(refs, texts, strict=True))


def _sample(model: str, prompts: list[Prompt], sampling: Sampling, max_model_len: int) -> list[str]:
    tokenizer = load_tokenizer(model)
    sampled = sample_offline(
        model,
        [prompt.token_ids for prompt in prompts],
        sampling,
        dtype="float32",
        max_model_len=max_model_len,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.batch_decode([one.token_ids for one in sampled], skip_special_tokens=True)


def start_scorer(model: Path) -> tuple[Any, Any]:
    """The reward model as an actor, and what it answers once it is loaded: it loads while replies are sampled."""
    spec = ModelSpec(str(model), "fp32", token_budget=4096, gpu=False)
    actor = ray.remote(RewardModelActor).options(num_cpus=0.5, runtime_env={"env_vars": actor_environment(1)})
    scorer: Any = actor.remote(spec, str(model), True)
    return scorer, scorer.load.remote()


def learned_scores(
    scorer: Any, model: Path, prompts: list[str], replies: dict[str, list[str]]
) -> dict[str, list[float]]:
    """What the reward model gives each reply; it ends then."""
    tokenizer = load_tokenizer(str(model))
    scores = {}
    for name, texts in replies.items():
        completions = []
        for prompt, text in zip(prompts, texts, strict=True):
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
            ids: Any = tokenizer.apply_chat_template(messages, return_dict=False)
            completions.append(Completion(ids, messages[:1], text))
        scores[name] = get(scorer.score.remote(completions), "reward model: scores", EVALUATION_TIMEOUT_S)
    ray.kill(scorer)
    return scores


def summarize(
    out_dir: Path,
    files: DemoFiles,
    seed: int,
    few_labels: bool,
    prompts: list[str],
    replies: dict[str, list[str]],
    scores: dict[str, list[float]],
) -> dict[str, Any]:
    """All figures of one demonstration."""
    evaluation = json.loads((out_dir / "reward" / "evaluation.json").read_text(encoding="utf-8"))
    lines = (out_dir / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1])
    win_rate = evaluate_win_rate(prompts, replies["before"], replies["after"])
    return {
        "seed": seed,
        "labels": "few" if few_labels else "all",
        "reward_accuracy": evaluation["accuracy"],
        "label_noise_ceiling": files.label_noise_ceiling,
        "reward_accuracy_gap": files.label_noise_ceiling - evaluation["accuracy"],
        "win_rate": win_rate["win_rate"],
        "kl": last["objective/kl"],
        "learned_score": {name: sum(values) / len(values) for name, values in scores.items()},
        "evaluation": win_rate,
    }


def _reply_rows(
    prompts: list[str], replies: dict[str, list[str]], scores: dict[str, list[float]]
) -> list[dict[str, Any]]:
    rows = []
    for i, prompt in enumerate(prompts):
        row: dict[str, Any] = {"prompt": prompt}
        for name in ("before", "after"):
            row[name] = replies[name][i]
            row[f"score_{name}"] = scores[name][i]
            row[f"gold_{name}"] = gold_score(prompt, replies[name][i]).total
        rows.append(row)
    return rows
