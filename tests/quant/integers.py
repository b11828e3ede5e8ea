"""The two integer formats as functions."""

from torch import Tensor

from osp.quant.formats import AsymmetricInteger, Integer, SymmetricInteger


def integers(bits: int, *, symmetric: bool) -> Integer:
    return (SymmetricInteger if symmetric else AsymmetricInteger)(bits)


def round_weight(
    x: Tensor, *, bits: int, group_size: int | None = None, symmetric: bool = True, clip_search: bool = False
) -> Tensor:
    return integers(bits, symmetric=symmetric).round(x, group_size=group_size, clip_search=clip_search)


def round_activation(x: Tensor, *, bits: int, group_size: int | None = None, symmetric: bool = False) -> Tensor:
    return round_weight(x, bits=bits, group_size=group_size, symmetric=symmetric)
