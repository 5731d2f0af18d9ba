"""D1, S3: files of the user's in the folder of a batch are never replaced, and links there are not followed."""

import csv
import json
from pathlib import Path

import pytest

from nanobanana_async import LedgerError, read_rows
from nanobanana_async.batch.report import gallery_path, results_path
from nanobanana_async.ledger.restored import manifest_path
from nanobanana_async.simulator import FAST_PROFILE, Simulator
from tests.batches import batch_of, kinds, nth_post, rows_of, run
from tests.fakes import PNG, rejected

pytestmark = pytest.mark.anyio


async def test_d1_the_users_own_files_are_left_alone(tmp_path: Path) -> None:
    """Photos keep their names, and the gallery, the manifest and the table get others."""
    own = {
        "shoe.png": PNG + b"mine",
        "0001-a-fox.png": PNG + b"mine",
        "hat.JPEG": PNG + b"mine",
        "index.html": b"<h1>My page</h1>",
        "manifest.jsonl": b'{"name": "mine"}\n',
        "results.csv": b"mine,1\n",
    }
    for name, content in own.items():
        (tmp_path / name).write_bytes(content)
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,name,images\na fox,,shoe.png\na red shoe,shoe,shoe.png\na hat,hat,\n")
    simulator = Simulator(FAST_PROFILE)
    for _ in range(2):
        async with batch_of(simulator, tmp_path) as batch:
            outcomes = await run(batch, read_rows(rows))
    assert kinds(outcomes) == ["Succeeded"] * 3
    assert {name: (tmp_path / name).read_bytes() for name in own} == own
    assert sorted(path.name for path in tmp_path.glob("*.png") if path.name not in own) == [
        "0001-a-fox-1.png",
        "hat-3.png",
        "shoe-2.png",
    ]
    assert [path(tmp_path).name for path in (gallery_path, manifest_path, results_path)] == [
        "nanobanana-index.html",
        "nanobanana-manifest.jsonl",
        "nanobanana-results.csv",
    ]
    assert len(manifest_path(tmp_path).read_text().splitlines()) == 3
    assert len(simulator.charges) == 3


async def test_d1_a_file_that_appears_before_the_image_is_saved_is_left_alone(tmp_path: Path) -> None:
    """The image gets another name, which the ledger stores."""
    async with batch_of(Simulator(FAST_PROFILE), tmp_path) as batch:
        (tmp_path / "0001-a-fox.png").write_bytes(b"mine")
        assert kinds(await run(batch, ["a fox"])) == ["Succeeded"]
        (row,) = await rows_of(batch)
    assert (tmp_path / "0001-a-fox.png").read_bytes() == b"mine"
    assert [file.path.name for file in row.files] == ["0001-a-fox-2.png"]
    assert row.files[0].path.read_bytes().startswith(b"\x89PNG")


async def test_s3_a_link_in_a_shared_folder_is_not_followed(tmp_path: Path) -> None:
    """Another user could let it point to a file of ours."""
    folder, target = tmp_path / "run", tmp_path / "precious.txt"
    folder.mkdir()
    target.write_text("precious")
    for name in (".index.html.part", ".manifest.jsonl.part", ".results.csv.part", "0001-a-fox.png"):
        (folder / name).symlink_to(target)
    async with batch_of(Simulator(FAST_PROFILE), folder) as batch:
        assert kinds(await run(batch, ["a fox"])) == ["Succeeded"]
    assert target.read_text() == "precious"


@pytest.mark.parametrize("name", ["ledger.db", "ledger.lock"])
async def test_s3_a_ledger_that_is_a_link_is_refused(tmp_path: Path, name: str) -> None:
    """The names of a ledger can be guessed."""
    folder, target = tmp_path / "run", tmp_path / "precious.txt"
    folder.mkdir()
    target.write_text("precious")
    (folder / name).symlink_to(target)
    with pytest.raises(LedgerError, match=name):
        async with batch_of(Simulator(FAST_PROFILE), folder):
            pass
    assert target.read_text() == "precious"


async def test_f5_the_table_begins_with_the_columns_of_the_file(tmp_path: Path) -> None:
    """It opens in a spreadsheet: a mark, the own columns in order, then what became of each row."""
    path = tmp_path / "rows.csv"
    path.write_text('sku;prompt;Preis\nF-1;"a fox,\nred";9,5\nF-2;a näive fox;\n')
    async with batch_of(Simulator(FAST_PROFILE), tmp_path / "run") as batch:
        await run(batch, read_rows(path, image_size="1k"))
    raw = results_path(tmp_path / "run").read_bytes()
    assert raw.startswith(b"\xef\xbb\xbf")
    first, second = csv.DictReader(raw.decode("utf-8-sig").splitlines(keepends=True))
    assert list(first) == ["sku", "prompt", "Preis", "file", "width", "height", "state", "credits", "reason"]
    assert (first["sku"], first["prompt"], first["Preis"]) == ("F-1", "a fox,\nred", "9,5")
    assert (first["file"], first["width"], first["height"]) == ("0001-a-fox-red.png", "8", "8")
    assert (second["state"], second["credits"], second["reason"]) == ("saved", "0.5", "")


async def test_f5_a_reason_is_not_run_as_a_formula(tmp_path: Path) -> None:
    """It is the service's own text. A table of a .txt begins with the prompts."""
    evil = nth_post(lambda _: rejected(400, 1, '=HYPERLINK("http://evil.example")'))
    async with batch_of(Simulator(FAST_PROFILE), tmp_path, evil) as batch:
        await run(batch, ["a fox"])
    (line,) = csv.DictReader(results_path(tmp_path).read_text("utf-8-sig").splitlines())
    assert (line["prompt"], line["state"]) == ("a fox", "failed")
    assert line["reason"].startswith("'=HYPERLINK")
    (entry,) = map(json.loads, manifest_path(tmp_path).read_text().splitlines())
    assert (entry["state"], entry["line"], entry["columns"]) == ("failed", None, {})
