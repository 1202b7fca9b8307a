"""What tying the layers of the parent loses, by the rank of the LoRA that makes up for it.

    python records/retrofit/parent.py        makes the parent, logs/retrofit/parent/model.safetensors
    python records/retrofit/ranks.py         about a minute: ranks/convert.log, ranks.png and README.md
    python records/retrofit/ranks.py --report     the table and the picture from convert.log alone

Every line of the log is what retrofit/convert.py says; nothing is trained.
"""

import contextlib
import io
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[1:1] = [str(ROOT / "records"), str(ROOT / "retrofit")]

import convert  # noqa: E402
from common import markdown_table, page_tool, run_tool, write_text  # noqa: E402
from draw import canvas, draw_line, save_picture, tidy  # noqa: E402

PARENT = ROOT / "logs" / "retrofit" / "parent" / "model.safetensors"
HOME = Path(__file__).with_suffix("")
DATA, SEQUENCES = "data/datasets/wiki_books_mini_sp512", 128
STARTS = ("average", "step", "lower")
RANKS = ("0", "1", "2", "4", "8", "16", "full")


def convert_all() -> str:
    """What convert.py says of every start, rank and, for full rank, without rows of the vectors for each pass."""
    script, said = convert.find_script(None), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(said):
        for start in STARTS:
            for rank, rows in [(rank, "1") for rank in RANKS] + [("full", "0")]:
                flags = f"--layout 2x2 --loop-gate none --init {start} --lora-rank {rank} --pass-vectors {rows}"
                print(f"$ python retrofit/convert.py PARENT CHILD {flags} --tokens {DATA} --sequences {SEQUENCES}")
                child = Path(folder) / f"{start}_{rank}_{rows}.safetensors"
                places = [str(PARENT), str(child), "--tokens", str(ROOT / DATA), "--sequences", str(SEQUENCES)]
                convert.convert(script, convert.parse([*places, *flags.split()]))
    kept = [line for line in said.getvalue().splitlines() if not line.startswith(("wrote ", "python "))]
    return "\n".join(kept) + "\n"


def read_log(text: str) -> tuple[float, dict[tuple[str, str, str], tuple[float, float, int]]]:
    """The parent's loss, and by (start, rank, rows a pass) what is missing of the matrices, the loss at two passes and
    the parameters."""
    parent = float(re.search(r"loss of the parent: (\S+)", text)[1])
    found = {}
    for part in text.split("$ ")[1:]:
        start, rank, rows = re.search(r"--init (\S+) --lora-rank (\S+) --pass-vectors (\d)", part).groups()
        missing = float(re.search(r"missing of the matrices: (\S+)", part)[1])
        loss = float(re.search(r"loss of the child at 2 passes: (\S+)", part)[1])
        found[start, rank, rows] = missing, loss, int(re.search(r"parameters: (\d+)", part)[1])
    return parent, found


def report(text: str) -> None:
    """Writes the page and its picture from the log."""
    parent, found = read_log(text)
    rows = []
    for rank, per_pass in [(rank, "1") for rank in RANKS] + [("full", "0")]:
        cells = [f"{found[start, rank, per_pass][n]:.4f}" for n in (0, 1) for start in STARTS]
        name = rank if per_pass == "1" else "full, no rows a pass"
        rows.append([name, f"{found[STARTS[0], rank, per_pass][2]:,}", *cells])
    head = ["rank", "parameters", *(f"missing, {start}" for start in STARTS), *(f"loss, {start}" for start in STARTS)]
    figure, axes = canvas(9, 3.6, ncols=2)
    for n, label in enumerate(("missing of the matrices, parts of their norm", "nats a token at two passes")):
        for i, start in enumerate(STARTS):
            points = [(place, found[start, rank, "1"][n]) for place, rank in enumerate(RANKS)]
            draw_line(axes[n], points, i, start, marker="o", markersize=3)
        axes[n].set_xticks(range(len(RANKS)), RANKS)
        axes[n].set(xlabel="rank of the LoRA", ylabel=label)
        tidy(axes[n])
    axes[1].axhline(parent, color="#888888", linewidth=1, linestyle=":", label="the parent")
    axes[1].legend(frameon=False, fontsize=8)
    save_picture(figure, HOME / "ranks.png")
    write_text(HOME / "README.md", PAGE.format(table=markdown_table(head, rows), parent=parent, **words(parent, found)))


def words(parent: float, found: dict) -> dict[str, str]:
    """The numbers of the page's sentences."""
    exact = max(abs(found[start, "full", "1"][1] - parent) for start in STARTS)
    worst = min(found[start, "full", "0"][1] - parent for start in STARTS)
    losses = {f"{start}_{rank}": f"{found[start, rank, '1'][1]:.2f}" for start in STARTS for rank in RANKS}
    missing = f"{found['average', '16', '1'][0]:.2f}"
    tokens = f"{SEQUENCES * 256:,}"
    return losses | {"exact": f"{exact:.4f}", "fault": f"{worst:.2f}", "tokens": tokens, "missing_16": missing}


PAGE = """<!-- written by records/retrofit/ranks.py from convert.log -->
# Error against rank

Four layers of a parent of ours ([how it is made](../parent.py)) tied into two that run twice, and a LoRA for every
pass from the truncated SVD of what its layer differs from the shared one (arXiv 2410.20672). Nothing is trained here;
[own](../own/README.md) has ranks 4 and 16 after training on, from the SVD and from zero. Missing: norm of what matrices
and LoRA lack of the parent's, in parts of its norm. Loss: nats a token at two passes, on the first {tokens} tokens of
the held-out text; the parent has {parent:.4f}. One parent, 32 wide (full rank is 32).

{table}
- **Exact at full rank**: no start is more than {exact} nats from the parent. That needs rows of the vectors for each
  pass: without them (last row) full rank is {fault} or more behind.
- Low ranks win little: from 0 to 8 `average` comes from {average_0} to {average_8} nats, and `step` goes from {step_0}
  to {step_8}, which is worse than no LoRA. Half of the rank leaves {missing_16} of the norm and {average_16} nats: what
  the layers of this parent differ in is no matrix of low rank.
- `step` and `lower` miss alike, since of each pair of layers they keep one; the mean of the two is the nearest. At rank
  0 `step` is the best start all the same: how near the matrices are does not say how well the model works.
- A LoRA from zero is the row of rank 0 at the start, whatever its rank. After training on, the SVD is ahead of it by
  0.120 bits per byte at rank 4 and by 0.413 at 16 ([own](../own/README.md), three seeds).

![error against rank](ranks.png)

Log: [convert.log](convert.log). Again: `python records/retrofit/parent.py`, then `python records/retrofit/ranks.py`.
The parent was made with the script of commit 4205a9a, as that of [own](../own/README.md), in float32 on an AMD EPYC
with AVX-512 bf16 (two cores, shared).
"""


def main(argv: list[str] | None = None) -> int:
    return page_tool(argv, __doc__, HOME / "convert.log", convert_all, report)


if __name__ == "__main__":
    sys.exit(run_tool(main))
