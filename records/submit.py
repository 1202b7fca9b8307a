"""Turn finished runs into a record folder in the challenge's form, ready for a pull request.

    python records/submit.py logs/RUN1 logs/RUN2 logs/RUN3 --track non_record_16mb --name LoopedBand --blurb "..."

One run folder for each seed of one configuration. The result is records/track_<track>/<date>_<name>/:

    train_gpt.py           the script of the runs, their configuration baked in as its defaults: started there with
                           plain `torchrun --standalone --nproc_per_node=8 train_gpt.py` it repeats the first run
    train_seed<N>.log      as the script wrote it; result_seed<N>.json and metrics_seed<N>.jsonl belong to it
    submission.json        every number computed from those files
    README.md              tables complete; what they mean is yours to write (--blurb, --prose)
    requirements.txt       the versions of the runs

Nothing is kept unless the folder passes records/check.py without an error and the baked script repeats the first steps
of the first run, here and now (--no-proof leaves that out and says so in the README).
"""

import dataclasses
import datetime
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

from check import check_folder, need_score
from check_files import a_date
from check_logs import OUR_RUN_KEYS
from check_ours import BAKED
from common import RECORDS, ROOT, TRACKS, facts_of, is_number, markdown_table, read_result, short
from layout import building
from logs import Log, read_log
from runs import git, handling, launch, load_module
from tool import InputError, Parser, need, run_tool, write_json, write_text

# Settings that say how a run was started, not what it was.
NOT_BAKED = """mode preset run_id resume artifact checkpoint init_from log_dir prompt sample_tokens temperature
    top_k""".split()
NEEDED = """run_id framework seed val_bpb val_loss val_bpb_raw complete fits config_sha256 dataset dataset_sha256
    bytes_artifact steps tokens train_flops train_time_ms eval_time_ms calib_time_ms versions device world_size layout
    params_stored val_tokens quantizer""".split()  # of result.json
NUMBERS = "val_bpb val_loss val_bpb_raw bytes_artifact steps tokens train_flops train_time_ms eval_time_ms".split()
SAME = "framework dataset dataset_sha256 world_size device val_tokens".split()  # of result.json, in every seed
PACKAGES = ("torch", "numpy", "sentencepiece", "safetensors", "constriction", "tqdm")  # what train_gpt.py imports
SCRIPTS = {"torch": "train_gpt.py", "mlx": "train_gpt_mlx.py"}
PRESET = "submission"
CHALLENGE_MS = 600_000  # of training, and again of evaluation, that the README compares with in every track
PROOF_STEPS, PROOF_MINUTES = 3, 5
PROOF_TOLERANCE = 0.02  # relative, of a training loss: another device or no compilation rounds differently
FILL_IN = "TO FILL IN: what this entry tries, what it shows, whose ideas it builds on."
NOT_PROVEN = "**Not proven on the machine that wrote this folder: start it before you submit it.**"


@dataclass
class Run:
    folder: Path
    result: dict
    log: Log

    @property
    def seed(self) -> int:
        return self.result["seed"]

    @property
    def script(self) -> str:
        return SCRIPTS[self.result["framework"]]

    @property
    def count_code(self) -> str:
        """How the run counted its code: 1, packed or 0."""
        return str(self.log.config.get("count_code", "1"))

    @property
    def train_ms(self) -> float:
        return self.result["train_time_ms"] + (self.result["calib_time_ms"] or 0)


# Reading -------------------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> Run:
    """A finished run's files. Refuses what is missing, unfinished, partial, over the cap or without its source."""
    need(folder.is_dir(), short(folder), "a run folder such as logs/RUN", "none")
    path, log_path, metrics = (folder / name for name in ("result.json", "train.log", "metrics.jsonl"))
    mend = "the run was not finished: go on with RUN_ID and RESUME=1"
    need(path.is_file(), short(folder), "the result.json of a finished run", "none", mend)
    result = read_result(path, NEEDED)
    for other in (log_path, metrics):
        need(other.is_file(), short(folder), other.name, "none")
    mend = f"go on with RUN_ID={result['run_id']} RESUME=1, or mend its rates"
    need(result["val_bpb"] is not None, short(path), "a finished run", "one that stopped or blew up", mend)
    odd = [f"{key} {result[key]}" for key in NUMBERS if not is_number(result[key])]
    need(not odd, short(path), "finite numbers", ", ".join(odd))
    need(result["framework"] in SCRIPTS, short(path), "framework torch or mlx", result["framework"])
    partial = f"a partial one ({result['val_tokens']} tokens)"
    need(result["complete"], short(path), "a score on the whole validation set", partial, "run with VAL_MAX_TOKENS=0")
    smaller = "fewer blocks, a smaller MODEL_DIM, or QUANTIZER=trellis and TARGET_BYTES"
    cap = f"code + artifact within {result.get('bytes_cap')} bytes"
    need(result["fits"], short(path), cap, result.get("bytes_total"), smaller)
    try:
        log_path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{short(log_path)}: expected UTF-8 text, found {error}") from None
    log, mend = read_log(log_path), "give a log as the script wrote it"
    need(log.config and log.source, short(log_path), "the script's source and a config at its head", "none", mend)
    return Run(folder, result, log)


def load_script(source: bytes, what: str):
    """The module of a script's source, which may be packed. Raises InputError, whatever the source does."""
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "script.py"
        path.write_bytes(source)
        try:
            module = load_module(path)
            vars(module).setdefault("SOURCE", source.decode())  # its file will be gone; a packed one knows it already
            module.load_config([], {}, module.DEFAULT_PRESET)
        except (Exception, SystemExit) as error:
            found = f"{type(error).__name__}: {error}"
            raise InputError(f"{what}: expected a script that loads, found {found}; was it edited?") from None
    return module


def check_together(runs: list[Run], script) -> None:
    """Runs of one submission differ in their seed and in nothing else that was trained, scored or exported."""
    first, others = runs[0], runs[1:]
    settled = f"{script.GROUPS['score']} {script.GROUPS['artifact']}".split()
    for run in others:
        old, new = first.log.config, run.log.config
        differs = {key for key in old if old[key] != new.get(key)} - OUR_RUN_KEYS
        what = ", ".join(f"{key}={new.get(key)} instead of {old[key]}" for key in sorted(differs))
        same = run.result["config_sha256"] == first.result["config_sha256"] and not differs & set(settled)
        need(same, short(run.folder), f"the configuration of {short(first.folder)}", what or "another")
        for key in SAME:
            need(run.result[key] == first.result[key], short(run.folder), f"{key} {first.result[key]}", run.result[key])
    seeds = [run.seed for run in runs]
    need(len(set(seeds)) == len(seeds), "RUN", "one run a seed", f"seeds {', '.join(map(str, seeds))}")


def check_track(name: str, runs: list[Run]) -> None:
    """What a track asks for and the runs cannot have any more."""
    track, result, mend = TRACKS[name], runs[0].result, "use another track"
    if track.fineweb:
        need(result["framework"] == "torch", "--track", "local for MLX runs (the challenge runs PyTorch)", name)
        fineweb = result["dataset"].startswith("fineweb")
        need(fineweb, "--track", "local for text that is not FineWeb", f"{name} with {result['dataset']}")
    if track.counts_code is not None:
        asked, found = "with" if track.counts_code else "without", f"COUNT_CODE={runs[0].count_code}"
        counted = runs[0].count_code != "0"
        need(counted == track.counts_code, "--track", f"runs that count bytes {asked} those of the code", found, mend)
    if name == "10min_16mb":
        eight, found = result["world_size"] == 8 and "H100" in result["device"], result["device"]
        need(eight, "--track", "runs on 8 x H100", f"{result['world_size']} x {found}", "use --track non_record_16mb")
    for run in runs:
        start, foreign = run.log.config.get("init_from"), "what it started from is not in the artifact's ten minutes"
        need(not start, short(run.folder), "a run from scratch", f"INIT_FROM={start}", foreign)
        spent = {
            "FLOPs of training": (run.result["train_flops"], track.flops_cap),
            "ms of training and calibration": (run.train_ms, track.time_cap_ms),
            "ms of evaluation": (run.result["eval_time_ms"], track.time_cap_ms),
        }
        for what, (used, cap) in spent.items():
            need(not cap or used <= cap, short(run.folder), f"at most {cap or 0:g} {what}", f"{used:.6g}", mend)


# The script ----------------------------------------------------------------------------------------------------------


def recorded_settings(run: Run) -> dict[str, object]:
    """The run's settings as its record shall have them, which lies three levels below the root, as in the challenge."""
    config = {key: value for key, value in run.log.config.items() if key not in NOT_BAKED}
    for key, kind in (("data_path", "datasets"), ("tokenizer_path", "tokenizers")):
        config[key] = f"../../../data/{kind}/{Path(config[key]).name}"
    return config


def preset_text(settings: dict[str, object]) -> str:
    """A preset as the scripts read it: name=value, separated by white space."""
    texts = {key: str(int(value)) if isinstance(value, bool) else str(value) for key, value in settings.items()}
    for key, value in texts.items():
        need(re.fullmatch(r'[^\s"\\]*', value), key.upper(), "a value without blanks and quotes", value, "rename it")
    wrapper = textwrap.TextWrapper(115, f'    "{PRESET}": """', " " * 8, break_long_words=False, break_on_hyphens=False)
    return wrapper.fill(" ".join(f"{key}={value}" for key, value in texts.items())) + '""",\n'


def bake(source: str, settings: dict[str, object]) -> str:
    """The script with one more preset, which is what it runs without flags. Nothing else changes.

    A run of a record's own script has such a preset already: it is replaced."""
    source = BAKED.sub("", source, count=1)
    table, default = re.compile(r"^PRESETS\b[^=\n]*= \{\n", re.M), re.compile(r'^DEFAULT_PRESET = ".*"$', re.M)
    one = len(table.findall(source)) == 1 == len(default.findall(source))
    need(one, "train.log", "a script with one PRESETS table and one DEFAULT_PRESET", "another")
    start = table.search(source).end()
    return default.sub(f'DEFAULT_PRESET = "{PRESET}"', source[:start] + preset_text(settings) + source[start:])


def baked_script(run: Run, script) -> tuple[str, object, dict[str, object]]:
    """The run's script with its configuration baked in, as a text and as a module, and the settings that it states.

    Without flags it has the configuration of the run."""
    defaults = {field.name: field.default for field in dataclasses.fields(script.Config)}
    expected = "a script whose Config has the settings of the config line"
    need(defaults.keys() == run.log.config.keys(), short(run.log.path), expected, "another")
    recorded, what = recorded_settings(run), f"the baked {run.script}"
    settings = {key: value for key, value in recorded.items() if value != defaults[key]}
    baked = bake(run.log.source, settings)
    module = load_script(baked.encode(), what)
    config, mend = module.load_config([], {}, module.DEFAULT_PRESET)[0], "was the log's config line or source changed?"
    for key, value in recorded.items():
        need(getattr(config, key) == value, what, f"{key}={value}", getattr(config, key), mend)
    found, stated = module.config_sha256(config), str(run.result["config_sha256"])
    need(found == stated, what, f"the run's configuration ({stated[:12]})", found[:12], mend)
    return baked, module, settings


# The proof -----------------------------------------------------------------------------------------------------------


def prove_run(folder: Path, run: Run) -> str:
    """Starts the record's script inside its folder and compares its first steps with the log. Returns what was seen."""
    expected = {step.step: step.values["train_loss"] for step in run.log.steps if "train_loss" in step.values}
    steps = sorted(expected)[:PROOF_STEPS]
    need(steps, short(run.folder / "train.log"), "training losses, to compare the proof with", "none")
    found, said = first_losses(folder, run, steps)
    own = [line for line in said if line.startswith("error:")]  # of the script; torchrun's words come after it
    error = (own or [line for line in reversed(said) if "error:" in line.lower()] or said[-1:] or ["no output"])[0]
    wanted = f"{len(steps)} steps in {PROOF_MINUTES} minutes from inside the folder"
    mend = "on the right machine it proves itself; --no-proof leaves it out"
    need(len(found) == len(steps), "proof", wanted, f"{len(found)} ({error})", mend)
    for step in steps:
        wanted, mend = f"a training loss near {expected[step]}, as in the log", "was its log or data changed?"
        need(abs(found[step] / expected[step] - 1) <= PROOF_TOLERANCE, f"proof, step {step}", wanted, found[step], mend)
    pairs = ", ".join(f"step {step} {found[step]:.4f} (log: {expected[step]:.4f})" for step in steps)
    return f"Started inside this folder, without flags and without compilation, the script gave {pairs}."


def first_losses(folder: Path, run: Run, steps: list[int]) -> tuple[dict[int, float], list[str]]:
    """Runs the script in `folder` until it has done `steps`. Returns their training losses, and what it printed."""
    with tempfile.TemporaryDirectory() as logs:
        output, log = Path(logs) / "output", Path(logs) / "proof" / "train.log"
        command, env = proof_command(run, logs)
        with open(output, "w") as file:
            streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, cwd=folder, env=env, start_new_session=True, **streams)
        found, deadline = {}, time.monotonic() + 60 * PROOF_MINUTES
        # What ends this tool must not leave a whole training behind, which has a session of its own.
        with handling(signal.default_int_handler, signal.SIGTERM, signal.SIGHUP):
            try:
                while process.poll() is None and len(found) < len(steps) and time.monotonic() < deadline:
                    time.sleep(0.3)
                    found = losses_in(log, steps)
            finally:
                process.terminate()  # torchrun hands it on to its processes, which have sessions of their own
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        said = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
        return losses_in(log, steps), said  # it may have ended since the last look


def proof_command(run: Run, logs: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment of the proof: no setting of this shell reaches it."""
    fields = {name.upper() for name in run.log.config}
    env = {name: value for name, value in os.environ.items() if name not in fields}
    env |= {"LOG_DIR": logs, "RUN_ID": "proof", "COMPILE": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    count = run.result["world_size"] if "cpu" not in run.result["device"].lower() else 1
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))  # or torchrun sets 1
    return [*launch(count), run.script], env


def losses_in(log: Path, steps: list[int]) -> dict[int, float]:
    lines = [line for line in read_log(log).steps if line.step in steps] if log.is_file() else []
    return {line.step: line.values["train_loss"] for line in lines if "train_loss" in line.values}


# The folder ----------------------------------------------------------------------------------------------------------


def requirements(run: Run) -> str:
    """The packages of the script, in the versions of the run; tqdm's, which no run states, from this repository."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([A-Za-z0-9-]+)(?:\[\w+\])?==([0-9.]+)", text, re.M)) | run.result["versions"]
    names = PACKAGES if run.result["framework"] == "torch" else ("mlx", *PACKAGES[1:])
    return "".join(f"{name}=={pins[name].split('+')[0]}\n" for name in names if name in pins)


def summary(runs: list[Run], args, code_bytes: int) -> dict:
    """submission.json: the keys of the challenge's recent records, and a few of ours behind them."""
    first, framework = runs[0].result, runs[0].result["framework"]
    artifact = max(run.result["bytes_artifact"] for run in runs)
    total = artifact + (0 if runs[0].count_code == "0" else code_bytes)
    return {
        **{key: getattr(args, key) for key in ("author", "github_id", "name", "date", "track")},
        **facts_of([run.result for run in runs]),
        "bytes_total": total,
        "bytes_code": code_bytes,
        "bytes_model": artifact,
        "pytorch_version" if framework == "torch" else "mlx_version": first["versions"][framework],
        "compliance": {
            "train_under_600s": max(run.train_ms for run in runs) <= CHALLENGE_MS,
            "eval_under_600s": max(run.result["eval_time_ms"] for run in runs) <= CHALLENGE_MS,
            "artifact_under_16mb": total <= 16_000_000,
            "whole_validation_set": all(run.result["complete"] for run in runs),
        },
        "blurb": args.blurb or FILL_IN,
        "technique_summary": args.blurb or FILL_IN,
    }


def readme(runs: list[Run], args, facts: dict, settings: dict[str, object], proof: str) -> str:
    """README.md of the folder."""
    first, result, n = runs[0], runs[0].result, len(runs)
    std = f" ± {facts['val_bpb_std']:.4f}" if n > 1 else ""
    foreign = f"**The text is `{result['dataset']}`, not FineWeb: compare with runs on the same data only.**\n\n"
    foreign = "" if result["dataset"].startswith("fineweb") else foreign
    launch = f"torchrun --standalone --nproc_per_node={result['world_size']}"
    run_line = f"{launch if result['framework'] == 'torch' else 'python'} {first.script}"
    listed = "".join(f"    {key} = {value!r}\n" for key, value in settings.items())
    packed = ", compressed (it unpacks itself in memory)," if first.count_code == "packed" else ""
    code = f"{facts['bytes_code']:,} bytes of code" + ", which this track does not count" * (first.count_code == "0")
    rows = [
        [seed, *(f"{value:.7g}" if isinstance(value, float) else value for value in row.values())]
        for seed, row in facts["seed_results"].items()
    ]
    table = markdown_table(["seed", *facts["seed_results"][rows[0][0]]], rows)
    kept = {True: "within", False: "beyond"}
    train, score = (kept[facts["compliance"][f"{part}_under_600s"]] for part in ("train", "eval"))
    return f"""# {args.name}

**val_bpb {facts["val_bpb"]:.4f}{std}** ({n} seed{"s" * (n > 1)}, artifact read back from disk) |
**{facts["bytes_total"]:,} bytes** of {TRACKS[args.track].bytes_cap:,} | {facts["hardware"]}

{args.blurb or FILL_IN}

{args.prose}{foreign}## Results

{table}
Layout `{facts["layout"]}`, {facts["params_stored"]:,} parameters; artifact {result["quantizer"]}, at most \
{facts["bytes_model"]:,} bytes; {code}.
All {facts["val_tokens"]:,} validation tokens are scored. Training is {train} 600 s and evaluation {score} 600 s, on \
{facts["hardware"]}.
Numbers: computed from the logs and results here.

## Run

From inside this folder, with the data in `data/` at the repository's root:

    {run_line}

`SEED=<N>` before it gives another seed. {proof}
The script is the one at the head of each log{packed} but for its default: the preset `{PRESET}`, which states

{listed}
`train_seed<N>.log` is as the script wrote it; `result_seed<N>.json` and `metrics_seed<N>.jsonl` are its numbers.
"""


def fill(part: Path, runs: list[Run], args, script) -> dict:
    """Writes the record into `part`: checked, and proven unless --no-proof says otherwise. Returns submission.json."""
    first = runs[0]
    baked, module, settings = baked_script(first, script)
    shipped = module.packed(baked) if first.count_code == "packed" else baked.encode()
    (part / first.script).write_bytes(shipped)
    for run in runs:
        for name in ("train.log", "result.json", "metrics.jsonl"):
            stem, _, suffix = name.partition(".")
            shutil.copyfile(run.folder / name, part / f"{stem}_seed{run.seed}.{suffix}")
    write_text(part / "requirements.txt", requirements(first))
    facts, cap = summary(runs, args, len(shipped)), TRACKS[args.track].bytes_cap
    need(facts["bytes_total"] <= cap, first.script, f"what counts within {cap} bytes", facts["bytes_total"])
    write_json(part / "submission.json", facts)
    write_text(part / "README.md", readme(runs, args, facts, settings, NOT_PROVEN))
    findings = check_folder(part, args.track, args.beat)
    for finding in findings:
        if finding.severity != "info":
            print(finding)
    errors = sum(finding.severity == "error" for finding in findings)
    need(not errors, args.name, "a folder without errors", f"{errors} (above)", "nothing was written")
    if not args.no_proof:
        print("proof: the baked script takes its first steps, this can take minutes ...", flush=True)
        proof = prove_run(part, first)
        print(proof)
        write_text(part / "README.md", readme(runs, args, facts, settings, proof))
    return facts


def free_home(args) -> Path:
    """The folder that the entry will be; raises InputError where one is in the way."""
    home = args.out / f"track_{args.track}" / f"{args.date}_{args.name}"
    need_free(home, args.replace)
    written = home / "README.md"
    if written.is_file() and not (args.blurb or args.prose):
        theirs = FILL_IN not in written.read_text(encoding="utf-8", errors="replace")
        mend = "repeat them with --blurb and --prose, or delete the folder"
        need(not theirs, short(home), "a README without words of yours", "one with them", mend)
    return home


def need_free(home: Path, replace: bool) -> None:
    need(replace or not home.exists(), short(home), "a new folder", "one of that name", "--replace, or --name")


# The tool ------------------------------------------------------------------------------------------------------------


def git_setting(name: str) -> str:
    return (git("config", name) or b"").decode().strip()


def parse_args(argv: list[str] | None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, one for each seed")
    parser.add_argument("--track", choices=TRACKS, required=True, help="where it belongs")
    parser.add_argument("--name", required=True, help="name of the entry: letters, digits, . _ -")
    parser.add_argument("--author", default="", help="default: git's user.name")
    parser.add_argument("--github-id", default="", help="default: git's github.user")
    parser.add_argument("--blurb", default="", help="a sentence or two: what it is")
    parser.add_argument("--prose", type=Path, help="file of Markdown that goes into the README")
    parser.add_argument("--beat", type=float, help="score (bits per byte) that a record is to beat, for the check")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="YYYY-MM-DD (default: today)")
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder of the tracks (default: records/)")
    parser.add_argument("--replace", action="store_true", help="replace a folder of that name")
    parser.add_argument("--no-proof", action="store_true", help="do not start the baked script")
    args = parser.parse_args(argv)
    name = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", args.name)
    need(name, "--name", 'letters, digits, ".", "_" and "-", no spaces', f'"{args.name}"')
    dated = re.fullmatch(r"\d{4}-\d\d-\d\d", args.date) and a_date(args.date)
    need(dated, "--date", "YYYY-MM-DD", f'"{args.date}"')
    need_score(args.beat)
    args.author = args.author or git_setting("user.name")
    args.github_id = args.github_id or git_setting("github.user") or None
    need(args.author, "--author", "a name", "none, in git's user.name neither", 'give --author="..."')
    known, mend = args.github_id or args.track == "local", "give --github-id=..."
    need(known, "--github-id", "a GitHub user", "none, in git's github.user neither", mend)
    try:
        args.prose = args.prose.read_text(encoding="utf-8").strip() + "\n\n" if args.prose else ""
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prose: expected a text file, found {error}") from None
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    runs = [read_run(folder) for folder in args.runs]
    for run in runs[1:]:
        same = run.log.source == runs[0].log.source
        need(same, short(run.folder), f"the script of {short(runs[0].folder)}", "another version")
    script = load_script(runs[0].log.source.encode(), short(runs[0].folder / "train.log"))
    check_together(runs, script)
    check_track(args.track, runs)
    home = free_home(args)
    if len({str(run.result["versions"]) for run in runs}) > 1:
        print("notice: the runs had different package versions; requirements.txt states the first run's")
    with building(home, args.replace) as part:  # beside it, from where the data lies at the same distance
        facts = fill(part, runs, args, script)
        need_free(home, args.replace)  # asked again: another submit may have made it during the proof
    std = f" ± {facts['val_bpb_std']:.4f}" if facts["val_bpb_std"] is not None else ""
    print(f"{short(home)}: {facts['val_bpb']:.4f}{std} bits per byte, {len(runs)} seeds, {facts['bytes_total']} bytes")
    if not args.blurb:
        print(f"next: say in {short(home)}/README.md and submission.json what it is, then records/table.py")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
