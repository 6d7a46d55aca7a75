"""The page shows what the run and its data are, is one file, and says what is missing."""

import base64
import html.parser
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from job import config, load_network
from job.batches.device import load_mean
from job.batches.loader import Loader
from job.inference.record import Run
from job.look.augmented import first_crops
from job.look.curves import curves
from job.look.pictures import POINTS, filters, thin
from shards import open_split
from shards.format.split import load_split
from tests.launch import error_lines, python, run


class Page(html.parser.HTMLParser):
    """What is on a page: text, images, tags."""

    def __init__(self, path):
        super().__init__()
        self.words, self.images, self.tags, self.links = [], [], set(), []
        self.source = path.read_text()
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        fields = dict(attributes)
        self.links += [fields[name] for name in ("src", "srcset", "href") if name in fields]
        if tag == "img":
            self.images.append(fields)

    def handle_data(self, data):
        self.words.append(data)


def look(source, out, *options):
    return python("job.look", str(source), "--out", str(out), "--device", "cpu", *map(str, options))


@pytest.fixture(scope="module")
def page(demo_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("look") / "run.html"
    done = look(demo_run, out)
    assert done.returncode == 0, done.stderr
    assert "600 images looked at" in done.stdout and "best.pt" in done.stdout and "note" not in done.stderr
    return Page(out)


def test_a_page_needs_nothing_else(page):
    assert page.links and all(link.startswith("data:image/") for link in page.links)
    assert not {"script", "iframe", "object", "link"} & page.tags
    assert "url(" not in page.source and "@import" not in page.source and len(page.source) < 3e6
    assert all(len(image["alt"]) > 5 for image in page.images) and len(page.images) > 50
    assert "prefers-color-scheme: dark" in page.source and "@media print" in page.source


def test_the_page_of_a_run_has_all_its_parts(page, demo_run, demo_data):
    for words in ("How it learned", "What the network gets", "What the first layer looks for", "What it gets right"):
        assert words in page.text
    for words in ("What it confuses", "Most certain, and right", "Least certain, and wrong", "600 of the 600 of val"):
        assert words in page.text
    summary = json.loads((demo_run / "summary.json").read_text())
    assert f"Of 600 validation images, {summary['best_top1']:.2%} are right at the first guess" in page.text
    # Accuracy of each class and the matrix, against the network itself.
    val, network = open_split(demo_data, "val"), load_network(demo_run, device="cpu")
    guesses = network.predict([sample.image for sample in val], top=1)
    cells = np.zeros((10, 10), int)
    for (guess,), label in zip(guesses, val.labels, strict=True):
        cells[label, guess.label] += 1
    for label, name in enumerate(val.classes):
        right = cells[label, label] / cells[label].sum()
        assert re.search(rf"{re.escape(name)} {right:.1%} [\d.]+% {cells[label].sum()}", page.text), name
    wrong = cells * (1 - np.eye(10, dtype=int))
    label, guess = np.unravel_index(wrong.argmax(), wrong.shape)
    assert f"{val.classes[label]}, taken for {val.classes[guess]} {wrong.max()} images" in page.text


def test_augmented_images_are_those_of_the_first_step(demo_run, demo_data):
    settings = config.from_flat(config.read_flat(str(demo_run / "config.yaml")))
    split = load_split(str(demo_data), "train")
    crops = first_crops(split, settings, 5)
    assert load_mean(split) is not None  # it was subtracted, and added back
    with Loader(split, rank=0, world_size=2, global_batch=32, crop=67, seed=settings.seed, workers=0) as loader:
        batch = next(loader)  # rank 0 of two has the images 0, 2, 4
        assert [crop.label for crop in crops[::2]] == batch.labels[:3].tolist()
        for crop, image, mirrored in zip(crops[::2], batch.images, batch.mirror, strict=False):
            assert np.array_equal(crop.image, (image.flip(1) if mirrored else image).numpy())
            assert crop.mirrored == bool(mirrored) and 0 <= crop.top <= 3 and 0 <= crop.left <= 3
    assert len({crop.mirrored for crop in first_crops(split, settings, 32)}) == 2


def decoded(picture):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.source.partition(",")[2]))))


def test_filters_are_a_grid_of_their_weights():
    weight = np.zeros((4, 3, 2, 2), np.float32)
    weight[1, 0, 0, 1] = 2.0  # red, at row 0, column 1 of filter 1
    weight[2, :, 1, 0] = -3.0
    sheet = decoded(filters(weight, 2, "four filters"))
    assert sheet[3, 3].tolist() == [128, 128, 128, 255]  # zero is grey
    assert sheet[3, 16 + 9].tolist() == [255, 128, 128, 255] and sheet[3, 13].tolist()[3] == 0  # the gap
    below = sheet[-12:]
    assert below[9, 3].tolist() == [0, 0, 0, 255] and below[3, 3].tolist() == [128, 128, 128, 255]


def test_curves_of_a_run_that_started_twice():
    def line(kind, step, **more):
        return {"kind": kind, "step": step, "epoch": 0, "time": 0.0, **more}

    metrics = [
        line("event", 0, event="start"),
        line("train", 10, loss=2.0, lr=0.1),
        line("train", 15, loss=None, lr=0.1),
    ]
    metrics += [line("event", 10, event="start"), line("train", 20, loss=1.0, lr=0.001), line("val", 20, top1=0.5)]
    loss, accuracy, rate = curves(Run("r", {"optim.schedule": "step"}, metrics, {}))
    assert "2 at step 10, 1 at the end" in loss[1] and "started again, 1 time" in loss[1]
    assert "best top-1 is 50.00%, after step 20" in accuracy[1] and "0.1 at the beginning, 0.001" in rate[1]
    assert loss[0].source != loss[0].dark and loss[0].alt
    assert curves(Run("r", {}, [], {})) == []
    x, y = thin([(step, float(step)) for step in range(10 * POINTS)])
    assert len(x) == POINTS and x == y and x[0] == 4.5


def copy_run(demo_run, folder, *leave_out):
    return shutil.copytree(demo_run, folder / "run", ignore=shutil.ignore_patterns(*leave_out))


def test_what_is_missing_is_named(demo_run, demo_data, tmp_path):
    gone = copy_run(demo_run, tmp_path)
    settings = (gone / "config.yaml").read_text()
    (gone / "config.yaml").write_text(settings.replace(str(demo_data), str(tmp_path / "moved")))
    done = look(gone, tmp_path / "x.html")
    page = Page(tmp_path / "x.html")
    assert done.returncode == 0 and "Not everything is on this page" in page.text and "How it learned" in page.text
    assert f"no validation images: no data folder {tmp_path}/moved" in page.text and "first layer" in page.text
    assert "What it gets right" not in page.text and "note: no validation images" in done.stderr
    done = look(gone, tmp_path / "x.html", "--data", demo_data)
    assert done.returncode == 0 and "What it gets right" in Page(tmp_path / "x.html").text and not done.stderr

    shutil.rmtree(gone / "checkpoints")
    assert look(gone, tmp_path / "x.html").returncode == 0
    page = Page(tmp_path / "x.html")
    assert "nothing that needs the network: no checkpoint in" in page.text and "How it learned" in page.text
    (gone / "metrics.jsonl").unlink()
    assert look(gone, tmp_path / "x.html", "--data", demo_data).returncode == 0
    page = Page(tmp_path / "x.html")
    assert "no learning curves" in page.text and "What the network gets" in page.text


def test_a_limit_takes_evenly_spaced_images(demo_run, tmp_path):
    done = look(demo_run, tmp_path / "x.html", "--limit", 70)
    assert done.returncode == 0 and "67 images looked at" in done.stdout  # every ninth
    assert "67 of the 600 of val, evenly spaced" in Page(tmp_path / "x.html").text


def test_the_page_of_shards_and_names_that_are_html(demo_data, tmp_path):
    data = shutil.copytree(demo_data, tmp_path / "data")
    for split in ("train", "val"):
        fields = json.loads((data / f"{split}.json").read_text())
        fields["classes"][3] = "<script>alert('3')</script>\x07" + "x" * 100
        fields["classes"][4] = "$\\frac{1}"  # matplotlib would take it for a formula
        (data / f"{split}.json").write_text(json.dumps(fields))
    done = look(data, tmp_path / "x.html")
    page = Page(tmp_path / "x.html")
    assert done.returncode == 0 and not done.stderr and "3,600 images" in done.stdout
    assert "script" not in page.tags and "<script>alert('3')</script>" in page.text and "\x07" not in page.source
    for words in ("train 3,000 16", "70x70", "Mean image", "Images of train", "Images of val", "Crops for training"):
        assert words in page.text
    assert "All classes have the same number" in page.text and "$\\frac{1}" in page.text
    damaged = data / "val-000002.tar"
    damaged.write_bytes(damaged.read_bytes()[:-5000])
    failed = look(data, tmp_path / "y.html")
    assert failed.returncode == 2 and "ends early" in error_lines(failed)[0] and not (tmp_path / "y.html").exists()


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("TMP/none", [], "no folder"),
        ("TMP", [], "neither a run directory of job.train nor a folder of shards"),
        ("RUN/checkpoints/best.pt", [], "is a file; give the run directory"),
        ("RUN", ["--out", "TMP/no/x.html"], "cannot write"),
        ("RUN", ["--out", "TMP"], "it is a folder"),
        ("RUN", ["--limit", "-1"], "--limit must be 0 or more"),
        ("RUN", ["--checkpoint", "step-7.pt"], "no checkpoint step-7.pt"),
        ("RUN", ["--data", "TMP"], "no shards of split 'train'"),
        ("DATA", ["--data", "TMP"], "--data is for a run directory"),
    ],
)
def test_wrong_use_is_one_line(demo_run, demo_data, tmp_path, source, options, words):
    names = {"RUN": demo_run, "TMP": tmp_path, "DATA": demo_data}
    source, *options = [re.sub("RUN|TMP|DATA", lambda m: str(names[m[0]]), word) for word in (source, *options)]
    done = look(source, tmp_path / "x.html", *options)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert words in error_lines(done)[0] and not list(tmp_path.glob("*.html"))


def test_a_missing_package_says_what_to_install(demo_data, tmp_path):
    (tmp_path / "jinja2.py").write_text("raise ModuleNotFoundError('No module named jinja2', name='jinja2')")
    done = python("job.look", str(demo_data), "--out", str(tmp_path / "x.html"), env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and "jinja2 is not installed" in error_lines(done)[0]


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on this machine")
def test_it_fits_a_phone(page, tmp_path):
    """Nothing but tables is wider than a narrow screen, and they scroll in a frame of their own."""
    probe = "<script>document.title = document.documentElement.scrollWidth</script></body>"
    (tmp_path / "x.html").write_text(page.source.replace("</body>", probe))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,2000", "--dump-dom"]
    done = run("chromium", *options, f"file://{tmp_path}/x.html", env={"HOME": str(tmp_path)})
    assert int(re.search(r"<title>(\d+)</title>", done.stdout)[1]) <= 500
