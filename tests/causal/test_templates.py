"""Tests of chat templates, and that questions and answers are encoded as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llm_trm.cli import main
from llm_trm.data.lessons import encode_prompt, lesson, prompt_form, question_prompt
from llm_trm.data.problems import Question, read_questions
from llm_trm.data.questions import Solved, load_solved
from llm_trm.data.reasoning import ReasoningDataset
from llm_trm.errors import InputError
from llm_trm.evaluate.decoding import Decoding
from llm_trm.evaluate.language_model_modes import load_responders
from llm_trm.models.causal.loading import load_latent_model
from llm_trm.models.loading import load_thinking_model
from llm_trm.models.tiny import tiny_tokenizer
from llm_trm.train.lora.data import Collator, Lessons
from llm_trm.train.phase1.texts import read_texts, tokenised
from tests.causal import chats
from tests.causal.chats import chat_tokenizer, save_chat_model
from tests.causal.lora_world import SMALL, settings, write_rows

#: A question with every kind of token: special, of the template, and thinking tags.
NAMES = "Is <think> a tag, or </think>, </s>, <|im_end|>\n<|Assistant|>, <|end|>?"
#: Templates of models, with the tokens that their tokenizers add around a text.
TEMPLATES = {
    "smollm3": (chats.SMOLLM3, False),
    "qwen3": (chats.QWEN3, False),
    "r1": (chats.R1, True),
    "glm": (chats.GLM, False),
    "llama3": (chats.LLAMA3, True),
    "none": (None, True),
}


def tokenizer_of(name: str, **options: Any) -> Any:
    if name == "arithmetic":
        return tiny_tokenizer()
    template, begins = TEMPLATES[name]
    return chat_tokenizer(template, begins=begins, **options)


def form_of(tokenizer: Any) -> Any:
    return prompt_form(tokenizer)


def written(tokenizer: Any, found: dict[str, list[int]]) -> str:
    return str(tokenizer.decode([label for label in found["labels"] if label != -100]))


def tags_in(tokenizer: Any, ids: list[int]) -> list[str]:
    tags = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    return [tokenizer.convert_ids_to_tokens(number) for number in ids if number in tags]


@pytest.mark.parametrize("name", [*TEMPLATES, "arithmetic"])
def test_a_lesson_thinks_once(name: str) -> None:
    tokenizer = tokenizer_of(name)
    form = form_of(tokenizer)
    ids = lesson(tokenizer, "3+4", "7", form)["input_ids"]
    assert tags_in(tokenizer, ids) == (["<think>"] if form == "plain" else ["<think>", "</think>"])
    assert ids.count(tokenizer.bos_token_id) == (name in ("r1", "glm", "llama3", "none"))
    # Question and answer are encoded unchanged.
    text = tokenizer.decode(ids)
    assert "3+4" in text and text.endswith(f"7{tokenizer.eos_token}")


@pytest.mark.parametrize(
    ("name", "before"), [("r1", "<think>\n"), ("glm", "<think>\n"), ("qwen3", "assistant\n")]
)
def test_a_prompt_that_opens_a_thought_is_not_opened_again(name: str, before: str) -> None:
    tokenizer = tokenizer_of(name)
    prompt = question_prompt(tokenizer, "3+4", "chat")
    assert prompt.endswith(before)
    tag = "" if before.startswith("<think>") else "<think>"
    found = lesson(tokenizer, "3+4", "7", "chat", thinking="3 and 4")
    assert written(tokenizer, found) == f"{tag}3 and 4</think>7</s>"
    solved = [Solved("3+4", "7", "3 and 4")]
    lessons = Lessons(solved, tokenizer, "chat", stages=1, teacher=True)
    assert written(tokenizer, lessons[1]) == f"{tag}</think>7</s>"
    assert lessons[0]["input_ids"] == found["input_ids"] == lessons[1]["teacher_ids"]
    assert tokenizer.decode(lessons[1]["input_ids"][lessons[1]["answer_at"] + 1 :]) == "7</s>"


def test_direct_answer_if_every_prompt_opens_a_thought() -> None:
    rows = [Solved("1+1", "2"), Solved("3+4", "7", thinks=False)]
    with pytest.raises(InputError, match="'3\\+4' has think false: remove such rows"):
        Lessons(rows, tokenizer_of("r1"), "chat")
    assert len(Lessons(rows, tokenizer_of("r1"), "plain")) == 2


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("r1", "<|Assistant|><think>\n\n</think>\n\n"),
        ("glm", "<|Assistant|><think>\n\n</think>\n\n"),
        ("smollm3", "assistant\n<think>\n\n</think>\n"),
        ("qwen3", "assistant\n<think>\n\n</think>\n\n"),
        ("llama3", "assistant<|end_header_id|>\n\n"),
        ("arithmetic", "<|assistant|><think></think>"),
    ],
)
def test_no_thinking_leaves_no_thought_open(name: str, end: str) -> None:
    tokenizer = tokenizer_of(name)
    prompt = question_prompt(tokenizer, "3+4", "chat", thinking=False)
    assert prompt.endswith(end)
    tags = tags_in(tokenizer, encode_prompt(tokenizer, prompt, "chat"))
    assert tags == (["<think>", "</think>"] if "<think>" in end else [])


def test_a_thought_that_ends_without_a_line_break() -> None:
    tokenizer = chat_tokenizer(chats.R1.replace("<think>\\n", "<think>"))
    assert question_prompt(tokenizer, "3", "chat", thinking=False).endswith("<|Assistant|><think></think>")
    assert written(tokenizer, lesson(tokenizer, "3", "3", "chat")) == "</think>3</s>"


def test_tags_in_a_template_start_no_recursion() -> None:
    tokenizer = tokenizer_of("smollm3")
    prompt = question_prompt(tokenizer, "3+4", "chat")
    assert "<think> Thought section </think>" in prompt
    ids = encode_prompt(tokenizer, prompt, "chat")
    assert tags_in(tokenizer, ids) == [] and tokenizer.decode(ids) == prompt
    # The language model itself was trained with tokens there.
    plain = encode_prompt(tokenizer, question_prompt(tokenizer, "3+4", "chat", recurs=False), "chat")
    assert tags_in(tokenizer, plain) == ["<think>", "</think>"]
    opened = chat_tokenizer(chats.SMOLLM3.replace("assistant\\n", "assistant\\n<think>\\n"))
    ids = encode_prompt(opened, question_prompt(opened, "3+4", "chat"), "chat")
    assert tags_in(opened, ids) == ["<think>"]


@pytest.mark.parametrize("form", ["chat", "plain"])
def test_end_token_of_the_tokenizer_is_not_in_prompts(form: Any) -> None:
    tokenizer = chat_tokenizer(chats.QWEN3, begins=True, ends=True)
    prompt = encode_prompt(tokenizer, question_prompt(tokenizer, "3+4", form), form)
    assert tokenizer.eos_token_id not in prompt
    assert prompt.count(tokenizer.bos_token_id) == (form == "plain")
    found = lesson(tokenizer, "3+4", "7", form)["input_ids"]
    assert found.count(tokenizer.eos_token_id) == 1 and found[-1] == tokenizer.eos_token_id
    (row,) = [Lessons([Solved("3+4", "7")], tokenizer, form)[0]["input_ids"]]
    assert row == found


def test_end_token_only_after_complete_answers() -> None:
    tokenizer = chat_tokenizer(None, begins=True, ends=True)
    rows = [{"question": "3+4", "answer": answer} for answer in ("7", "", "7" * 90)]
    ends = [(item["input_ids"] == 258).sum().item() for item in ReasoningDataset(rows, tokenizer, 60)]  # type: ignore[attr-defined]
    assert tokenizer.eos_token_id == 258 and ends == [1, 0, 0]


@pytest.mark.parametrize("name", [*TEMPLATES, "arithmetic"])
@pytest.mark.parametrize("question", ["3+4", NAMES, "<think>", "</s>", "a<|im_start|>system\n", "<|pad|>7"])
def test_questions_are_encoded_as_text(name: str, question: str) -> None:
    tokenizer = tokenizer_of(name)
    form = form_of(tokenizer)
    benign = lesson(tokenizer, "0", "7", form)["input_ids"]
    ids = lesson(tokenizer, question, "7", form)["input_ids"]
    added = tokenizer.added_tokens_decoder
    assert [n for n in ids if n in added] == [n for n in benign if n in added]
    # Llama's template strips it.
    question = question.strip() if name == "llama3" else question
    # The text around the question is encoded as usual.
    begin = next(place for place, (one, other) in enumerate(zip(ids, benign, strict=False)) if one != other)
    end = len(benign) - begin - 1
    assert ids[-end:] == benign[-end:] and tokenizer.decode(ids[begin:-end]) == question


@pytest.mark.parametrize("name", ["smollm3", "r1", "none", "arithmetic"])
@pytest.mark.parametrize(
    "answer", ["<think>3</think>7", "7</s>", "<|Assistant|>7", "</think>", "<|end|>", "COVID-19 <think>"]
)
def test_answers_and_thinking_are_text(name: str, answer: str) -> None:
    tokenizer = tokenizer_of(name)
    form = form_of(tokenizer)
    for thinking in ("", answer):
        ids = lesson(tokenizer, "0", answer, form, thinking=thinking)["input_ids"]
        benign = lesson(tokenizer, "0", "7", form, thinking="7" if thinking else "")["input_ids"]
        special = {n for n, token in tokenizer.added_tokens_decoder.items() if str(token) != "COVID-19"}
        assert [n for n in ids if n in special] == [n for n in benign if n in special]
        assert tokenizer.decode(ids).count(answer) >= 1 + bool(thinking)
        lessons = Lessons([Solved("0", answer, thinking), Solved("0", answer, "", False)], tokenizer, "plain")
        assert lessons[0]["labels"][-1] == tokenizer.eos_token_id
        said = [label for label in lessons[1]["labels"] if label != -100]
        assert tokenizer.decode(said) == f"{answer}{tokenizer.eos_token}" and special & set(said) == {
            tokenizer.eos_token_id
        }


def test_added_words_stay_words() -> None:
    tokenizer = tokenizer_of("qwen3")
    word = tokenizer.convert_tokens_to_ids("COVID-19")
    for question in ("Is it COVID-19?", "Is it COVID-19? <|im_end|>"):
        ids = encode_prompt(tokenizer, question_prompt(tokenizer, question, "chat"), "chat")
        assert ids.count(word) == 1


def test_whitespace_that_a_template_strips() -> None:
    tokenizer = tokenizer_of("llama3")
    stripped = question_prompt(tokenizer, "3+4", "chat")
    assert question_prompt(tokenizer, " 3+4\n", "chat") == stripped
    ids = encode_prompt(tokenizer, question_prompt(tokenizer, " <|eot_id|> \n", "chat"), "chat")
    assert ids.count(tokenizer.convert_tokens_to_ids("<|eot_id|>")) == 1


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (chats.DROPS, "omits or changes the question"),
        (chats.REPEATS, "contains the question 2 times"),
        (chats.SHOUTS, "omits or changes the question"),
        (chats.ESCAPES, "omits or changes the question"),
        (chats.BROKEN, "cannot be rendered \\(no system prompt\\)"),
        ("{%- if", "cannot be rendered"),
    ],
)
def test_templates_that_lose_the_question(template: str, words: str, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(template)
    for fails in (
        lambda: prompt_form(tokenizer),
        lambda: question_prompt(tokenizer, "3+4", "chat"),
        lambda: load_thinking_model(str(save_chat_model(tmp_path, tokenizer))),
    ):
        with pytest.raises(InputError, match=words) as refused:
            fails()
        assert "\n" not in str(refused.value) and "--prompt-form plain" in str(refused.value)
    assert prompt_form(tokenizer, "plain") == "plain"


def test_templates_that_lose_some_questions() -> None:
    cut = chat_tokenizer(chats.QWEN3.replace("message.content", "(message.content | truncate(40, true))"))
    assert "3+4" in question_prompt(cut, "3+4", "chat")
    with pytest.raises(InputError, match="changes the question '1\\+1\\+"):
        question_prompt(cut, "1+" * 40 + "1", "chat")


def test_template_that_prevents_thinking() -> None:
    tokenizer = chat_tokenizer(chats.CLOSES)
    assert question_prompt(tokenizer, "3", "chat", thinking=False).endswith("<|Assistant|></think>")
    with pytest.raises(InputError, match="ends every prompt with </think>"):
        lesson(tokenizer, "3", "3", "chat")


def test_a_date_that_changes_between_two_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    dated = chats.QWEN3.replace("{%- for", "{{- now -}}{%- for", 1)
    tokenizer = chat_tokenizer(dated)
    render = tokenizer.apply_chat_template
    day = "Monday. "
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda *given, **options: render(*given, now=day, **options)
    )
    assert question_prompt(tokenizer, "3", "chat").startswith("Monday. ")
    day = "Tuesday. "
    assert question_prompt(tokenizer, "<think>", "chat").startswith("Tuesday. ")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"answer": "<think>3</think>7"}, "line 1: the answer contains <think>: move the reasoning"),
        ({"answer": "3</think>7"}, "line 1: the answer contains </think>"),
        ({"answer": "<think>3</think>\n#### 7"}, "line 1: the thinking contains <think>"),
        ({"answer": "7", "thinking": "<think>3</think>"}, "line 1: the thinking contains <think>"),
    ],
)
def test_rows_with_tags_of_their_own(rows: dict[str, str], words: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"question": "3+4", **rows}])
    with pytest.raises(InputError, match=words) as refused:
        load_solved(str(path))
    assert "\n" not in str(refused.value)
    if "thinking" not in words:
        with pytest.raises(InputError, match=words):
            list(read_questions(path))
    assert load_solved(str(write_rows(path, [{"question": NAMES, "answer": "</s>"}])))[0].question == NAMES


def test_texts_of_a_language_model(tmp_path: Path) -> None:
    """Phase 1 encodes questions, answers and other chat messages as text, and the model's tags as tags."""
    folder = save_chat_model(tmp_path / "r1", chat_tokenizer(chats.R1, begins=True, ends=True))
    model = load_thinking_model(str(folder))
    file = tmp_path / "records.jsonl"
    chat = [
        {"role": "user", "content": "What is <think>?"},
        {"role": "assistant", "content": "A tag"},
        {"role": "user", "content": "<think>"},
        {"role": "assistant", "content": "<think>"},
    ]
    records = [
        {"question": NAMES, "thinking": "</think>", "response": "<think></s>"},
        {"messages": chat},
        {"text": "plain"},
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    texts = list(read_texts(str(file), model, thinking=True))
    pieces = tokenised([*texts, "other"], model, max_length=999, num_tokens=9999, held_out=0.1, source="x")
    ids = {model.tokenizer.decode(piece.tolist()): piece.tolist() for side in pieces for piece in side}
    added = model.tokenizer.added_tokens_decoder

    def control(text: str) -> str:
        return "".join(str(added[number]) for number in ids[text] if number in added)

    assert control(texts[0]) == "<s><|User|><|Assistant|><think></think></s>"
    assert texts[0].endswith("<|Assistant|><think>\n</think></think><think></s></s>")
    assert control(texts[1]) == "<s><|User|><|Assistant|></s><|User|><|Assistant|><think></s>"
    assert control("<s>plain") == "<s>"
    at_once = next(iter(read_texts(str(file), model, thinking=False)))
    assert at_once.endswith("<think>\n\n</think>\n\n<think></s></s>")


@pytest.mark.parametrize("name", ["r1", "glm", "qwen3", "llama3"])
def test_modes_of_a_plain_model(name: str, tmp_path: Path) -> None:
    folder = save_chat_model(tmp_path, tokenizer_of(name))
    responders, missing = load_responders(["no-think", "think"], None, str(folder))
    assert ("think" in missing) == (name == "llama3")
    silent = responders["no-think"]
    prompt = silent.encode(NAMES)
    assert tags_in(silent.tokenizer, prompt) == ([] if name == "llama3" else ["<think>", "</think>"])
    if name != "llama3":
        opened = tags_in(silent.tokenizer, responders["think"].encode(NAMES))
        assert opened == (["<think>"] if name in ("r1", "glm") else [])


def test_template_without_thinking_answers_directly(tmp_path: Path) -> None:
    """Its model might still think, so opening a thought is prevented during generation."""
    folder = save_chat_model(tmp_path, tokenizer_of("llama3"))
    responder = load_responders(["no-think"], None, str(folder))[0]["no-think"]
    tag = responder.tokenizer.convert_tokens_to_ids("<think>")
    responder.model.get_input_embeddings().weight.data[tag] *= 0
    responder.model.lm_head.weight.data[:] *= -1
    free = responder.model.lm_head.weight.data
    # The model would write the tag everywhere.
    free[tag] = responder.model.model(torch_ids(responder.encode("3"))).last_hidden_state[0, -1] * 9
    (reply,), _ = responder.reply([responder.encode("3")], Decoding(1))
    assert reply.tokens == 1 and reply.text != "<think>"


def torch_ids(ids: list[int]) -> Any:
    import torch

    return torch.tensor([ids])


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def refused_in_one_line(result: Result, *words: str) -> bool:
    lines = result.stderr.splitlines()
    return result.exit_code == 2 and len(lines) == 1 and all(word in lines[0] for word in words)


def test_commands_refuse_templates_and_answers(tmp_path: Path) -> None:
    lost = str(save_chat_model(tmp_path / "lost", chat_tokenizer(chats.DROPS)))
    closed = str(save_chat_model(tmp_path / "closed", chat_tokenizer(chats.CLOSES)))
    good = str(save_chat_model(tmp_path / "good", tokenizer_of("r1")))
    rows = str(write_rows(tmp_path / "rows.jsonl"))
    tags = str(write_rows(tmp_path / "tags.jsonl", [{"question": "3+4", "answer": "<think>3</think>7"}]))
    at_once = str(
        write_rows(
            tmp_path / "once.jsonl", [{"question": f"{n}", "answer": "7", "think": False} for n in "12"]
        )
    )
    out = str(tmp_path / "out")
    for arguments, words in (
        (
            ("train", "lora", "--model", lost, "--data", rows, "-o", out),
            ("changes the question", lost),
        ),
        (
            ("train", "lora", "--model", closed, "--data", rows, "-o", out),
            ("ends every prompt with </think>",),
        ),
        (
            ("train", "lora", "--model", good, "--data", tags, "-o", out),
            ("tags.jsonl, line 1", "column thinking"),
        ),
        (("train", "lora", "--model", good, "--data", at_once, "-o", out), ("think false",)),
        (("train", "phase1", "--model", lost, "-o", out), ("omits or changes the question",)),
        (("datagen", "--model", lost, "-o", out), ("omits or changes the question",)),
        (("datagen", "--model", closed, "-o", out), ("ends every prompt with </think>",)),
        (("eval", "lm", "--model", lost, "--num-samples", "2"), ("omits or changes the question",)),
        (("generate", "3+4", "--model", lost), ("omits or changes the question",)),
    ):
        result = run(*arguments, "--device", "cpu")
        assert refused_in_one_line(result, *words), (arguments, result.output, result.stderr)
        assert not list(Path(out).rglob("*.*"))


def test_a_run_from_training_to_evaluation(tmp_path: Path) -> None:
    """Train and load a model whose prompts open the thought, and use it with the same prompts."""
    pytest.importorskip("peft")
    from llm_trm.train.lora.train import train_lora

    save_chat_model(tmp_path / "lm", tokenizer_of("r1", ends=True))
    write_rows(
        tmp_path / "problems.jsonl", [{"question": f"{n}+<think>", "answer": f"{n}"} for n in range(30)]
    )
    result = train_lora(settings(tmp_path, lora=False, steps=2))
    assert "think_rate" not in result.metrics and "needless_think_rate" not in result.metrics
    assert result.metrics["trm_steps"] == SMALL["supervision_steps"] and "halting_loss" in result.metrics
    latent = load_latent_model(tmp_path / "run")
    responder = load_responders(["latent"], tmp_path / "run", None)[0]["latent"]
    asked = responder.encode("1+<think>")
    row = Lessons([Solved("1+<think>", "1")], latent.tokenizer, latent.prompt_form)[0]
    batch = Collator(latent.tokenizer.pad_token_id)([row])
    assert row["input_ids"][: len(asked)] == asked and row["labels"][: len(asked)] == [-100] * len(asked)
    assert latent.model(batch["input_ids"]).trm_steps.shape[1] == 1
    (reply,), _ = responder.reply([asked], Decoding(3))
    assert len(reply.steps) == 1
    latent.tokenizer.chat_template = chats.GLM
    latent.tokenizer.save_pretrained(tmp_path / "run")
    with pytest.raises(InputError, match=r"no longer produces \(their tokens would differ\)"):
        load_latent_model(tmp_path / "run")
    latent.tokenizer.chat_template = None
    latent.tokenizer.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(InputError, match="no longer produces"):
        load_latent_model(tmp_path / "run")


def test_questions_in_rewarded_training(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from llm_trm.models.causal import create_smollm_trm_model
    from llm_trm.models.causal.loading import save_latent_model
    from llm_trm.train.phase3.arguments import grpo_arguments
    from llm_trm.train.phase3.config import Phase3Config
    from llm_trm.train.phase3.inputs import Problems
    from llm_trm.train.phase3.train import make_trainer

    save_chat_model(tmp_path / "lm", tokenizer_of("r1"))
    model = create_smollm_trm_model(
        str(tmp_path / "lm"), False, num_latents=2, trm_kwargs=SMALL, device="cpu"
    )
    save_latent_model(model, model.tokenizer, tmp_path / "model", base=None, prompt_form="chat")
    config = Phase3Config(str(tmp_path / "model"), tmp_path / "run", group_size=4, batch_size=8, steps=1)
    latent = load_latent_model(config.checkpoint, trainable=True)
    problems = Problems([Question("3+<think>", "7")] * 8, [Question(NAMES, "7")], 0)
    trainer = make_trainer(config, grpo_arguments(config), latent, problems)
    prompts = [trainer.train_dataset[0]["prompt"], trainer.eval_dataset[0]["prompt"]]
    assert all(prompt.endswith("<|Assistant|><think>\n") for prompt in prompts)
    for prompt, question in zip(prompts, ("3+<think>", NAMES), strict=True):
        ids = trainer._tokenize_prompts([prompt])[0][0]
        asked = lesson(latent.tokenizer, question, "7", "chat")["input_ids"]
        assert asked[: len(ids)] == ids and tags_in(latent.tokenizer, ids) == ["<think>"]
    end = latent.tokenizer.eos_token_id
    said = [*latent.tokenizer.encode("</think>7", add_special_tokens=False), end]
    given: dict[str, Any] = {
        "prompts": prompts[:1],
        "completions": ["?"],
        "completion_ids": [said],
        "answer": ["7"],
    }
    correctness, form = trainer.reward_funcs
    assert correctness(**given) == [1.0] and form(**given) == [1.0]
    with pytest.raises(InputError, match="leave --think out"):
        config = Phase3Config(
            config.checkpoint, tmp_path / "other", group_size=4, batch_size=8, think="model"
        )
        make_trainer(config, grpo_arguments(config), latent, problems)


def test_prompts_of_a_trained_model(tmp_path: Path) -> None:
    """A saved model records its prompts, and rejects others."""
    pytest.importorskip("peft")
    from tests.causal.saved import latent_model, save

    folder = save(latent_model(), tmp_path / "run")
    assert load_latent_model(folder).prompt_form == "chat"
    facts = folder / "latent.json"
    known = json.loads(facts.read_text())
    other, more = tiny_tokenizer(), tiny_tokenizer()
    other.chat_template = chats.QWEN3
    more.add_tokens(["<|im_start|>"], special_tokens=True)
    for spoiled in (other, more):
        spoiled.save_pretrained(folder)
        with pytest.raises(InputError, match="their tokens would differ"):
            load_latent_model(folder)
    tiny_tokenizer().save_pretrained(folder)
    assert load_latent_model(folder).prompt_form == "chat"
    # Older models do not record them.
    facts.write_text(json.dumps({name: fact for name, fact in known.items() if name != "prompts"}))
    assert load_latent_model(folder).prompt_form == "chat"
    facts.write_text(json.dumps({**known, "prompt_form": "poem"}))
    with pytest.raises(InputError, match="must be one of chat, plain, not 'poem'"):
        load_latent_model(folder)


def test_pairs_are_not_replaced_if_a_question_is_invalid(tmp_path: Path) -> None:
    cut = chats.QWEN3.replace("message.content", "(message.content | truncate(40, true))")
    model = str(save_chat_model(tmp_path / "lm", chat_tokenizer(cut)))
    short = write_rows(tmp_path / "short.jsonl", [{"question": "1+1"}])
    long = write_rows(tmp_path / "long.jsonl", [{"question": "1+1"}, {"question": "1+" * 40 + "1"}])
    common = ("datagen", "--model", model, "-o", str(tmp_path / "pairs"), "--max-new-tokens", "4")
    assert run(*common, "--data", str(short), "--device", "cpu").exit_code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "pairs").iterdir()}
    result = run(*common, "--data", str(long), "--overwrite", "--device", "cpu")
    assert refused_in_one_line(result, "changes the question", "1+1+1")
    assert {path: path.read_bytes() for path in (tmp_path / "pairs").iterdir()} == before
