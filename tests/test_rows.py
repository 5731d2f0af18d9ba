"""Rows of a batch: reading files, validation, and stable keys."""

import json
import os
import time
import unicodedata
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanobanana_async import ConfigurationError, GenerationRequest, InvalidBatchFile, RowFile, read_rows
from nanobanana_async.batch.rows import RowKeys
from tests.fakes import PNG


def written(folder: Path, name: str, text: str | bytes) -> Path:
    """Write a file of rows."""
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def prompts(rows: RowFile) -> list[str]:
    """Return the prompts."""
    return [row.request.prompt for row in rows]


def test_a_text_file_has_one_prompt_per_line(tmp_path: Path) -> None:
    """Blank lines are ignored."""
    rows = read_rows(written(tmp_path, "p.txt", "a fox\n\n  a hare, at night \r\nan\u2028owl"))
    assert prompts(rows) == ["a fox", "a hare, at night", "an\u2028owl"]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('prompt,aspect_ratio,key,name\r\n"a fox,\nin snow",16:9,k1,fox\r\n', id="commas"),
        pytest.param('\ufeffPrompt;Aspect_Ratio;Key;Name\n"a fox,\nin snow";16:9;k1;fox\n;;;\n', id="spreadsheet"),
        pytest.param('prompt\taspect_ratio\tkey\tname\n"a fox,\nin snow"\t16:9\tk1\tfox', id="tabs"),
    ],
)
def test_a_csv_file_has_one_row_per_record(tmp_path: Path, text: str) -> None:
    """Any separator of a spreadsheet is recognized, and prompts may contain line breaks."""
    (row,) = read_rows(written(tmp_path, "p.csv", text))
    assert (row.request.prompt, row.request.aspect_ratio, row.key, row.name) == ("a fox,\nin snow", "16:9", "k1", "fox")


def test_a_jsonl_file_has_one_object_per_line(tmp_path: Path) -> None:
    """The names are those of a .csv, and images are a list."""
    (tmp_path / "ref.png").write_bytes(PNG)
    line = '{"prompt": "a fox", "images": ["ref.png", "https://example.org/x.png"], "image_size": "2K", "key": null}\n'
    (row,) = read_rows(written(tmp_path, "p.jsonl", line))
    assert row.request.images == (tmp_path / "ref.png", "https://example.org/x.png")
    assert row.request.image_size == "2k"


def test_images_in_a_csv_file_are_separated_by_bars(tmp_path: Path) -> None:
    """Paths are relative to the file, not to the working directory."""
    (tmp_path / "a.png").write_bytes(PNG)
    (row,) = read_rows(written(tmp_path, "p.csv", "prompt,images\na fox,a.png | https://example.org/x.png\n"))
    assert row.request.images == (tmp_path / "a.png", "https://example.org/x.png")


def test_defaults_fill_empty_columns(tmp_path: Path) -> None:
    """Columns with a value are unchanged."""
    path = written(tmp_path, "p.csv", "prompt,aspect_ratio\na fox,\na hare,1:1\n")
    rows = read_rows(path, aspect_ratio="16:9", model=None)
    assert [row.request.aspect_ratio for row in rows] == ["16:9", "1:1"]


def test_all_errors_are_listed_with_their_lines(tmp_path: Path) -> None:
    """A record is reported with its first line, as an editor counts."""
    path = written(
        tmp_path, "p.csv", 'prompt,images,aspect_ratio\n"two\nlines",,wide\nfox,none.png,\nok,,\n,,1:1\na,b,c,d\n'
    )
    with pytest.raises(InvalidBatchFile) as caught:
        read_rows(path)
    assert [fault.partition(": ")[::2] for fault in caught.value.errors] == [
        ("line 2", "aspect_ratio: expected 'auto' or 'N:M' such as '16:9', got 'wide'"),
        ("line 4", f"images: {tmp_path / 'none.png'}: cannot be read: No such file or directory"),
        ("line 6", "prompt: expected text, got ''"),
        ("line 7", "4 cells, but 3 columns. Quote text that contains a comma."),
    ]
    assert str(caught.value).splitlines()[0] == f"{path}: 4 errors; nothing was submitted"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        pytest.param("p.csv", "aspect_ratio\n1:1\n", "column 'prompt'", id="no-prompt-column"),
        pytest.param("p.csv", "prompt,aspect\nfox,1:1\n", "got 'aspect'. Rename it to 'aspect_ratio'", id="typo"),
        pytest.param("p.csv", "prompt,prompt\nfox,hare\n", "got 'prompt' twice", id="column-twice"),
        pytest.param("p.csv", 'prompt\n"fox\n', "line 2: unexpected end of data", id="open-quote"),
        pytest.param("p.csv", "", "column 'prompt'", id="empty-csv"),
        pytest.param("p.csv", "prompt\n", "contains no rows", id="header-only"),
        pytest.param("p.txt", "\n\n", "contains no rows", id="empty-txt"),
        pytest.param("p.txt", b"fox\nh\xe4re\n", "line 2 is not UTF-8, got byte 0xe4", id="latin-1"),
        pytest.param("p.jsonl", "{\n", "not JSON", id="bad-json"),
        pytest.param("p.jsonl", "[1]\n", "not a JSON object", id="no-object"),
        pytest.param("p.jsonl", "[" * 100_000, "not JSON", id="nested"),
        pytest.param("p.jsonl", '{"prompt": 5}', "prompt: expected text", id="number"),
        pytest.param("p.jsonl", '{"prompt": "x", "images": [5]}', "images: expected a list of text", id="image-number"),
        pytest.param(
            "p.jsonl", '{"prompt": "x", "image": 5}', "line 1: column: got 'image'. Rename it", id="typo-field"
        ),
        pytest.param("p.jsonl", '{"prompt": "\\ud800"}', "surrogate", id="half-a-character"),
        pytest.param("p.jsonl", '{"prompt": "a", "Prompt": "b"}', "prompt: expected each name once", id="field-twice"),
        pytest.param("p.txt", "sku;prompt\n1;a fox\n", "line 1 looks like the header of a table", id="csv-as-txt"),
        pytest.param("p.csv", "prompt,key\na,k\nb,k\n", "'k' is also the key of an earlier row", id="key-twice"),
        pytest.param("p.csv", "prompt,images\na,p.csv\n", "not a PNG, JPEG, WebP or GIF", id="no-image"),
        pytest.param("p.yaml", "- fox", ".txt, .csv, .tsv, .jsonl or .ndjson file", id="other-suffix"),
    ],
)
def test_an_unusable_file_is_rejected_before_anything_is_charged(
    tmp_path: Path, name: str, text: str | bytes, says: str
) -> None:
    """The error is typed and says what is wrong."""
    with pytest.raises(InvalidBatchFile) as caught:
        read_rows(written(tmp_path, name, text))
    assert says in str(caught.value)
    assert isinstance(caught.value, ConfigurationError)


def test_equal_rows_have_different_keys() -> None:
    """Three equal rows are three images."""
    keys = RowKeys()
    rows = [keys.row(GenerationRequest("a fox")) for _ in range(3)]
    assert [row.key for row in rows] == [rows[0].key, f"{rows[0].key}-2", f"{rows[0].key}-3"]


def test_a_row_is_the_same_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key uses the image paths as written in the file."""
    folder = tmp_path / "sub"
    folder.mkdir()
    (folder / "a.png").write_bytes(PNG)
    path = written(folder, "p.csv", "prompt,images\na fox,a.png\n")
    keys = []
    for place, name in ((tmp_path, Path("sub/p.csv")), (folder, Path("p.csv")), (tmp_path, path)):
        monkeypatch.chdir(place)
        keys += [row.key for row in read_rows(name)]
    assert len(set(keys)) == 1


@pytest.mark.parametrize(
    "other",
    [
        GenerationRequest("a fax"),
        GenerationRequest("a fox", images=[b"\x89PNG"]),
        GenerationRequest("a fox", model="other"),
        GenerationRequest("a fox", aspect_ratio="1:1"),
        GenerationRequest("a fox", image_size="4k"),
        GenerationRequest("a fox", extra={"seed": 1}),
    ],
)
def test_an_edited_row_is_a_new_row(other: GenerationRequest) -> None:
    """Everything the image depends on counts; the callback URL does not."""
    same = GenerationRequest("a fox", callback_url="https://example.org/cb")
    first, again, edited = (RowKeys().row(request).key for request in (GenerationRequest("a fox"), same, other))
    assert first == again != edited


@given(st.lists(st.sampled_from("abcde")), st.randoms())
def test_keys_do_not_depend_on_the_order(letters: list[str], rng: object) -> None:
    """Sorting, shuffling or adding rows keeps the keys."""
    shuffled = list(letters)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    before, after = (
        {keys.row(GenerationRequest(letter)).key for letter in order}
        for order, keys in ((letters, RowKeys()), (shuffled, RowKeys()))
    )
    assert before == after
    assert len(before) == len(letters)


@given(st.binary(max_size=200), st.sampled_from([".txt", ".csv", ".jsonl"]))
def test_any_file_is_rows_or_an_invalid_batch_file(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    """`read_rows` returns rows or raises `InvalidBatchFile` for any bytes."""
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    try:
        rows = read_rows(path)
    except InvalidBatchFile:
        return
    assert len({row.key for row in rows}) == len(rows) > 0


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        pytest.param("p.txt", "a fox\na hare\n".encode("utf-16"), ["a fox", "a hare"], id="E1-powershell"),
        pytest.param("p.txt", "a fox\n\ufeffa hare\n", ["a fox", "a hare"], id="E1-joined-files"),
        pytest.param("p.csv", "sep=;\r\nprompt;key\r\na fox;1\r\n", ["a fox"], id="E4-excel"),
        pytest.param("p.csv", "prompt,key,,\na fox,1,,\n", ["a fox"], id="E4-empty-columns"),
        pytest.param("p.csv", "prompt\na fox,,\n", ["a fox"], id="E4-trailing-cells"),
        pytest.param("p.csv", ",prompt\n0,a fox\n1,a hare\n", ["a fox", "a hare"], id="E4-pandas-index"),
        pytest.param("p.csv", 'key, prompt\n1, "a fox, red"\n', ["a fox, red"], id="E4-blank-after-comma"),
        pytest.param("p.tsv", "prompt\tkey\na fox\t1\n", ["a fox"], id="E4-tsv"),
        pytest.param("p.ndjson", '{"prompt": "a fox", "key": 7}\n', ["a fox"], id="E4-ndjson-number-key"),
        pytest.param("p.csv", "prompt,Preis,sku\na fox,1.5,F-1\n", ["a fox"], id="E4-further-columns"),
        pytest.param("p.csv", "prompt,Aspect Ratio\na fox,1:1\n", ["a fox"], id="E4-column-with-a-blank"),
        pytest.param("p.jsonl", '{"prompt": "a fox", "name": NaN, "key": 1.0}\n', ["a fox"], id="E4-pandas-json"),
        pytest.param("p.csv", "prompt\ra fox\ra hare\r", ["a fox", "a hare"], id="E4-old-mac"),
        pytest.param("p.txt", "# a comment\n  # another\na fox\n\\# one\n", ["a fox", "# one"], id="E5-comments"),
    ],
)
def test_what_common_programs_write_is_taken(
    tmp_path: Path, name: str, content: str | bytes, prompts: list[str]
) -> None:
    """Byte order marks, spreadsheets, data frames and comments cost no image."""
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert [row.request.prompt for row in read_rows(path)] == prompts


def test_e4_a_cell_may_be_a_large_data_uri(tmp_path: Path) -> None:
    """The limit of the csv module, 128 KiB, is smaller than most images."""
    uri = f"data:image/png;base64,{b64encode(PNG + bytes(300_000)).decode()}"
    path = written(tmp_path, "p.csv", f'prompt,images\na fox,"{uri}"\n')
    (row,) = read_rows(path)
    assert row.request.images == (uri,)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param("a fox\na hare\n".encode("utf-16-le"), "line 1 contains the control character", id="no-mark"),
        pytest.param(b"a fox\n" + "a hare\n".encode("utf-16-le"), "line 2 contains the control", id="appended"),
        pytest.param(b"a fox\n\x1b[31mred\n", "line 2 contains the control character", id="escape"),
        pytest.param(b"a fox\n...\n", "line 2: prompt: expected a letter or a digit, got '...'", id="no-letter"),
        pytest.param("a fox\n\u2014\n".encode(), "line 2: prompt: expected a letter or a digit", id="dash"),
    ],
)
def test_e1_text_that_is_no_prompt_is_refused_with_its_line(tmp_path: Path, content: bytes, says: str) -> None:
    """Two encodings in one file would be charged as prompts of NULs."""
    path = tmp_path / "p.txt"
    path.write_bytes(content)
    with pytest.raises(InvalidBatchFile) as caught:
        read_rows(path)
    assert says in str(caught.value)


def test_e4_an_aspect_ratio_that_became_a_time_is_read_as_a_ratio(tmp_path: Path) -> None:
    """Spreadsheets turn 16:9 into 16:09, and 4:3 into 04:03:00."""
    path = written(tmp_path, "p.csv", "prompt,aspect_ratio\na,16:09\nb,04:03:00\nc,21:9\nd,auto\n")
    assert [row.request.aspect_ratio for row in read_rows(path)] == ["16:9", "4:3", "21:9", "auto"]


def test_e4_further_columns_are_kept_in_their_order(tmp_path: Path) -> None:
    """They are for the results, and cells of megabytes are cut."""
    uri = f"data:image/png;base64,{b64encode(PNG + bytes(9000)).decode()}"
    rows = read_rows(written(tmp_path, "p.csv", f'sku,prompt,images,Preis\nF-1,a fox,"{uri}",9\n'))
    (row,) = rows
    assert rows.extra_columns == ("sku", "Preis")
    assert list(row.columns) == ["sku", "prompt", "images", "Preis"]
    assert (row.columns["sku"], len(str(row.columns["images"]))) == ("F-1", 2003)
    assert row.line == 2


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param('prompt\n"a fox\r\nin snow"\n', 'prompt\n"a fox\nin snow"\n', id="line-break"),
        pytest.param('prompt\n"a fox\nin snow"\n', "prompt\na fox in snow\n", id="wrapped"),
        pytest.param("prompt\na fox \n", "prompt\na fox\n", id="blank-at-the-end"),
        pytest.param("prompt\na\u00a0fox\n", "prompt\na fox\n", id="blank-that-does-not-break"),
        pytest.param("prompt\nsn\u00f6\n", "prompt\nsno\u0308\n", id="composed"),
        pytest.param("prompt\na\u200b fox\n", "prompt\na fox\n", id="zero-width"),
        pytest.param("prompt,key\na fox, k1\n", "prompt,key\na fox,k1 \n", id="blank-at-a-key"),
        pytest.param("prompt,aspect_ratio\na fox,16:9\n", "prompt,aspect_ratio\na fox, 16:09\n", id="time"),
        pytest.param("prompt,image_size\na fox,2K\n", "prompt,image_size\na fox,2k\n", id="case-of-a-size"),
    ],
)
def test_e2_an_invisible_difference_makes_no_new_row(tmp_path: Path, before: str, after: str) -> None:
    """Programs that save a file again differ in all of these, and a new row is charged."""
    rows = [next(iter(read_rows(written(tmp_path, "p.csv", text)))) for text in (before, after)]
    assert rows[0].key == rows[1].key
    assert rows[0].fingerprint == rows[1].fingerprint


def test_e3_copies_are_counted_and_left_out_if_asked(tmp_path: Path) -> None:
    """Rows with keys of their own may be copies, too."""
    path = written(tmp_path, "p.csv", "prompt,key\na fox,\na hare,\na fox,\n a fox ,k\n")
    rows, once = read_rows(path), read_rows(path, once=True)
    assert (len(rows), rows.copies) == (4, 2)
    assert (len(once), once.copies, [row.request.prompt for row in once]) == (2, 2, ["a fox", "a hare"])
    assert [row.key for row in once] == [row.key for row in rows][:2]


JPEG_HEAD = b"\xff\xd8\xff\xe1\x00\x08\xff\xda\xff\xd9\x00\x00\xff\xda\x00\x04\x00\x00"  # with a preview


@pytest.mark.parametrize(
    ("images", "says"),
    [
        pytest.param("cut.png", "the image is truncated", id="cut-png"),
        pytest.param("cut.jpg", "the image is truncated", id="cut-jpeg-with-a-whole-preview"),
        pytest.param("cut.webp", "the image is truncated", id="cut-webp"),
        pytest.param("data:,", "expected base64 of an image", id="empty-data"),
        pytest.param("data:text/html,<p>", "expected base64 of an image", id="html"),
        pytest.param("data:text/plain;base64,aGVsbG8=", "not a PNG", id="text"),
        pytest.param("DATA:image/png;base64,iVBORw0KGgo=", "the image is truncated", id="cut-data"),
        pytest.param("pipe", "expected a regular file", id="fifo"),
        pytest.param(".", "expected a regular file", id="folder"),
        pytest.param("s3://bucket/fox.png", "expected a path, a data URI or an http(s) URL", id="bucket"),
        pytest.param("file:///none/fox.png", "/none/fox.png: cannot be read", id="file-url-without-file"),
    ],
)
def test_e6_a_reference_that_is_no_image_is_refused_with_its_line(tmp_path: Path, images: str, says: str) -> None:
    """It would be charged, or hang the reader."""
    (tmp_path / "cut.png").write_bytes(PNG[:-20])
    (tmp_path / "cut.jpg").write_bytes(JPEG_HEAD + bytes(100))
    (tmp_path / "cut.webp").write_bytes(b"RIFF\xff\x00\x00\x00WEBPVP8L")
    os.mkfifo(tmp_path / "pipe")
    path = written(tmp_path, "p.jsonl", json.dumps({"prompt": "a fox", "images": [images]}))
    with pytest.raises(InvalidBatchFile) as caught:
        read_rows(path)
    assert caught.value.errors[0].startswith("line 1: images: ")
    assert says in caught.value.errors[0]


def test_e6_references_are_taken_as_people_write_them(tmp_path: Path) -> None:
    """Schemes in capitals, file URLs as browsers copy them, and photos with a film after their end."""
    (tmp_path / "a fox.png").write_bytes(PNG)
    (tmp_path / "film.jpg").write_bytes(JPEG_HEAD + b"\xff\xd9" + bytes(200_000))
    url = (tmp_path / "a fox.png").as_uri()
    path = written(tmp_path, "p.csv", f"prompt,images\na,HTTPS://example.org/x.png|{url}|film.jpg\n")
    (row,) = read_rows(path)
    assert row.request.images == ("https://example.org/x.png", tmp_path / "a fox.png", tmp_path / "film.jpg")


def test_a_file_that_was_changed_after_its_check_is_not_submitted(tmp_path: Path) -> None:
    """What was checked is what is charged."""
    path = written(tmp_path, "p.txt", "a fox\n")
    rows = read_rows(path)
    path.write_text("a fox\na hare\n")
    with pytest.raises(InvalidBatchFile, match="was changed after it was checked"):
        list(rows)


@pytest.mark.parametrize("edit", ["a hare\na fox\na cat\n", "a f\u00fcx\na hare\na cat\n", ""])
def test_a_file_that_is_edited_in_place_during_the_run_stops_it(tmp_path: Path, edit: str) -> None:
    """Editors write into the same file, and a buffer would have the end of one version and the begin of another."""
    path = written(tmp_path, "p.txt", "a fox\na hare\na cat\n" * 5000)
    rows = iter(read_rows(path))
    taken = [next(rows).request.prompt for _ in range(3)]
    path.write_text(edit * 5000)
    with pytest.raises(InvalidBatchFile, match="was changed after it was checked"):
        next(rows)
    assert taken == ["a fox", "a hare", "a cat"]


def test_a_file_name_is_found_in_either_unicode_form(tmp_path: Path) -> None:
    """MacOS decomposes letters, and spreadsheets compose them."""
    (tmp_path / unicodedata.normalize("NFD", "hut gr\u00fcn.png")).write_bytes(PNG)
    (row,) = read_rows(written(tmp_path, "p.csv", "prompt,images\na hat,hut gr\u00fcn.png\n"))
    assert isinstance(row.request.images[0], Path)


def test_a_line_of_blanks_takes_no_time(tmp_path: Path) -> None:
    """It took 44 s: the expression for blanks at an end was quadratic."""
    began_s = time.monotonic()
    (row,) = read_rows(written(tmp_path, "p.txt", f"ein sch\u00f6ner{' ' * 40_000}Fuchs\n"))
    assert time.monotonic() - began_s < 2
    assert row.fingerprint == RowKeys().row(GenerationRequest("ein sch\u00f6ner Fuchs")).fingerprint


def test_a_pipe_is_read_once_and_its_rows_many_times(tmp_path: Path) -> None:
    """A shell passes `<(command)` as a pipe."""
    pipe = tmp_path / "rows.txt"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(pipe.write_text, "a fox\na hare\n")
        rows = read_rows(pipe)
    assert prompts(rows) == prompts(rows) == ["a fox", "a hare"]


def test_the_keys_of_a_file_can_be_looked_up(tmp_path: Path) -> None:
    """A million keys take eight megabytes."""
    rows = read_rows(written(tmp_path, "p.csv", "prompt,key\na fox,k1\na hare,\n"))
    assert all(row.key in rows for row in rows)
    assert "k2" not in rows
