"""QK-clip, which bounds attention logits: the clip of MuonClip (Kimi K2, arXiv 2507.20534), with any update rule.

After an update every head whose largest logit S of this step exceeds tau has its logits scaled by gamma = tau / S: its
rows of W_q and W_k and their biases by sqrt(gamma) each. S is the maximum of q k^T / sqrt(K) over all visible pairs of
all micro batches and ranks, before the update. Heads that share a key: the rows of W_k take the square root of the
group's least gamma, and W_q of each head the rest of its gamma. The optimizer's state stays as it is.

Cost: a product q k^T per layer and micro batch, which attention in bf16 on a CPU computes anyway; one maximum over
ranks per step; and the gather of all weights in a step that clips.
"""

import torch
import torch.distributed as dist

from osp.model.transformer import Block, Transformer
from osp.train.engine import Engine


class QkClip:
    """QK-clip of the model in `engine`. Set `largest` (L, H) to -inf before a step, `apply` after its update."""

    def __init__(self, engine: Engine, tau: float) -> None:
        assert isinstance(engine.module, Transformer)
        self.engine, self.tau, self.config = engine, tau, engine.module.config
        shape = self.config.num_hidden_layers, self.config.num_attention_heads
        self.largest = torch.full(shape, -torch.inf, device=engine.device)
        for layer, largest in zip(engine.module.layers, self.largest, strict=True):
            assert isinstance(layer, Block)
            layer.self_attn.attend.largest = largest

    @torch.no_grad()
    def apply(self) -> dict[str, float]:
        """Clip the heads and return the metrics of the step. Collective."""
        dist.all_reduce(self.largest, dist.ReduceOp.MAX)
        largest, config = self.largest.cpu().double(), self.config
        gamma = torch.where(largest > self.tau, self.tau / largest, 1.0)
        keys = gamma.unflatten(1, (config.kv_heads, -1)).amin(-1).sqrt()  # (L, G)
        queries = gamma / keys.repeat_interleave(config.num_attention_heads // config.kv_heads, 1)  # (L, H)
        factors = {"q_proj": queries.tolist(), "k_proj": keys.tolist()}
        if clipped := int((gamma < 1).sum()):
            for name, start, stop, tensors in self.engine.optimizer.local_state():
                *block, projection, kind = name.split(".")  # layers.3.self_attn.q_proj.weight
                for head, factor in enumerate(factors[projection][int(block[1])] if projection in factors else ()):
                    size = config.head_size * (config.hidden_size if kind == "weight" else 1)
                    first, last = max(head * size, start) - start, min((head + 1) * size, stop) - start
                    if first < last and factor != 1:
                        tensors["weight"][first:last].mul_(factor)
            self.engine.sync_weights_from_master()
        return {"train/qk_clip_heads": float(clipped), "train/attn_logit_max": largest.max().item()}
