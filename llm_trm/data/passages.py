"""Strings for a language model to read, of which some parts are text: no special token begins there."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from llm_trm.data.tags import END_THINK, THINK
from llm_trm.errors import InputError, shortened

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

_Known = TypeVar("_Known")
_Span = tuple[int, int]
#: Stands for the control token before a piece, so that a tokenizer does not take its start for a text's.
_BEFORE = "\ue000llm-trm\ue001"
#: Passages that are encoded in one call.
_TOGETHER = 10_000


class Passage(str):
    """A string, and which parts of it are text.

    In such a part the name of a control token (``<think>``, ``<|end|>``) is written out in ordinary tokens.
    What the methods of ``str`` return knows of no parts; :func:`joined` keeps them.

    Args:
        whole: The string.
        texts: Start and end of each part.
    """

    texts: tuple[_Span, ...]

    def __new__(cls, whole: str = "", texts: tuple[_Span, ...] = ()) -> Passage:
        made = super().__new__(cls, whole)
        made.texts = texts
        return made


def text(value: str) -> Passage:
    """``value``, all of it text."""
    return Passage(value, ((0, len(value)),) if value else ())


def joined(*parts: str) -> Passage:
    """``parts`` one behind the other: text where a part is, control tokens read elsewhere."""
    texts: list[_Span] = []
    length = 0
    for part in parts:
        texts += [(length + start, length + end) for start, end in getattr(part, "texts", ())]
        length += len(part)
    return Passage("".join(parts), tuple(texts))


def encode(tokenizer: PreTrainedTokenizerBase, passages: Sequence[str]) -> list[list[int]]:
    """Tokens of each passage, without those that the tokenizer would put around it.

    Raises:
        InputError: A text names a control token that the tokenizer cannot write out.
    """
    found: list[list[int]] = []
    for start in range(0, len(passages), _TOGETHER):
        found += _encode(tokenizer, passages[start : start + _TOGETHER])
    return found


def _encode(tokenizer: PreTrainedTokenizerBase, passages: Sequence[str]) -> list[list[int]]:
    encoded = tokenizer([str(passage) for passage in passages], add_special_tokens=False, verbose=False)
    found: list[list[int]] = encoded["input_ids"]
    encodings = encoded.encodings or [None] * len(passages)
    control = control_tokens(tokenizer)
    return [
        _with_text(tokenizer, passage, ids, encoding, control)
        if isinstance(passage, Passage) and passage.texts and not control.keys().isdisjoint(ids)
        else ids
        for passage, ids, encoding in zip(passages, found, encodings, strict=True)
    ]


def surroundings(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens that the tokenizer puts before a text (that which begins it), and behind it (an end token)."""
    bare: list[int] = tokenizer("1", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("1")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[int, str]:
    """Names, by id, of the added tokens that say how a text is built.

    They are the special ones, the tags of thinking, and those that the chat template writes. Other added
    tokens, and white space, are words of the vocabulary like any other.
    """
    return _control(tokenizer)


def own_token(tokenizer: PreTrainedTokenizerBase, name: str) -> int | None:
    """The id of ``name`` if it is one token, and its own: what is not known may be one unknown token."""
    own: int | None = tokenizer.get_vocab().get(name)
    return own if tokenizer.encode(name, add_special_tokens=False) == [own] else None


def remembered(
    make: Callable[[PreTrainedTokenizerBase], _Known],
) -> Callable[[PreTrainedTokenizerBase], _Known]:
    """``make``, which is called again for a tokenizer only when its tokens or its template have changed."""
    known: weakref.WeakKeyDictionary[Any, tuple[Any, _Known]] = weakref.WeakKeyDictionary()

    def recall(tokenizer: PreTrainedTokenizerBase) -> _Known:
        state = len(tokenizer), tokenizer.chat_template, dict(tokenizer.special_tokens_map)
        before = known.get(tokenizer)
        if before is None or before[0] != state:
            before = known[tokenizer] = state, make(tokenizer)
        return before[1]

    return recall


@remembered
def _control(tokenizer: PreTrainedTokenizerBase) -> Mapping[int, str]:
    # Not every tokenizer in Python marks its special tokens as such.
    special = set(tokenizer.all_special_tokens)
    written = _template_literals(tokenizer.chat_template)
    return {
        number: token.content
        for number, token in tokenizer.added_tokens_decoder.items()
        if not token.content.isspace()
        and (token.special or token.content in {THINK, END_THINK, *special} or token.content in written)
    }


def _template_literals(template: Any) -> str:
    """What a chat template, or one of several by name, writes by itself."""
    if not template:
        return ""
    import jinja2

    sources = template.values() if isinstance(template, Mapping) else [template]
    try:
        tokens = [token for source in sources for token in jinja2.Environment().lex(source)]
    except jinja2.TemplateSyntaxError:
        return ""
    return "\n".join(value for _, kind, value in tokens if kind in ("data", "string"))


def _with_text(
    tokenizer: PreTrainedTokenizerBase,
    passage: Passage,
    ids: list[int],
    encoding: Encoding | None,
    control: Mapping[int, str],
) -> list[int]:
    """``ids`` of the passage, but for control tokens that its texts name: those are written out."""
    if encoding is None:
        _require_none(tokenizer, passage, ids, control)
        return ids
    markers, strays = [], set()
    for place, (number, (start, end)) in enumerate(zip(ids, encoding.offsets, strict=True)):
        if number not in control:
            continue
        named = passage[start:end].strip()
        if number == tokenizer.unk_token_id and named != control[number]:
            continue
        # A token may swallow the white space around it, which is not what it is.
        start = passage.index(named, start)
        if any(start < of_text[1] and start + len(named) > of_text[0] for of_text in passage.texts):
            strays.add(place)
        else:
            markers.append(place)
    if not strays:
        return ids
    made: list[int] = []
    begun = at = 0
    for place in [*markers, len(ids)]:
        end = encoding.offsets[place][0] if place < len(ids) else len(passage)
        piece = ids[begun:place]
        if not strays.isdisjoint(range(begun, place)):
            piece = _written_out(tokenizer, passage[at:end], begun > 0)
            if still := _only(piece, control, tokenizer.unk_token_id):
                raise _cannot(tokenizer, control[still[0]], passage)
        made += piece
        if place < len(ids):
            made.append(ids[place])
            begun, at = place + 1, encoding.offsets[place][1]
    return made


def _written_out(tokenizer: PreTrainedTokenizerBase, piece: str, behind: bool) -> list[int]:
    """Tokens of ``piece``, in which nothing is a control token; one stands before it if ``behind``."""
    reader, ids_by_reader = _reader(tokenizer)
    read = reader.encode(_BEFORE + piece if behind else piece, add_special_tokens=False).ids
    return [ids_by_reader.get(number, number) for number in (read[1:] if behind else read)]


@remembered
def _reader(tokenizer: PreTrainedTokenizerBase) -> tuple[Tokenizer, dict[int, int]]:
    """The tokenizer without its control tokens; and, by its ids of the other added tokens, their own ids.

    transformers' ``split_special_tokens`` writes out special tokens alone, and the tags of thinking are none.
    """
    from tokenizers import AddedToken, Tokenizer

    fast: Any = tokenizer
    backend = fast.backend_tokenizer
    reader = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer"):
        if getattr(backend, part) is not None:
            setattr(reader, part, getattr(backend, part))
    control = control_tokens(tokenizer)
    kept = {
        number: token for number, token in tokenizer.added_tokens_decoder.items() if number not in control
    }
    reader.add_tokens(list(kept.values()))
    reader.add_special_tokens([AddedToken(_BEFORE, special=True, normalized=False)])
    ids = {reader.token_to_id(token.content): number for number, token in kept.items()}
    return reader, {own: number for own, number in ids.items() if own is not None}


def _require_none(
    tokenizer: PreTrainedTokenizerBase, passage: Passage, ids: list[int], control: Mapping[int, str]
) -> None:
    """Refuse texts that name a control token: tokenizers in Python do not say where it stands."""
    ends = [0, *(place for span in passage.texts for place in span), len(passage)]
    around = "0".join(passage[start:end] for start, end in zip(ends[::2], ends[1::2], strict=True))
    expected = tokenizer(around, add_special_tokens=False, verbose=False)["input_ids"]
    found = _only(ids, control, tokenizer.unk_token_id)
    if found != _only(expected, control, tokenizer.unk_token_id):
        texts = " ".join(passage[start:end] for start, end in passage.texts)
        named = next((control[number] for number in found if control[number] in texts), "a control token")
        raise _cannot(tokenizer, named, passage)


def _only(ids: Sequence[int], control: Collection[int], unknown: int | None) -> list[int]:
    return [number for number in ids if number in control and number != unknown]


def _cannot(tokenizer: PreTrainedTokenizerBase, name: str, passage: Passage) -> InputError:
    whose = f"the tokenizer of {tokenizer.name_or_path}" if tokenizer.name_or_path else "this tokenizer"
    texts = [passage[start:end] for start, end in passage.texts]
    where = next((said for said in texts if name in said), texts[0])
    return InputError(
        f"{whose} reads {name} as a token of its own and cannot write it out, and it stands in the text "
        f"{shortened(where)}: take it out, or write it in other words"
    )
