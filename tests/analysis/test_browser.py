"""The report in a real browser: nothing in the console, every picture drawn."""

import json
import re
import shutil
import subprocess
import time

import pytest

from symbiotic.analysis.comparison import compare_runs
from symbiotic.analysis.report import build_report
from symbiotic.analysis.run_report import build_run_report
from tests.analysis.recipe_folder import write_recipe_folder
from tests.analysis.run_folder import write_run
from tests.support.requirements import require_demo, require_program

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
    "--virtual-time-budget=10000",
)  # fmt: skip

# Draws each picture on a canvas and counts its colours: a picture that failed to load, or is blank, has one at most.
PROBE = """
<script>
addEventListener("load", () => {
  const pictures = [...document.images].map((image) => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext("2d");
    if (!image.complete || !canvas.width) return {alt: image.alt, width: 0, colours: 0};
    context.drawImage(image, 0, 0);
    const data = new Uint32Array(context.getImageData(0, 0, canvas.width, canvas.height).data.buffer);
    return {alt: image.alt, width: image.clientWidth, colours: new Set(data).size};
  });
  const result = document.createElement("pre");
  result.id = "probe";
  result.textContent = JSON.stringify(pictures);
  document.body.append(result);
});
</script>
"""


def open_page(page, scratch):
    """Open a copy of ``page`` with the probe; returns its pictures and the console's lines."""
    browser = require_program("chromium", "google-chrome")
    copy = scratch / "page.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    profile = scratch / "profile"
    command = [browser, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", copy.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    shutil.rmtree(profile, ignore_errors=True)
    assert result.returncode == 0, result.stderr
    found = re.search(r'<pre id="probe">(.*?)</pre>', result.stdout, flags=re.DOTALL)
    assert found, "the page's script did not run"
    console = [line for line in result.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(found.group(1)), console


def check_page(page, scratch, *, num_pictures):
    pictures, console = open_page(page, scratch)
    assert console == []
    assert len(pictures) >= num_pictures
    for picture in pictures:
        assert picture["width"] > 100, picture
        assert picture["colours"] > 10, picture


@pytest.mark.slow
def test_a_report_is_drawn(tmp_path):
    write_recipe_folder(tmp_path / "digits", began=time.time())
    build_report(tmp_path / "digits", command="test")
    check_page(tmp_path / "digits" / "report.html", tmp_path, num_pictures=4)


@pytest.mark.slow
def test_reports_on_runs_are_drawn(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("ours", "other")]
    build_run_report(folders[0], command="test")
    compare_runs(folders, tmp_path / "both", command="test")
    check_page(folders[0] / "report.html", tmp_path, num_pictures=7)
    check_page(tmp_path / "both" / "report.html", tmp_path, num_pictures=4)


@pytest.mark.slow
def test_the_report_of_the_demo_is_drawn(tmp_path):
    check_page(require_demo() / "report.html", tmp_path, num_pictures=4)


@pytest.mark.slow
def test_the_probe_sees_a_broken_picture_and_a_console_error(tmp_path):
    page = tmp_path / "broken.html"
    page.write_text(
        '<!DOCTYPE html><html><body><img alt="broken" src="data:image/png;base64,AAAA">'
        "<script>console.error('something')</script></body></html>"
    )
    pictures, console = open_page(page, tmp_path)
    assert pictures[0]["colours"] == 0
    assert any("something" in line for line in console)
