"""Folders, archives and labels as people have them are read as they mean them, or one line says what is wrong."""

import itertools
import os
import tarfile

import pytest

from shards.errors import InputError
from shards.pack import main as pack_main
from shards.sources import find as sources
from shards.sources import labels as labels_module
from shards.sources import spellings
from tests import imagenet40

PICTURE = imagenet40.jpeg(imagenet40.picture(1))
WNIDS = ["n01440764", "n01443537"]


def make(root, *paths: str) -> str:
    """A source with an image, or an empty folder where a path ends in a slash, at each of the paths; its own path."""
    for path in paths:
        if path.endswith("/"):
            os.makedirs(root / path)
        else:
            imagenet40._write(str(root / path), PICTURE)
    return str(root)


def found(source, **options) -> dict[str, dict[str, list[str]]]:
    """Names of the images that would be packed, by split and class."""
    result = {}
    for items in sources.find(str(source), **options):
        classes = {name: [] for name in items.classes}
        for row in range(len(items.table)):
            classes[items.classes[items.table["label"][row]]].append(items.name(row))
        result[items.split] = classes
    return result


# ---- splits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train", "val"), ("Train", "Val"), ("TRAINING", "VALIDATION"), ("training_set", "test_set"), ("train", "test"),
        ("training", "validation"), ("Train", "valid"), ("images_train", "images_val"), ("train2017", "val2017"),
        ("trainset", "devset"), ("Training Data", "Testing Data"), ("seg_train/seg_train", "seg_test/seg_test"),
        ("dataset/train", "dataset/val"), ("a/b/Train", "a/b/Test"), ("train/images", "val/images"),
    ],
)  # fmt: skip
def test_splits_in_the_spellings_of_people(train, val, tmp_path):
    source = make(tmp_path, *[f"{split}/{name}/1.jpg" for split in (train, val) for name in ("cat", "dog")])
    one = {"cat": ["cat/1.jpg"], "dog": ["dog/1.jpg"]}
    assert found(source) == {"train": one, "val": one}


def test_a_test_folder_serves_for_validation_only_where_there_is_no_other_and_this_is_said(tmp_path, capsys):
    make(tmp_path, "train/a/1.jpg", "test/a/2.jpg")
    assert found(tmp_path)["val"] == {"a": ["a/2.jpg"]}
    assert "test serves as the validation split" in capsys.readouterr().out
    make(tmp_path, "Val/a/3.jpg")
    assert found(tmp_path)["val"] == {"a": ["a/3.jpg"]}
    assert "Val, train are packed, and test not" in capsys.readouterr().out
    assert found(tmp_path, split="test") == {"test": {"a": ["a/2.jpg"]}}


def test_a_folder_beside_the_splits_is_said_to_be_left_out(tmp_path, capsys):
    make(tmp_path, "train/a/1.jpg", "val/a/1.jpg", "extra/a/1.jpg", "docs/")
    assert list(found(tmp_path)) == ["train", "val"]
    assert "and extra not" in capsys.readouterr().out


def test_a_test_folder_without_labels_is_left_out_and_said(tmp_path, capsys):
    make(tmp_path, "train/a/1.jpg", "test/images/1.jpg")
    assert list(found(tmp_path)) == ["train"]
    assert "and test not" in capsys.readouterr().out


@pytest.mark.parametrize("pair", [("Train", "train"), ("train", "training_set"), ("val", "valid")])
def test_two_spellings_of_one_split_are_an_error_that_names_both(pair, tmp_path):
    source = make(tmp_path, "train/a/1.jpg", "val/a/1.jpg", *[f"{name}/a/1.jpg" for name in pair])
    with pytest.raises(InputError, match=f"both {min(pair)} and {max(pair)}"):
        found(source)


@pytest.mark.parametrize("other", ["bus", "freight_train"])
def test_a_class_may_be_called_train(other, tmp_path):
    source = make(tmp_path, "train/1.jpg", f"{other}/1.jpg")
    assert found(source) == {"train": {name: [f"{name}/1.jpg"] for name in sorted(["train", other])}}


@pytest.mark.parametrize(
    ("name", "split"),
    [("Valid", "val"), ("ILSVRC2012_img_val", "val"), ("evaluation", "test"), ("freight_train", ""), ("trainer", "")],
)
def test_split_of(name, split):
    assert spellings.split_of(name) == split


# ---- stray files ------------------------------------------------------------------------------------------------

STRAY = ["__MACOSX", "@eaDir", ".ipynb_checkpoints", "__pycache__", "lost+found", "$RECYCLE.BIN", ".Trash-1000"]


@pytest.mark.parametrize("stray", STRAY)
def test_stray_folders_are_no_classes_and_hold_no_images(stray, tmp_path):
    places = ["", "train/", "val/", "train/a/"]
    make(tmp_path, "train/a/1.jpg", "val/a/1.jpg", *[f"{place}{stray}/x.jpg" for place in places])
    for name in (".DS_Store", "._1.jpg", "Thumbs.db", "desktop.ini"):
        imagenet40._write(str(tmp_path / "train" / "a" / name), b"x")
    assert found(tmp_path) == {"train": {"a": ["a/1.jpg"]}, "val": {"a": ["a/1.jpg"]}}
    assert not sources.find(str(tmp_path))[0].left_out


@pytest.fixture
def macos_archives(tmp_path) -> str:
    """The archives of ILSVRC2012 as macOS packs them again."""
    junk = b"Mac OS X        " * 32
    train = {"._n01440764.tar": junk, ".DS_Store": junk}
    for wnid in WNIDS:
        train[f"./{wnid}.tar"] = imagenet40._tar({f"._{wnid}_1.JPEG": junk, f"{wnid}_1.JPEG": PICTURE})
    val = {"._ILSVRC2012_val_00000001.JPEG": junk, ".DS_Store": junk, "ILSVRC2012_val_00000001.JPEG": PICTURE}
    imagenet40._write(str(tmp_path / "ILSVRC2012_img_train.tar"), imagenet40._tar(train))
    imagenet40._write(str(tmp_path / "ilsvrc2012_img_val.tar"), imagenet40._tar(val))
    (tmp_path / "val.txt").write_text("ILSVRC2012_val_00000001.JPEG 1\n")
    return str(tmp_path)


def test_stray_members_of_archives_are_skipped(macos_archives):
    train = {wnid: [f"{wnid}/{wnid}_1.JPEG"] for wnid in WNIDS}
    assert found(macos_archives) == {
        "train": train,
        "val": {WNIDS[0]: [], WNIDS[1]: ["ILSVRC2012_val_00000001.JPEG"]},
    }


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_folder_without_images_is_an_error_that_names_it(split, tmp_path):
    make(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", f"{split}/c/")
    (tmp_path / split / "c" / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=f"{split}/c holds no images; remove it"):
        found(tmp_path)


# ---- links, names, permissions ----------------------------------------------------------------------------------


def test_class_folders_may_be_links_and_hold_links(tmp_path):
    make(tmp_path / "else", "a/1.jpg", "deep/2.jpg")
    make(tmp_path / "s", "train/b/3.jpg")
    os.symlink(tmp_path / "else" / "a", tmp_path / "s" / "train" / "a")
    os.symlink(tmp_path / "else" / "deep", tmp_path / "else" / "a" / "more")
    assert found(tmp_path / "s") == {"train": {"a": ["a/1.jpg", "a/more/2.jpg"], "b": ["b/3.jpg"]}}


@pytest.mark.parametrize(
    ("target", "words"),
    [("..", "that contains it"), ("nowhere", "is not there"), ("loop", "Too many levels of symbolic links")],
)
def test_a_link_that_leads_nowhere_or_in_a_circle_is_an_error(target, words, tmp_path):
    make(tmp_path, "train/a/1.jpg", "train/b/1.jpg")
    os.symlink(target, tmp_path / "train" / "b" / "loop")
    with pytest.raises(InputError, match=words):
        found(tmp_path)


def test_a_pipe_named_like_an_image_is_not_waited_for(tmp_path):
    make(tmp_path, "train/a/1.jpg", "train/b/1.jpg")
    os.mkfifo(tmp_path / "train" / "a" / "2.jpg")
    assert found(tmp_path) == {"train": {"a": ["a/1.jpg"], "b": ["b/1.jpg"]}}


def test_classes_match_whatever_the_form_of_unicode_or_the_case(tmp_path):
    make(tmp_path, "train/Café/1.jpg", "train/dog/1.jpg", "val/Cafe\u0301/2.jpg", "val/Dog/2.jpg")
    assert found(tmp_path)["val"] == {"Café": ["Cafe\u0301/2.jpg"], "dog": ["Dog/2.jpg"]}
    make(tmp_path, "train/Cafe\u0301/1.jpg")
    with pytest.raises(InputError, match="in two forms of Unicode"):
        found(tmp_path)


def test_classes_that_differ_in_case_alone_stay_apart(tmp_path):
    paths = [f"{split}/{name}/1.jpg" for split in ("train", "val") for name in ("A", "a", "b")]
    assert found(make(tmp_path, *paths))["val"] == {name: [f"{name}/1.jpg"] for name in ("A", "a", "b")}
    make(tmp_path, "val/B/1.jpg")
    with pytest.raises(InputError, match="B and b of .*val are both class b"):
        found(tmp_path)


def test_a_class_of_the_validation_split_that_training_lacks_is_named(tmp_path):
    source = make(tmp_path, "Train/cat/1.jpg", "Train/dog/1.jpg", "Val/cats/1.jpg", "Val/dog/1.jpg")
    with pytest.raises(InputError, match="class cats of .*Val is not among the classes of .*Train; did you mean cat"):
        found(source)


def test_images_in_no_class_folder_and_other_files_are_counted(tmp_path, capsys):
    source = make(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "train/loose.jpg")
    for name in ("1.heic", "2.heic", "x.txt"):
        (tmp_path / "train" / "a" / name).write_text("x")
    assert sources.find(source)[0].left_out == {".heic": 2, ".txt": 1}
    assert "1 images of" in capsys.readouterr().out


# ---- labels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "separator"),
    [
        (["1.jpg{0}cat", "my cat.jpg{0}cat", "2.jpg{0}dog"], "\t"),
        (["1.jpg{0}cat", "my cat.jpg{0}cat", "2.jpg{0}dog"], ";"),
        (["1.jpg{0}cat", "my cat.jpg{0}cat", "2.jpg{0}dog"], ","),
        (["1{0} cat", "my cat{0} cat", "2{0} dog"], ","),
        (["1.jpg {0} cat", "my cat.jpg {0} cat", "2.jpg {0} dog"], "|"),
        (["1.jpg{0}cat", "my cat.jpg{0}cat", "2.jpg{0}dog"], " "),
        (['"1.jpg"{0}"cat"', '"my cat.jpg"{0}"cat"', '"2.jpg"{0}"dog"'], ","),
        (["val/1.jpg{0}cat", "val/my cat.jpg{0}cat", "val\\2.jpg{0}dog"], ","),
        (["1.jpg{0}0", "my cat.jpg{0}0", "2.jpg{0}1"], ","),
        (["1.JPG{0}CAT", "My Cat.jpg{0}Cat", "2.jpeg{0}dog"], ","),
    ],
)
def test_labels_in_every_form_of_a_table(rows, separator, tmp_path):
    make(tmp_path, "train/cat/0.jpg", "train/dog/0.jpg", "val/1.jpg", "val/my cat.jpg", "val/2.jpg")
    headers, ends = ("", "image{0}label\n", '"id"{0}"class"\n'), ("\n", "\r\n")
    for header, end, encoding in itertools.product(headers, ends, ("utf-8", "utf-8-sig", "utf-16")):
        text = (header + "\n".join(rows) + "\n").format(separator).replace("\n", end)
        (tmp_path / "labels").write_bytes(text.encode(encoding))
        val = found(tmp_path, labels=str(tmp_path / "labels"))["val"]
        assert val == {"cat": ["1.jpg", "my cat.jpg"], "dog": ["2.jpg"]}, (header, end, encoding)


def table(tmp_path, text: str, images: list[str]) -> labels_module.Labels:
    (tmp_path / "labels.txt").write_text(text)
    return labels_module.read_table(str(tmp_path / "labels.txt"), images)


@pytest.mark.parametrize(
    ("text", "images", "values"),
    [
        ("val/a.b.JPEG 3\nc 1 ignored\n", ["a.b.JPEG", "x/c.png"], ["3", "1"]),
        ("a.b,x\n", ["a.b.jpg"], ["x"]),
        ('1.jpg,lab, black\n', ["1.jpg"], ["lab"]),
        ('1.jpg,golden lab\n2.jpg,"lab, black"\n', ["1.jpg", "2.jpg"], ["golden lab", "lab, black"]),
        ("1.jpg golden retriever\n2.jpg tench\n", ["1.jpg", "2.jpg"], ["golden retriever", "tench"]),
        ("a,n01440764 1 2 3 4 n01440764 5 6 7 8\n", ["a.JPEG"], ["n01440764"]),
        ("val_0.JPEG\tn01440764\t0\t32\t44\t62\n", ["val_0.JPEG"], ["n01440764"]),
        ("n,file,label\n0,1.jpg,cat\n1,2.jpg,dog\n", ["1.jpg", "2.jpg"], ["cat", "dog"]),
        ("cat,1.jpg\ndog,2.jpg\n", ["1.jpg", "2.jpg"], ["cat", "dog"]),
        ("Cafe\u0301.jpg,cre\u0300me\n", ["Café.jpg"], ["crème"]),
        ("Café.jpg,crème\n", ["Cafe\u0301.jpg"], ["crème"]),
    ],
)  # fmt: skip
def test_what_a_table_says(text, images, values, tmp_path):
    assert table(tmp_path, text, images).values == values


def test_a_first_line_without_an_image_is_a_header_unless_its_class_is_one(tmp_path):
    assert table(tmp_path, "file,class\n1.jpg,a\n2.jpg,b\n", ["1.jpg", "2.jpg"]).classes == ["a", "b"]
    assert table(tmp_path, "gone.jpg,a\n1.jpg,a\n2.jpg,b\n", ["1.jpg", "2.jpg"]).classes == ["a", "b"]


def test_images_that_a_table_names_and_are_absent_are_counted_with_an_example(tmp_path, capsys):
    table(tmp_path, "1.jpg,a\ngone.jpg,a\ngone2.jpg,a\n", ["1.jpg"])
    assert "names 2 images that are not there, such as gone.jpg" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1.jpg,a\n", "no label for 2.jpg, one of 1 of 2 images"),
        ("1.jpg,a\n2.jpg,\n", "no label for 2.jpg"),
        ("1.jpg,a\n2.jpg,a\n1.jpg,b\n", "two classes, a and b"),
        ("1.jpg,0\n2.jpg,-1\n", "the class -1; numbers count from 0"),
        ("\0\0\n", "no label for 1.jpg nor for any other image"),
        ('"' + "x" * 200_000, "not a text file of two columns"),
    ],
)
def test_a_table_that_does_not_do(text, reason, tmp_path):
    with pytest.raises(InputError, match=reason):
        table(tmp_path, text, ["1.jpg", "2.jpg"])


@pytest.mark.parametrize(("value", "hint"), [("cats", "did you mean cat"), ("2", "numbers count from 0")])
def test_a_class_that_training_lacks(value, hint, tmp_path):
    make(tmp_path, "train/cat/0.jpg", "train/dog/0.jpg", "val/1.jpg")
    (tmp_path / "labels.csv").write_text(f"1.jpg,{value}\n")
    with pytest.raises(InputError, match=f"class {value}, which is not among the 2 classes.*{hint}"):
        found(tmp_path, labels=str(tmp_path / "labels.csv"))


def test_labels_may_be_of_images_in_folders_that_are_no_classes(tmp_path):
    make(tmp_path, "part_1/a.jpg", "part_2/b.jpg", "part_2/c.jpg")
    (tmp_path / "meta.csv").write_text("image,dx\na,mel\nb,nv\nc,mel\n")
    assert found(tmp_path, labels=str(tmp_path / "meta.csv")) == {
        "train": {"mel": ["part_1/a.jpg", "part_2/c.jpg"], "nv": ["part_2/b.jpg"]}
    }


def test_flat_images_without_labels_name_the_file_that_may_hold_them(tmp_path):
    make(tmp_path, "images/1.jpg", "images/2.jpg")
    (tmp_path / "labels.csv").write_text("1.jpg,a\n2.jpg,b\n")
    with pytest.raises(InputError, match=r"--labels FILE \(is it .*/labels.csv\?\)"):
        found(tmp_path)


# ---- ImageNet as it is given ------------------------------------------------------------------------------------


def test_tiny_imagenet_packs_as_it_is(tmp_path, capsys):
    root = tmp_path / "tiny-imagenet-200"
    make(root, *[f"train/{w}/images/{w}_0.JPEG" for w in WNIDS], "val/images/val_0.JPEG", "val/images/val_1.JPEG")
    make(root, "test/images/test_0.JPEG")
    for wnid in WNIDS:
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t9\t9\n")
    lines = [f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n" for i, wnid in enumerate(reversed(WNIDS))]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "words.txt").write_text("n00001740\tentity\nn01440764\ttench, Tinca tinca\nn01443537\tgoldfish\n")
    for source in (root, tmp_path):
        assert found(source) == {
            "train": {
                "tench, Tinca tinca": ["n01440764/images/n01440764_0.JPEG"],
                "goldfish": ["n01443537/images/n01443537_0.JPEG"],
            },
            "val": {"tench, Tinca tinca": ["val_1.JPEG"], "goldfish": ["val_0.JPEG"]},
        }
        assert "and test not" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC", "above"])
def test_kaggles_imagenet_from_any_of_its_folders(given, tmp_path):
    root = tmp_path / "imagenet-object-localization-challenge"
    data = root / "ILSVRC" / "Data" / "CLS-LOC"
    make(data, *[f"train/{w}/{w}_1.JPEG" for w in WNIDS], "val/ILSVRC2012_val_00000001.JPEG", "test/t.JPEG")
    make(root, "ILSVRC/Annotations/")
    (root / "LOC_val_solution.csv").write_text(
        f"ImageId,PredictionString\nILSVRC2012_val_00000001,{WNIDS[1]} 85 1 499 272 \n"
    )
    train = {wnid: [f"{wnid}/{wnid}_1.JPEG"] for wnid in WNIDS}
    val = {WNIDS[0]: [], WNIDS[1]: ["ILSVRC2012_val_00000001.JPEG"]}
    assert found(tmp_path if given == "above" else root / given) == {"train": train, "val": val}


def test_flat_folders_whose_names_hold_wordnet_ids(tmp_path):
    """As the archives of Hugging Face's imagenet-1k unpack."""
    make(tmp_path, *[f"train/{w}_{i}_{w}.JPEG" for w in WNIDS for i in (7, 36)])
    make(tmp_path, *[f"val/ILSVRC2012_val_0000000{i}_{w}.JPEG" for i, w in enumerate(WNIDS)])
    result = found(tmp_path)
    assert result["train"] == {w: [f"{w}_36_{w}.JPEG", f"{w}_7_{w}.JPEG"] for w in WNIDS}
    assert result["val"] == {w: [f"ILSVRC2012_val_0000000{i}_{w}.JPEG"] for i, w in enumerate(WNIDS)}


def test_archives_in_other_spellings(macos_archives):
    expected = found(macos_archives)
    os.rename(f"{macos_archives}/ILSVRC2012_img_train.tar", f"{macos_archives}/Train.tar")
    os.rename(f"{macos_archives}/ilsvrc2012_img_val.tar", f"{macos_archives}/imagenet_val.tar")
    assert found(macos_archives) == expected


def test_torchvisions_layout_of_archives_beside_what_it_unpacked(macos_archives, tmp_path, capsys):
    expected = found(macos_archives)
    make(tmp_path, *[f"{split}/{w}/1.JPEG" for split in ("train", "val") for w in WNIDS])
    assert found(tmp_path) == expected
    assert "the archives in" in capsys.readouterr().out
    os.unlink(tmp_path / "ilsvrc2012_img_val.tar")
    assert found(tmp_path)["val"] == {w: [f"{w}/1.JPEG"] for w in WNIDS}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ILSVRC2012_img_train.tar.gz", "is compressed, so that no image"),
        ("imagenet-1k.zip", "unpack imagenet-1k.zip first"),
        ("train_images_0.tar.gz", "unpack train_images_0.tar.gz first"),
        ("train-000000.tar", "have no index; make it with python -m shards.index"),
    ],
)
def test_archives_that_cannot_be_packed_say_what_to_do(name, reason, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=reason):
        found(tmp_path)


def test_a_tar_of_class_folders_is_to_be_unpacked(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name in ("a", "b"):
            tar.add(make(tmp_path, f"{name}.jpg") + f"/{name}.jpg", f"./{name}/{name}.jpg")
    with pytest.raises(InputError, match="holds folders of images: unpack it"):
        found(tmp_path / "train.tar")


def test_shards_of_others_named_train_are_no_archive(tmp_path):
    (tmp_path / "train.tar").write_bytes(imagenet40._tar({"0.jpg": PICTURE, "0.cls": b"1"}))
    with pytest.raises(InputError, match="have no index"):
        found(tmp_path)


def test_a_small_folder_packs_with_its_notes_shown(tmp_path, capsys):
    make(tmp_path, "s/Train/a/1.jpg", "s/Train/b/1.jpg", "s/Test/a/1.jpg", "s/__MACOSX/Train/a/._1.jpg")
    assert pack_main([str(tmp_path / "s"), str(tmp_path / "d"), "--resize", "16", "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "Test serves as the validation split" in out and "train: 2 images of 2 classes" in out
