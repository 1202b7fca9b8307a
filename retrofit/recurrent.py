"""A pretrained decoder that runs its middle layers several times, for mlx-lm.

The parent's own forward pass runs untouched: only the list of layers that it walks is longer, P prelude layers once,
C core layers `loops` times, D coda layers once. So one pass is the parent, bit for bit. Every visit of a layer has a
key-value cache of its own.

This file is the `model_file` of a folder made by `hf.py make`, and needs mlx-lm alone:

    model, tokenizer = mlx_lm.load(folder, trust_remote_code=True, model_config={"loops": 4})
"""

import copy
import importlib
import re
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import KVCache
from mlx_lm.tuner.lora import LoRALinear

# model_type of the families that tests/test_hf.py tries -> their module in mlx_lm.models
FAMILIES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "olmo2": "olmo2",
    "gpt2": "gpt2",
    "gpt_neox": "gpt_neox",
    "smollm3": "smollm3",
}
INJECTIONS = ("gate", "damp", "concat", "none")
TRAINED = "trained."  # before the names of what training changed, so that the parent's own weights stay as they are
LORA_SCALE = 2.0


@dataclass
class ModelArgs:
    """What the folder's config.json says. `config` is the parent's own configuration with our keys beside its own."""

    config: dict
    layout: str = "1+1x1+0"  # P+CxR+D
    layers: list = field(default_factory=list)  # the parent's layer behind each stored one; empty: all of them
    loops: int = 1  # passes of the core
    inject: str = "gate"
    gate: float = 0.5  # a, or the damping b, before training
    parent_only: bool = False  # leave out what training changed

    @classmethod
    def from_dict(cls, config: dict) -> "ModelArgs":
        ours = dict(config["recurrence"])
        loops = config.get("loops", ours.pop("loops", 1))
        return cls(config=config, loops=loops, parent_only=config.get("parent_only", False), **ours)


def parse_layout(layout: str) -> tuple[int, int, int, int]:
    """(P, C, R, D) of "P+CxR+D", "CxR" or "P+CxR". Raises ValueError."""
    found = re.fullmatch(r"(?:(\d+)\+)?(\d+)x(\d+)(?:\+(\d+))?", layout)
    if not found or int(found[2]) < 1 or int(found[3]) < 1:
        raise ValueError(f"layout: expected P+CxR+D, such as 10+6x2+14, found {layout!r}")
    prelude, core, loops, coda = (int(part or 0) for part in found.groups())
    return prelude, core, loops, coda


class Inject(nn.Module):
    """How a further pass opens: from the state s that the last pass left and the state e at the core's first entry.

    gate: a*s + (1-a)*e, a per channel. concat: W [s; e]. none: s. damp: s, and the pass moves it by b times its own
    change: s + b*(core(s) - s). The first pass never comes here.
    """

    def __init__(self, kind: str, dim: int, gate: float):
        super().__init__()
        if kind not in INJECTIONS:
            raise ValueError(f"inject: expected one of {', '.join(INJECTIONS)}, found {kind!r}")
        self.kind = kind
        if kind in ("gate", "damp"):
            self.gate = mx.full((dim,), gate)
        if kind == "concat":
            self.weight = mx.concatenate([gate * mx.eye(dim), (1 - gate) * mx.eye(dim)], axis=1)

    def enter(self, s: mx.array, e: mx.array) -> mx.array:
        if self.kind == "gate":
            return (self.gate * s + (1 - self.gate) * e).astype(s.dtype)
        if self.kind == "concat":
            return mx.concatenate([s, e], axis=-1) @ self.weight.T.astype(s.dtype)
        return s

    def leave(self, entered: mx.array, s: mx.array) -> mx.array:
        if self.kind == "damp":
            return (entered + self.gate * (s - entered)).astype(s.dtype)
        return s


class Visit:
    """Stands for one visit of a layer in the list that the parent's forward walks; its attributes are the layer's."""

    def __init__(self, layer, before=None, after=None):
        self.layer = layer
        self.before = before
        self.after = after

    def __getattr__(self, name):
        return getattr(self.layer, name)

    def __call__(self, h, *args, **kwargs):
        if self.before:
            h = self.before(h)
        h = self.layer(h, *args, **kwargs)
        return self.after(h) if self.after else h


class Passes:
    """What happens between the passes of one forward call."""

    def __init__(self, inject: Inject, loops: int, bptt: int):
        self.inject = inject
        self.cut = loops - bptt if bptt else 0  # the pass before which the gradient ends; 0: it never does
        self.entry = None
        self.entered = None

    def opens(self, number: int, h: mx.array) -> mx.array:
        if number == 0:
            self.entry = h
            return h
        if number == self.cut:  # as in RR, the gradient through the entry ends here too: the prelude gets none
            h = mx.stop_gradient(h)
            self.entry = mx.stop_gradient(self.entry)
        self.entered = self.inject.enter(h, self.entry)
        return self.entered

    def closes(self, number: int, h: mx.array) -> mx.array:
        return self.inject.leave(self.entered, h) if number else h


class Recurrent:
    """Comes before the parent's `Model` among the bases; see `Model` below."""

    def __init__(self, args: ModelArgs, parent_args):
        super().__init__(parent_args)
        self.recurrence = args
        self.prelude, self.core, _, self.coda = parse_layout(args.layout)
        layers = self.layers
        chosen = args.layers or list(range(len(layers)))
        if len(chosen) != self.prelude + self.core + self.coda:
            raise ValueError(
                f"layout {args.layout} needs {self.prelude + self.core + self.coda} layers, not {len(chosen)}"
            )
        self._set_layers([layers[i] for i in chosen])
        dim = args.config.get("hidden_size") or args.config["n_embd"]
        self.inject = Inject(args.inject, dim, args.gate)
        self.loops = args.loops
        self.bptt = 0  # passes at the end that get a gradient; 0: all

    # The parent's list of layers

    @property
    def layers(self) -> list:
        """Every stored layer once."""
        return self.model.h if "h" in self.model else self.model.layers

    def _set_layers(self, layers: list) -> None:
        setattr(self.model, "h" if "h" in self.model else "layers", layers)

    def band(self) -> list[int]:
        """Numbers of the core's layers."""
        return list(range(self.prelude, self.prelude + self.core))

    def order(self, loops: int) -> list[int]:
        """Number of the layer behind each visit."""
        coda = range(self.prelude + self.core, self.prelude + self.core + self.coda)
        return [*range(self.prelude), *self.band() * loops, *coda]

    def _walk(self, loops: int) -> list[Visit]:
        passes = Passes(self.inject, loops, self.bptt)
        walk = [Visit(self.layers[i]) for i in self.order(loops)]
        for number in range(loops):
            first = self.prelude + number * self.core
            walk[first].before = lambda h, n=number: passes.opens(n, h)
            walk[first + self.core - 1].after = lambda h, n=number: passes.closes(n, h)
        return walk

    @contextmanager
    def _unrolled(self, walk: list[Visit]):
        """While it lasts, the parent's list of layers is the list of visits."""
        body, stored = self.model, self.layers
        windows = {name: getattr(body, name) for name in ("fa_idx", "swa_idx") if hasattr(body, name)}
        try:
            self._set_layers(walk)
            if windows:  # where llama finds a cache with, and one without, a sliding window
                slides = [visit.use_sliding for visit in walk]
                body.fa_idx = slides.index(False) if False in slides else 0
                body.swa_idx = slides.index(True) if True in slides else None
            yield
        finally:
            self._set_layers(stored)
            for name, value in windows.items():
                setattr(body, name, value)

    # The forward pass

    def __call__(self, inputs: mx.array, cache=None, **kwargs) -> mx.array:
        """Logits (batch, length, vocabulary) after `self.loops` passes. A cache must come from `make_cache`."""
        walk = self._walk(self.loops)
        if cache is not None and len(cache) != len(walk):
            raise ValueError(f"expected a cache of {len(walk)} visits ({self.loops} passes), found {len(cache)}")
        with self._unrolled(walk):
            return super().__call__(inputs, cache=cache, **kwargs)

    def hidden(self, inputs: mx.array, loops: int | None = None) -> mx.array:
        """The state before the output layer, (batch, length, dim): `head(hidden(x))` is the model without cache."""
        return self._run(inputs, self._walk(loops or self.loops))

    def hidden_and_first(self, inputs: mx.array, loops: int) -> tuple[mx.array, mx.array]:
        """`hidden` after `loops` passes, and after one, which costs only the coda and lets no gradient through."""
        walk = self._walk(loops)
        closing, kept = walk[self.prelude + self.core - 1], []
        after = closing.after
        closing.after = lambda h: kept.append(h) or after(h)
        h = self._run(inputs, walk)
        if not self.coda:
            return h, mx.stop_gradient(self.hidden(inputs, 1))
        coda = [Visit(layer) for layer in self.layers[self.prelude + self.core :]]
        coda[0].before = lambda _: mx.stop_gradient(kept[0])
        return h, mx.stop_gradient(self._run(inputs, coda))

    def _run(self, inputs: mx.array, walk: list[Visit]) -> mx.array:
        head = self.model.pop("embed_out", None)  # gpt_neox has its output layer inside
        try:
            if head is not None:
                self.model.embed_out = nn.Identity()
            with self._unrolled(walk):
                return self.model(inputs)
        finally:
            if head is not None:
                self.model.embed_out = head

    def head_module(self) -> nn.Module:
        if "lm_head" in self:
            return self.lm_head
        for name in ("embed_out", "embed_tokens", "wte"):
            if name in self.model:
                return self.model[name]
        raise ValueError(f"{self.model_type}: no output layer found")

    def head(self, h: mx.array) -> mx.array:
        module = self.head_module()
        return module.as_linear(h) if hasattr(module, "as_linear") else module(h)

    def make_cache(self) -> list:
        """One key-value cache per visit, for `self.loops` passes."""
        parent = getattr(super(), "make_cache", None)
        each = parent() if parent else [KVCache() for _ in self.layers]
        return [copy.deepcopy(each[i]) for i in self.order(self.loops)]

    # Weights

    def add_lora(self, paths: list[str], rank: int) -> None:
        """Puts a low-rank change beside the linear layers at `paths`; it is zero until trained."""
        modules = dict(self.named_modules())
        new = [(path, LoRALinear.from_base(modules[path], r=rank, scale=LORA_SCALE)) for path in paths]
        self.update_modules(tree_unflatten(new))

    def sanitize(self, weights: dict) -> dict:
        """The weights under this model's names, with what training changed in place of the parent's."""
        trained = {k.removeprefix(TRAINED): v for k, v in weights.items() if k.startswith(TRAINED)}
        inject = {k: v for k, v in weights.items() if k.startswith("inject.")}
        weights = {k: v for k, v in weights.items() if not k.startswith((TRAINED, "inject."))}
        if hasattr(super(), "sanitize"):
            weights = super().sanitize(weights)
        weights |= inject
        if not self.recurrence.parent_only:
            weights |= trained
        lora = {k.removesuffix(".lora_a"): v.shape[1] for k, v in weights.items() if k.endswith(".lora_a")}
        for rank in set(lora.values()):
            self.add_lora([path for path in lora if lora[path] == rank], rank)
        for path in lora:
            for leaf in ("weight", "scales", "biases", "bias"):
                if f"{path}.{leaf}" in weights:
                    weights[f"{path}.linear.{leaf}"] = weights.pop(f"{path}.{leaf}")
        return weights


def Model(args: ModelArgs) -> nn.Module:  # mlx-lm calls it by this name
    """The recurrent model of a parent's family. Raises ValueError for a family that was not tried."""
    family = args.config["model_type"]
    if family not in FAMILIES:
        raise ValueError(f"model_type: expected one of {', '.join(FAMILIES)}, found {family!r}")
    parent = importlib.import_module(f"mlx_lm.models.{FAMILIES[family]}")
    made = type("Model", (Recurrent, parent.Model), {})
    return made(args, parent.ModelArgs.from_dict(args.config))
