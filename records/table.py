"""Bring records/README.md up to date, and the pictures of the tracks, from the record folders, matrices and plans.

python records/table.py            write them; what stands before the first table and from "## Tools" on stays
python records/table.py --check    exit code 1 if README.md is not what would be written
"""

import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ablate import read_matrix
from common import RECORDS, TRACKS, is_number, markdown_table, mean_std, number, p_text, short, welch_p
from draw import COLORS, canvas, draw_validation, save_picture, tidy, zoom
from exports import read_lines, read_plan
from tool import Parser, need, read_json, run_tool, write_text

TABLES = re.compile(r"^## track_.*?(?=^## Tools$)", re.M | re.S)  # what this tool writes of the page


@dataclass
class Record:
    folder: Path
    facts: dict  # submission.json
    results: list[dict]  # result_seed<N>.json, where the folder has them

    @cached_property
    def scores(self) -> list[float]:
        """val_bpb of each seed, or of the folder; those that are not finite are left out."""
        found = [row.get("val_bpb") for row in self.results or [self.facts]]
        return [score for score in found if is_number(score)]

    @property
    def mean(self) -> float | None:
        return mean_std(self.scores)[0] if self.scores else None

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


def read_records(home: Path, track: str) -> dict[str, list[Record]]:
    """The record folders of a track by dataset, best first, those without a score last. Raises InputError for broken
    JSON."""
    found = []
    for folder in sorted((home / f"track_{track}").glob("[!.]*/")):
        if not folder.name.endswith((".part", ".old")):  # submit.py is at it
            facts = read_json(folder / "submission.json", "the submission.json of a record folder")
            found.append(Record(folder, facts, [read_json(path) for path in sorted(folder.glob("result_seed*.json"))]))
    groups: dict[str, list[Record]] = {}
    for record in sorted(found, key=lambda record: 1e9 if record.mean is None else record.mean):
        groups.setdefault(record.dataset, []).append(record)
    return groups


def track_table(records: list[Record], home: Path) -> str:
    """One dataset's records; p compares each with the best."""
    rows = []
    best = records[0]
    for record in records:
        std = mean_std(record.scores)[1] if record.scores else None
        size = record.facts.get("bytes_total")
        p = "" if record is best else p_text(welch_p(record.scores, best.scores))
        link = f"[{record.name}]({record.folder.relative_to(home).as_posix()}/README.md)"
        layout = next((f"`{row['layout']}`" for row in record.results if row.get("layout")), "–")
        size = f"{size:,}" if isinstance(size, int) else "–"
        more = [record.facts.get(key) or "–" for key in ("hardware", "date")]
        flops = number(record.flops, ".3g")
        rows.append([link, number(record.mean), number(std), len(record.scores), p, layout, size, flops, *more])
    return markdown_table("record|val_bpb|std|n|p|layout|bytes|FLOPs|hardware|date".split("|"), rows)


def picture_path(home: Path, track: str, dataset: str) -> Path:
    return home / f"track_{track}" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', dataset)}.png"


def draw(records: list[Record], path: Path, title: str) -> None:
    """Validation bpb against training FLOPs, a line a seed; diamonds: the artifact's score."""
    figure, axes = canvas(8.4, 4.9)
    shown = []
    for i, record in enumerate(record for record in records if record.metrics):
        shown += draw_validation(axes, record.metrics, i, f"{record.name}  {number(record.mean)}")
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
    parts, groups = [f"## track_{track}: {TRACKS[track].title}\n"], read_records(home, track)
    for dataset, records in groups.items():
        if len(groups) > 1 or not TRACKS[track].fineweb:
            counts = [row.get("val_tokens") for record in records for row in record.results]
            size = ", ".join(f"{count:,}" for count in sorted(set(filter(is_number, counts))))
            parts.append(f"`{dataset}`" + (f", {size} validation tokens:\n" if size else ":\n"))
        parts.append(track_table(records, home))
        if any(record.metrics for record in records):
            picture = picture_path(home, track, dataset).relative_to(home).as_posix()
            parts.append(f"![validation loss against training FLOPs, {dataset}]({picture})\n")
    return parts if groups else [*parts, "Nothing here yet.\n"]


def build(home: Path) -> str:
    """The text of records/README.md: the tables as the folders have them, the words around them as they are."""
    parts = [part for track in TRACKS for part in track_section(home, track)]
    if rows := ablation_rows(home):
        head = ["matrix", "question", "budget a run", "runs", "best arm"]
        parts.append("## Ablations\n\nMatrices of runs by `ablate.py`; each has its table, picture and logs.\n")
        parts.append(markdown_table(head, rows))
    if rows := export_rows(home):
        parts.append("## Exports\n\nOne model, many artifacts: what quantizing costs, by `exports.py`.\n")
        parts.append(markdown_table(["plan", "question", "models of", "exports"], rows))
    page = home / "README.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else "# Records\n\n## track_\n## Tools\n"
    need(TABLES.search(text), short(page), "headings ## track_... and ## Tools, to write between", "none")
    return TABLES.sub(lambda _: "\n".join([*parts, ""]), text, count=1)


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
        for dataset, records in read_records(args.home, track).items():
            if any(record.metrics for record in records):
                picture = picture_path(args.home, track, dataset)
                draw(records, picture, f"track_{track}, {dataset}")
                print(short(picture))
    write_text(path, text)
    print(short(path))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
