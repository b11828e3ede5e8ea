"""`train.precision=fp8`: matrix products of the blocks in 8-bit floats by torchao, emulated on other devices.

In the three products of a linear layer x and W are e4m3 and the gradient of y is e5m2 (Micikevicius et al. 2022, arXiv
2209.05433). Each tensor has one scale, which maps its largest value to the largest of the format; one outlier therefore
costs all other values precision. Everything else is bf16 as with `precision=bf16`: embedding, projections, head, norms,
attention, sums. Validation, probes and stored weights do not use fp8.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from osp.errors import UserError, as_user_error

MULTIPLE = 16  # the hardware needs every side of a product to be a multiple


@cache
def fp8_linear(*, emulate: bool) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Return a differentiable function x (..., in), W (out, in), b (out,) -> x W^T + b in the dtype of x."""
    with as_user_error("train.precision=fp8 needs torchao: pip install -e '.[fp8]' (", ImportError, after=")"):
        public, linear = import_module("torchao.float8"), import_module("torchao.float8.float8_linear")
    config = public.Float8LinearConfig(emulate=emulate)
    # a converted layer holds the settings of the function, and the conversion prepares torch.compile for it
    plain = torch.nn.Linear(MULTIPLE, MULTIPLE, bias=False, device="meta")
    layer = public.convert_to_float8_training(plain, config=config)
    product, mm = linear.matmul_with_hp_or_float8_args.apply, layer.linear_mm_config

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = product(x, weight.to(x.dtype).t(), mm, config)
        return y if bias is None else y + bias.to(x.dtype)

    return multiply


def check_fp8(shapes: Mapping[str, Sequence[int]], tokens: int) -> None:
    """Raise `UserError` unless the hardware can multiply the blocks' matrices with a micro batch of `tokens`."""
    if tokens % MULTIPLE:
        raise UserError(
            f"train.precision=fp8 needs micro batches of a multiple of {MULTIPLE} tokens; train.micro_batch_size times "
            f"train.seq_len is {tokens}"
        )
    for name, shape in shapes.items():
        if name.startswith("layers.") and len(shape) == 2 and any(size % MULTIPLE for size in shape):
            raise UserError(
                f"train.precision=fp8 needs matrices with sides of a multiple of {MULTIPLE}; {name} is "
                f"{'x'.join(map(str, shape))}: change model.hidden_size or model.intermediate_size, or take "
                "train.precision=bf16"
            )
