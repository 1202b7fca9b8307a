"""The rules of check.py that look at the shipped code: does it compile and import, does it train on validation text?"""

import ast
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from folder import Complaints, Submission, imported, rule

INSTALLED = set(
    """torch torchvision triton numpy sentencepiece tqdm huggingface_hub datasets tiktoken setuptools scipy
flash_attn flash_attn_interface zstandard brotli kernels mlx safetensors requests psutil packaging typing_extensions
""".split()
)  # on the challenge's machines, or usual beside them
CUDA_ONLY = ("flash_attn", "flash_attn_interface", "triton", "fla", "mamba_ssm", "causal_conv1d", "brotli", "zstandard")
IMPORT_SECONDS = 60


@rule
def compiles(s: Submission) -> Complaints:
    """Every shipped Python file compiles."""
    for name, source in s.shipped.items():
        if source.error is not None:
            newer = "f-string" in str(source.error) and sys.version_info < (3, 12)
            severity, where = "info" if newer else "error", f"{name}:{source.error.lineno or 1}"
            expected = "Python that 3.11 reads too" if newer else "a script that compiles"
            yield severity, where, expected, f"{source.error.msg}{' (unpacked)' * source.packed}"


@rule
def modules(s: Submission) -> Complaints:
    """What the script imports is installed on the challenge's machines, in requirements.txt, or in the folder."""
    stated = (
        "".join(s.text(name) for name in s.files if re.search(r"require|setup|README", name)).lower().replace("-", "_")
    )
    here = {Path(name).stem for name in s.files} | {part for name in s.files for part in Path(name).parts[:-1]}
    for name, source in s.shipped.items():
        for module in sorted({module.split(".")[0] for module in imported(source)} - {"__main__"}):
            known = module in sys.stdlib_module_names or module in INSTALLED or module in here
            if not known and module.lower() not in stated:
                yield "info", name, f"{module} in requirements.txt", "nothing there names it"


STUBS = """
import importlib.abc, importlib.machinery, sys, types
class Stub(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Stub(f"{self.__name__}.{name}")
    def __call__(self, *args, **kwargs):
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self
    def __getitem__(self, key):
        return self
class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] in sys.argv[2].split(",") else None
    def create_module(self, spec):
        return Stub(spec.name)
    def exec_module(self, module):
        pass
sys.meta_path.append(Finder())
import runpy
sys.dont_write_bytecode = True
runpy.run_path(sys.argv[1], run_name="imported")
"""


@rule
def imports(s: Submission) -> Complaints:
    """The script imports on a CPU, with stand-ins for CUDA-only packages (only with --import)."""
    if not s.run_import or s.entry is None:
        return
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "-c", STUBS, str(s.files[s.entry].resolve()), ",".join(CUDA_ONLY)]
        try:
            run = subprocess.run(command, cwd=home, capture_output=True, text=True, errors="replace",
                                 timeout=IMPORT_SECONDS, stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        except subprocess.TimeoutExpired:
            yield "error", s.entry, f"an import within {IMPORT_SECONDS} s", "it still ran"
            return
        if run.returncode:
            said = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
            yield "error", s.entry, "a script that imports on a CPU", said[-1][:150]


# Training on validation text -----------------------------------------------------------------------------------------


def calls(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every call below a node, in order."""
    found = [(call.lineno, ast.unparse(call.func)) for call in ast.walk(node) if isinstance(call, ast.Call)]
    yield from sorted(found)


def first_scoring(function: ast.AST) -> float:
    """The line where a function first scores: a block without gradients, or a call or sum that says so."""
    lines = [math.inf]
    for node in ast.walk(function):
        if isinstance(node, ast.With) and any(
            re.search("no_grad|inference_mode", ast.unparse(item)) for item in node.items
        ):
            lines.append(node.lineno)
        elif isinstance(node, ast.Call) and re.search(r"(accum|score|bpb|eval)", ast.unparse(node.func)):
            lines.append(node.lineno)
        elif isinstance(node, ast.AugAssign) and re.search(
            r"(loss|nll|bits|byte|score)_?\w*sum", ast.unparse(node.target)
        ):
            lines.append(node.lineno)
    return min(lines)


@rule
def trains_on_val(s: Submission) -> Complaints:
    """No optimiser step on validation tokens before they are scored (PRs #1376, #1487, #1517): a suspicion only."""
    for name, source in s.shipped.items():
        functions = [node for node in ast.walk(source.tree) if isinstance(node, ast.FunctionDef)] if source.tree else []
        lines, suspects = source.text.split("\n"), []
        body = {function: "\n".join(lines[function.lineno - 1 : function.end_lineno]) for function in functions}
        for function in functions:
            if not re.search(r"\.backward|autograd\.grad", body[function]) or "val_" not in body[function]:
                continue
            inputs = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
            inputs |= {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
            inputs |= {arg.arg for arg in function.args.args + function.args.kwonlyargs}
            trains = [line for line, call in calls(function) if call.endswith((".backward", "autograd.grad"))]
            steps = [line for line, call in calls(function) if call.endswith(".step")]
            feeds = {word for word in inputs if re.fullmatch(r"val_(?:tokens|data|loader|seqs|ids)\w*", word)}
            loads = {word for word in inputs if re.search(r"train_(?:loader|files|tokens|stream|batch)", word)}
            if trains and steps and feeds and not loads and first_scoring(function) > trains[0]:
                suspects.append((function, trains[0]))
        for function, line in suspects:
            users = [user for user in functions if user is not function and function.name in body[user]
                     and any(call.split(".")[-1] == function.name for _, call in calls(user))]  # fmt: skip
            first_use = [min(at for at, call in calls(user) if call.split(".")[-1] == function.name) for user in users]
            if users and all(user.name.startswith("eval") and first_scoring(user) < at
                             for user, at in zip(users, first_use)):  # fmt: skip
                continue  # the caller scores before it trains
            where = f"{name}{' (unpacked)' * source.packed}:{line}"
            yield "warning", where, "validation tokens scored before training on them", f"{function.name}() only trains"
