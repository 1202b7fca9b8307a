"""RecurrentGPT for mlx-lm: P blocks once, C blocks `loops` times over, D blocks once.

The model file of an exported run (`retrofit/export_mlx.py` copies it into the export); it needs only mlx and mlx_lm.
Its arithmetic is that of `train_gpt_mlx.py`, plus a KV cache: every application of a block (a visit) has keys and
values of its own, so there are P + C * loops + D caches for P + C + D stored blocks. All else that connects the passes
(x0, shortcuts, gates) belongs to one position and needs no cache.

Shapes: n sequences, t positions, h heads, k key/value heads, d width of a head.
"""

import re
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache

RMS_EPS = 2.0**-23
ROPE_BASE = 10000.0
LOGIT_SOFTCAP = 30.0  # logits lie between -30 and 30
SKIPS = ("per_loop", "official", "none")
LOOP_GATES = ("x0", "gain", "none")


@dataclass
class ModelArgs(BaseModelArgs):
    """The options of a run, by the names of the training scripts, and how many passes to run."""

    layout: str  # "P+CxR+D", R the passes that were trained
    vocab_size: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    mlp_mult: int
    skips: str
    loop_gate: str
    lora_rank: int
    pass_vectors: bool
    train_seq_len: int  # tokens; positions beyond were never trained
    xsa: bool
    rotary_dims: int
    norm_scale: bool
    mlp_slope: float
    loops: int  # passes to run: test-time depth
    model_type: str = "recurrent_gpt"

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> "ModelArgs":
        """From a config.json: the run's options are its "model", `loops` stands beside it. Raises ValueError for an
        option that this file does not know, which would otherwise change the model without a word."""
        options = dict(params["model"])
        names = {field.name for field in fields(cls)} - {"loops", "model_type"}
        if unknown := sorted(options.keys() - names):
            raise ValueError(f"recurrent_gpt.py: options that it does not know: {', '.join(unknown)}; export anew")
        if missing := sorted(names - options.keys()):
            raise ValueError(f"recurrent_gpt.py: options that config.json lacks: {', '.join(missing)}; export anew")
        return cls(**options, loops=params["loops"])

    def __post_init__(self):
        trained = parse_layout(self.layout).loops
        for name, known in (("skips", SKIPS), ("loop_gate", LOOP_GATES)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"recurrent_gpt.py: {name}: expected one of {', '.join(known)}, found {value!r}")
        if type(self.loops) is not int or self.loops < 1:
            raise ValueError(f"recurrent_gpt.py: loops: expected a whole number of at least 1, found {self.loops!r}")
        if self.skips == "official" and self.loops > trained:
            raise ValueError(f"recurrent_gpt.py: loops: expected at most {trained} with skips=official (the shortcuts "
                             f"of more were never trained), found {self.loops}")  # fmt: skip


# The plan: which block runs after which, and which shortcut connects which -------------------------------------------


class Layout(NamedTuple):
    prelude: int  # blocks that run once, first
    core: int  # blocks that run `loops` times
    loops: int  # passes that were trained
    coda: int  # blocks that run once, last


class Visit(NamedTuple):
    """One application of a block. Visits are numbered from 0."""

    block: int  # index into the stored blocks
    loop: int  # pass, from 0; -1 outside the core
    opens: bool  # first block of a pass
    closes: bool  # last block of a pass
    skip_from: int  # visit whose output is added before this one, or -1
    skip_row: int  # row of skip_weights that scales it
    saves: bool  # whether a later visit adds this one's output


def parse_layout(text: str) -> Layout:
    """Reads "9", "5x3", "3+3x3+5", "3+3x3" or "3x3+5"."""
    match = re.fullmatch(r"(?:(\d+)\+)?(\d+)x(\d+)(?:\+(\d+))?|(\d+)", text)
    if match is None:
        raise ValueError(f'recurrent_gpt.py: layout: expected P+CxR+D such as "3+3x3+5", found {text!r}')
    prelude, core, loops, coda, plain = (int(part or 0) for part in match.groups())
    return Layout(0, plain, 1, 0) if match[5] else Layout(prelude, core, loops, coda)


def block_order(layout: Layout, loops: int) -> list[tuple[int, int]]:
    """(block, pass) of every visit; pass -1 outside the core."""
    p, c, _, d = layout
    core = [(p + i, loop) for loop in range(loops) for i in range(c)]
    return [(i, -1) for i in range(p)] + core + [(p + c + i, -1) for i in range(d)]


def skip_pairs(layout: Layout, skips: str, loops: int) -> list[tuple[int, int, tuple]]:
    """(source visit, target visit, key) of every shortcut with `loops` passes on; a key is a row of skip_weights."""
    order = block_order(layout, loops)
    n, (p, c, _, d) = len(order), layout
    if skips == "per_loop":
        pairs = [(i, n - 1 - i) for i in range(min(p, d))]
        pairs += [(p + a * c + i, p + a * c + c - 1 - i) for a in range(loops) for i in range(c // 2)]
        return [(source, target, (order[source][0], order[target][0])) for source, target in pairs]
    if skips == "official":
        return [(n // 2 - 1 - k, n // 2 + k, ("pop", k)) for k in range(n // 2)]
    return []


def skip_rows(layout: Layout, skips: str) -> dict[tuple, int]:
    """Row of skip_weights for every key that any trained number of passes uses."""
    keys = [key for loops in range(1, layout.loops + 1) for _, _, key in skip_pairs(layout, skips, loops)]
    return {key: row for row, key in enumerate(dict.fromkeys(keys))}


def visits(layout: Layout, skips: str, loops: int) -> list[Visit]:
    """The whole forward pass with `loops` passes, in order."""
    rows, pairs = skip_rows(layout, skips), skip_pairs(layout, skips, loops)
    sources = {target: (source, rows[key]) for source, target, key in pairs}
    saved = {source for source, _, _ in pairs}
    found = []
    for number, (block, loop) in enumerate(block_order(layout, loops)):
        opens = loop >= 0 and block == layout.prelude
        closes = loop >= 0 and block == layout.prelude + layout.core - 1
        found.append(Visit(block, loop, opens, closes, *sources.get(number, (-1, -1)), number in saved))
    return found


# The layers ----------------------------------------------------------------------------------------------------------


def rms_norm(x: mx.array) -> mx.array:
    """Divides by the root mean square of the last axis."""
    return mx.fast.rms_norm(x, None, RMS_EPS)


def without_own(y: mx.array, v: mx.array) -> mx.array:
    """Attention's output y [n, h, t, d] without each head's part along the token's own value, v [n, k, t, d]."""
    n, h, t, d = y.shape
    y, own = y.reshape(n, v.shape[1], -1, t, d), rms_norm(v)[:, :, None]  # [n, k, groups, t, d]
    return (y - (y * own).mean(axis=-1, keepdims=True) * own).reshape(n, h, t, d)


def vector(args: ModelArgs, passes: int, *shape: int) -> mx.array:
    """A block's vector, ones; in the core of a model with `pass_vectors` a row a pass."""
    return mx.ones((passes, *shape) if args.pass_vectors and passes > 1 else shape)


def of_pass(vector: mx.array, loop: int, axes: int = 1) -> mx.array:
    """The vector itself, of so many axes, or its row of a pass; passes beyond the trained ones reuse the last."""
    return vector if vector.ndim == axes else vector[min(loop, vector.shape[0] - 1)]


class LoopChange(nn.Module):
    """B[pass] A[pass] x: what a pass adds to a linear layer."""

    def __init__(self, out_dim: int, in_dim: int, passes: int, rank: int):
        super().__init__()
        self.a = mx.zeros((passes, rank, in_dim))
        self.b = mx.zeros((passes, out_dim, rank))

    def __call__(self, x: mx.array, loop: int) -> mx.array:
        row = min(loop, self.a.shape[0] - 1)  # passes beyond the trained ones reuse the last
        return x @ self.a[row].T @ self.b[row].T


class Linears(nn.Module):
    """Linear layers by name, and in the core of a model with LoRA the changes of the passes. They lie apart, so that
    every block has the same plain layers, which mlx-lm quantizes and adapts by name."""

    def __init__(self, shapes: dict[str, tuple[int, int]], passes: int, rank: int):
        super().__init__()
        for name, (out_dim, in_dim) in shapes.items():
            setattr(self, name, nn.Linear(in_dim, out_dim, bias=False))
        self.changes = {name: LoopChange(*shape, passes, rank) for name, shape in shapes.items() if rank}

    def linear(self, name: str, x: mx.array, loop: int) -> mx.array:
        """W x, plus B[pass] A[pass] x where there are changes."""
        y = self[name](x)
        return y + self.changes[name](x, loop) if self.changes else y


class Attention(Linears):
    """Causal grouped-query attention; queries and keys are normed per head, turned, and queries scaled per head."""

    def __init__(self, args: ModelArgs, passes: int, rank: int):
        head_dim, dim = args.model_dim // args.num_heads, args.model_dim
        kv_dim = head_dim * args.num_kv_heads
        super().__init__({"q": (dim, dim), "k": (kv_dim, dim), "v": (kv_dim, dim), "proj": (dim, dim)}, passes, rank)
        self.q_gain = vector(args, passes, args.num_heads)
        self.head_dim, self.xsa = head_dim, args.xsa
        self.turned = args.rotary_dims or head_dim

    def __call__(self, x: mx.array, loop: int, mask: mx.array | str | None, cache: KVCache | None) -> mx.array:
        n, t, _ = x.shape
        q, k, v = (self.linear(name, x, loop).reshape(n, t, -1, self.head_dim).transpose(0, 2, 1, 3) for name in "qkv")
        offset = 0 if cache is None else cache.offset  # a batch of unequal prompts has one a sequence
        q, k = self.rotate(rms_norm(q), offset), self.rotate(rms_norm(k), offset)
        q, own = q * of_pass(self.q_gain, loop)[:, None, None], v
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        y = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.head_dim**-0.5, mask=mask)
        y = without_own(y, own) if self.xsa else y
        return self.linear("proj", y.transpose(0, 2, 1, 3).reshape(n, t, -1), loop)

    def rotate(self, x: mx.array, offset: int | mx.array) -> mx.array:
        """Turns the pairs (i, i + m/2) of the first m numbers of [n, h, t, d] by minus the angle of their position:
        hence the scale of -1."""
        return mx.fast.rope(x, self.turned, traditional=False, base=ROPE_BASE, scale=-1.0, offset=offset)


class MLP(Linears):
    """proj(relu(fc(x))^2); with a slope the relu is a leaky one."""

    def __init__(self, args: ModelArgs, passes: int, rank: int):
        dim, hidden = args.model_dim, args.mlp_mult * args.model_dim
        super().__init__({"fc": (hidden, dim), "proj": (dim, hidden)}, passes, rank)
        self.slope = args.mlp_slope

    def __call__(self, x: mx.array, loop: int) -> mx.array:
        return self.linear("proj", mx.square(nn.leaky_relu(self.linear("fc", x, loop), self.slope)), loop)


class Block(nn.Module):
    """x = mix0*x + mix1*x0; x += attn_scale*attn(norm(x)); x += mlp_scale*mlp(norm(x)). With `norm_scale` what block
    `number`, from 0, reads is smaller the later it comes."""

    def __init__(self, args: ModelArgs, number: int, passes: int, rank: int):
        super().__init__()
        self.norm_scale = (number + 1) ** -0.5 if args.norm_scale else 1.0
        self.attn = Attention(args, passes, rank)
        self.mlp = MLP(args, passes, rank)
        self.attn_scale = vector(args, passes, args.model_dim)
        self.mlp_scale = vector(args, passes, args.model_dim)
        self.resid_mix = vector(args, passes, 2, args.model_dim)

    def __call__(self, x: mx.array, x0: mx.array, loop: int, mask, cache) -> mx.array:
        mix = of_pass(self.resid_mix, loop, 2)
        x = mix[0] * x + mix[1] * x0
        x = x + of_pass(self.attn_scale, loop) * self.attn(rms_norm(x) * self.norm_scale, loop, mask, cache)
        return x + of_pass(self.mlp_scale, loop) * self.mlp(rms_norm(x) * self.norm_scale, loop)


# The model -----------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """What mlx-lm calls: ids [n, t] -> logits [n, t, vocab]."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args, self.model_type = args, args.model_type
        self.layout = parse_layout(args.layout)
        prelude, core, passes, coda = self.layout
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        once, looped = (1, 0), (passes, args.lora_rank)
        kinds = [once] * prelude + [looped] * core + [once] * coda
        self.blocks = [Block(args, number, *kind) for number, kind in enumerate(kinds)]
        if rows := skip_rows(self.layout, args.skips):
            self.skip_weights = mx.ones((len(rows), args.model_dim))
        if passes > 1:
            self.loop_embed = mx.zeros((passes, args.model_dim))
            if args.loop_gate != "none":
                self.loop_gate = mx.ones((passes,))
        self._visits = visits(self.layout, args.skips, args.loops)  # the underscore: nothing to save or to train

    def __call__(self, inputs: mx.array, cache: list | None = None, input_embeddings: mx.array | None = None):
        x = self.tok_emb(inputs) if input_embeddings is None else input_embeddings
        logits = self.tok_emb.as_linear(self.hidden(x, cache or [None] * len(self._visits))).astype(mx.float32)
        return LOGIT_SOFTCAP * mx.tanh(logits / LOGIT_SOFTCAP)

    def hidden(self, x: mx.array, cache: list) -> mx.array:
        """Embeddings [n, t, dim] and a cache for every visit -> normed activations [n, t, dim]."""
        if len(cache) != len(self._visits):  # such as a prompt cache saved with another number of passes
            raise ValueError(f"recurrent_gpt.py: cache: expected one for each of {len(self._visits)} visits (loops="
                             f"{self.args.loops}), found {len(cache)}")  # fmt: skip
        x0 = x = rms_norm(x)
        mask = create_attention_mask(x, cache[0])
        looped = self.layout.loops > 1
        saved: dict[int, mx.array] = {}
        for number, visit in enumerate(self._visits):
            row = min(visit.loop, self.layout.loops - 1)  # passes beyond the trained ones reuse the last
            if visit.opens and looped:
                x = x_in = x + self.loop_embed[row]
            if visit.skip_from >= 0:
                x = x + self.skip_weights[visit.skip_row] * saved.pop(visit.skip_from)
            x = self.blocks[visit.block](x, x0, visit.loop, mask, cache[number])
            if visit.saves:
                saved[number] = x
            if visit.closes and visit.loop > 0 and looped and self.args.loop_gate != "none":
                x = self.gate(x, x_in, x0, row)
        return rms_norm(x)

    def gate(self, x: mx.array, x_in: mx.array, x0: mx.array, row: int) -> mx.array:
        """After every pass but the first. `gain`: x_in + g*(x - x_in); `x0`: g*x + (1-g)*x0."""
        g = self.loop_gate[row]
        return x + (g - 1) * (x - x_in) if self.args.loop_gate == "gain" else g * x + (1 - g) * x0

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Weights by the names of this file. In a run's own file they have the prefix `weights.`, and the changes of
        the passes are called lora_a and lora_b, which mlx-lm would take for an adapter."""
        found = {}
        for name, value in weights.items():
            name = re.sub(r"\.(\w+)\.lora_([ab])$", r".changes.\1.\2", name.removeprefix("weights."))
            found[name] = value
        return found

    @property
    def layers(self) -> list[Block]:
        """The stored blocks, each once: what `mlx_lm.lora` puts adapters on."""
        return self.blocks

    def make_cache(self) -> list[KVCache]:
        """One for every visit."""
        return [KVCache() for _ in self._visits]
