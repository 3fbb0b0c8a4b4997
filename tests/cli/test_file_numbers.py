"""Numbers from files and from the environment, and memory that there is not: one line, exit code 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from llm_trm import memory
from llm_trm.cli import main
from llm_trm.data.pairs import open_pairs
from llm_trm.data.processes import launched_processes
from llm_trm.data.puzzles.dataset import read_info
from llm_trm.errors import InputError
from llm_trm.models.causal import TRMConfig
from llm_trm.models.causal.loading import load_latent_model
from llm_trm.models.compression import DimensionCompressor, load_compressor, save_compressor
from llm_trm.models.loading import load_thinking_model
from llm_trm.models.phase2 import load_phase2
from llm_trm.models.puzzle.paper import PuzzleTRM, PuzzleTRMConfig, load_puzzle_model, save_puzzle_model
from llm_trm.models.sequence_trm import SequenceTRM, SequenceTRMConfig, load_sequence_trm, save_sequence_trm
from llm_trm.train.phase1.states import StateFiles
from llm_trm.train.phase2.progress import Progress
from llm_trm.train.puzzle.progress import PuzzleProgress
from llm_trm.train.puzzle.trainer import PuzzleTrainer
from llm_trm.train.run.trainer_checkpoints import trainer_state
from llm_trm.train.run.training_state import read_progress
from tests.causal.lora_world import write_language_model
from tests.causal.saved import latent_model, save
from tests.puzzle.toy import toy_config, write_toy
from tests.train.toy import write_pairs

NAN, INF = float("nan"), float("inf")


def changed(path: Path, **values: Any) -> None:
    """Put other values into a JSON file; those with a dot lie deeper."""
    content = json.loads(path.read_text())
    for name, value in values.items():
        content[name] = value
    path.write_text(json.dumps(content))


def refused(call: Callable[[], object], path: Path | str, *words: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text
    for word in (str(path), *words):
        assert word in text, text


SIZES = PuzzleTRMConfig(7, 9, d_model=16, n_layers=1, n_heads=2, puzzle_len=1, puzzle_dim=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("d_model", value) for value in (10**9, NAN, True, 16.0, "16", None)],
        *[("n_layers", value) for value in (10**8, 0, INF)],
        *[(name, True) for name in ("n_heads", "num_puzzles", "max_steps", "n_latent_steps")],
        ("vocab_size", 10**12),
        ("seq_len", -9),
        ("rope_theta", NAN),
        ("rope_theta", INF),
        ("puzzle_dim", 10**20),
        ("positions", "nonsense"),
        ("dtype", "int8"),
    ],
)
def test_a_puzzle_model(field: str, value: Any, tmp_path: Path) -> None:
    save_puzzle_model(PuzzleTRM(SIZES), tmp_path)
    changed(tmp_path / "puzzle_trm.json", **{field: value})
    refused(lambda: load_puzzle_model(tmp_path), tmp_path, field)


def test_facts_of_a_puzzle_model(tmp_path: Path) -> None:
    save_puzzle_model(PuzzleTRM(SIZES), tmp_path, rows=NAN, columns=3)
    refused(lambda: load_puzzle_model(tmp_path), tmp_path, "rows")


@pytest.mark.parametrize("sizes", [{"d_model": 2**20}, {"n_layers": 1024}, {"vocab_size": 2**26}])
def test_a_puzzle_model_that_its_weights_do_not_fill_is_not_built(
    sizes: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_puzzle_model(PuzzleTRM(SIZES), tmp_path)
    changed(tmp_path / "puzzle_trm.json", **sizes)
    monkeypatch.setattr(PuzzleTRM, "__init__", lambda *_, **__: pytest.fail("built"))
    refused(lambda: load_puzzle_model(tmp_path), tmp_path / "puzzle_trm.json", "parameters")


@pytest.mark.parametrize(
    "config",
    [
        SIZES,
        PuzzleTRMConfig(7, 9, 5, 16, 1, 2, "attention", "learned", puzzle_len=2, puzzle_dim=20),
        PuzzleTRMConfig(7, 9, d_model=16, mixer="tokens", positions="none", puzzle_len=0, puzzle_dim=0),
    ],
)
def test_the_numbers_of_a_puzzle_model_are_known_without_building_it(config: PuzzleTRMConfig) -> None:
    model = PuzzleTRM(config)
    assert config.elements == sum(tensor.numel() for tensor in model.state_dict().values())
    assert config.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("d_compressed", 10**9),
        ("d_compressed", 2**20),
        ("d_compressed", True),
        ("n_layers", 10**8),
        ("n_heads", 2.5),
        ("dropout", NAN),
        ("n_deep_recursions", INF),
    ],
)
def test_a_recursion(field: str, value: Any, tmp_path: Path) -> None:
    model = SequenceTRM(16, 1, 2)
    assert model.config.parameters == sum(tensor.numel() for tensor in model.state_dict().values())
    save_sequence_trm(model, tmp_path)
    changed(tmp_path / "trm.json", **{field: value})
    word = "parameters" if value == 2**20 else field
    refused(lambda: load_sequence_trm(tmp_path), tmp_path, word)


@pytest.mark.parametrize("value", [NAN, True, None, 10**20])
def test_facts_of_a_recursion(value: Any, tmp_path: Path) -> None:
    save_sequence_trm(SequenceTRM(16, 1, 2), tmp_path, max_steps=value)
    refused(lambda: load_phase2(tmp_path), tmp_path, "max_steps")


@pytest.mark.parametrize(
    "sizes",
    [
        {"d_model": 10**9, "d_compressed": 8},
        {"d_model": NAN, "d_compressed": 8},
        {"d_model": 16, "d_compressed": True},
    ],
)
def test_a_compressor(sizes: dict[str, Any], tmp_path: Path) -> None:
    save_compressor(DimensionCompressor(16, 8), tmp_path)
    changed(tmp_path / "compressor.json", sizes=sizes)
    refused(lambda: load_compressor(tmp_path), tmp_path / "compressor.json")


def test_a_compressor_of_latents_with_too_many_layers(tmp_path: Path) -> None:
    save_compressor(DimensionCompressor(16, 8), tmp_path)
    changed(tmp_path / "compressor.json", kind="latent", sizes={"d_model": 16, "n_layers": 10**8})
    refused(lambda: load_compressor(tmp_path), tmp_path / "compressor.json", "n_layers")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 10**9),
        ("num_hidden_layers", 10**8),
        ("hidden_size", True),
        ("num_hidden_layers", 2.5),
        ("vocab_size", -3),
        ("rms_norm_eps", NAN),
        ("rms_norm_eps", True),
        ("attention_dropout", NAN),
        ("attention_dropout", INF),
        ("initializer_range", NAN),
        ("max_position_embeddings", 10**20),
    ],
)
def test_a_language_model(field: str, value: Any, tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "lm")
    # Otherwise transformers refuses more layers than it has types for.
    changed(folder / "config.json", layer_types=None, no_rope_layers=None, **{field: value})
    refused(lambda: load_thinking_model(str(folder)), folder, field)


def test_a_language_model_that_fits_no_memory(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "lm")
    changed(folder / "config.json", hidden_size=2**20, intermediate_size=2**20)
    refused(lambda: load_thinking_model(str(folder)), folder, "GiB", "choose a smaller model")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_layers", 10**8),
        ("num_latents", True),
        ("dropout", NAN),
        ("soft_tokens", 1.5),
        ("think_token_id", 10**6),
        ("end_think_token_id", 1.5),
    ],
)
def test_a_language_model_with_a_recursion(field: str, value: Any, tmp_path: Path) -> None:
    model = latent_model()
    folder = save(model, tmp_path / "whole", merge=True)
    changed(folder / "config.json", **{field: value})
    refused(lambda: load_latent_model(folder), folder, field)


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("latent.json", "n_layers", 10**8),
        ("latent.json", "dropout", NAN),
        ("latent.json", "n_heads", True),
        *[("latent.json", "think_token_id", value) for value in (-5, "abc", NAN, True, 10**12, 10**20)],
        ("latent.json", "end_think_token_id", 1000),
        *[("adapter_config.json", "rank_pattern", {"q_proj": value}) for value in (NAN, -1, 10**9, 2.5)],
        *[("adapter_config.json", "alpha_pattern", {"q_proj": value}) for value in (NAN, -1, 10**9)],
        ("adapter_config.json", "alpha_pattern", [1]),
        ("adapter_config.json", "r", 10**9),
        ("adapter_config.json", "r", True),
        ("adapter_config.json", "lora_dropout", NAN),
        ("adapter_config.json", "lora_alpha", INF),
    ],
)
def test_adapters(file: str, field: str, value: Any, tmp_path: Path) -> None:
    folder = save(latent_model(), tmp_path)
    within = json.loads((folder / file).read_text())
    if file == "latent.json":
        changed(folder / file, settings={**within["settings"], field: value})
    else:
        changed(folder / file, **{field: value})
    refused(lambda: load_latent_model(folder), folder / file, field)


def test_a_recursion_that_fits_no_memory() -> None:
    sizes = {"reasoner": "sequence", "d_compressed": 96, "n_layers": 1024, "soft_tokens": 4000}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "free_memory", lambda *_: 100 << 20)
        refused(lambda: latent_model(**sizes), "the recursion", "MiB is free", "fewer layers")


@pytest.mark.parametrize(
    "values",
    [
        {"n_layers": NAN},
        {"n_heads": True},
        {"dropout": INF},
        {"halting_loss_weight": NAN},
        {"num_latents": 10**12},
        {"supervision_steps": 10**20},
    ],
)
def test_the_configuration_of_a_recursion(values: dict[str, Any]) -> None:
    refused(lambda: TRMConfig(**values), next(iter(values)))


@pytest.mark.parametrize(
    ("field", "value"), [("rows", NAN), ("columns", True), ("vocab_size", 10**12), ("num_puzzles", 2.5)]
)
def test_a_folder_of_puzzles(field: str, value: Any, tmp_path: Path) -> None:
    write_toy(tmp_path)
    changed(tmp_path / "dataset.json", **{field: value})
    refused(lambda: read_info(tmp_path), tmp_path / "dataset.json", field)


@pytest.mark.parametrize(("field", "value"), [("hidden_size", True), ("seed", NAN), ("hidden_size", 10**12)])
def test_a_folder_of_pairs(field: str, value: Any, tmp_path: Path) -> None:
    write_pairs(tmp_path)
    changed(tmp_path / "pairs.json", **{field: value})
    refused(lambda: open_pairs(tmp_path), tmp_path / "pairs.json", field)


@pytest.mark.parametrize("rows", [INF, NAN, True, -1, 2.5])
def test_a_folder_of_states(rows: Any, tmp_path: Path) -> None:
    shards = [{"rows": rows, "sequences": 1}]
    (tmp_path / "states.json").write_text(json.dumps({"model": "m", "width": 4, "shards": shards}))
    refused(lambda: StateFiles.open(tmp_path), tmp_path / "states.json")


PHASE2: dict[str, Any] = {
    "epoch": 1,
    "batch": 0,
    "updates": 3,
    "skipped": 0.0,
    "threshold": 0.7,
    "sums": {"loss": 1.0},
    "steps": 3.0,
    "history": [],
    "settings": {},
}
PUZZLE: dict[str, Any] = {"step": 3, "seconds": 1.5, "sums": {}, "steps": 3.0, "history": [], "settings": {}}


@pytest.mark.parametrize(
    ("kind", "state", "field", "value"),
    [
        *[(Progress, PHASE2, name, NAN) for name in ("epoch", "updates", "skipped", "threshold", "steps")],
        (Progress, PHASE2, "epoch", True),
        (Progress, PHASE2, "batch", -1),
        (Progress, PHASE2, "threshold", 1.5),
        (Progress, PHASE2, "sums", {"loss": NAN}),
        (Progress, PHASE2, "sums", [1.0]),
        (PuzzleProgress, PUZZLE, "step", 10**20),
        (PuzzleProgress, PUZZLE, "seconds", INF),
        (PuzzleProgress, PUZZLE, "sums", {"loss": "x"}),
    ],
)
def test_the_state_of_a_run(kind: Any, state: dict[str, Any], field: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text(json.dumps(state))
    assert read_progress(tmp_path, kind) == kind(**state)
    path.write_text(json.dumps({**state, field: value}))
    refused(lambda: read_progress(tmp_path, kind), path, field)


@pytest.mark.parametrize(
    ("field", "value"), [("global_step", NAN), ("max_steps", True), ("epoch", INF), ("log_history", [{}])]
)
def test_the_state_of_a_trainer(field: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "trainer_state.json"
    state = {"global_step": 2, "max_steps": 4, "epoch": 0.5, "log_history": [{"step": 2}]}
    path.write_text(json.dumps(state))
    assert trainer_state(tmp_path) == state
    path.write_text(json.dumps({**state, field: value}))
    refused(lambda: trainer_state(tmp_path), path)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"learning_rate": NAN}, "learning_rate"),
        ({"batch_size": True}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"clip_norm": INF}, "clip_norm"),
        ({"d_model": 10**12}, "d_model"),
        ({"augment": 1}, "augment"),
    ],
)
def test_settings_in_python(options: dict[str, Any], field: str, tmp_path: Path) -> None:
    refused(lambda: toy_config(tmp_path, **options), field)


def test_a_model_that_fits_no_memory_is_not_trained(tmp_path: Path) -> None:
    write_toy(tmp_path)
    config = toy_config(tmp_path, d_model=2**19, n_layers=2, n_heads=8)
    refused(lambda: PuzzleTrainer(config), "parameters", "GiB", "--d-model")


def test_a_batch_that_fits_no_memory_is_not_trained(tmp_path: Path) -> None:
    write_toy(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "free_memory", lambda *_: 1 << 20)
        refused(lambda: PuzzleTrainer(toy_config(tmp_path, batch_size=10_000)), "10,000 samples", "MiB")


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_a_run_takes_any_seed(seed: int, tmp_path: Path) -> None:
    write_toy(tmp_path)
    PuzzleTrainer(toy_config(tmp_path, seed=seed, steps=2, eval_samples=2)).train()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("bench --d-model 1048576", ("GiB", "smaller shape")),
        ("bench --latents 1073741824 --batch-size 1048576", ("GiB",)),
        ("data maze --num-samples 1000000000", ("mazes", "GiB")),
        ("data sudoku --num-samples 1000000000", ("Sudokus", "GiB")),
        ("datagen --num-samples 1000000000", ("problems", "GiB")),
        ("eval lm --model arithmetic --num-samples 1000000000", ("problems", "GiB")),
        ("train lm --steps 1000000000 --batch-size 100000", ("samples", "GiB")),
        ("train lm --eval-samples 1000000000", ("problems", "GiB")),
        ("train phase1 --num-tokens 10000000000", ("tokens", "GiB")),
    ],
)
def test_what_would_be_built_until_the_process_is_killed(
    arguments: str, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "_available", lambda: 16 << 30)
    result = CliRunner().invoke(main, arguments.split())
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("llm-trm: error")]
    for word in words:
        assert word in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_problems_are_written_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["data", "arithmetic", "--num-samples", "5"]
    printed = CliRunner().invoke(main, arguments).output
    monkeypatch.setattr("llm_trm.files.write_text", lambda *_: pytest.fail("held in memory"))
    assert CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "x.jsonl")]).exit_code == 0
    assert (tmp_path / "x.jsonl").read_text() == printed
    refusal = CliRunner().invoke(
        main, ["data", "arithmetic", "--num-samples", "1000000000", "-o", str(tmp_path / "y.jsonl")]
    )
    if refusal.exit_code:  # a disk of this size
        assert "of disk" in refusal.output


def test_free_memory_is_known_and_bounded_by_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = memory.free_memory(torch.device("cpu"))
    assert free is not None and free > 1 << 20
    (tmp_path / "memory.max").write_text("4096\n")
    monkeypatch.setattr(memory, "_LIMITS", (tmp_path / "memory.max", tmp_path / "none"))
    assert memory.free_memory() == 4096
    (tmp_path / "memory.max").write_text("max\n")
    assert (memory.free_memory() or 0) > 4096
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "none")
    assert memory.free_memory() is not None


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"WORLD_SIZE": "nan"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "1" * 20}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "LOCAL_RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "100000"}, "MASTER_PORT"),
    ],
)
def test_the_environment_of_a_launch(
    variables: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    refused(launched_processes, f"the environment variable {name}")


def test_default_sizes_are_within_their_ranges() -> None:
    SequenceTRMConfig()
    TRMConfig()
