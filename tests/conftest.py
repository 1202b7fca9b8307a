"""Fixtures of all tests: both scripts, a small dataset, and a way to run a script inside this process.

Most tests call `main()` of a script here instead of starting an interpreter, which costs seconds. A test that takes the
fixture `script` runs once for each script; the MLX one is skipped, with the reason, where MLX cannot be imported.
"""

import contextlib
import ctypes
import dataclasses
import functools
import http.server
import importlib
import importlib.util
import io
import json
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import types
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import sentencepiece as spm

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train_gpt", "train_gpt_mlx")
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: a second thread only makes them slower


def lend_matrix_library():
    """Where there is no OpenBLAS, MLX on Linux falls back to a BLAS 20 to 50 times slower than torch's, whose symbols
    are therefore made global before MLX is loaded."""
    torch = sys.platform == "linux" and importlib.util.find_spec("torch")
    if torch:
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(Path(torch.origin).with_name("lib") / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)


lend_matrix_library()

VOCAB = 320
# The smallest run that has everything: prelude, core, coda, two passes, a switch. As environment variables, so that a
# test can override each of them on the command line.
TINY = dict(
    PRESET="laptop",
    LAYOUT="1+2x2+1",
    MODEL_DIM="32",
    NUM_HEADS="2",
    NUM_KV_HEADS="1",
    TRAIN_SEQ_LEN="32",
    TRAIN_BATCH_TOKENS="256",
    VOCAB_SIZE=str(VOCAB),
    ITERATIONS="8",
    MAX_WALLCLOCK_SECONDS="0",
    LOOP_SCHEDULE="0:1,0.5:2",
    VAL_LOSS_EVERY="0",
    VAL_MAX_TOKENS="0",
    TRAIN_LOG_EVERY="1",
    COMPILE="0",
    DEVICE="cpu",
    DTYPE="float32",
)


def pytest_xdist_auto_num_workers(config):
    """One more than there are cores, since tests of several processes wait for each other; each takes about 1 GB.
    PYTEST_XDIST_AUTO_NUM_WORKERS, xdist's own variable, wins."""
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    return int(os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS") or min(len(usable) + 1, 4))


def pytest_addoption(parser):
    parser.addoption("--fuzz", default="400", help="number of damaged artifacts that tests/test_fuzz.py reads")


@functools.cache
def load_script(name):
    """The module of a script, or why it cannot be had."""
    if not (ROOT / f"{name}.py").exists():
        return f"{name}.py does not exist"
    if name == "train_gpt_mlx":
        try:
            import mlx.core  # noqa: F401
        except ImportError as error:
            return f"mlx cannot be imported here ({error})"
    module = importlib.import_module(name)
    module.versions = functools.cache(module.versions)  # reads every package's metadata, twice a run
    return module


def script_or_skip(name):
    module = load_script(name)
    if isinstance(module, str):
        pytest.skip(module)
    return module


@pytest.fixture(scope="session", params=SCRIPTS)
def script(request):
    """One script's module; a test that takes it runs for both."""
    return script_or_skip(request.param)


@pytest.fixture(scope="session")
def both():
    """The modules of both scripts, or a skip."""
    return tuple(script_or_skip(name) for name in SCRIPTS)


@pytest.fixture(scope="session")
def any_script():
    """A module for what is in a shared section."""
    return script_or_skip("train_gpt")


class Data(NamedTuple):
    """A dataset: its folder, its tokenizer, its tokens, and the settings that name them."""

    path: Path
    tokenizer: Path
    train: np.ndarray
    val: np.ndarray
    env: dict


def write_shard(path, ids, magic=20240520, version=1, count=None):
    """A shard as the challenge writes it, or one that is wrong on purpose."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids, dtype="<u2").tobytes())
    return path


def write_dataset(folder, train_parts, val_parts):
    """Shards of given tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, parts in (("train", train_parts), ("val", val_parts)):
        for i, ids in enumerate(parts):
            write_shard(folder / f"fineweb_{split}_{i:06d}.bin", ids)
    return folder


def made_up_documents():
    """Random sentences and sums, always the same."""
    rng = np.random.RandomState(0)
    words = """the a small deep shared early late quiet plain long identical loop block gate depth pass core stack
        token layer curve model prelude coda weight feeds scales mixes repeats trains shortens follows opens
        measures""".split()
    order = {word: rng.choice(words, 4) for word in words}  # each word has four that may follow

    def sentence():
        n, said = int(rng.randint(2, 60)), [words[rng.randint(len(words))]]
        while len(said) < 4 + n % 6:
            said.append(str(order[said[-1]][rng.randint(4)]))
        return f"{n} plus {n} is {2 * n}." if n % 3 == 0 else " ".join(said).capitalize() + "."

    return [" ".join(sentence() for _ in range(rng.randint(4, 30))) for _ in range(2000)]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Made-up text with 320 pieces: three training shards of unequal, odd sizes and two validation shards, so short
    that a run crosses shards and begins again."""
    folder, documents = tmp_path_factory.mktemp("data"), made_up_documents()
    tokenizer_path = folder / "bpe.model"
    with open(tokenizer_path, "wb") as file:
        spm.SentencePieceTrainer.train(sentence_iterator=iter(documents), model_writer=file, model_type="bpe",
                                       vocab_size=VOCAB, byte_fallback=True, minloglevel=2)  # fmt: skip
    tokenizer = spm.SentencePieceProcessor(model_file=str(tokenizer_path))
    val, train = (
        np.array([i for text in texts for i in [tokenizer.bos_id(), *tokenizer.encode(text)]][:count], dtype="<u2")
        for texts, count in ((documents[:100], 1500), (documents[100:300], 3001))
    )
    path = write_dataset(folder / "tiny", [train[:1111], train[1111:1400], train[1400:]], [val[:1000], val[1000:]])
    env = {"DATA_PATH": str(path), "TOKENIZER_PATH": str(tokenizer_path)}
    return Data(path, tokenizer_path, train, val, env)


def clean_environment(**more):
    """This process's environment without settings of the scripts, then `more`."""
    module = load_script("train_gpt")
    settings = {field.name.upper() for field in dataclasses.fields(module.Config)}
    settings |= {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    return {k: v for k, v in os.environ.items() if k not in settings} | {k: str(v) for k, v in more.items()}


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def run_in_process(module, *args, **env):
    """`main()` of a script with these flags and environment variables. An exception that is not bad input passes on."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    argv, environ = sys.argv, dict(os.environ)
    out, err, code = io.StringIO(), io.StringIO(), 0
    cleaned = clean_environment(**env)
    os.environ.clear()
    os.environ.update(cleaned)
    sys.argv = [f"{module.__name__}.py", *args]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            module.main()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        os.environ.clear()
        os.environ.update(environ)
        sys.argv = argv
        for number, handler in before.items():
            signal.signal(number, handler)
    return Outcome(code, out.getvalue(), err.getvalue())


def from_file(path):
    """What `run_in_process` takes to run the script in this file."""
    return types.SimpleNamespace(__name__="train_gpt", main=lambda: runpy.run_path(str(path), run_name="__main__"))


def quicker_script():
    """The name of the script that starts in less time, for what both share."""
    return "train_gpt" if isinstance(load_script("train_gpt_mlx"), str) else "train_gpt_mlx"


def start_cli(module, *args, **env):
    """A script in an interpreter of its own; returns the Popen object."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / f"{module.__name__}.py"), *args],
        env=clean_environment(**env),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def as_script(name, args, env, before, streams):
    """In a forked process: runs a script as an interpreter of its own would, after the code `before`."""
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_NOCTTY), number)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [f"{name}.py", *args]
    exec(before, {})
    importlib.import_module(name).main()


class Forked:
    """Like a Popen object: a script's `main()` in a process of its own, forked from a server that has imported both
    scripts already, which takes seconds. Standard output and standard error go to files."""

    def __init__(self, module, *args, before="", streams=None, **env):
        self.folder = tempfile.TemporaryDirectory()
        self.streams = streams or [Path(self.folder.name, name) for name in ("out", "err")]
        for path in self.streams:
            open(path, "a").close()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["conftest", *SCRIPTS, "torch._dynamo"])
        places = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [places])])
        args = (module.__name__, args, clean_environment(**env), before, [str(path) for path in self.streams])
        try:
            self.process = context.Process(target=as_script, args=args)
            self.process.start()
        finally:
            os.environ.pop("PYTHONPATH")
            os.environ.update({"PYTHONPATH": places} if places else {})

    def poll(self):
        return self.process.exitcode

    @property
    def returncode(self):
        return self.poll()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.process.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout)
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        return tuple(path.read_text() for path in self.streams)


def start_process(module, *args, before="", **env):
    """A script in a process of its own, after the code `before`; where forks are not safe, in a new interpreter."""
    if sys.platform == "linux":
        return Forked(module, *args, before=before, **env)
    code = f"exec({before!r}, {{}})\nimport {module.__name__} as script\nscript.main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        env=clean_environment(**env) | {"PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run_cli(module, *args, timeout=120, **env):
    """A script in an interpreter of its own, to its end."""
    process = start_cli(module, *args, **env)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return Outcome(process.returncode, out, err)


def assert_refused(outcome, *patterns):
    """Exit code 1 and one line on stderr that has all `patterns` (regular expressions), nothing on stdout."""
    assert outcome.code == 1, outcome
    assert outcome.err.startswith("error: ") and outcome.err.endswith("\n") and outcome.err.count("\n") == 1, (
        outcome.err
    )
    assert "\r" not in outcome.err and outcome.out == "", outcome
    for pattern in patterns:
        assert re.search(pattern, outcome.err), f"no /{pattern}/ in: {outcome.err}"


class Late(AssertionError):
    """Something took too long."""


@contextlib.contextmanager
def within(seconds):
    """Interrupts what takes longer than `seconds`, such as an allocation without end."""

    def late(number, frame):
        raise Late(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def only_traced(monkeypatch):
    """MLX traces what is to be compiled, and computes nothing, for which it would start a C++ compiler on Linux."""
    mx = pytest.importorskip("mlx.core", reason="mlx cannot be imported here")
    monkeypatch.setattr(mx, "eval", lambda *arrays: None)
    mx.enable_compile()
    yield
    if sys.platform == "linux":
        mx.disable_compile()  # as our tools have it there


@pytest.fixture
def tiny(data, tmp_path):
    """Settings of the tiny run with its log folder under tmp_path."""
    return TINY | data.env | {"LOG_DIR": str(tmp_path / "logs")}


@pytest.fixture(scope="session")
def config(data):
    """`config(layout="5x3", ...)` is a Config of the tiny run with these fields."""

    def make(module, **fields):
        values = module.load_config([], TINY | data.env, "smoke")[0]
        return dataclasses.replace(values, **fields)

    return make


def mlx_lm_command(monkeypatch, name, *argv):
    """`main()` of a command of mlx-lm in this process; returns what it prints."""
    monkeypatch.setattr(sys, "argv", [name, "--trust-remote-code", *(str(part) for part in argv)])
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        importlib.import_module(f"mlx_lm.{name}").main()
    return out.getvalue()


def answer_of_server(monkeypatch, folder, prompt):
    """What `mlx_lm.server` on a free port answers to one request for four tokens; then it is ended as by Ctrl-C."""
    answers, serve = [], http.server.ThreadingHTTPServer.serve_forever

    def ask(httpd):
        try:
            body = json.dumps({"prompt": prompt, "max_tokens": 4, "temperature": 0}).encode()
            url = f"http://127.0.0.1:{httpd.server_port}/v1/completions"
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=300) as answer:
                answers.append(json.load(answer))
        finally:
            httpd.shutdown()

    def serve_one(httpd, *args):
        thread = threading.Thread(target=ask, args=(httpd,))
        thread.start()
        serve(httpd, *args)
        thread.join()
        raise KeyboardInterrupt

    monkeypatch.setattr(http.server.ThreadingHTTPServer, "serve_forever", serve_one)
    with pytest.warns(UserWarning, match="not recommended for production"):
        mlx_lm_command(monkeypatch, "server", "--model", folder, "--port", 0)
    return answers[0]


def tree(folder):
    """Every file and folder under `folder` with its bytes, to see that nothing was left behind."""
    return {str(p.relative_to(folder)): p.is_file() and p.read_bytes() for p in sorted(folder.rglob("*"))}


def random_weights(module, c, seed=0):
    """Gaussian weights with the scales of a trained model, every parameter away from its start value."""
    rng = np.random.default_rng(seed)
    weights = module.initial_weights(c)
    return {k: (v + 0.1 * rng.standard_normal(v.shape)).astype(np.float32) for k, v in weights.items()}
