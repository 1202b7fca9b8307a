"""Export a run of ours for mlx-lm: a folder that mlx_lm's load, generate, convert, lora, fuse and server take.

    python retrofit/export_mlx.py logs/RUN --out exports/RUN           its model.safetensors, else its artifact
    python retrofit/export_mlx.py logs/RUN/model.int6.rgpt --out ...   what was scored: the artifact's weights
    mlx_lm.generate --model exports/RUN --trust-remote-code --prompt "The function" --max-tokens 100

The folder has config.json, model.safetensors (float32, a file that our scripts read as well), the tokenizer as
tokenizer.json, recurrent_gpt.py, which is the model, and the run's result.json. Nothing is written before all of it is
checked: its logits are those of train_gpt_mlx.py, and its tokenizer encodes as the run's SentencePiece model.
"""

import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT / "retrofit", ROOT / "data", ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(1, str(folder))  # behind the folder of the tool that was started

import tokenizer  # noqa: E402
from tool import InputError, Parser, run_tool, write_json  # noqa: E402

MODEL_FILE = ROOT / "retrofit" / "recurrent_gpt.py"
WEIGHTS = ("model.safetensors", "model.int6.rgpt", "checkpoint.safetensors")  # of a run, the one to take first
LOG_HEAD = "=" * 120 + "\nconfig: "  # what stands in train.log between the script and the settings
TRIED_TOKENS = 24  # on which logits are compared
LARGEST_DIFFERENCE = 1e-3  # of two logits; they lie between -30 and 30


class Run(NamedTuple):
    """What is exported."""

    file: Path  # of the weights
    weights: dict  # float32 NumPy arrays, by the names of the scripts
    model: dict  # its options (MODEL_FIELDS)
    loops: int  # passes that it was trained with in the end
    tokenizer: Path  # a SentencePiece model
    result: Path | None  # result.json


def load_libraries():
    """(train_gpt_mlx, recurrent_gpt): the script and the model file. Raises InputError where a package is missing."""
    try:
        import recurrent_gpt

        import train_gpt_mlx
    except ImportError as error:
        raise InputError(f"retrofit: expected the packages mlx and mlx-lm, found {error}; run: make setup") from None
    return train_gpt_mlx, recurrent_gpt


@contextmanager
def in_one_line():
    """Turns what the scripts and the model file refuse (a ValueError each) into this tool's InputError."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from None


def find_weights(path: Path) -> Path:
    """The file of weights that a run's folder or a path names. Raises InputError if there is none."""
    if path.is_file():
        return path
    found = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if found is None:
        what = "no file of those" if path.is_dir() else "nothing there"
        raise InputError(f"{path}: expected a run's folder or one of {', '.join(WEIGHTS)}, found {what}")
    return found


def run_settings(folder: Path) -> dict:
    """The settings that the train.log of a run's folder states; empty where there is none."""
    try:
        log = (folder / "train.log").read_text(encoding="utf-8", errors="replace")
        line = log[log.rindex(LOG_HEAD) + len(LOG_HEAD) :].partition("\n")[0]
        settings = json.loads(line)
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def find_tokenizer(given: Path | None, settings: dict, file: Path) -> Path:
    """The SentencePiece model: the one given, else the one that the run's log names. Raises InputError."""
    stated = given or settings.get("tokenizer_path")
    mend = "name the SentencePiece model that made its shards: --tokenizer FILE.model"
    if not isinstance(stated, (str, Path)):
        raise InputError(f"{file.parent}: expected a train.log that names the tokenizer, found none; {mend}")
    places = [Path(stated)] if given else [Path(stated), ROOT / stated]  # a log's path is as the run was started
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise InputError(f"{stated}: expected the run's tokenizer, found no file; {mend}")
    return found


def read_run(path: Path, given: Path | None, script) -> Run:
    """Raises InputError for anything that is missing, damaged, or not of one run."""
    file = find_weights(path)
    with in_one_line():
        weights, model, loops = script.load_model_file(str(file))
    settings = run_settings(file.parent)
    found = find_tokenizer(given, settings, file)
    data_path = "" if given else str(settings.get("data_path") or "")
    with in_one_line():
        script.load_tokenizer(str(found), model["vocab_size"], data_path)
    result = file.parent / "result.json"
    return Run(file, weights, model, loops, found, result if result.is_file() else None)


def config_of(run: Run, loops: int, special: dict[str, int]) -> dict:
    """The content of config.json: what our model file reads ("model", "loops"), what mlx-lm reads, and the names by
    which other tools look for sizes."""
    options = run.model
    ids = {"bos_token_id": special["bos"], "eos_token_id": special["bos"]} if "bos" in special else {}
    return {
        "model_type": "recurrent_gpt",
        "model_file": MODEL_FILE.name,
        "architectures": ["RecurrentGPT"],
        "loops": loops,
        "model": options,
        "exported_from": run.file.name,
        **ids,
        "vocab_size": options["vocab_size"],
        "hidden_size": options["model_dim"],
        "num_attention_heads": options["num_heads"],
        "num_key_value_heads": options["num_kv_heads"],
        "max_position_embeddings": options["train_seq_len"],
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }


def check_args(run: Run, loops: int, model_file) -> None:
    """Raises InputError for options that the model file does not know, and for passes that it cannot run."""
    with in_one_line():
        model_file.ModelArgs.from_dict({"model": run.model, "loops": loops})


def difference(run: Run, loops: int, folder: Path, script) -> float:
    """The largest difference of a logit between the script's model and the exported one, over a few random tokens, all
    at once and one by one from the cache. Raises InputError if it is not small, or if the weights are not finite."""
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_unflatten
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    c = script.model_config(script.Config(), run.model)
    count = min(TRIED_TOKENS, c.train_seq_len)
    ids = mx.array(np.random.default_rng(0).integers(0, c.vocab_size, (1, count)))
    model = script.RecurrentGPT(c)
    model.update(tree_unflatten([(name, mx.array(value)) for name, value in run.weights.items()]))
    expected = np.array(model(ids, loops))
    exported, _ = load_model(folder, trust_remote_code=True)
    cache = make_prompt_cache(exported)
    steps = [exported(ids[:, i : i + 1], cache=cache) for i in range(count)]
    found = max(float(np.abs(np.array(y) - expected).max()) for y in (exported(ids), mx.concatenate(steps, axis=1)))
    if not found <= LARGEST_DIFFERENCE:
        text = f"logits within {LARGEST_DIFFERENCE} of the script's, found a difference of {found:.3g}"
        raise InputError(f"{run.file}: expected {text}; are its weights finite? python train_gpt_mlx.py --mode=eval")
    return found


def write_folder(run: Run, loops: int, folder: Path, script) -> float:
    """Fills an empty folder; returns `difference`."""
    special = tokenizer.convert(run.tokenizer, folder, run.model["train_seq_len"])
    write_json(folder / "config.json", config_of(run, loops, special))
    shutil.copyfile(MODEL_FILE, folder / MODEL_FILE.name)
    tensors = {f"weights.{name}": value for name, value in run.weights.items()}
    script.save_tensors(folder / "model.safetensors", tensors, {"model": run.model, "loops": run.loops})
    if run.result:
        shutil.copyfile(run.result, folder / "result.json")
    return difference(run, loops, folder, script)


def export(run: Run, loops: int, out: Path, script) -> float:
    """Makes the folder `out`, whole or not at all; returns `difference`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.mkdir()
        found = write_folder(run, loops, part, script)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="a run's folder, or its artifact, model or checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="to write; must not be there yet")
    parser.add_argument("--loops", type=int, help="passes to run (default: those at the end of training)")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE.model", help="default: what the run's train.log names")
    args = parser.parse_args(argv)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise InputError(f"--out {args.out}: expected a new folder, found something there; name another or delete it")
    script, model_file = load_libraries()
    run = read_run(args.run, args.tokenizer, script)
    loops = run.loops if args.loops is None else args.loops
    check_args(run, loops, model_file)
    found = export(run, loops, args.out, script)
    print(f"{args.out}: {run.file}, layout {run.model['layout']}, {loops} passes, tokenizer {run.tokenizer}")
    print(f"checked: logits within {found:.1e} of train_gpt_mlx.py's, with and without cache; tokenizer equal on "
          f"{len(tokenizer.TRIALS)} texts")  # fmt: skip
    print(f'mlx_lm.generate --model {args.out} --trust-remote-code --prompt "The function" --max-tokens 100')
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
