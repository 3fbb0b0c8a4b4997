"""Tests of ``llm-trm eval lm``: comparison, counts, timing and errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llm_trm.cli.group import Group
from llm_trm.data.arithmetic import World
from llm_trm.data.problems import Question
from llm_trm.errors import InputError
from llm_trm.evaluate.answers import accuracy, answer_tokens, written_length
from llm_trm.evaluate.decoding import Decoding, Mode
from llm_trm.evaluate.language_model import evaluate_language_model, require_graded
from llm_trm.evaluate.language_model_modes import Reply, load_responders
from llm_trm.evaluate.statistics import wilson
from llm_trm.models.causal.loading import load_latent_model
from llm_trm.models.loading import load_thinking_model
from llm_trm.models.tiny import tiny_tokenizer
from tests.causal.saved import latent_model, save
from tests.causal.tiny import tiny_decoder

LLM_TRM = Group(commands_at={"lm": "llm_trm.cli.eval.lm:lm"})


def run(*arguments: str) -> Result:
    return CliRunner().invoke(LLM_TRM, ["lm", "--device", "cpu", *arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(latent_model(), tmp_path_factory.mktemp("eval_lm") / "lora")


@dataclass
class Scripted:
    """Gives prepared answers in batches of two that take the given seconds each."""

    mode: Mode
    says: list[str]
    steps: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    calls: list[tuple[Mode, int, int]] = field(default_factory=list)
    soft_tokens = 3

    def encode(self, question: str) -> list[int]:
        return [int(question)]

    def reply(self, prompts: Sequence[list[int]], decoding: Decoding) -> tuple[list[Reply], float]:
        self.calls.append((self.mode, len(prompts), decoding.max_new_tokens))
        texts = [self.says[number] for (number,) in prompts]
        replies = [
            Reply(text, text.rstrip("!"), len(text), finished=not text.endswith("!"), steps=self.steps)
            for text in texts
        ]
        return replies, self.seconds[prompts[0][0] // 2] if self.seconds else 1.0


def test_counts_times_and_ratios() -> None:
    # References 0, 1, 2, ... of problems with 1, 1, 2, 2, 2 operations.
    questions = [
        Question(str(number), f"so\n#### {number}", {"operations": 1 + (number > 1)}) for number in range(5)
    ]
    calls: list[tuple[Mode, int, int]] = []
    responders: Any = {
        "no-think": Scripted("no-think", ["0", "9", "9", "9", "9"], calls=calls),
        "think": Scripted("think", ["is 0", "1.0", "so 2", "3", "44"], (), (4.0, 8.0, 2.0), calls),
        "latent": Scripted("latent", ["0", "1", "2!", "3", "9"], (2, 1), (1.0, 2.0, 1.5), calls),
    }
    found = evaluate_language_model(responders, questions, Decoding(50), batch_size=2, by="operations")
    assert [mode.correct for mode in found.modes.values()] == [1, 4, 3], "what is cut is wrong"
    latent, think = found.modes["latent"], found.modes["think"]
    assert latent.accuracy == 0.6 and latent.interval == wilson(3, 5) and latent.cut == 0.2
    assert (latent.steps, latent.thoughts, latent.soft_tokens) == (3.0, 2.0, 6.0)
    assert think.tokens == (4 + 3 + 4 + 1 + 2) / 5 and think.steps == 0
    # Three batches of 2, 2 and 1; the time of a batch is divided by its problems.
    assert (latent.seconds, think.seconds) == (1.0, 2.0), "medians of 0.5, 1, 1.5 and of 2, 4, 2"
    assert think.spread == pytest.approx((2.0, 3.2))
    assert found.batch_seconds["think"] == [4.0, 8.0, 2.0]
    ratios = found.ratios
    assert ratios is not None and ratios.gap_closed == pytest.approx((0.6 - 0.2) / (0.8 - 0.2))
    assert ratios.gap_closed_interval is None, "five problems may well have no gap"
    assert (ratios.tokens, ratios.seconds) == pytest.approx((6 / 14, 0.25)), (
        "the median of 1/4, 2/8 and 1.5/2"
    )
    assert {label: group["latent"].problems for label, group in found.groups.items()} == {"1": 2, "2": 3}
    assert [group["think"].correct for group in found.groups.values()] == [2, 2]
    assert found.groups["1"]["latent"].seconds is None
    # A warm-up of few tokens, then the same batches for all modes in a rotating order.
    assert calls[:3] == [("no-think", 2, 16), ("think", 2, 16), ("latent", 2, 16)]
    assert [mode for mode, *_ in calls[3:]] == [
        *("no-think", "think", "latent"),
        *("think", "latent", "no-think"),
        *("latent", "no-think", "think"),
    ]
    assert [(size, limit) for _, size, limit in calls[3:]] == [(2, 50)] * 6 + [(1, 50)] * 3


def test_gap_with_an_interval_and_without_a_gap() -> None:
    count = 200
    questions = [Question(str(number), "7") for number in range(count)]

    def says(right: int) -> list[str]:
        return ["7"] * right + ["8"] * (count - right)

    def ratios(none: int, think: int, latent: int) -> Any:
        shares: Any = {
            "no-think": Scripted("no-think", says(none)),
            "think": Scripted("think", says(think)),
            "latent": Scripted("latent", says(latent)),
        }
        return evaluate_language_model(shares, questions, Decoding(), batch_size=64).ratios

    found = ratios(40, 190, 130)
    low, high = found.gap_closed_interval
    assert found.gap_closed == pytest.approx(0.6) and 0.5 < low < 0.6 < high < 0.7
    assert ratios(40, 30, 35).gap_closed is None
    alone: Any = {"latent": Scripted("latent", says(3))}
    assert evaluate_language_model(alone, questions, Decoding()).ratios is None


def test_start_and_end_of_an_answer() -> None:
    assert written_length([5, 2, 2, 0], {2}) == (2, True)
    assert written_length([5, 6], {2}) == (2, False)
    tags = (30, 31)
    assert answer_tokens([1], [30, 5, 31, 6, 7], tags) == [6, 7]
    assert answer_tokens([1, 30, 31], [6, 7], tags) == [6, 7], "thinking that the prompt leaves out"
    assert answer_tokens([1], [30, 5, 6], tags) is None, "thinking that never ended"
    assert answer_tokens([1, 30], [5, 6], tags) is None, "nor that which the prompt began"
    assert answer_tokens([1, 30], [5, 31, 6], tags) == [6]
    assert answer_tokens([1], [31, 5, 30, 6], tags) is None
    assert answer_tokens([1], [30, 6], tags, open_ended=True) == [6]
    assert answer_tokens([1], [6], None) == [6]


def test_plain_prompts_end_with_the_next_question(folder: Path) -> None:
    responder = replace(load_responders(["latent"], folder, None)[0]["latent"], form="plain")
    prompt = responder.encode("How much?")
    assert responder.tokenizer.decode(prompt) == "Question: How much?\nAnswer: "

    def read(text: str) -> Reply:
        return responder._reply(prompt, responder.tokenizer.encode(text), [2, 0])

    assert read("<think> 72\nQuestion: More?").answer == "72"
    assert read("<think> 72\nQuestion: More?").finished and not read("<think> 72").finished
    ended = read("<think> 72<|end|><|pad|><|pad|>")
    assert (ended.answer, ended.finished, ended.steps) == ("72", True, (2,))
    assert ended.tokens == len(responder.tokenizer.encode("<think> 72<|end|>"))


def test_the_command(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ("--min-operations", "1", "--operations", "3", "--max-operand", "2", "--num-samples", "40")
    output, plot = tmp_path / "lm.json", tmp_path / "lm.svg"
    result = run(
        *("--checkpoint", str(folder), *options, "--by", "operations", "--batch-size", "16"),
        *("--max-new-tokens", "48", "-o", str(output), "--plot", str(plot), "--write-card"),
    )
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text())
    # Compute the same metrics with the plain model and exact texts.
    plain = load_thinking_model("arithmetic")
    problems = list(World(1, 3, max_operand=2).problems(40, "test"))
    for mode, thinking in (("no-think", False), ("think", True)):
        expected = accuracy(plain.model, plain.tokenizer, problems, thinking=thinking, max_new_tokens=48)
        scores = found["modes"][mode]
        assert (scores["correct"], scores["tokens"]) == (expected.correct, expected.generated)
        assert scores["steps"] == 0 and scores["seconds"] > 0
        assert sum(group[mode]["correct"] for group in found["groups"].values()) == expected.correct
    assert found["modes"]["latent"]["steps"] > 0 and found["groups"].keys() == {"1", "2", "3"}
    assert found["data_words"].startswith(
        "the arithmetic world (held out, 1 to 3 operations, operands up to 2"
    )
    assert found["model"] == "arithmetic" and found["batch_size"] == 16 and found["missing"] == {}
    for words in (
        "exact match [95%]",
        "by operations",
        "of the tokens of thinking",
        "use the model arithmetic.",
    ):
        assert words in result.stdout
    assert b"<svg" in plot.read_bytes()
    share = f"{found['modes']['latent']['tokens']:.1f}"
    (row,) = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| latent")]
    assert share in row and load_latent_model(folder).model.about.evaluation["modes"] == found["modes"]


def test_file_in_gsm8k_format(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    records: list[dict[str, Any]] = [
        {"question": "3+4*2", "answer": "3+4=7\n7*2=4\n#### 4.0", "kind": "a"},
        {"question": "5-1", "answer": "\\boxed{9}", "kind": "b"},
        {"question": "5-2", "kind": "b"},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    output = tmp_path / "lm.json"
    result = run("--model", "arithmetic", "--data", str(path), "--by", "kind", "-o", str(output))
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text())
    assert found["groups"]["a"]["think"]["correct"] == 1 and found["groups"]["b"]["think"]["correct"] == 0
    assert found["modes"]["think"]["problems"] == 2 and found["ungraded"] == 1
    assert (
        "1 problems have no answer" in result.stderr
        and "left out latent: arithmetic is a plain" in result.stderr
    )
    assert found["ratios"] is None and found["max_new_tokens"] == 2048


def test_training_problems_are_rejected(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text('{"question": "1+1", "answer": "2"}\n')
    model = latent_model()
    known = save(model, tmp_path / "known", data=str(file))
    rewarded = save(model, tmp_path / "rewarded", data="gsm8k", phase3={"dataset": str(file)})
    strange = save(model, tmp_path / "strange", data="gsm8k")
    common = ("--data", str(file), "--mode", "latent", "--max-new-tokens", "8")
    for folder, told in ((known, True), (rewarded, True), (strange, False)):
        result = run("--checkpoint", str(folder), *common)
        assert result.exit_code == 0 and ("what the model was trained on" in result.stderr) is told


def test_training_problems_are_reported_under_another_name(tmp_path: Path) -> None:
    learned, copy, other = (tmp_path / f"{name}.jsonl" for name in ("learned", "copy", "other"))
    learned.write_text("".join(f'{{"question": "{n}+1", "answer": "{n + 1}"}}\n' for n in range(4)))
    copy.write_text("".join(reversed(learned.read_text().splitlines(keepends=True)[1:])))
    other.write_text('{"question": "9-1", "answer": "8"}\n{"problem": "2+1", "solution": "3"}\n')
    trained = save(latent_model(), tmp_path / "lora", data=str(learned))
    common = ("--checkpoint", str(trained), "--mode", "latent", "--max-new-tokens", "4", "--data")
    for data, words in ((copy, "3 of the 3 problems are in"), (other, "1 of the 2 problems are in")):
        result = run(*common, str(data))
        assert result.exit_code == 0 and f"{words} {learned}" in result.stderr, result.output
    rewarded = save(latent_model(), tmp_path / "both", data="gsm8k", phase3={"dataset": f"gsm8k, {learned}"})
    result = run("--checkpoint", str(rewarded), *common[2:], str(copy))
    assert f"3 of the 3 problems are in {learned}" in result.stderr
    learned.unlink()
    assert "trained on" not in run(*common, str(copy)).stderr


def test_whitespace_does_not_hide_training_problems(tmp_path: Path) -> None:
    learned, copy = tmp_path / "learned.jsonl", tmp_path / "copy.jsonl"
    learned.write_text('{"question": "What is 1+1?", "answer": "2"}\n{"question": "2+2", "answer": "4"}\n')
    questions = ["What is  1+1? ", " 2+2", "2+\t2"]
    copy.write_text("".join(json.dumps({"question": asked, "answer": "4"}) + "\n" for asked in questions))
    trained = save(latent_model(), tmp_path / "lora", data=str(learned))
    arguments = ("--mode", "latent", "--max-new-tokens", "4", "--data", str(copy))
    result = run("--checkpoint", str(trained), *arguments)
    assert f"2 of the 3 problems are in {learned}" in result.stderr, result.output


def test_modes_that_cannot_run_give_a_reason(folder: Path, tmp_path: Path) -> None:
    decoder = tiny_decoder(vocab_size=262)
    tokenizer = tiny_tokenizer()
    for name, template in (("none", None), ("fixed", "{{ messages[0].content }}")):
        decoder.save_pretrained(tmp_path / name)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / name)
    responders, missing = load_responders(["no-think", "think"], None, str(tmp_path / "none"))
    assert responders.keys() == {"no-think"} and "no chat template" in missing["think"]
    assert responders["no-think"].form == "plain"
    responders["no-think"].reply([responders["no-think"].encode("1+1")], Decoding(4))
    _, missing = load_responders(["think"], None, str(tmp_path / "fixed"))
    assert "enable_thinking" in missing["think"]

    latent = load_latent_model(folder)
    known = json.loads((folder / "latent.json").read_text())
    whole = tmp_path / "whole"
    latent.model.merge_and_unload().save_pretrained(whole)
    latent.tokenizer.save_pretrained(whole)
    (whole / "latent.json").write_text(json.dumps({**known, "base": None}))
    _, missing = load_responders(["no-think", "latent"], whole, None)
    assert "is unknown: name it with --model" in missing["no-think"] and "latent" not in missing
    responders, _ = load_responders(["no-think", "latent"], whole, "arithmetic")
    assert responders["no-think"].name == "arithmetic" and responders["latent"].name == str(whole)
    with pytest.raises(InputError, match="with a recursion: name it with --checkpoint"):
        load_responders(["no-think"], None, str(whole))
    with pytest.raises(InputError, match="--checkpoint"):
        load_responders(["no-think"], None, None)


def test_nonsense_gets_one_line_and_exit_code_2(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none.jsonl").write_text('{"question": "1+1"}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"question": "1+" * 2500, "answer": "1"}) + "\n")
    arithmetic, few = ("--model", "arithmetic"), ("--num-samples", "2")
    for arguments, words in (
        ((), ("runs/lora", "--model")),
        ((*arithmetic, "--mode", "think,deep"), ("think,deep", "latent")),
        ((*arithmetic, "--mode", ","), ("--mode",)),
        ((*arithmetic, "--mode", "latent"), ("mode latent cannot run", "--checkpoint")),
        ((*arithmetic, "--mode", "think,latent"), ("mode latent cannot run",)),
        (("--checkpoint", "nowhere"), ("nowhere", "train lora")),
        ((*arithmetic, "--data", "none.jsonl"), ("none of the 1 problems",)),
        ((*arithmetic, "--data", "gone.jsonl"), ("gone.jsonl", "No such file")),
        ((*arithmetic, "--data", "gsm9k"), ("gsm9k", "gsm8k")),
        ((*arithmetic, "--data", "none.jsonl", "--max-operand", "3"), ("--max-operand", "arithmetic")),
        ((*arithmetic, "--data", "long.jsonl"), ("tokens", "4096", "shorten")),
        ((*arithmetic, *few, "--by", "mood"), ("--by mood",)),
        ((*arithmetic, "--min-operations", "9"), ("operations",)),
        ((*arithmetic, "--plot", "x.bmp"), ("x.bmp", ".png")),
        ((*arithmetic, "--write-card"), ("--write-card", "--checkpoint")),
        (("--checkpoint", str(folder), "--write-card", "--mode", "think"), ("--write-card", "latent")),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert result.stdout == "", (arguments, result.output)
        # Earlier lines may name modes that were skipped.
        assert sum("error" in line for line in result.stderr.splitlines()) == 1
        for word in words:
            assert word in result.stderr.splitlines()[-1], (arguments, result.stderr)


def test_problems_without_an_answer() -> None:
    questions = [Question("a", None), Question("b", "It is\nlong"), Question("c", "3")]
    assert require_graded(questions) == questions[2:]
    with pytest.raises(InputError, match="none of the 2 problems"):
        require_graded(questions[:2])
