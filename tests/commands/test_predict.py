"""`job.predict` finds the class that `job.evaluate` finds, from whatever holds the images."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from shards import open_split
from tests.launch import ROOT, error_lines, python


def predict(*arguments, stdin=None):
    """Exit code, lines of stdout, stderr."""
    command = [sys.executable, "-m", "job.predict", *map(str, arguments), "--device", "cpu"]
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=120, cwd=ROOT)
    return done.returncode, done.stdout.decode().splitlines(), done.stderr.decode()


@pytest.fixture(scope="module")
def images(demo_data, tmp_path_factory):
    """Class folders of PNG files of several sizes, larger than what is stored of them."""
    folder = tmp_path_factory.mktemp("images")
    val = open_split(demo_data, "val")
    for number in range(120):
        sample = val[number]
        name = sample.name.replace("/", " or ")
        (folder / "val" / name).mkdir(parents=True, exist_ok=True)
        side = 80 + number % 5 * 15
        picture = Image.fromarray(sample.image).resize((side + number % 3 * 20, side))
        picture.save(folder / "val" / name / f"{number:04d}.png")
    return folder


@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_the_file_that_was_packed_has_the_class_that_evaluate_finds(images, demo_run, tmp_path, encoding):
    data = tmp_path / "data"
    options = ["--resize", "70", "--encoding", encoding]
    done = python("shards.pack", str(images), str(data), *options)
    assert done.returncode == 0, done.stderr
    index = data / "val.json"
    fields = json.loads(index.read_text())
    fields["classes"] = [name.replace(" or ", "/") for name in fields["classes"]]
    index.write_text(json.dumps(fields))
    table = tmp_path / "samples.csv"
    done = python("job.evaluate", str(demo_run), "--data", str(data), "--per-sample", str(table), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    # Packing shuffles: which file a sample was made of shows by its pixels.
    files = sorted(images.rglob("*.png"))
    looks = np.stack([np.asarray(ImageOps.fit(Image.open(file), (70, 70)), np.float32) for file in files])
    with open(table, newline="") as file:
        rows = zip(open_split(data, "val"), csv.DictReader(file), strict=True)
        evaluated = {str(files[np.abs(looks - sample.image).mean((1, 2, 3)).argmin()]): row for sample, row in rows}
    code, lines, _ = predict(demo_run, images, "--json", "--top", 1)
    assert code == 0 and len(lines) == len(evaluated) == 120
    same, gaps = 0, []
    for found in map(json.loads, lines):
        row = evaluated[found["image"]]
        same += found["top"][0]["class"] == row["predicted"]
        gaps.append(abs(found["top"][0]["probability"] - float(row["probability"])))
    assert len({row["predicted"] for row in evaluated.values()}) >= 5
    if encoding == "raw":  # the very same pixels
        assert same == 120 and max(gaps) < 1e-4
    else:
        assert same >= 118 and np.median(gaps) < 0.02


def test_files_folders_tars_shards_and_standard_input(demo_run, demo_data, tmp_path):
    val = open_split(demo_data, "val")
    (tmp_path / "b").mkdir()
    for name, number in (("c.png", 0), ("b/z.png", 1), ("a.png", 2)):
        Image.fromarray(val[number].image).save(tmp_path / name)
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    code, lines, err = predict(demo_run, tmp_path, tmp_path / "c.png", "--top", 2)
    names = [line.split(": ")[0] for line in lines]
    assert code == 0 and names == [str(tmp_path / name) for name in ("a.png", "c.png", "b/z.png", "c.png")]
    assert lines[1] == lines[3] and lines[1].count("%") == 2
    assert "best.pt" in err and "warning" not in err

    code, (line,), _ = predict(demo_run, "-", "--json", stdin=(tmp_path / "c.png").read_bytes())
    first = json.loads(line)
    assert len(first["top"]) == 5 and sum(guess["probability"] for guess in first["top"]) <= 1.0001

    code, indexed, _ = predict(demo_run, demo_data / "val.json", "--json")
    code, alone, _ = predict(demo_run, demo_data / "val-000000.tar", "--json")
    assert len(indexed) == 600 and len(alone) == 100
    one, other = json.loads(indexed[0]), json.loads(alone[0])
    assert one.pop("truth") == val[0].name
    assert one == other and one["image"] == f"{demo_data}/val-000000.tar/00000000"
    whole = predict(demo_run, demo_data, "--json", "--top", 1)[1]
    assert len(whole) == 3600


def test_images_that_cannot_be_used_are_named_and_counted(demo_run, demo_data, tmp_path):
    Image.fromarray(open_split(demo_data, "val")[0].image).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text\n.jpg").write_text("no image")
    code, lines, err = predict(demo_run, tmp_path, "--json")
    found = [json.loads(line) for line in lines]
    assert code == 0 and [("error" in line) for line in found] == [True, False, True]
    assert f"warning: {tmp_path}/cut.png: cannot be decoded" in err and "text\\n.jpg: " in err
    assert "1 images, and 2 that could not be used" in err
    code, lines, err = predict(demo_run, tmp_path / "cut.png")
    assert code == 2 and not lines and "error: none of the 1 images could be used" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["RUN", "TMP/no.png"], "no such file or folder"),
        (["RUN", "TMP"], "holds no image files and no index of shards"),
        (["RUN", "RUN/config.yaml"], "none of the 1 images could be used"),
        (["TMP", "RUN"], "holds no image files"),
        (["TMP", "RUN/config.yaml"], "no checkpoint in"),
        (["RUN/config.yaml", "RUN/config.yaml"], "is not a checkpoint of job.train"),
        (["RUN", "x.png", "--top", "0"], "--top must be 1 or more"),
        (
            ["RUN", "RUN/config.yaml", "--checkpoint", "step-1.pt"],
            "no checkpoint step-1.pt; best, newest, or a file of",
        ),
        (["RUN/checkpoints/best.pt", "RUN/config.yaml", "--checkpoint", "newest"], "is not a run directory"),
    ],
)
def test_wrong_use_is_one_line(demo_run, tmp_path, arguments, words):
    arguments = [a.replace("RUN", str(demo_run)).replace("TMP", str(tmp_path)) for a in arguments]
    done = python("job.predict", *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = error_lines(done)
    assert words in line


@pytest.mark.parametrize("package", ["job", "shards"])
def test_a_package_lists_its_commands(package):
    done = python(package)
    named = {line.split()[2].partition(".")[2] for line in done.stdout.splitlines() if line.startswith("python -m")}
    modules = (ROOT / package).glob("*.py")
    commands = {m.stem for m in modules if 'if __name__ == "__main__":' in m.read_text() and m.stem != "__main__"}
    commands |= {path.parent.name for path in (ROOT / package).glob("*/__main__.py")}
    assert done.returncode == 0 and named == commands
    wrong = python(package, min(commands)[:-1])
    assert wrong.returncode == 2 and f"did you mean {min(commands)}?" in error_lines(wrong)[0]
