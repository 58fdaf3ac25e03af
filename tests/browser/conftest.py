"""JupyterLab as a process of its own, and chromium to look at it."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from support import ROOT

CHROMIUM = Path("/usr/bin/chromium")
START_S = 90  # for JupyterLab, and for a kernel, to answer on a busy machine
COMMAND = """async ([command, index, wait_s]) => {
  const app = window.jupyterapp;
  const run = async () => {
    await app.restored;
    const notebook = app.shell.currentWidget;
    await notebook.context.ready;
    await notebook.sessionContext.ready;
    await notebook.sessionContext.session.kernel.info;  // clicking through the menu would race with its start
    if (index !== null) notebook.content.activeCellIndex = index;
    await app.commands.execute(command);
  };
  const late = new Promise((_, reject) =>
    setTimeout(() => reject(new Error(`${command} took more than ${wait_s} s`)), 1000 * wait_s));
  await Promise.race([run(), late]);
}"""


@dataclass
class Lab:
    """A running JupyterLab: where it answers, and the folder whose notebooks it opens."""

    url: str
    token: str
    folder: Path

    def open(self, page: Page, notebook: Path) -> None:
        """Open a notebook as the only document."""
        page.goto(f"{self.url}/lab/tree/{notebook.relative_to(self.folder)}?token={self.token}&reset")
        page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.content?.widgets?.length > 0")

    def run_all(self, page: Page) -> None:
        """Run all cells, as soon as the kernel is there."""
        page.evaluate(COMMAND, ["notebook:run-all-cells", None, START_S])

    def run_cell(self, page: Page, index: int) -> None:
        """Run one cell."""
        page.evaluate(COMMAND, ["notebook:run-cell", index, START_S])

    def theme(self, page: Page, name: str) -> None:
        """Change the theme: "JupyterLab Light" or "JupyterLab Dark"."""
        page.evaluate("(theme) => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", name)
        page.wait_for_timeout(500)  # ms; a splash screen is laid over the page while the style sheets change
        page.wait_for_selector("#jupyterlab-splash", state="detached")


def end_group(process: subprocess.Popen) -> None:
    """End a process and all it started in its session: politely, so that JupyterLab ends its kernels, then for good."""
    for sign, wait_s in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, sign)
            process.wait(wait_s)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue


def wait_until_it_answers(process: subprocess.Popen, lab: Lab, log: Path) -> None:
    end = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < end:
        try:
            urllib.request.urlopen(f"{lab.url}/api/status?token={lab.token}", timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not answer within {START_S} s; the end of its log:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """JupyterLab of this Python, with settings, kernels and runtime files of its own."""
    home = tmp_path_factory.mktemp("jupyter")
    folder = tmp_path_factory.mktemp("notebooks")
    settings = home / "JUPYTERLAB_SETTINGS_DIR" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    quiet = {"fetchNews": "false", "checkForUpdates": False}  # no question about news in front of the notebook
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    names = (
        "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
        "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR",
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER")}
    environment |= {name: str(home / name) for name in names} | {"PYTHONPATH": str(ROOT)}
    # where the notebooks find their configuration and leave their files
    environment |= {"GLM3KIT_CONFIG": str(folder / "tiny.yaml"), "GLM3KIT_OUTPUT": str(folder / "output")}

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lab = Lab(f"http://127.0.0.1:{port}", secrets.token_hex(16), folder)
    options = [
        "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={lab.token}", f"--ServerApp.root_dir={folder}",
        "--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly",
        # should the tests be killed outright, the server ends by itself some minutes later
        "--ServerApp.shutdown_no_activity_timeout=300", "--MappingKernelManager.cull_idle_timeout=300",
        "--MappingKernelManager.cull_connected=True",
    ]
    log = home / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], cwd=folder, env=environment,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )
    # a request to end the tests, too, passes through the `finally` below
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("the tests were asked to end"))
    try:
        wait_until_it_answers(process, lab, log)
        yield lab
    finally:
        end_group(process)
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def chromium():
    """Debian's chromium, without the services that would look for a network."""
    if not CHROMIUM.exists():
        pytest.fail(f"{CHROMIUM} does not exist: `make test` installs it (apt-get install chromium fonts-noto-cjk)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[
            "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync",
        ])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Browser):
    """A fresh page; what it complains about is printed when a test fails."""
    context = chromium.new_context(viewport={"width": 1180, "height": 900}, locale="en-US")
    page = context.new_page()
    page.set_default_timeout(60_000)  # a busy machine
    expect.set_options(timeout=30_000)
    page.on("pageerror", lambda error: print(f"page error: {error}"))
    yield page
    context.close()


@pytest.fixture(scope="session")
def pictures():
    """The folder of screenshots: they stay, to be looked at."""
    folder = ROOT / "output" / "browser"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
