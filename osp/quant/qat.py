"""Quantization-aware training: from `qat.start` to the end of a run the blocks compute with rounded values.

In training mode every matrix computes y = q(x) q(W)^T + b with the formats of the evaluation `quant=qat_SCHEME` (Jacob
et al. 2018, arXiv 1712.05877). W is rounded in fp32 and then cast to the dtype of x. Gradients pass straight through
the rounding (Bengio et al. 2013, arXiv 1308.3432), and scales count as constants: dx = dy q(W), dW = dy^T q(x).

NVFP4 also has a scale per tensor. Engines fuse matrices with the same input into one, so these share it. The scale of
activations is from the micro batch, as in NVIDIA's recipe (arXiv 2509.25149); in evaluation it is static.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from osp.model.sites import SITES
from osp.model.transformer import Linear, Transformer, affine_map
from osp.quant.grid import StraightThrough
from osp.quant.spec import QuantSpec

Round = Callable[[Tensor], Tensor]


def rounded_product(round_w: Round, round_x: Round | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b with W and x rounded."""
    weight = StraightThrough.apply(round_w, weight)
    return affine_map(x if round_x is None else StraightThrough.apply(round_x, x), weight, bias)


class Rounding:
    """The rounding of a model in training mode, from its creation on."""

    def __init__(self, model: Transformer, spec: QuantSpec):
        w = spec.number_format("w")
        self.largest = torch.zeros(len(model.layers), len(SITES), device=model.embed_tokens.weight.device)
        self.shared: dict[str, Tensor] = {}  # weight that shares a tensor scale -> 0-dim max|W|, a view of `largest`
        for index, layer in enumerate(model.layers):
            matrices = {path: module for path, module in layer.named_modules() if isinstance(module, Linear)}
            for largest, (kind, site) in zip(self.largest[index], SITES.items(), strict=True):
                bounds = largest if w.tensor_scale and len(site.readers) > 1 else None
                round_x = None if spec.a_bits == 16 else spec.activation_rounding(kind, model.config)
                round_w = partial(w.round, group_size=spec.w_group_size, bounds=bounds)
                for path in site.readers:
                    if path in matrices:
                        matrices[path].training_product = partial(rounded_product, round_w, round_x)
                        if bounds is not None:
                            self.shared[f"layers.{index}.{path}.weight"] = bounds

    @torch.no_grad()
    def refresh(self, slices: Iterable[tuple[str, int, int, Mapping[str, Tensor]]]) -> None:
        """Take the tensor scales from the master weights, `slices` of `optimizer.local_state()`. Collective.

        They change in place: compiled blocks read them and are not compiled again.
        """
        if self.shared:
            self.largest.zero_()
            for name, _, _, states in slices:
                if (largest := self.shared.get(name)) is not None:
                    torch.maximum(largest, states["weight"].abs().max(), out=largest)
            dist.all_reduce(self.largest, op=dist.ReduceOp.MAX)
