"""Tests of ``llm-trm generate``: one question, many, and a conversation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from llm_trm.cli.group import Group
from llm_trm.evaluate.decoding import MODES, Decoding, Mode
from llm_trm.evaluate.language_model_modes import load_responders
from tests.causal.saved import latent_model, save
from tests.causal.tiny import tiny_decoder

QUESTIONS = ["3+4*2", "5-1", "9*9*9-4+8", "2+2"]
LLM_TRM = Group(commands_at={"generate": "llm_trm.cli.generate:generate"})


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(LLM_TRM, ["generate", "--device", "cpu", *arguments], input=stdin)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(latent_model(), tmp_path_factory.mktemp("generate") / "lora")


@pytest.mark.parametrize("mode", MODES)
def test_batched_answers_equal_single_answers(folder: Path, mode: Mode) -> None:
    responder = load_responders([mode], folder, None)[0][mode]
    prompts = [responder.encode(question) for question in QUESTIONS]
    together, _ = responder.reply(prompts, Decoding(40))
    assert [responder.reply([prompt], Decoding(40))[0][0] for prompt in prompts] == together
    assert len({reply.tokens for reply in together}) > 1 or mode == "no-think"
    assert any(reply.steps for reply in together) == (mode == "latent")


def test_plain_modes_are_the_base_without_adapters_and_recursion(folder: Path) -> None:
    inside, _ = load_responders(MODES, folder, None)
    outside, missing = load_responders(MODES, None, "arithmetic")
    assert load_responders(["think"], folder, "arithmetic")[0]["think"].model is not inside["think"].model
    assert missing.keys() == {"latent"} and inside["think"].model is inside["latent"].model
    for mode in ("no-think", "think"):
        prompts = [inside[mode].encode(question) for question in QUESTIONS]
        assert inside[mode].reply(prompts, Decoding(40))[0] == outside[mode].reply(prompts, Decoding(40))[0]
    # The adapters are on again.
    prompts = [inside["latent"].encode(question) for question in QUESTIONS]
    ids = torch.tensor([prompts[0]])
    with torch.no_grad():
        adapted = inside["latent"].model(input_ids=ids).logits
        plain = outside["think"].model(input_ids=ids).logits
    assert not torch.allclose(adapted, plain, atol=1e-2)


def test_generated_text_depends_on_the_recursion(folder: Path) -> None:
    responder = load_responders(["latent"], folder, None)[0]["latent"]
    prompts = [responder.encode(question) for question in QUESTIONS]
    before, _ = responder.reply(prompts, Decoding(40))
    for name, weight in responder.model.named_parameters():
        if "modules_to_save" in name and "entry.projection" in name:
            torch.nn.init.normal_(weight)
    assert responder.reply(prompts, Decoding(40))[0] != before


def test_greedy_is_greedy_whatever_the_model_suggests() -> None:
    responder = load_responders(["think"], None, "arithmetic")[0]["think"]
    expected = [reply.text for reply in responder.reply([responder.encode("3+4*2")] * 4, Decoding(40))[0]]
    suggested = {"do_sample": True, "temperature": 4.0, "top_p": 0.99, "top_k": 200, "max_length": 9}
    suggested |= {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_p": 0.9}
    responder.model.generation_config.update(**suggested)
    replies = responder.reply([responder.encode("3+4*2")] * 4, Decoding(40))[0]
    assert [reply.text for reply in replies] == expected == ["<think>3+4=7;7*2=4</think>4"] * 4
    drawn = responder.reply([responder.encode("3+4*2")] * 4, Decoding(40, temperature=4.0))[0]
    assert len({reply.text for reply in drawn}) > 1


def test_one_question(folder: Path, tmp_path: Path) -> None:
    asked = ("3+4*2", "--checkpoint", str(folder), "--max-new-tokens", "40")
    result = run(*asked)
    assert result.exit_code == 0, result.output
    verbose = run(*asked, "-v", "-o", str(tmp_path / "a.jsonl"))
    record = json.loads((tmp_path / "a.jsonl").read_text())
    assert record["question"] == "3+4*2" and record["mode"] == "latent" and record["seconds"] > 0
    assert result.stdout == record["answer"] + "\n"
    text, figures = verbose.stdout.splitlines()
    assert text == record["text"] and text.startswith("<think>")
    steps = ", ".join(map(str, record["steps"]))
    assert record["steps"] and figures.startswith(
        f"[steps of the recursion: {steps}; {record['tokens']} tokens; "
    )


def test_plain_model_thinks_by_default() -> None:
    result = run("3+4*2", "--model", "arithmetic", "-v")
    assert result.stdout.startswith("<think>3+4=7;7*2=4</think>4\n[15 tokens; ")
    assert run("3+4*2", "--model", "arithmetic").stdout == "4\n"


def test_unfinished_reply_has_no_answer_and_is_reported() -> None:
    result = run("3+4*2", "--model", "arithmetic", "--max-new-tokens", "8")
    assert result.stdout == "\n" and "did not end within 8 tokens" in result.stderr


def test_answer_ends_with_the_training_end_token() -> None:
    responder = load_responders(["think"], None, "arithmetic")[0]["think"]
    wanted = responder.reply([responder.encode("3+4*2")], Decoding(40))[0]
    for others in (5, [5, 6], None):
        responder.model.generation_config.eos_token_id = others
        assert responder.reply([responder.encode("3+4*2")], Decoding(40))[0] == wanted


def test_too_long_question_keeps_earlier_answers(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("1+1\n" + "1+" * 2500)
    output = tmp_path / "answers.jsonl"
    output.write_text("mine")
    result = run("--input", str(tmp_path / "q.txt"), "--checkpoint", str(folder), "-o", str(output))
    assert result.exit_code == 2 and output.read_text() == "mine"


def test_files_and_standard_input(tmp_path: Path) -> None:
    lines = "\n".join(["3+4*2", "", " 5-1 ", "2+2"])
    (tmp_path / "q.txt").write_text("\ufeff" + lines, encoding="utf-8")
    (tmp_path / "q.jsonl").write_text(
        "".join(json.dumps({"question": q}) + "\n" for q in ("3+4*2", "5-1", "2+2"))
    )
    expected = "4\n4\n4\n"
    for file in ("q.txt", "q.jsonl"):
        assert run("--input", str(tmp_path / file), "--model", "arithmetic").stdout == expected
    assert run("--model", "arithmetic", "--batch-size", "2", stdin=lines).stdout == expected
    assert run("--input", "-", "--model", "arithmetic", stdin=lines).stdout == expected


def test_sampling_depends_on_the_seed() -> None:
    def drawn(seed: int) -> str:
        options = (
            "--model",
            "arithmetic",
            "--temperature",
            "3",
            "--max-new-tokens",
            "24",
            "--seed",
            str(seed),
        )
        return run("3+4*2", *options, "-v").stdout.rpartition("\n[")[0]

    assert drawn(0) == drawn(0) != drawn(1)
    narrow = run("3+4*2", "--model", "arithmetic", "--temperature", "3", "--top-k", "1")
    assert narrow.stdout == "4\n"


def test_conversation(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("llm_trm.cli.generate._is_terminal", lambda: True)
    lines = ["3+4*2", "", "\ufeff", "1+" * 2500, "5-1"]
    written = tmp_path / "said.jsonl"
    result = run("--model", "arithmetic", "-v", "-o", str(written), stdin="\n".join(lines))
    assert result.exit_code == 0
    assert "<think>3+4=7;7*2=4</think>4" in result.stdout and "<think>5-1=4</think>4" in result.stdout
    assert "[15 tokens; " in result.stdout
    assert "a context of 4096: shorten the question" in result.stderr
    assert [json.loads(line)["answer"] for line in written.read_text().splitlines()] == ["4", "4"]
    latent = run("--checkpoint", str(folder), "-v", "--max-new-tokens", "40", stdin="3+4*2\n")
    assert (
        latent.exit_code == 0
        and "> <think>" in latent.stdout
        and "[steps of the recursion: " in latent.stdout
    )


def test_nonsense_gets_one_line_and_exit_code_2(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_decoder().save_pretrained(tmp_path / "llama")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "mark.txt").write_text("\ufeff\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    arithmetic, latent = ("--model", "arithmetic"), ("--checkpoint", str(folder))
    for arguments, words in (
        (("1+1",), ("runs/lora", "--model")),
        (("1+1", "--checkpoint", "no/where/at/all"), ("no/where/at/all", "train lora")),
        (("1+1", "--checkpoint", str(tmp_path / "llama")), ("llama",)),
        (("1+1", "--model", "/no/where"), ("/no/where", "cannot be loaded")),
        (("1+1", "--model", str(folder)), ("adapters", "--checkpoint")),
        (("1+1", *arithmetic, "--mode", "latent"), ("mode latent cannot run", "--checkpoint")),
        (("1+" * 2500, *latent), ("5002 tokens", "4096", "shorten")),
        (("", *arithmetic), ("empty",)),
        (("\ufeff", *arithmetic), ("empty",)),
        (("\ufeff \n\ufeff\t", *arithmetic), ("empty",)),
        (("--input", "mark.txt", *arithmetic), ("mark.txt", "no question")),
        (("1+1", "--input", "q.txt", *arithmetic), ("not both",)),
        (("--input", "q.txt", *arithmetic), ("q.txt", "does not exist")),
        (("--input", "q.jsonl", *arithmetic), ("q.jsonl", "No such file")),
        (("--input", "empty.txt", *arithmetic), ("empty.txt", "no question")),
        (("--input", "binary.txt", *arithmetic), ("binary.txt", "UTF-8")),
        ((*arithmetic,), ("standard input", "no question")),
        (("1+1", *arithmetic, "--temperature", "inf"), ("--temperature",)),
        (("1+1", *arithmetic, "-o", "no/such/folder"), ("does not exist",)),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert result.stdout == "" and result.stderr.count("\n") == 1, (arguments, result.output)
        for word in words:
            assert word in result.stderr, (arguments, result.stderr)
