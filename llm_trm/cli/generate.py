"""``llm-trm generate``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_trm.choices import DeviceName
from llm_trm.cli.answers_file import AnswersFile, answers_file, require_no_partial
from llm_trm.cli.options.language_model import ModelChoice, chosen_checkpoint, memory_advice
from llm_trm.cli.options.new_files import require_new_files
from llm_trm.cli.options.settings import settings_options
from llm_trm.cli.text_input import read_input
from llm_trm.device import resolve_device
from llm_trm.errors import InputError, Interrupted
from llm_trm.evaluate.decoding import Decoding, Mode
from llm_trm.extras import require
from llm_trm.files import is_special
from llm_trm.ranges import BATCH, SEED, shown
from llm_trm.settings import Settings, setting
from llm_trm.shared_settings import device, output_file, overwrite

if TYPE_CHECKING:
    from llm_trm.evaluate.language_model_modes import Reply, Responder


@dataclass(frozen=True)
class GenerateSettings(Settings):
    """Options of ``llm-trm generate``."""

    input: Path | None = setting(
        None,
        "Questions: a text file with one per line, or a .jsonl or .json file with a column question; - is "
        "standard input.",
        was=("--file",),
        metavar="FILE",
        file="read",
    )
    choice: ModelChoice = field(default_factory=ModelChoice)
    mode: Mode | None = setting(
        None,
        "latent: recur at <think>. think: the plain model writes its thinking first. no-think: it answers "
        "immediately.",
        unset="latent, or think with --model alone",
    )
    decoding: Decoding = field(default_factory=Decoding)
    seed: int = setting(0, "Seed for sampling; samples also depend on the batch size.", SEED)
    batch_size: int = setting(8, "Questions per batch.", BATCH)
    output: Path | None = output_file(
        "JSONL file: question, answer, complete text, tokens, steps and seconds of each. It is named "
        "FILE.partial until the end. An interruption keeps the answers before it."
    )
    overwrite: bool = overwrite()
    verbose: bool = setting(
        False, "Show the complete text, the steps, tokens and time.", None, "-v", "--verbose"
    )
    device: DeviceName = device()


@click.command(short_help="Ask a language model, with or without a recursion.")
@click.argument("question", required=False)
@settings_options(GenerateSettings, config_file=False)
def generate(question: str | None, given: dict[str, Any]) -> None:
    """Answer QUESTION, the questions in a file, or those that you type.

    Without a question, a terminal shows a prompt: each line is a separate question, and Ctrl-D ends the
    session. Without a terminal, the lines of standard input are questions. The answers are printed without
    the thinking before them.

    \b
    Examples:
      llm-trm generate "3+4*2" --model arithmetic
      llm-trm generate --checkpoint runs/lora
      llm-trm generate --checkpoint runs/lora --input questions.txt -o answers.jsonl
      llm-trm generate "Three pens cost 4.50 euros. What do eight cost?" -v
    """
    asked = GenerateSettings(**given)
    if question is not None and asked.input is not None:
        raise click.UsageError("give a QUESTION, or a file of questions with --input, not both")
    require_new_files({"--output": asked.output}, overwrite=asked.overwrite, inputs=[asked.input])
    if asked.output is not None and not is_special(asked.output):
        partial = require_no_partial(asked.output, overwrite=asked.overwrite)
        require_new_files({"--output": partial}, overwrite=True, inputs=[asked.input])
    require("train", "transformers")
    where = resolve_device(asked.device)
    checkpoint = chosen_checkpoint(asked.choice.checkpoint, asked.choice.model)
    conversing = question is None and asked.input is None and _is_terminal()
    questions = [] if conversing else _questions(question, asked.input)
    if question is not None and not questions[0].strip():
        raise InputError("the question is empty: ask something")
    import torch

    responder = _load_responder(asked, checkpoint, where)
    # One may be too long: encode all before the first is answered.
    prompts = [responder.encode(text) for text in questions]
    torch.manual_seed(asked.seed)
    file = answers_file(asked.output, overwrite=asked.overwrite) if asked.output else nullcontext()
    with file as written, memory_advice():
        if conversing:
            _converse(responder, asked, written)
        else:
            _answer(responder, questions, prompts, asked, written)


def _load_responder(asked: GenerateSettings, checkpoint: str | None, device: Any) -> Responder:
    from llm_trm.evaluate.language_model_modes import load_responders

    wanted: Sequence[Mode] = (
        [asked.mode] if asked.mode else ["latent"] if checkpoint else ["think", "no-think"]
    )
    choice = asked.choice
    responders, missing = load_responders(
        wanted, checkpoint, choice.model, device, trust_remote_code=choice.trust_remote_code
    )
    if not responders:
        raise InputError("; ".join(f"mode {name} cannot run: {reason}" for name, reason in missing.items()))
    responder = next(iter(responders.values()))
    for name, reason in missing.items():
        click.echo(f"mode {responder.mode}, not {name}: {reason}", err=True)
    return responder


def _answer(
    responder: Responder,
    questions: Sequence[str],
    prompts: Sequence[list[int]],
    asked: GenerateSettings,
    written: AnswersFile | None,
) -> None:
    done = 0
    try:
        for start in range(0, len(questions), asked.batch_size):
            batch = slice(start, start + asked.batch_size)
            replies, seconds = responder.reply(prompts[batch], asked.decoding)
            for question, reply in zip(questions[batch], replies, strict=True):
                if asked.verbose:
                    if len(questions) > 1:
                        click.echo(f"> {question}")
                    click.echo(reply.text)
                    click.echo(_statistics(responder, reply, seconds, len(replies)))
                else:
                    click.echo(reply.answer)
                _warn(reply, question if len(questions) > 1 else None, asked.decoding)
                _record(written, responder, question, reply, seconds / len(replies))
                done += 1
    except KeyboardInterrupt as error:
        kept = f"; the answers are in {asked.output}" if written and done else ""
        raise Interrupted.during(
            error, f"stopped after {done} of {len(questions)} questions{kept}"
        ) from error


def _converse(responder: Responder, asked: GenerateSettings, written: AnswersFile | None) -> None:
    from transformers import TextStreamer

    from llm_trm.text import is_text, split_lines

    # It adds line editing and a history to input(); Windows has no such module.
    with suppress(ImportError):
        import readline  # noqa: F401
    click.echo(
        f"{responder.name}, mode {responder.mode}. Each line is a separate question; Ctrl-D exits.",
        err=True,
    )
    while True:
        try:
            question = "\n".join(split_lines(input("> "))).strip()
        except (EOFError, KeyboardInterrupt) as end:
            click.echo()
            if isinstance(end, Interrupted):  # not Ctrl-C
                raise
            return
        except UnicodeDecodeError:
            question = "\udcff"
        if not question:
            continue
        if not is_text(question):
            click.echo("llm-trm: error: the line is not text in UTF-8: type it again", err=True)
            continue
        # Print the answer as it is written: users who type have time to read it.
        streamer = TextStreamer(responder.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            (reply,), seconds = responder.reply([responder.encode(question)], asked.decoding, streamer)
        except InputError as error:
            click.echo(f"llm-trm: error: {error}", err=True)
            continue
        except KeyboardInterrupt as end:
            click.echo()
            if isinstance(end, Interrupted):
                raise
            continue
        if asked.verbose:
            click.echo(_statistics(responder, reply, seconds, 1))
        _warn(reply, None, asked.decoding)
        _record(written, responder, question, reply, seconds)


def _statistics(responder: Responder, reply: Reply, seconds: float, batch: int) -> str:
    steps = ""
    if responder.mode == "latent":
        taken = ", ".join(map(str, reply.steps))
        steps = f"steps of the recursion: {taken}; " if taken else "no recursion: it wrote no <think>; "
    shared = f" for {batch} questions" if batch > 1 else ""
    return f"[{steps}{reply.tokens} tokens; {seconds:.3f} s{shared}]"


def _warn(reply: Reply, question: str | None, decoding: Decoding) -> None:
    if not reply.finished:
        which = "the answer" if question is None else f"the answer to {shown(question)}"
        click.echo(
            f"{which} did not end within {decoding.max_new_tokens} tokens (--max-new-tokens)", err=True
        )


def _record(
    written: AnswersFile | None, responder: Responder, question: str, reply: Reply, seconds: float
) -> None:
    if written is None:
        return
    record = {
        "question": question,
        "answer": reply.answer,
        "text": reply.text,
        "mode": responder.mode,
        "tokens": reply.tokens,
        "finished": reply.finished,
        "steps": list(reply.steps),
        "seconds": seconds,
    }
    written.add(json.dumps(record, ensure_ascii=False))


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _questions(question: str | None, file: Path | None) -> list[str]:
    from llm_trm.data.problems import is_file, read_questions
    from llm_trm.text import is_text, split_lines

    if question is not None:
        if not is_text(question):
            raise InputError(f"the question {shown(question)} is not text in UTF-8: ask it in UTF-8")
        return ["\n".join(split_lines(question))]
    if file is not None and is_file(file.name):
        found = [asked.text for asked in read_questions(file)]
    else:
        text, _ = read_input(file, "questions")
        found = [line.strip() for line in text.split("\n") if line.strip()]
    if not found:
        raise InputError(f"{file or 'standard input'} contains no question: write one per line")
    return found
