"""Plain torch and transformers: the forward passes and optimizer steps of an iteration, to measure the system by."""

import time
from typing import Any

import torch


class BareTorch:
    """A Ray actor that holds a causal and a scalar model and works through sequences in plain batches.

    Args:
        causal: folder of the policy.
        scalar: folder of the reward model, from which the critic starts.
        dtype: "fp32" or "bf16".
        threads: of torch.
        tokens: most tokens of a batch.
        gpu: whether it has a GPU to work on.
    """

    def __init__(self, causal: str, scalar: str, dtype: str, threads: int, tokens: int, gpu: bool) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        torch.set_num_threads(threads)
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        loaders: dict[str, Any] = {"causal": AutoModelForCausalLM, "scalar": AutoModelForSequenceClassification}
        self._models = {
            head: loaders[head].from_pretrained(path, dtype=kind).to("cuda" if gpu else "cpu")
            for head, path in (("causal", causal), ("scalar", scalar))
        }
        self._optimizers = {head: torch.optim.AdamW(model.parameters()) for head, model in self._models.items()}
        self._tokens = tokens
        self._gpu = gpu

    def ready(self) -> bool:
        """Answers once the models are loaded."""
        return True

    @torch.no_grad()
    def forward(self, head: str, sequences: list[list[int]], prompt_tokens: int) -> float:
        """Seconds of a forward pass over all sequences: log-probabilities of responses, or a value of every token."""
        started = self._now()
        for ids in self._batches(sequences):
            self._read(head, ids, prompt_tokens)
        return self._now() - started

    def step(self, head: str, sequences: list[list[int]], prompt_tokens: int) -> float:
        """Seconds of one optimizer step over all sequences."""
        started = self._now()
        for ids in self._batches(sequences):
            (-self._read(head, ids, prompt_tokens).float().mean()).backward()
        torch.nn.utils.clip_grad_norm_(self._models[head].parameters(), 1.0)
        self._optimizers[head].step()
        self._optimizers[head].zero_grad()
        return self._now() - started

    def _now(self) -> float:
        """The clock, once a GPU has done what it was given."""
        if self._gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _read(self, head: str, ids: torch.Tensor, prompt_tokens: int) -> torch.Tensor:
        model = self._models[head]
        if head == "scalar":
            return model.score(model.model(input_ids=ids).last_hidden_state)
        # Logits of the response alone, which is all that PPO reads.
        hidden = model.model(input_ids=ids).last_hidden_state[:, prompt_tokens - 1 : -1]
        logits = model.lm_head(hidden)
        return torch.log_softmax(logits.float(), dim=-1).gather(-1, ids[:, prompt_tokens:, None])

    def _batches(self, sequences: list[list[int]]) -> list[torch.Tensor]:
        """Sequences of like length together, filled up at the end, where a causal model does not look."""
        batches: list[list[list[int]]] = []
        for ids in sorted(sequences, key=len):
            if not batches or (len(batches[-1]) + 1) * len(ids) > self._tokens:
                batches.append([])
            batches[-1].append(ids)
        device = "cuda" if self._gpu else "cpu"
        return [
            torch.tensor([ids + [0] * (len(batch[-1]) - len(ids)) for ids in batch], device=device) for batch in batches
        ]
