"""The rules of check.py that look at the shipped code: does it compile, does it train on validation text?"""

import ast
import math
import re
import sys

from folder import Complaints, Source, Submission, rule


@rule
def compiles(s: Submission) -> Complaints:
    """Every shipped Python file compiles."""
    for name, source in s.shipped.items():
        if source.error is not None:
            newer = "f-string" in str(source.error) and sys.version_info < (3, 12)
            severity, where = "info" if newer else "error", f"{name}:{source.error.lineno or 1}"
            expected = "Python that 3.11 reads too" if newer else "a script that compiles"
            yield severity, where, expected, f"{source.error.msg}{' (unpacked)' * source.packed}"


# Training on validation text -----------------------------------------------------------------------------------------

TRAINS = (".backward", "autograd.grad")
SCORES = re.compile(r"no_grad|inference_mode|accum|score|bpb|eval")
SUMS = re.compile(r"(loss|nll|bits|byte|score)_?\w*sum")


def calls(node: ast.AST) -> list[tuple[int, str]]:
    """Line and name of every call below a node, in order."""
    return sorted((call.lineno, ast.unparse(call.func)) for call in ast.walk(node) if isinstance(call, ast.Call))


def first_scoring(function: ast.AST) -> float:
    """The line where a function first scores: a block without gradients, or a call or sum that says so."""
    lines = [line for line, call in calls(function) if SCORES.search(call)]
    sums = [node for node in ast.walk(function) if isinstance(node, ast.AugAssign)]
    return min([*lines, *(node.lineno for node in sums if SUMS.search(ast.unparse(node.target)))], default=math.inf)


def first_training(function: ast.FunctionDef) -> float | None:
    """The line where a function that is fed validation tokens, and no others, first takes a gradient and steps."""
    words = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    words |= {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
    words |= {arg.arg for arg in function.args.args + function.args.kwonlyargs}
    feeds = any(re.fullmatch(r"val_(?:tokens|data|loader|seqs|ids)\w*", word) for word in words)
    loads = any(re.search(r"train_(?:loader|files|tokens|stream|batch)", word) for word in words)
    trains = [line for line, call in calls(function) if call.endswith(TRAINS)]
    steps = any(call.endswith(".step") for _, call in calls(function))
    return trains[0] if feeds and not loads and steps and trains else None


def scored_before(function: ast.FunctionDef, functions: list[ast.FunctionDef]) -> bool:
    """Whether all who call a function score first: an evaluation that trains on what it has scored is legal."""
    uses = []
    for user in functions:
        lines = [line for line, call in calls(user) if call.split(".")[-1] == function.name]
        if lines and user is not function:
            uses.append(user.name.startswith("eval") and first_scoring(user) < lines[0])
    return bool(uses) and all(uses)


@rule
def trains_on_val(s: Submission) -> Complaints:
    """No optimiser step on validation tokens before they are scored (PRs #1376, #1487, #1517): a suspicion only."""
    for name, source in s.shipped.items():
        functions = functions_of(source)
        for function in functions:
            line = first_training(function)
            if line and first_scoring(function) > line and not scored_before(function, functions):
                where = f"{name}{' (unpacked)' * source.packed}:{line}"
                found = f"{function.name}() only trains"
                yield "warning", where, "validation tokens scored before training on them", found


def functions_of(source: Source) -> list[ast.FunctionDef]:
    if source.tree is None or ".backward" not in source.text and "autograd.grad" not in source.text:
        return []
    return [node for node in ast.walk(source.tree) if isinstance(node, ast.FunctionDef)]
