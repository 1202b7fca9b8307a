"""What the record tools do with a training script: load it, start it, hand signals on, keep its runs to themselves."""

import contextlib
import fcntl
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

from common import ROOT, short
from tool import need


def load_module(path: Path):
    """The module of a training script, with whatever that raises."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}_of_the_runs", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def launch(processes: int) -> list[str]:
    """How a command begins that runs a script in so many processes."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *(several if processes > 1 else [])]


@contextlib.contextmanager
def handling(handler, *numbers: int):
    """These signals go to `handler`, but for those that this process ignores, as under nohup."""
    before = {n: signal.signal(n, handler) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def hold(path: Path):
    """A locked file, open for reading and appending: two of a tool would overwrite each other's runs. A run
    inherits it and holds it, too, where it outlives the tool. Raises InputError if it is held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.set_inheritable(file.fileno(), True)
    except BlockingIOError:
        need(False, short(path), "no other process at these runs", "one", "wait for it or stop it")
    except OSError:  # a disk without locks
        pass
    return file


def git(*words: str) -> bytes | None:
    """What a command of git prints in this repository; None where it fails, or there is no git."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None
