"""A model in the Hugging Face cache, as if it had been downloaded."""

import shutil
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_with_mistral(tiny_model_dir: Path, tmp_path: Path) -> dict[str, str]:
    """An environment whose cache holds the tiny model under the hub id of mistral7b, without a chat template."""
    repository = tmp_path / "huggingface" / "hub" / "models--mistralai--Mistral-7B-v0.1"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(tiny_model_dir, snapshot)
    (snapshot / "chat_template.jinja").unlink()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return {"HF_HOME": str(tmp_path / "huggingface")}
