"""The tiny model for all tests in this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_trm.models.loading import ThinkingModel, load_thinking_model
from tests.data.tiny import save_tiny_model

pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="session")
def model(model_folder: Path) -> ThinkingModel:
    return load_thinking_model(str(model_folder))
