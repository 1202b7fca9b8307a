"""Makes what own.toml and truncation.toml start from: a flat parent, trained, and its conversions.

    python records/retrofit/parent.py                        about six minutes of one core
    python records/ablate.py records/retrofit/own.toml       then this
    python records/ablate.py records/retrofit/truncation.toml

The parent is the scale model with four layers and no shortcuts (which a tied child could not keep), 100 tokens a
parameter. Everything lies in logs/retrofit/; what is there already is not made again.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
HOME = ROOT / "logs" / "retrofit"
PARENT = HOME / "parent" / "model.safetensors"
TRAIN = """--preset=mini --layout=4 --skips=none --model_dim=32 --vocab_size=512 --max_train_flops=3.5e12 --seed=1
    --data_path=data/datasets/wiki_books_mini_sp512 --tokenizer_path=data/tokenizers/wiki_books_mini_sp512_bpe.model
    --log_dir=logs/retrofit --run_id=parent""".split()
TIED = "--layout 2x2 --loop-gate none --init"
CHILDREN = {
    "step": f"{TIED} step",
    "average": f"{TIED} average",
    "lower": f"{TIED} lower",
    "random": f"{TIED} random",
    "average_svd4": f"{TIED} average --lora-rank 4",
    "average_svd16": f"{TIED} average --lora-rank 16",
    "average_zero4": f"{TIED} average --lora-rank 4 --lora zero --pass-vectors 1",
    "average_zero16": f"{TIED} average --lora-rank 16 --lora zero --pass-vectors 1",
    "first_and_last": "--layout 1+1x1 --init drop --layers 0,3,",
    "band": "--layout 1+2x3+1 --init keep --loop-gate gain --gate-init 0.5",
    "band_ungated": "--layout 1+2x3+1 --init keep --loop-gate none",
    "core": "--layout 3x3+1 --init keep --loop-gate gain --gate-init 0.5",
    "core_six": "--layout 3x6+1 --init keep --loop-gate gain --gate-init 0.5",
}


def run(*command: object) -> None:
    print("$", *command, flush=True)
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def main() -> None:
    if not PARENT.is_file():
        run("train_gpt.py", *TRAIN)
    for name, flags in CHILDREN.items():
        if not (HOME / f"{name}.safetensors").is_file():
            run("retrofit/convert.py", PARENT, HOME / f"{name}.safetensors", *flags.split())


if __name__ == "__main__":
    main()
