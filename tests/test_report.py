"""The page of a run: what it holds, what names can do to it, and how it answers in a browser."""

import base64
import io
import json
import re
import shlex
import shutil
import sys
from argparse import Namespace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

import common.report
import explain_perturb
import smoothgrad
import train_dcgan
from common.report import LEGS, TEMPLATE, gan_page, make_walks, photos_page, repeat_command

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(1)">&lt;\u2028\udcff{{data}}'


class Page(HTMLParser):
    """What a page consists of: its elements with their attributes, and the text of its scripts."""

    def __init__(self, folder):
        super().__init__()
        self.elements, self.scripts = [], []
        self.text = (folder / "report.html").read_text(encoding="utf-8")
        self.feed(self.text)
        self.close()
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attributes):
        """Note an element."""
        self.elements.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        """Add up the text of a script."""
        if self.elements and self.elements[-1][0] == "script":
            self.scripts[-1] += data

    def having(self, attribute):
        """Give all values of an attribute, as often as they occur."""
        return [found[attribute] for _, found in self.elements if attribute in found]


def decode(uri):
    """Read a picture from its data URI."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


@pytest.fixture(scope="module")
def maps(trained, photos, tmp_path_factory):
    """Run smoothgrad.py on all photos."""
    folder = tmp_path_factory.mktemp("runs") / "maps"
    words = ["--model", trained, "--image", photos, "--samples", 12, "--html", "--out", folder]
    return folder, smoothgrad.main([str(word) for word in words])


@pytest.fixture(scope="module")
def masks(trained, photos, tmp_path_factory):
    """Run explain_perturb.py on all photos."""
    folder = tmp_path_factory.mktemp("runs") / "masks"
    words = ["--model", trained, "--image", photos, "--iterations", 3, "--mask-size", 4,
             "--html", "--out", folder]  # fmt: skip
    return folder, explain_perturb.main([str(word) for word in words])


@pytest.fixture(scope="module")
def gan(tmp_path_factory):
    """Train a tiny GAN for six epochs."""
    folder = tmp_path_factory.mktemp("runs") / "gan"
    words = ["--dataset", "glyphs", "--glyphs", 32, "--batch-size", 16, "--width", 0.0625,
             "--lr", 0.02, "--epochs", 6, "--data-dir", folder.parent, "--out", folder,
             "--html"]  # fmt: skip
    return folder, train_dcgan.main([str(word) for word in words])


@pytest.fixture(params=["maps", "masks", "gan"])
def any_run(request):
    """Give the folder and the metrics of each kind of run in turn."""
    return request.getfixturevalue(request.param)


# ------------------------------------------------------------------------- without a browser


def test_the_page_is_one_of_the_runs_files(any_run):
    """It is there, it is named, and it is small."""
    folder, metrics = any_run
    assert "report.html" in metrics["files"]
    assert 20_000 < (folder / "report.html").stat().st_size < 1_000_000


def test_without_the_flag_there_is_no_page(trained, photos, tmp_path):
    """A page is made for who asks for it."""
    words = ["--model", trained, "--image", photos / "ant.png", "--samples", 2, "--out", tmp_path]
    assert "report.html" not in smoothgrad.main([str(word) for word in words])["files"]


def test_the_page_loads_nothing(any_run):
    """No element, style or script names an address; the page's own policy forbids it as well."""
    page = Page(any_run[0])
    kinds = ("src", "href", "action", "data", "srcset")
    addresses = [address for kind in kinds for address in page.having(kind)]
    assert addresses == ["data:,"]  # the icon, which browsers would ask for otherwise
    assert not re.search(r"url\(|@import", page.text)
    script = page.scripts[1]
    assert not re.search(r"fetch|XMLHttpRequest|WebSocket|import\(|sendBeacon|eval", script)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write", script)
    found = re.findall(r"https?://[^\"'\s]*", page.text.replace(page.scripts[0], ""))
    assert found == ["http://www.w3.org/2000/svg"]  # the name of a language, which nobody loads
    (policy,) = [p for p in page.having("content") if "default-src" in p]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_every_control_is_named(any_run):
    """A slider has its label and its output, a group its legend, a picture its words."""
    page = Page(any_run[0])
    ids = page.having("id")
    assert len(ids) == len(set(ids))
    sliders = [found["id"] for tag, found in page.elements if tag == "input"]
    labels = [found["for"] for tag, found in page.elements if tag == "label"]
    outputs = [found["for"] for tag, found in page.elements if tag == "output"]
    assert len(sliders) == 5
    assert sorted(sliders) == sorted(labels) == sorted(outputs)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("fieldset") == tags.count("legend") == 2
    for tag, found in page.elements:
        assert tag != "canvas" or found.get("role") == "img" or found.get("aria-hidden") == "true"
    assert ("html", {"lang": "en"}) in page.elements
    assert page.having("aria-live") == ["polite"]


def test_the_script_finds_its_elements():
    """Whatever it asks for by its id is in the page."""
    text = TEMPLATE.read_text(encoding="utf-8")
    ids = set(re.findall(r'\bid="([^"]+)"', text))
    asked = set(re.findall(r'\bat\("([^"]+)"\)', text)) | set(re.findall(r'slider\("(\w+)"', text))
    assert asked <= ids
    assert ids - asked <= {"data"}


def test_hostile_names_stay_text(maps, tmp_path):
    """A photo or a class can be called anything: the page's structure stays as it was."""
    folder, metrics = maps
    images = [image | {"path": HOSTILE, "class_name": HOSTILE} for image in metrics["images"]]
    args = Namespace(**metrics["args"] | {"image": [HOSTILE]})
    tame = Page(folder)
    shutil.copytree(folder, tmp_path / "run")
    photos_page(tmp_path / "run", "smoothgrad", args, smoothgrad.get_parser(), images)
    page = Page(tmp_path / "run")
    assert page.elements == tame.elements
    assert page.scripts[1] == tame.scripts[1]
    assert not re.search("[<>&]", page.scripts[0])
    assert page.data["photos"][0]["path"] == page.data["photos"][0]["name"] == HOSTILE
    assert page.data["arguments"]["image"] == [HOSTILE]


def test_maps_are_the_runs_own(maps):
    """Read back from the page and cut at the 99th percentile, a map is the one in the folder."""
    folder, metrics = maps
    page = Page(folder)
    assert [p["name"] for p in page.data["photos"]] == [i["class_name"] for i in metrics["images"]]
    for photo, stem in zip(page.data["photos"], ("ant", "bee", "cat"), strict=True):
        with np.load(folder / f"{stem}.npz") as arrays:
            pixels = decode(photo["photo"]) / 255
            assert np.abs(pixels - arrays["photo"].transpose(1, 2, 0)).max() < 0.003
            names = {"none": "noise_0", "10 %": "noise_10", "30 %": "noise_30"}
            assert [m["name"] for m in photo["maps"]] == list(names)
            for found in photo["maps"]:
                heat = smoothgrad.to_heatmap(torch.tensor(arrays[names[found["name"]]])[None])[0]
                levels = decode(found["levels"])
                assert levels.dtype == np.uint8
                part = (levels / 255) ** 2
                cut = (part / np.quantile(part, 0.99)).clip(0, 1)
                assert np.abs(cut - heat.numpy()).max() < 0.01
    facts = page.data["photos"][1]["maps"][2]["facts"]
    record = metrics["images"][1]["maps"][2]
    assert facts["reliability of the map"] == f"{record['reliability']:.3f}"
    assert facts["without random 10 %"] == f"{100 * record['probability_left_random']:.1f} %"
    assert page.data["photos"][1]["chart"]["marks"][2] == [0.3, record["probability_left"]]


def test_masks_are_the_runs_own(masks):
    """What was deleted, what is left, and the curve, are those of the folder."""
    folder, metrics = masks
    for photo, record in zip(Page(folder).data["photos"], metrics["images"], strict=True):
        stem = Path(record["path"]).stem
        after = np.asarray(Image.open(folder / f"{stem}_perturbed.png"))
        assert np.array_equal(decode(photo["after"]), after)
        with np.load(folder / f"{stem}.npz") as arrays:
            deleted = (decode(photo["maps"][0]["levels"]) / 255) ** 2
            assert np.abs(deleted - (1 - arrays["mask"])).max() < 0.005
        assert list(photo["chart"]["lines"].values()) == [record["curve"]]
        assert photo["chart"]["marks"][0] == [record["area"], record["probability_after"]]
        assert photo["maps"][0]["facts"]["deleted area"] == f"{100 * record['area']:.1f} %"


def test_large_maps_are_averaged(maps, tmp_path):
    """A photo of a large network is shown smaller; a mean over squares keeps what a map says."""
    _, metrics = maps
    rng = np.random.default_rng(0)
    photo, heat = rng.random((3, 700, 700)), rng.random((1, 700, 700))
    np.savez(tmp_path / "ant.npz", photo=photo, noise_0=heat, noise_10=heat, noise_30=heat)
    image = metrics["images"][0]
    args = Namespace(**metrics["args"])
    photos_page(tmp_path, "smoothgrad", args, smoothgrad.get_parser(), [image])
    (photo,) = Page(tmp_path).data["photos"]
    part = (decode(photo["maps"][0]["levels"]) / 255) ** 2
    small = heat[0, :699, :699].reshape(233, 3, 233, 3).mean((1, 3))
    assert photo["side"] == 233
    assert np.corrcoef(part.ravel(), small.ravel())[0, 1] > 0.999
    assert decode(photo["photo"]).shape == (233, 233, 3)


@pytest.mark.parametrize(("limit", "value", "left"), [
    ("MOST_PHOTOS", 2, 2), ("MOST_BYTES", 1, 1), ("MOST_BYTES", 10**9, 3)])  # fmt: skip
def test_the_page_is_bounded(limit, value, left, maps, tmp_path, monkeypatch):
    """Photos past a limit are left out, and the page knows how many there were."""
    folder, metrics = maps
    shutil.copytree(folder, tmp_path / "run")
    monkeypatch.setattr(common.report, limit, value)
    args = Namespace(**metrics["args"])
    photos_page(tmp_path / "run", "smoothgrad", args, smoothgrad.get_parser(), metrics["images"])
    data = Page(tmp_path / "run").data
    assert (len(data["photos"]), data["count"]) == (left, 3)


def test_what_is_gone_is_left_out(maps, tmp_path):
    """A file that somebody removed or damaged costs its photo, not the page."""
    folder, metrics = maps
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "ant.npz").unlink()
    (tmp_path / "run" / "bee.npz").write_bytes(b"PK\x03\x04 no archive")
    args = Namespace(**metrics["args"])
    photos_page(tmp_path / "run", "smoothgrad", args, smoothgrad.get_parser(), metrics["images"])
    data = Page(tmp_path / "run").data
    assert [Path(photo["path"]).stem for photo in data["photos"]] == ["cat"]


@pytest.mark.parametrize(("script", "line"), [
    (smoothgrad, "--image a.jpg 'b c.jpg' --noise 0 0.25 --reduce abs --converge 0.9 --gif --html"),
    (explain_perturb, "--target tabby --areas 0.1 0.5 --regularizer area --lr 0.3"),
    (train_dcgan, "--no-linear-bn --lr 0.003 --dataset mnist --amp -n 7 --epochs 3")])  # fmt: skip
def test_the_command_repeats_the_run(script, line):
    """Parsed again, it gives the same arguments; of defaults it names nothing but the image."""
    parser = script.get_parser()
    args = parser.parse_args([*shlex.split(line), "--out", "somewhere"])
    command = repeat_command(script.SCRIPT, args, script.get_parser())
    python, file, *words = shlex.split(command)
    assert (python, file) == ("python", f"{script.SCRIPT}.py")
    flags = [word for word in words if word.startswith("-")]
    wanted = {word for word in shlex.split(line) if word.startswith("-")}
    wanted |= {"--image"} if "image" in args else set()  # sample:coffee is named as well
    assert sorted(flags) == sorted(wanted)
    args.out = None
    assert parser.parse_args(words) == args


def test_a_finished_run_gets_its_page_by_resume(maps, gan, tmp_path):
    """Nothing is computed again, and the page is that of the run; its command is a whole one."""
    folder, _ = maps
    whole = Page(folder)
    shutil.copytree(folder, tmp_path / "maps")
    (tmp_path / "maps" / "report.html").unlink()
    smoothgrad.main(["--resume", str(tmp_path / "maps"), "--html"])
    page = Page(tmp_path / "maps")
    assert page.data["photos"] == whole.data["photos"]
    assert page.data["command"] == whole.data["command"]

    shutil.copytree(gan[0], tmp_path / "gan")
    (tmp_path / "gan" / "report.html").unlink()
    train_dcgan.main(["--resume", str(tmp_path / "gan"), "--html"])
    assert Page(tmp_path / "gan").data["frames"] == Page(gan[0]).data["frames"]
    assert Page(tmp_path / "gan").data["walk"] == Page(gan[0]).data["walk"]


def test_samples_get_a_page_of_their_own(gan, tmp_path):
    """It has the training's curves, and walks that begin with the samples; no frames."""
    words = ["--sample", str(gan[0]), "-n", "20", "--seed", "3", "--html", "--out", str(tmp_path)]
    assert "report.html" in train_dcgan.main(words)["files"]
    data = Page(tmp_path).data
    assert (data["frames"], data["epochs"]) == ([], gan[1]["epochs"])
    assert data["walk"]["columns"] == 16
    first = decode(data["walk"]["picture"])[:28].reshape(28, 16, 28).swapaxes(0, 1)
    with np.load(tmp_path / "samples.npz") as file:
        assert np.array_equal(first, file["images"][:16, 0])
    again = shlex.split(data["command"])[2:]
    assert again[again.index("--sample") + 1] == str(gan[0])


def test_frames_are_the_grids(gan):
    """Each is the grid of its epoch without its caption; halved, as each pixel was four."""
    folder, metrics = gan
    data = Page(folder).data
    assert [frame["epoch"] for frame in data["frames"]] == list(range(7))
    for frame in data["frames"]:
        file = folder / f"samples/epoch_{frame['epoch']:03d}.png"
        grid = np.asarray(Image.open(file))[:-22, :, 0]
        picture = decode(frame["picture"])
        assert picture.shape == tuple(data["size"][::-1])
        assert np.array_equal(picture.repeat(2, 0).repeat(2, 1), grid)
    assert data["epochs"] == metrics["epochs"]
    assert data["panels"] == [["d_loss", "g_loss"], ["d_real", "d_fake"]]


@pytest.mark.parametrize("channels", [1, 3])
def test_many_frames_are_thinned(channels, gan, tmp_path, monkeypatch):
    """Of more epochs than a page holds the first and the last are kept; colours, too."""
    folder, metrics = gan
    shutil.copytree(folder / "samples", tmp_path / "samples")
    for file in (tmp_path / "samples").iterdir():
        grid = np.array(Image.open(file))
        if channels == 3:
            grid[..., 1] //= 2
        Image.fromarray(grid).save(file)
    monkeypatch.setattr(common.report, "MOST_FRAMES", 3)
    walks = torch.rand((3 * LEGS + 1) * 4, channels, 28, 28)
    args = Namespace(**metrics["args"])
    gan_page(tmp_path, "train_dcgan", args, train_dcgan.get_parser(), metrics["epochs"],
             [("d_loss",), ("fid",)], None, walks)  # fmt: skip
    data = Page(tmp_path).data
    assert ([frame["epoch"] for frame in data["frames"]], data["count"]) == ([0, 3, 6], 7)
    assert data["panels"] == [["d_loss"]]
    assert decode(data["frames"][0]["picture"]).shape[2:] == (() if channels == 1 else (3,))
    # Walk after walk, step below step.
    sheet = decode(data["walk"]["picture"]).reshape(3 * LEGS + 1, 28, 4, 28, -1)
    wanted = (walks.view(-1, 4, channels, 28, 28) * 255).round().byte()
    assert np.array_equal(sheet[5, :, 3], wanted[5, 3].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("latent", ["normal", "uniform"])
def test_walks_return_to_their_beginning(latent):
    """Each passes two other noise vectors; normal noise never gets shorter on the way."""
    z = torch.randn(16, 100, generator=torch.Generator().manual_seed(0))
    walks = make_walks(z, latent).view(-1, 16, 100)
    assert len(walks) == 3 * LEGS + 1
    for step, stop in ((0, z), (LEGS, z.roll(1, 0)), (2 * LEGS, z.roll(3, 0)), (-1, z)):
        assert torch.allclose(walks[step], stop, atol=1e-5)
    steps = (walks[1:] - walks[:-1]).norm(dim=2)
    assert steps.max() < 0.2 * z.norm(dim=1).max()
    if latent == "normal":
        assert walks.norm(dim=2).min() > 0.95 * z.norm(dim=1).min()


# ---------------------------------------------------------------------------- in a real browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge",
            "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
            r"C:\Program Files\Google\Chrome\Application\chrome.exe")  # fmt: skip
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
                 "--window-size=1200,1600", "--host-resolver-rules=MAP * ~NOTFOUND"):  # fmt: skip
        options.add_argument(word)
    if sys.platform == "linux":  # as root in a container there is no sandbox to be had
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))  # None: selenium looks for one
    with webdriver.Chrome(options, service) as driver:
        yield driver


class Visit:
    """A visitor with a keyboard, on one page.

    :param selenium.webdriver.Chrome driver: the browser
    :param pathlib.Path folder: the run folder
    :param dict screen: of a phone, as Chromium's Emulation.setDeviceMetricsOverride takes it
    :param str scheme: "light" or "dark"
    """

    def __init__(self, driver, folder, screen=None, scheme="light"):
        self.driver = driver
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        if screen:
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            driver.execute_cdp_cmd("Emulation.setCPUThrottlingRate", {"rate": 4})
        else:
            driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
            driver.execute_cdp_cmd("Emulation.setCPUThrottlingRate", {"rate": 1})
        driver.get((folder / "report.html").resolve().as_uri())
        canvas = "map" if driver.find_element(By.ID, "photos-page").is_displayed() else "frame"
        WebDriverWait(driver, 20).until(lambda _: self.pixels(canvas).any())
        if canvas == "frame":
            WebDriverWait(driver, 20).until(lambda _: (self.pixels("walk") != 64).any())

    def run(self, script, *arguments):
        """Ask the page something, in its own language."""
        return self.driver.execute_script(f"return {script}", *arguments)

    def find(self, css):
        """Find an element."""
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def text(self, css):
        """Read an element's text, also where it is only for screen readers."""
        return self.run("document.querySelector(arguments[0]).textContent.toWellFormed()", css)

    def pixels(self, canvas):
        """Read a canvas: (H, W, 3)."""
        url = self.run(f'document.getElementById("{canvas}").toDataURL()')
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        return np.asarray(image.convert("RGBA"))[..., :3] * (np.asarray(image)[..., 3:] > 0)

    def press(self, css, *keys):
        """Focus an element and press keys."""
        self.find(css).send_keys(*keys)

    def complaints(self):
        """Give what the browser's console says."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


def inferno(part):
    """Colour a map in [0, 1]."""
    colours = (matplotlib.colormaps["inferno"](range(256))[:, :3] * 255).round()
    return colours[(part * 255).round().astype(int)]


def test_browser_opacity_and_cut(driver, maps):
    """Opaque, the canvas is the map in colours, cut where the slider says; at 0 it is the photo."""
    visit = Visit(driver, maps[0])
    photo = Page(maps[0]).data["photos"][0]
    part = (decode(photo["maps"][1]["levels"]) / 255) ** 2  # the first one with noise
    begun = visit.pixels("map")

    visit.press("#opacity", Keys.HOME)
    assert np.array_equal(visit.pixels("map"), decode(photo["photo"]))
    visit.press("#opacity", Keys.END)
    assert visit.text('output[for="opacity"]') == "100 %"
    opaque = visit.pixels("map")
    wanted = inferno((part / np.sort(part.ravel())[int(0.99 * part.size)]).clip(0, 1))
    assert np.abs(opaque - wanted).mean() < 2
    assert not np.array_equal(opaque, begun)

    visit.press("#cut", Keys.END)
    assert visit.text('output[for="cut"]') == "100"
    whole = visit.pixels("map")
    assert np.array_equal(whole, inferno(part).astype(np.uint8))
    visit.press("#cut", Keys.HOME)
    lower = visit.pixels("map")
    assert lower.astype(int).sum() > 1.2 * whole.astype(int).sum()
    assert (lower == inferno(np.ones(1))).all(2).mean() == pytest.approx(0.5, abs=0.02)
    visit.press("#cut", Keys.ARROW_RIGHT)
    assert visit.text('output[for="cut"]') == "50.5"
    assert visit.complaints() == []


def test_browser_switches(driver, maps):
    """The noise and the photo change by arrow keys; a screen reader hears what is shown now."""
    folder, metrics = maps
    visit, data = Visit(driver, folder), Page(folder).data
    for photo, record in enumerate(metrics["images"]):
        if photo:
            visit.press("#photos input:checked", Keys.ARROW_RIGHT)
        WebDriverWait(driver, 10).until(lambda _: visit.pixels("map").any())
        seen = []  # a canvas is blank from the choice of a photo until its pictures are decoded
        for i in (1, 2, 0):  # it opens on the first map with noise; after the last comes the first
            found = record["maps"][i]
            if i != 1:
                visit.press("#maps input:checked", Keys.ARROW_RIGHT)
            heard, shown = visit.text("#status"), visit.text("#facts")
            for words in (heard, shown):
                assert f"{100 * found['probability_left']:.1f} %" in words
                assert (f"{found['reliability']:.3f}" in words) == (found["noise"] > 0)
            assert record["class_name"] in heard
            assert data["photos"][photo]["maps"][i]["name"] in visit.run(
                'document.getElementById("map").ariaLabel')  # fmt: skip
            assert visit.run('document.querySelectorAll("#chart .mark").length') == 1
            seen.append(visit.pixels("map"))
            assert not any(np.array_equal(seen[-1], other) for other in seen[:-1])
        visit.press("#maps input:checked", Keys.ARROW_RIGHT)
        assert visit.text("#path") == f"{record['path']}, {metrics['args']['model']}"
        assert (visit.text("#low"), visit.text("#high")) == ("low", "high")
    assert visit.complaints() == []


def test_browser_wipe(driver, masks):
    """Keys and the pointer move the edge: on its left is the photo, on its right what is left."""
    folder, metrics = masks
    visit, photo = Visit(driver, folder), Page(folder).data["photos"][0]
    before, after = decode(photo["photo"]), decode(photo["after"])
    visit.press("#edge", Keys.HOME)
    assert np.array_equal(visit.pixels("wipe"), after)
    visit.press("#edge", Keys.END)
    assert np.array_equal(visit.pixels("wipe"), before)
    assert visit.find("#edge").get_attribute("aria-valuetext") == "100 %"
    wipe = visit.find("#wipe")
    width = wipe.size["width"]
    move = webdriver.ActionChains(driver).move_to_element_with_offset(wipe, width // 4, 0)
    move.click_and_hold().move_by_offset(-width // 2, 0).release().perform()
    assert visit.text('output[for="edge"]') == "25 %"
    seen = visit.pixels("wipe")
    assert np.array_equal(seen[:, :2], before[:, :2])
    assert np.array_equal(seen[:, 6:], after[:, 6:])
    areas = {area for area, _ in metrics["images"][0]["curve"]}
    assert visit.run('document.querySelectorAll("#chart tbody tr").length') == len(areas)
    assert visit.complaints() == []


def test_browser_maps_side_by_side(driver, maps):
    """Where nothing was deleted, the first and the last map are compared, as they are drawn."""
    visit = Visit(driver, maps[0])
    visit.press("#maps input:checked", Keys.ARROW_LEFT)  # to the first
    visit.press("#edge", Keys.END)
    assert np.array_equal(visit.pixels("wipe"), visit.pixels("map"))
    visit.press("#maps input:checked", Keys.ARROW_LEFT)  # round to the last
    visit.press("#edge", Keys.HOME)
    assert np.array_equal(visit.pixels("wipe"), visit.pixels("map"))
    visit.press("#opacity", Keys.END)
    assert np.array_equal(visit.pixels("wipe"), visit.pixels("map"))
    assert visit.text("#sides") == "Noise: none on the left, 30 % on the right"
    assert visit.find("#as-above").is_displayed()
    assert visit.complaints() == []


def test_browser_without_noise(driver, maps, tmp_path):
    """Where there is no map but the plain gradient, the page opens on it."""
    folder, metrics = maps
    images = [image | {"maps": image["maps"][:1]} for image in metrics["images"]]
    shutil.copytree(folder, tmp_path / "run")
    args, parser = Namespace(**metrics["args"]), smoothgrad.get_parser()
    photos_page(tmp_path / "run", "smoothgrad", args, parser, images)
    visit = Visit(driver, tmp_path / "run")
    assert visit.text("#maps input:checked + span") == visit.text("#maps") == "none"
    assert f"{100 * images[0]['maps'][0]['probability_left']:.1f} %" in visit.text("#facts")
    assert not visit.find("#before-after").is_displayed()
    assert visit.complaints() == []


def test_browser_ends_of_the_scale(driver, masks):
    """A mask goes from kept to deleted, a ranking from low to high."""
    folder, metrics = masks
    visit, record = Visit(driver, folder), metrics["images"][0]
    for ends in (["kept", "deleted"], ["low", "high"], ["kept", "deleted"]):
        assert [visit.text("#low"), visit.text("#high")] == ends
        visit.press("#maps input:checked", Keys.ARROW_RIGHT)
    assert visit.text("#path") == f"{record['path']}, {metrics['args']['model']}"
    assert not visit.find("#as-above").is_displayed()  # photos, no maps, are compared
    assert visit.complaints() == []


def test_browser_gan(driver, gan):
    """The scrubber shows each epoch's grid and its numbers; play runs to the end; walks walk."""
    folder, metrics = gan
    visit, data = Visit(driver, folder), Page(folder).data
    assert visit.text('output[for="epoch"]') == "6"
    visit.press("#epoch", Keys.HOME)
    for frame in data["frames"]:
        grey = decode(frame["picture"])
        assert np.array_equal(visit.pixels("frame"), np.stack([grey] * 3, 2))
        if epoch := frame["epoch"]:
            loss = metrics["epochs"][epoch - 1]["g_loss"]
            assert float(visit.text("#numbers dd:nth-of-type(2)")) == pytest.approx(loss, rel=0.01)
        marks = visit.run('document.querySelectorAll("#curves .mark").length')
        assert marks == (4 if epoch else 0)
        visit.press("#epoch", Keys.ARROW_RIGHT)
    visit.press("#epoch", Keys.HOME)
    visit.press("#play", Keys.ENTER)
    assert visit.text("#play") == "Pause"
    WebDriverWait(driver, 20).until(lambda _: visit.text("#play") == "Play")
    assert visit.text('output[for="epoch"]') == "6"

    start = visit.pixels("walk")
    sheet = decode(data["walk"]["picture"])
    for i in range(16):
        y, x = (30 * place for place in divmod(i, 4))
        assert np.array_equal(start[y : y + 28, x : x + 28, 0], sheet[:28, 28 * i : 28 * i + 28])
    visit.press("#step", Keys.ARROW_RIGHT)
    assert visit.text('output[for="step"]') == "6.25 % from start to stop 1"
    assert not np.array_equal(visit.pixels("walk"), start)
    visit.press("#step", Keys.END)
    assert visit.text('output[for="step"]') == "start"
    assert np.abs(visit.pixels("walk").astype(int) - start).max() <= 1
    assert visit.complaints() == []


def test_browser_gan_axes(driver, gan, tmp_path):
    """Epochs are whole; parts of 1 are drawn from 0 to 1: noise is no trend there."""
    folder, metrics = gan
    shutil.copytree(folder / "samples", tmp_path / "samples")
    rows = [dict.fromkeys(sum(train_dcgan.PLOTS, ()), 0.5 + epoch / 1000) | {"epoch": epoch}
            for epoch in (1, 2, 3)]  # fmt: skip
    args, walks = Namespace(**metrics["args"]), torch.rand((3 * LEGS + 1) * 4, 1, 28, 28)
    gan_page(tmp_path, "train_dcgan", args, train_dcgan.get_parser(), rows,
             train_dcgan.PLOTS, None, walks)  # fmt: skip
    visit = Visit(driver, tmp_path)
    words = """[...document.querySelectorAll("#curves svg")].map((svg) =>
        [...svg.querySelectorAll(arguments[0])].map((one) => one.textContent))"""
    assert visit.run(words, "[text-anchor=middle]") == [["1", "2", "3"]] * 4
    losses, judged, fid, scores = visit.run(words, "[text-anchor=end]")
    assert judged == scores == ["0", "0.5", "1", "epoch"]
    assert losses == fid == ["0.501", "0.502", "0.503", "epoch"]
    assert visit.complaints() == []


def test_browser_gan_without_epochs(driver, gan, tmp_path):
    """Before the first epoch ends there is nothing to draw, and no heading over it."""
    folder, metrics = gan
    (tmp_path / "samples").mkdir()
    shutil.copy(folder / "samples/epoch_000.png", tmp_path / "samples")
    args, walks = Namespace(**metrics["args"]), torch.rand((3 * LEGS + 1) * 4, 1, 28, 28)
    gan_page(tmp_path, "train_dcgan", args, train_dcgan.get_parser(), [], train_dcgan.PLOTS, None,
             walks)  # fmt: skip
    visit = Visit(driver, tmp_path)
    headings = [found.text for found in driver.find_elements(By.TAG_NAME, "h2")]
    assert [text for text in headings if text] == [
        "The same noise, epoch by epoch", "Between the samples", "To repeat it"]  # fmt: skip
    assert visit.complaints() == []


def luminance(color):
    """Compute the relative luminance of "rgb(r, g, b)" (WCAG 2)."""
    part = np.array([int(word) for word in re.findall(r"\d+", color)[:3]]) / 255
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4) @ (
        0.2126, 0.7152, 0.0722)  # fmt: skip


def test_browser_light_and_dark(driver, any_run):
    """The page follows the system's colours; all text has the contrast that WCAG's AA asks for."""
    backgrounds = []
    for scheme in ("light", "dark"):
        visit = Visit(driver, any_run[0], scheme=scheme)
        colour = "getComputedStyle(document.querySelector(arguments[0])).{}"
        backgrounds.append(visit.run(colour.format("backgroundColor"), "body"))
        for inner, outer in (("h1", "body"), (".lead", "body"), ("h2", "section"), ("code", "code"),
                             ("summary", "section"), (".slider label", "section")):  # fmt: skip
            ink = luminance(visit.run(colour.format("color"), inner))
            paper = luminance(visit.run(colour.format("backgroundColor"), outer))
            high, low = max(ink, paper), min(ink, paper)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, inner)
        fill = luminance(visit.run(colour.format("fill"), "svg text"))
        card = luminance(visit.run(colour.format("backgroundColor"), "section"))
        assert (max(fill, card) + 0.05) / (min(fill, card) + 0.05) >= 4.5
    assert luminance(backgrounds[0]) > 0.8
    assert luminance(backgrounds[1]) < 0.05


def test_browser_phone(driver, any_run):
    """At the width of a phone nothing sticks out, and nothing moves, while loading or later."""
    visit = Visit(driver, any_run[0], PHONE)
    assert visit.run("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    height = "document.documentElement.scrollHeight"
    before = visit.run(height)
    for css in ("#opacity", "#cut", "#edge", "#epoch", "#step"):
        if visit.find(css).is_displayed():
            visit.press(css, Keys.HOME)
    for css in ("#maps input:checked", "#photos input:checked"):
        if visit.find("#photos-page").is_displayed():
            visit.press(css, Keys.ARROW_LEFT)  # to the map without noise, which has fewer numbers
    assert visit.run(height) == before
    shifts = visit.driver.execute_async_script("""
        new PerformanceObserver((list) => arguments[0](list.getEntries().map((one) => one.value)))
          .observe({type: "layout-shift", buffered: true});
        setTimeout(() => arguments[0]([]), 500);""")
    assert sum(shifts) < 0.001
    for slider in visit.driver.find_elements(By.CSS_SELECTOR, "input[type=range], button"):
        assert not slider.is_displayed() or slider.size["height"] >= 32  # for a thumb


def test_browser_phone_lines(driver, any_run):
    """At the width of a phone no word is broken, no label touches its number, no card has a gap."""
    visit = Visit(driver, any_run[0], PHONE)
    lines = """[...document.querySelectorAll(arguments[0])].filter((one) => one.checkVisibility())
        .map((one) => {
            const range = document.createRange();
            range.selectNodeContents(one);
            const boxes = [...range.getClientRects()].filter((box) => box.width);
            return [one.textContent, new Set(boxes.map((box) => Math.round(box.top))).size,
                    range.getBoundingClientRect().left, range.getBoundingClientRect().right];
        })"""
    command = Page(any_run[0]).data["command"]
    visit.run("document.querySelectorAll('details').forEach((one) => one.open = true)")
    assert visit.run("document.documentElement.scrollWidth") == 390
    cells = visit.run(lines, "tr > :first-child, .scroll td")
    assert len(cells) > 20
    assert all(count <= 1 for _, count, _, _ in cells)
    labels, outputs = (visit.run(lines, f".slider {tag}") for tag in ("label", "output"))
    assert len(labels) == len(outputs) > 1
    for label, output in zip(labels, outputs, strict=True):
        assert output[2] - label[3] >= 15, label
    for width in range(150, 340, 10):
        visit.run("(document.getElementById('command').style.width = arguments[0])", f"{width}px")
        words = visit.run(lines, "#command span")
        assert " ".join(word for word, *_ in words) == command
        assert {count for word, count, _, _ in words if len(word) < 13} == {1}
    for _ in visit.driver.find_elements(By.CSS_SELECTOR, "#maps input"):
        visit.press("#maps input:checked", Keys.ARROW_RIGHT)
        bottom = "document.querySelector(arguments[0]).getBoundingClientRect().bottom"
        last = visit.run(bottom, "#facts dd:last-child")
        assert visit.run(bottom, "#facts") == pytest.approx(last, abs=1)


def test_browser_copies_the_command(driver, any_run):
    """One click marks all of it, in as many lines as it may stand: it is copied as one."""
    for screen in (None, PHONE):
        visit, command = Visit(driver, any_run[0], screen), Page(any_run[0]).data["command"]
        visit.find("#command").click()
        assert visit.run("getSelection().toString()") == command
        assert visit.text("#command") == command


def test_browser_every_stop_has_a_name(driver, any_run):
    """Tab leads to all controls in order, and each has a name for a screen reader and a ring."""
    visit = Visit(driver, any_run[0])
    tree = driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {}
    for node in tree:
        properties = {p["name"]: p["value"].get("value") for p in node.get("properties", [])}
        role = node.get("role", {}).get("value")
        if properties.get("focusable") and role not in ("RootWebArea", "generic"):
            assert node["name"]["value"], node
            roles[role] = roles.get(role, 0) + 1
        if role in ("image", "img"):
            assert node["name"]["value"], node
    assert roles["slider"] == (2 if "gan" in str(any_run[0]) else 3)
    stops = []
    for _ in range(40):
        visit.driver.switch_to.active_element.send_keys(Keys.TAB)
        stop = visit.run("document.activeElement.id || document.activeElement.tagName")
        if stop == "BODY":
            break
        ring = visit.run("""[document.activeElement, document.activeElement.nextElementSibling]
            .some((one) => one && getComputedStyle(one).outlineStyle === "solid")""")
        assert ring, stop
        stops.append(stop)
    wanted = ["opacity", "cut", "edge"] if visit.find("#photos-page").is_displayed() else [
        "epoch", "play", "step"]  # fmt: skip
    wanted = [name for name in wanted if visit.find(f"#{name}").is_displayed()] + ["command"]
    assert [stop for stop in stops if stop in wanted] == wanted


def test_browser_hostile_names(driver, maps, tmp_path):
    """What a name holds is read, not run."""
    folder, metrics = maps
    images = [image | {"path": HOSTILE, "class_name": HOSTILE} for image in metrics["images"]]
    shutil.copytree(folder, tmp_path / "run")
    args = Namespace(**metrics["args"] | {"image": [HOSTILE], "target": HOSTILE})
    photos_page(tmp_path / "run", "smoothgrad", args, smoothgrad.get_parser(), images)
    visit = Visit(driver, tmp_path / "run", PHONE)
    assert visit.text("#name").startswith('</script><script>alert(1)</script><img src=x onerror="')
    assert HOSTILE[:60] in visit.text("#command")
    command = Page(tmp_path / "run").data["command"]
    assert visit.text("#command") == command.replace("\udcff", "\ufffd")
    assert visit.run("document.images.length") == 3
    assert visit.run("document.scripts.length") == 2
    assert visit.run("document.documentElement.scrollWidth") == 390
    assert visit.complaints() == []


def test_browser_some_photos_only(driver, maps, tmp_path, monkeypatch):
    """The page says that it doesn't hold all photos, and stays usable without any."""
    folder, metrics = maps
    shutil.copytree(folder, tmp_path / "run")
    args, parser = Namespace(**metrics["args"]), smoothgrad.get_parser()
    monkeypatch.setattr(common.report, "MOST_PHOTOS", 1)
    photos_page(tmp_path / "run", "smoothgrad", args, parser, metrics["images"])
    visit = Visit(driver, tmp_path / "run")
    assert visit.find("#left-out").text.startswith("1 of 3 photos")
    monkeypatch.setattr(common.report, "MOST_PHOTOS", 0)
    photos_page(tmp_path / "run", "smoothgrad", args, parser, metrics["images"])
    driver.get((tmp_path / "run" / "report.html").resolve().as_uri())
    assert visit.find("#left-out").text.startswith("0 of 3 photos")
    assert not visit.find("#map").is_displayed()
    assert visit.find("#command").is_displayed()
    assert visit.complaints() == []
