"""Export trained models in many ways: what does each quantizer cost, at how many bits? Then a table and a picture.

    python records/exports.py records/exports/NAME.toml              export what is missing, then report
    python records/exports.py records/exports/NAME.toml --report     only the table and the picture

A plan, NAME.toml (settings are those of the script, in lower case; a list means each of its values):

    about = "Which quantizer loses least?"        # opens the report
    models = "trained_128"                        # a finished matrix of records/ablate.py; weights in logs/trained_128/
    runs = ["no_loop", "band"]                    # its arms; MATRIX/ARM for one of another matrix
    seeds = [1337, 42, 2025]
    [base]                                        # settings of every export
    calib_tokens = 65536
    [exports.sigma]                               # one kind of export: settings of the ARTIFACT part, or eval_loops
    quantizer = "sigma"
    quant_sigma = [12.85, 9.0]

Every export is written to disk with the script's own functions, read back and scored on the whole validation set, as
at the end of a run; calibration reads the first training tokens. NAME/exports.jsonl gets a line each, so that the same
command goes on after an interruption. Scores of weights before export and calibrations are found once a model.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import sys
import time
from pathlib import Path

from ablate import load_script
from common import (
    COLORS,
    ROOT,
    InputError,
    Parser,
    markdown_table,
    mean_std,
    number,
    plotting,
    read_log,
    read_toml,
    run_tool,
    save_picture,
    short,
    write_text,
)  # fmt: skip

LOGS = ROOT / "logs"
SETTINGS = "quantizer quant_sigma quant_loss quant_bits target_bytes bytes_cap codec calib_tokens eval_loops".split()
BASE = [*SETTINGS, "data_path", "tokenizer_path", "val_max_tokens", "device", "dtype", "microbatch_tokens"]
KEYS = {"about": str, "models": str, "runs": list, "seeds": list, "base": dict, "exports": dict, "script": str}


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


def read_plan(path: Path) -> Plan:
    toml = read_toml(path, "a plan")

    def need(holds, what, expected, found):
        if not holds:
            raise InputError(f"{path}: {what}: expected {expected}, found {found}; see --help")

    need(path.suffix == ".toml", "the file's name", "NAME.toml", path.name)
    for key, value in toml.items():
        need(key in KEYS, key, f"one of {', '.join(KEYS)}", "an unknown key")
        need(type(value) is KEYS[key], key, f"a {KEYS[key].__name__}", value)
    for key in ("models", "runs", "exports"):
        need(toml.get(key), key, "a value", "none")
    exports = []
    for kind, settings in toml["exports"].items():
        need(isinstance(settings, dict), f"[exports.{kind}]", "a table of settings", settings)
        for name in settings:
            need(name in SETTINGS, f"[exports.{kind}] {name}", f"one of {', '.join(SETTINGS)}", "another setting")
        lists = [value if isinstance(value, list) else [value] for value in settings.values()]
        exports += [(kind, dict(zip(settings, values))) for values in itertools.product(*lists)]
    base = toml.get("base", {})
    for name in base:
        need(name in BASE, f"[base] {name}", f"one of {', '.join(BASE)}", "another setting")
    script, seeds = toml.get("script", "train_gpt.py"), toml.get("seeds", [1337])
    need(script in ("train_gpt.py", "train_gpt_mlx.py"), "script", "train_gpt.py or train_gpt_mlx.py", script)
    need(seeds and all(type(seed) is int for seed in seeds), "seeds", "whole numbers", seeds)
    return Plan(path, toml.get("about", ""), toml["models"], toml["runs"], seeds, base, exports, script)


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

    def __init__(self, plan: Plan, script, run: str, seed: int):
        folder = LOGS / f"{plan.place(run)}_seed{seed}"
        path, log = folder / "model.safetensors", folder / "train.log"
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()  # FileNotFoundError where it was not trained
        known = script.Config.__dataclass_fields__
        trained = {name: value for name, value in (read_log(log).config or {}).items() if name in known}
        own = ("mode", "preset", "run_id", "resume", "artifact", "checkpoint", "init_from", "target_bytes", "compile")
        kept = {name: value for name, value in trained.items() if name not in own and not name.startswith("quant")}
        self.script = script
        weights, _, self.loops = script.load_model_file(str(path))
        base = dataclasses.replace(script.Config(**kept), compile=False, **plan.base)
        paths = {name: str(ROOT / getattr(base, name)) for name in ("data_path", "tokenizer_path")}
        self.config = dataclasses.replace(base, **paths)
        self.weights, self.score = weights, script.Score(self.config)
        self.engine = script.Engine(self.config)
        self.engine.build(weights, training=False)
        shards = script.find_shards(self.config.data_path, "train", self.config.vocab_size)
        self.stream = script.TokenStream(shards, self.config.vocab_size)
        self.raw: dict[int, float] = {}
        self.calibrations: dict[tuple, tuple] = {}

    def evaluate(self, weights: dict, loops: int) -> float:
        self.engine.set_weights(weights)
        return self.score.bpb(self.script.evaluate(self.config, self.engine, self.score.tokens, loops))

    def calibrate(self, c, loops: int) -> tuple:
        """(Hessians, Fisher information, seconds), found once for each number of tokens and passes."""
        if c.quantizer not in self.script.CALIBRATED:
            return None, None, None
        if (c.calib_tokens, loops) not in self.calibrations:
            self.engine.set_weights(self.weights)
            self.engine.config, began = c, time.perf_counter()
            found = self.engine.curvature(self.stream, 0, loops)[:2]
            self.calibrations[c.calib_tokens, loops] = *found, time.perf_counter() - began
        return self.calibrations[c.calib_tokens, loops]

    def export(self, settings: dict, path: Path, code: int) -> dict:
        """One export, from weights to the score of what is on disk."""
        c = dataclasses.replace(self.config, **settings)
        self.script.check_config(dataclasses.replace(c, mode="export", checkpoint="given"))
        loops = c.eval_loops or self.loops
        if loops not in self.raw:
            self.raw[loops] = self.evaluate(self.weights, loops)
        hessians, squares, seconds = self.calibrate(c, loops)
        began = time.perf_counter()
        sizes = self.script.write_artifact(path, c, self.loops, self.weights, hessians, code, squares)
        coding, began = time.perf_counter() - began, time.perf_counter()
        found = self.script.read_artifact(path)[2]
        reading, bpb = time.perf_counter() - began, self.evaluate(found, loops)
        return {"layout": c.layout, "eval_loops": loops, "val_bpb_raw": self.raw[loops], "val_bpb": bpb,
                "gap": bpb - self.raw[loops], **sizes, "calib_seconds": seconds, "code_seconds": coding,
                "read_seconds": reading, "val_tokens": len(self.score.tokens) - 1, "weights_sha256": self.sha256,
                "partial": self.score.partial, "dataset_sha256": self.script.dataset_sha256(c),
                "dataset": Path(c.data_path).name, "params_stored": self.script.count_params(c)}  # fmt: skip


def parts_sha256(script: Path) -> str:
    """Hash of the sections SCHEDULES to ARTIFACT: the model, how it runs, what is written. How it is scored, and the
    script's own bytes, are outside."""
    text = script.read_text(encoding="utf-8")
    return hashlib.sha256(text[text.index("\n# SCHEDULES [") : text.index("\n# RUN LOG [")].encode()).hexdigest()


def work(plan: Plan) -> None:
    script = load_script(plan.script)
    source, code = parts_sha256(ROOT / plan.script), len((ROOT / plan.script).read_bytes())
    lines = read_lines(plan)
    if {line["script_sha256"] for line in lines} - {source}:
        commits = ", ".join(sorted({str(line.get("commit"))[:12] for line in lines}))
        raise InputError(f"{short(plan.lines)}: expected exports of this {plan.script}, found some of another version "
                         f"({commits}); check that out to go on with it, delete it, or give the plan another name")
    done, wanted = {key_of(line) for line in lines}, []
    for seed, run in itertools.product(plan.seeds, plan.runs):
        wanted += [(seed, run, kind, settings) for kind, settings in plan.exports
                   if key_of(dict(run=run, seed=seed, kind=kind, settings=settings)) not in done]  # fmt: skip
    for _, settings in plan.exports:  # before hours of work; again with each model
        given = plan.base | settings | {"mode": "export", "checkpoint": "given"}
        script.check_config(dataclasses.replace(script.Config(), **given))
    plan.home.mkdir(parents=True, exist_ok=True)
    if plan.lines.is_file() and not plan.lines.read_bytes().endswith(b"\n"):
        with open(plan.lines, "a", encoding="utf-8") as file:
            file.write("\n")  # after a line that was cut off
    missing, matrices, scratch = [], {}, plan.home / f"artifact.{os.getpid()}.tmp"
    print(f"{plan.path.stem}: {len(done) + len(wanted)} exports, {len(wanted)} to do", flush=True)
    try:
        for (seed, run), group in itertools.groupby(wanted, lambda item: item[:2]):
            try:
                model = Model(plan, script, run, seed)
            except FileNotFoundError as error:  # the others can be exported
                missing.append(short(Path(error.filename)))
                matrices[plan.place(run).rsplit("/", 1)[0]] = None
                continue
            for _, _, kind, settings in group:
                result = model.export(settings, scratch, code)
                line = {"run": run, "seed": seed, "kind": kind, "settings": settings, **result,
                        "script_sha256": source, "commit": script.source_commit(), "versions": script.versions(),
                        "device": model.engine.device_name}  # fmt: skip
                with open(plan.lines, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{run} {seed} {kind} {settings}: {result['bits_per_weight']:.3f} bits, {result['val_bpb']:.4f} "
                      f"bpb, gap {result['gap']:.4f}", flush=True)  # fmt: skip
    finally:
        scratch.unlink(missing_ok=True)
    if missing:
        raise InputError(f"{', '.join(missing)}: expected the weights of finished runs, found none; train them with "
                         + " and ".join(f"python records/ablate.py records/ablations/{name}.toml" for name in matrices))


def label(settings: dict) -> str:
    return " ".join(f"{name.removeprefix('quant_')}={value}" for name, value in settings.items() if name != "quantizer")


def report(plan: Plan) -> str:
    """Writes README.md and exports.png beside the lines. Returns the table."""
    wanted = {key_of(dict(run=run, seed=seed, kind=kind, settings=settings))
              for run in plan.runs for seed in plan.seeds for kind, settings in plan.exports}  # fmt: skip
    lines = [line for line in read_lines(plan) if key_of(line) in wanted]
    if not lines:
        return "nothing exported yet\n"
    same = ("dataset_sha256", "val_tokens", "script_sha256")
    if mixed := [key for key in same if len({line[key] for line in lines}) > 1]:
        raise InputError(f"{short(plan.lines)}: expected exports of one kind, found several: {', '.join(mixed)}")
    groups: dict[tuple, list[dict]] = {}
    for line in lines:
        groups.setdefault((line["run"], line["kind"], json.dumps(line["settings"])), []).append(line)

    def average(found, key):
        return mean_std([line[key] for line in found])[0]

    rows, points = [], {}
    for run in plan.runs:
        mine = [(key, found) for key, found in groups.items() if key[0] == run]
        for (_, kind, settings), found in sorted(
            mine, key=lambda item: (item[0][1], average(item[1], "bits_per_weight"))
        ):
            gap, std = mean_std([line["gap"] for line in found])
            bits = average(found, "bits_per_weight")
            aim = average(found, "loss") if all(line["loss"] for line in found) else None
            rows.append([
                run, f"`{found[0]['layout']}`", kind, label(json.loads(settings)), len(found), number(bits, ".3f"),
                number(average(found, "entropy_bits_per_weight"), ".3f"),
                f"{average(found, 'bytes_artifact'):,.0f}", number(average(found, "val_bpb")), number(gap), number(std),
                "" if aim is None else number(aim),
            ])  # fmt: skip
            points.setdefault((run, kind), []).append((average(found, "bytes_artifact") / 1000, gap))
    head = ["model", "layout", "kind", "settings", "n", "bits a weight", "entropy", "artifact bytes", "val_bpb", "gap",
            "std of gap", "nats aimed at"]  # fmt: skip
    table, one = markdown_table(head, rows), lines[0]
    left = len(wanted) - len(lines)
    note = f"**{left} of {len(wanted)} exports are still to be done.**\n\n" if left else ""
    partial = f" (partial: the first {one['val_tokens']:,} tokens)" if one["partial"] else ""
    settings = " ".join(f"`{name}={value}`" for name, value in plan.base.items()) or "the models' own"
    places = ", ".join(f"`{plan.place(run)}`" for run in plan.runs)
    commits, devices = (", ".join(sorted({str(line[key]) for line in lines})) for key in ("commit", "device"))
    text = f"""<!-- written by records/exports.py from {plan.path.name} and exports.jsonl -->
# {plan.path.stem}

{plan.about.strip()}

Bits a weight: of the coded matrices, their steps and models included; entropy: of each matrix's integers, order 0. Gap:
bits per byte after export, read back from disk, less those of the weights before; nats aimed at: QUANT_LOSS, or what
TARGET_BYTES made of it: what rounding would add to the loss, nats a token, if the Fisher information were all.

{table}
{note}![gap against the artifact's bytes](exports.png)

- Models: {places}; seeds {", ".join(map(str, plan.seeds))}. Data: `{one["dataset"]}`, sha256 \
{one["dataset_sha256"][:12]}, {one["val_tokens"]:,} validation tokens{partial}.
- Script: `{plan.script}`, commit {commits}; sha256 of its sections SCHEDULES to ARTIFACT: {one["script_sha256"][:12]}.
- Devices: {devices}.
- Settings of every export: {settings}.

Again: `python records/exports.py {short(plan.path)}`. A line an export: `exports.jsonl`.
"""
    draw(plan, points)
    write_text(plan.home / "README.md", text)
    return table


def draw(plan: Plan, points: dict[tuple[str, str], list[tuple[float, float]]]) -> None:
    """A panel a model: gap in bits per byte against the artifact's bytes, a line a kind."""
    plt = plotting()
    runs = [run for run in plan.runs if any(key[0] == run for key in points)]
    kinds = dict.fromkeys(kind for _, kind in points)
    figure, panels = plt.subplots(1, len(runs), figsize=(2 + 3.6 * len(runs), 4.2), dpi=130, layout="constrained",
                                  sharey=True, squeeze=False)  # fmt: skip
    for panel, run in zip(panels[0], runs):
        for i, kind in enumerate(kinds):
            found = sorted(points.get((run, kind), []))
            if found:
                x, y = zip(*found)
                panel.plot(x, [max(value, 1e-5) for value in y], "o-", color=COLORS[i % len(COLORS)], markersize=4,
                           linewidth=1.3, label=kind)  # fmt: skip
        panel.set_title(run, loc="left", fontsize=11)
        panel.set(xlabel="artifact, kilobytes", yscale="log")
        panel.spines["right"].set_visible(False)
        panel.grid(color="#e4e4e4", linewidth=0.8)
        panel.set_axisbelow(True)
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
