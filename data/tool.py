"""What every tool in data/ and records/ shares: one-line errors, exit codes and safe writing. Standard library only."""

import argparse
import hashlib
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class InputError(ValueError):
    """A mistake that the user can mend. The message is one line: what, where, expected, found, how to mend."""


def need(holds: object, what: object, expected: str, found: object, mend: str = "") -> None:
    """Raises InputError "what: expected ..., found ...; mend" unless `holds`."""
    if not holds:
        raise InputError(f"{what}: expected {expected}, found {found}" + (f"; {mend}" if mend else ""))


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument as an InputError; its description keeps its line breaks."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str):
        raise InputError(f"{message}; see --help")


def run_tool(main, argv: list[str] | None = None) -> int:
    """Calls `main(argv)`, which returns an exit code; an InputError becomes one `error:` line and exit code 1."""
    try:
        return main(argv) or 0
    except InputError as error:
        text = " ".join(str(error).split())  # which may quote a foreign file
        print("error:", "".join(letter if letter.isprintable() else "?" for letter in text), file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        where = error.filename or "a file"
        print(f"error: {where}: {error.strerror or error}; check path, permissions and disk space", file=sys.stderr)
    return 1


@contextmanager
def atomic(path: Path, mode: str = "w"):
    """Opens a temporary neighbour of `path`; on success it takes the name `path`, on failure it goes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, mode, encoding=None if "b" in mode else "utf-8", newline=None if "b" in mode else "\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as file:
        file.write(text)


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, what: str = "a JSON object") -> dict:
    """The object in a JSON file. Raises InputError if there is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: expected {what}, found nothing to read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected {what}, found no JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected {what}, found a {type(value).__name__}")
    return value


def sha256_of(path: Path, block: int = 1 << 20) -> str:
    """SHA-256 of a file, 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(block):
            digest.update(data)
    return digest.hexdigest()
