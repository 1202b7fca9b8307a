"""What is worth running on one CUDA GPU, in under ten minutes: `make gpu`.

1. Correctness: both controls against the golden numbers of the published code (float32), and the GPU's bfloat16 logits
   against the CPU's float32 ones.
2. `baseline`, `pr319` and `record` at full size and equal training FLOPs, compiled: speed, memory, score from disk.

A second call goes on where the first one stopped: finished runs are kept, others resume from their checkpoint. Data is
DATA_PATH with TOKENIZER_PATH, else published FineWeb shards, else the corpus of data/offline.py; the table names it.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "golden")]
ARMS = ("baseline", "pr319", "record")


def check_goldens(device: str) -> None:
    """Raises AssertionError where a control on this device is not the published model."""
    import rebuild
    import torch

    import train_gpt as t

    sizes = "--vocab_size=64 --model_dim=64 --num_heads=4 --num_kv_heads=2 --train_seq_len=32 --train_batch_tokens=64"
    for case in ("baseline", "pr319"):
        flags = [f"--preset={case}", *sizes.split(), "--compile=0", f"--device={device}"]
        golden = rebuild.golden_numbers(str(ROOT / "tests" / "golden" / "controls.npz"), case)
        logits = {}
        for dtype in ("float32", "bfloat16"):
            c, _ = t.load_config([*flags, f"--dtype={dtype}"], {}, "record")
            engine = t.Engine(c)
            torch.set_float32_matmul_precision("highest")
            engine.build(rebuild.golden_weights(t.param_shapes(c)), training=False)
            ids = rebuild.golden_ids()[0, :, :-1].astype(np.int64)
            with torch.no_grad():
                logits[dtype] = engine.model(engine.tensor(ids), t.parse_layout(c.layout).loops).cpu().numpy()
        exact, loose = (float(np.abs(logits[d] - golden["logits"]).max()) for d in ("float32", "bfloat16"))
        print(f"golden {case} on {engine.device_name}: largest error {exact:.1e} in float32, {loose:.1e} in bfloat16")
        assert exact < 1e-3 and loose < 1.0, "this device does not compute the published model"


def data_flags() -> list[str]:
    """The dataset to train on, as flags."""
    import train_gpt as t

    data = os.environ.get("DATA_PATH", t.Config.data_path)
    tokenizer = os.environ.get("TOKENIZER_PATH", t.Config.tokenizer_path)
    if not list((ROOT / data).glob("fineweb_train_*.bin")):
        demo, _ = t.load_config(["--preset=demo"], {}, "demo")
        data, tokenizer = demo.data_path, demo.tokenizer_path
        subprocess.run([sys.executable, "data/offline.py"], cwd=ROOT, check=True)
    return [f"--data_path={data}", f"--tokenizer_path={tokenizer}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--flops", type=float, default=3e16, help="training FLOPs of an arm")
    parser.add_argument("--log-dir", default="logs")
    parser.add_argument("flags", nargs="*", help="more settings for every arm, such as -- --model_dim=256")
    args = parser.parse_args()
    check_goldens(args.device)
    common = [*data_flags(), f"--device={args.device}", f"--log_dir={args.log_dir}", "--iterations=0",
              "--warmdown_frac=0.4", "--max_wallclock_seconds=0", f"--max_train_flops={args.flops}",
              "--train_batch_tokens=524288", "--target_bytes=0", "--val_max_tokens=1048576",
              "--val_loss_every=0", "--train_log_every=20",
              "--checkpoint_every=100", "--muon_momentum_warmup_steps=100", *args.flags]  # fmt: skip
    rows = []
    for arm in ARMS:
        name = f"gpu_{arm}_{args.flops:.0e}".replace("+", "")
        folder = ROOT / args.log_dir / name
        command = [sys.executable, "train_gpt.py", f"--preset={arm}", f"--run_id={name}", *common]
        if not (folder / "model.int6.rgpt").exists():
            resume = ["--resume"] * (folder / "checkpoint.safetensors").exists()
            if subprocess.run(command + resume, cwd=ROOT).returncode:
                return 1
        rows.append((arm, json.loads((folder / "result.json").read_text())))
    print(f"\n{rows[0][1]['device']}, {rows[0][1]['dataset']}, {args.flops:.3g} training FLOPs an arm, one seed")
    print(
        f"{'arm':10}{'val_bpb':>9}{'raw':>9}{'steps':>7}{'ms/step':>9}{'tok/s':>12}{'TFLOP/s':>9}{'GiB':>7}{'bytes':>12}"
    )
    for arm, r in rows:
        ms, peak = r["train_time_ms"] / r["steps"], r["peak_mem_bytes"] / 2**30
        print(f"{arm:10}{r['val_bpb']:9.4f}{r['val_bpb_raw']:9.4f}{r['steps']:7}{ms:9.1f}{r['tok_s']:12,}"
              f"{r['train_flops'] / r['train_time_ms'] / 1e9:9.1f}{peak:7.1f}{r['bytes_total']:12,}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
