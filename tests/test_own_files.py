"""D1, S3: files of the user's in the folder of a batch are never replaced, and links there are not followed."""

import csv
import json
import os
from contextlib import aclosing
from pathlib import Path

import anyio
import pytest

from nanobanana_async import LedgerError, read_rows
from nanobanana_async.batch.report import gallery_path, results_path
from nanobanana_async.ledger.batch_ledger import BatchLedger
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
    first, second = csv.DictReader(raw.decode("utf-8-sig").splitlines(keepends=True), delimiter=";")
    results = ["file", "width", "height", "mismatch", "state", "credits", "reason"]
    assert list(first) == ["sku", "prompt", "Preis", *results]
    assert (first["sku"], first["prompt"], first["Preis"]) == ("F-1", "a fox,\nred", "9,5")
    assert (first["file"], first["width"], first["height"]) == ("0001-a-fox-red.png", "1024", "1024")
    assert (second["state"], second["credits"], second["reason"]) == ("saved", "0,5", ""), (
        "as the file: semicolons, and so the decimal comma"
    )


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


async def test_f5_a_table_that_is_used_as_a_file_loses_no_columns_and_gets_none(tmp_path: Path) -> None:
    """A copy of the results with a new row is a file of rows again."""
    first = tmp_path / "rows.csv"
    first.write_text("sku,prompt\nF-1,a fox\n")
    simulator, table = Simulator(FAST_PROFILE), tmp_path / "copy.csv"
    for text in ("", "F-2,a hare,,,,,,\n", "F-3,an owl\n"):
        path = table if text else first
        if text:
            table.write_text(results_path(tmp_path / "run").read_text("utf-8-sig") + text)
        async with batch_of(simulator, tmp_path / "run") as batch:
            assert set(kinds(await run(batch, read_rows(path)))) == {"Succeeded"}
    header, *lines = csv.reader(results_path(tmp_path / "run").read_text("utf-8-sig").splitlines())
    assert header == ["sku", "prompt", "file", "width", "height", "mismatch", "state", "credits", "reason"]
    assert [line[:2] for line in lines] == [["F-1", "a fox"], ["F-2", "a hare"], ["F-3", "an owl"]]
    assert len(simulator.charges) == 3


async def test_f5_a_row_whose_key_was_charged_for_another_prompt_keeps_its_words(tmp_path: Path) -> None:
    """The table would state an image for a prompt that it was not made from."""
    path = tmp_path / "rows.csv"
    for prompt in ("a hat", "a new hat"):
        path.write_text(f"key,prompt\n2,{prompt}\n")
        async with batch_of(Simulator(FAST_PROFILE), tmp_path / "run") as batch:
            await run(batch, read_rows(path))
    (line,) = csv.DictReader(results_path(tmp_path / "run").read_text("utf-8-sig").splitlines())
    assert line["prompt"] == "a hat"


async def test_a_pipe_with_the_name_of_a_report_blocks_nothing(tmp_path: Path) -> None:
    """Opening it would wait for a writer. A folder and a loop of links are no reports either."""
    os.mkfifo(tmp_path / "results.csv")
    (tmp_path / "index.html").mkdir()
    (tmp_path / "manifest.jsonl").symlink_to("manifest.jsonl")
    async with batch_of(Simulator(FAST_PROFILE), tmp_path) as batch:
        assert kinds(await run(batch, ["a fox"])) == ["Succeeded"]
    assert all(path(tmp_path).is_file() for path in (gallery_path, manifest_path, results_path))


async def test_half_a_character_in_a_further_column_stops_no_report(tmp_path: Path) -> None:
    """Exporters that truncate text leave halves of emoji."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a fox", "note": "\\ud83d", "name": "x\\ud83d", "\\ud83d": 1}\n')
    async with batch_of(Simulator(FAST_PROFILE), tmp_path / "run") as batch:
        assert kinds(await run(batch, read_rows(path))) == ["Succeeded"]
    assert "a fox" in results_path(tmp_path / "run").read_text("utf-8-sig")


async def test_the_image_of_another_row_is_no_sign_of_a_restored_ledger(tmp_path: Path) -> None:
    """It was saved under a name that a row without an image has, too."""
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,name\na fox,fox.png.png\na cat,fox\n")
    fails = nth_post(lambda number: rejected(400) if number == 1 else None)
    async with batch_of(Simulator(FAST_PROFILE), tmp_path / "run", fails) as batch:
        assert kinds(await run(batch, read_rows(rows))) == ["Failed", "Succeeded"]
    async with batch_of(Simulator(FAST_PROFILE, seed=1), tmp_path / "run") as batch:
        assert kinds(await run(batch, read_rows(rows), retry_failed=True)) == ["Succeeded"] * 2


async def test_two_runs_that_begin_with_different_ledgers_do_not_both_run(tmp_path: Path) -> None:
    """Each would charge all rows."""
    out, opened = tmp_path / "out", list[str]()

    async def begin(home: Path | None) -> None:
        try:
            ledger = await BatchLedger.open(out, ledger_folder=home)
        except LedgerError:
            return
        opened.append(str(home))
        await anyio.sleep(0.05)
        await ledger.aclose()

    for number in range(12):
        out, opened = tmp_path / str(number), []
        async with anyio.create_task_group() as group:
            for home in (tmp_path / f"a{number}", tmp_path / f"b{number}", None):
                group.start_soon(begin, home)
        assert len(opened) <= 1, opened


async def test_a_full_disk_leaves_no_empty_note_of_where_the_ledger_is(tmp_path: Path) -> None:
    """The batch could not be opened any more, even with the right folder."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ledger.location").touch()
    async with aclosing(await BatchLedger.open(tmp_path / "out", ledger_folder=tmp_path / "home")) as ledger:
        assert ledger.path.parent == tmp_path / "home"
    assert (tmp_path / "out" / "ledger.location").read_text().strip() == str(tmp_path / "home")
