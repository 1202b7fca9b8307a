"""Estimates a training step on H100s from what it multiplies and moves; to be checked against the first GPU.

    python tests/time_model.py                                    the `record` preset on eight H100
    python tests/time_model.py --gpus=1 --preset=baseline         more flags are settings of train_gpt.py

Time is products + attention + what the fused kernels move + gaps between launches + the update with the links between
GPUs, one after the other. Rates are guesses for an H100 in bfloat16 at 512 wide. Bytes are fitted to what torch 2.14.1
made of `baseline` and an older `record`: so many a token and visited block, and for the output layer; a block's were 76
times the width before its scales were taken into the projections (see `Linear`). Launches are counted in records/cuda,
where torch 2.11.0 moves more for today's `record` at 1024 pieces, 1024 long: 54.0 and 83.5 GB a microbatch with one and
three passes instead of 42.9 and 65.5, which would be 4 and 7 ms more on eight GPUs. None of it was measured by us on a
GPU; what others measured with other scripts is printed beside the shape.
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
LAUNCH = 1.5e-6  # seconds between two kernels
LAUNCHES = 38, 355  # of a microbatch, a visited block and besides, the update's among them
MICROBATCH = 65536  # tokens
LINKS = 300e9  # bytes/s of a GPU's links to the others
UPDATE_PASSES = 25  # over all float32 weights, with their gradients and averages
MEASURED = {  # milliseconds on 8 x H100 by other scripts of the same model
    "baseline": "43.4 by the log of the challenge's script",
    "record": "102 with one pass and 151 with three by a published record of its shape (2026-04-09, FlashAttention 3)",
}
BACKWARD = 2.5  # attention's backward pass over its forward pass, since it computes the scores again


def step_seconds(c: script.Config, passes: int, gpus: int, kernel: str) -> dict[str, float]:
    """Seconds of a step by part."""
    layout, tokens = script.parse_layout(c.layout), c.train_batch_tokens / gpus
    visits = layout.prelude + layout.core * passes + layout.coda
    attention = 2.0 * c.train_seq_len * c.model_dim * visits  # a token, forward, the causal half
    products = 3 * (script.flops_per_token(c, passes) - attention)
    forward, backward = ATTENTION[kernel]
    moved = visits * c.model_dim * (BLOCK_BYTES + MLP_BYTES * c.mlp_mult) + HEAD_BYTES * c.vocab_size
    of_visit, other = LAUNCHES
    return {
        "products": tokens * products / PRODUCTS,
        "attention": tokens * attention * (1 / forward + BACKWARD / backward),
        "fused kernels": tokens * moved / MEMORY,
        "launches": -(-tokens // MICROBATCH) * (of_visit * visits + other) * LAUNCH,
        "update": update_seconds(c, gpus),
    }


def update_seconds(c: script.Config, gpus: int) -> float:
    """Seconds of Muon and Adam: an all-reduce of the gradients, passes over the weights, Newton-Schulz shared out."""
    weights, blocks = script.count_params(c), script.parse_layout(c.layout).blocks
    flops = matrices = 0.0
    for shape in script.linear_shapes(c).values():
        less, more = sorted(shape)
        flops += -(-blocks // gpus) * script.NEWTON_SCHULZ_STEPS * (4.0 * less**2 * more + 2.0 * less**3)
        matrices += blocks * less * more
    exchanged = (gpus - 1) / gpus * (2 * 4 * weights + 2 * matrices)  # float32 gradients, bfloat16 directions
    return exchanged / LINKS + 4 * UPDATE_PASSES * weights / MEMORY + flops / PRODUCTS


def main(argv: list[str]) -> None:
    gpus = next((int(flag.split("=")[1]) for flag in argv if flag.startswith("--gpus=")), 8)
    settings = [flag for flag in argv if not flag.startswith("--gpus=")]
    c = script.load_config(settings, {}, script.DEFAULT_PRESET)[0]
    print(f"{c.preset}: LAYOUT={c.layout}, {c.train_batch_tokens} tokens a step, {gpus} x H100 (estimate)")
    if gpus == 8 and settings in ([], [f"--preset={c.preset}"]) and c.preset in MEASURED:
        print(f"  measured: {MEASURED[c.preset]}")
    for kernel in ATTENTION:
        for passes in script.loop_counts(c):
            parts = step_seconds(c, passes, gpus, kernel)
            total, flops = sum(parts.values()), 3 * script.flops_per_token(c, passes) * c.train_batch_tokens
            shown = ", ".join(f"{name} {1000 * part:.1f}" for name, part in parts.items())
            share, word = flops / (total * gpus * PEAK), "passes" if passes > 1 else "pass"
            print(f"  {kernel:8} {passes} {word:6} {1000 * total:6.1f} ms ({shown}), {share:.1%} of the peak")


if __name__ == "__main__":
    main(sys.argv[1:])
