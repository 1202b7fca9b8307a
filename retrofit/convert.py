"""Turn one of our models into the start of a looped one: a file that INIT_FROM of either script takes.

    python retrofit/convert.py logs/RUN/model.safetensors --tokens data/datasets/fineweb10B_sp1024
                                    angular distance of every layer, and the band that they propose to loop
    python retrofit/convert.py PARENT OUT.safetensors --layout 3+3x3+3 --init keep
                                    all layers stay, the middle ones are looped: at one pass the parent, bit for bit (to
                                    rounding where NORM_SCALE is taken into the weights)
    python retrofit/convert.py PARENT OUT.safetensors --layout 4+8x4+4 --init drop --layers 0-3,10-17,18-21
                                    late layers become core and coda, the middle is left out (arXiv 2511.07384)
    python retrofit/convert.py PARENT OUT.safetensors --layout 3x3 --init average --lora-rank 16
                                    nine layers tied into three, the rest as LoRA (arXiv 2410.20672)

PARENT is an artifact, a checkpoint or a model.safetensors. A parent that is looped itself counts as the list of all its
blocks as they are applied (--passes of them), with its LoRA added to the matrices.

--init    target P+CxR+D of L parent layers        block of the core
keep      P + C + D = L                            the layer of its number
drop      P + C + D <= L                           --layers; else the first P, and the last C + D
step      P + C*R + D = L, as all below            C of the C*R layers, evenly, first and last among them
average                                            mean of the R layers that it stands for
lower                                              the first C of them
random                                             new weights
"""

import contextlib
import dataclasses
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "records"))

from ablate import SCRIPTS, load_script  # noqa: E402
from common import InputError, Parser, need, run_tool, short  # noqa: E402

# What this tool understands of a parent. A newer setting must be off in it, or be added here.
KNOWN = """layout vocab_size model_dim num_heads num_kv_heads mlp_mult skips loop_gate lora_rank pass_vectors
    train_seq_len xsa rotary_dims norm_scale mlp_slope""".split()
KNOWN_VALUES = {"skips": ("per_loop", "official", "none"), "loop_gate": ("x0", "gain", "none")}
TYING = ("step", "average", "lower", "random")  # of which every pass stands for layers of its own
INITS = ("keep", "drop", *TYING)


# The parent ----------------------------------------------------------------------------------------------------------


class Parent(NamedTuple):
    """A model as the list of its layers in the order in which they are applied."""

    config: object  # Config of its file
    weights: dict[str, np.ndarray]
    passes: int  # that are counted
    layers: list[dict[str, np.ndarray]]  # matrices [out, in] and vectors by name within a block
    shortcuts: dict[tuple[int, int], np.ndarray]  # (from layer, to layer): weights [dim]
    embeds: dict[int, np.ndarray]  # before layer: loop embedding [dim] that is not 0
    gates: dict[tuple[int, int], float]  # (first, last layer of a pass): loop gate that is not 1


def check_known(script, model: dict) -> None:
    """Refuses, by name, a model setting that this tool does not know and that is not off."""
    fields = {field.name: field.default for field in dataclasses.fields(script.Config)}
    for name, value in model.items():
        mend = "convert it with the tool of its own commit, or train a parent without it"
        if name not in KNOWN:
            off = name in fields and value == fields[name]
            need(off, name, "an option of the parent that this tool knows", repr(value), mend)
        allowed = KNOWN_VALUES.get(name, (value,))
        need(value in allowed, name, f"one of {', '.join(map(str, allowed))}", repr(value), mend)


def layer_of(script, c, weights: dict[str, np.ndarray], visit) -> dict[str, np.ndarray]:
    """Matrices and vectors of one application of a block; its LoRA is added to the matrices. The scale of NORM_SCALE,
    which goes by the block's number, is taken into v and fc: q and k are normed."""
    layout, block = script.parse_layout(c.layout), f"blocks.{visit.block}"
    row, found = min(visit.loop, layout.loops - 1), {}
    for name in script.linear_shapes(c):
        matrix = weights[f"{block}.{name}.weight"]
        if f"{block}.{name}.lora_a" in weights:
            matrix = matrix + weights[f"{block}.{name}.lora_b"][row] @ weights[f"{block}.{name}.lora_a"][row]
        if c.norm_scale and name in ("attn.v", "mlp.fc"):
            matrix = matrix * np.float32((visit.block + 1) ** -0.5)
        found[f"{name}.weight"] = matrix
    for name, shape in script.vector_shapes(c, 1).items():
        vector = weights[f"{block}.{name}"]
        found[name] = vector if vector.ndim == len(shape) else vector[row]
    return found


def read_parent(script, path: Path, passes: int) -> Parent:
    """Reads PARENT with the trainer's reader. Raises InputError."""
    weights, model, loops = script.load_model_file(str(path))
    check_known(script, model)
    bad = [name for name, value in weights.items() if not np.isfinite(value).all()]
    need(not bad, path, "finite weights", f"others in {', '.join(bad[:3])}", "its training diverged")
    c = script.model_config(script.Config(), model)
    layout = script.parse_layout(c.layout)
    need(0 <= passes <= layout.loops, "--passes", f"1 to {layout.loops}, those of the parent", passes)
    passes = passes or loops
    plan = script.visits(layout, c.skips, passes)
    rows = script.skip_rows(layout, c.skips)
    shortcuts = {
        (source, target): weights["skip_weights"][rows[key]]
        for source, target, key in script.skip_pairs(layout, c.skips, passes)
    }
    embeds, gates, first = {}, {}, 0
    for number, visit in enumerate(plan):
        if visit.opens:
            first = number
        if visit.opens and "loop_embed" in weights and weights["loop_embed"][visit.loop].any():
            embeds[number] = weights["loop_embed"][visit.loop]
        gated = visit.closes and visit.loop > 0 and "loop_gate" in weights
        if gated and weights["loop_gate"][visit.loop] != 1:
            gates[first, number] = float(weights["loop_gate"][visit.loop])
    layers = [layer_of(script, c, weights, visit) for visit in plan]
    return Parent(c, weights, passes, layers, shortcuts, embeds, gates)


# Which layer becomes what --------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What the child's blocks are made of."""

    sources: list[list[int]]  # of every stored block: the parent's layers whose mean it is; none = new weights
    stands_for: list[int]  # of every application of a block: the parent's layer whose place it takes
    passes: int  # with which that is so


def parse_layers(text: str) -> list[list[int]]:
    """Reads "0-3,10-17,18-21", the layers of prelude, core and coda; ",0-5," has neither prelude nor coda."""
    parts = text.split(",")
    good = len(parts) == 3 and all(re.fullmatch(r"(\d{1,4}(-\d{1,4})?)?", part) for part in parts)
    need(good, "--layers", 'prelude,core,coda such as "0-3,10-17,18-21"', f'"{text}"')
    found = []
    for part in parts:
        low, _, high = part.partition("-")
        need(not high or int(low) <= int(high), "--layers", "ranges that rise", part)
        found.append(list(range(int(low), int(high or low) + 1)) if part else [])
    return found


def dropping(layout, count: int, text: str) -> list[int]:
    """The parent's layer of every block: those of `text`, else the first P and the last C + D of `count`."""
    p, c, _, d = layout
    if not text:
        return [*range(p), *range(count - c - d, count)]
    parts = parse_layers(text)
    sizes, wanted = tuple(map(len, parts)), (p, c, d)
    need(sizes == wanted, "--layers", f"{p}, {c} and {d} layers, those of the target", ", ".join(map(str, sizes)))
    layers = [layer for part in parts for layer in part]
    need(max(layers) < count, "--layers", f"layers 0 to {count - 1} of the parent", max(layers))
    rising = all(a < b for a, b in zip(layers, layers[1:]))
    need(rising, "--layers", "layers in the parent's order, each once", f'"{text}"')
    return layers


def stepwise(count: int, kept: int) -> list[int]:
    """`kept` of `count` layers at even steps, the first and the last among them (one: the first)."""
    return [int(layer) for layer in np.rint(np.linspace(0, count - 1, kept))]


def plan_of(init: str, layout, count: int, layers: str = "") -> Plan:
    """Which of `count` parent layers become which block of `layout`. Raises InputError for a target that does not
    fit."""
    p, c, r, d = layout
    need(not layers or init == "drop", "--layers", "--init drop", f"--init {init}")
    if init in ("keep", "drop"):
        fits = p + c + d == count if init == "keep" else p + c + d <= count
        expected = f"a target with {'' if init == 'keep' else 'at most '}{count} blocks, the parent's layers"
        mend = "with --init keep all layers stay" if init == "keep" else ""
        need(fits, f"--init {init}", expected, f"{p} + {c} + {d}", mend)
        kept = list(range(count)) if init == "keep" else dropping(layout, count, layers)
        return Plan([[layer] for layer in kept], kept, 1)
    expected = f"a target that applies {count} blocks, one for each layer of the parent"
    need(layout.depth == count, f"--init {init}", expected, f"{p} + {c}*{r} + {d} = {layout.depth}")
    tied = [[p + block + loop * c for loop in range(r)] for block in range(c)]
    core = {
        "step": [[p + layer] for layer in stepwise(c * r, c)],
        "average": tied,
        "lower": [[p + block] for block in range(c)],
        "random": [[] for _ in range(c)],
    }[init]
    ends = [[[layer] for layer in part] for part in (range(p), range(count - d, count))]
    return Plan(ends[0] + core + ends[1], list(range(count)), r)


# The child -----------------------------------------------------------------------------------------------------------


class Child(NamedTuple):
    """The converted model."""

    config: object
    weights: dict[str, np.ndarray]
    passes: int  # at which it stands for the parent
    left: float  # what its matrices and LoRA miss of the parent's, in parts of their norm
    notices: list[str]


def child_config(script, parent: Parent, args):
    """The child's settings: the parent's, but for what was asked for. Raises InputError."""
    full = args.lora_rank == "full"
    rank = parent.config.model_dim if full else int(args.lora_rank)
    most = f"0 to MODEL_DIM={parent.config.model_dim}, which is full rank"
    need(rank <= parent.config.model_dim, "--lora-rank", most, args.lora_rank)
    changes = {"layout": args.layout, "lora_rank": rank, "pass_vectors": args.pass_vectors, "norm_scale": False}
    changes |= {"skips": args.skips or parent.config.skips, "loop_gate": args.loop_gate or parent.config.loop_gate}
    model = {name: getattr(parent.config, name) for name in script.MODEL_FIELDS} | changes
    c = script.model_config(script.Config(), model)
    gated = "loop_gate" in script.param_shapes(c)
    need(gated or args.gate_init == 1, "--gate-init", "1 where the child has no loop gate", args.gate_init)
    return dataclasses.replace(c, loop_gate_init=args.gate_init, seed=args.seed)


def mean_of(layers: list[dict[str, np.ndarray]], name: str) -> np.ndarray:
    """The mean over layers of a matrix or vector; of one layer itself, to the last bit."""
    parts = [layer[name] for layer in layers]
    return parts[0] if len(parts) == 1 else np.mean(parts, axis=0, dtype=np.float64).astype(np.float32)


def truncated_svd(residual: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(a [k, in], b [out, k]) with b @ a the nearest matrix of rank k to `residual` [out, in]; k is at most `rank`."""
    u, s, v = np.linalg.svd(residual.astype(np.float64), full_matrices=False)
    return v[:rank].astype(np.float32), (u * s)[:, :rank].astype(np.float32)


def fill_blocks(script, c, parent: Parent, plan: Plan, weights: dict[str, np.ndarray]) -> None:
    """Matrices and vectors of every block. Vectors with a row a pass are those of the layer whose place the pass takes,
    so that tying loses nothing of them."""
    order = script.block_order(script.parse_layout(c.layout), plan.passes)
    places = {block: [layer for (b, _), layer in zip(order, plan.stands_for) if b == block] for block, _ in order}
    for block, sources in enumerate(plan.sources):
        layers = [parent.layers[layer] for layer in sources]
        for name in script.linear_shapes(c):
            if layers:
                weights[f"blocks.{block}.{name}.weight"][:] = mean_of(layers, f"{name}.weight")
        for name, shape in script.vector_shapes(c, 1).items():
            mine = weights[f"blocks.{block}.{name}"]
            if mine.ndim > len(shape):
                rows = places[block] + places[block][-1:] * (len(mine) - plan.passes)
                mine[:] = [parent.layers[layer][name] for layer in rows]
            elif layers:
                mine[:] = mean_of(layers, name)


def fill_lora(script, c, parent: Parent, plan: Plan, weights: dict[str, np.ndarray], svd: bool) -> float:
    """LoRA from what every pass's layer differs from the shared block; returns what is left of that, in parts of the
    norm of the layers' matrices. Ranks that a matrix does not have start as in a new model, with b = 0."""
    left = total = 0.0
    for (block, loop), layer in zip(script.block_order(script.parse_layout(c.layout), plan.passes), plan.stands_for):
        for name in script.linear_shapes(c):
            matrix, place = parent.layers[layer][f"{name}.weight"], f"blocks.{block}.{name}"
            residual = matrix - weights[f"{place}.weight"]
            if svd and loop >= 0 and residual.any():
                a, b = truncated_svd(residual, c.lora_rank)
                weights[f"{place}.lora_a"][loop, : len(a)] = a
                weights[f"{place}.lora_b"][loop, :, : len(a)] = b
                residual = residual - b @ a
            left += float(np.square(residual, dtype=np.float64).sum())
            total += float(np.square(matrix, dtype=np.float64).sum())
    return (left / max(total, 1e-30)) ** 0.5


def fill_shortcuts(script, c, parent: Parent, plan: Plan, weights: dict[str, np.ndarray]) -> list[str]:
    """Shortcuts between the same layers take the parent's weights, others begin at 0; a row that several passes share
    is their mean. Returns a notice of shortcuts that have no place."""
    layout = script.parse_layout(c.layout)
    rows, found, placed = script.skip_rows(layout, c.skips), {}, set()
    for source, target, key in script.skip_pairs(layout, c.skips, plan.passes):
        pair = plan.stands_for[source], plan.stands_for[target]
        found.setdefault(key, []).append(parent.shortcuts.get(pair, np.zeros(c.model_dim, np.float32)))
        placed.add(pair)
    for key, parts in found.items():
        same = all(np.array_equal(part, parts[0]) for part in parts)
        weights["skip_weights"][rows[key]] = parts[0] if same else np.mean(parts, axis=0)
    lost = [f"{a} to {b}" for a, b in sorted(parent.shortcuts.keys() - placed)]
    return [f"notice: shortcuts of the parent without a place in the child: {', '.join(lost)}"] * bool(lost)


def fill_loop_vectors(script, c, parent: Parent, plan: Plan, weights: dict[str, np.ndarray]) -> None:
    """Loop embeddings and gates of a parent that is looped itself. Raises InputError where the child has none at that
    place."""
    opens, spans, first = {}, {}, 0
    for layer, visit in zip(plan.stands_for, script.visits(script.parse_layout(c.layout), c.skips, plan.passes)):
        if visit.opens:
            opens[layer], first = visit.loop, layer
        if visit.closes:
            spans[first, layer] = visit.loop
    mend = "choose --layout so that passes begin and end where the parent's do"
    for layer, embed in parent.embeds.items():
        if layer in plan.stands_for:
            there = layer in opens and "loop_embed" in weights
            need(there, "loop_embed", f"a pass that begins at layer {layer}, where the parent adds one", "none", mend)
            weights["loop_embed"][opens[layer]] = embed
    for (first, last), gate in parent.gates.items():
        if last in plan.stands_for:
            row = spans.get((first, last), 0)
            expected = f"a gate of the kind {parent.config.loop_gate} after layers {first} to {last}, as in the parent"
            need(row and c.loop_gate == parent.config.loop_gate, "loop_gate", expected, "none", mend)
            weights["loop_gate"][row] = gate


def make_child(script, parent: Parent, plan: Plan, c, svd: bool) -> Child:
    """Fills the child's weights. Raises InputError for what it has no place for."""
    weights = script.initial_weights(c)
    weights["tok_emb.weight"][:] = parent.weights["tok_emb.weight"]
    fill_loop_vectors(script, c, parent, plan, weights)
    fill_blocks(script, c, parent, plan, weights)
    notices = fill_shortcuts(script, c, parent, plan, weights)
    left = fill_lora(script, c, parent, plan, weights, svd)
    return Child(c, weights, plan.passes, left, notices)


# Looking at activations ----------------------------------------------------------------------------------------------


def read_tokens(script, c, path: str, sequences: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, int64 [sequences, train_seq_len], from the start of the validation text of a dataset."""
    tokens, length = script.find_shards(path, "val", c.vocab_size)[0], c.train_seq_len
    count = min(sequences, (len(tokens) - 1) // length)
    need(count, path, f"more than TRAIN_SEQ_LEN={length} tokens", len(tokens))
    ids = np.array(tokens[: count * length + 1]).astype(np.int64)
    script.check_ids(ids, c.vocab_size, path)
    return ids[:-1].reshape(count, length), ids[1:].reshape(count, length)


def angles(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Angles between the vectors of x and y [..., dim], from 0 to 1 (opposite)."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    return np.arccos(np.clip((x * y).sum(axis=-1) / np.maximum(norms, 1e-30), -1, 1)) / np.pi


@contextlib.contextmanager
def watched(script):
    """Yields a list that gets, from every layer that is applied, the mean angle between its output and the state before
    it (the last layer's output; at first its own input)."""
    method = "forward" if script.FRAMEWORK == "torch" else "__call__"
    plain, found, state = getattr(script.Block, method), [], []

    def as_numbers(x):
        return x.float().cpu().numpy() if script.FRAMEWORK == "torch" else np.array(x.astype(script.mx.float32))

    def apply(self, x, *rest):
        y = plain(self, x, *rest)
        before, after = state.pop() if state else as_numbers(x), as_numbers(y)
        found.append(float(angles(before, after).mean()))
        state.append(after)
        return y

    setattr(script.Block, method, apply)
    try:
        yield found
    finally:
        setattr(script.Block, method, plain)


def measure(script, c, weights: dict[str, np.ndarray], tokens: tuple, passes: int) -> tuple[float, list[float]]:
    """(loss in nats a token, angular distance of every layer) of a model on tokens."""
    engine = script.Engine(dataclasses.replace(c, compile=False, dtype="float32"))
    engine.build(weights, training=False)
    rows = []
    losses = []
    for ids, targets in zip(*tokens):
        with watched(script) as found:
            losses.append(engine.token_losses(ids[None], targets[None], passes).mean())
        rows.append(found)
    return float(np.mean(losses)), np.mean(rows, axis=0).tolist()


def knee(curve: list[float]) -> int:
    """Where a falling curve turns flat: the point farthest below the line from the top left to the bottom right of its
    frame (Kneedle, Satopaa et al. 2011)."""
    y = np.asarray(curve, np.float64)
    y = (y - y.min()) / max(float(np.ptp(y)), 1e-30)
    return int(np.argmax(1 - np.linspace(0, 1, len(y)) - y))


def propose_band(distances: list[float]) -> tuple[int, int] | None:
    """First and last layer of the band to loop, the flat middle: from the knee of the distances to the knee as seen
    from the last layer (ETD, arXiv 2510.07358). None where there is no middle."""
    if len(distances) < 3:
        return None
    first, last = knee(distances), len(distances) - 1 - knee(distances[::-1])
    return (first, last) if 0 < first <= last < len(distances) - 1 else None


# The tool ------------------------------------------------------------------------------------------------------------


def ranges(layers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    parts = []
    for layer in layers:
        if parts and parts[-1][1] == layer - 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts) or "none"


def counted(passes: int) -> str:
    return f"{passes} pass" + "es" * (passes > 1)


def show_distances(distances: list[float]) -> None:
    """The distance of every layer, and the band that they propose."""
    print("layer  angular distance that it moves the state")
    for layer, distance in enumerate(distances):
        print(f"{layer:5}  {distance:.4f}  {'#' * round(60 * distance)}")
    band = propose_band(distances)
    if band is None:
        print("band: none (the distances have no flat middle)")
        return
    first, last = band
    layout = f"{first}+{last - first + 1}x2+{len(distances) - 1 - last}"
    print(f"band: layers {first} to {last}, such as --layout {layout} --init keep")


def show_child(script, parent: Parent, plan: Plan, child: Child) -> None:
    """What became of what."""
    layout = script.parse_layout(child.config.layout)
    names = ["prelude"] * layout.prelude + ["core"] * layout.core + ["coda"] * layout.coda
    for block, (name, sources) in enumerate(zip(names, plan.sources)):
        made = f"mean of layers {', '.join(map(str, sources))}" if len(sources) > 1 else "new weights"
        print(f"block {block} ({name}): {f'layer {sources[0]}' if len(sources) == 1 else made}")
    unused = sorted(set(range(len(parent.layers))) - set(plan.stands_for))
    print(f"left out: {f'layers {ranges(unused)}' if unused else 'none'}")
    print(f"stands for the parent at {counted(child.passes)}; missing of the matrices: {child.left:.4f} of their norm")
    stored = [script.count_params(model.config) for model in (child, parent)]
    print(f"parameters: {stored[0]} stored, the parent {stored[1]}")
    for notice in child.notices:
        print(notice)


def show_start(script, child: Child, out: Path) -> None:
    """The command that trains on; its preset must not change the model."""
    flags = {name: getattr(child.config, name) for name in script.MODEL_FIELDS}
    shown = " ".join(f"--{name}={int(value) if type(value) is bool else value}" for name, value in flags.items())
    name = SCRIPTS[script.FRAMEWORK == "mlx"]
    print(f"wrote {short(out)}; train on with")
    print(f"python {name} --init_from={short(out)} {shown} --loop_schedule=")


def parse(argv: list[str] | None):
    parser = Parser(__doc__)
    parser.add_argument("parent", type=Path, help="an artifact, a checkpoint or a model.safetensors")
    parser.add_argument("out", type=Path, nargs="?", help="the file to write, NAME.safetensors")
    parser.add_argument("--layout", default="", help="the target, P+CxR+D")
    parser.add_argument("--init", choices=INITS, help="where its blocks come from (above)")
    parser.add_argument("--layers", default="", help="drop: layers of prelude,core,coda, such as 0-3,10-17,18-21")
    parser.add_argument("--passes", type=int, default=0, help="of a looped parent; 0 = those it was trained with")
    parser.add_argument("--lora-rank", default="0", help="rank of the LoRA of every pass, or full")
    parser.add_argument("--lora", choices=("svd", "zero"), help="svd: of what tying loses (default where layers are "
                        "tied); zero: b = 0")  # fmt: skip
    parser.add_argument("--pass-vectors", type=int, choices=(0, 1), help="a row a pass of the vectors that LoRA cannot "
                        "make up for; default: 1 with --lora svd, else 0")  # fmt: skip
    parser.add_argument("--skips", choices=KNOWN_VALUES["skips"], help="default: the parent's")
    parser.add_argument("--loop-gate", choices=KNOWN_VALUES["loop_gate"], help="default: the parent's")
    parser.add_argument("--gate-init", type=float, default=1.0, help="of every pass but the first; 1 = no gate")
    parser.add_argument("--seed", type=int, default=1337, help="of new weights")
    parser.add_argument("--tokens", help="folder of a dataset: measure angular distances and losses on it")
    parser.add_argument("--sequences", type=int, default=8, help="of its validation text, for --tokens")
    parser.add_argument("--script", choices=SCRIPTS, help="whose reader and model to use; default: the first that runs")
    return check_args(parser.parse_args(argv))


def check_args(args):
    """What can be refused before anything is read; fills in defaults."""
    need(args.out or args.tokens, "OUT", "a file to write, or --tokens", "neither")
    made = bool(args.layout and args.init)
    need(made == bool(args.out), "OUT", "it together with --layout and --init", "only some of them")
    whole = args.lora_rank == "full" or re.fullmatch(r"\d{1,6}", args.lora_rank)
    need(whole, "--lora-rank", "a whole number or full", f'"{args.lora_rank}"')
    need(args.sequences > 0, "--sequences", "1 or more", args.sequences)
    need(0 <= args.seed < 2**32, "--seed", "0 to 2**32 - 1", args.seed)
    need(abs(args.gate_init) < 1e6, "--gate-init", "a number", args.gate_init)
    if not args.out:
        return args
    need(args.out.suffix == ".safetensors", "OUT", "NAME.safetensors", args.out)
    need(args.out.parent.is_dir(), args.out.parent, "a folder to write to", "none")
    need(not args.out.exists(), args.out, "a new file", "one that exists", "delete it, or choose another name")
    ties, rank = args.init in TYING, args.lora_rank != "full" and int(args.lora_rank)
    has_lora = args.lora_rank == "full" or rank > 0
    need(args.lora is None or has_lora, "--lora", "--lora-rank with it", "0")
    need(args.lora != "svd" or ties, "--lora svd", f"--init {', '.join(TYING)}: others tie no layers", args.init)
    args.svd = has_lora and ties and args.lora != "zero"
    args.pass_vectors = args.svd if args.pass_vectors is None else bool(args.pass_vectors)
    return args


def find_script(name: str | None):
    """The trainer asked for, else the first whose packages are here. Raises InputError."""
    if name:
        return load_script(name)
    with contextlib.suppress(InputError):
        return load_script(SCRIPTS[0])
    return load_script(SCRIPTS[1])


def convert(script, args) -> None:
    """Everything, once the trainer is loaded."""
    parent = read_parent(script, args.parent, args.passes)
    tokens = read_tokens(script, parent.config, args.tokens, args.sequences) if args.tokens else None
    child = None
    if args.out:
        c = child_config(script, parent, args)
        plan = plan_of(args.init, script.parse_layout(c.layout), len(parent.layers), args.layers)
        child = make_child(script, parent, plan, c, args.svd)
    print(f"parent: {short(args.parent)}: LAYOUT={parent.config.layout}, {len(parent.layers)} layers")
    if tokens:
        loss, distances = measure(script, parent.config, parent.weights, tokens, parent.passes)
        show_distances(distances)
        print(f"loss of the parent: {loss:.4f} nats a token ({tokens[0].size} tokens)")
    if child is None:
        return
    show_child(script, parent, plan, child)
    for passes in sorted({1, child.passes, script.parse_layout(child.config.layout).loops}) if tokens else ():
        loss, _ = measure(script, child.config, child.weights, tokens, passes)
        print(f"loss of the child at {counted(passes)}: {loss:.4f} nats a token")
    tensors = {f"weights.{name}": np.ascontiguousarray(value) for name, value in child.weights.items()}
    script.save_tensors(args.out, tensors, script.about(child.config, child.passes))
    show_start(script, child, args.out)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    script = find_script(args.script)
    try:
        convert(script, args)
    except script.InputError as error:
        raise InputError(str(error)) from None
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
