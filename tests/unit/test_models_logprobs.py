"""Chunked log-probabilities against the full softmax."""

import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_ray.models import logprobs as logprobs_module
from rlhf_ray.models.logprobs import CHUNK_TOKENS, kept_tokens, token_logprobs

N, HIDDEN, VOCAB = 50, 16, 211


@pytest.fixture
def problem():
    torch.manual_seed(0)
    lm_head = torch.nn.Linear(HIDDEN, VOCAB, bias=False)
    return torch.randn(N, HIDDEN, requires_grad=True), lm_head, torch.randint(0, VOCAB, (N,))


class LargestTensor(TorchDispatchMode):
    """Records the most elements any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_two_logits_give_the_logprob_and_entropy_worked_out_by_hand():
    # Logits (0, ln 3) at temperature 1 are probabilities (1/4, 3/4); at 1/2 they are (1/10, 9/10).
    hidden = torch.tensor([[0.0, math.log(3.0)]])
    identity = torch.nn.Identity()
    logprob, entropy = token_logprobs(hidden, identity, torch.tensor([1]), with_entropy=True)
    assert logprob.item() == pytest.approx(math.log(0.75), abs=1e-6)
    assert entropy.item() == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75), abs=1e-6)
    logprob, _ = token_logprobs(hidden, identity, torch.tensor([0]), temperature=0.5)
    assert logprob.item() == pytest.approx(math.log(0.1), abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 49, 50, 64])
@pytest.mark.parametrize("kept", [0, 20, N])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chunks_equal_the_full_log_softmax_with_its_gradients(problem, chunk, kept, temperature):
    hidden, lm_head, targets = problem
    weights, sizes = torch.linspace(-1, 1, N), {"chunk": chunk, "kept": kept}
    full = (lm_head(hidden) / temperature).log_softmax(-1)
    expected = full[torch.arange(N), targets]
    expected_entropy = torch.distributions.Categorical(logits=full).entropy()
    expected_gradients = torch.autograd.grad(
        (weights * expected + 0.1 * expected_entropy).sum(), (hidden, lm_head.weight)
    )

    logprobs, entropy = token_logprobs(hidden, lm_head, targets, temperature, **sizes, with_entropy=True)
    gradients = torch.autograd.grad((weights * logprobs + 0.1 * entropy).sum(), (hidden, lm_head.weight))
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, expected_entropy)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.8, torch.tensor([1.0, 0.5, 2.0, 1.3, 0.7])])
def test_gradients_equal_finite_differences(monkeypatch, temperature):
    monkeypatch.setattr(logprobs_module, "BLOCK_TOKENS", 2)
    torch.manual_seed(0)
    shapes = (5, 3), (7, 3), (7,)
    hidden, weight, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    targets = torch.tensor([0, 6, 3, 3, 1])

    def both(*inputs: torch.Tensor):
        hidden, weight, bias = inputs
        lm_head = partial(torch.nn.functional.linear, weight=weight, bias=bias)
        return token_logprobs(hidden, lm_head, targets, temperature, chunk=2, kept=0, with_entropy=True)

    assert torch.autograd.gradcheck(both, (hidden, weight, bias))


@pytest.mark.parametrize("grad", [True, False])
def test_no_tensor_of_all_tokens_times_the_vocabulary_is_ever_made(problem, grad):
    hidden, lm_head, targets = problem
    chunk = 20
    with LargestTensor() as largest, torch.set_grad_enabled(grad):
        logprobs, entropy = token_logprobs(hidden, lm_head, targets, chunk=chunk, with_entropy=True)
        if grad:
            (logprobs.sum() + entropy.sum()).backward()
    assert largest.elements == chunk * VOCAB


@pytest.mark.parametrize(("kept", "chunks"), [(0, 0), (4, 0), (5, 1), (12, 2), (N, 10)])
def test_logits_of_so_many_tokens_at_most_are_kept_for_the_backward_pass(problem, kept, chunks):
    hidden, lm_head, targets = problem
    chunk = 5
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        token_logprobs(hidden, lm_head, targets, chunk=chunk, kept=kept)
    weight = lm_head.weight.untyped_storage().data_ptr()
    logits = {t.untyped_storage().data_ptr(): t.numel() for t in saved if t.shape[-1:] == (VOCAB,)}
    logits.pop(weight, None)
    assert sum(logits.values()) == chunks * chunk * VOCAB


def test_a_second_backward_pass_is_refused_where_the_first_has_overwritten_the_logits(problem):
    hidden, lm_head, targets = problem
    logprobs, _ = token_logprobs(hidden, lm_head, targets)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()


def test_small_vocabularies_keep_more_tokens_and_the_largest_a_chunk():
    assert kept_tokens(vocab=4096, itemsize=4) == 4096  # 64 MiB
    assert kept_tokens(vocab=262144, itemsize=2) == CHUNK_TOKENS


def test_bf16_logits_are_normalised_in_float32(problem):
    hidden, lm_head, targets = problem
    hidden, lm_head = hidden.bfloat16(), lm_head.bfloat16()
    logprobs, _ = token_logprobs(hidden, lm_head, targets, 0.7)
    expected = (lm_head(hidden).double() / 0.7).log_softmax(-1)[torch.arange(N), targets]
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=1e-5)
