"""The second step of hf.py: trains a folder that `make` wrote, with mlx-lm's trainer.

Text rows, loop counts and checkpoints are ours; the step, its compilation, gradient accumulation and progress are
mlx-lm's. Loop sampling and curriculum follow Retrofitted Recurrence (RR, arXiv 2511.07384).
"""

import contextlib
import hashlib
import io
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import hf_backend
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import recurrent
from hf_parent import check_length, opened, parameter_count
from hf_text import (
    CHUNK,
    Encoder,
    Windows,
    cross_entropy_sum,
    documents,
    first_bytes,
    score,
    scoring_windows,
    training_rows,
)
from mlx import nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.tuner import trainer
from mlx_lm.tuner.callbacks import TrainingCallback
from tool import InputError, need, read_json, write_json

SIGMA = 0.5  # of the log of the Poisson's rate, as in RR
TRAINED_FILE = "model-trained.safetensors"
FOLDER = "training"  # inside the model's folder: checkpoint, settings, logs
PARTS = ("lora", "core", "inject", "all")
CURRICULA = ("const", "linear", "1-sqrt")


@dataclass(frozen=True)
class Settings:
    """What decides a training's result; a resumed one must have the same."""

    train: str  # one of PARTS
    rank: int  # of the LoRA
    steps: int  # of the optimizer
    batch: int  # rows a micro-batch
    accumulate: int  # micro-batches a step
    length: int  # tokens a row
    lr: float
    warmup: float  # share of the steps
    clip: float  # of the gradient's norm
    weight_decay: float
    passes: int  # the same number every time; 0: drawn
    mean: float  # RR's mean: of the passes after the first
    cap: int  # most passes drawn
    curriculum: str  # how the mean grows
    curriculum_share: float  # over this share of the steps
    bptt: int  # passes at the end with a gradient; 0: all
    distill: float  # weight of the distillation
    temperature: float
    seed: int
    data: str = ""  # hash of the rows


# How many passes ------------------------------------------------------------------------------------------------------


def draw_passes(mean: float, cap: int, rng: np.random.Generator) -> int:
    """One count: 1 + Poisson(exp(N(log mean - sigma^2/2, sigma))), at most `cap`; uncapped it averages mean + 1."""
    rate = math.exp(rng.normal(math.log(mean) - SIGMA**2 / 2, SIGMA))
    return min(cap, 1 + int(rng.poisson(rate)))


def expected_passes(mean: float, cap: int) -> float:
    """The mean of `draw_passes`: 1 + sum over k < cap of P(Poisson >= k), averaged over the rate (Gauss-Hermite)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    rates = np.exp(math.log(mean) - SIGMA**2 / 2 + SIGMA * nodes)
    weights = weights / weights.sum()
    at_most, term, total = np.zeros_like(rates), np.exp(-rates), 1.0
    for k in range(1, cap):
        at_most = at_most + term  # P(Poisson <= k - 1)
        total += float((weights * (1 - at_most)).sum())
        term = term * rates / k
    return total


def mean_at(s: Settings, step: int) -> float:
    """The mean at a step: constant, or RR's curriculum, which grows in whole passes from 1."""
    if s.curriculum == "const" or s.mean <= 1:
        return s.mean
    x = min(1.0, step / max(1.0, s.curriculum_share * s.steps))
    grown = x if s.curriculum == "linear" else 1 - math.sqrt(1 - x)
    return min(s.mean, max(1, math.ceil(s.mean * grown)))


def passes_at(s: Settings, micro: int) -> int:
    """Passes of a micro-batch, a Python integer: mlx-lm compiles one step for each value that occurs."""
    if s.passes:
        return s.passes
    return draw_passes(mean_at(s, micro // s.accumulate), s.cap, np.random.default_rng([s.seed, micro]))


# The loss -------------------------------------------------------------------------------------------------------------


def divergence_sum(teacher: mx.array, student: mx.array) -> mx.array:
    """Sum of KL(teacher || student), nats; logits (n, vocabulary)."""
    log_p = teacher - mx.logsumexp(teacher, axis=-1, keepdims=True)
    log_q = student - mx.logsumexp(student, axis=-1, keepdims=True)
    return (mx.exp(log_p) * (log_p - log_q)).sum()


def output_loss(model, h: mx.array, targets: mx.array, teacher: mx.array | None, weight: float, temperature: float):
    """Sum over tokens of (1 - weight) * CE + weight * T^2 * KL, in chunks whose logits are made again for the gradient.

    h and teacher: states before the output layer, (n, dim); targets (n). Without a teacher: CE.
    """
    module = model.head_module()
    outer = module.trainable_parameters()

    def of_chunk(params, h, targets, *teacher):
        module.update(params)
        targets = mx.stop_gradient(targets)  # a checkpoint asks for the gradient of all its arguments
        logits = model.head(h).astype(mx.float32)
        loss = cross_entropy_sum(logits, targets)
        if not teacher:
            return loss
        goal = mx.stop_gradient(model.head(teacher[0])).astype(mx.float32)
        kl = divergence_sum(goal / temperature, logits / temperature)
        return (1 - weight) * loss + weight * temperature**2 * kl

    once = h.shape[0] <= CHUNK
    run = of_chunk if once else mx.checkpoint(of_chunk)
    total = mx.array(0.0)
    for i in range(0, h.shape[0], CHUNK):
        rows = slice(i, i + CHUNK)
        total = total + run(outer, h[rows], targets[rows], *([] if teacher is None else [teacher[rows]]))
    module.update(outer)  # not the chunk's own view of them: a tied embedding is used elsewhere too
    return total


def make_loss(s: Settings):
    """loss(model, tokens, passes) -> (mean loss, number of tokens), as mlx-lm's trainer calls it.

    Self-distillation: the teacher is the same weights after one pass, without a gradient. It shares the student's
    prelude and first pass, so it costs one coda, and works for every --train; one pass itself learns from CE alone.
    """

    def loss(model, tokens, passes):
        inputs, targets = tokens[:, :-1], tokens[:, 1:].reshape(-1)
        model.bptt = s.bptt
        teacher = None
        if s.distill and passes > 1:
            h, teacher = model.hidden_and_first(inputs, passes)
            teacher = teacher.reshape(-1, teacher.shape[-1])
        else:
            h = model.hidden(inputs, passes)
        total = output_loss(model, h.reshape(-1, h.shape[-1]), targets, teacher, s.distill, s.temperature)
        return total / targets.size, mx.array(targets.size)

    return loss


class Clipped(optim.AdamW):
    """AdamW after the gradient's norm was clipped; mlx-lm's trainer has no other place for it."""

    def __init__(self, clip: float, **kwargs):
        super().__init__(**kwargs)
        self.clip = clip

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        if self.clip:
            gradients, _ = optim.clip_grad_norm(gradients, self.clip)
        return super().apply_gradients(gradients, parameters)


def make_optimizer(s: Settings) -> Clipped:
    warmup = max(1, round(s.warmup * s.steps))
    rise = optim.linear_schedule(0.0, s.lr, warmup)
    fall = optim.cosine_decay(s.lr, max(1, s.steps - warmup))
    schedule = optim.join_schedules([rise, fall], [warmup])
    return Clipped(s.clip, learning_rate=schedule, betas=[0.9, 0.95], weight_decay=s.weight_decay, bias_correction=True)


# What is trained ------------------------------------------------------------------------------------------------------


def linear_paths(model) -> list[str]:
    """Paths of the linear layers of the core that have no LoRA yet."""
    prefix = "model.h" if "h" in model.model else "model.layers"
    paths = []
    for i in model.band():
        for name, module in model.layers[i].named_modules():
            if isinstance(module, (nn.Linear, nn.QuantizedLinear)) and not name.endswith(".linear"):
                paths.append(f"{prefix}.{i}.{name}")
    return paths


def is_quantized(model) -> bool:
    return any(hasattr(module, "bits") for _, module in model.named_modules())


def choose_trainable(model, s: Settings) -> None:
    """Freezes all but what is to be trained, which becomes float32. Raises InputError where nothing can be."""
    if s.train in ("core", "all") and is_quantized(model):
        raise InputError(f"--train {s.train}: expected whole weights, found quantized ones; use lora or inject")
    if s.train == "inject" and model.recurrence.inject == "none":
        raise InputError("--train inject: expected an injection, found none; make the folder with --inject gate")
    mx.random.seed(s.seed)
    model.freeze()
    if s.train == "all":
        model.unfreeze()
    if s.train == "core":
        for i in model.band():
            model.layers[i].unfreeze()
    if s.train == "lora":
        model.add_lora(linear_paths(model), s.rank)
        for i in model.band():
            model.layers[i].unfreeze(keys=["lora_a", "lora_b"], strict=False)
    model.inject.unfreeze()
    model.update(tree_map(lambda w: w.astype(mx.float32), model.trainable_parameters()))
    mx.eval(model.parameters())


def training_memory(model, s: Settings) -> dict[str, float]:
    """An estimate in bytes, by part, at the largest number of passes."""
    config, tokens = model.recurrence.config, s.batch * s.length
    dim = config.get("hidden_size") or config["n_embd"]
    wide = config.get("intermediate_size") or config.get("n_inner") or 4 * dim
    heads = config.get("num_attention_heads") or config["n_head"]
    passes = s.passes or s.cap
    kept = model.core * min(passes, s.bptt or passes) + model.coda + (model.prelude if s.train == "all" else 0)
    trained = sum(w.size for _, w in tree_flatten(model.trainable_parameters()))
    return {
        "weights": sum(w.nbytes for _, w in tree_flatten(model.parameters())),
        "gradient and AdamW": 12 * trained,  # float32: gradient, two moments
        "activations": 4 * tokens * kept * (10 * dim + 4 * wide + 2 * heads * s.length),
        "logits": 4 * 8 * min(CHUNK, tokens) * config["vocab_size"],
    }


# A run ----------------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """The user or the clock ended the run; its checkpoint is written."""


class Run(TrainingCallback):
    """One call of `hf.py train`: feeds mlx-lm's trainer, and between steps validates and saves."""

    def __init__(self, folder: Path, model, s: Settings, rows: np.ndarray, windows: Windows, args):
        self.folder, self.model, self.s, self.rows, self.windows = folder, model, s, rows, windows
        self.place = folder / FOLDER
        self.optimizer = make_optimizer(s)
        self.optimizer.init(model.trainable_parameters())  # or the first step compiled would be compiled again
        self.eval_passes = args.eval_passes
        self.eval_every = args.eval_every or max(1, s.steps // 4)
        self.save_every = args.save_every or max(1, s.steps // 10)
        self.deadline = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
        self.first = 0  # steps done before this call
        self.epoch = -1  # whose order of rows is at hand
        self.stop = False
        self.out = sys.stdout
        self.losses: dict[int, list[float]] = {}  # step -> validation loss at each of eval_passes

    # Logs

    def say(self, line: str) -> None:
        print(line, file=self.out, flush=True)
        with open(self.place / "train.log", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def record(self, **values) -> None:
        with open(self.place / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def on_train_loss_report(self, info: dict) -> None:
        step = self.first + info["iteration"] // self.s.accumulate
        self.record(step=step, **{k: v for k, v in info.items() if k != "iteration"})
        self.say(
            f"step:{step}/{self.s.steps} train_loss:{info['train_loss']:.4f} lr:{info['learning_rate']:.2e} "
            f"tok_s:{info['tokens_per_second']:.0f} peak_mem:{info['peak_memory']:.2f}GB"
        )
        if not math.isfinite(info["train_loss"]):
            raise InputError(
                f"step {step}: expected a finite loss, found {info['train_loss']}; lower --lr and --resume"
            )

    def validate(self, step: int) -> None:
        losses = [score(self.model, self.windows, passes) for passes in self.eval_passes]
        self.losses[step] = losses
        self.record(step=step, passes=self.eval_passes, val_loss=losses)
        shown = " ".join(f"{passes}:{loss:.4f}" for passes, loss in zip(self.eval_passes, losses))
        self.say(f"step:{step}/{self.s.steps} val_loss at passes {shown}")

    # Checkpoints

    def save(self, step: int) -> None:
        """The trained weights where mlx-lm finds them, then the checkpoint; each file whole or not at all."""
        weights = dict(tree_flatten(self.model.trainable_parameters()))
        if not all(mx.isfinite(w).all().item() for w in weights.values()):
            raise InputError(f"step {step}: expected finite weights, found others; lower --lr and --resume")
        stored = {name: self.as_stored(name, w) for name, w in weights.items()}
        replace_tensors(
            self.folder / TRAINED_FILE, {recurrent.TRAINED + k: w for k, w in stored.items()}, {"format": "mlx"}
        )
        tensors = {f"weights.{k}": w for k, w in weights.items()}
        tensors |= {f"optimizer.{k}": w for k, w in tree_flatten(self.optimizer.state)}
        replace_tensors(self.place / "checkpoint.safetensors", tensors, {"step": str(step)})

    def as_stored(self, name: str, weight: mx.array) -> mx.array:
        """A weight of the parent in the parent's dtype; what is new stays float32."""
        new = name.startswith("inject.") or name.endswith(("lora_a", "lora_b"))
        return weight if new else weight.astype(self.model.stored_dtype)

    def resume(self) -> None:
        """Weights, moments, learning rate and place in the text. Raises InputError."""
        path = self.place / "checkpoint.safetensors"
        before = read_json(self.place / "settings.json", "the settings of a training to resume")
        now = asdict(self.s)
        if differ := [f"{k} {before.get(k)} -> {now[k]}" for k in now if before.get(k) != now[k]]:
            raise InputError(
                f"--resume: expected the same settings, found {', '.join(differ)}; or begin with --restart"
            )
        try:
            tensors, meta = mx.load(str(path), return_metadata=True)
            self.first = int(meta["step"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"{path}: expected a checkpoint, found {error}; begin again with --restart") from None
        weights = [(k.removeprefix("weights."), w) for k, w in tensors.items() if k.startswith("weights.")]
        state = [(k.removeprefix("optimizer."), w) for k, w in tensors.items() if k.startswith("optimizer.")]
        self.model.load_weights(weights, strict=False)
        self.optimizer.state = tree_unflatten(state)

    # Steps

    def batches(self, dataset, batch_size, max_seq_length, loop=False, seed=None, comm_group=None):
        """(tokens, passes) of every micro-batch from the first on. What lies between two steps happens here, where
        mlx-lm's trainer asks for the next batch."""
        s = self.s
        for micro in range(self.first * s.accumulate, s.steps * s.accumulate):
            step, part = divmod(micro, s.accumulate)
            if part == 0 and step > self.first:
                self.between(step)
            places = np.arange(micro * s.batch, (micro + 1) * s.batch)
            chosen = [self.row(int(place)) for place in places]
            yield mx.array(np.stack(chosen)), passes_at(s, micro)

    def row(self, place: int) -> np.ndarray:
        """Row of the endless sequence of epochs, each in an order of its own."""
        epoch, i = divmod(place, len(self.rows))
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng([self.s.seed, epoch]).permutation(len(self.rows))
        return self.rows[self.order[i]]

    def between(self, step: int) -> None:
        """After `step` steps."""
        ends = self.stop or time.monotonic() > self.deadline
        if step % self.eval_every == 0 and not ends:
            self.validate(step)
        if step % self.save_every == 0 or ends:
            self.save(step)
        if ends:
            raise Stopped(f"stopped after step {step} of {self.s.steps}; the same command with --resume goes on")

    def train(self) -> None:
        s = self.s
        args = trainer.TrainingArgs(
            batch_size=s.batch,
            iters=(s.steps - self.first) * s.accumulate,
            steps_per_report=10 * s.accumulate,
            steps_per_save=10**9,  # ours keeps the optimizer too
            max_seq_length=s.length,
            adapter_file=str(self.place / "trainer.safetensors"),
            grad_accumulation_steps=s.accumulate,
        )
        quiet = contextlib.nullcontext() if self.out.isatty() else contextlib.redirect_stdout(io.StringIO())
        try:
            with quiet, self.signals():  # mlx-lm's progress bar goes to a terminal only
                trainer.train(
                    self.model,
                    self.optimizer,
                    self.rows,
                    args=args,
                    loss=make_loss(s),
                    iterate_batches=self.batches,
                    training_callback=self,
                )
        finally:
            (self.place / "trainer.safetensors").unlink(missing_ok=True)
        self.save(s.steps)
        self.validate(s.steps)

    @contextlib.contextmanager
    def signals(self):
        """Ctrl-C and SIGTERM end the run after the step that is under way."""

        def note(number, frame):
            self.stop = True
            self.say("stopping after this step")

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def replace_tensors(path: Path, tensors: dict, metadata: dict) -> None:
    """Writes a safetensors file; it takes its name when it is whole."""
    part = path.with_name(f"part-{os.getpid()}-{path.name}")  # not model*: mlx-lm would load it
    try:
        mx.save_safetensors(str(part), tensors, metadata)
        os.replace(part, path)
    except RuntimeError as error:
        raise InputError(f"{path}: expected room for a checkpoint, found {error}; make room and --resume") from None
    finally:
        part.unlink(missing_ok=True)


# The command ----------------------------------------------------------------------------------------------------------


def settings_of(args, loops: int) -> Settings:
    """Settings from the command line; what was left out follows from the layout's passes."""
    names = set(Settings.__dataclass_fields__)
    values = {k: v for k, v in vars(args).items() if k in names}
    values["mean"] = args.mean if args.mean is not None else float(max(1, loops - 1))
    values["cap"] = args.cap or 4 * max(2, loops)
    return Settings(**values)


def check_settings(s: Settings) -> None:
    for name, low in (("rank", 1), ("steps", 1), ("batch", 1), ("accumulate", 1), ("cap", 1)):
        if getattr(s, name) < low:
            raise InputError(f"--{name}: expected at least {low}, found {getattr(s, name)}")
    for name in ("mean", "lr", "temperature", "curriculum_share"):
        if not (math.isfinite(getattr(s, name)) and getattr(s, name) > 0):
            raise InputError(f"--{name.replace('_', '-')}: expected a number above 0, found {getattr(s, name)}")
    for name in ("distill", "warmup"):
        if not 0 <= getattr(s, name) <= 1:
            raise InputError(f"--{name}: expected a number from 0 to 1, found {getattr(s, name)}")
    for name in ("passes", "bptt", "clip", "weight_decay", "seed"):
        if not getattr(s, name) >= 0:
            raise InputError(f"--{name.replace('_', '-')}: expected 0 or more, found {getattr(s, name)}")


def check_run(args) -> None:
    """What decides nothing of the result: when to look, to save and to stop."""
    for name in ("val_bytes", "eval_every", "save_every", "minutes"):
        value = getattr(args, name)
        need(0 <= value < math.inf, f"--{name.replace('_', '-')}", "0 or more", value)
    need(not (args.resume and args.restart), "--resume", "it without --restart", "both")


def read_data(args, s: Settings, encode: Encoder) -> tuple[np.ndarray, Windows]:
    """Rows to train on, and a text to validate on: --val, or the first bytes of --text, which training leaves out."""
    texts = documents(args.text)
    if args.val:
        held = first_bytes(documents(args.val), args.val_bytes)
    else:
        held, texts = held_out(texts, args.val_bytes)
    rows = training_rows(texts, encode, s.length, s.steps * s.accumulate * s.batch)
    return rows, scoring_windows(held, encode, s.length)


def held_out(texts, most: int):
    """The first `most` bytes of a text, and what comes after them."""
    held, left = [], most
    for text in texts:
        data = text.encode()
        head = data[:left].decode(errors="ignore")
        held.append(head)
        left -= len(head.encode())
        if len(data) > len(head.encode()) or left <= 0:
            return held, chain([text[len(head) :]] if text[len(head) :] else [], texts)
    raise InputError(f"--text: expected more than the {most} bytes that are held out, found less; give --val, or a "
                     "smaller --val-bytes")  # fmt: skip


def check_state(folder: Path, args) -> None:
    """Whether a training was begun here, and what to do with it."""
    place = folder / FOLDER
    begun = (folder / TRAINED_FILE).exists() or (place / "checkpoint.safetensors").exists()
    if begun and not (args.resume or args.restart):
        raise InputError(
            f"{folder}: expected an untrained folder, found a training; --resume goes on, --restart begins again"
        )
    if args.resume and not (place / "checkpoint.safetensors").exists():
        raise InputError(f"{place}: expected a checkpoint to resume, found none; leave out --resume")


def begin(folder: Path, s: Settings, resume: bool) -> None:
    """Makes the place for the logs; a new training takes away what an older one left."""
    place = folder / FOLDER
    if not resume:
        for file in (folder / TRAINED_FILE, *(place.glob("*") if place.exists() else ())):
            file.unlink(missing_ok=True)
    place.mkdir(exist_ok=True)
    write_json(place / "settings.json", asdict(s))


def prepare(args) -> Run:
    """Reads and checks everything that a training needs, before it changes the folder."""
    folder = Path(args.folder)
    check_run(args)
    check_state(folder, args)
    model, tokenizer, config = opened(folder, parent_only=True)
    s = settings_of(args, recurrent.parse_layout(config["recurrence"]["layout"])[2])
    check_settings(s)
    width = model.recurrence.config.get("hidden_size") or model.recurrence.config["n_embd"]
    need(s.train != "lora" or s.rank <= width, "--rank", f"at most the parent's width of {width}", s.rank)
    check_length(config, s.length)
    rows, windows = read_data(args, s, Encoder(tokenizer))
    s = Settings(**(asdict(s) | {"data": hashlib.sha256(rows.tobytes()).hexdigest()[:16]}))
    choose_trainable(model, s)
    model.recurrence.parent_only = False
    parts = training_memory(model, s)
    estimate = hf_backend.require_memory(
        parts,
        "lower --batch, --length or --cap, or set --bptt; or take a smaller or 4-bit parent",
        held=parts["weights"],
    )
    run = Run(folder, model, s, rows, windows, args)
    if args.resume:
        run.resume()
        if run.first >= s.steps:
            raise InputError(f"--resume: expected steps left to do, found all {s.steps} done; use --restart")
    begin(folder, s, args.resume)
    trained = sum(w.size for _, w in tree_flatten(model.trainable_parameters()))
    run.say(f"command: {hf_backend.command_line()}")
    run.say(
        f"trains {trained:,} of {parameter_count(model):,} parameters ({s.train}), {s.steps} steps of "
        f"{s.batch * s.accumulate} x {s.length} tokens, {len(rows)} rows; memory: about {estimate / 1e9:.2f} GB"
    )
    return run


def train(args) -> int:
    """`hf.py train`: see hf.py."""
    run = prepare(args)
    s = run.s
    if s.passes:
        run.say(f"passes: {s.passes} in every step")
    else:
        run.say(
            f"passes: drawn, mean {s.mean + 1:.2f}, after the cap of {s.cap} {expected_passes(s.mean, s.cap):.2f}; "
            f"curriculum {s.curriculum}"
        )
    if s.distill and s.passes != 1:
        run.say(f"distillation: weight {s.distill:g}, from the same weights after one pass, without a gradient")
    began = time.monotonic()
    run.validate(run.first)
    try:
        run.train()
    except Stopped as stopped:
        run.say(str(stopped))
        return 0
    report(run, time.monotonic() - began)
    return 0


def report(run: Run, seconds: float) -> None:
    """The last lines: gate, time, and how far every number of passes is from one."""
    inject = run.model.inject
    if "gate" in inject:
        gate = inject.gate
        run.say(f"gate: mean {gate.mean().item():.3f}, from {gate.min().item():.3f} to {gate.max().item():.3f}")
    before, after = run.losses[run.first], run.losses[run.s.steps]
    for i, passes in enumerate(run.eval_passes):
        away = f", {before[i] - before[0]:+.4f} -> {after[i] - after[0]:+.4f} from {run.eval_passes[0]}" if i else ""
        run.say(f"passes {passes}: val_loss {before[i]:.4f} -> {after[i]:.4f}{away}")
    run.say(f"{seconds:.0f} s; wrote {run.folder / TRAINED_FILE}; next: python retrofit/hf.py eval {run.folder}")
