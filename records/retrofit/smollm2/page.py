"""The tables of README.md and bands.png, from the logs beside this file.

python records/retrofit/smollm2/page.py
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from common import read_json  # noqa: E402
from draw import canvas, draw_line, save_picture, tidy  # noqa: E402

RUNS = {
    "untrained": "eval_untrained.json",
    "drawn": "eval_drawn.json",
    "drawn, seed 1": "eval_drawn_seed1.json",
    "always two": "eval_two.json",
    "parent alone": "eval_parent.json",
}


def bands() -> None:
    """The table of the band scan, and its picture."""
    log, *lines = map(json.loads, (HERE / "bands.jsonl").read_text().splitlines())
    starts = [int(line["layout"].split("+")[0]) for line in lines]
    costs = {key: [line[key] - log["parent_loss"] for line in lines] for key in ("two_passes", "left_out")}
    print("| band | two passes, untrained | left out |\n|---|---|---|")
    for line, looped, dropped in zip(lines, *costs.values()):
        print(f"| `{line['layout']}` | {looped:+.4f} | {dropped:+.4f} |")
    figure, axes = canvas(6, 3.4)
    draw_line(axes, list(zip(starts, costs["two_passes"])), 0, "run twice, untrained", marker="o", markersize=3)
    draw_line(axes, list(zip(starts, costs["left_out"])), 1, "left out", marker="o", markersize=3)
    axes.set(yscale="log", xlabel="first layer of the band of six", ylabel="loss above the parent's, nats a token")
    axes.legend(frameon=False)
    tidy(axes)
    save_picture(figure, HERE / "bands.png")


def healing() -> None:
    """Loss at every number of passes, a column for each training."""
    logs = {name: read_json(HERE / file, "an eval_log.json of hf.py") for name, file in RUNS.items()}
    assert len({(log["text_sha256"], log["bytes"], log["tokens"]) for log in logs.values()}) == 1, "other texts"
    tables = [{row["passes"]: row["loss"] for row in log["eval"]} for log in logs.values()]
    print(f"\n| passes | {' | '.join(logs)} |\n|{'---|' * (len(logs) + 1)}")
    for passes in tables[0]:
        print(f"| {passes} | {' | '.join(f'{table[passes]:.4f}' for table in tables)} |")
    print(f"| 2 from 1 | {' | '.join(f'{table[2] - table[1]:+.4f}' for table in tables)} |")


if __name__ == "__main__":
    bands()
    healing()
