"""The page of a run: what it holds, what names can do to it, and how it answers in a browser."""

import base64
import io
import json
import os
import re
import shlex
import shutil
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

import report
import smoothgrad
import train_classifier
import train_dcgan
from common.device import make_rng
from common.images import add_caption, save_gif, to_grid
from common.run import save_checkpoint
from tests.helpers import POSIX

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(1)">&lt;\u2028\udcff{{data}}'
EPOCHS = 105  # from 0; the maximum that a slider has of itself is 100


def write_run(folder, script, args=None, **found):
    """Write metrics.json as a script does."""
    folder.mkdir()
    command = f"python {script}.py --as typed"
    metrics = {"script": script, "command": command, "args": args or {}, "device": "cpu", **found}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def edit(folder, change):
    """Change the record of a run by a function."""
    metrics = json.loads((folder / "metrics.json").read_text())
    change(metrics)
    (folder / "metrics.json").write_text(json.dumps(metrics))


def show(folder):
    """Make the page of a run, and return what it shows."""
    return report.main([str(folder)])


def draw(seed, *shape):
    """Draw numbers from 0 to 1."""
    return np.random.default_rng(seed).random(shape).astype(np.float32)


def save(file, pixels):
    """Write a picture of numbers from 0 to 1."""
    Image.fromarray((255 * pixels).astype(np.uint8)).save(file)


def decode(uri):
    """Read a picture from its data URI."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


@pytest.fixture
def maps(tmp_path):
    """Make a run of smoothgrad.py on two photos."""
    folder = write_run(tmp_path / "maps", "smoothgrad", {"model": "vgg", "image": ["a b.jpg"]})
    images = []
    for seed, name in enumerate(("ant", "bee")):
        found = [{"noise": noise, "samples": 1000, "reliability": 0.5 + noise,
                  "probability_left": 0.4 - noise / 10 - seed / 10, "probability_left_random": 0.45}
                 for noise in (0, 0.1, 3)]  # fmt: skip
        images.append({"path": f"{name}.jpg", "class_name": name, "probability": 0.75,
                       "maps": found, "panel": f"{name}_panel.png"})  # fmt: skip
        heats = {f"noise_{n}": draw(seed + n + 1, 3, 16, 16) - 0.5 for n in (0, 10, 300)}
        np.savez(folder / f"{name}.npz", photo=draw(seed, 3, 16, 16), **heats)
    edit(folder, lambda metrics: metrics.update(images=images))
    return folder


@pytest.fixture
def masks(tmp_path):
    """Make a run of explain_perturb.py on one photo."""
    image = {"path": "ant.jpg", "panel": "ant_panel.png", "class_name": "ant", "probability": 0.9,
             "probability_after": 0.2, "area": 0.25, "evaluations": 1234,
             "curve": [[0.1, 0.7], [0.25, 0.2], [0.9, 0.1]]}  # fmt: skip
    folder = write_run(tmp_path / "masks", "explain_perturb", images=[image])
    arrays = {"photo": draw(0, 3, 16, 16), "mask": draw(1, 16, 16), "ranking": draw(2, 16, 16) - 1}
    np.savez(folder / "ant.npz", **arrays)
    save(folder / "ant_perturbed.png", draw(3, 16, 16, 3))
    return folder


@pytest.fixture
def gan(tmp_path):
    """Make a run of train_dcgan.py of many epochs."""
    args = {"z_dim": 4, "width": 0.02, "linear_bn": True, "size": 28, "conditional": False,
            "seed": 3}  # fmt: skip
    rows = [{"epoch": epoch, "d_loss": 1.5, "g_loss": 2 - epoch / 100, "d_real": 0.5, "fid": 9.0}
            for epoch in range(1, EPOCHS)]  # fmt: skip
    fid = {"floor": {"fid": 0.5}}
    folder = write_run(tmp_path / "gan", "train_dcgan", args, epochs=rows, fid=fid)
    (folder / "samples").mkdir()
    for epoch in range(EPOCHS):
        grid = to_grid(torch.from_numpy(draw(epoch, 4, 1, 8, 8)), columns=2)
        save(folder / f"samples/epoch_{epoch:03d}.png", add_caption(grid, f"epoch {epoch}") / 255)
    torch.manual_seed(0)
    generator, _ = train_dcgan.make_networks(Namespace(**args), 1, 2)
    for weights in generator.parameters():  # their samples would all be grey
        torch.nn.init.normal_(weights)
    state = {
        "script": "train_dcgan",
        "args": args,
        "shape": [8, 1, 28, 28],
        "class_counts": {"a": 1, "b": 1},
    }
    save_checkpoint(folder / "checkpoint.pt", state | {"ema": generator.state_dict()})
    return folder


@pytest.fixture
def table(tmp_path):
    """Make a run of compare_explanations.py."""
    methods = {"RISE": {"deletion": [0.2, 0.01, 2], "evaluations": [500.0, 0.0, 2]},
               "edges": {"deletion": [0.31234, 0.02, 2], "evaluations": [0.0, 0.0, 2]},
               "Grad-CAM": {"deletion": [0.1, 0.03, 2]}}  # fmt: skip
    image = {"path": "ant.jpg", "class_name": "ant", "maps": "maps/ant.npz", "methods": {}}
    folder = write_run(tmp_path / "table", "compare_explanations", images=[image], table=methods)
    save(folder / "contact_sheet.png", draw(0, 9, 12, 3))
    save(folder / "curves.png", draw(1, 9, 900, 3))
    return folder


@pytest.fixture(params=["maps", "masks", "gan", "table"])
def any_run(request):
    """Give the folder of each kind of run in turn."""
    return request.getfixturevalue(request.param)


# ------------------------------------------------------------------------------ what a page holds


def test_a_page_holds_its_data_and_loads_nothing(any_run, tmp_path):
    """It lies where --out says; no element or script names an address."""
    data = report.main([str(any_run), "--out", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not (any_run / "report.html").exists()
    held = re.search('<script type="application/json" id="data">(.*)</script>', text)[1]
    assert json.loads(held) == json.loads(json.dumps(data))
    assert data["notes"] == []
    rest = text.replace(held, "")
    assert re.findall(r' (?:src|href|action)="([^"]*)"', rest) == ["data:,"]  # the icon
    assert "default-src 'none'; img-src data:;" in rest
    assert not re.search(r"fetch|XMLHttp|import\(|eval\(|innerHTML|insertAdjacent|\.write\(", rest)


def test_hostile_names_stay_text(maps):
    """A photo, a class or an argument can be called anything: the page stays as it was."""
    show(maps)
    tame = (maps / "report.html").read_text(encoding="utf-8")
    edit(maps, lambda metrics: metrics["images"][0].update(path=HOSTILE, class_name=HOSTILE))
    edit(maps, lambda metrics: metrics["args"].update(image=[HOSTILE]))
    data = show(maps)
    lines = (maps / "report.html").read_text(encoding="utf-8").split("\n")
    changed = [a for a, b in zip(lines, tame.split("\n"), strict=True) if a != b]
    assert len(changed) == 1
    assert changed[0].startswith('<script type="application/json" id="data">{')
    assert [changed[0].count(character) for character in "<>&"] == [2, 2, 0]
    assert data["photos"][0]["name"] == HOSTILE
    assert ["--image", HOSTILE] in data["arguments"]


def test_maps_are_the_runs_own(maps):
    """Read back from the page, photos, maps and numbers are those in the folder."""
    photos = show(maps)["photos"]
    assert [photo["path"] for photo in photos] == ["ant.jpg, vgg", "bee.jpg, vgg"]
    with np.load(maps / "bee.npz") as arrays:
        pixels = arrays["photo"].transpose(1, 2, 0)
        assert np.abs(decode(photos[1]["photo"]) / 255 - pixels).max() < 0.01
        for n, found in zip((0, 10, 300), photos[1]["maps"], strict=True):
            heat = np.abs(arrays[f"noise_{n}"]).sum(0)
            heat = (heat - heat.min()) / np.ptp(heat)
            assert np.abs((decode(found["levels"]) / 255) ** 2 - heat).max() < 0.005
    assert [found["name"] for found in photos[1]["maps"]] == ["none", "10 %", "300 %"]
    facts = list(photos[1]["maps"][1]["facts"].values())
    assert facts == ["75.0 %", "29.0 %", "45.0 %", "0.600", "1,000"]
    left, _ = photos[1]["chart"]["lines"].values()
    assert np.allclose(left, [[0, 0.3], [0.1, 0.29], [3, 0]])


def test_large_maps_are_averaged(maps):
    """A photo of a large network is shown smaller; a mean over squares keeps what a map says."""
    heat = draw(0, 1, 700, 700)
    np.savez(maps / "ant.npz", photo=heat, noise_10=heat)
    photo = show(maps)["photos"][0]
    levels = (decode(photo["maps"][0]["levels"]) / 255) ** 2
    small = heat[0, :699, :699].reshape(233, 3, 233, 3).mean((1, 3))
    assert photo["side"] == 233
    assert np.corrcoef(levels.ravel(), small.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("channels_last", [False, True])
def test_masks_are_the_runs_own(masks, channels_last):
    """What was deleted, what is left and the curve are those in the folder; so in older runs."""
    with np.load(masks / "ant.npz") as file:
        arrays = dict(file)
    pixels = arrays["photo"].transpose(1, 2, 0)
    if channels_last:
        np.savez(masks / "ant.npz", **arrays | {"photo": pixels})
    (photo,) = show(masks)["photos"]
    assert np.abs(decode(photo["photo"]) / 255 - pixels).max() < 0.01
    assert np.array_equal(decode(photo["after"]), Image.open(masks / "ant_perturbed.png"))
    deleted = (decode(photo["maps"][0]["levels"]) / 255) ** 2
    assert np.abs(deleted - (1 - arrays["mask"])).max() < 0.005
    assert [*photo["chart"]["lines"].values()] == [[[0.1, 0.7], [0.25, 0.2], [0.9, 0.1]]]
    assert photo["maps"][1]["mark"] == [0.25, 0.2]


def test_grids_and_walks_are_the_runs_own(gan):
    """Frames are the grids without captions, copies of files are none, walks begin with samples."""
    shutil.copy(gan / "samples/epoch_002.png", gan / "samples/epoch_002 copy.png")
    shutil.copy(gan / "samples/epoch_002.png", gan / "samples/epoch_1000.png")
    data = show(gan)
    assert [frame["epoch"] for frame in data["frames"]] == [*range(EPOCHS), 1000]
    grid = np.asarray(Image.open(gan / "samples/epoch_104.png"))[:-22, :, 0]
    assert np.array_equal(decode(data["frames"][104]["picture"]).repeat(2, 0).repeat(2, 1), grid)
    assert data["panels"] == [("d_loss", "g_loss"), ("d_real", "d_fake"), ("fid",)]
    assert data["levels"] == {"fid": 0.5}

    state = torch.load(gan / "checkpoint.pt", weights_only=True)
    args = Namespace(**state["args"])
    generator, _ = train_dcgan.make_networks(args, 1, 2)
    generator.load_state_dict(state["ema"])
    z = train_dcgan.draw_z(64, args, make_rng("cpu", args.seed))[:16]
    samples = (next(train_dcgan.generate(generator, z)) * 255).round().numpy()  # (16, 1, 28, 28)
    assert np.ptp(samples, 0).max() > 100  # they differ
    strip = decode(data["walks"][0]["picture"])
    assert strip.shape == ((3 * data["walks"][0]["leg"] + 1) * 28, 16 * 28)
    for rows in (strip[:28], strip[-28:]):
        assert np.abs(rows - samples[:, 0].swapaxes(0, 1).reshape(28, -1)).max() <= 1


def test_walks_are_smooth_and_return():
    """Each passes other noise vectors in small steps and ends where it began."""
    z = torch.randn(16, 100, generator=make_rng("cpu", 0))
    walks = report.make_walks(z, train_dcgan.interpolate).view(-1, 16, 100)
    assert torch.equal(walks[-1], z)
    assert torch.allclose(walks[report.LEGS], z.roll(1, 0), atol=1e-5)
    assert (walks[1:] - walks[:-1]).norm(dim=2).max() < 0.2 * z.norm(dim=1).max()


def test_many_grids_are_thinned(gan, monkeypatch):
    """Of more epochs than a page holds the first and the last are kept, and the page says so."""
    monkeypatch.setitem(report.MOST, "grids", 3)
    data = show(gan)
    assert [frame["epoch"] for frame in data["frames"]] == [0, 52, 104]
    assert "3 of 105 grids" in data["notes"][0]


def test_tables_pictures_and_numbers_of_other_runs(table, tmp_path):
    """What the page has no controls for is shown as it is; an animation stays one."""
    data = show(table)
    assert data["tables"] == [{"head": ["method", "deletion", "evaluations"], "rows": [
        ["RISE", "0.200 ± 0.010", "500"], ["edges", "0.312 ± 0.020", "0"],
        ["Grad-CAM", "0.100 ± 0.030", "–"]]}]  # fmt: skip
    assert [picture["name"] for picture in data["pictures"]] == ["contact_sheet.png", "curves.png"]
    assert np.array_equal(decode(data["pictures"][1]["picture"]), Image.open(table / "curves.png"))

    found = {"gaps": {"a": 0.25, "b": {"c": [1, 2.5]}}, "count": 7, "long": [0] * 99, "failed": {}}
    folder = write_run(tmp_path / "other", "my_copy", **found)
    save_gif(folder / "a.gif", [np.full((8, 8, 3), level, np.uint8) for level in (0, 80, 160)])
    data = show(folder)
    assert data["numbers"] == {
        "gaps": [["a", "0.25"], ["b, c", "1, 2.5"]], "results": [["count", "7"]]}  # fmt: skip
    gif = base64.b64decode(data["pictures"][0]["picture"].partition(",")[2])
    assert Image.open(io.BytesIO(gif)).n_frames == 3


# ------------------------------------------------------------------- which script, which command


@pytest.mark.parametrize(("script", "line"), [
    (smoothgrad, "--image sample:coffee"),
    (smoothgrad, "--image a.jpg 'b c.jpg' --noise 0 0.25 --reduce abs --converge 0.9 --gif"),
    (train_classifier, "--no-flip --lr 0.3 --dataset cifar10 --width 2"),
    (train_dcgan, "--no-linear-bn --lr 0.003 --dataset mnist --amp -n 7 --epochs 3")])  # fmt: skip
def test_the_command_repeats_the_run(script, line, tmp_path):
    """Parsed again, it gives the same arguments; of defaults it names the photo only."""
    parser = script.get_parser()
    args = parser.parse_args([*shlex.split(line), "--out", "somewhere"])
    data = show(write_run(tmp_path / "run", script.SCRIPT, vars(args)))
    python, file, *words = shlex.split(data["command"])
    assert (python, file, data["title"]) == ("python", f"{script.SCRIPT}.py", f"{script.SCRIPT}.py")
    flags = [word for word in words if word.startswith("-")]
    assert sorted(flags) == sorted(word for word in shlex.split(line) if word.startswith("-"))
    args.out = None
    assert parser.parse_args(words) == args
    assert script.__doc__.startswith(data["lead"])


def test_a_copy_keeps_its_own_name(gan):
    """Neither another script nor its networks are taken for those that ran."""
    copy = {"script": "common", "command": "python common.py --lr 3"}  # that can be imported
    edit(gan, lambda metrics: metrics.update(copy))
    data = show(gan)
    assert (data["title"], data["command"]) == ("common.py", "python common.py --lr 3")
    assert (data["lead"], data["walks"], len(data["frames"])) == ("", [], EPOCHS)
    assert "train_dcgan" not in json.dumps(data)


def test_older_runs(maps):
    """Of a run without "script" the command tells it; flags that are gone leave it as typed."""
    edit(maps, lambda metrics: metrics.pop("script"))
    edit(maps, lambda metrics: metrics["args"].update(html=False))
    data = show(maps)
    assert data["title"] == "smoothgrad.py"
    assert data["command"] == "python smoothgrad.py --model vgg --image 'a b.jpg'"
    edit(maps, lambda metrics: metrics["args"].update(html=True))
    assert show(maps)["command"] == "python smoothgrad.py --as typed"


# ------------------------------------------------------------------------ wrong, gone and damaged


@pytest.mark.parametrize("harm", [
    shutil.rmtree,
    lambda folder: (folder / "metrics.json").unlink(),
    lambda folder: (folder / "metrics.json").write_text('{"script": "smoothgrad", "ar'),
    lambda folder: (folder / "metrics.json").write_text("[1, 2]"),
    lambda folder: (folder / "metrics.json").write_text("[" * 100_000),
    lambda folder: (folder / "report.html").mkdir()])  # fmt: skip
def test_a_mistake_is_one_line(harm, table, monkeypatch, capsys):
    """Exit code 2, one line on stderr, nothing written."""
    harm(table)
    monkeypatch.setattr(sys, "argv", ["report.py", str(table)])
    assert report.exit_code(report.main) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"report.py: error: {table}")
    assert error.count("\n") == 1
    assert ".part" not in error  # a name that nobody gave
    assert not (table / "report.html").is_file()


def spoil(file):
    """Cut a file in two."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def spoil_maps(folder):
    """Of the first photo's three maps leave a good one."""
    with np.load(folder / "ant.npz") as file:
        arrays = {"photo": file["photo"], "noise_0": file["noise_0"]}
    np.savez(folder / "ant.npz", **arrays, noise_300=np.full((3, 16, 16), np.nan))


@pytest.mark.parametrize(("harm", "photos", "said"), [
    (lambda folder: (folder / "ant.npz").unlink(), ["bee"], "1 of the photos"),
    (lambda folder: spoil(folder / "bee.npz"), ["ant"], "1 of the photos"),
    (lambda folder: edit(folder, lambda metrics: metrics["images"].insert(0, None)),
     ["ant", "bee"], "1 of the images"),
    (lambda folder: edit(folder, lambda metrics: metrics["images"][0].pop("panel")),
     ["bee"], "1 of the photos"),
    (spoil_maps, ["ant", "bee"], "2 of the maps")])  # fmt: skip
def test_what_is_gone_costs_itself_only(harm, photos, said, maps):
    """A photo, a record or a map leaves out itself, and the page counts it."""
    harm(maps)
    data = show(maps)
    assert [photo["name"] for photo in data["photos"]] == photos
    assert said in data["notes"][0]


@POSIX
def test_a_pipe_is_not_read(maps):
    """Nobody writes to it: it would hang."""
    (maps / "ant.npz").unlink()
    os.mkfifo(maps / "ant.npz")
    assert [photo["name"] for photo in show(maps)["photos"]] == ["bee"]


def test_broken_pictures_cost_themselves_only(gan, masks, table):
    """So do grids, checkpoints, perturbed photos and other pictures, whatever is in their place."""
    spoil(gan / "samples/epoch_003.png")
    Image.new("RGB", (40, 62)).save(gan / "samples/epoch_104.png", "PCX")  # not one of our formats
    (gan / "checkpoint.pt").unlink()
    data = show(gan)
    assert [frame["epoch"] for frame in data["frames"]] == [0, 1, 2, *range(4, 104)]
    assert data["walks"] == []
    assert "2 of the grids, 1 of the walks" in data["notes"][0]

    (masks / "ant_perturbed.png").unlink()
    data = show(masks)
    assert (data["photos"][0]["after"], len(data["photos"][0]["maps"])) == (None, 2)
    assert "1 of the pictures" in data["notes"][0]

    spoil(table / "curves.png")
    edit(table, lambda metrics: metrics.update(table={"RISE": 3}))
    data = show(table)
    assert [picture["name"] for picture in data["pictures"]] == ["contact_sheet.png"]
    assert "1 of the tables, 1 of the pictures" in data["notes"][0]


# ---------------------------------------------------------------------------- in a real browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge",
            "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
            r"C:\Program Files\Google\Chrome\Application\chrome.exe")  # fmt: skip
DESK = {"width": 1280, "height": 1600, "deviceScaleFactor": 1, "mobile": False}
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}


@pytest.fixture(scope="module")
def driver():
    """Start a headless Chromium, without a network to load anything from."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not path:
        pytest.skip("no Chromium or Chrome on this machine; Debian: apt install chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = path
    for word in ("--headless=new", "--disable-dev-shm-usage", "--force-device-scale-factor=1",
                 "--host-resolver-rules=MAP * ~NOTFOUND"):  # fmt: skip
        options.add_argument(word)
    if sys.platform == "linux":  # as root in a container there is no sandbox to be had
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))  # None: selenium looks for one
    with webdriver.Chrome(options, service) as driver:
        yield driver


class Visit:
    """A visitor with a keyboard, on the page of a run."""

    def __init__(self, driver, folder, screen=DESK):
        show(folder)
        self.driver = driver
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        driver.get((folder / "report.html").as_uri())
        for canvas in ("map", "frame"):  # blank until its pictures are decoded
            if self.find(f"#{canvas}").is_displayed():
                self.wait(lambda c=canvas: self.pixels(c).any())

    def wait(self, condition):
        """Wait until something holds."""
        WebDriverWait(self.driver, 20).until(lambda _: condition())

    def run(self, script):
        """Ask the page something, in its own language."""
        return self.driver.execute_script(f"return {script}")

    def find(self, css):
        """Find an element."""
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def text(self, css):
        """Read an element's text, shown or not."""
        return self.run(f"document.querySelector({json.dumps(css)}).textContent.toWellFormed()")

    def places(self, css, side):
        """Read a coordinate of each element of a chart."""
        return self.run(f"[...document.querySelectorAll('{css}')].map("
                        f"(one) => Number(one.getAttribute('{side}')))")  # fmt: skip

    def pixels(self, canvas):
        """Read a canvas: (H, W, 3), black where nothing has been drawn."""
        picture = decode(self.run(f"document.getElementById('{canvas}').toDataURL()"))
        return np.asarray(Image.fromarray(picture).convert("RGBA"))[..., :3]

    def press(self, css, *keys):
        """Focus an element and press keys."""
        self.find(css).send_keys(*keys)

    def complaints(self):
        """Return what the browser's console says."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


def test_browser_gan(driver, gan):
    """It opens on the last epoch; the slider and Play move samples, numbers and rings."""
    visit = Visit(driver, gan)
    data = show(gan)
    for key, epoch in ((None, 104), (Keys.ARROW_LEFT, 103), (Keys.HOME, 0), (Keys.RIGHT, 1)):
        if key:
            visit.press("#epoch", key)
        assert visit.text('output[for="epoch"]') == str(epoch)
        samples = decode(data["frames"][epoch]["picture"])
        assert np.array_equal(visit.pixels("frame")[..., 0], samples)
        loss = "–" if epoch == 0 else f"{2 - epoch / 100:.3g}"
        assert visit.text("#numbers dd:nth-of-type(2)") == loss
        assert visit.run("document.querySelectorAll('#curves .mark').length") == 4 * (epoch > 0)
    visit.press("#play", Keys.ENTER)
    visit.wait(lambda: int(visit.text('output[for="epoch"]')) > 3)
    visit.press("#play", Keys.ENTER)
    assert visit.text("#play") == "Play"
    assert visit.complaints() == []


def test_browser_walks(driver, gan):
    """Walks begin with the samples, go elsewhere, and come back."""
    visit = Visit(driver, gan)
    strip = decode(show(gan)["walks"][0]["picture"])
    visit.wait(lambda: np.array_equal(visit.pixels("walk")[:28, :28, 0], strip[:28, :28]))
    visit.press("#step", Keys.ARROW_RIGHT)
    assert np.array_equal(visit.pixels("walk")[30:58, :28, 0], strip[28:56, 4 * 28 : 5 * 28])
    visit.press("#step", Keys.END)
    assert visit.text('output[for="step"]') == "start"
    assert np.array_equal(visit.pixels("walk")[:28, :28, 0], strip[-28:, :28])
    assert visit.complaints() == []


def test_browser_charts_of_odd_numbers(driver, gan):
    """What leaves 0 to 1 stays within its chart; what can't be drawn costs its own chart only."""
    rows = [{"epoch": epoch, "d_loss": None, "g_loss": float("nan"), "d_real": 3.0 - epoch,
             "fid": 2.0 - epoch, "precision": 0.2, "huge": [1e308, -1e308][epoch % 2],
             "odd": 10**400, "far": 1.5e16 + epoch} for epoch in range(1, 5)]  # fmt: skip
    for floor in (0, float("nan"), None, "none", 0.5):
        fid = {"floor": {"fid": floor}}
        edit(gan, lambda metrics, fid=fid: metrics.update(epochs=rows, fid=fid))
        visit = Visit(driver, gan)
        charts = driver.find_elements(By.CSS_SELECTOR, "#curves svg")
        names = [chart.get_attribute("aria-label").split(" against")[0] for chart in charts]
        assert names == ["D(x), on data", "classifier-FID", "precision", "far"]
        heights = visit.places("#curves circle", "cy")
        assert len(heights) == 16
        assert 0 < min(heights) < max(heights) < 300
        assert visit.text('output[for="epoch"]') == "104"
        assert visit.find("#command").is_displayed()
        assert visit.complaints() == []


def test_browser_map_controls(driver, maps):
    """Opacity and percentile change the overlay; map and photo are chosen by arrow keys."""
    visit = Visit(driver, maps)
    photos = show(maps)["photos"]
    levels = (decode(photos[0]["maps"][1]["levels"]) / 255) ** 2  # it opens on the first noise
    inferno = np.frombuffer(base64.b64decode(show(maps)["colours"]), np.uint8).reshape(256, 3)
    visit.press("#opacity", Keys.HOME)
    assert np.array_equal(visit.pixels("map"), decode(photos[0]["photo"]))
    visit.press("#opacity", Keys.END)
    visit.press("#cut", Keys.END)
    assert np.array_equal(visit.pixels("map"), inferno[(255 * levels).round().astype(int)])
    visit.press("#cut", Keys.HOME)
    assert (visit.pixels("map") == inferno[255]).all(2).mean() == pytest.approx(0.5, abs=0.02)
    seen = visit.pixels("map")
    visit.press("#maps input:checked", Keys.ARROW_RIGHT)
    assert not np.array_equal(visit.pixels("map"), seen)
    assert "3.500" in visit.text("#facts")
    assert visit.run("document.querySelectorAll('#chart .mark').length") == 1
    assert max(visit.places("#chart circle", "cx")) < 460
    visit.press("#photos input:checked", Keys.ARROW_RIGHT)
    assert visit.text("#maps input:checked + span") == "300 %"
    assert (visit.text("#name"), visit.text("#path")) == ("bee", "bee.jpg, vgg")
    visit.press("#opacity", Keys.HOME)
    visit.wait(lambda: np.array_equal(visit.pixels("map"), decode(photos[1]["photo"])))
    assert visit.complaints() == []


def test_browser_wipe(driver, masks, maps):
    """Keys and the pointer move the edge between before and after, or between two maps."""
    visit = Visit(driver, masks)
    (photo,) = show(masks)["photos"]
    before, after = decode(photo["photo"]), decode(photo["after"])
    visit.press("#edge", Keys.HOME)
    assert np.array_equal(visit.pixels("wipe"), after)
    visit.press("#edge", Keys.END)
    assert np.array_equal(visit.pixels("wipe"), before)
    wipe = visit.find("#wipe")
    quarter = wipe.size["width"] // 4
    move = webdriver.ActionChains(driver).move_to_element_with_offset(wipe, quarter, 0)
    move.click_and_hold().move_by_offset(-2 * quarter, 0).release().perform()
    assert visit.text('output[for="edge"]') == "25 %"
    assert np.array_equal(visit.pixels("wipe")[:, :2], before[:, :2])
    assert np.array_equal(visit.pixels("wipe")[:, 6:], after[:, 6:])

    visit = Visit(driver, maps)
    visit.press("#maps input:checked", Keys.ARROW_LEFT)  # to the first map
    visit.press("#edge", Keys.END)
    assert np.array_equal(visit.pixels("wipe"), visit.pixels("map"))
    spoil_maps(maps)  # one map is left: nothing to compare
    visit = Visit(driver, maps)
    assert visit.text("#maps") == "none"
    assert not visit.find("#before-after").is_displayed()
    assert visit.complaints() == []


def test_browser_table(driver, table):
    """A click on a column's name sorts the methods by it; pictures are shown."""
    visit = Visit(driver, table)
    first = "#methods tbody tr:first-child th"
    visit.press("#methods th:nth-child(2) button", Keys.ENTER)
    assert visit.text(first) == "Grad-CAM"
    visit.press("#methods th:nth-child(2) button", Keys.ENTER)
    assert visit.text(first) == "edges"
    visit.press("#methods th:first-child button", Keys.ENTER)
    assert visit.text("#methods tbody tr:last-child th") == "RISE"
    assert visit.run("[...document.images].map((one) => one.naturalWidth)") == [12, 900]
    assert visit.complaints() == []


def test_browser_phone(driver, any_run):
    """At the width of a phone nothing sticks out, and a name is read, not run."""
    edit(any_run, lambda metrics: metrics.update(args={"model": HOSTILE}, lost=HOSTILE))
    visit = Visit(driver, any_run, PHONE)
    visit.run("document.querySelectorAll('details').forEach((one) => one.open = true)")
    assert visit.run("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    assert HOSTILE[:60] in visit.text("#arguments")
    assert HOSTILE[:60] in visit.text("#results")
    assert visit.run("document.scripts.length") == 2
    assert visit.complaints() == []
