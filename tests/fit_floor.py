"""Finds ROW_FLOOR of train_gpt.py, the least curvature of a row: how much rounding costs, by floor and bytes.

    python tests/fit_floor.py logs/RUN/model.safetensors --preset=mini --target_bytes=40000 ...

What follows the file are settings of train_gpt.py: those of the run, its data, the largest TARGET_BYTES. For every
floor and four targets the model is exported, and the loss that rounding adds is measured, in nats a token; the numbers
scatter by a tenth, so the mean is what counts. `embedding`: what its rounding alone adds at the largest target. `rare`:
how much of that comes with tokens of the rarest kinds, a hundredth of the text.
"""

import dataclasses
import math
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as script

FLOORS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.1)
PARTS = (1.0, 0.96, 0.92, 0.88)


def token_losses(engine: script.Engine, weights: dict[str, np.ndarray], tokens: np.ndarray, loops: int) -> np.ndarray:
    """Nats of every token but the first [n]."""
    engine.set_weights(weights)
    length = engine.config.train_seq_len
    inputs, targets = (part.reshape(-1, length).astype(np.int64) for part in (tokens[:-1], tokens[1:]))
    rows = max(engine.largest // length, 1)
    starts = range(0, len(inputs) - rows + 1, rows)
    return np.concatenate([engine.token_losses(inputs[i : i + rows], targets[i : i + rows], loops) for i in starts])


def rounded(c: script.Config, weights: dict, loops: int, curvature: script.Curvature) -> tuple[dict, float]:
    """(weights as read back, bits a weight) of the artifact, whose code is not counted."""
    made = script.export_model(c, weights, loops, curvature)
    with tempfile.NamedTemporaryFile(suffix=".rgpt") as file:
        Path(file.name).write_bytes(made.data)
        return script.read_artifact(Path(file.name)).weights, made.bits_per_weight


def rare_tokens(tokens: np.ndarray) -> np.ndarray:
    """Whether each token is of the rarest kinds, a hundredth of all together."""
    counts = np.bincount(tokens)
    order = np.argsort(counts, kind="stable")
    kinds = order[np.cumsum(counts[order]) <= 0.01 * len(tokens)]
    return np.isin(tokens, kinds)


def main(argv: list[str]) -> None:
    if not argv:
        sys.exit(__doc__)
    weights, model, loops = script.load_model_file(argv[0])
    flags = ["--mode=export", f"--checkpoint={argv[0]}", "--quantizer=trellis", *argv[1:]]
    c = script.model_config(script.load_config(flags, {}, "")[0], model)
    engine, tokens = script.Engine(c), script.load_validation(c)[0]
    engine.build(weights, training=False)
    stream = script.TokenStream(script.find_shards(c.data_path, "train", c.vocab_size), c)
    curvature = engine.curvature(stream, stream.total // 2, loops)
    before = token_losses(engine, weights, tokens, loops)
    rare = rare_tokens(tokens)[1:].reshape(-1, c.train_seq_len)[: len(before)]
    about = f"LAYOUT={c.layout} MODEL_DIM={c.model_dim}, {script.count_params(c)} weights"
    print(f"{about}: loss {before.mean():.4f} on {before.size} tokens, {curvature.tokens} calibrated on")
    targets = [int(part * c.target_bytes) for part in PARTS]
    print("floor", *(f"{target:>8}" for target in targets), "    mean  embedding  rare  bits a weight")
    for floor in FLOORS:
        script.ROW_FLOOR, costs = floor, []
        for target in targets:
            found, bits = rounded(dataclasses.replace(c, target_bytes=target), weights, loops, curvature)
            costs.append(token_losses(engine, found, tokens, loops).mean() - before.mean())
            if target == targets[0]:
                alone = weights | {"tok_emb.weight": found["tok_emb.weight"]}
                added, most = token_losses(engine, alone, tokens, loops) - before, bits
        numbers = " ".join(f"{cost:8.4f}" for cost in [*costs, math.fsum(costs) / len(costs), added.mean()])
        print(f"{floor:5g} {numbers} {added[rare].sum() / added.size:8.4f} {most:6.2f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
