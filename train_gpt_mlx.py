"""Depth-recurrent GPT for parameter golf, MLX script (its twin is train_gpt.py).

Trains a `RecurrentGPT`, a few stored transformer blocks of which a band is applied several times; exports it as a small
artifact, reads that back from disk and scores it in bits per byte.

    python train_gpt_mlx.py                                        the `laptop` preset on an Apple-silicon Mac
    python train_gpt_mlx.py --preset=smoke                         any machine, no data needed, under a minute
    mlx.launch --hostfile hosts.json -- python train_gpt_mlx.py    the same run on several Macs
    python train_gpt_mlx.py --help                                 every setting, with its unit

Sections marked [shared] know neither torch nor MLX and stand byte for byte in both scripts (`python
tests/sync_shared.py` copies them); in the others the classes, functions and parameter names are the same. Sources:
parameter-golf PR #319 (depth recurrence 5x3) and #1394 (loops on late), arXiv 2511.07384 (looping a band), arXiv
2410.20672 (per-loop LoRA).
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import dataclasses
import difflib
import functools
import hashlib
import io
import json
import lzma
import math
import os
import pickle
import platform
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import constriction
import numpy as np
import sentencepiece as spm
from safetensors import SafetensorError
from safetensors.numpy import load as parse_tensors
from safetensors.numpy import save as pack_tensors
from tqdm import tqdm

OPENBLAS = False
if sys.platform == "linux":  # the BLAS of MLX's Linux package is 20 to 50 times slower; the one loaded first serves
    with contextlib.suppress(OSError):
        OPENBLAS = bool(ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL))

import mlx.core as mx  # noqa: E402
from mlx import nn  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402

FRAMEWORK = "mlx"
DEFAULT_PRESET = "laptop"


# ======================================================================================================================
# CONFIG [shared]
# A value comes from the command line (--num_heads=8), else the environment (NUM_HEADS=8, the challenge's habit), else
# the preset, else the default here. 0 or "" means "off" or "choose for me". What is wrong raises InputError.
# ======================================================================================================================
class InputError(ValueError):
    """Bad input: one line that says what, where, expected, found and how to mend it. MAIN exits with code 1."""


@dataclass(frozen=True)
class Config:
    # run: what to do, where
    mode: str = "train"  # train | preflight: what a run would take | eval | sample | export
    preset: str = ""  # smoke | demo | mini | laptop | record | baseline | pr319
    run_id: str = ""  # name of the folder under log_dir; "" makes one from the date, the preset and the seed
    resume: bool = False  # go on from the checkpoint of run_id
    artifact: str = ""  # eval and sample: path of an artifact (model.int6.rgpt) of either script
    checkpoint: str = ""  # eval, sample, export: a checkpoint.safetensors or model.safetensors of either script
    log_dir: str = "logs"  # folder of the run folders
    seed: int = 1337  # of the initial weights, of the order of the data, of LOOP_SAMPLE's draws and of sampling
    data_path: str = "./data/datasets/fineweb10B_sp1024"  # folder of fineweb_train_*.bin and fineweb_val_*.bin
    tokenizer_path: str = "./data/tokenizers/fineweb_1024_bpe.model"  # the SentencePiece model that made the shards
    # data
    vocab_size: int = 1024  # pieces, at most 65,536
    train_seq_len: int = 1024  # tokens a sequence, in training and in scoring
    shuffle: bool = True  # draw training sequences by a permutation; 0 = one after the other, as the official script
    # model
    layout: str = "3+3x3+3"  # P+CxR+D: P blocks once, C blocks looped R times, D blocks once; "9" = nine, no loop
    model_dim: int = 512  # width
    num_heads: int = 8  # query heads
    num_kv_heads: int = 4  # key and value heads, shared by groups of query heads
    mlp_mult: int = 2  # hidden width of the MLP over the width
    skips: str = "per_loop"  # per_loop | official | none: the U-Net shortcuts
    loop_gate: str = "x0"  # x0 | gain | none: what happens after every pass but the first
    loop_gate_init: float = 1.0  # 1 is no gate; gain: 0 lets a pass enter as the identity; x0: 1/R is PR #319's
    lora_rank: int = 0  # rank of the per-pass change of every core linear; 0 = off
    pass_vectors: bool = False  # q_gain, attn_scale, mlp_scale and resid_mix of core blocks have a row a pass
    qk_gain_init: float = 1.5  # initial factor on the queries, one per head
    rotary_dims: int = 0  # numbers of every head that a token's position turns; 0 = all
    norm_scale: bool = False  # what the i-th block, from 1, reads is divided by sqrt(i)
    mlp_slope: float = 0.0  # slope of the MLP's activation below 0, before it is squared; 0 is relu
    xsa: bool = False  # exclusive self attention: what a head says of a token's own value is taken off (PR #634)
    init_from: str = ""  # artifact, checkpoint or model with the same blocks, of any layout; weights go by name
    # training (it ends at the first budget that is reached; 0 = no such budget)
    iterations: int = 20000  # steps
    max_wallclock_seconds: float = 600.0  # seconds of training, compilation and validation not counted
    max_train_flops: float = 0.0  # floating-point operations of training, by the formula of flops_per_token
    train_batch_tokens: int = 524288  # tokens a step, over all processes
    loop_schedule: str = ""  # "0:1,0.35:3" = one pass, from 35 % of training three; "" = all passes throughout
    loop_sample: int = 0  # draw the passes of a step about LOOP_SCHEDULE's number, at most so many; 0 = no drawing
    exit_weight: float = 0.0  # weight of the divergence of every earlier pass's prediction from the last pass's
    lr_warmup_steps: int = 0  # steps over which every learning rate rises to its value
    warmdown_frac: float = 0.4  # fraction of training over which the learning rates fall to 0 at the end
    round_from: float = 0.0  # trellis: from this part of training on columns are rounded, a few at a time, and the rest
    # makes up for them; 0 = all are rounded after training
    matrix_lr: float = 0.04  # Muon, block matrices
    tied_embed_lr: float = 0.05  # Adam, embedding
    scalar_lr: float = 0.04  # Adam, vectors and scalars
    loop_gate_lr: float = 0.04  # Adam, loop gates
    lora_lr: float = 0.005  # Adam, LoRA matrices (rank 8 on Muon diverged 8 times of 8 in PR #1096)
    muon_row_norm: bool = False  # the rows of a gradient get one length before Muon makes it orthogonal
    weight_decay: float = 0.0  # this times MATRIX_LR or TIED_EMBED_LR is taken off matrices and embedding, not LoRA
    muon_momentum: float = 0.95  # Muon's momentum
    muon_momentum_warmup_start: float = 0.85  # ... and its value at the first step
    muon_momentum_warmup_steps: int = 500  # ... steps until it is reached
    grad_clip_norm: float = 0.0  # largest norm of the whole gradient; 0 = no clipping
    # score
    eval_loops: str = ""  # passes when the end is scored and when sampling; of a list "3,1,8" the first counts, the
    # others are shown; "" = the number active at the end of training
    eval_stride: int = 0  # tokens between scoring windows (each token then sees more context); 0 = train_seq_len
    val_max_tokens: int = 0  # score only this many validation tokens; the score is then labelled partial; 0 = all
    val_loss_every: int = 1000  # steps between validations; 0 = only at the end
    # artifact
    bytes_cap: int = 16000000  # largest code + artifact, bytes (decimal)
    count_code: str = "1"  # 1: the script's own bytes count | packed: those of a file that unpacks itself, which
    # records/submit.py ships | 0: the weights alone count
    target_bytes: int = 0  # trellis: tune QUANT_LOSS until code + artifact just fit into so many bytes; 0 = off
    quantizer: str = "absmax"  # absmax: int6, a row spans its largest weight | trellis: as coarse as the loss allows
    quant_loss: float = 0.0  # trellis: what rounding may add to the loss, nats a token, about; 0 = 0.005
    calib_tokens: int = 131072  # trellis: training tokens whose activations and gradients it looks at
    calib_seconds: float = 20.0  # trellis: seconds of max_wallclock_seconds for that, at ROUND_FROM or at the end
    # log
    train_log_every: int = 200  # steps between log lines (the first ten are always logged)
    checkpoint_every: int = 0  # steps between checkpoints; 0 = only when stopped by a signal and at the end
    # machine
    device: str = ""  # torch: cuda | mps | cpu; mlx: gpu | cpu; "" = the best there is
    dtype: str = ""  # bfloat16 | float32 of the activations; "" = bfloat16 where it is fast. Weights stay float32
    compile: bool = True  # compile the model (torch.compile, mx.compile)
    microbatch_tokens: int = 0  # tokens a forward pass at most (memory only, results do not change); 0 = by device
    # sample
    prompt: str = ""  # text to go on from; "" = start of a document
    sample_tokens: int = 200  # tokens to write
    temperature: float = 0.8  # 0 = always the likeliest


PRESETS = {
    # Needs no data: reads Python's own reference; under a minute on two CPU cores.
    "smoke": """data_path=./data/datasets/smoke_sp512 tokenizer_path=./data/tokenizers/smoke_512_bpe.model
        vocab_size=512 layout=1+2x2+1 model_dim=64 num_heads=4 num_kv_heads=2 train_seq_len=64 train_batch_tokens=2048
        iterations=120 max_wallclock_seconds=0 loop_schedule=0:1,0.5:2 loop_gate=gain loop_gate_init=0
        lr_warmup_steps=10 val_loss_every=60 train_log_every=20 compile=0""",
    # Three minutes on two CPU cores, on the corpus of data/offline.py. It is hardly trained, so that the loss added by
    # rounding is several times quant_loss.
    "demo": """data_path=./data/datasets/offline_sp1024 tokenizer_path=./data/tokenizers/offline_1024_bpe.model
        layout=1+2x2+1 model_dim=256 num_heads=4 num_kv_heads=2 train_seq_len=256 train_batch_tokens=4096
        max_wallclock_seconds=180 loop_schedule=0:1,0.6:2 loop_gate=gain loop_gate_init=0 lr_warmup_steps=20
        muon_momentum_warmup_steps=100 val_loss_every=100 val_max_tokens=65536 train_log_every=20
        quantizer=trellis quant_loss=0.001 calib_tokens=16384 calib_seconds=15""",
    # The scale model: 80,000 bytes of weights, 5e13 FLOPs (track_mini). Vocabulary, depth and batch by
    # records/ablations/mini_bits and mini_shape, at half the size, xsa by mini_trials and, with the rates' rise and the
    # shortcut, by mini_leave_three; width and round_from by mini_wide and mini_wide_after: a weight gets 3.7 bits.
    "mini": """data_path=./data/datasets/mini_sp1024 tokenizer_path=./data/tokenizers/fineweb_1024_bpe.model
        layout=2 model_dim=68 num_heads=2 num_kv_heads=1 mlp_mult=4 train_seq_len=256 train_batch_tokens=4096
        iterations=0 max_wallclock_seconds=0 max_train_flops=5e13 warmdown_frac=0.67 lr_warmup_steps=20
        muon_momentum_warmup_steps=100 val_loss_every=2000 train_log_every=200 quantizer=trellis bytes_cap=80000
        target_bytes=80000 count_code=0 calib_tokens=65536 microbatch_tokens=2048 xsa=1
        round_from=0.85""",
    # Ten minutes on an 8 GB M-series laptop; useful on a CPU, too. Passes come late: records/ablations/mini_loop.
    "laptop": """model_dim=384 num_heads=6 num_kv_heads=3 train_seq_len=512 train_batch_tokens=16384
        loop_schedule=0:1,0.75:3 loop_gate=gain loop_gate_init=0 lr_warmup_steps=20 muon_momentum_warmup_steps=200
        val_loss_every=200 val_max_tokens=1048576 train_log_every=20""",
    # Ten minutes on 8xH100, 16,000,000 bytes: 3.5 bits a weight. After the record of 2026-04-05 (PR #1394, five
    # seeds). Not as there: the layout (#1493), the gain on the queries (#1413: -0.0008), momentum (#1514, p = 0.02),
    # a rise of the rates; no average of weights (#374: -0.0006), shortcuts within a pass, without a sigmoid, no decay
    # of vectors, initial weights not orthogonal, a loop gate from 1, our export. Effects in bits per byte, none ours:
    # context of 2048 -0.018, mlp_slope -0.0021 (#549), xsa (all layers, not four) -0.0016 (#634), muon_row_norm
    # -0.001 (#1260), rotary_dims and norm_scale -0.0023 with another change (#315); stride 64, of scoring, -0.017.
    # Of ours, one seed: round_from -0.015 at track_mini, by FLOPs (mini_wide_after, mini_wide), at as many bits.
    "record": """data_path=./data/datasets/fineweb10B_sp8192 tokenizer_path=./data/tokenizers/fineweb_8192_bpe.model
        vocab_size=8192 train_seq_len=2048 train_batch_tokens=786432 layout=3+3x3+5 loop_schedule=0:1,0.35:3
        loop_gate=gain mlp_mult=4 mlp_slope=0.5 xsa=1 rotary_dims=16 norm_scale=1 qk_gain_init=5 matrix_lr=0.02
        tied_embed_lr=0.03 scalar_lr=0.02 weight_decay=0.085 muon_row_norm=1 muon_momentum=0.97
        muon_momentum_warmup_start=0.92 muon_momentum_warmup_steps=1500 lr_warmup_steps=20 warmdown_frac=0.667
        grad_clip_norm=0.3 eval_stride=64 val_loss_every=0 quantizer=trellis target_bytes=16000000 count_code=packed
        calib_tokens=524288 calib_seconds=8 round_from=0.85""",
    # The two controls: the official script's model, and PR #319's; their warm-downs as fractions of training.
    "baseline": "layout=9 skips=official loop_gate=none warmdown_frac=0.087",
    "pr319": """layout=5x3 model_dim=640 skips=none loop_gate=x0 loop_gate_init=0.3333333333333333 warmdown_frac=0
        train_batch_tokens=786432 max_wallclock_seconds=2400""",
}
CHOICES = {
    "mode": ("train", "preflight", "eval", "sample", "export"),
    "preset": ("", *PRESETS),
    "skips": ("per_loop", "official", "none"),
    "loop_gate": ("x0", "gain", "none"),
    "count_code": ("1", "packed", "0"),
    "quantizer": ("absmax", "trellis"),
    "device": ("", "cuda", "mps", "gpu", "cpu"),
    "dtype": ("", "bfloat16", "float32"),
}
# What each host may have its own of: places, memory, and what only the first process uses.
OF_A_HOST = "preset run_id artifact checkpoint log_dir data_path tokenizer_path init_from microbatch_tokens".split()
TRAINS = ("train", "preflight")  # modes that start a model; the others use a file
# The first setting of each group; a group ends where the next begins.
GROUP_STARTS = dict(run="mode", data="vocab_size", model="layout", training="iterations", score="eval_loops",
                    artifact="bytes_cap", log="train_log_every", machine="device", sample="prompt")  # fmt: skip
ABOVE_ZERO = """vocab_size model_dim num_heads num_kv_heads mlp_mult train_seq_len bytes_cap
    train_batch_tokens""".split()
AT_MOST = dict(vocab_size=65536, train_seq_len=2**20, seed=2**32 - 1, warmdown_frac=1, muon_momentum=1,
               muon_momentum_warmup_start=1, mlp_slope=1, round_from=0.99)  # fmt: skip
# Names of the official scripts that mean something else, or nothing, here.
REPLACED = {
    "NUM_LAYERS": "LAYOUT=9",
    "NUM_UNIQUE_LAYERS": "LAYOUT=5x3",
    "NUM_LOOPS": "LAYOUT=5x3",
    "WARMDOWN_ITERS": "WARMDOWN_FRAC=0.4 (a fraction of training, so that a slow machine decays like a fast one)",
    "WARMUP_STEPS": "nothing: every loop count is compiled before the clock starts; LR_WARMUP_STEPS is of the rates",
    "TIE_EMBEDDINGS": "nothing: input and output embedding are always one",
    "VAL_BATCH_SIZE": "MICROBATCH_TOKENS",
    "GRAD_ACCUM_STEPS": "MICROBATCH_TOKENS",
    "MLX_MAX_MICROBATCH_TOKENS": "MICROBATCH_TOKENS",
    "EMBED_LR": "TIED_EMBED_LR",
    "HEAD_LR": "TIED_EMBED_LR",
    "TRAIN_MAX_SEQ_LEN": "TRAIN_SEQ_LEN",
    "OUT_DIR": "LOG_DIR",
}


def group_fields() -> dict[str, str]:
    """The names of the settings of each group, in order, as one text."""
    names = [field.name for field in dataclasses.fields(Config)]
    starts = [names.index(first) for first in GROUP_STARTS.values()]
    return {group: " ".join(names[a:b]) for group, a, b in zip(GROUP_STARTS, starts, [*starts[1:], len(names)])}


GROUPS = group_fields()


def require(holds: object, name: object, expected: str, found: object, mend: str = "") -> None:
    """Raises InputError "name: expected ..., found ...; mend" unless `holds`."""
    if not holds:
        raise InputError(f"{name}: expected {expected}, found {found}" + (f"; {mend}" if mend else ""))


def parse_value(name: str, text: str, kind: str, where: str) -> object:
    """Turns the text of one setting into the type of its field (`kind`: str, int, float or bool); raises InputError."""
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    expected = {"bool": "0 or 1", "int": "a whole number", "float": "a number", "str": "UTF-8 text"}[kind]
    try:
        if kind == "bool":
            return words[text.lower()]
        if kind == "str":
            text.encode()  # bytes of a terminal that are no UTF-8 arrive as surrogates
            return text
        value = int(text) if kind == "int" else float(text)
        if math.isfinite(value):
            return value
    except (ValueError, KeyError, OverflowError):
        pass
    shown = text.encode(errors="backslashreplace").decode()
    raise InputError(f'{name.upper()} ({where}): expected {expected}, found "{shown}"')


def read_environment(environ: dict[str, str], kinds: dict[str, str]) -> tuple[dict[str, object], list[str]]:
    """Settings from environment variables, and notices: what came from there, and names that nearly are settings."""
    values, notices = {}, []
    for name, text in environ.items():
        if name.isupper() and name.lower() in kinds:
            values[name.lower()] = parse_value(name, text, kinds[name.lower()], "environment")
        elif name in REPLACED:
            notices.append(f"notice: {name}={text} in the environment has no effect here; write {REPLACED[name]}")
        elif near := difflib.get_close_matches(name, [kind.upper() for kind in kinds], n=1, cutoff=0.88):
            notices.append(f"notice: {name} in the environment is not a setting; did you mean {near[0]}?")
    if values:
        said = " ".join(f"{name.upper()}={value}" for name, value in values.items()).replace("\n", "\\n")
        notices.append(f"notice: from the environment: {said}")
    return values, notices


def read_flags(argv: list[str], kinds: dict[str, str]) -> dict[str, object]:
    """Settings from --name=value; --name alone is --name=1 for a setting that is 0 or 1."""
    values = {}
    for argument in argv:
        flag, _, text = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_").lower()
        near = difflib.get_close_matches(name, kinds, n=1)
        hint = f"did you mean --{near[0]}=...?" if near else "see --help"
        hint = f"write {REPLACED[name.upper()]}" if name.upper() in REPLACED else hint
        require(flag.startswith("--") and name in kinds, argument, "a setting", "an unknown flag", hint)
        require("=" in argument or kinds[name] == "bool", flag, "a value", "none", f"write {flag}=...")
        values[name] = parse_value(name, text if "=" in argument else "1", kinds[name], "flag")
    return values


def load_config(argv: list[str], environ: dict[str, str], default_preset: str) -> tuple[Config, list[str]]:
    """Command line over environment over preset over default. Returns the checked Config and notices for the log."""
    kinds = {field.name: str(field.type) for field in dataclasses.fields(Config)}
    values, notices = read_environment(environ, kinds)
    values |= read_flags(argv, kinds)
    trains = values.get("mode", "train") in TRAINS  # what uses a file has no preset unless it is named
    preset = values.get("preset") or (default_preset if trains else "")
    near = difflib.get_close_matches(preset, PRESETS, n=1, cutoff=0.0)
    known = preset in PRESETS or not preset
    require(known, "PRESET", f"one of {', '.join(PRESETS)}", f'"{preset}"', f"did you mean {near[0]}?")
    pairs = (setting.split("=", 1) for setting in PRESETS.get(preset, "").split())
    chosen = {name: parse_value(name, text, kinds[name], f"preset {preset}") for name, text in pairs}
    c = Config(**chosen | values | {"preset": preset})
    if c.mode in TRAINS:
        check_config(c)
    else:  # the file says what model it is, and `model_config` checks the rest
        check_values(c)
    return c, notices


def check_values(c: Config) -> None:
    """Raises InputError for the first setting that is wrong whatever the model is."""
    for name, allowed in CHOICES.items():
        shown = ", ".join(value for value in allowed if value)
        require(getattr(c, name) in allowed, name.upper(), f"one of {shown}", f'"{getattr(c, name)}"')
    for field in dataclasses.fields(c):
        name, value = field.name, getattr(c, field.name)
        if field.type in ("int", "float") and name != "loop_gate_init":
            require(value > 0 or name not in ABOVE_ZERO, name.upper(), "a number above 0", value)
            require(0 <= value <= 1e38, name.upper(), "0 or more, and at most 1e38", value)
            limit = AT_MOST.get(name, value)
            require(value <= limit, name.upper(), f"at most {limit}", value)
    check_export(c)
    check_run(c)


def check_config(c: Config) -> None:
    """Raises InputError for the first setting that is wrong. Each section knows its own."""
    check_values(c)
    check_model(c)
    check_schedules(c)
    check_data(c)


def config_sha256(c: Config) -> str:
    """Hash of the settings that decide what is trained; equal for the seeds of one configuration, however they are
    scored and, without ROUND_FROM, exported. Of MAX_WALLCLOCK_SECONDS what is left to train in (`seconds_to_train`) is
    hashed, of INIT_FROM the path."""
    groups = ("data", "model", "training", *["artifact"] * (c.round_from > 0))
    kept = {name: getattr(c, name) for group in groups for name in GROUPS[group].split()}
    kept["max_wallclock_seconds"] = seconds_to_train(c)
    if c.round_from:
        kept["passes"] = most_passes(c, loops_at(c, 1.0))
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


# ======================================================================================================================
# MODEL, THE PLAN [shared]
# Which block runs after which, which shortcut connects which, which parameters there are, how they start, and what a
# forward pass costs.
# ======================================================================================================================
# Settings that a file of weights states, since its model cannot be built without them.
MODEL_FIELDS = """layout vocab_size model_dim num_heads num_kv_heads mlp_mult skips loop_gate lora_rank
    pass_vectors train_seq_len xsa rotary_dims norm_scale mlp_slope""".split()


class Layout(NamedTuple):
    prelude: int  # blocks that run once, first
    core: int  # blocks that run `loops` times
    loops: int
    coda: int  # blocks that run once, last

    @property
    def blocks(self) -> int:
        """Blocks that are stored."""
        return self.prelude + self.core + self.coda

    @property
    def depth(self) -> int:
        """Blocks that are applied with all passes on."""
        return self.prelude + self.core * self.loops + self.coda


def parse_layout(text: str) -> Layout:
    """Reads "9", "5x3", "3+3x3+5", "3+3x3" or "3x3+5"; raises InputError."""
    match, found = re.fullmatch(r"(?:(\d+)\+)?(\d+)x(\d+)(?:\+(\d+))?|(\d+)", text), f'"{text}"'
    require(match, "LAYOUT", 'P+CxR+D such as "3+3x3+5", "5x3" or "9"', found)
    p, c, r, d, plain = (int(part or 0) for part in match.groups())
    layout = Layout(0, plain, 1, 0) if match.group(5) else Layout(p, c, r, d)
    require(layout.core and layout.loops, "LAYOUT", "at least one core block and one pass", found)
    require(layout.depth <= 1000, "LAYOUT", "at most 1000 applied blocks", found)
    return layout


def check_model(c: Config) -> None:
    layout, dim, heads = parse_layout(c.layout), c.model_dim, c.num_heads
    fits = [h for h in range(1, min(dim, 65536) + 1) if dim % (2 * h) == 0]
    near = min(fits, key=lambda h: abs(h - heads), default="an even MODEL_DIM")
    require(heads in fits, "NUM_HEADS", f"heads of an even width in MODEL_DIM={dim}", heads, f"try {near}")
    require(heads % c.num_kv_heads == 0, "NUM_KV_HEADS", f"a divisor of NUM_HEADS={heads}", c.num_kv_heads)
    even = c.rotary_dims % 2 == 0 and c.rotary_dims < dim // heads
    require(even, "ROTARY_DIMS", f"an even number below the {dim // heads} of a head, 0 for all", c.rotary_dims)
    require(c.train_seq_len * dim <= 2**26, "TRAIN_SEQ_LEN * MODEL_DIM", "at most 2**26", c.train_seq_len * dim)
    for name in ("lora_rank", "pass_vectors"):
        value, one = getattr(c, name), f"0 with one pass (LAYOUT={c.layout})"
        require(layout.loops > 1 or not value, name.upper(), one, value)
    most = f"at most {layout.loops} passes with SKIPS=official (the shortcuts of more were never trained)"
    whole = re.fullmatch(r"(\d{1,3}(,\d{1,3})*)?", c.eval_loops)
    require(whole, "EVAL_LOOPS", 'passes such as "3" or "3,1,8"', f'"{c.eval_loops}"')
    one = layout.loops > 1 or max(eval_passes(c, 0)) <= 1
    require(one, "EVAL_LOOPS", f"1 with one pass (LAYOUT={c.layout})", c.eval_loops)
    trained = max(eval_passes(c, 0)) <= layout.loops or c.skips != "official"
    require(trained, "EVAL_LOOPS", most, c.eval_loops, "use SKIPS=per_loop or none")


def eval_passes(c: Config, trained: int) -> list[int]:
    """EVAL_LOOPS as numbers, the one that counts first; for none, and for 0, the number that was trained."""
    return [int(passes) or trained for passes in (c.eval_loops or "0").split(",")]


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
    `official` is the published rule, keyed by the order of popping: there a new pass moves rows to other blocks."""
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
    """Row of skip_weights for every key that any number of passes uses."""
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


def linear_shapes(c: Config) -> dict[str, tuple[int, int]]:
    """[out, in] of the matrices of one block."""
    dim, kv_dim, hidden = c.model_dim, c.model_dim // c.num_heads * c.num_kv_heads, c.mlp_mult * c.model_dim
    return {
        "attn.q": (dim, dim),
        "attn.k": (kv_dim, dim),
        "attn.v": (kv_dim, dim),
        "attn.proj": (dim, dim),
        "mlp.fc": (hidden, dim),
        "mlp.proj": (dim, hidden),
    }


def vector_shapes(c: Config, passes: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the vectors of one block, which is applied in `passes` passes."""
    dim, rows = c.model_dim, (passes,) if c.pass_vectors and passes > 1 else ()
    return {
        "attn.q_gain": (*rows, c.num_heads),
        "attn_scale": (*rows, dim),
        "mlp_scale": (*rows, dim),
        "resid_mix": (*rows, 2, dim),
    }


def param_shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the order in which they are drawn; with one pass none is per pass."""
    layout, dim = parse_layout(c.layout), c.model_dim
    shapes = {"tok_emb.weight": (c.vocab_size, dim)}
    for i in range(layout.blocks):
        shapes |= {f"blocks.{i}.{name}.weight": shape for name, shape in linear_shapes(c).items()}
        passes = layout.loops if 0 <= i - layout.prelude < layout.core else 1
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in vector_shapes(c, passes).items()}
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
    "scalar": r"blocks\.\d+\.(attn\.q_gain|attn_scale|mlp_scale|resid_mix)|skip_weights|loop_embed",
    "gate": r"loop_gate",
    "lora": r"blocks\.\d+\.(attn\.(q|k|v|proj)|mlp\.(fc|proj))\.lora_[ab]",
    "matrix": r"blocks\.\d+\.(attn\.(q|k|v|proj)|mlp\.(fc|proj))\.weight",
}


def param_group(name: str) -> str:
    """The one optimizer group of a parameter; a parameter of no group, or of two, would not train as meant."""
    groups = [group for group, pattern in PARAM_GROUPS.items() if re.fullmatch(pattern, name)]
    if len(groups) != 1:
        raise ValueError(f"parameter {name}: expected in exactly one of PARAM_GROUPS, found in {groups or 'none'}")
    return groups[0]


EMBED_INIT_STD = 0.005  # of the official script


def initial_weights(c: Config) -> dict[str, np.ndarray]:
    """float32 start values from one generator: equal seeds give equal weights in both scripts, and equal block weights
    in every layout with the same blocks. Per-pass parameters start as the identity (but for a gate other than 1)."""
    rng, weights = np.random.RandomState(c.seed), {}
    constants = {"q_gain": c.qk_gain_init, "loop_gate": c.loop_gate_init}
    for name, shape in param_shapes(c).items():
        leaf = name.rsplit(".", 1)[-1]
        if name == "tok_emb.weight":
            value = EMBED_INIT_STD * rng.standard_normal(shape)
        elif name.endswith("proj.weight") or leaf in ("lora_b", "loop_embed"):
            value = np.zeros(shape)
        elif leaf in ("weight", "lora_a"):
            value = rng.uniform(-1, 1, shape) / math.sqrt(shape[-1])
        elif leaf == "resid_mix":
            value = np.ones(shape)
            value[..., 1, :] = 0
        else:
            value = np.full(shape, constants.get(leaf, 1.0))
        weights[name] = value.astype(np.float32)
    return weights


def transfer_weights(c: Config, theirs: dict[str, np.ndarray], their_config: dict) -> dict[str, np.ndarray]:
    """Start values of `c`, with those of the same name from a model of another layout with the same blocks. Rows of
    skip_weights go to the shortcut between the same blocks; per-pass rows beyond theirs start as in a new model, but
    those of a block's vectors (PASS_VECTORS) as its last one."""
    weights, layout, their_layout = initial_weights(c), parse_layout(c.layout), parse_layout(their_config["layout"])
    blocks, rows = layout.blocks, skip_rows(layout, c.skips)
    require(
        their_layout.blocks == blocks, "INIT_FROM", f"the {blocks} blocks of LAYOUT={c.layout}", their_layout.blocks
    )
    for name in ("rotary_dims", "norm_scale", "mlp_slope", "xsa"):  # no weight's shape shows these
        asked, stated = getattr(c, name), their_config[name]
        require(asked == stated, f"INIT_FROM: {name.upper()}", f"the file's {stated}", asked, "write that of the file")
    rank, mend = their_config["lora_rank"], "write that, or make a file of this layout by retrofit/convert.py"
    require(c.lora_rank == rank or not rank, "INIT_FROM: LORA_RANK", f"the file's {rank}", c.lora_rank, mend)
    mend = "MODEL_DIM, NUM_HEADS, NUM_KV_HEADS, MLP_MULT, VOCAB_SIZE and PASS_VECTORS must be those of the file"
    for name, value in theirs.items():
        mine = weights.get(name)
        if name == "skip_weights":
            for key, row in skip_rows(their_layout, their_config["skips"]).items():
                if key in rows and value.shape[1] == c.model_dim:
                    mine[rows[key]] = value[row]
        elif name in ("loop_embed", "loop_gate") or ".lora_" in name:
            alike = name != "loop_gate" or c.loop_gate == their_config["loop_gate"]  # x0's gates are no gains
            if alike and mine is not None and mine.shape[1:] == value.shape[1:]:
                mine[: len(value)] = value[: len(mine)]
        else:
            shape, plain = () if mine is None else mine.shape, 2 if name.endswith("resid_mix") else 1
            if is_vector(name) and (len(shape) > plain or layout.loops == 1):  # a row a pass; one pass gets the first
                rows_of = value if value.ndim > plain else value[None]
                wanted = np.minimum(np.arange(shape[0]), len(rows_of) - 1) if len(shape) > plain else 0
                value = rows_of[wanted]
            require(value.shape == shape, f"INIT_FROM: {name}", f"shape {shape}", value.shape, mend)
            mine[:] = value
    return weights


def count_params(c: Config) -> int:
    return sum(math.prod(shape) for shape in param_shapes(c).values())


def effective_params(c: Config) -> int:
    """Parameters counted once per application, with all passes on (what has its own row a pass is counted once)."""
    layout, shapes = parse_layout(c.layout), param_shapes(c)
    tied = r"blocks\.0\..*weight" if c.pass_vectors else r"blocks\.0\.(?!.*lora)"
    per_block = sum(math.prod(shapes[name]) for name in shapes if re.match(tied, name))
    return count_params(c) + per_block * (layout.depth - layout.blocks)


def flops_per_token(c: Config, loops: int) -> float:
    """Floating-point operations of one forward pass per token: 2 per weight and application, 2*seq*dim per attention
    (its causal half), the output layer. Adding LoRA to its matrix, once a microbatch, is left out."""
    layout = parse_layout(c.layout)
    applied = layout.prelude + layout.core * loops + layout.coda
    return applied * flops_per_block(c) + 2.0 * c.vocab_size * c.model_dim


def flops_per_block(c: Config) -> float:
    """Floating-point operations of a block, per token, forward."""
    linears = linear_shapes(c).values()
    return 2.0 * (sum(out * inp for out, inp in linears) + c.train_seq_len * c.model_dim)


def train_flops_per_token(c: Config, loops: int) -> float:
    """Floating-point operations of training per token: three times the forward pass, in which with EXIT_WEIGHT coda and
    output layer count for every pass. The optimizer is not counted."""
    an_exit = parse_layout(c.layout).coda * flops_per_block(c) + 2.0 * c.vocab_size * c.model_dim
    return 3 * (flops_per_token(c, loops) + (loops - 1) * an_exit * (c.exit_weight > 0))


# ======================================================================================================================
# MODEL, THE FORWARD PASS
# The blocks are the official baseline's. The recurrence is the plain loop in `RecurrentGPT.hidden`. Activations have
# the compute dtype, parameters stay float32, and norms, losses and the soft cap compute in float32.
# Shapes: n sequences, t positions, h heads, d width of a head, k key/value heads.
# ======================================================================================================================
RMS_EPS = 2.0**-23
ROPE_BASE = 10000.0
LOGIT_SOFTCAP = 30.0  # logits lie between -30 and 30, so that exp needs no maximum taken off


def rms_norm(x: mx.array) -> mx.array:
    """Divides by the root mean square of the last axis, in float32."""
    return mx.fast.rms_norm(x, None, RMS_EPS)


def rotary_tables(length: int, turned: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, float32 [length, turned / 2], for heads of which so many numbers turn."""
    frequencies = 1.0 / ROPE_BASE ** (np.arange(0, turned, 2, dtype=np.float64) / turned)
    angles = np.outer(np.arange(length), frequencies)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Turns the pairs (i, i + m/2) of the first m numbers of [n, t, h, d], for which there are tables [t, 1, m/2], by
    minus the angle of their position, as the official script."""
    half = cos.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    return mx.concatenate([a * cos + b * sin, b * cos - a * sin, x[..., 2 * half :]], axis=-1)


def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Causal attention of q [n, t, h, d] over k, v [n, t, k, d]; returns [n, t, h * d]."""
    if mx.default_device() == mx.Device(mx.cpu):
        return attend_by_products(q, k, v)
    n, t, h, d = q.shape
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    y = mx.fast.scaled_dot_product_attention(q, k, v, scale=d**-0.5, mask="causal")
    return y.transpose(0, 2, 1, 3).reshape(n, t, h * d)


def attend_by_products(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """`attend` for CPUs, where exp is the slow part: two batched products per half of the positions, so that the first
    half never looks at the keys of the second. The heads of a group lie one below the other, so that keys need no
    copies."""
    n, t, h, d = q.shape
    kv_heads = k.shape[2]
    groups = h // kv_heads
    q = (q * d**-0.5).reshape(n, t, kv_heads, groups, d).transpose(0, 2, 3, 1, 4)  # [n, k, groups, t, d]
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)  # [n, k, d, t], [n, k, t, d]
    out = []
    for low, high in [(0, t // 2), (t // 2, t)] if t >= 128 else [(0, t)]:
        scores = q[:, :, :, low:high].reshape(n, kv_heads, groups * (high - low), d) @ k[..., :high]
        future = mx.where(mx.arange(high) > mx.arange(low, high)[:, None], mx.array(-math.inf, scores.dtype), 0)
        scores = scores.reshape(n, kv_heads, groups, high - low, high) + future
        probs = mx.softmax(scores, axis=-1, precise=True).reshape(n, kv_heads, groups * (high - low), high)
        out.append((probs @ v[:, :, :high]).reshape(n, kv_heads, groups, high - low, d))
    return mx.concatenate(out, axis=3).transpose(0, 3, 1, 2, 4).reshape(n, t, h * d)


def without_own(y: mx.array, v: mx.array) -> mx.array:
    """Attention's output y [n, t, h * d] without each head's part along the token's own value, v [n, t, k, d], whose
    mean square is made 1, so that a mean projects."""
    n, t, kv_heads, d = v.shape
    y, own = y.reshape(n, t, kv_heads, -1, d), rms_norm(v)[:, :, :, None]  # [n, t, k, groups, d]
    return (y - (y * own).mean(axis=-1, keepdims=True) * own).reshape(n, t, -1)


def of_pass(vector: mx.array, loop: int, axes: int = 1) -> mx.array:
    """The vector of `axes` axes that a pass uses: with PASS_VECTORS its row."""
    return vector if vector.ndim == axes else vector[loop]


class Linear(nn.Module):
    """y = W x, and in the core (W + B[pass] A[pass]) x where LoRA is on (arXiv 2410.20672); W is [out, in]."""

    def __init__(self, out_dim: int, in_dim: int, passes: int = 0, lora_rank: int = 0):
        super().__init__()
        self.weight = mx.zeros((out_dim, in_dim))
        self.has_lora = lora_rank > 0
        self.probe = None  # set by `Engine.curvature`, which looks at inputs and gradients
        if self.has_lora:
            self.lora_a = mx.zeros((passes, lora_rank, in_dim))
            self.lora_b = mx.zeros((passes, out_dim, lora_rank))

    def matrix(self, loop: int) -> mx.array:
        """[out, in] of this pass."""
        return self.weight + self.lora_b[loop] @ self.lora_a[loop] if self.has_lora else self.weight

    def __call__(self, x: mx.array, loop: int, scale: mx.array | None = None) -> mx.array:
        """`scale` [out] multiplies y, by way of the matrix, which has fewer numbers."""
        weight, seen = self.matrix(loop), self.probe is not None
        weight = weight if scale is None or seen else scale[:, None] * weight
        y = x @ weight.astype(x.dtype).T
        if not seen:
            return y
        y = self.probe(x, y)
        return y if scale is None else scale.astype(x.dtype) * y


class Attention(nn.Module):
    """Causal grouped-query attention; queries and keys are normed per head, turned, and queries scaled per head."""

    def __init__(self, c: Config, passes: int, lora_rank: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_heads, c.num_kv_heads, c.model_dim // c.num_heads
        for name in ("q", "k", "v", "proj"):
            setattr(self, name, Linear(*linear_shapes(c)[f"attn.{name}"], passes, lora_rank))
        self.q_gain, self.xsa = mx.zeros(vector_shapes(c, passes)["attn.q_gain"]), c.xsa

    def project(self, x: mx.array, loop: int) -> list[mx.array]:
        """Queries, keys and values [n, t, h or k, d], by one product where nobody looks at each."""
        parts = (self.q, self.k, self.v)
        if self.q.probe is None:
            y = x @ mx.concatenate([linear.matrix(loop) for linear in parts]).astype(x.dtype).T
        else:
            y = mx.concatenate([linear(x, loop) for linear in parts], axis=-1)
        return mx.split(y.reshape(*x.shape[:2], -1, self.head_dim), (self.heads, self.heads + self.kv_heads), axis=2)

    def __call__(self, x: mx.array, loop: int, rotary: tuple[mx.array, mx.array], scale: mx.array) -> mx.array:
        q, k, v = self.project(x, loop)
        cos, sin = (table[: x.shape[1], None].astype(x.dtype) for table in rotary)
        q, k = rotate(rms_norm(q), cos, sin), rotate(rms_norm(k), cos, sin)
        y = attend(q * of_pass(self.q_gain, loop).astype(x.dtype)[:, None], k, v)
        return self.proj(without_own(y, v) if self.xsa else y, loop, scale)


class MLP(nn.Module):
    """proj(relu(fc(x))^2); with MLP_SLOPE the relu is a leaky one."""

    def __init__(self, c: Config, passes: int, lora_rank: int):
        super().__init__()
        self.slope = c.mlp_slope
        self.fc = Linear(*linear_shapes(c)["mlp.fc"], passes, lora_rank)
        self.proj = Linear(*linear_shapes(c)["mlp.proj"], passes, lora_rank)

    def __call__(self, x: mx.array, loop: int, scale: mx.array) -> mx.array:
        return self.proj(mx.square(nn.leaky_relu(self.fc(x, loop), self.slope)), loop, scale)


class Block(nn.Module):
    """x = mix0*x + mix1*x0; x += attn_scale*attn(norm(x)); x += mlp_scale*mlp(norm(x)). With NORM_SCALE what block
    `number`, from 0, reads is smaller the later it comes."""

    def __init__(self, c: Config, number: int, passes: int, lora_rank: int):
        super().__init__()
        self.norm_scale = (number + 1) ** -0.5 if c.norm_scale else 1.0
        self.attn = Attention(c, passes, lora_rank)
        self.mlp = MLP(c, passes, lora_rank)
        for name in ("attn_scale", "mlp_scale", "resid_mix"):
            setattr(self, name, mx.zeros(vector_shapes(c, passes)[name]))

    def __call__(self, x: mx.array, x0: mx.array, loop: int, rotary: tuple[mx.array, mx.array]) -> mx.array:
        mix = of_pass(self.resid_mix, loop, 2).astype(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn(rms_norm(x) * self.norm_scale, loop, rotary, of_pass(self.attn_scale, loop))
        return x + self.mlp(rms_norm(x) * self.norm_scale, loop, of_pass(self.mlp_scale, loop))


def divergence(theirs: mx.array, mine: mx.array) -> mx.array:
    """Forward Kullback-Leibler divergence of the distributions of two logits [n, t, vocab], in nats [n, t]."""
    p, q = (nn.log_softmax(logits, axis=-1) for logits in (theirs, mine))
    return (mx.exp(p) * (p - q)).sum(axis=-1)


class RecurrentGPT(nn.Module):
    """Prelude blocks once, core blocks `loops` times, coda blocks once; input and output embedding are one."""

    def __init__(self, c: Config, dtype: mx.Dtype = mx.float32):
        super().__init__()
        self.config, self.layout, self.dtype = c, parse_layout(c.layout), dtype
        core = range(self.layout.prelude, self.layout.prelude + self.layout.core)
        shapes = param_shapes(c)
        self.tok_emb = Linear(*shapes["tok_emb.weight"])
        passes = [self.layout.loops if i in core else 1 for i in range(self.layout.blocks)]
        self.blocks = [Block(c, number, n, c.lora_rank if n > 1 else 0) for number, n in enumerate(passes)]
        for name in ("skip_weights", "loop_embed", "loop_gate"):
            if name in shapes:
                setattr(self, name, mx.zeros(shapes[name]))
        cos, sin = rotary_tables(c.train_seq_len, c.rotary_dims or c.model_dim // c.num_heads)
        self._cos, self._sin = mx.array(cos), mx.array(sin)  # the underscore keeps them out of the parameters

    def hidden(self, ids: mx.array, loops: int, exits: list | None = None) -> mx.array:
        """ids [n, t] -> normed activations [n, t, dim]. `exits` gets the activations as they were if the core ended
        with each pass but the last."""
        x0 = x = rms_norm(self.tok_emb.weight[ids].astype(self.dtype))
        looped, by_pass = self.layout.loops > 1, self.config.lora_rank or self.config.pass_vectors
        saved: dict[int, mx.array] = {}
        for number, visit in enumerate(visits(self.layout, self.config.skips, loops)):
            row = min(visit.loop, self.layout.loops - 1)  # passes beyond the trained ones reuse the last
            if visit.opens and looped:
                x = x_in = x + self.loop_embed[row].astype(x.dtype)
            if visit.skip_from >= 0:
                x = x + self.skip_weights[visit.skip_row].astype(x.dtype) * saved.pop(visit.skip_from)
            loop = row if by_pass else 0  # blocks that are called alike share a compiled graph
            x = self.blocks[visit.block](x, x0, loop, (self._cos, self._sin))
            if visit.saves:
                saved[number] = x
            if visit.closes and visit.loop > 0 and looped and self.config.loop_gate != "none":
                x = self.gate(x, x_in, x0, row)
            if visit.closes and exits is not None and visit.loop + 1 < loops:
                exits.append(self.leave(x, x0, visit.loop + 1, saved))
        return rms_norm(x)

    def leave(self, x: mx.array, x0: mx.array, loops: int, saved: dict[int, mx.array]) -> mx.array:
        """Normed activations [n, t, dim] of a core that ends at x, after `loops` passes: what the coda makes of it."""
        plan = visits(self.layout, self.config.skips, loops)
        for visit in plan[len(plan) - self.layout.coda :]:
            if visit.skip_from >= 0:
                x = x + self.skip_weights[visit.skip_row].astype(x.dtype) * saved[visit.skip_from]
            x = self.blocks[visit.block](x, x0, 0, (self._cos, self._sin))
        return rms_norm(x)

    def gate(self, x: mx.array, x_in: mx.array, x0: mx.array, row: int) -> mx.array:
        """After every pass but the first. `gain`: x_in + g*(x - x_in), so that a pass whose g is 0 adds its loop
        embedding alone, which starts at 0. `x0`: g*x + (1-g)*x0, as PR #319. Both are exactly x at g = 1."""
        g = self.loop_gate[row]
        if self.config.loop_gate == "gain":
            return x + (g - 1).astype(x.dtype) * (x - x_in)
        return g.astype(x.dtype) * x + (1 - g).astype(x.dtype) * x0

    def logits(self, x: mx.array) -> mx.array:
        """Normed activations [n, t, dim] -> soft-capped logits, float32 [n, t, vocab]."""
        return LOGIT_SOFTCAP * mx.tanh(self.tok_emb(x, 0).astype(mx.float32) / LOGIT_SOFTCAP)

    def head_losses(self, x: mx.array, targets: mx.array, exits: Sequence[mx.array] = ()) -> mx.array:
        """Normed activations [n, t, dim], targets [n, t] -> cross-entropy in nats, float32 [n, t]; with `exits` also
        EXIT_WEIGHT times the divergence of what earlier passes say from what the last does."""
        logits = self.logits(x)
        loss = mx.log(mx.exp(logits).sum(axis=-1)) - mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        for early in exits:
            loss = loss + self.config.exit_weight * divergence(mx.stop_gradient(logits), self.logits(early))
        return loss

    def __call__(self, ids: mx.array, loops: int) -> mx.array:
        """ids [n, t] -> logits, float32 [n, t, vocab]."""
        return self.logits(self.hidden(ids, loops))

    def token_losses(self, ids: mx.array, targets: mx.array, loops: int) -> mx.array:
        """ids, targets [n, t] -> cross-entropy in nats, float32 [n, t]."""
        return self.head_losses(self.hidden(ids, loops), targets)

    def objective(self, ids: mx.array, targets: mx.array, loops: int) -> mx.array:
        """What training lowers: `token_losses` and what EXIT_WEIGHT adds."""
        exits = [] if self.config.exit_weight else None
        x = self.hidden(ids, loops, exits)
        return self.head_losses(x, targets, exits or ())


# ======================================================================================================================
# SCHEDULES [shared]
# What happens when, as functions of progress, the fraction of training done.
# ======================================================================================================================
def parse_loop_schedule(text: str, loops: int) -> list[tuple[float, int]]:
    """Reads "0:1,0.35:3" as [(0.0, 1), (0.35, 3)]: from this fraction of training on, so many passes."""
    name, found = "LOOP_SCHEDULE", f'"{text}"'
    try:
        schedule = [(float(at), int(n)) for at, n in (entry.split(":") for entry in (text or f"0:{loops}").split(","))]
    except ValueError:
        schedule = []
    require(schedule, name, 'fractions of training and passes such as "0:1,0.35:3"', found)
    (start, fewest), (end, most) = schedule[0], schedule[-1]
    require(start == 0, name, "a start at 0", found, 'begin with "0:1"')
    rising = all(a < b and m < n for (a, m), (b, n) in zip(schedule, schedule[1:]))
    require(rising, name, "fractions and passes that increase", found)
    require(end < 1 and fewest >= 1, name, "fractions below 1 and at least one pass", found)
    found += ", which never reaches them" if most < loops else ", which exceeds them"
    mend = f'end it with ":{loops}", or set LOOP_SCHEDULE= for all passes throughout'
    require(most == loops, name, f"an end at the {loops} passes of LAYOUT", found, mend)
    return schedule


def check_schedules(c: Config) -> None:
    loops = parse_layout(c.layout).loops
    last = parse_loop_schedule(c.loop_schedule, loops)[-1][0]
    after = f"0, or after the last switch of LOOP_SCHEDULE, {last:g}"  # what no step has trained has no curvature
    require(not c.round_from or c.round_from > last, "ROUND_FROM", after, c.round_from)
    room = (1 - c.round_from) * c.max_wallclock_seconds / 2  # the other half trains on beside what is rounded
    enough = not (c.round_from and c.max_wallclock_seconds and c.mode in TRAINS) or c.calib_seconds < room
    expected = f"less than half of what is left of MAX_WALLCLOCK_SECONDS from ROUND_FROM on, {room:g}"
    require(enough, "CALIB_SECONDS", expected, c.calib_seconds, "lower it, or set ROUND_FROM=0")
    one_pass = f"0 with one pass (LAYOUT={c.layout})"
    for name in ("loop_sample", "exit_weight"):
        require(loops > 1 or not getattr(c, name), name.upper(), one_pass, getattr(c, name))
    expected = "0 with SKIPS=official (whose shortcuts go from pass to pass)"
    require(c.skips != "official" or not c.exit_weight, "EXIT_WEIGHT", expected, c.exit_weight)
    most = loops if c.skips == "official" else 64  # shortcuts of more passes have no weights; a draw of more is a waste
    expected = f"0, or from the {loops} passes of LAYOUT to {most}"
    require(not c.loop_sample or loops <= c.loop_sample <= most, "LOOP_SAMPLE", expected, c.loop_sample)
    budget = c.iterations or c.max_wallclock_seconds or c.max_train_flops
    name = "ITERATIONS, MAX_WALLCLOCK_SECONDS, MAX_TRAIN_FLOPS"
    require(budget or c.mode not in TRAINS, name, "one budget", "none", "set one")
    kept, below = export_seconds(c), f"less than MAX_WALLCLOCK_SECONDS={c.max_wallclock_seconds:g}"
    left = c.mode not in TRAINS or not c.max_wallclock_seconds or kept < c.max_wallclock_seconds
    require(left, "CALIB_SECONDS", below, f"{kept:g}, which leaves nothing to train in")


def seconds_to_train(c: Config) -> float:
    """MAX_WALLCLOCK_SECONDS without what is kept for the export; 0 = no such budget."""
    return c.max_wallclock_seconds and c.max_wallclock_seconds - export_seconds(c)


def progress_of(c: Config, step: int, seconds: float, flops: float) -> float:
    """Fraction of training done, from 0 to 1: the largest over the budgets that are set."""
    budgets = ((step, c.iterations), (seconds, seconds_to_train(c)), (flops, c.max_train_flops))
    return min(1.0, max(used / cap for used, cap in budgets if cap))


def loops_at(c: Config, progress: float) -> int:
    return [n for at, n in parse_loop_schedule(c.loop_schedule, parse_layout(c.layout).loops) if at <= progress][-1]


def draw_loops(c: Config, mean: int, step: int) -> int:
    """Passes of a step where about `mean` are scheduled: with LOOP_SAMPLE one more than a Poisson number whose rate is
    log-normal with sigma 1/2 and mean `mean` - 1 (arXiv 2511.07384, where the mean is one more). The same on every
    process and in both scripts, since the seed and the step draw it."""
    if not c.loop_sample or mean == 1:
        return mean
    rng, sigma = np.random.RandomState([c.seed, step]), 0.5  # its stream is the same in every NumPy
    rate = math.exp(rng.normal(math.log(mean - 1) - sigma**2 / 2, sigma))
    return min(1 + int(rng.poisson(rate)), c.loop_sample)


def loop_counts(c: Config) -> list[int]:
    """Every number of passes that a step of training can have."""
    scheduled = [n for _, n in parse_loop_schedule(c.loop_schedule, parse_layout(c.layout).loops)]
    return list(range(1, c.loop_sample + 1)) if c.loop_sample else scheduled


def lr_mul_at(c: Config, step: int, progress: float) -> float:
    """Factor on every learning rate: up to 1 over the first steps, down to 0 over the last part of training."""
    steps = min(c.lr_warmup_steps, c.iterations or c.lr_warmup_steps)
    rise = min(1.0, (step + 1) / steps) if steps else 1.0
    return rise * (min(1.0, (1.0 - progress) / c.warmdown_frac) if c.warmdown_frac else 1.0)


def momentum_at(c: Config, step: int) -> float:
    """Muon's momentum: rises over the first steps, as in the official script."""
    part = min(step / c.muon_momentum_warmup_steps, 1.0) if c.muon_momentum_warmup_steps else 1.0
    return (1 - part) * c.muon_momentum_warmup_start + part * c.muon_momentum


BETA1, BETA2, ADAM_EPS = 0.9, 0.95, 1e-8  # Adam, as in the official script
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Keller Jordan's coefficients


def adam_rates(c: Config) -> dict[str, float]:
    """Learning rate of every group that Adam trains."""
    return {"embed": c.tied_embed_lr, "scalar": c.scalar_lr, "gate": c.loop_gate_lr, "lora": c.lora_lr}


def matrix_rate(c: Config, shape: Sequence[int]) -> float:
    """Muon's learning rate of a matrix [rows, columns]."""
    return c.matrix_lr * max(1.0, shape[0] / shape[1]) ** 0.5


def optimizer_buffers(c: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of all that the optimizer keeps: `kind.parameter`."""
    found = {}
    for name, shape in param_shapes(c).items():
        for kind in ("momentum",) if param_group(name) == "matrix" else ("exp_avg", "exp_avg_sq"):
            found[f"{kind}.{name}"] = shape
    return found


# ======================================================================================================================
# OPTIMIZER
# Muon (momentum, then the nearest orthogonal matrix) for the block matrices, Adam for the rest. Matrices of one shape
# are stacked, so that Newton-Schulz runs on all at once. A parameter that a loop count does not touch has a zero
# gradient, and its moments decay as everyone's.
# ======================================================================================================================
def newton_schulz(g: mx.array) -> mx.array:
    """Nearest semi-orthogonal matrices, roughly, of g [count, rows, columns], in g's dtype (Jordan et al., Muon)."""
    a, b, c = NEWTON_SCHULZ
    flip = g.shape[1] > g.shape[2]
    x = g.swapaxes(1, 2) if flip else g
    norm = mx.sqrt(mx.square(x.astype(mx.float32)).sum(axis=(1, 2), keepdims=True))
    x = x / (norm + 1e-7).astype(x.dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        xx = x @ x.swapaxes(1, 2)
        x = a * x + (b * xx + c * (xx @ xx)) @ x
    return x.swapaxes(1, 2) if flip else x


class Optimizer:
    """Muon and Adam over the named parameters of a model. `state()` names every buffer by its parameter."""

    def __init__(self, model: RecurrentGPT, c: Config):
        self.config, self.dtype = c, model.dtype
        shapes = {name: p.shape for name, p in tree_flatten(model.parameters())}
        groups = {group: [name for name in shapes if param_group(name) == group] for group in PARAM_GROUPS}
        self.adam_rates = {name: rate for group, rate in adam_rates(c).items() for name in groups[group]}
        self.exp_avg = {name: mx.zeros(shapes[name]) for name in self.adam_rates}
        self.exp_avg_sq = {name: mx.zeros(shapes[name]) for name in self.adam_rates}
        self.momentum = {name: mx.zeros(shapes[name]) for name in groups["matrix"]}
        self.stacks = []  # (names, learning rate) of the matrices of each shape
        for shape in dict.fromkeys(shapes[name] for name in groups["matrix"]):
            names = [name for name in groups["matrix"] if shapes[name] == shape]
            self.stacks.append((names, matrix_rate(c, shape)))
        self.steps = 0

    def buffers(self) -> dict[str, mx.array]:
        """The optimizer's state, named by kind and parameter."""
        kinds = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "momentum": self.momentum}
        return {f"{kind}.{name}": buffer for kind, buffers in kinds.items() for name, buffer in buffers.items()}

    def state(self) -> dict[str, np.ndarray]:
        """Copies of the state as float32 arrays, for a checkpoint of either script."""
        return {name: np.array(buffer) for name, buffer in self.buffers().items()}

    def load_state(self, state: dict[str, np.ndarray], steps: int) -> None:
        """The opposite of `state()`; `steps` is the number of updates made (for Adam's bias correction)."""
        for kind in ("exp_avg", "exp_avg_sq", "momentum"):
            setattr(self, kind, {name: mx.array(state[f"{kind}.{name}"]) for name in getattr(self, kind)})
        self.steps = steps

    def update(self, function: Callable, inputs: tuple, lr_mul: float, momentum: float) -> tuple:
        """One step by a `function` of the inputs, the state and the numbers of `rule` that changes the state by `rule`;
        returns what it does but for the new state, which is its last result and kept."""
        self.steps += 1
        numbers = mx.array([lr_mul, momentum, lr_mul / (1 - BETA1**self.steps), 1 - BETA2**self.steps])
        held = self.exp_avg, self.exp_avg_sq, self.momentum
        *results, (self.exp_avg, self.exp_avg_sq, self.momentum) = function(*inputs, held, numbers)
        return results

    def rule(self, weights: dict, grads: dict, state: tuple, numbers: mx.array) -> tuple[mx.array, dict, tuple]:
        """The gradients' norm before clipping, new weights and new state; without side effects. What changes from step
        to step is in `numbers`: lr_mul, momentum, lr_mul and second moments with Adam's bias correction."""
        clip = self.config.grad_clip_norm
        lr_mul, momentum, adam_lr_mul, correction = numbers
        weights, (exp_avg, exp_avg_sq, moved) = dict(weights), map(dict, state)
        norm = mx.sqrt(sum(mx.square(g).sum() for g in grads.values()))
        if clip:
            scale = mx.minimum(clip / (norm + 1e-6), 1.0)
            grads = {name: g * scale for name, g in grads.items()}
        decay = self.config.weight_decay
        for name, rate in self.adam_rates.items():
            g = grads[name]
            if decay and param_group(name) == "embed":
                weights[name] = weights[name] * (1 - rate * decay * lr_mul)
            exp_avg[name] = exp_avg[name] + (1 - BETA1) * (g - exp_avg[name])
            exp_avg_sq[name] = BETA2 * exp_avg_sq[name] + (1 - BETA2) * mx.square(g)
            root = mx.sqrt(exp_avg_sq[name] / correction) + ADAM_EPS
            weights[name] = weights[name] - (rate * adam_lr_mul) * (exp_avg[name] / root)
        for names, rate in self.stacks:
            g = mx.stack([grads[name] for name in names])
            m = momentum * mx.stack([moved[name] for name in names]) + g
            change = self.orthogonal(g + momentum * m) * (rate * lr_mul)  # Nesterov
            kept = 1 - self.config.matrix_lr * decay * lr_mul if decay else 1
            for i, name in enumerate(names):
                moved[name] = m[i]
                weights[name] = weights[name] * kept - change[i]
        return norm, weights, (exp_avg, exp_avg_sq, moved)

    def orthogonal(self, g: mx.array) -> mx.array:
        """Newton-Schulz of g [count, rows, columns] in the compute dtype; float32 in, float32 out."""
        if self.config.muon_row_norm:
            g = g / mx.maximum(mx.linalg.norm(g, axis=-1, keepdims=True), 1e-12)
        return newton_schulz(g.astype(self.dtype)).astype(mx.float32)


# ======================================================================================================================
# DATA AND BYTES [shared]
# Shards are the challenge's: 256 int32 (magic, version, number of tokens, zeros), then uint16 tokens. Training reads
# sequences of train_seq_len tokens, cut from the shards, shard by shard, in an order that the seed and the epoch draw
# (with SHUFFLE=0 one after the other). A place in the stream is a number of tokens, and ranks and microbatches take
# shares of a step's tokens: what is read depends on neither.
# ======================================================================================================================
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024


def check_data(c: Config) -> None:
    length, batch = c.train_seq_len, c.train_batch_tokens
    near = max(batch // length, 1) * length
    multiple = f"a multiple of TRAIN_SEQ_LEN={length}"
    require(batch % length == 0, "TRAIN_BATCH_TOKENS", multiple, batch, f"try {near}")
    require(length % (c.eval_stride or 1) == 0, "EVAL_STRIDE", f"a divisor of TRAIN_SEQ_LEN={length}", c.eval_stride)
    for name in ("microbatch_tokens", "val_max_tokens"):
        require(not 0 < getattr(c, name) < length, name.upper(), f"at least TRAIN_SEQ_LEN={length}", getattr(c, name))


def get_data(path: object) -> str:
    """How to get what lacks at `path`."""
    if "8192" in Path(path).name:
        return (
            "get data with `python data/fineweb.py --repo=kevclark/parameter-golf --variant=sp8192`, or choose a PRESET"
        )
    return "get data with `python data/fineweb.py` or `python data/offline.py` (no network needed)"


def open_shard(path: Path, vocab_size: int) -> np.memmap:
    """Maps one shard as uint16 [tokens]; its header, size and edges are checked. Raises InputError."""
    head, repair = SHARD_HEADER_BYTES, "delete it and run the data tool again"
    require(path.is_file(), path, "a shard", "no file (a broken link?)", repair)
    size = path.stat().st_size
    require(size >= head, path, f"a shard with a header of {head} bytes", f"{size} bytes", repair)
    magic, version, tokens = (int(value) for value in np.fromfile(path, dtype="<i4", count=3))
    known, right = f"magic {SHARD_MAGIC} version {SHARD_VERSION}", head + 2 * tokens
    is_shard = (magic, version) == (SHARD_MAGIC, SHARD_VERSION)
    require(is_shard, path, known, f"{magic} version {version}", get_data(path.parent))
    require(tokens > 0, path, "tokens", "an empty shard", repair)
    require(size == right, path, f"{right} bytes for {tokens} tokens", f"{size} (half copied?)", repair)
    shard = np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(tokens,))
    check_ids(np.concatenate((shard[:65536], shard[-65536:])), vocab_size, path)
    return shard


def check_ids(ids: np.ndarray, vocab_size: int, where: object) -> None:
    known, top = f"token ids below VOCAB_SIZE={vocab_size}", int(ids.max())
    require(top < vocab_size, where, known, top, "another tokenizer made this shard")


def find_shards(data_path: str, split: str, vocab_size: int) -> list[np.memmap]:
    """The shards of a split ("train" or "val"), sorted by name, as `open_shard` gives them. Raises InputError."""
    paths = sorted(Path(data_path).glob(f"fineweb_{split}_*.bin"))
    require(paths, data_path, f"fineweb_{split}_*.bin", "none", f"set DATA_PATH, or {get_data(data_path)}")
    return [open_shard(path, vocab_size) for path in paths]


class TokenStream:
    """The endless stream of training sequences; `total` is the number of tokens after which it begins anew."""

    def __init__(self, shards: list[np.memmap], c: Config):
        self.shards, self.vocab_size, self.length = shards, c.vocab_size, c.train_seq_len
        self.shuffle, self.seed = c.shuffle, c.seed
        self.counts = [(len(shard) - 1) // self.length for shard in shards]  # sequences
        self.starts = np.cumsum([0, *self.counts]).tolist()
        home, longer = shards[0].filename.parent, f"a shard longer than TRAIN_SEQ_LEN={self.length}"
        require(self.starts[-1], home, longer, "none")
        self.total = self.starts[-1] * self.length
        self.order = functools.lru_cache(maxsize=4)(self.permutation)

    def permutation(self, epoch: int, shard: int) -> np.ndarray:
        """The order in which the sequences of a shard are drawn in an epoch."""
        if not self.shuffle:
            return np.arange(self.counts[shard])
        rng = np.random.RandomState([self.seed, epoch, shard])  # its stream is the same in every NumPy
        return rng.permutation(self.counts[shard])

    def sequence(self, number: int) -> np.ndarray:
        """Sequence `number` of the stream and the token after it, uint16 [train_seq_len + 1]."""
        epoch, place = divmod(number, self.starts[-1])
        shard = int(np.searchsorted(self.starts, place, side="right")) - 1
        start = int(self.order(epoch, shard)[place - self.starts[shard]]) * self.length
        tokens = self.shards[shard][start : start + self.length + 1]
        check_ids(tokens, self.vocab_size, self.shards[shard].filename)
        return tokens

    def microbatches(self, start: int, batch: int, rank: int, world: int, largest: int) -> Iterator[tuple]:
        """Yields (inputs, targets), int64 [sequences, train_seq_len], of this rank's share of the `batch` tokens at
        token `start`, in microbatches of at most `largest` tokens whose sizes differ by at most one sequence."""
        low, high = split_evenly(batch // self.length, world)[rank]
        for a, b in microbatch_bounds(high - low, self.length, largest):
            first = start // self.length + low
            tokens = np.stack([self.sequence(first + i) for i in range(a, b)]).astype(np.int64)
            yield tokens[:, :-1], tokens[:, 1:]


def split_evenly(count: int, parts: int) -> list[tuple[int, int]]:
    """Bounds of `parts` contiguous shares of range(count) whose sizes differ by at most one."""
    return [(count * i // parts, count * (i + 1) // parts) for i in range(parts)]


def microbatch_bounds(sequences: int, length: int, largest: int) -> list[tuple[int, int]]:
    """Bounds of the microbatches, in sequences, of a share of `sequences`; each has at most `largest` tokens, or is
    one sequence."""
    return split_evenly(sequences, -(-sequences // max(1, largest // length)))


def load_validation(c: Config) -> tuple[np.ndarray, bool]:
    """Validation tokens, uint16 [n * train_seq_len + 1], and whether VAL_MAX_TOKENS left some out."""
    shards, length = find_shards(c.data_path, "val", c.vocab_size), c.train_seq_len
    for shard in shards:
        check_ids(shard, c.vocab_size, shard.filename)
    tokens = np.concatenate(shards)
    usable = (len(tokens) - 1) // length * length
    longer = f"a validation set longer than TRAIN_SEQ_LEN={length}"
    require(usable, c.data_path, longer, f"{len(tokens)} tokens", "lower TRAIN_SEQ_LEN")
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


def load_tokenizer(path: str, vocab_size: int, data_path: str = "") -> spm.SentencePieceProcessor:
    """The SentencePiece model at `path`. Raises InputError if it is none, has another number of pieces, cannot write a
    space, or is not the one that the manifest of `data_path` names."""
    require(Path(path).is_file(), path, "a SentencePiece model", "no file", f"set TOKENIZER_PATH, or {get_data(path)}")
    try:
        tokenizer = spm.SentencePieceProcessor(model_file=path)
        size = int(tokenizer.vocab_size())
    except (RuntimeError, OSError, ValueError, TypeError):
        raise InputError(f"{path}: expected a SentencePiece model, found something else; set TOKENIZER_PATH") from None
    mend = f"set VOCAB_SIZE={size} with the shards that it made, or the right TOKENIZER_PATH"
    require(size == vocab_size, path, f"a tokenizer of VOCAB_SIZE={vocab_size} pieces", size, mend)
    marked = "\u2581" in tokenizer.decode(tokenizer.encode("\ue000 \ue000"))  # a letter that no piece begins with
    mend = "train it anew with `python data/tokenize_docs.py`"
    require(not marked, path, "a tokenizer with a piece for the space", "none: a space would be three bytes", mend)
    plain = [i for i in range(size) if not (tokenizer.is_control(i) or tokenizer.is_byte(i) or tokenizer.is_unknown(i))]
    texts = ((tokenizer.decode([i]).strip(), tokenizer.id_to_piece(i).replace("\u2581", " ").strip()) for i in plain)
    decoded, piece = next((pair for pair in texts if pair[0] != pair[1]), ("", ""))
    require(decoded == piece, path, f'a tokenizer that decodes the piece "{piece}" as itself', f'"{decoded}"', mend)
    if stated := manifest_tokenizer(data_path):
        found = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        expected = f"the tokenizer that made the shards in {data_path}, sha256 {stated[:12]}"
        require(found == stated, path, expected, found[:12], "set the right TOKENIZER_PATH (manifest.json names it)")
    return tokenizer


def manifest_tokenizer(data_path: str) -> str:
    """SHA-256 of the tokenizer of a dataset as its manifest.json states it, or ""."""
    try:
        manifest = json.loads((Path(data_path) / "manifest.json").read_text(encoding="utf-8"))
        return (manifest["tokenizer"]["sha256"] or "").lower()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""


def count_bytes(tokens: np.ndarray, tokenizer: spm.SentencePieceProcessor) -> int:
    """UTF-8 bytes of the text that tokens[1:] stand for: of each document what the tokenizer decodes. Unknown pieces
    stand for text that is lost, and count nothing; a letter that was cut at the end counts its bytes."""
    control, byte = (np.array([is_kind(i) for i in range(tokenizer.vocab_size())])
                     for is_kind in (tokenizer.is_control, tokenizer.is_byte))  # fmt: skip
    end = len(tokens)
    while end > 1 and byte[tokens[end - 1]]:
        end -= 1
    whole, unknown = tokens[:end].astype(np.int64), tokenizer.unk_id()
    documents = np.split(whole, np.flatnonzero(control[whole]))
    total = sum(len(tokenizer.decode(document.tolist()).encode()) for document in documents)
    total -= len(tokenizer.decode(whole[:1].tolist()).encode())
    return total + len(tokens) - end - int((whole[1:] == unknown).sum()) * len(tokenizer.decode([unknown]).encode())


class Score:
    """The validation tokens and what turns a loss on them into bits per byte."""

    def __init__(self, c: Config):
        self.tokens, self.partial = load_validation(c)
        tokenizer = load_tokenizer(c.tokenizer_path, c.vocab_size, c.data_path)
        self.bytes = count_bytes(self.tokens, tokenizer)
        self.unknown = int((self.tokens[1:] == tokenizer.unk_id()).sum())
        self.label = f" partial:first_{len(self.tokens) - 1}_tokens" if self.partial else ""
        require(self.bytes, c.data_path, "validation tokens that stand for text", "none: not a byte to score by")

    def bpb(self, loss: float) -> float:
        """Bits per byte of a loss in nats per token."""
        return loss * (len(self.tokens) - 1) / (math.log(2) * self.bytes)

    def notices(self) -> list[str]:
        text = f"notice: {self.unknown} validation tokens are <unk>: their text is lost, and they count as no bytes"
        return [text] if self.unknown else []


def make_smoke_data(c: Config) -> None:
    """Writes shards of Python's own reference, what help("LAMBDA") shows, and a tokenizer for them, so that the smoke
    preset needs nothing."""
    from pydoc_data.topics import topics

    folder, path = Path(c.data_path), Path(c.tokenizer_path)
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    if list(folder.glob("fineweb_*.bin")):  # never replaces a dataset ...
        return
    try:
        if not path.exists():  # ... or a tokenizer
            model = io.BytesIO()
            spm.SentencePieceTrainer.train(sentence_iterator=iter(paragraphs), model_writer=model, model_type="bpe",
                                           vocab_size=c.vocab_size, byte_fallback=True, character_coverage=0.98,
                                           minloglevel=2)  # fmt: skip
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, model.getvalue())
        tokenizer = load_tokenizer(c.tokenizer_path, c.vocab_size)
        folder.mkdir(parents=True, exist_ok=True)
        for split, texts in (("val", paragraphs[:400]), ("train", paragraphs[400:])):
            ids = np.array([i for text in texts for i in [tokenizer.bos_id(), *tokenizer.encode(text)]], dtype="<u2")
            header = struct.pack("<3i", SHARD_MAGIC, SHARD_VERSION, len(ids)).ljust(SHARD_HEADER_BYTES, b"\0")
            write_atomically(folder / f"fineweb_{split}_000000.bin", header + ids.tobytes())
    except RuntimeError:
        require(False, "VOCAB_SIZE", "a few hundred pieces for the smoke text", c.vocab_size)
    except OSError as error:
        where = error.filename or folder
        require(False, where, "a folder to write to", error.strerror, "set DATA_PATH and TOKENIZER_PATH")


def write_atomically(path: Path, content: bytes) -> None:
    """Writes to a temporary name beside `path`, then renames: a reader sees the old file or the new one, never half."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ======================================================================================================================
# ENGINE
# Everything that touches the machine: which device, which processes, compilation, one training step, losses, logits.
# The rest of the script speaks to the `Engine` in NumPy arrays and plain numbers. What runs on a GPU here can be
# confirmed on a Mac only (`make mac`): bfloat16, the attention kernel, mx.compile, mx.async_eval; and several Macs.
# ======================================================================================================================
class Curvature(NamedTuple):
    """How the loss bends, a token, float32; what EXPORT needs of a model beside its weights."""

    hessians: dict[str, np.ndarray]  # of all matrices but the embedding, [in, in]: sum of x x^T of inputs, weighted
    squares: dict[str, np.ndarray]  # of every parameter, its shape: the empirical Fisher information
    tokens: int  # looked at


@mx.custom_function
def with_probe(total: mx.array, x: mx.array, y: mx.array) -> mx.array:
    """Passes y = W x on. Gradient of `total`, zeros [in, in]: the sum over tokens of x x^T, each times the square of
    the loss's gradient at y."""
    return y


@with_probe.vjp
def with_probe_vjp(primals: tuple, grad: mx.array, _: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    x = primals[1].reshape(-1, primals[1].shape[-1]).astype(mx.float32)
    squares = mx.square(grad.astype(mx.float32)).sum(axis=-1).reshape(-1, 1)
    return x.T @ (x * squares), mx.zeros_like(primals[1]), grad


class Engine:
    """A model and its optimizer on the devices of this machine; `rank` of `world` processes (started by mlx.launch)."""

    def __init__(self, c: Config):
        self.config, self.notices = c, []
        have = {"gpu": mx.metal.is_available(), "cpu": True}
        names = [name for name, there in have.items() if there]
        kind = c.device or names[0]
        require(kind in names, "DEVICE", f"one of {', '.join(names)} for MLX on this machine", f'"{kind}"')
        mx.set_default_device(mx.gpu if kind == "gpu" else mx.cpu)
        self.group = mx.distributed.init()
        self.rank, self.world = self.group.rank(), self.group.size()
        self.device_name = str(mx.device_info()["device_name"]) if kind == "gpu" else f"cpu {cpu_name()}"
        self.peak_flops, self.runs_ahead = None, kind == "gpu" and self.world == 1  # step() returns early
        self.dtype = getattr(mx, c.dtype or ("bfloat16" if kind == "gpu" else "float32"))
        self.on_gpu, self.memory, self.largest = kind == "gpu", "", c.microbatch_tokens or 8192
        self.compiled = c.compile and self.on_gpu  # the CPU's fused kernels are slower than its plain ones
        if not self.on_gpu:
            keep_freed_memory()
            if sys.platform == "linux" and not OPENBLAS:
                self.notices.append("notice: libopenblas.so.0 is missing, so matrix products are 20 to 50 times "
                                    "slower: apt install libopenblas0-pthread")  # fmt: skip

    def build(self, weights: dict[str, np.ndarray], training: bool = True) -> None:
        """Makes a model of these weights, with an optimizer where it is to be trained. The weights are `params`; the
        functions below put them into the model whenever they run."""
        self.model = RecurrentGPT(self.config, self.dtype)
        self.optimizer = Optimizer(self.model, self.config) if training else None
        self.functions: dict[tuple[str, int], Callable] = {}
        self.kept: dict[str, mx.array] = {}  # of some parameters what training must not change, else NaN
        self.set_weights(weights)

    def function(self, kind: str, loops: int) -> Callable:
        """A function with so many passes, without side effects, made and compiled once: `losses`, of each token;
        `gradients`, of a share of the mean loss, added to those `held`; `step`, these and the optimizer's update."""

        def losses(params: dict[str, mx.array], ids: mx.array, targets: mx.array) -> mx.array:
            self.model.update(tree_unflatten(list(params.items())))
            return self.model.token_losses(ids, targets, loops)

        def share(params: dict[str, mx.array], ids: mx.array, targets: mx.array) -> mx.array:
            self.model.update(tree_unflatten(list(params.items())))
            return self.model.objective(ids, targets, loops).sum() / self.config.train_batch_tokens

        def gradients(params: dict[str, mx.array], ids: mx.array, targets: mx.array, *held) -> tuple:
            loss, grads = mx.value_and_grad(share)(params, ids, targets)
            if held:
                loss, grads = held[0] + loss, {name: held[1][name] + g for name, g in grads.items()}
            return loss, grads

        def step(params: dict[str, mx.array], last: tuple, held: tuple, state: tuple, numbers: mx.array) -> tuple:
            loss, grads = gradients(params, *last, *held) if last else held
            return loss, *self.optimizer.rule(params, grads, state, numbers)

        if (kind, loops) not in self.functions:
            made = {"losses": losses, "gradients": gradients, "step": step}[kind]
            self.functions[kind, loops] = mx.compile(made) if self.compiled else made
        return self.functions[kind, loops]

    def tensor(self, array: np.ndarray) -> mx.array:
        return mx.array(array.astype(np.int32))

    def step(self, stream: TokenStream, start: int, loops: int, lr_mul: float, momentum: float) -> tuple:
        """One optimizer step on the tokens from `start` on; returns what `read` turns into loss and gradient norm."""
        share = stream.microbatches(start, self.config.train_batch_tokens, self.rank, self.world, self.largest)
        *first, last = ((self.tensor(ids), self.tensor(targets)) for ids, targets in share)
        compute, held = mx.async_eval if self.runs_ahead else mx.eval, ()
        for batch in first if self.world == 1 else (*first, last):
            held = self.function("gradients", loops)(self.params, *batch, *held)
            compute(held)  # or the graphs of all microbatches are held at once
        if self.world > 1:
            last, held = (), self.sum_over_ranks(*held)
        whole = self.function("step", loops)
        loss, norm, self.params = self.optimizer.update(whole, (self.params, last, held), lr_mul, momentum)
        del held  # what nobody else holds may be written into
        self.put_kept()
        self.model.update(tree_unflatten(list(self.params.items())))  # and no longer holds the old ones
        compute(loss, norm, self.params, self.optimizer.buffers())
        return loss, norm

    def keep(self, values: dict[str, np.ndarray]) -> None:
        """From now on the numbers in `values`, by parameter, stay as they are, as do those of earlier calls where these
        are NaN; the rest is trained."""
        for name, value in values.items():
            new = mx.array(value).reshape(self.params[name].shape)
            self.kept[name] = mx.where(mx.isnan(new), self.kept[name], new) if name in self.kept else new
        self.put_kept()

    def put_kept(self) -> None:
        for name, kept in self.kept.items():
            self.params[name] = mx.where(mx.isnan(kept), self.params[name], kept)

    def read(self, results: tuple) -> list[float]:
        """Loss and gradient norm of a step."""
        return [result.item() for result in results]

    def curvature(self, stream: TokenStream, start: int, loops: int, seconds: float = math.inf) -> Curvature:
        """The curvature on CALIB_TOKENS training tokens from `start` on, all passes of the core together; less of them
        where it takes more than `seconds`. Hessians weigh each input with the squares of the loss's gradient at the
        output (GuidedQuant, arXiv 2505.07004); squares are of the gradient of each sequence."""
        linears = {
            name: part for name, part in self.model.named_modules() if isinstance(part, Linear) and name != "tok_emb"
        }
        batch, began, seen = calibration_tokens(self.config, self.world), time.perf_counter(), 0

        def loss(params: dict[str, mx.array], sums: dict[str, mx.array], ids: mx.array, targets: mx.array):
            self.model.update(tree_unflatten(list(params.items())))
            for name, linear in linears.items():
                linear.probe = functools.partial(with_probe, sums[f"{name}.weight"])
            return self.model.token_losses(ids, targets, loops).sum()

        gradients = mx.grad(loss, argnums=(0, 1))
        sums = {f"{name}.weight": mx.zeros((part.weight.shape[1],) * 2) for name, part in linears.items()}
        squares, hessians = {name: mx.zeros(p.shape) for name, p in self.params.items()}, dict(sums)
        try:
            for ids, targets in stream.microbatches(start, batch, self.rank, self.world, self.config.train_seq_len):
                grads, probed = gradients(self.params, sums, self.tensor(ids), self.tensor(targets))
                squares = {name: total + mx.square(grads[name]) for name, total in squares.items()}
                hessians = {name: total + probed[name] for name, total in hessians.items()}
                mx.eval(squares, hessians)
                seen += ids.size
                if time.perf_counter() - began > seconds:
                    break
        finally:
            for linear in linears.values():
                linear.probe = None
        tokens = int(self.gather([seen]).sum())
        return Curvature(self.mean_over_ranks(hessians, tokens), self.mean_over_ranks(squares, tokens), tokens)

    def mean_over_ranks(self, totals: dict[str, mx.array], tokens: int) -> dict[str, np.ndarray]:
        """Sums of all processes over the number of tokens."""
        if self.world > 1:
            for name, total in totals.items():
                totals[name] = mx.distributed.all_sum(total, group=self.group, stream=mx.cpu)
        return {name: np.array(total) / tokens for name, total in totals.items()}

    def sum_over_ranks(self, total: mx.array, grads: dict[str, mx.array]) -> tuple[mx.array, dict[str, mx.array]]:
        """Loss and gradients of all processes, in one message."""
        flat = mx.concatenate([total.reshape(1), *(g.reshape(-1) for g in grads.values())])
        flat = mx.distributed.all_sum(flat, group=self.group, stream=mx.cpu)
        ends = np.cumsum([1, *(g.size for g in grads.values())]).tolist()
        parts = mx.split(flat, ends[:-1])
        return parts[0][0], {name: part.reshape(g.shape) for part, (name, g) in zip(parts[1:], grads.items())}

    def warm_up(self, stream: TokenStream, loops: int, times: int = 1) -> None:
        """Compiles and runs everything that a step with so many passes needs; leaves weights and state as they were."""
        o = self.optimizer
        kept = self.params, o.exp_avg, o.exp_avg_sq, o.momentum, o.steps
        for _ in range(times):
            self.step(stream, 0, loops, 1.0, 0.0)
        self.params, o.exp_avg, o.exp_avg_sq, o.momentum, o.steps = kept
        self.sync()

    def token_losses(self, ids: np.ndarray, targets: np.ndarray, loops: int) -> np.ndarray:
        """float32 [n, t]."""
        return np.array(self.function("losses", loops)(self.params, self.tensor(ids), self.tensor(targets)))

    def next_logits(self, ids: np.ndarray, loops: int) -> np.ndarray:
        """Logits after the last of `ids`, float32 [vocab]."""
        self.model.update(tree_unflatten(list(self.params.items())))
        return np.array(self.model(self.tensor(ids[None]), loops)[0, -1])

    def weights(self) -> dict[str, np.ndarray]:
        return {name: np.array(p) for name, p in self.params.items()}

    def set_weights(self, weights: dict[str, np.ndarray]) -> None:
        self.params = {name: mx.array(weights[name]) for name, _ in tree_flatten(self.model.parameters())}

    def gather(self, values: list[float]) -> np.ndarray:
        """The numbers of all processes, float64 [world, n]; they travel as bits, since MLX sums float32 at most."""
        bits = mx.array(np.array([values], np.float64).view(np.uint32))
        return np.array(mx.distributed.all_gather(bits, group=self.group, stream=mx.cpu)).view(np.float64)

    def exchange(self, text: str) -> list[str]:
        """The texts of all processes, in the order of their ranks."""
        data = text.encode()
        sizes = self.gather([len(data)]).astype(int).ravel()
        longest = -(-int(sizes.max()) // 8) * 8
        rows = self.gather(np.frombuffer(data.ljust(longest), np.float64))
        return [row.tobytes()[:size].decode() for row, size in zip(rows, sizes)]

    def sync(self) -> None:
        """Waits until the device has done all its work."""
        mx.synchronize()

    def peak_memory(self) -> int:
        """Bytes: of MLX on the GPU, or of the process on a CPU."""
        return mx.get_peak_memory() if self.on_gpu else peak_process_memory()

    def close(self, code: int) -> None:
        """Nothing to do here."""


def keep_freed_memory() -> None:
    """Tells glibc to keep large freed blocks: activations are freed every step and would be cleared page by page."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# ======================================================================================================================
# TRAIN [shared]
# The loop reads the loss of a step only after it has launched the next, so that a GPU never waits for Python. The clock
# counts training alone: compilation comes before it, validation and checkpoints stop it. Whatever a process could see
# differently from the others (clock, disk, environment) is decided by the first or agreed on by all.
# ======================================================================================================================
class Agreed(InputError):
    """An InputError that every process raises at the same place, so that only the first prints it."""


def together(engine: Engine, work: Callable[[], object], first_only: bool = False) -> object:
    """`work()` on every process; what one of them refuses, all refuse. With `first_only` the first alone does it, and
    all get its result (JSON)."""
    result, refusal = None, ""
    if engine.rank == 0 or not first_only:
        try:
            result = work()
        except InputError as error:
            refusal = str(error)
    said = engine.exchange(json.dumps([result if first_only else None, refusal]))
    for line in said:
        if refusal := json.loads(line)[1]:
            raise Agreed(refusal)
    return json.loads(said[0])[0] if first_only else result


def must_agree(engine: Engine, facts: dict) -> None:
    """Raises Agreed where a process has another fact than the first: its host's environment may give it settings."""
    said = [json.loads(text) for text in engine.exchange(json.dumps(facts))]
    for rank, theirs in enumerate(said):
        for name, value in theirs.items():
            if value != said[0][name]:
                raise Agreed(f"{name.upper()}: expected {said[0][name]}, as process 0 has, found {value} on {rank}")


def share_out(engine: Engine, work: Callable[[list[str]], object], sizes: dict[str, int]) -> list[object]:
    """`work(names)` on every process for its part of the names, the large ones dealt out first; all get all results."""
    names, found, refusal = sorted(sizes, key=sizes.get, reverse=True), None, ""
    try:
        found = work(names[engine.rank :: engine.world])
    except InputError as error:
        refusal = str(error)
    said = engine.exchange(base64.b64encode(pickle.dumps((found, refusal))).decode()) if engine.world > 1 else []
    results = [pickle.loads(base64.b64decode(text)) for text in said] or [(found, refusal)]
    for _, refusal in results:
        if refusal:
            raise Agreed(refusal)
    return [found for found, _ in results]


class StopSignal:
    """Turns SIGTERM, SIGHUP and Ctrl-C into a flag that the loop reads. A second Ctrl-C ends the process at once; the
    other two may come twice for one event, from a job system and torchrun, or from a terminal and its shell. Under
    nohup a closed terminal is nothing to stop for."""

    def __init__(self):
        self.number = 0
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        for number in (signal.SIGTERM, signal.SIGINT, *([] if nohup else [signal.SIGHUP])):
            signal.signal(number, self.note)

    def note(self, number, frame) -> None:
        self.number = self.number or number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)


@dataclass
class TrainState:
    """Where a run is; kept in its checkpoint."""

    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0  # of training
    loops: int = 0  # passes scheduled; 0 before the first step
    scored: int = 0  # step of the last validation
    parts: int = 0  # of the columns, rounded so far (ROUND_FROM)


class Launched(NamedTuple):
    """A step that the device may still be working on."""

    step: int
    passes: int  # of this step, which LOOP_SAMPLE may have drawn
    flops: float  # of training up to its end
    lr_mul: float
    results: tuple  # what `Engine.read` turns into loss and gradient norm
    seconds: float


def evaluate(c: Config, engine: Engine, tokens: np.ndarray, loops: int, stop: StopSignal | None = None) -> float | None:
    """Mean cross-entropy in nats over tokens[1:]; None where a signal ended it. With EVAL_STRIDE windows overlap and
    every window but the first scores its last EVAL_STRIDE tokens only: each token is scored once, with more context."""
    length, stride, total = c.train_seq_len, c.eval_stride or c.train_seq_len, 0.0
    starts = np.arange(0, len(tokens) - length, stride)
    low, high = split_evenly(len(starts), engine.world)[engine.rank]  # may be none: then only the sum is taken part in
    share = max(c.train_batch_tokens // length // engine.world, 1)  # microbatches of training's shape
    rows = max(b - a for a, b in microbatch_bounds(share, length, engine.largest))
    for a in range(low, high, rows):
        if stop and stop.number:
            break
        batch = starts[np.minimum(np.arange(a, a + rows), high - 1)]  # filled up with the last window
        windows = tokens[batch[:, None] + np.arange(length + 1)].astype(np.int64)
        losses = engine.token_losses(windows[:, :-1], windows[:, 1:], loops).astype(np.float64)
        total += sum(row[0 if s == 0 else length - stride :].sum() for s, row in zip(batch[: high - a], losses))
    total, stopped = engine.gather([total, bool(stop and stop.number)]).sum(axis=0).tolist()
    return None if stopped else total / (len(tokens) - 1)


class Run:
    """One run: what it works with, and the training loop, from the state it is given to the end of a budget or a
    signal."""

    def __init__(self, c: Config, engine: Engine, score: Score, stream: TokenStream, state: TrainState,
                 stop: StopSignal | None, notices: list[str]):  # fmt: skip
        name = together(engine, lambda: c.run_id or run_name(c), first_only=True)
        self.config = c = dataclasses.replace(c, run_id=name)
        self.engine, self.score, self.stream, self.state, self.stop = engine, score, stream, state, stop
        self.log = together(engine, lambda: RunLog(c, engine.rank))
        self.launched: Launched | None = None
        self.rounding: Rounding | None = None
        self.saved = state.step  # step of the last checkpoint
        self.restart_clock(state.seconds)
        write_head(self, [*notices, *engine.notices, *score.notices()])

    def restart_clock(self, seconds: float) -> None:
        """The clock of training goes on from `seconds`; whatever came since it was read does not count."""
        self.started = time.perf_counter() - seconds
        self.logged = (self.state.step, seconds, self.state.flops)  # rates are taken from here on
        self.before = seconds  # when the loop last looked: a step ago

    def clock(self) -> tuple[float, bool]:
        """(seconds of training, whether a signal came), the same on every process."""
        rows = self.engine.gather([time.perf_counter() - self.started, bool(self.stop.number)])
        return rows[0, 0].item(), bool(rows[:, 1].any())

    def train(self) -> bool:
        """Trains until a budget is used up (True) or a signal comes (False)."""
        c, state = self.config, self.state
        while True:
            seconds, stopped = self.clock()
            at = progress_of(c, state.step, seconds, state.flops)
            loops = loops_at(c, at)
            passes = draw_loops(c, loops, state.step)
            flops = train_flops_per_token(c, passes) * c.train_batch_tokens
            done = self.is_done(at, seconds, flops)
            self.before = seconds
            ends = done or stopped
            switches = not ends and state.loops not in (0, loops)
            whole = True
            if ends or switches or self.scores_now() or self.saves_now():
                whole = self.pause(loops, ends, switches)
            if ends:
                return done
            if whole and not round_more(self, at):  # which takes time and FLOPs
                self.launch(at, loops, passes, flops)

    def is_done(self, at: float, seconds: float, flops: float) -> bool:
        """Whether a budget is used up, or would be by one more step."""
        c, state = self.config, self.state
        average = seconds * flops / state.flops if state.flops else 0.0  # of a step with so many passes
        pace = max(average, seconds - self.before)  # rather a step too few than one too late
        cap = seconds_to_train(c)
        late = cap and seconds + pace * (1 + self.engine.runs_ahead) > cap  # the last step may still be under way
        return bool(at >= 1 or late or (c.max_train_flops and state.flops + flops > c.max_train_flops))

    def scores_now(self) -> bool:
        every, step = self.config.val_loss_every, self.state.step
        return bool(every and step % every == 0 and step > self.state.scored)

    def saves_now(self) -> bool:
        every, step = self.config.checkpoint_every, self.state.step
        return bool(every and step % every == 0 and step > self.saved)

    def pause(self, loops: int, ends: bool, switches: bool) -> bool:
        """Stops the clock for what is not training: validation, a checkpoint, a line about a switch. False where a
        signal cut the validation short."""
        c, state, log, whole = self.config, self.state, self.log, True
        self.read_launched()
        self.engine.sync()
        seconds, _ = self.clock()
        state.seconds = seconds
        if not ends and self.scores_now():
            loss = evaluate(c, self.engine, self.score.tokens, state.loops, self.stop)
            whole = loss is not None
            if whole:
                state.scored = state.step
                write_score(self, loss, state.loops)
        if ends or self.saves_now():
            state.loops = state.loops or loops  # none are in use before the first step
            if save_checkpoint(c, self.engine, log, state, self.rounding.tensors if self.rounding else {}):
                self.saved = state.step
        if switches and whole:
            line = f"step:{state.step}/{c.iterations} loops:{state.loops}->{loops} train_time:{1000 * seconds:.0f}ms"
            log.line(line)
        self.restart_clock(seconds)
        return whole

    def launch(self, at: float, loops: int, passes: int, flops: float) -> None:
        """Starts the next step, of `passes`, where `loops` are scheduled; then reads and logs the one before."""
        c, state = self.config, self.state
        epoch = state.tokens // self.stream.total
        if state.step and epoch > (state.tokens - c.train_batch_tokens) // self.stream.total:
            again = f"epoch:{epoch + 1} the {self.stream.total} training tokens are read again"
            self.log.line(f"step:{state.step}/{c.iterations} {again}")
        lr_mul = lr_mul_at(c, state.step, at)
        results = self.engine.step(self.stream, state.tokens, passes, lr_mul, momentum_at(c, state.step))
        state.step += 1
        state.tokens += c.train_batch_tokens
        state.flops += flops
        state.loops = loops
        self.read_launched()
        seconds = time.perf_counter() - self.started
        self.launched = Launched(state.step, passes, state.flops, lr_mul, results, seconds)

    def read_launched(self) -> None:
        """Waits for the step launched last, checks it and logs it."""
        if self.launched is None:
            return
        c, one, self.launched = self.config, self.launched, None
        loss, norm = self.engine.read(one.results)
        finite, found = math.isfinite(loss) and math.isfinite(norm), f"loss {loss} and norm {norm}"
        mend = "lower MATRIX_LR and SCALAR_LR, or set GRAD_CLIP_NORM=1 or LR_WARMUP_STEPS=20"
        if not finite:  # the same on every process
            raise Agreed(f"step {one.step}: expected a finite loss and gradient norm, found {found}; {mend}")
        seconds = time.perf_counter() - self.started if self.engine.runs_ahead else one.seconds
        at = progress_of(c, one.step, seconds, one.flops)
        rate = (one.step - self.logged[0]) * c.train_batch_tokens / max(seconds - self.logged[1], 1e-9)
        left = "{}m{:02d}s".format(*divmod(int(seconds * (1 - at) / max(at, 1e-9)), 60))
        self.log.progress(at, f"step {one.step} loss {loss:.4f} loops {one.passes} {rate:,.0f} tok/s, {left} left")
        if one.step <= 10 or (c.train_log_every and one.step % c.train_log_every == 0):
            self.write_step(one, loss, norm, seconds, rate, left)
            self.logged = (one.step, seconds, one.flops)

    def write_step(self, one: Launched, loss: float, norm: float, seconds: float, rate: float, left: str) -> None:
        """A line in the challenge's keys, and the same in metrics.jsonl."""
        c, ms = self.config, 1000 * seconds
        peak = (self.engine.peak_flops or 0) * self.engine.world
        flops = one.flops - self.logged[2]  # since the last line: passes may differ from step to step
        mfu = f" mfu:{flops / max(seconds - self.logged[1], 1e-9) / peak:.3f}" if peak else ""
        self.log.line(
            f"step:{one.step}/{c.iterations} train_loss:{loss:.4f} loops:{one.passes} lr_mul:{one.lr_mul:.3f} "
            f"grad_norm:{norm:.2f} train_time:{ms:.0f}ms step_avg:{ms / one.step:.2f}ms "
            f"tok_s:{rate:.0f}{mfu} left:{left}"
        )
        tokens = one.step * c.train_batch_tokens
        self.log.metrics(step=one.step, train_loss=loss, loops=one.passes, lr_mul=one.lr_mul, grad_norm=norm,
                         train_time_ms=ms, tokens=tokens, flops=one.flops, tok_s=rate)  # fmt: skip


def train(c: Config, engine: Engine, notices: list[str]) -> int:
    """A whole run: checks, compilation (for MODE=preflight no more), training, export, score. Returns the exit code."""
    stop, warmed, began = StopSignal(), {}, time.perf_counter()  # from here on a signal ends in a checkpoint
    notices = notices + together(engine, lambda: prepare(c), first_only=True)
    score = together(engine, lambda: Score(c))
    stream = together(engine, lambda: TokenStream(find_shards(c.data_path, "train", c.vocab_size), c))
    must_agree(engine, {"data": dataset_sha256(c)})
    sequences, needed = c.train_batch_tokens // c.train_seq_len, f"a sequence for each of {engine.world} processes"
    together(engine, lambda: require(sequences >= engine.world, "TRAIN_BATCH_TOKENS", needed, sequences))
    weights, optimizer_state, rounded, state = together(engine, lambda: starting_point(c))
    must_agree(engine, {"start": weights_sha256(weights), "step": state.step})
    run = Run(c, engine, score, stream, state, stop, notices)
    with run.log.noting_crashes():
        engine.build(weights)
        if optimizer_state:
            engine.optimizer.load_state(optimizer_state, state.step)
            resume_rounding(run, rounded)
            run.log.forget_after(state)
            run.log.line(f"resume: from step:{state.step}; later steps above are of the interrupted run, done again")
        for loops in loop_counts(c):
            if not run.clock()[1]:
                warmed[loops] = seconds_of(engine, engine.warm_up, stream, loops)
                run.log.line(f"warm_up: loops:{loops} {warmed[loops]:.1f}s")
        if c.mode == "preflight":
            if run.clock()[1]:
                return 128 + (stop.number or signal.SIGTERM)
            return preflight(run, warmed, time.perf_counter() - began)
        run.restart_clock(state.seconds)
        done = run.train()
        if done and not state.step:  # the same on every process
            budgets, mend = "MAX_TRAIN_FLOPS, MAX_WALLCLOCK_SECONDS", "raise it, and set another RUN_ID"
            raise Agreed(f"{budgets}: expected enough for a step, found less; {mend}")
        if done and (code := finish(run)) is not None:
            return code
        return stopped(run)


def prepare(c: Config) -> list[str]:
    """What the first process does before a run: checks what would fail late, makes the smoke text. Returns notices."""
    notices = check_before_start(c)
    paths = {f"data_path={c.data_path}", f"tokenizer_path={c.tokenizer_path}"}
    if c.preset == "smoke" and paths <= set(PRESETS["smoke"].split()):  # elsewhere it is for the user to make some
        make_smoke_data(c)
    return notices


def starting_point(c: Config) -> tuple[dict, dict, dict, TrainState]:
    """(weights, optimizer state, what ROUND_FROM keeps, state) of a new run, or of a resumed one."""
    if c.resume:
        return load_checkpoint(c, Path(c.log_dir) / c.run_id / CHECKPOINT)
    if c.init_from:
        weights, model, _ = load_model_file(c.init_from)
        return transfer_weights(c, weights, model), {}, {}, TrainState()
    return initial_weights(c), {}, {}, TrainState()


def stopped(run: Run) -> int:
    """The end of a run that a signal stopped; its checkpoint is written, if it can be. Returns the exit code."""
    write_result(run, {})
    step, log = run.state.step, run.log
    again = f", from step {run.saved}" if run.saved < step and log.checkpoint.is_file() else ""
    log.line(f"stopped by a signal after step {step}; {log.advice()}{again}")
    return 128 + (run.stop.number or signal.SIGTERM)


def write_score(run: Run, loss: float, loops: int) -> None:
    c, state, score = run.config, run.state, run.score
    step, ms, bpb = state.step, 1000 * state.seconds, score.bpb(loss)
    run.log.line(f"step:{step}/{c.iterations} val_loss:{loss:.4f} val_bpb:{bpb:.4f} train_time:{ms:.0f}ms "
                 f"step_avg:{ms / max(step, 1):.2f}ms loops:{loops}{score.label}")  # fmt: skip
    run.log.metrics(step=step, val_loss=loss, val_bpb=bpb, loops=loops, train_time_ms=ms, tokens=state.tokens,
                    flops=state.flops, partial=score.partial)  # fmt: skip


def weights_sha256(weights: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(name.encode() + np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def about(c: Config, loops: int) -> dict:
    """What a file of weights says of itself."""
    return {"model": {name: getattr(c, name) for name in MODEL_FIELDS}, "loops": loops}


def identity(c: Config) -> dict:
    """What a run must share with the checkpoint that it goes on from."""
    return {"config_sha256": config_sha256(c), "seed": c.seed, "data": dataset_sha256(c)}


def save_checkpoint(c: Config, engine: Engine, log: RunLog, state: TrainState, rounded: dict[str, np.ndarray]) -> bool:
    """Weights, optimizer state, what ROUND_FROM keeps, place in the data and clock: enough to go on as if nothing had
    happened. Where it cannot be written (False), training goes on."""
    if engine.rank:
        return True
    tensors = {f"weights.{name}": value for name, value in engine.weights().items()} | engine.optimizer.state()
    tensors |= {f"rounding.{name}": value for name, value in rounded.items()}
    note = about(c, state.loops) | {"state": dataclasses.asdict(state) | identity(c)}
    try:
        save_tensors(log.checkpoint, tensors, note)
    except OSError as error:
        log.line(f"notice: no checkpoint at step {state.step}: {error.strerror or error}; going on")
        return False
    return True


def load_checkpoint(c: Config, path: Path) -> tuple[dict, dict, dict, TrainState]:
    """(weights, optimizer state, what ROUND_FROM keeps, training state) for RESUME=1. Raises InputError if it is of
    another configuration."""
    none = "without RESUME set another RUN_ID, or delete the folder"
    require(path.is_file(), path, "a checkpoint to go on from", "none", none)
    tensors, note = load_tensors(path)
    weights, model, _ = read_weights(path, tensors, note)
    mend = "resume with the run's own settings (its train.log states them), or use INIT_FROM in a new run"
    for name in MODEL_FIELDS:
        require(model[name] == getattr(c, name), path, f"{name.upper()}={getattr(c, name)}", model[name], mend)
    found, mine = note["state"] if isinstance(note.get("state"), dict) else {}, identity(c)
    fields = [field.name for field in dataclasses.fields(TrainState)]
    whole, another = {*fields, *mine} <= found.keys(), "that of another version" if found else "weights only"
    require(whole, path, "a checkpoint with training state", another, "use INIT_FROM")
    for name, value in mine.items():
        require(found[name] == value, path, f"the {name} that it was trained with", f"{found[name]}, not {value}", mend)
    kept = {name: value for name, value in tensors.items() if not name.startswith(("weights.", "rounding."))}
    state = TrainState(**{name: found[name] for name in fields})
    rounded = {name[len("rounding.") :]: value for name, value in tensors.items() if name.startswith("rounding.")}
    same = {name: value.shape for name, value in kept.items()} == optimizer_buffers(c)
    same &= {name: value.shape for name, value in rounded.items()} == (rounding_shapes(c) if state.parts else {})
    require(same, path, "the training state of its layout", "another", mend)
    return weights, kept, rounded, state


def model_config(c: Config, model: dict) -> Config:
    """`c` with the model settings of a file. Raises InputError if they are not those of a model."""
    others = ", ".join(sorted(model.keys() - set(MODEL_FIELDS)))
    mend = "use the scripts of its own commit"
    require(not others, "model settings", "those that this version knows", others, mend)
    fields = {name: model.get(name) for name in MODEL_FIELDS}
    for name, value in fields.items():
        kind = type(getattr(Config, name))
        require(type(value) is kind, name, f"a {kind.__name__}", repr(value))
    found = dataclasses.replace(c, **fields, train_batch_tokens=fields["train_seq_len"], loop_schedule="",
                                loop_sample=0, exit_weight=0.0)  # fmt: skip
    check_config(found)
    return dataclasses.replace(found, train_batch_tokens=c.train_batch_tokens)


def save_tensors(path: Path, tensors: dict[str, np.ndarray], note: dict) -> None:
    """A safetensors file with a JSON note, written atomically."""
    write_atomically(path, pack_tensors(tensors, metadata={"recurrent_gpt": json.dumps(note)}))


def load_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """The opposite of `save_tensors`. Raises InputError."""
    data, expected = path.read_bytes(), "expected a checkpoint of this project, found a damaged or foreign file"
    try:
        head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        note = json.loads(head["__metadata__"]["recurrent_gpt"])
        return parse_tensors(data), note | {"loops": int(note["loops"]), "model": known_options(note["model"])}
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, MemoryError,
            RecursionError) as error:  # fmt: skip
        raise InputError(f"{path}: {expected} ({str(error)[:80] or type(error).__name__})") from None


def known_options(model: dict) -> dict:
    """The model settings of a file as of today: older ones lack what came later, and may state an `inject` of none."""
    later = dict(xsa=False, pass_vectors=False, rotary_dims=0, norm_scale=False, mlp_slope=0.0)
    return later | {name: value for name, value in model.items() if (name, value) != ("inject", "none")}


def load_model_file(path: str) -> tuple[dict[str, np.ndarray], dict, int]:
    """(weights, model settings, passes) of an artifact, a checkpoint or a model.safetensors. Raises InputError."""
    require(Path(path).is_file(), path, "an artifact or a checkpoint", "no file")
    with open(path, "rb") as file:
        is_artifact = file.read(4) == ARTIFACT_MAGIC or path.endswith(".rgpt")
    if is_artifact:
        found = read_artifact(Path(path))
        return found.weights, found.model, found.loops
    return read_weights(path, *load_tensors(Path(path)))


def read_weights(path: object, tensors: dict[str, np.ndarray], note: dict) -> tuple[dict[str, np.ndarray], dict, int]:
    """(weights, model settings, passes) in what `load_tensors` has read. Raises InputError."""
    weights = {name.removeprefix("weights."): value for name, value in tensors.items() if name.startswith("weights.")}
    try:
        c = model_config(Config(), note["model"])
        same = {name: value.shape for name, value in weights.items()} == param_shapes(c)
        require(same, "tensors", f"those of LAYOUT={c.layout}", "others")
        require(0 <= note["loops"] <= parse_layout(c.layout).loops, "loops", "passes of its layout", note["loops"])
    except InputError as error:
        raise InputError(f"{path}: {error}; the file is damaged or of another version") from None
    return weights, note["model"], note["loops"] or parse_layout(c.layout).loops


# ======================================================================================================================
# EXPORT [shared]
# From weights and curvature to bytes and back. Every tensor is a table of integers with a step for each row and column;
# the integers are entropy-coded (ANS) with a distribution whose width the decoder knows from the steps. `absmax`: int6,
# a row's steps span its largest weight. `trellis`: steps as wide as the loss allows (Fisher information), columns
# rounded one by one with the errors made up for (GPTQ, arXiv 2210.17323), integers on a trellis (Ungerboeck 1982).
# One file: magic, version, length of the header, header (JSON, deflated), the code of all tensors, SHA-256 of all
# before. Reading runs no code of the file.
# ======================================================================================================================
ARTIFACT_MAGIC, ARTIFACT_VERSION, ARTIFACT_HEAD = b"RGPT", 8, struct.Struct("<4sII")
LARGEST_HEADER = 1 << 20  # bytes, unpacked
LARGEST_SYMBOL, LARGEST_EXPONENT = 2**15 - 1, 480  # of the integers, and of the steps in quarter octaves
INT6, INT8, FINE = 31, 127, 2047  # absmax, largest integer: of matrices; embedding and LoRA; vectors
DEFAULT_LOSS = 0.005  # nats a token, where QUANT_LOSS is 0
# 2 ** (exponent / 4) is one of these times a power of two, equal on every platform.
QUARTERS = np.float32([1.0, 1.1892071, 1.4142135, 1.6817929])
LARGEST_NUMBER = 1e30  # of weights and gradients
WEIGHTS_A_BYTE = 256  # at most in a file: a reader looks before it makes anything of that size
LEAST_BITS = {"absmax": 4.5, "trellis": 0.7}  # a weight, all included: less was never seen ...
LIKELY_BITS = {"absmax": 6.3, "trellis": 4.0}  # ... and seldom more
# Of the mean curvature: no row counts for less. A calibration knows little of rare tokens, and their loss is no
# parabola; ten times less costs up to twice as much (tests/fit_floor.py, records/rare_rows).
ROW_FLOOR = 0.01
IDLE_GATE = 0.1  # of a pass that is paid for and not used (records/does_recurrence_pay)
FEW_BITS = 3.0  # a weight; below, fewer parameters are better once they are well trained (records/ablations/mini_bits)


class Table(NamedTuple):
    """A tensor [n, m] as it is coded: element (i, j) is 2 ** ((rows[i] + columns[j]) / 4) times the level of its
    integer k, which is k or, where a trellis is in an odd state, k - sign(k) / 2."""

    rows: np.ndarray  # int16 [n]: steps of the rows, as exponents in quarter octaves
    columns: np.ndarray  # int16 [m]: steps of the columns, likewise
    middles: np.ndarray  # int16 [n]: the median of a vector's integers, taken off before coding; 0 for a matrix
    symbols: np.ndarray  # int16 [n, m]: the integers


class Factor(NamedTuple):
    """What GPTQ needs of a Hessian over its mean diagonal."""

    order: np.ndarray  # of the columns: the largest inputs come first
    upper: np.ndarray  # float32 [m, m]: upper Cholesky factor of the damped inverse


class Export(NamedTuple):
    """An artifact's bytes and what is said of them."""

    data: bytes
    tables: dict[str, Table]
    size: int
    bits_per_weight: float  # of the coded matrices, with their steps
    loss_aimed: float  # trellis: nats a token that rounding would add if the Fisher information were all
    rounds: int  # how often it was coded; with ROUND_FROM how often its bytes were reckoned
    plain_rounded: int  # matrices whose Hessian could not be used


class Artifact(NamedTuple):
    """An artifact as read."""

    model: dict  # MODEL_FIELDS
    loops: int  # passes trained
    quantizer: str
    weights: dict[str, np.ndarray]  # float32
    bits: dict[str, float]  # of each tensor in the file


def check_export(c: Config) -> None:
    trellis = calibrates(c)
    for name in ("target_bytes", "quant_loss", "round_from"):
        value = getattr(c, name)
        require(trellis or not value, name.upper(), "0 with QUANTIZER=absmax", value, "set QUANTIZER=trellis")
    mend = "set TARGET_BYTES=0, or leave the other out"
    require(not (c.quant_loss and c.target_bytes), "TARGET_BYTES", "no QUANT_LOSS beside it", c.quant_loss, mend)
    cap = f"at most BYTES_CAP={c.bytes_cap}"
    require(c.target_bytes <= c.bytes_cap, "TARGET_BYTES", cap, c.target_bytes)
    enough = not trellis or c.mode not in TRAINS or c.calib_tokens >= c.train_seq_len
    require(enough, "CALIB_TOKENS", f"at least TRAIN_SEQ_LEN={c.train_seq_len}", c.calib_tokens)


def calibrates(c: Config) -> bool:
    """Whether the export needs the curvature."""
    return c.quantizer == "trellis"


def export_seconds(c: Config) -> float:
    """Seconds of MAX_WALLCLOCK_SECONDS that are kept for what looks at training tokens after training; with ROUND_FROM
    it is done in training."""
    return c.calib_seconds if calibrates(c) and not c.round_from else 0.0


def calibration_tokens(c: Config, world: int) -> int:
    """CALIB_TOKENS in whole sequences, at least one a process."""
    return max(c.calib_tokens // c.train_seq_len, world) * c.train_seq_len


def check_before_start(c: Config) -> list[str]:
    """Refuses what would fail after training; returns notices."""
    code, cap = code_size(c.count_code), c.target_bytes or c.bytes_cap
    least, likely = (count_params(c) * bits[c.quantizer] / 8 for bits in (LEAST_BITS, LIKELY_BITS))
    name = "TARGET_BYTES" if c.target_bytes else "BYTES_CAP"
    lacking = " and ".join(["QUANTIZER=trellis"] * (not calibrates(c)) + ["TARGET_BYTES"] * (not c.target_bytes))
    advice = "lower MODEL_DIM, MLP_MULT or the number of blocks" + f", or set {lacking}" * bool(lacking)
    expected = f"code + artifact within {cap} bytes"
    require(code + least <= cap, name, expected, f"{code} + at least {least:.0f}", advice)
    if code + likely <= cap or c.target_bytes:
        return []
    return [f"notice: the artifact may exceed the cap: {code} + about {likely:.0f} of {cap} bytes; {advice}"]


def is_vector(name: str) -> bool:
    return param_group(name) in ("scalar", "gate")


def powers(exponents: np.ndarray) -> np.ndarray:
    """float32 2 ** (exponents / 4)."""
    return np.ldexp(QUARTERS[exponents % 4], (exponents // 4).astype(np.int32))


def spanning_steps(name: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps of the rows [n] and columns [m] (all 1), of which so many span the largest number of a row."""
    tops = {"matrix": INT6, "lora": INT8, "embed": INT8}
    largest = np.abs(values).max(axis=1).astype(np.float64)
    rows = np.ceil(4 * np.log2(np.maximum(largest, 1e-30) / tops.get(param_group(name), FINE)))
    rows[largest == 0] = rows.max()  # whatever is nearest to the others
    return rows.astype(np.int16), np.zeros(values.shape[1], np.int16)


def width_of(quant_loss: float, weights: int) -> float:
    """Steps are this over the root of the curvature. A step s wide costs curvature * s ** 2 / 24 on average, on a
    trellis TRELLIS_GAIN of that, so all weights together TRELLIS_GAIN * weights * width ** 2 / 24."""
    return math.sqrt(24 * quant_loss / (TRELLIS_GAIN * max(weights, 1)))


def finest_steps(largest: np.ndarray) -> np.ndarray:
    """Exponents of rows [n] whose largest numbers, in steps of the columns, may double and still be integers."""
    return np.ceil(4 * np.log2(np.maximum(2 * largest / (LARGEST_SYMBOL - 4), 1e-30)))


class Bends(NamedTuple):
    """How the loss bends along a tensor [n, m]."""

    rows: np.ndarray  # log2 of the curvature, float64 [n]
    columns: np.ndarray  # steps of the columns that follow from it, int16 [m]
    used: np.ndarray  # bool [n]; not so a vector's row of a pass that never ran


def bends_of(name: str, squares: np.ndarray, factor: Factor | None) -> Bends:
    """Curvature of a row: its mean Fisher information, `squares` [n, m]. Of a column: what its input adds to those
    after it, where GPTQ makes up for errors (the factor's diagonal), else its mean Fisher information, too; columns of
    vectors are alike."""
    of_rows, of_columns = (squares.mean(axis=axis, dtype=np.float64) for axis in (1, 0))
    mean = max(of_rows.mean(), 1e-30)
    of_rows, of_columns = of_rows + ROW_FLOOR * mean, of_columns / mean + 1e-3  # what few tokens touched is not free
    if factor is not None:
        of_columns[factor.order] = np.diag(factor.upper).astype(np.float64) ** -2
    columns = np.clip(np.rint(-2 * np.log2(of_columns)), -160, 160) * (not is_vector(name))  # 2 ** 40 either way
    return Bends(np.log2(of_rows), columns.astype(np.int16), squares.any(axis=1) | (not is_vector(name)))


def loss_steps(values: np.ndarray, bends: Bends, width: float) -> tuple[np.ndarray, np.ndarray]:
    """Steps of rows [n] and columns [m], about `width` over the root of the curvature of the loss along each weight,
    which spends every bit where it buys most (reverse water-filling)."""
    largest = (np.abs(values) * np.exp2(-bends.columns / 4)).max(axis=1)  # in steps of the columns; GPTQ may double it
    squared = float(np.square(values, dtype=np.float64).mean())
    widest = 2 * math.log2(max(squared, 1e-24)) + 16  # 16 times the typical weight: all zeros from there on
    widest = np.where(bends.used, widest, widest - 32)  # what never ran is kept: another number of passes may use it
    rows = np.maximum(np.rint(np.minimum(4 * math.log2(width) - 2 * bends.rows, widest)), finest_steps(largest))
    return np.maximum(rows, -LARGEST_EXPONENT).astype(np.int16), bends.columns


def gptq_factor(hessian: np.ndarray) -> Factor | None:
    """0.01 is added to the diagonal, or more where rounded products of inputs that are nearly alike are no Hessian;
    None where that does not help."""
    diagonal = np.diag(hessian).astype(np.float64)
    order, mean = np.argsort(-diagonal, kind="stable"), max(diagonal.mean(), 1e-30)
    damped = (hessian + hessian.T)[np.ix_(order, order)] / (2 * mean)
    for more in (0.01, 0.1, 1.0, 10.0):
        damped[np.diag_indices_from(damped)] += more
        with contextlib.suppress(np.linalg.LinAlgError):
            inverse = np.linalg.inv(damped)
            return Factor(order, np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32))
    return None


# A trellis starts anew every TRELLIS rows. Its code is Ungerboeck's of 64 states (1982, octal 103 and 024; halved
# here). NEXT_STATE[state, parity of the integer]; CAME_FROM[state, parity of the integer]: the state before. In a state
# whose lowest bit is set an integer k stands for the level k - sign(k) / 2. The gain: tests/fit_spread.py.
TRELLIS, TRELLIS_GAIN, STATES = 256, 0.7, np.arange(64)[:, None]
NEXT_STATE = (STATES >> 1 ^ 0o41 * (STATES & 1) ^ 0o12 * np.arange(2)).astype(np.uint8)
CAME_FROM = np.argsort(NEXT_STATE, axis=0)
# In steps: a weight below the first stays 0, and a row below the second; the nearest path could move them by many times
# their size.
ZERO_WEIGHT, ZERO_ROW = 0.125, 0.25


def trellis_path(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Trellis-coded quantization of x [count, n], in steps: integers and the levels they stand for, the nearest path
    through each TRELLIS numbers (Viterbi). Every integer's parity moves the state, and the state says which levels are
    next. At the same error that saves 0.18 bits a number (Marcellin and Fischer 1990)."""
    (count, n), length = x.shape, min(TRELLIS, x.shape[1])
    padded = np.zeros((count, -(-n // length) * length), np.float32)
    padded[:, :n] = np.minimum(np.abs(x), LARGEST_SYMBOL - 2)
    magnitude = np.ascontiguousarray(padded.reshape(-1, length).T)  # [length, chains]
    # The nearest integers of each kind: even and odd of those at k, then of those at k - 1/2 (and at 0).
    even = np.where(magnitude < 0.75, 0, 2 * np.rint((magnitude - 1.5) / 2) + 2)
    odd = 2 * np.rint((magnitude - 0.5) / 2) + 1
    numbers = np.stack([2 * np.rint(magnitude / 2), 2 * np.floor(magnitude / 2) + 1, even, odd], axis=1)
    levels = numbers.copy()
    levels[:, 2:] -= 0.5 * (numbers[:, 2:] > 0)
    errors, chains = np.square(levels - magnitude[:, None]), np.arange(magnitude.shape[1])
    errors[:, 1::2] += np.where(magnitude < ZERO_WEIGHT, np.float32(1e9), 0)[:, None]
    cost = np.full((len(STATES), len(chains)), np.inf, np.float32)
    cost[0] = 0
    second = np.empty((length, *cost.shape), bool)  # whether a state was reached by the second way
    reached = np.empty((*CAME_FROM.shape, len(chains)), np.float32)
    for i in range(length):
        np.take(cost, CAME_FROM, axis=0, out=reached, mode="clip")
        halves = reached.reshape(2, -1, 2, len(chains))  # states of the lower half come from even ones, others from odd
        halves += errors[i].reshape(2, 1, 2, -1)
        np.less(reached[:, 1], reached[:, 0], out=second[i])
        np.minimum(reached[:, 0], reached[:, 1], out=cost)
    state, taken = cost.argmin(axis=0), np.empty((length, 1, len(chains)), np.intp)
    for i in reversed(range(length)):
        way = second[i, state, chains].astype(np.intp)
        state = CAME_FROM[state, way]
        taken[i] = 2 * (state & 1) + way
    found = (np.take_along_axis(part, taken, 1)[:, 0].T.reshape(count, -1)[:, :n] for part in (numbers, levels))
    return tuple(np.copysign(part, x) for part in found)


def trellis_rows(symbols: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Walks down the trellises of symbols [n, m], one a column and TRELLIS rows: yields i and, for rows i, i + TRELLIS
    and so on, 1 where an integer stands for k - sign(k) / 2. A decoder fills in those rows before it asks for more."""
    state = np.zeros((-(-len(symbols) // TRELLIS), symbols.shape[1]), np.uint8)
    for i in range(min(TRELLIS, len(symbols))):
        here = state[: len(symbols[i::TRELLIS])]
        yield i, here & 1
        here[:] = NEXT_STATE[here, symbols[i::TRELLIS] & 1]


def half_levels(symbols: np.ndarray) -> np.ndarray:
    """uint8 [n, m]: 1 where an integer of a trellis stands for k - sign(k) / 2."""
    found = np.empty(symbols.shape, np.uint8)
    for i, half in trellis_rows(symbols):
        found[i::TRELLIS] = half
    return found


def round_to_trellis(values: np.ndarray, rows: np.ndarray, columns: np.ndarray, factors: list | None) -> np.ndarray:
    """values [count, n, m] of as many tensors, steps of their rows [count, n] and columns [count, m] -> symbols int16.
    With GPTQ's factors the columns are rounded one by one, and those to come make up for the error in the layer's
    output; 128 at a time are kept up to date."""
    left, widths = (values / powers(rows)[..., None]).astype(np.float32), powers(columns)
    at_once, order = (1, np.stack([factor.order for factor in factors])) if factors else (64, None)
    if factors:
        upper = np.stack([factor.upper for factor in factors])
        left, widths = np.take_along_axis(left, order[:, None], 2), np.take_along_axis(widths, order, 1)
    symbols = np.empty(left.shape, np.int16)
    for start in range(0, left.shape[2], 128):
        block = np.ascontiguousarray(left[:, :, start : start + 128].transpose(2, 0, 1))
        errors = np.empty_like(block)
        for i in range(0, len(block), at_once):
            at, part = start + i, block[i : i + at_once]
            scale = widths[:, at : at + len(part)].T[..., None]
            found, levels = trellis_path((part / scale).reshape(-1, part.shape[2]))
            symbols[:, :, at : at + len(part)] = found.reshape(part.shape).transpose(1, 2, 0)
            if factors:
                errors[i] = (part[0] - levels * scale[0]) / upper[:, at, at, None]
                block[i + 1 :] -= upper[:, at, at + 1 : start + len(block)].T[..., None] * errors[i]
        if factors:
            left[:, :, start + 128 :] -= errors.transpose(1, 2, 0) @ upper[:, start : start + 128, start + 128 :]
    if factors:
        np.put_along_axis(symbols, order[:, None], symbols.copy(), 2)
    return symbols


def as_matrix(weight: np.ndarray) -> np.ndarray:
    """float32 [n, m] of a parameter of any number of axes."""
    return weight.reshape(-1, weight.shape[-1]).astype(np.float32)


def without_faint_rows(value: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """value [n, m] with zeros in rows that are small beside their steps."""
    steps = powers(rows)[:, None] * powers(columns)
    return value * (np.abs(value) >= ZERO_ROW * steps).any(axis=1, keepdims=True)


def make_tables(c: Config, weights: dict[str, np.ndarray], width: float, factors: dict[str, Factor | None],
                squares: dict[str, np.ndarray]) -> dict[str, Table]:  # fmt: skip
    """Chooses the steps of every tensor and rounds it."""
    values, steps = {name: as_matrix(weight) for name, weight in weights.items()}, {}
    for name, value in values.items():
        if calibrates(c):
            steps[name] = loss_steps(value, bends_of(name, as_matrix(squares[name]), factors.get(name)), width)
            values[name] = without_faint_rows(value, *steps[name])
        else:
            steps[name] = spanning_steps(name, value)
    return round_all(values, steps, calibrates(c), factors)


def round_all(values: dict[str, np.ndarray], steps: dict[str, tuple[np.ndarray, np.ndarray]], trellis: bool,
              factors: dict[str, Factor | None]) -> dict[str, Table]:  # fmt: skip
    """Rounds matrices [n, m], by steps of rows and columns; those of one shape that GPTQ rounds do so together."""
    symbols, stacks = {}, {}
    for name, value in values.items():
        if trellis:
            alone = name if factors.get(name) is None else ""
            stacks.setdefault((value.shape, alone), []).append(name)
        else:
            symbols[name] = np.rint(value / powers(steps[name][0])[:, None]).astype(np.int16)
    for (_, alone), names in stacks.items():
        parts = map(np.stack, zip(*((values[name], *steps[name]) for name in names)))
        symbols |= zip(names, round_to_trellis(*parts, None if alone else [factors[name] for name in names]))
    middles = {name: np.zeros(len(part), np.int16) for name, part in symbols.items()}
    middles |= {name: np.median(symbols[name], axis=1).astype(np.int16) for name in symbols if is_vector(name)}
    return {name: Table(*steps[name], middles[name], symbols[name]) for name in values}


def values_of(table: Table, trellis: bool) -> np.ndarray:
    """float32 [n, m]: what a table stands for."""
    levels = table.symbols.astype(np.float32)
    if trellis:
        levels -= np.float32(0.5) * np.sign(levels) * half_levels(table.symbols)
    return levels * powers(table.rows)[:, None] * powers(table.columns)


# The coder's models: of integers -k to k with standard deviation 2 ** (spread / 4), a mixture of a normal distribution
# and `shape` quarters of Laplace's, cut about where a trellis cuts in even states and in odd ones.
SPREADS, SHAPES = (-24, 60), 5
# Of even states and of odd ones: the cut above 0, and those above k less k, each a + b / deviation. tests/fit_spread.py
CUTS = ((0.37, 0.05), (0.39, 0.05)), ((0.31, -0.04), (0.1, 0.01))


def exp(x: np.ndarray) -> np.ndarray:
    """e ** x for x <= 0 by sums, products and quotients alone, which are equal on every platform; 0 below e ** -350."""
    part, total = np.maximum(x, -350) / 1024, np.ones_like(x)
    for n in range(12, 0, -1):
        total = 1 + part * total / n
    for _ in range(10):
        total = total * total
    return total


@functools.cache
def spread_model(spread: int, shape: int, odd: int) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies of the integers -k to k, and the bits of 0 to k."""
    deviation = float(powers(np.array(spread)))
    first, later = (a + b / max(deviation, 0.35) for a, b in CUTS[odd])
    edges = np.arange(min(int(16 * deviation) + 17, LARGEST_SYMBOL + 1)) + later
    edges[0] = first
    edges /= deviation
    t = 1 / (1 + 0.3275911 * math.sqrt(0.5) * edges)  # the normal tail: Abramowitz and Stegun, 7.1.26
    tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    above = ((1 - shape / 4) * tail * exp(-edges * edges / 2) + shape / 4 * exp(-math.sqrt(2) * edges)) / 2
    parts = np.concatenate([[1 - 2 * above[0]], np.maximum(above[:-1] - above[1:], 0)])
    half = np.maximum(np.rint(parts * 2**22), 1)
    frequencies = np.concatenate([half[:0:-1], half])
    return frequencies, np.log2(frequencies.sum() / half)


@functools.cache
def spread_coder(spread: int, shape: int, odd: int) -> tuple[int, object]:
    """Index of the integer 0, and constriction's model. Raises ValueError for a model that no writer states."""
    if not (SPREADS[0] <= spread <= SPREADS[1] and 0 <= shape < SHAPES):
        raise ValueError(f"spread {spread}, shape {shape}")
    frequencies = spread_model(spread, shape, odd)[0]
    probabilities = frequencies / frequencies.sum()
    return len(frequencies) // 2, constriction.stream.model.Categorical(probabilities, perfect=False)


class Writer:
    """Keeps integers and their models until `finish`: what is coded last is read first (ANS)."""

    def __init__(self):
        self.parts = []

    def code(self, symbols: np.ndarray, spread: int, shape: int, odd: int = 0) -> np.ndarray:
        self.parts.append((symbols.astype(np.int32), spread, shape, odd))
        return symbols

    def finish(self, ans: object) -> int:
        """Codes all of it; returns the bits."""
        before = ans.num_valid_bits()
        for symbols, *kind in reversed(self.parts):
            middle, model = spread_coder(*kind)
            ans.encode_reverse(symbols + middle, model)
        return ans.num_valid_bits() - before


class Reader:
    """Reads what a Writer was given; of the integers in a call it heeds only how many they are."""

    def __init__(self, ans: object):
        self.ans = ans

    def code(self, symbols: np.ndarray, spread: int, shape: int, odd: int = 0) -> np.ndarray:
        middle, model = spread_coder(spread, shape, odd)
        return self.ans.decode(model, len(symbols)) - middle


# How many: two of the symbols, three each of rows, columns and middles; spread and shape of the facts' own model, which
# is as wide as an int16 needs.
FACTS, OF_FACTS = 11, (24, 4)


def code_table(coder: Writer | Reader, facts: np.ndarray, table: Table, trellis: bool) -> None:
    """Writes a table, or fills one with what is read: the same walk both ways. Facts: scale and shape of the symbols'
    spreads; centre, spread and shape of the steps of rows, of those of columns, and of the middles."""
    scale, shape, *models = coder.code(facts, *OF_FACTS).tolist()
    for i, part in enumerate((table.rows, table.columns, table.middles)):
        centre, *model = models[3 * i : 3 * i + 3]
        part[:] = coder.code(part - np.int32(centre), *model) + centre
    spreads = spreads_of(table.rows, table.columns, scale, trellis)
    for i, odd in trellis_rows(table.symbols):
        lines, around = table.symbols[i::TRELLIS], table.middles[i::TRELLIS, None].astype(np.int32)
        order, runs = runs_of(spreads[i::TRELLIS], odd * trellis)
        part, found = (lines - around).ravel()[order], np.empty(lines.size, np.int32)
        for spread, kind, start, end in runs:
            found[order[start:end]] = coder.code(part[start:end], spread, shape, kind)
        lines[:] = found.reshape(lines.shape) + around


def facts_of(table: Table, trellis: bool) -> np.ndarray:
    """What `code_table` must know first: the models of the shortest code."""
    steps = table.rows[:, None].astype(np.int64) + table.columns
    symbols = table.symbols - table.middles[:, None].astype(np.int32)
    found = [*shortest_model(symbols, steps * trellis, half_levels(table.symbols) * trellis)[1:]]
    for part in (table.rows, table.columns, table.middles):
        centre = int(np.clip(np.median(part), -LARGEST_EXPONENT, LARGEST_EXPONENT))
        _, scale, shape = shortest_model(part - np.int32(centre), np.zeros(part.shape, int), np.zeros(part.shape, int))
        found += [centre, min(max(scale, SPREADS[0]), SPREADS[1]), shape]
    return np.array(found)


def spreads_of(rows: np.ndarray, columns: np.ndarray, scale: int, trellis: bool) -> np.ndarray:
    """[n, m]: how wide each integer is spread. The steps of a trellis know nothing of the weights, whose spread is
    2 ** (scale / 4); steps that span the weights leave integers of one spread."""
    return np.clip(scale - (rows[:, None].astype(np.int32) + columns) * trellis, *SPREADS)


def runs_of(spreads: np.ndarray, odd: np.ndarray) -> tuple[np.ndarray, list[tuple]]:
    """The order in which some symbols are coded, and (spread, odd, start, end) of each run of one model."""
    models = (2 * spreads + odd).astype(np.int16).ravel()
    order = np.argsort(models, kind="stable")
    starts = [0, *(np.flatnonzero(np.diff(models[order])) + 1).tolist()]
    runs = zip(models[order[starts]].tolist(), starts, [*starts[1:], len(models)])
    return order, [(model >> 1, model & 1, start, end) for model, start, end in runs]


def shortest_model(symbols: np.ndarray, offsets: np.ndarray, odd: np.ndarray) -> tuple[float, int, int]:
    """(bits, scale, shape) of the shortest code of symbols whose spreads are scale - offsets; all of one shape."""
    magnitudes = np.abs(symbols.astype(np.int64))
    keys, counts = np.unique(((2 * offsets + odd) << 16) + magnitudes, return_counts=True)
    kinds, starts = np.unique(keys >> 16, return_index=True)
    groups = list(zip(kinds.tolist(), np.split(keys & 0xFFFF, starts[1:]), np.split(counts, starts[1:])))

    def bits(scale: int, shape: int) -> float:
        total = 0.0
        for kind, some, often in groups:
            model = spread_model(min(max(scale - (kind >> 1), SPREADS[0]), SPREADS[1]), shape, kind & 1)[1]
            total += often @ model[some] if some[-1] < len(model) else math.inf
        return total

    near = round(2 * math.log2(max(np.square(magnitudes * np.exp2(offsets / 4)).mean(), 1e-24)))
    scales = [*range(near - 4, near + 7), near + 16, near + 32, near + 64, 600]  # the last can code anything
    return min((bits(scale, shape), scale, shape) for scale in scales for shape in range(SHAPES))


def checksum(tables: dict[str, Table]) -> int:
    """CRC-32 of all integers: a coder whose models differed on another machine would not give other weights."""
    found = 0
    for table in tables.values():
        for part in table:
            found = zlib.crc32(part.astype("<i2").tobytes(), found)
    return found


def assemble(c: Config, loops: int, tables: dict[str, Table]) -> tuple[bytes, dict[str, float]]:
    """The bytes of the artifact, and the bits of every tensor in it."""
    ans, bits, trellis = constriction.stream.stack.AnsCoder(), {}, calibrates(c)
    for name, table in reversed(tables.items()):
        writer = Writer()
        code_table(writer, facts_of(table, trellis), table, trellis)
        bits[name] = writer.finish(ans)
    header = about(c, loops) | {"quantizer": c.quantizer, "crc": checksum(tables)}
    head = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    body = ARTIFACT_HEAD.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(head)) + head
    body += ans.get_compressed().astype("<u4").tobytes()
    return body + hashlib.sha256(body).digest(), bits


def all_here(work: Callable[[list[str]], object], sizes: dict[str, int]) -> list[object]:
    """Deals nothing out: one process does it all."""
    return [work([*sizes])]


def check_numbers(named: Iterable[tuple[str, np.ndarray]]) -> None:
    """Raises InputError for what cannot be rounded: NaN, infinities and numbers near them."""
    for name, part in named:
        largest = np.abs(part).max()
        require(largest < LARGEST_NUMBER, name, f"weights and gradients below {LARGEST_NUMBER:g}", largest)


def export_model(c: Config, weights: dict[str, np.ndarray], loops: int, curvature: Curvature | None = None,
                 code_bytes: int = 0, share: Callable = all_here) -> Export:  # fmt: skip
    """The artifact of `weights`. With TARGET_BYTES it is coded anew with other steps until it fits with little left
    over; the largest that fits is kept, else the smallest. `share(work, sizes)` deals the tensors' names out to
    processes and gathers what `work(names)` gives on each. Raises InputError for what is not finite."""
    hessians, squares = (curvature.hessians, curvature.squares) if curvature else ({}, {})
    check_numbers([*weights.items(), *hessians.items(), *squares.items()])
    weights = {name: weights[name] for name in param_shapes(c)}
    width, count = width_of(c.quant_loss or DEFAULT_LOSS, count_params(c)), count_params(c)
    sizes, best = {}, None  # of the artifacts of every width tried
    factors = {}  # of the tensors that are rounded here

    def round_some(names: list[str]) -> tuple[dict[str, Table], int]:
        for name in names:
            if name in hessians and name not in factors:
                factors[name] = gptq_factor(hessians[name])
        tables = make_tables(c, {name: weights[name] for name in names}, width, factors, squares)
        return tables, sum(factor is None for factor in factors.values())

    while width not in sizes and len(sizes) < 8:
        parts, plain = zip(*share(round_some, {name: weight.size for name, weight in weights.items()}))
        found = {name: table for part in parts for name, table in part.items()}
        tables = {name: found[name] for name in weights}
        data, bits = assemble(c, loops, tables)
        sizes[width], total = len(data), len(data) + code_bytes
        # Whatever fits is better, and the larger; of those that do not, the smaller.
        merit = (total <= c.target_bytes, total if total <= c.target_bytes else -total)
        if best is None or merit > best[0]:
            best = merit, data, bits, tables, TRELLIS_GAIN * count * width**2 / 24 * calibrates(c)
        if not c.target_bytes or 0.998 * c.target_bytes <= total <= c.target_bytes:
            break
        width = next_width(sizes, 0.999 * c.target_bytes - code_bytes, count)
    _, data, bits, tables, aimed = best
    dense = f"at most {WEIGHTS_A_BYTE} weights a byte"
    require(count <= WEIGHTS_A_BYTE * len(data), "artifact", dense, f"{count} in {len(data)}", "lower QUANT_LOSS")
    return Export(data, tables, len(data), bits_per_weight(tables, bits), aimed, len(sizes), sum(plain))


def bits_per_weight(tables: dict[str, Table], bits: dict[str, float]) -> float:
    """Of the matrices, with their steps."""
    matrices = [name for name in tables if not is_vector(name)]
    return sum(bits[name] for name in matrices) / sum(tables[name].symbols.size for name in matrices)


def next_width(sizes: dict[float, int], goal: float, count: int) -> float:
    """The width to try next, from the bytes of those tried. About log2(1 + x / width) bits a weight are left, which is
    a line in `octaves`; it falls by 0.7 to 0.9 a doubling of the width, of trained and of Gaussian weights."""

    def octaves(size: float) -> float:
        return math.log2(2 ** min(8 * max(size, 1) / count, 64.0) - 1)

    near, *others = sorted(sizes, key=lambda width: abs(sizes[width] - goal))
    others.sort(key=lambda width: (sizes[width] > goal) == (sizes[near] > goal))  # the goal had better lie between
    fall = 0.8
    if others:
        fall = (octaves(sizes[near]) - octaves(sizes[others[0]])) / math.log2(others[0] / near)
    return near * 2 ** min(max((octaves(sizes[near]) - octaves(goal)) / min(max(fall, 0.5), 2.0), -6.0), 6.0)


def read_artifact(path: Path, data: bytes | None = None) -> Artifact:
    """The artifact at `path`, or in what was read there. Raises InputError on anything unexpected."""
    data, mend = path.read_bytes() if data is None else data, "the file is damaged or not an artifact of this project"
    require(len(data) >= ARTIFACT_HEAD.size + 32, path, "an artifact", f"{len(data)} bytes", mend)
    magic, version, head_bytes = ARTIFACT_HEAD.unpack_from(data)
    require(magic == ARTIFACT_MAGIC, path, f"magic {ARTIFACT_MAGIC!r}", repr(magic), mend)
    older = "read it with the scripts of its own commit"
    require(version == ARTIFACT_VERSION, path, f"version {ARTIFACT_VERSION}", version, older)
    whole = hashlib.sha256(data[:-32]).digest() == data[-32:]
    require(whole, path, "its SHA-256 at the end", "another (cut short or changed)", mend)
    start = ARTIFACT_HEAD.size + head_bytes
    try:
        return read_body(data[ARTIFACT_HEAD.size : start], data[start:-32], len(data))
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError,
            struct.error, zlib.error) as error:  # fmt: skip
        raise InputError(f"{path}: unreadable ({str(error)[:120]}); {mend}") from None


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is refused, without a warning
def read_body(head: bytes, code: bytes, size: int) -> Artifact:
    """Header and code of an artifact of `size` bytes -> what they say. Raises what `read_artifact` catches."""
    unpack = zlib.decompressobj()
    text = unpack.decompress(head, LARGEST_HEADER)
    if not unpack.eof or unpack.unused_data or len(code) % 4:
        raise ValueError("a header without its end, or half a word")
    header = json.loads(text)
    model, loops = known_options(header["model"]), int(header["loops"])
    c = model_config(Config(), model)
    c = dataclasses.replace(c, quantizer=header["quantizer"])
    if count_params(c) > WEIGHTS_A_BYTE * size:
        raise ValueError(f"{size} bytes for {count_params(c)} parameters")
    if c.quantizer not in CHOICES["quantizer"] or not 1 <= loops <= parse_layout(c.layout).loops:
        raise ValueError(f"quantizer {c.quantizer}, {loops} passes")
    trellis = calibrates(c)
    ans, tables, bits, weights = constriction.stream.stack.AnsCoder(np.frombuffer(code, "<u4")), {}, {}, {}
    for name, shape in param_shapes(c).items():
        n, m, before = math.prod(shape[:-1]), shape[-1], ans.num_valid_bits()
        tables[name] = Table(*(np.zeros(part, np.int16) for part in (n, m, n, (n, m))))
        code_table(Reader(ans), np.zeros(FACTS), tables[name], trellis)
        bits[name] = before - ans.num_valid_bits()
    if not ans.is_empty() or checksum(tables) != header["crc"]:
        raise ValueError("bytes that are left over, or another CRC-32")
    for name, shape in param_shapes(c).items():
        weights[name] = values_of(tables[name], trellis).reshape(shape)
        if not np.isfinite(weights[name]).all():
            raise ValueError(f"numbers that are not finite in {name}")
    return Artifact(model, loops, c.quantizer, weights, bits)


# ======================================================================================================================
# ROUNDING AND FINISH [shared]
# What a run does with EXPORT: with ROUND_FROM in training, else after it; then the files, the score of what is on disk,
# the closing block.
# ======================================================================================================================
ROUND_PARTS = 17  # of the columns; the last is rounded after training
SAMPLE = 2**13  # numbers of a tensor that are rounded to reckon its bytes
HEADER = 400  # bytes, about


class Rounding:
    """With ROUND_FROM: the integers of the columns that are rounded so far. The steps are settled when it begins, for
    the first column as for the last, and so is the order: the largest inputs first, else the finest column. What
    training makes of the columns to come makes up for errors, as GPTQ does (incremental quantization, arXiv
    1702.03044)."""

    def __init__(self, c: Config, tensors: dict[str, np.ndarray]):
        """`tensors`: as `rounding_shapes` says."""
        self.tensors = tensors
        self.order = {name: tensors[f"order.{name}"] for name in param_shapes(c) if f"order.{name}" in tensors}

    def columns(self, name: str, low: int, high: int) -> np.ndarray:
        """Indices of the columns of the parts from `low` to below `high`."""
        bounds = [0, *(end for _, end in split_evenly(len(self.order[name]), ROUND_PARTS))]
        return self.order[name][bounds[low] : bounds[high]]

    def steps(self, name: str, columns: np.ndarray | slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        return self.tensors[f"rows.{name}"], self.tensors[f"columns.{name}"][columns]

    def round(self, names: list[str], weights: dict[str, np.ndarray], part: int) -> dict[str, np.ndarray]:
        """Integers of the columns of a part of some matrices."""
        columns = {name: found for name in names if len(found := self.columns(name, part, part + 1))}
        check_numbers((name, weights[name]) for name in columns)
        whole = {name: without_faint_rows(as_matrix(weights[name]), *self.steps(name)) for name in columns}
        values = {name: np.ascontiguousarray(whole[name][:, some]) for name, some in columns.items()}
        steps = {name: self.steps(name, some) for name, some in columns.items()}
        return {name: table.symbols for name, table in round_all(values, steps, True, {}).items()}

    def table(self, name: str, columns: np.ndarray | slice = slice(None)) -> Table:
        """Of some columns, in a copy, since the last ones may be rounded anew."""
        rows, steps = self.steps(name, columns)
        symbols = self.tensors[f"symbols.{name}"][:, columns].copy()
        return Table(rows, steps.copy(), np.zeros(len(symbols), np.int16), symbols)

    def kept(self, low: int, high: int) -> dict[str, np.ndarray]:
        """float32 [n, m] of the matrices with the parts from `low` to below `high`; NaN in the other columns."""
        found = {}
        for name in self.order:
            columns = self.columns(name, low, high)
            found[name] = np.full(self.tensors[f"symbols.{name}"].shape, math.nan, np.float32)
            found[name][:, columns] = values_of(self.table(name, columns), True)
        return found


def rounding_shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a checkpoint keeps of a Rounding: steps of the rows and columns of all tensors, int16;
    of matrices the integers, int16, and the order of the columns; nats aimed at, and how often bytes were reckoned."""
    found = {"said": (2,)}
    for name, (*rows, m) in param_shapes(c).items():
        n = math.prod(rows)
        found |= {f"rows.{name}": (n,), f"columns.{name}": (m,)}
        found |= {} if is_vector(name) else {f"symbols.{name}": (n, m), f"order.{name}": (m,)}
    return found


def resume_rounding(run: Run, tensors: dict[str, np.ndarray]) -> None:
    """Goes on with what a checkpoint keeps of a Rounding."""
    if tensors:
        run.rounding = Rounding(run.config, tensors)
        run.engine.keep(run.rounding.kept(0, run.state.parts))


def begin_rounding(run: Run) -> Rounding:
    """Looks at the curvature, at most CALIB_SECONDS long where seconds count, and settles the steps: those of
    QUANT_LOSS, or those on which some of the rows take their share of TARGET_BYTES."""
    c, state, weights = run.config, run.state, run.engine.weights()
    values = {name: as_matrix(weights[name]) for name in param_shapes(c)}
    passes, seconds = most_passes(c, loops_at(c, 1.0)), c.calib_seconds if c.max_wallclock_seconds else math.inf
    seen = run.engine.curvature(run.stream, state.tokens, passes, seconds)
    state.flops += train_flops_per_token(c, passes) * seen.tokens
    if seen.tokens < (asked := calibration_tokens(c, run.engine.world)):
        run.log.line(f"notice: time was up after {seen.tokens} of {asked} tokens of CALIB_TOKENS: more CALIB_SECONDS")

    def share(work: Callable[[str], object]) -> dict[str, object]:
        """What `work` gives for every name, each process doing its part."""
        parts = share_out(
            run.engine, lambda names: {name: work(name) for name in names}, {n: v.size for n, v in values.items()}
        )
        found = {name: one for part in parts for name, one in part.items()}
        return {name: found[name] for name in values}

    def bend(name: str) -> Bends:
        hessian = seen.hessians.get(name)
        check_numbers((name, part) for part in (values[name], seen.squares[name], hessian) if part is not None)
        return bends_of(name, as_matrix(seen.squares[name]), None if hessian is None else gptq_factor(hessian))

    bends, width, sizes = share(bend), width_of(c.quant_loss or DEFAULT_LOSS, count_params(c)), {}
    goal = c.target_bytes - code_bytes(run) - HEADER
    while c.target_bytes and width not in sizes and len(sizes) < 8:
        taken = share(lambda name, width=width: bytes_about(name, values[name], bends[name], width))
        sizes[width] = sum(taken.values())
        if abs(sizes[width] - goal) > 0.003 * goal:
            width = next_width(sizes, goal, count_params(c))
    tensors = {"said": np.array([TRELLIS_GAIN * count_params(c) * width**2 / 24, max(len(sizes), 1)], np.float32)}
    for name, (rows, columns) in share(lambda name: loss_steps(values[name], bends[name], width)).items():
        tensors |= {f"rows.{name}": rows, f"columns.{name}": columns}
        if not is_vector(name):
            first = -np.diag(seen.hessians[name]).astype(np.float64) if name in seen.hessians else columns
            tensors[f"order.{name}"] = np.argsort(first, kind="stable").astype(np.int32)
            tensors[f"symbols.{name}"] = np.zeros(values[name].shape, np.int16)
    return Rounding(c, tensors)


def bytes_about(name: str, value: np.ndarray, bends: Bends, width: float) -> float:
    """Bytes that a parameter [n, m] takes on steps of this width, about, by some of its rows; a step takes half a
    byte."""
    every = -(-value.size // SAMPLE)
    some = value[::every]
    steps = loss_steps(some, Bends(bends.rows[::every], bends.columns, bends.used[::every]), width)
    table = round_all({name: without_faint_rows(some, *steps)}, {name: steps}, True, {})[name]
    symbols = table.symbols - table.middles[:, None].astype(np.int32)
    offsets = table.rows[:, None].astype(np.int64) + table.columns
    bits = shortest_model(symbols, offsets, half_levels(table.symbols))[0]
    return (bits * value.size / some.size + 4 * sum(value.shape)) / 8


def round_more(run: Run, at: float) -> bool:
    """With ROUND_FROM: rounds the parts whose time has come; whether there were any. Seconds and FLOPs of training
    count it; where FLOPs do not suffice to look at the curvature all is rounded after training."""
    c, state = run.config, run.state
    if not c.round_from or at < c.round_from:
        return False
    part = (at - c.round_from) / (1 - c.round_from) * (ROUND_PARTS - 1)
    due = min(1 + math.floor(part), ROUND_PARTS - 1)
    if due <= state.parts:
        return False
    looks = train_flops_per_token(c, most_passes(c, loops_at(c, 1.0))) * calibration_tokens(c, run.engine.world)
    if run.rounding is None and 0 < c.max_train_flops < state.flops + looks:
        return False
    run.read_launched()

    def work() -> None:
        run.rounding = run.rounding or begin_rounding(run)
        round_parts(run, due)

    seconds = seconds_of(run.engine, work)
    run.before = run.clock()[0]  # which says nothing of the pace of steps
    run.log.line(f"step:{state.step}/{c.iterations} rounded:{due}/{ROUND_PARTS} of the columns in {seconds:.1f}s")
    return True


def round_parts(run: Run, due: int) -> None:
    """Rounds the columns up to the part `due` and keeps them."""
    weights, before = run.engine.weights(), run.state.parts
    while run.state.parts < due:
        round_part(run, weights, run.state.parts)
        run.state.parts += 1
    run.engine.keep(run.rounding.kept(before, due))


def round_part(run: Run, weights: dict[str, np.ndarray], part: int) -> None:
    """Rounds the columns of one part, every process its share of the matrices."""
    rounding = run.rounding
    work = functools.partial(rounding.round, weights=weights, part=part)
    for found in share_out(run.engine, work, {name: weights[name].size for name in rounding.order}):
        for name, symbols in found.items():
            rounding.tensors[f"symbols.{name}"][:, rounding.columns(name, part, part + 1)] = symbols


def export_rounded(run: Run) -> Export | None:
    """The artifact of what ROUND_FROM has rounded, with the last columns and the vectors. With TARGET_BYTES the last
    columns have the finest steps that fit, up to an octave finer and four coarser; None where none of them does."""
    c, rounding, last = run.config, run.rounding, ROUND_PARTS - 1
    round_parts(run, last)
    weights, room = run.engine.weights(), (c.target_bytes or math.inf) - code_bytes(run)
    settled = {name: rounding.tensors[f"columns.{name}"].copy() for name in rounding.order}
    vectors = {name: as_matrix(weight) for name, weight in weights.items() if is_vector(name)}
    for name, value in vectors.items():  # they have grown since, some from 0
        rows, finest = rounding.tensors[f"rows.{name}"], finest_steps(np.abs(value).max(axis=1))
        np.maximum(rows, finest.astype(np.int16), out=rows)
    vectors = {name: without_faint_rows(value, *rounding.steps(name)) for name, value in vectors.items()}
    vectors = round_all(vectors, {name: rounding.steps(name) for name in vectors}, True, {})
    aimed, rounds = rounding.tensors["said"].tolist()

    def export(shift: int) -> Export:
        for name, steps in settled.items():
            columns = rounding.columns(name, last, ROUND_PARTS)
            rounding.tensors[f"columns.{name}"][columns] = steps[columns] + shift
        round_part(run, weights, last)
        tables = {name: vectors.get(name) or rounding.table(name) for name in param_shapes(c)}
        data, bits = assemble(c, run.state.loops, tables)
        return Export(data, tables, len(data), bits_per_weight(tables, bits), aimed, int(rounds), 0)

    best, (finest, coarsest) = None, (-4, 16) if c.target_bytes else (0, 0)
    while finest <= coarsest:
        shift = (finest + coarsest) // 2
        made = export(shift)
        if made.size <= room:
            best, coarsest = made, shift - 1
        else:
            finest = shift + 1
    if best is None:
        over = made.size - room
        run.log.line(
            f"notice: the columns rounded in training are {over} bytes over TARGET_BYTES: all are rounded anew"
        )
    return best


def most_passes(c: Config, loops: int) -> int:
    """Passes that the curvature is taken of, where `loops` are trained: one that nobody looked at would be rounded to
    none."""
    return max(loops, eval_passes(c, loops)[0])


def calibrate(run: Run) -> Curvature | None:
    """The curvature on the tokens after those of training (for MODE=export on the first), in what is left of the wall
    clock; None where the quantizer needs none."""
    c, left = run.config, math.inf
    if not calibrates(c):
        return None
    if c.mode == "train" and c.max_wallclock_seconds:
        left = 0.9 * (c.max_wallclock_seconds - run.state.seconds)  # a tenth for what comes after the last tokens
    return run.engine.curvature(run.stream, run.state.tokens, most_passes(c, run.state.loops), left)


def shared_export(run: Run, curvature: Curvature | None) -> Export:
    """`export_model` of the weights as they are, every process its share of the tensors."""
    c, loops, weights = run.config, run.state.loops, run.engine.weights()
    code = code_bytes(run)
    share = functools.partial(share_out, run.engine)  # whose exchange within this one holds: all raise what one does
    return together(run.engine, lambda: export_model(c, weights, loops, curvature, code, share))


def code_bytes(run: Run) -> int:
    """Bytes of code that count, as the first process sees them."""
    return together(run.engine, lambda: code_size(run.config.count_code), first_only=True)


def write_export(run: Run, made: Export) -> None:
    """The first process writes the artifact and the model."""
    c, log, weights = run.config, run.log, run.engine.weights()

    def write() -> None:
        log.write_file(log.artifact, made.data)
        named = {f"weights.{name}": value for name, value in weights.items()}
        note = {"recurrent_gpt": json.dumps(about(c, run.state.loops))}
        log.write_file(log.folder / "model.safetensors", pack_tensors(named, metadata=note), needed=False)

    together(run.engine, write, first_only=True)


def score_from_disk(c: Config, engine: Engine, path: Path, score: Score, loops: int,
                    stop: StopSignal | None = None) -> float | None:  # fmt: skip
    """Puts the weights of the artifact at `path` on the device; returns their loss, None where a signal ended it. The
    first process reads the file for all: other hosts need not see it."""
    text = together(engine, lambda: base64.b64encode(path.read_bytes()).decode(), first_only=True)
    engine.set_weights(together(engine, lambda: read_artifact(path, base64.b64decode(text))).weights)
    return evaluate(c, engine, score.tokens, loops, stop)


def finish(run: Run) -> int | None:
    """Scores the weights, exports them, scores what is on disk and closes the log. Returns the exit code, 1 where the
    artifact is larger than asked for; None where a signal came first."""
    c, score, (loops, *others) = run.config, run.score, eval_passes(run.config, run.state.loops)
    raw = evaluate(c, run.engine, score.tokens, loops, run.stop)
    if raw is None:
        return None
    write_score(run, raw, loops)
    result = {"val_loss_raw": raw, "val_bpb_raw": score.bpb(raw), "bytes_code": code_bytes(run)}
    try:
        must_be_finite(run, raw)
        began = time.perf_counter()
        made, curvature = export_rounded(run) if run.rounding else None, None
        began_calibration = time.perf_counter()
        if not made:
            curvature = calibrate(run)
        calibrated = time.perf_counter()
        made = made or shared_export(run, curvature)
        write_export(run, made)
        exported = time.perf_counter()
        loss = score_from_disk(c, run.engine, run.log.artifact, score, loops, run.stop)
        if loss is None:
            return None
        result |= {
            "calib_time_ms": round(1000 * (calibrated - began_calibration)) if curvature else None,
            "eval_time_ms": round(1000 * (time.perf_counter() - exported)),
            "val_loss": loss,
            "val_bpb": score.bpb(loss),
            "bytes_artifact": made.size,
            "bytes_total": result["bytes_code"] + made.size,
            "fits": result["bytes_code"] + made.size <= c.bytes_cap,
            "bits_per_weight": made.bits_per_weight,
        }
        # The challenge's words, whatever the quantizer.
        line = "final_int6_roundtrip val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} eval_time:{eval_time_ms}ms"
        run.log.line(line.format(**result) + score.label)
        line = "final_int6_roundtrip_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}"
        run.log.line(line.format(**result) + score.label)
        must_be_finite(run, loss)
        if others:  # which may be more than the memory holds
            write_result(run, result | {"complete": not score.partial})
        result["val_bpb_by_loops"] = {str(loops): score.bpb(loss)} | score_passes(run, others)
    except Agreed:  # no score, a full disk, or weights that cannot be rounded: the result says that there is none
        write_result(run, result)
        raise
    for notice in export_notices(run, made, curvature, c.target_bytes - result["bytes_total"]):
        run.log.line(notice)
    report(run, write_result(run, result | {"complete": not score.partial}), made, exported - began)
    return 0 if result["bytes_total"] <= (c.target_bytes or c.bytes_cap) else 1


def score_passes(run: Run, others: list[int]) -> dict[str, float]:
    """Bits per byte of what is on the device with other numbers of passes; less of them where a signal comes."""
    found = {}
    for loops in others:
        loss = evaluate(run.config, run.engine, run.score.tokens, loops, run.stop)
        scored = loss is not None and math.isfinite(loss)
        found |= {str(loops): run.score.bpb(loss)} if scored else {}
        said = f"val_loss:{loss:.4f} val_bpb:{found[str(loops)]:.4f}{run.score.label}" if scored else "no score"
        run.log.line(f"loops:{loops} {said}")
    return found


def must_be_finite(run: Run, loss: float) -> None:
    """Raises Agreed for a score that is no number, which is the same on every process."""
    if not math.isfinite(loss):
        mend = "lower MATRIX_LR and SCALAR_LR, or set GRAD_CLIP_NORM=1"
        raise Agreed(f"the score after step {run.state.step}: expected a finite loss, found {loss}; {mend}")


def export_notices(run: Run, made: Export, curvature: Curvature | None, spare: int) -> list[str]:
    """What a reader of the closing block should know of the export; `spare`: bytes of TARGET_BYTES that are left."""
    c, found, gates = run.config, [], run.engine.weights().get("loop_gate", np.ones(2))[1:]
    if c.loop_gate == "gain" and run.state.loops > 1 and np.abs(gates).max() < IDLE_GATE:
        shown = ", ".join(f"{gate:.3f}" for gate in gates)
        found.append(f"the passes after the first are hardly used, their gates are {shown}: FLOPs wasted")
    if curvature and not run.rounding and curvature.tokens < (asked := calibration_tokens(c, run.engine.world)):
        found.append(f"the calibration's time was up after {curvature.tokens} of {asked} tokens: more CALIB_SECONDS")
    if made.plain_rounded:
        found.append(f"{made.plain_rounded} matrices were rounded without GPTQ, since their Hessians were none")
    if c.target_bytes and spare > 0.002 * c.target_bytes:
        found.append(f"{spare} bytes of TARGET_BYTES are left: more parameters")
    elif c.target_bytes and spare < 0:
        found.append(f"TARGET_BYTES missed by {-spare} bytes: fewer parameters")
    elif c.target_bytes and made.bits_per_weight < FEW_BITS:
        found.append("fewer than three bits a weight: a model with fewer parameters is likely better at this size")
    return [f"notice: {text}" for text in found]


# ======================================================================================================================
# RUN LOG [shared]
# One folder a run: train.log (source, settings, versions, steps), metrics.jsonl (an object a logged step), result.json,
# checkpoint.safetensors, model.safetensors, model.int6.rgpt. The first process writes; live progress goes to a terminal
# only. A console that goes away or a full disk costs lines, never the run.
# ======================================================================================================================
CHECKPOINT = "checkpoint.safetensors"
SCORES = """val_loss_raw val_bpb_raw val_loss val_bpb val_bpb_by_loops bytes_code bytes_artifact bytes_total fits
    bits_per_weight calib_time_ms eval_time_ms""".split()  # of result.json, null until the run has come to its end


def run_name(c: Config) -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S')}_{c.preset or c.mode}_{FRAMEWORK}_s{c.seed}"


def say(text: str) -> bool:
    """A line on the console, above any progress bar. A console that is gone or full (False) is replaced by none."""
    try:
        tqdm.write(text)
        sys.stdout.flush()
        return True
    except (OSError, ValueError):
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python's own flush at the end fails again
        sys.stdout = open(os.devnull, "w")
        return False


def is_before(row: bytes, state: TrainState) -> bool:
    """Whether a row of metrics.jsonl is not made again from `state`; a killed run or a full disk leaves half a row."""
    try:
        values = json.loads(row)
        return int(values["step"]) <= (state.scored if "val_bpb" in values else state.step)
    except (ValueError, LookupError, TypeError, OverflowError):
        return False


def finite_json(values: dict) -> str:
    """JSON in which numbers that are not finite are null."""
    bad = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    return json.dumps(values | dict.fromkeys(bad))


class RunLog:
    """The files of one run. Its folder is claimed here: a name in use is refused, unless the run is resumed."""

    def __init__(self, c: Config, rank: int):
        self.rank, self.bar, self.lost, self.room = rank, None, False, (0, 0)
        self.dry = c.mode == "preflight"  # which keeps nothing
        self.folder = Path(c.log_dir) / c.run_id
        self.checkpoint = self.folder / CHECKPOINT
        self.artifact = self.folder / "model.int6.rgpt"
        if rank == 0:
            self.claim(c)

    def claim(self, c: Config) -> None:
        try:
            home = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
            kept = sum(map(math.prod, rounding_shapes(c).values())) * (c.round_from > 0)
            free, need = self.room = shutil.disk_usage(home).free, 16 * count_params(c) + 4 * kept + (1 << 20)
            require(free > need, "LOG_DIR", f"{need} bytes free for checkpoints", f"{free}", "set another LOG_DIR")
            self.folder.mkdir(parents=True, exist_ok=c.resume)
            open(self.folder / "train.log", "a").close()  # it can be written
            if self.dry and not c.resume:
                shutil.rmtree(self.folder)
        except FileExistsError:
            place = Path(c.log_dir)
            require(not place.is_symlink() or place.exists(), "LOG_DIR", "a folder", f"{place}, a link to nothing")
            mend = "set another RUN_ID, or delete the folder" + ", or RESUME=1 to go on" * self.checkpoint.is_file()
            require(False, "RUN_ID", "a new name", self.folder, mend)
        except OSError as error:
            require(False, "LOG_DIR", "a folder to write to", f"{self.folder}: {error.strerror}", "set LOG_DIR")
        for leftover in () if self.dry else self.folder.glob("*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink()

    def advice(self) -> str:
        """How to go on with this run after it has ended early."""
        there = self.checkpoint.is_file()
        return f"go on with RUN_ID={self.folder.name} RESUME=1" if there else "there is no checkpoint to go on from"

    def line(self, text: str, console: bool = True) -> None:
        """One line to train.log and to the console."""
        if self.rank == 0:
            self.append("train.log", text)
            if console:
                say(text)

    def append(self, name: str, text: str) -> None:
        """A line to a file of the run, if the disk takes it."""
        path = Path(os.devnull) if self.dry else self.folder / name
        try:
            with open(path, "a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
                file.write(text + "\n")
        except OSError as error:
            if not self.lost:
                say(f"notice: {path}: {error.strerror or error}; lines are lost, the run goes on")
            self.lost = True

    def metrics(self, **values: object) -> None:
        if self.rank == 0:
            self.append("metrics.jsonl", finite_json(values))

    def write_file(self, path: Path, content: bytes, needed: bool = True) -> None:
        """Writes a file of the run; one that is not needed may fail with a notice. Raises InputError."""
        try:
            write_atomically(path, content)
        except OSError as error:
            mend = f"free some space, then {self.advice()}"
            require(not needed, path, "a file that can be written", error.strerror or error, mend)
            self.line(f"notice: {path}: {error.strerror or error}; going on without it")

    def forget_after(self, state: TrainState) -> None:
        """Drops the metrics of what a resumed run will do again."""
        path = self.folder / "metrics.jsonl"
        if self.rank == 0 and path.is_file() and not self.dry:
            rows = path.read_bytes().splitlines(keepends=True)
            self.write_file(path, b"".join(row for row in rows if is_before(row, state)), needed=False)

    def progress(self, part: float, text: str) -> None:
        if self.rank == 0 and sys.stderr.isatty():
            form = "{percentage:3.0f}% |{bar}| {postfix}"
            self.bar = self.bar or tqdm(total=100, leave=False, bar_format=form)
            self.bar.n = round(100 * part, 1)
            self.bar.set_postfix_str(text)

    @contextlib.contextmanager
    def noting_crashes(self) -> Iterator[None]:
        """Writes into train.log, or a file of its own for another process, why the run ended; closes the bar."""
        try:
            yield
        except InputError as error:
            self.line(f"stopped: {error}", console=False)
            raise
        except Exception:
            self.append("train.log" if self.rank == 0 else f"crash_rank{self.rank}.log", traceback.format_exc())
            raise
        finally:
            if self.bar is not None:
                self.bar.close()


def versions() -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in ("torch", "mlx", "numpy", "sentencepiece", "safetensors", "constriction"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def source_commit() -> str | None:
    """Commit of the repository that this script lies in, with "+" where tracked files differ from it."""
    ask, here = "git describe --always --abbrev=40 --dirty=+ --exclude=*".split(), Path(__file__).resolve().parent
    try:
        return subprocess.run(ask, cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache  # of the code that runs, whatever becomes of the file meanwhile
def script_source() -> str:
    """This script's text: SOURCE where a packed file has unpacked it."""
    return globals().get("SOURCE") or Path(__file__).read_bytes().decode()


@functools.cache
def packed(source: str) -> bytes:
    """A script that unpacks `source` in memory and runs it; about a third of its bytes."""
    data = base64.b85encode(lzma.compress(source.encode(), lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME)).decode()
    return f"""import base64, lzma
SOURCE = lzma.decompress(base64.b85decode("{data}")).decode()
exec(compile(SOURCE, __file__, "exec"))
""".encode()


def code_size(count_code: str = "1") -> int:
    """Bytes of code that count, by COUNT_CODE."""
    if count_code == "0":
        return 0
    return len(packed(script_source())) if count_code == "packed" else len(script_source().encode())


def source_sha256() -> str:
    return hashlib.sha256(script_source().encode()).hexdigest()


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text() if info.exists() else "")
    return f"{found.group(1) if found else platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


def peak_process_memory() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_head(run: Run, notices: list[str]) -> None:
    """The first lines of train.log: source, settings, versions, what will be trained on what."""
    c, engine, log, score, stream = run.config, run.engine, run.log, run.score, run.stream
    layout, dtype, val_tokens = parse_layout(c.layout), str(engine.dtype).split(".")[-1], len(score.tokens) - 1
    log.line(script_source() + "\n" + "=" * 120, console=False)
    log.line("config: " + json.dumps(dataclasses.asdict(c)), console=False)
    log.line(f"run: {log.folder}  script: {FRAMEWORK}  sha256: {source_sha256()}  commit: {source_commit()}")
    order = "shuffled" if c.shuffle else "contiguous"
    log.line(f"""\
versions: {json.dumps(versions())}
device: {engine.device_name}  processes: {engine.world}  dtype: {dtype}  compiled: {engine.compiled}
data: {c.data_path}  train tokens: {stream.total} in {len(stream.shards)} shards, {order}  val tokens: {val_tokens}  \
val bytes: {score.bytes}{score.label}
model: {c.layout} ({layout.blocks} blocks, {layout.depth} applied)  parameters: {count_params(c)} stored, \
{effective_params(c)} applied  loops: {c.loop_schedule or layout.loops}  skips: {c.skips}""")
    for notice in notices:
        log.line(notice)


def write_result(run: Run, scores: dict) -> dict:
    """result.json: always the same keys, null where something does not apply or is not finite. Without a score a run
    ends as well without it."""
    c, engine, state = run.config, run.engine, run.state
    result = {
        "run_id": run.log.folder.name,
        "framework": FRAMEWORK,
        "layout": c.layout,
        "loops": state.loops,
        "eval_loops": eval_passes(c, state.loops)[0],
        "eval_stride": c.eval_stride or c.train_seq_len,
        "params_stored": count_params(c),
        "params_effective": effective_params(c),
        "seed": c.seed,
        "steps": state.step,
        "tokens": state.tokens,
        "train_flops": state.flops,
        "train_time_ms": round(1000 * state.seconds),
        "tok_s": round(state.tokens / max(state.seconds, 1e-9)),
        "peak_mem_bytes": engine.peak_memory(),
        "val_tokens": len(run.score.tokens) - 1,
        "bytes_cap": c.bytes_cap,
        "quantizer": c.quantizer,
        "count_code": c.count_code,
        "device": engine.device_name,
        "world_size": engine.world,
        "versions": versions(),
        "commit": source_commit(),
        "script_sha256": source_sha256(),
        "config_sha256": config_sha256(c) if c.mode == "train" else None,  # an export knows not how it was trained
        "dataset": Path(c.data_path).name,
        "dataset_sha256": dataset_sha256(c),
        "complete": False,
    }
    result = json.loads(finite_json(result | dict.fromkeys(SCORES) | scores))
    if engine.rank == 0:
        content = (json.dumps(result, indent=1) + "\n").encode()
        run.log.write_file(run.log.folder / "result.json", content, needed=result["val_bpb"] is not None)
    return result


def report(run: Run, r: dict, made: Export, seconds: float) -> None:
    """The closing block; `r` is what result.json says, `seconds` those of the export."""
    c, state, log = run.config, run.state, run.log
    code = f"code {r['bytes_code']}" + {"1": "", "packed": " packed", "0": ", not counted"}[c.count_code]
    aimed = f", {made.loss_aimed:.5f} nats aimed at" if calibrates(c) else ""
    clocked = c.max_wallclock_seconds and c.mode == "train" and not c.round_from
    kept = f" ({c.calib_seconds:g} s were kept)" if clocked else ""
    calibration = f", {r['calib_time_ms'] / 1000:.1f} s of them calibration{kept}" if r["calib_time_ms"] else ""
    log.line(f"""---
score:    {r["val_bpb"]:.4f} bits per byte from disk ({r["val_bpb_raw"]:.4f} before export, {r["eval_loops"]} passes)\
{run.score.label}
size:     {r["bytes_total"]} bytes of {c.bytes_cap}: {"PASS" if r["fits"] else "FAIL"} ({code} + \
artifact {r["bytes_artifact"]}, {r["bits_per_weight"]:.3f} bits a weight)
export:   {r["quantizer"]}{aimed}, {seconds:.1f} s{calibration}, {made.rounds} round{"s" * (made.rounds > 1)}
training: {state.step} steps, {state.tokens} tokens, {state.flops:.3g} FLOPs, {state.seconds:.1f} s, \
{r["tok_s"]} tok/s, peak memory {r["peak_mem_bytes"] / 2**20:.0f} MiB
files:    {log.folder}: train.log metrics.jsonl result.json {"checkpoint.safetensors " * log.checkpoint.is_file()}\
model.safetensors {log.artifact.name}""")


# ======================================================================================================================
# MAIN [shared]
# Sampling is naive: every token runs the whole model on the last train_seq_len tokens.
# ======================================================================================================================
TOP_K = 50  # samples are drawn from the likeliest


def check_run(c: Config) -> None:
    name = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", c.run_id or "x")
    require(name, "RUN_ID", 'letters, digits, ".", "_" and "-"', f'"{c.run_id}"')
    if c.mode in TRAINS:
        file, mend = c.artifact or c.checkpoint, "to start from weights set INIT_FROM"
        require(not file, "ARTIFACT, CHECKPOINT", "MODE=eval or MODE=sample", f"MODE={c.mode}", mend)
        require(not c.resume or c.run_id, "RESUME=1", "the RUN_ID of the run to go on with", "none")
        return
    require(not c.resume, "RESUME=1", "MODE=train or MODE=preflight", f"MODE={c.mode}", "unset it")
    given = bool(c.artifact) + bool(c.checkpoint)
    found = "both" if given == 2 else "neither"
    require(given == 1, f"MODE={c.mode}", "one of ARTIFACT=<file> and CHECKPOINT=<file>", found)
    whole = c.checkpoint or c.mode != "export"
    require(whole, "MODE=export", "CHECKPOINT=<file>", f"ARTIFACT={c.artifact}, whose weights are rounded already")


def pick_token(logits: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    """Draws a token id from logits [vocab]; the likeliest at temperature 0."""
    if temperature == 0:
        return int(logits.argmax())
    kept = np.argsort(-logits, kind="stable")[:TOP_K]
    weights = np.exp((logits[kept] - logits[kept[0]]).astype(np.float64) / temperature)
    return int(rng.choice(kept, p=weights / weights.sum()))


def sample(c: Config, engine: Engine, loops: int) -> str:
    """The text that the model writes after PROMPT."""
    tokenizer, rng = load_tokenizer(c.tokenizer_path, c.vocab_size, c.data_path), np.random.default_rng(c.seed)
    start = [tokenizer.bos_id()] if tokenizer.bos_id() >= 0 else []
    ids = start + tokenizer.encode(c.prompt) or [0]
    for _ in range(c.sample_tokens):
        logits = engine.next_logits(np.array(ids[-c.train_seq_len :]), loops)
        require(np.isfinite(logits).all(), c.artifact or c.checkpoint, "a model with finite logits", "others")
        ids.append(pick_token(logits, c.temperature, rng))
    return tokenizer.decode([i for i in ids if i not in start])


def score_file(c: Config, engine: Engine, loops: int) -> str:
    """MODE=eval: for every number of passes the line that says the score."""
    score = together(engine, lambda: Score(c))
    must_agree(engine, {"val_tokens": zlib.crc32(np.ascontiguousarray(score.tokens)), "val_bytes": score.bytes})
    warn(engine, score.notices())
    count, lines = len(score.tokens) - 1, []
    for passes in eval_passes(c, loops):
        loss = evaluate(c, engine, score.tokens, passes)
        if not (lines or math.isfinite(loss)):  # of the passes that count; the same on every process
            raise Agreed(f"{c.artifact or c.checkpoint}: expected a model with a finite loss, found {loss}")
        said = f"loops:{passes} stride:{c.eval_stride or c.train_seq_len} tokens:{count}{score.label}"
        lines.append(f"eval val_loss:{loss:.8f} val_bpb:{score.bpb(loss):.8f} {said}")
    return "\n".join(lines)


def export_file(c: Config, engine: Engine, notices: list[str], loops: int) -> int:
    """MODE=export: a new artifact of trained weights, with the export's settings of now, scored as after training."""
    notices = notices + together(engine, lambda: check_before_start(c), first_only=True)
    score = together(engine, lambda: Score(c))
    stream = together(engine, lambda: TokenStream(find_shards(c.data_path, "train", c.vocab_size), c))
    must_agree(engine, {"data": dataset_sha256(c)})
    run = Run(c, engine, score, stream, TrainState(loops=loops), None, notices)
    with run.log.noting_crashes():
        return finish(run)


def use_file(c: Config, engine: Engine, notices: list[str], weights: dict[str, np.ndarray], loops: int) -> int:
    """The modes that need trained weights: eval, sample and export. Returns the exit code."""
    must_agree(engine, {"weights": weights_sha256(weights), "loops": loops})
    engine.build(weights, training=False)
    if c.mode == "export":
        return export_file(c, engine, notices, loops)
    warn(engine, [*notices, *engine.notices])
    text = sample(c, engine, eval_passes(c, loops)[0]) if c.mode == "sample" else score_file(c, engine, loops)
    return 1 if engine.rank == 0 and not say(text) else 0


def warn(engine: Engine, notices: list[str]) -> None:
    """Notices for standard error, where standard output is the answer alone."""
    for notice in notices if engine.rank == 0 else ():
        complain(notice)


def seconds_of(engine: Engine, work: Callable, *arguments: object) -> float:
    """Seconds that the first process takes for `work`."""
    began = time.perf_counter()
    work(*arguments)
    return engine.gather([time.perf_counter() - began])[0, 0].item()


def expected_use(c: Config, state: TrainState, took: dict[int, float]) -> np.ndarray:
    """Steps, seconds and FLOPs from `state` to the end of training if a step with n passes takes took[n] seconds."""
    caps, used = (c.iterations, seconds_to_train(c), c.max_train_flops), [state.step, state.seconds, state.flops]
    schedule, used = parse_loop_schedule(c.loop_schedule, parse_layout(c.layout).loops), np.array(used, float)
    for (_, mean), (end, _) in zip(schedule, [*schedule[1:], (1.0, 0)]):
        drawn = [draw_loops(c, mean, step) for step in range(200 if c.loop_sample else 1)]
        flops = np.mean([train_flops_per_token(c, passes) for passes in drawn]) * c.train_batch_tokens
        cost = np.array([1.0, np.mean([took[passes] for passes in drawn]), flops])
        used += cost * max(0.0, min((end * cap - u) / x for cap, u, x in zip(caps, used, cost) if cap))
    return used


def preflight(run: Run, warm: dict[int, float], start: float) -> int:
    """MODE=preflight: times some steps and the scoring of a step's tokens, and says what the run would take."""
    c, engine, score, state = run.config, run.engine, run.score, run.state
    took = {passes: seconds_of(engine, engine.warm_up, run.stream, passes, 3) / 3 for passes in warm}
    steps, seconds, flops = expected_use(c, state, took)
    passes, *others = eval_passes(c, parse_layout(c.layout).loops)
    ends = range(c.train_seq_len, len(score.tokens), c.eval_stride or c.train_seq_len)
    few = ends[: c.train_batch_tokens // c.train_seq_len]
    scoring = [seconds_of(engine, evaluate, c, engine, score.tokens[: few[-1] + 1], passes) for _ in range(2)][1]
    scores = 2 + sum(flops_per_token(c, n) for n in others) / flops_per_token(c, passes)
    scores += (math.ceil(steps) - 1) // c.val_loss_every - state.step // c.val_loss_every if c.val_loss_every else 0
    looks = 2.5 * max(took.values()) * calibration_tokens(c, engine.world) / c.train_batch_tokens
    looks = export_seconds(c) if c.max_wallclock_seconds else looks
    rounded = max(count_params(c) / engine.world, *map(math.prod, param_shapes(c).values()))  # by one process
    coding = 4e-6 * rounded * (4 if c.target_bytes else 1)  # a weight and round in records/demo/train.log
    parts = [start, seconds - state.seconds, scores * scoring * len(ends) / len(few)]
    parts.append(looks + coding if calibrates(c) else 0.0)
    start, training, scoring, export, paid = (f"{part / 60:.2f}" for part in [*parts, sum(parts)])
    code, cap = code_size(c.count_code), c.target_bytes or c.bytes_cap
    size = cap - code if c.target_bytes else count_params(c) * LIKELY_BITS[c.quantizer] / 8
    run.log.line(f"""---
steps:    {steps:.0f}, {steps * c.train_batch_tokens:.4g} tokens, {flops:.3g} FLOPs expected; a step (measured): \
{", ".join(f"{1000 * s:.1f} ms with {n} pass{'es' * (n > 1)}" for n, s in took.items())}
paid:     {paid} minutes a seed: start {start} ({sum(warm.values()):.0f} s compiling, measured), training {training}, \
evaluation {scoring} ({scores:.1f} times, from {len(few)} of {len(ends)} windows), export {export} (estimated)
room:     {engine.peak_memory() / 2**30:.2f} GiB of memory (measured){engine.memory}; \
{run.log.room[1] / 1e9:.3f} GB of {run.log.room[0] / 1e9:.1f} free on disk
data:     {dataset_sha256(c)} (SHA-256 of shards and tokenizer)
artifact: {"likely fits" if code + size <= cap else "MAY NOT FIT"}: code {code} + about {size:.0f} of {cap} bytes, \
{8 * size / count_params(c):.2f} bits a weight""")
    return 0


def help_text() -> str:
    """What --help prints: the head of this script and its settings."""
    source = script_source()
    settings = source[source.index("class Config:\n") : source.index("\nPRESETS = ")]
    head = source.split('"""')[1]  # python -OO leaves no __doc__
    return f"{head}\nSettings (as --name=value or NAME=value):\n\n{settings}"


def run(argv: list[str], environ: dict[str, str]) -> int:
    """All that the command line asks for; returns the exit code."""
    if "--help" in argv or "-h" in argv:
        say(help_text())
        return 0
    c, notices = load_config(argv, environ, DEFAULT_PRESET)
    weights, loops = None, 0
    if c.mode not in TRAINS:
        weights, model, loops = load_model_file(c.artifact or c.checkpoint)
        notices += [f"notice: {name.upper()}={model.get(name)}, as the file says, not {asked}" for name in MODEL_FIELDS
                    if (asked := getattr(c, name)) not in (model.get(name), getattr(Config, name))]  # fmt: skip
        c = model_config(dataclasses.replace(c, compile=c.compile and c.mode != "sample"), model)
    engine, code = Engine(c), 1
    try:
        settings = {name: value for name, value in dataclasses.asdict(c).items() if name not in OF_A_HOST}
        must_agree(engine, settings | {"script": source_sha256()})
        code = use_file(c, engine, notices, weights, loops) if weights else train(c, engine, notices)
    except Agreed as error:
        if engine.rank == 0:
            complain(f"error: {error}")
    except Exception as error:
        if engine.world == 1 and c.mode != "preflight":  # whose answer this line is: mostly, that memory will not do
            raise
        complain(f"error: process {engine.rank}: {str(error) or type(error).__name__}")
        if engine.world > 1:
            os._exit(1)  # at once, so that the launcher ends the others, which would wait for this one
    engine.close(code)
    return code


def complain(text: str) -> None:
    """One line on standard error, if there is one."""
    with contextlib.suppress(OSError, ValueError):
        print(" ".join(text.split()), file=sys.stderr, flush=True)


def open_streams() -> None:
    """A standard stream that was closed goes nowhere; one whose encoding lacks a letter shows its number."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "r+")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)


def main() -> None:
    open_streams()
    try:
        code = run(sys.argv[1:], dict(os.environ))
    except InputError as error:
        complain(f"error: {error}")
        code = 1
    except KeyboardInterrupt:  # outside the training loop, which stops by itself
        complain("stopped by Ctrl-C")
        code = 128 + signal.SIGINT
    sys.exit(code)


if __name__ == "__main__":
    main()
