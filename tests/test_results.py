"""Published numbers: a claim follows from its rows or the check fails, and pages say what the files say."""

import json
import re
import sys
import types

import pytest

from tools import result_files, results
from tools.result_files import claim, problems, read, write


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def toy_claims(rows):
    """Ratio of the two methods' mean nll, as a benchmark's claims module would."""

    def mean(method):
        values = [row["value"] for row in rows if row["method"] == method and row["value"] is not None]
        return sum(values) / len(values)

    return [claim("toy.ratio", mean("ours") / mean("theirs"), "<=", 0.5, "mean nll[ours] / mean nll[theirs]")]


def toy_rows():
    fields = ("model", "method", "setting", "metric", "value", "seed")
    return [
        dict(zip(fields, row, strict=True))
        for row in (
            ("tiny", "ours", "w4a4", "nll", 1.1, 0),
            ("tiny", "ours", "w4a4", "nll", 1.3, 1),
            ("tiny", "theirs", "w4a4", "nll", 3.0, 0),
            ("tiny", "ours", "w4a16", "nll", 0.9, 0),
        )
    ]


@pytest.fixture(autouse=True)
def toy_benchmark(monkeypatch):
    module = types.ModuleType("toy_benchmark")
    module.claims = toy_claims
    monkeypatch.setitem(sys.modules, "toy_benchmark", module)
    monkeypatch.setenv("CONCORD_COMMIT", COMMIT)


@pytest.fixture
def folder(tmp_path):
    """A folder with one good result file."""
    write("toy", toy_rows(), "toy_benchmark", "python toy.py", [0, 1], machine="a box", folder=tmp_path)
    return tmp_path


def edit(folder, change):
    document = read(folder / "toy.json")
    change(document)
    (folder / "toy.json").write_text(json.dumps(document))


# --- writing -----------------------------------------------------------------------------------------------------


def test_written_file_is_stamped_and_right(folder):
    document = read(folder / "toy.json")
    assert problems(document) == []
    assert (document["commit"], document["dirty"], document["seeds"]) == (COMMIT, False, [0, 1])
    assert document["rows"] == toy_rows()
    [made] = document["claims"]
    assert made["value"] == pytest.approx((1.1 + 1.3 + 0.9) / 3 / 3.0, rel=1e-15)
    assert made["holds"] is True
    assert sorted(path.name for path in folder.iterdir()) == ["toy.json"]
    assert len((folder / "toy.json").read_text().splitlines()) < 25  # a line per row, not per field


def test_dirty_tree_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("CONCORD_COMMIT", COMMIT + "-dirty")
    path = write("toy", toy_rows(), "toy_benchmark", "python toy.py", [0], machine="a box", folder=tmp_path)
    assert (read(path)["commit"], read(path)["dirty"]) == (COMMIT, True)
    assert "(dirty tree)" in results.check(tmp_path)[0][0]


def test_commit_comes_from_git_and_result_files_do_not_make_a_tree_dirty(monkeypatch):
    monkeypatch.delenv("CONCORD_COMMIT")
    asked = []
    monkeypatch.setattr(result_files, "_git", lambda *a: asked.append(a) or {"rev-parse": COMMIT + "\n"}.get(a[0], ""))
    assert result_files.commit_and_dirty() == (COMMIT, False)
    assert ":(exclude)benchmarks/results" in asked[1]
    monkeypatch.setattr(result_files, "_git", lambda *a: {"rev-parse": COMMIT}.get(a[0], " M x.py"))
    assert result_files.commit_and_dirty() == (COMMIT, True)

    def no_git(*_):
        raise FileNotFoundError("git")

    monkeypatch.setattr(result_files, "_git", no_git)
    with pytest.raises(RuntimeError, match="CONCORD_COMMIT"):
        result_files.commit_and_dirty()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"metric": "nll"}, "metric and value"),
        ({"metric": "nll", "value": float("nan"), "method": "ours"}, "write null and say why"),
        ({"metric": "nll", "value": None, "method": "ours"}, "note must say why"),
        ({"metric": "nll", "value": "3.0", "method": "ours"}, "must be a number"),
        ({"metric": "nll", "value": 1.0, "method": ["ours"]}, "plain value"),
    ],
)
def test_bad_rows_are_refused_and_nothing_is_written(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        write("toy", [*toy_rows(), row], "toy_benchmark", "python toy.py", [0], machine="a box", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_no_json_are_refused(tmp_path):
    rows = [{**toy_rows()[0], "value": object()}]
    with pytest.raises(ValueError, match="plain JSON"):
        write("toy", rows, "toy_benchmark", "python toy.py", [0], machine="a box", folder=tmp_path)


def test_a_failed_measurement_is_a_row_with_a_reason(tmp_path):
    rows = [*toy_rows(), {"method": "theirs", "metric": "nll", "value": None, "note": "does not install"}]
    write("toy", rows, "toy_benchmark", "python toy.py", [0], machine="a box", folder=tmp_path)
    assert results.check(tmp_path)[1] == []


def test_a_crash_while_writing_keeps_the_old_file(folder, monkeypatch):
    before = (folder / "toy.json").read_bytes()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(result_files.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write("toy", toy_rows()[:3], "toy_benchmark", "python toy.py", [0], machine="a box", folder=folder)
    assert [path.name for path in folder.iterdir()] == ["toy.json"]
    assert (folder / "toy.json").read_bytes() == before


def test_claim_holds_follows_and_unknown_comparison_is_refused():
    assert claim("a", 0.5, "<=", 0.5, "x")["holds"] is True
    assert claim("a", 0.5, "<", 0.5, "x")["holds"] is False
    assert claim("a", 2, ">=", 1, "x")["holds"] is True
    assert claim("a", float("nan"), ">=", 1, "x")["holds"] is False
    with pytest.raises(ValueError, match="'~'"):
        claim("a", 1, "~", 1, "x")


def test_machine_and_command_are_told(monkeypatch):
    import torch

    assert f"torch {torch.__version__}" in result_files.machine_name()
    monkeypatch.setattr(sys, "argv", [str(result_files.ROOT / "benchmarks/toy/run.py"), "--models", "a b"])
    assert result_files.command_line() == "python benchmarks/toy/run.py --models 'a b'"
    told = "python benchmarks/toy/run.py --rows /somewhere/rows.jsonl --models 'a b' --out /else --seeds 0"
    assert result_files.without_places(told) == "python benchmarks/toy/run.py --models 'a b' --seeds 0"


# --- checking ----------------------------------------------------------------------------------------------------


def test_check_reports_every_claim_and_a_shortfall_is_no_error(folder):
    lines, wrong = results.check(folder)
    assert wrong == []
    assert re.fullmatch(r"pass\s+toy\.ratio\s+0\.3667 <= 0\.5", lines[0])

    rows = [{**row, "value": 2.9} if row["method"] == "ours" else row for row in toy_rows()]
    write("toy", rows, "toy_benchmark", "python toy.py", [0, 1], machine="a box", folder=folder)
    lines, wrong = results.check(folder)
    assert wrong == []
    assert lines[0].startswith("falls short  toy.ratio")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["rows"][0].update(value=1.2), "stored value"),
        (lambda d: d["claims"][0].update(value=d["claims"][0]["value"] * (1 + 1e-8)), "stored value"),
        (lambda d: d["claims"][0].update(holds=False), "does not follow from"),
        (lambda d: d["claims"][0].update(target=0.9), "the benchmark says 0.5"),
        (lambda d: d["claims"][0].update(how="magic"), "how is 'magic'"),
        (lambda d: d["claims"][0].update(id="toy.other"), "toy.other does not follow from the rows"),
        (lambda d: d["claims"].append(d["claims"][0]), "appears twice"),
        (lambda d: d["claims"].clear(), "not in the file"),
        (lambda d: d["claims"][0].pop("how"), "exactly the fields"),
        (lambda d: d["claims"][0].update(value="0.1"), "must be finite"),
        (lambda d: d["claims"][0].update(compare="~"), "compare must be"),
        (lambda d: d.pop("commit"), "lacks 'commit'"),
        (lambda d: d.update(extra=1), "unknown field 'extra'"),
        (lambda d: d.update(commit="main"), "full hash"),
        (lambda d: d.update(dirty="no"), "dirty must be"),
        (lambda d: d.update(date="yesterday"), "date must be"),
        (lambda d: d.update(seeds=[]), "seeds must be"),
        (lambda d: d.update(machine=" "), "machine must be"),
        (lambda d: d.update(rows=[]), "rows must be"),
        (lambda d: d.update(benchmark="other"), "the file is named 'toy'"),
        (lambda d: d.update(claims_from="no_such_module"), "cannot be derived"),
        (lambda d: d.update(claims_from="json"), "no function claims"),
    ],
)
def test_check_fails_on_every_kind_of_tampering(folder, change, message):
    edit(folder, change)
    lines, wrong = results.check(folder)
    assert any(message in problem for problem in wrong), wrong
    assert results.main(["check"], folder=folder) == 1


def test_check_tolerates_rounding_of_the_last_digits(folder):
    edit(folder, lambda d: d["claims"][0].update(value=d["claims"][0]["value"] * (1 + 1e-10)))
    assert results.check(folder)[1] == []


def test_check_refuses_broken_json_and_a_claim_made_twice(folder):
    (folder / "broken.json").write_text("{")
    (folder / "list.json").write_text("[]")
    document = {**read(folder / "toy.json"), "benchmark": "toy2"}
    (folder / "toy2.json").write_text(json.dumps(document))
    wrong = results.check(folder)[1]
    assert any("broken.json is no JSON" in problem for problem in wrong)
    assert any("list.json must hold a JSON object" in problem for problem in wrong)
    assert any("toy.ratio is also in toy.json" in problem for problem in wrong)


# --- pages -------------------------------------------------------------------------------------------------------


def test_table_spans_methods_and_settings_and_averages_only_seeds(folder):
    text = results.table(read(folder / "toy.json"), [])
    assert text.splitlines()[:4] == [
        "| method | w4a4 | w4a16 |",
        "| --- | ---: | ---: |",
        "| ours | 1.2 ± 0.14 | 0.9 |",
        "| theirs | 3 | – |",
    ]
    assert f"at {COMMIT[:10]}" in text
    assert "a box" in text

    edit(folder, lambda d: d["rows"].append({**d["rows"][0], "metric": "seconds", "value": 12345.6}))
    text = results.table(read(folder / "toy.json"), ["rows=model,method"])
    assert text.count("| model | method |") == 2
    assert "**metric seconds**" in text
    assert "12,346" in text


def test_marks_are_filled_and_filling_is_stable(folder):
    page = (
        "A\n<!-- results:toy setting=w4a4 --><!-- /results -->\nratio "
        "<!-- results:toy claim=toy.ratio digits=2 -->9<!-- /results -->, nll "
        "<!-- results:toy value method=theirs -->?<!-- /results -->, with its goal "
        "<!-- results:toy claim=toy.ratio digits=2 verdict --><!-- /results -->.\n<!-- results:toy claims -->stale<!-- /results -->\n"
    )
    filled = results.fill(page, folder)
    assert "-->\n| method | w4a4 |\n" in filled
    assert "ratio <!-- results:toy claim=toy.ratio digits=2 -->0.37<!-- /results -->, nll" in filled
    assert "method=theirs -->3<!-- /results -->, with" in filled
    assert "verdict -->0.37 (<= 0.5: holds)<!-- /results -->." in filled
    assert "| `toy.ratio` | 0.3667 | <= 0.5 | pass |" in filled
    assert "stale" not in filled
    assert results.fill(filled, folder) == filled


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("other", r"'other'; there are \['toy'\]"),
        ("toy method=nobody", r"\['ours', 'theirs'\]"),
        ("toy method=ours,nobody", r"No row has method=nobody; there are \['ours', 'theirs'\]"),
        ("toy claim=toy.none", r"\['toy.ratio'\]"),
        ("toy value", "still differ in"),
        ("toy huge", "Unknown word"),
    ],
)
def test_a_mark_that_cannot_be_filled_says_what_there_is(folder, query, message):
    with pytest.raises(ValueError, match=message):
        results.fill(f"<!-- results:{query} -->x<!-- /results -->", folder)


def test_a_value_may_hold_a_comma_itself():
    rows = [{"method": "ours"}, {"method": "ours, groups"}]
    assert results._select(rows, {"method": "ours, groups"}) == rows[1:]
    assert results._select(rows, {"method": "ours"}) == rows[:1]


def test_an_open_mark_is_an_error(folder):
    with pytest.raises(ValueError, match="not closed"):
        results.fill("<!-- results:toy -->", folder)


def test_update_writes_pages_and_its_check_only_looks(folder, tmp_path, capsys):
    root = tmp_path / "project"
    (root / "docs").mkdir(parents=True)
    (root / "README.md").write_text("nothing marked\n")
    page = root / "docs" / "a.md"
    page.write_text("<!-- results:toy value method=theirs -->0<!-- /results -->\n")
    assert results.main(["update", "--check"], root, folder) == 1
    assert "docs/a.md is out of date" in capsys.readouterr().out
    assert "-->0<!--" in page.read_text()
    assert results.main(["update"], root, folder) == 0
    assert "-->3<!--" in page.read_text()
    assert results.main(["update", "--check"], root, folder) == 0


def test_table_command_prints_and_names_what_exists(folder, capsys):
    assert results.main(["table", "toy", "method=ours"], folder=folder) == 0
    assert "| ours | 1.2 ± 0.14 | 0.9 |" in capsys.readouterr().out
    assert results.main(["table", "nothing"], folder=folder) == 1
    assert "there are ['toy']" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.30000001, "0.3"), (35.61234, "35.61"), (123456.7, "123,457"), (1e-6, "1e-06")]
)
def test_numbers_are_written_for_people(value, text):
    assert results.number(value) == text


# --- this repository ---------------------------------------------------------------------------------------------


def test_every_claim_of_this_repository_follows_from_its_rows():
    assert results.check()[1] == []


def test_the_pages_of_this_repository_are_up_to_date():
    assert results.update(write=False) == []


MEASURED = re.compile(
    r"[\d.,]*\d\s?(?:%|nats|GB|GiB|MB|MiB|ms\b|tokens/s|(?:seconds?|minutes?)\b|x (?:faster|smaller))"
)


def unsourced(text: str) -> list[str]:
    """Numbers with a unit of measurement in prose: outside result marks and code."""
    text = re.sub(r"```.*?```", "", results.MARK.sub("", text), flags=re.DOTALL)
    return [match.group() for match in MEASURED.finditer(re.sub(r"`[^`]*`", "", text))]


def test_no_page_states_a_measured_number_of_its_own():
    assert {page.name: found for page in results.pages() if (found := unsourced(page.read_text()))} == {}


def test_unsourced_numbers_are_recognised():
    assert unsourced("It is 3.2x faster, loses 4 % and needs 2.5 GB for 30 seconds.") == [
        "3.2x faster",
        "4 %",
        "2.5 GB",
        "30 seconds",
    ]
    assert unsourced("4-bit weights, `0.3 GB`, <!-- results:a value -->4 %<!-- /results --> of 7B models") == []
