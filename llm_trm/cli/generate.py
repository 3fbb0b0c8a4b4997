"""``llm-trm generate``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from llm_trm.cli.options.device import device_option
from llm_trm.cli.options.language_model import chosen_checkpoint, memory_advice, model_options
from llm_trm.cli.options.output import output_file
from llm_trm.cli.options.types import BATCH, LENGTH, NO_OR_COUNT, NO_OR_SPREAD, SEED, SHARE_ABOVE_ZERO
from llm_trm.device import resolve_device

if TYPE_CHECKING:
    from llm_trm.evaluate.language_model_modes import Decoding, Mode, Reply, Responder


@click.command(short_help="Ask a language model, with or without a recursion.")
@click.argument("question", required=False)
@click.option(
    "--file",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    help="Questions: a text file with one on each line, or a .jsonl or .json file with a column question; - "
    "is standard input.",
)
@model_options
@click.option(
    "--mode",
    type=click.Choice(["latent", "think", "no-think"]),
    help="latent: recur at <think>. think: the plain model writes its thinking first. no-think: it answers "
    "at once. [default: latent, or think with --model alone]",
)
@click.option(
    "--temperature",
    type=NO_OR_SPREAD,
    default=0.0,
    show_default=True,
    help="0 takes the likeliest token; above, tokens are drawn.",
)
@click.option(
    "--top-p",
    type=SHARE_ABOVE_ZERO,
    default=1.0,
    show_default=True,
    help="Draw from the likeliest tokens that together have this probability.",
)
@click.option(
    "--top-k",
    type=NO_OR_COUNT,
    default=0,
    show_default=True,
    help="Draw from so many of the likeliest tokens; 0 draws from all.",
)
@click.option(
    "--seed",
    type=SEED,
    default=0,
    show_default=True,
    help="Of what is drawn; batches of another size draw anew.",
)
@click.option(
    "--max-new-tokens",
    type=LENGTH,
    default=2048,
    show_default=True,
    help="Most tokens of an answer, thinking included.",
)
@click.option("--batch-size", type=BATCH, default=8, show_default=True, help="Questions at a time.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=output_file,
    metavar="FILE",
    help="JSONL file: question, answer, all that was written, tokens, steps and seconds of each.",
)
@click.option(
    "-v", "--verbose", is_flag=True, help="Show all that was written, the steps taken, tokens and time."
)
@device_option
def generate(
    question: str | None,
    file: Path | None,
    checkpoint: str | None,
    model: str | None,
    mode: Mode | None,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    max_new_tokens: int,
    batch_size: int,
    output: Path | None,
    verbose: bool,
    trust_remote_code: bool,
    device: str,
) -> None:
    """Answer QUESTION, the questions of a file, or those that you type.

    Without a question, a terminal gives a prompt: each line is a question of its own, and Ctrl-D ends it.
    Elsewhere the lines of standard input are questions. What is printed is the answer, without the thinking
    before it.

    \b
    Examples:
      llm-trm generate "3+4*2" --model arithmetic
      llm-trm generate --checkpoint runs/lora
      llm-trm generate --checkpoint runs/lora --file questions.txt -o answers.jsonl
      llm-trm generate "Three pens cost 4.50 euros. What do eight cost?" -v
    """
    from llm_trm.extras import require

    if question is not None and file is not None:
        raise click.UsageError("give a QUESTION or a --file of questions, not both")
    require("train", "transformers")
    from llm_trm.errors import InputError
    from llm_trm.evaluate.language_model_modes import Decoding

    where = resolve_device(device)
    decoding = Decoding(max_new_tokens, temperature, top_p, top_k)
    checkpoint = chosen_checkpoint(checkpoint, model)
    asks = question is None and file is None and _is_terminal()
    questions = [] if asks else _questions(question, file)
    if question is not None and not questions[0].strip():
        raise InputError("the question is empty: ask something")
    import torch

    responder = _speaker(mode, checkpoint, model, where, trust_remote_code)
    # All before the first is answered, and before a file is written anew: one may be too long.
    prompts = [responder.encode(asked) for asked in questions]
    torch.manual_seed(seed)
    with _writer(output) as written, memory_advice():
        if asks:
            _converse(responder, decoding, written, verbose=verbose)
        else:
            _answer(responder, questions, prompts, decoding, batch_size, written, verbose=verbose)


def _speaker(
    mode: Mode | None, checkpoint: str | None, model: str | None, device: Any, trust_remote_code: bool
) -> Responder:
    from llm_trm.errors import InputError
    from llm_trm.evaluate.language_model_modes import load_responders

    wanted: Sequence[Mode] = [mode] if mode else ["latent"] if checkpoint else ["think", "no-think"]
    responders, missing = load_responders(
        wanted, checkpoint, model, device, trust_remote_code=trust_remote_code
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
    decoding: Decoding,
    batch_size: int,
    written: IO[str] | None,
    *,
    verbose: bool,
) -> None:
    for start in range(0, len(questions), batch_size):
        batch = slice(start, start + batch_size)
        replies, seconds = responder.reply(prompts[batch], decoding)
        for asked, reply in zip(questions[batch], replies, strict=True):
            if verbose:
                if len(questions) > 1:
                    click.echo(f"> {asked}")
                click.echo(reply.text)
                click.echo(_figures(responder, reply, seconds, len(replies)))
            else:
                click.echo(reply.answer)
            _warn(reply, asked if len(questions) > 1 else None, decoding)
            _record(written, responder, asked, reply, seconds / len(replies))


def _converse(responder: Responder, decoding: Decoding, written: IO[str] | None, *, verbose: bool) -> None:
    from transformers import TextStreamer

    from llm_trm.errors import InputError
    from llm_trm.text import is_text, split_lines

    # With it input() edits lines and remembers them; Windows has none.
    with suppress(ImportError):
        import readline  # noqa: F401
    click.echo(
        f"{responder.name}, mode {responder.mode}. Each line is a question of its own; Ctrl-D ends.", err=True
    )
    while True:
        try:
            asked = "\n".join(split_lines(input("> "))).strip()
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return
        except UnicodeDecodeError:
            asked = "\udcff"
        if not asked:
            continue
        if not is_text(asked):
            click.echo("llm-trm: error: the line is not text in UTF-8: type it again", err=True)
            continue
        # Whoever types has time to read how the answer comes about.
        streamer = TextStreamer(responder.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            (reply,), seconds = responder.reply([responder.encode(asked)], decoding, streamer)
        except InputError as error:
            click.echo(f"llm-trm: error: {error}", err=True)
            continue
        except KeyboardInterrupt:
            click.echo()
            continue
        if verbose:
            click.echo(_figures(responder, reply, seconds, 1))
        _warn(reply, None, decoding)
        _record(written, responder, asked, reply, seconds)


def _figures(responder: Responder, reply: Reply, seconds: float, batch: int) -> str:
    steps = ""
    if responder.mode == "latent":
        taken = ", ".join(map(str, reply.steps))
        steps = f"steps of the recursion: {taken}; " if taken else "no recursion: it wrote no <think>; "
    shared = f" for {batch} questions" if batch > 1 else ""
    return f"[{steps}{reply.tokens} tokens; {seconds:.3f} s{shared}]"


def _warn(reply: Reply, asked: str | None, decoding: Decoding) -> None:
    from llm_trm.errors import shortened

    if not reply.finished:
        which = "the answer" if asked is None else f"the answer to {shortened(asked)}"
        click.echo(
            f"{which} did not end within {decoding.max_new_tokens} tokens (--max-new-tokens)", err=True
        )


def _record(written: IO[str] | None, responder: Responder, asked: str, reply: Reply, seconds: float) -> None:
    if written is None:
        return
    record = {
        "question": asked,
        "answer": reply.answer,
        "text": reply.text,
        "mode": responder.mode,
        "tokens": reply.tokens,
        "finished": reply.finished,
        "steps": list(reply.steps),
        "seconds": seconds,
    }
    written.write(json.dumps(record, ensure_ascii=False) + "\n")
    written.flush()


@contextmanager
def _writer(path: Path | None) -> Iterator[IO[str] | None]:
    """Line by line, so that what was answered before an interruption stays."""
    if path is None:
        yield None
        return
    with path.open("w", encoding="utf-8") as file:
        yield file


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _questions(question: str | None, file: Path | None) -> list[str]:
    from llm_trm.data.problems import read_questions
    from llm_trm.errors import InputError, one_line
    from llm_trm.text import is_text, read_stdin, read_text, split_lines

    if question is not None:
        if not is_text(question):
            raise InputError(f"the question {question!a} is not text in UTF-8: ask it in UTF-8")
        return ["\n".join(split_lines(question))]
    if file is not None and file.suffix in (".jsonl", ".json"):
        found = [asked.text for asked in read_questions(file)]
    else:
        name = "standard input" if file is None or str(file) == "-" else str(file)
        try:
            text = read_stdin() if file is None or str(file) == "-" else read_text(file)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else one_line(error)
            raise InputError(f"{name} cannot be read ({reason}): name a text file in UTF-8") from error
        found = [line.strip() for line in text.split("\n") if line.strip()]
    if not found:
        raise InputError(f"{file or 'standard input'} holds no question: write one on each line")
    return found
