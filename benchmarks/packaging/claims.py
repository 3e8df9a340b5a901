"""What the packaging rows show: each package works wherever it was installed, and the tests pass there."""

from tools.result_files import claim


PACKAGES = ("optimum_freeact", "trl_mlc", "mergekit_ot")


def claims(rows: list[dict]) -> list[dict]:
    """Counts over all environments that were tried."""
    works = [row for row in rows if row["metric"] in PACKAGES]
    failed = sum(row["value"] != 1 for row in works) + sum(
        row["value"] for row in rows if row["metric"] == "tests_failed"
    )
    pythons = {row["python"].rpartition(".")[0] for row in works}
    environments = {(row["python"], row["versions"]) for row in works}
    return [
        claim("packaging.pythons", len(pythons), ">=", 4, "minor versions of Python with an environment"),
        claim("packaging.environments", len(environments), ">=", 6, "fresh environments, lowest and newest versions"),
        claim(
            "packaging.failures", failed, "==", 0, "packages that did not work + tests that failed, all environments"
        ),
    ]
