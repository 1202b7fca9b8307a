"""When could each token leave a looped model? The loss of every pass, and who leaves where by three rules.

    python retrofit/exits.py logs/RUN/model.int6.rgpt --data_path=FOLDER --tokenizer_path=FILE --val_max_tokens=65536

It takes an artifact, a checkpoint or a model.safetensors of either script; other settings are those of train_gpt.py
(`--preset=demo` names the demo's data). A token leaves after the first pass
    oracle          whose likeliest next token is the last pass's (no rule that can be followed: a bound),
    confidence T    whose likeliest next token has a probability of T or more,
    change T        whose distribution is within T nats of the pass before (Kullback-Leibler divergence),
and after the last pass otherwise (arXiv 2410.20672, section 3.5; arXiv 2511.07384). The shares of the last column are
what depth_batching.py --exits takes. Left out, as there: a token that left has no keys and values for those that stay;
here every token is seen as if all had stayed.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "records"))

from ablate import SCRIPTS, load_script  # noqa: E402
from common import InputError, Parser, markdown_table, need, run_tool  # noqa: E402

CONFIDENCES, CHANGES = (0.5, 0.7, 0.9), (0.1, 0.03, 0.01)


class Seen(NamedTuple):
    """What the passes say of some tokens; every array is [passes, tokens]."""

    losses: np.ndarray  # nats
    likeliest: np.ndarray  # token ids
    confidence: np.ndarray  # probability of the likeliest
    change: np.ndarray  # nats from the pass before; infinite for the first


def look(logits: np.ndarray, targets: np.ndarray) -> Seen:
    """Logits [passes, tokens, vocab] and the tokens that came [tokens]."""
    logs = logits.astype(np.float64)
    logs -= logs.max(axis=-1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(axis=-1, keepdims=True))
    losses = -np.take_along_axis(logs, targets[None, :, None], axis=-1)[..., 0]
    change = np.full(losses.shape, np.inf)
    change[1:] = (np.exp(logs[1:]) * (logs[1:] - logs[:-1])).sum(axis=-1)
    return Seen(losses, logs.argmax(axis=-1), np.exp(logs.max(axis=-1)), change)


def first_pass(leaves: np.ndarray) -> np.ndarray:
    """leaves [passes, tokens]: whether a rule lets a token go -> the pass after which it does, from 0 [tokens]."""
    leaves = leaves.copy()
    leaves[-1] = True
    return leaves.argmax(axis=0)


def rules(seen: Seen) -> list[tuple[str, np.ndarray]]:
    """(what it is called, the pass after which each token leaves) of every rule."""
    passes, tokens = seen.losses.shape
    found = [(f"all after pass {n + 1}", np.full(tokens, n)) for n in range(passes)]
    found.append(("oracle", first_pass(seen.likeliest == seen.likeliest[-1])))
    found += [(f"confidence {t:g}", first_pass(seen.confidence >= t)) for t in CONFIDENCES]
    found += [(f"change {t:g}", first_pass(seen.change <= t)) for t in CHANGES]
    return found


def table(seen: Seen, bpb: Callable[[float], float]) -> list[list[str]]:
    """A row for every rule; `bpb` turns nats a token into bits per byte."""
    rows, passes = [], len(seen.losses)
    for name, left in rules(seen):
        loss = float(np.take_along_axis(seen.losses, left[None], axis=0).mean())
        shares = np.bincount(left, minlength=passes) / left.size
        cells = [f"{1 + left.mean():.3f}", f"{loss:.4f}", f"{bpb(loss):.4f}"]
        rows.append([name, *cells, ",".join(f"{share:.4f}" for share in shares)])
    return rows


def watch(script, config, weights: dict[str, np.ndarray], tokens: np.ndarray, passes: int) -> Seen:
    """What a model says after 1 to `passes` passes of tokens[1:], window by window."""
    engine = script.Engine(config)
    engine.build(weights, training=False)
    windows = tokens[:-1].reshape(-1, config.train_seq_len).astype(np.int64)
    targets = tokens[1:].reshape(windows.shape).astype(np.int64)
    some, found = max(1, 4096 // config.train_seq_len), []
    for start in range(0, len(windows), some):
        ids = engine.tensor(windows[start : start + some])
        logits = np.stack([engine.model(ids, n).detach().cpu().numpy() for n in range(1, passes + 1)])
        found.append(look(logits.reshape(passes, -1, logits.shape[-1]), targets[start : start + some].ravel()))
    return Seen(*(np.concatenate(parts, axis=1) for parts in zip(*found)))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, help="artifact, checkpoint or model.safetensors")
    parser.add_argument(
        "--passes", type=int, default=0, help="at most so many; default: those in use at the end of training"
    )
    args, settings = parser.parse_known_args(argv)
    script = load_script(SCRIPTS[0])
    try:
        weights, model, loops = script.load_model_file(str(args.file))
        flags = ["--mode=eval", "--compile=0", f"--checkpoint={args.file}", *settings]
        config = script.model_config(script.load_config(flags, {}, "")[0], model)
        passes = args.passes or loops
        need(passes > 1, args.file, "a model of more than one pass", passes, "only a looped one has early exits")
        most = script.parse_layout(config.layout).loops
        alike = passes <= most or config.skips != "official"
        need(alike, "--passes", f"at most {most} with skips=official", passes)
        score = script.Score(config)
        rows = table(watch(script, config, weights, score.tokens, passes), score.bpb)
    except ValueError as error:  # the script's InputError is one
        raise InputError(str(error)) from None
    head = ["who leaves", "mean passes", "nats a token", "bits per byte", "shares that leave after pass 1, 2, ..."]
    print(f"{args.file}: {len(score.tokens) - 1} tokens{score.label}\n")
    print(markdown_table(head, rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
