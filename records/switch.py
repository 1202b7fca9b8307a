"""What happens to a model when passes come on? Trains the arms of a matrix and looks closely at every switch.

    python records/switch.py records/does_recurrence_pay/NAME.toml             train what is missing, then report
    python records/switch.py records/does_recurrence_pay/NAME.toml --report    only the table and the picture

The TOML is a matrix as records/ablate.py reads it; every arm must switch passes on (LOOP_SCHEDULE). The loss is that on
the first 65,536 training tokens, just before a switch and 1, 10 and 50 steps after it; it changes nothing of the run.
NAME/ARM_seedN.json holds it with the run's last scores, so that the same command goes on after an interruption.
"""

import shutil
import statistics
import sys
from pathlib import Path

from ablate import Matrix, Plan, Run, load_script, prepare, read_matrix, sha256
from common import InputError, Parser, markdown_table, need, number, read_json, run_tool, short, write_json, write_text
from draw import canvas, draw_line, save_picture, tidy

PROBE_TOKENS = 65536
AFTER = (1, 10, 50)  # steps after a switch
KEPT = "val_bpb_raw val_bpb steps tokens train_flops device commit".split()  # of a run's result.json
AIM = 0.02  # nats: a switch that raises the loss by more is a shock


def make_probed(script):
    """The script's Run, which notes the loss on the probe around every switch in `found`."""

    class Probed(script.Run):
        found: list[dict] = []

        def probe(self, loops: int) -> float:
            c, shard = self.config, self.stream.shards[0]
            return script.evaluate(
                c, self.engine, shard[: PROBE_TOKENS // c.train_seq_len * c.train_seq_len + 1], loops
            )

        def launch(self, at: float, loops: int, passes: int, flops: float) -> None:
            before = self.state.loops
            if before not in (0, loops):
                self.read_launched()
                self.found.append({"step": self.state.step, "loops": loops, "before": self.probe(before), "after": {}})
            super().launch(at, loops, passes, flops)
            for switch in self.found:
                since = self.state.step - switch["step"]
                if since in AFTER:
                    self.read_launched()
                    switch["after"][str(since)] = self.probe(loops)

    return Probed


def place(run: Run) -> Path:
    """Where what was seen in a run is kept."""
    return run.matrix.home / f"{run.name}.json"


def train(run: Run, source: str) -> None:
    """One run, in this process; what was seen goes to its place. Raises InputError where it did not end."""
    shutil.rmtree(run.work, ignore_errors=True)  # of an interrupted try
    script = load_script(run.matrix.script)
    script.Run = make_probed(script)
    sys.argv = [run.matrix.script, *run.flags()]
    try:
        script.main()
    except SystemExit as stop:
        if stop.code:
            raise InputError(f"{run.name}: expected exit code 0, found {stop.code}; see {short(run.work)}") from None
    if not script.Run.found:
        raise InputError(f"{run.name}: expected a switch within its budget, found none; raise the budget")
    result = read_json(run.work / "result.json", "the result of the run")
    kept = {key: result[key] for key in KEPT}
    write_json(place(run), run.origin(sha256(source)) | kept | {"switches": script.Run.found})


def check(matrix: Matrix, plan: Plan) -> None:
    """Raises InputError for arms that never switch, for a budget that looking would use up, and for what was kept of
    other settings."""
    need(matrix.budget[0] != "seconds", "[budget]", "flops or tokens", "seconds, which a look at the loss takes, too")
    for arm, c in plan.configs.items():
        passes = plan.script.parse_loop_schedule(c.loop_schedule, plan.script.parse_layout(c.layout).loops)
        need(len(passes) > 1, f"{matrix.path}: arm {arm}", "a LOOP_SCHEDULE that switches", f'"{c.loop_schedule}"')
    for run in matrix.runs():
        kept = read_json(place(run)) if place(run).is_file() else {}
        for name, value in run.origin("").items() if kept else ():
            same = name in (*KEPT, "script_sha256") or kept.get(name) == value
            need(same, short(place(run)), f"{name}={value}", kept.get(name), "delete it to train anew")


def rises(seen: dict, after: int) -> float | None:
    """The most that the loss has risen so many steps after a switch, in nats; None where no run went so far."""
    found = [s["after"][str(after)] - s["before"] for s in seen["switches"] if str(after) in s["after"]]
    return max(found, default=None)


def report(matrix: Matrix) -> str:
    """The page: a table of all arms, each the mean of its seeds."""
    rows = []
    for arm in matrix.arms:
        runs = [read_json(place(run)) for run in matrix.runs() if run.arm == arm and place(run).is_file()]
        if not runs:
            continue
        cells = []
        for after in AFTER:
            found = [rise for seen in runs if (rise := rises(seen, after)) is not None]
            cells.append(number(statistics.fmean(found), "+.4f") if found else "–")
        scores = [statistics.fmean(seen[key] for seen in runs) for key in ("val_bpb_raw", "val_bpb")]
        settings = " ".join(f"{name}={value}" for name, value in matrix.arms[arm].items())
        rows.append([arm, len(runs), *cells, *(number(score) for score in scores), f"`{settings}`"])
    head = ["arm", "seeds", *(f"{after} after" for after in AFTER), "bpb before export", "bpb from disk", "settings"]
    base = " ".join(f"{name}={value}" for name, value in matrix.base.items())
    kind, amount = matrix.budget
    return (
        f"# {matrix.path.stem}\n\n{matrix.about}\n\nLoss on {PROBE_TOKENS:,} training tokens so many steps after a "
        f"switch, less that just before it, nats a token (the worst switch of a run, the mean of the seeds); the aim "
        f"is at most {AIM}.\n\n{markdown_table(head, rows)}\nBudget: {amount:g} {kind} a run. Settings of all: "
        f"`{base}`.\n"
        f"Made by `python records/switch.py {short(matrix.path)}`; the numbers are in the JSON files here.\n\n"
        "![loss around the switches](switch.png)\n"
    )


def draw(matrix: Matrix) -> None:
    """Rise of the loss against steps after the first switch, of the first seed."""
    figure, axes = canvas(8, 4.2)
    for i, arm in enumerate(matrix.arms):
        path = place(Run(matrix, arm, matrix.seeds[0]))
        if path.is_file():
            first = read_json(path)["switches"][0]
            points = [(int(after), loss - first["before"]) for after, loss in first["after"].items()]
            draw_line(axes, [(0.5, 0.0), *points], i, arm, marker="o", markersize=3)
    axes.axhline(AIM, color="#888888", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=0.05)
    axes.set_xticks([0.5, *AFTER], ["before", *map(str, AFTER)])
    axes.minorticks_off()
    axes.set_xlabel("steps after the switch")
    axes.set_ylabel("rise of the loss, nats a token")
    axes.legend(fontsize=8, frameon=False)
    tidy(axes)
    save_picture(figure, matrix.home / "switch.png")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("matrix", type=Path, metavar="NAME.toml", help="the matrix")
    parser.add_argument("--report", action="store_true", help="only write the table and the picture")
    args = parser.parse_args(argv)
    matrix = read_matrix(args.matrix)
    if not args.report:
        plan = prepare(matrix)
        check(matrix, plan)
        for run in matrix.runs():
            if not place(run).is_file():
                try:
                    train(run, plan.source)
                except ValueError as error:  # the script's InputError is one, too
                    raise InputError(str(error)) from None
    if not any(place(run).is_file() for run in matrix.runs()):
        raise InputError(f"{matrix.path}: expected a finished run, found none; run without --report")
    write_text(matrix.home / "README.md", report(matrix))
    draw(matrix)
    print(f"wrote {short(matrix.home / 'README.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
