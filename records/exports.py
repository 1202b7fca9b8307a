"""Export trained models in many ways: what does each quantizer cost, at how many bits? Then a table and a picture.

    python records/exports.py records/exports/NAME.toml              export what is missing, then report
    python records/exports.py records/exports/NAME.toml --report     only the table and the picture

A plan, NAME.toml (settings are those of the script, in lower case; a list means each of its values):

    about = "Which quantizer loses least?"        # opens the report
    script = "train_gpt.py"                       # or train_gpt_mlx.py
    models = "mini10_x4"                          # a finished matrix of records/ablate.py; weights in logs/mini10_x4/
    runs = ["no_loop", "band"]                    # its arms; MATRIX/ARM for one of another matrix
    seeds = [1337, 42, 2025]
    [base]                                        # settings of every export
    calib_tokens = 65536
    [exports.trellis]                             # one kind of export: settings of the script's group `artifact`,
    quantizer = "trellis"                         # or eval_loops
    quant_loss = [0.005, 0.01]

Every export is written to disk with the script's own functions, read back and scored on the whole validation set, as
at the end of a run; calibration reads the first training tokens. NAME/exports.jsonl gets a line each, so that the same
command goes on after an interruption. Scores of weights before export and calibrations are found once a model. A model
that diverged is skipped, with a line that says so.
"""

import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from ablate import listed, load_script, read_declared, said_of, several, sha256
from common import RECORDS, ROOT, is_number, markdown_table, mean_std, number, short
from draw import canvas, draw_line, save_picture, tidy
from logs import read_log
from tool import InputError, Parser, need, read_json, run_tool, sha256_of, write_text

LOGS, MATRICES = ROOT / "logs", RECORDS / "ablations"
KEYS = dict(about=str, script=str, models=str, runs=list, seeds=list, base=dict, exports=dict)
MACHINE = "data_path tokenizer_path val_max_tokens device dtype microbatch_tokens".split()  # more that a base may set
NOT_EXPORTED = ("mode", "preset", "run_id", "resume", "artifact", "checkpoint", "init_from", "compile")


@dataclasses.dataclass
class Plan:
    path: Path
    about: str
    models: str
    runs: list[str]
    seeds: list[int]
    base: dict[str, object]
    exports: list[tuple[str, dict[str, object]]]  # kind and settings of each
    script: str

    @property
    def home(self) -> Path:
        return self.path.with_suffix("")

    @property
    def lines(self) -> Path:
        return self.home / "exports.jsonl"

    def place(self, run: str) -> str:
        """Matrix and arm of a run, as a path."""
        return run if "/" in run else f"{self.models}/{run}"

    def wanted(self) -> list[dict]:
        """The beginning of every line that the plan asks for, model by model."""
        every = itertools.product(self.seeds, self.runs, self.exports)
        return [{"run": run, "seed": seed, "kind": kind, "settings": made} for seed, run, (kind, made) in every]


def read_plan(path: Path) -> Plan:
    """Reads and checks the TOML, as far as that goes without the script."""
    toml, exports = read_declared(path, "a plan", KEYS), []
    with said_of(path):
        for key in ("models", "runs", "exports"):
            need(toml.get(key), key, "a value", "none")
        for kind, settings in toml["exports"].items():
            need(isinstance(settings, dict), f"[exports.{kind}]", "a table of settings", settings)
            lists = [value if isinstance(value, list) else [value] for value in settings.values()]
            exports += [(kind, dict(zip(settings, values))) for values in itertools.product(*lists)]
    return Plan(path, **(toml | {"base": toml.get("base", {}), "exports": exports}))


def check_settings(plan: Plan, script) -> None:
    """Refuses settings that are no business of an export, or that the script refuses, before hours of work."""
    known = {*script.GROUPS["artifact"].split(), "eval_loops"}
    every = [("base", plan.base, known | set(MACHINE))]
    every += [(f"exports.{kind}", settings, known) for kind, settings in plan.exports]
    for where, settings, allowed in every:
        for name in settings:
            expected = f"one of {', '.join(sorted(allowed))}"
            need(name in allowed, f"{plan.path}: [{where}] {name}", expected, "another setting", "see --help")
    for _, settings in plan.exports:
        given = plan.base | settings | {"mode": "export", "checkpoint": "given"}
        c = script.load_config([f"--{name}={value}" for name, value in given.items()], {}, "")[0]
        for values in (plan.base, settings):
            values |= {name: getattr(c, name) for name in values}


def key_of(line: dict) -> str:
    return json.dumps([line[key] for key in ("run", "seed", "kind", "settings")], sort_keys=True)


def read_lines(plan: Plan) -> list[dict]:
    """The exports done so far; a last line that was cut off does not count."""
    text = plan.lines.read_text(encoding="utf-8") if plan.lines.is_file() else ""
    found = {}
    for row in text.splitlines():
        try:
            line = json.loads(row)
            found[key_of(line)] = line
        except (ValueError, KeyError, TypeError):
            continue
    return list(found.values())


class Model:
    """One trained model on the device, with what several exports of it share."""

    def __init__(self, plan: Plan, script, folder: Path):
        path = folder / "model.safetensors"
        self.script, self.sha256 = script, sha256_of(path)  # FileNotFoundError where it was not trained
        left_out = {*NOT_EXPORTED, *script.GROUPS["artifact"].split()}
        fields = {item.name for item in dataclasses.fields(script.Config)} - left_out
        logged = read_log(folder / "train.log").config or {}
        trained = {name: value for name, value in logged.items() if name in fields}
        self.weights, _, self.loops = script.load_model_file(str(path))
        base = dataclasses.replace(script.Config(**trained), compile=False, **plan.base)
        paths = {name: str(ROOT / getattr(base, name)) for name in ("data_path", "tokenizer_path")}
        self.config = c = dataclasses.replace(base, **paths)
        self.score, self.engine = script.Score(c), script.Engine(c)
        self.engine.build(self.weights, training=False)
        self.stream = script.TokenStream(script.find_shards(c.data_path, "train", c.vocab_size), c)
        self.raw: dict[int, float] = {}  # bits per byte before export, by passes
        self.curvatures: dict[tuple, tuple] = {}  # Curvature and seconds, by tokens and passes

    def raw_bpb(self, loops: int) -> float:
        if loops not in self.raw:
            self.engine.set_weights(self.weights)
            loss = self.script.evaluate(self.config, self.engine, self.score.tokens, loops)
            self.raw[loops] = self.score.bpb(loss)
        return self.raw[loops]

    def curvature(self, c, loops: int) -> tuple:
        """(Curvature, seconds that it took); of a quantizer that needs none, Nones."""
        if not self.script.calibrates(c):
            return None, None
        key = (c.calib_tokens, loops)
        if key not in self.curvatures:
            self.engine.set_weights(self.weights)
            self.engine.config, began = c, time.perf_counter()
            self.curvatures[key] = self.engine.curvature(self.stream, 0, loops), time.perf_counter() - began
        return self.curvatures[key]

    def export(self, settings: dict, path: Path) -> dict:
        """One export, from weights to the score of what is on disk; {"skipped": reason} where there is no score."""
        c = dataclasses.replace(self.config, **settings)
        self.script.check_config(dataclasses.replace(c, mode="export", checkpoint="given"))
        loops = self.script.eval_passes(c, self.loops)[0]
        raw = self.raw_bpb(loops)
        if not is_number(raw):
            return {"skipped": f"its weights score {raw} before export"}
        (curvature, seconds), code = self.curvature(c, max(loops, self.loops)), self.script.code_size(c.count_code)
        began = time.perf_counter()
        try:
            made = self.script.export_model(c, self.weights, self.loops, curvature, code)
        except ValueError as error:  # weights that are far too large
            return {"skipped": str(error)}
        coding = time.perf_counter() - began
        path.write_bytes(made.data)
        bpb = self.score.bpb(self.script.score_from_disk(c, self.engine, path, self.score, loops))
        if not is_number(bpb):
            return {"skipped": f"it scores {bpb} after export"}
        dataset = {"dataset": Path(c.data_path).name, "dataset_sha256": self.script.dataset_sha256(c)}
        scores = {"val_bpb_raw": raw, "val_bpb": bpb, "gap": bpb - raw, "val_tokens": len(self.score.tokens) - 1}
        sizes = {"bytes_artifact": len(made.data), "bytes_code": code, "params_stored": self.script.count_params(c)}
        model = {"layout": c.layout, "eval_loops": loops, "shuffle": c.shuffle, "weights_sha256": self.sha256}
        times = {"calib_seconds": seconds, "code_seconds": coding, "partial": self.score.partial}
        more = {name: value for name, value in made._asdict().items() if name not in ("data", "tables")}
        return model | scores | sizes | more | times | dataset


def diverged(plan: Plan, run: str, seed: int) -> str | None:
    """Why a run has no weights, where ablate.py kept it as diverged."""
    path = MATRICES / f"{plan.place(run)}_seed{seed}" / "diverged.json"
    return f"its training diverged ({read_json(path)['diverged']})" if path.is_file() else None


def append(plan: Plan, line: dict) -> None:
    """Adds a line, on a new one where the last was cut off."""
    whole = not plan.lines.is_file() or plan.lines.read_bytes().endswith(b"\n")
    with open(plan.lines, "a", encoding="utf-8") as file:
        file.write("\n" * (not whole) + json.dumps(line) + "\n")
    said = "{bits_per_weight:.3f} bits, {val_bpb:.4f} bpb, gap {gap:.4f}" if "gap" in line else "skipped: {skipped}"
    print("{run} {seed} {kind} {settings}: ".format(**line) + said.format(**line), flush=True)


def work(plan: Plan) -> None:
    """Exports what is missing. Raises InputError, at the end where only some models are missing."""
    script = load_script(plan.script)
    check_settings(plan, script)
    source, lines = sha256(script.script_source()), read_lines(plan)
    mine = {line.get("script_sha256") for line in lines} <= {source}
    found = f"some of another version ({', '.join(sorted({str(line.get('commit'))[:12] for line in lines}))})"
    mend = "check that out to go on with it, delete it, or give the plan another name"
    need(mine, short(plan.lines), f"exports of this {plan.script}", found, mend)
    done = {key_of(line) for line in lines}
    todo = [line for line in plan.wanted() if key_of(line) not in done]
    origin = {"script_sha256": source, "commit": script.source_commit(), "versions": script.versions()}
    plan.home.mkdir(parents=True, exist_ok=True)
    missing = {}
    print(f"{plan.path.stem}: {len(plan.wanted())} exports, {len(todo)} to do", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for (seed, run), group in itertools.groupby(todo, lambda line: (line["seed"], line["run"])):
            reason, model = diverged(plan, run, seed), None
            try:
                model = None if reason else Model(plan, script, LOGS / f"{plan.place(run)}_seed{seed}")
            except FileNotFoundError as error:  # the others can be exported
                missing[short(Path(error.filename))] = plan.place(run).rsplit("/", 1)[0]
                continue
            for line in group:
                found = {"skipped": reason} if reason else model.export(line["settings"], Path(scratch) / "artifact")
                append(plan, line | found | origin | {"device": model.engine.device_name if model else None})
    train = " and ".join(f"python records/ablate.py records/ablations/{name}.toml" for name in set(missing.values()))
    need(not missing, ", ".join(missing), "the weights of finished runs", "none", f"train them with {train}")


def label(settings: dict) -> str:
    return " ".join(f"{name.removeprefix('quant_')}={value}" for name, value in settings.items() if name != "quantizer")


def summarize(plan: Plan, lines: list[dict]) -> tuple[list[list[str]], dict[tuple[str, str], list[tuple]]]:
    """Rows of the table, and {(run, kind): (kilobytes, gap) of each of its settings} for the picture."""
    groups: dict[tuple, list[dict]] = {}
    for line in lines:
        groups.setdefault((line["run"], line["kind"], label(line["settings"])), []).append(line)

    def mean(found: list[dict], key: str) -> float:
        return statistics.fmean(line[key] for line in found)

    def place(group: tuple) -> tuple:
        (run, kind, _), found = group
        return plan.runs.index(run), kind, mean(found, "bits_per_weight")

    rows, points = [], {}
    for (run, kind, settings), found in sorted(groups.items(), key=place):
        gap, std = mean_std([line["gap"] for line in found])
        size, bits = mean(found, "bytes_artifact"), number(mean(found, "bits_per_weight"), ".3f")
        scores = [number(mean(found, "val_bpb")), number(gap), number(std)]
        aim = number(mean(found, "loss_aimed")) if all(line["loss_aimed"] for line in found) else ""
        rows.append([run, f"`{found[0]['layout']}`", kind, settings, len(found), bits, f"{size:,.0f}", *scores, aim])
        points.setdefault((run, kind), []).append((size / 1000, gap))
    return rows, points


def report(plan: Plan) -> str:
    """Writes README.md and exports.png beside the lines. Returns the table."""
    wanted = {key_of(line) for line in plan.wanted()}
    done = [line for line in read_lines(plan) if key_of(line) in wanted]
    lines = [line for line in done if "gap" in line]
    if not lines:
        return "nothing exported yet\n"
    same = ("dataset_sha256", "val_tokens", "script_sha256")
    mixed = [key for key in same if len({line[key] for line in lines}) > 1]
    need(not mixed, short(plan.lines), "exports of one kind", f"several: {', '.join(mixed)}")
    rows, points = summarize(plan, lines)
    head = ["model", "layout", "kind", "settings", "n", "bits a weight", "artifact bytes", "val_bpb", "gap"]
    table, one = markdown_table([*head, "std of gap", "nats aimed at"], rows), lines[0]
    left = len(wanted) - len(done)
    notes = f"**{left} of {len(wanted)} exports are still to be done.**\n\n" if left else ""
    skipped = [f"`{line['run']}` seed {line['seed']}: {line['skipped']}" for line in done if "skipped" in line]
    notes += f"**Left out:** {'; '.join(dict.fromkeys(skipped))}.\n\n" if skipped else ""
    partial = f" (partial: the first {one['val_tokens']:,} tokens)" if one["partial"] else ""
    text = f"""<!-- written by records/exports.py from {plan.path.name} and exports.jsonl -->
# {plan.path.stem}

{plan.about.strip()}

Bits a weight: of the coded matrices, their steps and models included. Gap: bits per byte after export, read back from
disk, less those of the weights before; nats aimed at: QUANT_LOSS, or what TARGET_BYTES made of it: what rounding would
add to the loss, nats a token, if the Fisher information were all.

{table}
{notes}![gap against the artifact's bytes](exports.png)

- Models: {", ".join(f"`{plan.place(run)}`" for run in plan.runs)}; seeds {", ".join(map(str, plan.seeds))}. \
Data: `{one["dataset"]}`, sha256 {one["dataset_sha256"][:12]}, {one["val_tokens"]:,} validation tokens{partial}.
- Script: `{plan.script}`, commit {several(line["commit"] for line in lines)}; hash {one["script_sha256"][:12]}.
- Devices: {several(line["device"] for line in lines)}.
- Settings of every export: {listed(plan.base) or "the script's own"}.

Again, with that script: `python records/exports.py {short(plan.path)}`. A line an export: `exports.jsonl`.
"""
    draw(plan, points)
    write_text(plan.home / "README.md", text)
    return table


def draw(plan: Plan, points: dict[tuple[str, str], list[tuple[float, float]]]) -> None:
    """A panel a model: gap in bits per byte against the artifact's bytes, a line a kind."""
    runs = [run for run in plan.runs if any(key[0] == run for key in points)]
    kinds = list(dict.fromkeys(kind for _, kind in points))
    figure, panels = canvas(2 + 3.6 * len(runs), 4.2, ncols=len(runs), sharey=True, squeeze=False)
    for panel, run in zip(panels[0], runs):
        for i, kind in enumerate(kinds):
            found = [(x, max(y, 1e-5)) for x, y in sorted(points.get((run, kind), []))]  # the scale is logarithmic
            draw_line(panel, found, i, kind, marker="o", markersize=4)
        panel.set_title(run, loc="left", fontsize=11)
        panel.set(xlabel="artifact, kilobytes", yscale="log")
        tidy(panel)
    panels[0][0].set_ylabel("gap, bits per byte")
    shown = {name: line for panel in panels[0] for line, name in zip(*panel.get_legend_handles_labels())}
    figure.legend([shown[kind] for kind in kinds], kinds, loc="outside lower center", ncols=len(kinds), frameon=False)
    save_picture(figure, plan.home / "exports.png")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("plan", type=Path, metavar="NAME.toml", help="the plan")
    parser.add_argument("--report", action="store_true", help="only write the table and the picture")
    args = parser.parse_args(argv)
    plan = read_plan(args.plan)
    if not args.report:
        try:
            work(plan)
        except ValueError as error:  # the script's InputError is one, too
            raise InputError(str(error)) from None
    print(report(plan), end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
