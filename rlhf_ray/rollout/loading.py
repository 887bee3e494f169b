"""Loading what a transfer brings into a model that vLLM runs on a CPU.

There vLLM packs the weights of linear layers into the layout of its kernels and drops the originals. A model of plain
layers is packed out of the memory that the weights came in, through vLLM's own loaders and packing; any other one goes
through vLLM's layerwise reload, which copies everything twice before.
"""

from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor, to_meta_tensor
from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs
from vllm.platforms import current_platform

from rlhf_ray.rollout.buckets import TensorSpec, read_bucket


class Loading(Protocol):
    """One transfer's worth of loading."""

    def load(self, flat: torch.Tensor, bucket: list[TensorSpec]) -> None:
        """Take a bucket; its memory is written again afterwards."""

    def finish(self) -> None:
        """All buckets were there."""

    def abandon(self) -> None:
        """The transfer broke off: make ready for another one, which brings everything again."""


def begin_loading(model: Any, model_config: Any) -> Loading:
    """Open a model for new weights. Until `finish` it holds a mixture and must not run."""
    if is_plain(model):
        return PlainLoading(model)
    return LayerwiseLoading(model, model_config)


def is_plain(model: nn.Module) -> bool:
    """Whether all that has to be done after loading its weights is to pack those of unquantised layers."""
    return all(_is_plain(module) for module in model.modules())


def _is_plain(module: Any) -> bool:
    method = getattr(module, "quant_method", None)
    if type(method) is UnquantizedLinearMethod:
        weight = get_layerwise_info(module).restore_metadata[0].get("weight")
        # Packed and dropped: where vLLM keeps it, it is another kind of layer. Convolutions are linear layers, too.
        return weight is not None and weight.ndim == 2 and module.weight.numel() == 0
    if type(method) is UnquantizedEmbeddingMethod:
        return not module.weight.is_meta
    if type(module) is Attention:
        return method is None
    return method is None and not hasattr(module, "process_weights_after_loading")


class PlainLoading:
    """Each linear layer is packed as soon as it is complete, from the bucket's own memory where it lies there whole.

    All other weights are written where they are.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        methods = {module: type(getattr(module, "quant_method", None)) for module in model.modules()}
        self._embeddings = [module for module, method in methods.items() if method is UnquantizedEmbeddingMethod]
        linear = [module for module, method in methods.items() if method is UnquantizedLinearMethod]
        # With the empty weights that vLLM left behind; compiled code may hold on to them.
        self._incomplete: dict[Any, tuple[torch.Tensor, _Parts]] = {}
        for layer in linear:
            self._await(layer)

    def _await(self, layer: Any) -> None:
        """Give a layer a weight without memory, whose loader packs the real one once it is there."""
        weight: Any = get_layerwise_info(layer).restore_metadata[0]["weight"]
        weight = restore_layer_refs(to_meta_tensor(weight), layer)
        parts = _Parts(weight)
        self._incomplete[layer] = layer.weight, parts

        def load(_: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            parts.take(*args, **kwargs)
            if parts.missing < 0:
                raise RuntimeError(f"weight transfer: {layer.prefix} was sent more weights than it has")
            if parts.missing == 0:
                layer.cpu_linear = None  # gives its memory back before the new one is taken
                layer.weight = parts.whole()
                layer.quant_method.process_weights_after_loading(layer)
                layer.weight = self._incomplete.pop(layer)[0]

        expected: Any = to_meta_tensor(weight)
        expected.weight_loader = load
        layer.weight = expected

    def load(self, flat: torch.Tensor, bucket: list[TensorSpec]) -> None:
        """Hand a bucket to the model's own loader."""
        self._model.load_weights(read_bucket(flat, bucket))
        for _, parts in self._incomplete.values():
            parts.keep()

    def finish(self) -> None:
        """Pack what also serves as output layer.

        Raises:
            RuntimeError: a layer was not sent whole.
        """
        if self._incomplete:
            names = sorted(layer.prefix for layer in self._incomplete)
            raise RuntimeError(f"weight transfer: not all weights of {names[0]} came ({len(names)} layers in all)")
        for layer in self._embeddings:
            layer.quant_method.process_weights_after_loading(layer)

    def abandon(self) -> None:
        """Put the empty weights back."""
        while self._incomplete:
            layer, (empty, _) = self._incomplete.popitem()
            layer.weight = empty


class _Parts:
    """What has come of one weight: parts that lie in the bucket at hand, and memory with those of earlier ones.

    Args:
        weight: without memory, with the loader that knows where each part belongs.
    """

    def __init__(self, weight: Any) -> None:
        self.missing = weight.numel()
        self._weight = weight
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []  # where in the weight, and what
        self._memory: torch.Tensor | None = None

    def take(self, *args: Any, **kwargs: Any) -> None:
        """Hand a part to the weight's loader."""
        with _Copies() as copies:
            self._weight.weight_loader(self._weight, *args, **kwargs)
        self._parts += copies.found
        self.missing -= sum(place.numel() for place, _ in copies.found)

    def keep(self) -> None:
        """Copy the parts out of the bucket, whose memory is written again."""
        if not self._parts:
            return
        if self._memory is None:
            self._memory = materialize_meta_tensor(self._weight)
        for place, part in self._parts:
            self._memory.as_strided(place.size(), place.stride(), place.storage_offset()).copy_(part)
        self._parts = []

    def whole(self) -> torch.Tensor:
        """The weight, once nothing is missing. It may lie in the bucket, and is given away."""
        whole = self._as_it_lies()
        if whole is None:
            self.keep()
            whole, self._memory = self._memory, None
        assert whole is not None
        self._parts = []
        return whole

    def _as_it_lies(self) -> torch.Tensor | None:
        """The weight within the bucket, where its parts follow each other there as they do in it."""
        if self._memory is not None or current_platform.is_zen_cpu():  # whose kernels may go on reading what they got
            return None
        place, part = self._parts[0]
        start, storage = part.storage_offset() - place.storage_offset(), part.untyped_storage().data_ptr()
        for place, part in self._parts:
            alike = place.dtype == part.dtype and place.is_contiguous() and part.is_contiguous()
            here = part.untyped_storage().data_ptr() == storage
            if not (alike and here and part.storage_offset() - place.storage_offset() == start):
                return None
        whole: Any = part.as_strided(self._weight.size(), self._weight.stride(), start)
        whole.__class__, whole.__dict__ = self._weight.__class__, self._weight.__dict__.copy()
        return whole


class _Copies(TorchDispatchMode):
    """Notes what would be copied where (`found`), and copies nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.found.append((args[0], args[1]))
            return args[0]
        return func(*args, **(kwargs or {}))


class LayerwiseLoading:
    """vLLM's layerwise reload: the old weights of each layer stay until it is complete."""

    def __init__(self, model: Any, model_config: Any) -> None:
        self._model, self._model_config = model, model_config
        initialize_layerwise_reload(model)

    def load(self, flat: torch.Tensor, bucket: list[TensorSpec]) -> None:
        """Hand a copy of the bucket to the model's loader, which keeps views until a layer is complete."""
        self._model.load_weights(read_bucket(flat.clone(), bucket))

    def finish(self) -> None:
        """Close the reload, and pack a tied output layer."""
        finalize_layerwise_reload(self._model, self._model_config)
        # With tied embeddings the reload leaves the packed copy behind the output layer as it was, and its logits stay
        # those of the old weights.
        head = getattr(self._model, "lm_head", None)
        method = getattr(head, "quant_method", None)
        if head is not None and method is not None and getattr(head, "weight", None) is not None:
            method.process_weights_after_loading(head)

    def abandon(self) -> None:
        """Drop what waits for the rest of its layer."""
        for layer in self._model.modules():
            info = get_layerwise_info(layer)
            info.loaded_weights.clear()
            info.load_numel = 0
