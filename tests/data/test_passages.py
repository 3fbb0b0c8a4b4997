"""Tests that text in a passage is encoded as if control tokens had other names, or rejected."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from llm_trm.data.passages import Passage, control_tokens, encode, joined, own_token, surroundings, text
from llm_trm.errors import InputError

_CORPUS = [
    "<think> what is </think> to think of",
    "the thinking </s> <|user|> users use",
    "is a tag a  tag",
] * 9
KINDS = ("bytes", "metaspace", "prepended", "lower case", "words")


def tokenizer_of(kind: str, *names: str) -> PreTrainedTokenizerFast:
    """A trained tokenizer of one of KINDS, with control tokens of these names and two added words."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind == "prepended"))
    if kind == "bytes":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    elif kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif kind == "prepended":
        # As in Llama 2, which puts the mark before every piece between control tokens.
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        if kind == "lower case":
            backend.normalizer = normalizers.Lowercase()
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=130, special_tokens=["<unk>"], initial_alphabet=[chr(n) for n in range(33, 127)]
        ),
    )
    backend.add_tokens(["COVID-19"])
    backend.add_special_tokens([AddedToken(name, special=True) for name in names[1:]])
    # The thinking tags are not special tokens, and are matched before or after the normalizer.
    backend.add_tokens([AddedToken(names[0], special=False, normalized=kind == "lower case")])
    backend.add_tokens(["R2-D2"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=names[1], unk_token="<unk>")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "said",
    [
        "<think>",
        "is <think> a tag",
        "is <THINK> one",
        " <think>\n",
        "x</s><|user|>",
        "COVID-19</s>R2-D2",
        "thinking",
        "",
        "<",
    ],
)
def test_text_is_read_as_if_its_tokens_had_other_names(kind: str, said: str) -> None:
    ours = tokenizer_of(kind, "<think>", "</s>", "<|user|>")
    others = tokenizer_of(kind, "<t0>", "<s1>", "<|s2|>")
    tags = {"<think>": "<t0>", "</s>": "<s1>", "<|user|>": "<|s2|>"}
    for parts in (
        ["<|user|>", text(said), "</s>", "what is", "<think>"],
        ["to ", text(said), " use<think>"],
        ["\u00e9to \u00e9", text(said), "\u00e9", text(f"\u00e9{said}")],
        [text(said)],
        ["</s>to think", text(said), "of <|user|>", text(said), text(said)],
    ):
        passage = joined(*parts)
        renamed = [part if isinstance(part, Passage) else _renamed(part, tags) for part in parts]
        expected = others("".join(renamed), add_special_tokens=False)["input_ids"]
        assert encode(ours, [passage]) == [expected], passage
    assert encode(ours, [joined("a", said), f"a{said}"]) == [ours.encode(f"a{said}")] * 2


def _renamed(part: str, tags: dict[str, str]) -> str:
    for name, other in tags.items():
        part = part.replace(name, other)
    return part


def test_control_tokens() -> None:
    tokenizer = tokenizer_of("bytes", "<think>", "</s>", "<|user|>")
    assert set(control_tokens(tokenizer).values()) == {"<unk>", "<think>", "</s>", "<|user|>"}
    assert encode(tokenizer, [text("R2-D2")]) == [[tokenizer.convert_tokens_to_ids("R2-D2")]]
    # Literals of a template and tokens that are added later count; template variables do not.
    tokenizer.chat_template = "{{ 'COVID-19' }}{% if messages %}\n{% endif %}"
    tokenizer.add_tokens(["if", "\n"])
    assert set(control_tokens(tokenizer).values()) == {"<unk>", "<think>", "</s>", "<|user|>", "COVID-19"}
    assert len(encode(tokenizer, [text("COVID-19")])[0]) > 1
    tokenizer.chat_template = {"default": "{% broken", "other": "<|user|>"}
    assert "COVID-19" not in control_tokens(tokenizer).values()


@pytest.mark.parametrize("half", ["\ud83d", "\udcff"])
def test_half_a_surrogate_pair_is_rejected(half: str) -> None:
    tokenizer = tokenizer_of("bytes", "<think>", "</s>", "<|user|>")
    for passage in (f"{'a' * 10**6}{half}", joined("a", text(half))):
        with pytest.raises(InputError, match="half of a surrogate pair") as error:
            encode(tokenizer, ["a", passage])
        assert len(str(error.value)) < 300 and str(error.value).isascii()


def test_tokens_that_cannot_be_encoded_as_text() -> None:
    backend = Tokenizer(models.WordLevel({"?": 0, "a": 1, "</s>": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", eos_token="</s>")
    assert encode(tokenizer, [text("a b ? a")]) == [[1, 0, 0, 1]]
    with pytest.raises(
        InputError, match=r"parses </s> as a control token.*in the text 'a </s>.nb'"
    ) as refused:
        encode(tokenizer, [joined("a ", text("a </s>\nb"))])
    assert "\n" not in str(refused.value)


def test_python_tokenizers_reject_control_tokens() -> None:
    tokenizer = ByT5Tokenizer()
    assert encode(tokenizer, [joined(text("1+1"), "</s>")])[0][-1] == tokenizer.eos_token_id
    for said in ("1</s>", "</s>", "<extra_id_3> a"):
        with pytest.raises(InputError, match="remove or reword it") as refused:
            encode(tokenizer, [joined("</s>", text(said), "</s>")])
        assert said.strip("1 a") in str(refused.value)


def test_tokens_that_a_tokenizer_adds_around_a_text() -> None:
    tokenizer: Any = tokenizer_of("bytes", "<think>", "</s>", "<|user|>")
    assert surroundings(tokenizer) == ([], [])
    begin, end = tokenizer.convert_tokens_to_ids(["<|user|>", "</s>"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A </s> </s>", special_tokens=[("<|user|>", begin), ("</s>", end)]
    )
    assert surroundings(tokenizer) == ([begin], [end, end])
    assert encode(tokenizer, ["1"]) == [tokenizer.encode("1", add_special_tokens=False)]
    assert surroundings(ByT5Tokenizer()) == ([], [1])


def test_a_token_of_its_own() -> None:
    tokenizer = tokenizer_of("bytes", "<think>", "</s>", "<|user|>")
    assert own_token(tokenizer, "<think>") == tokenizer.convert_tokens_to_ids("<think>")
    assert own_token(tokenizer, "</think>") is None
    words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    assert own_token(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?"), "<think>") is None


def test_passages() -> None:
    both = joined("a", text("b"), joined("c", text("d")), text(""))
    assert both == "abcd" and both.texts == ((1, 2), (3, 4))
    assert joined().texts == () == text("").texts
