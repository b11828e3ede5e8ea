"""SpinQuant (Liu et al. 2024, arXiv 2405.16406): rotations learned on the loss of the fake-quantized model.

Starting from QuaRot's random Hadamard matrices, R1 and each layer's R2 move on the Stiefel manifold by Cayley SGD (Li
et al. 2020, arXiv 2002.01113; the step is Wen and Yin's, 2013): with the Euclidean gradient G the skew matrix
A = G R^T - R G^T is the direction, and R' = (I + a/2 A)^-1 (I - a/2 A) R is orthogonal exactly. Gradients pass straight
through every rounding, and scales count as constants.
"""

import functools

import torch
from torch import Tensor
from torch.func import functional_call
from tqdm import tqdm

from osp.model.transformer import Transformer
from osp.quant.grid import StraightThrough
from osp.quant.rotate import rotated_weights
from osp.quant.spec import QuantSpec

TOKENS_PER_STEP = 16_384  # of calibration text: 8 sequences of 2048, as in the authors' code
TOKENS_AT_ONCE = 4096  # tokens of one backward pass


def cayley_step(rotation: Tensor, gradient: Tensor, *, lr: float) -> Tensor:
    """Return `rotation` (n, n) after one step of descent along `gradient` (n, n), in the dtype of R.

    The step a is `lr`, but at most 1 / ||A||: a longer step of the Cayley transform no longer follows the gradient.
    """
    product = gradient.to(rotation.dtype) @ rotation.T
    skew = product - product.T
    length = min(lr, 1 / max(float(torch.linalg.matrix_norm(skew)), 1e-30))
    identity = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
    half = skew * (length / 2)
    return torch.linalg.solve(identity + half, (identity - half) @ rotation)


@torch.enable_grad()
def learn_rotations(
    model: Transformer, spec: QuantSpec, start: list[Tensor], calibration: Tensor, sites: frozenset[str], progress: bool
) -> list[Tensor]:
    """Return R1 and every R2 after `spec.rotation_steps` steps from `start`, float64 on the model's device.

    The model is prepared for rotation and its activations are quantized by hooks. Weights are rounded without clip
    search, which would cost more than the step, and not at all before GPTQ, which corrects their rounding itself
    (SpinQuant, section 4). calibration: (N, T) token ids.
    """
    device = model.embed_tokens.weight.device
    rotations = [rotation.to(device) for rotation in start]
    rounded = sites if spec.method == "rtn" else frozenset()
    num_sequences = min(len(calibration), -(-TOKENS_PER_STEP // calibration.shape[1]))
    steps = range(spec.rotation_steps)
    for step in tqdm(steps, desc="learning rotations", unit="step", leave=False, disable=not progress):
        chosen = torch.arange(step * num_sequences, (step + 1) * num_sequences) % len(calibration)
        sequences = calibration[chosen].to(device)
        gradients = _gradients(model, spec, [rotation.float() for rotation in rotations], sequences, rounded)
        lr = spec.rotation_lr * (1 - step / spec.rotation_steps)
        rotations = [cayley_step(old, gradient, lr=lr) for old, gradient in zip(rotations, gradients, strict=True)]
    return rotations


def _gradients(
    model: Transformer, spec: QuantSpec, rotations: list[Tensor], sequences: Tensor, rounded: frozenset[str]
) -> list[Tensor]:
    """Return the gradients by each rotation of the mean cross-entropy of the next tokens of `sequences` (N, T)."""
    rotations = [rotation.requires_grad_() for rotation in rotations]
    weights = rotated_weights(model, rotations)
    for name, weight in weights.items():
        if name.endswith(".weight") and name.split(".")[-2] in rounded:
            quantize = functools.partial(spec.number_format("w").round, group_size=spec.w_group_size)
            weights[name] = StraightThrough.apply(quantize, weight)
    # first the gradients of the weights, part by part, then once the gradients of the rotations
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    totals = [torch.zeros_like(leaf) for leaf in leaves.values()]
    for part in sequences.split(max(1, TOKENS_AT_ONCE // sequences.shape[1])):
        inputs, targets = part[:, :-1], part[:, 1:].contiguous()
        loss = functional_call(model, leaves, (inputs, targets)).loss / sequences[:, 1:].numel()
        for total, gradient in zip(totals, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            total += gradient
    return list(torch.autograd.grad(list(weights.values()), rotations, totals))
