"""Text from a model."""

import torch
from torch import Tensor

from osp.model import Transformer


@torch.no_grad()
def generate(
    model: Transformer, prompt: Tensor, num_tokens: int, *, context: int, temperature: float, seed: int
) -> Tensor:
    """(num_tokens,) int64 sampled after `prompt` (P,), each from the last `context` tokens; temperature 0: greedy.

    The draw happens on the CPU, so all ranks of a sharded model agree on every token.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = prompt
    for _ in range(num_tokens):
        logits = model(ids[None, -context:])[0, -1].float().cpu()
        if temperature:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            token = logits.argmax(keepdim=True)
        ids = torch.cat((ids, token.to(ids.device)))
    return ids[prompt.numel() :]
