"""Estimates a training step on H100s from what it multiplies and moves; to be checked against the first GPU.

    python tests/time_model.py                                    the `record` preset on eight H100
    python tests/time_model.py --gpus=1 --preset=baseline         more flags are settings of train_gpt.py

Time is products + attention + what the fused kernels move, one after the other; the optimizer, launches and the links
between GPUs are left out. Rates are guesses for an H100 in bfloat16 at 512 wide. Bytes are fitted to what torch
2.14.1 made of `baseline` and an older `record`: so many a token and visited block, and for the output layer. A block's
were 76 times the width before its scales were taken into the projections (see `Linear`). With those the challenge's
baseline, which does not do so, comes to 37 ms, where its own log has 43. `record` with cuDNN is now 103 and 153 ms;
the published record of its shape has 102 and 151 (2026-04-09, FlashAttention 3).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as script

PRODUCTS = 550e12  # FLOP/s of matrix products
ATTENTION = {"flash 2": (200e12, 150e12), "cuDNN": (270e12, 220e12)}  # FLOP/s forward and backward
MEMORY = 2.7e12  # bytes/s
PEAK = 989e12  # FLOP/s on paper, for the share of it
BLOCK_BYTES, MLP_BYTES, HEAD_BYTES = 69.0, 10.7, 25.0  # a token: times width; times width and MLP_MULT; times pieces
BACKWARD = 2.5  # attention's backward pass over its forward pass, since it computes the scores again


def step_seconds(c: script.Config, passes: int, gpus: int, kernel: str) -> dict[str, float]:
    """Seconds of a step by part."""
    layout, tokens = script.parse_layout(c.layout), c.train_batch_tokens / gpus
    visits = layout.prelude + layout.core * passes + layout.coda
    attention = 2.0 * c.train_seq_len * c.model_dim * visits  # a token, forward, the causal half
    products = 3 * (script.flops_per_token(c, passes) - attention)
    forward, backward = ATTENTION[kernel]
    moved = visits * c.model_dim * (BLOCK_BYTES + MLP_BYTES * c.mlp_mult) + HEAD_BYTES * c.vocab_size
    return {
        "products": tokens * products / PRODUCTS,
        "attention": tokens * attention * (1 / forward + BACKWARD / backward),
        "fused kernels": tokens * moved / MEMORY,
    }


def main(argv: list[str]) -> None:
    gpus = next((int(flag.split("=")[1]) for flag in argv if flag.startswith("--gpus=")), 8)
    settings = [flag for flag in argv if not flag.startswith("--gpus=")]
    c = script.load_config(settings, {}, script.DEFAULT_PRESET)[0]
    print(f"{c.preset}: LAYOUT={c.layout}, {c.train_batch_tokens} tokens a step, {gpus} x H100 (estimate)")
    for kernel in ATTENTION:
        for passes in script.loop_counts(c):
            parts = step_seconds(c, passes, gpus, kernel)
            total, flops = sum(parts.values()), 3 * script.flops_per_token(c, passes) * c.train_batch_tokens
            shown = ", ".join(f"{name} {1000 * part:.1f}" for name, part in parts.items())
            share, word = flops / (total * gpus * PEAK), "passes" if passes > 1 else "pass"
            print(f"  {kernel:8} {passes} {word:6} {1000 * total:6.1f} ms ({shown}), {share:.1%} of the peak")


if __name__ == "__main__":
    main(sys.argv[1:])
