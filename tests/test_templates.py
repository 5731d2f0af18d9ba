"""Many rows from one table: prompts from a template, several images per row, and a warning of sizes not honoured."""

import logging
from pathlib import Path

import pytest

from nanobanana_async import InvalidBatchFile, read_rows
from nanobanana_async.simulator import FAST_PROFILE, Simulator
from nanobanana_async.simulator.in_memory import tiny_png
from nanobanana_async.simulator.server import SimulatorServer
from tests.batches import batch_of, rows_of, run
from tests.commands import nanobanana

TABLE = "name,Main Colour,sku\nmug,red,17\nbowl,blue,18\n"


def table(folder: Path, text: str = TABLE, name: str = "products.csv") -> Path:
    """Write a table and return its path."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_prompts_are_filled_from_columns_and_no_prompt_column_is_needed(tmp_path: Path) -> None:
    """Columns are named as in the header, and all are kept for the results."""
    rows = list(read_rows(table(tmp_path), template="photo of a {name}, {Main Colour}, {{studio}}"))
    assert [row.request.prompt for row in rows] == ["photo of a mug, red, {studio}", "photo of a bowl, blue, {studio}"]
    assert [row.name for row in rows] == ["mug", "bowl"]
    assert rows[0].columns == {"name": "mug", "Main Colour": "red", "sku": "17"}


def test_a_template_takes_json_lines_and_lines_of_text(tmp_path: Path) -> None:
    """Numbers are text, and the prompt of a .txt is the column `prompt`."""
    lines = table(tmp_path, '{"animal": "fox", "count": 3, "weight": 0.5}\n', "rows.jsonl")
    (row,) = read_rows(lines, template="{count} {animal}, {weight} kg")
    assert row.request.prompt == "3 fox, 0.5 kg"
    (row,) = read_rows(table(tmp_path, "a fox\n", "rows.txt"), template="{prompt}, oil on canvas")
    assert row.request.prompt == "a fox, oil on canvas"


@pytest.mark.parametrize(
    ("template", "text", "message"),
    [
        ("a {colour}", TABLE, "line 2: template: the row has no column 'colour', only 'name', 'Main Colour', 'sku'"),
        ("a {name}", "name,sku\n,17\n", "line 2: template: expected text in the column 'name', got ''"),
        ("a {name", TABLE, "line 2: template: expected {column}, got '{'. For a brace, write it twice"),
        ("a {}", TABLE, "line 2: template: expected {column}, got '{}'. For a brace, write it twice"),
        (
            "{name.__class__}",
            TABLE,
            "line 2: template: the row has no column 'name.__class__', only 'name', 'Main Colour', 'sku'",
        ),
    ],
)
def test_a_template_that_cannot_be_filled_is_an_error_with_the_line(
    tmp_path: Path, template: str, text: str, message: str
) -> None:
    """Nothing is submitted, and no attribute of a value is read."""
    with pytest.raises(InvalidBatchFile) as caught:
        read_rows(table(tmp_path, text), template=template)
    assert caught.value.errors[0] == message


def test_the_suffix_of_a_name_is_not_part_of_the_names_of_its_images(tmp_path: Path) -> None:
    """`fox.png` gives `fox-1` and `fox-2`."""
    rows = read_rows(table(tmp_path, "name,prompt\nfox.png,a fox\n"), variants=2)
    assert [row.name for row in rows] == ["fox-1", "fox-2"]


@pytest.mark.anyio
async def test_several_images_per_row_have_names_of_their_own(tmp_path: Path) -> None:
    """They are no copies, and `once` keeps them. More of them later are only the new ones."""
    path = table(tmp_path, "key,name,prompt\nk,fox,a fox\n,,an owl\n,,an owl\n")
    rows = read_rows(path, variants=3, once=True)
    assert (len(rows), rows.copies) == (6, 1)
    assert [row.key for row in rows][:3] == ["k", "k-2", "k-3"]
    simulator = Simulator()
    async with batch_of(simulator, tmp_path / "run") as batch:
        await run(batch, read_rows(path, variants=2))
        assert [row.file_stem for row in await rows_of(batch)][:2] == ["fox-1", "fox-2"]
    charged = len(simulator.charges)
    async with batch_of(simulator, tmp_path / "run") as batch:
        await run(batch, read_rows(path, variants=3))
    assert len(simulator.charges) == charged + 3


@pytest.mark.anyio
async def test_a_size_that_the_model_may_ignore_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """Before it costs anything; not for a model that honours it."""
    async with Simulator().client() as client:
        for _ in range(2):
            await client.generate("a fox", image_size="4k")
        await client.generate("a fox", image_size="4k", model="google/nano-banana-2")
    found = [record for record in caplog.records if "image_size" in record.getMessage()]
    assert [record.levelno for record in found] == [logging.WARNING]
    assert "google/gempix2" in found[0].getMessage()


@pytest.mark.other_clients
def test_the_commands_fill_templates_and_count_rows_with_a_doubtful_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warning comes once, with the number of rows, before the first submit; a dry run has it, too."""
    path, out = str(table(tmp_path)), str(tmp_path / "out")
    many = ("--template", "a {name}", "--n", "2", "--image-size", "4k", "--poll", "0.05")
    with SimulatorServer(FAST_PROFILE, render=tiny_png) as server:
        monkeypatch.setenv("DEFAPI_API_KEY", "dk-test")
        monkeypatch.setenv("DEFAPI_BASE_URL", server.url)
        dry = nanobanana("batch", path, "--out", out, *many, "--dry-run")
        assert "4 rows: 4 to submit" in dry.out
        assert "4 rows with an image size for google/gempix2" in dry.out
        assert not server.charges
        done = nanobanana("batch", path, "--out", out, *many)
        assert done.err.count("google/gempix2") == 1
        assert done.err.index("google/gempix2") < done.err.index("4 of 4 saved")
        assert sorted(one.name for one in Path(out).glob("*.png")) == [
            "bowl-1.png",
            "bowl-2.png",
            "mug-1.png",
            "mug-2.png",
        ]
        single = nanobanana("generate", "a fox", "--n", "3", "-o", str(tmp_path / "foxes"), "--poll", "0.05")
        assert len(single.out.splitlines()) == 3
        assert [charge.prompt for charge in server.charges][-3:] == ["a fox"] * 3
