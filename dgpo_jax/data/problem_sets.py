"""The table of published problem sets: where each lies, what it may be used for, and how a row of it reads.

Another set is one more entry of SETS and, where no `parse` here fits, one more function. A `parse` takes a row as its
authors wrote it and gives the fields of Problem that it knows; it looks fields up with `find` and `take_text`, which refuse
a row of another shape, and guesses nothing. docs/data.md says what is known of each set.
"""

import json
import math
import re
from collections.abc import Callable
from typing import NamedTuple

from dgpo_jax.data.rows import find, shorten, take_text

DEFAULT_TOLERANCE = 1e-6


class Origin(NamedTuple):
    """The one file of a split."""

    url: str
    sha256: str | None  # None where no copy of the file could be read when this was written


class ProblemSet(NamedTuple):
    """One published set."""

    origins: dict[str, Origin]  # split -> file
    parse: Callable[[dict], dict[str, str] | None]  # None = a row to leave out
    licence: str
    citation: str
    homepage: str
    tolerance: Callable[[dict, str], float] = lambda row, answer: DEFAULT_TOLERANCE  # of a row and its answer


def parse_plain(row):
    """`problem` and `answer`, perhaps `solution`: MATH-500, MATH as rllm wrote it, DeepScaleR."""
    return {
        "problem": take_text(row, "problem"), "answer": take_text(row, "answer", ""), "solution": take_text(row, "solution", ""),
    }  # fmt: skip


def parse_gsm8k(row):
    """The answer is what follows the last `####`, without the commas of thousands."""
    solution = take_text(row, "answer")
    _, mark, answer = solution.rpartition("####")
    if not mark or not answer.strip():
        raise ValueError(f"answer is {shorten(solution)}; it must end in #### and the answer.")
    return {"problem": take_text(row, "question"), "answer": answer.strip().replace(",", ""), "solution": solution}


def parse_aime24(row):
    """The three-digit answer, as text, lies beside the problem in `meta`; `meta.solution` repeats it."""
    return {"problem": take_text(row, "meta.problem"), "answer": take_text(row, "meta.answer")}


def parse_aime25(row):
    """As aime24, but the answer is in `meta.solution` only."""
    return {"problem": take_text(row, "meta.problem"), "answer": take_text(row, "meta.solution")}


def parse_hmmt(row):
    """A chat of one message, and the answer in LaTeX."""
    return {"problem": take_text(row, "messages.0.content"), "answer": take_text(row, "answer")}


def parse_amc(row):
    """Answers are JSON floats; all of them are whole, and 27.0 is written 27."""
    answer = find(row, "answer")
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    return {"problem": take_text(row, "problem"), "answer": take_text({"answer": answer}, "answer")}


def parse_minerva(row):
    r"""The answer is the last \boxed{...} of the solution."""
    solution = take_text(row, "solution")
    return {"problem": take_text(row, "problem"), "answer": last_boxed(solution), "solution": solution}


def parse_olympiadbench(row):
    """One text in `final_answer`; several answers, as `$123$,$456$`, get a blank after the comma or would be one number."""
    answer = re.sub(r"\$\s*,\s*\$", ", ", take_text(row, "final_answer.0"))
    return {
        "problem": take_text(row, "question"),
        "answer": answer.replace("$", "").strip(),
        "solution": take_text(row, "solution.0", ""),
    }


DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer"
    " (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'


def parse_dapo(row):
    """The problem stands between two instructions, which would contradict ours."""
    prompt = take_text(row, "prompt.0.content")
    problem = prompt.removeprefix(DAPO_BEFORE).removesuffix(DAPO_AFTER)
    if len(problem) + len(DAPO_BEFORE) + len(DAPO_AFTER) != len(prompt):
        raise ValueError(f"prompt.0.content is {shorten(prompt)}; it must begin and end in the instructions of DAPO-Math-17k.")
    return {"problem": problem.strip(), "answer": take_text(row, "reward_model.ground_truth", "")}


def parse_klear_math(row):
    """The prompt is the problem alone."""
    return {"problem": take_text(row, "prompt.0.content"), "answer": take_text(row, "reward_model.ground_truth", "")}


def parse_klear_code(row):
    """The tests are a JSON object in a text; its keys are those that KlearReasoner's code_r1_compute.py reads.

    None for tests that are programs to be run after the answer, or that lie in files: nothing here judges by those.
    """
    text = take_text(row, "reward_model.ground_truth")
    try:
        tests = json.loads(text)
    except ValueError as error:
        raise ValueError(f"reward_model.ground_truth is {shorten(text)}, which is not JSON ({error}).") from None
    if not isinstance(tests, dict):
        raise ValueError(f"reward_model.ground_truth holds {shorten(tests)}; it must be an object.")
    if {"functional", "pytest", "inputs_file"} & set(tests):
        return None
    if not {"inputs", "outputs"} <= set(tests):
        raise ValueError(f"reward_model.ground_truth has {', '.join(tests) or 'nothing'}; it must have inputs and outputs.")
    ours = {"inputs": "inputs", "outputs": "outputs", "fn_name": "fn_name", "timeout": "time_limit"}
    kept = {ours[key]: value for key, value in tests.items() if key in ours}
    return {"problem": take_text(row, "prompt.0.content"), "answer": "", "checker": "code", "tests": json.dumps(kept)}


def last_boxed(text: str) -> str:
    r"""What the last \boxed{...} of a text holds, braces matched."""
    _, mark, rest = text.rpartition("\\boxed{")
    depth = 1
    for end, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if mark and depth == 0 and rest[:end].strip():
            return rest[:end].strip()
    raise ValueError(f"solution is {shorten(text)}; it must hold a \\boxed{{answer}}.")


def olympiad_tolerance(row, answer):
    """`error` is an absolute distance; where the answer is a plain number other than 0 it has a relative one."""
    try:
        relative = float(row.get("error") or "nan") / abs(float(answer))
    except (ValueError, TypeError, ZeroDivisionError):
        return DEFAULT_TOLERANCE  # no error given, or one that is no number, such as a list for several answers
    return relative if math.isfinite(relative) and 0 < relative < 1 else DEFAULT_TOLERANCE


def minerva_tolerance(row, answer):
    """Golds are rounded to a few digits. 1e-4 relative is what Qwen2.5-Math's evaluation/grader.py compares with."""
    return 1e-4


def _github(repository, commit, path, sha256):
    return Origin(f"https://raw.githubusercontent.com/{repository}/{commit}/{path}", sha256)


def _hub(repository, revision, path, sha256=None):
    return Origin(f"https://huggingface.co/datasets/{repository}/resolve/{revision}/{path}", sha256)


def _gsm8k(split, sha256):
    return _github(
        "openai/grade-school-math", "3101c7d5072418e28b9008a6636bde82a006892c", f"grade_school_math/data/{split}.jsonl", sha256
    )


def _klear(name, sha256):
    return _github("suu990901/KlearReasoner", "5d2d0b8c5cde8527bfcd681333527562408c961e", f"benchmarks/{name}", sha256)


def _qwen(name, sha256):
    return _github("QwenLM/Qwen2.5-Math", "a45202bd16f1ec06f433442dc1152d0074773465", f"evaluation/data/{name}/test.jsonl", sha256)


MATH = "Hendrycks et al. Measuring Mathematical Problem Solving With the MATH Dataset. arXiv:2103.03874."
KLEAR = "Su et al. Klear-Reasoner: Advancing Reasoning Capability via Gradient-Preserving Clipping Policy Optimization. arXiv:2508.07629."
CONTEST = "file Apache-2.0 (KlearReasoner); the problems are (c) {}: to evaluate with, not to pass on"

# Checksums are of the files in clones of the repositories at these commits, except where a line says otherwise.
SETS = {
    "gsm8k": ProblemSet(
        {
            "train": _gsm8k("train", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
            "test": _gsm8k("test", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
        },
        parse_gsm8k, "MIT (c) 2021 OpenAI",
        "Cobbe et al. Training Verifiers to Solve Math Word Problems. arXiv:2110.14168.",
        "https://github.com/openai/grade-school-math",
    ),
    "math500": ProblemSet(
        {"test": _github(
            "hkust-nlp/simpleRL-reason", "cf1c7858bfc145a27aa733e75d930d34f0d318a6", "examples/simplelr_math_eval/data/math500/test.jsonl",
            "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132",
        )},
        parse_plain, "MIT (c) 2025 HKUST NLP; MATH: MIT (c) 2021 D. Hendrycks",
        f"Lightman et al. Let's Verify Step by Step. arXiv:2305.20050. {MATH}", "https://github.com/openai/prm800k",
    ),
    "math_train": ProblemSet(
        {"train": _github(
            "agentica-project/rllm", "874daa4acb7f451dc2a4b2b6e8ce28f5aa88d1f5", "rllm/data/train/math/math.json",
            "569230b362fd501e1a33d8f29aae3b4b989d32e2b91b07c3f48493528c3bf6d2",
        )},
        parse_plain, "MIT (c) 2025 agentica; MATH: MIT (c) 2021 D. Hendrycks", MATH, "https://github.com/hendrycks/math",
    ),
    "aime24": ProblemSet(
        {"test": _klear("aime24.qs.jsonl", "dc3c6f08943fd7ee178c673894c20144a8b28dcc4c28ae115bfd6cbd13859971")},
        parse_aime24, CONTEST.format("MAA"), "American Invitational Mathematics Examination 2024, I and II.",
        "https://maa.org",
    ),
    "aime25": ProblemSet(
        {"test": _klear("aime25.qs.jsonl", "cf7ec6f3e905fd6108b38dea066acac0bcd0dfd5d49174d18d404567ab8e930a")},
        parse_aime25, CONTEST.format("MAA"), "American Invitational Mathematics Examination 2025, I and II.",
        "https://maa.org",
    ),
    "hmmt25": ProblemSet(
        {"test": _klear("HMMT-202502.jsonl", "9826500e5c02ad4049f1c9c51beb9541d3e520419a298314feccd0d378b3dfd9")},
        parse_hmmt, CONTEST.format("HMMT"), "Harvard-MIT Mathematics Tournament, February 2025.", "https://www.hmmt.org",
    ),
    "amc23": ProblemSet(
        {"test": _qwen("amc23", "43707e1ca784602d8479de24ee8ce36609dbebc46dd152b0b12a46611aa898a4")},
        parse_amc, "file MIT (c) 2024 Z. Gou; the problems are (c) MAA: to evaluate with, not to pass on",
        "American Mathematics Competitions 12A and 12B, 2023, rephrased to open answers.", "https://github.com/QwenLM/Qwen2.5-Math",
    ),
    "minerva": ProblemSet(
        {"test": _qwen("minerva_math", "0e656b430d3a0a1dab6aa853f453ba3805e28e2cabe4fc72486a897cc09d8ba2")},
        parse_minerva, "file MIT (c) 2024 Z. Gou; the problems are from MIT OpenCourseWare: to evaluate with, not to pass on",
        "Lewkowycz et al. Solving Quantitative Reasoning Problems with Language Models. arXiv:2206.14858.",
        "https://github.com/QwenLM/Qwen2.5-Math", minerva_tolerance,
    ),
    "olympiadbench": ProblemSet(
        {"test": _qwen("olympiadbench", "bb8c1e38a16ea9eacb77530315a674d883f267fbff79183effc53681b4fcc416")},
        parse_olympiadbench, "file MIT (c) 2024 Z. Gou; no licence found for OlympiadBench: to evaluate with, not to pass on",
        "He et al. OlympiadBench: A Challenging Benchmark for Promoting AGI with Olympiad-Level Bilingual Multimodal Scientific"
        " Problems. arXiv:2402.14008.",
        "https://github.com/OpenBMB/OlympiadBench", olympiad_tolerance,
    ),
    # The hub could not be reached when the four below were written. What is known of them is from others' code:
    # revision, file name and fields (problem, answer, solution) of deepscaler.json are named in several projects; its
    # checksum in none.
    "deepscaler": ProblemSet(
        {"train": _hub("agentica-org/DeepScaleR-Preview-Dataset", "b6ae8c60f5c1f2b594e2140b91c49c9ad0949e29", "deepscaler.json")},
        parse_plain, "MIT, says its card", "Luo et al. DeepScaleR: Surpassing O1-Preview with a 1.5B Model by Scaling RL. 2025.",
        "https://huggingface.co/datasets/agentica-org/DeepScaleR-Preview-Dataset",
    ),
    # Two projects pin this revision with this checksum, and count 1 791 700 rows: 17 917 of them, a hundred times over.
    "dapo_math_17k": ProblemSet(
        {"train": _hub(
            "BytedTsinghua-SIA/DAPO-Math-17k", "65877096c24ffa7abc4e4fa5edb95cf3413a5674", "data/dapo-math-17k.parquet",
            "534375d6bb8630d22ab46a56e11f2ffec1d288d8f7d04099bc82d68948705941",
        )},
        parse_dapo, "Apache-2.0, says its card",
        "Yu et al. DAPO: An Open-Source LLM Reinforcement Learning System at Scale. arXiv:2503.14476.",
        "https://huggingface.co/datasets/BytedTsinghua-SIA/DAPO-Math-17k",
    ),
    # Fields from the card and from KlearReasoner's README, the file's name from one user's script; no revision is known,
    # so `main` may change under us.
    "klear_math": ProblemSet(
        {"train": _hub("Kwai-Klear/KlearReasoner-MathSub-30K", "main", "train_math_30K.json")},
        parse_klear_math, "Apache-2.0, says its card", KLEAR, "https://huggingface.co/datasets/Kwai-Klear/KlearReasoner-MathSub-30K",
    ),
    # The same, the file's name (and its 4.2 GB) from a catalogue of data sets.
    "klear_code": ProblemSet(
        {"train": _hub("Kwai-Klear/KlearReasoner-CodeSub-15K", "main", "train_code_rllm_clean.json")},
        parse_klear_code, "Apache-2.0, says its card", KLEAR, "https://huggingface.co/datasets/Kwai-Klear/KlearReasoner-CodeSub-15K",
    ),
}  # fmt: skip
