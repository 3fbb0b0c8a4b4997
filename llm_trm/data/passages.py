"""Strings for a language model in which some parts are text, where special tokens are not parsed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from llm_trm.data.tags import END_THINK, THINK
from llm_trm.errors import InputError
from llm_trm.ranges import shown

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

_Cached = TypeVar("_Cached")
_Span = tuple[int, int]
#: Placeholder for the control token before a piece, which keeps the piece from being the start of a text.
_BEFORE = "\ue000llm-trm\ue001"
#: Number of passages to encode per call.
_BATCH = 10_000


class Passage(str):
    """A string with spans that are text.

    In such a span the name of a control token (``<think>``, ``<|end|>``) is encoded with ordinary tokens.
    Methods of ``str`` lose the spans; :func:`joined` keeps them.

    Args:
        whole: The string.
        texts: Start and end of each span.
    """

    texts: tuple[_Span, ...]

    def __new__(cls, whole: str = "", texts: tuple[_Span, ...] = ()) -> Passage:
        made = super().__new__(cls, whole)
        made.texts = texts
        return made


def text(value: str) -> Passage:
    """``value`` as a passage that is all text."""
    return Passage(value, ((0, len(value)),) if value else ())


def joined(*parts: str) -> Passage:
    """Concatenate ``parts``, keeping the text spans of each. Control tokens are parsed outside of them."""
    texts: list[_Span] = []
    length = 0
    for part in parts:
        texts += [(length + start, length + end) for start, end in getattr(part, "texts", ())]
        length += len(part)
    return Passage("".join(parts), tuple(texts))


def encode(tokenizer: PreTrainedTokenizerBase, passages: Sequence[str]) -> list[list[int]]:
    """Encode each passage, without the tokens that the tokenizer would add around it.

    Raises:
        InputError: A text contains a control token that the tokenizer cannot encode as text, or half of a
            surrogate pair.
    """
    for passage in passages:
        try:
            passage.encode()
        except UnicodeEncodeError as error:
            near = shown(passage[max(0, error.start - 20) :])
            raise InputError(
                f"the text {near} contains half of a surrogate pair, which is not a character: remove it"
            ) from None
    found: list[list[int]] = []
    for start in range(0, len(passages), _BATCH):
        found += _encode(tokenizer, passages[start : start + _BATCH])
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
    """Tokens that the tokenizer adds before a text (beginning of text) and after it (end of text)."""
    bare: list[int] = tokenizer("1", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("1")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[int, str]:
    """Names, by id, of the added tokens that structure a text.

    These are the special tokens, the thinking tags, and the tokens that the chat template writes. Other added
    tokens, and whitespace, are ordinary vocabulary.
    """
    return _control(tokenizer)


def own_token(tokenizer: PreTrainedTokenizerBase, name: str) -> int | None:
    """The id of ``name`` if it encodes to its own single token; other words may be one unknown token."""
    own: int | None = tokenizer.get_vocab().get(name)
    return own if tokenizer.encode(name, add_special_tokens=False) == [own] else None


def cached_per_tokenizer(
    make: Callable[[PreTrainedTokenizerBase], _Cached],
) -> Callable[[PreTrainedTokenizerBase], _Cached]:
    """Cache ``make`` per tokenizer until the tokenizer's tokens or chat template change."""
    known: weakref.WeakKeyDictionary[Any, tuple[Any, _Cached]] = weakref.WeakKeyDictionary()

    def recall(tokenizer: PreTrainedTokenizerBase) -> _Cached:
        state = len(tokenizer), tokenizer.chat_template, dict(tokenizer.special_tokens_map)
        before = known.get(tokenizer)
        if before is None or before[0] != state:
            before = known[tokenizer] = state, make(tokenizer)
        return before[1]

    return recall


@cached_per_tokenizer
def _control(tokenizer: PreTrainedTokenizerBase) -> Mapping[int, str]:
    # Not every Python tokenizer marks its special tokens as such.
    special = set(tokenizer.all_special_tokens)
    written = _template_literals(tokenizer.chat_template)
    return {
        number: token.content
        for number, token in tokenizer.added_tokens_decoder.items()
        if not token.content.isspace()
        and (token.special or token.content in {THINK, END_THINK, *special} or token.content in written)
    }


def _template_literals(template: Any) -> str:
    """The literal text in a chat template, or in several named templates."""
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
    """The passage's ``ids``, in which control tokens inside its texts are replaced by ordinary tokens."""
    if encoding is None:
        _require_none(tokenizer, passage, ids, control)
        return ids
    markers, strays = [], set()
    for position, (number, (start, end)) in enumerate(zip(ids, encoding.offsets, strict=True)):
        if number not in control:
            continue
        named = passage[start:end].strip()
        if number == tokenizer.unk_token_id and named != control[number]:
            continue
        # A token's span may include surrounding whitespace, which is not part of its name.
        start = passage.index(named, start)
        if any(start < of_text[1] and start + len(named) > of_text[0] for of_text in passage.texts):
            strays.add(position)
        else:
            markers.append(position)
    if not strays:
        return ids
    made: list[int] = []
    first = at = 0
    for position in [*markers, len(ids)]:
        end = encoding.offsets[position][0] if position < len(ids) else len(passage)
        piece = ids[first:position]
        if not strays.isdisjoint(range(first, position)):
            piece = _written_out(tokenizer, passage[at:end], first > 0)
            if still := _only(piece, control, tokenizer.unk_token_id):
                raise _cannot(tokenizer, control[still[0]], passage)
        made += piece
        if position < len(ids):
            made.append(ids[position])
            first, at = position + 1, encoding.offsets[position][1]
    return made


def _written_out(tokenizer: PreTrainedTokenizerBase, piece: str, follows: bool) -> list[int]:
    """Encode ``piece`` without control tokens; ``follows`` means that it follows a control token."""
    reader, ids_by_reader = _reader(tokenizer)
    read = reader.encode(_BEFORE + piece if follows else piece, add_special_tokens=False).ids
    return [ids_by_reader.get(number, number) for number in (read[1:] if follows else read)]


@cached_per_tokenizer
def _reader(tokenizer: PreTrainedTokenizerBase) -> tuple[Tokenizer, dict[int, int]]:
    """The tokenizer without its control tokens, and a map from its ids of added tokens to the original ids.

    transformers' ``split_special_tokens`` only splits special tokens, and the thinking tags are not special.
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
    """Reject texts that contain a control token, because Python tokenizers do not return its position."""
    ends = [0, *(position for span in passage.texts for position in span), len(passage)]
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
    where = next((part for part in texts if name in part), texts[0])
    return InputError(
        f"{whose} parses {name} as a control token and cannot encode it as text, but it is in the text "
        f"{shown(where)}: remove or reword it"
    )
