"""Text to token ids and back: a Hugging Face tokenizer behind the few names this project needs.

`transformers` takes seconds to import, so it is imported where it is used.
"""

import difflib
import json
import os
import re
import string
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dgpo_jax.data import generated

# Without this, importing transformers advises to install PyTorch, which is never needed here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# Markers that end a turn in the chat templates of the model families in use; a model stops at them even where
# its configuration names only an end-of-text token (Qwen2.5 base models do that).
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")

CHAT_TEMPLATE = (  # ChatML, as Qwen and SmolLM have it
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAD, UNKNOWN, BEGIN, TURN_START, TURN_END = SPECIAL = (
    "<|pad|>", "<|unknown|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>",
)  # fmt: skip


@dataclass(frozen=True)
class Tokenizer:
    """A `transformers` tokenizer, reduced to what a run uses. No method adds a token that was not asked for."""

    inner: object  # transformers.PreTrainedTokenizerFast
    name: str  # the path or name it was loaded from
    generation_stops: tuple[int, ...] = ()  # eos_token_id of generation_config.json

    @property
    def vocab_size(self) -> int:
        """Number of ids that decode to something; a model's embedding table may be larger."""
        return len(self.inner)

    @cached_property
    def pad_id(self) -> int:
        """Fills empty slots; masks tell padding from text, so it may coincide with a stop id."""
        return self.inner.pad_token_id if self.inner.pad_token_id is not None else self.stop_ids[0]

    @cached_property
    def turn_end(self) -> int:
        """What a response ends with when it is trained on: the chat template's own marker, else end-of-text."""
        template, vocabulary = self.inner.chat_template or "", self.inner.get_vocab()
        markers = [vocabulary[marker] for marker in TURN_ENDS if marker in template and marker in vocabulary]
        if markers or self.inner.eos_token_id is not None:
            return markers[0] if markers else self.inner.eos_token_id
        raise ValueError(f"tokenizer {self.name}: no end-of-text token; set eos_token in tokenizer_config.json.")

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that ends a response, the one to train on first."""
        eos = () if self.inner.eos_token_id is None else (self.inner.eos_token_id,)
        return tuple(dict.fromkeys((self.turn_end, *eos, *self.generation_stops)))

    @cached_property
    def text_start(self) -> list[int]:
        """What the tokenizer puts before a text that is no chat: [bos] for Llama, [] for Qwen."""
        with_special, bos = self.inner.encode("a", add_special_tokens=True), self.inner.bos_token_id
        return [bos] if bos is not None and with_special[0] == bos else []

    def encode(self, text: str) -> list[int]:
        """The ids of the text alone: no bos, no eos."""
        return self.inner.encode(text, add_special_tokens=False)

    def decode(self, ids, skip_special: bool = False) -> str:
        """The text of the ids; skip_special leaves out pad, stop and turn markers."""
        ids = np.asarray(ids, np.int64).tolist()  # ten times as fast as int() of each
        return self.inner.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)

    def render_chat(self, problem: str, system: str | None = None) -> str:
        """The chat text up to the place where the response starts (some templates open `<think>` there)."""
        if not self.inner.chat_template:
            raise ValueError(f"tokenizer {self.name} has no chat template; use 'plain' or one with {{problem}}.")
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": problem})
        try:
            return self.inner.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # the template is a program of others: anything can come out of it
            raise ValueError(
                f"tokenizer {self.name}: its chat template fails ({_one_line(error)}); correct chat_template, or name another"
                " data.template."
            ) from error

    def chat(self, problem: str, system: str | None = None) -> list[int]:
        """Prompt ids of a one-question chat, ending with the generation prompt."""
        return self.encode(self.render_chat(problem, system))

    def save(self, folder) -> None:
        """Writes tokenizer.json and tokenizer_config.json, chat template included."""
        self.inner.save_pretrained(folder)


def load_tokenizer(path: str) -> Tokenizer:
    """Loads `builtin:words`, a folder, or (where there is a network) a Hugging Face name such as `Qwen/Qwen2.5-1.5B`.

    Raises:
        ValueError: no such built-in, folder or name, or a folder without a usable tokenizer.
    """
    path = str(path)
    if path.startswith("builtin:"):
        if path != "builtin:words":
            raise ValueError(f"tokenizer {path!r}: the only built-in one is builtin:words.")
        return Tokenizer(_build_words_tokenizer(), path)
    is_folder = os.path.isdir(path)
    looks_like_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not Path(path).parent.is_dir()
    if not is_folder and not looks_like_name:
        near = difflib.get_close_matches(path, [str(entry) for entry in Path(path).parent.glob("*")], n=1)
        raise ValueError(f"tokenizer {path!r}: no such folder{f'; perhaps {near[0]!r}' if near else ''}.")
    from transformers import AutoTokenizer

    try:
        inner = AutoTokenizer.from_pretrained(path, local_files_only=is_folder)
        _try_out(inner)
    except Exception as error:  # files of others, read by three libraries: anything can come out of them
        wanted = "tokenizer.json and tokenizer_config.json" if is_folder else "a folder, or a name on a hub within reach"
        missing = [name for name in ("tokenizer.json", "tokenizer_config.json") if is_folder and not (Path(path) / name).is_file()]
        lacks = f" It has no {' and no '.join(missing)}." if missing else ""
        raise ValueError(f"tokenizer {path!r} cannot be loaded; it must be/have {wanted}.{lacks} ({_one_line(error)})") from error
    return Tokenizer(inner, path, _read_generation_stops(path) if is_folder else _fetch_generation_stops(path))


def _try_out(inner):
    """Settings of a wrong type are taken in silence and fail at the first text; of files that are missing transformers makes a
    tokenizer without a vocabulary, to which every text is empty.
    """
    special = [inner.pad_token_id, inner.eos_token_id]
    inner.decode([*inner.encode("1 + 2", add_special_tokens=True), *(token for token in special if token is not None)])
    if not inner.encode("1 + 2", add_special_tokens=False):
        raise ValueError("to it '1 + 2' has no tokens")


def _one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _read_generation_stops(folder):
    """eos_token_id of generation_config.json, an int or a list; the file is optional."""
    file = Path(folder) / "generation_config.json"
    if not file.is_file():
        return ()
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read ({_one_line(error)}); download it again, or delete it.") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: holds {repr(settings)[:80]} and no object; download it again, or delete it.")
    stops = settings.get("eos_token_id")
    ids = [] if stops is None else stops if isinstance(stops, list) else [stops]
    if not all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 2**31 for one in ids):
        raise ValueError(f"{file}: eos_token_id is {repr(stops)[:80]}; it must be a token's id or a list of them, correct it.")
    return tuple(ids)


def _fetch_generation_stops(name):
    from transformers.utils import cached_file

    file = cached_file(name, "generation_config.json", _raise_exceptions_for_missing_entries=False)
    return _read_generation_stops(Path(file).parent) if file else ()


def _words_vocabulary():
    """Pieces by id: special tokens, then every printable character, then the generator's words with their space.

    A space belongs to the word after it, except before digits: a digit is one and the same token everywhere, which
    is what lets a tiny model learn sums. Other words are spelt; only characters beyond ASCII are unknown.
    """
    material = generated.ARITHMETIC
    texts = [text for group in material.templates.values() for text in group]
    bare = re.sub(r"\{\w+\}", " ", " ".join(texts))
    words = sorted({*re.findall("[a-z]+", bare), *material.names, *material.things, "system", "user", "assistant"})
    characters = ["\n", *(chr(code) for code in range(32, 127))]
    symbols = ["\\boxed{", " \\boxed{", *(" " + sign for sign in "+-*/=")]
    pieces = [*SPECIAL, *characters, *symbols]
    pieces += [piece for word in words for piece in (word, " " + word)]
    return {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}


def _build_words_tokenizer():
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Pieces
    from transformers import PreTrainedTokenizerFast

    # Greedy longest match within each chunk that the pattern cuts; no continuation prefix, so pieces just join up.
    pieces = Pieces(models.WordPiece(_words_vocabulary(), unk_token=UNKNOWN, continuing_subword_prefix=""))
    letters, signs = string.ascii_letters, re.escape("+-*/=")
    pattern = rf" ?\\boxed\{{| ?[{letters}]+| [{signs}]|[\s\S]"
    pieces.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    pieces.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token=PAD, unk_token=UNKNOWN, bos_token=BEGIN, eos_token=TURN_END,
        additional_special_tokens=[TURN_START], chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False,
    )  # fmt: skip
