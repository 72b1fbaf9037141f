"The explorer in a real browser, in JupyterLab and as a Voilà app: what a reader sees and presses."
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

APP = Path(__file__).parent.parent / "nbs" / "app" / "explorer.ipynb"
LAB = ["jupyterlab", "--no-browser", "--ip=127.0.0.1", "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--ServerApp.password=", "--allow-root",
       "--ServerApp.root_dir=.", "--LabApp.news_url=None", "--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly",
       "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
WAIT = 180  # seconds until something that should happen counts as not happening; nothing is timed
VOILA = ["voila", "explorer.ipynb", "--no-browser", "--Voila.ip=127.0.0.1", "--strip_sources=True"]


def listens(port, server):
    "Wait until the server takes connections: JupyterLab may print its address before it does. False where it ends or never does."
    for _ in range(10 * WAIT):
        if server.poll() is not None: return False
        with socket.socket() as knock:
            if knock.connect_ex(("127.0.0.1", port)) == 0: return True
        time.sleep(0.1)
    return False


@pytest.fixture
def serve(tmp_path):
    "Start a server in a folder of its own, with settings of its own; it ends with the test, whatever happens."
    servers = []

    def serve(command):
        shutil.copy(APP, tmp_path)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        own = {name: str(tmp_path / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
                                                               "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")}
        server = subprocess.Popen([sys.executable, "-m", *command, f"--port={port}"], cwd=tmp_path, env=os.environ | own | dict(JUPYTER_PREFER_ENV_PATH="1"),
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        servers.append(server)
        log, up = [], threading.Event()

        def read():
            for line in server.stdout:
                log.append(line)
                if f"127.0.0.1:{port}" in line: up.set()
            up.set()

        threading.Thread(target=read, daemon=True).start()
        assert up.wait(WAIT) and listens(port, server), "".join(log)
        return f"http://127.0.0.1:{port}"

    yield serve
    for server in servers:
        for sign in (signal.SIGTERM, signal.SIGKILL):  # asked nicely, a server takes its kernels with it
            if server.poll() is not None: break
            os.killpg(server.pid, sign)
            try: server.wait(30)
            except subprocess.TimeoutExpired: pass


def open_lab(page, address):
    "Open the notebook, run all its cells."
    page.goto(f"{address}/lab/tree/explorer.ipynb?reset")
    page.wait_for_function("""() => {
        const session = window.jupyterapp?.shell?.currentWidget?.sessionContext, kernel = session?.session?.kernel;
        return session?.isReady && kernel?.connectionStatus === 'connected' && kernel.status === 'idle'
            && jupyterapp.commands.hasCommand('notebook:run-all-cells');
    }""")
    page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")


def open_voila(page, address):
    "Open the app; its cells run by themselves."
    page.goto(address)


@pytest.mark.parametrize("command, go", [(LAB, open_lab), (VOILA, open_voila)], ids=["lab", "voila"])
def test_the_explorer(browser, serve, tmp_path, command, go):
    from playwright.sync_api import expect
    page = browser.new_page(viewport=dict(width=1300, height=1000))
    page.set_default_timeout(1000 * WAIT)
    expect.set_options(timeout=1000 * WAIT)
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    go(page, serve(command))
    explorer = page.locator(".anogan").first

    def button(name): return explorer.get_by_role("button", name=name, exact=True)
    def picture(alt): return explorer.get_by_alt_text(re.compile(alt))
    def sentence(text): return explorer.get_by_text(re.compile(text))
    def number(label, value):
        explorer.get_by_label(label, exact=True).fill(str(value))
        explorer.get_by_label(label, exact=True).press("Tab")

    def train(abnormal, row, before=None):  # what was shown of the detector before this one; the last picture to change is the last of the gallery
        explorer.get_by_label("Abnormal class").select_option(abnormal)
        expect(picture(f"^Examples from digits, abnormal class {abnormal}")).to_be_visible()
        button("Train").click()
        expect(explorer.get_by_role("row", name=re.compile(f"^{row} .* abnormal {abnormal}; 1 epoch"))).to_be_visible()
        expect(sentence("trained for 1 epoch$")).to_be_visible()
        expect(button("Train")).to_be_enabled()
        expect(picture("^Attention of the outlined patch")).to_be_visible()
        gallery = explorer.get_by_alt_text(re.compile("^test image"))
        expect(gallery).to_have_count(12)
        if before: expect(gallery.last).not_to_have_attribute("alt", before[1][-1])
        return sentence("^AUROC of this score").inner_text(), [image.get_attribute("alt") for image in gallery.all()]

    # another abnormal class, one epoch each: AUROC and gallery change
    number("Training images", 128)
    number("Epochs", 1)
    first = train("3", 1)
    second = train("0", 2, before=first)
    assert re.search(r"0\.\d{3}", first[0]) and first[0] != second[0] and first[1] != second[1]

    # the threshold, with the mouse and with keys: counts and picture move along
    counts, typed, handle = explorer.get_by_role("table", name="At this threshold"), explorer.get_by_label("Threshold"), explorer.get_by_role("slider").last

    def settled():
        "Slider and number agree: no message about them is on its way between page and kernel."
        page.wait_for_function("([slider, number]) => Math.abs(slider.getAttribute('aria-valuetext') - number.value) < 1e-4",
                               arg=[handle.element_handle(), typed.element_handle()])
        return typed.input_value()

    expect(sentence("^This is the frozen threshold")).to_be_visible()
    frozen, at = counts.inner_text(), settled()
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] - 150, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    expect(counts).not_to_have_text(frozen, use_inner_text=True)
    expect(sentence("promise nothing")).to_be_visible()
    assert float(settled()) < float(at)
    button("Frozen threshold").click()
    expect(typed).to_have_value(at)
    expect(counts).to_have_text(frozen, use_inner_text=True)
    handle.press("ArrowLeft")
    expect(typed).not_to_have_value(at)
    settled()
    number("Threshold", -100)
    expect(counts).to_contain_text("100.0%")
    expect(picture("100.0% false alarms and 100.0% hits")).to_be_visible()

    # one image, one patch
    score = explorer.get_by_alt_text(re.compile("abnormal, score")).first.get_attribute("alt")
    explorer.get_by_title(f"look inside {score}").click()
    expect(sentence(f"^{score.split(',')[0].capitalize()} is abnormal")).to_be_visible()
    before = picture("^Attention").get_attribute("alt")
    explorer.get_by_title("row 2, column 5", exact=True).click()
    expect(explorer.get_by_label("Patch, column")).to_have_value("5")
    expect(picture("^Attention")).not_to_have_attribute("alt", before)

    # a broken image, and a good one
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with page.expect_file_chooser() as chooser: explorer.get_by_role("button", name=re.compile("Choose image files")).click()
    chooser.value.set_files(tmp_path / "broken.png")
    expect(explorer.get_by_role("alert").filter(has_text="cannot read the image broken.png")).to_be_visible()
    from PIL import Image
    Image.new("L", (20, 30), 200).save(tmp_path / "good.png")
    with page.expect_file_chooser() as chooser: explorer.get_by_role("button", name=re.compile("Choose image files")).click()
    chooser.value.set_files(tmp_path / "good.png")
    expect(explorer.get_by_role("row", name=re.compile("^good.png .*(ABNORMAL|normal)"))).to_be_visible()

    # while it trains the page answers; Stop keeps the whole epochs
    number("Epochs", 5000)
    button("Train").click()
    expect(sentence(r"^\d+ of 5000 epochs done")).to_be_visible()
    button("Frozen threshold").click()
    expect(counts).to_have_text(frozen, use_inner_text=True)
    expect(button("Stop")).to_be_enabled()
    button("Stop").click()
    expect(sentence(r"^stopped; \d+ of 5000 epochs are kept")).to_be_visible()
    expect(explorer.get_by_role("row", name=re.compile("^3 "))).to_be_visible()
    assert not faults
    page.close()
