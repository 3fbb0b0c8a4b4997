"""Tests that accelerate reads and supports the configurations of docs/scale.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

DOCUMENT = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)


def read(snippet: str, folder: Path) -> Any:
    path = folder / "scale.yaml"
    path.write_text(snippet, encoding="utf-8")
    # It rejects unknown keys.
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    return config


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_accelerate_reads_the_snippets(snippet: str, tmp_path: Path) -> None:
    config = read(snippet, tmp_path)
    assert config.mixed_precision == "bf16" and config.num_processes == 8 * config.num_machines
    assert ("fsdp_config" in snippet) == bool(config.fsdp_config)
    assert ("deepspeed_config" in snippet) == bool(config.deepspeed_config)


def test_there_is_one_for_each_way() -> None:
    kinds = [re.search(r"distributed_type: (\w+)", snippet).group(1) for snippet in SNIPPETS]  # type: ignore[union-attr]
    assert kinds == ["MULTI_GPU", "FSDP", "DEEPSPEED", "FSDP"]


@pytest.mark.parametrize("snippet", [snippet for snippet in SNIPPETS if "fsdp_config" in snippet])
def test_fsdp_settings_reach_the_plugin(snippet: str, tmp_path: Path) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin

    config = read(snippet, tmp_path)
    settings = dict(config.fsdp_config)
    layer = settings.pop("fsdp_transformer_layer_cls_to_wrap")
    from transformers.models.smollm3 import modeling_smollm3

    assert hasattr(modeling_smollm3, layer)
    known = {f"fsdp_{name}" for name in FullyShardedDataParallelPlugin.__dataclass_fields__}
    # The names in files differ from the plugin's.
    assert set(settings) - {"fsdp_version", "fsdp_auto_wrap_policy", "fsdp_state_dict_type"} <= known
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=settings["fsdp_version"],
        auto_wrap_policy=settings["fsdp_auto_wrap_policy"],
        reshard_after_forward=settings["fsdp_reshard_after_forward"],
        state_dict_type=settings["fsdp_state_dict_type"],
        transformer_cls_names_to_wrap=[layer],
    )
    assert plugin.fsdp_version == 2
