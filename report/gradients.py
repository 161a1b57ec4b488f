"""What the report shows of the hand-written gradients, computed by the layers themselves.

python report/gradients.py OUT    the matrices of the worked example, for report.tex, into OUT
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cnn_from_scratch as c


def worked_example():
    """A 3 × 3 image and a 2 × 2 kernel through Conv2D: name -> LaTeX of its matrices."""
    conv = c.Conv2D(1, 1, 2, device="cpu", dtype=torch.float64)
    x = torch.arange(9.0, dtype=torch.float64).reshape(1, 1, 3, 3)
    conv.W.copy_(torch.tensor([[[[1.0, 2.0], [0.0, -1.0]]]]))
    conv.b.fill_(3.0)
    y = conv(x)
    y.g = torch.tensor([[[[1.0, 0.0], [2.0, -1.0]]]], dtype=torch.float64)
    conv.backward()
    cols = F.unfold(x, 2)[0]
    shown = {
        "x": x[0, 0],
        "cols": torch.cat([cols, torch.ones_like(cols[:1])]),
        "w": torch.cat([conv.W.flatten(), conv.b])[None],
        "y": y.reshape(1, 4),
        "dy": y.g.reshape(1, 4),
        "dw": torch.cat([conv.W.g.flatten(), conv.b.g])[None],
        "dx": x.g[0, 0],
        "dcols": conv.W.reshape(4, 1) @ y.g.reshape(1, 4),
    }
    return {f"example/{name}": matrix(values.tolist()) for name, values in shown.items()}


def matrix(values):
    rows = r" \\ ".join(" & ".join(f"{v + 0.0:g}" for v in row) for row in values)
    return rf"\begin{{pmatrix}}{rows}\end{{pmatrix}}"


def main(out):
    lines = [
        rf"\expandafter\def\csname r:{name}\endcsname{{{text}}}" for name, text in worked_example().items()
    ]
    (out / "gradients.tex").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
