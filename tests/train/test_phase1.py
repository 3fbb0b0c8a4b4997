"""``llm-trm train phase1``: states of texts, training beside the PCA bound, files, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from llm_trm.claims import claimed
from llm_trm.cli import main
from llm_trm.data.arithmetic import World
from llm_trm.errors import InputError
from llm_trm.models.compression import compressor_facts, load_compressor, save_compressor
from llm_trm.models.loading import ThinkingModel, load_thinking_model
from llm_trm.models.tiny import PRESETS, tiny_language_model, tiny_tokenizer
from llm_trm.train.phase1 import states as states_module
from llm_trm.train.phase1.config import Phase1Config
from llm_trm.train.phase1.report import StageResult
from llm_trm.train.phase1.states import StateFiles, collect_states, fingerprint, write_index
from llm_trm.train.phase1.texts import read_texts, solved_text, tokenised
from llm_trm.train.phase1.trainer import DECODER_FILE, CompressorPretrainer
from llm_trm.weights import write_tensors
from tests.data.flips import flip

WIDTH = 16
_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    tokenizer = tiny_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "nano", {**PRESETS["tiny"], **_SIZES})
        tiny_language_model(tokenizer, "nano").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(model_folder: Path) -> ThinkingModel:
    return load_thinking_model(str(model_folder))


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "problems.jsonl"
    file.write_text("".join(json.dumps(problem.record()) + "\n" for problem in World().problems(200)))
    return file


@pytest.fixture
def config(model_folder: Path, problems: Path, tmp_path: Path) -> Phase1Config:
    return Phase1Config(
        output=tmp_path / "run",
        model=str(model_folder),
        text=str(problems),
        traces=str(problems),
        num_tokens=3000,
        batch_size=256,
        epochs=40,
        patience=10,
        device="cpu",
    )


def train(config: Phase1Config) -> list[StageResult]:
    return CompressorPretrainer(config).train()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["train", "phase1", *map(str, arguments)], prog_name="llm-trm")


def sequences_of(model: ThinkingModel, *texts: str) -> list[Tensor]:
    return [torch.tensor(model.tokenizer(text)["input_ids"], dtype=torch.int32) for text in texts]


class Calls:
    """Counts the calls of the language model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        real = states_module.final_states

        def counted(*arguments: Any) -> list[Tensor]:
            self.count += 1
            return real(*arguments)

        monkeypatch.setattr(states_module, "final_states", counted)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    yield Calls(monkeypatch)


def test_states_are_the_last_hidden_states_of_each_text_alone(model: ThinkingModel, tmp_path: Path) -> None:
    sequences = sequences_of(model, "1+2", "a much longer text than the others", "9*9*9")
    before = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    seen: list[tuple[int, int]] = []
    collect_states(
        model, sequences, tmp_path, batch_size=2, progress=lambda done, total: seen.append((done, total))
    )
    write_index(model, sequences, tmp_path)
    files = StateFiles.open(tmp_path)
    total = sum(map(len, sequences))
    assert (files.rows, files.sequences, files.width) == (total, 3, WIDTH)
    assert seen[-1] == (total, total)
    for tokens, found in zip(sequences, files.shard(0), strict=True):
        with torch.no_grad():
            out = model.model(tokens.long()[None], output_hidden_states=True)
        torch.testing.assert_close(found, out.hidden_states[-1][0], rtol=1e-5, atol=1e-5)
    for name, weight in model.model.state_dict().items():
        assert torch.equal(weight, before[name])
        assert weight.grad is None


def test_shards_are_shared_resumed_and_shuffled_whole(
    model: ThinkingModel, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states_module, "_SHARD_ROWS", 16)
    monkeypatch.setattr(states_module, "_POOL", 2)
    sequences = sequences_of(model, *(f"{i}+{i}*{i}" for i in range(40)))
    for process in (0, 1):
        collect_states(model, sequences, tmp_path / "two", process=process, processes=2)
    write_index(model, sequences, tmp_path / "two")
    (tmp_path / "two" / "states-00001.safetensors").unlink()
    calls.count = 0
    collect_states(model, sequences, tmp_path / "two")
    assert calls.count == 1
    collect_states(model, sequences, tmp_path / "one")
    write_index(model, sequences, tmp_path / "one")
    one, two = StateFiles.open(tmp_path / "one"), StateFiles.open(tmp_path / "two")
    assert len(one.shards) > 4
    everything = torch.cat(list(one.batches(7)))
    assert torch.equal(everything, torch.cat(list(two.batches(1000))))

    def in_order(rows: Tensor) -> list[list[float]]:
        return sorted(rows.tolist())

    def drawn(seed: int) -> Tensor:
        return torch.cat(list(one.shuffled_rows(10, torch.Generator().manual_seed(seed))))

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    whole = torch.cat(list(one.shuffled_rows(one.rows, torch.Generator())))
    assert in_order(whole) == in_order(everything)
    assert len(drawn(0)) == one.rows // 10 * 10
    batches = list(one.shuffled_sequences(8, torch.Generator()))
    assert [len(batch) for batch in batches] == [8] * 5
    assert in_order(torch.cat([rows for batch in batches for rows in batch])) == in_order(everything)


def test_fingerprint_is_of_weights_and_tokens(model: ThinkingModel, model_folder: Path) -> None:
    sequences = sequences_of(model, "1+2", "3*4")
    found = fingerprint(model, sequences)
    other = load_thinking_model(str(model_folder))
    assert fingerprint(other, sequences) == found
    assert fingerprint(model, sequences_of(model, "1+2", "3*5")) != found
    assert fingerprint(model, sequences_of(model, "1+23", "*4")) != found
    with torch.no_grad():
        other.model.get_input_embeddings().weight.mul_(1.01)
    assert fingerprint(other, sequences) != found


def test_text_is_cut_in_pieces_and_split_by_text(model: ThinkingModel) -> None:
    texts = ["abcdefgh", "0123456789", "abcdefgh", "xyz"] * 2
    training, validation = tokenised(
        texts, model, max_length=4, num_tokens=1000, held_out=0.2, source="texts"
    )
    decoded = [[model.tokenizer.decode(piece.tolist()) for piece in side] for side in (training, validation)]
    assert max(map(len, training + validation)) == 4
    assert "".join(decoded[0] + decoded[1]).count("abcd") == 4
    assert not set(decoded[0]) & set(decoded[1])
    assert decoded[1]
    cut = tokenised(texts, model, max_length=4, num_tokens=11, held_out=0.2, source="texts")
    assert sum(map(len, cut[0] + cut[1])) == 11
    with pytest.raises(InputError, match="texts contains one text"):
        tokenised(["same", "same"], model, max_length=4, num_tokens=99, held_out=0.2, source="texts")


def test_records_become_texts(model: ThinkingModel, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    solved = {"question": "1+1", "thinking": "1+1=2", "answer": "2"}
    pair = {"problem": "1+1", "thinking": "1+1=2", "answer": None, "response": "two"}
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "<think>hm</think>bye"}]
    said = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "<think>hm</think>bye"}]
    records = [solved, pair, {"messages": chat}, {"conversations": said}, {"text": "plain"}]
    file.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    thoughts = list(read_texts(str(file), model, thinking=True))
    assert thoughts[0] == "<|user|>1+1<|assistant|><think>1+1=2</think>2<|end|>"
    assert thoughts[1].endswith("<think>1+1=2</think>two<|end|>")
    assert thoughts[2] == thoughts[3] == "<|user|>hello<|assistant|><think>hm</think>bye<|end|>"
    assert thoughts[4] == "plain"
    plain = list(read_texts(str(tmp_path), model, thinking=False))
    assert plain[0] == solved_text(model, "1+1", None, "2")
    assert "1+1=2" not in plain[0]
    prose = tmp_path / "prose.txt"
    prose.write_text("first\nblock\n\n\nsecond\n")
    assert list(read_texts(str(prose), model, thinking=False)) == ["first\nblock", "second"]


@pytest.mark.parametrize(
    ("template", "content", "fault"),
    [
        (None, [{"type": "text", "text": "hello"}], "can only concatenate str"),
        # The second is what the lowest versions say.
        (None, None, "(no attribute 'content'|can only concatenate str)"),
        (
            "{{ raise_exception('no chats') if messages|length > 1 else messages[0].content }}",
            "hi",
            "no chats",
        ),
        ("{{ messages[0].content }}{{ messages[1].parts[0] }}", "hi", "no attribute 'parts'"),
    ],
)
def test_a_chat_that_the_template_rejects(
    template: str | None, content: Any, fault: str, model_folder: Path, tmp_path: Path
) -> None:
    model = load_thinking_model(str(model_folder))
    if template is not None:
        model.tokenizer.chat_template = template
    file = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "bye"}]
    file.write_text(json.dumps({"messages": turns}))
    with pytest.raises(InputError, match=f"{file} line 1: .*{fault}.*: change or") as refused:
        list(read_texts(str(file), model, thinking=False))
    assert "\n" not in str(refused.value) and str(model_folder) in str(refused.value)


def test_learned_reaches_pca_and_never_beats_it_where_it_learned(config: Phase1Config) -> None:
    for result in train(replace(config, d_compressed=4)):
        assert result.training_bound * (1 - 1e-5) <= result.training_mse <= 1.01 * result.training_bound
        assert result.ratio == WIDTH / 4
        assert result.learned.cosine_similarity == pytest.approx(result.reference.cosine_similarity, abs=0.01)
        assert result.epochs > 0
        facts = compressor_facts(result.folder)
        assert facts["kind"] == "dimension"
        assert facts["model"] == config.model
        assert facts["metrics"]["mse"] == result.learned.mse
        assert StageResult.from_record(facts, result.folder) == result


def test_pca_start_is_at_the_bound(config: Phase1Config) -> None:
    (result,) = train(replace(config, stage="1a", init="pca", epochs=1, learning_rate=1e-9))
    assert result.size == WIDTH // 4
    assert result.training_mse == pytest.approx(result.training_bound, rel=1e-4)


def test_stage_1b_starts_from_1a(config: Phase1Config) -> None:
    short = replace(config, epochs=3)
    first, second = train(short)
    weights = [load_compressor(result.folder).state_dict()["compress.weight"] for result in (first, second)]
    assert (weights[0] - weights[1]).abs().max() > 1e-3
    assert compressor_facts(second.folder)["started_from"] == compressor_facts(first.folder)["weights_sha256"]
    still = replace(short, stage="1b", learning_rate=1e-12)
    for output, start in ((first.folder.parent, None), (config.output.parent / "other", first.folder)):
        (result,) = train(replace(still, output=output, start=start, overwrite=True))
        unmoved = load_compressor(result.folder).state_dict()["compress.weight"]
        torch.testing.assert_close(unmoved, weights[0], rtol=0, atol=1e-6)


def test_second_run_reads_states_and_keeps_what_it_made(config: Phase1Config, calls: Calls) -> None:
    config = replace(config, epochs=2)
    first = train(config)
    assert calls.count > 0
    calls.count = 0
    before = {path: path.read_bytes() for path in config.output.glob("1?/*")}
    assert train(config) == first
    assert calls.count == 0
    with pytest.raises(InputError, match=r"other settings \(seed was 0 and is 1\): add --overwrite"):
        train(replace(config, seed=1))
    assert {path: path.read_bytes() for path in config.output.glob("1?/*")} == before
    changed = train(replace(config, seed=1, overwrite=True))
    assert changed != first
    assert calls.count == 0


def test_resume_needs_a_run(config: Phase1Config) -> None:
    with pytest.raises(InputError, match="holds no run to resume"):
        train(replace(config, resume=True))
    assert not config.output.exists()
    train(replace(config, stage="1a", epochs=1))
    train(replace(config, stage="1a", epochs=1, resume=True))


def test_result_depends_on_the_seed_alone(config: Phase1Config) -> None:
    short = replace(config, stage="1a", epochs=2)
    torch.manual_seed(1)
    (one,) = train(short)
    torch.manual_seed(2)
    (two,) = train(replace(short, output=short.output.parent / "two"))
    assert replace(two, folder=one.folder) == one


def test_states_can_be_dropped(config: Phase1Config) -> None:
    train(replace(config, stage="1a", epochs=1, keep_states=False))
    assert not list((config.output / "states").iterdir())


def test_latent_stages_learn_and_hand_over_their_decoder(config: Phase1Config) -> None:
    latent = replace(config, compressor="latent", num_latents=4, batch_size=16, epochs=8, num_tokens=2000)
    first, second = train(latent)
    for result in (first, second):
        assert result.learned.mse < result.reference.mse
        assert result.epochs > 0
        assert load_compressor(result.folder).sizes["num_latents"] == 4
    assert (first.folder / DECODER_FILE).exists()
    still = replace(latent, stage="1b", epochs=1, learning_rate=1e-12, overwrite=True)
    (unmoved,) = train(still)
    (again,) = train(replace(still, output=config.output.parent / "other", start=first.folder))
    assert again.learned == unmoved.learned
    (first.folder / DECODER_FILE).unlink()
    (fresh,) = train(replace(still, seed=1))
    assert fresh.learned.mse > unmoved.learned.mse


def test_sweep_writes_table_and_plot(model_folder: Path, problems: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ("--model", model_folder, "--text", problems, "--num-tokens", 2000, "--epochs", 10)
    result = run(
        *options, "--stage", "1a", "--batch-size", 256, "--sweep", "8,2,4", "-o", tmp_path, "--track", "jsonl"
    )
    assert result.exit_code == 0, result.output
    for word in ("cosine", "PCA", "relative", "MSE", str(tmp_path / "sweep.png")):
        assert word in result.stdout
    rows = json.loads((tmp_path / "sweep.json").read_text())["results"]
    assert [row["size"] for row in rows] == [8, 2, 4]
    assert [row["compression_ratio"] for row in rows] == [2.0, 8.0, 4.0]
    cosine = {row["size"]: row["metrics"]["cosine_similarity"] for row in rows}
    assert cosine[2] < cosine[4] < cosine[8]
    for row in rows:
        assert f"{row['metrics']['cosine_similarity']:.4f}" in result.stdout
        assert load_compressor(Path(row["folder"])).sizes["d_compressed"] == row["size"]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"stage 1a, width 8/loss", "stage 1a, width 2/held-out mse"} <= {
        name for line in logged for name in line
    }


def _nothing(file: Path) -> None:
    file.write_text("")


def _columns(file: Path) -> None:
    file.write_text('{"title": "a"}\n')


def _no_thinking(file: Path) -> None:
    file.write_text('{"question": "1+1", "answer": "2"}\n')


def _broken(file: Path) -> None:
    file.write_text('{"question": "1+1"')


def _bytes(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_nothing, ("no text",)),
        (_columns, ("line 1", "'title'", "'question'")),
        (_no_thinking, ("line 1", "thinking")),
        (_broken, ("line 1", "not JSON")),
        (_bytes, ("UTF-8",)),
        (lambda file: None, ("does not exist",)),
    ],
)
def test_bad_texts_get_one_line(
    spoil: Callable[[Path], None], words: tuple[str, ...], model_folder: Path, problems: Path, tmp_path: Path
) -> None:
    file = tmp_path / "traces.jsonl"
    spoil(file)
    result = run("--model", model_folder, "--text", problems, "--traces", file, "-o", tmp_path / "run")
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("llm-trm: error")]
    for word in (str(file), *words):
        assert word in line
    assert not list((tmp_path / "run").rglob("compressor.*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--d-compressed", WIDTH), (f"1 to {WIDTH - 1}", f"not {WIDTH}")),
        (("--d-compressed", 0), ("--d-compressed", "at least 1")),
        (("--sweep", f"4,{WIDTH + 1}"), (f"not {WIDTH + 1}",)),
        (("--sweep", "4,x"), ("--sweep", "32,64,96")),
        (("--sweep", "4", "--d-compressed", 4), ("--d-compressed",)),
        (("--compressor", "latent", "--d-compressed", 4), ("--num-latents",)),
        (("--num-latents", 4), ("--compressor latent",)),
        (("--max-length", 129), ("--max-length", "128")),
        (("--stage", "1b"), ("stage 1b", "--from")),
        (("--from", "."), ("--stage 1b",)),
        (("--stage", "1b", "--from", "/no/such"), ("/no/such", "does not exist")),
        (("--output", "/proc/none"), ("/proc/none", "another folder")),
        (("--text", "/no/such.txt"), ("/no/such.txt", "does not exist")),
        (("--track", "nowhere"), ("--track", "jsonl")),
    ],
)
def test_bad_options_get_one_line(
    options: tuple[object, ...], words: tuple[str, ...], model_folder: Path, problems: Path, tmp_path: Path
) -> None:
    texts = ("--text", problems, "--traces", problems, "-o", tmp_path / "run", "--num-tokens", 500)
    result = run("--model", model_folder, *texts, *options)
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("llm-trm: error")]
    for word in words:
        assert word in line
    assert not list(tmp_path.rglob("compressor.*"))


def test_compressor_of_another_width_or_size_is_refused(config: Phase1Config, tmp_path: Path) -> None:
    from llm_trm.models.compression import DimensionCompressor

    save_compressor(DimensionCompressor(WIDTH + 1, 4), tmp_path / "wide")
    save_compressor(DimensionCompressor(WIDTH, 5), tmp_path / "five")
    with pytest.raises(InputError, match=f"width {WIDTH + 1}, but those of model"):
        train(replace(config, stage="1b", start=tmp_path / "wide"))
    with pytest.raises(InputError, match="size 5, not a dimension compressor of size 4"):
        train(replace(config, stage="1b", start=tmp_path / "five"))


def test_nan_in_states_is_refused_where_it_arises_and_where_it_is_read(
    config: Phase1Config, model_folder: Path, tmp_path: Path
) -> None:
    broken = load_thinking_model(str(model_folder))
    with torch.no_grad():
        broken.model.get_input_embeddings().weight[broken.tokenizer("7")["input_ids"][0]] = float("nan")
    with pytest.raises(InputError, match="NaN or infinite states for the text that starts with '7"):
        collect_states(broken, sequences_of(broken, "1+1", "7*7"), tmp_path / "states")
    assert not list((tmp_path / "states").iterdir())

    train(replace(config, stage="1a", epochs=1))
    for path in (config.output / "states").glob("*/*.safetensors"):
        files = StateFiles.open(path.parent)
        rows = files.shard(0)
        rows[0][0, 0] = float("nan")
        lengths = torch.tensor([len(sequence) for sequence in rows])
        write_tensors(path, {"states": torch.cat(rows), "lengths": lengths})
        with pytest.raises(InputError, match=f"{path} contains NaN .*: delete"):
            StateFiles.open(path.parent).shard(0)
    with pytest.raises(InputError, match="contains NaN"):
        train(replace(config, stage="1a", epochs=1))


@pytest.mark.parametrize("damage", ["cut", "gone", "other", "lengths", "index"])
def test_damaged_states_are_refused(damage: str, model: ThinkingModel, tmp_path: Path) -> None:
    sequences = sequences_of(model, "1+1", "2*2")
    collect_states(model, sequences, tmp_path)
    write_index(model, sequences, tmp_path)
    path = tmp_path / "states-00000.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "gone":
        path.unlink()
    elif damage == "other":
        write_tensors(path, {"states": torch.zeros(6, WIDTH + 1), "lengths": torch.tensor([3, 3])})
    elif damage == "lengths":
        write_tensors(path, {"states": torch.zeros(6, WIDTH), "lengths": torch.tensor([3, 4])})
    else:
        path = tmp_path / "states.json"
        path.write_text("{}")
    with pytest.raises(InputError, match=f"{path}.*delete {tmp_path}"):
        StateFiles.open(tmp_path).shard(0)


def test_runs_that_share_states_write_them_one_at_a_time(config: Phase1Config, tmp_path: Path) -> None:
    shared = replace(config, stage="1a", epochs=1, states=tmp_path / "states")
    train(shared)
    folders = sorted(path for path in (tmp_path / "states").iterdir())
    assert len(folders) == 2
    second = replace(shared, output=tmp_path / "second")
    with claimed(folders[0]), claimed(folders[1]):
        train(second)  # which only reads them
    for folder in folders:
        (folder / "states-00000.safetensors").unlink()
    with (
        claimed(folders[0]),
        claimed(folders[1]),
        pytest.raises(InputError, match="is in use by process"),
    ):
        train(replace(shared, output=tmp_path / "third"))
    train(replace(shared, output=tmp_path / "third"))
    assert all(StateFiles.open(folder).shard(0) for folder in folders)


def test_a_changed_bit_in_the_states_is_found(config: Phase1Config, tmp_path: Path) -> None:
    shared = replace(config, stage="1a", epochs=1, states=tmp_path / "states")
    train(shared)
    path = next((tmp_path / "states").glob("*/states-00000.safetensors"))
    flip(path, -1)
    with pytest.raises(InputError, match=rf"{path} has changed.*delete {path.parent} and run the same"):
        train(replace(shared, output=tmp_path / "second"))
