"""Write records/README.md and the pictures of the tracks, from the record folders, matrices and plans alone.

python records/table.py            write them
python records/table.py --check    exit code 1 if README.md is not what would be written
"""

import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ablate import read_matrix
from common import (
    RECORDS,
    TRACKS,
    Parser,
    is_number,
    markdown_table,
    mean_std,
    need,
    number,
    p_text,
    read_json,
    run_tool,
    short,
    welch_p,
    write_text,
)
from draw import COLORS, canvas, draw_validation, save_picture, tidy, zoom
from exports import read_lines, read_plan

HEAD = """<!-- written by records/table.py -->
# Records

Every folder holds the logs that the script wrote, what was computed from them, and the script itself with its
configuration baked in. `val_bpb` is of the artifact as read back from disk, the mean over seeds; lower is better. p:
Welch's t-test (two-sided) against the best record of the same track and dataset; – where there are too few seeds.

[HISTORY.md](HISTORY.md): what has left this tree, what it showed, and where it lies.
"""
TOOLS = """## Tools

| command | what it does |
|---|---|
| `python records/ablate.py records/ablations/NAME.toml` | run a declared matrix, or go on with it; table and picture |
| `python records/exports.py records/exports/NAME.toml` | export trained models in many ways; table and picture |
| `python records/record.py --name ... --track ...` | a run a seed, then the record folder |
| `python records/submit.py logs/RUN... --track ... --name ...` | finished runs (one a seed) into a record folder |
| `python records/check.py FOLDER...` | judge any submission folder by the challenge's rules |
| `python records/table.py` | write this page and the pictures |
| `python records/curve.py logs/RUN...` | loss curves of runs |
| `python records/contents.py logs/RUN/model.int6.rgpt` | what an artifact holds, and where its bytes are |

[does_recurrence_pay/](does_recurrence_pay/README.md): what is known so far, on one page. retrofit/: trained models
made to loop, [SmolLM2](retrofit/smollm2/README.md) and [ours](retrofit/own/README.md), with what
[retrofit/](../retrofit/README.md) lists.
[side_by_side/](side_by_side/README.md): the challenge's script, a published record's and ours, at one shape.
[coders/](coders/README.md): the artifact's coder beside general compressors. [rare_rows/](rare_rows/README.md): what
rounding costs where a calibration is short. [rounding_trials/](rounding_trials/README.md): how `ROUND_FROM` was found.
[what_a_weight_costs.md](what_a_weight_costs.md): bits against loss, rounded after and while training.
models/: the artifacts of track_mini's entries, to start from (`INIT_FROM=`) or to convert (`retrofit/convert.py`).

To compare ideas, declare a matrix (settings, arms, seeds, a budget; `--help` shows one) and run it. Ctrl-C at will: the
same command goes on. It ends in a table (mean, standard deviation, Welch's test) and a picture. A trial of a minute:

    python records/ablate.py records/ablations/smoke.toml
    python records/exports.py records/exports/smoke.toml     # after it: its models, exported in several ways

To submit, one command: a run a seed, then the folder, which is checked, and this page. Nearly all that can be known
before is refused before the first run, what a seed shows before the next; it goes on where it was stopped. For seeds
that have been trained, `submit.py`.

    python records/record.py --name mine --track local --author "Your Name" --settings=--preset=smoke

`make record NAME=mine SUBMIT_ARGS="--author=... --github-id=... --beat=1.08"` is that for the challenge: three seeds of
the `record` preset on the GPUs of the machine (`TRACK=non_record_16mb`, `SEEDS=`; `RECORD_ARGS=` for the trainer).
The folder holds the logs, every number computed from them, and a `train_gpt.py` with the configuration baked in,
which `submit.py` starts to see that it repeats the run. What the entry means is yours to write: `--blurb`, `--prose`,
or the line TO FILL IN in its README. `check.py` judges anybody's folder: bytes of all shipped code, the cap, byte
counts that cannot be, logs that were stitched, numbers without runs, mixed seeds, times.
"""


@dataclass
class Record:
    folder: Path
    facts: dict  # submission.json
    results: list[dict]  # result_seed<N>.json, where the folder has them

    @cached_property
    def scores(self) -> list[float]:
        """val_bpb of each seed; those that are not finite are left out."""
        seeds = self.facts.get("seed_results")
        listed = list(seeds.values()) if isinstance(seeds, dict) else []
        for rows in [self.results] if self.results else [listed, [self.facts]]:
            found = [row.get("val_bpb") for row in rows if isinstance(row, dict)]
            if scores := [score for score in found if is_number(score)]:
                return scores
        return []

    @property
    def flops(self) -> float | None:
        found = [result["train_flops"] for result in self.results if is_number(result.get("train_flops"))]
        return mean_std(found)[0] if found else None

    @property
    def metrics(self) -> list[Path]:
        return sorted(self.folder.glob("metrics_seed*.jsonl"))

    @property
    def dataset(self) -> str:
        stated = [row.get("dataset") for row in (*self.results, self.facts)]
        return next((name for name in stated if isinstance(name, str) and name), "FineWeb")

    @property
    def name(self) -> str:
        return str(self.facts.get("name") or self.folder.name)


def read_records(home: Path, track: str) -> list[Record]:
    """The record folders of a track, best first, those without a score last. Raises InputError for broken JSON."""
    found = []
    for folder in sorted((home / f"track_{track}").glob("*/")):
        if not folder.name.startswith("."):
            facts = read_json(folder / "submission.json", "the submission.json of a record folder")
            found.append(Record(folder, facts, [read_json(path) for path in sorted(folder.glob("result_seed*.json"))]))
    return sorted(found, key=lambda record: mean_std(record.scores)[0] if record.scores else 1e9)


def by_dataset(records: list[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.dataset, []).append(record)
    return groups


def track_table(records: list[Record], home: Path) -> str:
    """One dataset's records; p compares each with the best."""
    rows = []
    best = records[0]
    for record in records:
        mean, std = mean_std(record.scores) if record.scores else (None, None)
        size = record.facts.get("bytes_total")
        p = "" if record is best else p_text(welch_p(record.scores, best.scores)) if record.scores else "–"
        link = f"[{record.name}]({record.folder.relative_to(home).as_posix()}/README.md)"
        layout = next((f"`{row['layout']}`" for row in record.results if row.get("layout")), "–")
        size = f"{size:,}" if isinstance(size, int) else "–"
        more = [record.facts.get(key) or "–" for key in ("hardware", "date")]
        flops = number(record.flops, ".3g")
        rows.append([link, number(mean), number(std), len(record.scores), p, layout, size, flops, *more])
    return markdown_table("record|val_bpb|std|n|p|layout|bytes|FLOPs|hardware|date".split("|"), rows)


def picture_path(home: Path, track: str, dataset: str) -> Path:
    return home / f"track_{track}" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', dataset)}.png"


def draw(records: list[Record], path: Path, title: str) -> None:
    """Validation bpb against training FLOPs, a line a seed; diamonds: the artifact's score."""
    figure, axes = canvas(8.4, 4.9)
    shown = []
    for i, record in enumerate(record for record in records if record.metrics):
        mean = number(mean_std(record.scores)[0] if record.scores else None)
        shown += draw_validation(axes, record.metrics, i, f"{record.name}  {mean}")
        for result in record.results:
            x, y = result.get("train_flops"), result.get("val_bpb")
            if is_number(x) and is_number(y):
                axes.plot(x, y, "D", color=COLORS[i % len(COLORS)], markersize=5, zorder=5)
                shown.append(y)
    zoom(axes, shown)
    axes.set(xlabel="training FLOPs", ylabel="validation, bits per byte (diamonds: artifact from disk)")
    axes.set_title(title, loc="left", fontsize=11)
    tidy(axes)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)
    save_picture(figure, path)


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.?!])\s", " ".join(text.split()))[0]


def page_link(home: Path, name: str) -> str:
    """A matrix or plan, linked to its page where it has one."""
    return f"[{home.name}]({name}/{home.name}/README.md)" if (home / "README.md").is_file() else home.name


def ablation_rows(home: Path) -> list[list[object]]:
    """One row for each matrix: its question, how far it is, its best arm of those that it has now."""
    rows = []
    for path in sorted((home / "ablations").glob("*.toml")):
        matrix, arms = read_matrix(path), {}
        finished = matrix.finished()
        for run, result in finished:
            if is_number(result.get("val_bpb")):
                arms.setdefault(run.arm, []).append(result["val_bpb"])
        best = min(arms, key=lambda arm: mean_std(arms[arm])[0], default=None)
        score = "–" if best is None else f"`{best}` {mean_std(arms[best])[0]:.4f} (n = {len(arms[best])})"
        budget, done = f"{matrix.budget[1]:.3g} {matrix.budget[0]}", f"{len(finished)}/{len(matrix.runs())}"
        rows.append([page_link(matrix.home, "ablations"), first_sentence(matrix.about), budget, done, score])
    return rows


def export_rows(home: Path) -> list[list[str]]:
    """Plan, question, models, exports done, for every plan of `exports.py` that has a report."""
    rows = []
    for path in sorted((home / "exports").glob("*.toml")):
        plan = read_plan(path)
        if (plan.home / "README.md").is_file():
            lines = [line for line in read_lines(plan) if "gap" in line]  # and not of a model that was missing
            rows.append([page_link(plan.home, "exports"), first_sentence(plan.about), plan.models, len(lines)])
    return rows


def track_section(home: Path, track: str) -> list[str]:
    parts, groups = [f"## track_{track}: {TRACKS[track].title}\n"], by_dataset(read_records(home, track))
    for dataset, records in groups.items():
        if len(groups) > 1 or not TRACKS[track].fineweb:
            tokens = {
                row["val_tokens"] for record in records for row in record.results if is_number(row.get("val_tokens"))
            }
            size = ", ".join(f"{count:,}" for count in sorted(tokens))
            parts.append(f"`{dataset}`" + (f", {size} validation tokens:\n" if size else ":\n"))
        parts.append(track_table(records, home))
        if any(record.metrics for record in records):
            picture = picture_path(home, track, dataset).relative_to(home).as_posix()
            parts.append(f"![validation loss against training FLOPs, {dataset}]({picture})\n")
    return parts if groups else [*parts, "Nothing here yet.\n"]


def build(home: Path) -> str:
    """The text of records/README.md."""
    parts = [HEAD]
    for track in TRACKS:
        parts += track_section(home, track)
    if rows := ablation_rows(home):
        head = ["matrix", "question", "budget a run", "runs", "best arm"]
        parts.append("## Ablations\n\nMatrices of runs by `ablate.py`; each has its table, picture and logs.\n")
        parts.append(markdown_table(head, rows))
    if rows := export_rows(home):
        parts.append("## Exports\n\nOne model, many artifacts: what quantizing costs, by `exports.py`.\n")
        parts.append(markdown_table(["plan", "question", "models of", "exports"], rows))
    return "\n".join([*parts, TOOLS])


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether README.md is current")
    parser.add_argument("--home", type=Path, default=RECORDS, help="folder of the tracks (default: records/)")
    args = parser.parse_args(argv)
    path, text = args.home / "README.md", build(args.home)
    if args.check:
        current = path.is_file() and path.read_text(encoding="utf-8") == text
        need(current, short(path), "what the folders say", "another text", "run records/table.py")
        print(f"{short(path)} is current")
        return 0
    for track in TRACKS:
        for dataset, records in by_dataset(read_records(args.home, track)).items():
            if any(record.metrics for record in records):
                picture = picture_path(args.home, track, dataset)
                draw(records, picture, f"track_{track}, {dataset}")
                print(short(picture))
    write_text(path, text)
    print(short(path))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
