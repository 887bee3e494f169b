"""Iterations of TRL's PPO trainer, timed; `trl_ppo.py` starts it with the interpreter of TRL's environment.

    python benchmarks/trl_side.py job.json found.json

The job names the models, the prompts' tokens, how long responses are, the weight of the KL divergence, threads, how
many iterations to run, how many responses are sampled and scored at a time, and those of a micro-batch. Seconds and
versions go to the second file.
"""

import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Clock(TrainerCallback):
    """When each iteration ended, and the CPU time that the process had taken by then."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.cpu: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """At the end of an iteration."""
        self.ends.append(time.perf_counter())
        self.cpu.append(time.process_time())


def make_trainer(job: dict[str, Any], clock: Clock) -> PPOTrainer:
    """A trainer that does the work of the job and nothing beside it: no evaluation, tables, saving or reports."""
    prompts = job["prompts"]
    tokenizer = AutoTokenizer.from_pretrained(job["policy"])
    # The trainer takes every token of this id for padding, sampled ones too: so one that the policy cannot sample.
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    config = PPOConfig(
        output_dir=job["folder"],
        per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=len(prompts) // job["micro_batch"],
        local_rollout_forward_batch_size=job["rollout_batch"],
        num_mini_batches=1,
        num_ppo_epochs=1,
        total_episodes=len(prompts) * job["iterations"],
        response_length=job["response_tokens"],
        stop_token=None,
        temperature=1.0,
        kl_coef=job["kl_coef"],
        num_sample_generations=0,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
    )

    def causal() -> Any:
        return AutoModelForCausalLM.from_pretrained(job["policy"], dtype=torch.float32)

    def scalar() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(job["reward"], dtype=torch.float32)

    # In the last batch of a dataset Accelerate makes an optimizer step of every micro-batch: one more than is read.
    rows = prompts * (job["iterations"] + 1)
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=causal(),
        ref_model=causal(),
        reward_model=scalar(),
        value_model=scalar(),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        callbacks=[clock],
    )


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every iteration but the first, which warms up, and of the sampling in it, and cores at work meanwhile.

    Raises:
        AssertionError: TRL did other work than it was to do.
    """
    clock, shapes, generate_s, steps = Clock(), [], [], 0
    trainer = make_trainer(job, clock)
    sample = ppo_trainer.batch_generation

    def watched(*arguments: Any) -> Any:
        started = time.perf_counter()
        found = sample(*arguments)
        generate_s.append(time.perf_counter() - started)
        shapes.append(list(found[0].shape))
        return found

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1

    trainer.optimizer.optimizer.register_step_post_hook(count)
    ppo_trainer.batch_generation = watched
    try:
        trainer.train()
    finally:
        ppo_trainer.batch_generation = sample
    iterations = job["iterations"]
    expected = [len(job["prompts"]), len(job["prompts"][0]) + job["response_tokens"]]
    if shapes != [expected] * iterations:
        raise AssertionError(f"TRL sampled {shapes}, expected {iterations} times {expected}")
    if steps != iterations:
        raise AssertionError(f"TRL made {steps} optimizer steps in {iterations} iterations")
    dtypes = {parameter.dtype for parameter in trainer.model.parameters()}
    if dtypes != {torch.float32}:
        raise AssertionError(f"TRL trained {dtypes}")
    return {
        "iteration_s": [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)],
        "generate_s": generate_s[1:],
        "cores_used": (clock.cpu[-1] - clock.cpu[0]) / (clock.ends[-1] - clock.ends[0]),
        "versions": {name: metadata.version(name) for name in ("trl", "torch", "transformers", "accelerate")},
    }


def main() -> None:
    """Measure what the job asks for."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    Path(sys.argv[2]).write_text(json.dumps(measure(job)))


if __name__ == "__main__":
    main()
