"""What people look for beside the code: how to cite, what changed, what to do when something goes wrong."""

import re

import yaml

from job.doctor.findings import ROWS
from tests.launch import ROOT

SETUP = (ROOT / "setup.py").read_text()
# Messages of other programs in the table of symptoms.
FOREIGN = {"not enough slots", "sbatch: error: ... account", "partition"}


def of_setup(name: str) -> str:
    """A text among the arguments of setup()."""
    return re.search(rf'{name}="([^"]+)"', SETUP)[1]


def test_the_citation_file_is_valid_and_belongs_to_this_version():
    cff = yaml.safe_load((ROOT / ".github/CITATION.cff").read_text())
    # What the Citation File Format 1.2.0 requires, and the form of what is used here.
    assert {"cff-version", "message", "title", "authors"} <= set(cff) and cff["cff-version"] == "1.2.0"
    assert cff["type"] == "software" and all("name" in author for author in cff["authors"])
    assert cff["version"] == of_setup("version") and cff["license"] == of_setup("license")
    for reference in cff["references"]:
        assert {"type", "title", "authors"} <= set(reference) and reference["url"].startswith("https://arxiv.org/abs/")
        assert all(set(author) == {"family-names", "given-names"} for author in reference["authors"])
        identifier = reference["identifiers"][0]
        assert identifier["type"] == "other" and identifier["value"] == "arXiv:" + reference["url"].rpartition("/")[2]
    assert cff["references"][0]["identifiers"][0]["value"] == "arXiv:1412.2302"


def test_the_changelog_knows_this_version_and_its_links_lead_somewhere():
    text = (ROOT / ".github/CHANGELOG.md").read_text()
    versions = re.findall(r"^## ([\w.]+)", text, re.MULTILINE)
    assert versions[0] in ("Unreleased", of_setup("version")) and of_setup("version") in versions
    for target in re.findall(r"\]\(([^)#]+)\)", " ".join(text.split())):
        assert (ROOT / ".github" / target).exists(), target


def symptoms() -> list[list[str]]:
    """Cells of the tables of TROUBLE.md."""
    lines = (ROOT / "slurm/TROUBLE.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return [row for row in rows if row[0] not in ("you see", "---")]


def test_symptoms_are_messages_that_the_product_has():
    files = [
        path
        for room in ("job", "shards", "slurm")
        for ends in ("py", "sh")
        for path in (ROOT / room).rglob(f"*.{ends}")
    ]
    source = "\n".join(path.read_text() for path in files)
    source = re.sub(r'"\s*f?"', "", source)  # texts that go on in the next line
    source = re.sub(r"\{[^{}]*\}|\$\w+|\$\{[^}]*\}", "#", source)  # what a message fills in
    rows = symptoms()
    assert len(rows) > 20 and all(len(row) == 3 and all(row) for row in rows)
    for symptom, _, _ in rows:
        for quoted in set(re.findall(r"`([^`]+)`", symptom)) - FOREIGN:
            parts = re.split(r"\b(?:N|M|x|\d+|torch|Horovod|srun)\b|\.\.\.|[()=]", quoted)
            for part in filter(None, (part.strip(" ,") for part in parts)):
                assert part in source, f"no message has {part!r} (of {quoted!r})"


def test_rows_that_the_table_of_symptoms_names_are_the_doctors():
    text = (ROOT / "slurm/TROUBLE.md").read_text()
    named = [
        row for words in re.findall(r"rows? ((?:`[\w ]+`(?:, )?)+)", text) for row in re.findall(r"`([\w ]+)`", words)
    ]
    assert len(named) > 12 and set(named) <= set(ROWS)
