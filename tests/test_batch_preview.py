"""What is printed about a file before the first submit and after the last: `--dry-run`, `--limit`, `--once`."""

import json
from decimal import Decimal
from pathlib import Path

import attrs
import pytest

from nanobanana_async.simulator import FAST_PROFILE
from nanobanana_async.simulator.server import SimulatorServer
from tests.commands import Ended, nanobanana

pytestmark = pytest.mark.other_clients


@attrs.define
class Shop:
    """A folder with a file of rows, and the service."""

    folder: Path
    server: SimulatorServer

    def write(self, text: str) -> None:
        """Write the file of rows."""
        (self.folder / "rows.csv").write_text(text)

    def batch(self, *options: str) -> Ended:
        """Run the batch to its end."""
        return nanobanana("batch", "rows.csv", "--out", "run", "--poll", "0.05", *options, cwd=self.folder)

    @property
    def charges(self) -> int:
        """Number of submits that were charged."""
        return len(self.server.charges)


@pytest.fixture
def shop(nanobanana_server: SimulatorServer, tmp_path: Path) -> Shop:
    """Return a folder with four rows, one of them a copy."""
    made = Shop(tmp_path, nanobanana_server)
    made.write("sku,prompt\n1,a fox\n2,a hare\n3,an owl\n4,a fox\n")
    return made


def test_f3_a_dry_run_says_what_a_run_would_do_and_charges_nothing(shop: Shop) -> None:
    """Rows, copies, columns, the balance, and the price once it is known. It makes no folder."""
    first = shop.batch("--dry-run")
    assert first.code == 0
    assert first.out.splitlines() == [
        "4 rows: 4 to submit, 0 saved",
        "1 row with the content of an earlier row: each is charged. To leave copies out, add --once",
        "columns kept for the results, and not sent: sku",
        "4 images of google/gempix2: price not known before the first image",
        "balance: 100000 credits",
        "nothing was submitted",
    ]
    assert (shop.charges, (shop.folder / "run").exists()) == (0, False)
    assert shop.batch("--limit", "1").code == 0
    second = shop.batch("--dry-run", "--once")
    assert second.out.splitlines()[0] == "3 rows: 2 to submit, 1 saved"
    assert "2 images of google/gempix2: 0.5 credits each\ncost: up to 1 credits\n" in second.out
    assert shop.charges == 1


def test_f3_a_dry_run_works_without_a_key_and_as_json(shop: Shop) -> None:
    """A program reads the same facts."""
    bare = nanobanana("batch", "rows.csv", "--out", "run", "--dry-run", "--json", cwd=shop.folder, DEFAPI_API_KEY="")
    assert bare.code == 0
    record = json.loads(bare.out)
    assert (record["rows"], record["to_submit"], record["copies"], record["balance"]) == (4, 4, 1, None)


def test_f3_a_limit_takes_the_first_rows(shop: Shop) -> None:
    """A later run without the limit takes the rest."""
    tried = shop.batch("--limit", "2")
    assert (tried.code, shop.charges) == (0, 2)
    assert "2 of 2 saved; 1 credits spent" in tried.err
    assert "4 of 4 saved; 2 credits spent" in shop.batch().err


def test_e3_copies_are_printed_before_they_are_charged_and_left_out_with_once(shop: Shop) -> None:
    """A row that was pasted twice is charged twice."""
    once = shop.batch("--once")
    assert "1 row with the content of an earlier row: left out" in once.err
    assert "3 of 3 saved" in once.err
    assert shop.charges == 3
    assert "each is charged. To leave copies out, add --once" in shop.batch().err
    assert shop.charges == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "options"),
    [
        pytest.param("sku,prompt\n1,a fox\n2,a hare\n3,an owl\n4,a fox\n", ["--aspect-ratio", "16:9"], id="option"),
        pytest.param("key,prompt\n1,a fox\n2,a hare\n3,an owl\n4,a fox\n", [], id="keys-added"),
        pytest.param("prompt\na fox.\na hare.\nan owl.\n", [], id="texts"),
    ],
)
def test_e2_rows_that_replace_charged_ones_are_confirmed_first(shop: Shop, rows: str, options: list[str]) -> None:
    """Another option buys a finished batch again."""
    assert shop.batch().code == 0
    shop.write(rows)
    refused = shop.batch(*options)
    assert (refused.code, shop.charges) == (2, 4)
    assert "charged rows of earlier runs are not in the file" in refused.err
    assert "To submit them, pass --yes" in refused.err
    assert "Traceback" not in refused.err
    assert shop.batch("--yes", *options).code == 0
    assert shop.charges > 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param("prompt\na fox\na hare\nan owl\na crow\na fox\n", id="one-added"),
        pytest.param("prompt\na fox\na hare\nan owl at night\na fox\n", id="one-edited"),
        pytest.param("prompt\na crow\n", id="another-file-of-one"),
        pytest.param("sku,prompt\n9,an owl\n8,a fox\n7,a fox\n6,a hare\n", id="sorted-and-renumbered"),
    ],
)
def test_e2_ordinary_edits_need_no_confirmation(shop: Shop, rows: str) -> None:
    """Rows are added, edited and sorted all the time."""
    assert shop.batch().code == 0
    shop.write(rows)
    assert shop.batch().code == 0


def test_f4_an_unknown_row_is_one_short_line_with_its_number_and_key(shop: Shop) -> None:
    """The line is where the user edits, and the key is what `resolve` takes."""
    shop.server.service.profile = attrs.evolve(FAST_PROFILE, lost_responses=1.0)
    ended = shop.batch("--limit", "1")
    assert ended.code == 3
    about = [line for line in ended.err.splitlines() if "a fox" in line]
    assert len(about) == 1
    assert about[0].startswith("line 2 'a fox': may have been charged, key ")
    assert len(about[0]) < 150
    assert "1 may have been charged. To resolve them, run: nanobanana batch resolve --out run" in ended.err


def test_f4_a_row_that_still_runs_is_not_called_failed(shop: Shop) -> None:
    """Its image comes with the next run."""
    shop.server.service.profile = attrs.evolve(FAST_PROFILE, median_s=30.0)
    ended = shop.batch("--limit", "2", "--timeout", "0.3")
    assert ended.code == 3
    assert "line 2 'a fox': still running. The next run waits for it again" in ended.err
    assert "failed" not in ended.err
    assert "0 of 2 saved, 2 remaining (2 submitted)" in ended.err


def test_f4_the_summary_explains_the_exit_code_of_rows_that_are_not_in_the_file(shop: Shop) -> None:
    """All rows of the file are saved, and another one may have been charged."""
    shop.server.service.profile = attrs.evolve(FAST_PROFILE, lost_responses=1.0)
    assert shop.batch("--limit", "1").code == 3
    shop.server.service.profile = FAST_PROFILE
    shop.write("prompt\na hare\n")
    ended = shop.batch()
    assert "1 of 1 saved" in ended.err
    assert "1 row of earlier runs not in the file, 1 unknown" in ended.err
    assert "1 may have been charged. To resolve them" in ended.err


def test_f3_a_dry_run_knows_what_a_run_would_retry_and_what_is_charged(shop: Shop) -> None:
    """Failed rows are submitted with --retry-failed, and charged ones are downloaded."""
    shop.server.service.profile = attrs.evolve(FAST_PROFILE, failed_tasks=1.0)
    assert shop.batch("--limit", "2").code == 3
    shop.server.service.profile = attrs.evolve(FAST_PROFILE, median_s=30.0)
    assert shop.batch("--limit", "3", "--timeout", "0.3").code == 3
    assert "4 rows: 1 to submit, 0 saved, 1 charged and to be downloaded" in shop.batch("--dry-run").out
    assert "4 rows: 3 to submit" in shop.batch("--dry-run", "--retry-failed").out


def test_f3_a_dry_run_says_that_balance_or_budget_is_not_enough(shop: Shop) -> None:
    """The run would stop half way."""
    assert shop.batch("--limit", "1").code == 0
    shop.server.service.profile = attrs.evolve(FAST_PROFILE, balance=Decimal("1.2"))
    out = shop.batch("--dry-run", "--budget", "1.5").out
    assert "cost: up to 1.5 credits" in out
    assert "balance: 0.7 credits, which is not enough for all of them" in out
    assert "budget left: 1 credits, which is not enough for all of them" in out


def test_the_table_of_the_batch_is_refused_as_its_file(shop: Shop) -> None:
    """It is rewritten, and rows that were added to it would be lost."""
    assert shop.batch("--limit", "1").code == 0
    refused = nanobanana("batch", "run/results.csv", "--out", "run", cwd=shop.folder)
    assert (refused.code, shop.charges) == (2, 1)
    assert "is the table of this batch" in refused.err


def test_f4_rows_beyond_the_limit_are_not_called_missing(shop: Shop) -> None:
    """They are in the file."""
    assert shop.batch().code == 0
    assert "not in the file" not in shop.batch("--limit", "2").err


def test_f4_a_budget_that_is_used_up_is_part_of_the_command_to_resume(shop: Shop) -> None:
    """The same command would stop at once."""
    ended = shop.batch("--budget", "1", "--max-price", "0.5")
    assert ended.code == 1
    assert "0 of the budget left" in ended.err
    assert "To resume, run with a larger --budget: nanobanana batch rows.csv" in ended.err
