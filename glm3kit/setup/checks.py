"""Is this machine ready? Each check says what it found and what to do next, and none keeps the others from running.

A check imports inside itself what may be missing: a machine without some packages is checked, too.
Versions: MindSpore is compiled against NumPy 1 without saying so; MindSpore 2.10 has wheels for Python 3.9 to 3.12.

    print(format_checks(run_checks(load_config("configs/tiny.yaml"))))
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from glm3kit.errors import Glm3KitError
from glm3kit.setup.rank_table import ascend_cards, find_rank_table, read_rank_table

if TYPE_CHECKING:
    from glm3kit.config.groups import RunConfig

OPTIMIZER_BYTES = 12  # a parameter: float32 weights and two moments
# Prints one line of JSON: version, device.
PROBE = """
import json, sys
import mindspore as ms
ms.set_device(sys.argv[1])
ones = ms.Tensor([[1.0] * 64] * 64, ms.float32)
product = ms.ops.matmul(ones, ones).asnumpy()
assert (product == 64).all(), f"64 x 64 ones multiplied gave {product}"
print(json.dumps([ms.__version__, sys.argv[1]]))
"""


@dataclass(frozen=True)
class Check:
    """What one check found. state: "ok", "warning", "failed", or "skipped" where there was nothing to check."""

    name: str
    state: str
    finding: str
    next_step: str = ""


@dataclass(frozen=True)
class Machine:
    """What the checks look at: a configuration or None, the environment, the root of the file system."""

    config: "RunConfig | None"
    environ: Mapping[str, str]
    root: Path

    @property
    def target(self) -> str:
        """What device_target a run has here: "auto" without a configuration."""
        return self.config.parallel.device_target if self.config else "auto"

    @property
    def ranks(self) -> int:
        return self.config.parallel.ranks if self.config else 1

    @property
    def cards(self) -> list[int]:
        """The Ascend cards that a run would use; none where it is for the CPU."""
        return [] if self.target == "CPU" else ascend_cards(self.root)


def check_python(machine: Machine, version: tuple[int, ...] = sys.version_info[:3]) -> Check:
    finding = f"{'.'.join(map(str, version))} at {sys.executable}"
    if (3, 10) <= version[:2] <= (3, 12):
        return Check("Python", "ok", finding)
    return Check("Python", "failed", finding, "use Python 3.10 to 3.12: MindSpore has no packages for others")


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_packages(machine: Machine, requirements: Iterable[str] | None = None) -> Check:
    """Compare what is installed with what the package asks for (`dependencies` in pyproject.toml)."""
    from packaging.requirements import Requirement  # here: it may be missing

    if requirements is None:
        if _installed("glm3kit") is None:
            return Check("packages", "warning", "glm3kit is used without being installed: nothing says what it needs",
                         "in the folder of pyproject.toml: pip install .")
        requirements = importlib.metadata.requires("glm3kit") or []
    here = [needed for needed in map(Requirement, requirements)
            if needed.marker is None or needed.marker.evaluate({"extra": ""})]
    found = {needed: _installed(needed.name) for needed in here}
    wrong = [needed for needed, version in found.items()
             if version is None or not needed.specifier.contains(version, prereleases=True)]
    if not wrong:
        return Check("packages", "ok", f"{len(here)} packages are in the versions asked for")
    finding = "; ".join(f"{needed.name} is {found[needed] or 'missing'}, expected {needed.specifier or 'any'}"
                        for needed in wrong)
    names = " ".join(f"'{needed.name}{needed.specifier}'" for needed in wrong)
    return Check("packages", "failed", finding, f"pip install {names}")


def check_numpy(machine: Machine, version: str | None = None) -> Check:
    version = version or _installed("numpy") or "missing"
    if version.startswith("1."):
        return Check("NumPy", "ok", version)
    return Check("NumPy", "failed", f"{version}; MindSpore is compiled against NumPy 1: some operators fail to import",
                 "pip install 'numpy<2', then restart the kernel")


def check_mindspore(machine: Machine, time_limit_s: float = 180, probe: str = PROBE) -> Check:
    """Import MindSpore and multiply two matrices, in a process of its own: it may crash or hang."""
    name, advice = "MindSpore", "read the first error of: python -c 'import mindspore; mindspore.run_check()'"
    if importlib.util.find_spec("mindspore") is None:
        return Check(name, "failed", f"is not installed for {sys.executable}",
                     "pip install mindspore; on ModelArts choose a kernel that has it instead")
    target = "Ascend" if machine.cards else "CPU"
    work = f"a 64 x 64 product on {target}"
    try:
        done = subprocess.run([sys.executable, "-c", probe, target], capture_output=True, text=True, errors="replace",
                              env={**machine.environ, "GLOG_v": "3"}, stdin=subprocess.DEVNULL, timeout=time_limit_s,
                              check=False)
    except subprocess.TimeoutExpired:
        return Check(name, "failed", f"{work} did not finish within {time_limit_s:g} s", advice)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it printed nothing"]
        return Check(name, "failed", f"{work} ended with exit code {done.returncode}: {lines[-1]}", advice)
    version, device = json.loads(done.stdout.splitlines()[-1])
    return Check(name, "ok", f"{version} computes on {device}")


def _memory_bytes(root: Path) -> int:
    """Memory of the machine, or of the container if that has less."""
    import psutil  # here: it may be missing

    total = psutil.virtual_memory().total
    for place in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup 2, cgroup 1
        with suppress(OSError, ValueError):  # no such file; "max"
            total = min(total, int((root / "sys/fs/cgroup" / place).read_text()))
    return total


def _npu_smi(machine: Machine) -> str:
    """Whether npu-smi can be asked; in containers only root can."""
    program = shutil.which("npu-smi", path=machine.environ.get("PATH", os.defpath))
    if program is None:
        return "npu-smi is not on PATH"
    try:
        done = subprocess.run([program, "info"], capture_output=True, timeout=30, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as err:
        return f"npu-smi cannot be run: {err}"
    if done.returncode:
        return f"npu-smi ended with {done.returncode}: in a container it needs root"
    return "npu-smi sees them"


def check_devices(machine: Machine) -> Check:
    cards, config = machine.cards, machine.config
    if cards:
        finding = f"{len(cards)} Ascend card(s): {', '.join(map(str, cards))}; {_npu_smi(machine)}"
        if machine.ranks > len(cards):
            return Check("devices", "failed", f"{finding}; the configuration asks for {machine.ranks}",
                         f"lower parallel.data_parallel x tensor_parallel to {len(cards)}")
        return Check("devices", "ok", finding)
    if machine.target == "Ascend":
        return Check("devices", "failed", "no Ascend card: there is no /dev/davinci0",
                     "use a machine with cards (in a container: pass them in), or set parallel.device_target to CPU")
    memory, cores = _memory_bytes(machine.root), os.cpu_count() or 1
    finding = f"CPU: {cores} cores, {memory / 1e9:.1f} GB of memory"
    if config:
        from glm3kit.setup.memory import estimate_memory  # here: see the top

        needed = estimate_memory(config)["weights"] * machine.ranks
        if needed > memory:
            return Check("devices", "warning", f"{finding}; the weights alone take {needed / 1e9:.1f} GB",
                         "use a machine with Ascend cards, or a smaller model such as configs/tiny.yaml")
    return Check("devices", "ok", finding)


def check_rank_table(machine: Machine) -> Check:
    path = find_rank_table(machine.environ, machine.root)
    if path is None:
        return Check("rank table", "skipped", "none (RANK_TABLE_FILE, /user/config): a run on this machine needs none")
    table = read_rank_table(path)
    finding = f"{path}: {table.rank_size} device(s) on {len(table.servers)} server(s)"
    if machine.target == "CPU":
        return Check("rank table", "skipped", f"{finding}; not used: parallel.device_target is CPU")
    table.first(machine.ranks)  # raises where it lists fewer devices
    together = "launch the same on each, with an output_dir that all of them see" if len(table.servers) > 1 else ""
    return Check("rank table", "ok", finding, together)


def check_disk(machine: Machine) -> Check:
    config = machine.config
    folder = Path(config.output_dir if config else "output").absolute()
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        return Check("disk", "failed", f"{place} is no folder that can be written",
                     "set output_dir to a folder of yours")
    free = shutil.disk_usage(place).free
    finding = f"{free / 1e9:.1f} GB free for {folder}"
    if config is None:
        return Check("disk", "ok", finding)
    from glm3kit.setup.memory import parameter_count  # here: see the top
    from glm3kit.weights.tensors import DTYPES  # here: see the top

    parameters, weight = parameter_count(config.model), DTYPES[config.model.param_dtype].itemsize
    count = config.train.keep_checkpoints + 1  # the new one is complete before an old one goes
    needed = parameters * (count * (weight + OPTIMIZER_BYTES) + weight)
    finding += f"; {count} checkpoints and merged weights take about {needed / 1e9:.1f} GB"
    if free < needed:
        return Check("disk", "warning", finding, "set output_dir to a larger disk, or lower train.keep_checkpoints")
    return Check("disk", "ok", finding)


def check_tokenizer(machine: Machine) -> Check:
    model = machine.config.model
    if model.tokenizer_path is None:
        return Check("tokenizer", "failed", "model.tokenizer_path is not set",
                     "set it to the tokenizer.model published with ChatGLM3-6B")
    from glm3kit.text.tokenizer import ChatGLM3Tokenizer  # here: see the top

    size = ChatGLM3Tokenizer(model.tokenizer_path).vocab_size
    finding = f"{model.tokenizer_path}: {size:,} ids"
    if size > model.padded_vocab_size:
        return Check("tokenizer", "failed", f"{finding}, but model.padded_vocab_size is {model.padded_vocab_size:,}",
                     "use the tokenizer that belongs to the model, or correct padded_vocab_size")
    return Check("tokenizer", "ok", finding)


def check_data(machine: Machine, key: str) -> Check:
    """Open each file of data.train_path or data.eval_path and check its first row."""
    from glm3kit.data.rows import read_rows  # here: see the top

    name, paths = f"data.{key}", getattr(machine.config.data, key)
    if not paths:
        return Check(name, "skipped", "is not set")
    for path in paths:
        if next(read_rows([path], machine.config.data), None) is None:
            return Check(name, "failed", f"{path}: holds no row", "give a file of JSON lines with rows")
    size = sum(Path(path).stat().st_size for path in paths)
    return Check(name, "ok", f"{len(paths)} file(s), {size / 1e6:,.1f} MB; the first row of each is fine")


def check_weights(machine: Machine) -> Check:
    """Compare names and shapes of the weights with the configuration; the values are not read."""
    path = machine.config.model.checkpoint_name_or_path
    if path is None:
        return Check("weights", "skipped", "model.checkpoint_name_or_path is not set")
    if not Path(path).exists():
        return Check("weights", "warning", f"{path}: not there yet",
                     f"convert published weights: glm3kit convert SRC {path}")
    from glm3kit.weights.names import parameter_shapes  # here: see the top
    from glm3kit.weights.read import read_weights  # here: see the top

    specs, shapes = read_weights(path).specs, parameter_shapes(machine.config.model)
    wrong = [name for name in {**shapes, **specs} if name not in specs or specs[name].shape != shapes.get(name)]
    finding = f"{path}: {len(specs)} tensors, {sum(spec.nbytes for spec in specs.values()) / 1e9:.1f} GB"
    if wrong:
        return Check("weights", "failed", f"{finding}; {len(wrong)} do not fit the configuration, such as {wrong[0]}",
                     "use the weights that belong to these sizes, or correct the sizes in model")
    return Check("weights", "ok", finding)


CHECKS: dict[str, Callable[[Machine], Check]] = {
    "Python": check_python, "packages": check_packages, "NumPy": check_numpy, "MindSpore": check_mindspore,
    "devices": check_devices, "rank table": check_rank_table, "disk": check_disk, "tokenizer": check_tokenizer,
    "data.train_path": partial(check_data, key="train_path"), "data.eval_path": partial(check_data, key="eval_path"),
    "weights": check_weights,
}
NEED_CONFIG = ("tokenizer", "data.train_path", "data.eval_path", "weights")


def run_checks(config: "RunConfig | None" = None, environ: Mapping[str, str] = os.environ,
               root: str | Path = "/") -> list[Check]:
    """Check Python, packages, MindSpore, devices, rank table and disk, and with a configuration its files.

    Raises nothing: a check that cannot be made is a failed one. Takes some seconds, most of them for MindSpore.
    """
    machine = Machine(config, environ, Path(root))
    results = []
    for name, check in CHECKS.items():
        if config is None and name in NEED_CONFIG:
            results.append(Check(name, "skipped", "no configuration was given"))
            continue
        try:
            results.append(check(machine))
        except Glm3KitError as err:  # its message ends with what to do
            finding, _, next_step = str(err).rpartition("; ")
            results.append(Check(name, "failed", finding or str(err), next_step if finding else "correct it"))
        except Exception as err:  # whatever an odd machine comes up with: the other checks must still run
            results.append(Check(name, "failed", f"the check could not be made: {type(err).__name__}: {err}",
                                 "if a package is missing: pip install . in the folder of pyproject.toml"))
    return results


def format_checks(checks: Iterable[Check]) -> str:
    """The checks as plain text: state, name and finding in a line, the next step below where there is one."""
    return "\n".join(f"{check.state:<8} {check.name:<16} {check.finding}"
                     + (f"\n{'':<25} -> {check.next_step}" if check.next_step else "") for check in checks)
