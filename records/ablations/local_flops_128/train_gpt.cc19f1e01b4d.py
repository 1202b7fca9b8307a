"""Depth-recurrent GPT for parameter golf, PyTorch script (its twin is train_gpt_mlx.py).

Trains a `RecurrentGPT`: a few stored transformer blocks of which a band is applied several times, exports it as an int6
artifact, reads the artifact back from disk and scores it in bits per byte.

    torchrun --standalone --nproc_per_node=8 train_gpt.py          the `record` preset on 8 GPUs
    python train_gpt.py --preset=smoke                             any machine, no data needed, under a minute
    python train_gpt.py --help                                     every setting, with its unit

Sections marked [shared] use NumPy only and stand byte for byte in both scripts (`python tests/sync_shared.py` copies
them); in the others the classes, functions and parameter names are the same. Sources: parameter-golf PR #319 (depth
recurrence 5x3) and #1394 (loops on late), arXiv 2511.07384 (looping a band), arXiv 2410.20672 (per-loop LoRA).
"""

from __future__ import annotations

import ctypes
import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import json
import lzma
import math
import os
import platform
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.numpy import load as parse_tensors
from safetensors.numpy import save_file
from torch import Tensor, nn
from tqdm import tqdm

FRAMEWORK = "torch"
DEFAULT_PRESET = "record"
# ======================================================================================================================
# CONFIG [shared]
# A value comes from the command line (--num_heads=8), else the environment (NUM_HEADS=8, the challenge's habit), else
# the preset, else the default here. 0 or "" means "off" or "choose for me". What is wrong raises InputError.
# ======================================================================================================================
class InputError(ValueError):
    """Bad input: one line that says what, where, expected, found and how to mend it. MAIN exits with code 1."""

@dataclass(frozen=True)
class Config:
    # What to do
    mode: str = "train"  # train | eval | sample
    preset: str = ""  # smoke | demo | laptop | record | baseline | pr319
    run_id: str = ""  # name of the folder under log_dir; "" makes one from the date, the preset and the seed
    resume: bool = False  # go on from the checkpoint of run_id
    artifact: str = ""  # eval and sample: path of an artifact (model.int6.rgpt) of either script
    checkpoint: str = ""  # eval and sample: path of a checkpoint.safetensors or model.safetensors of either script
    init_from: str = ""  # train: artifact, checkpoint or model with the same blocks, of any layout; weights go by name
    log_dir: str = "logs"  # folder of the run folders
    seed: int = 1337  # of the initial weights and of sampling
    # Data
    data_path: str = "./data/datasets/fineweb10B_sp1024"  # folder of fineweb_train_*.bin and fineweb_val_*.bin
    tokenizer_path: str = "./data/tokenizers/fineweb_1024_bpe.model"  # the SentencePiece model that made the shards
    vocab_size: int = 1024  # pieces, at most 65,536
    train_seq_len: int = 1024  # tokens a sequence, in training and in scoring
    val_max_tokens: int = 0  # score only this many validation tokens; the score is then labelled partial; 0 = all
    eval_stride: int = 0  # tokens between scoring windows (each token then sees more context); 0 = train_seq_len
    # Model
    layout: str = "3+3x3+3"  # P+CxR+D: P blocks once, C blocks looped R times, D blocks once; "9" = nine, no loop
    model_dim: int = 512  # width
    num_heads: int = 8  # query heads
    num_kv_heads: int = 4  # key and value heads, shared by groups of query heads
    mlp_mult: int = 2  # hidden width of the MLP over the width
    rope_base: float = 10000.0  # base of the rotary frequencies
    qk_gain_init: float = 1.5  # initial factor on the queries, one per head
    logit_softcap: float = 30.0  # logits lie between -softcap and softcap; at most 60 (exp must not overflow)
    tied_embed_init_std: float = 0.005  # of the embedding, which is also the output layer
    skips: str = "per_loop"  # per_loop | unrolled | official | none: the U-Net shortcuts
    loop_gate: str = "x0"  # x0 | gain | none: what happens after a pass
    loop_gate_init: float = 1.0  # 1.0 is the identity; 1/R is what PR #319 used
    lora_rank: int = 0  # rank of the per-pass change of every core linear; 0 = off
    loop_schedule: str = ""  # "0:1,0.35:3" = one pass, from 35 % of training three; "" = all passes throughout
    eval_loops: int = 0  # passes when scoring and sampling; 0 = the number active at the end of training
    # Budget (training stops at the first that is reached; 0 = no such budget)
    iterations: int = 20000  # steps
    max_wallclock_seconds: float = 600.0  # seconds of training, compilation and validation not counted
    max_train_flops: float = 0.0  # floating-point operations of training, by the formula of flops_per_token
    # Batch
    train_batch_tokens: int = 524288  # tokens a step, over all processes
    microbatch_tokens: int = 0  # tokens a forward pass at most (memory only, results do not change); 0 = by device
    # Optimizer
    tied_embed_lr: float = 0.05  # Adam, embedding
    matrix_lr: float = 0.04  # Muon, block matrices
    scalar_lr: float = 0.04  # Adam, vectors and scalars
    lora_lr: float = 0.005  # Adam, LoRA matrices (rank 8 on Muon diverged 8 times of 8 in PR #1096)
    core_lr_scale: float = 1.0  # factor on matrix_lr for blocks that are looped (their gradients add up over passes)
    warmdown_frac: float = 0.4  # fraction of training over which the learning rate falls to 0 at the end
    muon_momentum: float = 0.95  # Muon's momentum
    muon_momentum_warmup_start: float = 0.85  # ... and its value at the first step
    muon_momentum_warmup_steps: int = 500  # ... steps until it is reached
    muon_ns_steps: int = 5  # Newton-Schulz iterations
    beta1: float = 0.9  # Adam
    beta2: float = 0.95  # Adam
    adam_eps: float = 1e-8  # Adam
    grad_clip_norm: float = 0.0  # largest norm of the whole gradient; 0 = no clipping
    # Artifact
    bytes_cap: int = 16000000  # largest code + artifact, bytes (decimal)
    quant_sigma: float = 0.0  # int6 rows span +-quant_sigma standard deviations; 0 = up to the row's largest weight
    embed_bits: int = 8  # 8 = int8 per row, 16 = float16
    codec: str = "ans"  # ans (constriction) | lzma: entropy coder of the quantized weights
    # Cadence
    val_loss_every: int = 1000  # steps between validations; 0 = only at the end
    train_log_every: int = 200  # steps between log lines (the first ten are always logged)
    checkpoint_every: int = 0  # steps between checkpoints; 0 = only when stopped by a signal and at the end
    # Machine
    device: str = ""  # torch: cuda | mps | cpu; mlx: gpu | cpu; "" = the best there is
    dtype: str = ""  # bfloat16 | float32 of the activations; "" = bfloat16 where it is fast. Weights stay float32
    compile: bool = True  # compile the model (torch.compile, mx.compile)
    deterministic: bool = False  # torch: bit for bit repeatable also when compiled, a little slower
    eager_eval: bool = True  # mlx: evaluate after every microbatch (less memory, slightly slower)
    mlx_wired_gb: float = 0.0  # mlx on Metal: memory to keep resident, GB; 0 = MLX's default
    mlx_cache_gb: float = 0.0  # mlx: cap on memory kept for reuse, GB; 0 = MLX's default
    # Sampling
    prompt: str = ""  # text to go on from; "" = start of a document
    sample_tokens: int = 200  # tokens to write
    temperature: float = 0.8  # 0 = always the likeliest
    top_k: int = 50  # draw from the k likeliest; 0 = from all

PRESETS: dict[str, dict[str, object]] = {
    "smoke": dict(  # needs no data: makes its own text and tokenizer; under a minute on two CPU cores
        data_path="./data/datasets/smoke_sp512", tokenizer_path="./data/tokenizers/smoke_512_bpe.model", vocab_size=512,
        layout="1+2x2+1", model_dim=64, num_heads=4, num_kv_heads=2, train_seq_len=64, train_batch_tokens=2048,
        iterations=120, max_wallclock_seconds=0.0, loop_schedule="0:1,0.5:2", val_loss_every=60, train_log_every=20,
        compile=False),
    "demo": dict(  # three minutes on two CPU cores, on the corpus of data/offline.py
        data_path="./data/datasets/offline_sp1024", tokenizer_path="./data/tokenizers/offline_1024_bpe.model",
        layout="1+2x2+1", model_dim=256, num_heads=4, num_kv_heads=2, train_seq_len=256, train_batch_tokens=4096,
        max_wallclock_seconds=180.0, loop_schedule="0:1,0.6:2", val_loss_every=100, train_log_every=20,
        muon_momentum_warmup_steps=100, val_max_tokens=65536),
    "laptop": dict(  # ten minutes on an 8 GB M-series laptop; useful on a CPU, too
        model_dim=384, num_heads=6, num_kv_heads=3, train_seq_len=512, train_batch_tokens=16384, train_log_every=20,
        loop_schedule="0:1,0.35:3", val_loss_every=200, muon_momentum_warmup_steps=200, val_max_tokens=1048576),
    "record": dict(  # ten minutes on 8xH100
        layout="3+3x3+5", mlp_mult=4, loop_schedule="0:1,0.35:3", quant_sigma=12.85, grad_clip_norm=1.0),
    # The two controls: the official script's model, and PR #319's; their warm-downs as fractions of training.
    "baseline": dict(layout="9", skips="official", loop_gate="none", warmdown_frac=0.087),
    "pr319": dict(layout="5x3", model_dim=640, skips="none", loop_gate="x0", loop_gate_init=1 / 3, warmdown_frac=0.0,
                  train_batch_tokens=786432, max_wallclock_seconds=2400.0),
}  # fmt: skip
CHOICES = {
    "mode": ("train", "eval", "sample"), "skips": ("per_loop", "unrolled", "official", "none"),
    "loop_gate": ("x0", "gain", "none"), "codec": ("ans", "lzma"), "dtype": ("", "bfloat16", "float32"),
    "embed_bits": (8, 16), "preset": ("", *PRESETS), "device": ("", "cuda", "mps", "gpu", "cpu"),
}  # fmt: skip
# Names of the official scripts that mean something else, or nothing, here.
REPLACED = {
    "NUM_LAYERS": "LAYOUT=9", "NUM_UNIQUE_LAYERS": "LAYOUT=5x3", "NUM_LOOPS": "LAYOUT=5x3",
    "WARMDOWN_ITERS": "WARMDOWN_FRAC=0.4 (a fraction of training, so that a slow machine decays like a fast one)",
    "WARMUP_STEPS": "nothing: every loop count is compiled before the clock starts",
    "TIE_EMBEDDINGS": "nothing: input and output embedding are always one",
    "VAL_BATCH_SIZE": "MICROBATCH_TOKENS", "GRAD_ACCUM_STEPS": "MICROBATCH_TOKENS", "EMBED_LR": "TIED_EMBED_LR",
    "MLX_MAX_MICROBATCH_TOKENS": "MICROBATCH_TOKENS", "MLX_EAGER_EVAL": "EAGER_EVAL", "HEAD_LR": "TIED_EMBED_LR",
    "MUON_BACKEND_STEPS": "MUON_NS_STEPS", "TRAIN_MAX_SEQ_LEN": "TRAIN_SEQ_LEN", "OUT_DIR": "LOG_DIR",
}  # fmt: skip
# Settings that do not change what is trained, left out of config_sha256; the seed too, so that seeds can be grouped.
NOT_IN_CONFIG_HASH = """mode preset run_id resume artifact checkpoint log_dir seed data_path tokenizer_path device
    microbatch_tokens train_log_every checkpoint_every prompt sample_tokens temperature top_k compile deterministic
    eager_eval mlx_wired_gb mlx_cache_gb""".split()
# Settings that a file of weights states, since its model cannot be built without them.
MODEL_FIELDS = """layout vocab_size model_dim num_heads num_kv_heads mlp_mult rope_base logit_softcap skips loop_gate
    lora_rank train_seq_len""".split()

class Layout(NamedTuple):
    prelude: int  # blocks that run once, first
    core: int  # blocks that run `loops` times
    loops: int
    coda: int  # blocks that run once, last
    @property
    def blocks(self) -> int:  # stored
        return self.prelude + self.core + self.coda
    @property
    def depth(self) -> int:  # applied, with all passes on
        return self.prelude + self.core * self.loops + self.coda

def require(holds: object, name: object, expected: str, found: object, mend: str = "") -> None:
    """Raises InputError "name: expected ..., found ...; mend" unless `holds`."""
    if not holds:
        raise InputError(f"{name}: expected {expected}, found {found}" + (f"; {mend}" if mend else ""))

def parse_layout(text: str) -> Layout:
    """Reads "9", "5x3", "3+3x3+5", "3+3x3" or "3x3+5"; raises InputError."""
    match, found = re.fullmatch(r"(?:(\d+)\+)?(\d+)x(\d+)(?:\+(\d+))?|(\d+)", text), f'"{text}"'
    require(match, "LAYOUT", 'P+CxR+D such as "3+3x3+5", "5x3" or "9"', found)
    p, c, r, d, plain = (int(part or 0) for part in match.groups())
    layout = Layout(0, plain, 1, 0) if match.group(5) else Layout(p, c, r, d)
    require(layout.core and layout.loops, "LAYOUT", "at least one core block and one pass", found)
    require(layout.depth <= 1000, "LAYOUT", "at most 1000 applied blocks", found)
    return layout

def parse_loop_schedule(text: str, loops: int) -> list[tuple[float, int]]:
    """Reads "0:1,0.35:3" as [(0.0, 1), (0.35, 3)]: from this fraction of training on, so many passes."""
    name, found = "LOOP_SCHEDULE", f'"{text}"'
    try:
        schedule = [(float(at), int(n)) for at, n in (entry.split(":") for entry in (text or f"0:{loops}").split(","))]
    except ValueError:
        schedule = []
    require(schedule, name, 'fraction:passes,... such as "0:1,0.35:3"', found)
    (start, fewest), (end, most) = schedule[0], schedule[-1]
    require(start == 0, name, "a start at 0", found, 'begin with "0:1"')
    rising = all(a < b and m < n for (a, m), (b, n) in zip(schedule, schedule[1:]))
    require(rising, name, "fractions and passes that increase", found)
    require(end < 1 and fewest >= 1, name, "fractions below 1 and at least one pass", found)
    found += ", which never reaches them" if most < loops else ", which exceeds them"
    mend = f'end it with ":{loops}", or set LOOP_SCHEDULE= for all passes throughout'
    require(most == loops, name, f"an end at the {loops} passes of LAYOUT", found, mend)
    return schedule

def parse_value(name: str, text: str, kind: str, where: str) -> object:
    """Turns the text of one setting into the type of its field (`kind`: str, int, float or bool); raises InputError."""
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    try:
        value = words[text.lower()] if kind == "bool" else {"str": str, "int": int, "float": float}[kind](text)
        if kind != "float" or math.isfinite(value):
            return value
    except (ValueError, KeyError):
        pass
    expected = {"bool": "0 or 1", "int": "a whole number", "float": "a number"}[kind]
    raise InputError(f'{name.upper()} ({where}): expected {expected}, found "{text}"')

def load_config(argv: list[str], environ: dict[str, str], default_preset: str) -> tuple[Config, list[str]]:
    """Command line over environment over preset over default. Returns the checked Config and notices for the log."""
    kinds = {field.name: str(field.type) for field in dataclasses.fields(Config)}
    values, notices = {}, []
    for name, text in environ.items():
        if name.isupper() and name.lower() in kinds:
            values[name.lower()] = parse_value(name, text, kinds[name.lower()], "environment")
        elif name in REPLACED:
            notices.append(f"notice: {name}={text} in the environment has no effect here; write {REPLACED[name]}")
        elif near := difflib.get_close_matches(name, [kind.upper() for kind in kinds], n=1, cutoff=0.88):
            notices.append(f"notice: {name} in the environment is not a setting; did you mean {near[0]}?")
    for argument in argv:
        flag, _, text = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_").lower()
        near = difflib.get_close_matches(name, kinds, n=1)
        hint = f"did you mean --{near[0]}=...?" if near else "see --help"
        hint = f"write {REPLACED[name.upper()]}" if name.upper() in REPLACED else hint
        require(flag.startswith("--") and name in kinds, argument, "a setting", "an unknown flag", hint)
        require("=" in argument or kinds[name] == "bool", flag, "a value", "none", f"write {flag}=...")
        values[name] = parse_value(name, text if "=" in argument else "1", kinds[name], "flag")
    preset = values.get("preset") or default_preset
    near = difflib.get_close_matches(preset, PRESETS, n=1, cutoff=0.0)
    require(preset in PRESETS, "PRESET", f"one of {', '.join(PRESETS)}", f'"{preset}"', f"did you mean {near[0]}?")
    c = Config(**PRESETS[preset] | values | {"preset": preset})
    check_config(c)
    return c, notices

def check_config(c: Config) -> None:
    for name, allowed in CHOICES.items():
        shown = ", ".join(str(value) for value in allowed if value != "")
        require(getattr(c, name) in allowed, name.upper(), f"one of {shown}", f'"{getattr(c, name)}"')
    above_zero = """vocab_size model_dim num_heads num_kv_heads mlp_mult train_seq_len bytes_cap train_batch_tokens
        muon_ns_steps rope_base adam_eps tied_embed_init_std logit_softcap""".split()
    for field in dataclasses.fields(c):
        name, value = field.name, getattr(c, field.name)
        if field.type in ("int", "float") and name != "loop_gate_init":
            require(value > 0 or name not in above_zero, name.upper(), "a number above 0", value)
            require(0 <= value <= 1e38, name.upper(), "0 or more, and at most 1e38", value)
    require(c.vocab_size <= 65536, "VOCAB_SIZE", "at most 65536 (shards hold 16-bit ids)", c.vocab_size)
    limits = {"train_seq_len": 2**20, "logit_softcap": 60, "seed": 2**32 - 1, "beta1": 0.9999, "beta2": 0.9999}
    for name, limit in limits.items():
        require(getattr(c, name) <= limit, name.upper(), f"at most {limit}", getattr(c, name))
    for name in ("warmdown_frac", "muon_momentum", "muon_momentum_warmup_start"):
        require(getattr(c, name) <= 1, name.upper(), "a number from 0 to 1", getattr(c, name))
    layout, length, batch = parse_layout(c.layout), c.train_seq_len, c.train_batch_tokens
    parse_loop_schedule(c.loop_schedule, layout.loops)
    fits = [h for h in range(1, min(c.model_dim, 65536) + 1) if c.model_dim % (2 * h) == 0]
    near, dim = min(fits, key=lambda h: abs(h - c.num_heads), default="an even MODEL_DIM"), c.model_dim
    require(c.num_heads in fits, "NUM_HEADS", f"heads of an even width in MODEL_DIM={dim}", c.num_heads, f"try {near}")
    heads, kv_heads, stride = c.num_heads, c.num_kv_heads, c.eval_stride
    require(heads % kv_heads == 0, "NUM_KV_HEADS", f"a divisor of NUM_HEADS={heads}", kv_heads)
    multiple, near = f"a multiple of TRAIN_SEQ_LEN={length}", max(batch // length, 1) * length
    require(batch % length == 0, "TRAIN_BATCH_TOKENS", multiple, batch, f"try {near}")
    require(length % (stride or 1) == 0, "EVAL_STRIDE", f"a divisor of TRAIN_SEQ_LEN={length}", stride)
    for name in ("microbatch_tokens", "val_max_tokens"):
        require(not 0 < getattr(c, name) < length, name.upper(), f"at least TRAIN_SEQ_LEN={length}", getattr(c, name))
    require(not c.lora_rank or layout.loops > 1, "LORA_RANK", f"0 with one pass (LAYOUT={c.layout})", c.lora_rank)
    trained = c.eval_loops <= layout.loops or c.skips in ("per_loop", "none")
    most = f"at most {layout.loops} passes with SKIPS={c.skips} (the shortcuts of more were never trained)"
    require(trained, "EVAL_LOOPS", most, c.eval_loops, "use SKIPS=per_loop or none")
    name = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", c.run_id or "x")
    require(name, "RUN_ID", 'letters, digits, ".", "_" and "-"', f'"{c.run_id}"')
    if c.mode == "train":
        budget = c.iterations or c.max_wallclock_seconds or c.max_train_flops
        require(budget, "ITERATIONS, MAX_WALLCLOCK_SECONDS, MAX_TRAIN_FLOPS", "one budget", "none", "set one")
        file, mend = c.artifact or c.checkpoint, "to start from weights set INIT_FROM"
        require(not file, "ARTIFACT, CHECKPOINT", "MODE=eval or MODE=sample", "MODE=train", mend)
        require(not c.resume or c.run_id, "RESUME=1", "the RUN_ID of the run to go on with", "none")
        require(not (c.resume and c.init_from), "RESUME=1", "no INIT_FROM (a resumed run has its weights)", c.init_from)
    else:
        given = bool(c.artifact) + bool(c.checkpoint)
        found = "both" if given == 2 else "neither"
        require(given == 1, f"MODE={c.mode}", "one of ARTIFACT=<file> and CHECKPOINT=<file>", found)

def config_sha256(c: Config) -> str:
    """Hash of the settings that decide what is trained; equal for the seeds of one configuration."""
    kept = {name: value for name, value in dataclasses.asdict(c).items() if name not in NOT_IN_CONFIG_HASH}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
# ======================================================================================================================
# DATA [shared]
# Shards are the challenge's: 256 int32 (magic, version, number of tokens, zeros), then uint16 tokens. The training
# stream is one endless sequence, the sorted shards end to end, over and over. A step of B tokens reads the B+1 tokens
# at its place in it; ranks and microbatches take shares of that. So world size and microbatch change no token.
# ======================================================================================================================
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
GET_DATA = "get data with `python data/fineweb.py` or `python data/offline.py` (no network needed)"

def open_shard(path: Path, vocab_size: int) -> np.ndarray:
    """Maps one shard as uint16 [tokens]; its header, size and edges are checked. Raises InputError."""
    head, repair = SHARD_HEADER_BYTES, "delete it and run the data tool again"
    require(path.is_file(), path, "a shard", "no file (a broken link?)", repair)
    size = path.stat().st_size
    require(size >= head, path, f"a shard with a header of {head} bytes", f"{size} bytes", repair)
    magic, version, tokens = (int(value) for value in np.fromfile(path, dtype="<i4", count=3))
    known, right = f"magic {SHARD_MAGIC} version {SHARD_VERSION}", head + 2 * tokens
    is_shard = (magic, version) == (SHARD_MAGIC, SHARD_VERSION)
    require(is_shard, path, known, f"{magic} version {version}", GET_DATA)
    require(tokens > 0, path, "tokens", "an empty shard", repair)
    require(size == right, path, f"{right} bytes for {tokens} tokens", f"{size} (half copied?)", repair)
    shard = np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(tokens,))
    check_ids(np.concatenate((shard[:65536], shard[-65536:])), vocab_size, path)
    return shard

def check_ids(ids: np.ndarray, vocab_size: int, where: object) -> None:
    known, top = f"token ids below VOCAB_SIZE={vocab_size}", int(ids.max())
    require(top < vocab_size, where, known, top, "another tokenizer made this shard")

def find_shards(data_path: str, split: str, vocab_size: int) -> list[Path]:
    """The sorted shards of a split ("train" or "val"), each opened and checked. Raises InputError."""
    paths = sorted(Path(data_path).glob(f"fineweb_{split}_*.bin"))
    require(paths, data_path, f"fineweb_{split}_*.bin", "none", f"set DATA_PATH, or {GET_DATA}")
    for path in paths:
        open_shard(path, vocab_size)
    return paths

class TokenStream:
    """The endless sequence of training tokens. `read(start, count)` returns int64 [count] from token `start` on."""
    def __init__(self, paths: list[Path], vocab_size: int):
        self.paths, self.vocab_size = paths, vocab_size
        self.shards = [open_shard(path, vocab_size) for path in paths]
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])
        self.total = int(self.starts[-1])
    def read(self, start: int, count: int) -> np.ndarray:
        parts = []
        while count > 0:
            at = start % self.total
            index = int(np.searchsorted(self.starts, at, side="right")) - 1
            part = self.shards[index][at - int(self.starts[index]) :][:count]
            check_ids(part, self.vocab_size, self.paths[index])
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts).astype(np.int64)
    def microbatches(self, step_start: int, c: Config, rank: int, world: int, largest: int):
        """Yields (inputs, targets), int64 [sequences, train_seq_len], of this rank's share of the step at token
        `step_start`, in microbatches of at most `largest` tokens whose sizes differ by at most one sequence."""
        length = c.train_seq_len
        low, high = split_evenly(c.train_batch_tokens // length, world)[rank]
        for a, b in microbatch_bounds(high - low, length, largest):
            tokens = self.read(step_start + (low + a) * length, (b - a) * length + 1)
            yield tokens[:-1].reshape(b - a, length), tokens[1:].reshape(b - a, length)

def split_evenly(count: int, parts: int) -> list[tuple[int, int]]:
    """Bounds of `parts` contiguous shares of range(count) whose sizes differ by at most one."""
    return [(count * i // parts, count * (i + 1) // parts) for i in range(parts)]
def microbatch_bounds(sequences: int, length: int, largest: int) -> list[tuple[int, int]]:
    """Bounds of the microbatches, in sequences, of a share of `sequences`; each has at most `largest` tokens."""
    return split_evenly(sequences, -(-sequences // max(1, largest // length)))

def load_validation(c: Config) -> tuple[np.ndarray, bool]:
    """Validation tokens, uint16 [n * train_seq_len + 1], and whether VAL_MAX_TOKENS left some out."""
    paths, length = find_shards(c.data_path, "val", c.vocab_size), c.train_seq_len
    shards = [open_shard(path, c.vocab_size) for path in paths]
    for path, shard in zip(paths, shards):
        check_ids(shard, c.vocab_size, path)
    tokens = np.concatenate(shards)
    usable = (len(tokens) - 1) // length * length
    require(usable, c.data_path, f"a validation set longer than TRAIN_SEQ_LEN={length}", f"{len(tokens)} tokens",
            "lower TRAIN_SEQ_LEN")  # fmt: skip
    kept = min(usable, c.val_max_tokens // length * length or usable)
    return tokens[: kept + 1], kept < usable

def dataset_sha256(c: Config) -> str:
    """Hash of the names, sizes and first MiB of every shard and of the tokenizer: tells datasets apart in a second."""
    digest = hashlib.sha256(Path(c.tokenizer_path).read_bytes())
    for split in ("train", "val"):
        for path in sorted(Path(c.data_path).glob(f"fineweb_{split}_*.bin")):
            with open(path, "rb") as file:
                digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(1 << 20))
    return digest.hexdigest()

def make_smoke_data(c: Config) -> None:
    """Writes about 1 MB of made-up English and a tokenizer for it, so that the smoke preset needs nothing."""
    if Path(c.tokenizer_path).exists() and list(Path(c.data_path).glob("fineweb_train_*.bin")):
        return
    rng = np.random.RandomState(0)
    words = """the a small deep shared early late quiet plain long identical loop block gate depth pass core stack
        token layer curve model prelude coda weight feeds scales mixes repeats trains shortens follows opens
        measures""".split()
    order = {word: rng.choice(words, 4) for word in words}  # each word has four that may follow
    def sentence() -> str:
        n, said = int(rng.randint(2, 60)), [words[rng.randint(len(words))]]
        while len(said) < 4 + n % 6:
            said.append(str(order[said[-1]][rng.randint(4)]))
        return f"{n} plus {n} is {2 * n}." if n % 3 == 0 else " ".join(said).capitalize() + "."
    documents = [" ".join(sentence() for _ in range(rng.randint(4, 30))) for _ in range(2000)]
    prefix = f"{c.tokenizer_path}.{os.getpid()}"
    try:
        for folder in (Path(c.data_path), Path(c.tokenizer_path).parent):
            folder.mkdir(parents=True, exist_ok=True)
        spm.SentencePieceTrainer.train(sentence_iterator=iter(documents), model_prefix=prefix, vocab_size=c.vocab_size,
                                       model_type="bpe", byte_fallback=True, num_threads=1, minloglevel=2)  # fmt: skip
    except RuntimeError:
        require(False, "VOCAB_SIZE", "a few hundred pieces for the smoke text", c.vocab_size)
    except OSError as error:
        require(False, folder, "a folder to write to", error.strerror, "set DATA_PATH and TOKENIZER_PATH")
    os.replace(f"{prefix}.model", c.tokenizer_path)
    os.remove(f"{prefix}.vocab")
    tokenizer = spm.SentencePieceProcessor(model_file=c.tokenizer_path)
    for split, texts in (("val", documents[:100]), ("train", documents[100:])):
        ids = np.array([i for text in texts for i in [tokenizer.bos_id(), *tokenizer.encode(text)]], dtype="<u2")
        header = struct.pack("<3i", SHARD_MAGIC, SHARD_VERSION, len(ids)).ljust(SHARD_HEADER_BYTES, b"\0")
        write_atomically(Path(c.data_path) / f"fineweb_{split}_000000.bin", header + ids.tobytes())

def write_atomically(path: Path, content: bytes) -> None:
    """Writes to a temporary name beside `path`, then renames: a reader sees the old file or the new one, never half."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
# ======================================================================================================================
# TOKENIZER BYTES [shared]
# Bits per byte needs the number of UTF-8 bytes that each token stands for, counted as the challenge counts: a piece
# without its leading-space marker, plus one byte for that space unless the token before is a control piece; a byte
# piece is one byte; control pieces are none. Per document the sum is the length of decode(ids).
# ======================================================================================================================
def load_tokenizer(path: str, vocab_size: int) -> spm.SentencePieceProcessor:
    require(Path(path).is_file(), path, "a SentencePiece model", "no file", f"set TOKENIZER_PATH, or {GET_DATA}")
    try:
        tokenizer = spm.SentencePieceProcessor(model_file=path)
        size = int(tokenizer.vocab_size())
    except (RuntimeError, OSError, ValueError, TypeError):
        raise InputError(f"{path}: expected a SentencePiece model, found something else; set TOKENIZER_PATH") from None
    mend = f"set VOCAB_SIZE={size} with the shards that it made, or the right TOKENIZER_PATH"
    require(size == vocab_size, path, f"a tokenizer of VOCAB_SIZE={vocab_size} pieces", size, mend)
    return tokenizer

def byte_tables(tokenizer: spm.SentencePieceProcessor, vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per piece: bytes without leading space (int64), whether it has a leading space, whether it is a control piece."""
    size = np.zeros(vocab_size, dtype=np.int64)
    space, control = np.zeros(vocab_size, dtype=bool), np.ones(vocab_size, dtype=bool)
    for i in range(min(vocab_size, tokenizer.vocab_size())):
        control[i] = tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i)
        if not control[i]:
            piece, is_byte = tokenizer.id_to_piece(i), tokenizer.is_byte(i)
            space[i] = piece.startswith("\u2581") and not is_byte
            size[i] = 1 if is_byte else len(piece[int(space[i]) :].encode("utf-8"))
    return size, space, control

def count_bytes(tokens: np.ndarray, tables: tuple[np.ndarray, np.ndarray, np.ndarray]) -> int:
    """Bytes that tokens[1:] stand for, each given the token before it."""
    (size, space, control), before, targets = tables, tokens[:-1], tokens[1:]
    return int(size[targets].sum() + (space[targets] & ~control[before]).sum())
# ======================================================================================================================
# SCHEDULES [shared]
# What happens when, as functions of progress, the fraction of training done. And the plan of the model: which block
# runs after which, which shortcut connects which, which parameters there are, and what a step costs.
# ======================================================================================================================
def progress_of(c: Config, step: int, seconds: float, flops: float) -> float:
    """Fraction of training done, from 0 to 1: the largest over the budgets that are set."""
    budgets = ((step, c.iterations), (seconds, c.max_wallclock_seconds), (flops, c.max_train_flops))
    return min(1.0, max(used / cap for used, cap in budgets if cap))
def loops_at(c: Config, progress: float) -> int:
    return [n for at, n in parse_loop_schedule(c.loop_schedule, parse_layout(c.layout).loops) if at <= progress][-1]
def lr_mul_at(c: Config, progress: float) -> float:
    """Factor on every learning rate: 1, then down to 0 over the last warmdown_frac of training."""
    return 1.0 if c.warmdown_frac == 0 else min(1.0, (1.0 - progress) / c.warmdown_frac)
def momentum_at(c: Config, step: int) -> float:
    """Muon's momentum: rises over the first steps, as in the official script."""
    part = min(step / c.muon_momentum_warmup_steps, 1.0) if c.muon_momentum_warmup_steps else 1.0
    return (1 - part) * c.muon_momentum_warmup_start + part * c.muon_momentum

class Visit(NamedTuple):
    """One application of a block. Visits are numbered from 0 to the virtual depth."""
    block: int  # index into the stored blocks
    loop: int  # pass, from 0; -1 outside the core
    opens: bool  # first block of a pass
    closes: bool  # last block of a pass
    skip_from: int  # visit whose output is added before this one, or -1
    skip_row: int  # row of skip_weights that scales it
    saves: bool  # whether a later visit adds this one's output

def block_order(layout: Layout, loops: int) -> list[tuple[int, int]]:
    """(block, pass) of every visit; pass -1 outside the core."""
    p, c, _, d = layout
    core = [(p + i, loop) for loop in range(loops) for i in range(c)]
    return [(i, -1) for i in range(p)] + core + [(p + c + i, -1) for i in range(d)]

def skip_pairs(layout: Layout, skips: str, loops: int) -> list[tuple[int, int, tuple]]:
    """(source visit, target visit, key) of every shortcut with `loops` passes on. A key is a row of skip_weights: it
    names the blocks, so that a pass that is switched on leaves every trained row between the blocks it was trained on.
    `official` is the published rule, whose key is the order of popping (and which does move them)."""
    order = block_order(layout, loops)
    n, (p, c, _, d) = len(order), layout
    if skips == "per_loop":
        pairs = [(i, n - 1 - i) for i in range(min(p, d))]
        pairs += [(p + a * c + i, p + a * c + c - 1 - i) for a in range(loops) for i in range(c // 2)]
        return [(s, t, (order[s][0], 0, order[t][0])) for s, t in pairs]
    if skips == "unrolled":
        return [(s, n - 1 - s, (order[s][0], max(order[s][1], 0), order[n - 1 - s][0])) for s in range(n // 2)]
    if skips == "official":
        return [(n // 2 - 1 - k, n // 2 + k, ("pop", k, 0)) for k in range(n // 2)]
    return []

def skip_rows(layout: Layout, skips: str) -> dict[tuple, int]:
    """Row of skip_weights for every key that any number of passes uses."""
    keys = [key for loops in range(1, layout.loops + 1) for _, _, key in skip_pairs(layout, skips, loops)]
    return {key: row for row, key in enumerate(dict.fromkeys(keys))}

def visits(layout: Layout, skips: str, loops: int) -> list[Visit]:
    """The whole forward pass with `loops` passes, in order."""
    rows, pairs = skip_rows(layout, skips), skip_pairs(layout, skips, loops)
    source, saved = {t: (s, rows[key]) for s, t, key in pairs}, {s for s, _, _ in pairs}
    found = []
    for number, (block, loop) in enumerate(block_order(layout, loops)):
        opens, closes = (loop >= 0 and block == layout.prelude + i for i in (0, layout.core - 1))
        found.append(Visit(block, loop, opens, closes, *source.get(number, (-1, -1)), number in saved))
    return found

def linear_shapes(c: Config) -> dict[str, tuple[int, int]]:
    """[out, in] of the matrices of one block."""
    dim, kv_dim, hidden = c.model_dim, c.model_dim // c.num_heads * c.num_kv_heads, c.mlp_mult * c.model_dim
    return {"attn.q": (dim, dim), "attn.k": (kv_dim, dim), "attn.v": (kv_dim, dim), "attn.proj": (dim, dim),
            "mlp.fc": (hidden, dim), "mlp.proj": (dim, hidden)}  # fmt: skip

def param_shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the order in which they are drawn; with one pass none is per pass."""
    layout, dim = parse_layout(c.layout), c.model_dim
    shapes = {"tok_emb.weight": (c.vocab_size, dim)}
    for i in range(layout.blocks):
        shapes |= {f"blocks.{i}.{name}.weight": shape for name, shape in linear_shapes(c).items()}
        shapes |= {f"blocks.{i}.attn.q_gain": (c.num_heads,), f"blocks.{i}.attn_scale": (dim,),
                   f"blocks.{i}.mlp_scale": (dim,), f"blocks.{i}.resid_mix": (2, dim)}  # fmt: skip
    if rows := skip_rows(layout, c.skips):
        shapes["skip_weights"] = (len(rows), dim)
    if layout.loops > 1:
        shapes["loop_embed"] = (layout.loops, dim)
        if c.loop_gate != "none":
            shapes["loop_gate"] = (layout.loops,)
        for i in range(layout.prelude, layout.prelude + layout.core) if c.lora_rank else ():
            for name, (out, inp) in linear_shapes(c).items():
                shapes[f"blocks.{i}.{name}.lora_a"] = (layout.loops, c.lora_rank, inp)
                shapes[f"blocks.{i}.{name}.lora_b"] = (layout.loops, out, c.lora_rank)
    return shapes

PARAM_GROUPS = {
    "embed": r"tok_emb\.weight",
    "scalar": r"blocks\.\d+\.(attn\.q_gain|attn_scale|mlp_scale|resid_mix)|skip_weights|loop_embed|loop_gate",
    "lora": r"blocks\.\d+\.(attn\.(q|k|v|proj)|mlp\.(fc|proj))\.lora_[ab]",
    "matrix": r"blocks\.\d+\.(attn\.(q|k|v|proj)|mlp\.(fc|proj))\.weight",
}

def param_group(name: str) -> str:
    """The one optimizer group of a parameter; a parameter of no group, or of two, would not train as meant."""
    groups = [group for group, pattern in PARAM_GROUPS.items() if re.fullmatch(pattern, name)]
    if len(groups) != 1:
        raise ValueError(f"parameter {name}: expected in exactly one of PARAM_GROUPS, found in {groups or 'none'}")
    return groups[0]

def state_kinds(name: str) -> tuple[str, ...]:
    """What the optimizer keeps of a parameter."""
    return ("momentum",) if param_group(name) == "matrix" else ("exp_avg", "exp_avg_sq")

def initial_weights(c: Config) -> dict[str, np.ndarray]:
    """float32 start values from one generator: equal seeds give equal weights in both scripts, and equal block weights
    in every layout with the same blocks. Per-pass parameters start as the identity (but for a gate other than 1)."""
    rng, weights = np.random.RandomState(c.seed), {}
    for name, shape in param_shapes(c).items():
        leaf = name.rsplit(".", 1)[-1]
        if name == "tok_emb.weight":
            value = c.tied_embed_init_std * rng.standard_normal(shape)
        elif name.endswith("proj.weight") or leaf in ("lora_b", "loop_embed"):
            value = np.zeros(shape)
        elif leaf in ("weight", "lora_a"):
            value = rng.uniform(-1, 1, shape) / math.sqrt(shape[-1])
        elif leaf == "resid_mix":
            value = np.stack([np.ones(shape[1]), np.zeros(shape[1])])
        else:
            value = np.full(shape, {"q_gain": c.qk_gain_init, "loop_gate": c.loop_gate_init}.get(leaf, 1.0))
        weights[name] = value.astype(np.float32)
    return weights

def transfer_weights(c: Config, theirs: dict[str, np.ndarray], their_config: dict) -> dict[str, np.ndarray]:
    """Start values of `c`, with those of the same name from a model of another layout with the same blocks. Rows of
    skip_weights go to the shortcut between the same blocks; per-pass rows beyond theirs start as the identity."""
    weights, layout, their_layout = initial_weights(c), parse_layout(c.layout), parse_layout(their_config["layout"])
    blocks, their_blocks, rows = layout.blocks, their_layout.blocks, skip_rows(layout, c.skips)
    require(their_blocks == blocks, "INIT_FROM", f"the {blocks} blocks of LAYOUT={c.layout}", their_blocks)
    mend = "MODEL_DIM, NUM_HEADS, NUM_KV_HEADS, MLP_MULT and VOCAB_SIZE must be those of the file"
    for name, value in theirs.items():
        mine = weights.get(name)
        if name == "skip_weights":
            for key, row in skip_rows(their_layout, their_config["skips"]).items():
                if key in rows and value.shape[1] == c.model_dim:
                    mine[rows[key]] = value[row]
        elif name in ("loop_embed", "loop_gate") or ".lora_" in name:
            if mine is not None and mine.shape[1:] == value.shape[1:]:
                mine[: len(value)] = value[: len(mine)]
        else:
            shape = None if mine is None else mine.shape
            require(value.shape == shape, f"INIT_FROM: {name}", f"shape {shape}", value.shape, mend)
            mine[:] = value
    return weights

def count_params(c: Config) -> int:
    return sum(math.prod(shape) for shape in param_shapes(c).values())

def effective_params(c: Config) -> int:
    """Parameters counted once per application, with all passes on (LoRA and loop vectors have their own row a pass)."""
    layout, shapes = parse_layout(c.layout), param_shapes(c)
    per_block = sum(math.prod(shapes[name]) for name in shapes if re.match(r"blocks\.0\.(?!.*lora)", name))
    return count_params(c) + per_block * (layout.depth - layout.blocks)

def flops_per_token(c: Config, loops: int) -> float:
    """Floating-point operations of one forward pass per token: 2 per weight and application, 2*seq*dim per attention
    (its causal half), the output layer, LoRA. Training costs three times this; the optimizer is not counted."""
    layout, linears = parse_layout(c.layout), linear_shapes(c).values()
    applications = layout.prelude + layout.core * loops + layout.coda
    matrices = sum(out * inp for out, inp in linears)
    lora = c.lora_rank * sum(out + inp for out, inp in linears) * layout.core * loops
    return 2.0 * (applications * (matrices + c.train_seq_len * c.model_dim) + lora + c.vocab_size * c.model_dim)
# ======================================================================================================================
# MODEL
# The blocks are the official baseline's. The recurrence is the plain loop in `RecurrentGPT.hidden`. Activations have
# the compute dtype, parameters stay float32, and norms, losses and the soft cap compute in float32.
# Shapes: n sequences, t positions, h heads, d width of a head, k key/value heads.
# ======================================================================================================================
RMS_EPS = 2.0**-23

def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x.float(), (x.size(-1),), eps=RMS_EPS).to(x.dtype)

def rotary_tables(length: int, head_dim: int, base: float) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, float32 [length, head_dim / 2]."""
    angles = np.outer(np.arange(length), 1.0 / base ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (i, i + d/2) of [n, t, h, d] by minus the angle of their position, as the official script."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)

def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q [n, t, h, d] over k, v [n, t, k, d]; returns [n, t, h * d]."""
    n, t, h, d = q.shape
    groups = h // k.size(2)
    if q.device.type != "cpu":
        if q.device.type == "mps":  # its kernel knows no groups
            k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
        return y.transpose(1, 2).reshape(n, t, h * d)
    # The CPU kernel is slow backwards: two batched products per half of the positions, so that the first half never
    # looks at the keys of the second. The heads of a group lie one below the other, so that keys need no copies.
    q = q.view(n, t, h // groups, groups, d).permute(0, 2, 3, 1, 4)  # [n, k, groups, t, d]
    k, v = k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)  # [n, k, d, t], [n, k, t, d]
    out = []
    for low, high in [(0, t // 2), (t // 2, t)] if t >= 128 else [(0, t)]:
        rows = q[:, :, :, low:high].reshape(n, h // groups, groups * (high - low), d)
        scores = (rows @ k[..., :high]).float().view(n, h // groups, groups, high - low, high) * d**-0.5
        future = torch.ones(high - low, high, dtype=torch.bool, device=q.device).triu(low + 1)
        probs = scores.masked_fill(future, -math.inf).softmax(dim=-1).to(v.dtype)
        y = probs.view(n, h // groups, groups * (high - low), high) @ v[:, :, :high]
        out.append(y.view(n, h // groups, groups, high - low, d))
    return torch.cat(out, dim=3).permute(0, 3, 1, 2, 4).reshape(n, t, h * d)

class Linear(nn.Module):
    """y = W x, and in the core W x + B[pass] A[pass] x where LoRA is on (arXiv 2410.20672); W is [out, in]."""
    def __init__(self, out_dim: int, in_dim: int, passes: int = 0, rank: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
        self.has_lora = rank > 0
        if self.has_lora:
            self.lora_a = nn.Parameter(torch.empty(passes, rank, in_dim))
            self.lora_b = nn.Parameter(torch.empty(passes, out_dim, rank))
    def forward(self, x: Tensor, loop: int) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype))
        if self.has_lora:
            row = min(loop, self.lora_a.size(0) - 1)  # passes beyond the trained ones reuse the last
            y = y + F.linear(F.linear(x, self.lora_a[row].to(x.dtype)), self.lora_b[row].to(x.dtype))
        return y

class Attention(nn.Module):
    """Causal grouped-query attention; queries and keys are normed per head, turned, and queries scaled per head."""
    def __init__(self, c: Config, passes: int, rank: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_heads, c.num_kv_heads, c.model_dim // c.num_heads
        for name in ("q", "k", "v", "proj"):
            setattr(self, name, Linear(*linear_shapes(c)[f"attn.{name}"], passes, rank))
        self.q_gain = nn.Parameter(torch.empty(c.num_heads))
    def forward(self, x: Tensor, loop: int, rotary: tuple[Tensor, Tensor]) -> Tensor:
        q = self.q(x, loop).unflatten(-1, (self.heads, self.head_dim))
        k, v = (linear(x, loop).unflatten(-1, (self.kv_heads, self.head_dim)) for linear in (self.k, self.v))
        cos, sin = (table[: x.size(1), None].to(x.dtype) for table in rotary)
        q, k = rotate(rms_norm(q), cos, sin), rotate(rms_norm(k), cos, sin)
        return self.proj(attend(q * self.q_gain.to(x.dtype)[:, None], k, v), loop)

class MLP(nn.Module):
    """proj(relu(fc(x))^2)."""
    def __init__(self, c: Config, passes: int, rank: int):
        super().__init__()
        self.fc = Linear(*linear_shapes(c)["mlp.fc"], passes, rank)
        self.proj = Linear(*linear_shapes(c)["mlp.proj"], passes, rank)
    def forward(self, x: Tensor, loop: int) -> Tensor:
        return self.proj(torch.relu(self.fc(x, loop)).square(), loop)

class Block(nn.Module):
    """x = mix0*x + mix1*x0; x += attn_scale*attn(norm(x)); x += mlp_scale*mlp(norm(x))."""
    def __init__(self, c: Config, passes: int, rank: int):
        super().__init__()
        self.attn, self.mlp = Attention(c, passes, rank), MLP(c, passes, rank)
        self.attn_scale, self.mlp_scale = nn.Parameter(torch.empty(c.model_dim)), nn.Parameter(torch.empty(c.model_dim))
        self.resid_mix = nn.Parameter(torch.empty(2, c.model_dim))
    def forward(self, x: Tensor, x0: Tensor, loop: int, rotary: tuple[Tensor, Tensor]) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(rms_norm(x), loop, rotary)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(x), loop)

class RecurrentGPT(nn.Module):
    """Prelude blocks once, core blocks `loops` times, coda blocks once; input and output embedding are one."""
    def __init__(self, c: Config, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.layout, self.dtype = c, parse_layout(c.layout), dtype
        core = range(self.layout.prelude, self.layout.prelude + self.layout.core)
        shapes = param_shapes(c)
        self.tok_emb = Linear(*shapes["tok_emb.weight"])
        ranks = [c.lora_rank if i in core else 0 for i in range(self.layout.blocks)]
        self.blocks = nn.ModuleList([Block(c, self.layout.loops, rank) for rank in ranks])
        for name in shapes:
            if "." not in name:  # skip_weights, loop_embed, loop_gate
                setattr(self, name, nn.Parameter(torch.empty(shapes[name])))
        for name, table in zip(("cos", "sin"), rotary_tables(c.train_seq_len, c.model_dim // c.num_heads, c.rope_base)):
            self.register_buffer(name, torch.from_numpy(table), persistent=False)
    def hidden(self, ids: Tensor, loops: int) -> Tensor:
        """ids [n, t] -> normed activations [n, t, dim]."""
        x0 = x = rms_norm(F.embedding(ids, self.tok_emb.weight).to(self.dtype))
        looped, saved = self.layout.loops > 1, {}
        for number, visit in enumerate(visits(self.layout, self.config.skips, loops)):
            row = min(visit.loop, self.layout.loops - 1)  # passes beyond the trained ones reuse the last
            if visit.opens:
                x = x_in = x + self.loop_embed[row].to(x.dtype) if looped else x
            if visit.skip_from >= 0:
                x = x + self.skip_weights[visit.skip_row].to(x.dtype) * saved.pop(visit.skip_from)
            x = self.blocks[visit.block](x, x0, visit.loop, (self.cos, self.sin))
            if visit.saves:
                saved[number] = x
            if visit.closes and looped and self.config.loop_gate != "none":
                x = self.gate(x, x_in, x0, visit.loop, row)
        return rms_norm(x)
    def gate(self, x: Tensor, x_in: Tensor, x0: Tensor, loop: int, row: int) -> Tensor:
        """The identity at a gate of 1. `x0`: PR #319's, after every pass but the first; `gain`: x_in + g*(x - x_in)."""
        g = self.loop_gate[row]
        if self.config.loop_gate == "gain":
            return x + (g - 1).to(x.dtype) * (x - x_in)  # so that g = 1 rounds nothing
        return x if loop == 0 else g.to(x.dtype) * x + (1 - g).to(x.dtype) * x0
    def forward(self, ids: Tensor, loops: int) -> Tensor:
        """ids [n, t] -> soft-capped logits, float32 [n, t, vocab]."""
        logits = F.linear(self.hidden(ids, loops), self.tok_emb.weight.to(self.dtype)).float()
        return self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
    def token_losses(self, ids: Tensor, targets: Tensor, loops: int) -> Tensor:
        """Cross-entropy in nats, float32 [n, t]. The soft cap bounds the logits, so exp needs no maximum taken off."""
        logits = self(ids, loops)
        return logits.exp().sum(dim=-1).log() - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
# ======================================================================================================================
# OPTIMIZER
# Muon (momentum, then the nearest orthogonal matrix) for the block matrices, Adam for the rest. All parameters are
# views of one flat vector, and so are their gradients: one all-reduce, one norm, and matrices of one shape lie side by
# side, so that Newton-Schulz runs on all at once. A parameter that a loop count does not touch has a zero gradient.
# ======================================================================================================================
def newton_schulz(g: Tensor, steps: int) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly, of g [count, rows, columns], in g's dtype (Jordan et al., Muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    flip = g.size(1) > g.size(2)
    x = g.mT if flip else g
    x = x / (x.float().square().sum(dim=(1, 2), keepdim=True).sqrt() + 1e-7).to(x.dtype)
    for _ in range(steps):
        xx = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(xx, xx, xx, beta=b, alpha=c), x, beta=a)
    return x.mT if flip else x

class Optimizer:
    """Muon and Adam over the flat vector of a model's parameters. `state()` names every buffer by its parameter."""
    def __init__(self, model: RecurrentGPT, c: Config, rank: int = 0, world: int = 1):
        self.config, self.rank, self.world = c, rank, world
        params = dict(model.named_parameters())
        groups = {group: [name for name in params if param_group(name) == group] for group in PARAM_GROUPS}
        groups["matrix"].sort(key=lambda name: tuple(params[name].shape))  # stable: equal shapes side by side
        order = [name for group in groups.values() for name in group]
        ends = np.cumsum([params[name].numel() for name in order]).tolist()
        self.places = {name: (end - params[name].numel(), end, params[name].shape) for name, end in zip(order, ends)}
        self.weights = torch.cat([params[name].detach().flatten() for name in order])
        self.grads = torch.zeros_like(self.weights)
        for name, (low, high, shape) in self.places.items():
            params[name].data, params[name].grad = (x[low:high].view(shape) for x in (self.weights, self.grads))
        rates = {"embed": c.tied_embed_lr, "scalar": c.scalar_lr, "lora": c.lora_lr}
        self.adam_ranges = [(self.places[groups[group][0]][0], self.places[groups[group][-1]][1], rate)
                            for group, rate in rates.items() if groups[group]]  # fmt: skip
        self.adam_end, self.steps = self.adam_ranges[-1][1], 0
        self.exp_avg, self.exp_avg_sq = (torch.zeros_like(self.weights[: self.adam_end]) for _ in range(2))
        self.momentum = torch.zeros_like(self.weights[self.adam_end :])
        core = range(model.layout.prelude, model.layout.prelude + model.layout.core)
        looped = core if model.layout.loops > 1 else ()
        self.stacks = []  # (start, end, [count, rows, columns], learning rate of each matrix) of each shape
        for shape in dict.fromkeys(params[name].shape for name in groups["matrix"]):
            names = [name for name in groups["matrix"] if params[name].shape == shape]
            scale = [c.core_lr_scale if int(name.split(".")[1]) in looped else 1.0 for name in names]
            rate = c.matrix_lr * max(1.0, shape[0] / shape[1]) ** 0.5 * self.weights.new_tensor(scale).view(-1, 1, 1)
            self.stacks.append((self.places[names[0]][0], self.places[names[-1]][1], (len(names), *shape), rate))
    def buffers(self) -> dict[str, Tensor]:
        """Views of the optimizer's state, named by kind and parameter."""
        found, end = {}, self.adam_end
        for name, (low, high, shape) in self.places.items():
            if low < end:
                found[f"exp_avg.{name}"] = self.exp_avg[low:high].view(shape)
                found[f"exp_avg_sq.{name}"] = self.exp_avg_sq[low:high].view(shape)
            else:
                found[f"momentum.{name}"] = self.momentum[low - end : high - end].view(shape)
        return found
    def state(self) -> dict[str, np.ndarray]:
        """Copies of the state as float32 arrays, for a checkpoint of either script."""
        return {name: buffer.cpu().numpy().copy() for name, buffer in self.buffers().items()}
    def load_state(self, state: dict[str, np.ndarray], steps: int) -> None:
        """The opposite of `state()`; `steps` is the number of updates made (for Adam's bias correction)."""
        for name, buffer in self.buffers().items():
            buffer.copy_(torch.from_numpy(state[name]))
        self.steps = steps
    @torch.no_grad()
    def update(self, lr_mul: float, momentum: float, compute_dtype: torch.dtype) -> Tensor:
        """One step from the gradients in `grads`, which it zeroes; returns their norm before clipping, a scalar."""
        c, w, g = self.config, self.weights, self.grads
        self.steps += 1
        norm = torch.linalg.vector_norm(g)
        if c.grad_clip_norm:
            g.mul_((c.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0))
        ga = g[: self.adam_end]
        self.exp_avg.lerp_(ga, 1 - c.beta1)
        self.exp_avg_sq.mul_(c.beta2).addcmul_(ga, ga, value=1 - c.beta2)
        root = (self.exp_avg_sq / (1 - c.beta2**self.steps)).sqrt_().add_(c.adam_eps)
        for low, high, rate in self.adam_ranges:
            step_size = rate * lr_mul / (1 - c.beta1**self.steps)
            w[low:high].addcdiv_(self.exp_avg[low:high], root[low:high], value=-step_size)
        gm = g[self.adam_end :]
        self.momentum.mul_(momentum).add_(gm)
        gm.add_(self.momentum, alpha=momentum)  # Nesterov
        for low, high, shape, rate in self.stacks:
            direction = self.orthogonal(g[low:high].view(shape).to(compute_dtype)).float()
            w[low:high].view(shape).sub_(direction * (rate * lr_mul))
        g.zero_()
        return norm
    def orthogonal(self, g: Tensor) -> Tensor:
        """Newton-Schulz of g [count, rows, columns]; with several processes each does its share of the matrices."""
        if self.world == 1:
            return newton_schulz(g, self.config.muon_ns_steps)
        share = -(-g.size(0) // self.world)
        padded = F.pad(g, (0, 0, 0, 0, 0, self.world * share - g.size(0)))
        mine, out = padded[self.rank * share : (self.rank + 1) * share], torch.empty_like(padded)
        dist.all_gather_into_tensor(out, newton_schulz(mine, self.config.muon_ns_steps).contiguous())
        return out[: g.size(0)]
# ======================================================================================================================
# DEVICE AND STEP
# Everything that touches the machine: which device, which processes, compilation, one training step, losses, logits.
# The rest of the script speaks to the `Engine` in NumPy arrays and plain numbers.
# ======================================================================================================================
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "RTX 4090": 165e12}  # dense bf16

class Engine:
    """A model and its optimizer on the devices of this machine; `rank` of `world` processes."""
    def __init__(self, c: Config):
        self.config, self.notices = c, []
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        names = [name for name, there in have.items() if there]
        kind = c.device or names[0]
        require(kind in names, "DEVICE", f"one of {', '.join(names)} on this machine", f'"{kind}"')
        self.device = torch.device("cuda", local) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            gpus = torch.cuda.device_count()
            require(local < gpus, "nproc_per_node", f"at most {gpus} processes, one a GPU", self.world)
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():  # gloo beside NCCL: control values need no GPU synchronisation
            dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
        self.device_name = torch.cuda.get_device_name(self.device) if kind == "cuda" else f"{kind} {cpu_name()}"
        self.peak_flops = next((v for k, v in PEAK_FLOPS.items() if kind == "cuda" and k in self.device_name), None)
        fast = kind != "cpu" or getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        self.dtype = getattr(torch, c.dtype or ("bfloat16" if fast else "float32"))
        self.largest = c.microbatch_tokens or (65536 if kind == "cuda" else 8192)
        self.runs_ahead = kind != "cpu"  # step() returns before the device has done it
        torch.use_deterministic_algorithms(c.deterministic)
        if c.deterministic and kind == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.set_float32_matmul_precision("high" if self.dtype == torch.bfloat16 else "highest")
        self.compiled = c.compile and self.can_compile()
        if kind == "cpu":
            keep_freed_memory()
    def can_compile(self) -> bool:
        """Whether torch.compile works here; tries it, since a compiler, its headers or Triton may be missing."""
        notice = "notice: not compiled on mps; COMPILE=0 says the same without this line"
        if self.device.type != "mps":
            torch._dynamo.config.cache_size_limit = torch._dynamo.config.recompile_limit = 64
            try:
                torch.compile(lambda x: (x + 1).sin())(torch.ones(64, device=self.device))
                return True
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
                notice = (f"notice: running without torch.compile, slower ({reason}); it needs a C++ compiler and "
                          "Python's headers: apt install g++ python3-dev")  # fmt: skip
        self.notices.append(notice)
        return False
    def build(self, weights: dict[str, np.ndarray], training: bool = True) -> None:
        """Puts a model of these weights on the device, with an optimizer where it is to be trained."""
        self.model = RecurrentGPT(self.config, self.dtype).to(self.device)
        self.optimizer = Optimizer(self.model, self.config, self.rank, self.world) if training else None
        self.model.requires_grad_(training)
        losses = self.model.token_losses
        self.losses = torch.compile(losses, dynamic=False) if self.compiled else losses
        self.set_weights(weights)
    def tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
    def step(self, stream: TokenStream, start: int, loops: int, lr_mul: float, momentum: float):
        """One optimizer step on the tokens from `start` on; returns loss and gradient norm, tensors on the device."""
        total = torch.zeros((), device=self.device)
        for ids, targets in stream.microbatches(start, self.config, self.rank, self.world, self.largest):
            loss = self.losses(self.tensor(ids), self.tensor(targets), loops).sum() / self.config.train_batch_tokens
            loss.backward()
            total += loss.detach()
        if self.world > 1:
            dist.all_reduce(self.optimizer.grads)
            dist.all_reduce(total)
        return total, self.optimizer.update(lr_mul, momentum, self.dtype)
    def warm_up(self, stream: TokenStream, loops: int) -> None:
        """Compiles and runs everything that a step with so many passes needs; leaves weights and state as they were."""
        o, steps = self.optimizer, self.optimizer.steps
        kept = [(tensor, tensor.clone()) for tensor in (o.weights, o.exp_avg, o.exp_avg_sq, o.momentum)]
        self.step(stream, 0, loops, 1.0, 0.0)
        for tensor, value in kept:
            tensor.copy_(value)
        o.steps = steps
        self.sync()
    def token_losses(self, ids: np.ndarray, targets: np.ndarray, loops: int) -> np.ndarray:
        """float32 [n, t]. While training this is the training graph (gradients on), so that nothing new is compiled."""
        return self.losses(self.tensor(ids), self.tensor(targets), loops).detach().cpu().numpy()
    @torch.no_grad()
    def next_logits(self, ids: np.ndarray, loops: int) -> np.ndarray:
        """Logits after the last of `ids`, float32 [vocab]."""
        return self.model(self.tensor(ids[None]), loops)[0, -1].cpu().numpy()
    def weights(self) -> dict[str, np.ndarray]:
        return {name: p.detach().cpu().numpy().copy() for name, p in self.model.named_parameters()}
    @torch.no_grad()
    def set_weights(self, weights: dict[str, np.ndarray]) -> None:
        for name, p in self.model.named_parameters():
            p.copy_(torch.from_numpy(weights[name]))
    def agree(self, seconds: float, stop: bool) -> tuple[float, bool]:
        """Rank 0's clock for everyone, and a stop that anyone asked for."""
        values = torch.tensor([seconds if self.rank == 0 else 0.0, float(stop)], dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values[0].item(), values[1].item() > 0
    def sum(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total)
        return total.item()
    def sync(self) -> None:
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).synchronize()
    def peak_memory(self) -> int:  # bytes
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else peak_process_memory()
    def close(self, code: int) -> None:
        """Ends a process that is one of several; alone it does nothing."""
        if self.world > 1:
            dist.barrier()  # a rank that leaves early makes gloo abort the others; and so do gloo's own destructors:
            sys.stdout.flush()
            os._exit(code)

def keep_freed_memory() -> None:
    """Tells glibc to keep large freed blocks: activations are freed every step and would be cleared page by page."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
# ======================================================================================================================
# ARTIFACT [shared]
# One file: magic, version, length of the header, header (JSON: model, passes trained, an entry a tensor), payload,
# SHA-256 of all before. Matrices are int6 per output row, embedding and LoRA int8 per row (EMBED_BITS=16: float16),
# vectors float16, a few numbers float32. Symbols are ANS-coded with the tensor's histogram. Reading runs no code.
# ======================================================================================================================
ARTIFACT_MAGIC, ARTIFACT_VERSION, ARTIFACT_HEAD = b"RGPT", 1, struct.Struct("<4sII")
LARGEST_SYMBOL, FLOATS = {"int6": 31, "int8": 127}, {"f16": "<f2", "f32": "<f4"}  # of each scheme

def scheme_of(c: Config, name: str, shape: tuple[int, ...]) -> str:
    group = param_group(name)
    if group == "scalar":
        return "f32" if math.prod(shape) <= 64 else "f16"
    return {"matrix": "int6", "lora": "int8", "embed": "int8" if c.embed_bits == 8 else "f16"}[group]

def quantize_rows(rows: np.ndarray, top: int, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """rows [n, m] -> symbols int16 [n, m] within +-top, scales float16 [n]; a weight is about symbol * scale. A row
    spans its largest weight, or `sigma` of its standard deviations."""
    span = sigma * rows.std(axis=1) if sigma else np.abs(rows).max(axis=1)
    scale = np.minimum(span / top, 65504).astype(np.float16)
    divisor = np.where(scale > 0, scale, np.inf).astype(np.float32)  # a row of zeros stays one
    symbols = np.rint(rows / divisor[:, None])
    return np.clip(symbols, -top, top).astype(np.int16), scale

def encode_symbols(symbols: np.ndarray, codec: str) -> bytes:
    """int16 symbols -> bytes: for `ans` lowest symbol, alphabet size, 16-bit frequencies, 32-bit words."""
    low = int(symbols.min())
    shifted, size = (symbols - low).ravel(), max(2, int(symbols.max()) - low + 1)
    head = struct.pack("<hH", low, size)
    if codec == "lzma":
        return head + lzma.compress(shifted.astype(np.uint8).tobytes(), preset=6)
    constriction, counts = need_constriction(), np.bincount(shifted, minlength=size)
    frequencies = np.clip(np.rint(counts / counts.sum() * 65535), 1, 65535).astype("<u2")
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(shifted.astype(np.int32), ans_model(constriction, frequencies))
    return head + frequencies.tobytes() + coder.get_compressed().astype("<u4").tobytes()

def decode_symbols(data: bytes, count: int, codec: str) -> np.ndarray:
    """The opposite of `encode_symbols`: int16 [count]. Raises ValueError on damage."""
    low, size = struct.unpack_from("<hH", data)
    if codec == "lzma":
        symbols = np.frombuffer(lzma.LZMADecompressor().decompress(data[4:], max_length=count + 1), dtype=np.uint8)
    else:
        constriction = need_constriction()
        frequencies = np.frombuffer(data, dtype="<u2", count=size, offset=4)
        words = np.frombuffer(data, dtype="<u4", offset=4 + 2 * size).astype(np.uint32)
        symbols = constriction.stream.stack.AnsCoder(words).decode(ans_model(constriction, frequencies), count)
    if len(symbols) != count:
        raise ValueError(f"{len(symbols)} symbols instead of {count}")
    return (symbols.astype(np.int32) + low).astype(np.int16)

def ans_model(constriction, frequencies: np.ndarray):
    """The coder's model of a histogram; sums and quotients of whole numbers, so equal on every platform."""
    if len(frequencies) < 2 or int(frequencies.min()) < 1:
        raise ValueError("a histogram without all its frequencies")
    wide = frequencies.astype(np.float64)
    return constriction.stream.model.Categorical(wide / wide.sum(), perfect=False)

def need_constriction():
    """The entropy coder, or an InputError that says how to get it."""
    there, mend = importlib.util.find_spec("constriction") is not None, "`pip install constriction`, or CODEC=lzma"
    require(there, "CODEC=ans", "the package constriction", "none", mend)
    import constriction

    return constriction

def write_artifact(path: Path, c: Config, loops: int, weights: dict[str, np.ndarray]) -> dict[str, float]:
    """Writes the artifact atomically. Returns its bytes, the coded bits a quantized weight (scales and histograms
    included) and the order-0 entropy of its symbols."""
    tensors, payload, offset = [], [], 0
    quantized = coded_bytes = entropy_bits = 0.0
    for name, shape in param_shapes(c).items():
        value, scheme = weights[name], scheme_of(c, name, shape)
        if scheme in FLOATS:
            data = np.clip(value, -65504, 65504).astype(FLOATS[scheme]).tobytes()
        else:
            rows, sigma = value.reshape(-1, shape[-1]), c.quant_sigma if scheme == "int6" else 0.0
            symbols, scales = quantize_rows(rows, LARGEST_SYMBOL[scheme], sigma)
            data = scales.astype("<f2").tobytes() + encode_symbols(symbols, c.codec)
            counts = np.unique(symbols, return_counts=True)[1]
            entropy_bits += float((counts * np.log2(counts.sum() / counts)).sum())
            quantized, coded_bytes = quantized + value.size, coded_bytes + len(data)
        tensors.append({"name": name, "shape": list(shape), "scheme": scheme, "offset": offset, "bytes": len(data)})
        payload.append(data)
        offset += len(data)
    header = {"model": {field: getattr(c, field) for field in MODEL_FIELDS}, "embed_bits": c.embed_bits,
              "loops": loops, "codec": c.codec, "tensors": tensors}  # fmt: skip
    head = json.dumps(header, separators=(",", ":")).encode()
    body = ARTIFACT_HEAD.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(head)) + head + b"".join(payload)
    write_atomically(path, body + hashlib.sha256(body).digest())
    return {"bytes_artifact": len(body) + 32, "bits_per_weight": 8 * coded_bytes / quantized,
            "entropy_bits_per_weight": entropy_bits / quantized}  # fmt: skip

def read_artifact(path: Path) -> tuple[dict, int, dict[str, np.ndarray]]:
    """Returns (model settings, passes trained, float32 weights). Raises InputError on anything unexpected."""
    data, mend = path.read_bytes(), "the file is damaged or not an artifact of this project"
    require(len(data) >= ARTIFACT_HEAD.size + 32, path, "an artifact", f"{len(data)} bytes", mend)
    magic, version, head_bytes = ARTIFACT_HEAD.unpack_from(data)
    require(magic == ARTIFACT_MAGIC, path, f"magic {ARTIFACT_MAGIC!r}", repr(magic), mend)
    require(version == ARTIFACT_VERSION, path, f"version {ARTIFACT_VERSION}", version, mend)
    whole = hashlib.sha256(data[:-32]).digest() == data[-32:]
    require(whole, path, "its SHA-256 at the end", "another (cut short or changed)", mend)
    payload = data[ARTIFACT_HEAD.size + head_bytes : -32]
    try:
        header = json.loads(data[ARTIFACT_HEAD.size : ARTIFACT_HEAD.size + head_bytes])
        c = model_config(Config(embed_bits=header["embed_bits"]), header["model"])
        loops, codec, entries, shapes = int(header["loops"]), header["codec"], header["tensors"], param_shapes(c)
        if count_params(c) > 64 * len(data):  # before anything of that size is made
            raise ValueError(f"{len(data)} bytes for {count_params(c)} parameters")
        if codec not in CHOICES["codec"] or not 1 <= loops <= parse_layout(c.layout).loops:
            raise ValueError(f"codec {codec}, {loops} passes")
        if [(e["name"], tuple(e["shape"])) for e in entries] != list(shapes.items()):
            raise ValueError("tensors that are not those of its model")
        weights, offset = {}, 0
        for e, (name, shape) in zip(entries, shapes.items()):
            part = payload[offset : offset + e["bytes"]]
            if e["offset"] != offset or e["bytes"] != len(part) or e["scheme"] != scheme_of(c, name, shape):
                raise ValueError(f"a wrong place or scheme for {name}")
            weights[name] = decode_tensor(part, e["scheme"], shape, codec)
            offset += e["bytes"]
        if offset != len(payload):
            raise ValueError(f"{len(payload) - offset} bytes too many")
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, struct.error,
            lzma.LZMAError) as error:  # fmt: skip
        raise InputError(f"{path}: unreadable ({str(error)[:120]}); {mend}") from None
    return header["model"], loops, weights

def decode_tensor(data: bytes, scheme: str, shape: tuple[int, ...], codec: str) -> np.ndarray:
    """One tensor of an artifact as float32. Raises ValueError on damage."""
    if scheme in FLOATS:
        return np.frombuffer(data, dtype=FLOATS[scheme]).astype(np.float32).reshape(shape)
    scales = np.frombuffer(data, dtype="<f2", count=math.prod(shape[:-1])).astype(np.float32)
    symbols = decode_symbols(data[scales.size * 2 :], math.prod(shape), codec)
    return (symbols.reshape(scales.size, -1) * scales[:, None]).reshape(shape)

def estimated_bytes(c: Config) -> int:
    """Bytes of the artifact for Gaussian weights: entropy of the symbols, scales, vectors and some for the header."""
    shapes = param_shapes(c)
    bits = 8.0 * 220 * len(shapes)  # header entry and histogram
    for name, shape in shapes.items():
        scheme, count = scheme_of(c, name, shape), math.prod(shape)
        if scheme in FLOATS:
            bits += count * (16 if scheme == "f16" else 32)
        else:
            sigma = c.quant_sigma if scheme == "int6" and c.quant_sigma else math.sqrt(2 * math.log(max(shape[-1], 3)))
            entropy = math.log2(LARGEST_SYMBOL[scheme] / sigma * math.sqrt(2 * math.pi * math.e))
            bits += count * max(0.5, entropy) + 16 * count / shape[-1]
    return int(bits / 8)

def model_config(c: Config, model: dict) -> Config:
    """`c` with the model settings of a file. Raises InputError if they are not those of a model."""
    fields = {name: model.get(name) for name in MODEL_FIELDS}
    for name, value in fields.items():
        kind = type(getattr(Config, name))
        if (type(value) is not kind and (kind, type(value)) != (float, int)) or value in (math.inf, -math.inf):
            raise InputError(f"{name}: expected a finite {kind.__name__}, found {value!r}")
    found = dataclasses.replace(c, **fields, train_batch_tokens=fields["train_seq_len"], loop_schedule="")
    check_config(found)
    return dataclasses.replace(found, train_batch_tokens=c.train_batch_tokens)

def save_tensors(path: Path, tensors: dict[str, np.ndarray], about: dict) -> None:
    """A safetensors file with a JSON note, written to a temporary name and renamed."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file(tensors, temporary, metadata={"recurrent_gpt": json.dumps(about)})
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)

def load_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """The opposite of `save_tensors`. Raises InputError."""
    data, expected = path.read_bytes(), "expected a checkpoint of this project, found a damaged or foreign file"
    try:
        head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(head["__metadata__"]["recurrent_gpt"])
        return parse_tensors(data), about | {"loops": int(about["loops"]), "model": dict(about["model"])}
    except (SafetensorError, ValueError, LookupError, TypeError, MemoryError, RecursionError) as error:
        raise InputError(f"{path}: {expected} ({str(error)[:80] or type(error).__name__})") from None

def load_model_file(path: str) -> tuple[dict[str, np.ndarray], dict, int]:
    """(weights, model settings, passes) of an artifact, a checkpoint or a model.safetensors. Raises InputError."""
    require(Path(path).is_file(), path, "an artifact or a checkpoint", "no file")
    with open(path, "rb") as file:
        is_artifact = file.read(4) == ARTIFACT_MAGIC or path.endswith(".rgpt")
    if is_artifact:
        model, loops, weights = read_artifact(Path(path))
        return weights, model, loops
    tensors, about = load_tensors(Path(path))
    weights = {name.removeprefix("weights."): value for name, value in tensors.items() if name.startswith("weights.")}
    try:
        c = model_config(Config(), about["model"])
        same = {name: value.shape for name, value in weights.items()} == param_shapes(c)
        require(same, "tensors", f"those of LAYOUT={c.layout}", "others")
        require(1 <= about["loops"] <= parse_layout(c.layout).loops, "loops", "passes of its layout", about["loops"])
    except InputError as error:
        raise InputError(f"{path}: {error}; the file is damaged") from None
    return weights, about["model"], about["loops"]
# ======================================================================================================================
# RUN LOG [shared]
# One folder a run: train.log (source, settings, versions, steps), metrics.jsonl (an object a logged step), result.json,
# checkpoint.safetensors, model.safetensors, model.int6.rgpt. Rank 0 writes; live progress goes to a terminal only.
# ======================================================================================================================
RESULT_KEYS = """run_id framework layout loops eval_loops eval_stride params_stored params_effective seed steps tokens
    train_flops train_time_ms eval_time_ms calib_time_ms tok_s peak_mem_bytes val_tokens val_loss_raw val_bpb_raw
    val_loss val_bpb bytes_code bytes_artifact bytes_total bytes_cap fits bits_per_weight entropy_bits_per_weight
    quantizer codec device world_size versions commit config_sha256 dataset dataset_sha256 complete""".split()

class RunLog:
    """The files of one run. Its folder is claimed here: a name in use is refused, unless the run is resumed."""
    def __init__(self, c: Config, rank: int):
        self.rank, self.bar = rank, None
        name = f"{time.strftime('%Y%m%d-%H%M%S')}_{c.preset}_{FRAMEWORK}_s{c.seed}"
        self.folder = Path(c.log_dir) / (c.run_id or name)
        self.checkpoint = self.folder / "checkpoint.safetensors"
        there, mend = self.checkpoint.is_file(), "set another RUN_ID, or delete the folder"
        require(there or not c.resume, self.checkpoint, "a checkpoint to go on from", "none", f"without RESUME {mend}")
        if rank:
            return
        try:
            home = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
            free, need = shutil.disk_usage(home).free, 16 * count_params(c) + (1 << 20)
            require(free > need, "LOG_DIR", f"{need} bytes free for checkpoints", f"{free}", "set another LOG_DIR")
            self.folder.mkdir(parents=True, exist_ok=c.resume)
            self.file = open(self.folder / "train.log", "a", encoding="utf-8")
        except FileExistsError:
            require(False, "RUN_ID", "a new name", self.folder, f"{mend}{', or RESUME=1 to go on' if there else ''}")
        except OSError as error:
            require(False, "LOG_DIR", "a folder to write to", f"{self.folder}: {error.strerror}", "set LOG_DIR")
        for leftover in self.folder.glob("*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink()
    def line(self, text: str, console: bool = True) -> None:
        """One line to train.log and, above any progress bar, to the console."""
        if self.rank == 0:
            self.file.write(text + "\n")
            self.file.flush()
            if console:
                tqdm.write(text)
    def metrics(self, **values: object) -> None:
        if self.rank == 0:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
    def forget_after(self, step: int) -> None:
        """Drops the metrics of steps that a resumed run will do again."""
        path = self.folder / "metrics.jsonl"
        if self.rank == 0 and path.exists():
            rows = [row for row in path.read_text().splitlines() if row.endswith("}")]  # a killed run leaves half a row
            write_atomically(path, "".join(row + "\n" for row in rows if json.loads(row)["step"] <= step).encode())
    def progress(self, part: float, text: str) -> None:
        if self.rank == 0:
            form = "{percentage:3.0f}% |{bar}| {postfix}"
            self.bar = self.bar or tqdm(total=100, disable=None, leave=False, bar_format=form)
            self.bar.n = round(100 * part, 1)
            self.bar.set_postfix_str(text)
    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

def versions() -> dict[str, str]:
    found = {d.metadata["Name"]: d.version for d in distributions()} | {"python": platform.python_version()}
    names = ("python", "torch", "mlx", "numpy", "sentencepiece", "safetensors", "constriction")
    return {name: found[name] for name in names if name in found}

def source_commit() -> str | None:
    """Commit of the repository that this script lies in, with "+" where tracked files differ from it."""
    ask, here = "git describe --always --abbrev=40 --dirty=+ --exclude=*".split(), Path(__file__).resolve().parent
    try:
        return subprocess.run(ask, cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None

def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text() if info.exists() else "")
    return f"{found.group(1) if found else platform.processor() or platform.machine()} ({os.cpu_count()} cores)"
def peak_process_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # bytes
# ======================================================================================================================
# TRAIN AND EVALUATE [shared]
# The loop reads the loss of a step only after it has launched the next, so that a GPU never waits for Python. The clock
# counts training alone: compilation comes before it, validation and checkpoints stop it.
# ======================================================================================================================
class StopSignal:
    """Turns SIGTERM and Ctrl-C into a flag that the loop reads between steps; a second one ends the process at once."""
    def __init__(self):
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)
    def note(self, number, frame) -> None:
        self.number = number
        signal.signal(number, signal.SIG_DFL)

class Score:
    """The validation tokens and what turns a loss on them into bits per byte."""
    def __init__(self, c: Config):
        self.tokens, self.partial = load_validation(c)
        tokenizer = load_tokenizer(c.tokenizer_path, c.vocab_size)
        self.bytes = count_bytes(self.tokens, byte_tables(tokenizer, c.vocab_size))
        self.label = f" partial:first_{len(self.tokens) - 1}_tokens" if self.partial else ""
    def bpb(self, loss: float) -> float:
        return loss * (len(self.tokens) - 1) / (math.log(2) * self.bytes)

def evaluate(c: Config, engine: Engine, tokens: np.ndarray, loops: int) -> float:
    """Mean cross-entropy in nats over tokens[1:]. With EVAL_STRIDE the windows overlap and every window but the first
    scores its last EVAL_STRIDE tokens only: each token is scored once, with more context."""
    length, stride, total = c.train_seq_len, c.eval_stride or c.train_seq_len, 0.0
    starts = np.arange(0, len(tokens) - length, stride)
    low, high = split_evenly(len(starts), engine.world)[engine.rank]  # may be none: then only the sum is taken part in
    rows = max(1, min(engine.largest, c.train_batch_tokens // engine.world) // length)  # as in training: no new shape
    for a in range(low, high, rows):
        batch = starts[np.minimum(np.arange(a, a + rows), high - 1)]  # filled up with the last window
        windows = tokens[batch[:, None] + np.arange(length + 1)].astype(np.int64)
        losses = engine.token_losses(windows[:, :-1], windows[:, 1:], loops).astype(np.float64)
        total += sum(row[0 if s == 0 else length - stride :].sum() for s, row in zip(batch[: high - a], losses))
    return engine.sum(total) / (len(tokens) - 1)

def check_before_start(c: Config) -> list[str]:
    """Checks what would otherwise fail late; returns notices. Raises InputError."""
    if c.codec == "ans":
        need_constriction()
    estimate, code = estimated_bytes(c), len(Path(__file__).read_bytes())
    cap, found = c.bytes_cap, f"{code} + about {estimate}"
    advice = "lower MODEL_DIM, MLP_MULT or the number of blocks, or raise QUANT_SIGMA"
    require(0.85 * estimate + code <= cap, "BYTES_CAP", f"code + artifact within {cap} bytes", found, advice)
    over = estimate + code > cap
    return [f"notice: the artifact may exceed the cap: {found} of {cap} bytes; {advice}"] if over else []

def train(c: Config, engine: Engine, notices: list[str]) -> int:
    """A whole run: checks, compilation, training, artifact, score from disk. Returns the exit code."""
    if c.preset == "smoke" and engine.rank == 0:
        make_smoke_data(c)
    engine.agree(0.0, False)  # the others wait for the data
    score = Score(c)
    stream = TokenStream(find_shards(c.data_path, "train", c.vocab_size), c.vocab_size)
    sequences, needed = c.train_batch_tokens // c.train_seq_len, f"a sequence for each of {engine.world} processes"
    require(sequences >= engine.world, "TRAIN_BATCH_TOKENS", needed, sequences)
    notices = [*notices, *engine.notices]
    state = {"step": 0, "tokens": 0, "flops": 0.0, "seconds": 0.0, "loops": 0, "scored": 0, "seed": c.seed,
             "data": dataset_sha256(c), "config_sha256": config_sha256(c)}  # fmt: skip
    weights = transfer_weights(c, *load_model_file(c.init_from)[:2]) if c.init_from else initial_weights(c)
    log = RunLog(c, engine.rank)
    if c.resume:
        weights, optimizer_state, state = load_checkpoint(c, log.checkpoint)
    engine.build(weights)
    if c.resume:
        engine.optimizer.load_state(optimizer_state, state["step"])
        log.forget_after(state["step"])
        log.line(f"resume: from step:{state['step']}; later steps above are of the interrupted run and are done again")
    write_head(c, engine, log, notices, score, stream)
    stop = StopSignal()
    for _, loops in parse_loop_schedule(c.loop_schedule, parse_layout(c.layout).loops):
        began = time.perf_counter()
        engine.warm_up(stream, loops)
        log.line(f"warm_up: loops:{loops} {time.perf_counter() - began:.1f}s")
    try:
        finished = train_loop(c, engine, log, stream, score, state, stop)
    except InputError as error:
        log.line(f"stopped: {error}", console=False)
        raise
    finally:
        log.close()
    if finished:
        return finish(c, engine, log, state, score)
    write_result(c, engine, log, state, score, {"complete": False})
    log.line(f"stopped by a signal after step {state['step']}; go on with RUN_ID={log.folder.name} RESUME=1")
    return 128 + (stop.number or signal.SIGTERM)

def train_loop(c: Config, engine: Engine, log: RunLog, stream: TokenStream, score: Score, state: dict,
               stop: StopSignal) -> bool:  # fmt: skip
    """Trains until a budget is used up (True) or a signal comes (False); keeps `state` current."""
    launched, logged, saved = None, (state["step"], state["seconds"]), state["step"]
    started = time.perf_counter() - state["seconds"]  # moved forward by whatever is not training
    batch, before = c.train_batch_tokens, state["seconds"]
    def read_launched() -> None:
        """Waits for the step launched last, checks it and logs it."""
        nonlocal launched, logged
        if launched is None:
            return
        (step, loops, flops, lr_mul, handles, seconds), launched = launched, None
        loss, norm = (handle.item() for handle in handles)
        require(math.isfinite(loss) and math.isfinite(norm), f"step {step}", "a finite loss and gradient norm",
                f"loss {loss} and norm {norm}", "lower MATRIX_LR and SCALAR_LR, or set GRAD_CLIP_NORM=1")  # fmt: skip
        seconds = time.perf_counter() - started if engine.runs_ahead else seconds
        at = progress_of(c, step, seconds, flops)
        ms, rate = 1000 * seconds, (step - logged[0]) * batch / max(seconds - logged[1], 1e-9)
        left = "{}m{:02d}s".format(*divmod(int(seconds * (1 - at) / max(at, 1e-9)), 60))
        log.progress(at, f"step {step} loss {loss:.4f} loops {loops} {rate:,.0f} tok/s, {left} left")
        if step <= 10 or (c.train_log_every and step % c.train_log_every == 0):
            peak = (engine.peak_flops or 0) * engine.world
            mfu = f" mfu:{rate * 3 * flops_per_token(c, loops) / peak:.3f}" if peak else ""
            log.line(f"step:{step}/{c.iterations} train_loss:{loss:.4f} loops:{loops} lr_mul:{lr_mul:.3f} grad_norm:"
                     f"{norm:.2f} train_time:{ms:.0f}ms step_avg:{ms / step:.2f}ms tok_s:{rate:.0f}{mfu} left:{left}")
            log.metrics(step=step, train_loss=loss, loops=loops, lr_mul=lr_mul, grad_norm=norm, train_time_ms=ms,
                        tokens=step * batch, flops=flops, tok_s=rate)  # fmt: skip
            logged = (step, seconds)
    while True:
        seconds, stopped = engine.agree(time.perf_counter() - started, bool(stop.number))
        step, average = state["step"], seconds / max(state["step"], 1)
        at = progress_of(c, step, seconds, state["flops"])
        loops = loops_at(c, at)
        step_flops = 3 * flops_per_token(c, loops) * batch
        pace, before = max(average, seconds - before), seconds  # a switch makes steps longer at once
        late = c.max_wallclock_seconds and seconds + pace * (1 + engine.runs_ahead) > c.max_wallclock_seconds
        done = at >= 1 or late or (c.max_train_flops and state["flops"] + step_flops > c.max_train_flops)
        ends = done or stopped
        switch = not ends and state["loops"] not in (0, loops)
        scores = not ends and c.val_loss_every and step % c.val_loss_every == 0 and step > state["scored"]
        saves = ends or (c.checkpoint_every and step % c.checkpoint_every == 0 and step > saved)
        if switch or scores or saves:
            read_launched()
            engine.sync()
            seconds, _ = engine.agree(time.perf_counter() - started, False)
            state["seconds"] = seconds
            if scores:
                state["scored"] = step
                write_score(c, log, state, score, evaluate(c, engine, score.tokens, state["loops"]), state["loops"])
            if saves and step and engine.rank == 0:
                save_checkpoint(c, engine, log.checkpoint, state)
                saved = step
            if switch:
                was = state["loops"]
                log.line(f"step:{step}/{c.iterations} loops:{was}->{loops} train_time:{1000 * seconds:.0f}ms")
            started, logged, before = time.perf_counter() - seconds, (step, seconds), seconds
        if ends:
            state["loops"] = state["loops"] or loops
            return bool(done)
        epoch = state["tokens"] // stream.total
        if step and epoch > (state["tokens"] - batch) // stream.total:
            log.line(f"step:{step}/{c.iterations} epoch:{epoch + 1} the {stream.total} training tokens are read again")
        lr_mul = lr_mul_at(c, at)
        handles = engine.step(stream, state["tokens"], loops, lr_mul, momentum_at(c, step))
        tokens, flops = state["tokens"] + batch, state["flops"] + step_flops
        state |= {"step": step + 1, "tokens": tokens, "flops": flops, "loops": loops}
        read_launched()
        launched = (step + 1, loops, flops, lr_mul, handles, time.perf_counter() - started)

def write_score(c: Config, log: RunLog, state: dict, score: Score, loss: float, loops: int) -> None:
    step, ms, bpb = state["step"], 1000 * state["seconds"], score.bpb(loss)
    log.line(f"step:{step}/{c.iterations} val_loss:{loss:.4f} val_bpb:{bpb:.4f} train_time:{ms:.0f}ms "
             f"step_avg:{ms / max(step, 1):.2f}ms loops:{loops}{score.label}")  # fmt: skip
    log.metrics(step=step, val_loss=loss, val_bpb=bpb, loops=loops, train_time_ms=ms, tokens=state["tokens"],
                flops=state["flops"], partial=score.partial)  # fmt: skip

def load_checkpoint(c: Config, path: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict]:
    """(weights, optimizer state, training state) for RESUME=1. Raises InputError if it is of another configuration."""
    weights, model, _ = load_model_file(str(path))
    mend = "resume with the run's own settings (its train.log states them), or use INIT_FROM in a new run"
    for name in MODEL_FIELDS:
        require(model[name] == getattr(c, name), path, f"{name.upper()}={getattr(c, name)}", model[name], mend)
    tensors, found = load_tensors(path)
    state = found["state"] if isinstance(found.get("state"), dict) else {}
    mine = {"config_sha256": config_sha256(c), "seed": c.seed, "data": dataset_sha256(c)}
    fields = {"step", "tokens", "flops", "seconds", "loops", "scored", "seed", "data", "config_sha256"}
    require(fields <= state.keys(), path, "a checkpoint with training state", "weights only", "use INIT_FROM")
    for name, value in mine.items():
        require(state[name] == value, path, f"the {name} that it was trained with", f"{state[name]}, not {value}", mend)
    kept = {name: value for name, value in tensors.items() if not name.startswith("weights.")}
    needed = {f"{kind}.{name}": shape for name, shape in param_shapes(c).items() for kind in state_kinds(name)}
    require({k: v.shape for k, v in kept.items()} == needed, path, "the optimizer state of its layout", "another", mend)
    return weights, kept, state

def about(c: Config, loops: int) -> dict:
    """What a file of weights says of itself."""
    model = {name: getattr(c, name) for name in MODEL_FIELDS}
    return {"model": model, "loops": loops}

def save_checkpoint(c: Config, engine: Engine, path: Path, state: dict) -> None:
    """Weights, optimizer state, place in the data and clock: enough to go on as if nothing had happened."""
    tensors = {f"weights.{name}": value for name, value in engine.weights().items()} | engine.optimizer.state()
    save_tensors(path, tensors, about(c, state["loops"]) | {"state": state})

def write_head(c: Config, engine: Engine, log: RunLog, notices: list[str], score: Score, stream: TokenStream) -> None:
    """The first lines of train.log: source, settings, versions, what will be trained on what."""
    layout, dtype, val_tokens = parse_layout(c.layout), str(engine.dtype).split(".")[-1], len(score.tokens) - 1
    log.line(Path(__file__).read_text(encoding="utf-8") + "\n" + "=" * 120, console=False)
    log.line("config: " + json.dumps(dataclasses.asdict(c)), console=False)
    log.line(f"""\
run: {log.folder}  script: {FRAMEWORK}  preset: {c.preset}  commit: {source_commit()}
versions: {json.dumps(versions())}
device: {engine.device_name}  processes: {engine.world}  dtype: {dtype}  compiled: {engine.compiled}
data: {c.data_path}  train tokens: {stream.total} in {len(stream.paths)} shards  val tokens: {val_tokens}  \
val bytes: {score.bytes}{score.label}
model: {c.layout} ({layout.blocks} blocks, {layout.depth} applied)  parameters: {count_params(c)} stored, \
{effective_params(c)} applied  loops: {c.loop_schedule or layout.loops}  skips: {c.skips}""")
    for notice in notices:
        log.line(notice)

def write_result(c: Config, engine: Engine, log: RunLog, state: dict, score: Score, more: dict) -> dict:
    """result.json: always the same keys, null where something does not apply."""
    clip = f"{c.quant_sigma} sigma" if c.quant_sigma else "absmax"
    result = dict.fromkeys(RESULT_KEYS) | {
        "run_id": log.folder.name, "framework": FRAMEWORK, "layout": c.layout, "loops": state["loops"], "seed": c.seed,
        "eval_loops": c.eval_loops or state["loops"], "eval_stride": c.eval_stride or c.train_seq_len, "codec": c.codec,
        "params_stored": count_params(c), "params_effective": effective_params(c), "steps": state["step"],
        "tokens": state["tokens"], "train_flops": state["flops"], "train_time_ms": round(1000 * state["seconds"]),
        "tok_s": round(state["tokens"] / max(state["seconds"], 1e-9)), "peak_mem_bytes": engine.peak_memory(),
        "val_tokens": len(score.tokens) - 1, "bytes_cap": c.bytes_cap, "commit": source_commit(),
        "quantizer": f"int6 rows, {clip}; embedding {c.embed_bits} bits", "device": engine.device_name,
        "world_size": engine.world, "versions": versions(), "config_sha256": config_sha256(c),
        "dataset": Path(c.data_path).name, "dataset_sha256": dataset_sha256(c), **more}  # fmt: skip
    assert list(result) == RESULT_KEYS
    if engine.rank == 0:
        write_atomically(log.folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    return result

def finish(c: Config, engine: Engine, log: RunLog, state: dict, score: Score) -> int:
    """Scores the weights, writes the artifact, reads it back from disk, scores that, and closes the log."""
    loops, path, sizes = c.eval_loops or state["loops"], log.folder / "model.int6.rgpt", {}
    raw = evaluate(c, engine, score.tokens, loops)
    write_score(c, log, state, score, raw, loops)
    if engine.rank == 0:
        weights = engine.weights()
        named = {f"weights.{name}": value for name, value in weights.items()}
        save_tensors(log.folder / "model.safetensors", named, about(c, state["loops"]))
        sizes = write_artifact(path, c, state["loops"], weights)
    engine.agree(0.0, False)  # the others wait for the file
    began = time.perf_counter()
    engine.set_weights(read_artifact(path)[2])
    loss = evaluate(c, engine, score.tokens, loops)
    ms, bpb = round(1000 * (time.perf_counter() - began)), score.bpb(loss)
    log.line(f"final_int6_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{ms}ms{score.label}")
    log.line(f"final_int6_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
    if engine.rank:
        return 0
    code, artifact = len(Path(__file__).read_bytes()), sizes["bytes_artifact"]
    total = code + artifact
    r = write_result(c, engine, log, state, score, sizes | {
        "eval_time_ms": ms, "val_loss_raw": raw, "val_bpb_raw": score.bpb(raw), "val_loss": loss, "val_bpb": bpb,
        "bytes_code": code, "bytes_total": total, "fits": total <= c.bytes_cap, "complete": not score.partial})
    log.line(f"""---
score:    {bpb:.4f} bits per byte from disk ({r["val_bpb_raw"]:.4f} before export, {loops} passes){score.label}
size:     {total} bytes of {c.bytes_cap}: {"PASS" if r["fits"] else "FAIL"} (code {code} + artifact {artifact}, \
{r["bits_per_weight"]:.3f} bits a weight, entropy {r["entropy_bits_per_weight"]:.3f})
training: {state["step"]} steps, {state["tokens"]} tokens, {state["flops"]:.3g} FLOPs, {state["seconds"]:.1f} s, \
{r["tok_s"]} tok/s, peak memory {r["peak_mem_bytes"] / 2**20:.0f} MiB
files:    {log.folder}: train.log metrics.jsonl result.json checkpoint.safetensors model.safetensors {path.name}""")
    return 0 if r["fits"] else 1
# ======================================================================================================================
# SAMPLE [shared]
# Naive: every token runs the whole model on the last train_seq_len tokens.
# ======================================================================================================================
def pick_token(logits: np.ndarray, temperature: float, top_k: int, rng: np.random.Generator) -> int:
    """Draws a token id from logits [vocab]; the likeliest at temperature 0."""
    if temperature == 0:
        return int(logits.argmax())
    kept = np.argsort(-logits, kind="stable")[: top_k or len(logits)]
    weights = np.exp((logits[kept] - logits[kept[0]]).astype(np.float64) / temperature)
    return int(rng.choice(kept, p=weights / weights.sum()))

def sample(c: Config, engine: Engine, loops: int) -> str:
    tokenizer, rng = load_tokenizer(c.tokenizer_path, c.vocab_size), np.random.default_rng(c.seed)
    start = [tokenizer.bos_id()] if tokenizer.bos_id() >= 0 else []
    ids = start + tokenizer.encode(c.prompt) or [0]
    for _ in range(c.sample_tokens):
        logits = engine.next_logits(np.array(ids[-c.train_seq_len :]), loops)
        ids.append(pick_token(logits, c.temperature, c.top_k, rng))
    return tokenizer.decode([i for i in ids if i not in start])
# ======================================================================================================================
# MAIN [shared]
# ======================================================================================================================
def run(argv: list[str], environ: dict[str, str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(__doc__ + "\nSettings (as --name=value or NAME=value):\n\n" + inspect.getsource(Config))
        return 0
    c, notices = load_config(argv, environ, DEFAULT_PRESET)
    if c.mode == "train":
        notices += check_before_start(c)
    else:
        weights, model, trained_loops = load_model_file(c.artifact or c.checkpoint)
        c = model_config(dataclasses.replace(c, compile=c.compile and c.mode == "eval"), model)
    engine, code = Engine(c), 0
    if c.mode == "train":
        code = train(c, engine, notices)
    else:
        engine.build(weights, training=False)
        loops = c.eval_loops or trained_loops
        if c.mode == "sample":
            text = sample(c, engine, loops)
        else:
            score = Score(c)
            loss, count = evaluate(c, engine, score.tokens, loops), len(score.tokens) - 1
            text = f"eval val_loss:{loss:.8f} val_bpb:{score.bpb(loss):.8f} loops:{loops} tokens:{count}{score.label}"
        if engine.rank == 0:
            print("\n".join([*notices, *engine.notices, text]))
    engine.close(code)
    return code

def main() -> None:
    try:
        code = run(sys.argv[1:], dict(os.environ))
    except InputError as error:
        print("error: " + str(error).replace("\n", " "), file=sys.stderr)
        code = 1
    sys.exit(code)

if __name__ == "__main__":
    main()
