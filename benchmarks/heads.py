"""Where each attention head looks in a model of scale=backcopy: at triggers, and at symbols with nothing to copy.

    python scripts/ablation.py scale=backcopy
    python benchmarks/heads.py ablations/backcopy

Measures the runs of seed 0 at their own learning rate, on 64 sequences of the validation split, without the first eight
symbols of each. Writes benchmarks/heads.json: for each row a list of layers, for each quantity one number a head, the
mean probability of attention.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from osp.evaluation.language_model import open_model
from osp.evaluation.texts import COPIED, read_text
from osp.model.transformer import CausalAttention

SEQUENCES, LEFT_OUT = 64, 8


@torch.no_grad()
def attention(folder: Path) -> list[dict[str, list[float]]]:
    """Return for each layer and quantity one mean probability of attention a head."""
    subject = open_model(folder)
    text = read_text(COPIED, subject)
    assert text.row is not None
    assert text.counted is not None
    tokens, copied = (x[: SEQUENCES * text.row].view(-1, text.row) for x in (text.tokens, text.counted))
    triggers = copied[:, LEFT_OUT + 1 :]  # the symbol after a trigger can be copied
    layers = list[dict[str, list[float]]]()

    def add(_: CausalAttention, inputs: tuple[Tensor, ...]) -> None:
        query, key = (x.float().transpose(1, 2) for x in inputs[:2])  # (B, H, T, K)
        logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        weights = logits.masked_fill(~torch.ones_like(logits[0, 0], dtype=torch.bool).tril(), -torch.inf).softmax(-1)
        previous, itself = (weights.diagonal(-offset, 2, 3)[:, :, LEFT_OUT - offset :] for offset in (1, 0))
        start = weights[:, :, LEFT_OUT:, 0]
        layers.append(
            {
                name: [round(head[chosen].mean().item(), 4) for head in values.unbind(1)]
                for name, values, chosen in (
                    ("triggers: the token before", previous, triggers),
                    ("other symbols: the start token", start, ~triggers),
                    ("other symbols: the token itself", itself, ~triggers),
                )
            }
        )

    for module in subject.model.modules():
        if isinstance(module, CausalAttention):
            module.register_forward_pre_hook(add)
    subject.model(tokens[:, :-1])
    return layers


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) == 2 else "") / "ablation.json"
    if not path.is_file():
        sys.exit("name the folder of a finished ablation: python benchmarks/heads.py ablations/backcopy")
    torch.set_num_threads(1)
    runs = [run for run in json.loads(path.read_text())["runs"] if run["seed"] == 0 and run["rates"] == "best"]
    rows = {run["row"]: attention(path.parent / "runs" / run["label"]) for run in runs}
    Path(__file__).with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for row, (*_, last) in rows.items():
        print(row.ljust(20), {name: max(heads) for name, heads in last.items()})


if __name__ == "__main__":
    main()
