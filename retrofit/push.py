"""Publish a folder of a model on the Hugging Face hub: an export of a run, or a retrofit of a pretrained model.

    python retrofit/push.py exports/RUN NAME/REPO --dry-run     files, sizes and model card, without network
    python retrofit/push.py exports/RUN NAME/REPO               needs `hf auth login` or HF_TOKEN

Goes up: the files in the folder, not its subfolders (a training's checkpoints), and not make.json and eval_log.json,
which name paths of this machine. The model card, README.md, is written from what was measured: a run's result.json, a
retrofit's eval.json. One of your own is kept. HF_ENDPOINT names another hub, as for all of huggingface_hub.
"""

import json
import math
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
for place in (ROOT / "retrofit", ROOT / "data"):
    if str(place) not in sys.path:
        sys.path.insert(1, str(place))  # behind the folder of the tool that was started

from tool import InputError, Parser, read_json, run_tool, write_text  # noqa: E402

CARD = "README.md"
OURS = "<!-- written by retrofit/push.py; without this line it keeps your text -->"
STAYS = ("make.json", "eval_log.json")  # they name paths of this machine
UNFINISHED = (".part", ".tmp", ".lock", ".incomplete")


class Upload(NamedTuple):
    """What goes where."""

    folder: Path
    repo: str
    files: list[Path]  # without the card
    left_out: list[str]
    config: dict
    card: str | None  # to write; None keeps the user's own


# What is in the folder -----------------------------------------------------------------------------------------------


def check_weights(path: Path) -> None:
    """Raises InputError for a safetensors file that is damaged or cut short."""
    size, expected = path.stat().st_size, "a whole safetensors file"
    mend = "make the folder again"
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            head = json.loads(file.read(min(length, size)))
        ends = [entry["data_offsets"][1] for name, entry in head.items() if name != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path}: expected {expected}, found another kind of file; {mend}") from None
    if whole != size:
        raise InputError(f"{path}: expected {expected} of {whole} bytes, found {size}; {mend}")


def check_folder(folder: Path) -> dict:
    """The folder's config.json. Raises InputError unless mlx-lm would find a whole model there."""
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of retrofit/export_mlx.py or retrofit/hf.py, found none")
    config = read_json(folder / "config.json", "a model's folder with its config.json")
    index = folder / "model.safetensors.index.json"
    shards = set()
    if index.exists():
        named = read_json(index, "an index of weights").get("weight_map")
        shards = {str(name) for name in named.values()} if isinstance(named, dict) else set()
    weights = sorted({path.name for path in folder.glob("model*.safetensors")} | shards) or ["model.safetensors"]
    tokenizer = [] if (folder / "tokenizer.model").exists() else ["tokenizer.json"]
    model_file = [config["model_file"]] if isinstance(config.get("model_file"), str) else []
    for name in (*weights, *tokenizer, *model_file):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: expected {name}, found no such file; make the folder again")
    for name in weights:
        check_weights(folder / name)
    return config


def files_of(folder: Path) -> tuple[list[Path], list[str]]:
    """(files that go up, without the card; names of what stays here)."""
    files, left_out = [], []
    for path in sorted(folder.iterdir()):
        stays = path.name.startswith((".", "_")) or path.suffix in UNFINISHED or path.name in STAYS
        if path.is_dir() or stays:
            left_out.append(path.name + "/" * path.is_dir())
        elif path.name != CARD:
            files.append(path)
    return files, left_out


# The model card ------------------------------------------------------------------------------------------------------


def loose_json(path: Path) -> object:
    """What a JSON file says; None where there is none to read, since a card can do without."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def number(value: object, form: str) -> str:
    """A finite number as text; "–" for anything else."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return format(value, form) if good else "–"


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells)


def run_table(result: dict, exported_from: object) -> str:
    """What a run's result.json says of the weights in the folder: those before export, or the artifact's."""
    raw = "" if exported_from == "model.int6.rgpt" else "_raw"
    what = "the artifact, as read back from disk" if not raw else "the weights before rounding"
    rows = [
        [f"bits per byte ({what})", number(result.get(f"val_bpb{raw}"), ".4f")],
        ["loss, nats a token", number(result.get(f"val_loss{raw}"), ".4f")],
        ["passes when scored", number(result.get("eval_loops"), "d")],
        ["validation", f"{number(result.get('val_tokens'), ',d')} tokens of {result.get('dataset', '–')}"],
        ["parameters stored", number(result.get("params_stored"), ",d")],
        ["parameters applied", number(result.get("params_effective"), ",d")],
        ["training", f"{number(result.get('tokens'), ',d')} tokens, {number(result.get('train_flops'), '.3g')} FLOPs"],
    ]
    if result.get("complete") is False:
        rows.append(["not complete", "stopped early, or scored on a part of the validation text"])
    return markdown_table(["measured", ""], rows)


def eval_table(rows: object, log: object) -> str:
    """What a retrofit's eval.json says of each number of passes, and eval_log.json of its parent; "" if nothing."""
    before = log.get("untrained_one_pass") if isinstance(log, dict) else None
    found = [("parent", before)] if isinstance(before, dict) else []
    listed = rows if isinstance(rows, list) else []
    found += [(number(row.get("passes"), "d"), row) for row in listed if isinstance(row, dict)]
    shown = [[name, number(row.get("loss"), ".4f"), number(row.get("bits_per_byte"), ".4f")] for name, row in found]
    return markdown_table(["passes", "nats a token", "bits per byte"], shown) if shown else ""


def measured(folder: Path, config: dict) -> str:
    """The tables of the card; "" where nothing was measured."""
    result, tables = loose_json(folder / "result.json"), []
    if isinstance(result, dict):
        tables.append(run_table(result, config.get("exported_from")))
    log = loose_json(folder / "eval_log.json")
    if table := eval_table(loose_json(folder / "eval.json"), log):
        text = log.get("text") if isinstance(log, dict) else None
        tables.append(table + (f"\n\nScored on {text}, {number(log.get('bytes'), ',d')} bytes." if text else ""))
    return "\n\n".join(tables)


def layout_of(config: dict) -> str | None:
    """P+CxR+D of an export or of a retrofit."""
    for key in ("model", "recurrence"):
        if isinstance(config.get(key), dict) and isinstance(config[key].get("layout"), str):
            return config[key]["layout"]
    return None


def parent_of(folder: Path) -> str | None:
    """The hub's name of the model that a retrofit was made of; None where it is a path, or unknown."""
    made = loose_json(folder / "make.json")
    parent = made.get("parent") if isinstance(made, dict) else None
    named = isinstance(parent, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", parent)
    return parent if named and not Path(parent).exists() else None


def card_text(folder: Path, repo: str, config: dict, license_id: str | None) -> str:
    """The model card: metadata, what it is, how to use it, what was measured."""
    from huggingface_hub import ModelCardData

    parent, layout, loops = parent_of(folder), layout_of(config), config.get("loops")
    data = ModelCardData(library_name="mlx", pipeline_tag="text-generation", tags=["mlx", "depth-recurrent"],
                         base_model=parent, license=license_id)  # fmt: skip
    trust = ", trust_remote_code=True" if config.get("model_file") else ""
    looped = layout is not None and "x" in layout
    what = f"[{parent}](https://huggingface.co/{parent})" if parent else "A language model"
    said = f"{what}, whose middle blocks run several times over: depth without more weights." if looped else f"{what}."
    if looped:
        said += f" Layout `{layout}` (blocks once + looped x passes + once), set to {loops} passes."
    lines = ["---", data.to_yaml(), "---", OURS, "", f"# {repo.rpartition('/')[2]}", "", said, "", "```python",
             "from mlx_lm import generate, load", "", f'model, tokenizer = load("{repo}"{trust})',
             'print(generate(model, tokenizer, prompt="The", max_tokens=100))', "```", ""]  # fmt: skip
    if trust:
        lines += [f"`pip install mlx-lm`. The model is `{config['model_file']}` in this repository: read it, since "
                  "`trust_remote_code=True` (in mlx-lm's commands `--trust-remote-code`) runs it.", ""]  # fmt: skip
    if looped:
        lines += [f'Other numbers of passes: `load("{repo}"{trust}, model_config={{"loops": 1}})`.', ""]
    return "\n".join([*lines, "## Measured", "", measured(folder, config) or "Nothing yet.", ""])


def new_card(folder: Path, repo: str, config: dict, license_id: str | None) -> str | None:
    """The card to write; None where the folder has one of the user's own. mlx-lm's cards have no text."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        text = ""
    body = re.sub(r"\A---\n.*?\n---\s*", "", text, flags=re.S)
    return card_text(folder, repo, config, license_id) if OURS in text or not body.strip() else None


# The hub -------------------------------------------------------------------------------------------------------------


def check_repo(repo: str) -> None:
    """Raises InputError for a name that the hub does not allow."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"REPO: expected a name such as you/my-model, found {repo!r} ({reason})") from None


@contextmanager
def one_line(repo: str):
    """Turns what huggingface_hub raises into an InputError; errors of this machine's disk pass."""
    import httpx2

    try:
        yield
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:  # RuntimeError: hf_xet
        if isinstance(error, InputError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        found = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        if status in (401, 403):
            mend = "log in with a token that may write there: hf auth login"
            raise InputError(f"{repo}: access refused (HTTP {status}); {mend}") from None
        if status == 404:
            raise InputError(f"{repo}: not found (HTTP 404, {found}); check its owner's name") from None
        raise InputError(
            f"{repo}: expected a finished upload, found an error ({found}); nothing is lost: run the same command "
            "again, what has arrived is not sent twice"
        ) from None


def hub():
    """The hub of this user. Raises InputError without a token."""
    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise InputError("token: expected one for the hub, found none; run hf auth login, or set HF_TOKEN")
    return HfApi()


def send(api, upload: Upload, private: bool) -> str:
    """Uploads and looks whether all has arrived; returns the address. Raises InputError."""
    if upload.card is not None:
        write_text(upload.folder / CARD, upload.card)
    sizes = {path.name: path.stat().st_size for path in (*upload.files, upload.folder / CARD)}
    with one_line(upload.repo):
        address = api.create_repo(upload.repo, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=upload.folder,
            allow_patterns=list(sizes),
            commit_message="Upload with retrofit/push.py",
        )
        arrived = {file.path: getattr(file, "size", None) for file in api.get_paths_info(address.repo_id, list(sizes))}
    if missing := [name for name, size in sizes.items() if arrived.get(name) != size]:
        found = f"{len(missing)} not there or of another size: {', '.join(missing[:3])}"
        raise InputError(f"{upload.repo}: expected {len(sizes)} files, found {found}; run the same command again")
    return str(address)


def describe(upload: Upload) -> str:
    """What goes up, a line a file."""
    sizes = [(path.name, path.stat().st_size) for path in upload.files]
    own = (upload.folder / CARD).stat().st_size if upload.card is None else len(upload.card.encode())
    sizes.append((CARD + (" (yours)" if upload.card is None else " (written)"), own))
    width = max(len(name) for name, _ in sizes)
    lines = [f"  {name:{width}}  {size:>14,} bytes" for name, size in sizes]
    lines.append(f"  {f'{len(sizes)} files':{width}}  {sum(size for _, size in sizes):>14,} bytes")
    return "\n".join(lines + ([f"  stays here: {', '.join(upload.left_out)}"] if upload.left_out else []))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of retrofit/export_mlx.py or retrofit/hf.py")
    parser.add_argument("repo", metavar="REPO", help="where: name/of-the-model; made if it is not there")
    parser.add_argument("--private", action="store_true", help="if it is made, only you can see it")
    parser.add_argument("--license", metavar="ID", help="of the weights, for the card: mit, apache-2.0, ...")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, without network; write nothing")
    args = parser.parse_args(argv)
    check_repo(args.repo)
    config = check_folder(args.folder)
    files, left_out = files_of(args.folder)
    card = new_card(args.folder, args.repo, config, args.license)
    upload = Upload(args.folder, args.repo, files, left_out, config, card)
    api = None if args.dry_run else hub()
    print(f"{'would push' if args.dry_run else 'pushing'} {args.folder} to {args.repo}"
          f"{' (private)' if args.private else ''}\n{describe(upload)}")  # fmt: skip
    if args.dry_run:
        print(f"--- {CARD}\n{card}" if card is not None else f"{CARD}: yours, as it is")
        return 0
    print(send(api, upload, args.private))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
