"""What the tests of weights share: MindSpore, a folder that may be damaged, the golden weights in every form."""

import shutil
from pathlib import Path

import pytest

from glm3kit.weights.convert import convert_weights

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def ms():
    import mindspore

    return mindspore


@pytest.fixture
def copied(hub, tmp_path) -> Path:
    """A hub folder that may be damaged."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for file in [*hub.glob("*.safetensors"), hub / "config.json", hub / INDEX]:
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def sources(golden, tmp_path_factory) -> dict[str, Path]:
    """The golden weights in every form that there is, each with its config.json."""
    folder = tmp_path_factory.mktemp("sources")
    hub = golden / "hf"
    found = {"safetensors": hub, "pth": folder / "pth" / "glm3.pth", "legacy": folder / "legacy" / "glm3.pth",
             "bin": folder / "bin"}
    for path in (found["pth"].parent, found["legacy"].parent, found["bin"]):
        path.mkdir()
        shutil.copy(hub / "config.json", path)
    shutil.copy(golden / "glm3_merged.pth", found["pth"])
    shutil.copy(golden / "glm3_merged_legacy.pth", found["legacy"])
    for file in hub.glob("pytorch_model*"):
        shutil.copy(file, found["bin"])
    for form in ("ckpt", "safetensors"):
        found[f"one .{form}"] = convert_weights(hub, folder / f"glm3.{form}", progress=False)
        found[f"shards .{form}"] = convert_weights(hub, folder / f"shards.{form}", max_shard_size=100_000,
                                                   progress=False)
    with pytest.warns(UserWarning, match="without a tokenizer"):
        found["hf-glm"] = convert_weights(found["pth"], folder / "hf-glm", to="hf-glm", max_shard_size=100_000,
                                          progress=False)
    return found
