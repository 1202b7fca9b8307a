"""Write records/README.md and the pictures of the tracks, from the record folders and ablations alone.

    python records/table.py            write them
    python records/table.py --check    exit code 1 if README.md is not what would be written
"""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ablate import read_matrix
from common import (
    COLORS,
    RECORDS,
    TRACKS,
    InputError,
    Parser,
    markdown_table,
    mean_std,
    number,
    p_text,
    plotting,
    read_curve,
    read_json,
    run_tool,
    save_picture,
    short,
    welch_p,
    write_text,
)
from exports import read_lines, read_plan

TITLES = {
    "10min_16mb": "ten minutes on 8xH100, 16,000,000 bytes",
    "non_record_16mb": "16,000,000 bytes, any training time and hardware",
    "local": "own text, own machine: to be compared within one dataset only",
}


@dataclass
class Record:
    folder: Path
    facts: dict  # submission.json
    results: list[dict]  # result_seed<N>.json, where the folder has them

    @property
    def scores(self) -> list[float]:
        """val_bpb of each seed."""
        if self.results:
            return [result["val_bpb"] for result in self.results]
        seeds = self.facts.get("seed_results") or {}
        found = [seed.get("val_bpb") for seed in seeds.values() if isinstance(seed, dict)]
        return [score for score in found if isinstance(score, float)] or [self.facts["val_bpb"]]

    @property
    def flops(self) -> float | None:
        return mean_std([result["train_flops"] for result in self.results])[0] if self.results else None

    @property
    def dataset(self) -> str:
        return self.results[0]["dataset"] if self.results else self.facts.get("dataset") or "FineWeb"


def read_records(home: Path, track: str) -> list[Record]:
    """The record folders of a track, best first. Raises InputError for a folder without a readable submission.json."""
    found = []
    for folder in sorted((home / f"track_{track}").glob("*/")):
        if folder.name.startswith("."):
            continue
        facts = read_json(folder / "submission.json", "the submission.json of a record folder")
        score = facts.get("val_bpb")
        if not isinstance(score, (int, float)) or not math.isfinite(score):
            raise InputError(f"{short(folder / 'submission.json')}: val_bpb: expected a number, found {score}; "
                             "run records/check.py on the folder")  # fmt: skip
        results = [read_json(path) for path in sorted(folder.glob("result_seed*.json"))]
        found.append(Record(folder, facts, results))
    return sorted(found, key=lambda record: mean_std(record.scores)[0])


def track_table(records: list[Record], home: Path) -> str:
    """One dataset's records; p compares each with the best."""
    rows, best = [], records[0]
    for record in records:
        mean, std = mean_std(record.scores)
        size = record.facts.get("bytes_total")
        p = "" if record is best else p_text(welch_p(record.scores, best.scores))
        flops = number(record.flops, ".3g")
        name = record.facts.get("name") or record.folder.name
        link = f"[{name}]({record.folder.relative_to(home).as_posix()}/README.md)"
        layout = f"`{record.results[0]['layout']}`" if record.results else "–"
        rows.append([link, number(mean), number(std), len(record.scores), p, layout,
                     f"{size:,}" if isinstance(size, int) else "–", flops, record.facts.get("hardware") or "–",
                     record.facts.get("date") or "–"])  # fmt: skip
    head = ["record", "val_bpb", "std", "n", "p", "layout", "bytes", "FLOPs", "hardware", "date"]
    return markdown_table(head, rows)


def group(records: list[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.dataset, []).append(record)
    return groups


def picture_path(home: Path, track: str, dataset: str) -> Path:
    return home / f"track_{track}" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', dataset)}.png"


def with_curves(records: list[Record]) -> list[Record]:
    return [record for record in records if any(record.folder.glob("metrics_seed*.jsonl"))]


def draw(records: list[Record], path: Path, title: str) -> None:
    """Validation bpb against training FLOPs, a line a seed; diamonds: the artifact's score."""
    plt = plotting()
    figure, axes = plt.subplots(figsize=(8.4, 4.9), dpi=130, layout="constrained")
    ends = []
    for i, record in enumerate(with_curves(records)):
        color, style = COLORS[i % len(COLORS)], ("-", "--", ":", "-.")[i // len(COLORS) % 4]
        label = f"{record.facts.get('name') or record.folder.name}  {mean_std(record.scores)[0]:.4f}"
        for j, metrics in enumerate(sorted(record.folder.glob("metrics_seed*.jsonl"))):
            points = read_curve(metrics)
            axes.plot(*zip(*points), style, color=color, linewidth=1.3, alpha=0.8, label=None if j else label)
            ends += [y for x, y in points if x >= 0.15 * points[-1][0]]
        for result in record.results:
            axes.plot(result["train_flops"], result["val_bpb"], "D", color=color, markersize=5, zorder=5)
            ends.append(result["val_bpb"])
    low, high = min(ends), max(ends)
    axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
    axes.set(xlabel="training FLOPs", ylabel="validation, bits per byte (diamonds: artifact from disk)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines["right"].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    save_picture(figure, path)


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.?!])\s", " ".join(text.split()))[0]


def ablation_rows(home: Path) -> list[list[object]]:
    """One row for each matrix: its question, how far it is, its best arm of those that it has now."""
    rows = []
    for path in sorted((home / "ablations").glob("*.toml")):
        matrix, arms = read_matrix(path), {}
        results = [(run.arm, result) for run in matrix.runs() if (result := run.result())]
        for arm, result in results:
            if "diverged" not in result:
                arms.setdefault(arm, []).append(result["val_bpb"])
        best = min(arms, key=lambda arm: mean_std(arms[arm])[0], default=None)
        score = "–" if best is None else f"`{best}` {mean_std(arms[best])[0]:.4f} (n = {len(arms[best])})"
        readme = path.with_suffix("") / "README.md"
        link = f"[{path.stem}](ablations/{path.stem}/README.md)" if readme.is_file() else path.stem
        budget = f"{matrix.budget[1]:.3g} {matrix.budget[0]}"
        rows.append([link, first_sentence(matrix.about), budget, f"{len(results)}/{len(matrix.runs())}", score])
    return rows


def export_rows(home: Path) -> list[list[str]]:
    """Plan, question, models, exports done, for every plan of `exports.py` that has a report."""
    rows = []
    for path in sorted((home / "exports").glob("*.toml")):
        plan = read_plan(path)
        if (plan.home / "README.md").is_file():
            link = f"[{path.stem}](exports/{path.stem}/README.md)"
            rows.append([link, first_sentence(plan.about), plan.models, str(len(read_lines(plan)))])
    return rows


def build(home: Path) -> str:
    """The text of records/README.md."""
    parts = ["""<!-- written by records/table.py -->
# Records

Every folder holds the logs that the script wrote, what was computed from them, and the script itself with its
configuration baked in. `val_bpb` is of the artifact as read back from disk, the mean over seeds; lower is better. p:
Welch's t-test (two-sided) against the best record of the same track and dataset; – where there are too few seeds.
"""]
    for track in TRACKS:
        parts.append(f"## track_{track}: {TITLES[track]}\n")
        groups = group(read_records(home, track))
        if not groups:
            parts.append("Nothing here yet.\n")
        for dataset, records in groups.items():
            if len(groups) > 1 or track == "local":
                tokens = {result["val_tokens"] for record in records for result in record.results}
                size = ", ".join(f"{count:,}" for count in sorted(tokens))
                parts.append(f"`{dataset}`" + (f", {size} validation tokens:\n" if size else ":\n"))
            parts.append(track_table(records, home))
            if with_curves(records):
                picture = picture_path(home, track, dataset).relative_to(home).as_posix()
                parts.append(f"![validation loss against training FLOPs, {dataset}]({picture})\n")
    rows = ablation_rows(home)
    if rows:
        head = ["matrix", "question", "budget a run", "runs", "best arm"]
        parts.append("## Ablations\n\nMatrices of runs by `ablate.py`; each has its table, picture and logs.\n")
        parts.append(markdown_table(head, rows))
    if rows := export_rows(home):
        parts.append("## Exports\n\nOne model, many artifacts: what quantizing costs, by `exports.py`.\n")
        parts.append(markdown_table(["plan", "question", "models of", "exports"], rows))
    parts.append("""## Tools

| command | what it does |
|---|---|
| `python records/ablate.py records/ablations/NAME.toml` | run a declared matrix, or go on with it; table and picture |
| `python records/exports.py records/exports/NAME.toml` | export trained models in many ways; table and picture |
| `python records/submit.py logs/RUN... --track ... --name ...` | finished runs (one a seed) into a record folder |
| `python records/check.py FOLDER...` | judge any submission folder by the challenge's rules |
| `python records/table.py` | write this page and the pictures |
| `python records/curve.py logs/RUN...` | loss curves of runs |
| `python records/contents.py logs/RUN/model.int6.rgpt` | what an artifact holds, and where its bytes are |

[coders/](coders/README.md): the artifact's coder beside general compressors.
""")
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether README.md is current")
    parser.add_argument("--home", type=Path, default=RECORDS, help="folder of the tracks (default: records/)")
    args = parser.parse_args(argv)
    path = args.home / "README.md"
    text = build(args.home)
    if args.check:
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            raise InputError(f"{short(path)}: expected what the folders say, found another text; run records/table.py")
        print(f"{short(path)} is current")
        return 0
    pictures = []
    for track in TRACKS:
        for dataset, records in group(read_records(args.home, track)).items():
            if with_curves(records):
                pictures.append(picture_path(args.home, track, dataset))
                draw(records, pictures[-1], f"track_{track}, {dataset}")
    write_text(path, text)
    print("\n".join(short(written) for written in [path, *pictures]))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
