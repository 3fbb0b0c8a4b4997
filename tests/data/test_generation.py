"""Tests of a run's output: complete, resumable, and independent of interruptions."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llm_trm.data
from llm_trm.data import generation
from llm_trm.data.arithmetic import World
from llm_trm.data.generation import GenerationProgress
from llm_trm.data.generation_config import Limits, Sampling
from llm_trm.data.pairs import RECORD, open_pairs
from llm_trm.errors import InputError
from tests.data.generate import generate, generate_counting

ROOT = Path(__file__).parents[2]


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def undisturbed(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pairs")
    generate(output, model_folder)
    return output


@pytest.fixture
def folder(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(undisturbed, tmp_path / "pairs"))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(generation, "load_thinking_model", load)


def test_the_original_entry_point_is_there() -> None:
    assert llm_trm.data.ThinkingDataGenerator is generation.ThinkingDataGenerator


def test_finished_run(undisturbed: Path, model_folder: Path) -> None:
    pairs = open_pairs(undisturbed, 32)
    assert {0, 3} <= {entry.samples for entry in pairs.entries}, "needs shards without pairs and full ones"
    assert pairs.samples + sum(pairs.failures.values()) == 24
    assert [entry.file for entry in pairs.entries] == [f"shard-{i:05d}.safetensors" for i in range(8)]
    assert sorted(path.name for path in undisturbed.iterdir()) == sorted(
        ["pairs.json", "settings.json"]
        + [f"shard-{i:05d}.{kind}" for i in range(8) for kind in ("safetensors", "jsonl")]
    )
    questions = [problem.question for problem in World().problems(24, seed=1)]
    indices = []
    for number, shard in enumerate(pairs.shards()):
        for record, length in zip(shard.records, shard.offsets.diff().tolist(), strict=True):
            assert list(record) == list(RECORD)
            assert number * 3 <= record["index"] < (number + 1) * 3
            assert record["problem"] == questions[record["index"]]
            assert record["context_length"] == length
            assert record["thinking_tokens"] <= 28
            indices.append(record["index"])
    assert indices == sorted(set(indices))
    assert pairs.settings["model"] == str(model_folder)


def test_other_batch_size_is_the_same_run(folder: Path, model_folder: Path, tmp_path: Path) -> None:
    generate(tmp_path / "b", model_folder, batch_size=2)
    before, after = (
        [{**record} for record in open_pairs(path).records()] for path in (folder, tmp_path / "b")
    )
    assert before == after
    assert (folder / "settings.json").read_bytes() == (tmp_path / "b" / "settings.json").read_bytes()


def test_finished_run_is_not_changed(folder: Path, model_folder: Path, no_model: None) -> None:
    before = _contents(folder)
    generate(folder, model_folder)
    assert _contents(folder) == before


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    "harm",
    [
        lambda f: (f / "shard-00002.jsonl").unlink(),  # killed between the two files
        lambda f: (f / "shard-00003.safetensors").unlink(),
        lambda f: _truncate(f / "shard-00003.safetensors"),
        lambda f: (f / "pairs.json").unlink(),
        lambda f: (f / ".shard-00001.safetensors.ab_3xY9z").write_bytes(b"half"),  # killed in files.replacing
        lambda f: (f / ".tmpUOI04V").write_bytes(b"half"),  # killed in safetensors' save_file
        lambda f: [path.unlink() for path in f.glob("shard-*")],
    ],
)
def test_missing_files_are_generated_again(
    folder: Path, undisturbed: Path, model_folder: Path, harm: Callable[[Path], Any]
) -> None:
    harm(folder)
    generate(folder, model_folder)
    assert _contents(folder) == _contents(undisturbed)


def test_progress_counts_existing_shards(folder: Path, model_folder: Path) -> None:
    (folder / "shard-00001.jsonl").unlink()
    (folder / "shard-00005.jsonl").unlink()
    seen: list[tuple[int, int]] = []

    def see(progress: GenerationProgress) -> None:
        seen.append((progress.resumed, progress.done))
        assert progress.total == 24

    generate(folder, model_folder, on_progress=see)
    assert seen == [(18, done) for done in range(18, 25)]


def test_kill_at_any_moment(undisturbed: Path, model_folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.data.generate", "transformers.models.smollm3.modeling_smollm3"])
    output, moments = tmp_path / "pairs", random.Random(0)
    killed_midway = 0
    for _ in range(5):
        settled = context.Value("i", -1)
        child = context.Process(target=generate_counting, args=(output, model_folder, settled))
        child.start()
        enough = moments.randrange(7)
        while child.is_alive() and settled.value < enough:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))
        child.kill()
        child.join()
        shards = len(list(output.glob("shard-*.jsonl")))
        killed_midway += child.exitcode == -signal.SIGKILL and 0 < shards < 8
    assert killed_midway >= 2
    generate(output, model_folder)
    assert _contents(output) == _contents(undisturbed)


def test_two_processes_make_the_files_of_one(undisturbed: Path, model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    script = tmp_path / "run.py"
    script.write_text(
        "from pathlib import Path\n"
        "from tests.data.generate import generate\n"
        f"generate(Path({str(tmp_path / 'pairs')!r}), Path({str(model_folder)!r}))\n"
    )
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1")
    options = ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
    done = subprocess.run(
        [sys.executable, *launch, *options, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert _contents(tmp_path / "pairs") == _contents(undisturbed)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"sampling": Sampling(0.5, seed=3)},
            ("seed (1 before, 3 now)", "temperature (0.7 before, 0.5 now)"),
        ),
        ({"sampling": Sampling(0.7, top_p=0.9, seed=1)}, ("top_p",)),
        ({"num_samples": 25}, ("num_samples",)),
        ({"limits": Limits(100, 31, 4)}, ("max_new_tokens (30 before, 31 now)",)),
        ({"limits": Limits(99, 30, 5)}, ("max_prompt_tokens", "answer_tokens")),
        ({"shard_size": 4}, ("shard_size",)),
        ({"dtype": "bf16"}, ("dtype (float32 before, bfloat16 now)",)),
        ({"world": World(1, 4)}, ("operations", "problems_sha256")),
        ({"split": "test"}, ("split",)),
    ],
)
def test_other_settings_are_refused_by_name(
    folder: Path, model_folder: Path, no_model: None, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    before = _contents(folder)
    with pytest.raises(InputError) as error:
        generate(folder, model_folder, **changes)
    for word in (str(folder), *words, "--overwrite", "another --output"):
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert _contents(folder) == before


def test_changed_problem_files_are_detected(model_folder: Path, tmp_path: Path) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"question": "1+1"}\n')
    run: dict[str, Any] = {"data": str(problems), "num_samples": 1}
    generate(tmp_path / "pairs", model_folder, **run)
    problems.write_text('{"question": "1+2"}\n')
    with pytest.raises(InputError, match="problems_sha256"):
        generate(tmp_path / "pairs", model_folder, **run)


def test_overwrite_starts_over_and_removes_only_its_own(
    folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    for name in ("notes.txt", "shard-of-mine.jsonl"):
        (folder / name).write_text("keep me")
    changes: dict[str, Any] = {"num_samples": 6, "sampling": Sampling(0.9)}
    generate(folder, model_folder, overwrite=True, **changes)
    for name in ("notes.txt", "shard-of-mine.jsonl"):
        assert (folder / name).read_text() == "keep me"
        (folder / name).unlink()
    generate(tmp_path / "new", model_folder, **changes)
    assert _contents(folder) == _contents(tmp_path / "new")


def test_overwrite_keeps_the_pairs_if_the_model_cannot_be_loaded(folder: Path, tmp_path: Path) -> None:
    before = _contents(folder)
    with pytest.raises(InputError, match="no-such-model"):
        generate(folder, tmp_path / "no-such-model", overwrite=True)
    assert _contents(folder) == before


@pytest.mark.parametrize(
    "content", ['{"editor.fontSize": 12}', '{"format": "llm-trm datagen settings", "settings": 1e400}']
)
def test_folder_with_other_files_is_rejected(
    content: str, folder: Path, model_folder: Path, no_model: None
) -> None:
    (folder / "settings.json").write_text(content)
    for overwrite in (False, True):
        with pytest.raises(
            InputError, match=r"settings\.json was not written by llm-trm datagen: use another --output"
        ):
            generate(folder, model_folder, overwrite=overwrite)
    (folder / "settings.json").unlink()
    with pytest.raises(InputError, match=r"shard-0000\d.*without a settings\.json.*--overwrite"):
        generate(folder, model_folder)


def test_folder_that_cannot_be_written(model_folder: Path, tmp_path: Path, no_model: None) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/pairs cannot be written"):
        generate(tmp_path / "file" / "pairs", model_folder)


def test_shard_without_a_pair(model_folder: Path, tmp_path: Path) -> None:
    pairs = generate(tmp_path, model_folder, limits=Limits(1, 30, 4), num_samples=5)
    assert pairs.samples == 0
    assert pairs.failures == {"prompt_too_long": 5}
    assert [shard.hidden_pre.shape for shard in pairs.shards()] == [(0, 32), (0, 32)]


def test_real_problems(model_folder: Path, tmp_path: Path) -> None:
    """GSM8K runs without errors, whatever the tiny model answers."""
    path = ROOT.parent / "shared/data/gsm8k_train.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    pairs = generate(
        tmp_path, model_folder, data=str(path), num_samples=12, limits=Limits(450, 40, 3), batch_size=6
    )
    assert pairs.samples + sum(pairs.failures.values()) == 12
    asked = [json.loads(line) for _, line in zip(range(12), path.open(encoding="utf-8"), strict=False)]
    records = list(pairs.records())
    assert records
    for record in records:
        assert record["problem"] == asked[record["index"]]["question"]
        assert record["answer"] == asked[record["index"]]["answer"]
        assert record["context_length"] > len(record["problem"].encode())
