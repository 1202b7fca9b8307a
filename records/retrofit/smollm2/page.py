"""Draws bands.png and prints README.md's table of losses, from the logs beside this file.

python records/retrofit/smollm2/page.py
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from common import read_json  # noqa: E402
from draw import canvas, draw_line, save_picture, tidy  # noqa: E402

EVALS = {
    "untrained": "eval_untrained.json",
    "drawn": "eval_drawn.json",
    "always two": "eval_two.json",
    "parent alone": "eval_parent.json",
}


def draw_bands() -> None:
    """What every band costs above the parent, run twice and left out."""
    log, *bands = map(json.loads, (HERE / "bands.jsonl").read_text().splitlines())
    figure, axes = canvas(6, 3.4)
    for i, (key, label) in enumerate({"two_passes": "run twice, untrained", "left_out": "left out"}.items()):
        points = [(int(band["layout"].split("+")[0]), band[key] - log["parent_loss"]) for band in bands]
        draw_line(axes, points, i, label, marker="o", markersize=3)
    axes.set(yscale="log", xlabel="first layer of the band of six", ylabel="loss above the parent's, nats a token")
    axes.legend(frameon=False)
    tidy(axes)
    save_picture(figure, HERE / "bands.png")


def print_losses() -> None:
    """Nats a token at every number of passes, a column for each training."""
    logs = {name: read_json(HERE / file, "an eval_log.json of hf.py") for name, file in EVALS.items()}
    assert len({(log["text_sha256"], log["bytes"], log["tokens"]) for log in logs.values()}) == 1, "different texts"
    tables = [{row["passes"]: row["loss"] for row in log["eval"]} for log in logs.values()]
    print(f"| passes | {' | '.join(logs)} |\n|{'---|' * (len(logs) + 1)}")
    for passes in tables[0]:
        shown = [f"{table[passes]:.4f}" if passes in table else "" for table in tables]
        print(f"| {passes} | {' | '.join(shown)} |")
    print(f"| 2 less 1 | {' | '.join(f'{table[2] - table[1]:.4f}' for table in tables)} |")


if __name__ == "__main__":
    draw_bands()
    print_losses()
