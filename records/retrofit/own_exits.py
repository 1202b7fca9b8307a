"""Who could leave a retrofit of ours early, and what depth-wise batching would make of it.

    python records/retrofit/own_exits.py             the models of RUNS: own_exits/exits.log, then the page
    python records/retrofit/own_exits.py --report    only the page and its picture, from exits.log

The models are trained by own.toml and band.toml, and lie in logs/ after that. exits.log has what
retrofit/exits.py says of each, and the milliseconds of a pass, measured here; the page puts both through
retrofit/depth_batching.py.
"""

import contextlib
import dataclasses
import io
import re
import statistics
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[1:1] = [str(ROOT / "records"), str(ROOT / "retrofit")]

import depth_batching as batching  # noqa: E402
import exits  # noqa: E402
from common import markdown_table, need, number, page_tool, read_json, run_tool, short, write_text  # noqa: E402
from draw import canvas, draw_line, save_picture, tidy  # noqa: E402

HOME = Path(__file__).with_suffix("")
DATA = ["--preset=mini", "--data_path=data/datasets/wiki_books_mini_sp512", "--vocab_size=512",
        "--tokenizer_path=data/tokenizers/wiki_books_mini_sp512_bpe.model", "--val_max_tokens=65536"]  # fmt: skip
EXIT = ", exit loss"
RUNS = {  # name on the page: runs in logs/, a seed each
    "step": "own/step",
    "step, exit loss": "own/step_exit01",
    "average, LoRA 16": "own/average_svd16",
    "average, LoRA 16, exit loss": "own/average_svd16_exit01",
    "band of three passes": "band/fixed",
    "band of three passes, exit loss": "band/exit01",
}
PARENT = ROOT / "logs" / "retrofit" / "parent" / "model.safetensors"
SLOTS, REPEATS = 32, 9


# What is measured ----------------------------------------------------------------------------------------------------


def milliseconds(script, path: Path) -> list[float]:
    """The least time of a step of SLOTS tokens with 1, 2, ... passes: windows of a whole context, uncompiled, over
    their length."""
    weights, model, _ = script.load_model_file(str(path))
    config = script.model_config(dataclasses.replace(script.Config(), compile=False, dtype="float32"), model)
    engine = script.Engine(config)
    engine.build(weights, training=False)
    ids = engine.tensor(np.ones((SLOTS, config.train_seq_len), np.int64))
    counts = range(1, script.parse_layout(config.layout).loops + 1)
    found = [[] for _ in counts]
    for _ in range(REPEATS):
        for passes, times in zip(counts, found):
            start = time.perf_counter()
            engine.model(ids, passes)
            times.append(1000 * (time.perf_counter() - start) / config.train_seq_len)
    return [min(times) for times in found]


def measure() -> str:
    """What exits.py says of every model that is here, and the milliseconds of its passes and of the parent's."""
    script, said = exits.load_script(exits.SCRIPTS[0]), io.StringIO()
    with contextlib.redirect_stdout(said):
        print(f"parent: milliseconds a step: {milliseconds(script, PARENT)[0]:.5f}")
        for name, place in RUNS.items():
            paths = sorted((ROOT / "logs").glob(f"{place}_seed[0-9]/model.int6.rgpt"))
            need(paths, f"logs/{place}_seed*", "trained models", "none", "run the matrices first (--help)")
            for path in paths:
                print(f"\n$ python retrofit/exits.py {short(path)} {' '.join(DATA)}")
                print(
                    f"its score when trained: {read_json(path.with_name('result.json'))['val_bpb']:.4f} bits per byte"
                )
                exits.main([short(path), *DATA])
            times = " ".join(f"{value:.5f}" for value in milliseconds(script, paths[0]))
            print(f"\n{name}: milliseconds a step: {times}")
    return said.getvalue()


# What is made of it --------------------------------------------------------------------------------------------------


def read_log(text: str) -> tuple[dict[str, list[dict[str, list[float]]]], dict[str, list[float]]]:
    """({name: a table for each seed, {rule: [mean passes, nats, bits per byte, share, share, ...]}}, {name without
    EXIT: milliseconds})."""
    tables = {name: [] for name in RUNS}
    for part in text.split("\n$ ")[1:]:
        place = re.search(r"logs/(\S+)_seed\d/", part)[1]
        rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.,]+) \|$", part, re.M)
        table = {row[0]: [*map(float, row[1:4]), *map(float, row[4].split(","))] for row in rows}
        tables[next(name for name in RUNS if RUNS[name] == place)].append(table)
    times = re.findall(r"^(.+): milliseconds a step: (.+)$", text, re.M)
    least: dict[str, list[float]] = {}
    for name, values in times:  # an exit loss changes no block: the two models of a shape are timed as one
        shape, mine = name.removesuffix(EXIT), [float(value) for value in values.split()]
        least[shape] = [min(pair) for pair in zip(mine, least.get(shape, mine))]
    return tables, least


def machine_flags(times: list[float], parent: float) -> list[str]:
    """Flags of the simulator from milliseconds with 1, 2, ... passes and those of the parent: what is no pass runs once
    a token, in the parent as well."""
    block = (times[-1] - times[0]) / (len(times) - 1)
    once = max(times[0] - block, 0.0)
    return [f"--block-ms={block:.6f}", f"--once-ms={once:.6f}", f"--full-ms={max(parent - once, 1e-6):.6f}"]


def gain(shares: list[float], flags: list[str]) -> float:
    """Tokens per second with exits over the best without: of the looped model and, where its time is given, the full
    one."""
    args = batching.parse([f"--exits={','.join(f'{share:.6f}' for share in shares)}", f"--slots={SLOTS}", *flags])
    machine = batching.Machine(args.slots, len(shares), args.block_ms, args.once_ms)
    rows, _ = batching.simulate(args, machine, batching.parse_shares(args.exits))
    return rows[-1][2] / max(rate for name, _, rate in rows if name.endswith("sequence-wise"))


def arm_rows(name: str, seeds: list[dict], times: dict[str, list[float]]) -> list[list]:
    """[model, rule, mean passes, bits per byte, its standard deviation, gain with the paper's times, with ours]."""
    found, passes = [], len(seeds[0]["oracle"]) - 3
    for rule in seeds[0]:
        if rule.startswith("change") and passes < 3:  # nobody can leave: it needs the pass before
            continue
        mean = [statistics.fmean(column) for column in zip(*(seed[rule] for seed in seeds))]
        spread = statistics.stdev(seed[rule][2] for seed in seeds) if len(seeds) > 1 else None
        shares = [share / sum(mean[3:]) for share in mean[3:]]
        papers = gain(shares, []) if passes == 2 else None
        ours = gain(shares, machine_flags(times[name.removesuffix(EXIT)], times["parent"][0]))
        found.append([name, rule, mean[0], mean[2], spread, papers, ours])
    return found


def draw(rows: list[list], path: Path) -> None:
    """Bits per byte against tokens per second for every rule, a colour a model; lines join the thresholds of a rule."""
    figure, axes = canvas(9, 4.6)
    for i, name in enumerate(RUNS):
        mine = [row for row in rows if row[0] == name]
        for kind, style in (("all", "-"), ("confidence", "--"), ("change", ":")):
            points = sorted((row[6], row[3]) for row in mine if row[1].startswith(kind))
            label = name if kind == "all" else None
            draw_line(axes, points, i, label, linestyle=style, marker="o", markersize=3)
        for row in mine:
            if row[1] == "oracle":
                draw_line(axes, [(row[6], row[3])], i, None, marker="*", markersize=12)
    axes.set_xlabel("tokens per second, over the best sequence-wise batching (our times)")
    axes.set_ylabel("bits per byte")
    axes.set_ylim(2.15, 3.0)  # one pass with LoRA and without an exit loss is far above
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)
    save_picture(figure, path)


def report(text: str) -> None:
    """Writes the page and its picture from exits.log."""
    tables, times = read_log(text)
    rows = [row for name in RUNS for row in arm_rows(name, tables[name], times)]
    cells = [[*row[:2], f"{row[2]:.3f}", *map(number, row[3:5]), *(number(x, ".2f") for x in row[5:])] for row in rows]
    head = ["model", "who leaves", "mean passes", "bits per byte", "std", "tok/s, paper's times", "tok/s, our times"]
    parent = times.pop("parent")[0]
    ours = [[name, " ".join(machine_flags(mine, parent))] for name, mine in times.items()]
    counts = "; ".join(f"{name}: {len(tables[name])}" for name in RUNS)
    draw(rows, HOME / "exits.png")
    write_text(HOME / "README.md", PAGE.format(
        table=markdown_table(head, cells), times=markdown_table(["model", "the simulator's"], ours), counts=counts,
        repeats=REPEATS, slots=SLOTS,
    ))  # fmt: skip


PAGE = """<!-- written by records/retrofit/own_exits.py from exits.log -->
# Exits of models of ours

Who could leave a looped retrofit early, and what depth-wise batching would make of it (arXiv 2410.20672): models of
[own](../own.toml) (two blocks twice, with and without LoRA) and [band](../band/README.md) (two of four blocks three
times), with and without EXIT_WEIGHT=0.1, through `retrofit/exits.py` and `retrofit/depth_batching.py`. Made anew from
one parent as own's are, in float32 on an AMD EPYC with AVX-512 bf16, two cores shared with other work. Scores are of
the first 65,536 held-out tokens: compare them here only. On all of them the four models of two passes have 2.6116,
2.6432, 2.4245 and 2.4790 (the log has each seed's), the first ones in own 2.6122, 2.6441, 2.4224 and 2.4771. Seeds:
{counts}.

The last two columns are tokens per second over the best sequence-wise batching, the unlooped model's included: with the
paper's milliseconds (Gemma with two passes), and with ours. In ours embedding, output layer, prelude and coda are a
large part, and run in every step in which some token ends. `change` needs the pass before, so of two passes it lets
nobody out.

{table}
- **An exit loss makes a pass fit to leave after**: without it the oracle lets 60 % of the tokens go after the first of
  two passes, with it 78 %, and all of them leaving there costs 0.026 bits per byte instead of 0.199. Its price is 0.030
  after two passes.
- **A LoRA makes leaving worse**, as the paper says: the oracle lets 14 % go, with the exit loss 40 %; one pass has 5.33
  and 2.90. The better model of two passes (2.336) is the worse one to leave.
- **Nothing that can be followed gains.** The oracle would run 1.38 and 1.58 times as fast with the paper's times,
  and knows the last pass's answer. Confidence of 1/2 lets 7 % out where there is an exit loss (1.00 times as fast);
  where there is none it lets those out who should stay (2.550 instead of 2.497 with `step`, 4.13 instead of 2.34 with
  LoRA).
- **Three passes, one seed**: the divergence from the pass before (`change 0.1`) lets all but 0.2 % go after the second,
  for 0.0045 bits per byte. The band starts as the parent, so one pass is nearly as good as three (0.020, with the exit
  loss 0.012); the exit loss costs three passes 0.012 and makes one no better.
- With our times depth-wise batching is ahead of waiting with the oracle's exits at most (0.87 to 1.24 for two passes),
  and with exits that ruin the model. Nothing here beats the unlooped parent, which trained on as long is better than
  every model here ([own](../own/README.md)) and as fast as one pass of the band.

![bits per byte against tokens per second](exits.png)

A star is the oracle; solid lines join the scores of all tokens after 1, 2, ... passes, dashed ones thresholds of
confidence, dotted ones of change; one pass with LoRA (5.33) and most of its confidences are above the frame. Our times,
least of {repeats} for batches of {slots} tokens, as the simulator takes them:

{times}
Log: [exits.log](exits.log). Again: `python records/retrofit/own_exits.py` where the models lie in logs/.
"""


def main(argv: list[str] | None = None) -> int:
    return page_tool(argv, __doc__, HOME / "exits.log", measure, report)


if __name__ == "__main__":
    sys.exit(run_tool(main))
