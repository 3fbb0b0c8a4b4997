"""Tests of official checkpoints: the same function, lossless conversion, and errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from llm_trm.cli import main
from llm_trm.errors import InputError
from llm_trm.models.puzzle.official import PREFIX, read_official, write_official
from llm_trm.models.puzzle.paper import PuzzleTRM, PuzzleTRMConfig, load_puzzle_model, save_puzzle_model
from tests.foreign.official_puzzle import Compiled, Config

KINDS = {
    "rope": Config(),
    "no positions": Config(pos_encodings="none", num_heads=2),
    "learned": Config(pos_encodings="learned"),
    "mlp_t": Config(mlp_t=True, pos_encodings="none"),
    "without puzzles": Config(puzzle_emb_ndim=0, puzzle_emb_len=0, rope_theta=500.0),
}


def options(config: Config) -> dict[str, Any]:
    """The options that a checkpoint's tensors may not determine."""
    return {
        "positions": "none" if config.mlp_t else config.pos_encodings,
        "heads": config.num_heads,
        "rope_theta": config.rope_theta,
        "puzzle_len": config.puzzle_emb_len,
        "seq_len": config.seq_len,
        "n_latent_steps": config.L_cycles,
        "n_deep_recursions": config.H_cycles,
        "max_steps": 4,
    }


def saved(config: Config, path: Path, change: Callable[[dict[str, Tensor]], Any] | None = None) -> Path:
    torch.manual_seed(1)
    content: Any = Compiled(config).state_dict()
    if change is not None:
        content = change(dict(content))
    torch.save(content, path)
    return path


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and torch.equal(a[name].contiguous().view(torch.uint8), b[name].contiguous().view(torch.uint8))
        for name in a
    )


def load(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
def test_imported_model_computes_the_same(kind: str, tmp_path: Path) -> None:
    config = KINDS[kind]
    path = saved(config, tmp_path / "step_7")
    torch.manual_seed(1)
    theirs = Compiled(config)
    theirs.inner.config = replace(config, forward_dtype="float64")
    theirs.double()
    ours, _ = read_official(path, **options(config), dtype="float32", backend="eager")
    ours.double().dtype = torch.float64

    tokens = torch.randint(config.vocab_size, (5, config.seq_len))
    puzzles = torch.tensor([2, 0, 1, 2, 0]) % config.num_puzzle_identifiers
    for steps, (logits, halt) in enumerate(theirs(tokens, puzzles, steps=3), start=1):
        with torch.no_grad():
            found, found_halt = ours(tokens, puzzles, n_steps=steps)
        assert logits.std() > 0.1 and halt.std() > 1e-2
        assert (found - logits).abs().max() < 1e-9
        assert (found_halt - halt).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (Config(vocab_size=11, seq_len=81), 6_828_034),
        (Config(vocab_size=11, seq_len=81, mlp_t=True, pos_encodings="none"), 5_028_866),
        (Config(vocab_size=6, seq_len=900), 6_822_914),
    ],
    ids=["sudoku", "sudoku mlp_t", "maze"],
)
def test_parameter_counts_of_the_paper(config: Config, parameters: int, tmp_path: Path) -> None:
    config = replace(
        config, hidden_size=512, num_heads=8, puzzle_emb_len=16, puzzle_emb_ndim=512, num_puzzle_identifiers=1
    )
    model, facts = read_official(saved(config, tmp_path / "step_1"), **options(config))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert (facts["task"], facts["rows"]) == (("maze", 30) if config.seq_len == 900 else ("sudoku", 9))
    assert model.config.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [(kind, PREFIX) for kind in KINDS] + [("rope", prefix) for prefix in ("model.inner.", "_orig_mod.", "")],
)
def test_official_to_ours_and_back_keeps_every_bit(kind: str, prefix: str, tmp_path: Path) -> None:
    path = saved(
        KINDS[kind],
        tmp_path / "step_7",
        lambda content: {prefix + name.removeprefix(PREFIX): tensor for name, tensor in content.items()},
    )
    # Neither another stream dtype than in training nor saving to a folder may lose precision.
    for dtype in ("bfloat16", "float32"):
        model, facts = read_official(path, **options(KINDS[kind]), dtype=dtype)
        folder = tmp_path / dtype
        folder.mkdir()
        save_puzzle_model(model, folder, **facts)
        model, facts = load_puzzle_model(folder)
        assert model.config.dtype == dtype
        back = tmp_path / f"{dtype}.pt"
        assert write_official(model, back, facts) == []
        assert same_bits(load(back), load(path))
    assert load(path)[f"{prefix}H_init"].dtype == torch.bfloat16


def test_unusual_dtypes_come_back(tmp_path: Path) -> None:
    """A checkpoint that was converted to half precision."""
    path = saved(
        Config(), tmp_path / "half", lambda content: {name: tensor.half() for name, tensor in content.items()}
    )
    with pytest.raises(InputError, match="trained in float16: choose --dtype"):
        read_official(path, **options(Config()))
    model, facts = read_official(path, **options(Config()), dtype="bfloat16")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    write_official(model, tmp_path / "back", facts)
    assert same_bits(load(tmp_path / "back"), load(path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mixer", ["attention", "tokens"])
def test_ours_to_official_and_back_keeps_every_bit(mixer: Any, dtype: Any, tmp_path: Path) -> None:
    config = PuzzleTRMConfig(
        vocab_size=6,
        seq_len=16,
        num_puzzles=4,
        d_model=16,
        n_layers=1,
        n_heads=2,
        mixer=mixer,
        positions="rope" if mixer == "attention" else "none",
        puzzle_len=2,
        puzzle_dim=20,
        dtype=dtype,
    )
    model = PuzzleTRM(config)
    model.puzzle_emb.weights.normal_()
    # Rows of a larger storage, which torch.save would write completely.
    larger = torch.zeros(100_000, 16)
    larger[:6] = model.lm_head.weight.detach()
    model.lm_head.weight.data = larger[:6]
    path = tmp_path / "step_0"
    wide = write_official(model, path)
    content = load(path)
    states = {content[f"{PREFIX}{name}"].dtype for name in ("H_init", "L_init")}
    # bfloat16 if that is lossless, otherwise float32.
    assert states == ({torch.float32} if wide or dtype == "float32" else {torch.bfloat16})
    assert path.stat().st_size < 1.5 * sum(tensor.nbytes for tensor in content.values()) + 20_000

    back, _ = read_official(
        path,
        positions=config.positions,
        heads=2,
        puzzle_len=2,
        seq_len=16,
        n_latent_steps=6,
        n_deep_recursions=3,
        max_steps=16,
        dtype=dtype,
    )
    assert back.config == config
    assert same_bits(back.state_dict(), model.state_dict())


def test_lossy_states_are_written_in_float32(tmp_path: Path) -> None:
    model = PuzzleTRM(PuzzleTRMConfig(6, 16, d_model=16, n_heads=2, puzzle_dim=16, dtype="bfloat16"))
    model.y_init.fill_(1.0 / 3.0)
    model.z_init.fill_(0.25)
    assert write_official(model, tmp_path / "step_0") == ["H_init"]
    content = load(tmp_path / "step_0")
    assert content[f"{PREFIX}H_init"].dtype == torch.float32
    assert content[f"{PREFIX}L_init"].dtype == torch.bfloat16


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda content: {name.replace(old, new): tensor for name, tensor in content.items()}


def without(part: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda content: {name: tensor for name, tensor in content.items() if part not in name}


def cut(part: str, rows: int) -> Callable[[dict[str, Tensor]], Any]:
    return lambda content: {
        name: tensor[:rows].clone() if part in name else tensor for name, tensor in content.items()
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: [1, 2], "is not a state dict"),
        (lambda content: {"model": [content]}, "is not a state dict"),
        (lambda content: {"model": {**content, "step": 7}}, "is not a state dict"),
        (lambda content: {"model": content, "teacher": content}, "has the weights of 2 models"),
        (
            lambda content: {**content, f"{PREFIX}lm_head.weight": torch.full((11, 32), torch.nan)},
            "NaN or infinity in lm_head.weight",
        ),
        (lambda content: {}, "not a TRM checkpoint"),
        (lambda content: {"weight": torch.ones(2)}, "not a TRM checkpoint"),
        (lambda content: {**content, f"{PREFIX}H_level.layers.0.x": torch.ones(1)}, "checkpoint of HRM"),
        (without("H_init"), "lacks H_init"),
        (without("L_level"), r"lacks L_level\.layers\.0"),
        (without("layers.1.mlp.down"), r"lacks L_level\.layers\.1\.mlp\.down_proj\.weight"),
        (renamed("layers.1.", "layers.5."), r"lacks L_level\.layers\.1\..* and 1 more"),
        (lambda content: {**content, f"{PREFIX}L1_init": torch.ones(1)}, "unexpected tensors, L1_init"),
        (lambda content: {**content, "step": torch.ones(1)}, "unexpected tensors, step"),
        (cut("qkv_proj", 64), "grouped key/value heads"),
        (
            cut("mlp.gate_up_proj", 100),
            r"weight \[100, 32\], but its other tensors need \[512, 32\]",
        ),
        (cut("H_init", 5), r"H_init \[5\], but its other tensors need \[32\]"),
        (
            lambda content: {**content, f"{PREFIX}lm_head.weight": torch.ones(11, 32).double()},
            "lm_head.weight in float64",
        ),
        (
            lambda content: {**content, f"{PREFIX}puzzle_emb.weights": torch.ones(3)},
            "no matrix named puzzle_emb",
        ),
        (
            lambda content: {
                **content,
                f"{PREFIX}L_level.layers.0.mlp_t.down_proj.weight": torch.ones(12, 256),
                f"{PREFIX}embed_pos.embedding_weight": torch.ones(12, 32),
            },
            "learned positions with a token mixer",
        ),
    ],
)
def test_refused_checkpoints(change: Callable[[dict[str, Tensor]], Any], said: str, tmp_path: Path) -> None:
    path = saved(Config(), tmp_path / "step_7", change)
    with pytest.raises(InputError, match=said) as error:
        read_official(path, **options(Config()))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def averaged(content: dict[str, Tensor]) -> dict[str, Tensor]:
    """What an EMA helper keeps: an average of every parameter, without buffers."""
    buffers = ("H_init", "L_init", "puzzle_emb")
    return {name: tensor + 1 for name, tensor in content.items() if not any(part in name for part in buffers)}


@pytest.mark.parametrize(
    "change",
    [
        lambda content: {"model": content, "ema": averaged(content), "step": 7},
        lambda content: {
            "train": {"model_state_dict": content, "ema": {"decay": 0.999, "shadow": averaged(content)}},
            "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]},
        },
        lambda content: {
            **{f"model.{name}": tensor for name, tensor in content.items()},
            **{f"ema.{name.removeprefix(PREFIX)}": tensor for name, tensor in averaged(content).items()},
        },
        lambda content: {**content, **{f"ema.{name}": t for name, t in averaged(content).items()}},
        lambda content: {"ema": {**content, **averaged(content)}},
    ],
    ids=["entries", "nested", "prefixes", "a prefix of the other", "the average alone"],
)
def test_takes_the_average_next_to_the_weights(
    change: Callable[[dict[str, Tensor]], Any], tmp_path: Path
) -> None:
    plain, _ = read_official(saved(Config(), tmp_path / "step_6"), **options(Config()))
    model, facts = read_official(saved(Config(), tmp_path / "step_7", change), **options(Config()))
    assert facts["averaged"]
    torch.testing.assert_close(model.lm_head.weight, plain.lm_head.weight + 1)
    torch.testing.assert_close(model.y_init, plain.y_init)


def test_weights_within_a_mapping(tmp_path: Path) -> None:
    plain, _ = read_official(saved(Config(), tmp_path / "step_6"), **options(Config()))
    path = saved(Config(), tmp_path / "step_7", lambda content: {"model": content, "step": 7})
    model, facts = read_official(path, **options(Config()))
    assert same_bits(model.state_dict(), plain.state_dict()) and "averaged" not in facts


def test_buffers_saved_as_parameters_stay_buffers(tmp_path: Path) -> None:
    plain, _ = read_official(saved(Config(), tmp_path / "step_6"), **options(Config()))
    path = saved(
        Config(),
        tmp_path / "step_7",
        lambda content: {name: torch.nn.Parameter(tensor) for name, tensor in content.items()},
    )
    model, _ = read_official(path, **options(Config()))
    names = [[name for name, _ in one.named_parameters()] for one in (model, plain)]
    assert names[0] == names[1]
    assert same_bits(model.state_dict(), plain.state_dict())


def test_files_that_are_not_checkpoints(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("step")
    empty = tmp_path / "empty"
    empty.touch()
    whole = saved(Config(), tmp_path / "whole").read_bytes()
    half = tmp_path / "half"
    half.write_bytes(whole[: len(whole) // 2])
    code = tmp_path / "code"
    torch.save({"x": CliRunner}, code)
    with pytest.raises(InputError, match="could run code"):
        read_official(code)
    wrong = saved(Config(), tmp_path / "nan", lambda tensors: {**tensors, "x": torch.tensor([torch.nan])})
    pointer = tmp_path / "pointer"
    pointer.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    for path in (text, empty, half, code, wrong, pointer, tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=str(path)) as error:
            read_official(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "changed", "said"),
    [
        ("rope", {"heads": None, "positions": None}, "pass --positions rope|none, --heads"),
        ("rope", {"n_latent_steps": None, "n_deep_recursions": None, "max_steps": None}, "--latent-steps, "),
        ("rope", {"puzzle_len": None, "seq_len": None}, "pass --puzzle-len, --grid ROWSxCOLUMNS"),
        ("rope", {"heads": 5}, "not a multiple of n_heads 5"),
        ("rope", {"puzzle_len": 1}, "puzzle_dim 80 does not fit"),
        ("rope", {"positions": "learned"}, "lacks embed_pos"),
        ("rope", {"grid": (5, 5)}, "contradict each other in the number of cells (--seq-len 9, --grid 25)"),
        ("rope", {"task": "maze"}, "has 11 tokens, but --task maze has 6"),
        ("rope", {"task": "sudoku"}, "(--seq-len 9, --task 81)"),
        ("learned", {"positions": "rope"}, "has positions learned, but --positions has rope"),
        ("learned", {"seq_len": 10}, "has puzzle_len 2, but --puzzle-len has 3"),
        ("mlp_t", {"positions": "rope"}, "has positions none, but --positions has rope"),
        ("mlp_t", {"puzzle_len": None, "seq_len": None}, "pass --grid ROWSxCOLUMNS"),
        ("mlp_t", {"puzzle_len": None, "seq_len": 81}, "12 positions, too few for 81"),
        ("without puzzles", {"puzzle_len": 16}, "has puzzle_len 0, but --puzzle-len has 16"),
    ],
)
def test_refused_options(kind: str, changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = saved(KINDS[kind], tmp_path / "step_7")
    with pytest.raises(InputError) as error:
        read_official(path, **{**options(KINDS[kind]), **changed})
    assert said in str(error.value) and "\n" not in str(error.value)


def write_yaml(folder: Path, **changed: Any) -> None:
    """Save the first kind of model as the official code does."""
    arch = {
        "name": "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1",
        "loss": {"name": "losses@ACTLossHead", "loss_type": "stablemax_cross_entropy"},
        "H_cycles": 3,
        "H_layers": 0,
        "L_cycles": 2,
        "L_layers": 2,
        "expansion": 4,
        "forward_dtype": "bfloat16",
        "halt_exploration_prob": 0.1,
        "halt_max_steps": 16,
        "hidden_size": 32,
        "mlp_t": False,
        "no_ACT_continue": True,
        "num_heads": 4,
        "pos_encodings": "rope",
        "puzzle_emb_len": 3,
        "puzzle_emb_ndim": 80,
        **changed,
    }
    # JSON is YAML.
    content = {"arch": {name: value for name, value in arch.items() if value is not None}, "lr": 1e-4}
    (folder / "all_config.yaml").write_text(json.dumps(content))


def test_configuration_next_to_the_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    path = saved(Config(), tmp_path / "step_7")
    write_yaml(tmp_path)
    model, facts = read_official(path, seq_len=9)
    config = model.config
    assert (config.n_heads, config.positions, config.puzzle_len, config.max_steps) == (4, "rope", 3, 16)
    assert (config.n_latent_steps, config.n_deep_recursions, config.dtype) == (2, 3, "bfloat16")
    assert facts["origins"]["n_heads"] == "all_config.yaml"
    assert facts["origins"]["d_model"] == "its tensors"
    assert facts["origins"]["seq_len"] == "--seq-len"
    # The caller's value takes precedence.
    model, facts = read_official(path, seq_len=9, max_steps=5, heads=2)
    assert (model.config.max_steps, model.config.n_heads) == (5, 2)
    assert facts["origins"]["max_steps"] == "--max-steps"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": "recursive_reasoning.trm_singlez@X"}, "it describes recursive_reasoning.trm_singlez@X"),
        ({"name": None}, "has no entry 'name'"),
        ({"hidden_size": 64}, "has d_model 32, but all_config.yaml has 64"),
        ({"mlp_t": True}, "has mixer attention, but all_config.yaml has tokens"),
        ({"num_heads": "many"}, "num_heads is 'many'"),
        ({"rms_norm_eps": 1e-6}, "eps 1e-06"),
        ({"num_heads": None}, "pass --heads"),
        ({"pos_encodings": "learned"}, "lacks embed_pos"),
    ],
)
def test_refused_configurations(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    path = saved(Config(), tmp_path / "step_7")
    write_yaml(tmp_path, **changed)
    with pytest.raises(InputError) as error:
        read_official(path, seq_len=9)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_without_pyyaml_options_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    path = saved(Config(), tmp_path / "step_7")
    (tmp_path / "all_config.yaml").write_text("arch: {}")
    with pytest.raises(InputError, match=r"pip install pyyaml.*pass --positions"):
        read_official(path, seq_len=9)
    read_official(path, **options(Config()))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="llm-trm")


def refusal(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("llm-trm: error: ")
    return result.stderr


SUDOKU = Config(seq_len=81, num_puzzle_identifiers=1)
SAID = ("--positions", "rope", "--heads", "4", "--puzzle-len", "3", "-n", "2", "-T", "3", "--max-steps", "4")


def test_commands_there_and_back(tmp_path: Path) -> None:
    path = saved(SUDOKU, tmp_path / "step_7")
    result = run("import", "official", path, "-o", tmp_path / "model", "--grid", "9x9", *SAID)
    assert result.exit_code == 0, result.stderr
    assert "sudoku 9x9" in result.stdout
    assert "From --heads: n_heads 4" in result.stdout
    assert "From defaults of the official code: rope_theta 10000.0" in result.stdout
    _, facts = load_puzzle_model(tmp_path / "model")
    assert (facts["task"], facts["rows"], facts["columns"], facts["source"]) == ("sudoku", 9, 9, str(path))

    (tmp_path / "out").mkdir()
    back = tmp_path / "out" / "step_7"
    result = run("export", "official", tmp_path / "model", "-o", back)
    assert result.exit_code == 0, result.stderr
    assert same_bits(load(back), load(path))
    both = saved(SUDOKU, tmp_path / "both", lambda content: {"model": content, "ema": averaged(content)})
    result = run("import", "official", both, "-o", tmp_path / "average", "--grid", "9x9", *SAID)
    assert "The weights are the exponential moving average" in result.stdout
    # A second export finds the configuration of the first.
    assert run("export", "official", tmp_path / "model", "-o", tmp_path / "out" / "step_8").exit_code == 0

    # An export contains everything that an import needs.
    pytest.importorskip("yaml")
    result = run("import", "official", back, "-o", tmp_path / "again")
    assert result.exit_code == 0, result.stderr
    first, again = (load_puzzle_model(tmp_path / name) for name in ("model", "again"))
    assert first[0].config == again[0].config
    assert same_bits(first[0].state_dict(), again[0].state_dict())
    assert (again[1]["task"], again[1]["rows"]) == ("sudoku", 9)


def test_refusals_of_the_commands(tmp_path: Path) -> None:
    path = saved(SUDOKU, tmp_path / "step_7")
    model = tmp_path / "model"
    assert "pass --positions rope|none" in refusal(run("import", "official", path, "-o", model))
    assert not model.exists()
    assert "'9' is not a grid" in refusal(run("import", "official", path, "-o", model, "--grid", "9"))
    full = tmp_path / "full"
    full.mkdir()
    (full / "index.json").touch()
    assert "is not empty" in refusal(run("import", "official", path, "-o", full, "--grid", "9x9", *SAID))
    strange = saved(Config(), tmp_path / "step_8")
    said = refusal(run("import", "official", strange, "-o", model, "--seq-len", "9", *SAID))
    assert "belongs to no official data set: give --task and --grid" in said
    done = run("import", "official", strange, "-o", model, "--grid", "3x3", "--task", "maze", *SAID)
    assert "has 11 tokens" in refusal(done)
    assert "does not exist" in refusal(run("export", "official", tmp_path / "nothing", "-o", tmp_path / "x"))

    pytest.importorskip("yaml")
    assert run("import", "official", path, "-o", model, "--grid", "9x9", *SAID).exit_code == 0
    write_yaml(full, num_heads=8)
    said = refusal(run("export", "official", model, "-o", full / "step_1"))
    assert "describes another model (n_heads, max_steps)" in said
    assert not (full / "step_1").exists()


def test_positions_without_an_embedding_cannot_be_exported(tmp_path: Path) -> None:
    model = PuzzleTRM(PuzzleTRMConfig(6, 16, d_model=16, n_heads=2, puzzle_dim=0, puzzle_len=2))
    save_puzzle_model(model, tmp_path)
    assert "cannot run 2 positions" in refusal(run("export", "official", tmp_path, "-o", tmp_path / "x"))
    assert not (tmp_path / "x").exists() and not (tmp_path / "all_config.yaml").exists()
