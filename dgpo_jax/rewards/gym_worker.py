"""A process that asks reasoning-gym's scorers: `python -m dgpo_jax.rewards.gym_worker MEMORY_MB PARENT_PID`.

A request is [tests, answer], the reply the score, 0.0 to 1.0, or UNREADABLE. See `workers` for the rest.

Answers are hostile, and some scorers (of release 0.1.25: string_insertion, spiral_matrix, binary_matrix and n_queens by
`eval`; countdown, puzzle24, polynomial_multiplication, simple_integration and intermediate_integration by SymPy's
`parse_expr`) would run them as Python. Three things stand against that, each of which is enough for such an answer:

1. `tame` puts other functions in the place of `eval` and `parse_expr`, for all sets at once. They read the text into
   a tree and refuse all but literals and arithmetic and, for SymPy, numbers, symbols and its usual functions.
2. `watch` has the interpreter report what it does. Text that is about to be run outside of 1, a file opened for
   writing, another program, a socket, or loading a pickle or a C library, ends the process at once: "crashed".
3. Where bubblewrap works, the process has no network, a file system that it can only read, and processes of its own.

What remains: an answer can take its deadline and its memory. Where bubblewrap does not work (a line on the standard
error says so) there is no third wall. The process can read files, but nobody gets anything from it but a score.
"""

import ast
import builtins
import functools
import json
import keyword
import math
import os
import shutil
import signal
import subprocess
import sys
from fractions import Fraction

from dgpo_jax.processes import die_with
from dgpo_jax.rewards.gym import UNREADABLE
from dgpo_jax.rewards.workers import DIED, serve

TYPE = "python type"  # as in data.gym, which packs what is unpacked here; the two may not import each other
SCORERS_KEPT = 64  # sets with their settings; a run has a few
_ARITHMETIC = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.Load)
_LITERALS = (ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.Set)
_FUNCTIONS = (
    *("sqrt", "cbrt", "root", "exp", "log", "ln", "Abs", "sign", "floor", "ceiling", "factorial", "binomial", "gamma"),
    *("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "acot", "asec", "acsc", "atan2"),
    *("sinh", "cosh", "tanh", "coth", "sech", "csch", "asinh", "acosh", "atanh", "acoth"),
    *("erf", "erfi", "Ei", "Si", "Ci", "li", "Rational", "Integer", "Integral", "pi", "E", "I", "oo"),
)
_PROGRAMS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.")
_ENDS = (*_PROGRAMS, "socket.", "pickle.", "ctypes.dlopen")
_WRITERS = ("collections", "dataclasses")  # of methods, in a late import
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# matplotlib, which a library of reasoning-gym imports and nothing uses, wants a folder to write to: one in memory.
_BOX = (
    "--unshare-all", "--die-with-parent", "--new-session", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc",
    "--setenv", "MPLCONFIGDIR", "/dev/shm", "--setenv", "TMPDIR", "/dev/shm",
)  # fmt: skip


def score(tests, answer):
    """What the problem's scorer gives the answer, 0.0 to 1.0; UNREADABLE where it fails on it."""
    tests = json.loads(tests)
    scorer = _make_scorer(tests["dataset"], json.dumps(tests["config"]))
    try:
        with _Watched():
            share = float(scorer(answer, unpack(tests["entry"])))
    except MemoryError:
        return DIED
    except Exception:  # scorers that do not expect every text: int("x"), a missing row, too many brackets
        return UNREADABLE
    return min(1.0, max(0.0, share)) if math.isfinite(share) else UNREADABLE


@functools.lru_cache(SCORERS_KEPT)
def _make_scorer(name, config):
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=0, size=1, **json.loads(config)).score_answer


def unpack(value):
    """What data.gym.pack was given."""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    if TYPE not in value:
        return {key: unpack(item) for key, item in value.items()}
    content = unpack(value["of"])
    return {"tuple": tuple, "fraction": Fraction, "dict": dict}[value[TYPE]](content)


def plain_eval(text, *_):
    """`eval` for literals and the arithmetic of numbers: nothing in it has a name.

    Raises:
        ValueError, SyntaxError: anything else.
    """
    tree = _parse(text, lambda node: isinstance(node, _LITERALS))
    with _Trusted():
        return eval(compile(tree, "<plain>", "eval"), {"__builtins__": {}})


def tame_parse_expr(parse_expr):
    """SymPy's `parse_expr` for arithmetic, symbols and the usual functions. Raises as `plain_eval` does."""
    import sympy

    taken = set(vars(sympy)) | set(vars(builtins)) | set(keyword.kwlist)

    def parse(text, local_dict=None, *arguments, **settings):
        def is_allowed(node):
            if isinstance(node, ast.Constant):  # no text: SymPy's functions would parse it, as Python
                return type(node.value) in (int, float)
            if isinstance(node, ast.Name):
                named = node.id in (local_dict or ()) or node.id in _FUNCTIONS or node.id not in taken
                return named and not node.id.startswith("_")
            return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords

        checked = ast.unparse(_parse(text, is_allowed))  # what was looked at is what is parsed
        with _Trusted():
            return parse_expr(checked, local_dict, *arguments, **settings)

    return parse


def _parse(text, is_allowed):
    if not isinstance(text, str):
        raise ValueError(f"{type(text).__name__} is no text to evaluate.")
    tree = ast.parse(text.strip(), mode="eval")
    for node in ast.walk(tree):
        if not isinstance(node, _ARITHMETIC) and not is_allowed(node):
            raise ValueError(f"{type(node).__name__} is not evaluated in an answer; write plain mathematics.")
    return tree


def tame() -> None:
    """Puts the two functions above in the place of Python's and SymPy's, for every module of reasoning-gym."""
    import reasoning_gym
    import sympy
    from sympy.parsing import sympy_parser

    original = sympy_parser.parse_expr
    parse_expr = tame_parse_expr(original)
    for module in [sympy, sympy.parsing, sympy_parser]:
        if getattr(module, "parse_expr", None) is original:
            module.parse_expr = parse_expr
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == reasoning_gym.__name__:
            module.eval = plain_eval  # found before the built-in one
            for held, value in list(vars(module).items()):
                if value is original:  # by "from sympy... import parse_expr"
                    setattr(module, held, parse_expr)


class _Watched:
    """While a scorer works."""

    depth = 0

    def __enter__(self):
        type(self).depth += 1

    def __exit__(self, *error):
        type(self).depth -= 1


class _Trusted(_Watched):
    """While text that was looked at is run."""

    depth = 0


def watch() -> None:
    """From now on, what no scorer has a reason to do ends the process."""

    def look(event, arguments):
        if _Watched.depth and _is_forbidden(event, arguments):
            os._exit(1)  # not an exception, which scorers would catch

    sys.dont_write_bytecode = True  # a late import must not look like a scorer that writes
    sys.addaudithook(look)


def _is_forbidden(event, arguments):
    if event == "exec":  # of text, by eval() or exec(); an import runs code that was compiled from a file
        return getattr(arguments[0], "co_filename", "") == "<string>" and not _may_run_text()
    if event == "compile":
        return arguments[1] == "<string>" and not _may_run_text()
    if event == "open":
        return bool((arguments[2] or 0) & _WRITES)
    return event.startswith(_ENDS)


def _may_run_text():
    """What was looked at, and what libraries write for themselves, such as SymPy for products of polynomials."""
    if _Trusted.depth:
        return True
    # 0 is here, 1 _is_forbidden, 2 the hook, 3 who calls eval or exec.
    runner = sys._getframe(3).f_globals.get("__name__", "")
    return runner in _WRITERS or (runner.startswith("sympy.") and not runner.startswith("sympy.parsing."))


def enter_box(memory_mb: str, parent: str) -> None:
    """Becomes the same program inside bubblewrap; returns where that does not work."""
    box = shutil.which("bwrap")
    if box is None or subprocess.run([box, *_BOX, "true"], capture_output=True).returncode != 0:
        why = "is not installed" if box is None else "is not allowed to make namespaces"
        print(f"gym: bubblewrap {why}, so that scorers have the trainer's rights; see gym_worker.", file=sys.stderr)
        return
    die_with(int(parent))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C of the trainer's terminal would end bubblewrap
    os.execv(box, [box, *_BOX, sys.executable, "-m", "dgpo_jax.rewards.gym_worker", memory_mb, parent, "boxed"])


def prepare() -> None:
    """Everything slow, and then the walls."""
    tame()
    _make_scorer("chain_sum", "{}")
    watch()


def main(memory_mb: str, parent: str, *boxed: str) -> None:
    """In the worker; started anew, it is in its box."""
    if not boxed:
        enter_box(memory_mb, parent)
    serve(score, int(memory_mb), os.getppid() if boxed else int(parent), warm_up=prepare)


if __name__ == "__main__":
    main(*sys.argv[1:])
