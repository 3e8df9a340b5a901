"""Claims of the hostile benchmark, from its rows."""

from tools.result_files import claim


def _total(rows: list[dict], metric: str) -> int:
    return sum(row["value"] for row in rows if row["metric"] == metric)


def claims(rows: list[dict]) -> list[dict]:
    """How many cases and kills were survived, and what was not."""
    kills, lost = _total(rows, "kills"), _total(rows, "kills_with_another_result")
    partial = _total(rows, "partial_outputs")
    return [
        claim("hostile.fuzz_cases", _total(rows, "cases"), ">=", 10_000, "generated inputs, all surfaces"),
        claim(
            "hostile.fuzz_unexplained_failures",
            _total(rows, "unexplained"),
            "==",
            0,
            "cases that failed without an error message of ours or a host's, or changed a result silently",
        ),
        claim(
            "hostile.kills_survived",
            kills - lost,
            ">=",
            max(50, kills),
            "kill -9 after which the job went on to the tensors of an undisturbed run; the target is all, at least 50",
        ),
        claim("hostile.partial_outputs", partial, "==", 0, "outputs that looked finished and were not whole"),
    ]
