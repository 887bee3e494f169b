"""Writing model folders that transformers and vLLM load, complete or not at all."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_ray.errors import ModelError
from rlhf_ray.models.quiet import quiet_transformers
from rlhf_ray.names import is_hub_name

logger = logging.getLogger(__name__)

# Written last: a folder that holds it is whole.
COMPLETE_MARKER = "COMPLETE"

_CITATIONS = {
    "SFT": "Ouyang et al., 2022, Training language models to follow instructions with human feedback, "
    "[arXiv:2203.02155](https://arxiv.org/abs/2203.02155)",
    "Reward modeling": "Stiennon et al., 2020, Learning to summarize from human feedback, "
    "[arXiv:2009.01325](https://arxiv.org/abs/2009.01325)",
    "PPO": "Schulman et al., 2017, Proximal policy optimization algorithms, "
    "[arXiv:1707.06347](https://arxiv.org/abs/1707.06347)",
    "DPO": "Rafailov et al., 2023, Direct preference optimization: your language model is secretly a reward "
    "model, [arXiv:2305.18290](https://arxiv.org/abs/2305.18290)",
    "GRPO": "Shao et al., 2024, DeepSeekMath: pushing the limits of mathematical reasoning in open language "
    "models, [arXiv:2402.03300](https://arxiv.org/abs/2402.03300)",
    "RLOO": "Ahmadian et al., 2024, Back to basics: revisiting REINFORCE style optimization for learning "
    "from human feedback in LLMs, [arXiv:2402.14740](https://arxiv.org/abs/2402.14740)",
}


@dataclass
class ModelCard:
    """What the README.md of a model folder says.

    Attributes:
        title: Its heading, such as the name of the run.
        method: What the model was trained with; "SFT", "Reward modeling", "PPO", "DPO", "GRPO" and "RLOO"
            bring their citation.
        base_model: Hub name or folder that training started from; None for random weights.
        datasets: Hub names or paths of the training data.
        tags: For the hub, besides "rlhf-ray" and the method.
        summary: Facts about the training, a table of two columns.
        tracking_url: Page of the run in the experiment tracker.
    """

    title: str
    method: str
    base_model: str | None = None
    datasets: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    tracking_url: str | None = None

    def render(self, *, scalar: bool) -> str:
        """The text of README.md.

        Args:
            scalar: Whether the model returns a score rather than text.
        """
        # The hub reads these fields as its own names; a path on some machine is no such name.
        head: dict[str, Any] = {
            "library_name": "transformers",
            "pipeline_tag": "text-classification" if scalar else "text-generation",
        }
        if self.base_model is not None and is_hub_name(self.base_model):
            head["base_model"] = self.base_model
        if hub_datasets := [name for name in self.datasets if is_hub_name(name)]:
            head["datasets"] = hub_datasets
        head["tags"] = list(dict.fromkeys(["rlhf-ray", self.method.lower().replace(" ", "-"), *self.tags]))
        origin = f"`{self.base_model}`" if self.base_model else "random weights"
        lines = ["---", yaml.safe_dump(head, sort_keys=False).strip(), "---", "", f"# {self.title}", ""]
        lines += [f"Trained from {origin} with {self.method}, using rlhf-ray.", ""]
        if self.datasets:
            lines += ["Data: " + ", ".join(f"`{name}`" for name in self.datasets) + ".", ""]
        if self.tracking_url:
            lines += [f"Run: {self.tracking_url}", ""]
        if self.summary:
            lines += ["## Training", "", "| | |", "|---|---|"]
            lines += [f"| {name} | {value} |" for name, value in self.summary.items()]
            lines.append("")
        if self.method in _CITATIONS:
            lines += ["## Method", "", _CITATIONS[self.method] + ".", ""]
        return "\n".join(lines)


def save_model_folder(
    out_dir: str | Path,
    config: PreTrainedConfig,
    state_dict: Mapping[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    card: ModelCard,
    *,
    extra_config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model folder: weights (safetensors), configurations, tokenizer with chat template, README.md.

    Everything is written into a folder beside `out_dir`, which then takes its name; an older `out_dir` is
    removed after that. `COMPLETE` is written last. Neither argument is changed.

    Args:
        out_dir: The folder to write; its parents are made.
        config: Of the model; `config.architectures[0]` names the transformers class the weights belong to, as
            the models of `loading.py` have it.
        state_dict: All weights under transformers' names, gathered, of one dtype, which the folder keeps. A
            weight tied to another may be left out.
        tokenizer: Its end-of-sequence and padding ids become the model's.
        card: Of README.md.
        extra_config: Entries added to config.json, such as `score_mean` and `score_std` of a reward model.

    Returns:
        `out_dir`.

    Raises:
        ModelError: The state dict lacks a weight, has one too many, or one of another shape; or the
            configuration names no class.
    """
    config = deepcopy(config)
    if not config.architectures:
        raise ModelError(
            "The configuration of the model to save names no class in 'architectures'. Use that of a loaded model."
        )
    class_name = config.architectures[0]
    model_class = getattr(transformers, class_name)
    scalar = class_name.endswith("ForSequenceClassification")
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    if scalar:
        config.num_labels = 1
        if tokenizer.pad_token_id == tokenizer.eos_token_id:
            # transformers reads the score at the last token that is no padding. Were the two one token, it
            # would skip the end of the reply, where this model was trained to be read. Without a padding
            # token it scores one sequence at a time, rightly, and refuses more.
            config.pad_token_id = None
            logger.warning(
                "The tokenizer pads with its end-of-sequence token, so %s names no padding token and "
                "transformers scores one sequence at a time with it.",
                out_dir,
            )
    for name, value in (extra_config or {}).items():
        setattr(config, name, value)
    with torch.device("meta"):
        model = model_class(config)
    weights = _checked_weights(model, state_dict)
    model.to(dtype=next(iter(weights.values())).dtype)
    if model.can_generate():
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    with new_folder(out_dir) as folder:
        with quiet_transformers():
            model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card.render(scalar=scalar), encoding="utf-8")
    return Path(out_dir)


@contextmanager
def new_folder(out_dir: str | Path) -> Iterator[Path]:
    """Write a folder complete or not at all.

    Yields a fresh folder beside `out_dir` to write into. When the block ends without an error it receives the
    marker `COMPLETE` and takes the place of `out_dir`, whose old content is removed after that; on an error
    it is removed and `out_dir` is left as it was. A machine that stops between the two renames leaves the old
    content beside, as `<name>.old`.
    """
    target = Path(out_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield work
        # mkdtemp gives the folder to its owner alone; readers on a shared disk need what any new folder has.
        umask = os.umask(0)
        os.umask(umask)
        work.chmod(0o777 & ~umask)
        (work / COMPLETE_MARKER).touch()
        old = target.with_name(target.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        work.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def is_complete(folder: str | Path) -> bool:
    """Whether `save_model_folder` finished writing this folder."""
    return (Path(folder) / COMPLETE_MARKER).is_file()


def _checked_weights(model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights to write: each tied weight once, on the CPU."""
    tied = model.all_tied_weights_keys
    expected = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
    given = {name: tensor for name, tensor in state_dict.items() if name not in tied}
    problems = [f"{name} is missing" for name in expected if name not in given]
    problems += [f"{name} is not a weight of this model" for name in given if name not in expected]
    problems += [
        f"{name} has shape {tuple(given[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in given and given[name].shape != shape
    ]
    if problems:
        raise ModelError(
            f"The weights to save are not those of a {type(model).__name__}: {problems[0]} "
            f"({len(problems)} such problems). Save the weights of the model of this configuration."
        )
    return {name: tensor.detach().cpu().contiguous() for name, tensor in given.items()}
