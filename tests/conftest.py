"""What all tests share: where the reference values are, a quiet MindSpore, and who runs what where `-n` has workers."""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import GOLDEN, ROOT, TOKENIZER, golden_net

from glm3kit.text.tokenizer import ChatGLM3Tokenizer

# Before any import of mindspore: its warnings would fill the report, and workers (`-n`) share the cores.
os.environ.setdefault("GLOG_v", "3")
if "PYTEST_XDIST_WORKER" in os.environ:
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))

SHARED = Path(os.environ.get("GLM3KIT_SHARED", ROOT.parent / "shared"))
WITHOUT_SHARED = "needs other people's files, which are not part of the repository"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under `--dist loadfile`, give all files with tests of several processes to one worker: no two run at once.

    Marks of `loadgroup` would say it, but with pytest 9.2 that shares out single tests: pytest-xdist's issue 1386.
    """
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling  # here: the tests run without the plugin, too

    @cache
    def starts_several(file: str) -> bool:
        return "pytest.mark.ranks" in (config.rootpath / file).read_text(encoding="utf-8")

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "ranks" if starts_several(file) else file

    return Scheduling(config, log)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around all others, to have the last word
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Say what a run left out because other people's files are not there, and how to have it."""
    yield
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if WITHOUT_SHARED in str(report.longrepr)]
    if skipped:
        terminalreporter.section("other people's files")
        terminalreporter.write_line(f"""\
{len(skipped)} tests were skipped, as {SHARED} does not exist. They compare with files that are not part of
the repository: ChatGLM3's published tokenizer.model and what the official code makes of texts, rows of ADGEN and
ToolAlpaca, rank tables, training logs. Set GLM3KIT_SHARED to a folder that holds them: see CONTRIBUTING.md.""")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of other people's files, outside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"{WITHOUT_SHARED}: {SHARED} does not exist (see GLM3KIT_SHARED in CONTRIBUTING.md)")
    return SHARED


@pytest.fixture(scope="session")
def golden() -> Path:
    """A small ChatGLM3 of random weights, and what the official PyTorch code computes on it."""
    return GOLDEN


@pytest.fixture(scope="session")
def golden_texts(shared: Path) -> Path:
    """What the official tokenizer and encoding make of texts."""
    return shared / "golden" / "text"


@pytest.fixture(scope="session")
def hub(golden: Path) -> Path:
    """The golden model as a folder of a model hub."""
    return golden / "hf"


@pytest.fixture(scope="session")
def published(hub: Path) -> dict[str, np.ndarray]:
    """The golden tensors under their published names, read by the safetensors package."""
    import safetensors.numpy

    return {name: array for file in hub.glob("*.safetensors")
            for name, array in safetensors.numpy.load_file(file).items()}


@pytest.fixture(scope="session")
def tokenizer() -> ChatGLM3Tokenizer:
    """The tokenizer that comes with the kit."""
    return ChatGLM3Tokenizer(TOKENIZER)


@pytest.fixture(scope="session")
def published_tokenizer(shared: Path) -> ChatGLM3Tokenizer:
    """ChatGLM3's own tokenizer, whose ids the reference values are."""
    return ChatGLM3Tokenizer(shared / "data" / "tokenizer" / "tokenizer.model")


@pytest.fixture(scope="session")
def reference(golden: Path) -> dict[str, np.ndarray]:
    """What the official code computes on the golden model."""
    return dict(np.load(golden / "reference.npz"))


@pytest.fixture(scope="session")
def net() -> Any:
    """The golden model in float32 with its compiled graphs, for tests that leave it as it is."""
    return golden_net()
